//! Edits of activations of 8192 × 4096 and of a weight of 4096 × 4096; means and covariance.

mod common;

use abjure::cancel::Cancel;
use abjure::element::Element;
use abjure::linalg::orthonormalize;
use abjure::moments::{Moments, NonFinitePolicy};
use abjure::refuse::directions::edit::Arithmetic;
use abjure::refuse::directions::{Edit, NormPreserving, orthogonalize_columns};
use abjure::view::{Rows, RowsMut};
use common::{baseline, bytes, flops, group, ours, uniform};
use criterion::{Criterion, criterion_group, criterion_main};
use half::{bf16, f16};
use std::hint::black_box;

const ROWS: usize = 8192;
const WIDTH: usize = 4096;
/// Of the covariance.
const NARROW: usize = 1024;
const RANK: usize = 16;

/// `rank` orthonormal rows of `width`.
fn basis(rank: usize, width: usize) -> Vec<f64> {
    let q = uniform::<f64>(rank * width, 9, -1.0, 1.0);
    orthonormalize("q", &q, rank, width)
        .expect("random rows are independent")
        .rows
}

/// Activations `x` and `rank` orthonormal rows `q`.
fn setup(rank: usize) -> String {
    format!(
        "x = torch.randn({ROWS}, {WIDTH}).to(dtype)\n\
         q = torch.linalg.qr(torch.randn({WIDTH}, {rank})).Q.T.contiguous().to(dtype)"
    )
}

fn activations<T: Element<Acc: Arithmetic>>(c: &mut Criterion) {
    let dtype = T::DTYPE.name();
    let mut x = uniform::<T>(ROWS * WIDTH, 1, -1.0, 1.0);
    let size = size_of_val(&x[..]);
    let shift = uniform::<f64>(WIDTH, 2, -1e-3, 1e-3);
    let along = |rank| Edit::new(WIDTH).along(basis(rank, WIDTH));
    let ablation = "ablate(x, q)";
    let edits = [
        ("ablate_k1", along(1), 1, ablation),
        ("ablate_k4", along(4), 4, ablation),
        ("ablate_k16", along(RANK), RANK, ablation),
        (
            "affine_ablate_k1",
            along(1).from_origin(&shift),
            1,
            "ablate(x - q, q) + q",
        ),
        (
            "steer",
            Edit::new(WIDTH).shifted(shift.clone()),
            1,
            "x + 1e-3 * q[0]",
        ),
    ];
    for (name, edit, rank, form) in &edits {
        let mut g = group(c, name);
        g.throughput(bytes(2 * size));
        ours(&mut g, dtype, || {
            edit.apply(RowsMut::matrix(black_box(&mut x), WIDTH))
                .expect("widths agree")
        });
        baseline(&mut g, "torch", dtype, &setup(*rank), form);
        g.finish();
    }
    let view = Rows::matrix(&x, WIDTH);
    for (name, rank) in [("project_k1", 1), ("project_k16", RANK)] {
        let edit = along(rank);
        let mut out = vec![T::Acc::default(); ROWS * rank];
        let mut g = group(c, name);
        g.throughput(bytes(size));
        ours(&mut g, dtype, || {
            edit.coefficients(black_box(&view), &mut out)
                .expect("widths agree")
        });
        baseline(&mut g, "torch", dtype, &setup(rank), "x @ q.T");
        g.finish();
    }
    let mut g = group(c, "mean");
    g.throughput(bytes(size));
    ours(&mut g, dtype, || moments(&view, false));
    baseline(&mut g, "torch", dtype, &setup(1), "x.double().mean(0)");
    g.finish();
}

fn moments<T: Element>(x: &Rows<'_, T>, second: bool) -> Moments {
    let mut moments = Moments::new(x.width(), second);
    moments
        .update(black_box(x), None, NonFinitePolicy::Skip, &Cancel::new())
        .expect("widths agree");
    moments
}

/// In f64 whatever the dtype; a matrix product would take twice the operations that are counted here, since half of a
/// symmetric matrix is enough.
fn covariance<T: Element>(c: &mut Criterion) {
    let x = uniform::<T>(ROWS * NARROW, 3, -1.0, 1.0);
    let x = Rows::matrix(&x, NARROW);
    let dtype = T::DTYPE.name();
    let mut g = group(c, "covariance");
    g.throughput(flops(ROWS * NARROW * (NARROW + 1)));
    ours(&mut g, dtype, || moments(&x, true));
    let setup = format!("x = torch.randn({ROWS}, {NARROW}).to(dtype)");
    baseline(
        &mut g,
        "torch.cov",
        dtype,
        &setup,
        "torch.cov(x.double().T)",
    );
    g.finish();
}

/// Sweeps are reads and writes of the whole weight: for the products, the update and the report.
fn weights<T: Element<Acc: Arithmetic>>(c: &mut Criterion) {
    let mut w = uniform::<T>(WIDTH * WIDTH, 4, -1.0, 1.0);
    let size = size_of_val(&w[..]);
    let dtype = T::DTYPE.name();
    let q = uniform::<f64>(WIDTH, 9, -1.0, 1.0);
    let q = orthonormalize("q", &q, 1, WIDTH).expect("random rows are not zero");
    let setup = format!(
        "w = torch.randn({WIDTH}, {WIDTH}).to(dtype)\n\
         r = torch.nn.functional.normalize(torch.randn({WIDTH}), dim=0).to(dtype)"
    );
    let keeping = "n = w.norm(dim=0)\nv = orthogonalize(w, r)\nv * (n / v.norm(dim=0))";
    for (name, keep, sweeps, form) in [
        (
            "orthogonalize",
            NormPreserving::No,
            4,
            "orthogonalize(w, r)",
        ),
        (
            "orthogonalize_norm_preserving",
            NormPreserving::In,
            5,
            keeping,
        ),
    ] {
        let mut g = group(c, name);
        g.throughput(bytes(sweeps * size));
        ours(&mut g, dtype, || {
            orthogonalize_columns(RowsMut::matrix(black_box(&mut w), WIDTH), &q, 1.0, keep)
                .expect("finite")
        });
        baseline(&mut g, "torch, transposed copies", dtype, &setup, form);
        g.finish();
    }
}

fn all(c: &mut Criterion) {
    common::machine(c);
    activations::<f32>(c);
    activations::<bf16>(c);
    activations::<f16>(c);
    activations::<f64>(c);
    weights::<f32>(c);
    weights::<bf16>(c);
    weights::<f16>(c);
    weights::<f64>(c);
    common::matmul::<f64>(c);
    covariance::<f32>(c);
    covariance::<bf16>(c);
    covariance::<f64>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
