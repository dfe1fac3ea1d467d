//! The definition, composed of primitive ops.

use super::AdamW;
use engine::{Result, Tensor};

/// As [`super::adamw`], but returns the new parameter and moments.
pub fn adamw(op: AdamW, p: &Tensor, m: &Tensor, v: &Tensor, grad: &Tensor) -> Result<[Tensor; 3]> {
    let g = grad.affine(op.grad_scale, 0.0)?;
    let m = m.affine(op.beta1, 0.0)?.add(&g.affine(1.0 - op.beta1, 0.0)?)?;
    let v = v.affine(op.beta2, 0.0)?.add(&g.square()?.affine(1.0 - op.beta2, 0.0)?)?;
    let unbiased = |x: &Tensor, beta: f64| x.affine(1.0 / (1.0 - beta.powf(op.step as f64)), 0.0);
    let step = unbiased(&m, op.beta1)?.div(&unbiased(&v, op.beta2)?.sqrt()?.affine(1.0, op.eps)?)?;
    Ok([p.affine(1.0 - op.lr * op.weight_decay, 0.0)?.sub(&step.affine(op.lr, 0.0)?)?, m, v])
}

const THIRD: AdamW = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3, grad_scale: 0.5 };
engine::self_test!("adamw", [[1003], [1003], [1003], [1003]], |x| {
    let [p, m, v, g] = [0, 1, 2, 3].map(|i| x[i].detach());
    let v = v.square()?;
    let (p, m) = (p.affine(1.0, 0.0)?, m.affine(1.0, 0.0)?);
    super::adamw(THIRD, &p, &m, &v, &g)?;
    Ok(vec![p, m, v])
} => |x| {
    let [p, m, v, g] = [0, 1, 2, 3].map(|i| x[i].detach());
    Ok(adamw(THIRD, &p, &m, &v.square()?, &g)?.into())
});
engine::self_test!("sum_of_squares", [[1003]], |x| Ok(vec![super::sum_of_squares(&x[0].detach())?]) => |x| Ok(vec![x[0].detach().square()?.sum_all()?]));
