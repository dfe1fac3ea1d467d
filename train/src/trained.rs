//! A network with AdamW, as a [`Learner`]: micro-batches side by side on the CPU; on a GPU a step that is captured once and replayed.

use crate::config::Optim;
use crate::data::Batch;
use crate::feed::Feed;
use crate::histogram::{Distribution, Gates};
use crate::learner::{Loss, Network};
use crate::metrics::Scalars;
use crate::observe::{Seen, Summary};
use crate::optim::{self, AdamW};
use crate::progress::say;
use crate::tasks::Answer;
use crate::trainer::{Batches, Learner, Sampling, Step, Stepped};
use crate::{Error, Result, checkpoint};
use cuda::{Cuda, Graph};
use engine::{DType, Device, Grads, Tensor};
use ops::adamw::{GlobalNorm, global_norm, sum_of_squares};
use rayon::prelude::*;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

/// A network and its optimizer.
pub struct Trained<N> {
    net: N,
    device: Device,
    optim: Option<AdamW>,
    /// Off the CPU: whether steps are captured once and replayed.
    replays: bool,
    replayed: Option<Replayed>,
    /// Whether the kernels of a step are compiled.
    prepared: bool,
    /// The most document bounds that a batch had, rounded up.
    bounds: usize,
}

/// A captured step.
struct Replayed {
    /// Whether it looks at what it computes.
    observed: bool,
    graph: Graph<Outcome>,
    feeds: Vec<Feed>,
    schedule: Tensor,
    optim: Optim,
}

/// What a step leaves on its device.
#[derive(Clone)]
struct Outcome {
    /// Each micro-batch's loss and objective, the gradients' norm, and what was seen, f64.
    numbers: Tensor,
    /// What was seen.
    names: Vec<String>,
}

impl<N: Network> Trained<N> {
    /// A network that has no optimizer state yet; that is made at the first update.
    pub fn new(net: N) -> Trained<N> {
        let device = net.params().first().map_or_else(Device::cpu, |p| p.1.device().clone());
        Trained { net, device, optim: None, replays: true, replayed: None, prepared: false, bounds: 0 }
    }
    /// On a GPU a step is captured once and then replayed as a whole. `false` launches its kernels one by one: slower, the same bits.
    pub fn replays(mut self, replays: bool) -> Trained<N> {
        self.replays = replays;
        self
    }
    /// Whether a captured step is there to be replayed.
    pub fn is_replaying(&self) -> bool {
        self.replayed.is_some()
    }
    /// Takes parameters over from a run, a checkpoint or a folder of transformers, and nothing else: training begins.
    pub fn begin_from(&mut self, path: &Path) -> Result<()> {
        let skip = |path: &Path, e: &Error| say(&format!("skipped {}: {e}", path.display()));
        let (found, ()) = checkpoint::first_whole(&checkpoint::candidates(path)?, skip, |dir| {
            checkpoint::verify(dir, &[checkpoint::MODEL])?;
            self.net.load(dir)
        })?;
        say(&format!("parameters of {}", found.display()));
        Ok(())
    }
    /// The network.
    pub fn net(&self) -> &N {
        &self.net
    }
    /// How many numbers the parameters are.
    pub fn parameters(&self) -> usize {
        self.net.params().iter().map(|(_, t)| t.numel()).sum()
    }
    fn feed(&self, batch: &Batch) -> Result<Feed> {
        Feed::new(batch, &self.device, self.bounds)
    }
}

/// One of `micro` micro-batches' part of the objective.
fn share(objective: Tensor, micro: usize) -> Result<Tensor> {
    if micro == 1 { Ok(objective) } else { objective.affine(1.0 / micro as f64, 0.0).map_err(Error::from) }
}

fn scalar(t: &Tensor) -> Result<f64> {
    t.item().map_err(Error::from)
}

/// The device's scalars as one tensor, f64.
fn numbers(scalars: &[Tensor]) -> engine::Result<Tensor> {
    let flat = scalars.iter().map(|t| t.detach().cast(DType::F64)?.reshape(&[1])).collect::<engine::Result<Vec<_>>>()?;
    Tensor::cat(&flat.iter().collect::<Vec<_>>(), 0)
}

impl<N: Network> Trained<N> {
    /// The first parameter that holds a number that is not finite.
    fn broken(&self) -> Result<Option<&str>> {
        let params = self.net.params();
        let all: Vec<Tensor> = params.iter().map(|p| p.1.detach()).collect();
        if all.is_empty() || global_norm(GlobalNorm { max_norm: 0.0, scale: 1.0 }, &all.iter().collect::<Vec<_>>())?.0.item()?.is_finite() {
            return Ok(None);
        }
        let finite = |t: &Tensor| Ok::<_, Error>(sum_of_squares(&t.detach())?.item()?.is_finite());
        for (name, t) in params {
            if !finite(t)? {
                return Ok(Some(name));
            }
        }
        Ok(None)
    }

