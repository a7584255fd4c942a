//! Weight-space ablation along the leading axis of a matrix `(out, in)`: `W ← W − λ Qᵀ(Q W)`.
//!
//! Columns are never gathered. One sweep over the rows accumulates `Q W` (a row of `in` sums per direction), a second
//! one updates; the form that keeps column lengths adds a sweep that measures the new ones, so that every element is
//! still rounded once. Along the last axis the rows themselves are edited: see [`super::edit`].

use super::edit::{Arithmetic, restoring_factor};
use crate::element::{Element, Real};
use crate::linalg::Orthonormal;
use crate::simd::{self, Kernel, dispatch};
use crate::view::{Rows, RowsMut, Run};
use crate::{Error, Result, par};
use std::ops::Range;

/// Rows whose sums are made before the partial sums are added in order.
const CHUNK: usize = 256;
/// Rows summed in the arithmetic type before they enter an f64 sum.
const GROUP: usize = 8;

/// Which lengths of the matrix survive the projection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormPreserving {
    /// None: the projection alone.
    No,
    /// Every column (fixed input) keeps its length, and `Q W = 0` still holds.
    In,
    /// Rows are normalised, projected, normalised again and given their lengths back; `Q W = 0` does not hold.
    Row,
    /// The projection acts on the normalised rows, which then get their lengths back; `Q W = 0` does not hold.
    RowPre,
}

/// What an edit of a matrix left behind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Report {
    /// Frobenius norm of `Q W` before.
    pub before: f64,
    /// Frobenius norm of `Q W` as stored.
    pub after: f64,
    /// Columns or rows whose length could not be restored because next to nothing of them was left.
    pub vanished: usize,
}

/// Projects the columns of `w` (`q.width × in`) off the rows of `q`, in place.
///
/// # Errors
/// `Shape` if the number of rows is not `q.width`, `NonFinite` if `w` is not finite; nothing is written then.
pub fn orthogonalize_columns<T: Element<Acc: Arithmetic>>(
    mut w: RowsMut<'_, T>,
    q: &Orthonormal,
    scale: f64,
    keep: NormPreserving,
) -> Result<Report> {
    if w.rows() != q.width {
        return Err(Error::shape(
            "weight",
            format!("{} rows", q.width),
            w.rows(),
        ));
    }
    if w.width() == 0 {
        return Ok(Report {
            before: 0.0,
            after: 0.0,
            vanished: 0,
        });
    }
    let view = w.as_rows();
    let plain = products(&view, q, None);
    let before = frobenius(&plain);
    if !before.is_finite() {
        check_finite("weight", &view)?;
        return Err(Error::degenerate(
            "weight",
            "its products with the direction overflow",
        ));
    }
    let norms = match keep {
        NormPreserving::Row | NormPreserving::RowPre => row_norms(&view),
        _ => Vec::new(),
    };
    let products_f64 = if norms.is_empty() {
        plain
    } else {
        let inverse = |n: &f64| if *n > 0.0 { 1.0 / n } else { 0.0 };
        let weights: Vec<f64> = norms.iter().map(inverse).collect();
        products(&view, q, Some(&weights))
    };
    let mut plan = Plan {
        q,
        scale,
        keep,
        products: products_f64.iter().map(|c| T::Acc::from_f64(*c)).collect(),
        norms,
        column_factor: Vec::new(),
    };
    let mut vanished = 0;
    if keep == NormPreserving::In {
        let (old, new) = column_squares(&view, &plan);
        vanished = count_vanished(&old, &new);
        plan.column_factor = (old.iter().zip(&new))
            .map(|(o, n)| T::Acc::from_f64(restoring_factor(*o, *n)))
            .collect();
    }
    vanished += update(&mut w, &plan);
    let after = frobenius(&products(&w.as_rows(), q, None));
    Ok(Report {
        before,
        after,
        vanished,
    })
}

