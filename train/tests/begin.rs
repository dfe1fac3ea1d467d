//! Training that begins with the parameters of a checkpoint.

use nn::Decoder;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Two steps on a task alone that change nothing, as their learning rate is 0.
const STILL: &str = "--set train.steps=2 --set optim.lr=0 --set checkpoint.every=1 --set eval.tokens=600 --set sample.count=0 --set data.path= \
                     --set tasks.share=1 --set tasks.mix.mqar=1 --set tasks.mqar.length=[16] --device cpu";

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/golden").join(name).canonicalize().unwrap()
}
fn tidegate(dir: &Path, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate")).args(line.split_whitespace()).current_dir(dir).output().unwrap()
}
fn runs(dir: &Path, line: &str) -> String {
    let o = tidegate(dir, line);
    let e = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(o.status.success(), "{line}: {e}");
    e
}
fn fails(dir: &Path, line: &str, code: i32, words: &[&str]) {
    let o = tidegate(dir, line);
    let e = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(code), "{line}: {e}");
    assert!(words.iter().all(|w| e.contains(w)) && !e.contains("panicked"), "{line}: {e}");
}
fn parameters(dir: &Path) -> Vec<(String, Vec<f32>)> {
    let model = Decoder::open(dir).unwrap();
    model.params().iter().map(|p| (p.name.clone(), p.tensor.to_vec().unwrap())).collect()
}

#[test]
fn a_run_begins_with_a_checkpoint_of_transformers() {
    let tmp = tempfile::tempdir().unwrap();
    for name in ["next_d32", "qwen3_moe", "mamba2_groups"] {
        let from = golden(name);
        let (theirs, run) = (parameters(&from), tmp.path().join(name));
        let said = runs(tmp.path(), &format!("train smoke --from {} {STILL} --run-dir {name}", from.display()));
        assert!(said.contains(&format!("parameters of {}", from.display())), "{said}");
        assert!(parameters(&run.join("checkpoints/step-00000002")) == theirs, "{name}");
        // a run that was stopped before its first checkpoint begins there again
        fs::remove_dir_all(run.join("checkpoints")).unwrap();
        let said = runs(tmp.path(), &format!("train --resume --run-dir {name} --device cpu"));
        assert!(said.contains("no checkpoint yet") && said.contains("parameters of "), "{said}");
        assert!(parameters(&run.join("checkpoints/step-00000002")) == theirs, "{name}");
        // one that has one goes on without the folder it began with
        let moved = format!("train --resume --run-dir {name} --set train.steps=3 --set train.from=nowhere --device cpu");
        assert!(!runs(tmp.path(), &moved).contains("parameters of "));
    }
    // a run, whose model is then that of the next; and a step that changes it
    let said = runs(tmp.path(), &format!("train quickstart --from next_d32 {STILL} --set optim.lr=1e-3 --set train.steps=1 --run-dir next"));
    assert!(said.contains("parameters of next_d32/checkpoints/step-00000003"), "{said}");
    let [a, b] = ["next_d32/checkpoints/step-00000003", "next/checkpoints/step-00000001"].map(|p| parameters(&tmp.path().join(p)));
    assert!(a != b && a.len() == b.len());
    let shown = tidegate(tmp.path(), "train quickstart --from next --print-config");
    let shown = String::from_utf8(shown.stdout).unwrap();
    let line = shown.lines().find(|l| l.contains("hidden_size")).unwrap();
    assert!(line.ends_with("# next"), "{line}");
}

#[test]
fn frozen_parameters_stay_as_they_begin() {
    let tmp = tempfile::tempdir().unwrap();
    let from = golden("next_d32");
    let line = format!("train smoke --from {} {STILL} --set optim.lr=1e-2 --set optim.freeze=[\"*.mlp.*\",\"lm_head\"]", from.display());
    let said = runs(tmp.path(), &format!("{line} --run-dir some"));
    assert!(said.contains("frozen: ") && said.contains("tensors of"), "{said}");
    let (before, after) = (parameters(&from), parameters(&tmp.path().join("some/checkpoints/step-00000002")));
    for ((name, a), (_, b)) in before.iter().zip(&after) {
        assert_eq!(a == b, name.contains(".mlp.") || name.starts_with("lm_head"), "{name}");
    }
    fails(tmp.path(), &line.replace("lm_head", "lm_haed"), 2, &["optim.freeze: `lm_haed` is no parameter of this model"]);
}

#[test]
fn what_does_not_fit_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let from = golden("next_d32");
    let f = from.display();
    fails(tmp.path(), &format!("train smoke --from nowhere {STILL}"), 2, &["train.from", "nowhere does not exist"]);
    fails(tmp.path(), &format!("train smoke --from {f} --resume"), 2, &["--from", "--resume"]);
    fails(tmp.path(), &format!("train smoke --from {f} {STILL} --set model.hidden_size=48"), 1, &["does not fit the model", "the model needs"]);
    // text is no tokens
    let own = tmp.path().join("own");
    fs::create_dir(&own).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(from.join(file), own.join(file)).unwrap();
    }
    fs::write(own.join("tokenizer.json"), "{}").unwrap();
    fails(tmp.path(), "train smoke --from own", 2, &["is text, and the model was trained on tokens", "tokenize encode", "own/tokenizer.json"]);
    assert!(!tmp.path().join("runs").exists());
}
