//! `tidegate bench` and `tidegate doctor` as a person meets them: devices, tables, files, messages.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

fn tidegate(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).current_dir(dir).output().unwrap();
    let text = |b: Vec<u8>| String::from_utf8(b).unwrap();
    let (out, err) = (text(stdout), text(stderr));
    assert!(!err.contains("panicked"), "{args:?}: {err}");
    (status.code().unwrap(), out, err)
}
fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn wrong_usage_says_what_to_do() {
    let tmp = tempfile::tempdir().unwrap();
    for (args, code, words) in [
        (&["bench"][..], 2, &["ops", "step"][..]),
        (&["bench", "ops", "delta_rul"], 2, &["did you mean `delta_rule`"]),
        (&["bench", "ops", "rope", "--device", "gpu"], 2, &["--device", "cuda:N"]),
        (&["bench", "ops", "rope", "--dtype", "f16"], 2, &["--dtype", "f32 or bf16"]),
        (&["bench", "ops", "rope", "--reps", "0"], 2, &["--reps", "at least 1"]),
        (&["bench", "ops", "rope", "--device", "cpu", "--graph"], 2, &["--graph", "cpu"]),
        (&["bench", "ops", "rope", "--device", "cuda:99"], 1, &["cuda:99", "cpu"]),
        (&["bench", "ops", "rope", "--device", "cpu", "--json", "no/such/file"], 2, &["--json", "no folder no/such"]),
        (&["bench", "step", "smok"], 2, &["did you mean `smoke`"]),
        (&["bench", "step", "nowhere.toml"], 2, &["nowhere.toml"]),
        (&["bench", "step", "smoke", "--set", "data.batsh=2"], 2, &["did you mean `data.batch`"]),
        (&["doctor", "--device", "cuda:99"], 1, &["cuda:99"]),
        (&["doctor", "--device", "cuda:x"], 2, &["cuda:N"]),
    ] {
        let (found, _, err) = tidegate(tmp.path(), args);
        assert!(found == code && words.iter().all(|w| err.contains(w)), "{args:?}: {found} {err}");
    }
}

#[test]
fn ops_are_timed_and_written() {
    let tmp = tempfile::tempdir().unwrap();
    let (code, out, err) = tidegate(tmp.path(), &["bench", "ops", "rms_norm", "adamw", "--device", "cpu", "--reps", "2", "--json", "o.json"]);
    assert_eq!(code, 0, "{err}");
    let lines: Vec<&str> = out.lines().collect();
    assert!(lines[0].starts_with("cpu, f32; wall time") && lines[2].starts_with("op ") && lines[2].ends_with("reps"), "{out}");
    let passes: Vec<(&str, &str)> = [3, 4, 5].map(|i| lines[i]).map(|l| (l.split_whitespace().next().unwrap(), &l[l.len() - 1..])).to_vec();
    assert_eq!(passes, [("rms_norm", "2"), ("rms_norm", "2"), ("adamw", "2")]);
    let j = json(&tmp.path().join("o.json"));
    let rows = j["results"].as_array().unwrap();
    assert_eq!((j["device"].as_str(), j["dtype"].as_str(), rows.len()), (Some("cpu"), Some("f32"), 3));
    for r in rows {
        let n = |key: &str| r[key].as_f64().unwrap();
        assert!(n("min_ms") > 0.0 && n("min_ms") <= n("ms") && n("gb_per_s") > 0.0 && n("peak_bytes") > 0.0 && n("reps") == 2.0, "{r}");
        assert!((n("gb_per_s") - n("bytes") / n("ms") / 1e6).abs() < 1e-6 * n("gb_per_s"));
    }
}

#[test]
fn steps_are_timed_and_written() {
    let tmp = tempfile::tempdir().unwrap();
    let set = ["--set", "data.seq_len=16", "--set", "data.batch=2", "--set", "model.hidden_size=32"];
    let base = ["bench", "step", "smoke", "--device", "cpu", "--reps", "3", "--json", "s.json"];
    let (code, out, err) = tidegate(tmp.path(), &[&base[..], &set].concat());
    assert_eq!(code, 0, "{err}");
    assert!(["utilisation", "unknown", "2 micro-batches of 2 x 16"].iter().all(|w| out.contains(w)), "{out}");
    let j = json(&tmp.path().join("s.json"));
    let n = |key: &str| j[key].as_f64().unwrap();
    assert!((n("tokens_per_s") - 64.0 / n("ms") * 1e3).abs() < 1e-6 * n("tokens_per_s") && n("parameters") >= n("active_parameters"));
    assert!((n("tflops_per_s") * 1e12 - n("tokens_per_s") * n("flops_per_token")).abs() < 1e-6 * n("tflops_per_s") * 1e12);
    assert!(j["utilisation"].is_null() && n("peak_bytes") > 0.0);
}

/// The same commands on the CUDA backend, as far as an emulator shows it.
#[test]
fn the_cuda_backend_is_timed_on_the_emulator() {
    let tmp = tempfile::tempdir().unwrap();
    if let Err(e) = cuda::emulator() {
        return eprintln!("SKIPPED: nothing is emulated: {e}");
    }
    let emulated = ["--device", "emulated", "--reps", "1", "--json", "o.json"];
    for graph in [&[][..], &["--graph"]] {
        let (code, out, err) = tidegate(tmp.path(), &[&["bench", "ops", "rms_norm", "swiglu"][..], &emulated, graph].concat());
        assert_eq!(code, 0, "{err}");
        assert!(out.contains("emulator, bf16") && out.lines().filter(|l| l.ends_with(" 1")).count() == 4, "{out}");
        let timing = json(&tmp.path().join("o.json"))["timing"].as_str().unwrap().to_string();
        assert_eq!(timing.contains("graph"), !graph.is_empty());
    }
}

#[test]
fn the_doctor_says_plainly_what_there_is_not() {
    let tmp = tempfile::tempdir().unwrap();
    let (code, out, _) = tidegate(tmp.path(), &["doctor", "--device", "cpu"]);
    assert!(code == 0 && !out.contains("driver") && out.contains("ok       matmul") && out.contains("cpu f32"), "{out}");
    if cuda::present() {
        return eprintln!("SKIPPED: this machine has a GPU or its driver");
    }
    let (code, out, err) = tidegate(tmp.path(), &["doctor"]);
    let said = ["driver   none: ", "no CUDA driver", "library  libcublasLt"];
    assert!(code == 0 && said.iter().all(|w| out.contains(w)) && !out.contains("FAILED"), "{out} {err}");
    let (code, out, err) = tidegate(tmp.path(), &["doctor", "--device", "cuda"]);
    assert!(code == 1 && out.contains("driver   none") && err.contains("no CUDA driver"), "{out} {err}");
}
