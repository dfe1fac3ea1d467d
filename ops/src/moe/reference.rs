//! The definition, composed of primitive ops: every expert on every token, weighted by a dense matrix of routing weights.

use super::Moe;
use crate::swiglu::reference::swiglu;
use engine::{Result, Tensor};

/// As [`super::moe`], without the counts.
pub fn moe(op: Moe, x: &Tensor, router_logits: &Tensor, gate_up_proj: &Tensor, down_proj: &Tensor) -> Result<Tensor> {
    let (vals, idx) = router_logits.softmax(1)?.topk(op.top_k)?;
    let vals = if op.norm_topk { vals.div(&vals.sum(&[1], true)?)? } else { vals };
    let dense = vals.scatter_add(1, &idx, router_logits.dim(1))?;
    let mut y = x.affine(0.0, 0.0)?;
    for e in 0..router_logits.dim(1) {
        let pick = |w: &Tensor| w.narrow(0, e, 1)?.reshape(&w.shape()[1..]);
        let out = swiglu(&x.linear(&pick(gate_up_proj)?)?)?.linear(&pick(down_proj)?)?;
        y = y.add(&out.mul(&dense.narrow(1, e, 1)?)?)?;
    }
    Ok(y)
}

const TOP2: Moe = Moe { top_k: 2, norm_topk: true };
engine::self_test!("moe", [[77, 40], [77, 6], [6, 34, 40], [6, 40, 17]],
    |x| Ok(vec![super::moe(TOP2, &x[0], &x[1], &x[2], &x[3])?.0]) => |x| Ok(vec![moe(TOP2, &x[0], &x[1], &x[2], &x[3])?]));
