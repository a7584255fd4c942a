//! Bindings of deletions from linear models.

use super::long::run_long;
use crate::Error;
use crate::cancel::Cancel;
use crate::protect::recourse::{Deletion, How, Kind, Loss};
use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;
use pyo3::types::PyDict;

type Vector<'py> = Bound<'py, PyArray1<f64>>;

/// A linear model, and what it would be without some of its records.
#[pyclass(name = "Deletion", module = "abjure._native", frozen)]
struct PyDeletion(Deletion);

fn how(name: &str) -> crate::Result<How> {
    match name {
        "influence" => Ok(How::Influence),
        "newton" => Ok(How::Newton),
        "refit" => Ok(How::Refit),
        _ => Err(Error::value(
            "method",
            "\"influence\", \"newton\" or \"refit\"",
            format!("{name:?}"),
        )),
    }
}

#[pymethods]
impl PyDeletion {
    #[new]
    fn new(
        py: Python<'_>,
        x: PyReadonlyArray2<'_, f64>,
        y: PyReadonlyArray1<'_, f64>,
        penalty: PyReadonlyArray1<'_, f64>,
        logistic: bool,
    ) -> PyResult<Self> {
        let loss = if logistic {
            Loss::Logistic
        } else {
            Loss::Squared
        };
        let (rows, width) = x.as_array().dim();
        if rows != y.as_array().len() || width != penalty.as_array().len() {
            let expected = format!(
                "{} rows of {} columns",
                y.as_array().len(),
                penalty.as_array().len()
            );
            return Err(Error::shape("x", expected, format!("({rows}, {width})")).into());
        }
        let x: Vec<f64> = x.as_array().iter().copied().collect();
        let y: Vec<f64> = y.as_array().iter().copied().collect();
        let penalty: Vec<f64> = penalty.as_array().iter().copied().collect();
        let fit = |cancel: &Cancel| Deletion::fit(x, y, penalty, loss, cancel);
        Ok(Self(run_long(py, None, fit)?))
    }

    #[getter]
    fn rows(&self) -> usize {
        self.0.rows()
    }

    #[getter]
    fn steps(&self) -> usize {
        self.0.steps()
    }

    #[getter]
    fn theta<'py>(&self, py: Python<'py>) -> Vector<'py> {
        PyArray1::from_slice(py, self.0.theta())
    }

    #[getter]
    fn leverages<'py>(&self, py: Python<'py>) -> Vector<'py> {
        PyArray1::from_vec(py, self.0.leverages())
    }

    /// What the deletion of each record alone adds to `q·θ`, to first order.
    fn effects<'py>(
        &self,
        py: Python<'py>,
        q: PyReadonlyArray1<'py, f64>,
    ) -> PyResult<Vector<'py>> {
        let q = q.as_slice()?;
        let found = py.detach(|| self.0.effects(q))?;
        Ok(PyArray1::from_vec(py, found))
    }

    /// θ without some records.
    fn without<'py>(
        &self,
        py: Python<'py>,
        records: Vec<usize>,
        method: &str,
    ) -> PyResult<Vector<'py>> {
        let how = how(method)?;
        let theta = run_long(py, None, |cancel| self.0.without(&records, how, cancel))?;
        Ok(PyArray1::from_vec(py, theta))
    }

    /// The at most `k` records whose deletion lowers `q·θ` most.
    fn worst(
        &self,
        py: Python<'_>,
        q: PyReadonlyArray1<'_, f64>,
        k: usize,
        corrected: bool,
    ) -> PyResult<Vec<usize>> {
        let q = q.as_slice()?;
        Ok(py.detach(|| self.0.worst(q, k, corrected))?)
    }

    /// As `worst`, one record after the other, each chosen for what is left.
    fn pursue(
        &self,
        py: Python<'_>,
        q: PyReadonlyArray1<'_, f64>,
        k: usize,
    ) -> PyResult<Vec<usize>> {
        let q = q.as_slice()?;
        run_long(py, None, |cancel| self.0.pursue(q, k, cancel))
    }

    /// The least `q·θ` after at most `k` deletions, and whose, by fitting again for every set.
    fn exhaust(
        &self,
        py: Python<'_>,
        q: PyReadonlyArray1<'_, f64>,
        k: usize,
        limit: usize,
    ) -> PyResult<(f64, Vec<usize>)> {
        let q = q.as_slice()?.to_vec();
        run_long(py, None, |cancel| self.0.exhaust(&q, k, limit, cancel))
    }

    /// Constants of the bounds for at most `k` deletions.
    fn constants<'py>(&self, py: Python<'py>, k: usize) -> PyResult<Bound<'py, PyDict>> {
        let found = py.detach(|| self.0.constants(k));
        let dict = PyDict::new(py);
        for (name, value) in [
            ("leverage", found.leverage),
            ("gradient", found.gradient),
            ("cross", found.cross),
            ("curved", found.curved),
            ("radius", found.radius),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    /// A lower bound of `q·θ` after any `k` deletions and its gradient in `q`; None where nothing is certain.
    fn bound<'py>(
        &self,
        py: Python<'py>,
        q: PyReadonlyArray1<'py, f64>,
        k: usize,
        convex: bool,
    ) -> PyResult<Option<(f64, Vector<'py>)>> {
        let q = q.as_slice()?;
        let kind = if convex { Kind::Convex } else { Kind::Local };
        let found = py.detach(|| self.0.bound(q, k, kind, &self.0.constants(k)))?;
        Ok(found.map(|(value, gradient)| (value, PyArray1::from_vec(py, gradient))))
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyDeletion>()
}
