//! Massive activations: the residual stream's largest magnitudes after each layer.

use super::watch::{At, Reader, host};
use super::{ActivationLayer, Activations, Peak};
use engine::{Result, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;

/// The criterion of 2402.17762: a magnitude above 100 that is at least 1000 times the median of its hidden state.
const MASSIVE: (f32, f32) = (100.0, 1000.0);
/// Peaks that are kept of a layer.
const TOP: usize = 3;

/// A value and where it lies.
#[derive(Clone, Copy)]
struct Found {
    window: usize,
    position: usize,
    channel: usize,
    value: f32,
}

/// What one window's hidden state `[T, M]` says.
struct Window {
    max: f32,
    median: f32,
    top: Vec<Found>,
    /// Each token's largest magnitude.
    tokens: Vec<f32>,
}

fn look(h: &[f32], width: usize, window: usize) -> Window {
    let mut top: Vec<Found> = vec![];
    for (i, &value) in h.iter().enumerate() {
        if top.len() < TOP || value.abs() > top[TOP - 1].value.abs() {
            // the first of equals stays in front
            let at = top.partition_point(|f| f.value.abs() >= value.abs());
            top.insert(at, Found { window, position: i / width, channel: i % width, value });
            top.truncate(TOP);
        }
    }
    let mut size: Vec<f32> = h.iter().map(|x| x.abs()).collect();
    let tokens: Vec<f32> = size.chunks(width).map(|t| t.iter().fold(0.0, |m: f32, x| m.max(*x))).collect();
    let half = size.len() / 2;
    let median = if size.is_empty() {
        0.0
    } else {
        let (below, mid, _) = size.select_nth_unstable_by(half, f32::total_cmp);
        let mid = *mid;
        if h.len() % 2 == 1 { mid } else { 0.5 * (mid + below.iter().fold(0.0, |m: f32, x| m.max(*x))) }
    };
    Window { max: tokens.iter().fold(0.0, |m: f32, x| m.max(*x)), median, top, tokens }
}

#[derive(Default)]
struct Layer {
    max: f32,
    median: f64,
    ratio: f64,
    massive: bool,
    top: Vec<Found>,
    windows: usize,
}

/// The residual stream over a text.
#[derive(Default)]
pub(super) struct Stream {
    layers: BTreeMap<usize, Layer>,
    /// Of the last batch: after each layer, each row's tokens' largest magnitudes.
    pub values: Vec<Vec<Vec<f32>>>,
}

impl Stream {
    /// The measures of [`Activations`] (without spikes); `tokens` are those of all windows, one after the other, `time` to a window.
    ///
    /// Of each window's hidden state after a layer, `[T, M]`: the largest and the median magnitude, and their ratio; a layer's `max` and `ratio` are the largest
    /// over windows, its `median` the mean. Massive (2402.17762 §2): above 100 and at least 1000 times the window's median, in some window. M-Act of 2505.06708
    /// (Table 4) is the mean over layers of `max`.
    pub fn finish(self, tokens: &[u32], time: usize, text: impl Fn(u32) -> Option<String>) -> Activations {
        let peak = |f: &Found| {
            let token = tokens.get(f.window * time + f.position).copied().unwrap_or_default();
            Peak { window: f.window, position: f.position, token, text: text(token), channel: f.channel, value: f.value.into() }
        };
        let layer = |(layer, l): (&usize, &Layer)| ActivationLayer {
            layer: *layer,
            max: l.max.into(),
            median: l.median / l.windows.max(1) as f64,
            ratio: l.ratio,
            massive: l.massive,
            top: l.top.iter().map(peak).collect(),
        };
        let layers: Vec<ActivationLayer> = self.layers.iter().map(layer).collect();
        let most = |of: fn(&ActivationLayer) -> f64| layers.iter().map(of).fold(0.0, f64::max);
        Activations {
            max: most(|l| l.max),
            mean_max: layers.iter().map(|l| l.max).sum::<f64>() / layers.len().max(1) as f64,
            max_ratio: most(|l| l.ratio),
            massive_layers: layers.iter().filter(|l| l.massive).count(),
            layers,
            spikes: None,
        }
    }
}

impl Reader for Stream {
    fn reads(&self, at: &At) -> bool {
        at.hook == "hook_resid_post"
    }
    fn see(&mut self, at: &At, value: &Tensor) -> Result<()> {
        let (t, width) = (value.dim(1), value.dim(2));
        let all = host(value)?;
        let layer = self.layers.entry(at.layer).or_default();
        let first = layer.windows;
        let rows: Vec<Window> = all.par_chunks((t * width).max(1)).enumerate().map(|(i, h)| look(h, width, first + i)).collect();
        if at.layer == 0 {
            self.values.clear();
        }
        for w in &rows {
            let ratio = if w.median > 0.0 { f64::from(w.max) / f64::from(w.median) } else { f64::INFINITY };
            layer.max = layer.max.max(w.max);
            layer.median += f64::from(w.median);
            layer.ratio = layer.ratio.max(ratio);
            layer.massive |= w.max > MASSIVE.0 && w.max >= MASSIVE.1 * w.median;
            layer.top.extend(&w.top);
        }
        layer.top.sort_by(|a, b| b.value.abs().total_cmp(&a.value.abs()));
        layer.top.truncate(TOP);
        layer.windows += rows.len();
        self.values.push(rows.into_iter().map(|w| w.tokens).collect());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_planted_massive_activation() {
        // two windows of four tokens of eight channels; in the second, token 2, channel 5 is massive
        let mut h = vec![0.1f32; 64];
        h[32 + 2 * 8 + 5] = -150.0;
        h[3] = 7.0;
        let mut stream = Stream::default();
        let at = At { name: "blocks.0.hook_resid_post", layer: 0, hook: "hook_resid_post", softmax: true };
        stream.see(&at, &Tensor::from_vec(h, &[2, 4, 8]).unwrap()).unwrap();
        assert_eq!(stream.values[0][1], [0.1, 0.1, 150.0, 0.1]);
        let tokens: Vec<u32> = (10..18).collect();
        let a = stream.finish(&tokens, 4, |t| Some(format!("<{t}>")));
        let l = &a.layers[0];
        assert!(l.massive && a.massive_layers == 1 && a.max == 150.0 && (l.ratio - 1500.0).abs() < 1e-3 && (l.median - 0.1).abs() < 1e-6, "{a:?}");
        let (first, second) = (&l.top[0], &l.top[1]);
        assert_eq!((first.window, first.position, first.token, first.channel, first.value), (1, 2, 16, 5, -150.0));
        assert_eq!(first.text.as_deref(), Some("<16>"));
        assert_eq!((second.window, second.position, second.channel, second.value), (0, 0, 3, 7.0));
        // large, but only 900 times the median; and a thousand times, but not large
        for (large, rest, massive) in [(180.0, 0.2, false), (99.0, 0.01, false), (101.0, 0.1, true)] {
            let mut h = vec![rest; 24];
            h[7] = large;
            let mut stream = Stream::default();
            stream.see(&at, &Tensor::from_vec(h, &[1, 3, 8]).unwrap()).unwrap();
            assert_eq!(stream.finish(&[0; 3], 3, |_| None).layers[0].massive, massive, "{large} {rest}");
        }
    }
}
