//! Loss spikes of a run.

use crate::{Error, Result};
use serde_json::Value;
use std::path::Path;

/// Values before a point that the deviation is taken of, and the least of them that say something.
const ROLLING: (usize, usize) = (1000, 100);
/// Standard deviations of a spike.
const SIGMAS: f64 = 7.0;
/// Values, the point's own the last, that the median is taken of, and the least of them that say something.
const MEDIAN: (usize, usize) = (201, 11);
/// Nats above the median of a spike.
const ABOVE: f64 = 0.1;

/// The spikes of a series of losses.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spikes {
    /// OLMo 2's (2501.00656): at least seven standard deviations away from the mean of the 1000 values before (of those there are, at least 100).
    pub deviation: Found,
    /// Qwen3.8's: above the median of the 201 values that end with it (of those there are, at least 11) by more than 0.1.
    pub median: Found,
    /// Steps whose loss is no number or infinite; neither judged nor part of what others are held against.
    pub not_finite: Vec<u64>,
}

/// What one definition finds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Found {
    /// Points that had enough before them to be judged.
    pub judged: usize,
    /// The steps of the spikes.
    pub steps: Vec<u64>,
}

impl Found {
    fn judge(&mut self, step: u64, spike: bool) {
        self.judged += 1;
        if spike {
            self.steps.push(step);
        }
    }
    /// Spikes by judged points (OLMo 2's spike score as a part of 1, not in percent); 0 where nothing was judged.
    pub fn share(&self) -> f64 {
        self.steps.len() as f64 / self.judged.max(1) as f64
    }
}

/// The spikes of `(step, loss)` in the order of steps. Any series will do: OLMo 2 scores gradient norms, too.
pub fn spikes(losses: &[(u64, f64)]) -> Spikes {
    let mut out = Spikes::default();
    let mut seen: Vec<f64> = vec![];
    for &(step, x) in losses {
        if !x.is_finite() {
            out.not_finite.push(step);
            continue;
        }
        let before = &seen[seen.len().saturating_sub(ROLLING.0)..];
        if before.len() >= ROLLING.1 {
            let n = before.len() as f64;
            let mean = before.iter().sum::<f64>() / n;
            let sigma = (before.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / n).sqrt();
            // what repeats to the last bit has no deviation, and nothing in it is a spike
            out.deviation.judge(step, x != mean && (x - mean).abs() >= SIGMAS * sigma);
        }
        seen.push(x);
        let mut last = seen[seen.len().saturating_sub(MEDIAN.0)..].to_vec();
        if last.len() >= MEDIAN.1 {
            let half = last.len() / 2;
            let even = last.len().is_multiple_of(2);
            let (below, mid, _) = last.select_nth_unstable_by(half, f64::total_cmp);
            let lower = below.iter().fold(f64::NEG_INFINITY, |m, y| m.max(*y));
            let median = if even { 0.5 * (*mid + lower) } else { *mid };
            out.median.judge(step, x > median + ABOVE);
        }
    }
    out
}

/// The training losses of a `metrics.jsonl`, with their steps; NaN where it says null. A last line that is cut off is left out.
pub fn losses(path: &Path) -> Result<Vec<(u64, f64)>> {
    series(path, "loss")
}

/// The numbers that a `metrics.jsonl` has under `key`, with their steps, of all lines but a run's closing one.
pub fn series(path: &Path, key: &str) -> Result<Vec<(u64, f64)>> {
    let text = std::fs::read_to_string(path).map_err(Error::io("reading", path))?;
    let mut out = vec![];
    for (i, line) in text.split_inclusive('\n').enumerate() {
        let v: Value = match serde_json::from_str(line) {
            Ok(v) => v,
            Err(_) if !line.ends_with('\n') => break,
            Err(e) => return Err(Error::Usage(format!("{}: line {} is no JSON: {e}", path.display(), i + 1))),
        };
        if let (Some(step), Some(x), true) = (v["step"].as_u64(), v.get(key), v["final"].is_null()) {
            out.push((step, x.as_f64().unwrap_or(f64::NAN)));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loss that swings by ±0.02 around 2.
    fn calm(n: u64) -> Vec<(u64, f64)> {
        (0..n).map(|i| (i * 10, 2.0 + if i % 2 == 0 { 0.02 } else { -0.02 })).collect()
    }

    #[test]
    fn spikes_by_hand() {
        let mut x = calm(1500);
        let s = spikes(&x);
        assert_eq!((s.deviation.judged, s.median.judged), (1400, 1490));
        assert!(s.deviation.steps.is_empty() && s.median.steps.is_empty() && s.not_finite.is_empty());
        // σ is 0.02: 0.16 above is a spike by both, 0.15 below by the deviation alone, 0.11 above by none, as the median there is 2.02
        x[400].1 = 2.16;
        x[900].1 = 1.85;
        x[1200].1 = 2.11;
        x[50].1 = 3.0;
        x[1300].1 = f64::NAN;
        let s = spikes(&x);
        // the one of 3 is too early to be judged by the deviation, and widens it for as long as it is among the last 1000
        assert_eq!((s.deviation.steps.as_slice(), s.not_finite.as_slice()), (&[][..], &[13000][..]));
        assert_eq!(s.median.steps, [500, 4000]);
        x[50].1 = 2.0;
        let s = spikes(&x);
        assert_eq!(s.deviation.steps, [4000, 9000]);
        assert_eq!(s.deviation.share(), 2.0 / 1399.0);
        // a plateau to the last bit, and a fall, are none
        assert!(spikes(&(0..300).map(|i| (i, 1.25)).collect::<Vec<_>>()).deviation.steps.is_empty());
        assert!(spikes(&(0..500).map(|i| (i, 5.0 - 0.01 * i as f64)).collect::<Vec<_>>()).median.steps.is_empty());
        assert_eq!(spikes(&[]), Spikes::default());
    }

    #[test]
    fn losses_of_a_run() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("metrics.jsonl");
        let lines = "{\"step\":1,\"loss\":2.5}\n{\"step\":1,\"held_out\":3}\n{\"step\":2,\"loss\":null}\n{\"step\":2,\"loss\":9,\"final\":true}\n{\"step\":3,\"lo";
        std::fs::write(&path, lines).unwrap();
        let got = losses(&path).unwrap();
        assert!(got.len() == 2 && got[0] == (1, 2.5) && got[1].0 == 2 && got[1].1.is_nan(), "{got:?}");
        std::fs::write(&path, "{\"step\":1,\"loss\":2.5}\nnonsense\n").unwrap();
        assert!(losses(&path).unwrap_err().to_string().contains("line 2"));
    }
}
