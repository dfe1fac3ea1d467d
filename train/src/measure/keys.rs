//! The scalars that a model can have, before there is one.

use super::losses::bounds;
use super::names;
use super::watch::is_softmax;
use super::{Measures, Options};
use crate::Result;
use nn::ModelConfig;
use std::collections::BTreeSet;

/// What is told of each kind of gate, behind its name.
const OF_GATES: [&str; 4] = ["", "_below_001", "_below_01", "_above_09"];

impl Measures {
    /// The names that [`Measures::scalars`] can have of models of this configuration, measured like this.
    ///
    /// # Errors
    ///
    /// A measure that there is none of, or that the model has nothing of.
    pub fn keys(c: &ModelConfig, options: &Options) -> Result<BTreeSet<String>> {
        let softmax = (0..c.num_hidden_layers).any(|i| is_softmax(c, i));
        let linear = (0..c.num_hidden_layers).any(|i| !is_softmax(c, i));
        let mut out: BTreeSet<String> = ["parameters", "active_parameters", "loss", "bits_per_byte"].map(String::from).into();
        for name in names::chosen(c, &options.only)? {
            let own: &[&str] = match name {
                "attention" => &["first_token", "sink_rate", "attention_entropy", "max_score"],
                "activations" if softmax && linear => &[
                    "max_activation",
                    "mean_max_activation",
                    "max_ratio",
                    "massive_layers",
                    "pre_attention_spikes",
                    "sink_spike_alignment",
                    "spike_retention",
                ],
                "activations" => &["max_activation", "mean_max_activation", "max_ratio", "massive_layers"],
                "sdpa_output" => &["sdpa_after", "sdpa_after_below_1e2", "sdpa_after_below_1e3"],
                "delta" => &["half_life", "beta", "state_norm", "state_rank"],
                "value_output_rank" => &["value_output_rank", "value_output_stable_rank"],
                "router" => &["router_entropy", "router_max_over_mean", "router_cv", "router_dead"],
                _ => &[],
            };
            out.extend(own.iter().map(|k| k.to_string()));
            match name {
                "sdpa_output" if c.attention_gate.is_some() => {
                    out.extend(["sdpa_before", "sdpa_before_below_1e2", "sdpa_before_below_1e3"].map(String::from));
                }
                "gates" => out.extend(of_gates(c, softmax, linear)),
                "logit_lens" => out.extend((0..c.num_hidden_layers).map(|i| format!("logit_lens_{i}"))),
                "loss_by_position" => out.extend(positions(options).map(|to| format!("loss_to_{to}"))),
                _ => {}
            }
        }
        Ok(out)
    }
}

/// Of the gates that a model has.
fn of_gates(c: &ModelConfig, softmax: bool, linear: bool) -> Vec<String> {
    let on_attention = [
        ("attention", c.attention_gate.is_some()),
        ("value", c.value_gate.is_some()),
        ("key", c.key_gate.is_some()),
        ("query", c.query_gate.is_some()),
        ("dense", c.dense_gate.is_some()),
    ];
    let shared = c.shared_expert_intermediate_size > 0 && (0..c.num_hidden_layers).any(|i| c.is_sparse(i));
    let others = [("switch", softmax && c.switch_heads.is_some()), ("delta_output", linear), ("beta", linear), ("shared_expert", shared)];
    let kinds = on_attention.iter().filter(|k| softmax && k.1).chain(others.iter().filter(|k| k.1));
    let mut out: Vec<String> = kinds.flat_map(|(kind, _)| OF_GATES.map(|part| format!("gate_{kind}{part}"))).collect();
    if softmax && on_attention.iter().any(|k| k.1) {
        out.push("gate_score".into());
    }
    out
}

/// Ends of the buckets of positions, whichever of the windows the text is long enough for.
fn positions(options: &Options) -> impl Iterator<Item = usize> {
    let most = options.context.unwrap_or(8 * options.seq_len);
    let windows = [most].into_iter().chain([8, 4, 2, 1].map(|n| n * options.seq_len)).filter(move |t| *t <= most);
    windows.flat_map(|time| bounds(options.seq_len, time)).filter(|to| *to > 0)
}
