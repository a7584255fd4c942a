//! Bandwidths from the data. Rules by moments (Scott, Silverman) leave no gradient in more than a few dimensions; these
//! look at the distances themselves.

use super::objective::{
    ClassSums, Exponentials, LeaveOneOut, Objective, Posterior, Query, RowReading, Scratch,
    Singleton, Spec, inverse_width,
};
use super::points::Points;
use super::tile::{Scalar, squared_distances};
use crate::cancel::Cancel;
use crate::simd::{Kernel, dispatch, sum_f64};
use crate::{Error, Result, par};
use std::ops::Range;

/// How the bandwidth is found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rule {
    /// The mean entropy of the leave-one-out kernel weights is log k.
    Perplexity(f64),
    /// The least leave-one-out negative log-likelihood of the labels.
    Nll,
    /// 0.27 times the median distance to the tenth neighbour.
    Knn,
}

/// Squared distances of at most this many pairs are looked at: 64 MiB in f32.
const PAIRS: usize = 1 << 24;
const TASK_ROWS: usize = 64;

/// Squared distances from some rows, evenly spread, to all; ∞ to themselves.
struct Sample<R> {
    squared: Vec<R>,
    labels: Vec<u32>,
    segments: Vec<Range<usize>>,
    n: usize,
}

/// The bandwidth that `rule` gives for `points` (sorted by class).
///
/// # Errors
/// `Value` if there are too few points, `Degenerate` if they coincide, `Interrupted`.
pub fn find<R: Scalar>(
    rule: Rule,
    points: &Points<R>,
    segments: &[Range<usize>],
    cancel: &Cancel,
) -> Result<f64> {
    let n = points.len();
    let needed = match rule {
        Rule::Perplexity(k) if k.is_nan() || k <= 1.0 => {
            return Err(Error::value("bandwidth", "a perplexity above 1", k));
        }
        Rule::Perplexity(k) => k + 1.0,
        Rule::Nll | Rule::Knn => 2.0,
    };
    if (n as f64) <= needed {
        return Err(Error::value(
            "bandwidth",
            format!("more than {needed} points for this rule"),
            n,
        ));
    }
    let sample = Sample::new(points, segments, cancel)?;
    let start = sample.neighbour_scale()?;
    match rule {
        Rule::Knn => Ok(start),
        Rule::Perplexity(k) => sample.perplexity(k, start, cancel),
        Rule::Nll => sample.likelihood(start, cancel),
    }
}

impl<R: Scalar> Sample<R> {
    fn new(points: &Points<R>, segments: &[Range<usize>], cancel: &Cancel) -> Result<Self> {
        let n = points.len();
        let m = (PAIRS / n).clamp(1, n);
        let rows: Vec<u32> = (0..m).map(|i| (i * n / m) as u32).collect();
        let mut squared = vec![R::ZERO; m * n];
        let tasks = squared
            .chunks_mut(TASK_ROWS * n)
            .zip(rows.chunks(TASK_ROWS))
            .collect();
        par::try_map(m * n * points.width(), tasks, |(out, rows)| {
            cancel.check()?;
            let zero = vec![0.0; points.width()];
            let queries = Points::build(rows.len(), &zero, |i, row| {
                let at = rows[i] as usize;
                row.copy_from_slice(points.block(at..at + 1).rows);
            });
            for tile in par::ranges(n, 256) {
                let block = points.block(tile.clone());
                squared_distances(
                    &mut out[tile.start..],
                    n,
                    &queries.block(0..rows.len()),
                    &block,
                );
            }
            for (i, row) in rows.iter().enumerate() {
                out[i * n + *row as usize] = R::INFINITY;
            }
            Ok(())
        })?;
        let class_of = |row: u32| segments.iter().position(|s| s.contains(&(row as usize)));
        Ok(Self {
            squared,
            labels: rows
                .iter()
                .filter_map(|r| class_of(*r))
                .map(|c| c as u32)
                .collect(),
            segments: segments.to_vec(),
            n,
        })
    }

    /// Mean over rows of `f(row, label, work)`, summed in order.
    fn mean(&self, f: impl Fn(&[R], u32, &mut [R]) -> f64 + Send + Sync) -> f64 {
        let rows = self
            .squared
            .chunks(TASK_ROWS * self.n)
            .zip(self.labels.chunks(TASK_ROWS));
        let parts = par::map(self.squared.len() * 8, rows.collect(), |(rows, labels)| {
            let mut work = vec![R::ZERO; self.n];
            let each = rows.chunks_exact(self.n).zip(labels);
            each.map(|(row, label)| f(row, *label, &mut work))
                .sum::<f64>()
        });
        parts.into_iter().sum::<f64>() / self.labels.len() as f64
    }

