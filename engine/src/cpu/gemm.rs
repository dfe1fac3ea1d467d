//! The big matrix product: matrixmultiply, split over rayon into blocks of C; of few rows, without packing.

use super::simd::Real;
use super::thin;
use half::bf16;
use rayon::prelude::*;
use std::any::TypeId;

/// Multiply-adds that one thread is done with before two are awake.
const ALONE: usize = 32 * 32 * 64;

/// A task's block of C: the longer side of C in two pieces a thread, at least 128 long, as every task packs the other operand anew; the shorter in
/// pieces of 1024, which is matrixmultiply's own.
fn blocks(m: usize, n: usize, threads: usize) -> (usize, usize) {
    let piece = |x: usize| x.div_ceil(2 * threads).next_multiple_of(32).clamp(128, 1024);
    if m >= n { (piece(m), 1024) } else { (1024, piece(n)) }
}

/// `C = beta·C + alpha·A·B` for `A [m,k]` with strides `sa = (row, column)`, `B [k,n]` with strides `sb`, `C [m,n]` with dense rows `rsc` apart.
///
/// With `beta` zero, C is written without being read. Panics when a slice is too short for its shape. The result does not depend on the number of
/// threads: it decides the blocks of C, but an element is summed over k in one order in any of them; nor does a row depend on how many others there are.
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
    if k > 0 {
        assert!(a.len() > (m - 1) * sa.0 + (k - 1) * sa.1, "A is too short");
        assert!(b.len() > (k - 1) * sb.0 + (n - 1) * sb.1, "B is too short");
    }
    let c = C::of(c);
    let block = |i: usize, j: usize, m: usize, n: usize| {
        // SAFETY: asserted above; the blocks of C are apart.
        unsafe {
            product(
                m,
                n,
                k,
                alpha,
                a[(i * sa.0).min(a.len())..].as_ptr(),
                sa,
                b[(j * sb.1).min(b.len())..].as_ptr(),
                sb,
                beta,
                c.at(i * rsc + j),
                rsc,
            )
        }
    };
    if m * n * k <= ALONE {
        return block(0, 0, m, n);
    }
    let (bm, bn) = blocks(m, n, rayon::current_num_threads());
    let (rows, columns) = (m.div_ceil(bm), n.div_ceil(bn));
    (0..rows * columns).into_par_iter().for_each(|t| {
        let (i, j) = (t / columns * bm, t % columns * bn);
        block(i, j, bm.min(m - i), bn.min(n - j));
    });
}

/// As [`gemm`], which see; at most eight rows are multiplied without packing, in another order of summing: a row's last digits then tell whether there were more.
pub fn gemm_few<F: Real>(
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
    if m > thin::ROWS || m * n * k == 0 || sa.1 != 1 || sb.0 != 1 {
        return gemm(m, n, k, alpha, a, sa, b, sb, beta, c, rsc);
    }
    assert!(rsc >= n && c.len() >= (m - 1) * rsc + n, "C is too short");
    assert!(a.len() >= (m - 1) * sa.0 + k && b.len() >= (n - 1) * sb.1 + k, "A or B is too short");
    thin::thin(m, n, k, alpha, a, sa.0, b, sb.1, beta, c, rsc);
}

/// Rows of a product up to which [`gemm_narrow`] takes it.
pub const NARROW_ROWS: usize = thin::ROWS;

/// `C = A·Bᵀ` of at most [`NARROW_ROWS`] rows `A [m, k]`, `lda` apart, with `B [n, k]` in bf16, `ldb` apart: B is widened as it is read. The same bits as
/// [`gemm_few`] with B widened before.
///
/// Panics when a slice is too short for its shape, or with more rows.
pub fn gemm_narrow<F: Real>(m: usize, n: usize, k: usize, a: &[F], lda: usize, b: &[bf16], ldb: usize, c: &mut [F], rsc: usize) {
    if m * n == 0 {
        return;
    }
    assert!(m <= NARROW_ROWS && k > 0, "{m} rows of {k}");
    assert!(rsc >= n && c.len() >= (m - 1) * rsc + n, "C is too short");
    assert!(a.len() >= (m - 1) * lda + k && b.len() >= (n - 1) * ldb + k, "A or B is too short");
    thin::thin(m, n, k, F::ONE, a, lda, b, ldb, F::ZERO, c, rsc);
}

#[derive(Clone, Copy)]
pub(super) struct C<F>(*mut F);
// SAFETY: tasks write blocks that are apart.
unsafe impl<F> Send for C<F> {}
unsafe impl<F> Sync for C<F> {}
impl<F> C<F> {
    pub fn of(c: &mut [F]) -> C<F> {
        C(c.as_mut_ptr())
    }
    pub fn at(&self, i: usize) -> *mut F {
        self.0.wrapping_add(i)
    }
}

