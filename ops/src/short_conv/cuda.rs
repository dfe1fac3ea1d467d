//! Launches on CUDA; the algorithm is at the head of short_conv.cu.

use super::{ShortConv, ShortConvBackward, sizes};
use crate::cuda::{PAIRS, aligned, blocks, columns_kernel, float, sum_columns};
use cuda::kernel::{cpp, one_of};
use cuda::{Cuda, FastDiv, Fault, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Error, Result, View};

cuda_source!(static SOURCE = "short_conv.cu", kernels: kernels, headers: ["../ops.cuh"]);

params! {
    struct ShortConvParams {
        x: Ptr, w: Ptr, dy: Ptr, state: Ptr, dlast: Ptr, bounds: Ptr, y: Ptr, dx: Ptr, last: Ptr, dstate: Ptr, parts: Ptr,
        batch_stride: i64, time_stride: i64, head_stride: i64, blocks: FastDiv, groups: FastDiv, head_dim: FastDiv,
        t: u32, c: u32, k: u32, run: u32, documents: u32, narrow: u32, silu: u32, unused: u32, fault: Fault,
    }
}

/// Warps of a block, each with a run of steps.
const WARPS: usize = 4;
const THREADS: u32 = 32 * WARPS as u32;
/// Taps that are compiled for.
const TAPS: [usize; 2] = [4, 8];
/// Bytes of a thread's channels, where they can be moved at once.
const VECTOR: usize = 8;
/// Steps of a run: the longest that makes `BUSY` warps, else the shortest. All are multiples of `TAPS`.
const RUNS: [usize; 3] = [64, 32, 16];
/// Warps that keep the largest card busy: 31 for each of 132 multiprocessors.
const BUSY: usize = 4096;

fn kernel(pass: &str, (x, w): (DType, DType), n: usize, taps: usize) -> Kernel {
    let blocks = match (pass, taps) {
        ("forward", 4) => 8,
        (_, 4) => 4,
        _ => 2,
    };
    Kernel::new(&SOURCE, format!("short_conv_{pass}<{}, {}, {n}, {taps}>", cpp(x), cpp(w)), THREADS).min_blocks(blocks)
}
fn kernels() -> Vec<Kernel> {
    let mut all = vec![columns_kernel(&SOURCE, DType::F32), columns_kernel(&SOURCE, DType::BF16)];
    for pass in ["forward", "backward"] {
        for d in PAIRS {
            for taps in TAPS {
                all.extend([1, VECTOR / d.0.size()].map(|n| kernel(pass, d, n, taps)));
            }
        }
    }
    all
}

/// What both passes share: the parameters but for the backward's, the kernel, how many blocks, and how many blocks of runs there are in all.
fn common(op: &ShortConv, cuda: &Cuda, pass: &str, x: &[View], moved: &[&View]) -> Result<(ShortConvParams, Kernel, u32, usize)> {
    let d = float("short_conv", "x", &x[0])?;
    let dtypes = (d, one_of("short_conv", "weight", x[1].dtype, &[d, DType::F32])?);
    let (b, t, c, k) = sizes(&x[0].layout.shape, &x[1].layout.shape);
    let taps = TAPS.into_iter().find(|n| k <= *n);
    let taps = taps.ok_or_else(|| Error::invalid("short_conv", format!("takes kernels of up to {} taps on CUDA, found {k}", TAPS[1])))?;
    let l = x[0].layout;
    // heads that lie side by side are one row of channels
    let apart = l.shape.len() == 4 && l.shape[2] > 1 && l.strides[2] as usize != l.shape[3];
    let (head_dim, head_stride) = if apart { (l.shape[3], l.strides[2] as i64) } else { (c, 0) };
    let n = VECTOR / d.size();
    let n = if head_dim.is_multiple_of(n) && aligned(VECTOR, moved)? { n } else { 1 };
    let groups = c.div_ceil(32 * n);
    let run = RUNS.into_iter().find(|run| b * t.div_ceil(*run) * groups >= BUSY).unwrap_or(RUNS[2]);
    let per_entry = t.div_ceil(run * WARPS).max(1);
    let packed = if op.packed { x.get(op.inputs() - 1) } else { None };
    let p = ShortConvParams {
        x: Ptr::of(&x[0])?,
        w: Ptr::of(&x[1])?,
        dy: Ptr::NULL,
        state: if op.state { Ptr::of(&x[2])? } else { Ptr::NULL },
        dlast: Ptr::NULL,
        bounds: Ptr::of_option(packed)?,
        y: Ptr::NULL,
        dx: Ptr::NULL,
        last: Ptr::NULL,
        dstate: Ptr::NULL,
        parts: Ptr::NULL,
        batch_stride: l.strides[0] as i64,
        time_stride: l.strides[1] as i64,
        head_stride,
        blocks: FastDiv::new(per_entry),
        groups: FastDiv::new(groups),
        head_dim: FastDiv::new(head_dim),
        t: t as u32,
        c: c as u32,
        k: k as u32,
        run: run as u32,
        documents: packed.map_or(0, |v| v.layout.numel() as u32 - 1),
        narrow: packed.is_some_and(|v| v.dtype == DType::I32) as u32,
        silu: op.silu as u32,
        unused: 0,
        fault: cuda.fault("short_conv", "cu_seqlens must rise from 0 to the packed length, found")?,
    };
    Ok((p, kernel(pass, dtypes, n, taps), blocks("short_conv", b * per_entry * groups, 1)?, b * per_entry))
}

cuda_kernel!(ShortConv => |op, cuda, x, y| {
    let (p, kernel, blocks, _) = common(op, cuda, "forward", x, &[&x[0], &y[0]])?;
    let p = ShortConvParams { y: Ptr::of(&y[0])?, last: Ptr::of(&y[1])?, ..p };
    cuda.launch(&kernel, [blocks, 1, 1], 0, &p)
});

cuda_kernel!(ShortConvBackward => |op, cuda, x, y| {
    let n = op.conv.inputs();
    let (p, kernel, blocks, rows) = common(&op.conv, cuda, "backward", x, &[&x[0], &x[n], &y[0]])?;
    let cols = x[1].layout.numel();
    let (_parts, parts) = cuda.scratch(4 * rows * cols)?;
    let dlast = if op.state_grad { x.get(n + 1) } else { None };
    let dstate = if op.conv.state { y.get(2) } else { None };
    let p = ShortConvParams {
        dy: Ptr::of(&x[n])?, dlast: Ptr::of_option(dlast)?, dx: Ptr::of(&y[0])?, dstate: Ptr::of_option(dstate)?, parts, ..p
    };
    cuda.launch(&kernel, [blocks, 1, 1], 0, &p)?;
    sum_columns(cuda, &SOURCE, parts, rows, cols, &y[1])
});
