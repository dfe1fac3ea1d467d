//! `tidegate bench step`: whole training steps on random tokens.

use super::Common;
use super::clock::{self, median};
use super::table::{digits, memory, table};
use crate::cli::device::describe;
use crate::cli::out;
use crate::config::{Layers, RunConfig};
use crate::progress::say;
use crate::{Error, Result, groups, presets};
use cuda::Cuda;
use engine::{DType, Device, Grads, Tensor};
use nn::Decoder;
use ops::adamw::{AdamWMany, GlobalNorm, adamw_many, global_norm};
use serde_json::json;
use std::path::Path;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  tidegate bench step smoke
  tidegate bench step benches/configs/dense-350m.toml --device cuda
  tidegate bench step benches/configs/moe-1b.toml --set data.batch=8 --json step.json";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// A preset or a TOML file: its model, data.seq_len, data.batch, train.accumulate and optimizer are used, its text is not
    #[arg(value_name = "PRESET|TOML", default_value = "quickstart")]
    what: String,
    /// Set one value, as in --set data.batch=8; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    common: Common,
}

/// Peak dense bf16 TFLOP/s by the card's name, where NVIDIA's data sheets leave no doubt which card it is.
fn peak_tflops(name: &str) -> Option<f64> {
    // PCIe and NVL cards of the same names are slower
    let sxm = |card: &str| name.contains(card) && !name.contains("PCIe") && !name.contains("NVL");
    match name {
        _ if sxm("H100") || sxm("H200") => Some(989.4),
        _ if name.contains("A100") => Some(312.0),
        _ => None,
    }
}

fn config(what: &str, set: &[String]) -> Result<RunConfig> {
    let path = Path::new(what);
    let mut layers = if presets::NAMES.contains(&what) || !(path.is_file() || path.extension().is_some_and(|e| e == "toml")) {
        Layers::preset(&presets::by_name(what)?)?
    } else {
        let base = Layers::base_of(path)?.unwrap_or_else(|| "quickstart".into());
        let mut layers = Layers::preset(&presets::by_name(&base)?)?;
        layers.file(path)?;
        layers
    };
    layers.set(set)?;
    Ok(layers.resolve()?.config)
}

/// A model with its optimizer and a step's tokens.
struct Trainer<'a> {
    config: &'a RunConfig,
    model: Decoder,
    moments: [Vec<Tensor>; 2],
    op: AdamWMany,
    /// Tokens and targets of each micro-batch.
    batches: Vec<[Tensor; 2]>,
    steps: u64,
}

