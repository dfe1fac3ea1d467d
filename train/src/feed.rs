//! A batch as a network reads it: tensors on its device.

use crate::Result;
use crate::data::Batch;
use engine::{Device, Tensor};

/// Tokens and what should follow them.
#[derive(Clone, Debug)]
pub struct Feed {
    /// `[rows, time]`, u32.
    pub tokens: Tensor,
    /// `[rows · time]`, i64.
    pub targets: Tensor,
    /// Bounds of the documents that a single row packs, i64; none for plain windows.
    pub cu_seqlens: Option<Tensor>,
}

impl Feed {
    /// The tensors of a batch. Of `cu_seqlens` there are at least `bounds`: the last is repeated, which is documents of no token.
    pub fn new(batch: &Batch, device: &Device, bounds: usize) -> Result<Feed> {
        let wide = |v: &[u32]| v.iter().map(|t| i64::from(*t)).collect::<Vec<_>>();
        let bounds = |cu: &Vec<u32>| {
            let mut cu = wide(cu);
            cu.resize(cu.len().max(bounds), cu.last().copied().unwrap_or(0));
            Tensor::from_slice(&cu, &[cu.len()], device)
        };
        Ok(Feed {
            tokens: Tensor::from_slice(&batch.tokens, &[batch.rows, batch.time], device)?,
            targets: Tensor::from_slice(&batch.targets, &[batch.targets.len()], device)?,
            cu_seqlens: batch.cu_seqlens.as_ref().map(bounds).transpose()?,
        })
    }
    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.tokens, &self.targets].into_iter().chain(&self.cu_seqlens)
    }
    /// Whether another's tensors are of the same shapes.
    pub fn is_like(&self, other: &Feed) -> bool {
        self.tensors().map(Tensor::shape).eq(other.tensors().map(Tensor::shape))
    }
    /// Takes over another's values, in place.
    pub fn assign(&self, other: &Feed) -> Result<()> {
        self.tensors().zip(other.tensors()).try_for_each(|(to, from)| to.assign(from)).map_err(Into::into)
    }
}
