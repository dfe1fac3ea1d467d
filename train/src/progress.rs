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
    /// Model-FLOP utilisation: the part of the device's peak that the model's own operations are, where the peak is known.
    pub mfu: Option<f64>,
    /// Memory, bytes: what is resident, or on a GPU the most that tensors held.
    pub memory: u64,
    /// Seconds left, by the budget used so far.
    pub eta: f64,
}

impl Line {
    fn left(&self) -> String {
        let eta = self.eta.clamp(0.0, 1e9) as u64;
        format!("{}:{:02} left", eta / 60, eta % 60)
    }
    fn rate(&self) -> String {
        let mfu = self.mfu.map_or(String::new(), |m| format!(" ({:.1}% MFU)", 100.0 * m));
        format!("{:.1}k tok/s{mfu}", self.tokens_per_s / 1e3)
    }
    /// What changes most, first: a narrow terminal cuts off the rest.
    fn for_bar(&self) -> String {
        let Line { step, loss, lr, grad_norm, memory, .. } = *self;
        let (bits, rate, mb, left) = (loss / std::f64::consts::LN_2, self.rate(), memory >> 20, self.left());
        format!("step {step}  loss {bits:.3} bits  {rate}  {left}  lr {lr:.2e}  norm {grad_norm:.2}  {mb} MB")
    }
    fn text(&self) -> String {
        let Line { loss, lr, grad_norm, memory, .. } = *self;
        let (bits, rate, mb, left) = (loss / std::f64::consts::LN_2, self.rate(), memory >> 20, self.left());
        format!("loss {bits:.3} bits  lr {lr:.2e}  norm {grad_norm:.2}  {rate}  {mb} MB  {left}")
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
    /// On stderr: a bar when it is a terminal that can draw one, else lines every `every` steps and at least every ten seconds.
    pub fn new(every: u64) -> Progress {
        Progress::on(std::io::stderr().is_terminal(), ProgressDrawTarget::stderr(), Box::new(std::io::stderr()), every)
    }
    /// A target is hidden where it is no terminal, and on one that has no cursor (`TERM=dumb`).
    fn on(terminal: bool, target: ProgressDrawTarget, lines: Box<dyn Write>, every: u64) -> Progress {
        if terminal && !target.is_hidden() { Progress::bar(target, every) } else { Progress::lines(lines, every) }
    }
    fn bar(target: ProgressDrawTarget, every: u64) -> Progress {
        let bar = ProgressBar::with_draw_target(Some(10_000), target);
        if let Ok(style) = ProgressStyle::with_template("{percent:>3}% [{bar:16}] {wide_msg}") {
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
            bar.set_message(line.for_bar());
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
            80
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
            p.step(&Line { step, progress: part, loss: 0.7, lr: 1e-3, grad_norm: 1.0, tokens_per_s: 2e3, mfu: None, memory: 5 << 20, eta: 61.0 });
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
    fn lines_on_a_terminal_that_can_draw_no_bar() {
        let page = Page::default();
        ten(Progress::on(true, ProgressDrawTarget::hidden(), Box::new(page.clone()), 4));
        assert!(page.text().starts_with("step      1") && page.text().contains("\na sample\n"), "{}", page.text());
        let drawn = ProgressDrawTarget::term_like(Box::new(page.clone()));
        assert!(matches!(Progress::on(true, drawn, Box::new(page.clone()), 4).show, Show::Bar(_)));
    }

    #[test]
    fn a_bar_on_a_terminal() {
        let page = Page::default();
        ten(Progress::bar(ProgressDrawTarget::term_like(Box::new(page.clone())), 4));
        let text = page.text();
        for words in [" 50% [========>       ] step 5  loss 1.010 bits  2.0k tok/s  1:01 left", "a sample", "100% ["] {
            assert!(text.contains(words), "{words} in {text}");
        }
        let mut bars = text.lines().filter(|l| !l.starts_with("a sample"));
        assert!(bars.all(|l| l.chars().count() <= 80), "no line is wider than the terminal: {text}");
    }
}
