//! Files of named tensors: written piece by piece and synced, read from mapped memory, so that neither way holds a second copy of the model.

mod write;

use crate::{Error, Result};
use engine::{DType, Device, Element, Tensor};
use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::Path;

pub use write::write;
pub(crate) use write::{Entry, Raw, write_entries};

/// A safetensors file in mapped memory.
pub struct TensorFile {
    map: Mmap,
}

impl TensorFile {
    /// Maps the file.
    pub fn open(path: &Path) -> Result<TensorFile> {
        let file = std::fs::File::open(path).map_err(Error::io(path))?;
        // SAFETY: the map is only read; a file that another process truncates meanwhile would fault, as with every reader of mapped checkpoints.
        Ok(TensorFile { map: unsafe { Mmap::map(&file) }.map_err(Error::io(path))? })
    }
    /// All tensors by name; an error for a header that is cut off or does not describe the file.
    pub fn tensors(&self, path: &Path) -> Result<BTreeMap<String, TensorView<'_>>> {
        let st = SafeTensors::deserialize(&self.map);
        let st = st.map_err(|e| Error::checkpoint(path, format!("is no whole safetensors file ({e}); copy it again, or use an older checkpoint")))?;
        Ok(st.tensors().into_iter().collect())
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
