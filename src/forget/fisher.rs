//! Streaming diagonal Fisher information: sums of squared (or absolute) gradients, whatever dtype the gradients have.
//!
//! A sum in f32 of n non-negative terms has a relative error of at most (n + 2) · 2⁻²⁴, each term rounded twice
//! (square and weight) before the sum; f64 sums square and add in f64.

use crate::element::{Element, Real};
use crate::par;
use crate::simd::{Kernel, dispatch, prefetch};
use crate::{Error, Result};

/// Elements per work item.
const ITEM: usize = 16 << 10;

/// Storage of a Fisher sum.
pub trait Sum: Element<Acc = Self> + Real {
    /// Adding a term below this to a finite sum rounds to a finite sum: half the spacing of the largest numbers,
    /// halved again for the rounding of the term.
    const SAFE_TERM: f64;
    /// What [`combine`] forgives: differences above `-SLACK` times the subtrahend are rounding and become 0.
    const SLACK: f64;
}

impl Sum for f32 {
    const SAFE_TERM: f64 = (1u128 << 102) as f64;
    const SLACK: f64 = 1e-3;
}

impl Sum for f64 {
    // 2^969.
    const SAFE_TERM: f64 = f64::from_bits((969 + 1023) << 52);
    const SLACK: f64 = 1e-9;
}

/// What is summed: the squares of the Fisher information, or the absolute values of label-free importance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    Absolute,
    Square,
}

#[inline(always)]
fn term<T: Element, A: Sum, const SQUARE: bool>(g: T, weight: A) -> A {
    let g = A::from_f64(g.load().to_f64());
    weight * if SQUARE { g * g } else { g.abs() }
}

/// Largest magnitude, or NaN if there is one.
struct Peak<'a, T>(&'a [T]);

impl<T: Element> Kernel for Peak<'_, T> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        const LANES: usize = 64;
        const AHEAD: usize = 16 * LANES;
        let mut peak = [T::Acc::ZERO; LANES];
        let mut nan = 0u32;
        let (blocks, rest) = self.0.as_chunks::<LANES>();
        for block in blocks {
            prefetch(block, AHEAD, LANES);
            for (p, g) in peak.iter_mut().zip(block) {
                let g = g.load().abs();
                nan |= u32::from(g.is_nan());
                *p = g.greater(*p);
            }
        }
        for (p, g) in peak.iter_mut().zip(rest) {
            let g = g.load().abs();
            nan |= u32::from(g.is_nan());
            *p = g.greater(*p);
        }
        if nan != 0 {
            return f64::NAN;
        }
        peak.into_iter()
            .fold(T::Acc::ZERO, |a, b| a.greater(b))
            .to_f64()
    }
}

struct Add<'a, 'b, T, A, const SQUARE: bool> {
    sum: &'b mut [A],
    grad: &'a [T],
    weight: A,
}

impl<T: Element, A: Sum, const SQUARE: bool> Kernel for Add<'_, '_, T, A, SQUARE> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (s, g) in self.sum.iter_mut().zip(self.grad) {
            *s += term::<T, A, SQUARE>(*g, self.weight);
        }
    }
}

fn expect_stack<A>(sum: &[A], grads: usize, weights: usize) -> Result<()> {
    let fits = if sum.is_empty() {
        grads == 0
    } else {
        grads.is_multiple_of(sum.len())
    };
    if !fits {
        return Err(Error::shape(
            "grad",
            format!("a multiple of {} elements", sum.len()),
            grads,
        ));
    }
    let stacked = grads / sum.len().max(1);
    if weights != 1 && weights != stacked && !sum.is_empty() {
        return Err(Error::shape(
            "weights",
            format!("1 or {stacked}, one for each gradient"),
            weights,
        ));
    }
    Ok(())
}

/// The weight of the `k`-th gradient of a stack, where one weight is everyone's.
fn weight_of<A: Sum>(weights: &[f64], k: usize) -> A {
    A::from_f64(weights[if weights.len() == 1 { 0 } else { k }])
}

