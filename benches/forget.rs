//! Dampening, Fisher accumulation, the selection curve. `cargo bench --bench forget`

use abjure::element::Element;
use abjure::forget::dampen::{Mode, RuleSpec, dampen, selection_curve};
use abjure::forget::fisher::accumulate;
use abjure::view::{Rows, RowsMut};
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use std::hint::black_box;
use std::time::Duration;

const N: usize = 1 << 24;

/// Uniform in [0, 1), the same in every run.
fn uniform(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| next()).collect()
}

type Group<'a> = BenchmarkGroup<'a, criterion::measurement::WallTime>;

fn group<'a>(c: &'a mut Criterion, name: &str) -> Group<'a> {
    let mut group = c.benchmark_group(name);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    group
}

/// One weight in twenty is selected. The factor is held at 1: weights that shrink with every repetition would soon be
/// subnormal, and those are slow.
fn dampen_one<W: Element<Acc = f32>>(g: &mut Group<'_>) {
    let (f, d) = (uniform(N, 1), uniform(N, 2));
    let mut w: Vec<W> = uniform(N, 3).into_iter().map(W::store).collect();
    let (f, d) = (Rows::matrix(&f, N), Rows::matrix(&d, N));
    let spec = RuleSpec {
        min_factor: 1.0,
        ..RuleSpec::default()
    };
    g.throughput(Throughput::Bytes((N * (8 + 2 * size_of::<W>())) as u64));
    g.bench_function(W::DTYPE.name(), |b| {
        b.iter(|| {
            let w = RowsMut::matrix(&mut w, N);
            dampen(w, &f, &d, black_box(&spec), Mode::Guarded).unwrap()
        });
    });
}

fn dampening(c: &mut Criterion) {
    let mut g = group(c, "dampen");
    dampen_one::<f32>(&mut g);
    dampen_one::<f16>(&mut g);
    dampen_one::<bf16>(&mut g);
    g.finish();
}

fn accumulate_one<T: Element<Acc = f32>>(g: &mut Group<'_>) {
    let grad: Vec<T> = uniform(N, 4).into_iter().map(T::store).collect();
    let mut sum = vec![0f32; N];
    g.throughput(Throughput::Bytes((N * (8 + size_of::<T>())) as u64));
    g.bench_function(T::DTYPE.name(), |b| {
        b.iter(|| accumulate(&mut sum, &grad, black_box(1.0)).unwrap());
    });
}

fn accumulation(c: &mut Criterion) {
    let mut g = group(c, "fisher_accumulate");
    accumulate_one::<f32>(&mut g);
    accumulate_one::<f16>(&mut g);
    accumulate_one::<bf16>(&mut g);
    g.finish();
}

fn curve(c: &mut Criterion) {
    let mut g = group(c, "selection_curve");
    let (f, d) = (uniform(N, 1), uniform(N, 2));
    let (f, d) = (Rows::matrix(&f, N), Rows::matrix(&d, N));
    let alphas: Vec<f64> = (0..25).map(|i| 1.3f64.powi(i)).collect();
    g.throughput(Throughput::Bytes(8 * N as u64));
    g.bench_function("float32", |b| {
        b.iter(|| selection_curve(&f, &d, black_box(&alphas), &RuleSpec::default()).unwrap());
    });
    g.finish();
}

criterion_group!(benches, dampening, accumulation, curve);
criterion_main!(benches);
