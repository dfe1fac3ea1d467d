//! The tile product with its accumulators in registers, for tiles that lie in cache.

use engine::{cpu::simd::Real, vectorized};

vectorized! {
    /// `C = A·B`, or `C += A·B` if `add`, for `A [m,k]` (strides `rsa`, `csa`), `B [k,n]` (row stride `rsb`), `C [m,n]` (row stride `rsc`).
    ///
    /// Panics when a slice is too short for its shape.
    #[allow(clippy::too_many_arguments)]
    pub fn gemm[F: Real](m: usize, n: usize, k: usize, a: &[F], rsa: usize, csa: usize, b: &[F], rsb: usize, add: bool, c: &mut [F], rsc: usize) {
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            if !add {
                (0..m).for_each(|i| c[i * rsc..i * rsc + n].fill(F::ZERO));
            }
            return;
        }
        assert!((m - 1) * rsa + (k - 1) * csa < a.len() && (k - 1) * rsb + n <= b.len() && (m - 1) * rsc + n <= c.len(), "a tile is too short");
        let t = Tile { k, a: a.as_ptr(), rsa, csa, rsb, add, rsc };
        // a panel of B's columns stays in the first cache while all rows of A pass by
        let (b, c) = (b.as_ptr(), c.as_mut_ptr());
        let mut j = 0;
        // SAFETY: the assertion above keeps every row of a panel `j .. j + width <= n` in bounds.
        unsafe {
            while j + 16 <= n {
                t.panel::<16>(m, b.add(j), c.add(j));
                j += 16;
            }
            while j + 8 <= n {
                t.panel::<8>(m, b.add(j), c.add(j));
                j += 8;
            }
            while j < n {
                t.panel::<1>(m, b.add(j), c.add(j));
                j += 1;
            }
        }
    }
}

struct Tile<F> {
    k: usize,
    a: *const F,
    rsa: usize,
    csa: usize,
    rsb: usize,
    add: bool,
    rsc: usize,
}

impl<F: Real> Tile<F> {
    /// All m rows of a panel of N columns.
    #[inline(always)]
    unsafe fn panel<const N: usize>(&self, m: usize, b: *const F, c: *mut F) {
        let mut i = 0;
        // SAFETY: rows `i .. i + M <= m`; the rest is the caller's promise.
        unsafe {
            while i + 6 <= m {
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

    /// M rows from row i on. Six rows of sixteen f32 fill twelve of AVX2's sixteen registers and leave room for B's row and A's element.
    #[inline(always)]
    unsafe fn micro<const M: usize, const N: usize>(&self, i: usize, b: *const F, c: *mut F) {
        let mut acc = [[F::ZERO; N]; M];
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
                    *y = if self.add { *y + *x } else { *x };
                }
            }
        }
    }
}
