//! What a model remembers while it decodes: keys and values of softmax attention, the convolutions' last inputs and the state of the delta rule.

use crate::{Error, Result};
use engine::{Device, Tensor};

/// Keys and values of one sequence, in memory with room for more: a token's are written behind the last, nothing is copied. In a sliding window what no later
/// query sees is let go.
pub(crate) struct KeyValue {
    k: Tensor,
    v: Tensor,
    /// Where the first that is kept stands, and how many are kept.
    from: usize,
    len: usize,
    /// How many of those before it a query sees.
    past: usize,
}

/// Room is made for so many tokens at a time, or for a quarter of what is there, so that copies stay a constant cost per token.
const ROOM: usize = 256;

/// The `n` tokens of x from `from` on, in memory of their own with room for `room`.
fn moved(x: &Tensor, from: usize, n: usize, room: usize) -> engine::Result<Tensor> {
    let y = Tensor::zeros(&[1, room, x.dim(2), x.dim(3)], x.dtype(), x.device())?;
    y.narrow(1, 0, n)?.assign(&x.narrow(1, from, n)?)?;
    Ok(y)
}

impl KeyValue {
    fn new(k: &Tensor, v: &Tensor, past: usize) -> engine::Result<KeyValue> {
        let empty = |x: &Tensor| Tensor::zeros(&[1, 0, x.dim(2), x.dim(3)], x.dtype(), x.device());
        Ok(KeyValue { k: empty(k)?, v: empty(v)?, from: 0, len: 0, past })
    }

    /// Where what the next query sees begins, and how much it is.
    fn seen(&self) -> (usize, usize) {
        let n = self.len.min(self.past);
        (self.from + self.len - n, n)
    }

    /// Appends `k`, `v [1, T, Hkv, D]`, and gives those that the first of them sees and those from there on.
    pub fn push(&mut self, k: &Tensor, v: &Tensor) -> engine::Result<(Tensor, Tensor)> {
        (self.from, self.len) = self.seen();
        let (old, new) = (self.len, self.len + k.dim(1));
        if self.from + new > self.k.dim(1) {
            let room = new.max(old + old / 4).next_multiple_of(ROOM);
            (self.k, self.v) = (moved(&self.k, self.from, old, room)?, moved(&self.v, self.from, old, room)?);
            self.from = 0;
        }
        self.k.narrow(1, self.from + old, k.dim(1))?.assign(k)?;
        self.v.narrow(1, self.from + old, v.dim(1))?.assign(v)?;
        self.len = new;
        Ok((self.k.narrow(1, self.from, new)?, self.v.narrow(1, self.from, new)?))
    }

    /// Keys and values that the next query sees.
    fn kept(&self) -> engine::Result<[Tensor; 2]> {
        let (from, n) = self.seen();
        Ok([self.k.narrow(1, from, n)?, self.v.narrow(1, from, n)?])
    }

    fn copy(&self) -> engine::Result<KeyValue> {
        let (from, len) = self.seen();
        Ok(KeyValue { k: moved(&self.k, from, len, len)?, v: moved(&self.v, from, len, len)?, from: 0, len, past: self.past })
    }
}

/// What one layer remembers.
pub(crate) enum Cache {
    /// Nothing yet.
    Empty,
    /// Of each sequence.
    KeyValue(Vec<KeyValue>),
    /// The convolutions' last inputs (q, k, v) and the delta rule's state, of all sequences.
    Recurrent([Tensor; 3], Tensor),
}

impl Cache {
    /// Keys and values of each of `n` sequences, of which a query sees `window`, itself included (none: all).
    pub fn key_values(&mut self, k: &Tensor, v: &Tensor, window: Option<usize>) -> engine::Result<&mut Vec<KeyValue>> {
        if !matches!(self, Cache::KeyValue(_)) {
            let past = window.map_or(usize::MAX, |w| w.saturating_sub(1));
            *self = Cache::KeyValue((0..k.dim(0)).map(|_| KeyValue::new(k, v, past)).collect::<engine::Result<_>>()?);
        }
        match self {
            Cache::KeyValue(all) => Ok(all),
            _ => unreachable!("made above"),
        }
    }

