//! Vectors of documents and words in one space: PV-DBOW with skip-gram words (Le and Mikolov 2014; Mikolov et al. 2013).
//!
//! The vector of a document, and of each word near a word, learn to tell that word from words drawn by frequency to the power
//! 0.75 (negative sampling). One thread learns, in order, with random numbers that are a function of seed, epoch and
//! document: the same bits always. Vectors of new documents are found apart from each other, on all threads.

use crate::cancel::Cancel;
use crate::simd::{Kernel, dispatch, dot};
use crate::{Error, Result, par};

/// How to learn.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    pub size: usize,
    /// Words on each side, at most; each time a number from 1 to it is drawn.
    pub window: usize,
    pub negative: usize,
    /// Words more frequent than this share of all are left out now and then; 0 for never.
    pub sample: f64,
    pub epochs: usize,
    /// Learning rate, falling along a line from first to last.
    pub rate: (f32, f32),
    pub seed: u64,
}

impl Options {
    /// # Errors
    /// `Value`: a number outside its domain.
    pub fn check(&self) -> Result<()> {
        for (arg, value) in [
            ("size", self.size),
            ("window", self.window),
            ("negative", self.negative),
            ("epochs", self.epochs),
        ] {
            if value == 0 {
                return Err(Error::value(arg, "1 or more", 0));
            }
        }
        if !(self.sample >= 0.0 && self.sample.is_finite()) {
            return Err(Error::value(
                "sample",
                "a finite number from 0",
                self.sample,
            ));
        }
        let (first, last) = self.rate;
        if !(first > 0.0 && last > 0.0 && first.is_finite() && last <= first) {
            return Err(Error::value(
                "rate",
                "two falling numbers above 0",
                format!("{first}, {last}"),
            ));
        }
        Ok(())
    }
}

/// Documents as numbers of words, one after another, and where each ends.
#[derive(Debug, Clone, Copy)]
pub struct Documents<'a> {
    pub words: &'a [u32],
    pub ends: &'a [i64],
}

impl Documents<'_> {
    fn check(&self, vocabulary: usize) -> Result<()> {
        let ordered =
            self.ends.windows(2).all(|w| w[0] <= w[1]) && self.ends.first().is_none_or(|e| *e >= 0);
        if !ordered || self.ends.last().map_or(0, |e| *e) != self.words.len() as i64 {
            return Err(Error::value(
                "ends",
                format!("non-decreasing offsets to {}", self.words.len()),
                "others",
            ));
        }
        if let Some(bad) = self.words.iter().find(|w| **w as usize >= vocabulary) {
            return Err(Error::value("words", format!("below {vocabulary}"), bad));
        }
        Ok(())
    }

    fn get(&self, i: usize) -> &[u32] {
        let start = if i == 0 { 0 } else { self.ends[i - 1] };
        &self.words[start as usize..self.ends[i] as usize]
    }
}

/// What was learned: rows of `size` values.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    pub documents: Vec<f32>,
    pub words: Vec<f32>,
    /// Weights by which words are told apart.
    pub context: Vec<f32>,
}

fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// SplitMix64 from a start that several numbers give.
struct Random(u64);

impl Random {
    fn new(parts: [u64; 4]) -> Self {
        Self(
            parts
                .iter()
                .fold(0, |h, v| mix((h ^ v).wrapping_add(0x9e37_79b9_7f4a_7c15))),
        )
    }

    #[inline(always)]
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    #[inline(always)]
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }

    /// Uniform in [0, 1).
    #[inline(always)]
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 * 2f64.powi(-53)
    }
}

/// Rows that start uniform within ±½ / size.
fn start(rows: usize, size: usize, seed: u64, kind: u64) -> Vec<f32> {
    let mut random = Random::new([seed, kind, 0, 0]);
    (0..rows * size)
        .map(|_| (random.unit() as f32 - 0.5) / size as f32)
        .collect()
}

/// Draws words by frequency^0.75: a table of equal steps, as the original has it, long enough for the rarest.
struct Noise(Vec<u32>);

