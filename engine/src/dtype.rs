//! Element types.

use half::{bf16, f16};

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
    pub trait Sealed {}
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
    bf16, BF16, bf16::from_f64, bf16::to_f64;
    f16, F16, f16::from_f64, f16::to_f64;
    i64, I64, |x| x as i64, |x| x as f64;
    i32, I32, |x| x as i32, |x| x as f64;
    u32, U32, |x| x as u32, |x| x as f64;
    u8, U8, |x| x as u8, |x| x as f64;
}

/// The memory of some elements.
pub(crate) fn bytes<T: Element>(x: &[T]) -> &[u8] {
    // SAFETY: an `Element` has no padding, so its bytes may be read.
    unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), size_of_val(x)) }
}

/// The memory of some elements, to be written.
pub(crate) fn bytes_mut<T: Element>(x: &mut [T]) -> &mut [u8] {
    // SAFETY: an `Element` is any bytes of its size.
    unsafe { std::slice::from_raw_parts_mut(x.as_mut_ptr().cast(), size_of_val(x)) }
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
