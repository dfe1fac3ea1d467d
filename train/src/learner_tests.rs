//! A network and its optimizer in the loop: small ones, bit for bit, and the hybrid where it breaks.

use super::*;
use crate::checkpoint::{RunDir, candidates};
use crate::config::RunConfig;
use crate::data::Corpus;
use crate::{presets, trainer};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// Embedding, SiLU, output matrix: the smallest network that goes through tape, optimizer and files.
struct Tiny {
    params: [(&'static str, Tensor); 2],
    break_at: Option<f32>,
    /// How many losses were computed.
    done: Arc<AtomicUsize>,
}
fn tiny() -> Tiny {
    let make = |shape: &[usize], stream| Tensor::randn(shape, DType::F32, &engine::Device::cpu(), 5, stream).unwrap().affine(0.3, 0.0).unwrap();
    Tiny {
        params: [("embed", make(&[128, 16], 0).requires_grad()), ("head", make(&[128, 16], 1).requires_grad())],
        break_at: None,
        done: Arc::default(),
    }
}
impl Network for Tiny {
    fn params(&self) -> Vec<(&str, &Tensor)> {
        self.params.iter().map(|(n, t)| (*n, t)).collect()
    }
    fn loss(&self, batch: &Batch, mut tap: Option<Tap>) -> Result<Loss> {
        let mut run = || -> engine::Result<Loss> {
            let ids = |v: &[u32]| Tensor::from_vec(v.iter().map(|&t| i64::from(t)).collect::<Vec<_>>(), &[v.len()]);
            engine::watch::place(|| "layer 1".into());
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
            Ok(Loss { objective: nll.clone(), auxiliary: vec![("loss_other", nll.detach())], nll })
        };
        let loss = run().map_err(Error::from);
        self.done.fetch_add(1, Relaxed);
        loss
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
    let state = trainer::load(&mut b, &newest).unwrap();
    let again = trainer::train(&mut b, &corpus, &config, &half, Some(state)).unwrap();
    assert_eq!(s.held_out.unwrap().to_bits(), again.held_out.unwrap().to_bits());
    for (x, y) in a.net().params.iter().zip(&b.net().params) {
        assert_eq!(x.1.to_vec::<f32>().unwrap(), y.1.to_vec::<f32>().unwrap());
    }
    assert!(candidates(whole.path()).unwrap()[0].join(checkpoint::OPTIMIZER).is_file());
    let metrics = std::fs::read_to_string(whole.path().join("metrics.jsonl")).unwrap();
    let first = metrics.lines().next().unwrap();
    for key in ["blocks.0.resid_post_rms", "loss_auxiliary", "loss_other", "embed.grad_norm", "head.update_norm"] {
        assert!(first.contains(&format!("\"{key}\":")), "{key} in {first}");
    }
}

#[test]
fn accumulation_is_one_large_batch() {
    let (corpus, config) = setup(1);
    let sampler = |rows, micro| crate::data::Sampler::new(&corpus, 0..3000, 1, rows, 32, micro, Default::default()).unwrap();
    let (small, large) = (sampler(2, 3), sampler(6, 1));
    let (mut a, mut b) = (Trained::new(tiny()), Trained::new(tiny()));
    a.step(3, &|m| Ok(small.batch(&corpus, 0, m as u64)), None).unwrap();
    b.step(1, &|_| Ok(large.batch(&corpus, 0, 0)), None).unwrap();
    let (na, nb) = (a.update(1, 0.01, &config.optim, None).unwrap(), b.update(1, 0.01, &config.optim, None).unwrap());
    assert!((na - nb).abs() < 1e-5 * nb, "{na} {nb}");
}

#[test]
fn micro_batches_are_taken_up_as_many_at_a_time_as_there_are_threads() {
    let (corpus, config) = setup(1);
    let sampler = crate::data::Sampler::new(&corpus, 0..3000, 1, 2, 32, 11, Default::default()).unwrap();
    let weights = [1usize, 2, 4].map(|threads| {
        let mut a = Trained::new(tiny());
        let done = a.net().done.clone();
        let batch = |m: usize| {
            assert!(done.load(Relaxed) >= m / threads * threads, "micro-batch {m} was made before those ahead of it were done");
            Ok(sampler.batch(&corpus, 0, m as u64))
        };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        assert_eq!(pool.install(|| a.step(11, &batch, None)).unwrap().len(), 11);
        a.update(1, 0.01, &config.optim, None).unwrap();
        a.net().params.iter().flat_map(|p| p.1.to_vec::<f32>().unwrap()).map(f32::to_bits).collect::<Vec<_>>()
    });
    assert!(weights[0] == weights[1] && weights[0] == weights[2]);
}

fn stopped(net: &mut dyn Learner) -> String {
    let (corpus, config) = setup(3);
    let tmp = tempfile::tempdir().unwrap();
    let run = RunDir::open(tmp.path(), false).unwrap();
    let e = trainer::train(net, &corpus, &config, &run, None).unwrap_err();
    assert_eq!(e.exit_code(), 1);
    // what was known of the step that failed is kept
    let metrics = std::fs::read_to_string(tmp.path().join("metrics.jsonl")).unwrap();
    let last: serde_json::Value = serde_json::from_str(metrics.lines().last().unwrap()).unwrap();
    assert_eq!((last["step"].as_u64(), last["stopped"].as_str()), (Some(1), Some(e.to_string().as_str())), "{last}");
    assert!(last.as_object().unwrap().keys().any(|k| k.starts_with("blocks.")), "{last}");
    e.to_string()
}

#[test]
fn the_op_where_numbers_stop_being_finite_is_named() {
    let e = stopped(&mut Trained::new(Tiny { break_at: Some(f32::NAN), ..tiny() }));
    assert!(e.contains("the first NaN came out of `affine` in `layer 1` (forward)"), "{e}");
    let net = tiny();
    net.params[1].1.assign(&Tensor::full(f64::NAN, &[128, 16], DType::F32, &engine::Device::cpu()).unwrap()).unwrap();
    let e = stopped(&mut Trained::new(net));
    assert!(e.contains("the parameter `head` is not finite"), "{e}");
}

/// The hybrid, with some parameters set to a number.
fn planted(values: &[(&str, f64)]) -> Trained<Hybrid> {
    let model = Hybrid::create(&presets::smoke().model, 1).unwrap();
    for (name, value) in values {
        let p = &model.net().model().params().iter().find(|p| p.name == *name).unwrap_or_else(|| panic!("no {name}")).tensor;
        p.assign(&Tensor::full(*value, p.shape(), DType::F32, p.device()).unwrap()).unwrap();
    }
    model
}

#[test]
fn a_layer_of_the_hybrid_is_named_in_the_forward_and_in_the_backward() {
    let e = stopped(&mut planted(&[("model.layers.2.linear_attn.in_proj_qkvz.weight", 3e38)]));
    assert!(e.contains("the loss is") && e.contains("came out of `matmul` in `blocks.2.attn` (forward)"), "{e}");
    // its mixer gives zero times much in the forward, and the gradient times much in the backward
    let e = stopped(&mut planted(&[
        ("model.layers.2.linear_attn.norm.weight", 0.0),
        ("model.layers.2.linear_attn.out_proj.weight", 3e38),
        ("model.norm.weight", 1e4),
    ]));
    assert!(e.contains("gradients of") && e.contains("came out of `matmul` in `blocks.2.attn` (backward)"), "{e}");
}
