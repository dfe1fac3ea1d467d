//! Generated tasks as a person meets them: runs of them, and `tidegate eval --task`.

use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Eight steps of the smoke preset on two tasks alone, without a text.
const ALONE: &str = "train smoke --set train.steps=8 --set checkpoint.every=4 --set eval.every=4 --set eval.tokens=600 --set data.path= \
                     --set tasks.share=1 --set tasks.mix.mqar=1 --set tasks.mix.needle=1 --set tasks.mqar.length=[16,40] --set tasks.needle.length=[32]";
/// The same among text.
const AMONG: &str = "train smoke --set train.steps=4 --set checkpoint.every=2 --set eval.every=0 --set eval.tokens=600 --set data.held_out=0.002 --set sample.count=0 \
                     --set tasks.share=0.5 --set tasks.mix.induction=1 --set tasks.induction.length=[24]";

fn tidegate(dir: &Path, line: &str, threads: usize) -> Output {
    let mut c = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    c.args(line.split_whitespace()).current_dir(dir).env("RAYON_NUM_THREADS", threads.to_string());
    c.output().unwrap()
}
fn runs(dir: &Path, line: &str) -> (String, String) {
    let o = tidegate(dir, line, 2);
    let e = String::from_utf8_lossy(&o.stderr).into_owned();
    assert!(o.status.success(), "{line}: {e}");
    (String::from_utf8(o.stdout).unwrap(), e)
}
fn fails(dir: &Path, line: &str, code: i32, words: &[&str]) {
    let o = tidegate(dir, line, 2);
    let e = String::from_utf8_lossy(&o.stderr);
    assert_eq!(o.status.code(), Some(code), "{line}: {e}");
    assert!(words.iter().all(|w| e.contains(w)) && !e.contains("panicked"), "{line}: {e}");
}
fn bytes(run: &Path, step: u64, file: &str) -> Vec<u8> {
    fs::read(run.join(format!("checkpoints/step-{step:08}")).join(file)).unwrap()
}
fn metrics(run: &Path) -> Vec<Value> {
    fs::read_to_string(run.join("metrics.jsonl")).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}
fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_run_of_tasks_is_a_function_of_its_configuration() {
    let tmp = tempfile::tempdir().unwrap();
    let at = |name: &str| tmp.path().join(name);
    let (stdout, stderr) = runs(tmp.path(), &format!("{ALONE} --run-dir whole"));
    assert!(stderr.contains("tasks in 100% of the windows: mqar, needle") && !stderr.contains("data "), "{stderr}");
    assert!(stdout.contains("held-out tasks: ") && stdout.contains("bits per label") && !stdout.contains("bits per byte"), "{stdout}");
    assert!(tidegate(tmp.path(), &format!("{ALONE} --run-dir one"), 1).status.success());
    runs(tmp.path(), &format!("{ALONE} --run-dir cut --set train.steps=4 --set optim.schedule=constant --set optim.warmup=0"));
    runs(tmp.path(), &format!("{ALONE} --run-dir straight --set optim.schedule=constant --set optim.warmup=0"));
    runs(tmp.path(), "train --run-dir cut --resume --set train.steps=8");
    for file in ["model.safetensors", "optimizer.safetensors"] {
        assert!(bytes(&at("whole"), 8, file) == bytes(&at("one"), 8, file), "any number of threads");
        assert!(bytes(&at("straight"), 8, file) == bytes(&at("cut"), 8, file), "resumed as uninterrupted");
    }
    // what is measured of such a run are samples of its tasks
    runs(tmp.path(), "measure whole --only attention");
    let measured = json(&at("whole").join("measures.json"));
    assert!(measured["attention"].is_object() && measured["loss"].as_f64().unwrap() > 0.0, "{measured}");
    let lines = metrics(&at("whole"));
    let evaluated: Vec<&Value> = lines.iter().filter(|l| l["held_out_bits"].is_number()).collect();
    assert_eq!(evaluated.iter().map(|l| l["step"].as_u64().unwrap()).collect::<Vec<_>>(), [4, 8]);
    for l in evaluated {
        for key in ["tasks.mqar.accuracy", "tasks.needle.accuracy", "tasks.mqar.loss", "tasks.needle.loss"] {
            assert!(l[key].as_f64().is_some_and(|x| (0.0..9.0).contains(&x)), "{key}: {l}");
        }
        assert!(l["held_out_tokens"].as_u64().unwrap() > 10);
    }
    let trained: Vec<f64> = lines.iter().filter_map(|l| l["loss"].as_f64()).collect();
    assert!(trained.len() == 8 && trained.iter().all(|l| (4.0..8.0).contains(l)), "{trained:?}");
    fails(tmp.path(), "eval whole", 2, &["tasks alone", "--task mqar,needle", "--data"]);
    fails(tmp.path(), "train smoke --set data.path=", 2, &["data.path is empty", "tasks.share = 1"]);
}