fn frobenius(values: &[f64]) -> f64 {
    values.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn count_vanished(old: &[f64], new: &[f64]) -> usize {
    let gone = |(o, n): (&f64, &f64)| *o > 0.0 && *n <= (super::edit::VANISHED).powi(2) * o;
    old.iter().zip(new).filter(|p| gone(*p)).count()
}

/// `NonFinite` for the first NaN or infinity in `w`, by flat index.
pub fn check_finite<T: Element>(arg: &'static str, w: &Rows<'_, T>) -> Result<()> {
    struct Bad<'a, T>(&'a Rows<'a, T>, Range<usize>);
    impl<T: Element> Kernel for Bad<'_, T> {
        type Output = Option<usize>;
        #[inline(always)]
        fn run(self) -> Option<usize> {
            let count = |row: &[T]| row.iter().map(|v| u32::from(!v.finite())).sum::<u32>();
            self.1.into_iter().find(|i| count(self.0.row(*i)) > 0)
        }
    }
    let row_bytes = w.width() * size_of::<T>();
    let step = (par::ITEM_BYTES / row_bytes.max(1)).max(1);
    let found = par::map(w.rows() * row_bytes, par::ranges(w.rows(), step), |r| {
        dispatch(Bad(w, r))
    });
    let Some(i) = found.into_iter().flatten().next() else {
        return Ok(());
    };
    let j = w.row(i).iter().position(|v| !v.finite()).unwrap_or(0);
    Err(Error::NonFinite {
        arg,
        index: i * w.width() + j,
        found: w.row(i)[j].load().to_f64(),
    })
}

/// `Q W`, `rank × in`; row `o` of `w` counts `row_weight[o]` times.
fn products<T: Element<Acc: Arithmetic>>(
    w: &Rows<'_, T>,
    q: &Orthonormal,
    row_weight: Option<&[f64]>,
) -> Vec<f64> {
    let bytes = w.rows() * w.width() * size_of::<T>() * q.rank;
    let parts = par::map(bytes, par::ranges(w.rows(), CHUNK), |rows| {
        dispatch(Products {
            w,
            q,
            row_weight,
            rows,
        })
    });
    add_up(parts)
}

/// Sums of equally long vectors, in order.
fn add_up(parts: Vec<Vec<f64>>) -> Vec<f64> {
    let mut parts = parts.into_iter();
    let mut total = parts.next().unwrap_or_default();
    for part in parts {
        total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
    }
    total
}

struct Products<'a, T: Element> {
    w: &'a Rows<'a, T>,
    q: &'a Orthonormal,
    row_weight: Option<&'a [f64]>,
    rows: Range<usize>,
}

impl<T: Element<Acc: Arithmetic>> Kernel for Products<'_, T> {
    type Output = Vec<f64>;
    #[inline(always)]
    fn run(self) -> Vec<f64> {
        let width = self.w.width();
        let mut sums = vec![0.0; self.q.rank * width];
        let mut start = self.rows.start;
        while start < self.rows.end {
            let count = GROUP.min(self.rows.end - start);
            // A short last group repeats its first row with weight zero.
            let row = |i: usize| &self.w.row(start + if i < count { i } else { 0 })[..width];
            let x: [&[T]; GROUP] = std::array::from_fn(row);
            for (k, sums) in self.sums_of(&mut sums).enumerate() {
                let c: [T::Acc; GROUP] =
                    std::array::from_fn(|i| self.weight(k, start + i, i < count));
                add_group(sums, &x, &c);
            }
            start += GROUP;
        }
        sums
    }
}

impl<T: Element<Acc: Arithmetic>> Products<'_, T> {
    #[inline(always)]
    fn sums_of<'s>(&self, sums: &'s mut [f64]) -> std::slice::ChunksExactMut<'s, f64> {
        sums.chunks_exact_mut(self.w.width())
    }

    #[inline(always)]
    fn weight(&self, k: usize, o: usize, present: bool) -> T::Acc {
        if !present {
            return T::Acc::ZERO;
        }
        T::Acc::from_f64(self.q.row(k)[o] * self.row_weight.map_or(1.0, |w| w[o]))
    }
}

