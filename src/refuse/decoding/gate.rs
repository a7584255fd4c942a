//! The gate: whether a row refuses, by thresholds on margins, and what is then forced or removed.
//!
//! A category's margin m is bounded by its gap g to the largest other logit, `g − ln(V − n) ≤ m ≤ g`, so one pass over
//! the row for a maximum settles most rows (`m ≤ g ≤ m + ln(V − 1)` for one token). Only rows between the bounds need
//! the log-sum-exp: first in f32, with the error that can have allowed for and only as far as the verdict is open, and in
//! f64 where all of that leaves it so. Bounds and sums are used with a slack far above rounding and far below any meaningful
//! difference, so the verdict is always the one that the complete f64 margin gives.

use super::edits::{biased, check_entry, expect_tokens, force_row};
use super::reduce::{Groups, LogSum, Peaks, RoughSum, SumExp, first_poison, gather, largest};
use super::{LOGITS, no_token_left, token};
use crate::element::{Element, Real};
use crate::simd::dispatch;
use crate::view::RowsMut;
use crate::{Error, Result, par};

/// Added to bounds in favour of the complete sum; its rounding error is below 1e-12.
const SLACK: f64 = 1e-9;

/// How several categories decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The category that exceeds its own threshold by most.
    Ratio,
    /// The most probable category alone is held to its threshold (Jain et al. 2024, the published code).
    ArgmaxThenThreshold,
    /// The mass of all categories is held to one threshold; the most probable is then taken.
    Mass,
}

/// What happens to a row at its gate that does not refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoFire {
    /// Nothing but the biases.
    Keep,
    /// The refusal tokens are removed.
    Free,
    /// This token is forced.
    Respond(u32),
}

/// Settings of a [`Gate`].
#[derive(Debug, Clone)]
pub struct GateOptions {
    /// Added to the logits of each category before anything is decided.
    pub bias: Vec<f64>,
    /// Margin from which each category fires; `None` for one that never does. With [`Rule::Mass`] the first counts.
    pub thresholds: Vec<Option<f64>>,
    pub rule: Rule,
    pub no_fire: NoFire,
    /// The margins are those of `z / temperature`.
    pub temperature: f64,
}

/// Verdict on a row that was not at its gate.
pub const NOT_ASKED: i64 = -3;
/// Verdict of [`Rule::ArgmaxThenThreshold`] on a row whose most probable category has no threshold.
pub const NOT_SELECTED: i64 = -2;
/// Verdict on a row that does not refuse; categories are 0 and up.
pub const NO_FIRE: i64 = -1;

/// What to do with a row in this step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Position {
    /// Nothing.
    Elsewhere,
    /// Decide, and act on it.
    Gate,
    /// Remove the refusal tokens.
    Mask,
}

/// Refusal categories, their biases and thresholds.
#[derive(Debug, Clone)]
pub struct Gate {
    groups: Groups,
    /// Bias of each token of the groups' union.
    bias: Vec<f64>,
    options: GateOptions,
}

enum Action {
    Nothing,
    Bias,
    Remove,
    Force(u32),
}

/// A category, or the mass of all, against its threshold.
struct Candidate {
    category: usize,
    own: f64,
    others: LogSum,
    largest_other: f64,
    tokens: usize,
    threshold: f64,
}

impl Candidate {
    /// How far the margin exceeds the threshold, given the log-sum of all tokens but the candidate's. A threshold of −∞
    /// (probability 0) always fires, one of +∞ (probability 1) only where no other token is left.
    fn excess(&self, rest: f64) -> f64 {
        let margin = self.own - rest;
        if self.threshold == f64::NEG_INFINITY {
            f64::INFINITY
        } else if margin == self.threshold {
            0.0
        } else {
            margin - self.threshold
        }
    }

    /// Bounds of the excess from the largest entry outside all categories.
    fn bounds(&self, largest: f64, width: usize) -> (f64, f64) {
        let largest = largest.max(self.largest_other);
        let spread = ((width - self.tokens).max(1) as f64).ln();
        (
            self.excess(largest + spread + SLACK),
            self.excess(largest - SLACK),
        )
    }
}

