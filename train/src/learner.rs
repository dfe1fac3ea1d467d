//! What training asks of a network, and the hybrid decoder as one.

use crate::feed::Feed;
use crate::tasks::{self, Answer};
pub use crate::trained::Trained;
use crate::trainer::Sampling;
use crate::{Error, Result};
use engine::{DType, Device, Tensor};
pub use nn::Observer;
use nn::{Caches, Generator, Sampler, State};
use std::path::Path;

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
    /// The loss over a batch; `observer` sees, and may replace, named tensors on the way.
    fn loss(&self, batch: &Feed, observer: Option<&mut dyn Observer>) -> Result<Loss>;
    /// What is answered at a batch's labels, in order.
    fn answers(&self, _batch: &Feed) -> Result<Vec<Answer>> {
        Err(Error::Model("this network can not be evaluated by tasks".into()))
    }
    /// Continues a prompt; returns the new tokens.
    fn generate(&self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>>;
    /// Writes `model.safetensors` and `config.json` into `dir`.
    fn save(&self, dir: &Path) -> Result<()>;
    /// Reads parameters of the same configuration back, in place.
    fn load(&mut self, dir: &Path) -> Result<()>;
    /// One past the largest token.
    fn vocab_size(&self) -> usize;
    /// The dtype of its products.
    fn compute(&self) -> DType {
        DType::F32
    }
    /// Routed experts in a layer (0: none).
    fn experts(&self) -> usize {
        0
    }
}

/// The hybrid decoder.
pub struct Hybrid {
    model: nn::Decoder,
}

impl Hybrid {
    /// A new model.
    pub fn create(config: &nn::ModelConfig, seed: u64, place: &nn::Placement) -> Result<Trained<Hybrid>> {
        if place.device == Device::cpu() {
            // weights, gradients and two moments, in f32
            config.fits(16, nn::ModelConfig::SMALLER)?;
        }
        Ok(Trained::new(Hybrid { model: nn::Decoder::on(config, seed, place)? }))
    }
    /// The model of a checkpoint.
    pub fn open(dir: &Path, place: &nn::Placement) -> Result<Trained<Hybrid>> {
        Ok(Trained::new(Hybrid { model: nn::Decoder::open_on(dir, place)? }))
    }
    /// The model's `config.json`.
    pub fn config_json(&self) -> Result<String> {
        serde_json::to_string_pretty(&self.model.config().to_json()?).map_err(|e| Error::Model(e.to_string()))
    }
    /// The model.
    pub fn model(&self) -> &nn::Decoder {
        &self.model
    }
    /// Continues prompts side by side, each with the text that it would get alone; `each` token is shown with the number of its prompt as it comes, and
    /// ends that text by saying false. `read` is told how many tokens of the prompts were read. Logits that are not numbers are an error.
    pub fn write(&self, prompts: &[Vec<u32>], how: &Sampling, read: impl FnMut(usize), each: impl FnMut(usize, u32) -> Result<bool>) -> Result<()> {
        let (contexts, logits) = self.read(prompts, None, read)?;
        go_on(&mut Generator::on(&self.model, Caches::join(contexts)?), logits, how, each)
    }
    /// Reads prompts, each on top of what `from` remembers, if anything; an empty one adds nothing to that. What is remembered after each, and the logits after its
    /// last token. `read` is told how many tokens of the prompts were read; a prompt that is the one before it is not read again.
    pub fn read(&self, prompts: &[Vec<u32>], from: Option<&State>, mut read: impl FnMut(usize)) -> Result<(Vec<Caches>, Vec<Vec<f64>>)> {
        let (mut contexts, mut logits, mut done): (Vec<Caches>, Vec<Vec<f64>>, usize) = (vec![], vec![], 0);
        for (i, prompt) in prompts.iter().enumerate() {
            if let (Some(context), Some(last)) = (contexts.last(), logits.last())
                && prompts[i - 1] == *prompt
            {
                let again = (context.copy()?, last.clone());
                contexts.push(again.0);
                logits.push(again.1);
                done += prompt.len();
                read(done);
                continue;
            }
            let mut context = match from {
                Some(state) => Generator::on(&self.model, state.caches.copy()?),
                None => Generator::new(&self.model),
            };
            let mut last = from.map_or(vec![], |state| state.logits.clone());
            for piece in prompt.chunks(nn::CHUNK) {
                last = context.feed(piece)?;
                done += piece.len();
                read(done);
            }
            logits.push(last);
            contexts.push(context.into_caches());
        }
        Ok((contexts, logits))
    }
}

/// Writes on from what `context` has read, whose last logits these are, as [`Hybrid::write`] does. What is drawn last of a text is not read.
pub fn go_on(context: &mut Generator, mut logits: Vec<Vec<f64>>, how: &Sampling, mut each: impl FnMut(usize, u32) -> Result<bool>) -> Result<()> {
    let mut rows: Vec<usize> = (0..logits.len()).collect();
    for i in 0..how.tokens {
        let (mut next, mut kept) = (vec![], vec![]);
        for (place, (row, l)) in rows.iter().zip(&logits).enumerate() {
            if l.iter().any(|l| l.is_nan()) {
                return Err(Error::NonFinite(format!("the model gives no numbers after {i} tokens")));
            }
            // texts of one prompt differ
            let seed = how.seed.wrapping_add(*row as u64);
            let sampler = Sampler { temperature: how.temperature, top_k: how.top_k, top_p: how.top_p, seed };
            let token = sampler.draw(l, i as u64) as u32;
            if each(*row, token)? {
                next.push(token);
                kept.push(place);
            }
        }
        if next.is_empty() || i + 1 == how.tokens {
            break;
        }
        if kept.len() < rows.len() {
            rows = kept.iter().map(|k| rows[*k]).collect();
            context.caches().keep(&kept)?;
        }
        logits = context.step(&next)?;
    }
    Ok(())
}

impl Network for Hybrid {
    fn params(&self) -> Vec<(&str, &Tensor)> {
        self.model.params().iter().map(|p| (p.name.as_str(), &p.tensor)).collect()
    }
    fn loss(&self, batch: &Feed, observer: Option<&mut dyn Observer>) -> Result<Loss> {
        let l = self.model.loss(&batch.tokens, &batch.targets, batch.cu_seqlens.as_ref(), observer)?;
        let auxiliary = [("loss_balancing", l.load_balancing), ("loss_z", l.router_z)];
        Ok(Loss { objective: l.objective, nll: l.nll, auxiliary: auxiliary.into_iter().filter_map(|(name, t)| Some((name, t?))).collect() })
    }
    fn answers(&self, batch: &Feed) -> Result<Vec<Answer>> {
        let hidden = self.model.forward(&batch.tokens, batch.cu_seqlens.as_ref(), None, None)?.0;
        tasks::answers(&self.model, &hidden, &batch.targets.to_vec::<i64>()?)
    }
    fn generate(&self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>> {
        let mut out = vec![];
        let each = |_, token| {
            out.push(token);
            Ok(true)
        };
        self.write(&[prompt.to_vec()], how, |_| {}, each)?;
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
    fn compute(&self) -> DType {
        self.model.place().compute
    }
    fn experts(&self) -> usize {
        self.model.config().num_experts
    }
}
