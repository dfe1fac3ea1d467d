//! Gated DeltaNet (2412.06464) and DeltaNet (2406.06484), and what becomes of them without a part.

use crate::cache::Cache;
use crate::config::{LinearActivation, LinearQkNorm, ModelConfig, OutputGate, Recurrence};
use crate::init::Builder;
use crate::layers::{Context, project, wide};
use crate::taps::{Taps, effective_attention, states};
use engine::{Result, Tensor};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, delta_rule};
use ops::rms_norm::{NormGate, rms_norm, rms_norm_gated};
use ops::short_conv::short_conv;

/// Added to the 1-norm that queries and keys are divided by.
const L1_EPS: f64 = 1e-6;

/// The block of Gated DeltaNet (2412.06464 §3.4), with the row order of Qwen3-Next's projections: per key head, [q | k | v | z] and [b | a]; without an output
/// gate there is no z, without decay no a.
pub(crate) struct DeltaNet {
    sizes: Recurrence,
    in_proj_qkvz: Tensor,
    in_proj_ba: Tensor,
    conv1d: Option<Tensor>,
    /// `dt_bias` and `A_log`, of a rule that decays.
    decay: Option<[Tensor; 2]>,
    norm: Option<Tensor>,
    out_proj: Tensor,
}

impl DeltaNet {
    pub fn new(b: &mut Builder, c: &ModelConfig, sizes: Recurrence) -> crate::Result<Self> {
        let Recurrence { key_heads: nk, value_heads: nv, key_dim: dk, value_dim: dv, decays, .. } = sizes;
        let (h, r) = (c.hidden_size, nv / nk);
        let z = if c.linear_output_gate { r * dv } else { 0 };
        Ok(DeltaNet {
            sizes,
            in_proj_qkvz: b.normal_of_parts("linear_attn.in_proj_qkvz.weight", nk, &[("q", dk), ("k", dk), ("v", r * dv), ("z", z)], h)?,
            in_proj_ba: b.normal_of_parts("linear_attn.in_proj_ba.weight", nk, &[("b", r), ("a", if decays { r } else { 0 })], h)?,
            conv1d: if c.linear_short_conv { Some(b.conv("linear_attn.conv1d.weight", sizes.channels(), c.linear_conv_kernel_dim)?) } else { None },
            decay: if decays { Some([b.dt_bias("linear_attn.dt_bias", nv, STEPS)?, b.a_log("linear_attn.A_log", nv, DECAYS)?]) } else { None },
            norm: if c.linear_output_norm { Some(b.constant("linear_attn.norm.weight", &[dv], 1.0)?) } else { None },
            out_proj: b.normal("linear_attn.out_proj.weight", &[h, nv * dv])?,
        })
    }

