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
/// A copy in the dtype of masters and moments.
fn master(x: &Tensor) -> Result<Tensor> {
    x.cast(crate::dtypes::sums(x.dtype()))?.affine(1.0, 0.0)
}
engine::self_test!("adamw", [[1003], [1003], [1003], [1003]], |x| {
    let [p, m, v, g] = [0, 1, 2, 3].map(|i| x[i].detach());
    let (p, m, v) = (master(&p)?, master(&m)?, master(&v)?.square()?);
    super::adamw(THIRD, &p, &m, &v, &g)?;
    Ok(vec![p, m, v])
} => |x| {
    let [p, m, v, g] = [0, 1, 2, 3].map(|i| x[i].detach());
    Ok(adamw(THIRD, &p, &m, &v.square()?, &g)?.into())
});
engine::self_test!("sum_of_squares", [[1003]], |x| Ok(vec![super::sum_of_squares(&x[0].detach())?]) => |x| Ok(vec![x[0].detach().square()?.sum_all()?]));

/// (decay, parameter, gradient) of two tensors, and the schedule of the third step.
type Two = [(f64, Tensor, Tensor); 2];
fn two(x: &[Tensor]) -> Result<Two> {
    Ok([(0.1, master(&x[0].detach())?, x[1].detach()), (0.0, master(&x[2].detach())?, x[3].detach())])
}
engine::self_test!("adamw_many", [[1003], [1003], [37, 5], [37, 5]], |x| {
    let [a, b] = two(x)?;
    let zeros = |t: &Tensor| t.affine(0.0, 0.0);
    let (m, v) = ([zeros(&a.1)?, zeros(&b.1)?], [zeros(&a.1)?, zeros(&b.1)?]);
    let (norm, coefficient) = super::global_norm(super::GlobalNorm { max_norm: 1.0, scale: 0.5 }, &[&a.2, &b.2])?;
    let op = super::AdamWMany { beta1: THIRD.beta1, beta2: THIRD.beta2, eps: THIRD.eps, weight_decay: vec![a.0, b.0], shadows: false };
    let schedule = op.schedule(THIRD.lr, THIRD.step, a.1.device())?;
    super::adamw_many(op, &[&a.1, &b.1], &[&m[0], &m[1]], &[&v[0], &v[1]], &[], &schedule, &coefficient, &[&a.2, &b.2])?;
    let ([m0, m1], [v0, v1]) = (m, v);
    Ok(vec![norm, a.1, b.1, m0, m1, v0, v1])
} => |x| {
    let two = two(x)?;
    let square: f64 = two.iter().map(|(_, _, g)| g.square()?.sum_all()?.item()).sum::<Result<f64>>()?;
    let norm = 0.5 * square.sqrt();
    let zeros = |t: &Tensor| t.affine(0.0, 0.0);
    let mut all = [vec![Tensor::from_vec([norm], &[])?], vec![], vec![]];
    for (decay, p, g) in two {
        let op = AdamW { weight_decay: decay, grad_scale: 0.5 * 1.0 / (norm + 1e-6), ..THIRD };
        all.iter_mut().zip(adamw(op, &p, &zeros(&p)?, &zeros(&p)?, &g)?).for_each(|(all, t)| all.push(t));
    }
    Ok(all.concat())
});
