//! From a byte per element to a bit per element.

/// Bit i is set where the highest bit of `bytes[i]` is.
#[inline(always)]
pub fn top_bits(bytes: &[u8; 64]) -> u64 {
    let mut mask = 0;
    #[cfg(target_arch = "x86_64")]
    for (k, part) in bytes.as_chunks::<16>().0.iter().enumerate() {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_movemask_epi8};
        // SAFETY: 16 bytes are read from an array of 16; SSE2 belongs to every x86-64.
        let bits = unsafe { _mm_movemask_epi8(_mm_loadu_si128(part.as_ptr().cast())) };
        mask |= (bits as u64) << (16 * k);
    }
    #[cfg(not(target_arch = "x86_64"))]
    for (k, part) in bytes.as_chunks::<8>().0.iter().enumerate() {
        let word = u64::from_le_bytes(*part) >> 7 & 0x0101_0101_0101_0101;
        mask |= (word.wrapping_mul(0x0102_0408_1020_4080) >> 56) << (8 * k);
    }
    mask
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bit_for_each_byte(bytes in prop::collection::vec(any::<u8>(), 64)) {
            let bytes: [u8; 64] = bytes.try_into().unwrap();
            let mask = super::top_bits(&bytes);
            for (i, byte) in bytes.iter().enumerate() {
                prop_assert_eq!(mask >> i & 1 == 1, *byte >= 0x80);
            }
        }
    }
}
