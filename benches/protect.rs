//! Objectives with their gradients, and steps of the ascent, beside the matrix product they rest on.

mod common;

use abjure::cancel::Cancel;
use abjure::element::Element;
use abjure::linalg::gemm::Gemm;
use abjure::protect::ascent::{Against, Batch, Per, Plan, ascend};
use abjure::protect::bandwidth;
use abjure::protect::cross::{self, CentreGradient, Centres, Queries};
use abjure::protect::noise::{self, Autoregressive, Dots, Image, Pixel, Separable, TAPS};
use abjure::protect::project::{Limits, Norm};
use abjure::protect::recourse::{Deletion, How, Loss};
use abjure::protect::tree;
use abjure::protect::{
    LeaveOneOut, Objective, Points, Scalar, Singleton, Sorted, Spare, Spec, mean, pairs,
};
use abjure::view::{Rows, RowsMut};
use common::{baseline, bytes, flops, group, ours, uniform};
use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;

const WIDTH: usize = 784;
const CLASSES: usize = 10;
const BANDWIDTH: f64 = 2.0;
const EPSILON: f64 = 8.0 / 255.0;
const STEPS: usize = 4;

fn spec(objective: Objective, leave_one_out: LeaveOneOut) -> Spec {
    Spec {
        classes: CLASSES,
        bandwidths: vec![BANDWIDTH],
        objective,
        leave_one_out,
        singleton: Singleton::Exclude,
        priors: None,
    }
}

fn setup(n: usize) -> String {
    format!("x, y = torch.rand({n}, {WIDTH}, dtype=dtype), torch.arange({n}) % {CLASSES}")
}

fn objectives<R: Scalar + Gemm>(c: &mut Criterion, n: usize) {
    let dtype = R::DTYPE.name();
    let x = uniform::<R>(n * WIDTH, 1, 0.0, 1.0);
    let labels: Vec<u32> = (0..n).map(|i| (i % CLASSES) as u32).collect();
    let rows = Rows::matrix(&x, WIDTH);
    let centre = mean("x", &rows).expect("finite");
    let sorted: Sorted<R> = Sorted::all(&rows, &labels, CLASSES, &centre);
    let never = Cancel::new();
    let tick = || never.check();

    let mut g = group(c, "bandwidth_perplexity");
    g.throughput(flops(2 * n * n * WIDTH));
    ours(&mut g, dtype, || {
        let rule = bandwidth::Rule::Perplexity(10.0);
        bandwidth::find(rule, &sorted.points, &sorted.segments, &never).expect("distinct points")
    });
    g.finish();

    let published = spec(Objective::Gini, LeaveOneOut::Corrected);
    let mut g = group(c, "published_gradient");
    g.throughput(flops(4 * n * n * WIDTH));
    ours(&mut g, dtype, || {
        let want = pairs::Want {
            gradient: true,
            posterior: false,
        };
        pairs::evaluate(
            &published,
            black_box(&sorted.points),
            &sorted.segments,
            want,
            R::BLOCK,
            &tick,
        )
        .expect("not cancelled")
    });
    let form = format!("bayes_error_gradient(x, y, {CLASSES}, {BANDWIDTH})");
    baseline(&mut g, "torch, n x n in memory", dtype, &setup(n), &form);
    g.finish();

    let m = n / 2;
    let queries: Vec<u32> = (0..m as u32).collect();
    let points = Points::gather(&rows, &queries, &centre);
    let place = sorted.positions(n, cross::NO_OWN);
    let own: Vec<u32> = queries.iter().map(|i| place[*i as usize]).collect();
    let clean = spec(Objective::Soft, LeaveOneOut::Plain);
    // Buffers go from call to call, as they do from step to step of an ascent.
    let spare = Spare::default();
    let setup = format!(
        "{}\nq, own = x[:{m}], torch.arange({m})[:, None] == torch.arange({n})\n\
         shared, each = torch.zeros({CLASSES}, {WIDTH}, dtype=dtype), torch.zeros_like(x)\n\
         shared.requires_grad_(), each.requires_grad_()",
        setup(n)
    );
    for (name, centres, products, delta, leaf) in [
        (
            "clean_gradient_per_class",
            CentreGradient::ByClass,
            2,
            "shared[y]",
            "shared",
        ),
        (
            "clean_gradient_per_sample",
            CentreGradient::Each,
            4,
            "each",
            "each",
        ),
    ] {
        let mut g = group(c, name);
        g.throughput(flops(products * m * n * WIDTH));
        ours(&mut g, dtype, || {
            let want = cross::Want {
                centres,
                queries: false,
                posterior: false,
            };
            let from = Queries {
                points: black_box(&points),
                labels: &labels[..m],
                own: &own,
            };
            let at = Centres {
                points: &sorted.points,
                segments: &sorted.segments,
            };
            cross::evaluate(&clean, from, at, want, &spare, &tick).expect("not cancelled")
        });
        let form = format!(
            "torch.autograd.grad(clean_error(q, own, x + {delta}, y, y[:{m}], {BANDWIDTH}, {CLASSES}), {leaf})"
        );
        baseline(&mut g, "torch, autograd", dtype, &setup, &form);
        g.finish();
    }
}

