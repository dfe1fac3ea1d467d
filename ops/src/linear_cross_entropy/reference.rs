//! The definition, composed of primitive ops: it holds all logits.

use super::IGNORE;
use engine::{Result, Tensor};

/// As [`super::linear_cross_entropy`].
pub fn linear_cross_entropy(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log_p = x.linear(weight)?.log_softmax(1)?;
    let targets = targets.to_vec::<i64>()?;
    let (rows, picks): (Vec<i64>, Vec<i64>) = targets.iter().enumerate().filter(|(_, t)| **t != IGNORE).map(|(i, t)| (i as i64, *t)).unzip();
    let n = rows.len();
    let rows = log_p.index_select(0, &Tensor::from_vec(rows, &[n])?)?;
    rows.gather(1, &Tensor::from_vec(picks, &[n, 1])?)?.mean(&[0, 1], false)?.neg()
}

/// As [`super::linear_cross_entropy_per_token`].
pub fn linear_cross_entropy_per_token(x: &Tensor, weight: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let log_p = x.linear(weight)?.log_softmax(1)?;
    let targets = targets.to_vec::<i64>()?;
    let n = targets.len();
    let counts: Vec<f64> = targets.iter().map(|t| if *t == IGNORE { 0.0 } else { -1.0 }).collect();
    let picks: Vec<i64> = targets.into_iter().map(|t| t.max(0)).collect();
    log_p.gather(1, &Tensor::from_vec(picks, &[n, 1])?)?.reshape(&[n])?.mul(&Tensor::from_vec(counts, &[n])?.cast(x.dtype())?)
}

fn targets(x: &Tensor) -> Result<Tensor> {
    let t: Vec<i64> = (0..37).map(|i| if i % 5 == 0 { IGNORE } else { i * 11 % 70 }).collect();
    Tensor::from_vec(t, &[37])?.to_device(x.device())
}
engine::self_test!("linear_cross_entropy", [[37, 40], [70, 40]],
    |x| Ok(vec![super::linear_cross_entropy(&x[0], &x[1], &targets(&x[0])?)?]) => |x| Ok(vec![linear_cross_entropy(&x[0], &x[1], &targets(&x[0])?)?]));
engine::self_test!("linear_cross_entropy per token", [[37, 40], [70, 40]],
    |x| Ok(vec![super::linear_cross_entropy_per_token(&x[0].detach(), &x[1].detach(), &targets(&x[0])?)?])
    => |x| Ok(vec![linear_cross_entropy_per_token(&x[0].detach(), &x[1].detach(), &targets(&x[0])?)?]));
