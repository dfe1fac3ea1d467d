//! Sources and instantiations of the delta rule's CUDA kernels.

use cuda::kernel::cpp;
use cuda::{Kernel, Source, cuda_source};
use engine::DType;

cuda_source!(static FORWARD = "delta_rule.cu", kernels: forward_kernels, headers: ["delta_rule.cuh"]);
cuda_source!(static BACKWARD = "delta_rule_backward.cu", kernels: backward_kernels, headers: ["delta_rule.cuh"]);
cuda_source!(static PIECES = "delta_rule_pieces.cu", kernels: piece_kernels, headers: ["delta_rule.cuh"]);
cuda_source!(static STEP = "delta_rule_step.cu", kernels: step_kernels, headers: ["delta_rule.cuh"]);

pub const TYPES: [DType; 2] = [DType::F32, DType::BF16];
/// Key head dims that the kernels with a state in registers are made for; others are rounded up.
const WIDTHS: [usize; 4] = [64, 128, 192, 256];
pub const SLAB: usize = 64;
pub const FACTORS: usize = 9;

/// Steps of a chunk.
pub fn chunk(d: DType) -> usize {
    if d == DType::F32 { 32 } else { 64 }
}
/// Bytes of a tile in shared memory, as in tile.cuh.
pub fn tile(d: DType, rows: usize, cols: usize) -> usize {
    let pad = if d == DType::F32 { (40 - cols % 32) % 32 } else { (cols / 8).is_multiple_of(2) as usize * 8 };
    rows * (cols + pad) * d.size()
}

pub fn places(d: DType) -> Kernel {
    Kernel::new(&FORWARD, format!("delta_places<{}>", chunk(d)), 256)
}
pub fn prepare(d: DType, back: bool) -> Kernel {
    Kernel::new(&FORWARD, format!("delta_prepare<{}, {back}>", cpp(d)), 128)
}
/// Parts that the keys are divided into in the sequential kernels, as in delta_rule.cuh.
pub fn key_parts(dk: usize) -> usize {
    1 + (dk > 64) as usize
}
/// A sequential kernel: warps of 16 values for each part of the keys; two blocks a multiprocessor up to 128 keys.
fn sequential(source: &'static Source, name: &str, d: DType, dk: usize, warps: usize, sum: bool) -> Kernel {
    let blocks = 1 + (d == DType::BF16 && dk <= 128) as u32;
    Kernel::new(source, format!("{name}<{}, {dk}, {warps}, {sum}>", cpp(d)), (32 * warps * key_parts(dk)) as u32).min_blocks(blocks)
}
pub fn scan(d: DType, dk: usize, warps: usize, sum: bool) -> Kernel {
    sequential(&FORWARD, "delta_scan", d, dk, warps, sum)
}
pub fn states(d: DType, dk: usize, warps: usize, sum: bool) -> Kernel {
    sequential(&BACKWARD, "delta_states", d, dk, warps, sum)
}
pub fn scan_back(d: DType, dk: usize, warps: usize, sum: bool) -> Kernel {
    sequential(&BACKWARD, "delta_scan_back", d, dk, warps, sum)
}
pub fn join(dk: usize) -> Kernel {
    Kernel::new(&PIECES, format!("delta_join<{dk}>"), 2 * dk as u32)
}
pub fn join_decayed() -> Kernel {
    Kernel::new(&PIECES, "delta_join_decayed<float>", 256)
}
/// Groups of columns in the kernels of the gradients inside a chunk: a warp has 16 steps and one group.
pub const GROUPS: usize = 2;
pub fn grad(pass: &str, d: DType) -> Kernel {
    let warps = if pass == "finish" { 4 } else { chunk(d) / 16 * GROUPS };
    let blocks = if pass == "finish" { 8 } else { warps as u32 / 4 };
    Kernel::new(&BACKWARD, format!("delta_grad_{pass}<{}>", cpp(d)), 32 * warps as u32).min_blocks(blocks)
}
pub fn step(d: DType, dk: usize) -> Kernel {
    Kernel::new(&STEP, format!("delta_step<{}, {dk}>", cpp(d)), 128)
}

/// Warps of a block of the sequential kernels: fewer where there are too few blocks for the card.
pub const WARPS: [usize; 2] = [4, 2];
/// Each sequential kernel as it walks whole sequences or pieces, and as it sums pieces up.
const FORMS: [(usize, bool); 3] = [(WARPS[0], false), (WARPS[1], false), (WARPS[0], true)];
fn each(f: impl Fn(DType, usize, usize, bool) -> Vec<Kernel>) -> Vec<Kernel> {
    TYPES
        .into_iter()
        .flat_map(|d| WIDTHS.map(|dk| FORMS.map(|(w, sum)| (d, dk, w, sum))))
        .flatten()
        .flat_map(|(d, dk, w, sum)| f(d, dk, w, sum))
        .collect()
}
fn forward_kernels() -> Vec<Kernel> {
    let mut all = each(|d, dk, w, sum| vec![scan(d, dk, w, sum)]);
    all.extend(TYPES.into_iter().flat_map(|d| [places(d), prepare(d, false), prepare(d, true)]));
    all
}
fn backward_kernels() -> Vec<Kernel> {
    let mut all = each(|d, dk, w, sum| vec![states(d, dk, w, sum), scan_back(d, dk, w, sum)]);
    all.extend(TYPES.into_iter().flat_map(|d| ["squares", "rows", "finish"].map(|pass| grad(pass, d))));
    all
}
fn piece_kernels() -> Vec<Kernel> {
    WIDTHS.map(join).into_iter().chain([join_decayed()]).collect()
}
fn step_kernels() -> Vec<Kernel> {
    TYPES.into_iter().flat_map(|d| WIDTHS.map(|dk| step(d, dk))).collect()
}
