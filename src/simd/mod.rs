//! One body per kernel, compiled for several instruction sets, chosen once at run time.
//!
//! A kernel is written as plain loops over fixed virtual lanes ([`LANES`] independent accumulators) and
//! handed to [`dispatch`], which inlines it into a function that may use AVX2, AVX-512 or the baseline (SSE2,
//! NEON). The compiler vectorises each copy, and because it never reorders or contracts floating-point
//! operations, all copies return the same bits. A library of vector types (`pulp`, `wide`) would tie the number
//! of lanes, and so the order of a sum, to the register width; bit-equal results would need this layer on top.
//! Matrix products go to faer, whose kernels are tuned per instruction set and promise no more than that.

use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

mod exp;
mod lse;
mod mask;
mod prefetch;
mod reduce;
mod sha256;
pub use exp::{Exp, exp, exp2_rough};
pub use lse::log_sum_exp;
pub use mask::top_bits;
pub use prefetch::prefetch;
pub use reduce::{LANES, dot, dots, max, sum_f64, sum_map, sum_squares_f64};
pub use sha256::sha256_blocks;

/// Instruction set a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Level {
    /// What every CPU of the architecture has (SSE2 on x86-64, NEON on AArch64).
    Baseline = 1,
    /// AVX2.
    Avx2 = 2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512 = 3,
}

impl Level {
    /// Name used by `ABJURE_SIMD` and `abjure info`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }

    /// The reverse of [`Level::name`].
    pub fn parse(name: &str) -> Option<Self> {
        [Self::Baseline, Self::Avx2, Self::Avx512]
            .into_iter()
            .find(|l| l.name() == name)
    }
}

static LEVEL: AtomicU8 = AtomicU8::new(0);

/// The best level this CPU has.
pub fn detected() -> Level {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            return Level::Avx512;
        }
        if is_x86_feature_detected!("avx2") {
            return Level::Avx2;
        }
    }
    Level::Baseline
}

/// The level in use: the detected one, or a lower one asked for by `ABJURE_SIMD` or [`set_level`].
pub fn level() -> Level {
    match LEVEL.load(Relaxed) {
        1 => Level::Baseline,
        2 => Level::Avx2,
        3 => Level::Avx512,
        _ => {
            let asked = std::env::var("ABJURE_SIMD")
                .ok()
                .and_then(|v| Level::parse(v.trim()));
            set_level(asked.unwrap_or(Level::Avx512))
        }
    }
}

/// Uses `wanted`, or the best the CPU has where that is less; returns what is now in use.
pub fn set_level(wanted: Level) -> Level {
    let chosen = wanted.min(detected());
    LEVEL.store(chosen as u8, Relaxed);
    chosen
}

/// A loop nest to compile per instruction set. `run` must be `#[inline(always)]`, and so must what it calls.
pub trait Kernel {
    type Output;
    fn run(self) -> Self::Output;
}

/// Runs the copy of `kernel` compiled for the level in use.
#[inline]
pub fn dispatch<K: Kernel>(kernel: K) -> K::Output {
    match level() {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `level` never exceeds what `detected` found on this CPU.
        Level::Avx512 => unsafe { avx512(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Level::Avx2 => unsafe { avx2(kernel) },
        _ => kernel.run(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi1,bmi2,lzcnt,popcnt")]
fn avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2,lzcnt,popcnt")]
fn avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run()
}

/// Levels that this CPU can run, for tests that compare them.
pub fn available() -> Vec<Level> {
    [Level::Baseline, Level::Avx2, Level::Avx512]
        .into_iter()
        .filter(|l| *l <= detected())
        .collect()
}

/// Serialises tests that force a level, which is process-wide.
#[cfg(test)]
pub(crate) fn for_each_level(mut f: impl FnMut(Level)) {
    static LOCK: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _guard = LOCK
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    for l in available() {
        set_level(l);
        f(l);
    }
    set_level(Level::Avx512);
}
