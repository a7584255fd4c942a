//! Exact nearest records among those that a user may see.
//!
//! The scan walks the list of permitted rows and nothing else: a forbidden row is never loaded, so its content can change
//! neither a score, nor a tie, nor the work done. A score depends on its own row and query alone, whatever stands beside
//! them, because every product is summed in the same fixed order ([`simd::dots`]); so the bits are also those of every
//! instruction set and number of threads. What remains observable is where permitted rows lie in memory: the processor
//! may fetch up to 1024 elements that follow a permitted row, without using them.

use crate::cancel::Cancel;
use crate::element::{Element, Real};
use crate::simd::{self, Kernel, dispatch};
use crate::view::Rows;
use crate::{Error, Result, par};

/// Permitted rows that are one piece of work.
const CHUNK: usize = 2048;
/// Rows that stay in the nearest cache while all queries pass.
const TILE: usize = 16;

/// A record found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hit {
    pub score: f64,
    pub row: u32,
}

impl Hit {
    /// Higher scores first, then lower rows.
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        let scores = other.score.total_cmp(&self.score);
        scores.then(self.row.cmp(&other.row))
    }
}

/// The best `k` so far, and sometimes up to as many again.
struct Best {
    hits: Vec<Hit>,
    k: usize,
    /// Scores that are not above this cannot be among the best.
    floor: f64,
}

impl Best {
    fn new(k: usize) -> Self {
        Self {
            hits: Vec::new(),
            k,
            floor: f64::NEG_INFINITY,
        }
    }

    fn push(&mut self, hit: Hit) {
        self.hits.push(hit);
        if self.hits.len() >= 2 * self.k {
            self.cut();
        }
    }

    fn cut(&mut self) {
        if self.hits.len() >= self.k {
            let (_, last, _) = self.hits.select_nth_unstable_by(self.k - 1, Hit::order);
            self.floor = last.score;
            self.hits.truncate(self.k);
        }
    }
}

/// The `k` permitted rows with the highest products with each query, best first; equal scores in the order of rows.
///
/// # Arguments
/// * `queries` – one after the other, each as wide as a row.
/// * `scale` – what the product of a row is multiplied by (the inverse of its length, for cosines).
/// * `permitted` – ascending.
///
/// # Errors
/// `Shape` if a width or length does not fit; `Value` if `k` is 0 or a permitted row is out of range or out of order;
/// `NonFinite` if a permitted row's score is (forbidden rows are not looked at); `Interrupted`.
pub fn top_k<T: Element>(
    rows: &Rows<'_, T>,
    queries: &[T::Acc],
    scale: Option<&[f64]>,
    permitted: &[u32],
    k: usize,
    cancel: &Cancel,
) -> Result<Vec<Vec<Hit>>> {
    let width = rows.width();
    if width == 0 || !queries.len().is_multiple_of(width) {
        let expected = format!("queries of width {width}");
        return Err(Error::shape("queries", expected, queries.len()));
    }
    if let Some(s) = scale
        && s.len() != rows.rows()
    {
        let expected = format!("{} factors, one per row", rows.rows());
        return Err(Error::shape("scale", expected, s.len()));
    }
    if k == 0 {
        return Err(Error::value("k", "1 or more", k));
    }
    let ascending = permitted.windows(2).all(|w| w[0] < w[1]);
    if !ascending || permitted.last().is_some_and(|r| *r as usize >= rows.rows()) {
        let expected = format!("ascending rows below {}", rows.rows());
        return Err(Error::value("permitted", expected, "others"));
    }
    let count = queries.len() / width;
    // Queries four at a time; the last is repeated to fill up.
    let groups: Vec<[&[T::Acc]; 4]> = (0..count)
        .step_by(4)
        .map(|g| [0, 1, 2, 3].map(|i| (g + i).min(count - 1)))
        .map(|at| at.map(|i| &queries[i * width..(i + 1) * width]))
        .collect();
    let k = k.min(permitted.len()).max(1);
    let bytes = permitted.len().saturating_mul(width * size_of::<T>());
    let pieces = par::try_map(
        bytes.saturating_mul(count),
        par::ranges(permitted.len(), CHUNK),
        |range| {
            cancel.check()?;
            let mut best: Vec<Best> = (0..count).map(|_| Best::new(k)).collect();
            let found = dispatch(Scan {
                rows,
                groups: &groups,
                scale,
                permitted: &permitted[range.clone()],
                best: &mut best,
            });
            cancel.advance(range.len() as u64);
            if let Some(row) = found {
                return Err(Error::NonFinite {
                    arg: "rows",
                    index: row as usize * width,
                    found: f64::NAN,
                });
            }
            for b in &mut best {
                b.cut();
            }
            Ok(best)
        },
    )?;
    let mut merged: Vec<Best> = (0..count).map(|_| Best::new(k)).collect();
    for piece in pieces {
        for (all, part) in merged.iter_mut().zip(piece) {
            part.hits.into_iter().for_each(|h| all.push(h));
        }
    }
    Ok(merged
        .into_iter()
        .map(|mut b| {
            b.hits.sort_unstable_by(Hit::order);
            b.hits.truncate(k);
            b.hits
        })
        .collect())
}

