//! Bindings of the direction kernels.

use super::array::Array;
use super::long::run_long;
use crate::cancel::Cancel;
use crate::linalg::{Orthonormal, orthonormalize};
use crate::moments::{Moments, NonFinitePolicy};
use crate::refuse::directions::probe;
use crate::refuse::directions::{Edit, NormPreserving, check_finite, orthogonalize_columns};
use crate::{Error, Result, with_dtype};
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

type Matrix<'py> = Bound<'py, PyArray2<f64>>;

fn vector(v: &PyReadonlyArray1<'_, f64>, arg: &'static str, width: usize) -> Result<Vec<f64>> {
    let v = v.as_array().to_vec();
    if v.len() != width {
        return Err(Error::shape(
            arg,
            format!("({width},)"),
            format!("({},)", v.len()),
        ));
    }
    match v.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(Error::NonFinite {
            arg,
            index,
            found: v[index],
        }),
        None => Ok(v),
    }
}

/// Orthonormal rows (rank, d) that span the rows of `vectors` (k, d).
#[pyfunction]
fn orthonormal<'py>(py: Python<'py>, vectors: PyReadonlyArray2<'py, f64>) -> PyResult<Matrix<'py>> {
    let v = vectors.as_array();
    let (count, width) = v.dim();
    let flat: Vec<f64> = v.iter().copied().collect();
    let basis = py.detach(|| orthonormalize("q", &flat, count, width))?;
    PyArray1::from_vec(py, basis.rows).reshape([basis.rank, width])
}

/// An edit of rows, its vectors prepared once: `x − scale Σ (x·left_i − origin·left_i) right_i + shift`.
#[pyclass(name = "Edit", module = "abjure._native", frozen)]
struct PyEdit(Edit);

#[pymethods]
impl PyEdit {
    #[new]
    #[pyo3(signature = (width, left=None, *, right=None, origin=None, scale=1.0, shift=None, keep_norm=false))]
    fn new(
        width: usize,
        left: Option<PyReadonlyArray2<'_, f64>>,
        right: Option<PyReadonlyArray2<'_, f64>>,
        origin: Option<PyReadonlyArray1<'_, f64>>,
        scale: f64,
        shift: Option<PyReadonlyArray1<'_, f64>>,
        keep_norm: bool,
    ) -> PyResult<Self> {
        if !scale.is_finite() {
            return Err(Error::value("scale", "a finite number", scale).into());
        }
        let mut edit = Edit::new(width).scaled(scale).keeping_norm(keep_norm);
        if let Some(left) = left {
            let (rank, found) = left.as_array().dim();
            if found != width {
                return Err(Error::shape("q", format!("vectors of {width}"), found).into());
            }
            edit = edit.along(left.as_array().iter().copied().collect());
            if let Some(right) = right {
                if right.as_array().dim() != (rank, width) {
                    let found = format!("{:?}", right.as_array().dim());
                    return Err(Error::shape("right", format!("({rank}, {width})"), found).into());
                }
                edit = edit.onto(right.as_array().iter().copied().collect());
            }
        }
        if let Some(origin) = origin {
            edit = edit.from_origin(&vector(&origin, "origin", width)?);
        }
        if let Some(shift) = shift {
            edit = edit.shifted(vector(&shift, "v", width)?);
        }
        Ok(Self(edit))
    }

    #[getter]
    fn width(&self) -> usize {
        self.0.width()
    }

    #[getter]
    fn rank(&self) -> usize {
        self.0.rank()
    }

    /// Edits the rows of `x` in place.
    fn apply_(&self, py: Python<'_>, x: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut x = Array::extract(x, "x")?;
        with_dtype!(x.dtype(), T => {
            let rows = x.rows_mut::<T>()?;
            Ok(py.detach(|| self.0.apply(rows))?)
        })
    }

    /// Writes the edited rows of `x` to `out`.
    fn apply(&self, py: Python<'_>, x: &Bound<'_, PyAny>, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let (x, mut out) = (Array::extract(x, "x")?, Array::extract(out, "out")?);
        out.expect_shape(x.shape())?;
        out.expect_disjoint(&[&x])?;
        with_dtype!(x.dtype(), T => {
            let (x, out) = (x.rows::<T>()?, out.rows_mut::<T>()?);
            Ok(py.detach(|| self.0.apply_to(&x, out))?)
        })
    }

