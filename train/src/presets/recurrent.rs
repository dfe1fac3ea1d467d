//! The models of 2412.06464: Gated DeltaNet, its hybrids, and the recurrent models that it is compared with, in two sizes.
//!
//! Sizes and training are those of its authors' code (`lit_gpt/config.py`, `gated_delta_net.py`, `pretrain.py`), whose mixers have 9 heads at every width, keys of
//! 3/4 and values of 3/2 of it in all. What that code has beside this, a bias of β and an unused skip, is left out (18 numbers a layer). It has no H2: here it
//! has H1's sizes, with Mamba2 as its authors begin it (twice the width, heads of 64, state size 128, one group).

use super::{Optim, RunConfig, Train, quickstart};
use crate::config::Data;
use nn::{AttentionGate, LayerType, ModelConfig, QkNorm};

/// The preset of that name, if it is one of these.
pub(super) fn by_name(name: &str) -> Option<RunConfig> {
    use LayerType::{DeltaNet, LinearAttention, Mamba2, SlidingAttention};
    let (kind, size) = name.rsplit_once('-')?;
    let small = match size {
        "0.4b" => true,
        "1.3b" => false,
        _ => return None,
    };
    // width, layers, heads of softmax attention, inner width of the feed-forward
    let alone = if small { (1536, 11, 12, 6144) } else { (2400, 16, 16, 5888) };
    let hybrid = if small { (1536, 12, 12, 6144) } else { (2304, 18, 18, 6144) };
    let (sizes, pattern) = match kind {
        "gated-deltanet" => (alone, vec![LinearAttention]),
        "gated-deltanet-h1" => (hybrid, vec![LinearAttention, SlidingAttention]),
        "gated-deltanet-h2" => (hybrid, vec![Mamba2, LinearAttention, SlidingAttention]),
        "mamba2" => (alone, vec![Mamba2]),
        "delta-net" => (alone, vec![DeltaNet]),
        _ => return None,
    };
    Some(paper(name, model(sizes, pattern), if small { 15_000_000_000 } else { 100_000_000_000 }))
}

fn model((hidden, layers, heads, inner): (usize, usize, usize, usize), layer_pattern: Vec<LayerType>) -> ModelConfig {
    const HEADS: usize = 9;
    ModelConfig {
        vocab_size: 32_000,
        hidden_size: hidden,
        intermediate_size: inner,
        num_hidden_layers: layers,
        layer_pattern,
        num_experts: 0,
        num_attention_heads: heads,
        num_key_value_heads: heads,
        head_dim: hidden / heads,
        sliding_window: 2048,
        partial_rotary_factor: 1.0,
        qk_norm: QkNorm::None,
        attention_gate: AttentionGate::none(),
        linear_num_key_heads: HEADS,
        linear_num_value_heads: HEADS,
        linear_key_head_dim: hidden * 3 / 4 / HEADS,
        linear_value_head_dim: hidden * 3 / 2 / HEADS,
        mamba_num_heads: 2 * hidden / 64,
        mamba_head_dim: 64,
        mamba_state_size: 128,
        mamba_n_groups: 1,
        rms_norm_eps: 1e-5,
        zero_centered_norms: false,
        tie_word_embeddings: true,
        ..ModelConfig::default()
    }
}

/// 128 windows of 4096 tokens a step, AdamW, a hundredth of the budget as warm-up, a cosine down to a tenth. The text is the quickstart's.
fn paper(name: &str, model: ModelConfig, tokens: u64) -> RunConfig {
    let c = quickstart();
    RunConfig {
        name: name.into(),
        model,
        data: Data { seq_len: 4096, batch: 1, ..c.data },
        train: Train { minutes: None, tokens: Some(tokens), accumulate: 128, ..c.train },
        optim: Optim { lr: 4e-4, warmup: 0.01, end: 0.1, ..c.optim },
        ..c
    }
}
