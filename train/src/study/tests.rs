use super::results::estimate;
use super::*;
use crate::{Error, Result};
use std::path::Path;

/// Two variants and two seeds of a model that trains in a moment.
pub(super) const TINY: &str = r#"
title = "Tiny"
base = "smoke"
seeds = [1, 2]
baseline = "none"
columns = [{ key = "held_out_bits", label = "bits per byte", better = "lower" }, { key = "gate_score", label = "gate" }]

[measure]
only = ["attention", "gates"]
tokens = 256

[set]
train = { steps = 3, observe_every = 0 }
sample.count = 0
eval.every = 0
model = { hidden_size = 16, num_hidden_layers = 2, full_attention_interval = 1, num_experts = 0, intermediate_size = 16, head_dim = 8 }
data = { seq_len = 32, batch = 2 }

[[variant]]
name = "none"
set.model.attention_gate.granularity = "none"

[[variant]]
name = "gate"
about = "G1"
set.model.attention_gate.granularity = "headwise"

[paper]
source = "none"
columns = ["PPL"]
rows = { gate = [5.5] }
"#;

pub(super) fn corpus_path() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../data/moby-dick.txt").display().to_string()
}
pub(super) fn plan(text: &str, set: &[&str]) -> Result<Plan> {
    let set: Vec<String> = set.iter().map(|s| s.to_string()).chain([format!("data.path={}", corpus_path()), "data.held_out=0.001".into()]).collect();
    Plan::new("tiny", StudyFile::parse(text, "tiny.toml")?, &set)
}
pub(super) fn go(plan: &Plan, whole: &Plan, path: &Path) -> Result<Results> {
    run(plan, whole, path, |_| Ok(nn::Placement::cpu(engine::DType::F32)))
}
pub(super) fn message(r: Result<impl Sized>) -> String {
    match r {
        Ok(_) => panic!("no error"),
        Err(Error::Usage(m)) => m,
        Err(e) => panic!("of another kind: {e}"),
    }
}

/// Each number that an arm has is among those that columns may be of.
fn are_known(plan: &Plan, results: &Results) {
    for arm in &plan.arms {
        let known = columns::keys(&plan.file, &arm.resolved.config).unwrap();
        let v = results.variants.iter().find(|v| v.name == plan.variant(arm).name).unwrap();
        let values = &v.arms.iter().find(|a| a.seed == arm.seed).unwrap().values;
        assert!(values.len() > 10 && values.keys().all(|k| known.contains(k)), "{values:?} are not all of {known:?}");
    }
}

