//! Whether numbers describe a model.

use super::{LayerType, ModelConfig};
use crate::{Error, Result};

/// No size is larger; products of four fit 128 bits.
pub(super) const LARGEST: usize = 1 << 24;
/// No model has more layers.
const DEEPEST: usize = 1 << 16;

impl ModelConfig {
    /// Checks that the numbers describe a model.
    pub fn validate(&self) -> Result<()> {
        let fail = |m: String| Err(Error::Config(m));
        for (name, n) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("linear_num_key_heads", self.linear_num_key_heads),
            ("linear_num_value_heads", self.linear_num_value_heads),
            ("linear_key_head_dim", self.linear_key_head_dim),
            ("linear_value_head_dim", self.linear_value_head_dim),
            ("linear_conv_kernel_dim", self.linear_conv_kernel_dim),
            ("mamba_num_heads", self.mamba_num_heads),
            ("mamba_head_dim", self.mamba_head_dim),
            ("mamba_state_size", self.mamba_state_size),
            ("mamba_n_groups", self.mamba_n_groups),
            ("mamba_conv_kernel", self.mamba_conv_kernel),
            ("sliding_window", self.sliding_window),
            ("decoder_sparse_step", self.decoder_sparse_step),
        ] {
            if n == 0 || n > LARGEST {
                return fail(format!("`{name}` must be from 1 to {LARGEST}, found {n}"));
            }
        }
        for (name, n) in [
            ("intermediate_size", self.intermediate_size),
            ("num_experts", self.num_experts),
            ("moe_intermediate_size", self.moe_intermediate_size),
            ("shared_expert_intermediate_size", self.shared_expert_intermediate_size),
        ] {
            if n > LARGEST {
                return fail(format!("`{name}` must be at most {LARGEST}, found {n}"));
            }
        }
        let (deep, named) = (self.num_hidden_layers, self.mlp_only_layers.len());
        if deep > DEEPEST {
            return fail(format!("`num_hidden_layers` must be at most {DEEPEST}, found {deep}"));
        }
        if named > deep {
            return fail(format!("`mlp_only_layers` names {named} layers, `num_hidden_layers` is {deep}"));
        }
        let (sparse, dense): (Vec<usize>, Vec<usize>) = (0..self.num_hidden_layers).partition(|i| self.is_sparse(*i));
        if !dense.is_empty() && !sparse.is_empty() && self.intermediate_size == 0 {
            return fail(format!(
                "layer {} is dense and needs `intermediate_size` of at least 1; only a model without any experts can do without feed-forwards",
                dense[0]
            ));
        }
        if !sparse.is_empty() && self.moe_intermediate_size == 0 {
            return fail(format!("layer {} has experts and needs `moe_intermediate_size` of at least 1", sparse[0]));
        }
        if let Some(i) = self.mlp_only_layers.iter().find(|i| **i >= self.num_hidden_layers) {
            return fail(format!(
                "`mlp_only_layers` names layer {i}, the last of `num_hidden_layers` = {} is {}",
                self.num_hidden_layers,
                self.num_hidden_layers - 1
            ));
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            return fail(format!(
                "`num_attention_heads` = {} must be a multiple of `num_key_value_heads` = {}",
                self.num_attention_heads, self.num_key_value_heads
            ));
        }
        self.validate_recurrence()?;
        if !(0.0..=1.0).contains(&self.partial_rotary_factor) || !self.rotary_dim().is_multiple_of(2) {
            return fail(format!(
                "`partial_rotary_factor` = {} of `head_dim` = {} must be from 0 to 1 and give an even number of rotated dimensions",
                self.partial_rotary_factor, self.head_dim
            ));
        }
        if !self.layer_types.is_empty() && self.layer_types.len() != self.num_hidden_layers {
            return fail(format!("`layer_types` has {} entries for `num_hidden_layers` = {}", self.layer_types.len(), self.num_hidden_layers));
        }
        let sliding = (0..self.num_hidden_layers).find(|i| self.layer_type(*i) == LayerType::SlidingAttention);
        if let Some(i) = sliding.filter(|_| self.sliding_window > self.max_position_embeddings) {
            return fail(format!(
                "`sliding_window` = {} of layer {i} is longer than the context, `max_position_embeddings` = {}: make the window smaller, or the layer \
                 full_attention, which it would be",
                self.sliding_window, self.max_position_embeddings
            ));
        }
        if !self.layer_types.is_empty() && !self.layer_pattern.is_empty() {
            return fail("`layer_types` and `layer_pattern` both say what the layers are; leave one of them empty".into());
        }
        if self.layer_pattern.len() > self.num_hidden_layers {
            return fail(format!("`layer_pattern` has {} entries for `num_hidden_layers` = {}", self.layer_pattern.len(), self.num_hidden_layers));
        }
        if self.layer_types.is_empty() && self.full_attention_interval == 0 {
            return fail("`full_attention_interval` must be at least 1".into());
        }
        if !sparse.is_empty() && !(1..=self.num_experts).contains(&self.num_experts_per_tok) {
            return fail(format!("`num_experts_per_tok` = {} must be from 1 to `num_experts` = {}", self.num_experts_per_tok, self.num_experts));
        }
        for (name, x) in [("initializer_range", self.initializer_range), ("rms_norm_eps", self.rms_norm_eps), ("rope_theta", self.rope_theta)] {
            if !(x.is_finite() && x > 0.0) {
                return fail(format!("`{name}` must be positive, found {x}"));
            }
        }
        if !(self.linear_norm_eps.is_finite() && self.linear_norm_eps >= 0.0) {
            return fail(format!("`linear_norm_eps` must be positive, or 0 for `rms_norm_eps`, found {}", self.linear_norm_eps));
        }
        self.validate_rope()?;
        self.validate_gates()?;
        self.saved_type().map(drop)
    }
}
