//! What an arm answers to generated tasks once it is trained.

use super::file::EvalFile;
use crate::config::RunConfig;
use crate::data::Corpus;
use crate::progress::say;
use crate::tasks::{EvalReport, FILE, Haystack, Options, Task, evaluate, follow};
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
    let tasks = eval.tasks.iter().map(|t| Task::by_name(t)).collect::<Result<Vec<Task>>>()?;
    say(&format!("evaluating by {}", eval.tasks.join(", ")));
    let held_out = corpus.split(config.data.held_out).1;
    let range = if held_out.is_empty() { 0..corpus.len() } else { held_out };
    let text = (!corpus.is_empty()).then_some(Haystack { corpus, range });
    let options = Options {
        lengths: eval.lengths.clone(),
        depths: eval.depths,
        samples: eval.samples,
        seed: config.seed,
        text: text.clone(),
        beyond: true,
        ..Options::new(config.tasks.clone())
    };
    let mut report = evaluate(model, &tasks, &options, &mut |_, _| {})?;
    let newest = checkpoint::checkpoints(folder)?.pop();
    report.checkpoint = newest.map_or(folder.to_path_buf(), |c| c.1).display().to_string();
    report.step = Some(step);
    if eval.passage > 0 {
        let way = follow(model, &config.tasks, text.as_ref(), eval.passage, config.seed)?;
        way.write(&folder.join(measure::PASSAGE))?;
    }
    report.write(&folder.join(FILE)).map(drop)
}

/// An error if a study asks for what can't be asked of its arms.
pub(super) fn check(eval: &EvalFile) -> Result<()> {
    for name in &eval.tasks {
        if let Task::Niah(_) = Task::by_name(name)? {
            return Err(Error::Usage(format!(
                "`eval.tasks`: {name} is in English; studies ask tasks that are made of tokens, `tidegate eval` asks it of their runs"
            )));
        }
    }
    if eval.tasks.is_empty() {
        return Err(Error::Usage("`eval.tasks` is empty; name a task, as in tasks = [\"mqar\"]".into()));
    }
    Ok(())
}
