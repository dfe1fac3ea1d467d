//! What a checkpoint's folder holds beside the parameters: kept as it is, and written back when the model is saved.

use crate::tensor_file::Raw;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::Path;

/// Files that belong to a model and that no parameter depends on.
pub(crate) const FILES: &[&str] = &[
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
];

/// What `config.json` says of the tokenizer.
const IDS: &[&str] = &["bos_token_id", "eos_token_id", "pad_token_id"];

/// What was found beside a model and is no part of it: tensors of multi-token prediction, the tokenizer, settings of generation.
#[derive(Default)]
pub struct Aside {
    pub(crate) files: Vec<(&'static str, Vec<u8>)>,
    pub(crate) ids: Map<String, Value>,
    pub(crate) tensors: Vec<Raw>,
}

impl Aside {
    /// What the folder `dir` with this `config.json` has beside `tensors`.
    pub(crate) fn read(dir: &Path, config: &Value, tensors: Vec<Raw>) -> Result<Aside> {
        let mut files = vec![];
        for name in FILES {
            let path = dir.join(name);
            if path.is_file() {
                files.push((*name, std::fs::read(&path).map_err(Error::io(&path))?));
            }
        }
        let ids = IDS.iter().filter_map(|key| Some((key.to_string(), config.get(key).filter(|x| !x.is_null())?.clone()))).collect();
        let aside = Aside { files, ids, tensors };
        if let Some(said) = aside.unused() {
            eprintln!("{}: {said}", dir.display());
        }
        Ok(aside)
    }

    /// Adds a file that goes with the model; an error for a name that no such file has.
    pub fn put(&mut self, name: &str, bytes: Vec<u8>) -> Result<()> {
        let Some(name) = FILES.iter().find(|n| **n == name) else {
            return Err(Error::Usage(format!("`{name}` is no file that goes with a model; these are: {}", FILES.join(", "))));
        };
        self.files.retain(|(n, _)| n != name);
        self.files.push((name, bytes));
        Ok(())
    }

    /// Names of the files that go with the model wherever it is saved.
    pub fn files(&self) -> impl Iterator<Item = &str> {
        self.files.iter().map(|(name, _)| *name)
    }

    /// Names of the tensors that the model does not use.
    pub fn tensors(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|t| t.name.as_str())
    }

    /// What to tell about tensors that the model does not use; none if there are none.
    pub fn unused(&self) -> Option<String> {
        let first = self.tensors().next()?;
        let n = self.tensors.len();
        Some(format!(
            "{n} tensors of multi-token prediction (`{first}`{}) are not used; they are kept aside, as they are, and saved with the model",
            if n > 1 { ", …" } else { "" }
        ))
    }
}
