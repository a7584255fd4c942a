//! Linear probes: logistic and ridge regression of a binary label on rows.
//!
//! Both minimise `½ λ ‖w‖² + Σ c_i ℓ(y_i, w·x_i + b)` with `y = ±1` and a free intercept; logistic has `λ = 1`, `c = C s`,
//! ridge `λ = α`, `c = s` (scikit-learn's conventions; s is the weight of the row's class).
//!
//! With more rows than columns the sum is minimised over `(w, b)` by L-BFGS in the metric of the Hessian that the rows, or
//! a part of them, have before the first step: one Cholesky factor, shared by all folds, after which a few reads of the
//! rows suffice, however unequal the variances are. One read gives value and gradient. With fewer rows than columns, or few
//! rows at all, w is a combination of the rows, and Newton's method runs on their products in f64.
//!
//! Rows are read in fixed ranges whose results are combined in order, so the number of threads changes no bit; the
//! matrix products are promised for one machine, see [`crate::linalg::gemm`].

use crate::cancel::Cancel;
use crate::element::{Element, Real};
use crate::linalg::gemm::{Gemm, Mat, Out, a_bt, at_b};
use crate::linalg::{add_scaled, inner};
use crate::moments::{Moments, NonFinitePolicy};
use crate::simd::{Kernel, dispatch, dot};
use crate::view::Rows;
use crate::{Error, Result, par};
use faer::{MatRef, Side};
use std::collections::VecDeque;
use std::ops::Range;

/// Rows added to a gradient at once, and rows added in the arithmetic type before the sum is widened.
const GROUP: usize = 4;
const NARROW: usize = 64;
/// Pieces that a read of the rows is cut into, at most.
const PIECES: usize = 256;
/// Pairs of steps and gradient changes kept.
const MEMORY: usize = 16;
/// Largest number of rows that the products of all pairs are made for, and of columns that a factor is made for.
const MAX_DUAL: usize = 4096;
/// Rows up to which Newton's method is taken whatever their width: it is quick then, and exact near separable rows,
/// where a fixed metric needs very many steps.
const SMALL: usize = 512;
const MAX_FACTOR: usize = 8192;
/// Side of the blocks of a matrix of products, and how much of the other axis is held at a time.
const BLOCK: usize = 256;
const SLAB: usize = 1024;
/// Added to the unit diagonal before an f32 factorisation: above the rounding of the products.
const JITTER: f32 = 3e-6;
/// Trials of one line search.
const TRIALS: usize = 20;

/// What is summed over the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// `log(1 + e^{−y z})`.
    Logistic,
    /// `½ (z − y)²`.
    Squared,
}

impl Loss {
    /// Loss, first and second derivative in `z`.
    #[inline(always)]
    fn at(self, y: f64, z: f64) -> [f64; 3] {
        match self {
            Self::Squared => [0.5 * (z - y) * (z - y), z - y, 1.0],
            Self::Logistic => {
                let margin = y * z;
                let e = (-margin.abs()).exp();
                let wrong = if margin >= 0.0 { e } else { 1.0 } / (1.0 + e);
                let value = (-margin).max(0.0) + e.ln_1p();
                [value, -y * wrong, e / ((1.0 + e) * (1.0 + e))]
            }
        }
    }

    /// The second derivative before the first step, and its upper bound.
    fn curvature(self) -> f64 {
        match self {
            Self::Logistic => 0.25,
            Self::Squared => 1.0,
        }
    }
}

/// How to fit.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub loss: Loss,
    /// Weights classes by `n / (2 n_c)`.
    pub balanced: bool,
    /// Converged where [`Fit::decrement`] is at most `tol · sqrt(2 · loss)`: the loss is then within about `tol²` of
    /// itself from the minimum.
    pub tol: f64,
    pub max_iter: usize,
}

/// A fitted probe.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    pub coef: Vec<f64>,
    pub intercept: f64,
    /// The minimised objective.
    pub loss: f64,
    /// Euclidean length of its gradient in `(w, b)`.
    pub gradient: f64,
    /// Length of the gradient in the metric of the inverse Hessian (or its estimate): half its square is about what
    /// the loss may still fall.
    pub decrement: f64,
    pub iterations: usize,
    pub converged: bool,
}

/// Fits one probe per strength (C of logistic, α of ridge) and set of rows; of one set, each strength starts where the
/// last ended. `y` holds ±1 for every row of `x`.
///
/// # Errors
/// `Shape`, `Value`: arguments that do not fit; `NonFinite`: an element of `x`; `Degenerate`: a set without both
/// classes; `Interrupted`.
pub fn fit<T: Element>(
    x: &Rows<'_, T>,
    y: &[f64],
    strengths: &[f64],
    sets: &[Vec<u32>],
    options: &Options,
    cancel: &Cancel,
) -> Result<Vec<Vec<Fit>>> {
    check(x, y, strengths, sets, options)?;
    let mut moments = Moments::new(x.width(), false);
    moments.update(x, None, NonFinitePolicy::Error, cancel)?;
    let mean = moments.mean().to_vec();
    let (n, d) = (x.rows(), x.width());
    let dual = n <= d.min(MAX_DUAL) || n <= SMALL;
    let products = match dual {
        true => row_products(x, &mean, cancel)?,
        false => Vec::new(),
    };
    let columns = match !dual && d <= MAX_FACTOR {
        true => Some(columns(x, y, &mean, options, cancel)?),
        false => None,
    };
    let mut starts: Vec<Vec<f64>> = vec![Vec::new(); sets.len()];
    let mut all = Vec::with_capacity(strengths.len());
    for &strength in strengths {
        let mut shared = None;
        let mut fits = Vec::with_capacity(sets.len());
        for (rows, start) in sets.iter().zip(&mut starts) {
            let problem = Problem::new(x, y, &mean, rows, strength, options, cancel);
            if dual {
                fits.push(problem.newton(&products, n, start)?);
                continue;
            }
            if shared.is_none() {
                shared = Some(match &columns {
                    Some(c) => Metric::factor(c, &problem)?,
                    None => Metric::diagonal(&problem)?,
                });
            }
            if let Some(metric) = &shared {
                fits.push(problem.quasi_newton(metric, start)?);
            }
        }
        all.push(fits);
    }
    Ok(all)
}

