//! CUDA kernels: which instantiation, what it is handed, in how many blocks. The algorithms stand at the head of each `.cu`.

use super::{Activation, Attention, AttentionPattern, BACKWARD, Gate, GatedSdpa, GatedSdpaBackward, NAME};
use cuda::kernel::{FastDiv, Fault, cpp, one_of};
use cuda::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Error, Layout, Result, View};

cuda_source!(static FORWARD_SOURCE = "gated_sdpa.cu", kernels: forward_kernels, headers: ["gated_sdpa.cuh"]);
cuda_source!(static HOPPER_SOURCE = "gated_sdpa_hopper.cu", kernels: hopper_kernels, headers: ["gated_sdpa.cuh"]);
cuda_source!(static BACKWARD_SOURCE = "gated_sdpa_backward.cu", kernels: backward_kernels, headers: ["gated_sdpa.cuh"]);
cuda_source!(static HOPPER_BACKWARD_SOURCE = "gated_sdpa_backward_hopper.cu", kernels: hopper_backward_kernels, headers: ["gated_sdpa.cuh"]);
cuda_source!(static PATTERN_SOURCE = "attention_pattern.cu", kernels: pattern_kernels, headers: ["gated_sdpa.cuh"]);

cuda_kernel!(GatedSdpa => forward);
cuda_kernel!(GatedSdpaBackward => backward);
cuda_kernel!(AttentionPattern => pattern);

/// Head dims that kernels are written for; others are filled up with zeros in shared memory to the next.
const HEAD_DIMS: [usize; 6] = [32, 64, 96, 128, 192, 256];
const DTYPES: [DType; 2] = [DType::BF16, DType::F32];
/// Threads of a block where rows are handled one by one.
const ROW_THREADS: u32 = 256;
/// Up to so many rows per key/value head, a block has one warp.
const FEW_ROWS: usize = 16;
/// A split over keys gives each block at least so many.
const MIN_SPLIT: usize = 256;
/// What the heads whose blocks run side by side may stream, so that it stays in L2 (50 MB on an H200).
const SECTION_BYTES: usize = 32 << 20;
/// Shared memory of a block from which the backward of wide heads has room for another buffer (Hopper has it, Ampere does not).
const LARGE_SHARED: u32 = 200 << 10;

/// An array `[B, T, H, ..]` with a dense last axis: address, and strides in elements.
type Strided = [i64; 4];
const NOTHING: Strided = [0; 4];

params! {
    struct SdpaParams {
        q: Strided, k: Strided, v: Strided, gate: Strided, o: Strided, u: Strided,
        dy: Strided, du: Strided, dq: Strided, dk: Strided, dv: Strided, dgate: Strided,
        lse: Ptr, stats: Ptr, partial: Ptr, cu: Ptr, pattern: Ptr, fault: Fault,
        group: FastDiv, heads: FastDiv, tiles: FastDiv, rows: FastDiv, section: FastDiv,
        queries: i32, keys: i32, r: i32, h: i32, hkv: i32, d: i32, dv_cols: i32,
        window: i32, causal: i32, n_tiles: i32, cu_count: i32, cu_wide: i32, splits: i32, split_from: i32, split_span: i32,
        vec: u32, activation: u32, additive: u32, gating: u32, team: u32,
        c: f32, flip: f32, scale: f32, total: u32,
    }
}
const VEC_Q: u32 = 1;
const VEC_K: u32 = 2;
const VEC_V: u32 = 4;
const VEC_O: u32 = 16;
const VEC_DU: u32 = 32;
const VEC_DQ: u32 = 64;
const VEC_DK: u32 = 128;
const VEC_DV: u32 = 256;
const VEC_PREPARE: u32 = 512;

/// Elements from one row of a shared tile to the next, as `TilePad` in tile.cuh has it.
fn stride(dtype: DType, cols: usize) -> usize {
    match dtype {
        DType::F32 => cols + (40 - cols % 32) % 32,
        _ => cols + if (cols / 8).is_multiple_of(2) { 8 } else { 0 },
    }
}
fn tile(dtype: DType, rows: usize, cols: usize) -> usize {
    rows * stride(dtype, cols) * dtype.size()
}

