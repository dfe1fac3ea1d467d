//! Files of named tensors: written piece by piece and synced, read from mapped memory, so that neither way holds a second copy of the model.

use crate::{Error, Result};
use engine::{DType, Device, Element, Tensor};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, TensorView, View};
use safetensors::{SafeTensorError, SafeTensors};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

/// A tensor whose bytes are made when they are written.
struct Lazy<'a> {
    tensor: Tensor,
    failed: &'a RefCell<Option<engine::Error>>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> Dtype {
        match self.tensor.dtype() {
            DType::F64 => Dtype::F64,
            d if d.is_float() => Dtype::F32,
            _ => Dtype::I64,
        }
    }
    fn shape(&self) -> &[usize] {
        self.tensor.shape()
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = match self.dtype() {
            Dtype::F64 => self.tensor.to_vec::<f64>().map(|v| v.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()),
            Dtype::I64 => self.tensor.to_vec::<i64>().map(|v| v.iter().flat_map(|x| x.to_le_bytes()).collect()),
            _ => self.tensor.to_vec::<f32>().map(|v| v.iter().flat_map(|x| x.to_le_bytes()).collect()),
        };
        Cow::Owned(bytes.unwrap_or_else(|e| {
            self.failed.replace(Some(e));
            vec![0; self.data_len()]
        }))
    }
    fn data_len(&self) -> usize {
        self.tensor.numel() * if self.dtype() == Dtype::F32 { 4 } else { 8 }
    }
}

/// A file's tensor as its bytes are.
pub(crate) struct Raw {
    pub name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Raw {
    /// A copy: the file may be written over.
    pub fn of(name: &str, v: &TensorView) -> Raw {
        Raw { name: name.into(), dtype: v.dtype(), shape: v.shape().to_vec(), bytes: v.data().to_vec() }
    }
}

/// What a file is made of.
enum Entry<'a> {
    Made(Lazy<'a>),
    Kept(&'a Raw),
}

impl View for Entry<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Entry::Made(t) => t.dtype(),
            Entry::Kept(t) => t.dtype,
        }
    }
    fn shape(&self) -> &[usize] {
        match self {
            Entry::Made(t) => t.shape(),
            Entry::Kept(t) => &t.shape,
        }
    }
    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Entry::Made(t) => t.data(),
            Entry::Kept(t) => Cow::Borrowed(&t.bytes),
        }
    }
    fn data_len(&self) -> usize {
        match self {
            Entry::Made(t) => t.data_len(),
            Entry::Kept(t) => t.bytes.len(),
        }
    }
}

/// Writes a safetensors file, and syncs it to disk: f64 tensors in f64, other floats in f32, integers in i64.
pub fn write(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    write_with(path, tensors, &[])
}

/// The same, with tensors that another file had.
pub(crate) fn write_with(path: &Path, tensors: Vec<(String, Tensor)>, kept: &[Raw]) -> Result<()> {
    let failed = RefCell::new(None);
    let made = tensors.into_iter().map(|(name, tensor)| (name, Entry::Made(Lazy { tensor, failed: &failed })));
    let entries = made.chain(kept.iter().map(|t| (t.name.clone(), Entry::Kept(t))));
    // the library that most people read these files with wants to be told whose they are
    let meta = HashMap::from([("format".to_string(), "pt".to_string())]);
    safetensors::serialize_to_file(entries, Some(meta), path).map_err(|e| match e {
        SafeTensorError::IoError(source) => Error::io(path)(source),
        e => Error::checkpoint(path, e.to_string()),
    })?;
    if let Some(e) = failed.take() {
        return Err(e.into());
    }
    std::fs::File::open(path).and_then(|f| f.sync_all()).map_err(Error::io(path))
}

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
