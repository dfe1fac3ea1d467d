//! `model.safetensors` and `config.json`, in transformers' names: fused projections are written apart, and read in either form.

use crate::aside::Aside;
use crate::init::Source;
use crate::save::was_cut_off;
use crate::tensor_file::{Raw, TensorFile, fill, readable};
use crate::{Decoder, Error, ModelConfig, Param, Placement, Result, json, shards};
use engine::{DType, Tensor};
use safetensors::tensor::TensorView;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

pub(crate) const MODEL: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const CONFIG: &str = "config.json";
const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Tensors of multi-token prediction begin so: transformers passes over them, too.
const MTP: &str = "mtp.";

/// A tensor as files have it: name and the part of the parameter that it is.
pub(crate) fn parts(name: &str, t: &Tensor) -> Result<Vec<(String, Tensor)>> {
    let one = |i: usize, t: &Tensor| -> Result<Tensor> { Ok(t.narrow(0, i, 1)?.reshape(&t.shape()[1..])?) };
    if let Some(base) = name.strip_suffix("gate_up_proj.weight") {
        let i = t.dim(0) / 2;
        return Ok(vec![(format!("{base}gate_proj.weight"), t.narrow(0, 0, i)?), (format!("{base}up_proj.weight"), t.narrow(0, i, i)?)]);
    }
    let mut out = vec![];
    if let Some(base) = name.strip_suffix("experts.gate_up_proj") {
        for e in 0..t.dim(0) {
            let (w, i) = (one(e, t)?, t.dim(1) / 2);
            out.push((format!("{base}experts.{e}.gate_proj.weight"), w.narrow(0, 0, i)?));
            out.push((format!("{base}experts.{e}.up_proj.weight"), w.narrow(0, i, i)?));
        }
    } else if let Some(base) = name.strip_suffix("experts.down_proj") {
        for e in 0..t.dim(0) {
            out.push((format!("{base}experts.{e}.down_proj.weight"), one(e, t)?));
        }
    } else {
        out.push((name.to_string(), t.clone()));
    }
    Ok(out)
}

/// The files that hold a folder's tensors: one, or the shards that an index names.
struct Files(Vec<(PathBuf, TensorFile)>);

impl Files {
    fn open(dir: &Path) -> Result<Files> {
        Ok(Files(shards::open(dir)?))
    }

    /// An error if the files have fewer tensors than the model has layers, each of which has norms: even its plan would take more memory than they do.
    fn hold(&self, dir: &Path, layers: usize) -> Result<()> {
        let found: usize = self.0.iter().map(|(_, file)| file.len()).sum();
        if layers > found {
            let m = format!("`num_hidden_layers` = {layers} does not fit the files beside it, which hold {found} tensors in all");
            return Err(Error::checkpoint(&dir.join(CONFIG), m));
        }
        Ok(())
    }

    /// Copies of the tensors that belong to no parameter and are wanted all the same.
    fn aside(&self) -> Result<Vec<Raw>> {
        let mut out = vec![];
        for (path, file) in &self.0 {
            out.extend(file.tensors(path)?.iter().filter(|(name, _)| name.starts_with(MTP)).map(|(name, v)| Raw::of(name, v)));
        }
        out.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(out)
    }

