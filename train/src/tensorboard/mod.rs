//! Event files for TensorBoard, beside `metrics.jsonl`: `tensorboard/events.out.tfevents.<seconds>.<host>`.
//!
//! A tag is a metric's name with its last dot as a slash, by which TensorBoard groups: `blocks.0.attn/gate_mean`. Names without a dot are under
//! `train/`, those of a held-out evaluation under `eval/`, and those of a run's last evaluation, over all that is held out, under `final/`.
//!
//! A run has one event file. A run that goes on copies what holds of the old one into a new one, and empties the old one: no step is there twice, whatever
//! reads it. The new file begins with a session log that says so, upon which a TensorBoard that is looking forgets what it has read. The old one is
//! removed only when the run goes on once more: a TensorBoard whose file is gone does not look for another.

mod proto;
mod record;
#[cfg(test)]
mod tests;

use crate::histogram::Distribution;
use crate::metrics::Scalars;
use crate::{Error, Result};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// The folder in a run folder.
pub const FOLDER: &str = "tensorboard";
const PREFIX: &str = "events.out.tfevents.";
/// Tags of a run's closing evaluation, which a run that goes on has not come to yet.
const FINAL: &str = "final/";

/// The writer of a run's event file.
#[derive(Debug)]
pub struct Events {
    file: File,
    path: PathBuf,
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().map(|c| if c.is_ascii_alphanumeric() || "-_.".contains(c) { c } else { '-' }).collect();
    if name.is_empty() { "localhost".into() } else { name }
}

/// How TensorBoard calls a metric.
fn tag(name: &str, closing: bool) -> String {
    match name.rsplit_once('.') {
        Some((group, last)) => format!("{group}/{last}"),
        None if closing => format!("{FINAL}{name}"),
        None if name.starts_with("held_out") => format!("eval/{name}"),
        None => format!("train/{name}"),
    }
}

/// The event files of a run folder, oldest first.
fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut all = vec![];
    for entry in fs::read_dir(folder).map_err(Error::io("reading", folder))? {
        let path = entry.map_err(Error::io("reading", folder))?.path();
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(PREFIX)) {
            all.push(path);
        }
    }
    all.sort();
    Ok(all)
}

/// The seconds in an event file's name.
fn seconds(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(PREFIX)?.split('.').next()?.parse().ok()
}

fn length(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |m| m.len())
}

/// Copies the records of `from` that are whole and of steps up to `step`.
fn copy(from: &Path, step: u64, to: &mut impl Write, tmp: &Path) -> Result<()> {
    let mut input = BufReader::new(File::open(from).map_err(Error::io("reading", from))?);
    let mut framed = vec![];
    while let Some(data) = record::next(&mut input).map_err(Error::io("reading", from))? {
        let event = proto::read(&data);
        if event.tag.is_some_and(|t| !t.starts_with(FINAL)) && event.step <= step {
            framed.clear();
            record::append(&mut framed, &data);
            to.write_all(&framed).map_err(Error::io("writing", tmp))?;
        }
    }
    Ok(())
}

impl Events {
    /// Opens an event file in `run`. Of those that are there, what lies after `step` is dropped: steps that will be done again, a run's closing evaluation,
    /// and a record that a killed process left unfinished.
    pub fn open(run: &Path, step: u64) -> Result<Events> {
        let folder = run.join(FOLDER);
        fs::create_dir_all(&folder).map_err(Error::io("creating", &folder))?;
        let old = files(&folder)?;
        let after = old.iter().filter_map(|f| seconds(f)).max().map_or(0, |s| s + 1);
        let path = folder.join(format!("{PREFIX}{:010}.{}", (now() as u64).max(after), host()));
        let tmp = folder.join(".unfinished");
        let io = || Error::io("writing", &tmp);
        let mut out = BufWriter::new(File::create(&tmp).map_err(io())?);
        let mut head = vec![];
        record::append(&mut head, &proto::version(now()));
        if !old.is_empty() {
            record::append(&mut head, &proto::restart(now()));
        }
        out.write_all(&head).map_err(io())?;
        // the newest is whole by itself, as it was renamed
        let newest = old.iter().rfind(|f| length(f) > 0);
        if step > 0 {
            newest.map_or(Ok(()), |f| copy(f, step, &mut out, &tmp))?;
        }
        out.flush().and_then(|()| out.get_ref().sync_all()).and_then(|()| fs::rename(&tmp, &path)).map_err(io())?;
        for f in &old {
            let done = if length(f) == 0 { fs::remove_file(f) } else { File::options().write(true).truncate(true).open(f).map(drop) };
            done.map_err(Error::io("emptying", f))?;
        }
        let file = File::options().append(true).open(&path).map_err(Error::io("writing", &path))?;
        Ok(Events { file, path })
    }

    /// Writes the numbers among the fields, and the scalars.
    pub fn write(&mut self, step: u64, fields: &[(&str, Value)], scalars: &Scalars) -> Result<()> {
        let closing = fields.iter().any(|f| f.0 == "final");
        let fields = fields.iter().filter_map(|(k, v)| Some((tag(k, closing), v.as_f64()?)));
        let all: Vec<(String, f64)> = fields.chain(scalars.iter().map(|(k, v)| (tag(k, closing), *v))).collect();
        if all.is_empty() { Ok(()) } else { self.append(&proto::scalars(now(), step, &all)) }
    }

    /// Writes distributions.
    pub fn histograms(&mut self, step: u64, all: &[Distribution]) -> Result<()> {
        let tagged: Vec<(String, &Distribution)> = all.iter().map(|d| (tag(&d.name, false), d)).collect();
        if all.is_empty() { Ok(()) } else { self.append(&proto::histograms(now(), step, &tagged)) }
    }

    fn append(&mut self, event: &[u8]) -> Result<()> {
        let mut framed = Vec::with_capacity(event.len() + 16);
        record::append(&mut framed, event);
        self.file.write_all(&framed).map_err(Error::io("writing", &self.path))
    }

    /// Makes sure that all is on the disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("syncing", &self.path))
    }
}
