//! Streaming moments: weighted count, mean and, where asked for, second moments about the mean, all held in f64.
//!
//! A batch is summed in chunks of fixed size that are merged as a fixed binary tree, its second moments are taken about
//! its own mean, and batches are merged by Chan's formula; so a large common offset costs no accuracy, and the number of
//! threads changes nothing. Second moments rest on a matrix product: their last bits may differ between instruction sets.
//!
//! Sums of f32 and f64 are f64 throughout; half-precision rows are added eight at a time in f32, which costs a mean at
//! most `2⁻²²` of the mean magnitude. Rows are centred and multiplied in f64, but for bf16: those are centred and multiplied in f32, [`DEPTH`] rows at a
//! time, whose results are added in f64. Element (i, j) is then off by at most `2⁻¹⁵ Σ |aᵢ bⱼ|` over the centred elements,
//! a hundredth of that as a rule, where their storage has already cost up to `2⁻⁸` each.

use crate::cancel::Cancel;
use crate::element::{DType, Element, Real};
use crate::linalg::gemm::{self, Gemm, Mat, Out};
use crate::simd::{Kernel, dispatch};
use crate::view::Rows;
use crate::{Error, Result, par};
use std::ops::Range;

/// Rows per partial sum.
const CHUNK: usize = 128;
/// Rows added to a sum at once.
const GROUP: usize = 8;
/// Elements of each of those rows that are added before the next part: long enough for the hardware to follow the rows
/// by itself, short enough for their sums to stay in the nearest cache.
const PART: usize = 1024;
/// Columns of a part that are added at once, without a look at how many are left.
const COLUMNS: usize = 32;
/// Centred rows held for one round of matrix products.
const SLAB: usize = 512;
/// Rows whose products may be summed in f32.
const DEPTH: usize = 256;
/// Largest magnitudes of a column, between which products of two columns and sums of [`DEPTH`] of them stay clear of
/// the ends of f32.
const NARROW: Range<f32> = 1e-15..1e15;
/// Columns of a block of centred rows, and the elements from one of its rows to the next.
const BLOCK: usize = 256;
const PITCH: usize = BLOCK + 8;
/// Rows of second moments that are one piece of work; divides [`BLOCK`].
const STRIP: usize = 128;

/// What to do with a row that holds a NaN or an infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonFinitePolicy {
    /// Refuse the whole batch.
    Error,
    /// Leave the row out and count it.
    Skip,
}

/// Count, mean and second moments of the rows seen so far.
#[derive(Debug, Clone)]
pub struct Moments {
    width: usize,
    weight: f64,
    mean: Vec<f64>,
    /// `width × width`, of which only the lower triangle counts: what lies above it is not kept up.
    second: Option<Vec<f64>>,
}

impl PartialEq for Moments {
    fn eq(&self, other: &Self) -> bool {
        (self.width, self.weight, &self.mean) == (other.width, other.weight, &other.mean)
            && self.second() == other.second()
    }
}

impl Moments {
    /// No rows yet; `second` asks for the `width × width` matrix of second moments.
    pub fn new(width: usize, second: bool) -> Self {
        Self {
            width,
            weight: 0.0,
            mean: vec![0.0; width],
            second: second.then(|| vec![0.0; width * width]),
        }
    }

    /// Moments from their stored parts; of `second` the lower triangle is read.
    ///
    /// # Errors
    /// `Shape` if the lengths do not fit, `Value` if the weight is negative or not finite.
    pub fn from_parts(weight: f64, mean: Vec<f64>, second: Option<Vec<f64>>) -> Result<Self> {
        let width = mean.len();
        if let Some(s) = &second
            && s.len() != width * width
        {
            return Err(Error::shape(
                "second",
                format!("{} elements", width * width),
                s.len(),
            ));
        }
        if !(weight >= 0.0 && weight.is_finite()) {
            return Err(Error::value("weight", "0 or more", weight));
        }
        Ok(Self {
            width,
            weight,
            mean,
            second,
        })
    }

    /// Length of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Sum of the weights: the number of rows where none were given.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// Weighted mean; zeros before the first row.
    pub fn mean(&self) -> &[f64] {
        &self.mean
    }