    /// What its tensors are called.
    fn names(&self) -> &'static [&'static str] {
        match self {
            Cache::Empty => &[],
            Cache::KeyValue(_) => &["keys", "values"],
            Cache::Recurrent(..) => &["conv_q", "conv_k", "conv_v", "state"],
        }
    }
}

/// What all layers remember of one sequence or several: it grows with what is read in softmax attention over all, up to the window in sliding attention, and
/// stays as large in delta-rule layers.
///
/// It is filled by [`Decoder::forward`](crate::Decoder::forward), in place, and belongs to the model that filled it.
pub struct Caches {
    pub(crate) layers: Vec<Cache>,
    /// Tokens read of each sequence; empty before the first.
    pub(crate) lens: Vec<usize>,
}

impl Caches {
    /// Of nothing, for a model of so many layers.
    pub fn new(layers: usize) -> Caches {
        Caches { layers: (0..layers).map(|_| Cache::Empty).collect(), lens: vec![] }
    }
    /// Tokens read of each sequence; empty before the first.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Takes the lengths out, for a call with tokens of `b` sequences that puts them back when it succeeds: one that fails leaves layers at odds.
    pub(crate) fn begin(&mut self, b: usize) -> Result<Vec<usize>> {
        let lens = std::mem::take(&mut self.lens);
        if lens.is_empty() && self.layers.iter().all(|c| matches!(c, Cache::Empty)) {
            return Ok(vec![0; b]);
        }
        if lens.is_empty() {
            return Err(Error::Usage("a call with these caches failed before; begin with new ones".into()));
        }
        if lens.len() != b {
            let n = lens.len();
            self.lens = lens;
            return Err(Error::Usage(format!("the caches are of {n} sequences, found tokens of {b}")));
        }
        Ok(lens)
    }

    /// Several sequences, which may differ in length, to be read on side by side.
    pub fn join(parts: Vec<Caches>) -> Result<Caches> {
        let mut parts = parts.into_iter();
        let mut all = parts.next().ok_or_else(|| Error::Usage("no caches to join".into()))?;
        let rest: Vec<Caches> = parts.collect();
        if rest.iter().any(|c| c.layers.len() != all.layers.len() || c.lens.is_empty()) || all.lens.is_empty() {
            return Err(Error::Usage("caches can be joined once they hold tokens, and if they are of one model".into()));
        }
        let mut columns: Vec<Vec<Cache>> = (0..all.layers.len()).map(|_| vec![]).collect();
        for c in rest {
            all.lens.extend(c.lens);
            c.layers.into_iter().zip(&mut columns).for_each(|(c, column)| column.push(c));
        }
        for (layer, others) in all.layers.iter_mut().zip(columns) {
            *layer = joined(std::mem::replace(layer, Cache::Empty), others)?;
        }
        Ok(all)
    }

    /// The same once more, to be gone on from in another way.
    pub fn copy(&self) -> Result<Caches> {
        let copy = |c: &Cache| {
            Ok(match c {
                Cache::Empty => Cache::Empty,
                Cache::KeyValue(all) => Cache::KeyValue(all.iter().map(KeyValue::copy).collect::<engine::Result<_>>()?),
                // nothing writes into these: a step makes new ones
                Cache::Recurrent(conv, state) => Cache::Recurrent(conv.clone(), state.clone()),
            })
        };
        Ok(Caches { layers: self.layers.iter().map(copy).collect::<Result<_>>()?, lens: self.lens.clone() })
    }

    /// What each layer remembers of one sequence, by names for a file.
    pub(crate) fn named(&self) -> Result<Vec<(String, Tensor)>> {
        let mut out = vec![];
        for (i, layer) in self.layers.iter().enumerate() {
            let parts = match layer {
                Cache::Empty => vec![],
                Cache::KeyValue(all) => all.iter().map(KeyValue::kept).collect::<engine::Result<Vec<_>>>()?.concat(),
                Cache::Recurrent(conv, state) => [&conv[..], std::slice::from_ref(state)].concat(),
            };
            out.extend(layer.names().iter().zip(parts).map(|(name, t)| (format!("layers.{i}.{name}"), t)));
        }
        Ok(out)
    }

