use super::*;
use crate::{checkpoint, presets};
use std::fs;

fn results() -> Value {
    let summary = |mean: f64, stderr: Option<f64>, difference: Option<(f64, f64)>| json!({ "mean": mean, "stderr": stderr, "n": 3, "difference": difference.map(|d| json!({ "mean": d.0, "stderr": d.1, "n": 3 })) });
    let arm = |seed: u64, state: &str| json!({ "seed": seed, "run": format!("arms/x/{seed}"), "state": state, "values": { "bits": 1.9 } });
    json!({
        "format": 1, "name": "gates", "title": "Where?", "baseline": "none", "seeds": [1, 2, 3],
        "columns": [{ "key": "bits", "label": "bits per byte", "better": "lower" }, { "key": "rank", "label": "rank", "better": "higher" }],
        "variants": [
            { "name": "none", "arms": [arm(1, "done"), arm(2, "done")], "parameters": 1000, "added_parameters": 0,
              "summary": { "bits": summary(1.95, Some(0.0123), Some((0.0, 0.0))), "rank": summary(10.0, None, None) } },
            { "name": "gate", "about": "a <gate>", "arms": [arm(1, "done"), arm(2, "pending")], "parameters": 1191736, "added_parameters": 1190736,
              "summary": { "bits": summary(1.9234, Some(0.0123), Some((-0.0266, 0.0041))), "rank": summary(9.0, Some(0.5), Some((-1.0, 0.4))) } },
            { "name": "late", "arms": [arm(1, "diverged")], "summary": { "bits": summary(1.9, Some(0.01), Some((-0.005, 0.004))) } },
        ],
        "paper": { "columns": ["PPL"], "rows": { "gate": [5.761], "none": [] } },
    })
}

fn study(folder: &Path, results: &Value) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join(FILE), results.to_string()).unwrap();
}

/// A run folder as `train` leaves it, with four steps.
fn run_folder(path: &Path, seed: u64, lr: f64) {
    fs::create_dir_all(path).unwrap();
    let mut config = presets::smoke();
    (config.seed, config.optim.lr) = (seed, lr);
    let info =
        checkpoint::RunInfo { version: "0".into(), command: vec!["tidegate".into()], machine: "m".into(), config, origins: Default::default() };
    fs::write(path.join("run.json"), serde_json::to_string(&info).unwrap()).unwrap();
    let line = |step: u64| format!("{{\"step\":{step},\"loss\":{},\"tokens\":{},\"seconds\":{step}}}\n", 3.0 - step as f64 / 8.0, step * 512);
    fs::write(path.join("metrics.jsonl"), (1..=4).map(line).collect::<String>()).unwrap();
}

/// The data in a page.
fn embedded(page: &Path) -> Value {
    let html = fs::read_to_string(page).unwrap();
    serde_json::from_str(html.split_once("id=\"data\">").unwrap().1.split_once("</script>").unwrap().0).unwrap()
}

fn fails(paths: &[&Path], out: Option<&Path>, words: &[&str]) {
    let paths: Vec<PathBuf> = paths.iter().map(|p| p.to_path_buf()).collect();
    let e = write(&paths, out).unwrap_err().to_string();
    assert!(words.iter().all(|w| e.contains(w)), "{e}");
}

#[test]
fn a_studys_table() {
    let tmp = tempfile::tempdir().unwrap();
    study(tmp.path(), &results());
    let t = &study::tables(&Results::read(&tmp.path().join(FILE)).unwrap())[0];
    let labels: Vec<&str> = t.columns.iter().map(|c| c.label.as_str()).collect();
    assert_eq!(labels, ["parameters", "seeds done", "bits per byte ↓", "rank ↑", "PPL"]);
    assert!(t.columns[4].paper && t.note.contains("from none"));
    // what a variant is held against is named where it is another
    let mut own = results();
    own["variants"][2]["baseline"] = "gate".into();
    study(tmp.path(), &own);
    let named = &study::tables(&Results::read(&tmp.path().join(FILE)).unwrap())[0];
    let about: Vec<Option<&str>> = named.rows.iter().map(|r| r.about.as_deref()).collect();
    assert_eq!(about, [None, Some("a <gate>"), Some("against gate")]);
    assert!(named.note.contains("its baseline"));
    let row = |i: usize| t.rows[i].cells.iter().map(|c| (c.text.as_str(), c.sub.as_deref(), c.mark)).collect::<Vec<_>>();
    // the baseline is not compared with itself
    assert_eq!(row(0), [("1000", None, ""), ("2 of 2", None, ""), ("1.950 ± 0.012", None, ""), ("10", None, ""), ("–", None, "")]);
    let gate = [
        ("1.19 M", Some("+1.19 M"), ""),
        ("1 of 2", Some("1 pending"), ""),
        ("1.923 ± 0.012", Some("−0.0266 ± 0.0041"), "better"),
        ("9.00 ± 0.50", Some("−1.00 ± 0.40"), "worse"),
        ("5.761", None, ""),
    ];
    assert_eq!(row(1), gate);
    // within two standard errors nothing is called better; what is missing says so
    assert_eq!(
        row(2)[1..],
        [("0 of 1", Some("1 diverged"), "failed"), ("1.900 ± 0.010", Some("−0.0050 ± 0.0040"), ""), ("–", None, ""), ("–", None, "")]
    );
}

