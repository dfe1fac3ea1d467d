//! `tidegate generate`: one text, many side by side, stop strings, conversations.

use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn run(dir: &Path, args: &[&str], input: &str) -> Output {
    let mut tidegate = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    let piped = tidegate.args(args).current_dir(dir).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}
fn text(dir: &Path, args: &[&str], input: &str) -> String {
    let o = run(dir, &[&["generate", "r", "--device", "cpu", "--tokens", "40"], args].concat(), input);
    assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}
fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn texts_as_one_would_have_them() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let o = run(dir, &["train", "smoke", "--run-dir", "r", "--set", "train.steps=20", "--device", "cpu"], "");
    assert!(o.status.success(), "{}", String::from_utf8_lossy(&o.stderr));
    let greedy = ["--temperature", "0"];
    let prompts = ["Call me Ishmael.", "T", "é", "The whale, which was larger than any that had been seen"];
    let alone: Vec<String> = prompts.map(|p| text(dir, &[&greedy[..], &["--prompt", p]].concat(), "")).into();
    assert!(prompts.iter().zip(&alone).all(|(p, t)| t.starts_with(p) && t.ends_with('\n')));

    // side by side, in groups, from flags and from files
    std::fs::write(dir.join("p.txt"), prompts.join("\n") + "\n\n").unwrap();
    let jsonl: String = prompts.iter().map(|p| format!("{}\n", serde_json::json!({ "prompt": p, "other": 1 }))).collect();
    std::fs::write(dir.join("p.jsonl"), jsonl).unwrap();
    let flags: Vec<&str> = prompts.iter().flat_map(|p| ["--prompt", p]).collect();
    for from in [&flags[..], &["--prompts", "p.txt"], &["--prompts", "p.jsonl", "--batch", "3"]] {
        let rows = lines(&text(dir, &[&greedy[..], from, &["--json"]].concat(), ""));
        assert_eq!(rows.len(), 4, "{from:?}");
        for (i, (row, alone)) in rows.iter().zip(&alone).enumerate() {
            assert_eq!((row["index"].as_u64(), row["ended"].as_str(), row["tokens"].as_u64()), (Some(i as u64), Some("length"), Some(40)));
            assert_eq!(format!("{}{}\n", row["prompt"].as_str().unwrap(), row["text"].as_str().unwrap()), *alone);
        }
        let plain = text(dir, &[&greedy[..], from].concat(), "");
        assert!(plain.starts_with("=== 1 of 4: \"Call me Ishmael.\"\n") && alone.iter().all(|t| plain.contains(t.as_str())), "{plain}");
    }
    // one prompt twice is two texts, and a seed gives the same ones again
    let twice = || lines(&text(dir, &["--prompt", "A", "--prompt", "A", "--seed", "5", "--json"], ""));
    assert_eq!(twice(), twice());
    assert_ne!(twice()[0]["text"], twice()[1]["text"]);
    assert_eq!(format!("A{}\n", twice()[0]["text"].as_str().unwrap()), text(dir, &["--prompt", "A", "--seed", "5"], ""));

    // a text ends before the first stop, wherever it stands
    let rest = &alone[0][prompts[0].len()..alone[0].len() - 1];
    let at = rest.char_indices().nth(9).unwrap().0;
    let stop: String = rest[at..].chars().take(3).collect();
    let want = &rest[..rest.find(&stop).unwrap()];
    let row = &lines(&text(dir, &[&greedy[..], &["--prompt", prompts[0], "--stop", "no such", "--stop", &stop, "--json"]].concat(), ""))[0];
    assert_eq!((row["text"].as_str().unwrap(), row["ended"].as_str()), (want, Some("stop")));
    assert_eq!(text(dir, &[&greedy[..], &["--prompt", prompts[0], "--stop", &stop]].concat(), ""), format!("{}{want}\n", prompts[0]));

    talks(dir);
    states(dir);
}

/// Each turn is written on top of the turns before it.
fn talks(dir: &Path) {
    let o = run(dir, &["generate", "r", "--chat", "--prompt", "Hi"], "");
    let said = String::from_utf8_lossy(&o.stderr);
    assert!(o.status.code() == Some(2) && said.contains("has no chat template"), "{said}");
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    std::fs::write(dir.join("r/chat_template.jinja"), template).unwrap();
    let how = ["--temperature", "0", "--stop", "\\n", "--chat", "--system", "Be brief"];
    let turns = text(dir, &how, "Hi\n\nBye\n");
    let (first, second) = turns.trim_end_matches('\n').split_once('\n').unwrap();
    let plain = |prompt: &str| {
        let t = text(dir, &["--temperature", "0", "--stop", "\\n", "--prompt", prompt], "");
        t[prompt.len()..].trim_end_matches('\n').to_string()
    };
    let begin = "<system>Be brief\n<user>Hi\n<assistant>";
    assert_eq!(first, plain(begin));
    assert_eq!(second, plain(&format!("{begin}{first}\n<user>Bye\n<assistant>")));
    let row = &lines(&text(dir, &[&how[..], &["--prompt", "Hi", "--json"]].concat(), ""))[0];
    assert_eq!((row["prompt"].as_str(), row["text"].as_str()), (Some("Hi"), Some(first)));
}

