//! What `measures.json` holds. What a model has nothing of is left out; numbers that are not finite are null, as JSON has none, and read back as NaN.

use super::numbers::{many, one};
use serde::{Deserialize, Serialize};

/// All measures of one checkpoint over one text. Layers and heads count from 0.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Measures {
    /// Version of this format, 1.
    pub format: u32,
    /// The folder that was measured.
    pub checkpoint: String,
    /// Optimizer steps that it was trained for, where it says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    /// Parameters.
    pub parameters: u64,
    /// Parameters that act on one token: routed experts count as often as a token is sent to one.
    pub active_parameters: u64,
    /// The layers.
    pub layers: Vec<LayerInfo>,
    /// What it was measured on.
    pub data: DataInfo,
    /// Mean negative log-likelihood, nats per token.
    #[serde(deserialize_with = "one")]
    pub loss: f64,
    /// The same in bits per byte of text, where the tokens' text is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_byte: Option<f64>,
    /// Where softmax attention looks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attention: Option<Attention>,
    /// The residual stream's large values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<Activations>,
    /// Every gate, in the order of computation.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<Gate>,
    /// The gate score of 2505.06708 Table 4: mean over all tokens, heads, dimensions and layers of softmax attention's gates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gate_score: Option<f64>,
    /// Softmax attention's output on both sides of its gate.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sdpa_output: Vec<SdpaOutput>,
    /// The delta rule's decay, write strength and state.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub delta: Vec<Delta>,
    /// Ranks of each softmax head's `W_V W_O`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub value_output_rank: Vec<Ranks>,
    /// Where tokens are sent to.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub router: Vec<Router>,
    /// Nats per token of the final norm and output projection applied after each layer.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "many")]
    pub logit_lens: Vec<f64>,
    /// Loss by position in the context.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loss_by_position: Vec<Position>,
    /// Gates along a text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<Trace>,
}

/// A layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerInfo {
    /// Its number.
    pub layer: usize,
    /// `full_attention`, `sliding_attention` or `linear_attention`.
    pub mixer: String,
    /// Whether its feed-forward is a mixture of experts.
    pub experts: bool,
}

/// The text that was measured on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DataInfo {
    /// The file or folder.
    pub path: String,
    /// Tokens that a loss was taken of.
    pub tokens: u64,
    /// Bytes of text that these are, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Tokens in a window.
    pub seq_len: usize,
    /// Windows.
    pub windows: usize,
}

/// Where softmax attention looks. Hybrids: over their softmax layers alone.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Attention {
    /// Share of attention that a window's first token gets: mean over layers, heads and all queries but the first (F-Attn of 2505.06708).
    #[serde(deserialize_with = "one")]
    pub first_token: f64,
    /// Part of (sample, layer, head) in which the first token is a sink (2410.10781), from 0 to 1; null where no text is long enough.
    #[serde(deserialize_with = "one")]
    pub sink_rate: f64,
    /// The threshold ε of a sink.
    pub sink_epsilon: f64,
    /// Tokens of a sample.
    pub sink_tokens: usize,
    /// Each softmax layer.
    pub layers: Vec<AttentionLayer>,
}

/// A softmax layer's attention, by head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AttentionLayer {
    /// Its number.
    pub layer: usize,
    /// Share of attention that the first token gets.
    #[serde(deserialize_with = "many")]
    pub first_token: Vec<f64>,
    /// Part of samples in which the first token is a sink.
    #[serde(deserialize_with = "many")]
    pub sink_rate: Vec<f64>,
    /// Mean entropy of a query's attention, nats.
    #[serde(deserialize_with = "many")]
    pub entropy: Vec<f64>,
    /// The largest score `q·k/√D` before the softmax.
    #[serde(deserialize_with = "many")]
    pub max_score: Vec<f64>,
}

