//! SHA-256 of what streams by.

use super::files::hex;
use crate::simd::sha256_blocks;

const BLOCK: usize = 64;
const START: [u32; 8] = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// A SHA-256 that can be taken of two messages at once, in little more than the time of one.
#[derive(Clone)]
pub struct Sha256 {
    state: [u32; 8],
    /// The begun block is its first `len % 64` bytes.
    block: [u8; BLOCK],
    len: u64,
}

impl Sha256 {
    pub fn new() -> Self {
        let (state, block, len) = (START, [0; BLOCK], 0);
        Self { state, block, len }
    }

    /// Ends a begun block; what is left of `bytes` (nothing, unless the block is ended).
    fn fill<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let begun = (self.len % BLOCK as u64) as usize;
        if begun == 0 {
            return bytes;
        }
        let (now, rest) = bytes.split_at(bytes.len().min(BLOCK - begun));
        self.block[begun..begun + now.len()].copy_from_slice(now);
        self.len += now.len() as u64;
        if self.len.is_multiple_of(BLOCK as u64) {
            sha256_blocks([&mut self.state], [&[self.block]]);
        }
        rest
    }

    /// Takes whole blocks, and begins one with the rest.
    fn blocks(&mut self, bytes: &[u8]) {
        let (whole, rest) = bytes.as_chunks::<BLOCK>();
        sha256_blocks([&mut self.state], [whole]);
        self.block[..rest.len()].copy_from_slice(rest);
        self.len += bytes.len() as u64;
    }

    pub fn update(&mut self, bytes: &[u8]) {
        let rest = self.fill(bytes);
        if !rest.is_empty() {
            self.blocks(rest);
        }
    }

    /// [`Sha256::update`] of both, together as far as both go.
    pub fn update_both(a: &mut Self, to_a: &[u8], b: &mut Self, to_b: &[u8]) {
        let (to_a, to_b) = (a.fill(to_a), b.fill(to_b));
        let whole = to_a.len().min(to_b.len()) / BLOCK * BLOCK;
        if whole > 0 {
            let (now_a, now_b) = (&to_a[..whole], &to_b[..whole]);
            let lists = [now_a.as_chunks().0, now_b.as_chunks().0];
            sha256_blocks([&mut a.state, &mut b.state], lists);
            a.len += whole as u64;
            b.len += whole as u64;
        }
        a.update(&to_a[whole..]);
        b.update(&to_b[whole..]);
    }

    /// The digest, in hexadecimal digits.
    pub fn hex(mut self) -> String {
        let bits = self.len * 8;
        let zeros = (BLOCK as u64 + 55 - self.len % BLOCK as u64) % BLOCK as u64;
        let mut end = vec![0x80];
        end.resize(1 + zeros as usize, 0);
        end.extend(bits.to_be_bytes());
        self.update(&end);
        let bytes: Vec<u8> = self.state.iter().flat_map(|w| w.to_be_bytes()).collect();
        hex(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sha2::Digest;

    fn expected(bytes: &[u8]) -> String {
        hex(&sha2::Sha256::digest(bytes))
    }

    #[test]
    fn known_answers() {
        let mut hash = Sha256::new();
        hash.update(b"abc");
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash.hex(), abc); // FIPS 180-4's example
        let bytes: Vec<u8> = (0..300).map(|i| (i * 7) as u8).collect();
        for n in 0..300 {
            let mut hash = Sha256::new();
            hash.update(&bytes[..n]);
            assert_eq!(hash.hex(), expected(&bytes[..n]), "{n} bytes");
        }
    }

    proptest! {
        #[test]
        fn two_at_once(
            pieces in prop::collection::vec(
                (prop::collection::vec(any::<u8>(), 0..200), prop::collection::vec(any::<u8>(), 0..200)),
                0..12,
            ),
        ) {
            let (mut a, mut b) = (Sha256::new(), Sha256::new());
            let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
            for (x, y) in &pieces {
                Sha256::update_both(&mut a, x, &mut b, y);
                all_a.extend(x);
                all_b.extend(y);
            }
            prop_assert_eq!(a.hex(), expected(&all_a));
            prop_assert_eq!(b.hex(), expected(&all_b));
        }
    }
}
