//! The one intake of arrays: NumPy through its C API, everything else through DLPack.
//!
//! What is accepted: CPU memory of float64, float32, float16 or bfloat16 (also NumPy arrays with the `ml_dtypes`
//! bfloat16), any shape, rows with a contiguous last axis (see [`crate::view`]). What is refused, each with its own
//! exception before anything is touched: other devices, other dtypes, tensors that require grad, read-only memory
//! where a kernel writes, overlapping operands, misaligned pointers.
//!
//! The views borrow from [`Array`], which keeps the owner alive. Detaching from the interpreter does not freeze the
//! memory: as with any in-place operation, another Python thread that writes to it meanwhile is the caller's error.

use super::errors::device_error;
use crate::element::{DType, Element};
use crate::view::{RowLayout, Rows, RowsMut};
use crate::{Error, Result};
use dlpark::DlpackFlags;
use dlpark::ffi::DLDevice;
use dlpark::python::{ImportRequest, ImportedDlpack};
use numpy::ndarray::s;
use numpy::{PyArrayDescrMethods, PyReadonlyArray2, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyDict;

/// Keeps the memory alive for as long as the array is in use.
enum Owner<'py> {
    Numpy { _array: Bound<'py, PyUntypedArray> },
    Dlpack { _tensor: ImportedDlpack },
}

/// A checked array argument.
pub struct Array<'py> {
    arg: &'static str,
    data: *mut u8,
    dtype: DType,
    shape: Vec<usize>,
    strides: Vec<isize>,
    writable: bool,
    _owner: Owner<'py>,
}

impl<'py> Array<'py> {
    /// Takes a NumPy array, a CPU torch tensor or any object with `__dlpack__`, without copying.
    pub fn extract(obj: &Bound<'py, PyAny>, arg: &'static str) -> PyResult<Self> {
        let array = match obj.cast::<PyUntypedArray>() {
            Ok(array) => Self::from_numpy(array, arg)?,
            Err(_) => Self::from_dlpack(obj, arg)?,
        };
        if array.len() > 0 && !(array.data as usize).is_multiple_of(array.dtype.size()) {
            return Err(Error::layout(arg, "memory is not aligned to its element size").into());
        }
        Ok(array)
    }

    fn from_numpy(array: &Bound<'py, PyUntypedArray>, arg: &'static str) -> PyResult<Self> {
        let descr = array.dtype();
        let name = descr.typeobj().name()?.to_string();
        let native = !matches!(descr.byteorder(), b'>') || cfg!(target_endian = "big");
        let dtype = match (name.as_str(), descr.itemsize(), native) {
            ("float64", 8, true) => DType::F64,
            ("float32", 4, true) => DType::F32,
            ("float16", 2, true) => DType::F16,
            ("bfloat16", 2, true) => DType::BF16,
            _ => return Err(dtype_error(arg, &descr.str()?.to_string())),
        };
        let size = dtype.size() as isize;
        if array.strides().iter().any(|s| s % size != 0) {
            return Err(Error::layout(arg, "strides are not multiples of the element size").into());
        }
        let flags = array.getattr("flags")?;
        // SAFETY: `as_array_ptr` is the live PyArrayObject behind `array`; only its data pointer is read.
        let data = unsafe { (*array.as_array_ptr()).fields.data.cast::<u8>() };
        Ok(Self {
            arg,
            data,
            dtype,
            shape: array.shape().to_vec(),
            strides: array.strides().iter().map(|s| s / size).collect(),
            writable: flags.getattr("writeable")?.extract()?,
            _owner: Owner::Numpy {
                _array: array.clone(),
            },
        })
    }

