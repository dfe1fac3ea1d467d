//! A matrix product for tiles that already lie in cache: accumulators in registers, no packing, no threads. Fused kernels are built from it.

use super::simd::{Level, Real, level};
use crate::vectorized;

/// `C = beta·C + alpha·A·B` for `A [m,k]` (strides `rsa`, `csa`), `B [k,n]` (row stride `rsb`), `C [m,n]` (row stride `rsc`).
///
/// Panics when a slice is too short for its shape.
pub fn gemm<F: Real>(m: usize, n: usize, k: usize, alpha: F, a: &[F], rsa: usize, csa: usize, b: &[F], rsb: usize, beta: F, c: &mut [F], rsc: usize) {
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        for i in 0..m {
            c[i * rsc..i * rsc + n].iter_mut().for_each(|x| *x = if beta == F::ZERO { F::ZERO } else { *x * beta });
        }
        return;
    }
    assert!((m - 1) * rsa + (k - 1) * csa < a.len() && (k - 1) * rsb + n <= b.len() && (m - 1) * rsc + n <= c.len(), "a tile is too short");
    let t = Tile { k, a: a.as_ptr(), rsa, csa, rsb, alpha, beta, rsc };
    if level() == Level::Avx512 { columns([(); 12], t, m, n, b, c) } else { columns([(); 6], t, m, n, b, c) }
}

vectorized! {
    /// A panel of B's columns stays in the first cache while all rows of A pass by.
    fn columns[F: Real, const R: usize](_rows: [(); R], t: Tile<F>, m: usize, n: usize, b: &[F], c: &mut [F]) {
        let (b, c) = (b.as_ptr(), c.as_mut_ptr());
        let mut j = 0;
        // SAFETY: `gemm` checked that every row of a panel `j .. j + width <= n` is in bounds.
        unsafe {
            while j + 16 <= n {
                t.panel::<R, 16>(m, b.add(j), c.add(j));
                j += 16;
            }
            while j + 8 <= n {
                t.panel::<6, 8>(m, b.add(j), c.add(j));
                j += 8;
            }
            while j < n {
                t.panel::<6, 1>(m, b.add(j), c.add(j));
                j += 1;
            }
        }
    }
}

vectorized! {
    /// `y[c, r] = x[r, c]` for `x [rows, cols]` with row stride `ldx`, `y` with row stride `ldy`.
    ///
    /// Panics when a slice is too short for its shape.
    pub fn transpose[F: Real](rows: usize, cols: usize, x: &[F], ldx: usize, y: &mut [F], ldy: usize) {
        if rows == 0 || cols == 0 { return }
        assert!((rows - 1) * ldx + cols <= x.len() && (cols - 1) * ldy + rows <= y.len(), "a tile is too short");
        let whole = [rows / 4 * 4, cols / 4 * 4];
        for i in (0..whole[0]).step_by(4) {
            for j in (0..whole[1]).step_by(4) {
                // SAFETY: rows i .. i + 4 and columns j .. j + 4 lie inside x, and turned inside y, by the assertion.
                unsafe { square(x.as_ptr().add(i * ldx + j), ldx, y.as_mut_ptr().add(j * ldy + i), ldy) }
            }
        }
        for i in 0..rows {
            let from = if i < whole[0] { whole[1] } else { 0 };
            for j in from..cols { y[j * ldy + i] = x[i * ldx + j] }
        }
    }
}

/// Four by four. LLVM leaves this scalar, which takes four times as long as the shuffles that every x86-64 has.
///
/// # Safety
/// Four elements can be read from each of four rows of `x`, and written to each of four rows of `y`.
#[inline(always)]
unsafe fn square<F: Real>(x: *const F, ldx: usize, y: *mut F, ldy: usize) {
    #[cfg(target_arch = "x86_64")]
    if F::DTYPE == crate::DType::F32 {
        use std::arch::x86_64::*;
        let (x, y) = (x.cast::<f32>(), y.cast::<f32>());
        // SAFETY: the caller's promise; F is f32; SSE is part of x86-64.
        unsafe {
            let [a, b, c, d] = [0, 1, 2, 3].map(|r| _mm_loadu_ps(x.add(r * ldx)));
            let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
            _mm_storeu_ps(y, _mm_movelh_ps(ab, cd));
            _mm_storeu_ps(y.add(ldy), _mm_movehl_ps(cd, ab));
            let (ab, cd) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
            _mm_storeu_ps(y.add(2 * ldy), _mm_movelh_ps(ab, cd));
            _mm_storeu_ps(y.add(3 * ldy), _mm_movehl_ps(cd, ab));
        }
        return;
    }
    for r in 0..4 {
        for c in 0..4 {
            // SAFETY: the caller's promise.
            unsafe { *y.add(c * ldy + r) = *x.add(r * ldx + c) }
        }
    }
}

