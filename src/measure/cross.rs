//! Streaming cross-moments of two representations of the same inputs: what linear CKA, canonical correlations and the
//! Procrustes similarity are made of.
//!
//! A slab of rows is centred once and multiplied by itself, both representations side by side, so that one triangle of
//! products holds `Σ x xᵀ`, `Σ y xᵀ` and `Σ y yᵀ`. Products are in the arithmetic type of the data (f32 for half types),
//! over at most [`SLAB`] rows; everything longer is summed in f64.

use crate::cancel::Cancel;
use crate::element::{Element, Real};
use crate::linalg::gemm::{self, Gemm, Mat, Out};
use crate::moments::{Moments, NonFinitePolicy};
use crate::simd::{Kernel, dispatch};
use crate::view::Rows;
use crate::{Error, Result, par};
use std::ops::Range;

/// Rows multiplied at once.
const SLAB: usize = 1024;
/// Rows centred as one piece of work.
const CHUNK: usize = 64;
/// Elements between a row of a slab and the next, beyond its length: rows a page apart would share cache sets.
const PAD: usize = 16;
/// Largest piece of the triangle that one product fills.
const STRIP: usize = 512;
const COLUMNS: usize = 1024;

/// Sums over the rows `z = (x, y)` seen so far, about the mean of the first batch.
#[derive(Debug, Clone)]
pub struct CrossMoments {
    p: usize,
    q: usize,
    rows: usize,
    shift: Vec<f64>,
    /// Powers of two that bring x and y near 1, where no product overflows or vanishes.
    scale: [f64; 2],
    /// `Σ z zᵀ`, of which the lower triangle counts.
    products: Vec<f64>,
    sums: Weighted,
    /// A cancelled update has left part of its rows in the sums.
    broken: bool,
}

/// With `a` and `b` the squared norms of the two halves of a row: `Σ z`, `Σ a z`, `Σ b z`, and sums of `a`, `b`, `ab`, `aa`
/// and `bb`.
#[derive(Debug, Clone)]
struct Weighted {
    z: [Vec<f64>; 3],
    norms: [f64; 5],
}

impl Weighted {
    fn new(d: usize) -> Self {
        Self {
            z: std::array::from_fn(|_| vec![0.0; d]),
            norms: [0.0; 5],
        }
    }

    fn add(&mut self, other: &Self) {
        for (to, from) in self.z.iter_mut().zip(&other.z) {
            to.iter_mut().zip(from).for_each(|(a, b)| *a += b);
        }
        for (a, b) in self.norms.iter_mut().zip(other.norms) {
            *a += b;
        }
    }
}

/// Self- and cross-dependence of two representations; their ratio is CKA.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dependence {
    pub xy: f64,
    pub xx: f64,
    pub yy: f64,
}

impl CrossMoments {
    /// For rows of `p` and `q` features.
    pub fn new(p: usize, q: usize) -> Self {
        let d = p + q;
        Self {
            p,
            q,
            rows: 0,
            shift: Vec::new(),
            scale: [1.0; 2],
            products: vec![0.0; d * d],
            sums: Weighted::new(d),
            broken: false,
        }
    }

    /// Rows seen.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Features of the two representations.
    pub fn widths(&self) -> (usize, usize) {
        (self.p, self.q)
    }

