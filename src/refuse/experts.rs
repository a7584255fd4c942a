//! Which routed experts a mixture-of-experts model chose for the tokens of each prompt: counts and summed gate weights.

use crate::element::{Element, Real};
use crate::error::{Error, Result};
use crate::par;
use std::ops::Range;

/// Tokens of a range, at least: a table of its own has to pay.
const RANGE: usize = 8192;

/// A table per prompt and expert.
#[derive(Debug, Clone, PartialEq)]
pub struct Selections {
    /// Tokens of each prompt.
    pub tokens: Vec<u64>,
    /// How often each prompt chose each expert, (prompts, experts).
    pub counts: Vec<u64>,
    /// Sums of the gate weights, (prompts, experts); empty where none were given.
    pub weights: Vec<f64>,
}

impl Selections {
    fn new(prompts: usize, experts: usize, weighted: bool) -> Self {
        Self {
            tokens: vec![0; prompts],
            counts: vec![0; prompts * experts],
            weights: vec![0.0; if weighted { prompts * experts } else { 0 }],
        }
    }

    fn add(&mut self, other: &Self) {
        fn sum<T: Copy + std::ops::AddAssign>(a: &mut [T], b: &[T]) {
            a.iter_mut().zip(b).for_each(|(a, b)| *a += *b);
        }
        sum(&mut self.tokens, &other.tokens);
        sum(&mut self.counts, &other.counts);
        sum(&mut self.weights, &other.weights);
    }
}

/// The arguments of [`count_selections`].
#[derive(Debug, Clone, Copy)]
pub struct Routing<'a, T> {
    /// Chosen experts, (tokens, k).
    pub ids: &'a [i64],
    /// Experts per token.
    pub k: usize,
    /// Their gate weights, (tokens, k).
    pub weights: Option<&'a [T]>,
    /// The prompt of each token, -1 for padding; all tokens are of prompt 0 without it.
    pub prompts: Option<&'a [i64]>,
}

/// Counts the experts that each prompt's tokens chose, in tables per range that are added in the order of the ranges.
///
/// # Errors
/// `Shape` where lengths do not fit; `Value` for an expert or prompt that does not exist, `NonFinite` for a weight that
/// is NaN or infinite, the first in the order of the tokens. Tokens of padding are not looked at.
pub fn count_selections<T: Element>(
    routing: Routing<'_, T>,
    prompts: usize,
    experts: usize,
) -> Result<Selections> {
    let Routing { ids, k, .. } = routing;
    if k == 0 || !ids.len().is_multiple_of(k) {
        return Err(Error::shape(
            "topk_ids",
            "(tokens, k), k at least 1",
            ids.len(),
        ));
    }
    let tokens = ids.len() / k;
    if let Some(w) = routing.weights
        && w.len() != ids.len()
    {
        return Err(Error::shape("weights", ids.len(), w.len()));
    }
    if let Some(p) = routing.prompts
        && p.len() != tokens
    {
        return Err(Error::shape("prompts", tokens, p.len()));
    }
    if prompts == 0 || experts == 0 {
        return Err(Error::value("experts", "1 or more", prompts.min(experts)));
    }
    // Adding a table costs as much as filling one from as many choices, so a range holds at least that many.
    let step = RANGE.max((prompts * experts).div_ceil(k));
    let parts = par::try_map(
        size_of_val(ids),
        par::ranges(tokens, step),
        |range| -> Result<Selections> { count_range(routing, range, prompts, experts) },
    )?;
    let mut parts = parts.into_iter();
    let first = parts.next();
    let mut all =
        first.unwrap_or_else(|| Selections::new(prompts, experts, routing.weights.is_some()));
    parts.for_each(|part| all.add(&part));
    Ok(all)
}

