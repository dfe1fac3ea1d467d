//! The definition, in plain f64 loops over contiguous data: every score is formed and every mask asked cell by cell. Tests compare kernels with it.

use super::{Activation, Attention, Gate};
use engine::Tensor;

/// Sizes of a reference call.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Batch.
    pub b: usize,
    /// Queries.
    pub t: usize,
    /// Keys.
    pub s: usize,
    /// Query heads.
    pub h: usize,
    /// Key/value heads.
    pub hkv: usize,
    /// Head dim of q and k.
    pub d: usize,
    /// Head dim of v.
    pub dv: usize,
}

/// The gate's activation.
pub fn activate(a: Activation, x: f64) -> f64 {
    let sigmoid = 1.0 / (1.0 + (-x).exp());
    match a {
        Activation::Sigmoid => sigmoid,
        Activation::Silu => x * sigmoid,
        Activation::NsSigmoid => 0.5 + 0.5 * sigmoid,
        Activation::Identity => x,
    }
}

/// Whether query t sees key j.
pub fn sees(n: &Sizes, a: &Attention, cu: Option<&[usize]>, t: usize, j: usize) -> bool {
    let at = t + n.s - n.t;
    let document = |i: usize| cu.map(|cu| cu.iter().filter(|c| **c <= i).count());
    (!a.causal || j <= at) && a.window.is_none_or(|w| at.abs_diff(j) < w) && document(t) == document(j)
}

/// The probabilities `[B, H, T, S]`.
pub fn pattern(n: &Sizes, a: &Attention, cu: Option<&[usize]>, q: &[f64], k: &[f64]) -> Vec<f64> {
    let mut y = vec![0.0; n.b * n.h * n.t * n.s];
    for (i, row) in y.chunks_exact_mut(n.s).enumerate() {
        let (b, h, t) = (i / n.t / n.h, i / n.t % n.h, i % n.t);
        let hk = h / (n.h / n.hkv);
        let mut sum = 0.0;
        for (j, p) in row.iter_mut().enumerate().filter(|(j, _)| sees(n, a, cu, t, *j)) {
            let (q, k) = (&q[((b * n.t + t) * n.h + h) * n.d..], &k[((b * n.s + j) * n.hkv + hk) * n.d..]);
            let score: f64 = (0..n.d).map(|d| q[d] * k[d]).sum();
            *p = (score * a.scale(n.d)).exp();
            sum += *p;
        }
        row.iter_mut().for_each(|p| *p /= sum);
    }
    y
}

/// The op: `[B, T, H, Dv]`. `gate` holds B·T·H logits, or B·T·H·Dv.
pub fn gated_sdpa(n: &Sizes, a: &Attention, cu: Option<&[usize]>, q: &[f64], k: &[f64], v: &[f64], gate: Option<(&[f64], Gate)>) -> Vec<f64> {
    let p = pattern(n, a, cu, q, k);
    let mut o = vec![0.0; n.b * n.t * n.h * n.dv];
    for (i, o) in o.iter_mut().enumerate() {
        let (row, e) = (i / n.dv, i % n.dv);
        let (b, t, h) = (row / n.h / n.t, row / n.h % n.t, row % n.h);
        let hk = h / (n.h / n.hkv);
        *o = (0..n.s).map(|j| p[((b * n.h + h) * n.t + t) * n.s + j] * v[((b * n.s + j) * n.hkv + hk) * n.dv + e]).sum();
        if let Some((x, g)) = gate {
            let x = activate(g.activation, if x.len() == n.b * n.t * n.h { x[row] } else { x[i] });
            *o = if g.additive { *o + x } else { *o * x };
        }
    }
    o
}

/// `[B, S, Hkv, D]` as `[B, H, S, D]`, each head for the query heads that read it.
fn heads(x: &Tensor, h: usize) -> engine::Result<Tensor> {
    let (b, s, hkv, d) = (x.dim(0), x.dim(1), x.dim(2), x.dim(3));
    x.reshape(&[b, s, hkv, 1, d])?.expand(&[b, s, hkv, h / hkv, d])?.reshape(&[b, s, h, d])?.permute(&[0, 2, 1, 3])
}

/// The pattern composed of primitive ops: as [`super::attention_pattern`].
pub fn composed_pattern(q: &Tensor, k: &Tensor, cu_seqlens: Option<&Tensor>, attention: Attention) -> engine::Result<Tensor> {
    let n = Sizes { b: q.dim(0), t: q.dim(1), s: k.dim(1), h: q.dim(2), hkv: k.dim(2), d: q.dim(3), dv: 0 };
    let cu: Option<Vec<usize>> = cu_seqlens.map(|c| Ok(c.to_vec::<i64>()?.into_iter().map(|c| c as usize).collect())).transpose()?;
    let sees = |i: usize| sees(&n, &attention, cu.as_deref(), i / n.s, i % n.s);
    let mask: Vec<f64> = (0..n.t * n.s).map(|i| if sees(i) { 0.0 } else { f64::NEG_INFINITY }).collect();
    let mask = Tensor::from_vec(mask, &[n.t, n.s])?.cast(q.dtype())?;
    q.permute(&[0, 2, 1, 3])?.matmul(&heads(k, n.h)?.transpose(2, 3)?)?.affine(attention.scale(n.d), 0.0)?.add(&mask)?.softmax(3)
}

