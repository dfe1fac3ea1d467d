//! Measures against what transformers computed (`tests/oracles/measures.py`), and `tidegate measure` as a person meets it.

use engine::{DType, Device};
use nn::{Decoder, Placement};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use train::data::{Corpus, write_shard};
use train::measure::{Measures, Options, measure};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/golden").join(name).canonicalize().unwrap()
}
fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
fn numbers(v: &Value) -> Vec<f64> {
    match v {
        Value::Array(a) => a.iter().flat_map(numbers).collect(),
        v => vec![v.as_f64().unwrap()],
    }
}
fn near(what: &str, ours: &[f64], theirs: &Value, within: f64) {
    let theirs = numbers(theirs);
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (x, y) in ours.iter().zip(&theirs) {
        assert!((x - y).abs() <= within * y.abs().max(1e-3), "{what}: {x} is not {y}\n{ours:?}\n{theirs:?}");
    }
}

/// The golden text as a shard.
fn text(g: &Value, dir: &Path, vocab: u32) -> PathBuf {
    let path = dir.join("text.bin");
    let tokens: Vec<u32> = numbers(&g["tokens"]).iter().map(|t| *t as u32).collect();
    write_shard(&path, &tokens, vocab, None).unwrap();
    path
}
fn both(m: &Measures, of: fn(&train::measure::AttentionLayer) -> &Vec<f64>) -> Vec<f64> {
    m.attention.as_ref().unwrap().layers.iter().flat_map(|l| of(l).clone()).collect()
}

#[test]
fn as_transformers_has_them() {
    let tmp = tempfile::tempdir().unwrap();
    for name in ["measures_next", "measures_qwen3"] {
        let g = json(&golden(name).join("measures.json"));
        let time = g["time"].as_u64().unwrap() as usize;
        for (dtype, within) in [(DType::F64, 1e-6), (DType::F32, 2e-3)] {
            let place = Placement { device: Device::cpu(), params: dtype, compute: dtype };
            let model = Decoder::open_on(&golden(name), &place).unwrap();
            let corpus = Corpus::open(&text(&g, tmp.path(), model.config().vocab_size as u32), None).unwrap();
            let m = measure(&model, &corpus, 0..corpus.len(), &Options::new(time)).unwrap();
            let near = |what: &str, ours: &[f64], theirs: &Value| near(&format!("{name}, {dtype}: {what}"), ours, theirs, within);
            assert_eq!(m.data.windows as u64, g["windows"].as_u64().unwrap());
            near("loss", &[m.loss], &g["loss"]);
            near("first token", &both(&m, |l| &l.first_token), &g["first_token"]);
            near("entropy", &both(&m, |l| &l.entropy), &g["entropy"]);
            near("largest score", &both(&m, |l| &l.max_score), &g["max_score"]);
            near("sinks", &both(&m, |l| &l.sink_rate), &g["sink_rate"]);
            let mean = |v: &Value| numbers(v).iter().sum::<f64>() / numbers(v).len() as f64;
            let a = m.attention.as_ref().unwrap();
            assert!((a.first_token - mean(&g["first_token"])).abs() < within && (a.sink_rate - mean(&g["sink_rate"])).abs() < 1e-9);
            assert!(a.sink_rate > 0.0 && a.sink_rate < 1.0, "an oracle that has none, or nothing else, would tell little");
            let a = m.activations.as_ref().unwrap();
            let of = |f: fn(&train::measure::ActivationLayer) -> f64| a.layers.iter().map(f).collect::<Vec<f64>>();
            near("largest", &of(|l| l.max), &g["max"]);
            near("median", &of(|l| l.median), &g["median"]);
            near("ratio", &of(|l| l.ratio), &g["ratio"]);
            let massive: Vec<Value> = a.layers.iter().map(|l| l.massive.into()).collect();
            assert_eq!(Value::Array(massive), g["massive"], "{name}");
            let peak = |l: &train::measure::ActivationLayer| {
                let p = &l.top[0];
                assert_eq!(p.token, 3, "the planted token");
                vec![p.window as f64, p.position as f64, p.channel as f64, p.value]
            };
            near("top", &a.layers.iter().flat_map(peak).collect::<Vec<f64>>(), &g["top"]);
            near("lens", &m.logit_lens, &g["lens"]);
            assert!((m.logit_lens.last().unwrap() - m.loss).abs() < 1e-6 * m.loss);
            near("rank", &m.value_output_rank.iter().flat_map(|r| r.heads.clone()).collect::<Vec<f64>>(), &g["ranks"]);
            near("stable rank", &m.value_output_rank.iter().flat_map(|r| r.stable.clone()).collect::<Vec<f64>>(), &g["stable"]);
            match (&a.spikes, &g["alignment"]) {
                (None, Value::Null) => assert_eq!(name, "measures_qwen3"),
                (s, alignment) => {
                    let s = s.as_ref().unwrap();
                    near("alignment", &[s.alignment.unwrap()], alignment);
                    near("retention", &[s.retention.unwrap()], &g["retention"]);
                }
            }
        }
    }
}

