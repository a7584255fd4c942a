//! Bindings of the forget wing.

use super::array::Array;
use crate::element::{DType, Element};
use crate::forget::dampen::{self as kernel, Mode, Patch, RuleSpec, Selection};
use crate::forget::fisher;
use crate::{Error, Result, with_dtype};
use half::{bf16, f16};
use pyo3::prelude::*;

/// Runs `$body` with `$I` bound to the type of an array of importances or of their sums.
macro_rules! with_importance {
    ($array:expr, $arg:literal, $I:ident => $body:expr) => {
        match $array.dtype() {
            DType::F32 => {
                type $I = f32;
                $body
            }
            DType::F64 => {
                type $I = f64;
                $body
            }
            found => Err(Error::DType {
                arg: $arg,
                expected: "float32 or float64".into(),
                found: found.name().into(),
            }),
        }
    };
}

/// A [`Patch`] of any element type.
enum AnyPatch {
    F64(Patch<f64>),
    F32(Patch<f32>),
    F16(Patch<f16>),
    BF16(Patch<bf16>),
}

macro_rules! any_patch {
    ($($t:ty => $variant:ident),*) => {$(
        impl From<Patch<$t>> for AnyPatch {
            fn from(p: Patch<$t>) -> Self {
                Self::$variant(p)
            }
        }
    )*};
}
any_patch!(f64 => F64, f32 => F32, f16 => F16, bf16 => BF16);

/// The old values of the weights that a call of `dampen` selected.
#[pyclass(frozen, module = "abjure._native", name = "Patch")]
struct PyPatch {
    patch: AnyPatch,
    shape: Vec<usize>,
}

#[pymethods]
impl PyPatch {
    /// Writes the old values back into `weights`, bit for bit.
    fn restore(&self, py: Python<'_>, weights: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut w = Array::extract(weights, "weights")?;
        w.expect_shape(&self.shape)?;
        match &self.patch {
            AnyPatch::F64(p) => restore(py, p, &mut w),
            AnyPatch::F32(p) => restore(py, p, &mut w),
            AnyPatch::F16(p) => restore(py, p, &mut w),
            AnyPatch::BF16(p) => restore(py, p, &mut w),
        }?;
        Ok(())
    }

    /// Number of weights recorded.
    fn __len__(&self) -> usize {
        match &self.patch {
            AnyPatch::F64(p) => p.len(),
            AnyPatch::F32(p) => p.len(),
            AnyPatch::F16(p) => p.len(),
            AnyPatch::BF16(p) => p.len(),
        }
    }

    /// Bytes held.
    #[getter]
    fn nbytes(&self) -> usize {
        match &self.patch {
            AnyPatch::F64(p) => p.bytes(),
            AnyPatch::F32(p) => p.bytes(),
            AnyPatch::F16(p) => p.bytes(),
            AnyPatch::BF16(p) => p.bytes(),
        }
    }
}

fn restore<W: Element>(py: Python<'_>, patch: &Patch<W>, w: &mut Array<'_>) -> Result<()> {
    let rows = w.rows_mut::<W>()?;
    py.detach(|| patch.restore(rows))
}

type Counts = (u64, u64, u64);

fn counts(s: Selection) -> Counts {
    (s.count, s.changed, s.zeroed)
}

/// The three arrays agree in shape, and the importances in dtype.
fn expect_alike(weights: &Array<'_>, forget: &Array<'_>, retain: &Array<'_>) -> Result<()> {
    forget.expect_shape(weights.shape())?;
    retain.expect_shape(weights.shape())?;
    retain.expect_dtype(forget.dtype())
}

/// Dampens `weights` in place; `record` keeps the old values, `dry_run` writes nothing.
#[pyfunction]
#[pyo3(signature = (weights, forget, retain, alpha, lam, exponent, max_factor, min_factor, forget_count, retain_count, record, dry_run))]
#[allow(clippy::too_many_arguments)]
fn dampen(
    py: Python<'_>,
    weights: &Bound<'_, PyAny>,
    forget: &Bound<'_, PyAny>,
    retain: &Bound<'_, PyAny>,
    alpha: f64,
    lam: f64,
    exponent: f64,
    max_factor: f64,
    min_factor: f64,
    forget_count: f64,
    retain_count: f64,
    record: bool,
    dry_run: bool,
) -> PyResult<(Counts, Option<PyPatch>)> {
    let spec = RuleSpec {
        alpha,
        lam,
        exponent,
        max_factor,
        min_factor,
        forget_count,
        retain_count,
    };
    spec.rule::<f64>()?;
    let mut w = Array::extract(weights, "weights")?;
    let (f, d) = (
        Array::extract(forget, "forget")?,
        Array::extract(retain, "retain")?,
    );
    expect_alike(&w, &f, &d)?;
    if dry_run {
        let found = with_importance!(f, "forget", I => with_dtype!(w.dtype(), W => {
            let (w, f, d) = (w.rows::<W>()?, f.rows::<I>()?, d.rows::<I>()?);
            py.detach(|| kernel::preview(&w, &f, &d, &spec))
        }))?;
        return Ok((counts(found), None));
    }
    w.expect_disjoint(&[&f, &d])?;
    let mode = if record {
        Mode::Recorded
    } else {
        Mode::Guarded
    };
    let shape = w.shape().to_vec();
    let (found, patch) = with_importance!(f, "forget", I => with_dtype!(w.dtype(), W => {
        let (f, d) = (f.rows::<I>()?, d.rows::<I>()?);
        let w = w.rows_mut::<W>()?;
        let (found, patch) = py.detach(|| kernel::dampen(w, &f, &d, &spec, mode))?;
        Ok((found, patch.map(AnyPatch::from)))
    }))?;
    Ok((counts(found), patch.map(|patch| PyPatch { patch, shape })))
}

