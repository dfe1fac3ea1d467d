//! The mixers that carry a state, and what they are without a part (2412.06464, table S.1): gradients by central differences, decoding, files, counts, a device.

use engine::{DType, Tensor, no_grad, rng};
use nn::{Caches, Decoder, Generator, LayerType, LinearActivation, LinearQkNorm, ModelConfig, ModelType, Placement};

fn base() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        hidden_size: 6,
        num_hidden_layers: 2,
        layer_types: vec![LayerType::LinearAttention; 2],
        sliding_window: 3,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        linear_num_key_heads: 1,
        linear_num_value_heads: 2,
        linear_key_head_dim: 4,
        linear_value_head_dim: 3,
        mamba_num_heads: 4,
        mamba_head_dim: 3,
        mamba_state_size: 5,
        num_experts: 0,
        intermediate_size: 5,
        initializer_range: 0.5,
        zero_centered_norms: false,
        ..Default::default()
    }
}

/// Every variant, by a name.
fn variants() -> Vec<(&'static str, ModelConfig)> {
    use LayerType::{DeltaNet, LinearAttention, Mamba2, SlidingAttention};
    let of = |kind: LayerType| ModelConfig { layer_types: vec![kind; 2], ..base() };
    let (delta, mamba) = (of(DeltaNet), of(Mamba2));
    let h2 = [Mamba2, LinearAttention, SlidingAttention];
    vec![
        ("delta_net", delta.clone()),
        ("delta_net, whatever the switches say", ModelConfig { linear_erase: false, linear_decay: false, ..delta.clone() }),
        ("delta_net, beta up to 2", ModelConfig { linear_allow_neg_eigval: true, ..delta.clone() }),
        ("mamba2", mamba.clone()),
        ("mamba2 in groups", ModelConfig { mamba_n_groups: 2, ..mamba.clone() }),
        ("mamba2 without bias, within limits", ModelConfig { mamba_use_conv_bias: false, mamba_time_step_limit: [0.3, 0.9], ..mamba.clone() }),
        ("mamba2 alone", ModelConfig { intermediate_size: 0, zero_centered_norms: true, ..mamba.clone() }),
        ("mixers alone", ModelConfig { intermediate_size: 0, layer_types: vec![DeltaNet, SlidingAttention], sandwich_norm: true, ..base() }),
        ("H2", ModelConfig { num_hidden_layers: 3, layer_types: h2.to_vec(), num_experts: 3, num_experts_per_tok: 2, ..base() }),
        ("no short convolution", ModelConfig { linear_short_conv: false, ..base() }),
        ("no output gate", ModelConfig { linear_output_gate: false, ..base() }),
        ("no output norm", ModelConfig { linear_output_norm: false, ..base() }),
        ("no output gate nor norm", ModelConfig { linear_output_gate: false, linear_output_norm: false, ..delta.clone() }),
        ("no qk norm", ModelConfig { linear_qk_norm: LinearQkNorm::None, ..base() }),
        ("l1, relu", ModelConfig { linear_qk_norm: LinearQkNorm::L1, linear_qk_activation: LinearActivation::Relu, ..base() }),
        ("l1, silu", ModelConfig { linear_qk_norm: LinearQkNorm::L1, ..delta.clone() }),
        ("l2, 1 + elu", ModelConfig { linear_qk_activation: LinearActivation::Elu1, ..base() }),
        ("l2, identity", ModelConfig { linear_qk_activation: LinearActivation::Identity, ..base() }),
        (
            "nothing but the rule",
            ModelConfig {
                linear_short_conv: false,
                linear_output_gate: false,
                linear_output_norm: false,
                linear_qk_activation: LinearActivation::Elu1,
                linear_qk_norm: LinearQkNorm::L1,
                ..delta
            },
        ),
    ]
}

