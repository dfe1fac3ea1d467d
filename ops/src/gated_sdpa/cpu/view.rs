//! Strided reads of any float dtype, disjoint parallel writes, and the small tile helpers that both passes share.

use engine::{cpu::simd::Real, vectorized};
use std::marker::PhantomData;

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

impl View<'_> {
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

/// An output that parallel tasks write disjoint rows of.
pub struct Rows<'a, F> {
    at: *mut F,
    len: usize,
    _of: PhantomData<&'a mut [F]>,
}

// SAFETY: a `Rows` only hands out rows through the unsafe `row`, whose caller promises that no two tasks ask for overlapping ones.
unsafe impl<F: Send> Send for Rows<'_, F> {}
// SAFETY: as above.
unsafe impl<F: Send> Sync for Rows<'_, F> {}

impl<'a, F> Rows<'a, F> {
    /// Borrows the whole output.
    pub fn new(x: &'a mut [F]) -> Self {
        Rows { at: x.as_mut_ptr(), len: x.len(), _of: PhantomData }
    }

    /// The elements `at .. at + n`.
    ///
    /// # Safety
    /// No other live row may overlap it.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn row(&self, at: usize, n: usize) -> &mut [F] {
        assert!(at + n <= self.len, "row {at}..{} outside an output of {} elements", at + n, self.len);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at.add(at), n) }
    }
}

/// Rounds up to a multiple of 16, a full vector row at every level.
pub fn pad16(n: usize) -> usize {
    n.div_ceil(16) * 16
}

vectorized! {
    /// `y[c, r] = x[r, c]` for `x [rows, cols]` with row stride `cols`, `y` with row stride `ld`.
    pub fn transpose[F: Real](rows: usize, cols: usize, x: &[F], y: &mut [F], ld: usize) {
        let (r8, c8) = (rows / 8 * 8, cols / 8 * 8);
        for r in (0..r8).step_by(8) {
            for c in (0..c8).step_by(8) {
                let mut block = [[F::ZERO; 8]; 8];
                for (i, b) in block.iter_mut().enumerate() {
                    b.copy_from_slice(&x[(r + i) * cols + c..][..8]);
                }
                for j in 0..8 {
                    let out = &mut y[(c + j) * ld + r..][..8];
                    for i in 0..8 {
                        out[i] = block[i][j];
                    }
                }
            }
        }
        for r in 0..rows {
            for c in if r < r8 { c8 } else { 0 }..cols {
                y[c * ld + r] = x[r * cols + c];
            }
        }
    }
}
