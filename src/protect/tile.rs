//! Squared distances between two blocks of rows, and the loops over them.

use super::points::Block;
use crate::element::Element;
use crate::linalg::gemm::{self, Gemm, Mat, Out};
use crate::simd::{Exp, Kernel, LANES, dispatch, exp, sum_f64};

/// The types the density kernels compute in.
pub trait Scalar: Gemm + Exp + Element<Acc = Self> {
    /// Distance from 1 to the next number.
    const EPSILON: f64;
    /// Rows of a block of the symmetric engine: two blocks of 784 features stay in a core's private cache.
    const BLOCK: usize;
    /// Exponents below this count as -∞. What is lost is below `n e^EXPONENT_FLOOR` of a class sum, under the rounding of
    /// its terms; what is gained is that no product with a weight is subnormal, which costs a hundred times the time.
    const EXPONENT_FLOOR: Self;
    /// Factors of weights below this are 0, for the same reason.
    const FACTOR_FLOOR: f64;
}
impl Scalar for f32 {
    const EPSILON: f64 = f32::EPSILON as f64;
    const BLOCK: usize = 256;
    const EXPONENT_FLOOR: f32 = -34.0;
    const FACTOR_FLOOR: f64 = 1e-18;
}
impl Scalar for f64 {
    const EPSILON: f64 = f64::EPSILON;
    const BLOCK: usize = 128;
    const EXPONENT_FLOOR: f64 = -90.0;
    const FACTOR_FLOOR: f64 = 1e-250;
}

/// The least element, or ∞ of an empty slice.
#[inline(always)]
pub fn least<R: Scalar>(x: &[R]) -> R {
    let mut lanes = [R::INFINITY; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (a, v) in lanes.iter_mut().zip(chunk) {
            *a = v.lesser(*a);
        }
    }
    for (a, v) in lanes.iter_mut().zip(chunks.remainder()) {
        *a = v.lesser(*a);
    }
    lanes.into_iter().fold(R::INFINITY, |m, v| v.lesser(m))
}

/// `exp((shift - x) width)`, 0 below [`Scalar::EXPONENT_FLOOR`].
#[inline(always)]
pub fn weight<R: Scalar>(x: R, shift: R, width: R) -> R {
    let exponent = (shift - x) * width;
    if exponent < R::EXPONENT_FLOOR {
        R::ZERO
    } else {
        exp(exponent)
    }
}

/// `out = exp((shift - x) width)`; returns the sum.
#[inline(always)]
pub fn exponentials<R: Scalar>(x: &[R], shift: R, width: R, out: &mut [R]) -> f64 {
    for (e, x) in out.iter_mut().zip(x) {
        *e = weight(*x, shift, width);
    }
    sum_f64(out)
}

/// `max(0, a + b_j - 2 g_j)` in place of `g_j`; returns the least.
struct Finish<'a, R> {
    norm: R,
    norms: &'a [R],
    row: &'a mut [R],
}

impl<R: Scalar> Kernel for Finish<'_, R> {
    type Output = R;
    #[inline(always)]
    fn run(self) -> R {
        for (g, b) in self.row.iter_mut().zip(self.norms) {
            let d = (self.norm + *b) - (*g + *g);
            *g = d.greater(R::ZERO);
        }
        least(self.row)
    }
}

struct Direct<'a, R>(&'a [R], &'a [R]);

impl<R: Scalar> Kernel for Direct<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        let mut lanes = [0.0; LANES];
        for (a, b) in self.0.chunks(LANES).zip(self.1.chunks(LANES)) {
            for ((lane, x), y) in lanes.iter_mut().zip(a).zip(b) {
                let d = x.to_f64() - y.to_f64();
                *lane += d * d;
            }
        }
        lanes.into_iter().sum()
    }
}

/// Squared distances of every row of `a` from every row of `b`, row i at `out[i * stride..]`.
///
/// They come from one matrix product as `‖a‖² + ‖b‖² - 2ab`, which loses the digits of pairs much closer than their
/// distance from the mean; those are computed again from the differences.
pub fn squared_distances<R: Scalar>(
    out: &mut [R],
    stride: usize,
    a: &Block<'_, R>,
    b: &Block<'_, R>,
) {
    let (m, n, d) = (a.norms.len(), b.norms.len(), a.width);
    let product = Out {
        data: &mut *out,
        stride,
        add: false,
    };
    gemm::a_bt(product, Mat::dense(a.rows, m, d), Mat::dense(b.rows, n, d));
    let largest = (b.norms.iter()).fold(R::ZERO, |m, v| v.greater(m));
    let guard = R::from_f64(64.0 * R::EPSILON);
    for i in 0..m {
        let row = &mut out[i * stride..][..n];
        let norm = a.norms[i];
        let norms = b.norms;
        let close = guard * norm.greater(largest);
        if dispatch(Finish { norm, norms, row }) < close {
            for (j, squared) in row.iter_mut().enumerate() {
                if *squared < close {
                    let exact = dispatch(Direct(a.row(i), b.row(j)));
                    *squared = R::from_f64(exact);
                }
            }
        }
    }
}

/// `to[j][i] = from[i][j]`.
pub fn transpose<R: Copy>(from: &[R], rows: usize, cols: usize, to: &mut [R]) {
    const STRIP: usize = 16;
    for j in (0..cols).step_by(STRIP) {
        for i in 0..rows {
            let end = (j + STRIP).min(cols);
            for (k, v) in from[i * cols + j..i * cols + end].iter().enumerate() {
                to[(j + k) * rows + i] = *v;
            }
        }
    }
}