/// Probes of all folds but one at a time, for every strength, and what they say of the rows held out:
/// `strengths × rows`, row after row. `fold` numbers the fold of every row from 0.
///
/// # Errors
/// As [`fit`]; `Shape`, `Value` for folds that do not fit.
#[allow(clippy::type_complexity)]
pub fn cross_validate<T: Element>(
    x: &Rows<'_, T>,
    y: &[f64],
    strengths: &[f64],
    fold: &[i64],
    options: &Options,
    cancel: &Cancel,
) -> Result<(Vec<Vec<Fit>>, Vec<f64>)> {
    if fold.len() != x.rows() {
        let expected = format!("{} folds, one per row", x.rows());
        return Err(Error::shape("fold", expected, fold.len()));
    }
    let folds = fold.iter().max().map_or(0, |m| m + 1);
    if folds < 2 || fold.iter().any(|f| *f < 0) {
        return Err(Error::value(
            "fold",
            "numbers from 0 of 2 or more folds",
            folds,
        ));
    }
    let rows_where = |keep: &dyn Fn(i64) -> bool| -> Vec<u32> {
        (0..fold.len() as u32)
            .filter(|i| keep(fold[*i as usize]))
            .collect()
    };
    let train: Vec<Vec<u32>> = (0..folds).map(|k| rows_where(&|f| f != k)).collect();
    let held: Vec<Vec<u32>> = (0..folds).map(|k| rows_where(&|f| f == k)).collect();
    let fits = fit(x, y, strengths, &train, options, cancel)?;
    let mut out = vec![0.0; strengths.len() * x.rows()];
    for (line, fits) in out.chunks_exact_mut(x.rows()).zip(&fits) {
        for (fit, rows) in fits.iter().zip(&held) {
            cancel.check()?;
            let z = decide(x, &fit.coef, fit.intercept, rows);
            (rows.iter().zip(z)).for_each(|(i, z)| line[*i as usize] = z);
        }
    }
    Ok((fits, out))
}

/// `x_i·coef + intercept` of every row: products in the arithmetic type, sums in f64.
///
/// # Errors
/// `Shape` unless `coef` is as long as a row.
pub fn decision<T: Element>(x: &Rows<'_, T>, coef: &[f64], intercept: f64) -> Result<Vec<f64>> {
    if coef.len() != x.width() {
        let expected = format!("a last axis of {}", coef.len());
        return Err(Error::shape("x", expected, x.width()));
    }
    let all: Vec<u32> = (0..x.rows() as u32).collect();
    Ok(decide(x, coef, intercept, &all))
}

fn decide<T: Element>(x: &Rows<'_, T>, coef: &[f64], intercept: f64, rows: &[u32]) -> Vec<f64> {
    let w: Vec<T::Acc> = coef.iter().map(|v| T::Acc::from_f64(*v)).collect();
    let bytes = rows.len() * x.width() * size_of::<T>();
    let parts = par::map(bytes, rows.chunks(NARROW).collect(), |rows| {
        dispatch(Decide {
            x,
            w: &w,
            intercept,
            rows,
        })
    });
    parts.concat()
}

struct Decide<'a, T: Element> {
    x: &'a Rows<'a, T>,
    w: &'a [T::Acc],
    intercept: f64,
    rows: &'a [u32],
}

impl<T: Element> Kernel for Decide<'_, T> {
    type Output = Vec<f64>;
    #[inline(always)]
    fn run(self) -> Vec<f64> {
        (self.rows.iter())
            .map(|i| dot(self.x.row(*i as usize), self.w) + self.intercept)
            .collect()
    }
}

fn check<T: Element>(
    x: &Rows<'_, T>,
    y: &[f64],
    strengths: &[f64],
    sets: &[Vec<u32>],
    options: &Options,
) -> Result<()> {
    if y.len() != x.rows() {
        let expected = format!("{} labels, one per row", x.rows());
        return Err(Error::shape("y", expected, y.len()));
    }
    if x.width() == 0 {
        return Err(Error::shape("x", "rows of at least one element", 0));
    }
    if let Some(bad) = y.iter().find(|v| v.abs() != 1.0) {
        return Err(Error::value("y", "-1 or 1", bad));
    }
    if let Some(bad) = strengths.iter().find(|s| !(**s > 0.0 && s.is_finite())) {
        return Err(Error::value(
            "C or alpha",
            "a finite number above 0 (without a penalty separable classes have no optimum)",
            bad,
        ));
    }
    if !(options.tol > 0.0 && options.tol.is_finite()) {
        return Err(Error::value("tol", "a finite number above 0", options.tol));
    }
    if options.max_iter == 0 {
        return Err(Error::value("max_iter", "1 or more", 0));
    }
    for rows in sets {
        if let Some(bad) = rows.iter().find(|r| **r as usize >= y.len()) {
            return Err(Error::value("rows", format!("below {}", y.len()), bad));
        }
        for class in [-1.0, 1.0] {
            if !rows.iter().any(|r| y[*r as usize] == class) {
                return Err(Error::degenerate("y", "expected rows of both classes"));
            }
        }
    }
    Ok(())
}

