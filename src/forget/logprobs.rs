//! Log-probabilities of labels under logits, and their gradient, without ever storing a softmax.

use crate::cancel::Cancel;
use crate::element::{Element, Real};
use crate::simd::{Exp, Kernel, dispatch, exp, log_sum_exp};
use crate::view::{Rows, RowsMut};
use crate::{Error, Result, par};

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

/// `grad_j = −u exp(z_j − lse)`.
struct Softmax<'a, T: Element> {
    logits: &'a [T],
    grad: &'a mut [T],
    lse: f64,
    upstream: f64,
}

impl<T: Element> Kernel for Softmax<'_, T>
where
    T::Acc: Exp,
{
    type Output = ();
    #[inline(always)]
    fn run(self) {
        // In two parts: the difference to the rounded part is exact where it matters, near the maximum.
        let high = T::Acc::from_f64(self.lse);
        let low = T::Acc::from_f64(self.lse - high.to_f64());
        let u = -T::Acc::from_f64(self.upstream);
        for (g, z) in self.grad.iter_mut().zip(self.logits) {
            *g = T::store(u * exp((z.load() - high) - low));
        }
    }
}

fn check_labels(labels: &[i64], rows: usize, vocab: usize, ignore: i64) -> Result<()> {
    if labels.len() != rows {
        return Err(Error::shape(
            "labels",
            format!("{rows} labels, one per row of logits"),
            labels.len(),
        ));
    }
    match labels
        .iter()
        .find(|y| **y != ignore && !(0..vocab as i64).contains(*y))
    {
        Some(bad) => Err(Error::value(
            "labels",
            format!("token ids in [0, {vocab}) or {ignore}"),
            bad,
        )),
        None => Ok(()),
    }
}

/// Rows whose memory fills one work item.
fn rows_per_item<T>(vocab: usize) -> usize {
    (par::ITEM_BYTES / (vocab * size_of::<T>()).max(1)).max(1)
}

/// Log-probability of each label and the log-sum-exp of its row, both f64; 0 where the label is `ignore`. Ignored rows
/// are not read.
///
/// # Errors
/// Labels that do not fit; a counted row with a NaN, +∞, or nothing but −∞.
pub fn token_logprobs<T: Element>(
    logits: &Rows<'_, T>,
    labels: &[i64],
    ignore: i64,
    cancel: &Cancel,
) -> Result<Vec<(f64, f64)>>
where
    T::Acc: Exp,
{
    check_labels(labels, logits.rows(), logits.width(), ignore)?;
    let step = rows_per_item::<T>(logits.width());
    let bytes = labels.len() * logits.width() * size_of::<T>();
    let parts = par::try_map(bytes, par::ranges(labels.len(), step), |range| {
        cancel.check()?;
        range
            .map(|i| {
                if labels[i] == ignore {
                    return Ok((0.0, 0.0));
                }
                let row = logits.row(i);
                let lse = dispatch(Lse(row));
                if !lse.is_finite() {
                    return Err(Error::NonFinite {
                        arg: "logits",
                        index: i * logits.width(),
                        found: lse,
                    });
                }
                Ok((row[labels[i] as usize].load().to_f64() - lse, lse))
            })
            .collect::<Result<Vec<_>>>()
    })?;
    Ok(parts.concat())
}