    /// The tensors for each of `params`, in its order; an error that lists what does not fit.
    fn matched(&self, dir: &Path, params: &[Param]) -> Result<Vec<Vec<TensorView<'_>>>> {
        let (mut left, mut wrong) = (BTreeMap::new(), vec![]);
        for (path, file) in &self.0 {
            for (name, v) in file.tensors(path)? {
                if left.insert(name.clone(), v).is_some() {
                    wrong.push(format!("`{name}` is in two files"));
                }
            }
        }
        // files of tied models often have the output projection once more
        if !params.iter().any(|p| p.name == HEAD)
            && let Some(head) = left.remove(HEAD)
            && left.get(EMBED).is_none_or(|e| (e.dtype(), e.shape(), e.data()) != (head.dtype(), head.shape(), head.data()))
        {
            wrong.push(format!("`{HEAD}` is not `{EMBED}`, although `tie_word_embeddings` says that they are one"));
        }
        let mut ready = vec![];
        for p in params {
            // parts that are not there are not worth naming one by one
            if !left.contains_key(&p.name) && p.name.contains(".experts.") && p.tensor.dim(0) > left.len() {
                wrong.push(format!("`{}` is missing, whole and as {} experts", p.name, p.tensor.dim(0)));
                continue;
            }
            // a parameter stands in the file whole, or in transformers' parts: these follow each other in memory
            let wanted = if left.contains_key(&p.name) { vec![(p.name.clone(), p.tensor.detach())] } else { parts(&p.name, &p.tensor.detach())? };
            let mut pieces = vec![];
            for (name, t) in wanted {
                match left.remove(&name) {
                    None => wrong.push(format!("`{name}` is missing")),
                    Some(v) if v.shape() != t.shape() => wrong.push(format!("`{name}` has shape {:?}, the model needs {:?}", v.shape(), t.shape())),
                    Some(v) if !readable(&v) => wrong.push(format!("`{name}` is {:?}; f32, f64, bf16 and f16 can be read", v.dtype())),
                    Some(v) => pieces.push(v),
                }
            }
            ready.push(pieces);
        }
        wrong.extend(left.keys().filter(|n| !n.starts_with(MTP)).map(|n| format!("`{n}` is not of this model")));
        if !wrong.is_empty() {
            let more = if wrong.len() > 8 { format!("; and {} more", wrong.len() - 8) } else { String::new() };
            let path = if let [(path, _)] = &self.0[..] { path.as_path() } else { dir };
            return Err(Error::checkpoint(path, format!("does not fit the model: {}{more}", wrong[..wrong.len().min(8)].join("; "))));
        }
        Ok(ready)
    }
}

impl Decoder {
    /// Tensors of the parameters' shapes, such as gradients, under the names that the checkpoint `dir` has for the parameters: whole, or in transformers'
    /// parts (each expert's for itself, gate and up apart).
    pub fn named_as_in(&self, dir: &Path, tensor: impl Fn(&Param) -> Result<Tensor>) -> Result<Vec<(String, Tensor)>> {
        let files = Files::open(dir)?;
        let mut names = BTreeSet::new();
        for (path, file) in &files.0 {
            names.extend(file.tensors(path)?.into_keys());
        }
        let mut out = vec![];
        for p in self.params() {
            let t = tensor(p)?;
            out.extend(if names.contains(&p.name) { vec![(p.name.clone(), t)] } else { parts(&p.name, &t)? });
        }
        Ok(out)
    }

    /// The model that the folder `dir` holds, in f32: `config.json`, and `model.safetensors` or the shards that `model.safetensors.index.json` names.
    /// The files' names and shapes are held against the configuration before memory is taken.
    pub fn open(dir: &Path) -> Result<Decoder> {
        Self::open_on(dir, &Placement::cpu(DType::F32))
    }

    /// The model that the folder `dir` holds, as [`open`](Self::open), in a place of your choice.
    pub fn open_on(dir: &Path, place: &Placement) -> Result<Decoder> {
        let json = read_config(dir)?;
        let config = ModelConfig::from_json(json.clone())?;
        place.validate()?;
        config.fits(place.params.size() as u64)?;
        let files = Files::open(dir)?;
        files.hold(dir, config.num_hidden_layers)?;
        let plan = Decoder::build(&config, place, Source::Shapes)?;
        let pieces = files.matched(dir, plan.params())?;
        let pieces: HashMap<&str, &Vec<TensorView>> = plan.params().iter().map(|p| p.name.as_str()).zip(&pieces).collect();
        let mut model = Decoder::build(&config, place, Source::File(&|name, t| fill(t, pieces.get(name).map_or(&[], |v| v))))?;
        model.aside = Aside::read(dir, &json, files.aside()?)?;
        Ok(model)
    }

    /// Overwrites the parameters in place with those of the folder `dir`, and takes over what is beside them; nothing, if the files do not fit.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let files = Files::open(dir)?;
        let pieces = files.matched(dir, self.params())?;
        let aside = Aside::read(dir, &read_config(dir)?, files.aside()?)?;
        self.params().iter().zip(&pieces).try_for_each(|(p, pieces)| fill(&p.tensor, pieces))?;
        self.aside = aside;
        Ok(())
    }
}

fn read_config(dir: &Path) -> Result<serde_json::Value> {
    let path = dir.join(CONFIG);
    if !path.exists() && was_cut_off(dir) {
        return Err(Error::checkpoint(&path, "is missing, because a save into this folder was cut off; save the model once more"));
    }
    if path.exists() && !path.is_file() {
        return Err(Error::checkpoint(&path, "is no file; expected a model's configuration in JSON"));
    }
    let text = std::fs::read(&path).map_err(Error::io(&path))?;
    json::parse(&text).map_err(|e| Error::checkpoint(&path, format!("is no JSON: {e}")))
}
