//! Launches on CUDA; the algorithm is at the head of rms_norm.cu.

use super::{NormGate, RmsNorm, RmsNormBackward};
use crate::cuda::{PAIRS, Rows, aligned, columns_kernel, float, sum_columns};
use cuda::kernel::{cpp, one_of};
use cuda::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Result, View};

cuda_source!(static SOURCE = "rms_norm.cu", kernels: kernels, headers: ["../ops.cuh"]);

params! {
    struct RmsNormParams {
        x: Ptr, w: Ptr, third: Ptr, y: Ptr, sum: Ptr, rows: Rows, third_rows: Rows, n: u64, d: u32, residual: u32, gate: u32, unused: u32, eps: f32, centre: f32,
    }
    struct RmsNormBackwardParams {
        x: Ptr, w: Ptr, dy: Ptr, third: Ptr, dx: Ptr, dgate: Ptr, parts: Ptr, rows: Rows, third_rows: Rows, n: u64, d: u32, gate: u32,
        eps: f32, centre: f32,
    }
}

/// How a kernel takes rows: threads of a row's team, and vectors that each holds (0: the row is read twice).
#[derive(Clone, Copy)]
struct Team {
    threads: usize,
    vecs: usize,
}
const fn team(threads: usize, vecs: usize) -> Team {
    Team { threads, vecs }
}
/// For rows of whole, aligned vectors of 16 bytes.
const WHOLE: [Team; 6] = [team(16, 1), team(32, 1), team(128, 1), team(256, 1), team(256, 4), team(256, 0)];
/// For others, element by element.
const RAGGED: [Team; 3] = [team(32, 4), team(256, 4), team(256, 0)];
/// Multiprocessors of the largest card: a backward pass has as many blocks as it holds at a time, so that their number depends on the shape alone.
const PROCESSORS: usize = 132;

impl Team {
    /// Threads of a block: several teams, or one of several warps.
    fn block(self) -> usize {
        if self.threads == 256 { 256 } else { 128 }
    }
    /// Rows that a block has at a time.
    fn rows(self) -> usize {
        self.block() / self.threads
    }
    /// Blocks that a multiprocessor holds.
    fn blocks(self, pass: &str) -> usize {
        let warps = match (pass, self.vecs) {
            ("forward", 1) => 32,
            ("forward", _) => 24,
            (_, 1) if self.threads < 256 => 20,
            _ => 16,
        };
        warps * 32 / self.block()
    }
}

fn kernel(pass: &str, (x, w): (DType, DType), n: usize, t: Team) -> Kernel {
    let call = format!("rms_norm_{pass}<{}, {}, {n}, {}, {}>", cpp(x), cpp(w), t.threads, t.vecs);
    Kernel::new(&SOURCE, call, t.block() as u32).min_blocks(t.blocks(pass) as u32)
}
fn kernels() -> Vec<Kernel> {
    let mut all = vec![columns_kernel(&SOURCE, DType::F32), columns_kernel(&SOURCE, DType::BF16)];
    for pass in ["forward", "backward"] {
        for d in PAIRS {
            all.extend(WHOLE.map(|t| kernel(pass, d, 16 / d.0.size(), t)));
            all.extend(RAGGED.map(|t| kernel(pass, d, 1, t)));
        }
    }
    all
}

/// Elements of a vector, and the smallest team that holds rows of `d` elements.
fn choose(d: usize, x: DType, views: &[&View]) -> Result<(usize, Team)> {
    let n = 16 / x.size();
    let whole = d.is_multiple_of(n) && aligned(16, views)?;
    let (n, teams): (usize, &[Team]) = if whole { (n, &WHOLE) } else { (1, &RAGGED) };
    let fits = |t: &&Team| d <= t.threads * t.vecs * n;
    Ok((n, *teams.iter().find(fits).unwrap_or(&team(256, 0))))
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
    let views: Vec<&View> = x.iter().chain(y).collect();
    let (vector, t) = choose(d, dtypes.0, &views)?;
    let third = x.get(2);
    let p = RmsNormParams {
        x: Ptr::of(&x[0])?, w: Ptr::of(&x[1])?, third: Ptr::of_option(third)?, y: Ptr::of(&y[0])?, sum: Ptr::of_option(y.get(1))?,
        rows: Rows::new("rms_norm", x[0].layout)?, third_rows: Rows::new("rms_norm", third.unwrap_or(&x[0]).layout)?,
        n: n as u64, d: d as u32, residual: op.residual as u32, gate: gate(op.gate), unused: 0, eps: op.eps as f32, centre: op.zero_centred as u8 as f32,
    };
    let blocks = n.div_ceil(t.rows()).min(cuda.processors() as usize * t.blocks("forward"));
    cuda.launch(&kernel("forward", dtypes, vector, t), [blocks as u32, 1, 1], 0, &p)
});

cuda_kernel!(RmsNormBackward => backward);

fn backward(op: &RmsNormBackward, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let (dtypes, (n, d)) = (dtypes(x)?, sizes(&x[0]));
    let views: Vec<&View> = x.iter().chain([&y[0]]).chain(y.get(2)).collect();
    let (vector, t) = choose(d, dtypes.0, &views)?;
    let parts = n.div_ceil(4 * t.rows()).min(PROCESSORS * t.blocks("backward"));
    let (_parts, at) = cuda.scratch(4 * parts * d)?;
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
        gate: gate(op.norm.gate),
        eps: op.norm.eps as f32,
        centre: op.norm.zero_centred as u8 as f32,
    };
    cuda.launch(&kernel("backward", dtypes, vector, t), [parts as u32, 1, 1], 0, &p)?;
    sum_columns(cuda, &SOURCE, at, parts, d, &y[1])
}
