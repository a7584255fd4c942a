//! Bindings of the forget wing.

use super::array::{Array, expect_all_disjoint};
use crate::element::{DType, Element};
use crate::forget::dampen::{self as kernel, Mode, Patch, RuleSpec, Selection, Tensor};
use crate::forget::{fisher, ratio};
use crate::{Error, Result, with_dtype};
use half::{bf16, f16};
use numpy::{PyArray1, PyReadonlyArray1};
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

/// Runs `$body` with `$p` bound to the patch inside.
macro_rules! with_patch {
    ($any:expr, $p:ident => $body:expr) => {
        match $any {
            AnyPatch::F64($p) => $body,
            AnyPatch::F32($p) => $body,
            AnyPatch::F16($p) => $body,
            AnyPatch::BF16($p) => $body,
        }
    };
}

/// The old values of the weights that a call of `dampen` changed.
#[pyclass(frozen, module = "abjure._native", name = "Patch")]
struct PyPatch {
    patch: AnyPatch,
    shape: Vec<usize>,
}

/// Number and length of the rows that kernels see.
fn rows_of(shape: &[usize]) -> (usize, usize) {
    let (width, lead) = shape
        .split_last()
        .map_or((1, shape), |(w, lead)| (*w, lead));
    (lead.iter().product(), width)
}

#[pymethods]
impl PyPatch {
    /// The reverse of `entries`, for a tensor of `shape` and `dtype`.
    #[staticmethod]
    fn from_entries(
        shape: Vec<usize>,
        dtype: &str,
        indices: PyReadonlyArray1<'_, u64>,
        old: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        let (rows, indices) = (rows_of(&shape), indices.as_slice()?);
        macro_rules! build {
            ($bits:ty, $t:ty) => {{
                let old: PyReadonlyArray1<'_, $bits> = old.extract()?;
                let old: Vec<$t> = old.as_array().iter().map(|b| <$t>::from_bits(*b)).collect();
                Patch::from_entries(rows, indices, &old)?.into()
            }};
        }
        let patch = match dtype {
            "float64" => build!(u64, f64),
            "float32" => build!(u32, f32),
            "float16" => build!(u16, f16),
            "bfloat16" => build!(u16, bf16),
            _ => {
                let expected = "float64, float32, float16 or bfloat16";
                return Err(Error::value("dtype", expected, dtype).into());
            }
        };
        Ok(Self { patch, shape })
    }

    /// Flat indices (uint64, ascending) of the weights that changed, and the bits of their old values (unsigned
    /// integers of the weights' width).
    fn entries<'py>(
        &self,
        py: Python<'py>,
    ) -> PyResult<(Bound<'py, PyArray1<u64>>, Bound<'py, PyAny>)> {
        macro_rules! split {
            ($p:expr) => {{
                let (at, old): (Vec<u64>, Vec<_>) =
                    py.detach(|| $p.entries().map(|(i, v)| (i as u64, v.to_bits())).unzip());
                (
                    PyArray1::from_vec(py, at),
                    PyArray1::from_vec(py, old).into_any(),
                )
            }};
        }
        Ok(with_patch!(&self.patch, p => split!(p)))
    }

    /// Writes the old values back into `weights`, bit for bit.
    fn restore(&self, py: Python<'_>, weights: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut w = self.fitting(weights)?;
        with_patch!(&self.patch, p => restore(py, p, &mut w))?;
        Ok(())
    }

    /// Whether `restore` would succeed.
    fn check(&self, weights: &Bound<'_, PyAny>) -> PyResult<()> {
        let mut w = self.fitting(weights)?;
        with_dtype!(self.dtype_tag(), W => w.rows_mut::<W>().map(|_| ()))?;
        Ok(())
    }

    /// Number of weights recorded.
    fn __len__(&self) -> usize {
        with_patch!(&self.patch, p => p.len())
    }

    /// Bytes held.
    #[getter]
    fn nbytes(&self) -> usize {
        with_patch!(&self.patch, p => p.bytes())
    }

    #[getter]
    fn shape(&self) -> Vec<usize> {
        self.shape.clone()
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype_tag().name()
    }
}

impl PyPatch {
    fn dtype_tag(&self) -> DType {
        match &self.patch {
            AnyPatch::F64(_) => DType::F64,
            AnyPatch::F32(_) => DType::F32,
            AnyPatch::F16(_) => DType::F16,
            AnyPatch::BF16(_) => DType::BF16,
        }
    }

    fn fitting<'py>(&self, weights: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
        let w = Array::extract(weights, "weights")?;
        w.expect_shape(&self.shape)?;
        w.expect_dtype(self.dtype_tag())?;
        Ok(w)
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

/// An error found in one of several tensors, whose index goes along as the attribute `tensor`.
fn at_tensor(py: Python<'_>, index: usize, error: impl Into<PyErr>) -> PyErr {
    let error = error.into();
    match error.value(py).setattr("tensor", index) {
        Ok(()) => error,
        Err(other) => other,
    }
}

/// Arrays of one list.
fn extract_all<'py>(objects: &[Bound<'py, PyAny>], arg: &'static str) -> PyResult<Vec<Array<'py>>> {
    let one = |(k, x): (usize, &Bound<'py, PyAny>)| {
        Array::extract(x, arg).map_err(|e| at_tensor(x.py(), k, e))
    };
    objects.iter().enumerate().map(one).collect()
}

