//! The decoder: embedding, residual blocks, final norm, output projection.

use crate::aside::Aside;
use crate::cache::{self, Caches};
use crate::config::ModelConfig;
use crate::init::{Builder, Source};
use crate::layers::{Context, Param, project};
use crate::mixer::{FeedForward, Mixer};
use crate::norms::{Norms, add_norm, tapped_norm};
use crate::taps::{Observer, Taps};
use crate::{Error, Result};
use engine::watch::place;
use engine::{DType, Device, Tensor};
use ops::linear_cross_entropy::{linear_cross_entropy, linear_cross_entropy_per_token};
use ops::moe::{load_balancing_loss, router_z_loss};

struct Block {
    mixer_norms: Norms,
    mixer: Mixer,
    feed_forward_norms: Norms,
    /// None: the block is its mixer alone.
    feed_forward: Option<FeedForward>,
}

/// The losses of a batch, scalars.
pub struct Losses {
    /// What is minimised: `nll` plus the router's losses with their coefficients.
    pub objective: Tensor,
    /// Mean negative log-likelihood in nats per token.
    pub nll: Tensor,
    /// The load-balancing loss before its coefficient (0-dimensional; none without experts or with a coefficient of 0).
    pub load_balancing: Option<Tensor>,
    /// The router's z-loss, likewise.
    pub router_z: Option<Tensor>,
}

/// The hybrid mixture-of-experts language model. Parameters are leaves, updated in place by an optimizer.
pub struct Decoder {
    config: ModelConfig,
    place: Placement,
    params: Vec<Param>,
    embed: Tensor,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Tensor,
    pub(crate) aside: Aside,
}

/// Where a model lives, and in what precision (the policy is explicit: nothing is narrowed that is not said here).
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// The device of parameters and computation.
    pub device: Device,
    /// The parameters': f32, or f64 for checks. To read with, not to train: bf16, which matrices are then kept in; norms, routers, decays and convolutions stay
    /// in f32. It takes half the memory, and computes what bf16 over parameters in f32 computes, bit for bit.
    pub params: DType,
    /// The activations' and products': the parameters' dtype, or bf16 or f16. Norms, softmax, router, decay, states and losses are computed in f32 all the same.
    pub compute: DType,
}

impl Placement {
    /// The CPU, everything in one dtype.
    pub fn cpu(dtype: DType) -> Self {
        Placement { device: Device::cpu(), params: dtype, compute: dtype }
    }
    /// For a model that is read and not trained: what is computed with in bf16 is kept in it, where it would be rounded each time.
    pub fn to_read(self) -> Self {
        if self.compute == DType::BF16 { Placement { params: DType::BF16, ..self } } else { self }
    }
    pub(crate) fn validate(&self) -> Result<()> {
        if !matches!(self.params, DType::F32 | DType::F64 | DType::BF16) {
            return Err(Error::Config(format!("parameters are kept in f32 (f64 for checks, bf16 to read with), found {}", self.params)));
        }
        if self.compute != self.params && !(self.params == DType::F32 && matches!(self.compute, DType::BF16 | DType::F16)) {
            return Err(Error::Config(format!(
                "parameters in {} can be computed with in {0}, or from f32 in bf16 and f16, found {}",
                self.params, self.compute
            )));
        }
        Ok(())
    }
}

impl Decoder {
    /// A model on the CPU with initial values that are a function of `seed`. `dtype` is that of the parameters and the computation: f32, or f64 for checks.
    pub fn new(config: &ModelConfig, seed: u64, dtype: DType) -> Result<Self> {
        Self::on(config, seed, &Placement::cpu(dtype))
    }

    /// A model with initial values that are a function of `seed`, the same on every device.
    pub fn on(config: &ModelConfig, seed: u64, place: &Placement) -> Result<Self> {
        config.validate()?;
        place.validate()?;
        config.fits(place.params.size() as u64, ModelConfig::SMALLER)?;
        Self::build(config, place, Source::Seed(seed))
    }

