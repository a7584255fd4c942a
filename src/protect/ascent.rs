//! Projected gradient ascent of the objective over perturbations of the data.

use super::cross::{self, CentreGradient, Centres, NO_OWN, Queries};
use super::objective::Spec;
use super::pairs;
use super::points::{Points, Sorted, mean, order_by_class};
use super::project::{Limits, Norm};
use super::spare::Spare;
use super::tile::Scalar;
use super::truncated::Neighbourhoods;
use crate::cancel::Cancel;
use crate::element::Element;
use crate::random::Random;
use crate::simd::{Kernel, dispatch};
use crate::view::{Rows, RowsMut};
use crate::{Result, par};

/// Whose error is driven up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// Of the clean points under the rule learnt from the published ones, own centre left out.
    Clean,
    /// Of the published points under the rule learnt from the others of them.
    Published,
}

/// Which rows share a perturbation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Per {
    Sample,
    Class,
    /// A shared perturbation of this part of the budget (and of the steps), then one per row in what is left.
    Both(f64),
}

/// Rows drawn for every step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    pub queries: usize,
    pub centres: usize,
}

/// An ascent.
#[derive(Debug, Clone)]
pub struct Plan {
    pub spec: Spec,
    pub against: Against,
    pub per: Per,
    pub limits: Limits,
    pub steps: usize,
    pub step_size: f64,
    pub batch: Batch,
    pub seed: u64,
    /// Start of a per-row ascent against the published error, as a part of epsilon: duplicates are a saddle.
    pub jitter: f64,
    /// Published values are multiples of one over this.
    pub levels: Option<f64>,
    /// Part of each class's centres that a block of queries sees; all of them if `None`. For perturbations by class
    /// against clean, all rows in every step.
    pub truncate: Option<f64>,
}

/// What happened.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trace {
    /// Objective of every step's rows before the step.
    pub steps: Vec<f64>,
    /// Objective of the same rows every time, and the number of steps before; the best of these is published.
    pub checks: Vec<(usize, f64)>,
    /// Steps behind the published iterate.
    pub best: usize,
    /// How far its objective can be from that of all centres; 0 where all are seen.
    pub bound: f64,
}

/// A perturbation, as one row per class or one per data row.
#[derive(Debug, Clone)]
enum Delta<R> {
    Class(Vec<R>),
    Sample(Vec<R>),
}

impl<R: Copy> Delta<R> {
    /// Takes over the values of a perturbation of the same form; false if it is of another.
    fn copy_from(&mut self, other: &Self) -> bool {
        let (to, from) = match (self, other) {
            (Self::Class(to), Self::Class(from)) | (Self::Sample(to), Self::Sample(from)) => {
                (to, from)
            }
            _ => return false,
        };
        to.copy_from_slice(from);
        true
    }
}

struct Run<'a, T: Element> {
    x: &'a Rows<'a, T>,
    labels: &'a [u32],
    plan: &'a Plan,
    mean: Vec<f64>,
    /// Everything takes part in every step.
    full: bool,
    cancel: &'a Cancel,
    spare: Spare<T::Acc>,
    near: Option<Neighbourhoods<T::Acc>>,
}

/// The rows of one step.
struct Draw {
    queries: Vec<u32>,
    centres: Vec<u32>,
}

struct Best<R> {
    value: f64,
    bound: f64,
    step: usize,
    delta: Delta<R>,
}

