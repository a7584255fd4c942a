//! The objective over one set of points that are queries and centres at once, its own kernel left out or not.
//!
//! Distances are symmetric, so blocks of rows meet in pairs. A first round of meetings collects each row's class sums,
//! a second the gradient `Σ_j (W_ij + W_ji) (x_j - x_i)` of both blocks: 4 n² d operations where three separate
//! products take 6. Blocks meet as in a round-robin tournament, each in one pair at a time, so every block's state has
//! one owner and is updated in an order that the number of threads does not change.

use super::Tick;
use super::cross::{Less, Outcome};
use super::objective::{
    ClassSums, LeaveOneOut, Posterior, Query, RowReading, Scratch, Spec, inverse_width,
};
use super::points::Points;
use super::tile::{Scalar, exponentials, least, squared_distances, transpose, weight};
use crate::linalg::gemm::{self, Mat, Out};
use crate::simd::{Kernel, dispatch, sum_f64};
use crate::{Result, par};
use std::ops::Range;

/// What to compute beside the readings.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    pub gradient: bool,
    pub posterior: bool,
}

/// A block of rows and what has been summed for it. Arrays are class-major: entry of class c and row i at
/// `c * rows + i`; where they differ by bandwidth, the bandwidth comes first.
struct State<R> {
    range: Range<usize>,
    /// Each class's part of the block, relative to its first row.
    segments: Vec<Range<usize>>,
    /// Least squared distance to a class so far.
    least: Vec<R>,
    /// `Σ exp((least - d²) / 2h²)`.
    sums: Vec<f64>,
    factors: Vec<R>,
    gradient: Vec<R>,
    row_sums: Vec<f64>,
}

struct Engine<'a, R> {
    points: &'a Points<R>,
    labels: Vec<u32>,
    posterior: Posterior<'a>,
    widths: Vec<R>,
    rows: f64,
}

/// Evaluates the objective of `spec` over `points`, sorted by class with `segments`. Gradient (in `query_gradient`),
/// posterior and rows come back in the order of `points`.
///
/// # Errors
/// What `tick` returns.
pub fn evaluate<R: Scalar>(
    spec: &Spec,
    points: &Points<R>,
    segments: &[Range<usize>],
    want: Want,
    block: usize,
    tick: &Tick<'_>,
) -> Result<Outcome<R>> {
    let counts: Vec<usize> = segments.iter().map(ExactSizeIterator::len).collect();
    let mut labels = vec![0; points.len()];
    for (c, segment) in segments.iter().enumerate() {
        labels[segment.clone()].fill(c as u32);
    }
    let mut engine = Engine {
        points,
        labels,
        posterior: Posterior::new(spec, &counts),
        widths: spec.bandwidths.iter().map(|h| inverse_width(*h)).collect(),
        rows: 0.0,
    };
    engine.rows = (0..points.len())
        .map(|i| f64::from(u8::from(engine.posterior.counts_query(engine.query(i)))))
        .sum();
    let mut states: Vec<Option<State<R>>> = (par::ranges(points.len(), block).into_iter())
        .map(|range| Some(engine.state(range, segments)))
        .collect();
    engine.meet(&mut states, tick, |a, b| engine.collect(a, b))?;
    let (rows, posterior) = engine.posteriors(&mut states, want);
    if want.gradient {
        engine.meet(&mut states, tick, |a, b| engine.pull(a, b))?;
    }
    let mut query_gradient = Vec::with_capacity(if want.gradient {
        points.len() * points.width()
    } else {
        0
    });
    if want.gradient {
        for state in states.into_iter().flatten() {
            query_gradient.extend(engine.less_own_place(state));
        }
    }
    Ok(Outcome {
        mean: RowReading::mean(&rows),
        rows,
        posterior,
        centre_gradient: Vec::new(),
        query_gradient,
    })
}

