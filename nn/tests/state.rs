//! What a model remembers, on disk: going on is as if it had never stopped, and files that are not this model's are refused.

use engine::{DType, Device};
use nn::tensor_file::TensorFile;
use nn::{AttentionGate, CHUNK, Caches, Decoder, GateGranularity, Generator, LayerType, ModelConfig, Placement, RopeScaling, RopeType, State};
use std::path::{Path, PathBuf};

/// All mixers; the window is shorter than the texts.
fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        hidden_size: 8,
        num_hidden_layers: 3,
        layer_types: vec![LayerType::LinearAttention, LayerType::FullAttention, LayerType::SlidingAttention],
        sliding_window: 5,
        attention_gate: AttentionGate { granularity: GateGranularity::Headwise, ..Default::default() },
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        max_position_embeddings: 64,
        rope_scaling: RopeScaling { rope_type: RopeType::Linear, factor: Some(2.0), ..Default::default() },
        linear_num_key_heads: 1,
        linear_num_value_heads: 2,
        linear_key_head_dim: 4,
        linear_value_head_dim: 3,
        num_experts: 0,
        intermediate_size: 12,
        initializer_range: 0.3,
        ..Default::default()
    }
}

fn model(config: &ModelConfig, seed: u64, params: DType, compute: DType) -> Decoder {
    Decoder::on(config, seed, &Placement { device: Device::cpu(), params, compute }).unwrap()
}

fn ids(n: usize) -> Vec<u32> {
    engine::rng::uniform(5, 1, n).iter().map(|x| (x * 11.0) as u32).collect()
}

fn file(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("state").join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    path
}

fn read(m: &Decoder, tokens: &[u32]) -> State {
    let mut g = Generator::new(m);
    let logits = g.feed(tokens).unwrap();
    State { tokens: tokens.to_vec(), logits, caches: g.into_caches() }
}

/// The logits' bits after each of some tokens.
fn on(m: &Decoder, caches: Caches, n: usize) -> Vec<Vec<u64>> {
    let mut g = Generator::on(m, caches);
    let bits = |l: Vec<f64>| l.into_iter().map(f64::to_bits).collect();
    (0..n as u32).map(|i| bits(g.feed(&[(i * 7 + 3) % 11]).unwrap())).collect()
}

#[test]
fn going_on_from_a_file_is_going_on() {
    for (params, compute) in [(DType::F32, DType::F32), (DType::F32, DType::BF16), (DType::F32, DType::F16), (DType::F64, DType::F64)] {
        // shorter than the window and the convolution, over the window, over pieces
        for n in [1, 2, 4, 5, 300, CHUNK + 70] {
            let m = model(&tiny(), 3, params, compute);
            let path = file(&format!("on-{n}-{compute}"));
            let state = read(&m, &ids(n));
            state.save(&path, &m).unwrap();
            let again = model(&tiny(), 3, params, compute);
            let back = State::load(&path, &again).unwrap();
            assert_eq!((&back.tokens, &back.logits, back.caches.lens()), (&state.tokens, &state.logits, &[n][..]));
            // a copy is not written into by what goes on from the other
            let copy = back.caches.copy().unwrap();
            let want = on(&m, state.caches, 300);
            assert!(on(&again, back.caches, 300) == want, "{compute} {n}");
            assert!(on(&again, copy, 300) == want, "{compute} {n}, copied");
        }
    }
}

#[test]
fn one_state_is_the_beginning_of_several_texts() {
    let m = model(&tiny(), 3, DType::F64, DType::F64);
    let path = file("several");
    read(&m, &ids(40)).save(&path, &m).unwrap();
    let state = State::load(&path, &m).unwrap();
    let mut three =
        Generator::on(&m, Caches::join(vec![state.caches.copy().unwrap(), state.caches.copy().unwrap(), state.caches.copy().unwrap()]).unwrap());
    let mut alone: Vec<Generator> = (0..3).map(|_| Generator::on(&m, state.caches.copy().unwrap())).collect();
    for i in 0..9u32 {
        let next = [i % 11, (i + 4) % 11, (3 * i) % 11];
        for ((l, g), t) in three.step(&next).unwrap().iter().zip(&mut alone).zip(next) {
            assert!(l.iter().zip(g.feed(&[t]).unwrap()).all(|(x, y)| (x - y).abs() < 1e-9));
        }
    }
}

