//! The command line as a person meets it: usage, messages and exit codes.

use std::path::Path;
use std::process::{Command, Output};

fn tidegate(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).current_dir(dir).output().unwrap()
}
fn fails(args: &[&str], code: i32, words: &[&str]) {
    let tmp = tempfile::tempdir().unwrap();
    let o = tidegate(tmp.path(), args);
    let e = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(code), "{args:?}: {e}");
    assert!(words.iter().all(|w| e.contains(w)), "{args:?}: {e}");
    assert!(!e.contains("panicked"));
}

#[test]
fn wrong_usage_ends_with_two() {
    fails(&[], 2, &["Usage"]);
    fails(&["tarin"], 2, &["train"]);
    fails(&["train"], 2, &["quickstart"]);
    fails(&["train", "smok"], 2, &["did you mean `smoke`"]);
    fails(&["train", "smoke", "--set", "optim.lrr=1"], 2, &["unknown key `optim.lrr`", "did you mean `optim.lr`"]);
    fails(&["train", "smoke", "--set", "data.batch=x"], 2, &["data.batch", "expected"]);
    fails(&["train", "smoke", "--set", "train.steps=1", "--set", "train.minutes=1"], 2, &["one budget"]);
    fails(&["train", "smoke", "--bogus"], 2, &["--bogus"]);
    fails(&["train", "nowhere.toml"], 2, &["nowhere.toml"]);
    fails(&["train", "smoke", "--resume", "nowhere"], 2, &["nowhere does not exist"]);
    fails(&["generate", "nowhere"], 2, &["nowhere does not exist"]);
    fails(&["generate", "nowhere", "--top-p", "2"], 2, &["--top-p"]);
    fails(&["generate", "nowhere", "--temperature=-1"], 2, &["--temperature"]);
    for (option, value, words) in [
        ("--tokens", "18446744073709551615", "at most 1048576"),
        ("--tokens", "-3", "whole number"),
        ("--tokens", "x", "whole number"),
        ("--top-k", "-1", "whole number"),
        ("--seed", "1.5", "whole number"),
        ("--temperature", "-1", "not negative"),
        ("--temperature", "nan", "found NaN"),
        ("--top-p", "0", "above 0"),
        ("--prompt", "", "at least one byte"),
    ] {
        fails(&["generate", "nowhere", option, value], 2, &[option, words]);
    }
    fails(&["train", "smoke", "--set", "=3"], 2, &["unknown key ``"]);
    fails(&["eval", "nowhere"], 2, &["nowhere does not exist"]);
    for (set, word) in [
        ("train.accumulate=9223372036854775807", "train.accumulate"),
        ("sample.prompt=", "sample.prompt"),
        ("optim.lr=nan", "optim.lr = NaN"),
        ("model.num_attention_heads=3", "num_key_value_heads"),
        ("model.linear_num_value_heads=3", "linear_num_key_heads"),
        ("model.head_dim=7", "head_dim"),
    ] {
        fails(&["train", "smoke", "--set", set], 2, &[word]);
    }
    fails(&["train", "smoke", "--set", "data.path=2024"], 1, &["data 2024: not found"]);
}

#[test]
#[cfg(target_os = "linux")]
fn results_that_can_not_be_written_are_an_error() {
    let tmp = tempfile::tempdir().unwrap();
    let quick = ["train", "smoke", "--run-dir", "r", "--set", "train.steps=1", "--set", "data.held_out=0.002"];
    assert!(tidegate(tmp.path(), &quick).status.success());
    for args in [&["generate", "r", "--tokens", "3"][..], &["eval", "r"], &["doctor"], &["train", "smoke", "--print-config"]] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let o = Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).current_dir(tmp.path()).stdout(full).output().unwrap();
        let e = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.code() == Some(1) && e.contains("stdout"), "{args:?}: {e}");
        // a reader that goes away has seen enough
        let line = format!("{} {} | true; exit ${{PIPESTATUS[0]}}", env!("CARGO_BIN_EXE_tidegate"), args.join(" "));
        assert!(Command::new("bash").args(["-c", &line]).current_dir(tmp.path()).status().unwrap().success(), "{args:?}");
    }
}

#[test]
fn tokens_that_are_no_bytes_are_not_written_as_text() {
    let tmp = tempfile::tempdir().unwrap();
    let tokens: Vec<u32> = (0..3000).map(|i| i * i % 1000).collect();
    train::data::write_shard(&tmp.path().join("t.bin"), &tokens, 1000, None).unwrap();
    let set = ["--set", "data.path=t.bin", "--set", "model.vocab_size=1000", "--set", "train.steps=1", "--run-dir", "r"];
    assert!(tidegate(tmp.path(), &[&["train", "smoke"][..], &set].concat()).status.success());
    let o = tidegate(tmp.path(), &["generate", "r"]);
    let e = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.code() == Some(2) && o.stdout.is_empty() && e.contains("1000 tokens") && e.contains("no tokenizer"), "{e}");
    assert!(tidegate(tmp.path(), &["eval", "r"]).status.success());
    // a vocabulary of bytes with room to spare is one of bytes
    let spare = ["train", "smoke", "--set", "model.vocab_size=300", "--set", "train.steps=1", "--set", "data.held_out=0.002", "--run-dir", "b"];
    assert!(tidegate(tmp.path(), &spare).status.success());
    let o = tidegate(tmp.path(), &["generate", "b", "--prompt", "Call", "--tokens", "9"]);
    assert!(o.status.success() && o.stdout.starts_with(b"Call"));
}

