//! Thresholds and biases as decimals, so that a file that states one states all of it.
//!
//! Margins lie within a few hundred of 0 and are stored with at most 28 decimals; the nearest f64 is what a gate compares
//! with. Probabilities would not do: 1e-30 is a margin of −69 and has no such decimal.

use crate::{Error, Result};
use rust_decimal::Decimal;
use std::fmt;
use std::str::FromStr;

/// A margin as it is written: a decimal, kept digit for digit, or an infinity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Margin {
    Below,
    Finite(Decimal),
    Above,
}

impl Margin {
    /// The nearest f64.
    pub fn nearest(self) -> f64 {
        match self {
            Self::Below => f64::NEG_INFINITY,
            Self::Above => f64::INFINITY,
            Self::Finite(d) => nearest(d),
        }
    }

    /// The exact sum.
    ///
    /// # Errors
    /// `Value` for opposite infinities, or where the sum has more digits than a decimal holds.
    pub fn plus(self, other: Self) -> Result<Self> {
        match (self, other) {
            (Self::Finite(a), Self::Finite(b)) => exact_sum(a, b).map(Self::Finite),
            (Self::Finite(_), infinite) | (infinite, Self::Finite(_)) => Some(infinite),
            (a, b) => (a == b).then_some(a),
        }
        .ok_or_else(|| {
            Error::value(
                "margin",
                "a sum with at most 28 digits",
                format!("{self} + {other}"),
            )
        })
    }

    /// The shortest decimal in (low, high]: the fewest digits, of these the smallest. `None` if the interval holds no
    /// decimal that can be stored.
    pub fn shortest(low: f64, high: f64) -> Option<Self> {
        if low == f64::INFINITY {
            return Some(Self::Above);
        }
        let within = |d: &Decimal| (low < nearest(*d)) && (nearest(*d) <= high);
        if high == f64::NEG_INFINITY {
            return Some(Self::Below);
        }
        if low == f64::NEG_INFINITY {
            let high = if high.is_finite() { high } else { 0.0 };
            return Self::shortest((high - 1.0).min(high.next_down()), high);
        }
        if low.abs() < 1e-28 {
            // As good as zero, and rounding up from zero has no first digit to begin with.
            let power = |scale| Decimal::new(1, scale);
            return std::iter::once(Decimal::ZERO)
                .chain((0..=28).map(power))
                .find(within)
                .map(Self::Finite);
        }
        // Seventeen digits tell all numbers apart, but rounding up by one unit of them may not reach the next.
        (0..17)
            .filter_map(|digits| round_up(low, digits))
            .chain(low.next_up().to_string().parse().ok())
            .find(within)
            .map(Self::Finite)
    }
}

/// The smallest decimal of `digits + 1` significant digits whose nearest f64 is above `low`.
fn round_up(low: f64, digits: usize) -> Option<Decimal> {
    let near = format!("{low:.digits$e}");
    let (mantissa, exponent) = near.split_once('e')?;
    let exponent: i32 = exponent.parse().ok()?;
    let found = power_of_ten(Decimal::from_str_exact(mantissa).ok()?, exponent)?;
    if nearest(found) > low {
        return Some(found);
    }
    // Rounding may have carried to the next power of ten; the unit is that of the number itself.
    let own: i32 = format!("{low:e}").split_once('e')?.1.parse().ok()?;
    let unit = power_of_ten(Decimal::ONE, own - digits as i32)?;
    exact_sum(found, unit)
}

/// `a + b`, or `None` where digits would be lost: the type rounds instead of failing.
fn exact_sum(a: Decimal, b: Decimal) -> Option<Decimal> {
    let sum = a.checked_add(b)?;
    (sum.checked_sub(a)? == b && sum.checked_sub(b)? == a).then_some(sum)
}

fn power_of_ten(mut d: Decimal, exponent: i32) -> Option<Decimal> {
    if exponent <= 0 {
        d.set_scale(d.scale().checked_add(exponent.unsigned_abs())?)
            .ok()?;
        return Some(d);
    }
    for _ in 0..exponent {
        d = d.checked_mul(Decimal::TEN)?;
    }
    Some(d)
}

fn nearest(d: Decimal) -> f64 {
    // The conversion of the type itself is not correctly rounded; that of text is.
    d.to_string().parse().unwrap_or(f64::NAN)
}

impl FromStr for Margin {
    type Err = Error;

