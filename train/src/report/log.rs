//! `metrics.jsonl`, read in one pass.

use super::curves::Curves;
use crate::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// What a run's metrics say.
#[derive(Debug)]
pub struct Log {
    /// Curves of the whole run in many points: losses, rates.
    pub fine: Curves,
    /// Curves of each layer in fewer.
    pub coarse: Curves,
    /// The loss in as few: means in which its noise is small.
    pub trend: Curves,
    /// Held-out evaluations, in their order.
    pub evaluations: Vec<Evaluation>,
    /// Each step's loss, by which spikes are found; NaN where it is not finite.
    pub losses: Vec<(u64, f64)>,
    /// The last step, and tokens and seconds up to there.
    pub last: Last,
    /// Why the run stopped before its end, if it did.
    pub stopped: Option<String>,
    /// The last line is cut off: the run was killed as it wrote, or is writing.
    pub cut_off: bool,
}

/// Where a run's metrics end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Last {
    /// The step.
    pub step: u64,
    /// Tokens trained on.
    pub tokens: Option<f64>,
    /// Seconds of training.
    pub seconds: Option<f64>,
}

/// A held-out evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evaluation {
    /// After which step.
    pub step: u64,
    /// Tokens trained on until then, where that is known.
    pub tokens: Option<f64>,
    /// Seconds of training until then.
    pub seconds: Option<f64>,
    /// Bits per token.
    pub bits: Option<f64>,
    /// Bits per byte, where that was written.
    pub bits_per_byte: Option<f64>,
    /// Tokens that were scored.
    pub scored: Option<f64>,
    /// Whether it is the run's closing one, over all that is held out.
    pub closing: bool,
}

/// Curves that are there once in a run.
const ONCE: [&str; 6] = ["loss", "lr", "grad_norm", "tokens_per_s", "memory", "device_memory"];
/// Curves that each layer has: what the names of their scalars end in.
const EACH: [&str; 10] = [
    "gate_mean",
    "gate_low",
    "gate_high",
    "alpha_mean",
    "beta_mean",
    "router_entropy",
    "router_load_max",
    "router_load_min",
    "router_dead",
    "resid_post_max",
];

/// The last step in a file of metrics, without reading all of it; 0 where there is none.
pub fn last_step(path: &Path) -> Result<u64> {
    const TAIL: u64 = 1 << 20;
    let io = || Error::io("reading", path);
    let mut file = File::open(path).map_err(io())?;
    let length = file.metadata().map_err(io())?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL))).map_err(io())?;
    let mut tail = vec![];
    file.read_to_end(&mut tail).map_err(io())?;
    let step = |line: &[u8]| serde_json::from_slice::<Value>(line).ok()?["step"].as_u64();
    Ok(tail.split(|b| *b == b'\n').rev().find_map(step).unwrap_or(0))
}

impl Log {
    /// Reads a file, with so many points for the curves of runs of up to `steps` steps.
    pub fn read(path: &Path, steps: u64, points: (u64, u64)) -> Result<Log> {
        let mut file = BufReader::new(File::open(path).map_err(Error::io("reading", path))?);
        let mut log = Log {
            fine: Curves::new(steps, points.0),
            coarse: Curves::new(steps, points.1),
            trend: Curves::new(steps, points.1),
            evaluations: vec![],
            losses: vec![],
            last: Last::default(),
            stopped: None,
            cut_off: false,
        };
        let (mut line, mut number) = (vec![], 0u64);
        loop {
            line.clear();
            if file.read_until(b'\n', &mut line).map_err(Error::io("reading", path))? == 0 {
                return Ok(log);
            }
            number += 1;
            if !line.ends_with(b"\n") {
                log.cut_off = true;
                return Ok(log);
            }
            if line.iter().all(u8::is_ascii_whitespace) {
                continue;
            }
            let wrong = |what: &str| {
                let p = path.display();
                Error::Usage(format!("{p}, line {number}: {what}; mend the line, or take it out"))
            };
            let fields: Map<String, Value> = serde_json::from_slice(&line).map_err(|e| wrong(&format!("expected an object of JSON: {e}")))?;
            let step = fields.get("step").and_then(Value::as_u64).ok_or_else(|| wrong("expected a `step`, a whole number"))?;
            log.take(step, &fields);
        }
    }

