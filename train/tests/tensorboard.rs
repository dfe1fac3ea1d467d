//! Event files of real runs, read back by the `tensorboard` package: `TIDEGATE_PYTHON` names a Python that has it.

use std::path::{Path, PathBuf};
use std::process::Command;

fn run(dir: &Path, line: &str) {
    let o = Command::new(env!("CARGO_BIN_EXE_tidegate")).args(line.split(' ')).current_dir(dir).output().unwrap();
    assert!(o.status.success(), "{line}: {}", String::from_utf8_lossy(&o.stderr));
}
fn event_files(run: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(run.join("tensorboard")) else { return vec![] };
    entries.map(|e| e.unwrap().path()).collect()
}
/// What the `tensorboard` package reads, held against `metrics.jsonl` by the script; none where there is no such package.
fn check(run: &Path, before: Option<&Path>) -> Option<serde_json::Value> {
    let Some(python) = std::env::var_os("TIDEGATE_PYTHON") else {
        eprintln!("SKIPPED: event files are not read by the tensorboard package: TIDEGATE_PYTHON names no Python that has it");
        return None;
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracles/tensorboard_check.py");
    let o = Command::new(python).arg(script).arg(run).args(before).output().unwrap();
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    Some(serde_json::from_slice(&o.stdout).unwrap())
}

#[test]
fn tensorboard_reads_what_the_metrics_say() {
    let tmp = tempfile::tempdir().unwrap();
    let small = "--set data.held_out=0.002 --set eval.every=4 --set checkpoint.every=3 --set checkpoint.keep=9 --set sample.count=0";
    let dir = tmp.path().join("r");
    run(tmp.path(), &format!("train smoke {small} --set train.steps=10 --run-dir r"));
    assert_eq!(event_files(&dir).len(), 1);
    let seen = check(&dir, None);
    if let Some(seen) = &seen {
        assert_eq!(seen["steps"], serde_json::json!([4, 8, 10]), "{seen}");
        let histograms: Vec<&str> = seen["histograms"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
        for name in ["blocks.0.attn/gate", "blocks.0.attn/alpha", "blocks.0.attn/beta", "blocks.3.attn/gate", "blocks.3.mlp/shared_gate"] {
            assert!(histograms.contains(&name), "{name}: {histograms:?}");
        }
    }
    // a run that goes on from step 6: what it does again is there once, also for whoever has read the old files
    let before = tmp.path().join("before");
    std::fs::create_dir(&before).unwrap();
    for f in event_files(&dir) {
        std::fs::copy(&f, before.join(f.file_name().unwrap())).unwrap();
    }
    std::fs::remove_dir_all(dir.join("checkpoints/step-00000009")).unwrap();
    std::fs::remove_dir_all(dir.join("checkpoints/step-00000010")).unwrap();
    run(tmp.path(), &format!("train smoke {small} --set train.steps=12 --run-dir r --resume"));
    assert_eq!(event_files(&dir).iter().filter(|f| f.metadata().unwrap().len() > 0).count(), 1);
    check(&dir, None);
    if let Some(seen) = check(&dir, Some(&before)) {
        assert_eq!(seen["steps"], serde_json::json!([4, 8, 12]), "{seen}");
    }
}

#[test]
fn a_run_can_do_without() {
    let tmp = tempfile::tempdir().unwrap();
    run(tmp.path(), "train smoke --set train.steps=2 --set data.held_out=0.002 --set train.tensorboard=false --run-dir r");
    assert!(!tmp.path().join("r/tensorboard").exists());
}
