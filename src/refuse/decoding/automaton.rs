//! Forbidden phrases as an Aho–Corasick automaton over token ids (Aho and Corasick 1975).
//!
//! The state after a context is its longest suffix that begins a phrase, so it is recomputed at every step from the
//! last `longest − 1` tokens: no memory per row, and nothing to repair when beams are permuted or rows come and go.
//! What a state writes is the union over its suffixes of the tokens that complete (or, with a [`Penalty`], extend) a
//! phrase; suffixes that write nothing are skipped by links. Phrases of one token are written in every state and kept
//! as one sorted list.

use super::matching::{Contexts, Found, Matcher, Penalty, apply, edits, lowest};
use super::token;
use super::trie::{ROOT, Through, Trie, expect_lengths, expect_none, sorted_once, which};
use crate::Result;
use crate::element::Element;
use crate::view::RowsMut;

/// Phrases of token ids, ready to be matched.
#[derive(Debug)]
pub struct Automaton {
    trie: Trie<u32>,
    /// Where in `hits` each node's begin, and the end of all.
    first_hit: Vec<u32>,
    /// What nodes write: (token, value), per node ascending by token.
    hits: Vec<(u32, f64)>,
    /// Phrases of one token, ascending.
    always: Vec<u32>,
    phrases: usize,
    longest: usize,
    largest: u32,
}

impl Automaton {
    /// Builds the automaton of `phrases`; `width` is the vocabulary size if it is known already. Without a penalty
    /// only tokens that complete a phrase are written (−∞).
    ///
    /// # Errors
    /// `Value` naming the indices of phrases that are empty, longer than `max_length`, duplicate, or hold an id outside
    /// the vocabulary; for no phrases at all; for a penalty that is negative or not finite.
    pub fn new(
        phrases: &[&[i64]],
        width: Option<usize>,
        max_length: usize,
        penalty: Option<Penalty>,
    ) -> Result<Self> {
        let sorted = validated(phrases, width.unwrap_or(u32::MAX as usize), max_length)?;
        penalty.map_or(Ok(()), |p| p.check())?;
        let lengths: Vec<u32> = sorted.iter().map(|p| p.len() as u32).collect();
        let (trie, through) = Trie::new(&sorted, &lengths);
        let mut out = Self {
            trie,
            first_hit: Vec::new(),
            hits: Vec::new(),
            always: Vec::new(),
            phrases: sorted.len(),
            longest: sorted.iter().map(Vec::len).max().unwrap_or(0),
            largest: sorted.iter().flatten().copied().max().unwrap_or(0),
        };
        out.collect_hits(&through, penalty);
        let first = &out.first_hit;
        out.trie.mark(|node| first[node] < first[node + 1]);
        Ok(out)
    }

    fn collect_hits(&mut self, through: &[Through], penalty: Option<Penalty>) {
        let mut depth = vec![0usize; self.trie.len()];
        for node in 0..self.trie.len() {
            self.first_hit.push(self.hits.len() as u32);
            for child in self.trie.children(node as u32) {
                depth[child] = depth[node] + 1;
                let Through { shortest, ends } = through[child];
                let symbol = self.trie.symbol(child);
                if node as u32 == ROOT {
                    self.always.extend(ends.then_some(symbol));
                } else if ends {
                    self.hits.push((symbol, f64::NEG_INFINITY));
                } else if let Some(p) = penalty {
                    self.hits.push((symbol, p.value(depth[node], shortest)));
                }
            }
        }
        self.first_hit.push(self.hits.len() as u32);
    }

    fn state(&self, context: &[i64]) -> Result<u32> {
        context.iter().try_fold(ROOT, |state, id| {
            Ok(self
                .trie
                .step(state, token("input_ids", *id, u32::MAX as usize)?))
        })
    }

    /// [`edits`] of this automaton.
    ///
    /// # Errors
    /// As there.
    pub fn edits(&self, contexts: &Contexts<'_>) -> Result<(Vec<i64>, Vec<i64>, Vec<f64>)> {
        edits(self, contexts)
    }

    /// [`apply`] of this automaton.
    ///
    /// # Errors
    /// As there.
    pub fn apply<T: Element>(
        &self,
        logits: RowsMut<'_, T>,
        contexts: &Contexts<'_>,
        dead_end: Option<u32>,
    ) -> Result<()> {
        apply(self, logits, contexts, dead_end)
    }
}