    /// A micro-batch's loss, with what there is to see of it.
    fn observed_loss(&self, feed: &Feed, seen: &mut Seen) -> Result<Loss> {
        let loss = self.net.loss(feed, Some(&mut Summary { seen, experts: self.net.experts() }))?;
        seen.push("loss_auxiliary", &loss.objective.detach().sub(&loss.nll.detach())?)?;
        loss.auxiliary.iter().try_for_each(|(name, value)| seen.push(*name, value))?;
        Ok(loss)
    }

    /// Forward and backward of all micro-batches side by side, as many at a time as there are threads; the gradients are added in their order.
    fn side_by_side(&self, micro: usize, batch: Batches, observed: Option<&mut Seen>, grads: &mut Grads) -> Result<Vec<f64>> {
        let seen = observed.map(Mutex::new);
        let one = |i: usize| -> Result<(f64, Grads)> {
            let feed = self.feed(&batch(i)?)?;
            // what this thread was waiting for when it took this task up may have switched recording off
            engine::enable_grad(|| {
                let mut grads = Grads::new();
                let loss = match &seen {
                    Some(seen) if i == 0 => self.observed_loss(&feed, &mut seen.lock().unwrap_or_else(|e| e.into_inner()))?,
                    _ => self.net.loss(&feed, None)?,
                };
                let (nll, objective) = (scalar(&loss.nll)?, scalar(&loss.objective)?);
                // A loss that isn't finite is for the caller to report; its gradients would only hide where it began.
                if !(nll.is_finite() && objective.is_finite()) {
                    return Ok((objective, grads));
                }
                share(loss.objective, micro)?.backward_into(&mut grads)?;
                Ok((nll, grads))
            })
        };
        let mut losses = Vec::new();
        // as many at a time as there are threads, since each holds gradients of the whole model until they are added up
        let together = rayon::current_num_threads();
        for first in (0..micro).step_by(together) {
            let done: Vec<Result<(f64, Grads)>> = (first..micro.min(first + together)).into_par_iter().with_max_len(1).map(one).collect();
            for done in done {
                let (loss, more) = done?;
                losses.push(loss);
                grads.merge(more)?;
            }
        }
        Ok(losses)
    }

    fn step_here(&self, optim: &AdamW, work: &Step, batch: Batches, observed: Option<&mut Scalars>) -> Result<Stepped> {
        let mut seen = observed.is_some().then(Seen::default);
        let done = self.take_step(optim, work, batch, seen.as_mut());
        // of a step that failed, what was seen before it did is worth the most
        if let (Some(seen), Some(out)) = (seen, observed) {
            seen.read(out)?;
        }
        done
    }

    fn take_step(&self, optim: &AdamW, work: &Step, batch: Batches, mut seen: Option<&mut Seen>) -> Result<Stepped> {
        let mut grads = Grads::new();
        let losses = self.side_by_side(work.micro, batch, seen.as_deref_mut(), &mut grads)?;
        if losses.iter().any(|l| !l.is_finite()) {
            return Ok(Stepped { losses, grad_norm: Err("a loss is not finite".into()) });
        }
        let params = self.net.params();
        let watch = seen.as_deref_mut().map(|seen| optim::Watch::before(&params, &grads, seen)).transpose()?;
        let schedule = AdamW::schedule(work.optim, work.step, work.lr, &self.device)?;
        let norm = optim.step(&params, &grads, &schedule, &[], work.optim)?.item()?;
        if !norm.is_finite() {
            let why = optim::not_finite(&params, &grads)?.unwrap_or_else(|| "the norm of all gradients is not finite".into());
            return Ok(Stepped { losses, grad_norm: Err(why) });
        }
        if let (Some(watch), Some(seen)) = (watch, seen) {
            watch.after(&params, seen)?;
        }
        Ok(Stepped { losses, grad_norm: Ok(norm) })
    }

    /// One step's work on a device, one micro-batch after another, without waiting for it.
    fn submit(&self, optim: &AdamW, feeds: &[Feed], schedule: &Tensor, o: &Optim, observed: bool) -> Result<(Outcome, Grads)> {
        let (mut grads, mut scalars, mut seen, params) = (Grads::new(), vec![], Seen::default(), self.net.params());
        for (i, feed) in feeds.iter().enumerate() {
            let loss = if observed && i == 0 { self.observed_loss(feed, &mut seen)? } else { self.net.loss(feed, None)? };
            scalars.extend([loss.nll.detach(), loss.objective.detach()]);
            share(loss.objective, feeds.len())?.backward_into(&mut grads)?;
        }
        let watch = observed.then(|| optim::Watch::before(&params, &grads, &mut seen)).transpose()?;
        let guard: Vec<&Tensor> = scalars.iter().collect();
        let norm = optim.step(&params, &grads, schedule, &guard, o)?;
        if let Some(watch) = watch {
            watch.after(&params, &mut seen)?;
        }
        scalars.push(norm);
        let (names, seen) = seen.finish()?;
        let all = [Some(numbers(&scalars)?), seen];
        Ok((Outcome { numbers: Tensor::cat(&all.iter().flatten().collect::<Vec<_>>(), 0)?, names }, grads))
    }

