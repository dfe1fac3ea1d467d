//! `tidegate trace` against what transformers computed, and its errors.

use nn::tensor_file::TensorFile;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Bounds on RMS(ours − theirs) / RMS(theirs), as in `nn/tests/oracles.rs`.
const VALUES: f64 = 1e-5;
const GRADIENTS: f64 = 1e-4;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/golden").join(name).canonicalize().unwrap()
}
fn tidegate(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).args(["--device", "cpu"]).current_dir(dir).output().unwrap()
}
fn trace(dir: &Path, args: &[&str]) -> Output {
    let o = tidegate(dir, &[&["trace"], args].concat());
    assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
    o
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f64>)>;

fn read(path: &Path) -> Tensors {
    let numbers = |v: &TensorView| match v.dtype() {
        Dtype::F32 => v.data().as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x).into()).collect(),
        Dtype::I64 => v.data().as_chunks::<8>().0.iter().map(|x| i64::from_le_bytes(*x) as f64).collect(),
        other => panic!("{other:?}"),
    };
    let file = TensorFile::open(path).unwrap();
    file.tensors(path).unwrap().iter().map(|(n, v)| (n.clone(), (v.shape().to_vec(), numbers(v)))).collect()
}
/// Integers, as an input has them.
fn write(path: &Path, tensors: &[(&str, &[usize], &[i64])]) {
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape, _), b)| (*name, TensorView::new(Dtype::I64, shape.to_vec(), b).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}
fn off(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let (d, n) = ours.iter().zip(theirs).fold((0.0, 0.0), |(d, n), (x, y)| (d + (x - y).powi(2), n + y * y));
    if d == 0.0 { 0.0 } else { (d / n).sqrt() }
}

/// Gradients as transformers has them in memory: experts fused, one convolution, no model around the text model.
fn fused(trace: &Tensors, name: &str) -> Vec<f64> {
    for (memory, file) in
        [("model.", "model.language_model."), ("input_layernorm", "attention_layer_norm"), ("post_attention_layernorm", "feedforward_layer_norm")]
    {
        if !trace.contains_key(name) && trace.contains_key(&name.replacen(memory, file, 1)) {
            return fused(trace, &name.replacen(memory, file, 1));
        }
    }
    if let Some(base) = name.strip_suffix("conv1d.weight").filter(|_| !trace.contains_key(name)) {
        return ["q", "k", "v"].iter().flat_map(|c| trace[&format!("{base}{c}_conv1d.weight")].1.clone()).collect();
    }
    if let Some((_, whole)) = trace.get(name) {
        return whole.clone();
    }
    let (base, kinds): (_, &[&str]) = match name.strip_suffix("gate_up_proj") {
        Some(base) => (base, &["gate_proj", "up_proj"]),
        None => (name.strip_suffix("down_proj").unwrap_or_else(|| panic!("no {name}")), &["down_proj"]),
    };
    let expert = |e: usize| kinds.iter().map(|k| trace.get(&format!("{base}{e}.{k}.weight"))).collect::<Option<Vec<_>>>();
    (0..).map_while(expert).flatten().flat_map(|t| t.1.clone()).collect()
}

