//! The files that hold a folder's tensors: one, or the shards that an index names.

use crate::checkpoint::{INDEX, MODEL};
use crate::tensor_file::TensorFile;
use crate::{Error, Result, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// Opens them all; an error where the index and what is there contradict each other.
pub(crate) fn open(dir: &Path) -> Result<Vec<(PathBuf, TensorFile)>> {
    let index = dir.join(INDEX);
    if ![MODEL, INDEX].iter().any(|name| dir.join(name).symlink_metadata().is_ok()) {
        let shard = |name: &str| name.starts_with("model-") && name.ends_with(".safetensors");
        let names = || std::fs::read_dir(dir).into_iter().flatten().flatten().filter_map(|e| e.file_name().into_string().ok());
        let why = match names().find(|name| shard(name) || name.ends_with(".bin")) {
            Some(name) if shard(&name) => format!("; {name} is a part of it: the index {INDEX} is missing; copy that, too"),
            Some(name) => format!("; {name} is another format: save the model once more with `safe_serialization=True`"),
            None => format!(", and so is {INDEX}; copy the weights, too"),
        };
        return Err(Error::checkpoint(&dir.join(MODEL), format!("is missing{why}")));
    }
    if dir.join(MODEL).exists() || !index.exists() {
        return Ok(vec![(dir.join(MODEL), TensorFile::open(&dir.join(MODEL))?)]);
    }
    let text = json::read(&index)?;
    let Index { weight_map } = json::parse(&text).map_err(|e| Error::checkpoint(&index, format!("is no index of shards: {e}")))?;
    let names: BTreeSet<&String> = weight_map.values().collect();
    if let Some(name) = names.iter().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
        return Err(Error::checkpoint(&index, format!("names the shard `{name}`; a shard is a file beside its index")));
    }
    let mut shards = vec![];
    for name in &names {
        let path = dir.join(name);
        if !path.exists() {
            let first = weight_map.iter().find(|(_, shard)| shard == name).map_or("", |(tensor, _)| tensor);
            return Err(Error::checkpoint(&path, format!("is missing; {INDEX} says that it holds `{first}` and others; copy it again")));
        }
        shards.push((path.clone(), TensorFile::open(&path)?));
    }
    let mut at = BTreeMap::new();
    for ((path, file), shard) in shards.iter().zip(&names) {
        for name in file.tensors(path)?.into_keys() {
            if let Some(other) = at.insert(name.clone(), shard) {
                return Err(Error::checkpoint(path, format!("holds `{name}`, which is in two files: `{other}` holds it, too")));
            }
        }
    }
    for (name, said) in &weight_map {
        match at.remove(name) {
            Some(shard) if *shard == said => {}
            found => {
                let found = found.map_or("it is in no shard".into(), |shard| format!("it is in `{shard}`"));
                return Err(Error::checkpoint(
                    &index,
                    format!("says that `{name}` is in `{said}`, and {found}: index and shards are not of one model"),
                ));
            }
        }
    }
    if let Some((name, shard)) = at.first_key_value() {
        return Err(Error::checkpoint(&index, format!("does not name `{name}`, which is in `{shard}`: index and shards are not of one model")));
    }
    Ok(shards)
}
