//! Linear models that know what they would be without a few of their training records.
//!
//! `F(θ) = Σ ℓ_i(x_i·θ) + ½ Σ λ_j θ_j²` with squared or logistic loss, its minimum θ and Hessian H. Records S are deleted
//! in one of three ways: by influence, `θ + H⁻¹ Σ_S g_i`; by one Newton step, `θ + H_{−S}⁻¹ Σ_S g_i`, which is exact for
//! squared loss; or by fitting again. [`Deletion::bound`] is a lower bound of `q·θ_{−S}` for every S of at most k records.

use crate::cancel::Cancel;
use crate::linalg::gemm::{Mat as Block, Out, at_b};
use crate::linalg::{add_scaled, inner};
use crate::{Error, Result, par};
use faer::linalg::solvers::{Llt, Solve};
use faer::{Mat, MatMut, MatRef, Side};
use std::ops::Range;

/// Rows read at once, and the most pieces that hold a matrix of their own.
const ROWS: usize = 1024;
const PIECES: usize = 16;
/// A step whose squared decrement is below this, relative to the objective, is the last one.
const SETTLED: f64 = 1e-18;
const MAX_STEPS: usize = 200;

/// What is summed over the records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// `½ (z − y)²`.
    Squared,
    /// `log(1 + e^z) − y z`, y 0 or 1.
    Logistic,
}

impl Loss {
    /// Loss, first and second derivative in `z`.
    fn at(self, y: f64, z: f64) -> [f64; 3] {
        match self {
            Self::Squared => [0.5 * (z - y) * (z - y), z - y, 1.0],
            Self::Logistic => {
                let e = (-z.abs()).exp();
                let p = if z >= 0.0 { 1.0 } else { e } / (1.0 + e);
                let value = z.max(0.0) + e.ln_1p() - y * z;
                [value, p - y, e / ((1.0 + e) * (1.0 + e))]
            }
        }
    }
}

/// How a deletion is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// First order.
    Influence,
    /// One Newton step; exact for squared loss.
    Newton,
    /// The minimum without the records.
    Refit,
}

/// Constants of the lower bound for k deletions; see [`Deletion::constants`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Constants {
    /// Sum of the k largest leverages: `H_{−S} ⪰ (1 − τ) H`.
    pub leverage: f64,
    /// Sum of the k largest `‖g_i‖` in the metric of H⁻¹.
    pub gradient: f64,
    /// What `‖b_S‖` is multiplied with: the change of curvature that S makes itself.
    pub cross: f64,
    /// What `‖q‖` in the metric of H⁻¹ is multiplied with: the loss is no parabola. Infinite where nothing is certain.
    pub curved: f64,
    /// Largest `‖θ_{−S} − θ‖`, by strong convexity; infinite where a coefficient is not penalised.
    pub radius: f64,
}

/// Which lower bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// First order less what second order can take away.
    Local,
    /// `q·θ − ρ_k ‖q‖`.
    Convex,
}

struct At {
    value: f64,
    gradient: Vec<f64>,
    slope: Vec<f64>,
    curvature: Vec<f64>,
}

/// A fitted model with the factor of its Hessian.
#[derive(Debug)]
pub struct Deletion {
    rows: usize,
    width: usize,
    x: Vec<f64>,
    y: Vec<f64>,
    loss: Loss,
    penalty: Vec<f64>,
    theta: Vec<f64>,
    /// `g_i = slope_i x_i`, `∇²ℓ_i = curvature_i x_i x_iᵀ`.
    slope: Vec<f64>,
    curvature: Vec<f64>,
    factor: Llt<f64>,
    /// `x_iᵀ H⁻¹ x_i`.
    spread: Vec<f64>,
    steps: usize,
}

