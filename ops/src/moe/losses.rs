//! What keeps a router honest, composed of primitive ops: the tensors are small.

use engine::{Error, Result, Tensor, no_grad};

fn all<'a>(op: &'static str, router_logits: &'a [&'a Tensor]) -> Result<Tensor> {
    if router_logits.is_empty() {
        return Err(Error::invalid(op, "needs the router logits of at least one layer"));
    }
    let t = Tensor::cat(router_logits, 0)?;
    t.cast(crate::dtypes::sums(t.dtype()))
}

/// The load-balancing loss as transformers computes it: `E · Σ_e f_e P_e` over the tokens of all layers together, where f_e is the share of tokens that
/// chose e (adding up to top_k, so that a balanced router gives top_k) and P_e its mean probability. The gradient goes through P.
/// Router logits `[N, E]` per layer; a scalar in f32 (f64 for f64).
pub fn load_balancing_loss(router_logits: &[&Tensor], top_k: usize) -> Result<Tensor> {
    let logits = all("load_balancing_loss", router_logits)?;
    let (n, e) = (logits.dim(0), logits.dim(1));
    if top_k == 0 || top_k > e {
        return Err(Error::invalid("load_balancing_loss", format!("top_k must be from 1 to the {e} experts, found {top_k}")));
    }
    let p = logits.softmax(1)?;
    let chosen = no_grad(|| -> Result<Tensor> {
        let (_, idx) = p.detach().topk(top_k)?;
        let ones = Tensor::ones(&[n, top_k], p.dtype(), p.device())?;
        ones.scatter_add(1, &idx, e)?.mean(&[0], false)
    })?;
    p.mean(&[0], false)?.mul(&chosen)?.sum_all()?.affine(e as f64, 0.0)
}

/// The router z-loss (ST-MoE, 2202.08906, Eq. 5): mean over tokens of the squared log-sum-exp of the logits.
pub fn router_z_loss(router_logits: &[&Tensor]) -> Result<Tensor> {
    let logits = all("router_z_loss", router_logits)?;
    let m = logits.detach().max(&[1], true)?;
    let lse = logits.sub(&m)?.exp()?.sum(&[1], true)?.ln()?.add(&m)?;
    lse.square()?.mean(&[0, 1], false)
}
