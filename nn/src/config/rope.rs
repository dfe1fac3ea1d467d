//! Rotary embeddings for contexts longer than those that a model was trained on: transformers' `rope_scaling`, or `rope_parameters`.

use super::ModelConfig;
use super::validate::LARGEST;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::f64::consts::PI;

/// How the frequencies θ_i of the rotary embedding follow from `rope_theta`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeType {
    /// `θ_i = rope_theta^(−2i/rotary_dim)`
    #[default]
    Default,
    /// All divided by `factor` (position interpolation, 2306.15595).
    Linear,
    /// YaRN (2309.00071): slow rotations divided by `factor`, fast ones as they are, between them a ramp; what is rotated is multiplied by the attention factor.
    Yarn,
    /// As Llama 3.1: by wavelength, with another ramp.
    Llama3,
}

/// Stretches the rotary embedding over a longer context. Names and what is meant where nothing is said are those of transformers' `rope_parameters`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RopeScaling {
    /// Which way; all else belongs to it.
    pub rope_type: RopeType,
    /// How many times as long the context becomes, at least 1. `yarn` without it: `max_position_embeddings / original_max_position_embeddings`.
    pub factor: Option<f64>,
    /// `yarn`, `llama3`: the context that the model was trained on, in tokens; none: `max_position_embeddings`.
    pub original_max_position_embeddings: Option<usize>,
    /// `yarn`: what is rotated of queries and keys is multiplied by it; none: `0.1 ln(factor) + 1`, or what the two `mscale`s say.
    pub attention_factor: Option<f64>,
    /// `yarn`: pairs that turn more often than this in the original context keep their frequency; none: 32.
    pub beta_fast: Option<f64>,
    /// `yarn`: pairs that turn more seldom have it divided by `factor`; none: 1.
    pub beta_slow: Option<f64>,
    /// `yarn`, with `mscale_all_dim`: the attention factor is `(0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)`.
    pub mscale: Option<f64>,
    /// See `mscale`.
    pub mscale_all_dim: Option<f64>,
    /// `yarn`: whether the ramp begins and ends at whole pairs; none: true.
    pub truncate: Option<bool>,
    /// `llama3`: wavelengths above `original_max_position_embeddings / low_freq_factor` have their frequency divided by `factor`.
    pub low_freq_factor: Option<f64>,
    /// `llama3`: wavelengths below `original_max_position_embeddings / high_freq_factor` keep theirs.
    pub high_freq_factor: Option<f64>,
}

impl RopeScaling {
    /// Each key that has a value, and the types that have a use for it.
    fn given(&self) -> Vec<(&'static str, &'static [RopeType])> {
        use RopeType::{Linear, Llama3, Yarn};
        let keys: [(&str, bool, &[RopeType]); 10] = [
            ("factor", self.factor.is_some(), &[Linear, Yarn, Llama3]),
            ("original_max_position_embeddings", self.original_max_position_embeddings.is_some(), &[Yarn, Llama3]),
            ("attention_factor", self.attention_factor.is_some(), &[Yarn]),
            ("beta_fast", self.beta_fast.is_some(), &[Yarn]),
            ("beta_slow", self.beta_slow.is_some(), &[Yarn]),
            ("mscale", self.mscale.is_some(), &[Yarn]),
            ("mscale_all_dim", self.mscale_all_dim.is_some(), &[Yarn]),
            ("truncate", self.truncate.is_some(), &[Yarn]),
            ("low_freq_factor", self.low_freq_factor.is_some(), &[Llama3]),
            ("high_freq_factor", self.high_freq_factor.is_some(), &[Llama3]),
        ];
        keys.into_iter().filter(|k| k.1).map(|(key, _, types)| (key, types)).collect()
    }
}

