//! Bindings of the counts of routed experts.

use super::array::Array;
use crate::refuse::experts::{Routing, Selections, count_selections};
use crate::{Error, with_dtype};
use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

type Tables<'py> = (
    Bound<'py, PyArray1<u64>>,
    Bound<'py, PyArray1<u64>>,
    Option<Bound<'py, PyArray1<f64>>>,
);

/// Tokens of each prompt, and flat (prompts, experts) tables of how often each expert was chosen and of its weights.
#[pyfunction]
fn count_experts<'py>(
    py: Python<'py>,
    topk_ids: PyReadonlyArray2<'py, i64>,
    weights: Option<&Bound<'py, PyAny>>,
    owners: Option<PyReadonlyArray1<'py, i64>>,
    prompts: usize,
    experts: usize,
) -> PyResult<Tables<'py>> {
    let (shape, ids) = (topk_ids.shape().to_vec(), topk_ids.as_slice()?);
    let (k, weighted) = (shape[1], weights.is_some());
    let owners = owners.as_ref().map(|p| p.as_slice()).transpose()?;
    let found: Selections = match weights {
        None => py.detach(|| {
            let routing: Routing<'_, f64> = Routing {
                ids,
                k,
                weights: None,
                prompts: owners,
            };
            count_selections(routing, prompts, experts)
        })?,
        Some(weights) => {
            let array = Array::extract(weights, "weights")?;
            if array.shape() != shape {
                let found = format!("{:?}", array.shape());
                return Err(Error::shape("weights", format!("shape {shape:?}"), found).into());
            }
            with_dtype!(array.dtype(), T => {
                let flat = array.flat::<T>()?;
                py.detach(|| {
                    let routing = Routing { ids, k, weights: Some(flat), prompts: owners };
                    count_selections(routing, prompts, experts)
                })?
            })
        }
    };
    Ok((
        PyArray1::from_vec(py, found.tokens),
        PyArray1::from_vec(py, found.counts),
        weighted.then(|| PyArray1::from_vec(py, found.weights)),
    ))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(count_experts, m)?)
}
