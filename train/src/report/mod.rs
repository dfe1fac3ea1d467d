//! Reports: one HTML file for a run, for several runs, or for a study. It holds all that it shows and needs no network.
//!
//! Everything is optional: a run without measures has its curves, a study some of whose arms are still to run has those that are done. What is missing is
//! said to be missing.

mod compare;
mod curves;
mod log;
pub(crate) mod numbers;
mod page;
mod run;
mod study;
mod table;
#[cfg(test)]
mod tests;

use crate::study::{FILE, Results, State};
use crate::{Error, Result};
use curves::spread;
use run::Run;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Points of a run's own curves, and of each layer's.
const POINTS: (u64, u64) = (400, 80);
/// The same where there are many runs.
const FEWER: (u64, u64) = (200, 60);
const MANY: usize = 12;
/// Gates along texts, in numbers over all runs: about three megabytes.
const TRACED: usize = 500_000;

/// Runs that differ in their seeds alone, or a study's variant.
struct Group {
    name: String,
    about: Option<String>,
    runs: Vec<usize>,
}

/// Writes the report on what `paths` are: one or more run folders, or one study's folder. By default it lies in the folder that it is about, and one about
/// several runs in the current one. Returns where it is.
pub fn write(paths: &[PathBuf], out: Option<&Path>) -> Result<PathBuf> {
    let studies: Vec<&PathBuf> = paths.iter().filter(|p| p.join(FILE).is_file()).collect();
    let (title, data) = match (&studies[..], paths) {
        ([], []) => return Err(Error::Usage("a report on what? Name a run folder, several, or a study's folder".into())),
        ([], runs) => of_runs(runs)?,
        ([study], [_]) => of_study(study)?,
        ([study, ..], _) => {
            let s = study.display();
            return Err(Error::Usage(format!("{s} is a study, and a report shows one study, or runs; name it alone, or its runs as {s}/arms/…")));
        }
    };
    let default = if let [one] = paths { one.join("report.html") } else { PathBuf::from("report.html") };
    let out = out.unwrap_or(&default);
    if out.is_dir() {
        return Err(Error::Usage(format!(
            "--out {}: expected a file, found a folder; name one in it, as {}",
            out.display(),
            out.join("report.html").display()
        )));
    }
    if std::fs::read(out).is_ok_and(|old| !old.windows(page::MARK.len()).any(|w| w == page::MARK.as_bytes())) {
        return Err(Error::Usage(format!("{} is there, and is no report; name another file by --out", out.display())));
    }
    crate::checkpoint::write(out, page::html(&title, data).as_bytes())?;
    Ok(out.to_path_buf())
}

fn open_all(paths: &[PathBuf]) -> Result<Vec<Run>> {
    if let Some(p) = paths.iter().find(|p| !run::is_run(p)) {
        return Err(run::nothing(p));
    }
    let steps = paths.iter().map(|p| run::steps(p)).collect::<Result<Vec<u64>>>()?.into_iter().max().unwrap_or(0);
    paths.iter().map(|p| Run::open(p, steps, if paths.len() > MANY { FEWER } else { POINTS })).collect()
}

/// Groups runs whose configurations differ in the seed alone.
fn grouped(runs: &[Run]) -> Vec<Group> {
    let key = |r: &Run| {
        r.info.as_ref().map(|i| {
            let mut flat = run::flattened(i);
            flat.retain(|k, _| k != "seed" && k != "name");
            flat
        })
    };
    let keys: Vec<_> = runs.iter().map(key).collect();
    let mut groups: Vec<Group> = vec![];
    for i in 0..runs.len() {
        match groups.iter_mut().find(|g| keys[i].is_some() && keys[g.runs[0]] == keys[i]) {
            Some(g) => g.runs.push(i),
            None => groups.push(Group { name: String::new(), about: None, runs: vec![i] }),
        }
    }
    for g in &mut groups {
        let first = &runs[g.runs[0]].name;
        let shared = g.runs.iter().fold(first.len(), |n, r| first.bytes().zip(runs[*r].name.bytes()).take(n).take_while(|(a, b)| a == b).count());
        let stem = if g.runs.len() == 1 { first } else { first.get(..shared).unwrap_or(first) };
        let stem = if g.runs.len() == 1 { stem } else { stem.trim_end_matches(['-', '_', '.', ' ']) };
        g.name = if stem.is_empty() { first.clone() } else { stem.to_string() };
    }
    groups
}

