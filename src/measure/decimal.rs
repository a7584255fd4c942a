//! Rates as decimal numbers: rounded once, from whole numbers, by a stated rule.
//!
//! A count over a count has no exact decimal in general, so counts are the truth and a decimal is how they are printed or
//! compared with a limit that somebody wrote as a decimal. Nothing here goes through a binary fraction.

use crate::{Error, Result};
use rust_decimal::Decimal;

/// What becomes of a number halfway between two printed ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// Away from zero: 0.125 is 0.13. What readers of a table expect.
    HalfUp,
    /// To the even neighbour: 0.125 is 0.12. What NumPy and Python's `round` do.
    HalfEven,
}

/// Decimal places that always fit a [`Decimal`] beside a rate of up to 100 %.
pub const MAX_DIGITS: u32 = 20;

fn check(n: u64, digits: u32) -> Result<()> {
    if n == 0 {
        return Err(Error::value("n", "at least 1", n));
    }
    if digits > MAX_DIGITS {
        return Err(Error::value("digits", format!("0 to {MAX_DIGITS}"), digits));
    }
    Ok(())
}

/// `numerator / n` rounded to a whole number.
fn divide(numerator: u128, n: u128, rounding: Rounding) -> u128 {
    let (whole, rest) = (numerator / n, numerator % n);
    let up = match (2 * rest).cmp(&n) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal => rounding == Rounding::HalfUp || whole % 2 == 1,
    };
    whole + u128::from(up)
}

fn decimal(mantissa: i128, digits: u32) -> Result<Decimal> {
    Decimal::try_from_i128_with_scale(mantissa, digits)
        .map_err(|_| Error::value("digits", "fewer, for a number of this size", digits))
}

/// `scale · k / n` with `digits` decimal places; `scale` is 1 for a rate and 100 for a percentage. `k` may be negative,
/// for a difference of two rates over one denominator, and is then rounded like its absolute value.
///
/// # Errors
/// `Value` if n is 0, or too many digits are asked for.
pub fn ratio(k: i128, n: u64, scale: u32, digits: u32, rounding: Rounding) -> Result<Decimal> {
    check(n, digits)?;
    let overflow = || Error::value("k", "a count that fits the digits asked for", k);
    let numerator = k
        .unsigned_abs()
        .checked_mul(u128::from(scale))
        .and_then(|v| v.checked_mul(10u128.pow(digits)))
        .ok_or_else(overflow)?;
    let magnitude =
        i128::try_from(divide(numerator, u128::from(n), rounding)).map_err(|_| overflow())?;
    decimal(if k < 0 { -magnitude } else { magnitude }, digits)
}

/// `first.0 / first.1 − second.0 / second.1`, times `scale`, rounded once.
///
/// # Errors
/// `Value` if a denominator is 0, the product of the two exceeds 64 bits, or too many digits are asked for.
pub fn difference(
    first: (u64, u64),
    second: (u64, u64),
    scale: u32,
    digits: u32,
    rounding: Rounding,
) -> Result<Decimal> {
    check(first.1.min(second.1), digits)?;
    let n = (first.1)
        .checked_mul(second.1)
        .ok_or_else(|| Error::value("n", "denominators whose product fits 64 bits", first.1))?;
    let cross = |a: u64, b: u64| i128::from(a) * i128::from(b);
    ratio(
        cross(first.0, second.1) - cross(second.0, first.1),
        n,
        scale,
        digits,
        rounding,
    )
}

/// Shares of a total in percent, with `digits` places, that add up to exactly 100: every share is rounded down, and what
/// is left goes to the largest remainders, the lower index first where they tie (Hamilton's method).
///
/// # Errors
/// `Value` if the counts add up to 0 or to more than 64 bits hold, or too many digits are asked for.
pub fn shares(counts: &[u64], digits: u32) -> Result<Vec<Decimal>> {
    let total = counts
        .iter()
        .try_fold(0u64, |sum, c| sum.checked_add(*c))
        .ok_or_else(|| Error::value("counts", "counts whose sum fits 64 bits", "larger ones"))?;
    if total == 0 {
        return Err(Error::value("counts", "at least one item in all", 0));
    }
    check(total, digits)?;
    let units = 100 * 10u128.pow(digits);
    let n = u128::from(total);
    // A count of 64 bits times 100 · 10^digits must fit 128.
    if counts
        .iter()
        .any(|c| u128::from(*c).checked_mul(units).is_none())
    {
        return Err(Error::value(
            "digits",
            "fewer, for counts of this size",
            digits,
        ));
    }
    let mut parts: Vec<u128> = counts.iter().map(|c| u128::from(*c) * units / n).collect();
    let left = (units - parts.iter().sum::<u128>()) as usize;
    let mut order: Vec<usize> = (0..counts.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(u128::from(counts[*i]) * units % n));
    for i in order.into_iter().take(left) {
        parts[i] += 1;
    }
    parts
        .into_iter()
        .map(|p| decimal(p as i128, digits))
        .collect()
}