fn count_range<T: Element>(
    routing: Routing<'_, T>,
    range: Range<usize>,
    prompts: usize,
    experts: usize,
) -> Result<Selections> {
    let k = routing.k;
    let mut table = Selections::new(prompts, experts, routing.weights.is_some());
    for token in range {
        let prompt = match routing.prompts.map_or(0, |p| p[token]) {
            -1 => continue,
            p if p >= 0 && (p as u64) < prompts as u64 => p as usize,
            p => {
                let expected = format!("-1 to {}", prompts - 1);
                return Err(Error::value("prompts", expected, p));
            }
        };
        table.tokens[prompt] += 1;
        for at in token * k..(token + 1) * k {
            let id = routing.ids[at];
            if id < 0 || id as u64 >= experts as u64 {
                let expected = format!("experts 0 to {}", experts - 1);
                return Err(Error::value(
                    "topk_ids",
                    expected,
                    format!("{id} at token {token}"),
                ));
            }
            let cell = prompt * experts + id as usize;
            table.counts[cell] += 1;
            if let Some(weights) = routing.weights {
                let weight = weights[at].load().to_f64();
                if !weight.is_finite() {
                    return Err(Error::NonFinite {
                        arg: "weights",
                        index: at,
                        found: weight,
                    });
                }
                table.weights[cell] += weight;
            }
        }
    }
    Ok(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn routing<'a>(
        ids: &'a [i64],
        k: usize,
        weights: Option<&'a [f32]>,
        prompts: Option<&'a [i64]>,
    ) -> Routing<'a, f32> {
        Routing {
            ids,
            k,
            weights,
            prompts,
        }
    }

    proptest! {
        #[test]
        fn counts_equal_a_plain_loop(
            choices in prop::collection::vec((0i64..5, 0i64..5, -1i64..3, 0.0f32..1.0), 0..200),
        ) {
            let ids: Vec<i64> = choices.iter().flat_map(|c| [c.0, c.1]).collect();
            let owners: Vec<i64> = choices.iter().map(|c| c.2).collect();
            let weights: Vec<f32> = choices.iter().flat_map(|c| [c.3, 1.0 - c.3]).collect();
            let got = count_selections(routing(&ids, 2, Some(&weights), Some(&owners)), 3, 5).unwrap();
            for prompt in 0..3 {
                let mine = || choices.iter().filter(move |c| c.2 == prompt as i64);
                prop_assert_eq!(got.tokens[prompt], mine().count() as u64);
                for e in 0..5i64 {
                    let count = mine().map(|c| u64::from(c.0 == e) + u64::from(c.1 == e)).sum::<u64>();
                    prop_assert_eq!(got.counts[prompt * 5 + e as usize], count);
                    let mut weight = 0.0;
                    for c in mine() {
                        if c.0 == e { weight += f64::from(c.3); }
                        if c.1 == e { weight += f64::from(1.0 - c.3); }
                    }
                    prop_assert_eq!(got.weights[prompt * 5 + e as usize], weight);
                }
            }
        }

        #[test]
        fn one_bad_id_anywhere_is_refused(at in 0usize..40_000, id in prop_oneof![Just(-1i64), Just(7), Just(i64::MIN), Just(i64::MAX)]) {
            let mut ids = vec![3i64; 40_000];
            ids[at] = id;
            let err = count_selections(routing(&ids, 2, None, None), 1, 7).unwrap_err();
            prop_assert_eq!(err, Error::value("topk_ids", "experts 0 to 6", format!("{id} at token {}", at / 2)));
        }
    }

    #[test]
    fn many_ranges_give_the_same_bits_on_every_number_of_threads() {
        let tokens = 50_000;
        let ids: Vec<i64> = (0..tokens * 4).map(|i| (i * 7919 % 64) as i64).collect();
        let weights: Vec<f32> = (0..tokens * 4).map(|i| 1.0 / (1 + i % 97) as f32).collect();
        let owners: Vec<i64> = (0..tokens).map(|i| i as i64 % 5 - 1).collect();
        let before = par::num_threads();
        let got: Vec<Selections> = [1, 2, 5]
            .into_iter()
            .map(|threads| {
                par::set_num_threads(threads);
                let routing = routing(&ids, 4, Some(&weights), Some(&owners));
                count_selections(routing, 4, 64).unwrap()
            })
            .collect();
        par::set_num_threads(before);
        assert!(got.windows(2).all(|w| w[0] == w[1]));
        assert_eq!(got[0].tokens, vec![10_000; 4]);
        assert_eq!(got[0].counts.iter().sum::<u64>(), 160_000);
    }

    #[test]
    fn padding_may_hold_anything_and_bad_arguments_are_named() {
        let nan = [f32::NAN, 0.5];
        let got = count_selections(routing(&[99, 1], 1, Some(&nan), Some(&[-1, 0])), 1, 2).unwrap();
        assert_eq!(
            (got.tokens, got.counts, got.weights),
            (vec![1], vec![0, 1], vec![0.0, 0.5])
        );
        for (result, arg) in [
            (
                count_selections(routing(&[0, 1, 0], 2, None, None), 1, 2),
                "topk_ids",
            ),
            (
                count_selections(routing(&[], 0, None, None), 1, 2),
                "topk_ids",
            ),
            (
                count_selections(routing(&[0], 1, Some(&[]), None), 1, 2),
                "weights",
            ),
            (
                count_selections(routing(&[0], 1, Some(&nan[..1]), None), 1, 2),
                "weights",
            ),
            (
                count_selections(routing(&[0], 1, None, Some(&[])), 1, 2),
                "prompts",
            ),
            (
                count_selections(routing(&[0], 1, None, Some(&[1])), 1, 2),
                "prompts",
            ),
            (
                count_selections(routing(&[0], 1, None, Some(&[-2])), 1, 2),
                "prompts",
            ),
            (
                count_selections(routing(&[0], 1, None, None), 1, 0),
                "experts",
            ),
        ] {
            assert!(result.unwrap_err().to_string().starts_with(arg));
        }
        let none = count_selections(routing(&[], 2, None, None), 1, 2).unwrap();
        assert_eq!(none.counts, vec![0, 0]);
    }
}