    /// Adds rows of both representations.
    ///
    /// # Errors
    /// `Shape`, `NonFinite`; nothing has been added then. `Interrupted`; the sums cannot be used any more then.
    pub fn update<T: Element<Acc: Gemm>>(
        &mut self,
        x: &Rows<'_, T>,
        y: &Rows<'_, T>,
        cancel: &Cancel,
    ) -> Result<()> {
        self.usable()?;
        if x.rows() != y.rows() {
            return Err(Error::shape(
                "y",
                format!("the {} rows of x", x.rows()),
                y.rows(),
            ));
        }
        let mut means = Vec::with_capacity(self.p + self.q);
        for (rows, width, arg) in [(x, self.p, "x"), (y, self.q, "y")] {
            if rows.width() != width {
                return Err(Error::shape(arg, format!("{width} features"), rows.width()));
            }
            let mut seen = Moments::new(width, false);
            seen.update(rows, None, NonFinitePolicy::Error, cancel)
                .map_err(|e| named(e, arg))?;
            means.extend_from_slice(seen.mean());
        }
        if x.rows() == 0 {
            return Ok(());
        }
        if self.rows == 0 {
            let (px, py) = means.split_at(self.p);
            self.scale = [scale(x, px), scale(y, py)];
            self.shift = means;
        }
        self.broken = true;
        for slab in par::ranges(x.rows(), SLAB) {
            cancel.check()?;
            self.add(x, y, slab);
            cancel.advance(1);
        }
        self.broken = false;
        self.rows += x.rows();
        Ok(())
    }

    fn usable(&self) -> Result<()> {
        if self.broken {
            let reason = "an interrupted update left part of its rows behind; start again";
            return Err(Error::degenerate("x, y", reason));
        }
        Ok(())
    }

    fn add<T: Element<Acc: Gemm>>(&mut self, x: &Rows<'_, T>, y: &Rows<'_, T>, slab: Range<usize>) {
        let (d, depth) = (self.p + self.q, slab.len());
        let pitch = d + PAD;
        let mut centred = vec![T::Acc::ZERO; depth * pitch];
        let (shift, scale) = (&self.shift, self.scale);
        let pieces = centred.chunks_mut(CHUNK * pitch).enumerate().collect();
        let bytes = depth * d * 8;
        let sums = par::map(bytes, pieces, |(i, to): (usize, &mut [T::Acc])| {
            let first = slab.start + i * CHUNK;
            dispatch(Centre {
                x,
                y,
                shift,
                scale,
                first,
                to,
                pitch,
            })
        });
        for part in &sums {
            self.sums.add(part);
        }
        // Eight strips or more where there is work for them; a short one still fills the registers of a product.
        let height = (d.div_ceil(8).next_multiple_of(64)).min(STRIP);
        let flops = depth.saturating_mul(d * d);
        par::for_each(
            flops,
            par::folded(&mut self.products, height * d),
            |strips| {
                let mut product = vec![T::Acc::ZERO; height * COLUMNS.min(d)];
                for (i, strip) in strips {
                    let (start, rows) = (i * height, strip.len() / d);
                    for left in (0..start + rows).step_by(COLUMNS) {
                        let cols = (start + rows - left).min(COLUMNS);
                        let out = Out {
                            data: &mut product[..rows * cols],
                            stride: cols,
                            add: false,
                        };
                        let a = Mat::strided(&centred[start..], depth, rows, pitch);
                        let b = Mat::strided(&centred[left..], depth, cols, pitch);
                        gemm::at_b(out, a, b);
                        for (to, from) in strip.chunks_exact_mut(d).zip(product.chunks_exact(cols))
                        {
                            dispatch(Accumulate(&mut to[left..left + cols], from));
                        }
                    }
                }
            },
        );
    }

    /// Element of `Σ z zᵀ` about the mean of all rows; `i >= j`.
    #[inline(always)]
    fn centred(&self, i: usize, j: usize) -> f64 {
        let s = &self.sums.z[0];
        self.products[i * (self.p + self.q) + j] - s[i] * s[j] / self.rows as f64
    }