/// Index of the largest, the first of several.
fn argmax(values: impl IntoIterator<Item = f64>) -> usize {
    let mut best = (0, f64::NEG_INFINITY);
    for (i, v) in values.into_iter().enumerate() {
        if v > best.1 {
            best = (i, v);
        }
    }
    best.0
}

impl Gate {
    /// # Errors
    /// `Value` for no category, an empty one, an id in two categories, a bias that is NaN or +∞, a NaN threshold, a
    /// temperature that is not positive; `Shape` unless biases and thresholds are one per category.
    pub fn new(categories: &[Vec<i64>], options: GateOptions) -> Result<Self> {
        let groups = Groups::new("categories", categories)?;
        let n = groups.len();
        if options.bias.len() != n || options.thresholds.len() != n {
            let found = options.bias.len().max(options.thresholds.len());
            return Err(Error::shape(
                "categories",
                format!("{n} biases and thresholds"),
                found,
            ));
        }
        if categories.iter().map(Vec::len).sum::<usize>() != groups.union().len() {
            return Err(overlap(&groups));
        }
        if let Some(b) = options
            .bias
            .iter()
            .find(|b| b.is_nan() || **b == f64::INFINITY)
        {
            return Err(Error::value("bias", "a finite number or -inf", b));
        }
        if options.thresholds.iter().flatten().any(|t| t.is_nan()) {
            return Err(Error::value(
                "threshold",
                "a margin (a number or an infinity)",
                "NaN",
            ));
        }
        super::reduce::inverse(options.temperature)?;
        if let NoFire::Respond(id) = options.no_fire
            && groups.union().binary_search(&id).is_ok()
        {
            return Err(Error::value(
                "on_no_fire",
                "a token outside the categories",
                id,
            ));
        }
        let mut bias = vec![0.0; groups.union().len()];
        for k in 0..n {
            for m in groups.members(k) {
                bias[*m as usize] = options.bias[k];
            }
        }
        Ok(Self {
            groups,
            bias,
            options,
        })
    }

    fn inverse_temperature(&self) -> f64 {
        1.0 / self.options.temperature
    }

    /// The categories' own entries, as they will be stored, over the temperature.
    fn held<T: Element>(&self, i: usize, row: &[T]) -> Result<Vec<f64>> {
        let ids = self.groups.union().iter().zip(&self.bias);
        ids.map(|(id, b)| {
            let stored = check_entry(i, row, *id, *b)?;
            Ok(stored.load().to_f64() * self.inverse_temperature())
        })
        .collect()
    }

    fn candidate(&self, category: usize, own: &[f64], others: &[f64], threshold: f64) -> Candidate {
        Candidate {
            category,
            own: own.iter().copied().collect::<LogSum>().ln(),
            others: others.iter().copied().collect(),
            largest_other: largest(others),
            tokens: own.len(),
            threshold,
        }
    }

    /// The most probable category.
    fn top(&self, held: &[f64]) -> usize {
        argmax((0..self.groups.len()).map(|k| {
            let own = self.groups.split(k, held).0;
            own.into_iter().collect::<LogSum>().ln()
        }))
    }

    /// Who may fire, in declared order.
    fn candidates(&self, held: &[f64]) -> Vec<Candidate> {
        let one = |k: usize| {
            let threshold = self.options.thresholds[k]?;
            let (own, others) = self.groups.split(k, held);
            Some(self.candidate(k, &own, &others, threshold))
        };
        match self.options.rule {
            Rule::Ratio => (0..self.groups.len()).filter_map(one).collect(),
            Rule::ArgmaxThenThreshold => one(self.top(held)).into_iter().collect(),
            Rule::Mass => self.options.thresholds[0]
                .map(|t| self.candidate(self.top(held), held, &[], t))
                .into_iter()
                .collect(),
        }
    }

