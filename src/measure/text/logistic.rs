//! Logistic regression on sparse rows: two classes by one vector of weights, more by one for each (softmax).
//!
//! Minimises `½‖W‖² + Σ c_i ℓ_i(x_i W + b)` with `c_i = C s_{y_i}`, ℓ the negative log likelihood of the class of the row; b is
//! free of penalty, or penalised like a weight of a constant 1 (LIBLINEAR's form). Newton's method, the steps by conjugate
//! gradients (Lin, Weng, Keerthi 2008, with a line search) under a diagonal preconditioner: the Hessian is never formed.
//!
//! The penalty makes the objective 1-strongly convex in W, so the length of the gradient bounds the distance of W from the
//! optimum: that is what `tol` speaks of.
//!
//! Rows are kept by row and by column, each product is cut at fixed places, and each output element is one sum in order:
//! the number of threads changes no bit.

use crate::cancel::Cancel;
use crate::linalg::{add_scaled, inner};
use crate::{Error, Result, par};

/// Rows or columns of one work item, at least.
const BLOCK: usize = 256;
/// Steps of conjugate gradients within one Newton step.
const INNER: usize = 500;
/// Trials of one line search.
const TRIALS: usize = 40;

/// Sparse rows: `indices` and `data` of row i at `indptr[i]..indptr[i + 1]`.
#[derive(Debug, Clone, Copy)]
pub struct Sparse<'a> {
    pub indptr: &'a [i64],
    pub indices: &'a [i32],
    pub data: &'a [f64],
    pub columns: usize,
}

impl Sparse<'_> {
    /// # Errors
    /// `Shape`, `Value`: the three arrays do not describe a matrix of `columns` columns; `NonFinite`.
    pub fn check(&self) -> Result<()> {
        let (n, indptr) = (self.indices.len(), self.indptr);
        if self.data.len() != n {
            return Err(Error::shape(
                "data",
                format!("{n} elements, as indices"),
                self.data.len(),
            ));
        }
        let ordered = indptr.windows(2).all(|w| w[0] <= w[1]);
        if indptr.first() != Some(&0) || indptr.last() != Some(&(n as i64)) || !ordered {
            let expected = format!("non-decreasing offsets from 0 to {n}");
            return Err(Error::value("indptr", expected, "others"));
        }
        if let Some(bad) = self
            .indices
            .iter()
            .find(|j| **j < 0 || **j as usize >= self.columns)
        {
            return Err(Error::value(
                "indices",
                format!("0 to {}", self.columns),
                bad,
            ));
        }
        if let Some(index) = self.data.iter().position(|v| !v.is_finite()) {
            let found = self.data[index];
            return Err(Error::NonFinite {
                arg: "x",
                index,
                found,
            });
        }
        Ok(())
    }

    pub fn rows(&self) -> usize {
        self.indptr.len() - 1
    }

    fn row(&self, i: usize) -> impl Iterator<Item = (usize, f64)> + '_ {
        let range = self.indptr[i] as usize..self.indptr[i + 1] as usize;
        let columns = self.indices[range.clone()].iter().map(|j| *j as usize);
        columns.zip(self.data[range].iter().copied())
    }

    /// `x W + b`, `k` values a row; `w` holds `k` values a column.
    pub fn times(&self, w: &[f64], b: &[f64]) -> Vec<f64> {
        let k = b.len();
        let parts = par::map(12 * k * self.data.len(), blocks(self.rows()), |range| {
            let mut out = Vec::with_capacity(range.len() * k);
            for i in range {
                match k {
                    1 => out.push(b[0] + self.row(i).map(|(j, v)| v * w[j]).sum::<f64>()),
                    _ => {
                        let at = out.len();
                        out.extend_from_slice(b);
                        for (j, v) in self.row(i) {
                            (out[at..].iter_mut().zip(&w[j * k..])).for_each(|(o, w)| *o += v * w);
                        }
                    }
                }
            }
            out
        });
        parts.concat()
    }
}

fn blocks(len: usize) -> Vec<std::ops::Range<usize>> {
    par::ranges(len, len.div_ceil(64).max(BLOCK))
}

/// The same matrix by columns.
struct Columns {
    starts: Vec<usize>,
    rows: Vec<u32>,
    data: Vec<f64>,
}