/// Whether `sum += weight * grad²` (or `|grad|`) stays finite; `grad` is one gradient or several stacked ones, `weights`
/// one number for all or one for each of the stack.
///
/// Reads the gradient once, and the sum only where a term is so large that the sum could overflow.
///
/// # Errors
/// `NonFinite` naming the first NaN or infinite gradient, or the first element whose sum would overflow; `Shape` if the
/// lengths do not fit; `Value` if a weight is negative or not finite.
pub fn check<T: Element, A: Sum>(
    sum: &[A],
    grad: &[T],
    weights: &[f64],
    power: Power,
) -> Result<()> {
    for &weight in weights {
        if !(weight >= 0.0 && Real::is_finite(A::from_f64(weight))) {
            return Err(Error::value(
                "weight",
                format!("a finite {} of 0 or more", A::DTYPE),
                weight,
            ));
        }
    }
    expect_stack(sum, grad.len(), weights.len())?;
    let peaks = par::map(size_of_val(grad), grad.chunks(ITEM).collect(), |g| {
        dispatch(Peak(g))
    });
    let peak = peaks
        .into_iter()
        .fold(0.0, |a: f64, b| if b > a || b.is_nan() { b } else { a });
    let most = match power {
        Power::Square => peak * peak,
        Power::Absolute => peak,
    };
    let heaviest = weights.iter().copied().fold(0.0, f64::max);
    if most * heaviest < A::SAFE_TERM && most < A::SAFE_TERM {
        return Ok(());
    }
    if let Some(index) = grad.iter().position(|g| !g.finite()) {
        return Err(Error::NonFinite {
            arg: "grad",
            index,
            found: grad[index].load().to_f64(),
        });
    }
    for (index, s) in sum.iter().enumerate() {
        let stack = grad.iter().skip(index).step_by(sum.len()).enumerate();
        let total = stack.fold(*s, |s, (k, g)| {
            let weight = weight_of(weights, k);
            s + match power {
                Power::Square => term::<T, A, true>(*g, weight),
                Power::Absolute => term::<T, A, false>(*g, weight),
            }
        });
        if !Real::is_finite(total) {
            return Err(Error::NonFinite {
                arg: match power {
                    Power::Square => "the sum of squares",
                    Power::Absolute => "the sum of absolute values",
                },
                index,
                found: total.to_f64(),
            });
        }
    }
    Ok(())
}

/// `sum += weight * grad²` (or `|grad|`), element by element; `grad` is one gradient or several stacked ones, added in
/// order.
///
/// # Errors
/// As [`check`], before anything is written.
pub fn accumulate<T: Element, A: Sum>(
    sum: &mut [A],
    grad: &[T],
    weights: &[f64],
    power: Power,
) -> Result<()> {
    check(sum, grad, weights, power)?;
    accumulate_checked(sum, grad, weights, power)
}

/// As [`accumulate`] for what [`check`] has passed: the values are not looked at again.
///
/// # Errors
/// `Shape` if the lengths do not fit.
pub fn accumulate_checked<T: Element, A: Sum>(
    sum: &mut [A],
    grad: &[T],
    weights: &[f64],
    power: Power,
) -> Result<()> {
    expect_stack(sum, grad.len(), weights.len())?;
    let n = sum.len();
    let bytes = 2 * size_of_val(sum) + size_of_val(grad);
    let items = sum.chunks_mut(ITEM).enumerate().collect();
    par::for_each(bytes, items, |(k, sum): (usize, &mut [A])| {
        for (j, g) in grad.chunks_exact(n).enumerate() {
            let grad = &g[k * ITEM..][..sum.len()];
            let weight = weight_of(weights, j);
            match power {
                Power::Square => dispatch(Add::<_, _, true> { sum, grad, weight }),
                Power::Absolute => dispatch(Add::<_, _, false> { sum, grad, weight }),
            }
        }
    });
    Ok(())
}

struct Combine<'a, 'b, A> {
    sum: &'b mut [A],
    other: &'a [A],
    sign: f64,
}

#[inline(always)]
fn combined<A: Sum>(s: A, o: A, sign: f64) -> f64 {
    s.to_f64() + sign * o.to_f64()
}

impl<A: Sum> Kernel for Combine<'_, '_, A> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (s, o) in self.sum.iter_mut().zip(self.other) {
            *s = A::from_f64(combined(*s, *o, self.sign)).greater(A::ZERO);
        }
    }
}

struct CheckCombine<'a, A> {
    sum: &'a [A],
    other: &'a [A],
    sign: f64,
}

#[inline(always)]
fn combinable<A: Sum>(s: A, o: A, sign: f64) -> bool {
    let v = combined(s, o, sign);
    (v >= -A::SLACK * o.to_f64()) & Real::is_finite(A::from_f64(v))
}

