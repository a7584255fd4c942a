//! Threads, instruction set, and the intake as Python sees it.

use super::array::Array;
use super::long;
use crate::{Error, par, simd, stream};
use pyo3::prelude::*;

/// Number of threads the kernels use.
#[pyfunction]
fn get_num_threads() -> usize {
    par::num_threads()
}

/// Sets the number of threads for kernels that start from now on.
#[pyfunction]
fn set_num_threads(n: i64) -> PyResult<()> {
    match usize::try_from(n) {
        Ok(n) if n > 0 => par::set_num_threads(n),
        _ => return Err(Error::value("n", "a positive number of threads", n).into()),
    }
    Ok(())
}

/// Instruction set in use and the best one of this CPU.
#[pyfunction]
fn simd_level() -> (&'static str, &'static str) {
    (simd::level().name(), simd::detected().name())
}

/// Uses a lower instruction set than the CPU has; returns what is now in use.
#[pyfunction]
fn set_simd_level(name: &str) -> PyResult<&'static str> {
    let level = simd::Level::parse(name)
        .ok_or_else(|| Error::value("name", "\"baseline\", \"avx2\" or \"avx512\"", name))?;
    Ok(simd::set_level(level).name())
}

/// Address, dtype, shape, strides, writable.
type Description = (usize, &'static str, Vec<usize>, Vec<isize>, bool);

/// How the intake sees an array: address, dtype, shape, strides in elements, writable.
#[pyfunction]
fn describe(x: &Bound<'_, PyAny>) -> PyResult<Description> {
    let a = Array::extract(x, "x")?;
    Ok((
        a.address(),
        a.dtype().name(),
        a.shape().to_vec(),
        a.strides().to_vec(),
        a.writable(),
    ))
}

/// Waits in a kernel for `seconds`, honouring Ctrl-C: what the test of interruption calls.
#[pyfunction]
#[pyo3(signature = (seconds, progress=None))]
fn _spin(py: Python<'_>, seconds: f64, progress: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
    long::run_long(py, progress, |cancel| long::spin(cancel, seconds))
}

/// `b = a`, for measuring the machine's copy bandwidth.
#[pyfunction]
fn _copy(py: Python<'_>, a: &Bound<'_, PyAny>, b: &Bound<'_, PyAny>) -> PyResult<()> {
    let (a, mut b) = (Array::extract(a, "a")?, Array::extract(b, "b")?);
    b.expect_shape(a.shape())?;
    b.expect_disjoint(&[&a])?;
    let (a, b) = (a.flat::<f32>()?, b.flat_mut::<f32>()?);
    py.detach(|| stream::copy(a, b));
    Ok(())
}

/// `c = a + 3 b`, for measuring the machine's triad bandwidth.
#[pyfunction]
fn _triad(
    py: Python<'_>,
    a: &Bound<'_, PyAny>,
    b: &Bound<'_, PyAny>,
    c: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (a, b) = (Array::extract(a, "a")?, Array::extract(b, "b")?);
    let mut c = Array::extract(c, "c")?;
    b.expect_shape(a.shape())?;
    c.expect_shape(a.shape())?;
    c.expect_disjoint(&[&a, &b])?;
    let (a, b, c) = (a.flat::<f32>()?, b.flat::<f32>()?, c.flat_mut::<f32>()?);
    py.detach(|| stream::triad(a, b, c));
    Ok(())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(get_num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(set_num_threads, m)?)?;
    m.add_function(wrap_pyfunction!(simd_level, m)?)?;
    m.add_function(wrap_pyfunction!(set_simd_level, m)?)?;
    m.add_function(wrap_pyfunction!(describe, m)?)?;
    m.add_function(wrap_pyfunction!(_copy, m)?)?;
    m.add_function(wrap_pyfunction!(_triad, m)?)?;
    m.add_function(wrap_pyfunction!(_spin, m)?)
}
