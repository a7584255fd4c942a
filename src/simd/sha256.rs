//! The compression function of SHA-256 (FIPS 180-4, section 6.2.2) for several messages at once.
//!
//! One message leaves most of a processor idle: each pair of rounds waits for the one before it. The rounds of another
//! message fill the gaps, so two messages take little longer than one.

/// Digests whole blocks of `N` messages, as many of each.
///
/// # Panics
/// If the numbers of blocks differ.
pub fn sha256_blocks<const N: usize>(states: [&mut [u32; 8]; N], blocks: [&[[u8; 64]]; N]) {
    assert!(
        blocks.windows(2).all(|b| b[0].len() == b[1].len()),
        "as many blocks of each message"
    );
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("sha")
        && is_x86_feature_detected!("sse4.1")
        && is_x86_feature_detected!("ssse3")
    {
        // SAFETY: the instructions were found on this CPU.
        unsafe { x86::blocks(states, blocks) };
        return;
    }
    plain(states, blocks);
}

fn plain<const N: usize>(states: [&mut [u32; 8]; N], blocks: [&[[u8; 64]]; N]) {
    for (state, blocks) in states.into_iter().zip(blocks) {
        for block in blocks {
            sha2::compress256(state, std::slice::from_ref(block.into()));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    #[rustfmt::skip]
    const ROUND: [[u32; 4]; 16] = [
        [0x428a_2f98, 0x7137_4491, 0xb5c0_fbcf, 0xe9b5_dba5], [0x3956_c25b, 0x59f1_11f1, 0x923f_82a4, 0xab1c_5ed5],
        [0xd807_aa98, 0x1283_5b01, 0x2431_85be, 0x550c_7dc3], [0x72be_5d74, 0x80de_b1fe, 0x9bdc_06a7, 0xc19b_f174],
        [0xe49b_69c1, 0xefbe_4786, 0x0fc1_9dc6, 0x240c_a1cc], [0x2de9_2c6f, 0x4a74_84aa, 0x5cb0_a9dc, 0x76f9_88da],
        [0x983e_5152, 0xa831_c66d, 0xb003_27c8, 0xbf59_7fc7], [0xc6e0_0bf3, 0xd5a7_9147, 0x06ca_6351, 0x1429_2967],
        [0x27b7_0a85, 0x2e1b_2138, 0x4d2c_6dfc, 0x5338_0d13], [0x650a_7354, 0x766a_0abb, 0x81c2_c92e, 0x9272_2c85],
        [0xa2bf_e8a1, 0xa81a_664b, 0xc24b_8b70, 0xc76c_51a3], [0xd192_e819, 0xd699_0624, 0xf40e_3585, 0x106a_a070],
        [0x19a4_c116, 0x1e37_6c08, 0x2748_774c, 0x34b0_bcb5], [0x391c_0cb3, 0x4ed8_aa4a, 0x5b9c_ca4f, 0x682e_6ff3],
        [0x748f_82ee, 0x78a5_636f, 0x84c8_7814, 0x8cc7_0208], [0x90be_fffa, 0xa450_6ceb, 0xbef9_a3f7, 0xc671_78f2],
    ];

    #[inline]
    #[target_feature(enable = "ssse3,sse4.1")]
    fn load(words: &[u32; 4]) -> __m128i {
        // SAFETY: sixteen readable bytes; the load needs no alignment.
        unsafe { _mm_loadu_si128(words.as_ptr().cast()) }
    }

    /// Four words of the message, which are big-endian.
    #[inline]
    #[target_feature(enable = "ssse3,sse4.1")]
    fn message(bytes: &[u8; 16], swap: __m128i) -> __m128i {
        // SAFETY: as above.
        let words = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
        _mm_shuffle_epi8(words, swap)
    }

    #[allow(clippy::needless_range_loop)] // several arrays are walked together
    #[target_feature(enable = "sha,ssse3,sse4.1")]
    pub fn blocks<const N: usize>(states: [&mut [u32; 8]; N], data: [&[[u8; 64]]; N]) {
        let swap = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
        // The instructions want the words a b e f and c d g h together.
        let (mut abef, mut cdgh) = ([_mm_setzero_si128(); N], [_mm_setzero_si128(); N]);
        for i in 0..N {
            let [a, b, c, d, e, f, g, h] = *states[i];
            abef[i] = load(&[f, e, b, a]);
            cdgh[i] = load(&[h, g, d, c]);
        }
        for at in 0..data[0].len() {
            let (old_abef, old_cdgh) = (abef, cdgh);
            let mut w = [[_mm_setzero_si128(); 4]; N];
            for i in 0..N {
                let (words, _) = data[i][at].as_chunks::<16>();
                for j in 0..4 {
                    w[i][j] = message(&words[j], swap);
                }
            }
            // Written out, so that every word has a register of its own.
            macro_rules! four_rounds {
                ($($r:literal)*) => {$(
                    let k = load(&ROUND[$r]);
                    for i in 0..N {
                        let w = &mut w[i];
                        if $r >= 4 {
                            let (next, last) = (w[($r + 1) % 4], w[($r + 3) % 4]);
                            let sum = _mm_alignr_epi8(last, w[($r + 2) % 4], 4);
                            let sum = _mm_add_epi32(_mm_sha256msg1_epu32(w[$r % 4], next), sum);
                            w[$r % 4] = _mm_sha256msg2_epu32(sum, last);
                        }
                        let m = _mm_add_epi32(w[$r % 4], k);
                        cdgh[i] = _mm_sha256rnds2_epu32(cdgh[i], abef[i], m);
                        let m = _mm_shuffle_epi32(m, 0x0e);
                        abef[i] = _mm_sha256rnds2_epu32(abef[i], cdgh[i], m);
                    }
                )*};
            }
            four_rounds!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15);
            for i in 0..N {
                abef[i] = _mm_add_epi32(abef[i], old_abef[i]);
                cdgh[i] = _mm_add_epi32(cdgh[i], old_cdgh[i]);
            }
        }
        for (i, state) in states.into_iter().enumerate() {
            let word = |v: __m128i| -> [u32; 4] {
                let mut out = [0; 4];
                // SAFETY: sixteen writable bytes; the store needs no alignment.
                unsafe { _mm_storeu_si128(out.as_mut_ptr().cast(), v) };
                out
            };
            let ([f, e, b, a], [h, g, d, c]) = (word(abef[i]), word(cdgh[i]));
            *state = [a, b, c, d, e, f, g, h];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_messages_as_one_by_one() {
        let blocks: Vec<[u8; 64]> = (0..40usize)
            .map(|i| std::array::from_fn(|j| (i * 131 + j * 29 + i * j) as u8))
            .collect();
        let start: [u32; 8] = std::array::from_fn(|i| 0x9e37_79b9u32.wrapping_mul(i as u32 + 1));
        for count in [0, 1, 2, 10] {
            let lists: [&[[u8; 64]]; 4] = std::array::from_fn(|i| &blocks[10 * i..10 * i + count]);
            let expected = lists.map(|list| {
                let mut state = start;
                plain([&mut state], [list]);
                state
            });
            let mut one = [start; 4];
            for (state, list) in one.iter_mut().zip(lists) {
                sha256_blocks([state], [list]);
            }
            let mut four = [start; 4];
            sha256_blocks(four.each_mut(), lists);
            let [mut a, mut b] = [start; 2];
            sha256_blocks([&mut a, &mut b], [lists[2], lists[0]]);
            assert_eq!(one, expected);
            assert_eq!(four, expected);
            assert_eq!([b, a], [expected[0], expected[2]]);
        }
    }

    #[test]
    #[should_panic(expected = "as many blocks")]
    fn unlike_numbers_of_blocks() {
        let (mut a, mut b) = ([0; 8], [0; 8]);
        sha256_blocks([&mut a, &mut b], [&[[0; 64]], &[]]);
    }
}
