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
use std::sync::Arc;

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
        products(&view, q, Some(&inverses(&norms)))
    };
    let found = typed::<T::Acc>(&products_f64);
    let mut plan = Plan {
        q,
        scale,
        keep,
        products: &found,
        norms: &norms,
        column_factor: &[],
    };
    let (mut vanished, factors);
    if keep == NormPreserving::In {
        let (old, new) = column_squares(&view, &plan);
        vanished = count_vanished(&old, &new);
        factors = restoring_factors::<T::Acc>(&old, &new);
        plan.column_factor = &factors;
    } else {
        vanished = 0;
    }
    vanished += update(&mut w, &plan);
    let after = frobenius(&products(&w.as_rows(), q, None));
    Ok(Report {
        before,
        after,
        vanished,
    })
}

fn typed<A: Real>(values: &[f64]) -> Vec<A> {
    values.iter().map(|v| A::from_f64(*v)).collect()
}

fn inverses(norms: &[f64]) -> Vec<f64> {
    let inverse = |n: &f64| if *n > 0.0 { 1.0 / n } else { 0.0 };
    norms.iter().map(inverse).collect()
}

fn restoring_factors<A: Real>(old: &[f64], new: &[f64]) -> Vec<A> {
    (old.iter().zip(new))
        .map(|(o, n)| A::from_f64(restoring_factor(*o, *n)))
        .collect()
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
        let mut sums = vec![0.0; q.rank * w.width()];
        dispatch(Products {
            w,
            q,
            row_weight,
            rows,
            first: 0,
            sums: &mut sums,
        });
        sums
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

/// Adds the products of some rows of `w` to `sums`; their number is a multiple of [`GROUP`] unless they are the last.
struct Products<'a, T: Element> {
    w: &'a Rows<'a, T>,
    q: &'a Orthonormal,
    row_weight: Option<&'a [f64]>,
    rows: Range<usize>,
    /// Row of the matrix that row 0 of `w` is.
    first: usize,
    sums: &'a mut [f64],
}

impl<T: Element<Acc: Arithmetic>> Kernel for Products<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(mut self) {
        let width = self.w.width();
        let sums = std::mem::take(&mut self.sums);
        let mut start = self.rows.start;
        while start < self.rows.end {
            let count = GROUP.min(self.rows.end - start);
            // A short last group repeats its first row with weight zero.
            let row = |i: usize| &self.w.row(start + if i < count { i } else { 0 })[..width];
            let x: [&[T]; GROUP] = std::array::from_fn(row);
            for (k, sums) in sums.chunks_exact_mut(width).enumerate() {
                let c: [T::Acc; GROUP] =
                    std::array::from_fn(|i| self.weight(k, start + i, i < count));
                add_group(sums, &x, &c);
            }
            start += GROUP;
        }
    }
}

impl<T: Element<Acc: Arithmetic>> Products<'_, T> {
    #[inline(always)]
    fn weight(&self, k: usize, i: usize, present: bool) -> T::Acc {
        if !present {
            return T::Acc::ZERO;
        }
        let o = self.first + i;
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
#[derive(Clone, Copy)]
struct Plan<'a, A> {
    q: &'a Orthonormal,
    scale: f64,
    keep: NormPreserving,
    /// `Q W` (of the normalised rows for the row forms).
    products: &'a [A],
    /// Lengths of the rows, for the row forms.
    norms: &'a [f64],
    /// What each column is multiplied by at the end; empty for none.
    column_factor: &'a [A],
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
    for (y, f) in out.iter_mut().zip(plan.column_factor) {
        *y = *y * *f;
    }
    false
}

