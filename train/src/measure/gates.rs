//! What gates let through: means, fractions and histograms, and the same token by token.

use super::watch::{At, Reader, host};
use super::{Gate, Histogram, Series};
use engine::{Result, Tensor};
use nn::ModelConfig;
use rayon::prelude::*;

/// Bins of a histogram as it is written.
const BINS: usize = 50;
/// Ends and bins of the histogram that is counted: those that are written are sums of these.
const FINE: (f64, f64, usize) = (-5.0, 5.0, 500);
/// Ends that a histogram may have: of sigmoids, of β up to 2, of SiLU (whose least value is −0.28), of all else.
const ENDS: [(f64, f64); 4] = [(0.0, 1.0), (0.0, 2.0), (-0.5, 4.5), (FINE.0, FINE.1)];

/// What kind of gate a tap is: G1 to G5 of 2505.06708 are `attention`, `value`, `key`, `query`, `dense`.
fn kind(at: &At) -> Option<&'static str> {
    Some(match (at.hook, at.softmax) {
        ("attn.hook_gate", true) => "attention",
        ("attn.hook_value_gate", true) => "value",
        ("attn.hook_key_gate", true) => "key",
        ("attn.hook_query_gate", true) => "query",
        ("attn.hook_dense_gate", true) => "dense",
        ("attn.hook_switch", true) => "switch",
        ("attn.hook_gate", false) => "delta_output",
        ("attn.hook_beta", false) => "beta",
        ("mlp.hook_shared_gate", _) => "shared_expert",
        _ => return None,
    })
}

/// Heads and dimensions of a head in a gate of this shape, `[B, T, …]` or `[N, 1]`; no heads where it has none.
fn heads(kind: &str, shape: &[usize], c: &ModelConfig) -> (Option<usize>, usize) {
    let last = shape.last().copied().unwrap_or(1);
    let own = match kind {
        "attention" | "query" => c.num_attention_heads,
        "value" | "key" => c.num_key_value_heads,
        // of whichever mixer, one for each head
        "beta" => last,
        _ => 0,
    };
    match shape.len() {
        4.. => (Some(shape[2..shape.len() - 1].iter().product()), last),
        3 if last == own => (Some(last), 1),
        _ => (None, last),
    }
}

/// Sums over one gate.
struct Sum {
    name: String,
    layer: usize,
    kind: &'static str,
    headed: bool,
    heads: Vec<f64>,
    counts: Counts,
}

#[derive(Clone)]
struct Counts {
    n: u64,
    below_001: u64,
    below_01: u64,
    above_09: u64,
    least: f32,
    most: f32,
    fine: Vec<u64>,
}

impl Counts {
    fn new() -> Counts {
        Counts { n: 0, below_001: 0, below_01: 0, above_09: 0, least: f32::INFINITY, most: f32::NEG_INFINITY, fine: vec![0; FINE.2] }
    }
    fn of(values: &[f32]) -> Counts {
        let mut c = Counts::new();
        for &x in values {
            let size = x.abs();
            c.below_001 += u64::from(size < 0.01);
            c.below_01 += u64::from(size < 0.1);
            c.above_09 += u64::from(size > 0.9);
            c.least = c.least.min(x);
            c.most = c.most.max(x);
            // beyond the ends, the cast goes to the first or the last bin
            let bin = ((f64::from(x) - FINE.0) * FINE.2 as f64 / (FINE.1 - FINE.0)) as usize;
            c.fine[bin.min(FINE.2 - 1)] += 1;
        }
        c.n = values.len() as u64;
        c
    }
    fn add(mut self, other: Counts) -> Counts {
        self.n += other.n;
        self.below_001 += other.below_001;
        self.below_01 += other.below_01;
        self.above_09 += other.above_09;
        self.least = self.least.min(other.least);
        self.most = self.most.max(other.most);
        self.fine.iter_mut().zip(other.fine).for_each(|(a, b)| *a += b);
        self
    }
    /// With the narrowest of [`ENDS`] that holds all values.
    fn histogram(&self) -> Histogram {
        let holds = |(from, to): &&(f64, f64)| f64::from(self.least) >= *from && f64::from(self.most) <= *to;
        let (from, to) = *ENDS.iter().find(holds).unwrap_or(&ENDS[3]);
        let mut counts = vec![0; BINS];
        let (per_unit, low) = (FINE.2 as f64 / (FINE.1 - FINE.0), ((from - FINE.0) * FINE.2 as f64 / (FINE.1 - FINE.0)).round() as usize);
        let width = ((to - from) * per_unit / BINS as f64).round() as usize;
        self.fine.iter().enumerate().for_each(|(i, n)| counts[(i.saturating_sub(low) / width).min(BINS - 1)] += n);
        Histogram { from, to, counts }
    }
}

