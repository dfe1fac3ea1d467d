//! Running a model over a text with everything that reads it.

use super::activations::Stream;
use super::attention::{Heads, SINK_TOKENS};
use super::delta::States;
use super::gates::Gates;
use super::hybrid::Spikes;
use super::losses::{Lens, by_position};
use super::router::Routes;
use super::sdpa::Outputs;
use super::watch::{Reader, Watch, is_softmax};
use super::{DataInfo, FORMAT, LayerInfo, Measures, Options, Trace, names, ranks};
use crate::data::Corpus;
use crate::text::Codec;
use crate::{Error, Result};
use engine::Tensor;
use nn::{Decoder, Observer};
use std::ops::Range;

/// Tokens of a batch.
const TOGETHER: usize = 4096;
/// Samples of the sink rate, as in 2410.10781's code.
const SINK_SAMPLES: usize = 100;
/// Tokens of the text that gates are traced along, where none is given, and at most.
const TRACED: (usize, usize) = (200, 4096);

/// Windows of `time` tokens of a text, the target of each token being the next.
struct Windows {
    tokens: Vec<u32>,
    targets: Vec<u32>,
    time: usize,
}

impl Windows {
    fn at(corpus: &Corpus, starts: &[usize], time: usize) -> Windows {
        let (mut tokens, mut targets, mut row) = (vec![], vec![], vec![]);
        for start in starts {
            row.clear();
            corpus.read(*start..start + time + 1, &mut row);
            tokens.extend_from_slice(&row[..time]);
            targets.extend_from_slice(&row[1..]);
        }
        Windows { tokens, targets, time }
    }
}

/// A model and where its input begins.
struct Pass<'a> {
    model: &'a Decoder,
    corpus: &'a Corpus,
}

impl Pass<'_> {
    fn targets(&self, targets: &[u32]) -> Result<Tensor> {
        let wide: Vec<i64> = targets.iter().map(|t| i64::from(*t)).collect();
        Ok(Tensor::from_slice(&wide, &[wide.len()], &self.model.place().device)?)
    }
    /// The losses of windows, nats by token, with what `watch` sees on the way.
    fn losses(&self, w: &Windows, targets: &Tensor, watch: &mut dyn Observer) -> Result<Vec<f64>> {
        let vocab = self.model.config().vocab_size;
        if let Some(t) = w.tokens.iter().chain(&w.targets).find(|t| **t as usize >= vocab) {
            let m = format!("token {t} is outside the model's vocabulary of {vocab}: the text was encoded for another model");
            return Err(Error::data(self.corpus.path(), m));
        }
        let tokens = Tensor::from_slice(&w.tokens, &[w.tokens.len() / w.time, w.time], &self.model.place().device)?;
        let each = engine::no_grad(|| self.model.token_losses(&tokens, targets, None, Some(watch)))?;
        Ok(each.cast(engine::DType::F64)?.to_vec::<f64>()?)
    }
    fn watch<'w>(&'w self, readers: Vec<&'w mut dyn Reader>) -> Watch<'w> {
        Watch { config: self.model.config(), readers }
    }
}

/// Starts of windows in batches.
fn batches(starts: &[usize], time: usize) -> impl Iterator<Item = &[usize]> {
    starts.chunks((TOGETHER / time.max(1)).max(1))
}