unsafe fn product<F: Real>(
    m: usize,
    n: usize,
    k: usize,
    alpha: F,
    a: *const F,
    sa: (usize, usize),
    b: *const F,
    sb: (usize, usize),
    beta: F,
    c: *mut F,
    rsc: usize,
) {
    let (ra, ca, rb, cb, rc) = (sa.0 as isize, sa.1 as isize, sb.0 as isize, sb.1 as isize, rsc as isize);
    let (x, y) = (alpha.to_f64(), beta.to_f64());
    // SAFETY: the caller checked that the slices hold the shapes; `F` is the type that its TypeId says.
    unsafe {
        if TypeId::of::<F>() == TypeId::of::<f32>() {
            matrixmultiply::sgemm(m, k, n, x as f32, a.cast(), ra, ca, b.cast(), rb, cb, y as f32, c.cast(), rc, 1);
        } else {
            assert_eq!(TypeId::of::<F>(), TypeId::of::<f64>());
            matrixmultiply::dgemm(m, k, n, x, a.cast(), ra, ca, b.cast(), rb, cb, y, c.cast(), rc, 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;

    /// Of few rows, with tails, from and onto strided rows.
    #[test]
    fn few_rows() {
        let draw = |i, len| rng::normal(1, i, len);
        for (m, n, k) in [(1, 1, 1), (1, 301, 700), (2, 4, 16), (3, 7, 33), (8, 515, 129)] {
            let (lda, ldb, rsc) = (k + 3, k + 1, n + 2);
            let (a, b, old) = (draw(0, m * lda), draw(1, n * ldb), draw(2, m * rsc));
            for beta in [0.0, 0.5] {
                let mut c = if beta == 0.0 { vec![f64::NAN; m * rsc] } else { old.clone() };
                gemm_few(m, n, k, 2.0, &a, (lda, 1), &b, (1, ldb), beta, &mut c, rsc);
                for i in 0..m {
                    for j in 0..n {
                        let x: f64 = (0..k).map(|k| a[i * lda + k] * b[j * ldb + k]).sum();
                        let want = 2.0 * x + if beta == 0.0 { 0.0 } else { beta * old[i * rsc + j] };
                        assert!((c[i * rsc + j] - want).abs() < 1e-11, "{m} {n} {k}: {} {want}", c[i * rsc + j]);
                    }
                    assert!(beta == 0.0 || c[i * rsc + n..(i + 1) * rsc] == old[i * rsc + n..(i + 1) * rsc]);
                }
            }
        }
    }

    /// As of the same numbers in f32, bit for bit.
    #[test]
    fn narrow_matrices() {
        for (m, n, k) in [(1, 1, 1), (1, 301, 700), (3, 7, 33), (8, 515, 129)] {
            let (lda, ldb, rsc) = (k + 3, k + 1, n + 2);
            let a: Vec<f32> = rng::normal(1, 0, m * lda).into_iter().map(|x| x as f32).collect();
            let b: Vec<bf16> = rng::normal(1, 1, n * ldb).into_iter().map(bf16::from_f64).collect();
            let wide: Vec<f32> = b.iter().map(|x| x.to_f32()).collect();
            let (mut c, mut want) = (vec![0.5; m * rsc], vec![0.5; m * rsc]);
            gemm_narrow(m, n, k, &a, lda, &b, ldb, &mut c, rsc);
            gemm_few(m, n, k, 1.0, &a, (lda, 1), &wide, (1, ldb), 0.0, &mut want, rsc);
            assert_eq!(c, want, "{m} {n} {k}");
        }
    }

    /// Tails of tiles fall elsewhere in each cut.
    #[test]
    fn the_number_of_threads_does_not_change_a_bit() {
        for (m, n, k) in [(515, 301, 700), (3, 301, 700)] {
            let draw = |i, len| rng::normal(1, i, len).into_iter().map(|x| x as f32).collect::<Vec<f32>>();
            let (a, b) = (draw(0, m * k), draw(1, k * n));
            let run = |threads: usize, t: bool| {
                let mut c = vec![0f32; m * n];
                let (sa, sb) = if t { ((1, m), (1, k)) } else { ((k, 1), (n, 1)) };
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| gemm_few(m, n, k, 1.0, &a, sa, &b, sb, 0.0, &mut c, n));
                c.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            for t in [false, true] {
                let one = run(1, t);
                assert!([2, 3, 8].iter().all(|n| run(*n, t) == one));
            }
        }
    }
}
