//! The clean reading with few centres per query: those near it, class by class, and the rest as a mass that stands still.
//!
//! Queries are cut into blocks of neighbours within their class. One exact pass over all pairs picks, for each block and
//! class, the centres with the largest part of the block's kernel sums, and adds up what the others weigh: at their clean
//! places, and at the nearest and farthest that a perturbation can bring them to. A step then forms distances to the picked
//! centres alone. The class sums lie between the two extremes whatever the perturbation within the budget, which bounds the
//! error of the objective row by row.

use super::Tick;
use super::objective::{
    ClassSums, Exponentials, LeaveOneOut, Objective, Posterior, Query, RowReading, Scratch, Spec,
    inverse_width,
};
use super::points::{Block, Points, Sorted};
use super::tile::{Scalar, squared_distances};
use crate::linalg::gemm::{self, Mat, Out};
use crate::random::Random;
use crate::simd::{Kernel, dispatch, sum_f64};
use crate::{Error, Result, par};
use std::ops::Range;

/// Queries of a block: enough for the matrix product, few enough to have neighbours in common.
const BLOCK: usize = 128;
/// Centres that are gathered and multiplied at a time.
const TILE: usize = 384;
/// Blocks whose sums wait to be added up in order.
const GROUP: usize = 32;
/// Steps of the power iteration that a block is cut across.
const ITERATIONS: usize = 4;

/// What the centres that were not picked weigh in a class sum, relative to the class's least distance.
#[derive(Debug, Clone, Copy, Default)]
struct Tail {
    still: f32,
    least: f32,
    most: f32,
}

#[derive(Debug)]
struct Near {
    queries: Range<usize>,
    /// Picked centres of each class, as places in the order of classes.
    picked: Vec<Vec<u32>>,
}

/// The picked centres of all blocks, for one data set, budget and set of bandwidths.
#[derive(Debug)]
pub struct Neighbourhoods<R> {
    /// In the order of the blocks.
    queries: Points<R>,
    /// Place of each query in the order of classes.
    places: Vec<u32>,
    labels: Vec<u32>,
    blocks: Vec<Near>,
    /// Queries × classes: least squared distance at the clean places.
    least: Vec<R>,
    /// Queries × bandwidths × classes.
    tails: Vec<Tail>,
}

/// What was computed.
#[derive(Debug)]
pub struct Outcome<R> {
    pub mean: RowReading,
    /// How far the objective can be from that of all centres.
    pub bound: f64,
    /// Classes × width, empty if not wanted.
    pub gradient: Vec<R>,
}

/// What a block leaves to be added up.
struct Part<R> {
    readings: Vec<RowReading>,
    bound: f64,
    /// Classes × width.
    pulls: Vec<R>,
    /// Σ_i W_ij of the picked centres, class by class.
    columns: Vec<f64>,
}

