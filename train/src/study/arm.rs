//! One arm: what its run folder says of it, and training what is left of it.

use super::answers;
use super::file::{EvalFile, Measure};
use super::plan::{Arm, Plan};
use crate::checkpoint::{self, RunDir};
use crate::config::RunConfig;
use crate::data::Corpus;
use crate::learner::{Hybrid, Network, Trained};
use crate::measure::{self, Measures, Options};
use crate::progress::say;
use crate::tasks::Source;
use crate::text::{Codec, tokenizer};
use crate::{Error, Result, groups, trainer};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// How far an arm is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Not begun.
    Pending,
    /// Begun, and not at its end.
    Running,
    /// Trained and measured.
    Done,
    /// Its numbers stopped being finite.
    Diverged,
}

impl State {
    /// As `results.json` has it.
    pub fn word(self) -> &'static str {
        match self {
            State::Pending => "pending",
            State::Running => "running",
            State::Done => "done",
            State::Diverged => "diverged",
        }
    }
}

/// What came of an arm.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// How far it is.
    pub state: State,
    /// Steps done.
    pub step: u64,
    /// Scalars by name; of one that is not done, those that there are.
    pub values: BTreeMap<String, f64>,
}

/// The part of a run at its end whose training losses are averaged for `train_loss`.
const LAST: f64 = 0.1;

/// What a run folder says of its arm, which is done once it has answered what `eval` asks.
pub(super) fn outcome(run: &Path, eval: Option<&EvalFile>) -> Result<Outcome> {
    let metrics = run.join("metrics.jsonl");
    let mut out = Outcome { state: State::Pending, step: 0, values: BTreeMap::new() };
    if !metrics.is_file() {
        return Ok(out);
    }
    let losses = measure::losses(&metrics)?;
    out.state = State::Running;
    out.step = losses.last().map_or(0, |l| l.0);
    let last = last_line(&metrics)?;
    if let Some(l) = last.as_ref().filter(|l| l["stopped"].is_string()) {
        out.state = State::Diverged;
        out.step = l["step"].as_u64().unwrap_or(out.step);
    }
    let mut put = |name: &str, x: Option<f64>| {
        if let Some(x) = x.filter(|x| x.is_finite()) {
            out.values.insert(name.into(), x);
        }
    };
    let finite: Vec<f64> = losses.iter().map(|l| l.1).filter(|l| l.is_finite()).collect();
    let tail = &finite[finite.len() - ((finite.len() as f64 * LAST).ceil() as usize).min(finite.len())..];
    put("train_loss", (!tail.is_empty()).then(|| tail.iter().sum::<f64>() / tail.len() as f64));
    put("rise", measure::rise(&finite));
    let spikes = measure::spikes(&losses);
    put("spikes", Some(spikes.median.steps.len() as f64));
    put("spikes_7_sigma", Some(spikes.deviation.steps.len() as f64));
    put("seconds", measure::series(&metrics, "seconds")?.last().map(|s| s.1));
    let mut rates: Vec<f64> = measure::series(&metrics, "tokens_per_s")?.into_iter().map(|s| s.1).filter(|r| r.is_finite()).collect();
    rates.sort_by(f64::total_cmp);
    put("tokens_per_s", rates.get(rates.len() / 2).copied());
    if let Some(l) = last.as_ref().filter(|l| l["final"] == true) {
        put("held_out_bits", l["held_out_bits"].as_f64());
        put("held_out_bits_per_byte", l["held_out_bits_per_byte"].as_f64());
        let tasks = l.as_object().into_iter().flatten().filter(|(k, _)| k.starts_with("tasks."));
        tasks.for_each(|(k, x)| put(k, x.as_f64()));
        put("held_out_loss", l["held_out_bits"].as_f64().map(|b| b * std::f64::consts::LN_2));
        // a file of measures that was cut off is written again
        if let Ok(m) = Measures::read(&run.join(measure::FILE))
            && m.step == Some(out.step)
        {
            let asked = eval.map(|e| answers::given(e, run, out.step));
            if !matches!(asked, Some(None)) {
                out.state = State::Done;
            }
            out.values.extend(asked.flatten().map(|r| r.scalars()).unwrap_or_default());
            // the loss over the held-out tokens that measures read is not that over all of them
            out.values.extend(
                m.scalars()
                    .into_iter()
                    .filter(|(k, _)| k != "loss")
                    .map(|(k, x)| if k == "bits_per_byte" { ("measured_bits_per_byte".into(), x) } else { (k, x) }),
            );
        }
    }
    Ok(out)
}

/// The last whole line of a `metrics.jsonl`.
fn last_line(path: &Path) -> Result<Option<Value>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("reading", path))?;
    Ok(text.split_inclusive('\n').rev().filter(|l| l.ends_with('\n')).find_map(|l| serde_json::from_str(l).ok()))
}

