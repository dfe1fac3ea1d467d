//! Typed presets: functions that return the whole configuration.

use crate::config::{Checkpoint, Data, Eval, Optim, RunConfig, Sample, Train};
use crate::data::{MOBY_DICK_PATH, Packing};
use crate::schedule::Shape;
use crate::tasks::Settings;
use crate::{Error, Result};
use nn::{AttentionGate, ModelConfig, nearest};
use std::path::PathBuf;

mod recurrent;

/// The names of all presets.
pub const NAMES: &[&str] = &[
    "quickstart",
    "smoke",
    "qwen3-1.7b-28l",
    "qwen3-1.7b-48l",
    "qwen3-15a2b",
    "gated-deltanet-0.4b",
    "gated-deltanet-1.3b",
    "gated-deltanet-h1-0.4b",
    "gated-deltanet-h1-1.3b",
    "gated-deltanet-h2-0.4b",
    "gated-deltanet-h2-1.3b",
    "mamba2-0.4b",
    "mamba2-1.3b",
    "delta-net-0.4b",
    "delta-net-1.3b",
];

/// The preset of that name.
pub fn by_name(name: &str) -> Result<RunConfig> {
    match name {
        "quickstart" => Ok(quickstart()),
        "smoke" => Ok(smoke()),
        "qwen3-1.7b-28l" => Ok(qwen3_1_7b_28l()),
        "qwen3-1.7b-48l" => Ok(qwen3_1_7b_48l()),
        "qwen3-15a2b" => Ok(qwen3_15a2b()),
        _ => {
            if let Some(c) = recurrent::by_name(name) {
                return Ok(c);
            }
            let hint = nearest(name, NAMES.iter().copied()).map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
            Err(Error::Usage(format!("no preset and no file is called `{name}`{hint}; the presets are {}", NAMES.join(", "))))
        }
    }
}

/// Three layers of Gated DeltaNet to one of gated attention, a mixture of experts in each.
fn model(hidden: usize, experts: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: 256,
        hidden_size: hidden,
        num_hidden_layers: 4,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: hidden / 4,
        linear_num_key_heads: 2,
        linear_num_value_heads: 4,
        linear_key_head_dim: hidden / 4,
        linear_value_head_dim: hidden / 4,
        num_experts: experts,
        num_experts_per_tok: 2,
        moe_intermediate_size: hidden / 2,
        shared_expert_intermediate_size: hidden / 2,
        initializer_range: 0.06,
        router_aux_loss_coef: 0.01,
        tie_word_embeddings: true,
        ..ModelConfig::default()
    }
}

/// A small hybrid mixture-of-experts model on Moby-Dick: five minutes on two cores.
pub fn quickstart() -> RunConfig {
    RunConfig {
        name: "quickstart".into(),
        seed: 1,
        model: model(128, 8),
        data: Data { path: MOBY_DICK_PATH.into(), held_out: 0.1, seq_len: 256, batch: 3, packing: Packing::Windows, eot: None },
        tasks: Settings::default(),
        train: Train {
            minutes: Some(5.0),
            tokens: None,
            steps: None,
            accumulate: 2,
            from: PathBuf::new(),
            dtype: None,
            observe_every: 1,
            log_every: 50,
            tensorboard: true,
        },
        optim: Optim {
            lr: 4e-3,
            schedule: Shape::Cosine,
            warmup: 0.02,
            decay: 0.3,
            end: 0.05,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            no_decay: ["A_log", "dt_bias", "*norm*", "*.bias"].map(String::from).to_vec(),
            freeze: vec![],
            clip: 1.0,
        },
        eval: Eval { every: 250, tokens: 16_384 },
        checkpoint: Checkpoint { every: 500, keep: 2 },
        sample: Sample { count: 4, tokens: 200, prompt: "The whale ".into(), temperature: 0.8, top_k: 0 },
    }
}

/// Seconds of training that go through everything: for continuous integration.
pub fn smoke() -> RunConfig {
    let mut c = quickstart();
    c.name = "smoke".into();
    c.model = model(64, 4);
    c.data.seq_len = 64;
    c.data.batch = 4;
    c.train = Train { minutes: None, tokens: None, steps: Some(30), log_every: 10, ..c.train };
    c.eval = Eval { every: 15, tokens: 1024 };
    c.checkpoint.every = 10;
    c.sample = Sample { count: 1, tokens: 40, ..c.sample };
    c
}

/// What the three models of 2505.06708 (§3.1 and table 7) have in common: Qwen3's norms and rotation (with the base of its pre-training, 10,000), no gate.
fn qwen3(hidden: usize, layers: usize, heads: usize, kv_heads: usize) -> ModelConfig {
    ModelConfig {
        vocab_size: 151_936,
        hidden_size: hidden,
        num_hidden_layers: layers,
        full_attention_interval: 1,
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim: 128,
        partial_rotary_factor: 1.0,
        rope_theta: 10_000.0,
        zero_centered_norms: false,
        attention_gate: AttentionGate::none(),
        shared_expert_intermediate_size: 0,
        num_experts: 0,
        tie_word_embeddings: true,
        ..ModelConfig::default()
    }
}

/// A run of the paper's 400 B tokens: 1024 windows of 4096 tokens a step, 1000 steps of warm-up, a cosine down to 3e-5, AdamW's defaults. The text, and what the
/// paper says nothing of, are the quickstart's.
fn paper(name: &str, model: ModelConfig, lr: f64) -> RunConfig {
    let c = quickstart();
    RunConfig {
        name: name.into(),
        model,
        data: Data { seq_len: 4096, batch: 1, ..c.data },
        train: Train { minutes: None, tokens: Some(400_000_000_000), accumulate: 1024, ..c.train },
        optim: Optim { lr, warmup: 0.01, end: 3e-5 / lr, beta2: 0.999, weight_decay: 0.01, ..c.optim },
        ..c
    }
}

/// The paper's dense model of 28 layers: 1.72 B parameters.
pub fn qwen3_1_7b_28l() -> RunConfig {
    paper("qwen3-1.7b-28l", ModelConfig { intermediate_size: 6144, ..qwen3(2048, 28, 16, 8) }, 4e-3)
}

/// The paper's dense model of 48 layers: 1.71 B parameters.
pub fn qwen3_1_7b_48l() -> RunConfig {
    paper("qwen3-1.7b-48l", ModelConfig { intermediate_size: 4608, ..qwen3(1536, 48, 16, 8) }, 4e-3)
}

/// The paper's mixture of 128 experts: 15.6 B parameters, 2.0 B of them active for a token.
pub fn qwen3_15a2b() -> RunConfig {
    let experts = ModelConfig {
        num_experts: 128,
        num_experts_per_tok: 8,
        moe_intermediate_size: 768,
        router_z_loss_coef: 0.001,
        tie_word_embeddings: false,
        ..qwen3(2048, 24, 32, 4)
    };
    paper("qwen3-15a2b", experts, 2e-3)
}

#[cfg(test)]
#[path = "presets_tests.rs"]
mod tests;
