//! Copy and triad: what the machine's memory gives, measured with the kernels' own threads and instruction set.

use crate::par;
use crate::simd::{Kernel, dispatch};

const ITEM: usize = par::ITEM_BYTES / 4;

struct Copy<'a>(&'a [f32], &'a mut [f32]);

impl Kernel for Copy<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        self.1.copy_from_slice(self.0);
    }
}

struct Triad<'a>(&'a [f32], &'a [f32], &'a mut [f32]);

impl Kernel for Triad<'_> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        for ((a, b), c) in self.0.iter().zip(self.1).zip(self.2) {
            *c = a + 3.0 * b;
        }
    }
}

/// `to = from`.
pub fn copy(from: &[f32], to: &mut [f32]) {
    let bytes = 8 * from.len();
    let items = from.chunks(ITEM).zip(to.chunks_mut(ITEM)).collect();
    par::for_each(bytes, items, |(a, b)| dispatch(Copy(a, b)));
}

/// `c = a + 3 b`.
pub fn triad(a: &[f32], b: &[f32], c: &mut [f32]) {
    let bytes = 12 * a.len();
    let items = (a.chunks(ITEM).zip(b.chunks(ITEM)))
        .zip(c.chunks_mut(ITEM))
        .collect();
    par::for_each(bytes, items, |((a, b), c)| dispatch(Triad(a, b, c)));
}

#[cfg(test)]
mod tests {
    #[test]
    fn copy_and_triad() {
        let a: Vec<f32> = (0..100_000).map(|i| i as f32).collect();
        let mut b = vec![0.0; a.len()];
        super::copy(&a, &mut b);
        assert_eq!(a, b);
        let mut c = vec![0.0; a.len()];
        super::triad(&a, &b, &mut c);
        assert!(c.iter().zip(&a).all(|(c, a)| *c == 4.0 * a));
    }
}
