//! `model_type`: what a configuration is, what may be called `qwen3_next`, and how Qwen3's configurations read as ours.

use super::{AttentionGate, GateGranularity, LayerType, ModelConfig, OutputGate};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

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

/// Sizes that a `qwen3` file may leave out, as transformers 5.23.0 fills them in.
const QWEN3: &[(&str, usize)] =
    &[("hidden_size", 4096), ("intermediate_size", 22016), ("num_hidden_layers", 32), ("num_attention_heads", 32), ("num_key_value_heads", 32)];
/// Likewise `qwen3_moe`.
const QWEN3_MOE: &[(&str, usize)] = &[
    ("hidden_size", 2048),
    ("intermediate_size", 6144),
    ("num_hidden_layers", 24),
    ("num_attention_heads", 32),
    ("num_key_value_heads", 4),
    ("moe_intermediate_size", 768),
    ("num_experts_per_tok", 8),
    ("num_experts", 128),
];

/// Brings a `config.json` of any model type that can be read to our keys; an error for every other type.
pub(super) fn translate(map: &mut Map<String, Value>) -> Result<()> {
    let kind = match map.get("model_type") {
        None => return Ok(()),
        Some(Value::String(kind)) => kind.clone(),
        Some(x) => return Err(Error::Config(format!("`model_type` must be a string, found {x}"))),
    };
    match kind.as_str() {
        "auto" | "qwen3_next" | "tidegate" => Ok(()),
        "qwen3" | "qwen3_moe" => qwen3(map, &kind),
        _ => Err(Error::Config(format!(
            "`model_type` = \"{kind}\" is not supported; models of qwen3_next, qwen3, qwen3_moe and tidegate (this project's own) can be read"
        ))),
    }
}

/// Qwen3 is ours without gate, delta rule and shared expert, with full rotation and plain norms.
fn qwen3(map: &mut Map<String, Value>, kind: &str) -> Result<()> {
    let moe = kind == "qwen3_moe";
    if let Some(n) = map.remove("num_local_experts") {
        match map.get("num_experts").filter(|m| **m != n) {
            Some(m) => return Err(Error::Config(format!("`num_experts` = {m} and `num_local_experts` = {n} contradict each other; keep one"))),
            None => map.insert("num_experts".into(), n),
        };
    }
    for (key, n) in if moe { QWEN3_MOE } else { QWEN3 } {
        map.entry(*key).or_insert((*n).into());
    }
    let size = |map: &Map<String, Value>, key: &str| map.get(key).and_then(Value::as_u64).unwrap_or(0);
    if map.get("num_key_value_heads").is_some_and(Value::is_null) {
        map.insert("num_key_value_heads".into(), size(map, "num_attention_heads").into());
    }
    let head_dim = if moe { size(map, "hidden_size") / size(map, "num_attention_heads").max(1) } else { 128 };
    map.entry("head_dim").or_insert(head_dim.into());
    map.entry("norm_topk_prob").or_insert(false.into());
    let gate = AttentionGate { granularity: GateGranularity::None, ..AttentionGate::default() };
    let gate = serde_json::to_value(gate).map_err(|e| Error::Config(e.to_string()))?;
    let fixed = [
        ("attention_gate", gate),
        ("zero_centered_norms", false.into()),
        ("partial_rotary_factor", json!(1.0)),
        ("shared_expert_intermediate_size", 0.into()),
        ("full_attention_interval", 1.into()),
    ];
    for (key, x) in fixed.into_iter().chain((!moe).then(|| ("num_experts", 0.into()))) {
        if let Some(other) = map.insert(key.into(), x.clone()).filter(|other| *other != x) {
            return Err(Error::Config(format!(
                "`{key}` = {other} is nothing that a model of type {kind} can have; remove it, or use model_type tidegate"
            )));
        }
    }
    map.insert("model_type".into(), "tidegate".into());
    Ok(())
}

impl ModelConfig {
    /// What of this model `qwen3_next` cannot express, in words; empty for a Qwen3-Next.
    pub fn beyond_qwen3_next(&self) -> Vec<String> {
        let mut beyond = vec![];
        let mut layers = 0..self.num_hidden_layers;
        if let Some(i) = layers.clone().find(|i| self.layer_type(*i) == LayerType::SlidingAttention) {
            beyond.push(format!("sliding attention (layer {i})"));
        }
        let softmax = layers.clone().any(|i| self.layer_type(i) != LayerType::LinearAttention);
        if softmax && self.attention_gate != AttentionGate::default() {
            beyond.push("an `attention_gate` other than element-wise, multiplied, sigmoid".into());
        }
        let linear = layers.clone().any(|i| self.layer_type(i) == LayerType::LinearAttention);
        if linear && self.output_gate_type != OutputGate::Silu {
            beyond.push("an `output_gate_type` other than silu".into());
        }
        if linear && self.linear_allow_neg_eigval {
            beyond.push("`linear_allow_neg_eigval`".into());
        }
        if self.shared_expert_intermediate_size == 0 && layers.any(|i| self.is_sparse(i)) {
            beyond.push("experts without a shared one".into());
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
