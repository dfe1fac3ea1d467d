//! Saving a model: one file or shards, in the dtype asked for, into a folder that may hold another.
//!
//! All files are written beside those that are there, under names of their own, and synced. Then `config.json` goes, the others take their places, those
//! of a former model that would be read instead go, and `config.json` comes last: whatever kills the process, the folder holds the old model, or the new
//! one, or has no `config.json`, and no program takes it for a model.

use crate::aside;
use crate::checkpoint::{CONFIG, INDEX, MODEL};
use crate::spelling::{in_mamba2, parts};
use crate::tensor_file::{Entry, write_entries};
use crate::{Decoder, Error, ModelType, Result};
use engine::DType;
use serde_json::{Map, Value, json};
use std::cell::Cell;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Files that are not in their places yet begin so.
const SAVING: &str = ".saving-";

/// How to [save](Decoder::save_with) a model. The default is what [`Decoder::save`] does.
#[derive(Clone, Copy, Default)]
pub struct SaveOptions<'a> {
    /// The dtype of all parameters in the files: f32, bf16 or f16, rounded to the nearest, ties to even. None: f32, or f64 for a model that is in f64.
    pub dtype: Option<DType>,
    /// Files of at most so many bytes of tensors (one tensor alone may be larger), if one does not do. None: one file.
    pub max_shard_bytes: Option<u64>,
    /// Whether what another model in the folder had beside it (tokenizer, settings of generation) goes with it. False: it stays where this model has none.
    pub replaces: bool,
    /// Is told how many bytes of how many are done.
    pub progress: Option<&'a dyn Fn(u64, u64)>,
}

/// What puts the files into their places, one after another.
#[derive(Debug)]
enum Step {
    /// What came before is on the disk before what follows.
    Sync,
    Remove(PathBuf),
    Rename(PathBuf, PathBuf),
}

impl Decoder {
    /// Writes `model.safetensors` and `config.json` into the folder `dir`; and what was [aside](Self::aside) when the model was read. A model that is
    /// there is written over as a whole: see [`save_with`](Self::save_with).
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_with(dir, &SaveOptions::default())
    }

    /// Writes the model into the folder `dir`, as transformers does: `model.safetensors`, or `model-00001-of-0000N.safetensors` with an index
    /// (`model.safetensors.index.json`); `config.json`, which states the dtype; and what was [aside](Self::aside) when the model was read.
    ///
    /// All parameters are in the one dtype, the router, `A_log`, `dt_bias` and the norms, too: so transformers saves `qwen3_next`, and so it loads it (the model
    /// names none to keep in f32; what must be computed in f32 is cast when it is used). Tensors that are kept aside stay in the dtype that they had.
    ///
    /// A model that is in the folder is replaced as a whole, its shards and index, too. What is killed on the way leaves the old model, or the new one, or a
    /// folder without `config.json`, which nothing opens. Other files in the folder are left alone. What fails (a full disk, a number too large for
    /// the dtype) before the old model was touched leaves it as it was.
    pub fn save_with(&self, dir: &Path, how: &SaveOptions) -> Result<()> {
        if let Some(d) = how.dtype.filter(|d| !matches!(d, DType::F32 | DType::BF16 | DType::F16)) {
            return Err(Error::Usage(format!("a model is saved in f32, bf16 or f16, asked for {d}")));
        }
        clear(dir)?;
        let steps = self.stage(dir, how).inspect_err(|_| drop(clear(dir)))?;
        steps.iter().try_for_each(|step| step.take(dir))
    }

    /// Writes all files under names of their own; what is left to do puts them into their places.
    fn stage(&self, dir: &Path, how: &SaveOptions) -> Result<Vec<Step>> {
        let mut entries = vec![];
        let mamba2 = self.config().saved_type()? == ModelType::Mamba2;
        let named = |name: String| if mamba2 { in_mamba2(&name) } else { name };
        for p in self.params() {
            entries.extend(parts(&p.name, &p.tensor.detach())?.into_iter().map(|(name, t)| (named(name), Entry::made(t, how.dtype))));
        }
        entries.extend(self.aside.tensors.iter().map(|t| (t.name.clone(), Entry::Kept(t))));
        let total: u64 = entries.iter().map(|(_, e)| e.bytes()).sum();
        let numbers: u64 = entries.iter().map(|(_, e)| e.numel()).sum();
        let shards = split(entries, how.max_shard_bytes.unwrap_or(u64::MAX));
        let names = names(shards.len());
        let index = (shards.len() > 1).then(|| {
            let at = shards.iter().zip(&names).flat_map(|(shard, file)| shard.iter().map(|(name, _)| (name.clone(), file.clone().into())));
            json!({"metadata": {"total_parameters": numbers, "total_size": total}, "weight_map": at.collect::<Map<String, Value>>()})
        });
        let mut config = self.config().to_json()?;
        self.aside.ids.iter().for_each(|(key, x)| config[key] = x.clone());
        config["dtype"] = spelled(how.dtype.unwrap_or(self.place().params)).into();

        let done = Cell::new(0);
        let written = |bytes: u64| {
            done.set(done.get() + bytes);
            if let Some(progress) = how.progress {
                progress(done.get(), total);
            }
        };
        let mut placed: Vec<String> = vec![];
        for (name, shard) in names.into_iter().zip(&shards) {
            write_entries(&staged(dir, &name)?, shard, &written)?;
            placed.push(name);
        }
        let mut put = |name: &str, bytes: &[u8]| {
            placed.push(name.into());
            write_synced(&staged(dir, name)?, bytes)
        };
        if let Some(index) = index {
            put(INDEX, &pretty(&index)?)?;
        }
        self.aside.files.iter().try_for_each(|(name, bytes)| put(name, bytes))?;
        put(CONFIG, &pretty(&config)?)?;
        steps(dir, &placed, how.replaces)
    }
}