#[test]
fn tasks_among_text() {
    let tmp = tempfile::tempdir().unwrap();
    let (stdout, stderr) = runs(tmp.path(), &format!("{AMONG} --run-dir whole"));
    assert!(stderr.contains("tasks in 50% of the windows: induction") && stderr.contains("data data/moby-dick.txt"), "{stderr}");
    assert!(stdout.contains("held-out tasks: induction ") && stdout.contains("held out: ") && stdout.contains("bits per byte"), "{stdout}");
    runs(tmp.path(), &format!("{AMONG} --run-dir cut --set train.steps=2 --set optim.schedule=constant --set optim.warmup=0"));
    runs(tmp.path(), &format!("{AMONG} --run-dir straight --set optim.schedule=constant --set optim.warmup=0"));
    runs(tmp.path(), "train --run-dir cut --resume --set train.steps=4");
    assert!(bytes(&tmp.path().join("straight"), 4, "model.safetensors") == bytes(&tmp.path().join("cut"), 4, "model.safetensors"));
    // no task: what is set of them changes nothing
    let plain = "train smoke --set train.steps=3 --set data.held_out=0.002 --set sample.count=0 --set eval.every=0";
    runs(tmp.path(), &format!("{plain} --run-dir a"));
    runs(tmp.path(), &format!("{plain} --run-dir b --set tasks.mix.mqar=1 --set tasks.mqar.pairs=[7]"));
    let model = |run: &str| bytes(&tmp.path().join(run), 3, "model.safetensors");
    assert!(model("a") == model("b"));
    fails(tmp.path(), "train smoke --set tasks.share=2", 2, &["tasks.share", "from 0 to 1"]);
    fails(tmp.path(), "train smoke --set tasks.share=1", 2, &["tasks.mix names no task"]);
    fails(tmp.path(), "train smoke --set tasks.shared=1", 2, &["did you mean `tasks.share`"]);
    fails(tmp.path(), "train smoke --set tasks.share=1 --set tasks.mix.needle=1", 2, &["tasks.needle.length", "data.seq_len, 64", "128"]);
}

#[test]
fn a_run_is_evaluated_by_tasks() {
    let tmp = tempfile::tempdir().unwrap();
    runs(tmp.path(), &format!("{ALONE} --run-dir r --set eval.every=0"));
    let report = tmp.path().join("r/eval.json");
    let (stdout, _) = runs(tmp.path(), "eval r --task mqar --samples 20");
    assert!(stdout.contains("step-00000008, step 8") && stdout.contains("accuracy") && stdout.trim_end().ends_with("r/eval.json"), "{stdout}");
    let v = json(&report);
    assert_eq!((&v["format"], &v["step"], &v["seed"], &v["tasks"][0]["task"]), (&1.into(), &8.into(), &1.into(), &"mqar".into()));
    // settings and lengths are those that the run was trained with
    let cells = v["tasks"][0]["cells"].as_array().unwrap();
    assert_eq!(cells.iter().map(|c| c["length"].as_u64().unwrap()).collect::<Vec<_>>(), [16, 40]);
    assert!(cells.iter().all(|c| c["answers"] == 80 && c["samples"] == 20 && c["pairs"] == 4 && c.get("depth").is_none() && c["loss"].is_number()));
    assert!(v["tasks"][0]["scalars"]["mqar.16"].is_number() && v["tasks"][0]["settings"]["vocab"] == 256);
    // another task joins it, the same one again takes its place
    runs(tmp.path(), "eval r --task needle --length 48,1k --depths 2 --samples 3 --set difficulty=1,3");
    runs(tmp.path(), "eval r --task mqar --samples 2 --length 64");
    let v = json(&report);
    let names: Vec<&str> = v["tasks"].as_array().unwrap().iter().map(|t| t["task"].as_str().unwrap()).collect();
    assert_eq!(names, ["needle", "mqar"]);
    assert_eq!(v["tasks"][0]["cells"].as_array().unwrap().len(), 8);
    assert!(v["tasks"][0]["scalars"]["needle.difficulty-3.1k"].is_number());
    // another seed is another report
    let (_, e) = runs(tmp.path(), "eval r/checkpoints/step-00000008 --task induction --samples 2 --length 16 --seed 5 --out r/eval.json");
    assert!(e.contains("eval.step-8-seed-1.json") && tmp.path().join("r/eval.step-8-seed-1.json").is_file(), "{e}");
    // English needs a model that reads text
    fails(tmp.path(), "eval r --task niah-1", 2, &["niah-1 is in English"]);
    runs(tmp.path(), "train smoke --run-dir text --set train.steps=1 --set data.held_out=0.1 --set eval.every=0 --set sample.count=0");
    let (stdout, _) = runs(tmp.path(), "eval text --task niah-1,niah-2 --length 700 --depths 2 --samples 1 --out here.json");
    assert!(stdout.contains("niah-1") && stdout.contains("niah-2") && json(&tmp.path().join("here.json"))["tasks"][1]["cells"][1]["depth"] == 1.0);
}

