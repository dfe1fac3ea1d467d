//! `tidegate bench step`: whole training steps on random tokens.

use super::Common;
use super::clock::{self, median};
use super::table::{digits, memory, table};
use crate::cli::device::describe;
use crate::cli::out;
use crate::cli::train::layers;
use crate::config::RunConfig;
use crate::data::Batch;
use crate::learner::Hybrid;
use crate::progress::say;
use crate::trainer::{Learner, Step};
use crate::{Error, Result};
use engine::Device;
use serde_json::json;
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
    /// On a GPU, launch kernels one by one instead of replaying each step as a whole
    #[arg(long)]
    no_replay: bool,
    #[command(flatten)]
    common: Common,
}

/// Micro-batches of random tokens.
fn batches(config: &RunConfig) -> Vec<Batch> {
    let [b, t] = [config.data.batch, config.data.seq_len];
    let batch = |i: usize| {
        let draws = engine::rng::uniform(config.seed, i as u64, b * (t + 1));
        let ids: Vec<u32> = draws.iter().map(|x| (x * config.model.vocab_size as f64) as u32).collect();
        let part = |from: usize| ids.chunks(t + 1).flat_map(|row| row[from..from + t].iter().copied()).collect::<Vec<u32>>();
        Batch { tokens: part(0), targets: part(1).into_iter().map(i64::from).collect(), rows: b, time: t, cu_seqlens: None }
    };
    (0..config.train.accumulate).map(batch).collect()
}

/// Milliseconds of steps, as the trainer takes them; the most memory; the first loss and the last.
struct Measured {
    steps: Vec<f64>,
    peak: usize,
    losses: [f64; 2],
}

fn measure(model: &mut dyn Learner, config: &RunConfig, device: &Device, reps: Option<usize>) -> Result<Measured> {
    let (batches, mut n) = (batches(config), 0);
    let mut step = || -> Result<(f64, f64)> {
        n += 1;
        let work = Step { step: n, micro: batches.len(), lr: config.optim.lr * config.optim.end, optim: &config.optim };
        let start = Instant::now();
        let done = model.step(&work, &|i| Ok(batches[i].clone()), None)?;
        done.grad_norm.map_err(|e| Error::NonFinite(format!("step {n}: {e}; what was timed is no training")))?;
        Ok((start.elapsed().as_secs_f64() * 1e3, done.losses.iter().sum::<f64>() / done.losses.len() as f64))
    };
    clock::reset_peak(device);
    let (_, first) = step()?;
    let (ms, mut last) = step()?;
    let peak = clock::peak(device);
    let mut steps = vec![];
    for _ in 0..reps.unwrap_or((8e3 / ms.max(1.0)).clamp(3.0, 20.0) as usize) {
        let (ms, loss) = step()?;
        steps.push(ms);
        last = loss;
    }
    Ok(Measured { steps, peak, losses: [first, last] })
}

pub(super) fn run(args: &Args) -> Result<()> {
    let config = layers(&args.what, &args.set)?.resolve()?.config;
    args.common.check()?;
    let place = args.common.place.open(config.train.dtype)?;
    let (device, t) = (&place.device, config.data.seq_len);
    let (total, active) = config.model.parameters();
    let tokens = config.data.batch * t * config.train.accumulate;
    let flops = config.model.flops_per_token(t);
    say(&format!("making {total} parameters"));
    let mut model = Hybrid::create(&config.model, config.seed, &place)?.replays(!args.no_replay);
    let mut m = measure(&mut model, &config, device, args.common.reps())?;

    let (ms, reps) = (median(&mut m.steps), m.steps.len());
    let min = m.steps[0];
    let per_s = tokens as f64 / (ms * 1e-3);
    let achieved = per_s * flops / 1e12;
    let top = model.peak_flops().map(|p| p / 1e12);
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
    out(&format!("\nloss {:.4} at first, {:.4} at last (nats a token)", m.losses[0], m.losses[1]))?;
    if let Some(p) = top {
        out(&format!("utilisation: of {p} TFLOP/s, the card's peak in bf16"))?;
    }
    args.common.write(&json!({ "bench": "step", "version": env!("CARGO_PKG_VERSION"), "name": config.name, "device": describe(device),
        "dtype": place.compute.to_string(), "parameters": total, "active_parameters": active, "seq_len": t, "batch": config.data.batch,
        "accumulate": config.train.accumulate, "ms": ms, "min_ms": min, "reps": reps, "tokens_per_s": per_s, "flops_per_token": flops,
        "tflops_per_s": achieved, "peak_tflops": top, "utilisation": used, "peak_bytes": m.peak, "losses": m.losses }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files say how large the models are; the models' own counts agree.
    #[test]
    fn goal_models_are_as_large_as_their_files_say() {
        for (name, total, active) in [("dense-350m", 340e6..380e6, 340e6..380e6), ("moe-1b", 0.95e9..1.08e9, 190e6..210e6)] {
            let path = format!("{}/../benches/configs/{name}.toml", env!("CARGO_MANIFEST_DIR"));
            let c = layers(&path, &[]).unwrap().resolve().unwrap().config;
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
        let c = layers("smoke", &set.map(String::from)).unwrap().resolve().unwrap().config;
        let mut model = Hybrid::create(&c.model, 1, &nn::Placement::cpu(engine::DType::F32)).unwrap();
        let m = measure(&mut model, &c, &Device::cpu(), Some(6)).unwrap();
        assert_eq!(m.steps.len(), 6);
        assert!(m.losses[1] < m.losses[0] && m.peak > 0, "{:?}", m.losses);
    }
}
