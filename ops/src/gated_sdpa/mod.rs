//! Gated softmax attention: `o = act(gate) ⊙ softmax(scale·q kᵀ + mask) v`, or additive, `o = softmax(..) v + act(gate)`.
//!
//! Qiu et al., "Gated Attention for Large Language Models" (2025), section 2: the gate at position G1, behind the attention output and before the
//! output projection. The tiled online softmax and its backward are FlashAttention-2's (Dao, 2023, algorithms 1 and 2): memory grows with T, not T².
//!
//! | argument | shape | |
//! |---|---|---|
//! | `q` | `[B, T, H, D]` | queries stand at the **end** of the keys: query t has position t + S − T |
//! | `k` | `[B, S, Hkv, D]` | S ≥ T, Hkv divides H; query head h reads key/value head h / (H/Hkv) |
//! | `v` | `[B, S, Hkv, Dv]` | |
//! | `gate` | `[B, T, H]` or `[B, T, H, Dv]` | logits, head-wise or element-wise; the activation is inside |
//! | `cu_seqlens` | `[n+1]`, i32 or i64 | boundaries of packed documents, `0 = cu[0] ≤ .. ≤ cu[n] = T`; then B = 1 and S = T |
//! | returns | `[B, T, H, Dv]` | |
//!
//! q, k, v and gate share one float dtype; bf16 and f16 are computed in f32. All four are read through their strides, if the last dimension is
//! dense: views of one projection are not copied.
//!
//! Hidden outputs: the log-sum-exp `[B, T, H]` (f32; f64 for f64) and, with a gate, the **ungated output** `[B, T, H, Dv]`. The backward needs the
//! latter twice, for the gate's gradient and for `delta = rowsum(du ⊙ u)`. It can't be had from o, since a multiplicative gate may be 0, and
//! recomputing it would cost another pass over all keys. The gated output itself is not saved.

mod attention_pattern;
mod cpu;
mod cuda;
pub mod reference;
#[cfg(test)]
mod tests;

pub use attention_pattern::{AttentionPattern, attention_pattern};

use crate::dtypes::sums;
use engine::{Error, Meta, Op, Result, Saved, Tensor, Want, run, run1};
use std::ops::RangeInclusive;

/// What the gate's logits go through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// σ(x), the paper's default.
    #[default]
    Sigmoid,
    /// x·σ(x), used with additive gates.
    Silu,
    /// 0.5 + 0.5·σ(x), the paper's "non-sparse" gate in [0.5, 1].
    NsSigmoid,
    /// x itself.
    Identity,
}

/// How the gate acts. Whether it is head-wise or element-wise is told by its shape.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gate {
    /// What the logits go through.
    pub activation: Activation,
    /// Added to the attention output rather than multiplied with it.
    pub additive: bool,
}

/// Attributes of the attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// A query sees no later position than its own.
    pub causal: bool,
    /// A query sees only positions nearer than this many, itself included (`Some(1)`: only itself).
    pub window: Option<usize>,
    /// Factor of the scores; 1/√D when not given.
    pub scale: Option<f64>,
}

impl Default for Attention {
    /// Causal, no window, 1/√D.
    fn default() -> Self {
        Attention { causal: true, window: None, scale: None }
    }
}

impl Attention {
    /// The factor of `q·k` for a head of `d` dimensions: what is set, else 1/√d.
    pub fn scale(&self, d: usize) -> f64 {
        self.scale.unwrap_or(1.0 / (d.max(1) as f64).sqrt())
    }
}

/// Gated attention, see the [module](self). `gate` comes with how it acts; `cu_seqlens` keeps packed documents apart.
///
/// ```
/// use engine::{DType, Device, Tensor};
/// use ops::gated_sdpa::{Attention, Gate, gated_sdpa};
/// # fn main() -> engine::Result<()> {
/// let x = |heads, stream| Tensor::randn(&[1, 5, heads, 8], DType::F32, &Device::cpu(), 0, stream);
/// let (q, k, v, gate) = (x(4, 0)?, x(2, 1)?, x(2, 2)?, x(4, 3)?);
/// let o = gated_sdpa(&q, &k, &v, Some((&gate, Gate::default())), None, Attention::default())?;
/// assert_eq!(o.shape(), [1, 5, 4, 8]);
/// # Ok(()) }
/// ```
pub fn gated_sdpa(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    gate: Option<(&Tensor, Gate)>,
    cu_seqlens: Option<&Tensor>,
    attention: Attention,
) -> Result<Tensor> {
    let mut x = vec![q, k, v];
    x.extend(gate.map(|g| g.0));
    x.extend(cu_seqlens);
    run1(GatedSdpa { attention, gate: gate.map(|g| g.1), packed: cu_seqlens.is_some() }, &x)
}

/// The op: inputs q, k, v, then the gate if there is one, then `cu_seqlens` if packed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GatedSdpa {
    /// Mask and scale.
    pub attention: Attention,
    /// How the gate acts, if there is one.
    pub gate: Option<Gate>,
    /// Whether `cu_seqlens` is given.
    pub packed: bool,
}

const NAME: &str = "gated_sdpa";
const BACKWARD: &str = "gated_sdpa_backward";

