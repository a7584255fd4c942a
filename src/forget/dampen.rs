//! Selective Synaptic Dampening: shrink the weights that matter more to the forget set than to the rest.
//!
//! A weight is selected where `I_f > alpha * I_d`, strictly, and is then multiplied by
//! `clamp((lam * I_d / I_f)^exponent, min_factor, max_factor)`. Products, the comparison and the factor are computed
//! in the type of the importances, in that order; the weight is multiplied in its own arithmetic type and rounded
//! once.
//!
//! One pass does it all. Bad importances can turn up anywhere, and finding them all first would cost half as much
//! memory traffic again; so the pass keeps the old value of every weight it changes and puts them back on an error.
//! Few weights are selected in practice. Where they are many, the log has a limit: what comes after it is only
//! checked, and dampened in a second pass once all is known to be good.

use crate::element::{Element, Real};
use crate::par;
use crate::simd::{Kernel, dispatch, prefetch, top_bits};
use crate::view::{Rows, RowsMut};
use crate::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

/// Weights looked at together: one bit each in a word of the mask.
const BLOCK: usize = 64;
/// Weights per work item: long enough for the processor to keep its streams running from page to page.
const ITEM: usize = 128 << 10;
/// A guarded call logs at most this fraction of the weights' bytes, and never less than [`LOG_MIN`].
const LOG_SHARE: usize = 8;
const LOG_MIN: usize = 1 << 20;

/// The dampening rule, validated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule<I> {
    alpha: I,
    lam: I,
    exponent: I,
    max_factor: I,
    min_factor: I,
    forget_count: I,
    retain_count: I,
}

/// The rule's numbers as the caller gives them; `Default` is the published rule.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RuleSpec {
    pub alpha: f64,
    pub lam: f64,
    pub exponent: f64,
    pub max_factor: f64,
    pub min_factor: f64,
    /// Importances are divided by these before anything else: 1 for means, the count for sums.
    pub forget_count: f64,
    pub retain_count: f64,
}

impl Default for RuleSpec {
    fn default() -> Self {
        Self {
            alpha: 10.0,
            lam: 1.0,
            exponent: 1.0,
            max_factor: 1.0,
            min_factor: 0.0,
            forget_count: 1.0,
            retain_count: 1.0,
        }
    }
}

fn finite_from(arg: &'static str, v: f64, low: f64) -> Result<()> {
    if v.is_finite() && v >= low {
        return Ok(());
    }
    Err(Error::value(
        arg,
        format!("a finite number, {low} or more"),
        v,
    ))
}

fn positive(arg: &'static str, v: f64) -> Result<()> {
    if v.is_finite() && v > 0.0 {
        return Ok(());
    }
    Err(Error::value(arg, "a finite number above 0", v))
}

impl RuleSpec {
    /// Checks the numbers and rounds them to the arithmetic type.
    ///
    /// # Errors
    /// `Value` for anything negative or not finite, or `max_factor < min_factor`.
    pub fn rule<I: Real>(&self) -> Result<Rule<I>> {
        finite_from("alpha", self.alpha, 0.0)?;
        finite_from("lam", self.lam, 0.0)?;
        finite_from("exponent", self.exponent, 0.0)?;
        finite_from("min_factor", self.min_factor, 0.0)?;
        finite_from("max_factor", self.max_factor, self.min_factor)?;
        positive("forget_count", self.forget_count)?;
        positive("retain_count", self.retain_count)?;
        Ok(Rule {
            alpha: I::from_f64(self.alpha),
            lam: I::from_f64(self.lam),
            exponent: I::from_f64(self.exponent),
            max_factor: I::from_f64(self.max_factor),
            min_factor: I::from_f64(self.min_factor),
            forget_count: I::from_f64(self.forget_count),
            retain_count: I::from_f64(self.retain_count),
        })
    }
}

impl<I: Real> Rule<I> {
    #[inline(always)]
    fn selects(&self, f: I, d: I) -> bool {
        f > self.alpha * d
    }

    #[inline(always)]
    fn clamp(&self, r: I) -> I {
        // A NaN (an overflowed lam * I_d over an infinite I_f) becomes max_factor.
        r.lesser(self.max_factor).greater(self.min_factor)
    }

    #[inline(always)]
    fn factor(&self, f: I, d: I) -> I {
        self.clamp(d * self.lam / f)
    }

    #[inline(always)]
    fn powered(&self, f: I, d: I) -> I {
        self.clamp((d * self.lam / f).powf(self.exponent))
    }
}

/// What a call did. `changed` leaves out selected weights whose value stayed as it was; `zeroed` counts those that
/// became 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Selection {
    pub count: u64,
    pub changed: u64,
    pub zeroed: u64,
}

impl std::ops::AddAssign for Selection {
    fn add_assign(&mut self, o: Self) {
        self.count += o.count;
        self.changed += o.changed;
        self.zeroed += o.zeroed;
    }
}

/// Old values of the selected weights of one item while it is dampened: a bit per weight, and the values in order.
#[derive(Debug, Clone)]
struct Log<W> {
    first: usize,
    mask: Vec<u64>,
    old: Vec<W>,
}

impl<W> Log<W> {
    fn bytes(&self) -> usize {
        size_of_val(&self.mask[..]) + self.old.capacity() * size_of::<W>()
    }
}

impl<W: Element> Log<W> {
    /// As it is, for a call that keeps nothing afterwards.
    fn kept(self) -> Kept<W> {
        Kept {
            first: self.first,
            places: Places::Bits(self.mask),
            old: self.old,
        }
    }

    /// Only what changed (`w` holds the item's new values), in the smaller of two forms.
    fn compact(self, w: &[W], done: Selection) -> Kept<W> {
        let len = w.len();
        let mut kept = self.kept();
        if done.changed < kept.old.len() as u64 {
            let moved = (kept.entries()).filter(|(i, old)| !same_bits(*old, w[*i]));
            let (offsets, old): (Vec<u32>, Vec<W>) = moved.map(|(i, v)| (i as u32, v)).unzip();
            (kept.places, kept.old) = (Places::Offsets(offsets), old);
        }
        kept.shrink(len);
        kept
    }
}

/// False wherever a NaN is involved: a product may change its payload.
fn same_bits<W: Element>(a: W, b: W) -> bool {
    let (a, b) = (a.load(), b.load());
    a.bits() == b.bits() && !a.is_nan()
}