impl<R: Scalar> Neighbourhoods<R> {
    /// Picks `share` of each class's centres for every block of queries. `radius` is the L2 norm that no perturbation
    /// exceeds.
    ///
    /// # Errors
    /// `Value` for an objective whose error is not bounded here or a share outside (0, 1); what `tick` returns.
    pub fn build(
        spec: &Spec,
        clean: &Sorted<R>,
        share: f64,
        radius: f64,
        seed: u64,
        tick: &Tick<'_>,
    ) -> Result<Self> {
        if matches!(
            spec.objective,
            Objective::Entropy | Objective::SoftmaxTau(_)
        ) {
            let known =
                "\"plugin\", \"gini\", \"soft\", \"soft_capped\" or \"nll\" with truncated sums";
            return Err(Error::value("objective", known, "another"));
        }
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::value("truncate", "a number between 0 and 1", share));
        }
        let d = clean.points.width();
        let classes: Vec<(usize, Range<usize>)> =
            clean.segments.iter().cloned().enumerate().collect();
        let cut = par::try_map(clean.points.len() * d * 64, classes, |(c, segment)| {
            tick()?;
            let mut random = Random::stream(seed, c as u64);
            let mut blocks = Vec::new();
            let members: Vec<u32> = segment.map(|i| i as u32).collect();
            bisect(&clean.points, members, &mut random, &mut blocks);
            Ok::<_, Error>(blocks)
        })?;
        let cut: Vec<Vec<u32>> = cut.into_iter().flatten().collect();
        let places: Vec<u32> = cut.iter().flatten().copied().collect();
        let zero = vec![0.0; d];
        let queries = Points::build(places.len(), &zero, |i, row| {
            let at = places[i] as usize;
            row.copy_from_slice(clean.points.block(at..at + 1).rows);
        });
        let mut labels = vec![0; places.len()];
        for (i, place) in places.iter().enumerate() {
            let inside = |s: &Range<usize>| s.contains(&(*place as usize));
            labels[i] = clean.segments.iter().position(inside).unwrap_or(0) as u32;
        }
        let mut found = Self {
            queries,
            places,
            labels,
            blocks: Vec::new(),
            least: Vec::new(),
            tails: Vec::new(),
        };
        let mut start = 0;
        let ranges: Vec<Range<usize>> = (cut.iter())
            .map(|b| {
                start += b.len();
                start - b.len()..start
            })
            .collect();
        let work = found.places.len() * found.places.len() * d;
        let parts = par::try_map(work, ranges, |range| {
            tick()?;
            Ok::<_, Error>(found.pick(spec, clean, range, share, radius))
        })?;
        for (near, least, tails) in parts {
            found.blocks.push(near);
            found.least.extend(least);
            found.tails.extend(tails);
        }
        Ok(found)
    }

    fn own(&self, spec: &Spec, i: usize) -> Option<usize> {
        (spec.leave_one_out != LeaveOneOut::None).then_some(self.places[i] as usize)
    }

    /// The exact pass for one block.
    fn pick(
        &self,
        spec: &Spec,
        clean: &Sorted<R>,
        range: Range<usize>,
        share: f64,
        radius: f64,
    ) -> (Near, Vec<R>, Vec<Tail>) {
        let (m, classes, widths) = (range.len(), spec.classes, spec.bandwidths.len());
        let block = self.queries.block(range.clone());
        let mut least = vec![R::INFINITY; m * classes];
        let mut tails = vec![Tail::default(); m * widths * classes];
        let mut picked = Vec::with_capacity(classes);
        for (c, segment) in clean.segments.iter().enumerate() {
            let n = segment.len();
            let mut squared = vec![R::ZERO; m * n];
            for tile in par::ranges(n, TILE) {
                let at = segment.start + tile.start..segment.start + tile.end;
                let centres = clean.points.block(at);
                squared_distances(&mut squared[tile.start..], n, &block, &centres);
            }
            for (k, i) in range.clone().enumerate() {
                if let Some(own) = self.own(spec, i)
                    && segment.contains(&own)
                {
                    squared[k * n + own - segment.start] = R::INFINITY;
                }
            }
            let mut scores = vec![0.0; n];
            let mut kernel = vec![R::ZERO; n];
            for k in 0..m {
                let row = &squared[k * n..(k + 1) * n];
                for h in &spec.bandwidths {
                    let (nearest, sum) = dispatch(Exponentials {
                        squared: row,
                        width: inverse_width::<R>(*h),
                        out: &mut kernel,
                    });
                    least[k * classes + c] = nearest;
                    if sum > 0.0 {
                        dispatch(AddScaled(1.0 / sum, &kernel, &mut scores));
                    }
                }
            }
            let keep = ((n as f64 * share).ceil() as usize)
                .clamp(1, n.max(1))
                .min(n);
            let mut order: Vec<u32> = (0..n as u32).collect();
            let heavier = |a: &u32, b: &u32| {
                (scores[*b as usize].total_cmp(&scores[*a as usize])).then(a.cmp(b))
            };
            if keep < n {
                order.select_nth_unstable_by(keep, heavier);
            }
            let (kept, rest) = order.split_at_mut(keep);
            kept.sort_unstable();
            rest.sort_unstable();
            let mut others = vec![R::ZERO; rest.len()];
            for k in 0..m {
                let row = &squared[k * n..(k + 1) * n];
                for (to, j) in others.iter_mut().zip(&*rest) {
                    *to = row[*j as usize];
                }
                for (b, h) in spec.bandwidths.iter().enumerate() {
                    let width = inverse_width::<R>(*h).to_f64();
                    let nearest = least[k * classes + c].to_f64();
                    tails[(k * widths + b) * classes + c] = tail(&others, nearest, width, radius);
                }
            }
            picked.push((kept.iter()).map(|j| *j + segment.start as u32).collect());
        }
        let near = Near {
            queries: range,
            picked,
        };
        (near, least, tails)
    }

    /// Mean objective of all queries under `centres` (the published points, in the order of the clean ones that this was
    /// built from), its error bound and, if wanted, its gradient summed over each class.
    ///
    /// # Errors
    /// What `tick` returns.
    pub fn evaluate(
        &self,
        spec: &Spec,
        centres: &Points<R>,
        segments: &[Range<usize>],
        gradient: bool,
        tick: &Tick<'_>,
    ) -> Result<Outcome<R>> {
        let counts: Vec<usize> = segments.iter().map(ExactSizeIterator::len).collect();
        let posterior = Posterior::new(spec, &counts);
        let n = self.places.len();
        let rows: f64 = (0..n)
            .map(|i| f64::from(u8::from(posterior.counts_query(self.query(spec, i)))))
            .sum();
        let d = centres.width();
        let mut readings = Vec::with_capacity(n);
        let mut bound = 0.0;
        let mut pulls = vec![0.0; if gradient { spec.classes * d } else { 0 }];
        let mut column_sums = vec![0.0; if gradient { n } else { 0 }];
        for group in self.blocks.chunks(GROUP) {
            let work = group.len() * BLOCK * n * d / 8;
            let parts = par::try_map(work, group.iter().collect(), |near: &Near| {
                tick()?;
                Ok::<_, Error>(self.read(spec, &posterior, near, centres, rows, gradient))
            })?;
            for (near, part) in group.iter().zip(parts) {
                readings.extend(part.readings);
                bound += part.bound;
                if gradient {
                    for (to, p) in pulls.iter_mut().zip(part.pulls) {
                        *to += p.to_f64();
                    }
                    for (j, s) in near.picked.iter().flatten().zip(part.columns) {
                        column_sums[*j as usize] += s;
                    }
                }
            }
        }
        let segments = if gradient { segments } else { &[] };
        let less: Vec<Vec<f64>> = par::map(n * d * 8, segments.to_vec(), |segment| {
            let mut total = vec![0.0; d];
            for j in segment {
                let row = centres.block(j..j + 1).rows;
                dispatch(AddScaled(column_sums[j], row, &mut total));
            }
            total
        });
        let gradient = pulls.iter().zip(less.iter().flatten());
        Ok(Outcome {
            mean: RowReading::mean(&readings),
            bound: if rows > 0.0 { bound / rows } else { 0.0 },
            gradient: gradient.map(|(p, l)| R::from_f64(p - l)).collect(),
        })
    }

    fn query(&self, spec: &Spec, i: usize) -> Query {
        let label = self.labels[i] as usize;
        Query {
            label,
            own_class: (spec.leave_one_out != LeaveOneOut::None).then_some(label),
        }
    }

    fn read(
        &self,
        spec: &Spec,
        posterior: &Posterior<'_>,
        near: &Near,
        centres: &Points<R>,
        rows: f64,
        gradient: bool,
    ) -> Part<R> {
        let (m, d, classes) = (near.queries.len(), centres.width(), spec.classes);
        let widths = spec.bandwidths.len();
        let total: usize = near.picked.iter().map(Vec::len).sum();
        let block = self.queries.block(near.queries.clone());
        let mut weights = vec![R::ZERO; m * total];
        let (mut buffer, mut norms) = (vec![R::ZERO; TILE * d], vec![R::ZERO; TILE]);
        let mut at = 0;
        for picked in near.picked.iter().flat_map(|p| p.chunks(TILE)) {
            for (k, j) in picked.iter().enumerate() {
                let centre = centres.block(*j as usize..*j as usize + 1);
                buffer[k * d..(k + 1) * d].copy_from_slice(centre.rows);
                norms[k] = centre.norms[0];
            }
            let gathered = Block {
                rows: &buffer[..picked.len() * d],
                norms: &norms[..picked.len()],
                width: d,
            };
            squared_distances(&mut weights[at..], total, &block, &gathered);
            at += picked.len();
        }
        let mut segments = Vec::with_capacity(classes);
        let mut start = 0;
        for picked in &near.picked {
            segments.push(start..start + picked.len());
            start += picked.len();
        }
        let mut part = Part {
            readings: Vec::with_capacity(m),
            bound: 0.0,
            pulls: vec![R::ZERO; if gradient { classes * d } else { 0 }],
            columns: vec![0.0; if gradient { total } else { 0 }],
        };
        let mut class_sums = vec![R::ZERO; m * classes];
        let mut scratch = Scratch::new(classes);
        let mut exponentials = vec![R::ZERO; widths * total];
        let mut least = vec![R::ZERO; classes];
        let [mut sums, mut low, mut high, mut factors] =
            [(); 4].map(|()| vec![0.0; widths * classes]);
        for (k, i) in near.queries.clone().enumerate() {
            let row = &mut weights[k * total..(k + 1) * total];
            let label = self.labels[i] as usize;
            if let Some(own) = self.own(spec, i)
                && let Ok(at) = near.picked[label].binary_search(&(own as u32))
            {
                row[segments[label].start + at] = R::INFINITY;
            }
            for (b, h) in spec.bandwidths.iter().enumerate() {
                let width = inverse_width::<R>(*h);
                for (c, segment) in segments.iter().enumerate() {
                    let (nearest, sum) = dispatch(Exponentials {
                        squared: &row[segment.clone()],
                        width,
                        out: &mut exponentials[b * total..][segment.clone()],
                    });
                    let clean = self.least[i * classes + c];
                    let tail = self.tails[(i * widths + b) * classes + c];
                    let shift = if nearest == R::INFINITY {
                        clean
                    } else {
                        nearest
                    };
                    least[c] = shift;
                    let scale = ((shift.to_f64() - clean.to_f64()) * width.to_f64()).exp();
                    let scale = if scale.is_finite() { scale } else { 0.0 };
                    sums[b * classes + c] = sum + f64::from(tail.still) * scale;
                    low[b * classes + c] = sum + f64::from(tail.least) * scale;
                    high[b * classes + c] = sum + f64::from(tail.most) * scale;
                }
            }
            let query = self.query(spec, i);
            let found = |sums| ClassSums {
                least: &least,
                sums,
            };
            let reading =
                posterior.row(query, found(&sums), rows, &mut factors, None, &mut scratch);
            if reading.counted > 0.0 {
                part.bound +=
                    posterior.error(query, found(&sums), found(&low), found(&high), &mut scratch);
            }
            part.readings.push(reading);
            if !gradient {
                continue;
            }
            for (c, segment) in segments.iter().enumerate() {
                row[segment.clone()].fill(R::ZERO);
                for b in 0..widths {
                    dispatch(AddWeights {
                        factor: R::from_f64(factors[b * classes + c]),
                        exponentials: &exponentials[b * total..][segment.clone()],
                        weights: &mut row[segment.clone()],
                    });
                }
                class_sums[k * classes + c] = R::from_f64(dispatch(Sum(&row[segment.clone()])));
            }
            dispatch(AddScaled(1.0, row, &mut part.columns));
        }
        if gradient {
            let out = Out {
                data: &mut part.pulls,
                stride: d,
                add: false,
            };
            gemm::at_b(
                out,
                Mat::dense(&class_sums, m, classes),
                Mat::dense(block.rows, m, d),
            );
        }
        part
    }
}

