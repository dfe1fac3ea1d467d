//! Taps: named tensors that an observer is shown while a model computes them, and most of which it may replace.

mod table;

use engine::{DType, Error, Result, Tensor, no_grad};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, delta_rule};
use ops::gated_sdpa::{Attention, attention_pattern};
pub use table::{Access, Part, TAPS, Tap};

/// What looks at a model's tensors while it computes. `docs/taps.md` lists all names.
///
/// A closure that takes `(&str, &Tensor)` and returns `Result<Option<Tensor>>` is one, and wants everything but what is [on request](on_request).
///
/// ```
/// use engine::{DType, Tensor};
/// use nn::{Decoder, ModelConfig, Observer};
/// # fn main() -> nn::Result<()> {
/// let config = ModelConfig { vocab_size: 32, hidden_size: 16, num_hidden_layers: 4, num_experts: 0, intermediate_size: 32, ..Default::default() };
/// let model = Decoder::new(&config, 0, DType::F32)?;
/// let tokens = Tensor::from_vec([1u32, 2, 3], &[1, 3])?;
/// // the model without its second block's mixer
/// let mut ablate = |name: &str, t: &Tensor| Ok(if name == "blocks.1.hook_attn_out" { Some(t.affine(0.0, 0.0)?) } else { None });
/// model.forward(&tokens, None, None, Some(&mut ablate as &mut dyn Observer))?;
/// # Ok(()) }
/// ```
pub trait Observer {
    /// Whether to be shown the tensor of this name. What nobody wants is not computed.
    fn wants(&self, name: &str) -> bool {
        !on_request(name)
    }
    /// Is shown a tensor. What it returns, if anything, takes the tensor's place in the model, and gradients flow through it: make it of `value`, or of
    /// anything else of the same shape, dtype and device. `value` belongs to the tape where that records; detach it to keep it for longer. An error
    /// ends the computation.
    fn see(&mut self, name: &str, value: &Tensor) -> Result<Option<Tensor>>;
}

impl<F: FnMut(&str, &Tensor) -> Result<Option<Tensor>>> Observer for F {
    fn see(&mut self, name: &str, value: &Tensor) -> Result<Option<Tensor>> {
        self(name, value)
    }
}

/// Whether a tensor is formed only for observers that ask for it: it grows with the square of the context or with the vocabulary.
pub fn on_request(name: &str) -> bool {
    Tap::named(name).is_some_and(|t| matches!(t.access, Access::OnRequest(_)))
}

/// An observer, and where the model is.
pub(crate) struct Taps<'a> {
    pub observer: Option<&'a mut (dyn Observer + 'a)>,
    /// The block that is computed.
    pub layer: Option<usize>,
}

impl<'a> Taps<'a> {
    pub fn new(observer: Option<&'a mut (dyn Observer + 'a)>) -> Self {
        Taps { observer, layer: None }
    }
    fn name(&self, name: &str) -> String {
        self.layer.map_or_else(|| name.to_string(), |i| format!("blocks.{i}.{name}"))
    }
    /// Offers `value()` to an observer that wants it; what it puts in its place, if anything.
    pub fn offer(&mut self, name: &str, value: impl FnOnce() -> Result<Tensor>) -> Result<Option<Tensor>> {
        if self.observer.is_none() {
            return Ok(None);
        }
        let name = self.name(name);
        let Some(observer) = self.observer.as_mut().filter(|o| o.wants(&name)) else { return Ok(None) };
        let value = value()?;
        let new = observer.see(&name, &value)?;
        if let Some(new) = &new {
            fits(&name, new, &value)?;
        }
        Ok(new)
    }
    /// What the model goes on with instead of `value`: the same, or what an observer puts in its place.
    pub fn tap(&mut self, name: &str, value: Tensor) -> Result<Tensor> {
        Ok(self.offer(name, || Ok(value.clone()))?.unwrap_or(value))
    }
    /// Shows `value()`, which the model does not compute with, to an observer that wants it.
    pub fn show(&mut self, name: &str, value: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if self.offer(name, || no_grad(value))?.is_none() {
            return Ok(());
        }
        let name = self.name(name);
        let instead = match Tap::named(&name).map(|t| t.access) {
            Some(Access::Shown(instead) | Access::OnRequest(instead)) => instead,
            _ => "another tensor",
        };
        Err(Error::invalid(
            "tap",
            format!("`{name}` can't be replaced: it is made to be looked at, and the model doesn't compute with it; replace {instead}"),
        ))
    }
    /// Names the part of the layer that is computed from here on, for those who look for where numbers stop being finite.
    pub fn part(&self, name: &str) {
        engine::watch::place(|| self.name(name));
    }
}

fn fits(name: &str, new: &Tensor, old: &Tensor) -> Result<()> {
    let is = |t: &Tensor| format!("{:?} {} on {}", t.shape(), t.dtype(), t.device().name());
    if (new.shape(), new.dtype(), new.device()) == (old.shape(), old.dtype(), old.device()) {
        return Ok(());
    }
    Err(Error::invalid("tap", format!("what takes the place of `{name}` must be {}, found {}", is(old), is(new))))
}

/// Columns of [`effective_attention`] that are computed at a time.
const COLUMNS: usize = 128;

