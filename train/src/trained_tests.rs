//! A network and its optimizer in the loop: small ones, bit for bit, and the hybrid where it breaks.

use super::*;
use crate::checkpoint::{RunDir, candidates};
use crate::config::RunConfig;
use crate::data::Corpus;
use crate::learner::{Hybrid, Observer};
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
    fn loss(&self, batch: &Feed, mut observer: Option<&mut dyn Observer>) -> Result<Loss> {
        let mut run = || -> engine::Result<Loss> {
            let tokens = batch.tokens.reshape(&[batch.targets.numel()])?.cast(DType::I64)?;
            engine::watch::place(|| "layer 1".into());
            let mut h = self.params[0].1.embedding(&tokens)?;
            if let Some(at) = self.break_at {
                h = h.affine(f64::from(at), 0.0)?;
            }
            if let Some(observer) = &mut observer {
                observer.see("blocks.0.hook_resid_post", &h)?;
            }
            let logits = h.silu()?.linear(&self.params[1].1)?.log_softmax(1)?;
            let picked = logits.gather(1, &batch.targets.reshape(&[batch.targets.numel(), 1])?)?;
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
fn here() -> nn::Placement {
    nn::Placement::cpu(DType::F32)
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
    let step = |micro| Step { step: 1, micro, lr: 0.01, optim: &config.optim };
    let na = a.step(&step(3), &|m| Ok(small.batch(&corpus, 0, m as u64)), None).unwrap().grad_norm.unwrap();
    let nb = b.step(&step(1), &|_| Ok(large.batch(&corpus, 0, 0)), None).unwrap().grad_norm.unwrap();
    assert!((na - nb).abs() < 1e-5 * nb, "{na} {nb}");
    // and the update is the same, but for rounding
    for (x, y) in a.net().params.iter().zip(&b.net().params) {
        let (x, y) = (x.1.to_vec::<f32>().unwrap(), y.1.to_vec::<f32>().unwrap());
        let far = x.iter().zip(&y).filter(|(x, y)| (*x - *y).abs() > 1e-5).count();
        assert!(far == 0, "{far} of {} weights differ", x.len());
    }
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
        let step = Step { step: 1, micro: 11, lr: 0.01, optim: &config.optim };
        assert_eq!(pool.install(|| a.step(&step, &batch, None)).unwrap().losses.len(), 11);
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
    let model = Hybrid::create(&presets::smoke().model, 1, &here()).unwrap();
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

#[test]
fn norms_biases_and_decay_rates_do_not_decay_and_matrices_do() {
    let o = presets::quickstart().optim;
    let model = Hybrid::create(&presets::smoke().model, 1, &here()).unwrap();
    let (mut kept, mut decayed) = (std::collections::BTreeSet::new(), std::collections::BTreeSet::new());
    for (name, t) in model.net().params() {
        let kind = name.split('.').filter(|w| w.parse::<u32>().is_err() && *w != "model" && *w != "layers").collect::<Vec<_>>().join(".");
        if crate::groups::decays(name, t.shape(), &o.no_decay) { &mut decayed } else { &mut kept }.insert(kind);
    }
    let kept: Vec<&str> = kept.iter().map(String::as_str).collect();
    let decayed: Vec<&str> = decayed.iter().map(String::as_str).collect();
    assert_eq!(
        kept,
        [
            "input_layernorm.weight",
            "linear_attn.A_log",
            "linear_attn.dt_bias",
            "linear_attn.norm.weight",
            "mlp.shared_expert_gate.weight",
            "norm.weight",
            "post_attention_layernorm.weight",
            "self_attn.k_norm.weight",
            "self_attn.q_norm.weight",
        ]
    );
    assert_eq!(
        decayed,
        [
            "embed_tokens.weight",
            "linear_attn.conv1d.weight",
            "linear_attn.in_proj_ba.weight",
            "linear_attn.in_proj_qkvz.weight",
            "linear_attn.out_proj.weight",
            "mlp.experts.down_proj",
            "mlp.experts.gate_up_proj",
            "mlp.gate.weight",
            "mlp.shared_expert.down_proj.weight",
            "mlp.shared_expert.gate_up_proj.weight",
            "self_attn.k_proj.weight",
            "self_attn.o_proj.weight",
            "self_attn.q_proj.weight",
            "self_attn.v_proj.weight",
        ]
    );
}

#[test]
fn a_model_that_is_not_finite_is_neither_saved_nor_scored_nor_written_with() {
    let tmp = tempfile::tempdir().unwrap();
    let (corpus, config) = setup(1);
    let mut model = planted(&[("model.layers.1.linear_attn.out_proj.weight", f64::NAN)]);
    let e = model.save(tmp.path()).unwrap_err();
    assert!(matches!(&e, Error::NonFinite(m) if m.contains("`model.layers.1.linear_attn.out_proj.weight` is not finite")), "{e}");
    assert_eq!(std::fs::read_dir(tmp.path()).unwrap().count(), 0);
    let e = trainer::evaluate(&mut model, &corpus, 0..300, &config, 0).unwrap_err();
    assert!(e.exit_code() == 1 && e.to_string().contains("held-out loss is NaN: the parameter `model.layers.1"), "{e}");
    let how = Sampling { tokens: 3, temperature: 1.0, top_k: 0, top_p: 1.0, seed: 0 };
    assert!(matches!(model.sample(&[65], &how).unwrap_err(), Error::NonFinite(_)));
    let model = planted(&[]);
    model.save(tmp.path()).unwrap();
}

/// Two documents in one packed row, in each of the mixers.
#[test]
fn packed_documents_do_not_see_each_other() {
    let mut config = presets::smoke().model;
    config.router_aux_loss_coef = 0.0;
    for sliding in [false, true] {
        if sliding {
            config.layer_types =
                vec![nn::LayerType::LinearAttention, nn::LayerType::SlidingAttention, nn::LayerType::FullAttention, nn::LayerType::LinearAttention];
            config.sliding_window = 5;
        }
        let model = Hybrid::create(&config, 1, &here()).unwrap();
        let corpus =
            Corpus::from_documents(&["It was the whiteness of the whale ", "that above all things appalled me.", "Call me Ishmael. Some years ago"]);
        let sampler = crate::data::Sampler::new(&corpus, 0..corpus.len(), 1, 2, 45, 1, crate::data::Packing::Documents).unwrap();
        let packed = (0..).map(|step| sampler.batch(&corpus, step, 0)).find(|b| b.cu_seqlens.as_ref().unwrap().len() > 4).unwrap();
        let cu = packed.cu_seqlens.clone().unwrap();
        let nll = |b: &Batch| model.net().loss(&model.feed(b).unwrap(), None).unwrap().nll.item().unwrap() * b.targets.len() as f64;
        let apart: f64 = cu
            .windows(2)
            .map(|w| {
                let range = w[0] as usize..w[1] as usize;
                let (tokens, targets) = (packed.tokens[range.clone()].to_vec(), packed.targets[range].to_vec());
                nll(&Batch { rows: 1, time: tokens.len(), tokens, targets, cu_seqlens: None })
            })
            .sum();
        assert!((nll(&packed) - apart).abs() < 1e-5 * apart, "{} packed, {apart} apart", nll(&packed));
        let run_together = Batch { cu_seqlens: None, ..packed };
        assert!((nll(&run_together) - apart).abs() > 1e-4 * apart, "without bounds the documents would see each other");
    }
}
