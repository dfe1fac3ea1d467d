//! How the configurations of other families read as ours.

use super::{AttentionGate, GateGranularity};
use crate::{Error, Result};
use serde_json::{Map, Value, json};

/// A JSON object.
type Keys = Map<String, Value>;

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
/// Likewise `qwen3_5_text`; what is not here is as in Qwen3-Next.
const QWEN3_5: &[(&str, usize)] =
    &[("vocab_size", 248_320), ("hidden_size", 4096), ("intermediate_size", 12288), ("num_hidden_layers", 32), ("num_key_value_heads", 4)];
/// Likewise `qwen3_5_moe_text`.
const QWEN3_5_MOE: &[(&str, usize)] = &[("vocab_size", 248_320), ("num_hidden_layers", 40), ("num_experts_per_tok", 8), ("num_experts", 256)];

/// What a Qwen3.5 that reads images, too, says beside its `text_config`, and its text model does not depend on.
const AROUND: &[&str] = &["image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_config", "language_model_only"];
/// What it may say of itself and, differently, of its text model.
const OF_EACH: &[&str] =
    &["model_type", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"];

/// Brings a `config.json` of any model type that can be read to our keys; an error for every other type.
pub(super) fn translate(map: &mut Keys) -> Result<()> {
    let kind = match map.get("model_type") {
        None => return Ok(()),
        Some(Value::String(kind)) => kind.clone(),
        Some(x) => return Err(Error::Config(format!("`model_type` must be a string, found {x}"))),
    };
    match kind.as_str() {
        "auto" | "qwen3_next" | "tidegate" => Ok(()),
        "qwen3" | "qwen3_moe" => qwen3(map, &kind),
        "qwen3_5_text" | "qwen3_5_moe_text" => qwen3_5(map, &kind),
        "qwen3_5" | "qwen3_5_moe" => text_of(map, &kind),
        _ => Err(Error::Config(format!(
            "`model_type` = \"{kind}\" is not supported; models of qwen3_next, qwen3, qwen3_moe, qwen3_5 and qwen3_5_moe (their text models) and tidegate (this \
             project's own) can be read"
        ))),
    }
}

/// Whether the query projections in the files of this configuration hold the rows of one key/value group after the other.
pub(crate) fn grouped_queries(_json: &Value) -> bool {
    false
}

/// Sets what a family leaves no choice about; an error for a file that says otherwise.
fn fix(map: &mut Keys, kind: &str, fixed: impl IntoIterator<Item = (&'static str, Value)>) -> Result<()> {
    for (key, x) in fixed {
        if let Some(other) = map.insert(key.into(), x.clone()).filter(|other| *other != x) {
            return Err(Error::Config(format!(
                "`{key}` = {other} is nothing that a model of type {kind} can have: there it is {x}; remove it, or use model_type tidegate"
            )));
        }
    }
    Ok(())
}

fn size(map: &Keys, key: &str) -> u64 {
    map.get(key).and_then(Value::as_u64).unwrap_or(0)
}

/// Qwen3 is ours without gate, delta rule and shared expert, with full rotation and plain norms.
fn qwen3(map: &mut Keys, kind: &str) -> Result<()> {
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
    fix(map, kind, fixed.into_iter().chain((!moe).then(|| ("num_experts", 0.into()))))?;
    map.insert("model_type".into(), "tidegate".into());
    Ok(())
}

/// The text model of Qwen3.5 is a Qwen3-Next; of its rotations for images, text sees one, the plain one: its three positions are the same.
fn qwen3_5(map: &mut Keys, kind: &str) -> Result<()> {
    let moe = kind == "qwen3_5_moe_text";
    for (key, n) in if moe { QWEN3_5_MOE } else { QWEN3_5 } {
        map.entry(*key).or_insert((*n).into());
    }
    if let Some(x) = map.remove("attn_output_gate").filter(|x| *x != json!(true)) {
        return Err(Error::Config(format!("`attn_output_gate` = {x} is nothing that a model of type {kind} can have: there it is true")));
    }
    for key in ["mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"] {
        map.remove(key);
    }
    if let Some(Value::Object(rope)) = map.get_mut("rope_parameters") {
        rope.remove("mrope_section");
        rope.remove("mrope_interleaved");
    }
    let experts = [("norm_topk_prob", json!(true)), ("decoder_sparse_step", 1.into()), ("mlp_only_layers", json!([]))];
    let dense = [("num_experts", 0.into())];
    if moe {
        fix(map, kind, experts)?
    } else {
        fix(map, kind, dense)?
    }
    map.insert("model_type".into(), "auto".into());
    Ok(())
}

/// The text model of a Qwen3.5 that reads images, too.
fn text_of(map: &mut Keys, kind: &str) -> Result<()> {
    let mut text = match map.remove("text_config") {
        Some(Value::Object(text)) => text,
        found => {
            let found = found.map_or("none".into(), |x| x.to_string());
            return Err(Error::Config(format!("a model of type {kind} describes its text model in `text_config`, an object; found {found}")));
        }
    };
    let expected = format!("{kind}_text");
    match text.get("model_type") {
        Some(found) if *found != json!(expected) => {
            return Err(Error::Config(format!("`text_config.model_type` of a model of type {kind} is \"{expected}\", found {found}")));
        }
        _ => text.insert("model_type".into(), expected.clone().into()),
    };
    for (key, x) in std::mem::take(map) {
        if AROUND.contains(&key.as_str()) || OF_EACH.contains(&key.as_str()) {
            continue;
        }
        match text.get(&key).filter(|y| **y != x) {
            Some(y) => return Err(Error::Config(format!("`{key}` = {x} and `text_config.{key}` = {y} contradict each other; keep one"))),
            None => text.insert(key, x),
        };
    }
    *map = text;
    map.retain(|_, x| !x.is_null());
    qwen3_5(map, &expected)
}