/// Ascends from `x` and writes the best iterate to `out` in the type of `x`.
///
/// # Errors
/// `NonFinite` in `x`; `Interrupted`, in which case `out` is untouched.
pub fn ascend<T: Element<Acc: Scalar>>(
    x: &Rows<'_, T>,
    labels: &[u32],
    plan: &Plan,
    out: RowsMut<'_, T>,
    cancel: &Cancel,
) -> Result<Trace> {
    let n = x.rows();
    let mut run = Run {
        x,
        labels,
        plan,
        mean: mean("x", x)?,
        full: plan.batch.queries >= n && plan.batch.centres >= n,
        cancel,
        spare: Spare::default(),
        near: None,
    };
    if let Some(share) = plan.truncate {
        if !run.full || plan.against != Against::Clean || plan.per != Per::Class {
            let expected = "all rows in every step, one perturbation per class, against clean";
            return Err(crate::Error::value("truncate", expected, "another ascent"));
        }
        let clean = Sorted::all(x, labels, plan.spec.classes, &run.mean);
        let radius = match plan.limits.norm {
            Norm::Linf => plan.limits.epsilon * (x.width() as f64).sqrt(),
            Norm::L2 => plan.limits.epsilon,
        };
        let tick = || cancel.check();
        let near = Neighbourhoods::build(&plan.spec, &clean, share, radius, plan.seed, &tick)?;
        run.near = Some(near);
    }
    let mut random = Random::new(plan.seed);
    let mut trace = Trace::default();
    let share = match plan.per {
        Per::Sample => 0.0,
        Per::Class => 1.0,
        Per::Both(share) => share,
    };
    let shared_steps = (plan.steps as f64 * share).round() as usize;
    let mut best = None;
    if share > 0.0 {
        let limits = Limits {
            epsilon: plan.limits.epsilon * share,
            ..plan.limits
        };
        let start = Delta::Class(vec![T::Acc::ZERO; plan.spec.classes * x.width()]);
        best = Some(run.climb(
            start,
            &limits,
            0..shared_steps,
            best,
            &mut random,
            &mut trace,
        )?);
    }
    if share < 1.0 {
        let start = match &best {
            Some(b) => run.spread(&b.delta),
            None => run.start(&mut random),
        };
        best = Some(run.climb(
            start,
            &plan.limits,
            shared_steps..plan.steps,
            best,
            &mut random,
            &mut trace,
        )?);
    }
    if let Some(best) = best {
        trace.best = best.step;
        trace.bound = best.bound;
        run.publish(&best.delta, out);
    }
    Ok(trace)
}

use crate::element::Real;

