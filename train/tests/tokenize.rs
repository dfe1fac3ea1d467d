//! `tidegate tokenize`, and training on what it writes.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use train::data::{Corpus, Manifest};

const OWN: &str = include_str!("tokens/own.json");

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    c.args(args).current_dir(dir);
    c
}
fn run(dir: &Path, args: &[&str]) -> String {
    let o = command(dir, args).output().unwrap();
    assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}
fn fails(dir: &Path, args: &[&str], code: i32, words: &[&str]) {
    let Output { status, stderr, .. } = command(dir, args).output().unwrap();
    let e = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(code), "{args:?}: {e}");
    assert!(words.iter().all(|w| e.contains(w)) && !e.contains("panicked"), "{args:?}: {words:?} in {e}");
}
fn moby_dick() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/moby-dick.txt")
}
/// A tokenizer of 1024 tokens, t.json.
fn tokenizer(dir: &Path) {
    run(dir, &["tokenize", "train", moby_dick().to_str().unwrap(), "--vocab-size", "1024", "--out", "t.json"]);
}
fn encode<'a>(inputs: &[&'a str], out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["tokenize", "encode", "--tokenizer", "t.json", "--out", out], inputs, more].concat()
}
fn manifest(dir: &Path) -> Manifest {
    serde_json::from_str(&std::fs::read_to_string(dir.join("manifest.json")).unwrap()).unwrap()
}
fn tokens(corpus: &Corpus) -> Vec<u32> {
    let mut out = vec![];
    corpus.read(0..corpus.len(), &mut out);
    out
}
/// Every file of a folder but the lock, by name.
fn content(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut all: Vec<_> = names.filter(|n| n != ".lock").map(|n| (n.clone(), std::fs::read(dir.join(n)).unwrap())).collect();
    all.sort();
    all
}

#[test]
fn a_trained_tokenizer_is_that_of_the_python_library() {
    let tmp = tempfile::tempdir().unwrap();
    tokenizer(tmp.path());
    let golden: Value = serde_json::from_str(OWN).unwrap();
    let t = train::text::tokenizer::Tokenizer::open(&tmp.path().join("t.json")).unwrap();
    let names: Vec<String> = serde_json::from_value(golden["vocabulary"].clone()).unwrap();
    assert_eq!(t.vocab_size(), names.len());
    for (i, name) in names.iter().enumerate() {
        assert_eq!(t.token(name), Some(i as u32));
    }
    let texts: Vec<String> = serde_json::from_str(include_str!("tokens/texts.json")).unwrap();
    let ids: Vec<Vec<u32>> = serde_json::from_value(golden["ids"].clone()).unwrap();
    assert_eq!(texts.len(), ids.len());
    let codec = train::text::Codec::Tokenizer(t.into());
    for (text, ids) in texts.iter().zip(&ids) {
        assert_eq!(codec.encode(text).unwrap(), *ids, "{text:?}");
        assert_eq!(codec.decode(ids), *text);
    }
    let book = moby_dick();
    // the same from a thread more or less, and never over another's work
    for threads in ["1", "3"] {
        let args = ["tokenize", "train", book.to_str().unwrap(), "--vocab-size", "1024", "--out", threads];
        assert!(command(tmp.path(), &args).env("RAYON_NUM_THREADS", threads).status().unwrap().success());
        assert_eq!(std::fs::read(tmp.path().join(threads)).unwrap(), std::fs::read(tmp.path().join("t.json")).unwrap());
    }
    fails(tmp.path(), &["tokenize", "train", moby_dick().to_str().unwrap(), "--vocab-size", "1024", "--out", "t.json"], 2, &["t.json exists"]);
    // the whole book, cut into parts, has the tokens that it has at once
    run(tmp.path(), &encode(&[moby_dick().to_str().unwrap()], "o", &[]));
    let corpus = Corpus::open(&tmp.path().join("o"), None).unwrap();
    assert_eq!(corpus.len() as u64, golden["moby_dick"][0].as_u64().unwrap() + 1);
    assert_eq!(corpus.fingerprint().hash, golden["moby_dick"][1].as_u64().unwrap());
}

