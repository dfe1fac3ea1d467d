//! The whole model: gradients by central differences, decoding, packing, files.

use engine::{DType, Tensor, no_grad, rng};
use nn::{AttentionGate, Decoder, GateGranularity, Generator, LayerType, ModelConfig, Placement, QkNorm, Sampler};

fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        hidden_size: 6,
        num_hidden_layers: 3,
        layer_types: vec![LayerType::LinearAttention, LayerType::FullAttention, LayerType::SlidingAttention],
        sliding_window: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        linear_num_key_heads: 1,
        linear_num_value_heads: 2,
        linear_key_head_dim: 4,
        linear_value_head_dim: 3,
        num_experts: 3,
        num_experts_per_tok: 2,
        moe_intermediate_size: 4,
        shared_expert_intermediate_size: 5,
        mlp_only_layers: vec![2],
        intermediate_size: 4,
        router_aux_loss_coef: 0.01,
        router_z_loss_coef: 0.01,
        initializer_range: 0.5,
        ..Default::default()
    }
}
/// As other families have norms, rotation and biases.
fn otherwise() -> ModelConfig {
    ModelConfig {
        post_norm: vec![LayerType::FullAttention],
        qk_norm: QkNorm::Projection,
        attention_bias: true,
        partial_rotary_factor: 0.0,
        linear_norm_eps: 1e-2,
        zero_centered_norms: false,
        ..tiny()
    }
}
fn tokens(b: usize, t: usize) -> Tensor {
    let v: Vec<u32> = rng::uniform(5, 0, b * t).into_iter().map(|u| (u * 11.0) as u32).collect();
    Tensor::from_vec(v, &[b, t]).unwrap()
}
fn targets(n: usize) -> Tensor {
    let v: Vec<i64> = rng::uniform(6, 0, n).into_iter().map(|u| (u * 11.0) as i64).collect();
    Tensor::from_vec(v, &[n]).unwrap()
}
fn close(a: &[f64], b: &[f64], tol: f64) {
    let d: f64 = a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum();
    let r: f64 = b.iter().map(|y| y * y).sum();
    assert!(a.len() == b.len() && (d / r).sqrt() <= tol, "{}", (d / r).sqrt());
}

#[test]
fn every_parameters_gradient_is_that_of_the_loss() {
    for granularity in [GateGranularity::Elementwise, GateGranularity::Headwise, GateGranularity::None] {
        // the other forms of norms and biases go along with one gate each
        let (qk_norm, post_norm) = match granularity {
            GateGranularity::Elementwise => (QkNorm::Head, vec![]),
            GateGranularity::Headwise => (QkNorm::Projection, vec![LayerType::FullAttention, LayerType::LinearAttention]),
            GateGranularity::None => (QkNorm::None, vec![LayerType::SlidingAttention]),
        };
        let attention_bias = !post_norm.is_empty();
        let attention_gate = AttentionGate { granularity, ..Default::default() };
        let c = ModelConfig { attention_gate, qk_norm, post_norm, attention_bias, linear_norm_eps: 1e-2, ..tiny() };
        let m = Decoder::new(&c, 3, DType::F64).unwrap();
        let (x, y) = (tokens(2, 5), targets(10));
        let loss = || m.loss(&x, &y, None, None).unwrap().objective;
        let grads = loss().backward().unwrap();
        for p in m.params() {
            let g = grads.get(&p.tensor).unwrap_or_else(|| panic!("{} got no gradient", p.name)).to_vec::<f64>().unwrap();
            let base = p.tensor.to_vec::<f64>().unwrap();
            for i in [0, base.len() / 2, base.len() - 1] {
                let at = |d: f64| {
                    let mut v = base.clone();
                    v[i] += d;
                    p.tensor.assign(&Tensor::from_vec(v, p.tensor.shape()).unwrap()).unwrap();
                    no_grad(loss).item().unwrap()
                };
                let n = (at(1e-5) - at(-1e-5)) / 2e-5;
                at(0.0);
                assert!((g[i] - n).abs() <= 1e-6 * n.abs().max(1.0), "{} [{i}]: {} against {n}", p.name, g[i]);
            }
        }
    }
}

