//! A product of few rows with a matrix that lies column by column, as a decoded token's with a weight `[out, in]`: it reads the matrix once, and packing it
//! would cost more than the product.

use super::simd::{Real, fold};
use crate::vectorized;
use half::bf16;
use rayon::prelude::*;

/// An element of the matrix, which becomes an F as it is read.
pub trait Narrow<F>: Copy + Sync {
    /// The same number.
    fn widen(self) -> F;
}
impl<F: Real> Narrow<F> for F {
    #[inline(always)]
    fn widen(self) -> F {
        self
    }
}
impl<F: Real> Narrow<F> for bf16 {
    #[inline(always)]
    fn widen(self) -> F {
        F::from_f64(f64::from(f32::from_bits(u32::from(self.to_bits()) << 16)))
    }
}

/// Rows up to which this is taken. On two cores of a Zen 4, matrices of 256 x 256 to 1024 x 1024: one row takes 0.09 to 0.17 of the packed product's time,
/// eight 0.39 to 0.68.
pub(super) const ROWS: usize = 8;
/// Elements of the matrix that one thread is done with before two are awake.
const ALONE: usize = 1 << 16;

/// `C[i, j] = beta·C[i, j] + alpha·<A[i], B[j]>` for rows of length `k`: `A` and `C` have `m` rows, `lda` and `rsc` apart, `B` has `n`, `ldb` apart.
///
/// The result does not depend on the number of threads.
#[allow(clippy::too_many_arguments)]
pub(super) fn thin<F: Real, S: Narrow<F>>(
    m: usize,
    n: usize,
    k: usize,
    alpha: F,
    a: &[F],
    lda: usize,
    b: &[S],
    ldb: usize,
    beta: F,
    c: &mut [F],
    rsc: usize,
) {
    let c = super::gemm::C::of(c);
    let piece = if n * k <= ALONE { n } else { n.div_ceil(rayon::current_num_threads()).next_multiple_of(4) };
    let block = |j: usize| {
        let width = piece.min(n - j);
        rows(m, k, a, lda, &b[j * ldb..], ldb, width, |i, at, x: [F; 4], len| {
            // SAFETY: `gemm` asserted that C holds the shape; blocks of columns are apart.
            let c = unsafe { std::slice::from_raw_parts_mut(c.at(i * rsc + j + at), len) };
            for (c, x) in c.iter_mut().zip(x) {
                *c = if beta == F::ZERO { alpha * x } else { beta.mul_add(*c, alpha * x) };
            }
        });
    };
    if piece == n { block(0) } else { (0..n).into_par_iter().step_by(piece).for_each(block) }
}

vectorized! {
    /// Gives `put` the products of row i with rows `at .. at + len` of B, four at a time.
    fn rows[F: Real, S: Narrow<F>, P: FnMut(usize, usize, [F; 4], usize)](m: usize, k: usize, a: &[F], lda: usize, b: &[S], ldb: usize, n: usize, put: P) {
        let mut put = put;
        for j in (0..n / 4 * 4).step_by(4) {
            let b = [0, 1, 2, 3].map(|r| &b[(j + r) * ldb..][..k]);

            for i in 0..m {
                put(i, j, { let a = &a[i * lda..][..k]; [wide(a, b[0]), wide(a, b[1]), wide(a, b[2]), wide(a, b[3])] }, 4);
            }
        }
        for j in n / 4 * 4..n {
            for i in 0..m {
                put(i, j, [wide(&a[i * lda..][..k], &b[j * ldb..][..k]), F::ZERO, F::ZERO, F::ZERO], 1);
            }
        }
    }
}

/// The inner product in four chains of sixteen lanes, read straight on.
#[inline(always)]
fn wide<F: Real, S: Narrow<F>>(a: &[F], b: &[S]) -> F {
    let [mut l0, mut l1, mut l2, mut l3] = [[F::ZERO; 16]; 4];
    let ((a64, at), (b64, bt)) = (a.as_chunks::<64>(), b.as_chunks::<64>());
    for (a, b) in a64.iter().zip(b64) {
        for i in 0..16 {
            l0[i] = a[i].mul_add(b[i].widen(), l0[i]);
        }
        for i in 0..16 {
            l1[i] = a[16 + i].mul_add(b[16 + i].widen(), l1[i]);
        }
        for i in 0..16 {
            l2[i] = a[32 + i].mul_add(b[32 + i].widen(), l2[i]);
        }
        for i in 0..16 {
            l3[i] = a[48 + i].mul_add(b[48 + i].widen(), l3[i]);
        }
    }
    for i in 0..16 {
        l0[i] = (l0[i] + l1[i]) + (l2[i] + l3[i]);
    }
    if !at.is_empty() {
        let ((a16, at), (b16, bt)) = (at.as_chunks::<16>(), bt.as_chunks::<16>());
        for (a, b) in a16.iter().zip(b16) {
            for i in 0..16 {
                l0[i] = a[i].mul_add(b[i].widen(), l0[i]);
            }
        }
        let mut tail = F::ZERO;
        for (a, b) in at.iter().zip(bt) {
            tail = a.mul_add(b.widen(), tail);
        }
        l0[0] += tail;
    }
    fold(l0, |a, b| a + b)
}
