//! A run folder, as far as it is there.

use super::log::{Log, last_step};
use super::numbers::{count, duration, plain};
use crate::checkpoint::{self, RunInfo};
use crate::measure::{self, Measures, Passage};
use crate::text::tokenizer;
use crate::{Error, Result};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The metrics' file name.
pub const METRICS: &str = "metrics.jsonl";
/// The configuration's file name.
pub const INFO: &str = "run.json";
/// The tasks' file name.
const TASKS: &str = "eval.json";

/// A run.
pub struct Run {
    /// What it is called: its folder's name.
    pub name: String,
    /// Its folder.
    pub path: PathBuf,
    /// How it came to be.
    pub info: Option<RunInfo>,
    /// Its metrics.
    pub log: Option<Log>,
    /// Its last checkpoint's measures.
    pub measures: Option<Measures>,
    /// What became of a needle.
    pub passage: Option<Passage>,
    /// Answers to generated tasks.
    pub tasks: Option<Value>,
    /// What is missing, and what would add it.
    pub notes: Vec<String>,
}

/// A key figure.
pub struct Fact {
    pub label: String,
    pub text: String,
    pub note: String,
}

fn fact(label: &str, text: String, note: String) -> Fact {
    Fact { label: label.into(), text, note }
}

/// Whether a folder holds something of a run.
pub fn is_run(path: &Path) -> bool {
    [INFO, METRICS, measure::FILE].iter().any(|f| path.join(f).is_file())
}

/// The last step of a run's metrics.
pub fn steps(path: &Path) -> Result<u64> {
    let metrics = path.join(METRICS);
    if metrics.is_file() { last_step(&metrics) } else { Ok(0) }
}

impl Run {
    /// Reads a run folder; its curves have so many points for runs of up to `steps` steps.
    pub fn open(path: &Path, steps: u64, points: (u64, u64)) -> Result<Run> {
        let (info, metrics, measures) = (path.join(INFO), path.join(METRICS), path.join(measure::FILE));
        let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        let name = whole.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let mut run = Run { name, path: path.to_path_buf(), info: None, log: None, measures: None, passage: None, tasks: None, notes: vec![] };
        let p = path.display();
        match info.is_file() {
            true => run.info = Some(checkpoint::read_info(path)?),
            false => run.notes.push(format!("{p} has no {INFO}: what was run is not known.")),
        }
        match metrics.is_file() {
            true => run.log = Some(Log::read(&metrics, steps, points)?),
            false => run.notes.push(format!("{p} has no {METRICS}: there are no curves.")),
        }
        match measures.is_file() {
            true => run.measures = Some(Measures::read(&measures)?),
            false => run.notes.push(format!(
                "{p} has no measures yet. `tidegate measure {}` adds attention, gates, activations, states, experts, the logit lens, loss by position and a text.",
                crate::cli::quoted(&p.to_string())
            )),
        }
        (run.passage, run.tasks) = (json_at(&path.join(measure::PASSAGE))?, json_at(&path.join(TASKS))?);
        if run.log.as_ref().is_some_and(|l| l.cut_off) {
            run.notes.push(format!("The last line of {} is cut off and was left out: the run was killed, or is still writing.", metrics.display()));
        }
        Ok(run)
    }

    /// The seed.
    pub fn seed(&self) -> Option<u64> {
        self.info.as_ref().map(|i| i.config.seed)
    }

    /// Whether its tokens are bytes of text, so that bits per token are bits per byte.
    fn is_bytes(&self) -> bool {
        self.info.as_ref().is_some_and(|i| i.config.model.vocab_size == 256) && !self.path.join(tokenizer::FILE).is_file()
    }

