//! Element types.

use crate::cpu::convert::nearest_bf16;
use half::{bf16, f16};
use zerocopy::{FromBytes, IntoBytes};

/// The type of a tensor's elements, a run-time value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// 64-bit float: gradient checks and references.
    F64,
    /// 32-bit float.
    F32,
    /// bfloat16.
    BF16,
    /// IEEE half.
    F16,
    /// Signed 64-bit integer: indices.
    I64,
    /// Signed 32-bit integer: indices.
    I32,
    /// Unsigned 32-bit integer: tokens.
    U32,
    /// Byte; also the result of comparisons (0 or 1).
    U8,
}

impl DType {
    /// Bytes per element.
    pub fn size(self) -> usize {
        match self {
            DType::F64 | DType::I64 => 8,
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::BF16 | DType::F16 => 2,
            DType::U8 => 1,
        }
    }

    /// Whether gradients can flow through this type.
    pub fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::BF16 | DType::F16)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::I64 => "i64",
            DType::I32 => "i32",
            DType::U32 => "u32",
            DType::U8 => "u8",
        })
    }
}

mod sealed {
    use zerocopy::{FromBytes, Immutable, IntoBytes};
    /// No padding, and every bit pattern is a valid value: checked by the compiler.
    pub trait Sealed: FromBytes + IntoBytes + Immutable {}
}

/// A Rust type that a tensor can hold. Sealed: every bit pattern of an implementor is a valid value.
pub trait Element: sealed::Sealed + Copy + Default + Send + Sync + PartialOrd + std::fmt::Debug + 'static {
    /// The matching dtype.
    const DTYPE: DType;
    /// Rounds (floats: to nearest) or truncates and saturates (integers).
    fn from_f64(x: f64) -> Self;
    /// Widens; i64 beyond 2⁵³ rounds.
    fn to_f64(self) -> f64;
}

macro_rules! element {
    ($($t:ty, $d:ident, $from:expr, $to:expr;)*) => {$(
        impl sealed::Sealed for $t {}
        impl Element for $t {
            const DTYPE: DType = DType::$d;
            #[inline(always)]
            fn from_f64(x: f64) -> Self { $from(x) }
            #[inline(always)]
            fn to_f64(self) -> f64 { $to(self) }
        }
    )*};
}
element! {
    f64, F64, |x| x, |x| x;
    f32, F32, |x| x as f32, |x| x as f64;
    bf16, BF16, |x| nearest_bf16(to_odd(x)), bf16::to_f64;
    f16, F16, |x| f16::from_f32(to_odd(x)), f16::to_f64;
    i64, I64, |x| x as i64, |x| x as f64;
    i32, I32, |x| x as i32, |x| x as f64;
    u32, U32, |x| x as u32, |x| x as f64;
    u8, U8, |x| x as u8, |x| x as f64;
}

/// The f32 that rounds to any type of at most 22 bits as `x` itself would: what f32 cannot hold is cut off, and the last bit says that there was more
/// ("round to odd", Boldo and Melquiond, IEEE Transactions on Computers 2008). The half crate drops 32 bits of a f64 unseen.
#[inline(always)]
pub(crate) fn to_odd(x: f64) -> f32 {
    let y = x as f32;
    let wide = f64::from(y);
    let cut = y.to_bits().wrapping_sub(u32::from(wide.abs() > x.abs()));
    if wide == x || x.is_nan() { y } else { f32::from_bits(cut | 1) }
}

/// The memory of some elements.
pub(crate) fn bytes<T: Element>(x: &[T]) -> &[u8] {
    x.as_bytes()
}

/// The memory of some elements, to be written.
pub(crate) fn bytes_mut<T: Element>(x: &mut [T]) -> &mut [u8] {
    x.as_mut_bytes()
}

/// A slice under its type's other name, for generic code that has looked at the dtype. Panics when the types differ.
pub(crate) fn as_type<A: Element, B: Element>(x: &[A]) -> &[B] {
    assert_eq!(A::DTYPE, B::DTYPE);
    <[B]>::ref_from_bytes(x.as_bytes()).expect("one type has one size and alignment")
}

/// Like [`as_type`], to be written.
pub(crate) fn as_type_mut<A: Element, B: Element>(x: &mut [A]) -> &mut [B] {
    assert_eq!(A::DTYPE, B::DTYPE);
    <[B]>::mut_from_bytes(x.as_mut_bytes()).expect("one type has one size and alignment")
}

/// Runs a generic body for the Rust type of a dtype: `dispatch!(dtype, |T| body::<T>(..))`.
#[macro_export]
macro_rules! dispatch {
    ($dtype:expr, |$t:ident| $body:expr) => {
        match $dtype {
            $crate::DType::F64 => {
                type $t = f64;
                $body
            }
            $crate::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::DType::BF16 => {
                type $t = $crate::half::bf16;
                $body
            }
            $crate::DType::F16 => {
                type $t = $crate::half::f16;
                $body
            }
            $crate::DType::I64 => {
                type $t = i64;
                $body
            }
            $crate::DType::I32 => {
                type $t = i32;
                $body
            }
            $crate::DType::U32 => {
                type $t = u32;
                $body
            }
            $crate::DType::U8 => {
                type $t = u8;
                $body
            }
        }
    };
}

/// Runs a generic body for the type that kernels compute in: f64 for f64, f32 for every other dtype.
#[macro_export]
macro_rules! dispatch_real {
    ($dtype:expr, |$t:ident| $body:expr) => {
        if $dtype == $crate::DType::F64 {
            type $t = f64;
            $body
        } else {
            type $t = f32;
            $body
        }
    };
}