    fn from_dlpack(obj: &Bound<'py, PyAny>, arg: &'static str) -> PyResult<Self> {
        if !obj.hasattr("__dlpack__")? {
            let found = obj.get_type().name()?;
            return Err(Error::DType {
                arg,
                expected: "a NumPy array, torch tensor or other array with __dlpack__".into(),
                found: found.to_string(),
            }
            .into());
        }
        if let Ok(flag) = obj.getattr("requires_grad")
            && flag.is_truthy()?
        {
            return Err(Error::layout(
                arg,
                "the tensor requires grad; pass tensor.detach() (it shares the memory)",
            )
            .into());
        }
        let tensor = import(obj, arg)?;
        let view = tensor.validate().map_err(|e| Error::layout(arg, e))?;
        use dlpark::ffi::DLDataType as D;
        let dtype = match view.dtype() {
            d if d == D::F64 => DType::F64,
            d if d == D::F32 => DType::F32,
            d if d == D::F16 => DType::F16,
            d if d == D::BF16 => DType::BF16,
            d => return Err(dtype_error(arg, &format!("{d:?}"))),
        };
        let dims = |v: &[i64]| v.iter().map(|n| *n as isize).collect::<Vec<_>>();
        let strides = view
            .strides_or_compact()
            .map_err(|e| Error::layout(arg, e))?;
        Ok(Self {
            arg,
            data: (view.data_ptr() as *mut u8).wrapping_add(view.byte_offset() as usize),
            dtype,
            shape: view.shape().iter().map(|n| *n as usize).collect(),
            strides: dims(&strides),
            writable: !tensor.flags().contains(DlpackFlags::READ_ONLY),
            _owner: Owner::Dlpack { _tensor: tensor },
        })
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Strides in elements.
    pub fn strides(&self) -> &[isize] {
        &self.strides
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn address(&self) -> usize {
        self.data as usize
    }

    pub fn writable(&self) -> bool {
        self.writable
    }

    /// `Err` unless the shape is `expected`.
    pub fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if self.shape != expected {
            return Err(Error::shape(
                self.arg,
                format!("shape {expected:?}"),
                format!("{:?}", self.shape),
            ));
        }
        Ok(())
    }

    /// `Err` unless the dtype is `expected`.
    pub fn expect_dtype(&self, expected: DType) -> Result<()> {
        if self.dtype != expected {
            return Err(Error::DType {
                arg: self.arg,
                expected: expected.name().into(),
                found: self.dtype.name().into(),
            });
        }
        Ok(())
    }

    /// Bytes touched, as addresses `[start, end)`.
    fn extent(&self) -> (usize, usize) {
        let (mut low, mut high) = (0isize, 0isize);
        if self.len() == 0 {
            return (0, 0);
        }
        for (&n, &s) in self.shape.iter().zip(&self.strides) {
            let reach = (n as isize - 1) * s;
            low += reach.min(0);
            high += reach.max(0);
        }
        let size = self.dtype.size();
        (
            self.data.wrapping_offset(low * size as isize) as usize,
            self.data.wrapping_offset((high + 1) * size as isize) as usize,
        )
    }

    /// `Err` if this array, which a kernel writes, shares memory with one of `others`.
    pub fn expect_disjoint(&self, others: &[&Array<'_>]) -> Result<()> {
        let (start, end) = self.extent();
        for other in others {
            let (s, e) = other.extent();
            if start < e && s < end {
                return Err(Error::layout(
                    self.arg,
                    format!("shares memory with {}", other.arg),
                ));
            }
        }
        Ok(())
    }

    fn layout<T: Element>(&self) -> Result<RowLayout> {
        self.expect_dtype(T::DTYPE)?;
        RowLayout::new(self.arg, &self.shape, &self.strides)
    }

    /// Read-only rows over the last axis.
    pub fn rows<T: Element>(&self) -> Result<Rows<'_, T>> {
        let layout = self.layout::<T>()?;
        // SAFETY: dtype and alignment were checked; all strides are non-negative (RowLayout), so the span starts at
        // `data` and covers memory that the owner, which `self` keeps alive, exported as this array.
        let data = unsafe { slice(self.data.cast::<T>(), layout.span()) };
        Rows::new(self.arg, data, layout)
    }

    /// Writable rows over the last axis; elements do not overlap.
    pub fn rows_mut<T: Element>(&mut self) -> Result<RowsMut<'_, T>> {
        let layout = self.layout::<T>()?;
        if !self.writable {
            return Err(Error::layout(self.arg, "the array is read-only"));
        }
        // SAFETY: as in `rows`; the exporter says the memory is writable, and `&mut self` makes this the only view
        // taken through this intake (operands are checked against each other with `expect_disjoint`).
        let data = unsafe { slice_mut(self.data.cast::<T>(), layout.span()) };
        RowsMut::new(self.arg, data, layout)
    }

