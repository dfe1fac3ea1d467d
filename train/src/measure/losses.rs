//! Losses of parts: after each layer, and by position in the context.

use super::Position;
use super::watch::{At, Reader};
use crate::{Error, Result};
use engine::{DType, Tensor};
use nn::Decoder;
use ops::linear_cross_entropy::linear_cross_entropy_per_token;
use ops::rms_norm::rms_norm;

/// The logit lens (nostalgebraist 2020): the loss of the model's last norm and output projection on the residual stream after each layer, nats per token. After
/// the last layer it is the model's own.
pub(super) struct Lens<'a> {
    model: &'a Decoder,
    norm: Tensor,
    head: Tensor,
    /// Of the batch that is computed, `[N]`.
    pub targets: Option<Tensor>,
    sums: Vec<(f64, u64)>,
}

impl<'a> Lens<'a> {
    pub fn new(model: &'a Decoder) -> Result<Lens<'a>> {
        let named = |name: &str| model.params().iter().find(|p| p.name == name).map(|p| p.tensor.detach());
        let missing = |name: &str| Error::Model(format!("logit_lens: the model has no parameter `{name}`"));
        let head = if model.config().tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        Ok(Lens {
            norm: named("model.norm.weight").ok_or_else(|| missing("model.norm.weight"))?,
            head: named(head).ok_or_else(|| missing(head))?.cast(model.place().compute)?,
            model,
            targets: None,
            sums: vec![],
        })
    }
    pub fn finish(self) -> Vec<f64> {
        self.sums.iter().map(|(sum, n)| sum / *n as f64).collect()
    }
}

impl Reader for Lens<'_> {
    fn reads(&self, at: &At) -> bool {
        at.hook == "hook_resid_post"
    }
    fn see(&mut self, at: &At, value: &Tensor) -> engine::Result<()> {
        let Some(targets) = &self.targets else { return Ok(()) };
        let c = self.model.config();
        let x = rms_norm(value, &self.norm, c.rms_norm_eps, c.zero_centered_norms)?.reshape(&[targets.numel(), c.hidden_size])?;
        let each = linear_cross_entropy_per_token(&x, &self.head, targets)?.cast(DType::F64)?;
        if self.sums.len() <= at.layer {
            self.sums.resize(at.layer + 1, (0.0, 0));
        }
        let (sum, n) = &mut self.sums[at.layer];
        *sum += each.sum_all()?.item()?;
        *n += targets.numel() as u64;
        Ok(())
    }
}

/// Bounds of the buckets of positions in windows of `time` tokens: the training length in four, each twice as long as the one before, then 2×, 4×, 8× and so on
/// of it, and what is left: `0, L/8, L/4, L/2, L, 2L, 4L, 8L`.
pub(super) fn bounds(seq_len: usize, time: usize) -> Vec<usize> {
    let doubled = std::iter::successors(Some(seq_len), |x| x.checked_mul(2)).take_while(|x| *x < time);
    let all = [8, 4, 2].iter().map(|part| seq_len / part).chain(doubled).filter(|b| *b > 0 && *b < time);
    let mut bounds: Vec<usize> = [0].into_iter().chain(all).chain([time]).collect();
    bounds.dedup();
    bounds
}

/// The mean loss in each bucket, from the losses of windows of `time` tokens.
pub(super) fn by_position(losses: &[f64], seq_len: usize, time: usize) -> Vec<Position> {
    let mut out = vec![];
    for b in bounds(seq_len, time).windows(2) {
        let (from, to) = (b[0], b[1]);
        let (mut sum, mut n) = (0.0, 0);
        for row in losses.chunks(time) {
            sum += row[from..to].iter().sum::<f64>();
            n += (to - from) as u64;
        }
        out.push(Position { from, to, loss: sum / n as f64, tokens: n });
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_of_positions() {
        assert_eq!(bounds(256, 2048), [0, 32, 64, 128, 256, 512, 1024, 2048]);
        assert_eq!(bounds(256, 256), [0, 32, 64, 128, 256]);
        assert_eq!(bounds(4, 16), [0, 1, 2, 4, 8, 16]);
        assert_eq!(bounds(1, 2), [0, 1, 2]);
        assert_eq!(bounds(512, 20480)[3..], [256, 512, 1024, 2048, 4096, 8192, 16384, 20480]);
        // the loss is the position, and 10 more in the second window
        let losses: Vec<f64> = (0..32).map(|i| f64::from(i % 16 + i / 16 * 10)).collect();
        let p = by_position(&losses, 8, 16);
        let got: Vec<(usize, usize, f64, u64)> = p.iter().map(|p| (p.from, p.to, p.loss, p.tokens)).collect();
        assert_eq!(got, [(0, 1, 5.0, 2), (1, 2, 6.0, 2), (2, 4, 7.5, 4), (4, 8, 10.5, 8), (8, 16, 16.5, 16)]);
    }
}