#[test]
fn a_study_runs_once() {
    let tmp = tempfile::tempdir().unwrap();
    let whole = plan(TINY, &[]).unwrap();
    // part of it, as if it had been stopped
    let first = go(&whole.clone().only(&["gate".into()], &[1]).unwrap(), &whole, tmp.path()).unwrap();
    let states = |r: &Results| r.variants.iter().flat_map(|v| v.arms.iter().map(|a| a.state)).collect::<Vec<_>>();
    assert_eq!(states(&first), [State::Pending, State::Pending, State::Done, State::Pending]);
    assert!(first.markdown().contains("1 of 4 arms are done, 3 have not begun"), "{}", first.markdown());
    let run = tmp.path().join("arms/gate/seed-1");
    let before = std::fs::read(run.join("metrics.jsonl")).unwrap();
    // an arm that was cut off after training: measured, not trained again
    std::fs::write(run.join(crate::measure::FILE), "{\"format\": 1, \"che").unwrap();
    let all = go(&whole, &whole, tmp.path()).unwrap();
    assert_eq!(states(&all), [State::Done; 4]);
    assert_eq!(std::fs::read(run.join("metrics.jsonl")).unwrap(), before);
    assert!(Results::read(&tmp.path().join(FILE)).unwrap() == all);

    let [none, gate] = &all.variants[..] else { panic!() };
    assert_eq!((none.added_parameters, gate.added_parameters), (0, 2 * 16 * 4));
    are_known(&whole, &all);
    for (i, seed) in [1, 2].into_iter().enumerate() {
        assert_eq!((none.arms[i].seed, gate.arms[i].seed), (seed, seed));
    }
    let bits = |v: &VariantResult, i: usize| v.arms[i].values["held_out_bits"];
    let s = gate.summary["held_out_bits"];
    assert!((s.own.mean - (bits(gate, 0) + bits(gate, 1)) / 2.0).abs() < 1e-12);
    let d = [bits(gate, 0) - bits(none, 0), bits(gate, 1) - bits(none, 1)];
    let difference = s.difference.unwrap();
    assert!((difference.mean - (d[0] + d[1]) / 2.0).abs() < 1e-12 && difference.n == 2);
    assert!((difference.stderr.unwrap() - (d[0] - d[1]).abs() / 2.0).abs() < 1e-12);
    // what only one of them has is compared with nothing
    assert!(gate.summary["gate_score"].difference.is_none() && !none.summary.contains_key("gate_score"));
    let table = std::fs::read_to_string(tmp.path().join("table.md")).unwrap();
    assert!(table.contains("| **none** | +0 | 2 |") && table.contains("| gate | +128 | 2 |") && table.contains("| 5.5 |"), "{table}");

    // the same again is the same; another configuration of an arm that stands is refused, by name
    assert!(go(&whole, &whole, tmp.path()).unwrap() == all);
    let other = plan(TINY, &["optim.lr=0.001"]).unwrap();
    let m = message(go(&other, &other, tmp.path()));
    assert!(m.contains("begun with another configuration: optim.lr: 0.004 -> 0.001") && m.contains("seed-1"), "{m}");
    // also where those arms are not among the ones to train now: the table would hold both
    let part = other.clone().only(&["gate".into()], &[2]).unwrap();
    assert!(message(go(&part, &other, tmp.path())).contains("another configuration"));
    let renamed = Plan { name: "other".into(), ..whole };
    assert!(message(go(&renamed, &renamed, tmp.path())).contains("holds the study `tiny`"));
}

#[test]
fn an_arm_goes_on_where_it_was_cut_off() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let whole = plan(TINY, &["train.steps=6", "checkpoint.every=2"]).unwrap().only(&["gate".into()], &[1]).unwrap();
    let straight = go(&whole, &whole, one.path()).unwrap();
    go(&whole, &whole, two.path()).unwrap();
    // as a kill after step 5 leaves it: the last checkpoint of step 4, lines of five steps, the last cut off
    let run = two.path().join("arms/gate/seed-1");
    std::fs::remove_dir_all(run.join("checkpoints/step-00000006")).unwrap();
    std::fs::remove_file(run.join(crate::measure::FILE)).unwrap();
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    std::fs::write(run.join("metrics.jsonl"), format!("{}{}", lines[..5].concat(), &lines[5][..9])).unwrap();
    let resumed = go(&whole, &whole, two.path()).unwrap();
    let exact = |r: &Results| {
        let a = &r.variants.iter().find(|v| v.name == "gate").unwrap().arms[0];
        assert_eq!(a.state, State::Done);
        a.values.iter().filter(|(k, _)| !["seconds", "tokens_per_s"].contains(&k.as_str())).map(|(k, x)| (k.clone(), x.to_bits())).collect::<Vec<_>>()
    };
    assert_eq!(exact(&resumed), exact(&straight));
}

