//! Decision trees on codes: one split search on counts, for the privacy-aware tree and for forests of users and adversaries.

use crate::cancel::Cancel;
use crate::random::Random;
use crate::{Error, Result, par};
use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Gains closer than this are ties, and gains below it are none.
const TIE: f64 = 1e-12;

/// Rows of codes, row after row.
#[derive(Debug, Clone, Copy)]
pub struct Codes<'a> {
    data: &'a [u16],
    features: usize,
}

impl<'a> Codes<'a> {
    /// # Errors
    /// `Shape` unless there is a row and a feature and rows are complete.
    pub fn new(data: &'a [u16], features: usize) -> Result<Self> {
        if features == 0 || data.is_empty() || !data.len().is_multiple_of(features) {
            let found = format!("{} codes of {features} features", data.len());
            return Err(Error::shape(
                "codes",
                "at least one row and one feature",
                found,
            ));
        }
        Ok(Self { data, features })
    }

    pub fn rows(&self) -> usize {
        self.data.len() / self.features
    }

    fn row(&self, i: usize) -> &'a [u16] {
        &self.data[i * self.features..(i + 1) * self.features]
    }
}

/// Classes of the rows, as codes.
#[derive(Debug, Clone)]
pub struct Target {
    labels: Vec<u32>,
    classes: usize,
}

impl Target {
    /// # Errors
    /// `Shape`, `Value` for a label outside `0..classes`.
    pub fn new(labels: &[i64], classes: usize, rows: usize) -> Result<Self> {
        if labels.len() != rows {
            let expected = format!("{rows} labels, one per row");
            return Err(Error::shape("targets", expected, labels.len()));
        }
        let code = |v: &i64| match usize::try_from(*v) {
            Ok(c) if c < classes => Ok(c as u32),
            _ => Err(Error::value(
                "targets",
                format!("labels from 0 to {}", classes.max(1) - 1),
                v,
            )),
        };
        Ok(Self {
            labels: labels.iter().map(code).collect::<Result<_>>()?,
            classes,
        })
    }
}

/// When a tree stops growing, and what it looks at.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Weight of the mixing of the later targets in the impurity.
    pub alpha: f64,
    pub leaves: usize,
    pub leaf_rows: usize,
    pub depth: usize,
    /// Features drawn for each split; all where it is at least their number.
    pub features: usize,
}

/// A split (codes up to `code` go left), or a leaf (`feature` is `None`).
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub feature: Option<usize>,
    pub code: u16,
    pub left: usize,
    pub right: usize,
    /// Share of each class of the first target.
    pub shares: Vec<f64>,
}

/// `(1 − α) Gini(first) + α (½ − mean Gini(others))` from the counts of one set of rows.
fn impurity(counts: &[f64], targets: &[Target], rows: f64, alpha: f64) -> f64 {
    let (mut start, mut task, mut hidden) = (0, 0.0, 0.0);
    for (t, target) in targets.iter().enumerate() {
        let own = &counts[start..start + target.classes];
        let gini = 1.0 - own.iter().map(|c| (c / rows) * (c / rows)).sum::<f64>();
        if t == 0 {
            task = gini
        } else {
            hidden += gini
        }
        start += target.classes;
    }
    if targets.len() == 1 {
        return task;
    }
    (1.0 - alpha) * task + alpha * (0.5 - hidden / (targets.len() - 1) as f64)
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Split {
    gain: f64,
    feature: usize,
    code: u16,
}

struct Waiting {
    priority: f64,
    place: usize,
    depth: usize,
    split: Split,
    rows: Vec<u32>,
    counts: Vec<u32>,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Waiting {}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        // Of equal gains the older node comes first.
        (self.priority.total_cmp(&other.priority)).then(other.place.cmp(&self.place))
    }
}

struct Grower<'a> {
    codes: Codes<'a>,
    targets: &'a [Target],
    limits: Limits,
    /// First code of each feature among the codes of all, and the end.
    offsets: Vec<usize>,
    /// Classes of all targets.
    classes: usize,
}

