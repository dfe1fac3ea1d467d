//! The model's configuration: a superset of transformers' `qwen3_next` `config.json`, so that a checkpoint goes both ways.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// A decoder. Defaults are those of transformers' `Qwen3NextConfig`; fields that it does not know say so.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[allow(missing_docs)] // the field's names, documented by transformers
pub struct ModelConfig {
    pub model_type: String,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub initializer_range: f64,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub rope_theta: f64,
    pub partial_rotary_factor: f64,
    pub full_attention_interval: usize,
    /// Empty: every `full_attention_interval`-th layer is full attention, the others are linear.
    pub layer_types: Vec<LayerType>,
    pub sliding_window: usize,
    pub linear_conv_kernel_dim: usize,
    pub linear_key_head_dim: usize,
    pub linear_value_head_dim: usize,
    pub linear_num_key_heads: usize,
    pub linear_num_value_heads: usize,
    pub decoder_sparse_step: usize,
    pub mlp_only_layers: Vec<usize>,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub moe_intermediate_size: usize,
    pub shared_expert_intermediate_size: usize,
    pub norm_topk_prob: bool,
    pub router_aux_loss_coef: f64,
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
            model_type: "qwen3_next".into(),
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
            router_z_loss_coef: 0.0,
            attention_gate: AttentionGate::default(),
            output_gate_type: OutputGate::Silu,
            linear_allow_neg_eigval: false,
        }
    }
}

/// What transformers writes beside the model's fields; read past.
const BOOKKEEPING: &[&str] = &[
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "output_router_logits",
    "attention_bias",
    "attention_dropout",
    "hidden_act",
    "rope_scaling",
    "rope_parameters",
    "layer_norm_eps",
    "is_encoder_decoder",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
    "mamba_ssm_dtype",
];