    /// `inf`, `-inf`, or a decimal such as `-3.41` or `2.5e-3` that is stored without rounding.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "inf" | "+inf" => return Ok(Self::Above),
            "-inf" => return Ok(Self::Below),
            _ => {}
        }
        let (mantissa, exponent) = text
            .split_once(['e', 'E'])
            .map_or((text, Ok(0)), |(m, e)| (m, e.parse::<i32>()));
        exponent
            .ok()
            .filter(|e| e.abs() <= 60)
            .and_then(|e| power_of_ten(Decimal::from_str_exact(mantissa).ok()?, e))
            .map(Self::Finite)
            .ok_or_else(|| {
                Error::value(
                    "margin",
                    "a decimal of at most 28 digits, inf or -inf",
                    format!("{text:?}"),
                )
            })
    }
}

impl fmt::Display for Margin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Below => f.write_str("-inf"),
            Self::Above => f.write_str("inf"),
            Self::Finite(d) => d.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(low: f64, high: f64) -> String {
        Margin::shortest(low, high).unwrap().to_string()
    }

    #[test]
    fn shortest_by_hand() {
        assert_eq!(text(0.25, 1.5), "0.3");
        assert_eq!(text(19.0, f64::INFINITY), "20");
        assert_eq!(text(-0.3, 5.0), "-0.2");
        assert_eq!(text(-1.0, 0.5), "0");
        assert_eq!(text(-9.63, -8.9), "-9");
        assert_eq!(text(0.0, 0.3), "0.1");
        assert_eq!(text(1e-240, 1.0), "1");
        assert_eq!(text(-1e-240, 1.0), "0");
        assert_eq!(text(-3.4137, -3.4135), "-3.4136");
        assert_eq!(text(f64::INFINITY, f64::INFINITY), "inf");
        assert_eq!(text(f64::NEG_INFINITY, f64::NEG_INFINITY), "-inf");
        assert_eq!(text(f64::NEG_INFINITY, 2.5), "2");
        assert_eq!(text(f64::NEG_INFINITY, f64::INFINITY), "0");
        let third = 1.0 / 3.0;
        assert_eq!(text(third, f64::next_up(third)), "0.33333333333333337");
        assert!(Margin::shortest(1e-40, 2e-40).is_none());
    }

    #[test]
    fn text_is_kept_and_bad_text_refused() {
        for kept in [
            "-3.410",
            "0",
            "12.5",
            "inf",
            "-inf",
            "0.0000000000000000000000000001",
        ] {
            assert_eq!(kept.parse::<Margin>().unwrap().to_string(), kept);
        }
        assert_eq!("2.5e-3".parse::<Margin>().unwrap().nearest(), 2.5e-3);
        assert_eq!("-4E2".parse::<Margin>().unwrap().nearest(), -400.0);
        for bad in [
            "",
            "nan",
            "1,5",
            "1e-40",
            "1e400",
            "0.12345678901234567890123456789",
            "--1",
        ] {
            assert!(bad.parse::<Margin>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sums_are_exact_or_refused() {
        let m = |s: &str| s.parse::<Margin>().unwrap();
        assert_eq!(m("0.1").plus(m("0.2")).unwrap().to_string(), "0.3");
        assert_eq!(m("inf").plus(m("-2")).unwrap(), Margin::Above);
        assert!(m("inf").plus(m("-inf")).is_err());
        assert!(m("1000").plus(m("0.0000000000000000000000000001")).is_err());
    }

    proptest! {
        #[test]
        fn every_decimal_of_17_digits_is_its_number(x in -1e3f64..1e3) {
            let low = x.next_down();
            let d = Margin::shortest(low, x).unwrap();
            prop_assert_eq!(d.nearest(), x);
            prop_assert_eq!(d.to_string().parse::<Margin>().unwrap(), d);
        }

        #[test]
        fn no_shorter_one_fits(a in -50f64..50.0, width in 1e-9f64..3.0) {
            let d = Margin::shortest(a, a + width).unwrap();
            let found = d.nearest();
            prop_assert!(a < found && found <= a + width);
            let Margin::Finite(d) = d else { unreachable!() };
            let scale = d.normalize().scale();
            if scale > 0 {
                // With one decimal less, the next one above `a` is already outside.
                let unit = 10f64.powi(scale as i32 - 1);
                let next = ((a * unit).floor() + 1.0) / unit;
                let leading = (a * unit).abs() < 1.0;
                prop_assert!(leading || next > a + width - 1e-12);
            }
        }
    }
}
