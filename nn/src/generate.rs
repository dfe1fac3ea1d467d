//! Generation: a prompt in pieces through the parallel form, then token by token, with keys and values and recurrent states kept.

use crate::{Caches, Decoder, Error, Observer, Result};
use engine::{Tensor, no_grad, rng};
use std::cmp::Ordering;

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
        // the likelier first, and the first among equals
        let falling = |a: &usize, b: &usize| -> Ordering { logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)) };
        let best = (0..logits.len()).min_by(falling).unwrap_or(0);
        if self.temperature <= 0.0 || logits.len() < 2 {
            return best;
        }
        let p = |i: &usize| ((logits[*i] - logits[best]) / self.temperature).exp();
        let mut rest: Vec<usize> = (0..logits.len()).collect();
        if self.top_k > 0 && self.top_k < rest.len() {
            rest.select_nth_unstable_by(self.top_k, falling);
            rest.truncate(self.top_k);
        }
        // most draws end among the first few, so that only these are put in order
        let total: f64 = rest.iter().map(p).sum();
        let mut likely = 64;
        loop {
            if likely < rest.len() {
                rest.select_nth_unstable_by(likely, falling);
            }
            let n = likely.min(rest.len());
            rest[..n].sort_unstable_by(falling);
            let mut seen = 0.0;
            let kept = rest[..n].iter().position(|i| {
                seen += p(i);
                seen >= self.top_p * total
            });
            let end = kept.map_or(n, |k| k + 1);
            let u = rng::uniform(self.seed, at, 1)[0] * if kept.is_some() { seen } else { total };
            let mut below = 0.0;
            let drawn = rest[..end].iter().find(|i| {
                below += p(i);
                u < below
            });
            match drawn {
                Some(i) if kept.is_some() || self.top_p >= 1.0 => return *i,
                _ if n == rest.len() => return rest[end - 1],
                _ => likely *= 8,
            }
        }
    }
}

/// A prompt is read in pieces of so many tokens, which bounds the memory for activations. 16,384 tokens through the model of `benches/configs/decode-small.toml`,
/// on two cores of a Zen 4, in pieces of 512: 807 ms; 1,024: 722; 2,048: 749 (78 MiB); 8,192: 803; all at once: 756 ms (233 MiB).
pub const CHUNK: usize = 2048;

/// A decoding context of one sequence: feed tokens, get the logits of the next.
pub struct Generator<'a> {
    model: &'a Decoder,
    caches: Caches,
    observer: Option<&'a mut dyn Observer>,
}

impl<'a> Generator<'a> {
    /// An empty context.
    pub fn new(model: &'a Decoder) -> Self {
        Self::on(model, Caches::new(model.config().num_hidden_layers))
    }
    /// The context that `caches` hold, of one sequence or several.
    pub fn on(model: &'a Decoder, caches: Caches) -> Self {
        Generator { model, caches, observer: None }
    }
    /// The same context, with an observer of everything that is read from here on, a prompt in pieces of [`CHUNK`] tokens and then one by one.
    pub fn observed(mut self, observer: &'a mut dyn Observer) -> Self {
        self.observer = Some(observer);
        self
    }
    /// What it remembers.
    pub fn caches(&mut self) -> &mut Caches {
        &mut self.caches
    }
    /// What it remembers, to be joined with that of others.
    pub fn into_caches(self) -> Caches {
        self.caches
    }
    /// Reads tokens on top of what was read before; returns the logits after the last.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<Vec<f64>> {
        if tokens.is_empty() {
            return Err(Error::Usage("a prompt needs at least one token".into()));
        }
        let mut logits = vec![];
        for piece in tokens.chunks(CHUNK) {
            logits = self.read(piece, 1)?;
        }
        logits.pop().ok_or_else(|| Error::Usage("the context is of no sequence".into()))
    }
    /// Reads one token of each sequence; returns the logits after each.
    pub fn step(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f64>>> {
        self.read(tokens, tokens.len())
    }
    fn read(&mut self, tokens: &[u32], rows: usize) -> Result<Vec<Vec<f64>>> {
        let (model, caches) = (self.model, &mut self.caches);
        match self.observer.as_deref_mut() {
            Some(observer) => logits(model, caches, tokens, rows, Some(observer)),
            None => engine::cpu::in_pool(|| logits(model, caches, tokens, rows, None)),
        }
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

/// The logits after the last of `tokens` of each of `rows` sequences.
fn logits(model: &Decoder, caches: &mut Caches, tokens: &[u32], rows: usize, observer: Option<&mut dyn Observer>) -> Result<Vec<Vec<f64>>> {
    let n = tokens.len() / rows.max(1);
    let t = Tensor::from_vec(tokens, &[rows, n])?.to_device(&model.place().device)?;
    no_grad(|| {
        let last = match observer {
            // who looks sees everything
            Some(_) => model.forward(&t, None, Some(caches), observer)?.0.narrow(1, n - 1, 1)?,
            None => model.last(&t, caches)?,
        };
        let logits = model.logits(&last.reshape(&[rows, model.config().hidden_size])?)?.to_vec::<f64>()?;
        Ok(logits.chunks(model.config().vocab_size).map(<[f64]>::to_vec).collect())
    })
}
