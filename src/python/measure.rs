//! Bindings of the measure wing.

use super::array::Array;
use super::long::run_long;
use crate::element::Element;
use crate::measure::cross::{self, Dependence};
use crate::measure::decimal::{self, Rounding};
use crate::measure::hsic::{Of, dependence};
use crate::measure::overlap::{self, Words};
use crate::measure::resample::{self, Stratum};
use crate::view::Rows;
use crate::{Error, with_dtype};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use rust_decimal::Decimal;

fn rounding(name: &str) -> crate::Result<Rounding> {
    match name {
        "half_up" => Ok(Rounding::HalfUp),
        "half_even" => Ok(Rounding::HalfEven),
        _ => Err(Error::value(
            "rounding",
            "\"half_up\" or \"half_even\"",
            format!("{name:?}"),
        )),
    }
}

/// `scale · k / n` as a decimal with `digits` places.
#[pyfunction]
fn decimal_ratio(k: i128, n: u64, scale: u32, digits: u32, rounding: &str) -> PyResult<Decimal> {
    let rule = self::rounding(rounding)?;
    Ok(decimal::ratio(k, n, scale, digits, rule)?)
}

/// `scale · (first − second)` of two ratios as a decimal with `digits` places.
#[pyfunction]
fn decimal_difference(
    first: (u64, u64),
    second: (u64, u64),
    scale: u32,
    digits: u32,
    rounding: &str,
) -> PyResult<Decimal> {
    let rule = self::rounding(rounding)?;
    Ok(decimal::difference(first, second, scale, digits, rule)?)
}

/// Shares in percent that add up to 100.
#[pyfunction]
fn decimal_shares(counts: Vec<u64>, digits: u32) -> PyResult<Vec<Decimal>> {
    Ok(decimal::shares(&counts, digits)?)
}

/// -1, 0 or 1 as `k / n` is below, at or above the limit.
#[pyfunction]
fn decimal_compare(k: u64, n: u64, limit: Decimal) -> PyResult<i8> {
    Ok(decimal::compare(k, n, limit)? as i8)
}

/// Words in the longest common subsequence of each pair, in the candidate and in the reference.
#[pyfunction]
fn text_overlaps(
    py: Python<'_>,
    candidates: Vec<String>,
    references: Vec<String>,
    unicode: bool,
) -> PyResult<Vec<(usize, usize, usize)>> {
    if candidates.len() != references.len() {
        let expected = format!("{} texts, one per candidate", candidates.len());
        return Err(Error::shape("references", expected, references.len()).into());
    }
    let words = if unicode {
        Words::Unicode
    } else {
        Words::Ascii
    };
    let found = py.detach(|| {
        let texts = candidates.iter().zip(&references);
        let pairs = texts.map(|(a, b)| (a.as_str(), b.as_str())).collect();
        overlap::overlaps(pairs, words)
    });
    Ok(found
        .into_iter()
        .map(|o| (o.common, o.candidate, o.reference))
        .collect())
}

/// Sums of values and of weights, by replicate and stratum, as one flat array of pairs.
#[pyfunction]
#[pyo3(signature = (values, weights, resamples, seed, progress=None))]
fn bootstrap_sums<'py>(
    py: Python<'py>,
    values: Vec<PyReadonlyArray1<'py, f64>>,
    weights: Vec<Option<PyReadonlyArray1<'py, f64>>>,
    resamples: usize,
    seed: u64,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    if weights.len() != values.len() {
        let expected = format!("{} columns, one per stratum", values.len());
        return Err(Error::shape("weights", expected, weights.len()).into());
    }
    let mut strata = Vec::with_capacity(values.len());
    for (v, w) in values.iter().zip(&weights) {
        let w = w.as_ref().map(|w| w.as_slice()).transpose()?;
        strata.push(Stratum::new(v.as_slice()?, w)?);
    }
    let found = run_long(py, progress, |cancel| {
        resample::bootstrap(&strata, resamples, seed, cancel)
    })?;
    let flat = found.iter().flat_map(|s| [s.value, s.weight]).collect();
    Ok(PyArray1::from_vec(py, flat))
}

