//! Bindings of the noise that a class can be told by.

use super::array::Array;
use super::long::run_long;
use crate::protect::noise::{self, Autoregressive, Dots, Image, Pixel, Separable, TAPS};
use crate::protect::project::{Limits, Norm};
use crate::view::{Rows, RowsMut};
use crate::{Error, Result, with_dtype};
use numpy::{
    IntoPyArray, PyArray1, PyArrayDescrMethods, PyReadonlyArray1, PyReadonlyArray2,
    PyReadwriteArray2, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

/// Whether `x` is a NumPy array of bytes, which the general intake does not take.
fn holds_bytes(x: &Bound<'_, PyAny>) -> bool {
    x.cast::<PyUntypedArray>()
        .is_ok_and(|a| a.dtype().is_equiv_to(&numpy::dtype::<u8>(x.py())))
}

/// Runs `$body` with `$T` the element type and `$x`, `$out` the rows of a matrix and of one like it to write.
macro_rules! with_rows {
    ($x:expr, $out:expr, |$T:ident, $rows:ident, $target:ident| $body:expr) => {
        if holds_bytes($x) {
            type $T = u8;
            let from: PyReadonlyArray2<'_, u8> = $x.extract()?;
            let mut to: PyReadwriteArray2<'_, u8> = $out.extract()?;
            if to.shape() != from.shape() {
                return Err(Error::shape("out", format!("{:?}", from.shape()), format!("{:?}", to.shape())).into());
            }
            let width = from.shape()[1];
            let flat = |arg| Error::layout(arg, "the array must be C-contiguous");
            let $rows = Rows::<u8>::matrix(from.as_slice().map_err(|_| flat("x"))?, width);
            let $target = RowsMut::<u8>::matrix(to.as_slice_mut().map_err(|_| flat("out"))?, width);
            $body
        } else {
            let (array, mut target) = (Array::extract($x, "x")?, Array::extract($out, "out")?);
            matrix(&array)?;
            target.expect_dtype(array.dtype())?;
            target.expect_shape(array.shape())?;
            target.expect_disjoint(&[&array])?;
            with_dtype!(array.dtype(), Stored => {
                type $T = Stored;
                let $rows = array.rows::<$T>()?;
                let $target = target.rows_mut::<$T>()?;
                $body
            })
        }
    };
}

fn matrix(array: &Array<'_>) -> Result<()> {
    if array.shape().len() == 2 {
        return Ok(());
    }
    let found = format!("shape {:?}", array.shape());
    Err(Error::shape("x", "a matrix of rows × values", found))
}

fn codes(values: &PyReadonlyArray1<'_, i64>, rows: usize, classes: usize) -> Result<Vec<u32>> {
    let values = values.as_array();
    if values.len() != rows {
        return Err(Error::shape(
            "y",
            format!("{rows} labels, one per row"),
            values.len(),
        ));
    }
    let code = |v: &i64| match usize::try_from(*v) {
        Ok(c) if c < classes => Ok(c as u32),
        _ => Err(Error::value(
            "y",
            format!("class codes from 0 to {}", classes - 1),
            v,
        )),
    };
    values.iter().map(code).collect()
}

/// The budget and the box: norm, epsilon, low, high.
type LimitsArgument = (String, f64, f64, f64);

fn limits((norm, epsilon, low, high): &LimitsArgument) -> Result<Limits> {
    let norm = match norm.as_str() {
        "linf" => Norm::Linf,
        "l2" => Norm::L2,
        other => return Err(Error::value("norm", "\"linf\" or \"l2\"", other)),
    };
    Ok(Limits {
        norm,
        epsilon: *epsilon,
        low: *low,
        high: *high,
    })
}

/// Planes, lines, columns, channels of a pixel.
type ImageArgument = (usize, usize, usize, usize);

fn image((planes, height, width, step): ImageArgument, row: usize) -> Result<Image> {
    let image = Image {
        planes,
        height,
        width,
        step,
    };
    if image.elements() != row || row == 0 {
        return Err(Error::shape(
            "x",
            format!("rows of {} values", image.elements()),
            row,
        ));
    }
    Ok(image)
}

/// A C-contiguous argument whose length is a multiple of `each`, and the multiple.
fn table<'a, T: numpy::Element>(
    values: &'a PyReadonlyArray1<'_, T>,
    arg: &'static str,
    each: usize,
) -> Result<(&'a [T], usize)> {
    let values = values
        .as_slice()
        .map_err(|_| Error::layout(arg, "the array must be C-contiguous"))?;
    if each == 0 || values.is_empty() || !values.len().is_multiple_of(each) {
        return Err(Error::shape(
            arg,
            format!("a multiple of {each} values"),
            values.len(),
        ));
    }
    Ok((values, values.len() / each))
}

