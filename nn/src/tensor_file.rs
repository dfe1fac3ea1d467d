//! Files of named tensors: written piece by piece and synced, read from mapped memory, so that neither way holds a second copy of the model.

mod header;
mod write;

use crate::{Error, Result};
use engine::{DType, Device, Element, Tensor};
use header::Info;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

pub use write::write;
pub(crate) use write::{Entry, Raw, write_entries, write_with};

/// A safetensors file in mapped memory.
pub struct TensorFile {
    map: Mmap,
    header: BTreeMap<String, Info>,
    meta: HashMap<String, String>,
}

impl TensorFile {
    /// Maps the file, and holds its header against it; an error for a header that is cut off or does not describe the file.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let wrong =
            |what: String| Error::checkpoint(path, format!("is no whole safetensors file: {what}; copy it again, or use an older checkpoint"));
        // a pipe would be waited for
        if !std::fs::metadata(path).map_err(Error::io(path))?.is_file() {
            return Err(Error::checkpoint(path, "is no file; expected a safetensors file"));
        }
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is only read; a file that another process truncates meanwhile would fault, as with every reader of mapped checkpoints.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        let (header, meta) = header::read(&map).map_err(wrong)?;
        Ok(TensorFile { map, header, meta })
    }
    /// How many tensors there are.
    pub(crate) fn len(&self) -> usize {
        self.header.len()
    }
    /// How many numbers they hold.
    pub(crate) fn numbers(&self) -> usize {
        self.header.values().map(|info| info.shape.iter().product::<usize>()).sum()
    }
    /// What the file says of itself.
    pub(crate) fn metadata(&self) -> &HashMap<String, String> {
        &self.meta
    }
    /// All tensors by name; `path` is for messages.
    pub fn tensors(&self, path: &Path) -> Result<BTreeMap<String, TensorView<'_>>> {
        let view = |(name, info): (&String, &Info)| {
            let view = TensorView::new(info.dtype, info.shape.clone(), &self.map[info.at.clone()]);
            Ok((name.clone(), view.map_err(|e| Error::checkpoint(path, format!("`{name}`: {e}")))?))
        };
        self.header.iter().map(view).collect()
    }
}

/// Whether [`fill`] can read it.
pub fn readable(v: &TensorView) -> bool {
    matches!(v.dtype(), Dtype::F32 | Dtype::F64 | Dtype::BF16 | Dtype::F16)
}

/// Overwrites `t` with the pieces, one after the other, converted to its dtype.
pub fn fill(t: &Tensor, pieces: &[TensorView]) -> Result<()> {
    let (mut parts, mut start) = (vec![], 0);
    for v in pieces {
        let end = start + v.shape().iter().product::<usize>();
        parts.push((v.clone(), std::iter::once(start..end).collect()));
        start = end;
    }
    fill_parts(t, &parts)
}

/// A file's tensor, and where its numbers go, in its order.
pub(crate) type Part<'a> = (TensorView<'a>, Vec<Range<usize>>);

/// Overwrites `t` with its parts, converted to its dtype.
pub(crate) fn fill_parts(t: &Tensor, pieces: &[Part]) -> Result<()> {
    let values = match t.dtype() {
        DType::F64 => Tensor::from_slice(&convert::<f64>(pieces, t.numel()), t.shape(), &Device::cpu())?,
        d => Tensor::from_slice(&convert::<f32>(pieces, t.numel()), t.shape(), &Device::cpu())?.cast(d)?,
    };
    Ok(t.assign(&values.to_device(t.device())?)?)
}

fn convert<T: Element>(pieces: &[Part], n: usize) -> Vec<T> {
    fn put<T: Element, const N: usize>(out: &mut [T], b: &[u8], wide: impl Fn([u8; N]) -> f64) {
        out.iter_mut().zip(b.as_chunks::<N>().0).for_each(|(y, x)| *y = T::from_f64(wide(*x)));
    }
    let mut out = vec![T::default(); n];
    for (v, ranges) in pieces {
        let mut left = v.data();
        for r in ranges {
            let out = &mut out[r.clone()];
            let (b, rest) = left.split_at(out.len() * v.dtype().bitsize() / 8);
            left = rest;
            match v.dtype() {
                Dtype::F32 => put(out, b, |x| f32::from_le_bytes(x).into()),
                Dtype::F64 => put(out, b, f64::from_le_bytes),
                Dtype::BF16 => put(out, b, |x| engine::half::bf16::from_le_bytes(x).to_f64()),
                _ => put(out, b, |x| engine::half::f16::from_le_bytes(x).to_f64()),
            }
        }
    }
    out
}
