//! What `tidegate trace` runs a model on.

use crate::{Error, Result};
use engine::{Device, Tensor};
use nn::tensor_file::TensorFile;
use safetensors::tensor::{Dtype, TensorView};
use std::path::Path;

/// A label that is not asked for.
const IGNORE: i64 = -100;

/// Tokens, and what is to be predicted from each.
#[derive(Debug)]
pub struct Input {
    /// `[B, T]`.
    pub shape: [usize; 2],
    ids: Vec<u32>,
    targets: Vec<i64>,
    cu_seqlens: Option<Vec<i64>>,
}

/// Integers as a file has them.
fn integers(name: &str, v: &TensorView) -> std::result::Result<Vec<i64>, String> {
    match v.dtype() {
        Dtype::I64 => Ok(v.data().as_chunks::<8>().0.iter().map(|x| i64::from_le_bytes(*x)).collect()),
        Dtype::I32 => Ok(v.data().as_chunks::<4>().0.iter().map(|x| i32::from_le_bytes(*x).into()).collect()),
        other => Err(format!("`{name}` must be I64 (or I32), found {other:?}")),
    }
}

impl Input {
    /// One row of tokens, each predicted from those before it.
    pub fn of_tokens(ids: Vec<u32>) -> Input {
        let labels: Vec<i64> = ids.iter().map(|i| i64::from(*i)).collect();
        let shape = [1, ids.len()];
        Input { targets: shifted(&labels, shape, &[]), shape, ids, cu_seqlens: None }
    }

    /// What a safetensors file has: `input_ids [B, T]` (or `[T]`), and perhaps `labels` of its shape and `cu_seqlens [n + 1]` (B = 1).
    pub fn read(path: &Path, vocab: usize) -> Result<Input> {
        let file = TensorFile::open(path)?;
        let tensors = file.tensors(path)?;
        let checked = || -> std::result::Result<Input, String> {
            let names = || tensors.keys().take(20).cloned().collect::<Vec<_>>().join(", ");
            let ids = tensors.get("input_ids").ok_or_else(|| format!("there is no `input_ids` [B, T] in it; it holds: {}", names()))?;
            let shape = match ids.shape() {
                &[t] => [1, t],
                &[b, t] => [b, t],
                other => return Err(format!("`input_ids` must have shape [B, T], found {other:?}")),
            };
            if shape.contains(&0) {
                return Err(format!("`input_ids` holds no token: its shape is {:?}", ids.shape()));
            }
            let token = |i: i64| u32::try_from(i).ok().filter(|i| (*i as usize) < vocab);
            let at = |i: usize| format!("[{}, {}]", i / shape[1], i % shape[1]);
            let all = integers("input_ids", ids)?;
            let in_range = |name: &str, i: usize, id: i64| format!("`{name}` at {} is {id}; the model's tokens are 0 to {}", at(i), vocab - 1);
            let tokens = all.iter().enumerate().map(|(i, id)| token(*id).ok_or_else(|| in_range("input_ids", i, *id))).collect::<Result<_, _>>()?;
            let labels = match tensors.get("labels") {
                None => all,
                Some(v) if v.shape() != ids.shape() => {
                    return Err(format!("`labels` must have the shape of `input_ids`, {:?}, found {:?}", ids.shape(), v.shape()));
                }
                Some(v) => {
                    let labels = integers("labels", v)?;
                    if let Some((i, l)) = labels.iter().enumerate().find(|(_, l)| **l != IGNORE && token(**l).is_none()) {
                        return Err(format!("{} ({IGNORE}: not asked for)", in_range("labels", i, *l)));
                    }
                    labels
                }
            };
            let cu_seqlens = tensors.get("cu_seqlens").map(|v| bounds(&integers("cu_seqlens", v)?, v.shape(), shape)).transpose()?;
            Ok(Input { targets: shifted(&labels, shape, cu_seqlens.as_deref().unwrap_or(&[])), ids: tokens, shape, cu_seqlens })
        };
        checked().map_err(|message| Error::data(path, message))
    }

    /// How many tokens are to be predicted.
    pub fn predictions(&self) -> usize {
        self.targets.iter().filter(|t| **t != IGNORE).count()
    }

    /// Tokens `[B, T]`, targets `[B·T]`, document bounds, on a device.
    pub fn on(&self, device: &Device) -> engine::Result<(Tensor, Tensor, Option<Tensor>)> {
        let cu = self.cu_seqlens.as_ref().map(|cu| Tensor::from_slice(cu, &[cu.len()], device)).transpose()?;
        Ok((Tensor::from_slice(&self.ids, &self.shape, device)?, Tensor::from_slice(&self.targets, &[self.targets.len()], device)?, cu))
    }
}

fn bounds(cu: &[i64], found: &[usize], [b, t]: [usize; 2]) -> std::result::Result<Vec<i64>, String> {
    if b != 1 {
        return Err(format!("`cu_seqlens` packs documents into one row, and `input_ids` has {b}"));
    }
    let rises = cu.windows(2).all(|w| w[0] <= w[1]);
    if found.len() != 1 || cu.len() < 2 || cu[0] != 0 || cu[cu.len() - 1] != t as i64 || !rises {
        return Err(format!("`cu_seqlens` must be [documents + 1] bounds that rise from 0 to {t}, the number of tokens"));
    }
    Ok(cu.to_vec())
}

/// The next token's label at each, none at the end of a row or document.
fn shifted(labels: &[i64], [b, t]: [usize; 2], cu: &[i64]) -> Vec<i64> {
    let next = |i: usize| if i % t + 1 == t || cu.contains(&(i as i64 + 1)) { IGNORE } else { labels[i + 1] };
    (0..b * t).map(next).collect()
}
