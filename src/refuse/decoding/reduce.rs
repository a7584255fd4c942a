//! Reductions of a row: log-sum-exp, the margin of a group of tokens over all others, and the gap between maxima.
//!
//! A margin is `LSE_group − LSE_rest`. The rest is summed with the group's entries left out, never by subtracting
//! their exponentials from the whole, which would cancel where the group holds nearly all the probability.

use super::{is_poison, no_token_left, poison_error};
use crate::element::{Element, Real};
use crate::simd::{self, Kernel, dispatch, exp, exp2_rough};
use crate::view::Rows;
use crate::{Error, Result, par};
use std::ops::Range;

/// Elements per step of a scan; a multiple of every lane count.
const BLOCK: usize = 1024;
/// Accumulators of a sum of exponentials.
const LANES: usize = 16;

/// `sum · e^max`, a sum of exponentials that cannot overflow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogSum {
    max: f64,
    sum: f64,
}

impl LogSum {
    /// The empty sum.
    pub const EMPTY: Self = Self {
        max: f64::NEG_INFINITY,
        sum: 0.0,
    };

    /// `e^x` alone.
    pub fn of(x: f64) -> Self {
        if x == f64::NEG_INFINITY {
            return Self::EMPTY;
        }
        Self { max: x, sum: 1.0 }
    }

    /// The sum of both.
    #[inline(always)]
    pub fn plus(self, other: Self) -> Self {
        let (high, low) = if other.max > self.max {
            (other, self)
        } else {
            (self, other)
        };
        if low.sum == 0.0 {
            return high;
        }
        Self {
            max: high.max,
            sum: high.sum + low.sum * exp(low.max - high.max),
        }
    }

    /// The logarithm; −∞ for the empty sum.
    pub fn ln(self) -> f64 {
        if self.sum == 0.0 {
            f64::NEG_INFINITY
        } else {
            self.max + self.sum.ln()
        }
    }
}

impl FromIterator<f64> for LogSum {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        values
            .into_iter()
            .fold(Self::EMPTY, |sum, x| sum.plus(Self::of(x)))
    }
}

/// The largest value; −∞ of none.
pub fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

/// The blocks of a row, the `excluded` entries (ascending) replaced by −∞. Not an iterator over closures: those would be
/// compiled for the baseline only and called from the dispatched kernel.
struct Blocks<'a, T> {
    row: &'a [T],
    excluded: &'a [u32],
    start: usize,
    end: usize,
    scratch: [T; BLOCK],
}

impl<'a, T: Element> Blocks<'a, T> {
    #[inline(always)]
    fn new(row: &'a [T], excluded: &'a [u32]) -> Self {
        Self::between(row, excluded, 0..row.len().div_ceil(BLOCK))
    }

    /// Some of the blocks.
    #[inline(always)]
    fn between(row: &'a [T], excluded: &'a [u32], blocks: Range<usize>) -> Self {
        let start = blocks.start * BLOCK;
        let before = excluded.partition_point(|id| (*id as usize) < start);
        Self {
            row,
            excluded: &excluded[before..],
            start,
            end: (blocks.end * BLOCK).min(row.len()),
            scratch: [T::default(); BLOCK],
        }
    }

    #[inline(always)]
    fn next(&mut self) -> Option<&[T]> {
        let (start, end) = (self.start, (self.start + BLOCK).min(self.end));
        if start == end {
            return None;
        }
        self.start = end;
        let block = &self.row[start..end];
        let mut here = 0;
        while here < self.excluded.len() && (self.excluded[here] as usize) < end {
            here += 1;
        }
        if here == 0 {
            return Some(block);
        }
        let copy = &mut self.scratch[..block.len()];
        copy.copy_from_slice(block);
        for id in &self.excluded[..here] {
            copy[*id as usize - start] = T::store(-T::Acc::INFINITY);
        }
        self.excluded = &self.excluded[here..];
        Some(copy)
    }
}

