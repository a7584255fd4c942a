//! Bindings of the protect wing.

use super::array::Array;
use super::long::run_long;
use crate::cancel::Cancel;
use crate::element::Element;
use crate::protect::ascent::{self, Against, Batch, Per, Plan};
use crate::protect::bandwidth::{self, Rule};
use crate::protect::cross::{self, CentreGradient, Centres, NO_OWN, Outcome, Queries};
use crate::protect::neighbours;
use crate::protect::pairs;
use crate::protect::project::{Limits, Norm};
use crate::protect::subsample;
use crate::protect::{
    LeaveOneOut, Objective, Points, Scalar, Singleton, Sorted, Spare, Spec, mean,
};
use crate::random::Random;
use crate::view::Rows;
use crate::{Error, Result, par, with_dtype};
use numpy::{Element as NumpyElement, IntoPyArray, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyDict;

fn objective(name: &str, tau: f64) -> Result<Objective> {
    Ok(match name {
        "plugin" => Objective::Plugin,
        "gini" => Objective::Gini,
        "entropy" => Objective::Entropy,
        "soft" => Objective::Soft,
        "soft_capped" => Objective::SoftCapped,
        "nll" => Objective::Nll,
        "softmax_tau" if tau > 0.0 && tau.is_finite() => Objective::SoftmaxTau(tau),
        "softmax_tau" => return Err(Error::value("tau", "a positive number", tau)),
        _ => {
            let known = "\"plugin\", \"gini\", \"softmax_tau\", \"entropy\", \"soft\", \"soft_capped\" or \"nll\"";
            return Err(Error::value("objective", known, name));
        }
    })
}

/// The numerical part of a call: what is computed, not of which data.
fn spec(options: &Bound<'_, PyDict>, classes: usize) -> PyResult<Spec> {
    let get = |key: &str| -> PyResult<Bound<'_, PyAny>> {
        options
            .get_item(key)?
            .ok_or_else(|| pyo3::exceptions::PyKeyError::new_err(key.to_owned()))
    };
    let loo: String = get("leave_one_out")?.extract()?;
    let singleton: String = get("singleton")?.extract()?;
    let bandwidths: Vec<f64> = get("bandwidths")?.extract()?;
    if bandwidths.is_empty() {
        return Err(Error::value("bandwidth", "at least one", 0).into());
    }
    for h in &bandwidths {
        // Squares must be normal numbers in f32.
        if !(1e-15..=1e15).contains(h) {
            return Err(
                Error::value("bandwidth", "a positive number between 1e-15 and 1e15", h).into(),
            );
        }
    }
    Ok(Spec {
        classes,
        bandwidths,
        objective: objective(
            &get("objective")?.extract::<String>()?,
            get("tau")?.extract()?,
        )?,
        leave_one_out: match loo.as_str() {
            "none" => LeaveOneOut::None,
            "plain" => LeaveOneOut::Plain,
            "corrected" => LeaveOneOut::Corrected,
            _ => {
                let known = "\"corrected\", \"plain\" or \"none\"";
                return Err(Error::value("leave_one_out", known, loo).into());
            }
        },
        singleton: match singleton.as_str() {
            // "error" has been dealt with by then.
            "keep" | "error" => Singleton::Keep,
            "exclude" => Singleton::Exclude,
            _ => {
                let known = "\"error\", \"exclude\" or \"keep\"";
                return Err(Error::value("singleton", known, singleton).into());
            }
        },
        priors: get("priors")?.extract()?,
    })
}

fn labels(
    values: &PyReadonlyArray1<'_, i64>,
    arg: &'static str,
    rows: usize,
    classes: usize,
) -> Result<Vec<u32>> {
    let values = values.as_array();
    if values.len() != rows {
        return Err(Error::shape(
            arg,
            format!("{rows} labels, one per row"),
            values.len(),
        ));
    }
    let code = |v: &i64| match usize::try_from(*v) {
        Ok(c) if c < classes => Ok(c as u32),
        _ => Err(Error::value(
            arg,
            format!("class codes from 0 to {}", classes - 1),
            v,
        )),
    };
    values.iter().map(code).collect()
}

fn matrix<'a, T: Element>(array: &'a Array<'_>, arg: &'static str) -> Result<Rows<'a, T>> {
    if array.shape().len() != 2 {
        return Err(Error::shape(
            arg,
            "a matrix of rows × features",
            format!("shape {:?}", array.shape()),
        ));
    }
    array.rows::<T>()
}

