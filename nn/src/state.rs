//! A context on disk: what a model remembers of a text that it read, so that a long one is read once.

use crate::tensor_file::{Entry, TensorFile, fill, write_with};
use crate::{Caches, Decoder, Error, Result};
use engine::{DType, Tensor, no_grad};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// The version of the format that is written, and the only one that is read.
const FORMAT: u64 = 1;
/// Numbers that a digest looks at together; even.
const PIECE: usize = 1 << 20;
/// The one key of the metadata, whose order the format leaves open: the same state is the same bytes.
const KEY: &str = "tidegate.state";

/// What a model read, one sequence: it goes on from there as if it had read the text itself, bit for bit on the same machine.
pub struct State {
    /// The tokens, from the first.
    pub tokens: Vec<u32>,
    /// The logits after the last of them.
    pub logits: Vec<f64>,
    /// What the layers remember.
    pub caches: Caches,
}

impl State {
    /// Writes a safetensors file, whole or not at all: beside `path` first, synced, and renamed.
    ///
    /// | tensor | |
    /// |---|---|
    /// | `tokens` `[N]`, i64 | what was read |
    /// | `logits` `[V]`, f64 | after the last |
    /// | `layers.I.keys`, `layers.I.values` `[1, n, Hkv, D]` | softmax attention, in the dtype that is computed in; of sliding attention the last `sliding_window − 1` tokens |
    /// | `layers.I.conv_q`, `conv_k`, `conv_v` `[1, K − 1, C]`, `layers.I.state` `[1, Hv, Dk, Dv]`, f32 | the delta rule |
    ///
    /// The metadata holds, as JSON under one key, the format's version, the dtype that is computed in, the model's `config.json`, and two digests (64-bit FNV-1a over words): of all the model's
    /// weights, and of the tensors here.
    ///
    /// # Errors
    ///
    /// Caches of several sequences, or of other tokens than `tokens`; a file that can't be written.
    pub fn save(&self, path: &Path, model: &Decoder) -> Result<()> {
        if self.caches.lens() != [self.tokens.len()] {
            return Err(Error::Usage(format!(
                "a state is of one sequence of {} tokens, the caches are of {:?}",
                self.tokens.len(),
                self.caches.lens()
            )));
        }
        let tokens: Vec<i64> = self.tokens.iter().map(|t| i64::from(*t)).collect();
        let mut tensors = vec![
            ("tokens".to_string(), Tensor::from_vec(&tokens, &[tokens.len()])?),
            ("logits".to_string(), Tensor::from_vec(&self.logits, &[self.logits.len()])?),
        ];
        tensors.extend(self.caches.named()?);
        let numbers = digest(tensors.iter().map(|(n, t)| (n.as_str(), t)))?;
        let said = json!({ "format": FORMAT, "dtype": model.place().compute.to_string(), "config": model.config().to_json()?, "weights": weights(model)?, "numbers": numbers });
        let meta = HashMap::from([(KEY.into(), said.to_string())]);
        let entries: Vec<_> = tensors.into_iter().map(|(name, t)| (name, Entry::made(t.clone(), Some(t.dtype())))).collect();
        let staged = staged(path)?;
        let written = write_with(&staged, &entries, &|_| (), meta).and_then(|()| std::fs::rename(&staged, path).map_err(Error::io(path)));
        written.inspect_err(|_| drop(std::fs::remove_file(&staged)))?;
        // folders can't be opened as files everywhere
        match path.parent().filter(|_| cfg!(unix)) {
            Some(dir) if !dir.as_os_str().is_empty() => std::fs::File::open(dir).and_then(|f| f.sync_all()).map_err(Error::io(dir)),
            _ => Ok(()),
        }
    }

    /// Reads what [`save`](Self::save) wrote.
    ///
    /// # Errors
    ///
    /// A file that is cut off, damaged, no state or of another format; one of another model (another configuration, other weights), or of this model in another
    /// dtype.
    pub fn load(path: &Path, model: &Decoder) -> Result<State> {
        let wrong = |m: String| Error::checkpoint(path, m);
        let file = TensorFile::open(path)?;
        let Some(said) = file.metadata().get(KEY) else {
            return Err(wrong("is no state of `generate --save-state`, although it is a safetensors file".into()));
        };
        let said: Value = crate::json::parse(said.as_bytes()).map_err(|e| wrong(format!("its metadata is no JSON: {e}")))?;
        if said["format"] != FORMAT {
            return Err(wrong(format!("is a state in format {}, and format {FORMAT} can be read; write it anew", said["format"])));
        }
        if let Some(m) = other_model(&said["config"], &model.config().to_json()?) {
            return Err(wrong(format!("is of another model: {m}")));
        }
        let dtype = model.place().compute.to_string();
        if let Some(then) = said["dtype"].as_str().filter(|then| *then != dtype) {
            return Err(wrong(format!("is a state in {then}, and the model computes in {dtype}; load the model in {then}, or write the state anew")));
        }
        if said["weights"] != weights(model)? {
            return Err(wrong("is of another model: the configuration is the same, the weights are not (another checkpoint of the run?)".into()));
        }
        let found = file.tensors(path)?;
        let get = |name: &str| found.get(name).ok_or_else(|| wrong(format!("`{name}` is missing")));
        let tokens = ids(get("tokens")?, model).map_err(wrong)?;
        // what this model would remember, to hold names, shapes and dtypes against
        let mut caches = Caches::new(model.config().num_hidden_layers);
        let one = Tensor::from_vec([0u32], &[1, 1])?.to_device(&model.place().device)?;
        no_grad(|| model.last(&one, &mut caches))?;
        let logits = filled(get("logits")?, "logits", &[model.config().vocab_size], DType::F64, &engine::Device::cpu()).map_err(wrong)?;
        let read = |name: &str, like: &Tensor, past: Option<usize>| {
            let mut shape = like.shape().to_vec();
            if let Some(past) = past {
                shape[1] = tokens.len().min(past);
            }
            filled(get(name)?, name, &shape, like.dtype(), like.device()).map_err(wrong)
        };
        caches.refill(tokens.len(), read)?;
        let mut all = vec![("tokens".to_string(), Tensor::from_vec(tokens.iter().map(|t| i64::from(*t)).collect::<Vec<_>>(), &[tokens.len()])?)];
        all.push(("logits".into(), logits.clone()));
        all.extend(caches.named()?);
        if let Some(name) = found.keys().find(|name| all.iter().all(|(n, _)| n != *name)) {
            return Err(wrong(format!("`{name}` is nothing that this model remembers")));
        }
        if said["numbers"] != digest(all.iter().map(|(n, t)| (n.as_str(), t)))? {
            return Err(wrong("is damaged: its numbers are not those that were written; write it anew".into()));
        }
        Ok(State { tokens, logits: logits.to_vec()?, caches })
    }
}