    /// Writes `x·left_i − origin·left_i` to `out`, (rows, rank) in the arithmetic type of `x`.
    fn coefficients(
        &self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        out: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (x, mut out) = (Array::extract(x, "x")?, Array::extract(out, "out")?);
        with_dtype!(x.dtype(), T => {
            let (x, out) = (x.rows::<T>()?, out.flat_mut()?);
            Ok(py.detach(|| self.0.coefficients(&x, out))?)
        })
    }
}

pub fn norm_preserving(name: Option<&str>) -> Result<NormPreserving> {
    match name {
        None => Ok(NormPreserving::No),
        Some("in") => Ok(NormPreserving::In),
        Some("row") => Ok(NormPreserving::Row),
        Some("row_pre") => Ok(NormPreserving::RowPre),
        Some(other) => Err(Error::value(
            "norm_preserving",
            "None, \"in\", \"row\" or \"row_pre\"",
            format!("{other:?}"),
        )),
    }
}

/// Projects the columns of `weight` (d, in) off orthonormal rows `q` (rank, d), in place. Returns the Frobenius norm of
/// `q @ weight` before and after, and how many lengths could not be restored.
#[pyfunction]
fn orthogonalize_leading(
    py: Python<'_>,
    weight: &Bound<'_, PyAny>,
    q: PyReadonlyArray2<'_, f64>,
    scale: f64,
    keep: Option<&str>,
) -> PyResult<(f64, f64, usize)> {
    let mut weight = Array::extract(weight, "weight")?;
    let (keep, (rank, width)) = (norm_preserving(keep)?, q.as_array().dim());
    let rows = q.as_array().iter().copied().collect();
    let q = Orthonormal { width, rank, rows };
    with_dtype!(weight.dtype(), T => {
        let w = weight.rows_mut::<T>()?;
        let r = py.detach(|| orthogonalize_columns(w, &q, scale, keep))?;
        Ok((r.before, r.after, r.vanished))
    })
}

/// Raises unless `weight` is an array that kernels take and all of it is finite.
#[pyfunction]
fn check_weight(py: Python<'_>, weight: &Bound<'_, PyAny>) -> PyResult<()> {
    let weight = Array::extract(weight, "weight")?;
    with_dtype!(weight.dtype(), T => {
        let rows = weight.rows::<T>()?;
        Ok(py.detach(|| check_finite("weight", &rows))?)
    })
}

/// Streaming moments of rows.
#[pyclass(name = "Moments", module = "abjure._native")]
struct PyMoments(Moments);

#[pymethods]
impl PyMoments {
    #[new]
    #[pyo3(signature = (width, second=false))]
    fn new(width: usize, second: bool) -> Self {
        Self(Moments::new(width, second))
    }

    /// Moments from a weight, a mean (d,) and second moments (d, d) about it.
    #[staticmethod]
    #[pyo3(signature = (weight, mean, second=None))]
    fn from_parts(
        weight: f64,
        mean: PyReadonlyArray1<'_, f64>,
        second: Option<PyReadonlyArray2<'_, f64>>,
    ) -> PyResult<Self> {
        let mean = mean.as_array().to_vec();
        let second = second.map(|s| s.as_array().iter().copied().collect());
        Ok(Self(Moments::from_parts(weight, mean, second)?))
    }

    #[getter]
    fn width(&self) -> usize {
        self.0.width()
    }

    #[getter]
    fn weight(&self) -> f64 {
        self.0.weight()
    }

    #[getter]
    fn mean<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f64>> {
        PyArray1::from_slice(py, self.0.mean())
    }

