//! Edits of activations of 8192 × 4096 and of a weight of 4096 × 4096; means and covariance.

mod common;

use abjure::cancel::Cancel;
use abjure::element::Element;
use abjure::linalg::orthonormalize;
use abjure::moments::{Moments, NonFinitePolicy};
use abjure::refuse::directions::edit::Arithmetic;
use abjure::refuse::directions::{Edit, NormPreserving, orthogonalize_columns};
use abjure::refuse::experts::{Routing, count_selections};
use abjure::view::{Rows, RowsMut};
use common::{baseline, bytes, flops, group, ours, uniform};
use criterion::{Criterion, criterion_group, criterion_main};
use half::{bf16, f16};
use std::hint::black_box;

const ROWS: usize = 8192;
const WIDTH: usize = 4096;
/// Activations of the covariance.
const SAMPLES: usize = 4096;
const NARROW: usize = 2048;
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

/// In f64 but for bf16. What is counted is the whole matrix product, though half of a symmetric matrix is enough: the
/// rate compares with that of `matmul` of f32.
fn covariance<T: Element>(c: &mut Criterion) {
    let x = uniform::<T>(SAMPLES * NARROW, 3, -1.0, 1.0);
    let x = Rows::matrix(&x, NARROW);
    let dtype = T::DTYPE.name();
    let mut g = group(c, "covariance");
    g.throughput(flops(2 * SAMPLES * NARROW * NARROW));
    ours(&mut g, dtype, || moments(&x, true));
    let setup = format!("x = torch.randn({SAMPLES}, {NARROW}).to(dtype)\ny = x.float()");
    for (name, form) in [
        ("torch.cov", "torch.cov(x.double().T)"),
        ("torch f32 product", "y.T @ y"),
    ] {
        baseline(&mut g, name, dtype, &setup, form);
    }
    g.finish();
}

/// What a router chose for 262144 tokens of 64 prompts: 8 of 128 experts.
fn expert_counts(c: &mut Criterion) {
    const TOKENS: usize = 1 << 18;
    const EXPERTS: usize = 128;
    const CHOSEN: usize = 8;
    const PROMPTS: usize = 64;
    let pick = |i: usize| (i.wrapping_mul(2654435761) >> 7) % EXPERTS;
    let ids: Vec<i64> = (0..TOKENS * CHOSEN).map(|i| pick(i) as i64).collect();
    let prompts: Vec<i64> = (0..TOKENS).map(|i| (i * PROMPTS / TOKENS) as i64).collect();
    let weights = uniform::<bf16>(TOKENS * CHOSEN, 5, 0.0, 1.0);
    let routing = Routing {
        ids: &ids,
        k: CHOSEN,
        weights: Some(&weights),
        prompts: Some(&prompts),
    };
    let mut g = group(c, "count_experts");
    g.throughput(bytes(size_of_val(&ids[..]) + size_of_val(&weights[..])));
    ours(&mut g, "bfloat16", || {
        count_selections(black_box(routing), PROMPTS, EXPERTS).expect("known experts")
    });
    let setup = format!(
        "ids = torch.randint({EXPERTS}, ({TOKENS}, {CHOSEN}))\n\
         owners = torch.arange({TOKENS}) * {PROMPTS} // {TOKENS}\n\
         gates = torch.rand({TOKENS}, {CHOSEN}).to(dtype)"
    );
    let form = format!("count_experts(ids, gates, owners, {PROMPTS}, {EXPERTS})");
    baseline(&mut g, "torch", "bfloat16", &setup, &form);
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
    common::matmul::<f32>(c);
    expert_counts(c);
    covariance::<f32>(c);
    covariance::<bf16>(c);
    covariance::<f64>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