fn steps<R: Scalar + Element<Acc = R>>(c: &mut Criterion, n: usize) {
    let dtype = R::DTYPE.name();
    let x = uniform::<R>(n * WIDTH, 1, 0.0, 1.0);
    let labels: Vec<u32> = (0..n).map(|i| (i % CLASSES) as u32).collect();
    let mut out = vec![R::default(); x.len()];
    let batch = Batch {
        queries: n / 4,
        centres: n / 2,
    };
    let never = Cancel::new();
    for (name, per, products) in [("class", Per::Class, 2), ("sample", Per::Sample, 4)] {
        let plan = Plan {
            spec: spec(Objective::Soft, LeaveOneOut::Plain),
            against: Against::Clean,
            per,
            limits: Limits {
                norm: Norm::Linf,
                epsilon: EPSILON,
                low: 0.0,
                high: 1.0,
            },
            steps: STEPS,
            step_size: 3.0 * EPSILON / STEPS as f64,
            batch,
            seed: 0,
            jitter: 0.0,
            levels: None,
            truncate: None,
        };
        let mut g = group(c, &format!("ascent_{STEPS}_steps_per_{name}"));
        g.throughput(flops(
            STEPS * products * batch.queries * batch.centres * WIDTH,
        ));
        ours(&mut g, dtype, || {
            let out = RowsMut::matrix(&mut out, WIDTH);
            ascend(
                black_box(&Rows::matrix(&x, WIDTH)),
                &labels,
                &plan,
                out,
                &never,
            )
            .expect("not cancelled")
        });
        let form = format!(
            "ascend(x, y, {CLASSES}, {BANDWIDTH}, '{name}', ({}, {}), {EPSILON}, {STEPS})",
            batch.queries, batch.centres
        );
        baseline(&mut g, "torch, autograd", dtype, &setup(n), &form);
        g.finish();
    }
}

fn deletions(c: &mut Criterion) {
    let (n, d, never) = (2000, 30, Cancel::new());
    let x = uniform::<f64>(n * d, 1, -1.0, 1.0);
    let noise = uniform::<f64>(n, 2, -1.0, 1.0);
    let y: Vec<f64> = (0..n)
        .map(|i| f64::from(u8::from(x[i * d] + x[i * d + 1] + noise[i] > 0.0)))
        .collect();
    let model = Deletion::fit(x, y, vec![1.0; d], Loss::Logistic, &never).expect("a minimum");
    let mut g = group(c, "refit_without_a_record");
    ours(&mut g, "float64", || {
        model
            .without(black_box(&[7]), How::Refit, &never)
            .expect("a minimum")
    });
    let setup = format!(
        "import numpy as np\nrng = np.random.default_rng(0)\nx = rng.uniform(-1, 1, ({n}, {d}))\n\
         y = (x[:, 0] + x[:, 1] + rng.uniform(-1, 1, {n}) > 0).astype(float)\n\
         theta = refit_without(x, y, 1.0, np.zeros({d}), [7])[0]"
    );
    let form = "refit_without(x, y, 1.0, theta, [7])";
    baseline(&mut g, "NumPy, Newton", "float64", &setup, form);
    g.finish();
}

fn trees(c: &mut Criterion) {
    let (n, d, codes, never) = (50_000, 30, 64, Cancel::new());
    let x: Vec<u16> = (0..n * d)
        .map(|i| (common::hash(i) % codes) as u16)
        .collect();
    let (y, s): (Vec<i64>, Vec<i64>) = (0..n)
        .map(|i| {
            let own = &x[i * d..];
            let noise = (common::hash(i + n * d) % 40) as u16;
            (
                i64::from(own[0] + own[1] / 2 + noise > 68),
                i64::from(own[2] + noise > 52),
            )
        })
        .unzip();
    let targets = [y, s].map(|t| tree::Target::new(&t, 2, n).expect("labels"));
    let limits = tree::Limits {
        alpha: 0.7,
        leaves: 20,
        leaf_rows: 20,
        depth: usize::MAX,
        features: d,
    };
    let mut g = group(c, "privacy_aware_tree");
    ours(&mut g, "uint16", || {
        let codes = tree::Codes::new(black_box(&x), d).expect("rows");
        tree::grow(codes, &targets, limits, None, &never).expect("not cancelled")
    });
    let setup = format!(
        "import numpy as np\nrng = np.random.default_rng(0)\nx = rng.integers(0, {codes}, ({n}, {d})).astype(np.uint16)\n\
         y = (x[:, 0] + x[:, 1] // 2 + rng.integers(0, 40, {n}) > 68).astype(int)\n\
         s = (x[:, 2] + rng.integers(0, 40, {n}) > 52).astype(int)"
    );
    let form = "grow_tree(x, [y, s], [2, 2], 0.7, 20, 20)";
    baseline(&mut g, "NumPy, bincount", "uint16", &setup, form);
    g.finish();
}

