//! The model's configuration: a superset of transformers' `qwen3_next` `config.json`, so that a checkpoint goes both ways.

mod counts;
mod families;
mod json;
mod kind;
mod validate;

pub(crate) use families::grouped_queries;
pub use json::nearest;
pub use kind::ModelType;

use serde::{Deserialize, Serialize};

/// What mixes tokens in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// Gated DeltaNet; transformers' word for it.
    #[serde(alias = "gated_delta_net")]
    LinearAttention,
    /// Gated softmax attention over the whole context.
    FullAttention,
    /// Gated softmax attention over the last `sliding_window` tokens.
    SlidingAttention,
}

/// How fine the attention gate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateGranularity {
    /// No gate.
    None,
    /// One number per head.
    Headwise,
    /// One number per head and dimension.
    Elementwise,
}

/// What the gate does to the attention's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateOp {
    /// `act(gate) · o`
    Multiply,
    /// `o + act(gate)`
    Add,
}

/// The gate's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateActivation {
    /// 1/(1+e⁻ˣ)
    Sigmoid,
    /// x·sigmoid(x)
    Silu,
    /// 0.5 + 0.5·sigmoid(x)
    NsSigmoid,
    /// x
    Identity,
}

/// The gate on the attention's output (position G1 of 2505.06708 §2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionGate {
    /// How fine.
    pub granularity: GateGranularity,
    /// Multiply or add.
    pub op: GateOp,
    /// Activation of the logits.
    pub activation: GateActivation,
}

impl Default for AttentionGate {
    fn default() -> Self {
        AttentionGate { granularity: GateGranularity::Elementwise, op: GateOp::Multiply, activation: GateActivation::Sigmoid }
    }
}

/// Activation of Gated DeltaNet's output gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputGate {
    /// As Qwen3-Next.
    #[serde(alias = "swish")]
    Silu,
    /// As Qwen3.8 and Kimi Linear.
    Sigmoid,
}

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
    /// Inner width of a dense feed-forward.
    pub intermediate_size: usize,
    /// Layers: each a mixer and a feed-forward.
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
    /// Without `layer_types`, every so-many-th layer is full attention.
    pub full_attention_interval: usize,
    /// The mixer of each layer. Empty: every `full_attention_interval`-th layer is full attention, the others are linear.
    pub layer_types: Vec<LayerType>,
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
    /// Ours: the gate of softmax attention.
    pub attention_gate: AttentionGate,
    /// Ours: activation of Gated DeltaNet's output gate.
    pub output_gate_type: OutputGate,
    /// Ours: β in (0, 2), so that the state's transition may have negative eigenvalues.
    pub linear_allow_neg_eigval: bool,
    /// Ours: ε of the delta rule's output norm; 0: `rms_norm_eps`.
    pub linear_norm_eps: f64,
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
            full_attention_interval: 4,
            layer_types: vec![],
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
            output_gate_type: OutputGate::Silu,
            linear_allow_neg_eigval: false,
            linear_norm_eps: 0.0,
        }
    }
}

impl ModelConfig {
    /// The mixer of layer `i`.
    pub fn layer_type(&self, i: usize) -> LayerType {
        match self.layer_types.get(i) {
            Some(t) => *t,
            None if (i + 1).is_multiple_of(self.full_attention_interval.max(1)) => LayerType::FullAttention,
            None => LayerType::LinearAttention,
        }
    }

    /// Whether layer `i` has a mixture of experts (else a dense feed-forward).
    pub fn is_sparse(&self, i: usize) -> bool {
        self.num_experts > 0 && !self.mlp_only_layers.contains(&i) && (i + 1).is_multiple_of(self.decoder_sparse_step.max(1))
    }

    /// Whether the norms of layer `i` stand behind attention and feed-forward.
    pub(crate) fn is_post_norm(&self, i: usize) -> bool {
        self.post_norm.contains(&self.layer_type(i))
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

    /// Columns of the gate in q_proj, per head.
    pub(crate) fn gate_dim(&self) -> usize {
        match self.attention_gate.granularity {
            GateGranularity::None => 0,
            GateGranularity::Headwise => 1,
            GateGranularity::Elementwise => self.head_dim,
        }
    }
}

#[cfg(test)]
mod tests;