    /// All elements in logical order as one slice.
    ///
    /// # Errors
    /// `Layout` unless the array is C-contiguous.
    pub fn flat<T: Element>(&self) -> Result<&[T]> {
        self.rows()?
            .as_contiguous()
            .ok_or_else(|| Error::layout(self.arg, "the array must be C-contiguous"))
    }

    /// All elements in logical order as one writable slice.
    ///
    /// # Errors
    /// `Layout` unless the array is C-contiguous and writable.
    pub fn flat_mut<T: Element>(&mut self) -> Result<&mut [T]> {
        let layout = self.layout::<T>()?;
        if !layout.is_contiguous() {
            return Err(Error::layout(self.arg, "the array must be C-contiguous"));
        }
        if !self.writable {
            return Err(Error::layout(self.arg, "the array is read-only"));
        }
        // SAFETY: as in `rows_mut`, and contiguous.
        Ok(unsafe { slice_mut(self.data.cast::<T>(), layout.span()) })
    }
}

/// `Err`, with the index of the array, if one of `written` shares memory with another or with one of `read`.
pub fn expect_all_disjoint(
    written: &[Array<'_>],
    read: &[&Array<'_>],
) -> std::result::Result<(), (usize, Error)> {
    let mut spans: Vec<_> = (written.iter().enumerate())
        .map(|(k, a)| (a.extent(), k))
        .filter(|((start, end), _)| start < end)
        .collect();
    spans.sort_unstable();
    let shared = |k: usize, with: &str| {
        let reason = format!("shares memory with {with}");
        Err((k, Error::layout(written[k].arg, reason)))
    };
    for pair in spans.windows(2) {
        if pair[1].0.0 < pair[0].0.1 {
            return shared(pair[1].1, "another tensor");
        }
    }
    for other in read {
        let (start, end) = other.extent();
        let next = spans.partition_point(|((_, e), _)| *e <= start);
        if let Some(((s, _), k)) = spans.get(next)
            && start < end
            && *s < end
        {
            return shared(*k, other.arg);
        }
    }
    Ok(())
}

/// # Safety
/// `data` is valid for reading `len` elements for `'a`, or `len` is 0.
unsafe fn slice<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise; non-null because an exporter gives memory for a non-empty array.
    unsafe { std::slice::from_raw_parts(data, len) }
}

/// # Safety
/// As [`slice`], and nothing else reads or writes the memory during `'a`.
unsafe fn slice_mut<'a, T>(data: *mut T, len: usize) -> &'a mut [T] {
    if len == 0 {
        return &mut [];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(data, len) }
}

fn dtype_error(arg: &'static str, found: &str) -> PyErr {
    Error::DType {
        arg,
        expected: "float64, float32, float16 or bfloat16".into(),
        found: found.into(),
    }
    .into()
}

/// A tensor's export, waiting to be taken through the protocol.
///
/// `Tensor.__dlpack__` and `__dlpack_device__` are Python functions: in a generation loop, where every call finds the
/// caches cold, they take longer than many a kernel. `torch.utils.dlpack.to_dlpack` does the same in one step.
#[pyclass(frozen)]
struct Export(Py<PyAny>);

#[pymethods]
impl Export {
    #[pyo3(signature = (**_options))]
    fn __dlpack__(&self, py: Python<'_>, _options: Option<&Bound<'_, PyDict>>) -> Py<PyAny> {
        self.0.clone_ref(py)
    }

    fn __dlpack_device__(&self) -> (i32, i32) {
        (1, 0)
    }
}

/// `torch.Tensor` and `to_dlpack`, once torch has been imported.
fn torch(py: Python<'_>) -> PyResult<Option<&(Py<PyAny>, Py<PyAny>)>> {
    static TORCH: PyOnceLock<(Py<PyAny>, Py<PyAny>)> = PyOnceLock::new();
    if let Some(found) = TORCH.get(py) {
        return Ok(Some(found));
    }
    let modules = py.import(intern!(py, "sys"))?.getattr("modules")?;
    // The second exists only after the import of the first has run to its end.
    let (Ok(torch), Ok(dlpack)) = (
        modules.get_item("torch"),
        modules.get_item("torch.utils.dlpack"),
    ) else {
        return Ok(None);
    };
    let found = (
        torch.getattr("Tensor")?.unbind(),
        dlpack.getattr("to_dlpack")?.unbind(),
    );
    Ok(Some(TORCH.get_or_init(py, || found)))
}

/// Takes CPU memory from anything with `__dlpack__`, without copying.
fn import(obj: &Bound<'_, PyAny>, arg: &'static str) -> PyResult<ImportedDlpack> {
    let py = obj.py();
    let fail = |e: PyErr| cannot_export(py, arg, &e);
    // torch shares memory whenever it exports; the others are told not to copy.
    let (exported, copy) = match torch(py)? {
        Some((tensor, to_dlpack))
            if obj.is_instance(tensor.bind(py))?
                && obj.getattr(intern!(py, "is_cpu"))?.is_truthy()? =>
        {
            let capsule = to_dlpack.bind(py).call1((obj,)).map_err(fail)?;
            (Bound::new(py, Export(capsule.unbind()))?.into_any(), None)
        }
        _ => (obj.clone(), Some(false)),
    };
    let request = ImportRequest::new(exported.as_borrowed()).map_err(fail)?;
    if let Ok(device) = request.device() {
        expect_cpu(py, arg, device)?;
    }
    let tensor = request.import(None, copy).map_err(fail)?;
    let device = (tensor.validate().map_err(|e| Error::layout(arg, e))?).device();
    expect_cpu(py, arg, device)?;
    Ok(tensor)
}

fn expect_cpu(py: Python<'_>, arg: &'static str, device: DLDevice) -> PyResult<()> {
    if device == DLDevice::CPU {
        return Ok(());
    }
    let message = format!("{arg}: expected CPU memory, got device {device:?}");
    Err(device_error(py, message))
}

/// The columns from `start` on of a matrix of 64-bit integers, row by row.
///
/// # Errors
/// `DType` for other elements, `Shape` unless there are two axes.
pub fn int64_columns(
    obj: &Bound<'_, PyAny>,
    arg: &'static str,
    start: usize,
) -> PyResult<Vec<i64>> {
    if let Ok(array) = obj.extract::<PyReadonlyArray2<'_, i64>>() {
        let array = array.as_array();
        let from = start.min(array.ncols());
        return Ok(array.slice(s![.., from..]).iter().copied().collect());
    }
    let tensor = import(obj, arg)?;
    let view = tensor.validate().map_err(|e| Error::layout(arg, e))?;
    if view.dtype() != dlpark::ffi::DLDataType::I64 {
        return Err(dtype_error(arg, &format!("{:?}", view.dtype())));
    }
    let &[rows, columns] = view.shape() else {
        let found = format!("{:?}", view.shape());
        return Err(Error::shape(arg, "shape (rows, length)", found).into());
    };
    let start = start.min(columns as usize);
    let strides = view
        .strides_or_compact()
        .map_err(|e| Error::layout(arg, e))?;
    let first = (view.data_ptr() as *const u8)
        .wrapping_add(view.byte_offset() as usize)
        .cast::<i64>();
    if !first.is_aligned() {
        return Err(Error::layout(arg, "memory is not aligned to its element size").into());
    }
    let mut found = Vec::with_capacity(rows as usize * (columns as usize - start));
    for i in 0..rows {
        for j in start as i64..columns {
            let at = first.wrapping_offset((i * strides[0] + j * strides[1]) as isize);
            // SAFETY: an element of the exported array, by its own shape and strides; `tensor` keeps it alive.
            found.push(unsafe { at.read() });
        }
    }
    Ok(found)
}

fn cannot_export(py: Python<'_>, arg: &'static str, err: &PyErr) -> PyErr {
    if err.is_instance_of::<pyo3::exceptions::PyKeyboardInterrupt>(py) {
        return err.clone_ref(py);
    }
    Error::layout(arg, format!("cannot be taken without a copy ({err})")).into()
}