    /// 0.27 times the median distance to the tenth neighbour (the last one of fewer).
    fn neighbour_scale(&self) -> Result<f64> {
        let tenth = 9.min(self.n - 2);
        let rows = self.squared.chunks(TASK_ROWS * self.n).collect();
        let mut found: Vec<R> = par::map(self.squared.len() * 8, rows, |rows: &[R]| {
            let nth = |row: &[R]| {
                let mut row = row.to_vec();
                *row.select_nth_unstable_by(tenth, |a, b| a.to_f64().total_cmp(&b.to_f64()))
                    .1
            };
            rows.chunks_exact(self.n).map(nth).collect::<Vec<R>>()
        })
        .concat();
        let middle = found.len() / 2;
        let median = found
            .select_nth_unstable_by(middle, |a, b| a.to_f64().total_cmp(&b.to_f64()))
            .1
            .to_f64();
        // Of coinciding points the positive distances still give a scale to start from.
        let median = if median > 0.0 {
            median
        } else {
            let finite = (self.squared.iter())
                .map(|v| v.to_f64())
                .filter(|v| v.is_finite() && *v > 0.0);
            finite.fold(0.0, f64::max)
        };
        if median > 0.0 {
            Ok(0.27 * median.sqrt())
        } else {
            Err(Error::degenerate(
                "x",
                "all points coincide, no bandwidth can be found; pass a number",
            ))
        }
    }

    fn mean_entropy(&self, h: f64) -> f64 {
        self.mean(|row, _, work| {
            dispatch(Entropy {
                squared: row,
                width: inverse_width(h),
                work,
            })
        })
    }

    /// Bisection on log h: the entropy grows with h, from the log of the number of nearest ties to log (n - 1).
    fn perplexity(&self, k: f64, start: f64, cancel: &Cancel) -> Result<f64> {
        let target = k.ln();
        let (mut low, mut high) = (start.ln(), start.ln());
        for widen in [true, false] {
            let mut steps = 0;
            loop {
                cancel.check()?;
                let entropy = self.mean_entropy(if widen { high } else { low }.exp());
                match widen {
                    true if entropy < target => high += 1.0,
                    false if entropy > target => low -= 1.0,
                    _ => break,
                }
                steps += 1;
                if steps > 40 {
                    let reason =
                        format!("no bandwidth gives a perplexity of {k}: too many points coincide");
                    return Err(Error::degenerate("x", reason));
                }
            }
        }
        for _ in 0..40 {
            cancel.check()?;
            let mid = 0.5 * (low + high);
            if self.mean_entropy(mid.exp()) < target {
                low = mid
            } else {
                high = mid
            }
            if high - low < 1e-9 {
                break;
            }
        }
        Ok((0.5 * (low + high)).exp())
    }

    fn negative_log_likelihood(&self, h: f64) -> f64 {
        let classes = self.segments.len();
        let spec = Spec {
            classes,
            bandwidths: vec![h],
            objective: Objective::Nll,
            leave_one_out: LeaveOneOut::Corrected,
            singleton: Singleton::Exclude,
            priors: None,
        };
        let counts: Vec<usize> = self.segments.iter().map(ExactSizeIterator::len).collect();
        let posterior = Posterior::new(&spec, &counts);
        self.mean(|row, label, work| {
            let (mut least, mut sums, mut factors) = (
                vec![R::ZERO; classes],
                vec![0.0; classes],
                vec![0.0; classes],
            );
            for (c, segment) in self.segments.iter().enumerate() {
                (least[c], sums[c]) = dispatch(Exponentials {
                    squared: &row[segment.clone()],
                    width: inverse_width(h),
                    out: &mut work[segment.clone()],
                });
            }
            let query = Query {
                label: label as usize,
                own_class: Some(label as usize),
            };
            let r: RowReading = posterior.row(
                query,
                ClassSums {
                    least: &least,
                    sums: &sums,
                },
                1.0,
                &mut factors,
                None,
                &mut Scratch::new(classes),
            );
            if r.counted > 0.0 { r.nll } else { 0.0 }
        })
    }

    /// Golden section on log h around the neighbour scale.
    fn likelihood(&self, start: f64, cancel: &Cancel) -> Result<f64> {
        let ratio = 0.5 * (5f64.sqrt() - 1.0);
        let (mut a, mut b) = (start.ln() - 2.5, start.ln() + 2.5);
        let (mut c, mut d) = (b - ratio * (b - a), a + ratio * (b - a));
        let (mut fc, mut fd) = (
            self.negative_log_likelihood(c.exp()),
            self.negative_log_likelihood(d.exp()),
        );
        while b - a > 1e-4 {
            cancel.check()?;
            if fc < fd {
                (b, d, fd) = (d, c, fc);
                c = b - ratio * (b - a);
                fc = self.negative_log_likelihood(c.exp());
            } else {
                (a, c, fc) = (c, d, fd);
                d = a + ratio * (b - a);
                fd = self.negative_log_likelihood(d.exp());
            }
        }
        Ok((0.5 * (a + b)).exp())
    }
}

struct Entropy<'a, R> {
    squared: &'a [R],
    width: R,
    work: &'a mut [R],
}

impl<R: Scalar> Kernel for Entropy<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        let least = super::tile::least(self.squared);
        let total = super::tile::exponentials(self.squared, least, self.width, self.work);
        for (e, d) in self.work.iter_mut().zip(self.squared) {
            // The masked distance is infinite and its weight 0; their product must be 0.
            let gap = if *d < R::INFINITY {
                (*d - least) * self.width
            } else {
                R::ZERO
            };
            *e *= gap;
        }
        total.ln() + sum_f64(self.work) / total
    }
}