/// Where the weights of an item lie that an entry is kept of.
#[derive(Debug, Clone)]
enum Places {
    /// A bit per weight of the item.
    Bits(Vec<u64>),
    /// Offsets in the item, ascending.
    Offsets(Vec<u32>),
}

/// Old values of some weights of one item, in order.
#[derive(Debug, Clone)]
struct Kept<W> {
    first: usize,
    places: Places,
    old: Vec<W>,
}

impl<W: Copy> Kept<W> {
    fn bytes(&self) -> usize {
        let places = match &self.places {
            Places::Bits(mask) => size_of_val(&mask[..]),
            Places::Offsets(offsets) => size_of_val(&offsets[..]),
        };
        places + size_of_val(&self.old[..])
    }

    /// (offset in the item, old value) of every entry.
    fn entries(&self) -> impl Iterator<Item = (usize, W)> + '_ {
        let (mask, offsets): (&[u64], &[u32]) = match &self.places {
            Places::Bits(mask) => (mask, &[]),
            Places::Offsets(offsets) => (&[], offsets),
        };
        let bits = mask.iter().enumerate().flat_map(|(k, word)| {
            let mut rest = *word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros() as usize)?;
                rest &= rest - 1;
                Some(k * BLOCK + bit)
            })
        });
        let offsets = offsets.iter().map(|i| *i as usize);
        bits.chain(offsets).zip(self.old.iter().copied())
    }

    /// Takes the smaller form of the places of an item of `len` weights, and gives back spare memory.
    fn shrink(&mut self, len: usize) {
        let sparse = self.old.len() * u32::BITS as usize <= len;
        match &self.places {
            Places::Bits(_) if sparse => {
                let offsets = self.entries().map(|(i, _)| i as u32).collect();
                self.places = Places::Offsets(offsets);
            }
            Places::Offsets(offsets) if !sparse => {
                let mut mask = vec![0u64; len.div_ceil(BLOCK)];
                for i in offsets {
                    mask[*i as usize / BLOCK] |= 1 << (*i as usize % BLOCK);
                }
                self.places = Places::Bits(mask);
            }
            _ => {}
        }
        self.old.shrink_to_fit();
    }
}

/// The old values of every weight that a call changed: restores them bit for bit.
#[derive(Debug, Clone)]
pub struct Patch<W> {
    shape: (usize, usize),
    kept: Vec<Kept<W>>,
}

impl<W: Element> Patch<W> {
    /// Weights recorded.
    pub fn len(&self) -> usize {
        self.kept.iter().map(|l| l.old.len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory held.
    pub fn bytes(&self) -> usize {
        self.kept.iter().map(Kept::bytes).sum()
    }

    /// (flat index in logical order, old value), ascending.
    pub fn entries(&self) -> impl Iterator<Item = (usize, W)> + '_ {
        (self.kept.iter()).flat_map(|k| k.entries().map(|(i, v)| (k.first + i, v)))
    }

    /// The reverse of [`Patch::entries`], for a tensor of `shape` rows and columns.
    ///
    /// # Errors
    /// `Shape` unless there is one value per index; `Value` unless the indices ascend and lie inside.
    pub fn from_entries(shape: (usize, usize), indices: &[u64], old: &[W]) -> Result<Self> {
        if indices.len() != old.len() {
            return Err(Error::shape(
                "old",
                format!("{} values", indices.len()),
                old.len(),
            ));
        }
        let size = (shape.0 * shape.1) as u64;
        if let Some(pair) = indices.windows(2).find(|w| w[0] >= w[1]) {
            let found = format!("{} before {}", pair[0], pair[1]);
            return Err(Error::value("indices", "ascending indices", found));
        }
        if let Some(last) = indices.last().filter(|i| **i >= size) {
            return Err(Error::value("indices", format!("below {size}"), last));
        }
        let mut kept = Vec::new();
        let mut at = 0;
        while let Some(first) = indices.get(at) {
            let first = *first as usize / ITEM * ITEM;
            let n = indices[at..].partition_point(|i| (*i as usize) < first + ITEM);
            let offsets = indices[at..at + n].iter();
            let mut item = Kept {
                first,
                places: Places::Offsets(offsets.map(|i| (*i as usize - first) as u32).collect()),
                old: old[at..at + n].to_vec(),
            };
            item.shrink(ITEM.min(size as usize - first));
            kept.push(item);
            at += n;
        }
        Ok(Self { shape, kept })
    }

    /// Writes the recorded values back.
    ///
    /// # Errors
    /// `Shape` if `weights` has other rows than the tensor that was dampened.
    pub fn restore(&self, weights: RowsMut<'_, W>) -> Result<()> {
        let found = (weights.rows(), weights.width());
        if found != self.shape {
            return Err(Error::shape(
                "weights",
                format!("{} rows of {}", self.shape.0, self.shape.1),
                format!("{} rows of {}", found.0, found.1),
            ));
        }
        let mut entries = self.entries().peekable();
        let mut runs = weights.into_runs(ITEM.div_ceil(found.1.max(1)));
        runs.sort_by_key(|r| r.first);
        for run in runs {
            let first = run.first * found.1;
            while let Some((i, v)) = entries.next_if(|(i, _)| *i < first + run.data.len()) {
                run.data[i - first] = v;
            }
        }
        Ok(())
    }
}

/// How much the importances are trusted, and what is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing is modified if an importance turns out bad; nothing is kept afterwards.
    Guarded,
    /// As guarded, and the old values come back as a [`Patch`].
    Recorded,
}

/// The arrays of one tensor, of one shape.
pub struct Tensor<'a, W, I> {
    pub weights: RowsMut<'a, W>,
    pub forget: Rows<'a, I>,
    pub retain: Rows<'a, I>,
}

/// What was done to one tensor, and what undoes it if that was asked for.
pub type Done<W> = (Selection, Option<Patch<W>>);

/// An error, and the index of the tensor it was found in.
pub type Failure = (usize, Error);

/// A piece of the three arrays of one tensor at the same logical place.
struct Piece<'a, W, I> {
    tensor: usize,
    first: usize,
    w: &'a mut [W],
    f: &'a [I],
    d: &'a [I],
}