    /// Verdict on a row at its gate, and the largest entry outside all categories.
    fn verdict<T: Element>(&self, i: usize, row: &[T], held: &[f64]) -> Result<(i64, f64)> {
        let excluded = self.groups.union();
        let inverse_temperature = self.inverse_temperature();
        let peaks = dispatch(Peaks { row, excluded }).ok_or_else(|| first_poison(i, row))?;
        let peak = largest(&peaks);
        if peak == f64::NEG_INFINITY && largest(held) == f64::NEG_INFINITY {
            return Err(no_token_left(i));
        }
        let candidates = self.candidates(held);
        let bounds = candidates
            .iter()
            .map(|c| c.bounds(peak * inverse_temperature, row.len()));
        if let Some(verdict) = settled(&candidates, &bounds.collect::<Vec<_>>()) {
            return Ok((verdict, peak));
        }
        let excess = |c: &Candidate, sum: LogSum| c.excess(sum.plus(c.others).ln());
        let mut rough = RoughSum::new(row, excluded, &peaks, inverse_temperature);
        while rough.read_on() {
            let (least, most) = rough.bounds();
            let bounds = candidates
                .iter()
                .map(|c| (excess(c, most) - SLACK, excess(c, least) + SLACK));
            if let Some(verdict) = settled(&candidates, &bounds.collect::<Vec<_>>()) {
                return Ok((verdict, peak));
            }
        }
        let rest = dispatch(SumExp {
            row,
            excluded,
            inverse_temperature,
        })
        .ok_or_else(|| first_poison(i, row))?;
        let all: Vec<f64> = candidates.iter().map(|c| excess(c, rest)).collect();
        let best = argmax(all.iter().copied());
        let fires = all[best] >= 0.0;
        Ok((
            if fires {
                candidates[best].category as i64
            } else {
                NO_FIRE
            },
            peak,
        ))
    }

    /// Verdict and action on a row at its gate.
    fn decide<T: Element>(&self, i: usize, row: &[T]) -> Result<(i64, Action)> {
        let held = self.held(i, row)?;
        if self.options.thresholds.iter().all(Option::is_none) {
            return Ok((NO_FIRE, self.without_fire(i, row, None)?));
        }
        if self.options.rule == Rule::ArgmaxThenThreshold
            && self.options.thresholds[self.top(&held)].is_none()
        {
            return Ok((NOT_SELECTED, Action::Bias));
        }
        let (verdict, peak) = self.verdict(i, row, &held)?;
        let action = match usize::try_from(verdict) {
            Ok(category) => Action::Force(self.loudest(category, &held)),
            Err(_) => self.without_fire(i, row, Some(peak))?,
        };
        Ok((verdict, action))
    }

    /// The category's token with the largest logit, the lowest id of several.
    fn loudest(&self, category: usize, held: &[f64]) -> u32 {
        let members = self.groups.members(category);
        let at = argmax(members.iter().map(|m| held[*m as usize]));
        self.groups.union()[members[at] as usize]
    }

    fn without_fire<T: Element>(&self, i: usize, row: &[T], peak: Option<f64>) -> Result<Action> {
        match self.options.no_fire {
            NoFire::Keep => Ok(Action::Bias),
            NoFire::Respond(id) => check_entry(i, row, id, 0.0).map(|_| Action::Force(id)),
            NoFire::Free => self.removal(i, row, peak),
        }
    }

    fn removal<T: Element>(&self, i: usize, row: &[T], peak: Option<f64>) -> Result<Action> {
        let union = self.groups.union();
        let left = match peak {
            Some(peak) => peak > f64::NEG_INFINITY,
            None => super::edits::survives(row, |id| union.binary_search(&id).is_ok()),
        };
        if left {
            Ok(Action::Remove)
        } else {
            Err(no_token_left(i))
        }
    }

    fn plan<T: Element>(&self, i: usize, row: &[T], position: Position) -> Result<(i64, Action)> {
        match position {
            Position::Elsewhere => Ok((NOT_ASKED, Action::Nothing)),
            Position::Gate => self.decide(i, row),
            Position::Mask => {
                gather(i, row, self.groups.union())?;
                Ok((NOT_ASKED, self.removal(i, row, None)?))
            }
        }
    }

    fn add_bias<T: Element>(&self, row: &mut [T]) {
        for (id, b) in self.groups.union().iter().zip(&self.bias) {
            row[*id as usize] = biased(row[*id as usize], *b);
        }
    }

