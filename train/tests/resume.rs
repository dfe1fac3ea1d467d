//! Going on with a run: what is refused, what is said, what is fallen back to, and that nothing is lost by it.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

/// A run of four steps of the smoke preset, small.
const QUICK: &str = "--set train.steps=4 --set checkpoint.every=2 --set eval.every=0 --set sample.count=0 --set data.held_out=0.002";

fn tidegate(dir: &Path, line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate")).args(line.split_whitespace()).current_dir(dir).output().unwrap()
}
/// Runs a command line that must end with `code`; returns what it said on stderr.
fn says(dir: &Path, line: &str, code: i32) -> String {
    let o = tidegate(dir, line);
    let e = String::from_utf8_lossy(&o.stderr).into_owned();
    assert_eq!(o.status.code(), Some(code), "{line}: {e}");
    e
}
fn has(text: &str, words: &[&str]) {
    assert!(words.iter().all(|w| text.contains(w)), "{words:?} in {text}");
}
fn checkpoint(run: &Path, step: u64) -> std::path::PathBuf {
    run.join(format!("checkpoints/step-{step:08}"))
}
fn weights(run: &Path, step: u64) -> Vec<u8> {
    fs::read(checkpoint(run, step).join("model.safetensors")).unwrap()
}
fn value(run: &Path, pointer: &str) -> serde_json::Value {
    let info: serde_json::Value = serde_json::from_str(&fs::read_to_string(run.join("run.json")).unwrap()).unwrap();
    info.pointer(pointer).unwrap().clone()
}

#[test]
fn a_refused_resume_changes_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    says(tmp.path(), &format!("train smoke --run-dir a {QUICK}"), 0);
    let run = tmp.path().join("a");
    let before = ["run.json", "config.toml", "config.json", "metrics.jsonl"].map(|f| fs::read(run.join(f)).unwrap());
    let e = says(tmp.path(), "train --run-dir a --resume --set model.hidden_size=32", 2);
    has(&e, &["model.hidden_size: 64 -> 32", "--run-dir"]);
    says(tmp.path(), "train --run-dir a --resume --set data.path=nowhere.txt", 1);
    let after = ["run.json", "config.toml", "config.json", "metrics.jsonl"].map(|f| fs::read(run.join(f)).unwrap());
    assert!(before == after);
    says(tmp.path(), "train --run-dir a --resume --set train.steps=6", 0);
    assert!(checkpoint(&run, 6).is_dir());
}

#[test]
fn what_changes_is_said_and_a_file_is_read_again() {
    let tmp = tempfile::tempdir().unwrap();
    let run = tmp.path().join("r");
    fs::write(tmp.path().join("my.toml"), "preset = \"smoke\"\noptim.lr = 0.01\noptim.clip = 2.0\n").unwrap();
    says(tmp.path(), &format!("train my.toml --run-dir r {QUICK} --set optim.clip=3.0"), 0);
    fs::write(tmp.path().join("my.toml"), "preset = \"smoke\"\noptim.lr = 0.02\noptim.clip = 2.5\n").unwrap();
    let e = says(tmp.path(), "train my.toml --run-dir r --resume --set seed=7 --set train.steps=5", 0);
    has(&e, &["changed  optim.lr: 0.01 -> 0.02", "changed  seed: 1 -> 7 (from here on the text comes in another order)", "train.steps: 4 -> 5"]);
    assert!(!e.contains("optim.clip"), "what --set gave stands above the file: {e}");
    assert_eq!((value(&run, "/config/optim/lr"), value(&run, "/config/optim/clip")), (0.02.into(), 3.0.into()));
    assert_eq!(value(&run, "/origins/source/optim.clip"), "--set");
    assert!(!says(tmp.path(), "train --run-dir r --resume", 0).contains("changed"));
    // A budget in minutes follows the clock, and says that it does.
    has(&says(tmp.path(), "train --run-dir r --resume --set train.minutes=0.0001", 0), &["train.minutes: null -> 0.0001", "bit for bit"]);
}

#[test]
fn another_text_is_refused_unless_it_is_asked_for() {
    let tmp = tempfile::tempdir().unwrap();
    let text = "It was the whiteness of the whale that above all things appalled me. ".repeat(80);
    fs::write(tmp.path().join("t.txt"), &text).unwrap();
    says(tmp.path(), &format!("train smoke --run-dir a {QUICK} --set data.path=t.txt"), 0);
    fs::write(tmp.path().join("t.txt"), text.replace("whale", "whelk")).unwrap();
    let e = says(tmp.path(), "train --run-dir a --resume --set train.steps=5", 1);
    has(&e, &["t.txt", "not what this run was trained on", "--set data.path=t.txt"]);
    assert_eq!(value(&tmp.path().join("a"), "/config/train/steps"), 4);
    has(&says(tmp.path(), "eval a", 0), &["t.txt has changed since"]);
    says(tmp.path(), "train --run-dir a --resume --set train.steps=5 --set data.path=t.txt", 0);
    assert_eq!(says(tmp.path(), "eval a", 0), "");
    says(tmp.path(), "train --run-dir a --resume --set train.steps=6", 0);
}