/// Pairs of a round-robin tournament of `n` blocks: each round's pairs are disjoint, every pair meets once, and every
/// block meets itself.
fn rounds(n: usize) -> Vec<Vec<(usize, usize)>> {
    let mut all = vec![(0..n).map(|i| (i, i)).collect::<Vec<_>>()];
    let even = n + n % 2;
    for round in 0..even.saturating_sub(1) {
        let seat = |k: usize| {
            if k == 0 {
                0
            } else {
                (k - 1 + round) % (even - 1) + 1
            }
        };
        let pairs = (0..even / 2).map(|k| (seat(k), seat(even - 1 - k)));
        all.push(
            pairs
                .map(|(a, b)| (a.min(b), a.max(b)))
                .filter(|(_, b)| *b < n)
                .collect(),
        );
    }
    all
}

impl<R: Scalar> Engine<'_, R> {
    fn query(&self, i: usize) -> Query {
        let label = self.labels[i] as usize;
        Query {
            label,
            own_class: Some(label),
        }
    }

    fn state(&self, range: Range<usize>, segments: &[Range<usize>]) -> State<R> {
        let (rows, entries) = (range.len(), range.len() * self.posterior.spec.classes);
        let clip = |v: usize| v.clamp(range.start, range.end) - range.start;
        State {
            segments: segments
                .iter()
                .map(|s| clip(s.start)..clip(s.end))
                .collect(),
            least: vec![R::INFINITY; entries],
            sums: vec![0.0; entries * self.widths.len()],
            factors: Vec::new(),
            gradient: Vec::new(),
            row_sums: vec![0.0; rows],
            range,
        }
    }

    /// Lets every pair of blocks, and every block with itself, meet once.
    fn meet(
        &self,
        states: &mut [Option<State<R>>],
        tick: &Tick<'_>,
        meeting: impl Fn(&mut State<R>, Option<&mut State<R>>) + Send + Sync,
    ) -> Result<()> {
        for round in rounds(states.len()) {
            let seated: Vec<_> = (round.iter())
                .filter_map(|&(a, b)| {
                    Some((
                        states[a].take()?,
                        (a != b).then(|| states[b].take()).flatten(),
                    ))
                })
                .collect();
            let work = self.points.len() * self.points.width() * size_of::<R>();
            let back = par::try_map(work, seated, |(mut a, mut b)| {
                tick()?;
                meeting(&mut a, b.as_mut());
                Ok((a, b))
            })?;
            for ((i, j), (a, b)) in round.into_iter().zip(back) {
                states[i] = Some(a);
                if i != j {
                    states[j] = b;
                }
            }
        }
        Ok(())
    }

    /// Squared distances between two blocks, row-major; the diagonal of a block with itself as the mode wants it.
    fn distances(&self, a: &State<R>, b: Option<&State<R>>) -> Vec<R> {
        let other = b.unwrap_or(a);
        let (m, n) = (a.range.len(), other.range.len());
        let mut out = vec![R::ZERO; m * n];
        let (left, right) = (
            self.points.block(a.range.clone()),
            self.points.block(other.range.clone()),
        );
        squared_distances(&mut out, n, &left, &right);
        if b.is_none() {
            let own = match self.posterior.spec.leave_one_out {
                LeaveOneOut::None => R::ZERO,
                LeaveOneOut::Plain | LeaveOneOut::Corrected => R::INFINITY,
            };
            (0..m).for_each(|i| out[i * n + i] = own);
        }
        out
    }

    /// Adds each other's rows to the class sums of both blocks.
    fn collect(&self, a: &mut State<R>, b: Option<&mut State<R>>) {
        let squared = self.distances(a, b.as_deref());
        match b {
            None => {
                let segments = a.segments.clone();
                a.collect(&squared, &segments, &self.widths);
            }
            Some(b) => {
                a.collect(&squared, &b.segments, &self.widths);
                let mut turned = vec![R::ZERO; squared.len()];
                transpose(&squared, a.range.len(), b.range.len(), &mut turned);
                b.collect(&turned, &a.segments, &self.widths);
            }
        }
    }

    /// Readings and posterior of all rows, and the factors that the second round of meetings needs.
    fn posteriors(
        &self,
        states: &mut [Option<State<R>>],
        want: Want,
    ) -> (Vec<RowReading>, Vec<f64>) {
        let work = self.points.len() * self.posterior.spec.classes * 128;
        let width = if want.gradient {
            self.points.width()
        } else {
            0
        };
        let parts = par::map(work, states.iter_mut().flatten().collect(), |state| {
            let part = self.block_posteriors(state, want);
            state.gradient = vec![R::ZERO; state.range.len() * width];
            part
        });
        let (mut rows, mut posterior) = (Vec::new(), Vec::new());
        for (r, p) in parts {
            rows.extend(r);
            posterior.extend(p);
        }
        (rows, posterior)
    }

    fn block_posteriors(&self, state: &mut State<R>, want: Want) -> (Vec<RowReading>, Vec<f64>) {
        let (classes, n) = (self.posterior.spec.classes, state.range.len());
        let entries = classes * self.widths.len();
        let (mut least, mut sums, mut factors) = (
            vec![R::ZERO; classes],
            vec![0.0; entries],
            vec![0.0; entries],
        );
        let mut scratch = Scratch::new(classes);
        let mut posterior = vec![0.0; if want.posterior { n * classes } else { 0 }];
        state.factors = vec![R::ZERO; entries * n];
        let mut rows = Vec::with_capacity(n);
        for i in 0..n {
            (0..classes).for_each(|c| least[c] = state.least[c * n + i]);
            (0..entries).for_each(|e| sums[e] = state.sums[e * n + i]);
            let query = self.query(state.range.start + i);
            let target = posterior.chunks_mut(classes).nth(i);
            rows.push(self.posterior.row(
                query,
                ClassSums {
                    least: &least,
                    sums: &sums,
                },
                self.rows,
                &mut factors,
                target,
                &mut scratch,
            ));
            (0..entries).for_each(|e| state.factors[e * n + i] = R::from_f64(factors[e]));
        }
        // Where no centre counts the factor is 0; the shift must only be finite.
        state
            .least
            .iter_mut()
            .filter(|v| !v.to_f64().is_finite())
            .for_each(|v| *v = R::ZERO);
        (rows, posterior)
    }

    /// Adds the pull of each other's rows to the gradients of both blocks.
    fn pull(&self, a: &mut State<R>, b: Option<&mut State<R>>) {
        let mut pulls = self.distances(a, b.as_deref());
        let d = self.points.width();
        let other = b.as_deref().unwrap_or(a);
        let (m, n) = (a.range.len(), other.range.len());
        let mut column_sums = vec![0.0; n];
        let mut row_sums = vec![0.0; m];
        for (i, row) in pulls.chunks_exact_mut(n).enumerate() {
            let label = self.labels[a.range.start + i] as usize;
            self.pull_row(a, i, other, label, row);
            row_sums[i] = dispatch(Totals(row, &mut column_sums));
        }
        let (left, right) = (
            self.points.block(a.range.clone()),
            self.points.block(other.range.clone()),
        );
        fn out<R>(data: &mut [R], stride: usize) -> Out<'_, R> {
            Out {
                data,
                stride,
                add: true,
            }
        }
        let matrix = Mat::dense(&pulls, m, n);
        gemm::a_b(
            out(&mut a.gradient, d),
            matrix,
            Mat::dense(right.rows, n, d),
        );
        a.row_sums
            .iter_mut()
            .zip(row_sums)
            .for_each(|(t, s)| *t += s);
        if let Some(b) = b {
            gemm::at_b(out(&mut b.gradient, d), matrix, Mat::dense(left.rows, m, d));
            b.row_sums
                .iter_mut()
                .zip(column_sums)
                .for_each(|(t, s)| *t += s);
        }
    }

    /// `W_ij + W_ji` of row i of block `a`, whose class is `label`, in place of the squared distances.
    fn pull_row(&self, a: &State<R>, i: usize, b: &State<R>, label: usize, row: &mut [R]) {
        let (m, n, classes) = (a.range.len(), b.range.len(), self.posterior.spec.classes);
        for (c, segment) in b.segments.iter().enumerate().filter(|(_, s)| !s.is_empty()) {
            let squared = &mut row[segment.clone()];
            let shifts = &b.least[label * n..][segment.clone()];
            let mut sum = vec![R::ZERO; squared.len()];
            for (w, width) in self.widths.iter().enumerate() {
                dispatch(Pull {
                    squared,
                    width: *width,
                    own: (a.least[c * m + i], a.factors[(w * classes + c) * m + i]),
                    shifts,
                    factors: &b.factors[(w * classes + label) * n..][segment.clone()],
                    out: &mut sum,
                });
            }
            squared.copy_from_slice(&sum);
        }
    }

    fn less_own_place(&self, mut state: State<R>) -> Vec<R> {
        let d = self.points.width();
        let rows = self.points.block(state.range);
        for (i, g) in state.gradient.chunks_exact_mut(d).enumerate() {
            dispatch(Less {
                scale: state.row_sums[i],
                from: rows.row(i),
                to: g,
            });
        }
        state.gradient
    }
}

