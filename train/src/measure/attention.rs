//! Where softmax attention looks: computed from queries and keys in blocks of queries, so that no T × T matrix is kept.

use super::watch::{At, Reader};
use super::{Attention, AttentionLayer};
use engine::{DType, Result, Tensor};
use nn::{LayerType, ModelConfig};
use std::collections::BTreeMap;

/// ε of a sink (2410.10781).
pub(super) const EPSILON: f64 = 0.3;
/// Tokens of a sample of the sink rate (2410.10781's code).
pub(super) const SINK_TOKENS: usize = 64;
/// Scores that are formed at a time.
const SCORES: usize = 1 << 22;

/// What a batch's attention `A = softmax(q kᵀ / √D)` says, heads counted as queries' heads.
pub(super) struct Pattern {
    /// `[B, H]`: Σ over the queries from 1 on of `A[i, 0]`; 0 where a window hides the first token.
    pub first: Vec<f64>,
    /// `[H]`: Σ over rows and queries of the entropy `−Σ_j A[i,j] ln A[i,j]`, nats.
    pub entropy: Vec<f64>,
    /// `[H]`: the largest visible score.
    pub max: Vec<f64>,
    /// `[B, T]`: what a key gets from the queries after it, mean over these and over heads (0 for the last); empty unless asked for.
    pub received: Vec<f64>,
}

/// Reads off a batch's attention: `q [B, T, H, D]`, `k [B, T, Hkv, D]`, rotated; query i sees key j if `i − window < j ≤ i`. Query heads share keys in
/// groups of H / Hkv. In f32 (f64 for f64).
pub(super) fn pattern(q: &Tensor, k: &Tensor, window: Option<usize>, received: bool) -> Result<Pattern> {
    let (b, t, h, d) = (q.dim(0), q.dim(1), q.dim(2), q.dim(3));
    let groups = k.dim(2);
    let wide = if q.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    let (q, k, device) = (q.cast(wide)?, k.cast(wide)?, q.device());
    let reach = window.unwrap_or(usize::MAX);
    let numbers = |t: &Tensor| t.cast(DType::F64)?.contiguous()?.to_vec::<f64>();
    let mut out = Pattern {
        first: vec![0.0; b * h],
        entropy: vec![0.0; h],
        max: vec![f64::NEG_INFINITY; h],
        received: if received { vec![0.0; b * t] } else { vec![] },
    };
    let rows = (SCORES / (b * h * t).max(1)).clamp(1, t.max(1));
    for from in (0..t).step_by(rows) {
        let n = rows.min(t - from);
        let low = (from + 1).saturating_sub(reach);
        let s = from + n - low;
        let queries =
            q.narrow(1, from, n)?.reshape(&[b, n, groups, h / groups, d])?.permute(&[0, 2, 3, 1, 4])?.reshape(&[b * groups, h / groups * n, d])?;
        let keys = k.narrow(1, low, s)?.permute(&[0, 2, 3, 1])?.reshape(&[b * groups, d, s])?;
        let scores = queries.matmul(&keys)?.affine(1.0 / (d as f64).sqrt(), 0.0)?.reshape(&[b, h, n, s])?;
        let mask = |sees: &dyn Fn(usize, usize) -> bool| {
            let cells = (0..n).flat_map(|i| (0..s).map(move |j| (from + i, low + j)));
            let bits: Vec<u8> = cells.map(|(i, j)| u8::from(j <= i && i - j < reach && sees(i, j))).collect();
            Tensor::from_slice(&bits, &[1, 1, n, s], device)
        };
        // finite, so that 0 · ln 0 is 0 in the entropy
        let scores = mask(&|_, _| true)?.select(&scores, &Tensor::full(-1e30, &[], wide, device)?)?;
        let log = scores.log_softmax(3)?;
        let p = log.exp()?;
        let nats = numbers(&p.mul(&log)?.sum(&[0, 2, 3], false)?)?;
        out.entropy.iter_mut().zip(nats).for_each(|(sum, x)| *sum -= x);
        out.max.iter_mut().zip(numbers(&scores.max(&[0, 2, 3], false)?)?).for_each(|(max, x)| *max = max.max(x));
        // the first query sees nothing but itself
        let skip = usize::from(from == 0);
        if low == 0 && n > skip {
            let shares = numbers(&p.narrow(3, 0, 1)?.narrow(2, skip, n - skip)?.sum(&[2, 3], false)?)?;
            out.first.iter_mut().zip(shares).for_each(|(sum, x)| *sum += x);
        }
        if received {
            let later = numbers(&mask(&|i, j| j < i)?.select(&p, &Tensor::zeros(&[], wide, device)?)?.sum(&[1, 2], false)?)?;
            for (row, got) in later.chunks(s).enumerate() {
                out.received[row * t + low..][..s].iter_mut().zip(got).for_each(|(sum, x)| *sum += x);
            }
        }
    }
    out.received.iter_mut().enumerate().for_each(|(i, x)| *x /= (h * (t - 1 - i % t).max(1)) as f64);
    Ok(out)
}