/// All queries over one piece of the permitted rows; the first row with a score that is not finite, if any.
struct Scan<'a, 'r, T: Element> {
    rows: &'a Rows<'r, T>,
    groups: &'a [[&'a [T::Acc]; 4]],
    scale: Option<&'a [f64]>,
    permitted: &'a [u32],
    best: &'a mut [Best],
}

impl<T: Element> Kernel for Scan<'_, '_, T> {
    type Output = Option<u32>;
    #[inline(always)]
    fn run(self) -> Option<u32> {
        let mut bad: Option<u32> = None;
        for tile in self.permitted.chunks(TILE) {
            for (queries, best) in self.groups.iter().zip(self.best.chunks_mut(4)) {
                for &row in tile {
                    let products = simd::dots(self.rows.row(row as usize), *queries);
                    let factor = self.scale.map_or(1.0, |s| s[row as usize]);
                    for (product, best) in products.into_iter().zip(best.iter_mut()) {
                        // Adding 0 makes −0 a 0, so that it ties with one.
                        let score = product * factor + 0.0;
                        if !score.is_finite() {
                            bad = Some(bad.map_or(row, |b| b.min(row)));
                        } else if score > best.floor {
                            best.push(Hit { score, row });
                        }
                    }
                }
            }
        }
        bad
    }
}

/// Inverse lengths of rows, 0 for a row of zeros: each from its own row.
///
/// # Errors
/// `NonFinite` for a row whose length is not finite.
pub fn inverse_lengths<T: Element>(rows: &Rows<'_, T>) -> Result<Vec<f64>> {
    let bytes = rows.rows().saturating_mul(rows.width() * size_of::<T>());
    let pieces = par::try_map(bytes, par::ranges(rows.rows(), CHUNK), |range| {
        range
            .map(|i| {
                let length = dispatch(Length(rows.row(i)));
                if !length.is_finite() {
                    return Err(Error::NonFinite {
                        arg: "rows",
                        index: i * rows.width(),
                        found: length,
                    });
                }
                Ok(if length > 0.0 { 1.0 / length } else { 0.0 })
            })
            .collect::<Result<Vec<f64>>>()
    })?;
    Ok(pieces.concat())
}

struct Length<'a, T>(&'a [T]);

impl<T: Element> Kernel for Length<'_, T> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        simd::sum_squares_f64(self.0).sqrt()
    }
}