impl Columns {
    fn of(x: &Sparse<'_>) -> Self {
        let mut starts = vec![0; x.columns + 1];
        x.indices.iter().for_each(|j| starts[*j as usize + 1] += 1);
        for j in 0..x.columns {
            starts[j + 1] += starts[j];
        }
        let (mut next, n) = (starts.clone(), x.data.len());
        let (mut rows, mut data) = (vec![0; n], vec![0.0; n]);
        for i in 0..x.rows() {
            for (j, v) in x.row(i) {
                (rows[next[j]], data[next[j]]) = (i as u32, v);
                next[j] += 1;
            }
        }
        Self { starts, rows, data }
    }

    /// `Σ_i f(x_ij) r_ik` for each column j and k: `k` values a column.
    fn times(&self, r: &[f64], k: usize, f: impl Fn(f64) -> f64 + Sync) -> Vec<f64> {
        let columns = self.starts.len() - 1;
        let parts = par::map(12 * k * self.data.len(), blocks(columns), |range| {
            let mut out = vec![0.0; range.len() * k];
            for (out, j) in out.chunks_exact_mut(k).zip(range) {
                let held = self.starts[j]..self.starts[j + 1];
                for (i, v) in self.rows[held.clone()].iter().zip(&self.data[held]) {
                    let (v, r) = (f(*v), &r[*i as usize * k..][..k]);
                    (out.iter_mut().zip(r)).for_each(|(o, r)| *o += v * r);
                }
            }
            out
        });
        parts.concat()
    }
}

/// How to fit.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Weight of the loss against the penalty.
    pub c: f64,
    /// Weights rows by `n / (classes · n_class)`.
    pub balanced: bool,
    pub penalize_intercept: bool,
    /// Converged where the gradient is at most `tol · max(1, ‖W‖)` long.
    pub tol: f64,
    pub max_iter: usize,
}

/// A fitted model: `k` weights a column, k = 1 for two classes (positive towards the second), else one for each.
#[derive(Debug, Clone, PartialEq)]
pub struct Fit {
    pub coef: Vec<f64>,
    pub intercept: Vec<f64>,
    pub loss: f64,
    pub gradient: f64,
    pub iterations: usize,
    pub converged: bool,
}

/// Fits `y` (class numbers below `classes`) on the rows of `x`.
///
/// # Errors
/// `Shape`, `Value`, `NonFinite`: arguments that do not fit; `Degenerate`: a class without rows, or one class only;
/// `Interrupted`.
pub fn fit(
    x: &Sparse<'_>,
    y: &[u32],
    classes: usize,
    options: &Options,
    cancel: &Cancel,
) -> Result<Fit> {
    x.check()?;
    if y.len() != x.rows() {
        return Err(Error::shape(
            "y",
            format!("{} labels, one per row", x.rows()),
            y.len(),
        ));
    }
    if let Some(bad) = y.iter().find(|c| **c as usize >= classes) {
        return Err(Error::value("y", format!("below {classes}"), bad));
    }
    let mut counts = vec![0u64; classes];
    y.iter().for_each(|c| counts[*c as usize] += 1);
    if classes < 2 || counts.contains(&0) {
        return Err(Error::degenerate(
            "y",
            "expected rows of two classes or more",
        ));
    }
    for (arg, v) in [("C", options.c), ("tol", options.tol)] {
        if !(v > 0.0 && v.is_finite()) {
            return Err(Error::value(arg, "a finite number above 0", v));
        }
    }
    if options.max_iter == 0 {
        return Err(Error::value("max_iter", "1 or more", 0));
    }
    let n = y.len() as f64;
    let weight = (y.iter())
        .map(|c| match options.balanced {
            true => options.c * n / (classes as f64 * counts[*c as usize] as f64),
            false => options.c,
        })
        .collect();
    let problem = Problem {
        x,
        columns: Columns::of(x),
        y,
        k: if classes == 2 { 1 } else { classes },
        weight,
        ridge: if options.penalize_intercept { 1.0 } else { 0.0 },
        options,
        cancel,
    };
    problem.newton()
}

struct Problem<'a> {
    x: &'a Sparse<'a>,
    columns: Columns,
    y: &'a [u32],
    k: usize,
    weight: Vec<f64>,
    /// Penalty of the intercept.
    ridge: f64,
    options: &'a Options,
    cancel: &'a Cancel,
}

/// A point, its objective, and what the rows say there: slopes and probabilities, `k` a row.
struct Eval {
    point: Vec<f64>,
    fitted: Vec<f64>,
    value: f64,
    slopes: Vec<f64>,
    probabilities: Vec<f64>,
}