/// An error if an arm's folder was begun with another configuration: its numbers, finished or not, would stand for what was not asked.
pub(super) fn check(arm: &Arm, study: &Path) -> Result<()> {
    let folder = study.join(&arm.folder);
    if !folder.join("run.json").is_file() {
        return Ok(());
    }
    let was = checkpoint::read_info(&folder)?;
    // what computes is chosen when an arm begins
    let changes = arm.resolved.changes(&was.config)?;
    match changes.iter().find(|c| !matches!(c.key.as_str(), "train.dtype" | "train.log_every" | "data.eot")) {
        None => Ok(()),
        Some(c) => {
            let f = folder.display();
            Err(Error::Usage(format!(
                "{f} was begun with another configuration: {c}; give the variant another name, or the study another folder by --out, or remove {f}"
            )))
        }
    }
}

/// Trains and measures what is left of an arm. Numbers that stop being finite are an outcome, not an error.
pub(super) fn finish(plan: &Plan, arm: &Arm, study: &Path, corpus: &Corpus, place: &nn::Placement) -> Result<Outcome> {
    let folder = study.join(&arm.folder);
    let eval = plan.file.eval.as_ref();
    let before = outcome(&folder, eval)?;
    if matches!(before.state, State::Done | State::Diverged) {
        return Ok(before);
    }
    let config = &arm.resolved.config;
    let mut model = Hybrid::create(&config.model, config.seed, place)?;
    groups::frozen(&model.net().params(), &config.optim.freeze)?;
    let run = RunDir::open(&folder, true)?;
    let found: Vec<_> = checkpoint::checkpoints(&folder)?.into_iter().rev().map(|c| c.1).collect();
    let skip = |path: &Path, e: &Error| say(&format!("skipped {}: {e}", path.display()));
    let lost = |e: Error| {
        let f = folder.display();
        Error::Checkpoint(format!("{f} holds no whole checkpoint to go on from; remove that folder to train the arm anew. Of the oldest: {e}"))
    };
    let from = match found.len() {
        0 => None,
        _ => Some(checkpoint::first_whole(&found, skip, |c| trainer::load(&mut model, c)).map_err(lost)?.1),
    };
    if from.is_none() && !config.train.from.as_os_str().is_empty() {
        model.begin_from(&config.train.from)?;
    }
    if from.as_ref().and_then(|s| s.corpus).is_some_and(|then| then != corpus.fingerprint()) {
        return Err(Error::data(
            corpus.path(),
            format!("is not the text that {} was begun with; put that back, or give the study another folder", folder.display()),
        ));
    }
    if let Some(Codec::Tokenizer(t)) = corpus.codec() {
        checkpoint::write(&folder.join(tokenizer::FILE), t.json())?;
    }
    let command: Vec<String> = std::env::args().collect();
    run.write_config(&arm.resolved, &command, &model.net().config_json()?)?;
    if let Some(note) = crate::composed::note(config, place)? {
        say(&note);
    }
    match trainer::train(&mut model, corpus, config, &run, from) {
        Err(Error::NonFinite(m)) => {
            say(&format!("{} diverged: {m}", plan.variant(arm).name));
            return outcome(&folder, eval);
        }
        done => done?,
    };
    let done = outcome(&folder, eval)?;
    let asked = eval.map_or(Ok(()), |e| answers::take(e, config, &folder, corpus, model.net().model(), done.step));
    match asked.and_then(|()| take_measures(plan, arm, &folder, corpus, &model, done.step)) {
        Err(Error::NonFinite(m)) => {
            say(&format!("{} diverged: {m}", plan.variant(arm).name));
            Ok(Outcome { state: State::Diverged, ..done })
        }
        done => done.and_then(|()| outcome(&folder, eval)),
    }
}

/// How an arm is measured.
pub(super) fn measuring(asked: &Measure, config: &RunConfig) -> Options {
    let only = measure::had_by(&config.model, &asked.only);
    Options { tokens: asked.tokens, context: asked.context, only, ..Options::new(config.data.seq_len) }
}

fn take_measures(plan: &Plan, arm: &Arm, folder: &Path, corpus: &Corpus, model: &Trained<Hybrid>, step: u64) -> Result<()> {
    let config = &arm.resolved.config;
    // where nothing but tasks is trained on, they are what there is to look at
    let tasks = if corpus.is_empty() { Some(Source::new(corpus, config)?.tokens()?) } else { None };
    let held_out = if tasks.is_some() { 0..0 } else { corpus.split(config.data.held_out).1 };
    let corpus = tasks.as_ref().unwrap_or(corpus);
    let range = if held_out.is_empty() { 0..corpus.len() } else { held_out };
    let options = Options { codec: corpus.codec().cloned(), ..measuring(&plan.file.measure, config) };
    let mut m = measure::measure(model.net().model(), corpus, range, &options)?;
    let newest = checkpoint::checkpoints(folder)?.pop();
    m.checkpoint = newest.map_or(folder.to_path_buf(), |c| c.1).display().to_string();
    m.step = Some(step);
    m.write(&folder.join(measure::FILE))
}