fn matrix<'a, T: Element>(array: &'a Array<'_>, arg: &'static str) -> crate::Result<Rows<'a, T>> {
    if array.shape().len() != 2 {
        let found = format!("shape {:?}", array.shape());
        return Err(Error::shape(arg, "a matrix of rows × features", found));
    }
    array.rows::<T>()
}

fn terms(d: Dependence) -> (f64, f64, f64) {
    (d.xy, d.xx, d.yy)
}

/// HSIC of x and y, of x and x, and of y and y, up to one factor; a negative γ asks for the linear kernel.
#[pyfunction]
#[pyo3(signature = (x, y, gamma_x, gamma_y, unbiased, progress=None))]
fn hsic(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: &Bound<'_, PyAny>,
    gamma_x: f64,
    gamma_y: f64,
    unbiased: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<(f64, f64, f64)> {
    let (x, y) = (Array::extract(x, "x")?, Array::extract(y, "y")?);
    let kernel = |gamma: f64| {
        if gamma < 0.0 {
            Of::Linear
        } else {
            Of::Rbf { gamma }
        }
    };
    let of = (kernel(gamma_x), kernel(gamma_y));
    let found = with_dtype!(x.dtype(), T => {
        let (x, y) = (matrix::<T>(&x, "x")?, matrix::<T>(&y, "y")?);
        run_long(py, progress, |cancel| dependence(&x, &y, of, unbiased, cancel))?
    });
    Ok(terms(found))
}

/// Streaming cross-moments of two representations.
#[pyclass(name = "CrossMoments", module = "abjure._native")]
struct PyCrossMoments(cross::CrossMoments);

#[pymethods]
impl PyCrossMoments {
    #[new]
    fn new(p: usize, q: usize) -> Self {
        Self(cross::CrossMoments::new(p, q))
    }

    /// Adds rows of both.
    #[pyo3(signature = (x, y, progress=None))]
    fn update(
        &mut self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        y: &Bound<'_, PyAny>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (x, y) = (Array::extract(x, "x")?, Array::extract(y, "y")?);
        let moments = &mut self.0;
        with_dtype!(x.dtype(), T => {
            let (x, y) = (matrix::<T>(&x, "x")?, matrix::<T>(&y, "y")?);
            run_long(py, progress, |cancel| moments.update(&x, &y, cancel))
        })
    }

    #[getter]
    fn rows(&self) -> usize {
        self.0.rows()
    }

    #[getter]
    fn widths(&self) -> (usize, usize) {
        self.0.widths()
    }

    /// HSIC of x and y, of x and x, and of y and y, with linear kernels, up to one factor.
    fn dependence(&self, py: Python<'_>, unbiased: bool) -> PyResult<(f64, f64, f64)> {
        Ok(terms(py.detach(|| self.0.dependence(unbiased))?))
    }

    /// Flat `Σ x xᵀ`, `Σ y xᵀ` and `Σ y yᵀ` about the means.
    #[expect(clippy::type_complexity)]
    fn matrices<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(
        Bound<'py, PyArray1<f64>>,
        Bound<'py, PyArray1<f64>>,
        Bound<'py, PyArray1<f64>>,
    )> {
        let [xx, yx, yy] = py.detach(|| self.0.matrices())?;
        let array = |v| PyArray1::from_vec(py, v);
        Ok((array(xx), array(yx), array(yy)))
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(decimal_ratio, m)?)?;
    m.add_function(wrap_pyfunction!(decimal_difference, m)?)?;
    m.add_function(wrap_pyfunction!(decimal_shares, m)?)?;
    m.add_function(wrap_pyfunction!(decimal_compare, m)?)?;
    m.add_function(wrap_pyfunction!(text_overlaps, m)?)?;
    m.add_function(wrap_pyfunction!(bootstrap_sums, m)?)?;
    m.add_function(wrap_pyfunction!(hsic, m)?)?;
    m.add_class::<PyCrossMoments>()
}
