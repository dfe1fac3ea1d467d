//! The big matrix product, in the manner of Goto and van de Geijn (2008): B is packed once into panels of 16 columns that all tasks share; each task
//! takes a block of rows, packs them in panels of `MR` rows, and runs the register kernel over cache-sized pieces of k.
//!
//! Products that are too small to be worth packing go to matrixmultiply.

use super::simd::{Level, Real, level};
use crate::vectorized;
use rayon::prelude::*;
use std::any::TypeId;

/// Columns of a panel: two AVX2 vectors or one AVX-512 vector of f32.
const NR: usize = 16;
/// Depth of a piece: a panel of B (256 × 16 f32) is 16 KiB, half of the first cache.
const KC: usize = 256;
/// Multiply-adds below which packing does not pay.
const SMALL: usize = 32 * 32 * 32;

/// `C = beta·C + alpha·A·B` for `A [m,k]` with strides `sa = (row, column)`, `B [k,n]` with strides `sb`, `C [m,n]` with dense rows `rsc` apart.
///
/// With `beta` zero, C is written without being read. Panics when a slice is too short for its shape. The result does not depend on the number of
/// threads: k is never divided between tasks.
pub fn gemm<F: Real>(
    m: usize,
    n: usize,
    k: usize,
    alpha: F,
    a: &[F],
    sa: (usize, usize),
    b: &[F],
    sb: (usize, usize),
    beta: F,
    c: &mut [F],
    rsc: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    assert!(rsc >= n && c.len() >= (m - 1) * rsc + n, "C is too short");
    if k == 0 {
        for row in c.chunks_mut(rsc).take(m) {
            row[..n].iter_mut().for_each(|x| *x = if beta == F::ZERO { F::ZERO } else { *x * beta });
        }
        return;
    }
    assert!(a.len() > (m - 1) * sa.0 + (k - 1) * sa.1, "A is too short");
    assert!(b.len() > (k - 1) * sb.0 + (n - 1) * sb.1, "B is too short");
    let c = &mut c[..(m - 1) * rsc + n];
    if m < 12 || n < NR || m * n * k <= SMALL {
        return small(m, n, k, alpha, a, sa, b, sb, beta, c, rsc);
    }
    let panels = n.div_ceil(NR);
    let mut packed = super::scratch::<F>(panels * k * NR);
    packed.par_chunks_mut(k * NR).enumerate().for_each(|(j, p)| pack(k, NR, NR.min(n - j * NR), &b[j * NR * sb.1..], sb.0, sb.1, p));
    // AVX-512 has twice the registers: twelve rows hide the latency of its multiply-add
    if level() == Level::Avx512 {
        by_rows([(); 12], m, n, k, alpha, a, sa, &packed, beta, c, rsc)
    } else {
        by_rows([(); 6], m, n, k, alpha, a, sa, &packed, beta, c, rsc)
    }
}

fn by_rows<F: Real, const MR: usize>(
    mr: [(); MR],
    m: usize,
    n: usize,
    k: usize,
    alpha: F,
    a: &[F],
    sa: (usize, usize),
    b: &[F],
    beta: F,
    c: &mut [F],
    rsc: usize,
) {
    // at least eight tasks where there are rows for them, at most 96 rows a task: 96 × 256 f32 are 96 KiB of the second cache
    let rows = m.div_ceil(8).next_multiple_of(12).min(96);
    c.par_chunks_mut(rows * rsc).enumerate().for_each(|(t, c)| {
        let m = rows.min(m - t * rows);
        let a = &a[t * rows * sa.0..];
        let mut pa = super::scratch::<F>(m.next_multiple_of(MR) * KC);
        for p in (0..k).step_by(KC) {
            let kc = KC.min(k - p);
            for (i, panel) in pa[..m.next_multiple_of(MR) * kc].chunks_mut(MR * kc).enumerate() {
                pack(kc, MR, MR.min(m - i * MR), &a[i * MR * sa.0 + p * sa.1..], sa.1, sa.0, panel);
            }
            block(mr, m, n, k, p, kc, alpha, &pa, b, if p == 0 { beta } else { F::ONE }, c, rsc);
        }
    });
}

vectorized! {
    /// `out[p][i] = x[p·sp + i·si]` for i < len, zero up to `width`.
    fn pack[F: Real](k: usize, width: usize, len: usize, x: &[F], sp: usize, si: usize, out: &mut [F]) {
        if si == 1 {
            for (p, o) in out.chunks_mut(width).take(k).enumerate() {
                o[..len].copy_from_slice(&x[p * sp..p * sp + len]);
                o[len..].fill(F::ZERO);
            }
        } else {
            if len < width { out.fill(F::ZERO) }
            for i in 0..len {
                let col = &x[i * si..];
                for (p, o) in out.chunks_mut(width).take(k).enumerate() { o[i] = col[p * sp] }
            }
        }
    }

    fn block[F: Real, const MR: usize](_mr: [(); MR], m: usize, n: usize, k: usize, p: usize, kc: usize, alpha: F, a: &[F], b: &[F], beta: F, c: &mut [F], rsc: usize) {
        for j in (0..n).step_by(NR) {
            let pb = &b[j / NR * k * NR + p * NR..][..kc * NR];
            let cols = NR.min(n - j);
            for i in (0..m).step_by(MR) {
                let pa = &a[i * kc..][..kc * MR];
                let mut acc = [[F::ZERO; NR]; MR];
                let (pa, _) = pa.as_chunks::<MR>();
                let (pb, _) = pb.as_chunks::<NR>();
                for (x, row) in pa.iter().zip(pb) {
                    for r in 0..MR {
                        for q in 0..NR { acc[r][q] = x[r].mul_add(row[q], acc[r][q]) }
                    }
                }
                for (r, acc) in acc.iter().enumerate().take(MR.min(m - i)) {
                    let out = &mut c[(i + r) * rsc + j..][..cols];
                    if beta == F::ZERO {
                        for (y, x) in out.iter_mut().zip(acc) { *y = alpha * *x }
                    } else {
                        for (y, x) in out.iter_mut().zip(acc) { *y = beta.mul_add(*y, alpha * *x) }
                    }
                }
            }
        }
    }
}

fn small<F: Real>(
    m: usize,
    n: usize,
    k: usize,
    alpha: F,
    a: &[F],
    sa: (usize, usize),
    b: &[F],
    sb: (usize, usize),
    beta: F,
    c: &mut [F],
    rsc: usize,
) {
    let (ra, ca, rb, cb, rc) = (sa.0 as isize, sa.1 as isize, sb.0 as isize, sb.1 as isize, rsc as isize);
    let (x, y) = (alpha.to_f64(), beta.to_f64());
    // SAFETY: the caller checked that the slices hold the shapes; `F` is the type that its TypeId says.
    unsafe {
        if TypeId::of::<F>() == TypeId::of::<f32>() {
            matrixmultiply::sgemm(m, k, n, x as f32, a.as_ptr().cast(), ra, ca, b.as_ptr().cast(), rb, cb, y as f32, c.as_mut_ptr().cast(), rc, 1);
        } else {
            assert_eq!(TypeId::of::<F>(), TypeId::of::<f64>());
            matrixmultiply::dgemm(m, k, n, x, a.as_ptr().cast(), ra, ca, b.as_ptr().cast(), rb, cb, y, c.as_mut_ptr().cast(), rc, 1);
        }
    }
}
