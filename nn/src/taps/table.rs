//! All taps: what they are called, what they are, and which of them can be replaced.

use crate::config::{GatePosition, ModelConfig};

/// What can be done with a tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Shown, and replaceable.
    Replaceable,
    /// Shown only; what to replace instead.
    Shown(&'static str),
    /// Shown only, and only to observers that ask for it by name; what to replace instead.
    OnRequest(&'static str),
}

/// Where a tap is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Once in a model.
    Model,
    /// In every block.
    Block,
    /// In the attention of blocks with full or sliding attention.
    Softmax,
    /// In the mixer of blocks that carry a state: the delta rule's, and Mamba2.
    Linear,
    /// In dense feed-forwards.
    Dense,
    /// In mixtures of experts.
    Experts,
}

/// A tap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tap {
    /// Its name; in a model it has `blocks.{i}.` in front, except for those of [`Part::Model`].
    pub name: &'static str,
    /// Where it is.
    pub part: Part,
    /// Its shape: B rows, T tokens, M hidden size, H query heads, Hkv key/value heads, D their width, Hk key heads and Hv value heads of the delta rule (Mamba2's
    /// groups and heads), Dk and Dv their widths (Mamba2's state size and head dimension), R = Hv/Hk, E experts, K of them for a token, N = B·T tokens, S sequences (B, or the packed documents), P keys (T, and those in the
    /// cache), V vocabulary, I the inner width of a dense feed-forward, Is that of
    /// the shared expert, C chunks of 64 tokens, the last perhaps shorter.
    pub shape: &'static str,
    /// `compute`: what the model computes in. `f32`: f32, or f64 in a model of f64. Else itself.
    pub dtype: &'static str,
    /// What it is.
    pub meaning: &'static str,
    /// The operation that makes it.
    pub op: &'static str,
    /// What can be done with it.
    pub access: Access,
}

const fn tap(
    part: Part,
    name: &'static str,
    shape: &'static str,
    dtype: &'static str,
    op: &'static str,
    access: Access,
    meaning: &'static str,
) -> Tap {
    Tap { name, part, shape, dtype, meaning, op, access }
}

use Access::{OnRequest, Replaceable, Shown};
use Part::{Block, Dense, Experts, Linear, Model, Softmax};

