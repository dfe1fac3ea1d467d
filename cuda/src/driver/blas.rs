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
    layouts: [lt::cublasLtMatrixLayout_t; 3],
    algo: lt::cublasLtMatmulAlgo_t,
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

    /// Row-major C = A B is column-major Cᵀ = Bᵀ Aᵀ, so B comes first.
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
        let (m, n, k) = (g.m as u64, g.n as u64, g.k as u64);
        let mut desc = null_mut();
        let mut layouts = [null_mut(); 3];
        // SAFETY: attributes are written with the sizes of their types; handles come from the calls before.
        unsafe {
            check(lt::cublasLtMatmulDescCreate(&mut desc, compute, scale), "cublasLtMatmulDescCreate", g)?;
            for (attr, trans) in [(D::CUBLASLT_MATMUL_DESC_TRANSA, g.b_trans), (D::CUBLASLT_MATMUL_DESC_TRANSB, g.a_trans)] {
                let op = trans as i32; // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1
                check(lt::cublasLtMatmulDescSetAttribute(desc, attr, (&raw const op).cast(), 4), "cublasLtMatmulDescSetAttribute", g)?;
            }
            let b = if g.b_trans { (k, n) } else { (n, k) };
            let a = if g.a_trans { (m, k) } else { (k, m) };
            let parts = [(kind, b, g.b_ld, g.b_stride), (kind, a, g.a_ld, g.a_stride), (kind_c, (n, m), g.c_ld, g.c_stride)];
            for (l, (kind, (rows, cols), ld, stride)) in layouts.iter_mut().zip(parts) {
                check(lt::cublasLtMatrixLayoutCreate(l, kind, rows, cols, ld as i64), "cublasLtMatrixLayoutCreate", g)?;
                let (count, stride) = (g.batch as i32, stride as i64);
                let set =
                    |attr, at: *const c_void, n| check(lt::cublasLtMatrixLayoutSetAttribute(*l, attr, at, n), "cublasLtMatrixLayoutSetAttribute", g);
                set(L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, (&raw const count).cast(), 4)?;
                set(L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, (&raw const stride).cast(), 8)?;
            }
            let mut pref = null_mut();
            check(lt::cublasLtMatmulPreferenceCreate(&mut pref), "cublasLtMatmulPreferenceCreate", g)?;
            let set = |attr, at: *const c_void, n| {
                check(lt::cublasLtMatmulPreferenceSetAttribute(pref, attr, at, n), "cublasLtMatmulPreferenceSetAttribute", g)
            };
            let workspace = Self::WORKSPACE;
            set(P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), 8)?;
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
            let [lb, la, lc] = layouts;
            let r = lt::cublasLtMatmulAlgoGetHeuristic(self.handle, desc, lb, la, lc, lc, pref, 1, &mut result, &mut found);
            lt::cublasLtMatmulPreferenceDestroy(pref);
            check(r, "cublasLtMatmulAlgoGetHeuristic", g)?;
            if found == 0 {
                return Err(Error::invalid("matmul", format!("cublasLt has no algorithm for {g:?}")));
            }
            Ok(Plan { desc, layouts, algo: result.algo })
        }
    }
}
