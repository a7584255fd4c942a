//! Forbidden text as an Aho–Corasick automaton over bytes, whatever tokens it may be spelt in.
//!
//! A token is blocked after a context iff reading its bytes there ends a phrase somewhere. These tokens are of two
//! kinds: those that hold a phrase of their own (one list, whatever the context), and those that begin with what is
//! still missing of a phrase of which the context ends with the rest. With the vocabulary in the order of its bytes,
//! the latter are one range per phrase and split, found while building; a step collects the ranges of the suffixes of
//! its context.

use super::matching::{Contexts, Found, Matcher, Penalty, apply, lowest};
use super::trie::{ROOT, Through, Trie, expect_lengths, sorted_once};
use crate::element::Element;
use crate::view::RowsMut;
use crate::{Error, Result, par};
use std::ops::Range;
use std::sync::Arc;

/// The symbol before the first byte of a word; the other symbols are bytes.
const EDGE: u16 = 256;
/// In place of a rank: a token without text.
const NO_TEXT: u32 = u32::MAX;
/// Phrases or tokens that one thread takes at a time.
const CHUNK: usize = 4096;

/// How text is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// ASCII letters count as lower case ones.
    pub fold: bool,
    /// Phrases pass over tokens without text; otherwise none reaches across one.
    pub transparent: bool,
}

/// The bytes of every token, ascending.
#[derive(Debug)]
pub struct Vocabulary {
    /// Bytes of all tokens in their order, and where those of each rank begin.
    text: Vec<u8>,
    starts: Vec<u32>,
    /// Token of each rank, and rank of each token.
    ids: Vec<u32>,
    ranks: Vec<u32>,
    /// First rank whose token begins with each byte, and the number of ranks.
    first: Vec<u32>,
    longest: usize,
    reading: Reading,
}

impl Vocabulary {
    /// Sorts `tokens`, in the order of their ids; an empty one has no text (a special token).
    ///
    /// # Errors
    /// `Value` if no token has text.
    pub fn new(tokens: &[&[u8]], reading: Reading) -> Result<Self> {
        let read = |t: &&[u8]| match reading.fold {
            true => t.to_ascii_lowercase(),
            false => t.to_vec(),
        };
        let mut sorted: Vec<(Vec<u8>, u32)> = tokens.iter().map(read).zip(0..).collect();
        sorted.retain(|(text, _)| !text.is_empty());
        sorted.sort_unstable();
        if sorted.is_empty() {
            return Err(Error::value("tokens", "a token with text", "none"));
        }
        let mut out = Self {
            text: sorted.iter().flat_map(|(text, _)| text).copied().collect(),
            starts: vec![0],
            ids: sorted.iter().map(|(_, id)| *id).collect(),
            ranks: vec![NO_TEXT; tokens.len()],
            first: Vec::with_capacity(257),
            longest: sorted.iter().map(|(text, _)| text.len()).max().unwrap_or(0),
            reading,
        };
        for (rank, (text, id)) in sorted.iter().enumerate() {
            out.starts.push(out.starts[rank] + text.len() as u32);
            out.ranks[*id as usize] = rank as u32;
        }
        for byte in 0..=256 {
            let before = sorted.partition_point(|(text, _)| u16::from(text[0]) < byte);
            out.first.push(before as u32);
        }
        Ok(out)
    }

    /// Number of tokens, with and without text.
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        let lists = [&self.starts, &self.ids, &self.ranks, &self.first];
        self.text.len() + lists.iter().map(|l| size_of_val(&l[..])).sum::<usize>()
    }

    fn token(&self, rank: u32) -> &[u8] {
        let rank = rank as usize;
        &self.text[self.starts[rank] as usize..self.starts[rank + 1] as usize]
    }

    /// Text of a token; empty for one without, or beyond the vocabulary (a padded head).
    fn piece(&self, id: i64) -> Result<&[u8]> {
        let at = u32::try_from(id).map_err(|_| {
            Error::value(
                "input_ids",
                format!("token ids from 0 to {}", u32::MAX - 1),
                id,
            )
        })?;
        Ok(match self.ranks.get(at as usize) {
            Some(rank) if *rank != NO_TEXT => self.token(*rank),
            _ => &[],
        })
    }

    /// Of `ranks` whose tokens share `depth` bytes, those that go on with `byte`.
    fn narrow(&self, ranks: Range<u32>, depth: usize, byte: u8) -> Range<u32> {
        if depth == 0 {
            let byte = usize::from(byte);
            return self.first[byte]..self.first[byte + 1];
        }
        let next = |rank: u32| self.token(rank).get(depth).copied();
        let start = bound(ranks.clone(), |rank| next(rank) < Some(byte));
        start..bound(start..ranks.end, |rank| next(rank) <= Some(byte))
    }
}