impl ModelConfig {
    /// From JSON; an unknown key is an error that offers the nearest.
    pub fn from_json(mut v: Value) -> Result<Self> {
        let Some(map) = v.as_object_mut() else { return Err(Error::Config("must be a JSON object".into())) };
        let known = serde_json::to_value(ModelConfig::default()).map_err(|e| Error::Config(e.to_string()))?;
        let names: Vec<&str> = known.as_object().into_iter().flat_map(|m| m.keys().map(String::as_str)).collect();
        for key in map.keys() {
            if !names.contains(&key.as_str()) && !BOOKKEEPING.contains(&key.as_str()) {
                let near = names.iter().min_by_key(|n| distance(key, n)).map_or(String::new(), |n| format!("; did you mean `{n}`?"));
                return Err(Error::Config(format!("unknown key `{key}`{near}")));
            }
        }
        let refuse = |map: &serde_json::Map<String, Value>, key: &str, fine: &[Value]| match map.get(key) {
            Some(x) if !fine.contains(x) => Err(Error::Config(format!("`{key}` = {x} is not supported; it can be {fine:?}"))),
            _ => Ok(()),
        };
        refuse(map, "attention_bias", &[Value::Bool(false)])?;
        refuse(map, "hidden_act", &["silu".into()])?;
        refuse(map, "rope_scaling", &[Value::Null])?;
        if let Some(rope) = map.remove("rope_parameters") {
            refuse(rope.as_object().unwrap_or(&Default::default()), "rope_type", &["default".into()])?;
            for key in ["rope_theta", "partial_rotary_factor"] {
                if let Some(x) = rope.get(key) {
                    map.entry(key).or_insert(x.clone());
                }
            }
        }
        let c: ModelConfig = serde_json::from_value(v).map_err(|e| Error::Config(e.to_string()))?;
        c.validate()?;
        Ok(c)
    }

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
        ] {
            if n == 0 || n > 1 << 24 {
                return fail(format!("`{name}` must be from 1 to {}, found {n}", 1 << 24));
            }
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
        if (0..self.num_hidden_layers).any(|i| self.is_sparse(i)) && !(1..=self.num_experts).contains(&self.num_experts_per_tok) {
            return fail(format!("`num_experts_per_tok` = {} must be from 1 to `num_experts` = {}", self.num_experts_per_tok, self.num_experts));
        }
        for (name, x) in [("initializer_range", self.initializer_range), ("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(x.is_finite() && x > 0.0) {
                return fail(format!("`{name}` must be positive, found {x}"));
            }
        }
        Ok(())
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

    /// Columns of the gate in q_proj, per head.
    pub(crate) fn gate_dim(&self) -> usize {
        match self.attention_gate.granularity {
            GateGranularity::None => 0,
            GateGranularity::Headwise => 1,
            GateGranularity::Elementwise => self.head_dim,
        }
    }

    /// Parameters: all of them, and those that act on one token (routed experts count `num_experts_per_tok` times).
    pub fn parameters(&self) -> (usize, usize) {
        let h = self.hidden_size;
        let embed = self.vocab_size * h * if self.tie_word_embeddings { 1 } else { 2 };
        let (mut total, mut active) = (embed + h, embed + h);
        for i in 0..self.num_hidden_layers {
            let mixer = match self.layer_type(i) {
                LayerType::LinearAttention => {
                    let (k, v, n) = (
                        self.linear_num_key_heads * self.linear_key_head_dim,
                        self.linear_num_value_heads * self.linear_value_head_dim,
                        self.linear_num_value_heads,
                    );
                    h * (2 * k + 2 * v + 2 * n) + (2 * k + v) * self.linear_conv_kernel_dim + 2 * n + self.linear_value_head_dim + v * h
                }
                _ => {
                    let (q, kv) = (self.num_attention_heads, self.num_key_value_heads * self.head_dim);
                    h * (q * (self.head_dim + self.gate_dim()) + 2 * kv) + 2 * self.head_dim + q * self.head_dim * h
                }
            };
            let dense = mixer + 2 * h;
            let (t, a) = if self.is_sparse(i) {
                let expert = 3 * h * self.moe_intermediate_size;
                let shared = if self.shared_expert_intermediate_size > 0 { 3 * h * self.shared_expert_intermediate_size + h } else { 0 };
                let rest = shared + self.num_experts * h;
                (self.num_experts * expert + rest, self.num_experts_per_tok * expert + rest)
            } else {
                (3 * h * self.intermediate_size, 3 * h * self.intermediate_size)
            };
            total += dense + t;
            active += dense + a;
        }
        (total, active)
    }

    /// Floating-point operations per token of a training step at sequence length `t`: 6 per active parameter (the embedding look-up is none), and
    /// 6·H·(D + Dv)·t for a causal softmax layer, 12·Hv·Dk·Dv for a delta-rule layer.
    pub fn flops_per_token(&self, t: usize) -> f64 {
        let table = if self.tie_word_embeddings { 0 } else { self.vocab_size * self.hidden_size };
        let mut f = 6.0 * (self.parameters().1 - table) as f64;
        for i in 0..self.num_hidden_layers {
            f += match self.layer_type(i) {
                LayerType::LinearAttention => 12.0 * (self.linear_num_value_heads * self.linear_key_head_dim * self.linear_value_head_dim) as f64,
                LayerType::FullAttention => 6.0 * (self.num_attention_heads * 2 * self.head_dim * t / 2) as f64,
                LayerType::SlidingAttention => 6.0 * (self.num_attention_heads * 2 * self.head_dim * (t / 2).min(self.sliding_window)) as f64,
            };
        }
        f
    }
}

/// Edit distance, for offering the nearest key.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let best = (diagonal + usize::from(x != *y)).min(row[j] + 1).min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], best);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_what_transformers_writes() {
        let c = ModelConfig::from_json(json!({
            "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.5}, "hidden_act": "silu", "attention_bias": false
        }))
        .unwrap();
        assert_eq!((c.rope_theta, c.rotary_dim(), c.layer_type(1)), (1e7, 128, LayerType::FullAttention));
        let back = ModelConfig::from_json(serde_json::to_value(&c).unwrap()).unwrap();
        assert_eq!(back, c);
    }

    #[test]
    fn mistakes_are_named() {
        let err = |v: Value| ModelConfig::from_json(v).unwrap_err().to_string();
        assert!(err(json!({"hiden_size": 4})).contains("did you mean `hidden_size`"));
        assert!(err(json!({"num_attention_heads": 5, "num_key_value_heads": 2})).contains("num_key_value_heads"));
        assert!(err(json!({"num_experts": 2, "num_experts_per_tok": 3})).contains("num_experts_per_tok"));
        assert!(err(json!({"hidden_size": "big"})).contains("big"));
        assert!(err(json!({"attention_bias": true})).contains("attention_bias"));
        assert!(err(json!([1])).contains("object"));
        assert!(err(json!({"hidden_size": 0})).contains("hidden_size"));
    }

    #[test]
    fn counts_the_published_model() {
        let (total, active) = ModelConfig { tie_word_embeddings: false, ..Default::default() }.parameters();
        assert!((79.0..81.5).contains(&(total as f64 / 1e9)), "{total}");
        assert!((3.0..4.2).contains(&(active as f64 / 1e9)), "{active}");
    }
}
