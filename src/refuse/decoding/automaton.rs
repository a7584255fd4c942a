//! Forbidden phrases as an Aho–Corasick automaton over token ids (Aho and Corasick 1975).
//!
//! The state after a context is its longest suffix that begins a phrase, so it is recomputed at every step from the
//! last `longest − 1` tokens: no memory per row, and nothing to repair when beams are permuted or rows come and go.
//! What a state writes is the union over its suffixes of the tokens that complete (or, with a [`Penalty`], extend) a
//! phrase; suffixes that write nothing are skipped by links. Phrases of one token are written in every state and kept
//! as one sorted list.

use super::edits::{check_entry, force_row, scattered};
use super::{LOGITS, is_poison, no_token_left, poison_error, token};
use crate::element::{Element, Real};
use crate::simd::prefetch;
use crate::view::RowsMut;
use crate::{Error, Result, par};
use std::collections::VecDeque;

const ROOT: u32 = 0;
const NONE: u32 = u32::MAX;
/// Faulty phrases named in a message.
const NAMED: usize = 8;

/// Penalty on tokens that extend a phrase of length L after m matched tokens: `strength · (m / L)^exponent`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalty {
    pub strength: f64,
    pub exponent: f64,
}

#[derive(Debug, Clone, Copy)]
struct Node {
    first_child: u32,
    children: u32,
    link: u32,
    /// Nearest node on the suffix chain, this one included, that writes anything.
    out: u32,
    first_hit: u32,
    hits: u32,
}

/// Phrases ready to be matched. Nodes are in breadth-first order, the children of a node contiguous and ascending.
#[derive(Debug)]
pub struct Automaton {
    nodes: Vec<Node>,
    /// Token on the edge into each node.
    tokens: Vec<u32>,
    /// What nodes write: (token, value), per node ascending by token.
    hits: Vec<(u32, f64)>,
    /// Phrases of one token, ascending.
    always: Vec<u32>,
    phrases: usize,
    longest: usize,
    largest: u32,
}

fn indices_error(expected: &str, faulty: &[usize]) -> Error {
    let named: Vec<_> = faulty.iter().take(NAMED).map(usize::to_string).collect();
    let more = match faulty.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!(" and {n} more"),
    };
    let found = format!("otherwise at indices {}{more}", named.join(", "));
    Error::value("phrases", expected, found)
}

fn expect_none(expected: &str, faulty: Vec<usize>) -> Result<()> {
    if faulty.is_empty() {
        return Ok(());
    }
    Err(indices_error(expected, &faulty))
}

/// Indices of the phrases that `bad` holds for.
fn which(phrases: &[&[i64]], bad: impl Fn(&[i64]) -> bool) -> Vec<usize> {
    let all = phrases.iter().enumerate();
    all.filter(|(_, p)| bad(p)).map(|(i, _)| i).collect()
}

