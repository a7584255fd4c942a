//! Threads: a pool of our own, and partitions whose results do not depend on its size.
//!
//! Work is always cut at boundaries fixed by the input alone, and partial results come back in index order, so the
//! number of threads changes the time and nothing else. The pool is separate from rayon's global one (which belongs
//! to the host program) and is built again in a process that was forked, where the threads are gone.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

struct Pool {
    pid: u32,
    threads: usize,
    pool: ThreadPool,
}

static POOL: Mutex<Option<Arc<Pool>>> = Mutex::new(None);
static WANTED: AtomicUsize = AtomicUsize::new(0);

/// Bytes of work below which a kernel stays on the calling thread: waking the pool costs about as much.
pub const SEQUENTIAL_BYTES: usize = 128 << 10;

/// Bytes per work item that amortise scheduling while a pair of items still fits a core's private cache.
pub const ITEM_BYTES: usize = 128 << 10;

/// How long a caller that has run out of items stays awake for those of others.
const SPIN: Duration = Duration::from_micros(100);

fn default_threads() -> usize {
    let asked = std::env::var("ABJURE_NUM_THREADS")
        .ok()
        .and_then(|v| v.trim().parse::<usize>().ok())
        .filter(|n| *n > 0);
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

/// Threads the kernels use: what [`set_num_threads`] asked for, else `ABJURE_NUM_THREADS`, else every core the
/// process may run on.
pub fn num_threads() -> usize {
    match WANTED.load(Relaxed) {
        0 => {
            let _ = WANTED.compare_exchange(0, default_threads(), Relaxed, Relaxed);
            WANTED.load(Relaxed)
        }
        n => n,
    }
}

/// Sets the number of threads (at least 1) for kernels that start from now on.
pub fn set_num_threads(n: usize) {
    WANTED.store(n.max(1), Relaxed);
}

thread_local! {
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` with every kernel in it staying on this thread: for callers that have threads of their own, each at work on
/// something else. The results are the same.
pub fn alone<R>(f: impl FnOnce() -> R) -> R {
    struct Reset(bool);
    impl Drop for Reset {
        fn drop(&mut self) {
            ALONE.set(self.0);
        }
    }
    let _reset = Reset(ALONE.replace(true));
    f()
}

/// The pool, or `None` where the caller should do the work itself: one thread asked for, the pool cannot be built,
/// or its lock stays taken (by a thread that a fork left behind). The caller's results are the same either way.
fn pool() -> Option<Arc<Pool>> {
    let threads = num_threads();
    if threads == 1 || ALONE.get() {
        return None;
    }
    let mut slot = (0..1000).find_map(|_| match POOL.try_lock() {
        Ok(slot) => Some(slot),
        Err(std::sync::TryLockError::Poisoned(p)) => Some(p.into_inner()),
        Err(std::sync::TryLockError::WouldBlock) => {
            std::thread::yield_now();
            None
        }
    })?;
    let pid = std::process::id();
    if let Some(pool) = slot.as_ref()
        && pool.pid == pid
        && pool.threads == threads
    {
        return Some(pool.clone());
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("abjure-{i}"))
        .build()
        .ok()?;
    let fresh = Arc::new(Pool { pid, threads, pool });
    if let Some(old) = slot.replace(fresh.clone())
        && old.pid != pid
    {
        // Its threads do not exist in this process; shutting it down could wait on a lock they held.
        std::mem::forget(old);
    }
    Some(fresh)
}

/// `f` of every item, in parallel where `bytes` of total work are worth it; results in the items' order.
///
/// The caller works too: it has the data in its cache and is awake, which matters for kernels that take less time than
/// waking two threads one after the other.
pub fn map<I: Send, R: Send>(
    bytes: usize,
    items: Vec<I>,
    f: impl Fn(I) -> R + Send + Sync,
) -> Vec<R> {
    if bytes >= SEQUENTIAL_BYTES
        && items.len() > 1
        && let Some(p) = pool()
    {
        let helpers = p.threads.min(items.len()) - 1;
        let shared = Shared::new(items, p.threads);
        let running = AtomicUsize::new(helpers);
        p.pool.in_place_scope(|scope| {
            for _ in 0..helpers {
                scope.spawn(|_| {
                    shared.work(&f);
                    running.fetch_sub(1, Relaxed);
                });
            }
            shared.work(&f);
            // The others have an item each at most. Sleeping until they are done costs more than most items take.
            let start = Instant::now();
            while running.load(Relaxed) > 0 && start.elapsed() < SPIN {
                std::hint::spin_loop();
            }
        });
        return shared.results();
    }
    items.into_iter().map(f).collect()
}

/// Items that several threads take from, and what came of those taken.
struct Shared<I, R> {
    left: Mutex<std::iter::Enumerate<std::vec::IntoIter<I>>>,
    done: Mutex<Vec<Option<R>>>,
    threads: usize,
}

impl<I: Send, R: Send> Shared<I, R> {
    fn new(items: Vec<I>, threads: usize) -> Self {
        let done = items.iter().map(|_| None).collect();
        Self {
            left: Mutex::new(items.into_iter().enumerate()),
            done: Mutex::new(done),
            threads,
        }
    }

    /// Takes neighbouring items, many at first and one in the end, until none are left.
    fn work(&self, f: &(impl Fn(I) -> R + Sync)) {
        loop {
            let taken: Vec<(usize, I)> = {
                let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
                let share = left.len() / (4 * self.threads);
                left.by_ref().take(share.max(1)).collect()
            };
            if taken.is_empty() {
                return;
            }
            let results: Vec<(usize, R)> =
                taken.into_iter().map(|(i, item)| (i, f(item))).collect();
            let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
            for (i, result) in results {
                done[i] = Some(result);
            }
        }
    }

    fn results(self) -> Vec<R> {
        let done = self
            .done
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        done.into_iter().flatten().collect()
    }
}

/// As [`map`], stopping at an error; of several errors the one with the lowest index is returned.
pub fn try_map<I: Send, R: Send, E: Send>(
    bytes: usize,
    items: Vec<I>,
    f: impl Fn(I) -> Result<R, E> + Send + Sync,
) -> Result<Vec<R>, E> {
    map(bytes, items, f).into_iter().collect()
}

/// As [`map`] for items that return nothing.
pub fn for_each<I: Send>(bytes: usize, items: Vec<I>, f: impl Fn(I) + Send + Sync) {
    map(bytes, items, f);
}

/// Cuts `0..len` into ranges of `step` elements (the last may be shorter).
pub fn ranges(len: usize, step: usize) -> Vec<std::ops::Range<usize>> {
    (0..len)
        .step_by(step.max(1))
        .map(|s| s..(s + step).min(len))
        .collect()
}

/// Pieces of `step` elements with their indices, the last with the first and so on inwards: in a triangle the two
/// together are as much work as any other two.
pub fn folded(a: &mut [f64], step: usize) -> Vec<Vec<(usize, &mut [f64])>> {
    let mut pieces: VecDeque<_> = a.chunks_mut(step).enumerate().collect();
    let mut items = Vec::with_capacity(pieces.len().div_ceil(2));
    while let Some(last) = pieces.pop_back() {
        items.push(std::iter::once(last).chain(pieces.pop_front()).collect());
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_values_do_not_depend_on_threads() {
        let before = num_threads();
        let mut seen = Vec::new();
        for threads in [1, 2, 3, 8] {
            set_num_threads(threads);
            assert_eq!(num_threads(), threads);
            let parts = map(usize::MAX, ranges(100_003, 1000), |r| {
                r.map(|i| 1.0 / (i as f32 + 1.0)).sum::<f32>()
            });
            seen.push(parts);
        }
        set_num_threads(before);
        assert!(seen.windows(2).all(|w| w[0] == w[1]));
    }

    #[test]
    fn the_first_error_wins() {
        let got = try_map(usize::MAX, (0..100).collect(), |i| {
            if i % 30 == 29 { Err(i) } else { Ok(i) }
        });
        assert_eq!(got, Err(29));
    }

    #[test]
    fn ranges_cover() {
        assert_eq!(ranges(5, 2), vec![0..2, 2..4, 4..5]);
        assert!(ranges(0, 2).is_empty());
    }
}
