//! The objective over queries and centres that are two sets.
//!
//! Queries go by in strips. For a strip the weights `W_ij = ∂J/∂l · exp(A_ij - l) / h²` of all centres are formed from one
//! product, and feed the second: `Σ_i W_ij (x_i - z_j)` for the centres, `Σ_j W_ij (z_j - x_i)` for the queries.

use super::Tick;
use super::objective::{
    ClassSums, Exponentials, Posterior, Query, RowReading, Scratch, Spec, inverse_width,
};
use super::points::{Block, Points};
use super::spare::Spare;
use super::tile::{Scalar, squared_distances};
use crate::linalg::gemm::{self, Mat, Out};
use crate::simd::{Kernel, dispatch, sum_f64};
use crate::{Result, par};
use std::ops::Range;

/// The strip's weights: 64 MiB in f32.
const STRIP_ELEMENTS: usize = 1 << 24;
const STRIP_ROWS: Range<usize> = 64..4096;
/// Rows of a strip that one task turns into weights.
const TASK_ROWS: usize = 256;
/// Centres per distance tile and per task of the second product: four times the rows of faer's kernel on AVX-512.
const TILE: usize = 384;
/// Queries whose weights enter the second product together.
const PART: usize = 384;

/// No centre is this query's own.
pub const NO_OWN: u32 = u32::MAX;

/// Points whose posterior is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Queries<'a, R> {
    pub points: &'a Points<R>,
    pub labels: &'a [u32],
    /// The centre that each query must not see, or [`NO_OWN`].
    pub own: &'a [u32],
}

/// Labelled points in order of class.
#[derive(Debug, Clone, Copy)]
pub struct Centres<'a, R> {
    pub points: &'a Points<R>,
    pub segments: &'a [Range<usize>],
}

/// Which gradient with respect to the centres.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CentreGradient {
    No,
    /// One row per centre.
    Each,
    /// One row per class: the sum over its centres, for half of the arithmetic.
    ByClass,
}

/// What to compute beside the readings.
#[derive(Debug, Clone, Copy)]
pub struct Want {
    pub centres: CentreGradient,
    pub queries: bool,
    pub posterior: bool,
}

/// What was computed; parts that were not asked for are empty.
#[derive(Debug)]
pub struct Outcome<R> {
    pub mean: RowReading,
    pub rows: Vec<RowReading>,
    /// Queries × classes.
    pub posterior: Vec<f64>,
    /// Centres × width in the centres' order, or classes × width.
    pub centre_gradient: Vec<R>,
    /// Queries × width.
    pub query_gradient: Vec<R>,
}

struct Engine<'a, R> {
    queries: Queries<'a, R>,
    centres: Centres<'a, R>,
    posterior: Posterior<'a>,
    rows: f64,
    want: Want,
}

/// What one task of a strip owns.
struct Task<'a, R> {
    range: Range<usize>,
    weights: &'a mut [R],
    readings: &'a mut [RowReading],
    posterior: &'a mut [f64],
    gradient: &'a mut [R],
    /// Σ of the weights over each class, the tasks' rows × classes.
    class_sums: &'a mut [R],
}

/// Evaluates the objective of `spec` over `queries`, with the gradients that are wanted.
///
/// # Errors
/// What `tick` returns.
pub fn evaluate<R: Scalar>(
    spec: &Spec,
    queries: Queries<'_, R>,
    centres: Centres<'_, R>,
    want: Want,
    spare: &Spare<R>,
    tick: &Tick<'_>,
) -> Result<Outcome<R>> {
    let counts: Vec<usize> = centres
        .segments
        .iter()
        .map(ExactSizeIterator::len)
        .collect();
    let mut engine = Engine {
        queries,
        centres,
        posterior: Posterior::new(spec, &counts),
        rows: 0.0,
        want,
    };
    let n = queries.points.len();
    engine.rows = (0..n)
        .map(|i| f64::from(u8::from(engine.posterior.counts_query(engine.query(i)))))
        .sum();
    engine.run(spare, tick)
}

