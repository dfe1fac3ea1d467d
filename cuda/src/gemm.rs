//! The matrix product as the device sees it, for the `matmul` op and for fused ops.

use engine::DType;
use engine::cpu::gemm::gemm;
use engine::half::{bf16, f16};

/// `C [m, n] = A [m, k] · B [k, n]` (or `+=`), row-major, `batch` times; sums in f32 (f64 for f64), never tf32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gemm {
    /// Of all three.
    pub dtype: DType,
    /// Rows of A and C.
    pub m: usize,
    /// Columns of B and C.
    pub n: usize,
    /// Columns of A, rows of B.
    pub k: usize,
    /// How many products.
    pub batch: usize,
    /// Address of A.
    pub a: u64,
    /// Whether memory holds Aᵀ, row-major `[k, m]`.
    pub a_trans: bool,
    /// Elements between the rows in memory.
    pub a_ld: usize,
    /// Elements between batches; 0 for one that all share.
    pub a_stride: usize,
    /// Address of B.
    pub b: u64,
    /// Whether memory holds Bᵀ, row-major `[n, k]`.
    pub b_trans: bool,
    /// As for A.
    pub b_ld: usize,
    /// As for A.
    pub b_stride: usize,
    /// Address of C.
    pub c: u64,
    /// Elements between rows of C.
    pub c_ld: usize,
    /// Elements between batches.
    pub c_stride: usize,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
}

impl Gemm {
    /// Dense row-major operands, one product.
    pub fn new(dtype: DType, (m, n, k): (usize, usize, usize), a: u64, b: u64, c: u64) -> Gemm {
        let (a_trans, b_trans) = (false, false);
        Gemm {
            dtype,
            m,
            n,
            k,
            batch: 1,
            a,
            a_trans,
            a_ld: k,
            a_stride: m * k,
            b,
            b_trans,
            b_ld: n,
            b_stride: k * n,
            c,
            c_ld: n,
            c_stride: m * n,
            accumulate: false,
        }
    }

    /// In host memory, for the emulator.
    pub(crate) fn on_host(&self) {
        fn run<T: Copy, F: engine::cpu::simd::Real>(g: &Gemm, up: impl Fn(T) -> F, down: impl Fn(F) -> T) {
            let at = |trans: bool, ld: usize| if trans { (1, ld) } else { (ld, 1) };
            let (sa, sb) = (at(g.a_trans, g.a_ld), at(g.b_trans, g.b_ld));
            let span = |r: usize, c: usize, s: (usize, usize)| if r * c == 0 { 0 } else { (r - 1) * s.0 + (c - 1) * s.1 + 1 };
            // SAFETY: the runtime checked that the operands lie in its own blocks, which are host memory here.
            let read = |p: u64, at: usize, n: usize| -> Vec<F> { (0..n).map(|i| up(unsafe { (p as *const T).add(at + i).read() })).collect() };
            for i in 0..g.batch {
                let a = read(g.a, i * g.a_stride, span(g.m, g.k, sa));
                let b = read(g.b, i * g.b_stride, span(g.k, g.n, sb));
                let mut c = vec![F::ZERO; g.m * g.n];
                gemm(g.m, g.n, g.k, F::ONE, &a, sa, &b, sb, F::ZERO, &mut c, g.n);
                for (j, v) in c.iter().enumerate() {
                    // SAFETY: as above.
                    unsafe {
                        let p = (g.c as *mut T).add(i * g.c_stride + j / g.n * g.c_ld + j % g.n);
                        p.write(down(if g.accumulate { up(p.read()) + *v } else { *v }));
                    }
                }
            }
        }
        match self.dtype {
            DType::F64 => run::<f64, f64>(self, |x| x, |x| x),
            DType::F32 => run::<f32, f32>(self, |x| x, |x| x),
            DType::BF16 => run::<bf16, f32>(self, bf16::to_f32, bf16::from_f32),
            _ => run::<f16, f32>(self, f16::to_f32, f16::from_f32),
        }
    }
}
