//! Every gate and norm of softmax attention (2505.06708, tables 1 to 4), and the family of the delta rule (2412.06464, table 1): gradients by central differences, decoding, files, counts, taps, a device.

use engine::{DType, Tensor, no_grad, rng};
use nn::{
    AttentionGate, Caches, Decoder, GateActivation, GateGranularity, GateOp, GatePosition, Generator, LayerType, ModelConfig, ModelType, Observer,
    Placement, QkNorm, SwitchHeads,
};

fn base() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        hidden_size: 6,
        num_hidden_layers: 2,
        layer_types: vec![LayerType::FullAttention, LayerType::SlidingAttention],
        sliding_window: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        attention_gate: AttentionGate::none(),
        num_experts: 3,
        num_experts_per_tok: 2,
        moe_intermediate_size: 4,
        shared_expert_intermediate_size: 0,
        intermediate_size: 5,
        router_aux_loss_coef: 0.01,
        initializer_range: 0.5,
        ..Default::default()
    }
}

/// Every variant, by a name.
fn variants() -> Vec<(String, ModelConfig)> {
    let gate = AttentionGate::default();
    let headwise = AttentionGate { granularity: GateGranularity::Headwise, ..gate };
    let add = AttentionGate { op: GateOp::Add, activation: GateActivation::Silu, ..gate };
    let of = |activation| AttentionGate { activation, ..gate };
    let forms = [
        ("elementwise", gate),
        ("headwise", headwise),
        ("shared", AttentionGate { shared: true, ..gate }),
        ("additive silu", add),
        ("additive identity", AttentionGate { activation: GateActivation::Identity, ..add }),
        ("additive shared", AttentionGate { shared: true, ..add }),
        ("additive headwise", AttentionGate { granularity: GateGranularity::Headwise, ..add }),
        ("silu", of(GateActivation::Silu)),
        ("ns-sigmoid", of(GateActivation::NsSigmoid)),
        ("identity", of(GateActivation::Identity)),
        ("table", AttentionGate { input: false, ..gate }),
        ("table headwise", AttentionGate { input: false, ..headwise }),
        ("table shared", AttentionGate { input: false, shared: true, ..gate }),
        ("headwise shared", AttentionGate { shared: true, ..headwise }),
    ];
    let mut all = vec![("none".to_string(), base())];
    for at in GatePosition::ALL {
        for (name, form) in forms {
            let headwise = form.granularity == GateGranularity::Headwise;
            if at == GatePosition::Dense && (headwise || form.shared) {
                continue;
            }
            let mut c = set(base(), at, form);
            if matches!(at, GatePosition::Key | GatePosition::Query) && headwise {
                c.qk_norm = QkNorm::Projection;
            }
            all.push((format!("{} {name}", at.key()), c));
        }
    }
    for (name, linear_decay, linear_erase) in [("linear attention", false, false), ("decay alone", true, false), ("erasure alone", false, true)] {
        let layer_types = vec![LayerType::LinearAttention; 2];
        all.push((name.into(), ModelConfig { linear_decay, linear_erase, layer_types, ..delta() }));
    }
    let two = set(set(base(), GatePosition::Attention, gate), GatePosition::Value, headwise);
    let five = GatePosition::ALL.into_iter().fold(base(), |c, at| set(c, at, gate));
    all.extend([
        ("switch_heads".into(), ModelConfig { switch_heads: SwitchHeads { experts: 1, top_k: 1, keys: false }, ..base() }),
        ("switch_heads of values".into(), ModelConfig { switch_heads: SwitchHeads { experts: 3, top_k: 2, keys: false }, ..two.clone() }),
        (
            "switch_heads of keys".into(),
            ModelConfig { switch_heads: SwitchHeads { experts: 3, top_k: 3, keys: true }, attention_bias: true, ..base() },
        ),
        ("sdpa_norm".into(), ModelConfig { sdpa_norm: true, ..base() }),
        ("sdpa_silu".into(), ModelConfig { sdpa_silu: true, ..base() }),
        ("sdpa_norm, gate".into(), ModelConfig { sdpa_norm: true, zero_centered_norms: false, ..two.clone() }),
        ("sdpa_norm, sdpa_silu, gate".into(), ModelConfig { sdpa_norm: true, sdpa_silu: true, ..set(base(), GatePosition::Attention, forms[2].1) }),
        (
            "sandwich_norm".into(),
            ModelConfig { sandwich_norm: true, layer_types: vec![LayerType::LinearAttention, LayerType::FullAttention], ..delta() },
        ),
        ("two gates".into(), two),
        ("five gates".into(), ModelConfig { attention_bias: true, ..five }),
    ]);
    all
}

