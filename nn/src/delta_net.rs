//! Gated DeltaNet, and what becomes of it without decay or erasure.

use crate::cache::Cache;
use crate::config::{ModelConfig, OutputGate};
use crate::init::Builder;
use crate::layers::{Context, project, wide};
use crate::taps::{Taps, effective_attention, states};
use engine::{Result, Tensor};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, delta_rule};
use ops::rms_norm::{NormGate, rms_norm_gated};
use ops::short_conv::short_conv;

/// Gated DeltaNet (2412.06464 §3.4), with the row order of Qwen3-Next's projections: per key head, [q | k | v | z] and [b | a].
pub(crate) struct GatedDeltaNet {
    in_proj_qkvz: Tensor,
    in_proj_ba: Tensor,
    conv1d: Tensor,
    /// `dt_bias` and `A_log`, of a rule that decays.
    decay: Option<[Tensor; 2]>,
    norm: Tensor,
    out_proj: Tensor,
}

impl GatedDeltaNet {
    pub fn new(b: &mut Builder, c: &ModelConfig) -> crate::Result<Self> {
        let (h, nk, nv) = (c.hidden_size, c.linear_num_key_heads, c.linear_num_value_heads);
        let (dk, dv, r) = (c.linear_key_head_dim, c.linear_value_head_dim, nv / nk);
        let (k, v) = (nk * dk, nv * dv);
        Ok(GatedDeltaNet {
            in_proj_qkvz: b.normal_of_parts("linear_attn.in_proj_qkvz.weight", nk, &[("q", dk), ("k", dk), ("v", r * dv), ("z", r * dv)], h)?,
            in_proj_ba: b.normal_of_parts("linear_attn.in_proj_ba.weight", nk, &[("b", r), ("a", if c.linear_decay { r } else { 0 })], h)?,
            conv1d: b.conv("linear_attn.conv1d.weight", 2 * k + v, c.linear_conv_kernel_dim)?,
            decay: if c.linear_decay { Some([b.dt_bias("linear_attn.dt_bias", nv)?, b.a_log("linear_attn.A_log", nv)?]) } else { None },
            norm: b.constant("linear_attn.norm.weight", &[c.linear_value_head_dim], 1.0)?,
            out_proj: b.normal("linear_attn.out_proj.weight", &[h, v])?,
        })
    }

    pub fn forward(&self, x: &Tensor, c: &ModelConfig, ctx: &Context, cache: Option<&mut Cache>, taps: &mut Taps) -> Result<Tensor> {
        let (b, t, nk, nv) = (x.dim(0), x.dim(1), c.linear_num_key_heads, c.linear_num_value_heads);
        let (dk, dv, r) = (c.linear_key_head_dim, c.linear_value_head_dim, nv / nk);
        let qkvz = project(x, &self.in_proj_qkvz)?.reshape(&[b, t, nk, 2 * dk + 2 * r * dv])?;
        let ba = project(x, &self.in_proj_ba)?.reshape(&[b, t, nk, if self.decay.is_some() { 2 * r } else { r }])?;
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
        let acc = wide(x);
        let beta = ba.narrow(3, 0, r)?.reshape(&[b, t, nv])?.cast(acc)?.sigmoid()?;
        let beta = if c.linear_allow_neg_eigval { beta.affine(2.0, 0.0)? } else { beta };
        let log_decay = |[dt_bias, a_log]: &[Tensor; 2]| {
            let a = ba.narrow(3, r, r)?.reshape(&[b, t, nv])?.cast(acc)?;
            a.add(&dt_bias.cast(acc)?)?.softplus()?.mul(&a_log.cast(acc)?.exp()?.neg()?)
        };
        let log_decay = self.decay.as_ref().map(log_decay).transpose()?;
        let (q, k, v) = (taps.tap("attn.hook_q", q)?, taps.tap("attn.hook_k", k)?, taps.tap("attn.hook_v", v)?);
        let beta = taps.tap("attn.hook_beta", beta)?;
        let log_decay = log_decay.map(|g| taps.tap("attn.hook_log_decay", g)).transpose()?;
        let mut rule = DeltaRule::gated_delta_net();
        rule.erase = c.linear_erase;
        let inputs = DeltaRuleInputs { log_decay: log_decay.as_ref(), beta: Some(&beta), initial_state: state.as_ref(), cu_seqlens: ctx.cu_seqlens };
        taps.show("attn.hook_effective_attention", || effective_attention(rule, &q, &k, nv, inputs))?;
        taps.show("attn.hook_states", || states(rule, &q, &k, &v, inputs))?;
        let (o, last) = delta_rule(rule, &q, &k, &v, inputs)?;
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