impl<A: Sum> Kernel for CheckCombine<'_, A> {
    type Output = bool;
    #[inline(always)]
    fn run(self) -> bool {
        let mut bad = 0u32;
        for (s, o) in self.sum.iter().zip(self.other) {
            bad |= u32::from(!combinable(*s, *o, self.sign));
        }
        bad == 0
    }
}

/// Whether [`combine`] gives a Fisher sum again: finite, and not negative by more than rounding explains.
///
/// # Errors
/// `Shape` if the lengths differ; `NonFinite` where the sum overflows; `Value` where more is subtracted than there is.
pub fn check_combine<A: Sum>(sum: &[A], other: &[A], subtract: bool) -> Result<()> {
    if sum.len() != other.len() {
        return Err(Error::shape(
            "other",
            format!("{} elements", sum.len()),
            other.len(),
        ));
    }
    let sign = if subtract { -1.0 } else { 1.0 };
    let items = sum
        .chunks(ITEM)
        .zip(other.chunks(ITEM))
        .enumerate()
        .collect();
    par::try_map(
        2 * size_of_val(sum),
        items,
        |(k, (sum, other)): (usize, (&[A], &[A]))| {
            if dispatch(CheckCombine { sum, other, sign }) {
                return Ok(());
            }
            let bad = sum
                .iter()
                .zip(other)
                .position(|(s, o)| !combinable(*s, *o, sign));
            let i = bad.unwrap_or_default();
            let (index, found) = (k * ITEM + i, combined(sum[i], other[i], sign));
            if found < 0.0 {
                let found = format!("a difference of {found} at flat index {index}");
                return Err(Error::value(
                    "other",
                    "sums of part of the same data",
                    found,
                ));
            }
            Err(Error::NonFinite {
                arg: "the sum of squares",
                index,
                found: A::from_f64(found).to_f64(),
            })
        },
    )?;
    Ok(())
}

