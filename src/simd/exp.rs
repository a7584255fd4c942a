//! The exponential as straight-line arithmetic, so that it vectorises inside every kernel and gives the same bits on
//! every instruction set (the platform's `exp` does neither).

use crate::element::Real;

/// Types with a vectorisable exponential.
pub trait Exp: Real {
    /// See [`exp`].
    fn exp(self) -> Self;
}

/// `e^x`, at most 2 units in the last place from the exact value (measured: 1.0).
///
/// Results below 2^-125 (f32) or 2^-1021 (f64) are returned as 0, so `exp(-∞) = 0`; `exp(∞) = ∞`, NaN stays NaN.
#[inline(always)]
pub fn exp<R: Exp>(x: R) -> R {
    x.exp()
}

/// `2^t` for t up to 0, to a relative 8e-5 and the rounding of t; 2^-125 below that. Half the work of [`exp`].
#[inline(always)]
pub fn exp2_rough(t: f32) -> f32 {
    const ROUND: f32 = 1.5 * (1u32 << 23) as f32;
    // 2^f over |f| <= 1/2, of least relative error.
    const CUBIC: [f32; 4] = [0.055_171_67, 0.242_611_13, 0.693_260_97, 0.999_928_06];
    let t = t.greater(-125.0);
    let shifted = t + ROUND;
    let f = t - (shifted - ROUND);
    let value = ((CUBIC[0] * f + CUBIC[1]) * f + CUBIC[2]) * f + CUBIC[3];
    f32::from_bits(value.to_bits().wrapping_add(shifted.to_bits() << 23))
}

// x = n ln 2 + r with |r| <= ln(2)/2, and e^x = 2^n e^r. Adding and subtracting 1.5 · 2^(mantissa bits) rounds to the
// nearest integer and leaves it in the low bits of the sum. The high part of ln 2 ends in zeros, so that its product
// with n is exact without fused multiply-add. The series of e^r is cut where its remainder is below u/10.
// Multiplying by 2 and then 2^(n-1) keeps the top binade finite.
macro_rules! exponential {
    ($t:ident, $mantissa:expr, $bias:expr, $low:expr, $high:expr, $ln2_high:expr, $ln2_low:expr,
     $series:expr) => {
        impl Exp for $t {
            #[inline(always)]
            fn exp(self) -> Self {
                const ROUND: $t = 1.5 * (1u64 << $mantissa) as $t;
                let x = self.greater($low).lesser($high);
                let shifted = x * std::$t::consts::LOG2_E + ROUND;
                let n = shifted - ROUND;
                let r = (x - n * $ln2_high) - n * $ln2_low;
                let mut tail = $series[0];
                for c in &$series[1..] {
                    tail = tail * r + c;
                }
                let value = 1.0 + (r + r * r * tail);
                let exponent = shifted
                    .to_bits()
                    .wrapping_sub(ROUND.to_bits())
                    .wrapping_add($bias - 1);
                let scaled = value * 2.0 * $t::from_bits(exponent << $mantissa);
                if self.is_nan() {
                    self
                } else if self > $high {
                    $t::INFINITY
                } else if self < $low {
                    0.0
                } else {
                    scaled
                }
            }
        }
    };
}

exponential!(
    f32,
    23,
    127u32,
    -86.643_394,
    88.722_83,
    0.693_359_4,
    -2.121_944_4e-4,
    [
        1.0f32 / 5040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5
    ]
);
exponential!(
    f64,
    52,
    1023u64,
    -707.703_271_351_704_8,
    709.782_712_893_384,
    0.693_147_180_369_123_8,
    1.908_214_929_270_587_7e-10,
    [
        1.0f64 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5
    ]
);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, dispatch, for_each_level};

    #[test]
    fn rough_powers_of_two() {
        for i in 0..=1_250_000 {
            let t = -(i as f32) * 1e-4;
            let exact = f64::from(t).exp2();
            assert!(
                (f64::from(exp2_rough(t)) - exact).abs() <= 8e-5 * exact,
                "{t}"
            );
        }
        assert_eq!(exp2_rough(f32::NEG_INFINITY), exp2_rough(-125.0));
    }

    #[test]
    fn f32_is_within_two_ulp_over_its_range() {
        let mut worst = 0.0f64;
        for bits in (0..=0x42b1_0000u32).step_by(37) {
            for x in [f32::from_bits(bits), -f32::from_bits(bits)] {
                let exact = f64::from(x).exp();
                let got = exp(x);
                if exact < 2f64.powi(-124) || exact > f64::from(f32::MAX) {
                    continue;
                }
                let ulp = f64::from((exact as f32).next_up()) - f64::from(exact as f32);
                worst = worst.max((f64::from(got) - exact).abs() / ulp);
            }
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn f64_is_within_two_ulp_of_the_platform() {
        let mut worst = 0.0f64;
        for i in -700_000..709_000 {
            let x = f64::from(i) * 1e-3 + 1e-7;
            let exact = x.exp();
            worst = worst.max((exp(x) - exact).abs() / (exact.next_up() - exact));
        }
        assert!(worst < 2.0, "{worst} ulp");
    }

    #[test]
    fn ends_of_the_range() {
        assert_eq!(
            (exp(0.0f32), exp(-0.0f64), exp(f32::NEG_INFINITY)),
            (1.0, 1.0, 0.0)
        );
        assert_eq!((exp(-90.0f32), exp(f64::NEG_INFINITY)), (0.0, 0.0));
        assert_eq!(
            (exp(89.0f32), exp(710.0f64)),
            (f32::INFINITY, f64::INFINITY)
        );
        assert!(exp(88.72f32).is_finite() && exp(709.78f64).is_finite());
        assert!(exp(-86.64f32) > 0.0 && exp(-707.7f64) > 0.0);
        assert!(exp(f32::NAN).is_nan() && exp(f64::NAN).is_nan());
    }

    struct All<'a, R>(&'a [R], &'a mut [R]);
    impl<R: Exp> Kernel for All<'_, R> {
        type Output = ();
        #[inline(always)]
        fn run(self) {
            for (x, y) in self.0.iter().zip(self.1) {
                *y = exp(*x);
            }
        }
    }

    #[test]
    fn same_bits_on_every_level() {
        let x: Vec<f32> = (0..20_000)
            .map(|i| (i as f32 - 15_000.0) * 0.0071)
            .collect();
        let wide: Vec<f64> = x.iter().map(|v| f64::from(*v) * 7.3).collect();
        let mut seen = None;
        for_each_level(|_| {
            let (mut y, mut z) = (x.clone(), wide.clone());
            dispatch(All(&x, &mut y));
            dispatch(All(&wide, &mut z));
            assert_eq!(*seen.get_or_insert((y.clone(), z.clone())), (y, z));
        });
    }
}