/// Cuts the arrays into pieces of at most [`ITEM`] weights, in logical order.
fn pieces<'a, W, I>(
    tensor: usize,
    w: RowsMut<'a, W>,
    f: &Rows<'a, I>,
    d: &Rows<'a, I>,
) -> Vec<Piece<'a, W, I>> {
    let width = w.width();
    let flat = f.as_contiguous().zip(d.as_contiguous());
    let max_rows = if flat.is_some() {
        usize::MAX / width.max(1)
    } else {
        1
    };
    let mut out = Vec::new();
    for run in w.into_runs(max_rows) {
        let first = run.first * width;
        let (f, d) = match flat {
            Some((f, d)) => (&f[first..], &d[first..]),
            None => (f.row(run.first), d.row(run.first)),
        };
        let (f, d) = (f.chunks(ITEM), d.chunks(ITEM));
        for (k, ((w, f), d)) in run.data.chunks_mut(ITEM).zip(f).zip(d).enumerate() {
            let (f, d) = (&f[..w.len()], &d[..w.len()]);
            out.push(Piece {
                tensor,
                first: first + k * ITEM,
                w,
                f,
                d,
            });
        }
    }
    out.sort_by_key(|p| p.first);
    out
}

#[inline(always)]
fn acceptable<I: Real>(f: I, d: I) -> bool {
    // Each comparison is false for NaN.
    (f >= I::ZERO) & (d >= I::ZERO) & (f.lesser(d) < I::INFINITY)
}

/// All importances of an item are acceptable.
pub(super) struct Check<'a, I> {
    pub(super) f: &'a [I],
    pub(super) d: &'a [I],
}

impl<I: Real> Kernel for Check<'_, I> {
    type Output = bool;
    #[inline(always)]
    fn run(self) -> bool {
        let mut bad = 0u32;
        for (f, d) in self.f.iter().zip(self.d) {
            bad |= u32::from(!acceptable(*f, *d));
        }
        bad == 0
    }
}

/// Dampens one item, logging old values; `None` if an importance is bad (the log then undoes what was done).
struct Dampen<'a, 'b, W, I> {
    w: &'b mut [W],
    f: &'a [I],
    d: &'a [I],
    rule: Rule<I>,
    log: Option<&'b mut Log<W>>,
}

/// Weights classified together before any of them is touched.
const TILE: usize = 4 * BLOCK;
/// Class of a selected weight; all others are 0.
const SELECTED: u8 = 0x80;
/// Above this count in a tile, all its weights are computed and the selected ones kept.
const MANY: u32 = (TILE / 8) as u32;
/// Weights gathered into one vector, and bits of a mask decoded in one step.
const VECTOR: usize = 16;
const STEP: usize = 8;
/// How far ahead of the loop importances are asked for, in weights.
const AHEAD: usize = 1024;
/// Tiles between a tile's classification and its dampening: long enough for its weights to arrive.
const DEPTH: usize = 4;
/// Bytes that memory moves together.
const LINE: usize = 64;

/// A classified tile that waits for its weights.
#[derive(Clone, Copy)]
struct Waiting {
    class: [u8; TILE],
    masks: [u64; TILE / BLOCK],
    count: u32,
}

impl<W: Element, I: Real> Dampen<'_, '_, W, I> {
    /// Tiles are classified [`DEPTH`] ahead of their weights, which are asked for in between: only those lines are read
    /// that hold a selected weight, and nobody waits for them.
    #[inline(always)]
    fn tiles<const SCALED: bool, const POWER: bool>(mut self) -> Option<Selection> {
        let mut total = Selection::default();
        let mut good = true;
        let w = std::mem::take(&mut self.w);
        let tiles = w.len().div_ceil(TILE);
        let mut ring = [const {
            Waiting {
                class: [0; TILE],
                masks: [0; TILE / BLOCK],
                count: 0,
            }
        }; DEPTH];
        for t in 0..tiles + DEPTH {
            let waiting = &mut ring[t % DEPTH];
            if waiting.count > 0 {
                let at = (t - DEPTH) * TILE;
                let mut scaled = ([I::ZERO; TILE], [I::ZERO; TILE]);
                let (f, d) = self.importances::<SCALED>(at, &mut scaled);
                let w = &mut w[at..][..f.len()];
                total += self.tile::<POWER>(w, f, d, waiting);
                waiting.count = 0;
            }
            if t < tiles {
                let at = t * TILE;
                let mut scaled = ([I::ZERO; TILE], [I::ZERO; TILE]);
                let end = (at + TILE).min(w.len());
                prefetch(self.f, at + AHEAD, TILE);
                prefetch(self.d, at + AHEAD, TILE);
                let (f, d) = self.importances::<SCALED>(at, &mut scaled);
                if !classify(waiting, &self.rule, f, d) || SCALED {
                    let (f, d) = (&self.f[at..end], &self.d[at..end]);
                    good &= (Check { f, d }).run();
                }
                ask(&w[at..end], waiting);
                if let Some(log) = self.log.as_deref_mut() {
                    log.mask.extend(&waiting.masks[..f.len().div_ceil(BLOCK)]);
                }
            }
        }
        good.then_some(total)
    }

    /// The importances of the tile at `at`, divided by their counts where those are not 1.
    #[inline(always)]
    fn importances<'s, const SCALED: bool>(
        &self,
        at: usize,
        scaled: &'s mut ([I; TILE], [I; TILE]),
    ) -> (&'s [I], &'s [I])
    where
        Self: 's,
    {
        let end = (at + TILE).min(self.f.len());
        let (f, d) = (&self.f[at..end], &self.d[at..end]);
        if !SCALED {
            return (f, d);
        }
        divide(&mut scaled.0, f, self.rule.forget_count);
        divide(&mut scaled.1, d, self.rule.retain_count);
        (&scaled.0[..f.len()], &scaled.1[..d.len()])
    }

    #[inline(always)]
    fn tile<const POWER: bool>(
        &mut self,
        w: &mut [W],
        f: &[I],
        d: &[I],
        waiting: &Waiting,
    ) -> Selection {
        let rule = &self.rule;
        let done = if !POWER && waiting.count > MANY && w.len() == TILE {
            if let Some(log) = self.log.as_deref_mut() {
                let (found, n) = positions(&waiting.masks);
                log.old
                    .extend(found[..n].iter().map(|i| w[usize::from(*i)]));
            }
            whole(w, f, d, &waiting.class, rule)
        } else {
            let old = self.log.as_deref_mut().map(|log| &mut log.old);
            gathered::<W, I, POWER>(w, f, d, &waiting.masks, rule, old)
        };
        Selection {
            count: u64::from(waiting.count),
            ..done
        }
    }
}