#[test]
fn a_sweep_to_divergence() {
    let tmp = tempfile::tempdir().unwrap();
    let text = TINY.replace("[measure]", "[sweep]\nkey = \"optim.lr\"\nvalues = [0.001, 1e30]\n\n[measure]").replace("[1, 2]", "[1]");
    let whole = plan(&text, &["optim.schedule=constant", "optim.warmup=0", "optim.clip=0"]).unwrap();
    let r = go(&whole, &whole, tmp.path()).unwrap();
    let names: Vec<_> = r.variants.iter().map(|v| (v.name.as_str(), v.baseline.as_str(), v.arms[0].state)).collect();
    let huge = format!("{}", 1e30);
    assert_eq!(names[0], ("none@0.001", "none@0.001", State::Done));
    assert_eq!((names[3].0, names[3].1, names[3].2), (&*format!("gate@{huge}"), &*format!("none@{huge}"), State::Diverged));
    let s = r.sweep.as_ref().unwrap();
    assert!(s.largest_stable.iter().all(|s| (s.lr, s.unstable, s.pending.len()) == (Some(0.001), Some(1e30), 0)), "{s:?}");
    // what diverged is not tried again
    let metrics = std::fs::read(tmp.path().join(format!("arms/gate@{huge}/seed-1/metrics.jsonl"))).unwrap();
    go(&whole, &whole, tmp.path()).unwrap();
    assert_eq!(std::fs::read(tmp.path().join(format!("arms/gate@{huge}/seed-1/metrics.jsonl"))).unwrap(), metrics);
    assert!(r.markdown().contains("largest stable optim.lr") && r.markdown().contains("2 diverged"), "{}", r.markdown());
    assert!(message(plan(&text, &["optim.lr=0.1"])).contains("study tiny itself goes through values of `optim.lr`"));
}

#[test]
fn bad_studies_are_named() {
    let with = |from: &str, to: &str| plan(&TINY.replace(from, to), &[]);
    for (from, to, says) in [
        ("baseline = \"none\"", "baseline = \"nome\"", "the baseline `nome` is no variant; did you mean `none`?"),
        ("seeds = [1, 2]", "seeds = []", "`seeds` is empty"),
        ("seeds = [1, 2]", "seeds = [1, 1]", "seed 1 is named twice"),
        ("name = \"gate\"", "name = \"none\"", "there are two variants `none`"),
        ("name = \"gate\"", "name = \"a/b\"", "variant `a/b`: a name is letters"),
        ("columns = [{", "colums = [{", "unknown field `colums`"),
        ("better = \"lower\"", "better = \"low\"", "`better` is \"lower\" or \"higher\", found \"low\""),
        ("rows = { gate = [5.5] }", "rows = { gate = [5.5, 1.0] }", "the paper's row `gate` has 2 figures for 1 columns"),
        ("rows = { gate", "rows = { gates", "the paper's row `gates` is of no variant"),
        ("\"headwise\"", "\"headwize\"", "variant `gate`, seed 1: model.attention_gate.granularity"),
        ("attention_gate.granularity = \"headwise\"", "attention_gate.granularty = \"headwise\"", "did you mean `model.attention_gate.granularity`"),
        ("head_dim = 8", "head_dim = 7", "study tiny, variant `none`, seed 1: "),
        ("only = [\"attention\"", "only = [\"atention\"", "attention"),
        ("base = \"smoke\"", "base = \"smoky\"", "did you mean `smoke`?"),
    ] {
        let m = message(with(from, to));
        assert!(m.contains(says), "{to}: {m}");
    }
    let whole = plan(TINY, &[]).unwrap();
    assert!(message(whole.clone().only(&["gat".into()], &[])).contains("no variant `gat`; did you mean `gate`?"));
    assert!(message(whole.only(&[], &[3])).contains("no seed 3"));
    assert!(message(plan(TINY, &["model.attention_gate.granularity=none"])).contains("variant `none` of study tiny sets that itself"));
    assert!(message(plan(TINY, &["seed=3"])).contains("goes through values of `seed`"));
    assert!(message(StudyFile::open("gate-position")).contains("did you mean `gate-positions`?"));
}

