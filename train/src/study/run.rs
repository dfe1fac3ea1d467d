//! Running a study: arm after arm, with its results written anew after each.

use super::arm::{self, Outcome};
use super::plan::{Arm, Plan};
use super::results::{FILE, FORMAT, Results};
use crate::data::Corpus;
use crate::progress::say;
use crate::tasks::Source;
use crate::{Error, Result, checkpoint};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The study's file in its folder, as it was last run.
const STUDY: &str = "study.toml";

/// A study's folder, locked against a second writer.
struct Folder {
    path: PathBuf,
    _lock: File,
}

impl Folder {
    fn open(path: &Path, plan: &Plan) -> Result<Folder> {
        let results = path.join(FILE);
        if results.is_file() {
            match Results::read(&results) {
                Ok(was) if was.name != plan.name => {
                    let p = path.display();
                    return Err(Error::Usage(format!("{p} holds the study `{}`, not `{}`; choose another folder by --out", was.name, plan.name)));
                }
                Ok(_) => {}
                // nothing is in it that the arms' folders don't say
                Err(_) if is_damaged(&results) && path.join(STUDY).is_file() => {
                    say(&format!("{} is damaged, and is written anew from the arms' folders", results.display()));
                }
                Err(e) => return Err(e),
            }
        } else if path.join("run.json").exists() {
            return Err(Error::Usage(format!("{} is a run's folder; choose another for the study by --out", path.display())));
        }
        fs::create_dir_all(path).map_err(Error::io("creating", path))?;
        let Some(lock) = checkpoint::lock(&path.join("lock"))? else {
            return Err(Error::Usage(format!("{}: another process is running this study; wait for it, or stop it", path.display())));
        };
        let text = toml::to_string(&plan.file).map_err(|e| Error::Usage(format!("study {}: {e}", plan.name)))?;
        checkpoint::write(&path.join(STUDY), text.as_bytes())?;
        Ok(Folder { path: path.to_path_buf(), _lock: lock })
    }
}

/// Whether a `results.json` that can't be read was cut off or written over, and is not that of another version.
fn is_damaged(results: &Path) -> bool {
    let value = fs::read(results).map(|text| serde_json::from_slice::<serde_json::Value>(&text));
    value.is_ok_and(|v| v.map_or(true, |v| v["format"] == FORMAT))
}

/// The texts that arms read, each opened once.
#[derive(Default)]
struct Texts(BTreeMap<PathBuf, Corpus>);

impl Texts {
    fn of(&mut self, arm: &Arm) -> Result<&Corpus> {
        let config = &arm.resolved.config;
        let path = if config.tasks.alone() { PathBuf::new() } else { config.data.path.clone() };
        if !self.0.contains_key(&path) {
            self.0.insert(path.clone(), Corpus::of_run(config)?);
        }
        Ok(&self.0[&path])
    }
}

/// Trains and measures what `plan` names and `path` does not hold yet; the results, which are written to `path` after each arm, of all that there is.
/// `whole` is the plan before arms were chosen of it.
pub fn run(plan: &Plan, whole: &Plan, path: &Path, place: impl Fn(&Arm) -> Result<nn::Placement>) -> Result<Results> {
    whole.arms.iter().try_for_each(|arm| arm::check(arm, path))?;
    let folder = Folder::open(path, plan)?;
    let mut texts = Texts::default();
    // what is wrong with the text is wrong before the first arm
    for arm in &plan.arms {
        let corpus = texts.of(arm)?;
        let c = &arm.resolved.config;
        if c.model.vocab_size < corpus.vocab_size() {
            let (need, found) = (corpus.vocab_size(), c.model.vocab_size);
            return Err(Error::Usage(format!(
                "variant `{}`: model.vocab_size: {} needs {need}, found {found}; add --set model.vocab_size={need}",
                plan.variant(arm).name,
                c.data.path.display()
            )));
        }
        Source::new(corpus, c)?;
        let held_out = corpus.split(c.data.held_out).1;
        let range = if held_out.is_empty() { 0..corpus.len() } else { held_out };
        let there = range.end.saturating_sub(range.start.max(1));
        if !corpus.is_empty() && there < c.data.seq_len {
            return Err(Error::Usage(format!(
                "variant `{}`: {there} tokens of {} are there to measure on (data.held_out), and a window has {} (data.seq_len); name a longer text",
                plan.variant(arm).name,
                corpus.path().display(),
                c.data.seq_len
            )));
        }
    }
    results(whole, &folder.path)?.write(&folder.path.join(FILE))?;
    for (i, arm) in plan.arms.iter().enumerate() {
        let (v, before) = (plan.variant(arm), arm::outcome(&folder.path.join(&arm.folder), plan.file.eval.as_ref())?);
        let head = format!("arm {} of {}: {}, seed {}", i + 1, plan.arms.len(), v.name, arm.seed);
        match before.state {
            arm::State::Done => say(&format!("{head}: done before")),
            arm::State::Diverged => say(&format!("{head}: diverged before")),
            arm::State::Pending => say(&head),
            arm::State::Running => say(&format!("{head}: going on after step {}", before.step)),
        }
        arm::finish(plan, arm, &folder.path, texts.of(arm)?, &place(arm)?)?;
        results(whole, &folder.path)?.write(&folder.path.join(FILE))?;
    }
    let results = results(whole, &folder.path)?;
    results.write(&folder.path.join(FILE))?;
    checkpoint::write(&folder.path.join("table.md"), format!("# {}\n\n{}", results.title, results.markdown()).as_bytes())?;
    Ok(results)
}

/// What a study's folder holds.
fn results(plan: &Plan, path: &Path) -> Result<Results> {
    let all: Vec<(Arm, Outcome)> =
        plan.arms.iter().map(|a| Ok((a.clone(), arm::outcome(&path.join(&a.folder), plan.file.eval.as_ref())?))).collect::<Result<_>>()?;
    Ok(Results::new(plan, &all))
}
