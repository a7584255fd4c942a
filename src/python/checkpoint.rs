//! Bindings of the checkpoint engine.

use super::directions::norm_preserving;
use super::long::run_long;
use crate::checkpoint::{self, Header, Importance, Options, Part, PatchReader, Spec, TensorInfo};
use crate::forget::dampen::RuleSpec;
use crate::linalg::Orthonormal;
use crate::{Error, Result};
use numpy::PyReadonlyArray2;
use pyo3::prelude::*;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Name, dtype, shape, first byte, one past the last.
type Tensor = (String, &'static str, Vec<u64>, u64, u64);
/// File name, SHA-256 of the header, length, tensors, metadata.
type Shard = (String, String, u64, Vec<Tensor>, Vec<(String, String)>);

fn tensors(list: &[TensorInfo]) -> Vec<Tensor> {
    let one = |t: &TensorInfo| (t.name.clone(), t.dtype, t.shape.clone(), t.begin, t.end);
    list.iter().map(one).collect()
}

fn shard(name: String, header: &Header) -> Shard {
    let (list, metadata) = (tensors(&header.tensors), header.metadata.clone());
    (name, header.sha256(), header.file_len(), list, metadata)
}

/// Directory, name of the index and shards of a checkpoint, every header checked.
#[pyfunction]
fn checkpoint_open(
    py: Python<'_>,
    path: PathBuf,
) -> PyResult<(PathBuf, Option<String>, Vec<Shard>)> {
    let found = py.detach(|| checkpoint::open(&path))?;
    let shards = (found.shards.into_iter())
        .map(|s| shard(s.name, &s.header))
        .collect();
    Ok((found.directory, found.index, shards))
}

/// One safetensors file, its header checked.
#[pyfunction]
fn checkpoint_header(py: Python<'_>, path: PathBuf) -> PyResult<Shard> {
    let header = py.detach(|| checkpoint::read_header(&path))?;
    Ok(shard(path.display().to_string(), &header))
}

/// The tensors of a file of importances.
#[pyclass(name = "ImportanceFile", module = "abjure._native", frozen)]
struct PyImportances {
    file: Arc<checkpoint::Named>,
    list: Vec<TensorInfo>,
}

#[pymethods]
impl PyImportances {
    #[new]
    fn new(path: PathBuf) -> PyResult<Self> {
        let (file, list) = Importance::open(&path)?;
        Ok(Self { file, list })
    }

    #[getter]
    fn tensors(&self) -> Vec<Tensor> {
        tensors(&self.list)
    }
}

impl PyImportances {
    fn part(&self, name: &str, offset: u64, count: u64) -> Result<Importance> {
        let tensor = self.list.iter().find(|t| t.name == name);
        let tensor = tensor.ok_or_else(|| {
            Error::checkpoint(self.file.path(), format!("holds no importance {name:?}"))
        })?;
        Importance::part(&self.file, tensor, offset, count)
    }
}

fn to_part((cycle, from, to): (usize, usize, usize)) -> Part {
    Part { cycle, from, to }
}

/// One edit of one stored tensor.
#[pyclass(name = "TensorEdit", module = "abjure._native", frozen)]
struct PyEdit(Spec);

#[pymethods]
impl PyEdit {
    /// Projection off orthonormal rows `q`, along the last axis or along the one before it.
    #[staticmethod]
    #[pyo3(signature = (last_axis, q, scale, keep, part=None))]
    fn ablate(
        last_axis: bool,
        q: PyReadonlyArray2<'_, f64>,
        scale: f64,
        keep: Option<&str>,
        part: Option<(usize, usize, usize)>,
    ) -> PyResult<Self> {
        let (rank, width) = q.as_array().dim();
        let rows = q.as_array().iter().copied().collect();
        Ok(Self(Spec::Ablate {
            last_axis,
            q: Arc::new(Orthonormal { width, rank, rows }),
            scale,
            keep: norm_preserving(keep)?,
            part: part.map(to_part),
        }))
    }

    /// `part` is (cycle, from, to): of every `cycle` elements those from `from` to before `to`.
    #[staticmethod]
    #[pyo3(signature = (factor, part=None))]
    fn scale(factor: f64, part: Option<(usize, usize, usize)>) -> Self {
        let part = part.map(to_part);
        Self(Spec::Scale { factor, part })
    }

    /// `count` weights by the importances `name` of two files, from element `offset` on.
    #[staticmethod]
    #[allow(clippy::too_many_arguments)]
    fn dampen(
        forget: &PyImportances,
        retain: &PyImportances,
        name: &str,
        offset: u64,
        count: u64,
        alpha: f64,
        lam: f64,
        forget_count: f64,
        retain_count: f64,
    ) -> PyResult<Self> {
        let rule = RuleSpec {
            alpha,
            lam,
            forget_count,
            retain_count,
            ..RuleSpec::default()
        };
        rule.rule::<f64>()?;
        Ok(Self(Spec::Dampen {
            forget: forget.part(name, offset, count)?,
            retain: retain.part(name, offset, count)?,
            rule,
        }))
    }
}

/// What is to be done with one shard.
#[pyclass(name = "ShardJob", module = "abjure._native", frozen)]
struct PyJob(checkpoint::ShardJob);

#[pymethods]
impl PyJob {
    #[new]
    #[pyo3(signature = (source, *, dest=None, in_place=false, patch=None, undo=None, edits=None, keep=None, record=None))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        source: PathBuf,
        dest: Option<PathBuf>,
        in_place: bool,
        patch: Option<PathBuf>,
        undo: Option<PathBuf>,
        edits: Option<HashMap<String, Vec<PyRef<'_, PyEdit>>>>,
        keep: Option<Vec<(String, String)>>,
        record: Option<PathBuf>,
    ) -> Self {
        let edits = (edits.unwrap_or_default().into_iter())
            .map(|(name, list)| (name, list.iter().map(|e| e.0.clone()).collect()))
            .collect();
        Self(checkpoint::ShardJob {
            source,
            dest,
            in_place,
            patch,
            undo,
            edits,
            keep: keep.unwrap_or_default(),
            record,
        })
    }
}

