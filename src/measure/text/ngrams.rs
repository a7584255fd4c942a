//! The n-grams of a collection of texts: which there are, in how many texts, and how often in each.
//!
//! An n-gram is the n-gram without its last token, and that token: with the former numbered in lexicographic order, a pair
//! of numbers in one 64-bit key orders n-grams as their texts would. So each length is one pass over the tokens (a table of
//! keys per piece of the collection) and one merge of sorted keys, and no n-gram is ever spelled out unless it is kept.
//!
//! The collection is cut at places fixed by its sizes, and pieces are combined in order: the number of threads changes no
//! bit of the result.

use super::intern::{Keys, Strings};
use super::tokens::{Analyzer, Stream, Tokenizer};
use crate::cancel::Cancel;
use crate::{Error, Result, par};
use std::ops::Range;

/// Bytes of text in one piece, at least, and pieces at most.
const CHUNK_BYTES: usize = 64 << 10;
const CHUNKS: usize = 128;
/// Pieces that a merge of keys is cut into.
const MERGES: usize = 32;
const NONE: u32 = u32::MAX;

/// Sparse rows of counts, columns ascending in each row.
#[derive(Debug, Clone, PartialEq)]
pub struct Counts {
    pub indptr: Vec<i64>,
    pub indices: Vec<i32>,
    pub data: Vec<f64>,
}

impl Counts {
    pub fn empty() -> Self {
        Self {
            indptr: vec![0],
            indices: Vec::new(),
            data: Vec::new(),
        }
    }

    /// Appends a row from its columns, in any order and as often as they occur.
    pub fn push_row(&mut self, found: &mut [u32], binary: bool) {
        found.sort_unstable();
        for same in found.chunk_by(|a, b| a == b) {
            self.indices.push(same[0] as i32);
            self.data.push(if binary { 1.0 } else { same.len() as f64 });
        }
        self.indptr.push(self.indices.len() as i64);
    }

    pub fn concat(parts: Vec<Self>) -> Self {
        let mut out = Self::empty();
        for part in parts {
            let base = out.indices.len() as i64;
            (out.indptr).extend(part.indptr[1..].iter().map(|v| v + base));
            out.indices.extend(part.indices);
            out.data.extend(part.data);
        }
        out
    }
}

/// Which n-grams are kept.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Texts that hold the n-gram.
    pub min_df: u64,
    pub max_df: u64,
    /// Only the most frequent ones of the whole collection; of equally frequent ones the first in the order of columns.
    pub max_features: Option<usize>,
    /// Counts are 1: the frequency in the collection is then the number of texts.
    pub binary: bool,
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// The n-grams, in the order of code points, one after another, and where each ends.
    pub terms: String,
    pub ends: Vec<i64>,
    /// Texts that hold each.
    pub df: Vec<u64>,
    pub rows: Counts,
}

/// Ranges of texts of about equal bytes.
pub fn chunks(texts: &[&str]) -> Vec<Range<usize>> {
    let total: usize = texts.iter().map(|t| t.len() + 1).sum();
    let wanted = (total / CHUNKS).max(CHUNK_BYTES);
    let (mut out, mut start, mut held) = (Vec::new(), 0, 0);
    for (i, text) in texts.iter().enumerate() {
        held += text.len() + 1;
        if held >= wanted {
            out.push(start..i + 1);
            (start, held) = (i + 1, 0);
        }
    }
    if start < texts.len() {
        out.push(start..texts.len());
    }
    out
}

/// One n-gram of one length in one piece, or in all.
#[derive(Debug, Clone, Copy)]
struct Entry {
    key: u64,
    /// Texts in which it is counted, and how often in all.
    df: u64,
    total: u64,
}

/// The n-grams of one length: sorted keys and, per token of each piece, the number of the n-gram that starts there.
struct Level {
    entries: Vec<Entry>,
    at: Vec<Vec<u32>>,
}