/// Tiles of the forward.
#[derive(Clone, Copy)]
struct Forward {
    dtype: DType,
    head: usize,
    /// Fragments of 16 rows that a warp has.
    m: usize,
    warps: usize,
    keys: usize,
}

impl Forward {
    fn new(dtype: DType, head: usize, few: bool) -> Self {
        let (m, warps, keys) = match (dtype, few) {
            (DType::F32, _) => (1, 4, 32),
            (_, true) => (1, 1, 64),
            (_, false) if head <= 128 => (2, 4, 64),
            _ => (1, 8, 64),
        };
        Forward { dtype, head, m, warps, keys }
    }
    fn rows(&self) -> usize {
        16 * self.m * self.warps
    }
    fn shared(&self) -> u32 {
        (tile(self.dtype, self.rows(), self.head) + 2 * tile(self.dtype, self.keys, self.head) + 8 * self.rows() + 32) as u32
    }
    fn kernel(&self) -> Kernel {
        let call = format!("sdpa_forward<{}, {}, {}, {}, {}>", cpp(self.dtype), self.head, self.m, self.warps, self.keys);
        Kernel::new(&FORWARD_SOURCE, call, 32 * self.warps as u32).min_blocks(if self.warps == 4 { 2 } else { 1 })
    }
}

/// Head dims of Hopper's variants, and the rows (and the forward's keys) of their tiles.
const HOPPER_HEADS: [usize; 2] = [64, 128];
const HOPPER_TILE: usize = 128;
/// From so many of its blocks on, heads' keys are not split.
const HOPPER_BLOCKS: usize = 64;

fn hopper_kernel(head: usize) -> Kernel {
    Kernel::new(&HOPPER_SOURCE, format!("sdpa_forward_hopper<{head}>"), 384).hopper()
}
fn hopper_kernels() -> Vec<Kernel> {
    HOPPER_HEADS.map(hopper_kernel).into()
}
/// Q, two tiles of K and two of V, the gate's logits, and the rows' bounds.
fn hopper_shared(head: usize) -> u32 {
    (6 * HOPPER_TILE * head * 2 + 8 * HOPPER_TILE) as u32
}
/// Streaming rows of a step of Hopper's backward, and steps that there is room for.
const HOPPER_STEP: usize = 64;
const HOPPER_STAGES: usize = 3;

fn hopper_backward_kernel(head: usize, of_keys: bool) -> Kernel {
    let call = format!("sdpa_backward_hopper<{head}, {of_keys}, {HOPPER_STEP}, {HOPPER_STAGES}>");
    Kernel::new(&HOPPER_BACKWARD_SOURCE, call, 384).hopper()
}
fn hopper_backward_kernels() -> Vec<Kernel> {
    HOPPER_HEADS.into_iter().flat_map(|head| [true, false].map(|of_keys| hopper_backward_kernel(head, of_keys))).collect()
}
/// Two tiles that stay, two of each step, the streaming rows' numbers, and the rows' bounds.
fn hopper_backward_shared(head: usize, of_keys: bool) -> u32 {
    let stats = if of_keys { 8 * HOPPER_STEP } else { 0 };
    (2 * HOPPER_TILE * head * 2 + HOPPER_STAGES * (2 * HOPPER_STEP * head * 2 + stats) + 8 * HOPPER_TILE) as u32
}

/// Tiles of the backward.
#[derive(Clone, Copy)]
struct Backward {
    dtype: DType,
    head: usize,
    of_keys: bool,
    m: usize,
    /// Warps of a team.
    w: usize,
    warps: usize,
    step: usize,
    buffers: usize,
}

