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

/// Rounds of a measurement, of which the best counts.
const ROUNDS: usize = 3;

/// How many times as long a mixer takes with what is [composed](ModelConfig::composed) as without it (where several kinds of layers have some: one of each,
/// together): forward and backward of `batch` rows of `seq_len` tokens, the best of three rounds each, in turn. An error if nothing is composed.
pub fn composed_slowdown(config: &ModelConfig, place: &Placement, batch: usize, seq_len: usize) -> Result<f64> {
    if config.composed().is_empty() {
        return Err(Error::Usage("nothing in this configuration is composed: there is nothing to measure".into()));
    }
    let plain = config.without_composed();
    let kinds = config.composed_kinds();
    let (with, without) = (Probe::new(config, &kinds, place)?, Probe::new(&plain, &kinds, place)?);
    let x = Tensor::randn(&[batch, seq_len, config.hidden_size], place.compute, &place.device, 0, 0)?.requires_grad();
    let mut best = [f64::INFINITY; 2];
    // the first round only warms up
    for round in 0..=ROUNDS {
        for (best, probe) in best.iter_mut().zip([&with, &without]) {
            let seconds = enable_grad(|| probe.seconds(&x))?;
            if round > 0 {
                *best = best.min(seconds);
            }
        }
    }
    Ok(best[0] / best[1].max(1e-9))
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
