//! The delta rule: how fast it forgets, how strongly it writes, what its state holds.

use super::Delta;
use super::svd::{effective_rank, singular_values};
use super::watch::{At, Reader, host};
use engine::{DType, Result, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Decays that are kept of a head: of a longer text, every second or third and so on.
const DECAYS: usize = 1 << 14;
/// Windows whose states' ranks are taken.
const RANKED: usize = 16;

#[derive(Default)]
struct Sums {
    /// By head: ln α of tokens.
    decays: Vec<Vec<f32>>,
    tokens: usize,
    beta: Vec<f64>,
    norm: Vec<f64>,
    rank: Vec<f64>,
    windows: usize,
    ranked: usize,
}

/// The delta rule over a text.
pub(super) struct States {
    layers: BTreeMap<usize, Sums>,
    /// Every so-many-th token's decay is kept.
    stride: usize,
}

impl States {
    /// For a text of so many tokens.
    pub fn new(tokens: usize) -> States {
        States { layers: BTreeMap::new(), stride: tokens.div_ceil(DECAYS).max(1) }
    }

    /// By value head: the median over tokens (16384 of them at most, evenly spread) of the half-life `ln 2 / −ln α_t`, in tokens; the mean of β; the Frobenius norm
    /// of the state S after a window, mean over windows, and its effective rank (Roy & Vetterli 2007, of S uncentred), mean over the first 16 windows.
    pub fn finish(self) -> Vec<Delta> {
        let half_life = |decays: Vec<f32>| {
            let mut all: Vec<f64> = decays.iter().map(|g| std::f64::consts::LN_2 / -f64::from(*g)).collect();
            all.sort_by(f64::total_cmp);
            let half = all.len() / 2;
            match all.len() {
                0 => f64::NAN,
                n if n % 2 == 1 => all[half],
                _ => 0.5 * (all[half - 1] + all[half]),
            }
        };
        let per = |sums: Vec<f64>, n: usize| sums.into_iter().map(|x| x / n as f64).collect();
        let layer = |(layer, s): (usize, Sums)| Delta {
            layer,
            half_life: s.decays.into_iter().map(half_life).collect(),
            beta: per(s.beta, s.tokens),
            state_norm: per(s.norm, s.windows),
            state_rank: per(s.rank, s.ranked),
        };
        self.layers.into_iter().map(layer).collect()
    }
}

impl Reader for States {
    fn reads(&self, at: &At) -> bool {
        !at.softmax && matches!(at.hook, "attn.hook_beta" | "attn.hook_log_decay" | "attn.hook_state")
    }
    fn see(&mut self, at: &At, value: &Tensor) -> Result<()> {
        let stride = self.stride;
        let s = self.layers.entry(at.layer).or_default();
        match at.hook {
            "attn.hook_state" => {
                let (n, heads, rows, cols) = (value.dim(0), value.dim(1), value.dim(2), value.dim(3));
                let all = value.cast(DType::F64)?.contiguous()?.to_vec::<f64>()?;
                let ranked = n.min(RANKED.saturating_sub(s.ranked));
                let each = all.par_chunks((rows * cols).max(1)).enumerate().map(|(i, a)| {
                    let norm = a.iter().map(|x| x * x).sum::<f64>().sqrt();
                    (norm, if i < ranked * heads { effective_rank(&singular_values(a, rows, cols)) } else { 0.0 })
                });
                let each: Vec<(f64, f64)> = each.collect();
                s.norm.resize(heads, 0.0);
                s.rank.resize(heads, 0.0);
                for (i, (norm, rank)) in each.into_iter().enumerate() {
                    s.norm[i % heads] += norm;
                    s.rank[i % heads] += rank;
                }
                (s.windows, s.ranked) = (s.windows + n, s.ranked + ranked);
            }
            "attn.hook_beta" => {
                let heads = value.dim(2);
                s.beta.resize(heads, 0.0);
                host(value)?.chunks(heads).for_each(|t| s.beta.iter_mut().zip(t).for_each(|(sum, x)| *sum += f64::from(*x)));
                s.tokens += value.dim(0) * value.dim(1);
            }
            _ => {
                let heads = value.dim(2);
                s.decays.resize(heads, vec![]);
                for t in host(value)?.chunks(heads).step_by(stride) {
                    s.decays.iter_mut().zip(t).for_each(|(all, g)| all.push(*g));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_lives_and_ranks_by_construction() {
        let mut s = States::new(10);
        let see = |s: &mut States, hook: &str, x: &[f32], shape: &[usize]| {
            let at = At { name: "", layer: 2, hook, softmax: false };
            assert!(s.reads(&at) && !s.reads(&At { softmax: true, ..at }));
            s.see(&at, &Tensor::from_vec(x, shape).unwrap()).unwrap();
        };
        // α = ½ halves in one token, α = 2^(−1/8) in eight, whatever one token in three does
        let (one, eight) = (-2f32.ln(), -2f32.ln() / 8.0);
        see(&mut s, "attn.hook_log_decay", &[one, eight, one, eight, -50.0, -0.001], &[1, 3, 2]);
        see(&mut s, "attn.hook_beta", &[0.25, 1.0, 0.75, 1.0], &[1, 2, 2]);
        // of three windows with two heads of [3, 4]: a head of rank 1, and one of rank 2 with equal singular values 2
        let outer: Vec<f32> = [1.0, 2.0, 2.0f32].iter().flat_map(|x| [3.0, 0.0, 4.0, 0.0].map(|y| x * y)).collect();
        let mut pair = vec![0f32; 12];
        (pair[1], pair[4]) = (2.0, -2.0);
        let states = [outer, pair].concat().repeat(3);
        see(&mut s, "attn.hook_state", &states, &[3, 2, 3, 4]);
        let d = s.finish().remove(0);
        let near = |a: &[f64], b: [f64; 2]| a.iter().zip(b).for_each(|(x, y)| assert!((x - y).abs() < 1e-6 * y, "{d:?}"));
        assert_eq!(d.layer, 2);
        near(&d.half_life, [1.0, 8.0]);
        near(&d.beta, [0.5, 1.0]);
        near(&d.state_norm, [15.0, 8f64.sqrt()]);
        near(&d.state_rank, [1.0, 2.0]);
    }
}