    /// Whether second moments were asked for.
    pub fn has_second(&self) -> bool {
        self.second.is_some()
    }

    /// `Σ w (x − mean)(x − mean)ᵀ`, `width × width` and symmetric, if asked for.
    pub fn second(&self) -> Option<Vec<f64>> {
        self.second
            .as_ref()
            .map(|lower| mirrored(lower, self.width))
    }

    /// Adds rows, each with its weight (1 without `weights`; rows of weight 0 are not looked at). Returns how many were
    /// skipped as non-finite.
    ///
    /// # Errors
    /// `Shape` and `Value` for widths and weights that do not fit, `NonFinite` by policy, `Interrupted`; nothing changes
    /// then.
    pub fn update<T: Element>(
        &mut self,
        x: &Rows<'_, T>,
        weights: Option<&[f64]>,
        policy: NonFinitePolicy,
        cancel: &Cancel,
    ) -> Result<u64> {
        if x.width() != self.width {
            return Err(Error::shape(
                "x",
                format!("a last axis of {}", self.width),
                x.width(),
            ));
        }
        check_weights(x.rows(), weights)?;
        let bytes = x.rows() * self.width * size_of::<T>();
        let mut chunks = par::map(bytes, par::ranges(x.rows(), CHUNK), |rows| {
            dispatch(ChunkSum { x, weights, rows })
        });
        if policy == NonFinitePolicy::Error
            && let Some((index, found)) = chunks.iter().find_map(|c| c.first_bad)
        {
            return Err(Error::NonFinite {
                arg: "x",
                index,
                found,
            });
        }
        let used: Vec<(usize, f64)> = chunks
            .iter_mut()
            .flat_map(|c| std::mem::take(&mut c.used))
            .collect();
        let skipped = chunks.iter().map(|c| c.skipped).sum();
        let Some(total) = tree_sum(chunks) else {
            return Ok(0);
        };
        if total.weight > 0.0 {
            let mean: Vec<f64> = total.sum.iter().map(|s| s / total.weight).collect();
            if mean.iter().any(|m| !m.is_finite()) {
                return Err(Error::value("x", "rows whose sum is finite", "an overflow"));
            }
            let second = match &self.second {
                Some(_) => Some(scatter(x, &used, &mean, cancel)?),
                None => None,
            };
            let batch = Self {
                width: self.width,
                weight: total.weight,
                mean,
                second,
            };
            if self.weight == 0.0 {
                *self = batch;
            } else {
                self.merge(&batch)?;
            }
        }
        Ok(skipped)
    }

    /// Adds the rows that `other` has seen (Chan, Golub, LeVeque 1983).
    ///
    /// # Errors
    /// `Shape` for another width, `Value` if only one of the two has second moments; nothing changes then.
    pub fn merge(&mut self, other: &Self) -> Result<()> {
        if other.width != self.width {
            return Err(Error::shape(
                "other",
                format!("width {}", self.width),
                other.width,
            ));
        }
        if other.second.is_some() != self.second.is_some() {
            return Err(Error::value(
                "other",
                "second moments in both or in neither",
                "in one",
            ));
        }
        let weight = self.weight + other.weight;
        if other.weight == 0.0 {
            return Ok(());
        }
        if self.weight == 0.0 {
            self.clone_from(other);
            return Ok(());
        }
        let delta: Vec<f64> = other
            .mean
            .iter()
            .zip(&self.mean)
            .map(|(b, a)| b - a)
            .collect();
        if let (Some(c), Some(b)) = (&mut self.second, &other.second) {
            let factor = self.weight / weight * other.weight;
            let d = self.width;
            let rows = c.chunks_mut(d).zip(b.chunks(d)).enumerate().collect();
            par::for_each(
                8 * d * d,
                rows,
                |(i, (c, b)): (usize, (&mut [f64], &[f64]))| {
                    for ((c, b), e) in c[..=i].iter_mut().zip(b).zip(&delta) {
                        *c += b + factor * (delta[i] * e);
                    }
                },
            );
        }
        let share = other.weight / weight;
        self.mean
            .iter_mut()
            .zip(&delta)
            .for_each(|(m, d)| *m += d * share);
        self.weight = weight;
        Ok(())
    }
}