/// `[s₋, s₊]` of some rows.
fn class_weights(
    y: &[f64],
    rows: impl ExactSizeIterator<Item = usize>,
    balanced: bool,
) -> [f64; 2] {
    let n = rows.len() as f64;
    let positive = rows.filter(|r| y[*r] > 0.0).count() as f64;
    match balanced {
        true => [n / (2.0 * (n - positive)), n / (2.0 * positive)],
        false => [1.0; 2],
    }
}

fn length(a: &[f64]) -> f64 {
    inner(a, a).sqrt()
}

/// One set of rows and one strength. The unknowns are `[w, b']` with `z = w·(x − mean) + b'`: about the mean the
/// intercept is nearly independent of the rest, and a common offset of the rows costs nothing.
struct Problem<'a, T: Element> {
    x: &'a Rows<'a, T>,
    mean: &'a [f64],
    rows: &'a [u32],
    y: Vec<f64>,
    /// `c_i` of the objective.
    weight: Vec<f64>,
    /// `λ` of the objective.
    ridge: f64,
    options: &'a Options,
    cancel: &'a Cancel,
}

/// Objective and gradient at a point.
struct Eval {
    point: Vec<f64>,
    value: f64,
    gradient: Vec<f64>,
}

impl<'a, T: Element> Problem<'a, T> {
    fn new(
        x: &'a Rows<'a, T>,
        y: &[f64],
        mean: &'a [f64],
        rows: &'a [u32],
        strength: f64,
        options: &'a Options,
        cancel: &'a Cancel,
    ) -> Self {
        let (ridge, scale) = match options.loss {
            Loss::Logistic => (1.0, strength),
            Loss::Squared => (strength, 1.0),
        };
        let classes = class_weights(y, rows.iter().map(|r| *r as usize), options.balanced);
        let y: Vec<f64> = rows.iter().map(|r| y[*r as usize]).collect();
        let weight = (y.iter())
            .map(|y| scale * classes[usize::from(*y > 0.0)])
            .collect();
        Self {
            x,
            mean,
            rows,
            y,
            weight,
            ridge,
            options,
            cancel,
        }
    }

    /// The intercept that is best without weights.
    fn null_intercept(&self) -> f64 {
        let total: f64 = self.weight.iter().sum();
        let mean = inner(&self.weight, &self.y) / total;
        match self.options.loss {
            Loss::Squared => mean,
            Loss::Logistic => ((1.0 + mean) / (1.0 - mean)).ln(),
        }
    }

    fn small(&self, decrement: f64, value: f64) -> bool {
        decrement <= self.options.tol * (2.0 * value).sqrt()
    }

    /// Value and gradient at `point`, whose weights are first rounded to what the rows are multiplied with.
    fn evaluate(&self, mut point: Vec<f64>) -> Result<Eval> {
        self.cancel.check()?;
        let d = self.mean.len();
        let w: Vec<T::Acc> = point[..d].iter().map(|v| T::Acc::from_f64(*v)).collect();
        (point.iter_mut().zip(&w)).for_each(|(p, w)| *p = w.to_f64());
        let offset = point[d] - inner(&point[..d], self.mean);
        let count = self.rows.len();
        let step = count.div_ceil(PIECES).next_multiple_of(NARROW);
        let bytes = count * d * size_of::<T>();
        let parts = par::map(bytes, par::ranges(count, step), |range| {
            dispatch(Pass {
                problem: self,
                w: &w,
                offset,
                range,
            })
        });
        let (mut value, mut slope) = (0.5 * self.ridge * inner(&point[..d], &point[..d]), 0.0);
        let mut gradient = vec![0.0; d + 1];
        for part in &parts {
            value += part.value;
            slope += part.slope;
            add_scaled(&mut gradient, 1.0, &part.gradient);
        }
        add_scaled(&mut gradient, -slope, self.mean);
        add_scaled(&mut gradient[..d], self.ridge, &point[..d]);
        gradient[d] = slope;
        Ok(Eval {
            point,
            value,
            gradient,
        })
    }

    fn finish(&self, at: &Eval, decrement: f64, iterations: usize) -> Fit {
        let d = self.mean.len();
        let coef = at.point[..d].to_vec();
        let intercept = at.point[d] - inner(&coef, self.mean);
        let mut gradient = at.gradient.clone();
        add_scaled(&mut gradient, at.gradient[d], self.mean);
        Fit {
            intercept,
            loss: at.value,
            gradient: length(&gradient),
            decrement,
            iterations,
            converged: self.small(decrement, at.value),
            coef,
        }
    }

    /// L-BFGS (Nocedal 1980) from `start`, in the metric given; leaves the last point in `start`.
    fn quasi_newton(&self, metric: &Metric, start: &mut Vec<f64>) -> Result<Fit> {
        if start.is_empty() {
            start.resize(self.mean.len(), 0.0);
            start.push(self.null_intercept());
        }
        let mut at = self.evaluate(std::mem::take(start))?;
        let mut solved = metric.solve(&at.gradient);
        let mut pairs: VecDeque<Pair> = VecDeque::with_capacity(MEMORY);
        let (mut iterations, mut decrement);
        iterations = 0;
        loop {
            let mut step = direction(&at.gradient, &solved, &pairs);
            let mut slope = inner(&step, &at.gradient);
            if slope >= 0.0 {
                pairs.clear();
                step = solved.iter().map(|v| -v).collect();
                slope = inner(&step, &at.gradient);
            }
            decrement = (-slope).max(0.0).sqrt();
            // The metric alone says nothing of how far its scale is off, so one step is always taken.
            if (iterations > 0 && self.small(decrement, at.value))
                || decrement == 0.0
                || iterations == self.options.max_iter
            {
                break;
            }
            let Some(next) = self.search(&at, &step, slope)? else {
                break;
            };
            iterations += 1;
            let next_solved = metric.solve(&next.gradient);
            let pair = Pair::between(&at, &next, &solved, &next_solved);
            if pair.curvature > 1e-12 * length(&pair.step) * length(&pair.change) {
                if pairs.len() == MEMORY {
                    pairs.pop_front();
                }
                pairs.push_back(pair);
            }
            (at, solved) = (next, next_solved);
        }
        let fit = self.finish(&at, decrement, iterations);
        *start = at.point;
        Ok(fit)
    }

