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
    let stderr = String::from_utf8(o.stderr).unwrap();
    assert!(["209832 parameters, ", " of them active for a token; ", " MFLOP a token"].iter().all(|w| stderr.contains(w)), "{stderr}");
    assert!(
        stderr.lines().any(|l| l.starts_with("step     10   33.3%  loss ")) && !stderr.contains('\x1b'),
        "plain lines where no terminal is: {stderr}"
    );
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
fn every_step_says_what_there_is_to_see() {
    let tmp = tempfile::tempdir().unwrap();
    run(tmp.path(), &["train", "smoke", "--set", "train.steps=3", "--set", "data.held_out=0.002", "--run-dir", "r"]);
    let text = std::fs::read_to_string(tmp.path().join("r/metrics.jsonl")).unwrap();
    let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let steps: Vec<_> = lines.iter().filter(|l| l["loss"].is_number()).collect();
    assert_eq!(steps.len(), 3);
    let overall = "loss loss_balancing lr grad_norm tokens tokens_per_s seconds memory memory_peak embed_tokens.grad_norm norm.update_norm";
    let each = "resid_pre_rms resid_pre_max resid_mid_rms resid_post_rms resid_post_max attn.q_rms attn.k_rms attn.v_rms attn.grad_norm attn.update_norm \
                mlp.grad_norm mlp.router_entropy mlp.router_max mlp.router_load_max mlp.router_load_min mlp.router_load_entropy mlp.router_dead";
    let gates = |layer: usize| {
        let mixer: &[&str] = if layer == 3 { &["attn.gate"] } else { &["attn.gate", "attn.alpha", "attn.beta"] };
        [mixer, &["mlp.shared_gate"]]
            .concat()
            .into_iter()
            .flat_map(move |g| ["mean", "shut", "low", "high"].map(|m| format!("blocks.{layer}.{g}_{m}")))
    };
    for line in steps {
        let each = (0..4).flat_map(|i| each.split_whitespace().map(move |k| format!("blocks.{i}.{k}")));
        for key in overall.split(' ').map(String::from).chain(each).chain((0..4).flat_map(gates)) {
            assert!(line[&key].is_number(), "{key} in step {}", line["step"]);
        }
        for layer in 0..4 {
            for key in gates(layer) {
                // the output gate of a delta-rule layer is SiLU's, which is negative now and then
                let least = if key.ends_with("attn.gate_mean") && layer != 3 { -0.28 } else { 0.0 };
                assert!((least..=1.0).contains(&line[&key].as_f64().unwrap()), "{key}: {}", line[&key]);
            }
        }
    }
}

#[test]
fn the_line_to_write_with_can_be_typed() {
    let tmp = tempfile::tempdir().unwrap();
    let set = ["--set", "train.steps=1", "--set", "data.held_out=0", "--set", "sample.prompt=it's \"$HOME\"", "--run-dir", "a b"];
    let o = String::from_utf8(run(tmp.path(), &[&["train", "smoke"][..], &set].concat()).stdout).unwrap();
    let line = o.lines().find_map(|l| l.strip_prefix("write with it: ")).unwrap();
    let written = Command::new("sh").args(["-c", line]).current_dir(tmp.path()).output().unwrap();
    assert!(written.status.success() && written.stdout.starts_with(b"it's \"$HOME\""), "{line}: {}", String::from_utf8_lossy(&written.stderr));
}

#[test]
#[cfg(target_os = "linux")]
fn a_long_run_takes_no_more_memory() {
    let tmp = tempfile::tempdir().unwrap();
    let quiet =
        "train smoke --set train.steps=200 --set eval.every=0 --set sample.count=0 --set data.held_out=0.002 --set checkpoint.every=0 --run-dir r";
    run(tmp.path(), &quiet.split(' ').collect::<Vec<_>>());
    let text = std::fs::read_to_string(tmp.path().join("r/metrics.jsonl")).unwrap();
    let memory: Vec<u64> = text.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["memory"].as_u64()).collect();
    let most = |steps: &[u64]| steps.iter().max().copied().unwrap() >> 20;
    assert_eq!(memory.len(), 200);
    // a tape of this model's that nobody drops is some 10 MiB a step
    assert!(most(&memory[150..]) <= most(&memory[50..100]) + 16, "MiB: {:?}", memory.iter().step_by(20).map(|m| m >> 20).collect::<Vec<_>>());
}