impl<R: Scalar> Engine<'_, R> {
    fn query(&self, i: usize) -> Query {
        let own = self.queries.own[i];
        let column = own as usize;
        Query {
            label: self.queries.labels[i] as usize,
            own_class: (own != NO_OWN)
                .then(|| {
                    self.centres
                        .segments
                        .iter()
                        .position(|s| s.contains(&column))
                })
                .flatten(),
        }
    }

    fn run(&self, spare: &Spare<R>, tick: &Tick<'_>) -> Result<Outcome<R>> {
        let (nq, nz) = (self.queries.points.len(), self.centres.points.len());
        let (d, classes) = (self.centres.points.width(), self.posterior.spec.classes);
        let want = self.want;
        let strip = (STRIP_ELEMENTS / nz)
            .clamp(STRIP_ROWS.start, STRIP_ROWS.end)
            .min(nq);
        let mut weights = spare.take(strip * nz);
        let mut class_sums = vec![R::ZERO; strip * classes];
        let mut column_sums = vec![
            0.0;
            if want.centres == CentreGradient::No {
                0
            } else {
                nz
            }
        ];
        let mut out = Outcome {
            mean: RowReading::default(),
            rows: vec![RowReading::default(); nq],
            posterior: vec![0.0; if want.posterior { nq * classes } else { 0 }],
            centre_gradient: spare.take(
                d * match want.centres {
                    CentreGradient::No => 0,
                    CentreGradient::Each => nz,
                    CentreGradient::ByClass => classes,
                },
            ),
            query_gradient: vec![R::ZERO; if want.queries { nq * d } else { 0 }],
        };
        if nq == 0 {
            out.centre_gradient.fill(R::ZERO);
        }
        for range in par::ranges(nq, strip) {
            let sums = &mut class_sums[..range.len() * classes];
            self.weigh(range.clone(), &mut weights, sums, &mut out, tick)?;
            self.gather(range, &weights, sums, &mut column_sums, &mut out, tick)?;
        }
        spare.give(weights);
        self.subtract_own_place(&column_sums, &mut out.centre_gradient);
        out.mean = RowReading::mean(&out.rows);
        Ok(out)
    }

    /// Weights of the queries in `strip`, their readings and, if wanted, their gradient.
    fn weigh(
        &self,
        strip: Range<usize>,
        weights: &mut [R],
        class_sums: &mut [R],
        out: &mut Outcome<R>,
        tick: &Tick<'_>,
    ) -> Result<()> {
        let (nz, d) = (self.centres.points.len(), self.centres.points.width());
        let classes = self.posterior.spec.classes;
        let part = |per_row: usize, len: usize| {
            if len == 0 {
                0..0
            } else {
                strip.start * per_row..strip.end * per_row
            }
        };
        let (post, grad) = (
            part(classes, out.posterior.len()),
            part(d, out.query_gradient.len()),
        );
        let mut posterior = out.posterior[post].chunks_mut(TASK_ROWS * classes);
        let mut gradient = out.query_gradient[grad].chunks_mut(TASK_ROWS * d);
        let tasks = (out.rows[strip.clone()].chunks_mut(TASK_ROWS))
            .zip(weights.chunks_mut(TASK_ROWS * nz))
            .zip(class_sums.chunks_mut(TASK_ROWS * classes))
            .enumerate()
            .map(|(i, ((readings, weights), class_sums))| {
                let start = strip.start + i * TASK_ROWS;
                Task {
                    range: start..start + readings.len(),
                    weights: &mut weights[..readings.len() * nz],
                    readings,
                    posterior: posterior.next().unwrap_or_default(),
                    gradient: gradient.next().unwrap_or_default(),
                    class_sums,
                }
            })
            .collect();
        par::try_map(strip.len() * nz * d, tasks, |task| {
            tick()?;
            self.weigh_rows(task);
            Ok(())
        })?;
        Ok(())
    }

    fn weigh_rows(&self, task: Task<'_, R>) {
        let (nz, d) = (self.centres.points.len(), self.centres.points.width());
        let classes = self.posterior.spec.classes;
        let block = self.queries.points.block(task.range.clone());
        for tile in par::ranges(nz, TILE) {
            let centres = self.centres.points.block(tile.clone());
            squared_distances(&mut task.weights[tile.start..], nz, &block, &centres);
        }
        let mut row_task = RowTask::new(self, nz);
        for (k, i) in task.range.clone().enumerate() {
            let row = &mut task.weights[k * nz..(k + 1) * nz];
            if let Some(masked) = row.get_mut(self.queries.own[i] as usize) {
                *masked = R::INFINITY;
            }
            let posterior = task.posterior.chunks_mut(classes).nth(k);
            let sums = &mut task.class_sums[k * classes..][..classes];
            task.readings[k] = row_task.weigh(self.query(i), row, posterior, sums);
        }
        if !task.gradient.is_empty() {
            self.own_places(&block, task.weights, task.class_sums, task.gradient, d);
        }
    }

    /// `Σ_j W_ij (z_j - x_i)` for the rows of one task.
    fn own_places(
        &self,
        block: &Block<'_, R>,
        weights: &[R],
        class_sums: &[R],
        gradient: &mut [R],
        d: usize,
    ) {
        let (rows, nz) = (block.norms.len(), self.centres.points.len());
        let centres = self.centres.points.block(0..nz);
        let product = Out {
            data: &mut *gradient,
            stride: d,
            add: false,
        };
        gemm::a_b(
            product,
            Mat::dense(weights, rows, nz),
            Mat::dense(centres.rows, nz, d),
        );
        let classes = self.posterior.spec.classes;
        for (i, g) in gradient.chunks_exact_mut(d).enumerate() {
            let total = class_sums[i * classes..][..classes]
                .iter()
                .map(|v| v.to_f64())
                .sum();
            dispatch(Less {
                scale: total,
                from: block.row(i),
                to: g,
            });
        }
    }

    /// Adds the strip's `Σ_i W_ij x_i` to the centres' gradient and `Σ_i W_ij` to `column_sums`.
    fn gather(
        &self,
        strip: Range<usize>,
        weights: &[R],
        class_sums: &[R],
        column_sums: &mut [f64],
        out: &mut Outcome<R>,
        tick: &Tick<'_>,
    ) -> Result<()> {
        if self.want.centres == CentreGradient::No {
            return Ok(());
        }
        let (nz, d) = (self.centres.points.len(), self.centres.points.width());
        let rows = strip.len();
        let first = strip.start == 0;
        let queries = self.queries.points.block(strip);
        let each = self.want.centres == CentreGradient::Each;
        let gradient = if each {
            &mut out.centre_gradient[..]
        } else {
            &mut []
        };
        let mut gradient = gradient.chunks_mut(TILE * d);
        let tasks: Vec<_> = (column_sums.chunks_mut(TILE).enumerate())
            .map(|(i, sums)| (i * TILE, sums, gradient.next()))
            .collect();
        par::try_map(rows * nz * d, tasks, |(start, sums, gradient)| {
            tick()?;
            for row in weights.chunks_exact(nz).take(rows) {
                dispatch(AddColumns(&row[start..start + sums.len()], sums));
            }
            if let Some(gradient) = gradient {
                for part in par::ranges(rows, PART) {
                    let product = Out {
                        data: &mut *gradient,
                        stride: d,
                        add: !(first && part.start == 0),
                    };
                    let tile = &weights[part.start * nz + start..];
                    let tile = Mat::strided(tile, part.len(), sums.len(), nz);
                    let places = &queries.rows[part.start * d..part.end * d];
                    gemm::at_b(product, tile, Mat::dense(places, part.len(), d));
                }
            }
            Ok(())
        })?;
        if !each {
            let classes = self.posterior.spec.classes;
            let product = Out {
                data: &mut out.centre_gradient,
                stride: d,
                add: !first,
            };
            gemm::at_b(
                product,
                Mat::dense(class_sums, rows, classes),
                Mat::dense(queries.rows, rows, d),
            );
        }
        Ok(())
    }

    /// Takes `Σ_i W_ij z_j` from the centres' gradient, or from that of their class.
    fn subtract_own_place(&self, column_sums: &[f64], gradient: &mut [R]) {
        let d = self.centres.points.width();
        let centres = self.centres.points.block(0..self.centres.points.len());
        match self.want.centres {
            CentreGradient::No => {}
            CentreGradient::Each => {
                let items = gradient.chunks_exact_mut(d).zip(column_sums).enumerate();
                par::for_each(
                    size_of_val(centres.rows),
                    items.collect(),
                    |(j, (g, sum))| {
                        dispatch(Less {
                            scale: *sum,
                            from: centres.row(j),
                            to: g,
                        });
                    },
                );
            }
            CentreGradient::ByClass => {
                let items = gradient
                    .chunks_exact_mut(d)
                    .zip(self.centres.segments)
                    .collect();
                par::for_each(size_of_val(centres.rows), items, |(g, segment)| {
                    let mut total = vec![0.0; d];
                    for j in segment.clone() {
                        dispatch(Less {
                            scale: -column_sums[j],
                            from: centres.row(j),
                            to: &mut total,
                        });
                    }
                    for (g, t) in g.iter_mut().zip(total) {
                        *g = R::from_f64(g.to_f64() - t);
                    }
                });
            }
        }
    }
}