impl Matcher for Automaton {
    fn found(&self, context: &[i64]) -> Result<Found<'_>> {
        let mut values = Vec::new();
        for node in self.trie.marked(self.state(context)?) {
            let hits = self.first_hit[node] as usize..self.first_hit[node + 1] as usize;
            values.extend_from_slice(&self.hits[hits]);
        }
        lowest(&mut values);
        Ok(Found {
            values,
            removed: Vec::new(),
            always: &self.always,
        })
    }

    /// One less than the longest phrase.
    fn reach(&self) -> usize {
        self.longest - 1
    }

    fn phrases(&self) -> usize {
        self.phrases
    }

    fn nodes(&self) -> usize {
        self.trie.len()
    }

    fn bytes(&self) -> usize {
        self.trie.bytes()
            + size_of_val(&self.first_hit[..])
            + size_of_val(&self.hits[..])
            + size_of_val(&self.always[..])
    }

    fn largest(&self) -> u32 {
        self.largest
    }

    fn writes(&self) -> usize {
        self.always.len() + self.longest
    }
}

/// The phrases in ascending order, once they are found sound.
fn validated(phrases: &[&[i64]], width: usize, max_length: usize) -> Result<Vec<Vec<u32>>> {
    expect_lengths(phrases, max_length, "token id")?;
    let inside = |id: &i64| u32::try_from(*id).is_ok_and(|id| (id as usize) < width);
    expect_none(
        &format!("token ids from 0 to {}", width.saturating_sub(1)),
        &which(phrases, |p| !p.iter().all(inside)),
    )?;
    sorted_once(
        phrases
            .iter()
            .map(|p| p.iter().map(|id| *id as u32).collect()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;
    use proptest::prelude::*;

    const NEG: f64 = f64::NEG_INFINITY;

    fn build(phrases: &[Vec<i64>], penalty: Option<Penalty>) -> Automaton {
        let phrases: Vec<&[i64]> = phrases.iter().map(Vec::as_slice).collect();
        Automaton::new(&phrases, None, 16, penalty).unwrap()
    }

    fn after(a: &Automaton, context: &[i64]) -> Vec<(i64, f64)> {
        let (_, ids, values) = a
            .edits(&Contexts::new(context, context.len(), &[0]).unwrap())
            .unwrap();
        ids.into_iter().zip(values).collect()
    }

    #[test]
    fn reference_phrases_step_by_step() {
        let phrases = [vec![5, 7, 9, 4], vec![7, 9, 2], vec![3], vec![9, 9]];
        let a = build(
            &phrases,
            Some(Penalty {
                strength: 4.0,
                exponent: 1.0,
            }),
        );
        let context = [1, 5, 7, 9, 9, 7, 9, 5];
        let third = -4.0 / 3.0;
        let expected: [&[(i64, f64)]; 9] = [
            &[],
            &[],
            &[(7, -1.0)],
            &[(9, -2.0)],
            &[(2, NEG), (4, NEG), (9, NEG)],
            &[(9, NEG)],
            &[(9, third)],
            &[(2, NEG), (9, NEG)],
            &[(7, -1.0)],
        ];
        let hard = build(&phrases, None);
        for (n, want) in expected.iter().enumerate() {
            let mut want = want.to_vec();
            want.push((3, NEG));
            want.sort_by_key(|e| e.0);
            let from = n.saturating_sub(a.reach());
            assert_eq!(after(&a, &context[..n]), want, "after {n} tokens");
            assert_eq!(
                after(&a, &context[from..n]),
                want,
                "from the suffix after {n} tokens"
            );
            want.retain(|e| e.1 == NEG);
            assert_eq!(after(&hard, &context[..n]), want);
        }
    }

    #[test]
    fn refuses_faulty_phrases_by_index() {
        let message = |phrases: &[&[i64]], width| {
            Automaton::new(phrases, width, 3, None)
                .unwrap_err()
                .to_string()
        };
        assert!(message(&[], None).contains("at least one phrase"));
        assert!(message(&[&[1], &[], &[2], &[]], None).contains("indices 1, 3"));
        assert!(message(&[&[1], &[1, 2, 3, 4]], None).contains("indices 1"));
        assert!(message(&[&[1], &[2, 9]], Some(9)).contains("0 to 8"));
        assert!(message(&[&[1], &[2, -1]], None).contains("indices 1"));
        assert!(message(&[&[1, 2], &[3], &[1, 2]], None).contains("indices 2"));
        let many = vec![&[][..]; 20];
        assert!(message(&many, None).contains("and 12 more"));
        for (strength, exponent) in [
            (-1.0, 1.0),
            (f64::NAN, 1.0),
            (1.0, -1.0),
            (f64::INFINITY, 1.0),
        ] {
            assert!(
                Automaton::new(&[&[1]], None, 3, Some(Penalty { strength, exponent })).is_err()
            );
        }
    }

    #[test]
    fn wide_roots_with_and_without_a_table() {
        // Ids within and beyond what the root's table may hold.
        for far in [1000, i64::from(u32::MAX) - 2] {
            let mut phrases: Vec<Vec<i64>> = (0..40).map(|i| vec![i, i + 1, 7]).collect();
            phrases.push(vec![far, 3]);
            let a = build(&phrases, None);
            assert_eq!(after(&a, &[far]), [(3, NEG)]);
            assert_eq!(after(&a, &[5, 6]), [(7, NEG)]);
            assert_eq!(after(&a, &[5, 6, far]), [(3, NEG)]);
            assert_eq!(after(&a, &[far - 1]), []);
            assert!(a.bytes() < 1 << 20);
        }
    }

    #[test]
    fn dead_ends() {
        let a = build(&[vec![0], vec![1], vec![5, 2]], None);
        let start = [1.0f32, 2.0, 3.0];
        let mut z = start;
        let context = Contexts::new(&[5], 1, &[0]).unwrap();
        let wide = a.apply(RowsMut::matrix(&mut z, 3), &context, None);
        assert!(
            wide.unwrap_err().to_string().contains("0 to 2"),
            "5 is not in the vocabulary"
        );
        let a = build(&[vec![0], vec![1], vec![2, 2]], None);
        let context = Contexts::new(&[2], 1, &[0]).unwrap();
        let dead = a.apply(RowsMut::matrix(&mut z, 3), &context, None);
        assert!(matches!(dead, Err(Error::Degenerate { .. })));
        assert_eq!(z, start);
        a.apply(RowsMut::matrix(&mut z, 3), &context, Some(1))
            .unwrap();
        assert_eq!(z, [f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY]);
        let mut z = start;
        let clipped = Contexts::new(&[2], 1, &[1]).unwrap();
        a.apply(RowsMut::matrix(&mut z, 3), &clipped, None).unwrap();
        assert_eq!(z, [f32::NEG_INFINITY, f32::NEG_INFINITY, 3.0]);
    }

    /// What the definition says, phrase by phrase.
    fn naive(phrases: &[Vec<i64>], context: &[i64], penalty: Option<Penalty>) -> Vec<(i64, f64)> {
        let mut best = std::collections::BTreeMap::new();
        for p in phrases {
            for matched in 0..p.len() {
                let value = match penalty {
                    _ if matched + 1 == p.len() => NEG,
                    Some(pen) if matched > 0 => {
                        -pen.strength * (matched as f64 / p.len() as f64).powf(pen.exponent)
                    }
                    _ => continue,
                };
                if context.ends_with(&p[..matched]) {
                    let entry = best.entry(p[matched]).or_insert(value);
                    *entry = entry.min(value);
                }
            }
        }
        best.into_iter().collect()
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            phrases in prop::collection::hash_set(prop::collection::vec(0i64..4, 1..5), 1..12),
            context in prop::collection::vec(0i64..5, 0..12),
            penalise in any::<bool>(),
        ) {
            let phrases: Vec<_> = phrases.into_iter().collect();
            let penalty = penalise.then_some(Penalty { strength: 3.0, exponent: 0.5 });
            let a = build(&phrases, penalty);
            let want = naive(&phrases, &context, penalty);
            prop_assert_eq!(after(&a, &context), want.clone());
            let from = context.len().saturating_sub(a.reach());
            prop_assert_eq!(after(&a, &context[from..]), want);
        }
    }
}