    /// A point along `step` that is lower and less steep. The slope along a line only rises, so its zero is bracketed
    /// and approached by secants. `None` where rounding hides all descent.
    fn search(&self, from: &Eval, step: &[f64], slope: f64) -> Result<Option<Eval>> {
        let noise = match size_of::<T::Acc>() {
            8 => 1e-14,
            _ => 1e-8,
        } * from.value;
        let (mut low, mut low_slope, mut high) = (0.0, slope, None);
        let mut t = 1.0;
        for _ in 0..TRIALS {
            let mut point = from.point.clone();
            add_scaled(&mut point, t, step);
            let next = self.evaluate(point)?;
            let found = inner(step, &next.gradient);
            let lower = next.value <= from.value + 1e-4 * t * slope + noise;
            if lower && found.abs() <= -0.9 * slope {
                return Ok((next.point != from.point).then_some(next));
            }
            if lower && found < 0.0 {
                (low, low_slope) = (t, found);
            } else {
                high = Some((t, found));
            }
            t = match high {
                None => 4.0 * t,
                Some((end, above)) => {
                    let secant = low_slope / (low_slope - above);
                    let share = if above > 0.0 { secant } else { 0.5 };
                    low + (end - low) * share.clamp(0.1, 0.9)
                }
            };
        }
        Ok(None)
    }

    /// Newton's method over `w = Σ α_i (x_i − mean)`: iteratively reweighted least squares with the products of the rows.
    fn newton(&self, products: &[f64], stride: usize, start: &mut Vec<f64>) -> Result<Fit> {
        let n = self.rows.len();
        let mut k = vec![0.0; n * n];
        for (line, i) in k.chunks_exact_mut(n).zip(self.rows) {
            let from = &products[*i as usize * stride..][..stride];
            (line.iter_mut().zip(self.rows)).for_each(|(k, j)| *k = from[*j as usize]);
        }
        let times = |v: &[f64]| -> Vec<f64> {
            par::map(n * n * 8, par::ranges(n, NARROW), |rows| {
                dispatch(Times { k: &k, v, rows })
            })
            .concat()
        };
        if start.is_empty() {
            start.resize(n, 0.0);
            start.push(self.null_intercept());
        }
        let (mut alpha, mut b) = (start[..n].to_vec(), start[n]);
        let mut fitted = times(&alpha);
        let value = |alpha: &[f64], fitted: &[f64], b: f64| {
            let z = fitted.iter().map(|f| f + b);
            let sum: f64 = (z.zip(&self.y).zip(&self.weight))
                .map(|((z, y), c)| c * self.options.loss.at(*y, z)[0])
                .sum();
            0.5 * self.ridge * inner(alpha, fitted) + sum
        };
        let mut at = value(&alpha, &fitted, b);
        let mut iterations = 0;
        let decrement = loop {
            self.cancel.check()?;
            let parts: Vec<[f64; 3]> = (fitted.iter().zip(&self.y).zip(&self.weight))
                .map(|((f, y), c)| self.options.loss.at(*y, f + b).map(|v| c * v))
                .collect();
            // (K + λ D⁻¹) α + b = z − D⁻¹ r with Σ α = 0, made symmetric by the root of D, which also keeps it bounded.
            let root: Vec<f64> = (parts.iter().zip(&self.weight))
                .map(|(p, c)| p[2].max(1e-20 * c).sqrt())
                .collect();
            let lower = self.weighted(&k, &root)?;
            let solve = |mut v: Vec<f64>| {
                lower.solve(&mut v);
                v.iter().zip(&root).map(|(v, r)| v * r).collect::<Vec<_>>()
            };
            let target = (root.iter().zip(&parts).zip(&fitted))
                .map(|((r, p), f)| r * (f + b) - p[1] / r)
                .collect();
            let (mut wanted, ones) = (solve(target), solve(root.clone()));
            let intercept = wanted.iter().sum::<f64>() / ones.iter().sum::<f64>();
            add_scaled(&mut wanted, -intercept, &ones);
            let (mut step, shift) = (wanted, intercept - b);
            add_scaled(&mut step, -1.0, &alpha);
            let moved = times(&step);
            let slope: f64 = (moved.iter().zip(&parts).zip(&alpha))
                .map(|((m, p), a)| (m + shift) * p[1] + self.ridge * m * a)
                .sum();
            let decrement = (-slope).max(0.0).sqrt();
            if self.small(decrement, at) || iterations == self.options.max_iter {
                break decrement;
            }
            let mut t = 1.0;
            let mut lower_found = None;
            for _ in 0..TRIALS {
                let (mut a, mut f) = (alpha.clone(), fitted.clone());
                add_scaled(&mut a, t, &step);
                add_scaled(&mut f, t, &moved);
                let next = value(&a, &f, b + t * shift);
                if next <= at + 1e-4 * t * slope + 1e-14 * at {
                    lower_found = Some((a, f, next));
                    break;
                }
                t *= 0.5;
            }
            let Some(found) = lower_found else {
                break decrement;
            };
            (alpha, fitted, at) = found;
            b += t * shift;
            iterations += 1;
        };
        let fit = self.combine(&alpha, b, at, decrement, iterations)?;
        start[..n].copy_from_slice(&alpha);
        start[n] = b;
        Ok(fit)
    }