/// First of `ranks` that `before` does not hold for.
fn bound(ranks: Range<u32>, before: impl Fn(u32) -> bool) -> u32 {
    let (mut low, mut high) = (ranks.start, ranks.end);
    while low < high {
        let middle = low + (high - low) / 2;
        match before(middle) {
            true => low = middle + 1,
            false => high = middle,
        }
    }
    low
}

/// Bytes that make up words. Those of other scripts do not count: a phrase behind one is then found, not missed.
fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Where the automaton is in a text.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    state: u32,
    in_word: bool,
}

/// Phrases of bytes, ready to be matched in tokens of one vocabulary.
#[derive(Debug)]
pub struct ByteAutomaton {
    trie: Trie<u16>,
    vocabulary: Arc<Vocabulary>,
    /// Per node (see [`csr`]) the ranks of the tokens that complete a phrase.
    first_range: Vec<u32>,
    ranges: Vec<(u32, u32)>,
    /// Per node, ascending by token, what is added to which; no nodes without a penalty.
    first_value: Vec<u32>,
    values: Vec<(u32, f64)>,
    /// Tokens that hold a phrase: after a byte of a word, and elsewhere.
    inside: Vec<u32>,
    opening: Vec<u32>,
    word: bool,
    phrases: usize,
    longest: usize,
}

/// Entries of one node: the tokens that complete a phrase, or a penalty.
type Ranks = (u32, (u32, u32));
type Value = (u32, (u32, f64));

impl ByteAutomaton {
    /// Builds the automaton of `phrases`. With `word`, a phrase that begins with a letter, digit or underscore of ASCII
    /// is matched only where no such byte stands before it.
    ///
    /// # Errors
    /// `Value` naming the indices of phrases that are empty, longer than `max_length` bytes or, as they are read,
    /// duplicate; for no phrases at all; for a penalty that is negative or not finite.
    pub fn new(
        phrases: &[&[u8]],
        vocabulary: Arc<Vocabulary>,
        word: bool,
        max_length: usize,
        penalty: Option<Penalty>,
    ) -> Result<Self> {
        expect_lengths(phrases, max_length, "byte")?;
        penalty.map_or(Ok(()), |p| p.check())?;
        let fold = vocabulary.reading.fold;
        let sorted = sorted_once(phrases.iter().map(|p| symbols(p, fold, word)))?;
        let lengths: Vec<u32> = sorted.iter().map(|p| text(p).count() as u32).collect();
        let (trie, through) = Trie::new(&sorted, &lengths);
        let mut out = Self {
            trie,
            vocabulary,
            first_range: Vec::new(),
            ranges: Vec::new(),
            first_value: Vec::new(),
            values: Vec::new(),
            inside: Vec::new(),
            opening: Vec::new(),
            word,
            phrases: sorted.len(),
            longest: lengths.iter().max().copied().unwrap_or(0) as usize,
        };
        out.find_completing(&sorted, &through, penalty);
        out.find_inside(&through);
        let starts = |first: &[u32], node: usize| first.get(node) < first.get(node + 1);
        let (ranges, values) = (&out.first_range, &out.first_value);
        (out.trie).mark(|node| starts(ranges, node) || starts(values, node));
        Ok(out)
    }

