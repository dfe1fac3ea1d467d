//! Generation, token by token, with a key/value cache and a recurrent state.

use crate::{Cache, Decoder, Error, Observer, Result};
use engine::{Tensor, no_grad, rng};

/// How the next token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampler {
    /// Logits are divided by it; 0 takes the most likely token.
    pub temperature: f64,
    /// Only the k most likely (0: all).
    pub top_k: usize,
    /// Only the most likely that together reach this probability (1: all).
    pub top_p: f64,
    /// Same seed, same text.
    pub seed: u64,
}

impl Sampler {
    /// Draws from logits, with the random number of place `at`.
    pub fn draw(&self, logits: &[f64], at: u64) -> usize {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        if self.temperature <= 0.0 || order.len() < 2 {
            return order.first().copied().unwrap_or(0);
        }
        if self.top_k > 0 {
            order.truncate(self.top_k);
        }
        let top = logits[order[0]];
        let mut p: Vec<f64> = order.iter().map(|i| ((logits[*i] - top) / self.temperature).exp()).collect();
        let total: f64 = p.iter().sum();
        let mut seen = 0.0;
        let keep = p.iter().position(|x| {
            seen += x / total;
            seen >= self.top_p
        });
        p.truncate(keep.map_or(p.len(), |k| k + 1));
        let mut u = rng::uniform(self.seed, at, 1)[0] * p.iter().sum::<f64>();
        for (x, i) in p.iter().zip(&order) {
            u -= x;
            if u < 0.0 {
                return *i;
            }
        }
        order[p.len() - 1]
    }
}

/// A decoding context: feed tokens, get the logits of the next.
pub struct Generator<'a> {
    model: &'a Decoder,
    caches: Vec<Cache>,
    seen: usize,
    observer: Option<&'a mut dyn Observer>,
}

impl<'a> Generator<'a> {
    /// An empty context.
    pub fn new(model: &'a Decoder) -> Self {
        Generator { model, caches: vec![Cache::Empty; model.config().num_hidden_layers], seen: 0, observer: None }
    }
    /// The same context, with an observer of everything that is read from here on, tokens of a prompt all at once and then one by one.
    pub fn observed(mut self, observer: &'a mut dyn Observer) -> Self {
        self.observer = Some(observer);
        self
    }
    /// Reads tokens on top of what was read before; returns the logits after the last.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<Vec<f64>> {
        if tokens.is_empty() {
            return Err(Error::Usage("a prompt needs at least one token".into()));
        }
        let t = Tensor::from_vec(tokens, &[1, tokens.len()])?.to_device(&self.model.place().device)?;
        no_grad(|| {
            let observer = self.observer.as_deref_mut().map(|o| o as &mut dyn Observer);
            let (x, _) = self.model.forward(&t, None, Some((&mut self.caches, self.seen)), observer)?;
            self.seen += tokens.len();
            let last = x.narrow(1, tokens.len() - 1, 1)?.reshape(&[1, self.model.config().hidden_size])?;
            Ok(self.model.logits(&last)?.to_vec::<f64>()?)
        })
    }
    /// Continues a prompt by `n` tokens, each shown to `each` as it comes.
    pub fn generate(&mut self, prompt: &[u32], n: usize, how: &Sampler, mut each: impl FnMut(u32)) -> Result<Vec<u32>> {
        let mut out = vec![]; // not with room for `n`, which may be beyond any memory
        let mut logits = self.feed(prompt)?;
        for i in 0..n {
            let token = how.draw(&logits, i as u64) as u32;
            each(token);
            out.push(token);
            if i + 1 < n {
                logits = self.feed(&[token])?;
            }
        }
        Ok(out)
    }
}
