use super::*;
use crate::presets;

fn layers() -> Layers {
    Layers::preset(&presets::quickstart()).unwrap()
}
fn set(assignments: &[&str]) -> Result<RunConfig> {
    let mut l = layers();
    l.set(&assignments.iter().map(|s| s.to_string()).collect::<Vec<_>>())?;
    Ok(l.resolve()?.config)
}
fn message(assignments: &[&str]) -> String {
    let e = set(assignments).unwrap_err();
    assert_eq!(e.exit_code(), 2);
    e.to_string()
}

#[test]
fn presets_are_valid() {
    for name in presets::NAMES {
        let c = presets::by_name(name).unwrap();
        assert_eq!(&c.name, name);
        c.validate().unwrap();
        // The printed form is an overlay that changes nothing.
        let resolved = Layers::preset(&c).unwrap().resolve().unwrap();
        let mut again = Layers::preset(&c).unwrap();
        again.toml(&resolved.to_toml(), "again").unwrap();
        assert_eq!(again.resolve().unwrap().config, c);
    }
    assert!(presets::by_name("quikstart").unwrap_err().to_string().contains("`quickstart`"));
}

#[test]
fn values() {
    let c =
        set(&["optim.lr=1e-3", "data.path=some/file.txt", "data.batch = 7", "optim.clip=2", "optim.schedule=wsd", "optim.no_decay=[\"x\"]"]).unwrap();
    assert_eq!((c.optim.lr, c.data.batch, c.optim.clip), (1e-3, 7, 2.0));
    assert_eq!(c.data.path, std::path::Path::new("some/file.txt"));
    assert_eq!(c.optim.schedule, Shape::Wsd);
    assert_eq!(c.optim.no_decay, ["x"]);
    // where text is wanted, text is taken as it stands
    for (given, path) in [("data.path=2024", "2024"), ("data.path=\"a b\"", "a b"), ("data.path = x.txt", "x.txt"), ("data.path=true", "true")] {
        assert_eq!(set(&[given]).unwrap().data.path, std::path::Path::new(path));
    }
    assert_eq!(set(&["sample.prompt=The whale "]).unwrap().sample.prompt, "The whale ");
}

#[test]
fn impossible_values_say_what_is_possible() {
    for (given, words) in [
        ("optim.lr=nan", "optim.lr = NaN (--set): expected a finite number"),
        ("optim.lr=-inf", "optim.lr = -inf"),
        ("train.accumulate=9223372036854775807", "at most 2^30 tokens a step"),
        ("sample.prompt=", "sample.prompt: expected at least one byte"),
        ("sample.tokens=18446744073709551615", "sample.tokens"),
        ("sample.tokens=2000000", "sample.tokens: expected at most 1048576"),
        ("name=../x", "no slash"),
        ("model.num_attention_heads=5", "num_key_value_heads"),
        ("model.linear_num_value_heads=3", "linear_num_key_heads"),
        ("model.head_dim=0", "head_dim"),
    ] {
        let m = message(&[given]);
        assert!(m.contains(words), "{given}: {m}");
    }
    assert!(set(&["sample.prompt=", "sample.count=0"]).is_ok());
}

#[test]
fn a_run_that_goes_on_takes_its_file_anew_under_what_was_set() {
    let mut first = layers();
    first.toml("optim.lr = 0.5\noptim.clip = 3.0\ntrain.steps = 9", "run.toml").unwrap();
    first.set(&["optim.lr=0.25".into(), "train.tokens=7".into()]).unwrap();
    let first = first.resolve().unwrap();
    let mut again = Layers::of(&first.config, first.origins().clone()).unwrap();
    again.toml("optim.lr = 0.5\noptim.clip = 4.0\ntrain.steps = 9", "run.toml").unwrap();
    again.set(&["seed=5".into()]).unwrap();
    let again = again.resolve().unwrap();
    let changes: Vec<String> = again.changes(&first.config).unwrap().iter().map(Change::to_string).collect();
    assert_eq!(changes, ["seed: 1 -> 5", "optim.clip: 3.0 -> 4.0"]);
    assert!(again.to_toml().lines().any(|l| l.starts_with("optim.lr = 0.25") && l.ends_with("# --set")), "origins go on");
}

