//! Projection of one row's perturbation on the budget and on the box of admissible values.

use crate::element::{Element, Real};

/// Shape of the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norm {
    Linf,
    L2,
}

/// Budget and box.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    pub norm: Norm,
    pub epsilon: f64,
    pub low: f64,
    pub high: f64,
}

fn norm_of<R: Real>(v: &[R]) -> f64 {
    v.iter()
        .map(|d| d.to_f64() * d.to_f64())
        .sum::<f64>()
        .sqrt()
}

impl Limits {
    /// The nearest `delta` (in L2) with `|delta| <= epsilon` and `x + delta` in the box; exact for both norms.
    pub fn project<R: Real>(&self, x: &[R], delta: &mut [R]) {
        match self.norm {
            Norm::Linf => {
                for (d, x) in delta.iter_mut().zip(x) {
                    *d = self.within(*d, *x);
                }
            }
            Norm::L2 => self.project_ball(x, delta),
        }
    }

    /// The nearest change of `x` to `d` within the L∞ ball and the box.
    #[inline(always)]
    pub fn within<R: Real>(&self, d: R, x: R) -> R {
        let (low, high) = self.room(x.to_f64(), self.epsilon);
        R::from_f64(d.to_f64().greater(low).lesser(high))
    }

    /// Least and greatest change of a value `x` by at most `radius` that stays in the box.
    #[inline(always)]
    fn room(&self, x: f64, radius: f64) -> (f64, f64) {
        (
            (self.low - x).greater(-radius).lesser(0.0),
            (self.high - x).lesser(radius).greater(0.0),
        )
    }

    /// The projection on ball and box together is `clip(delta / (1 + μ))` for the least μ ≥ 0 that meets the ball.
    fn project_ball<R: Real>(&self, x: &[R], delta: &mut [R]) {
        let at = |scale: f64, d: R, x: R| {
            let (low, high) = self.room(x.to_f64(), f64::INFINITY);
            (d.to_f64() * scale).clamp(low, high)
        };
        let length = |scale: f64| {
            let terms = delta.iter().zip(x).map(|(d, x)| at(scale, *d, *x).powi(2));
            terms.sum::<f64>().sqrt()
        };
        let mut scale = 1.0;
        if length(1.0) > self.epsilon {
            let (mut low, mut high) = (0.0, 1.0);
            while high - low > f64::EPSILON * high {
                let mid = 0.5 * (low + high);
                if mid <= low || mid >= high {
                    break;
                }
                if length(mid) > self.epsilon {
                    high = mid
                } else {
                    low = mid
                }
            }
            scale = low;
        }
        for (d, x) in delta.iter_mut().zip(x) {
            *d = R::from_f64(at(scale, *d, *x));
        }
    }

    /// Scales or clips a perturbation that many rows share; the box is applied where it meets each row.
    pub fn project_shared<R: Real>(&self, delta: &mut [R]) {
        match self.norm {
            Norm::Linf => {
                let e = self.epsilon;
                delta
                    .iter_mut()
                    .for_each(|d| *d = R::from_f64(d.to_f64().clamp(-e, e)));
            }
            Norm::L2 => {
                let length = norm_of(delta);
                if length > self.epsilon {
                    let scale = self.epsilon / length;
                    delta
                        .iter_mut()
                        .for_each(|d| *d = R::from_f64(d.to_f64() * scale));
                }
            }
        }
    }

    /// Stores `x + delta` in the type of `x` so that the budget and the box hold for what is stored, exactly. With
    /// `levels`, values are multiples of `1 / levels` and the L∞ budget is the whole number of levels it contains.
    pub fn publish<T: Element>(
        &self,
        x: &[T],
        delta: &[T::Acc],
        levels: Option<f64>,
        out: &mut [T],
    ) {
        let mut shrink = 1.0;
        // Whoever adds the squares up, in whatever order, is to find them within the budget.
        let most = self.epsilon * (1.0 - (x.len() + 4) as f64 * f64::EPSILON);
        loop {
            for ((o, x), d) in out.iter_mut().zip(x).zip(delta) {
                *o = self.store(*x, d.to_f64() * shrink, levels);
            }
            let change = |(o, x): (&T, &T)| (o.load().to_f64() - x.load().to_f64()).powi(2);
            let length = out.iter().zip(x).map(change).sum::<f64>().sqrt();
            if self.norm == Norm::Linf || length <= most {
                return;
            }
            // Rounding lengthened it; what is left to take away is at least a part in 2^20.
            shrink *= (most / length).min(1.0 - 2f64.powi(-20));
        }
    }

    fn store<T: Element>(&self, x: T, delta: f64, levels: Option<f64>) -> T {
        let base = x.load().to_f64();
        let radius = if self.norm == Norm::Linf {
            self.epsilon
        } else {
            f64::INFINITY
        };
        if let Some(levels) = levels {
            let budget = (levels * radius + 1e-9).floor();
            let (low, high) = ((self.low * levels).ceil(), (self.high * levels).floor());
            let from = (base * levels).round();
            // Towards zero under L2, where a rounding up could leave the ball.
            let steps = delta * levels;
            let steps = if self.norm == Norm::L2 {
                steps.trunc()
            } else {
                steps.round()
            };
            let to = (from + steps.clamp(-budget, budget)).clamp(low, high);
            return if to == from {
                x
            } else {
                T::store(T::Acc::from_f64(to / levels))
            };
        }
        let (low, high) = self.room(base, radius);
        let mut stored = T::store(T::Acc::from_f64(base + delta.clamp(low, high)));
        let inside = |v: T| {
            let v = v.load().to_f64();
            (v - base).abs() <= radius
                && (v >= self.low || v >= base)
                && (v <= self.high || v <= base)
        };
        if !inside(stored) {
            stored = step_towards(stored, base);
        }
        if inside(stored) { stored } else { x }
    }
}