/// One layer's sums.
#[derive(Default)]
struct Sums {
    first: Vec<f64>,
    entropy: Vec<f64>,
    max: Vec<f64>,
    /// Samples in which the first token is a sink.
    sinks: Vec<f64>,
    rows: f64,
    queries: f64,
}

/// Attention over a text, of layers with a softmax.
pub(super) struct Heads<'a> {
    config: &'a ModelConfig,
    /// Whether to keep who is a window's sink token.
    received: bool,
    queries: Option<Tensor>,
    layers: BTreeMap<usize, Sums>,
    /// Of the last batch: each softmax layer's sink token of each row, the argmax over t of the mean over heads and queries after t of `A[q, t]` (2608.12149).
    pub tokens: BTreeMap<usize, Vec<usize>>,
}

impl<'a> Heads<'a> {
    pub fn new(config: &'a ModelConfig, received: bool) -> Heads<'a> {
        Heads { config, received, queries: None, layers: BTreeMap::new(), tokens: BTreeMap::new() }
    }
    fn window(&self, layer: usize) -> Option<usize> {
        (self.config.layer_type(layer) == LayerType::SlidingAttention).then_some(self.config.sliding_window)
    }

    /// The measures of [`Attention`], with the sink rates of another pass over samples of [`SINK_TOKENS`].
    ///
    /// First-token share (F-Attn, 2505.06708 Table 4): mean of `A[i, 0]` over windows and queries i ≥ 1. The paper does not say whether it counts query 0, whose
    /// share is always 1; here it is left out. A query from which a sliding window hides the first token counts as 0.
    ///
    /// Sink rate (2410.10781 eq. for Sink_1^ε, and its code): for each sample of 64 tokens, layer and head, `α = (1/T) Σ_i A[i, 0]` over all queries that see the
    /// first token, query 0 among them; the part of (sample, layer, head) with α > 0.3.
    pub fn finish(self, sinks: Heads) -> Attention {
        let mut layers = vec![];
        for (layer, s) in &self.layers {
            let per = |sums: &[f64], n: f64| sums.iter().map(|x| x / n).collect::<Vec<f64>>();
            let of = sinks.layers.get(layer);
            layers.push(AttentionLayer {
                layer: *layer,
                first_token: per(&s.first, s.queries - s.rows),
                sink_rate: of.map_or_else(|| vec![f64::NAN; s.first.len()], |o| per(&o.sinks, o.rows)),
                entropy: per(&s.entropy, s.queries),
                max_score: s.max.clone(),
            });
        }
        let mean = |of: fn(&AttentionLayer) -> &Vec<f64>| {
            let all: Vec<f64> = layers.iter().flat_map(|l| of(l).iter().copied()).collect();
            all.iter().sum::<f64>() / all.len() as f64
        };
        let (first_token, sink_rate) = (mean(|l| &l.first_token), mean(|l| &l.sink_rate));
        Attention { first_token, sink_rate, sink_epsilon: EPSILON, sink_tokens: SINK_TOKENS, layers }
    }
}

impl Reader for Heads<'_> {
    fn reads(&self, at: &At) -> bool {
        at.softmax && matches!(at.hook, "attn.hook_rot_q" | "attn.hook_rot_k")
    }
    fn see(&mut self, at: &At, value: &Tensor) -> Result<()> {
        let Some(q) = self.queries.take().filter(|_| at.hook == "attn.hook_rot_k") else {
            self.queries = Some(value.clone());
            return Ok(());
        };
        let (b, t, h) = (q.dim(0), q.dim(1), q.dim(2));
        let window = self.window(at.layer);
        let p = pattern(&q, value, window, self.received)?;
        let s = self.layers.entry(at.layer).or_insert_with(|| Sums {
            first: vec![0.0; h],
            entropy: vec![0.0; h],
            max: vec![f64::NEG_INFINITY; h],
            sinks: vec![0.0; h],
            ..Sums::default()
        });
        let see_it = t.min(window.unwrap_or(t)) as f64;
        for (i, first) in p.first.iter().enumerate() {
            s.first[i % h] += first;
            s.sinks[i % h] += f64::from((1.0 + first) / see_it > EPSILON);
        }
        s.entropy.iter_mut().zip(&p.entropy).for_each(|(sum, x)| *sum += x);
        s.max.iter_mut().zip(&p.max).for_each(|(max, x)| *max = max.max(*x));
        s.rows += b as f64;
        s.queries += (b * t) as f64;
        if self.received {
            // the last token has no query after it
            let best = |row: &[f64]| (0..t.saturating_sub(1)).fold(0, |best, i| if row[i] > row[best] { i } else { best });
            self.tokens.insert(at.layer, p.received.chunks(t).map(best).collect());
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "attention_tests.rs"]
mod tests;
