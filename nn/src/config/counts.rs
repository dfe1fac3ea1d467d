//! Parameters, operations and memory of a configuration, without making the model.

use super::{GatePosition, LayerType, ModelConfig, QkNorm};
use crate::{Error, Result};

impl ModelConfig {
    /// What can be done about a model that is too large.
    pub const SMALLER: &str = "make the model smaller: `hidden_size`, `num_hidden_layers`, `num_experts`, `vocab_size`";

    /// Parameters: all of them, and those that act on one token (routed experts count `num_experts_per_tok` times). `usize::MAX` if there are more.
    pub fn parameters(&self) -> (usize, usize) {
        let n = |x: usize| x as u128; // products of four sizes
        let h = n(self.hidden_size);
        let embed = n(self.vocab_size) * h * if self.tie_word_embeddings { 1 } else { 2 };
        let (mut total, mut active) = (embed + h, embed + h);
        for i in 0..self.num_hidden_layers {
            let mixer = match self.layer_type(i) {
                kind if !kind.is_softmax() => self.recurrence_size(kind),
                _ => {
                    let (q, kv, d) = (n(self.num_attention_heads), n(self.num_key_value_heads) * n(self.head_dim), n(self.head_dim));
                    let norms = match self.qk_norm {
                        QkNorm::Head => 2 * d,
                        QkNorm::Projection => q * d + kv,
                        QkNorm::None => 0,
                    };
                    let gates: u128 = GatePosition::ALL.into_iter().map(|at| self.gate_size(at)).sum();
                    let router = n(self.num_key_value_heads) * n(self.switch_heads.experts) * h;
                    let both: u128 = self.switch_heads.projections().into_iter().map(|e| n(e) * kv).sum();
                    let norms = norms + if self.sdpa_norm { d } else { 0 };
                    h * (q * d + both) + norms + q * d * h + gates + router + if self.attention_bias { q * d + both + h } else { 0 }
                }
            };
            let dense = mixer + n(self.norm_names(i).iter().flatten().flatten().count()) * h;
            let (t, a) = if self.is_sparse(i) {
                let expert = 3 * h * n(self.moe_intermediate_size);
                let shared = if self.shared_expert_intermediate_size > 0 { 3 * h * n(self.shared_expert_intermediate_size) + h } else { 0 };
                let rest = shared + n(self.num_experts) * h;
                (n(self.num_experts) * expert + rest, n(self.num_experts_per_tok) * expert + rest)
            } else {
                // none without a feed-forward
                (3 * h * n(self.intermediate_size), 3 * h * n(self.intermediate_size))
            };
            total += dense + t;
            active += dense + a;
        }
        let fit = |x: u128| usize::try_from(x).unwrap_or(usize::MAX);
        (fit(total), fit(active))
    }

    /// Parameters of a recurrent mixer.
    fn recurrence_size(&self, kind: LayerType) -> u128 {
        let Some(r) = self.recurrence_of(kind) else { return 0 };
        let n = |x: usize| x as u128;
        let (h, heads, k, v, channels) = (n(self.hidden_size), n(r.value_heads), n(r.keys()), n(r.values()), n(r.channels()));
        if kind == LayerType::Mamba2 {
            // [z x B C dt], the convolution, dt_bias, A_log and D, the norm, the output projection
            let bias = if self.mamba_use_conv_bias { channels } else { 0 };
            return h * (v + channels + heads) + channels * n(self.mamba_conv_kernel) + bias + 3 * heads + v + v * h;
        }
        let decays = if r.decays { heads } else { 0 };
        let gate = if self.linear_output_gate { v } else { 0 };
        let conv = if self.linear_short_conv { channels * n(self.linear_conv_kernel_dim) } else { 0 };
        let norm = if self.linear_output_norm { n(r.value_dim) } else { 0 };
        h * (2 * k + v + gate + heads + decays) + conv + 2 * decays + norm + v * h
    }

    /// Parameters of the gate at `at` in one layer of softmax attention.
    fn gate_size(&self, at: GatePosition) -> u128 {
        let [heads, width] = self.gate_shape(at).map(|x| x as u128);
        // a bias of the query projection has rows for the gate that the projection has
        let bias = u128::from(at == GatePosition::Attention && self.attention_bias);
        heads * width * if self.gate(at).input { self.hidden_size as u128 + bias } else { 1 }
    }

    /// Parameters of the gate at `at` in all layers of softmax attention; they are among [`parameters`](Self::parameters). `usize::MAX` if there are more.
    pub fn gate_parameters(&self, at: GatePosition) -> usize {
        let layers = (0..self.num_hidden_layers).filter(|i| self.layer_type(*i).is_softmax()).count();
        usize::try_from(layers as u128 * self.gate_size(at)).unwrap_or(usize::MAX)
    }

    /// Floating-point operations per token of a training step at sequence length `t`, the backward counted as twice the forward:
    ///
    /// | part | operations |
    /// |---|---|
    /// | products with weights | 6 per active parameter; the embedding is looked up, which is none |
    /// | softmax attention | `12·H·D·n`, where `n` is the mean number of keys that a query sees: `(t + 1)/2`, or less in a sliding window |
    /// | delta rule, as a recurrence (2412.06464 eq. 10) | `18·Hv·Dk·Dv`: `S k`, the update `(v − S k) kᵀ` and `S q` |
    /// | without erasure, as Mamba2 | `12·Hv·Dk·Dv`: the update `v kᵀ` and `S q` |
    pub fn flops_per_token(&self, t: usize) -> f64 {
        let product = |n: &[usize]| n.iter().map(|x| *x as f64).product::<f64>();
        let table = if self.tie_word_embeddings { 0.0 } else { product(&[self.vocab_size, self.hidden_size]) };
        let keys = |window: usize| {
            let (t, w) = (t as f64, window.min(t) as f64);
            if t == 0.0 { 0.0 } else { w - w * (w - 1.0) / (2.0 * t) }
        };
        let mut f = 6.0 * (self.parameters().1 as f64 - table);
        for i in 0..self.num_hidden_layers {
            f += match self.layer_type(i) {
                kind @ (LayerType::LinearAttention | LayerType::DeltaNet | LayerType::Mamba2) => self.recurrence_of(kind).map_or(0.0, |r| {
                    let per_state = if r.erases { 18.0 } else { 12.0 };
                    per_state * product(&[r.value_heads, r.key_dim, r.value_dim])
                }),
                LayerType::FullAttention => 12.0 * product(&[self.num_attention_heads, self.head_dim]) * keys(t),
                LayerType::SlidingAttention => 12.0 * product(&[self.num_attention_heads, self.head_dim]) * keys(self.sliding_window),
            };
        }
        f
    }

    /// An error if the parameters, at so many bytes each, are more than the machine's memory; it ends with the advice.
    pub fn fits(&self, bytes_per_parameter: u64, advice: &str) -> Result<()> {
        let (n, gib) = (self.parameters().0, |b: u128| b as f64 / (1u64 << 30) as f64);
        let need = n as u128 * u128::from(bytes_per_parameter);
        // more than any machine has, where nothing is known of this one
        match engine::cpu::system_memory().or(Some(1 << 47)) {
            Some(have) if need > u128::from(have) => Err(Error::Config(format!(
                "{n} parameters need {:.1} GiB at {bytes_per_parameter} bytes each, this machine has {:.1} GiB; {advice}",
                gib(need),
                gib(u128::from(have))
            ))),
            _ => Ok(()),
        }
    }
}