    /// The factor of `λ I + D^½ K D^½`.
    fn weighted(&self, k: &[f64], root: &[f64]) -> Result<Lower<f64>> {
        let n = root.len();
        let mut b = vec![0.0; n * n];
        let lines: Vec<(usize, &mut [f64])> = b.chunks_exact_mut(n).enumerate().collect();
        par::for_each(n * n * 8, lines, |(i, line)| {
            for (j, b) in line.iter_mut().enumerate().skip(i) {
                *b = root[i] * k[i * n + j] * root[j];
            }
            line[i] += self.ridge;
        });
        Lower::of(&mut b, n, 1e-14 * self.ridge)
            .ok_or_else(|| Error::degenerate("x", "the products of the rows overflow"))
    }

    /// The fit whose weights are a combination of the rows.
    fn combine(
        &self,
        alpha: &[f64],
        b: f64,
        loss: f64,
        decrement: f64,
        iterations: usize,
    ) -> Result<Fit> {
        let d = self.mean.len();
        let columns = par::map(self.rows.len() * d * 8, par::ranges(d, BLOCK), |range| {
            let mut sum = vec![0.0; range.len()];
            for (i, a) in self.rows.iter().zip(alpha) {
                let row = &self.x.row(*i as usize)[range.clone()];
                for ((s, v), m) in sum.iter_mut().zip(row).zip(&self.mean[range.clone()]) {
                    *s += a * (v.load().to_f64() - m);
                }
            }
            sum
        });
        let coef = columns.concat();
        let intercept = b - inner(&coef, self.mean);
        let found = self.evaluate([coef.clone(), vec![b]].concat())?;
        let gradient = self.finish(&found, decrement, iterations).gradient;
        Ok(Fit {
            coef,
            intercept,
            loss,
            gradient,
            decrement,
            iterations,
            converged: self.small(decrement, loss),
        })
    }
}

/// A step, the change of the gradient along it, and the same in the metric.
struct Pair {
    step: Vec<f64>,
    change: Vec<f64>,
    solved: Vec<f64>,
    curvature: f64,
}

impl Pair {
    fn between(from: &Eval, to: &Eval, solved: &[f64], to_solved: &[f64]) -> Self {
        let minus = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect::<Vec<_>>();
        let (step, change) = (
            minus(&to.point, &from.point),
            minus(&to.gradient, &from.gradient),
        );
        Self {
            curvature: inner(&step, &change),
            solved: minus(to_solved, solved),
            step,
            change,
        }
    }
}

/// The two-loop recursion. Everything it needs of the metric is linear in gradients that it was already applied to.
fn direction(gradient: &[f64], solved: &[f64], pairs: &VecDeque<Pair>) -> Vec<f64> {
    let (mut left, mut out) = (gradient.to_vec(), solved.to_vec());
    let mut shares = Vec::with_capacity(pairs.len());
    for pair in pairs.iter().rev() {
        let share = inner(&pair.step, &left) / pair.curvature;
        add_scaled(&mut left, -share, &pair.change);
        add_scaled(&mut out, -share, &pair.solved);
        shares.push(share);
    }
    if let Some(last) = pairs.back() {
        let scale = last.curvature / inner(&last.change, &last.solved);
        if scale > 0.0 && scale.is_finite() {
            out.iter_mut().for_each(|v| *v *= scale);
        }
    }
    for (pair, share) in pairs.iter().zip(shares.into_iter().rev()) {
        let back = inner(&pair.change, &out) / pair.curvature;
        add_scaled(&mut out, share - back, &pair.step);
    }
    out.iter_mut().for_each(|v| *v = -*v);
    out
}

/// Sums of one range of rows.
struct Part {
    value: f64,
    slope: f64,
    gradient: Vec<f64>,
}

struct Pass<'a, T: Element> {
    problem: &'a Problem<'a, T>,
    w: &'a [T::Acc],
    offset: f64,
    range: Range<usize>,
}

impl<T: Element> Kernel for Pass<'_, T> {
    type Output = Part;
    #[inline(always)]
    fn run(self) -> Part {
        let p = self.problem;
        let d = self.w.len();
        let mut out = Part {
            value: 0.0,
            slope: 0.0,
            gradient: vec![0.0; d],
        };
        let mut narrow = vec![T::Acc::ZERO; d];
        let mut start = self.range.start;
        while start < self.range.end {
            let end = (start + NARROW).min(self.range.end);
            for group in (start..end).step_by(GROUP) {
                let mut slopes = [T::Acc::ZERO; GROUP];
                let mut rows = [&p.x.row(p.rows[group] as usize)[..d]; GROUP];
                for (k, i) in (group..end.min(group + GROUP)).enumerate() {
                    rows[k] = &p.x.row(p.rows[i] as usize)[..d];
                    let z = dot(rows[k], self.w) + self.offset;
                    let [value, slope, _] = p.options.loss.at(p.y[i], z);
                    out.value += p.weight[i] * value;
                    out.slope += p.weight[i] * slope;
                    slopes[k] = T::Acc::from_f64(p.weight[i] * slope);
                }
                add_group(&mut narrow, rows, slopes);
            }
            for (g, v) in out.gradient.iter_mut().zip(&mut narrow) {
                *g += v.to_f64();
                *v = T::Acc::ZERO;
            }
            start = end;
        }
        out
    }
}

#[inline(always)]
fn add_group<T: Element>(sum: &mut [T::Acc], rows: [&[T]; GROUP], by: [T::Acc; GROUP]) {
    let n = sum.len();
    let [a, b, c, d] = rows.map(|r| &r[..n]);
    for (j, s) in sum.iter_mut().enumerate() {
        *s += (by[0] * a[j].load() + by[1] * b[j].load())
            + (by[2] * c[j].load() + by[3] * d[j].load());
    }
}