/// Finds and counts the n-grams of `texts`.
///
/// # Errors
/// `Degenerate`: nothing is left; `Value`: more tokens in a piece than 32 bits number; `Interrupted`.
pub fn find(
    texts: &[&str],
    tokenizer: &Tokenizer,
    limits: &Limits,
    cancel: &Cancel,
) -> Result<Found> {
    let bytes: usize = texts.iter().map(|t| t.len()).sum();
    let ranges = chunks(texts);
    if let Some(long) = ranges
        .iter()
        .find(|r| texts[r.start..r.end].iter().map(|t| t.len()).sum::<usize>() > 1 << 31)
    {
        let found = format!("more around text {}", long.start);
        return Err(Error::value(
            "texts",
            "below 2 GiB of text in a row of few texts",
            found,
        ));
    }
    let (streams, alphabet) = tokenize(texts, ranges, tokenizer, bytes, cancel)?;
    let mut levels: Vec<Level> = Vec::new();
    for n in 1..=tokenizer.longest {
        cancel.check()?;
        let level = next_level(&streams, levels.last(), n, tokenizer, limits, bytes);
        if level.entries.is_empty() {
            break;
        }
        levels.push(level);
    }
    cancel.check()?;
    let columns = choose(&levels, limits);
    let (terms, ends, df, columns) = spell(&levels, &columns, &alphabet, tokenizer);
    if ends.is_empty() {
        let counted = levels.iter().any(|l| l.entries.iter().any(|e| e.df > 0));
        let reason = match counted {
            true => {
                "empty vocabulary: every n-gram is in fewer texts than min_df or in more than max_df"
            }
            false => {
                "empty vocabulary: no text holds a token (only stop words, punctuation or nothing)"
            }
        };
        return Err(Error::degenerate("texts", reason));
    }
    cancel.check()?;
    let parts = par::map(bytes, (0..streams.len()).collect(), |piece| {
        count_rows(
            &streams[piece],
            piece,
            &levels,
            &columns,
            tokenizer,
            limits.binary,
        )
    });
    Ok(Found {
        terms,
        ends,
        df,
        rows: Counts::concat(parts),
    })
}

/// The tokens of each piece, numbered in the order of their bytes, and the tokens.
fn tokenize(
    texts: &[&str],
    ranges: Vec<Range<usize>>,
    tokenizer: &Tokenizer,
    bytes: usize,
    cancel: &Cancel,
) -> Result<(Vec<Stream>, Vec<Vec<u8>>)> {
    let pieces = par::try_map(bytes, ranges, |range| {
        cancel.check()?;
        let (mut stream, mut seen) = (Stream::default(), Strings::default());
        for text in &texts[range] {
            tokenizer.append(text, &mut stream, &mut |w| seen.intern(w));
        }
        Ok((stream, seen))
    })?;
    if !matches!(tokenizer.analyzer, Analyzer::Word { .. }) {
        // Code points are in order as they are.
        return Ok((pieces.into_iter().map(|p| p.0).collect(), Vec::new()));
    }
    let mut all = Strings::default();
    let local: Vec<Vec<u32>> = (pieces.iter())
        .map(|(_, seen)| {
            (0..seen.len() as u32)
                .map(|i| all.intern(seen.get(i)))
                .collect()
        })
        .collect();
    let mut order: Vec<u32> = (0..all.len() as u32).collect();
    order.sort_unstable_by(|a, b| all.get(*a).cmp(all.get(*b)));
    let mut rank = vec![0; order.len()];
    (order.iter().enumerate()).for_each(|(r, i)| rank[*i as usize] = r as u32);
    let items = pieces.into_iter().zip(local).collect();
    let streams = par::map(
        bytes,
        items,
        |((mut stream, _), local): ((Stream, _), Vec<u32>)| {
            for t in &mut stream.tokens {
                *t = rank[local[*t as usize] as usize];
            }
            stream
        },
    );
    let alphabet = order.iter().map(|i| all.get(*i).to_vec()).collect();
    Ok((streams, alphabet))
}