/// The largest entry, and whether any is NaN: the largest and the smallest key tell both in one pass.
#[inline(always)]
fn peak<T: Element>(block: &[T]) -> (T::Acc, bool) {
    let infinity = T::store(T::Acc::INFINITY).key();
    let negative = T::store(-T::Acc::INFINITY).key();
    let (mut high, mut low) = ([negative; simd::LANES], [infinity; simd::LANES]);
    let (chunks, rest) = block.as_chunks::<{ simd::LANES }>();
    for chunk in chunks {
        simd::prefetch(chunk, 2 * BLOCK, simd::LANES);
        for i in 0..simd::LANES {
            let key = chunk[i].key();
            high[i] = key.max(high[i]);
            low[i] = key.min(low[i]);
        }
    }
    if let Some(first) = rest.first() {
        // As a whole chunk: lanes reached by a number known at run time only would live in memory all along.
        let mut chunk = [*first; simd::LANES];
        chunk[..rest.len()].copy_from_slice(rest);
        for i in 0..simd::LANES {
            let key = chunk[i].key();
            high[i] = key.max(high[i]);
            low[i] = key.min(low[i]);
        }
    }
    // In halves: a fold over the lanes would take longer than the lanes took to fill.
    let mut width = simd::LANES / 2;
    while width > 0 {
        for i in 0..width {
            high[i] = high[i].max(high[i + width]);
            low[i] = low[i].min(low[i + width]);
        }
        width /= 2;
    }
    let (high, low) = (high[0], low[0]);
    (T::from_key(high).load(), high > infinity || low < negative)
}

/// `Σ e^{(x − max) · inverse_temperature}`. In two loops, since only one without accumulators is sure to vectorise.
#[inline(always)]
fn exp_sum<T: Element>(block: &[T], max: f64, inverse_temperature: f64) -> f64 {
    let mut terms = [0.0; BLOCK];
    let terms = &mut terms[..block.len()];
    for (term, v) in terms.iter_mut().zip(block) {
        *term = exp((v.load().to_f64() - max) * inverse_temperature);
    }
    let mut acc = [0.0; LANES];
    let (chunks, rest) = terms.as_chunks::<LANES>();
    for chunk in chunks {
        for (a, term) in acc.iter_mut().zip(chunk) {
            *a += term;
        }
    }
    for (a, term) in acc.iter_mut().zip(rest) {
        *a += term;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            acc[i] += acc[i + width];
        }
        width /= 2;
    }
    acc[0]
}

/// Sum of the exponentials of a row without the excluded entries, at a temperature; `None` if they hold a
/// NaN or +∞.
pub struct SumExp<'a, T> {
    pub row: &'a [T],
    pub excluded: &'a [u32],
    pub inverse_temperature: f64,
}

impl<T: Element> Kernel for SumExp<'_, T> {
    type Output = Option<LogSum>;
    #[inline(always)]
    fn run(self) -> Option<LogSum> {
        let Self {
            row,
            excluded,
            inverse_temperature,
        } = self;
        let mut total = LogSum::EMPTY;
        let mut blocks = Blocks::new(row, excluded);
        while let Some(block) = blocks.next() {
            let (max, nan) = peak(block);
            if nan || max == T::Acc::INFINITY {
                return None;
            }
            if max == -T::Acc::INFINITY {
                continue;
            }
            let max = max.to_f64();
            total = total.plus(LogSum {
                max: max * inverse_temperature,
                sum: exp_sum(block, max, inverse_temperature),
            });
        }
        Some(total)
    }
}

/// Largest entry of each block of a row without the excluded ones; `None` if the row holds a NaN or +∞ among the rest.
pub struct Peaks<'a, T> {
    pub row: &'a [T],
    pub excluded: &'a [u32],
}

impl<T: Element> Kernel for Peaks<'_, T> {
    type Output = Option<Vec<f64>>;
    #[inline(always)]
    fn run(self) -> Option<Vec<f64>> {
        let mut found = Vec::with_capacity(self.row.len().div_ceil(BLOCK));
        let mut sound = true;
        let mut blocks = Blocks::new(self.row, self.excluded);
        while let Some(block) = blocks.next() {
            let (max, nan) = peak(block);
            sound &= !nan && max < T::Acc::INFINITY;
            found.push(max.to_f64());
        }
        sound.then_some(found)
    }
}

/// Bounds of `Σ e^{(z − peak)/T}` over a row that get closer as more of it is read: what was read is summed in f32 to
/// within [`ROUGH`] of itself, the rest is bounded by the largest entries of its blocks.
pub struct RoughSum<'a, T> {
    row: &'a [T],
    excluded: &'a [u32],
    peak: f64,
    inverse_temperature: f64,
    read: f64,
    blocks: usize,
    /// Bound of what is left from each block on.
    left: Vec<f64>,
}