/// Runs the jobs within `memory` bytes; one record per shard as JSON. `progress` gets the bytes done.
#[pyfunction]
#[pyo3(signature = (jobs, memory, hash_all=true, progress=None))]
fn checkpoint_run(
    py: Python<'_>,
    jobs: Vec<PyRef<'_, PyJob>>,
    memory: usize,
    hash_all: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Vec<String>> {
    let jobs: Vec<checkpoint::ShardJob> = jobs.iter().map(|j| j.0.clone()).collect();
    let options = Options { memory, hash_all };
    let records = run_long(py, progress, |cancel| {
        checkpoint::run(&jobs, &options, cancel)
    })?;
    Ok(records.iter().map(ToString::to_string).collect())
}

/// Keeps byte ranges (offset, length) of a file that is about to be changed.
#[pyfunction]
fn journal_save(
    py: Python<'_>,
    source: PathBuf,
    ranges: Vec<(u64, u64)>,
    journal: PathBuf,
) -> PyResult<()> {
    Ok(py.detach(|| checkpoint::save(&source, &ranges, &journal))?)
}

/// Writes the kept bytes back.
#[pyfunction]
fn journal_rollback(py: Python<'_>, journal: PathBuf, target: PathBuf) -> PyResult<()> {
    Ok(py.detach(|| checkpoint::rollback(&journal, &target))?)
}

/// SHA-256 of a file.
#[pyfunction]
fn sha256_file(py: Python<'_>, path: PathBuf) -> PyResult<String> {
    Ok(py.detach(|| checkpoint::sha256_of(&path))?)
}

/// Names of the tensors that a patch restores, if it is whole.
#[pyfunction]
fn patch_tensors(py: Python<'_>, path: PathBuf) -> PyResult<Vec<String>> {
    let patch = py.detach(|| PatchReader::open(&path))?;
    let mut names: Vec<String> = patch.names().map(str::to_owned).collect();
    names.sort();
    Ok(names)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PyImportances>()?;
    m.add_class::<PyEdit>()?;
    m.add_class::<PyJob>()?;
    m.add_function(wrap_pyfunction!(checkpoint_open, m)?)?;
    m.add_function(wrap_pyfunction!(checkpoint_header, m)?)?;
    m.add_function(wrap_pyfunction!(checkpoint_run, m)?)?;
    m.add_function(wrap_pyfunction!(journal_save, m)?)?;
    m.add_function(wrap_pyfunction!(journal_rollback, m)?)?;
    m.add_function(wrap_pyfunction!(sha256_file, m)?)?;
    m.add_function(wrap_pyfunction!(patch_tensors, m)?)
}