#[test]
fn a_study_some_of_which_is_missing() {
    let tmp = tempfile::tempdir().unwrap();
    study(tmp.path(), &results());
    let page = write(&[tmp.path().into()], None).unwrap();
    assert_eq!(page, tmp.path().join("report.html"));
    let data = embedded(&page);
    assert_eq!((data["title"].as_str(), data["runs"].as_array().map(Vec::len)), (Some("Where?"), Some(0)));
    // arms that say they are done; the pending one is no surprise
    assert_eq!(data["notes"].as_array().unwrap().len(), 4);
    assert!(data["notes"][0].as_str().unwrap().contains("none, seed 1: done by results.json, but its run folder"), "{}", data["notes"]);
}

#[test]
fn seeds_share_a_variant_and_have_a_mean() {
    let tmp = tempfile::tempdir().unwrap();
    let paths: Vec<PathBuf> = ["fast-1", "fast-2", "slow"].iter().map(|n| tmp.path().join(n)).collect();
    [(1, 0.1), (2, 0.1), (1, 0.2)].iter().zip(&paths).for_each(|((seed, lr), p)| run_folder(p, *seed, *lr));
    let out = tmp.path().join("all.html");
    let data = embedded(&write(&paths, Some(&out)).unwrap());
    let variants = data["variants"].as_array().unwrap();
    assert_eq!(
        variants.iter().map(|v| (v["name"].as_str().unwrap(), v["runs"].clone())).collect::<Vec<_>>(),
        [("fast", json!([0, 1])), ("slow", json!([2]))]
    );
    assert_eq!(variants[0]["loss"]["mean"], json!([2.875, 2.75, 2.625, 2.5]));
    assert_eq!(variants[0]["loss"]["stderr"], json!([0, 0, 0, 0]));
    assert!(variants[1]["loss"].is_null());
    let table = |i: usize| &data["tables"][i];
    let labels = |i: usize| table(i)["columns"].as_array().unwrap().iter().map(|c| c["label"].as_str().unwrap().to_string()).collect::<Vec<_>>();
    // what came of each run is first, and of settings there are those that differ
    assert_eq!(labels(0), ["training loss", "parameters", "tokens", "time", "seed"]);
    assert_eq!((table(0)["rows"][1]["head"].as_str(), table(0)["rows"][1]["cells"][4]["text"].as_str()), (Some("fast-2"), Some("2")));
    assert_eq!((labels(1), table(1)["rows"].as_array().unwrap().len()), (vec!["fast".to_string(), "slow".into()], 1));
    assert_eq!(table(1)["rows"][0]["head"], "optim.lr");
    assert_eq!((&table(1)["rows"][0]["cells"][1]["text"], &table(1)["columns"][1]["slot"]), (&json!("0.2"), &json!(1)));
    assert!(table(2).is_null());
    // a note for each run that has not been measured, with the command to type
    assert!(data["runs"][0]["notes"][0].as_str().unwrap().contains("`tidegate measure "));
    write(&paths, Some(&out)).unwrap();
}

#[test]
fn settings_of_many_runs_stand_in_several_tables() {
    let tmp = tempfile::tempdir().unwrap();
    let tables = |n: usize| {
        let paths: Vec<PathBuf> = (0..n).map(|i| tmp.path().join(format!("r{i}"))).collect();
        paths.iter().enumerate().for_each(|(i, p)| run_folder(p, 1, 0.1 + i as f64));
        let out = tmp.path().join("all.html");
        let data = embedded(&write(&paths, Some(&out)).unwrap());
        data["tables"]
            .as_array()
            .unwrap()
            .iter()
            .map(|t| (t["title"].as_str().unwrap().to_string(), t["columns"].as_array().unwrap().len()))
            .collect::<Vec<_>>()
    };
    let of =
        |columns: &[usize]| [("Runs".to_string(), 4)].into_iter().chain(columns.iter().map(|n| ("Settings".to_string(), *n))).collect::<Vec<_>>();
    for (n, columns) in [(2, &[2][..]), (6, &[6]), (7, &[4, 3]), (12, &[6, 6]), (13, &[5, 5, 3])] {
        assert_eq!(tables(n), of(columns), "{n} runs");
    }
}

