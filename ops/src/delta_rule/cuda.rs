//! CUDA kernels of the delta rule; the algorithm is told at the heads of delta_rule.cu, delta_rule_backward.cu and delta_rule_step.cu.

use super::{DeltaRule, DeltaRuleBackward, sizes};
use cuda::kernel::{cpp, one_of};
use cuda::memory::CudaBuffer;
use cuda::{Cuda, Fault, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Error, Result, View};

cuda_source!(static FORWARD = "delta_rule.cu", kernels: forward_kernels, headers: ["delta_rule.cuh"]);
cuda_source!(static BACKWARD = "delta_rule_backward.cu", kernels: backward_kernels, headers: ["delta_rule.cuh"]);
cuda_source!(static STEP = "delta_rule_step.cu", kernels: step_kernels, headers: ["delta_rule.cuh"]);

cuda_kernel!(DeltaRule => forward);
cuda_kernel!(DeltaRuleBackward => backward);

params! { struct DeltaParams {
    q: Ptr, k: Ptr, v: Ptr, log_decay: Ptr, beta: Ptr, h0: Ptr, cu: Ptr, o: Ptr, last: Ptr, v_new: Ptr, d_o: Ptr, d_last: Ptr,
    d_q: Ptr, d_k: Ptr, d_value: Ptr, d_decay: Ptr, d_beta: Ptr, d_h0: Ptr,
    places: Ptr, bases: Ptr, factors: Ptr, w: Ptr, u: Ptr, p: Ptr, a: Ptr, m: Ptr, states: Ptr, d_states: Ptr, d_new: Ptr, d_r: Ptr, x: Ptr, s: Ptr,
    sums: Ptr, yq: Ptr, yk: Ptr,
    q_stride: [i64; 3], k_stride: [i64; 3], v_stride: [i64; 3],
    fault: Fault,
    t: u32, rows: u32, seqs: u32, hk: u32, hv: u32, dk: u32, dv: u32, chunks: u32, erase: u32, l2: u32, beta_wide: u32, cu_wide: u32,
    scale: f32,
} }

const TYPES: [DType; 2] = [DType::F32, DType::BF16];
/// Key head dims that the kernels with a state in registers are made for; others are rounded up.
const WIDTHS: [usize; 4] = [64, 128, 192, 256];
const SLAB: usize = 64;
const FACTORS: usize = 9;

/// Steps of a chunk.
fn chunk(d: DType) -> usize {
    if d == DType::F32 { 32 } else { 64 }
}
/// Bytes of a tile in shared memory, as in tile.cuh.
fn tile(d: DType, rows: usize, cols: usize) -> usize {
    let pad = if d == DType::F32 { (40 - cols % 32) % 32 } else { (cols / 8).is_multiple_of(2) as usize * 8 };
    rows * (cols + pad) * d.size()
}

fn places(d: DType) -> Kernel {
    Kernel::new(&FORWARD, format!("delta_places<{}>", chunk(d)), 256)
}
fn prepare(d: DType, back: bool) -> Kernel {
    Kernel::new(&FORWARD, format!("delta_prepare<{}, {back}>", cpp(d)), 128)
}
/// Threads of a sequential kernel: warps of 16 values, and where the keys are many, as many again for their second half.
fn threads(dk: usize, warps: usize) -> u32 {
    32 * warps as u32 * if dk > 128 { 2 } else { 1 }
}
fn scan(d: DType, dk: usize, warps: usize) -> Kernel {
    Kernel::new(&FORWARD, format!("delta_scan<{}, {dk}, {warps}>", cpp(d)), threads(dk, warps))
}
fn states(d: DType, dk: usize, warps: usize) -> Kernel {
    Kernel::new(&BACKWARD, format!("delta_states<{}, {dk}, {warps}>", cpp(d)), threads(dk, warps))
}
fn scan_back(d: DType, dk: usize, warps: usize) -> Kernel {
    Kernel::new(&BACKWARD, format!("delta_scan_back<{}, {dk}, {warps}>", cpp(d)), threads(dk, warps))
}
/// Groups of columns in the kernels of the gradients inside a chunk: a warp has 16 steps and one group.
const GROUPS: usize = 2;
fn grad(pass: &str, d: DType) -> Kernel {
    let warps = if pass == "finish" { 4 } else { chunk(d) / 16 * GROUPS };
    let two = warps == 8;
    Kernel::new(&BACKWARD, format!("delta_grad_{pass}<{}>", cpp(d)), 32 * warps as u32).min_blocks(1 + two as u32)
}
fn step(d: DType, dk: usize) -> Kernel {
    Kernel::new(&STEP, format!("delta_step<{}, {dk}>", cpp(d)), 128)
}

