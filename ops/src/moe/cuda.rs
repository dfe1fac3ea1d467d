//! Launches on CUDA; the algorithms are at the heads of routing.cu, grouped.cu and grouped_hopper.cu.

use super::{Moe, MoeBackward, sizes};
use crate::cuda::{FLOATS, aligned, blocks, float};
use cuda::kernel::{cpp, one_of};
use cuda::memory::CudaBuffer;
use cuda::{Cuda, FastDiv, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::{DType, Error, Result, View};

cuda_source!(static ROUTING = "routing.cu", kernels: routing_kernels, headers: ["../ops.cuh"]);
cuda_source!(static GROUPED = "grouped.cu", kernels: grouped_kernels);
cuda_source!(static HOPPER = "grouped_hopper.cu", kernels: hopper_kernels);

params! {
    struct RouteParams { logits: Ptr, expert: Ptr, weight: Ptr, total: Ptr, counts: Ptr, n: u32, e: u32, k: u32, norm: u32 }
    struct SortParams {
        expert: Ptr, counts: Ptr, all: Ptr, starts: Ptr, tiles: Ptr, out: Ptr, order: Ptr, place: Ptr, blocks: u32, e: u32, k: u32, slots: u32,
    }
    struct CombineParams { rows: Ptr, y: Ptr, weight: Ptr, place: Ptr, n: u64, per_row: FastDiv, k: u32, width: u32, wide: u32, many: u32, unused: u32 }
    struct ActivationParams {
        projections: Ptr, weight: Ptr, dact: Ptr, dprojections: Ptr, act: Ptr, dweight: Ptr, order: Ptr, slots: u32, width: u32, wide: u32, unused: u32,
    }
    struct RouterParams { logits: Ptr, dlogits: Ptr, expert: Ptr, weight: Ptr, total: Ptr, dweight: Ptr, n: u32, e: u32, k: u32, norm: u32 }
    struct GroupedParams {
        a: Ptr, b: Ptr, c: Ptr, act: Ptr, order: Ptr, starts: Ptr, tiles: Ptr, k: FastDiv, across: FastDiv, experts: u32, rows_of: u32, cols: u32,
        depth: u32, gather: u32, each: FastDiv,
    }
}

const THREADS: u32 = 256;
/// As in the sources: tokens of a routing block, and the tile of a product.
const TOKENS: usize = 32;
const TILE: usize = 128;
/// What routing has shared memory for.
const MAX_EXPERTS: usize = 1024;
const MAX_TOP_K: usize = 128;

fn routing(call: String, threads: u32) -> Kernel {
    Kernel::new(&ROUTING, call, threads)
}
fn routing_kernels() -> Vec<Kernel> {
    let mut all: Vec<Kernel> =
        FLOATS.into_iter().flat_map(|d| ["route", "router_backward", "combine", "activation_backward"].map(|k| typed(k, d))).collect();
    all.extend([plain("scan_blocks", 128), plain("scan_experts", 32), plain("sort_slots", THREADS)]);
    all
}
fn typed(name: &str, d: DType) -> Kernel {
    routing(format!("{name}<{}>", cpp(d)), THREADS)
}
fn plain(name: &str, threads: u32) -> Kernel {
    routing(format!("{name}<0>"), threads)
}

/// `mode`: how B lies; `out`: of a weight's gradient, of which A or B is read through the permutation.
fn grouped_rows(d: DType, mode: u32) -> Kernel {
    grouped("rows", d, format!("{}, {mode}", cpp(d)))
}
fn grouped_weights(d: DType, out: DType, gather_a: bool) -> Kernel {
    grouped("weights", d, format!("{}, {}, {gather_a}", cpp(d), cpp(out)))
}
fn grouped(name: &str, d: DType, args: String) -> Kernel {
    Kernel::new(&GROUPED, format!("grouped_{name}<{args}>"), THREADS).min_blocks(if d == DType::BF16 { 2 } else { 1 })
}
/// Dtypes of the rows, and of a weight's gradient beside them.
const GRADIENTS: [(DType, DType); 3] = [(DType::F32, DType::F32), (DType::BF16, DType::BF16), (DType::BF16, DType::F32)];
fn grouped_kernels() -> Vec<Kernel> {
    let mut all: Vec<Kernel> = FLOATS.into_iter().flat_map(|d| [0, 1, 2].map(|mode| grouped_rows(d, mode))).collect();
    all.extend(GRADIENTS.into_iter().flat_map(|(d, out)| [true, false].map(|gather_a| grouped_weights(d, out, gather_a))));
    all
}
/// As in grouped_hopper.cu: rows with a product B[columns, depth], the same with the activation, B[depth, columns], a weight's gradient with A or B
/// read through the permutation.
fn on_hopper(kind: u32, out: DType) -> Kernel {
    Kernel::new(&HOPPER, format!("grouped<{kind}, {}>", cpp(out)), THREADS).hopper()
}
fn hopper_kernels() -> Vec<Kernel> {
    (0..5).map(|kind| on_hopper(kind, DType::BF16)).chain([3, 4].map(|kind| on_hopper(kind, DType::F32))).collect()
}
const WIDE_TILE: usize = 256;
const HOPPER_SHARED: u32 = 4 * (128 + 256) * 64 * 2;
/// Bytes of a stage of a tile of 32 × 128 that lies along the depth or across it, as `Tile` pads it; and stages.
fn tile_bytes(d: DType, across: bool) -> u32 {
    match (d, across) {
        (DType::BF16, false) => 128 * 40 * 2,
        (DType::BF16, true) => 32 * 136 * 2,
        (_, false) => 128 * 40 * 4,
        (_, true) => 32 * 136 * 4,
    }
}
fn stages(d: DType) -> u32 {
    if d == DType::BF16 { 3 } else { 2 }
}

/// Sizes of a call, and where routing left what in scratch memory.
struct Routed<'a> {
    cuda: &'a Cuda,
    dtype: DType,
    n: usize,
    h: usize,
    e: usize,
    i: usize,
    k: usize,
    slots: usize,
    expert: Ptr,
    weight: Ptr,
    total: Ptr,
    starts: Ptr,
    tiles: Ptr,
    order: Ptr,
    place: Ptr,
    _scratch: CudaBuffer,
}

