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
