//! The gates of softmax attention: their parameters, logits and scores, and how they act where the attention's kernel does not do it.

use crate::config::{AttentionGate, GateActivation, GateGranularity, GateOp, GatePosition, ModelConfig};
use crate::init::Builder;
use crate::layers::project;
use crate::taps::Taps;
use engine::{Result, Tensor};
use ops::gated_sdpa;

/// Where logits come from.
enum Source {
    /// `x wᵀ` of this weight, `[heads·width, M]`.
    Weight(Tensor),
    /// The same for all tokens: `[heads, D]`, `[heads]` or `[M]`.
    Table(Tensor),
    /// Columns of the query projection.
    QueryProjection,
}

/// A gate, where a configuration has one.
pub(crate) struct Gate {
    at: GatePosition,
    how: AttentionGate,
    /// Of one token's logits: `[heads, D]`, `[heads]` or `[M]`.
    shape: Vec<usize>,
    source: Source,
}

impl Gate {
    /// The gate at `at`, if there is one, with its parameter. The attention output's has none of its own, as its rows are among the query projection's.
    pub fn new(b: &mut Builder, c: &ModelConfig, at: GatePosition) -> crate::Result<Option<Gate>> {
        let (how, [heads, width]) = (*c.gate(at), c.gate_shape(at));
        let shape = match (how.granularity, at) {
            (GateGranularity::None, _) => return Ok(None),
            (GateGranularity::Headwise, _) => vec![heads],
            (GateGranularity::Elementwise, GatePosition::Dense) => vec![width],
            (GateGranularity::Elementwise, _) => vec![heads, width],
        };
        let source = match (how.input, at) {
            (false, _) => Source::Table(b.constant(&format!("self_attn.{}.table", at.key()), &shape, 0.0)?),
            (true, GatePosition::Attention) => Source::QueryProjection,
            (true, _) => Source::Weight(b.normal(&format!("self_attn.{}.weight", at.key()), &[heads * width, c.hidden_size])?),
        };
        Ok(Some(Gate { at, how, shape, source }))
    }

    /// The logits `[B, T, heads, D]`, `[B, T, heads]` or `[B, T, M]` of `x [B, T, M]`, with taps on them and on the score. `columns` are those of the query
    /// projection.
    pub fn logits(&self, x: &Tensor, columns: Option<&Tensor>, taps: &mut Taps) -> Result<Tensor> {
        let shape = [&x.shape()[..2], &self.shape].concat();
        let logits = match (&self.source, columns) {
            (Source::Weight(w), _) => project(x, w)?.reshape(&shape)?,
            (Source::Table(table), _) => table.cast(x.dtype())?.reshape(&[&[1, 1], &self.shape[..]].concat())?.expand(&shape)?,
            (Source::QueryProjection, Some(columns)) => columns.reshape(&shape)?,
            (Source::QueryProjection, None) => return Err(engine::Error::invalid("gate", "its columns of the query projection are not given")),
        };
        let [logits_name, score_name] = self.at.taps();
        let logits = taps.tap(logits_name, logits)?;
        taps.show(score_name, || self.score(&logits)?.expand(&shape))?;
        Ok(logits)
    }

    /// `act(logits)`; of a gate that heads share, their mean, in place of the heads.
    fn score(&self, logits: &Tensor) -> Result<Tensor> {
        let score = match self.how.activation {
            GateActivation::Sigmoid => logits.sigmoid()?,
            GateActivation::Silu => logits.silu()?,
            GateActivation::NsSigmoid => logits.sigmoid()?.affine(0.5, 0.5)?,
            GateActivation::Identity => logits.clone(),
        };
        if self.how.shared { score.mean(&[2], true) } else { Ok(score) }
    }

    /// What the attention's kernel is handed: its logits, or, where the heads share one, a score that is ready.
    pub fn for_kernel(&self, logits: &Tensor) -> Result<(Tensor, gated_sdpa::Gate)> {
        let how = |activation| gated_sdpa::Gate { activation, additive: self.how.op == GateOp::Add };
        if self.how.shared {
            return Ok((self.score(logits)?.expand(logits.shape())?, how(gated_sdpa::Activation::Identity)));
        }
        let activation = match self.how.activation {
            GateActivation::Sigmoid => gated_sdpa::Activation::Sigmoid,
            GateActivation::Silu => gated_sdpa::Activation::Silu,
            GateActivation::NsSigmoid => gated_sdpa::Activation::NsSigmoid,
            GateActivation::Identity => gated_sdpa::Activation::Identity,
        };
        Ok((logits.clone(), how(activation)))
    }

    /// `y · score` or `y + score`, for `y [B, T, heads, D]` or `[B, T, M]`.
    pub fn apply(&self, y: &Tensor, logits: &Tensor) -> Result<Tensor> {
        let score = self.score(logits)?;
        let score = if score.rank() < y.rank() { score.unsqueeze(3)? } else { score };
        if self.how.op == GateOp::Add { y.add(&score) } else { y.mul(&score) }
    }
}

/// `y` behind a gate that reads `x`, if there is one.
pub(crate) fn gated(gate: &Option<Gate>, y: Tensor, x: &Tensor, taps: &mut Taps) -> Result<Tensor> {
    match gate {
        Some(gate) => gate.apply(&y, &gate.logits(x, None, taps)?),
        None => Ok(y),
    }
}
