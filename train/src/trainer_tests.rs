//! The loop, driven by a bigram table with plain AdamW: small enough to check everything bit for bit.

use super::*;
use crate::checkpoint::{candidates, checkpoints};
use crate::presets;
use crate::schedule::Shape;
use std::fs;

struct Bigram {
    w: Vec<f32>,
    g: Vec<f32>,
    m: Vec<f32>,
    v: Vec<f32>,
    poison: Option<u64>,
    dies: Option<u64>,
    updates: u64,
}

const V: usize = 128;

impl Bigram {
    fn new() -> Bigram {
        Bigram { w: vec![0.0; V * V], g: vec![0.0; V * V], m: vec![0.0; V * V], v: vec![0.0; V * V], poison: None, dies: None, updates: 0 }
    }
    fn pass(&mut self, b: &Batch, weight: Option<f64>) -> f64 {
        let mut sum = 0.0;
        for (&x, &y) in b.tokens.iter().zip(&b.targets) {
            let row = &self.w[x as usize * V..][..V];
            let z: f64 = row.iter().map(|&w| f64::from(w).exp()).sum();
            sum += z.ln() - f64::from(row[y as usize]);
            if let Some(weight) = weight {
                let scale = weight / b.tokens.len() as f64;
                for j in 0..V {
                    let p = f64::from(self.w[x as usize * V + j]).exp() / z;
                    self.g[x as usize * V + j] += ((p - f64::from(u8::from(j == y as usize))) * scale) as f32;
                }
            }
        }
        sum
    }
}

impl Learner for Bigram {
    fn step(&mut self, work: &Step, batch: Batches, observed: Option<&mut Scalars>) -> Result<Stepped> {
        if let Some(o) = observed {
            o.insert("blocks.0.mean".into(), f64::from(self.w[0]));
        }
        let Step { step, micro, lr, optim: o } = *work;
        let one = |i: usize| {
            let b = batch(i)?;
            let sum = self.pass(&b, Some(1.0 / micro as f64));
            Ok(if self.poison == Some(self.updates) { f64::NAN } else { sum / b.tokens.len() as f64 })
        };
        let losses: Vec<f64> = (0..micro).map(one).collect::<Result<_>>()?;
        if losses.iter().any(|l| !l.is_finite()) {
            return Ok(Stepped { losses, grad_norm: Err("a loss is not finite".into()) });
        }
        assert_eq!(step, self.updates + 1);
        if self.dies == Some(step) {
            return Err(Error::Model("killed".into()));
        }
        self.updates = step;
        let norm = self.g.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let (c1, c2) = (1.0 - o.beta1.powi(step as i32), 1.0 - o.beta2.powi(step as i32));
        for i in 0..self.w.len() {
            let g = f64::from(self.g[i]);
            self.m[i] = (o.beta1 * f64::from(self.m[i]) + (1.0 - o.beta1) * g) as f32;
            self.v[i] = (o.beta2 * f64::from(self.v[i]) + (1.0 - o.beta2) * g * g) as f32;
            self.w[i] -= (lr * f64::from(self.m[i]) / c1 / ((f64::from(self.v[i]) / c2).sqrt() + o.eps)) as f32;
        }
        self.g.fill(0.0);
        Ok(Stepped { losses, grad_norm: Ok(norm) })
    }
    fn nll(&mut self, batches: &[Batch]) -> Result<Vec<f64>> {
        Ok(batches.iter().map(|b| self.pass(b, None)).collect())
    }
    fn sample(&mut self, prompt: &[u32], how: &Sampling) -> Result<Vec<u32>> {
        let mut x = *prompt.last().unwrap() as usize;
        Ok((0..how.tokens)
            .map(|_| {
                let row = &self.w[x * V..][..V];
                x = (0..V).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
                x as u32
            })
            .collect())
    }
    fn diagnose(&mut self, _: &Batch, micro: usize) -> Option<String> {
        assert_eq!(micro, 2);
        Some("first in `blocks.0.mixer.out`".into())
    }
    fn save(&self, dir: &Path) -> Result<()> {
        let bytes: Vec<u8> = [&self.w, &self.m, &self.v].iter().flat_map(|v| v.iter().flat_map(|x| x.to_le_bytes())).collect();
        let p = dir.join("model.safetensors");
        fs::write(&p, bytes).map_err(Error::io("writing", &p))
    }
    fn load(&mut self, dir: &Path) -> Result<()> {
        let bytes = fs::read(dir.join("model.safetensors")).unwrap();
        let all: Vec<f32> = bytes.chunks_exact(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
        self.w.copy_from_slice(&all[..V * V]);
        self.m.copy_from_slice(&all[V * V..2 * V * V]);
        self.v.copy_from_slice(&all[2 * V * V..]);
        self.updates = read_state(dir)?.step;
        Ok(())
    }
    fn vocab_size(&self) -> usize {
        V
    }
}

fn corpus() -> Corpus {
    Corpus::from_documents(&["The whale rolled; and the sea rolled on as it rolled five thousand years ago. ".repeat(40)])
}
fn config(steps: u64) -> RunConfig {
    let mut c = presets::smoke();
    c.train.steps = Some(steps);
    c.train.accumulate = 2;
    c.checkpoint.every = 4;
    c.data.seq_len = 32;
    c.optim.lr = 0.05;
    c.sample.prompt = "T".into();
    c
}
/// Goes on from a run folder's newest checkpoint.
fn resume(b: &mut Bigram, c: &RunConfig, run: &RunDir) -> Summary {
    let state = load(b, &candidates(run.path()).unwrap()[0]).unwrap();
    train(b, &corpus(), c, run, Some(state)).unwrap()
}
/// Metrics without what depends on the clock and the machine.
fn metrics(run: &Path) -> Vec<String> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines()
        .map(|l| {
            let mut v: serde_json::Value = serde_json::from_str(l).unwrap();
            let o = v.as_object_mut().unwrap();
            ["tokens_per_s", "seconds", "memory", "memory_peak"].iter().for_each(|k| drop(o.remove(*k)));
            v.to_string()
        })
        .collect()
}