#[inline(always)]
fn divide<I: Real>(to: &mut [I], from: &[I], by: I) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = *from / by;
    }
}

/// Asks for the lines of a tile that hold selected weights.
#[inline(always)]
fn ask<W>(w: &[W], waiting: &Waiting) {
    let line = LINE / size_of::<W>();
    for (k, mask) in waiting.masks.iter().enumerate() {
        for at in (0..BLOCK).step_by(line) {
            if mask >> at & ((1 << line) - 1) != 0 {
                prefetch(w, k * BLOCK + at, line);
            }
        }
    }
}

/// Finds the selected weights of a tile; false if an importance may be bad (negative zeros are reported too).
#[inline(always)]
fn classify<I: Real>(waiting: &mut Waiting, rule: &Rule<I>, f: &[I], d: &[I]) -> bool {
    if f.len() < TILE {
        waiting.class.fill(0);
        waiting.masks.fill(0);
    }
    let mut most = [I::Bits::default(); BLOCK];
    let importances = f.chunks(BLOCK).zip(d.chunks(BLOCK));
    let class = waiting.class.as_chunks_mut::<BLOCK>().0;
    waiting.count = 0;
    for ((class, mask), (f, d)) in class.iter_mut().zip(&mut waiting.masks).zip(importances) {
        let (found, bits) = match (f.first_chunk::<BLOCK>(), d.first_chunk::<BLOCK>()) {
            (Some(f), Some(d)) => classify_block(&mut most, rule, f, d),
            _ => classify_block(&mut most, rule, f, d),
        };
        (*class, *mask) = (found, bits);
        waiting.count += mask.count_ones();
    }
    let mut suspicious = 0u32;
    for m in most {
        suspicious |= u32::from(m >= I::INFINITY.bits());
    }
    suspicious == 0
}

/// Class of each weight, and the same as bits. The classes stay in registers until then: bytes that were just stored in
/// pieces are slow to load as a whole.
#[inline(always)]
fn classify_block<I: Real>(
    most: &mut [I::Bits; BLOCK],
    rule: &Rule<I>,
    f: &[I],
    d: &[I],
) -> ([u8; BLOCK], u64) {
    let mut class = [0; BLOCK];
    for (((c, m), f), d) in class.iter_mut().zip(most).zip(f).zip(d) {
        *c = if rule.selects(*f, *d) { SELECTED } else { 0 };
        *m = (*m).max(f.bits()).max(d.bits());
    }
    (class, top_bits(&class))
}

/// Offsets of the set bits, in order, and how many there are.
#[inline(always)]
fn positions(masks: &[u64; TILE / BLOCK]) -> ([u16; TILE + STEP], usize) {
    let mut found = [0; TILE + STEP];
    let mut n = 0;
    for (k, mask) in masks.iter().enumerate() {
        let (mut rest, count) = (*mask, mask.count_ones() as usize);
        // Always a full step: what it writes beyond the count is overwritten by the next block, and no branch depends
        // on a count that changes from block to block.
        for step in (0..count).step_by(STEP) {
            for slot in &mut found[n + step..][..STEP] {
                *slot = (k * BLOCK) as u16 + rest.trailing_zeros() as u16;
                rest &= rest.wrapping_sub(1);
            }
        }
        n += count;
    }
    (found, n)
}

/// Scales the selected weights of a tile, gathered into full vectors; their old values go to `log`.
#[inline(always)]
fn gathered<W: Element, I: Real, const POWER: bool>(
    w: &mut [W],
    f: &[I],
    d: &[I],
    masks: &[u64; TILE / BLOCK],
    rule: &Rule<I>,
    mut log: Option<&mut Vec<W>>,
) -> Selection {
    let mut total = Selection::default();
    let (found, n) = positions(masks);
    for found in found[..n].chunks(VECTOR) {
        let mut old = [W::default(); VECTOR];
        let mut ratio = ([I::ZERO; VECTOR], [I::ONE; VECTOR]);
        for (k, i) in found.iter().enumerate() {
            let i = usize::from(*i);
            old[k] = w[i];
            (ratio.0[k], ratio.1[k]) = (d[i], f[i]);
        }
        let mut new = old;
        let (mut changed, mut zeroed) = (0u32, 0u32);
        for k in 0..VECTOR {
            let (f, d) = (ratio.1[k], ratio.0[k]);
            let factor = if POWER {
                rule.powered(f, d)
            } else {
                rule.factor(f, d)
            };
            let (v, c, z) = scale(old[k], factor);
            new[k] = v;
            changed += u32::from(c);
            zeroed += u32::from(z);
        }
        for (k, i) in found.iter().enumerate() {
            w[usize::from(*i)] = new[k];
        }
        if let Some(log) = log.as_deref_mut() {
            log.extend_from_slice(&old[..found.len()]);
        }
        total.changed += u64::from(changed);
        total.zeroed += u64::from(zeroed);
    }
    total
}

/// Scales the selected weights of a full tile, all lanes at once.
#[inline(always)]
fn whole<W: Element, I: Real>(
    w: &mut [W],
    f: &[I],
    d: &[I],
    class: &[u8; TILE],
    rule: &Rule<I>,
) -> Selection {
    // At most one per block of the tile, so a byte holds it.
    let (mut changed, mut zeroed) = ([0u8; BLOCK], [0u8; BLOCK]);
    let importances = f
        .as_chunks::<BLOCK>()
        .0
        .iter()
        .zip(d.as_chunks::<BLOCK>().0);
    let blocks = w.as_chunks_mut::<BLOCK>().0.iter_mut().zip(importances);
    for ((w, (f, d)), class) in blocks.zip(class.as_chunks::<BLOCK>().0) {
        for i in 0..BLOCK {
            let selected = class[i] & SELECTED != 0;
            let (new, c, z) = scale(w[i], rule.factor(f[i], d[i]));
            w[i] = if selected { new } else { w[i] };
            changed[i] += u8::from(selected & c);
            zeroed[i] += u8::from(selected & z);
        }
    }
    let sum = |lanes: [u8; BLOCK]| lanes.into_iter().map(u64::from).sum();
    Selection {
        count: 0,
        changed: sum(changed),
        zeroed: sum(zeroed),
    }
}