impl<'a> Grower<'a> {
    fn new(codes: Codes<'a>, targets: &'a [Target], limits: Limits) -> Self {
        let mut widths = vec![1usize; codes.features];
        for row in codes.data.chunks_exact(codes.features) {
            for (w, c) in widths.iter_mut().zip(row) {
                *w = (*w).max(*c as usize + 1);
            }
        }
        let mut offsets = vec![0];
        for w in widths {
            offsets.push(offsets[offsets.len() - 1] + w);
        }
        Self {
            codes,
            targets,
            limits,
            offsets,
            classes: targets.iter().map(|t| t.classes).sum(),
        }
    }

    fn draws(&self) -> bool {
        self.limits.features < self.codes.features
    }

    /// Counts of every class at every code of the features named.
    fn count(&self, rows: &[u32], features: &[usize]) -> Vec<u32> {
        let mut counts = vec![0u32; self.offsets[self.codes.features] * self.classes];
        let mut first = 0;
        for target in self.targets {
            for &r in rows {
                let (row, label) = (
                    self.codes.row(r as usize),
                    target.labels[r as usize] as usize,
                );
                for &f in features {
                    let at = (self.offsets[f] + row[f] as usize) * self.classes + first + label;
                    counts[at] += 1;
                }
            }
            first += target.classes;
        }
        counts
    }

    fn best(&self, counts: &[u32], features: &[usize], rows: usize) -> Option<Split> {
        let k = self.classes;
        let task = self.targets[0].classes;
        let n = rows as f64;
        let mut best: Option<Split> = None;
        let mut parent = f64::NAN;
        let (mut left, mut right, mut total) = (vec![0.0; k], vec![0.0; k], vec![0.0; k]);
        for &f in features {
            let own = &counts[self.offsets[f] * k..self.offsets[f + 1] * k];
            total.fill(0.0);
            for bin in own.chunks_exact(k) {
                total
                    .iter_mut()
                    .zip(bin)
                    .for_each(|(t, c)| *t += f64::from(*c));
            }
            if parent.is_nan() {
                parent = impurity(&total, self.targets, n, self.limits.alpha);
            }
            left.fill(0.0);
            let mut n_left = 0.0;
            for (code, bin) in own.chunks_exact(k).enumerate() {
                let here: u32 = bin[..task].iter().sum();
                if here == 0 {
                    continue;
                }
                left.iter_mut()
                    .zip(bin)
                    .for_each(|(l, c)| *l += f64::from(*c));
                n_left += f64::from(here);
                let n_right = n - n_left;
                let least = self.limits.leaf_rows as f64;
                if n_left < least || n_right < least.max(1.0) {
                    continue;
                }
                (0..k).for_each(|c| right[c] = total[c] - left[c]);
                let children = n_left * impurity(&left, self.targets, n_left, self.limits.alpha)
                    + n_right * impurity(&right, self.targets, n_right, self.limits.alpha);
                let gain = parent - children / n;
                if gain > best.map_or(0.0, |b| b.gain) + TIE {
                    best = Some(Split {
                        gain,
                        feature: f,
                        code: code as u16,
                    });
                }
            }
        }
        best
    }

    fn grow(&self, rows: Vec<u32>, random: &mut Random, cancel: &Cancel) -> Result<Vec<Node>> {
        let (all, n) = (
            (0..self.codes.features).collect::<Vec<_>>(),
            rows.len() as f64,
        );
        let mut nodes: Vec<Node> = Vec::new();
        let mut heap = BinaryHeap::new();
        let start = if self.draws() {
            Vec::new()
        } else {
            self.count(&rows, &all)
        };
        self.add(&mut nodes, &mut heap, rows, start, 0, n, random);
        let mut leaves = 1;
        while leaves < self.limits.leaves
            && let Some(w) = heap.pop()
        {
            cancel.check()?;
            let (left, right): (Vec<u32>, Vec<u32>) = w
                .rows
                .iter()
                .partition(|r| self.codes.row(**r as usize)[w.split.feature] <= w.split.code);
            let (mut of_left, mut of_right) = (Vec::new(), Vec::new());
            if !self.draws() {
                // The smaller side is counted, the other is the difference.
                let small_left = left.len() <= right.len();
                let counted = self.count(if small_left { &left } else { &right }, &all);
                let rest = w.counts.iter().zip(&counted).map(|(a, b)| a - b).collect();
                (of_left, of_right) = if small_left {
                    (counted, rest)
                } else {
                    (rest, counted)
                };
            }
            let depth = w.depth + 1;
            let left = self.add(&mut nodes, &mut heap, left, of_left, depth, n, random);
            let right = self.add(&mut nodes, &mut heap, right, of_right, depth, n, random);
            let node = &mut nodes[w.place];
            (node.feature, node.code) = (Some(w.split.feature), w.split.code);
            (node.left, node.right) = (left, right);
            leaves += 1;
        }
        Ok(nodes)
    }

