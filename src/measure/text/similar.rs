//! Cosines of rows with queries, and how far rows lie from their neighbours.

use crate::simd::{Kernel, dispatch, dot};
use crate::{Error, Result, par};

/// Rows of `width` values.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    pub data: &'a [f32],
    pub width: usize,
}

impl<'a> Matrix<'a> {
    /// # Errors
    /// `Shape`: no whole rows; `NonFinite`: names the flat index.
    pub fn new(data: &'a [f32], width: usize, arg: &'static str) -> Result<Self> {
        if width == 0 || !data.len().is_multiple_of(width) {
            return Err(Error::shape(
                arg,
                format!("rows of {width} values, at least one"),
                data.len(),
            ));
        }
        if let Some(index) = data.iter().position(|v| !v.is_finite()) {
            let found = f64::from(data[index]);
            return Err(Error::NonFinite { arg, index, found });
        }
        Ok(Self { data, width })
    }

    fn rows(&self) -> usize {
        self.data.len() / self.width
    }

    #[inline(always)]
    fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.width..(i + 1) * self.width]
    }
}

struct Cosines<'a> {
    x: Matrix<'a>,
    queries: Matrix<'a>,
    lengths: &'a [f64],
    range: std::ops::Range<usize>,
}

impl Kernel for Cosines<'_> {
    type Output = Vec<f64>;
    #[inline(always)]
    fn run(self) -> Vec<f64> {
        let mut out = Vec::with_capacity(self.range.len() * self.lengths.len());
        for i in self.range {
            let row = self.x.row(i);
            let own = dot(row, row).sqrt();
            for (k, length) in self.lengths.iter().enumerate() {
                let scale = own * length;
                let product = dot(row, self.queries.row(k));
                out.push(if scale > 0.0 {
                    (product / scale).clamp(-1.0, 1.0)
                } else {
                    0.0
                });
            }
        }
        out
    }
}

/// Cosine of each row with each query, row after row; with a vector of zeros it is 0.
///
/// # Errors
/// `Shape`: unequal widths.
pub fn cosines(x: Matrix<'_>, queries: Matrix<'_>) -> Result<Vec<f64>> {
    if x.width != queries.width {
        return Err(Error::shape(
            "x",
            format!("rows of {} values", queries.width),
            x.width,
        ));
    }
    let lengths: Vec<f64> = (0..queries.rows())
        .map(|k| dot(queries.row(k), queries.row(k)).sqrt())
        .collect();
    let bytes = x.data.len() * 4 * queries.rows().max(1);
    let parts = par::map(bytes, par::ranges(x.rows(), 256), |range| {
        dispatch(Cosines {
            x,
            queries,
            lengths: &lengths,
            range,
        })
    });
    Ok(parts.concat())
}

/// Local outlier factor of each row with `k` neighbours (Breunig et al. 2000): the mean of the neighbours' reachability
/// density over the row's own. About 1 inside a cluster; equal distances go to the row of lower number.
///
/// # Errors
/// `Value`: `k` not from 1 to one less than the rows.
pub fn local_outlier_factor(x: Matrix<'_>, k: usize) -> Result<Vec<f64>> {
    let n = x.rows();
    if k == 0 || k >= n {
        return Err(Error::value(
            "neighbors",
            format!("1 to {}", n.saturating_sub(1)),
            k,
        ));
    }
    let neighbours: Vec<Vec<(f64, usize)>> =
        par::map(n * x.data.len() * 4, (0..n).collect(), |i: usize| {
            let mut near: Vec<(f64, usize)> = (0..n)
                .filter(|j| *j != i)
                .map(|j| {
                    let d = x
                        .row(i)
                        .iter()
                        .zip(x.row(j))
                        .map(|(a, b)| f64::from(a - b).powi(2))
                        .sum::<f64>();
                    (d.sqrt(), j)
                })
                .collect();
            near.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
            near.truncate(k);
            near
        });
    let reach: Vec<f64> = neighbours.iter().map(|v| v[k - 1].0).collect();
    let density: Vec<f64> = (neighbours.iter())
        .map(|v| 1.0 / (v.iter().map(|(d, j)| d.max(reach[*j])).sum::<f64>() / k as f64 + 1e-10))
        .collect();
    Ok((neighbours.iter().zip(&density))
        .map(|(v, own)| v.iter().map(|(_, j)| density[*j]).sum::<f64>() / k as f64 / own)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(data: &[f32], width: usize) -> Matrix<'_> {
        Matrix::new(data, width, "x").unwrap()
    }

    #[test]
    fn the_outliers_of_the_reference() {
        let points = [0., 0., 0., 1., 1., 0., 1., 1., 5., 5.];
        let near = |found: Vec<f64>, expected: [f64; 5]| {
            found
                .iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < 2e-6)
        };
        let of = |k| local_outlier_factor(matrix(&points, 2), k).unwrap();
        assert!(near(of(2), [1.0, 1.0, 1.0, 1.0, 6.029_989]), "{:?}", of(2));
        assert!(
            near(
                of(4),
                [0.974_134, 1.006_156, 1.006_156, 1.041_932, 0.974_134]
            ),
            "{:?}",
            of(4)
        );
        assert!(local_outlier_factor(matrix(&points, 2), 5).is_err());
        assert!(local_outlier_factor(matrix(&points, 2), 0).is_err());
    }

    #[test]
    fn cosines_of_the_reference() {
        let docs = [1.0, 0.0, 0.8, 0.6, 0.0, 1.0, 0.0, 0.0];
        let found = cosines(matrix(&docs, 2), matrix(&[0.9, 0.3, 0.0, 0.0], 2)).unwrap();
        for (a, b) in found
            .iter()
            .zip([0.948_683, 0.0, 0.948_683, 0.0, 0.316_228, 0.0, 0.0, 0.0])
        {
            assert!((a - b).abs() < 1e-6, "{found:?}");
        }
        assert!(cosines(matrix(&docs, 2), matrix(&docs, 4)).is_err());
        assert!(Matrix::new(&docs, 3, "x").is_err());
        assert!(Matrix::new(&[f32::NAN], 1, "x").is_err());
    }
}