/// Work space for one query after another.
struct RowTask<'a, R> {
    engine: &'a Engine<'a, R>,
    exponentials: Vec<R>,
    least: Vec<R>,
    sums: Vec<f64>,
    factors: Vec<f64>,
    scratch: Scratch,
}

impl<'a, R: Scalar> RowTask<'a, R> {
    fn new(engine: &'a Engine<'a, R>, nz: usize) -> Self {
        let (classes, widths) = (
            engine.posterior.spec.classes,
            engine.posterior.spec.bandwidths.len(),
        );
        Self {
            engine,
            exponentials: vec![R::ZERO; nz * widths],
            least: vec![R::INFINITY; classes],
            sums: vec![0.0; classes * widths],
            factors: vec![0.0; classes * widths],
            scratch: Scratch::new(classes),
        }
    }

    /// Turns a row of squared distances into one of weights (where a gradient is wanted), summed per class.
    fn weigh(
        &mut self,
        query: Query,
        row: &mut [R],
        posterior: Option<&mut [f64]>,
        class_sums: &mut [R],
    ) -> RowReading {
        let spec = self.engine.posterior.spec;
        let segments = self.engine.centres.segments;
        for (b, h) in spec.bandwidths.iter().enumerate() {
            let out = &mut self.exponentials[b * row.len()..(b + 1) * row.len()];
            for (c, segment) in segments.iter().enumerate() {
                let (least, sum) = dispatch(Exponentials {
                    squared: &row[segment.clone()],
                    width: inverse_width::<R>(*h),
                    out: &mut out[segment.clone()],
                });
                self.least[c] = least;
                self.sums[b * spec.classes + c] = sum;
            }
        }
        let reading = self.engine.posterior.row(
            query,
            ClassSums {
                least: &self.least,
                sums: &self.sums,
            },
            self.engine.rows,
            &mut self.factors,
            posterior,
            &mut self.scratch,
        );
        let want = self.engine.want;
        if want.centres == CentreGradient::No && !want.queries {
            return reading;
        }
        for (c, segment) in segments.iter().enumerate() {
            for b in 0..spec.bandwidths.len() {
                let exponentials = &self.exponentials[b * row.len()..(b + 1) * row.len()];
                dispatch(Weigh {
                    factor: R::from_f64(self.factors[b * spec.classes + c]),
                    add: b > 0,
                    exponentials: &exponentials[segment.clone()],
                    weights: &mut row[segment.clone()],
                });
            }
            class_sums[c] = R::from_f64(dispatch(Sum(&row[segment.clone()])));
        }
        reading
    }
}