impl<T: Element<Acc: Scalar>> Run<'_, T> {
    fn width(&self) -> usize {
        self.x.width()
    }

    fn check_every(&self) -> usize {
        if self.full {
            1
        } else {
            (self.plan.steps / 10).max(5)
        }
    }

    /// Zero, or seeded noise where duplicates would otherwise never part.
    fn start(&self, random: &mut Random) -> Delta<T::Acc> {
        let mut delta = vec![T::Acc::ZERO; self.x.rows() * self.width()];
        if self.plan.against == Against::Published && self.plan.jitter > 0.0 {
            let mut scale = self.plan.jitter * self.plan.limits.epsilon;
            if self.plan.limits.norm == Norm::L2 {
                scale /= (self.width() as f64).sqrt();
            }
            for (i, row) in delta.chunks_exact_mut(self.width()).enumerate() {
                row.iter_mut()
                    .for_each(|d| *d = T::Acc::from_f64(scale * random.symmetric()));
                self.plan.limits.project(&self.base(i), row);
            }
        }
        Delta::Sample(delta)
    }

    /// A shared perturbation as one per row.
    fn spread(&self, delta: &Delta<T::Acc>) -> Delta<T::Acc> {
        let d = self.width();
        let mut rows = vec![T::Acc::ZERO; self.x.rows() * d];
        for (i, row) in rows.chunks_exact_mut(d).enumerate() {
            row.copy_from_slice(self.delta_of(delta, i));
            self.plan.limits.project(&self.base(i), row);
        }
        Delta::Sample(rows)
    }

    fn base(&self, i: usize) -> Vec<T::Acc> {
        self.x.row(i).iter().map(|v| v.load()).collect()
    }

    fn delta_of<'d>(&self, delta: &'d Delta<T::Acc>, i: usize) -> &'d [T::Acc] {
        let d = self.width();
        let (of, row) = match delta {
            Delta::Class(of) => (of, self.labels[i] as usize),
            Delta::Sample(of) => (of, i),
        };
        &of[row * d..(row + 1) * d]
    }

    fn draw(&self, random: &mut Random) -> Draw {
        let n = self.x.rows();
        let centres = random.sample(n, self.plan.batch.centres);
        let queries = match self.plan.against {
            Against::Clean => random.sample(n, self.plan.batch.queries),
            Against::Published => Vec::new(),
        };
        Draw { queries, centres }
    }

    /// Steps `range` of the ascent from `start`; the best iterate of these and `best`.
    fn climb(
        &self,
        start: Delta<T::Acc>,
        limits: &Limits,
        range: std::ops::Range<usize>,
        mut best: Option<Best<T::Acc>>,
        random: &mut Random,
        trace: &mut Trace,
    ) -> Result<Best<T::Acc>> {
        let mut keep =
            |found: (f64, f64), step: usize, delta: &Delta<T::Acc>, trace: &mut Trace| {
                let (value, bound) = found;
                trace.checks.push((step, value));
                if best.as_ref().is_some_and(|b| value <= b.value) {
                    return;
                }
                // In the place of the last best where it has the same form: a row per row of data is as much as the data.
                let delta = match best.take().map(|b| b.delta) {
                    Some(mut kept) => {
                        if kept.copy_from(delta) {
                            kept
                        } else {
                            delta.clone()
                        }
                    }
                    None => delta.clone(),
                };
                best = Some(Best {
                    value,
                    bound,
                    step,
                    delta,
                });
            };
        // The rows of the checks are a stream of their own, the same in every phase.
        let fixed = self.draw(&mut Random::new(!self.plan.seed));
        let mut delta = start;
        for step in range.clone() {
            self.cancel.check()?;
            let drawn = (!self.full).then(|| self.draw(random));
            let on_schedule = (step - range.start).is_multiple_of(self.check_every());
            if !self.full && on_schedule {
                keep(self.check(&delta, &fixed)?, step, &delta, trace);
            }
            let rows = drawn.as_ref().unwrap_or(&fixed);
            let (value, gradient, bound) = self.evaluate(&delta, rows, true)?;
            if self.full {
                keep((value, bound), step, &delta, trace);
            }
            trace.steps.push(value);
            self.step(&mut delta, &gradient, limits);
            self.spare.give(gradient.values);
            self.cancel.advance(1);
        }
        keep(self.check(&delta, &fixed)?, range.end, &delta, trace);
        // `keep` has just stored something if nothing was there before.
        best.ok_or(crate::Error::Interrupted)
    }

    /// Published centres `rows` in order of class.
    fn published(&self, delta: &Delta<T::Acc>, rows: &[u32]) -> Sorted<T::Acc> {
        let (order, segments) = order_by_class(self.labels, self.plan.spec.classes, rows);
        let (low, high) = (
            T::Acc::from_f64(self.plan.limits.low),
            T::Acc::from_f64(self.plan.limits.high),
        );
        let points = Points::build_in(&self.spare, order.len(), &self.mean, |k, row| {
            let i = order[k] as usize;
            dispatch(Place {
                x: self.x.row(i),
                delta: self.delta_of(delta, i),
                low,
                high,
                out: row,
            });
        });
        Sorted {
            points,
            order,
            segments,
        }
    }

    /// Objective of `rows` and how far off it can be.
    fn check(&self, delta: &Delta<T::Acc>, rows: &Draw) -> Result<(f64, f64)> {
        let (value, _, bound) = self.evaluate(delta, rows, false)?;
        Ok((value, bound))
    }

    /// Objective and gradient: for `Delta::Class` one row per class, for `Delta::Sample` rows of the data set with their
    /// index; and how far off the objective can be.
    fn evaluate(
        &self,
        delta: &Delta<T::Acc>,
        rows: &Draw,
        gradient: bool,
    ) -> Result<(f64, Gradient<T::Acc>, f64)> {
        let centres = self.published(delta, &rows.centres);
        if let Some(near) = &self.near {
            let tick = || self.cancel.check();
            let spec = &self.plan.spec;
            let out = near.evaluate(spec, &centres.points, &centres.segments, gradient, &tick)?;
            self.spare.give(centres.points.into_buffer());
            let found = Gradient {
                rows: (0..spec.classes as u32).collect(),
                values: out.gradient,
            };
            return Ok((out.mean.value, found, out.bound));
        }
        let (value, found) = match self.plan.against {
            Against::Clean => self.against_clean(delta, centres, rows, gradient),
            Against::Published => self.against_published(delta, centres, gradient),
        }?;
        Ok((value, found, 0.0))
    }

    fn against_clean(
        &self,
        delta: &Delta<T::Acc>,
        centres: Sorted<T::Acc>,
        rows: &Draw,
        gradient: bool,
    ) -> Result<(f64, Gradient<T::Acc>)> {
        let place = centres.positions(self.x.rows(), NO_OWN);
        let own: Vec<u32> = rows.queries.iter().map(|i| place[*i as usize]).collect();
        let labels: Vec<u32> = rows
            .queries
            .iter()
            .map(|i| self.labels[*i as usize])
            .collect();
        let points = Points::gather_in(&self.spare, self.x, &rows.queries, &self.mean);
        let want = cross::Want {
            centres: match (gradient, delta) {
                (false, _) => CentreGradient::No,
                (true, Delta::Class(_)) => CentreGradient::ByClass,
                (true, Delta::Sample(_)) => CentreGradient::Each,
            },
            queries: false,
            posterior: false,
        };
        let queries = Queries {
            points: &points,
            labels: &labels,
            own: &own,
        };
        let from = Centres {
            points: &centres.points,
            segments: &centres.segments,
        };
        let out = cross::evaluate(&self.plan.spec, queries, from, want, &self.spare, &|| {
            self.cancel.check()
        })?;
        self.spare.give(points.into_buffer());
        self.spare.give(centres.points.into_buffer());
        let rows = match delta {
            Delta::Class(_) => (0..self.plan.spec.classes as u32).collect(),
            Delta::Sample(_) => centres.order,
        };
        Ok((
            out.mean.value,
            Gradient {
                rows,
                values: out.centre_gradient,
            },
        ))
    }

    fn against_published(
        &self,
        delta: &Delta<T::Acc>,
        points: Sorted<T::Acc>,
        gradient: bool,
    ) -> Result<(f64, Gradient<T::Acc>)> {
        let want = pairs::Want {
            gradient,
            posterior: false,
        };
        let block = T::Acc::BLOCK;
        let out = pairs::evaluate(
            &self.plan.spec,
            &points.points,
            &points.segments,
            want,
            block,
            &|| self.cancel.check(),
        )?;
        let mut found = Gradient {
            rows: points.order,
            values: out.query_gradient,
        };
        if gradient && matches!(delta, Delta::Class(_)) {
            let d = self.width();
            let mut sums = vec![0.0; self.plan.spec.classes * d];
            for (row, i) in found.values.chunks_exact(d).zip(&found.rows) {
                let class = self.labels[*i as usize] as usize;
                let to = sums[class * d..(class + 1) * d].iter_mut();
                to.zip(row).for_each(|(s, g)| *s += g.to_f64());
            }
            found = Gradient {
                rows: (0..self.plan.spec.classes as u32).collect(),
                values: sums.into_iter().map(T::Acc::from_f64).collect(),
            };
        }
        Ok((out.mean.value, found))
    }

    /// One step along the gradient and back on the budget.
    fn step(&self, delta: &mut Delta<T::Acc>, gradient: &Gradient<T::Acc>, limits: &Limits) {
        let d = self.width();
        let alpha = self.plan.step_size;
        match delta {
            Delta::Class(of) => {
                for (row, g) in gradient.rows.iter().zip(gradient.values.chunks_exact(d)) {
                    move_shared(limits, alpha, g, &mut of[*row as usize * d..][..d]);
                }
            }
            Delta::Sample(of) => {
                // Sorted by data row, so that one pass over the rows finds each its gradient.
                let mut at = vec![NO_OWN; self.x.rows()];
                for (k, row) in gradient.rows.iter().enumerate() {
                    at[*row as usize] = k as u32;
                }
                let items = of
                    .chunks_exact_mut(d)
                    .enumerate()
                    .filter(|(i, _)| at[*i] != NO_OWN);
                par::for_each(
                    size_of_val(&gradient.values[..]),
                    items.collect(),
                    |(i, to)| {
                        let g = &gradient.values[at[i] as usize * d..][..d];
                        move_row(limits, alpha, self.x.row(i), g, to);
                    },
                );
            }
        }
    }

    fn publish(&self, delta: &Delta<T::Acc>, out: RowsMut<'_, T>) {
        let d = self.width();
        let work = 4 * self.x.rows() * d * size_of::<T>();
        par::for_each(work, out.into_runs(64), |run| {
            for (k, row) in run.data.chunks_exact_mut(d).enumerate() {
                let i = run.first + k;
                let delta = self.delta_of(delta, i);
                self.plan
                    .limits
                    .publish(self.x.row(i), delta, self.plan.levels, row);
            }
        });
    }
}