#[test]
fn a_run_on_tasks_alone_is_scored_by_labels() {
    let tmp = tempfile::tempdir().unwrap();
    let run = tmp.path().join("r");
    for (share, unit, held_out, loss) in
        [(0.5, "bits per byte", "bits per byte, 40 tokens", "token"), (1.0, "bits per label", "bits per label, 40 labels", "label")]
    {
        run_folder(&run, 1, 0.1);
        let mut info: Value = serde_json::from_slice(&fs::read(run.join("run.json")).unwrap()).unwrap();
        info["config"]["tasks"]["share"] = json!(share);
        fs::write(run.join("run.json"), info.to_string()).unwrap();
        let more = "{\"step\":4,\"final\":true,\"held_out_bits\":2.5,\"held_out_tokens\":40}\n";
        fs::write(run.join("metrics.jsonl"), fs::read_to_string(run.join("metrics.jsonl")).unwrap() + more).unwrap();
        let data = embedded(&write(std::slice::from_ref(&run), None).unwrap());
        let r = &data["runs"][0];
        assert_eq!((r["unit"].as_str(), r["scored"].as_str()), (Some(unit), Some(loss)));
        assert_eq!(
            (r["facts"][0]["note"].as_str(), r["facts"][1]["note"].clone()),
            (Some(held_out), json!(format!("nats per {loss}, last 5 % of the steps")))
        );
    }
}

#[test]
fn part_of_a_run_is_enough() {
    let tmp = tempfile::tempdir().unwrap();
    let run = tmp.path().join("r");
    run_folder(&run, 1, 0.1);
    fs::remove_file(run.join("run.json")).unwrap();
    let data = embedded(&write(std::slice::from_ref(&run), None).unwrap());
    assert!(data["runs"][0]["notes"][0].as_str().unwrap().contains("has no run.json"));
    assert_eq!(data["runs"][0]["fine"]["series"]["loss"]["mean"], json!([2.875, 2.75, 2.625, 2.5]));
    run_folder(&run, 1, 0.1);
    fs::remove_file(run.join("metrics.jsonl")).unwrap();
    assert!(embedded(&write(&[run], None).unwrap())["runs"][0]["fine"].is_null());
}

#[test]
fn bad_input_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let (empty, run, file) = (tmp.path().join("empty"), tmp.path().join("run"), tmp.path().join("mine.html"));
    fs::create_dir(&empty).unwrap();
    run_folder(&run, 1, 0.1);
    fs::write(&file, "<p>mine</p>").unwrap();
    fails(&[], None, &["Name a run folder"]);
    fails(&[&tmp.path().join("nowhere")], None, &["nowhere does not exist"]);
    fails(&[&empty], None, &["empty is no run folder (run.json, metrics.jsonl, measures.json) and no study's folder (results.json)"]);
    fails(&[&run], Some(&file), &["mine.html is there, and is no report"]);
    fails(&[&run], Some(&empty), &["expected a file, found a folder"]);
    assert_eq!(fs::read(&file).unwrap(), b"<p>mine</p>");
    let s = tmp.path().join("study");
    study(&s, &results());
    fails(&[&run, &s], None, &["is a study, and a report shows one study, or runs"]);
    let mut other = results();
    other["format"] = json!(2);
    study(&s, &other);
    fails(&[&s], None, &["results.json: its format is 2, and this tidegate reads 1"]);
    other.as_object_mut().unwrap().remove("format");
    study(&s, &other);
    fails(&[&s], None, &["its format is none"]);
    let mut twice = results();
    twice["variants"][1]["name"] = json!("none");
    study(&s, &twice);
    fails(&[&s], None, &["two variants are called `none`"]);
    fs::write(s.join(FILE), &results().to_string()[..100]).unwrap();
    fails(&[&s], None, &["results.json: is no JSON"]);
    study(&s, &json!({ "format": 1, "name": "x" }));
    fails(&[&s], None, &["is no study's results: missing field `columns`"]);
    fs::write(run.join("metrics.jsonl"), "{\"step\":1,\"loss\":2}\n{\"step\":2,\"lo\n{\"step\":3,\"loss\":2}\n").unwrap();
    fails(&[&run], None, &["metrics.jsonl, line 2: expected an object of JSON"]);
    run_folder(&run, 1, 0.1);
    fs::write(run.join("measures.json"), "{\"format\":7}").unwrap();
    fails(&[&run], None, &["measures.json"]);
}
