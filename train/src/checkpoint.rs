//! Run folders and atomic checkpoints.
//!
//! A run folder holds `config.toml` (every resolved value and its origin), `run.json` (the same, typed, with the command line and the
//! machine), `config.json` (the model's), `metrics.jsonl`, and `checkpoints/step-00001000/` with `model.safetensors`, `config.json`,
//! `optimizer.safetensors` and `state.json`. A checkpoint is written into a folder whose name begins with `.tmp-`, synced, and renamed:
//! whatever kills the process, a folder called `step-…` is whole. `state.json` keeps the lengths and checksums of the other files: should the disk
//! damage one all the same, readers notice and fall back to the checkpoint before.
//! A run that goes on from an older checkpoint renames the later ones to `.old-…` first: they are of another past.

use crate::config::{Origins, Resolved, RunConfig};
use crate::data::Fingerprint;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The weights' file name in a checkpoint.
pub const MODEL: &str = "model.safetensors";
/// What names the files of a checkpoint from elsewhere whose weights are in several.
const SHARDS: &str = "model.safetensors.index.json";
/// The model configuration's file name in a checkpoint.
pub const CONFIG: &str = "config.json";
/// The optimizer's file name in a checkpoint.
pub const OPTIMIZER: &str = "optimizer.safetensors";
const LOCK: &str = ".lock";
/// The loop state's file name in a checkpoint.
pub const STATE: &str = "state.json";

/// What the loop needs to go on. The sampler and the schedule are functions of these.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of this format.
    pub version: u32,
    /// Optimizer steps done.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// Exponential mean of the loss, for display.
    pub ema: f64,
    /// What it was trained on.
    #[serde(default)]
    pub corpus: Option<Fingerprint>,
}

/// A file as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Written {
    /// Length.
    pub bytes: u64,
    /// FNV-1a over 64-bit little-endian words, the last padded with zeros: a change of any one word changes it.
    pub checksum: u64,
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
struct StateFile {
    #[serde(flatten)]
    state: State,
    #[serde(default)]
    files: BTreeMap<String, Written>,
}

/// More steps than any run takes; with a step's tokens, at most 2^30, they still count in 64 bits.
const MOST_STEPS: u64 = 1 << 33;

/// `run.json`: how a run came to be.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunInfo {
    /// Version of tidegate.
    pub version: String,
    /// The command line.
    pub command: Vec<String>,
    /// The machine: architecture, threads.
    pub machine: String,
    /// The resolved configuration.
    pub config: RunConfig,
    /// Where its values came from.
    #[serde(default)]
    pub origins: Origins,
}

/// A run folder, locked against a second writer for as long as this value lives.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    _lock: File,
}

/// A file that is made if it isn't there and stays locked for as long as the value lives; none if another process has the lock. A program that was started elsewhere in the
/// process that gave the lock back holds it for the moment until it is loaded: it is asked for again for a second.
pub(crate) fn lock(path: &Path) -> Result<Option<File>> {
    let file = File::options().create(true).append(true).open(path).map_err(Error::io("locking", path))?;
    for _ in 0..20 {
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(50)),
            // some network file systems have no locks
            _ => return Ok(Some(file)),
        }
    }
    Ok(None)
}

/// Writes a file as a whole: a reader finds the one before, or this.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let tmp = path.with_extension("tmp");
    let done = fs::write(&tmp, bytes).and_then(|()| File::open(&tmp)?.sync_all()).and_then(|()| fs::rename(&tmp, path));
    done.map_err(Error::io("writing", path))
}

impl RunDir {
    /// Opens or creates the folder. Without `resume`, a folder that holds anything (but a lock, which a run that never began leaves) is refused.
    pub fn open(path: &Path, resume: bool) -> Result<RunDir> {
        if path.exists() && !path.is_dir() {
            return Err(Error::Usage(format!("run folder {}: there is a file of that name; choose another with --run-dir", path.display())));
        }
        fs::create_dir_all(path).map_err(Error::io("creating", path))?;
        let taken = fs::read_dir(path).map_err(Error::io("reading", path))?.flatten().any(|e| e.file_name() != LOCK);
        if taken && !resume {
            let p = path.display();
            return Err(Error::Usage(format!("run folder {p} isn't empty; go on with that run by --resume, or choose another by --run-dir")));
        }
        let Some(lock) = lock(&path.join(LOCK))? else {
            return Err(Error::Checkpoint(format!("run folder {}: another process is training in it; wait for it, or stop it", path.display())));
        };
        let dir = RunDir { path: path.to_path_buf(), _lock: lock };
        dir.clean();
        Ok(dir)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes what a killed writer left.
    fn clean(&self) {
        let Ok(entries) = fs::read_dir(self.path.join("checkpoints")) else { return };
        for e in entries.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(".tmp-")) {
            // What can't be removed is ignored by every reader.
            let _ = fs::remove_dir_all(e.path());
        }
    }

