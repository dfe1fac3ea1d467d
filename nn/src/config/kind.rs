//! `model_type`: what a configuration is, and what may be called `qwen3_next`.

use super::{AttentionGate, GateGranularity, GatePosition, LayerType, ModelConfig, OutputGate, QkNorm};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The name that a configuration goes by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelType {
    /// `qwen3_next` where the model is one, else `tidegate`.
    #[default]
    Auto,
    /// Transformers' Qwen3-Next: [`ModelConfig::validate`] refuses a model that is none.
    Qwen3Next,
    /// Ours: everything that [`ModelConfig`] can say.
    Tidegate,
}

impl ModelConfig {
    /// What of this model `qwen3_next` cannot express, in words; empty for a Qwen3-Next.
    pub fn beyond_qwen3_next(&self) -> Vec<String> {
        let mut beyond = vec![];
        let layers = 0..self.num_hidden_layers;
        if let Some(i) = layers.clone().find(|i| self.layer_type(*i) == LayerType::SlidingAttention) {
            beyond.push(format!("sliding attention (layer {i})"));
        }
        let softmax = layers.clone().any(|i| self.layer_type(i) != LayerType::LinearAttention);
        if softmax && self.attention_gate != AttentionGate::default() {
            beyond.push("an `attention_gate` other than element-wise, multiplied, sigmoid".into());
        }
        let others = GatePosition::ALL.into_iter().filter(|at| *at != GatePosition::Attention);
        for at in others.filter(|at| softmax && self.gate(*at).granularity != GateGranularity::None) {
            beyond.push(format!("a `{}`", at.key()));
        }
        for (key, on) in [("sdpa_norm", self.sdpa_norm), ("sdpa_silu", self.sdpa_silu)] {
            if softmax && on {
                beyond.push(format!("`{key}`"));
            }
        }
        if self.sandwich_norm {
            beyond.push("norms before and behind attention and feed-forward (`sandwich_norm`)".into());
        }
        let linear = layers.clone().any(|i| self.layer_type(i) == LayerType::LinearAttention);
        if linear && self.output_gate_type != OutputGate::Silu {
            beyond.push("an `output_gate_type` other than silu".into());
        }
        if linear && !(self.linear_decay && self.linear_erase) {
            beyond.push("a delta rule without decay or erasure (`linear_decay`, `linear_erase`)".into());
        }
        if linear && self.linear_allow_neg_eigval {
            beyond.push("`linear_allow_neg_eigval`".into());
        }
        if self.shared_expert_intermediate_size == 0 && layers.clone().any(|i| self.is_sparse(i)) {
            beyond.push("experts without a shared one".into());
        }
        if softmax && self.qk_norm != QkNorm::Head {
            beyond.push("a `qk_norm` other than head".into());
        }
        if let Some(i) = layers.clone().find(|i| self.is_post_norm(*i)) {
            beyond.push(format!("norms behind attention and feed-forward (`post_norm`, layer {i})"));
        }
        if linear && self.output_norm_eps() != self.rms_norm_eps {
            beyond.push("a `linear_norm_eps` that is not `rms_norm_eps`".into());
        }
        if !self.zero_centered_norms {
            beyond.push("norms that are not zero-centred".into());
        }
        beyond
    }

    /// The type that a file of this configuration states: never [`ModelType::Auto`]. An error for a model that is called `qwen3_next` and is none.
    pub fn saved_type(&self) -> Result<ModelType> {
        let beyond = self.beyond_qwen3_next();
        match self.model_type {
            ModelType::Auto if beyond.is_empty() => Ok(ModelType::Qwen3Next),
            ModelType::Auto => Ok(ModelType::Tidegate),
            ModelType::Qwen3Next if !beyond.is_empty() => Err(Error::Config(format!(
                "`model_type` = \"qwen3_next\" cannot stand for a model with {}: other programs would take it for something else; use \"tidegate\" or \"auto\"",
                beyond.join(", ")
            ))),
            kind => Ok(kind),
        }
    }
}