    fn write<T: Element>(&self, row: &mut [T], action: &Action) {
        match action {
            Action::Nothing => {}
            Action::Force(id) => {
                self.add_bias(row);
                force_row(row, *id);
            }
            Action::Bias => self.add_bias(row),
            Action::Remove => {
                for id in self.groups.union() {
                    row[*id as usize] = T::store(-T::Acc::INFINITY);
                }
            }
        }
    }

    /// Decides every row at its gate and writes the outcome: the refusal token of the category that fired forced, or
    /// what [`NoFire`] says. Returns the verdicts: a category, [`NO_FIRE`], [`NOT_SELECTED`] or [`NOT_ASKED`].
    ///
    /// # Errors
    /// `Shape` unless there is one position per row, `Value` for ids outside the vocabulary or a bias that overflows,
    /// `NonFinite` for NaN or +∞ in a row that is reduced (else: in an entry that is written), `Degenerate` where no
    /// token is left; before anything is written.
    pub fn apply<T: Element>(
        &self,
        logits: RowsMut<'_, T>,
        positions: &[Position],
    ) -> Result<Vec<i64>> {
        let (rows, width) = (logits.rows(), logits.width());
        if positions.len() != rows {
            return Err(Error::shape(
                "input_ids",
                format!("{rows} rows (as {LOGITS})"),
                positions.len(),
            ));
        }
        self.groups.expect_width("categories", width)?;
        if let NoFire::Respond(id) = self.options.no_fire {
            token("on_no_fire", i64::from(id), width)?;
        }
        let view = logits.as_rows();
        expect_tokens(&view)?;
        let asked = positions.iter().filter(|p| **p == Position::Gate).count();
        let bytes = asked * width * size_of::<T>();
        let plans = par::try_map(bytes, (0..rows).collect(), |i| {
            self.plan(i, view.row(i), positions[i])
        })?;
        // Only a forced row is written from end to end; for the others no thread is worth waking.
        let forced = plans.iter().filter(|p| matches!(p.1, Action::Force(_)));
        let bytes = forced.count() * width * size_of::<T>();
        par::for_each(bytes, logits.into_runs(1), |run| {
            self.write(run.data, &plans[run.first].1);
        });
        Ok(plans.into_iter().map(|p| p.0).collect())
    }
}

/// The verdict, where the bounds of all candidates leave no doubt.
fn settled(candidates: &[Candidate], bounds: &[(f64, f64)]) -> Option<i64> {
    if bounds.iter().all(|b| b.1 < 0.0) {
        return Some(NO_FIRE);
    }
    let winner = bounds.iter().enumerate().find(|(k, b)| {
        let beaten = |(j, other): (usize, &(f64, f64))| j == *k || other.1 < b.0;
        b.0 >= 0.0 && bounds.iter().enumerate().all(beaten)
    });
    winner.map(|(k, _)| candidates[k].category as i64)
}

fn overlap(groups: &Groups) -> Error {
    let mut seen = vec![0; groups.union().len()];
    for k in 0..groups.len() {
        for m in groups.members(k) {
            seen[*m as usize] += 1;
        }
    }
    let at = seen.iter().position(|n| *n > 1).unwrap_or(0);
    let found = format!("{} in two", groups.union()[at]);
    Error::value("categories", "each token id in one category", found)
}

#[cfg(test)]
mod tests {
    use super::super::reduce::margins;
    use super::*;
    use crate::view::Rows;
    use proptest::prelude::*;

    const NEG: f64 = f64::NEG_INFINITY;
    const INF: f64 = f64::INFINITY;

    fn options(thresholds: &[Option<f64>], rule: Rule, no_fire: NoFire) -> GateOptions {
        GateOptions {
            bias: vec![0.0; thresholds.len()],
            thresholds: thresholds.to_vec(),
            rule,
            no_fire,
            temperature: 1.0,
        }
    }

    fn ask(gate: &Gate, z: &mut [f64]) -> Result<i64> {
        let width = z.len();
        gate.apply(RowsMut::matrix(z, width), &[Position::Gate])
            .map(|v| v[0])
    }

    fn one(id: i64, threshold: f64, no_fire: NoFire) -> Gate {
        Gate::new(
            &[vec![id]],
            options(&[Some(threshold)], Rule::Ratio, no_fire),
        )
        .unwrap()
    }

