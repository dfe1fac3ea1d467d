//! Reports of real runs, opened in a browser without a window: `TIDEGATE_CHROMIUM` names one, else `chromium` on the path.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn tidegate(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tidegate")).args(args).current_dir(dir).output().unwrap()
}
fn run(dir: &Path, args: &[&str]) -> String {
    let o = tidegate(dir, args);
    assert!(o.status.success(), "{args:?}: {}", String::from_utf8_lossy(&o.stderr));
    String::from_utf8(o.stdout).unwrap()
}

fn browser() -> Option<PathBuf> {
    let named = std::env::var_os("TIDEGATE_CHROMIUM").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = named.or_else(|| {
        let all: Vec<PathBuf> = std::env::split_paths(&path).collect();
        ["chromium", "chromium-browser", "google-chrome"].iter().flat_map(|n| all.iter().map(move |p| p.join(n))).find(|p| p.is_file())
    });
    if found.is_none() {
        eprintln!("SKIPPED: reports are not opened: there is no chromium on the path, and TIDEGATE_CHROMIUM names none");
    }
    found
}

/// What is left of a sheet of A4 between the browser's margins.
const PAPER: u32 = 718;

/// What the page says of itself in a window `width` wide, or on paper. No window is narrower than 500, so it is shown in a frame.
fn opened(browser: &Path, page: &Path, width: u32) -> Value {
    let check = if width == PAPER { "check-print" } else { "check" };
    let tmp = tempfile::tempdir().unwrap();
    let frame = tmp.path().join("frame.html");
    let address = format!("file://{}", page.canonicalize().unwrap().display()).replace(' ', "%20").replace('<', "%3C").replace('>', "%3E");
    std::fs::write(
        &frame,
        format!(
            "<html><body style='margin:0'><script>onmessage = (e) => document.documentElement.dataset.check = btoa(unescape(encodeURIComponent(e.data)))</script>\
             <iframe src='{address}#{check}' style='border:0;width:{width}px;height:900px'></iframe></body></html>"
        ),
    )
    .unwrap();
    let flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update \
                 --disable-sync --virtual-time-budget=5000 --dump-dom";
    let o = Command::new(browser)
        .args(flags.split_whitespace())
        .arg(format!("--user-data-dir={}", tmp.path().join("profile").display()))
        .arg(format!("--window-size={},1000", width.max(500)))
        .arg(format!("file://{}", frame.display()))
        .stderr(Stdio::null())
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&o.stdout);
    let coded = dom.split_once("data-check=\"").unwrap_or_else(|| panic!("the page said nothing: {dom}")).1.split_once('"').unwrap().0;
    serde_json::from_slice(&decoded(coded)).unwrap()
}

/// Base 64.
fn decoded(text: &str) -> Vec<u8> {
    let value = |c: u8| b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".iter().position(|b| *b == c).unwrap() as u32;
    let (mut out, mut bits, mut n) = (vec![], 0u32, 0);
    for c in text.bytes().filter(|c| *c != b'=') {
        (bits, n) = (bits << 6 | value(c), n + 6);
        if n >= 8 {
            n -= 8;
            out.push((bits >> n) as u8);
            bits &= (1 << n) - 1;
        }
    }
    out
}

/// No script error, marks in every figure, nothing wider than the window, on a desktop, on a phone and on paper, where charts are as large as they were drawn;
/// and these sections and figures.
fn holds(browser: &Path, page: &Path, sections: &[&str], figures: &[&str]) {
    for width in [1280, 360, PAPER] {
        let seen = opened(browser, page, width);
        let p = page.display();
        assert!(seen["error"].is_null() && seen["width"] == width, "{p} at {width}: {seen}");
        assert!(seen["wide"] == json!([]) && seen["scroll"].as_u64().unwrap() <= width.into(), "{p} at {width} is too wide: {seen}");
        let found = |key: &str| seen[key].as_array().unwrap().clone();
        for s in sections {
            assert!(found("sections").contains(&json!(s)), "{p}: no section {s}: {seen}");
        }
        for f in figures {
            assert!(found("figures").iter().any(|g| g["id"] == *f), "{p}: no figure {f}: {seen}");
        }
        for f in found("figures") {
            assert!(f["marks"].as_u64().unwrap() > 0, "{p} at {width}: a figure without marks: {f}");
            let scale = f["scale"].as_f64().unwrap();
            assert!((0.95..1.1).contains(&scale), "{p} at {width}: drawn for another width, and its labels {scale} times as large: {f}");
        }
    }
}

/// A figure of a page in a window.
fn figure(seen: &Value, id: &str) -> Value {
    seen["figures"].as_array().unwrap().iter().find(|f| f["id"] == id).unwrap_or_else(|| panic!("no figure {id}: {seen}")).clone()
}