impl<'a> Trainer<'a> {
    fn new(config: &'a RunConfig, place: &nn::Placement) -> Result<Trainer<'a>> {
        let model = Decoder::on(&config.model, config.seed, place)?;
        let device = &place.device;
        let zeros = || model.params().iter().map(|p| Tensor::zeros(p.tensor.shape(), DType::F32, device)).collect::<engine::Result<Vec<_>>>();
        let o = &config.optim;
        let decay = |p: &nn::Param| if groups::decays(&p.name, p.tensor.shape(), &o.no_decay) { o.weight_decay } else { 0.0 };
        let weight_decay = model.params().iter().map(decay).collect();
        let op = AdamWMany { beta1: o.beta1, beta2: o.beta2, eps: o.eps, weight_decay, shadows: false };
        let [b, t] = [config.data.batch, config.data.seq_len];
        let batch = |i: usize| -> engine::Result<[Tensor; 2]> {
            let draws = engine::rng::uniform(config.seed, i as u64, b * (t + 1));
            let ids: Vec<i64> = draws.iter().map(|x| (x * config.model.vocab_size as f64) as i64).collect();
            let part = |from: usize| ids.chunks(t + 1).flat_map(|row| row[from..from + t].iter().copied()).collect::<Vec<i64>>();
            Ok([Tensor::from_slice(&part(0), &[b, t], device)?, Tensor::from_slice(&part(1), &[b * t], device)?])
        };
        let batches = (0..config.train.accumulate).map(batch).collect::<engine::Result<_>>()?;
        let moments = [zeros()?, zeros()?];
        Ok(Trainer { config, model, moments, op, batches, steps: 0 })
    }

    /// One step; `lap` is called after the forward, the backward (of each micro-batch) and the update. Gives the last micro-batch's loss.
    fn step(&mut self, lap: &mut dyn FnMut(usize) -> engine::Result<()>) -> Result<Tensor> {
        let mut grads = Grads::new();
        let mut last = None;
        for [tokens, targets] in &self.batches {
            let loss = self.model.loss(tokens, targets, None, None)?;
            lap(0)?;
            last = Some(loss.nll.detach());
            loss.objective.backward_into(&mut grads)?;
            lap(1)?;
        }
        self.steps += 1;
        let params: Vec<&Tensor> = self.model.params().iter().map(|p| &p.tensor).collect();
        let grad = |p: &nn::Param| grads.take(&p.tensor).ok_or_else(|| Error::Model(format!("`{}` got no gradient", p.name)));
        let grads = self.model.params().iter().map(grad).collect::<Result<Vec<Tensor>>>()?;
        let grads: Vec<&Tensor> = grads.iter().collect();
        let o = &self.config.optim;
        let (_, coefficient) = global_norm(GlobalNorm { max_norm: o.clip, scale: 1.0 / self.batches.len() as f64 }, &grads)?;
        let schedule = self.op.schedule(o.lr * o.end, self.steps, &self.model.place().device)?;
        let [m, v] = [0, 1].map(|i| self.moments[i].iter().collect::<Vec<&Tensor>>());
        adamw_many(self.op.clone(), &params, &m, &v, &[], &schedule, &coefficient, &grads)?;
        lap(2)?;
        last.ok_or_else(|| Error::Usage("train.accumulate: expected at least 1".into()))
    }
}

/// Milliseconds of steps, and of the parts of one.
struct Measured {
    steps: Vec<f64>,
    parts: [f64; 3],
    peak: usize,
    losses: [f64; 2],
}

fn measure(trainer: &mut Trainer, device: &Device, reps: Option<usize>) -> Result<Measured> {
    let backend = device.backend();
    let wall = |start: Instant| start.elapsed().as_secs_f64() * 1e3;
    let first = trainer.step(&mut |_| Ok(()))?.item()?;
    clock::reset_peak(device);
    let start = Instant::now();
    trainer.step(&mut |_| Ok(()))?;
    backend.synchronize()?;
    let peak = clock::peak(device);
    let reps = reps.unwrap_or((8e3 / wall(start).max(1.0)).clamp(3.0, 20.0) as usize);
    let (mut steps, mut last) = (vec![], first);
    for _ in 0..reps {
        let start = Instant::now();
        let loss = trainer.step(&mut |_| Ok(()))?;
        backend.synchronize()?;
        steps.push(wall(start));
        last = loss.item()?;
    }
    let (mut parts, mut start) = ([0.0; 3], Instant::now());
    trainer.step(&mut |part| {
        backend.synchronize()?;
        parts[part] += wall(start);
        start = Instant::now();
        Ok(())
    })?;
    if !(first.is_finite() && last.is_finite()) {
        return Err(Error::NonFinite(format!("the loss is not finite: {first} at first, {last} at last; what was timed is no training")));
    }
    Ok(Measured { steps, parts, peak, losses: [first, last] })
}

pub(super) fn run(args: &Args) -> Result<()> {
    let config = config(&args.what, &args.set)?;
    args.common.check()?;
    let place = args.common.place.open()?;
    let (device, t) = (&place.device, config.data.seq_len);
    let (total, active) = config.model.parameters();
    let tokens = config.data.batch * t * config.train.accumulate;
    let flops = config.model.flops_per_token(t);
    say(&format!("making {total} parameters"));
    let mut trainer = Trainer::new(&config, &place)?;
    let mut m = measure(&mut trainer, device, args.common.reps())?;

    let (ms, reps) = (median(&mut m.steps), m.steps.len());
    let min = m.steps[0];
    let per_s = tokens as f64 / (ms * 1e-3);
    let achieved = per_s * flops / 1e12;
    let card = Cuda::of(device).ok().filter(|c| !c.is_emulator()).map(|c| c.model().to_string());
    let top = card.as_deref().and_then(peak_tflops).filter(|_| place.compute == DType::BF16);
    let used = top.map(|p| achieved / p);

    let micro = if config.train.accumulate == 1 { "micro-batch" } else { "micro-batches" };
    out(&format!("{}: {total} parameters, {active} of them active for a token", config.name))?;
    out(&format!(
        "{}, {}; a step is {} {micro} of {} x {t} random tokens; wall time of {reps} steps, each waited for\n",
        describe(device),
        place.compute,
        config.train.accumulate,
        config.data.batch
    ))?;
    let usage = used.map_or("unknown".into(), |u| format!("{:.1} %", 100.0 * u));
    let cells = [digits(ms), digits(min), format!("{per_s:.0}"), digits(flops / 1e6), digits(achieved), usage, memory(m.peak)];
    out(&table(&["ms a step", "min ms", "tokens/s", "MFLOP a token", "TFLOP/s", "utilisation", "peak memory"], &[cells.to_vec()], 0))?;
    let [f, b, u] = m.parts;
    out(&format!("\none step, part by part: forward {} ms, backward {} ms, clipping and update {} ms", digits(f), digits(b), digits(u)))?;
    out(&format!("loss {:.4} at first, {:.4} at last (nats a token)", m.losses[0], m.losses[1]))?;
    if let Some(p) = top {
        out(&format!("utilisation: of {p} TFLOP/s, the card's peak in bf16"))?;
    }
    args.common.write(&json!({ "bench": "step", "version": env!("CARGO_PKG_VERSION"), "name": config.name, "device": describe(device),
        "dtype": place.compute.to_string(), "parameters": total, "active_parameters": active, "seq_len": t, "batch": config.data.batch,
        "accumulate": config.train.accumulate, "ms": ms, "min_ms": min, "reps": reps, "tokens_per_s": per_s, "flops_per_token": flops,
        "tflops_per_s": achieved, "peak_tflops": top, "utilisation": used, "peak_bytes": m.peak,
        "parts_ms": { "forward": f, "backward": b, "update": u }, "losses": m.losses }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peaks_of_cards_that_are_known() {
        for (name, peak) in [
            ("NVIDIA H100 80GB HBM3", Some(989.4)),
            ("NVIDIA H200", Some(989.4)),
            ("NVIDIA A100-SXM4-80GB", Some(312.0)),
            ("NVIDIA H100 PCIe", None),
            ("NVIDIA H100 NVL", None),
            ("NVIDIA GeForce RTX 4090", None),
        ] {
            assert_eq!(peak_tflops(name), peak, "{name}");
        }
    }

    /// The files say how large the models are; the models' own counts agree.
    #[test]
    fn goal_models_are_as_large_as_their_files_say() {
        for (name, total, active) in [("dense-350m", 340e6..380e6, 340e6..380e6), ("moe-1b", 0.95e9..1.08e9, 190e6..210e6)] {
            let path = format!("{}/../benches/configs/{name}.toml", env!("CARGO_MANIFEST_DIR"));
            let c = config(&path, &[]).unwrap();
            let (all, some) = c.model.parameters();
            assert!(total.contains(&(all as f64)) && active.contains(&(some as f64)), "{name}: {all} {some}");
            let text = std::fs::read_to_string(&path).unwrap();
            let flops = format!("{:.1} MFLOP", c.model.flops_per_token(c.data.seq_len) / 1e6);
            for said in [all.to_string(), some.to_string(), flops] {
                assert!(text.contains(&said), "{name}.toml does not say {said}");
            }
            assert_eq!((c.data.seq_len, c.name.as_str()), (4096, name));
        }
    }

    #[test]
    fn steps_learn_their_one_batch() {
        let set = ["data.seq_len=16", "data.batch=2", "model.hidden_size=32", "model.num_hidden_layers=4", "train.accumulate=2", "optim.end=1.0"];
        let c = config("smoke", &set.map(String::from)).unwrap();
        let mut trainer = Trainer::new(&c, &nn::Placement::cpu(DType::F32)).unwrap();
        let m = measure(&mut trainer, &Device::cpu(), Some(6)).unwrap();
        assert_eq!((m.steps.len(), trainer.steps), (6, 9));
        assert!(m.losses[1] < m.losses[0] && m.peak > 0 && m.parts.iter().all(|p| *p > 0.0), "{:?}", m.losses);
    }
}
