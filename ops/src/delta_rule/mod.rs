//! The chunkwise gated delta rule (Gated Delta Networks, 2412.06464, Eq. 10 and §3.3), and its family.
//!
//! Per value head, with state `S [Dk, Dv]`, decay `α = exp(log_decay)` and write strength `β`:
//!
//! `S_t = α_t S_{t−1} − β_t k_t (k_tᵀ α_t S_{t−1}) + β_t k_t v_tᵀ`, `o_t = scale · S_tᵀ q_t`.
//!
//! With decay and erase it is Gated DeltaNet; erase alone, DeltaNet (2406.06484); decay alone, Mamba2's state-space dual (2405.21060); neither, linear
//! attention. In chunks (of 32 steps; of 64 in bf16 on CUDA), with `g` the running sum of log-decay inside a chunk, `D_ij = exp(g_i − g_j)` for i ≥ j, and h the state before it:
//!
//! `M = strictLower(β_i (K Kᵀ)_ij D_ij)`, `A = (I + M)⁻¹`, `R = β (V − e^g (K h))`, `V' = A R`,
//! `O = scale (e^g (Q h) + tril(Q Kᵀ D) V')`, `h' = e^{g_last} h + (e^{g_last − g} K)ᵀ V'`.
//!
//! Only ratios of decays that are at most 1 are formed. The backward keeps the inputs and V', and computes A and the states again.

mod cpu;
mod cuda;
mod instances;
mod kernel;
pub mod reference;
#[cfg(test)]
mod tests;

use engine::{Error, Meta, Op, Result, Saved, Tensor, Want, refuse_tracked, run};
use std::ops::RangeInclusive;

/// Attributes of a call.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DeltaRule {
    /// Subtract what the state already holds for the key before writing.
    pub erase: bool,
    /// L2-normalise q and k: `x · rsqrt(Σ x² + 1e-6)`.
    pub qk_l2norm: bool,
    /// Factor of the output, applied to q; `Dk^{-1/2}` if none.
    pub scale: Option<f64>,
    /// Pieces that each sequence is cut into on CUDA, where they are computed side by side (at most its chunks; packed documents: as many as fall to one
    /// by its share of the whole length). None: as many as fill the card, from the shapes and its number of processors. 1: the same bits on every card.
    /// The CPU does not cut.
    pub pieces: Option<usize>,
    pub(crate) decay: bool,
    pub(crate) beta: bool,
    pub(crate) state: bool,
    pub(crate) packed: bool,
}

/// Added under the root of the L2 norm.
pub(crate) const L2_EPS: f64 = 1e-6;

/// What a call gets beside q, k and v.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeltaRuleInputs<'a> {
    /// `[B, T, Hv]`, at most 0; f32 (f64 for f64 tensors). None: no decay.
    pub log_decay: Option<&'a Tensor>,
    /// `[B, T, Hv]`, the write strength itself, not a logit. None: 1.
    pub beta: Option<&'a Tensor>,
    /// `[N, Hv, Dk, Dv]`, f32 (f64 for f64 tensors): one per sequence. None: zeros.
    pub initial_state: Option<&'a Tensor>,
    /// `[N + 1]`, i32 or i64, with B = 1: packed documents, each of which starts from its own state.
    pub cu_seqlens: Option<&'a Tensor>,
}

/// (B, T, Hk, Hv, Dk, Dv)
pub(crate) fn sizes(q: &[usize], v: &[usize]) -> [usize; 6] {
    [q[0], q[1], q[2], v[2], q[3], v[3]]
}

impl DeltaRule {
    /// Erase on, L2 norms on, the default scale: Gated DeltaNet when decay is given.
    pub fn gated_delta_net() -> Self {
        DeltaRule { erase: true, qk_l2norm: true, scale: None, pieces: None, decay: false, beta: false, state: false, packed: false }
    }
    /// Number of forward inputs.
    pub(crate) fn inputs(&self) -> usize {
        3 + self.decay as usize + self.beta as usize + self.state as usize + self.packed as usize
    }
    pub(crate) fn at_decay(&self) -> Option<usize> {
        self.decay.then_some(3)
    }
    pub(crate) fn at_beta(&self) -> Option<usize> {
        self.beta.then_some(3 + self.decay as usize)
    }
    pub(crate) fn at_state(&self) -> Option<usize> {
        self.state.then_some(3 + self.decay as usize + self.beta as usize)
    }
    pub(crate) fn at_cu(&self) -> Option<usize> {
        self.packed.then(|| self.inputs() - 1)
    }
}