struct Times<'a> {
    k: &'a [f64],
    v: &'a [f64],
    rows: Range<usize>,
}

impl Kernel for Times<'_> {
    type Output = Vec<f64>;
    #[inline(always)]
    fn run(self) -> Vec<f64> {
        let n = self.v.len();
        self.rows
            .map(|i| dot(&self.k[i * n..(i + 1) * n], self.v))
            .collect()
    }
}

/// A Cholesky factor, its columns from the diagonal down one after another.
struct Lower<R> {
    packed: Vec<R>,
    size: usize,
}

impl<R: Gemm + Element<Acc = R>> Lower<R> {
    /// Of the symmetric matrix whose lower triangle stands in `a`, column by column. `jitter` is added to the diagonal,
    /// ten times more after every failure.
    fn of(a: &mut [R], size: usize, jitter: f64) -> Option<Self> {
        let mut jitter = jitter;
        for _ in 0..8 {
            for i in 0..size {
                a[i * size + i] += R::from_f64(jitter);
            }
            if let Ok(found) = MatRef::from_column_major_slice(a, size, size).llt(Side::Lower) {
                let l = found.L();
                let mut packed = Vec::with_capacity(size * (size + 1) / 2);
                for j in 0..size {
                    packed.extend(l.col(j).subrows(j, size - j).iter().copied());
                }
                return (packed.iter().all(|v| Real::is_finite(*v)))
                    .then_some(Self { packed, size });
            }
            jitter *= 10.0;
        }
        None
    }

    /// Overwrites `v` with the solution of `L Lᵀ u = v`.
    fn solve(&self, v: &mut [R]) {
        dispatch(Substitute { lower: self, v });
    }
}

struct Substitute<'a, R> {
    lower: &'a Lower<R>,
    v: &'a mut [R],
}

impl<R: Element<Acc = R> + Real> Kernel for Substitute<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let n = self.lower.size;
        let mut start = 0;
        for j in 0..n {
            let column = &self.lower.packed[start..start + n - j];
            let x = self.v[j] / column[0];
            self.v[j] = x;
            for (v, l) in self.v[j + 1..n].iter_mut().zip(&column[1..]) {
                *v -= x * *l;
            }
            start += n - j;
        }
        for j in (0..n).rev() {
            start -= n - j;
            let column = &self.lower.packed[start..start + n - j];
            let below = R::from_f64(dot(&column[1..], &self.v[j + 1..n]));
            self.v[j] = (self.v[j] - below) / column[0];
        }
    }
}

/// `(x_i − mean)·(x_j − mean)` of all pairs of rows, in f64, a slab of columns at a time.
fn row_products<T: Element>(x: &Rows<'_, T>, mean: &[f64], cancel: &Cancel) -> Result<Vec<f64>> {
    let (n, d) = (x.rows(), x.width());
    let mut pairs = block_pairs::<f64>(n);
    for columns in par::ranges(d, SLAB) {
        cancel.check()?;
        let width = columns.len();
        let mut slab = vec![0.0; n * width];
        let lines: Vec<(usize, &mut [f64])> = slab.chunks_exact_mut(width).enumerate().collect();
        par::for_each(n * width * 8, lines, |(i, line)| {
            let row = &x.row(i)[columns.clone()];
            for ((z, v), m) in line.iter_mut().zip(row).zip(&mean[columns.clone()]) {
                *z = v.load().to_f64() - m;
            }
        });
        let part = |r: &Range<usize>| Mat::dense(&slab[r.start * width..], r.len(), width);
        par::for_each(n * n * 8, pairs.iter_mut().collect(), |pair| {
            let (a, b) = (part(&pair.low), part(&pair.high));
            a_bt(pair.out(), a, b);
        });
    }
    let mut out = assemble(&pairs, n);
    for i in 0..n {
        for j in 0..i {
            out[i * n + j] = out[j * n + i];
        }
    }
    Ok(out)
}

/// One block of a symmetric matrix of products.
struct BlockPair<R> {
    low: Range<usize>,
    high: Range<usize>,
    data: Vec<R>,
}

impl<R> BlockPair<R> {
    fn out(&mut self) -> Out<'_, R> {
        Out {
            stride: self.high.len(),
            data: &mut self.data,
            add: true,
        }
    }
}

fn block_pairs<R: Real>(size: usize) -> Vec<BlockPair<R>> {
    let blocks = par::ranges(size, BLOCK);
    (blocks.iter().enumerate())
        .flat_map(|(i, low)| blocks[i..].iter().map(|high| (low.clone(), high.clone())))
        .map(|(low, high)| BlockPair {
            data: vec![R::ZERO; low.len() * high.len()],
            low,
            high,
        })
        .collect()
}

/// The rows of the upper triangle, which are the columns of the lower one.
fn assemble<R: Real>(pairs: &[BlockPair<R>], size: usize) -> Vec<R> {
    let mut out = vec![R::ZERO; size * size];
    for pair in pairs {
        for (i, line) in pair
            .low
            .clone()
            .zip(pair.data.chunks_exact(pair.high.len()))
        {
            out[i * size + pair.high.start..i * size + pair.high.end].copy_from_slice(line);
        }
    }
    out
}

/// Weighted mean of `a aᵀ` over a sample of rows, `a = [(x − mean) / deviation, 1]`, in f32.
struct Columns {
    matrix: Vec<f32>,
    deviation: Vec<f64>,
}

/// Rows of the sample: enough for a metric within a small factor of the Hessian, fewer than a read of all would cost.
fn sample(n: usize, d: usize) -> Vec<u32> {
    let m = n.min((4 * d).clamp(1024, 8192).max(2 * d));
    (0..m).map(|k| (k * n / m) as u32).collect()
}

