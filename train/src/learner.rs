//! A network on the engine, with AdamW, as a [`Learner`].

use crate::config::Optim;
use crate::data::Batch;
use crate::metrics::Scalars;
use crate::optim::AdamW;
use crate::trainer::{Learner, Sampling};
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

fn scalar(t: &Tensor) -> Result<f64> {
    t.item().map_err(Error::from)
}

/// The values of a tap as f32, when they are numbers.
fn values(t: &Tensor) -> Option<Vec<f32>> {
    t.detach().cast(DType::F32).and_then(|t| t.to_vec::<f32>()).ok()
}

impl<N: Network> Learner for Trained<N> {
    fn step(&mut self, batches: &[Batch], mut observed: Option<&mut Scalars>) -> Result<Vec<f64>> {
        let (net, experts) = (&self.net, self.net.experts());
        let seen = Mutex::new(Scalars::new());
        let one = |(i, batch): (usize, &Batch)| -> Result<(f64, Grads)> {
            // what this thread was waiting for when it took this task up may have switched recording off
            engine::enable_grad(|| {
                let mut grads = Grads::new();
                let loss = if i == 0 && observed.is_some() {
                    let mut scalars = seen.lock().unwrap_or_else(|e| e.into_inner());
                    let mut tap = |name: &str, t: &Tensor| {
                        if let Some(v) = values(t) {
                            observe::summarise(&mut scalars, name, t.shape(), &v, experts);
                        }
                    };
                    let loss = net.loss(batch, Some(&mut tap))?;
                    let auxiliary = scalar(&loss.objective)? - scalar(&loss.nll)?;
                    scalars.insert("loss_auxiliary".into(), auxiliary);
                    loss
                } else {
                    net.loss(batch, None)?
                };
                let (nll, objective) = (scalar(&loss.nll)?, scalar(&loss.objective)?);
                // A loss that isn't finite is for the caller to report; its gradients would only hide where it began.
                if !(nll.is_finite() && objective.is_finite()) {
                    return Ok((objective, grads));
                }
                let share = 1.0 / batches.len() as f64;
                let weighted = if batches.len() == 1 { loss.objective } else { loss.objective.affine(share, 0.0)? };
                weighted.backward_into(&mut grads)?;
                Ok((nll, grads))
            })
        };
        let done: Vec<Result<(f64, Grads)>> = batches.par_iter().enumerate().with_max_len(1).map(one).collect();
        if let Some(observed) = &mut observed {
            **observed = seen.into_inner().unwrap_or_else(|e| e.into_inner());
        }
        let mut losses = Vec::with_capacity(batches.len());
        for done in done {
            let (loss, grads) = done?;
            losses.push(loss);
            self.grads.merge(grads)?;
        }
        Ok(losses)
    }

    fn update(&mut self, step: u64, lr: f64, optim: &Optim) -> Result<f64> {
        let grads = std::mem::take(&mut self.grads);
        let params = self.net.params();
        let state = match &mut self.optim {
            Some(state) => state,
            None => self.optim.insert(AdamW::new(&params)?),
        };
        state.step(&params, &grads, step, lr, optim)
    }

    fn nll(&mut self, batches: &[Batch]) -> Result<Vec<f64>> {
        let net = &self.net;
        let one = |batch: &Batch| Ok(scalar(&engine::no_grad(|| net.loss(batch, None))?.nll)? * batch.targets.len() as f64);
        batches.par_iter().with_max_len(1).map(one).collect()
    }

