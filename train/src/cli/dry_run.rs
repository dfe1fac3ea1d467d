//! `tidegate train --dry-run`: what a run takes, from its configuration alone.

use crate::config::{Budget, Precision, RunConfig};
use engine::DType;
use nn::GatePosition;

/// Parameters, memory and operations of a run, in lines.
pub(super) fn report(config: &RunConfig) -> String {
    let lines = [parameters(config), memory(config), operations(config)];
    format!("{}\n{}", config.name, lines.join("\n"))
}

fn parameters(config: &RunConfig) -> String {
    let model = &config.model;
    let (total, active) = model.parameters();
    let gates: Vec<String> = GatePosition::ALL
        .into_iter()
        .filter(|at| model.gate_parameters(*at) > 0)
        .map(|at| format!("{} {}", at.key(), model.gate_parameters(at)))
        .collect();
    let gates = if gates.is_empty() { "none in gates of attention".into() } else { format!("of them in gates of attention: {}", gates.join(", ")) };
    format!("parameters  {total} in all, {active} active for a token; {gates}")
}

/// The dtype that activations are computed in where the device does not decide: f32.
fn compute(config: &RunConfig) -> DType {
    config.train.dtype.unwrap_or(Precision::F32).into()
}

fn memory(config: &RunConfig) -> String {
    let (n, compute) = (config.model.parameters().0 as f64, compute(config));
    let size = |bytes: f64| match bytes / f64::from(1 << 20) {
        mib if mib < 1024.0 => format!("{mib:.1} MiB"),
        mib => format!("{:.2} GiB", mib / 1024.0),
    };
    let (b, t) = (config.data.batch, config.data.seq_len);
    let activations = config.model.activation_bytes(b.saturating_mul(t), compute);
    let parts = [
        ("parameters", 4.0 * n),
        ("gradients", 4.0 * n),
        ("optimizer", 8.0 * n),
        ("parameters in bf16", if compute == DType::BF16 { 2.0 * n } else { 0.0 }),
    ];
    let listed: Vec<String> = parts.iter().filter(|p| p.1 > 0.0).map(|(name, bytes)| format!("{name} {}", size(*bytes))).collect();
    let sum: f64 = parts.iter().map(|p| p.1).sum::<f64>() + activations;
    let machine = engine::cpu::system_memory().map_or(String::new(), |have| format!("; this machine has {}", size(have as f64)));
    format!(
        "memory      {} in all: {}, activations about {} ({compute}, a micro-batch of {b} x {t} tokens){machine}",
        size(sum),
        listed.join(", "),
        size(activations)
    )
}

fn operations(config: &RunConfig) -> String {
    let t = config.data.seq_len;
    let token = config.model.flops_per_token(t);
    let step = config.data.batch as f64 * t as f64 * config.train.accumulate as f64;
    let whole = match config.budget() {
        Ok(Budget::Tokens(n)) => format!("; {} for the {n} tokens of the budget", flop(token * n as f64)),
        Ok(Budget::Steps(n)) => format!("; {} for the {n} steps of the budget", flop(token * step * n as f64)),
        _ => String::new(),
    };
    format!(
        "operations  {} a token, forward and backward, at {t} tokens a window; {} a step of {step} tokens{whole}",
        flop(token),
        flop(token * step)
    )
}

/// Operations with the prefix that suits.
fn flop(n: f64) -> String {
    const PREFIXES: [(f64, &str); 7] = [(1e24, "Y"), (1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")];
    let (unit, prefix) = PREFIXES.into_iter().find(|p| n >= p.0).unwrap_or((1e6, "M"));
    format!("{:.1} {prefix}FLOP", n / unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets::by_name;

    #[test]
    fn the_papers_largest_model() {
        let mut c = by_name("qwen3-15a2b").unwrap();
        let text = report(&c);
        // 16 bytes a parameter; 6 operations an active one (without the embedding) and 12·H·D for each key of (4096 + 1)/2
        for part in [
            "parameters  15577227264 in all, 1987682304 active for a token; none in gates of attention",
            "parameters 58.03 GiB, gradients 58.03 GiB, optimizer 116.06 GiB, activations about ",
            "a micro-batch of 1 x 4096 tokens",
            "operations  12.5 GFLOP a token, forward and backward, at 4096 tokens a window; 52.3 PFLOP a step of 4194304 tokens; 5.0 ZFLOP for the 400000000000 tokens",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        c.model.value_gate.granularity = nn::GateGranularity::Headwise;
        c.model.attention_gate.granularity = nn::GateGranularity::Elementwise;
        c.train.dtype = Some(Precision::BF16);
        let text = report(&c);
        assert!(text.contains("of them in gates of attention: attention_gate 201326592, value_gate 196608\n"), "{text}");
        assert!(text.contains("parameters in bf16 29."), "{text}");
    }
}
