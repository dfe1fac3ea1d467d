//! `tidegate bench ops`.

use super::Common;
use super::cases::{self, Case, Cost, Maker, Scale};
use super::clock::{Clock, Times, flush_note};
use super::table::{digits, memory, table};
use crate::cli::device::describe;
use crate::cli::out;
use crate::{Error, Result};
use cuda::Cuda;
use engine::{Device, Tensor, no_grad};
use serde_json::json;

const EXAMPLES: &str = "\
Examples:
  tidegate bench ops
  tidegate bench ops gated_sdpa delta_rule --device cuda --graph
  tidegate bench ops --device cpu --json ops.json

TFLOP/s count what the mathematics needs, GB/s the least traffic (inputs read once, outputs written once); docs/bench.md says how.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// Which ops [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// On a GPU, time replays of a captured CUDA graph: kernels without the time that it takes to launch them
    #[arg(long)]
    graph: bool,
    #[command(flatten)]
    common: Common,
}

/// A line of the table.
struct Row {
    op: &'static str,
    shape: String,
    pass: &'static str,
    cost: Cost,
    times: engine::Result<Times>,
}

fn scale(device: &Device) -> Scale {
    match Cuda::of(device) {
        Ok(c) if c.is_emulator() => Scale::Tiny,
        Ok(_) => Scale::Large,
        Err(_) => Scale::Small,
    }
}

