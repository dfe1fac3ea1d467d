//! Launches on CUDA; the algorithm is at the head of rope.cu.

use super::Rope;
use crate::cuda::{FLOATS, Rows, aligned, blocks, float};
use cuda::kernel::cpp;
use cuda::{Cuda, FastDiv, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Error, Result, View};

cuda_source!(static SOURCE = "rope.cu", kernels: kernels, headers: ["../ops.cuh"]);

params! {
    struct RopeParams {
        x: Ptr, positions: Ptr, frequencies: Ptr, y: Ptr, rows: Rows, steps: u64, time: FastDiv, heads: FastDiv, items: FastDiv, half_items: FastDiv, d: u32, half: u32,
        per_block: u32, kind: u32, inverse: u32, unused: u32, offset: i64, exponent: f64, factor: f64,
    }
}

const THREADS: u32 = 128;
/// Vectors that a block should have, and angles that it may hold.
const WORK: usize = 512;
const ANGLES: usize = 2048;

fn kernel(dtype: DType, wide: bool) -> Kernel {
    Kernel::new(&SOURCE, format!("rope<{}, {}>", cpp(dtype), if wide { 16 / dtype.size() } else { 1 }), THREADS).min_blocks(8)
}
fn kernels() -> Vec<Kernel> {
    FLOATS.into_iter().flat_map(|d| [kernel(d, false), kernel(d, true)]).collect()
}

cuda_kernel!(Rope => launch);

fn launch(op: &Rope, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let dtype = float("rope", "x", &x[0])?;
    let [b, t, h, d] = x[0].layout.shape[..] else { return Ok(()) };
    if b * t * h * d == 0 {
        return Ok(());
    }
    let (half, vector) = (op.rotary_dim / 2, 16 / dtype.size());
    if half > ANGLES {
        return Err(Error::invalid("rope", format!("rotates up to {} entries of a head on CUDA, asked for {}", 2 * ANGLES, op.rotary_dim)));
    }
    let wide = half % vector == 0 && d % vector == 0 && aligned(16, &[&x[0], &y[0]])?;
    let n = if wide { vector } else { 1 };
    let items = (d - half) / n;
    let per_block = (WORK / (h * items)).clamp(1, (ANGLES / half.max(1)).max(1));
    let kind = match (op.positions, x.get(1)) {
        (true, Some(p)) if p.dtype == DType::I32 => 1,
        (true, Some(_)) => 2,
        _ => 0,
    };
    let p = RopeParams {
        x: Ptr::of(&x[0])?,
        positions: Ptr::of_option(x.get(1).filter(|_| op.positions))?,
        frequencies: Ptr::of_option(x.last().filter(|_| op.frequencies))?,
        y: Ptr::of(&y[0])?,
        rows: Rows::new("rope", x[0].layout)?,
        steps: (b * t) as u64,
        time: FastDiv::new(t),
        heads: FastDiv::new(h),
        items: FastDiv::new(items),
        half_items: FastDiv::new(half / n),
        d: d as u32,
        half: half as u32,
        per_block: per_block as u32,
        kind,
        inverse: op.inverse as u32,
        unused: 0,
        offset: op.offset as i64,
        exponent: if half == 0 { 0.0 } else { -op.theta.log2() / half as f64 },
        factor: op.factor,
    };
    cuda.launch(&kernel(dtype, wide), [blocks("rope", b * t, per_block)?, 1, 1], (8 * per_block * half) as u32, &p)
}