fn of_runs(paths: &[PathBuf]) -> Result<(String, Value)> {
    let mut runs = open_all(paths)?;
    let names: Vec<String> = runs.iter().map(|r| r.name.clone()).collect();
    for r in &mut runs {
        if names.iter().filter(|n| **n == r.name).count() > 1 {
            r.name = r.path.display().to_string();
        }
    }
    let groups = grouped(&runs);
    let tables = if runs.len() > 1 { compare::tables(&runs, &groups) } else { vec![] };
    let title = match &runs[..] {
        [one] => one.name.clone(),
        all => format!("{} runs compared", all.len()),
    };
    let data = data(&title, &runs, &groups, json!({ "tables": tables }));
    Ok((title, data))
}

fn of_study(folder: &Path) -> Result<(String, Value)> {
    let results = Results::read(&folder.join(FILE))?;
    let (mut paths, mut groups, mut notes) = (vec![], vec![], vec![]);
    for v in &results.variants {
        let mut group = Group { name: v.name.clone(), about: (!v.about.is_empty()).then(|| v.about.clone()), runs: vec![] };
        for arm in &v.arms {
            let path = folder.join(&arm.run);
            if run::is_run(&path) {
                group.runs.push(paths.len());
                paths.push(path);
            } else if arm.state != State::Pending {
                notes.push(format!(
                    "{}, seed {}: {} by {}, but its run folder {} is not there.",
                    v.name,
                    arm.seed,
                    arm.state.word(),
                    FILE,
                    path.display()
                ));
            }
        }
        groups.push(group);
    }
    let mut runs = open_all(&paths)?;
    for g in &groups {
        for r in &g.runs {
            let run = &mut runs[*r];
            run.name = run.seed().map_or_else(|| g.name.clone(), |s| format!("{}, seed {s}", g.name));
        }
    }
    let title = if results.title.is_empty() { results.name.clone() } else { results.title.clone() };
    let tables = study::tables(&results);
    let study = json!({ "results": results, "folder": folder.display().to_string() });
    let data = data(&title, &runs, &groups, json!({ "tables": tables, "study": study, "notes": notes }));
    Ok((title, data))
}

/// Which runs are shown in all detail: of seeds that share a configuration, the first that has measures.
fn shown(runs: &[Run], groups: &[Group]) -> Vec<bool> {
    let of = |g: &Group| g.runs.iter().copied().find(|r| runs[*r].measures.is_some()).or(g.runs.first().copied());
    let first: BTreeSet<usize> = groups.iter().filter_map(of).take(MANY).collect();
    (0..runs.len()).map(|i| first.contains(&i)).collect()
}

fn data(title: &str, runs: &[Run], groups: &[Group], mut more: Value) -> Value {
    let shown = shown(runs, groups);
    let numbers = TRACED / shown.iter().filter(|s| **s).count().max(1);
    let slot = |i: usize| groups.iter().position(|g| g.runs.contains(&i)).unwrap_or(0);
    let group = |g: &Group| {
        let losses: Vec<_> = g.runs.iter().filter_map(|r| runs[*r].log.as_ref()).map(|l| l.trend.mean("loss")).collect();
        let spread = (losses.len() > 1).then(|| spread(&losses));
        json!({ "name": g.name, "about": g.about, "runs": g.runs, "loss": spread })
    };
    more["title"] = json!(title);
    more["version"] = json!(env!("CARGO_PKG_VERSION"));
    more["variants"] = groups.iter().map(group).collect();
    more["runs"] = runs.iter().enumerate().map(|(i, r)| r.value(slot(i), shown[i], numbers)).collect();
    more
}
