//! Mamba2 (2405.21060): the state-space dual as a delta rule without erasure.

use crate::cache::Cache;
use crate::config::{ModelConfig, Recurrence};
use crate::init::Builder;
use crate::layers::{Context, project, wide};
use crate::taps::{Taps, effective_attention, states};
use engine::{Result, Tensor};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, delta_rule};
use ops::rms_norm::rms_norm;
use ops::short_conv::short_conv;

/// The block of Mamba2 (2405.21060 §7 and its code), per head with state `S [N, P]`, where B and C are a group's:
///
/// `Δ = softplus(dt + dt_bias)`, `S_t = exp(−Δ_t e^{A_log}) S_{t−1} + Δ_t B_t x_tᵀ`, `y_t = S_tᵀ C_t + D x_t`.
///
/// The input projection's rows are [z | x | B | C | dt]; x, B and C go through a short convolution and SiLU; `y · silu(z)` is normalised, each group by
/// itself, before the output projection.
pub(crate) struct Mamba2 {
    sizes: Recurrence,
    in_proj: Tensor,
    conv1d: Tensor,
    conv_bias: Option<Tensor>,
    dt_bias: Tensor,
    a_log: Tensor,
    d: Tensor,
    norm: Tensor,
    out_proj: Tensor,
}

/// Ends of the decay A that it starts with, as in its authors' code.
const DECAYS: [f64; 2] = [1.0, 16.0];

impl Mamba2 {
    pub fn new(b: &mut Builder, c: &ModelConfig, sizes: Recurrence) -> crate::Result<Self> {
        let (h, inner, keys, heads) = (c.hidden_size, sizes.values(), sizes.keys(), sizes.value_heads);
        let steps = [c.mamba_time_step_min, c.mamba_time_step_max, c.mamba_time_step_floor];
        let (channels, taps) = (sizes.channels(), c.mamba_conv_kernel);
        Ok(Mamba2 {
            sizes,
            in_proj: b.normal_of_parts("mamba.in_proj.weight", 1, &[("z", inner), ("x", inner), ("B", keys), ("C", keys), ("dt", heads)], h)?,
            conv1d: b.conv("mamba.conv1d.weight", channels, taps)?,
            conv_bias: if c.mamba_use_conv_bias { Some(b.conv_bias("mamba.conv1d.bias", channels, taps)?) } else { None },
            dt_bias: b.dt_bias("mamba.dt_bias", heads, steps)?,
            a_log: b.a_log("mamba.A_log", heads, DECAYS)?,
            d: b.constant("mamba.D", &[heads], 1.0)?,
            norm: b.constant("mamba.norm.weight", &[inner], 1.0)?,
            out_proj: b.normal("mamba.out_proj.weight", &[h, inner])?,
        })
    }