/// Kernel sums of centres at squared distances `squared`, as they stand and moved by `radius` away and nearer.
fn tail<R: Scalar>(squared: &[R], nearest: f64, width: f64, radius: f64) -> Tail {
    let (mut still, mut least, mut most) = (0.0, 0.0, 0.0);
    if nearest.is_finite() {
        // Beyond this nothing is left of a weight, wherever it moves.
        let reach = ((nearest + 90.0 / width).sqrt() + radius).powi(2);
        for s in squared {
            let s = s.to_f64();
            if s < reach {
                let distance = s.sqrt();
                let at = |d: f64| ((nearest - d * d) * width).exp();
                still += at(distance);
                least += at(distance + radius);
                most += at((distance - radius).max(0.0));
            }
        }
    }
    Tail {
        still: still as f32,
        least: least as f32,
        most: most as f32,
    }
}

/// Cuts `members` into blocks of at most [`BLOCK`] across the direction of their largest spread.
fn bisect<R: Scalar>(
    points: &Points<R>,
    members: Vec<u32>,
    random: &mut Random,
    blocks: &mut Vec<Vec<u32>>,
) {
    if members.is_empty() {
        return;
    }
    if members.len() <= BLOCK {
        blocks.push(members);
        return;
    }
    let d = points.width();
    let row = |i: u32| points.block(i as usize..i as usize + 1).rows;
    let mut mean = vec![0.0; d];
    for i in &members {
        dispatch(AddScaled(1.0 / members.len() as f64, row(*i), &mut mean));
    }
    let mut direction: Vec<f64> = (0..d).map(|_| random.symmetric()).collect();
    let mut along = vec![0.0; members.len()];
    for _ in 0..=ITERATIONS {
        let offset: f64 = mean.iter().zip(&direction).map(|(m, v)| m * v).sum();
        for (a, i) in along.iter_mut().zip(&members) {
            *a = dispatch(Inner(row(*i), &direction)) - offset;
        }
        let mut next = vec![0.0; d];
        for (a, i) in along.iter().zip(&members) {
            dispatch(AddScaled(*a, row(*i), &mut next));
        }
        let total: f64 = along.iter().sum();
        next.iter_mut()
            .zip(&mean)
            .for_each(|(v, m)| *v -= total * m);
        let length = next.iter().map(|v| v * v).sum::<f64>().sqrt();
        if length > 0.0 {
            direction = next.into_iter().map(|v| v / length).collect();
        }
    }
    let mut order: Vec<usize> = (0..members.len()).collect();
    order.sort_by(|a, b| along[*a].total_cmp(&along[*b]).then(a.cmp(b)));
    // Whole blocks on one side, so that only the last one is short.
    let half = (members.len() / BLOCK).div_ceil(2) * BLOCK;
    let half = half.min(members.len() - 1);
    for part in [&order[..half], &order[half..]] {
        let part = part.iter().map(|k| members[*k]).collect();
        bisect(points, part, random, blocks);
    }
}

