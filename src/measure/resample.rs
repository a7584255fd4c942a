//! Bootstrap sums: what a sample drawn with replacement from n units adds up to, many times over.
//!
//! A resample of n units gives each a count, and the counts are multinomial. They are drawn down a binary tree: of m draws
//! from `2^b` places, Binomial(m, 1/2) fall into the lower half, which is the number of ones among m random bits; at 256
//! places every draw is one random byte; draws that fall past the last unit are drawn again. This is the distribution
//! itself, in whole numbers, with no sampler that approximates it. It is fast because a byte picks among values that stay
//! in the first cache, and because equal units are neighbours after sorting: a subtree of equal units is not entered, so a
//! resample of 0 and 1 costs the bits of the halving alone.
//!
//! Replicate r of a seed has a random stream of its own, so the number of threads changes nothing.

use crate::cancel::Cancel;
use crate::random::Random;
use crate::simd::{Kernel, dispatch};
use crate::{Error, Result, par};

/// Places that one random byte picks from.
const LEAF: usize = 256;
const LEAF_BITS: u32 = 8;
/// Replicates that are one piece of work.
const PIECE: usize = 16;

/// Units that are drawn from together: rows, or clusters of rows with their sums and sizes.
#[derive(Debug, Clone)]
pub struct Stratum {
    values: Vec<f64>,
    /// Empty where every weight is 1.
    weights: Vec<f64>,
    /// For each unit, one past the last unit that equals it.
    run_end: Vec<u32>,
}

impl Stratum {
    /// Units with their weights (1 each if none are given). The order does not matter.
    ///
    /// # Errors
    /// `Shape` if there are none, too many for 32 bits, or not one weight per unit; `NonFinite`.
    pub fn new(values: &[f64], weights: Option<&[f64]>) -> Result<Self> {
        let n = values.len();
        if n == 0 || u32::try_from(n).is_err() {
            return Err(Error::shape("values", "1 to 2^32 - 1 units", n));
        }
        if let Some(w) = weights
            && w.len() != n
        {
            return Err(Error::shape("weights", format!("{n} weights"), w.len()));
        }
        for (arg, column) in [("values", Some(values)), ("weights", weights)] {
            let bad = column.and_then(|c| c.iter().position(|v| !v.is_finite()));
            if let (Some(index), Some(column)) = (bad, column) {
                let found = column[index];
                return Err(Error::NonFinite { arg, index, found });
            }
        }
        let mut units: Vec<(f64, f64)> = match weights {
            Some(w) => values.iter().copied().zip(w.iter().copied()).collect(),
            None => values.iter().map(|v| (*v, 1.0)).collect(),
        };
        units.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let mut run_end = vec![n as u32; n];
        for i in (0..n - 1).rev() {
            run_end[i] = if units[i] == units[i + 1] {
                run_end[i + 1]
            } else {
                i as u32 + 1
            };
        }
        let plain = units.iter().all(|u| u.1 == 1.0);
        Ok(Self {
            values: units.iter().map(|u| u.0).collect(),
            weights: if plain {
                Vec::new()
            } else {
                units.iter().map(|u| u.1).collect()
            },
            run_end,
        })
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.values.len()
    }
}

/// Sums of values and of weights of one resample of a stratum.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Sums {
    pub value: f64,
    pub weight: f64,
}

/// For each replicate, the sums of each stratum: `resamples` runs of `strata.len()`.
///
/// # Errors
/// `Value` if there is no stratum, `Interrupted`.
pub fn bootstrap(
    strata: &[Stratum],
    resamples: usize,
    seed: u64,
    cancel: &Cancel,
) -> Result<Vec<Sums>> {
    if strata.is_empty() {
        return Err(Error::value("strata", "at least one", 0));
    }
    let units: usize = strata.iter().map(Stratum::units).sum();
    let bytes = units.saturating_mul(resamples);
    let pieces = par::try_map(bytes, par::ranges(resamples, PIECE), |replicates| {
        let mut out = Vec::with_capacity(replicates.len() * strata.len());
        for r in replicates {
            cancel.check()?;
            let mut random = Random::stream(seed, r as u64);
            for stratum in strata {
                let random = &mut random;
                out.push(if stratum.weights.is_empty() {
                    dispatch(Draw::<false> { stratum, random })
                } else {
                    dispatch(Draw::<true> { stratum, random })
                });
            }
            cancel.advance(1);
        }
        Ok(out)
    })?;
    Ok(pieces.concat())
}

/// One resample of a stratum.
struct Draw<'a, const WEIGHTED: bool> {
    stratum: &'a Stratum,
    random: &'a mut Random,
}

