//! The exponential of the log-sum-exp: one polynomial, so that every instruction set gives the same bits.

/// 1.5 · 2^52: adding and subtracting it rounds to the nearest integer, which then sits in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// ln 2 in two parts; the first has 21 zero bits at the end, so that its product with an exponent is exact.
const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
/// 1/k!, highest degree first: the Taylor series up to degree 13 errs by less than 1e-17 on |r| ≤ ln 2 / 2.
const SERIES: [f64; 14] = [
    1.0 / 6_227_020_800.0,
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
    0.5,
    1.0,
    1.0,
];

/// `e^x` for `x ≤ 0` within 2 units in the last place; 0 below −708, where the result would be subnormal.
#[inline(always)]
pub fn exp_nonpositive(x: f64) -> f64 {
    let clamped = if x > -708.0 { x } else { -708.0 };
    let shifted = clamped * std::f64::consts::LOG2_E + ROUND;
    let twos = shifted - ROUND;
    let r = (clamped - twos * LN2_HIGH) - twos * LN2_LOW;
    // Written out: as a loop it would keep the compiler from vectorising the caller's loop.
    let [a, b, c, d, e, f, g, h, i, j, k, l, m, n] = SERIES;
    let p = ((((((a * r + b) * r + c) * r + d) * r + e) * r + f) * r + g) * r + h;
    let p = (((((p * r + i) * r + j) * r + k) * r + l) * r + m) * r + n;
    let scale = f64::from_bits((shifted.to_bits() << 52).wrapping_add(1023 << 52));
    if x < -708.0 { 0.0 } else { p * scale }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn within_two_units_in_the_last_place(x in -708.0f64..=0.0) {
            let (got, want) = (exp_nonpositive(x), x.exp());
            prop_assert!((got - want).abs() <= 2.0 * f64::EPSILON * want, "{x}: {got:e} {want:e}");
        }
    }

    #[test]
    fn at_the_ends() {
        assert_eq!(exp_nonpositive(0.0), 1.0);
        assert_eq!(exp_nonpositive(-0.0), 1.0);
        assert_eq!(exp_nonpositive(-709.0), 0.0);
        assert_eq!(exp_nonpositive(f64::NEG_INFINITY), 0.0);
        assert!(exp_nonpositive(-708.0) > 0.0);
    }
}