/// All of them, in the order in which a model computes them.
pub const TAPS: &[Tap] = &[
    tap(Model, "hook_embed", "[B, T, M]", "compute", "embedding", Replaceable, "embeddings of the tokens"),
    tap(Block, "hook_resid_pre", "[B, T, M]", "compute", "add", Replaceable, "residual stream before the block"),
    tap(Block, "ln1.hook_out", "[B, T, M]", "compute", "rms_norm", Replaceable, "the norm of the residual stream that the attention reads"),
    tap(Softmax, "attn.hook_q", "[B, T, H, D]", "compute", "linear", Replaceable, "queries as projected, before gate, norm and rotation"),
    tap(
        Softmax,
        "attn.hook_switch_logits",
        "[B, T, Hkv, E]",
        "f32",
        "router_logits",
        Replaceable,
        "logits of the experts of each key/value head (`switch_heads`)",
    ),
    tap(
        Softmax,
        "attn.hook_switch",
        "[B, T, Hkv, E]",
        "f32",
        "sigmoid, topk",
        Shown("hook_switch_logits"),
        "the experts' weights; 0 for those that a token does not choose",
    ),
    tap(Softmax, "attn.hook_k", "[B, T, Hkv, D]", "compute", "linear", Replaceable, "keys as projected, before gate, norm and rotation"),
    tap(
        Softmax,
        "attn.hook_query_gate_logits",
        "[B, T, H, D] or [B, T, H]",
        "compute",
        "linear or table",
        Replaceable,
        "queries' gate before activation",
    ),
    tap(
        Softmax,
        "attn.hook_query_gate",
        "as its logits",
        "compute",
        "sigmoid or other",
        Shown("hook_query_gate_logits"),
        "the same after its activation",
    ),
    tap(
        Softmax,
        "attn.hook_key_gate_logits",
        "[B, T, Hkv, D] or [B, T, Hkv]",
        "compute",
        "linear or table",
        Replaceable,
        "keys' gate before activation",
    ),
    tap(
        Softmax,
        "attn.hook_key_gate",
        "as its logits",
        "compute",
        "sigmoid or other",
        Shown("hook_key_gate_logits"),
        "the same after its activation",
    ),
    tap(
        Softmax,
        "attn.hook_value_gate_logits",
        "[B, T, Hkv, D] or [B, T, Hkv]",
        "compute",
        "linear or table",
        Replaceable,
        "values' gate before activation",
    ),
    tap(
        Softmax,
        "attn.hook_value_gate",
        "as its logits",
        "compute",
        "sigmoid or other",
        Shown("hook_value_gate_logits"),
        "the same after its activation",
    ),
    tap(Softmax, "attn.hook_v", "[B, T, Hkv, D]", "compute", "linear", Replaceable, "values, behind their gate; caches keep these"),
    tap(Softmax, "attn.hook_rot_q", "[B, T, H, D]", "compute", "norm_rope", Replaceable, "queries, normalised and rotated"),
    tap(Softmax, "attn.hook_rot_k", "[B, T, Hkv, D]", "compute", "norm_rope", Replaceable, "keys, normalised and rotated; caches keep these"),
    tap(Softmax, "attn.hook_gate_logits", "[B, T, H, D] or [B, T, H]", "compute", "linear or table", Replaceable, "the gate before its activation"),
    tap(Softmax, "attn.hook_gate", "as its logits", "compute", "sigmoid or other", Shown("hook_gate_logits"), "the same after its activation"),
    tap(
        Softmax,
        "attn.hook_attn_scores",
        "[B, H, T, P]",
        "f32",
        "matmul",
        OnRequest("hook_z, hook_rot_q or hook_rot_k"),
        "scores before the softmax, scaled; −∞ where the mask is",
    ),
    tap(
        Softmax,
        "attn.hook_pattern",
        "[B, H, T, P]",
        "f32",
        "attention_pattern",
        OnRequest("hook_z, hook_rot_q or hook_rot_k"),
        "attention probabilities",
    ),
    tap(
        Softmax,
        "attn.hook_z_pre_gate",
        "[B, T, H, D]",
        "compute",
        "gated_sdpa",
        OnRequest("hook_z or hook_gate_logits"),
        "each head's output before its gate",
    ),
    tap(Softmax, "attn.hook_z", "[B, T, H, D]", "compute", "gated_sdpa", Replaceable, "each head's output, gated, which the output projection reads"),
    tap(Softmax, "attn.hook_dense_gate_logits", "[B, T, M]", "compute", "linear or table", Replaceable, "dense gate before activation"),
    tap(
        Softmax,
        "attn.hook_dense_gate",
        "as its logits",
        "compute",
        "sigmoid or other",
        Shown("hook_dense_gate_logits"),
        "the same after its activation",
    ),
    tap(
        Linear,
        "attn.hook_q_pre_conv",
        "[B, T, Hk, Dk]",
        "compute",
        "linear",
        Replaceable,
        "queries as projected, before the convolution; Mamba2: C",
    ),
    tap(Linear, "attn.hook_k_pre_conv", "[B, T, Hk, Dk]", "compute", "linear", Replaceable, "keys as projected, before the convolution; Mamba2: B"),
    tap(
        Linear,
        "attn.hook_v_pre_conv",
        "[B, T, Hk, R·Dv]",
        "compute",
        "linear",
        Replaceable,
        "values as projected, before the convolution; Mamba2: x",
    ),
    tap(
        Linear,
        "attn.hook_q",
        "[B, T, Hk, Dk]",
        "compute",
        "short_conv",
        Replaceable,
        "queries after convolution and SiLU, before their L2 norm; Mamba2: C, which has no norm",
    ),
    tap(
        Linear,
        "attn.hook_k",
        "[B, T, Hk, Dk]",
        "compute",
        "short_conv",
        Replaceable,
        "keys after convolution and SiLU, before their L2 norm; Mamba2: B, likewise",
    ),
    tap(Linear, "attn.hook_v", "[B, T, Hv, Dv]", "compute", "short_conv", Replaceable, "values after convolution and SiLU; Mamba2: x"),
    tap(Linear, "attn.hook_beta", "[B, T, Hv]", "f32", "sigmoid or softplus", Replaceable, "write strength β; Mamba2: the step Δt"),
    tap(Linear, "attn.hook_log_decay", "[B, T, Hv]", "f32", "softplus", Replaceable, "logarithm of the decay α, at most 0"),
    tap(
        Linear,
        "attn.hook_effective_attention",
        "[B, Hv, T, T]",
        "f32",
        "delta_rule",
        OnRequest("hook_recurrence_out, hook_q, hook_k, hook_beta or hook_log_decay"),
        "the matrix A of o = A v (what an initial state adds aside)",
    ),
    tap(
        Linear,
        "attn.hook_states",
        "[B, C, Hv, Dk, Dv]",
        "f32",
        "delta_rule",
        OnRequest("hook_state, hook_k, hook_v, hook_beta or hook_log_decay"),
        "the state after each 64 tokens of a row, of the document that the last of them is in",
    ),
    tap(
        Linear,
        "attn.hook_recurrence_out",
        "[B, T, Hv, Dv]",
        "compute",
        "delta_rule",
        Replaceable,
        "what is read from the state, o; Mamba2: without D x",
    ),
    tap(
        Linear,
        "attn.hook_state",
        "[S, Hv, Dk, Dv]",
        "f32",
        "delta_rule",
        Replaceable,
        "the state after the last token; a generation goes on from it",
    ),
    tap(Linear, "attn.hook_gate_logits", "[B, T, Hk, R, Dv]", "compute", "linear", Replaceable, "the output gate before its activation, z"),
    tap(
        Linear,
        "attn.hook_gate",
        "[B, T, Hk, R, Dv]",
        "compute",
        "silu or sigmoid",
        Shown("hook_gate_logits"),
        "the output gate after its activation",
    ),
    tap(
        Linear,
        "attn.hook_z",
        "[B, T, Hv, Dv]",
        "compute",
        "rms_norm_gated or other",
        Replaceable,
        "o, normalised and gated (Mamba2: with D x, gated and normalised), which the output projection reads",
    ),
    tap(
        Block,
        "attn.hook_out",
        "[B, T, M]",
        "compute",
        "linear",
        Replaceable,
        "what the attention computes, where a norm stands behind it (`post_norm`, `sandwich_norm`)",
    ),
    tap(Block, "hook_attn_out", "[B, T, M]", "compute", "linear", Replaceable, "what the attention adds to the residual stream"),
    tap(Block, "hook_resid_mid", "[B, T, M]", "compute", "add", Replaceable, "residual stream between attention and feed-forward"),
    tap(Block, "ln2.hook_out", "[B, T, M]", "compute", "rms_norm", Replaceable, "the norm of the residual stream that the feed-forward reads"),
    tap(Dense, "mlp.hook_pre", "[B, T, I]", "compute", "linear", Replaceable, "the gate's half of SwiGLU, before its SiLU"),
    tap(Dense, "mlp.hook_pre_linear", "[B, T, I]", "compute", "linear", Replaceable, "the other half, which it multiplies"),
    tap(Dense, "mlp.hook_post", "[B, T, I]", "compute", "swiglu", Replaceable, "SwiGLU's output, which the last projection reads"),
    tap(Experts, "mlp.hook_router_logits", "[N, E]", "f32", "linear", Replaceable, "the router's logits; its losses are of them, too"),
    tap(Experts, "mlp.hook_router_probs", "[N, E]", "f32", "softmax", Shown("hook_router_logits"), "the router's probabilities of all experts"),
    tap(Experts, "mlp.hook_router_index", "[N, K]", "i64", "topk", Shown("hook_router_logits"), "the experts of each token, likeliest first"),
    tap(Experts, "mlp.hook_shared_gate_logits", "[N, 1]", "compute", "linear", Replaceable, "the gate on the shared expert before its sigmoid"),
    tap(Experts, "mlp.hook_shared_gate", "[N, 1]", "compute", "sigmoid", Shown("hook_shared_gate_logits"), "the gate on the shared expert"),
    tap(
        Experts,
        "mlp.hook_shared_pre",
        "[N, Is]",
        "compute",
        "linear",
        Replaceable,
        "of the shared expert: the gate's half of SwiGLU, before its SiLU",
    ),
    tap(Experts, "mlp.hook_shared_pre_linear", "[N, Is]", "compute", "linear", Replaceable, "of the shared expert: the other half"),
    tap(Experts, "mlp.hook_shared_post", "[N, Is]", "compute", "swiglu", Replaceable, "of the shared expert: SwiGLU's output"),
    tap(
        Block,
        "mlp.hook_out",
        "[B, T, M]",
        "compute",
        "moe or linear",
        Replaceable,
        "what the feed-forward computes, where a norm stands behind it (`post_norm`, `sandwich_norm`)",
    ),
    tap(Block, "hook_mlp_out", "[B, T, M]", "compute", "moe or linear", Replaceable, "what the feed-forward adds to the residual stream"),
    tap(Block, "hook_resid_post", "[B, T, M]", "compute", "add", Replaceable, "residual stream after the block"),
    tap(Model, "ln_final.hook_out", "[B, T, M]", "compute", "rms_norm", Replaceable, "the last norm, which the output projection reads"),
    tap(
        Model,
        "logits",
        "[B, T, V]",
        "compute",
        "linear",
        OnRequest("ln_final.hook_out"),
        "logits of the next token; shown where a loss is computed",
    ),
];

