//! What phrases write into rows of logits, whatever alphabet they are matched in.

use super::edits::{check_entry, expect_tokens, force_row, scattered};
use super::{LOGITS, is_poison, no_token_left, poison_error, token};
use crate::element::{Element, Real};
use crate::simd::prefetch;
use crate::view::RowsMut;
use crate::{Error, Result, par};

/// Penalty on tokens that extend a phrase of length L after m matched units: `strength · (m / L)^exponent`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalty {
    pub strength: f64,
    pub exponent: f64,
}

impl Penalty {
    /// # Errors
    /// `Value` for a strength or exponent that is negative or not finite.
    pub fn check(&self) -> Result<()> {
        let good = |v: f64| v.is_finite() && v >= 0.0;
        if good(self.strength) && good(self.exponent) {
            return Ok(());
        }
        Err(Error::value(
            "penalty",
            "a finite penalty and gamma of 0 or more",
            format!("penalty {}, gamma {}", self.strength, self.exponent),
        ))
    }

    /// What is added to a token after `matched` of `length` units.
    pub fn value(&self, matched: usize, length: u32) -> f64 {
        -self.strength * (matched as f64 / f64::from(length)).powf(self.exponent)
    }
}

/// What a context writes. A token may stand in several of the lists: the lowest value counts.
#[derive(Debug)]
pub struct Found<'a> {
    /// What is added to which token, ascending by token.
    pub values: Vec<(u32, f64)>,
    /// Tokens that become −∞, in any order.
    pub removed: Vec<u32>,
    /// Tokens that become −∞ whatever came before, ascending.
    pub always: &'a [u32],
}

impl Found<'_> {
    fn removed(&self) -> impl Iterator<Item = u32> {
        self.removed.iter().chain(self.always).copied()
    }
}

/// Phrases ready to be matched.
pub trait Matcher: Send + Sync {
    /// What `context` writes.
    ///
    /// # Errors
    /// `Value` for an id in the context that is not one.
    fn found(&self, context: &[i64]) -> Result<Found<'_>>;
    /// Tokens of context that can matter.
    fn reach(&self) -> usize;
    fn phrases(&self) -> usize;
    fn nodes(&self) -> usize;
    /// Memory held.
    fn bytes(&self) -> usize;
    /// Largest id that may be written.
    fn largest(&self) -> u32;
    /// Entries written in a row, more or less, to decide whether threads are worth waking.
    fn writes(&self) -> usize;
}

/// Sorts by token and keeps the lowest value of each.
pub fn lowest(found: &mut Vec<(u32, f64)>) {
    found.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    found.dedup_by_key(|e| e.0);
}

/// Everything to be written after each of `contexts`: row offsets, token ids, values.
///
/// # Errors
/// `Value` for an id in a context that is not one.
pub fn edits(
    matcher: &(impl Matcher + ?Sized),
    contexts: &Contexts<'_>,
) -> Result<(Vec<i64>, Vec<i64>, Vec<f64>)> {
    let (mut indptr, mut ids, mut values) = (vec![0], Vec::new(), Vec::new());
    for i in 0..contexts.rows() {
        let found = matcher.found(contexts.row(i))?;
        let mut row = found.values.clone();
        row.extend(found.removed().map(|id| (id, f64::NEG_INFINITY)));
        lowest(&mut row);
        ids.extend(row.iter().map(|e| i64::from(e.0)));
        values.extend(row.iter().map(|e| e.1));
        indptr.push(ids.len() as i64);
    }
    Ok((indptr, ids, values))
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
    matcher: &(impl Matcher + ?Sized),
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
    token("phrases", i64::from(matcher.largest()), width)?;
    if let Some(id) = dead_end {
        token("eos_token_id", i64::from(id), width)?;
    }
    expect_tokens(&logits.as_rows())?;
    let bytes = scattered(rows * matcher.writes());
    let mut runs = logits.into_runs(1);
    let mut edited = par::map(bytes, runs.iter_mut().collect(), |run| {
        match matcher.found(contexts.row(run.first)) {
            Ok(found) => edit(run.first, run.data, found, dead_end),
            Err(err) => Edited::of(NOTHING).failed(err),
        }
    });
    if edited.iter().any(|e| e.error.is_some()) {
        for (run, edited) in runs.iter_mut().zip(&mut edited) {
            edited.undo(run.data);
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

const NOTHING: Found<'static> = Found {
    values: Vec::new(),
    removed: Vec::new(),
    always: &[],
};

/// Writes into row `i` what was found, keeping the old entries; the checks of an entry and its write share one trip to
/// memory, which is where the time goes.
fn edit<'a, T: Element>(
    i: usize,
    row: &mut [T],
    found: Found<'a>,
    dead_end: Option<u32>,
) -> Edited<'a, T> {
    let mut edited = Edited::of(found);
    let found = &edited.found;
    let lists = [&found.removed[..], found.always];
    let writes = found.values.len() + lists[0].len() + lists[1].len();
    let mut old = Vec::with_capacity(writes);
    let mut removes = writes > found.values.len();
    let mut error = None;
    for (id, value) in &found.values {
        let at = *id as usize;
        match check_entry(i, row, *id, *value) {
            Ok(new) => old.push(std::mem::replace(&mut row[at], new)),
            Err(err) => {
                error = Some(err);
                break;
            }
        }
        removes |= *value == f64::NEG_INFINITY;
    }
    if error.is_none() {
        let gone = T::store(-T::Acc::INFINITY);
        for list in lists {
            for id in list {
                prefetch(row, *id as usize, 1);
            }
            old.extend((list.iter()).map(|id| std::mem::replace(&mut row[*id as usize], gone)));
        }
        let taken = &old[found.values.len()..];
        if let Some(k) = taken.iter().position(|v| is_poison(*v)) {
            let id = found.removed().nth(k).unwrap_or(0);
            error = Some(poison_error(i, row.len(), id as usize, taken[k]));
        }
    }
    edited.old = old;
    edited.error = error;
    if edited.error.is_none() && removes && !row.iter().any(|v| v.load() > -T::Acc::INFINITY) {
        edited.undo(row);
        match dead_end.map(|id| check_entry(i, row, id, 0.0).map(|_| id)) {
            Some(Ok(id)) => edited.force = Some(id),
            Some(Err(err)) => return edited.failed(err),
            None => return edited.failed(no_token_left(i)),
        }
    }
    edited
}

/// What was done to a row.
struct Edited<'a, T> {
    found: Found<'a>,
    /// Entries before they were written, in the order of the writes.
    old: Vec<T>,
    /// The row is as it was, and is to be forced to this token.
    force: Option<u32>,
    error: Option<Error>,
}

impl<'a, T: Element> Edited<'a, T> {
    fn of(found: Found<'a>) -> Self {
        Self {
            found,
            old: Vec::new(),
            force: None,
            error: None,
        }
    }

    fn failed(mut self, err: Error) -> Self {
        self.error = Some(err);
        self
    }

    /// Puts the old entries back, the last write first: a token may have been written twice.
    fn undo(&mut self, row: &mut [T]) {
        let written = self.found.values.iter().map(|e| e.0);
        let written = written.chain(self.found.removed());
        let mut pairs: Vec<_> = written.zip(self.old.drain(..)).collect();
        while let Some((id, old)) = pairs.pop() {
            row[id as usize] = old;
        }
    }
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
