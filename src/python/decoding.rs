//! Bindings of the decoding kernels.

use super::array::{Array, int64_columns};
use crate::refuse::decoding::{
    Automaton, ByteAutomaton, Contexts, Edits, Gate, GateOptions, Groups, LOGITS, Matcher, NoFire,
    Penalty, Position, Reading, Rule, Vocabulary, apply, bias, edits, force, margins, max_gaps,
    row_lse,
};
use crate::{Error, Result, with_dtype};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedBytes;
use std::sync::Arc;

type Ids<'py> = PyReadonlyArray1<'py, i64>;
type Values<'py> = PyReadonlyArray1<'py, f64>;

fn slice<'a, T: numpy::Element>(
    a: &'a PyReadonlyArray1<'_, T>,
    arg: &'static str,
) -> Result<&'a [T]> {
    a.as_slice()
        .map_err(|_| Error::layout(arg, "the array must be C-contiguous"))
}

/// The logits, which must have the two axes (batch, vocabulary).
fn batch<'py>(logits: &Bound<'py, PyAny>) -> PyResult<Array<'py>> {
    let a = Array::extract(logits, LOGITS)?;
    if a.shape().len() != 2 {
        let found = format!("{:?}", a.shape());
        return Err(Error::shape(LOGITS, "shape (batch, vocabulary)", found).into());
    }
    Ok(a)
}

/// Adds `bias` at `ids`, per row between `indptr` or alike in all rows.
#[pyfunction]
#[pyo3(signature = (logits, ids, bias, indptr=None))]
fn bias_(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    ids: Ids<'_>,
    bias: Values<'_>,
    indptr: Option<Ids<'_>>,
) -> PyResult<()> {
    let mut logits = batch(logits)?;
    let (rows, width) = (logits.shape()[0], logits.shape()[1]);
    let indptr = indptr.as_ref().map(|p| slice(p, "indptr")).transpose()?;
    let edits = Edits::sum(
        indptr,
        slice(&ids, "ids")?,
        slice(&bias, "bias")?,
        rows,
        width,
    )?;
    with_dtype!(logits.dtype(), T => {
        let rows = logits.rows_mut::<T>()?;
        Ok(py.detach(|| self::bias(rows, &edits))?)
    })
}

/// Leaves one id per row (none where negative).
#[pyfunction]
fn force_(py: Python<'_>, logits: &Bound<'_, PyAny>, ids: Ids<'_>) -> PyResult<()> {
    let mut logits = batch(logits)?;
    let ids = slice(&ids, "ids")?;
    with_dtype!(logits.dtype(), T => {
        let rows = logits.rows_mut::<T>()?;
        Ok(py.detach(|| force(rows, ids))?)
    })
}

/// Log-sum-exp of each row.
#[pyfunction]
#[pyo3(name = "row_lse", signature = (logits, temperature=1.0))]
fn lse<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    temperature: f64,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let logits = batch(logits)?;
    with_dtype!(logits.dtype(), T => {
        let rows = logits.rows::<T>()?;
        Ok(py.detach(|| row_lse(&rows, temperature))?.into_pyarray(py))
    })
}

/// Margins of groups of ids, rows × groups.
#[pyfunction]
#[pyo3(signature = (logits, groups, temperature=1.0))]
fn row_margin<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    groups: Vec<Vec<i64>>,
    temperature: f64,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let logits = batch(logits)?;
    let groups = Groups::new("groups", &groups)?;
    with_dtype!(logits.dtype(), T => {
        let rows = logits.rows::<T>()?;
        Ok(py.detach(|| margins(&rows, &groups, temperature))?.into_pyarray(py))
    })
}

/// Gaps of groups of ids, rows × groups.
#[pyfunction]
fn row_max_gap<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    groups: Vec<Vec<i64>>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let logits = batch(logits)?;
    let groups = Groups::new("groups", &groups)?;
    with_dtype!(logits.dtype(), T => {
        let rows = logits.rows::<T>()?;
        Ok(py.detach(|| max_gaps(&rows, &groups))?.into_pyarray(py))
    })
}

