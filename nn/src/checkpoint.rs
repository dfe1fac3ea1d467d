//! `model.safetensors` and `config.json`, in transformers' names: fused projections are written apart, and read in either form.

use crate::{Decoder, Error, ModelConfig, Result};
use engine::{DType, Device, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::Path;

const MODEL: &str = "model.safetensors";
const CONFIG: &str = "config.json";

/// A tensor as files have it: name and the part of the parameter that it is.
fn parts(name: &str, t: &Tensor) -> Result<Vec<(String, Tensor)>> {
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

impl Decoder {
    /// Writes `model.safetensors` and `config.json` into the folder `dir`, each synced to disk.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let file = dir.join(MODEL);
        let mut named: Vec<(String, Vec<usize>, Vec<u8>, Dtype)> = vec![];
        for p in self.params() {
            for (name, t) in parts(&p.name, &p.tensor.detach())? {
                let (bytes, d) = match t.dtype() {
                    DType::F64 => (t.to_vec::<f64>()?.iter().flat_map(|x| x.to_le_bytes()).collect(), Dtype::F64),
                    _ => (t.to_vec::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(), Dtype::F32),
                };
                named.push((name, t.shape().to_vec(), bytes, d));
            }
        }
        let views = named.iter().map(|(n, s, b, d)| TensorView::new(*d, s.clone(), b).map(|v| (n.as_str(), v))).collect::<Result<Vec<_>, _>>();
        let views = views.map_err(|e| Error::checkpoint(&file, e.to_string()))?;
        let meta = std::collections::HashMap::from([("format".to_string(), "pt".to_string())]);
        let bytes = safetensors::serialize(views, Some(meta)).map_err(|e| Error::checkpoint(&file, e.to_string()))?;
        write_synced(&file, &bytes)?;
        let config = serde_json::to_string_pretty(self.config()).map_err(|e| Error::Config(e.to_string()))?;
        write_synced(&dir.join(CONFIG), config.as_bytes())
    }

    /// The model that the folder `dir` holds, in f32.
    pub fn open(dir: &Path) -> Result<Decoder> {
        let path = dir.join(CONFIG);
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let json = serde_json::from_str(&text).map_err(|e| Error::checkpoint(&path, format!("is no JSON: {e}")))?;
        let model = Decoder::new(&ModelConfig::from_json(json)?, 0, DType::F32)?;
        model.load(dir)?;
        Ok(model)
    }

    /// Overwrites the parameters in place with those of `dir/model.safetensors`.
    pub fn load(&self, dir: &Path) -> Result<()> {
        let path = dir.join(MODEL);
        let file = std::fs::File::open(&path).map_err(Error::io(&path))?;
        // SAFETY: the map is only read; a file that another process truncates meanwhile would fault, as with every reader of mapped checkpoints.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(Error::io(&path))?;
        let st =
            SafeTensors::deserialize(&map).map_err(|e| Error::checkpoint(&path, format!("is no whole safetensors file ({e}); copy it again")))?;
        let mut left: BTreeMap<String, TensorView> = st.tensors().into_iter().collect();
        let mut wrong = vec![];
        let mut ready = vec![];
        for p in self.params() {
            let mut pieces = vec![];
            let fused = left.remove(&p.name);
            let wanted = if fused.is_some() { vec![(p.name.clone(), p.tensor.detach())] } else { parts(&p.name, &p.tensor.detach())? };
            let whole = fused.is_some();
            for (name, t) in wanted {
                let view = if whole { fused.clone() } else { left.remove(&name) };
                match view {
                    None => wrong.push(format!("`{name}` is missing")),
                    Some(v) if v.shape() != t.shape() => wrong.push(format!("`{name}` has shape {:?}, the model needs {:?}", v.shape(), t.shape())),
                    Some(v) => match read(&v) {
                        Some(x) => pieces.push(x),
                        None => wrong.push(format!("`{name}` is {:?}; f32, f64, bf16 and f16 can be read", v.dtype())),
                    },
                }
            }
            ready.push((p, pieces));
        }
        wrong.extend(left.keys().filter(|n| !n.starts_with("mtp.")).map(|n| format!("`{n}` is not of this model")));
        if !wrong.is_empty() {
            let more = if wrong.len() > 8 { format!("; and {} more", wrong.len() - 8) } else { String::new() };
            return Err(Error::checkpoint(&path, format!("does not fit the model: {}{more}", wrong[..wrong.len().min(8)].join("; "))));
        }
        for (p, pieces) in ready {
            let all: Vec<f64> = pieces.concat();
            // gate and up of an expert stand one after the other in the file's order and in memory
            let t = Tensor::from_slice(&all, p.tensor.shape(), &Device::cpu())?.cast(p.tensor.dtype())?;
            p.tensor.assign(&t)?;
        }
        Ok(())
    }
}

fn read(v: &TensorView) -> Option<Vec<f64>> {
    fn le<const N: usize>(b: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
        b.as_chunks::<N>().0.iter().copied()
    }
    let b = v.data();
    Some(match v.dtype() {
        Dtype::F32 => le::<4>(b).map(|x| f32::from_le_bytes(x) as f64).collect(),
        Dtype::F64 => le::<8>(b).map(f64::from_le_bytes).collect(),
        Dtype::BF16 => le::<2>(b).map(|x| engine::half::bf16::from_le_bytes(x).to_f64()).collect(),
        Dtype::F16 => le::<2>(b).map(|x| engine::half::f16::from_le_bytes(x).to_f64()).collect(),
        _ => return None,
    })
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    use std::io::Write;
    let mut f = std::fs::File::create(path).map_err(Error::io(path))?;
    f.write_all(bytes).map_err(Error::io(path))?;
    f.sync_all().map_err(Error::io(path))
}