#[test]
fn documents_become_shards_whatever_the_threads_and_interruptions() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    tokenizer(dir);
    let book = std::fs::read_to_string(moby_dick()).unwrap();
    std::fs::create_dir_all(dir.join("in/sub")).unwrap();
    // long documents with and without lines, a literal end of text, empty ones, and many small ones
    std::fs::write(dir.join("in/a.txt"), &book).unwrap();
    std::fs::write(dir.join("in/b.txt"), "").unwrap();
    std::fs::write(dir.join("in/sub/c.md"), book[..700_000].replace('\n', " ")).unwrap();
    let lines = ["<|endoftext|> is text", "", "日本語のテキスト", &book[5000..600_000]];
    let mut jsonl: String = lines.iter().map(|t| serde_json::json!({"text": t, "id": 1}).to_string() + "\n").collect();
    jsonl.insert(jsonl.find('\n').unwrap(), '\n');
    (0..200).for_each(|i| jsonl += &format!("{{\"text\": \"document {i}\"}}\r\n"));
    std::fs::write(dir.join("in/d.jsonl"), jsonl).unwrap();
    let few = ["--shard-tokens", "100003"];
    let said = run(dir, &encode(&["in"], "o", &few));
    let m = manifest(&dir.join("o"));
    assert!(m.complete && m.documents == 2 + 3 + 200 && m.dtype == "uint16" && m.vocab_size == 1024 && m.eot == 0);
    assert!(said.contains(&format!("{:.4} bytes per token", m.bytes_per_token)) && m.bytes_per_token == m.bytes as f64 / m.tokens as f64, "{said}");
    assert!(m.shards.len() > 5 && m.shards.iter().rev().skip(1).all(|s| s.tokens == 100_003));

    // what comes out is what went in, in the folder's order
    let corpus = Corpus::open(&dir.join("o"), None).unwrap();
    let all = tokens(&corpus);
    let codec = corpus.codec().unwrap();
    let documents: Vec<String> = all.split_inclusive(|&t| t == m.eot).map(|d| codec.decode(&d[..d.len() - 1])).collect();
    let mut expected = vec![book.clone(), lines[0].into(), lines[2].into(), lines[3].into()];
    expected.extend((0..200).map(|i| format!("document {i}")));
    expected.push(book[..700_000].replace('\n', " "));
    assert!(documents == expected && all.last() == Some(&m.eot));
    assert_eq!(corpus.text_bytes(0..corpus.len()), Some(m.bytes));
    assert_eq!(m.bytes, expected.iter().map(String::len).sum::<usize>() as u64);
    let half = corpus.len() / 2;
    assert_eq!(corpus.text_bytes(half..corpus.len()).unwrap() + corpus.text_bytes(0..half).unwrap(), m.bytes);
    // a range over shards' bounds
    let mut part = vec![];
    corpus.read(99_990..300_020, &mut part);
    assert_eq!(part, all[99_990..300_020]);

    for threads in ["1", "5"] {
        assert!(command(dir, &encode(&["in"], threads, &few)).env("RAYON_NUM_THREADS", threads).status().unwrap().success());
        assert!(content(&dir.join(threads)) == content(&dir.join("o")));
    }
    // cut short after each of some numbers of shards, and with a shard of which only a part was written
    for n in [0, 1, 4, m.shards.len() - 1] {
        let mut cut = m.clone();
        cut.complete = false;
        let dropped = cut.shards.split_off(n);
        (cut.bytes, cut.tokens, cut.documents, cut.bytes_per_token) = (7, 7, 7, 0.0);
        std::fs::write(dir.join("1/manifest.json"), serde_json::to_string(&cut).unwrap()).unwrap();
        dropped.iter().for_each(|s| std::fs::remove_file(dir.join("1").join(&s.file)).unwrap());
        std::fs::write(dir.join(format!("1/{}.tmp", dropped[0].file)), b"half").unwrap();
        fails(dir, &["train", "smoke", "--set", "data.path=1", "--set", "model.vocab_size=1024"], 1, &["is not filled yet", &format!("{n} shards")]);
        run(dir, &encode(&["in"], "1", &few));
        assert!(content(&dir.join("1")) == content(&dir.join("o")), "{n}");
    }
    // a finished folder stays as it is; a damaged shard is done again, with those after it
    run(dir, &encode(&["in"], "1", &few));
    let mut bytes = std::fs::read(dir.join("1/shard-00003.bin")).unwrap();
    bytes[5000] ^= 1;
    std::fs::write(dir.join("1/shard-00003.bin"), bytes).unwrap();
    run(dir, &encode(&["in"], "1", &few));
    assert!(content(&dir.join("1")) == content(&dir.join("o")));

    // other input, settings or tokenizers are errors that say so
    fails(dir, &encode(&["in"], "1", &[]), 2, &["shards of 100003 tokens", "now it is 100000000"]);
    fails(dir, &encode(&["in/a.txt"], "1", &few), 2, &["4 files then, 1 now"]);
    std::fs::write(dir.join("in/b.txt"), "x").unwrap();
    fails(dir, &encode(&["in"], "1", &few), 2, &["in/b.txt has changed", "0 bytes then, 1 now"]);
    std::fs::write(dir.join("in/b.txt"), "").unwrap();
    std::fs::rename(dir.join("t.json"), dir.join("u.json")).unwrap();
    run(dir, &["tokenize", "train", "in", "--vocab-size", "300", "--out", "t.json"]);
    fails(dir, &encode(&["in"], "1", &few), 2, &["the tokenizer has changed"]);
    fails(dir, &encode(&["in"], "in", &few), 2, &["isn't empty"]);
    // where the text's special tokens are parsed, they are documents' ends
    std::fs::write(dir.join("s.txt"), "one<|endoftext|>two").unwrap();
    run(dir, &encode(&["s.txt"], "s", &["--parse-special"]));
    assert_eq!(tokens(&Corpus::open(&dir.join("s"), None).unwrap()).iter().filter(|&&t| t == 0).count(), 2);
}