#[test]
fn a_trace_is_what_transformers_computes() {
    let next = ["next_d32", "next_d128_shards", "qwen3_tied", "qwen3_moe"];
    let more =
        ["qwen3_5_d32", "qwen3_5_images_d64", "qwen3_5_moe_d256", "olmo_hybrid_d32", "olmo_hybrid_d64", "gated_head_d128", "gated_elements_d64"];
    for name in next.into_iter().chain(more) {
        let tmp = tempfile::tempdir().unwrap();
        let folder = golden(name);
        let file = folder.join("golden.safetensors");
        trace(tmp.path(), &["--model", folder.to_str().unwrap(), "--input", file.to_str().unwrap(), "--grad", "--out", "trace.safetensors"]);
        let (gold, ours) = (read(&file), read(&tmp.path().join("trace.safetensors")));
        let near = |what: &str, bound: f64, x: &[f64], y: &[f64]| assert!(off(x, y) <= bound, "{name}: {what} is off by {:.1e}", off(x, y));
        let n = gold["input_ids"].0[0];
        assert_eq!(ours["logits"].0, [1, n, gold["logits"].0[1]]);
        for (key, (_, theirs)) in &gold {
            match key.split_once('.') {
                Some(("hidden", "norm")) => near(key, VALUES, &ours["ln_final.hook_out"].1, theirs),
                Some(("hidden", i)) => near(key, VALUES, &ours[&format!("blocks.{i}.hook_resid_post")].1, theirs),
                Some(("router", i)) => near(key, VALUES, &ours[&format!("blocks.{i}.mlp.hook_router_logits")].1, theirs),
                Some(("grad", _)) => near(key, GRADIENTS, &fused(&ours, key), theirs),
                _ => {}
            }
        }
        near("logits", VALUES, &ours["logits"].1, &gold["logits"].1);
        near("objective", VALUES, &ours["objective"].1, &gold["loss"].1);
        let aux = gold.get("aux_loss").map_or(0.0, |a| a.1[0]);
        near("loss", VALUES, &ours["loss"].1, &[gold["loss"].1[0] - 0.01 * aux]);
        if aux > 0.0 {
            near("aux_loss", VALUES, &ours["aux_loss"].1, &[aux]);
        }
        // gradients by the checkpoint's own names, no more and no fewer
        let mut saved = vec![];
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let weights = path.extension().is_some_and(|e| e == "safetensors") && !path.ends_with("golden.safetensors");
            saved.extend(
                weights.then(|| TensorFile::open(&path).unwrap().tensors(&path).unwrap().into_keys().collect::<Vec<_>>()).into_iter().flatten(),
            );
        }
        // the file of a tied model has the embedding once more
        saved.retain(|n| !n.starts_with("mtp.") && !n.starts_with("model.visual.") && (name != "qwen3_tied" || n != "lm_head.weight"));
        saved.sort();
        assert_eq!(ours.keys().filter_map(|k| k.strip_prefix("grad.")).collect::<Vec<_>>(), saved);
        assert!(!ours.keys().any(|k| k.ends_with("hook_pattern") || k.ends_with("hook_effective_attention")));
        // the index says the same of each, and no more
        let index: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(tmp.path().join("index.json")).unwrap()).unwrap();
        let of = index["tensors"].as_object().unwrap();
        assert_eq!(of.keys().collect::<std::collections::BTreeSet<_>>(), ours.keys().collect());
        for (key, says) in of {
            assert_eq!(says["shape"], serde_json::json!(ours[key].0), "{key}");
            assert!(["meaning", "op", "dtype", "computed_in"].iter().all(|k| says[k].as_str().is_some_and(|s| !s.is_empty())), "{key}");
        }
        let files: Vec<_> = std::fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(files.len(), 2, "{files:?}");
    }
}

#[test]
fn the_emulator_of_a_gpu_writes_what_the_cpu_does() {
    if let Err(e) = cuda::emulator() {
        return println!("SKIPPED: {e}");
    }
    let tmp = tempfile::tempdir().unwrap();
    let folder = golden("next_d32");
    let file = folder.join("golden.safetensors");
    let all = ["--names", "*,*hook_pattern,*hook_effective_attention", "--grad", "--dtype", "f32"];
    let written = |device: &str| {
        let out = format!("{device}.safetensors");
        let places = ["trace", "--model", folder.to_str().unwrap(), "--input", file.to_str().unwrap(), "--out", &out, "--device", device];
        let o = Command::new(env!("CARGO_BIN_EXE_tidegate")).args(places).args(all).current_dir(tmp.path()).output().unwrap();
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        read(&tmp.path().join(out))
    };
    let (cpu, emulated) = (written("cpu"), written("emulated"));
    assert_eq!(cpu.keys().collect::<Vec<_>>(), emulated.keys().collect::<Vec<_>>());
    for (name, (shape, values)) in &cpu {
        assert_eq!(shape, &emulated[name].0, "{name}");
        assert!(off(&emulated[name].1, values) <= GRADIENTS, "{name} is off by {:.1e}", off(&emulated[name].1, values));
    }
}