fn expect_equal_lengths(weights: usize, forget: usize, retain: usize) -> Result<()> {
    if forget != weights || retain != weights {
        let found = format!("{forget} and {retain}");
        return Err(Error::shape(
            "forget, retain",
            format!("{weights} arrays each"),
            found,
        ));
    }
    Ok(())
}

/// Dampens all tensors of a model, or none of them if anything is wrong with one.
#[pyfunction]
#[pyo3(signature = (weights, forget, retain, alpha, lam, exponent, max_factor, min_factor, forget_count, retain_count, record, dry_run))]
#[allow(clippy::too_many_arguments)]
fn dampen_all(
    py: Python<'_>,
    weights: Vec<Bound<'_, PyAny>>,
    forget: Vec<Bound<'_, PyAny>>,
    retain: Vec<Bound<'_, PyAny>>,
    alpha: f64,
    lam: f64,
    exponent: f64,
    max_factor: f64,
    min_factor: f64,
    forget_count: f64,
    retain_count: f64,
    record: bool,
    dry_run: bool,
) -> PyResult<Vec<(Counts, Option<PyPatch>)>> {
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
    expect_equal_lengths(weights.len(), forget.len(), retain.len())?;
    let mut w = extract_all(&weights, "weights")?;
    let (f, d) = (
        extract_all(&forget, "forget")?,
        extract_all(&retain, "retain")?,
    );
    // Everything that can be refused is refused before the first write.
    for (k, w) in w.iter_mut().enumerate() {
        let (f, d) = (&f[k], &d[k]);
        let fits = expect_alike(w, f, d).and_then(|()| {
            with_importance!(f, "forget", I => {
                f.rows::<I>()?;
                d.rows::<I>()?;
                Ok(())
            })?;
            with_dtype!(w.dtype(), W => if dry_run {
                w.rows::<W>().map(|_| ())
            } else {
                w.rows_mut::<W>().map(|_| ())
            })
        });
        fits.map_err(|e| at_tensor(py, k, e))?;
    }
    if !dry_run {
        let read: Vec<&Array<'_>> = f.iter().chain(&d).collect();
        expect_all_disjoint(&w, &read).map_err(|(k, e)| at_tensor(py, k, e))?;
    }
    let mut found: Vec<Option<(Selection, Option<AnyPatch>)>> = w.iter().map(|_| None).collect();
    let mut groups: Vec<(DType, DType)> = Vec::new();
    for (w, f) in w.iter().zip(&f) {
        if !groups.contains(&(w.dtype(), f.dtype())) {
            groups.push((w.dtype(), f.dtype()));
        }
    }
    // Patches of earlier groups undo them should a later one fail.
    let mode = if record || groups.len() > 1 {
        Mode::Recorded
    } else {
        Mode::Guarded
    };
    for group in groups {
        let done = with_importance!(Tag(group.1), "forget", I => Ok(with_dtype!(group.0, W => {
            group_of::<W, I>(py, &mut w, &f, &d, &spec, mode, dry_run)
        })));
        match done.unwrap_or_else(|error| Err((0, error))) {
            Ok(done) => {
                for (k, counts, patch) in done {
                    found[k] = Some((counts, patch));
                }
            }
            Err((k, error)) => {
                for (w, done) in w.iter_mut().zip(found) {
                    if let Some((_, Some(patch))) = done {
                        with_patch!(&patch, p => restore(py, p, w))?;
                    }
                }
                return Err(at_tensor(py, k, error));
            }
        }
    }
    let shapes = w.iter().map(|w| w.shape().to_vec());
    let one = |(done, shape): (Option<(Selection, Option<AnyPatch>)>, Vec<usize>)| {
        let (found, patch) = done.unwrap_or_default();
        let patch = patch.filter(|_| record);
        (counts(found), patch.map(|patch| PyPatch { patch, shape }))
    };
    Ok(found.into_iter().zip(shapes).map(one).collect())
}

/// What `with_importance` asks for the dtype.
struct Tag(DType);

impl Tag {
    fn dtype(&self) -> DType {
        self.0
    }
}

type Done = Vec<(usize, Selection, Option<AnyPatch>)>;