/// A node while the trie is built: its depth and the sorted phrases that begin with it.
struct Open {
    depth: usize,
    phrases: std::ops::Range<usize>,
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
        if let Some(p) = penalty {
            let good = |v: f64| v.is_finite() && v >= 0.0;
            if !good(p.strength) || !good(p.exponent) {
                return Err(Error::value(
                    "penalty",
                    "a finite penalty and gamma of 0 or more",
                    format!("penalty {}, gamma {}", p.strength, p.exponent),
                ));
            }
        }
        let mut out = Self {
            nodes: Vec::new(),
            tokens: Vec::new(),
            hits: Vec::new(),
            always: Vec::new(),
            phrases: sorted.len(),
            longest: sorted.iter().map(Vec::len).max().unwrap_or(0),
            largest: sorted.iter().flatten().copied().max().unwrap_or(0),
        };
        let shortest = out.grow(&sorted);
        out.link();
        out.collect_hits(&shortest, penalty);
        Ok(out)
    }

    /// Adds all nodes; returns per node the length of the shortest phrase that passes through it, and whether it ends
    /// there.
    fn grow(&mut self, sorted: &[Vec<u32>]) -> Vec<(usize, bool)> {
        let mut shortest = Vec::new();
        let mut queue = VecDeque::from([(
            NONE,
            Open {
                depth: 0,
                phrases: 0..sorted.len(),
            },
        )]);
        while let Some((token, Open { depth, phrases })) = queue.pop_front() {
            let through = &sorted[phrases.clone()];
            let ends = through[0].len() == depth;
            let length = through.iter().map(Vec::len).min().unwrap_or(depth);
            shortest.push((length, ends));
            let first_child = (self.nodes.len() + 1 + queue.len()) as u32;
            let before = queue.len();
            let mut start = phrases.start + usize::from(ends);
            while start < phrases.end {
                let next = sorted[start][depth];
                let same = sorted[start..phrases.end].partition_point(|p| p[depth] == next);
                let open = Open {
                    depth: depth + 1,
                    phrases: start..start + same,
                };
                queue.push_back((next, open));
                start += same;
            }
            self.tokens.push(token);
            self.nodes.push(Node {
                first_child,
                children: (queue.len() - before) as u32,
                link: ROOT,
                out: NONE,
                first_hit: 0,
                hits: 0,
            });
        }
        shortest
    }

    fn children(&self, node: u32) -> std::ops::Range<usize> {
        let n = self.nodes[node as usize];
        n.first_child as usize..(n.first_child + n.children) as usize
    }

    fn child(&self, node: u32, token: u32) -> Option<u32> {
        let range = self.children(node);
        let at = self.tokens[range.clone()].binary_search(&token).ok()?;
        Some((range.start + at) as u32)
    }

    /// State after `token` in `state`.
    fn step(&self, mut state: u32, token: u32) -> u32 {
        loop {
            if let Some(next) = self.child(state, token) {
                return next;
            }
            if state == ROOT {
                return ROOT;
            }
            state = self.nodes[state as usize].link;
        }
    }

    fn link(&mut self) {
        for node in 0..self.nodes.len() as u32 {
            for child in self.children(node) {
                self.nodes[child].link = match node {
                    ROOT => ROOT,
                    _ => self.step(self.nodes[node as usize].link, self.tokens[child]),
                };
            }
        }
    }

    fn collect_hits(&mut self, shortest: &[(usize, bool)], penalty: Option<Penalty>) {
        let mut depth = vec![0usize; self.nodes.len()];
        for node in 0..self.nodes.len() {
            let first_hit = self.hits.len();
            for child in self.children(node as u32) {
                depth[child] = depth[node] + 1;
                let (length, ends) = shortest[child];
                if node as u32 == ROOT {
                    self.always.extend(ends.then_some(self.tokens[child]));
                } else if ends {
                    self.hits.push((self.tokens[child], f64::NEG_INFINITY));
                } else if let Some(p) = penalty {
                    let matched = depth[node] as f64 / length as f64;
                    let value = -p.strength * matched.powf(p.exponent);
                    self.hits.push((self.tokens[child], value));
                }
            }
            let hits = self.hits.len() - first_hit;
            let n = self.nodes[node];
            self.nodes[node] = Node {
                first_hit: first_hit as u32,
                hits: hits as u32,
                out: match (hits, node as u32) {
                    (_, ROOT) => NONE,
                    (0, _) => self.nodes[n.link as usize].out,
                    (_, node) => node,
                },
                ..n
            };
        }
    }

    /// Tokens of context that can matter: one less than the longest phrase.
    pub fn reach(&self) -> usize {
        self.longest - 1
    }

    pub fn phrases(&self) -> usize {
        self.phrases
    }

    pub fn nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.nodes.len() * (size_of::<Node>() + size_of::<u32>())
            + self.hits.len() * size_of::<(u32, f64)>()
            + self.always.len() * size_of::<u32>()
    }

    fn state(&self, context: &[i64]) -> Result<u32> {
        context.iter().try_fold(ROOT, |state, id| {
            Ok(self.step(state, token("input_ids", *id, u32::MAX as usize)?))
        })
    }

    /// What `context` adds to which token, ascending by token, without the phrases of one token. Of several values for
    /// a token the lowest counts.
    fn matches(&self, context: &[i64]) -> Result<Vec<(u32, f64)>> {
        let mut found = Vec::new();
        let mut node = self.nodes[self.state(context)? as usize].out;
        while node != NONE {
            let n = self.nodes[node as usize];
            found.extend_from_slice(
                &self.hits[n.first_hit as usize..(n.first_hit + n.hits) as usize],
            );
            node = self.nodes[n.link as usize].out;
        }
        lowest(&mut found);
        Ok(found)
    }

    /// Everything to be written after each of `contexts`: row offsets, token ids, values.
    ///
    /// # Errors
    /// `Value` for an id in a context that is not one.
    pub fn edits(&self, contexts: &Contexts<'_>) -> Result<(Vec<i64>, Vec<i64>, Vec<f64>)> {
        let (mut indptr, mut ids, mut values) = (vec![0], Vec::new(), Vec::new());
        for i in 0..contexts.rows() {
            let mut row = self.matches(contexts.row(i))?;
            row.extend(self.always.iter().map(|id| (*id, f64::NEG_INFINITY)));
            lowest(&mut row);
            ids.extend(row.iter().map(|e| i64::from(e.0)));
            values.extend(row.iter().map(|e| e.1));
            indptr.push(ids.len() as i64);
        }
        Ok((indptr, ids, values))
    }

    /// Writes what the context of row `i` says, keeping the old entries; the checks of an entry and its write share one
    /// trip to memory, which is where the time goes.
    fn edit<T: Element>(
        &self,
        i: usize,
        row: &mut [T],
        context: &[i64],
        dead_end: Option<u32>,
    ) -> Edited<T> {
        let mut edited = Edited::default();
        match self.matches(context) {
            Ok(found) => edited.found = found,
            Err(err) => return edited.failed(err),
        }
        edited.old.reserve(edited.found.len() + self.always.len());
        let mut removes = !self.always.is_empty();
        for (id, value) in &edited.found {
            let at = *id as usize;
            match check_entry(i, row, *id, *value) {
                Ok(new) => edited.old.push(std::mem::replace(&mut row[at], new)),
                Err(err) => return edited.failed(err),
            }
            removes |= *value == f64::NEG_INFINITY;
        }
        let removed = T::store(-T::Acc::INFINITY);
        for id in &self.always {
            prefetch(row, *id as usize, 1);
        }
        edited.old.extend(
            (self.always.iter()).map(|id| std::mem::replace(&mut row[*id as usize], removed)),
        );
        let taken = &edited.old[edited.found.len()..];
        if let Some(k) = taken.iter().position(|v| is_poison(*v)) {
            let (id, v) = (self.always[k] as usize, taken[k]);
            return edited.failed(poison_error(i, row.len(), id, v));
        }
        if removes && !row.iter().any(|v| v.load() > -T::Acc::INFINITY) {
            edited.undo(row, &self.always);
            match dead_end.map(|id| check_entry(i, row, id, 0.0).map(|_| id)) {
                Some(Ok(id)) => edited.force = Some(id),
                Some(Err(err)) => return edited.failed(err),
                None => return edited.failed(no_token_left(i)),
            }
        }
        edited
    }

    /// Forbids (and penalises) in each row what its context says. A row in which no token would be left is forced to
    /// token `dead_end`, or is an error without one. Entries that are not written are not read, but for the first that
    /// shows that a token is left.
    ///
    /// # Errors
    /// `Shape` unless there is one context per row, `Value` for phrase ids or context ids outside the vocabulary or a
    /// sum beyond the range of the dtype, `NonFinite` for NaN or +∞ where something would be written, `Degenerate` for
    /// a row with no token left; before anything is written.
    pub fn apply<T: Element>(
        &self,
        logits: RowsMut<'_, T>,
        contexts: &Contexts<'_>,
        dead_end: Option<u32>,
    ) -> Result<()> {
        let (rows, width) = (logits.rows(), logits.width());
        if contexts.rows() != rows {
            return Err(Error::shape(
                "input_ids",
                format!("{rows} rows (as {LOGITS})"),
                contexts.rows(),
            ));
        }
        token("phrases", i64::from(self.largest), width)?;
        if let Some(id) = dead_end {
            token("eos_token_id", i64::from(id), width)?;
        }
        let bytes = scattered(rows * (self.always.len() + self.longest));
        let mut runs = logits.into_runs(1);
        let mut edited = par::map(bytes, runs.iter_mut().collect(), |run| {
            self.edit(run.first, run.data, contexts.row(run.first), dead_end)
        });
        if edited.iter().any(|e| e.error.is_some()) {
            for (run, edited) in runs.iter_mut().zip(&mut edited) {
                edited.undo(run.data, &self.always);
            }
            let first = edited.into_iter().find_map(|e| e.error);
            return first.map_or(Ok(()), Err);
        }
        for (run, edited) in runs.iter_mut().zip(&edited) {
            if let Some(id) = edited.force {
                force_row(run.data, id);
            }
        }
        Ok(())
    }
}

