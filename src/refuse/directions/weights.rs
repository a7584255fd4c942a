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
        return Err(first_non_finite(&view));
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

fn first_non_finite<T: Element>(w: &Rows<'_, T>) -> Error {
    let width = w.width();
    for i in 0..w.rows() {
        if let Some(j) = w.row(i).iter().position(|v| !v.finite()) {
            return Error::NonFinite {
                arg: "weight",
                index: i * width + j,
                found: w.row(i)[j].load().to_f64(),
            };
        }
    }
    Error::degenerate("weight", "its products with the direction overflow")
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
            *y = *y - a * *c;
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
