//! The model's configuration: a superset of transformers' `qwen3_next` `config.json`, so that a checkpoint goes both ways.

mod activations;
mod counts;
mod families;
mod gate;
mod json;
mod kind;
mod mamba2;
mod mixers;
mod rope;
mod validate;

pub(crate) use families::grouped_queries;
pub use gate::{AttentionGate, GateActivation, GateGranularity, GateOp, GatePosition, SwitchHeads};
pub use json::nearest;
pub use kind::ModelType;
pub use mixers::{LayerType, LinearActivation, LinearQkNorm, OutputGate, Recurrence};
pub use rope::{RopeScaling, RopeType};

use serde::{Deserialize, Serialize};

/// The RMS norm of softmax attention's queries and keys, before they are rotated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// Each head by itself, all with one weight.
    Head,
    /// All heads at once, as OLMo.
    Projection,
    /// None.
    None,
}

/// A decoder. Names and defaults are those of transformers' `Qwen3NextConfig`; fields that it does not know say "ours".
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ModelConfig {
    /// What it is called in files.
    pub model_type: ModelType,
    /// Rows of the embedding and of the output projection: token ids are below it.
    pub vocab_size: usize,
    /// Width H of the residual stream.
    pub hidden_size: usize,
    /// Inner width of a dense feed-forward. 0, in a model without experts: layers are their mixer alone, with one norm.
    pub intermediate_size: usize,
    /// Layers: each a mixer and, mostly, a feed-forward.
    pub num_hidden_layers: usize,
    /// Query heads of softmax attention.
    pub num_attention_heads: usize,
    /// Key and value heads of softmax attention; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Dimension D of a softmax head.
    pub head_dim: usize,
    /// The longest context that the model is meant for, in tokens; nothing is cut at it.
    pub max_position_embeddings: usize,
    /// Standard deviation of the initial weights.
    pub initializer_range: f64,
    /// ε of every RMS norm.
    pub rms_norm_eps: f64,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether softmax attention's four projections have a bias.
    pub attention_bias: bool,
    /// Base of the rotary embedding's wavelengths.
    pub rope_theta: f64,
    /// The part of `head_dim` that is rotated; 0: nothing is.
    pub partial_rotary_factor: f64,
    /// How rotation is stretched over a longer context than `rope_theta` alone makes for. Transformers' `rope_parameters` is read as well.
    pub rope_scaling: RopeScaling,
    /// Without `layer_types`, every so-many-th layer is full attention.
    pub full_attention_interval: usize,
    /// The mixer of each layer. Empty: as `layer_pattern` says, or else every `full_attention_interval`-th layer is full attention, the others are linear.
    pub layer_types: Vec<LayerType>,
    /// Ours: mixers that are repeated over all layers, in place of `layer_types`.
    pub layer_pattern: Vec<LayerType>,
    /// How many tokens, itself included, a query of `sliding_attention` sees.
    pub sliding_window: usize,
    /// Taps of the short convolution in front of the delta rule.
    pub linear_conv_kernel_dim: usize,
    /// Key dimension Dk of a delta-rule head.
    pub linear_key_head_dim: usize,
    /// Value dimension Dv of a delta-rule head.
    pub linear_value_head_dim: usize,
    /// Query and key heads of the delta rule.
    pub linear_num_key_heads: usize,
    /// Value heads of the delta rule; a multiple of `linear_num_key_heads`.
    pub linear_num_value_heads: usize,
    /// Every so-many-th layer has experts.
    pub decoder_sparse_step: usize,
    /// Layers, from 0, with a dense feed-forward in spite of `decoder_sparse_step`.
    pub mlp_only_layers: Vec<usize>,
    /// Routed experts E of a layer; 0: all feed-forwards are dense.
    pub num_experts: usize,
    /// Experts that a token is sent to.
    pub num_experts_per_tok: usize,
    /// Inner width of a routed expert.
    pub moe_intermediate_size: usize,
    /// Inner width of the expert that every token passes; 0: there is none.
    pub shared_expert_intermediate_size: usize,
    /// Whether the chosen experts' weights are scaled to sum to 1.
    pub norm_topk_prob: bool,
    /// Coefficient of the load-balancing loss.
    pub router_aux_loss_coef: f64,
    /// Ours: whether the norms (but for the delta rule's output norm) multiply by 1 + weight, as Qwen3-Next's, or by the weight, as Qwen3's.
    pub zero_centered_norms: bool,
    /// Ours: kinds of layers whose two norms stand behind attention and feed-forward, on what these add to the residual stream, instead of before them.
    pub post_norm: Vec<LayerType>,
    /// Ours: the norm of queries and keys.
    pub qk_norm: QkNorm,
    /// Ours: coefficient of the router's z-loss.
    pub router_z_loss_coef: f64,
    /// Ours: the gate on softmax attention's output (G1).
    pub attention_gate: AttentionGate,
    /// Ours: a gate on its values (G2).
    pub value_gate: AttentionGate,
    /// Ours: a gate on its keys (G3).
    pub key_gate: AttentionGate,
    /// Ours: a gate on its queries (G4).
    pub query_gate: AttentionGate,
    /// Ours: a gate behind its output projection (G5).
    pub dense_gate: AttentionGate,
    /// Ours: experts of its key/value heads.
    pub switch_heads: SwitchHeads,
    /// Ours: whether an RMS norm of each head, all with one weight, stands on softmax attention's output, before the gate.
    pub sdpa_norm: bool,
    /// Ours: whether softmax attention's output goes through a SiLU, behind `sdpa_norm` and before the gate.
    pub sdpa_silu: bool,
    /// Ours: whether attention and feed-forward have a norm before them and another behind, on what they add to the residual stream (Gemma 2's names).
    pub sandwich_norm: bool,
    /// Ours: activation of Gated DeltaNet's output gate.
    pub output_gate_type: OutputGate,
    /// Ours: whether the delta rule's state decays. Without, and with erasure, the layer is DeltaNet's; without both, linear attention's.
    pub linear_decay: bool,
    /// Ours: whether the delta rule erases what the state holds for a key before it writes. Without, the write is `β k vᵀ` alone, as in Mamba2's dual form.
    pub linear_erase: bool,
    /// Ours: β in (0, 2), so that the state's transition may have negative eigenvalues.
    pub linear_allow_neg_eigval: bool,
    /// Ours: ε of the delta rule's output norm; 0: `rms_norm_eps`.
    pub linear_norm_eps: f64,
    /// Ours: whether a short convolution stands in front of the delta rule. Without, its queries, keys and values keep their activation.
    pub linear_short_conv: bool,
    /// Ours: whether the delta rule's output is gated.
    pub linear_output_gate: bool,
    /// Ours: whether the delta rule's output is normalised, head by head.
    pub linear_output_norm: bool,
    /// Ours: what scales the delta rule's queries and keys.
    pub linear_qk_norm: LinearQkNorm,
    /// Ours: the activation of the delta rule's queries and keys.
    pub linear_qk_activation: LinearActivation,
    /// Ours, as all that follow; names behind `mamba_` are those of transformers' `Mamba2Config`. Heads of Mamba2.
    pub mamba_num_heads: usize,
    /// Dimension of a Mamba2 head.
    pub mamba_head_dim: usize,
    /// State size N of Mamba2: numbers of B and of C in a group.
    pub mamba_state_size: usize,
    /// Groups of Mamba2's heads that share B and C; divides `mamba_num_heads`.
    pub mamba_n_groups: usize,
    /// Taps of Mamba2's short convolution.
    pub mamba_conv_kernel: usize,
    /// Whether Mamba2's convolution has a bias.
    pub mamba_use_conv_bias: bool,
    /// Ends between which Mamba2's step Δt is kept; the largest f64 stands for ∞, which JSON doesn't have.
    pub mamba_time_step_limit: [f64; 2],
    /// The least step Δt that Mamba2 starts with.
    pub mamba_time_step_min: f64,
    /// The largest step Δt that Mamba2 starts with.
    pub mamba_time_step_max: f64,
    /// What smaller first steps are raised to.
    pub mamba_time_step_floor: f64,
}

