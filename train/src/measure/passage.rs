//! What becomes of one thing that was written: how decay and erasure wear it down, what the state holds meanwhile, and what the last query still reads of it.

use super::numbers::{many, many_of_many};
use super::svd::{effective_rank, singular_values};
use super::watch::{At, Reader, Watch, host, is_softmax};
use crate::{Error, Result};
use engine::Tensor;
use nn::{Decoder, LayerType, LinearQkNorm, ModelConfig};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

/// Points along the text, besides the needle's own.
const POINTS: usize = 128;

/// A needle's way through a model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Passage {
    /// Tokens of the text, the query last.
    pub tokens: usize,
    /// Where the needle begins and ends.
    pub needle: [usize; 2],
    /// Layer by layer.
    pub layers: Vec<PassageLayer>,
}

/// A layer's part in it. What is by head and point is so in this order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PassageLayer {
    /// Which.
    pub layer: usize,
    /// By head: the part that the needle has in what the last query reads. Of softmax attention, its share of the attention; of the delta rule, with
    /// `c` what the needle's writes add to the output `o`, `‖c‖ / (‖c‖ + ‖o − c‖)`.
    #[serde(deserialize_with = "many")]
    pub read: Vec<f64>,
    /// Positions of what follows; empty for softmax attention, which keeps everything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub at: Vec<usize>,
    /// `ln 2 / −ln α` in tokens, α the geometric mean since the point before. Empty without decay.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "many_of_many")]
    pub half_life: Vec<Vec<f64>>,
    /// The mean of β since the point before.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "many_of_many")]
    pub beta: Vec<Vec<f64>>,
    /// The state's effective rank (Roy & Vetterli 2007).
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "many_of_many")]
    pub rank: Vec<Vec<f64>>,
    /// What is left of the needle: the Frobenius norm of its writes' part of the state, over that right behind the needle. Each write `β k vᵀ` goes through
    /// `α (I − β k kᵀ)` of every later token (2412.06464, Eq. 10), without erasure through α alone. 0 before the needle.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "many_of_many")]
    pub kept: Vec<Vec<f64>>,
    /// What decay alone would have left: the product of α since the needle.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "many_of_many")]
    pub undecayed: Vec<Vec<f64>>,
}

/// What of one head is seen along the text: q and k as the rule uses them `[T, Dk]`, v `[T, Dv]`, and by token ln α and β.
struct Head {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    log_decay: Option<Vec<f64>>,
    beta: Vec<f64>,
    sizes: [usize; 2],
    erase: bool,
}

/// One head's curves.
struct Way {
    read: f64,
    half_life: Vec<f64>,
    beta: Vec<f64>,
    rank: Vec<f64>,
    kept: Vec<f64>,
    undecayed: Vec<f64>,
}

