//! Large buffers handed on from step to step: fresh ones would be mapped and zeroed by the system every time.

use crate::element::Real;
use std::sync::{Mutex, PoisonError};

/// Buffers out of use.
#[derive(Debug, Default)]
pub struct Spare<R>(Mutex<Vec<Vec<R>>>);

impl<R: Real> Spare<R> {
    /// A buffer of `len` elements of any value.
    pub fn take(&self, len: usize) -> Vec<R> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = kept.iter().position(|b| b.capacity() >= len);
        let mut buffer = fits.map_or_else(Vec::new, |at| kept.swap_remove(at));
        drop(kept);
        if buffer.capacity() < len {
            return vec![R::ZERO; len];
        }
        buffer.resize(len, R::ZERO);
        buffer
    }

    /// Puts a buffer back.
    pub fn give(&self, buffer: Vec<R>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push(buffer);
        kept.sort_by_key(Vec::capacity);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hands_out_the_smallest_that_fits() {
        let spare = Spare::<f32>::default();
        spare.give(vec![1.0; 100]);
        spare.give(vec![2.0; 10]);
        assert_eq!(spare.take(5), [2.0; 5]);
        assert_eq!(spare.take(50), [1.0; 50]);
        assert_eq!(spare.take(50), [0.0; 50]);
    }
}