/// What stays the same over a tile: A, its strides, and how C is written.
pub(super) struct Tile<F> {
    pub k: usize,
    pub a: *const F,
    pub rsa: usize,
    pub csa: usize,
    pub rsb: usize,
    pub alpha: F,
    pub beta: F,
    pub rsc: usize,
}

impl<F: Real> Tile<F> {
    /// All m rows of a panel of N columns, R rows at a time.
    ///
    /// # Safety
    /// For every row `i < m` and depth `p < k`: A's element at `i·rsa + p·csa`, N elements of B from `p·rsb` and of C from `i·rsc` on can be accessed.
    #[inline(always)]
    pub unsafe fn panel<const R: usize, const N: usize>(&self, m: usize, b: *const F, c: *mut F) {
        let mut i = 0;
        // SAFETY: rows `i .. i + R <= m`; the rest is the caller's promise.
        unsafe {
            while i + R <= m {
                self.micro::<R, N>(i, b, c);
                i += R;
            }
            if R > 6 && m - i >= 6 {
                self.micro::<6, N>(i, b, c);
                i += 6;
            }
            match m - i {
                5 => self.micro::<5, N>(i, b, c),
                4 => self.micro::<4, N>(i, b, c),
                3 => self.micro::<3, N>(i, b, c),
                2 => self.micro::<2, N>(i, b, c),
                1 => self.micro::<1, N>(i, b, c),
                _ => {}
            }
        }
    }

    /// R rows from row i on. Six rows of sixteen f32 fill twelve of AVX2's sixteen registers and leave room for B's row and A's element; AVX-512 has
    /// twice the registers, each twice as wide, and takes twelve rows.
    #[inline(always)]
    unsafe fn micro<const R: usize, const N: usize>(&self, i: usize, b: *const F, c: *mut F) {
        let mut acc = [[F::ZERO; N]; R];
        // SAFETY: the caller checked that the rows of A and C and the rows of B lie in their slices.
        unsafe {
            let a = self.a.add(i * self.rsa);
            for p in 0..self.k {
                let row = *b.add(p * self.rsb).cast::<[F; N]>();
                for (r, acc) in acc.iter_mut().enumerate() {
                    let x = *a.add(r * self.rsa + p * self.csa);
                    for (y, b) in acc.iter_mut().zip(&row) {
                        *y = x.mul_add(*b, *y);
                    }
                }
            }
            for (r, acc) in acc.iter().enumerate() {
                let row = &mut *c.add((i + r) * self.rsc).cast::<[F; N]>();
                for (y, x) in row.iter_mut().zip(acc) {
                    *y = if self.beta == F::ZERO { self.alpha * *x } else { self.beta.mul_add(*y, self.alpha * *x) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;

    #[test]
    fn transposes() {
        for (rows, cols) in [(1, 1), (4, 8), (7, 5), (64, 13)] {
            let (x, mut y) = (rng::normal(1, 0, rows * (cols + 3)), vec![0.0; cols * (rows + 2)]);
            transpose(rows, cols, &x, cols + 3, &mut y, rows + 2);
            (0..rows).for_each(|r| (0..cols).for_each(|c| assert_eq!(y[c * (rows + 2) + r], x[r * (cols + 3) + c])));
            let (x, mut y): (Vec<f32>, _) = (x.iter().map(|x| *x as f32).collect(), vec![0.0; y.len()]);
            transpose(rows, cols, &x, cols + 3, &mut y, rows + 2);
            (0..rows).for_each(|r| (0..cols).for_each(|c| assert_eq!(y[c * (rows + 2) + r], x[r * (cols + 3) + c])));
        }
    }

    #[test]
    fn every_ragged_size_matches_a_plain_loop() {
        for m in [1, 2, 5, 6, 7, 13, 64] {
            for n in [1, 3, 8, 15, 16, 17, 31, 64] {
                for k in [0, 1, 2, 9, 64] {
                    for (alpha, beta) in [(1.0, 0.0), (1.0, 1.0), (-0.5, 2.0)] {
                        for transposed in [false, true] {
                            let (a, b, c) = (rng::normal(1, 0, m * k), rng::normal(1, 1, k * (n + 3)), rng::normal(1, 2, m * (n + 2)));
                            let (rsa, csa) = if transposed { (1, m) } else { (k, 1) };
                            let mut got = c.clone();
                            gemm(m, n, k, alpha, &a, rsa, csa, &b, n + 3, beta, &mut got, n + 2);
                            for (i, (got, old)) in got.iter().zip(&c).enumerate() {
                                let (r, j) = (i / (n + 2), i % (n + 2));
                                let sum: f64 = (0..k).map(|p| if j < n { a[r * rsa + p * csa] * b[p * (n + 3) + j] } else { 0.0 }).sum();
                                let want = if j < n { alpha * sum + beta * old } else { *old };
                                assert!((got - want).abs() < 1e-12, "{m} {n} {k}");
                            }
                        }
                    }
                }
            }
        }
    }
}