fn columns<T: Element>(
    x: &Rows<'_, T>,
    y: &[f64],
    mean: &[f64],
    options: &Options,
    cancel: &Cancel,
) -> Result<Columns> {
    let d = x.width();
    let size = d + 1;
    let chosen = sample(x.rows(), d);
    let classes = class_weights(y, 0..y.len(), options.balanced);
    let weights: Vec<f64> = (chosen.iter())
        .map(|i| classes[usize::from(y[*i as usize] > 0.0)])
        .collect();
    let total: f64 = weights.iter().sum();
    let bytes = chosen.len() * d * size_of::<T>();
    let squares = par::map(bytes, par::ranges(chosen.len(), BLOCK), |range| {
        dispatch(Squares {
            x,
            mean,
            rows: &chosen[range.clone()],
            weights: &weights[range],
        })
    });
    let mut deviation = vec![0.0; d];
    for part in &squares {
        add_scaled(&mut deviation, 1.0 / total, part);
    }
    deviation.iter_mut().for_each(|v| {
        *v = match v.sqrt() {
            s if s > 0.0 && s.is_finite() => s,
            _ => 1.0,
        }
    });
    deviation.push(1.0);
    let inverse: Vec<f64> = deviation.iter().map(|s| 1.0 / s).collect();
    let mut pairs = block_pairs::<f32>(size);
    let mut slab = vec![0.0f32; SLAB.min(chosen.len()) * size];
    for range in par::ranges(chosen.len(), SLAB) {
        cancel.check()?;
        let lines: Vec<_> = (slab.chunks_exact_mut(size).zip(range.clone())).collect();
        par::for_each(range.len() * size * 4, lines, |(line, k)| {
            dispatch(Standardise {
                row: x.row(chosen[k] as usize),
                mean,
                inverse: &inverse,
                root: (weights[k] / total).sqrt(),
                out: line,
            });
        });
        let part = |c: &Range<usize>| Mat::strided(&slab[c.start..], range.len(), c.len(), size);
        par::for_each(usize::MAX, pairs.iter_mut().collect(), |pair| {
            let (a, b) = (part(&pair.low), part(&pair.high));
            at_b(pair.out(), a, b);
        });
    }
    Ok(Columns {
        matrix: assemble(&pairs, size),
        deviation,
    })
}

struct Squares<'a, T: Element> {
    x: &'a Rows<'a, T>,
    mean: &'a [f64],
    rows: &'a [u32],
    weights: &'a [f64],
}

impl<T: Element> Kernel for Squares<'_, T> {
    type Output = Vec<f64>;
    #[inline(always)]
    fn run(self) -> Vec<f64> {
        let mut sum = vec![0.0; self.mean.len()];
        for (i, weight) in self.rows.iter().zip(self.weights) {
            for ((s, v), m) in sum.iter_mut().zip(self.x.row(*i as usize)).zip(self.mean) {
                let c = v.load().to_f64() - m;
                *s += weight * c * c;
            }
        }
        sum
    }
}

struct Standardise<'a, T> {
    row: &'a [T],
    mean: &'a [f64],
    inverse: &'a [f64],
    root: f64,
    out: &'a mut [f32],
}

impl<T: Element> Kernel for Standardise<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let d = self.row.len();
        for (((z, v), m), s) in (self.out.iter_mut().zip(self.row).zip(self.mean)).zip(self.inverse)
        {
            *z = (self.root * (v.load().to_f64() - m) * s) as f32;
        }
        self.out[d] = self.root as f32;
    }
}

/// An approximation of the Hessian that is easily solved with.
enum Metric {
    /// `unit · S L Lᵀ S`, S the deviations.
    Factor {
        lower: Lower<f32>,
        deviation: Vec<f64>,
        unit: f64,
    },
    Diagonal(Vec<f64>),
}

impl Metric {
    fn factor<T: Element>(columns: &Columns, problem: &Problem<'_, T>) -> Result<Self> {
        let size = columns.deviation.len();
        let unit = problem.options.loss.curvature() * problem.weight.iter().sum::<f64>();
        let mut a = columns.matrix.clone();
        for (i, s) in columns.deviation[..size - 1].iter().enumerate() {
            a[i * size + i] += (problem.ridge / (unit * s * s)).min(1e30) as f32;
        }
        let lower = Lower::of(&mut a, size, f64::from(JITTER))
            .ok_or_else(|| Error::degenerate("x", "the covariance of the rows overflows"))?;
        Ok(Self::Factor {
            lower,
            deviation: columns.deviation.clone(),
            unit,
        })
    }

    fn diagonal<T: Element>(problem: &Problem<'_, T>) -> Result<Self> {
        let d = problem.mean.len();
        let bytes = problem.rows.len() * d * size_of::<T>();
        let parts = par::map(bytes, par::ranges(problem.rows.len(), BLOCK), |range| {
            dispatch(Squares {
                x: problem.x,
                mean: problem.mean,
                rows: &problem.rows[range.clone()],
                weights: &problem.weight[range],
            })
        });
        let curvature = problem.options.loss.curvature();
        let mut out = vec![problem.ridge; d];
        parts
            .iter()
            .for_each(|p| add_scaled(&mut out, curvature, p));
        out.push(curvature * problem.weight.iter().sum::<f64>());
        Ok(Self::Diagonal(out))
    }

