//! Bindings of the scan over permitted records.

use super::array::Array;
use super::long::run_long;
use crate::element::Element;
use crate::forget::permitted::{self as kernel, narrowed};
use crate::view::Rows;
use crate::{Error, with_dtype};
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;

fn matrix<'a, T: Element>(array: &'a Array<'_>) -> crate::Result<Rows<'a, T>> {
    if array.shape().len() != 2 {
        let found = format!("shape {:?}", array.shape());
        return Err(Error::shape("rows", "a matrix of records × width", found));
    }
    array.rows::<T>()
}

/// Rows and their scores.
type Hits<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f64>>);

/// Rows and scores of the best permitted records, one query after the other, as many for each.
#[pyfunction]
#[pyo3(signature = (rows, queries, permitted, k, scale=None, progress=None))]
fn permitted_top_k<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyAny>,
    queries: PyReadonlyArray1<'py, f64>,
    permitted: PyReadonlyArray1<'py, u32>,
    k: usize,
    scale: Option<PyReadonlyArray1<'py, f64>>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Hits<'py>> {
    let rows = Array::extract(rows, "rows")?;
    let (queries, permitted) = (queries.as_slice()?, permitted.as_slice()?);
    let scale = scale.as_ref().map(|s| s.as_slice()).transpose()?;
    let found = with_dtype!(rows.dtype(), T => {
        let rows = matrix::<T>(&rows)?;
        let queries = narrowed::<<T as Element>::Acc>(queries);
        run_long(py, progress, |cancel| kernel::top_k(&rows, &queries, scale, permitted, k, cancel))?
    });
    let ids = found.iter().flatten().map(|h| i64::from(h.row)).collect();
    let scores = found.iter().flatten().map(|h| h.score).collect();
    Ok((PyArray1::from_vec(py, ids), PyArray1::from_vec(py, scores)))
}

/// One over the length of each row, 0 for rows of zeros.
#[pyfunction]
fn inverse_lengths<'py>(
    py: Python<'py>,
    rows: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let rows = Array::extract(rows, "rows")?;
    let found = with_dtype!(rows.dtype(), T => {
        let rows = matrix::<T>(&rows)?;
        py.detach(|| kernel::inverse_lengths(&rows))?
    });
    Ok(PyArray1::from_vec(py, found))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(permitted_top_k, m)?)?;
    m.add_function(wrap_pyfunction!(inverse_lengths, m)?)
}