fn report<'py, R: Scalar + NumpyElement>(
    py: Python<'py>,
    out: Outcome<R>,
    width: usize,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let m = out.mean;
    for (name, value) in [
        ("value", m.value),
        ("plugin", m.plugin),
        ("gini", m.gini),
        ("soft", m.soft),
        ("entropy", m.entropy),
        ("nll", m.nll),
        ("own_label_error", m.wrong),
        ("rows", m.counted),
    ] {
        dict.set_item(name, value)?;
    }
    let counted = out.rows.iter().filter(|r| r.counted > 0.0);
    dict.set_item(
        "values",
        counted
            .map(|r| r.value)
            .collect::<Vec<f64>>()
            .into_pyarray(py),
    )?;
    dict.set_item("posterior", out.posterior.into_pyarray(py))?;
    for (name, flat) in [
        ("centre_gradient", out.centre_gradient),
        ("query_gradient", out.query_gradient),
    ] {
        let rows = flat.len() / width;
        dict.set_item(
            name,
            flat.into_pyarray(py)
                .call_method1("reshape", (rows, width))?,
        )?;
    }
    Ok(dict)
}

/// Counts a finished tile, unless the caller gave up.
fn tile(cancel: &Cancel) -> Result<()> {
    cancel.advance(1);
    cancel.check()
}

/// Readings of the posterior of `x` among itself, and the gradient of the objective.
#[pyfunction]
#[pyo3(signature = (x, y, classes, options, gradient, posterior, block=None, progress=None))]
#[allow(clippy::too_many_arguments)]
fn published_error<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    y: PyReadonlyArray1<'py, i64>,
    classes: usize,
    options: &Bound<'py, PyDict>,
    gradient: bool,
    posterior: bool,
    block: Option<usize>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let array = Array::extract(x, "x")?;
    let spec = spec(options, classes)?;
    with_dtype!(array.dtype(), T => {
        type R = <T as Element>::Acc;
        let x = matrix::<T>(&array, "x")?;
        let codes = labels(&y, "y", x.rows(), classes)?;
        let out = run_long(py, progress, |cancel| {
            let sorted = Sorted::all(&x, &codes, classes, &mean("x", &x)?);
            let block = block.unwrap_or(R::BLOCK);
            let want = pairs::Want { gradient, posterior };
            let mut out = pairs::evaluate(&spec, &sorted.points, &sorted.segments, want, block, &|| tile(cancel))?;
            out.rows = sorted.restore(&out.rows, 1);
            out.posterior = sorted.restore(&out.posterior, classes);
            out.query_gradient = sorted.restore(&out.query_gradient, x.width());
            Ok(out)
        })?;
        report(py, out, x.width())
    })
}

/// Readings of the posterior of `queries` under the centres `x`, and the gradients of the objective.
#[pyfunction]
#[pyo3(signature = (x, y, classes, queries, query_y, query_rows, options, centre_gradient, query_gradient, posterior,
                    progress=None))]
#[allow(clippy::too_many_arguments)]
fn cross_error<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    y: PyReadonlyArray1<'py, i64>,
    classes: usize,
    queries: &Bound<'py, PyAny>,
    query_y: PyReadonlyArray1<'py, i64>,
    query_rows: PyReadonlyArray1<'py, i64>,
    options: &Bound<'py, PyDict>,
    centre_gradient: &str,
    query_gradient: bool,
    posterior: bool,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (array, query_array) = (Array::extract(x, "x")?, Array::extract(queries, "queries")?);
    query_array.expect_dtype(array.dtype())?;
    let spec = spec(options, classes)?;
    let want = cross::Want {
        centres: match centre_gradient {
            "each" => CentreGradient::Each,
            "class" => CentreGradient::ByClass,
            _ => CentreGradient::No,
        },
        queries: query_gradient,
        posterior,
    };
    with_dtype!(array.dtype(), T => {
        type R = <T as Element>::Acc;
        let (x, queries) = (matrix::<T>(&array, "x")?, matrix::<T>(&query_array, "queries")?);
        if queries.width() != x.width() {
            return Err(Error::shape("queries", format!("{} columns", x.width()), queries.width()).into());
        }
        let codes = labels(&y, "y", x.rows(), classes)?;
        let argument = QueryArgument::new(&query_y, &query_rows, queries.rows(), x.rows(), classes)?;
        let mut out = run_long(py, progress, |cancel| {
            // The queries' mean is of no use; taking it refuses what is not finite.
            mean("queries", &queries)?;
            let mean = mean("x", &x)?;
            let sorted: Sorted<R> = Sorted::all(&x, &codes, classes, &mean);
            let own = argument.own(&sorted.positions(x.rows(), NO_OWN));
            let all: Vec<u32> = (0..queries.rows() as u32).collect();
            let points = Points::gather(&queries, &all, &mean);
            let from = Queries { points: &points, labels: &argument.codes, own: &own };
            let centres = Centres { points: &sorted.points, segments: &sorted.segments };
            let mut out = cross::evaluate(&spec, from, centres, want, &Spare::default(), &|| tile(cancel))?;
            if want.centres == CentreGradient::Each {
                out.centre_gradient = sorted.restore(&out.centre_gradient, x.width());
            }
            Ok(out)
        })?;
        if !posterior {
            out.posterior = Vec::new();
        }
        report(py, out, x.width())
    })
}

