//! The gates of softmax attention: what they are, where they stand, and which settings say something.

use super::validate::LARGEST;
use super::{LayerType, ModelConfig, QkNorm};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How fine a gate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateGranularity {
    /// No gate.
    None,
    /// One number per head.
    Headwise,
    /// One number per head and dimension.
    Elementwise,
}

/// What a gate's score does to what it stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateOp {
    /// `y · score`
    Multiply,
    /// `y + score`
    Add,
}

/// A gate's activation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateActivation {
    /// 1/(1+e⁻ˣ)
    Sigmoid,
    /// x·sigmoid(x)
    Silu,
    /// 0.5 + 0.5·sigmoid(x)
    NsSigmoid,
    /// x
    Identity,
}

/// A gate of softmax attention (2505.06708 §2): `y · score` or `y + score`, with `score = act(x Wθ)` of the attention's input x, behind the norm. Where it
/// stands is a [`GatePosition`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AttentionGate {
    /// How fine.
    pub granularity: GateGranularity,
    /// Multiply or add.
    pub op: GateOp,
    /// Activation of the logits.
    pub activation: GateActivation,
    /// Whether all heads share one score, the mean of theirs (the paper's head-shared gate). It has as many parameters as without.
    pub shared: bool,
    /// Whether the logits are a projection of the input. If not, they are a learned table, zero at the start and the same for all tokens.
    pub input: bool,
}

impl Default for AttentionGate {
    /// Qwen3-Next's: element-wise, multiplied, sigmoid, each head its own, of the input.
    fn default() -> Self {
        AttentionGate {
            granularity: GateGranularity::Elementwise,
            op: GateOp::Multiply,
            activation: GateActivation::Sigmoid,
            shared: false,
            input: true,
        }
    }
}

impl AttentionGate {
    /// No gate.
    pub fn none() -> Self {
        AttentionGate { granularity: GateGranularity::None, ..Default::default() }
    }

    /// Whether there is a gate.
    pub fn is_some(&self) -> bool {
        self.granularity != GateGranularity::None
    }
}

/// Where a gate of softmax attention stands (2505.06708 §2, figure 1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GatePosition {
    /// G1: on the attention's output, head by head, before the output projection.
    Attention,
    /// G2: on the values, behind their projection.
    Value,
    /// G3: on the keys, behind their projection and before their norm.
    Key,
    /// G4: on the queries, behind their projection and before their norm.
    Query,
    /// G5: behind the output projection.
    Dense,
}

impl GatePosition {
    /// All five.
    pub const ALL: [GatePosition; 5] = [GatePosition::Attention, GatePosition::Value, GatePosition::Key, GatePosition::Query, GatePosition::Dense];

    /// Its key in a [`ModelConfig`].
    pub fn key(self) -> &'static str {
        match self {
            GatePosition::Attention => "attention_gate",
            GatePosition::Value => "value_gate",
            GatePosition::Key => "key_gate",
            GatePosition::Query => "query_gate",
            GatePosition::Dense => "dense_gate",
        }
    }

    /// The taps of its logits and of its score.
    pub(crate) fn taps(self) -> [&'static str; 2] {
        match self {
            GatePosition::Attention => ["attn.hook_gate_logits", "attn.hook_gate"],
            GatePosition::Value => ["attn.hook_value_gate_logits", "attn.hook_value_gate"],
            GatePosition::Key => ["attn.hook_key_gate_logits", "attn.hook_key_gate"],
            GatePosition::Query => ["attn.hook_query_gate_logits", "attn.hook_query_gate"],
            GatePosition::Dense => ["attn.hook_dense_gate_logits", "attn.hook_dense_gate"],
        }
    }
}

