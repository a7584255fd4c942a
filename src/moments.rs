//! Streaming moments: weighted count, mean and, where asked for, second moments about the mean, all in f64.
//!
//! A batch is summed in chunks of fixed size that are merged as a fixed binary tree, its second moments are taken about
//! its own mean, and batches are merged by Chan's formula; so a large common offset costs no accuracy, and the number of
//! threads changes nothing. Second moments rest on a matrix product: their last bits may differ between instruction sets.

use crate::cancel::Cancel;
use crate::element::{Element, Real};
use crate::simd::{Kernel, dispatch, prefetch};
use crate::view::Rows;
use crate::{Error, Result, par};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use std::ops::Range;

/// Rows per partial sum.
const CHUNK: usize = 256;
/// Rows added to a sum at once.
const GROUP: usize = 4;
/// Elements looked at together, and how far ahead of them memory is asked for.
const PART: usize = 128;
const AHEAD: usize = 2048;
/// Centred rows held in f64 for one round of matrix products.
const SLAB: usize = 512;
/// Side of the blocks that the second moments are computed in.
const BLOCK: usize = 256;

/// What to do with a row that holds a NaN or an infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonFinitePolicy {
    /// Refuse the whole batch.
    Error,
    /// Leave the row out and count it.
    Skip,
}

/// Count, mean and second moments of the rows seen so far.
#[derive(Debug, Clone, PartialEq)]
pub struct Moments {
    width: usize,
    weight: f64,
    mean: Vec<f64>,
    second: Option<Vec<f64>>,
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

    /// Moments from their stored parts.
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