impl<R: Scalar> State<R> {
    /// Adds rows at squared distances `squared` (this block's rows × theirs) to the class sums.
    fn collect(&mut self, squared: &[R], segments: &[Range<usize>], widths: &[R]) {
        let (n, classes) = (self.range.len(), segments.len());
        let cols = squared.len() / n;
        let mut work = vec![R::ZERO; cols];
        for (i, row) in squared.chunks_exact(cols).enumerate() {
            for (c, segment) in segments.iter().enumerate().filter(|(_, s)| !s.is_empty()) {
                let row = &row[segment.clone()];
                let before = self.least[c * n + i];
                let now = dispatch(Least(row)).lesser(before);
                if now == R::INFINITY {
                    continue;
                }
                self.least[c * n + i] = now;
                for (w, width) in widths.iter().enumerate() {
                    let sum = &mut self.sums[(w * classes + c) * n + i];
                    if *sum > 0.0 && now < before {
                        *sum *= ((now.to_f64() - before.to_f64()) * width.to_f64()).exp();
                    }
                    *sum += dispatch(SumOfExponentials {
                        squared: row,
                        shift: now,
                        width: *width,
                        work: &mut work[..row.len()],
                    });
                }
            }
        }
    }
}

struct Least<'a, R>(&'a [R]);