#[test]
fn a_text_without_end_is_begun() {
    let m = Decoder::new(&tiny(), 3, DType::F64).unwrap();
    let how = Sampler { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
    let mut n = 0;
    let stop = |_| {
        n += 1;
        assert!(n < 3, "enough");
    };
    let endless = std::panic::AssertUnwindSafe(|| Generator::new(&m).generate(&[1], usize::MAX, &how, stop));
    assert_eq!(std::panic::catch_unwind(endless).unwrap_err().downcast_ref::<&str>(), Some(&"enough"));
    assert_eq!(n, 3);
}

#[test]
fn decoding_token_by_token_is_the_parallel_forward() {
    decodes(&tiny());
    decodes(&otherwise());
}

fn decodes(c: &ModelConfig) {
    let m = Decoder::new(c, 3, DType::F64).unwrap();
    let x = tokens(1, 70);
    let (h, _) = no_grad(|| m.forward(&x, None, None, None)).unwrap();
    let want = no_grad(|| m.logits(&h.reshape(&[70, 6]).unwrap())).unwrap().to_vec::<f64>().unwrap();
    let mut g = Generator::new(&m);
    let ids = x.to_vec::<u32>().unwrap();
    close(&g.feed(&ids[..9]).unwrap(), &want[8 * 11..9 * 11], 1e-9);
    for t in 9..70 {
        close(&g.feed(&ids[t..=t]).unwrap(), &want[t * 11..(t + 1) * 11], 1e-9);
    }
    let how = Sampler { temperature: 0.9, top_k: 5, top_p: 0.9, seed: 4 };
    let write = || Generator::new(&m).generate(&[1, 2], 20, &how, |_| {}).unwrap();
    assert_eq!(write(), write());
    assert!(Generator::new(&m).feed(&[]).is_err());
}

#[test]
fn packed_documents_do_not_see_each_other() {
    let m = Decoder::new(&tiny(), 3, DType::F64).unwrap();
    let x = tokens(1, 80);
    let cu = Tensor::from_vec([0i64, 5, 70, 80], &[4]).unwrap();
    let packed = no_grad(|| m.forward(&x, Some(&cu), None, None)).unwrap().0;
    for (a, n) in [(0, 5), (5, 65), (70, 10)] {
        let alone = no_grad(|| m.forward(&x.narrow(1, a, n).unwrap(), None, None, None)).unwrap().0;
        close(&packed.narrow(1, a, n).unwrap().to_vec::<f64>().unwrap(), &alone.to_vec::<f64>().unwrap(), 1e-12);
    }
}

#[test]
fn files_go_both_ways_and_bad_ones_are_refused() {
    let dir = std::env::temp_dir().join(format!("tidegate-nn-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let m = Decoder::new(&tiny(), 3, DType::F32).unwrap();
    m.save(&dir).unwrap();
    let mut back = Decoder::open(&dir).unwrap();
    for (a, b) in m.params().iter().zip(back.params()) {
        assert_eq!((&a.name, a.tensor.to_vec::<f32>().unwrap()), (&b.name, b.tensor.to_vec::<f32>().unwrap()));
    }
    let file = dir.join("model.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let text = String::from_utf8_lossy(&whole);
    assert!(text.contains("model.layers.0.mlp.experts.2.up_proj.weight") && text.contains("model.layers.0.linear_attn.A_log"));
    for bad in [&whole[..whole.len() / 2], &whole[..4], &[255u8; 64][..], b""] {
        std::fs::write(&file, bad).unwrap();
        let e = Decoder::open(&dir).err().unwrap().to_string();
        assert!(e.contains("model.safetensors"), "{e}");
    }
    // a header of the right form that lies about the data
    let n = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let header = String::from_utf8(whole[8..8 + n].to_vec()).unwrap();
    let embed = header.find("embed_tokens").unwrap();
    let (at, end) = (embed + header[embed..].find("data_offsets").unwrap(), embed + header[embed..].find('}').unwrap());
    let lie = |from: &str, to: &str| format!("{}{}", &header[..embed], header[embed..].replacen(from, to, 1));
    let offsets = &header[at..end];
    for lying in [
        lie("[11,6]", "[11,7]"),
        lie("[11,6]", "[18446744073709551615,6]"),
        lie("[11,6]", "[-11,6]"),
        lie("\"F32\"", "\"F64\""),
        lie("\"F32\"", "\"I32\""),
        lie("\"F32\"", "\"F31\""),
        lie(offsets, "data_offsets\":[0,18446744073709551615]"),
        lie(offsets, "data_offsets\":[264,0]"),
        lie("embed_tokens", "norm"),
        header.replacen("embed_tokens", "embed_token", 1),
        header.replacen('{', "[", 1),
    ] {
        assert_ne!(lying, header);
        let bytes = [&(lying.len() as u64).to_le_bytes()[..], lying.as_bytes(), &whole[8 + n..]].concat();
        std::fs::write(&file, bytes).unwrap();
        let before = back.params()[0].tensor.to_vec::<f32>().unwrap();
        let e = back.load(&dir).unwrap_err().to_string();
        assert!(e.contains("model.safetensors"), "{e}");
        assert_eq!(back.params()[0].tensor.to_vec::<f32>().unwrap(), before);
    }
    for length in [0u64, 1, n as u64 - 1, n as u64 + 1, u64::MAX, 1 << 40] {
        std::fs::write(&file, [&length.to_le_bytes(), &whole[8..]].concat()).unwrap();
        assert!(back.load(&dir).is_err(), "header length {length}");
    }
    std::fs::write(&file, &whole).unwrap();
    let mut other = Decoder::new(&ModelConfig { vocab_size: 12, ..tiny() }, 0, DType::F32).unwrap();
    let e = other.load(&dir).unwrap_err().to_string();
    assert!(e.contains("embed_tokens") && e.contains("[11, 6]") && e.contains("[12, 6]"), "{e}");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn shards_are_read_and_bad_indices_refused() {
    let dir = std::env::temp_dir().join(format!("tidegate-nn-shards-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    let m = Decoder::new(&tiny(), 3, DType::F32).unwrap();
    m.save(&dir).unwrap();
    let whole = std::fs::read(dir.join("model.safetensors")).unwrap();
    let all = safetensors::SafeTensors::deserialize(&whole).unwrap().tensors();
    let name = |i: usize| format!("model-{:05}-of-00002.safetensors", i % 2 + 1);
    let index: serde_json::Map<String, serde_json::Value> = all.iter().enumerate().map(|(i, (n, _))| (n.clone(), name(i).into())).collect();
    for shard in 0..2 {
        let part = all.iter().enumerate().filter(|(i, _)| i % 2 == shard).map(|(_, t)| t.clone());
        safetensors::serialize_to_file(part, None, &dir.join(name(shard))).unwrap();
    }
    let write = |index: &serde_json::Map<String, serde_json::Value>| {
        std::fs::write(dir.join("model.safetensors.index.json"), serde_json::json!({"metadata": {}, "weight_map": index}).to_string()).unwrap();
    };
    let error = || Decoder::open(&dir).err().unwrap().to_string();
    std::fs::remove_file(dir.join("model.safetensors")).unwrap();
    assert!(error().contains("model.safetensors"), "{}", error());
    write(&index);
    let back = Decoder::open(&dir).unwrap();
    for (a, b) in m.params().iter().zip(back.params()) {
        assert_eq!((&a.name, a.tensor.to_vec::<f32>().unwrap()), (&b.name, b.tensor.to_vec::<f32>().unwrap()));
    }
    for (shard, says) in
        [("model-9.safetensors", "model-9.safetensors"), ("../x.safetensors", "beside its index"), ("/etc/passwd", "beside its index")]
    {
        let mut bad = index.clone();
        bad.insert("lm_head.weight".into(), shard.into());
        write(&bad);
        assert!(error().contains(says), "{}", error());
    }
    write(&index);
    std::fs::write(dir.join(name(1)), &whole[..100]).unwrap();
    assert!(error().contains("model-00002-of-00002.safetensors"), "{}", error());
    std::fs::copy(dir.join(name(0)), dir.join(name(1))).unwrap();
    assert!(error().contains("in two files"), "{}", error());
    std::fs::write(dir.join("model.safetensors.index.json"), "{}").unwrap();
    assert!(error().contains("index.json"), "{}", error());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn draws_follow_temperature_top_k_and_top_p() {
    // probabilities 0.1, 0.5, 0.15, 0.25
    let logits = [0.1f64.ln(), 0.5f64.ln(), 0.15f64.ln(), 0.25f64.ln()];
    let shares = |temperature: f64, top_k: usize, top_p: f64| {
        let how = Sampler { temperature, top_k, top_p, seed: 7 };
        let mut n = [0.0; 4];
        (0..20_000).for_each(|i| n[how.draw(&logits, i)] += 1.0 / 20_000.0);
        n
    };
    let near = |got: [f64; 4], want: [f64; 4]| {
        // three standard deviations of a share of 20,000 draws are at most 0.011
        assert!(got.iter().zip(want).all(|(g, w)| if w == 0.0 { *g == 0.0 } else { (g - w).abs() < 0.011 }), "{got:?} against {want:?}");
    };
    near(shares(1.0, 0, 1.0), [0.1, 0.5, 0.15, 0.25]);
    near(shares(0.0, 0, 1.0), [0.0, 1.0, 0.0, 0.0]);
    near(shares(1.0, 1, 1.0), [0.0, 1.0, 0.0, 0.0]);
    near(shares(1.0, 2, 1.0), [0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0]);
    near(shares(1.0, 0, 0.7), [0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0]);
    near(shares(1.0, 0, 0.8), [0.0, 5.0 / 9.0, 1.5 / 9.0, 2.5 / 9.0]);
    near(shares(1.0, 3, 0.6), [0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0]);
    near(shares(1.0, 0, 0.0), [0.0, 1.0, 0.0, 0.0]);
    let squared = 0.1f64.powi(2) + 0.5f64.powi(2) + 0.15f64.powi(2) + 0.25f64.powi(2);
    near(shares(0.5, 0, 1.0), [0.01 / squared, 0.25 / squared, 0.0225 / squared, 0.0625 / squared]);
    assert_eq!(Sampler { temperature: 1.0, top_k: 9, top_p: 1.0, seed: 1 }.draw(&[2.5], 3), 0);
}

#[test]
fn halves_compute_what_f32_does_within_their_digits() {
    // every expert is chosen: which of them, a rounding could decide
    let c = ModelConfig { initializer_range: 0.2, num_experts_per_tok: 3, ..tiny() };
    let wide = Decoder::new(&c, 3, DType::F32).unwrap();
    let (x, y) = (tokens(2, 40), targets(80));
    let full = wide.loss(&x, &y, None, None).unwrap().objective;
    let want = full.backward().unwrap();
    let mut errors: Vec<f64> = vec![];
    for compute in [DType::BF16, DType::F16] {
        let half = Decoder::on(&c, 3, &Placement { compute, ..Placement::cpu(DType::F32) }).unwrap();
        let loss = half.loss(&x, &y, None, None).unwrap().objective;
        assert_eq!(loss.dtype(), DType::F32);
        let off = loss.item().unwrap() - full.item().unwrap();
        assert!(off != 0.0 && off.abs() < 0.01, "{compute}: {off}");
        let grads = loss.backward().unwrap();
        let (mut d, mut n) = (0.0, 0.0);
        for (p, q) in half.params().iter().zip(wide.params()) {
            let g = grads.get(&p.tensor).unwrap_or_else(|| panic!("{} got no gradient", p.name));
            assert_eq!((p.tensor.dtype(), g.dtype()), (DType::F32, DType::F32), "{}", p.name);
            for (a, b) in g.to_vec::<f32>().unwrap().iter().zip(want.get(&q.tensor).unwrap().to_vec::<f32>().unwrap()) {
                (d, n) = (d + f64::from(a - b).powi(2), n + f64::from(b).powi(2));
            }
        }
        println!("{compute}: loss off by {off:.1e}, gradient by {:.1e}", (d / n).sqrt());
        errors.push((d / n).sqrt());
    }
    // f16 keeps three bits more: if rounding is all that there is, its error is an eighth
    assert!(errors[1] < 0.01 && (4.0..16.0).contains(&(errors[0] / errors[1])), "{errors:?}");
    for (params, compute) in [(DType::F16, DType::F16), (DType::F64, DType::F32), (DType::F32, DType::F64), (DType::BF16, DType::F32)] {
        let e = Decoder::on(&c, 3, &Placement { params, compute, ..Placement::cpu(DType::F32) }).err().unwrap().to_string();
        assert!(e.contains(&format!("found {}", if params == DType::F16 { params } else { compute })), "{e}");
    }
}

/// On the CPU, and on a GPU or its emulator; a prompt of more rows than are multiplied without packing, and tokens decoded behind it.
#[test]
fn matrices_kept_in_bf16_compute_what_f32_ones_do() {
    let gpu = cuda::device(0).or_else(|_| cuda::emulator()).inspect_err(|e| eprintln!("SKIPPED but on the CPU: {e}"));
    let tied = ModelConfig { tie_word_embeddings: true, ..tiny() };
    for device in [engine::Device::cpu()].into_iter().chain(gpu) {
        for c in [tiny(), otherwise(), tied.clone()] {
            let c = ModelConfig { head_dim: 32, num_attention_heads: 2, num_key_value_heads: 1, hidden_size: 16, initializer_range: 0.2, ..c };
            let logits = |params| {
                let m = Decoder::on(&c, 3, &Placement { device: device.clone(), params, compute: DType::BF16 }).unwrap();
                let (mut g, mut all) = (Generator::new(&m), vec![]);
                let x = tokens(1, 14).to_vec::<u32>().unwrap();
                no_grad(|| {
                    all.extend(g.feed(&x[..12]).unwrap());
                    x[12..].iter().for_each(|t| all.extend(g.feed(&[*t]).unwrap()));
                });
                let kept: usize = m.params().iter().map(|p| p.tensor.numel() * p.tensor.dtype().size()).sum();
                assert!(
                    m.params().iter().all(|p| p.tensor.dtype() == DType::F32 || params == DType::BF16 && p.tensor.rank() > 1),
                    "vectors stay in f32"
                );
                (all.into_iter().map(f64::to_bits).collect::<Vec<_>>(), kept as f64 / m.config().parameters().0 as f64)
            };
            let ((wide, four), (narrow, two)) = (logits(DType::F32), logits(DType::BF16));
            assert_eq!(wide, narrow, "{}", device.name());
            assert!(four == 4.0 && two < 2.5, "{four} and {two} bytes a parameter");
        }
    }
}

#[test]
fn a_step_on_a_gpu_or_its_emulator_is_the_cpus() {
    let gpu = cuda::device(0).inspect_err(|e| eprintln!("nothing runs on a GPU: {e}"));
    let Ok(device) = gpu.or_else(|_| cuda::emulator()) else { return println!("SKIPPED: the emulator needs a host C++ compiler") };
    for c in [tiny(), otherwise()] {
        steps_alike(&ModelConfig { head_dim: 32, num_attention_heads: 2, num_key_value_heads: 1, hidden_size: 16, ..c }, &device);
    }
}

fn steps_alike(c: &ModelConfig, device: &engine::Device) {
    let (x, y) = (tokens(1, 9), targets(9));
    let cpu = Decoder::new(c, 3, DType::F32).unwrap();
    let full = cpu.loss(&x, &y, None, None).unwrap().objective;
    let want = full.backward().unwrap();
    let gpu = Decoder::on(c, 3, &Placement { device: device.clone(), ..Placement::cpu(DType::F32) }).unwrap();
    let loss = gpu.loss(&x.to_device(device).unwrap(), &y.to_device(device).unwrap(), None, None).unwrap().objective;
    assert!((loss.item().unwrap() - full.item().unwrap()).abs() < 1e-5);
    let grads = loss.backward().unwrap();
    for (p, q) in gpu.params().iter().zip(cpu.params()) {
        let (a, b) = (grads.get(&p.tensor).unwrap().to_vec::<f64>().unwrap(), want.get(&q.tensor).unwrap().to_vec::<f64>().unwrap());
        let (d, n) = a.iter().zip(&b).fold((0.0, 0.0), |(d, n), (a, b)| (d + (a - b).powi(2), n + b * b));
        assert!((d / n).sqrt() < 1e-4, "{}: {:.1e}", p.name, (d / n).sqrt());
    }
}

#[test]
fn taps_show_gates_and_states() {
    let m = Decoder::new(&tiny(), 3, DType::F32).unwrap();
    let mut seen = std::collections::BTreeMap::new();
    let mut see = |name: &str, t: &Tensor| {
        seen.insert(name.to_string(), (t.shape().to_vec(), t.to_vec::<f32>()?));
        Ok(None)
    };
    m.forward(&tokens(2, 5), None, None, Some(&mut see)).unwrap();
    assert_eq!(seen["blocks.0.attn.hook_state"].0, [2, 2, 4, 3]);
    assert_eq!(seen["blocks.0.attn.hook_gate"].0, [2, 5, 1, 2, 3]);
    assert_eq!(seen["blocks.1.attn.hook_gate"].0, [2, 5, 4, 4]);
    assert!(seen["blocks.1.attn.hook_gate"].1.iter().all(|g| (0.0..=1.0).contains(g)));
    // SiLU's least value is −0.2785
    let silu = &seen["blocks.0.attn.hook_gate"].1;
    assert!(silu.iter().all(|g| *g > -0.279) && silu.iter().any(|g| *g < 0.0));
}

#[test]
fn counts_are_those_of_the_parameters() {
    for tie in [false, true] {
        for c in [tiny(), otherwise()] {
            let c = ModelConfig { tie_word_embeddings: tie, ..c };
            let m = Decoder::new(&c, 0, DType::F32).unwrap();
            assert_eq!(m.params().iter().map(|p| p.tensor.numel()).sum::<usize>(), c.parameters().0);
        }
    }
}
