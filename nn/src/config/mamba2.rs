//! Transformers' Mamba2: its `config.json`, read and written.

use super::{LayerType, ModelConfig};
use crate::{Error, Result};
use serde_json::{Map, Value, json};

/// What a file may leave out, as transformers 5.23.0 fills it in.
const SIZES: &[(&str, usize)] = &[
    ("vocab_size", 32_768),
    ("hidden_size", 4096),
    ("num_hidden_layers", 64),
    ("num_heads", 128),
    ("head_dim", 64),
    ("state_size", 128),
    ("n_groups", 8),
    ("conv_kernel", 4),
    ("expand", 2),
];
/// Their names, and ours.
const NAMES: [(&str, &str); 11] = [
    ("num_heads", "mamba_num_heads"),
    ("head_dim", "mamba_head_dim"),
    ("state_size", "mamba_state_size"),
    ("n_groups", "mamba_n_groups"),
    ("conv_kernel", "mamba_conv_kernel"),
    ("use_conv_bias", "mamba_use_conv_bias"),
    ("time_step_limit", "mamba_time_step_limit"),
    ("time_step_min", "mamba_time_step_min"),
    ("time_step_max", "mamba_time_step_max"),
    ("time_step_floor", "mamba_time_step_floor"),
    ("layer_norm_epsilon", "rms_norm_eps"),
];
/// What its model does not depend on: how it is cut up and begun, and keys of other implementations.
const PASSED_OVER: [&str; 8] = [
    "chunk_size",
    "residual_in_fp32",
    "rescale_prenorm_residual",
    "time_step_rank",
    "time_step_init_scheme",
    "time_step_scale",
    "norm_before_gate",
    "rms_norm",
];

/// Brings a Mamba2's keys to ours; a configuration in our own keys stays as it is.
pub(super) fn read(map: &mut Map<String, Value>) -> Result<()> {
    let fail = |m: String| Err(Error::Config(m));
    if map.contains_key("mamba_num_heads") {
        return Ok(());
    }
    map.retain(|key, x| !x.is_null() && !PASSED_OVER.contains(&key.as_str()));
    for (key, n) in SIZES {
        map.entry(*key).or_insert((*n).into());
    }
    for (key, x) in [("layer_norm_epsilon", json!(1e-5)), ("initializer_range", json!(0.1)), ("tie_word_embeddings", json!(false))] {
        map.entry(key).or_insert(x);
    }
    if let Some(x) = map.remove("use_bias").filter(|x| *x != json!(false)) {
        return fail(format!("`use_bias` = {x} is not supported: Mamba2's projections are read without biases"));
    }
    let size = |key: &str| map.get(key).and_then(Value::as_u64).map(u128::from);
    match (size("hidden_size"), size("expand"), size("num_heads"), size("head_dim")) {
        (Some(h), Some(e), Some(n), Some(d)) if h * e != n * d => {
            return fail(format!("`hidden_size` x `expand` = {} must be `num_heads` x `head_dim` = {}", h * e, n * d));
        }
        _ => map.remove("expand"),
    };
    if let Some(Value::Array(ends)) = map.get_mut("time_step_limit") {
        ends.iter_mut().filter(|x| is_infinity(x)).for_each(|x| *x = json!(f64::MAX));
    }
    for (theirs, ours) in NAMES {
        if let Some(x) = map.remove(theirs) {
            map.insert(ours.into(), x);
        }
    }
    let fixed = [
        ("layer_pattern", json!([LayerType::Mamba2.name()])),
        ("zero_centered_norms", json!(false)),
        ("num_experts", json!(0)),
        ("intermediate_size", json!(0)),
    ];
    super::families::fix(map, "mamba2", fixed)
}

/// ∞ as transformers writes it, which JSON has no number for.
fn is_infinity(x: &Value) -> bool {
    x["__float__"] == "Infinity"
}

/// The file of a model that is [a Mamba2](ModelConfig::beyond_mamba2).
pub(super) fn write(c: &ModelConfig) -> Result<Value> {
    let ours = serde_json::to_value(c).map_err(|e| Error::Config(e.to_string()))?;
    let mut json = json!({
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "expand": c.mamba_num_heads * c.mamba_head_dim / c.hidden_size,
        "use_bias": false,
        "hidden_act": "silu",
        "chunk_size": 256,
        "residual_in_fp32": true,
        "rescale_prenorm_residual": false,
        // transformers' own defaults are ids of another vocabulary
        "bos_token_id": null,
        "eos_token_id": null,
        "pad_token_id": null,
    });
    for key in ["vocab_size", "hidden_size", "num_hidden_layers", "initializer_range", "tie_word_embeddings"] {
        json[key] = ours[key].clone();
    }
    for (theirs, key) in NAMES {
        json[theirs] = ours[key].clone();
    }
    if c.mamba_time_step_limit[1] >= f64::from(f32::MAX) {
        json["time_step_limit"][1] = json!({"__float__": "Infinity"});
    }
    Ok(json)
}