/// Warps of a block of the sequential kernels: fewer where there are too few blocks for the card.
const WARPS: [usize; 2] = [4, 2];
fn each(f: impl Fn(DType, usize, usize) -> Vec<Kernel>) -> Vec<Kernel> {
    TYPES.into_iter().flat_map(|d| WIDTHS.map(|dk| WARPS.map(|w| (d, dk, w)))).flatten().flat_map(|(d, dk, w)| f(d, dk, w)).collect()
}
fn forward_kernels() -> Vec<Kernel> {
    let mut all = each(|d, dk, w| vec![scan(d, dk, w)]);
    all.extend(TYPES.into_iter().flat_map(|d| [places(d), prepare(d, false), prepare(d, true)]));
    all
}
fn backward_kernels() -> Vec<Kernel> {
    let mut all = each(|d, dk, w| vec![states(d, dk, w), scan_back(d, dk, w)]);
    all.extend(TYPES.into_iter().flat_map(|d| ["squares", "rows", "finish"].map(|pass| grad(pass, d))));
    all
}
fn step_kernels() -> Vec<Kernel> {
    TYPES.into_iter().flat_map(|d| WIDTHS.map(|dk| step(d, dk))).collect()
}

/// A call: what its kernels are handed, and the memory that they share.
struct Call<'a> {
    cuda: &'a Cuda,
    p: DeltaParams,
    d: DType,
    /// Dk and Dv, rounded up.
    wide: [usize; 2],
    warps: usize,
    kept: Vec<CudaBuffer>,
}