/// Measures a model on `range` of a text. The windows follow one another from the range's beginning, the first one's first input being the token before it (which,
/// as in `tidegate eval`, is the last that was trained on); each is read by itself, from position 0, over documents' bounds. Nothing but sums is kept of what is seen.
/// `checkpoint` and `step` are left for the caller to fill in.
///
/// # Errors
///
/// A text that is shorter than a window, or of tokens that the model doesn't know; a measure that there is none of, or that the model has nothing of; a loss that is
/// not finite.
pub fn measure(model: &Decoder, corpus: &Corpus, range: Range<usize>, options: &Options) -> Result<Measures> {
    let c = model.config();
    let take = names::chosen(c, &options.only)?;
    let takes = |name: &str| take.contains(&name);
    let time = options.seq_len;
    if time < 2 {
        return Err(Error::Usage(format!("windows of {time} tokens: expected at least 2")));
    }
    if let Some(c) = options.context.filter(|c| *c < time) {
        return Err(Error::Usage(format!(
            "a context of {c} tokens is shorter than a window of {time}; the loss by position needs at least one window"
        )));
    }
    let first = range.start.max(1) - 1;
    let there = range.end.saturating_sub(first + 1);
    let count = (options.tokens / time).max(1).min(there / time);
    if count == 0 {
        let m = format!(
            "is too short to measure on: {there} tokens can be predicted there, a window needs {time}; name a longer text, or make the windows shorter"
        );
        return Err(Error::data(corpus.path(), m));
    }
    let pass = Pass { model, corpus };
    let starts: Vec<usize> = (0..count).map(|i| first + i * time).collect();
    let codec = options.codec.as_ref().or(corpus.codec());

    let softmax = (0..c.num_hidden_layers).any(|i| is_softmax(c, i));
    let hybrid = softmax && (0..c.num_hidden_layers).any(|i| !is_softmax(c, i));
    let spiking = hybrid && takes("activations");
    let mut heads = (takes("attention") || spiking).then(|| Heads::new(c, spiking));
    let mut stream = takes("activations").then(Stream::default);
    let mut spikes = spiking.then(Spikes::default);
    let mut gates = takes("gates").then(|| Gates::new(c));
    let mut outputs = takes("sdpa_output").then(Outputs::default);
    let mut states = takes("delta").then(|| States::new(count * time));
    let mut routes = takes("router").then(|| Routes::new(c.num_experts));
    let mut lens = if takes("logit_lens") { Some(Lens::new(model)?) } else { None };
    let (mut nats, mut tokens) = (0.0, vec![]);
    for starts in batches(&starts, time) {
        let w = Windows::at(corpus, starts, time);
        let targets = pass.targets(&w.targets)?;
        if let Some(lens) = &mut lens {
            lens.targets = Some(targets.clone());
        }
        let mut readers: Vec<&mut dyn Reader> = vec![];
        readers.extend(heads.as_mut().map(|r| r as &mut dyn Reader));
        readers.extend(stream.as_mut().map(|r| r as &mut dyn Reader));
        readers.extend(gates.as_mut().map(|r| r as &mut dyn Reader));
        readers.extend(outputs.as_mut().map(|r| r as &mut dyn Reader));
        readers.extend(states.as_mut().map(|r| r as &mut dyn Reader));
        readers.extend(routes.as_mut().map(|r| r as &mut dyn Reader));
        readers.extend(lens.as_mut().map(|r| r as &mut dyn Reader));
        nats += pass.losses(&w, &targets, &mut pass.watch(readers))?.iter().sum::<f64>();
        if let (Some(spikes), Some(stream), Some(heads)) = (&mut spikes, &stream, &heads) {
            spikes.add(&stream.values, &heads.tokens);
        }
        if stream.is_some() {
            tokens.extend(w.tokens);
        }
    }
    let scored = count * time;
    let loss = nats / scored as f64;
    if !loss.is_finite() {
        return Err(Error::NonFinite(format!(
            "the loss over {scored} tokens is {loss}: nothing else that is measured of this model would mean anything"
        )));
    }
    let bytes = corpus.text_bytes(first + 1..first + 1 + scored).filter(|b| *b > 0);
    let (parameters, active) = c.parameters();
    let mut m = Measures {
        format: FORMAT,
        parameters: parameters as u64,
        active_parameters: active as u64,
        layers: (0..c.num_hidden_layers).map(|i| LayerInfo { layer: i, mixer: c.layer_type(i).name().into(), experts: c.is_sparse(i) }).collect(),
        data: DataInfo { path: corpus.path().display().to_string(), tokens: scored as u64, bytes, seq_len: time, windows: count },
        loss,
        bits_per_byte: bytes.map(|b| nats / std::f64::consts::LN_2 / b as f64),
        ..Measures::default()
    };
    if let Some(heads) = heads.filter(|_| takes("attention")) {
        m.attention = Some(heads.finish(sinks(&pass, first..first + scored)?));
    }
    m.activations = stream.map(|s| s.finish(&tokens, time, |t| codec.map(|c| spelled(c, t))));
    if let (Some(a), Some(spikes)) = (&mut m.activations, spikes) {
        a.spikes = Some(spikes.finish(a, |i| is_softmax(c, i)));
    }
    if let Some(gates) = gates {
        (m.gates, m.gate_score) = gates.finish();
    }
    m.sdpa_output = outputs.map(Outputs::finish).unwrap_or_default();
    m.delta = states.map(States::finish).unwrap_or_default();
    m.router = routes.map(Routes::finish).unwrap_or_default();
    m.logit_lens = lens.map(Lens::finish).unwrap_or_default();
    if takes("value_output_rank") {
        m.value_output_rank = ranks::value_output(model)?;
    }
    if takes("loss_by_position") {
        m.loss_by_position = positions(&pass, first, there, time, options)?;
    }
    if takes("trace") {
        m.trace = Some(trace(&pass, first, there, options, codec)?);
    }
    Ok(m)
}