#[test]
fn learns_and_writes_everything() {
    let tmp = tempfile::tempdir().unwrap();
    let run = RunDir::open(&tmp.path().join("run"), false).unwrap();
    let s = train(&mut Bigram::new(), &corpus(), &config(30), &run, None).unwrap();
    assert_eq!((s.state.step, s.state.tokens), (30, 30 * 2 * 4 * 32));
    assert!(s.held_out.unwrap() < 6.0, "{s:?}");
    assert_eq!(s.scored, corpus().len() - corpus().len() * 9 / 10);
    let lines = metrics(run.path());
    assert_eq!(lines.iter().filter(|l| l.contains("\"loss\"")).count(), 30);
    assert_eq!(lines.iter().filter(|l| l.contains("held_out_bits")).count(), 2);
    assert_eq!(lines.iter().filter(|l| l.contains("\"sample\"")).count(), 1);
    assert!(lines[0].contains("blocks.0.mean"));
    let steps: Vec<u64> = checkpoints(run.path()).unwrap().iter().map(|c| c.0).collect();
    assert_eq!(steps, [28, 30]);
}

#[test]
fn resumed_equals_uninterrupted_bit_for_bit() {
    let tmp = tempfile::tempdir().unwrap();
    let whole = RunDir::open(&tmp.path().join("whole"), false).unwrap();
    let mut a = Bigram::new();
    let sa = train(&mut a, &corpus(), &config(23), &whole, None).unwrap();
    // Killed in the middle of step 15, after metrics of steps past the checkpoint of step 12 were written.
    let cut = RunDir::open(&tmp.path().join("cut"), false).unwrap();
    let mut dying = Bigram { dies: Some(15), ..Bigram::new() };
    train(&mut dying, &corpus(), &config(23), &cut, None).unwrap_err();
    assert_eq!(metrics(cut.path()).len(), 14);
    let mut b = Bigram::new();
    let sb = resume(&mut b, &config(23), &cut);
    assert!(a.w.iter().zip(&b.w).all(|(x, y)| x.to_bits() == y.to_bits()));
    assert_eq!(metrics(whole.path()), metrics(cut.path()));
    assert_eq!(sa.held_out.unwrap().to_bits(), sb.held_out.unwrap().to_bits());
    // A finished run that is resumed does nothing but its closing evaluation.
    let sc = resume(&mut Bigram::new(), &config(23), &cut);
    assert_eq!((sc.state.step, sc.held_out), (23, sb.held_out));
    assert_eq!(metrics(whole.path()), metrics(cut.path()));
}

