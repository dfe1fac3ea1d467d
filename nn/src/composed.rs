//! What costs that is no part of the kernels of attention and recurrence, measured.

use crate::config::{LayerType, ModelConfig};
use crate::decoder::Placement;
use crate::init::{Builder, Source};
use crate::layers::Context;
use crate::mixer::Mixer;
use crate::taps::Taps;
use crate::{Error, Result};
use engine::{Tensor, enable_grad};
use std::time::Instant;

/// Rounds of a measurement: at least so many, and more until they took so long together, but not more than so many.
const ROUNDS: usize = 5;
const SECONDS: f64 = 0.3;
const MOST: usize = 200;

/// How many times as long a mixer takes with what is [composed](ModelConfig::composed) as without it (where several kinds of layers have some: one of each,
/// together): forward and backward of `batch` rows of `seq_len` tokens, in turn, and the medians of their rounds. An error if nothing is composed.
pub fn composed_slowdown(config: &ModelConfig, place: &Placement, batch: usize, seq_len: usize) -> Result<f64> {
    if config.composed().is_empty() {
        return Err(Error::Usage("nothing in this configuration is composed: there is nothing to measure".into()));
    }
    let plain = config.without_composed();
    let kinds = config.composed_kinds();
    let (with, without) = (Probe::new(config, &kinds, place)?, Probe::new(&plain, &kinds, place)?);
    let x = Tensor::randn(&[batch, seq_len, config.hidden_size], place.compute, &place.device, 0, 0)?.requires_grad();
    let round = || -> Result<[f64; 2]> { enable_grad(|| Ok([with.seconds(&x)?, without.seconds(&x)?])) };
    round()?; // only warms up
    let (mut rounds, mut spent) = (vec![], 0.0);
    while rounds.len() < ROUNDS || (spent < SECONDS && rounds.len() < MOST) {
        let both = round()?;
        spent += both[0] + both[1];
        rounds.push(both);
    }
    let mut median = |i: usize| {
        rounds.sort_by(|a, b| a[i].total_cmp(&b[i]));
        rounds[rounds.len() / 2][i]
    };
    Ok(median(0) / median(1).max(1e-9))
}

/// One mixer of each kind that has something composed, alone.
struct Probe<'a> {
    config: &'a ModelConfig,
    mixers: Vec<Mixer>,
}

impl Probe<'_> {
    fn new<'a>(config: &'a ModelConfig, kinds: &[LayerType], place: &Placement) -> Result<Probe<'a>> {
        let mut b = Builder { params: vec![], source: Source::Seed(0), std: config.initializer_range, place: place.clone(), prefix: String::new() };
        Ok(Probe { config, mixers: kinds.iter().map(|kind| Mixer::new(&mut b, config, *kind)).collect::<Result<_>>()? })
    }

    fn seconds(&self, x: &Tensor) -> Result<f64> {
        let began = Instant::now();
        let ctx = Context { cu_seqlens: None, positions: None, offset: 0, tail: false };
        for mixer in &self.mixers {
            let y = mixer.forward(x, self.config, &ctx, None, &mut Taps::new(None))?;
            let grads = y.backward_with(&Tensor::ones(y.shape(), y.dtype(), y.device())?)?;
            // a device is done when a number is there
            let dx = grads.get(x).ok_or_else(|| Error::Usage("the mixer's input got no gradient".into()))?;
            dx.narrow(1, 0, 1)?.sum_all()?.item()?;
        }
        Ok(began.elapsed().as_secs_f64())
    }
}
