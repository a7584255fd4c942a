//! Percentiles of the pooled ratios `I_f / I_d` of a whole model, exactly and without a sort.
//!
//! The bit patterns of floats from 0 to infinity are ordered as their values are. So a histogram over the leading 16
//! bits finds the bucket that holds a rank, and a histogram of the next 16 bits inside that bucket finds the value:
//! two passes over float32 importances, four over float64, whatever their number. Counts are integers; they come out
//! the same for any number of threads.
//!
//! The ratios are those that dampening compares with alpha: divided in the type of the importances, after their counts.
//! 0/0 and x/0 are left out, as in the published code of Adaptive Selective Synaptic Dampening (arXiv 2402.10098).

use super::dampen::{Check, Failure, check, cuts};
use crate::element::Real;
use crate::par;
use crate::simd::{Kernel, dispatch};
use crate::view::Rows;
use crate::{Error, Result};

/// Bits told apart in one pass.
const DIGIT: u32 = 16;
const BUCKETS: usize = 1 << DIGIT;
/// Ratios computed together.
const TILE: usize = 256;

/// A float as digits of its bit pattern.
pub trait Digits: Real {
    /// Passes needed.
    const LEVELS: u32;
    fn pattern(self) -> u64;
    fn from_pattern(p: u64) -> f64;
}

impl Digits for f32 {
    const LEVELS: u32 = u32::BITS / DIGIT;
    #[inline(always)]
    fn pattern(self) -> u64 {
        u64::from(self.to_bits())
    }
    fn from_pattern(p: u64) -> f64 {
        f64::from(f32::from_bits(p as u32))
    }
}

impl Digits for f64 {
    const LEVELS: u32 = u64::BITS / DIGIT;
    #[inline(always)]
    fn pattern(self) -> u64 {
        self.to_bits()
    }
    fn from_pattern(p: u64) -> f64 {
        f64::from_bits(p)
    }
}

/// A percentile of the finite ratios, and how many ratios there were of each kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Percentile {
    /// Interpolated linearly between the two neighbouring ratios, in float64; NaN if no ratio is finite.
    pub value: f64,
    pub finite: u64,
    /// `I_d = 0 < I_f`, or a quotient beyond the largest float.
    pub infinite: u64,
    /// `I_f = I_d = 0`.
    pub undefined: u64,
}

/// Adds one item's ratios to the histograms of one pass; `None` if an importance is bad.
struct Tally<'a, 'b, I> {
    f: &'a [I],
    d: &'a [I],
    counts: (I, I),
    /// What precedes the digit that this pass counts; one histogram for each.
    prefixes: &'a [u64],
    level: u32,
    histograms: &'b mut [Vec<u64>],
}

impl<I: Digits> Kernel for Tally<'_, '_, I> {
    type Output = bool;
    #[inline(always)]
    fn run(self) -> bool {
        let mut good = true;
        let shift = (I::LEVELS - 1 - self.level) * DIGIT;
        let mut ratios = [I::ZERO; TILE];
        for (f, d) in self.f.chunks(TILE).zip(self.d.chunks(TILE)) {
            if self.level == 0 {
                good &= (Check { f, d }).run();
            }
            for ((to, f), d) in ratios.iter_mut().zip(f).zip(d) {
                // Adding 0 makes +0 of -0, whose pattern would lie above all others.
                *to = (*f / self.counts.0 + I::ZERO) / (*d / self.counts.1 + I::ZERO);
            }
            let ratios = &ratios[..f.len()];
            if self.level == 0 {
                let histogram = &mut self.histograms[0];
                for r in ratios {
                    histogram[(r.pattern() >> shift) as usize % BUCKETS] += 1;
                }
                continue;
            }
            for (prefix, histogram) in self.prefixes.iter().zip(&mut *self.histograms) {
                for r in ratios {
                    let p = r.pattern() >> shift;
                    if p >> DIGIT == *prefix {
                        histogram[p as usize % BUCKETS] += 1;
                    }
                }
            }
        }
        good
    }
}

/// The bucket that holds the element of rank `rank`, and the rank inside it.
fn locate(histogram: &[u64], rank: u64) -> (u64, u64) {
    let mut left = rank;
    for (k, count) in histogram.iter().enumerate() {
        if left < *count {
            return (k as u64, left);
        }
        left -= count;
    }
    (BUCKETS as u64 - 1, 0)
}

