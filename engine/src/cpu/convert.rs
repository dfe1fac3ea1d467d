//! Conversion between element types in loops that vectorise. Halves are computed with in f32, in pieces that stay in the first cache.

use super::simd::Real;
use crate::dtype::{as_type, as_type_mut, to_odd};
use crate::{DType, Element, vectorized};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// Elements of a piece: three of them in f32 are 12 KiB.
pub(crate) const PIECE: usize = 1024;
/// Elements of a task of [`convert_all`].
const TASK: usize = 16 * 1024;

/// To nearest, ties to even; without the branches of the half crate's, so that it vectorises.
#[inline(always)]
pub(crate) fn nearest_bf16(x: f32) -> bf16 {
    let b = x.to_bits();
    let nearest = b.wrapping_add(0x7fff + (b >> 16 & 1)) >> 16;
    bf16::from_bits((if x.is_nan() { b >> 16 | 0x40 } else { nearest }) as u16)
}

vectorized! {
    fn each[S: Element, D: Element](x: &[S], y: &mut [D]) {
        for (y, x) in y.iter_mut().zip(x) { *y = D::from_f64(x.to_f64()) }
    }
    fn odd[S: Element](x: &[S], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) { *y = to_odd(x.to_f64()) }
    }
    fn widen_bf16(x: &[bf16], y: &mut [f32]) {
        for (y, x) in y.iter_mut().zip(x) { *y = f32::from_bits(u32::from(x.to_bits()) << 16) }
    }
    fn narrow_bf16(x: &[f32], y: &mut [bf16]) {
        for (y, x) in y.iter_mut().zip(x) { *y = nearest_bf16(*x) }
    }
}

/// `y = x` in another type: to floats rounded once, to nearest; from floats to integers truncated and saturated.
///
/// Panics when the lengths differ.
pub fn convert<S: Element, D: Element>(x: &[S], y: &mut [D]) {
    use DType::{BF16, F16, F32};
    assert_eq!(x.len(), y.len(), "a conversion between slices of one length");
    match (S::DTYPE, D::DTYPE) {
        (s, d) if s == d => y.copy_from_slice(as_type(x)),
        (BF16, F32) => widen_bf16(as_type(x), as_type_mut(y)),
        (F32, BF16) => narrow_bf16(as_type(x), as_type_mut(y)),
        (F16, F32) => as_type::<S, f16>(x).convert_to_f32_slice(as_type_mut(y)),
        (F32, F16) => as_type_mut::<D, f16>(y).convert_from_f32_slice(as_type(x)),
        (BF16 | F16, _) => by_f32(convert, x, y),
        (_, BF16 | F16) => by_f32(odd, x, y),
        _ => each(x, y),
    }
}

fn by_f32<S: Element, D: Element>(widen: impl Fn(&[S], &mut [f32]), x: &[S], y: &mut [D]) {
    let mut wide = [0f32; PIECE];
    for (x, y) in x.chunks(PIECE).zip(y.chunks_mut(PIECE)) {
        let wide = &mut wide[..x.len()];
        widen(x, wide);
        convert(wide, y);
    }
}

/// [`convert`] on all threads.
pub(crate) fn convert_all<S: Element, D: Element>(x: &[S], y: &mut [D]) {
    if x.len() <= TASK {
        return convert(x, y);
    }
    x.par_chunks(TASK).zip(y.par_chunks_mut(TASK)).for_each(|(x, y)| convert(x, y));
}

