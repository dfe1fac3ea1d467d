//! Which measures to take, by name.

use super::watch::is_softmax;
use crate::{Error, Result};
use nn::{ModelConfig, nearest};

/// The measures' names: the fields of `measures.json`. The loss is always taken.
pub const NAMES: [&str; 10] =
    ["attention", "activations", "gates", "sdpa_output", "delta", "value_output_rank", "router", "logit_lens", "loss_by_position", "trace"];

/// What is always taken, and may be named where nothing else is to be.
const LOSS: &str = "loss";

/// The measures to take of a model: those asked for, or all that it has something of. A name that there is none of is an error that offers the nearest; one that
/// the model has nothing of, an error that says what it lacks.
pub(super) fn chosen(config: &ModelConfig, only: &[String]) -> Result<Vec<&'static str>> {
    if only.is_empty() {
        return Ok(NAMES.into_iter().filter(|name| lacks(config, name).is_none()).collect());
    }
    let mut out = check_names(only)?;
    for name in &out {
        if let Some(what) = lacks(config, name) {
            return Err(Error::Usage(format!(
                "the measure `{name}` was asked for, and this model has no {what}; leave it out, or name another model"
            )));
        }
    }
    out.sort_by_key(|name| NAMES.iter().position(|n| n == name));
    out.dedup();
    Ok(out)
}

/// Those of `names` that a model of this configuration has something of: variants of a study differ in that. The loss alone where that is none of them, as no
/// names at all would mean all measures.
pub fn had_by(config: &ModelConfig, names: &[String]) -> Vec<String> {
    let had: Vec<String> = names.iter().filter(|name| lacks(config, name).is_none()).cloned().collect();
    if had.is_empty() && !names.is_empty() { vec![LOSS.into()] } else { had }
}

/// The measures of these names; an error offers the nearest of what is unknown.
pub fn check_names(names: &[String]) -> Result<Vec<&'static str>> {
    let known = |name: &String| {
        NAMES.into_iter().chain([LOSS]).find(|n| n == name).ok_or_else(|| {
            let near = nearest(name, NAMES.into_iter()).map_or(String::new(), |n| format!(" (did you mean `{n}`?)"));
            Error::Usage(format!("no measure is called `{name}`{near}; there are {}", NAMES.join(", ")))
        })
    };
    names.iter().map(known).collect()
}

/// What the model would need for a measure and doesn't have.
fn lacks(c: &ModelConfig, name: &str) -> Option<&'static str> {
    let layers = || 0..c.num_hidden_layers;
    let softmax = layers().any(|i| is_softmax(c, i));
    let delta = layers().any(|i| !is_softmax(c, i));
    let experts = layers().any(|i| c.is_sparse(i));
    match name {
        "attention" | "sdpa_output" | "value_output_rank" if !softmax => Some("layer of softmax attention"),
        "gates" if !(delta || softmax && (gated(c) || c.switch_heads.is_some()) || experts && c.shared_expert_intermediate_size > 0) => {
            Some("gate: none on its attention, no delta rule and no shared expert")
        }
        "delta" if !delta => Some("layer of the delta rule"),
        "router" if !experts => Some("experts"),
        _ => None,
    }
}

/// Whether softmax attention has a gate, at whichever of the positions that configurations know.
fn gated(c: &ModelConfig) -> bool {
    let all = serde_json::to_value(c).unwrap_or_default();
    all.as_object().is_some_and(|all| all.values().filter_map(|v| v.get("granularity")).any(|g| g != "none"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nn::{AttentionGate, GateGranularity, LayerType, SwitchHeads};

    #[test]
    fn what_a_model_has() {
        let bare = ModelConfig {
            num_hidden_layers: 2,
            num_experts: 0,
            layer_types: vec![LayerType::FullAttention; 2],
            attention_gate: AttentionGate { granularity: GateGranularity::None, ..Default::default() },
            ..Default::default()
        };
        let only = |names: &[&str]| names.iter().map(|n| n.to_string()).collect::<Vec<_>>();
        let all = chosen(&bare, &[]).unwrap();
        assert!(all.contains(&"attention") && !all.contains(&"gates") && !all.contains(&"delta") && !all.contains(&"router"), "{all:?}");
        for (name, said) in [("gates", "no gate"), ("delta", "no layer of the delta rule"), ("router", "no experts")] {
            let e = chosen(&bare, &only(&[name])).unwrap_err();
            assert!(e.to_string().contains(said) && e.exit_code() == 2, "{e}");
        }
        let switch = ModelConfig { switch_heads: SwitchHeads { experts: 2, top_k: 1, keys: false }, ..bare.clone() };
        assert!(chosen(&switch, &[]).unwrap().contains(&"gates"));
        let hybrid = ModelConfig { num_hidden_layers: 4, ..Default::default() };
        assert_eq!(chosen(&hybrid, &[]).unwrap(), NAMES);
        assert_eq!(chosen(&hybrid, &only(&["gates", "attention", "gates"])).unwrap(), ["attention", "gates"]);
        // nothing of what was asked for is not everything
        assert_eq!(had_by(&bare, &only(&["gates", "attention"])), ["attention"]);
        assert_eq!(chosen(&bare, &had_by(&bare, &only(&["gates", "router"]))).unwrap(), ["loss"]);
        assert!(had_by(&bare, &[]).is_empty());
        let e = chosen(&hybrid, &only(&["gate"])).unwrap_err().to_string();
        assert!(e.contains("did you mean `gates`?"), "{e}");
        let linear = ModelConfig { layer_types: vec![LayerType::LinearAttention; 2], num_hidden_layers: 2, ..Default::default() };
        assert!(chosen(&linear, &only(&["attention"])).unwrap_err().to_string().contains("no layer of softmax attention"));
    }
}