impl Noise {
    fn new(counts: &[u64]) -> Self {
        let powers: Vec<f64> = counts.iter().map(|c| (*c as f64).powf(0.75)).collect();
        let (total, length) = (
            powers.iter().sum::<f64>(),
            (counts.len() * 64).clamp(1 << 12, 1 << 24),
        );
        let (mut table, mut sum) = (Vec::with_capacity(length), 0.0);
        for (word, p) in powers.iter().enumerate() {
            sum += p;
            table.resize(
                ((sum / total * length as f64).round() as usize)
                    .max(table.len())
                    .min(length),
                word as u32,
            );
        }
        table.resize(length, counts.len() as u32 - 1);
        Self(table)
    }
}

/// One step of negative sampling: `input` and the contexts of `word` and of the words drawn move; with `frozen` the
/// contexts stay. `change` is scratch.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn teach(
    input: &mut [f32],
    context: &mut [f32],
    word: u32,
    noise: &Noise,
    negative: usize,
    rate: f32,
    frozen: bool,
    random: &mut Random,
    change: &mut [f32],
) {
    let size = input.len();
    change.fill(0.0);
    for draw in 0..=negative {
        let (target, label) = match draw {
            0 => (word, 1.0),
            _ => match noise.0[random.below(noise.0.len())] {
                same if same == word => continue,
                other => (other, 0.0),
            },
        };
        let weights = &mut context[target as usize * size..][..size];
        let z = dot(&input[..], weights) as f32;
        let by = rate * (label - 1.0 / (1.0 + (-z).exp()));
        for ((c, w), v) in change.iter_mut().zip(weights).zip(&*input) {
            *c += by * *w;
            if !frozen {
                *w += by * v;
            }
        }
    }
    input.iter_mut().zip(change).for_each(|(v, c)| *v += *c);
}

struct Train<'a> {
    documents: Documents<'a>,
    counts: &'a [u64],
    noise: &'a Noise,
    options: &'a Options,
    model: &'a mut Model,
    cancel: &'a Cancel,
}

impl Kernel for Train<'_> {
    type Output = Result<()>;
    #[inline(always)]
    fn run(self) -> Result<()> {
        let Self {
            documents,
            counts,
            noise,
            options: o,
            model,
            cancel,
        } = self;
        let (n, total) = (documents.ends.len(), counts.iter().sum::<u64>() as f64);
        let mut change = vec![0.0; o.size];
        for epoch in 0..o.epochs {
            for i in 0..n {
                cancel.check()?;
                let done = (epoch * n + i) as f32 / (o.epochs * n) as f32;
                let rate = o.rate.0 + (o.rate.1 - o.rate.0) * done;
                let mut random = Random::new([o.seed, 1, epoch as u64, i as u64]);
                let kept = keep(documents.get(i), counts, total, o.sample, &mut random);
                for (at, word) in kept.iter().enumerate() {
                    let own = &mut model.documents[i * o.size..(i + 1) * o.size];
                    teach(
                        own,
                        &mut model.context,
                        *word,
                        noise,
                        o.negative,
                        rate,
                        false,
                        &mut random,
                        &mut change,
                    );
                    let reach = 1 + random.below(o.window);
                    let (low, high) = (at.saturating_sub(reach), (at + reach + 1).min(kept.len()));
                    for near in (low..high).filter(|j| *j != at) {
                        let own = &mut model.words[kept[near] as usize * o.size..][..o.size];
                        teach(
                            own,
                            &mut model.context,
                            *word,
                            noise,
                            o.negative,
                            rate,
                            false,
                            &mut random,
                            &mut change,
                        );
                    }
                }
            }
            cancel.advance(1);
        }
        Ok(())
    }
}

/// The words of a document without some of the frequent ones.
fn keep(words: &[u32], counts: &[u64], total: f64, sample: f64, random: &mut Random) -> Vec<u32> {
    if sample == 0.0 {
        return words.to_vec();
    }
    let likely = |w: u32| {
        let ratio = counts[w as usize] as f64 / (sample * total);
        (ratio.sqrt() + 1.0) / ratio
    };
    words
        .iter()
        .copied()
        .filter(|w| random.unit() < likely(*w))
        .collect()
}

