//! A network on the engine, with AdamW, as a [`Learner`].

use crate::config::Optim;
use crate::data::Batch;
use crate::metrics::Scalars;
use crate::optim::AdamW;
use crate::trainer::{Batches, Learner, Sampling};
use crate::{Error, Result, checkpoint, observe};
use engine::{DType, Grads, Tensor};
use rayon::prelude::*;
use std::path::Path;
use std::sync::Mutex;

/// Sees named tensors as a network computes them.
pub type Tap<'a> = &'a mut dyn FnMut(&str, &Tensor);

/// What a forward pass gives.
pub struct Loss {
    /// What is minimised: the mean negative log-likelihood plus auxiliary losses, a scalar.
    pub objective: Tensor,
    /// The mean negative log-likelihood in nats a token, a scalar.
    pub nll: Tensor,
    /// The other losses before their coefficients, scalars, by what they are called in the metrics.
    pub auxiliary: Vec<(&'static str, Tensor)>,
}

/// What training asks of a network. Its parameters are leaves of the tape, updated in place.
pub trait Network: Sync {
    /// Every parameter with its name, always in the same order.
    fn params(&self) -> Vec<(&str, &Tensor)>;
    /// The loss over a batch; named tensors go to `tap`.
    fn loss(&self, batch: &Batch, tap: Option<Tap>) -> Result<Loss>;
    /// Continues a prompt; returns the new tokens.
    fn generate(&self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>>;
    /// Writes `model.safetensors` and `config.json` into `dir`.
    fn save(&self, dir: &Path) -> Result<()>;
    /// Reads parameters of the same configuration back, in place.
    fn load(&mut self, dir: &Path) -> Result<()>;
    /// One past the largest token.
    fn vocab_size(&self) -> usize;
    /// Routed experts in a layer (0: none).
    fn experts(&self) -> usize {
        0
    }
}

/// A network, its optimizer, and the gradients held between micro-batches.
pub struct Trained<N> {
    net: N,
    optim: Option<AdamW>,
    grads: Grads,
}

impl<N: Network> Trained<N> {
    /// A network that has no optimizer state yet; that is made at the first update.
    pub fn new(net: N) -> Trained<N> {
        Trained { net, optim: None, grads: Grads::new() }
    }
    /// The network.
    pub fn net(&self) -> &N {
        &self.net
    }
    /// How many numbers the parameters are.
    pub fn parameters(&self) -> usize {
        self.net.params().iter().map(|(_, t)| t.numel()).sum()
    }
}

/// One of `micro` micro-batches' part of the objective.
fn share(objective: Tensor, micro: usize) -> Result<Tensor> {
    if micro == 1 { Ok(objective) } else { objective.affine(1.0 / micro as f64, 0.0).map_err(Error::from) }
}

fn scalar(t: &Tensor) -> Result<f64> {
    t.item().map_err(Error::from)
}

/// The values of a tap as f32, when they are numbers.
fn values(t: &Tensor) -> Option<Vec<f32>> {
    t.detach().cast(DType::F32).and_then(|t| t.to_vec::<f32>()).ok()
}

impl<N: Network> Trained<N> {
    /// The first parameter that holds a number that is not finite.
    fn broken(&self) -> Option<&str> {
        let broken = |t: &Tensor| values(t).is_some_and(|v| v.iter().any(|x| !x.is_finite()));
        self.net.params().into_iter().find(|(_, t)| broken(t)).map(|(name, _)| name)
    }
}

impl<N: Network> Learner for Trained<N> {
    fn step(&mut self, micro: usize, batch: Batches, mut observed: Option<&mut Scalars>) -> Result<Vec<f64>> {
        let (net, experts) = (&self.net, self.net.experts());
        let seen = observed.is_some().then(|| Mutex::new(Scalars::new()));
        let one = |i: usize| -> Result<(f64, Grads)> {
            let batch = batch(i)?;
            // what this thread was waiting for when it took this task up may have switched recording off
            engine::enable_grad(|| {
                let mut grads = Grads::new();
                let loss = match &seen {
                    Some(seen) if i == 0 => {
                        let mut scalars = seen.lock().unwrap_or_else(|e| e.into_inner());
                        let mut tap = |name: &str, t: &Tensor| {
                            if let Some(v) = values(t) {
                                observe::summarise(&mut scalars, name, t.shape(), &v, experts);
                            }
                        };
                        let loss = net.loss(&batch, Some(&mut tap))?;
                        scalars.insert("loss_auxiliary".into(), scalar(&loss.objective)? - scalar(&loss.nll)?);
                        for (name, value) in &loss.auxiliary {
                            scalars.insert(name.to_string(), scalar(value)?);
                        }
                        loss
                    }
                    _ => net.loss(&batch, None)?,
                };
                let (nll, objective) = (scalar(&loss.nll)?, scalar(&loss.objective)?);
                // A loss that isn't finite is for the caller to report; its gradients would only hide where it began.
                if !(nll.is_finite() && objective.is_finite()) {
                    return Ok((objective, grads));
                }
                share(loss.objective, micro)?.backward_into(&mut grads)?;
                Ok((nll, grads))
            })
        };
        let mut losses = Vec::new();
        // as many at a time as there are threads, since each holds gradients of the whole model until they are added up
        let together = rayon::current_num_threads();
        for first in (0..micro).step_by(together) {
            let done: Vec<Result<(f64, Grads)>> = (first..micro.min(first + together)).into_par_iter().with_max_len(1).map(one).collect();
            for done in done {
                let (loss, grads) = done?;
                losses.push(loss);
                self.grads.merge(grads)?;
            }
        }
        if let (Some(observed), Some(seen)) = (&mut observed, seen) {
            **observed = seen.into_inner().unwrap_or_else(|e| e.into_inner());
        }
        Ok(losses)
    }