    /// The tokens that complete or extend each split phrase, gathered at the node of its first part.
    fn find_completing(
        &mut self,
        sorted: &[Vec<u16>],
        through: &[Through],
        penalty: Option<Penalty>,
    ) {
        let found = par::map(usize::MAX, par_chunks(sorted.len()), |chunk| {
            let (mut ranges, mut values) = (Vec::new(), Vec::new());
            for phrase in &sorted[chunk] {
                self.splits(phrase, through, penalty, &mut ranges, &mut values);
            }
            (ranges, values)
        });
        let (mut ranges, mut values): (Vec<Ranks>, Vec<Value>) = (Vec::new(), Vec::new());
        for (r, v) in found {
            ranges.extend(r);
            values.extend(v);
        }
        ranges.sort_unstable();
        (self.first_range, self.ranges) = csr(ranges, self.trie.len());
        if penalty.is_some() {
            let by = |e: &Value| (e.0, e.1.0);
            values.sort_unstable_by(|a, b| by(a).cmp(&by(b)).then(a.1.1.total_cmp(&b.1.1)));
            values.dedup_by_key(|e| by(e));
            (self.first_value, self.values) = csr(values, self.trie.len());
        }
    }

    fn splits(
        &self,
        phrase: &[u16],
        through: &[Through],
        penalty: Option<Penalty>,
        ranges: &mut Vec<Ranks>,
        values: &mut Vec<Value>,
    ) {
        let vocabulary = &self.vocabulary;
        let (mut path, mut node) = (Vec::with_capacity(phrase.len()), ROOT);
        for symbol in phrase {
            node = self.trie.child(node, *symbol).unwrap_or(ROOT);
            path.extend((*symbol < EDGE).then_some(node));
        }
        let bytes: Vec<u8> = text(phrase).collect();
        for matched in 1..bytes.len() {
            let rest = &bytes[matched..];
            if penalty.is_none() && rest.len() > vocabulary.longest {
                continue;
            }
            let node = path[matched - 1];
            let mut ranks = 0..vocabulary.ids.len() as u32;
            for (depth, byte) in rest.iter().enumerate() {
                ranks = vocabulary.narrow(ranks, depth, *byte);
                if ranks.is_empty() {
                    break;
                }
                if let Some(p) = penalty
                    && depth + 1 < rest.len()
                {
                    let longer = through[path[matched + depth] as usize].shortest;
                    let value = p.value(matched, longer);
                    let whole = |rank: &u32| vocabulary.token(*rank).len() == depth + 1;
                    let tokens = ranks.clone().take_while(whole);
                    values
                        .extend(tokens.map(|rank| (node, (vocabulary.ids[rank as usize], value))));
                }
            }
            if !ranks.is_empty() {
                ranges.push((node, (ranks.start, ranks.end)));
            }
        }
    }

    /// The tokens that hold a phrase of their own.
    fn find_inside(&mut self, through: &[Through]) {
        let mut ends: Vec<bool> = Vec::with_capacity(through.len());
        for (node, t) in through.iter().enumerate() {
            // A link leads to a node before this one; the root's to itself.
            let suffix = node > 0 && ends[self.trie.suffix(node)];
            ends.push(t.ends || suffix);
        }
        let vocabulary = self.vocabulary.clone();
        let holds = |rank: u32, in_word: bool| {
            let mut cursor = Cursor {
                state: ROOT,
                in_word,
            };
            vocabulary.token(rank).iter().any(|byte| {
                cursor = self.feed(cursor, *byte);
                ends[cursor.state as usize]
            })
        };
        let found = par::map(usize::MAX, par_chunks(vocabulary.ids.len()), |chunk| {
            let ranks = chunk.start as u32..chunk.end as u32;
            let inside: Vec<_> = ranks.clone().filter(|r| holds(*r, true)).collect();
            let opening: Vec<_> = match self.word {
                true => ranks.filter(|r| holds(*r, false)).collect(),
                false => Vec::new(),
            };
            (inside, opening)
        });
        let ids = |ranks: Vec<u32>| {
            let mut ids: Vec<u32> = ranks.iter().map(|r| vocabulary.ids[*r as usize]).collect();
            ids.sort_unstable();
            ids
        };
        let (inside, opening): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        self.inside = ids(inside.concat());
        self.opening = ids(opening.concat());
    }