/// Runs from one: with other layers, other gates, other names, and one whose loss became huge.
fn many(dir: &Path, n: usize) -> Vec<String> {
    let name = |i: usize| format!("{}-{i}", ["gated", "a-run-with-a-long-name", "half_life.and_more"][i % 3]);
    for i in 0..n {
        let to = dir.join(name(i));
        std::fs::create_dir_all(&to).unwrap();
        for f in ["metrics.jsonl", "measures.json"] {
            std::fs::copy(dir.join("gated-1").join(f), to.join(f)).unwrap();
        }
        let mut info = json_of(&dir.join("gated-1/run.json"));
        info["config"]["seed"] = i.into();
        let model = &mut info["config"]["model"];
        model["layer_types"] = vec![if i % 2 == 0 { "linear_attention" } else { "sliding_attention" }; 20 + i].into();
        (model["hidden_size"], model["rms_norm_eps"]) = ((64 + i).into(), (1e-6 * (i + 1) as f64).into());
        for gate in ["attention_gate", "value_gate", "key_gate", "query_gate", "dense_gate"] {
            model[gate]["granularity"] = ["none", "headwise", "elementwise"][(i + gate.len()) % 3].into();
            model[gate]["shared"] = (i % 2 == 0).into();
        }
        std::fs::write(to.join("run.json"), info.to_string()).unwrap();
    }
    let diverged = dir.join(name(n - 1)).join("metrics.jsonl");
    let line = |step: u64| json!({ "step": step, "loss": 9.98e17 + step as f64 * 1e13, "grad_norm": 1e-7, "tokens": step * 512, "seconds": step });
    std::fs::write(diverged, (1..=12).map(|s| line(s).to_string() + "\n").collect::<String>()).unwrap();
    (0..n).map(name).collect()
}

