//! `tidegate bench decode`: reading a prompt of random tokens, and greedy decoding on top of it.

use super::Common;
use super::clock;
use super::table::{digits, memory, table};
use crate::cli::device::describe;
use crate::cli::out;
use crate::cli::train::layers;
use crate::progress::say;
use crate::{Error, Result};
use nn::{Caches, Decoder, Generator, Sampler};
use serde_json::json;
use std::time::Instant;

const EXAMPLES: &str = "\
Examples:
  tidegate bench decode benches/configs/decode-small.toml
  tidegate bench decode quickstart --context 1,16k --batch 8 --profile";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// A preset or a TOML file: its model is used
    #[arg(value_name = "PRESET|TOML", default_value = "quickstart")]
    what: String,
    /// Set one value, as in --set model.num_hidden_layers=8; may be repeated
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Lengths of the prompt, in tokens; k is 1024
    #[arg(long, value_delimiter = ',', default_value = "1,1k,16k", value_parser = length)]
    context: Vec<usize>,
    /// Tokens to decode of each sequence
    #[arg(long, default_value_t = 64, value_parser = |t: &str| super::super::whole(t, 1 << 20).and_then(|n| if n > 0 { Ok(n) } else { Err("expected at least 1".to_string()) }))]
    tokens: u64,
    /// Sequences side by side
    #[arg(long, default_value_t = 1, value_parser = |t: &str| super::super::whole(t, 1 << 12).and_then(|n| if n > 0 { Ok(n) } else { Err("expected at least 1".to_string()) }))]
    batch: u64,
    /// Show where the time goes, op by op (on a GPU: that of launches)
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    common: Common,
}

/// `1`, `1k`, `16k`, …
fn length(text: &str) -> std::result::Result<usize, String> {
    let (digits, unit) = text.strip_suffix(['k', 'K']).map_or((text, 1), |d| (d, 1024));
    let n = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit)).filter(|n| (1..=1 << 24).contains(n));
    n.ok_or_else(|| "expected a number of tokens from 1 to 16384k, as in 1000 or 16k".into())
}

/// Seconds of reading the prompts (the best of some), of decoding, and the most memory.
struct Measured {
    prompt: f64,
    decode: f64,
    peak: usize,
}

fn measure(model: &Decoder, context: usize, args: &Args) -> Result<Measured> {
    let rows = args.batch as usize;
    let greedy = Sampler { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
    let prompts: Vec<Vec<u32>> = (0..rows)
        .map(|i| engine::rng::uniform(1, i as u64, context).iter().map(|x| (x * model.config().vocab_size as f64) as u32).collect())
        .collect();
    let (mut best, mut read) = (f64::INFINITY, vec![]);
    clock::reset_peak(&model.place().device);
    if args.profile {
        engine::profile::start();
    }
    for _ in 0..args.common.reps().unwrap_or(2) {
        read.clear();
        let start = Instant::now();
        for prompt in &prompts {
            let mut g = Generator::new(model);
            let logits = g.feed(prompt)?;
            read.push((greedy.draw(&logits, 0) as u32, g.into_caches()));
        }
        best = best.min(start.elapsed().as_secs_f64());
    }
    if args.profile {
        say(&format!("reading {context} tokens:\n{}", engine::profile::stop()));
    }
    let (mut last, caches): (Vec<u32>, Vec<Caches>) = read.into_iter().unzip();
    let mut g = Generator::on(model, Caches::join(caches)?);
    let mut run = |n: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..n {
            let logits = g.step(&last)?;
            last = logits.iter().map(|l| greedy.draw(l, 0) as u32).collect();
        }
        Ok(start.elapsed().as_secs_f64())
    };
    run(4)?;
    let peak = clock::peak(&model.place().device);
    if args.profile {
        engine::profile::start();
        run(args.tokens as usize)?;
        say(&format!("decoding after {context} tokens:\n{}", engine::profile::stop()));
    }
    Ok(Measured { prompt: best, decode: run(args.tokens as usize)?, peak })
}

pub(super) fn run(args: &Args) -> Result<()> {
    let config = layers(&args.what, &args.set)?.resolve()?.config;
    args.common.check()?;
    let place = args.common.place.open(config.train.dtype)?.to_read();
    let (total, active) = config.model.parameters();
    let model = Decoder::on(&config.model, config.seed, &place).map_err(Error::from)?;
    out(&format!("{}: {total} parameters, {active} of them active for a token", config.name))?;
    out(&format!("{}, {}; {} random prompt(s), then {} tokens each, greedy\n", describe(&place.device), place.compute, args.batch, args.tokens))?;
    let (mut rows, mut results) = (vec![], vec![]);
    for &context in &args.context {
        let m = measure(&model, context, args)?;
        let (read, written) = ((args.batch as usize * context) as f64 / m.prompt, (args.batch * args.tokens) as f64 / m.decode);
        let ms = m.decode * 1e3 / args.tokens as f64;
        rows.push(vec![context.to_string(), format!("{read:.0}"), digits(m.prompt * 1e3), format!("{written:.0}"), digits(ms), memory(m.peak)]);
        results.push(
            json!({ "context": context, "prompt_tokens_per_s": read, "decode_tokens_per_s": written, "ms_per_step": ms, "peak_bytes": m.peak }),
        );
    }
    out(&table(&["context", "prompt tokens/s", "prompt ms", "decode tokens/s", "ms a step", "peak memory"], &rows, 0))?;
    args.common.write(&json!({ "bench": "decode", "version": env!("CARGO_PKG_VERSION"), "name": config.name, "device": describe(&place.device),
        "dtype": place.compute.to_string(), "parameters": total, "active_parameters": active, "batch": args.batch, "tokens": args.tokens,
        "results": results }))
}

#[cfg(test)]
mod tests {
    use super::length;

    #[test]
    fn lengths() {
        assert_eq!(["1", "1k", "16K", "1000"].map(|t| length(t).unwrap()), [1, 1024, 16384, 1000]);
        assert!(["", "k", "0", "-1", "1m", "99999999999999999999k"].iter().all(|t| length(t).is_err()));
    }
}