fn next_level(
    streams: &[Stream],
    before: Option<&Level>,
    n: usize,
    tokenizer: &Tokenizer,
    limits: &Limits,
    bytes: usize,
) -> Level {
    // Whatever holds an n-gram holds its beginning, so what is too rare cannot begin anything that is not.
    let rare = |id: u32| {
        before.is_some_and(|l| n > tokenizer.shortest && l.entries[id as usize].df < limits.min_df)
    };
    let pieces = par::map(bytes, (0..streams.len()).collect(), |piece: usize| {
        let stream = &streams[piece];
        let mut keys = Keys::default();
        let mut facts: Vec<(u64, u64, u32)> = Vec::new();
        let mut at = vec![NONE; stream.tokens.len()];
        stream.for_each_segment(|text, start, end| {
            let counted = tokenizer.counts(n, end - start);
            let last = (end + 1).saturating_sub(n).max(start);
            for (i, slot) in at.iter_mut().enumerate().take(last).skip(start) {
                let parent = match before {
                    None => 0,
                    Some(level) => level.at[piece][i],
                };
                if parent == NONE || (before.is_some() && rare(parent)) {
                    continue;
                }
                let id = keys.intern(u64::from(parent) << 32 | u64::from(stream.tokens[i + n - 1]));
                *slot = id;
                if facts.len() <= id as usize {
                    facts.push((0, 0, NONE));
                }
                if counted {
                    let (df, total, last) = &mut facts[id as usize];
                    *df += u64::from(*last != text as u32);
                    *total += 1;
                    *last = text as u32;
                }
            }
        });
        let mut order: Vec<u32> = (0..facts.len() as u32).collect();
        order.sort_unstable_by_key(|i| keys.keys()[*i as usize]);
        let sorted: Vec<Entry> = (order.iter())
            .map(|i| {
                let (df, total, _) = facts[*i as usize];
                let key = keys.keys()[*i as usize];
                Entry { key, df, total }
            })
            .collect();
        (at, order, sorted)
    });
    let entries = merge(pieces.iter().map(|p| &p.2[..]).collect());
    let at = par::map(bytes, pieces, |(mut at, order, sorted)| {
        let (mut number, mut from) = (vec![0u32; order.len()], 0);
        for (entry, local) in sorted.iter().zip(&order) {
            from = gallop(&entries, from, entry.key);
            number[*local as usize] = from as u32;
        }
        (at.iter_mut().filter(|a| **a != NONE)).for_each(|a| *a = number[*a as usize]);
        at
    });
    Level { entries, at }
}

/// Where `key` stands in `entries`, at `from` or later.
fn gallop(entries: &[Entry], from: usize, key: u64) -> usize {
    let (mut low, mut step) = (from, 1);
    while low + step < entries.len() && entries[low + step].key < key {
        low += step;
        step *= 2;
    }
    let end = (low + step + 1).min(entries.len());
    low + entries[low..end].partition_point(|e| e.key < key)
}

/// Sorted entries of all pieces, those of one key added up.
fn merge(parts: Vec<&[Entry]>) -> Vec<Entry> {
    let Some(longest) = parts.iter().max_by_key(|p| p.len()) else {
        return Vec::new();
    };
    let cuts: Vec<u64> = par::ranges(longest.len(), longest.len().div_ceil(MERGES))
        .iter()
        .map(|r| longest[r.start].key)
        .collect();
    let bounds: Vec<(Option<u64>, Option<u64>)> = (0..cuts.len())
        .map(|i| ((i > 0).then(|| cuts[i]), cuts.get(i + 1).copied()))
        .collect();
    let bytes = parts.iter().map(|p| size_of_val(*p)).sum();
    let merged = par::map(bytes, bounds, |(low, high)| {
        let mut held: Vec<Entry> = Vec::new();
        for part in &parts {
            let start = low.map_or(0, |k| part.partition_point(|e| e.key < k));
            let end = high.map_or(part.len(), |k| part.partition_point(|e| e.key < k));
            held.extend_from_slice(&part[start..end]);
        }
        held.sort_unstable_by_key(|e| e.key);
        held.dedup_by(|next, kept| {
            let same = next.key == kept.key;
            if same {
                kept.df += next.df;
                kept.total += next.total;
            }
            same
        });
        held
    });
    merged.concat()
}