/// Sums over rows of the squares of the old and of the updated elements, per column.
fn column_squares<T: Element<Acc: Arithmetic>>(
    w: &Rows<'_, T>,
    plan: &Plan<'_, T::Acc>,
) -> (Vec<f64>, Vec<f64>) {
    let bytes = w.rows() * w.width() * size_of::<T>();
    let parts = par::map(bytes, par::ranges(w.rows(), CHUNK), |rows| {
        let mut sums = vec![0.0; 2 * w.width()];
        dispatch(Squares {
            w,
            plan,
            rows,
            first: 0,
            sums: &mut sums,
        });
        sums
    });
    let mut old = add_up(parts);
    let new = old.split_off(old.len() / 2);
    (old, new)
}

/// Adds the squares of the old, then of the updated elements of some rows of `w` to the two halves of `sums`.
struct Squares<'a, T: Element> {
    w: &'a Rows<'a, T>,
    plan: &'a Plan<'a, T::Acc>,
    rows: Range<usize>,
    /// Row of the matrix that row 0 of `w` is.
    first: usize,
    sums: &'a mut [f64],
}

impl<T: Element<Acc: Arithmetic>> Kernel for Squares<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let width = self.w.width();
        let (old, new) = self.sums.split_at_mut(width);
        let mut scratch = vec![T::Acc::ZERO; width];
        for i in self.rows {
            let row = self.w.row(i);
            updated_row(self.plan, self.first + i, row, &mut scratch);
            for (s, x) in old.iter_mut().zip(row) {
                *s += x.load().to_f64() * x.load().to_f64();
            }
            for (s, y) in new.iter_mut().zip(&scratch) {
                *s += y.to_f64() * y.to_f64();
            }
        }
    }
}

/// Writes the edited rows; returns how many of them could not get their length back.
fn update<T: Element<Acc: Arithmetic>>(w: &mut RowsMut<'_, T>, plan: &Plan<'_, T::Acc>) -> usize {
    let width = w.width();
    let row_bytes = width * size_of::<T>();
    let bytes = w.rows() * row_bytes;
    let runs = w.reborrow().into_runs((par::ITEM_BYTES / row_bytes).max(1));
    let counts = par::map(bytes, runs, |run| dispatch(Update(run, plan, width)));
    counts.into_iter().sum()
}

/// A run of rows (its `first` counts from the start of the matrix), the plan, the width.
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

/// [`orthogonalize_columns`] of a matrix that comes a few rows at a time, in order and several times over: first
/// [`ByTile::measure`] and [`ByTile::end_pass`] for each of [`ByTile::passes`], then [`ByTile::update`]. Every tile but
/// the last has a multiple of [`ByTile::STEP`] rows. The bits are those of the matrix in one piece.
pub struct ByTile<A> {
    q: Arc<Orthonormal>,
    scale: f64,
    keep: NormPreserving,
    width: usize,
    pass: usize,
    before: Sums,
    weighted: Sums,
    squares: Sums,
    after: Sums,
    norms: Vec<f64>,
    products: Vec<A>,
    column_factor: Vec<A>,
    norm_before: f64,
    vanished: usize,
}

/// A sum over chunks of rows, added in order as [`add_up`] does.
#[derive(Default)]
struct Sums {
    part: Vec<f64>,
    total: Option<Vec<f64>>,
}

impl Sums {
    fn part(&mut self, len: usize) -> &mut [f64] {
        self.part.resize(len, 0.0);
        &mut self.part
    }

    fn close(&mut self) {
        if self.part.is_empty() {
            return;
        }
        let part = std::mem::take(&mut self.part);
        self.total = Some(match self.total.take() {
            None => part,
            Some(total) => add_up(vec![total, part]),
        });
    }

    fn take(&mut self) -> Vec<f64> {
        self.close();
        self.total.take().unwrap_or_default()
    }
}

/// What undoes an update up to rounding; see [`ByTile::factors`].
#[derive(Debug, Clone)]
pub struct Factors<A> {
    pub q: Arc<Orthonormal>,
    pub scale: f64,
    /// `Q W`, `rank × in`, as it was subtracted.
    pub products: Vec<A>,
    /// Lengths of the rows for [`NormPreserving::RowPre`], else empty.
    pub norms: Vec<f64>,
    /// What the columns were multiplied by; empty for 1.
    pub column_factor: Vec<A>,
}