/// Of a window, what later queries see; of a delta rule, as much as ever.
#[test]
fn only_full_attention_grows() {
    let m = model(&tiny(), 3, DType::F32, DType::F32);
    let path = file("size");
    for n in [3, 4, 40, CHUNK + 9] {
        read(&m, &ids(n)).save(&path, &m).unwrap();
        let file = TensorFile::open(&path).unwrap();
        let shape = |name: &str| file.tensors(&path).unwrap()[name].shape().to_vec();
        assert_eq!([shape("tokens"), shape("logits")], [vec![n], vec![11]]);
        assert_eq!([shape("layers.0.state"), shape("layers.0.conv_q")], [vec![1, 2, 4, 3], vec![1, 3, 4]]);
        assert_eq!([shape("layers.1.keys"), shape("layers.2.values")], [vec![1, n, 2, 4], vec![1, n.min(4), 2, 4]]);
    }
}

#[test]
fn files_that_are_not_this_models_are_refused() {
    let m = model(&tiny(), 3, DType::F32, DType::F32);
    let path = file("refused/state");
    let state = read(&m, &ids(40));
    state.save(&path, &m).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    state.save(&path, &m).unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes);
    let says = |m: &Decoder, words: &[&str]| {
        let e = State::load(&path, m).err().unwrap().to_string();
        assert!(words.iter().chain(&["refused"]).all(|w| e.contains(w)), "{e}");
    };
    says(&model(&tiny(), 4, DType::F32, DType::F32), &["another model", "weights"]);
    let turned = ModelConfig { rope_theta: 5e5, ..tiny() };
    says(&model(&turned, 3, DType::F32, DType::F32), &["another model", "`rope_theta` is 10000.0 there and 500000.0 here"]);
    says(&model(&tiny(), 3, DType::F32, DType::BF16), &["in f32", "computes in bf16"]);
    says(&model(&tiny(), 3, DType::BF16, DType::BF16), &["in f32", "computes in bf16"]);
    says(&model(&tiny(), 3, DType::F64, DType::F64), &["in f32", "computes in f64"]);

    let with = |bytes: &[u8], words: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        says(&m, words);
    };
    for cut in [0, 7, 100, bytes.len() - 1] {
        with(&bytes[..cut], &["no whole safetensors file"]);
    }
    let replaced = |old: &str, new: &str| {
        let at = bytes.windows(old.len()).position(|w| w == old.as_bytes()).unwrap();
        [&bytes[..at], new.as_bytes(), &bytes[at + old.len()..]].concat()
    };
    with(&replaced("\\\"format\\\":1", "\\\"format\\\":9"), &["format 9", "format 1 can be read"]);
    with(&replaced("tidegate.state", "tidegate.other"), &["no state of `generate --save-state`"]);
    with(&replaced("layers.0.conv_q", "layers.9.conv_q"), &["`layers.0.conv_q` is missing"]);
    let mut flipped = bytes.clone();
    let last = flipped.len() - 3;
    flipped[last] ^= 1;
    with(&flipped, &["damaged"]);
    // a checkpoint is no state
    let dir = file("refused/model");
    std::fs::create_dir_all(&dir).unwrap();
    m.save(&dir).unwrap();
    with(&std::fs::read(dir.join("model.safetensors")).unwrap(), &["no state of `generate --save-state`"]);
    std::fs::write(&path, &bytes).unwrap();
    State::load(&path, &m).unwrap();

    // what can't be written leaves what is there
    let two = State { tokens: ids(2), logits: vec![], caches: Caches::join(vec![read(&m, &[1, 2]).caches, read(&m, &[1, 2]).caches]).unwrap() };
    assert!(two.save(&path, &m).unwrap_err().to_string().contains("of one sequence"));
    let fewer = State { tokens: ids(39), ..read(&m, &ids(40)) };
    assert!(fewer.save(&path, &m).unwrap_err().to_string().contains("39 tokens"));
    assert!(state.save(&dir, &m).unwrap_err().to_string().contains("no name of a file"));
    assert!(state.save(&path.with_file_name("none").join("here"), &m).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    let staged = std::fs::read_dir(path.parent().unwrap()).unwrap().flatten().filter(|e| e.file_name().to_string_lossy().starts_with(".saving"));
    assert_eq!(staged.count(), 0);
}