impl ModelConfig {
    /// The frequencies θ_i of the rotated pairs, radians a token, and the factor that what is rotated is multiplied by; none where nothing is stretched. Computed
    /// as transformers 5.23.0 does (`modeling_rope_utils.py`), in f64.
    pub fn scaled_frequencies(&self) -> Option<(Vec<f64>, f64)> {
        let s = &self.rope_scaling;
        let (dim, original) = (self.rotary_dim() as f64, self.original_context() as f64);
        let plain: Vec<f64> = (0..self.rotary_dim() / 2).map(|i| self.rope_theta.powf(-2.0 * i as f64 / dim)).collect();
        let factor = s.factor.unwrap_or(self.max_position_embeddings as f64 / original);
        match s.rope_type {
            RopeType::Default => None,
            RopeType::Linear => Some((plain.iter().map(|f| f / factor).collect(), 1.0)),
            RopeType::Yarn => {
                // the pair that turns so many times in the original context
                let pair = |turns: f64| dim * (original / (turns * 2.0 * PI)).ln() / (2.0 * self.rope_theta.ln());
                let (mut low, mut high) = (pair(or(s.beta_fast, 32.0)), pair(or(s.beta_slow, 1.0)));
                if s.truncate.unwrap_or(true) {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let high = if low == high { high + 0.001 } else { high };
                let at = |(i, f): (usize, &f64)| {
                    let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * slow + f * (1.0 - slow)
                };
                let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
                let derived = match (s.mscale, s.mscale_all_dim) {
                    (Some(m), Some(all)) if m != 0.0 && all != 0.0 => scale(m) / scale(all),
                    _ => scale(1.0),
                };
                Some((plain.iter().enumerate().map(at).collect(), s.attention_factor.unwrap_or(derived)))
            }
            RopeType::Llama3 => {
                let (low, high) = (s.low_freq_factor.unwrap_or(1.0), s.high_freq_factor.unwrap_or(4.0));
                let at = |f: &f64| {
                    let turns = original * f / (2.0 * PI);
                    let fast = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * (1.0 - fast) + f * fast
                };
                Some((plain.iter().map(at).collect(), 1.0))
            }
        }
    }

    /// The context that the model was trained on before it was stretched.
    fn original_context(&self) -> usize {
        self.rope_scaling.original_max_position_embeddings.unwrap_or(self.max_position_embeddings)
    }

    pub(super) fn validate_rope(&self) -> Result<()> {
        let s = &self.rope_scaling;
        let fail = |m: String| Err(Error::Config(m));
        let name = json!(s.rope_type);
        if let Some((key, _)) = s.given().into_iter().find(|(_, types)| !types.contains(&s.rope_type)) {
            return fail(format!("`rope_scaling.{key}` would do nothing with `rope_type` = {name}; remove it, or choose another type"));
        }
        let needs = |key: &str| fail(format!("`rope_type` = {name} needs `rope_scaling.{key}`"));
        match s.rope_type {
            RopeType::Default => return Ok(()),
            RopeType::Linear | RopeType::Llama3 if s.factor.is_none() => return needs("factor"),
            RopeType::Yarn if s.factor.or(s.original_max_position_embeddings.map(|n| n as f64)).is_none() => return needs("factor"),
            RopeType::Llama3 if s.low_freq_factor.is_none() => return needs("low_freq_factor"),
            RopeType::Llama3 if s.high_freq_factor.is_none() => return needs("high_freq_factor"),
            _ => {}
        }
        let original = self.original_context();
        if original == 0 || original > LARGEST {
            return fail(format!("`rope_scaling.original_max_position_embeddings` must be from 1 to {LARGEST}, found {original}"));
        }
        let factor = s.factor.unwrap_or(self.max_position_embeddings as f64 / original as f64);
        if !(factor.is_finite() && factor >= 1.0) {
            return fail(format!("`rope_scaling.factor` must be at least 1, found {factor}"));
        }
        for (key, x) in [("attention_factor", s.attention_factor), ("low_freq_factor", s.low_freq_factor), ("high_freq_factor", s.high_freq_factor)] {
            if let Some(x) = x.filter(|x| !(x.is_finite() && *x > 0.0)) {
                return fail(format!("`rope_scaling.{key}` must be positive, found {x}"));
            }
        }
        for (key, x) in [("beta_fast", s.beta_fast), ("beta_slow", s.beta_slow), ("mscale", s.mscale), ("mscale_all_dim", s.mscale_all_dim)] {
            if let Some(x) = x.filter(|x| !(x.is_finite() && *x >= 0.0)) {
                return fail(format!("`rope_scaling.{key}` must not be negative, found {x}"));
            }
        }
        let (fast, slow) = (or(s.beta_fast, 32.0), or(s.beta_slow, 1.0));
        if fast < slow {
            return fail(format!("`rope_scaling.beta_fast` = {fast} must be at least `rope_scaling.beta_slow` = {slow}"));
        }
        if let (Some(low), Some(high)) = (s.low_freq_factor, s.high_freq_factor)
            && low >= high
        {
            return fail(format!("`rope_scaling.high_freq_factor` = {high} must be above `rope_scaling.low_freq_factor` = {low}"));
        }
        if s.rope_type == RopeType::Yarn && self.rope_theta <= 1.0 {
            return fail(format!("`rope_type` = {name} needs a `rope_theta` above 1, found {}", self.rope_theta));
        }
        Ok(())
    }
}

/// 0 is as nothing said.
fn or(x: Option<f64>, default: f64) -> f64 {
    x.filter(|x| *x != 0.0).unwrap_or(default)
}

/// Brings `rope_scaling` (the older word) and `rope_parameters` to ours: what both may say is in `rope_scaling`, theta and the rotated part stand above.
pub(super) fn read(map: &mut Map<String, Value>) -> Result<()> {
    let known = serde_json::to_value(RopeScaling::default()).map_err(|e| Error::Config(e.to_string()))?;
    let fail = |m: String| Err(Error::Config(m));
    let mut found: Option<Map<String, Value>> = None;
    for key in ["rope_scaling", "rope_parameters"] {
        let mut rope = match map.remove(key) {
            None | Some(Value::Null) => continue,
            Some(Value::Object(rope)) => rope,
            Some(x) => return fail(format!("`{key}` must be an object, found {x}")),
        };
        if let Some(kind) = rope.remove("type")
            && let Some(other) = rope.insert("rope_type".into(), kind.clone()).filter(|other| *other != kind)
        {
            return fail(format!("`{key}.rope_type` = {other} and `{key}.type` = {kind} contradict each other; keep one"));
        }
        match rope.get("rope_type") {
            Some(x) if *x == "dynamic" => {
                return fail(format!(
                    "`rope_type` = {x} is not supported: its frequencies follow from the length of the whole text, so that what was read would have to be rotated \
                     anew with each token; use \"yarn\" or \"linear\""
                ));
            }
            Some(x) if serde_json::from_value::<RopeType>(x.clone()).is_err() => {
                return fail(format!("`rope_type` = {x} is not supported; it can be \"default\", \"linear\", \"yarn\" or \"llama3\""));
            }
            _ => {}
        }
        for above in ["rope_theta", "partial_rotary_factor"] {
            let Some(x) = rope.remove(above) else { continue };
            if let Some(other) = map.get(above).filter(|y| **y != x) {
                return fail(format!("`{above}` = {other} and `{key}.{above}` = {x} contradict each other; keep one"));
            }
            map.insert(above.into(), x);
        }
        if let Some((k, x)) = rope.iter().find(|(k, _)| known.get(k).is_none()) {
            return fail(format!("`{key}.{k}` = {x} is not supported; remove it if the model can do without"));
        }
        rope.retain(|_, x| !x.is_null());
        if found.as_ref().is_some_and(|other| *other != rope) {
            return fail("`rope_scaling` and `rope_parameters` contradict each other; keep one".into());
        }
        found = Some(rope);
    }
    if let Some(rope) = found {
        map.insert("rope_scaling".into(), rope.into());
    }
    Ok(())
}

/// For a `config.json`: nothing where nothing is stretched, else what is said.
pub(super) fn write(json: &mut Value) {
    let Some(map) = json.as_object_mut() else { return };
    if map.get("rope_scaling").is_some_and(|s| s["rope_type"] == "default") {
        map.remove("rope_scaling");
    }
    if let Some(Value::Object(rope)) = map.get_mut("rope_scaling") {
        rope.retain(|_, x| !x.is_null());
    }
}

#[cfg(test)]
mod tests;