    pub(crate) fn build(config: &ModelConfig, place: &Placement, source: Source) -> Result<Self> {
        let c = config.clone();
        let h = c.hidden_size;
        let mut b = Builder { params: vec![], source, std: c.initializer_range, place: place.clone(), prefix: "model.".into() };
        let embed = b.normal("embed_tokens.weight", &[c.vocab_size, h])?;
        let mut blocks = vec![];
        for i in 0..c.num_hidden_layers {
            b.prefix = format!("model.layers.{i}.");
            let [of_mixer, of_feed_forward] = c.norm_names(i);
            let mixer_norms = Norms::new(&mut b, &c, of_mixer)?;
            let mixer = Mixer::new(&mut b, &c, c.layer_type(i))?;
            let feed_forward_norms = Norms::new(&mut b, &c, of_feed_forward)?;
            let feed_forward = FeedForward::new(&mut b, &c, i)?;
            blocks.push(Block { mixer_norms, mixer, feed_forward_norms, feed_forward });
        }
        b.prefix = "model.".into();
        let norm = b.constant("norm.weight", &[h], c.norm_start())?;
        b.prefix = String::new();
        let head = if c.tie_word_embeddings { embed.clone() } else { b.normal("lm_head.weight", &[c.vocab_size, h])? };
        Ok(Decoder { config: c, place: b.place, params: b.params, embed, blocks, norm, head, aside: Aside::default() })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
    /// What the folder that it was read from held beside it.
    pub fn aside(&self) -> &Aside {
        &self.aside
    }
    /// The same, to add to it.
    pub fn aside_mut(&mut self) -> &mut Aside {
        &mut self.aside
    }
    /// Where it lives, and in what precision.
    pub fn place(&self) -> &Placement {
        &self.place
    }
    /// Every parameter, always in the same order.
    pub fn params(&self) -> &[Param] {
        &self.params
    }

    /// Final hidden states `[B, T, H]` of tokens `[B, T]` (any integer dtype), and the router logits of each sparse layer.
    ///
    /// `cu_seqlens [n + 1]` (B = 1) keeps packed documents apart: in attention, convolution, state and positions. `caches` carry B sequences from
    /// call to call, each as long as it may be, without packed documents and outside recording. `observer` sees, and may replace, what is computed on the way.
    pub fn forward(
        &self,
        tokens: &Tensor,
        cu_seqlens: Option<&Tensor>,
        caches: Option<&mut Caches>,
        observer: Option<&mut dyn Observer>,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        self.tapped(tokens, cu_seqlens, caches, &mut Taps::new(observer), false)
    }

    /// Final hidden states `[B, 1, H]` of the last of tokens `[B, T]` read on top of `caches`: what the last layer computes for the tokens before it, beyond what
    /// the caches take up, is left out. That is a whole layer's attention and feed-forward over a prompt.
    pub fn last(&self, tokens: &Tensor, caches: &mut Caches) -> Result<Tensor> {
        Ok(self.tapped(tokens, None, Some(caches), &mut Taps::new(None), true)?.0)
    }

    fn tapped(
        &self,
        tokens: &Tensor,
        cu_seqlens: Option<&Tensor>,
        caches: Option<&mut Caches>,
        taps: &mut Taps,
        last: bool,
    ) -> Result<(Tensor, Vec<Tensor>)> {
        let c = &self.config;
        if tokens.rank() != 2 || last && tokens.dim(1) == 0 {
            return Err(engine::Error::shape("decoder", "tokens", "[B, T]", tokens.shape()).into());
        }
        let mut positions = cu_seqlens.map(|cu| restarted(cu, tokens.dim(1))).transpose()?;
        let (mut caches, mut lens) = (caches, vec![0]);
        if let Some(caches) = &mut caches {
            if caches.layers.len() != c.num_hidden_layers {
                return Err(Error::Usage(format!(
                    "the model has {} layers, the caches are of one with {}",
                    c.num_hidden_layers,
                    caches.layers.len()
                )));
            }
            if cu_seqlens.is_some() {
                return Err(Error::Usage(
                    "a context is carried on for whole sequences: packed documents (cu_seqlens) and caches exclude each other".into(),
                ));
            }
            lens = caches.begin(tokens.dim(0))?;
            positions = cache::positions(&lens, tokens.dim(1), tokens.device())?;
        }
        let mut ctx = Context { cu_seqlens, positions: positions.as_ref(), offset: lens.first().copied().unwrap_or(0), tail: false };
        place(|| "embed_tokens".into());
        let mut stream = taps.tap("hook_embed", self.embed.embedding(tokens)?.cast(self.place.compute)?)?;
        let mut delta: Option<Tensor> = None;
        let mut routers = vec![];
        for (i, block) in self.blocks.iter().enumerate() {
            taps.layer = Some(i);
            taps.part("attn");
            ctx.tail = last && i + 1 == c.num_hidden_layers;
            let (x, h) = tapped_norm(delta.take(), stream, block.mixer_norms.before.as_ref(), c, taps, ["hook_resid_pre", "ln1.hook_out"])?;
            let cache = caches.as_mut().map(|k| &mut k.layers[i]);
            let y = block.mixer.forward(&x, c, &ctx, cache, taps)?;
            let h = if ctx.tail { h.narrow(1, h.dim(1) - 1, 1)? } else { h };
            let y = block.mixer_norms.behind(y, "attn.hook_out", c, taps)?;
            let y = taps.tap("hook_attn_out", y)?;
            let (h, y) = match &block.feed_forward {
                None => (h, y),
                Some(feed_forward) => {
                    taps.part("mlp");
                    let (x, h) = tapped_norm(Some(y), h, block.feed_forward_norms.before.as_ref(), c, taps, ["hook_resid_mid", "ln2.hook_out"])?;
                    let (y, logits) = feed_forward.forward(&x, c, taps)?;
                    routers.extend(logits);
                    let y = block.feed_forward_norms.behind(y, "mlp.hook_out", c, taps)?;
                    (h, taps.tap("hook_mlp_out", y)?)
                }
            };
            // the sum is otherwise formed inside the next norm
            (stream, delta) = match taps.offer("hook_resid_post", || h.add(&y))? {
                Some(replaced) => (replaced, None),
                None => (h, Some(y)),
            };
        }
        if let Some(caches) = caches {
            caches.lens = lens.iter().map(|n| n + tokens.dim(1)).collect();
        }
        taps.layer = None;
        place(|| "norm".into());
        Ok((taps.tap("ln_final.hook_out", add_norm(delta, stream, &self.norm, c)?.0)?, routers))
    }

    /// Logits `[N, V]` of hidden states `[N, H]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(project(hidden, &self.head)?)
    }

