//! Log-sum-exp of a row in one read, in a fixed order.

use super::exp::{Exp, exp};
use super::reduce::{max, sum_map};
use crate::element::{Element, Real};

/// Elements per step: the maximum and the sum of a block both run on data in the first-level cache.
const BLOCK: usize = 2048;

/// `ln Σ exp(x_i)`; −∞ for an empty row or one of −∞ only; NaN if the row holds a NaN or +∞.
///
/// Terms are taken relative to the running maximum, so nothing overflows; they are summed in the arithmetic type
/// within a block and in f64 across blocks. The absolute error is a few units in the last place of 1.
#[inline(always)]
pub fn log_sum_exp<T: Element>(x: &[T]) -> f64
where
    T::Acc: Exp,
{
    let mut top = -T::Acc::INFINITY;
    let mut total = 0.0;
    for block in x.chunks(BLOCK) {
        let above = max(block).greater(top);
        if above == -T::Acc::INFINITY {
            // `max` passes over NaN; a block of nothing else must still poison the result.
            if block.iter().any(|v| v.load().is_nan()) {
                return f64::NAN;
            }
            continue;
        }
        if above > top {
            total *= (top - above).to_f64().exp();
            top = above;
        }
        total += sum_map(block, |v: T| exp(v.load() - top));
    }
    if total == 0.0 {
        f64::NEG_INFINITY
    } else {
        top.to_f64() + total.ln()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, dispatch, for_each_level};
    use half::bf16;
    use proptest::prelude::*;

    struct Lse<'a, T: Element>(&'a [T]);
    impl<T: Element> Kernel for Lse<'_, T>
    where
        T::Acc: Exp,
    {
        type Output = f64;
        #[inline(always)]
        fn run(self) -> f64 {
            log_sum_exp(self.0)
        }
    }

    fn oracle(x: &[f32]) -> f64 {
        let m = f64::from(x.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        m + x
            .iter()
            .map(|v| (f64::from(*v) - m).exp())
            .sum::<f64>()
            .ln()
    }

    #[test]
    fn worked_examples() {
        let inf = f64::NEG_INFINITY;
        let lse = |x: &[f64]| dispatch(Lse(x));
        assert!((lse(&[inf, 0.0, 1.0, inf, 2.0]) - 2.4076059644443806).abs() < 1e-15);
        assert_eq!(lse(&[inf; 4]), inf);
        assert_eq!(lse(&[]), inf);
        assert!((lse(&[1000.0, 1000.0, -1000.0]) - 1000.6931471805599).abs() < 1e-12);
        assert!((lse(&[0.1; 10]) - 2.402585092994046).abs() < 1e-15);
        for bad in [f64::NAN, f64::INFINITY] {
            assert!(lse(&[1.0, bad, 2.0]).is_nan());
            assert!(lse(&[bad]).is_nan());
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn near_the_exact_value_and_equal_on_every_level(
            x in prop::collection::vec(-60f32..60.0, 1..6000),
        ) {
            let half: Vec<bf16> = x.iter().map(|v| bf16::from_f32(*v)).collect();
            let wide: Vec<f32> = half.iter().map(|v| v.to_f32()).collect();
            let mut seen = None;
            for_each_level(|_| {
                let (a, b) = (dispatch(Lse(&x)), dispatch(Lse(&half)));
                assert!((a - oracle(&x)).abs() < 4e-7, "{a} {}", oracle(&x));
                assert!((b - oracle(&wide)).abs() < 4e-7);
                assert_eq!(*seen.get_or_insert((a.to_bits(), b.to_bits())), (a.to_bits(), b.to_bits()));
            });
        }
    }
}