#[inline(always)]
fn add_group<T: Element>(sums: &mut [f64], x: &[&[T]; GROUP], c: &[T::Acc; GROUP]) {
    let n = sums.len();
    let [a, b, d, e, f, g, h, i] = x.map(|r| &r[..n]);
    for (j, sum) in sums.iter_mut().enumerate() {
        let low =
            (c[0] * a[j].load() + c[1] * b[j].load()) + (c[2] * d[j].load() + c[3] * e[j].load());
        let high =
            (c[4] * f[j].load() + c[5] * g[j].load()) + (c[6] * h[j].load() + c[7] * i[j].load());
        *sum += (low + high).to_f64();
    }
}

fn row_norms<T: Element>(w: &Rows<'_, T>) -> Vec<f64> {
    struct Norms<'a, T>(&'a Rows<'a, T>, Range<usize>);
    impl<T: Element> Kernel for Norms<'_, T> {
        type Output = Vec<f64>;
        #[inline(always)]
        fn run(self) -> Vec<f64> {
            self.1
                .map(|i| simd::sum_squares_f64(self.0.row(i)).sqrt())
                .collect()
        }
    }
    let bytes = w.rows() * w.width() * size_of::<T>();
    par::map(bytes, par::ranges(w.rows(), CHUNK), |r| {
        dispatch(Norms(w, r))
    })
    .concat()
}

/// Everything the update of one row needs.
struct Plan<'a, A> {
    q: &'a Orthonormal,
    scale: f64,
    keep: NormPreserving,
    /// `Q W` (of the normalised rows for the row forms).
    products: Vec<A>,
    /// Lengths of the rows, for the row forms.
    norms: Vec<f64>,
    /// What each column is multiplied by at the end; empty for none.
    column_factor: Vec<A>,
}

/// Row `o` of the edited matrix, unrounded, into `out`; `true` if its length could not be restored.
#[inline(always)]
fn updated_row<T: Element<Acc: Arithmetic>>(
    plan: &Plan<'_, T::Acc>,
    o: usize,
    row: &[T],
    out: &mut [T::Acc],
) -> bool {
    let out = &mut out[..row.len()];
    for (y, x) in out.iter_mut().zip(row) {
        *y = x.load();
    }
    // In the row forms the products are those of normalised rows: what is subtracted scales with the row's length.
    let length = plan.norms.get(o).copied().unwrap_or(1.0);
    for (k, c) in plan.products.chunks_exact(row.len()).enumerate() {
        let a = T::Acc::from_f64(plan.scale * length * plan.q.row(k)[o]);
        for (y, c) in out.iter_mut().zip(c) {
            *y -= a * *c;
        }
    }
    if plan.keep == NormPreserving::Row {
        let (old, new) = (length * length, simd::sum_squares_f64(out));
        let factor = T::Acc::from_f64(restoring_factor(old, new));
        out.iter_mut().for_each(|y| *y = *y * factor);
        return count_vanished(&[old], &[new]) > 0;
    }
    for (y, f) in out.iter_mut().zip(&plan.column_factor) {
        *y = *y * *f;
    }
    false
}

/// Sums over rows of the squares of the old and of the updated elements, per column.
fn column_squares<T: Element<Acc: Arithmetic>>(
    w: &Rows<'_, T>,
    plan: &Plan<'_, T::Acc>,
) -> (Vec<f64>, Vec<f64>) {
    struct Squares<'a, T: Element>(&'a Rows<'a, T>, &'a Plan<'a, T::Acc>, Range<usize>);
    impl<T: Element<Acc: Arithmetic>> Kernel for Squares<'_, T> {
        type Output = Vec<f64>;
        #[inline(always)]
        fn run(self) -> Vec<f64> {
            let width = self.0.width();
            let mut sums = vec![0.0; 2 * width];
            let (old, new) = sums.split_at_mut(width);
            let mut scratch = vec![T::Acc::ZERO; width];
            for o in self.2 {
                let row = self.0.row(o);
                updated_row(self.1, o, row, &mut scratch);
                for (s, x) in old.iter_mut().zip(row) {
                    *s += x.load().to_f64() * x.load().to_f64();
                }
                for (s, y) in new.iter_mut().zip(&scratch) {
                    *s += y.to_f64() * y.to_f64();
                }
            }
            sums
        }
    }
    let bytes = w.rows() * w.width() * size_of::<T>();
    let parts = par::map(bytes, par::ranges(w.rows(), CHUNK), |r| {
        dispatch(Squares(w, plan, r))
    });
    let mut old = add_up(parts);
    let new = old.split_off(old.len() / 2);
    (old, new)
}