    /// The loss of predicting `targets [B·T]` (i64, −100 where none is asked) from `tokens [B, T]`.
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor, cu_seqlens: Option<&Tensor>, observer: Option<&mut dyn Observer>) -> Result<Losses> {
        let c = &self.config;
        let mut taps = Taps::new(observer);
        let (x, routers) = self.tapped(tokens, cu_seqlens, None, &mut taps, false)?;
        place(|| "lm_head".into());
        taps.show("logits", || project(&x, &self.head))?;
        let nll = linear_cross_entropy(&x.reshape(&[tokens.numel(), c.hidden_size])?, &self.head.cast(x.dtype())?, targets)?;
        let mut objective = nll.clone();
        let routers: Vec<&Tensor> = routers.iter().collect();
        let (mut load_balancing, mut router_z) = (None, None);
        place(|| "router_losses".into());
        if !routers.is_empty() && c.router_aux_loss_coef != 0.0 {
            let l = load_balancing_loss(&routers, c.num_experts_per_tok)?;
            objective = objective.add(&l.affine(c.router_aux_loss_coef, 0.0)?)?;
            load_balancing = Some(l);
        }
        if !routers.is_empty() && c.router_z_loss_coef != 0.0 {
            let l = router_z_loss(&routers)?;
            objective = objective.add(&l.affine(c.router_z_loss_coef, 0.0)?)?;
            router_z = Some(l);
        }
        Ok(Losses { objective, nll, load_balancing, router_z })
    }

    /// Negative log-likelihood of each position in nats, `[B·T]`.
    pub fn token_losses(
        &self,
        tokens: &Tensor,
        targets: &Tensor,
        cu_seqlens: Option<&Tensor>,
        observer: Option<&mut dyn Observer>,
    ) -> Result<Tensor> {
        let (x, _) = engine::no_grad(|| self.forward(tokens, cu_seqlens, None, observer))?;
        Ok(linear_cross_entropy_per_token(&x.reshape(&[tokens.numel(), self.config.hidden_size])?, &self.head.detach().cast(x.dtype())?, targets)?)
    }
}

/// Positions `[1, T]` (i64) that restart at each document, computed where the bounds are.
fn restarted(cu: &Tensor, t: usize) -> Result<Tensor> {
    if cu.numel() < 2 {
        return Err(engine::Error::shape("decoder", "cu_seqlens", "[documents + 1]", cu.shape()).into());
    }
    let at = Tensor::ones(&[t, 1], DType::F64, cu.device())?.cumsum(0)?.affine(1.0, -1.0)?;
    let begins = cu.reshape(&[1, cu.numel()])?.cast(DType::F64)?;
    // the last bound that is not behind a position: where its document begins
    let begin = at.ge(&begins)?.select(&begins, &Tensor::zeros(&[], DType::F64, cu.device())?)?.max(&[1], true)?;
    Ok(at.sub(&begin)?.cast(DType::I64)?.reshape(&[1, t])?)
}