impl Default for ModelConfig {
    fn default() -> Self {
        ModelConfig {
            model_type: ModelType::Auto,
            vocab_size: 151_936,
            hidden_size: 2048,
            intermediate_size: 5632,
            num_hidden_layers: 48,
            num_attention_heads: 16,
            num_key_value_heads: 2,
            head_dim: 256,
            max_position_embeddings: 32_768,
            initializer_range: 0.02,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            attention_bias: false,
            rope_theta: 10_000.0,
            partial_rotary_factor: 0.25,
            rope_scaling: RopeScaling::default(),
            full_attention_interval: 4,
            layer_types: vec![],
            layer_pattern: vec![],
            sliding_window: 4096,
            linear_conv_kernel_dim: 4,
            linear_key_head_dim: 128,
            linear_value_head_dim: 128,
            linear_num_key_heads: 16,
            linear_num_value_heads: 32,
            decoder_sparse_step: 1,
            mlp_only_layers: vec![],
            num_experts: 512,
            num_experts_per_tok: 10,
            moe_intermediate_size: 512,
            shared_expert_intermediate_size: 512,
            norm_topk_prob: true,
            router_aux_loss_coef: 0.001,
            zero_centered_norms: true,
            post_norm: vec![],
            qk_norm: QkNorm::Head,
            router_z_loss_coef: 0.0,
            attention_gate: AttentionGate::default(),
            value_gate: AttentionGate::none(),
            key_gate: AttentionGate::none(),
            query_gate: AttentionGate::none(),
            dense_gate: AttentionGate::none(),
            switch_heads: SwitchHeads::default(),
            sdpa_norm: false,
            sdpa_silu: false,
            sandwich_norm: false,
            output_gate_type: OutputGate::Silu,
            linear_decay: true,
            linear_erase: true,
            linear_allow_neg_eigval: false,
            linear_norm_eps: 0.0,
            linear_short_conv: true,
            linear_output_gate: true,
            linear_output_norm: true,
            linear_qk_norm: LinearQkNorm::L2,
            linear_qk_activation: LinearActivation::Silu,
            mamba_num_heads: 64,
            mamba_head_dim: 64,
            mamba_state_size: 128,
            mamba_n_groups: 1,
            mamba_conv_kernel: 4,
            mamba_use_conv_bias: true,
            mamba_time_step_limit: [0.0, f64::MAX],
            mamba_time_step_min: 1e-3,
            mamba_time_step_max: 1e-1,
            mamba_time_step_floor: 1e-4,
        }
    }
}