/// Queries as the engines take them: their codes, and the row of `x` each must not see (-1 for none).
struct QueryArgument {
    codes: Vec<u32>,
    own: Vec<i64>,
}

impl QueryArgument {
    fn new(
        codes: &PyReadonlyArray1<'_, i64>,
        own: &PyReadonlyArray1<'_, i64>,
        queries: usize,
        rows: usize,
        classes: usize,
    ) -> Result<Self> {
        let codes = labels(codes, "query_labels", queries, classes)?;
        let own = own.as_array();
        if own.len() != queries {
            return Err(Error::shape(
                "query_rows",
                format!("{queries} entries"),
                own.len(),
            ));
        }
        if let Some(row) = own.iter().find(|r| **r < -1 || **r >= rows as i64) {
            let expected = format!("rows of x, 0 to {}, or -1", rows - 1);
            return Err(Error::value("query_rows", expected, row));
        }
        Ok(Self {
            codes,
            own: own.to_vec(),
        })
    }

    /// The own rows as places in `place`.
    fn own(&self, place: &[u32]) -> Vec<u32> {
        let at = |r: &i64| usize::try_from(*r).map_or(NO_OWN, |r| place[r]);
        self.own.iter().map(at).collect()
    }
}

/// Readings of random halves of the data, as arrays of one entry per half.
#[pyfunction]
#[pyo3(signature = (x, y, classes, queries, query_y, query_rows, options, halves, seed, progress=None))]
#[allow(clippy::too_many_arguments)]
fn half_errors<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    y: PyReadonlyArray1<'py, i64>,
    classes: usize,
    queries: &Bound<'py, PyAny>,
    query_y: PyReadonlyArray1<'py, i64>,
    query_rows: PyReadonlyArray1<'py, i64>,
    options: &Bound<'py, PyDict>,
    halves: usize,
    seed: u64,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<Bound<'py, PyDict>> {
    let (array, query_array) = (Array::extract(x, "x")?, Array::extract(queries, "queries")?);
    query_array.expect_dtype(array.dtype())?;
    let spec = spec(options, classes)?;
    let found = with_dtype!(array.dtype(), T => {
        type R = <T as Element>::Acc;
        let (x, queries) = (matrix::<T>(&array, "x")?, matrix::<T>(&query_array, "queries")?);
        if queries.width() != x.width() {
            return Err(Error::shape("queries", format!("{} columns", x.width()), queries.width()).into());
        }
        let codes = labels(&y, "y", x.rows(), classes)?;
        let argument = QueryArgument::new(&query_y, &query_rows, queries.rows(), x.rows(), classes)?;
        run_long(py, progress, |cancel| {
            let mean = mean("x", &x)?;
            let sorted: Sorted<R> = Sorted::all(&x, &codes, classes, &mean);
            let own = argument.own(&sorted.positions(x.rows(), NO_OWN));
            let all: Vec<u32> = (0..queries.rows() as u32).collect();
            let points = Points::gather(&queries, &all, &mean);
            let from = Queries { points: &points, labels: &argument.codes, own: &own };
            let centres = Centres { points: &sorted.points, segments: &sorted.segments };
            subsample::halves(&spec, from, centres, halves, seed, &|| tile(cancel))
        })
    })?;
    let dict = PyDict::new(py);
    let column = |f: fn(&crate::protect::RowReading) -> f64| {
        found.iter().map(f).collect::<Vec<f64>>().into_pyarray(py)
    };
    dict.set_item("value", column(|r| r.value))?;
    dict.set_item("plugin", column(|r| r.plugin))?;
    dict.set_item("gini", column(|r| r.gini))?;
    dict.set_item("soft", column(|r| r.soft))?;
    dict.set_item("entropy", column(|r| r.entropy))?;
    dict.set_item("nll", column(|r| r.nll))?;
    dict.set_item("own_label_error", column(|r| r.wrong))?;
    dict.set_item("rows", column(|r| r.counted))?;
    Ok(dict)
}

