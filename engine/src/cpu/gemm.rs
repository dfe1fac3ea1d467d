//! The big matrix product.

use super::simd::Real;

/// `C = beta·C + alpha·A·B`, any strides for A and B, dense rows of stride `rsc` for C.
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
    for i in 0..m {
        let row = &mut c[i * rsc..i * rsc + n];
        if beta == F::ZERO {
            row.fill(F::ZERO)
        } else {
            row.iter_mut().for_each(|x| *x *= beta)
        }
        for p in 0..k {
            let x = alpha * a[i * sa.0 + p * sa.1];
            for (j, y) in row.iter_mut().enumerate() {
                *y = x.mul_add(b[p * sb.0 + j * sb.1], *y);
            }
        }
    }
}
