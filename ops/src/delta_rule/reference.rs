//! The definition, token by token, composed of primitive ops.

use super::{DeltaRule, DeltaRuleInputs, L2_EPS};
use engine::{Result, Tensor};

/// As [`super::delta_rule`]: o and the final states. Slow, differentiable, in the dtype of its inputs.
pub fn delta_rule(op: DeltaRule, q: &Tensor, k: &Tensor, v: &Tensor, x: DeltaRuleInputs) -> Result<(Tensor, Tensor)> {
    let (b, t, hk, dk) = (q.dim(0), q.dim(1), q.dim(2), q.dim(3));
    let (hv, dv) = (v.dim(2), v.dim(3));
    let heads = |x: &Tensor| -> Result<Tensor> {
        let x = if op.qk_l2norm { x.mul(&x.square()?.sum(&[3], true)?.affine(1.0, L2_EPS)?.rsqrt()?)? } else { x.clone() };
        x.reshape(&[b, t, hk, 1, dk])?.expand(&[b, t, hk, hv / hk, dk])?.reshape(&[b, t, hv, dk])
    };
    let (q, k) = (heads(q)?, heads(k)?);
    let documents: Vec<(usize, usize)> = match x.cu_seqlens {
        Some(cu) => cu.to_vec::<i64>()?.windows(2).map(|w| (w[0] as usize, w[1] as usize)).collect(),
        None => vec![(0, t)],
    };
    let (mut os, mut states) = (vec![], vec![]);
    for (d, (from, to)) in documents.into_iter().enumerate() {
        let mut s = match x.initial_state {
            Some(h) => h.narrow(0, if b == 1 { d } else { 0 }, b)?,
            None => Tensor::zeros(&[b, hv, dk, dv], v.dtype(), v.device())?,
        };
        for i in from..to {
            let row = |x: &Tensor, shape: &[usize]| x.narrow(1, i, 1)?.reshape(shape);
            let (qi, ki) = (row(&q, &[b, hv, dk, 1])?, row(&k, &[b, hv, dk, 1])?);
            if let Some(g) = x.log_decay {
                s = s.mul(&row(g, &[b, hv, 1, 1])?.exp()?)?;
            }
            let mut write = row(v, &[b, hv, 1, dv])?;
            if op.erase {
                write = write.sub(&ki.mul(&s)?.sum(&[2], true)?)?;
            }
            if let Some(beta) = x.beta {
                write = write.mul(&row(beta, &[b, hv, 1, 1])?)?;
            }
            s = s.add(&ki.mul(&write)?)?;
            let o = qi.mul(&s)?.sum(&[2], false)?;
            os.push(o.affine(op.scale.unwrap_or((dk as f64).powf(-0.5)), 0.0)?.reshape(&[b, 1, hv, dv])?);
        }
        states.push(s);
    }
    Ok((Tensor::cat(&os.iter().collect::<Vec<_>>(), 1)?, Tensor::cat(&states.iter().collect::<Vec<_>>(), 0)?))
}