/// `to += scale * from`.
struct AddScaled<'a, R>(f64, &'a [R], &'a mut [f64]);

impl<R: Scalar> Kernel for AddScaled<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (to, v) in self.2.iter_mut().zip(self.1) {
            *to += self.0 * v.to_f64();
        }
    }
}

struct Inner<'a, R>(&'a [R], &'a [f64]);

impl<R: Scalar> Kernel for Inner<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        let mut lanes = [0.0; crate::simd::LANES];
        let step = crate::simd::LANES;
        for (a, b) in self.0.chunks(step).zip(self.1.chunks(step)) {
            for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *lane += a.to_f64() * b;
            }
        }
        lanes.into_iter().sum()
    }
}

struct AddWeights<'a, R> {
    factor: R,
    exponentials: &'a [R],
    weights: &'a mut [R],
}

impl<R: Scalar> Kernel for AddWeights<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for (w, e) in self.weights.iter_mut().zip(self.exponentials) {
            *w += self.factor * *e;
        }
    }
}

struct Sum<'a, R>(&'a [R]);

impl<R: Scalar> Kernel for Sum<'_, R> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        sum_f64(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protect::cross::{self, CentreGradient, Centres, Queries};
    use crate::protect::{Singleton, Spare, mean};
    use crate::view::Rows;

    const CLASSES: usize = 3;
    const WIDTH: usize = 4;
    const RADIUS: f64 = 0.3;

    fn spec(objective: Objective, bandwidths: &[f64]) -> Spec {
        Spec {
            classes: CLASSES,
            bandwidths: bandwidths.to_vec(),
            objective,
            leave_one_out: LeaveOneOut::Plain,
            singleton: Singleton::Exclude,
            priors: None,
        }
    }

    fn data(n: usize) -> (Vec<f64>, Vec<u32>) {
        let mut random = Random::new(5);
        let labels: Vec<u32> = (0..n as u32).map(|i| i % CLASSES as u32).collect();
        let x = (0..n * WIDTH)
            .map(|k| random.symmetric() + 0.4 * f64::from(labels[k / WIDTH]))
            .collect();
        (x, labels)
    }

    /// Clean points, and the same with each class moved by a perturbation of its own.
    fn moved(x: &[f64], labels: &[u32], delta: &[f64]) -> (Sorted<f64>, Points<f64>) {
        let rows = Rows::matrix(x, WIDTH);
        let clean = Sorted::all(&rows, labels, CLASSES, &mean("x", &rows).expect("finite"));
        let published = Points::build(clean.order.len(), &[0.0; WIDTH], |k, row| {
            let class = labels[clean.order[k] as usize] as usize;
            let shift = &delta[class * WIDTH..][..WIDTH];
            for ((o, v), s) in row
                .iter_mut()
                .zip(clean.points.block(k..k + 1).rows)
                .zip(shift)
            {
                *o = v + s;
            }
        });
        (clean, published)
    }

    fn exact(spec: &Spec, clean: &Sorted<f64>, published: &Points<f64>) -> (f64, Vec<f64>) {
        let own: Vec<u32> = (0..clean.order.len() as u32).collect();
        let mut labels = vec![0; own.len()];
        for (c, s) in clean.segments.iter().enumerate() {
            labels[s.clone()].fill(c as u32);
        }
        let queries = Queries {
            points: &clean.points,
            labels: &labels,
            own: &own,
        };
        let centres = Centres {
            points: published,
            segments: &clean.segments,
        };
        let want = cross::Want {
            centres: CentreGradient::ByClass,
            queries: false,
            posterior: false,
        };
        let out = cross::evaluate(spec, queries, centres, want, &Spare::default(), &|| Ok(()))
            .expect("not cancelled");
        (out.mean.value, out.centre_gradient)
    }

    fn delta(scale: f64) -> Vec<f64> {
        let mut random = Random::new(8);
        (0..CLASSES * WIDTH)
            .map(|_| scale * random.symmetric())
            .collect()
    }

    #[test]
    fn all_centres_give_the_exact_objective_and_gradient() {
        let (x, labels) = data(400);
        let spec = spec(Objective::Soft, &[0.4, 0.9]);
        let (clean, published) = moved(&x, &labels, &delta(0.1));
        let near =
            Neighbourhoods::build(&spec, &clean, 0.9999, RADIUS, 0, &|| Ok(())).expect("built");
        let got = near
            .evaluate(&spec, &published, &clean.segments, true, &|| Ok(()))
            .expect("evaluated");
        let (value, gradient) = exact(&spec, &clean, &published);
        assert!((got.mean.value - value).abs() < 1e-12);
        assert!(got.bound < 1e-12);
        let close = |(a, b): (&f64, &f64)| (a - b).abs() < 1e-12;
        assert!(got.gradient.iter().zip(&gradient).all(close));
    }

    #[test]
    fn the_bound_holds_and_the_gradient_is_that_of_the_objective() {
        let (x, labels) = data(600);
        for objective in [
            Objective::Soft,
            Objective::SoftCapped,
            Objective::Gini,
            Objective::Plugin,
            Objective::Nll,
        ] {
            let spec = spec(objective, &[0.3, 0.5]);
            let (clean, still) = moved(&x, &labels, &delta(0.0));
            let near =
                Neighbourhoods::build(&spec, &clean, 0.2, RADIUS, 0, &|| Ok(())).expect("built");
            let at = |published: &Points<f64>, gradient| {
                near.evaluate(&spec, published, &clean.segments, gradient, &|| Ok(()))
                    .expect("evaluated")
            };
            // In its clean place the sums are the exact ones, but for the f32 that they are kept in.
            let (value, _) = exact(&spec, &clean, &still);
            assert!((at(&still, false).mean.value - value).abs() < 1e-6);
            for scale in [0.05, 0.15] {
                let (_, published) = moved(&x, &labels, &delta(scale));
                let got = at(&published, true);
                let (value, _) = exact(&spec, &clean, &published);
                let error = (got.mean.value - value).abs();
                assert!(error > 0.0 && error <= got.bound, "{error} > {}", got.bound);
                if matches!(objective, Objective::Plugin | Objective::SoftCapped) {
                    continue;
                }
                for k in 0..CLASSES * WIDTH {
                    let step = 1e-5;
                    let [up, down] = [step, -step].map(|s| {
                        let mut shifted = delta(scale);
                        shifted[k] += s;
                        at(&moved(&x, &labels, &shifted).1, false).mean.value
                    });
                    let expected = (up - down) / (2.0 * step);
                    assert!((got.gradient[k] - expected).abs() < 1e-7);
                }
            }
        }
    }

    #[test]
    fn blocks_hold_every_query_once() {
        let (x, labels) = data(1000);
        let (clean, _) = moved(&x, &labels, &delta(0.0));
        let spec = spec(Objective::Soft, &[0.4]);
        let near = Neighbourhoods::build(&spec, &clean, 0.2, RADIUS, 0, &|| Ok(())).expect("built");
        let mut places = near.places.clone();
        places.sort_unstable();
        assert_eq!(places, (0..1000).collect::<Vec<u32>>());
        assert!(near.blocks.iter().all(|b| b.queries.len() <= BLOCK));
        // 334 + 333 + 333 in blocks of 128.
        assert_eq!(near.blocks.len(), 9);
    }

    #[test]
    fn what_is_not_bounded_is_refused() {
        let (x, labels) = data(60);
        let (clean, _) = moved(&x, &labels, &delta(0.0));
        for (objective, share) in [
            (Objective::Entropy, 0.2),
            (Objective::SoftmaxTau(0.5), 0.2),
            (Objective::Soft, 0.0),
            (Objective::Soft, 1.0),
            (Objective::Soft, f64::NAN),
        ] {
            let spec = spec(objective, &[0.4]);
            assert!(Neighbourhoods::build(&spec, &clean, share, RADIUS, 0, &|| Ok(())).is_err());
        }
    }
}