/// What was done to a row: the matched edits, then the entries that are always removed.
struct Edited<T> {
    found: Vec<(u32, f64)>,
    /// Entries before they were written, in the order of the writes.
    old: Vec<T>,
    /// The row is as it was, and is to be forced to this token.
    force: Option<u32>,
    error: Option<Error>,
}

impl<T> Default for Edited<T> {
    fn default() -> Self {
        Self {
            found: Vec::new(),
            old: Vec::new(),
            force: None,
            error: None,
        }
    }
}

impl<T: Element> Edited<T> {
    fn failed(mut self, err: Error) -> Self {
        self.error = Some(err);
        self
    }

    /// Puts the old entries back, the last write first: a token may have been written twice.
    fn undo(&mut self, row: &mut [T], always: &[u32]) {
        let written = self.found.iter().map(|e| e.0).chain(always.iter().copied());
        let mut pairs: Vec<_> = written.zip(self.old.drain(..)).collect();
        while let Some((id, old)) = pairs.pop() {
            row[id as usize] = old;
        }
    }
}

/// Sorts by token and keeps the lowest value of each.
fn lowest(found: &mut Vec<(u32, f64)>) {
    found.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    found.dedup_by_key(|e| e.0);
}

/// The phrases in ascending order, once they are found sound.
fn validated(phrases: &[&[i64]], width: usize, max_length: usize) -> Result<Vec<Vec<u32>>> {
    if phrases.is_empty() {
        return Err(Error::value("phrases", "at least one phrase", "none"));
    }
    expect_none(
        "at least one token id in each phrase",
        which(phrases, <[i64]>::is_empty),
    )?;
    expect_none(
        &format!("at most {max_length} token ids in each phrase"),
        which(phrases, |p| p.len() > max_length),
    )?;
    let inside = |id: &i64| u32::try_from(*id).is_ok_and(|id| (id as usize) < width);
    expect_none(
        &format!("token ids from 0 to {}", width.saturating_sub(1)),
        which(phrases, |p| !p.iter().all(inside)),
    )?;
    let mut sorted: Vec<(Vec<u32>, usize)> = phrases
        .iter()
        .enumerate()
        .map(|(i, p)| (p.iter().map(|id| *id as u32).collect(), i))
        .collect();
    sorted.sort();
    let twice = sorted.windows(2).filter(|w| w[0].0 == w[1].0);
    let mut twice: Vec<usize> = twice.map(|w| w[1].1).collect();
    twice.sort_unstable();
    expect_none("each phrase once", twice)?;
    Ok(sorted.into_iter().map(|(p, _)| p).collect())
}

/// The last tokens of each row, of which those before the row's `begin` do not count (a prompt, padding).
#[derive(Debug, Clone, Copy)]
pub struct Contexts<'a> {
    ids: &'a [i64],
    width: usize,
    begin: &'a [i64],
}

impl<'a> Contexts<'a> {
    /// # Errors
    /// `Shape` unless `ids` holds `begin.len()` rows of `width`.
    pub fn new(ids: &'a [i64], width: usize, begin: &'a [i64]) -> Result<Self> {
        if ids.len() != begin.len() * width {
            let expected = format!("{} rows of {width}", begin.len());
            return Err(Error::shape(
                "input_ids",
                expected,
                format!("{} ids", ids.len()),
            ));
        }
        Ok(Self { ids, width, begin })
    }

    pub fn rows(&self) -> usize {
        self.begin.len()
    }

    fn row(&self, i: usize) -> &'a [i64] {
        let row = &self.ids[i * self.width..(i + 1) * self.width];
        &row[self.begin[i].clamp(0, self.width as i64) as usize..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