/// Checks a pair of importances as `dampen` does.
#[pyfunction]
fn check_importances(
    py: Python<'_>,
    forget: &Bound<'_, PyAny>,
    retain: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let (f, d) = (
        Array::extract(forget, "forget")?,
        Array::extract(retain, "retain")?,
    );
    expect_alike(&f, &f, &d)?;
    with_importance!(f, "forget", I => {
        let (f, d) = (f.rows::<I>()?, d.rows::<I>()?);
        py.detach(|| kernel::check(&f, &d))
    })?;
    Ok(())
}

/// Selected count for each alpha.
#[pyfunction]
fn selection_curve(
    py: Python<'_>,
    forget: &Bound<'_, PyAny>,
    retain: &Bound<'_, PyAny>,
    alphas: Vec<f64>,
    forget_count: f64,
    retain_count: f64,
) -> PyResult<Vec<u64>> {
    let spec = RuleSpec {
        forget_count,
        retain_count,
        ..RuleSpec::default()
    };
    let (f, d) = (
        Array::extract(forget, "forget")?,
        Array::extract(retain, "retain")?,
    );
    expect_alike(&f, &f, &d)?;
    Ok(with_importance!(f, "forget", I => {
        let (f, d) = (f.rows::<I>()?, d.rows::<I>()?);
        py.detach(|| kernel::selection_curve(&f, &d, &alphas, &spec))
    })?)
}

/// Whether `fisher_accumulate` would succeed.
#[pyfunction]
fn fisher_check(
    py: Python<'_>,
    sum: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    weight: f64,
) -> PyResult<()> {
    let (s, g) = (Array::extract(sum, "sum")?, Array::extract(grad, "grad")?);
    with_importance!(s, "sum", A => with_dtype!(g.dtype(), T => {
        let (s, g) = (s.flat::<A>()?, g.flat::<T>()?);
        py.detach(|| fisher::check(s, g, weight))
    }))?;
    Ok(())
}

/// `sum += weight * grad²`; `grad` holds one or several gradients. `checked` says that `fisher_check` has passed them.
#[pyfunction]
#[pyo3(signature = (sum, grad, weight, checked=false))]
fn fisher_accumulate(
    py: Python<'_>,
    sum: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    weight: f64,
    checked: bool,
) -> PyResult<()> {
    let (mut s, g) = (Array::extract(sum, "sum")?, Array::extract(grad, "grad")?);
    s.expect_disjoint(&[&g])?;
    with_importance!(s, "sum", A => with_dtype!(g.dtype(), T => {
        let (s, g) = (s.flat_mut::<A>()?, g.flat::<T>()?);
        py.detach(|| {
            if !checked {
                return fisher::accumulate(s, g, weight);
            }
            fisher::accumulate_checked(s, g, weight)
        })
    }))?;
    Ok(())
}

/// `sum ± other`; with `check_only`, whether that would succeed.
#[pyfunction]
#[pyo3(signature = (sum, other, subtract, check_only=false))]
fn fisher_combine(
    py: Python<'_>,
    sum: &Bound<'_, PyAny>,
    other: &Bound<'_, PyAny>,
    subtract: bool,
    check_only: bool,
) -> PyResult<()> {
    let (mut s, o) = (Array::extract(sum, "sum")?, Array::extract(other, "other")?);
    o.expect_shape(s.shape())?;
    o.expect_dtype(s.dtype())?;
    if check_only {
        return Ok(with_importance!(s, "sum", A => {
            let (s, o) = (s.flat::<A>()?, o.flat::<A>()?);
            py.detach(|| fisher::check_combine(s, o, subtract))
        })?);
    }
    s.expect_disjoint(&[&o])?;
    with_importance!(s, "sum", A => {
        let (s, o) = (s.flat_mut::<A>()?, o.flat::<A>()?);
        py.detach(|| fisher::combine(s, o, subtract))
    })?;
    Ok(())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyPatch>()?;
    m.add_function(wrap_pyfunction!(dampen, m)?)?;
    m.add_function(wrap_pyfunction!(check_importances, m)?)?;
    m.add_function(wrap_pyfunction!(selection_curve, m)?)?;
    m.add_function(wrap_pyfunction!(fisher_check, m)?)?;
    m.add_function(wrap_pyfunction!(fisher_accumulate, m)?)?;
    m.add_function(wrap_pyfunction!(fisher_combine, m)?)
}
