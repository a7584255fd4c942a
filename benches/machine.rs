//! The machine's copy and triad, and what torch's copy gets out of it.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};

fn machine(c: &mut Criterion) {
    common::machine(c);
    let mut group = common::group(c, "machine");
    common::baseline(
        &mut group,
        "copy/torch",
        "import torch\na = torch.ones(64 << 20)\nb = torch.empty(64 << 20)",
        "b.copy_(a)",
    );
    group.finish();
}

criterion_group!(benches, machine);
criterion_main!(benches);