/// Learns from documents whose words occur `counts` times.
///
/// # Errors
/// `Value`: arguments that do not fit; `Degenerate`: no words; `Interrupted`.
pub fn train(
    documents: Documents<'_>,
    counts: &[u64],
    options: &Options,
    cancel: &Cancel,
) -> Result<Model> {
    options.check()?;
    documents.check(counts.len())?;
    if documents.words.is_empty() || counts.contains(&0) {
        return Err(Error::degenerate(
            "texts",
            "expected words that occur (min_count may be too high)",
        ));
    }
    let mut model = Model {
        documents: start(documents.ends.len(), options.size, options.seed, 2),
        words: start(counts.len(), options.size, options.seed, 3),
        context: vec![0.0; counts.len() * options.size],
    };
    let noise = Noise::new(counts);
    dispatch(Train {
        documents,
        counts,
        noise: &noise,
        options,
        model: &mut model,
        cancel,
    })?;
    Ok(model)
}

struct Infer<'a> {
    words: &'a [u32],
    counts: &'a [u64],
    noise: &'a Noise,
    options: &'a Options,
    context: &'a mut [f32],
    place: usize,
}

impl Kernel for Infer<'_> {
    type Output = Vec<f32>;
    #[inline(always)]
    fn run(self) -> Vec<f32> {
        let o = self.options;
        let total = self.counts.iter().sum::<u64>() as f64;
        let mut own = start(1, o.size, mix(o.seed ^ 5) ^ self.place as u64, 4);
        let mut change = vec![0.0; o.size];
        for epoch in 0..o.epochs {
            let rate = o.rate.0 + (o.rate.1 - o.rate.0) * epoch as f32 / o.epochs as f32;
            let mut random = Random::new([o.seed, 6, epoch as u64, self.place as u64]);
            for word in keep(self.words, self.counts, total, o.sample, &mut random) {
                teach(
                    &mut own,
                    self.context,
                    word,
                    self.noise,
                    o.negative,
                    rate,
                    true,
                    &mut random,
                    &mut change,
                );
            }
        }
        own
    }
}

