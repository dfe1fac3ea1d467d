//! One loop, compiled for each vector instruction set and chosen at run time; and the scalar functions that vectorise inside it.
//!
//! [`vectorized!`](crate::vectorized) wraps a plain function: its body is compiled three times (baseline, AVX2 + FMA, AVX-512) and the best that the
//! machine has is called. Bodies are ordinary Rust over slices that LLVM turns into vector code; [`Real`]'s functions are written so that it can.

use std::sync::OnceLock;

/// Which vector instructions this machine has, best first in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the compile target guarantees (SSE2 on x86-64, NEON on AArch64).
    Baseline,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, VL and DQ.
    Avx512,
}

/// The level in use, detected once. `TIDEGATE_SIMD=baseline|avx2|native` lowers it; what the machine lacks is not raised, and another value is said to be
/// ignored on stderr.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        #[cfg(target_arch = "x86_64")]
        let found = if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            Level::Avx512
        } else if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            Level::Avx2
        } else {
            Level::Baseline
        };
        #[cfg(not(target_arch = "x86_64"))]
        let found = Level::Baseline;
        match std::env::var("TIDEGATE_SIMD").as_deref() {
            Ok("baseline") => Level::Baseline,
            Ok("avx2") => found.min(Level::Avx2),
            Ok("native") | Err(std::env::VarError::NotPresent) => found,
            other => {
                eprintln!("TIDEGATE_SIMD is {other:?} and is ignored; it can be baseline, avx2 or native");
                found
            }
        }
    })
}