/// One pass over images: bytes read and written, beside `copy`.
fn noises<T: Pixel>(c: &mut Criterion, x: &[T], case: &str, top: f64) {
    let image = Image {
        planes: 1,
        height: 28,
        width: 28,
        step: 1,
    };
    let n = x.len() / WIDTH;
    let labels: Vec<u32> = (0..n).map(|i| (i * 7 % CLASSES) as u32).collect();
    let rows = Rows::matrix(x, WIDTH);
    let mut out = vec![T::default(); x.len()];
    let never = Cancel::new();
    let limits = Limits {
        norm: Norm::Linf,
        epsilon: EPSILON * top,
        low: 0.0,
        high: top,
    };
    let ball = Limits {
        norm: Norm::L2,
        epsilon: top,
        ..limits
    };
    let signs: Vec<f64> = uniform(CLASSES * WIDTH, 2, -1.0, 1.0);
    let patterns: Vec<T::Acc> = (signs.iter())
        .map(|v| abjure::element::Real::from_f64(v.signum() * EPSILON * top))
        .collect();
    let centroids: Vec<f32> = uniform(CLASSES * 49, 3, -10.0, 10.0);
    let mixing: Vec<f32> = uniform(CLASSES * 49 * 49, 4, -1.0, 1.0);
    let filters = [0.1f32, 0.1, 0.3, -0.1, 0.05, 0.15, 0.1, 0.3].repeat(CLASSES);
    assert_eq!(filters.len(), CLASSES * TAPS);
    let kernels: Vec<f64> = uniform(CLASSES * 9, 5, 0.0, 1.0);
    let places: Vec<usize> = (0..CLASSES).map(|c| c * 61).collect();
    let colours = vec![top; CLASSES];
    let moved = || bytes(2 * size_of_val(x));

    let mut g = group(c, "noise_class");
    g.throughput(moved());
    ours(&mut g, case, || {
        let out = RowsMut::matrix(&mut out, WIDTH);
        noise::add_class(black_box(&rows), &labels, &patterns, &limits, out, &never)
    });
    g.finish();
    let mut g = group(c, "noise_separable");
    g.throughput(moved());
    ours(&mut g, case, || {
        let plan = Separable {
            centroids: &centroids,
            mixing: &mixing,
            image,
            patch: 4,
        };
        let out = RowsMut::matrix(&mut out, WIDTH);
        noise::add_separable(black_box(&rows), &labels, &plan, 1, &ball, out, &never)
    });
    g.finish();
    let mut g = group(c, "noise_autoregressive");
    g.throughput(moved());
    ours(&mut g, case, || {
        let plan = Autoregressive {
            filters: &filters,
            image,
            crop: 4,
        };
        let out = RowsMut::matrix(&mut out, WIDTH);
        noise::add_autoregressive(black_box(&rows), &labels, &plan, 1, &ball, out, &never)
    });
    g.finish();
    let mut g = group(c, "noise_convolve");
    g.throughput(moved());
    ours(&mut g, case, || {
        let out = RowsMut::matrix(&mut out, WIDTH);
        let rows = black_box(&rows);
        noise::convolve(rows, &labels, &kernels, &image, top, false, out, &never)
    });
    g.finish();
    let mut g = group(c, "noise_set_pixels");
    g.throughput(moved());
    ours(&mut g, case, || {
        let dots = Dots {
            places: &places,
            colours: &colours,
            per: 1,
            image,
        };
        let out = RowsMut::matrix(&mut out, WIDTH);
        noise::set_pixels(black_box(&rows), &labels, &dots, out, &never)
    });
    g.finish();
    let mut g = group(c, "noise_class_sums");
    g.throughput(bytes(size_of_val(x)));
    ours(&mut g, case, || {
        noise::class_sums(black_box(&rows), &labels, CLASSES, (0.0, top), &never)
    });
    g.finish();
}

fn all(c: &mut Criterion) {
    common::machine(c);
    let x: Vec<f32> = uniform(60_000 * WIDTH, 1, 0.0, 1.0);
    noises(c, &x, "float32", 1.0);
    let levels: Vec<u8> = x.iter().map(|v| (v * 255.0) as u8).collect();
    noises(c, &levels, "uint8", 255.0);
    drop((x, levels));
    common::matmul::<f32>(c);
    common::matmul::<f64>(c);
    objectives::<f32>(c, 4000);
    objectives::<f64>(c, 2000);
    steps::<f32>(c, 4000);
    steps::<f64>(c, 2000);
    deletions(c);
    trees(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
