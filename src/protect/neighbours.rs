//! Exact nearest neighbours and the minimum spanning tree: what the classical bounds of the Bayes error are read from.

use super::Tick;
use super::cross::NO_OWN;
use super::points::Points;
use super::tile::{Scalar, squared_distances};
use crate::simd::{Kernel, dispatch};
use crate::{Result, par};
use std::cmp::Ordering;

const TASK_ROWS: usize = 64;
const TILE: usize = 384;
/// Squared distances that the spanning tree keeps rather than computes again: 1 GiB in f32.
const KEPT: usize = 1 << 28;

/// The `k` centres nearest to each query, nearest first, the lower index first on ties; its `own` centre is left out.
/// Indices and squared distances, queries × k.
///
/// # Errors
/// What `tick` returns.
///
/// # Panics
/// If a query has fewer than `k` centres.
pub fn nearest<R: Scalar>(
    queries: &Points<R>,
    own: &[u32],
    centres: &Points<R>,
    k: usize,
    tick: &Tick<'_>,
) -> Result<(Vec<u32>, Vec<R>)> {
    let (nq, nz) = (queries.len(), centres.len());
    let work = nq * nz * centres.width();
    let parts = par::try_map(work, par::ranges(nq, TASK_ROWS), |rows| {
        tick()?;
        let squared = strip(queries, centres, rows.clone());
        let mut order: Vec<u32> = Vec::new();
        let mut found = (Vec::with_capacity(rows.len() * k), Vec::new());
        for (row, i) in squared.chunks_exact(nz).zip(rows) {
            order.clear();
            order.extend((0..nz as u32).filter(|j| own[i] == NO_OWN || *j != own[i]));
            let nearer =
                |a: &u32, b: &u32| compare(row[*a as usize], row[*b as usize]).then(a.cmp(b));
            if k < order.len() {
                order.select_nth_unstable_by(k, nearer);
                order.truncate(k);
            }
            order.sort_unstable_by(nearer);
            assert_eq!(order.len(), k, "the caller checks that there are k centres");
            found.1.extend(order.iter().map(|j| row[*j as usize]));
            found.0.extend_from_slice(&order);
        }
        Ok(found)
    })?;
    let (mut indices, mut distances) = (Vec::with_capacity(nq * k), Vec::with_capacity(nq * k));
    for (i, d) in parts {
        indices.extend(i);
        distances.extend(d);
    }
    Ok((indices, distances))
}

/// Squared distances are never NaN.
fn compare<R: Scalar>(a: R, b: R) -> Ordering {
    a.partial_cmp(&b).unwrap_or(Ordering::Equal)
}

fn strip<R: Scalar>(a: &Points<R>, b: &Points<R>, rows: std::ops::Range<usize>) -> Vec<R> {
    let n = b.len();
    let mut out = vec![R::ZERO; rows.len() * n];
    let block = a.block(rows);
    for tile in par::ranges(n, TILE) {
        squared_distances(&mut out[tile.start..], n, &block, &b.block(tile.clone()));
    }
    out
}

/// An edge of the tree, the lower index first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Edge<R> {
    pub ends: (u32, u32),
    pub squared: R,
}

/// Where each point outside the tree would join it.
struct Joins<R> {
    squared: Vec<R>,
    at: Vec<u32>,
}

struct Closer<'a, R> {
    row: &'a [R],
    squared: &'a mut [R],
    at: &'a mut [u32],
    from: u32,
}

impl<R: Scalar> Kernel for Closer<'_, R> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for ((s, at), new) in self.squared.iter_mut().zip(self.at).zip(self.row) {
            let nearer = *new < *s;
            *s = if nearer { *new } else { *s };
            *at = if nearer { self.from } else { *at };
        }
    }
}

