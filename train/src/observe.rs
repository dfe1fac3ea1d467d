//! Tensors that an observer saw, boiled down to scalars for `metrics.jsonl`.

use crate::metrics::Scalars;

/// Mean, and the parts of magnitude below 0.01, below 0.1 and above 0.9. A gate of SiLU's has either sign, and is as good as shut where it is near zero.
fn gate(out: &mut Scalars, name: &str, x: impl Iterator<Item = f64>) {
    let (mut n, mut sum, mut shut, mut low, mut high) = (0u64, 0.0, 0u64, 0u64, 0u64);
    for v in x {
        n += 1;
        sum += v;
        shut += u64::from(v.abs() < 0.01);
        low += u64::from(v.abs() < 0.1);
        high += u64::from(v.abs() > 0.9);
    }
    if n > 0 {
        let part = |count: u64| count as f64 / n as f64;
        out.extend(
            [("mean", sum / n as f64), ("shut", part(shut)), ("low", part(low)), ("high", part(high))].map(|(k, v)| (format!("{name}_{k}"), v)),
        );
    }
}

/// Adds the scalars of the tensor `values` of shape `shape` that was seen as `name`, by the last part of its name:
///
/// | ends in | scalars |
/// |---|---|
/// | `hook_gate`, `hook_shared_gate`, `hook_beta` | `…_mean`, and `…_shut`, `…_low`, `…_high`: the parts of magnitude below 0.01, below 0.1 and above 0.9 (saturation) |
/// | `hook_log_decay` | the same of `alpha = exp(g)` |
/// | `hook_router_probs`, `[…, experts]` | `router_entropy` (nats, mean over tokens), `router_max` (mean largest probability) |
/// | `hook_router_index`, expert ids | `router_load_max` (largest load over the mean load), `router_load_min`, `router_load_entropy` (nats), `router_dead` (experts without a token), given `experts` |
/// | `hook_resid_*` | `…_rms`, `…_max` (largest magnitude) |
/// | anything else | `…_rms`: queries, keys, values, outputs and logits have either sign, and means near zero |
pub fn summarise(out: &mut Scalars, name: &str, shape: &[usize], values: &[f32], experts: usize) {
    let (path, hook) = name.rsplit_once('.').unwrap_or(("", name));
    let hook = hook.strip_prefix("hook_").unwrap_or(hook);
    let key = |k: &str| if path.is_empty() { k.to_string() } else { format!("{path}.{k}") };
    let n = values.len() as f64;
    if values.is_empty() {
        return;
    }
    let wide = || values.iter().map(|&v| f64::from(v));
    match hook {
        "gate" | "shared_gate" | "beta" => gate(out, &key(hook), wide()),
        "log_decay" => gate(out, &key("alpha"), wide().map(f64::exp)),
        "router_probs" => {
            let width = shape.last().copied().unwrap_or(1).max(1);
            let (mut entropy, mut top) = (0.0, 0.0);
            for row in values.chunks_exact(width) {
                entropy -= row.iter().map(|&p| f64::from(p)).filter(|&p| p > 0.0).map(|p| p * p.ln()).sum::<f64>();
                top += f64::from(row.iter().copied().fold(0.0f32, f32::max));
            }
            let rows = (values.len() / width) as f64;
            out.extend([(key("router_entropy"), entropy / rows), (key("router_max"), top / rows)]);
        }
        "router_index" if experts > 0 => {
            let mut load = vec![0u64; experts];
            for &v in values {
                if let Some(l) = load.get_mut(v as usize) {
                    *l += 1;
                }
            }
            let share: Vec<f64> = load.iter().map(|&l| l as f64 / n).collect();
            let entropy = -share.iter().filter(|&&s| s > 0.0).map(|s| s * s.ln()).sum::<f64>();
            let (max, min) = share.iter().fold((0.0f64, 1.0f64), |(a, b), &s| (a.max(s), b.min(s)));
            let e = experts as f64;
            let dead = load.iter().filter(|&&l| l == 0).count() as f64;
            out.extend([(key("router_load_max"), max * e), (key("router_load_min"), min * e)]);
            out.extend([(key("router_load_entropy"), entropy), (key("router_dead"), dead)]);
        }
        h => {
            out.insert(key(&format!("{h}_rms")), (wide().map(|v| v * v).sum::<f64>() / n).sqrt());
            if h.starts_with("resid") {
                out.insert(key(&format!("{h}_max")), wide().fold(0.0f64, |a, v| a.max(v.abs())));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars() {
        let mut s = Scalars::new();
        summarise(&mut s, "blocks.0.attn.hook_gate", &[4], &[0.0, 0.5, 0.95, 1.0], 0);
        summarise(&mut s, "blocks.1.attn.hook_log_decay", &[2], &[0.0, f32::NEG_INFINITY], 0);
        summarise(&mut s, "blocks.1.mlp.hook_router_probs", &[2, 2], &[0.5, 0.5, 1.0, 0.0], 2);
        summarise(&mut s, "blocks.1.mlp.hook_router_index", &[4], &[0.0, 0.0, 0.0, 1.0], 2);
        summarise(&mut s, "blocks.2.mlp.hook_router_index", &[4], &[0.0, 0.0, 2.0, 2.0], 4);
        summarise(&mut s, "blocks.2.attn.hook_gate", &[8], &[-0.001, 0.005, -0.05, 0.09, -0.2, 0.5, 0.91, 3.0], 0);
        summarise(&mut s, "blocks.1.hook_resid_post", &[2], &[3.0, -4.0], 0);
        summarise(&mut s, "blocks.1.attn.hook_z", &[2], &[3.0, -4.0], 0);
        summarise(&mut s, "hook_x", &[0], &[], 0);
        let near = |k: &str, v: f64| assert!((s[k] - v).abs() < 1e-6, "{k}: {}", s[k]);
        near("blocks.0.attn.gate_mean", 0.6125);
        near("blocks.0.attn.gate_low", 0.25);
        near("blocks.0.attn.gate_high", 0.5);
        near("blocks.1.attn.alpha_mean", 0.5);
        near("blocks.1.mlp.router_entropy", 0.5 * std::f64::consts::LN_2);
        near("blocks.1.mlp.router_load_max", 1.5);
        near("blocks.1.mlp.router_load_min", 0.5);
        near("blocks.1.mlp.router_dead", 0.0);
        near("blocks.2.mlp.router_dead", 2.0);
        near("blocks.2.mlp.router_load_entropy", std::f64::consts::LN_2);
        for (part, of_eight) in [("shut", 2.0), ("low", 4.0), ("high", 2.0)] {
            near(&format!("blocks.2.attn.gate_{part}"), of_eight / 8.0);
        }
        near("blocks.1.resid_post_rms", 12.5f64.sqrt());
        near("blocks.1.resid_post_max", 4.0);
        near("blocks.1.attn.z_rms", 12.5f64.sqrt());
        assert!(!s.contains_key("x_rms") && !s.contains_key("blocks.1.attn.z_mean"));
    }
}