impl Backward {
    fn new(dtype: DType, head: usize, of_keys: bool, large: bool) -> Self {
        let (m, w, warps, step) = match (dtype, head) {
            (DType::F32, ..=64) => (1, 1, 4, 32),
            (DType::F32, ..=128) => (1, 2, 8, 32),
            (DType::F32, _) => (1, 4, 8, 32),
            (_, ..=64) => (2, 1, 4, 32),
            (_, ..=128) if of_keys => (2, 2, 8, 64),
            (_, ..=128) => (2, 1, 4, 32),
            _ => (2, 4, 8, 64),
        };
        let buffers = if head > 192 && !(large && dtype == DType::BF16) { 1 } else { 2 };
        Backward { dtype, head, of_keys, m, w, warps, step, buffers }
    }
    fn rows(&self) -> usize {
        16 * self.m * self.warps / self.w
    }
    fn shared(&self) -> u32 {
        let (stay, stream) = (tile(self.dtype, self.rows(), self.head), tile(self.dtype, self.step, self.head));
        let stats = if self.of_keys { self.step * 8 } else { 0 };
        let scores = if self.w > 1 { tile(self.dtype, self.rows(), self.step) * (1 + self.of_keys as usize) } else { 0 };
        (2 * stay + self.buffers * (stream + stats) + stream + scores + 8 * self.rows()) as u32
    }
    fn kernel(&self) -> Kernel {
        let Backward { dtype, head, of_keys, m, w, warps, step, buffers } = self;
        let call = format!("sdpa_backward<{}, {head}, {of_keys}, {m}, {w}, {warps}, {step}, {buffers}>", cpp(*dtype));
        Kernel::new(&BACKWARD_SOURCE, call, 32 * *warps as u32).min_blocks(if *warps == 4 { 2 } else { 1 })
    }
}

fn row_kernel(source: &'static cuda::Source, name: &str, dtype: DType) -> Kernel {
    Kernel::new(source, format!("{name}<{}>", cpp(dtype)), ROW_THREADS)
}

fn prepare_kernel(dtype: DType) -> Kernel {
    row_kernel(&BACKWARD_SOURCE, "sdpa_prepare", dtype).min_blocks(4)
}

fn forward_kernels() -> Vec<Kernel> {
    let tiled = DTYPES.iter().flat_map(|t| HEAD_DIMS.map(|d| Forward::new(*t, d, false).kernel()));
    let few = HEAD_DIMS.map(|d| Forward::new(DType::BF16, d, true).kernel());
    tiled.chain(few).chain(DTYPES.map(|t| row_kernel(&FORWARD_SOURCE, "sdpa_combine", t))).collect()
}
fn backward_kernels() -> Vec<Kernel> {
    let mut all: Vec<Kernel> = DTYPES.map(prepare_kernel).into();
    for dtype in DTYPES {
        for head in HEAD_DIMS {
            for (of_keys, large) in [(true, true), (false, true), (true, false), (false, false)] {
                let kernel = Backward::new(dtype, head, of_keys, large).kernel();
                if !all.contains(&kernel) {
                    all.push(kernel);
                }
            }
        }
    }
    all
}
fn pattern_kernels() -> Vec<Kernel> {
    DTYPES.map(|t| row_kernel(&PATTERN_SOURCE, "attention_pattern", t)).into()
}

/// Rows of `x` as the kernels see them.
fn strided(x: &View) -> Result<Strided> {
    let s = &x.layout.strides;
    Ok([Ptr::of(x)?.0 as i64, s[0] as i64, s[1] as i64, s[2] as i64])
}

/// Whether every row of `cols` elements begins at a multiple of `bytes` and is a whole number of them.
fn aligned(x: &View, cols: usize, bytes: usize) -> Result<bool> {
    let size = x.dtype.size();
    let Layout { shape, strides, .. } = x.layout;
    let steps = shape.iter().zip(strides).take(3).all(|(n, s)| *n <= 1 || (*s as usize * size).is_multiple_of(bytes));
    Ok(steps && (cols * size).is_multiple_of(bytes) && (Ptr::of(x)?.0 as usize).is_multiple_of(bytes))
}
fn flag(bit: u32, x: &View, cols: usize) -> Result<u32> {
    Ok(if aligned(x, cols, 16)? { bit } else { 0 })
}