#[test]
fn what_is_no_prompt_is_said() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    std::fs::write(dir.join("empty.txt"), "\n \n").unwrap();
    std::fs::write(dir.join("bad.jsonl"), "{\"prompt\": \"a\"}\n{\"text\": 3}\n").unwrap();
    std::fs::write(dir.join("none.jsonl"), "{").unwrap();
    for (args, code, words) in [
        (&["--prompts", "nowhere.txt"][..], 1, "nowhere.txt"),
        (&["--prompts", "empty.txt"], 1, "holds no prompt"),
        (&["--prompts", "bad.jsonl"], 1, "line 2: expected {\"prompt\""),
        (&["--prompts", "none.jsonl"], 1, "line 1: is no JSON"),
        (&["--prompts", "empty.txt", "--prompt", "a"], 2, "cannot be used with"),
        (&["--stop", ""], 2, "--stop"),
        (&["--system", "a"], 2, "--chat"),
        (&["--batch", "0"], 2, "at least 1"),
        (&["--chat", "--json"], 2, "--json writes a line for each text"),
    ] {
        let o = run(dir, &[&["generate", "r"], args].concat(), "");
        let said = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.code() == Some(code) && said.contains(words) && !said.contains("panicked"), "{args:?}: {said}");
    }
}

/// What was read is kept, and gone on from as if it had been read now.
fn states(dir: &Path) {
    let prompt = "The whale, which was larger than any that had been seen";
    let whole = text(dir, &["--prompt", prompt, "--seed", "3"], "");
    assert_eq!(text(dir, &["--prompt", prompt, "--seed", "3", "--save-state", "s"], ""), whole);
    let rest = &whole[prompt.len()..];
    assert_eq!(text(dir, &["--load-state", "s", "--seed", "3"], ""), rest);
    // read alone, from a file
    std::fs::write(dir.join("prompt"), prompt).unwrap();
    let o = run(dir, &["generate", "r", "--device", "cpu", "--prompt-file", "prompt", "--tokens", "0", "--save-state", "s2"], "");
    assert!(o.status.success() && o.stdout == format!("{prompt}\n").into_bytes());
    assert!(std::fs::read(dir.join("s2")).unwrap() == std::fs::read(dir.join("s")).unwrap());
    // several texts from one, and one from several prompts on top of it
    let rows = lines(&text(dir, &["--load-state", "s", "--samples", "3", "--seed", "3", "--json"], ""));
    assert!(rows.len() == 3 && format!("{}\n", rows[0]["text"].as_str().unwrap()) == rest && rows[1]["text"] != rows[2]["text"], "{rows:?}");
    for more in [" And", " But so"] {
        let how = ["--temperature", "0", "--prompt"];
        let want = text(dir, &[&how[..], &[&format!("{prompt}{more}")]].concat(), "");
        assert_eq!(format!("{prompt}{}", text(dir, &[&["--load-state", "s"], &how[..], &[more]].concat(), "")), want);
    }

    // another model, which is meant for less than it reads
    let train = ["train", "smoke", "--run-dir", "q", "--set", "train.steps=1", "--set", "model.max_position_embeddings=64", "--device", "cpu"];
    assert!(run(dir, &train, "").status.success());
    let fails = |args: &[&str], code: i32, words: &[&str]| {
        let o = run(dir, &[&["generate"], args].concat(), "");
        let said = String::from_utf8_lossy(&o.stderr).into_owned();
        assert!(o.status.code() == Some(code) && words.iter().all(|w| said.contains(w)), "{args:?}: {said}");
    };
    fails(&["q", "--load-state", "s"], 1, &["s: is of another model", "`max_position_embeddings` is 32768 there and 64 here"]);
    fails(&["r", "--load-state", "prompt"], 1, &["prompt", "safetensors"]);
    fails(&["r", "--load-state", "nowhere"], 1, &["nowhere"]);
    fails(&["r", "--save-state", "none/s"], 2, &["--save-state none/s", "does not exist"]);
    fails(&["r", "--save-state", "."], 2, &["--save-state", "folder"]);
    fails(&["r", "--save-state", "s", "--prompt", "A", "--prompt", "B"], 2, &["--save-state", "one prompt, found 2"]);
    fails(&["r", "--save-state", "s", "--chat"], 2, &["--chat"]);
    let long = run(dir, &["generate", "q", "--device", "cpu", "--prompt-file", "prompt", "--tokens", "10"], "");
    let said = String::from_utf8_lossy(&long.stderr);
    assert!(long.status.success() && said.contains("55 tokens to read and up to 10 to write are more than the 64"), "{said}");
    let short = run(dir, &["generate", "q", "--device", "cpu", "--prompt-file", "prompt", "--tokens", "9"], "");
    assert!(!String::from_utf8_lossy(&short.stderr).contains("more than"));
}
