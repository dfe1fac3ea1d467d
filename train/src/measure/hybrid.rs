//! How a hybrid's large activations stand to its layers of softmax attention (2608.12149: pre-attention spikes and inter-spike plateaus).

use super::{Activations, HybridSpikes};
use std::collections::BTreeMap;

/// A layer whose largest magnitude is so many times the median is massive here: at small scale nothing reaches 2402.17762's absolute 100.
const RATIO: f64 = 100.0;

/// The measures of 2608.12149 of one window, where layers count from 0. `values[l][t]` is the largest magnitude of token t after layer l; `sinks` the sink
/// token of each softmax layer.
struct Window<'a> {
    values: Vec<&'a [f32]>,
    sinks: BTreeMap<usize, usize>,
}

impl Window<'_> {
    /// Sink-spike alignment: hits and events. For each softmax layer f that has linear layers between it and the softmax layer before it, whether the
    /// activation of f's sink token is, among these layers, largest right before f.
    fn alignment(&self) -> (u64, u64) {
        let (mut hits, mut events, mut begin) = (0, 0, 0);
        for (&f, &token) in &self.sinks {
            if begin < f {
                let largest = (begin..f).map(|l| self.values[l][token]).fold(0.0, f32::max);
                hits += u64::from(self.values[f - 1][token] == largest);
                events += 1;
            }
            begin = f + 1;
        }
        (hits, events)
    }
    /// The sink token that most softmax layers agree on, the first of equals.
    fn consensus(&self) -> usize {
        let mut count = BTreeMap::new();
        self.sinks.values().for_each(|t| *count.entry(*t).or_insert(0u32) += 1);
        count.iter().fold((0, 0), |best, (&t, &n)| if n > best.1 { (t, n) } else { best }).0
    }
    /// Inter-spike retention: for consecutive layers L < R that each lie before a softmax layer, the mean over the linear layers l between them of
    /// `min(1, act_l / min(act_L, act_R))` on the consensus sink token; the mean over such pairs.
    fn retention(&self) -> Option<f64> {
        let token = self.consensus();
        let act = |l: usize| f64::from(self.values[l][token]);
        let before: Vec<usize> = self.sinks.keys().filter_map(|f| f.checked_sub(1)).collect();
        let pair = |w: &[usize]| {
            let between: Vec<usize> = (w[0] + 1..w[1]).filter(|l| !self.sinks.contains_key(l)).collect();
            let low = act(w[0]).min(act(w[1]));
            (!between.is_empty() && low > 0.0).then(|| between.iter().map(|l| (act(*l) / low).min(1.0)).sum::<f64>() / between.len() as f64)
        };
        let all: Vec<f64> = before.windows(2).filter_map(pair).collect();
        (!all.is_empty()).then(|| all.iter().sum::<f64>() / all.len() as f64)
    }
}

/// Sums over windows.
#[derive(Default)]
pub(super) struct Spikes {
    hits: u64,
    events: u64,
    retention: (f64, u64),
    profile: Vec<f64>,
    windows: u64,
    positions: BTreeMap<usize, u64>,
}

impl Spikes {
    /// Adds a batch: after each layer each row's tokens' largest magnitudes, and for each softmax layer each row's sink token.
    pub fn add(&mut self, values: &[Vec<Vec<f32>>], sinks: &BTreeMap<usize, Vec<usize>>) {
        for row in 0..values.first().map_or(0, Vec::len) {
            let w = Window {
                values: values.iter().map(|l| l[row].as_slice()).collect(),
                sinks: sinks.iter().map(|(layer, rows)| (*layer, rows[row])).collect(),
            };
            let (hits, events) = w.alignment();
            (self.hits, self.events) = (self.hits + hits, self.events + events);
            if let Some(r) = w.retention() {
                self.retention = (self.retention.0 + r, self.retention.1 + 1);
            }
            let token = w.consensus();
            self.profile.resize(values.len(), 0.0);
            self.profile.iter_mut().zip(&w.values).for_each(|(sum, l)| *sum += f64::from(l[token]));
            *self.positions.entry(token).or_default() += 1;
            self.windows += 1;
        }
    }
    /// Alignment over all windows' events, retention as the mean over windows, and the pre-attention spikes: layers whose largest magnitude is at least 100
    /// times the median, with a softmax layer next.
    pub fn finish(self, activations: &Activations, is_softmax: impl Fn(usize) -> bool) -> HybridSpikes {
        let n = activations.layers.len();
        let spikes = activations.layers.iter().filter(|l| l.ratio >= RATIO && l.layer + 1 < n && is_softmax(l.layer + 1)).map(|l| l.layer);
        HybridSpikes {
            pre_attention: spikes.collect(),
            sink_position: self.positions.iter().fold((0, 0), |best, (&p, &n)| if n > best.1 { (p, n) } else { best }).0,
            sink_profile: self.profile.iter().map(|sum| sum / self.windows as f64).collect(),
            alignment: (self.events > 0).then(|| self.hits as f64 / self.events as f64),
            retention: (self.retention.1 > 0).then(|| self.retention.0 / self.retention.1 as f64),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::ActivationLayer;

    /// Seven layers, softmax at 2 and 5, of one window with three tokens; the sink token is 1 in both.
    #[test]
    fn spikes_and_plateaus_by_hand() {
        let on_sink = [1.0f32, 8.0, 3.0, 2.0, 4.0, 9.0, 1.0];
        let values: Vec<Vec<Vec<f32>>> = on_sink.iter().map(|x| vec![vec![50.0, *x, 0.5]]).collect();
        let sinks = BTreeMap::from([(2, vec![1]), (5, vec![1])]);
        let mut s = Spikes::default();
        s.add(&values, &sinks);
        // blocks of linear layers: 0..2, largest at 1, which is before 2: a hit; 3..5, largest at 4: a hit
        // between the pre-attention layers 1 and 4 lies the linear layer 3: min(1, 2 / min(8, 4)) = 0.5
        let ratios = [1.0, 250.0, 3.0, 1.0, 99.0, 300.0, 1.0];
        let layer = |(layer, ratio): (usize, &f64)| ActivationLayer { layer, ratio: *ratio, ..Default::default() };
        let a = Activations { layers: ratios.iter().enumerate().map(layer).collect(), ..Default::default() };
        let got = s.finish(&a, |l| sinks.contains_key(&l));
        assert_eq!((got.alignment, got.retention, got.sink_position), (Some(1.0), Some(0.5), 1));
        assert_eq!(got.pre_attention, [1]);
        assert_eq!(got.sink_profile, on_sink.map(f64::from));
        // the sink of layer 5 is largest two layers before: one of two events is a hit; token 0 holds its value
        let mut s = Spikes::default();
        s.add(&values, &BTreeMap::from([(2, vec![1]), (5, vec![0])]));
        let mut down = values.clone();
        (down[3][0][0], down[4][0][0]) = (60.0, 40.0);
        s.add(&down, &BTreeMap::from([(2, vec![1]), (5, vec![0])]));
        let got = s.finish(&a, |_| true);
        assert_eq!(got.alignment, Some(0.75));
        // no softmax layer with a linear one before it
        let mut s = Spikes::default();
        s.add(&values[..1], &BTreeMap::from([(0, vec![1])]));
        let got = s.finish(&Activations::default(), |_| true);
        assert_eq!((got.alignment, got.retention), (None, None));
    }
}