/// The smallest supported head dim that holds d.
fn head_dim(op: &'static str, d: usize) -> Result<usize> {
    HEAD_DIMS.into_iter().find(|h| *h >= d).ok_or_else(|| {
        Error::invalid(op, format!("head dims on CUDA are at most 256 (kernels are written for {HEAD_DIMS:?}, others are filled up), found {d}"))
    })
}

/// What all kernels are told of the problem; the rest is zero.
fn problem(op: &'static str, cuda: &Cuda, a: &Attention, q: &View, k: &View, dv: usize, cu: Option<&View>) -> Result<SdpaParams> {
    one_of(op, "q", q.dtype, &DTYPES)?;
    let (s, t) = (&q.layout.shape, &k.layout.shape);
    let (b, queries, h, d, keys, hkv) = (s[0], s[1], s[2], s[3], t[1], t[2]);
    let total = b * queries * h;
    if total >= 1 << 30 || keys >= 1 << 30 || b * keys * hkv >= 1 << 30 {
        let msg = format!("on CUDA B·T·H and B·S·Hkv must be below 2³⁰, found B {b}, T {queries}, H {h}, S {keys}, Hkv {hkv}");
        return Err(Error::invalid(op, msg));
    }
    let cu_count = cu.map_or(0, |c| c.layout.shape[0]);
    let scale = a.scale(d);
    let c = (scale * std::f64::consts::LOG2_E).abs() as f32;
    Ok(SdpaParams {
        q: strided(q)?,
        k: strided(k)?,
        v: NOTHING,
        gate: NOTHING,
        o: NOTHING,
        u: NOTHING,
        dy: NOTHING,
        du: NOTHING,
        dq: NOTHING,
        dk: NOTHING,
        dv: NOTHING,
        dgate: NOTHING,
        lse: Ptr::NULL,
        stats: Ptr::NULL,
        partial: Ptr::NULL,
        cu: Ptr::of_option(cu)?,
        pattern: Ptr::NULL,
        fault: cuda.fault(op, "cu_seqlens must rise from 0 to T, found")?,
        group: FastDiv::new(h / hkv),
        heads: FastDiv::new(hkv),
        tiles: FastDiv::new(1),
        rows: FastDiv::new(queries * (h / hkv)),
        section: FastDiv::new(1),
        queries: queries as i32,
        keys: keys as i32,
        r: (queries * (h / hkv)) as i32,
        h: h as i32,
        hkv: hkv as i32,
        d: d as i32,
        dv_cols: dv as i32,
        window: a.window.unwrap_or(keys).min(keys) as i32,
        causal: a.causal as i32,
        n_tiles: 0,
        cu_count: cu_count as i32,
        cu_wide: cu.is_some_and(|c| c.dtype == DType::I64) as i32,
        splits: 1,
        split_from: 0,
        split_span: 0,
        vec: flag(VEC_Q, q, d)? | flag(VEC_K, k, d)?,
        activation: 0,
        additive: 0,
        gating: 0,
        team: 0,
        // a scale of 0 makes all scores 0
        c: if c == 0.0 { 1.0 } else { c },
        flip: if c == 0.0 { 0.0 } else { 1f32.copysign(scale as f32) },
        scale: scale as f32,
        total: total as u32,
    })
}

fn on_hopper(cuda: &Cuda, dtype: DType, head: usize) -> bool {
    cuda.is_hopper() && dtype == DType::BF16 && HOPPER_HEADS.contains(&head)
}