/// A token as a person reads it: bytes that are no printable ASCII as escapes.
fn spelled(codec: &Codec, token: u32) -> String {
    match (codec, u8::try_from(token)) {
        (Codec::Bytes, Ok(b)) => b.escape_ascii().to_string(),
        _ => codec.decode(&[token]),
    }
}

/// Attention over up to 100 samples of 64 tokens, which lie evenly in `range`.
fn sinks<'a>(pass: &'a Pass, range: Range<usize>) -> Result<Heads<'a>> {
    let mut heads = Heads::new(pass.model.config(), false);
    let blocks = range.len() / SINK_TOKENS;
    let samples = blocks.min(SINK_SAMPLES);
    let starts: Vec<usize> = (0..samples).map(|i| range.start + i * blocks / samples * SINK_TOKENS).collect();
    for starts in batches(&starts, SINK_TOKENS) {
        let w = Windows::at(pass.corpus, starts, SINK_TOKENS);
        pass.losses(&w, &pass.targets(&w.targets)?, &mut pass.watch(vec![&mut heads]))?;
    }
    Ok(heads)
}

/// The loss by position in windows as long as was asked for, else 8, 4, 2 or 1 times the training length, the longest that the text has one of.
fn positions(pass: &Pass, first: usize, there: usize, seq_len: usize, options: &Options) -> Result<Vec<super::Position>> {
    let most = options.context.unwrap_or(8 * seq_len);
    let time = [most].into_iter().chain([8, 4, 2].map(|n| n * seq_len)).find(|t| *t <= there.min(most)).unwrap_or(seq_len);
    let count = (options.tokens / time).max(1).min(there / time);
    let starts: Vec<usize> = (0..count).map(|i| first + i * time).collect();
    let mut losses = vec![];
    for starts in batches(&starts, time) {
        let w = Windows::at(pass.corpus, starts, time);
        losses.extend(pass.losses(&w, &pass.targets(&w.targets)?, &mut pass.watch(vec![]))?);
    }
    Ok(by_position(&losses, seq_len, time))
}

/// Gates along a text: the one given, or the beginning of what is measured on.
fn trace(pass: &Pass, first: usize, there: usize, options: &Options, codec: Option<&Codec>) -> Result<Trace> {
    let tokens = match &options.trace_text {
        Some(text) => {
            let codec = codec.ok_or_else(|| {
                Error::Usage("a text to trace was given, and nothing says how it is tokens: no tokenizer.json lies with the model".into())
            })?;
            codec.encode(text)?
        }
        None => {
            let mut tokens = vec![];
            pass.corpus.read(first..first + TRACED.0.min(there), &mut tokens);
            tokens
        }
    };
    let n = tokens.len();
    if n < 2 || n > TRACED.1 {
        return Err(Error::Usage(format!("the text to trace is {n} tokens; expected 2 to {}", TRACED.1)));
    }
    let mut gates = Gates::along(pass.model.config());
    let next = [&tokens[1..], &tokens[..1]].concat();
    let w = Windows { time: n, targets: next, tokens };
    let losses = pass.losses(&w, &pass.targets(&w.targets)?, &mut pass.watch(vec![&mut gates]))?;
    // the last token's target is none of the text
    let loss = [None].into_iter().chain(losses[..n - 1].iter().map(|x| Some(*x))).collect();
    let text = match codec {
        None => w.tokens.iter().map(|t| format!("[{t}]")).collect(),
        Some(codec) => {
            let mut decoder = codec.decoder();
            let mut text: Vec<String> = w.tokens.iter().map(|t| decoder.push(*t)).collect();
            text[n - 1].push_str(&decoder.finish());
            text
        }
    };
    Ok(Trace { tokens: text, loss, series: gates.into_series() })
}
