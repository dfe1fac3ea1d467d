//! Measures as single numbers, for tables.

use super::Measures;
use std::collections::BTreeMap;

/// The mean of what is finite; none of nothing.
fn mean(x: impl IntoIterator<Item = f64>) -> Option<f64> {
    let (sum, n) = x.into_iter().filter(|x| x.is_finite()).fold((0.0, 0u64), |(s, n), x| (s + x, n + 1));
    (n > 0).then(|| sum / n as f64)
}

fn median(x: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut x: Vec<f64> = x.into_iter().filter(|x| !x.is_nan()).collect();
    x.sort_by(f64::total_cmp);
    let half = x.len() / 2;
    let m = match x.len() {
        0 => return None,
        n if n % 2 == 1 => x[half],
        _ => 0.5 * (x[half - 1] + x[half]),
    };
    m.is_finite().then_some(m)
}

impl Measures {
    /// One number for each measure, by name; what the model has nothing of, or is not finite, is left out:
    ///
    /// | name | what |
    /// |---|---|
    /// | `parameters`, `active_parameters`, `loss`, `bits_per_byte`, `gate_score` | as the fields |
    /// | `first_token`, `sink_rate` | as [`Attention`](super::Attention)'s |
    /// | `attention_entropy`, `max_score` | mean over softmax heads (nats), and the largest of all |
    /// | `max_activation`, `mean_max_activation`, `max_ratio`, `massive_layers` | as [`Activations`](super::Activations)'s |
    /// | `pre_attention_spikes`, `sink_spike_alignment`, `spike_retention` | as [`HybridSpikes`](super::HybridSpikes)'s, the first as their number |
    /// | `gate_KIND`, `gate_KIND_below_001`, `…_below_01`, `…_above_09` | mean over the layers that have a gate of that kind |
    /// | `sdpa_before`, `sdpa_before_below_1e2`, `…_below_1e3`, `sdpa_after`, … | mean over softmax layers |
    /// | `half_life` | median over all heads, tokens |
    /// | `beta`, `state_norm`, `state_rank` | mean over all heads |
    /// | `value_output_rank`, `value_output_stable_rank` | mean over softmax heads |
    /// | `router_entropy`, `router_max_over_mean`, `router_cv` | mean over layers |
    /// | `router_dead` | sum over layers |
    /// | `logit_lens_N` | after layer N |
    /// | `loss_to_N` | in the bucket of positions that ends at N |
    pub fn scalars(&self) -> BTreeMap<String, f64> {
        let mut out = BTreeMap::new();
        let mut put = |name: &str, x: Option<f64>| {
            if let Some(x) = x.filter(|x| x.is_finite()) {
                out.insert(name.to_string(), x);
            }
        };
        put("parameters", Some(self.parameters as f64));
        put("active_parameters", Some(self.active_parameters as f64));
        put("loss", Some(self.loss));
        put("bits_per_byte", self.bits_per_byte);
        put("gate_score", self.gate_score);
        if let Some(a) = &self.attention {
            put("first_token", Some(a.first_token));
            put("sink_rate", Some(a.sink_rate));
            put("attention_entropy", mean(a.layers.iter().flat_map(|l| l.entropy.iter().copied())));
            put("max_score", a.layers.iter().flat_map(|l| l.max_score.iter().copied()).reduce(f64::max));
        }
        if let Some(a) = &self.activations {
            put("max_activation", Some(a.max));
            put("mean_max_activation", Some(a.mean_max));
            put("max_ratio", Some(a.max_ratio));
            put("massive_layers", Some(a.massive_layers as f64));
            if let Some(s) = &a.spikes {
                put("pre_attention_spikes", Some(s.pre_attention.len() as f64));
                put("sink_spike_alignment", s.alignment);
                put("spike_retention", s.retention);
            }
        }
        let mut kinds: Vec<&str> = self.gates.iter().map(|g| g.kind.as_str()).collect();
        kinds.sort_unstable();
        kinds.dedup();
        for kind in kinds {
            let of = |part: fn(&super::Gate) -> f64| mean(self.gates.iter().filter(|g| g.kind == kind).map(part));
            put(&format!("gate_{kind}"), of(|g| g.mean));
            put(&format!("gate_{kind}_below_001"), of(|g| g.below_001));
            put(&format!("gate_{kind}_below_01"), of(|g| g.below_01));
            put(&format!("gate_{kind}_above_09"), of(|g| g.above_09));
        }
        let before = || self.sdpa_output.iter().filter_map(|s| s.before.as_ref());
        let after = || self.sdpa_output.iter().map(|s| &s.after);
        put("sdpa_before", mean(before().map(|m| m.mean_abs)));
        put("sdpa_before_below_1e2", mean(before().map(|m| m.below_1e2)));
        put("sdpa_before_below_1e3", mean(before().map(|m| m.below_1e3)));
        put("sdpa_after", mean(after().map(|m| m.mean_abs)));
        put("sdpa_after_below_1e2", mean(after().map(|m| m.below_1e2)));
        put("sdpa_after_below_1e3", mean(after().map(|m| m.below_1e3)));
        put("half_life", median(self.delta.iter().flat_map(|d| d.half_life.iter().copied())));
        put("beta", mean(self.delta.iter().flat_map(|d| d.beta.iter().copied())));
        put("state_norm", mean(self.delta.iter().flat_map(|d| d.state_norm.iter().copied())));
        put("state_rank", mean(self.delta.iter().flat_map(|d| d.state_rank.iter().copied())));
        put("value_output_rank", mean(self.value_output_rank.iter().flat_map(|r| r.heads.iter().copied())));
        put("value_output_stable_rank", mean(self.value_output_rank.iter().flat_map(|r| r.stable.iter().copied())));
        put("router_entropy", mean(self.router.iter().map(|r| r.entropy)));
        put("router_max_over_mean", mean(self.router.iter().map(|r| r.max_over_mean)));
        put("router_cv", mean(self.router.iter().map(|r| r.cv)));
        put("router_dead", (!self.router.is_empty()).then(|| self.router.iter().map(|r| r.dead).sum::<usize>() as f64));
        self.logit_lens.iter().enumerate().for_each(|(i, l)| put(&format!("logit_lens_{i}"), Some(*l)));
        self.loss_by_position.iter().for_each(|p| put(&format!("loss_to_{}", p.to), Some(p.loss)));
        out
    }
}
