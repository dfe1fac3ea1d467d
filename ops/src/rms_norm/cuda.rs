//! Launches on CUDA; the algorithm is at the head of rms_norm.cu.

use super::{NormGate, RmsNorm, RmsNormBackward};
use crate::cuda::{PAIRS, Rows, aligned, blocks, columns_kernel, float, sum_columns};
use cuda::kernel::{cpp, one_of};
use cuda::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Result, View};

cuda_source!(static SOURCE = "rms_norm.cu", kernels: kernels, headers: ["../ops.cuh"]);

params! {
    struct RmsNormParams {
        x: Ptr, w: Ptr, third: Ptr, y: Ptr, sum: Ptr, rows: Rows, third_rows: Rows, n: u64, d: u32, wide: u32, residual: u32, gate: u32, eps: f32, centre: f32,
    }
    struct RmsNormBackwardParams {
        x: Ptr, w: Ptr, dy: Ptr, third: Ptr, dx: Ptr, dgate: Ptr, parts: Ptr, rows: Rows, third_rows: Rows, n: u64, d: u32, wide: u32, gate: u32,
        unused: u32, eps: f32, centre: f32,
    }
}

const THREADS: u32 = 256;
/// Threads of a row's team and vectors of 16 bytes that each holds (0: the row is read twice).
const TEAMS: [(u32, usize); 4] = [(32, 1), (32, 4), (THREADS, 4), (THREADS, 0)];
/// Blocks of a backward pass: four for each multiprocessor of the largest card, so that their number depends on the shape alone.
const PARTS: usize = 528;

fn kernel(pass: &str, (x, w): (DType, DType), (team, vecs): (u32, usize)) -> Kernel {
    let k = Kernel::new(&SOURCE, format!("rms_norm_{pass}<{}, {}, {team}, {vecs}>", cpp(x), cpp(w)), THREADS);
    k.min_blocks(if pass == "backward" { 2 } else { 3 })
}
fn kernels() -> Vec<Kernel> {
    let each = |pass| PAIRS.into_iter().flat_map(move |d| TEAMS.into_iter().map(move |t| kernel(pass, d, t)));
    each("forward").chain(each("backward")).chain([DType::F32, DType::BF16].map(|d| columns_kernel(&SOURCE, d))).collect()
}

/// The smallest team that holds rows of `d` elements, and how many rows a block has at a time.
fn team(d: usize, x: DType) -> ((u32, usize), usize) {
    let fits = |(team, vecs): &(u32, usize)| d <= *team as usize * vecs * 16 / x.size();
    let t = TEAMS.into_iter().find(fits).unwrap_or(TEAMS[3]);
    (t, (THREADS / t.0) as usize)
}
fn dtypes(x: &[View]) -> Result<(DType, DType)> {
    let d = float("rms_norm", "x", &x[0])?;
    Ok((d, one_of("rms_norm", "weight", x[1].dtype, &[d, DType::F32])?))
}
fn gate(g: Option<NormGate>) -> u32 {
    g.map_or(0, |g| if g == NormGate::Silu { 1 } else { 2 })
}
/// (rows, their length)
fn sizes(x: &View) -> (usize, usize) {
    let d = x.layout.shape.last().copied().unwrap_or(1);
    (x.layout.numel().checked_div(d).unwrap_or(0), d)
}

cuda_kernel!(RmsNorm => |op, cuda, x, y| {
    let (dtypes, (n, d)) = (dtypes(x)?, sizes(&x[0]));
    let (t, at_once) = team(d, dtypes.0);
    let views: Vec<&View> = x.iter().chain(y).collect();
    let third = x.get(2);
    let p = RmsNormParams {
        x: Ptr::of(&x[0])?, w: Ptr::of(&x[1])?, third: Ptr::of_option(third)?, y: Ptr::of(&y[0])?, sum: Ptr::of_option(y.get(1))?,
        rows: Rows::new("rms_norm", x[0].layout)?, third_rows: Rows::new("rms_norm", third.unwrap_or(&x[0]).layout)?,
        n: n as u64, d: d as u32, wide: aligned(16, &views)? as u32, residual: op.residual as u32, gate: gate(op.gate),
        eps: op.eps as f32, centre: op.zero_centred as u8 as f32,
    };
    cuda.launch(&kernel("forward", dtypes, t), [blocks("rms_norm", n, at_once)?, 1, 1], 0, &p)
});

cuda_kernel!(RmsNormBackward => backward);

fn backward(op: &RmsNormBackward, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let (dtypes, (n, d)) = (dtypes(x)?, sizes(&x[0]));
    let (t, at_once) = team(d, dtypes.0);
    let parts = n.div_ceil(4 * at_once).min(PARTS);
    let (_parts, at) = cuda.scratch(4 * parts * d)?;
    let views: Vec<&View> = x.iter().chain([&y[0]]).chain(y.get(2)).collect();
    let third = x.get(3);
    let p = RmsNormBackwardParams {
        x: Ptr::of(&x[0])?,
        w: Ptr::of(&x[1])?,
        dy: Ptr::of(&x[2])?,
        third: Ptr::of_option(third)?,
        dx: Ptr::of(&y[0])?,
        dgate: Ptr::of_option(y.get(2))?,
        parts: at,
        rows: Rows::new("rms_norm", x[0].layout)?,
        third_rows: Rows::new("rms_norm", third.unwrap_or(&x[0]).layout)?,
        n: n as u64,
        d: d as u32,
        wide: aligned(16, &views)? as u32,
        gate: gate(op.norm.gate),
        unused: 0,
        eps: op.norm.eps as f32,
        centre: op.norm.zero_centred as u8 as f32,
    };
    cuda.launch(&kernel("backward", dtypes, t), [parts as u32, 1, 1], 0, &p)?;
    sum_columns(cuda, &SOURCE, at, parts, d, &y[1])
}