    fn sample(&mut self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>> {
        engine::no_grad(|| self.net.generate(prompt, how))
    }

    fn diagnose(&mut self, batch: &Batch) -> String {
        for (name, t) in self.net.params() {
            if values(t).is_some_and(|v| v.iter().any(|x| !x.is_finite())) {
                return format!("the parameter `{name}` is not finite");
            }
        }
        let mut first: Option<String> = None;
        let mut tap = |name: &str, t: &Tensor| {
            // A log-decay of minus infinity forgets everything, which is no fault; NaN always is.
            let bad = |x: &f32| x.is_nan() || (x.is_infinite() && !name.ends_with("log_decay"));
            if first.is_none() && values(t).is_some_and(|v| v.iter().any(bad)) {
                first = Some(name.to_string());
            }
        };
        match engine::no_grad(|| self.net.loss(batch, Some(&mut tap))) {
            Err(e) => format!("and looking for where it began failed: {e}"),
            Ok(_) => {
                first.map_or("it began in `lm_head` or the loss, after the last tensor that is watched".into(), |n| format!("it began at `{n}`"))
            }
        }
    }

    fn save(&self, dir: &Path) -> Result<()> {
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
        serde_json::to_string_pretty(self.model.config()).map_err(|e| Error::Model(e.to_string()))
    }
    /// The model.
    pub fn model(&self) -> &nn::Decoder {
        &self.model
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
        Ok(Loss { objective: l.objective, nll: l.nll })
    }
    fn generate(&self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>> {
        let sampler = nn::Sampler { temperature: how.temperature, top_k: how.top_k, top_p: how.top_p, seed: how.seed };
        nn::Generator::new(&self.model).generate(prompt, how.tokens, &sampler, |_| {}).map_err(Error::from)
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
mod tests {
    use super::*;
    use crate::checkpoint::{RunDir, find};
    use crate::config::RunConfig;
    use crate::data::Corpus;
    use crate::{presets, trainer};

    /// Embedding, SiLU, output matrix: the smallest network that goes through tape, optimizer and files.
    struct Tiny {
        params: [(&'static str, Tensor); 2],
        break_at: Option<f32>,
    }
    fn tiny() -> Tiny {
        let make = |shape: &[usize], stream| Tensor::randn(shape, DType::F32, &engine::Device::cpu(), 5, stream).unwrap().affine(0.3, 0.0).unwrap();
        Tiny { params: [("embed", make(&[128, 16], 0).requires_grad()), ("head", make(&[128, 16], 1).requires_grad())], break_at: None }
    }
    impl Network for Tiny {
        fn params(&self) -> Vec<(&str, &Tensor)> {
            self.params.iter().map(|(n, t)| (*n, t)).collect()
        }
        fn loss(&self, batch: &Batch, mut tap: Option<Tap>) -> Result<Loss> {
            let mut run = || -> engine::Result<Loss> {
                let ids = |v: &[u32]| Tensor::from_vec(v.iter().map(|&t| i64::from(t)).collect::<Vec<_>>(), &[v.len()]);
                let mut h = self.params[0].1.embedding(&ids(&batch.tokens)?)?;
                if let Some(at) = self.break_at {
                    h = h.affine(f64::from(at), 0.0)?;
                }
                if let Some(tap) = &mut tap {
                    tap("blocks.0.hook_resid_post", &h);
                }
                let logits = h.silu()?.linear(&self.params[1].1)?.log_softmax(1)?;
                let picked = logits.gather(1, &ids(&batch.targets)?.reshape(&[batch.targets.len(), 1])?)?;
                let nll = picked.mean(&[0, 1], false)?.neg()?;
                Ok(Loss { objective: nll.clone(), nll })
            };
            run().map_err(Error::from)
        }
        fn generate(&self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>> {
            Ok(vec![prompt[0]; how.tokens])
        }
        fn save(&self, dir: &Path) -> Result<()> {
            let bytes: Vec<u8> = self.params.iter().flat_map(|p| p.1.to_vec::<f32>().unwrap()).flat_map(f32::to_le_bytes).collect();
            std::fs::write(dir.join(checkpoint::MODEL), bytes).map_err(Error::io("writing", dir))
        }
        fn load(&mut self, dir: &Path) -> Result<()> {
            let bytes = std::fs::read(dir.join(checkpoint::MODEL)).unwrap();
            let all: Vec<f32> = bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
            for (part, p) in all.chunks_exact(128 * 16).zip(&self.params) {
                p.1.assign(&Tensor::from_vec(part, &[128, 16]).unwrap()).unwrap();
            }
            Ok(())
        }
        fn vocab_size(&self) -> usize {
            128
        }
    }
    fn setup(steps: u64) -> (Corpus, RunConfig) {
        let mut c = presets::smoke();
        c.train.steps = Some(steps);
        c.train.accumulate = 2;
        c.checkpoint.every = 7;
        c.optim.lr = 0.05;
        (Corpus::from_documents(&["It was the whiteness of the whale that above all things appalled me. ".repeat(50)]), c)
    }

    #[test]
    fn learns_on_the_engine_and_resumes_bit_for_bit() {
        let tmp = tempfile::tempdir().unwrap();
        let (corpus, config) = setup(40);
        let whole = RunDir::open(&tmp.path().join("whole"), false).unwrap();
        let mut a = Trained::new(tiny());
        let s = trainer::train(&mut a, &corpus, &config, &whole, None).unwrap();
        assert!(s.held_out.unwrap() < 4.0, "{s:?}");
        let half = RunDir::open(&tmp.path().join("half"), false).unwrap();
        let stop = RunConfig { checkpoint: crate::config::Checkpoint { every: 7, keep: 9 }, ..config.clone() };
        trainer::train(&mut Trained::new(tiny()), &corpus, &stop, &half, None).unwrap();
        let newest = tmp.path().join("half/checkpoints/step-00000021");
        let mut b = Trained::new(tiny());
        let again = trainer::train(&mut b, &corpus, &config, &half, Some(&newest)).unwrap();
        assert_eq!(s.held_out.unwrap().to_bits(), again.held_out.unwrap().to_bits());
        for (x, y) in a.net().params.iter().zip(&b.net().params) {
            assert_eq!(x.1.to_vec::<f32>().unwrap(), y.1.to_vec::<f32>().unwrap());
        }
        assert!(find(whole.path()).unwrap().join(checkpoint::OPTIMIZER).is_file());
        let metrics = std::fs::read_to_string(whole.path().join("metrics.jsonl")).unwrap();
        assert!(metrics.lines().next().unwrap().contains("blocks.0.resid_post_rms"));
    }

    #[test]
    fn accumulation_is_one_large_batch() {
        let (corpus, config) = setup(1);
        let sampler = |rows, micro| crate::data::Sampler::new(&corpus, 0..3000, 1, rows, 32, micro, Default::default()).unwrap();
        let (small, large) = (sampler(2, 3), sampler(6, 1));
        let (mut a, mut b) = (Trained::new(tiny()), Trained::new(tiny()));
        a.step(&[0, 1, 2].map(|m| small.batch(&corpus, 0, m)), None).unwrap();
        b.step(&[large.batch(&corpus, 0, 0)], None).unwrap();
        let (na, nb) = (a.update(1, 0.01, &config.optim).unwrap(), b.update(1, 0.01, &config.optim).unwrap());
        assert!((na - nb).abs() < 1e-5 * nb, "{na} {nb}");
    }

    #[test]
    fn the_first_tensor_that_is_not_finite_is_named() {
        let (corpus, config) = setup(3);
        let tmp = tempfile::tempdir().unwrap();
        let run = RunDir::open(&tmp.path().join("a"), false).unwrap();
        let mut net = Trained::new(Tiny { break_at: Some(f32::NAN), ..tiny() });
        let e = trainer::train(&mut net, &corpus, &config, &run, None).unwrap_err();
        assert!(e.exit_code() == 1 && e.to_string().contains("`blocks.0.hook_resid_post`"), "{e}");
        let net = tiny();
        net.params[1].1.assign(&Tensor::full(f64::NAN, &[128, 16], DType::F32, &engine::Device::cpu()).unwrap()).unwrap();
        let run = RunDir::open(&tmp.path().join("b"), false).unwrap();
        let e = trainer::train(&mut Trained::new(net), &corpus, &config, &run, None).unwrap_err();
        assert!(e.to_string().contains("`head`"), "{e}");
    }
}