/// Gradient of `Σ upstream_i logprob_i` with respect to the logits: `u (1[j = y] − exp(z_j − lse))`, rows of zeros where
/// the label is `ignore`.
///
/// # Errors
/// Shapes that do not fit.
pub fn token_logprobs_backward<T: Element>(
    logits: &Rows<'_, T>,
    labels: &[i64],
    lse: &[f64],
    upstream: &[f64],
    grad: RowsMut<'_, T>,
    ignore: i64,
) -> Result<()>
where
    T::Acc: Exp,
{
    let (rows, vocab) = (logits.rows(), logits.width());
    check_labels(labels, rows, vocab, ignore)?;
    if lse.len() != rows || upstream.len() != rows {
        let found = format!("{} and {}", lse.len(), upstream.len());
        return Err(Error::shape(
            "lse, upstream",
            format!("{rows} values"),
            found,
        ));
    }
    if (grad.rows(), grad.width()) != (rows, vocab) {
        let found = format!("{} x {}", grad.rows(), grad.width());
        return Err(Error::shape("grad", format!("{rows} x {vocab}"), found));
    }
    let bytes = 2 * rows * vocab * size_of::<T>();
    let runs = grad.into_runs(rows_per_item::<T>(vocab));
    par::for_each(bytes, runs, |run| {
        for (k, grad) in run.data.chunks_mut(vocab).enumerate() {
            let i = run.first + k;
            let (y, u) = (labels[i], upstream[i]);
            if y == ignore || u == 0.0 {
                grad.fill(T::default());
                continue;
            }
            let row = logits.row(i);
            dispatch(Softmax {
                logits: row,
                grad,
                lse: lse[i],
                upstream: u,
            });
            let y = y as usize;
            // 1 − p without cancellation where p is close to 1.
            let rest = -(row[y].load().to_f64() - lse[i]).exp_m1();
            grad[y] = T::store(T::Acc::from_f64(u * rest));
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn forward(z: &[f64], v: usize, labels: &[i64]) -> Result<Vec<(f64, f64)>> {
        token_logprobs(&Rows::matrix(z, v), labels, -100, &Cancel::new())
    }

    #[test]
    fn worked_example_and_its_gradient() {
        let z = [
            0.0, 1.0, 2.0, 3.0, 4.0, 1.0, -1.0, 0.5, 0.0, 2.0, -1e4, -1e4, -1e4, -1e4, 0.0,
        ];
        let labels = [2, 4, 1];
        let got = forward(&z, 5, &labels).unwrap();
        let lp: Vec<f64> = got.iter().map(|g| g.0).collect();
        for (a, b) in lp.iter().zip([-2.45191439594, -0.574437939628, -10000.0]) {
            assert!((a - b).abs() < 1e-10, "{a} {b}");
        }
        let lse: Vec<f64> = got.iter().map(|g| g.1).collect();
        let mut grad = [0.0; 15];
        token_logprobs_backward(
            &Rows::matrix(&z, 5),
            &labels,
            &lse,
            &[1.0, 0.5, -1.0],
            RowsMut::matrix(&mut grad, 5),
            -100,
        )
        .unwrap();
        let expected = [
            -0.011656230956,
            -0.0316849207961,
            0.913871455564,
            -0.234121657253,
            -0.636408646559,
            -0.103561968064,
            -0.0140155882804,
            -0.0628135088108,
            -0.0380983189379,
            0.218489384093,
            0.0,
            -1.0,
            0.0,
            0.0,
            1.0,
        ];
        for (a, b) in grad.iter().zip(expected) {
            assert!((a - b).abs() < 1e-12, "{a} {b}");
        }
    }

    #[test]
    fn refusals() {
        assert!(forward(&[1.0, f64::NAN], 2, &[0]).is_err());
        assert!(forward(&[1.0, f64::INFINITY], 2, &[0]).is_err());
        assert!(forward(&[f64::NEG_INFINITY; 2], 2, &[0]).is_err());
        assert!(forward(&[1.0, 2.0], 2, &[2]).is_err());
        assert!(forward(&[1.0, 2.0], 2, &[0, 1]).is_err());
        // A row that does not count is not read.
        assert_eq!(forward(&[f64::NAN; 2], 2, &[-100]).unwrap(), [(0.0, 0.0)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn gradient_agrees_with_differences(z in prop::collection::vec(-5f64..5.0, 7), y in 0i64..7) {
            let step = 1e-6;
            let (_, lse) = forward(&z, 7, &[y]).unwrap()[0];
            let mut grad = [0.0; 7];
            token_logprobs_backward(
                &Rows::matrix(&z, 7), &[y], &[lse], &[1.0], RowsMut::matrix(&mut grad, 7), -100,
            ).unwrap();
            for j in 0..7 {
                let at = |d: f64| {
                    let mut z = z.clone();
                    z[j] += d;
                    forward(&z, 7, &[y]).unwrap()[0].0
                };
                let numeric = (at(step) - at(-step)) / (2.0 * step);
                prop_assert!((numeric - grad[j]).abs() < 1e-8);
            }
            prop_assert!(grad.iter().sum::<f64>().abs() < 1e-14);
        }
    }
}
