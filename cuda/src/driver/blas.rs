//! cublasLt: a plan (descriptors and the algorithm that its heuristic picks) for each shape, kept.

use crate::Gemm;
use crate::compile::present;
use cudarc::cublaslt::sys::{self as lt, cublasStatus_t};
use engine::{DType, Error, Result};
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;

fn check(r: cublasStatus_t, what: &str, g: &dyn std::fmt::Debug) -> Result<()> {
    if r == cublasStatus_t::CUBLAS_STATUS_SUCCESS { Ok(()) } else { Err(Error::invalid("matmul", format!("{what} failed for {g:?}: {r:?}"))) }
}

pub(crate) const MISSING: &str =
    "libcublasLt is not found: install the CUDA toolkit or `pip install nvidia-cublas`, and name its lib folder in TIDEGATE_CUDA_LIBS";

/// All of a product that a plan depends on: not the addresses, but how they are aligned.
type Key = (Gemm, [u32; 3]);

struct Plan {
    desc: lt::cublasLtMatmulDesc_t,
    /// Of cublasLt's A, B and C.
    layouts: [lt::cublasLtMatrixLayout_t; 3],
    algo: lt::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: made by the library and not destroyed before; null where a plan failed half made, which is skipped.
        unsafe {
            for l in self.layouts.iter().filter(|l| !l.is_null()) {
                lt::cublasLtMatrixLayoutDestroy(*l);
            }
            if !self.desc.is_null() {
                lt::cublasLtMatmulDescDestroy(self.desc);
            }
        }
    }
}

/// A matrix in memory as cublasLt sees it, column-major.
#[derive(Clone, Copy, Debug)]
struct Operand {
    rows: usize,
    cols: usize,
    ld: usize,
    stride: usize,
    /// Whether the product takes its transpose.
    trans: bool,
}

/// cublasLt's A, B and C. Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ, so our B comes first; and a row-major matrix is the column-major transpose of itself.
fn operands(g: &Gemm) -> [Operand; 3] {
    let b = if g.b_trans { (g.k, g.n) } else { (g.n, g.k) };
    let a = if g.a_trans { (g.m, g.k) } else { (g.k, g.m) };
    [(b, g.b_ld, g.b_stride, g.b_trans), (a, g.a_ld, g.a_stride, g.a_trans), ((g.n, g.m), g.c_ld, g.c_stride, false)]
        .map(|((rows, cols), ld, stride, trans)| Operand { rows, cols, ld, stride, trans })
}

pub(super) struct Blas {
    handle: lt::cublasLtHandle_t,
    workspace: u64,
    plans: HashMap<Key, Plan>,
}
// SAFETY: a cublasLt handle and descriptors may be used from any thread; the lock around `Blas` makes it one at a time.
unsafe impl Send for Blas {}

fn alignment(at: u64) -> u32 {
    1 << at.trailing_zeros().min(8)
}

impl Blas {
    /// Bytes that an algorithm may use on the side: NVIDIA's advice for Hopper.
    pub const WORKSPACE: usize = 32 << 20;
    /// Shapes whose plans are kept: far more than a model has, but a server may see a new length with each request.
    const PLANS: usize = 4096;

    pub fn new(workspace: u64) -> Result<Blas> {
        if !present(lt::is_culib_present) {
            return Err(Error::invalid("matmul", MISSING));
        }
        let mut handle = null_mut();
        // SAFETY: the library is there.
        check(unsafe { lt::cublasLtCreate(&mut handle) }, "cublasLtCreate", &"a handle")?;
        Ok(Blas { handle, workspace, plans: HashMap::new() })
    }