    /// Compiles what a step launches, side by side: one after another, at their first launches, kernels would take minutes.
    fn prepare(&mut self, optim: &AdamW, feeds: &[Feed], schedule: &Tensor, o: &Optim, observed: bool) -> Result<()> {
        let cuda = Cuda::of(&self.device)?;
        if let Err(e) = cuda.can_record()
            && self.replays
        {
            say(&format!("steps run kernel by kernel: {e}"));
            self.replays = false;
        }
        let step = || self.submit(optim, feeds, schedule, o, observed).map(drop).map_err(|e| engine::Error::invalid("training step", e.to_string()));
        let (kernels, planned) = cuda.plan(step);
        planned?;
        // the plan's memory would lie beside that of the captured step
        cuda.trim();
        let began = Instant::now();
        cuda.prepare(&kernels)?;
        say(&format!("{} kernels are ready after {:.1} s (compiled once, then kept in a cache)", kernels.len(), began.elapsed().as_secs_f64()));
        Ok(())
    }

    fn step_there(&mut self, optim: &AdamW, work: &Step, batch: Batches, observed: Option<&mut Scalars>) -> Result<Stepped> {
        let batches = (0..work.micro).map(batch).collect::<Result<Vec<Batch>>>()?;
        let most = batches.iter().filter_map(|b| b.cu_seqlens.as_ref().map(Vec::len)).max().unwrap_or(0);
        self.bounds = self.bounds.max(most.next_multiple_of(64));
        let feeds = batches.iter().map(|b| self.feed(b)).collect::<Result<Vec<_>>>()?;
        let schedule = AdamW::schedule(work.optim, work.step, work.lr, &self.device)?;
        if !self.prepared {
            self.prepare(optim, &feeds, &schedule, work.optim, observed.is_some())?;
            self.prepared = true;
        }
        let like = |r: &Replayed| r.optim == *work.optim && r.feeds.len() == feeds.len() && r.feeds.iter().zip(&feeds).all(|(a, b)| a.is_like(b));
        if self.replayed.as_ref().is_some_and(|r| !like(r)) {
            self.replayed = None;
        }
        // a captured step reads the copies without asking
        if !optim.copies_hold(&self.net.params()) {
            self.replayed = None;
        }
        let look = observed.is_some();
        let submit = |trained: &Self| trained.submit(optim, &feeds, &schedule, work.optim, look);
        match &self.replayed {
            Some(r) if r.observed == look => {
                r.feeds.iter().zip(&feeds).try_for_each(|(to, from)| to.assign(from))?;
                r.schedule.assign(&schedule)?;
                r.graph.replay()?;
                self.outcome(&r.graph.output, work.micro, None, observed)
            }
            Some(r) => {
                let (outcome, grads) = r.graph.beside(|| submit(self))?;
                self.outcome(&outcome, work.micro, Some(&grads), observed)
            }
            None if !self.replays => {
                let (outcome, grads) = submit(self)?;
                self.outcome(&outcome, work.micro, Some(&grads), observed)
            }
            None => {
                let mut first = None;
                let graph = Graph::capture(&self.device, 1, || {
                    let (outcome, _) = submit(self).map_err(|e| engine::Error::invalid("training step", e.to_string()))?;
                    first.get_or_insert_with(|| outcome.clone());
                    Ok(outcome)
                })?;
                let first = first.ok_or_else(|| Error::Model("a captured step gave nothing".into()))?;
                let done = self.outcome(&first, work.micro, None, observed)?;
                self.replayed = Some(Replayed { observed: look, graph, feeds, schedule, optim: work.optim.clone() });
                Ok(done)
            }
        }
    }

    /// Waits for a step, and reads what came of it.
    fn outcome(&self, outcome: &Outcome, micro: usize, grads: Option<&Grads>, observed: Option<&mut Scalars>) -> Result<Stepped> {
        let numbers = outcome.numbers.to_vec::<f64>()?;
        let (pairs, norm) = (&numbers[..2 * micro], numbers[2 * micro]);
        if let Some(out) = observed {
            out.extend(outcome.names.iter().cloned().zip(numbers[2 * micro + 1..].iter().copied()));
        }
        let losses = pairs.as_chunks::<2>().0.iter().map(|[nll, objective]| if objective.is_finite() { *nll } else { *objective }).collect();
        if norm.is_finite() {
            return Ok(Stepped { losses, grad_norm: Ok(norm) });
        }
        let named = grads.map_or(Ok(None), |g| optim::not_finite(&self.net.params(), g))?;
        Ok(Stepped { losses, grad_norm: Err(named.unwrap_or_else(|| "the gradients are not finite".into())) })
    }
}

