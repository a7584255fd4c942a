//! The generator of every random choice: SplitMix64, whose stream a seed fixes for good.
//!
//! Its state is a counter that a hash turns into bits, so the streams of many replicates can be opened at once, each from
//! the seed and its own index, and no result depends on which thread drew it.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline(always)]
const fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The stream of one replicate. Two of b streams of length n overlap with probability below b² n / 2^63.
    pub const fn stream(seed: u64, index: u64) -> Self {
        Self(mix(
            mix(seed.wrapping_add(STEP)) ^ mix(index.wrapping_mul(STEP) ^ 0x5851_f42d_4c95_7f2d)
        ))
    }

    /// What [`Random::new`] continues the stream from.
    pub const fn state(&self) -> u64 {
        self.0
    }

    #[inline(always)]
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }

    /// Uniform in [-1, 1).
    pub fn symmetric(&mut self) -> f64 {
        (self.bits() >> 11) as f64 * 2f64.powi(-52) - 1.0
    }

    /// Uniform in `0..n` (by multiplication; the bias is below n / 2^64).
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// `m` of `0..n` without repetition, in increasing order.
    pub fn sample(&mut self, n: usize, m: usize) -> Vec<u32> {
        let mut all: Vec<u32> = (0..n as u32).collect();
        if m >= n {
            return all;
        }
        for i in 0..m {
            let j = i + self.below(n - i);
            all.swap(i, j);
        }
        all.truncate(m);
        all.sort_unstable();
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_first_values() {
        let mut r = Random::new(1_234_567);
        assert_eq!(r.bits(), 6_457_827_717_110_365_317);
        assert_eq!(r.bits(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn streams_differ_by_seed_and_index() {
        let mut first: Vec<u64> = (0..64)
            .flat_map(|seed| (0..64).map(move |i| Random::stream(seed, i).bits()))
            .collect();
        first.sort_unstable();
        first.dedup();
        assert_eq!(first.len(), 64 * 64);
        let ones: u32 = first.iter().map(|b| b.count_ones()).sum();
        // 4096 words of 64 fair bits: standard deviation 256.
        assert!((f64::from(ones) - 131_072.0).abs() < 5.0 * 256.0);
    }

    #[test]
    fn samples_do_not_repeat() {
        let mut r = Random::new(0);
        for (n, m) in [(10, 3), (10, 10), (5, 9), (1000, 500)] {
            let s = r.sample(n, m);
            assert_eq!(s.len(), m.min(n));
            assert!(s.windows(2).all(|w| w[0] < w[1]) && s.iter().all(|i| (*i as usize) < n));
        }
        assert!((0..1000).all(|_| (-1.0..1.0).contains(&r.symmetric())));
    }
}
