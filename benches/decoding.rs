//! Decoding kernels at the size of a served batch: 64 rows over a vocabulary of 151 936.

mod common;

use abjure::element::{Element, Real};
use abjure::refuse::decoding::{
    Automaton, ByteAutomaton, Contexts, Edits, Gate, GateOptions, Groups, Matcher, NoFire,
    Position, Reading, Rule, Vocabulary, bias, force, max_gaps, row_lse,
};
use abjure::view::{Rows, RowsMut};
use common::{baseline, bytes, group, hash, ours, uniform};
use criterion::{Criterion, criterion_group, criterion_main};
use half::{bf16, f16};
use std::hint::black_box;
use std::sync::Arc;

const ROWS: usize = 64;
const VOCAB: usize = 151_936;
const PHRASES: usize = 1000;
const CONTEXT: usize = 512;
/// The refusal token, and the margin it would need.
const TOKEN: usize = 17;
const THRESHOLD: f64 = -7.0;

/// Uniform logits. In a third of the rows the refusal token comes near enough to its threshold that only the row's
/// log-sum-exp can tell; in none does it reach it, so that a call leaves the logits as they were.
fn logits<T: Element>() -> Vec<T> {
    let mut z = uniform::<T>(ROWS * VOCAB, 1, -8.0, 8.0);
    for row in z.chunks_exact_mut(VOCAB).step_by(3) {
        row[TOKEN] = T::store(T::Acc::from_f64(8.0));
    }
    z
}

/// The same in Python, with the contexts and phrases of the kernels.
fn setup(phrases: &[Vec<i64>], context: &[i64]) -> String {
    format!(
        "from transformers import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor\n\
         z = torch.empty({ROWS}, {VOCAB}).uniform_(-8, 8)\n\
         z[::3, {TOKEN}] = 8.0\n\
         z = z.to(dtype)\n\
         ids = torch.randint({VOCAB}, ({ROWS}, {CONTEXT}))\n\
         ids[:, {CONTEXT} - {}:] = torch.tensor({context:?}).view({ROWS}, -1)\n\
         phrases = {phrases:?}",
        context.len() / ROWS
    )
}

fn phrases() -> Vec<Vec<i64>> {
    let token = |i: usize| (hash(i) % VOCAB as u64) as i64;
    (0..PHRASES)
        .map(|i| (0..1 + i % 6).map(|k| token(i * 6 + k)).collect())
        .collect()
}

fn reductions<T: Element>(c: &mut Criterion, setup: &str) {
    let mut z = logits::<T>();
    let dtype = T::DTYPE.name();
    let size = bytes(size_of_val(&z[..]));
    let token = vec![vec![TOKEN as i64]];
    let groups = Groups::new("groups", &token).expect("one group");
    let mut g = group(c, "row_max_gap");
    g.throughput(size.clone());
    ours(&mut g, dtype, || {
        max_gaps(black_box(&Rows::matrix(&z, VOCAB)), &groups).expect("no NaN")
    });
    let form = format!("row_max_gap(z, {TOKEN})");
    baseline(&mut g, "torch, amax of two slices", dtype, setup, &form);
    g.finish();

    let mut g = group(c, "row_lse");
    g.throughput(size.clone());
    ours(&mut g, dtype, || {
        row_lse(black_box(&Rows::matrix(&z, VOCAB)), 1.0).expect("no NaN")
    });
    let form = "torch.logsumexp(z.double(), 1)";
    baseline(&mut g, "torch, float64 copy", dtype, setup, form);
    g.finish();

    let options = GateOptions {
        bias: vec![0.0],
        thresholds: vec![Some(THRESHOLD)],
        rule: Rule::Ratio,
        no_fire: NoFire::Keep,
        temperature: 1.0,
    };
    let gate = Gate::new(&token, options).expect("one category");
    let mut g = group(c, "gate");
    g.throughput(size);
    ours(&mut g, dtype, || {
        let z = RowsMut::matrix(black_box(&mut z), VOCAB);
        gate.apply(z, &[Position::Gate; ROWS]).expect("no NaN")
    });
    let probability = 1.0 / (1.0 + (-THRESHOLD).exp());
    let form = format!("gate(z, {TOKEN}, {probability})");
    baseline(&mut g, "torch, softmax and compare", dtype, setup, &form);
    g.finish();
}

