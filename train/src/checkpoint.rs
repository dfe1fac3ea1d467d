//! Run folders and atomic checkpoints.
//!
//! A run folder holds `config.toml` (every resolved value and its origin), `run.json` (the same, typed, with the command line and the
//! machine), `config.json` (the model's), `metrics.jsonl`, and `checkpoints/step-00001000/` with `model.safetensors`, `config.json`,
//! `optimizer.safetensors` and `state.json`. A checkpoint is written into a folder whose name begins with `.tmp-`, synced, and renamed:
//! at any instant, a folder called `step-…` is whole.

use crate::config::{Resolved, RunConfig};
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
}

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
    /// Opens or creates the folder. Without `resume`, a folder that holds anything is refused.
    pub fn open(path: &Path, resume: bool) -> Result<RunDir> {
        if path.exists() && !path.is_dir() {
            return Err(Error::Usage(format!("run folder {}: there is a file of that name; choose another with --run-dir", path.display())));
        }
        fs::create_dir_all(path).map_err(Error::io("creating", path))?;
        let empty = fs::read_dir(path).map_err(Error::io("reading", path))?.next().is_none();
        if !empty && !resume {
            let p = path.display();
            return Err(Error::Usage(format!("run folder {p} isn't empty; go on with that run by --resume, or choose another by --run-dir")));
        }
        let lock_path = path.join(".lock");
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
        if done.exists() {
            // a run that was resumed at its end: the folder is whole, and holds this very state
            return Ok(done);
        }
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
}

fn sync_dir(path: &Path) -> Result<()> {
    // Folders can't be opened as files everywhere; where they can't, renaming is all there is.
    if cfg!(unix) { File::open(path).and_then(|f| f.sync_all()).map_err(Error::io("syncing", path)) } else { Ok(()) }
}

/// The whole checkpoints of a run folder, oldest first.
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

/// The checkpoint that `path` means: itself, or the newest of a run folder.
pub fn find(path: &Path) -> Result<PathBuf> {
    if path.join(STATE).is_file() || path.join(MODEL).is_file() {
        return Ok(path.to_path_buf());
    }
    match checkpoints(path)?.pop() {
        Some((_, newest)) => Ok(newest),
        None => {
            let p = path.display();
            let why = if path.exists() { "holds no checkpoint (yet)" } else { "does not exist" };
            Err(Error::Usage(format!("{p} {why}; expected a run folder or a checkpoint, as runs/quickstart")))
        }
    }
}

/// Reads a checkpoint's loop state.
pub fn read_state(checkpoint: &Path) -> Result<State> {
    let path = checkpoint.join(STATE);
    let text = fs::read_to_string(&path).map_err(Error::io("reading", &path))?;
    let state: State = serde_json::from_str(&text).map_err(|e| Error::Checkpoint(format!("{}: {e}; use an older checkpoint", path.display())))?;
    if state.version != 1 {
        return Err(Error::Checkpoint(format!("{}: format version {}, this program reads 1", path.display(), state.version)));
    }
    Ok(state)
}

/// Reads `run.json`.
pub fn read_info(run: &Path) -> Result<RunInfo> {
    let path = run.join("run.json");
    let text = fs::read_to_string(&path).map_err(|e| Error::Usage(format!("{} is no run folder: {}: {e}", run.display(), path.display())))?;
    serde_json::from_str(&text).map_err(|e| Error::Checkpoint(format!("{}: {e}", path.display())))
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
        assert_eq!(read_state(&find(&run).unwrap()).unwrap().step, 4);
        let left = run.join("checkpoints/.tmp-step-00000005");
        fs::create_dir(&left).unwrap();
        fs::write(left.join(STATE), "{").unwrap();
        assert_eq!(steps(&dir), [3, 4]);
        drop(dir);
        RunDir::open(&run, true).unwrap();
        assert!(!left.exists());
        // Once more at the same step: never is the newest moved away to make room.
        let dir = RunDir::open(&run, true).unwrap();
        dir.save(&state(4), 2, put("again")).unwrap();
        assert_eq!(fs::read_to_string(find(&run).unwrap().join(MODEL)).unwrap(), "x");
        assert_eq!(steps(&dir), [3, 4]);
    }

    #[test]
    fn refuses_to_overwrite_and_to_share() {
        let tmp = tempfile::tempdir().unwrap();
        let run = tmp.path().join("run");
        let dir = RunDir::open(&run, false).unwrap();
        let e = RunDir::open(&run, false).unwrap_err();
        assert!(e.to_string().contains("--resume") && e.exit_code() == 2, "{e}");
        assert!(RunDir::open(&run, true).unwrap_err().to_string().contains("another process"));
        drop(dir);
        RunDir::open(&run, true).unwrap();
        assert!(find(&run).unwrap_err().to_string().contains("no checkpoint"));
        assert!(find(&tmp.path().join("nowhere")).unwrap_err().to_string().contains("does not exist"));
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
        assert_eq!(fs::read_to_string(find(dir.path()).unwrap().join(MODEL)).unwrap(), "good");
        assert_eq!(fs::read_dir(dir.path().join("checkpoints")).unwrap().count(), 1);
    }

    #[test]
    fn a_broken_state_says_so() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join(STATE), "{\"version\":1,").unwrap();
        assert!(read_state(tmp.path()).unwrap_err().to_string().contains("state.json"));
        fs::write(tmp.path().join(STATE), serde_json::to_string(&State { version: 9, ..state(1) }).unwrap()).unwrap();
        assert!(read_state(tmp.path()).unwrap_err().to_string().contains("version 9"));
    }
}