    #[test]
    fn thresholds_are_exact_at_the_margin() {
        let z = [2.0, 1.9, 1.8, 1.7, 1.75, 2.05];
        let groups = Groups::new("groups", &[vec![5]]).unwrap();
        let m = margins(&Rows::matrix(&z, 6), &groups, 1.0).unwrap()[0];
        for (threshold, fires) in [(m, true), (m.next_down(), true), (m.next_up(), false)] {
            let mut row = z;
            let got = ask(&one(5, threshold, NoFire::Keep), &mut row).unwrap();
            assert_eq!(got >= 0, fires);
            let forced = [NEG, NEG, NEG, NEG, NEG, 2.05];
            assert_eq!(row, if fires { forced } else { z });
        }
    }

    #[test]
    fn ends_of_the_scale() {
        let z = [1.0, 2.0, NEG];
        assert_eq!(
            ask(&one(2, NEG, NoFire::Keep), &mut z.clone()).unwrap(),
            0,
            "probability 0 is enough"
        );
        assert_eq!(
            ask(&one(2, -700.0, NoFire::Keep), &mut z.clone()).unwrap(),
            NO_FIRE
        );
        assert_eq!(
            ask(&one(1, INF, NoFire::Keep), &mut z.clone()).unwrap(),
            NO_FIRE
        );
        assert_eq!(
            ask(&one(1, INF, NoFire::Keep), &mut [NEG, 2.0, NEG]).unwrap(),
            0,
            "nothing else is left"
        );
    }

    #[test]
    fn what_happens_without_a_fire() {
        let z = [1.0, 2.0, 3.0];
        let mut row = z;
        ask(&one(2, 9.0, NoFire::Free), &mut row).unwrap();
        assert_eq!(row, [1.0, 2.0, NEG]);
        row = z;
        ask(&one(2, 9.0, NoFire::Respond(0)), &mut row).unwrap();
        assert_eq!(row, [1.0, NEG, NEG]);
        let gate = Gate::new(&[vec![2]], options(&[None], Rule::Ratio, NoFire::Free)).unwrap();
        let mut last = [NEG, NEG, 3.0];
        assert!(matches!(
            ask(&gate, &mut last),
            Err(Error::Degenerate { .. })
        ));
        assert_eq!(last[2], 3.0);
        let masked = gate
            .apply(RowsMut::matrix(&mut row, 3), &[Position::Mask])
            .unwrap();
        assert_eq!((masked[0], row[2]), (NOT_ASKED, NEG));
    }

    #[test]
    fn rules_differ_where_the_reference_says() {
        let z = [1.5, 0.5, -0.25, 0.75, -1.0, 0.0];
        let run = |thresholds: &[Option<f64>], rule| {
            let gate =
                Gate::new(&[vec![2], vec![5]], options(thresholds, rule, NoFire::Keep)).unwrap();
            ask(&gate, &mut z.clone()).unwrap()
        };
        // Margins: category 0 −2.5134, category 1 −2.2399, mass −1.5776.
        assert_eq!(
            run(&[Some(-2.6), Some(-2.3)], Rule::Ratio),
            0,
            "exceeds its threshold by more"
        );
        assert_eq!(run(&[Some(-2.6), None], Rule::Ratio), 0);
        assert_eq!(run(&[Some(-2.6), Some(-2.3)], Rule::ArgmaxThenThreshold), 1);
        assert_eq!(
            run(&[Some(-2.6), Some(-2.2)], Rule::ArgmaxThenThreshold),
            NO_FIRE
        );
        assert_eq!(
            run(&[Some(-2.6), None], Rule::ArgmaxThenThreshold),
            NOT_SELECTED
        );
        assert_eq!(run(&[Some(-1.58); 2], Rule::Mass), 1);
        assert_eq!(run(&[Some(-1.57); 2], Rule::Mass), NO_FIRE);
        assert_eq!(
            run(&[Some(NEG); 2], Rule::Ratio),
            0,
            "ties go by declared order"
        );
    }