impl Deletion {
    /// Fits the model to `x` (`y.len()` × `penalty.len()`), whose last column may be one of ones.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`, `Value` for labels or penalties outside their domain, `Degenerate` where the minimum is not
    /// unique or does not exist (collinear columns, separable classes, no penalty).
    pub fn fit(
        x: Vec<f64>,
        y: Vec<f64>,
        penalty: Vec<f64>,
        loss: Loss,
        cancel: &Cancel,
    ) -> Result<Self> {
        let (rows, width) = (y.len(), penalty.len());
        if rows == 0 || width == 0 || x.len() != rows * width {
            let expected = format!("{rows} rows of {width} columns, both at least 1");
            return Err(Error::shape("x", expected, format!("{} values", x.len())));
        }
        for (arg, values) in [("x", &x), ("y", &y)] {
            if let Some(index) = values.iter().position(|v| !v.is_finite()) {
                let found = values[index];
                return Err(Error::NonFinite { arg, index, found });
            }
        }
        if let Some(bad) = penalty.iter().find(|v| !(v.is_finite() && **v >= 0.0)) {
            return Err(Error::value("penalty", "finite numbers of 0 or more", bad));
        }
        if loss == Loss::Logistic
            && let Some(bad) = y.iter().find(|v| **v != 0.0 && **v != 1.0)
        {
            return Err(Error::value("y", "labels 0 and 1", bad));
        }
        let empty = MatRef::<f64>::from_row_major_slice(&[1.0], 1, 1);
        let factor = (empty.llt(Side::Lower)).map_err(|_| undetermined())?;
        let mut this = Self {
            rows,
            width,
            x,
            y,
            loss,
            theta: vec![0.0; width],
            penalty,
            slope: Vec::new(),
            curvature: Vec::new(),
            factor,
            spread: Vec::new(),
            steps: 0,
        };
        (this.theta, this.steps) = this.minimize(vec![0.0; width], &[], cancel)?;
        let at = this.at(&this.theta, &[]);
        this.factor = this.hessian(&at.curvature)?;
        (this.slope, this.curvature) = (at.slope, at.curvature);
        let l = this.factor.L();
        let pieces = par::map(this.bytes(), par::ranges(rows, ROWS), |r| {
            let mut part = this.part(&r).to_vec();
            let mut v = MatMut::from_column_major_slice_mut(&mut part, width, r.len());
            l.solve_lower_triangular_in_place(v.as_mut());
            part.chunks_exact(width)
                .map(|c| inner(c, c))
                .collect::<Vec<f64>>()
        });
        this.spread = pieces.concat();
        Ok(this)
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn width(&self) -> usize {
        self.width
    }

    /// The minimum.
    pub fn theta(&self) -> &[f64] {
        &self.theta
    }

    /// Newton steps that the fit took.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// `∇²ℓ_i` in the metric of H⁻¹, per record: between 0 and 1, in sum at most the number of columns.
    pub fn leverages(&self) -> Vec<f64> {
        let both = self.curvature.iter().zip(&self.spread);
        both.map(|(w, s)| w * s).collect()
    }

    /// What the deletion of each record alone adds to `q·θ`, to first order.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`.
    pub fn effects(&self, q: &[f64]) -> Result<Vec<f64>> {
        let z = self.toward(q)?;
        Ok(self
            .products(&z)
            .zip(&self.slope)
            .map(|(p, s)| p * s)
            .collect())
    }

    /// θ without the records `set`.
    ///
    /// # Errors
    /// `Value` for a record that is not there or named twice, `Degenerate` where the rest determines no θ.
    pub fn without(&self, set: &[usize], how: How, cancel: &Cancel) -> Result<Vec<f64>> {
        self.check(set)?;
        let mut pull = vec![0.0; self.width];
        for &i in set {
            add_scaled(&mut pull, self.slope[i], self.row(i));
        }
        let step = match how {
            How::Influence => self.solve(&pull),
            How::Newton | How::Refit => self.solve_without(set, &pull)?,
        };
        let theta = self.theta.iter().zip(&step).map(|(a, b)| a + b).collect();
        if how == How::Refit && self.loss == Loss::Logistic {
            return Ok(self.minimize(theta, set, cancel)?.0);
        }
        Ok(theta)
    }

    /// The at most `k` records whose deletion lowers `q·θ` most, to first order; with `corrected`, by what each does
    /// alone after a Newton step, which is exact for squared loss and k = 1. Ascending.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`.
    pub fn worst(&self, q: &[f64], k: usize, corrected: bool) -> Result<Vec<usize>> {
        let mut effects = self.effects(q)?;
        if corrected {
            for (e, l) in effects.iter_mut().zip(self.leverages()) {
                // A record that determines a coefficient alone has leverage 1.
                *e /= (1.0 - l).max(1e-12);
            }
        }
        let mut chosen = largest(&effects, k, |e| -e);
        chosen.retain(|i| effects[*i] < 0.0);
        chosen.sort_unstable();
        Ok(chosen)
    }

    /// As [`Deletion::worst`], one record after the other: each is chosen for the model that is left after one Newton step
    /// without those before, then each is put back and chosen again, twice. Finds what records do together.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`.
    pub fn pursue(&self, q: &[f64], k: usize, cancel: &Cancel) -> Result<Vec<usize>> {
        self.toward(q)?;
        let mut set = Vec::new();
        let mut best = (inner(q, &self.theta), Vec::new());
        let k = k.min(self.rows - 1);
        for turn in 0..3 * k {
            if turn >= k && !set.is_empty() {
                set.remove(0);
            }
            cancel.check()?;
            // Where the rest determines nothing, the search ends with what it has.
            let Ok(theta) = self.without(&set, How::Newton, cancel) else {
                break;
            };
            let Ok(z) = self.solve_without(&set, q) else {
                break;
            };
            let at = self.at(&theta, &set);
            let effects: Vec<f64> = self
                .products(&z)
                .enumerate()
                .map(|(i, p)| p * at.slope[i] / (1.0 - at.curvature[i] * self.spread[i]).max(0.05))
                .collect();
            match largest(&effects, 1, |e| -e)[..] {
                [i] if effects[i] < 0.0 => set.push(i),
                _ => continue,
            }
            if let Ok(theta) = self.without(&set, How::Newton, cancel) {
                let value = inner(q, &theta);
                if value < best.0 {
                    best = (value, set.clone());
                }
            }
        }
        best.1.sort_unstable();
        Ok(best.1)
    }

    /// The set of at most `k` records whose deletion makes `q·θ` least, and that value, by fitting again for every set.
    ///
    /// # Errors
    /// `Value` for more than `limit` sets; as [`Deletion::without`].
    pub fn exhaust(
        &self,
        q: &[f64],
        k: usize,
        limit: usize,
        cancel: &Cancel,
    ) -> Result<(f64, Vec<usize>)> {
        self.toward(q)?;
        let k = k.min(self.rows);
        let (mut sets, mut count) = (1.0f64, 1.0f64);
        for i in 0..k {
            count *= (self.rows - i) as f64 / (i + 1) as f64;
            sets += count;
        }
        if sets > limit as f64 {
            return Err(Error::value(
                "limit",
                format!("at least {sets:.0}, the number of sets"),
                limit,
            ));
        }
        let firsts: Vec<usize> = (0..self.rows).collect();
        let found = par::try_map(self.bytes() * sets as usize, firsts, |first| {
            let mut best = (f64::INFINITY, Vec::new());
            let mut set = vec![first];
            self.branch(q, k, &mut set, &mut best, cancel)?;
            Ok(best)
        })?;
        let start = (inner(q, &self.theta), Vec::new());
        Ok(found
            .into_iter()
            .fold(start, |a, b| if b.0 < a.0 { b } else { a }))
    }

    fn branch(
        &self,
        q: &[f64],
        k: usize,
        set: &mut Vec<usize>,
        best: &mut (f64, Vec<usize>),
        cancel: &Cancel,
    ) -> Result<()> {
        if set.len() > k {
            return Ok(());
        }
        cancel.check()?;
        let value = inner(q, &self.without(set, How::Refit, cancel)?);
        if value < best.0 {
            *best = (value, set.clone());
        }
        for next in set[set.len() - 1] + 1..self.rows {
            set.push(next);
            self.branch(q, k, set, best, cancel)?;
            set.pop();
        }
        Ok(())
    }

    /// Constants of the bounds for at most `k` deletions.
    ///
    /// With `τ` the sum of the k largest leverages, `H_{−S} ⪰ (1 − τ) H`. Let ν be `‖Σ_S g_i‖` in the metric of
    /// `H_{−S}⁻¹`. Within a distance δ in the metric of `H_{−S}`, `|x_i·u| ≤ t_i = δ ‖x_i‖`, and self-concordance of the
    /// logistic loss (third derivative at most the second) keeps every curvature within a factor `e^{t_i}`; so the Hessian
    /// changes by at most `κ(δ)` relative to `H_{−S}`: the largest `e^{t_i} − 1` of some records plus the leverages of the
    /// others times theirs, whichever division is best. If `ν ≤ (1 − κ(δ)) δ` the minimum is within δ, and the Newton step
    /// misses it by at most δ times the mean of κ on the way. For squared loss it misses nothing.
    pub fn constants(&self, k: usize) -> Constants {
        let leverages = self.leverages();
        let leverage = top_sum(&leverages, k);
        let both = self.slope.iter().zip(&self.spread);
        let norms: Vec<f64> = both.map(|(s, q)| s.abs() * q.sqrt()).collect();
        let gradient = top_sum(&norms, k);
        let rest = 1.0 - leverage;
        let (cross, curved) = if rest <= 0.0 {
            (f64::INFINITY, f64::INFINITY)
        } else {
            (
                leverage.sqrt() * gradient / rest,
                self.curved(gradient, rest),
            )
        };
        let least = self.penalty.iter().fold(f64::INFINITY, |m, v| m.min(*v));
        let lengths: Vec<f64> = (0..self.rows)
            .map(|i| self.slope[i].abs() * inner(self.row(i), self.row(i)).sqrt())
            .collect();
        Constants {
            leverage,
            gradient,
            cross,
            curved,
            radius: if least > 0.0 {
                top_sum(&lengths, k) / least
            } else {
                f64::INFINITY
            },
        }
    }

    /// What the Newton step may miss, times what turns a length in the metric of `H_{−S}` into one in that of H; see
    /// [`Deletion::constants`].
    fn curved(&self, gradient: f64, rest: f64) -> f64 {
        if self.loss == Loss::Squared || gradient == 0.0 {
            return 0.0;
        }
        let mut order: Vec<usize> = (0..self.rows).collect();
        order.sort_by(|a, b| self.spread[*b].total_cmp(&self.spread[*a]));
        let change = |delta: f64| {
            let (mut far, mut best) = (0.0, f64::INFINITY);
            for &i in &order {
                let (q, w) = (self.spread[i] / rest, self.curvature[i]);
                let grows = (q.sqrt() * delta).exp_m1();
                // Records farther out are summed, the others are no worse than this one.
                best = best.min(far + grows);
                far += q * (w * grows).min((0.25 - w).max(w));
                if far >= best {
                    break;
                }
            }
            best.min(far)
        };
        let nu = gradient / rest.sqrt();
        let mut delta = nu;
        for _ in 0..200 {
            let kept = 1.0 - change(delta);
            if kept <= 0.0 {
                return f64::INFINITY;
            }
            if nu <= kept * delta {
                // The change grows along the way, so that its upper sum bounds its mean.
                let parts = (1..=8).map(|j| change(delta * f64::from(j) / 8.0));
                return parts.sum::<f64>() / 8.0 * delta / rest.sqrt();
            }
            // A little more, so that the approach from below arrives.
            delta = nu / kept * (1.0 + 1e-6);
        }
        f64::INFINITY
    }

    /// A lower bound of `q·θ_{−S}` for every S of at most `k` records, concave in q, and its gradient; `None` where
    /// nothing is certain.
    ///
    /// `Local` is `q·θ + (sum of the k least effects below 0) − cross · (k largest b_i, in length) − curved · ‖q‖` with
    /// `b_i = √w_i x_iᵀ H⁻¹ q` and the length of q in the metric of H⁻¹.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`.
    pub fn bound(
        &self,
        q: &[f64],
        k: usize,
        kind: Kind,
        constants: &Constants,
    ) -> Result<Option<(f64, Vec<f64>)>> {
        let z = self.toward(q)?;
        let mut value = inner(q, &self.theta);
        let mut gradient = self.theta.clone();
        if kind == Kind::Convex {
            if constants.radius.is_infinite() {
                return Ok(None);
            }
            let length = inner(q, q).sqrt();
            value -= constants.radius * length;
            if length > 0.0 {
                add_scaled(&mut gradient, -constants.radius / length, q);
            }
            return Ok(Some((value, gradient)));
        }
        if constants.curved.is_infinite() || constants.cross.is_infinite() {
            return Ok(None);
        }
        let products: Vec<f64> = self.products(&z).collect();
        let effects: Vec<f64> = products
            .iter()
            .zip(&self.slope)
            .map(|(p, s)| p * s)
            .collect();
        let mut pull = vec![0.0; self.width];
        for i in largest(&effects, k, |e| -e) {
            if effects[i] < 0.0 {
                value += effects[i];
                add_scaled(&mut pull, self.slope[i], self.row(i));
            }
        }
        let weighted = products.iter().zip(&self.curvature);
        let b: Vec<f64> = weighted.map(|(p, w)| p * w.sqrt()).collect();
        let top = largest(&b, k, f64::abs);
        let length = top.iter().map(|i| b[*i] * b[*i]).sum::<f64>().sqrt();
        value -= constants.cross * length;
        if length > 0.0 {
            for i in top {
                let by = -constants.cross / length * b[i] * self.curvature[i].sqrt();
                add_scaled(&mut pull, by, self.row(i));
            }
        }
        add_scaled(&mut gradient, 1.0, &self.solve(&pull));
        let length = inner(q, &z).max(0.0).sqrt();
        value -= constants.curved * length;
        if length > 0.0 {
            add_scaled(&mut gradient, -constants.curved / length, &z);
        }
        Ok(Some((value, gradient)))
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.x[i * self.width..(i + 1) * self.width]
    }

    fn part(&self, rows: &Range<usize>) -> &[f64] {
        &self.x[rows.start * self.width..rows.end * self.width]
    }

    fn bytes(&self) -> usize {
        self.x.len() * size_of::<f64>()
    }

    /// `x_i · z` for every record.
    fn products<'a>(&'a self, z: &'a [f64]) -> impl Iterator<Item = f64> + 'a {
        let pieces = par::map(self.bytes(), par::ranges(self.rows, ROWS), move |r| {
            let rows = self.part(&r).chunks_exact(self.width);
            rows.map(|row| inner(row, z)).collect::<Vec<f64>>()
        });
        pieces.into_iter().flatten()
    }

    /// `H⁻¹ q`, q checked.
    fn toward(&self, q: &[f64]) -> Result<Vec<f64>> {
        if q.len() != self.width {
            let expected = format!("{} values", self.width);
            return Err(Error::shape("instance", expected, q.len()));
        }
        if let Some(index) = q.iter().position(|v| !v.is_finite()) {
            return Err(Error::NonFinite {
                arg: "instance",
                index,
                found: q[index],
            });
        }
        Ok(self.solve(q))
    }

    fn solve(&self, v: &[f64]) -> Vec<f64> {
        let mut out = v.to_vec();
        let view = MatMut::from_column_major_slice_mut(&mut out, self.width, 1);
        self.factor.solve_in_place(view);
        out
    }

    fn check(&self, set: &[usize]) -> Result<()> {
        if let Some(bad) = set.iter().find(|i| **i >= self.rows) {
            let expected = format!("records from 0 to {}", self.rows - 1);
            return Err(Error::value("records", expected, bad));
        }
        let mut sorted = set.to_vec();
        sorted.sort_unstable();
        match sorted.windows(2).find(|w| w[0] == w[1]) {
            Some(twice) => Err(Error::value("records", "every record once", twice[0])),
            None => Ok(()),
        }
    }

    /// `H_{−S}⁻¹ v`, by the identity of Woodbury: with `U = √W X_S`, `H⁻¹v + H⁻¹Uᵀ (I − U H⁻¹ Uᵀ)⁻¹ U H⁻¹ v`.
    fn solve_without(&self, set: &[usize], v: &[f64]) -> Result<Vec<f64>> {
        let mut out = self.solve(v);
        if set.is_empty() {
            return Ok(out);
        }
        let (s, d) = (set.len(), self.width);
        let rows: Vec<f64> = set
            .iter()
            .flat_map(|&i| {
                self.row(i)
                    .iter()
                    .map(move |x| x * self.curvature[i].sqrt())
            })
            .collect();
        let u = MatRef::from_row_major_slice(&rows, s, d);
        let h = self.factor.solve(u.transpose());
        let left = Mat::<f64>::identity(s, s) - u * &h;
        let factor = factorize(left.as_ref())?;
        let inner_products = u * MatRef::from_column_major_slice(&out, d, 1);
        let more = &h * factor.solve(&inner_products);
        (0..d).for_each(|j| out[j] += more[(j, 0)]);
        Ok(out)
    }

    fn at(&self, theta: &[f64], without: &[usize]) -> At {
        let mut gone = vec![false; self.rows];
        without.iter().for_each(|i| gone[*i] = true);
        let pieces = par::map(self.bytes(), par::ranges(self.rows, ROWS), |r| {
            let mut part = At {
                value: 0.0,
                gradient: vec![0.0; self.width],
                slope: vec![0.0; r.len()],
                curvature: vec![0.0; r.len()],
            };
            for i in r.clone().filter(|i| !gone[*i]) {
                let [value, slope, curvature] = self.loss.at(self.y[i], inner(self.row(i), theta));
                part.value += value;
                add_scaled(&mut part.gradient, slope, self.row(i));
                part.slope[i - r.start] = slope;
                part.curvature[i - r.start] = curvature;
            }
            part
        });
        let penalised = || self.penalty.iter().zip(theta).map(|(p, t)| p * t);
        let mut all = At {
            value: 0.5 * penalised().zip(theta).map(|(a, b)| a * b).sum::<f64>(),
            gradient: penalised().collect(),
            slope: Vec::with_capacity(self.rows),
            curvature: Vec::with_capacity(self.rows),
        };
        for part in pieces {
            all.value += part.value;
            add_scaled(&mut all.gradient, 1.0, &part.gradient);
            all.slope.extend(part.slope);
            all.curvature.extend(part.curvature);
        }
        all
    }

    fn hessian(&self, curvature: &[f64]) -> Result<Llt<f64>> {
        let d = self.width;
        let step = self.rows.div_ceil(PIECES).max(ROWS);
        let pieces = par::map(self.bytes() * d, par::ranges(self.rows, step), |range| {
            let mut sum = vec![0.0; d * d];
            for r in par::ranges(range.len(), ROWS) {
                let r = range.start + r.start..range.start + r.end;
                let mut scaled = self.part(&r).to_vec();
                for (row, w) in scaled.chunks_exact_mut(d).zip(&curvature[r.clone()]) {
                    row.iter_mut().for_each(|v| *v *= w);
                }
                let out = Out {
                    data: &mut sum,
                    stride: d,
                    add: true,
                };
                let rows = Block::dense(self.part(&r), r.len(), d);
                at_b(out, Block::dense(&scaled, r.len(), d), rows);
            }
            sum
        });
        let mut sum = vec![0.0; d * d];
        pieces.iter().for_each(|p| add_scaled(&mut sum, 1.0, p));
        (0..d).for_each(|j| sum[j * d + j] += self.penalty[j]);
        factorize(MatRef::from_row_major_slice(&sum, d, d))
    }

    /// Newton's method with step halving, on the records that are left.
    fn minimize(
        &self,
        mut theta: Vec<f64>,
        without: &[usize],
        cancel: &Cancel,
    ) -> Result<(Vec<f64>, usize)> {
        let mut at = self.at(&theta, without);
        for step in 1..=MAX_STEPS {
            cancel.check()?;
            let mut down = at.gradient.clone();
            let view = MatMut::from_column_major_slice_mut(&mut down, self.width, 1);
            self.hessian(&at.curvature)?.solve_in_place(view);
            let decrement = inner(&down, &at.gradient);
            let last = decrement <= SETTLED * (1.0 + at.value.abs());
            let mut size = 1.0;
            loop {
                let mut next = theta.clone();
                add_scaled(&mut next, -size, &down);
                let there = self.at(&next, without);
                // Near the minimum the fall is below the rounding of the objective.
                let near = decrement <= 1e-9 * (1.0 + at.value.abs());
                if near || there.value <= at.value - 1e-4 * size * decrement {
                    (theta, at) = (next, there);
                    break;
                }
                size *= 0.5;
                if size < 1e-12 {
                    return Err(undetermined());
                }
            }
            if last {
                // Between classes that a plane separates the loss is level long before the scores stand still.
                let moves = self.products(&down).fold(0.0f64, |m, z| m.max(z.abs()));
                return if moves < 1e-3 {
                    Ok((theta, step))
                } else {
                    Err(undetermined())
                };
            }
        }
        Err(undetermined())
    }
}

fn undetermined() -> Error {
    Error::degenerate(
        "penalty",
        "the records determine no coefficients (collinear columns, or classes that a plane separates); raise the penalty",
    )
}

/// The Cholesky factor, unless the matrix is singular to rounding.
fn factorize(matrix: MatRef<'_, f64>) -> Result<Llt<f64>> {
    let factor = matrix.llt(Side::Lower).map_err(|_| undetermined())?;
    for (i, l) in factor.L().diagonal().column_vector().iter().enumerate() {
        // The pivot is what remains of the diagonal entry.
        let cut = matrix[(i, i)] * f64::EPSILON * 8.0 * matrix.nrows() as f64;
        if !l.is_finite() || l * l <= cut {
            return Err(undetermined());
        }
    }
    Ok(factor)
}

/// Indices of the `k` largest values of `by`, ties to the lower index.
fn largest(values: &[f64], k: usize, by: impl Fn(f64) -> f64) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let before = |a: &usize, b: &usize| {
        let (x, y) = (by(values[*a]), by(values[*b]));
        y.total_cmp(&x).then(a.cmp(b))
    };
    if k < order.len() {
        order.select_nth_unstable_by(k, before);
        order.truncate(k);
    }
    order.sort_unstable_by(before);
    order
}