/// `out = x + pattern of the row's class`; `patterns` is classes × row, flat, in units of `x` (levels for bytes).
#[pyfunction]
#[pyo3(signature = (x, y, patterns, budget, out, progress=None))]
fn noise_add(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: PyReadonlyArray1<'_, i64>,
    patterns: PyReadonlyArray1<'_, f64>,
    budget: LimitsArgument,
    out: &Bound<'_, PyAny>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let limits = limits(&budget)?;
    with_rows!(x, out, |T, rows, target| {
        let (patterns, classes) = table(&patterns, "patterns", rows.width())?;
        let labels = codes(&y, rows.rows(), classes)?;
        type R = <T as Pixel>::Acc;
        let patterns: Vec<R> = patterns
            .iter()
            .map(|v| <R as crate::element::Real>::from_f64(*v))
            .collect();
        run_long(py, progress, |cancel| {
            noise::add_class(&rows, &labels, &patterns, &limits, target, cancel)
        })
    })
}

/// Linearly separable patches; `mixing` is classes × features × features, flat.
#[pyfunction]
#[pyo3(signature = (x, y, centroids, mixing, shape, patch, seed, budget, out, progress=None))]
#[allow(clippy::too_many_arguments)]
fn noise_separable(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: PyReadonlyArray1<'_, i64>,
    centroids: PyReadonlyArray1<'_, f32>,
    mixing: PyReadonlyArray1<'_, f32>,
    shape: ImageArgument,
    patch: usize,
    seed: u64,
    budget: LimitsArgument,
    out: &Bound<'_, PyAny>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let limits = limits(&budget)?;
    if patch == 0 {
        return Err(Error::value("patch", "a positive whole number", patch).into());
    }
    with_rows!(x, out, |T, rows, target| {
        let image = image(shape, rows.width())?;
        let (lines, columns) = Separable::grid(&image, patch);
        let features = lines * columns * image.channels();
        let (centroids, classes) = table(&centroids, "centroids", features)?;
        let (mixing, found) = table(&mixing, "mixing", features * features)?;
        if found != classes {
            return Err(Error::shape("mixing", format!("{classes} matrices"), found).into());
        }
        let labels = codes(&y, rows.rows(), classes)?;
        let plan = Separable {
            centroids,
            mixing,
            image,
            patch,
        };
        run_long(py, progress, |cancel| {
            noise::add_separable::<T>(&rows, &labels, &plan, seed, &limits, target, cancel)
        })
    })
}

/// Draws of autoregressive processes; `filters` is classes × channels × 8, flat.
#[pyfunction]
#[pyo3(signature = (x, y, filters, shape, crop, seed, budget, out, progress=None))]
#[allow(clippy::too_many_arguments)]
fn noise_autoregressive(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: PyReadonlyArray1<'_, i64>,
    filters: PyReadonlyArray1<'_, f32>,
    shape: ImageArgument,
    crop: usize,
    seed: u64,
    budget: LimitsArgument,
    out: &Bound<'_, PyAny>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    let limits = limits(&budget)?;
    check_crop(crop)?;
    with_rows!(x, out, |T, rows, target| {
        let image = image(shape, rows.width())?;
        let (filters, classes) = table(&filters, "filters", image.channels() * TAPS)?;
        let labels = codes(&y, rows.rows(), classes)?;
        let plan = Autoregressive {
            filters,
            image,
            crop,
        };
        run_long(py, progress, |cancel| {
            noise::add_autoregressive::<T>(&rows, &labels, &plan, seed, &limits, target, cancel)
        })
    })
}

fn check_crop(crop: usize) -> Result<()> {
    if crop < 2 {
        return Err(Error::value(
            "crop",
            "at least 2, the lines a process starts from",
            crop,
        ));
    }
    Ok(())
}

/// Draws of autoregressive processes by themselves: rows of the image, float32, flat.
#[pyfunction]
fn noise_processes<'py>(
    py: Python<'py>,
    y: PyReadonlyArray1<'py, i64>,
    filters: PyReadonlyArray1<'py, f32>,
    shape: ImageArgument,
    crop: usize,
    seed: u64,
) -> PyResult<Bound<'py, PyArray1<f32>>> {
    let (planes, height, width, step) = shape;
    let image = image(shape, planes * height * width * step)?;
    check_crop(crop)?;
    let (filters, classes) = table(&filters, "filters", image.channels() * TAPS)?;
    let labels = codes(&y, y.as_array().len(), classes)?;
    let plan = Autoregressive {
        filters,
        image,
        crop,
    };
    Ok(py
        .detach(|| noise::processes(&plan, &labels, seed))
        .into_pyarray(py))
}

