//! What training asks of a network, and the hybrid decoder as one.

use crate::feed::Feed;
pub use crate::trained::Trained;
use crate::trainer::Sampling;
use crate::{Error, Result};
use engine::{DType, Device, Tensor};
pub use nn::Observer;
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
            config.fits(16)?;
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
    fn loss(&self, batch: &Feed, observer: Option<&mut dyn Observer>) -> Result<Loss> {
        let l = self.model.loss(&batch.tokens, &batch.targets, batch.cu_seqlens.as_ref(), observer)?;
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
    fn compute(&self) -> DType {
        self.model.place().compute
    }
    fn experts(&self) -> usize {
        self.model.config().num_experts
    }
}
