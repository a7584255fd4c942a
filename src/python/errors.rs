//! One Python exception per error variant. The classes live in `abjure.errors`, where users import them.

use crate::Error;
use pyo3::exceptions::PyKeyboardInterrupt;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;

static MODULE: PyOnceLock<Py<PyModule>> = PyOnceLock::new();

fn class<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyType>> {
    let module = MODULE.get_or_try_init(py, || py.import("abjure.errors").map(Bound::unbind))?;
    Ok(module.bind(py).getattr(name)?.cast_into::<PyType>()?)
}

impl From<Error> for PyErr {
    fn from(err: Error) -> PyErr {
        let name = match err {
            Error::Shape { .. } => "ShapeError",
            Error::DType { .. } => "DTypeError",
            Error::Layout { .. } => "LayoutError",
            Error::Value { .. } => "ArgumentError",
            Error::NonFinite { .. } => "NonFiniteError",
            Error::Degenerate { .. } => "DegenerateError",
            Error::Checkpoint { .. } => "CheckpointError",
            Error::Interrupted => return PyKeyboardInterrupt::new_err(()),
        };
        Python::attach(|py| match class(py, name) {
            Ok(class) => PyErr::from_type(class, err.to_string()),
            Err(import) => import,
        })
    }
}

/// The array lives where the kernels cannot read it.
pub fn device_error(py: Python<'_>, message: String) -> PyErr {
    match class(py, "DeviceError") {
        Ok(class) => PyErr::from_type(class, message),
        Err(import) => import,
    }
}
