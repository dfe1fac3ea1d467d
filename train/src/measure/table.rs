//! Measures as a short table for a terminal.

use super::Measures;

/// The mean of what is finite.
fn mean(x: &[f64]) -> Option<f64> {
    let known: Vec<f64> = x.iter().copied().filter(|x| x.is_finite()).collect();
    (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
}

/// Columns of cells, right-aligned under their heads (the first `left` of them left-aligned); columns that are empty throughout are left out.
pub(crate) fn aligned(heads: &[&str], rows: &[Vec<String>], left: usize) -> String {
    let kept: Vec<usize> = (0..heads.len()).filter(|i| rows.iter().any(|r| !r[*i].is_empty())).collect();
    let widths: Vec<usize> =
        kept.iter().map(|i| rows.iter().map(|r| r[*i].chars().count()).chain([heads[*i].chars().count()]).max().unwrap_or(0)).collect();
    let line = |cells: Vec<&str>| {
        let each = kept.iter().zip(&widths).zip(cells).map(|((i, w), c)| if *i < left { format!("{c:w$}") } else { format!("{c:>w$}") });
        format!("{}\n", each.collect::<Vec<_>>().join("  ").trim_end())
    };
    let mut out = line(kept.iter().map(|i| heads[*i]).collect());
    rows.iter().for_each(|r| out += &line(kept.iter().map(|i| r[*i].as_str()).collect()));
    out
}

impl Measures {
    /// What `tidegate measure` prints: the totals, and a line for each layer.
    pub fn table(&self) -> String {
        let d = &self.data;
        let mut out = format!("{} windows of {} tokens of {}, {} parameters\n", d.windows, d.seq_len, d.path, self.parameters);
        let mut line = |name: &str, text: String| out += &format!("{name:24}{text}\n");
        let bits = self.bits_per_byte.map(|b| format!(", {b:.4} bits per byte")).unwrap_or_default();
        line("loss", format!("{:.4} nats per token{bits}", self.loss));
        if let Some(a) = &self.attention {
            line(
                "first-token attention",
                format!("{:.2}% of a query's (mean over softmax layers, heads, queries but the first)", 100.0 * a.first_token),
            );
            line("sinks", format!("in {:.1}% of samples and heads (ε {}, {} tokens)", 100.0 * a.sink_rate, a.sink_epsilon, a.sink_tokens));
        }
        if let Some(a) = &self.activations {
            let massive = format!("massive in {} of {} layers", a.massive_layers, a.layers.len());
            line(
                "largest activation",
                format!("{:.1}; {:.1} in the mean over layers; {:.0} times the median; {massive}", a.max, a.mean_max, a.max_ratio),
            );
            if let Some(s) = &a.spikes {
                let part = |x: Option<f64>| x.map_or("-".into(), |x| format!("{:.0}%", 100.0 * x));
                let text = format!(
                    "{} layers; sink-spike alignment {}, retention between spikes {}",
                    s.pre_attention.len(),
                    part(s.alignment),
                    part(s.retention)
                );
                line("spikes before attention", text);
            }
        }
        let mut kinds: Vec<&str> = vec![];
        for g in &self.gates {
            if !kinds.contains(&g.kind.as_str()) {
                kinds.push(&g.kind);
            }
        }
        for kind in kinds {
            let of =
                |part: fn(&super::Gate) -> f64| mean(&self.gates.iter().filter(|g| g.kind == kind).map(part).collect::<Vec<_>>()).unwrap_or(f64::NAN);
            let low = [of(|g| g.below_001), of(|g| g.below_01), of(|g| g.above_09)].map(|x| 100.0 * x);
            let text = format!("mean {:.3}; {:.1}% below 0.01, {:.1}% below 0.1, {:.1}% above 0.9", of(|g| g.mean), low[0], low[1], low[2]);
            line(&format!("gate: {kind}"), text);
        }
        for p in &self.loss_by_position {
            line(&format!("loss at {} to {}", p.from, p.to), format!("{:.4}", p.loss));
        }
        out + "\n" + &self.by_layer()
    }

    fn by_layer(&self) -> String {
        let heads = [
            "layer",
            "mixer",
            "first",
            "sinks",
            "entropy",
            "max |h|",
            "/median",
            "gate",
            "|o| before",
            "after",
            "half-life",
            "β",
            "rank of S",
            "of WvWo",
            "busiest expert",
            "dead",
            "lens",
        ];
        let row = |l: &super::LayerInfo| {
            let i = l.layer;
            let cell = |x: Option<f64>, digits: usize| x.map(|x| format!("{x:.digits$}")).unwrap_or_default();
            let attention = self.attention.as_ref().and_then(|a| a.layers.iter().find(|a| a.layer == i));
            let activation = self.activations.as_ref().and_then(|a| a.layers.iter().find(|a| a.layer == i));
            let gate = self.gates.iter().find(|g| g.layer == i && g.kind != "beta" && g.kind != "shared_expert");
            let output = self.sdpa_output.iter().find(|s| s.layer == i);
            let delta = self.delta.iter().find(|d| d.layer == i);
            let rank = self.value_output_rank.iter().find(|r| r.layer == i);
            let router = self.router.iter().find(|r| r.layer == i);
            let percent = |x: Option<f64>| x.map(|x| format!("{:.1}%", 100.0 * x)).unwrap_or_default();
            vec![
                i.to_string(),
                l.mixer.trim_end_matches("_attention").to_string(),
                percent(attention.and_then(|a| mean(&a.first_token))),
                percent(attention.and_then(|a| mean(&a.sink_rate))),
                cell(attention.and_then(|a| mean(&a.entropy)), 2),
                cell(activation.map(|a| a.max), 1),
                cell(activation.map(|a| a.ratio), 0),
                cell(gate.map(|g| g.mean), 3),
                cell(output.and_then(|o| o.before).map(|b| b.mean_abs), 3),
                cell(output.map(|o| o.after.mean_abs), 3),
                cell(delta.and_then(|d| mean(&d.half_life)), 1),
                cell(delta.and_then(|d| mean(&d.beta)), 2),
                cell(delta.and_then(|d| mean(&d.state_rank)), 1),
                cell(rank.and_then(|r| mean(&r.heads)), 1),
                cell(router.map(|r| r.max_over_mean), 2),
                router.map(|r| r.dead.to_string()).unwrap_or_default(),
                cell(self.logit_lens.get(i).copied(), 3),
            ]
        };
        aligned(&heads, &self.layers.iter().map(row).collect::<Vec<_>>(), 2)
    }
}
