//! The big matrix product: matrixmultiply on blocks of rows in parallel.

use super::simd::Real;
use rayon::prelude::*;
use std::any::TypeId;

/// Rows per task. A task packs B anew, which costs 1/ROWS of its arithmetic; the number is fixed so that the split depends on shapes alone.
const ROWS: usize = 128;
/// Multiply-adds below which the product runs inline.
const SMALL: usize = 64 * 64 * 64;

/// `C = beta·C + alpha·A·B` for `A [m,k]` with strides `sa = (row, column)`, `B [k,n]` with strides `sb`, `C [m,n]` with dense rows `rsc` apart.
///
/// With `beta` zero, C is written without being read. Panics when a slice is too short for its shape.
#[allow(clippy::too_many_arguments)]
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
    if m <= ROWS || m * n * k <= SMALL {
        return block(m, n, k, alpha, a, sa, b, sb, beta, c, rsc);
    }
    c.par_chunks_mut(ROWS * rsc).enumerate().for_each(|(i, c)| {
        let rows = ROWS.min(m - i * ROWS);
        block(rows, n, k, alpha, &a[i * ROWS * sa.0..], sa, b, sb, beta, c, rsc);
    });
}

#[allow(clippy::too_many_arguments)]
fn block<F: Real>(
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
