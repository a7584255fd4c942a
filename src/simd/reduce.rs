//! Reductions in a fixed order: [`LANES`] accumulators per block, a fixed tree, blocks summed in f64.
//!
//! All functions here are `#[inline(always)]` bodies, to be called from inside a [`super::Kernel`].

use super::prefetch::prefetch;
use crate::element::{Element, Real};

/// Independent accumulators of every reduction, whatever the register width.
pub const LANES: usize = 64;
/// Elements summed in the arithmetic type before the partial sum is widened to f64.
const BLOCK: usize = 1024;

#[inline(always)]
fn tree<R: Real>(mut acc: [R; LANES]) -> R {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            acc[i] += acc[i + width];
        }
        width /= 2;
    }
    acc[0]
}

/// How far ahead of a sum over rows memory is asked for, in elements.
const AHEAD: usize = 1024;

/// Adds `term(i, x_i)` over blocks of `x`: lanes in the arithmetic type `R`, blocks in f64.
#[inline(always)]
fn sum_by<const FROM_MEMORY: bool, T: Copy, U: Copy, R: Real>(
    x: &[T],
    q: &[U],
    term: impl Fn(T, U) -> R,
) -> f64 {
    let mut total = 0.0;
    for (x, q) in x.chunks(BLOCK).zip(q.chunks(BLOCK)) {
        let mut acc = [R::ZERO; LANES];
        let (xs, x_rest) = x.as_chunks::<LANES>();
        let (qs, q_rest) = q.as_chunks::<LANES>();
        for (x, q) in xs.iter().zip(qs) {
            if FROM_MEMORY {
                prefetch(x, AHEAD, LANES);
            }
            for i in 0..LANES {
                acc[i] += term(x[i], q[i]);
            }
        }
        if !x_rest.is_empty() {
            // All lanes at once: reached one by one, up to a number known at run time, they would live in memory.
            let mut terms = [R::ZERO; LANES];
            for ((t, x), q) in terms.iter_mut().zip(x_rest).zip(q_rest) {
                *t = term(*x, *q);
            }
            for i in 0..LANES {
                acc[i] += terms[i];
            }
        }
        total += tree(acc).to_f64();
    }
    total
}

/// `Σ x_i q_i`: products and sums of at most 16 + 6 terms in the arithmetic type, then f64. The error is at most
/// `24 u Σ|x_i q_i|`, u the unit roundoff of the arithmetic type.
#[inline(always)]
pub fn dot<T: Element>(x: &[T], q: &[T::Acc]) -> f64 {
    sum_by::<true, _, _, _>(x, q, |x, q| x.load() * q)
}

/// [`dot`] of `x` with each of four vectors, to the same bits; `x` is loaded once.
#[inline(always)]
pub fn dots<T: Element>(x: &[T], q: [&[T::Acc]; 4]) -> [f64; 4] {
    let mut totals = [0.0; 4];
    for start in (0..x.len()).step_by(BLOCK) {
        let end = (start + BLOCK).min(x.len());
        // Four arrays by name: as an array of arrays they would live in memory, not in registers.
        let [mut a, mut b, mut c, mut d] = [[T::Acc::ZERO; LANES]; 4];
        let (xs, x_rest) = x[start..end].as_chunks::<LANES>();
        let [p, q, r, s] = q.map(|q| q[start..end].as_chunks::<LANES>());
        let vectors = p.0.iter().zip(q.0).zip(r.0.iter().zip(s.0));
        for (x, ((p, q), (r, s))) in xs.iter().zip(vectors) {
            prefetch(x, AHEAD, LANES);
            for i in 0..LANES {
                a[i] += x[i].load() * p[i];
            }
            for i in 0..LANES {
                b[i] += x[i].load() * q[i];
            }
            for i in 0..LANES {
                c[i] += x[i].load() * r[i];
            }
            for i in 0..LANES {
                d[i] += x[i].load() * s[i];
            }
        }
        for (acc, rest) in [(&mut a, p.1), (&mut b, q.1), (&mut c, r.1), (&mut d, s.1)] {
            let mut terms = [T::Acc::ZERO; LANES];
            for ((t, x), q) in terms.iter_mut().zip(x_rest).zip(rest) {
                *t = x.load() * *q;
            }
            for i in 0..LANES {
                acc[i] += terms[i];
            }
        }
        for (total, acc) in totals.iter_mut().zip([a, b, c, d]) {
            *total += tree(acc).to_f64();
        }
    }
    totals
}

/// `Σ term(x_i)`, at most 22 additions deep in the type of the terms, then f64.
#[inline(always)]
pub fn sum_map<T: Copy, R: Real>(x: &[T], term: impl Fn(T) -> R) -> f64 {
    sum_by::<false, _, _, _>(x, x, |x, _| term(x))
}

/// `Σ x_i` with every addition in f64.
#[inline(always)]
pub fn sum_f64<T: Element>(x: &[T]) -> f64 {
    sum_map(x, |x| x.load().to_f64())
}

/// `Σ x_i²` with every product and addition in f64.
#[inline(always)]
pub fn sum_squares_f64<T: Element>(x: &[T]) -> f64 {
    sum_map(x, |x| {
        let v = x.load().to_f64();
        v * v
    })
}

/// The largest element, or −∞ of an empty slice; NaN are passed over.
#[inline(always)]
pub fn max<T: Element>(x: &[T]) -> T::Acc {
    let mut acc = [-T::Acc::INFINITY; LANES];
    let mut chunks = x.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (a, v) in acc.iter_mut().zip(chunk) {
            *a = v.load().greater(*a);
        }
    }
    for (a, v) in acc.iter_mut().zip(chunks.remainder()) {
        *a = v.load().greater(*a);
    }
    acc.into_iter().fold(-T::Acc::INFINITY, |m, v| v.greater(m))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, dispatch, for_each_level};
    use half::bf16;
    use proptest::prelude::*;

    struct Dot<'a, T: Element>(&'a [T], &'a [T::Acc]);
    impl<T: Element> Kernel for Dot<'_, T> {
        type Output = (f64, f64, f64, T::Acc);
        #[inline(always)]
        fn run(self) -> Self::Output {
            (
                dot(self.0, self.1),
                sum_f64(self.0),
                sum_squares_f64(self.0),
                max(self.0),
            )
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn within_bound_and_equal_on_every_level(
            x in prop::collection::vec(-1e3f32..1e3, 0..3000),
            seed in any::<u64>(),
        ) {
            let q: Vec<f32> = (0..x.len())
                .map(|i| ((seed.wrapping_mul(2 * i as u64 + 1) >> 40) as f32) / 1e7 - 0.5)
                .collect();
            let half: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
            let exact: f64 = x.iter().zip(&q).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
            let scale: f64 = x.iter().zip(&q).map(|(a, b)| (f64::from(*a) * f64::from(*b)).abs()).sum();
            let mut seen = None;
            for_each_level(|_| {
                let got = dispatch(Dot(&x, &q));
                let got_half = dispatch(Dot(&half, &q));
                assert!((got.0 - exact).abs() <= 24.0 * f64::from(f32::EPSILON) / 2.0 * scale + 1e-30);
                let bits = (got.0.to_bits(), got.1.to_bits(), got.2.to_bits(), got.3.to_bits(), got_half.0.to_bits());
                assert_eq!(*seen.get_or_insert(bits), bits);
            });
        }
    }

    #[test]
    fn max_of_empty_and_of_nan() {
        assert_eq!(max::<f32>(&[]), f32::NEG_INFINITY);
        assert_eq!(max(&[f32::NAN, 2.0, f32::NEG_INFINITY]), 2.0);
    }
}