struct Weigh<'a, R> {
    factor: R,
    add: bool,
    exponentials: &'a [R],
    weights: &'a mut [R],
}

impl<R: Scalar> Kernel for Weigh<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        if self.add {
            for (w, e) in self.weights.iter_mut().zip(self.exponentials) {
                *w += self.factor * *e;
            }
        } else {
            for (w, e) in self.weights.iter_mut().zip(self.exponentials) {
                *w = self.factor * *e;
            }
        }
    }
}

struct Sum<'a, R>(&'a [R]);

impl<R: Scalar> Kernel for Sum<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        sum_f64(self.0)
    }
}

struct AddColumns<'a, R>(&'a [R], &'a mut [f64]);

impl<R: Scalar> Kernel for AddColumns<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (s, w) in self.1.iter_mut().zip(self.0) {
            *s += w.to_f64();
        }
    }
}

/// `to -= scale * from`, in f64, rounded once.
pub struct Less<'a, R, S> {
    pub scale: f64,
    pub from: &'a [R],
    pub to: &'a mut [S],
}

impl<R: Scalar, S: Scalar> Kernel for Less<'_, R, S> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (t, f) in self.to.iter_mut().zip(self.from) {
            *t = S::from_f64(t.to_f64() - self.scale * f.to_f64());
        }
    }
}