fn check_weights(rows: usize, weights: Option<&[f64]>) -> Result<()> {
    let Some(weights) = weights else {
        return Ok(());
    };
    if weights.len() != rows {
        return Err(Error::shape(
            "weights",
            format!("{rows} weights, one per row"),
            weights.len(),
        ));
    }
    match weights.iter().find(|w| !(**w >= 0.0 && w.is_finite())) {
        Some(w) => Err(Error::value("weights", "finite numbers, 0 or more", w)),
        None => Ok(()),
    }
}

/// Weighted sum of one chunk of rows.
struct Sum {
    weight: f64,
    sum: Vec<f64>,
    /// Rows that count, with their weights.
    used: Vec<(usize, f64)>,
    skipped: u64,
    /// Flat index and value of the first non-finite element.
    first_bad: Option<(usize, f64)>,
}

/// Neighbours first, until one is left.
fn tree_sum(mut parts: Vec<Sum>) -> Option<Sum> {
    while parts.len() > 1 {
        let mut halved = Vec::with_capacity(parts.len().div_ceil(2));
        let mut rest = parts.into_iter();
        while let Some(mut a) = rest.next() {
            if let Some(b) = rest.next() {
                a.weight += b.weight;
                a.sum.iter_mut().zip(&b.sum).for_each(|(a, b)| *a += b);
            }
            halved.push(a);
        }
        parts = halved;
    }
    parts.pop()
}

struct ChunkSum<'a, T> {
    x: &'a Rows<'a, T>,
    weights: Option<&'a [f64]>,
    rows: Range<usize>,
}

impl<T: Element> Kernel for ChunkSum<'_, T> {
    type Output = Sum;
    #[inline(always)]
    fn run(self) -> Sum {
        let width = self.x.width();
        let weight = |i: usize| self.weights.map_or(1.0, |w| w[i]);
        let all = self.rows.map(|i| (i, weight(i))).filter(|(_, w)| *w > 0.0);
        let mut out = Sum {
            weight: 0.0,
            sum: vec![0.0; width],
            used: all.collect(),
            skipped: 0,
            first_bad: None,
        };
        out.add(self.x, self.weights.is_some());
        // A row that is not finite makes the sum so: only then is it worth looking for.
        if !out.sum.iter().fold(false, |bad, s| bad | !s.is_finite()) {
            return out;
        }
        let (skipped, first_bad) = (&mut out.skipped, &mut out.first_bad);
        out.used.retain(|(i, _)| {
            let row = self.x.row(*i);
            let Some(bad) = row.iter().position(|v| !v.finite()) else {
                return true;
            };
            *skipped += 1;
            first_bad.get_or_insert((i * width + bad, row[bad].load().to_f64()));
            false
        });
        out.sum.fill(0.0);
        out.weight = 0.0;
        out.add(self.x, true);
        out
    }
}

impl Sum {
    /// Adds the rows in `used`, [`GROUP`] at a time; a short group repeats its first row with weight zero. Unless asked
    /// to be `careful` (of weights, or of sums beyond f32), half-precision rows of a group are added in f32.
    #[inline(always)]
    fn add<T: Element>(&mut self, x: &Rows<'_, T>, careful: bool) {
        let width = self.sum.len();
        for group in self.used.chunks(GROUP) {
            let (mut rows, mut weights) = ([&x.row(group[0].0)[..width]; GROUP], [0.0; GROUP]);
            for (k, (i, weight)) in group.iter().enumerate() {
                rows[k] = &x.row(*i)[..width];
                weights[k] = *weight;
                self.weight += weight;
            }
            let parts = self.sum.chunks_mut(PART).zip((0..width).step_by(PART));
            for (sum, start) in parts {
                let n = sum.len();
                let part = rows.map(|r| &r[start..start + n]);
                if careful || group.len() < GROUP {
                    add_part(sum, part, |k, v| weights[k] * v.load().to_f64(), |s| s);
                } else if T::DTYPE.size() == 2 {
                    add_part(sum, part, |_, v| v.load(), Real::to_f64);
                } else {
                    add_part(sum, part, |_, v| v.load().to_f64(), |s| s);
                }
            }
        }
    }
}