impl<const WEIGHTED: bool> Kernel for Draw<'_, WEIGHTED> {
    type Output = Sums;
    #[inline(always)]
    fn run(self) -> Sums {
        let Stratum {
            values,
            weights,
            run_end,
        } = self.stratum;
        let n = values.len();
        let depth = n.next_power_of_two().trailing_zeros();
        let mut sums = Sums::default();
        let mut wanted = n as u64;
        // Subtrees still to enter: first place, places as a power of two, draws.
        let mut stack = [(0usize, 0u32, 0u64); 40];
        while wanted > 0 {
            stack[0] = (0, depth, wanted);
            let mut top = 1;
            wanted = 0;
            while top > 0 {
                top -= 1;
                let (start, bits, draws) = stack[top];
                if draws == 0 {
                    continue;
                }
                if start >= n {
                    wanted += draws;
                    continue;
                }
                let end = start + (1 << bits);
                if end <= run_end[start] as usize {
                    sums.value += draws as f64 * values[start];
                    if WEIGHTED {
                        sums.weight += draws as f64 * weights[start];
                    }
                } else if bits <= LEAF_BITS {
                    let columns = (
                        &values[start..end.min(n)],
                        if WEIGHTED {
                            &weights[start..end.min(n)]
                        } else {
                            &[][..]
                        },
                    );
                    wanted += leaf::<WEIGHTED>(columns, 1 << bits, draws, self.random, &mut sums);
                } else {
                    let lower = ones(draws, self.random);
                    stack[top] = (start + (1 << (bits - 1)), bits - 1, draws - lower);
                    stack[top + 1] = (start, bits - 1, lower);
                    top += 2;
                }
            }
        }
        if !WEIGHTED {
            sums.weight = n as f64;
        }
        sums
    }
}

/// Ones among `draws` random bits.
#[inline(always)]
fn ones(draws: u64, random: &mut Random) -> u64 {
    let mut count = 0u64;
    for _ in 0..draws / 64 {
        count += u64::from(random.bits().count_ones());
    }
    let rest = draws % 64;
    if rest > 0 {
        count += u64::from((random.bits() & ((1 << rest) - 1)).count_ones());
    }
    count
}

