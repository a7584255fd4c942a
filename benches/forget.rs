//! Dampening and Fisher accumulation over 16 M weights, the selection curve over 4 M; token log-probabilities of
//! 512 × 32 768.

mod common;

use abjure::cancel::Cancel;
use abjure::element::{Element, Real};
use abjure::forget::dampen::{Mode, RuleSpec, dampen, selection_curve};
use abjure::forget::fisher::{Power, Sum, accumulate};
use abjure::forget::logprobs::{token_logprobs, token_logprobs_backward};
use abjure::simd::Exp;
use abjure::view::{Rows, RowsMut};
use common::{baseline, bytes, group, ours, uniform};
use criterion::{Criterion, criterion_group, criterion_main};
use half::{bf16, f16};
use std::hint::black_box;

const N: usize = 1 << 24;
/// Of the selection curve, whose Python form takes a pass for every alpha.
const SHORT: usize = N / 4;
const TOKENS: usize = 512;
const VOCAB: usize = 32_768;

/// One weight in twenty is selected. The factor is held at 1: weights that shrink with every repetition would soon be
/// subnormal, and those are slow.
fn dampening<W: Element, I: Real + Element>(c: &mut Criterion) {
    let (f, d) = (uniform::<I>(N, 1, 0.0, 1.0), uniform::<I>(N, 2, 0.0, 1.0));
    let mut w = uniform::<W>(N, 3, -1.0, 1.0);
    let (f, d) = (Rows::matrix(&f, N), Rows::matrix(&d, N));
    let spec = RuleSpec {
        min_factor: 1.0,
        ..RuleSpec::default()
    };
    let dtype = W::DTYPE.name();
    let mut g = group(c, "dampen");
    g.throughput(bytes(N * 2 * (size_of::<I>() + size_of::<W>())));
    ours(&mut g, dtype, || {
        let w = RowsMut::matrix(&mut w, N);
        dampen(w, &f, &d, black_box(&spec), Mode::Guarded).expect("sound importances")
    });
    // Weights of 0 stay 0.
    let setup = format!(
        "wide = torch.float64 if dtype == torch.float64 else torch.float32\n\
         f, d, w = torch.rand({N}, dtype=wide), torch.rand({N}, dtype=wide), torch.zeros({N}, dtype=dtype)"
    );
    for (form, name) in [
        ("dampen_published", "torch, boolean indexing (published)"),
        ("dampen_where", "torch.where"),
    ] {
        baseline(
            &mut g,
            name,
            dtype,
            &setup,
            &format!("{form}(w, f, d, 10.0, 1.0)"),
        );
    }
    g.finish();
}

fn accumulation<T: Element, A: Sum>(c: &mut Criterion) {
    let grad = uniform::<T>(N, 4, -1.0, 1.0);
    let mut sum = vec![A::default(); N];
    let dtype = T::DTYPE.name();
    let mut g = group(c, "fisher_accumulate");
    g.throughput(bytes(N * (2 * size_of::<A>() + size_of::<T>())));
    ours(&mut g, dtype, || {
        accumulate(&mut sum, black_box(&grad), &[1.0], Power::Square).expect("finite")
    });
    let setup = format!(
        "g, total = torch.randn({N}).to(dtype), torch.zeros({N}, dtype=torch.{})",
        A::DTYPE.name()
    );
    baseline(&mut g, "torch", dtype, &setup, "accumulate(total, g)");
    g.finish();
}

fn curve<I: Real + Element>(c: &mut Criterion) {
    let (f, d) = (
        uniform::<I>(SHORT, 1, 0.0, 1.0),
        uniform::<I>(SHORT, 2, 0.0, 1.0),
    );
    let (f, d) = (Rows::matrix(&f, SHORT), Rows::matrix(&d, SHORT));
    let alphas: Vec<f64> = (0..20).map(|i| 1.4f64.powi(i)).collect();
    let dtype = I::DTYPE.name();
    let mut g = group(c, "selection_curve");
    g.throughput(bytes(2 * SHORT * size_of::<I>()));
    ours(&mut g, dtype, || {
        selection_curve(&f, &d, black_box(&alphas), &RuleSpec::default())
            .expect("sound importances")
    });
    let setup = format!(
        "f, d = torch.rand({SHORT}, dtype=dtype), torch.rand({SHORT}, dtype=dtype)\nalphas = {alphas:?}"
    );
    baseline(
        &mut g,
        "torch",
        dtype,
        &setup,
        "selection_counts(f, d, alphas)",
    );
    g.finish();
}

fn logprobs<T: Element<Acc: Exp>>(c: &mut Criterion) {
    let z = uniform::<T>(TOKENS * VOCAB, 5, -8.0, 8.0);
    let rows = Rows::matrix(&z, VOCAB);
    let labels: Vec<i64> = (0..TOKENS)
        .map(|i| (common::hash(i) % VOCAB as u64) as i64)
        .collect();
    let dtype = T::DTYPE.name();
    let setup = format!(
        "z = torch.empty({TOKENS}, {VOCAB}).uniform_(-8, 8).to(dtype).requires_grad_()\n\
         y = torch.randint({VOCAB}, ({TOKENS},))\n\
         with torch.no_grad():\n    token_logprobs(z, y)"
    );
    let mut g = group(c, "token_logprobs");
    g.throughput(bytes(size_of_val(&z[..])));
    let never = Cancel::new();
    ours(&mut g, dtype, || {
        token_logprobs(black_box(&rows), &labels, -100, &never).expect("finite")
    });
    let forward = "with torch.no_grad():\n    token_logprobs(z, y)";
    baseline(&mut g, "torch, log_softmax", dtype, &setup, forward);
    g.finish();

    let found = token_logprobs(&rows, &labels, -100, &never).expect("finite");
    let lse: Vec<f64> = found.iter().map(|(_, lse)| *lse).collect();
    let upstream = vec![1.0 / TOKENS as f64; TOKENS];
    let mut grad = vec![T::default(); z.len()];
    let mut g = group(c, "token_logprobs_backward");
    g.throughput(bytes(2 * size_of_val(&z[..])));
    ours(&mut g, dtype, || {
        let grad = RowsMut::matrix(&mut grad, VOCAB);
        token_logprobs_backward(black_box(&rows), &labels, &lse, &upstream, grad, -100)
            .expect("shapes agree")
    });
    let setup = format!("{setup}\nout = token_logprobs(z, y).mean()");
    let backward = "torch.autograd.grad(out, z, retain_graph=True)";
    baseline(&mut g, "torch, autograd", dtype, &setup, backward);
    g.finish();
}

fn all(c: &mut Criterion) {
    common::machine(c);
    dampening::<f32, f32>(c);
    dampening::<f16, f32>(c);
    dampening::<bf16, f32>(c);
    dampening::<f64, f64>(c);
    accumulation::<f32, f32>(c);
    accumulation::<f16, f32>(c);
    accumulation::<bf16, f32>(c);
    accumulation::<f64, f64>(c);
    curve::<f32>(c);
    curve::<f64>(c);
    logprobs::<f32>(c);
    logprobs::<f16>(c);
    logprobs::<bf16>(c);
    logprobs::<f64>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
