//! What a person sees of a run: a progress bar on a terminal, plain lines elsewhere. All of it goes to stderr; results go to stdout.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// The numbers of one step.
#[derive(Clone, Copy, Debug)]
pub struct Line {
    /// Steps done.
    pub step: u64,
    /// The part of the budget that is used.
    pub progress: f64,
    /// The loss's exponential mean, nats a token.
    pub loss: f64,
    /// Learning rate.
    pub lr: f64,
    /// Gradient norm before clipping.
    pub grad_norm: f64,
    /// Tokens a second.
    pub tokens_per_s: f64,
    /// Resident memory, bytes.
    pub memory: u64,
    /// Seconds left, by the budget used so far.
    pub eta: f64,
}

impl Line {
    fn text(&self) -> String {
        let bits = self.loss / std::f64::consts::LN_2;
        let (k, mb, eta) = (self.tokens_per_s / 1e3, self.memory >> 20, self.eta.clamp(0.0, 1e9) as u64);
        let Line { lr, grad_norm, .. } = *self;
        format!("loss {bits:.3} bits  lr {lr:.2e}  norm {grad_norm:.2}  {k:.1}k tok/s  {mb} MB  {}:{:02} left", eta / 60, eta % 60)
    }
}

/// The display of a run.
#[derive(Debug)]
pub struct Progress {
    bar: Option<ProgressBar>,
    every: u64,
    last: Instant,
}

impl Progress {
    /// A bar when stderr is a terminal, else lines every `every` steps and at least every ten seconds.
    pub fn new(every: u64) -> Progress {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(10_000);
            if let Ok(style) = ProgressStyle::with_template("{percent:>3}% [{bar:24}] {msg}") {
                bar.set_style(style.progress_chars("=> "));
            }
            bar
        });
        Progress { bar, every, last: Instant::now() }
    }
    /// Shows a step.
    pub fn step(&mut self, line: &Line) {
        if let Some(bar) = &self.bar {
            bar.set_position((line.progress.clamp(0.0, 1.0) * 1e4) as u64);
            bar.set_message(format!("step {}  {}", line.step, line.text()));
        } else if line.step == 1 || (self.every > 0 && line.step.is_multiple_of(self.every)) || self.last.elapsed() > Duration::from_secs(10) {
            self.last = Instant::now();
            self.say(&format!("step {:>6}  {:>5.1}%  {}", line.step, 100.0 * line.progress.min(1.0), line.text()));
        }
    }
    /// Shows a line of text.
    pub fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.println(text),
            // A closed pipe ends nobody's training.
            None => drop(writeln!(std::io::stderr(), "{text}")),
        }
    }
    /// Takes the bar away.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