#[test]
fn recurrent_mixers_are_measured() {
    use nn::LayerType::{DeltaNet, LinearAttention, Mamba2, SlidingAttention};
    let tmp = tempfile::tempdir().unwrap();
    let path = tmp.path().join("text.bin");
    write_shard(&path, &(0..400u32).map(|i| i * i % 23).collect::<Vec<_>>(), 23, None).unwrap();
    let corpus = Corpus::open(&path, None).unwrap();
    let c = nn::ModelConfig {
        vocab_size: 23,
        hidden_size: 16,
        num_hidden_layers: 4,
        layer_pattern: vec![Mamba2, DeltaNet, LinearAttention, SlidingAttention],
        intermediate_size: 0,
        num_experts: 0,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 8,
        linear_num_key_heads: 1,
        linear_num_value_heads: 2,
        linear_key_head_dim: 6,
        linear_value_head_dim: 4,
        mamba_num_heads: 6,
        mamba_head_dim: 4,
        mamba_state_size: 5,
        mamba_n_groups: 2,
        ..Default::default()
    };
    let model = Decoder::new(&c, 1, DType::F32).unwrap();
    let m = measure(&model, &corpus, 0..corpus.len(), &Options::new(32)).unwrap();
    let mixers: Vec<&str> = m.layers.iter().map(|l| l.mixer.as_str()).collect();
    assert_eq!(mixers, ["mamba2", "delta_net", "linear_attention", "sliding_attention"]);
    let heads: Vec<_> = m.delta.iter().map(|d| (d.layer, d.half_life.len(), d.beta.len(), d.state_norm.len())).collect();
    assert_eq!(heads, [(0, 6, 6, 6), (1, 0, 2, 2), (2, 2, 2, 2)]);
    // Mamba2's first steps are short: half-lives of tokens to thousands, as its A and Δ say
    assert!(
        m.delta[0].half_life.iter().all(|t| (0.1..1e4).contains(t)) && m.delta[0].beta.iter().all(|b| (1e-4..0.2).contains(b)),
        "{:?}",
        m.delta[0]
    );
    assert!(m.table().contains("mamba2") && m.scalars().contains_key("half_life"));
    let known = Measures::keys(&c, &Options::new(32)).unwrap();
    assert!(m.scalars().keys().all(|k| known.contains(k)), "{:?} are not all of {known:?}", m.scalars());
    // of a model without a feed-forward and without softmax attention, too
    let alone = nn::ModelConfig { layer_pattern: vec![Mamba2], ..c };
    let m = measure(&Decoder::new(&alone, 1, DType::F32).unwrap(), &corpus, 0..corpus.len(), &Options::new(32)).unwrap();
    assert_eq!((m.delta.len(), m.attention.is_none()), (4, true));
}

fn tidegate(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).args(["--device", "cpu"]).current_dir(dir).output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
    let (out, err) = (text(stdout), text(stderr));
    assert!(!err.contains("panicked"), "{args:?}: {err}");
    (status.code().unwrap(), out, err)
}
fn done(dir: &Path, args: &[&str]) -> String {
    let (code, out, err) = tidegate(dir, args);
    assert_eq!(code, 0, "{args:?}: {err}");
    out
}

#[test]
fn a_run_is_measured() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    done(dir, &["train", "smoke", "--run-dir", "r", "--set", "train.steps=10"]);
    let printed = done(dir, &["measure", "r", "--tokens", "2000", "--trace-text", "Call me Ishmaël."]);
    let m = Measures::read(&dir.join("r/measures.json")).unwrap();
    assert!(m.checkpoint.contains("step-00000010") && m.step == Some(10), "{} {:?}", m.checkpoint, m.step);
    for said in ["first-token attention", "half-life", "gate: attention", "loss at", "lens", "measures.json"] {
        assert!(printed.contains(said), "{said}: {printed}");
    }
    let (layers, seq_len) = (m.layers.len(), m.data.seq_len);
    assert_eq!((m.data.windows, m.data.tokens as usize), (2000 / seq_len, 2000 / seq_len * seq_len));
    assert!((m.bits_per_byte.unwrap() - m.loss / std::f64::consts::LN_2).abs() < 1e-12);
    let kinds: Vec<&str> = m.gates.iter().map(|g| g.kind.as_str()).collect();
    for kind in ["attention", "delta_output", "beta", "shared_expert"] {
        assert!(kinds.contains(&kind), "{kinds:?}");
    }
    assert_eq!(m.gates.iter().filter(|g| g.kind == "attention").map(|g| g.mean).reduce(f64::max), m.gate_score);
    assert!(m.gates.iter().all(|g| g.histogram.counts.iter().sum::<u64>() > 0 && g.histogram.counts.len() == 50));
    assert_eq!((m.logit_lens.len(), m.router.len(), m.delta.len(), m.sdpa_output.len()), (layers, layers, layers - 1, 1));
    assert!(m.router.iter().all(|r| (r.load.iter().sum::<f64>() - 1.0).abs() < 1e-12));
    assert_eq!(m.loss_by_position.last().unwrap().to, 8 * seq_len);
    assert!(m.activations.as_ref().unwrap().spikes.is_some());
    // ë is two bytes: its character is at the second
    let t = m.trace.as_ref().unwrap();
    assert_eq!((t.tokens.concat().as_str(), t.tokens.len(), t.tokens[13].as_str(), t.tokens[14].as_str()), ("Call me Ishmaël.", 17, "", "ë"));
    assert!(t.loss[0].is_none() && t.loss[1..].iter().all(Option::is_some));
    assert!(t.series.len() == m.gates.len() && t.series.iter().all(|s| s.values.len() == 17 && s.heads.iter().all(|h| h.len() == 17)));
    let scalars = m.scalars();
    let config = nn::ModelConfig::from_json(json(&dir.join("r/checkpoints/step-00000010/config.json"))).unwrap();
    let known = Measures::keys(&config, &Options::new(seq_len)).unwrap();
    assert!(scalars.keys().all(|k| known.contains(k)), "{scalars:?} are not all of {known:?}");
    for key in ["loss", "bits_per_byte", "first_token", "sink_rate", "gate_score", "max_activation", "half_life", "state_rank", "router_dead"] {
        assert!(scalars.contains_key(key), "{key}");
    }
    // the whole held-out part has the loss that `eval` says; a checkpoint's own measures are none of the run's newest
    let whole = ["--seq-len", &seq_len.to_string(), "--tokens", "1000000", "--only", "router"];
    done(dir, &[&["measure", "r/checkpoints/step-00000010"], &whole[..]].concat());
    let m = Measures::read(&dir.join("measures.json")).unwrap();
    let eval = done(dir, &["eval", "r"]);
    let bits: f64 = eval.split_whitespace().nth(2).unwrap().parse().unwrap();
    assert!((m.bits_per_byte.unwrap() - bits).abs() < 2e-3, "{} {eval}", m.bits_per_byte.unwrap());
    assert!(m.attention.is_none() && m.gates.is_empty() && m.trace.is_none() && !m.router.is_empty());
}

