//! Bindings of trees on codes.

use super::long::run_long;
use crate::Error;
use crate::protect::tree::{self, Codes, Limits, Node, Target};
use numpy::{IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

type Column<'py, T> = Bound<'py, PyArray1<T>>;
type Tree<'py> = (
    Column<'py, i64>,
    Column<'py, i64>,
    Column<'py, i64>,
    Column<'py, i64>,
    Column<'py, f64>,
);

fn limits(
    alpha: f64,
    leaves: usize,
    leaf_rows: usize,
    depth: Option<usize>,
    features: usize,
) -> Limits {
    Limits {
        alpha,
        leaves,
        leaf_rows,
        depth: depth.unwrap_or(usize::MAX),
        features,
    }
}

/// A tree grown best first on codes: features (-1 for a leaf), codes that go left, left and right children, class shares.
#[pyfunction]
#[pyo3(signature = (codes, targets, classes, alpha, leaves, leaf_rows, depth=None, rows=None))]
#[allow(clippy::too_many_arguments)]
fn grow_tree<'py>(
    py: Python<'py>,
    codes: PyReadonlyArray2<'py, u16>,
    targets: Vec<PyReadonlyArray1<'py, i64>>,
    classes: Vec<usize>,
    alpha: f64,
    leaves: usize,
    leaf_rows: usize,
    depth: Option<usize>,
    rows: Option<PyReadonlyArray1<'py, i64>>,
) -> PyResult<Tree<'py>> {
    let [n, features] = [codes.shape()[0], codes.shape()[1]];
    if classes.len() != targets.len() {
        let expected = format!("{} numbers, one per target", targets.len());
        return Err(Error::shape("classes", expected, classes.len()).into());
    }
    let table = Codes::new(codes.as_slice()?, features)?;
    let targets = targets
        .iter()
        .zip(&classes)
        .map(|(t, c)| Ok(Target::new(t.as_slice()?, *c, n)?))
        .collect::<PyResult<Vec<Target>>>()?;
    let rows = rows.as_ref().map(|r| r.as_slice()).transpose()?;
    let limits = limits(alpha, leaves, leaf_rows, depth, features);
    let nodes = run_long(py, None, |cancel| {
        tree::grow(table, &targets, limits, rows, cancel)
    })?;
    let column =
        |f: &dyn Fn(&Node) -> i64| nodes.iter().map(f).collect::<Vec<i64>>().into_pyarray(py);
    Ok((
        column(&|n| n.feature.map_or(-1, |f| f as i64)),
        column(&|n| i64::from(n.code)),
        column(&|n| n.left as i64),
        column(&|n| n.right as i64),
        nodes
            .iter()
            .flat_map(|n| n.shares.clone())
            .collect::<Vec<f64>>()
            .into_pyarray(py),
    ))
}

/// Class probabilities of `queries`, row after row, by a forest grown on `codes`.
#[pyfunction]
#[pyo3(signature = (codes, target, classes, queries, trees, leaves, leaf_rows, features, seed))]
#[allow(clippy::too_many_arguments)]
fn forest_probabilities<'py>(
    py: Python<'py>,
    codes: PyReadonlyArray2<'py, u16>,
    target: PyReadonlyArray1<'py, i64>,
    classes: usize,
    queries: PyReadonlyArray2<'py, u16>,
    trees: usize,
    leaves: usize,
    leaf_rows: usize,
    features: usize,
    seed: u64,
) -> PyResult<Column<'py, f64>> {
    let table = Codes::new(codes.as_slice()?, codes.shape()[1])?;
    let asked = Codes::new(queries.as_slice()?, queries.shape()[1])?;
    let target = Target::new(target.as_slice()?, classes, table.rows())?;
    let limits = limits(0.0, leaves, leaf_rows, None, features);
    let found = run_long(py, None, |cancel| {
        tree::forest(table, &target, asked, trees, limits, seed, cancel)
    })?;
    Ok(found.into_pyarray(py))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(grow_tree, m)?)?;
    m.add_function(wrap_pyfunction!(forest_probabilities, m)?)
}