/// The minimum spanning tree by Prim's algorithm, edges in the order in which they join. Squared distances give the tree
/// of the distances. Of distances that are equal up to rounding either may be taken.
///
/// # Errors
/// What `tick` returns.
pub fn spanning_tree<R: Scalar>(points: &Points<R>, tick: &Tick<'_>) -> Result<Vec<Edge<R>>> {
    let n = points.len();
    let kept = if n.saturating_mul(n) <= KEPT {
        par::try_map(n * n * points.width(), par::ranges(n, TASK_ROWS), |rows| {
            tick()?;
            Ok::<_, crate::Error>(strip(points, points, rows))
        })?
    } else {
        Vec::new()
    };
    let mut joins = Joins {
        squared: vec![R::INFINITY; n],
        at: vec![0; n],
    };
    let mut outside: Vec<bool> = vec![true; n];
    let mut edges = Vec::with_capacity(n.saturating_sub(1));
    let mut last = 0;
    for _ in 1..n {
        outside[last] = false;
        let fresh;
        let row = match kept.get(last / TASK_ROWS) {
            Some(strip) => &strip[last % TASK_ROWS * n..][..n],
            None => {
                tick()?;
                fresh = strip(points, points, last..last + 1);
                &fresh[..]
            }
        };
        dispatch(Closer {
            row,
            squared: &mut joins.squared,
            at: &mut joins.at,
            from: last as u32,
        });
        let next = (0..n)
            .filter(|j| outside[*j])
            .min_by(|a, b| compare(joins.squared[*a], joins.squared[*b]).then(a.cmp(b)));
        let Some(next) = next else { break };
        let (a, b) = (joins.at[next], next as u32);
        edges.push(Edge {
            ends: (a.min(b), a.max(b)),
            squared: joins.squared[next],
        });
        last = next;
    }
    Ok(edges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn points(rows: &[Vec<f64>]) -> Points<f64> {
        Points::build(rows.len(), &vec![0.0; rows[0].len()], |i, row| {
            row.copy_from_slice(&rows[i]);
        })
    }

    fn squared(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum()
    }

    #[test]
    fn the_reference_tree() {
        let rows = [
            [0.0, 0.0],
            [1.0, 0.1],
            [0.2, 0.9],
            [3.0, 3.0],
            [3.9, 3.2],
            [2.1, 1.8],
            [1.2, 1.1],
        ];
        let tree = spanning_tree(&points(&rows.map(|r| r.to_vec())), &|| Ok(())).expect("a tree");
        // Rows 1 and 2 are equally far from row 6, and the last bit of the product decides which of them it joins.
        let tie = |ends: (u32, u32)| if ends == (2, 6) { (1, 6) } else { ends };
        let mut ends: Vec<_> = tree.iter().map(|e| tie(e.ends)).collect();
        ends.sort_unstable();
        assert_eq!(ends, [(0, 1), (0, 2), (1, 6), (3, 4), (3, 5), (5, 6)]);
        let mut lengths: Vec<f64> = tree.iter().map(|e| e.squared.sqrt()).collect();
        lengths.sort_by(f64::total_cmp);
        let expected = [
            0.921_954_445_729,
            0.921_954_445_729,
            1.004_987_562_112,
            1.019_803_902_719,
            1.140_175_425_099,
            1.5,
        ];
        assert!(
            lengths
                .iter()
                .zip(expected)
                .all(|(a, b)| (a - b).abs() < 1e-11)
        );
    }

    #[test]
    fn duplicates_are_edges_of_length_zero() {
        let rows: Vec<Vec<f64>> = [0.0, 0.0, 1.0, 2.0].iter().map(|v| vec![*v]).collect();
        let tree = spanning_tree(&points(&rows), &|| Ok(())).expect("a tree");
        assert_eq!(tree.iter().map(|e| e.squared).sum::<f64>(), 2.0);
        assert_eq!(tree[0].ends, (0, 1));
    }

    proptest! {
        #[test]
        fn tree_and_neighbours_against_plain_loops(
            rows in prop::collection::vec(prop::collection::vec(-1.0f64..1.0, 3), 3..40),
            k in 1usize..3,
        ) {
            let n = rows.len();
            let p = points(&rows);
            let own: Vec<u32> = (0..n as u32).collect();
            let (found, distances) = nearest(&p, &own, &p, k, &|| Ok(())).expect("neighbours");
            for i in 0..n {
                let mut all: Vec<(f64, usize)> =
                    (0..n).filter(|j| *j != i).map(|j| (squared(&rows[i], &rows[j]), j)).collect();
                all.sort_by(|a, b| a.0.total_cmp(&b.0));
                for (m, (s, j)) in all.iter().take(k).enumerate() {
                    prop_assert_eq!(found[i * k + m] as usize, *j);
                    prop_assert!((distances[i * k + m] - s).abs() < 1e-12);
                }
            }
            // Kruskal over all pairs.
            let mut pairs: Vec<(f64, usize, usize)> = (0..n)
                .flat_map(|a| (a + 1..n).map(move |b| (a, b)))
                .map(|(a, b)| (squared(&rows[a], &rows[b]), a, b))
                .collect();
            pairs.sort_by(|a, b| a.0.total_cmp(&b.0));
            let mut group: Vec<usize> = (0..n).collect();
            let mut total = 0.0;
            for (s, a, b) in pairs {
                let (from, to) = (group[a], group[b]);
                if from != to {
                    total += s;
                    group.iter_mut().filter(|g| **g == from).for_each(|g| *g = to);
                }
            }
            let tree = spanning_tree(&p, &|| Ok(())).expect("a tree");
            prop_assert_eq!(tree.len(), n - 1);
            prop_assert!((tree.iter().map(|e| e.squared).sum::<f64>() - total).abs() < 1e-9);
        }
    }
}
