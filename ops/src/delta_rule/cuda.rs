//! CUDA kernels of the delta rule; the algorithm is told at the heads of delta_rule.cu, delta_rule_backward.cu, delta_rule_pieces.cu and
//! delta_rule_step.cu.

use super::instances::*;
use super::{DeltaRule, DeltaRuleBackward, sizes};
use cuda::kernel::one_of;
use cuda::memory::CudaBuffer;
use cuda::{Cuda, Fault, Kernel, Ptr, cuda_kernel, params};
use engine::{DType, Error, Result, View};

cuda_kernel!(DeltaRule => forward);
cuda_kernel!(DeltaRuleBackward => backward);

params! { struct DeltaParams {
    q: Ptr, k: Ptr, v: Ptr, log_decay: Ptr, beta: Ptr, h0: Ptr, cu: Ptr, o: Ptr, last: Ptr, v_new: Ptr, d_o: Ptr, d_last: Ptr,
    d_q: Ptr, d_k: Ptr, d_value: Ptr, d_decay: Ptr, d_beta: Ptr, d_h0: Ptr,
    places: Ptr, bases: Ptr, factors: Ptr, w: Ptr, u: Ptr, p: Ptr, a: Ptr, m: Ptr, states: Ptr, d_states: Ptr, d_new: Ptr, d_r: Ptr, x: Ptr, s: Ptr,
    sums: Ptr, yq: Ptr, yk: Ptr, joint_bases: Ptr, piece_seqs: Ptr, joint_seqs: Ptr, joints: Ptr, maps: Ptr, decays: Ptr,
    q_stride: [i64; 3], k_stride: [i64; 3], v_stride: [i64; 3],
    fault: Fault,
    t: u32, rows: u32, seqs: u32, hk: u32, hv: u32, dk: u32, dv: u32, chunks: u32, erase: u32, l2: u32, beta_wide: u32, cu_wide: u32,
    pieces: u32, piece_len: u32, max_joints: u32, back: u32,
    scale: f32,
} }