/// Whether each n-gram of each length is kept.
fn choose(levels: &[Level], limits: &Limits) -> Vec<Vec<bool>> {
    let fits = |e: &Entry| e.df > 0 && (limits.min_df..=limits.max_df).contains(&e.df);
    let mut kept: Vec<Vec<bool>> = (levels.iter())
        .map(|l| l.entries.iter().map(fits).collect())
        .collect();
    let count: usize = kept.iter().flatten().filter(|k| **k).count();
    let Some(most) = limits.max_features.filter(|m| *m < count) else {
        return kept;
    };
    let mut ranked = Vec::with_capacity(count);
    depth_first(levels, &mut |level, id, _| {
        if kept[level][id] {
            let e = &levels[level].entries[id];
            let frequency = if limits.binary { e.df } else { e.total };
            ranked.push((frequency, level as u32, id as u32));
        }
        true
    });
    ranked.sort_by_key(|r| std::cmp::Reverse(r.0));
    for (_, level, id) in &ranked[most..] {
        kept[*level as usize][*id as usize] = false;
    }
    kept
}

/// Visits n-grams in lexicographic order: `f(level, number, last token)`.
fn depth_first(levels: &[Level], f: &mut impl FnMut(usize, usize, u32) -> bool) {
    fn below(
        levels: &[Level],
        level: usize,
        range: Range<usize>,
        f: &mut impl FnMut(usize, usize, u32) -> bool,
    ) {
        for id in range {
            if f(level, id, levels[level].entries[id].key as u32)
                && let Some(next) = levels.get(level + 1)
            {
                let of = |parent: usize| {
                    next.entries
                        .partition_point(|e| (e.key >> 32) < parent as u64)
                };
                below(levels, level + 1, of(id)..of(id + 1), f);
            }
        }
    }
    if let Some(first) = levels.first() {
        below(levels, 0, 0..first.entries.len(), f);
    }
}

type Spelled = (String, Vec<i64>, Vec<u64>, Vec<Vec<u32>>);

/// The kept n-grams as text, and the column of each n-gram of each length.
fn spell(
    levels: &[Level],
    kept: &[Vec<bool>],
    alphabet: &[Vec<u8>],
    tokenizer: &Tokenizer,
) -> Spelled {
    let words = matches!(tokenizer.analyzer, Analyzer::Word { .. });
    let mut columns: Vec<Vec<u32>> = kept.iter().map(|k| vec![NONE; k.len()]).collect();
    let (mut terms, mut ends, mut df) = (Vec::new(), Vec::new(), Vec::new());
    let mut prefix: Vec<u8> = Vec::new();
    let mut lengths = vec![0; levels.len() + 1];
    depth_first(levels, &mut |level, id, token| {
        prefix.truncate(lengths[level]);
        if words {
            if level > 0 {
                prefix.push(b' ');
            }
            prefix.extend_from_slice(&alphabet[token as usize]);
        } else {
            let c = char::from_u32(token).unwrap_or(char::REPLACEMENT_CHARACTER);
            prefix.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
        }
        lengths[level + 1] = prefix.len();
        if kept[level][id] {
            columns[level][id] = ends.len() as u32;
            terms.extend_from_slice(&prefix);
            ends.push(terms.len() as i64);
            df.push(levels[level].entries[id].df);
        }
        true
    });
    (
        String::from_utf8_lossy(&terms).into_owned(),
        ends,
        df,
        columns,
    )
}

fn count_rows(
    stream: &Stream,
    piece: usize,
    levels: &[Level],
    columns: &[Vec<u32>],
    tokenizer: &Tokenizer,
    binary: bool,
) -> Counts {
    let (mut out, mut found, mut row) = (Counts::empty(), Vec::new(), 0);
    stream.for_each_segment(|text, start, end| {
        while row < text {
            out.push_row(&mut found, binary);
            found.clear();
            row += 1;
        }
        for (n, (level, columns)) in levels.iter().zip(columns).enumerate() {
            if !tokenizer.counts(n + 1, end - start) {
                continue;
            }
            for id in &level.at[piece][start..end] {
                if *id != NONE && columns[*id as usize] != NONE {
                    found.push(columns[*id as usize]);
                }
            }
        }
    });
    while row < stream.texts.len() {
        out.push_row(&mut found, binary);
        found.clear();
        row += 1;
    }
    out
}

