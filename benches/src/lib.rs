//! What the benches share: the shapes that peers are measured at, and random tensors.

use engine::{DType, Device, Result, Tensor};

/// Gated SDPA: batch, heads, key/value heads, time, head dim.
pub const SDPA: [(usize, usize, usize, usize, usize); 3] = [(1, 8, 8, 2048, 64), (4, 4, 2, 512, 64), (1, 8, 2, 4096, 128)];
/// The delta rule: batch, time, heads, head dim.
pub const DELTA: [(usize, usize, usize, usize); 2] = [(1, 4096, 4, 128), (4, 512, 4, 64)];

/// Normal numbers that want a gradient.
pub fn leaf(shape: &[usize], stream: u64) -> Result<Tensor> {
    Ok(Tensor::randn(shape, DType::F32, &Device::cpu(), 1, stream)?.requires_grad())
}

/// The peers' small Qwen3-Next: 10.06 M parameters.
pub fn qwen3_next_10m() -> nn::ModelConfig {
    nn::ModelConfig {
        vocab_size: 4096,
        hidden_size: 256,
        num_hidden_layers: 4,
        intermediate_size: 1024,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        linear_num_key_heads: 4,
        linear_num_value_heads: 4,
        linear_key_head_dim: 64,
        linear_value_head_dim: 64,
        num_experts: 16,
        num_experts_per_tok: 2,
        moe_intermediate_size: 128,
        shared_expert_intermediate_size: 128,
        ..Default::default()
    }
}

/// The most memory this process ever held, in bytes (Linux; 0 elsewhere).
pub fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<usize>().ok()).unwrap_or(0) * 1024
}