impl Problem<'_> {
    /// Adds to `row` the loss; `z` becomes the slopes, `p` the probabilities.
    fn row_loss(&self, class: u32, weight: f64, z: &mut [f64], p: &mut [f64]) -> f64 {
        if let ([z], [p]) = (&mut z[..], &mut p[..]) {
            let sign = if class == 1 { 1.0 } else { -1.0 };
            let margin = sign * *z;
            let e = (-margin.abs()).exp();
            let wrong = if margin >= 0.0 { e } else { 1.0 } / (1.0 + e);
            *p = e / ((1.0 + e) * (1.0 + e));
            *z = -sign * weight * wrong;
            return weight * ((-margin).max(0.0) + e.ln_1p());
        }
        let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let own = z[class as usize];
        p.iter_mut()
            .zip(&*z)
            .for_each(|(p, z)| *p = (z - most).exp());
        let sum: f64 = p.iter().sum();
        p.iter_mut().for_each(|p| *p /= sum);
        z.iter_mut().zip(&*p).for_each(|(z, p)| *z = weight * p);
        z[class as usize] -= weight;
        weight * (sum.ln() + most - own)
    }

    fn at(&self, point: Vec<f64>, fitted: Vec<f64>) -> Eval {
        let k = self.k;
        let parts = par::map(64 * fitted.len(), blocks(self.y.len()), |range| {
            let mut slopes = fitted[range.start * k..range.end * k].to_vec();
            let mut probabilities = vec![0.0; slopes.len()];
            let rows = slopes
                .chunks_exact_mut(k)
                .zip(probabilities.chunks_exact_mut(k));
            let loss = (rows.zip(range))
                .map(|((z, p), i)| self.row_loss(self.y[i], self.weight[i], z, p))
                .sum::<f64>();
            (loss, slopes, probabilities)
        });
        let (w, b) = point.split_at(point.len() - k);
        let mut value = 0.5 * (inner(w, w) + self.ridge * inner(b, b));
        let (mut slopes, mut probabilities) = (Vec::new(), Vec::new());
        for (loss, s, p) in parts {
            value += loss;
            slopes.extend(s);
            probabilities.extend(p);
        }
        Eval {
            point,
            fitted,
            value,
            slopes,
            probabilities,
        }
    }

    /// `Xᵀ r` with the sums of r after it, and the penalty's share of `v`.
    fn back(&self, r: &[f64], v: &[f64]) -> Vec<f64> {
        let mut out = self.columns.times(r, self.k, |x| x);
        let (w, b) = v.split_at(out.len());
        add_scaled(&mut out, 1.0, w);
        for (k, b) in b.iter().enumerate() {
            let sum: f64 = r.iter().skip(k).step_by(self.k).sum();
            out.push(sum + self.ridge * b);
        }
        out
    }

    /// What the Hessian of the losses makes of changes `z` of the fitted values.
    fn curve(&self, at: &Eval, z: &mut [f64]) {
        let k = self.k;
        let rows = z.chunks_exact_mut(k).zip(at.probabilities.chunks_exact(k));
        for ((z, p), c) in rows.zip(&self.weight) {
            match k {
                1 => z[0] *= c * p[0],
                _ => {
                    let mean = inner(z, p);
                    z.iter_mut()
                        .zip(p)
                        .for_each(|(z, p)| *z = c * p * (*z - mean));
                }
            }
        }
    }

    fn times(&self, v: &[f64]) -> Vec<f64> {
        let (w, b) = v.split_at(v.len() - self.k);
        self.x.times(w, b)
    }

    /// One over the diagonal of the Hessian.
    fn preconditioner(&self, at: &Eval) -> Vec<f64> {
        let k = self.k;
        let mut curves = at.probabilities.clone();
        for (p, c) in curves.chunks_exact_mut(k).zip(&self.weight) {
            p.iter_mut()
                .for_each(|p| *p = c * if k == 1 { *p } else { *p * (1.0 - *p) });
        }
        let mut out = self.columns.times(&curves, k, |x| x * x);
        out.iter_mut().for_each(|v| *v = 1.0 / (1.0 + *v));
        for class in 0..k {
            let sum: f64 = curves.iter().skip(class).step_by(k).sum();
            out.push(1.0 / (self.ridge + sum).max(1e-12));
        }
        out
    }

    /// A step that solves Newton's equations to `share` of the gradient, and its change of the fitted values.
    fn step(&self, at: &Eval, gradient: &[f64], share: f64) -> Result<(Vec<f64>, Vec<f64>)> {
        let scale = self.preconditioner(at);
        let solve = |r: &[f64]| -> Vec<f64> { r.iter().zip(&scale).map(|(r, s)| r * s).collect() };
        let mut residual: Vec<f64> = gradient.iter().map(|g| -g).collect();
        let (mut step, mut moved) = (vec![0.0; residual.len()], vec![0.0; at.fitted.len()]);
        let target = share * inner(&residual, &residual).sqrt();
        let mut search = solve(&residual);
        let mut power = inner(&residual, &search);
        for _ in 0..INNER {
            self.cancel.check()?;
            let change = self.times(&search);
            let mut curved = change.clone();
            self.curve(at, &mut curved);
            let product = self.back(&curved, &search);
            let curvature = inner(&search, &product);
            if curvature <= 0.0 || !curvature.is_finite() {
                break;
            }
            let length = power / curvature;
            add_scaled(&mut step, length, &search);
            add_scaled(&mut moved, length, &change);
            add_scaled(&mut residual, -length, &product);
            if inner(&residual, &residual).sqrt() <= target {
                break;
            }
            let solved = solve(&residual);
            let next = inner(&residual, &solved);
            let ratio = next / power;
            power = next;
            (search.iter_mut().zip(&solved)).for_each(|(s, r)| *s = r + ratio * *s);
        }
        Ok((step, moved))
    }

    fn newton(&self) -> Result<Fit> {
        let size = self.x.columns * self.k;
        let mut at = self.at(vec![0.0; size + self.k], vec![0.0; self.y.len() * self.k]);
        let (mut iterations, mut first, mut before) = (0, None, f64::INFINITY);
        let (gradient, converged) = loop {
            self.cancel.check()?;
            let gradient = self.back(&at.slopes, &at.point);
            let length = inner(&gradient, &gradient).sqrt();
            let w = &at.point[..size];
            if length <= self.options.tol * inner(w, w).sqrt().max(1.0) {
                break (length, true);
            }
            // After a step that the objective could not judge: rounding hides all descent.
            if iterations == self.options.max_iter || length >= before {
                break (length, false);
            }
            let start = *first.get_or_insert(length);
            let share = (length / start).sqrt().min(0.1);
            let (step, moved) = self.step(&at, &gradient, share)?;
            let slope = inner(&step, &gradient);
            // Where the fall is lost in the rounding of the objective, Newton's step is taken and the gradient judges it.
            let small = -slope <= 1e-10 * at.value.abs();
            before = if small { length } else { f64::INFINITY };
            let mut t = 1.0;
            let mut found = None;
            for _ in 0..TRIALS {
                let (mut point, mut fitted) = (at.point.clone(), at.fitted.clone());
                add_scaled(&mut point, t, &step);
                add_scaled(&mut fitted, t, &moved);
                let next = self.at(point, fitted);
                if small || next.value <= at.value + 1e-4 * t * slope {
                    found = Some(next);
                    break;
                }
                t *= 0.5;
            }
            match found {
                Some(next) if next.point != at.point => at = next,
                _ => break (length, false),
            }
            iterations += 1;
            self.cancel.advance(1);
        };
        let intercept = at.point.split_off(size);
        Ok(Fit {
            coef: at.point,
            intercept,
            loss: at.value,
            gradient,
            iterations,
            converged,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OPTIONS: Options = Options {
        c: 2.0,
        balanced: false,
        penalize_intercept: false,
        tol: 1e-9,
        max_iter: 100,
    };

    /// A dense table as sparse rows.
    fn sparse(dense: &[f64], columns: usize) -> (Vec<i64>, Vec<i32>, Vec<f64>) {
        let (mut indptr, mut indices, mut data) = (vec![0], Vec::new(), Vec::new());
        for row in dense.chunks_exact(columns) {
            for (j, v) in row.iter().enumerate().filter(|(_, v)| **v != 0.0) {
                indices.push(j as i32);
                data.push(*v);
            }
            indptr.push(indices.len() as i64);
        }
        (indptr, indices, data)
    }

    /// The objective, written out.
    fn objective(
        dense: &[f64],
        columns: usize,
        y: &[u32],
        classes: usize,
        o: &Options,
        w: &[f64],
        b: &[f64],
    ) -> f64 {
        let k = b.len();
        let mut total = 0.5 * w.iter().map(|v| v * v).sum::<f64>();
        if o.penalize_intercept {
            total += 0.5 * b.iter().map(|v| v * v).sum::<f64>();
        }
        for (row, class) in dense.chunks_exact(columns).zip(y) {
            let n = y.iter().filter(|c| *c == class).count() as f64;
            let s = if o.balanced {
                y.len() as f64 / (classes as f64 * n)
            } else {
                1.0
            };
            let z: Vec<f64> = (0..k)
                .map(|c| {
                    b[c] + row
                        .iter()
                        .enumerate()
                        .map(|(j, v)| v * w[j * k + c])
                        .sum::<f64>()
                })
                .collect();
            let logits = if k == 1 { vec![0.0, z[0]] } else { z };
            let sum = logits.iter().map(|z| z.exp()).sum::<f64>().ln();
            total += o.c * s * (sum - logits[*class as usize]);
        }
        total
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn no_neighbour_is_lower(
            rows in 6usize..30,
            columns in 1usize..8,
            classes in 2usize..4,
            balanced: bool,
            penalize_intercept: bool,
            seed in any::<u32>(),
        ) {
            let value = |i: usize| {
                let v = (u64::from(seed) + i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                if v.is_multiple_of(3) { 0.0 } else { (v % 1000) as f64 / 250.0 - 2.0 }
            };
            let dense: Vec<f64> = (0..rows * columns).map(value).collect();
            let y: Vec<u32> = (0..rows).map(|i| (i % classes) as u32).collect();
            let (indptr, indices, data) = sparse(&dense, columns);
            let x = Sparse { indptr: &indptr, indices: &indices, data: &data, columns };
            let o = Options { balanced, penalize_intercept, ..OPTIONS };
            let found = fit(&x, &y, classes, &o, &Cancel::new()).unwrap();
            prop_assert!(found.converged, "{:?}", found);
            let value = |w: &[f64], b: &[f64]| objective(&dense, columns, &y, classes, &o, w, b);
            let best = value(&found.coef, &found.intercept);
            prop_assert!((best - found.loss).abs() <= 1e-10 * best.abs().max(1.0));
            for i in 0..found.coef.len() {
                for d in [-1e-3, 1e-3] {
                    let mut w = found.coef.clone();
                    w[i] += d;
                    prop_assert!(value(&w, &found.intercept) > best);
                }
            }
            for d in [-1e-2, 1e-2] {
                let mut b = found.intercept.clone();
                b[0] += d;
                prop_assert!(value(&found.coef, &b) > best);
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (indptr, indices, data) = ([0, 1, 2], [0, 1], [1.0, 2.0]);
        let x = Sparse {
            indptr: &indptr,
            indices: &indices,
            data: &data,
            columns: 2,
        };
        let run = |x: Sparse<'_>, y: &[u32], o: Options| {
            fit(&x, y, 2, &o, &Cancel::new()).unwrap_err().to_string()
        };
        assert!(run(x, &[0], OPTIONS).contains("2 labels"));
        assert!(run(x, &[0, 2], OPTIONS).contains("below 2"));
        assert!(run(x, &[1, 1], OPTIONS).contains("two classes"));
        assert!(
            run(
                x,
                &[0, 1],
                Options {
                    c: f64::INFINITY,
                    ..OPTIONS
                }
            )
            .contains("C")
        );
        assert!(
            run(
                x,
                &[0, 1],
                Options {
                    tol: 0.0,
                    ..OPTIONS
                }
            )
            .contains("tol")
        );
        assert!(
            run(
                x,
                &[0, 1],
                Options {
                    max_iter: 0,
                    ..OPTIONS
                }
            )
            .contains("max_iter")
        );
        assert!(run(Sparse { columns: 1, ..x }, &[0, 1], OPTIONS).contains("indices"));
        assert!(
            run(
                Sparse {
                    data: &[1.0, f64::NAN],
                    ..x
                },
                &[0, 1],
                OPTIONS
            )
            .contains("non-finite")
        );
        assert!(
            run(
                Sparse {
                    indptr: &[0, 2, 1],
                    ..x
                },
                &[0, 1],
                OPTIONS
            )
            .contains("indptr")
        );
        let stopped = Cancel::new();
        stopped.cancel();
        assert_eq!(
            fit(&x, &[0, 1], 2, &OPTIONS, &stopped),
            Err(Error::Interrupted)
        );
    }
}
