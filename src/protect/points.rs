//! Rows prepared for the kernels: moved to the mean, with their squared norms.

use super::spare::Spare;
use super::tile::Scalar;
use crate::element::Element;
use crate::simd::{Kernel, dispatch, sum_squares_f64};
use crate::view::Rows;
use crate::{Error, Result, par};
use std::ops::Range;

/// Centred rows without gaps.
#[derive(Debug, Clone)]
pub struct Points<R> {
    rows: Vec<R>,
    norms: Vec<R>,
    width: usize,
}

/// Some consecutive rows of [`Points`].
#[derive(Debug, Clone, Copy)]
pub struct Block<'a, R> {
    pub rows: &'a [R],
    pub norms: &'a [R],
    pub width: usize,
}

impl<'a, R> Block<'a, R> {
    pub fn row(&self, i: usize) -> &'a [R] {
        &self.rows[i * self.width..(i + 1) * self.width]
    }
}

struct Centre<'a, R>(&'a mut [R], &'a [f64]);

impl<R: Scalar> Kernel for Centre<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        for (x, m) in self.0.iter_mut().zip(self.1) {
            *x = R::from_f64(x.to_f64() - m);
        }
        sum_squares_f64(self.0)
    }
}

impl<R: Scalar> Points<R> {
    /// `n` rows that `fill(i, row)` writes, less `mean`. The difference is taken in f64 and rounded once; norms are those
    /// of the rounded rows.
    pub fn build(n: usize, mean: &[f64], fill: impl Fn(usize, &mut [R]) + Send + Sync) -> Self {
        Self::build_in(&Spare::default(), n, mean, fill)
    }

    /// As [`Points::build`], in a spare buffer.
    pub fn build_in(
        spare: &Spare<R>,
        n: usize,
        mean: &[f64],
        fill: impl Fn(usize, &mut [R]) + Send + Sync,
    ) -> Self {
        let width = mean.len();
        let mut rows = spare.take(n * width);
        let mut norms = vec![R::ZERO; n];
        let step = (par::ITEM_BYTES / (width * size_of::<R>())).max(1);
        let items = rows
            .chunks_mut(step * width)
            .zip(norms.chunks_mut(step))
            .enumerate();
        par::for_each(
            2 * n * width * size_of::<R>(),
            items.collect(),
            |(item, (rows, norms))| {
                for (i, (row, norm)) in rows.chunks_exact_mut(width).zip(norms).enumerate() {
                    fill(item * step + i, row);
                    *norm = R::from_f64(dispatch(Centre(row, mean)));
                }
            },
        );
        Self { rows, norms, width }
    }

    /// Rows `order` of `x`, less `mean`.
    pub fn gather<T: Element<Acc = R>>(x: &Rows<'_, T>, order: &[u32], mean: &[f64]) -> Self {
        Self::gather_in(&Spare::default(), x, order, mean)
    }

    /// As [`Points::gather`], in a spare buffer.
    pub fn gather_in<T: Element<Acc = R>>(
        spare: &Spare<R>,
        x: &Rows<'_, T>,
        order: &[u32],
        mean: &[f64],
    ) -> Self {
        Self::build_in(spare, order.len(), mean, |i, row| {
            for (to, from) in row.iter_mut().zip(x.row(order[i] as usize)) {
                *to = from.load();
            }
        })
    }

    /// The buffer of the rows, for others to use.
    pub fn into_buffer(self) -> Vec<R> {
        self.rows
    }

    pub fn len(&self) -> usize {
        self.norms.len()
    }

    pub fn is_empty(&self) -> bool {
        self.norms.is_empty()
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn block(&self, range: Range<usize>) -> Block<'_, R> {
        Block {
            rows: &self.rows[range.start * self.width..range.end * self.width],
            norms: &self.norms[range],
            width: self.width,
        }
    }
}

struct AddRow<'a, T>(&'a [T], &'a mut [f64]);

