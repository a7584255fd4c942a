//! What every benchmark shares: its groups, its data, the machine's own rates, and the Python form of the same work.
//!
//! A group is a kernel. In it stand `abjure/<dtype>` and, with the feature `bench-python`, `<form>/<dtype>` with the same
//! throughput, so that one report shows the ratio.
#![allow(dead_code)]

use abjure::element::{Element, Real};
use abjure::linalg::gemm::{self, Gemm, Mat, Out};
use abjure::par;
use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput};
use std::hint::black_box;
use std::time::Duration;

pub type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// Groups that measure a kernel of tens of milliseconds need no more than this.
pub fn group<'a>(c: &'a mut Criterion, name: &str) -> Group<'a> {
    let mut group = c.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(700));
    group
}

/// Times our kernel under `abjure/<case>`.
pub fn ours<R>(group: &mut Group<'_>, case: &str, mut run: impl FnMut() -> R) {
    group.bench_function(BenchmarkId::new("abjure", case), |b| b.iter(&mut run));
}

/// Bytes per second as GB/s.
pub fn bytes(n: usize) -> Throughput {
    Throughput::Bytes(n as u64)
}

/// Floating-point operations; criterion prints GFLOP/s as `Gelem/s`.
pub fn flops(n: usize) -> Throughput {
    Throughput::Elements(n as u64)
}

/// A sequence that needs no seed to be the same everywhere.
pub fn hash(i: usize) -> u64 {
    let mut x = (i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// `n` values between `low` and `high`, others for every `seed`.
pub fn uniform<T: Element>(n: usize, seed: usize, low: f64, high: f64) -> Vec<T> {
    let scale = (high - low) / u64::MAX as f64;
    (0..n)
        .map(|i| {
            T::store(T::Acc::from_f64(
                low + scale * hash(i ^ (seed << 48)) as f64,
            ))
        })
        .collect()
}

/// Copy and triad over 256 MiB arrays with the kernels' threads: the yardstick of every streaming kernel.
pub fn machine(c: &mut Criterion) {
    let n = 64 << 20;
    let (a, b, mut out) = (vec![1f32; n], vec![2f32; n], vec![0f32; n]);
    let mut group = group(c, "copy");
    group.throughput(bytes(8 * n));
    ours(&mut group, "float32", || {
        abjure::stream::copy(black_box(&a), &mut out);
    });
    let setup = format!("a, out = torch.ones({n}), torch.empty({n})");
    baseline(&mut group, "torch", "float32", &setup, "out.copy_(a)");
    group.finish();
    let mut group = self::group(c, "triad");
    group.throughput(bytes(12 * n));
    ours(&mut group, "float32", || {
        abjure::stream::triad(black_box(&a), &b, &mut out);
    });
    group.finish();
}

/// The matrix product `a bᵀ` in tiles over all threads, as the kernels that rest on it use it: their yardstick.
pub fn matmul<R: Gemm + Element>(c: &mut Criterion) {
    const N: usize = 2048;
    const K: usize = 784;
    const TILE: usize = 256;
    let (a, b) = (
        uniform::<R>(N * K, 1, -1.0, 1.0),
        uniform::<R>(N * K, 2, -1.0, 1.0),
    );
    let mut out = uniform::<R>(N * N, 3, 0.0, 0.0);
    let mut group = group(c, "matmul");
    group.throughput(flops(2 * N * N * K));
    ours(&mut group, R::DTYPE.name(), || {
        let items = out.chunks_mut(TILE * N).enumerate().collect();
        par::for_each(size_of_val(&a[..]), items, |(i, out): (usize, &mut [R])| {
            for j in 0..N / TILE {
                let to = Out {
                    data: &mut out[j * TILE..],
                    stride: N,
                    add: false,
                };
                gemm::a_bt(
                    to,
                    Mat::dense(&a[i * TILE * K..][..TILE * K], TILE, K),
                    Mat::dense(&b[j * TILE * K..][..TILE * K], TILE, K),
                );
            }
        });
    });
    let setup = format!("a, b = (torch.rand({N}, {K}, dtype=dtype) for _ in range(2))");
    baseline(&mut group, "torch", R::DTYPE.name(), &setup, "a @ b.T");
    group.finish();
}

/// Times the Python `statement` under `<form>/<dtype>`. `setup` runs once before it and finds `torch`, the functions of
/// `python/abjure/bench/plain.py`, and `dtype`. Does nothing unless built with the feature `bench-python`.
#[cfg(feature = "bench-python")]
pub fn baseline(group: &mut Group<'_>, form: &str, dtype: &str, setup: &str, statement: &str) {
    use pyo3::prelude::*;
    use pyo3::types::PyDict;
    use std::ffi::CString;

    // The embedded interpreter does not know the virtual environment it was built for.
    const PLACE: &str = "
import os, site, sysconfig
if 'VIRTUAL_ENV' in os.environ:
    site.addsitedir(sysconfig.get_path('purelib', vars={'base': os.environ['VIRTUAL_ENV']}))
";
    const PLAIN: &str = include_str!("../../python/abjure/bench/plain.py");
    let source = |s: &str| CString::new(s).expect("no NUL in Python source");
    let found = Python::attach(|py| -> PyResult<()> {
        let scope = PyDict::new(py);
        let dtype_line = format!("dtype = torch.{dtype}");
        for part in [PLACE, PLAIN, &dtype_line, setup] {
            py.run(&source(part), Some(&scope), None)?;
        }
        let builtins = py.import("builtins")?;
        let code = builtins
            .getattr("compile")?
            .call1((statement, "<baseline>", "exec"))?;
        let exec = builtins.getattr("exec")?;
        exec.call1((&code, &scope))?;
        group.bench_function(BenchmarkId::new(form, dtype), |b| {
            b.iter(|| {
                exec.call1((&code, &scope))
                    .expect("the baseline ran once already")
            });
        });
        Ok(())
    });
    if let Err(err) = found {
        Python::attach(|py| err.print(py));
        panic!("baseline {form}/{dtype} failed");
    }
}

/// See the version built with `bench-python`.
#[cfg(not(feature = "bench-python"))]
pub fn baseline(_: &mut Group<'_>, _: &str, _: &str, _: &str, _: &str) {}