    /// HSIC with linear kernels, up to one common factor: the biased estimate, or the U-statistic.
    ///
    /// # Errors
    /// `Shape` for fewer than 2 (unbiased: 4) rows, `Degenerate` if one representation does not vary.
    pub fn dependence(&self, unbiased: bool) -> Result<Dependence> {
        self.usable()?;
        let least = if unbiased { 4 } else { 2 };
        if self.rows < least {
            let expected = format!("{least} rows or more in all");
            return Err(Error::shape("x, y", expected, self.rows));
        }
        let (p, d) = (self.p, self.p + self.q);
        for (range, arg) in [(0..p, "x"), (p..d, "y")] {
            let largest = |f: &dyn Fn(usize) -> f64| range.clone().map(f).fold(0.0, f64::max);
            let about_shift = largest(&|i| self.products[i * d + i]);
            if largest(&|i| self.centred(i, i)) <= 1e-24 * about_shift.max(1e-300) {
                let reason =
                    "expected a representation that varies, got the same row for every input";
                return Err(Error::degenerate(arg, reason));
            }
        }
        let found = if unbiased {
            self.u_statistics()
        } else {
            self.squares()
        };
        if !(found.xy + found.xx + found.yy).is_finite() {
            let expected = "values near the size of the first batch's";
            return Err(Error::value("x, y", expected, "an overflow"));
        }
        Ok(found)
    }

    fn squares(&self) -> Dependence {
        let p = self.p;
        self.triangle(|i, j| {
            let c = self.centred(i, j);
            let weight = if i == j || (i >= p && j < p) {
                1.0
            } else {
                2.0
            };
            weight * c * c
        })
    }

    /// `Σ_{i ≠ j} K_ij L_ij + (1ᵀK1)(1ᵀL1) / ((n-1)(n-2)) - 2 / (n-2) · 1ᵀKL1` for Gram matrices with zero diagonals, written
    /// as sums over features: `K` has row sums `a·Σa - ‖a‖²`.
    fn u_statistics(&self) -> Dependence {
        let (p, n) = (self.p, self.rows as f64);
        let d = p + self.q;
        let [z, az, bz] = &self.sums.z;
        let [a, b, ab, aa, bb] = self.sums.norms;
        let traces = self.triangle(|i, j| {
            let c = self.products[i * d + j];
            let weight = if i == j || (i >= p && j < p) {
                1.0
            } else {
                2.0
            };
            weight * c * c
        });
        // Σz C Σz of each block.
        let mixed = self.triangle(|i, j| {
            let weight = if i == j || (i >= p && j < p) {
                1.0
            } else {
                2.0
            };
            weight * z[i] * self.products[i * d + j] * z[j]
        });
        let dot = |u: &[f64], v: &[f64]| u.iter().zip(v).map(|(u, v)| u * v).sum::<f64>();
        let (x, y) = (0..p, p..d);
        let total = |r: &Range<usize>, norm: f64| dot(&z[r.clone()], &z[r.clone()]) - norm;
        let (tx, ty) = (total(&x, a), total(&y, b));
        let one = |trace: f64, mixed: f64, u: f64, v: f64, norms: f64, totals: f64| {
            trace - norms + totals / ((n - 1.0) * (n - 2.0))
                - 2.0 / (n - 2.0) * (mixed - u - v + norms)
        };
        let at = |w: &[f64], r: &Range<usize>| dot(&z[r.clone()], &w[r.clone()]);
        Dependence {
            xy: one(traces.xy, mixed.xy, at(bz, &x), at(az, &y), ab, tx * ty),
            xx: one(traces.xx, mixed.xx, at(az, &x), at(az, &x), aa, tx * tx),
            yy: one(traces.yy, mixed.yy, at(bz, &y), at(bz, &y), bb, ty * ty),
        }
    }

    /// Sums of `f` over the lower triangle, by block.
    fn triangle(&self, f: impl Fn(usize, usize) -> f64 + Sync) -> Dependence {
        let (p, d) = (self.p, self.p + self.q);
        let rows = par::map(8 * d * d, (0..d).collect(), |i: usize| {
            let sum = |cols: Range<usize>| cols.map(|j| f(i, j)).sum::<f64>();
            if i < p {
                (sum(0..i + 1), 0.0)
            } else {
                (sum(0..p), sum(p..i + 1))
            }
        });
        let mut out = Dependence {
            xy: 0.0,
            xx: 0.0,
            yy: 0.0,
        };
        for (i, (first, second)) in rows.into_iter().enumerate() {
            if i < p {
                out.xx += first;
            } else {
                out.xy += first;
                out.yy += second;
            }
        }
        out
    }