    #[allow(clippy::too_many_arguments)]
    fn add(
        &self,
        nodes: &mut Vec<Node>,
        heap: &mut BinaryHeap<Waiting>,
        rows: Vec<u32>,
        mut counts: Vec<u32>,
        depth: usize,
        all_rows: f64,
        random: &mut Random,
    ) -> usize {
        let mut shares = vec![0.0; self.targets[0].classes];
        for &r in &rows {
            shares[self.targets[0].labels[r as usize] as usize] += 1.0;
        }
        let pure = shares.iter().filter(|s| **s > 0.0).count() < 2;
        shares
            .iter_mut()
            .for_each(|s| *s /= rows.len().max(1) as f64);
        let place = nodes.len();
        nodes.push(Node {
            feature: None,
            code: 0,
            left: 0,
            right: 0,
            shares,
        });
        let lone = pure && self.targets.len() == 1;
        if depth >= self.limits.depth || rows.len() < 2 * self.limits.leaf_rows || lone {
            return place;
        }
        let mut features: Vec<usize> = (0..self.codes.features).collect();
        if self.draws() {
            for i in 0..self.limits.features {
                let j = i + random.below(features.len() - i);
                features.swap(i, j);
            }
            features.truncate(self.limits.features);
            features.sort_unstable();
            counts = self.count(&rows, &features);
        }
        if let Some(split) = self.best(&counts, &features, rows.len()) {
            heap.push(Waiting {
                priority: split.gain * rows.len() as f64 / all_rows,
                place,
                depth,
                split,
                rows,
                counts: if self.draws() { Vec::new() } else { counts },
            });
        }
        place
    }
}

fn check(codes: &Codes<'_>, targets: &[Target]) -> Result<()> {
    if targets.is_empty() || codes.rows() > u32::MAX as usize {
        return Err(Error::shape(
            "targets",
            "at least one, of at most 2^32 rows",
            targets.len(),
        ));
    }
    Ok(())
}

/// A tree grown best first: the split of the largest gain, weighted by its share of the rows, comes next. The first
/// target is the task; the others are what leaves should mix. Ties go to the lowest feature, then the lowest code.
///
/// # Errors
/// `Shape`, `Value` for a row that is not there.
pub fn grow(
    codes: Codes<'_>,
    targets: &[Target],
    limits: Limits,
    rows: Option<&[i64]>,
    cancel: &Cancel,
) -> Result<Vec<Node>> {
    check(&codes, targets)?;
    let n = codes.rows();
    let rows = match rows {
        None => (0..n as u32).collect(),
        Some(rows) => rows
            .iter()
            .map(|r| match usize::try_from(*r) {
                Ok(i) if i < n => Ok(i as u32),
                _ => Err(Error::value("rows", format!("rows from 0 to {}", n - 1), r)),
            })
            .collect::<Result<Vec<u32>>>()?,
    };
    Grower::new(codes, targets, limits).grow(rows, &mut Random::new(0), cancel)
}

/// The leaf's class shares of a row, added to `out`.
fn descend(nodes: &[Node], row: &[u16], out: &mut [f64]) {
    let mut at = &nodes[0];
    while let Some(f) = at.feature {
        at = &nodes[if row[f] <= at.code { at.left } else { at.right }];
    }
    out.iter_mut().zip(&at.shares).for_each(|(o, s)| *o += s);
}