/// Adds a term for each row, the terms of a column as a tree in their own arithmetic, to `sum`.
#[inline(always)]
fn add_part<T: Element, R: Real>(
    sum: &mut [f64],
    rows: [&[T]; GROUP],
    term: impl Fn(usize, T) -> R,
    widen: impl Fn(R) -> f64,
) {
    let n = sum.len() / COLUMNS;
    let (blocks, rest) = sum.as_chunks_mut::<COLUMNS>();
    let [a, b, c, d, e, f, g, h] = rows.map(|r| &r.as_chunks::<COLUMNS>().0[..n]);
    for (j, s) in blocks.iter_mut().enumerate() {
        let (a, b, c, d) = (&a[j], &b[j], &c[j], &d[j]);
        let (e, f, g, h) = (&e[j], &f[j], &g[j], &h[j]);
        for k in 0..COLUMNS {
            let low = (term(0, a[k]) + term(1, b[k])) + (term(2, c[k]) + term(3, d[k]));
            let high = (term(4, e[k]) + term(5, f[k])) + (term(6, g[k]) + term(7, h[k]));
            s[k] += widen(low + high);
        }
    }
    for (j, s) in (n * COLUMNS..).zip(rest) {
        let x = |k: usize| term(k, rows[k][j]);
        let low = (x(0) + x(1)) + (x(2) + x(3));
        let high = (x(4) + x(5)) + (x(6) + x(7));
        *s += widen(low + high);
    }
}

/// Lower triangle of `Σ w (x − mean)(x − mean)ᵀ` over the rows in `used`; what lies above it stays zero up to the block
/// on the diagonal, which is computed whole.
fn scatter<T: Element>(
    x: &Rows<'_, T>,
    used: &[(usize, f64)],
    mean: &[f64],
    cancel: &Cancel,
) -> Result<Vec<f64>> {
    let d = mean.len();
    let mut out = vec![0.0; d * d];
    let (mut wide, mut narrow) = (Centred::<f64>::default(), Centred::<f32>::default());
    for slab in used.chunks(SLAB) {
        cancel.check()?;
        if T::DTYPE == DType::BF16 && narrow.centre(x, slab, mean) {
            narrow.add_products(&mut out, d, add_in_f32);
        } else {
            wide.centre(x, slab, mean);
            wide.add_products(&mut out, d, |to, stride, a, b, _| {
                let to = Out {
                    data: to,
                    stride,
                    add: true,
                };
                gemm::at_b(to, a, b);
            });
        }
    }
    Ok(out)
}

/// Adds `aᵀ b` to rows of `stride`: the products of [`DEPTH`] rows in f32, their sums in f64.
fn add_in_f32(
    to: &mut [f64],
    stride: usize,
    a: Mat<'_, f32>,
    b: Mat<'_, f32>,
    scratch: &mut Vec<f32>,
) {
    let cols = b.cols();
    scratch.resize(a.cols() * cols, 0.0);
    for rows in par::ranges(a.rows(), DEPTH) {
        let product = Out {
            data: &mut scratch[..],
            stride: cols,
            add: false,
        };
        gemm::at_b(product, a.slice_rows(rows.clone()), b.slice_rows(rows));
        for (to, product) in to.chunks_mut(stride).zip(scratch.chunks_exact(cols)) {
            for (to, product) in to[..cols].iter_mut().zip(product) {
                *to += f64::from(*product);
            }
        }
    }
}

/// Centred rows as column blocks one after another, each `depth` rows of [`PITCH`]: matrix products read them without
/// strides of a page.
#[derive(Default)]
struct Centred<R> {
    data: Vec<R>,
    depth: usize,
}

impl<R: Gemm> Centred<R> {
    /// Holds `√w (x − mean)` of the rows in `slab`; whether the largest magnitude of every column is in [`NARROW`] or
    /// zero.
    fn centre<T: Element>(&mut self, x: &Rows<'_, T>, slab: &[(usize, f64)], mean: &[f64]) -> bool {
        let d = mean.len();
        self.depth = slab.len();
        self.data
            .resize(d.div_ceil(BLOCK) * self.depth * PITCH, R::ZERO);
        let blocks = self.data.chunks_mut(self.depth * PITCH).enumerate();
        par::map(slab.len() * d * 8, blocks.collect(), |(b, to)| {
            let cols = b * BLOCK..(b * BLOCK + BLOCK).min(d);
            dispatch(Centre {
                x,
                slab,
                mean: &mean[cols.clone()],
                first: cols.start,
                to,
            })
        })
        .into_iter()
        .all(|narrow| narrow)
    }