impl<'a> Call<'a> {
    fn new(op: &DeltaRule, cuda: &'a Cuda, x: &[View]) -> Result<Self> {
        let d = one_of("delta_rule", "q", x[0].dtype, &TYPES)?;
        let [b, t, hk, hv, dk, dv] = sizes(&x[0].layout.shape, &x[2].layout.shape);
        let wide = [dk, dv].map(|n| n.next_multiple_of(SLAB));
        if wide.iter().any(|n| *n > 256) {
            return Err(Error::invalid("delta_rule", format!("head dims on CUDA are at most 256, found {dk} for keys and {dv} for values")));
        }
        let stride = |x: &View| [0, 1, 2].map(|i| x.layout.strides[i] as i64);
        let at = |i: Option<usize>| Ptr::of_option(i.map(|i| &x[i]));
        let wide_dtype = |i: Option<usize>, w: DType| i.is_some_and(|i| x[i].dtype == w) as u32;
        let seqs = op.at_cu().map_or(b, |i| x[i].layout.shape[0] - 1);
        let chunks = if op.packed { t / chunk(d) + seqs } else { t.div_ceil(chunk(d)) };
        let fault = cuda.fault("delta_rule", "cu_seqlens must rise from 0 to the packed length, found a bound of")?;
        let n = Ptr::NULL;
        let p = DeltaParams {
            q: Ptr::of(&x[0])?,
            k: Ptr::of(&x[1])?,
            v: Ptr::of(&x[2])?,
            log_decay: at(op.at_decay())?,
            beta: at(op.at_beta())?,
            h0: at(op.at_state())?,
            cu: at(op.at_cu())?,
            o: n,
            last: n,
            v_new: n,
            d_o: n,
            d_last: n,
            d_q: n,
            d_k: n,
            d_value: n,
            d_decay: n,
            d_beta: n,
            d_h0: n,
            places: n,
            bases: n,
            factors: n,
            w: n,
            u: n,
            p: n,
            a: n,
            m: n,
            states: n,
            d_states: n,
            d_new: n,
            d_r: n,
            x: n,
            s: n,
            sums: n,
            yq: n,
            yk: n,
            q_stride: stride(&x[0]),
            k_stride: stride(&x[1]),
            v_stride: stride(&x[2]),
            fault,
            t: t as u32,
            rows: (b * t) as u32,
            seqs: seqs as u32,
            hk: hk as u32,
            hv: hv as u32,
            dk: dk as u32,
            dv: dv as u32,
            chunks: chunks as u32,
            erase: op.erase as u32,
            l2: op.qk_l2norm as u32,
            beta_wide: wide_dtype(op.at_beta(), DType::F32),
            cu_wide: wide_dtype(op.at_cu(), DType::I64),
            scale: op.scale.unwrap_or((dk as f64).powf(-0.5)) as f32,
        };
        let warps = if seqs * hv * wide[1] / SLAB < cuda.processors() as usize { WARPS[1] } else { WARPS[0] };
        Ok(Call { cuda, p, d, wide, warps, kept: vec![] })
    }
    fn scratch(&mut self, bytes: usize) -> Result<Ptr> {
        let (b, p) = self.cuda.scratch(bytes)?;
        self.kept.push(b);
        Ok(p)
    }
    /// Chunks of all sequences, at most.
    fn all_chunks(&self) -> usize {
        self.p.chunks as usize * if self.p.cu == Ptr::NULL { self.p.seqs as usize } else { 1 }
    }
    /// Scratch for so many elements of each chunk and value head.
    fn per_chunk(&mut self, elements: usize, size: usize) -> Result<Ptr> {
        self.scratch(self.all_chunks() * self.p.hv as usize * elements * size)
    }
    /// A block per chunk and value head.
    fn parallel(&self, k: Kernel, shared: usize) -> Result<()> {
        self.cuda.launch(&k, [blocks(self.all_chunks() * self.p.hv as usize)?, 1, 1], shared as u32, &self.p)
    }
    /// A block per sequence, value head and part of the `width` values.
    fn sequential(&self, k: Kernel, width: usize, shared: usize) -> Result<()> {
        let parts = width.div_ceil(16 * self.warps);
        self.cuda.launch(&k, [blocks(self.p.seqs as usize * self.p.hv as usize * parts)?, 1, 1], shared as u32, &self.p)
    }
    /// The list of chunks, and all that can be had of each chunk by itself.
    fn prepare(&mut self, back: bool) -> Result<()> {
        let (d, c) = (self.d, chunk(self.d));
        if self.p.cu != Ptr::NULL {
            self.p.places = self.scratch(self.p.chunks as usize * 8)?;
            self.p.bases = self.scratch((self.p.seqs as usize + 1) * 4)?;
            self.cuda.launch(&places(d), [1, 1, 1], 0, &self.p)?;
        }
        let (e, [wk, wv], erase) = (d.size(), self.wide, self.p.erase != 0);
        self.p.factors = self.per_chunk(FACTORS * c, 4)?;
        self.p.p = self.per_chunk(c * c, e)?;
        if erase {
            self.p.w = self.per_chunk(c * wk, e)?;
        }
        if back && erase {
            self.p.a = self.per_chunk(c * c, e)?;
            self.p.m = self.per_chunk(c * c, e)?;
        } else if back {
            self.p.v_new = self.scratch(self.p.rows as usize * self.p.hv as usize * self.p.dv as usize * 4)?;
        } else {
            self.p.u = self.per_chunk(wv * c, e)?;
        }
        let (square, f32s) = (tile(d, c, c), tile(DType::F32, c, c));
        let stage = tile(d, c, SLAB).max(tile(d, SLAB, c)).max(square);
        let shared = tile(d, c, SLAB) + stage + f32s.max(2 * square) + f32s + c / 16 * tile(DType::F32, 16, 16) + FACTORS * c * 4;
        self.parallel(prepare(d, back), shared)
    }
}

fn blocks(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::invalid("delta_rule", format!("{n} blocks are more than one launch can have")))
}