/// The residual stream's large values, after each layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Activations {
    /// The largest magnitude after any layer.
    #[serde(deserialize_with = "one")]
    pub max: f64,
    /// Mean over layers of each layer's largest magnitude (M-Act of 2505.06708).
    #[serde(deserialize_with = "one")]
    pub mean_max: f64,
    /// The largest `ratio` of any layer.
    #[serde(deserialize_with = "one")]
    pub max_ratio: f64,
    /// Layers with massive activations in the sense of 2402.17762.
    pub massive_layers: usize,
    /// Each layer.
    pub layers: Vec<ActivationLayer>,
    /// Hybrids: how spikes stand to the layers of full attention (2608.12149).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spikes: Option<HybridSpikes>,
}

/// The residual stream after one layer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ActivationLayer {
    /// The layer's number.
    pub layer: usize,
    /// The largest magnitude.
    #[serde(deserialize_with = "one")]
    pub max: f64,
    /// The median magnitude of a window, mean over windows.
    #[serde(deserialize_with = "one")]
    pub median: f64,
    /// A window's largest by its median magnitude, the largest over windows.
    #[serde(deserialize_with = "one")]
    pub ratio: f64,
    /// Whether some magnitude is above 100 and at least 1000 times its window's median (2402.17762).
    pub massive: bool,
    /// The largest magnitudes, the largest first.
    pub top: Vec<Peak>,
}

/// One large value of the residual stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Peak {
    /// The window.
    pub window: usize,
    /// The position in the window.
    pub position: usize,
    /// The token there.
    pub token: u32,
    /// Its text, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The channel.
    pub channel: usize,
    /// The value, with its sign.
    #[serde(deserialize_with = "one")]
    pub value: f64,
}

/// Spikes and plateaus of a hybrid (2608.12149).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct HybridSpikes {
    /// Pre-attention spikes: layers whose `ratio` is at least 100, with a softmax layer next.
    pub pre_attention: Vec<usize>,
    /// The position of the sink token, most frequent over windows.
    pub sink_position: usize,
    /// Each layer's largest magnitude on its window's sink token, mean over windows.
    #[serde(deserialize_with = "many")]
    pub sink_profile: Vec<f64>,
    /// Part of softmax layers in front of which the sink token is largest within its block; none where no softmax layer has a linear one before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment: Option<f64>,
    /// How much of two successive pre-attention spikes stays in the linear layers between; none with fewer than two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention: Option<f64>,
}

/// One gate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gate {
    /// The tap's full name.
    pub name: String,
    /// The layer.
    pub layer: usize,
    /// `attention`, `value`, `key`, `query`, `dense`, `delta_output`, `beta` or `shared_expert`.
    pub kind: String,
    /// Mean.
    #[serde(deserialize_with = "one")]
    pub mean: f64,
    /// Part of magnitude below 0.01.
    #[serde(deserialize_with = "one")]
    pub below_001: f64,
    /// Part of magnitude below 0.1.
    #[serde(deserialize_with = "one")]
    pub below_01: f64,
    /// Part of magnitude above 0.9.
    #[serde(deserialize_with = "one")]
    pub above_09: f64,
    /// Mean of each head; empty where it has none.
    #[serde(deserialize_with = "many")]
    pub heads: Vec<f64>,
    /// How often which value.
    pub histogram: Histogram,
}

/// Counts in bins of equal width. What lies outside is counted in the first or the last bin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Lower end of the first bin.
    pub from: f64,
    /// Upper end of the last bin.
    pub to: f64,
    /// Counts.
    pub counts: Vec<u64>,
}

/// Softmax attention's output in one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SdpaOutput {
    /// The layer.
    pub layer: usize,
    /// Before the gate; none where the layer has no gate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Magnitudes>,
    /// After the gate, as the output projection reads it.
    pub after: Magnitudes,
}

/// How small the numbers of a tensor are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Magnitudes {
    /// Mean magnitude.
    #[serde(deserialize_with = "one")]
    pub mean_abs: f64,
    /// Part of magnitude below 1e-2.
    #[serde(deserialize_with = "one")]
    pub below_1e2: f64,
    /// Part of magnitude below 1e-3.
    #[serde(deserialize_with = "one")]
    pub below_1e3: f64,
}

pub use super::more_types::*;