impl<'a> Routed<'a> {
    /// Routes and sorts; `counts` is the op's output.
    fn new(op: &Moe, cuda: &'a Cuda, x: &[View], counts: Ptr) -> Result<Self> {
        let name = "moe";
        let dtype = float(name, "x", &x[0])?;
        let logits = one_of(name, "router_logits", x[1].dtype, &[dtype, DType::F32])?;
        let ((n, h, e, i), k) = (sizes(&x[0].layout.shape, &x[2].layout.shape), op.top_k);
        if e > MAX_EXPERTS || k > MAX_TOP_K || n * k > i32::MAX as usize / 2 {
            let limits = format!("takes up to {MAX_EXPERTS} experts, top_k up to {MAX_TOP_K} and 2³⁰ slots on CUDA, found {e}, {k} and {}", n * k);
            return Err(Error::invalid(name, limits));
        }
        let (slots, groups) = (n * k, n.div_ceil(TOKENS));
        let lengths = [slots, slots, n, e + 1, e + 1, slots, slots, groups * e, e].map(|n| (4 * n).next_multiple_of(256));
        let (scratch, base) = cuda.scratch(lengths.iter().sum())?;
        let mut at = base;
        let [expert, weight, total, starts, tiles, order, place, before, all] = lengths.map(|n| {
            let p = at;
            at = at.byte_add(n);
            p
        });
        let p = RouteParams {
            logits: Ptr::of(&x[1])?,
            expert,
            weight,
            total,
            counts: before,
            n: n as u32,
            e: e as u32,
            k: k as u32,
            norm: op.norm_topk as u32,
        };
        let words = e + 8 * (e + 2 * k);
        cuda.launch(&typed("route", logits), [groups as u32, 1, 1], 4 * words as u32, &p)?;
        let p = SortParams {
            expert,
            counts: before,
            all,
            starts,
            tiles,
            out: counts,
            order,
            place,
            blocks: groups as u32,
            e: e as u32,
            k: k as u32,
            slots: slots as u32,
        };
        cuda.launch(&plain("scan_blocks", 128), [e.div_ceil(4) as u32, 1, 1], 0, &p)?;
        cuda.launch(&plain("scan_experts", 32), [1, 1, 1], 0, &p)?;
        cuda.launch(&plain("sort_slots", THREADS), [groups as u32, 1, 1], (4 * TOKENS * k) as u32, &p)?;
        Ok(Routed { cuda, dtype, n, h, e, i, k, slots, expert, weight, total, starts, tiles, order, place, _scratch: scratch })
    }
    fn empty(&self) -> bool {
        self.n * self.h * self.i == 0
    }
    fn params(&self, [a, b, c]: [Ptr; 3]) -> GroupedParams {
        let (k, across) = (FastDiv::new(self.k), FastDiv::new(1));
        let (order, starts, tiles, experts) = (self.order, self.starts, self.tiles, self.e as u32);
        GroupedParams { a, b, c, act: Ptr::NULL, order, starts, tiles, k, across, experts, rows_of: 0, cols: 0, depth: 0, gather: 0, each: across }
    }
    /// Whether Hopper's kernels can be used: all rows are whole pieces of 16 bytes.
    fn hopper(&self, abc: [Ptr; 3], act: Ptr, widths: [usize; 2]) -> bool {
        let whole = abc.iter().chain([&act]).all(|p| p.0.is_multiple_of(16)) && widths.iter().all(|n| n.is_multiple_of(8));
        self.cuda.is_hopper() && self.dtype == DType::BF16 && whole
    }
    /// Launches one of Hopper's kernels, on no more blocks than there may be tiles.
    fn launch_hopper(&self, kernel: &Kernel, tiles: usize, p: &GroupedParams) -> Result<()> {
        let grid = tiles.min(self.cuda.processors() as usize);
        self.cuda.launch(kernel, [blocks("moe", grid, 1)?, 1, 1], HOPPER_SHARED, p)
    }
    /// C `[slots, cols]` = A · B of the row's expert, A `[slots, depth]`, or of tokens if `gather`.
    fn rows(&self, mode: u32, (cols, depth): (usize, usize), gather: bool, abc: [Ptr; 3], act: Ptr) -> Result<()> {
        let width = if mode == 1 { cols / 2 } else { cols };
        let hopper = self.hopper(abc, act, [width, depth]);
        let tile = if hopper { WIDE_TILE } else { TILE };
        let across = width.div_ceil(if mode == 1 { tile / 2 } else { tile });
        let p =
            GroupedParams { act, across: FastDiv::new(across), cols: cols as u32, depth: depth as u32, gather: gather as u32, ..self.params(abc) };
        // every expert may have one tile that is not full
        let tiles = self.slots / TILE + self.e.min(self.slots);
        if hopper {
            return self.launch_hopper(&on_hopper(mode, DType::BF16), tiles * across, &p);
        }
        let shared = stages(self.dtype) * (tile_bytes(self.dtype, false) + tile_bytes(self.dtype, mode == 2));
        self.cuda.launch(&grouped_rows(self.dtype, mode), [blocks("moe", tiles * across, 1)?, 1, 1], shared, &p)
    }
    /// C `[experts, rows, cols]` = Aᵀ B over each expert's rows, one of both of tokens, read through the permutation.
    fn weights(&self, (rows, cols): (usize, usize), gather_a: bool, [a, b]: [Ptr; 2], c: &View) -> Result<()> {
        let abc = [a, b, Ptr::of(c)?];
        let hopper = self.hopper(abc, Ptr::NULL, [rows, cols]);
        let across = cols.div_ceil(if hopper { WIDE_TILE } else { TILE });
        let each = rows.div_ceil(TILE) * across;
        let p = GroupedParams { across: FastDiv::new(across), each: FastDiv::new(each), rows_of: rows as u32, cols: cols as u32, ..self.params(abc) };
        if hopper {
            return self.launch_hopper(&on_hopper(if gather_a { 3 } else { 4 }, c.dtype), each * self.e, &p);
        }
        let shared = stages(self.dtype) * 2 * tile_bytes(self.dtype, true);
        self.cuda.launch(&grouped_weights(self.dtype, c.dtype, gather_a), [blocks("moe", each, 1)?, self.e as u32, 1], shared, &p)
    }
    fn combine(&self, rows: Ptr, weight: Ptr, y: &View) -> Result<()> {
        let per_row = self.h.div_ceil(16 / self.dtype.size());
        let wide = (self.h * self.dtype.size()).is_multiple_of(16) && aligned(16, &[y])?;
        let (n, k, width) = ((self.n * per_row) as u64, self.k as u32, self.h as u32);
        let many = (n > i32::MAX as u64) as u32;
        let (y, place, per_vector) = (Ptr::of(y)?, self.place, FastDiv::new(per_row));
        let p = CombineParams { rows, y, weight, place, n, per_row: per_vector, k, width, wide: wide as u32, many, unused: 0 };
        self.cuda.launch(&typed("combine", self.dtype), [blocks("moe", self.n * per_row, THREADS as usize)?, 1, 1], 0, &p)
    }
    fn scratch(&self, elements: usize) -> Result<(CudaBuffer, Ptr)> {
        self.cuda.scratch(elements * self.dtype.size())
    }
}

