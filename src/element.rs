//! Element types: how f64, f32, f16 and bf16 enter and leave the arithmetic.
//!
//! Half-precision conversions are written as branch-free integer selects rather than with conversion
//! instructions: the compiler then vectorises them inside every kernel on every instruction set, and all
//! of them give the same bits. Tests hold them to the `half` crate over every pattern.

use half::{bf16, f16};
use std::fmt::Debug;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub, SubAssign};

/// Tag of an element type, as it crosses the Python boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
}

impl DType {
    /// The name NumPy and torch use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F64 => "float64",
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Runs `$body` with the type alias `$T` bound to the element type of a [`DType`] tag.
#[macro_export]
macro_rules! with_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            $crate::element::DType::F64 => {
                type $T = f64;
                $body
            }
            $crate::element::DType::F32 => {
                type $T = f32;
                $body
            }
            $crate::element::DType::F16 => {
                type $T = ::half::f16;
                $body
            }
            $crate::element::DType::BF16 => {
                type $T = ::half::bf16;
                $body
            }
        }
    };
}

/// The arithmetic types: f32 (for f32, f16, bf16 storage) and f64.
pub trait Real:
    Copy
    + Send
    + Sync
    + Debug
    + Default
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + 'static
{
    const ZERO: Self;
    const ONE: Self;
    const INFINITY: Self;
    /// Unsigned integer of the same width.
    type Bits: Copy + Default + Ord;
    /// The bit pattern: ordered as the values are from +0 to +∞, and above all of those for NaN and negative signs.
    fn bits(self) -> Self::Bits;
    fn from_f64(v: f64) -> Self;
    fn to_f64(self) -> f64;
    fn is_finite(self) -> bool;
    fn is_nan(self) -> bool;
    fn abs(self) -> Self;
    fn sqrt(self) -> Self;
    fn powf(self, e: Self) -> Self;
    /// `if self < other { self } else { other }`: one instruction, no NaN special case.
    #[inline(always)]
    fn lesser(self, other: Self) -> Self {
        if self < other { self } else { other }
    }
    /// `if self > other { self } else { other }`: one instruction, no NaN special case.
    #[inline(always)]
    fn greater(self, other: Self) -> Self {
        if self > other { self } else { other }
    }
}

macro_rules! real {
    ($t:ty, $bits:ty) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const INFINITY: Self = <$t>::INFINITY;
            type Bits = $bits;
            #[inline(always)]
            fn bits(self) -> $bits {
                self.to_bits()
            }
            #[inline(always)]
            fn from_f64(v: f64) -> Self {
                v as $t
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                <$t>::is_finite(self)
            }
            #[inline(always)]
            fn is_nan(self) -> bool {
                <$t>::is_nan(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn powf(self, e: Self) -> Self {
                <$t>::powf(self, e)
            }
        }
    };
}
real!(f32, u32);
real!(f64, u64);

/// A storage type that kernels read and write.
pub trait Element: Copy + Send + Sync + Debug + Default + PartialEq + 'static {
    /// Type the arithmetic is done in.
    type Acc: Real;
    const DTYPE: DType;
    /// Widens exactly.
    fn load(self) -> Self::Acc;
    /// Rounds to nearest, ties to even; NaN stays NaN, overflow becomes infinity.
    fn store(v: Self::Acc) -> Self;
    /// `|self|` is the largest finite value or less.
    #[inline(always)]
    fn finite(self) -> bool {
        self.load().is_finite()
    }
    /// Signed integer of the same width.
    type Key: Copy + Ord + Debug;
    /// Ordered as the values are, -0 before +0; NaN lie beyond the infinity of their sign. Comparing keys takes no
    /// conversion and as many lanes as the storage type allows.
    fn key(self) -> Self::Key;
    /// The value of a key.
    fn from_key(key: Self::Key) -> Self;
}

macro_rules! keyed {
    ($key:ty, $bits:ty) => {
        type Key = $key;
        #[inline(always)]
        fn key(self) -> $key {
            let bits = self.to_bits() as $key;
            bits ^ (bits >> (<$key>::BITS - 1) & <$key>::MAX)
        }
        #[inline(always)]
        fn from_key(key: $key) -> Self {
            Self::from_bits((key ^ (key >> (<$key>::BITS - 1) & <$key>::MAX)) as $bits)
        }
    };
}

impl Element for f64 {
    type Acc = f64;
    const DTYPE: DType = DType::F64;
    keyed!(i64, u64);
    #[inline(always)]
    fn load(self) -> f64 {
        self
    }
    #[inline(always)]
    fn store(v: f64) -> Self {
        v
    }
}

impl Element for f32 {
    type Acc = f32;
    const DTYPE: DType = DType::F32;
    keyed!(i32, u32);
    #[inline(always)]
    fn load(self) -> f32 {
        self
    }
    #[inline(always)]
    fn store(v: f32) -> Self {
        v
    }
}

impl Element for bf16 {
    type Acc = f32;
    const DTYPE: DType = DType::BF16;
    keyed!(i16, u16);
    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn store(v: f32) -> Self {
        let bits = v.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        let quiet = (bits >> 16) | 0x40;
        let is_nan = (bits & 0x7fff_ffff) > 0x7f80_0000;
        bf16::from_bits(if is_nan { quiet } else { rounded } as u16)
    }
}