/// Largest relative error of a [`RoughSum`] read to the end.
pub const ROUGH: f64 = 2e-4;

impl<'a, T: Element> RoughSum<'a, T> {
    /// Nothing read yet, of a row whose blocks have these largest entries.
    pub fn new(row: &'a [T], excluded: &'a [u32], peaks: &[f64], inverse_temperature: f64) -> Self {
        let peak = largest(peaks);
        let mut left = vec![0.0; peaks.len() + 1];
        for (b, block) in row.chunks(BLOCK).enumerate().rev() {
            let most = ((peaks[b] - peak) * inverse_temperature).exp();
            left[b] = left[b + 1] + block.len() as f64 * most;
        }
        Self {
            row,
            excluded,
            peak,
            inverse_temperature,
            read: 0.0,
            blocks: 0,
            left,
        }
    }

    /// Reads as much again as was read before; false once there is no more, or where f32 cannot hold the temperature.
    pub fn read_on(&mut self) -> bool {
        let scale = (self.inverse_temperature * std::f64::consts::LOG2_E) as f32;
        let none_left = self.blocks + 1 >= self.left.len();
        if none_left || self.peak == f64::NEG_INFINITY || !scale.is_finite() {
            return false;
        }
        let end = (2 * self.blocks).max(4).min(self.left.len() - 1);
        self.read += dispatch(RoughBlocks {
            row: self.row,
            excluded: self.excluded,
            blocks: self.blocks..end,
            peak: self.peak,
            scale,
        });
        self.blocks = end;
        true
    }

    /// The least and the most that the sum over the row can be.
    pub fn bounds(&self) -> (LogSum, LogSum) {
        let max = self.peak * self.inverse_temperature;
        let of = |sum: f64| LogSum { max, sum };
        let most = self.read * (1.0 + ROUGH) + self.left[self.blocks];
        (of(self.read * (1.0 - ROUGH)), of(most))
    }
}

struct RoughBlocks<'a, T> {
    row: &'a [T],
    excluded: &'a [u32],
    blocks: Range<usize>,
    peak: f64,
    /// From differences of logits to exponents of 2.
    scale: f32,
}

impl<T: Element> Kernel for RoughBlocks<'_, T> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        let peak = T::Acc::from_f64(self.peak);
        let scale = self.scale;
        let mut total = 0.0;
        let mut blocks = Blocks::between(self.row, self.excluded, self.blocks);
        while let Some(block) = blocks.next() {
            let mut acc = [0.0; simd::LANES];
            let (chunks, rest) = block.as_chunks::<{ simd::LANES }>();
            for chunk in chunks {
                for i in 0..simd::LANES {
                    acc[i] += exp2_rough((chunk[i].load() - peak).to_f64() as f32 * scale);
                }
            }
            let mut terms = [0.0; simd::LANES];
            for (term, v) in terms.iter_mut().zip(rest) {
                *term = exp2_rough((v.load() - peak).to_f64() as f32 * scale);
            }
            for i in 0..simd::LANES {
                acc[i] += terms[i];
            }
            total += acc.iter().map(|a| f64::from(*a)).sum::<f64>();
        }
        total
    }
}

/// Groups of token ids whose probability is compared with all others'.
#[derive(Debug, Clone)]
pub struct Groups {
    /// All tokens of all groups, ascending.
    union: Vec<u32>,
    /// Per group the positions of its tokens in `union`, ascending.
    members: Vec<Vec<u32>>,
}

impl Groups {
    /// Groups over a vocabulary of `width`; a token may be in several groups but once in each.
    ///
    /// # Errors
    /// `Value` for no group, an empty group, an id outside the vocabulary, an id twice in a group.
    pub fn new(arg: &'static str, groups: &[Vec<i64>]) -> Result<Self> {
        if groups.is_empty() {
            return Err(Error::value(arg, "at least one group of token ids", "none"));
        }
        let mut union = Vec::new();
        for (i, group) in groups.iter().enumerate() {
            if group.is_empty() {
                return Err(Error::value(
                    arg,
                    "at least one token id in each group",
                    format!("none in group {i}"),
                ));
            }
            for &id in group {
                union.push(super::token(arg, id, u32::MAX as usize)?);
            }
        }
        union.sort_unstable();
        union.dedup();
        let members = groups
            .iter()
            .map(|group| {
                let mut at: Vec<u32> = group
                    .iter()
                    .map(|id| union.partition_point(|u| i64::from(*u) < *id) as u32)
                    .collect();
                at.sort_unstable();
                match at.windows(2).find(|w| w[0] == w[1]) {
                    Some(w) => Err(Error::value(
                        arg,
                        "each token id once in a group",
                        format!("{} twice", union[w[0] as usize]),
                    )),
                    None => Ok(at),
                }
            })
            .collect::<Result<_>>()?;
        Ok(Self { union, members })
    }