/// Key/value heads with several experts each, of which a token chooses some by the sigmoid of a router (SwitchHead, 2312.07987; 2505.06708
/// Table 6): `v = Σₑ σ(x Wr)ₑ · (x Wᵥᵉ)` over the `top_k` largest, and likewise the keys if `keys`. One expert is a head-wise gate on the values.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SwitchHeads {
    /// Experts of each key/value head; 0: none, and no router.
    pub experts: usize,
    /// How many of them a token chooses.
    pub top_k: usize,
    /// Whether keys have experts, too, chosen by the same router; else values alone.
    pub keys: bool,
}

impl SwitchHeads {
    /// Whether there are experts.
    pub fn is_some(&self) -> bool {
        self.experts > 0
    }

    /// Projections of a value, of a key: the columns of either for each of the dimensions of a head.
    pub(crate) fn projections(&self) -> [usize; 2] {
        let n = self.experts.max(1);
        [n, if self.keys { n } else { 1 }]
    }
}

impl ModelConfig {
    /// The gate at a position.
    pub fn gate(&self, at: GatePosition) -> &AttentionGate {
        match at {
            GatePosition::Attention => &self.attention_gate,
            GatePosition::Value => &self.value_gate,
            GatePosition::Key => &self.key_gate,
            GatePosition::Query => &self.query_gate,
            GatePosition::Dense => &self.dense_gate,
        }
    }

    fn gate_mut(&mut self, at: GatePosition) -> &mut AttentionGate {
        match at {
            GatePosition::Attention => &mut self.attention_gate,
            GatePosition::Value => &mut self.value_gate,
            GatePosition::Key => &mut self.key_gate,
            GatePosition::Query => &mut self.query_gate,
            GatePosition::Dense => &mut self.dense_gate,
        }
    }

    /// The heads that the gate at a position has logits for, and how many for each; `[_, 0]` without a gate. Behind the output projection there is one head.
    pub(crate) fn gate_shape(&self, at: GatePosition) -> [usize; 2] {
        let [heads, d] = match at {
            GatePosition::Attention | GatePosition::Query => [self.num_attention_heads, self.head_dim],
            GatePosition::Value | GatePosition::Key => [self.num_key_value_heads, self.head_dim],
            GatePosition::Dense => [1, self.hidden_size],
        };
        match self.gate(at).granularity {
            GateGranularity::None => [heads, 0],
            GateGranularity::Headwise => [heads, 1],
            GateGranularity::Elementwise => [heads, d],
        }
    }

    /// Columns of the gate in q_proj, per head.
    pub(crate) fn gate_dim(&self) -> usize {
        if self.attention_gate.input { self.gate_shape(GatePosition::Attention)[1] } else { 0 }
    }

