//! What a person sees of a run: a progress bar on a terminal, plain lines elsewhere. All of it goes to stderr; results go to stdout.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
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

/// A line for the person who watches, on stderr. A closed pipe ends nobody's training.
pub fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The display of a run.
pub struct Progress {
    show: Show,
    every: u64,
    last: Instant,
}

enum Show {
    Bar(ProgressBar),
    Lines(Box<dyn Write>),
}

impl Progress {
    /// On stderr: a bar when it is a terminal, else lines every `every` steps and at least every ten seconds.
    pub fn new(every: u64) -> Progress {
        let stderr = std::io::stderr();
        if stderr.is_terminal() { Progress::bar(ProgressDrawTarget::stderr(), every) } else { Progress::lines(Box::new(stderr), every) }
    }
    fn bar(target: ProgressDrawTarget, every: u64) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(10_000), target);
        if let Ok(style) = ProgressStyle::with_template("{percent:>3}% [{bar:24}] {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        Progress { show: Show::Bar(bar), every, last: Instant::now() }
    }
    fn lines(to: Box<dyn Write>, every: u64) -> Progress {
        Progress { show: Show::Lines(to), every, last: Instant::now() }
    }
    /// Shows a step.
    pub fn step(&mut self, line: &Line) {
        if let Show::Bar(bar) = &self.show {
            bar.set_position((line.progress.clamp(0.0, 1.0) * 1e4) as u64);
            bar.set_message(format!("step {}  {}", line.step, line.text()));
        } else if line.step == 1 || (self.every > 0 && line.step.is_multiple_of(self.every)) || self.last.elapsed() > Duration::from_secs(10) {
            self.last = Instant::now();
            self.say(&format!("step {:>6}  {:>5.1}%  {}", line.step, 100.0 * line.progress.min(1.0), line.text()));
        }
    }
    /// Shows a line of text.
    pub fn say(&mut self, text: &str) {
        match &mut self.show {
            Show::Bar(bar) => bar.println(text),
            Show::Lines(to) => drop(writeln!(to, "{text}")),
        }
    }
    /// Takes the bar away.
    pub fn finish(&self) {
        if let Show::Bar(bar) = &self.show {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Result;
    use std::sync::{Arc, Mutex};

    /// What was written, to look at; also a terminal that has no cursor.
    #[derive(Clone, Debug, Default)]
    struct Page(Arc<Mutex<Vec<u8>>>);
    impl Page {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }
    impl Write for Page {
        fn write(&mut self, b: &[u8]) -> Result<usize> {
            self.0.lock().unwrap().write(b)
        }
        fn flush(&mut self) -> Result<()> {
            Ok(())
        }
    }
    impl indicatif::TermLike for Page {
        fn width(&self) -> u16 {
            120
        }
        fn move_cursor_up(&self, _: usize) -> Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> Result<()> {
            Ok(())
        }
        fn write_line(&self, s: &str) -> Result<()> {
            writeln!(self.0.lock().unwrap(), "{s}")
        }
        fn write_str(&self, s: &str) -> Result<()> {
            write!(self.0.lock().unwrap(), "{s}")
        }
        fn clear_line(&self) -> Result<()> {
            writeln!(self.0.lock().unwrap())
        }
        fn flush(&self) -> Result<()> {
            Ok(())
        }
    }
    /// Ten steps, and a line of text after the fifth.
    fn ten(mut p: Progress) {
        for step in 1..=10u64 {
            let part = step as f64 / 10.0;
            p.step(&Line { step, progress: part, loss: 0.7, lr: 1e-3, grad_norm: 1.0, tokens_per_s: 2e3, memory: 5 << 20, eta: 61.0 });
            if step == 5 {
                p.say("a sample");
            }
        }
        p.finish();
    }

    #[test]
    fn lines_where_there_is_no_terminal() {
        let page = Page::default();
        ten(Progress::lines(Box::new(page.clone()), 4));
        let text = page.text();
        let firsts: Vec<String> = text.lines().map(|l| l.split_whitespace().take(2).collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(firsts, ["step 1", "step 4", "a sample", "step 8"], "{text}");
        assert!(text.contains("step      8   80.0%  loss 1.010 bits  lr 1.00e-3  norm 1.00  2.0k tok/s  5 MB  1:01 left"), "{text}");
        assert!(!text.contains(['\x1b', '\r']));
    }

    #[test]
    fn a_bar_on_a_terminal() {
        let page = Page::default();
        ten(Progress::bar(ProgressDrawTarget::term_like(Box::new(page.clone())), 4));
        let text = page.text();
        for words in [" 50% [============>", "step 5  loss 1.010 bits", "a sample", "100% ["] {
            assert!(text.contains(words), "{words} in {text}");
        }
    }
}