    pub fn len(&self) -> usize {
        self.members.len()
    }

    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// All tokens of all groups, ascending.
    pub fn union(&self) -> &[u32] {
        &self.union
    }

    /// Positions in [`Groups::union`] of group `k`'s tokens.
    pub fn members(&self, k: usize) -> &[u32] {
        &self.members[k]
    }

    /// Checks the ids against the vocabulary of the logits at hand.
    ///
    /// # Errors
    /// `Value` if an id is `width` or more.
    pub fn expect_width(&self, arg: &'static str, width: usize) -> Result<()> {
        match self.union.last() {
            Some(&id) => super::token(arg, i64::from(id), width).map(drop),
            None => Ok(()),
        }
    }

    /// Splits values given in `union`'s order into those of group `k` and the others.
    pub fn split(&self, k: usize, values: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let mut own = Vec::with_capacity(self.members[k].len());
        let mut others = Vec::with_capacity(values.len());
        let mut members = self.members[k].iter().peekable();
        for (at, v) in values.iter().enumerate() {
            if members.next_if(|m| **m as usize == at).is_some() {
                own.push(*v);
            } else {
                others.push(*v);
            }
        }
        (own, others)
    }
}

/// Finds what [`Peaks`] or [`SumExp`] found unsound.
pub fn first_poison<T: Element>(i: usize, row: &[T]) -> Error {
    match row.iter().position(|v| is_poison(*v)) {
        Some(at) => poison_error(i, row.len(), at, row[at]),
        None => no_token_left(i),
    }
}

fn by_row<T: Element, R: Send>(
    logits: &Rows<'_, T>,
    f: impl Fn(usize, &[T]) -> Result<R> + Sync + Send,
) -> Result<Vec<R>> {
    let bytes = logits.rows() * logits.width() * size_of::<T>();
    par::try_map(bytes, (0..logits.rows()).collect(), |i| f(i, logits.row(i)))
}

pub(super) fn inverse(temperature: f64) -> Result<f64> {
    if temperature.is_finite() && temperature > 0.0 && (1.0 / temperature).is_finite() {
        return Ok(1.0 / temperature);
    }
    Err(Error::value(
        "temperature",
        "a positive finite number",
        temperature,
    ))
}

/// `ln Σ_j e^{z_j / T}` of every row.
///
/// # Errors
/// `NonFinite` for NaN or +∞, `Degenerate` for a row of −∞ only, `Value` for a bad temperature.
pub fn row_lse<T: Element>(logits: &Rows<'_, T>, temperature: f64) -> Result<Vec<f64>> {
    let inverse_temperature = inverse(temperature)?;
    by_row(logits, |i, row| {
        let sum = dispatch(SumExp {
            row,
            excluded: &[],
            inverse_temperature,
        });
        match sum {
            Some(sum) if sum != LogSum::EMPTY => Ok(sum.ln()),
            _ => Err(first_poison(i, row)),
        }
    })
}

/// The entries of a row at `ids`, in f64.
///
/// # Errors
/// `NonFinite` for NaN or +∞.
pub fn gather<T: Element>(i: usize, row: &[T], ids: &[u32]) -> Result<Vec<f64>> {
    ids.iter()
        .map(|id| match row[*id as usize] {
            v if is_poison(v) => Err(poison_error(i, row.len(), *id as usize, v)),
            v => Ok(v.load().to_f64()),
        })
        .collect()
}

