//! Switch heads: keys and values from several experts, which each token chooses among.

use crate::config::{ModelConfig, SwitchHeads};
use crate::init::Builder;
use crate::taps::Taps;
use engine::{Result, Tensor};
use ops::moe::router_logits;

/// The router of a layer whose key/value heads have experts.
pub(crate) struct Switch {
    /// `[Hkv·E, M]`, wide.
    router: Tensor,
    how: SwitchHeads,
}

impl Switch {
    pub fn new(b: &mut Builder, c: &ModelConfig) -> crate::Result<Option<Switch>> {
        let how = c.switch_heads;
        let router = |b: &mut Builder| b.normal_wide("self_attn.switch_router.weight", &[c.num_key_value_heads * how.experts, c.hidden_size]);
        how.is_some().then(|| Ok(Switch { router: router(b)?, how })).transpose()
    }

    /// The weights of all experts `[B, T, Hkv, E]` for `x [B, T, M]`: the sigmoid of the router's logits, 0 for those that a token does not choose.
    pub fn weights(&self, x: &Tensor, taps: &mut Taps) -> Result<Tensor> {
        let (b, t, e) = (x.dim(0), x.dim(1), self.how.experts);
        let logits = router_logits(&x.reshape(&[b * t, x.dim(2)])?, &self.router)?.reshape(&[b, t, self.router.dim(0) / e, e])?;
        let logits = taps.tap("attn.hook_switch_logits", logits)?;
        let chosen = if self.how.top_k == e {
            logits.sigmoid()?
        } else {
            let (score, index) = logits.sigmoid()?.topk(self.how.top_k)?;
            score.scatter_add(3, &index, e)?
        };
        taps.show("attn.hook_switch", || Ok(chosen.clone()))?;
        Ok(chosen)
    }
}

/// `Σₑ weightₑ yₑ` of `y [B, T, Hkv, E·D]` and weights `[B, T, Hkv, E]`: `[B, T, Hkv, D]`.
pub(crate) fn mix(y: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let [b, t, heads, e] = weights.shape()[..] else {
        return Err(engine::Error::shape("switch_heads", "weights", "[B, T, Hkv, E]", weights.shape()));
    };
    let each = y.reshape(&[b, t, heads, e, y.dim(3) / e])?;
    each.mul(&weights.cast(y.dtype())?.unsqueeze(4)?)?.sum(&[3], false)
}
