//! Matrix products over row-major slices, by faer's kernels.
//!
//! A call runs on the calling thread; callers spread tiles over [`crate::par`] and so keep every element's order of
//! summation independent of the number of threads. The kernels differ between instruction sets (AVX2, AVX-512, NEON)
//! and cache sizes, so the last bits are promised for one machine only.

use crate::element::Real;
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use std::ops::Range;

/// The arithmetic types faer multiplies.
pub trait Gemm: Real + faer::traits::ComplexField {}
impl Gemm for f32 {}
impl Gemm for f64 {}

/// A row-major matrix of `rows` × `cols` whose rows start `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Mat<'a, R> {
    data: &'a [R],
    rows: usize,
    cols: usize,
    stride: usize,
}

impl<'a, R: Gemm> Mat<'a, R> {
    /// `rows` × `cols` elements without gaps.
    pub fn dense(data: &'a [R], rows: usize, cols: usize) -> Self {
        Self::strided(data, rows, cols, cols)
    }

    /// Rows that start `stride` elements apart.
    pub fn strided(data: &'a [R], rows: usize, cols: usize, stride: usize) -> Self {
        Self {
            data,
            rows,
            cols,
            stride,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Some of the rows.
    pub fn slice_rows(self, rows: Range<usize>) -> Self {
        Self {
            data: &self.data[rows.start * self.stride..],
            rows: rows.len(),
            ..self
        }
    }

    fn view(self) -> MatRef<'a, R> {
        MatRef::from_row_major_slice_with_stride(self.data, self.rows, self.cols, self.stride)
    }
}

/// Where a product goes: rows `stride` elements apart, added to what is there if `add`.
#[derive(Debug)]
pub struct Out<'a, R> {
    pub data: &'a mut [R],
    pub stride: usize,
    pub add: bool,
}

/// `out = a bᵀ`: `a` is m × k, `b` is n × k.
pub fn a_bt<R: Gemm>(out: Out<'_, R>, a: Mat<'_, R>, b: Mat<'_, R>) {
    product(out, a.view(), b.view().transpose());
}

/// `out = a b`: `a` is m × k, `b` is k × n.
pub fn a_b<R: Gemm>(out: Out<'_, R>, a: Mat<'_, R>, b: Mat<'_, R>) {
    product(out, a.view(), b.view());
}

/// `out = aᵀ b`: `a` is k × m, `b` is k × n.
pub fn at_b<R: Gemm>(out: Out<'_, R>, a: Mat<'_, R>, b: Mat<'_, R>) {
    product(out, a.view().transpose(), b.view());
}

fn product<R: Gemm>(out: Out<'_, R>, a: MatRef<'_, R>, b: MatRef<'_, R>) {
    let beta = if out.add { Accum::Add } else { Accum::Replace };
    let (m, n) = (a.nrows(), b.ncols());
    // Not `from_row_major_slice_with_stride_mut`, which swaps the strides in faer 0.24.4 and writes out of bounds.
    let c =
        MatMut::from_column_major_slice_with_stride_mut(out.data, n, m, out.stride).transpose_mut();
    matmul(c, beta, a, b, R::ONE, Par::Seq);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn value<R: Real>(i: usize) -> R {
        R::from_f64(((i * 7919 + 13) % 97) as f64 / 48.5 - 1.0)
    }

    /// All three products, into strided results whose gaps must survive, against plain loops.
    fn check<R: Gemm>(m: usize, n: usize, k: usize, pad: usize, add: bool, tolerance: f64) {
        let (lda, ldb, ldc) = (k + pad, k + 2 * pad, n + pad);
        let a: Vec<R> = (0..m * lda).map(value).collect();
        let b: Vec<R> = (0..n * ldb).map(|i| value(i + 31)).collect();
        let at: Vec<R> = (0..k * m).map(|i| a[i % m * lda + i / m]).collect();
        let bt: Vec<R> = (0..k * n).map(|i| b[i % n * ldb + i / n]).collect();
        let (ma, mb) = (Mat::strided(&a, m, k, lda), Mat::strided(&b, n, k, ldb));
        let mbt = Mat::dense(&bt, k, n);
        let results = [0, 1, 2].map(|which| {
            let mut c: Vec<R> = vec![R::ONE; m * ldc];
            let out = Out {
                data: &mut c,
                stride: ldc,
                add,
            };
            match which {
                0 => a_bt(out, ma, mb),
                1 => a_b(out, ma, mbt),
                _ => at_b(out, Mat::dense(&at, k, m), mbt),
            }
            c
        });
        for i in 0..m {
            for j in 0..ldc {
                let dot = |l: usize| a[i * lda + l].to_f64() * b[j * ldb + l].to_f64();
                let expected = match j < n {
                    true => f64::from(u8::from(add)) + (0..k).map(dot).sum::<f64>(),
                    false => 1.0,
                };
                for c in &results {
                    let got = c[i * ldc + j].to_f64();
                    assert!(
                        (got - expected).abs() <= tolerance * k as f64,
                        "{m}x{n}x{k}+{pad} at {i},{j}"
                    );
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]
        #[test]
        fn the_three_products_against_plain_loops(
            m in 1usize..70, n in 1usize..70, k in 1usize..90, pad in 0usize..4, add in any::<bool>(),
        ) {
            check::<f64>(m, n, k, pad, add, 1e-15);
            check::<f32>(m, n, k, pad, add, 5e-7);
        }
    }

    #[test]
    fn shapes_that_the_density_kernels_use() {
        for (m, n, k) in [
            (256, 256, 784),
            (17, 256, 64),
            (128, 300, 2),
            (256, 784, 256),
            (10, 784, 300),
            (1, 500, 64),
        ] {
            check::<f32>(m, n, k, 0, true, 5e-7);
            check::<f64>(m, n, k, 3, false, 1e-15);
        }
    }
}