impl<N: Network> Learner for Trained<N> {
    fn step(&mut self, work: &Step, batch: Batches, observed: Option<&mut Scalars>) -> Result<Stepped> {
        let optim = match self.optim.take() {
            Some(optim) => optim,
            None => AdamW::new(&self.net.params(), self.net.compute())?,
        };
        let done =
            if self.device == Device::cpu() { self.step_here(&optim, work, batch, observed) } else { self.step_there(&optim, work, batch, observed) };
        self.optim = Some(optim);
        done
    }

    fn nll(&mut self, batches: &[Batch]) -> Result<Vec<f64>> {
        let tokens = |sum: f64, batch: &Batch| sum * batch.asked() as f64;
        let one = |batch: &Batch| engine::no_grad(|| Ok(self.net.loss(&self.feed(batch)?, None)?.nll));
        if self.device == Device::cpu() {
            return batches.par_iter().with_max_len(1).map(|b| Ok(tokens(scalar(&one(b)?)?, b))).collect();
        }
        let sums = batches.iter().map(one).collect::<Result<Vec<Tensor>>>()?;
        let sums = if sums.is_empty() { vec![] } else { numbers(&sums)?.to_vec::<f64>()? };
        Ok(sums.into_iter().zip(batches).map(|(sum, b)| tokens(sum, b)).collect())
    }

    fn answers(&mut self, batches: &[Batch]) -> Result<Vec<Vec<Answer>>> {
        let one = |batch: &Batch| engine::no_grad(|| self.net.answers(&self.feed(batch)?));
        if self.device == Device::cpu() {
            return batches.par_iter().with_max_len(1).map(one).collect();
        }
        batches.iter().map(one).collect()
    }

    fn gates(&mut self, batch: &Batch) -> Result<Vec<Distribution>> {
        let mut seen = Gates::default();
        engine::no_grad(|| self.net.loss(&self.feed(batch)?, Some(&mut seen)))?;
        Ok(seen.0)
    }

    fn sample(&mut self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>> {
        engine::no_grad(|| self.net.generate(prompt, how))
    }

    fn diagnose(&mut self, batch: &Batch, micro: usize) -> Option<String> {
        match self.broken() {
            Err(e) => return Some(format!("looking at the parameters failed: {e}")),
            Ok(Some(name)) => return Some(format!("the parameter `{name}` is not finite")),
            Ok(None) => {}
        }
        let again = || -> Result<Grads> { Ok(share(self.net.loss(&self.feed(batch)?, None)?.objective, micro)?.backward()?) };
        let (done, seen) = engine::watch::watch(|| engine::enable_grad(again));
        let first = [("infinity", seen.infinity), ("NaN", seen.nan)];
        let said: Vec<String> =
            first.iter().filter_map(|(what, origin)| Some(format!("the first {what} came out of {}", origin.as_ref()?))).collect();
        match done {
            Err(e) if said.is_empty() => Some(format!("looking for where it began failed: {e}")),
            _ => (!said.is_empty()).then(|| said.join(", ")),
        }
    }

    fn save(&self, dir: &Path) -> Result<()> {
        // a checkpoint that nothing can go on from must not push out those that something can
        if let Some(name) = self.broken()? {
            return Err(Error::NonFinite(format!("the parameter `{name}` is not finite, and no checkpoint of it is written")));
        }
        self.net.save(dir)?;
        match &self.optim {
            Some(state) => state.save(&dir.join(checkpoint::OPTIMIZER)),
            None => AdamW::new(&self.net.params(), self.net.compute())?.save(&dir.join(checkpoint::OPTIMIZER)),
        }
    }

    fn load(&mut self, dir: &Path) -> Result<()> {
        self.net.load(dir)?;
        let mut state = AdamW::new(&self.net.params(), self.net.compute())?;
        state.load(&dir.join(checkpoint::OPTIMIZER))?;
        (self.optim, self.replayed) = (Some(state), None);
        Ok(())
    }

    fn vocab_size(&self) -> usize {
        self.net.vocab_size()
    }

    fn device_memory(&self) -> Option<(u64, u64)> {
        let s = Cuda::of(&self.device).ok()?.stats();
        Some((s.live as u64, s.peak as u64))
    }

    fn peak_flops(&self) -> Option<f64> {
        let card = Cuda::of(&self.device).ok().filter(|c| !c.is_emulator() && self.net.compute() == DType::BF16)?;
        cuda::peak_bf16(card.model())
    }
}

#[cfg(test)]
#[path = "trained_tests.rs"]
mod tests;