    pub fn run(&mut self, g: &Gemm, stream: lt::cudaStream_t) -> Result<()> {
        let key = (Gemm { a: 0, b: 0, c: 0, ..*g }, [alignment(g.a), alignment(g.b), alignment(g.c)]);
        if !self.plans.contains_key(&key) {
            let plan = self.plan(&key)?;
            if self.plans.len() >= Self::PLANS {
                self.plans.clear();
            }
            self.plans.insert(key, plan);
        }
        let p = &self.plans[&key];
        let (one32, beta32, one64, beta64) = (1f32, g.accumulate as u8 as f32, 1f64, g.accumulate as u8 as f64);
        let (one, beta): (*const c_void, *const c_void) = match g.dtype {
            DType::F64 => ((&raw const one64).cast(), (&raw const beta64).cast()),
            _ => ((&raw const one32).cast(), (&raw const beta32).cast()),
        };
        let (a, b, c) = (g.a as *const c_void, g.b as *const c_void, g.c as *mut c_void);
        let [lb, la, lc] = p.layouts;
        let w = self.workspace as *mut c_void;
        // SAFETY: the plan was made for these shapes; the caller hands out memory of that size; scalars are read before the call returns.
        let r = unsafe { lt::cublasLtMatmul(self.handle, p.desc, one, b, lb, a, la, beta, c, lc, c, lc, &p.algo, w, Self::WORKSPACE, stream) };
        check(r, "cublasLtMatmul", g)
    }

