//! Run folders and atomic checkpoints.
//!
//! A run folder holds `config.toml` (every resolved value and its origin), `run.json` (the same, typed, with the command line and the
//! machine), `config.json` (the model's), `metrics.jsonl`, and `checkpoints/step-00001000/` with `model.safetensors`, `config.json`,
//! `optimizer.safetensors` and `state.json`. A checkpoint is written into a folder whose name begins with `.tmp-`, synced, and renamed:
//! whatever kills the process, a folder called `step-…` is whole. Should the disk damage one all the same, readers fall back to the one before.
//! A run that goes on from an older checkpoint renames the later ones to `.old-…` first: they are of another past.

use crate::config::{Origins, Resolved, RunConfig};
use crate::data::Fingerprint;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The weights' file name in a checkpoint.
pub const MODEL: &str = "model.safetensors";
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

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
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
        let lock_path = path.join(LOCK);
        let lock = File::options().create(true).append(true).open(&lock_path).map_err(Error::io("locking", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                return Err(Error::Checkpoint(format!("run folder {}: another process is training in it; wait for it, or stop it", path.display())));
            }
            // Some network file systems have no locks.
            Err(fs::TryLockError::Error(_)) => {}
        }
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
        write(&self.path.join("config.toml"), resolved.to_toml().as_bytes())
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
            let json = serde_json::to_string_pretty(state).map_err(|e| Error::Checkpoint(format!("{STATE}: {e}")))?;
            let path = tmp.join(STATE);
            fs::write(&path, json).map_err(Error::io("writing", &path))?;
            for entry in fs::read_dir(&tmp).map_err(Error::io("reading", &tmp))? {
                let path = entry.map_err(Error::io("reading", &tmp))?.path();
                File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io("syncing", &path))?;
            }
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

fn sync_dir(path: &Path) -> Result<()> {
    // Folders can't be opened as files everywhere; where they can't, renaming is all there is.
    if cfg!(unix) { File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("syncing", path)) } else { Ok(()) }
}

