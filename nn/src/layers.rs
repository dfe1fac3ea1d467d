//! The layers of the decoder: mixers and feed-forwards.

use crate::cache::Cache;
use crate::config::{GatePosition, LayerType, ModelConfig, OutputGate, QkNorm};
use crate::gates::{Gate, gated};
use crate::init::Builder;
use crate::taps::{Taps, effective_attention};
use engine::{DType, Result, Tensor};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, delta_rule};
use ops::gated_sdpa::{Attention as Sdpa, attention_pattern, gated_sdpa};
use ops::moe::{Moe as MoeOp, add_shared, moe, router_logits};
use ops::rms_norm::{NormGate, rms_norm, rms_norm_gated};
use ops::rope::{Positions, rope};
use ops::short_conv::short_conv;
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
fn wide(x: &Tensor) -> DType {
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
    fn asked(&self, x: &Tensor) -> Result<Tensor> {
        if self.tail { x.narrow(1, x.dim(1) - 1, 1) } else { Ok(x.clone()) }
    }
}

/// Softmax attention with its gates.
pub(crate) struct Attention {
    q_proj: Tensor,
    k_proj: Tensor,
    v_proj: Tensor,
    o_proj: Tensor,
    /// Biases of the four.
    biases: Option<[Tensor; 4]>,
    /// Weights of the queries' and the keys' norm.
    norms: Option<[Tensor; 2]>,
    window: Option<usize>,
    output_gate: Option<Gate>,
    value_gate: Option<Gate>,
    key_gate: Option<Gate>,
    query_gate: Option<Gate>,
    dense_gate: Option<Gate>,
    /// Weight of the norm of each head's output.
    sdpa_norm: Option<Tensor>,
}

impl Attention {
    pub fn new(b: &mut Builder, c: &ModelConfig, kind: LayerType) -> crate::Result<Self> {
        let (h, d) = (c.hidden_size, c.head_dim);
        let (q, kv) = (c.num_attention_heads * (d + c.gate_dim()), c.num_key_value_heads * d);
        let q_proj = b.normal("self_attn.q_proj.weight", &[q, h])?;
        let k_proj = b.normal("self_attn.k_proj.weight", &[kv, h])?;
        let v_proj = b.normal("self_attn.v_proj.weight", &[kv, h])?;
        let o_proj = b.normal("self_attn.o_proj.weight", &[h, c.num_attention_heads * d])?;
        let mut norm = |kind: &str, n: usize| b.constant(&format!("self_attn.{kind}_norm.weight"), &[n], c.norm_start());
        let norms = match c.qk_norm {
            QkNorm::Head => Some([norm("q", d)?, norm("k", d)?]),
            QkNorm::Projection => Some([norm("q", c.num_attention_heads * d)?, norm("k", kv)?]),
            QkNorm::None => None,
        };
        let mut bias = |kind: &str, n: usize| b.constant(&format!("self_attn.{kind}_proj.bias"), &[n], 0.0);
        let biases = if c.attention_bias { Some([bias("q", q)?, bias("k", kv)?, bias("v", kv)?, bias("o", h)?]) } else { None };
        let sdpa_norm = if c.sdpa_norm { Some(b.constant("self_attn.sdpa_norm.weight", &[d], c.norm_start())?) } else { None };
        let window = (kind == LayerType::SlidingAttention).then_some(c.sliding_window);
        let mut gate = |at| Gate::new(b, c, at);
        let (output_gate, value_gate) = (gate(GatePosition::Attention)?, gate(GatePosition::Value)?);
        let (key_gate, query_gate, dense_gate) = (gate(GatePosition::Key)?, gate(GatePosition::Query)?, gate(GatePosition::Dense)?);
        Ok(Attention { q_proj, k_proj, v_proj, o_proj, biases, norms, window, output_gate, value_gate, key_gate, query_gate, dense_gate, sdpa_norm })
    }

