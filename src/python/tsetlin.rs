//! Bindings of the Tsetlin Machine.

use super::long::run_long;
use super::text::item;
use crate::Error;
use crate::measure::text::logistic::Sparse;
use crate::measure::text::tsetlin::{Literals, Machine, Options};
use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyDict;

type Vector<'py, T> = Bound<'py, PyArray1<T>>;

/// Examples as bits, packed.
#[pyclass(frozen, module = "abjure._native")]
struct TsetlinRows(Literals);

#[pymethods]
impl TsetlinRows {
    /// Rows of bytes: 1 where the byte is not 0.
    #[staticmethod]
    fn dense(py: Python<'_>, x: PyReadonlyArray2<'_, u8>, negations: bool) -> PyResult<Self> {
        let (rows, features) = (x.shape()[0], x.shape()[1]);
        let x = x.as_slice()?;
        Ok(Self(py.detach(|| {
            Literals::new(rows, features, negations, |i, mark| {
                let row = &x[i * features..(i + 1) * features];
                (0..features).filter(|j| row[*j] != 0).for_each(mark);
            })
        })))
    }

    /// Sparse rows: 1 where a value is stored.
    #[staticmethod]
    fn sparse(
        py: Python<'_>,
        indptr: PyReadonlyArray1<'_, i64>,
        indices: PyReadonlyArray1<'_, i32>,
        data: PyReadonlyArray1<'_, f64>,
        features: usize,
        negations: bool,
    ) -> PyResult<Self> {
        let (indptr, indices) = (indptr.as_slice()?, indices.as_slice()?);
        let x = Sparse {
            indptr,
            indices,
            data: data.as_slice()?,
            columns: features,
        };
        x.check()?;
        Ok(Self(py.detach(|| {
            Literals::new(x.rows(), features, negations, |i, mark| {
                let row = &indices[indptr[i] as usize..indptr[i + 1] as usize];
                row.iter().for_each(|j| mark(*j as usize));
            })
        })))
    }

    #[getter]
    fn rows(&self) -> usize {
        self.0.rows()
    }
}

fn options(o: &Bound<'_, PyDict>) -> PyResult<Options> {
    let max_literals: Option<usize> = item(o, "max_literals")?;
    Ok(Options {
        classes: item(o, "classes")?,
        features: item(o, "features")?,
        clauses: item(o, "clauses")?,
        threshold: item(o, "threshold")?,
        s: item(o, "s")?,
        boost: item(o, "boost")?,
        negations: item(o, "negations")?,
        weighted: item(o, "weighted")?,
        max_literals: max_literals.unwrap_or(usize::MAX),
        state_bits: item(o, "state_bits")?,
        shuffle: item(o, "shuffle")?,
        seed: item(o, "seed")?,
    })
}

/// A Tsetlin Machine.
#[pyclass(module = "abjure._native")]
struct TsetlinBank(Machine);

#[pymethods]
impl TsetlinBank {
    #[new]
    #[pyo3(signature = (options, states=None, weights=None, epochs=0))]
    fn new(
        options: &Bound<'_, PyDict>,
        states: Option<PyReadonlyArray1<'_, u8>>,
        weights: Option<PyReadonlyArray1<'_, u32>>,
        epochs: u64,
    ) -> PyResult<Self> {
        let options = self::options(options)?;
        Ok(Self(match (states, weights) {
            (Some(s), Some(w)) => Machine::restore(options, s.as_slice()?, w.as_slice()?, epochs)?,
            (None, None) => Machine::new(options)?,
            _ => {
                return Err(Error::value(
                    "states",
                    "states and weights, or neither",
                    "one of them",
                )
                .into());
            }
        }))
    }

    #[getter]
    fn epochs(&self) -> u64 {
        self.0.epochs()
    }

    fn learn(
        &mut self,
        py: Python<'_>,
        x: &TsetlinRows,
        y: PyReadonlyArray1<'_, u32>,
        epochs: usize,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let y = y.as_slice()?;
        let machine = &mut self.0;
        run_long(py, progress, |cancel| {
            machine.learn(&x.0, y, epochs, cancel)
        })
    }

    /// Votes, flat by row.
    fn votes<'py>(
        &self,
        py: Python<'py>,
        x: &TsetlinRows,
        clip: bool,
    ) -> PyResult<Vector<'py, i64>> {
        let votes = py.detach(|| self.0.votes(&x.0, clip))?;
        Ok(PyArray1::from_vec(py, votes))
    }

    /// Class, weight and literals of each clause that votes.
    fn rules(&self, py: Python<'_>) -> Vec<(usize, i64, Vec<u32>)> {
        let rules = py.detach(|| self.0.rules());
        rules
            .into_iter()
            .map(|r| (r.class, r.weight, r.literals))
            .collect()
    }

    /// States, flat by class, clause and literal, and weights.
    fn states<'py>(&self, py: Python<'py>) -> (Vector<'py, u8>, Vector<'py, u32>) {
        let (states, weights) = py.detach(|| self.0.states());
        (
            PyArray1::from_vec(py, states),
            PyArray1::from_vec(py, weights),
        )
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<TsetlinRows>()?;
    m.add_class::<TsetlinBank>()
}