/// The scaled weight, whether its value changed and whether it became 0. NaN stays NaN, unchanged.
#[inline(always)]
fn scale<W: Element, I: Real>(old: W, factor: I) -> (W, bool, bool) {
    let v = old.load();
    let new = W::store(v * W::Acc::from_f64(factor.to_f64()));
    let changed = (new.load() != v) & !v.is_nan();
    (new, changed, changed & (new.load() == W::Acc::ZERO))
}

impl<W: Element, I: Real> Kernel for Dampen<'_, '_, W, I> {
    type Output = Option<Selection>;
    #[inline(always)]
    fn run(self) -> Option<Selection> {
        let scaled = self.rule.forget_count != I::ONE || self.rule.retain_count != I::ONE;
        match (scaled, self.rule.exponent != I::ONE) {
            (false, false) => self.tiles::<false, false>(),
            (true, false) => self.tiles::<true, false>(),
            (false, true) => self.tiles::<false, true>(),
            (true, true) => self.tiles::<true, true>(),
        }
    }
}

enum Outcome<W> {
    Done(Selection, Kept<W>),
    /// The log was full; the importances were checked and nothing was written.
    Checked,
    Bad(Option<Kept<W>>),
    /// Another item had failed before this one began.
    Skipped,
}

/// Limits shared by the items of one guarded pass.
struct Guard {
    mode: Mode,
    log_bytes_left: AtomicUsize,
    failed: AtomicBool,
}

impl Guard {
    fn item<W: Element, I: Real>(&self, p: &mut Piece<'_, W, I>, rule: Rule<I>) -> Outcome<W> {
        if self.failed.load(Relaxed) {
            return Outcome::Skipped;
        }
        if self.log_bytes_left.load(Relaxed) == 0 {
            if dispatch(Check { f: p.f, d: p.d }) {
                return Outcome::Checked;
            }
            self.failed.store(true, Relaxed);
            return Outcome::Bad(None);
        }
        let mut log = Log {
            first: p.first,
            mask: Vec::with_capacity(p.w.len().div_ceil(BLOCK)),
            old: Vec::new(),
        };
        let (w, f, d) = (&mut *p.w, p.f, p.d);
        match dispatch(Dampen {
            w,
            f,
            d,
            rule,
            log: Some(&mut log),
        }) {
            Some(done) => {
                if log.old.is_empty() {
                    log.mask = Vec::new();
                }
                if self.mode == Mode::Recorded {
                    return Outcome::Done(done, log.compact(p.w, done));
                }
                let bytes = log.bytes();
                let _ = self
                    .log_bytes_left
                    .fetch_update(Relaxed, Relaxed, |left| Some(left.saturating_sub(bytes)));
                Outcome::Done(done, log.kept())
            }
            None => {
                self.failed.store(true, Relaxed);
                Outcome::Bad(Some(log.kept()))
            }
        }
    }
}

/// Dampens `weights` in place by `forget` and `retain`, which have its shape.
///
/// `forget` is `I_f`, the importance for what is to be forgotten; `retain` is `I_d`, that for the retained or for all
/// the data. An infinite importance stands for itself (`I_f` infinite: factor 0; `I_d` infinite: never selected).
///
/// # Errors
/// `NonFinite` or `Value` for a NaN or negative importance, or where both are infinite; `Shape` if the shapes differ.
/// Nothing is modified then.
pub fn dampen<W: Element, I: Real>(
    weights: RowsMut<'_, W>,
    forget: &Rows<'_, I>,
    retain: &Rows<'_, I>,
    spec: &RuleSpec,
    mode: Mode,
) -> Result<Done<W>> {
    let (forget, retain) = (forget.clone(), retain.clone());
    let tensor = Tensor {
        weights,
        forget,
        retain,
    };
    let mut found = dampen_all(vec![tensor], spec, mode).map_err(|(_, error)| error)?;
    Ok(found.pop().unwrap_or_default())
}

/// As [`dampen`] for all tensors of a model at once: the pieces of all of them are shared out among the threads, and
/// one error leaves all of them as they were. The tensors do not share memory.
///
/// # Errors
/// As [`dampen`], with the index of the tensor.
pub fn dampen_all<W: Element, I: Real>(
    tensors: Vec<Tensor<'_, W, I>>,
    spec: &RuleSpec,
    mode: Mode,
) -> std::result::Result<Vec<Done<W>>, Failure> {
    let rule = spec.rule::<I>().map_err(|error| (0, error))?;
    let mut n = 0;
    for (k, t) in tensors.iter().enumerate() {
        let shape = (t.weights.rows(), t.weights.width());
        expect_shape("forget", &t.forget, shape).map_err(|error| (k, error))?;
        expect_shape("retain", &t.retain, shape).map_err(|error| (k, error))?;
        n += shape.0 * shape.1;
    }
    let bytes = n * (size_of::<W>() + 2 * size_of::<I>());
    let budget = match mode {
        Mode::Guarded => (n * size_of::<W>() / LOG_SHARE).max(LOG_MIN),
        Mode::Recorded => usize::MAX,
    };
    let guard = Guard {
        mode,
        log_bytes_left: AtomicUsize::new(budget),
        failed: AtomicBool::new(false),
    };
    let (mut all, mut found, mut importances) = (Vec::new(), Vec::new(), Vec::new());
    for (k, t) in tensors.into_iter().enumerate() {
        let shape = (t.weights.rows(), t.weights.width());
        let kept = Vec::new();
        let patch = (mode == Mode::Recorded).then_some(Patch { shape, kept });
        found.push((Selection::default(), patch));
        all.extend(pieces(k, t.weights, &t.forget, &t.retain));
        importances.push((t.forget, t.retain));
    }
    let outcomes = par::map(bytes, all.iter_mut().collect(), |p| guard.item(p, rule));
    if guard.failed.into_inner() {
        undo(&mut all, &outcomes);
        for (k, (forget, retain)) in importances.iter().enumerate() {
            check(forget, retain).map_err(|error| (k, error))?;
        }
        let reason = "the importances changed while they were read";
        return Err((0, Error::degenerate("forget", reason)));
    }
    let mut waiting = Vec::new();
    for (piece, outcome) in all.into_iter().zip(outcomes) {
        let (total, patch) = &mut found[piece.tensor];
        match outcome {
            Outcome::Done(done, kept) => {
                *total += done;
                if let Some(patch) = patch
                    && !kept.old.is_empty()
                {
                    patch.kept.push(kept);
                }
            }
            _ => waiting.push(piece),
        }
    }
    for (tensor, done) in par::map(bytes, waiting, |p| {
        let (w, f, d, log) = (p.w, p.f, p.d, None);
        (p.tensor, dispatch(Dampen { w, f, d, rule, log }))
    }) {
        found[tensor].0 += done.unwrap_or_default();
    }
    Ok(found)
}

