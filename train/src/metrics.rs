//! `metrics.jsonl`: one JSON object a line, appended; and, where a run keeps them, TensorBoard's event files beside it.

use crate::histogram::Distribution;
use crate::tensorboard::Events;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Scalars by name, as `blocks.0.attn.gate_mean`.
pub type Scalars = BTreeMap<String, f64>;

/// The writer of a run's metrics. Every line has a `step`, the number of optimizer steps done.
#[derive(Debug)]
pub struct Metrics {
    file: File,
    path: PathBuf,
    events: Option<Events>,
}

impl Metrics {
    /// Opens `metrics.jsonl` in `run` and drops what lies after `step`: lines of steps that will be done again, a run's closing
    /// evaluation, and a line that a killed process left unfinished.
    pub fn open(run: &Path, step: u64) -> Result<Metrics> {
        let path = run.join("metrics.jsonl");
        let old = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => vec![],
            Err(e) => return Err(Error::io("reading", &path)(e)),
        };
        let mut kept = Vec::with_capacity(old.len());
        for line in old.split_inclusive(|&b| b == b'\n') {
            let value: Option<Value> = serde_json::from_slice(line).ok();
            let keep = value.is_some_and(|v| v["step"].as_u64().is_some_and(|s| s <= step) && v["final"].is_null()) && line.ends_with(b"\n");
            if keep && step > 0 {
                kept.extend_from_slice(line);
            }
        }
        if kept.len() != old.len() {
            let tmp = path.with_extension("tmp");
            fs::write(&tmp, &kept)
                .and_then(|()| File::open(&tmp)?.sync_all())
                .and_then(|()| fs::rename(&tmp, &path))
                .map_err(Error::io("writing", &path))?;
        }
        let file = File::options().create(true).append(true).open(&path).map_err(Error::io("writing", &path))?;
        Ok(Metrics { file, path, events: None })
    }

    /// Writes TensorBoard's event files in `run`, too, after what is kept of those that are there (see [`Events::open`]).
    pub fn with_events(mut self, run: &Path, step: u64) -> Result<Metrics> {
        self.events = Some(Events::open(run, step)?);
        Ok(self)
    }

    /// Whether there is a place for distributions.
    pub fn has_events(&self) -> bool {
        self.events.is_some()
    }

    /// Distributions go to TensorBoard alone.
    pub fn histograms(&mut self, step: u64, all: &[Distribution]) -> Result<()> {
        self.events.as_mut().map_or(Ok(()), |e| e.histograms(step, all))
    }

    /// Appends a line with `step`, the fields given, and the scalars. Numbers that aren't finite become null, as JSON has none.
    pub fn write(&mut self, step: u64, fields: &[(&str, Value)], scalars: &Scalars) -> Result<()> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        line.extend(fields.iter().map(|(k, v)| (k.to_string(), v.clone())));
        line.extend(scalars.iter().map(|(k, &v)| (k.clone(), v.into())));
        let mut bytes = Value::Object(line).to_string().into_bytes();
        bytes.push(b'\n');
        self.file.write_all(&bytes).map_err(Error::io("writing", &self.path))?;
        self.events.as_mut().map_or(Ok(()), |e| e.write(step, fields, scalars))
    }

    /// Makes sure that all lines are on the disk.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(Error::io("syncing", &self.path))?;
        self.events.as_ref().map_or(Ok(()), Events::sync)
    }
}

/// Resident memory of this process and its peak, in bytes (0 where the system doesn't say).
pub fn memory() -> (u64, u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let field = |name: &str| {
        let line = status.lines().find_map(|l| l.strip_prefix(name))?;
        line.trim_matches(|c: char| !c.is_ascii_digit()).parse::<u64>().ok()
    };
    (field("VmRSS:").unwrap_or(0) << 10, field("VmHWM:").unwrap_or(0) << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_truncates() {
        let tmp = tempfile::tempdir().unwrap();
        let mut m = Metrics::open(tmp.path(), 0).unwrap();
        for s in 1..=5u64 {
            m.write(s, &[("loss", 1.5.into())], &Scalars::from([("a.b".into(), f64::NAN)])).unwrap();
        }
        m.write(3, &[("final", true.into())], &Scalars::new()).unwrap();
        m.sync().unwrap();
        drop(m);
        let path = tmp.path().join("metrics.jsonl");
        let mut text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("{\"a.b\":null,\"loss\":1.5,\"step\":1}\n"), "{text}");
        text.push_str("{\"step\":2");
        fs::write(&path, text).unwrap();
        let mut m = Metrics::open(tmp.path(), 3).unwrap();
        m.write(4, &[], &Scalars::new()).unwrap();
        let steps: Vec<u64> =
            fs::read_to_string(&path).unwrap().lines().map(|l| serde_json::from_str::<Value>(l).unwrap()["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
        Metrics::open(tmp.path(), 0).unwrap();
        assert_eq!(fs::read(&path).unwrap().len(), 0);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn memory_is_known() {
        let (now, peak) = memory();
        assert!(now > 1 << 19 && peak >= now / 2);
    }
}
