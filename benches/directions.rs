//! Activations of 8192 × 4096 and a weight of 4096 × 4096, beside copy bandwidth and the torch forms.

mod common;

use abjure::cancel::Cancel;
use abjure::element::{Element, Real};
use abjure::linalg::orthonormalize;
use abjure::moments::{Moments, NonFinitePolicy};
use abjure::refuse::directions::edit::Arithmetic;
use abjure::refuse::directions::{Edit, NormPreserving, orthogonalize_columns};
use abjure::view::{Rows, RowsMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use std::hint::black_box;

const ROWS: usize = 8192;
const WIDTH: usize = 4096;

fn values<T: Element>(n: usize) -> Vec<T> {
    let noise =
        |i: usize| ((i as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f64 / 8.4e6 - 1.0;
    (0..n)
        .map(|i| T::store(T::Acc::from_f64(noise(i))))
        .collect()
}

fn setup(dtype: &str) -> String {
    format!(
        "import torch\nx = torch.randn({ROWS}, {WIDTH}).to(torch.{dtype})\n\
         r = torch.nn.functional.normalize(torch.randn({WIDTH}), dim=0).to(x.dtype)"
    )
}

fn activations<T: Element<Acc: Arithmetic>>(c: &mut Criterion) {
    let dtype = T::DTYPE.name();
    let mut x = values::<T>(ROWS * WIDTH);
    let bytes = (x.len() * size_of::<T>()) as u64;
    let q: Vec<f64> = values(16 * WIDTH);
    for rank in [1, 4, 16] {
        let basis = orthonormalize("q", &q[..rank * WIDTH], rank, WIDTH)
            .expect("random rows are independent");
        let edit = Edit::new(WIDTH).along(basis.rows);
        let mut group = common::group(c, &format!("ablate_k{rank}"));
        group.throughput(Throughput::Bytes(2 * bytes));
        group.bench_function(dtype, |b| {
            b.iter(|| {
                edit.apply(RowsMut::matrix(black_box(&mut x), WIDTH))
                    .expect("widths agree")
            });
        });
        if rank == 1 {
            common::baseline(
                &mut group,
                &format!("{dtype}/torch"),
                &setup(dtype),
                "x - (x @ r).unsqueeze(-1) * r",
            );
        }
        group.finish();
    }
    let edit = Edit::new(WIDTH).shifted(q[..WIDTH].to_vec());
    let mut group = common::group(c, "steer_");
    group.throughput(Throughput::Bytes(2 * bytes));
    group.bench_function(dtype, |b| {
        b.iter(|| {
            edit.apply(RowsMut::matrix(black_box(&mut x), WIDTH))
                .expect("widths agree")
        });
    });
    common::baseline(
        &mut group,
        &format!("{dtype}/torch"),
        &setup(dtype),
        "x + r",
    );
    group.finish();
    let mut group = common::group(c, "mean");
    group.throughput(Throughput::Bytes(bytes));
    group.bench_function(dtype, |b| {
        b.iter(|| {
            let mut moments = Moments::new(WIDTH, false);
            moments
                .update(
                    &Rows::matrix(black_box(&x), WIDTH),
                    None,
                    NonFinitePolicy::Skip,
                    &Cancel::new(),
                )
                .expect("widths agree")
        });
    });
    common::baseline(
        &mut group,
        &format!("{dtype}/torch"),
        &setup(dtype),
        "x.double().mean(0)",
    );
    group.finish();
}

fn weights<T: Element<Acc: Arithmetic>>(c: &mut Criterion) {
    let mut w = values::<T>(WIDTH * WIDTH);
    let bytes = (w.len() * size_of::<T>()) as u64;
    let q = orthonormalize("q", &values::<f64>(WIDTH), 1, WIDTH).expect("random rows are not zero");
    for (name, keep, sweeps) in [
        ("plain", NormPreserving::No, 4),
        ("in", NormPreserving::In, 5),
    ] {
        let mut group = common::group(c, &format!("orthogonalize_{name}"));
        group.throughput(Throughput::Bytes(sweeps * bytes));
        group.bench_function(T::DTYPE.name(), |b| {
            b.iter(|| {
                orthogonalize_columns(RowsMut::matrix(black_box(&mut w), WIDTH), &q, 1.0, keep)
                    .expect("finite")
            });
        });
        group.finish();
    }
}

fn all(c: &mut Criterion) {
    common::machine(c);
    activations::<f64>(c);
    activations::<f32>(c);
    activations::<f16>(c);
    activations::<bf16>(c);
    weights::<f32>(c);
    weights::<bf16>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