/// Defines functions whose bodies are compiled for every vector level and dispatched at run time.
///
/// ```
/// use engine::{cpu::simd::Real, vectorized};
/// vectorized! {
///     /// y += a x
///     pub fn axpy[F: Real](a: F, x: &[F], y: &mut [F]) {
///         for (y, x) in y.iter_mut().zip(x) { *y = x.mul_add(a, *y) }
///     }
/// }
/// let mut y = [1.0f32; 3];
/// axpy(2.0, &[1.0, 2.0, 3.0], &mut y);
/// assert_eq!(y, [3.0, 5.0, 7.0]);
/// ```
/// Generics stand in square brackets and must be inferable from the arguments. Functions called in the body have to be `#[inline(always)]` to be
/// vectorised with it.
#[macro_export]
macro_rules! vectorized {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident $([$($gen:tt)*])? ($($arg:ident : $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block)*) => {$(
        $(#[$meta])*
        $vis fn $name $(<$($gen)*>)? ($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            #[allow(clippy::too_many_arguments)]
            fn body $(<$($gen)*>)? ($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2 $(<$($gen)*>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512 $(<$($gen)*>)? ($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
                match $crate::cpu::simd::level() {
                    // SAFETY: the level was detected on this machine.
                    $crate::cpu::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::cpu::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::cpu::simd::Level::Baseline => {}
                }
            }
            body($($arg),*)
        }
    )*};
}

/// The two types that kernels compute in: `f32` for training, `f64` for gradient checks by the very same code.
pub trait Real:
    Copy
    + Send
    + Sync
    + 'static
    + PartialOrd
    + std::fmt::Debug
    + Default
    + crate::Element
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Neg<Output = Self>
    + std::ops::AddAssign
    + std::ops::SubAssign
    + std::ops::MulAssign
    + std::iter::Sum
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// −∞
    const NEG_INFINITY: Self;
    /// self·a + b, fused.
    fn mul_add(self, a: Self, b: Self) -> Self;
    /// The larger (NaN-ignoring is not promised).
    fn max(self, o: Self) -> Self;
    /// The smaller.
    fn min(self, o: Self) -> Self;
    /// |x|
    fn abs(self) -> Self;
    /// √x
    fn sqrt(self) -> Self;
    /// eˣ in a form that vectorises; f32: at most 1.1 ULP from the exact value. This and the bounds below: every float, `engine/tests/ulp.rs`.
    fn exp(self) -> Self;
    /// ln x (scalar).
    fn ln(self) -> Self;
    /// 1 / (1 + e⁻ˣ) in a form that vectorises; f32: 2.5 ULP. The exponential is of −|x|, which can't overflow: small results stay exact down to subnormals.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        let e = (-self.abs()).exp();
        (if self < Self::ZERO { e } else { Self::ONE }) / (Self::ONE + e)
    }
    /// x · sigmoid(x); f32: 3.4 ULP, where sigmoid(x) is no subnormal number. NaN at −∞, as in PyTorch.
    #[inline(always)]
    fn silu(self) -> Self {
        self * self.sigmoid()
    }
    /// ln(1 + eˣ) in a form that vectorises; f32: 3.8 ULP.
    fn softplus(self) -> Self;
    /// tanh x in a form that vectorises; f32: 1.7 ULP.
    fn tanh(self) -> Self;
}

macro_rules! real {
    ($t:ident, $exp:expr, $softplus:expr, $tanh:expr) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            #[inline(always)]
            fn mul_add(self, a: Self, b: Self) -> Self {
                $t::mul_add(self, a, b)
            }
            #[inline(always)]
            fn max(self, o: Self) -> Self {
                if self > o { self } else { o }
            }
            #[inline(always)]
            fn min(self, o: Self) -> Self {
                if self < o { self } else { o }
            }
            #[inline(always)]
            fn abs(self) -> Self {
                $t::abs(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                $t::sqrt(self)
            }
            #[inline(always)]
            fn ln(self) -> Self {
                $t::ln(self)
            }
            #[inline(always)]
            fn exp(self) -> Self {
                $exp(self)
            }
            #[inline(always)]
            fn softplus(self) -> Self {
                $softplus(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                $tanh(self)
            }
        }
    };
}
real!(f64, f64::exp, |x: f64| x.max(0.0) + (-x.abs()).exp().ln_1p(), f64::tanh);
real!(f32, exp_f32, softplus_f32, tanh_f32);

/// eˣ for f32, branch-free. The integer part of x/ln 2 goes to the exponent in two halves, so that subnormal results come out right.
#[inline(always)]
pub fn exp_f32(x: f32) -> f32 {
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    // adding and taking away 1.5·2²³ rounds to an integer, whose bits stand in the low mantissa
    let shift = f32::mul_add(x, std::f32::consts::LOG2_E, 12582912.0);
    let n = shift - 12582912.0;
    let r = f32::mul_add(n, -6.933_594e-1, x); // ln 2 in two parts
    let r = f32::mul_add(n, 2.121_944_4e-4, r);
    // minimax on |r| <= ln 2 / 2, relative error 3e-9 before rounding
    let mut p = 1.381_454e-3;
    p = f32::mul_add(p, r, 8.368_745e-3);
    p = f32::mul_add(p, r, 4.166_839e-2);
    p = f32::mul_add(p, r, 1.666_652_1e-1);
    p = f32::mul_add(p, r, 4.999_999_4e-1);
    let p = f32::mul_add(p * r, r, r) + 1.0;
    let i = (shift.to_bits() as i32).wrapping_sub(12582912.0f32.to_bits() as i32);
    let h = i >> 1;
    p * f32::from_bits(((h + 127) << 23) as u32) * f32::from_bits(((i - h + 127) << 23) as u32)
}

#[inline(always)]
fn softplus_f32(x: f32) -> f32 {
    // ln(1+u), 0 < u <= 1, by atanh: 2 atanh(u / (2+u))
    let u = exp_f32(-x.abs());
    let s = u / (2.0 + u);
    let z = s * s;
    let mut p = 2.0 / 15.0;
    for c in [2.0 / 13.0, 2.0 / 11.0, 2.0 / 9.0, 2.0 / 7.0, 2.0 / 5.0, 2.0 / 3.0, 2.0] {
        p = f32::mul_add(p, z, c);
    }
    (if x > 0.0 { x } else { 0.0 }) + s * p
}

#[inline(always)]
fn tanh_f32(x: f32) -> f32 {
    // for small x the exponential form cancels: an odd minimax polynomial stands in there
    let a = x.abs();
    let e = exp_f32(-2.0 * a);
    let big = (1.0 - e) / (1.0 + e);
    let z = x * x;
    let mut p = -5.895_158e-3;
    p = f32::mul_add(p, z, 2.079_597e-2);
    p = f32::mul_add(p, z, -5.378_383e-2);
    p = f32::mul_add(p, z, 1.333_192_4e-1);
    p = f32::mul_add(p, z, -3.333_33e-1);
    let small = f32::mul_add(p * z, a, a);
    let y = if a < 0.6 { small } else { big };
    f32::copysign(y, x)
}

/// Asks for the cache lines of `x` ahead of their use; does nothing where there is no such instruction.
#[inline(always)]
pub fn prefetch<T>(x: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for at in (0..std::mem::size_of_val(x)).step_by(64) {
        // SAFETY: a prefetch reads nothing that a program could see, and the address lies inside the slice.
        unsafe { std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(x.as_ptr().cast::<i8>().add(at)) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = x;
}

/// Folds sixteen lanes as a tree: four dependent steps instead of sixteen. Spelled out: LLVM makes branches and stack traffic of a loop over the halves.
#[inline(always)]
pub(super) fn fold<F: Real>(lanes: [F; 16], f: impl Fn(F, F) -> F) -> F {
    let (mut x, mut y) = ([F::ZERO; 8], [F::ZERO; 4]);
    for i in 0..8 {
        x[i] = f(lanes[i], lanes[i + 8]);
    }
    for i in 0..4 {
        y[i] = f(x[i], x[i + 4]);
    }
    f(f(y[0], y[2]), f(y[1], y[3]))
}

/// Σ a b, in sixteen lanes; inside [`vectorized!`](crate::vectorized) bodies.
#[inline(always)]
pub fn dot<F: Real>(a: &[F], b: &[F]) -> F {
    let mut lanes = [F::ZERO; 16];
    let ((a16, at), (b16, bt)) = (a.as_chunks::<16>(), b.as_chunks::<16>());
    for (a, b) in a16.iter().zip(b16) {
        for i in 0..16 {
            lanes[i] = a[i].mul_add(b[i], lanes[i]);
        }
    }
    for (l, (a, b)) in lanes.iter_mut().zip(at.iter().zip(bt)) {
        *l = a.mul_add(*b, *l);
    }
    fold(lanes, |a, b| a + b)
}

/// Σ x, in sixteen lanes; inside [`vectorized!`](crate::vectorized) bodies.
#[inline(always)]
pub fn sum<F: Real>(x: &[F]) -> F {
    let mut lanes = [F::ZERO; 16];
    let (body, tail) = x.as_chunks::<16>();
    for c in body {
        lanes.iter_mut().zip(c).for_each(|(l, x)| *l += *x);
    }
    lanes.iter_mut().zip(tail).for_each(|(l, x)| *l += *x);
    fold(lanes, |a, b| a + b)
}

/// The largest of x (−∞ of none), in sixteen lanes; inside [`vectorized!`](crate::vectorized) bodies.
#[inline(always)]
pub fn max<F: Real>(x: &[F]) -> F {
    let mut lanes = [F::NEG_INFINITY; 16];
    let (body, tail) = x.as_chunks::<16>();
    for c in body {
        lanes.iter_mut().zip(c).for_each(|(l, x)| *l = l.max(*x));
    }
    lanes.iter_mut().zip(tail).for_each(|(l, x)| *l = l.max(*x));
    fold(lanes, F::max)
}
