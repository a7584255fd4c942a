//! Dependence of two representations through kernels of pairs of rows (HSIC), in tiles: time n², memory n.

use crate::cancel::Cancel;
use crate::element::{Element, Real};
use crate::linalg::gemm::{self, Gemm, Mat, Out};
use crate::measure::cross::Dependence;
use crate::moments::{Moments, NonFinitePolicy};
use crate::simd::{Exp, Kernel, dispatch, dot, exp, sum_f64};
use crate::view::Rows;
use crate::{Error, Result, par};

/// Rows of a tile.
const TILE: usize = 256;
/// Accumulators, each of n numbers: the block rows of the triangle are dealt to them, whatever the number of threads.
const GROUPS: usize = 16;

/// The kernel of two rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Of {
    /// `a · b` about the mean of the rows.
    Linear,
    /// `exp(-γ ‖a - b‖²)`.
    Rbf { gamma: f64 },
}

/// The arithmetic types of the tiles.
pub trait Scalar: Gemm + Exp + Element<Acc = Self> {}
impl Scalar for f32 {}
impl Scalar for f64 {}

/// Rows about their mean, block by block, with their squared norms.
struct Side<'a, 'b, T: Element> {
    rows: &'a Rows<'b, T>,
    mean: Vec<f64>,
    norms: Vec<T::Acc>,
    of: Of,
}

impl<'a, 'b, T: Element<Acc: Scalar>> Side<'a, 'b, T> {
    fn new(rows: &'a Rows<'b, T>, arg: &'static str, of: Of, cancel: &Cancel) -> Result<Self> {
        if let Of::Rbf { gamma } = of
            && !(gamma > 0.0 && gamma.is_finite())
        {
            return Err(Error::value("gamma", "a positive number", gamma));
        }
        let mut seen = Moments::new(rows.width(), false);
        seen.update(rows, None, NonFinitePolicy::Error, cancel)
            .map_err(|e| match e {
                Error::NonFinite { index, found, .. } => Error::NonFinite { arg, index, found },
                other => other,
            })?;
        let mut side = Self {
            rows,
            mean: seen.mean().to_vec(),
            norms: Vec::new(),
            of,
        };
        let bytes = rows.rows() * rows.width() * size_of::<T>();
        let norms = par::map(bytes, par::ranges(rows.rows(), TILE), |block| {
            let centred = side.block(block.start, block.len());
            let squares = centred
                .chunks(rows.width())
                .map(|r| T::Acc::from_f64(dispatch(Dot(r, r))));
            squares.collect::<Vec<_>>()
        });
        side.norms = norms.concat();
        if !side.norms.iter().all(|v| Real::is_finite(*v)) {
            return Err(Error::value(
                arg,
                "rows whose squared norms are finite",
                "an overflow",
            ));
        }
        let size = side.mean.iter().map(|m| m * m).sum::<f64>();
        if side
            .norms
            .iter()
            .all(|v| v.to_f64() <= 1e-24 * size.max(1e-300))
        {
            let reason = "expected a representation that varies, got the same row for every input";
            return Err(Error::degenerate(arg, reason));
        }
        Ok(side)
    }

    fn block(&self, first: usize, rows: usize) -> Vec<T::Acc> {
        let mut out = Vec::with_capacity(rows * self.mean.len());
        for i in first..first + rows {
            let row = self.rows.row(i).iter().zip(&self.mean);
            out.extend(row.map(|(v, m)| T::Acc::from_f64(v.load().to_f64() - m)));
        }
        out
    }

    /// Kernel of the rows from `i` on, in `a`, with those from `j` on, in `b`; 0 where a row meets itself.
    fn tile(&self, (i, a): (usize, &[T::Acc]), (j, b): (usize, &[T::Acc]), out: &mut [T::Acc]) {
        let d = self.mean.len();
        let (m, n) = (a.len() / d, b.len() / d);
        let product = Out {
            data: &mut *out,
            stride: n,
            add: false,
        };
        gemm::a_bt(product, Mat::dense(a, m, d), Mat::dense(b, n, d));
        for (k, row) in out.chunks_exact_mut(n).take(m).enumerate() {
            if let Of::Rbf { gamma } = self.of {
                let (norm, norms) = (self.norms[i + k], &self.norms[j..j + n]);
                dispatch(Rbf {
                    gamma: T::Acc::from_f64(gamma),
                    norm,
                    norms,
                    row,
                });
            }
            if i == j {
                row[k] = T::Acc::ZERO;
            }
        }
    }