fn rule(name: &str) -> Result<Rule> {
    match name {
        "ratio" => Ok(Rule::Ratio),
        "argmax_then_threshold" => Ok(Rule::ArgmaxThenThreshold),
        "mass" => Ok(Rule::Mass),
        _ => Err(Error::value(
            "rule",
            "\"ratio\", \"argmax_then_threshold\" or \"mass\"",
            format!("{name:?}"),
        )),
    }
}

/// What a row does that does not refuse: "keep", "free" or a token id.
fn no_fire(value: &Bound<'_, PyAny>) -> PyResult<NoFire> {
    let wrong = || Error::value("on_no_fire", "\"keep\", \"free\" or a token id", value);
    if let Ok(name) = value.extract::<String>() {
        return match name.as_str() {
            "keep" => Ok(NoFire::Keep),
            "free" => Ok(NoFire::Free),
            _ => Err(wrong().into()),
        };
    }
    let id: i64 = value.extract().map_err(|_| wrong())?;
    Ok(NoFire::Respond(u32::try_from(id).map_err(|_| wrong())?))
}

/// Refusal categories, their biases and thresholds, checked once.
#[pyclass(frozen, module = "abjure._native")]
struct RefusalGate(Gate);

#[pymethods]
impl RefusalGate {
    #[new]
    fn new(
        categories: Vec<Vec<i64>>,
        bias: Vec<f64>,
        thresholds: Vec<Option<f64>>,
        rule: &str,
        on_no_fire: &Bound<'_, PyAny>,
        temperature: f64,
    ) -> PyResult<Self> {
        let options = GateOptions {
            bias,
            thresholds,
            rule: self::rule(rule)?,
            no_fire: no_fire(on_no_fire)?,
            temperature,
        };
        Ok(Self(Gate::new(&categories, options)?))
    }

    /// Decides and writes, given how many response tokens each row has (a negative number: it is left alone): the gate is
    /// at the first position or, with `every`, at all, and `mask` removes the tokens elsewhere. Returns the verdicts, None
    /// where no row is at its gate.
    fn apply_<'py>(
        &self,
        py: Python<'py>,
        logits: &Bound<'py, PyAny>,
        generated: Ids<'py>,
        every: bool,
        mask: bool,
    ) -> PyResult<Option<Bound<'py, PyArray1<i64>>>> {
        let mut logits = batch(logits)?;
        let position = |n: &i64| match n {
            0 => Position::Gate,
            1.. if every => Position::Gate,
            1.. if mask => Position::Mask,
            _ => Position::Elsewhere,
        };
        let generated = slice(&generated, "generated")?;
        let positions: Vec<Position> = generated.iter().map(position).collect();
        let asked = positions.contains(&Position::Gate);
        with_dtype!(logits.dtype(), T => {
            let rows = logits.rows_mut::<T>()?;
            let verdicts = py.detach(|| self.0.apply(rows, &positions))?;
            Ok(asked.then(|| verdicts.into_pyarray(py)))
        })
    }
}

/// The bytes of every token, ascending; what automata over the same tokens share.
#[pyclass(frozen, module = "abjure._native")]
struct ByteVocabulary(Arc<Vocabulary>);

#[pymethods]
impl ByteVocabulary {
    /// Text of each token in the order of their ids, empty for one without.
    #[new]
    fn new(
        py: Python<'_>,
        tokens: Vec<PyBackedBytes>,
        fold: bool,
        transparent: bool,
    ) -> PyResult<Self> {
        let reading = Reading { fold, transparent };
        let tokens: Vec<&[u8]> = tokens.iter().map(AsRef::as_ref).collect();
        let built = py.detach(|| Vocabulary::new(&tokens, reading));
        Ok(Self(Arc::new(built?)))
    }

    #[getter]
    fn size(&self) -> usize {
        self.0.len()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }
}

/// Forbidden phrases of token ids or of bytes, ready to be matched.
#[pyclass(frozen, module = "abjure._native")]
struct PhraseAutomaton(Box<dyn Matcher>);

type Csr<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<f64>>,
);

