//! Softmax attention: projections, norms, rotation, gates, and the kernel between them.

use crate::cache::Cache;
use crate::config::{GatePosition, LayerType, ModelConfig, QkNorm};
use crate::gates::{Gate, gated};
use crate::init::{Builder, Source};
use crate::layers::{Context, project};
use crate::switch::{Switch, mix};
use crate::taps::{Taps, attention_scores};
use engine::{Result, Tensor};
use ops::gated_sdpa::{Attention as Sdpa, attention_pattern, gated_sdpa};
use ops::rms_norm::rms_norm;
use ops::rope::{Positions, rope, rope_scaled};

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
    /// Frequencies of the rotation and its factor, where it is stretched.
    frequencies: Option<(Tensor, f64)>,
    output_gate: Option<Gate>,
    value_gate: Option<Gate>,
    key_gate: Option<Gate>,
    query_gate: Option<Gate>,
    dense_gate: Option<Gate>,
    /// Weight of the norm of each head's output.
    sdpa_norm: Option<Tensor>,
    switch: Option<Switch>,
}

impl Attention {
    pub fn new(b: &mut Builder, c: &ModelConfig, kind: LayerType) -> crate::Result<Self> {
        let (h, d) = (c.hidden_size, c.head_dim);
        let (q, kv) = (c.num_attention_heads * (d + c.gate_dim()), c.num_key_value_heads * d);
        let [values, keys] = c.switch_heads.projections().map(|experts| experts * kv);
        let q_proj = b.normal_of_parts("self_attn.q_proj.weight", c.num_attention_heads, &[("query", d), ("gate", c.gate_dim())], h)?;
        let k_proj = b.normal("self_attn.k_proj.weight", &[keys, h])?;
        let v_proj = b.normal("self_attn.v_proj.weight", &[values, h])?;
        let o_proj = b.normal("self_attn.o_proj.weight", &[h, c.num_attention_heads * d])?;
        let mut norm = |kind: &str, n: usize| b.constant(&format!("self_attn.{kind}_norm.weight"), &[n], c.norm_start());
        let norms = match c.qk_norm {
            QkNorm::Head => Some([norm("q", d)?, norm("k", d)?]),
            QkNorm::Projection => Some([norm("q", c.num_attention_heads * d)?, norm("k", kv)?]),
            QkNorm::None => None,
        };
        let mut bias = |kind: &str, n: usize| b.constant(&format!("self_attn.{kind}_proj.bias"), &[n], 0.0);
        let biases = if c.attention_bias { Some([bias("q", q)?, bias("k", keys)?, bias("v", values)?, bias("o", h)?]) } else { None };
        let sdpa_norm = if c.sdpa_norm { Some(b.constant("self_attn.sdpa_norm.weight", &[d], c.norm_start())?) } else { None };
        let window = (kind == LayerType::SlidingAttention).then_some(c.sliding_window);
        let frequencies = match c.scaled_frequencies() {
            Some((f, factor)) if c.rotary_dim() > 0 && !matches!(b.source, Source::Shapes) => {
                Some((Tensor::from_vec(&f, &[f.len()])?.to_device(&b.place.device)?, factor))
            }
            _ => None,
        };
        let switch = Switch::new(b, c)?;
        let mut gate = |at| Gate::new(b, c, at);
        let (output_gate, value_gate) = (gate(GatePosition::Attention)?, gate(GatePosition::Value)?);
        let (key_gate, query_gate, dense_gate) = (gate(GatePosition::Key)?, gate(GatePosition::Query)?, gate(GatePosition::Dense)?);
        Ok(Attention {
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            biases,
            norms,
            window,
            frequencies,
            output_gate,
            value_gate,
            key_gate,
            query_gate,
            dense_gate,
            sdpa_norm,
            switch,
        })
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
        let chosen = self.switch.as_ref().map(|s| s.weights(x, taps)).transpose()?;
        let [of_values, of_keys] = c.switch_heads.projections().map(|experts| experts * d);
        let k = biased(project(x, &self.k_proj)?, 1)?.reshape(&[b, t, c.num_key_value_heads, of_keys])?;
        let v = biased(project(x, &self.v_proj)?, 2)?.reshape(&[b, t, c.num_key_value_heads, of_values])?;
        let (k, v) = match &chosen {
            Some(w) => (if c.switch_heads.keys { mix(&k, w)? } else { k }, mix(&v, w)?),
            None => (k, v),
        };
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
            match &self.frequencies {
                _ if c.rotary_dim() == 0 => Ok(x),
                Some((frequencies, factor)) => rope_scaled(&x, frequencies, *factor, at),
                None => rope(&x, c.rotary_dim(), c.rope_theta, at),
            }
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
            taps.show("attn.hook_attn_scores", || attention_scores(q, k, ctx.cu_seqlens, masked))?;
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
                let each = cache.key_values(&k, &v, self.window)?.iter_mut().enumerate().map(|(i, past)| {
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