    /// Writes `config.toml`, `run.json` and the model's `config.json`.
    pub fn write_config(&self, resolved: &Resolved, command: &[String], model: &str) -> Result<()> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let info = RunInfo {
            version: env!("CARGO_PKG_VERSION").into(),
            command: command.to_vec(),
            machine: format!("{} {}, {threads} threads", std::env::consts::OS, std::env::consts::ARCH),
            config: resolved.config.clone(),
            origins: resolved.origins().clone(),
        };
        let json = serde_json::to_string_pretty(&info).map_err(|e| Error::Checkpoint(format!("run.json: {e}")))?;
        write(&self.path.join("run.json"), json.as_bytes())?;
        write(&self.path.join(CONFIG), model.as_bytes())?;
        write(&self.path.join("config.toml"), resolved.to_toml().as_bytes())?;
        sync_dir(&self.path)
    }

    /// Writes a checkpoint: `save` fills a temporary folder, which is synced and renamed; then all but the newest `keep` are removed.
    /// When anything fails, the older checkpoints stand as before.
    pub fn save(&self, state: &State, keep: usize, save: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let parent = self.path.join("checkpoints");
        fs::create_dir_all(&parent).map_err(Error::io("creating", &parent))?;
        let name = format!("step-{:08}", state.step);
        let (tmp, done) = (parent.join(format!(".tmp-{name}")), parent.join(&name));
        let attempt = || -> Result<()> {
            if tmp.exists() {
                fs::remove_dir_all(&tmp).map_err(Error::io("removing", &tmp))?;
            }
            fs::create_dir(&tmp).map_err(Error::io("creating", &tmp))?;
            save(&tmp)?;
            let mut files = BTreeMap::new();
            for entry in fs::read_dir(&tmp).map_err(Error::io("reading", &tmp))? {
                let entry = entry.map_err(Error::io("reading", &tmp))?;
                files.insert(entry.file_name().to_string_lossy().into_owned(), written(&entry.path())?);
                sync(&entry.path())?;
            }
            let json = serde_json::to_string_pretty(&StateFile { state: *state, files });
            let (path, json) = (tmp.join(STATE), json.map_err(|e| Error::Checkpoint(format!("{STATE}: {e}")))?);
            fs::write(&path, json).map_err(Error::io("writing", &path))?;
            sync(&path)?;
            sync_dir(&tmp)?;
            if done.exists() {
                set_aside(&done)?;
            }
            fs::rename(&tmp, &done).map_err(Error::io("renaming", &tmp))?;
            sync_dir(&parent)
        };
        if let Err(e) = attempt() {
            let _ = fs::remove_dir_all(&tmp);
            return Err(e);
        }
        let all = checkpoints(&self.path)?;
        for (_, old) in all.iter().take(all.len().saturating_sub(keep.max(1))) {
            // Rename first, so that a kill in the middle leaves no half checkpoint under a whole one's name.
            let doomed = old.with_file_name(format!(".tmp-old-{}", old.file_name().unwrap_or_default().to_string_lossy()));
            if fs::rename(old, &doomed).is_ok() {
                let _ = fs::remove_dir_all(&doomed);
            }
        }
        Ok(done)
    }

    /// Renames the checkpoints later than `step`, and returns their new names: a run that goes on from there writes its own.
    pub fn set_aside(&self, step: u64) -> Result<Vec<PathBuf>> {
        checkpoints(&self.path)?.iter().filter(|(s, _)| *s > step).map(|(_, path)| set_aside(path)).collect()
    }
}

fn set_aside(path: &Path) -> Result<PathBuf> {
    let name =
        |i: u32| format!(".old-{}{}", path.file_name().unwrap_or_default().to_string_lossy(), if i > 1 { format!("-{i}") } else { String::new() });
    let aside = (1..).map(|i| path.with_file_name(name(i))).find(|p| !p.exists()).unwrap_or_default();
    fs::rename(path, &aside).map_err(Error::io("renaming", path))?;
    Ok(aside)
}

fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("syncing", path))
}

fn sync_dir(path: &Path) -> Result<()> {
    // Folders can't be opened as files everywhere; where they can't, renaming is all there is.
    if cfg!(unix) { sync(path) } else { Ok(()) }
}

/// The checkpoints of a run folder, oldest first.
pub fn checkpoints(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    steps_in(&run.join("checkpoints"))
}