    /// What it trains on and is scored by, one by one: labels, where it reads tasks alone.
    fn scored(&self) -> &'static str {
        if self.info.as_ref().is_some_and(|i| i.config.tasks.share >= 1.0) { "label" } else { "token" }
    }

    /// The unit of its held-out results.
    pub fn unit(&self) -> &'static str {
        match self.scored() {
            "label" => "bits per label",
            _ if self.is_bytes() => "bits per byte",
            _ => "bits per token",
        }
    }

    /// The mean loss of the last twentieth of the steps, in nats: a step's own is noise.
    fn loss(&self) -> Option<f64> {
        let losses = &self.log.as_ref()?.losses;
        let last = &losses[losses.len() - losses.len().div_ceil(20)..];
        (!last.is_empty()).then(|| last.iter().map(|l| l.1).sum::<f64>() / last.len() as f64)
    }

    /// The closing evaluation, else the last.
    fn held_out(&self) -> Option<(f64, bool, Option<f64>)> {
        let all = &self.log.as_ref()?.evaluations;
        let e = all.iter().rev().find(|e| e.closing).or(all.last())?;
        Some((e.bits?, e.closing, e.scored))
    }

    /// What a reader wants to know first.
    pub fn facts(&self) -> Vec<Fact> {
        let mut all = vec![];
        if let Some((bits, closing, scored)) = self.held_out() {
            let over = scored.map_or(String::new(), |n| format!(", {} {}s", count(n), self.scored()));
            all.push(fact("held out", plain(bits), format!("{}{over}{}", self.unit(), if closing { "" } else { ", during the run" })));
        }
        if let Some(loss) = self.loss() {
            all.push(fact("training loss", plain(loss), format!("nats per {}, last 5 % of the steps", self.scored())));
        }
        if let Some((total, active)) = self.info.as_ref().map(|i| i.config.model.parameters()) {
            let (total, active) = (total as f64, active as f64);
            all.push(fact("parameters", count(total), format!("{} active", count(active))));
        }
        if let Some(last) = self.log.as_ref().map(|l| l.last).filter(|l| l.step > 0) {
            if let Some(tokens) = last.tokens {
                all.push(fact("tokens", count(tokens), format!("{} steps", last.step)));
            }
            if let Some(s) = last.seconds {
                let rate = last.tokens.filter(|_| s > 0.0).map_or(String::new(), |t| format!("{} tokens/s", count(t / s)));
                all.push(fact("time", duration(s), rate));
            }
        }
        let scalars = self.measures.as_ref().map(Measures::scalars).unwrap_or_default();
        for (key, label, note) in MEASURED {
            all.extend(scalars.get(key).map(|x| fact(label, plain(*x), note.into())));
        }
        all
    }

    /// Everything that is drawn of it. What only a few runs of a report are shown with comes with `shown`: each layer's curves, measures, configuration.
    pub fn value(&self, variant: usize, shown: bool, numbers: usize) -> Value {
        let facts: Vec<Value> = self.facts().iter().map(|f| json!({ "label": f.label, "text": f.text, "note": f.note })).collect();
        let mut v = json!({
            "name": self.name, "path": self.path.display().to_string(), "variant": variant, "seed": self.seed(), "unit": self.unit(), "scored": self.scored(),
            "facts": facts, "notes": self.notes, "shown": shown,
        });
        if let Some(i) = &self.info {
            v["about"] = json!({ "version": i.version, "command": i.command.join(" "), "machine": i.machine, "data": if i.config.tasks.alone() { "generated tasks".into() } else { i.config.data.path.display().to_string() } });
        }
        v["seq_len"] = json!(self.info.as_ref().map(|i| i.config.data.seq_len));
        v["tasks"] = self.tasks.as_ref().map_or(Value::Null, |t| t["tasks"].clone());
        if let Some(log) = &self.log {
            v["fine"] = curves(&log.fine, |name| matches!(name, "loss" | "grad_norm"));
            v["trend"] = curves(&log.trend, |_| false);
            v["evaluations"] = json!(log.evaluations);
            v["spikes"] = spikes(&log.losses);
            v["stopped"] = json!(log.stopped);
            if shown {
                v["coarse"] = curves(&log.coarse, |_| false);
            }
        }
        if shown {
            v["passage"] = json!(self.passage);
            v["measures"] = self.measures.as_ref().map_or(Value::Null, |m| measures(m, numbers));
            v["config"] = self.info.as_ref().map_or(Value::Null, |i| {
                let flat = flattened(i);
                let rows = flat.iter().map(|(k, v)| json!([k, v, i.origins.source.get(k).cloned().unwrap_or_default()]));
                Value::Array(rows.collect())
            });
        }
        v
    }
}

