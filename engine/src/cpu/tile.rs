//! A matrix product for tiles that already lie in cache: no packing, no threads. Fused kernels are built from it.

use super::simd::Real;

/// `C = beta·C + alpha·A·B` for `A [m,k]` (strides `rsa`, `csa`), `B [k,n]` (row stride `rsb`, columns dense), `C [m,n]` (row stride `rsc`, columns dense).
///
/// With `beta` zero, C is written without being read. Panics when a slice is too short for its shape.
#[allow(clippy::too_many_arguments)]
pub fn gemm<F: Real>(m: usize, n: usize, k: usize, alpha: F, a: &[F], rsa: usize, csa: usize, b: &[F], rsb: usize, beta: F, c: &mut [F], rsc: usize) {
    for i in 0..m {
        let row = &mut c[i * rsc..i * rsc + n];
        if beta == F::ZERO {
            row.fill(F::ZERO)
        } else {
            row.iter_mut().for_each(|x| *x *= beta)
        }
        for p in 0..k {
            let x = alpha * a[i * rsa + p * csa];
            for (y, b) in row.iter_mut().zip(&b[p * rsb..p * rsb + n]) {
                *y = x.mul_add(*b, *y)
            }
        }
    }
}