impl<T: Element> Kernel for AddRow<'_, T> {
    /// Whether every element is finite.
    type Output = bool;
    #[inline(always)]
    fn run(self) -> bool {
        use crate::element::Real;
        let mut finite = true;
        for (x, sum) in self.0.iter().zip(self.1) {
            finite &= x.finite();
            *sum += x.load().to_f64();
        }
        finite
    }
}

/// Mean row in f64.
///
/// # Errors
/// `NonFinite` if any element is NaN or infinite, `Shape` if there are no rows or no columns.
pub fn mean<T: Element>(arg: &'static str, x: &Rows<'_, T>) -> Result<Vec<f64>> {
    let (n, width) = (x.rows(), x.width());
    if n == 0 || width == 0 {
        return Err(Error::shape(
            arg,
            "at least one row and one column",
            format!("{n} × {width}"),
        ));
    }
    // Partial sums of fixed pieces, few enough to be kept and merged in order.
    let pieces = par::ranges(n, n.div_ceil(64));
    let bytes = n * width * size_of::<T>();
    let partial = par::try_map(bytes, pieces, |range| {
        let mut sum = vec![0.0; width];
        for i in range {
            if !dispatch(AddRow(x.row(i), &mut sum)) {
                return Err(non_finite(arg, i, x.row(i)));
            }
        }
        Ok(sum)
    })?;
    let mut total = vec![0.0; width];
    for part in partial {
        total.iter_mut().zip(part).for_each(|(t, p)| *t += p);
    }
    total.iter_mut().for_each(|t| *t /= n as f64);
    Ok(total)
}

fn non_finite<T: Element>(arg: &'static str, i: usize, row: &[T]) -> Error {
    use crate::element::Real;
    let j = row.iter().position(|v| !v.finite()).unwrap_or(0);
    Error::NonFinite {
        arg,
        index: i * row.len() + j,
        found: row[j].load().to_f64(),
    }
}

/// Stable order of the rows `members` by class, and each class's range in it.
pub fn order_by_class(
    labels: &[u32],
    classes: usize,
    members: &[u32],
) -> (Vec<u32>, Vec<Range<usize>>) {
    let mut order = members.to_vec();
    order.sort_by_key(|i| labels[*i as usize]);
    let mut segments = Vec::with_capacity(classes);
    let mut start = 0;
    for c in 0..classes {
        let end = start + order[start..].partition_point(|i| labels[*i as usize] as usize <= c);
        segments.push(start..end);
        start = end;
    }
    (order, segments)
}

/// Some rows of a data set as points in order of class.
#[derive(Debug)]
pub struct Sorted<R> {
    pub points: Points<R>,
    /// The row of the data set behind each point.
    pub order: Vec<u32>,
    /// Each class's points.
    pub segments: Vec<Range<usize>>,
}

impl<R: Scalar> Sorted<R> {
    /// All rows of `x`, less `mean`.
    pub fn all<T: Element<Acc = R>>(
        x: &Rows<'_, T>,
        labels: &[u32],
        classes: usize,
        mean: &[f64],
    ) -> Self {
        let members: Vec<u32> = (0..x.rows() as u32).collect();
        let (order, segments) = order_by_class(labels, classes, &members);
        Self {
            points: Points::gather(x, &order, mean),
            order,
            segments,
        }
    }

    /// The point behind each of the data set's `rows` rows, `absent` where there is none.
    pub fn positions(&self, rows: usize, absent: u32) -> Vec<u32> {
        let mut at = vec![absent; rows];
        for (k, i) in self.order.iter().enumerate() {
            at[*i as usize] = k as u32;
        }
        at
    }

    /// Rows of `width` values in the points' order, put back in that of the data set.
    pub fn restore<V: Copy + Default>(&self, sorted: &[V], width: usize) -> Vec<V> {
        let mut out = vec![V::default(); sorted.len()];
        for (row, i) in sorted.chunks_exact(width).zip(&self.order) {
            out[*i as usize * width..][..width].copy_from_slice(row);
        }
        out
    }
}
