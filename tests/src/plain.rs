//! The whole model once more, as plainly as it can be said: primitive ops and the ops' references, no fused kernel. Tests compare the decoder with it.

use engine::{Result, Tensor};
use nn::{AttentionGate, Decoder, GateActivation, GateGranularity, GateOp, LayerType, ModelConfig, OutputGate, QkNorm};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, reference as delta_rule};
use ops::gated_sdpa::{Attention, reference as gated_sdpa};
use ops::linear_cross_entropy::reference as linear_cross_entropy;
use ops::moe::{Moe, reference as moe};
use ops::rms_norm::{NormGate, reference as rms_norm};
use ops::rope::reference as rope;
use ops::short_conv::reference as short_conv;
use ops::swiglu::reference as swiglu;
use std::collections::HashMap;

/// A decoder's parameters by name, and its configuration.
pub struct Plain<'a> {
    config: &'a ModelConfig,
    params: HashMap<&'a str, &'a Tensor>,
}

/// What a layer needs beside its input.
struct Place<'a> {
    prefix: String,
    cu_seqlens: Option<&'a Tensor>,
    positions: Vec<usize>,
}

impl<'a> Plain<'a> {
    /// The same parameters as `model`: leaves, so that gradients can be compared.
    pub fn of(model: &'a Decoder) -> Self {
        let params = model.params().iter().map(|p| (p.name.as_str(), &p.tensor)).collect();
        Plain { config: model.config(), params }
    }

    fn get(&self, name: &str) -> &Tensor {
        self.params.get(name).unwrap_or_else(|| panic!("the model has no parameter `{name}`"))
    }

