//! Bindings of calibration: decimals, and what biases do to many prompts.

use crate::refuse::decoding::{Margin, tilted};
use crate::{Error, Result};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

type Values<'py> = PyReadonlyArray1<'py, f64>;
type Moments<'py> = (f64, Bound<'py, PyArray1<f64>>, Bound<'py, PyArray1<f64>>);

fn slice<'a>(a: &'a Values<'_>, arg: &'static str) -> Result<&'a [f64]> {
    a.as_slice()
        .map_err(|_| Error::layout(arg, "the array must be C-contiguous"))
}

/// Mean log-partition, mean rates and mean products (K × K, flat) of `n` prompts under `bias`.
#[pyfunction]
#[pyo3(name = "tilted")]
fn tilted_moments<'py>(
    py: Python<'py>,
    log_p: Values<'py>,
    n: usize,
    bias: Values<'py>,
    sharpness: f64,
) -> PyResult<Moments<'py>> {
    let (log_p, bias) = (slice(&log_p, "log_p")?, slice(&bias, "bias")?);
    let found = py.detach(|| tilted(log_p, n, bias, sharpness))?;
    Ok((
        found.value,
        found.rates.into_pyarray(py),
        found.products.into_pyarray(py),
    ))
}

/// The nearest double of a margin's text, which must be exact as a decimal of 28 digits.
#[pyfunction]
fn margin_value(text: &str) -> PyResult<f64> {
    Ok(text.parse::<Margin>()?.nearest())
}

/// The exact sum of two margins, as text.
#[pyfunction]
fn margin_sum(a: &str, b: &str) -> PyResult<String> {
    Ok(a.parse::<Margin>()?.plus(b.parse()?)?.to_string())
}

/// The shortest decimal in (low, high], None if none of at most 28 decimals lies there.
#[pyfunction]
fn shortest_margin(low: f64, high: f64) -> Option<String> {
    Margin::shortest(low, high).map(|m| m.to_string())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(tilted_moments, m)?)?;
    m.add_function(wrap_pyfunction!(margin_value, m)?)?;
    m.add_function(wrap_pyfunction!(margin_sum, m)?)?;
    m.add_function(wrap_pyfunction!(shortest_margin, m)?)
}
