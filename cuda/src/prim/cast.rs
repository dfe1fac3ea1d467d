//! Conversion between dtypes.

use super::{ALL, THREADS, blocks};
use crate::kernel::cpp;
use crate::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::prim::Cast;
use engine::{DType, Result, View};

cuda_source!(static SOURCE = "cast.cu", kernels: kernels, headers: ["prim.cuh"]);
params! { struct CastParams { x: Ptr, out: Ptr, n: u64, to: u32, unused: u32 } }

const SHORT: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn kernel(from: DType, to: DType) -> Kernel {
    let call =
        if SHORT.contains(&from) && SHORT.contains(&to) { format!("cast_float<{}, {}>", cpp(from), cpp(to)) } else { format!("cast<{}>", cpp(from)) };
    Kernel::new(&SOURCE, call, THREADS)
}
fn kernels() -> Vec<Kernel> {
    let short = SHORT.into_iter().flat_map(|from| SHORT.into_iter().filter(move |to| *to != from).map(move |to| kernel(from, to)));
    ALL.into_iter().map(|d| kernel(d, if d == DType::F64 { DType::F32 } else { DType::F64 })).chain(short).collect()
}

fn cast(op: &Cast, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let (k, n) = (kernel(x[0].dtype, op.to), y[0].layout.numel());
    if x[0].dtype == op.to {
        return cuda.copy(Ptr::of(&x[0])?, Ptr::of(&y[0])?, n * op.to.size());
    }
    let to = match op.to {
        DType::F64 => 0,
        DType::F32 => 1,
        DType::BF16 => 2,
        DType::F16 => 3,
        DType::I64 => 4,
        DType::I32 => 5,
        DType::U32 => 6,
        DType::U8 => 7,
    };
    let per = if SHORT.contains(&x[0].dtype) && SHORT.contains(&op.to) { 16 } else { 8 };
    cuda.launch(&k, blocks(&k, n, per), 0, &CastParams { x: Ptr::of(&x[0])?, out: Ptr::of(&y[0])?, n: n as u64, to, unused: 0 })
}
cuda_kernel!(Cast => cast);
