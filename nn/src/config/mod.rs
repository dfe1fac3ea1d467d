//! The model's configuration: a superset of transformers' `qwen3_next` `config.json`, so that a checkpoint goes both ways.

mod counts;
mod json;
mod kind;

pub use json::nearest;
pub use kind::ModelType;

use crate::{Error, Result};
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
    /// Base of the rotary embedding's wavelengths.
    pub rope_theta: f64,
    /// The part of `head_dim` that is rotated.
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
    /// Ours: coefficient of the router's z-loss.
    pub router_z_loss_coef: f64,
    /// Ours: the gate of softmax attention.
    pub attention_gate: AttentionGate,
    /// Ours: activation of Gated DeltaNet's output gate.
    pub output_gate_type: OutputGate,
    /// Ours: β in (0, 2), so that the state's transition may have negative eigenvalues.
    pub linear_allow_neg_eigval: bool,
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
            router_z_loss_coef: 0.0,
            attention_gate: AttentionGate::default(),
            output_gate_type: OutputGate::Silu,
            linear_allow_neg_eigval: false,
        }
    }
}

/// No size is larger; products of four fit 128 bits.
const LARGEST: usize = 1 << 24;
/// No model has more layers.
const DEEPEST: usize = 1 << 16;

impl ModelConfig {
    /// Checks that the numbers describe a model.
    pub fn validate(&self) -> Result<()> {
        let fail = |m: String| Err(Error::Config(m));
        for (name, n) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("linear_num_key_heads", self.linear_num_key_heads),
            ("linear_num_value_heads", self.linear_num_value_heads),
            ("linear_key_head_dim", self.linear_key_head_dim),
            ("linear_value_head_dim", self.linear_value_head_dim),
            ("linear_conv_kernel_dim", self.linear_conv_kernel_dim),
            ("sliding_window", self.sliding_window),
            ("decoder_sparse_step", self.decoder_sparse_step),
        ] {
            if n == 0 || n > LARGEST {
                return fail(format!("`{name}` must be from 1 to {LARGEST}, found {n}"));
            }
        }
        for (name, n) in [
            ("intermediate_size", self.intermediate_size),
            ("num_experts", self.num_experts),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size),
        ] {
            if n > LARGEST {
                return fail(format!("`{name}` must be at most {LARGEST}, found {n}"));
            }
        }
        let (deep, named) = (self.num_hidden_layers, self.mlp_only_layers.len());
        if deep > DEEPEST || named > deep {
            return fail(format!("`num_hidden_layers` must be at most {DEEPEST}, found {deep}, and `mlp_only_layers` can name so many, not {named}"));
        }
        let (sparse, dense): (Vec<usize>, Vec<usize>) = (0..self.num_hidden_layers).partition(|i| self.is_sparse(*i));
        if !dense.is_empty() && self.intermediate_size == 0 {
            return fail(format!("layer {} is dense and needs `intermediate_size` of at least 1", dense[0]));
        }
        if !sparse.is_empty() && self.moe_intermediate_size == 0 {
            return fail(format!("layer {} has experts and needs `moe_intermediate_size` of at least 1", sparse[0]));
        }
        if let Some(i) = self.mlp_only_layers.iter().find(|i| **i >= self.num_hidden_layers) {
            return fail(format!(
                "`mlp_only_layers` names layer {i}, the last of `num_hidden_layers` = {} is {}",
                self.num_hidden_layers,
                self.num_hidden_layers - 1
            ));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return fail(format!(
                "`num_attention_heads` = {} must be a multiple of `num_key_value_heads` = {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        if !self.linear_num_value_heads.is_multiple_of(self.linear_num_key_heads) {
            return fail(format!(
                "`linear_num_value_heads` = {} must be a multiple of `linear_num_key_heads` = {}",
                self.linear_num_value_heads, self.linear_num_key_heads
            ));
        }
        if !(0.0..=1.0).contains(&self.partial_rotary_factor) || !self.rotary_dim().is_multiple_of(2) {
            return fail(format!(
                "`partial_rotary_factor` = {} of `head_dim` = {} must give an even number of rotated dimensions",
                self.partial_rotary_factor, self.head_dim
            ));
        }
        if !self.layer_types.is_empty() && self.layer_types.len() != self.num_hidden_layers {
            return fail(format!("`layer_types` has {} entries for `num_hidden_layers` = {}", self.layer_types.len(), self.num_hidden_layers));
        }
        if self.layer_types.is_empty() && self.full_attention_interval == 0 {
            return fail("`full_attention_interval` must be at least 1".into());
        }
        if !sparse.is_empty() && !(1..=self.num_experts).contains(&self.num_experts_per_tok) {
            return fail(format!("`num_experts_per_tok` = {} must be from 1 to `num_experts` = {}", self.num_experts_per_tok, self.num_experts));
        }
        for (name, x) in [("initializer_range", self.initializer_range), ("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(x.is_finite() && x > 0.0) {
                return fail(format!("`{name}` must be positive, found {x}"));
            }
        }
        self.saved_type().map(drop)
    }

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
