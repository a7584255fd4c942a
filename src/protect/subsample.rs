//! Readings of random halves of the data, all from one pass over the distances.
//!
//! A half's class sum is the product of the class's kernel values with the half's membership, so that hundreds of halves
//! cost a matrix product of their number instead of an evaluation each.

use super::Tick;
use super::cross::{Centres, NO_OWN, Queries};
use super::objective::{
    ClassSums, Exponentials, LeaveOneOut, Posterior, Query, RowReading, Scratch, Spec,
    inverse_width,
};
use super::tile::{Scalar, squared_distances};
use crate::linalg::gemm::{self, Mat, Out};
use crate::random::Random;
use crate::simd::dispatch;
use crate::{Result, par};
use std::ops::Range;

/// Rows of distances per task.
const TASK_ROWS: usize = 64;
const TILE: usize = 384;

/// Which centres and queries make up each half.
struct Halves<R> {
    count: usize,
    /// Centres × halves: 1 where the centre belongs to the half.
    centres: Vec<R>,
    /// Queries × halves.
    queries: Vec<bool>,
    /// Halves × classes: members.
    members: Vec<Vec<usize>>,
}

impl<R: Scalar> Halves<R> {
    /// Half of the centres without replacement, the queries whose own centre is among them, and half of the others.
    fn draw(own: &[u32], segments: &[Range<usize>], count: usize, seed: u64) -> Self {
        let nz = segments.last().map_or(0, |s| s.end);
        let mut found = Self {
            count,
            centres: vec![R::ZERO; nz * count],
            queries: vec![false; own.len() * count],
            members: Vec::with_capacity(count),
        };
        for half in 0..count {
            let mut random = Random::stream(seed, half as u64);
            let drawn = random.sample(nz, nz.div_ceil(2));
            for j in &drawn {
                found.centres[*j as usize * count + half] = R::ONE;
            }
            let inside = |s: &Range<usize>| {
                let before = |end: usize| drawn.partition_point(|j| (*j as usize) < end);
                before(s.end) - before(s.start)
            };
            found.members.push(segments.iter().map(inside).collect());
            for (i, own) in own.iter().enumerate() {
                found.queries[i * count + half] = match *own {
                    NO_OWN => random.bits() >> 63 == 1,
                    j => found.centres[j as usize * count + half] == R::ONE,
                };
            }
        }
        found
    }
}

/// Mean readings of `count` random halves at the bandwidths of the whole. A row that sees no kernel value at all in a half
/// does not count there; a half without a row that counts has `counted` 0.
///
/// # Errors
/// What `tick` returns.
pub fn halves<R: Scalar>(
    spec: &Spec,
    queries: Queries<'_, R>,
    centres: Centres<'_, R>,
    count: usize,
    seed: u64,
    tick: &Tick<'_>,
) -> Result<Vec<RowReading>> {
    let drawn: Halves<R> = Halves::draw(queries.own, centres.segments, count, seed);
    let posteriors: Vec<Posterior<'_>> = (drawn.members.iter())
        .map(|counts| Posterior::new(spec, counts))
        .collect();
    let (nq, nz, d) = (
        queries.points.len(),
        centres.points.len(),
        centres.points.width(),
    );
    let parts = par::try_map(nq * nz * d, par::ranges(nq, TASK_ROWS), |rows| {
        tick()?;
        Ok(read_rows(
            spec,
            &queries,
            &centres,
            &drawn,
            &posteriors,
            rows,
        ))
    })?;
    let mut totals = vec![RowReading::default(); count];
    for part in parts {
        for (total, reading) in totals.iter_mut().zip(part) {
            total.add(&reading, 1.0);
            total.counted += reading.counted;
        }
    }
    let mean = |total: RowReading| {
        let mut mean = RowReading {
            counted: total.counted,
            ..RowReading::default()
        };
        if total.counted > 0.0 {
            mean.add(&total, 1.0 / total.counted);
        }
        mean
    };
    Ok(totals.into_iter().map(mean).collect())
}

/// Sums of the readings of `rows` in each half.
fn read_rows<R: Scalar>(
    spec: &Spec,
    queries: &Queries<'_, R>,
    centres: &Centres<'_, R>,
    drawn: &Halves<R>,
    posteriors: &[Posterior<'_>],
    rows: Range<usize>,
) -> Vec<RowReading> {
    let (nz, m, count) = (centres.points.len(), rows.len(), drawn.count);
    let mut squared = vec![R::ZERO; m * nz];
    let block = queries.points.block(rows.clone());
    for tile in par::ranges(nz, TILE) {
        let other = centres.points.block(tile.clone());
        squared_distances(&mut squared[tile.start..], nz, &block, &other);
    }
    for (k, i) in rows.clone().enumerate() {
        // Without leave-one-out the own row says which halves a query belongs to, and no more.
        if queries.own[i] != NO_OWN && spec.leave_one_out != LeaveOneOut::None {
            squared[k * nz + queries.own[i] as usize] = R::INFINITY;
        }
    }
    // Bandwidths × classes × rows × halves.
    let entries = spec.bandwidths.len() * spec.classes;
    let mut sums = vec![R::ZERO; entries * m * count];
    let mut least = vec![R::INFINITY; spec.classes * m];
    let mut kernel = Vec::new();
    for (c, segment) in centres.segments.iter().enumerate() {
        if segment.is_empty() {
            continue;
        }
        let members = &drawn.centres[segment.start * count..segment.end * count];
        for (w, h) in spec.bandwidths.iter().enumerate() {
            kernel.resize(m * segment.len(), R::ZERO);
            for (k, out) in kernel.chunks_exact_mut(segment.len()).enumerate() {
                least[c * m + k] = dispatch(Exponentials {
                    squared: &squared[k * nz..][segment.clone()],
                    width: inverse_width::<R>(*h),
                    out,
                })
                .0;
            }
            let out = Out {
                data: &mut sums[(w * spec.classes + c) * m * count..][..m * count],
                stride: count,
                add: false,
            };
            let kernel = Mat::dense(&kernel, m, segment.len());
            gemm::a_b(out, kernel, Mat::dense(members, segment.len(), count));
        }
    }
    let mut totals = vec![RowReading::default(); count];
    let mut scratch = Scratch::new(spec.classes);
    let (mut row_least, mut row_sums, mut factors) = (
        vec![R::ZERO; spec.classes],
        vec![0.0; entries],
        vec![0.0; entries],
    );
    for (k, i) in rows.enumerate() {
        let label = queries.labels[i] as usize;
        let own = queries.own[i];
        let at = |s: &Range<usize>| own != NO_OWN && s.contains(&(own as usize));
        let query = Query {
            label,
            own_class: centres.segments.iter().position(at),
        };
        (0..spec.classes).for_each(|c| row_least[c] = least[c * m + k]);
        for half in 0..count {
            if !drawn.queries[i * count + half] || !posteriors[half].counts_query(query) {
                continue;
            }
            (0..entries).for_each(|e| row_sums[e] = sums[(e * m + k) * count + half].to_f64());
            let blind = |sums: &[f64]| sums.iter().all(|s| *s <= 0.0);
            if row_sums.chunks_exact(spec.classes).any(blind) {
                continue;
            }
            let found = ClassSums {
                least: &row_least,
                sums: &row_sums,
            };
            let reading = posteriors[half].row(query, found, 1.0, &mut factors, None, &mut scratch);
            totals[half].add(&reading, 1.0);
            totals[half].counted += 1.0;
        }
    }
    totals
}
