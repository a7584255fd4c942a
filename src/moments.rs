//! Streaming moments: weighted count, mean and, where asked for, second moments about the mean, all in f64.
//!
//! A batch is summed in chunks of fixed size that are merged as a fixed binary tree, its second moments are taken about
//! its own mean, and batches are merged by Chan's formula; so a large common offset costs no accuracy, and the number of
//! threads changes nothing. Second moments rest on a matrix product: their last bits may differ between instruction sets.

use crate::cancel::Cancel;
use crate::element::{Element, Real};
use crate::linalg::gemm::{self, Mat, Out};
use crate::simd::{Kernel, dispatch, prefetch};
use crate::view::Rows;
use crate::{Error, Result, par};
use std::collections::VecDeque;
use std::ops::Range;

/// Rows per partial sum.
const CHUNK: usize = 256;
/// Rows added to a sum at once.
const GROUP: usize = 8;
/// Elements looked at together, and how far ahead of them memory is asked for.
const PART: usize = 128;
const AHEAD: usize = 2048;
/// Centred rows held in f64 for one round of matrix products.
const SLAB: usize = 512;
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
        if out.sum.iter().all(|s| s.is_finite()) {
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
        out.add(self.x, self.weights.is_some());
        out
    }
}

impl Sum {
    /// Adds the rows in `used`, [`GROUP`] at a time; a short group repeats its first row with weight zero.
    #[inline(always)]
    fn add<T: Element>(&mut self, x: &Rows<'_, T>, weighted: bool) {
        let width = self.sum.len();
        for group in self.used.chunks(GROUP) {
            let (mut rows, mut weights) = ([&x.row(group[0].0)[..width]; GROUP], [0.0; GROUP]);
            for (k, (i, weight)) in group.iter().enumerate() {
                rows[k] = &x.row(*i)[..width];
                weights[k] = *weight;
                self.weight += weight;
            }
            let parts = self.sum.chunks_mut(PART).zip((0..width).step_by(PART));
            if weighted || group.len() < GROUP {
                for (sum, start) in parts {
                    add_part(sum, &rows, start, |k, v| weights[k] * v);
                }
            } else {
                for (sum, start) in parts {
                    add_part(sum, &rows, start, |_, v| v);
                }
            }
        }
    }
}

#[inline(always)]
fn add_part<T: Element>(
    sum: &mut [f64],
    rows: &[&[T]; GROUP],
    start: usize,
    term: impl Fn(usize, f64) -> f64,
) {
    let n = sum.len();
    let parts = rows.map(|r| &r[start..start + n]);
    for row in rows {
        prefetch(&row[start..], AHEAD, n);
    }
    let [a, b, c, d, e, f, g, h] = parts;
    for (j, s) in sum.iter_mut().enumerate() {
        let x = |k: usize, row: &[T]| term(k, row[j].load().to_f64());
        let low = (x(0, a) + x(1, b)) + (x(2, c) + x(3, d));
        let high = (x(4, e) + x(5, f)) + (x(6, g) + x(7, h));
        *s += low + high;
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
    let depth = SLAB.min(used.len());
    // Column blocks one after another, each `depth` rows of `PITCH`: the products read them without strides of a page.
    let mut centred = vec![0.0; d.div_ceil(BLOCK) * depth * PITCH];
    for slab in used.chunks(SLAB) {
        cancel.check()?;
        centre(x, slab, mean, &mut centred, depth);
        let block = |start: usize, cols: usize| {
            let at = start / BLOCK * depth * PITCH + start % BLOCK;
            Mat::strided(&centred[at..], slab.len(), cols, PITCH)
        };
        par::for_each(usize::MAX, folded(&mut out, STRIP * d), |strips| {
            for (i, strip) in strips {
                let (start, height) = (i * STRIP, strip.len() / d);
                for left in (0..start + height).step_by(BLOCK) {
                    let cols = (start + height - left).min(BLOCK);
                    let to = Out {
                        data: &mut strip[left..],
                        stride: d,
                        add: true,
                    };
                    gemm::at_b(to, block(start, height), block(left, cols));
                }
            }
        });
    }
    Ok(out)
}

/// Pieces of `step` elements with their indices, the last with the first and so on inwards: in a triangle the two
/// together are as much work as any other two.
fn folded(a: &mut [f64], step: usize) -> Vec<Vec<(usize, &mut [f64])>> {
    let mut pieces: VecDeque<_> = a.chunks_mut(step).enumerate().collect();
    let mut items = Vec::with_capacity(pieces.len().div_ceil(2));
    while let Some(last) = pieces.pop_back() {
        items.push(std::iter::once(last).chain(pieces.pop_front()).collect());
    }
    items
}

/// `√w (x − mean)` of the rows in `slab`, in column blocks of `depth` rows of `PITCH`.
fn centre<T: Element>(
    x: &Rows<'_, T>,
    slab: &[(usize, f64)],
    mean: &[f64],
    to: &mut [f64],
    depth: usize,
) {
    let blocks: Vec<(usize, &mut [f64])> = to.chunks_mut(depth * PITCH).enumerate().collect();
    par::for_each(slab.len() * mean.len() * 8, blocks, |(b, to)| {
        let cols = b * BLOCK..(b * BLOCK + BLOCK).min(mean.len());
        dispatch(Centre {
            x,
            slab,
            mean: &mean[cols.clone()],
            first: cols.start,
            to,
        });
    });
}

struct Centre<'a, T> {
    x: &'a Rows<'a, T>,
    slab: &'a [(usize, f64)],
    mean: &'a [f64],
    first: usize,
    to: &'a mut [f64],
}

impl<T: Element> Kernel for Centre<'_, T> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let n = self.mean.len();
        for ((i, weight), to) in self.slab.iter().zip(self.to.chunks_exact_mut(PITCH)) {
            let root = weight.sqrt();
            let row = &self.x.row(*i)[self.first..][..n];
            for ((to, v), m) in to[..n].iter_mut().zip(row).zip(self.mean) {
                *to = root * (v.load().to_f64() - m);
            }
        }
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
                assert!(close(m.mean(), &mean, 1e-13));
                let (i, j) = (width / 3, width - 1);
                let want: f64 = column(i).zip(column(j)).map(|(a, b)| (a - mean[i]) * (b - mean[j])).sum();
                let got = m.second().unwrap();
                assert!((got[i * width + j] - want).abs() < 1e-9 * (1.0 + want.abs()) * rows as f64);
                assert_eq!(got[i * width + j], got[j * width + i]);
            });
        }
    }
}