/// All rows of `x` as points in their own order.
fn in_order<T: Element<Acc: Scalar>>(x: &Rows<'_, T>) -> Result<Points<T::Acc>> {
    let all: Vec<u32> = (0..x.rows() as u32).collect();
    Ok(Points::gather(x, &all, &mean("x", x)?))
}

/// The `k` rows of `x` nearest to each row of it but itself: indices and squared distances, both rows × k.
#[pyfunction]
#[pyo3(signature = (x, k, progress=None))]
fn nearest_neighbours<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    k: usize,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let array = Array::extract(x, "x")?;
    with_dtype!(array.dtype(), T => {
        let x = matrix::<T>(&array, "x")?;
        if k == 0 || k >= x.rows() {
            return Err(Error::value("k", format!("1 to {} neighbours", x.rows().saturating_sub(1)), k).into());
        }
        let (indices, squared) = run_long(py, progress, |cancel| {
            let points = in_order(&x)?;
            let own: Vec<u32> = (0..x.rows() as u32).collect();
            neighbours::nearest(&points, &own, &points, k, &|| tile(cancel))
        })?;
        let indices: Vec<i64> = indices.into_iter().map(i64::from).collect();
        let shape = (x.rows(), k);
        Ok((
            indices.into_pyarray(py).call_method1("reshape", shape)?,
            squared.into_pyarray(py).call_method1("reshape", shape)?,
        ))
    })
}

/// The minimum spanning tree of the rows of `x`: edges (rows - 1 × 2) and their squared lengths.
#[pyfunction]
#[pyo3(signature = (x, progress=None))]
fn spanning_tree<'py>(
    py: Python<'py>,
    x: &Bound<'py, PyAny>,
    progress: Option<&Bound<'py, PyAny>>,
) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
    let array = Array::extract(x, "x")?;
    with_dtype!(array.dtype(), T => {
        let x = matrix::<T>(&array, "x")?;
        let tree = run_long(py, progress, |cancel| {
            neighbours::spanning_tree(&in_order(&x)?, &|| tile(cancel))
        })?;
        let ends: Vec<i64> = tree.iter().flat_map(|e| [i64::from(e.ends.0), i64::from(e.ends.1)]).collect();
        let squared: Vec<_> = tree.iter().map(|e| e.squared).collect();
        Ok((
            ends.into_pyarray(py).call_method1("reshape", (tree.len(), 2))?,
            squared.into_pyarray(py).into_any(),
        ))
    })
}

/// The next `m` of `0..n` without repetition, in order, from the generator state `state`, and the state after it.
#[pyfunction]
fn draw_rows<'py>(
    py: Python<'py>,
    state: u64,
    n: usize,
    m: usize,
) -> (Bound<'py, numpy::PyArray1<i64>>, u64) {
    let mut random = Random::new(state);
    let rows: Vec<i64> = (random.sample(n, m).into_iter()).map(i64::from).collect();
    (rows.into_pyarray(py), random.state())
}

/// Budget and box of one step.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct LimitsArgument {
    norm: String,
    epsilon: f64,
    low: f64,
    high: f64,
}

impl LimitsArgument {
    fn limits(&self) -> Result<Limits> {
        Ok(Limits {
            norm: match self.norm.as_str() {
                "linf" => Norm::Linf,
                "l2" => Norm::L2,
                other => return Err(Error::value("norm", "\"linf\" or \"l2\"", other)),
            },
            epsilon: self.epsilon,
            low: self.low,
            high: self.high,
        })
    }
}