impl SdpaParams {
    fn has(&self, vectors: u32) -> bool {
        self.vec & vectors == vectors
    }
    /// The number of blocks, for `heads` times `rows` rows of which a block has `per_tile` and goes over `streamed` bytes of its head.
    fn set_tiles(&mut self, heads: usize, rows: usize, per_tile: usize, streamed: usize) -> u32 {
        let n = rows.div_ceil(per_tile);
        self.n_tiles = n as i32;
        self.tiles = FastDiv::new(n);
        let most = (SECTION_BYTES / streamed.max(1)).clamp(1, heads.max(1));
        self.section = FastDiv::new((1..=most).rev().find(|s| heads.is_multiple_of(*s)).unwrap_or(1));
        (n * heads) as u32
    }
    fn set_gate(&mut self, gate: Option<Gate>, logits: Option<&View>) -> Result<()> {
        let (Some(gate), Some(logits)) = (gate, logits) else { return Ok(()) };
        self.gate = strided(logits)?;
        self.gating = logits.layout.shape.len() as u32 - 2;
        self.additive = gate.additive as u32;
        self.activation = match gate.activation {
            Activation::Sigmoid => 0,
            Activation::Silu => 1,
            Activation::NsSigmoid => 2,
            Activation::Identity => 3,
        };
        Ok(())
    }
}

fn forward(op: &GatedSdpa, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let dtype = x[0].dtype;
    let dv = x[2].layout.shape[3];
    let mut p = problem(NAME, cuda, &op.attention, &x[0], &x[1], dv, op.packed.then(|| &x[x.len() - 1]))?;
    let head = head_dim(NAME, dv.max(p.d as usize))?;
    let (b, rows, keys) = (x[0].layout.shape[0], p.r as usize, p.keys as usize);
    p.v = strided(&x[2])?;
    p.o = strided(&y[0])?;
    p.lse = Ptr::of(&y[1])?;
    p.vec |= flag(VEC_V, &x[2], dv)?;
    p.set_gate(op.gate, x.get(3))?;
    let mut whole = aligned(&y[0], dv, 16)?;
    if p.gating > 0 {
        p.u = strided(&y[2])?;
        whole &= aligned(&y[2], dv, 16)? && (p.gating == 1 || aligned(&x[3], dv, 16)?);
    }
    p.vec |= if whole { VEC_O } else { 0 };
    let few = dtype == DType::BF16 && rows <= FEW_ROWS;
    let f = Forward::new(dtype, head, few);
    let (heads, streamed) = (b * p.hkv as usize, keys * (p.d as usize + dv) * dtype.size());
    let blocks = p.set_tiles(heads, rows, f.rows(), streamed);
    if blocks == 0 {
        return Ok(());
    }
    // too few blocks to fill a card share a head's keys; how many do depends on shapes alone
    if !op.packed {
        let from = (keys - p.queries as usize + 1).saturating_sub(p.window as usize) / f.keys * f.keys;
        let fill = if few { 528 } else { 264 };
        let splits = (fill / blocks as usize).min((keys - from) / MIN_SPLIT).max(1);
        let span = (keys - from).div_ceil(splits).next_multiple_of(f.keys);
        p.splits = (keys - from).div_ceil(span) as i32;
        p.split_from = from as i32;
        p.split_span = span as i32;
    }
    // Hopper's variant: rows are whole vectors, scores are not turned around, keys are not split or need not be
    let fits = on_hopper(cuda, dtype, head) && p.has(VEC_Q | VEC_K | VEC_V) && p.flip == 1.0 && !few;
    if fits && (p.splits == 1 || heads * rows.div_ceil(HOPPER_TILE) >= HOPPER_BLOCKS) {
        p.splits = 1;
        let blocks = p.set_tiles(heads, rows, HOPPER_TILE, streamed);
        return cuda.launch(&hopper_kernel(head), [blocks, 1, 1], hopper_shared(head), &p);
    }
    let grid = [blocks, p.splits as u32, 1];
    if p.splits == 1 {
        return cuda.launch(&f.kernel(), grid, f.shared(), &p);
    }
    let (_held, partial) = cuda.scratch(p.splits as usize * p.total as usize * (dv + 1) * 4)?;
    p.partial = partial;
    cuda.launch(&f.kernel(), grid, f.shared(), &p)?;
    cuda.launch(&row_kernel(&FORWARD_SOURCE, "sdpa_combine", dtype), [p.total.div_ceil(ROW_THREADS / 32), 1, 1], 0, &p)
}