fn steps_in(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    match fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io("reading", dir)(e)),
        Ok(entries) => {
            for e in entries.flatten() {
                let name = e.file_name();
                if let Some(step) = name.to_str().and_then(|n| n.strip_prefix("step-")).and_then(|n| n.parse().ok()) {
                    found.push((step, e.path()));
                }
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The checkpoints that `path` may mean: itself, or those of a run folder (or of its folder `checkpoints`), newest first. At least one.
pub fn candidates(path: &Path) -> Result<Vec<PathBuf>> {
    let run = path.join("run.json").is_file() || path.join("checkpoints").is_dir();
    // what a folder of transformers lacks, its reader says
    if [STATE, MODEL, SHARDS].iter().any(|name| path.join(name).is_file()) || !run && path.join(CONFIG).is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let inside = if path.join("checkpoints").is_dir() { path.join("checkpoints") } else { path.to_path_buf() };
    let all: Vec<PathBuf> = if path.is_dir() { steps_in(&inside)?.into_iter().rev().map(|c| c.1).collect() } else { vec![] };
    if all.is_empty() {
        let p = path.display();
        let why = if path.exists() { "holds no checkpoint (yet)" } else { "does not exist" };
        return Err(Error::Usage(format!("{p} {why}; expected a run folder or a checkpoint, as runs/quickstart")));
    }
    Ok(all)
}

/// The first of the candidates that `open` can read; `skipped` hears of those before it.
pub fn first_whole<T>(
    candidates: &[PathBuf],
    mut skipped: impl FnMut(&Path, &Error),
    mut open: impl FnMut(&Path) -> Result<T>,
) -> Result<(PathBuf, T)> {
    for (i, path) in candidates.iter().enumerate() {
        match open(path) {
            Ok(t) => return Ok((path.clone(), t)),
            Err(e) if i + 1 == candidates.len() => return Err(e),
            Err(e) => skipped(path, &e),
        }
    }
    Err(Error::Usage("no checkpoint was named".into()))
}

/// Length and checksum of a file.
pub(crate) fn written(path: &Path) -> Result<Written> {
    let mut file = File::open(path).map_err(Error::io("reading", path))?;
    let (mut out, mut buffer) = (Written { bytes: 0, checksum: 0xcbf2_9ce4_8422_2325 }, Vec::with_capacity(1 << 20));
    loop {
        buffer.clear();
        file.by_ref().take(1 << 20).read_to_end(&mut buffer).map_err(Error::io("reading", path))?;
        if buffer.is_empty() {
            return Ok(out);
        }
        out.bytes += buffer.len() as u64;
        for part in buffer.chunks(8) {
            let mut word = [0; 8];
            word[..part.len()].copy_from_slice(part);
            out.checksum = (out.checksum ^ u64::from_le_bytes(word)).wrapping_mul(0x100_0000_01b3);
        }
    }
}

/// Checks that the files of these names are as `state.json` says they were written; an error names the first that is not. Where no state can be read
/// (a model from elsewhere), or it says nothing of a file, nothing is known.
pub fn verify(checkpoint: &Path, names: &[&str]) -> Result<()> {
    let state: Option<StateFile> = fs::read(checkpoint.join(STATE)).ok().and_then(|b| serde_json::from_slice(&b).ok());
    for (name, then) in state.iter().flat_map(|s| &s.files).filter(|(name, _)| names.contains(&name.as_str())) {
        let path = checkpoint.join(name);
        let now = written(&path)?;
        if now != *then {
            let (n, now) = (then.bytes, now.bytes);
            let what =
                if now == n { format!("its {n} bytes are not those that were written") } else { format!("{n} bytes were written, it has {now}") };
            return Err(Error::Checkpoint(format!(
                "{} is damaged: {what}; use an older checkpoint (if you changed it on purpose, delete `files` from {STATE} beside it)",
                path.display()
            )));
        }
    }
    Ok(())
}

/// Reads a checkpoint's loop state.
pub fn read_state(checkpoint: &Path) -> Result<State> {
    let path = checkpoint.join(STATE);
    let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
    let wrong = |what: String| Error::Checkpoint(format!("{}: {what}; use an older checkpoint", path.display()));
    let StateFile { state, .. } = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
    if state.version != 1 {
        return Err(Error::Checkpoint(format!("{}: format version {}, this program reads 1", path.display(), state.version)));
    }
    if state.step > MOST_STEPS || state.tokens > MOST_STEPS << 30 || state.seconds < 0.0 {
        return Err(wrong(format!("no run has done {} steps on {} tokens in {} s", state.step, state.tokens, state.seconds)));
    }
    Ok(state)
}

/// Reads `run.json`.
pub fn read_info(run: &Path) -> Result<RunInfo> {
    let (path, r) = (run.join("run.json"), run.display());
    let text = fs::read_to_string(&path).map_err(|e| Error::Usage(format!("{r} is no run folder: {}: {e}", path.display())))?;
    serde_json::from_str(&text).map_err(|e| {
        Error::Checkpoint(format!(
            "{} is damaged ({e}); the checkpoints beside it may well be whole: delete it and go on with `tidegate train {r}/config.toml --run-dir {r} \
             --resume`, which writes it anew",
            path.display()
        ))
    })
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