#[test]
fn bad_data_ends_with_one() {
    fails(&["train", "smoke", "--set", "data.path=nowhere.txt"], 1, &["nowhere.txt", "not found"]);
    let tmp = tempfile::tempdir().unwrap();
    std::fs::write(tmp.path().join("x.txt"), b"fine \xc3(").unwrap();
    let o = tidegate(tmp.path(), &["train", "smoke", "--set", "data.path=x.txt"]);
    let e = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.code() == Some(1) && e.contains("byte offset 5"), "{e}");
    assert!(!tmp.path().join("runs").exists(), "nothing is left behind by a run that never began");
}

#[test]
fn help_version_doctor_and_config() {
    let tmp = tempfile::tempdir().unwrap();
    for (args, words) in [
        (&["--help"][..], &["Examples", "Exit codes: 0 done, 1 failed, 2 wrong usage"][..]),
        (&["train", "--help"], &["--set train.minutes=0.5", "train.tokens", "bit for bit"]),
        (&["generate", "--help"], &["--top-p"]),
        (&["eval", "--help"], &["--data"]),
        (&["doctor", "--help"], &["Usage"]),
        (&["--version"], &["tidegate "]),
        (&["doctor"], &["ok "]),
    ] {
        let o = tidegate(tmp.path(), args);
        let text = String::from_utf8_lossy(&o.stdout);
        assert!(words.iter().all(|w| text.contains(w)), "{args:?}: {text}");
        assert!(o.status.success() && !o.stdout.is_empty(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
    }
    let doctor = String::from_utf8(tidegate(tmp.path(), &["doctor"]).stdout).unwrap();
    assert!(["vectors", "threads", "ok       matmul"].iter().all(|w| doctor.contains(w)), "{doctor}");
    std::fs::write(tmp.path().join("mine.toml"), "preset = \"smoke\"\n[train]\nsteps = 7\n").unwrap();
    let o = tidegate(tmp.path(), &["train", "mine.toml", "--set", "optim.lr=0.25", "--print-config"]);
    let text = String::from_utf8(o.stdout).unwrap();
    assert!(text.starts_with("# 209832 parameters, ") && text.contains(" MFLOP a token, forward and backward, at 64 tokens a window"), "{text}");
    for (key, source) in
        [("train.steps = 7", "# mine.toml"), ("optim.lr = 0.25", "# --set"), ("data.seq_len = 64", "# preset"), ("name = \"mine\"", "# preset")]
    {
        assert!(text.lines().any(|l| l.starts_with(key) && l.contains(source)), "{key} in {text}");
    }
    // what is printed is a configuration itself
    std::fs::write(tmp.path().join("again.toml"), &text).unwrap();
    let o = tidegate(tmp.path(), &["train", "again.toml", "--print-config"]);
    let again = String::from_utf8(o.stdout).unwrap();
    let values = |t: &str| t.lines().map(|l| l.split(" #").next().unwrap_or_default().trim().to_string()).collect::<Vec<_>>();
    assert_eq!(values(&again)[2..], values(&text)[2..]);
    // a text in the place of a preset or a TOML file
    std::fs::write(tmp.path().join("novel.txt"), "Call me Ishmael.").unwrap();
    for what in ["novel.txt", "."] {
        let o = tidegate(tmp.path(), &["train", what]);
        let e = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.code() == Some(2) && e.contains(&format!("--set data.path={what}")), "{e}");
    }
    std::fs::write(tmp.path().join("bad.toml"), "[train]\nstesp = 7\n").unwrap();
    let o = tidegate(tmp.path(), &["train", "bad.toml", "--print-config"]);
    let e = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.code() == Some(2) && e.contains("bad.toml") && e.contains("train.steps"), "{e}");
}

