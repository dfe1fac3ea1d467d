//! Launches on CUDA; the algorithms are at the head of adamw.cu.

use super::{AdamW, AdamWMany, GlobalNorm, Rates, SumOfSquares};
use crate::cuda::{FLOATS, blocks, float};
use cuda::kernel::cpp;
use cuda::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Result, View};

cuda_source!(static SOURCE = "adamw.cu", kernels: kernels, headers: ["../ops.cuh"]);

const THREADS: u32 = 256;
/// Elements of a block, and tensors of a launch, as in the source.
const CHUNK: usize = 4096;
const MANY: usize = 48;

params! {
    struct AdamWParams { p: Ptr, m: Ptr, v: Ptr, g: Ptr, n: u64, wide: u32, unused: u32, rates: [f32; 10] }
    struct AdamWManyParams {
        schedule: Ptr, coefficient: Ptr, beta1: f32, beta2: f32, one_beta1: f32, one_beta2: f32, eps: f32, count: u32,
        p: [Ptr; MANY], m: [Ptr; MANY], v: [Ptr; MANY], g: [Ptr; MANY], shadow: [Ptr; MANY], n: [u64; MANY], decay: [f32; MANY], first: [u32; MANY],
        kind: [u32; MANY],
    }
    struct SquaresParams { parts: Ptr, count: u32, before: u32, g: [Ptr; MANY], n: [u64; MANY], first: [u32; MANY], kind: [u32; MANY] }
    struct NormParams { parts: Ptr, norm: Ptr, coefficient: Ptr, n: u64, scale: f64, max_norm: f64 }
}

fn kernel(call: String) -> Kernel {
    Kernel::new(&SOURCE, call, THREADS).min_blocks(4)
}
fn one(g: DType) -> Kernel {
    kernel(format!("adamw<{}>", cpp(g)))
}
fn kernels() -> Vec<Kernel> {
    FLOATS.map(one).into_iter().chain(["adamw_many<0>", "squares<0>", "norm<0>"].map(|k| kernel(k.into()))).collect()
}

cuda_kernel!(AdamW => |op, cuda, x, y| {
    let g = float("adamw", "the gradient", &x[0])?;
    let n = x[0].layout.numel();
    let r: Rates<f32> = op.rates();
    let even = |to, v| aligned_start(to, v);
    let wide = even(16, &y[0])? && even(16, &y[1])? && even(16, &y[2])? && even(4 * g.size(), &x[0])?;
    let p = AdamWParams {
        p: Ptr::of(&y[0])?, m: Ptr::of(&y[1])?, v: Ptr::of(&y[2])?, g: Ptr::of(&x[0])?, n: n as u64, wide: wide as u32, unused: 0,
        rates: [r.beta[0], r.beta[1], r.one_minus_beta[0], r.one_minus_beta[1], r.lr, r.unbias, r.eps, r.keep, r.scale, 0.0],
    };
    cuda.launch(&one(g), [blocks("adamw", n, 4 * THREADS as usize)?, 1, 1], 0, &p)
});

/// Whether it is bf16 (bit 0), and whether vectors of 4 are aligned (bit 1), given that others beside it are.
fn kind(op: &'static str, g: &View, others: bool) -> Result<u32> {
    let d = float(op, "a gradient", g)?;
    Ok((d == DType::BF16) as u32 | ((others && aligned_start(4 * d.size(), g)?) as u32) << 1)
}
/// Flat tensors are read from their first element on.
fn aligned_start(to: usize, v: &View) -> Result<bool> {
    Ok(Ptr::of(v)?.0 % to as u64 == 0)
}

cuda_kernel!(AdamWMany => many);

fn many(op: &AdamWMany, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let (grads, n) = (&x[2..], op.weight_decay.len());
    for at in (0..n).step_by(MANY) {
        let null = [Ptr::NULL; MANY];
        let count = MANY.min(n - at);
        let mut p = AdamWManyParams {
            schedule: Ptr::of(&x[0])?,
            coefficient: Ptr::of(&x[1])?,
            beta1: op.beta1 as f32,
            beta2: op.beta2 as f32,
            one_beta1: (1.0 - op.beta1) as f32,
            one_beta2: (1.0 - op.beta2) as f32,
            eps: op.eps as f32,
            count: count as u32,
            p: null,
            m: null,
            v: null,
            g: null,
            shadow: null,
            n: [0; MANY],
            decay: [0.0; MANY],
            first: [0; MANY],
            kind: [0; MANY],
        };
        let mut chunks = 0;
        for i in 0..count {
            let j = at + i;
            let targets = [&y[j], &y[n + j], &y[2 * n + j]];
            let mut even = true;
            for t in targets {
                even &= aligned_start(16, t)?;
            }
            if op.shadows {
                even &= aligned_start(8, &y[3 * n + j])?;
                p.shadow[i] = Ptr::of(&y[3 * n + j])?;
            }
            (p.p[i], p.m[i], p.v[i]) = (Ptr::of(targets[0])?, Ptr::of(targets[1])?, Ptr::of(targets[2])?);
            (p.g[i], p.n[i], p.decay[i]) = (Ptr::of(&grads[j])?, grads[j].layout.numel() as u64, op.weight_decay[j] as f32);
            (p.first[i], p.kind[i]) = (blocks("adamw_many", chunks, 1)?, kind("adamw_many", &grads[j], even)?);
            chunks += grads[j].layout.numel().div_ceil(CHUNK);
        }
        cuda.launch(&kernel("adamw_many<0>".into()), [blocks("adamw_many", chunks, 1)?, 1, 1], 0, &p)?;
    }
    Ok(())
}

/// Sums of squares of all, and what `finish` makes of their sum.
fn squares(op: &'static str, cuda: &Cuda, x: &[View], finish: impl Fn(Ptr, u64) -> Result<NormParams>) -> Result<()> {
    let chunks = |v: &View| v.layout.numel().div_ceil(CHUNK);
    let total: usize = x.iter().map(chunks).sum();
    let (_parts, parts) = cuda.scratch(8 * total)?;
    let mut before = 0;
    for group in x.chunks(MANY) {
        let count = group.len() as u32;
        let mut p =
            SquaresParams { parts, count, before: blocks(op, before, 1)?, g: [Ptr::NULL; MANY], n: [0; MANY], first: [0; MANY], kind: [0; MANY] };
        let mut here = 0;
        for (i, v) in group.iter().enumerate() {
            (p.g[i], p.n[i], p.first[i], p.kind[i]) = (Ptr::of(v)?, v.layout.numel() as u64, blocks(op, here, 1)?, kind(op, v, true)?);
            here += chunks(v);
        }
        cuda.launch(&kernel("squares<0>".into()), [blocks(op, here, 1)?, 1, 1], 0, &p)?;
        before += here;
    }
    cuda.launch(&kernel("norm<0>".into()), [1, 1, 1], 0, &finish(parts, total as u64)?)
}

cuda_kernel!(SumOfSquares => |_, cuda, x, y| {
    let norm = Ptr::of(&y[0])?;
    squares("sum_of_squares", cuda, x, |parts, n| Ok(NormParams { parts, norm, coefficient: Ptr::NULL, n, scale: 1.0, max_norm: 0.0 }))
});
cuda_kernel!(GlobalNorm => |op, cuda, x, y| {
    let (norm, coefficient) = (Ptr::of(&y[0])?, Ptr::of(&y[1])?);
    squares("global_norm", cuda, x, |parts, n| Ok(NormParams { parts, norm, coefficient, n, scale: op.scale, max_norm: op.max_norm }))
});