/// The checkpoints of a run folder, oldest first.
pub fn checkpoints(run: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let dir = run.join("checkpoints");
    let mut found = Vec::new();
    match fs::read_dir(&dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
        Err(e) => return Err(Error::io("reading", &dir)(e)),
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

/// The checkpoints that `path` may mean: itself, or those of a run folder, newest first. At least one.
pub fn candidates(path: &Path) -> Result<Vec<PathBuf>> {
    if path.join(STATE).is_file() || path.join(MODEL).is_file() {
        return Ok(vec![path.to_path_buf()]);
    }
    let all: Vec<PathBuf> = if path.is_dir() { checkpoints(path)?.into_iter().rev().map(|c| c.1).collect() } else { vec![] };
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

/// Reads a checkpoint's loop state.
pub fn read_state(checkpoint: &Path) -> Result<State> {
    let path = checkpoint.join(STATE);
    let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
    let wrong = |what: String| Error::Checkpoint(format!("{}: {what}; use an older checkpoint", path.display()));
    let state: State = serde_json::from_str(&text).map_err(|e| wrong(e.to_string()))?;
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
mod tests {
    use super::*;

    fn state(step: u64) -> State {
        State { version: 1, step, ..State::default() }
    }
    fn put(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
        move |dir| fs::write(dir.join(MODEL), text).map_err(Error::io("writing", dir))
    }
    fn newest(run: &Path) -> PathBuf {
        candidates(run).unwrap().remove(0)
    }
    fn steps(dir: &RunDir) -> Vec<u64> {
        checkpoints(dir.path()).unwrap().into_iter().map(|c| c.0).collect()
    }

    #[test]
    fn keeps_the_last_and_ignores_leftovers() {
        let tmp = tempfile::tempdir().unwrap();
        let run = tmp.path().join("run");
        let dir = RunDir::open(&run, false).unwrap();
        for s in 1..=4 {
            dir.save(&state(s), 2, put("x")).unwrap();
        }
        assert_eq!(steps(&dir), [3, 4]);
        assert_eq!(read_state(&newest(&run)).unwrap().step, 4);
        let left = run.join("checkpoints/.tmp-step-00000005");
        fs::create_dir(&left).unwrap();
        fs::write(left.join(STATE), "{").unwrap();
        assert_eq!(steps(&dir), [3, 4]);
        drop(dir);
        RunDir::open(&run, true).unwrap();
        assert!(!left.exists());
        // Once more at the same step: the new one counts, and the old one is not lost.
        let dir = RunDir::open(&run, true).unwrap();
        dir.save(&state(4), 2, put("again")).unwrap();
        assert_eq!(fs::read_to_string(newest(&run).join(MODEL)).unwrap(), "again");
        assert_eq!(fs::read_to_string(run.join("checkpoints/.old-step-00000004").join(MODEL)).unwrap(), "x");
        assert_eq!(steps(&dir), [3, 4]);
        // Back to the third: what comes later is another past, and doesn't push the new ones out.
        for again in ["", "-2"] {
            let aside = dir.set_aside(2).unwrap();
            assert_eq!(aside[0], run.join(format!("checkpoints/.old-step-00000003{again}")));
            assert_eq!(steps(&dir), [0u64; 0]);
            dir.save(&state(3), 2, put("new")).unwrap();
            assert_eq!(steps(&dir), [3]);
        }
    }

    #[test]
    fn a_damaged_checkpoint_is_skipped_and_named() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = RunDir::open(&tmp.path().join("run"), false).unwrap();
        for s in 1..=3 {
            dir.save(&state(s), 9, put("x")).unwrap();
        }
        let all = candidates(dir.path()).unwrap();
        for broken in all.iter().take(2) {
            fs::write(broken.join(STATE), "{\"version\":1,").unwrap();
        }
        let mut skipped = vec![];
        let (path, found) = first_whole(&all, |p, e| skipped.push((p.to_path_buf(), e.to_string())), read_state).unwrap();
        assert_eq!((path, found.step), (all[2].clone(), 1));
        assert!(skipped.len() == 2 && skipped[0].0 == all[0] && skipped[0].1.contains("state.json"), "{skipped:?}");
        fs::remove_file(all[2].join(STATE)).unwrap();
        assert!(first_whole(&all, |_, _| {}, read_state).is_err());
    }

    #[test]
    fn refuses_to_overwrite_and_to_share() {
        let tmp = tempfile::tempdir().unwrap();
        let run = tmp.path().join("run");
        drop(RunDir::open(&run, false).unwrap());
        // a run that never got as far as writing its configuration does not take the folder
        let dir = RunDir::open(&run, false).unwrap();
        fs::write(run.join("run.json"), "{").unwrap();
        let e = RunDir::open(&run, false).unwrap_err();
        assert!(e.to_string().contains("--resume") && e.exit_code() == 2, "{e}");
        assert!(RunDir::open(&run, true).unwrap_err().to_string().contains("another process"));
        drop(dir);
        RunDir::open(&run, true).unwrap();
        assert!(candidates(&run).unwrap_err().to_string().contains("no checkpoint"));
        assert!(candidates(&tmp.path().join("nowhere")).unwrap_err().to_string().contains("does not exist"));
        let file = tmp.path().join("file");
        fs::write(&file, "x").unwrap();
        assert!(RunDir::open(&file, false).unwrap_err().to_string().contains("a file of that name"));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_keeps_the_older_checkpoint() {
        let tmp = tempfile::tempdir().unwrap();
        let dir = RunDir::open(&tmp.path().join("run"), false).unwrap();
        dir.save(&state(1), 1, put("good")).unwrap();
        let e = dir
            .save(&state(2), 1, |d| {
                fs::write(d.join(CONFIG), "half").unwrap();
                // The device that is always full.
                fs::write("/dev/full", vec![0; 10]).map_err(Error::io("writing", &d.join(MODEL)))
            })
            .unwrap_err()
            .to_string();
        assert!(e.contains("disk is full") && e.contains("--resume") && e.contains(MODEL), "{e}");
        assert_eq!(steps(&dir), [1]);
        assert_eq!(fs::read_to_string(newest(dir.path()).join(MODEL)).unwrap(), "good");
        assert_eq!(fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 1);
    }

    #[test]
    fn a_broken_state_says_so() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join(STATE), "{\"version\":1,").unwrap();
        assert!(read_state(tmp.path()).unwrap_err().to_string().contains("state.json"));
        fs::write(tmp.path().join(STATE), serde_json::to_string(&State { version: 9, ..state(1) }).unwrap()).unwrap();
        assert!(read_state(tmp.path()).unwrap_err().to_string().contains("version 9"));
        for impossible in [state(u64::MAX), State { tokens: u64::MAX, ..state(1) }, State { seconds: -1.0, ..state(1) }] {
            fs::write(tmp.path().join(STATE), serde_json::to_string(&impossible).unwrap()).unwrap();
            assert!(read_state(tmp.path()).unwrap_err().to_string().contains("older checkpoint"));
        }
        fs::write(tmp.path().join("run.json"), "{\"version\":").unwrap();
        let e = read_info(tmp.path()).unwrap_err().to_string();
        assert!(e.contains("run.json is damaged") && e.contains("config.toml --run-dir") && e.contains("--resume"), "{e}");
    }
}