impl Op for DeltaRule {
    fn name(&self) -> &'static str {
        "delta_rule"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        self.inputs()..=self.inputs()
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let op = "delta_rule";
        if self.pieces == Some(0) {
            return Err(Error::invalid(op, "pieces must be at least 1, found 0; None leaves the number to the shapes"));
        }
        for (i, n) in [(0, "q"), (1, "k"), (2, "v")] {
            if x[i].shape.len() != 4 {
                return Err(Error::shape(op, n, "[B, T, H, D]", &x[i].shape));
            }
            if !x[i].dtype.is_float() || x[i].dtype != x[0].dtype {
                return Err(Error::dtype(op, n, "a float dtype, the same for q, k and v", x[i].dtype));
            }
        }
        let [b, t, hk, hv, dk, dv] = sizes(&x[0].shape, &x[2].shape);
        if x[1].shape != x[0].shape {
            return Err(Error::shape(op, "k", format!("{:?} as q", x[0].shape), &x[1].shape));
        }
        if hk == 0 || dk == 0 {
            return Err(Error::shape(op, "q", "[B, T, H > 0, D > 0]", &x[0].shape));
        }
        if x[2].shape[..2] != [b, t] || hv == 0 || hv % hk != 0 {
            return Err(Error::shape(op, "v", format!("[{b}, {t}, a multiple of {hk} heads, Dv]"), &x[2].shape));
        }
        for (i, n) in [(self.at_decay(), "log_decay"), (self.at_beta(), "beta")] {
            let Some(i) = i else { continue };
            if x[i].shape != [b, t, hv] {
                return Err(Error::shape(op, n, format!("[{b}, {t}, {hv}]"), &x[i].shape));
            }
            if n == "log_decay" && x[i].dtype != crate::dtypes::sums(x[0].dtype) {
                return Err(Error::dtype(op, n, crate::dtypes::sums(x[0].dtype), x[i].dtype));
            }
            crate::dtypes::beside(op, n, x[0].dtype, x[i].dtype)?;
        }
        let mut seqs = b;
        if let Some(i) = self.at_cu() {
            crate::documents::check_meta(op, &x[i], b)?;
            seqs = x[i].shape[0] - 1;
        }
        let state = Meta::new(&[seqs, hv, dk, dv], crate::dtypes::sums(x[0].dtype));
        if let Some(i) = self.at_state()
            && x[i] != state
        {
            return Err(Error::invalid(op, format!("initial_state must be {state}, found {}", x[i])));
        }
        let v_new = Meta::new(&[b, t, hv, if self.erase { dv } else { 0 }], crate::dtypes::sums(x[0].dtype));
        Ok(vec![x[2].clone(), state, v_new])
    }
    fn hidden(&self) -> usize {
        1
    }
    fn want(&self, i: usize) -> Want {
        if i < 3 { Want::LastDimDense } else { Want::Contiguous }
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        ((0..self.inputs()).collect(), vec![2])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(any) = dy.iter().flatten().next() else { return Ok(vec![None; need.len()]) };
        let v = s.meta(2);
        let d_o = match &dy[0] {
            Some(g) => g.clone(),
            None => Tensor::zeros(&v.shape, v.dtype, any.device())?,
        };
        let mut ins: Vec<&Tensor> = (0..self.inputs()).map(|i| s.input(i)).collect::<Result<_>>()?;
        ins.extend([s.output(2)?, &d_o]);
        ins.extend(dy[1].as_ref());
        let grads = run(DeltaRuleBackward { rule: *self, state_grad: dy[1].is_some() }, &ins)?;
        let mut out: Vec<Option<Tensor>> = grads.into_iter().map(Some).collect();
        out.resize(need.len(), None);
        Ok(out)
    }
}

/// Gradients of q, k, v, and of log_decay, beta and the initial state where they are given.
/// Inputs: the forward's, V', the output's gradient, and the final state's gradient if there is one.
#[derive(Debug, Clone, Copy)]
pub struct DeltaRuleBackward {
    pub(crate) rule: DeltaRule,
    pub(crate) state_grad: bool,
}

impl Op for DeltaRuleBackward {
    fn name(&self) -> &'static str {
        "delta_rule_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        let n = self.rule.inputs() + 2 + self.state_grad as usize;
        n..=n
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x[..self.rule.inputs() - self.rule.packed as usize].to_vec())
    }
    fn want(&self, i: usize) -> Want {
        if i < 3 { Want::LastDimDense } else { Want::Contiguous }
    }
}

/// Runs the rule over whole sequences. q, k `[B, T, Hk, Dk]`, v `[B, T, Hv, Dv]` (Hv a multiple of Hk; key head j serves value heads j·r … j·r + r − 1).
/// Returns o `[B, T, Hv, Dv]` (dtype of v) and the final state `[N, Hv, Dk, Dv]` (f32; f64 for f64), both differentiable.
pub fn delta_rule(op: DeltaRule, q: &Tensor, k: &Tensor, v: &Tensor, x: DeltaRuleInputs) -> Result<(Tensor, Tensor)> {
    let op =
        DeltaRule { decay: x.log_decay.is_some(), beta: x.beta.is_some(), state: x.initial_state.is_some(), packed: x.cu_seqlens.is_some(), ..op };
    let ins: Vec<&Tensor> = [q, k, v].into_iter().chain(x.log_decay).chain(x.beta).chain(x.initial_state).chain(x.cu_seqlens).collect();
    let mut y = run(op, &ins)?;
    let state = y.remove(1);
    Ok((y.remove(0), state))
}

/// One token for decoding: T = 1, from a state to the next; not recorded, so that tracked inputs are refused.
pub fn delta_rule_step(op: DeltaRule, q: &Tensor, k: &Tensor, v: &Tensor, x: DeltaRuleInputs) -> Result<(Tensor, Tensor)> {
    const NAME: &str = "delta_rule_step";
    if q.dim(1) != 1 {
        return Err(Error::shape(NAME, "q", "[B, 1, H, D]: one token", q.shape()));
    }
    let Some(state) = x.initial_state else { return Err(Error::invalid(NAME, "needs the state to go on from; give zeros at first")) };
    for t in [Some(q), Some(k), Some(v), x.log_decay, x.beta, Some(state)].into_iter().flatten() {
        refuse_tracked(NAME, &[t])?;
    }
    delta_rule(op, q, k, v, x)
}
