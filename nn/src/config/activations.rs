//! Memory that a training step's forward keeps for its backward, without running either.

use super::{GateActivation, GatePosition, LayerType, LinearActivation, LinearQkNorm, ModelConfig, QkNorm};
use engine::DType;

impl ModelConfig {
    /// An estimate of the bytes that the forward of `tokens` tokens (one micro-batch, on one device) keeps for the backward when activations are computed in
    /// `compute`: the sum of what the ops of each layer save. What the backward itself takes for a while, about one layer's activations, comes on top.
    ///
    /// | part | numbers kept per token |
    /// |---|---|
    /// | each norm before, each norm behind | the stream and its norm; what the layer gave |
    /// | softmax attention | queries, gates and keys as projected; queries and keys, rotated; values; output, with and without its gate |
    /// | a composed gate | its logits, scores, and what it acts on |
    /// | delta rule, Mamba2 | projections, all behind the convolution, `V'`, output, its norm |
    /// | feed-forward, expert | gate and up projections; dense ones and the shared expert also their product |
    /// | loss | the last norm, and its gradient |
    pub fn activation_bytes(&self, tokens: usize, compute: DType) -> f64 {
        let f = |n: usize| n as f64;
        let h = f(self.hidden_size);
        // the last stream, its norm, and the gradient of this, which the loss computes in the forward
        let mut narrow = 3.0 * h;
        let mut wide = 0.0;
        for i in 0..self.num_hidden_layers {
            let norms = self.norm_names(i).iter().flatten().flatten().count();
            // a sum of the stream before each of the two, and a number kept by each norm
            narrow += (if self.has_feed_forward(i) { 2.0 } else { 1.0 } + f(norms)) * h;
            let (n, w) = match self.layer_type(i) {
                kind if !kind.is_softmax() => self.recurrence_numbers(kind),
                _ => self.attention_numbers(),
            };
            let (m, x) = if self.is_sparse(i) {
                let (s, k) = (f(self.shared_expert_intermediate_size), f(self.num_experts_per_tok));
                let shared = if s > 0.0 { 3.0 * s + h + 1.0 } else { 0.0 };
                // the experts' projections are kept in f32
                (shared, 2.0 * k * f(self.moe_intermediate_size) + 2.0 * f(self.num_experts))
            } else {
                (3.0 * f(self.intermediate_size), 0.0)
            };
            (narrow, wide) = (narrow + n + m, wide + w + x);
        }
        let wide_size = if compute == DType::F64 { 8.0 } else { 4.0 };
        tokens as f64 * (narrow * compute.size() as f64 + wide * wide_size)
    }

    /// What a recurrent layer keeps per token, likewise.
    fn recurrence_numbers(&self, kind: LayerType) -> (f64, f64) {
        let Some(r) = self.recurrence_of(kind) else { return (0.0, 0.0) };
        let f = |n: usize| n as f64;
        let (k, v, nv, channels) = (f(r.keys()), f(r.values()), f(r.value_heads), f(r.channels()));
        if kind == LayerType::Mamba2 {
            // [z x B C dt]; convolved, its bias added, through SiLU; y, z and its SiLU, gated and normalised (per group: once more)
            let conv = if self.mamba_use_conv_bias { 2.0 } else { 1.0 } * channels;
            let norm = if r.key_heads > 1 { 2.0 } else { 1.0 };
            return (v + channels + nv + conv + (4.0 + norm) * v, 7.0 * nv);
        }
        let (gate, norm) = (self.linear_output_gate, self.linear_output_norm);
        // [q k v z] and [b a]; q, k, v behind the convolution, and what is composed on the way to the rule; o, its norm
        let betas = if r.decays { 2.0 } else { 1.0 } * nv;
        let projected = channels + if gate { v } else { 0.0 } + betas;
        let behind = f(usize::from(self.linear_short_conv)) * channels;
        // numbers that an activation keeps, beside its input, of each that it makes
        let of = |act| match act {
            LinearActivation::Identity => 0.0,
            LinearActivation::Elu1 => 3.0,
            LinearActivation::Silu | LinearActivation::Relu => 1.0,
        };
        let act = self.linear_qk_activation;
        let activated = match (self.linear_short_conv, act) {
            (true, LinearActivation::Silu) => 0.0,
            (true, act) => of(act) * 2.0 * k,
            (false, act) => (1.0 + of(act)) * 2.0 * k + 2.0 * v,
        };
        let scaled = if self.linear_qk_norm == LinearQkNorm::L1 { 2.0 * k } else { 0.0 };
        let out = v * (1.0 + f(usize::from(gate || norm)) + 2.0 * f(usize::from(gate && !norm)));
        // in f32: V' where there is erasure, and what β and α go through
        let wide = if r.erases { v } else { 0.0 } + if r.decays { 7.0 } else { 2.0 } * nv;
        (projected + behind + activated + scaled + out, wide)
    }

    /// What a layer of softmax attention keeps per token: numbers in the dtype that is computed in, and in f32.
    fn attention_numbers(&self) -> (f64, f64) {
        let f = |n: usize| n as f64;
        let (heads, d) = (f(self.num_attention_heads), f(self.head_dim));
        let (q, kv) = (heads * d, f(self.num_key_value_heads) * d);
        let output = self.attention_gate.is_some();
        let projected = if self.qk_norm == QkNorm::None { 0.0 } else { q + kv };
        let mut n = projected + if output { heads * f(self.gate_dim()) } else { 0.0 };
        // rotated queries and keys, values, the output
        n += q + 2.0 * kv + q;
        // what goes on from the kernel: gated inside it, or normalised and through SiLU behind it
        n += q * (f(usize::from(output)) + f(usize::from(self.sdpa_norm)) + f(usize::from(self.sdpa_silu)));
        if self.switch_heads.is_some() {
            // what is mixed, and the weights
            let weights = f(self.num_key_value_heads * self.switch_heads.experts);
            n += kv * f(self.switch_heads.projections().into_iter().filter(|e| *e > 1).sum()) + weights;
        }
        for at in GatePosition::ALL.into_iter().filter(|at| self.gate(*at).is_some()) {
            let (gate, [h, width]) = (self.gate(at), self.gate_shape(at));
            let on = match at {
                GatePosition::Attention => {
                    // the scores that heads share, and those of all heads, which the kernel reads
                    n += if gate.shared || self.gates_behind_kernel() { f(h * width) } else { 0.0 };
                    continue;
                }
                GatePosition::Query => q,
                GatePosition::Key | GatePosition::Value => kv,
                GatePosition::Dense => f(self.hidden_size),
            };
            let logits = if gate.input { f(h * width) } else { 0.0 };
            let scores = if gate.activation == GateActivation::Identity { 0.0 } else { f(h * width) };
            n += on + logits + scores;
        }
        (n, heads)
    }
}