/// What a file holds, if it is there.
fn json_at<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    if !path.is_file() {
        return Ok(None);
    }
    let text = std::fs::read(path).map_err(Error::io("reading", path))?;
    serde_json::from_slice(&text).map(Some).map_err(|e| {
        let p = path.display();
        Error::Usage(format!("{p} is not what `tidegate eval` writes: {e}; remove it, or write it anew"))
    })
}

/// Measures that are key figures: name, label, unit.
const MEASURED: [(&str, &str, &str); 3] = [
    ("first_token", "first-token attention", "share, mean over heads"),
    ("gate_score", "gate score", "mean over attention's gates"),
    ("max_activation", "largest activation", "in the residual stream"),
];

/// Loss spikes by both definitions: how many, and the steps of the first of them.
fn spikes(losses: &[(u64, f64)]) -> Value {
    const SHOWN: usize = 300;
    let found = measure::spikes(losses);
    let of = |f: &measure::Found| json!({ "count": f.steps.len(), "judged": f.judged, "steps": f.steps.iter().take(SHOWN).collect::<Vec<_>>() });
    json!({ "deviation": of(&found.deviation), "median": of(&found.median) })
}

/// Curves as JSON; `ranged` ones with the range of their values.
fn curves(c: &super::curves::Curves, ranged: impl Fn(&str) -> bool) -> Value {
    let x = ["step", "tokens", "seconds"];
    let of = |name: &str| if ranged(name) { json!(c.points(name)) } else { json!({ "mean": c.mean(name) }) };
    let series: Map<String, Value> = c.names().filter(|n| !x.contains(n)).map(|n| (n.to_string(), of(n))).collect();
    json!({ "width": c.width(), "step": c.mean("step"), "tokens": c.mean("tokens"), "seconds": c.mean("seconds"), "series": series })
}

/// Measures as JSON, their text's gates in at most so many numbers: heads are left out first, then the text.
fn measures(m: &Measures, numbers: usize) -> Value {
    let mut m = m.clone();
    let size = |t: &measure::Trace| t.series.iter().map(|s| s.values.len() + s.heads.iter().map(Vec::len).sum::<usize>()).sum::<usize>();
    let mut cut = None;
    if let Some(t) = m.trace.as_mut().filter(|t| size(t) > numbers) {
        t.series.iter_mut().for_each(|s| s.heads.clear());
        cut = Some("single heads are left out here to keep this file small; measures.json has them");
        if size(t) > numbers {
            m.trace = None;
            cut = Some("the text is left out here to keep this file small; measures.json has it");
        }
    }
    let mut v = serde_json::to_value(&m).unwrap_or_default();
    v["trace_cut"] = json!(cut);
    v
}

/// A configuration as dotted keys.
pub fn flattened(info: &RunInfo) -> BTreeMap<String, String> {
    fn flatten(key: &str, v: &Value, out: &mut BTreeMap<String, String>) {
        match v {
            Value::Object(o) => o.iter().for_each(|(k, v)| flatten(&if key.is_empty() { k.clone() } else { format!("{key}.{k}") }, v, out)),
            Value::Null => drop(out.insert(key.into(), "not set".into())),
            Value::String(s) => drop(out.insert(key.into(), s.clone())),
            v => drop(out.insert(key.into(), v.to_string())),
        }
    }
    let mut out = BTreeMap::new();
    flatten("", &serde_json::to_value(&info.config).unwrap_or_default(), &mut out);
    out
}

/// An error for a path that holds nothing to report on.
pub fn nothing(path: &Path) -> Error {
    let p = path.display();
    if !path.exists() {
        return Error::Usage(format!("{p} does not exist; a report is made of a run folder, as runs/quickstart, or of a study's folder"));
    }
    Error::Usage(format!("{p} is no run folder ({INFO}, {METRICS}, {}) and no study's folder ({})", measure::FILE, crate::study::FILE))
}
