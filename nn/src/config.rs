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

/// No size is larger; products of four fit 128 bits.
const LARGEST: usize = 1 << 24;

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
        refuse(map, "attention_dropout", &[0.into(), 0.0.into()])?;
        refuse(map, "model_type", &["qwen3_next".into()])?;
        match map.remove("rope_parameters") {
            None | Some(Value::Null) => {}
            Some(Value::Object(rope)) => {
                refuse(&rope, "rope_type", &["default".into()])?;
                for (key, x) in rope.into_iter().filter(|(k, _)| k != "rope_type") {
                    if !["rope_theta", "partial_rotary_factor"].contains(&key.as_str()) {
                        return Err(Error::Config(format!("`rope_parameters.{key}` = {x} is not supported; remove it if the model can do without")));
                    }
                    if let Some(other) = map.get(&key).filter(|y| **y != x) {
                        return Err(Error::Config(format!("`{key}` = {other} and `rope_parameters.{key}` = {x} contradict each other; keep one")));
                    }
                    map.insert(key, x);
                }
            }
            Some(x) => return Err(Error::Config(format!("`rope_parameters` must be an object, found {x}"))),
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
        Ok(())
    }

    /// An error if the parameters, at so many bytes each, are more than the machine's memory.
    pub fn fits(&self, bytes_per_parameter: u64) -> Result<()> {
        let (n, gib) = (self.parameters().0, |b: u128| b as f64 / (1u64 << 30) as f64);
        let need = n as u128 * u128::from(bytes_per_parameter);
        match engine::cpu::system_memory() {
            Some(have) if need > u128::from(have) => Err(Error::Config(format!(
                "{n} parameters need {:.1} GiB at {bytes_per_parameter} bytes each, this machine has {:.1} GiB; make the model smaller: `hidden_size`, \
                 `num_hidden_layers`, `num_experts`, `vocab_size`",
                gib(need),
                gib(u128::from(have))
            ))),
            _ => Ok(()),
        }
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

    /// Parameters: all of them, and those that act on one token (routed experts count `num_experts_per_tok` times). `usize::MAX` if there are more.
    pub fn parameters(&self) -> (usize, usize) {
        let n = |x: usize| x as u128; // products of four sizes
        let h = n(self.hidden_size);
        let embed = n(self.vocab_size) * h * if self.tie_word_embeddings { 1 } else { 2 };
        let (mut total, mut active) = (embed + h, embed + h);
        for i in 0..self.num_hidden_layers {
            let mixer = match self.layer_type(i) {
                LayerType::LinearAttention => {
                    let heads = n(self.linear_num_value_heads);
                    let (k, v) = (n(self.linear_num_key_heads) * n(self.linear_key_head_dim), heads * n(self.linear_value_head_dim));
                    h * (2 * k + 2 * v + 2 * heads) + (2 * k + v) * n(self.linear_conv_kernel_dim) + 2 * heads + n(self.linear_value_head_dim) + v * h
                }
                _ => {
                    let (q, kv, d) = (n(self.num_attention_heads), n(self.num_key_value_heads) * n(self.head_dim), n(self.head_dim));
                    h * (q * (d + n(self.gate_dim())) + 2 * kv) + 2 * d + q * d * h
                }
            };
            let dense = mixer + 2 * h;
            let (t, a) = if self.is_sparse(i) {
                let expert = 3 * h * n(self.moe_intermediate_size);
                let shared = if self.shared_expert_intermediate_size > 0 { 3 * h * n(self.shared_expert_intermediate_size) + h } else { 0 };
                let rest = shared + n(self.num_experts) * h;
                (n(self.num_experts) * expert + rest, n(self.num_experts_per_tok) * expert + rest)
            } else {
                (3 * h * n(self.intermediate_size), 3 * h * n(self.intermediate_size))
            };
            total += dense + t;
            active += dense + a;
        }
        let fit = |x: u128| usize::try_from(x).unwrap_or(usize::MAX);
        (fit(total), fit(active))
    }

    /// Floating-point operations per token of a training step at sequence length `t`: 6 per active parameter (the embedding look-up is none), and
    /// 6·H·(D + Dv)·t for a causal softmax layer, 12·Hv·Dk·Dv for a delta-rule layer.
    pub fn flops_per_token(&self, t: usize) -> f64 {
        let product = |n: &[usize]| n.iter().map(|x| *x as f64).product::<f64>();
        let table = if self.tie_word_embeddings { 0.0 } else { product(&[self.vocab_size, self.hidden_size]) };
        let mut f = 6.0 * (self.parameters().1 as f64 - table);
        for i in 0..self.num_hidden_layers {
            f += match self.layer_type(i) {
                LayerType::LinearAttention => 12.0 * product(&[self.linear_num_value_heads, self.linear_key_head_dim, self.linear_value_head_dim]),
                LayerType::FullAttention => 12.0 * product(&[self.num_attention_heads, self.head_dim, t / 2]),
                LayerType::SlidingAttention => 12.0 * product(&[self.num_attention_heads, self.head_dim, (t / 2).min(self.sliding_window)]),
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
        for key in ["hidden_size", "decoder_sparse_step", "moe_intermediate_size", "linear_key_head_dim"] {
            assert!(err(json!({ key: 0 })).contains(key));
        }
        for key in ["vocab_size", "num_experts", "intermediate_size", "shared_expert_intermediate_size", "num_hidden_layers"] {
            assert!(err(json!({ key: 1u64 << 40 })).contains(key));
        }
        assert!(err(json!({"num_experts": 0, "intermediate_size": 0})).contains("layer 0 is dense"));
        assert!(err(json!({"num_hidden_layers": 4, "mlp_only_layers": [4]})).contains("names layer 4"));
        assert!(err(json!({"attention_dropout": 0.1})).contains("attention_dropout"));
        assert!(err(json!({"model_type": "llama"})).contains("qwen3_next"));
        assert!(err(json!({"rope_parameters": {"rope_type": "yarn"}})).contains("yarn"));
        assert!(err(json!({"rope_parameters": {"mrope_section": [1]}})).contains("mrope_section"));
        assert!(err(json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}})).contains("contradict"));
        assert!(err(json!({"rope_parameters": 3})).contains("object"));
    }

    #[test]
    fn a_model_larger_than_the_machine_is_refused_before_it_is_made() {
        let largest = ModelConfig { num_experts: LARGEST, num_hidden_layers: 2, ..Default::default() };
        let huge = ModelConfig { hidden_size: LARGEST, moe_intermediate_size: LARGEST, ..largest.clone() };
        assert_eq!(huge.parameters().0, usize::MAX);
        assert!(huge.flops_per_token(1 << 20).is_finite());
        for c in [largest, huge] {
            c.validate().unwrap();
            let e = crate::Decoder::new(&c, 0, engine::DType::F32).err().unwrap().to_string();
            assert!(e.contains("GiB") && e.contains("num_experts"), "{e}");
        }
    }

    #[test]
    fn counts_the_published_model() {
        let (total, active) = ModelConfig { tie_word_embeddings: false, ..Default::default() }.parameters();
        assert!((79.0..81.5).contains(&(total as f64 / 1e9)), "{total}");
        assert!((3.0..4.2).contains(&(active as f64 / 1e9)), "{active}");
    }
}