impl Element for f16 {
    type Acc = f32;
    const DTYPE: DType = DType::F16;
    keyed!(i16, u16);
    #[inline(always)]
    fn load(self) -> f32 {
        let h = u32::from(self.to_bits());
        let shifted = (h & 0x7fff) << 13;
        let exponent = shifted & 0x0f80_0000;
        // Rebias; infinities and NaN move to the top exponent, subnormals are renormalised by subtracting
        // 2^-14 as a normal number, so that no subnormal f32 ever enters the arithmetic units.
        let normal = shifted + (112 << 23);
        let special = normal + (112 << 23);
        let subnormal =
            (f32::from_bits(shifted + (113 << 23)) - f32::from_bits(113 << 23)).to_bits();
        let magnitude = if exponent == 0x0f80_0000 {
            special
        } else if exponent == 0 {
            subnormal
        } else {
            normal
        };
        f32::from_bits(magnitude | ((h & 0x8000) << 16))
    }
    #[inline(always)]
    fn store(v: f32) -> Self {
        let bits = v.to_bits();
        let sign = (bits >> 16) & 0x8000;
        let mag = bits & 0x7fff_ffff;
        let nan = 0x7e00 | ((mag >> 13) & 0x3ff);
        // Adding 2^-1 aligns the ten mantissa bits of a subnormal half with the last bits of the sum, so that
        // the hardware rounds it to nearest even.
        let magic = 126u32 << 23;
        let subnormal = (f32::from_bits(mag) + f32::from_bits(magic))
            .to_bits()
            .wrapping_sub(magic);
        let normal = mag
            .wrapping_sub(112 << 23)
            .wrapping_add(0xfff + ((mag >> 13) & 1))
            >> 13;
        let h = if mag > 0x7f80_0000 {
            nan
        } else if mag >= (143 << 23) {
            0x7c00
        } else if mag < (113 << 23) {
            subnormal
        } else {
            normal
        };
        f16::from_bits((h | sign) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    #[test]
    fn every_half_pattern_loads_and_round_trips() {
        for bits in 0..=u16::MAX {
            let b = bf16::from_bits(bits);
            let h = f16::from_bits(bits);
            assert!(same(b.load(), b.to_f32()), "bf16 {bits:04x}");
            assert!(same(h.load(), h.to_f32()), "f16 {bits:04x}");
            if !b.is_nan() {
                assert_eq!(bf16::store(b.load()).to_bits(), bits);
            }
            if !h.is_nan() {
                assert_eq!(f16::store(h.load()).to_bits(), bits);
            }
            assert_eq!(bf16::store(b.load()).is_nan(), b.is_nan());
            assert_eq!(f16::store(h.load()).is_nan(), h.is_nan());
        }
    }

    #[test]
    fn keys_are_ordered_as_values() {
        fn holds<T: Element>(a: T, b: T) {
            let (x, y) = (a.load().to_f64(), b.load().to_f64());
            if x < y {
                assert!(a.key() < b.key(), "{a:?} {b:?}");
            }
            let infinity = T::store(T::Acc::INFINITY).key();
            let negative = T::store(-T::Acc::INFINITY).key();
            assert_eq!(x.is_nan(), a.key() > infinity || a.key() < negative);
            let back = T::from_key(a.key());
            assert!(back == a || x.is_nan() && back.load().is_nan());
        }
        for bits in 0..=u16::MAX {
            for other in [
                bits.wrapping_add(1),
                bits ^ 0x8000,
                bits.wrapping_mul(40_503),
            ] {
                holds(bf16::from_bits(bits), bf16::from_bits(other));
                holds(f16::from_bits(bits), f16::from_bits(other));
                let wide = |b: u16| u32::from(b) << 16 | u32::from(b);
                holds(f32::from_bits(wide(bits)), f32::from_bits(wide(other)));
                let wide = |b: u16| u64::from(wide(b)) << 32 | 1;
                holds(f64::from_bits(wide(bits)), f64::from_bits(wide(other)));
            }
        }
    }

    #[test]
    fn stores_at_and_beside_every_rounding_boundary() {
        for bits in 0..u16::MAX {
            let mid = f32::from_bits((u32::from(bits) << 16) + 0x8000);
            for v in [mid, mid.next_up(), mid.next_down()] {
                if !v.is_nan() {
                    assert_eq!(bf16::store(v), bf16::from_f32(v), "{v:e}");
                }
            }
            let (lo, hi) = (
                f16::from_bits(bits).to_f32(),
                f16::from_bits(bits + 1).to_f32(),
            );
            if lo.is_finite() && hi.is_finite() && lo.signum() == hi.signum() {
                let mid = (lo + hi) / 2.0;
                for v in [mid, mid.next_up(), mid.next_down()] {
                    assert_eq!(f16::store(v).to_bits(), f16::from_f32(v).to_bits(), "{v:e}");
                }
            }
        }
        for v in [65519.99, 65520.0, 65536.0, 1e30, f32::INFINITY, -65520.0] {
            assert_eq!(f16::store(v), f16::from_f32(v), "{v}");
        }
    }

    proptest! {
        #[test]
        fn stores_as_the_half_crate(bits in any::<u32>()) {
            let v = f32::from_bits(bits);
            if v.is_nan() {
                prop_assert!(bf16::store(v).is_nan() && f16::store(v).is_nan());
            } else {
                prop_assert_eq!(bf16::store(v).to_bits(), bf16::from_f32(v).to_bits());
                prop_assert_eq!(f16::store(v).to_bits(), f16::from_f32(v).to_bits());
            }
        }
    }
}