fn check(names: &[String]) -> Result<()> {
    match names.iter().find(|n| !cases::NAMES.contains(&n.as_str())) {
        None => Ok(()),
        Some(n) => {
            let hint = nn::nearest(n, cases::NAMES.iter().copied()).map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
            Err(Error::Usage(format!("no op to time is called `{n}`{hint}; there are {}", cases::NAMES.join(", "))))
        }
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    check(&args.names)?;
    args.common.check()?;
    let place = args.common.place.open(None)?;
    let (device, cuda) = (&place.device, Cuda::of(&place.device).is_ok());
    if args.graph && !cuda {
        return Err(Error::Usage(format!("--graph: captures CUDA graphs, and the device is {}; leave it out", device.name())));
    }
    let how = match (cuda, args.graph) {
        (true, true) => "replays of a captured graph, timed by events",
        (true, false) => "launches, timed by events",
        (false, _) => "wall time",
    };
    out(&format!("{}, {}; {how}; {}\n", describe(device), place.compute, flush_note(device)))?;
    let clock = Clock::new(device, args.common.reps(), args.graph);
    let mut rows = vec![];
    for spec in cases::all(scale(device)) {
        if !args.names.is_empty() && !args.names.iter().any(|n| n == spec.op) {
            continue;
        }
        crate::progress::say(&format!("timing {} {}", spec.op, spec.shape));
        let (op, shape) = (spec.op, spec.shape.clone());
        let row = |pass, cost, times| Row { op, shape: shape.clone(), pass, cost, times };
        match (spec.make)(&Maker { device, dtype: place.compute }) {
            Err(e) => rows.push(row("inputs", Cost::default(), Err(e))),
            Ok(case) => {
                let [forward, both] = passes(&case);
                rows.push(row(forward, case.forward, clock.time(|| no_grad(|| (case.run)(&case.inputs).map(drop)))));
                if let Some(cost) = case.both {
                    rows.push(row(both, cost, train(&clock, &case)));
                }
            }
        }
        if let Ok(c) = Cuda::of(device) {
            c.trim();
        }
    }
    report(&rows)?;
    let results: Vec<_> = rows.iter().map(as_json).collect();
    let (name, dtype) = (describe(device), place.compute.to_string());
    args.common.write(&json!({ "bench": "ops", "version": env!("CARGO_PKG_VERSION"), "device": name, "dtype": dtype, "timing": how,
        "caches": flush_note(device), "results": results }))?;
    let failed: Vec<String> = rows.iter().filter(|r| r.times.is_err()).map(|r| format!("{} {}", r.op, r.pass)).collect();
    if failed.is_empty() { Ok(()) } else { Err(Error::Model(format!("could not be timed: {}", failed.join(", ")))) }
}

fn passes(case: &Case) -> [&'static str; 2] {
    [if case.both.is_some() { "forward" } else { "update" }, "with backward"]
}

/// Forward and backward, from a gradient of the output that is there before.
fn train(clock: &Clock, case: &Case) -> engine::Result<Times> {
    let leaves: Vec<Tensor> = case.inputs.iter().map(|t| if t.dtype().is_float() { t.requires_grad() } else { t.clone() }).collect();
    let y = no_grad(|| (case.run)(&leaves))?;
    let dy = y.affine(0.5, 0.0)?;
    drop(y);
    clock.time(|| (case.run)(&leaves)?.backward_with(&dy).map(drop))
}

fn per_second(amount: f64, t: &Times) -> f64 {
    amount / (t.median * 1e-3)
}

fn report(rows: &[Row]) -> Result<()> {
    let rate = |amount: f64, unit: f64, t: &Times| if amount > 0.0 { digits(per_second(amount, t) / unit) } else { "–".into() };
    let cells = rows.iter().map(|r| {
        let what = [r.op.to_string(), r.shape.clone(), r.pass.to_string()];
        let numbers = match &r.times {
            Ok(t) => {
                let rates = [rate(r.cost.flops, 1e12, t), rate(r.cost.bytes, 1e9, t)];
                [vec![digits(t.median), digits(t.min)], rates.to_vec(), vec![memory(t.peak), t.reps.to_string()]].concat()
            }
            Err(_) => vec!["FAILED".into()],
        };
        what.into_iter().chain(numbers).collect()
    });
    out(&table(&["op", "shape", "pass", "ms", "min ms", "TFLOP/s", "GB/s", "peak", "reps"], &cells.collect::<Vec<_>>(), 3))?;
    rows.iter()
        .filter_map(|r| r.times.as_ref().err().map(|e| (r, e)))
        .try_for_each(|(r, e)| out(&format!("FAILED {} {} {}: {e}", r.op, r.shape, r.pass)))
}

fn as_json(r: &Row) -> serde_json::Value {
    match &r.times {
        Ok(t) => json!({ "op": r.op, "shape": r.shape, "pass": r.pass, "ms": t.median, "min_ms": t.min, "reps": t.reps, "peak_bytes": t.peak,
            "flops": r.cost.flops, "bytes": r.cost.bytes, "tflops_per_s": per_second(r.cost.flops, t) / 1e12, "gb_per_s": per_second(r.cost.bytes, t) / 1e9 }),
        Err(e) => json!({ "op": r.op, "shape": r.shape, "pass": r.pass, "error": e.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::DType;

    #[test]
    fn unknown_names_are_refused_with_the_nearest() {
        let e = check(&["delta_rul".into()]).unwrap_err().to_string();
        assert!(e.contains("did you mean `delta_rule`") && e.contains("adamw"), "{e}");
        assert!(check(&["moe".into(), "adamw".into()]).is_ok());
    }

    /// Every case of every op runs forward and backward, in both precisions, where it is small.
    #[test]
    fn all_cases_run() {
        let mut names: Vec<&str> = cases::all(Scale::Tiny).iter().map(|s| s.op).collect();
        names.dedup();
        assert_eq!(names, cases::NAMES);
        for dtype in [DType::F32, DType::BF16] {
            let clock = Clock::new(&Device::cpu(), Some(1), false);
            for spec in cases::all(Scale::Tiny) {
                let case = (spec.make)(&Maker { device: &Device::cpu(), dtype }).unwrap();
                let t = clock.time(|| no_grad(|| (case.run)(&case.inputs).map(drop))).unwrap();
                assert!(t.min > 0.0 && t.peak > 0, "{} {t:?}", spec.op);
                if case.both.is_some() {
                    train(&clock, &case).unwrap();
                }
            }
        }
    }
}