    #[getter]
    fn second<'py>(&self, py: Python<'py>) -> PyResult<Option<Matrix<'py>>> {
        let d = self.0.width();
        let second = py.detach(|| self.0.second());
        second
            .map(|s| PyArray1::from_vec(py, s).reshape([d, d]))
            .transpose()
    }

    /// Adds rows; returns how many were skipped as non-finite.
    fn update(
        &mut self,
        py: Python<'_>,
        x: &Bound<'_, PyAny>,
        weights: Option<PyReadonlyArray1<'_, f64>>,
        skip: bool,
    ) -> PyResult<u64> {
        let x = Array::extract(x, "x")?;
        let weights = weights.map(|w| w.as_array().to_vec());
        let policy = if skip {
            NonFinitePolicy::Skip
        } else {
            NonFinitePolicy::Error
        };
        with_dtype!(x.dtype(), T => {
            let rows = x.rows::<T>()?;
            let moments = &mut self.0;
            if !moments.has_second() {
                return Ok(py.detach(|| moments.update(&rows, weights.as_deref(), policy, &Cancel::new()))?);
            }
            run_long(py, None, |cancel| moments.update(&rows, weights.as_deref(), policy, cancel))
        })
    }

    fn merge(&mut self, other: &Self) -> PyResult<()> {
        Ok(self.0.merge(&other.0)?)
    }

    fn copy(&self) -> Self {
        Self(self.0.clone())
    }
}

/// Weights, intercept, loss, gradient norm, decrement, iterations, converged.
type Probe<'py> = (Bound<'py, PyArray1<f64>>, f64, f64, f64, f64, usize, bool);

/// Probes of `y` (±1) on the rows of `x`, for each strength one per fold (the rows that `fold` numbers otherwise), or
/// one of all rows without `fold`; with it, also the held-out decisions, (strengths, rows).
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn probe_fit<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    y: PyReadonlyArray1<'py, f64>,
    strengths: Vec<f64>,
    squared: bool,
    balanced: bool,
    tol: f64,
    max_iter: usize,
    fold: Option<PyReadonlyArray1<'py, i64>>,
) -> PyResult<(Vec<Vec<Probe<'py>>>, Option<Matrix<'py>>)> {
    let x = Array::extract(x, "x")?;
    let y = y.as_array().to_vec();
    let fold = fold.map(|f| f.as_array().to_vec());
    let options = probe::Options {
        loss: if squared {
            probe::Loss::Squared
        } else {
            probe::Loss::Logistic
        },
        balanced,
        tol,
        max_iter,
    };
    let count = strengths.len();
    let (fits, held) = with_dtype!(x.dtype(), T => {
        let rows = x.rows::<T>()?;
        run_long(py, None, |cancel| match &fold {
            None => {
                let all = vec![(0..rows.rows() as u32).collect()];
                Ok((probe::fit(&rows, &y, &strengths, &all, &options, cancel)?, None))
            }
            Some(fold) => {
                let (fits, held) = probe::cross_validate(&rows, &y, &strengths, fold, &options, cancel)?;
                Ok((fits, Some(held)))
            }
        })?
    });
    let wrap = |f: probe::Fit| {
        let coef = PyArray1::from_vec(py, f.coef);
        (
            coef,
            f.intercept,
            f.loss,
            f.gradient,
            f.decrement,
            f.iterations,
            f.converged,
        )
    };
    let fits = (fits.into_iter())
        .map(|line| line.into_iter().map(wrap).collect())
        .collect();
    let held = held
        .map(|h| PyArray1::from_vec(py, h).reshape([count, y.len()]))
        .transpose()?;
    Ok((fits, held))
}

/// `x_i·coef + intercept` of every row.
#[pyfunction]
fn probe_decision<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    coef: PyReadonlyArray1<'py, f64>,
    intercept: f64,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let x = Array::extract(x, "x")?;
    let coef = coef.as_array().to_vec();
    let found = with_dtype!(x.dtype(), T => {
        let rows = x.rows::<T>()?;
        py.detach(|| probe::decision(&rows, &coef, intercept))?
    });
    Ok(PyArray1::from_vec(py, found))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyEdit>()?;
    m.add_class::<PyMoments>()?;
    m.add_function(wrap_pyfunction!(probe_fit, m)?)?;
    m.add_function(wrap_pyfunction!(probe_decision, m)?)?;
    m.add_function(wrap_pyfunction!(orthonormal, m)?)?;
    m.add_function(wrap_pyfunction!(check_weight, m)?)?;
    m.add_function(wrap_pyfunction!(orthogonalize_leading, m)?)
}