/// A model whose norms and biases are not what they start as.
fn model(c: &ModelConfig, place: &Placement) -> Decoder {
    let m = Decoder::on(c, 3, place).unwrap();
    for (i, p) in m.params().iter().enumerate() {
        let noise = Tensor::randn(p.tensor.shape(), DType::F64, &engine::Device::cpu(), 9, i as u64).unwrap().affine(0.2, 0.0).unwrap();
        let moved = p.tensor.detach().to_device(noise.device()).unwrap().cast(DType::F64).unwrap().add(&noise).unwrap();
        p.tensor.assign(&moved.cast(place.params).unwrap().to_device(&place.device).unwrap()).unwrap();
    }
    m
}
fn wide() -> Placement {
    Placement::cpu(DType::F64)
}
fn ids(n: usize, stream: u64) -> Vec<u32> {
    rng::uniform(5, stream, n).into_iter().map(|u| (u * 11.0) as u32).collect()
}
fn tokens(b: usize, t: usize) -> Tensor {
    Tensor::from_vec(ids(b * t, 0), &[b, t]).unwrap()
}
fn targets(n: usize) -> Tensor {
    Tensor::from_vec(ids(n, 1).into_iter().map(i64::from).collect::<Vec<_>>(), &[n]).unwrap()
}
fn close(what: &str, a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    let (d, n) = a.iter().zip(b).fold((0.0, 0.0), |(d, n), (x, y)| (d + (x - y).powi(2), n + y * y));
    assert!(d.sqrt() <= tolerance * n.sqrt().max(1e-3), "{what}: off by {:.1e} of {:.1e}", d.sqrt(), n.sqrt());
}

#[test]
fn every_gradient_is_that_of_central_differences() {
    for (name, c) in variants() {
        let m = model(&c, &wide());
        let (x, y) = (tokens(2, 5), targets(10));
        let loss = || m.loss(&x, &y, None, None).unwrap().objective;
        let grads = loss().backward().unwrap();
        for p in m.params() {
            let g = grads.get(&p.tensor).unwrap_or_else(|| panic!("{name}: {} got no gradient", p.name)).to_vec::<f64>().unwrap();
            let base = p.tensor.to_vec::<f64>().unwrap();
            for i in [0, base.len() / 3, base.len() / 2, base.len() - 1] {
                let at = |d: f64| {
                    let mut v = base.clone();
                    v[i] += d;
                    p.tensor.assign(&Tensor::from_vec(v, p.tensor.shape()).unwrap()).unwrap();
                    no_grad(loss).item().unwrap()
                };
                let n = (at(2e-6) - at(-2e-6)) / 4e-6;
                at(0.0);
                assert!((g[i] - n).abs() <= 1e-6 * n.abs().max(1.0), "{name}: {} [{i}]: {} against {n}", p.name, g[i]);
            }
        }
    }
}

#[test]
fn decoding_is_the_parallel_forward_and_packed_is_apart() {
    for (name, c) in variants() {
        let m = model(&c, &wide());
        let logits = |ids: &[u32]| {
            let x = Tensor::from_vec(ids, &[1, ids.len()]).unwrap();
            let h = no_grad(|| m.forward(&x, None, None, None)).unwrap().0;
            no_grad(|| m.logits(&h.reshape(&[ids.len(), 6]).unwrap())).unwrap().to_vec::<f64>().unwrap()
        };
        let at = |all: &[f64], t: usize| all[t * 11..(t + 1) * 11].to_vec();
        let texts = [ids(12, 2), ids(75, 3)];
        let want = texts.each_ref().map(|t| logits(t));
        // a prompt in two pieces, then token by token, two texts side by side, of which one is let go
        let read = |i: usize, n: usize| {
            let mut g = Generator::new(&m);
            g.feed(&texts[i][..2]).unwrap();
            close(name, &g.feed(&texts[i][2..n]).unwrap(), &at(&want[i], n - 1), 1e-9);
            g.into_caches()
        };
        let mut caches = Caches::join(vec![read(0, 5), read(1, 68)]).unwrap();
        for t in 0..3 {
            let mut both = Generator::on(&m, caches);
            let step = both.step(&[texts[0][5 + t], texts[1][68 + t]]).unwrap();
            close(name, &step[0], &at(&want[0], 5 + t), 1e-9);
            close(name, &step[1], &at(&want[1], 68 + t), 1e-9);
            caches = both.into_caches();
        }
        caches.keep(&[1]).unwrap();
        close(name, &Generator::on(&m, caches).step(&[texts[1][71]]).unwrap()[0], &at(&want[1], 71), 1e-9);
        let packed = Tensor::from_vec(texts.concat(), &[1, 87]).unwrap();
        let cu = Tensor::from_vec([0i64, 12, 87], &[3]).unwrap();
        let h = no_grad(|| m.forward(&packed, Some(&cu), None, None)).unwrap().0;
        let all = no_grad(|| m.logits(&h.reshape(&[87, 6]).unwrap())).unwrap().to_vec::<f64>().unwrap();
        close(name, &all, &want.concat(), 1e-9);
    }
}