    /// Kernel of row `i` with itself.
    fn own(&self, i: usize) -> f64 {
        match self.of {
            Of::Linear => self.norms[i].to_f64(),
            Of::Rbf { .. } => 1.0,
        }
    }
}

struct Rbf<'a, R> {
    gamma: R,
    norm: R,
    norms: &'a [R],
    row: &'a mut [R],
}

impl<R: Scalar> Kernel for Rbf<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (g, b) in self.row.iter_mut().zip(self.norms) {
            let squared = ((self.norm + *b) - (*g + *g)).greater(R::ZERO);
            *g = exp(-(self.gamma * squared));
        }
    }
}

struct Dot<'a, R>(&'a [R], &'a [R]);

impl<R: Scalar> Kernel for Dot<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        dot(self.0, self.1)
    }
}

/// Sums of one row of a pair of tiles: of `k`, `l`, `kl`, `kk` and `ll`; and what it adds to the columns' sums.
struct RowSums<'a, R> {
    k: &'a [R],
    l: &'a [R],
    columns: Option<(&'a mut [f64], &'a mut [f64])>,
}

impl<R: Scalar> Kernel for RowSums<'_, R> {
    type Output = [f64; 5];
    #[inline(always)]
    fn run(self) -> [f64; 5] {
        if let Some((r, s)) = self.columns {
            for (((r, s), k), l) in r.iter_mut().zip(s).zip(self.k).zip(self.l) {
                *r += k.to_f64();
                *s += l.to_f64();
            }
        }
        let (k, l) = (self.k, self.l);
        [sum_f64(k), sum_f64(l), dot(k, l), dot(k, k), dot(l, l)]
    }
}

/// What the tiles add up to, off the diagonal: row sums of both Gram matrices, and `Σ kl`, `Σ kk`, `Σ ll`.
struct Sums {
    r: Vec<f64>,
    s: Vec<f64>,
    products: [f64; 3],
}