#[test]
fn arms_are_asked_tasks() {
    let tmp = tempfile::tempdir().unwrap();
    let eval = "[eval]\ntasks = [\"needle\"]\nlengths = [32, 64]\ndepths = 2\nsamples = 2\npassage = 64\n\n[measure]";
    let text = TINY.replace("[measure]", eval).replace("gate_score", "needle.64");
    let whole = plan(&text, &["tasks.share=1", "tasks.mix.needle=1", "tasks.needle.length=[32]"]).unwrap().only(&["gate".into()], &[1]).unwrap();
    let results = go(&whole, &whole, tmp.path()).unwrap();
    let arm = &results.variants[0].arms[0];
    assert_eq!(arm.state, State::Done);
    assert!(["needle", "needle.32", "needle.64", "first_token"].iter().all(|k| arm.values.contains_key(*k)), "{:?}", arm.values);
    assert!(results.variants[0].summary.contains_key("needle.64"));
    are_known(&whole, &results);
    let run = tmp.path().join(&arm.run);
    let passage: crate::measure::Passage = serde_json::from_slice(&std::fs::read(run.join(crate::measure::PASSAGE)).unwrap()).unwrap();
    assert_eq!((passage.tokens, passage.layers.len()), (64, 2));
    // answers that are not there, or are not to all that is asked, are asked for again; nothing is trained again
    let metrics = std::fs::read(run.join("metrics.jsonl")).unwrap();
    std::fs::remove_file(run.join(crate::tasks::FILE)).unwrap();
    assert_eq!(go(&whole, &whole, tmp.path()).unwrap().variants[0].arms, results.variants[0].arms);
    let longer = plan(&text.replace("[32, 64]", "[32, 64, 96]"), &["tasks.share=1", "tasks.mix.needle=1", "tasks.needle.length=[32]"]).unwrap();
    let longer = longer.only(&["gate".into()], &[1]).unwrap();
    assert!(go(&longer, &longer, tmp.path()).unwrap().variants[0].arms[0].values.contains_key("needle.96"));
    assert_eq!(std::fs::read(run.join("metrics.jsonl")).unwrap(), metrics);
    for (task, says) in [("nedle", "did you mean `needle`?"), ("niah-1", "is in English")] {
        let m = message(plan(&text.replace("\"needle\"", &format!("\"{task}\"")), &[]));
        assert!(m.contains(says), "{m}");
    }
}

#[test]
fn shipped_studies_can_be_run() {
    for s in shipped() {
        let plan = Plan::new(s.name, StudyFile::parse(s.text, s.name).unwrap(), &[]).unwrap();
        assert!(plan.arms.len() >= 6, "{}", s.name);
    }
}

#[test]
fn a_variants_own_baseline_is_named() {
    let table = |text: &str| {
        let plan = plan(text, &[]).unwrap();
        let nothing = |a: &Arm| (a.clone(), Outcome { state: State::Pending, step: 0, values: Default::default() });
        Results::new(&plan, &plan.arms.iter().map(nothing).collect::<Vec<_>>()).markdown()
    };
    let shared = table(TINY);
    assert!(shared.contains("| gate | +128 | 0 |") && shared.contains("the difference from none with the same seed"), "{shared}");
    let wide = "[[variant]]\nname = \"wide\"\nbaseline = \"gate\"\nset.model.attention_gate.granularity = \"elementwise\"\n\n[paper]";
    let own = table(&TINY.replace("[paper]", wide));
    for line in ["| variant | against | + parameters |", "| **none** | — | +0 |", "| gate | none | +128 |", "| wide | gate | +896 |"] {
        assert!(own.contains(line), "{line}: {own}");
    }
    assert!(own.contains("the difference from the variant under `against`"), "{own}");
}

#[test]
fn estimates_by_hand() {
    assert_eq!(estimate(&[]), None);
    assert_eq!(estimate(&[3.0]), Some(Estimate { mean: 3.0, stderr: None, n: 1 }));
    // deviations -1, 0, 1: the sample's variance is 1
    assert_eq!(estimate(&[1.0, 2.0, 3.0]), Some(Estimate { mean: 2.0, stderr: Some((1.0f64 / 3.0).sqrt()), n: 3 }));
}