impl<R: Scalar> Kernel for Least<'_, R> {
    type Output = R;
    #[inline(always)]
    fn run(self) -> R {
        least(self.0)
    }
}

struct SumOfExponentials<'a, R> {
    squared: &'a [R],
    shift: R,
    width: R,
    work: &'a mut [R],
}

impl<R: Scalar> Kernel for SumOfExponentials<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        exponentials(self.squared, self.shift, self.width, self.work)
    }
}

struct Pull<'a, R> {
    squared: &'a [R],
    width: R,
    /// Shift and factor of the row for the columns' class.
    own: (R, R),
    /// The same of each column for the row's class.
    shifts: &'a [R],
    factors: &'a [R],
    out: &'a mut [R],
}

impl<R: Scalar> Kernel for Pull<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let (shift, factor) = self.own;
        let theirs = self.shifts.iter().zip(self.factors);
        for ((o, d), (s, f)) in self.out.iter_mut().zip(self.squared).zip(theirs) {
            let own = factor * weight(*d, shift, self.width);
            *o += own + *f * weight(*d, *s, self.width);
        }
    }
}

/// Adds a row to the column sums and returns its own sum.
struct Totals<'a, R>(&'a [R], &'a mut [f64]);

impl<R: Scalar> Kernel for Totals<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        for (s, v) in self.1.iter_mut().zip(self.0) {
            *s += v.to_f64();
        }
        sum_f64(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::rounds;

    #[test]
    fn everyone_meets_once_and_never_twice_in_a_round() {
        for n in 0..12 {
            let mut met = vec![0; n * n];
            for round in rounds(n) {
                let mut busy = vec![false; n];
                for (a, b) in round {
                    assert!(!busy[a] && !busy[b]);
                    busy[a] = true;
                    busy[b] = true;
                    met[a * n + b] += 1;
                }
            }
            for a in 0..n {
                for b in 0..n {
                    assert_eq!(met[a * n + b], i32::from(a <= b));
                }
            }
        }
    }
}