    pub fn forward(&self, x: &Tensor, c: &ModelConfig, ctx: &Context, cache: Option<&mut Cache>, taps: &mut Taps) -> Result<Tensor> {
        let (b, t, d) = (x.dim(0), x.dim(1), c.head_dim);
        let biased = |y: Tensor, i: usize| match &self.biases {
            Some(b) => y.add(&b[i].cast(y.dtype())?),
            None => Ok(y),
        };
        let queries = ctx.asked(x)?;
        let n = queries.dim(1);
        let qg = biased(project(&queries, &self.q_proj)?, 0)?.reshape(&[b, n, c.num_attention_heads, d + c.gate_dim()])?;
        let k = biased(project(x, &self.k_proj)?, 1)?.reshape(&[b, t, c.num_key_value_heads, d])?;
        let v = biased(project(x, &self.v_proj)?, 2)?.reshape(&[b, t, c.num_key_value_heads, d])?;
        let turn = |x: &Tensor, i: usize| {
            let x = match &self.norms {
                Some(w) if c.qk_norm == QkNorm::Projection => {
                    let all = x.reshape(&[b, x.dim(1), x.dim(2) * d])?;
                    rms_norm(&all, &w[i], c.rms_norm_eps, c.zero_centered_norms)?.reshape(x.shape())?
                }
                Some(w) => rms_norm(x, &w[i], c.rms_norm_eps, c.zero_centered_norms)?,
                None => x.clone(),
            };
            let ahead = t - x.dim(1);
            let given = ctx.positions.map(|p| p.narrow(1, ahead, x.dim(1))).transpose()?;
            let at = given.as_ref().map_or(Positions::From(ctx.offset + ahead), Positions::Given);
            if c.rotary_dim() == 0 { Ok(x) } else { rope(&x, c.rotary_dim(), c.rope_theta, at) }
        };
        let qg = qg.split(3, &[d, c.gate_dim()])?;
        let (q, k) = (taps.tap("attn.hook_q", qg[0].clone())?, taps.tap("attn.hook_k", k)?);
        let (q, k) = (gated(&self.query_gate, q, &queries, taps)?, gated(&self.key_gate, k, x, taps)?);
        let v = gated(&self.value_gate, v, x, taps)?;
        let v = taps.tap("attn.hook_v", v)?;
        let q = taps.tap("attn.hook_rot_q", turn(&q, 0)?)?;
        let k = taps.tap("attn.hook_rot_k", turn(&k, 1)?)?;
        let gate = self.output_gate.as_ref().map(|g| Ok((g, g.logits(&queries, Some(&qg[1]), taps)?))).transpose()?;
        let (gate, kernels) = if c.gates_behind_kernel() { (gate, None) } else { (None, gate.map(|(g, logits)| g.for_kernel(&logits)).transpose()?) };
        let (logits, how) = kernels.unzip();
        let masked = Sdpa { causal: true, window: self.window, scale: None };
        let mut attend = |q: &Tensor, k: &Tensor, v: &Tensor, gate: Option<&Tensor>| {
            taps.show("attn.hook_pattern", || attention_pattern(q, k, ctx.cu_seqlens, masked))?;
            if gate.is_some() {
                taps.show("attn.hook_z_pre_gate", || gated_sdpa(q, k, v, None, ctx.cu_seqlens, masked))?;
            }
            gated_sdpa(q, k, v, gate.zip(how), ctx.cu_seqlens, masked)
        };
        let o = match cache {
            None => attend(&q, &k, &v, logits.as_ref())?,
            // each over its own past
            Some(cache) => {
                let one = |x: &Tensor, i: usize| x.narrow(0, i, 1);
                let each = cache.key_values(&k, &v)?.iter_mut().enumerate().map(|(i, past)| {
                    let (k, v) = past.push(&one(&k, i)?, &one(&v, i)?)?;
                    attend(&one(&q, i)?, &k, &v, logits.as_ref().map(|g| one(g, i)).transpose()?.as_ref())
                });
                let each = each.collect::<Result<Vec<_>>>()?;
                if b == 1 { each[0].clone() } else { Tensor::cat(&each.iter().collect::<Vec<_>>(), 0)? }
            }
        };
        let o = match &self.sdpa_norm {
            Some(w) => rms_norm(&o, w, c.rms_norm_eps, c.zero_centered_norms)?,
            None => o,
        };
        let o = if c.sdpa_silu { o.silu()? } else { o };
        let o = match &gate {
            Some((gate, logits)) => {
                taps.show("attn.hook_z_pre_gate", || Ok(o.clone()))?;
                gate.apply(&o, logits)?
            }
            None => o,
        };
        let o = taps.tap("attn.hook_z", o)?;
        let y = biased(project(&o.reshape(&[b, n, c.num_attention_heads * d])?, &self.o_proj)?, 3)?;
        gated(&self.dense_gate, y, &queries, taps)
    }
}

/// Gated DeltaNet (2412.06464 §3.4), with the row order of Qwen3-Next's projections: per key head, [q | k | v | z] and [b | a].
pub(crate) struct GatedDeltaNet {
    in_proj_qkvz: Tensor,
    in_proj_ba: Tensor,
    conv1d: Tensor,
    dt_bias: Tensor,
    a_log: Tensor,
    norm: Tensor,
    out_proj: Tensor,
}

impl GatedDeltaNet {
    pub fn new(b: &mut Builder, c: &ModelConfig) -> crate::Result<Self> {
        let (h, nv) = (c.hidden_size, c.linear_num_value_heads);
        let (k, v) = (c.linear_num_key_heads * c.linear_key_head_dim, nv * c.linear_value_head_dim);
        Ok(GatedDeltaNet {
            in_proj_qkvz: b.normal("linear_attn.in_proj_qkvz.weight", &[2 * k + 2 * v, h])?,
            in_proj_ba: b.normal("linear_attn.in_proj_ba.weight", &[2 * nv, h])?,
            conv1d: b.conv("linear_attn.conv1d.weight", 2 * k + v, c.linear_conv_kernel_dim)?,
            dt_bias: b.dt_bias("linear_attn.dt_bias", nv)?,
            a_log: b.a_log("linear_attn.A_log", nv)?,
            norm: b.constant("linear_attn.norm.weight", &[c.linear_value_head_dim], 1.0)?,
            out_proj: b.normal("linear_attn.out_proj.weight", &[h, v])?,
        })
    }