    pub fn forward(&self, x: &Tensor, c: &ModelConfig, ctx: &Context, cache: Option<&mut Cache>, taps: &mut Taps) -> Result<Tensor> {
        let Recurrence { key_heads: nk, value_heads: nv, key_dim: dk, value_dim: dv, erases, .. } = self.sizes;
        let (b, t, r) = (x.dim(0), x.dim(1), nv / nk);
        let z_width = if c.linear_output_gate { r * dv } else { 0 };
        let qkvz = project(x, &self.in_proj_qkvz)?.reshape(&[b, t, nk, 2 * dk + r * dv + z_width])?;
        let ba = project(x, &self.in_proj_ba)?.reshape(&[b, t, nk, if self.decay.is_some() { 2 * r } else { r }])?;
        let (old, state) = match &cache {
            Some(Cache::Recurrent(conv, state)) => (Some(conv.clone()), Some(state.clone())),
            _ => (None, None),
        };
        let qkvz = qkvz.split(3, &[dk, dk, r * dv, z_width])?;
        // the convolution runs over [all q | all k | all v], channel by channel: three calls read their parts in place
        let filters = self.conv1d.as_ref().map(|w| w.split(0, &[nk * dk, nk * dk, nv * dv])).transpose()?;
        let mut mix = |i: usize, name: &str, act: LinearActivation| {
            let x = taps.tap(name, qkvz[i].clone())?;
            let Some(filters) = &filters else {
                let none = Tensor::zeros(&[b, 0, x.dim(2) * x.dim(3)], wide(&x), x.device())?;
                return Ok((activated(&x.contiguous()?, act)?, none));
            };
            let silu = act == LinearActivation::Silu;
            let (y, last) = short_conv(&x, &filters[i], silu, old.as_ref().map(|o| &o[i]), ctx.cu_seqlens)?;
            Ok((if silu { y } else { activated(&y, act)? }, last))
        };
        let act = c.linear_qk_activation;
        let (q, sq) = mix(0, "attn.hook_q_pre_conv", act)?;
        let (k, sk) = mix(1, "attn.hook_k_pre_conv", act)?;
        let (v, sv) = mix(2, "attn.hook_v_pre_conv", LinearActivation::Silu)?;
        let v = v.reshape(&[b, t, nv, dv])?;
        let acc = wide(x);
        let beta = ba.narrow(3, 0, r)?.reshape(&[b, t, nv])?.cast(acc)?.sigmoid()?;
        let beta = if c.linear_allow_neg_eigval && erases { beta.affine(2.0, 0.0)? } else { beta };
        let log_decay = |[dt_bias, a_log]: &[Tensor; 2]| {
            let a = ba.narrow(3, r, r)?.reshape(&[b, t, nv])?.cast(acc)?;
            a.add(&dt_bias.cast(acc)?)?.softplus()?.mul(&a_log.cast(acc)?.exp()?.neg()?)
        };
        let log_decay = self.decay.as_ref().map(log_decay).transpose()?;
        let (q, k, v) = (taps.tap("attn.hook_q", q)?, taps.tap("attn.hook_k", k)?, taps.tap("attn.hook_v", v)?);
        let beta = taps.tap("attn.hook_beta", beta)?;
        let log_decay = log_decay.map(|g| taps.tap("attn.hook_log_decay", g)).transpose()?;
        let (q, k) = if c.linear_qk_norm == LinearQkNorm::L1 { (l1(&q)?, l1(&k)?) } else { (q, k) };
        let mut rule = DeltaRule::gated_delta_net();
        (rule.erase, rule.qk_l2norm) = (erases, c.linear_qk_norm == LinearQkNorm::L2);
        let inputs = DeltaRuleInputs { log_decay: log_decay.as_ref(), beta: Some(&beta), initial_state: state.as_ref(), cu_seqlens: ctx.cu_seqlens };
        taps.show("attn.hook_effective_attention", || effective_attention(rule, &q, &k, nv, inputs))?;
        taps.show("attn.hook_states", || states(rule, &q, &k, &v, inputs))?;
        let (o, last) = delta_rule(rule, &q, &k, &v, inputs)?;
        let (o, last) = (taps.tap("attn.hook_recurrence_out", o)?, taps.tap("attn.hook_state", last)?);
        if let Some(cache) = cache {
            *cache = Cache::Recurrent([sq, sk, sv], last);
        }
        let o = ctx.asked(&o.reshape(&[b, t, nk, r, dv])?)?;
        let z = if c.linear_output_gate { Some(qkvz[3].reshape(&[b, t, nk, r, dv])?) } else { None };
        let y = self.output(&o, z, c, ctx, taps)?;
        let n = y.dim(1);
        let y = taps.tap("attn.hook_z", y.reshape(&[b, n, nv, dv])?)?;
        project(&y.reshape(&[b, n, nv * dv])?, &self.out_proj)
    }

    /// The norm of `o [B, T, Hk, R, Dv]` and its gate, of which there may be both, one, or none.
    fn output(&self, o: &Tensor, z: Option<Tensor>, c: &ModelConfig, ctx: &Context, taps: &mut Taps) -> Result<Tensor> {
        let silu = c.output_gate_type == OutputGate::Silu;
        let score = |z: &Tensor| if silu { z.silu() } else { z.sigmoid() };
        let Some(z) = z else {
            return self.norm.as_ref().map_or_else(|| Ok(o.clone()), |w| rms_norm(o, w, c.output_norm_eps(), false));
        };
        let z = taps.tap("attn.hook_gate_logits", z)?;
        taps.show("attn.hook_gate", || score(&z))?;
        let z = ctx.asked(&z)?;
        match &self.norm {
            Some(w) => rms_norm_gated(o, w, &z, c.output_norm_eps(), if silu { NormGate::Silu } else { NormGate::Sigmoid }),
            None => o.mul(&score(&z)?),
        }
    }
}

/// Ends of the steps that the decay starts with, and what smaller ones are raised to.
const STEPS: [f64; 3] = [1e-3, 1e-1, 1e-4];
/// Ends of the decay A that it starts with, of which the logarithm is taken.
const DECAYS: [f64; 2] = [0.01, 16.0];

fn activated(x: &Tensor, act: LinearActivation) -> Result<Tensor> {
    match act {
        LinearActivation::Silu => x.silu(),
        LinearActivation::Relu => x.relu(),
        // e^min(x, 0) + max(x, 0)
        LinearActivation::Elu1 => x.neg()?.relu()?.neg()?.exp()?.add(&x.relu()?),
        LinearActivation::Identity => Ok(x.clone()),
    }
}

/// `x / (Σ |x| + ε)` over the last axis.
fn l1(x: &Tensor) -> Result<Tensor> {
    let acc = wide(x);
    let sums = x.cast(acc)?.abs()?.sum(&[3], true)?.affine(1.0, L1_EPS)?;
    x.cast(acc)?.div(&sums)?.cast(x.dtype())
}
