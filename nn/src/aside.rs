//! What a checkpoint's folder holds beside the parameters: kept as it is, and written back when the model is saved.

use crate::tensor_file::Raw;
use crate::{Error, Result, json};
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
    /// Names of a vision tower's tensors: gigabytes that no text needs, hence they are passed over, and not saved.
    vision: Vec<String>,
}

impl Aside {
    /// What the folder `dir` with this `config.json` has beside `tensors`, and those of these names.
    pub(crate) fn read(dir: &Path, config: &Value, tensors: Vec<Raw>, vision: Vec<String>) -> Result<Aside> {
        let mut files = vec![];
        for name in FILES {
            let path = dir.join(name);
            if path.is_file() {
                files.push((*name, json::read(&path)?));
            }
        }
        // a model that reads images, too, may say it of its text model
        let said = |key| [config, &config["text_config"]].into_iter().find_map(|c| c.get(key).filter(|x| !x.is_null()));
        let ids = IDS.iter().filter_map(|key| Some((key.to_string(), said(key)?.clone()))).collect();
        let aside = Aside { files, ids, tensors, vision };
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
        let names = |first: &str, n: usize| if n > 1 { format!("`{first}`, …") } else { format!("`{first}`") };
        let mtp = self.tensors.first().map(|t| {
            let n = self.tensors.len();
            let names = names(&t.name, n);
            format!("{n} tensors of multi-token prediction ({names}) are not used; they are kept aside, as they are, and saved with the model")
        });
        let vision = self.vision.first().map(|first| {
            let n = self.vision.len();
            format!("{n} tensors for images ({}) are passed over: the text model is read alone, and saved without them", names(first, n))
        });
        let said: Vec<String> = mtp.into_iter().chain(vision).collect();
        (!said.is_empty()).then(|| said.join("; "))
    }
}