#[test]
fn one_budget() {
    assert_eq!(set(&[]).unwrap().budget().unwrap(), Budget::Minutes(5.0));
    assert_eq!(set(&["train.steps=10"]).unwrap().budget().unwrap(), Budget::Steps(10));
    assert_eq!(set(&["train.tokens=1000"]).unwrap().budget().unwrap(), Budget::Tokens(1000));
    assert_eq!(set(&["train.minutes=0.5"]).unwrap().budget().unwrap(), Budget::Minutes(0.5));
    assert_eq!(set(&["train.steps=10", "train.steps=20"]).unwrap().budget().unwrap(), Budget::Steps(20));
    assert!(message(&["train.steps=10", "train.minutes=1"]).contains("one budget"));
    assert!(message(&["train.steps=0"]).contains("positive"));
    assert!(message(&["train.minutes=-1"]).contains("positive"));
    let mut l = layers();
    l.toml("train.steps = 3", "file").unwrap();
    l.set(&["train.tokens=9".into()]).unwrap();
    assert_eq!(l.resolve().unwrap().config.budget().unwrap(), Budget::Tokens(9));
}

#[test]
fn unknown_keys_offer_the_nearest() {
    for (key, offered) in [
        ("optim.lrr", "optim.lr"),
        ("train.minuets", "train.minutes"),
        ("optm.weight_decay", "optim.weight_decay"),
        ("batch", "data.batch"),
        ("seq_len", "data.seq_len"),
        ("optim.lrate", "optim.lr"),
        ("optim.weight", "optim.weight_decay"),
        ("optm", "optim"),
        ("model.attention_gat.op", "model.attention_gate.op"),
        ("model.attention_gate.opp", "model.attention_gate.op"),
    ] {
        let m = message(&[&format!("{key}=1")]);
        assert!(m.contains(&format!("`{offered}`")) && m.contains(key), "{m}");
    }
    // only what is near is offered
    for far in ["xylophone_zebra", "", "xy", "q", "optim.momentum", "data.zzz", "foo.bar"] {
        let m = message(&[&format!("{far}=1")]);
        assert!(m.contains("unknown key") && m.contains("--print-config") && !m.contains("did you mean"), "{m}");
    }
    let mut l = layers();
    let m = l.toml("[data]\nsqe_len = 3\n", "run.toml").unwrap_err().to_string();
    assert!(m.contains("data.seq_len"), "{m}");
    let m = l.toml("[dta]\nseq_len = 3\n", "run.toml").unwrap_err().to_string();
    assert!(m.contains("`dta`; did you mean `data`?"), "{m}");
}

#[test]
fn wrong_types_say_what_was_expected() {
    let m = message(&["data.batch=many"]);
    assert!(m.contains("data.batch") && m.contains("expected a whole number") && m.contains("many") && m.ends_with("it is now 3"), "{m}");
    let m = message(&["data.batch=-3"]);
    assert!(m.contains("data.batch") && m.contains("-3"), "{m}");
    for (given, words) in [
        ("train.minutes=abc", "invalid type: string \"abc\", expected a number; it is now 5.0"),
        ("train.steps=1.5", "invalid type: floating point `1.5`, expected a whole number, not negative; it is now not set"),
        ("data.batch=true", "invalid type: boolean `true`, expected a whole number"),
        ("model.tie_word_embeddings=1", "invalid type: integer `1`, expected a boolean"),
        ("optim.no_decay=norm", "expected a list"),
        ("seed=-1", "invalid value: integer `-1`, expected a whole number, not negative"),
    ] {
        let m = message(&[given]);
        assert!(m.contains(words), "{m}");
    }
    let m = message(&["optim.schedule=cosin"]);
    assert!(m.contains("cosine") && m.contains("wsd"), "{m}");
    let m = message(&["train=3"]);
    assert!(m.contains("table"), "{m}");
    assert!(message(&["data.batch"]).contains("key=value"));
    assert!(message(&["optim.beta2=1.0"]).contains("below 1"));
    assert!(message(&["data.seq_len=4294967296", "data.batch=4294967296"]).contains("2^30"));
}

#[test]
fn print_config_names_origins() {
    let mut l = layers();
    l.toml("optim.lr = 0.5", "run.toml").unwrap();
    l.set(&["train.steps=3".into()]).unwrap();
    let text = l.resolve().unwrap().to_toml();
    let line = |key: &str| text.lines().find(|l| l.contains(key)).unwrap_or_else(|| panic!("{key} in {text}"));
    assert!(line("optim.lr ").ends_with("# run.toml"));
    assert!(line("train.steps").ends_with("# --set"));
    assert!(line("train.minutes").starts_with("# train.minutes is not set"));
    assert!(line("data.path").ends_with("# preset quickstart"));
}
