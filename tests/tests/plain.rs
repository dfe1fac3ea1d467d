//! One training step's loss and every gradient of the decoder against the plain model, for every way that its layers can be set.

use engine::{DType, Tensor, rng};
use nn::{AttentionGate, Decoder, GateActivation, GateGranularity, GateOp, LayerType, ModelConfig, OutputGate, QkNorm, SwitchHeads};
use tidegate_tests::plain::Plain;

fn config() -> ModelConfig {
    use LayerType::{FullAttention, LinearAttention, SlidingAttention};
    ModelConfig {
        vocab_size: 50,
        hidden_size: 24,
        num_hidden_layers: 4,
        layer_types: vec![LinearAttention, FullAttention, LinearAttention, SlidingAttention],
        sliding_window: 7,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        partial_rotary_factor: 0.5,
        linear_num_key_heads: 2,
        linear_num_value_heads: 4,
        linear_key_head_dim: 8,
        linear_value_head_dim: 6,
        num_experts: 6,
        num_experts_per_tok: 3,
        moe_intermediate_size: 10,
        shared_expert_intermediate_size: 12,
        mlp_only_layers: vec![2],
        intermediate_size: 20,
        router_aux_loss_coef: 0.01,
        router_z_loss_coef: 0.01,
        initializer_range: 0.2,
        ..Default::default()
    }
}

/// A hybrid of all mixers.
fn mamba() -> ModelConfig {
    use LayerType::{DeltaNet, LinearAttention, Mamba2, SlidingAttention};
    let layer_types = vec![Mamba2, LinearAttention, DeltaNet, SlidingAttention];
    ModelConfig { layer_types, mamba_num_heads: 6, mamba_head_dim: 5, mamba_state_size: 7, mamba_conv_kernel: 3, ..config() }
}

fn ids(stream: u64, n: usize) -> Vec<i64> {
    rng::uniform(5, stream, n).into_iter().map(|u| (u * 50.0) as i64).collect()
}

fn error(ours: &Tensor, plain: &Tensor) -> f64 {
    let (a, b) = (ours.to_vec::<f64>().unwrap(), plain.to_vec::<f64>().unwrap());
    assert_eq!(a.len(), b.len());
    let d: f64 = a.iter().zip(&b).map(|(x, y)| (x - y).powi(2)).sum();
    let r: f64 = b.iter().map(|y| y * y).sum();
    (d / r).sqrt()
}

/// RMS(diff)/RMS(plain) of the loss and of each gradient. The fused model computes in `dtype`, the plain one always in f64.
fn compare(c: &ModelConfig, dtype: DType, b: usize, t: usize, cu_seqlens: Option<&Tensor>, bound: f64) {
    let model = Decoder::new(c, 3, dtype).unwrap();
    let twin = Decoder::new(c, 3, DType::F64).unwrap();
    for (p, q) in model.params().iter().zip(twin.params()) {
        // norms and biases start at a constant: moved, so that each element counts
        let moved = q.tensor.detach().add(&Tensor::randn(q.tensor.shape(), DType::F64, q.tensor.device(), 9, 0).unwrap().affine(0.1, 0.0).unwrap());
        let moved = moved.unwrap().cast(dtype).unwrap();
        p.tensor.assign(&moved).unwrap();
        q.tensor.assign(&moved.cast(DType::F64).unwrap()).unwrap();
    }
    let tokens = Tensor::from_vec(ids(1, b * t), &[b, t]).unwrap();
    let mut targets = ids(2, b * t);
    targets[t / 2] = -100;
    let targets = Tensor::from_vec(targets, &[b * t]).unwrap();
    let loss = model.loss(&tokens, &targets, cu_seqlens, None).unwrap().objective;
    let plain = Plain::of(&twin).loss(&tokens, &targets, cu_seqlens).unwrap();
    let mut wrong = vec![];
    let mut check = |name: &str, e: f64| {
        if e.is_nan() || e > bound {
            wrong.push(format!("{name}: {e:.2e}"));
        }
    };
    check("loss", error(&loss.detach(), &plain.detach()));
    let (ours, theirs) = (loss.backward().unwrap(), plain.backward().unwrap());
    for (p, q) in model.params().iter().zip(twin.params()) {
        let g = ours.get(&p.tensor).unwrap_or_else(|| panic!("{} got no gradient", p.name));
        check(&p.name, error(g, theirs.get(&q.tensor).unwrap()));
    }
    assert!(wrong.is_empty(), "further than {bound:e} from the plain model:\n{}", wrong.join("\n"));
}

const ACTIVATIONS: [GateActivation; 4] = [GateActivation::Sigmoid, GateActivation::Silu, GateActivation::NsSigmoid, GateActivation::Identity];

/// `plain` with a gate of every kind at one of five places, put there by `set`.
fn gates(plain: &ModelConfig, set: impl Fn(&mut ModelConfig, AttentionGate), granularities: &[GateGranularity], shared: &[bool]) {
    for granularity in granularities {
        for activation in ACTIVATIONS {
            for (op, input) in [(GateOp::Multiply, true), (GateOp::Add, true), (GateOp::Multiply, false), (GateOp::Add, false)] {
                for shared in shared {
                    let mut c = plain.clone();
                    set(&mut c, AttentionGate { granularity: *granularity, activation, op, shared: *shared, input });
                    compare(&c, DType::F64, 2, 19, None, 1e-9);
                }
            }
        }
    }
}
const BOTH: [GateGranularity; 2] = [GateGranularity::Headwise, GateGranularity::Elementwise];

fn without_gate() -> ModelConfig {
    ModelConfig { attention_gate: AttentionGate::none(), ..config() }
}