    fn feed(&self, cursor: Cursor, byte: u8) -> Cursor {
        if !self.word {
            let state = self.trie.step(cursor.state, u16::from(byte));
            return Cursor { state, ..cursor };
        }
        let in_word = in_word(byte);
        let state = match in_word && !cursor.in_word {
            true => self.trie.step(cursor.state, EDGE),
            false => cursor.state,
        };
        let state = self.trie.step(state, u16::from(byte));
        Cursor { state, in_word }
    }

    /// Where the automaton is after `context`, of which only the last [`Matcher::reach`] bytes matter.
    fn read(&self, context: &[i64]) -> Result<Cursor> {
        let (mut need, mut from) = (self.reach(), context.len());
        while from > 0 && need > 0 {
            let piece = self.vocabulary.piece(context[from - 1])?;
            if piece.is_empty() && !self.vocabulary.reading.transparent {
                break;
            }
            need = need.saturating_sub(piece.len());
            from -= 1;
        }
        // Where the text was cut, a byte more than any unfinished match needs has been read, so that nothing depends
        // on whether a word was running.
        let mut cursor = Cursor {
            state: ROOT,
            in_word: false,
        };
        for id in &context[from..] {
            for byte in self.vocabulary.piece(*id)? {
                cursor = self.feed(cursor, *byte);
            }
        }
        Ok(cursor)
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

impl Matcher for ByteAutomaton {
    fn found(&self, context: &[i64]) -> Result<Found<'_>> {
        let cursor = self.read(context)?;
        let (mut ranges, mut values) = (Vec::new(), Vec::new());
        for node in self.trie.marked(cursor.state) {
            ranges.extend_from_slice(entries(&self.first_range, &self.ranges, node));
            values.extend_from_slice(entries(&self.first_value, &self.values, node));
        }
        lowest(&mut values);
        ranges.sort_unstable();
        let (mut removed, mut done) = (Vec::new(), 0);
        for (start, end) in ranges {
            let start = start.max(done) as usize;
            removed.extend_from_slice(self.vocabulary.ids.get(start..end as usize).unwrap_or(&[]));
            done = done.max(end);
        }
        let opens = self.word && !cursor.in_word;
        Ok(Found {
            values,
            removed,
            always: if opens { &self.opening } else { &self.inside },
        })
    }

    /// One less than the longest phrase in bytes, and one more to see whether a word runs on: no token is shorter.
    fn reach(&self) -> usize {
        self.longest - usize::from(!self.word)
    }

    fn phrases(&self) -> usize {
        self.phrases
    }

    fn nodes(&self) -> usize {
        self.trie.len()
    }

    /// Without the vocabulary, which several may share.
    fn bytes(&self) -> usize {
        self.trie.bytes()
            + size_of_val(&self.first_range[..])
            + size_of_val(&self.ranges[..])
            + size_of_val(&self.first_value[..])
            + size_of_val(&self.values[..])
            + size_of_val(&self.inside[..])
            + size_of_val(&self.opening[..])
    }

    fn largest(&self) -> u32 {
        self.vocabulary.len() as u32 - 1
    }

    fn writes(&self) -> usize {
        self.inside.len().max(self.opening.len()) + self.longest
    }
}

/// Entries of nodes in ascending order, with where those of each node begin and the end of all.
fn csr<E>(entries: Vec<(u32, E)>, nodes: usize) -> (Vec<u32>, Vec<E>) {
    let mut first = vec![0u32; nodes + 1];
    for (node, _) in &entries {
        first[*node as usize + 1] += 1;
    }
    for node in 0..nodes {
        first[node + 1] += first[node];
    }
    (first, entries.into_iter().map(|(_, e)| e).collect())
}

fn entries<'a, E>(first: &[u32], all: &'a [E], node: usize) -> &'a [E] {
    match (first.get(node), first.get(node + 1)) {
        (Some(from), Some(to)) => &all[*from as usize..*to as usize],
        _ => &[],
    }
}

fn par_chunks(n: usize) -> Vec<Range<usize>> {
    let starts = (0..n).step_by(CHUNK);
    starts.map(|i| i..n.min(i + CHUNK)).collect()
}