fn delta() -> ModelConfig {
    let heads = (1, 2, 4, 3);
    let (linear_num_key_heads, linear_num_value_heads, linear_key_head_dim, linear_value_head_dim) = heads;
    ModelConfig { linear_num_key_heads, linear_num_value_heads, linear_key_head_dim, linear_value_head_dim, ..base() }
}

fn set(mut c: ModelConfig, at: GatePosition, gate: AttentionGate) -> ModelConfig {
    *match at {
        GatePosition::Attention => &mut c.attention_gate,
        GatePosition::Value => &mut c.value_gate,
        GatePosition::Key => &mut c.key_gate,
        GatePosition::Query => &mut c.query_gate,
        GatePosition::Dense => &mut c.dense_gate,
    } = gate;
    c
}

/// A model whose tables and norms are not what they start as.
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
fn models_of_one_seed_begin_alike_where_they_have_the_same_parts() {
    let plain = Decoder::new(&base(), 5, DType::F64).unwrap();
    let gates = ModelConfig {
        attention_gate: AttentionGate::default(),
        value_gate: AttentionGate { granularity: GateGranularity::Headwise, ..AttentionGate::default() },
        ..base()
    };
    let gated = Decoder::new(&gates, 5, DType::F64).unwrap();
    let (mut same, d) = (0, base().head_dim);
    for p in plain.params() {
        let theirs = &gated.params().iter().find(|q| q.name == p.name).unwrap().tensor;
        let theirs = if p.name.ends_with("q_proj.weight") {
            // the rows of the queries, without those of their gates
            let heads = theirs.reshape(&[4, 2 * d, 6]).unwrap();
            heads.narrow(1, 0, d).unwrap().reshape(&[4 * d, 6]).unwrap()
        } else {
            theirs.clone()
        };
        assert_eq!(p.tensor.to_vec::<f64>().unwrap(), theirs.to_vec::<f64>().unwrap(), "{}", p.name);
        same += 1;
    }
    assert!(same > 10 && gated.params().len() > same);
    // and no two parameters, nor two parts of one, the same numbers
    let of = |m: &Decoder| m.params().iter().filter(|p| p.tensor.rank() > 1).map(|p| p.tensor.to_vec::<f64>().unwrap()[0]).collect::<Vec<_>>();
    let mut first = of(&gated);
    first.sort_by(f64::total_cmp);
    first.dedup();
    assert_eq!(first.len(), of(&gated).len());
    let other = Decoder::new(&base(), 6, DType::F64).unwrap();
    assert_ne!(of(&plain), of(&other));
}

#[test]
fn one_expert_is_a_headwise_gate_on_the_values() {
    let headwise = AttentionGate { granularity: GateGranularity::Headwise, ..AttentionGate::default() };
    let gated = Decoder::new(&ModelConfig { value_gate: headwise, ..base() }, 3, DType::F64).unwrap();
    let c = ModelConfig { switch_heads: SwitchHeads { experts: 1, top_k: 1, keys: false }, ..base() };
    let switched = Decoder::new(&c, 3, DType::F64).unwrap();
    for p in switched.params() {
        let name = p.name.replace("switch_router", "value_gate");
        p.tensor.assign(&gated.params().iter().find(|q| q.name == name).unwrap().tensor.detach()).unwrap();
    }
    let of = |m: &Decoder| m.loss(&tokens(2, 9), &targets(18), None, None).unwrap().objective.item().unwrap();
    assert!((of(&gated) - of(&switched)).abs() < 1e-14);
}