fn forward(op: &DeltaRule, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let mut call = Call::new(op, cuda, x)?;
    if call.p.dv == 0 {
        return Ok(());
    }
    (call.p.o, call.p.last) = (Ptr::of(&y[0])?, Ptr::of(&y[1])?);
    if op.erase {
        call.p.v_new = Ptr::of(&y[2])?;
    }
    let (d, c, [dk, _], w) = (call.d, chunk(call.d), call.wide, call.warps);
    if call.p.t == 1 && op.state && !op.packed {
        let grid = call.p.seqs as usize * call.p.hv as usize * (call.p.dv as usize).div_ceil(32);
        return cuda.launch(&step(d, dk), [blocks(grid)?, 1, 1], 0, &call.p);
    }
    call.prepare(false)?;
    let shared = 3 * tile(d, c, dk) + tile(d, c, c) + tile(d, 16 * w, c) + 3 * c * 4;
    call.sequential(scan(d, dk, w), call.p.dv as usize, shared)
}

fn backward(op: &DeltaRuleBackward, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let rule = &op.rule;
    let mut call = Call::new(rule, cuda, x)?;
    if call.p.dv == 0 {
        return y.iter().try_for_each(|y| cuda.fill(Ptr::of(y)?, 0, y.layout.numel() * y.dtype.size()));
    }
    let out = |i: Option<usize>| Ptr::of_option(i.map(|i| &y[i]));
    let (base, direct) = (rule.inputs(), call.p.hk == call.p.hv && !rule.qk_l2norm);
    if rule.erase {
        call.p.v_new = Ptr::of(&x[base])?;
    }
    call.p.d_o = Ptr::of(&x[base + 1])?;
    call.p.d_last = Ptr::of_option(x.get(base + 2))?;
    (call.p.d_q, call.p.d_k, call.p.d_value) = (Ptr::of(&y[0])?, Ptr::of(&y[1])?, Ptr::of(&y[2])?);
    (call.p.d_decay, call.p.d_beta, call.p.d_h0) = (out(rule.at_decay())?, out(rule.at_beta())?, out(rule.at_state())?);
    call.prepare(true)?;
    let (d, c, e, [wk, wv], w) = (call.d, chunk(call.d), call.d.size(), call.wide, call.warps);
    call.p.states = call.per_chunk(wv * wk, e)?;
    let stage = tile(d, c, wk) + tile(DType::F32, c, 16 * w) + 2 * c * 4;
    call.sequential(states(d, wk, w), wv, 2 * stage)?;
    call.p.d_states = call.per_chunk(wv * wk, e)?;
    call.p.d_new = call.per_chunk(wv * c, e)?;
    call.sequential(scan_back(d, wk, w), wv, 3 * tile(d, c, wk) + tile(d, c, c) + 2 * (tile(d, c, 16 * w) + 3 * c * 4))?;

    for f in [|p: &mut DeltaParams| &mut p.x, |p: &mut DeltaParams| &mut p.s] as [fn(&mut DeltaParams) -> &mut Ptr; 2] {
        *f(&mut call.p) = call.per_chunk(c * c, e)?;
    }
    call.p.d_r = call.per_chunk(c * wv, e)?;
    call.p.sums = call.per_chunk(2 * c, 4)?;
    let (slab, square) = (tile(d, c, SLAB), tile(d, c, c));
    let factors = FACTORS * c * 4;
    call.parallel(grad("squares", d), 4 * slab + tile(d, SLAB, c) + square + factors + (2 * GROUPS + c / 16) * c * 4)?;
    let wide = call.p.rows as usize * call.p.hv as usize * call.p.dk as usize * e;
    (call.p.yq, call.p.yk) = if direct { (call.p.d_q, call.p.d_k) } else { (call.scratch(wide)?, call.scratch(wide)?) };
    call.parallel(grad("rows", d), 3 * slab + 2 * tile(d, SLAB, SLAB) + 2 * square + factors + 3 * GROUPS * c * 4 + c / 16 * GROUPS * 4)?;
    if direct {
        return Ok(());
    }
    let rows = call.p.rows as usize * call.p.hk as usize;
    cuda.launch(&grad("finish", d), [blocks(rows.div_ceil(4))?, 2, 1], 0, &call.p)
}
