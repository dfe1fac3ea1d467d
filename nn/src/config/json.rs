//! `config.json`, read and written.

use super::families::translate;
use super::{ModelConfig, ModelType, rope};
use crate::{Error, Result};
use serde_json::Value;
use strsim::osa_distance;

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
    "attention_dropout",
    "hidden_act",
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
    "use_sliding_window",
    "max_window_layers",
    // of other programs, or of generation
    "_attn_implementation",
    "_attn_implementation_autoset",
    "auto_map",
    "max_length",
    "pretraining_tp",
    "sep_token_id",
    "tokenizer_class",
    "unsloth_fixed",
    "unsloth_version",
];

impl ModelConfig {
    /// From JSON; an unknown key is an error that offers the nearest.
    pub fn from_json(mut v: Value) -> Result<Self> {
        let Some(map) = v.as_object_mut() else { return Err(Error::Config("must be a JSON object".into())) };
        // transformers writes null for what it derives or does not need
        map.retain(|key, x| !(x.is_null() && ["layer_types", "mlp_only_layers", "sliding_window"].contains(&key.as_str())));
        translate(map)?;
        rope::read(map)?;
        let known = serde_json::to_value(ModelConfig::default()).map_err(|e| Error::Config(e.to_string()))?;
        let names: Vec<&str> = known.as_object().into_iter().flat_map(|m| m.keys().map(String::as_str)).collect();
        for key in map.keys() {
            if !names.contains(&key.as_str()) && !BOOKKEEPING.contains(&key.as_str()) {
                let hint = match nearest(key, names.iter().copied()) {
                    _ if key == "quantization_config" => {
                        ": the weights are quantized; f32, f64, bf16 and f16 can be read: take the checkpoint that is not quantized".to_string()
                    }
                    Some(n) => format!("; did you mean `{n}`?"),
                    None => "; if it says nothing of what the model computes, take it out".into(),
                };
                return Err(Error::Config(format!("unknown key `{key}`{hint}")));
            }
        }
        let refuse = |map: &serde_json::Map<String, Value>, key: &str, fine: &[Value]| match map.get(key) {
            Some(x) if !fine.contains(x) => Err(Error::Config(format!("`{key}` = {x} is not supported; it can be {}", list(fine)))),
            _ => Ok(()),
        };
        refuse(map, "use_sliding_window", &[Value::Bool(false)])?;
        refuse(map, "hidden_act", &["silu".into()])?;
        refuse(map, "attention_dropout", &[0.into(), 0.0.into()])?;
        // the key that is wrong is the one that is so in a configuration where all else is right
        let alone = |(key, x): (&String, &Value)| {
            let mut one = known.clone();
            one[key] = x.clone();
            serde_json::from_value::<ModelConfig>(one).err().map(|e| format!("`{key}` = {x}: {e}"))
        };
        let named = v.as_object().and_then(|map| map.iter().filter(|(key, _)| names.contains(&key.as_str())).find_map(alone));
        let c: ModelConfig = serde_json::from_value(v).map_err(|e| Error::Config(named.unwrap_or(e.to_string())))?;
        c.validate()?;
        Ok(c)
    }

    /// For `config.json`: the mixer of every layer is spelled out, and the type is `qwen3_next` or `mamba2`, as transformers reads them, or `tidegate` for what
    /// goes beyond that.
    pub fn to_json(&self) -> Result<Value> {
        let model_type = self.saved_type()?;
        if model_type == ModelType::Mamba2 {
            return super::mamba2::write(self);
        }
        let layer_types = (0..self.num_hidden_layers).map(|i| self.layer_type(i)).collect();
        let resolved = ModelConfig { model_type, layer_types, layer_pattern: vec![], ..self.clone() };
        let mut json = serde_json::to_value(resolved).map_err(|e| Error::Config(e.to_string()))?;
        rope::write(&mut json);
        json["architectures"] = serde_json::json!([if model_type == ModelType::Qwen3Next { "Qwen3NextForCausalLM" } else { "TidegateForCausalLM" }]);
        Ok(json)
    }
}

fn list(values: &[Value]) -> String {
    values.iter().map(Value::to_string).collect::<Vec<_>>().join(" or ")
}

/// The candidate with the smallest edit distance to `key`, if it is near enough to be meant: at most a third of the letters differ, or one is the
/// other's beginning. A candidate's last part alone counts too.
pub fn nearest<'a>(key: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    fn last(key: &str) -> (&str, &str) {
        key.rsplit_once('.').unwrap_or(("", key))
    }
    let (table, name) = last(key);
    let near = |c: &'a str| {
        let (whole, (its_table, its_name)) = (osa_distance(key, c), last(c));
        let begins = table == its_table && name.len().min(its_name.len()) > 1 && (name.starts_with(its_name) || its_name.starts_with(name));
        let part = if begins { 1 } else { osa_distance(name, its_name) } + usize::from(!table.is_empty() && table != its_table);
        let meant = begins || whole.min(part) <= (name.chars().count() / 3).max(1).min(name.chars().count().saturating_sub(1));
        meant.then_some((whole.min(part), whole, c))
    };
    candidates.filter_map(near).min().map(|(_, _, c)| c)
}
