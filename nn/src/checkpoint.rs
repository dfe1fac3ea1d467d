//! `model.safetensors` and `config.json`, in transformers' names: parameters are read in every spelling that `spelling.rs` knows, and written in
//! one.

use crate::aside::Aside;
use crate::config::grouped_queries;
use crate::init::Source;
use crate::save::was_cut_off;
use crate::spelling::{Piece, found, from_mamba2};
use crate::tensor_file::{Part, Raw, TensorFile, fill_parts, readable};
use crate::{Decoder, Error, ModelConfig, Param, Placement, Result, json, shards};
use engine::{DType, Tensor};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

pub(crate) const MODEL: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";
pub(crate) const CONFIG: &str = "config.json";
const EMBED: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Tensors of multi-token prediction begin so: transformers passes over them, too.
const MTP: &str = "mtp.";
/// The vision tower of a model that reads images, too, and what its text model's names begin with instead of `model.`.
const VISION: &str = "model.visual.";
const TEXT: &str = "model.language_model.";

/// What we call the tensor that a file calls `name`.
fn ours(name: &str) -> String {
    name.strip_prefix(TEXT).map(|rest| format!("model.{rest}")).or_else(|| from_mamba2(name)).unwrap_or_else(|| name.to_string())
}

/// The files that hold a folder's tensors: one, or the shards that an index names.
struct Files {
    shards: Vec<(PathBuf, TensorFile)>,
    config: Value,
}

impl Files {
    fn open(dir: &Path) -> Result<Files> {
        Ok(Files { shards: shards::open(dir)?, config: read_config(dir)? })
    }

    /// An error if the files have fewer tensors than the model has layers, each of which has norms, or far fewer numbers than it has parameters: even its
    /// plan would take more memory than they do.
    fn hold(&self, dir: &Path, c: &ModelConfig) -> Result<()> {
        let (found, layers): (usize, _) = (self.shards.iter().map(|(_, file)| file.len()).sum(), c.num_hidden_layers);
        if layers > found {
            let m = format!("`num_hidden_layers` = {layers} does not fit the files beside it, which hold {found} tensors in all");
            return Err(Error::checkpoint(&dir.join(CONFIG), m));
        }
        let (numbers, parameters): (usize, _) = (self.shards.iter().map(|(_, file)| file.numbers()).sum(), c.parameters().0);
        if parameters / 2 > numbers {
            let m =
                format!("describes a model of {parameters} parameters, and the files beside it hold {numbers} numbers: they are not of one model");
            return Err(Error::checkpoint(&dir.join(CONFIG), m));
        }
        Ok(())
    }

    /// What is beside the model: copies of the tensors that belong to no parameter and are wanted all the same, names of those that are passed over.
    fn aside(&self, dir: &Path) -> Result<Aside> {
        let (mut kept, mut vision) = (vec![], vec![]);
        for (path, file) in &self.shards {
            let tensors = file.tensors(path)?;
            kept.extend(tensors.iter().filter(|(name, _)| name.starts_with(MTP)).map(|(name, v)| Raw::of(name, v)));
            vision.extend(tensors.into_keys().filter(|name| name.starts_with(VISION)));
        }
        kept.sort_by(|a, b| a.name.cmp(&b.name));
        vision.sort();
        Aside::read(dir, &self.config, kept, vision)
    }

    /// The tensors that a file has for a parameter, if `has` says which there are.
    fn pieces(&self, p: &Param, c: &ModelConfig, has: impl Fn(&str) -> Option<Vec<usize>>) -> Vec<Piece> {
        found(p, c, grouped_queries(&self.config), has)
    }

