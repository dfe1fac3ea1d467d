//! What mixes tokens in a layer, and how the recurrent mixers are laid out.

use super::ModelConfig;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// What mixes tokens in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerType {
    /// Gated DeltaNet; transformers' word for it.
    #[serde(alias = "gated_delta_net")]
    LinearAttention,
    /// DeltaNet (2406.06484): the block of `linear_attention` with erasure and without decay, whatever `linear_erase` and `linear_decay` say.
    DeltaNet,
    /// Mamba2 (2405.21060).
    Mamba2,
    /// Gated softmax attention over the whole context.
    FullAttention,
    /// Gated softmax attention over the last `sliding_window` tokens.
    SlidingAttention,
}

impl LayerType {
    /// Whether it is softmax attention, of whichever reach; else it carries a state.
    pub fn is_softmax(self) -> bool {
        matches!(self, LayerType::FullAttention | LayerType::SlidingAttention)
    }
    /// Whether it is the block of Gated DeltaNet, with decay or without.
    pub(crate) fn is_delta(self) -> bool {
        matches!(self, LayerType::LinearAttention | LayerType::DeltaNet)
    }
    /// Its name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            LayerType::LinearAttention => "linear_attention",
            LayerType::DeltaNet => "delta_net",
            LayerType::Mamba2 => "mamba2",
            LayerType::FullAttention => "full_attention",
            LayerType::SlidingAttention => "sliding_attention",
        }
    }
}

/// Activation of Gated DeltaNet's output gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputGate {
    /// As Qwen3-Next.
    #[serde(alias = "swish")]
    Silu,
    /// As Qwen3.8 and Kimi Linear.
    Sigmoid,
}

/// What scales the delta rule's queries and keys, head by head (2412.06464, table S.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearQkNorm {
    /// `x · rsqrt(Σ x² + 1e-6)`, inside the kernel.
    L2,
    /// `x / (Σ |x| + 1e-6)`.
    L1,
    /// Nothing.
    None,
}

/// The activation of the delta rule's queries and keys, behind the convolution (2412.06464, table S.1); values have a SiLU always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinearActivation {
    /// `x · sigmoid(x)`, inside the convolution's kernel.
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `1 + ELU(x)`: `1 + x` above 0, `exp(x)` below.
    Elu1,
    /// None.
    Identity,
}

/// The sizes of a layer that carries a state `[key_dim, value_dim]` for each value head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recurrence {
    /// Heads of queries and keys; Mamba2's groups.
    pub key_heads: usize,
    /// Heads of values, and states; Mamba2's heads.
    pub value_heads: usize,
    /// Numbers of a key; Mamba2's state size.
    pub key_dim: usize,
    /// Numbers of a value; Mamba2's head dimension.
    pub value_dim: usize,
    /// Whether the state decays.
    pub decays: bool,
    /// Whether what the state holds for a key is erased before it is written.
    pub erases: bool,
}

impl Recurrence {
    /// Numbers of all heads' values of a token.
    pub(crate) fn values(&self) -> usize {
        self.value_heads * self.value_dim
    }
    /// Numbers of all heads' keys of a token.
    pub(crate) fn keys(&self) -> usize {
        self.key_heads * self.key_dim
    }
    /// Channels of the convolution: of queries, keys and values.
    pub(crate) fn channels(&self) -> usize {
        2 * self.keys() + self.values()
    }
}

impl ModelConfig {
    /// The sizes of layer `i`'s recurrence; none where it is softmax attention.
    pub fn recurrence(&self, i: usize) -> Option<Recurrence> {
        self.recurrence_of(self.layer_type(i))
    }

    /// The sizes of a kind of layer.
    pub(crate) fn recurrence_of(&self, kind: LayerType) -> Option<Recurrence> {
        match kind {
            LayerType::FullAttention | LayerType::SlidingAttention => None,
            LayerType::LinearAttention | LayerType::DeltaNet => Some(Recurrence {
                key_heads: self.linear_num_key_heads,
                value_heads: self.linear_num_value_heads,
                key_dim: self.linear_key_head_dim,
                value_dim: self.linear_value_head_dim,
                decays: kind == LayerType::LinearAttention && self.linear_decay,
                erases: kind == LayerType::DeltaNet || self.linear_erase,
            }),
            LayerType::Mamba2 => Some(Recurrence {
                key_heads: self.mamba_n_groups,
                value_heads: self.mamba_num_heads,
                key_dim: self.mamba_state_size,
                value_dim: self.mamba_head_dim,
                decays: true,
                erases: false,
            }),
        }
    }