#[track_caller]
fn fits(browser: &Path, page: &Path, widths: &[u32]) {
    for width in widths {
        let seen = opened(browser, page, *width);
        let tables = seen["tables"].as_array().unwrap();
        let of = |title: &str| tables.iter().filter(|t| t["title"] == title).collect::<Vec<_>>();
        assert!(of("Runs").len() == 1 && !of("Settings").is_empty(), "{tables:?}");
        for t in [of("Runs"), of("Settings")].concat() {
            assert_eq!(t["over"], 0, "{} at {width}: a table is wider than its box: {t}", page.display());
        }
    }
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// A study's folder from runs: two variants with two seeds, one that diverged.
fn study(folder: &Path, runs: &Path) {
    let mut variants = vec![];
    for (name, stem) in [("none", "none"), ("gated <b>", "gated")] {
        let mut arms = vec![];
        for seed in [1, 2] {
            let to = folder.join(format!("arms/{stem}/seed-{seed}"));
            std::fs::create_dir_all(&to).unwrap();
            for f in ["run.json", "metrics.jsonl", "measures.json", "eval.json", "passage.json"] {
                let _ = std::fs::copy(runs.join(format!("{stem}-{seed}")).join(f), to.join(f));
            }
            let bits = if stem == "none" { 3.0 } else { 2.9 } + f64::from(seed) / 100.0;
            arms.push(json!({ "seed": seed, "run": format!("arms/{stem}/seed-{seed}"), "state": "done", "step": 12, "values": { "bits": bits } }));
        }
        let difference = json!({ "mean": if stem == "none" { 0.0 } else { -0.1 }, "stderr": 0.01, "n": 2 });
        let summary = json!({ "bits": { "mean": if stem == "none" { 3.015 } else { 2.915 }, "stderr": 0.005, "n": 2, "difference": difference } });
        variants.push(json!({ "name": name, "about": "</script><script>document.documentElement.dataset.error = 'ran'</script>", "arms": arms, "summary": summary }));
    }
    variants.push(json!({ "name": "late", "arms": [{ "seed": 1, "run": "arms/late/seed-1", "state": "diverged", "values": {} }] }));
    let results = json!({
        "format": 1, "name": "gates", "title": "Does a gate help?", "baseline": "none", "seeds": [1, 2], "variants": variants,
        "columns": [{ "key": "bits", "label": "bits per byte", "better": "lower" }], "paper": { "columns": ["PPL"], "rows": { "none": [6.026] } },
    });
    std::fs::write(folder.join("results.json"), results.to_string()).unwrap();
}

#[test]
fn reports_open_in_a_browser() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    let set = "--set data.held_out=0.01 --set eval.every=4 --set eval.tokens=256 --set sample.count=0 --set model.full_attention_interval=2";
    for (name, granularity, seed) in [("none-1", "none", 1), ("none-2", "none", 2), ("gated-1", "elementwise", 1), ("gated-2", "elementwise", 2)] {
        let line =
            format!("train smoke {set} --set train.steps=12 --set seed={seed} --set model.attention_gate.granularity={granularity} --run-dir {name}");
        run(dir, &line.split(' ').collect::<Vec<_>>());
    }
    let curves = ["loss", "held-out", "grad_norm", "lr", "tokens_per_s", "layers-0", "load"];
    // before it is measured a run has its curves, and says what would add the rest
    assert_eq!(run(dir, &["report", "gated-1"]).trim(), "gated-1/report.html");
    assert!(std::fs::read_to_string(dir.join("gated-1/report.html")).unwrap().contains("`tidegate measure gated-1`"));
    let browser = browser();
    if let Some(b) = &browser {
        holds(b, &dir.join("gated-1/report.html"), &["training", "layers", "configuration"], &curves);
    }
    for name in ["none-1", "gated-1"] {
        run(dir, &["measure", name, "--tokens", "2048"]);
        let tasks = "--task needle,mqar --length 64,128 --depths 3 --samples 2 --passage 64 --set needle.difficulty=1,2 --set mqar.pairs=2,4";
        run(dir, &format!("eval {name} {tasks}").split(' ').collect::<Vec<_>>());
    }
    let answered = ["accuracy-needle-1", "map-needle-2", "accuracy-mqar", "map-mqar", "needle-read", "needle-kept", "needle-heads"];
    let measured = ["tasks", "attention", "gates", "activations", "recurrence", "experts", "depth", "text"];
    let drawn =
        ["first-token", "gate-score", "gate-histograms", "activation-profile", "half-life", "expert-load", "logit-lens", "positions", "trace"];
    run(dir, &["report", "gated-1"]);
    // several runs, one under a name that is none for HTML, with a token that would be a script
    let evil = dir.join("<img src=x onerror=document.documentElement.dataset.error='ran'>");
    std::fs::create_dir(&evil).unwrap();
    for f in ["run.json", "metrics.jsonl", "measures.json", "eval.json", "passage.json"] {
        std::fs::copy(dir.join("gated-1").join(f), evil.join(f)).unwrap();
    }
    let mut m = json_of(&evil.join("measures.json"));
    m["trace"]["tokens"][3] = json!("</script><script>document.documentElement.dataset.error = 'ran'</script>");
    std::fs::write(evil.join("measures.json"), m.to_string()).unwrap();
    run(dir, &["report", "none-1", "none-2", "gated-2", evil.to_str().unwrap(), "--out", "all.html"]);
    study(&dir.join("study"), dir);
    run(dir, &["report", "study"]);
    let Some(b) = &browser else { return };
    holds(b, &dir.join("gated-1/report.html"), &measured, &[&curves[..], &drawn, &answered].concat());
    holds(b, &dir.join("all.html"), &[&["results"][..], &measured].concat(), &drawn);
    holds(b, &dir.join("study/report.html"), &[&["results"][..], &measured].concat(), &[&["differences"][..], &drawn, &answered].concat());
    let seen = opened(b, &dir.join("all.html"), 1280);
    // of the runs' closing evaluations, over more text than the others, none is on a line
    let held_out = figure(&seen, "held-out");
    assert!(held_out["open"] == 4 && held_out["note"].as_str().unwrap().contains("Diamonds: at the end"), "{held_out}");
    // before and after the gate, in each of two layers
    for id in ["sdpa-output", "sdpa-sparse"] {
        assert_eq!(figure(&seen, id)["open"], 2, "{}", figure(&seen, id));
    }
    for n in [2, 7, 12] {
        let page = format!("many-{n}.html");
        let names = many(dir, n);
        run(dir, &[&["report"][..], &names.iter().map(String::as_str).collect::<Vec<_>>(), &["--out", &page]].concat());
        holds(b, &dir.join(&page), &["results", "training"], &["loss"]);
        fits(b, &dir.join(&page), &[1280, PAPER]);
    }
    run(dir, &["report", "half_life.and_more-11", "--out", "diverged.html"]);
    let seen = opened(b, &dir.join("diverged.html"), 1280);
    let ticks = figure(&seen, "loss")["texts"].as_array().unwrap().iter().map(|t| t.as_str().unwrap().to_string()).collect::<Vec<_>>();
    assert!(ticks.contains(&"9.9802e17".to_string()) && ticks.iter().all(|t| t.len() < 25), "{ticks:?}");
    // the test itself: a page whose script fails is found out
    let page = std::fs::read_to_string(dir.join("gated-1/report.html")).unwrap();
    std::fs::write(
        dir.join("broken.html"),
        page.replace("navigation(WATCH);", "navigation(WATCH); setTimeout(() => nothing(), 0); undefined_name.x;"),
    )
    .unwrap();
    let broken = std::panic::catch_unwind(|| opened(b, &dir.join("broken.html"), 1280));
    assert!(broken.is_err() || !broken.unwrap()["error"].is_null());
}

#[test]
fn wrong_usage_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    for (args, words) in [(&["report"][..], "PATH"), (&["report", "nowhere"], "nowhere does not exist"), (&["report", "."], "is no run folder")] {
        let o = tidegate(tmp.path(), args);
        let e = String::from_utf8_lossy(&o.stderr);
        assert!(o.status.code() == Some(2) && e.contains(words), "{args:?}: {e}");
    }
}
