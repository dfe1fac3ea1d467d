//! Where the time goes: kernels' wall time by op name, over all threads that run ops.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard};
use std::time::{Duration, Instant};

static ON: AtomicBool = AtomicBool::new(false);
static STATE: LazyLock<Mutex<(Instant, HashMap<&'static str, (u64, Duration)>)>> = LazyLock::new(|| Mutex::new((Instant::now(), HashMap::new())));

fn state() -> MutexGuard<'static, (Instant, HashMap<&'static str, (u64, Duration)>)> {
    STATE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Begins to count, from zero.
pub fn start() {
    *state() = (Instant::now(), HashMap::new());
    ON.store(true, Ordering::Relaxed);
}

/// Stops counting and gives what was counted since [`start`].
pub fn stop() -> Profile {
    ON.store(false, Ordering::Relaxed);
    let (began, ops) = std::mem::replace(&mut *state(), (Instant::now(), HashMap::new()));
    let mut rows: Vec<Row> = ops.into_iter().map(|(op, (calls, time))| Row { op, calls, time }).collect();
    rows.sort_by_key(|r| std::cmp::Reverse((r.time, r.op)));
    Profile { wall: began.elapsed(), rows }
}

/// Runs a kernel, timed if anybody asked.
pub(crate) fn timed<R>(op: &'static str, f: impl FnOnce() -> R) -> R {
    if !ON.load(Ordering::Relaxed) {
        return f();
    }
    let t = Instant::now();
    let r = f();
    let took = t.elapsed();
    let mut state = state();
    let (calls, time) = state.1.entry(op).or_default();
    *calls += 1;
    *time += took;
    drop(state);
    r
}

/// One op's share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The op's name.
    pub op: &'static str,
    /// How often its kernel ran.
    pub calls: u64,
    /// Wall time inside the kernel.
    pub time: Duration,
}

/// What [`stop`] gives: rows by falling time. On a device that runs on its own, times are those of launches.
#[derive(Clone, Debug)]
pub struct Profile {
    /// From [`start`] to [`stop`].
    pub wall: Duration,
    /// Kernels.
    pub rows: Vec<Row>,
}

impl Profile {
    /// The part of the wall time that kernels of these ops took.
    pub fn share(&self, ops: impl Fn(&str) -> bool) -> f64 {
        let t: Duration = self.rows.iter().filter(|r| ops(r.op)).map(|r| r.time).sum();
        t.as_secs_f64() / self.wall.as_secs_f64().max(1e-12)
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<32}{:>9}{:>12}{:>9}", "op", "calls", "ms", "share")?;
        let mut line = |op: &str, calls: String, t: Duration| {
            writeln!(f, "{op:<32}{calls:>9}{:>12.1}{:>8.1}%", t.as_secs_f64() * 1e3, 100.0 * t.as_secs_f64() / self.wall.as_secs_f64().max(1e-12))
        };
        for r in &self.rows {
            line(r.op, r.calls.to_string(), r.time)?;
        }
        let inside: Duration = self.rows.iter().map(|r| r.time).sum();
        line("outside kernels", String::new(), self.wall.saturating_sub(inside))?;
        line("all", String::new(), self.wall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_counted_between_start_and_stop() {
        start();
        timed("a test's op", || std::thread::sleep(Duration::from_millis(5)));
        timed("a test's op", || ());
        let p = stop();
        timed("a test's op", || ());
        let row = p.rows.iter().find(|r| r.op == "a test's op").unwrap();
        assert!(row.calls == 2 && row.time >= Duration::from_millis(5) && row.time <= p.wall);
        assert!(p.share(|n| n == "a test's op") > 0.0 && p.to_string().contains("outside kernels"));
    }
}
