//! Bindings of the text classifiers.

use super::long::run_long;
use crate::Error;
use crate::measure::text::intern::Strings;
use crate::measure::text::logistic::{self, Sparse};
use crate::measure::text::ngrams::{self, Counts, Limits, Norm};
use crate::measure::text::tokens::{Analyzer, Tokenizer};
use crate::measure::text::vocabulary::Vocabulary;
use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList, PyString};

type Vector<'py, T> = Bound<'py, PyArray1<T>>;
/// N-grams, where each ends, their texts, the counts.
type Found<'py> = (
    Vector<'py, u8>,
    Vector<'py, i64>,
    Vector<'py, u64>,
    Rows<'py>,
);
type Rows<'py> = (Vector<'py, i64>, Vector<'py, i32>, Vector<'py, f64>);

pub fn item<'py, T: for<'a> FromPyObject<'a, 'py, Error = PyErr>>(
    options: &Bound<'py, PyDict>,
    name: &'static str,
) -> PyResult<T> {
    match options.get_item(name)? {
        Some(value) => value.extract(),
        None => Err(Error::value("options", format!("an entry {name:?}"), "none").into()),
    }
}

pub fn tokenizer(options: &Bound<'_, PyDict>) -> PyResult<Tokenizer> {
    let (name, pattern): (String, String) =
        (item(options, "analyzer")?, item(options, "token_pattern")?);
    let analyzer = match (&name[..], &pattern[..]) {
        ("word", "two") => Analyzer::Word {
            shortest: 2,
            apostrophes: false,
        },
        ("word", "one") => Analyzer::Word {
            shortest: 1,
            apostrophes: false,
        },
        ("word", "apostrophe") => Analyzer::Word {
            shortest: 1,
            apostrophes: true,
        },
        ("char", _) => Analyzer::Char,
        ("char_wb", _) => Analyzer::CharWordBoundary,
        _ => return Err(Error::value("analyzer", "word, char or char_wb", name).into()),
    };
    let mut stop = Strings::default();
    for word in item::<Vec<String>>(options, "stop_words")? {
        stop.intern(word.as_bytes());
    }
    let (shortest, longest) = item(options, "ngram_range")?;
    Ok(Tokenizer {
        analyzer,
        lowercase: item(options, "lowercase")?,
        stop,
        shortest,
        longest,
    })
}

/// The strings of a list, held by it.
pub fn strings<'a>(held: &'a [Bound<'_, PyString>]) -> PyResult<Vec<&'a str>> {
    (held.iter().enumerate())
        .map(|(i, s)| {
            s.to_str().map_err(|_| {
                Error::value(
                    "texts",
                    "text that UTF-8 can hold",
                    format!("a lone surrogate in text {i}"),
                )
                .into()
            })
        })
        .collect()
}

pub fn held<'py>(texts: &Bound<'py, PyList>) -> PyResult<Vec<Bound<'py, PyString>>> {
    texts
        .iter()
        .map(|t| Ok(t.cast_into::<PyString>()?))
        .collect()
}

fn arrays(py: Python<'_>, rows: Counts) -> Rows<'_> {
    (
        PyArray1::from_vec(py, rows.indptr),
        PyArray1::from_vec(py, rows.indices),
        PyArray1::from_vec(py, rows.data),
    )
}

/// The n-grams of texts: their UTF-8 one after another, where each ends, in how many texts each is, and the counts.
#[pyfunction]
fn text_ngrams<'py>(
    py: Python<'py>,
    texts: &Bound<'py, PyList>,
    options: &Bound<'py, PyDict>,
    min_df: u64,
    max_df: u64,
    max_features: Option<usize>,
    binary: bool,
) -> PyResult<Found<'py>> {
    let (tokenizer, held) = (tokenizer(options)?, held(texts)?);
    let texts = strings(&held)?;
    let limits = Limits {
        min_df,
        max_df,
        max_features,
        binary,
    };
    let found = run_long(py, None, |cancel| {
        ngrams::find(&texts, &tokenizer, &limits, cancel)
    })?;
    Ok((
        PyArray1::from_vec(py, found.terms.into_bytes()),
        PyArray1::from_vec(py, found.ends),
        PyArray1::from_vec(py, found.df),
        arrays(py, found.rows),
    ))
}

/// Counts weighted by sublinear frequency, inverse document frequency and the length of the row: new data.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn text_weights<'py>(
    py: Python<'py>,
    indptr: PyReadonlyArray1<'py, i64>,
    indices: PyReadonlyArray1<'py, i32>,
    data: PyReadonlyArray1<'py, f64>,
    idf: PyReadonlyArray1<'py, f64>,
    use_idf: bool,
    sublinear: bool,
    norm: &str,
) -> PyResult<Vector<'py, f64>> {
    let norm = match norm {
        "l1" => Norm::L1,
        "l2" => Norm::L2,
        _ => Norm::None,
    };
    let idf = idf.as_slice()?;
    let rows = Sparse {
        indptr: indptr.as_slice()?,
        indices: indices.as_slice()?,
        data: data.as_slice()?,
        columns: idf.len(),
    };
    rows.check()?;
    let mut counts = Counts {
        indptr: rows.indptr.to_vec(),
        indices: rows.indices.to_vec(),
        data: rows.data.to_vec(),
    };
    py.detach(|| ngrams::weight(&mut counts, use_idf.then_some(idf), sublinear, norm));
    Ok(PyArray1::from_vec(py, counts.data))
}