    fn plan(&self, (g, align): &Key) -> Result<Plan> {
        use lt::cublasLtMatmulDescAttributes_t as D;
        use lt::cublasLtMatmulPreferenceAttributes_t as P;
        use lt::cublasLtMatrixLayoutAttribute_t as L;
        use lt::{cublasComputeType_t as C, cudaDataType as T};
        let (kind, compute, scale) = match g.dtype {
            DType::F64 => (T::CUDA_R_64F, C::CUBLAS_COMPUTE_64F, T::CUDA_R_64F),
            DType::F32 => (T::CUDA_R_32F, C::CUBLAS_COMPUTE_32F, T::CUDA_R_32F),
            DType::BF16 => (T::CUDA_R_16BF, C::CUBLAS_COMPUTE_32F, T::CUDA_R_32F),
            DType::F16 => (T::CUDA_R_16F, C::CUBLAS_COMPUTE_32F, T::CUDA_R_32F),
            d => return Err(Error::dtype("matmul", "a", "a float dtype", d)),
        };
        let kind_c = match g.c_dtype {
            d if d == g.dtype => kind,
            DType::F32 if g.dtype != DType::F64 => T::CUDA_R_32F,
            d => return Err(Error::dtype("matmul", "the result", format!("{} or f32", g.dtype), d)),
        };
        // SAFETY: plain data, for which zero is a value.
        let mut p = Plan { desc: null_mut(), layouts: [null_mut(); 3], algo: unsafe { std::mem::zeroed() } };
        let ops = operands(g);
        // SAFETY: attributes are written with the sizes of their types; handles come from the calls before.
        unsafe {
            check(lt::cublasLtMatmulDescCreate(&mut p.desc, compute, scale), "cublasLtMatmulDescCreate", g)?;
            for (attr, o) in [D::CUBLASLT_MATMUL_DESC_TRANSA, D::CUBLASLT_MATMUL_DESC_TRANSB].into_iter().zip(&ops) {
                let op = o.trans as i32; // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
                check(lt::cublasLtMatmulDescSetAttribute(p.desc, attr, (&raw const op).cast(), 4), "cublasLtMatmulDescSetAttribute", g)?;
            }
            for ((l, kind), o) in p.layouts.iter_mut().zip([kind, kind, kind_c]).zip(&ops) {
                check(lt::cublasLtMatrixLayoutCreate(l, kind, o.rows as u64, o.cols as u64, o.ld as i64), "cublasLtMatrixLayoutCreate", g)?;
                let (count, stride) = (g.batch as i32, o.stride as i64);
                let set =
                    |attr, at: *const c_void, n| check(lt::cublasLtMatrixLayoutSetAttribute(*l, attr, at, n), "cublasLtMatrixLayoutSetAttribute", g);
                set(L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), 4)?;
                set(L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const stride).cast(), 8)?;
            }
            struct Preference(lt::cublasLtMatmulPreference_t);
            impl Drop for Preference {
                fn drop(&mut self) {
                    // SAFETY: created below and not destroyed before.
                    unsafe { lt::cublasLtMatmulPreferenceDestroy(self.0) };
                }
            }
            let mut pref = null_mut();
            check(lt::cublasLtMatmulPreferenceCreate(&mut pref), "cublasLtMatmulPreferenceCreate", g)?;
            let pref = Preference(pref);
            let set = |attr, at: *const c_void, n| {
                check(lt::cublasLtMatmulPreferenceSetAttribute(pref.0, attr, at, n), "cublasLtMatmulPreferenceSetAttribute", g)
            };
            let workspace = Self::WORKSPACE as u64;
            set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
            // split sums are added in the compute type: by default also in C's, where halves lose what f32 had
            let reduction = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            set(P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, (&raw const reduction).cast(), 4)?;
            let [a, b, c] = align;
            for (attr, v) in [
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, b),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, a),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, c),
                (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, c),
            ] {
                set(attr, (v as *const u32).cast(), 4)?;
            }
            let mut result: lt::cublasLtMatmulHeuristicResult_t = std::mem::zeroed();
            let mut found = 0;
            let [lb, la, lc] = p.layouts;
            let r = lt::cublasLtMatmulAlgoGetHeuristic(self.handle, p.desc, lb, la, lc, lc, pref.0, 1, &mut result, &mut found);
            check(r, "cublasLtMatmulAlgoGetHeuristic", g)?;
            if found == 0 || result.state != cublasStatus_t::CUBLAS_STATUS_SUCCESS {
                return Err(Error::invalid("matmul", format!("cublasLt has no algorithm for {g:?}")));
            }
            p.algo = result.algo;
        }
        Ok(p)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the library is told, carried out as its manual defines it (column-major, C = op(A) op(B)), against the product as ours defines it.
    #[test]
    fn the_library_is_told_the_same_product() {
        let value = |i: usize| (i * 7 % 11) as f64 - 5.0;
        let (m, n, k, batch) = (3, 4, 5, 2);
        for (a_trans, b_trans) in [(false, false), (true, false), (false, true), (true, true)] {
            let (a_ld, b_ld) = (if a_trans { m } else { k } + 2, if b_trans { k } else { n } + 1);
            let g = Gemm {
                batch,
                a_trans,
                b_trans,
                a_ld,
                b_ld,
                a_stride: 50,
                b_stride: 0,
                c_ld: n + 3,
                c_stride: 40,
                ..Gemm::new(DType::F64, (m, n, k), 0, 0, 0)
            };
            let [la, lb, lc] = operands(&g);
            let memory = |o: &Operand, b: usize, i: usize, j: usize| {
                let (r, c) = if o.trans { (j, i) } else { (i, j) };
                assert!(r < o.rows && c < o.cols && o.ld >= o.rows);
                b * o.stride + r + c * o.ld
            };
            for b in 0..batch {
                for i in 0..m {
                    for j in 0..n {
                        let at = |trans: bool, ld: usize, r: usize, c: usize| if trans { c * ld + r } else { r * ld + c };
                        let ours: f64 = (0..k).map(|q| value(b * 50 + at(a_trans, a_ld, i, q)) * value(at(b_trans, b_ld, q, j))).sum();
                        // element (i, j) of our C is (j, i) of the library's
                        let theirs: f64 = (0..k).map(|q| value(memory(&la, b, j, q)) * value(memory(&lb, b, q, i))).sum();
                        assert_eq!(ours, theirs, "{a_trans} {b_trans}");
                        assert_eq!(memory(&lc, b, j, i), b * 40 + i * (n + 3) + j);
                    }
                }
            }
        }
    }
}