/// The `q`-th percentile (0 to 100) of `forget / retain` over all pairs, each importance divided by its count first;
/// interpolated as NumPy's default does.
///
/// # Errors
/// `Value` for a `q` outside 0 to 100 or a bad count; as [`dampen`](super::dampen::dampen) for bad importances, with
/// the index of the pair.
pub fn percentile<I: Digits>(
    pairs: &[(Rows<'_, I>, Rows<'_, I>)],
    counts: (f64, f64),
    q: f64,
) -> std::result::Result<Percentile, Failure> {
    expect_numbers(counts, q).map_err(|error| (0, error))?;
    let mut items = Vec::new();
    for (k, (forget, retain)) in pairs.iter().enumerate() {
        let shape = (retain.rows(), retain.width());
        if (forget.rows(), forget.width()) != shape {
            check(forget, retain).map_err(|error| (k, error))?;
        }
        items.extend(cuts(shape).into_iter().map(|cut| (k, cut)));
    }
    let bytes = pairs
        .iter()
        .map(|(f, _)| f.rows() * f.width())
        .sum::<usize>()
        * 2
        * size_of::<I>();
    // A histogram for each group of items: few, since each takes half a megabyte; sums do not depend on their number.
    let groups = if bytes < par::SEQUENTIAL_BYTES {
        1
    } else {
        2 * par::num_threads()
    };
    let groups: Vec<_> = items.chunks(items.len().div_ceil(groups).max(1)).collect();
    let typed = (I::from_f64(counts.0), I::from_f64(counts.1));
    let pass = |level: u32, prefixes: &[u64]| {
        let found = par::map(bytes, groups.clone(), |items| {
            let mut histograms = vec![vec![0u64; BUCKETS]; prefixes.len()];
            let mut good = true;
            for (k, (row, cut)) in items {
                let (f, d) = &pairs[*k];
                let (f, d) = (&f.row(*row)[cut.clone()], &d.row(*row)[cut.clone()]);
                good &= dispatch(Tally {
                    f,
                    d,
                    counts: typed,
                    prefixes,
                    level,
                    histograms: &mut histograms,
                });
            }
            (good, histograms)
        });
        let mut sums = vec![vec![0u64; BUCKETS]; prefixes.len()];
        let mut good = true;
        for (fine, histograms) in found {
            good &= fine;
            for (sum, histogram) in sums.iter_mut().zip(histograms) {
                for (s, h) in sum.iter_mut().zip(histogram) {
                    *s += h;
                }
            }
        }
        (good, sums)
    };
    let (good, mut sums) = pass(0, &[0]);
    if !good {
        for (k, (forget, retain)) in pairs.iter().enumerate() {
            check(forget, retain).map_err(|error| (k, error))?;
        }
    }
    let top = sums.swap_remove(0);
    let infinity = (I::INFINITY.pattern() >> ((I::LEVELS - 1) * DIGIT)) as usize;
    let finite = top[..infinity].iter().sum();
    let mut out = Percentile {
        value: f64::NAN,
        finite,
        infinite: top[infinity],
        undefined: top[infinity + 1..].iter().sum(),
    };
    if finite == 0 {
        return Ok(out);
    }
    let at = (finite - 1) as f64 * (q / 100.0);
    let low = (at.floor() as u64).min(finite - 1);
    let high = (low + 1).min(finite - 1);
    // (pattern so far, rank among those that share it)
    let mut wanted = [low, high].map(|rank| locate(&top, rank));
    for level in 1..I::LEVELS {
        let mut prefixes = wanted.map(|(prefix, _)| prefix).to_vec();
        prefixes.dedup();
        let (_, sums) = pass(level, &prefixes);
        for (prefix, rank) in &mut wanted {
            let which = prefixes
                .iter()
                .position(|p| p == prefix)
                .unwrap_or_default();
            let (digit, rest) = locate(&sums[which], *rank);
            (*prefix, *rank) = (*prefix << DIGIT | digit, rest);
        }
    }
    let [a, b] = wanted.map(|(pattern, _)| I::from_pattern(pattern));
    let t = at - at.floor();
    out.value = if t < 0.5 {
        a + (b - a) * t
    } else {
        b - (b - a) * (1.0 - t)
    };
    Ok(out)
}