/// One step of `delta` (rows of the arithmetic type of `x`) along `gradient`, in place: of each row within budget and box,
/// or, without `x`, of perturbations that many rows share, within the budget.
#[pyfunction]
#[pyo3(signature = (x, delta, gradient, limits, alpha))]
fn step_rows(
    x: Option<&Bound<'_, PyAny>>,
    delta: &Bound<'_, PyAny>,
    gradient: &Bound<'_, PyAny>,
    limits: LimitsArgument,
    alpha: f64,
) -> PyResult<()> {
    let limits = limits.limits()?;
    let (mut delta, gradient) = (
        Array::extract(delta, "delta")?,
        Array::extract(gradient, "gradient")?,
    );
    gradient.expect_dtype(delta.dtype())?;
    gradient.expect_shape(delta.shape())?;
    delta.expect_disjoint(&[&gradient])?;
    let base = x.map(|x| Array::extract(x, "x")).transpose()?;
    let Some(base) = base else {
        return with_dtype!(delta.dtype(), R => {
            let g = matrix::<R>(&gradient, "gradient")?;
            if mean("gradient", &g).is_err() || size_of::<R>() < 4 {
                return Err(Error::value("gradient", "finite f32 or f64 rows", "others").into());
            }
            let width = g.width();
            for (i, run) in delta.rows_mut::<R>()?.into_runs(1).into_iter().enumerate() {
                let g: Vec<<R as Element>::Acc> = g.row(i).iter().map(|v| v.load()).collect();
                let mut row: Vec<<R as Element>::Acc> = run.data[..width].iter().map(|v| v.load()).collect();
                ascent::move_shared(&limits, alpha, &g, &mut row);
                run.data.iter_mut().zip(row).for_each(|(to, v)| *to = R::store(v));
            }
            Ok(())
        });
    };
    base.expect_shape(delta.shape())?;
    with_dtype!(base.dtype(), T => {
        type R = <T as Element>::Acc;
        delta.expect_dtype(R::DTYPE)?;
        let (x, g) = (matrix::<T>(&base, "x")?, matrix::<R>(&gradient, "gradient")?);
        mean("gradient", &g)?;
        let width = x.width();
        par::for_each(x.rows() * width * size_of::<R>(), delta.rows_mut::<R>()?.into_runs(16), |run| {
            for (k, to) in run.data.chunks_exact_mut(width).enumerate() {
                ascent::move_row(&limits, alpha, x.row(run.first + k), g.row(run.first + k), to);
            }
        });
        Ok(())
    })
}

/// Stores `x + delta` in `out` in the type of `x`, so that budget and box hold as stored.
#[pyfunction]
#[pyo3(signature = (x, delta, out, limits, levels=None))]
fn publish_rows(
    x: &Bound<'_, PyAny>,
    delta: &Bound<'_, PyAny>,
    out: &Bound<'_, PyAny>,
    limits: LimitsArgument,
    levels: Option<f64>,
) -> PyResult<()> {
    let limits = limits.limits()?;
    let (array, delta, mut out) = (
        Array::extract(x, "x")?,
        Array::extract(delta, "delta")?,
        Array::extract(out, "out")?,
    );
    out.expect_dtype(array.dtype())?;
    out.expect_shape(array.shape())?;
    delta.expect_shape(array.shape())?;
    out.expect_disjoint(&[&array, &delta])?;
    with_dtype!(array.dtype(), T => {
        type R = <T as Element>::Acc;
        delta.expect_dtype(R::DTYPE)?;
        let (x, delta) = (matrix::<T>(&array, "x")?, matrix::<R>(&delta, "delta")?);
        mean("delta", &delta)?;
        let width = x.width();
        par::for_each(4 * x.rows() * width * size_of::<R>(), out.rows_mut::<T>()?.into_runs(64), |run| {
            for (k, row) in run.data.chunks_exact_mut(width).enumerate() {
                limits.publish(x.row(run.first + k), delta.row(run.first + k), levels, row);
            }
        });
        Ok(())
    })
}