#[test]
fn a_run_becomes_a_folder_for_others() {
    let tmp = tempfile::tempdir().unwrap();
    let text = include_str!("../../data/moby-dick.txt");
    std::fs::write(tmp.path().join("t.txt"), &text[..text.floor_char_boundary(60_000)]).unwrap();
    let run = |args: &[&str]| {
        let o = tidegate(tmp.path(), args);
        assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
        String::from_utf8(o.stdout).unwrap()
    };
    let fails = |args: &[&str], code: i32, words: &[&str]| {
        let o = tidegate(tmp.path(), args);
        let e = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.code() == Some(code) && words.iter().all(|w| e.contains(w)) && o.stdout.is_empty(), "{args:?}: {e}");
    };
    run(&["tokenize", "train", "t.txt", "--vocab-size", "300", "--out", "t.json"]);
    run(&["tokenize", "encode", "t.txt", "--tokenizer", "t.json", "--out", "t.tokens"]);
    run(&["train", "smoke", "--set", "data.path=t.tokens", "--set", "model.vocab_size=300", "--set", "train.steps=1", "--run-dir", "r"]);
    let line = run(&["convert", "r", "a", "--dtype", "bf16", "--max-shard-size", "100KB"]);
    assert!(line.starts_with("a: ") && line.contains("parameters in bf16") && line.contains("step-00000001"), "{line}");
    let read = |name: &str| std::fs::read(tmp.path().join(name)).unwrap();
    assert_eq!(read("a/tokenizer.json"), read("t.json"));
    let json = |name: &str| serde_json::from_slice::<serde_json::Value>(&read(name)).unwrap();
    assert_eq!((&json("a/config.json")["dtype"], &json("a/generation_config.json")["eos_token_id"]), (&"bfloat16".into(), &0.into()));
    assert_eq!(json("a/tokenizer_config.json")["eos_token"], "<|endoftext|>");
    let files = || std::fs::read_dir(tmp.path().join("a")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>();
    assert!(files().iter().filter(|f| f.starts_with("model-0000")).count() > 2 && !files().contains(&"model.safetensors".into()));
    // what was written is read again, and what was written in f32 is what was trained
    run(&["generate", "a", "--tokens", "3"]);
    run(&["convert", "r/checkpoints/step-00000001", "b"]);
    let own = json("r/checkpoints/step-00000001/config.json");
    assert_eq!(json("b/config.json"), own);
    assert_eq!(read("b/model.safetensors"), read("r/checkpoints/step-00000001/model.safetensors"));
    assert_eq!(run(&["generate", "r", "--tokens", "9"]), run(&["generate", "b", "--tokens", "9"]));
    // nothing is written over that nobody asked for
    fails(&["convert", "r", "a"], 2, &["a isn't empty", "--force"]);
    fails(&["convert", "a", "r", "--force"], 2, &["r belongs to a run"]);
    fails(&["convert", "a", "r/checkpoints/step-00000001", "--force"], 2, &["belongs to a run"]);
    fails(&["convert", "a", "t.txt", "--force"], 2, &["t.txt is a file"]);
    fails(&["convert", "nowhere", "c"], 2, &["nowhere does not exist"]);
    fails(&["convert", "a", "c", "--dtype", "f64"], 2, &["--dtype", "f32, bf16 or f16"]);
    fails(&["convert", "a", "c", "--max-shard-size", "5gb"], 2, &["--max-shard-size", "5GB"]);
    assert!(!tmp.path().join("c").exists());
    // another model takes all of the folder's model, its tokenizer too, and nothing else
    std::fs::write(tmp.path().join("a/notes.txt"), "mine").unwrap();
    run(&["train", "smoke", "--set", "train.steps=1", "--set", "data.held_out=0.002", "--run-dir", "bytes"]);
    run(&["convert", "bytes", "a", "--force"]);
    let mut left = files();
    left.sort();
    assert_eq!(left, ["config.json", "model.safetensors", "notes.txt"]);
    assert!(run(&["generate", "a", "--prompt", "Call", "--tokens", "9"]).starts_with("Call"));
    // a damaged checkpoint is no model
    let path = tmp.path().join("bytes/checkpoints/step-00000001/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    fails(&["convert", "bytes", "c"], 1, &["model.safetensors is damaged"]);
}

#[test]
fn a_dry_run_tells_sizes_and_takes_nothing() {
    let tmp = tempfile::tempdir().unwrap();
    let set = ["--set", "model.num_experts=16000000", "--set", "model.attention_gate.granularity=headwise"];
    for (more, words) in [(&[][..], "parameters  15577227264 in all, 1987682304 active"), (&set, "attention_gate 1572864")] {
        let o = tidegate(tmp.path(), &[&["train", "qwen3-15a2b", "--dry-run"], more].concat());
        let (text, e) = (String::from_utf8_lossy(&o.stdout), String::from_utf8_lossy(&o.stderr));
        assert!(o.status.success() && text.contains(words) && text.contains("FLOP") && text.contains("GiB"), "{text}{e}");
        assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 0);
    }
    fails(&["train", "qwen3-15a2b", "--dry-run", "--set", "model.dense_gate.granularity=headwise"], 2, &["dense_gate", "no heads"]);
    fails(&["train", "qwen3-15a2b", "--dry-run", "--set", "model.value_gate.op=add"], 2, &["value_gate.granularity", "none"]);
}

#[test]
fn a_run_says_what_is_composed_and_what_it_costs() {
    let tmp = tempfile::tempdir().unwrap();
    let said = |more: &[&str]| {
        let o = tidegate(
            tmp.path(),
            &[&["train", "smoke", "--set", "train.steps=1", "--set", "data.held_out=0.002", "--set", "sample.count=0"], more].concat(),
        );
        assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
        String::from_utf8_lossy(&o.stderr).lines().filter(|l| l.contains("composed")).map(String::from).collect::<Vec<_>>()
    };
    assert!(said(&[]).is_empty());
    let lines = said(&["--set", "model.value_gate.granularity=elementwise"]);
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("value_gate is composed of elementwise operations: "), "{lines:?}");
}