#[test]
fn a_token_chooses_the_likeliest_experts_of_each_head() {
    let c = ModelConfig { switch_heads: SwitchHeads { experts: 5, top_k: 2, keys: true }, ..base() };
    let m = Decoder::new(&c, 3, DType::F64).unwrap();
    let mut seen = Keep(&["0.attn.hook_switch_logits", "0.attn.hook_switch"], Default::default());
    m.loss(&tokens(2, 9), &targets(18), None, Some(&mut seen)).unwrap();
    let [weights, logits] = &seen.1.values().map(|t| t.to_vec::<f64>().unwrap()).collect::<Vec<_>>()[..] else { panic!("two taps") };
    assert_eq!(logits.len(), 2 * 9 * c.num_key_value_heads * 5);
    for (l, w) in logits.chunks(5).zip(weights.chunks(5)) {
        let mut order: Vec<usize> = (0..5).collect();
        order.sort_by(|a, b| l[*b].total_cmp(&l[*a]));
        for (rank, i) in order.into_iter().enumerate() {
            let want = if rank < 2 { 1.0 / (1.0 + (-l[i]).exp()) } else { 0.0 };
            assert!((w[i] - want).abs() < 1e-12, "{l:?} {w:?}");
        }
    }
}

#[test]
fn every_gradient_is_that_of_central_differences() {
    for (name, c) in variants() {
        for c in [ModelConfig { num_experts: 0, ..c.clone() }, c] {
            let m = model(&c, &wide());
            let (x, y) = (tokens(2, 5), targets(10));
            let loss = || m.loss(&x, &y, None, None).unwrap().objective;
            let grads = loss().backward().unwrap();
            for p in m.params() {
                let g = grads.get(&p.tensor).unwrap_or_else(|| panic!("{name}: {} got no gradient", p.name)).to_vec::<f64>().unwrap();
                let base = p.tensor.to_vec::<f64>().unwrap();
                for i in [0, base.len() / 2, base.len() - 1] {
                    let at = |d: f64| {
                        let mut v = base.clone();
                        v[i] += d;
                        p.tensor.assign(&Tensor::from_vec(v, p.tensor.shape()).unwrap()).unwrap();
                        no_grad(loss).item().unwrap()
                    };
                    // short, as keys near zero bend the loss: with 1e-5, what is cut off is 2e-6 of one
                    let n = (at(2e-6) - at(-2e-6)) / 4e-6;
                    at(0.0);
                    assert!((g[i] - n).abs() <= 1e-6 * n.abs().max(1.0), "{name}, {} experts: {} [{i}]: {} against {n}", c.num_experts, p.name, g[i]);
                }
            }
        }
    }
}

#[test]
fn decoding_is_the_parallel_forward() {
    for (name, c) in variants() {
        let m = model(&c, &wide());
        let logits = |ids: &[u32]| {
            let x = Tensor::from_vec(ids, &[1, ids.len()]).unwrap();
            let h = no_grad(|| m.forward(&x, None, None, None)).unwrap().0;
            no_grad(|| m.logits(&h.reshape(&[ids.len(), 6]).unwrap())).unwrap().to_vec::<f64>().unwrap()
        };
        let at = |all: &[f64], t: usize| all[t * 11..(t + 1) * 11].to_vec();
        // a prompt, of which only the last position goes through all of the last layer, then token by token, two texts side by side
        let texts = [ids(12, 2), ids(15, 3)];
        let want = texts.each_ref().map(|t| logits(t));
        let read = |i: usize, n: usize| {
            let mut g = Generator::new(&m);
            close(&name, &g.feed(&texts[i][..n]).unwrap(), &at(&want[i], n - 1), 1e-9);
            g.into_caches()
        };
        let mut both = Generator::on(&m, Caches::join(vec![read(0, 5), read(1, 8)]).unwrap());
        for t in 0..7 {
            let step = both.step(&[texts[0][5 + t], texts[1][8 + t]]).unwrap();
            for (i, from) in [5, 8].into_iter().enumerate() {
                close(&name, &step[i], &at(&want[i], from + t), 1e-9);
            }
        }
        // packed documents do not see each other
        let packed = Tensor::from_vec(texts.concat(), &[1, 27]).unwrap();
        let cu = Tensor::from_vec([0i64, 12, 27], &[3]).unwrap();
        let h = no_grad(|| m.forward(&packed, Some(&cu), None, None)).unwrap().0;
        let all = no_grad(|| m.logits(&h.reshape(&[27, 6]).unwrap())).unwrap().to_vec::<f64>().unwrap();
        close(&name, &all, &want.concat(), 1e-9);
    }
}