/// The bandwidth a rule gives for `x`.
#[pyfunction]
#[pyo3(signature = (x, y, classes, rule, perplexity, progress=None))]
fn find_bandwidth(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: PyReadonlyArray1<'_, i64>,
    classes: usize,
    rule: &str,
    perplexity: f64,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<f64> {
    let array = Array::extract(x, "x")?;
    let rule = match rule {
        "perplexity" => Rule::Perplexity(perplexity),
        "nll" => Rule::Nll,
        "knn" => Rule::Knn,
        _ => {
            let known = "\"perplexity\", \"nll\", \"knn\" or a number";
            return Err(Error::value("bandwidth", known, rule).into());
        }
    };
    with_dtype!(array.dtype(), T => {
        let x = matrix::<T>(&array, "x")?;
        let codes = labels(&y, "y", x.rows(), classes)?;
        run_long(py, progress, |cancel| {
            let sorted = Sorted::all(&x, &codes, classes, &mean("x", &x)?);
            bandwidth::find(rule, &sorted.points, &sorted.segments, cancel)
        })
    })
}

/// Objective by step, checks as (steps, objective), the steps behind what was kept, and how far its objective can be off.
type Course = (Vec<f64>, Vec<(usize, f64)>, usize, f64);

/// Projected gradient ascent from `x`; the best iterate goes to `out`. Returns the trace.
#[pyfunction]
#[pyo3(signature = (x, y, classes, out, options, plan, progress=None))]
#[allow(clippy::too_many_arguments)]
fn ascend(
    py: Python<'_>,
    x: &Bound<'_, PyAny>,
    y: PyReadonlyArray1<'_, i64>,
    classes: usize,
    out: &Bound<'_, PyAny>,
    options: &Bound<'_, PyDict>,
    plan: PlanArgument,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Course> {
    let (array, mut target) = (Array::extract(x, "x")?, Array::extract(out, "out")?);
    target.expect_dtype(array.dtype())?;
    target.expect_shape(array.shape())?;
    target.expect_disjoint(&[&array])?;
    let plan = plan.plan(spec(options, classes)?)?;
    with_dtype!(array.dtype(), T => {
        let x = matrix::<T>(&array, "x")?;
        let codes = labels(&y, "y", x.rows(), classes)?;
        let out = target.rows_mut::<T>()?;
        let trace = run_long(py, progress, |cancel| ascent::ascend(&x, &codes, &plan, out, cancel))?;
        Ok((trace.steps, trace.checks, trace.best, trace.bound))
    })
}

/// The arguments of an ascent, checked by the caller.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
struct PlanArgument {
    against: String,
    per: String,
    class_share: f64,
    norm: String,
    epsilon: f64,
    low: f64,
    high: f64,
    steps: usize,
    step_size: f64,
    batch_queries: usize,
    batch_centres: usize,
    seed: u64,
    jitter: f64,
    levels: Option<f64>,
    truncate: Option<f64>,
}

impl PlanArgument {
    fn plan(self, spec: Spec) -> Result<Plan> {
        let pick = |arg, value: &str, known: [&str; 2]| match known.iter().position(|k| *k == value)
        {
            Some(i) => Ok(i == 0),
            None => Err(Error::value(
                arg,
                format!("{:?} or {:?}", known[0], known[1]),
                value,
            )),
        };
        Ok(Plan {
            spec,
            against: if pick("against", &self.against, ["clean", "published"])? {
                Against::Clean
            } else {
                Against::Published
            },
            per: match self.per.as_str() {
                "sample" => Per::Sample,
                "class" => Per::Class,
                "both" => Per::Both(self.class_share),
                other => {
                    return Err(Error::value(
                        "per",
                        "\"sample\", \"class\" or \"both\"",
                        other,
                    ));
                }
            },
            limits: Limits {
                norm: if pick("norm", &self.norm, ["linf", "l2"])? {
                    Norm::Linf
                } else {
                    Norm::L2
                },
                epsilon: self.epsilon,
                low: self.low,
                high: self.high,
            },
            steps: self.steps,
            step_size: self.step_size,
            batch: Batch {
                queries: self.batch_queries,
                centres: self.batch_centres,
            },
            seed: self.seed,
            jitter: self.jitter,
            levels: self.levels,
            truncate: self.truncate,
        })
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(published_error, m)?)?;
    m.add_function(wrap_pyfunction!(cross_error, m)?)?;
    m.add_function(wrap_pyfunction!(half_errors, m)?)?;
    m.add_function(wrap_pyfunction!(nearest_neighbours, m)?)?;
    m.add_function(wrap_pyfunction!(spanning_tree, m)?)?;
    m.add_function(wrap_pyfunction!(draw_rows, m)?)?;
    m.add_function(wrap_pyfunction!(step_rows, m)?)?;
    m.add_function(wrap_pyfunction!(publish_rows, m)?)?;
    m.add_function(wrap_pyfunction!(find_bandwidth, m)?)?;
    m.add_function(wrap_pyfunction!(ascend, m)?)
}