#[test]
fn every_attention_gate() {
    compare(&without_gate(), DType::F64, 2, 19, None, 1e-9);
    gates(&config(), |c, g| c.attention_gate = g, &BOTH, &[false, true]);
}

#[test]
fn every_attention_gate_in_a_dense_model() {
    let plain = ModelConfig { num_experts: 0, ..config() };
    gates(&plain, |c, g| c.attention_gate = g, &BOTH, &[false, true]);
}

#[test]
fn every_value_gate() {
    gates(&config(), |c, g| c.value_gate = g, &BOTH, &[false, true]);
}

#[test]
fn every_key_and_query_gate() {
    // the norm of each head would undo what is head-wise, and a small epsilon leave next to nothing of what all heads share
    let plain = ModelConfig { qk_norm: QkNorm::Projection, rms_norm_eps: 0.01, ..config() };
    gates(&plain, |c, g| (c.key_gate, c.query_gate) = (g, g), &BOTH, &[false, true]);
    gates(&without_gate(), |c, g| c.key_gate = g, &[GateGranularity::Elementwise], &[false]);
}

#[test]
fn every_dense_gate() {
    gates(&config(), |c, g| c.dense_gate = g, &[GateGranularity::Elementwise], &[false]);
}

#[test]
fn gates_with_norms_and_each_other() {
    let gate = AttentionGate::default();
    let shared = AttentionGate { shared: true, ..gate };
    let head = AttentionGate { granularity: GateGranularity::Headwise, ..gate };
    let all = ModelConfig { value_gate: head, key_gate: gate, query_gate: gate, dense_gate: gate, attention_bias: true, ..config() };
    let choices = [
        ModelConfig { sdpa_norm: true, ..without_gate() },
        ModelConfig { sdpa_silu: true, ..without_gate() },
        ModelConfig { sdpa_norm: true, attention_gate: head, ..config() },
        ModelConfig { sdpa_norm: true, sdpa_silu: true, attention_gate: shared, zero_centered_norms: false, ..config() },
        ModelConfig { value_gate: shared, ..config() },
        ModelConfig { switch_heads: SwitchHeads { experts: 1, top_k: 1, keys: false }, ..config() },
        ModelConfig { switch_heads: SwitchHeads { experts: 4, top_k: 2, keys: false }, attention_bias: true, ..config() },
        ModelConfig { switch_heads: SwitchHeads { experts: 3, top_k: 1, keys: true }, ..without_gate() },
        ModelConfig { switch_heads: SwitchHeads { experts: 3, top_k: 3, keys: true }, ..all.clone() },
        ModelConfig { sandwich_norm: true, ..config() },
        ModelConfig { sandwich_norm: true, num_experts: 0, zero_centered_norms: false, ..all.clone() },
        all,
    ];
    for c in choices {
        compare(&c, DType::F64, 2, 19, None, 1e-9);
        let cu = Tensor::from_vec([0i64, 7, 8, 19], &[4]).unwrap();
        compare(&c, DType::F64, 1, 19, Some(&cu), 1e-9);
    }
}

#[test]
fn every_other_choice() {
    let choices = [
        ModelConfig { output_gate_type: OutputGate::Sigmoid, ..config() },
        ModelConfig { linear_allow_neg_eigval: true, ..config() },
        ModelConfig { tie_word_embeddings: true, ..config() },
        ModelConfig { norm_topk_prob: false, num_experts_per_tok: 1, ..config() },
        ModelConfig { shared_expert_intermediate_size: 0, ..config() },
        ModelConfig { num_experts: 0, ..config() },
        ModelConfig { partial_rotary_factor: 0.0, ..config() },
        ModelConfig { partial_rotary_factor: 1.0, linear_conv_kernel_dim: 2, ..config() },
        ModelConfig { attention_bias: true, zero_centered_norms: false, ..config() },
        ModelConfig { qk_norm: QkNorm::None, post_norm: vec![LayerType::LinearAttention], linear_norm_eps: 1e-3, ..config() },
        ModelConfig {
            qk_norm: QkNorm::Projection,
            post_norm: vec![LayerType::FullAttention, LayerType::SlidingAttention],
            partial_rotary_factor: 0.0,
            ..config()
        },
        ModelConfig { layer_types: vec![], full_attention_interval: 2, decoder_sparse_step: 2, ..config() },
        ModelConfig { layer_types: vec![LayerType::DeltaNet; 4], linear_allow_neg_eigval: true, ..config() },
        ModelConfig { layer_types: vec![LayerType::Mamba2; 4], ..mamba() },
        ModelConfig { mamba_n_groups: 3, mamba_use_conv_bias: false, mamba_time_step_limit: [0.5, 0.9], ..mamba() },
        ModelConfig { num_experts: 0, mlp_only_layers: vec![], intermediate_size: 0, zero_centered_norms: false, ..mamba() },
    ];
    for c in choices {
        compare(&c, DType::F64, 2, 19, None, 1e-9);
    }
}

#[test]
fn packed_documents_across_chunks() {
    let cu = Tensor::from_vec([0i64, 1, 66, 66, 140], &[5]).unwrap();
    compare(&config(), DType::F64, 1, 140, Some(&cu), 1e-9);
    compare(&mamba(), DType::F64, 1, 140, Some(&cu), 1e-9);
}

#[test]
fn in_f32_within_its_rounding() {
    // through four layers the plain model itself, computed in f32, is up to 7e-6 off (A_log, a sum that cancels); the decoder 1.4e-5
    compare(&config(), DType::F32, 2, 75, None, 3e-5);
}