fn top_sum(values: &[f64], k: usize) -> f64 {
    largest(values, k, |v| v).iter().map(|i| values[*i]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const X: [f64; 12] = [1.0, 0.5, 2.0, 1.0, 0.0, 1.5, 1.0, -1.0, 3.0, 0.5, -1.0, 2.0];

    fn fitted(y: [f64; 6], loss: Loss) -> Deletion {
        Deletion::fit(X.to_vec(), y.to_vec(), vec![0.5; 2], loss, &Cancel::new()).unwrap()
    }

    fn close(a: &[f64], b: &[f64]) {
        assert_eq!(a.len(), b.len());
        for (a, b) in a.iter().zip(b) {
            assert!((a - b).abs() < 5e-12, "{a} {b}");
        }
    }

    #[test]
    fn ridge_without_records() {
        let m = fitted([1.0, 2.2, 0.3, 1.4, 3.1, -0.8], Loss::Squared);
        let without = |set: &[usize], how| m.without(set, how, &Cancel::new()).unwrap();
        close(m.theta(), &[1.019785655400, 0.073536685903]);
        for how in [How::Newton, How::Refit] {
            close(&without(&[1], how), &[1.004895960832, 0.061199510404]);
            close(&without(&[1, 4], how), &[0.941379310345, 0.037931034483]);
        }
        close(
            &without(&[1], How::Influence),
            &[1.009756899867, 0.065227145604],
        );
        close(
            &without(&[1, 4], How::Influence),
            &[1.009060541577, 0.065092984832],
        );
        assert_eq!(without(&[], How::Newton), m.theta());
    }

    #[test]
    fn logistic_without_records() {
        let m = fitted([1.0, 1.0, 0.0, 1.0, 1.0, 0.0], Loss::Logistic);
        let without = |set: &[usize], how| m.without(set, how, &Cancel::new()).unwrap();
        close(m.theta(), &[1.405332085091, -0.710122406528]);
        close(
            &without(&[1], How::Refit),
            &[1.203148090543, -0.804925869146],
        );
        close(
            &without(&[1], How::Influence),
            &[1.256338886736, -0.775994385529],
        );
        close(
            &without(&[1], How::Newton),
            &[1.184868675090, -0.807592366730],
        );
        close(
            &without(&[1, 4], How::Refit),
            &[1.067764828205, -0.831735111918],
        );
        close(
            &without(&[4, 1], How::Influence),
            &[1.212826884838, -0.779696702766],
        );
        close(
            &without(&[1, 4], How::Newton),
            &[1.057137637922, -0.831711103995],
        );
        close(&[m.constants(2).radius], &[1.348488962387]);
    }

    #[test]
    fn bad_input_is_refused() {
        let m = fitted([1.0, 1.0, 0.0, 1.0, 1.0, 0.0], Loss::Logistic);
        let cancel = Cancel::new();
        assert!(m.without(&[6], How::Newton, &cancel).is_err());
        assert!(m.without(&[1, 1], How::Newton, &cancel).is_err());
        assert!(m.effects(&[1.0]).is_err());
        assert!(m.effects(&[1.0, f64::NAN]).is_err());
        assert!(m.exhaust(&[1.0, 1.0], 3, 10, &cancel).is_err());
        let fit = |x: &[f64], y: &[f64], p: f64, loss| {
            Deletion::fit(x.to_vec(), y.to_vec(), vec![p], loss, &cancel)
        };
        assert!(fit(&[1.0, 2.0], &[0.0], 1.0, Loss::Squared).is_err());
        assert!(fit(&[1.0, f64::NAN], &[0.0, 1.0], 1.0, Loss::Squared).is_err());
        assert!(fit(&[1.0, 2.0], &[0.0, 2.0], 1.0, Loss::Logistic).is_err());
        assert!(fit(&[1.0, 2.0], &[0.0, 1.0], -1.0, Loss::Squared).is_err());
        assert!(fit(&[0.0, 0.0], &[0.0, 1.0], 0.0, Loss::Squared).is_err());
        // Separable classes without a penalty have no minimum.
        assert!(fit(&[-1.0, 1.0], &[0.0, 1.0], 0.0, Loss::Logistic).is_err());
        // The only record that determines the coefficient.
        let lone = fit(&[1.0, 0.0], &[1.0, 0.0], 0.0, Loss::Squared).unwrap();
        assert!(lone.without(&[0], How::Newton, &cancel).is_err());
    }

    #[test]
    fn more_deletions_than_columns_equal_a_fit_of_the_rest() {
        let y = [1.0, 2.2, 0.3, 1.4, 3.1, -0.8];
        let m = fitted(y, Loss::Squared);
        let rest = Deletion::fit(
            X[..4].to_vec(),
            y[..2].to_vec(),
            vec![0.5; 2],
            Loss::Squared,
            &Cancel::new(),
        );
        let gone = m.without(&[5, 2, 3, 4], How::Newton, &Cancel::new());
        close(&gone.unwrap(), rest.unwrap().theta());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn bounds_hold_for_every_set(
            seed in prop::collection::vec(-2.0f64..2.0, 12 * 3),
            q in prop::collection::vec(-2.0f64..2.0, 3),
            k in 1usize..4,
            logistic in any::<bool>(),
            penalty in 0.05f64..20.0,
        ) {
            let loss = if logistic { Loss::Logistic } else { Loss::Squared };
            let y: Vec<f64> = seed.chunks(3).map(|r| {
                let z = r[0] - 0.5 * r[1] + r[2] * r[2] - 0.4;
                if logistic { f64::from(u8::from(z > 0.0)) } else { z }
            }).collect();
            let cancel = Cancel::new();
            let m = Deletion::fit(seed, y, vec![penalty; 3], loss, &cancel).unwrap();
            let (exact, set) = m.exhaust(&q, k, 1000, &cancel).unwrap();
            prop_assert!(set.len() <= k);
            let constants = m.constants(k);
            for kind in [Kind::Local, Kind::Convex] {
                if let Some((bound, gradient)) = m.bound(&q, k, kind, &constants).unwrap() {
                    prop_assert!(bound <= exact + 1e-9, "{kind:?}: {bound} above {exact}");
                    // Concave: the tangent lies above, wherever it is looked at.
                    let there = [0.3, -1.0, 0.7];
                    let other = m.bound(&there, k, kind, &constants).unwrap().unwrap().0;
                    let step: Vec<f64> = there.iter().zip(&q).map(|(a, b)| a - b).collect();
                    prop_assert!(other <= bound + inner(&gradient, &step) + 1e-9);
                }
            }
            // One deletion by the corrected choice is exact for squared loss.
            if !logistic {
                let chosen = m.worst(&q, 1, true).unwrap();
                let theta = m.without(&chosen, How::Newton, &cancel).unwrap();
                let one = m.exhaust(&q, 1, 1000, &cancel).unwrap().0;
                prop_assert!((inner(&q, &theta) - one).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn threads_change_no_bit() {
        let (n, d) = (5000, 7);
        let x: Vec<f64> = (0..n * d)
            .map(|i| ((i * 7919 + 13) % 9973) as f64 / 4986.5 - 1.0)
            .collect();
        let y = (0..n).map(|i| f64::from(u8::from(x[i * d] + x[i * d + 1] > 0.1 * (i % 9) as f64)));
        let y: Vec<f64> = y.collect();
        let before = par::num_threads();
        let mut seen = Vec::new();
        for threads in [1, 2, 3] {
            par::set_num_threads(threads);
            let m = Deletion::fit(
                x.clone(),
                y.clone(),
                vec![1.0; d],
                Loss::Logistic,
                &Cancel::new(),
            );
            let m = m.unwrap();
            let constants = m.constants(3);
            let bound = m.bound(&x[..d], 3, Kind::Local, &constants).unwrap();
            seen.push((m.theta().to_vec(), m.leverages(), bound));
        }
        par::set_num_threads(before);
        assert!(seen.windows(2).all(|w| w[0] == w[1]));
        let total: f64 = seen[0].1.iter().sum();
        assert!(total < d as f64 && total > d as f64 - 1.0);
    }
}