#[test]
fn a_folder_of_transformers_is_evaluated_by_tasks() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/golden/next_d32").canonicalize().unwrap();
    let tmp = tempfile::tempdir().unwrap();
    let folder: PathBuf = tmp.path().join("model");
    fs::create_dir(&folder).unwrap();
    for f in ["config.json", "model.safetensors"] {
        fs::copy(golden.join(f), folder.join(f)).unwrap();
    }
    let vocab = json(&folder.join("config.json"))["vocab_size"].as_u64().unwrap();
    runs(tmp.path(), "eval model --task mqar,needle --length 64 --samples 4 --depths 2");
    let v = json(&tmp.path().join("eval.json"));
    assert_eq!((&v["step"], &v["tasks"][1]["settings"]["vocab"]), (&Value::Null, &vocab.into()));
    fails(tmp.path(), "eval model --task niah-1", 2, &["niah-1 is in English", "no tokenizer"]);
    fails(tmp.path(), &format!("eval model --task mqar --set vocab={}", vocab + 1), 2, &["tasks.mqar.vocab", &format!("vocabulary of {vocab}")]);
    fails(tmp.path(), "eval model --task mqra", 2, &["did you mean `mqar`"]);
    fails(tmp.path(), "eval model --task mqar,mqar", 2, &["twice"]);
    fails(tmp.path(), "eval model --task mqar --set pair=4", 2, &["did you mean `pairs`"]);
    fails(tmp.path(), "eval model --task mqar --length 4kb", 2, &["--length", "4k"]);
    fails(tmp.path(), "eval model --length 4k", 2, &["--task"]);
    fails(tmp.path(), "eval model --task mqar --data x.txt", 2, &["--data"]);
    fails(tmp.path(), "eval model --task needle --length 1m", 2, &["max_position_embeddings", "--beyond"]);
    // of a model that is meant to read less than it could
    let mut config = json(&folder.join("config.json"));
    config["max_position_embeddings"] = 128.into();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let passage = "eval model --task needle --length 64 --samples 1 --depths 1 --passage 129 --out beyond.json";
    fails(tmp.path(), passage, 2, &["--passage 129", "longer than the 128 tokens", "max_position_embeddings", "--beyond"]);
    assert!(!tmp.path().join("beyond.json").exists() && !tmp.path().join("passage.json").exists());
    runs(tmp.path(), &format!("{passage} --beyond"));
    assert_eq!(json(&tmp.path().join("passage.json"))["tokens"], 129);
    fails(tmp.path(), "eval model --task needle --length 129 --passage 64", 2, &["samples of 129 tokens", "--beyond"]);
    fails(tmp.path(), "eval model --task needle --length 64 --passage 2", 2, &["needle.length", "at least 6"]);
    fails(tmp.path(), "eval model --task needle --length 64 --depths 0", 2, &["--depths: expected at least 1, found 0"]);
    fails(tmp.path(), "eval model --task needle --length 64 --samples 0", 2, &["--samples: expected at least 1, found 0"]);
    fails(tmp.path(), "eval model", 2, &["is no run folder", "--data", "--task"]);
    fails(tmp.path(), "eval model --task needle --set filler=text --text nowhere.txt", 1, &["nowhere.txt"]);
    fs::write(tmp.path().join("eval.json"), "[]").unwrap();
    fails(tmp.path(), "eval model --task mqar", 2, &["eval.json", "--out"]);
}