/// A phrase as the automaton reads it.
fn symbols(phrase: &[u8], fold: bool, word: bool) -> Vec<u16> {
    let (mut out, mut before) = (Vec::with_capacity(phrase.len() + 2), false);
    for byte in phrase {
        let here = in_word(*byte);
        out.extend((word && here && !before).then_some(EDGE));
        before = here;
        let byte = if fold {
            byte.to_ascii_lowercase()
        } else {
            *byte
        };
        out.push(u16::from(byte));
    }
    out
}

/// The bytes among the symbols of a phrase.
fn text(symbols: &[u16]) -> impl Iterator<Item = u8> {
    symbols.iter().filter_map(|s| u8::try_from(*s).ok())
}

#[cfg(test)]
mod tests {
    use super::super::matching::edits;
    use super::*;
    use proptest::prelude::*;

    fn build(
        tokens: &[&str],
        phrases: &[&str],
        reading: Reading,
        word: bool,
        penalty: Option<Penalty>,
    ) -> Result<ByteAutomaton> {
        let tokens: Vec<&[u8]> = tokens.iter().map(|t| t.as_bytes()).collect();
        let phrases: Vec<&[u8]> = phrases.iter().map(|t| t.as_bytes()).collect();
        let vocabulary = Arc::new(Vocabulary::new(&tokens, reading)?);
        ByteAutomaton::new(&phrases, vocabulary, word, 64, penalty)
    }

    fn after(a: &ByteAutomaton, context: &[i64]) -> Vec<(i64, f64)> {
        let contexts = Contexts::new(context, context.len(), &[0]).unwrap();
        let (_, ids, values) = edits(a, &contexts).unwrap();
        ids.into_iter().zip(values).collect()
    }

    const EXACT: Reading = Reading {
        fold: false,
        transparent: false,
    };

    #[test]
    fn every_segmentation() {
        let tokens = [
            " Har", " Harry", "Har", "Harry", "a", "arry", "ry", "ry P", "r", "rys", "y", "yard",
            "xHarryx", "H", "I met ",
        ];
        let a = build(&tokens, &["Harry"], EXACT, false, None).unwrap();
        let blocked = |context: &[&str]| -> Vec<&str> {
            let id = |t: &&str| tokens.iter().position(|o| o == t).unwrap() as i64;
            let context: Vec<i64> = context.iter().map(id).collect();
            let found = after(&a, &context);
            found.iter().map(|(id, _)| tokens[*id as usize]).collect()
        };
        let inner = [" Harry", "Harry", "xHarryx"];
        let with = |more: &[&'static str]| {
            let mut all: Vec<_> = inner.iter().chain(more).copied().collect();
            all.sort_by_key(|t| tokens.iter().position(|o| o == t));
            all
        };
        assert_eq!(blocked(&["I met ", "Har"]), with(&["ry", "ry P", "rys"]));
        assert_eq!(blocked(&["I met ", "Har", "r"]), with(&["y", "yard"]));
        assert_eq!(blocked(&["I met ", "H"]), with(&["arry"]));
        assert_eq!(blocked(&["I met "]), with(&[]));
        assert_eq!(blocked(&[]), with(&[]));
    }

    #[test]
    fn tokens_without_text() {
        let tokens = ["a", "b", "", "ab"];
        let across = Reading {
            transparent: true,
            ..EXACT
        };
        let only =
            |ids: &[i64]| -> Vec<_> { ids.iter().map(|i| (*i, f64::NEG_INFINITY)).collect() };
        let a = build(&tokens, &["ab"], EXACT, false, None).unwrap();
        assert_eq!(after(&a, &[0]), only(&[1, 3]));
        assert_eq!(after(&a, &[0, 2]), only(&[3]));
        let a = build(&tokens, &["ab"], across, false, None).unwrap();
        assert_eq!(after(&a, &[0, 2, 2]), only(&[1, 3]));
        assert_eq!(after(&a, &[0, 99]), only(&[1, 3]), "beyond the tokenizer");
        let bad = Contexts::new(&[-1], 1, &[0]).unwrap();
        assert!(edits(&a, &bad).is_err());
    }