    /// `Σ x xᵀ` (p × p), `Σ y xᵀ` (q × p) and `Σ y yᵀ` (q × q) about the means of all rows.
    ///
    /// # Errors
    /// `Degenerate` after an interrupted update, `Shape` before the first row.
    pub fn matrices(&self) -> Result<[Vec<f64>; 3]> {
        self.usable()?;
        if self.rows == 0 {
            return Err(Error::shape("x, y", "at least one row", 0));
        }
        let (p, d) = (self.p, self.p + self.q);
        let [sx, sy] = self.scale;
        let block = |rows: Range<usize>, cols: Range<usize>, scale: f64| -> Vec<f64> {
            rows.flat_map(|i| cols.clone().map(move |j| (i.max(j), i.min(j))))
                .map(|(i, j)| self.centred(i, j) / scale)
                .collect()
        };
        Ok([
            block(0..p, 0..p, sx * sx),
            block(p..d, 0..p, sx * sy),
            block(p..d, p..d, sy * sy),
        ])
    }
}

/// The power of two that brings the largest of up to [`SLAB`] rows about their mean near 1.
fn scale<T: Element>(rows: &Rows<'_, T>, mean: &[f64]) -> f64 {
    let largest = (0..rows.rows().min(SLAB))
        .flat_map(|i| rows.row(i).iter().zip(mean))
        .map(|(v, m)| (v.load().to_f64() - m).abs())
        .fold(0.0, f64::max);
    // Beyond these the power itself would not be a number.
    if (1e-300..=1e300).contains(&largest) {
        2f64.powi(-(largest.log2().floor() as i32))
    } else {
        1.0
    }
}

/// Names the argument of a finding about "x".
fn named(error: Error, arg: &'static str) -> Error {
    match error {
        Error::NonFinite { index, found, .. } => Error::NonFinite { arg, index, found },
        Error::Value {
            expected, found, ..
        } => Error::Value {
            arg,
            expected,
            found,
        },
        other => other,
    }
}

/// `to += from`.
struct Accumulate<'a, R>(&'a mut [f64], &'a [R]);

impl<R: Real> Kernel for Accumulate<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (to, from) in self.0.iter_mut().zip(self.1) {
            *to += from.to_f64();
        }
    }
}

/// Rows about `shift` from `first` on, both representations side by side, and what else is summed over them.
struct Centre<'a, 'b, T: Element> {
    x: &'a Rows<'b, T>,
    y: &'a Rows<'b, T>,
    shift: &'a [f64],
    scale: [f64; 2],
    first: usize,
    to: &'a mut [T::Acc],
    pitch: usize,
}

impl<T: Element> Kernel for Centre<'_, '_, T> {
    type Output = Weighted;
    #[inline(always)]
    fn run(self) -> Weighted {
        let (p, d) = (self.x.width(), self.shift.len());
        let mut out = Weighted::new(d);
        for (k, to) in self.to.chunks_exact_mut(self.pitch).enumerate() {
            let to = &mut to[..d];
            let (left, right) = to.split_at_mut(p);
            let halves = [
                (left, self.x, &self.shift[..p], self.scale[0]),
                (right, self.y, &self.shift[p..], self.scale[1]),
            ];
            for (to, rows, shift, scale) in halves {
                for ((to, v), s) in to.iter_mut().zip(rows.row(self.first + k)).zip(shift) {
                    *to = T::Acc::from_f64(scale * (v.load().to_f64() - s));
                }
            }
            let (a, b) = (squares(&to[..p]), squares(&to[p..]));
            let [z, az, bz] = &mut out.z;
            for (((v, z), az), bz) in to.iter().zip(z).zip(az).zip(bz) {
                let v = v.to_f64();
                *z += v;
                *az += a * v;
                *bz += b * v;
            }
            for (sum, v) in out.norms.iter_mut().zip([a, b, a * b, a * a, b * b]) {
                *sum += v;
            }
        }
        out
    }
}