#[test]
fn names_labels_and_texts() {
    let tmp = tempfile::tempdir().unwrap();
    let folder = golden("next_d32");
    let model = ["--model", folder.to_str().unwrap()];
    let at = |name: &str| tmp.path().join(name);
    write(&at("two.safetensors"), &[("input_ids", &[2, 5], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10])]);
    let asked = ["--input", "two.safetensors", "--names", "*hook_pattern,blocks.0.attn.hook_effective_attention", "--out", "a.safetensors"];
    trace(tmp.path(), &[&model[..], &asked].concat());
    let a = read(&at("a.safetensors"));
    let names = ["aux_loss", "blocks.0.attn.hook_effective_attention", "blocks.3.attn.hook_pattern", "logits", "loss", "objective"];
    assert_eq!(a.keys().collect::<Vec<_>>(), names);
    assert_eq!((&a[names[1]].0[..], &a[names[2]].0[..], &a["logits"].0[..]), (&[2, 4, 5, 5][..], &[2, 4, 5, 5][..], &[2, 5, 61][..]));
    // the loss is the mean of what logits say of the labels that are asked for
    let labels = [-100, 60, -100, -100, 0, -100, -100, -100, -100, 10];
    write(&at("labels.safetensors"), &[("input_ids", &[2, 5], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), ("labels", &[2, 5], &labels)]);
    trace(tmp.path(), &[&model[..], &["--input", "labels.safetensors", "--names", "logits", "--out", "b.safetensors"]].concat());
    let b = read(&at("b.safetensors"));
    let nll = |position: usize, label: usize| {
        let row = &b["logits"].1[position * 61..][..61];
        row.iter().map(|x| x.exp()).sum::<f64>().ln() - row[label]
    };
    let mean = (nll(0, 60) + nll(3, 0) + nll(8, 10)) / 3.0;
    assert!((b["loss"].1[0] - mean).abs() < 1e-5, "{} against {mean}", b["loss"].1[0]);
    // one token predicts nothing
    write(&at("one.safetensors"), &[("input_ids", &[1], &[7])]);
    let o = trace(tmp.path(), &[&model[..], &["--input", "one.safetensors", "--names", "logits", "--out", "c.safetensors"]].concat());
    assert!(String::from_utf8_lossy(&o.stderr).contains("no loss"));
    assert_eq!(read(&at("c.safetensors")).into_keys().collect::<Vec<_>>(), ["logits"]);

    let o = tidegate(tmp.path(), &["train", "smoke", "--set", "train.steps=1", "--set", "data.held_out=0", "--run-dir", "r"]);
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    trace(tmp.path(), &["--model", "r", "--text", "whale", "--dtype", "bf16", "--names", "blocks.0.mlp.*", "--out", "d.safetensors"]);
    let d = read(&at("d.safetensors"));
    assert_eq!(d["logits"].0, [1, 5, 256]);
    assert!(d["blocks.0.mlp.hook_router_index"].1.iter().all(|i| *i >= 0.0 && i.fract() == 0.0));
}