/// What [`dampen`] would do, with nothing written.
///
/// # Errors
/// As [`dampen`].
pub fn preview<W: Element, I: Real>(
    weights: &Rows<'_, W>,
    forget: &Rows<'_, I>,
    retain: &Rows<'_, I>,
    spec: &RuleSpec,
) -> Result<Selection> {
    let rule = spec.rule::<I>()?;
    let shape = (weights.rows(), weights.width());
    expect_shape("forget", forget, shape)?;
    expect_shape("retain", retain, shape)?;
    let bytes = shape.0 * shape.1 * (size_of::<W>() + 2 * size_of::<I>());
    let found = par::map(bytes, cuts(shape), |(row, cut)| {
        let mut copy = weights.row(row)[cut.clone()].to_vec();
        let (f, d) = (&forget.row(row)[cut.clone()], &retain.row(row)[cut]);
        dispatch(Dampen {
            w: &mut copy,
            f,
            d,
            rule,
            log: None,
        })
    });
    let mut total = Selection::default();
    for done in found {
        match done {
            Some(done) => total += done,
            None => check(forget, retain)?,
        }
    }
    Ok(total)
}

/// For each alpha, how many weights [`dampen`] would select: one pass over the importances for all of them.
///
/// # Errors
/// As [`dampen`]; `Value` for an alpha that is negative or not finite.
pub fn selection_curve<I: Real>(
    forget: &Rows<'_, I>,
    retain: &Rows<'_, I>,
    alphas: &[f64],
    spec: &RuleSpec,
) -> Result<Vec<u64>> {
    let rules = (alphas.iter())
        .map(|&alpha| RuleSpec { alpha, ..*spec }.rule::<I>())
        .collect::<Result<Vec<_>>>()?;
    let shape = (retain.rows(), retain.width());
    expect_shape("forget", forget, shape)?;
    let bytes = 2 * shape.0 * shape.1 * size_of::<I>();
    let found = par::map(bytes, cuts(shape), |(row, cut)| {
        let (f, d) = (&forget.row(row)[cut.clone()], &retain.row(row)[cut]);
        dispatch(Curve {
            f,
            d,
            rules: &rules,
        })
    });
    let mut total = vec![0; alphas.len()];
    for counts in found {
        let Some(counts) = counts else {
            check(forget, retain)?;
            continue;
        };
        for (t, c) in total.iter_mut().zip(counts) {
            *t += c;
        }
    }
    Ok(total)
}

/// Selected counts of one item for every rule; `None` if an importance is bad.
struct Curve<'a, I> {
    f: &'a [I],
    d: &'a [I],
    rules: &'a [Rule<I>],
}

impl<I: Real> Kernel for Curve<'_, I> {
    type Output = Option<Vec<u64>>;
    #[inline(always)]
    fn run(self) -> Self::Output {
        let Some(first) = self.rules.first() else {
            return (Check {
                f: self.f,
                d: self.d,
            })
            .run()
            .then(Vec::new);
        };
        let mut counts = vec![0; self.rules.len()];
        let mut good = true;
        for (f, d) in self.f.chunks(TILE).zip(self.d.chunks(TILE)) {
            good &= (Check { f, d }).run();
            let (mut fs, mut ds) = ([I::ZERO; TILE], [I::ZERO; TILE]);
            for (to, f) in fs.iter_mut().zip(f) {
                *to = *f / first.forget_count;
            }
            for (to, d) in ds.iter_mut().zip(d) {
                *to = *d / first.retain_count;
            }
            for (count, rule) in counts.iter_mut().zip(self.rules) {
                let mut selected = 0u32;
                for (f, d) in fs.iter().zip(&ds) {
                    selected += u32::from(rule.selects(*f, *d));
                }
                *count += u64::from(selected);
            }
        }
        good.then_some(counts)
    }
}

/// Rows cut into pieces of at most [`ITEM`] elements.
pub(super) fn cuts((rows, width): (usize, usize)) -> Vec<(usize, std::ops::Range<usize>)> {
    (0..rows)
        .flat_map(|row| par::ranges(width, ITEM).into_iter().map(move |r| (row, r)))
        .collect()
}

fn expect_shape<T>(arg: &'static str, x: &Rows<'_, T>, shape: (usize, usize)) -> Result<()> {
    if (x.rows(), x.width()) != shape {
        return Err(Error::shape(
            arg,
            format!("{} rows of {}", shape.0, shape.1),
            format!("{} rows of {}", x.rows(), x.width()),
        ));
    }
    Ok(())
}

