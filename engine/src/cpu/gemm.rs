//! The big matrix product, in the manner of Goto and van de Geijn (2008): B is packed once into panels of 16 columns that all tasks share; each task
//! takes a block of rows, packs them in panels of `MR` rows, and runs the register kernel over cache-sized pieces of k.
//!
//! Products that are too small to be worth packing go to matrixmultiply.

use super::Scratch;
use super::simd::{Level, Real, level};
use super::tile::Tile;
use crate::vectorized;
use rayon::prelude::*;
use std::any::TypeId;

/// Columns of a panel: two AVX2 vectors or one AVX-512 vector of f32.
const NR: usize = 16;
/// Depth of a piece: a panel of B (256 × 16 f32) is 16 KiB, half of the first cache.
const KC: usize = 256;
/// Elements of B that one thread packs sooner than two would wake up for it.
const PACK_ALONE: usize = 32 * 1024;
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
    let packed = pack_columns(n, k, b, sb);
    // AVX-512 has twice the registers: twelve rows hide the latency of its multiply-add
    if level() == Level::Avx512 {
        by_rows([(); 12], m, n, k, alpha, a, sa, &packed, beta, c, rsc)
    } else {
        by_rows([(); 6], m, n, k, alpha, a, sa, &packed, beta, c, rsc)
    }
}

/// B as panels of NR columns, `[panel][k][NR]`, zero beyond column n.
fn pack_columns<F: Real>(n: usize, k: usize, b: &[F], sb: (usize, usize)) -> Scratch<F> {
    let mut packed = super::scratch::<F>(n.div_ceil(NR) * k * NR);
    let panel = |(j, p): (usize, &mut [F])| pack([(); NR], k, NR.min(n - j * NR), &b[j * NR * sb.1..], sb.0, sb.1, p);
    if packed.len() <= PACK_ALONE {
        packed.chunks_mut(k * NR).enumerate().for_each(panel);
    } else {
        packed.par_chunks_mut(k * NR).enumerate().for_each(panel);
    }
    packed
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
        // dense rows of A are read where they lie; columns would each be a cache line away from the next, so they are packed
        let mut pa = super::scratch::<F>(if sa.1 == 1 { 0 } else { m.next_multiple_of(MR) * KC });
        for p in (0..k).step_by(KC) {
            let kc = KC.min(k - p);
            let beta = if p == 0 { beta } else { F::ONE };
            if sa.1 == 1 {
                block(mr, m, n, kc, &a[p..], sa.0, sa.0 * MR, 1, &b[p * NR..], k * NR, alpha, beta, c, rsc);
            } else {
                for (i, panel) in pa[..m.next_multiple_of(MR) * kc].chunks_mut(MR * kc).enumerate() {
                    pack(mr, kc, MR.min(m - i * MR), &a[i * MR * sa.0 + p * sa.1..], sa.1, sa.0, panel);
                }
                block(mr, m, n, kc, &pa, 1, MR * kc, MR, &b[p * NR..], k * NR, alpha, beta, c, rsc);
            }
        }
    });
}

vectorized! {
    /// `out[p][i] = x[p·sp + i·si]` for i < len, zero up to W.
    fn pack[F: Real, const W: usize](_width: [(); W], k: usize, len: usize, x: &[F], sp: usize, si: usize, out: &mut [F]) {
        let (out, _) = out[..k * W].as_chunks_mut::<W>();
        if si == 1 && len == W {
            for (p, o) in out.iter_mut().enumerate() { o.copy_from_slice(&x[p * sp..p * sp + W]) }
        } else if si == 1 {
            for (p, o) in out.iter_mut().enumerate() {
                o[..len].copy_from_slice(&x[p * sp..p * sp + len]);
                o[len..].fill(F::ZERO);
            }
        } else {
            if len < W { out.fill([F::ZERO; W]) }
            for i in 0..len {
                let col = &x[i * si..];
                for (p, o) in out.iter_mut().enumerate() { o[i] = col[p * sp] }
            }
        }
    }

    /// One piece of k: rows of A from panels of MR rows `panel` apart, with strides `ra` (row) and `ca` (depth) inside; panels of B `pb` apart.
    fn block[F: Real, const MR: usize](_mr: [(); MR], m: usize, n: usize, k: usize, a: &[F], ra: usize, panel: usize, ca: usize, b: &[F], pb: usize, alpha: F, beta: F, c: &mut [F], rsc: usize) {
        let mut edge = [[F::ZERO; NR]; MR];
        for j in (0..n).step_by(NR) {
            let b = &b[j / NR * pb..][..k * NR];
            for i in (0..m).step_by(MR) {
                let (a, rows, cols) = (&a[i / MR * panel..], MR.min(m - i), NR.min(n - j));
                assert!((rows - 1) * ra + (k - 1) * ca < a.len() && (i + rows - 1) * rsc + j + cols <= c.len());
                let mut t = Tile { k, a: a.as_ptr(), rsa: ra, csa: ca, rsb: NR, alpha, beta, rsc };
                // SAFETY: asserted above; B's panel has k rows of NR; a ragged panel is computed beside C, where NR columns have room.
                unsafe {
                    if cols == NR {
                        t.panel::<MR, NR>(rows, b.as_ptr(), c.as_mut_ptr().add(i * rsc + j));
                    } else {
                        (t.beta, t.rsc) = (F::ZERO, NR);
                        t.panel::<MR, NR>(rows, b.as_ptr(), edge.as_mut_ptr().cast());
                        for (r, e) in edge.iter().enumerate().take(rows) {
                            for (y, x) in c[(i + r) * rsc + j..][..cols].iter_mut().zip(e) {
                                *y = if beta == F::ZERO { *x } else { beta.mul_add(*y, *x) };
                            }
                        }
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
