//! Asking for memory ahead of a loop that is too long for the core to run ahead by itself.

const LINE: usize = 64;

/// Starts loading the `n` elements of `x` from `from` on; a hint without effect on the result, in range or not.
#[inline(always)]
pub fn prefetch<T>(x: &[T], from: usize, n: usize) {
    #[cfg(target_arch = "x86_64")]
    for k in 0..(n * size_of::<T>()).div_ceil(LINE) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let line = x
            .as_ptr()
            .wrapping_add(from)
            .cast::<i8>()
            .wrapping_add(k * LINE);
        // SAFETY: a prefetch never faults and never changes memory, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (x, from, n, LINE);
}
