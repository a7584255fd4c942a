//! Bindings of document vectors, cosines and outliers.

use super::long::run_long;
use super::text::{held, item, strings, tokenizer};
use crate::Error;
use crate::measure::text::doc2vec::{self, Documents, Options};
use crate::measure::text::intern::Strings;
use crate::measure::text::similar::{self, Matrix};
use crate::measure::text::tokens::{Stream, UNKNOWN};
use numpy::{PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

type Vector<'py, T> = Bound<'py, PyArray1<T>>;

/// Numbers of the known words of texts, one after another, where each text ends, and how often each word occurs. Without
/// `words` those are known that occur `min_count` times, the most frequent first; they are the last value.
#[pyfunction]
#[allow(clippy::type_complexity)]
fn text_words<'py>(
    py: Python<'py>,
    texts: &Bound<'py, PyList>,
    options: &Bound<'py, PyDict>,
    words: Option<Vec<String>>,
    min_count: u64,
) -> PyResult<(
    Vector<'py, u32>,
    Vector<'py, i64>,
    Vector<'py, u64>,
    Vec<String>,
)> {
    let (tokenizer, held) = (tokenizer(options)?, held(texts)?);
    let texts = strings(&held)?;
    let (numbers, ends, counts, words) = py.detach(|| {
        let (mut all, mut stream) = (Strings::default(), Stream::default());
        let given = words.is_some();
        words.iter().flatten().for_each(|w| {
            all.intern(w.as_bytes());
        });
        let mut ends = Vec::with_capacity(texts.len());
        for text in &texts {
            match given {
                true => {
                    tokenizer.append(text, &mut stream, &mut |w| all.find(w).unwrap_or(UNKNOWN))
                }
                false => tokenizer.append(text, &mut stream, &mut |w| all.intern(w)),
            }
            ends.push(stream.tokens.len());
        }
        let mut counts = vec![0u64; all.len()];
        for token in stream.tokens.iter().filter(|t| **t != UNKNOWN) {
            counts[*token as usize] += 1;
        }
        let mut order: Vec<usize> = (0..all.len()).collect();
        if !given {
            order.retain(|i| counts[*i] >= min_count);
            order.sort_by(|a, b| {
                (counts[*b].cmp(&counts[*a]))
                    .then_with(|| all.get(*a as u32).cmp(all.get(*b as u32)))
            });
        }
        let mut number = vec![UNKNOWN; all.len()];
        (order.iter().enumerate()).for_each(|(new, old)| number[*old] = new as u32);
        let (mut numbers, mut kept, mut start) = (Vec::new(), Vec::with_capacity(ends.len()), 0);
        for end in ends {
            let known = stream.tokens[start..end].iter().filter(|t| **t != UNKNOWN);
            numbers.extend(known.map(|t| number[*t as usize]).filter(|n| *n != UNKNOWN));
            kept.push(numbers.len() as i64);
            start = end;
        }
        let spelled = order
            .iter()
            .map(|i| String::from_utf8_lossy(all.get(*i as u32)).into_owned());
        let words: Vec<String> = spelled.collect();
        let counts: Vec<u64> = order.iter().map(|i| counts[*i]).collect();
        (numbers, kept, counts, words)
    });
    Ok((
        PyArray1::from_vec(py, numbers),
        PyArray1::from_vec(py, ends),
        PyArray1::from_vec(py, counts),
        words,
    ))
}

fn learning(o: &Bound<'_, PyDict>) -> PyResult<Options> {
    Ok(Options {
        size: item(o, "size")?,
        window: item(o, "window")?,
        negative: item(o, "negative")?,
        sample: item(o, "sample")?,
        epochs: item(o, "epochs")?,
        rate: item(o, "rate")?,
        seed: item(o, "seed")?,
    })
}

/// Vectors of documents, of words, and the weights that tell words apart, each flat by row.
#[pyfunction]
#[allow(clippy::type_complexity)]
fn document_vectors<'py>(
    py: Python<'py>,
    words: PyReadonlyArray1<'py, u32>,
    ends: PyReadonlyArray1<'py, i64>,
    counts: PyReadonlyArray1<'py, u64>,
    options: &Bound<'py, PyDict>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Vector<'py, f32>, Vector<'py, f32>, Vector<'py, f32>)> {
    let documents = Documents {
        words: words.as_slice()?,
        ends: ends.as_slice()?,
    };
    let (counts, options) = (counts.as_slice()?, learning(options)?);
    let model = run_long(py, progress, |cancel| {
        doc2vec::train(documents, counts, &options, cancel)
    })?;
    Ok((
        PyArray1::from_vec(py, model.documents),
        PyArray1::from_vec(py, model.words),
        PyArray1::from_vec(py, model.context),
    ))
}

/// Vectors of documents that were not learned from, flat by row.
#[pyfunction]
fn infer_vectors<'py>(
    py: Python<'py>,
    words: PyReadonlyArray1<'py, u32>,
    ends: PyReadonlyArray1<'py, i64>,
    counts: PyReadonlyArray1<'py, u64>,
    context: PyReadonlyArray1<'py, f32>,
    options: &Bound<'py, PyDict>,
) -> PyResult<Vector<'py, f32>> {
    let documents = Documents {
        words: words.as_slice()?,
        ends: ends.as_slice()?,
    };
    let (counts, context, options) = (counts.as_slice()?, context.as_slice()?, learning(options)?);
    let found = run_long(py, None, |cancel| {
        doc2vec::infer(documents, counts, context, &options, cancel)
    })?;
    Ok(PyArray1::from_vec(py, found))
}

/// Cosines of rows with queries, flat by row.
#[pyfunction]
fn row_cosines<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    queries: PyReadonlyArray2<'py, f32>,
) -> PyResult<Vector<'py, f64>> {
    let left = Matrix::new(x.as_slice()?, x.shape()[1], "x")?;
    let right = Matrix::new(queries.as_slice()?, queries.shape()[1], "queries")?;
    Ok(PyArray1::from_vec(
        py,
        py.detach(|| similar::cosines(left, right))?,
    ))
}

/// Local outlier factor of each row.
#[pyfunction]
fn local_outlier_factor<'py>(
    py: Python<'py>,
    x: PyReadonlyArray2<'py, f32>,
    neighbors: usize,
) -> PyResult<Vector<'py, f64>> {
    let x = Matrix::new(x.as_slice()?, x.shape()[1], "x")?;
    let found = py.detach(|| similar::local_outlier_factor(x, neighbors));
    Ok(PyArray1::from_vec(
        py,
        found.map_err(|e: Error| PyErr::from(e))?,
    ))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(text_words, m)?)?;
    m.add_function(wrap_pyfunction!(document_vectors, m)?)?;
    m.add_function(wrap_pyfunction!(infer_vectors, m)?)?;
    m.add_function(wrap_pyfunction!(row_cosines, m)?)?;
    m.add_function(wrap_pyfunction!(local_outlier_factor, m)?)
}