/// Class probabilities of `queries` by a forest (Breiman 2001): trees on bootstrap samples of the rows, each split the best
/// of a part of the features, shares of the leaves averaged. The same for every number of threads.
///
/// # Errors
/// `Shape` where the features differ.
pub fn forest(
    codes: Codes<'_>,
    target: &Target,
    queries: Codes<'_>,
    trees: usize,
    limits: Limits,
    seed: u64,
    cancel: &Cancel,
) -> Result<Vec<f64>> {
    if queries.features != codes.features {
        let expected = format!("{} features", codes.features);
        return Err(Error::shape("queries", expected, queries.features));
    }
    let targets = std::slice::from_ref(target);
    check(&codes, targets)?;
    let grower = Grower::new(codes, targets, limits);
    let n = codes.rows();
    let work = (codes.data.len() + queries.data.len()) * trees * 8;
    let grown = par::try_map(work, (0..trees as u64).collect(), |t| {
        let mut random = Random::stream(seed, t);
        let mut rows: Vec<u32> = (0..n).map(|_| random.below(n) as u32).collect();
        rows.sort_unstable();
        grower.grow(rows, &mut random, cancel)
    })?;
    let k = target.classes;
    let pieces = par::map(work, par::ranges(queries.rows(), 1024), |range| {
        let mut out = vec![0.0; range.len() * k];
        for (i, o) in range.zip(out.chunks_exact_mut(k)) {
            grown
                .iter()
                .for_each(|tree| descend(tree, queries.row(i), o));
            o.iter_mut().for_each(|v| *v /= trees as f64);
        }
        out
    });
    Ok(pieces.concat())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ALL: Limits = Limits {
        alpha: 0.0,
        leaves: 20,
        leaf_rows: 1,
        depth: usize::MAX,
        features: usize::MAX,
    };

    fn target(labels: &[i64], classes: usize) -> Target {
        Target::new(labels, classes, labels.len()).unwrap()
    }

    /// Gains of every threshold, by the definition.
    fn gains(x: &[u16], y: &[i64], s: &[i64], alpha: f64) -> Vec<f64> {
        let gini = |v: &[i64]| {
            let ones = v.iter().filter(|a| **a == 1).count() as f64 / v.len() as f64;
            1.0 - ones * ones - (1.0 - ones) * (1.0 - ones)
        };
        let value = |rows: &[usize]| {
            let of = |v: &[i64]| rows.iter().map(|i| v[*i]).collect::<Vec<_>>();
            (1.0 - alpha) * gini(&of(y)) + alpha * (0.5 - gini(&of(s)))
        };
        let all: Vec<usize> = (0..x.len()).collect();
        let cuts = 0..x.iter().max().copied().unwrap_or(0);
        cuts.map(|c| {
            let (l, r): (Vec<usize>, Vec<usize>) = all.iter().partition(|i| x[**i] <= c);
            let n = x.len() as f64;
            value(&all) - (l.len() as f64 * value(&l) + r.len() as f64 * value(&r)) / n
        })
        .collect()
    }

    #[test]
    fn the_worked_example() {
        let x: Vec<u16> = (0..8).collect();
        let (y, s) = ([0, 0, 0, 1, 0, 1, 1, 1], [0, 1, 0, 1, 0, 0, 1, 1]);
        let targets = [target(&y, 2), target(&s, 2)];
        let tree = |alpha| {
            let limits = Limits {
                alpha,
                leaves: 2,
                ..ALL
            };
            let codes = Codes::new(&x, 1).unwrap();
            grow(codes, &targets, limits, None, &Cancel::new()).unwrap()
        };
        // The thresholds 3.5 and 5.5 are equally good without privacy and at 0.7; the lower is taken.
        for (alpha, code, gain) in [
            (0.0, 2, 0.3),
            (0.7, 2, 0.0666666666667),
            (0.9, 1, 0.0166666666667),
        ] {
            let found = gains(&x, &y, &s, alpha);
            let best = found.iter().fold(f64::MIN, |a, b| a.max(*b));
            assert!((best - gain).abs() < 1e-12, "{found:?}");
            assert_eq!(
                (tree(alpha)[0].feature, tree(alpha)[0].code),
                (Some(0), code)
            );
        }
        assert_eq!(tree(0.0)[1].shares, [1.0, 0.0]);
        assert_eq!(tree(0.0)[2].shares, [0.2, 0.8]);
        // All privacy and no task: no split is worth it unless it mixes.
        assert_eq!(tree(0.0).len(), 3);
    }

    #[test]
    fn bad_input_is_refused() {
        assert!(Codes::new(&[], 1).is_err());
        assert!(Codes::new(&[1, 2, 3], 2).is_err());
        assert!(Target::new(&[0, 2], 2, 2).is_err());
        assert!(Target::new(&[0, -1], 2, 2).is_err());
        assert!(Target::new(&[0], 2, 2).is_err());
        let codes = Codes::new(&[0, 1], 1).unwrap();
        let targets = [target(&[0, 1], 2)];
        assert!(grow(codes, &targets, ALL, Some(&[2]), &Cancel::new()).is_err());
        let wide = Codes::new(&[0, 1], 2).unwrap();
        assert!(forest(codes, &targets[0], wide, 2, ALL, 0, &Cancel::new()).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]
        #[test]
        fn the_first_split_is_the_best_by_definition(
            rows in prop::collection::vec((0u16..6, 0i64..2, 0i64..2), 2..40), alpha in 0.0f64..1.0,
        ) {
            let x: Vec<u16> = rows.iter().map(|r| r.0).collect();
            let y: Vec<i64> = rows.iter().map(|r| r.1).collect();
            let s: Vec<i64> = rows.iter().map(|r| r.2).collect();
            let targets = [target(&y, 2), target(&s, 2)];
            let limits = Limits { alpha, leaves: 2, ..ALL };
            let tree = grow(Codes::new(&x, 1).unwrap(), &targets, limits, None, &Cancel::new()).unwrap();
            let found: Vec<f64> = gains(&x, &y, &s, alpha).into_iter().map(|g| if g.is_nan() { f64::MIN } else { g }).collect();
            let best = found.iter().fold(f64::MIN, |a, b| a.max(*b));
            match tree[0].feature {
                Some(_) => prop_assert!((found[tree[0].code as usize] - best).abs() < 1e-11),
                None => prop_assert!(best < 1e-11),
            }
        }

        #[test]
        fn every_row_falls_into_a_leaf_of_its_kind(
            rows in prop::collection::vec((0u16..9, 0u16..9, 0i64..3), 4..60), leaf in 1usize..4,
        ) {
            let x: Vec<u16> = rows.iter().flat_map(|r| [r.0, r.1]).collect();
            let y: Vec<i64> = rows.iter().map(|r| r.2).collect();
            let targets = [target(&y, 3)];
            let codes = Codes::new(&x, 2).unwrap();
            let limits = Limits { leaf_rows: leaf, leaves: 50, ..ALL };
            let tree = grow(codes, &targets, limits, None, &Cancel::new()).unwrap();
            let mut sums = vec![(0usize, vec![0.0; 3]); tree.len()];
            for (i, label) in y.iter().enumerate() {
                let mut at = 0;
                while let Some(f) = tree[at].feature {
                    at = if codes.row(i)[f] <= tree[at].code { tree[at].left } else { tree[at].right };
                }
                sums[at].0 += 1;
                sums[at].1[*label as usize] += 1.0;
            }
            for (node, (n, counts)) in tree.iter().zip(sums) {
                if node.feature.is_none() {
                    prop_assert!(n >= leaf);
                    for (s, c) in node.shares.iter().zip(counts) {
                        prop_assert!((s - c / n as f64).abs() < 1e-12);
                    }
                }
            }
        }
    }

    #[test]
    fn a_forest_learns_and_does_not_depend_on_threads() {
        let n = 400;
        let x: Vec<u16> = (0..n * 4)
            .map(|i| ((i * 7919 + i / 7) % 16) as u16)
            .collect();
        let y: Vec<i64> = (0..n)
            .map(|i| i64::from(x[i * 4] + x[i * 4 + 2] > 15))
            .collect();
        let codes = Codes::new(&x, 4).unwrap();
        let limits = Limits {
            leaves: 64,
            features: 2,
            ..ALL
        };
        let before = par::num_threads();
        let mut seen = Vec::new();
        for threads in [1, 2, 3] {
            par::set_num_threads(threads);
            let p = forest(codes, &target(&y, 2), codes, 10, limits, 3, &Cancel::new()).unwrap();
            seen.push(p);
        }
        par::set_num_threads(before);
        assert!(seen.windows(2).all(|w| w[0] == w[1]));
        let right = seen[0]
            .chunks(2)
            .zip(&y)
            .filter(|(p, y)| (p[1] > 0.5) == (**y == 1))
            .count();
        assert!(right > n * 9 / 10, "{right}");
    }
}
