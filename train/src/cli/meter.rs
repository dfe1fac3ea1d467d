//! How far a pass over the input is: a bar on a terminal, a line every ten seconds elsewhere.

use crate::progress::say;
use indicatif::{ProgressBar, ProgressStyle};
use std::sync::Mutex;
use std::time::{Duration, Instant};

pub(super) struct Meter {
    bar: ProgressBar,
    what: &'static str,
    began: Instant,
    /// When a line was last said, and how much was done before this process.
    state: Mutex<(Instant, u64)>,
}

impl Meter {
    /// Of a pass over `total` bytes, `done` of which are done.
    pub fn new(what: &'static str, total: u64, done: u64) -> Meter {
        let bar = ProgressBar::new(total);
        if let Ok(style) = ProgressStyle::with_template("{prefix} {percent:>3}% [{bar:16}] {bytes}/{total_bytes}  {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(what);
        bar.set_position(done);
        Meter { bar, what, began: Instant::now(), state: Mutex::new((Instant::now(), done)) }
    }
    /// `bytes` more are done.
    pub fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
        let mut state = self.state.lock().unwrap_or_else(|e| e.into_inner());
        let (done, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        let rate = done.saturating_sub(state.1) as f64 / self.began.elapsed().as_secs_f64().max(1e-3);
        let left = (total.saturating_sub(done) as f64 / rate.max(1.0)) as u64;
        let rest = format!("{:.1} MB/s  {}:{:02} left", rate / 1e6, left / 60, left % 60);
        if self.bar.is_hidden() && state.0.elapsed() >= Duration::from_secs(10) {
            state.0 = Instant::now();
            say(&format!(
                "{} {:>5.1}%  {:.1} of {:.1} MB  {rest}",
                self.what,
                100.0 * done as f64 / total.max(1) as f64,
                done as f64 / 1e6,
                total as f64 / 1e6
            ));
        }
        self.bar.set_message(rest);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
