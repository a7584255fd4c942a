//! Cooperative cancellation and progress for kernels that run longer than a moment.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

/// Shared between the caller, who may cancel, and the kernel, which polls between tiles.
#[derive(Debug, Default)]
pub struct Cancel {
    stop: AtomicBool,
    done: AtomicU64,
}

impl Cancel {
    /// A token that nobody has cancelled yet.
    pub const fn new() -> Self {
        Self {
            stop: AtomicBool::new(false),
            done: AtomicU64::new(0),
        }
    }

    /// Asks the kernel to stop at its next poll.
    pub fn cancel(&self) {
        self.stop.store(true, Relaxed);
    }

    /// `Err(Interrupted)` once cancelled; cheap enough to call per tile.
    pub fn check(&self) -> Result<()> {
        if self.stop.load(Relaxed) {
            Err(Error::Interrupted)
        } else {
            Ok(())
        }
    }

    /// Counts finished units of work, for progress displays.
    pub fn advance(&self, units: u64) {
        self.done.fetch_add(units, Relaxed);
    }

    /// Units of work finished so far.
    pub fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }
}