/// Where the file is written first.
fn staged(path: &Path) -> Result<PathBuf> {
    match path.file_name() {
        Some(name) if !path.is_dir() => Ok(path.with_file_name(format!(".saving-{}", name.to_string_lossy()))),
        _ => Err(Error::checkpoint(path, "is no name of a file that a state could be written to")),
    }
}

/// What differs between the configuration that a state is of and the model's.
fn other_model(theirs: &Value, ours: &Value) -> Option<String> {
    let keys = |v: &Value| v.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    let mut all = [keys(theirs), keys(ours)].concat();
    all.sort();
    all.dedup();
    let said = |v: &Value| if v.is_null() { "nothing".into() } else { v.to_string() };
    let differ: Vec<String> =
        all.iter().filter(|k| theirs[*k] != ours[*k]).map(|k| format!("`{k}` is {} there and {} here", said(&theirs[k]), said(&ours[k]))).collect();
    (!differ.is_empty()).then(|| differ[..differ.len().min(4)].join(", "))
}

/// The tokens of a file, which the model must know.
fn ids(v: &TensorView, model: &Decoder) -> Result<Vec<u32>, String> {
    let vocab = model.config().vocab_size;
    if v.dtype() != Dtype::I64 || v.shape().len() != 1 || v.shape()[0] == 0 {
        return Err(format!("`tokens` is {:?}{:?}, expected I64 of at least one", v.dtype(), v.shape()));
    }
    let known = |b: &[u8; 8]| u32::try_from(i64::from_le_bytes(*b)).ok().filter(|t| (*t as usize) < vocab);
    v.data().as_chunks::<8>().0.iter().map(known).collect::<Option<_>>().ok_or_else(|| format!("`tokens` are not all below {vocab}"))
}

/// A tensor of a file, which must be of this shape and dtype.
fn filled(v: &TensorView, name: &str, shape: &[usize], dtype: DType, device: &engine::Device) -> Result<Tensor, String> {
    let theirs = match v.dtype() {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::BF16 => DType::BF16,
        Dtype::F16 => DType::F16,
        other => return Err(format!("`{name}` is {other:?}, the model's is {dtype}")),
    };
    if theirs != dtype {
        return Err(format!(
            "`{name}` is in {theirs}, the model computes in {dtype}; take the dtype that the state was written with, or write it anew"
        ));
    }
    if v.shape() != shape {
        return Err(format!("`{name}` has shape {:?}, the model's is {shape:?}", v.shape()));
    }
    let t = Tensor::zeros(shape, dtype, device).map_err(|e| e.to_string())?;
    fill(&t, std::slice::from_ref(v)).map_err(|e| e.to_string())?;
    Ok(t)
}

/// A digest of all weights: names, shapes and every number.
fn weights(model: &Decoder) -> Result<String> {
    digest(model.params().iter().map(|p| (p.name.as_str(), &p.tensor)))
}

/// 64-bit FNV-1a over words: names, shapes, numbers.
fn digest<'a>(tensors: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Result<String> {
    let mut h = 0xcbf2_9ce4_8422_2325u64;
    let mut put = |word: u64| h = (h ^ word).wrapping_mul(0x0100_0000_01b3);
    for (name, t) in tensors {
        name.bytes().for_each(|b| put(b.into()));
        t.shape().iter().for_each(|n| put(*n as u64));
        let flat = t.detach().reshape(&[t.numel()])?;
        // piece by piece through one small tensor: no second copy of a large one is held, and reading a view copies all that lies before it
        let piece = Tensor::zeros(&[PIECE.min(flat.numel())], t.dtype(), t.device())?;
        for from in (0..flat.numel()).step_by(PIECE) {
            let n = PIECE.min(flat.numel() - from);
            let t = piece.narrow(0, 0, n)?;
            t.assign(&flat.narrow(0, from, n)?)?;
            match t.dtype() {
                DType::F64 => t.to_vec::<f64>()?.into_iter().for_each(|x| put(x.to_bits())),
                d if d.is_float() => {
                    let all = t.to_vec::<f32>()?;
                    let (pairs, last) = all.as_chunks::<2>();
                    pairs.iter().for_each(|x| put(u64::from(x[0].to_bits()) << 32 | u64::from(x[1].to_bits())));
                    last.iter().for_each(|x| put(x.to_bits().into()));
                }
                _ => t.to_vec::<i64>()?.into_iter().for_each(|x| put(x as u64)),
            }
        }
    }
    Ok(format!("{h:016x}"))
}