fn edits<T: Element>(c: &mut Criterion, automaton: &Automaton, context: &[i64], setup: &str) {
    let mut z = logits::<T>();
    let dtype = T::DTYPE.name();
    let contexts =
        Contexts::new(context, automaton.reach(), &[0; ROWS]).expect("one context per row");
    let mut g = group(c, "forbidden_phrases");
    ours(&mut g, dtype, || {
        let z = RowsMut::matrix(black_box(&mut z), VOCAB);
        automaton.apply(z, &contexts, None).expect("no NaN")
    });
    for (form, made) in [
        ("NoBadWordsLogitsProcessor", "(phrases)"),
        (
            "SequenceBiasLogitsProcessor",
            "([[p, -4.0] for p in phrases])",
        ),
    ] {
        let setup = format!("{setup}\nprocessor = {form}{made}");
        baseline(&mut g, form, dtype, &setup, "processor(ids, z)");
    }
    g.finish();

    let ids: Vec<i64> = (0..VOCAB as i64).step_by(VOCAB / 100).collect();
    // Alternating signs of no net effect would round; adding zero writes as much.
    let edits = Edits::sum(None, &ids, &vec![0.0; ids.len()], ROWS, VOCAB).expect("sound list");
    z = logits::<T>();
    let mut g = group(c, "bias_101_tokens");
    ours(&mut g, dtype, || {
        bias(RowsMut::matrix(black_box(&mut z), VOCAB), &edits).expect("no NaN")
    });
    let setup_bias = format!(
        "{setup}\nids, values = torch.tensor({ids:?}), torch.zeros({})",
        ids.len()
    );
    let form = format!("z.add_(torch.zeros({VOCAB}).index_add_(0, ids, values))");
    baseline(&mut g, "torch, dense vector", dtype, &setup_bias, &form);
    g.finish();

    let forced: Vec<i64> = (0..ROWS as i64).collect();
    let mut g = group(c, "force");
    g.throughput(bytes(size_of_val(&z[..])));
    ours(&mut g, dtype, || {
        force(RowsMut::matrix(black_box(&mut z), VOCAB), &forced).expect("ids in the vocabulary")
    });
    let setup = format!("{setup}\nforced = torch.arange({ROWS})[:, None]");
    let form = "z.fill_(-torch.inf).scatter_(1, forced, 0)";
    baseline(&mut g, "torch, fill and scatter", dtype, &setup, form);
    g.finish();
}

/// A made-up word.
fn word(seed: usize, syllables: u64) -> String {
    const SYLLABLES: [&str; 16] = [
        "ka", "to", "ri", "en", "st", "ing", "er", "a", "o", "th", "pre", "con", "lo", "mi", "es",
        "zu",
    ];
    let draws = hash(seed);
    (0..syllables)
        .map(|k| SYLLABLES[((draws >> (4 * k)) & 15) as usize])
        .collect()
}

/// The bytes, then made-up pieces, half of them behind a space.
fn pieces() -> Vec<Vec<u8>> {
    let made = (0..VOCAB - 256).map(|i| {
        let space = if hash(i + 1).is_multiple_of(2) {
            " "
        } else {
            ""
        };
        format!("{space}{}", word(i, 1 + i as u64 % 5)).into_bytes()
    });
    (0..=255).map(|b| vec![b]).chain(made).collect()
}