    pub fn forward(&self, x: &Tensor, c: &ModelConfig, ctx: &Context, cache: Option<&mut Cache>, taps: &mut Taps) -> Result<Tensor> {
        let Recurrence { key_heads: g, value_heads: heads, key_dim: n, value_dim: p, .. } = self.sizes;
        let (b, t, r) = (x.dim(0), x.dim(1), heads / g);
        let (inner, keys, acc) = (heads * p, g * n, wide(x));
        let parts = project(x, &self.in_proj)?.split(2, &[inner, inner, keys, keys, heads])?;
        let (old, state) = match &cache {
            Some(Cache::Recurrent(conv, state)) => (Some(conv.clone()), Some(state.clone())),
            _ => (None, None),
        };
        // the convolution's channels are [x | B | C]: three calls read their parts in place
        let filters = self.conv1d.split(0, &[inner, keys, keys])?;
        let biases = self.conv_bias.as_ref().map(|w| w.cast(x.dtype())?.split(0, &[inner, keys, keys])).transpose()?;
        let mut mix = |i: usize, name: &str, shape: [usize; 2]| {
            let shape = [b, t, shape[0], shape[1]];
            let x = taps.tap(name, parts[1 + i].reshape(&shape)?)?;
            let (y, last) = short_conv(&x, &filters[i], biases.is_none(), old.as_ref().map(|o| &o[i]), ctx.cu_seqlens)?;
            let y = match &biases {
                Some(bias) => y.add(&bias[i].reshape(&shape[2..])?)?.silu()?,
                None => y,
            };
            Ok((y, last))
        };
        let (v, sv) = mix(0, "attn.hook_v_pre_conv", [g, r * p])?;
        let (k, sk) = mix(1, "attn.hook_k_pre_conv", [g, n])?;
        let (q, sq) = mix(2, "attn.hook_q_pre_conv", [g, n])?;
        let v = v.reshape(&[b, t, heads, p])?;
        let step = parts[4].cast(acc)?.add(&self.dt_bias.cast(acc)?)?.softplus()?;
        let step = clamped(&step, c.mamba_time_step_limit)?;
        let (q, k, v) = (taps.tap("attn.hook_q", q)?, taps.tap("attn.hook_k", k)?, taps.tap("attn.hook_v", v)?);
        let step = taps.tap("attn.hook_beta", step)?;
        let log_decay = taps.tap("attn.hook_log_decay", step.mul(&self.a_log.cast(acc)?.exp()?.neg()?)?)?;
        let mut rule = DeltaRule::gated_delta_net();
        (rule.erase, rule.qk_l2norm, rule.scale) = (false, false, Some(1.0));
        let inputs = DeltaRuleInputs { log_decay: Some(&log_decay), beta: Some(&step), initial_state: state.as_ref(), cu_seqlens: ctx.cu_seqlens };
        taps.show("attn.hook_effective_attention", || effective_attention(rule, &q, &k, heads, inputs))?;
        taps.show("attn.hook_states", || states(rule, &q, &k, &v, inputs))?;
        let (o, last) = delta_rule(rule, &q, &k, &v, inputs)?;
        let (o, last) = (taps.tap("attn.hook_recurrence_out", o)?, taps.tap("attn.hook_state", last)?);
        if let Some(cache) = cache {
            *cache = Cache::Recurrent([sv, sk, sq], last);
        }
        let z = taps.tap("attn.hook_gate_logits", parts[0].reshape(&[b, t, g, r, p])?)?;
        taps.show("attn.hook_gate", || z.silu())?;
        let (o, v, z) = (ctx.asked(&o)?, ctx.asked(&v)?, ctx.asked(&z)?);
        let y = o.add(&v.mul(&self.d.cast(v.dtype())?.reshape(&[heads, 1])?)?)?;
        let n = y.dim(1);
        let y = y.reshape(&[b, n, g, r * p])?.mul(&z.reshape(&[b, n, g, r * p])?.silu()?)?;
        let y = taps.tap("attn.hook_z", self.normalised(&y, c.rms_norm_eps)?.reshape(&[b, n, heads, p])?)?;
        project(&y.reshape(&[b, n, inner])?, &self.out_proj)
    }

    /// The RMS norm of `y [B, T, G, inner/G]`, each group by itself, times all groups' weights.
    fn normalised(&self, y: &Tensor, eps: f64) -> Result<Tensor> {
        let (g, width) = (y.dim(2), y.dim(3));
        if g == 1 {
            return rms_norm(y, &self.norm, eps, false);
        }
        // one weight of all rows is what the kernel knows
        let ones = Tensor::ones(&[width], self.norm.dtype(), y.device())?;
        rms_norm(y, &ones, eps, false)?.mul(&self.norm.cast(y.dtype())?.reshape(&[g, width])?)
    }
}

/// Steps within their limits; a limit that none can reach costs nothing.
fn clamped(step: &Tensor, [lo, hi]: [f64; 2]) -> Result<Tensor> {
    let at = |x: f64| Tensor::full(x, &[], step.dtype(), step.device());
    let step = if lo > 0.0 { step.maximum(&at(lo)?)? } else { step.clone() };
    if hi < f64::from(f32::MAX) { step.minimum(&at(hi)?) } else { Ok(step) }
}