fn backward(op: &GatedSdpaBackward, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let op = &op.0;
    let (dtype, n) = (x[0].dtype, x.len() - 3);
    let (u, lse, dy) = (&x[n], &x[n + 1], &x[n + 2]);
    let dv = x[2].layout.shape[3];
    let mut p = problem(BACKWARD, cuda, &op.attention, &x[0], &x[1], dv, op.packed.then(|| &x[n - 1]))?;
    let (d, rows, keys) = (p.d as usize, p.r as usize, p.keys as usize);
    let head = head_dim(BACKWARD, d.max(dv))?;
    let heads = x[0].layout.shape[0] * p.hkv as usize;
    (p.v, p.u, p.dy, p.du) = (strided(&x[2])?, strided(u)?, strided(dy)?, strided(dy)?);
    (p.dq, p.dk, p.dv) = (strided(&y[0])?, strided(&y[1])?, strided(&y[2])?);
    p.lse = Ptr::of(lse)?;
    p.vec |= flag(VEC_V, &x[2], dv)? | flag(VEC_DQ, &y[0], d)? | flag(VEC_DK, &y[1], d)? | flag(VEC_DV, &y[2], dv)?;
    p.set_gate(op.gate, x.get(3))?;

    let (_stats, stats) = cuda.scratch(heads * (rows + rows % 2) * 8)?;
    p.stats = stats;
    let mut whole = aligned(dy, dv, 16)? && aligned(u, dv, 16)?;
    if p.gating > 0 {
        p.dgate = strided(&y[3])?;
        whole &= p.gating == 1 || (aligned(&x[3], dv, 16)? && aligned(&y[3], dv, 16)?);
    }
    // gates that multiply need du beside dy
    let du = if p.gating > 0 && p.additive == 0 { Some(cuda.scratch(p.total as usize * dv * dtype.size())?) } else { None };
    if let Some((_, at)) = &du {
        let h = p.h as i64;
        p.du = [at.0 as i64, p.queries as i64 * h * dv as i64, h * dv as i64, dv as i64];
        let scratch_aligned = (dv * dtype.size()).is_multiple_of(16);
        whole &= scratch_aligned;
        p.vec |= if scratch_aligned { VEC_DU } else { 0 };
    } else {
        p.vec |= flag(VEC_DU, dy, dv)?;
    }
    p.vec |= if whole { VEC_PREPARE } else { 0 };
    p.team = dv.div_ceil(16 / dtype.size()).next_power_of_two().min(32) as u32;
    cuda.launch(&prepare_kernel(dtype), [p.total.div_ceil(ROW_THREADS / p.team), 1, 1], 0, &p)?;

    let large = cuda.shared_limit() >= LARGE_SHARED;
    let hopper = on_hopper(cuda, dtype, head) && p.has(VEC_Q | VEC_K | VEC_V | VEC_DU);
    for (of_keys, stay) in [(true, keys), (false, rows)] {
        if hopper {
            let blocks = p.set_tiles(heads, stay, HOPPER_TILE, (if of_keys { rows } else { keys }) * (d + dv) * dtype.size());
            cuda.launch(&hopper_backward_kernel(head, of_keys), [blocks, 1, 1], hopper_backward_shared(head, of_keys), &p)?;
            continue;
        }
        let b = Backward::new(dtype, head, of_keys, large);
        let blocks = p.set_tiles(heads, stay, b.rows(), (if of_keys { rows } else { keys }) * (d + dv) * dtype.size());
        cuda.launch(&b.kernel(), [blocks, 1, 1], b.shared(), &p)?;
    }
    Ok(())
}

fn pattern(op: &AttentionPattern, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    const OP: &str = "attention_pattern";
    let mut p = problem(OP, cuda, &op.attention, &x[0], &x[1], 0, op.packed.then(|| &x[2]))?;
    p.pattern = Ptr::of(&y[0])?;
    p.team = (p.d as u32).next_multiple_of(8);
    let warps = ROW_THREADS / 32;
    cuda.launch(&row_kernel(&PATTERN_SOURCE, OP, x[0].dtype), [p.total.div_ceil(warps), 1, 1], warps * p.team * 4, &p)
}