/// `y.len()` elements of `x`, every `step`-th, or only the first where `step` is 0. Returns the step at which to read `y`.
pub(crate) fn widen<T: Element, F: Real>(x: &[T], step: usize, y: &mut [F]) -> usize {
    match step {
        0 => convert(&x[..1], &mut y[..1]),
        1 => convert(&x[..y.len()], y),
        _ => y.iter_mut().enumerate().for_each(|(i, y)| *y = F::from_f64(x[i * step].to_f64())),
    }
    step.min(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The neighbour of `x` among a half's values that is nearest, ties to even, found by search.
    fn nearest(x: f64, value: impl Fn(u16) -> f64, infinity: u16) -> u16 {
        let sign = if x.is_sign_negative() { 0x8000 } else { 0 };
        let x = x.abs();
        let (mut low, mut high) = (0, infinity);
        while high - low > 1 {
            let mid = low + (high - low) / 2;
            if value(mid) <= x { low = mid } else { high = mid }
        }
        // beyond the largest value, infinity stands where the next one would be
        let top = if high == infinity { 2.0 * value(infinity - 1) - value(infinity - 2) } else { value(high) };
        let (down, up) = (x - value(low), top - x);
        sign | if x.is_infinite() || down > up || (down == up && high & 1 == 0) { high } else { low }
    }

    #[test]
    fn halves_round_once_to_nearest() {
        let mut x: Vec<f64> = crate::rng::normal(5, 0, 20_000).iter().zip(0..).map(|(x, i)| x * 2f64.powi(i % 60 - 40)).collect();
        for bits in (0..=u16::MAX).step_by(17) {
            for v in [bf16::from_bits(bits).to_f64(), f16::from_bits(bits).to_f64()].into_iter().filter(|v| v.is_finite()) {
                // a half itself, the middle between it and the next one, and what f64 and f32 have beside the middle
                let (b, f) = (v * (1.0 + 2f64.powi(-9)), v * (1.0 + 2f64.powi(-12)));
                x.extend([v, b, b * (1.0 + 1e-15), b * (1.0 - 1e-15), b * (1.0 + 2e-7), f, f * (1.0 + 1e-15), f * (1.0 - 1e-15)]);
                x.extend([f64::from(bf16::from_bits(bits).to_f32()) * 1.5, v + 2f64.powi(-25), v + 2f64.powi(-134)]);
            }
        }
        x.extend([0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, 65519.9, 65520.0, 3.4e38, 3.3961e38, 1e300, -1e-300]);
        fn bits<D: Element, S: Element>(x: &[S], to_bits: fn(D) -> u16) -> Vec<u16> {
            let mut y = vec![D::default(); x.len()];
            convert_all(x, &mut y);
            y.into_iter().map(to_bits).collect()
        }
        let narrow: Vec<f32> = x.iter().map(|x| *x as f32).collect();
        let (b64, f64s) = (bits(&x, bf16::to_bits), bits(&x, f16::to_bits));
        let (b32, f32s) = (bits(&narrow, bf16::to_bits), bits(&narrow, f16::to_bits));
        for (i, x) in x.iter().enumerate() {
            let to_bf16 = |x: f64| nearest(x, |b| bf16::from_bits(b).to_f64(), 0x7f80);
            let to_f16 = |x: f64| nearest(x, |b| f16::from_bits(b).to_f64(), 0x7c00);
            assert_eq!(b64[i], to_bf16(*x), "{x:e} to bf16");
            assert_eq!(f64s[i], to_f16(*x), "{x:e} to f16");
            assert_eq!(b64[i], bf16::to_bits(Element::from_f64(*x)));
            assert_eq!(f64s[i], f16::to_bits(Element::from_f64(*x)));
            let x = f64::from(narrow[i]);
            assert_eq!((b32[i], f32s[i]), (to_bf16(x), to_f16(x)), "{x:e} from f32");
        }
        assert!(bits::<bf16, f32>(&[f32::NAN, f32::from_bits(0x7f80_0001)], bf16::to_bits).iter().all(|b| bf16::from_bits(*b).is_nan()));
        assert!(bits::<f16, f64>(&[f64::NAN], f16::to_bits).iter().all(|b| f16::from_bits(*b).is_nan()));
    }

    #[test]
    fn every_half_widens_exactly() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let (b, f): (Vec<bf16>, Vec<f16>) = all.iter().map(|b| (bf16::from_bits(*b), f16::from_bits(*b))).unzip();
        let (mut wide, mut wider) = (vec![0f32; all.len()], vec![0f64; all.len()]);
        convert(&b, &mut wide);
        assert!(wide.iter().zip(&b).all(|(w, b)| w.to_bits() == b.to_f32().to_bits() || w.is_nan() && b.is_nan()));
        convert(&b, &mut wider);
        assert!(wider.iter().zip(&b).all(|(w, b)| *w == b.to_f64() || w.is_nan() && b.is_nan()));
        convert(&f, &mut wide);
        assert!(wide.iter().zip(&f).all(|(w, f)| *w == f.to_f32() || w.is_nan() && f.is_nan()));
        // and from one kind of half to the other
        let mut back = vec![f16::ZERO; all.len()];
        convert(&b, &mut back);
        assert!(back.iter().zip(&b).all(|(y, b)| *y == f16::from_f32(b.to_f32()) || y.is_nan() && b.is_nan()));
    }
}
