//! What biases do to the categories of many prompts: mean rates and second moments, the gradient and the Hessian of
//! the convex function whose minimum has the wanted rates.
//!
//! With probabilities p of K categories and of the rest (column 0), biases b and sharpness s, a prompt's tilted
//! probabilities are `q ∝ exp(s (ln p + b))`; s = 1 is sampled decoding, large s approaches the decoder that takes the
//! largest.

use crate::simd::{self, Kernel, dispatch, exp};
use crate::{Error, Result, par};

/// Prompts per task; sums are combined in the order of tasks.
const TASK: usize = 8192;
/// Prompts worked on at a time.
const BLOCK: usize = 512;

/// Means over all prompts.
#[derive(Debug, Clone, PartialEq)]
pub struct Tilted {
    /// Mean of `ln Σ_j exp(s (ln p_j + b_j)) / s`.
    pub value: f64,
    /// Mean tilted probability of each category.
    pub rates: Vec<f64>,
    /// Means of products of two categories' tilted probabilities, K × K.
    pub products: Vec<f64>,
}

struct Block<'a> {
    columns: &'a [&'a [f64]],
    bias: &'a [f64],
    sharpness: f64,
    /// `columns × BLOCK` numbers.
    scratch: &'a mut [f64],
    /// Value, rates, products (upper triangle by rows).
    sums: &'a mut [f64],
}

impl Kernel for Block<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let n = self.columns[0].len();
        let mut peak = [f64::NEG_INFINITY; BLOCK];
        let peak = &mut peak[..n];
        for ((column, b), out) in self
            .columns
            .iter()
            .zip(self.bias)
            .zip(self.scratch.chunks_exact_mut(BLOCK))
        {
            for ((x, p), o) in column.iter().zip(peak.iter_mut()).zip(out.iter_mut()) {
                *o = (x + b) * self.sharpness;
                *p = if *o > *p { *o } else { *p };
            }
        }
        let mut total = [0.0; BLOCK];
        let total = &mut total[..n];
        for out in self.scratch.chunks_exact_mut(BLOCK) {
            for ((o, p), t) in out.iter_mut().zip(peak.iter()).zip(total.iter_mut()) {
                *o = exp(*o - p);
                *t += *o;
            }
        }
        for (p, t) in peak.iter_mut().zip(total.iter()) {
            *p += t.ln();
        }
        self.sums[0] += simd::sum_f64(peak);
        for out in self.scratch.chunks_exact_mut(BLOCK).skip(1) {
            for (o, t) in out.iter_mut().zip(total.iter()) {
                *o /= t;
            }
        }
        let mut at = self.sums[1..].iter_mut();
        let categories = || self.scratch.chunks_exact(BLOCK).skip(1).map(|c| &c[..n]);
        for (q, sum) in categories().zip(at.by_ref()) {
            *sum += simd::sum_f64(q);
        }
        for (k, q) in categories().enumerate() {
            for (r, sum) in categories().skip(k).zip(at.by_ref()) {
                *sum += simd::dot(q, r);
            }
        }
    }
}

/// Means under `bias` (one per category) of `log_p`, one column of `n` per outcome, the rest first.
///
/// # Errors
/// `Shape` unless there are `n · (K + 1)` numbers for the K biases and at least one of each, `Value` for a sharpness that
/// is not positive, `NonFinite` for a NaN or +∞, `Degenerate` for a prompt whose outcomes all have probability 0.
pub fn tilted(log_p: &[f64], n: usize, bias: &[f64], sharpness: f64) -> Result<Tilted> {
    let k = bias.len();
    if n == 0 || k == 0 || log_p.len() != n * (k + 1) {
        return Err(Error::shape(
            "log_p",
            format!("{} columns of at least one prompt", k + 1),
            format!("{} numbers for {n} prompts", log_p.len()),
        ));
    }
    if !(sharpness > 0.0 && sharpness.is_finite()) {
        return Err(Error::value("sharpness", "a positive number", sharpness));
    }
    let mut all = vec![0.0];
    all.extend_from_slice(bias);
    let width = 1 + k + k * (k + 1) / 2;
    let parts = par::map(size_of_val(log_p) * 4, par::ranges(n, TASK), |task| {
        let mut sums = vec![0.0; width];
        let mut scratch = vec![0.0; (k + 1) * BLOCK];
        for block in par::ranges(task.len(), BLOCK) {
            let rows = task.start + block.start..task.start + block.end;
            let columns: Vec<&[f64]> = log_p.chunks_exact(n).map(|c| &c[rows.clone()]).collect();
            dispatch(Block {
                columns: &columns,
                bias: &all,
                sharpness,
                scratch: &mut scratch,
                sums: &mut sums,
            });
        }
        sums
    });
    let mut sums = vec![0.0; width];
    for part in parts {
        for (sum, x) in sums.iter_mut().zip(part) {
            *sum += x;
        }
    }
    if !sums[0].is_finite() {
        return Err(fault(log_p, n, bias));
    }
    for sum in &mut sums {
        *sum /= n as f64;
    }
    let mut products = vec![0.0; k * k];
    let mut upper = sums[1 + k..].iter();
    for i in 0..k {
        for (j, x) in (i..k).zip(upper.by_ref()) {
            products[i * k + j] = *x;
            products[j * k + i] = *x;
        }
    }
    Ok(Tilted {
        value: sums[0] / sharpness,
        rates: sums[1..=k].to_vec(),
        products,
    })
}

