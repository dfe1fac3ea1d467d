//! Gradient checking by central differences: a tool for whoever writes an op.

use crate::{DType, Error, Grads, Result, Tensor, no_grad, rng};

/// What [`gradcheck`] found.
#[derive(Debug, Clone)]
pub struct GradCheck {
    /// Largest |autograd − numeric| / max(1, |numeric|) over all elements of all leaves.
    pub worst: f64,
    /// Which leaf and element that was.
    pub at: (usize, usize),
    /// The two values there: autograd, numeric.
    pub values: (f64, f64),
}

impl GradCheck {
    /// An error if `worst` exceeds `tolerance`.
    pub fn within(&self, tolerance: f64) -> Result<()> {
        if self.worst <= tolerance {
            return Ok(());
        }
        let (a, n) = self.values;
        Err(Error::invalid(
            "gradcheck",
            format!("leaf {} element {}: autograd {a:e}, numeric {n:e}, error {:e} > {tolerance:e}", self.at.0, self.at.1, self.worst),
        ))
    }
}

/// Compares autograd with central differences of step `eps` for a function of f64 tensors with any outputs (weighted by fixed random numbers into a scalar).
///
/// `f` gets the leaves in order. A step of 1e-5 leaves about 1e-9 of rounding and truncation error for functions of order 1.
pub fn gradcheck(f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>, leaves: &[Tensor], eps: f64) -> Result<GradCheck> {
    if let Some(t) = leaves.iter().find(|t| t.dtype() != DType::F64) {
        return Err(Error::dtype("gradcheck", "every leaf", DType::F64, t.dtype()));
    }
    let vars: Vec<Tensor> = leaves.iter().map(|t| t.detach().requires_grad()).collect();
    let grads = {
        let mut g = Grads::new();
        weigh(&f(&vars)?)?.backward_into(&mut g)?;
        g
    };
    let mut report = GradCheck { worst: 0.0, at: (0, 0), values: (0.0, 0.0) };
    for (l, leaf) in leaves.iter().enumerate() {
        let auto = match grads.get(&vars[l]) {
            Some(g) => g.to_vec::<f64>()?,
            None => vec![0.0; leaf.numel()],
        };
        let base = leaf.to_vec::<f64>()?;
        for (i, a) in auto.iter().enumerate() {
            let eval = |d: f64| -> Result<f64> {
                let mut v = base.clone();
                v[i] += d;
                let mut xs: Vec<Tensor> = leaves.iter().map(Tensor::detach).collect();
                xs[l] = Tensor::from_vec(v, leaf.shape())?;
                no_grad(|| weigh(&f(&xs)?)?.item())
            };
            let n = (eval(eps)? - eval(-eps)?) / (2.0 * eps);
            let e = (a - n).abs() / n.abs().max(1.0);
            if e > report.worst || e.is_nan() {
                report = GradCheck { worst: if e.is_nan() { f64::INFINITY } else { e }, at: (l, i), values: (*a, n) };
            }
        }
    }
    Ok(report)
}

/// A scalar of all float outputs: their sum, weighted by fixed random numbers.
pub(crate) fn weigh(ys: &[Tensor]) -> Result<Tensor> {
    let mut total: Option<Tensor> = None;
    for (i, y) in ys.iter().filter(|y| y.dtype().is_float()).enumerate() {
        let w = Tensor::from_vec(rng::normal(99, i as u64, y.numel()), y.shape())?.cast(y.dtype())?.to_device(y.device())?;
        let part = y.mul(&w)?.cast(DType::F64)?.sum_all()?;
        total = Some(match total {
            None => part,
            Some(t) => t.add(&part)?,
        });
    }
    total.ok_or_else(|| Error::invalid("gradcheck", "the function has no float output"))
}