/// Weights counts in place: sublinear term frequency, inverse document frequency, and rows of unit length.
pub fn weight(rows: &mut Counts, idf: Option<&[f64]>, sublinear: bool, norm: Norm) {
    let Counts {
        indptr,
        indices,
        data,
    } = rows;
    let mut items = Vec::new();
    let mut rest = &mut data[..];
    for block in par::ranges(indptr.len() - 1, 256) {
        let (start, end) = (indptr[block.start], indptr[block.end]);
        let (now, later) = rest.split_at_mut((end - start) as usize);
        items.push((block, start, now));
        rest = later;
    }
    let bytes = 12 * indices.len();
    par::for_each(bytes, items, |(block, base, data)| {
        for row in block {
            let (start, end) = (indptr[row], indptr[row + 1]);
            let values = &mut data[(start - base) as usize..(end - base) as usize];
            if sublinear {
                values.iter_mut().for_each(|v| *v = v.ln() + 1.0);
            }
            if let Some(idf) = idf {
                let columns = &indices[start as usize..end as usize];
                (values.iter_mut().zip(columns)).for_each(|(v, j)| *v *= idf[*j as usize]);
            }
            let length = match norm {
                Norm::None => continue,
                Norm::L1 => values.iter().map(|v| v.abs()).sum::<f64>(),
                Norm::L2 => values.iter().map(|v| v * v).sum::<f64>().sqrt(),
            };
            if length > 0.0 {
                values.iter_mut().for_each(|v| *v /= length);
            }
        }
    });
}

/// What a row is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    None,
    L1,
    L2,
}

#[cfg(test)]
mod tests {
    use super::super::vocabulary::Vocabulary;
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn tokenizer(analyzer: Analyzer, shortest: usize, longest: usize) -> Tokenizer {
        Tokenizer {
            analyzer,
            lowercase: true,
            stop: Strings::default(),
            shortest,
            longest,
        }
    }

    const WORDS: Analyzer = Analyzer::Word {
        shortest: 2,
        apostrophes: false,
    };
    const ALL: Limits = Limits {
        min_df: 1,
        max_df: u64::MAX,
        max_features: None,
        binary: false,
    };

    fn terms(found: &Found) -> Vec<&str> {
        let starts = std::iter::once(0).chain(found.ends.iter().copied());
        (starts.zip(&found.ends))
            .map(|(s, e)| &found.terms[s as usize..*e as usize])
            .collect()
    }

    #[test]
    fn the_vector_of_the_reference() {
        let texts = ["I cannot help", "I can help", "Sorry I cannot"];
        let mut found = find(&texts, &tokenizer(WORDS, 1, 2), &ALL, &Cancel::new()).unwrap();
        assert_eq!(
            terms(&found),
            [
                "can",
                "can help",
                "cannot",
                "cannot help",
                "help",
                "sorry",
                "sorry cannot"
            ]
        );
        assert_eq!(found.df, [1, 1, 2, 1, 2, 1, 1]);
        let idf: Vec<f64> = (found.df.iter())
            .map(|df| (4.0 / (1 + df) as f64).ln() + 1.0)
            .collect();
        weight(&mut found.rows, Some(&idf), false, Norm::L2);
        assert_eq!(found.rows.indptr, [0, 3, 6, 9]);
        assert_eq!(found.rows.indices, [2, 3, 4, 0, 1, 4, 2, 5, 6]);
        let expected = [
            0.517856, 0.680919, 0.517856, 0.622766, 0.622766, 0.473630, 0.473630, 0.622766,
            0.622766,
        ];
        for (a, b) in found.rows.data.iter().zip(expected) {
            assert!((a - b).abs() < 5e-7, "{a} {b}");
        }
    }

