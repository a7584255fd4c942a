//! Decoding kernels at the size of a served batch: 64 rows over a vocabulary of 151 936.

mod common;

use abjure::element::{Element, Real};
use abjure::refuse::decoding::{
    Automaton, Contexts, Edits, Gate, GateOptions, Groups, NoFire, Position, Rule, bias, max_gaps,
    row_lse,
};
use abjure::view::{Rows, RowsMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use std::hint::black_box;

const ROWS: usize = 64;
const VOCAB: usize = 151_936;
const PHRASES: usize = 1000;

/// A sequence that needs no seed to be the same everywhere.
fn hash(i: usize) -> u64 {
    let mut x = (i as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn logits<T: Element>() -> Vec<T> {
    (0..ROWS * VOCAB)
        .map(|i| {
            T::store(T::Acc::from_f64(
                hash(i) as f64 / u64::MAX as f64 * 16.0 - 8.0,
            ))
        })
        .collect()
}

fn phrases() -> Vec<Vec<i64>> {
    (0..PHRASES)
        .map(|i| {
            (0..1 + i % 6)
                .map(|k| (hash(i * 6 + k) % VOCAB as u64) as i64)
                .collect()
        })
        .collect()
}

fn element<T: Element>(c: &mut Criterion) {
    let z = logits::<T>();
    let mut work = z.clone();
    let dtype = T::DTYPE.name();
    let bytes = Throughput::Bytes((z.len() * size_of::<T>()) as u64);
    let mut group = common::group(c, "decoding");
    group.throughput(bytes);
    let groups = Groups::new("groups", &[vec![17]]).expect("one group");
    group.bench_function(format!("row_max_gap/{dtype}"), |b| {
        b.iter(|| max_gaps(black_box(&Rows::matrix(&z, VOCAB)), &groups));
    });
    group.bench_function(format!("row_lse/{dtype}"), |b| {
        b.iter(|| row_lse(black_box(&Rows::matrix(&z, VOCAB)), 1.0));
    });
    let options = GateOptions {
        bias: vec![0.0],
        thresholds: vec![Some(0.0)],
        rule: Rule::Ratio,
        no_fire: NoFire::Keep,
        temperature: 1.0,
    };
    let gate = Gate::new(&[vec![17]], options).expect("one category");
    group.bench_function(format!("gate/{dtype}"), |b| {
        b.iter(|| {
            gate.apply(
                RowsMut::matrix(black_box(&mut work), VOCAB),
                &[Position::Gate; ROWS],
            )
        });
    });
    // What is written: one line per entry.
    let phrases = phrases();
    let slices: Vec<&[i64]> = phrases.iter().map(Vec::as_slice).collect();
    let automaton = Automaton::new(&slices, Some(VOCAB), 16, None).expect("sound phrases");
    let reach = automaton.reach();
    let context: Vec<i64> = (0..ROWS * reach)
        .map(|i| phrases[5][i % reach % 5])
        .collect();
    let begin = [0; ROWS];
    let singles = phrases.iter().filter(|p| p.len() == 1).count();
    group.throughput(Throughput::Elements((ROWS * singles) as u64));
    group.bench_function(format!("phrases/{dtype}"), |b| {
        let contexts = Contexts::new(&context, reach, &begin).expect("one context per row");
        b.iter(|| {
            automaton.apply(
                RowsMut::matrix(black_box(&mut work), VOCAB),
                &contexts,
                None,
            )
        });
    });
    let ids: Vec<i64> = (0..VOCAB as i64).step_by(VOCAB / 100).collect();
    let values = vec![0.125; ids.len()];
    let edits = Edits::sum(None, &ids, &values, ROWS, VOCAB).expect("sound list");
    work.copy_from_slice(&z);
    group.throughput(Throughput::Elements((ROWS * ids.len()) as u64));
    group.bench_function(format!("bias/{dtype}"), |b| {
        b.iter(|| bias(RowsMut::matrix(black_box(&mut work), VOCAB), &edits));
    });
    group.finish();
}

fn baselines(c: &mut Criterion) {
    let mut group = common::group(c, "decoding");
    for dtype in ["float32", "bfloat16"] {
        let setup = format!(
            "import torch\nfrom transformers import NoBadWordsLogitsProcessor\ng = torch.Generator().manual_seed(0)\n\
             z = torch.randn({ROWS}, {VOCAB}, generator=g).to(torch.{dtype})\n\
             ids = torch.randint(0, {VOCAB}, ({ROWS}, 512), generator=g)\n\
             words = [torch.randint(0, {VOCAB}, (1 + i % 6,), generator=g).tolist() for i in range({PHRASES})]\n\
             processor = NoBadWordsLogitsProcessor(words)"
        );
        common::baseline(
            &mut group,
            &format!("phrases/{dtype} transformers"),
            &setup,
            "processor(ids, z)",
        );
        common::baseline(
            &mut group,
            &format!("row_lse/{dtype} torch"),
            &setup,
            "torch.logsumexp(z.double(), 1)",
        );
        common::baseline(
            &mut group,
            &format!("row_max_gap/{dtype} torch"),
            &setup,
            "z.amax(1)",
        );
        common::baseline(
            &mut group,
            &format!("gate/{dtype} torch"),
            &setup,
            "torch.softmax(z.float(), -1)[:, 17] >= 0.5",
        );
    }
    group.finish();
}

fn all(c: &mut Criterion) {
    common::machine(c);
    element::<f32>(c);
    element::<bf16>(c);
    element::<f16>(c);
    element::<f64>(c);
    baselines(c);
}

criterion_group!(benches, all);
criterion_main!(benches);