/// Bytes of a fragment of sums, which parts of the keys trade.
const FRAGMENT: usize = 512;
/// Fewest chunks of a sequence that is cut.
const WORTH: usize = 32;
/// Fewest pieces that are worth a pass that sums them up. The forward's costs about half of a walk; the backward's two cost as much as the walks themselves.
const LEAST: [usize; 2] = [2, 3];
/// Fewest chunks of a piece. Measured on an H200, B1 T8192 H2/8 D128 in bf16 (128 chunks), forward: 4, 8, 12, 16, 24, 32 pieces take 0.230, 0.206, 0.234,
/// 0.227, 0.281, 0.288 ms.
const SHORTEST: usize = 16;
/// Pieces that a sequence of so many chunks is cut into, where `chains` blocks walk side by side without a cut: what fills the card once
/// (delta_rule_pieces.cu).
fn pieces(chunks: usize, chains: usize, dk: usize, processors: usize, back: bool) -> usize {
    let resident = if dk > 128 { 1 } else { 2 }; // blocks of a multiprocessor, by their registers
    let n = (processors * resident / chains.max(1)).min(chunks / SHORTEST);
    if chunks < WORTH || n < LEAST[back as usize] { 1 } else { n }
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
    fn new(op: &DeltaRule, cuda: &'a Cuda, x: &[View], back: bool) -> Result<Self> {
        let d = one_of("delta_rule", "q", x[0].dtype, &TYPES)?;
        let [b, t, hk, hv, dk, dv] = sizes(&x[0].layout.shape, &x[2].layout.shape);
        let wide = [dk, dv].map(|n| n.next_multiple_of(SLAB));
        // a state's keys lie in registers; its values are walked over slab by slab, and as far as tests go
        if wide[0] > 256 || wide[1] > 512 {
            let m = format!("head dims on CUDA are at most 256 for keys and 512 for values, found {dk} and {dv}");
            return Err(Error::invalid("delta_rule", m));
        }
        let stride = |x: &View| [0, 1, 2].map(|i| x.layout.strides[i] as i64);
        let at = |i: Option<usize>| Ptr::of_option(i.map(|i| &x[i]));
        let wide_dtype = |i: Option<usize>, w: DType| i.is_some_and(|i| x[i].dtype == w) as u32;
        let seqs = op.at_cu().map_or(b, |i| x[i].layout.shape[0] - 1);
        let chunks = if op.packed { t / chunk(d) + seqs } else { t.div_ceil(chunk(d)) };
        // packed documents are cut as if they were one: nobody knows here how long they are, and the short ones stay whole
        let (walked, alone) = if op.packed { (t.div_ceil(chunk(d)), 1) } else { (chunks, b) };
        let lanes = hv * wide[1] / SLAB;
        let cut = op.pieces.unwrap_or_else(|| pieces(walked, alone * lanes, wide[0], cuda.processors() as usize, back)).clamp(1, walked.max(1));
        let piece_len = if op.packed && cut > 1 { walked.div_ceil(cut) } else { 0 };
        let max_joints = if op.packed { chunks.checked_div(piece_len).unwrap_or(0) } else { seqs * (cut - 1) };
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
            joint_bases: n,
            piece_seqs: n,
            joint_seqs: n,
            joints: n,
            maps: n,
            decays: n,
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
            pieces: if piece_len > 0 { 0 } else { cut as u32 },
            piece_len: piece_len as u32,
            max_joints: max_joints as u32,
            back: 0,
            scale: op.scale.unwrap_or((dk as f64).powf(-0.5)) as f32,
        };
        // smaller blocks, which load the same tiles for fewer values, where each still has a processor of its own
        let warps = if 2 * (seqs + max_joints) * lanes <= cuda.processors() as usize { WARPS[1] } else { WARPS[0] };
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
    /// A block per piece, value head and part of the `width` values.
    fn sequential(&self, k: Kernel, width: usize, shared: usize) -> Result<()> {
        let parts = width.div_ceil(16 * self.warps);
        let pieces = (self.p.seqs + self.p.max_joints) as usize;
        self.cuda.launch(&k, [blocks(pieces * self.p.hv as usize * parts)?, 1, 1], shared as u32, &self.p)
    }
    /// The states at the joints, in `joints`: sums up the pieces by `k`, whose blocks also take the rows of the maps if `mapped`, and joins them.
    fn at_joints(&mut self, k: Kernel, width: usize, shared: usize, mapped: bool) -> Result<()> {
        let (joints, hv, dk, dv, wk) = (self.p.max_joints as usize, self.p.hv as usize, self.p.dk as usize, self.p.dv as usize, self.wide[0]);
        if joints == 0 {
            return Ok(());
        }
        if self.p.joints == Ptr::NULL {
            self.p.joints = self.scratch(joints * hv * dk * dv * 4)?;
            self.p.decays = self.scratch(joints * hv * 4)?;
        }
        if mapped {
            self.p.maps = self.scratch(joints * hv * wk * wk * 4)?;
        }
        let parts = width.div_ceil(16 * WARPS[0]) + if mapped { wk / (16 * WARPS[0]) } else { 0 };
        self.cuda.launch(&k, [blocks(joints * hv * parts)?, 1, 1], shared as u32, &self.p)?;
        if self.p.pieces == 2 {
            return Ok(()); // one joint, and nothing to join
        }
        let ring = if wk <= 128 { 4 } else { 2 }; // slices of a warp's rows of the maps
        let shared = tile(DType::F32, wk, 16) + wk / 16 * ring * tile(DType::F32, 16, 32);
        let (join, parts, shared) = if mapped { (join(wk), dv.div_ceil(16), shared) } else { (join_decayed(), (dk * dv).div_ceil(256), 0) };
        self.cuda.launch(&join, [blocks(joints * hv * parts)?, 1, 1], shared as u32, &self.p)
    }
    /// The list of chunks, and all that can be had of each chunk by itself.
    fn prepare(&mut self, back: bool) -> Result<()> {
        let (d, c) = (self.d, chunk(self.d));
        if self.p.cu != Ptr::NULL {
            self.p.places = self.scratch(self.p.chunks as usize * 8)?;
            self.p.bases = self.scratch((self.p.seqs as usize + 1) * 4)?;
            if self.p.piece_len > 0 {
                let (seqs, joints) = (self.p.seqs as usize, self.p.max_joints as usize);
                self.p.joint_bases = self.scratch((seqs + 1) * 4)?;
                self.p.piece_seqs = self.scratch((seqs + joints) * 4)?;
                self.p.joint_seqs = self.scratch(joints * 4)?;
            }
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
        // all but two factors have a place of their own
        let shared = tile(d, c, SLAB) + stage + f32s.max(2 * tile(d, c, SLAB).max(square)) + f32s + (FACTORS - 2) * c * 4;
        self.parallel(prepare(d, back), shared)
    }
}

fn blocks(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::invalid("delta_rule", format!("{n} blocks are more than one launch can have")))
}