    /// The keys of this configuration that are composed of element-wise operations, beside the kernels of attention and recurrence, in the layers that the
    /// model has. A gate on the attention's output is inside the kernel, unless its heads share a score or something else stands between.
    pub fn composed(&self) -> Vec<&'static str> {
        [self.composed_softmax(), self.composed_delta(), self.composed_mamba()].concat()
    }

    /// One of each kind of layers that have something composed.
    pub(crate) fn composed_kinds(&self) -> Vec<LayerType> {
        let kinds: [(fn(LayerType) -> bool, bool); 3] = [
            (LayerType::is_softmax, !self.composed_softmax().is_empty()),
            (LayerType::is_delta, !self.composed_delta().is_empty()),
            (|k| k == LayerType::Mamba2, !self.composed_mamba().is_empty()),
        ];
        let first = |of: fn(LayerType) -> bool| (0..self.num_hidden_layers).map(|i| self.layer_type(i)).find(|k| of(*k));
        kinds.into_iter().filter(|(_, composed)| *composed).filter_map(|(of, _)| first(of)).collect()
    }

    fn composed_softmax(&self) -> Vec<&'static str> {
        if !self.has(LayerType::is_softmax) {
            return vec![];
        }
        let gates = GatePosition::ALL.into_iter().filter(|at| self.is_composed(*at)).map(GatePosition::key);
        let between = [("switch_heads", self.switch_heads.is_some()), ("sdpa_norm", self.sdpa_norm), ("sdpa_silu", self.sdpa_silu)];
        gates.chain(between.into_iter().filter(|b| b.1).map(|b| b.0)).collect()
    }

    /// The same without what is [`composed`](Self::composed).
    pub(crate) fn without_composed(&self) -> ModelConfig {
        let mut c = ModelConfig { switch_heads: SwitchHeads::default(), sdpa_norm: false, sdpa_silu: false, ..self.clone() };
        GatePosition::ALL.into_iter().filter(|at| self.is_composed(*at)).for_each(|at| *c.gate_mut(at) = AttentionGate::none());
        c.without_composed_recurrence()
    }

    fn is_composed(&self, at: GatePosition) -> bool {
        let gate = self.gate(at);
        gate.is_some() && (at != GatePosition::Attention || gate.shared || self.gates_behind_kernel())
    }

    /// Whether something stands between the attention's kernel and the gate on its output.
    pub(crate) fn gates_behind_kernel(&self) -> bool {
        self.sdpa_norm || self.sdpa_silu
    }

    /// Refuses gates and norms that contradict each other, or say what nothing follows from.
    pub(super) fn validate_gates(&self) -> Result<()> {
        let fail = |m: String| Err(Error::Config(m));
        for at in GatePosition::ALL {
            let (key, gate) = (at.key(), self.gate(at));
            if !gate.is_some() && *gate != AttentionGate::none() {
                return fail(format!(
                    "`{key}.granularity` is \"none\", so that its other settings do nothing; make it \"headwise\" or \"elementwise\", or leave \
                     `op`, `activation`, `shared` and `input` as they are without a gate (multiply, sigmoid, false, true)"
                ));
            }
            if at == GatePosition::Dense && gate.granularity == GateGranularity::Headwise {
                return fail(
                    "`dense_gate.granularity` = \"headwise\": behind the output projection there are no heads; make it \"elementwise\"".into(),
                );
            }
            if at == GatePosition::Dense && gate.shared {
                return fail("`dense_gate.shared` = true: behind the output projection there are no heads to share a score; make it false".into());
            }
            let scales = gate.granularity == GateGranularity::Headwise
                && gate.op == GateOp::Multiply
                && matches!(gate.activation, GateActivation::Sigmoid | GateActivation::NsSigmoid);
            if matches!(at, GatePosition::Key | GatePosition::Query) && scales && self.qk_norm == QkNorm::Head {
                return fail(format!(
                    "`{key}` multiplies each head by a positive number, which the norm of each head behind it (`qk_norm` = \"head\") takes away again; make \
                     `{key}.granularity` \"elementwise\", or `qk_norm` \"projection\" or \"none\""
                ));
            }
        }
        let SwitchHeads { experts, top_k, keys } = self.switch_heads;
        if experts > LARGEST || top_k > experts || (top_k == 0 && experts > 0) {
            return fail(format!(
                "`switch_heads.experts` must be at most {LARGEST} and `switch_heads.top_k` from 1 to them, found {experts} and {top_k}; both 0 for none"
            ));
        }
        if keys && experts == 0 {
            return fail("`switch_heads.keys` = true does nothing while `switch_heads.experts` is 0; set `switch_heads.experts` and `.top_k`".into());
        }
        if keys && experts == 1 && self.qk_norm == QkNorm::Head {
            return fail(
                "`switch_heads` with one expert multiplies each key head by a positive number, which the norm of each head behind it (`qk_norm` = \"head\") \
                 takes away again; make `switch_heads.keys` false, or `switch_heads.experts` at least 2"
                    .into(),
            );
        }
        if let Some(i) = (0..self.num_hidden_layers).find(|i| self.sandwich_norm && self.is_post_norm(*i)) {
            return fail(format!(
                "`sandwich_norm` keeps the norms before attention and feed-forward, `post_norm` takes them away (layer {i}); leave out one of the two"
            ));
        }
        Ok(())
    }
}
