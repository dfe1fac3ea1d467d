//! The definition, composed of primitive ops: every expert on every token, weighted by a dense matrix of routing weights.

use super::Moe;
use crate::swiglu::reference::swiglu;
use engine::{Result, Tensor, no_grad};

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

/// As [`super::router_logits`].
pub fn router_logits(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let wide = crate::dtypes::sums(x.dtype());
    x.cast(wide)?.linear(&weight.cast(wide)?)
}

/// As [`super::add_shared`].
pub fn add_shared(y: &Tensor, s: &Tensor, gate: &Tensor) -> Result<Tensor> {
    y.add(&s.mul(&gate.sigmoid()?)?)
}

/// As [`super::load_balancing_loss`] for one layer's router: an expert is chosen by a token if fewer than `top_k` others are likelier.
pub fn load_balancing_loss(router_logits: &Tensor, top_k: usize) -> Result<Tensor> {
    let p = router_logits.softmax(1)?;
    let (n, e) = (p.dim(0), p.dim(1));
    let share = no_grad(|| -> Result<Tensor> {
        let values = p.to_vec::<f64>()?;
        let chosen = |i: usize| values[i / e * e..][..e].iter().filter(|x| **x > values[i]).count() < top_k;
        let share = (0..e).map(|j| (0..n).filter(|t| chosen(t * e + j)).count() as f64 / n as f64).collect::<Vec<_>>();
        Tensor::from_vec(share, &[e])?.cast(p.dtype())
    })?;
    p.mean(&[0], false)?.mul(&share)?.sum_all()?.affine(e as f64, 0.0)
}

/// As [`super::router_z_loss`] for one layer's router, whose log-sum-exp is a logit less its log-probability.
pub fn router_z_loss(router_logits: &Tensor) -> Result<Tensor> {
    let lse = router_logits.sub(&router_logits.log_softmax(1)?)?.narrow(1, 0, 1)?;
    lse.square()?.mean(&[0, 1], false)
}

const TOP2: Moe = Moe { top_k: 2, norm_topk: true };
engine::self_test!("moe", [[77, 40], [77, 6], [6, 34, 40], [6, 40, 17]], |x| {
    let (y, counts) = super::moe(TOP2, &x[0], &x[1], &x[2], &x[3])?;
    Ok(vec![y, counts.cast(x[0].dtype())?])
} => |x| {
    let (_, chosen) = x[1].detach().topk(2)?;
    let counts = Tensor::ones(&[77, 2], x[0].dtype(), x[0].device())?.scatter_add(1, &chosen, 6)?.sum(&[0], false)?;
    Ok(vec![moe(TOP2, &x[0], &x[1], &x[2], &x[3])?, counts])
});
engine::self_test!("router_logits", [[77, 40], [6, 40]],
    |x| Ok(vec![super::router_logits(&x[0], &x[1])?]) => |x| Ok(vec![router_logits(&x[0], &x[1])?]));
engine::self_test!("add_shared", [[77, 40], [77, 40], [77, 1]],
    |x| Ok(vec![super::add_shared(&x[0], &x[1], &x[2])?]) => |x| Ok(vec![add_shared(&x[0], &x[1], &x[2])?]));
engine::self_test!("load_balancing_loss", [[77, 6]],
    |x| Ok(vec![super::load_balancing_loss(&[&x[0]], 2)?]) => |x| Ok(vec![load_balancing_loss(&x[0], 2)?]));
engine::self_test!("router_z_loss", [[77, 6]], |x| Ok(vec![super::router_z_loss(&[&x[0]])?]) => |x| Ok(vec![router_z_loss(&x[0])?]));