    #[test]
    fn a_bias_counts_before_the_gate_and_stays() {
        let z = [2.0, 1.0, -0.5, 0.25, -1.0];
        // Vector A: with bias 2.117341691000767 the probability is 0.3.
        for (bias, fires) in [(2.1173, false), (2.1174, true)] {
            let mut o = options(&[Some((0.3f64 / 0.7).ln())], Rule::Ratio, NoFire::Keep);
            o.bias = vec![bias];
            let mut row = z;
            let got = ask(&Gate::new(&[vec![2]], o).unwrap(), &mut row).unwrap();
            assert_eq!(got >= 0, fires);
            assert_eq!(row[2], -0.5 + bias);
            assert_eq!(row[0], if fires { NEG } else { 2.0 });
        }
    }

    #[test]
    fn refuses_bad_gates_and_rows() {
        let good = || options(&[Some(0.0); 2], Rule::Ratio, NoFire::Keep);
        assert!(Gate::new(&[vec![1], vec![1]], good()).is_err());
        assert!(Gate::new(&[vec![1]], good()).is_err());
        assert!(
            Gate::new(
                &[vec![1], vec![2]],
                GateOptions {
                    bias: vec![f64::NAN, 0.0],
                    ..good()
                }
            )
            .is_err()
        );
        assert!(
            Gate::new(
                &[vec![1], vec![2]],
                GateOptions {
                    temperature: 0.0,
                    ..good()
                }
            )
            .is_err()
        );
        assert!(
            Gate::new(
                &[vec![1], vec![2]],
                options(&[Some(f64::NAN); 2], Rule::Ratio, NoFire::Keep)
            )
            .is_err()
        );
        assert!(
            Gate::new(
                &[vec![1], vec![2]],
                options(&[None; 2], Rule::Ratio, NoFire::Respond(2))
            )
            .is_err()
        );
        let gate = one(0, 0.0, NoFire::Keep);
        for poison in [f64::NAN, INF] {
            for at in 0..3 {
                let mut z = [5.0, 1.0, 1.0, 5.0, 1.0, 1.0];
                z[3 + at] = poison;
                let got = gate.apply(RowsMut::matrix(&mut z, 3), &[Position::Gate; 2]);
                assert!(matches!(got, Err(Error::NonFinite { index, .. }) if index == 3 + at));
                assert_eq!(
                    z[..3],
                    [5.0, 1.0, 1.0],
                    "the sound row is not written either"
                );
            }
        }
        assert!(ask(&gate, &mut [NEG; 3]).is_err());
        assert!(ask(&one(3, 0.0, NoFire::Keep), &mut [0.0; 3]).is_err());
        assert!(ask(&one(0, 0.0, NoFire::Respond(3)), &mut [0.0; 3]).is_err());
    }

    proptest! {
        /// Bounds and early exit never change the verdict that complete margins give.
        #[test]
        fn verdicts_equal_those_of_complete_margins(
            z in prop::collection::vec(prop_oneof![9 => -6f64..6.0, 1 => Just(NEG)], 2500..2600),
            offsets in prop::collection::vec(-2f64..2.0, 3),
            lift in 0f64..9.0,
            temperature in 0.5f64..2.0,
        ) {
            let mut z = z;
            let categories = [vec![7i64, 1030], vec![2049], vec![3]];
            z[2049] = lift;
            z[3] = -lift;
            let groups = Groups::new("groups", &categories).unwrap();
            let m = margins(&Rows::matrix(&z, z.len()), &groups, temperature).unwrap();
            let thresholds: Vec<_> = m.iter().zip(&offsets).map(|(m, o)| Some(m - o)).collect();
            let o = GateOptions { temperature, ..options(&thresholds, Rule::Ratio, NoFire::Keep) };
            let got = ask(&Gate::new(&categories, o).unwrap(), &mut z).unwrap();
            let finite = |k: usize| if m[k] == NEG { INF } else { offsets[k] };
            let best = (0..3).fold(0, |b, k| if finite(k) > finite(b) { k } else { b });
            prop_assume!(offsets.iter().all(|o| o.abs() > 1e-6));
            prop_assert_eq!(got, if finite(best) >= 0.0 { best as i64 } else { NO_FIRE });
        }
    }
}