/// Correlation with a 3 × 3 kernel per class (classes × 9, flat), divided by the image's largest value.
#[pyfunction]
#[pyo3(signature = (x, y, kernels, shape, high, truncate, out, progress=None))]
#[allow(clippy::too_many_arguments)]
fn noise_convolve(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: PyReadonlyArray1<'_, i64>,
    kernels: PyReadonlyArray1<'_, f64>,
    shape: ImageArgument,
    high: f64,
    truncate: bool,
    out: &Bound<'_, PyAny>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    with_rows!(x, out, |T, rows, target| {
        let image = image(shape, rows.width())?;
        let (kernels, classes) = table(&kernels, "kernels", 9)?;
        let labels = codes(&y, rows.rows(), classes)?;
        run_long(py, progress, |cancel| {
            noise::convolve::<T>(
                &rows, &labels, kernels, &image, high, truncate, target, cancel,
            )
        })
    })
}

/// Sets pixels of every row to colours of its class; `places` is classes × per, `colours` classes × per × channels.
#[pyfunction]
#[pyo3(signature = (x, y, places, colours, per, shape, out, progress=None))]
#[allow(clippy::too_many_arguments)]
fn noise_set_pixels(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: PyReadonlyArray1<'_, i64>,
    places: Vec<usize>,
    colours: PyReadonlyArray1<'_, f64>,
    per: usize,
    shape: ImageArgument,
    out: &Bound<'_, PyAny>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<()> {
    with_rows!(x, out, |T, rows, target| {
        let image = image(shape, rows.width())?;
        let (colours, classes) = table(&colours, "colours", per * image.channels())?;
        let labels = codes(&y, rows.rows(), classes)?;
        if places.len() != classes * per {
            return Err(
                Error::shape("places", format!("{} pixels", classes * per), places.len()).into(),
            );
        }
        if let Some(place) = places.iter().find(|p| **p >= image.height * image.width) {
            let pixels = format!("pixels of {} × {}", image.height, image.width);
            return Err(Error::value("places", pixels, place).into());
        }
        let dots = Dots {
            places: &places,
            colours,
            per,
            image,
        };
        run_long(py, progress, |cancel| {
            noise::set_pixels::<T>(&rows, &labels, &dots, target, cancel)
        })
    })
}

type Sums<'py> = (
    Vec<usize>,
    Bound<'py, PyArray1<f64>>,
    Bound<'py, PyArray1<f64>>,
);

/// Counts, sums and sums of squares by class (classes × row, flat), of values within the box.
#[pyfunction]
#[pyo3(signature = (x, y, classes, bounds, progress=None))]
fn noise_class_sums<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    y: PyReadonlyArray1<'py, i64>,
    classes: usize,
    bounds: (f64, f64),
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Sums<'py>> {
    let found = if holds_bytes(x) {
        let from: PyReadonlyArray2<'_, u8> = x.extract()?;
        let flat = from
            .as_slice()
            .map_err(|_| Error::layout("x", "the array must be C-contiguous"))?;
        let rows = Rows::matrix(flat, from.shape()[1]);
        let labels = codes(&y, rows.rows(), classes)?;
        run_long(py, progress, |cancel| {
            noise::class_sums(&rows, &labels, classes, bounds, cancel)
        })?
    } else {
        let array = Array::extract(x, "x")?;
        matrix(&array)?;
        with_dtype!(array.dtype(), T => {
            let rows = array.rows::<T>()?;
            let labels = codes(&y, rows.rows(), classes)?;
            run_long(py, progress, |cancel| noise::class_sums(&rows, &labels, classes, bounds, cancel))?
        })
    };
    let (sums, squares) = (found.sums.into_pyarray(py), found.squares.into_pyarray(py));
    Ok((found.counts, sums, squares))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(noise_add, m)?)?;
    m.add_function(wrap_pyfunction!(noise_separable, m)?)?;
    m.add_function(wrap_pyfunction!(noise_autoregressive, m)?)?;
    m.add_function(wrap_pyfunction!(noise_processes, m)?)?;
    m.add_function(wrap_pyfunction!(noise_convolve, m)?)?;
    m.add_function(wrap_pyfunction!(noise_set_pixels, m)?)?;
    m.add_function(wrap_pyfunction!(noise_class_sums, m)?)
}