    /// The parts of each of `params`, in its order; an error that lists what does not fit.
    fn matched(&self, dir: &Path, params: &[Param], c: &ModelConfig) -> Result<Vec<Vec<Part<'_>>>> {
        let (mut left, mut wrong) = (BTreeMap::new(), vec![]);
        for (path, file) in &self.shards {
            for (name, v) in file.tensors(path)? {
                if left.insert(ours(&name), v).is_some() {
                    wrong.push(format!("`{name}` is in two files, or twice in one"));
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
            let mut parts = vec![];
            for Piece { name, shape, ranges } in self.pieces(p, c, |name| left.get(name).map(|v| v.shape().to_vec())) {
                match left.remove(&name) {
                    None => wrong.push(format!("`{name}` is missing")),
                    Some(v) if v.shape() != shape => wrong.push(format!("`{name}` has shape {:?}, the model needs {shape:?}", v.shape())),
                    Some(v) if !readable(&v) => wrong.push(format!("`{name}` is {:?}; f32, f64, bf16 and f16 can be read", v.dtype())),
                    Some(v) => parts.push((v, ranges)),
                }
            }
            ready.push(parts);
        }
        wrong.extend(left.keys().filter(|n| !n.starts_with(MTP) && !n.starts_with(VISION)).map(|n| format!("`{n}` is not of this model")));
        if !wrong.is_empty() {
            let more = if wrong.len() > 8 { format!("; and {} more", wrong.len() - 8) } else { String::new() };
            let path = if let [(path, _)] = &self.shards[..] { path.as_path() } else { dir };
            return Err(Error::checkpoint(path, format!("does not fit the model: {}{more}", wrong[..wrong.len().min(8)].join("; "))));
        }
        Ok(ready)
    }
}

impl Decoder {
    /// Tensors of the parameters' shapes, such as gradients, in the form that the checkpoint `dir` has for the parameters: its names, its order of rows, what
    /// it holds in parts (each expert for itself, gate and up apart) in these parts.
    pub fn named_as_in(&self, dir: &Path, tensor: impl Fn(&Param) -> Result<Tensor>) -> Result<Vec<(String, Tensor)>> {
        let files = Files::open(dir)?;
        let mut theirs = HashMap::new();
        for (path, file) in &files.shards {
            theirs.extend(file.tensors(path)?.into_iter().map(|(name, v)| (ours(&name), (name, v.shape().to_vec()))));
        }
        let mut out = vec![];
        for p in self.params() {
            let t = tensor(p)?;
            for piece in files.pieces(p, self.config(), |name| theirs.get(name).map(|t| t.1.clone())) {
                out.push((theirs.get(&piece.name).map_or(&piece.name, |t| &t.0).clone(), piece.of(&t)?));
            }
        }
        Ok(out)
    }

    /// The configuration of the model that the folder `dir` holds.
    pub fn config_of(dir: &Path) -> Result<ModelConfig> {
        ModelConfig::from_json(read_config(dir)?).map_err(|e| match e {
            Error::Config(m) => Error::checkpoint(&dir.join(CONFIG), m),
            e => e,
        })
    }

    /// The model that the folder `dir` holds, in f32: `config.json`, and `model.safetensors` or the shards that `model.safetensors.index.json` names.
    /// The files' names and shapes are held against the configuration before memory is taken.
    pub fn open(dir: &Path) -> Result<Decoder> {
        Self::open_on(dir, &Placement::cpu(DType::F32))
    }

    /// The model that the folder `dir` holds, as [`open`](Self::open), in a place of your choice.
    pub fn open_on(dir: &Path, place: &Placement) -> Result<Decoder> {
        let config = Self::config_of(dir)?;
        place.validate()?;
        let files = Files::open(dir)?;
        files.hold(dir, &config)?;
        let sets = "it takes a machine with more, or half of that with bf16 (`--dtype bf16`)";
        config.fits(place.params.size() as u64, if place.params == DType::BF16 { "it takes a machine with more" } else { sets })?;
        let plan = Decoder::build(&config, place, Source::Shapes)?;
        let matched = files.matched(dir, plan.params(), &config)?;
        let matched: HashMap<&str, &Vec<Part>> = plan.params().iter().map(|p| p.name.as_str()).zip(&matched).collect();
        let mut model = Decoder::build(&config, place, Source::File(&|name, t| fill_parts(t, matched.get(name).map_or(&[], |v| v))))?;
        model.aside = files.aside(dir)?;
        Ok(model)
    }

    /// Overwrites the parameters in place with those of the folder `dir`, and takes over what is beside them; nothing, if the files do not fit.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let files = Files::open(dir)?;
        let matched = files.matched(dir, self.params(), self.config())?;
        let aside = files.aside(dir)?;
        self.params().iter().zip(&matched).try_for_each(|(p, parts)| fill_parts(&p.tensor, parts))?;
        self.aside = aside;
        Ok(())
    }
}

fn read_config(dir: &Path) -> Result<Value> {
    let path = dir.join(CONFIG);
    if !path.exists() && was_cut_off(dir) {
        return Err(Error::checkpoint(&path, "is missing, because a save into this folder was cut off; save the model once more"));
    }
    if path.exists() && !path.is_file() {
        return Err(Error::checkpoint(&path, "is no file; expected a model's configuration in JSON"));
    }
    let text = json::read(&path)?;
    json::parse(&json::from_python(&text)).map_err(|e| Error::checkpoint(&path, format!("is no JSON: {e}")))
}