#[test]
fn what_cannot_be_measured() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let g = json(&golden("measures_qwen3").join("measures.json"));
    text(&g, dir, 47);
    write_shard(&dir.join("other.bin"), &[46, 47, 46].repeat(100), 0, None).unwrap();
    std::fs::write(dir.join("text.txt"), "Call me Ishmael. ".repeat(100)).unwrap();
    let qwen = golden("measures_qwen3").display().to_string();
    let q = ["measure", qwen.as_str()];
    for (args, code, words) in [
        (&[&q[..], &["--data", "text.bin", "--seq-len", "64", "--only", "gates"]].concat(), 2, &["`gates`", "no gate"][..]),
        (&[&q[..], &["--data", "text.bin", "--seq-len", "64", "--only", "atention"]].concat(), 2, &["did you mean `attention`?"]),
        (&[&q[..], &["--data", "text.bin", "--seq-len", "64", "--only", "router,loss_by_position"]].concat(), 2, &["`router`", "no experts"]),
        (&[&q[..], &["--data", "text.bin"]].concat(), 1, &["text.bin", "too short", "384 tokens", "1024", "--seq-len"]),
        (&[&q[..], &["--data", "other.bin", "--seq-len", "64"]].concat(), 1, &["other.bin", "token 47", "vocabulary of 47"]),
        (&[&q[..], &["--data", "text.txt", "--seq-len", "64"]].concat(), 2, &["47 tokens", "not the 256 bytes", "tokenizer.json"]),
        (&[&q[..], &["--data", "nowhere.txt"]].concat(), 1, &["nowhere.txt"]),
        (&q.to_vec(), 2, &["run.json", "--data"]),
        (&[&q[..], &["--data", "text.bin", "--tokens", "0"]].concat(), 2, &["--tokens 0"]),
        (&[&q[..], &["--data", "text.bin", "--seq-len", "1"]].concat(), 2, &["at least 2"]),
        (&[&q[..], &["--data", "text.bin", "--out", "no/such/file"]].concat(), 2, &["--out no/such/file", "does not exist"]),
        (&[&q[..], &["--data", "text.bin", "--seq-len", "64", "--trace-text", "x"]].concat(), 2, &["tokenizer.json"]),
        (&[&q[..], &["--data", "text.bin", "--only", "attention", "--trace-text", "x"]].concat(), 2, &["--trace-text", "`trace`"]),
    ] {
        let args: Vec<&str> = args.to_vec();
        let (found, _, err) = tidegate(dir, &args);
        assert!(found == code && words.iter().all(|w| err.contains(w)), "{args:?}: {found} {err}");
    }
    assert!(!dir.join("measures.json").exists());
    // a model from elsewhere, with neither a run nor a tokenizer
    let printed = done(dir, &[&q[..], &["--data", "text.bin", "--seq-len", "64"]].concat());
    let m = Measures::read(&dir.join("measures.json")).unwrap();
    assert!(
        printed.contains("first-token attention") && m.step.is_none() && m.bits_per_byte.is_none() && m.gates.is_empty() && m.gate_score.is_none()
    );
    assert!(m.sdpa_output.iter().all(|s| s.before.is_none()) && m.trace.unwrap().tokens[0] == "[3]");
}