/// The neighbour of `v` in its storage type on the side of `target`.
fn step_towards<T: Element>(v: T, target: f64) -> T {
    let value = v.load().to_f64();
    // Between half and one unit in the last place of any type of p significant bits is |v| 2^-p.
    let bits = match T::DTYPE {
        crate::element::DType::F64 => 53,
        crate::element::DType::F32 => 24,
        crate::element::DType::F16 => 11,
        crate::element::DType::BF16 => 8,
    };
    let step = (value.abs() * 2f64.powi(-bits) * 1.01).max(f64::MIN_POSITIVE);
    T::store(T::Acc::from_f64(value + step.copysign(target - value)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};
    use proptest::prelude::*;

    const X: [f64; 4] = [0.1, 0.5, 0.98, 0.02];
    const TO: [f64; 4] = [0.3, 0.45, 1.2, -0.3];

    fn limits(norm: Norm) -> Limits {
        Limits {
            norm,
            epsilon: 0.1,
            low: 0.0,
            high: 1.0,
        }
    }

    fn projected(l: Limits) -> Vec<f64> {
        let mut delta: Vec<f64> = X.iter().zip(TO).map(|(x, t)| t - x).collect();
        l.project(&X, &mut delta);
        delta.iter().zip(X).map(|(d, x)| d + x).collect()
    }

    fn close(a: &[f64], b: &[f64]) {
        assert!(
            a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-11),
            "{a:?} {b:?}"
        );
    }

    #[test]
    fn reference_vectors() {
        close(&projected(limits(Norm::Linf)), &[0.2, 0.45, 1.0, 0.0]);
        close(
            &projected(limits(Norm::L2)),
            &[0.193_052_799_686, 0.476_736_800_078, 1.0, 0.0],
        );
        let no_box = Limits {
            low: -9.0,
            high: 9.0,
            ..limits(Norm::L2)
        };
        close(
            &projected(no_box),
            &[
                0.145_489_804_319,
                0.488_627_548_920,
                1.030_038_784_750,
                -0.052_783_686_910,
            ],
        );
    }

    fn check_published<T: Element>(l: Limits, x: &[f64], delta: &[f64], levels: Option<f64>) {
        let x: Vec<T> = (x.iter())
            .map(|v| levels.map_or(*v, |q| (v * q).round() / q))
            .map(|v| T::store(T::Acc::from_f64(v)))
            .collect();
        let delta: Vec<T::Acc> = delta.iter().map(|v| T::Acc::from_f64(*v)).collect();
        let mut out = x.clone();
        l.publish(&x, &delta, levels, &mut out);
        let change: Vec<f64> = (out.iter().zip(&x))
            .map(|(a, b)| a.load().to_f64() - b.load().to_f64())
            .collect();
        let size = match l.norm {
            Norm::Linf => change.iter().fold(0.0f64, |m, c| m.max(c.abs())),
            Norm::L2 => change.iter().map(|c| c * c).sum::<f64>().sqrt(),
        };
        let rounding = if levels.is_some() { 1e-6 } else { 0.0 };
        assert!(
            size <= l.epsilon + rounding,
            "{size:e} > {:e} in {}",
            l.epsilon,
            T::DTYPE
        );
        assert!(
            out.iter()
                .all(|v| (l.low..=l.high).contains(&v.load().to_f64()))
        );
    }

    proptest! {
        #[test]
        fn what_is_stored_keeps_budget_and_box(
            x in prop::collection::vec(0.0f64..=1.0, 1..40),
            seed in prop::collection::vec(-1.0f64..1.0, 40),
            epsilon in 1e-4f64..0.5,
            l2 in any::<bool>(),
        ) {
            let l = Limits { norm: if l2 { Norm::L2 } else { Norm::Linf }, epsilon, low: 0.0, high: 1.0 };
            let delta = &seed[..x.len()];
            check_published::<f64>(l, &x, delta, None);
            check_published::<f32>(l, &x, delta, None);
            check_published::<f16>(l, &x, delta, None);
            check_published::<bf16>(l, &x, delta, None);
            check_published::<f32>(l, &x, delta, Some(255.0));
        }

        #[test]
        fn the_ball_projection_is_the_nearest_point(
            x in prop::collection::vec(0.0f64..=1.0, 3),
            to in prop::collection::vec(-1.0f64..2.0, 3),
            other in prop::collection::vec(0.0f64..=1.0, 3),
        ) {
            let l = limits(Norm::L2);
            let mut delta: Vec<f64> = x.iter().zip(&to).map(|(x, t)| t - x).collect();
            l.project(&x, &mut delta);
            prop_assert!(norm_of(&delta) <= l.epsilon + 1e-12);
            // Any other feasible point is no closer to the target.
            let mut rival: Vec<f64> = x.iter().zip(&other).map(|(x, t)| t - x).collect();
            let scale = (l.epsilon / norm_of(&rival).max(1e-12)).min(1.0);
            rival.iter_mut().for_each(|d| *d *= scale);
            let distance = |d: &[f64]| (0..3).map(|i| (x[i] + d[i] - to[i]).powi(2)).sum::<f64>();
            prop_assert!(distance(&delta) <= distance(&rival) + 1e-9);
        }
    }
}