/// The matrix `A [B, Hv, T, T]` with which the gated delta rule's output is `o = A v` (plus what an initial state adds), in f32 (f64 for f64): the rule
/// is linear in its values, so that those that are 1 at one token and 0 elsewhere make A's columns.
pub(crate) fn effective_attention(rule: DeltaRule, q: &Tensor, k: &Tensor, heads: usize, x: DeltaRuleInputs) -> Result<Tensor> {
    let wide = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (b, t) = (q.dim(0), q.dim(1));
    let (q, k) = (q.cast(wide)?, k.cast(wide)?);
    let mut columns = vec![];
    for first in (0..t).step_by(COLUMNS) {
        let n = COLUMNS.min(t - first);
        let mut unit = vec![0f32; t * n];
        (0..n).for_each(|i| unit[(first + i) * n + i] = 1.0);
        let unit = Tensor::from_vec(unit, &[1, t, 1, n])?.cast(wide)?.to_device(q.device())?.expand(&[b, t, heads, n])?.contiguous()?;
        columns.push(delta_rule(rule, &q, &k, &unit, DeltaRuleInputs { initial_state: None, ..x })?.0);
    }
    if columns.is_empty() {
        return Tensor::zeros(&[b, heads, t, t], wide, q.device());
    }
    Tensor::cat(&columns.iter().collect::<Vec<_>>(), 3)?.permute(&[0, 2, 1, 3])
}

/// Scores `scale·q kᵀ [B, H, T, P]` in f32 (f64 for f64), −∞ where a query doesn't see a key.
pub(crate) fn attention_scores(q: &Tensor, k: &Tensor, cu_seqlens: Option<&Tensor>, attention: Attention) -> Result<Tensor> {
    let wide = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (q, k) = (q.cast(wide)?, k.cast(wide)?);
    let (b, p, h, hkv, d) = (k.dim(0), k.dim(1), q.dim(2), k.dim(2), k.dim(3));
    let heads = k.reshape(&[b, p, hkv, 1, d])?.expand(&[b, p, hkv, h / hkv, d])?.reshape(&[b, p, h, d])?.permute(&[0, 2, 3, 1])?;
    let scores = q.permute(&[0, 2, 1, 3])?.matmul(&heads)?.affine(attention.scale(d), 0.0)?;
    // queries of zeros see all keys that they may see alike
    let seen = attention_pattern(&q.affine(0.0, 0.0)?, &k, cu_seqlens, attention)?;
    let at = |x: f64| Tensor::full(x, &[], wide, q.device());
    seen.gt(&at(0.0)?)?.select(&scores, &at(f64::NEG_INFINITY)?)
}

/// Tokens between two states of [`states`]: the chunk of the delta rule.
const CHUNK: usize = 64;

/// The states `[B, C, Hv, Dk, Dv]` after every [`CHUNK`] tokens of a row, in f32 (f64 for f64). In a row of packed documents, that of the document which the
/// last of these tokens is in.
pub(crate) fn states(rule: DeltaRule, q: &Tensor, k: &Tensor, v: &Tensor, x: DeltaRuleInputs) -> Result<Tensor> {
    let (b, t) = (k.dim(0), k.dim(1));
    let bounds = x.cu_seqlens.map(|cu| cu.cast(DType::I64)?.to_vec::<i64>()).transpose()?;
    let (mut state, mut all) = (x.initial_state.cloned(), vec![]);
    for first in (0..t).step_by(CHUNK) {
        let n = CHUNK.min(t - first);
        let cut = |x: &Tensor| x.narrow(1, first, n);
        let (decay, beta) = (x.log_decay.map(cut).transpose()?, x.beta.map(cut).transpose()?);
        // the documents in this chunk: the first goes on from before, if it began there
        let inside = bounds.as_ref().map(|all| {
            let (from, to) = (first as i64, (first + n) as i64);
            let begins: Vec<i64> = all.iter().filter(|c| (from + 1..to).contains(*c)).map(|c| c - from).collect();
            let goes_on = !all.contains(&from);
            (std::iter::once(0).chain(begins).chain([n as i64]).collect::<Vec<i64>>(), goes_on)
        });
        let (cu, goes_on) = match inside {
            Some((cu, goes_on)) => (Some(cu), goes_on),
            None => (None, true),
        };
        let documents = cu.as_ref().map_or(b, |c| c.len() - 1);
        let initial = match state.take().filter(|_| goes_on) {
            Some(s) if documents > s.dim(0) => {
                let none = Tensor::zeros(&[documents - 1, s.dim(1), s.dim(2), s.dim(3)], s.dtype(), s.device())?;
                Some(Tensor::cat(&[&s, &none], 0)?)
            }
            s => s,
        };
        let cu = cu.map(|c| Tensor::from_vec(c.clone(), &[c.len()])?.to_device(q.device())).transpose()?;
        let inputs = DeltaRuleInputs { log_decay: decay.as_ref(), beta: beta.as_ref(), initial_state: initial.as_ref(), cu_seqlens: cu.as_ref() };
        let (_, last) = delta_rule(rule, &cut(q)?, &cut(k)?, &cut(v)?, inputs)?;
        let last = if documents > b { last.narrow(0, documents - b, b)? } else { last };
        all.push(last.unsqueeze(1)?);
        state = Some(last);
    }
    match &all[..] {
        [] => Tensor::zeros(&[b, 0, v.dim(2), k.dim(3), v.dim(3)], DType::F32, q.device()),
        all => Tensor::cat(&all.iter().collect::<Vec<_>>(), 1),
    }
}
