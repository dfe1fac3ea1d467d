//! Strided reads of any float dtype.

use engine::{
    DType,
    cpu::{convert, simd::Real},
};

/// The elements of an input, starting at its view's offset.
#[derive(Clone, Copy, Debug)]
pub enum Data<'a> {
    /// f32
    F32(&'a [f32]),
    /// f64
    F64(&'a [f64]),
    /// bf16, widened when read
    Bf16(&'a [half::bf16]),
    /// f16, widened when read
    F16(&'a [half::f16]),
}

/// A `[B, T, H, D]` (or `[B, T, H]`, D = 1) input whose last dimension is dense; the other three have any strides.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The elements.
    pub data: Data<'a>,
    /// Strides of batch, time and head, in elements.
    pub strides: [usize; 3],
}

impl<'a> View<'a> {
    /// The elements from `[b, t, h]` on where they lie, if they are of type F.
    pub fn there<F: Real>(&self, [b, t, h]: [usize; 3]) -> Option<&'a [F]> {
        let at = b * self.strides[0] + t * self.strides[1] + h * self.strides[2];
        let all: &'a [F] = match self.data {
            // SAFETY: a slice of F, as its DTYPE says.
            Data::F32(x) if F::DTYPE == DType::F32 => unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), x.len()) },
            // SAFETY: as above.
            Data::F64(x) if F::DTYPE == DType::F64 => unsafe { std::slice::from_raw_parts(x.as_ptr().cast(), x.len()) },
            _ => return None,
        };
        Some(&all[at..])
    }

    /// Rows `[b, t .. t + n, h, ..d]`, where they lie if they are of type F, else in `buf`, and how far they are apart.
    pub fn rows<'b, F: Real>(&self, b: usize, t: usize, n: usize, h: usize, d: usize, buf: &'b mut [F]) -> (&'b [F], usize)
    where
        'a: 'b,
    {
        if let Some(x) = self.there([b, t, h]) {
            return (x, self.strides[1]);
        }
        for (i, row) in buf.chunks_exact_mut(d).take(n).enumerate() {
            let at = b * self.strides[0] + (t + i) * self.strides[1] + h * self.strides[2];
            match self.data {
                Data::F32(x) => convert(&x[at..at + d], row),
                Data::F64(x) => convert(&x[at..at + d], row),
                Data::Bf16(x) => convert(&x[at..at + d], row),
                Data::F16(x) => convert(&x[at..at + d], row),
            }
        }
        (buf, d)
    }
    /// `out = scale · x[b, t, h, ..out.len()]`.
    #[inline]
    pub fn row<F: Real>(&self, [b, t, h]: [usize; 3], scale: F, out: &mut [F]) {
        let at = b * self.strides[0] + t * self.strides[1] + h * self.strides[2];
        let n = out.len();
        match self.data {
            Data::F32(x) => out.iter_mut().zip(&x[at..at + n]).for_each(|(y, x)| *y = scale * F::from_f64(*x as f64)),
            Data::F64(x) => out.iter_mut().zip(&x[at..at + n]).for_each(|(y, x)| *y = scale * F::from_f64(*x)),
            Data::Bf16(x) => {
                out.iter_mut().zip(&x[at..at + n]).for_each(|(y, x)| *y = scale * F::from_f64(f32::from_bits((x.to_bits() as u32) << 16) as f64))
            }
            Data::F16(x) => out.iter_mut().zip(&x[at..at + n]).for_each(|(y, x)| *y = scale * F::from_f64(x.to_f32() as f64)),
        }
    }
}

/// Rounds up to a multiple of 16, a full vector row at every level.
pub fn pad16(n: usize) -> usize {
    n.div_ceil(16) * 16
}