/// HSIC of the rows of `x` and of `y`, each under its kernel, up to one common factor: the biased estimate `tr(KHLH)`, or
/// the U-statistic of Song and others (2012) times `n (n - 3)`.
///
/// # Errors
/// `Shape` for different or too few rows (2; unbiased 4), `NonFinite`, `Value` for a width that is not positive,
/// `Interrupted`.
pub fn dependence<T: Element<Acc: Scalar>>(
    x: &Rows<'_, T>,
    y: &Rows<'_, T>,
    of: (Of, Of),
    unbiased: bool,
    cancel: &Cancel,
) -> Result<Dependence> {
    let n = x.rows();
    if y.rows() != n {
        return Err(Error::shape("y", format!("the {n} rows of x"), y.rows()));
    }
    let least = if unbiased { 4 } else { 2 };
    if n < least {
        return Err(Error::shape("x, y", format!("{least} rows or more"), n));
    }
    let (x, y) = (
        Side::new(x, "x", of.0, cancel)?,
        Side::new(y, "y", of.1, cancel)?,
    );
    let blocks = par::ranges(n, TILE);
    let groups: Vec<Vec<usize>> = (0..GROUPS)
        .map(|g| {
            // Dealt there and back, so that long block rows meet short ones.
            let period = 2 * GROUPS;
            (0..blocks.len())
                .filter(|b| [g, period - 1 - g].contains(&(b % period)))
                .collect()
        })
        .filter(|g: &Vec<usize>| !g.is_empty())
        .collect();
    let parts = par::try_map(usize::MAX, groups, |group| {
        let mut sums = Sums {
            r: vec![0.0; n],
            s: vec![0.0; n],
            products: [0.0; 3],
        };
        let (mut k, mut l) = (
            vec![T::Acc::ZERO; TILE * TILE],
            vec![T::Acc::ZERO; TILE * TILE],
        );
        for i in group.into_iter().map(|b| blocks[b].clone()) {
            let (xi, yi) = (x.block(i.start, i.len()), y.block(i.start, i.len()));
            for j in blocks.iter().take_while(|j| j.start <= i.start) {
                cancel.check()?;
                let own = j.start == i.start;
                x.tile(
                    (i.start, &xi),
                    (j.start, &x.block(j.start, j.len())),
                    &mut k,
                );
                y.tile(
                    (i.start, &yi),
                    (j.start, &y.block(j.start, j.len())),
                    &mut l,
                );
                let rows = k
                    .chunks_exact(j.len())
                    .zip(l.chunks_exact(j.len()))
                    .take(i.len());
                for (row, (k, l)) in rows.enumerate() {
                    let (r, s) = (&mut sums.r[j.clone()], &mut sums.s[j.clone()]);
                    let columns = (!own).then_some((r, s));
                    let [kr, lr, kl, kk, ll] = dispatch(RowSums { k, l, columns });
                    sums.r[i.start + row] += kr;
                    sums.s[i.start + row] += lr;
                    let weight = if own { 1.0 } else { 2.0 };
                    for (sum, v) in sums.products.iter_mut().zip([kl, kk, ll]) {
                        *sum += weight * v;
                    }
                }
                cancel.advance(1);
            }
        }
        Ok(sums)
    })?;
    let mut all = Sums {
        r: vec![0.0; n],
        s: vec![0.0; n],
        products: [0.0; 3],
    };
    for part in parts {
        all.r.iter_mut().zip(part.r).for_each(|(a, b)| *a += b);
        all.s.iter_mut().zip(part.s).for_each(|(a, b)| *a += b);
        all.products
            .iter_mut()
            .zip(part.products)
            .for_each(|(a, b)| *a += b);
    }
    let Sums {
        mut r,
        mut s,
        products: [mut kl, mut kk, mut ll],
    } = all;
    if !unbiased {
        for i in 0..n {
            let (a, b) = (x.own(i), y.own(i));
            r[i] += a;
            s[i] += b;
            kl += a * b;
            kk += a * a;
            ll += b * b;
        }
    }
    let m = n as f64;
    let one = |trace: f64, r: &[f64], s: &[f64]| {
        let cross: f64 = r.iter().zip(s).map(|(a, b)| a * b).sum();
        let total = r.iter().sum::<f64>() * s.iter().sum::<f64>();
        if unbiased {
            trace + total / ((m - 1.0) * (m - 2.0)) - 2.0 / (m - 2.0) * cross
        } else {
            trace + total / (m * m) - 2.0 / m * cross
        }
    };
    Ok(Dependence {
        xy: one(kl, &r, &s),
        xx: one(kk, &r, &r),
        yy: one(ll, &s, &s),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(n: usize, d: usize, seed: usize) -> Vec<f64> {
        let hash = |i: usize| (i ^ (seed << 40)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
        (0..n * d)
            .map(|i| (hash(i) % 2003) as f64 / 1001.0 + (hash(i / d) % 17) as f64 / 8.0)
            .collect()
    }

    fn gram(x: &[f64], n: usize, of: Of, unbiased: bool) -> Vec<f64> {
        let d = x.len() / n;
        let mean: Vec<f64> = (0..d)
            .map(|j| (0..n).map(|i| x[i * d + j]).sum::<f64>() / n as f64)
            .collect();
        let pair = |i: usize, k: usize| {
            let rows = x[i * d..][..d].iter().zip(&x[k * d..]).zip(&mean);
            match of {
                Of::Linear => rows.map(|((a, b), m)| (a - m) * (b - m)).sum::<f64>(),
                Of::Rbf { gamma } => {
                    (-gamma * rows.map(|((a, b), _)| (a - b).powi(2)).sum::<f64>()).exp()
                }
            }
        };
        (0..n * n)
            .map(|at| {
                if unbiased && at / n == at % n {
                    0.0
                } else {
                    pair(at / n, at % n)
                }
            })
            .collect()
    }

    fn plain(k: &[f64], l: &[f64], n: usize, unbiased: bool) -> f64 {
        let m = n as f64;
        if unbiased {
            let rows = |k: &[f64]| {
                k.chunks(n)
                    .map(|r| r.iter().sum::<f64>())
                    .collect::<Vec<_>>()
            };
            let (r, s) = (rows(k), rows(l));
            let trace: f64 = k.iter().zip(l).map(|(a, b)| a * b).sum();
            let cross: f64 = r.iter().zip(&s).map(|(a, b)| a * b).sum();
            return trace + r.iter().sum::<f64>() * s.iter().sum::<f64>() / ((m - 1.0) * (m - 2.0))
                - 2.0 / (m - 2.0) * cross;
        }
        // Both centred by hand.
        let centre = |k: &[f64]| -> Vec<f64> {
            let rows: Vec<f64> = k.chunks(n).map(|r| r.iter().sum::<f64>() / m).collect();
            let all = rows.iter().sum::<f64>() / m;
            (0..n * n)
                .map(|at| k[at] - rows[at / n] - rows[at % n] + all)
                .collect()
        };
        centre(k).iter().zip(centre(l)).map(|(a, b)| a * b).sum()
    }

    #[test]
    fn equals_gram_matrices() {
        for n in [4, 63, 257, 600] {
            let (x, y) = (data(n, 5, 1), data(n, 3, 2));
            let single = |v: &[f64]| v.iter().map(|v| *v as f32).collect::<Vec<_>>();
            let (xs, ys) = (single(&x), single(&y));
            for of in [
                (Of::Linear, Of::Linear),
                (Of::Rbf { gamma: 0.3 }, Of::Rbf { gamma: 0.9 }),
                (Of::Rbf { gamma: 0.3 }, Of::Linear),
            ] {
                for unbiased in [false, true] {
                    let (k, l) = (gram(&x, n, of.0, unbiased), gram(&y, n, of.1, unbiased));
                    let want =
                        [(&k, &l), (&k, &k), (&l, &l)].map(|(k, l)| plain(k, l, n, unbiased));
                    let never = Cancel::new();
                    let double = dependence(
                        &Rows::matrix(&x, 5),
                        &Rows::matrix(&y, 3),
                        of,
                        unbiased,
                        &never,
                    );
                    let float = dependence(
                        &Rows::matrix(&xs, 5),
                        &Rows::matrix(&ys, 3),
                        of,
                        unbiased,
                        &never,
                    );
                    for (got, tolerance) in [(double.unwrap(), 1e-10), (float.unwrap(), 2e-5)] {
                        for (g, w) in [got.xy, got.xx, got.yy].into_iter().zip(want) {
                            let size = (want[1] * want[2])
                                .abs()
                                .sqrt()
                                .max(w.abs())
                                .max(want[1].abs())
                                .max(1.0);
                            assert!(
                                (g - w).abs() <= tolerance * size,
                                "{n} {of:?} {unbiased}: {got:?} {want:?}"
                            );
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn same_bits_for_every_number_of_threads() {
        let (n, before) = (1300, par::num_threads());
        let (x, y) = (data(n, 9, 1), data(n, 4, 2));
        let of = (Of::Rbf { gamma: 0.2 }, Of::Rbf { gamma: 0.2 });
        let found = [1, 2, 3].map(|threads| {
            par::set_num_threads(threads);
            dependence(
                &Rows::matrix(&x, 9),
                &Rows::matrix(&y, 4),
                of,
                true,
                &Cancel::new(),
            )
            .unwrap()
        });
        par::set_num_threads(before);
        assert!(found.iter().all(|d| *d == found[0]));
    }

    #[test]
    fn refusals() {
        let (x, never) = (data(6, 2, 1), Cancel::new());
        let rows = Rows::matrix(&x, 2);
        let linear = (Of::Linear, Of::Linear);
        assert!(dependence(&rows, &Rows::matrix(&x[..10], 2), linear, false, &never).is_err());
        assert!(
            dependence(
                &Rows::matrix(&x[..6], 2),
                &Rows::matrix(&x[..6], 2),
                linear,
                true,
                &never
            )
            .is_err()
        );
        for gamma in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let bad = (Of::Linear, Of::Rbf { gamma });
            assert!(matches!(
                dependence(&rows, &rows, bad, false, &never),
                Err(Error::Value { .. })
            ));
        }
        let mut broken = x.clone();
        broken[5] = f64::INFINITY;
        let found = dependence(&rows, &Rows::matrix(&broken, 2), linear, false, &never);
        assert!(matches!(
            found,
            Err(Error::NonFinite {
                arg: "y",
                index: 5,
                ..
            })
        ));
        let same = dependence(&rows, &Rows::matrix(&[0.1; 6], 1), linear, false, &never);
        assert!(matches!(same, Err(Error::Degenerate { arg: "y", .. })));
        let cancelled = Cancel::new();
        cancelled.cancel();
        assert_eq!(
            dependence(&rows, &rows, linear, false, &cancelled),
            Err(Error::Interrupted)
        );
    }
}
