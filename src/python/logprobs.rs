//! Bindings of the token log-probabilities.

use super::array::Array;
use super::long::run_long;
use crate::element::{DType, Element, Real};
use crate::forget::logprobs;
use crate::simd::Exp;
use crate::{Error, with_dtype};
use numpy::{PyReadonlyArray1, PyReadwriteArray1};
use pyo3::prelude::*;

fn rows_of(arg: &'static str, logits: &Array<'_>) -> crate::Result<usize> {
    match logits.shape() {
        [.., _] if logits.shape().len() >= 2 => {
            Ok(logits.shape()[..logits.shape().len() - 1].iter().product())
        }
        found => Err(Error::shape(arg, "(..., vocab)", format!("{found:?}"))),
    }
}

/// Fills `out` with the log-probabilities of `labels` and `lse` with the rows' log-sum-exp.
#[pyfunction]
fn token_logprobs(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    labels: PyReadonlyArray1<'_, i64>,
    ignore_index: i64,
    mut out: PyReadwriteArray1<'_, f64>,
    mut lse: PyReadwriteArray1<'_, f64>,
) -> PyResult<()> {
    let logits = Array::extract(logits, "logits")?;
    rows_of("logits", &logits)?;
    let labels = labels.as_slice()?;
    let found = with_dtype!(logits.dtype(), T => {
        let rows = logits.rows::<T>()?;
        run_long(py, None, |cancel| logprobs::token_logprobs(&rows, labels, ignore_index, cancel))?
    });
    let (out, lse) = (out.as_slice_mut()?, lse.as_slice_mut()?);
    if out.len() != found.len() || lse.len() != found.len() {
        return Err(Error::shape("out, lse", found.len(), out.len()).into());
    }
    for ((o, l), (lp, s)) in out.iter_mut().zip(lse).zip(found) {
        (*o, *l) = (lp, s);
    }
    Ok(())
}

/// Fills `grad` with the gradient of `Σ upstream · logprobs` with respect to the logits.
#[pyfunction]
fn token_logprobs_backward(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    labels: PyReadonlyArray1<'_, i64>,
    lse: PyReadonlyArray1<'_, f64>,
    upstream: PyReadonlyArray1<'_, f64>,
    grad: &Bound<'_, PyAny>,
    ignore_index: i64,
) -> PyResult<()> {
    fn run<T: Element<Acc: Exp + Real>>(
        py: Python<'_>,
        logits: &Array<'_>,
        grad: &mut Array<'_>,
        (labels, lse, upstream): (&[i64], &[f64], &[f64]),
        ignore: i64,
    ) -> PyResult<()> {
        let (rows, grad) = (logits.rows::<T>()?, grad.rows_mut::<T>()?);
        Ok(py.detach(|| {
            logprobs::token_logprobs_backward(&rows, labels, lse, upstream, grad, ignore)
        })?)
    }
    let logits = Array::extract(logits, "logits")?;
    let mut grad = Array::extract(grad, "grad")?;
    rows_of("logits", &logits)?;
    grad.expect_shape(logits.shape())?;
    grad.expect_disjoint(&[&logits])?;
    let vectors = (labels.as_slice()?, lse.as_slice()?, upstream.as_slice()?);
    match logits.dtype() {
        DType::F64 => run::<f64>(py, &logits, &mut grad, vectors, ignore_index),
        DType::F32 => run::<f32>(py, &logits, &mut grad, vectors, ignore_index),
        DType::F16 => run::<half::f16>(py, &logits, &mut grad, vectors, ignore_index),
        DType::BF16 => run::<half::bf16>(py, &logits, &mut grad, vectors, ignore_index),
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(token_logprobs, m)?)?;
    m.add_function(wrap_pyfunction!(token_logprobs_backward, m)?)
}
