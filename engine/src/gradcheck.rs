//! Gradient checking by central differences: a tool for whoever writes an op.

use crate::{DType, Error, Grads, Result, Tensor, no_grad, rng};

/// An element counts as at least this part of its leaf's largest: what cancels to almost nothing beside it has fewer right digits.
const SMALL: f64 = 1e-3;
/// Gradients count as at least this large. Central differences of functions of order 1 in f64 know them to about 1e-12, and a gradient that is zero is
/// nothing to divide by.
const ZERO: f64 = 1e-5;
/// Differences with one step and with twice that agree to this part where the function is smooth.
const SMOOTH: f64 = 1e-7;

/// What [`gradcheck`] found.
#[derive(Debug, Clone)]
pub struct GradCheck {
    /// Largest |autograd − numeric| / max(|numeric|, 10⁻³ · largest |numeric| of the leaf, 10⁻⁵) over all elements of all leaves. A bound on it bounds
    /// each leaf's RMS(autograd − numeric) / RMS(numeric) as well.
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
            format!("leaf {} element {}: autograd {a:e}, numeric {n:e}, relative error {:e} > {tolerance:e}", self.at.0, self.at.1, self.worst),
        ))
    }
}

/// Compares autograd with central differences for a function of f64 tensors with any outputs (weighted by fixed random numbers into a scalar).
///
/// `f` gets the leaves in order. The differences are Richardson's, of fourth order, with steps of 10 `eps`; an element whose neighbourhood turns out not
/// to be smooth (a kink of `relu`, another choice of `topk`) is tried with steps of `eps` and `eps` / 10. With `eps` = 1e-5 and values of order 1 they are
/// right to about 1e-12.
///
/// Errors: a leaf that is not f64, a function without float output, and what `f` itself returns.
pub fn gradcheck(f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>, leaves: &[Tensor], eps: f64) -> Result<GradCheck> {
    if let Some(t) = leaves.iter().find(|t| t.dtype() != DType::F64) {
        return Err(Error::dtype("gradcheck", "every leaf", DType::F64, t.dtype()));
    }
    let vars: Vec<Tensor> = leaves.iter().map(|t| t.detach().requires_grad()).collect();
    let ys = f(&vars)?;
    let weights = ys.iter().filter(|y| y.dtype().is_float()).enumerate().map(|(i, y)| weight(i, y)?.to_vec()).collect::<Result<Vec<Vec<f64>>>>()?;
    let weights = weights.concat();
    let mut grads = Grads::new();
    weigh(&ys)?.backward_into(&mut grads)?;
    let mut report = GradCheck { worst: 0.0, at: (0, 0), values: (0.0, 0.0) };
    for (l, leaf) in leaves.iter().enumerate() {
        let auto = match grads.get(&vars[l]) {
            Some(g) => g.to_vec::<f64>()?,
            None => vec![0.0; leaf.numel()],
        };
        let base = leaf.to_vec::<f64>()?;
        let outputs = |i: usize, d: f64| -> Result<Vec<f64>> {
            let mut v = base.clone();
            v[i] += d;
            let mut xs: Vec<Tensor> = leaves.iter().map(Tensor::detach).collect();
            xs[l] = Tensor::from_vec(v, leaf.shape())?;
            let ys = no_grad(|| f(&xs))?;
            Ok(ys.iter().filter(|y| y.dtype().is_float()).map(Tensor::to_vec::<f64>).collect::<Result<Vec<_>>>()?.concat())
        };
        // output by output before they are added up: what does not depend on the element cancels exactly
        let slope = |i: usize, h: f64| -> Result<f64> {
            let (up, down) = (outputs(i, h)?, outputs(i, -h)?);
            // the step that was taken, not the one that was asked for
            let h2 = (base[i] + h) - (base[i] - h);
            Ok(up.iter().zip(&down).zip(&weights).map(|((u, d), w)| w * (u - d)).sum::<f64>() / h2)
        };
        let mut numeric = vec![0f64; base.len()];
        let mut largest = 0f64;
        for (i, n) in numeric.iter_mut().enumerate() {
            let mut roughest = f64::INFINITY;
            for h in [10.0 * eps, eps, eps / 10.0] {
                let (near, far) = (slope(i, h)?, slope(i, 2.0 * h)?);
                let rough = (near - far).abs();
                if rough < roughest {
                    (roughest, *n) = (rough, (4.0 * near - far) / 3.0);
                }
                if rough <= SMOOTH * n.abs().max(SMALL * largest).max(1e-4) {
                    break;
                }
            }
            if roughest.is_infinite() {
                *n = f64::NAN;
            }
            largest = largest.max(n.abs());
        }
        for (i, (a, n)) in auto.iter().zip(&numeric).enumerate() {
            let e = (a - n).abs() / n.abs().max(SMALL * largest).max(ZERO);
            if e > report.worst || e.is_nan() {
                report = GradCheck { worst: if e.is_nan() { f64::INFINITY } else { e }, at: (l, i), values: (*a, *n) };
            }
        }
    }
    Ok(report)
}

/// Fixed random numbers for the float output `i`.
fn weight(i: usize, y: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(rng::normal(99, i as u64, y.numel()), y.shape())?.cast(y.dtype())?.to_device(y.device())
}

/// A scalar of all float outputs: their sum, weighted by fixed random numbers.
pub(crate) fn weigh(ys: &[Tensor]) -> Result<Tensor> {
    let mut total: Option<Tensor> = None;
    for (i, y) in ys.iter().filter(|y| y.dtype().is_float()).enumerate() {
        let part = y.mul(&weight(i, y)?)?.cast(DType::F64)?.sum_all()?;
        total = Some(match total {
            None => part,
            Some(t) => t.add(&part)?,
        });
    }
    total.ok_or_else(|| Error::invalid("gradcheck", "the function has no float output"))
}