/// Queries in the type of the arithmetic.
pub fn narrowed<R: Real>(queries: &[f64]) -> Vec<R> {
    queries.iter().map(|q| R::from_f64(*q)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Random;
    use crate::simd::for_each_level;
    use proptest::prelude::*;

    fn drawn(n: usize, seed: u64) -> Vec<f32> {
        let mut random = Random::new(seed);
        // Few values, so that scores tie.
        (0..n)
            .map(|_| (random.symmetric() * 4.0).round() as f32 / 2.0)
            .collect()
    }

    fn found(
        data: &[f32],
        width: usize,
        queries: &[f32],
        permitted: &[u32],
        k: usize,
    ) -> Vec<Vec<Hit>> {
        let rows = Rows::matrix(data, width);
        top_k(&rows, queries, None, permitted, k, &Cancel::new()).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]
        #[test]
        fn as_a_full_sort(
            n in 1usize..120, width in 1usize..90, m in 1usize..10, k in 1usize..20, seed in any::<u64>(), every in 1usize..5,
        ) {
            let (data, queries) = (drawn(n * width, seed), drawn(m * width, seed ^ 1));
            let permitted: Vec<u32> = (0..n as u32).filter(|r| (*r as usize).is_multiple_of(every)).collect();
            let got = found(&data, width, &queries, &permitted, k);
            for (q, got) in queries.chunks(width).zip(&got) {
                // Halves and few of them: every order of summation is exact.
                let score = |r: u32| -> f64 {
                    data[r as usize * width..][..width].iter().zip(q).map(|(a, b)| f64::from(a * b)).sum()
                };
                let mut all: Vec<Hit> = permitted.iter().map(|r| Hit { score: score(*r) + 0.0, row: *r }).collect();
                all.sort_by(Hit::order);
                all.truncate(k);
                prop_assert_eq!(got, &all);
            }
        }
    }

    #[test]
    fn forbidden_rows_change_nothing() {
        let (n, width, m) = (5000, 70, 6);
        let mut random = Random::new(3);
        let mut draw =
            |n: usize| -> Vec<f32> { (0..n).map(|_| random.symmetric() as f32 * 3.0).collect() };
        let (mut data, queries) = (draw(n * width), draw(m * width));
        let permitted: Vec<u32> = (0..n as u32)
            .filter(|r| r % 3 == 1 || (1000..1400).contains(r))
            .collect();
        let before = found(&data, width, &queries, &permitted, 10);
        let allowed: std::collections::HashSet<u32> = permitted.iter().copied().collect();
        for (r, row) in data.chunks_mut(width).enumerate() {
            if !allowed.contains(&(r as u32)) {
                row.fill(if r % 2 == 0 { f32::NAN } else { f32::MAX });
            }
        }
        assert_eq!(found(&data, width, &queries, &permitted, 10), before);
        // The same records alone, packed: the same scores to the bit.
        let packed: Vec<f32> = permitted
            .iter()
            .flat_map(|r| data[*r as usize * width..][..width].to_vec())
            .collect();
        let all: Vec<u32> = (0..permitted.len() as u32).collect();
        for (a, b) in found(&packed, width, &queries, &all, 10)
            .iter()
            .zip(&before)
        {
            let moved: Vec<Hit> = a
                .iter()
                .map(|h| Hit {
                    row: permitted[h.row as usize],
                    ..*h
                })
                .collect();
            assert_eq!(&moved, b);
        }
    }

    #[test]
    fn same_bits_for_threads_and_levels() {
        let (n, width) = (9000, 33);
        let mut random = Random::new(5);
        let data: Vec<f32> = (0..n * width).map(|_| random.symmetric() as f32).collect();
        let queries: Vec<f32> = (0..7 * width).map(|_| random.symmetric() as f32).collect();
        let permitted: Vec<u32> = (0..n as u32).filter(|r| r % 7 != 0).collect();
        let first = found(&data, width, &queries, &permitted, 25);
        let before = par::num_threads();
        for threads in [1, 3] {
            par::set_num_threads(threads);
            for_each_level(|_| assert_eq!(found(&data, width, &queries, &permitted, 25), first));
        }
        par::set_num_threads(before);
    }

    #[test]
    fn scales_and_refusals() {
        let data = [3.0f32, 4.0, 0.0, 0.0, 1.0, 0.0];
        let rows = Rows::matrix(&data, 2);
        let inverse = inverse_lengths(&rows).unwrap();
        assert_eq!(inverse, [0.2, 0.0, 1.0]);
        let cancel = Cancel::new();
        let cosines = top_k(&rows, &[1.0, 0.0], Some(&inverse), &[0, 1, 2], 5, &cancel).unwrap();
        let scores: Vec<f64> = cosines[0].iter().map(|h| h.score).collect();
        assert_eq!(scores, [1.0, 3.0 * 0.2, 0.0]);
        assert!(top_k(&rows, &[1.0, 0.0], None, &[], 5, &cancel).unwrap()[0].is_empty());
        assert!(top_k(&rows, &[1.0], None, &[0], 1, &cancel).is_err());
        assert!(top_k(&rows, &[1.0, 0.0], Some(&[1.0]), &[0], 1, &cancel).is_err());
        assert!(top_k(&rows, &[1.0, 0.0], None, &[0], 0, &cancel).is_err());
        assert!(top_k(&rows, &[1.0, 0.0], None, &[3], 1, &cancel).is_err());
        assert!(top_k(&rows, &[1.0, 0.0], None, &[1, 1], 1, &cancel).is_err());
        let bad = [1.0f32, f32::NAN, 1.0, 1.0];
        let rows = Rows::matrix(&bad, 2);
        assert!(matches!(
            top_k(&rows, &[1.0, 0.0], None, &[0, 1], 1, &cancel),
            Err(Error::NonFinite { index: 0, .. })
        ));
        assert!(top_k(&rows, &[1.0, 0.0], None, &[1], 1, &cancel).is_ok());
        assert!(inverse_lengths(&rows).is_err());
    }
}