/// How `k / n` compares with a limit, exactly.
///
/// # Errors
/// `Value` if n is 0, or the limit has so many digits that the comparison needs more than 128 bits.
pub fn compare(k: u64, n: u64, limit: Decimal) -> Result<std::cmp::Ordering> {
    check(n, 0)?;
    let limit = limit.normalize();
    let left = i128::from(k).checked_mul(10i128.pow(limit.scale()));
    let right = limit.mantissa().checked_mul(i128::from(n));
    match (left, right) {
        (Some(left), Some(right)) => Ok(left.cmp(&right)),
        _ => Err(Error::value("limit", "a decimal of fewer digits", limit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cmp::Ordering;

    fn text(k: i128, n: u64, scale: u32, digits: u32, rounding: Rounding) -> String {
        ratio(k, n, scale, digits, rounding).unwrap().to_string()
    }

    #[test]
    fn halves() {
        for (k, n, up, even) in [
            (1, 8, "0.13", "0.12"),
            (3, 8, "0.38", "0.38"),
            (5, 8, "0.63", "0.62"),
            (2675, 1000, "2.68", "2.68"),
            (-1, 8, "-0.13", "-0.12"),
            (0, 3, "0.00", "0.00"),
        ] {
            assert_eq!(text(k, n, 1, 2, Rounding::HalfUp), up);
            assert_eq!(text(k, n, 1, 2, Rounding::HalfEven), even);
        }
        assert_eq!(text(2, 3, 100, 1, Rounding::HalfUp), "66.7");
        assert_eq!(
            text(1, 3, 1, MAX_DIGITS, Rounding::HalfUp),
            "0.33333333333333333333"
        );
    }

    #[test]
    fn limits_are_exact() {
        let at = |s: &str| Decimal::from_str_exact(s).unwrap();
        // In f64 1 − 0.9 is below 0.1, and 3 · 0.1 above 0.3.
        assert_eq!(compare(1, 10, at("0.1")).unwrap(), Ordering::Equal);
        assert_eq!(compare(3, 10, at("0.3")).unwrap(), Ordering::Equal);
        assert_eq!(compare(1, 3, at("0.3333")).unwrap(), Ordering::Greater);
        assert_eq!(compare(1, 3, at("0.33334")).unwrap(), Ordering::Less);
        assert_eq!(compare(0, 3, at("-1")).unwrap(), Ordering::Greater);
        assert!(compare(1, 0, at("0.1")).is_err());
        assert!(compare(u64::MAX, u64::MAX, at("0.3333333333333333333333333333")).is_err());
    }

    #[test]
    fn differences_are_rounded_once() {
        // 2/3 − 1/6 = 1/2; rounding both first gives 0.67 − 0.17 = 0.50, and to one digit 0.7 − 0.2 as well, but
        // 1/3 − 1/6 = 1/6 to one digit is 0.2 and 0.3 − 0.2 is not.
        let d = |a, b| {
            difference(a, b, 1, 1, Rounding::HalfUp)
                .unwrap()
                .to_string()
        };
        assert_eq!(d((2, 3), (1, 6)), "0.5");
        assert_eq!(d((1, 3), (1, 6)), "0.2");
        assert_eq!(d((1, 6), (1, 3)), "-0.2");
        assert!(difference((1, u64::MAX), (1, 3), 1, 1, Rounding::HalfUp).is_err());
    }

    #[test]
    fn thirds_add_up() {
        let s: Vec<String> = shares(&[1, 1, 1], 1)
            .unwrap()
            .iter()
            .map(Decimal::to_string)
            .collect();
        assert_eq!(s, ["33.4", "33.3", "33.3"]);
        assert!(shares(&[], 1).is_err());
        assert!(shares(&[0, 0], 1).is_err());
        assert!(shares(&[1], MAX_DIGITS + 1).is_err());
        assert!(shares(&[u64::MAX, 1], 1).is_err());
        assert!(shares(&[u64::MAX], MAX_DIGITS).is_err());
    }

    proptest! {
        #[test]
        fn shares_add_up_to_a_hundred(
            counts in prop::collection::vec(0u64..1_000_000_000, 1..40),
            digits in 0u32..8,
        ) {
            prop_assume!(counts.iter().sum::<u64>() > 0);
            let found = shares(&counts, digits).unwrap();
            prop_assert_eq!(found.iter().sum::<Decimal>(), Decimal::ONE_HUNDRED);
            let n: u64 = counts.iter().sum();
            let unit = Decimal::new(1, digits);
            for (c, share) in counts.iter().zip(&found) {
                let exact = Decimal::from(*c) * Decimal::ONE_HUNDRED / Decimal::from(n);
                prop_assert!((exact - share).abs() < unit);
            }
            prop_assert_eq!(shares(&counts, digits).unwrap(), found);
        }

        #[test]
        fn ratios_equal_exact_division(k in 0u64..1_000_000, n in 1u64..1_000_000, digits in 0u32..9) {
            use rust_decimal::RoundingStrategy as R;
            for (ours, theirs) in [
                (Rounding::HalfUp, R::MidpointAwayFromZero),
                (Rounding::HalfEven, R::MidpointNearestEven),
            ] {
                let exact = (Decimal::from(k) / Decimal::from(n)).round_dp_with_strategy(digits, theirs);
                prop_assert_eq!(ratio(i128::from(k), n, 1, digits, ours).unwrap(), exact);
            }
        }
    }
}