    /// The n-grams of each text, spelled out.
    fn spelled(texts: &[String], t: &Tokenizer) -> Vec<Vec<String>> {
        let (joiner, mut out) = (if t.analyzer == WORDS { " " } else { "" }, Vec::new());
        for text in texts {
            let (mut stream, mut strings, mut grams) =
                (Stream::default(), Strings::default(), Vec::new());
            t.append(text, &mut stream, &mut |w| strings.intern(w));
            stream.for_each_segment(|_, start, end| {
                for n in 1..=t.longest {
                    for part in stream.tokens[start..end]
                        .windows(n)
                        .filter(|_| t.counts(n, end - start))
                    {
                        let word = |v: &u32| match t.analyzer == WORDS {
                            true => String::from_utf8(strings.get(*v).to_vec()).unwrap(),
                            false => char::from_u32(*v).unwrap().to_string(),
                        };
                        grams.push(part.iter().map(word).collect::<Vec<_>>().join(joiner));
                    }
                }
            });
            out.push(grams);
        }
        out
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn agrees_with_spelling_everything_out(
            texts in proptest::collection::vec("[abÉé .]{0,30}", 1..40),
            kind in 0usize..3,
            shortest in 1usize..3,
            more in 0usize..3,
            min_df in 1u64..4,
            most in proptest::option::of(1usize..20),
            binary: bool,
            repeat in 1usize..3,
        ) {
            // Repeats make several pieces out of the collection.
            let texts: Vec<String> = texts.iter().map(|t| t.repeat(if repeat == 2 { 300 } else { 1 })).collect();
            let analyzer = [WORDS, Analyzer::Char, Analyzer::CharWordBoundary][kind];
            let t = tokenizer(analyzer, shortest, shortest + more);
            let limits = Limits { min_df, max_df: 30, max_features: most, binary };
            let mut counted: BTreeMap<String, (u64, u64)> = BTreeMap::new();
            let grams = spelled(&texts, &t);
            for text in &grams {
                let mut seen = std::collections::BTreeSet::new();
                for g in text {
                    let e = counted.entry(g.clone()).or_default();
                    e.0 += u64::from(seen.insert(g));
                    e.1 += 1;
                }
            }
            let mut kept: Vec<(String, u64, u64)> = (counted.into_iter())
                .filter(|(_, (df, _))| (min_df..=30).contains(df))
                .map(|(g, (df, total))| (g, df, if binary { df } else { total }))
                .collect();
            if let Some(most) = most {
                kept.sort_by_key(|k| std::cmp::Reverse(k.2));
                kept.truncate(most);
                kept.sort();
            }
            let borrowed: Vec<&str> = texts.iter().map(String::as_str).collect();
            let got = find(&borrowed, &t, &limits, &Cancel::new());
            if kept.is_empty() {
                prop_assert!(got.is_err());
                return Ok(());
            }
            let got = got.unwrap();
            prop_assert_eq!(terms(&got), kept.iter().map(|k| &k.0[..]).collect::<Vec<_>>());
            prop_assert_eq!(&got.df, &kept.iter().map(|k| k.1).collect::<Vec<_>>());
            let mut expected = Counts::empty();
            for text in &grams {
                let mut found: Vec<u32> = (text.iter())
                    .filter_map(|g| kept.binary_search_by(|k| k.0.cmp(g)).ok().map(|i| i as u32))
                    .collect();
                expected.push_row(&mut found, binary);
            }
            prop_assert_eq!(&got.rows, &expected);
            let vocabulary = Vocabulary::new(terms(&got).into_iter(), t).unwrap();
            prop_assert_eq!(vocabulary.count(&borrowed, binary), expected);
        }
    }

    #[test]
    fn nothing_found_is_an_error_that_says_why() {
        for (texts, limits, expected) in [
            (vec!["", "a ."], ALL, "no text holds"),
            (vec![], ALL, "no text holds"),
            (vec!["ab cd"], Limits { min_df: 2, ..ALL }, "min_df"),
        ] {
            let err = find(&texts, &tokenizer(WORDS, 1, 2), &limits, &Cancel::new()).unwrap_err();
            assert!(err.to_string().contains(expected), "{err}");
        }
        let t = tokenizer(WORDS, 1, 2);
        assert!(Vocabulary::new(["ab", "ab"].into_iter(), t.clone()).is_err());
        assert!(Vocabulary::new(std::iter::empty::<&str>(), t).is_err());
    }
}