impl Passage {
    /// Writes it as a whole: a reader finds the one before, or this.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self).map_err(|e| Error::Model(format!("{}: {e}", path.display())))?;
        crate::checkpoint::write(path, format!("{text}\n").as_bytes())
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

impl Head {
    /// The recurrence, with the needle's writes followed beside the state.
    fn follow(&self, needle: Range<usize>, at: &[usize]) -> Way {
        let [dk, dv] = self.sizes;
        let tokens = self.k.len() / dk;
        let mut state = vec![0.0; dk * dv];
        // the needle's part of the state is Σ uᵢ vᵢᵀ
        let mut written: Vec<(Vec<f64>, &[f64])> = vec![];
        let norm = |w: &[(Vec<f64>, &[f64])]| {
            let pairs = w.iter().flat_map(|a| w.iter().map(move |b| dot(&a.0, &b.0) * dot(a.1, b.1)));
            pairs.sum::<f64>().max(0.0).sqrt()
        };
        let mut way = Way { read: 0.0, half_life: vec![], beta: vec![], rank: vec![], kept: vec![], undecayed: vec![] };
        let (mut whole, mut log_left, mut before) = (0.0, 0.0, 0);
        for t in 0..tokens {
            let (k, v, beta) = (&self.k[t * dk..(t + 1) * dk], &self.v[t * dv..(t + 1) * dv], self.beta[t]);
            let log_alpha = self.log_decay.as_ref().map_or(0.0, |g| g[t]);
            let alpha = log_alpha.exp();
            state.iter_mut().for_each(|s| *s *= alpha);
            let held: Vec<f64> = match self.erase {
                true => (0..dv).map(|j| (0..dk).map(|i| k[i] * state[i * dv + j]).sum()).collect(),
                false => vec![0.0; dv],
            };
            for i in 0..dk {
                (0..dv).for_each(|j| state[i * dv + j] += beta * k[i] * (v[j] - held[j]));
            }
            for (u, _) in &mut written {
                let along = if self.erase { beta * dot(k, u) } else { 0.0 };
                u.iter_mut().zip(k).for_each(|(u, k)| *u = alpha * (*u - along * k));
            }
            if needle.contains(&t) {
                written.push((k.iter().map(|k| beta * k).collect(), v));
            }
            if t + 1 == needle.end {
                whole = norm(&written);
            }
            if t >= needle.end {
                log_left += log_alpha;
            }
            if at.binary_search(&t).is_ok() {
                let since = before..t + 1;
                let n = since.len() as f64;
                if let Some(g) = &self.log_decay {
                    way.half_life.push(std::f64::consts::LN_2 / -(g[since.clone()].iter().sum::<f64>() / n));
                }
                way.beta.push(self.beta[since].iter().sum::<f64>() / n);
                way.rank.push(effective_rank(&singular_values(&state, dk, dv)));
                let behind = t + 1 >= needle.end;
                way.kept.push(if behind && whole > 0.0 { norm(&written) / whole } else { 0.0 });
                way.undecayed.push(if behind { log_left.exp() } else { 0.0 });
                before = t + 1;
            }
        }
        let q = &self.q[(tokens - 1) * dk..];
        let out: Vec<f64> = (0..dv).map(|j| (0..dk).map(|i| q[i] * state[i * dv + j]).sum()).collect();
        let mut ours = vec![0.0; dv];
        for (u, v) in &written {
            let weight = dot(q, u);
            ours.iter_mut().zip(*v).for_each(|(c, v)| *c += weight * v);
        }
        let rest: Vec<f64> = out.iter().zip(&ours).map(|(o, c)| o - c).collect();
        let (a, b) = (dot(&ours, &ours).sqrt(), dot(&rest, &rest).sqrt());
        way.read = if a + b > 0.0 { a / (a + b) } else { 0.0 };
        way
    }
}

/// Keeps what it is shown.
#[derive(Default)]
struct Seen(BTreeMap<(usize, String), (Vec<f32>, Vec<usize>)>);

const DELTA: [&str; 5] = ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_beta", "attn.hook_log_decay"];
const SOFTMAX: [&str; 2] = ["attn.hook_rot_q", "attn.hook_rot_k"];

impl Reader for Seen {
    fn reads(&self, at: &At) -> bool {
        if at.softmax { SOFTMAX.contains(&at.hook) } else { DELTA.contains(&at.hook) }
    }
    fn see(&mut self, at: &At, value: &Tensor) -> engine::Result<()> {
        self.0.insert((at.layer, at.hook.into()), (host(value)?, value.shape().to_vec()));
        Ok(())
    }
}

impl Seen {
    /// One head's `[T, D]` of `[1, T, H, D]`, or `[T]` of `[1, T, H]`.
    fn head(&self, layer: usize, hook: &str, head: usize) -> Option<(Vec<f64>, usize)> {
        let (values, shape) = self.0.get(&(layer, hook.into()))?;
        let (heads, d) = (shape[2], shape.get(3).copied().unwrap_or(1));
        let of_head = values.chunks(heads * d).flat_map(|row| row[head * d..(head + 1) * d].iter().map(|x| f64::from(*x)));
        Some((of_head.collect(), d))
    }
    fn heads(&self, layer: usize, hook: &str) -> usize {
        self.0.get(&(layer, hook.into())).map_or(0, |s| s.1[2])
    }
}

/// `x · rsqrt(Σ x² + 1e-6)` of each row, as the delta rule normalises its keys and queries.
fn normalised(mut x: Vec<f64>, d: usize) -> Vec<f64> {
    x.chunks_mut(d).for_each(|row| {
        let r = (dot(row, row) + 1e-6).sqrt().recip();
        row.iter_mut().for_each(|x| *x *= r);
    });
    x
}

/// Follows what `tokens[needle]` writes, up to the last token, which is the query.
///
/// # Errors
///
/// A needle that isn't there, or tokens that the model doesn't know.
pub fn passage(model: &Decoder, tokens: &[u32], needle: Range<usize>) -> Result<Passage> {
    let c = model.config();
    if needle.is_empty() || needle.end >= tokens.len() {
        return Err(Error::Usage(format!("a needle at {needle:?} of {} tokens: expected some of them, before the last", tokens.len())));
    }
    if let Some(t) = tokens.iter().find(|t| **t as usize >= c.vocab_size) {
        return Err(Error::Usage(format!("token {t} is outside the model's vocabulary of {}", c.vocab_size)));
    }
    let mut seen = Seen::default();
    let x = Tensor::from_slice(tokens, &[1, tokens.len()], &model.place().device)?;
    let mut watch = Watch { config: c, readers: vec![&mut seen] };
    engine::no_grad(|| model.forward(&x, None, None, Some(&mut watch)))?;
    let stride = tokens.len().div_ceil(POINTS);
    let mut at: Vec<usize> = (0..tokens.len()).step_by(stride).chain(needle.clone()).chain([tokens.len() - 1]).collect();
    at.sort_unstable();
    at.dedup();
    let layer = |i: usize| if is_softmax(c, i) { attention(&seen, c, i, &needle) } else { recurrence(&seen, c, i, &needle, &at) };
    Ok(Passage { tokens: tokens.len(), needle: [needle.start, needle.end], layers: (0..c.num_hidden_layers).map(layer).collect() })
}

/// The share of the last query's attention that the needle gets.
fn attention(seen: &Seen, c: &ModelConfig, layer: usize, needle: &Range<usize>) -> PassageLayer {
    let (heads, groups) = (seen.heads(layer, SOFTMAX[0]), seen.heads(layer, SOFTMAX[1]));
    let share = |h: usize| {
        let (q, d) = seen.head(layer, SOFTMAX[0], h)?;
        let (k, _) = seen.head(layer, SOFTMAX[1], h / (heads / groups))?;
        let last = &q[q.len() - d..];
        let n = k.len() / d;
        let from = if c.layer_type(layer) == LayerType::SlidingAttention { n.saturating_sub(c.sliding_window) } else { 0 };
        let scores: Vec<f64> = (from..n).map(|i| dot(last, &k[i * d..(i + 1) * d]) / (d as f64).sqrt()).collect();
        let most = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let of_needle: f64 = (from..n).zip(&weights).filter(|(i, _)| needle.contains(i)).map(|(_, w)| w).sum();
        Some(of_needle / weights.iter().sum::<f64>())
    };
    PassageLayer { layer, read: (0..heads).filter_map(share).collect(), ..PassageLayer::default() }
}

/// The delta rule's heads.
fn recurrence(seen: &Seen, c: &ModelConfig, layer: usize, needle: &Range<usize>, at: &[usize]) -> PassageLayer {
    let (heads, groups) = (seen.heads(layer, "attn.hook_v"), seen.heads(layer, "attn.hook_k"));
    let erase = c.recurrence(layer).is_some_and(|r| r.erases);
    // elsewhere what is shown is what the rule is given
    let normal = c.layer_type(layer) != LayerType::Mamba2 && c.linear_qk_norm == LinearQkNorm::L2;
    let way = |h: usize| {
        let (of, r) = (|hook: &str, h: usize| seen.head(layer, hook, h), heads / groups);
        let (q, dk) = of("attn.hook_q", h / r)?;
        let (k, _) = of("attn.hook_k", h / r)?;
        let (v, dv) = of("attn.hook_v", h)?;
        let log_decay = of("attn.hook_log_decay", h).map(|g| g.0);
        let beta = of("attn.hook_beta", h).map_or_else(|| vec![1.0; v.len() / dv], |b| b.0);
        let (q, k) = if normal { (normalised(q, dk), normalised(k, dk)) } else { (q, k) };
        Some(Head { q, k, v, log_decay, beta, sizes: [dk, dv], erase }.follow(needle.clone(), at))
    };
    let ways: Vec<Way> = (0..heads).into_par_iter().filter_map(way).collect();
    let each = |of: fn(&Way) -> &Vec<f64>| ways.iter().map(|w| of(w).clone()).filter(|x| !x.is_empty()).collect::<Vec<_>>();
    PassageLayer {
        layer,
        read: ways.iter().map(|w| w.read).collect(),
        at: at.to_vec(),
        half_life: each(|w| &w.half_life),
        beta: each(|w| &w.beta),
        rank: each(|w| &w.rank),
        kept: each(|w| &w.kept),
        undecayed: each(|w| &w.undecayed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::DType;

    /// Keys along axes, all values 1 in the axis of their token.
    fn head(axes: &[usize], beta: f64, log_decay: Option<f64>, erase: bool) -> Head {
        let row = |a: &usize| (0..4).map(|i| f64::from(u8::from(i == *a))).collect::<Vec<_>>();
        let k: Vec<f64> = axes.iter().flat_map(row).collect();
        let v: Vec<f64> = (0..axes.len()).flat_map(|t| row(&(t % 4))).collect();
        Head { q: k.clone(), k, v, log_decay: log_decay.map(|g| vec![g; axes.len()]), beta: vec![beta; axes.len()], sizes: [4, 4], erase }
    }
    fn near(a: &[f64], b: &[f64]) {
        assert!(a.len() == b.len() && a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-12), "{a:?} {b:?}");
    }

    #[test]
    fn what_is_left_is_known_by_construction() {
        let all = [0, 1, 2, 3];
        // other keys leave it alone, and its own query reads it alone
        let w = head(&[0, 1, 2, 0], 0.0, None, true);
        let mut kept = head(&[0, 1, 2, 3], 1.0, None, true);
        kept.q = vec![0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0];
        let way = kept.follow(0..1, &all);
        near(&way.kept, &[1.0; 4]);
        near(&way.rank, &[1.0, 2.0, 3.0, 4.0]);
        near(&[way.read], &[1.0]);
        assert!(way.half_life.is_empty());
        // nothing written: nothing kept, nothing read
        near(&w.follow(0..1, &all).kept, &[0.0; 4]);
        // the same key again erases a half, then all
        near(&head(&[0, 1, 0, 0], 0.5, None, true).follow(0..1, &all).kept, &[1.0, 1.0, 0.5, 0.25]);
        let again = head(&[0, 1, 2, 0], 1.0, None, true).follow(0..1, &all);
        near(&again.kept, &[1.0, 1.0, 1.0, 0.0]);
        near(&[again.read], &[0.0]);
        // decay halves it, whatever comes; without erasure the same key leaves it
        let decay = head(&[1, 0, 0, 0], 1.0, Some(-std::f64::consts::LN_2), false).follow(1..2, &all);
        near(&decay.kept, &[0.0, 1.0, 0.5, 0.25]);
        near(&decay.undecayed, &[0.0, 1.0, 0.5, 0.25]);
        near(&decay.half_life, &[1.0; 4]);
        // of four writes under one key, the last query's output is made of 1/4, 1/2 and 1 on three axes, of which the needle's is the first
        near(&[decay.read], &[0.25 / (0.25 + (0.25f64 + 1.0).sqrt())]);
    }

    /// A token that decays by nothing has a half-life without end, and JSON has no number for that.
    #[test]
    fn what_is_not_finite_is_written_and_read() {
        let way = head(&[0, 1, 2, 3], 1.0, Some(0.0), true).follow(0..1, &[0, 1, 2, 3]);
        assert!(way.half_life.iter().all(|t| t.is_infinite()), "{:?}", way.half_life);
        let layer = PassageLayer { read: vec![way.read], half_life: vec![way.half_life], kept: vec![way.kept], ..PassageLayer::default() };
        let p = Passage { tokens: 4, needle: [0, 1], layers: vec![layer] };
        let text = serde_json::to_string(&p).unwrap();
        assert!(text.contains("null"));
        let back: Passage = serde_json::from_str(&text).unwrap();
        assert!(back.layers[0].half_life[0].iter().all(|t| t.is_nan()) && back.layers[0].kept == p.layers[0].kept);
    }

    #[test]
    fn the_needle_of_all_that_was_written_is_what_the_model_reads() {
        for kind in [LayerType::LinearAttention, LayerType::DeltaNet, LayerType::Mamba2] {
            is_what_it_reads(kind);
        }
    }

    fn is_what_it_reads(kind: LayerType) {
        let c = ModelConfig {
            vocab_size: 11,
            hidden_size: 8,
            num_hidden_layers: 2,
            layer_types: vec![kind, LayerType::SlidingAttention],
            mamba_num_heads: 2,
            mamba_head_dim: 3,
            mamba_state_size: 4,
            sliding_window: 5,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            partial_rotary_factor: 0.5,
            head_dim: 4,
            linear_num_key_heads: 1,
            linear_num_value_heads: 2,
            linear_key_head_dim: 4,
            linear_value_head_dim: 3,
            num_experts: 0,
            intermediate_size: 8,
            initializer_range: 0.5,
            ..Default::default()
        };
        let model = Decoder::new(&c, 3, DType::F64).unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| i * 7 % 11).collect();
        let p = passage(&model, &tokens, 0..39).unwrap();
        let (delta, window) = (&p.layers[0], &p.layers[1]);
        assert_eq!((p.layers.len(), delta.read.len(), window.read.len()), (2, 2, 4));
        assert!(window.at.is_empty() && delta.at == (0..40).collect::<Vec<_>>());
        // all but the last token's own write, and all of a window but the query itself
        for x in delta.read.iter().chain(&window.read) {
            assert!((0.1..1.0).contains(x), "{kind:?}: {p:?}");
        }
        for h in 0..2 {
            let (kept, left) = (&delta.kept[h], &delta.undecayed[h]);
            assert!(kept[39] <= left[39] + 1e-9 && kept[38] == 1.0 && kept[37] == 0.0, "{kept:?}");
        }
        let near = passage(&model, &tokens, 30..34).unwrap();
        assert!(near.layers[1].read.iter().all(|x| *x == 0.0), "outside the window");
        // the state that is followed is the model's
        let mut last = vec![];
        let mut see = |name: &str, t: &Tensor| {
            if name == "blocks.0.attn.hook_state" {
                last = t.to_vec::<f64>()?;
            }
            Ok(None)
        };
        let x = Tensor::from_slice(&tokens, &[1, 40], &engine::Device::cpu()).unwrap();
        model.forward(&x, None, None, Some(&mut see as &mut dyn nn::Observer)).unwrap();
        for h in 0..2 {
            let rank = effective_rank(&singular_values(&last[h * 12..(h + 1) * 12], 4, 3));
            assert!((rank - delta.rank[h][39]).abs() < 1e-5, "{rank} {:?}", delta.rank[h]);
        }
        for (needle, tokens) in [(3..3, &tokens[..]), (39..40, &tokens[..]), (0..1, &[1, 2, 99])] {
            assert!(passage(&model, tokens, needle).is_err());
        }
    }
}