    /// The objective: as [`Decoder::loss`].
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor, cu_seqlens: Option<&Tensor>) -> Result<Tensor> {
        let c = self.config;
        let (b, t, h) = (tokens.dim(0), tokens.dim(1), c.hidden_size);
        let ids: Vec<i64> = tokens.cast(engine::DType::I64)?.to_vec()?;
        let embed = self.get("model.embed_tokens.weight");
        let mut x = embed.index_select(0, &Tensor::from_vec(ids, &[b * t])?)?.reshape(&[b, t, h])?;
        let starts = cu_seqlens.map_or(Ok(vec![0]), |c| c.to_vec::<i64>())?;
        let positions = (0..t as i64).map(|i| starts.iter().rev().find(|s| **s <= i).map_or(0, |s| (i - s) as usize)).collect();
        let mut at = Place { prefix: String::new(), cu_seqlens, positions };
        let mut routers = vec![];
        for layer in 0..c.num_hidden_layers {
            at.prefix = format!("model.layers.{layer}.");
            let post_norm = c.post_norm.contains(&c.layer_type(layer));
            // of attention, then of the feed-forward: the norm before it, and the one behind
            let (first, second) = match (c.sandwich_norm, post_norm) {
                (true, _) => (["input", "post_attention"], ["pre_feedforward", "post_feedforward"]),
                (_, true) => (["", "post_attention"], ["", "post_feedforward"]),
                _ => (["input", ""], ["post_attention", ""]),
            };
            let norm = |x: &Tensor, which: &str| {
                if which.is_empty() { Ok(x.clone()) } else { self.norm(x, &format!("{}{which}_layernorm.weight", at.prefix)) }
            };
            let normed = norm(&x, first[0])?;
            let y = match c.layer_type(layer) {
                LayerType::LinearAttention => self.gated_delta_net(&normed, &at, true)?,
                LayerType::DeltaNet => self.gated_delta_net(&normed, &at, false)?,
                LayerType::Mamba2 => self.mamba2(&normed, &at)?,
                LayerType::FullAttention => self.attention(&normed, &at, None)?,
                LayerType::SlidingAttention => self.attention(&normed, &at, Some(c.sliding_window))?,
            };
            x = x.add(&norm(&y, first[1])?)?;
            if !c.has_feed_forward(layer) {
                continue;
            }
            let normed = norm(&x, second[0])?.reshape(&[b * t, h])?;
            let mlp = format!("{}mlp.", at.prefix);
            let y = if c.is_sparse(layer) {
                let logits = normed.linear(self.get(&format!("{mlp}gate.weight")))?;
                let op = Moe { top_k: c.num_experts_per_tok, norm_topk: c.norm_topk_prob };
                let (up, down) = (self.get(&format!("{mlp}experts.gate_up_proj")), self.get(&format!("{mlp}experts.down_proj")));
                let mut y = moe::moe(op, &normed, &logits, up, down)?;
                if c.shared_expert_intermediate_size > 0 {
                    let gate = normed.linear(self.get(&format!("{mlp}shared_expert_gate.weight")))?.sigmoid()?;
                    y = y.add(&self.dense(&normed, &format!("{mlp}shared_expert."))?.mul(&gate)?)?;
                }
                routers.push(logits);
                y
            } else {
                self.dense(&normed, &mlp)?
            };
            x = x.add(&norm(&y.reshape(&[b, t, h])?, second[1])?)?;
        }
        let x = self.norm(&x, "model.norm.weight")?.reshape(&[b * t, h])?;
        let head = if c.tie_word_embeddings { embed } else { self.get("lm_head.weight") };
        let loss = linear_cross_entropy::linear_cross_entropy(&x, head, targets)?;
        if routers.is_empty() { Ok(loss) } else { loss.add(&self.router_losses(&routers)?) }
    }

    /// Load balancing (E · Σ f P over the tokens of all layers) and z-loss, with their coefficients.
    fn router_losses(&self, routers: &[Tensor]) -> Result<Tensor> {
        let c = self.config;
        let all = Tensor::cat(&routers.iter().collect::<Vec<_>>(), 0)?;
        let (n, e, k) = (all.dim(0), c.num_experts, c.num_experts_per_tok);
        let mut share = vec![0.0; e];
        for i in all.detach().topk(k)?.1.to_vec::<i64>()? {
            share[i as usize] += 1.0 / n as f64;
        }
        let share = Tensor::from_vec(share, &[e])?.cast(all.dtype())?;
        let balance = all.softmax(1)?.mean(&[0], false)?.mul(&share)?.sum(&[0], false)?;
        let log_sum_exp = all.narrow(1, 0, 1)?.sub(&all.log_softmax(1)?.narrow(1, 0, 1)?)?;
        let z = log_sum_exp.square()?.mean(&[0, 1], false)?;
        balance.affine(e as f64 * c.router_aux_loss_coef, 0.0)?.add(&z.affine(c.router_z_loss_coef, 0.0)?)
    }

    fn norm(&self, x: &Tensor, weight: &str) -> Result<Tensor> {
        rms_norm::rms_norm(x, self.get(weight), self.config.rms_norm_eps, self.config.zero_centered_norms)
    }

    fn dense(&self, x: &Tensor, prefix: &str) -> Result<Tensor> {
        swiglu::swiglu(&x.linear(self.get(&format!("{prefix}gate_up_proj.weight")))?)?.linear(self.get(&format!("{prefix}down_proj.weight")))
    }

    fn attention(&self, x: &Tensor, at: &Place, window: Option<usize>) -> Result<Tensor> {
        let c = self.config;
        let (b, t, n, d) = (x.dim(0), x.dim(1), c.num_attention_heads, c.head_dim);
        let get = |name: &str| self.get(&format!("{}self_attn.{name}.weight", at.prefix));
        let width = |gate: &AttentionGate, d: usize| match gate.granularity {
            GateGranularity::None => 0,
            GateGranularity::Headwise => 1,
            GateGranularity::Elementwise => d,
        };
        let gate_dim = if c.attention_gate.input { width(&c.attention_gate, d) } else { 0 };
        let project = |x: &Tensor, name: &str| {
            let y = x.linear(get(name))?;
            if c.attention_bias { y.add(self.get(&format!("{}self_attn.{name}.bias", at.prefix))) } else { Ok(y) }
        };
        // y [b, t, heads, width of a head]
        let gated = |gate: &AttentionGate, y: &Tensor, name: &str, columns: Option<&Tensor>| {
            let (heads, w) = (y.dim(2), width(gate, y.dim(3)));
            if w == 0 {
                return Ok(y.clone());
            }
            let logits = match columns {
                Some(columns) => columns.clone(),
                None if gate.input => x.linear(get(name))?.reshape(&[b, t, heads, w])?,
                None => self.get(&format!("{}self_attn.{name}.table", at.prefix)).reshape(&[1, 1, heads, w])?,
            };
            let score = match gate.activation {
                GateActivation::Sigmoid => logits.sigmoid()?,
                GateActivation::Silu => logits.mul(&logits.sigmoid()?)?,
                GateActivation::NsSigmoid => logits.sigmoid()?.affine(0.5, 0.5)?,
                GateActivation::Identity => logits,
            };
            let score = if gate.shared { score.sum(&[2], true)?.affine(1.0 / heads as f64, 0.0)? } else { score };
            if gate.op == GateOp::Add { y.add(&score) } else { y.mul(&score) }
        };
        let qg = project(x, "q_proj")?.reshape(&[b, t, n, d + gate_dim])?;
        let q = gated(&c.query_gate, &qg.narrow(3, 0, d)?, "query_gate", None)?;
        let k = gated(&c.key_gate, &self.switched(x, &project(x, "k_proj")?, c.switch_heads.keys, at)?, "key_gate", None)?;
        let v = gated(&c.value_gate, &self.switched(x, &project(x, "v_proj")?, true, at)?, "value_gate", None)?;
        let turned = |x: &Tensor, norm: &str| {
            let of = |x: &Tensor| rms_norm::rms_norm(x, get(norm), c.rms_norm_eps, c.zero_centered_norms);
            let x = match c.qk_norm {
                QkNorm::Head => of(x)?,
                QkNorm::Projection => of(&x.reshape(&[b, t, x.dim(2) * d])?)?.reshape(x.shape())?,
                QkNorm::None => x.clone(),
            };
            rope::rope(&x, (d as f64 * c.partial_rotary_factor) as usize, c.rope_theta, &at.positions)
        };
        let (q, k) = (turned(&q, "q_norm")?, turned(&k, "k_norm")?);
        let attention = Attention { causal: true, window, scale: None };
        let o = gated_sdpa::composed(&q, &k, &v, None, at.cu_seqlens, attention)?;
        let o = if c.sdpa_norm { rms_norm::rms_norm(&o, get("sdpa_norm"), c.rms_norm_eps, c.zero_centered_norms)? } else { o };
        let o = if c.sdpa_silu { o.mul(&o.sigmoid()?)? } else { o };
        let columns = if gate_dim > 0 { Some(qg.narrow(3, d, gate_dim)?) } else { None };
        let o = gated(&c.attention_gate, &o, "attention_gate", columns.as_ref())?;
        let y = project(&o.reshape(&[b, t, n * d])?, "o_proj")?;
        gated(&c.dense_gate, &y.reshape(&[b, t, 1, c.hidden_size])?, "dense_gate", None)?.reshape(&[b, t, c.hidden_size])
    }

    /// Keys or values from all experts, `y [b, t, heads · experts · D]`: an expert counts if fewer than `top_k` others have larger logits.
    fn switched(&self, x: &Tensor, y: &Tensor, switched: bool, at: &Place) -> Result<Tensor> {
        let (b, t, heads, d) = (x.dim(0), x.dim(1), self.config.num_key_value_heads, self.config.head_dim);
        let (e, k) = (self.config.switch_heads.experts, self.config.switch_heads.top_k);
        if !switched || e == 0 {
            return y.reshape(&[b, t, heads, d]);
        }
        let logits = x.linear(self.get(&format!("{}self_attn.switch_router.weight", at.prefix)))?;
        let all = logits.to_vec::<f64>()?;
        let counts = |i: usize| all[i / e * e..][..e].iter().filter(|other| **other > all[i]).count() < k;
        let mask: Vec<f64> = (0..all.len()).map(|i| f64::from(u8::from(counts(i)))).collect();
        let weights = logits.sigmoid()?.mul(&Tensor::from_vec(mask, logits.shape())?.cast(x.dtype())?)?;
        let (y, weights) = (y.reshape(&[b, t, heads, e, d])?, weights.reshape(&[b, t, heads, e, 1])?);
        let mut sum = y.narrow(3, 0, 1)?.mul(&weights.narrow(3, 0, 1)?)?;
        for i in 1..e {
            sum = sum.add(&y.narrow(3, i, 1)?.mul(&weights.narrow(3, i, 1)?)?)?;
        }
        sum.reshape(&[b, t, heads, d])
    }

    fn gated_delta_net(&self, x: &Tensor, at: &Place, decays: bool) -> Result<Tensor> {
        let c = self.config;
        let (b, t, nk, nv) = (x.dim(0), x.dim(1), c.linear_num_key_heads, c.linear_num_value_heads);
        let (dk, dv, r) = (c.linear_key_head_dim, c.linear_value_head_dim, nv / nk);
        let get = |name: &str| self.get(&format!("{}linear_attn.{name}", at.prefix));
        let qkvz = x.linear(get("in_proj_qkvz.weight"))?.reshape(&[b, t, nk, 2 * dk + 2 * r * dv])?;
        let ba = x.linear(get("in_proj_ba.weight"))?.reshape(&[b, t, nk, if decays { 2 * r } else { r }])?;
        let part = |from: usize, n: usize| qkvz.narrow(3, from, n)?.reshape(&[b, t, nk * n]);
        // transformers' order of channels: all q, all k, all v
        let qkv = Tensor::cat(&[&part(0, dk)?, &part(dk, dk)?, &part(2 * dk, r * dv)?], 2)?;
        let weight = get("conv1d.weight");
        let qkv = short_conv::short_conv(&qkv, &weight.reshape(&[weight.dim(0), c.linear_conv_kernel_dim])?, true, at.cu_seqlens)?;
        let q = qkv.narrow(2, 0, nk * dk)?.reshape(&[b, t, nk, dk])?;
        let k = qkv.narrow(2, nk * dk, nk * dk)?.reshape(&[b, t, nk, dk])?;
        let v = qkv.narrow(2, 2 * nk * dk, nv * dv)?.reshape(&[b, t, nv, dv])?;
        let z = part(2 * dk + r * dv, r * dv)?.reshape(&[b, t, nv, dv])?;
        let beta = ba.narrow(3, 0, r)?.reshape(&[b, t, nv])?.sigmoid()?;
        let beta = if c.linear_allow_neg_eigval { beta.affine(2.0, 0.0)? } else { beta };
        let log_decay = || ba.narrow(3, r, r)?.reshape(&[b, t, nv])?.add(get("dt_bias"))?.softplus()?.mul(&get("A_log").exp()?)?.neg();
        let log_decay = if decays { Some(log_decay()?) } else { None };
        let inputs = DeltaRuleInputs { log_decay: log_decay.as_ref(), beta: Some(&beta), initial_state: None, cu_seqlens: at.cu_seqlens };
        let (o, _) = delta_rule::delta_rule(DeltaRule::gated_delta_net(), &q, &k, &v, inputs)?;
        let act = if c.output_gate_type == OutputGate::Silu { NormGate::Silu } else { NormGate::Sigmoid };
        let y = rms_norm::rms_norm_gated(&o, get("norm.weight"), &z, if c.linear_norm_eps > 0.0 { c.linear_norm_eps } else { c.rms_norm_eps }, act)?;
        y.reshape(&[b, t, nv * dv])?.linear(get("out_proj.weight"))
    }

    fn mamba2(&self, x: &Tensor, at: &Place) -> Result<Tensor> {
        let c = self.config;
        let (b, t, heads, p) = (x.dim(0), x.dim(1), c.mamba_num_heads, c.mamba_head_dim);
        let (groups, n, inner) = (c.mamba_n_groups, c.mamba_state_size, heads * p);
        let get = |name: &str| self.get(&format!("{}mamba.{name}", at.prefix));
        let all = x.linear(get("in_proj.weight"))?;
        let weight = get("conv1d.weight");
        let xbc = all.narrow(2, inner, inner + 2 * groups * n)?.contiguous()?;
        let xbc = short_conv::short_conv(&xbc, &weight.reshape(&[weight.dim(0), c.mamba_conv_kernel])?, false, at.cu_seqlens)?;
        let xbc = if c.mamba_use_conv_bias { xbc.add(get("conv1d.bias"))? } else { xbc }.silu()?;
        let of = |from: usize, heads: usize, width: usize| xbc.narrow(2, from, heads * width)?.reshape(&[b, t, heads, width]);
        let (v, k, q) = (of(0, heads, p)?, of(inner, groups, n)?, of(inner + groups * n, groups, n)?);
        let step = all.narrow(2, 2 * inner + 2 * groups * n, heads)?.add(get("dt_bias"))?.softplus()?;
        let [lo, hi] = c.mamba_time_step_limit.map(|x| Tensor::full(x, &[], step.dtype(), step.device()));
        let step = step.maximum(&lo?)?.minimum(&hi?)?;
        let log_decay = step.mul(&get("A_log").exp()?)?.neg()?;
        // Δ is in the values
        let written = v.mul(&step.reshape(&[b, t, heads, 1])?)?;
        let mut rule = DeltaRule::gated_delta_net();
        (rule.erase, rule.qk_l2norm, rule.scale) = (false, false, Some(1.0));
        let inputs = DeltaRuleInputs { log_decay: Some(&log_decay), beta: None, initial_state: None, cu_seqlens: at.cu_seqlens };
        let (o, _) = delta_rule::delta_rule(rule, &q, &k, &written, inputs)?;
        let y = o.add(&v.mul(&get("D").reshape(&[heads, 1])?)?)?.reshape(&[b, t, inner])?;
        let y = y.mul(&all.narrow(2, 0, inner)?.silu()?)?.reshape(&[b, t, groups, inner / groups])?;
        let y = y.mul(&y.square()?.mean(&[3], true)?.affine(1.0, c.rms_norm_eps)?.rsqrt()?)?.reshape(&[b, t, inner])?;
        y.mul(get("norm.weight"))?.linear(get("out_proj.weight"))
    }
}