impl<A: Arithmetic> ByTile<A> {
    /// Rows of a tile are a multiple of this.
    pub const STEP: usize = GROUP;

    /// For a matrix of `q.width` rows of `width`.
    pub fn new(q: Arc<Orthonormal>, width: usize, scale: f64, keep: NormPreserving) -> Self {
        Self {
            q,
            scale,
            keep,
            width,
            pass: 0,
            before: Sums::default(),
            weighted: Sums::default(),
            squares: Sums::default(),
            after: Sums::default(),
            norms: Vec::new(),
            products: Vec::new(),
            column_factor: Vec::new(),
            norm_before: 0.0,
            vanished: 0,
        }
    }

    /// How often the matrix is measured before it is updated.
    pub fn passes(&self) -> usize {
        if self.keep == NormPreserving::In {
            2
        } else {
            1
        }
    }

    fn plan(&self) -> Plan<'_, A> {
        Plan {
            q: &self.q,
            scale: self.scale,
            keep: self.keep,
            products: &self.products,
            norms: &self.norms,
            column_factor: &self.column_factor,
        }
    }

    fn by_row(&self) -> bool {
        matches!(self.keep, NormPreserving::Row | NormPreserving::RowPre)
    }

    /// Takes in the rows from `first` on.
    ///
    /// # Errors
    /// `NonFinite`, its index counted from the start of the matrix; `Degenerate` where products overflow.
    pub fn measure<T: Element<Acc = A>>(&mut self, first: usize, w: &Rows<'_, T>) -> Result<()> {
        if self.pass > 0 {
            let mut squares = std::mem::take(&mut self.squares);
            let plan = self.plan();
            by_chunk(first, w.rows(), &mut [&mut squares], |rows, sums| {
                dispatch(Squares {
                    w,
                    plan: &plan,
                    rows,
                    first,
                    sums: sums[0].part(2 * self.width),
                });
            });
            self.squares = squares;
            return Ok(());
        }
        let len = self.q.rank * self.width;
        let mut inverse = Vec::new();
        if self.by_row() {
            self.norms.extend(row_norms(w));
            inverse = inverses(&self.norms);
        }
        let (q, by_row) = (self.q.clone(), self.by_row());
        let sums = &mut [&mut self.before, &mut self.weighted];
        by_chunk(first, w.rows(), sums, |rows, sums| {
            let add = |row_weight: Option<&[f64]>, sums: &mut Sums| {
                dispatch(Products {
                    w,
                    q: &q,
                    row_weight,
                    rows: rows.clone(),
                    first,
                    sums: sums.part(len),
                });
            };
            add(None, sums[0]);
            if by_row {
                add(Some(&inverse), sums[1]);
            }
        });
        Ok(())
    }

    /// Ends a pass over the matrix.
    ///
    /// # Errors
    /// `Degenerate` where the products overflowed.
    pub fn end_pass(&mut self) -> Result<()> {
        if self.pass == 0 {
            let plain = self.before.take();
            self.norm_before = frobenius(&plain);
            if !self.norm_before.is_finite() {
                return Err(Error::degenerate(
                    "weight",
                    "its products with the direction overflow",
                ));
            }
            let found = if self.by_row() {
                self.weighted.take()
            } else {
                plain
            };
            self.products = typed(&found);
        } else {
            let mut old = self.squares.take();
            let new = old.split_off(old.len() / 2);
            self.vanished = count_vanished(&old, &new);
            self.column_factor = restoring_factors(&old, &new);
        }
        self.pass += 1;
        Ok(())
    }

    /// Edits the rows from `first` on, as [`ByTile::update`] does, for somebody who only looks at the result.
    pub fn preview<T: Element<Acc = A>>(&self, first: usize, data: &mut [T]) -> usize {
        dispatch(Update(Run { first, data }, &self.plan(), self.width))
    }

    /// Edits the rows from `first` on.
    pub fn update<T: Element<Acc = A>>(&mut self, first: usize, data: &mut [T]) {
        self.vanished += self.preview(first, data);
    }

    /// Takes in the rows from `first` on as they are stored in the end, for the report.
    pub fn measure_after<T: Element<Acc = A>>(&mut self, first: usize, w: &Rows<'_, T>) {
        let (q, len) = (self.q.clone(), self.q.rank * self.width);
        by_chunk(first, w.rows(), &mut [&mut self.after], |rows, sums| {
            dispatch(Products {
                w,
                q: &q,
                row_weight: None,
                rows,
                first,
                sums: sums[0].part(len),
            });
        });
    }

    /// What was done, once every row was measured and updated.
    pub fn report(&mut self) -> Report {
        Report {
            before: self.norm_before,
            after: frobenius(&self.after.take()),
            vanished: self.vanished,
        }
    }

    /// What [`Factors::invert`] needs, after the last pass; `None` for a form that it cannot undo.
    pub fn factors(&self) -> Option<Factors<A>> {
        (self.keep != NormPreserving::Row).then(|| Factors {
            q: self.q.clone(),
            scale: self.scale,
            products: self.products.clone(),
            norms: self.norms.clone(),
            column_factor: self.column_factor.clone(),
        })
    }
}