#[pymethods]
impl PhraseAutomaton {
    #[new]
    #[pyo3(signature = (ids, lengths, vocab_size, max_length, penalty=None))]
    fn new(
        py: Python<'_>,
        ids: Ids<'_>,
        lengths: Ids<'_>,
        vocab_size: Option<usize>,
        max_length: usize,
        penalty: Option<(f64, f64)>,
    ) -> PyResult<Self> {
        let mut rest = slice(&ids, "phrases")?;
        let mut phrases = Vec::with_capacity(lengths.len()?);
        for n in slice(&lengths, "phrases")? {
            let n = usize::try_from(*n).unwrap_or(0).min(rest.len());
            let (phrase, after) = rest.split_at(n);
            phrases.push(phrase);
            rest = after;
        }
        let penalty = penalty.map(|(strength, exponent)| Penalty { strength, exponent });
        let built = py.detach(|| Automaton::new(&phrases, vocab_size, max_length, penalty));
        Ok(Self(Box::new(built?)))
    }

    /// Phrases of bytes over a vocabulary; with `word` they begin where no word runs on.
    #[staticmethod]
    #[pyo3(signature = (phrases, vocabulary, word, max_length, penalty=None))]
    fn from_bytes(
        py: Python<'_>,
        phrases: Vec<PyBackedBytes>,
        vocabulary: &ByteVocabulary,
        word: bool,
        max_length: usize,
        penalty: Option<(f64, f64)>,
    ) -> PyResult<Self> {
        let phrases: Vec<&[u8]> = phrases.iter().map(AsRef::as_ref).collect();
        let penalty = penalty.map(|(strength, exponent)| Penalty { strength, exponent });
        let vocabulary = vocabulary.0.clone();
        let built =
            py.detach(|| ByteAutomaton::new(&phrases, vocabulary, word, max_length, penalty));
        Ok(Self(Box::new(built?)))
    }

    #[getter]
    fn reach(&self) -> usize {
        self.0.reach()
    }

    #[getter]
    fn phrases(&self) -> usize {
        self.0.phrases()
    }

    #[getter]
    fn nodes(&self) -> usize {
        self.0.nodes()
    }

    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }

    /// What each row's context writes: row offsets, ids, values. `context` holds `begin.len()` rows.
    fn edits<'py>(
        &self,
        py: Python<'py>,
        context: Ids<'py>,
        begin: Ids<'py>,
    ) -> PyResult<Csr<'py>> {
        let contexts = contexts(&context, &begin)?;
        let (indptr, ids, values) = py.detach(|| edits(&*self.0, &contexts))?;
        Ok((
            indptr.into_pyarray(py),
            ids.into_pyarray(py),
            values.into_pyarray(py),
        ))
    }

    /// Writes what the columns of `input_ids` from `start` on say; `begin` is the first of these that counts, per row
    /// (none: all). A row without a token left is forced to `dead_end`.
    #[pyo3(signature = (logits, input_ids, start, begin=None, dead_end=None))]
    fn apply_(
        &self,
        py: Python<'_>,
        logits: &Bound<'_, PyAny>,
        input_ids: &Bound<'_, PyAny>,
        start: usize,
        begin: Option<Ids<'_>>,
        dead_end: Option<u32>,
    ) -> PyResult<()> {
        let mut logits = batch(logits)?;
        let ids = int64_columns(input_ids, "input_ids", start)?;
        let rows = logits.shape()[0];
        let begin = match &begin {
            Some(begin) => slice(begin, "begin")?,
            None => &vec![0; rows],
        };
        let contexts = Contexts::new(&ids, ids.len().checked_div(rows).unwrap_or(0), begin)?;
        with_dtype!(logits.dtype(), T => {
            let rows = logits.rows_mut::<T>()?;
            Ok(py.detach(|| apply(&*self.0, rows, &contexts, dead_end))?)
        })
    }
}

fn contexts<'a>(context: &'a Ids<'_>, begin: &'a Ids<'_>) -> Result<Contexts<'a>> {
    let (ids, begin) = (slice(context, "input_ids")?, slice(begin, "begin")?);
    Contexts::new(ids, ids.len().checked_div(begin.len()).unwrap_or(0), begin)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(bias_, m)?)?;
    m.add_function(wrap_pyfunction!(force_, m)?)?;
    m.add_function(wrap_pyfunction!(lse, m)?)?;
    m.add_function(wrap_pyfunction!(row_margin, m)?)?;
    m.add_function(wrap_pyfunction!(row_max_gap, m)?)?;
    m.add_class::<RefusalGate>()?;
    m.add_class::<ByteVocabulary>()?;
    m.add_class::<PhraseAutomaton>()
}