/// Writes the edited rows; returns how many of them could not get their length back.
fn update<T: Element<Acc: Arithmetic>>(w: &mut RowsMut<'_, T>, plan: &Plan<'_, T::Acc>) -> usize {
    struct Update<'a, T: Element>(Run<&'a mut [T]>, &'a Plan<'a, T::Acc>, usize);
    impl<T: Element<Acc: Arithmetic>> Kernel for Update<'_, T> {
        type Output = usize;
        #[inline(always)]
        fn run(self) -> usize {
            let width = self.2;
            let mut scratch = vec![T::Acc::ZERO; width];
            let mut vanished = 0;
            for (k, row) in self.0.data.chunks_exact_mut(width).enumerate() {
                vanished += usize::from(updated_row(self.1, self.0.first + k, row, &mut scratch));
                for (x, y) in row.iter_mut().zip(&scratch) {
                    *x = T::store(*y);
                }
            }
            vanished
        }
    }
    let width = w.width();
    let row_bytes = width * size_of::<T>();
    let bytes = w.rows() * row_bytes;
    let runs = w.reborrow().into_runs((par::ITEM_BYTES / row_bytes).max(1));
    let counts = par::map(bytes, runs, |run| dispatch(Update(run, plan, width)));
    counts.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::orthonormalize;
    use crate::simd::for_each_level;
    use half::bf16;
    use proptest::prelude::*;

    const W: [f64; 12] = [
        1.0, 2.0, 0.0, 0.5, -1.0, 1.0, -1.0, 0.25, 2.0, 2.0, 1.0, -0.5,
    ];

    fn basis(v: &[f64]) -> Orthonormal {
        orthonormalize("q", v, 1, v.len()).unwrap()
    }

    fn edited(keep: NormPreserving) -> (Vec<f64>, Report) {
        let mut w = W;
        let q = basis(&[4.0 / 3.0, -0.75, -1.0 / 12.0, 2.25]);
        let report = orthogonalize_columns(RowsMut::matrix(&mut w, 3), &q, 1.0, keep).unwrap();
        (w.to_vec(), report)
    }

    fn close(got: &[f64], want: &[f64]) {
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 1e-13, "{got:?} {want:?}");
        }
    }

    #[test]
    fn every_form() {
        let (w, report) = edited(NormPreserving::No);
        close(
            &w,
            &[
                0.00281162136832247,
                0.98406747891284,
                0.36738519212746,
                1.06091846298032,
                -0.428537956888472,
                0.793345829428304,
                -0.93767572633552,
                0.313495782567948,
                1.97703842549203,
                0.317244611059044,
                -0.714386129334583,
                0.119962511715089,
            ],
        );
        let before = [2.03582027661773f64, 2.0740875750504, -0.750039049280218];
        close(
            &[report.before],
            &[before.iter().map(|v| v * v).sum::<f64>().sqrt()],
        );
        assert!(report.after < 1e-15);
        let (w, report) = edited(NormPreserving::In);
        close(
            &w,
            &[
                0.00484424212819649,
                1.8260510571941,
                0.388806370783034,
                1.8278940297061,
                -0.795201758001908,
                0.839603553234281,
                -1.61555474975349,
                0.581727693934692,
                2.09231387542554,
                0.546591986798157,
                -1.32562611271067,
                0.126957182296501,
            ],
        );
        assert!(report.after < 1e-14 && report.vanished == 0);
        let (w, _) = edited(NormPreserving::Row);
        close(
            &w,
            &[
                0.121346574390743,
                2.02690608905998,
                0.936443652877859,
                0.959987332038571,
                -0.667359090047728,
                0.939710682740244,
                -0.958184093722419,
                0.3233775533053,
                2.00992790929317,
                0.875070685323773,
                -2.03806080496563,
                0.574942998000529,
            ],
        );
        let (w, report) = edited(NormPreserving::RowPre);
        close(
            &w,
            &[0.0555320262909641, 0.927576264860594, 0.428546201759007],
        );
        let left = [0.123271732161787f64, -0.0975715079210661, 0.117767416605107];
        close(
            &[report.after],
            &[left.iter().map(|v| v * v).sum::<f64>().sqrt()],
        );
    }

    #[test]
    fn degenerate_columns_and_bad_input() {
        // Column 0 is the direction itself, column 1 is zero.
        let mut w = [3.0f64, 0.0, 1.0, 4.0, 0.0, 1.0];
        let q = basis(&[3.0, 4.0]);
        let r =
            orthogonalize_columns(RowsMut::matrix(&mut w, 3), &q, 1.0, NormPreserving::In).unwrap();
        assert_eq!(r.vanished, 1);
        assert!(w[0].abs() < 1e-14 && w[1] == 0.0 && w[4] == 0.0);
        assert!((w[2].hypot(w[5]) - 2f64.sqrt()).abs() < 1e-14);
        let mut w = [1.0, f64::INFINITY, 2.0, 3.0];
        let kept = w;
        let r = orthogonalize_columns(RowsMut::matrix(&mut w, 2), &q, 1.0, NormPreserving::No);
        assert!(matches!(r, Err(Error::NonFinite { index: 1, .. })));
        assert_eq!(w, kept);
        assert!(
            orthogonalize_columns(RowsMut::matrix(&mut w, 1), &q, 1.0, NormPreserving::No).is_err()
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn several_directions_in_bf16_and_f64(
            (out, inputs, rank) in (8usize..600, 1usize..70, 1usize..6),
            seed in any::<u64>(),
            keep_in in any::<bool>(),
        ) {
            // Well mixed: columns that are nearly combinations of the directions would leave nothing but rounding.
            let value = |i: usize| {
                let mut z = seed.wrapping_add((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
                z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                ((z ^ (z >> 31)) >> 40) as f64 / 8.4e6 - 1.0
            };
            let v: Vec<f64> = (0..rank * out).map(|i| value(i + 1_000_000)).collect();
            let q = orthonormalize("q", &v, rank, out).unwrap();
            let keep = if keep_in { NormPreserving::In } else { NormPreserving::No };
            let w: Vec<f64> = (0..out * inputs).map(value).collect();
            let half: Vec<bf16> = w.iter().map(|v| bf16::from_f64(*v)).collect();
            let mut seen = None;
            for_each_level(|_| {
                let (mut a, mut b) = (w.clone(), half.clone());
                let exact = orthogonalize_columns(RowsMut::matrix(&mut a, inputs), &q, 1.0, keep).unwrap();
                orthogonalize_columns(RowsMut::matrix(&mut b, inputs), &q, 1.0, keep).unwrap();
                assert!(exact.after <= 1e-12 * (1.0 + exact.before));
                for (a, b) in a.iter().zip(&b) {
                    assert!((a - b.to_f64()).abs() < 0.02 * (1.0 + a.abs()));
                }
                let bits = (a.iter().map(|v| v.to_bits()).collect::<Vec<_>>(), b);
                assert_eq!(seen.get_or_insert_with(|| bits.clone()), &bits);
                if keep_in && rank < out / 2 {
                    for j in 0..inputs {
                        let norm = |m: &[f64]| m.iter().skip(j).step_by(inputs).map(|v| v * v).sum::<f64>();
                        assert!((norm(&a) - norm(&w)).abs() < 1e-11 * norm(&w));
                    }
                }
            });
        }
    }
}
