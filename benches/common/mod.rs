//! What every benchmark shares: the machine's own bandwidth, and the Python form of the same work.
#![allow(dead_code)]

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use std::hint::black_box;
use std::time::Duration;

/// Groups that measure a kernel of tens of milliseconds need no more than this.
pub fn group<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    group
}

/// Copy and triad over 256 MiB arrays with the kernels' threads: the yardstick of every streaming kernel.
pub fn machine(c: &mut Criterion) {
    let n = 64 << 20;
    let (a, b, mut out) = (vec![1f32; n], vec![2f32; n], vec![0f32; n]);
    let mut group = group(c, "machine");
    group.throughput(Throughput::Bytes(8 * n as u64));
    group.bench_function("copy", |bench| {
        bench.iter(|| abjure::stream::copy(black_box(&a), &mut out));
    });
    group.throughput(Throughput::Bytes(12 * n as u64));
    group.bench_function("triad", |bench| {
        bench.iter(|| abjure::stream::triad(black_box(&a), &b, &mut out));
    });
    group.finish();
}

/// Benchmarks the Python `statement` after running `setup` once, in the group of the kernel that does the same.
/// Does nothing unless built with the feature `bench-python`.
#[cfg(feature = "bench-python")]
pub fn baseline(group: &mut BenchmarkGroup<'_, WallTime>, id: &str, setup: &str, statement: &str) {
    use pyo3::prelude::*;
    use pyo3::types::PyDict;
    use std::ffi::CString;

    let source = |s: &str| CString::new(s).expect("no NUL in Python source");
    Python::attach(|py| {
        let scope = PyDict::new(py);
        let mut run = || -> PyResult<()> {
            // The embedded interpreter does not know the virtual environment it was built for.
            py.run(
                c"import os, site\nif 'VIRTUAL_ENV' in os.environ:\n    import sysconfig\n    site.addsitedir(sysconfig.get_path('purelib', vars={'base': os.environ['VIRTUAL_ENV']}))",
                Some(&scope),
                None,
            )?;
            py.run(&source(setup), Some(&scope), None)?;
            let code = py.import("builtins")?.getattr("compile")?.call1((
                statement,
                "<baseline>",
                "exec",
            ))?;
            let exec = py.import("builtins")?.getattr("exec")?;
            exec.call1((&code, &scope))?;
            group.bench_function(id, |bench| {
                bench.iter(|| {
                    exec.call1((&code, &scope))
                        .expect("the baseline ran once already")
                });
            });
            Ok(())
        };
        if let Err(err) = run() {
            err.print(py);
            panic!("baseline {id} failed");
        }
    });
}

/// See the version built with `bench-python`.
#[cfg(not(feature = "bench-python"))]
pub fn baseline(_: &mut BenchmarkGroup<'_, WallTime>, _: &str, _: &str, _: &str) {}