#[test]
fn an_update_that_breaks_the_model_leaves_no_checkpoint() {
    let tmp = tempfile::tempdir().unwrap();
    for (i, (set, found_by)) in [
        ("sample.count=0", "the parameter `model.embed_tokens.weight` is not finite, and no checkpoint"),
        ("sample.count=1", "the model gives no numbers"),
        ("eval.every=1", "the held-out loss is NaN: the parameter `model.embed_tokens.weight`"),
    ]
    .into_iter()
    .enumerate()
    {
        let steps = if i == 2 { 2 } else { 1 };
        let args = format!("train smoke --set optim.lr=1e60 --set optim.warmup=0 --set train.steps={steps} --set {set} --run-dir r{i}");
        let o = command(tmp.path(), &args.split(' ').collect::<Vec<_>>()).output().unwrap();
        let e = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.code() == Some(1) && e.contains("error: after step 1: ") && e.contains(found_by) && e.contains("optim.lr"), "{e}");
        assert!(o.stdout.is_empty());
        let dir = tmp.path().join(format!("r{i}"));
        assert_eq!(std::fs::read_dir(dir.join("checkpoints")).map_or(0, |d| d.count()), 0);
        assert!(std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap().lines().last().unwrap().contains("\"stopped\":\"after step 1: "));
    }
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
fn packed_documents_train_resume_and_score() {
    let tmp = tempfile::tempdir().unwrap();
    let line = |i: usize| format!("{{\"text\": \"Document {i} {}\"}}\n", "tells of a whale. ".repeat(i % 7));
    std::fs::write(tmp.path().join("d.jsonl"), (0..400).map(line).collect::<String>()).unwrap();
    let base = "train smoke --set data.path=d.jsonl --set data.packing=documents --set train.steps=12 --set checkpoint.every=5 --run-dir";
    let with = |more: &'static str| base.split(' ').chain(more.split(' ')).collect::<Vec<_>>();
    let o = run(tmp.path(), &with("whole"));
    let held_out = String::from_utf8(o.stdout).unwrap().lines().find(|l| l.starts_with("held out:")).unwrap().to_string();
    let l = losses(&tmp.path().join("whole"));
    assert!(l.len() == 12 && l[11] < l[0] - 0.5, "{l:?}");
    run(tmp.path(), &with("cut --set checkpoint.keep=9"));
    std::fs::remove_dir_all(tmp.path().join("cut/checkpoints/step-00000012")).unwrap();
    run(tmp.path(), &["train", "--run-dir", "cut", "--resume"]);
    assert!(weights(&tmp.path().join("whole"), 12) == weights(&tmp.path().join("cut"), 12));
    assert_eq!(l, losses(&tmp.path().join("cut")));
    assert_eq!(String::from_utf8(run(tmp.path(), &["eval", "cut"]).stdout).unwrap().trim(), held_out);
}

#[test]
#[cfg(target_os = "linux")]
fn accumulation_takes_no_memory_for_each_micro_batch() {
    let tmp = tempfile::tempdir().unwrap();
    let peak = |micro: u64| {
        let accumulate = format!("train.accumulate={micro}");
        let small = ["train", "smoke", "--set", "train.steps=1", "--set", "data.batch=1", "--set", "data.seq_len=16", "--set", "data.held_out=0.001"];
        let dir = micro.to_string();
        run(tmp.path(), &[&small[..], &["--set", "sample.count=0", "--set", &accumulate, "--run-dir", &dir]].concat());
        let text = std::fs::read_to_string(tmp.path().join(&dir).join("metrics.jsonl")).unwrap();
        let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        line["memory_peak"].as_u64().unwrap()
    };
    let model = std::fs::metadata({
        peak(1);
        tmp.path().join("1/checkpoints/step-00000001/model.safetensors")
    });
    let (few, many, model) = (peak(4), peak(100), model.unwrap().len());
    assert!(many < few + 20 * model, "{few} bytes for 4 micro-batches, {many} for 100 of a model of {model}");
}

#[test]
fn a_loss_that_is_not_finite_stops_with_one_and_a_name() {
    let tmp = tempfile::tempdir().unwrap();
    let o = command(tmp.path(), &["train", "smoke", "--set", "optim.lr=1e30", "--set", "optim.clip=0", "--set", "optim.warmup=0"]).output().unwrap();
    let e = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(1), "{e}");
    // the op, and the layer or the place before or after the layers
    assert!(e.contains("error: step ") && e.contains("came out of `") && e.contains("in `") && e.contains("optim.clip=1"), "{e}");
}