#[test]
fn files_hold_every_variant() {
    let dir = std::env::temp_dir().join(format!("tidegate-nn-mixers-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (name, c) in variants() {
        let m = model(&c, &Placement::cpu(DType::F32));
        assert_eq!(m.params().iter().map(|p| p.tensor.numel()).sum::<usize>(), c.parameters().0, "{name}");
        m.save(&dir).unwrap();
        let back = Decoder::open(&dir).unwrap();
        let model_type = c.saved_type().unwrap();
        assert_eq!(back.config(), &ModelConfig { model_type, ..c.clone() }, "{name}");
        for (a, b) in m.params().iter().zip(back.params()) {
            assert_eq!((&a.name, a.tensor.to_vec::<f32>().unwrap()), (&b.name, b.tensor.to_vec::<f32>().unwrap()), "{name}");
        }
        assert_eq!(model_type, ModelType::Tidegate, "{name}");
        for posing in [ModelType::Qwen3Next, ModelType::Mamba2] {
            let e = ModelConfig { model_type: posing, ..c.clone() }.validate().unwrap_err().to_string();
            assert!(e.contains("tidegate"), "{name}: {e}");
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_mamba2_is_saved_under_transformers_names() {
    let dir = std::env::temp_dir().join(format!("tidegate-nn-mamba2-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let plain = ModelConfig {
        layer_types: vec![],
        layer_pattern: vec![LayerType::Mamba2],
        intermediate_size: 0,
        num_attention_heads: 16,
        head_dim: 256,
        ..base()
    };
    for limit in [[0.0, f64::MAX], [0.001, 0.5]] {
        let c = ModelConfig { mamba_n_groups: 2, mamba_time_step_limit: limit, ..plain.clone() };
        assert_eq!(c.saved_type().unwrap(), ModelType::Mamba2);
        let m = model(&c, &Placement::cpu(DType::F32));
        m.save(&dir).unwrap();
        let text = std::fs::read_to_string(dir.join("config.json")).unwrap();
        let back = Decoder::open(&dir).unwrap();
        assert_eq!((back.config().mamba_time_step_limit, back.config().model_type, back.config().mamba_n_groups), (limit, ModelType::Mamba2, 2));
        assert_eq!(text.contains("Infinity"), limit[1] == f64::MAX, "{text}");
        for (a, b) in m.params().iter().zip(back.params()) {
            assert_eq!((&a.name, a.tensor.to_vec::<f32>().unwrap()), (&b.name, b.tensor.to_vec::<f32>().unwrap()));
        }
        let names: Vec<String> = m.named_as_in(&dir, |p| Ok(p.tensor.clone())).unwrap().into_iter().map(|(name, _)| name).collect();
        let want = [
            "backbone.embeddings.weight",
            "backbone.layers.1.mixer.A_log",
            "backbone.layers.0.norm.weight",
            "backbone.norm_f.weight",
            "lm_head.weight",
        ];
        assert!(want.iter().all(|n| names.contains(&n.to_string())) && !names.iter().any(|n| n.starts_with("model.")), "{names:?}");
        // as Python writes it, which is no JSON
        std::fs::write(dir.join("config.json"), text.replace("{\n      \"__float__\": \"Infinity\"\n    }", "Infinity")).unwrap();
        assert_eq!(Decoder::open(&dir).unwrap().config().mamba_time_step_limit, limit);
    }
    // a model that adds something keeps its type, and cannot pose
    let more = ModelConfig { intermediate_size: 4, ..plain };
    assert_eq!(more.saved_type().unwrap(), ModelType::Tidegate);
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_step_on_a_gpu_or_its_emulator_is_the_cpus() {
    let gpu = cuda::device(0).inspect_err(|e| eprintln!("nothing runs on a GPU: {e}"));
    let Ok(device) = gpu.or_else(|_| cuda::emulator()) else { return println!("SKIPPED: the emulator needs a host C++ compiler") };
    let chosen = ["delta_net", "mamba2", "mamba2 in groups", "mamba2 without bias, within limits", "H2", "l1, relu", "nothing but the rule"];
    let all: Vec<_> = variants().into_iter().filter(|(n, _)| chosen.contains(n)).collect();
    assert_eq!(all.len(), chosen.len());
    for (name, c) in all {
        let c = ModelConfig { head_dim: 32, hidden_size: 16, initializer_range: 0.2, ..c };
        let (x, y) = (tokens(1, 40), targets(40));
        let cpu = model(&c, &Placement::cpu(DType::F32));
        let full = cpu.loss(&x, &y, None, None).unwrap().objective;
        let want = full.backward().unwrap();
        let gpu = model(&c, &Placement { device: device.clone(), ..Placement::cpu(DType::F32) });
        let loss = gpu.loss(&x.to_device(&device).unwrap(), &y.to_device(&device).unwrap(), None, None).unwrap().objective;
        assert!((loss.item().unwrap() - full.item().unwrap()).abs() < 1e-5, "{name}");
        let grads = loss.backward().unwrap();
        for (p, q) in gpu.params().iter().zip(cpu.params()) {
            let of = |g: &engine::Grads, t: &Tensor| g.get(t).unwrap().to_vec::<f64>().unwrap();
            close(&format!("{name}: {}", p.name), &of(&grads, &p.tensor), &of(&want, &q.tensor), 2e-4);
        }
    }
}

#[test]
fn halves_compute_what_f32_does_within_their_digits() {
    for (name, c) in variants() {
        let c = ModelConfig { initializer_range: 0.2, ..c };
        let full = model(&c, &Placement::cpu(DType::F32)).loss(&tokens(2, 40), &targets(80), None, None).unwrap().objective;
        let half = model(&c, &Placement { compute: DType::BF16, ..Placement::cpu(DType::F32) });
        let loss = half.loss(&tokens(2, 40), &targets(80), None, None).unwrap().objective;
        assert!((loss.item().unwrap() - full.item().unwrap()).abs() < 0.02, "{name}: {} {}", loss.item().unwrap(), full.item().unwrap());
        let grads = loss.backward().unwrap();
        assert!(half.params().iter().all(|p| grads.get(&p.tensor).is_some_and(|g| g.dtype() == DType::F32)), "{name}");
    }
}

#[test]
fn what_is_composed_is_named_and_measured() {
    let of = |name: &str| variants().into_iter().find(|v| v.0 == name).unwrap().1;
    for (name, want) in [
        ("delta_net", &[][..]),
        ("no short convolution", &[]),
        ("no output gate", &[]),
        ("no output norm", &["linear_output_norm"]),
        ("no qk norm", &[]),
        ("l1, relu", &["linear_qk_activation", "linear_qk_norm"]),
        ("l2, identity", &[]),
        ("mamba2", &["mamba_use_conv_bias"]),
        ("mamba2 without bias, within limits", &[]),
        ("H2", &["mamba_use_conv_bias"]),
    ] {
        let c = of(name);
        assert_eq!(c.composed(), want, "{name}");
        let times = nn::composed_slowdown(&c, &Placement::cpu(DType::F32), 2, 64);
        assert_eq!(times.is_ok(), !want.is_empty(), "{name}");
        assert!(times.is_err() || times.is_ok_and(|t| t.is_finite() && t > 0.0), "{name}");
    }
}
