//! The estimate of what a forward keeps against what it keeps: alone in its file, since memory is counted for the whole process.

use engine::{DType, Tensor};
use nn::{AttentionGate, Decoder, GateGranularity, LayerType, LinearActivation, LinearQkNorm, ModelConfig, SwitchHeads};

#[test]
fn the_estimate_is_what_a_forward_keeps() {
    let gate = AttentionGate::default();
    let base = ModelConfig {
        vocab_size: 64,
        hidden_size: 128,
        num_hidden_layers: 4,
        full_attention_interval: 1,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        linear_num_key_heads: 2,
        linear_num_value_heads: 4,
        linear_key_head_dim: 32,
        linear_value_head_dim: 32,
        num_experts: 0,
        intermediate_size: 384,
        moe_intermediate_size: 96,
        shared_expert_intermediate_size: 96,
        num_experts_per_tok: 2,
        attention_gate: AttentionGate::none(),
        mamba_num_heads: 8,
        mamba_head_dim: 32,
        mamba_state_size: 16,
        ..Default::default()
    };
    let cases = [
        ("dense", base.clone()),
        ("gate", ModelConfig { attention_gate: gate, ..base.clone() }),
        ("head-wise", ModelConfig { attention_gate: AttentionGate { granularity: GateGranularity::Headwise, ..gate }, ..base.clone() }),
        ("shared", ModelConfig { attention_gate: AttentionGate { shared: true, ..gate }, ..base.clone() }),
        ("value", ModelConfig { value_gate: gate, ..base.clone() }),
        ("switch", ModelConfig { switch_heads: SwitchHeads { experts: 4, top_k: 2, keys: true }, ..base.clone() }),
        ("query and dense", ModelConfig { query_gate: gate, dense_gate: gate, ..base.clone() }),
        ("norms", ModelConfig { sandwich_norm: true, sdpa_norm: true, ..base.clone() }),
        ("post", ModelConfig { post_norm: vec![LayerType::FullAttention], ..base.clone() }),
        ("experts", ModelConfig { num_experts: 8, ..base.clone() }),
        ("experts alone", ModelConfig { num_experts: 8, shared_expert_intermediate_size: 0, ..base.clone() }),
        ("mamba2", ModelConfig { layer_pattern: vec![LayerType::Mamba2], ..base.clone() }),
        ("mamba2 in groups, alone", ModelConfig { layer_pattern: vec![LayerType::Mamba2], mamba_n_groups: 2, intermediate_size: 0, ..base.clone() }),
        ("delta_net", ModelConfig { layer_pattern: vec![LayerType::DeltaNet], ..base.clone() }),
        ("gated delta net", ModelConfig { layer_pattern: vec![LayerType::LinearAttention], ..base.clone() }),
        ("l1", ModelConfig { layer_pattern: vec![LayerType::LinearAttention], linear_qk_norm: LinearQkNorm::L1, ..base.clone() }),
        ("relu", ModelConfig { layer_pattern: vec![LayerType::LinearAttention], linear_qk_activation: LinearActivation::Relu, ..base.clone() }),
        ("1 + elu", ModelConfig { layer_pattern: vec![LayerType::LinearAttention], linear_qk_activation: LinearActivation::Elu1, ..base.clone() }),
        ("no convolution", ModelConfig { layer_pattern: vec![LayerType::LinearAttention], linear_short_conv: false, ..base.clone() }),
        ("no gate", ModelConfig { layer_pattern: vec![LayerType::LinearAttention], linear_output_gate: false, ..base.clone() }),
        ("no norm", ModelConfig { layer_pattern: vec![LayerType::LinearAttention], linear_output_norm: false, ..base.clone() }),
        ("hybrid", ModelConfig { full_attention_interval: 4, num_experts: 8, attention_gate: gate, ..base }),
    ];
    let mut wrong = vec![];
    for (name, c) in cases {
        let (b, t) = (4, 256);
        let m = Decoder::new(&c, 0, DType::F32).unwrap();
        let ids: Vec<i64> = (0..(b * t) as i64).map(|i| i * 7 % 64).collect();
        let (x, y) = (Tensor::from_vec(&ids, &[b, t]).unwrap(), Tensor::from_vec(&ids, &[b * t]).unwrap());
        let before = engine::cpu::memory().0;
        let loss = m.loss(&x, &y, None, None).unwrap();
        // the loss keeps the gradient of the output projection, too, which is no activation
        let kept = (engine::cpu::memory().0 - before) as f64 - (64 * 128 * 4) as f64;
        drop(loss);
        let part = c.activation_bytes(b * t, DType::F32) / kept;
        println!("{name}: {part:.3} of {:.2} MiB", kept / (1 << 20) as f64);
        if !(0.95..1.05).contains(&part) {
            wrong.push(format!("{name}: {part:.3}"));
        }
    }
    assert!(wrong.is_empty(), "estimates against what is kept: {}", wrong.join(", "));
}
