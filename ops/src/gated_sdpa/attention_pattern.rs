//! Softmax probabilities on demand: what the fused kernel never forms, for those who want to look at it.

use super::{Attention, check_packed, check_qk};
use crate::dtypes::sums;
use engine::{Meta, Op, Result, Tensor, Want, run1};
use std::ops::RangeInclusive;

/// The attention pattern `softmax(scale·q kᵀ + mask)`, `[B, H, T, S]`, for `q [B, T, H, D]`, `k [B, S, Hkv, D]` and the masks of
/// [`gated_sdpa`](super::gated_sdpa). In f32 (f64 for f64). Needs memory for all of it, and has no backward.
pub fn attention_pattern(q: &Tensor, k: &Tensor, cu_seqlens: Option<&Tensor>, attention: Attention) -> Result<Tensor> {
    let mut x = vec![q, k];
    x.extend(cu_seqlens);
    run1(AttentionPattern { attention, packed: cu_seqlens.is_some() }, &x)
}

/// The op behind [`attention_pattern`]: inputs q, k, then `cu_seqlens` if packed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionPattern {
    /// Mask and scale.
    pub attention: Attention,
    /// Whether `cu_seqlens` is given.
    pub packed: bool,
}

const NAME: &str = "attention_pattern";

impl Op for AttentionPattern {
    fn name(&self) -> &'static str {
        NAME
    }
    fn arity(&self) -> RangeInclusive<usize> {
        let n = 2 + self.packed as usize;
        n..=n
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let [b, t, s, h, _, _] = check_qk(NAME, &self.attention, &x[0], &x[1])?;
        if self.packed {
            crate::documents::check_meta(NAME, &x[2], b)?;
            check_packed(NAME, t, s)?;
        }
        Ok(vec![Meta::new(&[b, h, t, s], sums(x[0].dtype))])
    }
    fn want(&self, i: usize) -> Want {
        if i == 2 { Want::Contiguous } else { Want::LastDimDense }
    }
    fn differentiable(&self) -> bool {
        false
    }
}
