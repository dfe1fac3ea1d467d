//! Writing: each tensor's bytes are made when their turn comes.

use crate::{Error, Result};
use engine::half::{bf16, f16};
use engine::{DType, Element, Tensor};
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, TensorView, View};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

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
pub(crate) enum Entry<'a> {
    /// A tensor, floats in a dtype.
    Made(Tensor, Dtype),
    /// As another file had it.
    Kept(&'a Raw),
}

impl Entry<'_> {
    /// Integers are kept in i64; floats in `floats`, if that is given, else in f64 what is in f64, and all others in f32.
    pub fn made(tensor: Tensor, floats: Option<DType>) -> Self {
        let dtype = match (tensor.dtype().is_float(), floats.unwrap_or(tensor.dtype())) {
            (false, _) => Dtype::I64,
            (_, DType::F64) => Dtype::F64,
            (_, DType::BF16) if floats.is_some() => Dtype::BF16,
            (_, DType::F16) if floats.is_some() => Dtype::F16,
            _ => Dtype::F32,
        };
        Entry::Made(tensor, dtype)
    }
    /// Its elements.
    pub fn numel(&self) -> u64 {
        match self {
            Entry::Made(t, _) => t.numel() as u64,
            Entry::Kept(t) => t.shape.iter().product::<usize>() as u64,
        }
    }
    /// Its length in a file.
    pub fn bytes(&self) -> u64 {
        match self {
            Entry::Made(_, dtype) => self.numel() * dtype.bitsize() as u64 / 8,
            Entry::Kept(t) => t.bytes.len() as u64,
        }
    }
}

/// An entry while it is written.
struct Writing<'a> {
    name: &'a str,
    entry: &'a Entry<'a>,
    state: &'a State<'a>,
}

struct State<'a> {
    failed: RefCell<Option<Error>>,
    written: &'a dyn Fn(u64),
}

impl View for Writing<'_> {
    fn dtype(&self) -> Dtype {
        match self.entry {
            Entry::Made(_, dtype) => *dtype,
            Entry::Kept(t) => t.dtype,
        }
    }
    fn shape(&self) -> &[usize] {
        match self.entry {
            Entry::Made(t, _) => t.shape(),
            Entry::Kept(t) => &t.shape,
        }
    }
    fn data(&self) -> Cow<'_, [u8]> {
        let bytes = match self.entry {
            Entry::Made(t, dtype) => Cow::Owned(bytes(self.name, t, *dtype).unwrap_or_else(|e| {
                self.state.failed.borrow_mut().get_or_insert(e);
                vec![0; self.data_len()]
            })),
            Entry::Kept(t) => Cow::Borrowed(&t.bytes[..]),
        };
        (self.state.written)(bytes.len() as u64);
        bytes
    }
    fn data_len(&self) -> usize {
        self.entry.bytes() as usize
    }
}

fn bytes(name: &str, t: &Tensor, dtype: Dtype) -> Result<Vec<u8>> {
    Ok(match dtype {
        Dtype::F64 => t.to_vec::<f64>()?.into_iter().flat_map(f64::to_le_bytes).collect(),
        Dtype::I64 => t.to_vec::<i64>()?.into_iter().flat_map(i64::to_le_bytes).collect(),
        Dtype::BF16 => narrowed(name, t, bf16::to_le_bytes)?,
        Dtype::F16 => narrowed(name, t, f16::to_le_bytes)?,
        _ => t.to_vec::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
    })
}

/// Rounded to the nearest, ties to even; an error for a number that is too large.
fn narrowed<T: Element>(name: &str, t: &Tensor, bytes: impl Fn(T) -> [u8; 2]) -> Result<Vec<u8>> {
    let round = |x: f64| match T::from_f64(x) {
        y if y.to_f64().is_infinite() && x.is_finite() => {
            Err(Error::Usage(format!("`{name}` holds {x:e}, which is too large for {}; save in a wider dtype", T::DTYPE)))
        }
        y => Ok(bytes(y)),
    };
    let all: Vec<[u8; 2]> = match t.dtype() {
        DType::F64 => t.to_vec::<f64>()?.into_iter().map(round).collect::<Result<_>>()?,
        _ => t.to_vec::<f32>()?.into_iter().map(|x| round(x.into())).collect::<Result<_>>()?,
    };
    Ok(all.concat())
}

/// Writes a safetensors file, and syncs it to disk: f64 tensors in f64, other floats in f32, integers in i64.
pub fn write(path: &Path, tensors: Vec<(String, Tensor)>) -> Result<()> {
    let entries: Vec<_> = tensors.into_iter().map(|(name, t)| (name, Entry::made(t, None))).collect();
    write_entries(path, &entries, &|_| ())
}

/// The same of entries; `written` is told of each tensor's bytes.
pub(crate) fn write_entries(path: &Path, entries: &[(String, Entry)], written: &dyn Fn(u64)) -> Result<()> {
    // the library that most people read these files with wants to be told whose they are
    write_with(path, entries, written, HashMap::from([("format".to_string(), "pt".to_string())]))
}

/// The same with metadata.
pub(crate) fn write_with(path: &Path, entries: &[(String, Entry)], written: &dyn Fn(u64), meta: HashMap<String, String>) -> Result<()> {
    let state = State { failed: RefCell::new(None), written };
    // the library would have it for the owner's eyes alone
    let mode = std::fs::File::create(path).and_then(|f| f.metadata()).map_err(Error::io(path))?.permissions();
    let views = entries.iter().map(|(name, entry)| (name, Writing { name, entry, state: &state }));
    safetensors::serialize_to_file(views, Some(meta), path).map_err(|e| match e {
        SafeTensorError::IoError(source) => Error::io(path)(source),
        e => Error::checkpoint(path, e.to_string()),
    })?;
    if let Some(e) = state.failed.take() {
        return Err(e);
    }
    std::fs::set_permissions(path, mode).and_then(|()| std::fs::File::open(path)?.sync_all()).map_err(Error::io(path))
}
