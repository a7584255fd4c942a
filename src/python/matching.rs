//! Bindings of the phrase matcher.

use crate::Error;
use crate::measure::matching::{Form, Found, Matcher, Place, fold};
use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyString};

type Columns<'py> = (
    Bound<'py, PyArray1<i32>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
);

/// Codes in the column of phrases.
const NOTHING: i32 = -1;
const BLANK: i32 = -2;
const ABSENT: i32 = -3;

/// Index of the first phrase in each response (-1 none, -2 a blank one, -3 missing), where it begins and where it ends.
#[pyfunction]
fn match_phrases<'py>(
    py: Python<'py>,
    responses: &Bound<'py, PyList>,
    phrases: Vec<String>,
    form: &str,
    place: &str,
    limit: usize,
) -> PyResult<Columns<'py>> {
    let form = match form {
        "exact" => Form::Exact,
        "lower" => Form::Lower,
        "folded" => Form::Folded,
        _ => return Err(Error::value("form", "exact, lower or folded", form).into()),
    };
    let place = match place {
        "anywhere" => Place::Anywhere,
        "prefix" => Place::Prefix { trim: false },
        "trimmed_prefix" => Place::Prefix { trim: true },
        "first_n_words" => Place::Words(limit),
        "first_n_chars" => Place::Chars(limit),
        _ => return Err(Error::value("where", "a place in the text", place).into()),
    };
    let matcher = Matcher::new(&phrases, form, place)?;
    // Strings do not change, and these hold on to them while the lock is released.
    let held: Vec<Bound<'py, PyAny>> = responses.iter().collect();
    let mut shown = Vec::with_capacity(held.len());
    for (i, item) in held.iter().enumerate() {
        if let Ok(text) = item.cast::<PyString>() {
            let text = text.to_str().map_err(|_| {
                let found = format!("a lone surrogate at index {i}");
                Error::value("responses", "valid Unicode", found)
            })?;
            shown.push(Some(text));
        } else if absent(item)? {
            shown.push(None);
        } else {
            return Err(Error::DType {
                arg: "responses",
                expected: "str".to_owned(),
                found: format!("{} at index {i}", item.get_type().name()?),
            }
            .into());
        }
    }
    let found = py.detach(|| matcher.find_all(&shown));
    let mut index = Vec::with_capacity(found.len());
    let (mut start, mut end) = (
        Vec::with_capacity(found.len()),
        Vec::with_capacity(found.len()),
    );
    for f in found {
        let (i, a, b) = match f {
            // The constructor keeps the number of phrases within i32; lengths of texts fit i64.
            Some(Found::Phrase { index, start, end }) => (index as i32, start as i64, end as i64),
            Some(Found::Nothing) => (NOTHING, -1, -1),
            Some(Found::Blank) => (BLANK, -1, -1),
            None => (ABSENT, -1, -1),
        };
        index.push(i);
        start.push(a);
        end.push(b);
    }
    Ok((
        PyArray1::from_vec(py, index),
        PyArray1::from_vec(py, start),
        PyArray1::from_vec(py, end),
    ))
}

/// None, NaN, and the missing value of pandas.
fn absent(item: &Bound<'_, PyAny>) -> PyResult<bool> {
    Ok(item.is_none()
        || item.extract::<f64>().is_ok_and(f64::is_nan)
        || item.get_type().name()? == "NAType")
}

/// The text in the form in which refusals are compared.
#[pyfunction]
fn fold_text(text: &str) -> String {
    fold(text)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(match_phrases, m)?)?;
    m.add_function(wrap_pyfunction!(fold_text, m)?)
}