pub(super) fn zero(cuda: &Cuda, y: &View) -> Result<()> {
    cuda.fill(Ptr::of(y)?, 0, y.layout.numel() * y.dtype.size())
}

cuda_kernel!(Moe => |op, cuda, x, y| {
    let r = Routed::new(op, cuda, x, Ptr::of(&y[1])?)?;
    if r.empty() {
        return zero(cuda, &y[0]);
    }
    let (_act, act) = r.scratch(r.slots * r.i)?;
    let (_rows, rows) = r.scratch(r.slots * r.h)?;
    r.rows(1, (2 * r.i, r.h), true, [Ptr::of(&x[0])?, Ptr::of(&x[4])?, Ptr::of(&y[2])?], act)?;
    r.rows(0, (r.h, r.i), false, [act, Ptr::of(&x[5])?, rows], Ptr::NULL)?;
    r.combine(rows, r.weight, &y[0])
});

cuda_kernel!(MoeBackward => backward);

fn backward(op: &MoeBackward, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let op = &op.0;
    let r = Routed::new(op, cuda, x, Ptr::NULL)?;
    if r.empty() {
        return y.iter().try_for_each(|y| zero(cuda, y));
    }
    let (tokens, w1, w2, dy) = (Ptr::of(&x[0])?, Ptr::of(&x[2])?, Ptr::of(&x[3])?, Ptr::of(&x[5])?);
    let (_dact, dact) = r.scratch(r.slots * r.i)?;
    let (_act, act) = r.scratch(r.slots * r.i)?;
    let (_dgu, dgu) = r.scratch(r.slots * 2 * r.i)?;
    let (_dweight, dweight) = cuda.scratch(4 * r.slots)?;
    r.rows(2, (r.i, r.h), true, [dy, w2, dact], Ptr::NULL)?;
    let wide = r.i * r.dtype.size() % 16 == 0 && aligned(16, &[&x[4]])?;
    let p = ActivationParams {
        projections: Ptr::of(&x[4])?,
        weight: r.weight,
        dact,
        dprojections: dgu,
        act,
        dweight,
        order: r.order,
        slots: r.slots as u32,
        width: r.i as u32,
        wide: wide as u32,
        unused: 0,
    };
    cuda.launch(&typed("activation_backward", r.dtype), [blocks("moe", r.slots, 8)?, 1, 1], 0, &p)?;
    r.weights((r.h, r.i), true, [dy, act], &y[3])?;
    r.weights((2 * r.i, r.h), false, [dgu, tokens], &y[2])?;
    let (_rows, rows) = r.scratch(r.slots * r.h)?;
    r.rows(2, (r.h, 2 * r.i), false, [dgu, w1, rows], Ptr::NULL)?;
    r.combine(rows, Ptr::NULL, &y[0])?;
    let p = RouterParams {
        logits: Ptr::of(&x[1])?,
        dlogits: Ptr::of(&y[1])?,
        expert: r.expert,
        weight: r.weight,
        total: r.total,
        dweight,
        n: r.n as u32,
        e: r.e as u32,
        k: r.k as u32,
        norm: op.norm_topk as u32,
    };
    cuda.launch(&typed("router_backward", x[1].dtype), [blocks("moe", r.n, 8)?, 1, 1], (8 * 2 * 4 * r.e) as u32, &p)
}
