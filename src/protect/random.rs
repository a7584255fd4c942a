//! The generator of the mini-batches: SplitMix64, whose stream a seed fixes for good.

/// SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
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
