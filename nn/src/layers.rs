//! What the layers of the decoder have in common, and its feed-forwards.

use crate::config::ModelConfig;
use crate::init::Builder;
use crate::taps::Taps;
use engine::{DType, Result, Tensor};
use ops::moe::{Moe as MoeOp, add_shared, moe, router_logits};
use ops::swiglu::swiglu;

/// A parameter: its name (transformers', but for fused projections, which checkpoints hold apart) and its leaf.
#[derive(Clone, Debug)]
pub struct Param {
    /// Name.
    pub name: String,
    /// A leaf, updated in place.
    pub tensor: Tensor,
}

/// `x wᵀ`, with the weight brought to x's dtype: parameters may be kept wider than they are computed with.
pub(crate) fn project(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    if x.dtype().size() == 2 && w.dtype() == DType::F32 { x.linear(w) } else { x.linear(&w.cast(x.dtype())?) }
}

/// The dtype that must not be narrow: f32, or f64 in checks.
pub(crate) fn wide(x: &Tensor) -> DType {
    if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 }
}

/// What every layer is told about a batch.
pub(crate) struct Context<'a> {
    pub cu_seqlens: Option<&'a Tensor>,
    pub positions: Option<&'a Tensor>,
    pub offset: usize,
    /// Only the last position's output is asked for, `[B, 1, H]`; caches take up all the same.
    pub tail: bool,
}

impl Context<'_> {
    /// The positions whose output is asked for.
    pub fn asked(&self, x: &Tensor) -> Result<Tensor> {
        if self.tail { x.narrow(1, x.dim(1) - 1, 1) } else { Ok(x.clone()) }
    }
}

/// A dense SwiGLU feed-forward; gate and up are one projection.
pub(crate) struct Dense {
    gate_up: Tensor,
    down: Tensor,
}

impl Dense {
    pub fn new(b: &mut Builder, name: &str, h: usize, i: usize) -> crate::Result<Self> {
        Ok(Dense {
            gate_up: b.normal_of_parts(&format!("{name}.gate_up_proj.weight"), 1, &[("gate", i), ("up", i)], h)?,
            down: b.normal(&format!("{name}.down_proj.weight"), &[h, i])?,
        })
    }
    /// With the taps `pre`, `pre_linear` and `post`.
    pub fn forward(&self, x: &Tensor, taps: &mut Taps, [pre, pre_linear, post]: [&str; 3]) -> Result<Tensor> {
        let mut both = project(x, &self.gate_up)?;
        let (axis, i) = (x.rank() - 1, self.down.dim(1));
        let half = |both: &Tensor, n: usize| both.narrow(axis, n * i, i)?.contiguous();
        let gate = taps.offer(pre, || half(&both, 0))?;
        let up = taps.offer(pre_linear, || half(&both, 1))?;
        if gate.is_some() || up.is_some() {
            let (gate, up) = (gate.map_or_else(|| half(&both, 0), Ok)?, up.map_or_else(|| half(&both, 1), Ok)?);
            both = Tensor::cat(&[&gate, &up], axis)?;
        }
        project(&taps.tap(post, swiglu(&both)?)?, &self.down)
    }
}

/// A mixture of experts with a shared one.
pub(crate) struct Sparse {
    gate: Tensor,
    gate_up: Tensor,
    down: Tensor,
    shared: Option<(Dense, Tensor)>,
}

impl Sparse {
    pub fn new(b: &mut Builder, c: &ModelConfig) -> crate::Result<Self> {
        let (h, e, i) = (c.hidden_size, c.num_experts, c.moe_intermediate_size);
        let s = c.shared_expert_intermediate_size;
        Ok(Sparse {
            gate: b.normal_wide("mlp.gate.weight", &[e, h])?,
            gate_up: b.normal("mlp.experts.gate_up_proj", &[e, 2 * i, h])?,
            down: b.normal("mlp.experts.down_proj", &[e, h, i])?,
            shared: if s > 0 {
                Some((Dense::new(b, "mlp.shared_expert", h, s)?, b.normal_wide("mlp.shared_expert_gate.weight", &[1, h])?))
            } else {
                None
            },
        })
    }
    /// The output, and the router's logits `[N, E]`.
    pub fn forward(&self, x: &Tensor, c: &ModelConfig, taps: &mut Taps) -> Result<(Tensor, Tensor)> {
        let h = c.hidden_size;
        let flat = x.reshape(&[x.numel() / h, h])?;
        let logits = taps.tap("mlp.hook_router_logits", router_logits(&flat, &self.gate)?)?;
        taps.show("mlp.hook_router_probs", || logits.softmax(1))?;
        taps.show("mlp.hook_router_index", || Ok(logits.topk(c.num_experts_per_tok)?.1))?;
        // what is kept in f32 gets its gradient in f32
        let expert = |w: &Tensor| if w.dtype() == DType::F32 { Ok(w.clone()) } else { w.cast(x.dtype()) };
        let (mut y, _) =
            moe(MoeOp { top_k: c.num_experts_per_tok, norm_topk: c.norm_topk_prob }, &flat, &logits, &expert(&self.gate_up)?, &expert(&self.down)?)?;
        if let Some((dense, gate)) = &self.shared {
            let g = taps.tap("mlp.hook_shared_gate_logits", project(&flat, gate)?)?;
            taps.show("mlp.hook_shared_gate", || g.sigmoid())?;
            let shared = dense.forward(&flat, taps, ["mlp.hook_shared_pre", "mlp.hook_shared_pre_linear", "mlp.hook_shared_post"])?;
            y = add_shared(&y, &shared, &g)?;
        }
        Ok((y.reshape(x.shape())?, logits))
    }
}