fn expect_numbers(counts: (f64, f64), q: f64) -> Result<()> {
    if !(0.0..=100.0).contains(&q) {
        return Err(Error::value("percentile", "a number from 0 to 100", q));
    }
    for (arg, v) in [("forget_count", counts.0), ("retain_count", counts.1)] {
        if !(v.is_finite() && v > 0.0) {
            return Err(Error::value(arg, "a finite number above 0", v));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_level;
    use proptest::prelude::*;

    /// Sorting, one ratio at a time.
    fn oracle<I: Digits>(f: &[I], d: &[I], counts: (f64, f64), q: f64) -> Percentile {
        let (cf, cd) = (I::from_f64(counts.0), I::from_f64(counts.1));
        let all: Vec<f64> = (f.iter().zip(d))
            .map(|(f, d)| (*f / cf / (*d / cd)).to_f64())
            .collect();
        let mut finite: Vec<f64> = all.iter().copied().filter(|r| r.is_finite()).collect();
        finite.sort_by(f64::total_cmp);
        let value = if finite.is_empty() {
            f64::NAN
        } else {
            let at = (finite.len() - 1) as f64 * (q / 100.0);
            let (a, t) = (at.floor() as usize, at - at.floor());
            let (a, b) = (finite[a], finite[(a + 1).min(finite.len() - 1)]);
            if t < 0.5 {
                a + (b - a) * t
            } else {
                b - (b - a) * (1.0 - t)
            }
        };
        Percentile {
            value,
            finite: finite.len() as u64,
            infinite: all.iter().filter(|r| r.is_infinite()).count() as u64,
            undefined: all.iter().filter(|r| r.is_nan()).count() as u64,
        }
    }

    fn agree<I: Digits>(raw: &[(u16, u16)], cut: usize, counts: (f64, f64), q: f64) {
        // Zeros, ties, subnormals and large values in every list.
        let value = |v: u16| {
            let v = i32::from(v);
            I::from_f64(f64::from(v % 12) * [1e-40, 0.125, 1.0, 1e20][v as usize / 12 % 4])
        };
        let f: Vec<I> = raw.iter().map(|v| value(v.0)).collect();
        let d: Vec<I> = raw.iter().map(|v| value(v.1)).collect();
        let pair = |r: std::ops::Range<usize>| {
            (
                Rows::matrix(&f[r.clone()], r.len().max(1)),
                Rows::matrix(&d[r.clone()], r.len().max(1)),
            )
        };
        let cut = cut.min(f.len());
        let pairs = [pair(0..cut), pair(cut..f.len())];
        let expected = oracle(&f, &d, counts, q);
        for_each_level(|_| {
            let found = percentile(&pairs, counts, q).unwrap();
            let same =
                found.value == expected.value || (found.value.is_nan() && expected.value.is_nan());
            assert!(same, "{found:?} {expected:?}");
            assert_eq!(
                (found.finite, found.infinite, found.undefined),
                (expected.finite, expected.infinite, expected.undefined)
            );
        });
    }

    proptest! {
        #[test]
        fn equals_a_sort(
            raw in proptest::collection::vec(any::<(u16, u16)>(), 0..700),
            cut in 0usize..700,
            scaled in any::<bool>(),
            q in prop_oneof![0.0..100.0, Just(0.0), Just(50.0), Just(100.0)],
        ) {
            let counts = if scaled { (7.0, 3.0) } else { (1.0, 1.0) };
            agree::<f32>(&raw, cut, counts, q);
            agree::<f64>(&raw, cut, counts, q);
        }
    }

    #[test]
    fn refuses_what_cannot_be() {
        let (f, bad) = ([1.0f32, 2.0], [1.0f32, f32::NAN]);
        let ok = (Rows::matrix(&f, 2), Rows::matrix(&f, 2));
        let nan = (Rows::matrix(&f, 2), Rows::matrix(&bad, 2));
        let found = percentile(&[ok.clone(), nan], (1.0, 1.0), 50.0);
        assert!(matches!(found, Err((1, Error::NonFinite { index: 1, .. }))));
        assert!(matches!(
            percentile(std::slice::from_ref(&ok), (1.0, 1.0), 101.0),
            Err((0, Error::Value { .. }))
        ));
        assert!(matches!(
            percentile(&[ok], (0.0, 1.0), 50.0),
            Err((0, Error::Value { .. }))
        ));
    }
}