/// Dampens the tensors of one pair of dtypes.
fn group_of<W: Element, I: crate::element::Real + Element>(
    py: Python<'_>,
    w: &mut [Array<'_>],
    f: &[Array<'_>],
    d: &[Array<'_>],
    spec: &RuleSpec,
    mode: Mode,
    dry_run: bool,
) -> std::result::Result<Done, kernel::Failure>
where
    AnyPatch: From<Patch<W>>,
{
    let (mut which, mut tensors, mut done) = (Vec::new(), Vec::new(), Vec::new());
    for (k, w) in w.iter_mut().enumerate() {
        if (w.dtype(), f[k].dtype()) != (W::DTYPE, I::DTYPE) {
            continue;
        }
        let at = |error| (k, error);
        let forget = f[k].rows::<I>().map_err(at)?;
        let retain = d[k].rows::<I>().map_err(at)?;
        if dry_run {
            let w = w.rows::<W>().map_err(at)?;
            let found = py.detach(|| kernel::preview(&w, &forget, &retain, spec));
            done.push((k, found.map_err(at)?, None));
            continue;
        }
        which.push(k);
        tensors.push(Tensor {
            weights: w.rows_mut().map_err(at)?,
            forget,
            retain,
        });
    }
    let found = py.detach(|| kernel::dampen_all(tensors, spec, mode));
    let found = found.map_err(|(k, error)| (which.get(k).copied().unwrap_or(k), error))?;
    let found = which.into_iter().zip(found);
    done.extend(found.map(|(k, (found, patch))| (k, found, patch.map(AnyPatch::from))));
    Ok(done)
}

/// The percentile of the pooled ratios of several tensors: (value, finite, infinite, undefined).
#[pyfunction]
fn ratio_percentile(
    py: Python<'_>,
    forget: Vec<Bound<'_, PyAny>>,
    retain: Vec<Bound<'_, PyAny>>,
    percentile: f64,
    forget_count: f64,
    retain_count: f64,
) -> PyResult<(f64, u64, u64, u64)> {
    expect_equal_lengths(forget.len(), forget.len(), retain.len())?;
    let (f, d) = (
        extract_all(&forget, "forget")?,
        extract_all(&retain, "retain")?,
    );
    let Some(first) = f.first() else {
        return Ok((f64::NAN, 0, 0, 0));
    };
    for (k, (f, d)) in f.iter().zip(&d).enumerate() {
        let fits = expect_alike(f, f, d).and_then(|()| f.expect_dtype(first.dtype()));
        fits.map_err(|e| at_tensor(py, k, e))?;
    }
    let counts = (forget_count, retain_count);
    let found = with_importance!(first, "forget", I => {
        let mut pairs = Vec::new();
        for (k, (f, d)) in f.iter().zip(&d).enumerate() {
            let pair = f.rows::<I>().and_then(|f| Ok((f, d.rows::<I>()?)));
            pairs.push(pair.map_err(|e| at_tensor(py, k, e))?);
        }
        let found = py.detach(|| ratio::percentile(&pairs, counts, percentile));
        Ok(found.map_err(|(k, e)| at_tensor(py, k, e))?)
    });
    let found: ratio::Percentile = found.map_err(|e: Error| PyErr::from(e))?;
    Ok((found.value, found.finite, found.infinite, found.undefined))
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

fn power_of(power: u32) -> Result<fisher::Power> {
    match power {
        1 => Ok(fisher::Power::Absolute),
        2 => Ok(fisher::Power::Square),
        _ => Err(Error::value("power", "1 or 2", power)),
    }
}

/// Whether `fisher_accumulate` would succeed.
#[pyfunction]
fn fisher_check(
    py: Python<'_>,
    sum: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    weights: Vec<f64>,
    power: u32,
) -> PyResult<()> {
    let (s, g) = (Array::extract(sum, "sum")?, Array::extract(grad, "grad")?);
    let power = power_of(power)?;
    with_importance!(s, "sum", A => with_dtype!(g.dtype(), T => {
        let (s, g) = (s.flat::<A>()?, g.flat::<T>()?);
        py.detach(|| fisher::check(s, g, &weights, power))
    }))?;
    Ok(())
}

/// `sum += weight * |grad|^power`; `grad` holds one or several gradients, `weights` one number or one for each.
/// `checked` says that `fisher_check` has passed them.
#[pyfunction]
#[pyo3(signature = (sum, grad, weights, power, checked=false))]
fn fisher_accumulate(
    py: Python<'_>,
    sum: &Bound<'_, PyAny>,
    grad: &Bound<'_, PyAny>,
    weights: Vec<f64>,
    power: u32,
    checked: bool,
) -> PyResult<()> {
    let (mut s, g) = (Array::extract(sum, "sum")?, Array::extract(grad, "grad")?);
    let power = power_of(power)?;
    s.expect_disjoint(&[&g])?;
    with_importance!(s, "sum", A => with_dtype!(g.dtype(), T => {
        let (s, g) = (s.flat_mut::<A>()?, g.flat::<T>()?);
        py.detach(|| {
            if !checked {
                return fisher::accumulate(s, g, &weights, power);
            }
            fisher::accumulate_checked(s, g, &weights, power)
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
    m.add_function(wrap_pyfunction!(dampen_all, m)?)?;
    m.add_function(wrap_pyfunction!(ratio_percentile, m)?)?;
    m.add_function(wrap_pyfunction!(check_importances, m)?)?;
    m.add_function(wrap_pyfunction!(selection_curve, m)?)?;
    m.add_function(wrap_pyfunction!(fisher_check, m)?)?;
    m.add_function(wrap_pyfunction!(fisher_accumulate, m)?)?;
    m.add_function(wrap_pyfunction!(fisher_combine, m)?)
}