fn forward(op: &DeltaRule, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let mut call = Call::new(op, cuda, x, false)?;
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
    let dv = call.p.dv as usize;
    // what the parts of the keys trade lies in W's and Q's place, but O's; up to 128 keys W and U have two stages, and where pieces are summed up all has
    let fragments = |w: usize| if key_parts(dk) == 2 { 2 * w * (c / 8) * FRAGMENT } else { 0 };
    let stages = 1 + (dk <= 128) as usize;
    let read = |once: usize, w: usize| (tile(d, c, dk) * if stages == 2 { 3 } else { once }).max(fragments(w)) + stages * tile(d, 16 * w, c);
    let second = tile(d, c, dk) + 3 * c * 4;
    call.at_joints(scan(d, dk, WARPS[0], true), dv, read(1, WARPS[0]) + stages * second, op.erase)?;
    let shared = read(2, w) + second + tile(d, c, c) + fragments(w) / 2;
    call.sequential(scan(d, dk, w, false), dv, shared)
}

fn backward(op: &DeltaRuleBackward, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let rule = &op.rule;
    let mut call = Call::new(rule, cuda, x, true)?;
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
    let shared = |w: usize| 2 * (tile(d, c, wk) + tile(DType::F32, c, 16 * w) + 2 * c * 4);
    call.at_joints(states(d, wk, WARPS[0], true), wv, shared(WARPS[0]), false)?;
    call.sequential(states(d, wk, w, false), wv, shared(w))?;
    call.p.d_states = call.per_chunk(wv * wk, e)?;
    call.p.d_new = call.per_chunk(wv * c, e)?;
    let traded = |w: usize| if key_parts(wk) == 2 { 2 * w * (c / 8) * FRAGMENT } else { 0 };
    let read = tile(d, c, wk) + tile(d, c, c);
    // K and P of two chunks up to 128 keys
    let ahead = if wk <= 128 { read } else { 0 };
    let shared = |w: usize| read.max(traded(w)) + ahead + 2 * tile(d, c, wk) + 2 * (tile(d, c, 16 * w) + 3 * c * 4);
    call.p.back = 1;
    call.at_joints(scan_back(d, wk, WARPS[0], true), wv, shared(WARPS[0]), rule.erase)?;
    call.sequential(scan_back(d, wk, w, false), wv, shared(w))?;

    for f in [|p: &mut DeltaParams| &mut p.x, |p: &mut DeltaParams| &mut p.s] as [fn(&mut DeltaParams) -> &mut Ptr; 2] {
        *f(&mut call.p) = call.per_chunk(c * c, e)?;
    }
    call.p.d_r = call.per_chunk(c * wv, e)?;
    call.p.sums = call.per_chunk(2 * c, 4)?;
    let (slab, square) = (tile(d, c, SLAB), tile(d, c, c));
    let factors = FACTORS * c * 4;
    call.parallel(grad("squares", d), 6 * slab + 2 * tile(d, SLAB, c) + square + factors + (2 * GROUPS + c / 16) * c * 4)?;
    let wide = call.p.rows as usize * call.p.hv as usize * call.p.dk as usize * e;
    (call.p.yq, call.p.yk) = if direct { (call.p.d_q, call.p.d_k) } else { (call.scratch(wide)?, call.scratch(wide)?) };
    call.parallel(grad("rows", d), 5 * slab + 4 * tile(d, SLAB, SLAB) + 2 * square + factors + 3 * GROUPS * c * 4 + c / 16 * GROUPS * 4)?;
    if direct {
        return Ok(());
    }
    let rows = call.p.rows as usize * call.p.hk as usize;
    // 4 warps a block, and lanes of a row as in the kernel
    let lanes = (call.p.dk as usize).div_ceil(16 / e).next_power_of_two().min(32);
    cuda.launch(&grad("finish", d), [blocks(rows.div_ceil(4 * 32 / lanes))?, 2, 1], 0, &call.p)
}

#[cfg(test)]
mod tests {
    use super::pieces;

    #[test]
    fn the_number_of_pieces_follows_the_shapes() {
        // (chunks, chains, Dk) on 132 multiprocessors
        let cases = [
            ((512, 64, 128), 4),
            ((512, 8, 128), 32),
            ((128, 16, 128), 8),
            ((512, 256, 128), 1),
            ((512, 133, 128), 1),
            ((512, 132, 128), 2),
            ((512, 32, 256), 4),
        ];
        for ((chunks, chains, dk), n) in cases.into_iter().chain([((31, 1, 64), 1), ((32, 1, 64), 2), ((0, 0, 64), 1)]) {
            assert_eq!(pieces(chunks, chains, dk, 132, false), n, "{chunks} chunks, {chains} chains, Dk {dk}");
        }
        for ((chunks, chains), n) in [((512, 132), 1), ((512, 88), 3), ((512, 8), 32), ((64, 128), 1)] {
            assert_eq!(pieces(chunks, chains, 128, 132, true), n, "backward, {chunks} chunks, {chains} chains");
        }
    }
}