    #[test]
    fn refuses_faulty_phrases_by_index() {
        let fold = Reading {
            fold: true,
            ..EXACT
        };
        let message = |phrases: &[&str], penalty| {
            let built = build(&["a"], phrases, fold, false, penalty);
            built.unwrap_err().to_string()
        };
        assert!(message(&[], None).contains("at least one phrase"));
        assert!(message(&["a", "", "b"], None).contains("indices 1"));
        assert!(message(&["a", "b", "A"], None).contains("indices 2"));
        assert!(message(&["a", &"b".repeat(65)], None).contains("at most 64 bytes"));
        let (strength, exponent) = (-1.0, 1.0);
        assert!(message(&["a"], Some(Penalty { strength, exponent })).contains("penalty"));
        assert!(build(&["", ""], &["a"], EXACT, false, None).is_err());
    }

    /// What the definition says, byte by byte.
    fn naive(
        tokens: &[&str],
        phrases: &[String],
        context: &[i64],
        how: (Reading, bool, Option<Penalty>),
    ) -> Vec<(i64, f64)> {
        let (reading, word, penalty) = how;
        let fold = |t: &str| match reading.fold {
            true => t.to_ascii_lowercase(),
            false => t.to_owned(),
        };
        let mut before = String::new();
        for id in context {
            match tokens.get(*id as usize).copied().unwrap_or("") {
                "" if !reading.transparent => before.clear(),
                t => before.push_str(&fold(t)),
            }
        }
        let inside = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric() || c == '_');
        // Whether `p` may stand at byte `at` of `all`.
        let stands = |all: &str, at: usize, p: &str| {
            !(word && inside(p.chars().next()) && inside(all[..at].chars().next_back()))
        };
        let mut found = Vec::new();
        for (id, token) in tokens.iter().enumerate().filter(|(_, t)| !t.is_empty()) {
            let all = format!("{before}{}", fold(token));
            let mut worst: Option<f64> = None;
            for p in phrases.iter().map(|p| fold(p)) {
                for at in 0..all.len() {
                    let end = at + p.len();
                    let value = if end > before.len() && all[at..].starts_with(&p) {
                        f64::NEG_INFINITY
                    } else if let Some(pen) = penalty
                        && at < before.len()
                        && end > all.len()
                        && p.starts_with(&all[at..])
                    {
                        pen.value(before.len() - at, p.len() as u32)
                    } else {
                        continue;
                    };
                    if stands(&all, at, &p) {
                        worst = Some(worst.map_or(value, |w| w.min(value)));
                    }
                }
            }
            found.extend(worst.map(|w| (id as i64, w)));
        }
        found
    }

    proptest! {
        #[test]
        fn equals_the_definition(
            tokens in prop::collection::vec("[aAb ]{0,4}", 1..24),
            phrases in prop::collection::hash_set("[aAb ]{1,5}", 1..8),
            context in prop::collection::vec(0i64..26, 0..12),
            fold in any::<bool>(),
            transparent in any::<bool>(),
            word in any::<bool>(),
            penalise in any::<bool>(),
        ) {
            prop_assume!(tokens.iter().any(|t| !t.is_empty()));
            let reading = Reading { fold, transparent };
            let penalty = penalise.then_some(Penalty { strength: 3.0, exponent: 0.5 });
            let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
            let mut phrases: Vec<String> = phrases.into_iter().collect();
            if fold {
                phrases = phrases.iter().map(|p| p.to_ascii_lowercase()).collect();
                phrases.sort();
                phrases.dedup();
            }
            let given: Vec<&str> = phrases.iter().map(String::as_str).collect();
            let a = build(&tokens, &given, reading, word, penalty).unwrap();
            let want = naive(&tokens, &phrases, &context, (reading, word, penalty));
            prop_assert_eq!(after(&a, &context), want.clone());
            // Of a text without gaps, no more than the reach is needed.
            if !transparent {
                let from = context.len().saturating_sub(a.reach());
                prop_assert_eq!(after(&a, &context[from..]), want);
            }
        }
    }
}
