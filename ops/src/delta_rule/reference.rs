//! The definition, token by token, composed of primitive ops.

use super::{DeltaRule, DeltaRuleInputs, L2_EPS};
use engine::{DType, Result, Tensor};

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

type Rule = fn(DeltaRule, &Tensor, &Tensor, &Tensor, DeltaRuleInputs) -> Result<(Tensor, Tensor)>;

/// q, k, v and the logits of decay and β, then perhaps the initial states.
fn case(rule: Rule, x: &[Tensor], cu_seqlens: Option<&Tensor>) -> Result<Vec<Tensor>> {
    let wide = |x: &Tensor| x.cast(if x.dtype() == DType::F64 { DType::F64 } else { DType::F32 });
    let (log_decay, beta) = (wide(&x[3].softplus()?.neg()?)?, x[4].sigmoid()?);
    let op = DeltaRule::gated_delta_net();
    let state = x.get(5).map(wide).transpose()?;
    let ins = DeltaRuleInputs { log_decay: Some(&log_decay), beta: Some(&beta), initial_state: state.as_ref(), cu_seqlens };
    let (o, state) = rule(op, &x[0], &x[1], &x[2], ins)?;
    Ok(vec![o, state])
}

fn cu(x: &Tensor) -> Result<Tensor> {
    Tensor::from_vec([0i64, 66, 67, 150], &[4])?.to_device(x.device())
}
engine::self_test!("delta_rule", [[2, 75, 2, 32], [2, 75, 2, 32], [2, 75, 4, 24], [2, 75, 4], [2, 75, 4], [2, 4, 32, 24]],
    |x| case(super::delta_rule, x, None) => |x| case(delta_rule, x, None));
engine::self_test!("delta_rule packed", [[1, 150, 2, 32], [1, 150, 2, 32], [1, 150, 4, 24], [1, 150, 4], [1, 150, 4], [3, 4, 32, 24]],
    |x| case(super::delta_rule, x, Some(&cu(&x[0])?)) => |x| case(delta_rule, x, Some(&cu(&x[0])?)));
engine::self_test!("delta_rule of one token", [[2, 1, 2, 32], [2, 1, 2, 32], [2, 1, 4, 24], [2, 1, 4], [2, 1, 4], [2, 4, 32, 24]],
    |x| case(super::delta_rule, x, None) => |x| case(delta_rule, x, None));