fn undo<W: Element, I>(pieces: &mut [Piece<'_, W, I>], outcomes: &[Outcome<W>]) {
    for (piece, outcome) in pieces.iter_mut().zip(outcomes) {
        if let Outcome::Done(_, kept) | Outcome::Bad(Some(kept)) = outcome {
            for (i, old) in kept.entries() {
                piece.w[i] = old;
            }
        }
    }
}

/// Checks a pair of importances as [`dampen`] does; the first bad one is named.
///
/// # Errors
/// As [`dampen`].
pub fn check<I: Real>(forget: &Rows<'_, I>, retain: &Rows<'_, I>) -> Result<()> {
    expect_shape("forget", forget, (retain.rows(), retain.width()))?;
    for row in 0..retain.rows() {
        let (f, d) = (forget.row(row), retain.row(row));
        let items = par::ranges(f.len(), ITEM);
        par::try_map(2 * size_of_val(f), items, |cut| {
            let (f, d) = (&f[cut.clone()], &d[cut.clone()]);
            if dispatch(Check { f, d }) {
                return Ok(());
            }
            let bad = f.iter().zip(d).position(|(f, d)| !acceptable(*f, *d));
            let i = bad.unwrap_or_default();
            Err(complaint(
                f[i].to_f64(),
                d[i].to_f64(),
                row * retain.width() + cut.start + i,
            ))
        })?;
    }
    Ok(())
}

fn complaint(f: f64, d: f64, index: usize) -> Error {
    let one = |arg, v: f64| {
        if v.is_nan() {
            return Some(Error::NonFinite {
                arg,
                index,
                found: v,
            });
        }
        (v < 0.0).then(|| {
            Error::value(
                arg,
                "importances of 0 or more",
                format!("{v} at flat index {index}"),
            )
        })
    };
    one("forget", f)
        .or_else(|| one("retain", d))
        .unwrap_or_else(|| {
            Error::value(
                "forget",
                "a finite importance where retain is infinite",
                format!("{f} at flat index {index}"),
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_level;
    use half::{bf16, f16};
    use proptest::prelude::*;

    fn run<W: Element, I: Real>(
        w: &mut [W],
        f: &[I],
        d: &[I],
        spec: &RuleSpec,
        mode: Mode,
    ) -> Result<(Selection, Option<Patch<W>>)> {
        let n = w.len();
        let (f, d) = (Rows::matrix(f, n), Rows::matrix(d, n));
        dampen(RowsMut::matrix(w, n), &f, &d, spec, mode)
    }

    /// The rule one weight at a time, as the reference states it.
    fn oracle<W: Element, I: Real>(w: &[W], f: &[I], d: &[I], s: &RuleSpec) -> (Vec<W>, Selection) {
        let mut out = Selection::default();
        let r = |v| I::from_f64(v);
        let one = |((w, f), d): ((&W, &I), &I)| {
            let (f, d) = (*f / r(s.forget_count), *d / r(s.retain_count));
            let selected = f > r(s.alpha) * d;
            if !selected {
                return *w;
            }
            let mut ratio = d * r(s.lam) / f;
            if s.exponent != 1.0 {
                ratio = ratio.powf(r(s.exponent));
            }
            if ratio.is_nan() || ratio > r(s.max_factor) {
                ratio = r(s.max_factor);
            }
            if ratio < r(s.min_factor) {
                ratio = r(s.min_factor);
            }
            let new = W::store(w.load() * W::Acc::from_f64(ratio.to_f64()));
            out.count += 1;
            out.changed += u64::from(new != *w);
            out.zeroed += u64::from(new != *w && new.load() == W::Acc::ZERO);
            new
        };
        let new = w.iter().zip(f).zip(d).map(one).collect();
        (new, out)
    }

    fn published<W: Element>() {
        let unit = 1.0 / 4096.0;
        let f = [0.0f32, 16.0, 3.0, 16.0, 1.0, 8.0].map(|v| v * unit);
        let d = [0.0f32, 1.0, 0.0, 2.0, 4.0, 0.5].map(|v| v * unit);
        let w = [1.0, -2.0, 0.5, 4.0, -0.25, 3.0].map(|v| W::store(W::Acc::from_f64(v)));
        for (alpha, lam, after, changed) in [
            (8.0, 1.0, [1.0, -0.125, 0.0, 4.0, -0.25, 0.1875], 3),
            (8.0, 4.0, [1.0, -0.5, 0.0, 4.0, -0.25, 0.75], 3),
            (8.0, 16.0, [1.0, -2.0, 0.0, 4.0, -0.25, 3.0], 1),
            (10.0, 1.0, [1.0, -0.125, 0.0, 4.0, -0.25, 0.1875], 3),
        ] {
            let spec = RuleSpec {
                alpha,
                lam,
                ..RuleSpec::default()
            };
            let mut got = w;
            let (found, _) = run(&mut got, &f, &d, &spec, Mode::Guarded).unwrap();
            assert_eq!(got.map(|v| v.load().to_f64()), after);
            assert_eq!(
                found,
                Selection {
                    count: 3,
                    changed,
                    zeroed: 1
                }
            );
        }
    }

    #[test]
    fn vectors_of_the_reference() {
        published::<f64>();
        published::<f32>();
        published::<f16>();
        published::<bf16>();
    }

    #[test]
    fn alpha_zero_lambda_zero_and_a_tie() {
        let (f, d) = ([1.0f32, 0.0, 1e-5], [5.0f32, 0.0, 1e-6]);
        let mut w = [2.0f32; 3];
        let zero = RuleSpec {
            alpha: 0.0,
            lam: 0.0,
            ..RuleSpec::default()
        };
        let (found, _) = run(&mut w, &f, &d, &zero, Mode::Guarded).unwrap();
        assert_eq!((w, found.count), ([0.0, 2.0, 0.0], 2));
        let spec = RuleSpec::default();
        let (found, _) = run(&mut [1.0f32; 3], &f, &d, &spec, Mode::Guarded).unwrap();
        assert_eq!(found.count, 0, "1e-5 > 10 * 1e-6 is false in f32");
        let (f, d) = ([1e-5f64], [1e-6f64]);
        let (found, _) = run(&mut [1.0f32], &f, &d, &spec, Mode::Guarded).unwrap();
        assert_eq!(found.count, 1, "and true in f64");
    }

    #[test]
    fn infinite_importances_and_weights() {
        let inf = f32::INFINITY;
        let (f, d) = ([inf, 1.0, inf, 1.0], [1.0, inf, 3e38, 0.0]);
        let mut w = [1.0f32, 1.0, 1.0, f32::NAN];
        let spec = RuleSpec {
            lam: 1e10,
            alpha: 1e-3,
            ..RuleSpec::default()
        };
        let (found, _) = run(&mut w, &f, &d, &spec, Mode::Guarded).unwrap();
        assert_eq!(w[..3], [0.0, 1.0, 1.0]);
        assert!(w[3].is_nan());
        assert_eq!(
            found,
            Selection {
                count: 3,
                changed: 1,
                zeroed: 1
            }
        );
    }

    #[test]
    fn refuses_numbers_out_of_range() {
        let d = RuleSpec::default();
        for spec in [
            RuleSpec { alpha: -1.0, ..d },
            RuleSpec {
                alpha: f64::NAN,
                ..d
            },
            RuleSpec {
                lam: f64::INFINITY,
                ..d
            },
            RuleSpec {
                exponent: -0.5,
                ..d
            },
            RuleSpec {
                max_factor: 0.1,
                min_factor: 0.2,
                ..d
            },
            RuleSpec {
                forget_count: 0.0,
                ..d
            },
        ] {
            assert!(
                matches!(spec.rule::<f32>(), Err(Error::Value { .. })),
                "{spec:?}"
            );
        }
    }

    /// Pseudo-random in [0, 1).
    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(seed | 1);
            (state >> 40) as f32 / (1u64 << 24) as f32
        };
        (0..n).map(|_| next()).collect()
    }

    /// Long enough for the log to fill up, with every weight selected.
    #[test]
    fn a_late_bad_importance_leaves_nothing_modified() {
        let n = 40 * ITEM + 100;
        let before: Vec<f64> = noise(n, 1).into_iter().map(f64::from).collect();
        let (mut f, d) = (noise(n, 2), vec![0.0f32; n]);
        let index = n - 7;
        for (bad, name) in [(f32::NAN, "NonFinite"), (-1.0, "Value")] {
            f[index] = bad;
            for mode in [Mode::Guarded, Mode::Recorded] {
                for threads in [1, 2, 5] {
                    par::set_num_threads(threads);
                    let mut w = before.clone();
                    let err = run(&mut w, &f, &d, &RuleSpec::default(), mode).unwrap_err();
                    assert!(format!("{err:?}").starts_with(name), "{err:?}");
                    assert!(err.to_string().contains(&index.to_string()), "{err}");
                    assert!(w == before);
                }
            }
        }
        f[index] = 1.0;
        let mut w = before.clone();
        let (found, _) = run(&mut w, &f, &d, &RuleSpec::default(), Mode::Guarded).unwrap();
        let (expected, counts) = oracle(&before, &f, &d, &RuleSpec::default());
        assert!(w == expected && found == counts);
    }

    fn case<W: Element, I: Real>(n: usize, seed: u64, spec: &RuleSpec) {
        let w: Vec<W> = noise(n, seed)
            .iter()
            .map(|v| W::store(W::Acc::from_f64(f64::from(*v) - 0.5)))
            .collect();
        let importance = |k| {
            noise(n, seed + k)
                .iter()
                .map(|v| I::from_f64(f64::from(*v)))
                .collect::<Vec<_>>()
        };
        let (f, d) = (importance(1), importance(2));
        let (expected, counts) = oracle(&w, &f, &d, spec);
        for_each_level(|level| {
            for threads in [1, 3] {
                par::set_num_threads(threads);
                let mut got = w.clone();
                let (found, patch) = run(&mut got, &f, &d, spec, Mode::Recorded).unwrap();
                assert!(got == expected, "{level:?}");
                assert_eq!(found, counts);
                let (wr, fr, dr) = (
                    Rows::matrix(&w, n),
                    Rows::matrix(&f, n),
                    Rows::matrix(&d, n),
                );
                assert_eq!(preview(&wr, &fr, &dr, spec).unwrap(), counts);
                assert_eq!(
                    selection_curve(&fr, &dr, &[spec.alpha], spec).unwrap(),
                    [counts.count]
                );
                patch
                    .unwrap()
                    .restore(RowsMut::matrix(&mut got, n))
                    .unwrap();
                assert!(got == w, "restored");
            }
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn equals_the_rule_on_every_level(
            n in prop_oneof![0usize..700, Just(3 * ITEM + 65)],
            seed in any::<u32>(),
            alpha in prop_oneof![Just(0.0), Just(0.5), Just(10.0), Just(200.0)],
            lam in prop_oneof![Just(1.0), Just(20.0), Just(0.0)],
            exponent in prop_oneof![Just(1.0), Just(0.5)],
            counts in prop_oneof![Just((1.0, 1.0)), Just((3.0, 700.0))],
        ) {
            let spec = RuleSpec {
                alpha, lam, exponent, min_factor: 0.01, forget_count: counts.0, retain_count: counts.1,
                ..RuleSpec::default()
            };
            let seed = u64::from(seed);
            case::<f32, f32>(n, seed, &spec);
            case::<bf16, f32>(n, seed, &spec);
            case::<f16, f64>(n, seed, &spec);
            case::<f64, f32>(n, seed, &spec);
        }

        #[test]
        fn strided_rows_as_contiguous_ones(rows in 1usize..40, width in 1usize..200, gap in 0usize..9, seed in any::<u32>()) {
            let n = rows * width;
            let (w, f, d) = (noise(n, 1), noise(n, u64::from(seed)), noise(n, 3));
            let spread = |x: &[f32]| {
                let mut out = vec![7.0; rows * (width + gap)];
                for (to, from) in out.chunks_mut(width + gap).zip(x.chunks(width)) {
                    to[..width].copy_from_slice(from);
                }
                out
            };
            let layout = || crate::view::RowLayout::new("x", &[rows, width], &[(width + gap) as isize, 1]).unwrap();
            let spec = RuleSpec { alpha: 2.0, ..RuleSpec::default() };
            let mut expected = w.clone();
            let (counts, _) = run(&mut expected, &f, &d, &spec, Mode::Guarded).unwrap();
            let (mut ws, fs, ds) = (spread(&w), spread(&f), spread(&d));
            let before = ws.clone();
            let view = RowsMut::new("w", &mut ws, layout()).unwrap();
            let (f, d) = (Rows::new("f", &fs, layout()).unwrap(), Rows::new("d", &ds, layout()).unwrap());
            let (found, patch) = dampen(view, &f, &d, &spec, Mode::Recorded).unwrap();
            prop_assert_eq!(found, counts);
            prop_assert_eq!(&ws, &spread(&expected));
            patch.unwrap().restore(RowsMut::new("w", &mut ws, layout()).unwrap()).unwrap();
            prop_assert_eq!(ws, before);
        }

        #[test]
        fn the_curve_counts_what_dampening_selects(n in 0usize..3000, seed in any::<u32>()) {
            let (f, d) = (noise(n, u64::from(seed)), noise(n, 5));
            let alphas = [30.0, 0.0, 1.0, 2.5];
            let (fr, dr) = (Rows::matrix(&f, n), Rows::matrix(&d, n));
            let curve = selection_curve(&fr, &dr, &alphas, &RuleSpec::default()).unwrap();
            for (alpha, count) in alphas.into_iter().zip(curve) {
                let spec = RuleSpec { alpha, ..RuleSpec::default() };
                let (found, _) = run(&mut vec![1f32; n], &f, &d, &spec, Mode::Guarded).unwrap();
                prop_assert_eq!(found.count, count);
            }
        }
    }

    #[test]
    fn the_curve_refuses_bad_importances() {
        let (f, d) = ([1.0f32, f32::NAN], [1.0f32, 1.0]);
        let (f, d) = (Rows::matrix(&f, 2), Rows::matrix(&d, 2));
        for alphas in [&[][..], &[1.0]] {
            let got = selection_curve(&f, &d, alphas, &RuleSpec::default());
            assert!(matches!(got, Err(Error::NonFinite { index: 1, .. })));
        }
    }
}