/// Every gate over a text.
pub(super) struct Gates<'a> {
    config: &'a ModelConfig,
    sums: Vec<Sum>,
    /// The same token by token, for a short text.
    series: Option<Vec<Series>>,
}

impl<'a> Gates<'a> {
    pub fn new(config: &'a ModelConfig) -> Gates<'a> {
        Gates { config, sums: vec![], series: None }
    }
    /// One that keeps each gate's values along one text.
    pub fn along(config: &'a ModelConfig) -> Gates<'a> {
        Gates { config, sums: vec![], series: Some(vec![]) }
    }
    pub fn into_series(self) -> Vec<Series> {
        self.series.unwrap_or_default()
    }

    /// Each gate, after its activation: the mean over tokens, heads and dimensions; the parts of magnitude below 0.01, below 0.1 and above 0.9 (a SiLU's gate has
    /// either sign, and is as good as shut near zero); each head's mean; and a histogram with 50 bins over the narrowest of `[0, 1]`, `[0, 2]`, `[−0.5, 4.5]` and
    /// `[−5, 5]` that holds all values (what lies beyond the last is counted at its ends).
    ///
    /// The gate score is the mean over layers of softmax attention's gates' means (2505.06708 Table 4, "gate score", there over all layers and held-out text):
    /// of those on its output (G1) where there are any, else of those at its other positions.
    pub fn finish(self) -> (Vec<Gate>, Option<f64>) {
        let gate = |s: Sum| {
            let n = s.counts.n.max(1) as f64;
            let part = |k: u64| k as f64 / n;
            let heads = s.heads.len() as f64;
            Gate {
                mean: s.heads.iter().sum::<f64>() / n,
                below_001: part(s.counts.below_001),
                below_01: part(s.counts.below_01),
                above_09: part(s.counts.above_09),
                heads: if s.headed { s.heads.iter().map(|sum| sum * heads / n).collect() } else { vec![] },
                histogram: s.counts.histogram(),
                name: s.name,
                layer: s.layer,
                kind: s.kind.into(),
            }
        };
        let all: Vec<Gate> = self.sums.into_iter().map(gate).collect();
        let mean = |kinds: &[&str]| {
            let means: Vec<f64> = all.iter().filter(|g| kinds.contains(&g.kind.as_str())).map(|g| g.mean).collect();
            (!means.is_empty()).then(|| means.iter().sum::<f64>() / means.len() as f64)
        };
        let score = mean(&["attention"]).or_else(|| mean(&["value", "key", "query", "dense"]));
        (all, score)
    }
}

impl Reader for Gates<'_> {
    fn reads(&self, at: &At) -> bool {
        kind(at).is_some()
    }
    fn see(&mut self, at: &At, value: &Tensor) -> Result<()> {
        let Some(kind) = kind(at) else { return Ok(()) };
        let (headed, dims) = heads(kind, value.shape(), self.config);
        let h = headed.unwrap_or(1);
        let x = host(value)?;
        let means = |token: &[f32]| -> Vec<f64> { token.chunks(dims).map(|d| d.iter().map(|x| f64::from(*x)).sum::<f64>() / dims as f64).collect() };
        if let Some(series) = &mut self.series {
            let tokens: Vec<Vec<f64>> = x.chunks((h * dims).max(1)).map(means).collect();
            series.push(Series {
                name: at.name.into(),
                layer: at.layer,
                kind: kind.into(),
                values: tokens.iter().map(|t| t.iter().sum::<f64>() / h as f64).collect(),
                heads: if headed.is_some() { (0..h).map(|i| tokens.iter().map(|t| t[i]).collect()).collect() } else { vec![] },
            });
            return Ok(());
        }
        let sum = match self.sums.iter().position(|s| s.name == at.name) {
            Some(i) => &mut self.sums[i],
            None => {
                let new = Sum { name: at.name.into(), layer: at.layer, kind, headed: headed.is_some(), heads: vec![0.0; h], counts: Counts::new() };
                self.sums.push(new);
                self.sums.last_mut().ok_or_else(|| engine::Error::invalid("gates", "no gate was kept".to_string()))?
            }
        };
        for token in x.chunks((h * dims).max(1)) {
            sum.heads.iter_mut().zip(means(token)).for_each(|(sum, mean)| *sum += mean * dims as f64);
        }
        let counts = x.par_chunks(1 << 16).map(Counts::of).reduce(Counts::new, Counts::add);
        sum.counts = std::mem::replace(&mut sum.counts, Counts::new()).add(counts);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at<'a>(name: &'a str, hook: &'a str, softmax: bool) -> At<'a> {
        At { name, layer: 0, hook, softmax }
    }
    fn near(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-6, "{a} is not {b}");
    }

    #[test]
    fn fractions_heads_and_bins() {
        let c = ModelConfig { num_attention_heads: 2, ..Default::default() };
        let mut g = Gates::new(&c);
        let a = at("blocks.0.attn.hook_gate", "attn.hook_gate", true);
        // two tokens, two heads, two dimensions
        let x = Tensor::from_vec([0.0f32, 0.005, 0.5, 1.0, 0.05, 0.95, 0.51, 1.0], &[1, 2, 2, 2]).unwrap();
        g.see(&a, &x).unwrap();
        g.see(&a, &x).unwrap();
        let (gates, score) = g.finish();
        let g = &gates[0];
        near(g.mean, 4.015 / 8.0);
        near(score.unwrap(), g.mean);
        assert_eq!((g.below_001, g.below_01, g.above_09, g.kind.as_str()), (0.25, 0.375, 0.375, "attention"));
        near(g.heads[0], 1.005 / 4.0);
        near(g.heads[1], 3.01 / 4.0);
        assert_eq!((g.histogram.from, g.histogram.to, g.histogram.counts.len()), (0.0, 1.0, 50));
        // 0 and 0.005; 0.05 in the third; 0.5 and 0.51 in the 26th; 1 and 1 in the last, 0.95 two before
        let filled: Vec<(usize, u64)> = g.histogram.counts.iter().copied().enumerate().filter(|(_, n)| *n > 0).collect();
        assert_eq!(filled, [(0, 4), (2, 2), (25, 4), (47, 2), (49, 4)]);
    }

    #[test]
    fn values_beyond_the_ends() {
        let c = ModelConfig::default();
        let bins = |values: &[f32]| {
            let mut g = Gates::new(&c);
            g.see(&at("blocks.0.attn.hook_gate", "attn.hook_gate", false), &Tensor::from_vec(values, &[1, values.len(), 1, 1, 1]).unwrap()).unwrap();
            g.finish().0.remove(0).histogram
        };
        let h = bins(&[-0.27, 0.0, 4.4]);
        assert_eq!((h.from, h.to, h.counts[2], h.counts[5], h.counts[49]), (-0.5, 4.5, 1, 1, 1));
        let h = bins(&[-9.0, -4.9, 30.0]);
        assert_eq!((h.from, h.to, h.counts[0], h.counts[49]), (-5.0, 5.0, 2, 1));
        let h = bins(&[0.1, 1.5]);
        assert_eq!((h.from, h.to, h.counts[2], h.counts[37]), (0.0, 2.0, 1, 1));
    }

    #[test]
    fn the_score_is_of_the_position_that_there_is() {
        let c = ModelConfig { num_attention_heads: 2, num_key_value_heads: 1, linear_num_value_heads: 2, ..Default::default() };
        let gate = |v: f64, shape: &[usize]| Tensor::full(v, shape, engine::DType::F32, &engine::Device::cpu()).unwrap();
        let mut g = Gates::new(&c);
        g.see(&at("a", "attn.hook_gate", false), &gate(0.9, &[1, 2, 1, 2, 4])).unwrap();
        g.see(&at("b", "attn.hook_value_gate", true), &gate(0.25, &[1, 2, 1])).unwrap();
        g.see(&at("c", "mlp.hook_shared_gate", true), &gate(0.75, &[2, 1])).unwrap();
        g.see(&at("d", "attn.hook_beta", false), &gate(0.5, &[1, 2, 2])).unwrap();
        let (gates, score) = g.finish();
        assert_eq!(score, Some(0.25));
        assert_eq!(gates.iter().map(|g| g.kind.as_str()).collect::<Vec<_>>(), ["delta_output", "value", "shared_expert", "beta"]);
        assert_eq!(gates.iter().map(|g| g.heads.len()).collect::<Vec<_>>(), [2, 1, 0, 2]);
        let mut g = Gates::along(&c);
        g.see(&at("a", "attn.hook_gate", true), &Tensor::from_vec([0.0f32, 1.0, 0.5, 0.25], &[1, 2, 2]).unwrap()).unwrap();
        let s = g.into_series().remove(0);
        assert_eq!((s.values, s.heads), (vec![0.5, 0.375], vec![vec![0.0, 0.5], vec![1.0, 0.25]]));
    }
}