/// Vectors of documents by weights that stay as they are; of a document without known words, zeros.
///
/// # Errors
/// `Shape`, `Value`: arguments that do not fit.
pub fn infer(
    documents: Documents<'_>,
    counts: &[u64],
    context: &[f32],
    options: &Options,
    cancel: &Cancel,
) -> Result<Vec<f32>> {
    options.check()?;
    documents.check(counts.len())?;
    if context.len() != counts.len() * options.size || counts.is_empty() {
        let expected = format!("{} words of {} values", counts.len(), options.size);
        return Err(Error::shape("context", expected, context.len()));
    }
    let noise = Noise::new(counts);
    let bytes = documents.words.len() * options.size * 4;
    let parts = par::try_map(bytes, par::ranges(documents.ends.len(), 16), |range| {
        // Written to by no one, but one function serves both.
        let mut context = context.to_vec();
        let mut out = Vec::with_capacity(range.len() * options.size);
        for place in range {
            cancel.check()?;
            let words = documents.get(place);
            if words.is_empty() {
                out.resize(out.len() + options.size, 0.0);
                continue;
            }
            let context = &mut context[..];
            out.extend(dispatch(Infer {
                words,
                counts,
                noise: &noise,
                options,
                context,
                place: 0,
            }));
        }
        Ok::<_, Error>(out)
    })?;
    Ok(parts.concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options {
            size: 16,
            window: 3,
            negative: 5,
            sample: 0.0,
            epochs: 40,
            rate: (0.05, 0.001),
            seed: 3,
        }
    }

    /// Documents of words 0..10 or of words 10..20.
    fn two_topics() -> (Vec<u32>, Vec<i64>, Vec<u64>) {
        let mut words = Vec::new();
        let mut random = Random::new([1, 2, 3, 4]);
        for i in 0..60 {
            words.extend((0..12).map(|_| (random.below(10) + 10 * (i % 2)) as u32));
        }
        let mut counts = vec![0; 20];
        words.iter().for_each(|w| counts[*w as usize] += 1);
        (words, (1..=60).map(|i| 12 * i).collect(), counts)
    }

    fn cosine(a: &[f32], b: &[f32]) -> f64 {
        let of = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        of(a, b) / (of(a, a) * of(b, b)).sqrt()
    }

    #[test]
    fn documents_and_words_of_a_topic_come_together() {
        let (words, ends, counts) = two_topics();
        let documents = Documents {
            words: &words,
            ends: &ends,
        };
        let model = train(documents, &counts, &options(), &Cancel::new()).unwrap();
        assert_eq!(
            model,
            train(documents, &counts, &options(), &Cancel::new()).unwrap()
        );
        let row = |v: &'_ [f32], i: usize| v[16 * i..16 * (i + 1)].to_vec();
        let (mut same, mut other) = (0.0, 0.0);
        for i in 0..60 {
            for w in 0..20 {
                let c = cosine(&row(&model.documents, i), &row(&model.words, w));
                if i % 2 == w / 10 {
                    same += c
                } else {
                    other += c
                }
            }
        }
        assert!(same / 600.0 > other / 600.0 + 0.3, "{same} {other}");
        let before = par::num_threads();
        let mut seen = Vec::new();
        for threads in [1, 3] {
            par::set_num_threads(threads);
            seen.push(
                infer(
                    documents,
                    &counts,
                    &model.context,
                    &options(),
                    &Cancel::new(),
                )
                .unwrap(),
            );
        }
        par::set_num_threads(before);
        assert_eq!(seen[0], seen[1]);
        let near = (0..60).filter(|i| {
            let of = |w: usize| cosine(&row(&seen[0], *i), &row(&model.documents, w));
            of(i % 2) > of(1 - i % 2)
        });
        assert!(near.count() >= 57);
    }

    #[test]
    fn words_are_drawn_by_their_frequency() {
        let noise = Noise::new(&[1, 16, 81]);
        let share =
            |w: u32| noise.0.iter().filter(|v| **v == w).count() as f64 / noise.0.len() as f64;
        for (w, expected) in [(0, 1.0 / 36.0), (1, 8.0 / 36.0), (2, 27.0 / 36.0)] {
            assert!((share(w) - expected).abs() < 1e-3);
        }
        let mut random = Random::new([9; 4]);
        let kept = keep(
            &[0; 20_000],
            &[1_000_000, 1],
            1_000_001.0,
            1e-3,
            &mut random,
        )
        .len() as f64
            / 20_000.0;
        // (sqrt(1000) + 1) / 1000.
        assert!((kept - 0.032_62).abs() < 0.005, "{kept}");
        assert_eq!(keep(&[0, 1], &[5, 5], 10.0, 0.0, &mut random), [0, 1]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (words, ends, counts) = two_topics();
        let documents = Documents {
            words: &words,
            ends: &ends,
        };
        let run = |d: Documents<'_>, c: &[u64], o: Options| {
            train(d, c, &o, &Cancel::new()).unwrap_err().to_string()
        };
        assert!(
            run(
                documents,
                &counts,
                Options {
                    size: 0,
                    ..options()
                }
            )
            .contains("size")
        );
        assert!(
            run(
                documents,
                &counts,
                Options {
                    rate: (0.1, 0.2),
                    ..options()
                }
            )
            .contains("rate")
        );
        assert!(
            run(
                documents,
                &counts,
                Options {
                    sample: -1.0,
                    ..options()
                }
            )
            .contains("sample")
        );
        assert!(run(documents, &counts[..19], options()).contains("below 19"));
        assert!(
            run(
                Documents {
                    words: &[],
                    ends: &[0]
                },
                &counts,
                options()
            )
            .contains("occur")
        );
        assert!(
            run(
                Documents {
                    ends: &[5, 3],
                    ..documents
                },
                &counts,
                options()
            )
            .contains("ends")
        );
        assert!(infer(documents, &counts, &[0.0; 3], &options(), &Cancel::new()).is_err());
        let none = infer(
            Documents {
                words: &[],
                ends: &[0],
            },
            &counts,
            &[0.0; 320],
            &options(),
            &Cancel::new(),
        )
        .unwrap();
        assert_eq!(none, [0.0; 16]);
        let stopped = Cancel::new();
        stopped.cancel();
        assert_eq!(
            train(documents, &counts, &options(), &stopped),
            Err(Error::Interrupted)
        );
    }
}