/// N-grams with columns, counted in texts.
#[pyclass(frozen, module = "abjure._native")]
struct TextVocabulary(Vocabulary);

#[pymethods]
impl TextVocabulary {
    #[new]
    fn new(
        py: Python<'_>,
        terms: PyReadonlyArray1<'_, u8>,
        ends: PyReadonlyArray1<'_, i64>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Self> {
        let malformed = || Error::value("terms", "UTF-8 and the ends of n-grams in it", "others");
        let all = std::str::from_utf8(terms.as_slice()?).map_err(|_| malformed())?;
        let ends = ends.as_slice()?;
        let mut split = Vec::with_capacity(ends.len());
        let mut start = 0;
        for end in ends {
            split.push(
                all.get(start..usize::try_from(*end).unwrap_or(usize::MAX))
                    .ok_or_else(malformed)?,
            );
            start = *end as usize;
        }
        let tokenizer = tokenizer(options)?;
        Ok(Self(py.detach(|| {
            Vocabulary::new(split.into_iter(), tokenizer)
        })?))
    }

    #[getter]
    fn columns(&self) -> usize {
        self.0.columns()
    }

    fn count<'py>(
        &self,
        py: Python<'py>,
        texts: &Bound<'py, PyList>,
        binary: bool,
    ) -> PyResult<Rows<'py>> {
        let held = held(texts)?;
        let texts = strings(&held)?;
        Ok(arrays(py, py.detach(|| self.0.count(&texts, binary))))
    }
}

type Logistic<'py> = (Vector<'py, f64>, Vector<'py, f64>, f64, f64, usize, bool);

/// Weights (one a column and class, flat by column), intercepts, loss, gradient, iterations, whether converged.
#[pyfunction]
#[allow(clippy::too_many_arguments)]
fn sparse_logistic<'py>(
    py: Python<'py>,
    indptr: PyReadonlyArray1<'py, i64>,
    indices: PyReadonlyArray1<'py, i32>,
    data: PyReadonlyArray1<'py, f64>,
    columns: usize,
    y: PyReadonlyArray1<'py, u32>,
    classes: usize,
    c: f64,
    balanced: bool,
    penalize_intercept: bool,
    tol: f64,
    max_iter: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Logistic<'py>> {
    let x = Sparse {
        indptr: indptr.as_slice()?,
        indices: indices.as_slice()?,
        data: data.as_slice()?,
        columns,
    };
    let y = y.as_slice()?;
    let options = logistic::Options {
        c,
        balanced,
        penalize_intercept,
        tol,
        max_iter,
    };
    let fit = run_long(py, progress, |cancel| {
        logistic::fit(&x, y, classes, &options, cancel)
    })?;
    Ok((
        PyArray1::from_vec(py, fit.coef),
        PyArray1::from_vec(py, fit.intercept),
        fit.loss,
        fit.gradient,
        fit.iterations,
        fit.converged,
    ))
}

/// `x W + b`, flat by row.
#[pyfunction]
fn sparse_decision<'py>(
    py: Python<'py>,
    indptr: PyReadonlyArray1<'py, i64>,
    indices: PyReadonlyArray1<'py, i32>,
    data: PyReadonlyArray1<'py, f64>,
    coef: PyReadonlyArray1<'py, f64>,
    intercept: PyReadonlyArray1<'py, f64>,
) -> PyResult<Vector<'py, f64>> {
    let (coef, intercept) = (coef.as_slice()?, intercept.as_slice()?);
    if intercept.is_empty() || !coef.len().is_multiple_of(intercept.len()) {
        return Err(Error::shape("coef", "a weight per column and class", coef.len()).into());
    }
    let columns = coef.len() / intercept.len();
    let x = Sparse {
        indptr: indptr.as_slice()?,
        indices: indices.as_slice()?,
        data: data.as_slice()?,
        columns,
    };
    x.check()?;
    Ok(PyArray1::from_vec(
        py,
        py.detach(|| x.times(coef, intercept)),
    ))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<TextVocabulary>()?;
    m.add_function(wrap_pyfunction!(text_ngrams, m)?)?;
    m.add_function(wrap_pyfunction!(text_weights, m)?)?;
    m.add_function(wrap_pyfunction!(sparse_logistic, m)?)?;
    m.add_function(wrap_pyfunction!(sparse_decision, m)?)
}