    pub fn forward(&self, x: &Tensor, c: &ModelConfig, ctx: &Context, cache: Option<&mut Cache>, taps: &mut Taps) -> Result<Tensor> {
        let (b, t, nk, nv) = (x.dim(0), x.dim(1), c.linear_num_key_heads, c.linear_num_value_heads);
        let (dk, dv, r) = (c.linear_key_head_dim, c.linear_value_head_dim, nv / nk);
        let qkvz = project(x, &self.in_proj_qkvz)?.reshape(&[b, t, nk, 2 * dk + 2 * r * dv])?;
        let ba = project(x, &self.in_proj_ba)?.reshape(&[b, t, nk, 2 * r])?;
        let (old, state) = match &cache {
            Some(Cache::Recurrent(conv, state)) => (Some(conv.clone()), Some(state.clone())),
            _ => (None, None),
        };
        // the convolution runs over [all q | all k | all v], channel by channel: three calls read their parts in place
        let qkvz = qkvz.split(3, &[dk, dk, r * dv, r * dv])?;
        let filters = self.conv1d.split(0, &[nk * dk, nk * dk, nv * dv])?;
        let mut conv = |i: usize, name: &str| {
            let x = taps.tap(name, qkvz[i].clone())?;
            short_conv(&x, &filters[i], true, old.as_ref().map(|o| &o[i]), ctx.cu_seqlens)
        };
        let (q, sq) = conv(0, "attn.hook_q_pre_conv")?;
        let (k, sk) = conv(1, "attn.hook_k_pre_conv")?;
        let (v, sv) = conv(2, "attn.hook_v_pre_conv")?;
        let v = v.reshape(&[b, t, nv, dv])?;
        let z = qkvz[3].reshape(&[b, t, nk, r, dv])?;
        let ba = ba.split(3, &[r, r])?;
        let acc = wide(x);
        let beta = ba[0].reshape(&[b, t, nv])?.cast(acc)?.sigmoid()?;
        let beta = if c.linear_allow_neg_eigval { beta.affine(2.0, 0.0)? } else { beta };
        let a = ba[1].reshape(&[b, t, nv])?.cast(acc)?;
        let log_decay = a.add(&self.dt_bias.cast(acc)?)?.softplus()?.mul(&self.a_log.cast(acc)?.exp()?.neg()?)?;
        let (q, k, v) = (taps.tap("attn.hook_q", q)?, taps.tap("attn.hook_k", k)?, taps.tap("attn.hook_v", v)?);
        let (beta, log_decay) = (taps.tap("attn.hook_beta", beta)?, taps.tap("attn.hook_log_decay", log_decay)?);
        let inputs = DeltaRuleInputs { log_decay: Some(&log_decay), beta: Some(&beta), initial_state: state.as_ref(), cu_seqlens: ctx.cu_seqlens };
        taps.show("attn.hook_effective_attention", || effective_attention(&q, &k, nv, inputs))?;
        let (o, last) = delta_rule(DeltaRule::gated_delta_net(), &q, &k, &v, inputs)?;
        let (o, last) = (taps.tap("attn.hook_recurrence_out", o)?, taps.tap("attn.hook_state", last)?);
        let z = taps.tap("attn.hook_gate_logits", z)?;
        taps.show("attn.hook_gate", || if c.output_gate_type == OutputGate::Silu { z.silu() } else { z.sigmoid() })?;
        if let Some(cache) = cache {
            *cache = Cache::Recurrent([sq, sk, sv], last);
        }
        let act = if c.output_gate_type == OutputGate::Silu { NormGate::Silu } else { NormGate::Sigmoid };
        let (o, z) = (ctx.asked(&o.reshape(&[b, t, nk, r, dv])?)?, ctx.asked(&z)?);
        let n = o.dim(1);
        let y = rms_norm_gated(&o, &self.norm, &z, c.output_norm_eps(), act)?;
        let y = taps.tap("attn.hook_z", y.reshape(&[b, n, nv, dv])?)?;
        project(&y.reshape(&[b, n, nv * dv])?, &self.out_proj)
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
            gate_up: b.normal(&format!("{name}.gate_up_proj.weight"), &[2 * i, h])?,
            down: b.normal(&format!("{name}.down_proj.weight"), &[h, i])?,
        })
    }
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        project(&swiglu(&project(x, &self.gate_up)?)?, &self.down)
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
            gate: b.normal("mlp.gate.weight", &[e, h])?,
            gate_up: b.normal("mlp.experts.gate_up_proj", &[e, 2 * i, h])?,
            down: b.normal("mlp.experts.down_proj", &[e, h, i])?,
            shared: if s > 0 { Some((Dense::new(b, "mlp.shared_expert", h, s)?, b.normal("mlp.shared_expert_gate.weight", &[1, h])?)) } else { None },
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
            y = add_shared(&y, &dense.forward(&flat)?, &g)?;
        }
        Ok((y.reshape(x.shape())?, logits))
    }
}
