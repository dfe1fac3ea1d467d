//! What a study is refused for before anything is trained.

use super::tests::{TINY, go, message, plan};

#[test]
fn tasks_that_eval_would_refuse() {
    let tasks = ["tasks.share=1", "tasks.mix.needle=1", "tasks.needle.length=[32]", "model.max_position_embeddings=4096"];
    let asked = |eval: &str| plan(&TINY.replace("[measure]", &format!("[eval]\n{eval}\n\n[measure]")), &tasks);
    // as long as the model is meant to read, however long it was trained on
    asked("tasks = [\"needle\"]\nlengths = [32, 4096]\npassage = 4096").unwrap();
    for (eval, says) in [
        ("tasks = [\"needle\"]\nlengths = [64, 4097]", "eval.lengths: 4097 tokens are more than the 4096 that the model is meant to read"),
        ("tasks = [\"needle\"]\npassage = 4097", "eval.passage: 4097 tokens are more than the 4096"),
        ("tasks = [\"needle\"]\npassage = 1", "eval.passage: tasks.needle.length: expected at least 6"),
        ("tasks = [\"needle\"]\ndepths = 0", "eval.depths: expected at least 1, found 0"),
        ("tasks = [\"needle\"]\nsamples = 0", "eval.samples: expected at least 1, found 0"),
        ("tasks = [\"needle\"]\nlengths = [0]", "eval.lengths: expected at least 1, found 0"),
        ("tasks = [\"needle\"]\nlengths = [3]", "eval.tasks: tasks.needle.length: expected at least 6"),
        ("tasks = [\"mqar\"]\nlengths = [33]", "eval.tasks: tasks.mqar.length: expected even numbers, found 33"),
        ("tasks = [\"mqar\"]\npassage = 64", "eval.passage = 64 follows a needle of tokens; name the task `needle`"),
        ("tasks = [\"mqar\", \"mqar\"]", "eval.tasks names mqar twice"),
        ("tasks = []", "eval.tasks is empty"),
    ] {
        let m = message(asked(eval));
        assert!(m.contains(says), "{eval}: {m}");
    }
    // a needle in text where there is none
    let filler = [&tasks[..], &["tasks.mix.needle=0", "tasks.mix.mqar=1", "tasks.mqar.length=[32]", "tasks.needle.filler=text"]].concat();
    let text = TINY.replace("[measure]", "[eval]\ntasks = [\"needle\"]\n\n[measure]");
    assert!(message(plan(&text, &filler)).contains("eval.tasks: --task needle hides its needle in text, and there is none"));
}

#[test]
fn what_would_come_to_nothing() {
    let with = |from: &str, to: &str| plan(&TINY.replace(from, to), &[]);
    let sweep = TINY.replace("[measure]", "[sweep]\nkey = \"optim.lr\"\nvalues = [0.001, 0.002]\n\n[measure]");
    for (text, says) in [
        (
            TINY.replace("key = \"held_out_bits\"", "key = \"held_out_bit\""),
            "column `held_out_bit`: no arm of this study has a number of that name; did you mean `held_out_bits`?",
        ),
        // it would be measured, if asked for; and there would be a state, in another mixer
        (TINY.replace("gate_score", "max_activation"), "column `max_activation`"),
        (TINY.replace("gate_score", "state_rank"), "column `state_rank`"),
        (TINY.replace("gate_score", "needle.1k"), "column `needle.1k`"),
        (TINY.replace("gate_score", "gate_beta"), "column `gate_beta`"),
        (TINY.replace("\"attention\", \"gates\"", "\"gates\", \"router\""), "measure.only: no variant has anything of `router`; leave it out"),
        (TINY.replace("tokens = 256", "tokens = 0"), "measure.tokens: expected at least one window's, found 0"),
        (TINY.replace("tokens = 256", "context = 31"), "measure.context: expected at least data.seq_len, 32, found 31"),
        (TINY.replace("about = \"G1\"", "set.seed = 4"), "variant `gate`: `seed` is set, and the study itself goes through values of it"),
        (TINY.replace("about = \"G1\"", "set.name = \"x\""), "variant `gate`: `name` is set"),
        (TINY.replace("sample.count = 0", "seed = 4\nsample.count = 0"), "[set]: `seed` is set"),
        (sweep.replace("about = \"G1\"", "set.optim.lr = 0.1"), "variant `gate`: `optim.lr` is set"),
        (sweep.replace("sample.count = 0", "optim.lr = 0.1\nsample.count = 0"), "[set]: `optim.lr` is set"),
        (sweep.replace("\"optim.lr\"", "\"seed\""), "a sweep can't go through values of `seed`"),
    ] {
        let m = message(plan(&text, &[]));
        assert!(m.contains(says), "{says}: {m}");
    }
    // what one variant has is enough, and what a sweep doesn't go through may be set
    with("gate_score", "gate_attention_above_09").unwrap();
    with("gate_score", "tokens_per_s").unwrap();
    plan(&sweep.replace("about = \"G1\"", "set.optim.warmup = 0.1"), &[]).unwrap();
    plan(&TINY.replace("about = \"G1\"", "set.optim.lr = 0.1"), &[]).unwrap();
    assert!(message(plan(TINY, &["name=x"])).contains("goes through values of `name`"));
}

#[test]
fn text_that_is_too_short_to_measure_on() {
    let tmp = tempfile::tempdir().unwrap();
    let whole = plan(TINY, &["data.seq_len=2048"]).unwrap();
    let m = message(go(&whole, &whole, tmp.path()));
    assert!(m.contains("variant `none`: ") && m.contains("are there to measure on (data.held_out), and a window has 2048"), "{m}");
    assert!(!tmp.path().join("arms").exists());
}