    fn update(&mut self, step: u64, lr: f64, optim: &Optim, observed: Option<&mut Scalars>) -> Result<f64> {
        let grads = std::mem::take(&mut self.grads);
        let params = self.net.params();
        let state = match &mut self.optim {
            Some(state) => state,
            None => self.optim.insert(AdamW::new(&params)?),
        };
        state.step(&params, &grads, step, lr, optim, observed)
    }

    fn nll(&mut self, batches: &[Batch]) -> Result<Vec<f64>> {
        let net = &self.net;
        let one = |batch: &Batch| Ok(scalar(&engine::no_grad(|| net.loss(batch, None))?.nll)? * batch.targets.len() as f64);
        batches.par_iter().with_max_len(1).map(one).collect()
    }

    fn sample(&mut self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>> {
        engine::no_grad(|| self.net.generate(prompt, how))
    }

    fn diagnose(&mut self, batch: &Batch, micro: usize) -> Option<String> {
        if let Some(name) = self.broken() {
            return Some(format!("the parameter `{name}` is not finite"));
        }
        let again = || -> Result<Grads> { Ok(share(self.net.loss(batch, None)?.objective, micro)?.backward()?) };
        let (done, seen) = engine::watch::watch(|| engine::enable_grad(again));
        let first = [("infinity", seen.infinity), ("NaN", seen.nan)];
        let said: Vec<String> =
            first.iter().filter_map(|(what, origin)| Some(format!("the first {what} came out of {}", origin.as_ref()?))).collect();
        match done {
            Err(e) if said.is_empty() => Some(format!("looking for where it began failed: {e}")),
            _ => (!said.is_empty()).then(|| said.join(", ")),
        }
    }

    fn save(&self, dir: &Path) -> Result<()> {
        // a checkpoint that nothing can go on from must not push out those that something can
        if let Some(name) = self.broken() {
            return Err(Error::NonFinite(format!("the parameter `{name}` is not finite, and no checkpoint of it is written")));
        }
        self.net.save(dir)?;
        match &self.optim {
            Some(state) => state.save(&dir.join(checkpoint::OPTIMIZER)),
            None => AdamW::new(&self.net.params())?.save(&dir.join(checkpoint::OPTIMIZER)),
        }
    }

    fn load(&mut self, dir: &Path) -> Result<()> {
        self.net.load(dir)?;
        let mut state = AdamW::new(&self.net.params())?;
        state.load(&dir.join(checkpoint::OPTIMIZER))?;
        (self.optim, self.grads) = (Some(state), Grads::new());
        Ok(())
    }

    fn vocab_size(&self) -> usize {
        self.net.vocab_size()
    }
}

/// The hybrid decoder.
pub struct Hybrid {
    model: nn::Decoder,
}

impl Hybrid {
    /// A new model.
    pub fn create(config: &nn::ModelConfig, seed: u64) -> Result<Trained<Hybrid>> {
        // weights, gradients and two moments, in f32
        config.fits(16)?;
        Ok(Trained::new(Hybrid { model: nn::Decoder::new(config, seed, DType::F32)? }))
    }
    /// The model of a checkpoint.
    pub fn open(dir: &Path) -> Result<Trained<Hybrid>> {
        Ok(Trained::new(Hybrid { model: nn::Decoder::open(dir)? }))
    }
    /// The model's `config.json`.
    pub fn config_json(&self) -> Result<String> {
        serde_json::to_string_pretty(&self.model.config().to_json()?).map_err(|e| Error::Model(e.to_string()))
    }
    /// The model.
    pub fn model(&self) -> &nn::Decoder {
        &self.model
    }
    /// Continues a prompt; `each` token is shown as it comes, and ends the text by saying false. Logits that are not numbers are an error.
    pub fn write(&self, prompt: &[u32], how: &Sampling, mut each: impl FnMut(u32) -> Result<bool>) -> Result<()> {
        let sampler = nn::Sampler { temperature: how.temperature, top_k: how.top_k, top_p: how.top_p, seed: how.seed };
        let mut context = nn::Generator::new(&self.model);
        let mut last = prompt.to_vec();
        for i in 0..how.tokens as u64 {
            let logits = context.feed(&last)?;
            if logits.iter().any(|l| l.is_nan()) {
                return Err(Error::NonFinite(format!("the model gives no numbers after {i} tokens")));
            }
            last = vec![sampler.draw(&logits, i) as u32];
            if !each(last[0])? {
                break;
            }
        }
        Ok(())
    }
}

impl Network for Hybrid {
    fn params(&self) -> Vec<(&str, &Tensor)> {
        self.model.params().iter().map(|p| (p.name.as_str(), &p.tensor)).collect()
    }
    fn loss(&self, batch: &Batch, tap: Option<Tap>) -> Result<Loss> {
        let make = || -> engine::Result<(Tensor, Tensor, Option<Tensor>)> {
            let tokens = Tensor::from_vec(&batch.tokens, &[batch.rows, batch.time])?;
            let targets = Tensor::from_vec(batch.targets.iter().map(|t| i64::from(*t)).collect::<Vec<_>>(), &[batch.targets.len()])?;
            let bounds = |cu: &Vec<u32>| Tensor::from_vec(cu.iter().map(|c| i64::from(*c)).collect::<Vec<_>>(), &[cu.len()]);
            Ok((tokens, targets, batch.cu_seqlens.as_ref().map(bounds).transpose()?))
        };
        let (tokens, targets, cu) = make()?;
        let l = self.model.loss(&tokens, &targets, cu.as_ref(), tap)?;
        let auxiliary = [("loss_balancing", l.load_balancing), ("loss_z", l.router_z)];
        Ok(Loss { objective: l.objective, nll: l.nll, auxiliary: auxiliary.into_iter().filter_map(|(name, t)| Some((name, t?))).collect() })
    }
    fn generate(&self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>> {
        let mut out = vec![];
        self.write(prompt, how, |token| {
            out.push(token);
            Ok(true)
        })?;
        Ok(out)
    }
    fn save(&self, dir: &Path) -> Result<()> {
        self.model.save(dir).map_err(Error::from)
    }
    fn load(&mut self, dir: &Path) -> Result<()> {
        self.model.load(dir).map_err(Error::from)
    }
    fn vocab_size(&self) -> usize {
        self.model.config().vocab_size
    }
    fn experts(&self) -> usize {
        self.model.config().num_experts
    }
}

#[cfg(test)]
#[path = "learner_tests.rs"]
mod tests;