/// Taps around a feed-forward of whichever kind.
const OF_FEED_FORWARDS: [&str; 4] = ["hook_resid_mid", "ln2.hook_out", "mlp.hook_out", "hook_mlp_out"];

impl Tap {
    /// The first tap of a name, with or without `blocks.{i}.` in front; of names that mean two things, what can be done with both is the same.
    pub(crate) fn named(name: &str) -> Option<&'static Tap> {
        let short = name.strip_prefix("blocks.").and_then(|n| n.split_once('.')).map_or(name, |n| n.1);
        TAPS.iter().find(|t| t.name == short)
    }

    /// The gate of softmax attention without which there is no such tap.
    fn gate(&self) -> Option<GatePosition> {
        match self.name {
            "attn.hook_z_pre_gate" => Some(GatePosition::Attention),
            name => GatePosition::ALL.into_iter().find(|at| at.taps().contains(&name)),
        }
    }

    fn is_in(&self, c: &ModelConfig, layer: usize) -> bool {
        let recurrence = c.recurrence(layer);
        match self.part {
            Model => false,
            Block if !c.has_feed_forward(layer) && OF_FEED_FORWARDS.contains(&self.name) => false,
            Block => match self.name {
                "ln1.hook_out" | "ln2.hook_out" => c.norm_names(layer)[0][0].is_some(),
                "attn.hook_out" | "mlp.hook_out" => c.norm_names(layer)[0][1].is_some(),
                _ => true,
            },
            Linear => recurrence.is_some_and(|r| match self.name {
                "attn.hook_log_decay" => r.decays,
                "attn.hook_gate_logits" | "attn.hook_gate" => c.linear_output_gate || !c.layer_type(layer).is_delta(),
                _ => true,
            }),
            Softmax if self.name.starts_with("attn.hook_switch") => recurrence.is_none() && c.switch_heads.is_some(),
            Softmax => recurrence.is_none() && self.gate().is_none_or(|at| c.gate(at).is_some()),
            Dense => c.has_feed_forward(layer) && !c.is_sparse(layer),
            Experts => c.is_sparse(layer) && (!self.name.starts_with("mlp.hook_shared") || c.shared_expert_intermediate_size > 0),
        }
    }
}

impl ModelConfig {
    /// All taps of a model of this configuration, by their full names.
    pub fn taps(&self) -> Vec<(String, &'static Tap)> {
        let of_layer = |i: usize| TAPS.iter().filter(move |t| t.is_in(self, i)).map(move |t| (format!("blocks.{i}.{}", t.name), t));
        let whole = TAPS.iter().filter(|t| t.part == Model).map(|t| (t.name.to_string(), t));
        whole.chain((0..self.num_hidden_layers).flat_map(of_layer)).collect()
    }
}