/// Squared norm in f64.
#[inline(always)]
fn squares<R: Real>(x: &[R]) -> f64 {
    let mut lanes = [0.0; 16];
    for part in x.chunks(16) {
        for (lane, v) in lanes.iter_mut().zip(part) {
            let v = v.to_f64();
            *lane += v * v;
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::f16;

    fn data<T: Element>(rows: usize, cols: usize, seed: usize, size: f64, offset: f64) -> Vec<T> {
        let value = |i: usize| {
            let bits = (i ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            ((bits ^ (bits >> 29)) % 2003) as f64 / 1001.0 - 1.0
        };
        (0..rows * cols)
            .map(|i| {
                T::store(T::Acc::from_f64(
                    size * (value(i) + value(i / cols * 7 + 3)) + offset,
                ))
            })
            .collect()
    }

    /// HSIC from Gram matrices, in f64.
    fn grams(x: &[f64], y: &[f64], n: usize, unbiased: bool) -> Dependence {
        let gram = |x: &[f64]| -> Vec<f64> {
            let d = x.len() / n;
            let mean: Vec<f64> = (0..d)
                .map(|j| (0..n).map(|i| x[i * d + j]).sum::<f64>() / n as f64)
                .collect();
            let dot = |i: usize, k: usize| {
                (0..d)
                    .map(|j| (x[i * d + j] - mean[j]) * (x[k * d + j] - mean[j]))
                    .sum::<f64>()
            };
            (0..n * n)
                .map(|at| {
                    if unbiased && at / n == at % n {
                        0.0
                    } else {
                        dot(at / n, at % n)
                    }
                })
                .collect()
        };
        let (k, l) = (gram(x), gram(y));
        let one = |k: &[f64], l: &[f64]| {
            let trace: f64 = k.iter().zip(l).map(|(a, b)| a * b).sum();
            if !unbiased {
                return trace;
            }
            let rows = |k: &[f64]| {
                k.chunks(n)
                    .map(|r| r.iter().sum::<f64>())
                    .collect::<Vec<_>>()
            };
            let (r, s) = (rows(k), rows(l));
            let m = n as f64;
            let cross: f64 = r.iter().zip(&s).map(|(a, b)| a * b).sum();
            let all = r.iter().sum::<f64>() * s.iter().sum::<f64>();
            trace + all / ((m - 1.0) * (m - 2.0)) - 2.0 / (m - 2.0) * cross
        };
        Dependence {
            xy: one(&k, &l),
            xx: one(&k, &k),
            yy: one(&l, &l),
        }
    }

    fn cka(d: Dependence) -> f64 {
        d.xy / d.xx.sqrt() / d.yy.sqrt()
    }

    fn check<T: Element<Acc: Gemm>>(n: usize, p: usize, q: usize, size: f64, tolerance: f64) {
        let (x, y) = (data::<T>(n, p, 1, size, size), data::<T>(n, q, 2, 1.0, 3.0));
        let wide = |v: &[T]| v.iter().map(|v| v.load().to_f64()).collect::<Vec<_>>();
        for cuts in [vec![0, n], vec![0, 3, n / 2, n]] {
            let mut seen = CrossMoments::new(p, q);
            for w in cuts.windows(2) {
                let part = |v: &'_ [T], d: usize| v[w[0] * d..w[1] * d].to_vec();
                let (x, y) = (part(&x, p), part(&y, q));
                let (x, y) = (Rows::matrix(&x, p), Rows::matrix(&y, q));
                seen.update(&x, &y, &Cancel::new()).unwrap();
            }
            assert_eq!(seen.rows(), n);
            for unbiased in [false, true] {
                let (got, want) = (
                    seen.dependence(unbiased).unwrap(),
                    grams(&wide(&x), &wide(&y), n, unbiased),
                );
                assert!(
                    (cka(got) - cka(want)).abs() < tolerance,
                    "{n} {p} {q} {unbiased}: {got:?} {want:?}"
                );
            }
        }
    }

    #[test]
    fn equals_gram_matrices() {
        check::<f64>(50, 7, 3, 1.0, 1e-11);
        check::<f64>(130, 70, 90, 1e60, 1e-11);
        check::<f32>(200, 33, 65, 1.0, 1e-5);
        check::<f32>(64, 5, 9, 1e30, 1e-5);
        check::<f32>(64, 5, 9, 1e-30, 1e-5);
        check::<f16>(64, 20, 20, 1.0, 1e-5);
    }

    #[test]
    fn same_bits_for_every_number_of_threads() {
        let (n, p, q) = (1500, 300, 260);
        let (x, y) = (
            data::<f32>(n, p, 1, 1.0, 0.0),
            data::<f32>(n, q, 2, 1.0, 0.0),
        );
        let before = par::num_threads();
        let mut found = Vec::new();
        for threads in [1, 2, 3] {
            par::set_num_threads(threads);
            let mut seen = CrossMoments::new(p, q);
            seen.update(&Rows::matrix(&x, p), &Rows::matrix(&y, q), &Cancel::new())
                .unwrap();
            let [a, b, c] = seen.matrices().unwrap();
            found.push((seen.dependence(true).unwrap(), a, b, c));
        }
        par::set_num_threads(before);
        assert!(found.windows(2).all(|w| w[0] == w[1]));
        let [a, b] = [&found[0].1, &found[0].2];
        assert_eq!((a.len(), b.len()), (p * p, q * p));
        assert_eq!(a[3 * p + 5], a[5 * p + 3]);
    }

    #[test]
    fn refusals_change_nothing() {
        let mut seen = CrossMoments::new(2, 1);
        let (x, y) = ([1.0, 2.0, 3.0, f64::NAN], [1.0, 2.0]);
        let bad = seen.update(&Rows::matrix(&x, 2), &Rows::matrix(&y, 1), &Cancel::new());
        assert!(matches!(
            bad,
            Err(Error::NonFinite {
                arg: "x",
                index: 3,
                ..
            })
        ));
        assert!(
            seen.update(&Rows::matrix(&y, 1), &Rows::matrix(&y, 1), &Cancel::new())
                .is_err()
        );
        assert!(
            seen.update(&Rows::matrix(&y, 2), &Rows::matrix(&y, 1), &Cancel::new())
                .is_err()
        );
        assert_eq!(seen.rows(), 0);
        assert!(seen.dependence(false).is_err() && seen.matrices().is_err());
        let same = [2.0, 2.0];
        seen.update(
            &Rows::matrix(&x[..2], 2),
            &Rows::matrix(&y[..1], 1),
            &Cancel::new(),
        )
        .unwrap();
        seen.update(
            &Rows::matrix(&x[..2], 2),
            &Rows::matrix(&y[1..], 1),
            &Cancel::new(),
        )
        .unwrap();
        assert!(matches!(
            seen.dependence(false),
            Err(Error::Degenerate { arg: "x", .. })
        ));
        let cancelled = Cancel::new();
        cancelled.cancel();
        assert_eq!(
            seen.update(
                &Rows::matrix(&same, 2),
                &Rows::matrix(&y[..1], 1),
                &cancelled
            ),
            Err(Error::Interrupted)
        );
        assert!(matches!(
            seen.dependence(false),
            Err(Error::Degenerate { .. })
        ));
    }
}
