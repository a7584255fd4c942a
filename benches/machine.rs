//! The machine's rates alone: copy, triad and the matrix product.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};

fn all(c: &mut Criterion) {
    common::machine(c);
    common::matmul::<f32>(c);
    common::matmul::<f64>(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
