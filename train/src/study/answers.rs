//! What an arm answers to generated tasks once it is trained.

use super::file::EvalFile;
use crate::config::RunConfig;
use crate::data::Corpus;
use crate::progress::say;
use crate::tasks::{self, EvalReport, FILE, Haystack, Options, Task, check_passage, evaluate, follow};
use crate::{Error, Result, checkpoint, measure};
use nn::Decoder;
use std::path::Path;

/// What was asked before, if it is all that is asked for.
pub(super) fn given(eval: &EvalFile, folder: &Path, step: u64) -> Option<EvalReport> {
    let report = EvalReport::read(&folder.join(FILE)).ok().filter(|r| r.step == Some(step))?;
    let has = |task: &String| {
        let cells = report.tasks.iter().find(|t| t.task == *task).map(|t| &t.cells[..]).unwrap_or_default();
        eval.lengths.iter().all(|l| cells.iter().any(|c| c.length == *l)) && !cells.is_empty()
    };
    let followed = eval.passage == 0 || folder.join(measure::PASSAGE).is_file();
    (followed && eval.tasks.iter().all(has)).then_some(report)
}

/// Asks a trained model, and writes down its answers; samples are those of its seed, the same for all variants.
pub(super) fn take(eval: &EvalFile, config: &RunConfig, folder: &Path, corpus: &Corpus, model: &Decoder, step: u64) -> Result<()> {
    let to = folder.join(FILE);
    if let Some(e) = EvalReport::read(&to).err().filter(|_| to.is_file()) {
        say(&format!("asking anew: {e}"));
        std::fs::remove_file(&to).map_err(Error::io("removing", &to))?;
    }
    say(&format!("evaluating by {}", eval.tasks.join(", ")));
    let held_out = corpus.split(config.data.held_out).1;
    let range = if held_out.is_empty() { 0..corpus.len() } else { held_out };
    let text = (!corpus.is_empty()).then_some(Haystack { corpus, range });
    let options = Options { text: text.clone(), ..options(eval, config) };
    let mut report = evaluate(model, &of_names(eval)?, &options, &mut |_, _| {})?;
    let newest = checkpoint::checkpoints(folder)?.pop();
    report.checkpoint = newest.map_or(folder.to_path_buf(), |c| c.1).display().to_string();
    report.step = Some(step);
    if eval.passage > 0 {
        let way = follow(model, &config.tasks, text.as_ref(), eval.passage, config.seed)?;
        way.write(&folder.join(measure::PASSAGE))?;
    }
    report.write(&to).map(drop)
}

fn of_names(eval: &EvalFile) -> Result<Vec<Task>> {
    eval.tasks.iter().map(|t| Task::by_name(t)).collect()
}

fn options(eval: &EvalFile, config: &RunConfig) -> Options<'static> {
    Options { lengths: eval.lengths.clone(), depths: eval.depths, samples: eval.samples, seed: config.seed, ..Options::new(config.tasks.clone()) }
}

/// An error if a study asks for what can't be asked of any arm.
pub(super) fn check(eval: &EvalFile) -> Result<()> {
    let wrong = |m: String| Err(Error::Usage(m));
    let tasks = of_names(eval).map_err(|e| Error::Usage(format!("eval.tasks: {e}")))?;
    if let Some(t) = tasks.iter().find(|t| matches!(t, Task::Niah(_))) {
        return wrong(format!("eval.tasks: {t} is in English; studies ask tasks that are made of tokens, `tidegate eval` asks it of their runs"));
    }
    if let Some((_, t)) = tasks.iter().enumerate().find(|(i, t)| tasks[..*i].contains(t)) {
        return wrong(format!("eval.tasks names {t} twice"));
    }
    if tasks.is_empty() {
        return wrong("eval.tasks is empty; name a task, as in tasks = [\"mqar\"]".into());
    }
    let counts = eval.lengths.iter().map(|l| ("lengths", *l)).chain(eval.depths.map(|n| ("depths", n))).chain(eval.samples.map(|n| ("samples", n)));
    if let Some((key, _)) = counts.into_iter().find(|(_, n)| *n == 0) {
        return wrong(format!("eval.{key}: expected at least 1, found 0"));
    }
    if eval.passage > 0 && !tasks.contains(&Task::Needle) {
        return wrong(format!("eval.passage = {} follows a needle of tokens; name the task `needle` in eval.tasks, or leave it out", eval.passage));
    }
    Ok(())
}

/// The names of what an arm's answers come to; an error if its model can't be asked.
pub(super) fn check_arm(eval: &EvalFile, config: &RunConfig) -> Result<Vec<String>> {
    let (c, tasks, options) = (&config.model, of_names(eval)?, options(eval, config));
    let own = |t: &Task| if eval.lengths.is_empty() { config.tasks.lengths(*t).to_vec() } else { eval.lengths.clone() };
    let lengths = tasks.iter().flat_map(own).map(|l| ("lengths", l)).chain([("passage", eval.passage)]);
    let most = c.max_position_embeddings;
    if let Some((key, l)) = lengths.into_iter().find(|(_, l)| *l > most) {
        return Err(Error::Usage(format!(
            "eval.{key}: {l} tokens are more than the {most} that the model is meant to read; ask for less, or set model.max_position_embeddings"
        )));
    }
    let text = !config.tasks.alone();
    let named = |key: &str, e: Error| Error::Usage(format!("eval.{key}: {e}"));
    if eval.passage > 0 {
        check_passage(c, &config.tasks, text, eval.passage, false).map_err(|e| named("passage", e))?;
    }
    tasks::check(c, &tasks, &options, text).map_err(|e| named("tasks", e))
}