    /// The rows of `cols` columns from `start` on, which must not cross a block.
    fn block(&self, start: usize, cols: usize) -> Mat<'_, R> {
        let at = start / BLOCK * self.depth * PITCH + start % BLOCK;
        Mat::strided(&self.data[at..], self.depth, cols, PITCH)
    }

    /// `add`s the products of all pairs of blocks to the lower triangle of `out`; it is handed rows of a stride, the
    /// two blocks, and memory to work in.
    fn add_products(
        &self,
        out: &mut [f64],
        d: usize,
        add: impl Fn(&mut [f64], usize, Mat<'_, R>, Mat<'_, R>, &mut Vec<R>) + Sync + Send,
    ) {
        par::for_each(usize::MAX, par::folded(out, STRIP * d), |strips| {
            let mut scratch = Vec::new();
            for (i, strip) in strips {
                let (start, height) = (i * STRIP, strip.len() / d);
                for left in (0..start + height).step_by(BLOCK) {
                    let cols = (start + height - left).min(BLOCK);
                    let (a, b) = (self.block(start, height), self.block(left, cols));
                    add(&mut strip[left..], d, a, b, &mut scratch);
                }
            }
        });
    }
}

/// One column block of [`Centred::centre`].
struct Centre<'a, T, R> {
    x: &'a Rows<'a, T>,
    slab: &'a [(usize, f64)],
    mean: &'a [f64],
    first: usize,
    to: &'a mut [R],
}

impl<T: Element, R: Gemm> Kernel for Centre<'_, T, R> {
    type Output = bool;
    #[inline(always)]
    fn run(self) -> bool {
        let n = self.mean.len();
        let mut mean = [R::ZERO; BLOCK];
        for (to, m) in mean.iter_mut().zip(self.mean) {
            *to = R::from_f64(*m);
        }
        let mut largest = [R::ZERO; BLOCK];
        for ((i, weight), to) in self.slab.iter().zip(self.to.chunks_exact_mut(PITCH)) {
            let root = R::from_f64(weight.sqrt());
            let row = &self.x.row(*i)[self.first..][..n];
            let columns = mean[..n].iter().zip(&mut largest[..n]);
            for ((to, v), (m, largest)) in to[..n].iter_mut().zip(row).zip(columns) {
                *to = root * (R::from_f64(v.load().to_f64()) - *m);
                *largest = to.abs().greater(*largest);
            }
        }
        largest[..n]
            .iter()
            .all(|v| *v == R::ZERO || NARROW.contains(&(v.to_f64() as f32)))
    }
}