/// The op composed of primitive ops, differentiable: as [`super::gated_sdpa`], with all T × S scores in memory.
pub fn composed(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    gate: Option<(&Tensor, Gate)>,
    cu_seqlens: Option<&Tensor>,
    attention: Attention,
) -> engine::Result<Tensor> {
    let o = composed_pattern(q, k, cu_seqlens, attention)?.matmul(&heads(v, q.dim(2))?)?.permute(&[0, 2, 1, 3])?;
    let Some((logits, how)) = gate else { return Ok(o) };
    let act = match how.activation {
        Activation::Sigmoid => logits.sigmoid()?,
        Activation::Silu => logits.silu()?,
        Activation::NsSigmoid => logits.sigmoid()?.affine(0.5, 0.5)?,
        Activation::Identity => logits.clone(),
    };
    let act = if act.rank() == 3 { act.unsqueeze(3)? } else { act };
    if how.additive { o.add(&act) } else { o.mul(&act) }
}

const CAUSAL: Attention = Attention { causal: true, window: None, scale: None };
const WINDOW: Attention = Attention { causal: true, window: Some(20), scale: None };
const SIGMOID: Gate = Gate { activation: Activation::Sigmoid, additive: false };
const SILU: Gate = Gate { activation: Activation::Silu, additive: true };

fn cu(x: &Tensor) -> engine::Result<Tensor> {
    Tensor::from_vec([0i64, 40, 41, 77], &[4])?.to_device(x.device())
}
engine::self_test!("gated_sdpa", [[2, 77, 4, 32], [2, 77, 2, 32], [2, 77, 2, 32], [2, 77, 4, 32]],
    |x| Ok(vec![super::gated_sdpa(&x[0], &x[1], &x[2], Some((&x[3], SIGMOID)), None, CAUSAL)?])
    => |x| Ok(vec![composed(&x[0], &x[1], &x[2], Some((&x[3], SIGMOID)), None, CAUSAL)?]));
engine::self_test!("gated_sdpa packed", [[1, 77, 4, 32], [1, 77, 2, 32], [1, 77, 2, 32], [1, 77, 4]],
    |x| Ok(vec![super::gated_sdpa(&x[0], &x[1], &x[2], Some((&x[3], SILU)), Some(&cu(&x[0])?), WINDOW)?])
    => |x| Ok(vec![composed(&x[0], &x[1], &x[2], Some((&x[3], SILU)), Some(&cu(&x[0])?), WINDOW)?]));
// head dims and rows that have kernels of their own on Hopper
engine::self_test!("gated_sdpa of head dim 64", [[1, 150, 4, 64], [1, 150, 2, 64], [1, 150, 2, 64], [1, 150, 4, 64]],
    |x| Ok(vec![super::gated_sdpa(&x[0], &x[1], &x[2], Some((&x[3], SIGMOID)), None, CAUSAL)?])
    => |x| Ok(vec![composed(&x[0], &x[1], &x[2], Some((&x[3], SIGMOID)), None, CAUSAL)?]));
engine::self_test!("gated_sdpa of head dim 128", [[1, 150, 4, 128], [1, 150, 2, 128], [1, 150, 2, 128], [1, 150, 4]],
    |x| Ok(vec![super::gated_sdpa(&x[0], &x[1], &x[2], Some((&x[3], SIGMOID)), None, CAUSAL)?])
    => |x| Ok(vec![composed(&x[0], &x[1], &x[2], Some((&x[3], SIGMOID)), None, CAUSAL)?]));
engine::self_test!("gated_sdpa of one token", [[2, 1, 4, 32], [2, 77, 2, 32], [2, 77, 2, 32]],
    |x| Ok(vec![super::gated_sdpa(&x[0], &x[1], &x[2], None, None, CAUSAL)?]) => |x| Ok(vec![composed(&x[0], &x[1], &x[2], None, None, CAUSAL)?]));
engine::self_test!("attention_pattern", [[2, 77, 4, 32], [2, 77, 2, 32]],
    |x| Ok(vec![super::attention_pattern(&x[0].detach(), &x[1].detach(), None, WINDOW)?])
    => |x| Ok(vec![composed_pattern(&x[0].detach(), &x[1].detach(), None, WINDOW)?]));
