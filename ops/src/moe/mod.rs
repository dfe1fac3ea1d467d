//! A mixture of SwiGLU experts with top-k routing and no dropped tokens, as Qwen3-Next has it: softmax over all experts, the k largest, renormalised;
//! tokens sorted by expert, one matrix product per expert and projection, and a weighted sum back.

mod cpu;
mod cuda;
mod losses;
pub mod reference;
mod router;
mod shared;
#[cfg(test)]
mod tests;

pub use losses::{load_balancing_loss, router_z_loss};
pub use router::router_logits;
pub use shared::add_shared;

use engine::{DType, Error, Meta, Op, Result, Saved, Tensor, run};
use std::ops::RangeInclusive;

/// Attributes of a call.
#[derive(Debug, Clone, Copy)]
pub struct Moe {
    /// Experts per token.
    pub top_k: usize,
    /// Divide the k weights by their sum.
    pub norm_topk: bool,
}

/// (N, H, E, I)
pub(crate) fn sizes(x: &[usize], gate_up: &[usize]) -> (usize, usize, usize, usize) {
    (x[0], x[1], gate_up[0], gate_up[1] / 2)
}

/// Inputs: x, router logits, both weights as they are kept, both in x's dtype.
impl Op for Moe {
    fn name(&self) -> &'static str {
        "moe"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        6..=6
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let op = "moe";
        let [n, h] = x[0].shape[..] else { return Err(Error::shape(op, "x", "[tokens, hidden]", &x[0].shape)) };
        let [e, i2, hh] = x[2].shape[..] else { return Err(Error::shape(op, "gate_up_proj", "[experts, 2I, hidden]", &x[2].shape)) };
        if hh != h || i2 % 2 != 0 {
            return Err(Error::shape(op, "gate_up_proj", format!("[experts, 2I, {h}]"), &x[2].shape));
        }
        if x[3].shape != [e, h, i2 / 2] {
            return Err(Error::shape(op, "down_proj", format!("[{e}, {h}, {}]", i2 / 2), &x[3].shape));
        }
        if x[1].shape != [n, e] {
            return Err(Error::shape(op, "router_logits", format!("[{n}, {e}]"), &x[1].shape));
        }
        if self.top_k == 0 || self.top_k > e {
            return Err(Error::invalid(op, format!("top_k must be from 1 to the {e} experts, found {}", self.top_k)));
        }
        for (m, name) in x.iter().zip(["x", "router_logits", "gate_up_proj", "down_proj"]) {
            if !x[0].dtype.is_float() {
                return Err(Error::dtype(op, "x", "a float dtype", x[0].dtype));
            }
            crate::dtypes::beside(op, name, x[0].dtype, m.dtype)?;
        }
        for (copy, of) in x[4..].iter().zip(&x[2..]) {
            if copy.dtype != x[0].dtype || copy.shape != of.shape {
                return Err(Error::dtype(op, "a weight's copy", format!("{}, as x, and of the weight's shape", x[0].dtype), copy.dtype));
            }
        }
        let hidden = Meta::new(&[n * self.top_k, i2], crate::dtypes::sums(x[0].dtype));
        Ok(vec![x[0].clone(), Meta::new(&[e], DType::I64), hidden])
    }
    // the projections before the activation: a third of the products would have to be done again without them
    fn hidden(&self) -> usize {
        1
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![0, 1, 2, 3, 4, 5], vec![2])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None; 6]) };
        let kept = [s.input(2)?.dtype(), s.input(3)?.dtype()];
        let g = run(MoeBackward(*self, kept), &[s.input(0)?, s.input(1)?, s.input(4)?, s.input(5)?, s.output(2)?, dy])?;
        Ok(g.into_iter().map(Some).chain([None, None]).collect())
    }
}

/// Gradients of x, router logits, gate_up_proj and down_proj, of which the last two have the dtypes that are named; inputs: the forward's in x's dtype, the
/// saved projections, dy.
#[derive(Debug, Clone, Copy)]
pub struct MoeBackward(pub(crate) Moe, pub(crate) [DType; 2]);

impl Op for MoeBackward {
    fn name(&self) -> &'static str {
        "moe_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        6..=6
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let weight = |i: usize| Meta::new(&x[2 + i].shape, self.1[i]);
        Ok(vec![x[0].clone(), x[1].clone(), weight(0), weight(1)])
    }
}

/// x `[N, H]`, router logits `[N, E]`, `gate_up_proj [E, 2I, H]` (gate rows first), `down_proj [E, H, I]`.
/// Returns y `[N, H]` and how many tokens each expert got (i64 `[E]`). Routing is in f32 (f64 for f64). Weights in f32 beside x in bf16 or f16 are brought to
/// x's dtype, and their gradients are the products' f32 sums.
pub fn moe(op: Moe, x: &Tensor, router_logits: &Tensor, gate_up_proj: &Tensor, down_proj: &Tensor) -> Result<(Tensor, Tensor)> {
    let copies = [gate_up_proj.detach().cast(x.dtype())?, down_proj.detach().cast(x.dtype())?];
    let mut v = run(op, &[x, router_logits, gate_up_proj, down_proj, &copies[0], &copies[1]])?;
    let counts = v.remove(1);
    Ok((v.remove(0), counts))
}
