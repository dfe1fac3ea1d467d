//! Files of named tensors: written piece by piece and synced, read from mapped memory, so that neither way holds a second copy of the model.

mod header;
mod write;

use crate::{Error, Result};
use engine::{DType, Device, Element, Tensor};
use header::Info;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::Path;

pub use write::write;
pub(crate) use write::{Entry, Raw, write_entries};

/// A safetensors file in mapped memory.
pub struct TensorFile {
    map: Mmap,
    header: BTreeMap<String, Info>,
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
        let header = header::read(&map).map_err(wrong)?;
        Ok(TensorFile { map, header })
    }
    /// How many tensors there are.
    pub(crate) fn len(&self) -> usize {
        self.header.len()
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
    let values = match t.dtype() {
        DType::F64 => Tensor::from_slice(&convert::<f64>(pieces, t.numel()), t.shape(), &Device::cpu())?,
        d => Tensor::from_slice(&convert::<f32>(pieces, t.numel()), t.shape(), &Device::cpu())?.cast(d)?,
    };
    Ok(t.assign(&values.to_device(t.device())?)?)
}

fn convert<T: Element>(pieces: &[TensorView], n: usize) -> Vec<T> {
    fn le<const N: usize>(b: &[u8]) -> impl Iterator<Item = [u8; N]> + '_ {
        b.as_chunks::<N>().0.iter().copied()
    }
    let mut out = Vec::with_capacity(n);
    for v in pieces {
        let b = v.data();
        match v.dtype() {
            Dtype::F32 => out.extend(le::<4>(b).map(|x| T::from_f64(f32::from_le_bytes(x).into()))),
            Dtype::F64 => out.extend(le::<8>(b).map(|x| T::from_f64(f64::from_le_bytes(x)))),
            Dtype::BF16 => out.extend(le::<2>(b).map(|x| T::from_f64(engine::half::bf16::from_le_bytes(x).to_f64()))),
            _ => out.extend(le::<2>(b).map(|x| T::from_f64(engine::half::f16::from_le_bytes(x).to_f64()))),
        }
    }
    out
}