    fn take(&mut self, step: u64, fields: &Map<String, Value>) {
        let number = |key: &str| fields.get(key).and_then(Value::as_f64);
        if let Some(why) = fields.get("stopped").and_then(Value::as_str) {
            self.stopped = Some(why.into());
        }
        if fields.contains_key("held_out_bits") {
            let Last { tokens, seconds, .. } = self.last;
            self.evaluations.push(Evaluation {
                step,
                tokens,
                seconds,
                bits: number("held_out_bits"),
                bits_per_byte: number("held_out_bits_per_byte"),
                scored: number("held_out_tokens"),
                closing: fields.contains_key("final"),
            });
        }
        if !fields.contains_key("loss") {
            return;
        }
        self.losses.push((step, number("loss").unwrap_or(f64::NAN)));
        self.last = Last { step, tokens: number("tokens").or(self.last.tokens), seconds: number("seconds").or(self.last.seconds) };
        for curves in [&mut self.fine, &mut self.coarse, &mut self.trend] {
            curves.add("step", step, step as f64);
            ["tokens", "seconds"].iter().for_each(|k| number(k).into_iter().for_each(|x| curves.add(k, step, x)));
        }
        number("loss").into_iter().for_each(|x| self.trend.add("loss", step, x));
        for (key, value) in fields {
            let Some(x) = value.as_f64() else { continue };
            if ONCE.contains(&key.as_str()) {
                self.fine.add(key, step, x);
            } else if key.starts_with("blocks.") && EACH.iter().any(|e| key.ends_with(e)) {
                self.coarse.add(key, step, x);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Result<Log>, u64) {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("metrics.jsonl");
        std::fs::write(&path, text).unwrap();
        (Log::read(&path, 10, (400, 100)), last_step(&path).unwrap())
    }

    #[test]
    fn whole_lines_count() {
        let text = "{\"step\":1,\"loss\":2.5,\"tokens\":8,\"seconds\":0.5,\"blocks.0.attn.gate_mean\":0.4,\"blocks.0.attn.q_rms\":1}\n\
            {\"step\":1,\"held_out_bits\":3.5,\"held_out_tokens\":64}\n{\"step\":2,\"loss\":null,\"stopped\":\"it is NaN\"}\n\n\
            {\"step\":2,\"final\":true,\"held_out_bits\":3,\"held_out_bits_per_byte\":1.5}\n{\"step\":3,\"los";
        let (log, last) = read(text);
        let log = log.unwrap();
        assert!(log.cut_off && last == 2);
        assert_eq!(log.fine.mean("loss"), [Some(2.5)]);
        assert!(log.losses.len() == 2 && log.losses[1].1.is_nan());
        assert_eq!(log.coarse.names().collect::<Vec<_>>(), ["blocks.0.attn.gate_mean", "seconds", "step", "tokens"]);
        assert_eq!(log.last, Last { step: 2, tokens: Some(8.0), seconds: Some(0.5) });
        assert_eq!(log.stopped.as_deref(), Some("it is NaN"));
        let e = log.evaluations;
        assert!(e.len() == 2 && !e[0].closing && e[1].closing && e[0].bits == Some(3.5) && e[1].bits_per_byte == Some(1.5));
    }

    #[test]
    fn a_broken_line_is_named() {
        for (text, words) in [
            ("{\"step\":1,\"loss\":1}\n{\"step\":2,\"lo\n{\"step\":3}\n", "line 2: expected an object"),
            ("{\"loss\":1}\n", "line 1: expected a `step`"),
        ] {
            let e = read(text).0.unwrap_err().to_string();
            assert!(e.contains(words) && e.contains("metrics.jsonl"), "{e}");
        }
        assert_eq!(read("").1, 0);
        assert!(read("").0.unwrap().evaluations.is_empty());
    }
}