    /// Whether a layer has this mixer.
    pub(crate) fn has(&self, kind: impl Fn(LayerType) -> bool) -> bool {
        (0..self.num_hidden_layers).any(|i| kind(self.layer_type(i)))
    }

    /// The keys of Gated DeltaNet's block that ask for more than its kernels compute.
    pub(super) fn composed_delta(&self) -> Vec<&'static str> {
        if !self.has(LayerType::is_delta) {
            return vec![];
        }
        let all = [
            ("linear_qk_activation", !matches!(self.linear_qk_activation, LinearActivation::Silu | LinearActivation::Identity)),
            ("linear_qk_norm", self.linear_qk_norm == LinearQkNorm::L1),
            ("linear_output_norm", self.linear_output_gate && !self.linear_output_norm),
        ];
        all.into_iter().filter(|(_, composed)| *composed).map(|(key, _)| key).collect()
    }

    /// Likewise of Mamba2.
    pub(super) fn composed_mamba(&self) -> Vec<&'static str> {
        if self.mamba_use_conv_bias && self.has(|k| k == LayerType::Mamba2) { vec!["mamba_use_conv_bias"] } else { vec![] }
    }

    /// The same without what is composed there.
    pub(super) fn without_composed_recurrence(self) -> ModelConfig {
        let silu = matches!(self.linear_qk_activation, LinearActivation::Silu | LinearActivation::Identity);
        ModelConfig {
            linear_qk_activation: if silu { self.linear_qk_activation } else { LinearActivation::Silu },
            linear_qk_norm: if self.linear_qk_norm == LinearQkNorm::L1 { LinearQkNorm::L2 } else { self.linear_qk_norm },
            linear_output_norm: self.linear_output_norm || self.linear_output_gate,
            mamba_use_conv_bias: false,
            ..self
        }
    }

    /// Refuses numbers that describe no Mamba2, in models that have its layers, and sizes that nothing has.
    pub(super) fn validate_recurrence(&self) -> Result<()> {
        let fail = |m: String| Err(Error::Config(m));
        if !self.linear_num_value_heads.is_multiple_of(self.linear_num_key_heads) {
            return fail(format!(
                "`linear_num_value_heads` = {} must be a multiple of `linear_num_key_heads` = {}",
                self.linear_num_value_heads, self.linear_num_key_heads
            ));
        }
        if !self.mamba_num_heads.is_multiple_of(self.mamba_n_groups) {
            return fail(format!(
                "`mamba_num_heads` = {} must be a multiple of `mamba_n_groups` = {}, whose heads share B and C",
                self.mamba_num_heads, self.mamba_n_groups
            ));
        }
        let erasing = !self.has(|k| k == LayerType::LinearAttention) && self.has(|k| k == LayerType::DeltaNet);
        if self.linear_allow_neg_eigval && !self.linear_erase && !erasing {
            return fail("`linear_allow_neg_eigval` is of a rule that erases; with `linear_erase` = false there is no such thing".into());
        }
        let [lo, hi] = self.mamba_time_step_limit;
        if !(lo >= 0.0 && hi > lo) {
            return fail(format!("`mamba_time_step_limit` = [{lo}, {hi}] must rise, from 0 or more"));
        }
        let [least, most, floor] = [self.mamba_time_step_min, self.mamba_time_step_max, self.mamba_time_step_floor];
        if ![least, most, floor].iter().all(|x| x.is_finite() && *x > 0.0) || least > most {
            return fail(format!(
                "`mamba_time_step_min` = {least}, `mamba_time_step_max` = {most} and `mamba_time_step_floor` = {floor} must be positive, and the first \
                 at most the second"
            ));
        }
        Ok(())
    }
}