/// A step over more and more phrases of token ids and of bytes, beside one softmax of the same logits.
fn growth(c: &mut Criterion, setup: &str) {
    let mut z = logits::<bf16>();
    let dtype = bf16::DTYPE.name();
    let pieces = pieces();
    let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
    let reading = Reading {
        fold: true,
        transparent: true,
    };
    let vocabulary = Arc::new(Vocabulary::new(&pieces, reading).expect("pieces with text"));
    for count in [100, 1000, 10_000, 100_000] {
        let token = |i: usize| (hash(i) % VOCAB as u64) as i64;
        let phrases: Vec<Vec<i64>> = (0..count)
            .map(|i| (0..2 + i % 5).map(|k| token(i * 6 + k)).collect())
            .collect();
        let slices: Vec<&[i64]> = phrases.iter().map(Vec::as_slice).collect();
        let tokens = Automaton::new(&slices, Some(VOCAB), 16, None).expect("sound phrases");
        let reach = tokens.reach();
        let context: Vec<i64> = (0..ROWS * reach)
            .map(|i| phrases[4][i % reach % 5])
            .collect();
        let contexts = Contexts::new(&context, reach, &[0; ROWS]).expect("one context per row");
        let mut g = group(c, "phrases_by_count");
        ours(&mut g, &format!("{dtype}/{count}"), || {
            let z = RowsMut::matrix(black_box(&mut z), VOCAB);
            tokens.apply(z, &contexts, None).expect("no NaN")
        });
        g.finish();

        let texts: std::collections::BTreeSet<Vec<u8>> = (0..count)
            .map(|i| format!("{} {} {i}", word(i, 3), word(i + VOCAB, 4)).into_bytes())
            .collect();
        let texts: Vec<&[u8]> = texts.iter().map(Vec::as_slice).collect();
        let bytes = ByteAutomaton::new(&texts, vocabulary.clone(), true, 256, None);
        let bytes = bytes.expect("sound phrases");
        let reach = bytes.reach();
        // Every row ends within a phrase, at a byte of its own.
        let mut context = vec![32; ROWS * reach];
        for (i, row) in context.chunks_exact_mut(reach).enumerate() {
            let text = texts[i * 7 % texts.len()];
            let part = &text[..1 + i % (text.len() - 1)];
            for (to, byte) in row[reach - part.len()..].iter_mut().zip(part) {
                *to = i64::from(*byte);
            }
        }
        let contexts = Contexts::new(&context, reach, &[0; ROWS]).expect("one context per row");
        let mut g = group(c, "byte_phrases_by_count");
        ours(&mut g, &format!("{dtype}/{count}"), || {
            let z = RowsMut::matrix(black_box(&mut z), VOCAB);
            bytes.apply(z, &contexts, None).expect("no NaN")
        });
        g.finish();
    }
    for name in ["phrases_by_count", "byte_phrases_by_count"] {
        let mut g = group(c, name);
        let form = "torch.softmax(z, -1)";
        baseline(&mut g, "torch, one softmax", dtype, setup, form);
        g.finish();
    }
}

fn all(c: &mut Criterion) {
    common::machine(c);
    let phrases = phrases();
    let slices: Vec<&[i64]> = phrases.iter().map(Vec::as_slice).collect();
    let automaton = Automaton::new(&slices, Some(VOCAB), 16, None).expect("sound phrases");
    let reach = automaton.reach();
    // Every row is about to complete a phrase of six tokens.
    let context: Vec<i64> = (0..ROWS * reach)
        .map(|i| phrases[5][i % reach % 5])
        .collect();
    let setup = setup(&phrases, &context);
    reductions::<f32>(c, &setup);
    reductions::<bf16>(c, &setup);
    reductions::<f16>(c, &setup);
    reductions::<f64>(c, &setup);
    edits::<f32>(c, &automaton, &context, &setup);
    edits::<bf16>(c, &automaton, &context, &setup);
    edits::<f16>(c, &automaton, &context, &setup);
    edits::<f64>(c, &automaton, &context, &setup);
    growth(c, &setup);
}

criterion_group!(benches, all);
criterion_main!(benches);