fn steps(dir: &Path, placed: &[String], replaces: bool) -> Result<Vec<Step>> {
    let mut steps = vec![Step::Sync];
    if dir.join(CONFIG).exists() {
        steps.extend([Step::Remove(dir.join(CONFIG)), Step::Sync]);
    }
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let entry = entry.map_err(Error::io(dir))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let stale = name == MODEL || name == INDEX || is_shard(&name) || (replaces && aside::FILES.contains(&name.as_str()));
        if stale && entry.path().is_file() && !placed.contains(&name) {
            steps.push(Step::Remove(entry.path()));
        }
    }
    for name in placed {
        if name == CONFIG {
            steps.push(Step::Sync);
        }
        steps.push(Step::Rename(staged(dir, name)?, dir.join(name)));
    }
    steps.push(Step::Sync);
    Ok(steps)
}

impl Step {
    fn take(&self, dir: &Path) -> Result<()> {
        match self {
            // folders can't be opened as files everywhere; where they can't, the order of the calls is all there is
            Step::Sync if cfg!(unix) => File::open(dir).and_then(|f| f.sync_all()).map_err(Error::io(dir)),
            Step::Sync => Ok(()),
            Step::Remove(path) => fs::remove_file(path).map_err(Error::io(path)),
            Step::Rename(from, to) => fs::rename(from, to).map_err(Error::io(to)),
        }
    }
}

/// Where a file is written first.
fn staged(dir: &Path, name: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    if path.exists() && !path.is_file() {
        return Err(Error::checkpoint(&path, "is no file, and a file of that name is to be written; remove it, or save elsewhere"));
    }
    Ok(dir.join(format!("{SAVING}{name}")))
}

/// Removes what a save left that was cut off.
fn clear(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))?.flatten().filter(|e| e.file_name().to_string_lossy().starts_with(SAVING)) {
        fs::remove_file(entry.path()).map_err(Error::io(&entry.path()))?;
    }
    Ok(())
}

/// Whether a save into the folder was cut off. If there is no `config.json`, that is why.
pub(crate) fn was_cut_off(dir: &Path) -> bool {
    dir.join(format!("{SAVING}{CONFIG}")).exists()
}

/// In their order, as many as fit into each file.
fn split<'a>(entries: Vec<(String, Entry<'a>)>, most: u64) -> Vec<Vec<(String, Entry<'a>)>> {
    let (mut shards, mut size) = (vec![vec![]], 0u64);
    for (name, entry) in entries {
        let bytes = entry.bytes();
        if size > 0 && size.saturating_add(bytes) > most {
            shards.push(vec![]);
            size = 0;
        }
        size += bytes;
        if let Some(last) = shards.last_mut() {
            last.push((name, entry));
        }
    }
    shards
}

fn names(n: usize) -> Vec<String> {
    if n == 1 { vec![MODEL.into()] } else { (1..=n).map(|i| format!("model-{i:05}-of-{n:05}.safetensors")).collect() }
}

/// `model-00001-of-00002.safetensors` and the like.
fn is_shard(name: &str) -> bool {
    let number = |s: &str| s.len() >= 5 && s.bytes().all(|b| b.is_ascii_digit());
    let middle = name.strip_prefix("model-").and_then(|s| s.strip_suffix(".safetensors"));
    middle.and_then(|s| s.split_once("-of-")).is_some_and(|(i, n)| number(i) && number(n))
}

/// PyTorch's name.
fn spelled(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        DType::F64 => "float64",
        _ => "float32",
    }
}

fn pretty(json: &Value) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(json).map_err(|e| Error::Config(e.to_string()))
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut f = File::create(path).map_err(Error::io(path))?;
    f.write_all(bytes).and_then(|()| f.sync_all()).map_err(Error::io(path))
}

#[cfg(test)]
mod tests;