#[test]
fn killed_and_run_again() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    tokenizer(dir);
    std::fs::write(dir.join("x.txt"), std::fs::read_to_string(moby_dick()).unwrap().repeat(8)).unwrap();
    let args = encode(&["x.txt"], "o", &["--shard-tokens", "200000"]);
    let mut kills = 0;
    for _ in 0..50 {
        let mut child = command(dir, &args).stderr(std::process::Stdio::null()).stdout(std::process::Stdio::null()).spawn().unwrap();
        let shards =
            || std::fs::read_dir(dir.join("o")).map_or(0, |d| d.flatten().filter(|e| e.file_name().to_string_lossy().ends_with(".bin")).count());
        let before = shards();
        while child.try_wait().unwrap().is_none() && shards() < before + 3 {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        if child.try_wait().unwrap().is_some() {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
    }
    assert!(kills > 1, "{kills}");
    run(dir, &args);
    run(dir, &encode(&["x.txt"], "once", &["--shard-tokens", "200000"]));
    assert!(content(&dir.join("o")) == content(&dir.join("once")));
}

#[test]
fn training_on_tokens() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    tokenizer(dir);
    run(dir, &encode(&[moby_dick().to_str().unwrap()], "d", &["--shard-tokens", "100000"]));
    let base = [
        "train",
        "smoke",
        "--run-dir",
        "r",
        "--set",
        "data.path=d",
        "--set",
        "train.steps=4",
        "--set",
        "data.held_out=0.01",
        "--set",
        "checkpoint.every=2",
    ];
    fails(dir, &base, 2, &["model.vocab_size", "at least 1024", "found 256", "--set model.vocab_size=1024"]);
    assert!(!dir.join("r").exists());
    let said = run(dir, &[&base[..], &["--set", "model.vocab_size=1024"]].concat());
    let line = said.lines().find(|l| l.starts_with("held out:")).unwrap();
    // bits a token over the tokens are bits a byte over the bytes
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |i: usize| words[i].parse::<f64>().unwrap();
    let (per_token, per_byte, count, bytes) = (number(2), number(6), number(11), number(14));
    assert!(line.contains("bits per token, ") && line.contains("bits per byte over"), "{line}");
    assert!((per_token * count / bytes - per_byte).abs() < 2e-4, "{line}");
    let corpus = Corpus::open(&dir.join("d"), None).unwrap();
    let held_out = corpus.split(0.01).1;
    let (mut held, codec) = (vec![], corpus.codec().unwrap());
    corpus.read(held_out.clone(), &mut held);
    held.retain(|&t| t != 0);
    assert_eq!((count as usize, bytes as u64), (held_out.len(), corpus.text_bytes(held_out.clone()).unwrap()));
    assert!((codec.decode(&held).len() as f64 - bytes).abs() < 4.0);
    assert_eq!(run(dir, &["eval", "r"]).trim(), line);

    assert_eq!(std::fs::read(dir.join("r/tokenizer.json")).unwrap(), std::fs::read(dir.join("t.json")).unwrap());
    assert!(said.contains("generate r --prompt"), "{said}");
    // the run writes with its own tokenizer, when data and vocabulary are gone, and from a checkpoint too
    std::fs::rename(dir.join("d"), dir.join("e")).unwrap();
    std::fs::remove_file(dir.join("t.json")).unwrap();
    for path in ["r", "r/checkpoints/step-00000004"] {
        let o = run(dir, &["generate", path, "--prompt", "Nantucket é👩‍👧", "--tokens", "40"]);
        assert!(o.starts_with("Nantucket é👩‍👧") && o.ends_with('\n'), "{o}");
    }
    fails(dir, &["eval", "r", "--data", moby_dick().to_str().unwrap()], 2, &["tokenize encode", "r/tokenizer.json"]);
    // another tokenizer's tokens are not this run's
    run(dir, &["tokenize", "train", moby_dick().to_str().unwrap(), "--vocab-size", "300", "--out", "t.json"]);
    run(dir, &encode(&[moby_dick().to_str().unwrap()], "d", &[]));
    fails(dir, &["train", "--run-dir", "r", "--resume", "--set", "data.path=d", "--set", "train.steps=5"], 2, &["not by the model's tokenizer"]);
    fails(dir, &["eval", "r", "--data", "d"], 2, &["not by the model's tokenizer"]);
    std::fs::remove_dir_all(dir.join("d")).unwrap();
    std::fs::rename(dir.join("e"), dir.join("d")).unwrap();
    run(dir, &["train", "--run-dir", "r", "--resume", "--set", "train.steps=5"]);
}