fn fault(log_p: &[f64], n: usize, bias: &[f64]) -> Error {
    let bad = |x: &f64| x.is_nan() || *x == f64::INFINITY;
    if let Some(index) = log_p.iter().position(bad) {
        return Error::NonFinite {
            arg: "log_p",
            index,
            found: log_p[index],
        };
    }
    if let Some(index) = bias.iter().position(|b| !b.is_finite()) {
        return Error::NonFinite {
            arg: "bias",
            index,
            found: bias[index],
        };
    }
    let empty = (0..n).find(|i| log_p.chunks_exact(n).all(|c| c[*i] == f64::NEG_INFINITY));
    Error::degenerate(
        "log_p",
        format!(
            "prompt {} has no outcome of positive probability",
            empty.unwrap_or(0)
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn columns(n: usize, k: usize) -> Vec<f64> {
        let mut state = 1u64;
        let mut next = || {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 40) as f64 / 2f64.powi(21) - 4.0
        };
        (0..n * (k + 1)).map(|_| next()).collect()
    }

    #[test]
    fn equals_the_definition_and_does_not_depend_on_threads() {
        let (n, bias, s) = (20_003, [0.7, -1.2, 0.1], 1.7);
        let mut log_p = columns(n, 3);
        log_p[n + 5] = f64::NEG_INFINITY;
        let mut rates = [0.0; 3];
        let mut products = [0.0; 9];
        let mut value = 0.0;
        for i in 0..n {
            let e: Vec<f64> = (0..4)
                .map(|j| (s * (log_p[j * n + i] + if j > 0 { bias[j - 1] } else { 0.0 })).exp())
                .collect();
            let d: f64 = e.iter().sum();
            value += d.ln() / s / n as f64;
            for a in 0..3 {
                rates[a] += e[a + 1] / d / n as f64;
                for b in 0..3 {
                    products[3 * a + b] += e[a + 1] * e[b + 1] / d / d / n as f64;
                }
            }
        }
        let got = tilted(&log_p, n, &bias, s).unwrap();
        assert!((got.value - value).abs() < 1e-12);
        for (a, b) in got
            .rates
            .iter()
            .zip(rates)
            .chain(got.products.iter().zip(products))
        {
            assert!((a - b).abs() < 1e-12);
        }
        let before = par::num_threads();
        par::set_num_threads(3);
        let other = tilted(&log_p, n, &bias, s).unwrap();
        par::set_num_threads(before);
        assert_eq!(got, other);
    }

    #[test]
    fn refuses_what_has_no_mean() {
        let neg = f64::NEG_INFINITY;
        assert!(matches!(
            tilted(&[0.0; 3], 2, &[0.0], 1.0),
            Err(Error::Shape { .. })
        ));
        assert!(matches!(
            tilted(&[0.0; 4], 2, &[0.0], 0.0),
            Err(Error::Value { .. })
        ));
        let nan = [0.0, 0.0, 0.0, f64::NAN];
        assert!(matches!(
            tilted(&nan, 2, &[0.0], 1.0),
            Err(Error::NonFinite { index: 3, .. })
        ));
        let empty = [0.0, neg, 0.0, neg];
        let Err(Error::Degenerate { reason, .. }) = tilted(&empty, 2, &[0.0], 1.0) else {
            panic!("a prompt without outcomes passed");
        };
        assert!(reason.contains("prompt 1"));
        assert!(tilted(&[0.0; 2], 1, &[f64::NAN], 1.0).is_err());
    }
}
