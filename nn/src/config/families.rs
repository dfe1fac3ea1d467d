//! How the configurations of other families read as ours.

use super::{AttentionGate, GateGranularity, LayerType, QkNorm};
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

/// Likewise `olmo_hybrid`.
const OLMO_HYBRID: &[(&str, usize)] = &[
    ("vocab_size", 100_352),
    ("hidden_size", 3840),
    ("intermediate_size", 11008),
    ("num_hidden_layers", 32),
    ("num_attention_heads", 30),
    ("max_position_embeddings", 65536),
];

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
        "olmo_hybrid" => olmo_hybrid(map, &kind),
        "mamba2" => super::mamba2::read(map),
        _ => Err(Error::Config(format!(
            "`model_type` = \"{kind}\" is not supported; models of qwen3_next, qwen3, qwen3_moe, qwen3_5, qwen3_5_moe (their text models), olmo_hybrid, \
             mamba2 and tidegate (this project's own) can be read"
        ))),
    }
}

/// Gates that 2505.06708's authors' checkpoints, of model type `qwen3`, may have.
const GATES: [(&str, GateGranularity); 2] =
    [("headwise_attn_output_gate", GateGranularity::Headwise), ("elementwise_attn_output_gate", GateGranularity::Elementwise)];

/// Whether the query projections in the files of this configuration hold the rows of one key/value group after the other, its queries before its gates: so
/// do the checkpoints of 2505.06708's authors.
pub(crate) fn grouped_queries(json: &Value) -> bool {
    json["model_type"] == "qwen3" && GATES.iter().any(|(key, _)| json[key] == true)
}

/// Sets what a family leaves no choice about; an error for a file that says otherwise.
pub(super) fn fix(map: &mut Keys, kind: &str, fixed: impl IntoIterator<Item = (&'static str, Value)>) -> Result<()> {
    for (key, x) in fixed {
        if let Some(other) = map.insert(key.into(), x.clone()).filter(|other| *other != x) {
            return Err(Error::Config(format!(
                "`{key}` = {other} is nothing that a model of type {kind} can have: there it is {x}; remove it, or use model_type tidegate"
            )));
        }
    }
    Ok(())
}

/// Takes out what must be true or false, if it is there.
fn flag(map: &mut Keys, key: &str) -> Result<Option<bool>> {
    match map.remove(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(b)) => Ok(Some(b)),
        Some(x) => Err(Error::Config(format!("`{key}` must be true or false, found {x}"))),
    }
}

fn json_of(x: impl serde::Serialize) -> Result<Value> {
    serde_json::to_value(x).map_err(|e| Error::Config(e.to_string()))
}

fn gate(granularity: GateGranularity) -> Result<Value> {
    json_of(AttentionGate { granularity, ..AttentionGate::default() })
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
    let granularity = if moe { GateGranularity::None } else { gated(map)? };
    let fixed = [
        ("attention_gate", gate(granularity)?),
        ("zero_centered_norms", false.into()),
        ("partial_rotary_factor", json!(1.0)),
        ("shared_expert_intermediate_size", 0.into()),
        ("full_attention_interval", 1.into()),
    ];
    fix(map, kind, fixed.into_iter().chain((!moe).then(|| ("num_experts", 0.into()))))?;
    map.insert("model_type".into(), "tidegate".into());
    Ok(())
}

/// What 2505.06708's authors add to Qwen3: the gate, which is returned, whether there are norms of queries and keys, and another name for `attention_bias`.
fn gated(map: &mut Keys) -> Result<GateGranularity> {
    let mut granularity = GateGranularity::None;
    for (key, g) in GATES {
        if flag(map, key)?.unwrap_or(false) {
            if granularity != GateGranularity::None {
                return Err(Error::Config(format!("`{}` and `{key}` are both true; a model has one gate at most", GATES[0].0)));
            }
            granularity = g;
        }
    }
    if let Some(bias) = flag(map, "qkv_bias")? {
        if !bias && map.get("attention_bias") == Some(&json!(true)) {
            return Err(Error::Config("`attention_bias` = true and `qkv_bias` = false contradict each other; keep one".into()));
        }
        map.insert("attention_bias".into(), bias.into());
    }
    if flag(map, "use_qk_norm")? == Some(false) {
        map.insert("qk_norm".into(), json_of(QkNorm::None)?);
    }
    map.remove("auto_map"); // where the authors' code is
    Ok(granularity)
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
    for key in ["rope_parameters", "rope_scaling"] {
        if let Some(Value::Object(rope)) = map.get_mut(key) {
            rope.remove("mrope_section");
            rope.remove("mrope_interleaved");
        }
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

/// OLMo-Hybrid: no gate on softmax attention, whose layers' norms stand behind; one norm over all queries, one over all keys; mostly no rotation.
fn olmo_hybrid(map: &mut Keys, kind: &str) -> Result<()> {
    map.retain(|key, x| !x.is_null() || key.starts_with("rope"));
    for (key, n) in OLMO_HYBRID {
        map.entry(*key).or_insert((*n).into());
    }
    let heads = size(map, "num_attention_heads");
    for key in ["num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads"] {
        map.entry(key).or_insert(heads.into());
    }
    let hidden = size(map, "hidden_size");
    map.entry("head_dim").or_insert((hidden / heads.max(1)).into());
    let key_dim = (hidden.saturating_mul(3) / 4) / size(map, "linear_num_key_heads").max(1);
    map.entry("linear_key_head_dim").or_insert(key_dim.into());
    let key_dim = size(map, "linear_key_head_dim");
    map.entry("linear_value_head_dim").or_insert(key_dim.saturating_mul(2).into());
    map.entry("linear_allow_neg_eigval").or_insert(true.into());
    if !map.contains_key("layer_types") && size(map, "num_hidden_layers") < 4 {
        let (linear, full) = (json_of(LayerType::LinearAttention)?, json_of(LayerType::FullAttention)?);
        let linear = vec![linear; (size(map, "num_hidden_layers") as usize).saturating_sub(1)];
        map.insert("layer_types".into(), [linear, vec![full]].concat().into());
    }
    // how its first values are drawn
    for key in ["linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor"] {
        map.remove(key);
    }
    // null is said by the published files, which rotate nothing; files of transformers always say something
    let theta = match (map.get("rope_parameters"), map.get("rope_theta")) {
        (Some(Value::Object(rope)), None) => rope.get("rope_theta").cloned(),
        (_, Some(theta)) => Some(theta.clone()),
        (rope, None) => rope.cloned(),
    };
    let rotated = match theta {
        None => {
            return Err(Error::Config(format!(
                "a model of type {kind} must say whether it rotates: `rope_parameters` = {{\"rope_theta\": null}} for no, \
                 {{\"rope_type\": \"default\", \"rope_theta\": 500000}} for yes; found none"
            )));
        }
        Some(Value::Null) => {
            map.remove("rope_parameters");
            map.remove("rope_theta");
            json!(0.0)
        }
        Some(_) => json!(1.0),
    };
    let fixed = [
        ("attention_gate", gate(GateGranularity::None)?),
        ("zero_centered_norms", false.into()),
        ("partial_rotary_factor", rotated),
        ("num_experts", 0.into()),
        ("qk_norm", json_of(QkNorm::Projection)?),
        ("post_norm", json_of([LayerType::FullAttention])?),
        ("linear_norm_eps", json!(1e-5)),
    ];
    fix(map, kind, fixed)?;
    map.insert("model_type".into(), "tidegate".into());
    Ok(())
}

#[cfg(test)]
mod tests;