struct Gradient<R> {
    rows: Vec<u32>,
    values: Vec<R>,
}

/// One step of a perturbation that many rows share, along `g` and back on the budget.
pub fn move_shared<R: Real>(limits: &Limits, alpha: f64, g: &[R], delta: &mut [R]) {
    towards(limits.norm, alpha, g, delta);
    limits.project_shared(delta);
}

/// One step of the perturbation of the row `x`, along `g` and back into budget and box.
pub fn move_row<T: Element<Acc: Scalar>>(
    limits: &Limits,
    alpha: f64,
    x: &[T],
    g: &[T::Acc],
    delta: &mut [T::Acc],
) {
    match limits.norm {
        Norm::Linf => dispatch(SignStep {
            x,
            g,
            alpha,
            limits,
            delta,
        }),
        Norm::L2 => {
            towards(limits.norm, alpha, g, delta);
            let base: Vec<T::Acc> = x.iter().map(|v| v.load()).collect();
            limits.project(&base, delta);
        }
    }
}

/// `to += alpha * direction`: the signs of `g` under L∞ (0 where g is 0), `g / ‖g‖` under L2.
fn towards<R: Real>(norm: Norm, alpha: f64, g: &[R], to: &mut [R]) {
    match norm {
        Norm::Linf => {
            let step = R::from_f64(alpha);
            for (t, g) in to.iter_mut().zip(g) {
                if *g > R::ZERO {
                    *t += step;
                } else if *g < R::ZERO {
                    *t -= step;
                }
            }
        }
        Norm::L2 => {
            // Scaled first: squares of small f32 gradients would vanish.
            let top = g.iter().fold(0.0f64, |m, v| m.max(v.to_f64().abs()));
            if top == 0.0 {
                return;
            }
            let length = g
                .iter()
                .map(|v| (v.to_f64() / top).powi(2))
                .sum::<f64>()
                .sqrt();
            let scale = alpha / (length * top);
            for (t, g) in to.iter_mut().zip(g) {
                *t += R::from_f64(scale * g.to_f64());
            }
        }
    }
}

/// A step along the signs of `g` and back into the box and the L∞ ball, in one pass.
struct SignStep<'a, T: Element> {
    x: &'a [T],
    g: &'a [T::Acc],
    alpha: f64,
    limits: &'a Limits,
    delta: &'a mut [T::Acc],
}

impl<T: Element> Kernel for SignStep<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let step = T::Acc::from_f64(self.alpha);
        for ((d, g), x) in self.delta.iter_mut().zip(self.g).zip(self.x) {
            let up = if *g > T::Acc::ZERO { *d + step } else { *d };
            let moved = if *g < T::Acc::ZERO { *d - step } else { up };
            *d = self.limits.within(moved, x.load());
        }
    }
}

/// `clip(x + delta, low, high)`.
struct Place<'a, T: Element> {
    x: &'a [T],
    delta: &'a [T::Acc],
    low: T::Acc,
    high: T::Acc,
    out: &'a mut [T::Acc],
}

impl<T: Element> Kernel for Place<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for ((o, x), d) in self.out.iter_mut().zip(self.x).zip(self.delta) {
            *o = (x.load() + *d).greater(self.low).lesser(self.high);
        }
    }
}