impl ModelConfig {
    /// The mixer of layer `i`.
    pub fn layer_type(&self, i: usize) -> LayerType {
        match self.layer_types.get(i) {
            Some(t) => *t,
            None if !self.layer_pattern.is_empty() => self.layer_pattern[i % self.layer_pattern.len()],
            None if (i + 1).is_multiple_of(self.full_attention_interval.max(1)) => LayerType::FullAttention,
            None => LayerType::LinearAttention,
        }
    }

    /// Whether layer `i` has a mixture of experts (else a dense feed-forward).
    pub fn is_sparse(&self, i: usize) -> bool {
        self.num_experts > 0 && !self.mlp_only_layers.contains(&i) && (i + 1).is_multiple_of(self.decoder_sparse_step.max(1))
    }

    /// Whether layer `i` has a feed-forward, dense or of experts.
    pub fn has_feed_forward(&self, i: usize) -> bool {
        self.is_sparse(i) || self.intermediate_size > 0
    }

    /// Whether the norms of layer `i` stand behind attention and feed-forward, and none before them.
    pub(crate) fn is_post_norm(&self, i: usize) -> bool {
        self.post_norm.contains(&self.layer_type(i))
    }

    /// What the norms of layer `i` are called, without `_layernorm.weight`: of attention, then of the feed-forward (none without one), the one before it and
    /// the one behind.
    pub(crate) fn norm_names(&self, i: usize) -> [[Option<&'static str>; 2]; 2] {
        let [attention, feed_forward] = match (self.sandwich_norm, self.is_post_norm(i)) {
            (true, _) => [[Some("input"), Some("post_attention")], [Some("pre_feedforward"), Some("post_feedforward")]],
            (_, true) => [[None, Some("post_attention")], [None, Some("post_feedforward")]],
            _ => [[Some("input"), None], [Some("post_attention"), None]],
        };
        [attention, if self.has_feed_forward(i) { feed_forward } else { [None, None] }]
    }

    /// ε of the delta rule's output norm.
    pub(crate) fn output_norm_eps(&self) -> f64 {
        if self.linear_norm_eps > 0.0 { self.linear_norm_eps } else { self.rms_norm_eps }
    }

    /// Rotated dimensions of a head.
    pub fn rotary_dim(&self) -> usize {
        (self.head_dim as f64 * self.partial_rotary_factor) as usize
    }

    /// The weight of a norm that only normalises.
    pub(crate) fn norm_start(&self) -> f64 {
        if self.zero_centered_norms { 0.0 } else { 1.0 }
    }
}

#[cfg(test)]
mod tests;
