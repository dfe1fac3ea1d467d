//! The delta rule's, the router's and the text's part of `measures.json`.

use super::numbers::{many, many_of_many, one};
use serde::{Deserialize, Serialize};

/// A layer of the delta rule, by value head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// The layer.
    pub layer: usize,
    /// Median over tokens of the half-life `ln 2 / −ln α`, in tokens.
    #[serde(deserialize_with = "many")]
    pub half_life: Vec<f64>,
    /// Mean write strength β.
    #[serde(deserialize_with = "many")]
    pub beta: Vec<f64>,
    /// Frobenius norm of the state after a window, mean over windows.
    #[serde(deserialize_with = "many")]
    pub state_norm: Vec<f64>,
    /// Effective rank of the state after a window, mean over windows.
    #[serde(deserialize_with = "many")]
    pub state_rank: Vec<f64>,
}

/// Ranks of `W_V W_O` in one softmax layer, by query head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ranks {
    /// The layer.
    pub layer: usize,
    /// Effective rank: exp of the entropy of the singular values.
    #[serde(deserialize_with = "many")]
    pub heads: Vec<f64>,
    /// Stable rank `‖A‖_F² / ‖A‖₂²`.
    #[serde(deserialize_with = "many")]
    pub stable: Vec<f64>,
}

/// A layer's router.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Router {
    /// The layer.
    pub layer: usize,
    /// Each expert's share of the routes; they sum to 1.
    #[serde(deserialize_with = "many")]
    pub load: Vec<f64>,
    /// Mean over tokens of the entropy of the router's probabilities, nats.
    #[serde(deserialize_with = "one")]
    pub entropy: f64,
    /// Experts that no token was sent to.
    pub dead: usize,
    /// The largest load over the mean load.
    #[serde(deserialize_with = "one")]
    pub max_over_mean: f64,
    /// Coefficient of variation of the load: its standard deviation over experts by its mean.
    #[serde(deserialize_with = "one")]
    pub cv: f64,
}

/// The loss at positions `from..to` of long windows.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// The first position.
    pub from: usize,
    /// One past the last.
    pub to: usize,
    /// Nats per token.
    #[serde(deserialize_with = "one")]
    pub loss: f64,
    /// Tokens that were predicted there.
    pub tokens: u64,
}

/// Gates along a text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Trace {
    /// The text of each token; a character is at the token that completes it, and the others of it are empty.
    pub tokens: Vec<String>,
    /// The loss of predicting each token from those before it, nats; null for the first.
    pub loss: Vec<Option<f64>>,
    /// Each gate.
    pub series: Vec<Series>,
}

/// One gate along a text.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Series {
    /// The tap's full name.
    pub name: String,
    /// The layer.
    pub layer: usize,
    /// As [`Gate`](super::Gate)'s.
    pub kind: String,
    /// The mean over heads and dimensions at each token.
    #[serde(deserialize_with = "many")]
    pub values: Vec<f64>,
    /// For each head, the mean over its dimensions at each token; empty where there are none.
    #[serde(deserialize_with = "many_of_many")]
    pub heads: Vec<Vec<f64>>,
}