#[test]
fn an_older_checkpoint_gives_the_result_that_was_asked_for() {
    let tmp = tempfile::tempdir().unwrap();
    let run = tmp.path().join("s");
    says(tmp.path(), &format!("train smoke --run-dir s {QUICK} --set train.steps=8 --set checkpoint.keep=9"), 0);
    let e = says(tmp.path(), "train --resume s/checkpoints/step-00000002 --set optim.lr=1e-4 --set train.steps=5 --set checkpoint.keep=2", 0);
    has(&e, &["resuming", "step-00000002", "optim.lr: 0.004 -> 0.0001", ".old-step-00000008"]);
    let mut left: Vec<String> = fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    left.sort();
    assert_eq!(left, [".old-step-00000004", ".old-step-00000006", ".old-step-00000008", "step-00000004", "step-00000005"]);
    assert!(weights(&run, 4) != fs::read(run.join("checkpoints/.old-step-00000004/model.safetensors")).unwrap());
}

#[test]
fn a_truncated_newest_checkpoint_is_passed_over() {
    let tmp = tempfile::tempdir().unwrap();
    let cut = tmp.path().join("cut");
    says(tmp.path(), &format!("train smoke --run-dir whole {QUICK}"), 0);
    says(tmp.path(), &format!("train smoke --run-dir cut {QUICK}"), 0);
    let damaged = checkpoint(&cut, 4).join("model.safetensors");
    let bytes = fs::read(&damaged).unwrap();
    fs::write(&damaged, &bytes[..bytes.len() / 2]).unwrap();
    for line in ["generate cut --tokens 5", "eval cut", "train --run-dir cut --resume"] {
        let e = says(tmp.path(), line, 0);
        has(&e, &["skipped", "step-00000004", "model.safetensors"]);
    }
    assert!(weights(&cut, 4) == bytes && bytes == weights(&tmp.path().join("whole"), 4), "the step was done again, to the same bits");
    // One bit is enough, and only what is read has to be whole.
    let mut flipped = bytes.clone();
    flipped[bytes.len() - 100] ^= 1;
    fs::write(&damaged, flipped).unwrap();
    for line in ["generate cut --tokens 5", "eval cut", "train --run-dir cut --resume"] {
        has(&says(tmp.path(), line, 0), &["skipped", "step-00000004", "model.safetensors is damaged"]);
    }
    assert!(weights(&cut, 4) == bytes);
    // A damaged optimizer is found by the run that needs it, a damaged state likewise.
    let optimizer = checkpoint(&cut, 4).join("optimizer.safetensors");
    let bytes = fs::read(&optimizer).unwrap();
    fs::write(&optimizer, &bytes[..bytes.len() - 9]).unwrap();
    assert!(!says(tmp.path(), "eval cut", 0).contains("skipped"));
    has(&says(tmp.path(), "train --run-dir cut --resume", 0), &["skipped", "optimizer.safetensors", "resuming", "step-00000002"]);
    for step in [2, 4] {
        fs::write(checkpoint(&cut, step).join("state.json"), r#"{"version":1,"step":18446744073709551615,"tokens":1,"seconds":1.0,"ema":1.0}"#)
            .unwrap();
    }
    has(&says(tmp.path(), "train --run-dir cut --resume", 1), &["skipped", "18446744073709551615 steps", "error: "]);
    // Named alone, it is an error.
    fs::write(&damaged, "").unwrap();
    has(&says(tmp.path(), "eval cut/checkpoints/step-00000004", 1), &["error: ", "model.safetensors"]);
}

#[test]
fn a_first_run_that_fails_does_not_take_its_folder() {
    let tmp = tempfile::tempdir().unwrap();
    fs::write(tmp.path().join("tiny.txt"), "eleven byte").unwrap();
    has(&says(tmp.path(), "train smoke --run-dir d --set data.path=tiny.txt", 1), &["tiny.txt", "data.seq_len"]);
    has(&says(tmp.path(), "train smoke --run-dir d --set model.vocab_size=100", 2), &["model.vocab_size", "256"]);
    assert!(!tmp.path().join("d").exists());
    says(tmp.path(), &format!("train smoke --run-dir d {QUICK} --set train.steps=1"), 0);
}

#[test]
fn a_name_of_its_own_names_the_folder_and_does_not_stand_in_the_way() {
    let tmp = tempfile::tempdir().unwrap();
    says(tmp.path(), &format!("train smoke --set name=foo {QUICK} --set train.steps=1"), 0);
    assert!(tmp.path().join("runs/foo/run.json").is_file() && !tmp.path().join("runs/smoke").exists());
    says(tmp.path(), "train smoke --set name=foo --resume", 0);
    says(tmp.path(), "train smoke --run-dir runs/foo --resume", 0);
    has(&says(tmp.path(), "train quickstart --run-dir runs/foo --resume", 2), &["holds a run of `smoke`, not of `quickstart`"]);
}

#[test]
fn checkpoints_are_found_from_inside_their_folder_and_resume_says_what_it_takes() {
    let tmp = tempfile::tempdir().unwrap();
    says(tmp.path(), &format!("train smoke --run-dir r {QUICK}"), 0);
    let inside = tmp.path().join("r/checkpoints");
    let (here, above) = (tidegate(&inside, "eval step-00000004"), tidegate(tmp.path(), "eval r"));
    assert!(here.status.success() && here.stdout == above.stdout, "{}", String::from_utf8_lossy(&here.stderr));
    says(&inside, "train --resume step-00000004 --set train.steps=5", 0);
    assert!(checkpoint(&tmp.path().join("r"), 5).is_dir());
    let e = says(tmp.path(), "train --resume quickstart --run-dir r", 2);
    has(&e, &["--resume quickstart", "does not exist", "tidegate train quickstart --resume"]);
}

#[test]
fn a_damaged_run_json_can_be_mended_as_its_error_says() {
    let tmp = tempfile::tempdir().unwrap();
    says(tmp.path(), &format!("train smoke --run-dir r {QUICK}"), 0);
    let path = tmp.path().join("r/run.json");
    fs::write(&path, &fs::read(&path).unwrap()[..40]).unwrap();
    let e = says(tmp.path(), "train --run-dir r --resume", 1);
    let advice = "train r/config.toml --run-dir r --resume";
    has(&e, &["run.json", "delete it", advice]);
    fs::remove_file(&path).unwrap();
    says(tmp.path(), advice, 0);
    assert_eq!((value(&tmp.path().join("r"), "/config/train/steps"), value(&tmp.path().join("r"), "/config/name")), (4.into(), "smoke".into()));
    says(tmp.path(), "train smoke --run-dir r --resume --set train.steps=5", 0);
}

/// What no parameter depends on may change: a run goes on with another base, a longer context, in its own folder or in another.
#[test]
fn positions_may_be_stretched_on_the_way() {
    let tmp = tempfile::tempdir().unwrap();
    says(tmp.path(), &format!("train smoke --run-dir a {QUICK}"), 0);
    let stretched = "--set model.rope_theta=50000 --set train.steps=6";
    let yarn = "--set model.rope_scaling.rope_type=yarn --set model.rope_scaling.factor=4";
    let from = "--resume a/checkpoints/step-00000004";
    // another folder keeps the first as it is; the same step with the old positions is another one
    has(&says(tmp.path(), &format!("train smoke --run-dir b {from} {QUICK} {stretched}"), 0), &["resuming", "step-00000004"]);
    has(&says(tmp.path(), &format!("train smoke --run-dir c {from} {QUICK} {stretched} {yarn}"), 0), &["resuming"]);
    has(&says(tmp.path(), "train --run-dir a --resume --set train.steps=6", 0), &["train.steps: 4 -> 6"]);
    let [a, b, c] = ["a", "b", "c"].map(|run| tmp.path().join(run));
    assert!(weights(&a, 6) != weights(&b, 6) && weights(&b, 6) != weights(&c, 6));
    let config = fs::read_to_string(checkpoint(&c, 6).join("config.json")).unwrap();
    has(&config, &["\"rope_theta\": 50000.0", "\"rope_type\": \"yarn\"", "\"factor\": 4.0"]);
    has(
        &says(tmp.path(), &format!("train --run-dir a --resume --set model.rope_theta=50000 --set train.steps=7 {yarn}"), 0),
        &[
            "changed  model.rope_theta: 10000.0 -> 50000",
            "changed  model.rope_scaling.rope_type: \"default\" -> \"yarn\"",
            "changed  model.rope_scaling.factor: null -> 4",
        ],
    );
    has(&says(tmp.path(), "train --run-dir a --resume --set model.rope_scaling.factor=0.5", 2), &["rope_scaling.factor", "at least 1"]);
}
