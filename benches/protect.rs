//! Density kernels beside the matrix product they rest on.

use abjure::cancel::Cancel;
use abjure::linalg::gemm::{self, Mat, Out};
use abjure::protect::cross::{self, CentreGradient, Centres, Queries};
use abjure::protect::{
    LeaveOneOut, Objective, Points, Scalar, Singleton, Sorted, Spec, mean, pairs,
};
use abjure::view::Rows;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::Duration;

const WIDTH: usize = 784;
const CLASSES: usize = 10;

fn data<R: Scalar>(n: usize) -> (Vec<R>, Vec<u32>) {
    let wave = |i: usize| ((i as f64) * 12.9898).sin() * 43758.5453;
    let value = |i: usize| R::from_f64(wave(i).fract().abs());
    let labels = (0..n).map(|i| (i % CLASSES) as u32).collect();
    ((0..n * WIDTH).map(value).collect(), labels)
}

fn spec(objective: Objective, leave_one_out: LeaveOneOut) -> Spec {
    Spec {
        classes: CLASSES,
        bandwidths: vec![2.0],
        objective,
        leave_one_out,
        singleton: Singleton::Keep,
        priors: None,
    }
}

/// GFLOP/s are reported as elements: one element is one floating-point operation.
fn groups<R: Scalar>(c: &mut Criterion, name: &str, n: usize) {
    let (x, labels) = data::<R>(n);
    let rows = Rows::matrix(&x, WIDTH);
    let centre = mean("x", &rows).unwrap();
    let sorted: Sorted<R> = Sorted::all(&rows, &labels, CLASSES, &centre);
    let never = Cancel::new();
    let mut group = c.benchmark_group("protect");
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(3));

    let tile = 256;
    let mut out = vec![R::from_f64(0.0); tile * tile];
    group.throughput(Throughput::Elements((2 * tile * tile * WIDTH) as u64));
    group.bench_function(format!("matmul_256/{name}"), |b| {
        let (left, right) = x[..2 * tile * WIDTH].split_at(tile * WIDTH);
        b.iter(|| {
            let to = Out {
                data: &mut out,
                stride: tile,
                add: false,
            };
            gemm::a_bt(
                to,
                Mat::dense(left, tile, WIDTH),
                Mat::dense(right, tile, WIDTH),
            );
        });
    });

    let published = spec(Objective::Gini, LeaveOneOut::Corrected);
    group.throughput(Throughput::Elements((4 * n * n * WIDTH) as u64));
    group.bench_function(format!("published_gradient/{name}"), |b| {
        let want = pairs::Want {
            gradient: true,
            posterior: false,
        };
        let tick = || never.check();
        b.iter(|| {
            pairs::evaluate(
                &published,
                &sorted.points,
                &sorted.segments,
                want,
                R::BLOCK,
                &tick,
            )
        });
    });

    let queries: Vec<u32> = (0..(n / 2) as u32).collect();
    let points = Points::gather(&rows, &queries, &centre);
    let place = sorted.positions(n, cross::NO_OWN);
    let own: Vec<u32> = queries.iter().map(|i| place[*i as usize]).collect();
    let clean = spec(Objective::Soft, LeaveOneOut::Plain);
    for (kind, centres, products) in [
        ("class", CentreGradient::ByClass, 2),
        ("sample", CentreGradient::Each, 4),
    ] {
        group.throughput(Throughput::Elements((products * n / 2 * n * WIDTH) as u64));
        group.bench_function(format!("clean_gradient_per_{kind}/{name}"), |b| {
            let want = cross::Want {
                centres,
                queries: false,
                posterior: false,
            };
            let from = Queries {
                points: &points,
                labels: &labels[..n / 2],
                own: &own,
            };
            let at = Centres {
                points: &sorted.points,
                segments: &sorted.segments,
            };
            let tick = || never.check();
            b.iter(|| black_box(cross::evaluate(&clean, from, at, want, &tick)));
        });
    }
    group.finish();
}

fn protect(c: &mut Criterion) {
    groups::<f32>(c, "f32", 4000);
    groups::<f64>(c, "f64", 2000);
}

criterion_group!(benches, protect);
criterion_main!(benches);