#[test]
fn files_hold_every_variant() {
    let dir = std::env::temp_dir().join(format!("tidegate-nn-gates-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    for (name, c) in variants() {
        for model_type in [ModelType::Auto, ModelType::Tidegate] {
            let c = ModelConfig { model_type, ..c.clone() };
            let m = model(&c, &Placement::cpu(DType::F32));
            assert_eq!(m.params().iter().map(|p| p.tensor.numel()).sum::<usize>(), c.parameters().0, "{name}");
            m.save(&dir).unwrap();
            let back = Decoder::open(&dir).unwrap();
            assert_eq!(back.config(), &ModelConfig { model_type: ModelType::Tidegate, ..c.clone() }, "{name}");
            for (a, b) in m.params().iter().zip(back.params()) {
                assert_eq!((&a.name, a.tensor.to_vec::<f32>().unwrap()), (&b.name, b.tensor.to_vec::<f32>().unwrap()), "{name}");
            }
            let loss = |m: &Decoder| m.loss(&tokens(1, 7), &targets(7), None, None).unwrap().objective.item().unwrap();
            assert_eq!(loss(&m), loss(&back), "{name}");
            let e = ModelConfig { model_type: ModelType::Qwen3Next, ..c.clone() }.validate().unwrap_err().to_string();
            assert!(e.contains("tidegate"), "{e}");
        }
        // what is not there is named: a file without the gates for a model that has them
        if let Some(p) = model(&c, &wide()).params().iter().find(|p| p.name.contains("_gate.")) {
            model(&base(), &Placement::cpu(DType::F32)).save(&dir).unwrap();
            let e = model(&c, &Placement::cpu(DType::F32)).load(&dir).unwrap_err().to_string();
            assert!(e.contains(&p.name) && e.contains("missing"), "{name}: {e}");
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn an_input_independent_gate_starts_at_half() {
    let table = AttentionGate { input: false, ..Default::default() };
    let c = GatePosition::ALL.into_iter().fold(base(), |c, at| set(c, at, table));
    let m = Decoder::new(&c, 3, DType::F64).unwrap();
    let tables: Vec<_> = m.params().iter().filter(|p| p.name.contains(".layers.0.") && p.name.ends_with(".table")).collect();
    let of = |name: &str, shape: &[usize]| (format!("model.layers.0.self_attn.{name}.table"), shape.to_vec());
    let found: Vec<_> = tables.iter().map(|p| (p.name.clone(), p.tensor.shape().to_vec())).collect();
    let (q, kv) = ([4, 4], [2, 4]);
    assert_eq!(found, [of("attention_gate", &q), of("value_gate", &kv), of("key_gate", &kv), of("query_gate", &q), of("dense_gate", &[6])]);
    assert!(tables.iter().all(|p| p.tensor.to_vec::<f64>().unwrap().iter().all(|x| *x == 0.0)));
    let mut seen = 0;
    let mut see = |name: &str, t: &Tensor| {
        if name.ends_with("_gate") {
            seen += 1;
            assert!(t.to_vec::<f64>()?.iter().all(|g| *g == 0.5), "{name}");
        }
        Ok(None)
    };
    m.forward(&tokens(2, 5), None, None, Some(&mut see)).unwrap();
    assert_eq!(seen, 2 * 5);
}

/// Keeps what ends in one of some names.
struct Keep<'a>(&'a [&'a str], std::collections::BTreeMap<String, Tensor>);
impl Observer for Keep<'_> {
    fn wants(&self, name: &str) -> bool {
        self.0.iter().any(|n| name.ends_with(n))
    }
    fn see(&mut self, name: &str, value: &Tensor) -> engine::Result<Option<Tensor>> {
        self.1.insert(name.into(), value.detach());
        Ok(None)
    }
}

#[test]
fn the_output_is_what_was_before_the_gate_with_the_gate_on_it() {
    for (name, c) in variants().into_iter().filter(|(_, c)| c.attention_gate.is_some()) {
        let m = model(&c, &wide());
        let mut keep = Keep(&["attn.hook_z_pre_gate", "attn.hook_gate", "attn.hook_z"], Default::default());
        no_grad(|| m.forward(&tokens(2, 5), None, None, Some(&mut keep))).unwrap();
        for layer in 0..2 {
            let of = |hook: &str| keep.1[&format!("blocks.{layer}.attn.hook_{hook}")].clone();
            let gate = of("gate");
            let gate = if gate.rank() == 3 { gate.unsqueeze(3).unwrap() } else { gate };
            let (before, after) = (of("z_pre_gate"), of("z"));
            let want = if c.attention_gate.op == GateOp::Add { before.add(&gate) } else { before.mul(&gate) }.unwrap();
            close(&name, &after.to_vec::<f64>().unwrap(), &want.to_vec::<f64>().unwrap(), 1e-12);
            assert_ne!(before.to_vec::<f64>().unwrap(), after.to_vec::<f64>().unwrap(), "{name}");
            // heads that share a score show the same
            if c.attention_gate.shared {
                let gate = gate.to_vec::<f64>().unwrap();
                let d = gate.len() / (2 * 5 * 4);
                assert!(gate.chunks(4 * d).all(|token| token.chunks(d).all(|head| head == &token[..d])), "{name}");
            }
        }
    }
}

#[test]
fn halves_compute_what_f32_does_within_their_digits() {
    for (name, c) in variants().into_iter().filter(|(n, _)| n.contains("gates") || n.contains("shared") || n.contains("table") || n.contains("sdpa"))
    {
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
fn a_step_on_a_gpu_or_its_emulator_is_the_cpus() {
    let gpu = cuda::device(0).inspect_err(|e| eprintln!("nothing runs on a GPU: {e}"));
    let Ok(device) = gpu.or_else(|_| cuda::emulator()) else { return println!("SKIPPED: the emulator needs a host C++ compiler") };
    let chosen = [
        "attention_gate shared",
        "attention_gate table",
        "attention_gate table headwise",
        "five gates",
        "sdpa_norm, sdpa_silu, gate",
        "value_gate headwise",
        "switch_heads of values",
    ];
    let all: Vec<_> = variants().into_iter().filter(|(n, _)| chosen.contains(&n.as_str())).collect();
    assert_eq!(all.len(), chosen.len());
    for (name, c) in all {
        let c = ModelConfig {
            head_dim: 32,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            hidden_size: 16,
            sandwich_norm: true,
            initializer_range: 0.2,
            ..c
        };
        let (x, y) = (tokens(1, 9), targets(9));
        let cpu = model(&c, &Placement::cpu(DType::F32));
        let full = cpu.loss(&x, &y, None, None).unwrap().objective;
        let want = full.backward().unwrap();
        let gpu = model(&c, &Placement { device: device.clone(), ..Placement::cpu(DType::F32) });
        let loss = gpu.loss(&x.to_device(&device).unwrap(), &y.to_device(&device).unwrap(), None, None).unwrap().objective;
        assert!((loss.item().unwrap() - full.item().unwrap()).abs() < 1e-5, "{name}");
        let grads = loss.backward().unwrap();
        for (p, q) in gpu.params().iter().zip(cpu.params()) {
            let of = |g: &engine::Grads, t: &Tensor| g.get(t).unwrap().to_vec::<f64>().unwrap();
            close(&format!("{name}: {}", p.name), &of(&grads, &p.tensor), &of(&want, &q.tensor), 1e-4);
        }
    }
}

#[test]
fn what_is_composed_is_named_and_measured() {
    let names = |c: &ModelConfig| c.composed();
    let gate = AttentionGate::default();
    let fused = set(base(), GatePosition::Attention, gate);
    for c in [&base(), &fused, &set(base(), GatePosition::Attention, AttentionGate { input: false, ..gate })] {
        assert!(names(c).is_empty());
        assert!(nn::composed_slowdown(c, &Placement::cpu(DType::F32), 1, 8).is_err());
    }
    assert_eq!(names(&set(base(), GatePosition::Attention, AttentionGate { shared: true, ..gate })), ["attention_gate"]);
    assert_eq!(names(&set(fused.clone(), GatePosition::Value, gate)), ["value_gate"]);
    assert_eq!(names(&ModelConfig { sdpa_norm: true, ..fused.clone() }), ["attention_gate", "sdpa_norm"]);
    assert!(names(&ModelConfig { layer_types: vec![LayerType::LinearAttention; 2], sdpa_norm: true, ..delta() }).is_empty());
    // five element-wise gates of five products each can't be free
    let five = ModelConfig { hidden_size: 64, head_dim: 16, ..GatePosition::ALL.into_iter().fold(base(), |c, at| set(c, at, gate)) };
    let times = nn::composed_slowdown(&five, &Placement::cpu(DType::F32), 2, 64).unwrap();
    assert!(times.is_finite() && times > 1.0, "{times}");
}
