//! Launches on CUDA; the algorithm is at the head of linear_cross_entropy.cu.

use super::{IGNORE, LinearCrossEntropy};
use crate::cuda::{FLOATS, blocks, float};
use cuda::kernel::cpp;
use cuda::{Cuda, Fault, Gemm, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Error, Result, View};

cuda_source!(static SOURCE = "linear_cross_entropy.cu", kernels: kernels);

params! {
    struct TargetsParams { targets: Ptr, counted: Ptr, n: u64, vocab: u64, ignore: i64, wrong: Fault, none: Fault }
    struct LossParams { z: Ptr, targets: Ptr, losses: Ptr, counted: Ptr, vocab: u32, stride: u32, grad: u32, unused: u32 }
    struct MeanParams { losses: Ptr, counted: Ptr, out: Ptr, n: u64 }
    struct RoundParams { from: Ptr, to: Ptr, n: u64 }
}

/// Logits that are held at a time: 1 GiB. Few on the emulator, so that small shapes take several blocks of rows.
const LOGITS: usize = 1 << 28;
const EMULATED_LOGITS: usize = 1 << 10;
/// Rows of a block at least.
const ROWS: usize = 16;

const THREADS: usize = 512;
/// Vectors of 4 logits of a row that a thread holds (0: rows are read twice), and blocks that a multiprocessor holds.
const HELD: [(usize, u32); 3] = [(8, 2), (16, 1), (0, 2)];

fn loss(d: DType, (held, blocks): (usize, u32)) -> Kernel {
    Kernel::new(&SOURCE, format!("loss<{}, {held}>", cpp(d)), THREADS as u32).min_blocks(blocks)
}
fn one(name: &str) -> Kernel {
    Kernel::new(&SOURCE, format!("{name}<0>"), 1024)
}
fn round() -> Kernel {
    Kernel::new(&SOURCE, "round_to<bf16>", 256)
}
fn kernels() -> Vec<Kernel> {
    FLOATS.into_iter().flat_map(|d| HELD.map(|h| loss(d, h))).chain([one("count_targets"), one("mean_loss"), round()]).collect()
}

cuda_kernel!(LinearCrossEntropy => forward);

fn forward(op: &LinearCrossEntropy, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let name = "linear_cross_entropy";
    let d = float(name, "x", &x[0])?;
    let (n, h, vocab) = (x[0].layout.shape[0], x[0].layout.shape[1], x[1].layout.shape[0]);
    if vocab > i32::MAX as usize / 2 {
        return Err(Error::invalid(name, format!("takes vocabularies of up to 2³⁰ on CUDA, found {vocab}")));
    }
    let (v, w, targets) = (Ptr::of(&x[0])?, Ptr::of(&x[1])?, Ptr::of(&x[2])?);
    let dx = if op.train[0] { Some(Ptr::of(&y[2])?) } else { None };
    let dw = if op.train[1] { Some(Ptr::of(&y[2 + op.train[0] as usize])?) } else { None };

    let (_counted, counted) = cuda.scratch(4)?;
    let wrong = cuda.fault(name, "a target is neither in the vocabulary nor -100 (ignored)")?;
    let none = cuda.fault(name, "no target counts: all are -100 (ignored), or there are none; targets")?;
    cuda.launch(
        &one("count_targets"),
        [1, 1, 1],
        0,
        &TargetsParams { targets, counted, n: n as u64, vocab: vocab as u64, ignore: IGNORE, wrong, none },
    )?;

    // rows of logits are whole vectors, so that they and their gradients are aligned
    let stride = vocab.next_multiple_of(8);
    let held = if cuda.is_emulator() { EMULATED_LOGITS } else { LOGITS };
    let most = (held / stride.max(1)).max(ROWS);
    let parts = n.div_ceil(most).max(1);
    let rows = n.div_ceil(parts).next_multiple_of(ROWS);
    let kernel = loss(d, HELD.into_iter().find(|(held, _)| vocab <= held * 4 * THREADS).unwrap_or(HELD[2]));
    let (_z, z) = cuda.scratch(4 * rows.min(n) * stride)?;
    // over several blocks, the weight's gradient is summed in f32
    let wide = dw.is_some() && d != DType::F32 && rows < n;
    let sum = if wide { Some(cuda.scratch(4 * vocab * h)?) } else { None };
    let (dw_to, dw_dtype) = sum.as_ref().map_or((dw, d), |s| (Some(s.1), DType::F32));
    if let (0, Some(dw)) = (n, dw) {
        cuda.fill(dw, 0, vocab * h * d.size())?;
    }
    for at in (0..n).step_by(rows) {
        let m = rows.min(n - at);
        let xs = v.byte_add(at * h * d.size());
        let logits = Gemm::new(d, (m, vocab, h), xs.0, w.0, z.0);
        cuda.gemm(&Gemm { b_trans: true, b_ld: h, c_ld: stride, c_dtype: DType::F32, ..logits })?;
        let (targets, losses) = (targets.byte_add(8 * at), Ptr::of(&y[1])?.byte_add(4 * at));
        let grad = (dx.is_some() || dw.is_some()) as u32;
        let p = LossParams { z, targets, losses, counted, vocab: vocab as u32, stride: stride as u32, grad, unused: 0 };
        cuda.launch(&kernel, [m as u32, 1, 1], 0, &p)?;
        let dz_ld = stride * 4 / d.size();
        if let Some(dx) = dx {
            cuda.gemm(&Gemm { a_ld: dz_ld, ..Gemm::new(d, (m, h, vocab), z.0, w.0, dx.byte_add(at * h * d.size()).0) })?;
        }
        if let Some(dw) = dw_to {
            let g = Gemm::new(d, (vocab, h, m), z.0, xs.0, dw.0);
            cuda.gemm(&Gemm { a_trans: true, a_ld: dz_ld, c_dtype: dw_dtype, accumulate: at > 0, ..g })?;
        }
    }
    if let (Some((_, from)), Some(to)) = (&sum, dw) {
        let n = vocab * h;
        cuda.launch(&round(), [blocks(name, n, 2048)?, 1, 1], 0, &RoundParams { from: *from, to, n: n as u64 })?;
    }
    cuda.launch(&one("mean_loss"), [1, 1, 1], 0, &MeanParams { losses: Ptr::of(&y[1])?, counted, out: Ptr::of(&y[0])?, n: n as u64 })
}