/// Adds what `draws` random bytes pick of up to 256 units; returns how many picked a place without a unit.
#[inline(always)]
fn leaf<const WEIGHTED: bool>(
    (values, weights): (&[f64], &[f64]),
    places: usize,
    draws: u64,
    random: &mut Random,
    sums: &mut Sums,
) -> u64 {
    let (mut value, mut weight) = ([0.0; 8], [0.0; 8]);
    let mut missed = 0;
    if let Ok(values) = <&[f64; LEAF]>::try_from(values) {
        for _ in 0..draws / 8 {
            let bytes = random.bits().to_le_bytes();
            for (lane, byte) in bytes.into_iter().enumerate() {
                value[lane] += values[usize::from(byte)];
                if WEIGHTED {
                    weight[lane] += weights[usize::from(byte)];
                }
            }
        }
        let bytes = random.bits().to_le_bytes();
        for (lane, byte) in bytes.into_iter().enumerate().take((draws % 8) as usize) {
            value[lane] += values[usize::from(byte)];
            if WEIGHTED {
                weight[lane] += weights[usize::from(byte)];
            }
        }
    } else {
        let mut left = draws;
        while left > 0 {
            let bytes = random.bits().to_le_bytes();
            for (lane, byte) in bytes.into_iter().enumerate().take(left.min(8) as usize) {
                let place = usize::from(byte) & (places - 1);
                if let Some(v) = values.get(place) {
                    value[lane] += v;
                    if WEIGHTED {
                        weight[lane] += weights[place];
                    }
                } else {
                    missed += 1;
                }
            }
            left -= left.min(8);
        }
    }
    sums.value += value.iter().sum::<f64>();
    if WEIGHTED {
        sums.weight += weight.iter().sum::<f64>();
    }
    missed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_level;

    fn drawn(values: &[f64], weights: Option<&[f64]>, resamples: usize, seed: u64) -> Vec<Sums> {
        let stratum = Stratum::new(values, weights).unwrap();
        bootstrap(&[stratum], resamples, seed, &Cancel::new()).unwrap()
    }

    /// Mean and variance of a resample's sum are n·mean and n·variance; both within five standard errors.
    fn check_moments(values: &[f64], resamples: usize) {
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let moment = |k: i32| values.iter().map(|v| (v - mean).powi(k)).sum::<f64>() / n;
        let variance = moment(2) * n;
        let sums: Vec<f64> = drawn(values, None, resamples, 7)
            .iter()
            .map(|s| s.value)
            .collect();
        let b = resamples as f64;
        let found = sums.iter().sum::<f64>() / b;
        assert!(
            (found - n * mean).abs() <= 5.0 * (variance / b).sqrt() + 1e-9,
            "mean, n = {n}"
        );
        let spread = sums.iter().map(|s| (s - found).powi(2)).sum::<f64>() / (b - 1.0);
        // Excess kurtosis of the sum is (m4 / m2² - 3) / n.
        let excess = if moment(2) > 0.0 {
            (moment(4) / moment(2).powi(2) - 3.0) / n
        } else {
            0.0
        };
        let error = variance * ((2.0 + excess) / b).sqrt();
        assert!(
            (spread - variance).abs() <= 5.0 * error + 1e-9,
            "variance, n = {n}: {spread} {variance}"
        );
    }

    #[test]
    fn moments_of_resamples() {
        for n in [1usize, 2, 3, 7, 100, 255, 256, 257, 1000, 4096, 5000] {
            let many = if n > 1000 { 2000 } else { 5000 };
            let distinct: Vec<f64> = (0..n)
                .map(|i| ((i * 7919) % 10_007) as f64 / 97.0)
                .collect();
            check_moments(&distinct, many);
            let binary: Vec<f64> = (0..n).map(|i| f64::from(u8::from(i % 3 == 0))).collect();
            check_moments(&binary, many);
        }
    }

    /// Counts of single units: every unit is drawn equally often, two of them with the multinomial's covariance.
    #[test]
    fn every_unit_is_drawn_alike() {
        let (n, resamples) = (300, 4000);
        for pick in [0, 1, 127, 255, 256, 299] {
            let mut values = vec![0.0; n];
            for (i, v) in values.iter_mut().enumerate() {
                // Distinct, so that no run is skipped, and with the unit asked for in the integer part.
                *v = i as f64 * 1e-9 + f64::from(u8::from(i == pick)) * 1e3;
            }
            let sums = drawn(&values, None, resamples, 11);
            let mut seen = [0usize; 5];
            for s in &sums {
                seen[((s.value / 1e3) as usize).min(4)] += 1;
            }
            // Binomial(300, 1/300) is near Poisson(1).
            let p0 = (1.0 - 1.0 / n as f64).powi(n as i32);
            let p1 = p0 / (1.0 - 1.0 / n as f64);
            for (k, p) in [(0, p0), (1, p1)] {
                let error = (p * (1.0 - p) * resamples as f64).sqrt();
                assert!(
                    (seen[k] as f64 - p * resamples as f64).abs() < 5.0 * error,
                    "{pick} {seen:?}"
                );
            }
        }
    }

    #[test]
    fn same_bits_for_threads_levels_and_orders() {
        let values: Vec<f64> = (0..3000).map(|i| f64::from(i * i % 1009) / 7.0).collect();
        let weights: Vec<f64> = (0..3000).map(|i| f64::from(i % 5 + 1)).collect();
        let before = par::num_threads();
        let first = drawn(&values, Some(&weights), 100, 3);
        for threads in [1, 2, 5] {
            par::set_num_threads(threads);
            for_each_level(|_| assert_eq!(drawn(&values, Some(&weights), 100, 3), first));
        }
        par::set_num_threads(before);
        let back = |v: &[f64]| v.iter().rev().copied().collect::<Vec<_>>();
        assert_eq!(drawn(&back(&values), Some(&back(&weights)), 100, 3), first);
        assert_ne!(drawn(&values, Some(&weights), 100, 4), first);
        // A replicate does not depend on how many there are.
        assert_eq!(drawn(&values, Some(&weights), 37, 3), first[..37]);
    }

    #[test]
    fn weights_move_with_their_values_and_strata_stay_apart() {
        let values: Vec<f64> = (0..500).map(f64::from).collect();
        let double: Vec<f64> = values.iter().map(|v| 2.0 * v).collect();
        for s in drawn(&values, Some(&double), 50, 1) {
            assert!((s.weight - 2.0 * s.value).abs() < 1e-6);
        }
        let strata = [
            Stratum::new(&[1.0; 10], None).unwrap(),
            Stratum::new(&[0.0, 5.0], None).unwrap(),
        ];
        let found = bootstrap(&strata, 200, 0, &Cancel::new()).unwrap();
        assert!(found.chunks(2).all(|s| s[0]
            == Sums {
                value: 10.0,
                weight: 10.0
            }));
        let second: Vec<f64> = found.chunks(2).map(|s| s[1].value).collect();
        assert!([0.0, 5.0, 10.0].iter().all(|v| second.contains(v)));
    }

    #[test]
    fn refusals() {
        assert!(Stratum::new(&[], None).is_err());
        assert!(Stratum::new(&[1.0], Some(&[])).is_err());
        assert!(matches!(
            Stratum::new(&[1.0, f64::NAN], None),
            Err(Error::NonFinite { index: 1, .. })
        ));
        assert!(Stratum::new(&[1.0], Some(&[f64::INFINITY])).is_err());
        assert!(bootstrap(&[], 10, 0, &Cancel::new()).is_err());
        let cancelled = Cancel::new();
        cancelled.cancel();
        let one = [Stratum::new(&[1.0, 2.0], None).unwrap()];
        assert_eq!(bootstrap(&one, 10, 0, &cancelled), Err(Error::Interrupted));
    }
}
