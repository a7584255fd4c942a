//! CKA beside the matrix product it rests on, resampling, and text overlap.

mod common;

use abjure::cancel::Cancel;
use abjure::measure::cross::CrossMoments;
use abjure::measure::hsic::{self, Of};
use abjure::measure::overlap::common_subsequence;
use abjure::measure::resample::{Stratum, bootstrap};
use abjure::view::Rows;
use common::{baseline, flops, group, hash, ours, uniform};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;

fn similarity(c: &mut Criterion) {
    const N: usize = 8192;
    const D: usize = 1024;
    let (x, y) = (
        uniform::<f32>(N * D, 1, -1.0, 1.0),
        uniform::<f32>(N * D, 2, -1.0, 1.0),
    );
    let mut g = group(c, "linear_cka");
    g.throughput(flops(4 * N * D * D));
    ours(&mut g, "float32", || {
        let mut seen = CrossMoments::new(D, D);
        seen.update(&Rows::matrix(&x, D), &Rows::matrix(&y, D), &Cancel::new())
            .expect("finite");
        seen.dependence(false).expect("varies")
    });
    let setup = format!("x, y = (torch.rand({N}, {D}, dtype=dtype) for _ in range(2))");
    baseline(
        &mut g,
        "torch_products",
        "float32",
        &setup,
        "cka_products(x, y)",
    );
    g.finish();

    const M: usize = 2048;
    const P: usize = 256;
    let of = (Of::Rbf { gamma: 0.01 }, Of::Rbf { gamma: 0.01 });
    let mut g = group(c, "rbf_cka");
    g.throughput(flops(2 * M * M * P));
    ours(&mut g, "float32", || {
        let (x, y) = (Rows::matrix(&x[..M * P], P), Rows::matrix(&y[..M * P], P));
        hsic::dependence(&x, &y, of, true, &Cancel::new()).expect("finite")
    });
    let setup = format!("x, y = (torch.rand({M}, {P}, dtype=dtype) for _ in range(2))");
    baseline(&mut g, "torch", "float32", &setup, "rbf_cka(x, y, 7.07)");
    g.finish();
}

fn resampling(c: &mut Criterion) {
    const N: usize = 100_000;
    const B: usize = 200;
    let any = uniform::<f64>(N, 1, -1.0, 1.0);
    let binary: Vec<f64> = any.iter().map(|v| f64::from(u8::from(*v > 0.7))).collect();
    let mut g = group(c, "bootstrap");
    g.throughput(Throughput::Elements((N * B) as u64));
    for (case, values) in [("any", &any), ("binary", &binary)] {
        let strata = [Stratum::new(values, None).expect("finite")];
        ours(&mut g, case, || {
            bootstrap(&strata, B, 0, &Cancel::new()).expect("not cancelled")
        });
    }
    g.finish();
}

fn overlap(c: &mut Criterion) {
    const WORDS: usize = 1000;
    let b: Vec<usize> = (0..WORDS).map(|i| hash(i) as usize % 300).collect();
    let a: Vec<Option<usize>> = (0..WORDS)
        .map(|i| Some(hash(i + 7777) as usize % 300))
        .collect();
    let mut g = group(c, "common_subsequence");
    g.throughput(Throughput::Elements((WORDS * WORDS) as u64));
    ours(&mut g, "1000_words", || {
        common_subsequence(black_box(&a), &b, 300)
    });
    g.finish();
}

criterion_group!(benches, similarity, resampling, overlap, common::machine);
criterion_main!(benches);
