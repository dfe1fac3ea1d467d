//! Whole runs with the real model: training, killing, resuming, generating, scoring.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    c.args(args).current_dir(dir);
    c
}
fn run(dir: &Path, args: &[&str]) -> Output {
    let o = command(dir, args).output().unwrap();
    assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
    o
}
/// Training losses by step; panics on a doubled step.
fn losses(run: &Path) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let train: Vec<_> = lines.iter().filter(|v| v["loss"].is_number()).collect();
    for (i, v) in train.iter().enumerate() {
        assert_eq!(v["step"].as_u64(), Some(i as u64 + 1));
    }
    train.iter().map(|v| v["loss"].as_f64().unwrap()).collect()
}
fn weights(run: &Path, step: u64) -> Vec<u8> {
    std::fs::read(run.join(format!("checkpoints/step-{step:08}/model.safetensors"))).unwrap()
}

#[test]
fn smoke_learns_and_leaves_a_run_that_writes() {
    let tmp = tempfile::tempdir().unwrap();
    let o = run(tmp.path(), &["train", "smoke"]);
    let stdout = String::from_utf8(o.stdout).unwrap();
    let held_out = stdout.lines().find(|l| l.starts_with("held out:")).unwrap_or_else(|| panic!("{stdout}"));
    assert!(held_out.contains("bits per byte") && held_out.contains("bzip2"));
    let dir = tmp.path().join("runs/smoke");
    for f in ["config.toml", "config.json", "run.json", "metrics.jsonl"] {
        assert!(dir.join(f).is_file(), "{f}");
    }
    let l = losses(&dir);
    assert!(l.len() == 30 && l[29] < l[0] - 0.5, "{l:?}");
    let newest = dir.join("checkpoints/step-00000030");
    for f in ["model.safetensors", "config.json", "optimizer.safetensors", "state.json"] {
        assert!(newest.join(f).is_file(), "{f}");
    }
    assert_eq!(std::fs::read_dir(dir.join("checkpoints")).unwrap().count(), 2);
    // The run's closing figure is what `eval` says, from the folder and from the checkpoint.
    for path in ["runs/smoke", "runs/smoke/checkpoints/step-00000030"] {
        let e = String::from_utf8(run(tmp.path(), &["eval", path]).stdout).unwrap();
        assert_eq!(e.trim(), held_out.trim());
    }
    let write = |seed: &str| {
        String::from_utf8_lossy(&run(tmp.path(), &["generate", "runs/smoke", "--prompt", "Call me", "--tokens", "50", "--seed", seed]).stdout)
            .into_owned()
    };
    let (a, b, c) = (write("1"), write("1"), write("2"));
    assert!(a.starts_with("Call me") && a == b && a != c);
    // A second run doesn't touch the first.
    let again = command(tmp.path(), &["train", "smoke", "--run-dir", "runs/smoke"]).output().unwrap();
    assert_eq!(again.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--resume"));
}

#[test]
fn killed_at_any_instant_resumes_bit_for_bit() {
    let tmp = tempfile::tempdir().unwrap();
    let base =
        ["train", "smoke", "--set", "checkpoint.every=1", "--set", "eval.every=0", "--set", "train.steps=24", "--set", "sample.count=0", "--run-dir"];
    let with = |more: &[&'static str]| base.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>();
    run(tmp.path(), &with(&["whole"]));
    let cut = tmp.path().join("cut");
    let started = Instant::now();
    let mut kills = 0;
    for wait in (0..).map(|i| 300 + 137 * i) {
        // With a checkpoint every step, kills at arbitrary times fall on their writing too.
        let mut child = command(tmp.path(), &with(&["cut", "--resume"])).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_millis(wait);
        let ended = loop {
            match child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if Instant::now() > deadline => break None,
                None => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        if let Some(status) = ended {
            assert!(status.success());
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        assert!(started.elapsed() < Duration::from_secs(300), "never ended");
    }
    assert!(kills > 0);
    assert_eq!(losses(&tmp.path().join("whole")), losses(&cut));
    assert!(weights(&tmp.path().join("whole"), 24) == weights(&cut, 24), "weights differ after {kills} kills");
}

#[test]
fn thread_count_changes_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    for (dir, threads) in [("one", "1"), ("three", "3")] {
        let args = ["train", "smoke", "--set", "train.steps=4", "--set", "sample.count=0", "--set", "data.held_out=0.01", "--run-dir", dir];
        assert!(command(tmp.path(), &args).env("RAYON_NUM_THREADS", threads).output().unwrap().status.success());
    }
    assert!(weights(&tmp.path().join("one"), 4) == weights(&tmp.path().join("three"), 4));
}

#[test]
fn a_loss_that_is_not_finite_stops_with_one_and_a_name() {
    let tmp = tempfile::tempdir().unwrap();
    let o = command(tmp.path(), &["train", "smoke", "--set", "optim.lr=1e30", "--set", "optim.clip=0", "--set", "optim.warmup=0"]).output().unwrap();
    let e = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(1), "{e}");
    assert!(e.contains("error: step ") && e.contains('`'), "{e}");
}