#[test]
fn bad_input_is_refused_in_words() {
    let tmp = tempfile::tempdir().unwrap();
    let folder = golden("next_d32");
    let fails = |args: &[&str], code: i32, words: &[&str]| {
        let o = tidegate(tmp.path(), &[&["trace", "--model", folder.to_str().unwrap()], args].concat());
        let e = String::from_utf8_lossy(&o.stderr);
        assert_eq!(o.status.code(), Some(code), "{args:?}: {e}");
        assert!(words.iter().all(|w| e.contains(w)), "{args:?}: {e}");
        assert!(!tmp.path().join("t.safetensors").exists() && !tmp.path().join("t.safetensors.tmp").exists());
    };
    let bad: [(&[(&str, &[usize], &[i64])], &[&str]); 10] = [
        (&[("ids", &[1, 2], &[1, 2])], &["no `input_ids`", "it holds: ids"]),
        (&[("input_ids", &[1, 2], &[1, 61])], &["`input_ids` at [0, 1] is 61", "0 to 60"]),
        (&[("input_ids", &[1, 2], &[-1, 6])], &["`input_ids` at [0, 0] is -1"]),
        (&[("input_ids", &[1, 1, 2], &[1, 6])], &["[B, T]", "[1, 1, 2]"]),
        (&[("input_ids", &[0, 2], &[])], &["no token"]),
        (&[("input_ids", &[1, 2], &[1, 2]), ("labels", &[2], &[1, 2])], &["`labels`", "[1, 2]", "[2]"]),
        (&[("input_ids", &[1, 2], &[1, 2]), ("labels", &[1, 2], &[1, -5])], &["`labels` at [0, 1] is -5", "-100"]),
        (&[("input_ids", &[2, 1], &[1, 2]), ("cu_seqlens", &[2], &[0, 2])], &["`cu_seqlens`", "has 2"]),
        (&[("input_ids", &[1, 2], &[1, 2]), ("cu_seqlens", &[3], &[0, 1, 3])], &["`cu_seqlens`", "from 0 to 2"]),
        (&[("input_ids", &[1, 3], &[1, 2, 3]), ("cu_seqlens", &[4], &[0, 2, 1, 3])], &["`cu_seqlens`", "rise"]),
    ];
    let out = ["--out", "t.safetensors"];
    for (tensors, words) in bad {
        write(&tmp.path().join("bad.safetensors"), tensors);
        fails(&[&["--input", "bad.safetensors"], &out[..]].concat(), 1, &[words, &["bad.safetensors"]].concat());
    }
    let zeros = [0u8; 8];
    let wrong = TensorView::new(Dtype::F32, vec![1, 2], &zeros).unwrap();
    safetensors::serialize_to_file([("input_ids", wrong)], None, &tmp.path().join("bad.safetensors")).unwrap();
    fails(&[&["--input", "bad.safetensors"], &out[..]].concat(), 1, &["`input_ids` must be I64", "F32"]);
    std::fs::write(tmp.path().join("bad.safetensors"), b"nothing").unwrap();
    fails(&[&["--input", "bad.safetensors"], &out[..]].concat(), 1, &["bad.safetensors", "safetensors file"]);
    fails(&[&["--input", "none.safetensors"], &out[..]].concat(), 1, &["none.safetensors"]);
    fails(&out, 2, &["--input"]);
    fails(&[&["--input", "x", "--text", "y"], &out[..]].concat(), 2, &["--text"]);
    fails(&[&["--text", "y"], &out[..]].concat(), 2, &["61 tokens", "tokenizer"]);
    write(&tmp.path().join("ok.safetensors"), &[("input_ids", &[1], &[1])]);
    fails(&[&["--input", "ok.safetensors", "--names", "*hook_x"], &out[..]].concat(), 2, &["`*hook_x`", "blocks.*.attn.hook_beta", "4 blocks"]);
    fails(&[&["--input", "ok.safetensors", "--names", "*pattern"], &out[..]].concat(), 2, &["*hook_pattern"]);
    fails(&[&["--input", "ok.safetensors", "--grad"], &out[..]].concat(), 2, &["--grad"]);
    fails(&["--input", "ok.safetensors", "--out", "no/t.safetensors"], 2, &["--out", "does not exist"]);
    fails(&["--input", "ok.safetensors", "--out", "."], 2, &["--out", "folder"]);
    fails(&["--input", "ok.safetensors", "--out", "index.json"], 2, &["--out", "index"]);
}