/// Checks q and k, and what the attributes ask of them. Returns (B, T, S, H, Hkv, D).
fn check_qk(op: &'static str, a: &Attention, q: &Meta, k: &Meta) -> Result<[usize; 6]> {
    let &[b, t, h, d] = &q.shape[..] else { return Err(Error::shape(op, "q", "[B, T, H, D]", &q.shape)) };
    if !q.dtype.is_float() {
        return Err(Error::dtype(op, "q", "a float type", q.dtype));
    }
    let ok = k.shape.len() == 4 && k.shape[0] == b && k.shape[1] >= t && k.shape[2] > 0 && h % k.shape[2] == 0 && k.shape[3] == d;
    if !ok || d == 0 {
        return Err(Error::shape(op, "k", format!("[{b}, at least {t}, a divisor of {h}, {d} > 0], for q {:?}", q.shape), &k.shape));
    }
    if k.dtype != q.dtype {
        return Err(Error::dtype(op, "k", format!("{}, as q", q.dtype), k.dtype));
    }
    if a.window == Some(0) {
        return Err(Error::invalid(op, "window must be at least 1 (a query sees itself), found 0; use None for no window"));
    }
    if a.scale.is_some_and(|s| !s.is_finite()) {
        return Err(Error::invalid(op, format!("scale must be finite, found {:?}", a.scale)));
    }
    Ok([b, t, k.shape[1], h, k.shape[2], d])
}

/// Packed documents are whole: none has keys before its queries.
fn check_packed(op: &'static str, t: usize, s: usize) -> Result<()> {
    if s == t { Ok(()) } else { Err(Error::invalid(op, format!("packed documents need as many keys as queries, found T = {t}, S = {s}"))) }
}

impl GatedSdpa {
    fn inputs(&self) -> usize {
        3 + self.gate.is_some() as usize + self.packed as usize
    }

    /// Which output is the ungated attention output.
    fn ungated(&self) -> usize {
        if self.gate.is_some() { 2 } else { 0 }
    }

    fn check(&self, op: &'static str, x: &[Meta]) -> Result<Vec<Meta>> {
        let [b, t, s, h, hkv, _] = check_qk(op, &self.attention, &x[0], &x[1])?;
        let dtype = x[0].dtype;
        let &[vb, vs, vh, dv] = &x[2].shape[..] else { return Err(Error::shape(op, "v", format!("[{b}, {s}, {hkv}, Dv]"), &x[2].shape)) };
        if [vb, vs, vh] != [b, s, hkv] || dv == 0 {
            return Err(Error::shape(op, "v", format!("[{b}, {s}, {hkv}, Dv > 0], as k"), &x[2].shape));
        }
        if x[2].dtype != dtype {
            return Err(Error::dtype(op, "v", format!("{dtype}, as q"), x[2].dtype));
        }
        if self.gate.is_some() {
            if x[3].shape != [b, t, h] && x[3].shape != [b, t, h, dv] {
                return Err(Error::shape(op, "gate", format!("[{b}, {t}, {h}] or [{b}, {t}, {h}, {dv}]"), &x[3].shape));
            }
            if x[3].dtype != dtype {
                return Err(Error::dtype(op, "gate", format!("{dtype}, as q"), x[3].dtype));
            }
        }
        if self.packed {
            crate::documents::check_meta(op, &x[self.inputs() - 1], b)?;
            check_packed(op, t, s)?;
        }
        let o = Meta::new(&[b, t, h, dv], dtype);
        let mut y = vec![o.clone(), Meta::new(&[b, t, h], sums(dtype))];
        if self.gate.is_some() {
            y.push(o);
        }
        Ok(y)
    }
}

impl Op for GatedSdpa {
    fn name(&self) -> &'static str {
        NAME
    }
    fn arity(&self) -> RangeInclusive<usize> {
        self.inputs()..=self.inputs()
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        self.check(NAME, x)
    }
    fn hidden(&self) -> usize {
        1 + self.gate.is_some() as usize
    }
    fn want(&self, i: usize) -> Want {
        if self.packed && i + 1 == self.inputs() { Want::Contiguous } else { Want::LastDimDense }
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        ((0..self.inputs()).collect(), vec![1, self.ungated()])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None; need.len()]) };
        let mut x = (0..self.inputs()).map(|i| s.input(i)).collect::<Result<Vec<_>>>()?;
        x.extend([s.output(self.ungated())?, s.output(1)?, dy]);
        let grads = run(GatedSdpaBackward(*self), &x)?;
        let mut grads: Vec<Option<Tensor>> = grads.into_iter().map(Some).collect();
        grads.resize(need.len(), None); // no gradient for cu_seqlens
        Ok(grads.into_iter().zip(need).map(|(g, need)| g.filter(|_| *need)).collect())
    }
}

/// The backward op. Inputs: the forward's, then the ungated output `[B, T, H, Dv]`, the log-sum-exp `[B, T, H]` and the output's gradient
/// `[B, T, H, Dv]`. Outputs: the gradients of q, k, v, and of the gate if there is one. Gradients of heads that share a key/value head are summed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GatedSdpaBackward(pub GatedSdpa);

impl Op for GatedSdpaBackward {
    fn name(&self) -> &'static str {
        BACKWARD
    }
    fn arity(&self) -> RangeInclusive<usize> {
        self.0.inputs() + 3..=self.0.inputs() + 3
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let n = self.0.inputs();
        let y = self.0.check(BACKWARD, x)?;
        for (m, arg, want) in [(&x[n], "u", &y[0]), (&x[n + 1], "lse", &y[1]), (&x[n + 2], "dy", &y[0])] {
            if m.shape != want.shape {
                return Err(Error::shape(BACKWARD, arg, format!("{:?}", want.shape), &m.shape));
            }
            if m.dtype != want.dtype {
                return Err(Error::dtype(BACKWARD, arg, want.dtype, m.dtype));
            }
        }
        Ok(x[..3 + self.0.gate.is_some() as usize].to_vec())
    }
    fn want(&self, i: usize) -> Want {
        if i == self.0.inputs() + 1 { Want::Contiguous } else { self.0.want(i) }
    }
}