/// Margin of every group in every row, `LSE_group(z/T) − LSE_rest(z/T)`, so that the group's probability is `σ(margin)`.
/// Rows × groups; +∞ where no other token is left, −∞ where the group has none.
///
/// # Errors
/// As [`row_lse`], and `Value` for an id outside the vocabulary.
pub fn margins<T: Element>(
    logits: &Rows<'_, T>,
    groups: &Groups,
    temperature: f64,
) -> Result<Vec<f64>> {
    let inverse_temperature = inverse(temperature)?;
    groups.expect_width("groups", logits.width())?;
    let rows = by_row(logits, |i, row| {
        let mut held = gather(i, row, groups.union())?;
        held.iter_mut().for_each(|z| *z *= inverse_temperature);
        let rest = dispatch(SumExp {
            row,
            excluded: groups.union(),
            inverse_temperature,
        })
        .ok_or_else(|| first_poison(i, row))?;
        let margin = |k| {
            let (own, others) = groups.split(k, &held);
            let others: LogSum = others.into_iter().collect();
            let own: LogSum = own.into_iter().collect();
            (own.ln(), rest.plus(others).ln())
        };
        if rest == LogSum::EMPTY && held.iter().all(|z| *z == f64::NEG_INFINITY) {
            return Err(no_token_left(i));
        }
        Ok((0..groups.len())
            .map(margin)
            .map(|(own, others)| own - others)
            .collect::<Vec<_>>())
    })?;
    Ok(rows.concat())
}

