//! What a model answers where it is asked.

use super::{IGNORE, Sample};
use crate::{Error, Result};
use engine::{DType, Tensor, no_grad};
use nn::{CHUNK, Caches, Decoder};

/// What a model answered at a label.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Answer {
    /// Negative log-likelihood of the label, nats.
    pub nll: f64,
    /// Whether the label is the likeliest token (of equals, the first).
    pub right: bool,
}

/// Numbers of a block of logits.
const BLOCK: usize = 1 << 22;

/// The answers at the labels, from final hidden states `[…, H]` of as many positions. Only there are logits computed.
pub(crate) fn answers(model: &Decoder, hidden: &Tensor, labels: &[i64]) -> Result<Vec<Answer>> {
    let (h, vocab) = (model.config().hidden_size, model.config().vocab_size);
    let at: Vec<usize> = (0..labels.len()).filter(|i| labels[*i] != IGNORE).collect();
    let hidden = hidden.reshape(&[labels.len(), h])?;
    let mut out = Vec::with_capacity(at.len());
    for some in at.chunks((BLOCK / vocab.max(1)).max(1)) {
        let index: Vec<i64> = some.iter().map(|i| *i as i64).collect();
        let rows = hidden.index_select(0, &Tensor::from_slice(&index, &[index.len()], hidden.device())?)?;
        let logits = model.logits(&rows)?.cast(DType::F32)?.to_vec::<f32>()?;
        for (row, i) in logits.chunks(vocab).zip(some) {
            out.push(answer(row, labels[*i] as usize)?);
        }
    }
    Ok(out)
}

fn answer(logits: &[f32], label: usize) -> Result<Answer> {
    let mut best = 0;
    for (i, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = i;
        }
    }
    let top = f64::from(logits[best]);
    let nll = logits.iter().map(|l| (f64::from(*l) - top).exp()).sum::<f64>().ln() + top - f64::from(logits[label]);
    if !nll.is_finite() {
        return Err(Error::NonFinite(format!("the loss of a label is {nll}")));
    }
    Ok(Answer { nll, right: best == label })
}

/// What a model answers to samples of one length, side by side. A sample longer than [`CHUNK`] is read in pieces, alone: what is kept of it then is what the model's caches hold,
/// which in delta-rule layers is the same for any length.
pub(super) fn read(model: &Decoder, samples: &[Sample]) -> Result<Vec<Vec<Answer>>> {
    let time = samples.first().map_or(0, |s| s.tokens.len());
    let tensor = |tokens: &[u32], rows: usize| Tensor::from_slice(tokens, &[rows, tokens.len() / rows], &model.place().device);
    engine::cpu::in_pool(|| {
        no_grad(|| {
            if time > CHUNK {
                return samples.iter().map(|s| in_pieces(model, s)).collect();
            }
            let tokens: Vec<u32> = samples.iter().flat_map(|s| &s.tokens).copied().collect();
            let labels: Vec<i64> = samples.iter().flat_map(|s| &s.labels).copied().collect();
            let hidden = model.forward(&tensor(&tokens, samples.len())?, None, None, None)?.0;
            let mut all = answers(model, &hidden, &labels)?.into_iter();
            Ok(samples.iter().map(|s| all.by_ref().take(s.asked()).collect()).collect())
        })
    })
}

fn in_pieces(model: &Decoder, sample: &Sample) -> Result<Vec<Answer>> {
    let mut caches = Caches::new(model.config().num_hidden_layers);
    let mut out = vec![];
    for (tokens, labels) in sample.tokens.chunks(CHUNK).zip(sample.labels.chunks(CHUNK)) {
        let tokens = Tensor::from_slice(tokens, &[1, tokens.len()], &model.place().device)?;
        if labels.iter().all(|l| *l == IGNORE) {
            // of the last layer, only what the caches take up is computed
            model.last(&tokens, &mut caches)?;
        } else {
            out.extend(answers(model, &model.forward(&tokens, None, Some(&mut caches), None)?.0, labels)?);
        }
    }
    Ok(out)
}