/// The symmetric matrix whose lower triangle is given.
fn mirrored(lower: &[f64], d: usize) -> Vec<f64> {
    const TILE: usize = 32;
    let mut out = vec![0.0; d * d];
    let bytes = size_of_val(lower);
    par::for_each(
        bytes,
        out.chunks_mut(TILE * d).enumerate().collect(),
        |(b, strip): (usize, &mut [f64])| {
            let first = b * TILE;
            for (r, line) in strip.chunks_exact_mut(d).enumerate() {
                let i = first + r;
                line[..=i].copy_from_slice(&lower[i * d..][..=i]);
            }
            for left in (first..d).step_by(TILE) {
                for (r, line) in strip.chunks_exact_mut(d).enumerate() {
                    let cols = left.max(first + r + 1)..(left + TILE).min(d);
                    for j in cols {
                        line[j] = lower[j * d + first + r];
                    }
                }
            }
        },
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_level;
    use half::bf16;
    use proptest::prelude::*;

    fn of(rows: &[f64], width: usize, second: bool) -> Moments {
        let mut m = Moments::new(width, second);
        m.update(
            &Rows::matrix(rows, width),
            None,
            NonFinitePolicy::Error,
            &Cancel::new(),
        )
        .unwrap();
        m
    }

    fn close(a: &[f64], b: &[f64], tol: f64) -> bool {
        a.len() == b.len()
            && a.iter()
                .zip(b)
                .all(|(x, y)| (x - y).abs() <= tol * (1.0 + y.abs()))
    }

    #[test]
    fn merge_by_chan() {
        let mut a = of(&[1.0, 2.0, 3.0, 5.0, 4.0, 1.0], 2, true);
        let c = [14.0 / 3.0, -1.0 / 3.0, -1.0 / 3.0, 26.0 / 3.0];
        assert!(close(a.mean(), &[8.0 / 3.0, 8.0 / 3.0], 1e-15));
        assert!(close(&a.second().unwrap(), &c, 1e-14));
        let b = of(&[2.0, 0.0, 6.0, 3.0], 2, true);
        assert!(close(b.mean(), &[4.0, 1.5], 1e-15));
        assert!(close(&b.second().unwrap(), &[8.0, 6.0, 6.0, 4.5], 1e-14));
        a.merge(&b).unwrap();
        assert_eq!(a.weight(), 5.0);
        assert!(close(a.mean(), &[3.2, 2.2], 1e-15));
        assert!(close(&a.second().unwrap(), &[14.8, 3.8, 3.8, 14.8], 1e-14));
    }

    #[test]
    fn columns_do_not_depend_on_how_many_there_are() {
        let (rows, width) = (24, 3 * COLUMNS + 5);
        let value = |i: usize| bf16::from_f32((i as f32 * 0.37).sin() * 1e3);
        let data: Vec<bf16> = (0..rows * width).map(value).collect();
        let mean = |columns: Range<usize>| {
            let part: Vec<bf16> = data
                .chunks(width)
                .flat_map(|row| row[columns.clone()].to_vec())
                .collect();
            let mut m = Moments::new(columns.len(), false);
            let x = Rows::matrix(&part, columns.len());
            m.update(&x, None, NonFinitePolicy::Error, &Cancel::new())
                .unwrap();
            m.mean
        };
        for_each_level(|_| {
            let all = mean(0..width);
            for columns in [0..7, 3..COLUMNS + 3, COLUMNS..width] {
                assert_eq!(mean(columns.clone()), all[columns]);
            }
        });
    }

    #[test]
    fn a_large_offset_costs_nothing() {
        let base: Vec<f64> = (0..1000).map(|i| f64::from(i % 17) - 8.0).collect();
        let plain = of(&base, 1, true);
        let moved: Vec<f64> = base.iter().map(|v| v + 1e8).collect();
        let shifted = of(&moved, 1, true);
        let (a, b) = (plain.second().unwrap()[0], shifted.second().unwrap()[0]);
        assert!((a - b).abs() < 1e-6 * a, "{a} {b}");
    }

    #[test]
    fn weights_policies_and_refusals() {
        let x = [1.0, 2.0, f64::NAN, 4.0, 5.0, 6.0];
        let rows = Rows::matrix(&x, 2);
        let mut m = Moments::new(2, false);
        let err = m
            .update(&rows, None, NonFinitePolicy::Error, &Cancel::new())
            .unwrap_err();
        assert!(matches!(err, Error::NonFinite { index: 2, .. }));
        assert_eq!(m, Moments::new(2, false));
        assert_eq!(
            m.update(&rows, None, NonFinitePolicy::Skip, &Cancel::new()),
            Ok(1)
        );
        assert_eq!((m.weight(), m.mean()), (2.0, &[3.0, 4.0][..]));
        let mut m = Moments::new(2, false);
        assert_eq!(
            m.update(
                &rows,
                Some(&[3.0, 0.0, 1.0]),
                NonFinitePolicy::Error,
                &Cancel::new()
            ),
            Ok(0)
        );
        assert_eq!((m.weight(), m.mean()), (4.0, &[2.0, 3.0][..]));
        for bad in [[1.0, -1.0, 0.0], [f64::NAN, 1.0, 1.0]] {
            assert!(matches!(
                m.update(&rows, Some(&bad), NonFinitePolicy::Skip, &Cancel::new()),
                Err(Error::Value { .. })
            ));
        }
        assert!(
            m.update(&rows, Some(&[1.0]), NonFinitePolicy::Skip, &Cancel::new())
                .is_err()
        );
        assert!(
            m.update(
                &Rows::matrix(&x, 3),
                None,
                NonFinitePolicy::Skip,
                &Cancel::new()
            )
            .is_err()
        );
        assert!(m.merge(&Moments::new(3, false)).is_err());
        assert!(m.merge(&Moments::new(2, true)).is_err());
        assert_eq!((m.weight(), m.mean()), (4.0, &[2.0, 3.0][..]));
        let (mut m, cancelled) = (Moments::new(2, true), Cancel::new());
        cancelled.cancel();
        assert_eq!(
            m.update(&rows, None, NonFinitePolicy::Skip, &cancelled),
            Err(Error::Interrupted)
        );
        assert_eq!(m, Moments::new(2, true));
    }

    /// Columns too large, too small or constant for products in f32 are multiplied in f64.
    #[test]
    fn extreme_bf16_columns() {
        let scales = [1e18f32, 1e-20, 1.0, 0.0];
        let x: Vec<bf16> = (0..600 * 4)
            .map(|i| bf16::from_f32(scales[i % 4] * ((i * 7919 % 101) as f32 - 50.0)))
            .collect();
        let mut m = Moments::new(4, true);
        let rows = Rows::matrix(&x, 4);
        m.update(&rows, None, NonFinitePolicy::Error, &Cancel::new())
            .unwrap();
        let wide: Vec<f64> = x.iter().map(|v| v.to_f64()).collect();
        let want = of(&wide, 4, true).second().unwrap();
        for (got, want) in m.second().unwrap().iter().zip(&want) {
            assert!((got - want).abs() <= 1e-12 * want.abs(), "{got} {want}");
        }
    }

    #[test]
    fn equal_bf16_columns_have_equal_moments() {
        let (rows, width) = (900, 131);
        let value = |i: usize| bf16::from_f32((i * 7919 % 1009) as f32 / 64.0 - 3.0);
        let mut x: Vec<bf16> = (0..rows * width).map(value).collect();
        for row in x.chunks_mut(width) {
            row[130] = row[17];
        }
        let mut m = Moments::new(width, true);
        let x = Rows::matrix(&x, width);
        m.update(&x, None, NonFinitePolicy::Error, &Cancel::new())
            .unwrap();
        let s = m.second().unwrap();
        let at = |i: usize, j: usize| s[i * width + j];
        assert_eq!((at(17, 17), at(130, 130)), (at(130, 17), at(130, 17)));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn batches_levels_and_threads_agree_with_the_definition(
            width in 1usize..300,
            rows in 1usize..700,
            cut in 0.0f64..1.0,
            seed in any::<u64>(),
        ) {
            let value = |i: u64| (seed.wrapping_mul(2 * i + 1).rotate_left(17) >> 48) as f32 / 4096.0;
            let x: Vec<bf16> = (0..(rows * width) as u64).map(|i| bf16::from_f32(value(i))).collect();
            let cut = (cut * rows as f64) as usize * width;
            let mut seen = None;
            for_each_level(|_| {
                let mut m = Moments::new(width, true);
                for part in [&x[..cut], &x[cut..]] {
                    let part = Rows::matrix(part, width);
                    assert_eq!(m.update(&part, None, NonFinitePolicy::Error, &Cancel::new()), Ok(0));
                }
                let bits: Vec<u64> = m.mean().iter().map(|v| v.to_bits()).collect();
                assert_eq!(seen.get_or_insert_with(|| bits.clone()), &bits);
                let column = |j: usize| x.iter().skip(j).step_by(width).map(|v| f64::from(v.to_f32()));
                let mean: Vec<f64> = (0..width).map(|j| column(j).sum::<f64>() / rows as f64).collect();
                assert!(close(m.mean(), &mean, 1e-6));
                let (i, j) = (width / 3, width - 1);
                let want: f64 = column(i).zip(column(j)).map(|(a, b)| (a - mean[i]) * (b - mean[j])).sum();
                let got = m.second().unwrap();
                let size: f64 = column(i).zip(column(j)).map(|(a, b)| ((a - mean[i]) * (b - mean[j])).abs()).sum();
                assert!((got[i * width + j] - want).abs() <= size / 32768.0);
                assert_eq!(got[i * width + j], got[j * width + i]);
            });
        }
    }
}
