//! Longest common subsequences of texts, for ROUGE-L.

use crate::par;
use std::collections::HashMap;
use unicode_segmentation::UnicodeSegmentation;

/// What a word is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Words {
    /// Runs of `[a-z0-9]` in lower case, as the package `rouge-score` without stemming: other scripts have none.
    Ascii,
    /// Words by Unicode's segmentation rules (UAX #29), in lower case; most ideographs are words of their own.
    Unicode,
}

impl Words {
    /// Calls `each` with every word of `text`, in order.
    fn each<'a>(self, text: &'a str, mut each: impl FnMut(&'a str)) {
        match self {
            Self::Ascii => text
                .split(|c: char| !c.is_ascii_alphanumeric())
                .filter(|w| !w.is_empty())
                .for_each(each),
            Self::Unicode => text.unicode_words().for_each(&mut each),
        }
    }
}

/// Length of the longest common subsequence of a pair of texts, and their lengths, in words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overlap {
    pub common: usize,
    pub candidate: usize,
    pub reference: usize,
}

/// [`Overlap`] of each pair.
pub fn overlaps(pairs: Vec<(&str, &str)>, words: Words) -> Vec<Overlap> {
    // The work is a product of lengths over 64; the bytes of the texts bound it from below.
    let bytes = pairs.iter().map(|(a, b)| 8 * (a.len() + b.len())).sum();
    par::map(bytes, pairs, |(candidate, reference)| {
        overlap(&candidate.to_lowercase(), &reference.to_lowercase(), words)
    })
}

fn overlap(candidate: &str, reference: &str, words: Words) -> Overlap {
    // Words become numbers by their first place in the reference.
    let mut ids: HashMap<&str, usize> = HashMap::new();
    let mut b = Vec::new();
    words.each(reference, |w| {
        let next = ids.len();
        b.push(*ids.entry(w).or_insert(next));
    });
    let mut a = Vec::new();
    words.each(candidate, |w| a.push(ids.get(w).copied()));
    Overlap {
        common: common_subsequence(&a, &b, ids.len()),
        candidate: a.len(),
        reference: b.len(),
    }
}

/// Length of the longest common subsequence, 64 places of `b` at a time (Hyyrö, Bit-parallel LCS-length computation
/// revisited, 2004). `a` holds numbers below `alphabet`, or nothing where the word is not in `b`.
pub fn common_subsequence(a: &[Option<usize>], b: &[usize], alphabet: usize) -> usize {
    let blocks = b.len().div_ceil(64);
    let mut places = vec![0u64; alphabet * blocks];
    for (j, id) in b.iter().enumerate() {
        places[id * blocks + j / 64] |= 1 << (j % 64);
    }
    // A zero at j: the subsequence grows there.
    let mut row = vec![u64::MAX; blocks];
    for id in a.iter().flatten() {
        let mut carry = false;
        for (v, m) in row.iter_mut().zip(&places[id * blocks..]) {
            let u = *v & m;
            let (sum, first) = v.overflowing_add(u);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            carry = first | second;
            *v = sum | (*v & !u);
        }
    }
    // Bits past the end of b have no places and stay ones.
    row.iter().map(|v| v.count_zeros() as usize).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(a: &[usize], b: &[usize]) -> usize {
        let mut best = vec![0; b.len() + 1];
        for x in a {
            let mut before = 0;
            for (j, y) in b.iter().enumerate() {
                let kept = best[j + 1];
                best[j + 1] = if x == y {
                    before + 1
                } else {
                    kept.max(best[j])
                };
                before = kept;
            }
        }
        best[b.len()]
    }

    proptest! {
        #[test]
        fn bits_equal_the_table(
            a in prop::collection::vec(0usize..9, 0..260),
            b in prop::collection::vec(0usize..6, 0..260),
        ) {
            let known: Vec<Option<usize>> = a.iter().map(|x| (*x < 6).then_some(*x)).collect();
            prop_assert_eq!(common_subsequence(&known, &b, 6), table(&a, &b));
        }
    }

    fn counts(pair: (&str, &str), words: Words) -> (usize, usize, usize) {
        let o = overlaps(vec![pair], words)[0];
        (o.common, o.candidate, o.reference)
    }

    #[test]
    fn published_examples() {
        let reference = "police killed the gunman";
        let ascii = |a, b| counts((a, b), Words::Ascii);
        assert_eq!(ascii("police kill the gunman", reference), (3, 4, 4));
        assert_eq!(ascii("the gunman police killed", reference), (2, 4, 4));
        assert_eq!(ascii("The GUNMAN!", reference), (2, 2, 4));
        assert_eq!(ascii("", reference), (0, 0, 4));
    }

    #[test]
    fn other_scripts_count_in_unicode_only() {
        let pair = ("я не могу", "я могу");
        assert_eq!(counts(pair, Words::Ascii), (0, 0, 0));
        assert_eq!(counts(pair, Words::Unicode), (2, 3, 2));
        assert_eq!(counts(("日本語", "日本"), Words::Unicode), (2, 3, 2));
        assert_eq!(counts(("don't", "Don't stop"), Words::Unicode), (1, 1, 2));
    }
}
