//! Causal depthwise convolution over time with SiLU, as it stands before Gated DeltaNet's q, k and v (2412.06464 §3.4):
//! `y[t, c] = act(Σ_j w[c, j] · x[t − K + 1 + j, c])`. It carries a state of the last K − 1 inputs, and does not reach across documents.

mod cpu;
mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

use engine::{Error, Meta, Op, Result, Saved, Tensor, Want, run};
use std::ops::RangeInclusive;

/// The op; see [`short_conv`].
#[derive(Debug, Clone, Copy)]
pub struct ShortConv {
    /// SiLU after the convolution.
    pub silu: bool,
    /// A third input: the state `[B, K−1, C]`.
    pub state: bool,
    /// A last input: `cu_seqlens [n+1]`.
    pub packed: bool,
}

impl ShortConv {
    fn inputs(&self) -> usize {
        2 + self.state as usize + self.packed as usize
    }
}

/// (B, T, C, K) of a call.
fn sizes(x: &[usize], w: &[usize]) -> (usize, usize, usize, usize) {
    (x[0], x[1], x[2..].iter().product(), *w.last().unwrap_or(&1))
}

impl Op for ShortConv {
    fn name(&self) -> &'static str {
        "short_conv"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        self.inputs()..=self.inputs()
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let op = "short_conv";
        if !matches!(x[0].shape.len(), 3 | 4) {
            return Err(Error::shape(op, "x", "[B, T, C] or [B, T, H, D]", &x[0].shape));
        }
        if !x[0].dtype.is_float() {
            return Err(Error::dtype(op, "x", "a float dtype", x[0].dtype));
        }
        let (b, _, c, k) = sizes(&x[0].shape, &x[1].shape);
        if (x[1].shape != [c, 1, k] && x[1].shape != [c, k]) || k == 0 {
            return Err(Error::shape(op, "weight", format!("[{c}, 1, K] or [{c}, K]"), &x[1].shape));
        }
        crate::dtypes::beside(op, "weight", x[0].dtype, x[1].dtype)?;
        let state = Meta::new(&[b, k - 1, c], crate::dtypes::sums(x[0].dtype));
        if self.state && x[2] != state {
            return Err(Error::invalid(op, format!("state must be {state}, found {}", x[2])));
        }
        if self.state && self.packed {
            return Err(Error::invalid(op, "packed documents start from nothing, so a state cannot be given with cu_seqlens"));
        }
        if self.packed {
            crate::documents::check_meta(op, &x[x.len() - 1], b)?;
        }
        Ok(vec![x[0].clone(), state])
    }
    fn want(&self, i: usize) -> Want {
        if i == 0 { Want::LastDimDense } else { Want::Contiguous }
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        ((0..self.inputs()).collect(), vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let x = s.meta(0);
        let zeros = |m: &Meta| {
            Tensor::zeros(&m.shape, m.dtype, dy.iter().flatten().next().map(|t| t.device().clone()).as_ref().unwrap_or(&engine::Device::cpu()))
        };
        if dy.iter().all(Option::is_none) {
            return Ok(vec![None; need.len()]);
        }
        let g = match &dy[0] {
            Some(g) => g.clone(),
            None => zeros(x)?,
        };
        let mut ins: Vec<&Tensor> = (0..self.inputs()).map(|i| s.input(i)).collect::<Result<_>>()?;
        ins.push(&g);
        ins.extend(dy[1].as_ref());
        let mut v = run(ShortConvBackward { conv: *self, state_grad: dy[1].is_some() }, &ins)?.into_iter();
        let mut out = vec![v.next(), v.next()];
        if self.state {
            out.push(v.next());
        }
        out.resize(need.len(), None);
        Ok(out)
    }
}

/// Gradient: the forward's inputs, dy, and the final state's gradient if there is one. Outputs dx, dw, and dstate if a state was given.
#[derive(Debug, Clone, Copy)]
pub struct ShortConvBackward {
    conv: ShortConv,
    state_grad: bool,
}

impl Op for ShortConvBackward {
    fn name(&self) -> &'static str {
        "short_conv_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        let n = self.conv.inputs() + 1 + self.state_grad as usize;
        n..=n
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let mut y = vec![x[0].clone(), x[1].clone()];
        if self.conv.state {
            y.push(x[2].clone());
        }
        Ok(y)
    }
    fn want(&self, i: usize) -> Want {
        if i == 0 { Want::LastDimDense } else { Want::Contiguous }
    }
}

/// Causal depthwise convolution, then SiLU if `silu`. x `[B, T, C]` or `[B, T, H, D]` with C = H·D (a strided view is fine if its last axis is dense),
/// weight `[C, 1, K]` or `[C, K]`, state `[B, K−1, C]` (f32; f64 for f64) holds the inputs before the first.
/// `cu_seqlens [n+1]` (i32 or i64, B = 1) marks documents that do not see each other. Returns y (shape and dtype of x) and the final state.
pub fn short_conv(x: &Tensor, weight: &Tensor, silu: bool, state: Option<&Tensor>, cu_seqlens: Option<&Tensor>) -> Result<(Tensor, Tensor)> {
    let op = ShortConv { silu, state: state.is_some(), packed: cu_seqlens.is_some() };
    let ins: Vec<&Tensor> = [x, weight].into_iter().chain(state).chain(cu_seqlens).collect();
    let mut v = run(op, &ins)?;
    let last = v.remove(1);
    Ok((v.remove(0), last))
}