impl<A: Arithmetic> Factors<A> {
    /// Adds to the rows from `first` on what the update took away, in the arithmetic type, rounded once: what stood
    /// there before, up to rounding.
    pub fn invert<T: Element<Acc = A>>(&self, first: usize, width: usize, data: &mut [T]) {
        let inverse: Vec<A> = (self.column_factor.iter())
            .map(|f| if *f > A::ZERO { A::ONE / *f } else { A::ONE })
            .collect();
        dispatch(Invert {
            factors: self,
            inverse: &inverse,
            first,
            width,
            data,
        });
    }
}

struct Invert<'a, T: Element> {
    factors: &'a Factors<T::Acc>,
    inverse: &'a [T::Acc],
    first: usize,
    width: usize,
    data: &'a mut [T],
}

impl<T: Element<Acc: Arithmetic>> Kernel for Invert<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let (f, width) = (self.factors, self.width);
        let mut scratch = vec![T::Acc::ZERO; width];
        for (k, row) in self.data.chunks_exact_mut(width).enumerate() {
            let o = self.first + k;
            for (y, x) in scratch.iter_mut().zip(&*row) {
                *y = x.load();
            }
            for (y, i) in scratch.iter_mut().zip(self.inverse) {
                *y = *y * *i;
            }
            let length = f.norms.get(o).copied().unwrap_or(1.0);
            for (k, c) in f.products.chunks_exact(width).enumerate() {
                let a = T::Acc::from_f64(f.scale * length * f.q.row(k)[o]);
                for (y, c) in scratch.iter_mut().zip(c) {
                    *y += a * *c;
                }
            }
            for (x, y) in row.iter_mut().zip(&scratch) {
                *x = T::store(*y);
            }
        }
    }
}

/// Calls `add` with the rows of each chunk that a tile of `rows` rows from `first` on reaches into (counted from the
/// start of the tile), and closes the sums of the chunks that it ends.
fn by_chunk(
    first: usize,
    rows: usize,
    sums: &mut [&mut Sums],
    mut add: impl FnMut(Range<usize>, &mut [&mut Sums]),
) {
    let mut at = 0;
    while at < rows {
        let end = (at + CHUNK - (first + at) % CHUNK).min(rows);
        add(at..end, sums);
        if (first + end).is_multiple_of(CHUNK) {
            sums.iter_mut().for_each(|s| s.close());
        }
        at = end;
    }
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