#[test]
#[cfg(target_os = "linux")]
fn a_checkpoint_that_can_not_be_written_leaves_the_older_one_to_resume_from() {
    let tmp = tempfile::tempdir().unwrap();
    let args = |more: &'static str| format!("train smoke --set train.steps=20 --set eval.every=0 --set sample.count=0 --run-dir {more}");
    let words = |s: &str| s.split(' ').map(String::from).collect::<Vec<_>>();
    run(tmp.path(), &words(&args("whole")).iter().map(String::as_str).collect::<Vec<_>>());
    let kib = std::fs::metadata(tmp.path().join("whole/checkpoints/step-00000020/model.safetensors")).unwrap().len() / 1024;
    // files may not grow beyond a part of the model's; past that, writing fails as on a full disk (EFBIG instead of a signal)
    let shell = |limit: u64, what: &str| {
        let line = format!("trap '' XFSZ; ulimit -f {}; exec {} {what}", limit * 2, env!("CARGO_BIN_EXE_tidegate"));
        Command::new("sh").args(["-c", &line]).current_dir(tmp.path()).output().unwrap()
    };
    let o = shell(1 << 20, &args("cut --set checkpoint.every=7"));
    assert!(o.status.success());
    std::fs::remove_dir_all(tmp.path().join("cut/checkpoints/step-00000020")).unwrap();
    let before = weights(&tmp.path().join("cut"), 14);
    let o = shell(kib / 2, &args("cut --resume"));
    let e = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(1), "{e}");
    assert!(e.contains("model.safetensors") && e.contains("too large"), "{e}");
    let left: Vec<String> =
        std::fs::read_dir(tmp.path().join("cut/checkpoints")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    assert!(left.contains(&"step-00000014".into()) && left.iter().all(|n| n.starts_with("step-")), "{left:?}");
    assert!(weights(&tmp.path().join("cut"), 14) == before);
    assert!(shell(1 << 20, &args("cut --resume")).status.success());
    assert!(weights(&tmp.path().join("cut"), 20) == weights(&tmp.path().join("whole"), 20));
    assert_eq!(losses(&tmp.path().join("cut")), losses(&tmp.path().join("whole")));
}

/// Whole commands on a GPU's kernels, by their emulator.
#[test]
fn a_run_on_a_device_is_resumed_scored_and_written_with_anywhere() {
    if let Err(e) = cuda::emulator() {
        return eprintln!("SKIPPED: {e}");
    }
    let tmp = tempfile::tempdir().unwrap();
    let sets = ["train.steps=2", "data.batch=1", "data.seq_len=16", "model.num_hidden_layers=4", "sample.count=0", "data.held_out=0.0002"];
    let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
    let o = run(tmp.path(), &[&["train", "smoke", "--device", "emulated", "--run-dir", "r"], &sets[..]].concat());
    let (stdout, stderr) = (String::from_utf8(o.stdout).unwrap(), String::from_utf8(o.stderr).unwrap());
    assert!(stderr.contains("emulator, computing in bf16"), "{stderr}");
    let held_out = stdout.lines().find(|l| l.starts_with("held out:")).unwrap_or_else(|| panic!("{stdout}")).to_string();
    let metrics = std::fs::read_to_string(tmp.path().join("r/metrics.jsonl")).unwrap();
    assert!(metrics.contains("\"device_memory\":"), "{metrics}");
    // it goes on as it began, in bf16, and on the CPU too
    let o = run(tmp.path(), &["train", "--run-dir", "r", "--resume", "--device", "cpu", "--set", "train.steps=3"]);
    assert!(String::from_utf8_lossy(&o.stderr).contains("cpu, computing in bf16"));
    assert_eq!(losses(&tmp.path().join("r")).len(), 3);
    let e = run(tmp.path(), &["eval", "r/checkpoints/step-00000002", "--device", "emulated"]);
    assert_eq!(String::from_utf8(e.stdout).unwrap().trim(), held_out.trim());
    let write = |args: &[&str]| run(tmp.path(), &[&["generate", "r", "--prompt", "Call", "--tokens", "3"], args].concat()).stdout.len();
    assert!(write(&["--device", "emulated"]) > 4 && write(&["--device", "cpu", "--dtype", "f32"]) > 4);
}