/// `sum ± other` in f64, rounded once; differences that rounding made negative become 0.
///
/// # Errors
/// As [`check_combine`], before anything is written.
pub fn combine<A: Sum>(sum: &mut [A], other: &[A], subtract: bool) -> Result<()> {
    check_combine(sum, other, subtract)?;
    let sign = if subtract { -1.0 } else { 1.0 };
    let items = sum.chunks_mut(ITEM).zip(other.chunks(ITEM)).collect();
    par::for_each(3 * size_of_val(other), items, |(sum, other)| {
        dispatch(Combine { sum, other, sign })
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::for_each_level;
    use half::{bf16, f16};
    use proptest::prelude::*;

    fn case<T: Element, A: Sum>(grads: &[f32], n: usize, weight: f64, unit: f64) {
        let grads: Vec<T> = grads
            .iter()
            .map(|v| T::store(T::Acc::from_f64(f64::from(*v))))
            .collect();
        let stacks = grads.len() / n;
        let exact: Vec<f64> = (0..n)
            .map(|i| {
                (0..stacks)
                    .map(|b| weight * grads[b * n + i].load().to_f64().powi(2))
                    .sum()
            })
            .collect();
        let mut seen = None;
        for_each_level(|_| {
            for threads in [1, 3] {
                par::set_num_threads(threads);
                let mut sum = vec![A::ZERO; n];
                accumulate(&mut sum, &grads[..stacks * n], &[weight], Power::Square).unwrap();
                for (s, e) in sum.iter().zip(&exact) {
                    let bound = (stacks + 3) as f64 * unit * e;
                    assert!((s.to_f64() - e).abs() <= bound + 1e-44, "{s:?} {e}");
                }
                assert!(*seen.get_or_insert(sum.clone()) == sum);
            }
        });
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn within_its_bound_for_every_dtype(
            grads in prop::collection::vec(-1e3f32..1e3, 1..4000),
            stacks in 1usize..5,
            weight in prop_oneof![Just(1.0), 0.1f64..50.0],
        ) {
            let n = grads.len() / stacks;
            prop_assume!(n > 0);
            let (single, double) = (f64::from(f32::EPSILON) / 2.0, f64::EPSILON);
            case::<f32, f32>(&grads, n, weight, single);
            case::<f16, f32>(&grads, n, weight, single);
            case::<bf16, f32>(&grads, n, weight, single);
            case::<bf16, f64>(&grads, n, weight, double);
            case::<f64, f64>(&grads, n, weight, double);
        }
    }

    #[test]
    fn refuses_what_would_poison_and_adds_nothing() {
        let sum = vec![1f32; 3 * ITEM];
        let at = 2 * ITEM + 5;
        for bad in [f32::NAN, f32::INFINITY, 1e20, -2e19] {
            let mut g = vec![0.5f32; 3 * ITEM];
            g[at] = bad;
            let mut got = sum.clone();
            let err = accumulate(&mut got, &g, &[1.0], Power::Square).unwrap_err();
            assert!(
                matches!(err, Error::NonFinite { index, .. } if index == at),
                "{err}"
            );
            assert!(got == sum);
        }
    }

    #[test]
    fn large_but_representable_sums_pass() {
        let g = [1.8e19f32, 1e18];
        let mut sum = [0f32; 2];
        accumulate(&mut sum, &g, &[1.0], Power::Square).unwrap();
        assert!(sum.iter().all(|s| s.is_finite()));
        assert!(accumulate(&mut sum, &g, &[1.0], Power::Square).is_err());
        assert_eq!(sum[0], 1.8e19f32 * 1.8e19);
        // Small terms never overflow even the largest finite sum.
        let mut full = [f32::MAX];
        for _ in 0..3 {
            accumulate(&mut full, &[2f32.powi(50)], &[2.0], Power::Square).unwrap();
        }
        assert_eq!(full, [f32::MAX]);
    }

    #[test]
    fn refuses_weights_and_lengths() {
        let mut sum = [0f32; 4];
        for weight in [-1.0, f64::NAN, 1e39] {
            assert!(matches!(
                accumulate(&mut sum, &[1f32; 4], &[weight], Power::Square),
                Err(Error::Value { .. })
            ));
        }
        assert!(matches!(
            accumulate(&mut sum, &[1f32; 6], &[1.0], Power::Square),
            Err(Error::Shape { .. })
        ));
        assert!(accumulate::<f32, f32>(&mut [], &[], &[1.0], Power::Square).is_ok());
    }

    #[test]
    fn every_gradient_of_a_stack_has_its_weight_and_power() {
        let n = ITEM + 3;
        let grads: Vec<f32> = (0..3 * n).map(|i| (i as f32 * 0.7).sin()).collect();
        let weights = [0.5, 0.0, 3.0];
        for power in [Power::Square, Power::Absolute] {
            let mut sum = vec![0f64; n];
            accumulate(&mut sum, &grads, &weights, power).unwrap();
            for (i, s) in sum.iter().enumerate() {
                let exact: f64 = (0..3)
                    .map(|k| {
                        let g = f64::from(grads[k * n + i]);
                        weights[k]
                            * if power == Power::Square {
                                g * g
                            } else {
                                g.abs()
                            }
                    })
                    .sum();
                assert!((s - exact).abs() <= 1e-15 * exact, "{s} {exact}");
            }
        }
        let mut sum = [0f32; 2];
        let err = accumulate(&mut sum, &[1f32; 6], &[1.0, 2.0], Power::Square).unwrap_err();
        assert!(matches!(err, Error::Shape { .. }), "{err}");
        // What overflows as a square does not as an absolute value.
        accumulate(&mut sum, &[1e30f32; 2], &[1.0], Power::Absolute).unwrap();
        assert!(accumulate(&mut sum, &[f32::MAX; 4], &[1.0], Power::Absolute).is_err());
        assert_eq!(sum, [1e30; 2]);
    }

    #[test]
    fn combines_both_ways() {
        let mut a = [1.0f32, 2.0, 0.1];
        combine(&mut a, &[0.5, 2.0, 0.0], false).unwrap();
        assert_eq!(a, [1.5, 4.0, 0.1]);
        combine(&mut a, &[0.5, 4.0 + 1e-6, 0.1], true).unwrap();
        assert_eq!(a, [1.0, 0.0, 0.0]);
        let before = a;
        assert!(matches!(
            combine(&mut a, &[2.0, 0.0, 0.0], true),
            Err(Error::Value { .. })
        ));
        assert!(matches!(
            combine(&mut a, &[0.0, f32::NAN, 0.0], false),
            Err(Error::NonFinite { .. })
        ));
        assert!(matches!(
            combine(&mut [f32::MAX], &[f32::MAX], false),
            Err(Error::NonFinite { .. })
        ));
        assert_eq!(a, before);
    }
}