    fn solve(&self, gradient: &[f64]) -> Vec<f64> {
        match self {
            Self::Diagonal(v) => gradient.iter().zip(v).map(|(g, v)| g / v).collect(),
            Self::Factor {
                lower,
                deviation,
                unit,
            } => {
                // Scaled to its own size first: f32 would lose the gradient near the optimum.
                let scaled: Vec<f64> = gradient.iter().zip(deviation).map(|(g, s)| g / s).collect();
                let largest = scaled.iter().fold(f64::MIN_POSITIVE, |m, v| m.max(v.abs()));
                let mut v: Vec<f32> = scaled.iter().map(|v| (v / largest) as f32).collect();
                lower.solve(&mut v);
                let back = largest / unit;
                (v.iter().zip(deviation))
                    .map(|(v, s)| f64::from(*v) * back / s)
                    .collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::par::{num_threads, set_num_threads};
    use proptest::prelude::*;

    const OPTIONS: Options = Options {
        loss: Loss::Logistic,
        balanced: false,
        tol: 1e-11,
        max_iter: 500,
    };

    fn all(n: usize) -> Vec<Vec<u32>> {
        vec![(0..n as u32).collect()]
    }

    fn one<T: Element>(x: &[T], d: usize, y: &[f64], strength: f64, options: &Options) -> Fit {
        let rows = Rows::matrix(x, d);
        let sets = all(y.len());
        let mut fits = fit(&rows, y, &[strength], &sets, options, &Cancel::new()).unwrap();
        fits.remove(0).remove(0)
    }

    /// Gradient of the objective in `(w, b)` by plain loops.
    fn gradient(x: &[f64], d: usize, y: &[f64], c: f64, ridge: f64, loss: Loss, f: &Fit) -> f64 {
        let mut g: Vec<f64> = f.coef.iter().map(|w| ridge * w).collect();
        g.push(0.0);
        for (row, y) in x.chunks_exact(d).zip(y) {
            let z = inner(row, &f.coef) + f.intercept;
            let slope = match loss {
                Loss::Logistic => -y / (1.0 + (y * z).exp()),
                Loss::Squared => z - y,
            };
            add_scaled(&mut g, c * slope, row);
            g[d] += c * slope;
        }
        length(&g)
    }

    #[test]
    fn known_optima() {
        let x = [
            1.0, 0.5, 2.0, -0.5, 0.0, 1.5, -1.0, 0.0, -2.0, -1.0, 0.5, -0.5,
        ];
        let y = [1.0, 1.0, 1.0, -1.0, -1.0, -1.0];
        let f = one(&x, 2, &y, 1.0, &OPTIONS);
        assert!((f.coef[0] - 0.876_919_446_146).abs() < 1e-11);
        assert!((f.coef[1] - 0.740_336_387_522).abs() < 1e-11);
        assert!((f.intercept + 0.203_214_804_794).abs() < 1e-11);
        let squared = Options {
            loss: Loss::Squared,
            ..OPTIONS
        };
        let f = one(&x, 2, &y, 1.0, &squared);
        assert!((f.coef[0] - 0.435_946_462_715).abs() < 1e-11);
        assert!((f.coef[1] - 0.491_013_384_321).abs() < 1e-11);
        assert!((f.intercept + 0.036_328_871_892_9).abs() < 1e-11);
    }

    #[test]
    fn bad_arguments_and_cancelling() {
        let (x, y) = ([1.0, 2.0, f64::NAN, 4.0], [1.0, -1.0, 1.0, -1.0]);
        let run = |x: &[f64], y: &[f64], c: f64, cancel: &Cancel| {
            fit(&Rows::matrix(x, 1), y, &[c], &all(4), &OPTIONS, cancel).unwrap_err()
        };
        let none = Cancel::new();
        assert!(matches!(
            run(&x, &y, 1.0, &none),
            Error::NonFinite { index: 2, .. }
        ));
        let x = [1.0, 2.0, 3.0, 4.0];
        assert!(matches!(
            run(&x, &[1.0; 4], 1.0, &none),
            Error::Degenerate { .. }
        ));
        assert!(matches!(run(&x, &y[..3], 1.0, &none), Error::Shape { .. }));
        for c in [0.0, f64::INFINITY, f64::NAN] {
            assert!(matches!(run(&x, &y, c, &none), Error::Value { .. }));
        }
        let stopped = Cancel::new();
        stopped.cancel();
        assert_eq!(run(&x, &y, 1.0, &stopped), Error::Interrupted);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_gradient_vanishes_and_threads_change_no_bit(
            n in 4usize..200,
            d in 1usize..60,
            strength in 0.01f64..50.0,
            squared in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let value = |i: usize| {
                let bits = seed.wrapping_add(i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                ((bits ^ (bits >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40) as f64 / 8_388_608.0 - 1.0
            };
            let x: Vec<f64> = (0..n * d).map(|i| value(i) * (1 + i % d) as f64 + 3.0).collect();
            let y: Vec<f64> = (0..n)
                .map(|i| if i % 2 == 0 { 1.0 } else { -1.0 })
                .collect();
            let loss = if squared { Loss::Squared } else { Loss::Logistic };
            // The loss to its last bit: a decrement of 1e-8 is the root of that.
            let options = Options { loss, tol: 1e-8, ..OPTIONS };
            let before = num_threads();
            let fits: Vec<Fit> = [1, 2, 3]
                .into_iter()
                .map(|threads| {
                    set_num_threads(threads);
                    one(&x, d, &y, strength, &options)
                })
                .collect();
            set_num_threads(before);
            prop_assert!(fits.windows(2).all(|w| w[0] == w[1]));
            let f = &fits[0];
            let (c, ridge) = if squared { (1.0, strength) } else { (strength, 1.0) };
            prop_assert!(f.converged);
            let size = (n * d) as f64 * c.max(1.0);
            prop_assert!(gradient(&x, d, &y, c, ridge, loss, f) < 1e-7 * size, "{}", f.gradient);
        }
    }
}