#[test]
fn bad_input() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    tokenizer(dir);
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.join(name), bytes).unwrap();
    write("latin.txt", b"caf\xe9 au lait");
    write("empty.txt", b"");
    write("bad.jsonl", b"{\"text\": \"a\"}\n\n{\"txt\": 1}\n");
    write("half.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"b");
    write("x.txt", b"some text");
    write("blank.txt", format!("a{}b", " ".repeat(1_200_000)).as_bytes());
    let json = std::fs::read(dir.join("t.json")).unwrap();
    write("cut.json", &json[..json.len() / 2]);
    write("form.json", b"{\"model\": {\"type\": \"Magic\"}}");
    for (input, code, words) in [
        ("latin.txt", 1, &["latin.txt", "byte offset 3", "0xe9"][..]),
        ("empty.txt", 1, &["empty"]),
        ("bad.jsonl", 1, &["bad.jsonl", "line 3", "text"]),
        ("half.jsonl", 1, &["half.jsonl", "line 2", "EOF"]),
        ("blank.txt", 1, &["blank.txt", "900000 blanks in a row"]),
        ("nowhere", 1, &["nowhere", "not found"]),
    ] {
        fails(dir, &encode(&["x.txt", input][usize::from(input.starts_with("empty"))..], &format!("o-{input}"), &[]), code, words);
        let out = format!("{input}.json");
        let inputs = &["x.txt", input][usize::from(input.starts_with("empty"))..];
        fails(dir, &[&["tokenize", "train", "--vocab-size", "300", "--out", &out], inputs].concat(), code, words);
        assert!(!dir.join(out).exists());
    }
    for (tokenizer, words) in
        [("cut.json", "cut off after"), ("form.json", "can be read"), ("x.txt", "no tokenizer.json"), ("gone.json", "No such file")]
    {
        fails(dir, &["tokenize", "encode", "x.txt", "--tokenizer", tokenizer, "--out", "o"], 1, &[tokenizer, words]);
        assert!(!dir.join("o").exists());
    }
    fails(dir, &encode(&["x.txt"], "o", &["--eot", "<|nothing|>"]), 2, &["<|nothing|>", "t.json"]);
    fails(dir, &encode(&["x.txt"], "o", &["--shard-tokens", "0"]), 2, &["--shard-tokens"]);
    let train = ["tokenize", "train", "x.txt", "--out", "n.json", "--vocab-size"];
    fails(dir, &[&train[..], &["256"]].concat(), 2, &["at least 257"]);
    fails(dir, &[&train[..], &["9999999"]].concat(), 2, &["at most"]);
    fails(dir, &[&train[..], &["300", "--special", "<a>", "--special", "<a>"]].concat(), 2, &["--special", "distinct"]);
    fails(dir, &["tokenize", "train", "x.txt", "--vocab-size", "300", "--out", "no/where.json"], 1, &["no/where.json"]);

    // folders that were damaged
    run(dir, &encode(&[moby_dick().to_str().unwrap()], "o", &["--shard-tokens", "150000"]));
    let message = || Corpus::open(&dir.join("o"), None).unwrap_err().to_string();
    let shard = dir.join("o/shard-00001.bin");
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() - 1000]).unwrap();
    assert!(message().contains("shard-00001.bin") && message().contains("truncated"), "{}", message());
    std::fs::remove_file(&shard).unwrap();
    assert!(message().contains("shard-00001.bin"), "{}", message());
    std::fs::copy(dir.join("o/shard-00003.bin"), &shard).unwrap();
    assert!(message().contains("shard-00001.bin") && message().contains("is not the shard"), "{}", message());
    std::fs::write(&shard, &bytes).unwrap();
    std::fs::write(dir.join("o/tokenizer.json"), &json[1..]).unwrap();
    assert!(message().contains("is not the tokenizer"), "{}", message());
    std::fs::write(dir.join("o/tokenizer.json"), &json).unwrap();
    Corpus::open(&dir.join("o"), None).unwrap();
    let manifest = std::fs::read(dir.join("o/manifest.json")).unwrap();
    std::fs::write(dir.join("o/manifest.json"), &manifest[..100]).unwrap();
    assert!(message().contains("manifest.json") && message().contains("damaged"), "{}", message());
    // a token outside the vocabulary, in the first training step's batch or the held-out part
    std::fs::write(dir.join("o/manifest.json"), &manifest).unwrap();
    let mut high = bytes.clone();
    high[1024..].fill(0x7f);
    std::fs::write(&shard, high).unwrap();
    let set = ["--set", "data.path=o", "--set", "model.vocab_size=1024", "--set", "train.steps=9", "--set", "data.batch=64"];
    fails(dir, &[&["train", "smoke"][..], &set].concat(), 1, &["token 32639 is outside the model's vocabulary of 1024"]);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    tokenizer(dir);
    let args = |out| encode(&[], out, &["--shard-tokens", "100000"]);
    let book = moby_dick();
    let args = |out| [&args(out)[..], &[book.to_str().unwrap()]].concat();
    run(dir, &args("whole"));
    // the third shard's place is a device that is full always
    std::fs::create_dir(dir.join("o")).unwrap();
    std::fs::copy(dir.join("whole/manifest.json"), dir.join("o/manifest.json")).unwrap();
    std::os::unix::fs::symlink("/dev/full", dir.join("o/shard-00002.bin.tmp")).unwrap();
    fails(dir, &args("o"), 1, &["shard-00002.bin", "the disk is full", "same command again"]);
    assert_eq!(manifest(&dir.join("o")).shards.len(), 2);
    std::fs::remove_file(dir.join("o/shard-00002.bin.tmp")).unwrap();
    run(dir, &args("o"));
    assert!(content(&dir.join("o")) == content(&dir.join("whole")));
}