#[test]
fn budgets() {
    let tmp = tempfile::tempdir().unwrap();
    let mut c = config(1);
    c.train.steps = None;
    c.train.tokens = Some(1000);
    let run = RunDir::open(&tmp.path().join("tokens"), false).unwrap();
    let s = train(&mut Bigram::new(), &corpus(), &c, &run, None).unwrap();
    assert_eq!(s.state.step, 4, "256 tokens a step");
    c.train.tokens = None;
    c.train.minutes = Some(0.01);
    let run = RunDir::open(&tmp.path().join("minutes"), false).unwrap();
    let s = train(&mut Bigram::new(), &corpus(), &c, &run, None).unwrap();
    assert!(s.state.seconds >= 0.6 && s.state.seconds < 10.0, "{s:?}");
    // Time used before a resume counts.
    let again = resume(&mut Bigram::new(), &c, &run);
    assert_eq!(again.state.step, s.state.step);
}

#[test]
fn going_back_to_an_older_checkpoint_keeps_the_new_result_and_loses_no_old_one() {
    let tmp = tempfile::tempdir().unwrap();
    let run = RunDir::open(&tmp.path().join("run"), false).unwrap();
    let mut c = config(8);
    (c.checkpoint.every, c.checkpoint.keep) = (2, 9);
    train(&mut Bigram::new(), &corpus(), &c, &run, None).unwrap();
    let mut b = Bigram::new();
    let state = load(&mut b, &run.path().join("checkpoints/step-00000002")).unwrap();
    (c.train.steps, c.checkpoint.keep, c.optim.lr) = (Some(5), 2, 1e-4);
    train(&mut b, &corpus(), &c, &run, Some(state)).unwrap();
    let steps: Vec<u64> = checkpoints(run.path()).unwrap().iter().map(|c| c.0).collect();
    assert_eq!(steps, [4, 5]);
    let mut newest = Bigram::new();
    newest.load(&candidates(run.path()).unwrap()[0]).unwrap();
    assert!(newest.w == b.w);
    for step in [4, 6, 8] {
        assert!(run.path().join(format!("checkpoints/.old-step-{step:08}")).is_dir(), "{step}");
    }
}

#[test]
fn stops_when_not_finite_and_when_tokens_do_not_fit() {
    let tmp = tempfile::tempdir().unwrap();
    let run = RunDir::open(&tmp.path().join("nan"), false).unwrap();
    let e = train(&mut Bigram { poison: Some(5), ..Bigram::new() }, &corpus(), &config(9), &run, None).unwrap_err();
    let m = e.to_string();
    assert!(e.exit_code() == 1 && m.contains("step 6") && m.contains("NaN") && m.contains("blocks.0.mixer.out"), "{m}");
    let last = metrics(run.path()).pop().unwrap();
    assert!(last.contains("\"step\":6") && last.contains("\"loss\":null") && last.contains("\"stopped\":\"step 6"), "{last}");
    let run = RunDir::open(&tmp.path().join("big"), false).unwrap();
    let odd = Corpus::from_documents(&["é".repeat(500)]);
    let m = train(&mut Bigram::new(), &odd, &config(9), &run, None).unwrap_err().to_string();
    assert!(m.contains("vocabulary of 128"), "{m}");
}

#[test]
fn a_budget_in_minutes_goes_on_where_the_clock_stood() {
    for shape in [Shape::Cosine, Shape::Wsd, Shape::Linear] {
        let tmp = tempfile::tempdir().unwrap();
        let run = RunDir::open(tmp.path(), false).unwrap();
        let mut c = config(1);
        (c.train.steps, c.train.minutes, c.eval.every, c.sample.count, c.optim.schedule) = (None, Some(10.0), 0, 0, shape);
        // all but half a second of ten minutes is used
        let state = State { step: 12, tokens: 12 * 256, seconds: 599.5, ..State::default() };
        let mut b = Bigram { updates: 12, ..Bigram::new() };
        let s = train(&mut b, &corpus(), &c, &run, Some(state)).unwrap();
        assert!(s.state.step > 12 && s.state.seconds >= 600.0, "{s:?}");
        let text = fs::read_to_string(run.path().join("metrics.jsonl")).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let end = c.optim.lr * c.optim.end;
        for l in lines.iter().filter(|l| l["loss"].is_number()) {
            assert!(l["seconds"].as_f64().unwrap() >= 599.5);
            let lr = l["lr"].as_f64().unwrap();
            assert!(lr >= end && lr < 1.2 * end, "{shape:?}: the schedule is at its end: {lr}");
        }
    }
}
