//! What a block may consist of: any of the mixers, any of the feed-forwards.

use crate::attention::Attention;
use crate::cache::Cache;
use crate::config::{LayerType, ModelConfig};
use crate::delta_net::DeltaNet;
use crate::init::Builder;
use crate::layers::{Context, Dense, Sparse};
use crate::mamba2::Mamba2;
use crate::taps::Taps;
use engine::{Result, Tensor};

/// What mixes tokens.
pub(crate) enum Mixer {
    Softmax(Box<Attention>),
    Delta(Box<DeltaNet>),
    Mamba2(Box<Mamba2>),
}

impl Mixer {
    /// That of a kind of layer.
    pub fn new(b: &mut Builder, c: &ModelConfig, kind: LayerType) -> crate::Result<Mixer> {
        Ok(match c.recurrence_of(kind) {
            None => Mixer::Softmax(Box::new(Attention::new(b, c, kind)?)),
            Some(sizes) if kind == LayerType::Mamba2 => Mixer::Mamba2(Box::new(Mamba2::new(b, c, sizes)?)),
            Some(sizes) => Mixer::Delta(Box::new(DeltaNet::new(b, c, sizes)?)),
        })
    }
    /// Its output `[B, T, M]`, or of the last token alone where no other is asked for.
    pub fn forward(&self, x: &Tensor, c: &ModelConfig, ctx: &Context, cache: Option<&mut Cache>, taps: &mut Taps) -> Result<Tensor> {
        match self {
            Mixer::Softmax(m) => m.forward(x, c, ctx, cache, taps),
            Mixer::Delta(m) => m.forward(x, c, ctx, cache, taps),
            Mixer::Mamba2(m) => m.forward(x, c, ctx, cache, taps),
        }
    }
}

/// What works on each token by itself.
pub(crate) enum FeedForward {
    Dense(Dense),
    Sparse(Sparse),
}

impl FeedForward {
    /// That of layer `i`, if it has one.
    pub fn new(b: &mut Builder, c: &ModelConfig, i: usize) -> crate::Result<Option<FeedForward>> {
        Ok(match (c.has_feed_forward(i), c.is_sparse(i)) {
            (false, _) => None,
            (_, true) => Some(FeedForward::Sparse(Sparse::new(b, c)?)),
            (_, false) => Some(FeedForward::Dense(Dense::new(b, "mlp", c.hidden_size, c.intermediate_size)?)),
        })
    }
    /// Its output, and the router's logits where it has experts.
    pub fn forward(&self, x: &Tensor, c: &ModelConfig, taps: &mut Taps) -> Result<(Tensor, Option<Tensor>)> {
        match self {
            FeedForward::Dense(f) => Ok((f.forward(x, taps, ["mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post"])?, None)),
            FeedForward::Sparse(f) => f.forward(x, c, taps).map(|(y, logits)| (y, Some(logits))),
        }
    }
}