    /// `Σ w (x − mean)(x − mean)ᵀ`, `width × width`, if asked for.
    pub fn second(&self) -> Option<&[f64]> {
        self.second.as_deref()
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
            self.merge(&Self {
                width: self.width,
                weight: total.weight,
                mean,
                second,
            })?;
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
        let delta: Vec<f64> = other
            .mean
            .iter()
            .zip(&self.mean)
            .map(|(b, a)| b - a)
            .collect();
        if let (Some(c), Some(b)) = (&mut self.second, &other.second) {
            let factor = self.weight / weight * other.weight;
            for (i, (c, b)) in c
                .chunks_exact_mut(self.width)
                .zip(b.chunks_exact(self.width))
                .enumerate()
            {
                // The product of the two differences first: it is the same both ways round, and the matrix symmetric.
                for ((c, b), e) in c.iter_mut().zip(b).zip(&delta) {
                    *c += b + factor * (delta[i] * e);
                }
            }
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
        let mut out = Sum {
            weight: 0.0,
            sum: vec![0.0; width],
            used: Vec::with_capacity(self.rows.len()),
            skipped: 0,
            first_bad: None,
        };
        for i in self.rows {
            let weight = self.weights.map_or(1.0, |w| w[i]);
            if weight == 0.0 {
                continue;
            }
            let row = self.x.row(i);
            if non_finite(row) == 0 {
                out.used.push((i, weight));
                out.weight += weight;
                // Right after the check, while the rows are in the cache.
                if out.used.len().is_multiple_of(GROUP) {
                    let last = out.used.len() - GROUP;
                    add_rows(&mut out.sum, self.x, &out.used[last..]);
                }
                continue;
            }
            out.skipped += 1;
            let bad = row.iter().position(|v| !v.finite()).unwrap_or(0);
            out.first_bad
                .get_or_insert((i * width + bad, row[bad].load().to_f64()));
        }
        let rest = out.used.len() % GROUP;
        if rest > 0 {
            let last = out.used.len() - rest;
            add_rows(&mut out.sum, self.x, &out.used[last..]);
        }
        out
    }
}

#[inline(always)]
fn non_finite<T: Element>(row: &[T]) -> u32 {
    let mut bad = 0;
    for part in row.chunks(PART) {
        prefetch(part, AHEAD, PART);
        bad += part.iter().map(|v| u32::from(!v.finite())).sum::<u32>();
    }
    bad
}

/// Adds up to [`GROUP`] rows with their weights; a short group repeats its first row with weight zero.
#[inline(always)]
fn add_rows<T: Element>(sum: &mut [f64], x: &Rows<'_, T>, used: &[(usize, f64)]) {
    let width = sum.len();
    let (mut rows, mut weights) = ([&x.row(used[0].0)[..width]; GROUP], [0.0; GROUP]);
    for (k, (i, weight)) in used.iter().enumerate() {
        rows[k] = &x.row(*i)[..width];
        weights[k] = *weight;
    }
    add_group(sum, &rows, &weights);
}

#[inline(always)]
fn add_group<T: Element>(sum: &mut [f64], rows: &[&[T]; GROUP], w: &[f64; GROUP]) {
    let n = sum.len();
    let [a, b, c, d] = rows.map(|r| &r[..n]);
    for (j, s) in sum.iter_mut().enumerate() {
        let x = [a[j], b[j], c[j], d[j]].map(|v| v.load().to_f64());
        *s += (w[0] * x[0] + w[1] * x[1]) + (w[2] * x[2] + w[3] * x[3]);
    }
}

/// `Σ w (x − mean)(x − mean)ᵀ` over the rows in `used`.
fn scatter<T: Element>(
    x: &Rows<'_, T>,
    used: &[(usize, f64)],
    mean: &[f64],
    cancel: &Cancel,
) -> Result<Vec<f64>> {
    let d = mean.len();
    let mut out = vec![0.0; d * d];
    let blocks = par::ranges(d, BLOCK);
    let pairs: Vec<(Range<usize>, Range<usize>)> = (blocks.iter().enumerate())
        .flat_map(|(i, rows)| blocks[..=i].iter().map(|cols| (rows.clone(), cols.clone())))
        .collect();
    for slab in used.chunks(SLAB) {
        cancel.check()?;
        let centred: Vec<f64> = par::map(slab.len() * d * 8, slab.to_vec(), |(i, w)| {
            let root = w.sqrt();
            let row = x.row(i).iter().zip(mean);
            row.map(|(v, m)| root * (v.load().to_f64() - m))
                .collect::<Vec<f64>>()
        })
        .concat();
        let z = MatRef::from_row_major_slice(&centred, slab.len(), d);
        let products = par::map(usize::MAX, pairs.clone(), |(rows, cols)| {
            let mut block = vec![0.0; rows.len() * cols.len()];
            matmul(
                MatMut::from_row_major_slice_mut(&mut block, rows.len(), cols.len()),
                Accum::Replace,
                z.subcols(rows.start, rows.len()).transpose(),
                z.subcols(cols.start, cols.len()),
                1.0,
                Par::Seq,
            );
            block
        });
        for ((rows, cols), block) in pairs.iter().zip(&products) {
            for (i, line) in rows.clone().zip(block.chunks_exact(cols.len())) {
                let to = &mut out[i * d + cols.start..i * d + cols.end];
                to.iter_mut().zip(line).for_each(|(o, b)| *o += b);
            }
        }
    }
    mirror(&mut out, d);
    Ok(out)
}

/// Copies the lower triangle to the upper one.
fn mirror(a: &mut [f64], d: usize) {
    for i in 0..d {
        for j in 0..i {
            a[j * d + i] = a[i * d + j];
        }
    }
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
        assert!(close(a.second().unwrap(), &c, 1e-14));
        let b = of(&[2.0, 0.0, 6.0, 3.0], 2, true);
        assert!(close(b.mean(), &[4.0, 1.5], 1e-15));
        assert!(close(b.second().unwrap(), &[8.0, 6.0, 6.0, 4.5], 1e-14));
        a.merge(&b).unwrap();
        assert_eq!(a.weight(), 5.0);
        assert!(close(a.mean(), &[3.2, 2.2], 1e-15));
        assert!(close(a.second().unwrap(), &[14.8, 3.8, 3.8, 14.8], 1e-14));
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
