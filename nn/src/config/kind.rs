//! `model_type`: what a configuration is, and what may be called `qwen3_next` or `mamba2`.

use super::{AttentionGate, GateGranularity, GatePosition, LayerType, LinearActivation, LinearQkNorm, ModelConfig, OutputGate, QkNorm};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// The name that a configuration goes by.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelType {
    /// `qwen3_next` or `mamba2` where the model is one, else `tidegate`.
    #[default]
    Auto,
    /// Transformers' Qwen3-Next: [`ModelConfig::validate`] refuses a model that is none.
    Qwen3Next,
    /// Transformers' Mamba2, likewise.
    Mamba2,
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
        for kind in [LayerType::DeltaNet, LayerType::Mamba2] {
            if let Some(i) = layers.clone().find(|i| self.layer_type(*i) == kind) {
                beyond.push(format!("{} (layer {i})", kind.name()));
            }
        }
        if let Some(i) = layers.clone().find(|i| !self.has_feed_forward(*i)) {
            beyond.push(format!("layers without a feed-forward (layer {i})"));
        }
        let softmax = self.has(LayerType::is_softmax);
        if softmax && self.attention_gate != AttentionGate::default() {
            beyond.push("an `attention_gate` other than element-wise, multiplied, sigmoid".into());
        }
        let others = GatePosition::ALL.into_iter().filter(|at| *at != GatePosition::Attention);
        for at in others.filter(|at| softmax && self.gate(*at).granularity != GateGranularity::None) {
            beyond.push(format!("a `{}`", at.key()));
        }
        for (key, on) in [("switch_heads", self.switch_heads.is_some()), ("sdpa_norm", self.sdpa_norm), ("sdpa_silu", self.sdpa_silu)] {
            if softmax && on {
                beyond.push(format!("`{key}`"));
            }
        }
        if self.sandwich_norm {
            beyond.push("norms before and behind attention and feed-forward (`sandwich_norm`)".into());
        }
        let linear = self.has(LayerType::is_delta);
        if linear && self.output_gate_type != OutputGate::Silu {
            beyond.push("an `output_gate_type` other than silu".into());
        }
        if linear && !(self.linear_decay && self.linear_erase) {
            beyond.push("a delta rule without decay or erasure (`linear_decay`, `linear_erase`)".into());
        }
        if linear && self.linear_allow_neg_eigval {
            beyond.push("`linear_allow_neg_eigval`".into());
        }
        for (key, on) in [
            ("linear_short_conv", self.linear_short_conv),
            ("linear_output_gate", self.linear_output_gate),
            ("linear_output_norm", self.linear_output_norm),
        ] {
            if linear && !on {
                beyond.push(format!("`{key}` = false"));
            }
        }
        if linear && (self.linear_qk_norm, self.linear_qk_activation) != (LinearQkNorm::L2, LinearActivation::Silu) {
            beyond.push("a `linear_qk_norm` other than l2, or a `linear_qk_activation` other than silu".into());
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

    /// What of this model transformers' `mamba2` cannot express, in words; empty for a Mamba2.
    pub fn beyond_mamba2(&self) -> Vec<String> {
        let mut beyond = vec![];
        if let Some(i) = (0..self.num_hidden_layers).find(|i| self.layer_type(*i) != LayerType::Mamba2) {
            beyond.push(format!("{} (layer {i})", self.layer_type(i).name()));
        }
        if let Some(i) = (0..self.num_hidden_layers).find(|i| self.has_feed_forward(*i)) {
            beyond.push(format!("feed-forwards (layer {i})"));
        }
        if self.zero_centered_norms {
            beyond.push("zero-centred norms".into());
        }
        if self.sandwich_norm || (0..self.num_hidden_layers).any(|i| self.is_post_norm(i)) {
            beyond.push("norms behind the mixers (`sandwich_norm`, `post_norm`)".into());
        }
        if !(self.mamba_num_heads * self.mamba_head_dim).is_multiple_of(self.hidden_size) {
            beyond.push("`mamba_num_heads` x `mamba_head_dim` that is no multiple of `hidden_size`".into());
        }
        beyond
    }

    /// The type that a file of this configuration states: never [`ModelType::Auto`]. An error for a model that is called something else's name.
    pub fn saved_type(&self) -> Result<ModelType> {
        let refuse = |kind: &str, beyond: Vec<String>| {
            Err(Error::Config(format!(
                "`model_type` = \"{kind}\" cannot stand for a model with {}: other programs would take it for something else; use \"tidegate\" or \"auto\"",
                beyond.join(", ")
            )))
        };
        let (next, mamba2) = (self.beyond_qwen3_next(), self.beyond_mamba2());
        match self.model_type {
            ModelType::Auto if next.is_empty() => Ok(ModelType::Qwen3Next),
            ModelType::Auto if mamba2.is_empty() => Ok(ModelType::Mamba2),
            ModelType::Auto => Ok(ModelType::Tidegate),
            ModelType::Qwen3Next if !next.is_empty() => refuse("qwen3_next", next),
            ModelType::Mamba2 if !mamba2.is_empty() => refuse("mamba2", mamba2),
            kind => Ok(kind),
        }
    }
}