/// Gap of every group in every row: its largest logit minus the largest of all others. Rows × groups.
///
/// # Errors
/// As [`margins`].
pub fn max_gaps<T: Element>(logits: &Rows<'_, T>, groups: &Groups) -> Result<Vec<f64>> {
    groups.expect_width("groups", logits.width())?;
    let rows = by_row(logits, |i, row| {
        let held = gather(i, row, groups.union())?;
        let peaks = dispatch(Peaks {
            row,
            excluded: groups.union(),
        })
        .ok_or_else(|| first_poison(i, row))?;
        let rest = largest(&peaks);
        if rest.max(largest(&held)) == f64::NEG_INFINITY {
            return Err(no_token_left(i));
        }
        Ok((0..groups.len())
            .map(|k| {
                let (own, others) = groups.split(k, &held);
                largest(&own) - rest.max(largest(&others))
            })
            .collect::<Vec<_>>())
    })?;
    Ok(rows.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_level;
    use half::{bf16, f16};
    use proptest::prelude::*;

    const NEG: f64 = f64::NEG_INFINITY;

    fn lse(z: &[f64]) -> Result<f64> {
        row_lse(&Rows::matrix(z, z.len()), 1.0).map(|v| v[0])
    }

    fn close(got: f64, want: f64) {
        assert!(
            (got - want).abs() <= 4e-15 * want.abs().max(1.0),
            "{got} {want}"
        );
    }

    fn margin(z: &[f64], groups: &[Vec<i64>], temperature: f64) -> Vec<f64> {
        let groups = Groups::new("groups", groups).unwrap();
        margins(&Rows::matrix(z, z.len()), &groups, temperature).unwrap()
    }

    #[test]
    fn reference_log_sum_exp() {
        close(lse(&[NEG, 0.0, 1.0, NEG, 2.0]).unwrap(), 2.4076059644443806);
        close(lse(&[1000.0, 1000.0, -1000.0]).unwrap(), 1000.6931471805599);
        close(lse(&[0.1; 10]).unwrap(), 2.402585092994046);
        assert!(matches!(lse(&[NEG; 4]), Err(Error::Degenerate { .. })));
        assert!(matches!(
            lse(&[0.0, f64::NAN]),
            Err(Error::NonFinite { index: 1, .. })
        ));
        assert!(matches!(
            lse(&[f64::INFINITY, 0.0]),
            Err(Error::NonFinite { index: 0, .. })
        ));
    }

    #[test]
    fn reference_margins() {
        let a = [2.0, 1.0, -0.5, 0.25, -1.0];
        close(margin(&a, &[vec![2]], 1.0)[0], -2.9646395513879704);
        close(margin(&a, &[vec![2]], 1.5)[0], -2.3396905378711756);
        let b = [1.5, 0.5, -0.25, 0.75, -1.0, 0.0];
        let got = margin(&b, &[vec![2, 5], vec![2], vec![5]], 1.0);
        close(got[0], -1.5775990884003144);
        close(1.0 / (1.0 + (-got[1]).exp()), 0.07492726534710589);
        close(1.0 / (1.0 + (-got[2]).exp()), 0.09620851310859062);
        let c = [2.0, 1.9, 1.8, 1.7, 1.75, 2.05];
        close(margin(&c, &[vec![5]], 1.0)[0], -1.3953146790504234);
        let groups = Groups::new("groups", &[vec![5]]).unwrap();
        close(
            max_gaps(&Rows::matrix(&c, 6), &groups).unwrap()[0],
            0.04999999999999982,
        );
    }

    #[test]
    fn the_rough_sum_holds_the_exact_one_at_every_step() {
        for spread in [0.1f32, 3.0, 30.0, 500.0] {
            for inverse_temperature in [0.05, 1.0, 20.0] {
                let value = |i: usize| (i as f32 * 0.731).sin() * spread;
                let row: Vec<bf16> = (0..50_001).map(|i| bf16::from_f32(value(i))).collect();
                let (row, excluded): (&[bf16], &[u32]) = (&row, &[17, 4999, 50_000]);
                for_each_level(|_| {
                    let exact = dispatch(SumExp {
                        row,
                        excluded,
                        inverse_temperature,
                    });
                    let exact = exact.unwrap().ln();
                    let peaks = dispatch(Peaks { row, excluded }).unwrap();
                    let mut sum = RoughSum::new(row, excluded, &peaks, inverse_temperature);
                    let mut bounds = sum.bounds();
                    while sum.read_on() {
                        bounds = sum.bounds();
                        assert!(bounds.0.ln() <= exact && exact <= bounds.1.ln());
                    }
                    assert!(bounds.1.ln() - bounds.0.ln() <= 2.1 * ROUGH);
                });
            }
        }
    }

    #[test]
    fn margins_at_the_ends() {
        assert_eq!(margin(&[NEG, 3.0, NEG], &[vec![1]], 1.0), [f64::INFINITY]);
        assert_eq!(margin(&[NEG, 3.0, 1.0], &[vec![0]], 1.0), [NEG]);
        assert_eq!(margin(&[2.0, 3.0], &[vec![0, 1]], 1.0), [f64::INFINITY]);
        // Nearly certain: subtracting exponentials would give 0 for the rest.
        close(
            margin(&[60.0, 0.0, 0.0], &[vec![0]], 1.0)[0],
            60.0 - 2f64.ln(),
        );
    }

    #[test]
    fn groups_are_checked() {
        for bad in [
            vec![],
            vec![vec![]],
            vec![vec![1, 1]],
            vec![vec![-1]],
            vec![vec![1 << 40]],
        ] {
            assert!(Groups::new("groups", &bad).is_err(), "{bad:?}");
        }
        let wide = Groups::new("groups", &[vec![3]]).unwrap();
        assert!(margins(&Rows::matrix(&[0.0; 3], 3), &wide, 1.0).is_err());
        for temperature in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-320] {
            assert!(row_lse(&Rows::matrix(&[0.0; 3], 3), temperature).is_err());
        }
    }

    fn check<T: Element>(z: &[f32], ids: &[i64]) {
        let z: Vec<T> = z
            .iter()
            .map(|v| T::store(T::Acc::from_f64(f64::from(*v))))
            .collect();
        let groups = Groups::new("groups", &[ids.to_vec()]).unwrap();
        let rows = Rows::matrix(&z, z.len());
        let sum = |keep: &dyn Fn(i64) -> bool| {
            let kept = z.iter().enumerate().filter(|(i, _)| keep(*i as i64));
            let kept: Vec<f64> = kept.map(|(_, v)| v.load().to_f64()).collect();
            let max = kept.iter().copied().fold(NEG, f64::max);
            max + kept.iter().map(|v| (v - max).exp()).sum::<f64>().ln()
        };
        let want = sum(&|i| ids.contains(&i)) - sum(&|i| !ids.contains(&i));
        let mut seen = None;
        for_each_level(|_| {
            let got = margins(&rows, &groups, 1.0).unwrap()[0];
            assert!(
                (got - want).abs() < 1e-12 * want.abs().max(1.0),
                "{got} {want}"
            );
            let bits = (got.to_bits(), row_lse(&rows, 0.7).unwrap()[0].to_bits());
            assert_eq!(*seen.get_or_insert(bits), bits);
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn margins_equal_the_definition_on_every_level(
            z in prop::collection::vec(-40f32..40.0, 6..3000),
            at in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
        ) {
            let mut ids: Vec<i64> = at.iter().map(|i| i.index(z.len()) as i64).collect();
            ids.sort_unstable();
            ids.dedup();
            check::<f64>(&z, &ids);
            check::<f32>(&z, &ids);
            check::<f16>(&z, &ids);
            check::<bf16>(&z, &ids);
        }
    }
}
