//! An orthonormal basis of the span of a few vectors that nobody promises to be unit, orthogonal or independent.

use crate::{Error, Result};
use faer::MatRef;

/// Rows that are orthonormal to f64 rounding.
#[derive(Debug, Clone, PartialEq)]
pub struct Orthonormal {
    /// Length of a row.
    pub width: usize,
    /// Number of rows.
    pub rank: usize,
    /// `rank × width`, row after row.
    pub rows: Vec<f64>,
}

impl Orthonormal {
    /// Row `i`.
    pub fn row(&self, i: usize) -> &[f64] {
        &self.rows[i * self.width..(i + 1) * self.width]
    }
}

/// Orthonormal rows that span the rows of `vectors` (`count × width`).
///
/// Singular values at or below `σ₁ · max(count, width) · 2⁻⁵² · 8` count as zero. Independent rows are taken in their
/// order by modified Gram–Schmidt, run twice, so that the first basis vector is the first row over its length;
/// dependent ones give the leading right singular vectors, each with a non-negative product with the sum of the rows.
///
/// # Errors
/// `Shape` if `width` is 0, `count` is 0 or the lengths do not match, `NonFinite`, and `Degenerate` if every row is
/// zero.
pub fn orthonormalize(
    arg: &'static str,
    vectors: &[f64],
    count: usize,
    width: usize,
) -> Result<Orthonormal> {
    if count == 0 || width == 0 || vectors.len() != count * width {
        return Err(Error::shape(
            arg,
            "one or more vectors of at least one element",
            format!("[{count}, {width}]"),
        ));
    }
    if let Some(index) = vectors.iter().position(|v| !v.is_finite()) {
        return Err(Error::NonFinite {
            arg,
            index,
            found: vectors[index],
        });
    }
    let largest = vectors.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    if largest == 0.0 {
        return Err(Error::degenerate(
            arg,
            "every vector is zero, so there is no direction",
        ));
    }
    // Brings squares into range; the basis does not depend on it.
    let mut rows: Vec<f64> = vectors.iter().map(|v| v / largest).collect();
    if count == 1 {
        gram_schmidt(&mut rows, width);
        return Ok(Orthonormal {
            width,
            rank: 1,
            rows,
        });
    }
    let svd = MatRef::from_row_major_slice(&rows, count, width)
        .thin_svd()
        .map_err(|_| Error::degenerate(arg, "the singular values did not converge"))?;
    let sigma: Vec<f64> = svd.S().column_vector().iter().copied().collect();
    let cut = sigma[0] * count.max(width) as f64 * f64::EPSILON * 8.0;
    let rank = sigma.iter().filter(|s| **s > cut).count();
    if rank < count {
        let sum: Vec<f64> = (0..width)
            .map(|j| rows.iter().skip(j).step_by(width).sum())
            .collect();
        let right = svd.V();
        rows = (0..rank)
            .flat_map(|i| {
                let dot: f64 = sum
                    .iter()
                    .zip(right.col(i).iter())
                    .map(|(a, b)| a * b)
                    .sum();
                let sign = if dot < 0.0 { -1.0 } else { 1.0 };
                right
                    .col(i)
                    .iter()
                    .map(move |v| sign * v)
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    gram_schmidt(&mut rows, width);
    Ok(Orthonormal { width, rank, rows })
}

/// Modified Gram–Schmidt, every row projected twice: the second pass removes what rounding left of the first.
fn gram_schmidt(rows: &mut [f64], width: usize) {
    for i in 0..rows.len() / width {
        let (done, rest) = rows.split_at_mut(i * width);
        let row = &mut rest[..width];
        normalize(row);
        for _ in 0..2 {
            for q in done.chunks_exact(width) {
                let c: f64 = q.iter().zip(row.iter()).map(|(a, b)| a * b).sum();
                row.iter_mut().zip(q).for_each(|(v, q)| *v -= c * q);
            }
            normalize(row);
        }
    }
}

fn normalize(row: &mut [f64]) {
    let largest = row.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    if largest > 0.0 {
        let norm = largest
            * row
                .iter()
                .map(|v| (v / largest).powi(2))
                .sum::<f64>()
                .sqrt();
        row.iter_mut().for_each(|v| *v /= norm);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn defect(b: &Orthonormal) -> f64 {
        let mut worst = 0.0f64;
        for i in 0..b.rank {
            for j in 0..b.rank {
                let dot: f64 = b.row(i).iter().zip(b.row(j)).map(|(x, y)| x * y).sum();
                worst = worst.max((dot - f64::from(u8::from(i == j))).abs());
            }
        }
        worst
    }

    #[test]
    fn known_bases() {
        let b = orthonormalize("q", &[1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0], 2, 4).unwrap();
        let (s, t) = (0.5f64.sqrt(), (1.0f64 / 6.0).sqrt());
        let want = [s, s, 0.0, 0.0, t, -t, 2.0 * t, 0.0];
        assert_eq!(b.rank, 2);
        assert!(b.rows.iter().zip(want).all(|(a, w)| (a - w).abs() < 1e-15));
        let b = orthonormalize("q", &[1.0, 1.0, 0.0, 2.0, 2.0, 0.0, 0.0, 1.0, 1.0], 3, 3).unwrap();
        assert_eq!(b.rank, 2);
        assert!(defect(&b) < 1e-15);
    }

    #[test]
    fn nearly_parallel_and_extreme_rows() {
        let b = orthonormalize("q", &[1.0, 0.0, 1e-4, 1.0, 1e-4, 0.0], 2, 3).unwrap();
        assert_eq!(b.rank, 2);
        assert!(defect(&b) < 1e-15, "{}", defect(&b));
        for scale in [1e-300, 1e300] {
            let b = orthonormalize("q", &[3.0 * scale, 4.0 * scale], 1, 2).unwrap();
            assert!((b.rows[0] - 0.6).abs() < 1e-15 && (b.rows[1] - 0.8).abs() < 1e-15);
        }
    }

    #[test]
    fn bad_input() {
        assert!(matches!(
            orthonormalize("q", &[0.0; 4], 2, 2),
            Err(Error::Degenerate { .. })
        ));
        assert!(matches!(
            orthonormalize("q", &[], 0, 2),
            Err(Error::Shape { .. })
        ));
        assert!(matches!(
            orthonormalize("q", &[1.0, f64::NAN], 1, 2),
            Err(Error::NonFinite { index: 1, .. })
        ));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn orthonormal_and_spanning(
            (count, width, extra) in (1usize..6, 6usize..40, 0usize..3),
            seed in prop::collection::vec(-10.0f64..10.0, 240),
        ) {
            let mut v = seed[..count * width].to_vec();
            for e in 0..extra {
                let copy: Vec<f64> = v[..width].iter().map(|x| x * (2.0 + e as f64)).collect();
                v.extend(copy);
            }
            let b = orthonormalize("q", &v, count + extra, width).unwrap();
            prop_assert_eq!(b.rank, count);
            prop_assert!(defect(&b) < 1e-14);
            for row in v.chunks(width) {
                let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
                let mut left = row.to_vec();
                for i in 0..b.rank {
                    let c: f64 = b.row(i).iter().zip(row).map(|(x, y)| x * y).sum();
                    left.iter_mut().zip(b.row(i)).for_each(|(l, q)| *l -= c * q);
                }
                prop_assert!(left.iter().map(|x| x * x).sum::<f64>().sqrt() < 1e-11 * norm.max(1.0));
            }
        }
    }
}