    /// Makes caches of one sequence those of another of `len` tokens: each tensor becomes what `read` gives for its name, the present one, and how many tokens
    /// it holds at most, if they are one by one.
    pub(crate) fn refill(&mut self, len: usize, read: impl Fn(&str, &Tensor, Option<usize>) -> Result<Tensor>) -> Result<()> {
        for (i, layer) in self.layers.iter_mut().enumerate() {
            let names = layer.names();
            let read = |j: usize, like: &Tensor, most| read(&format!("layers.{i}.{}", names[j]), like, most);
            match layer {
                Cache::Empty => {}
                Cache::KeyValue(all) => {
                    for past in all {
                        let [k, v] = [read(0, &past.k, Some(past.past))?, read(1, &past.v, Some(past.past))?];
                        *past = KeyValue { from: 0, len: k.dim(1), past: past.past, k, v };
                    }
                }
                Cache::Recurrent(conv, state) => {
                    for (j, x) in conv.iter_mut().chain([state]).enumerate() {
                        *x = read(j, x, None)?;
                    }
                }
            }
        }
        self.lens = vec![len];
        Ok(())
    }

    /// Goes on with the sequences `rows` alone, in this order.
    pub fn keep(&mut self, rows: &[usize]) -> Result<()> {
        if let Some(r) = rows.iter().enumerate().find(|(i, r)| **r >= self.lens.len() || rows[..*i].contains(r)) {
            return Err(Error::Usage(format!("of {} sequences, each may be kept once, found {:?} (number {})", self.lens.len(), rows, r.0)));
        }
        self.lens = rows.iter().map(|r| self.lens[*r]).collect();
        for layer in &mut self.layers {
            match layer {
                Cache::Empty => {}
                Cache::KeyValue(all) => {
                    let mut old: Vec<Option<KeyValue>> = std::mem::take(all).into_iter().map(Some).collect();
                    all.extend(rows.iter().filter_map(|r| old[*r].take()));
                }
                Cache::Recurrent(conv, state) => {
                    let at = Tensor::from_vec(rows.iter().map(|r| *r as i64).collect::<Vec<_>>(), &[rows.len()])?.to_device(state.device())?;
                    for x in conv.iter_mut().chain([state]) {
                        *x = x.index_select(0, &at)?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn joined(first: Cache, others: Vec<Cache>) -> Result<Cache> {
    let unlike = || Error::Usage("caches of different models can't be joined".into());
    Ok(match first {
        Cache::Empty => Cache::Empty,
        Cache::KeyValue(mut all) => {
            for c in others {
                let Cache::KeyValue(more) = c else { return Err(unlike()) };
                all.extend(more);
            }
            Cache::KeyValue(all)
        }
        Cache::Recurrent(conv, state) => {
            let mut columns: [Vec<Tensor>; 4] = [vec![conv[0].clone()], vec![conv[1].clone()], vec![conv[2].clone()], vec![state]];
            for c in others {
                let Cache::Recurrent(conv, state) = c else { return Err(unlike()) };
                conv.into_iter().chain([state]).zip(&mut columns).for_each(|(x, column)| column.push(x));
            }
            let [q, k, v, state] = columns.map(|c| Tensor::cat(&c.iter().collect::<Vec<_>>(), 0));
            Cache::Recurrent([q?, k?, v?], state?)
        }
    })
}

/// The positions `[B, T]` (i64) of the next `t` tokens of sequences that differ in length; none if all are as long.
pub(crate) fn positions(lens: &[usize], t: usize, device: &Device) -> engine::Result<Option<Tensor>> {
    if lens.windows(2).all(|w| w[0] == w[1]) {
        return Ok(None);
    }
    let at: Vec<i64> = lens.iter().flat_map(|n| (0..t).map(move |i| (n + i) as i64)).collect();
    Tensor::from_vec(at, &[lens.len(), t])?.to_device(device).map(Some)
}
