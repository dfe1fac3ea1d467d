//! A training step captured once and replayed: the launches of thousands of kernels become one.

use crate::Cuda;
use crate::driver::Recorded;
use crate::memory::Arena;
use engine::{Device, Error, Result};

/// A captured function. Its tensors lie in memory of its own, at the same addresses on each replay.
pub struct Graph<R> {
    // dropped first: a replay may still be under way
    recorded: Box<dyn Recorded>,
    cuda: Cuda,
    /// What the function returned when it was captured; tensors in it hold values once [`Graph::replay`] has run.
    pub output: R,
    arena: Arena,
}

impl<R> Graph<R> {
    /// Runs `step` `warm_up` times (at least once, so that kernels are compiled and memory is there), then captures it: the capture itself computes
    /// nothing, and every replay does what one more call would.
    ///
    /// What changes from step to step must be read from device memory: a number that `step` takes from the host is the same in every replay. Tensors
    /// that `step` reads must outlive the graph. While it is captured, no other thread may use the device. An op that waits for the device
    /// (`item`, `to_vec`, a copy to the CPU), and an upload (`from_slice`, `to_device`), is an error that says which op ran last before it.
    pub fn capture(device: &Device, warm_up: usize, mut step: impl FnMut() -> Result<R>) -> Result<Graph<R>> {
        let cuda = Cuda::of(device)?.clone();
        cuda.can_record()?;
        cuda.memory().begin_arena();
        let run = |cuda: &Cuda, step: &mut dyn FnMut() -> Result<R>| -> Result<(R, Box<dyn Recorded>)> {
            for _ in 0..warm_up.max(1) {
                step()?;
            }
            cuda.driver().synchronize()?;
            cuda.memory().keep_dropped();
            cuda.driver().begin_recording()?;
            let open = Open(cuda);
            let output = step();
            std::mem::forget(open);
            let recorded = cuda.driver().end_recording();
            let output = output.map_err(|e| match Cuda::last_op() {
                Some(op) => Error::invalid("cuda graph", format!("after `{op}`: {e}")),
                None => e,
            })?;
            Ok((output, recorded?))
        };
        let abandoned = Abandoned(&cuda);
        let r = run(&cuda, &mut step);
        std::mem::forget(abandoned);
        let arena = cuda.memory().end_arena();
        let (output, recorded) = r?;
        Ok(Graph { recorded, cuda, output, arena })
    }
    /// Submits the captured work once more.
    pub fn replay(&self) -> Result<()> {
        self.cuda.planned().refuse("a replay")?;
        self.recorded.replay()
    }
    /// Runs `f`, not recorded, in the graph's memory, which lies idle between replays: a step that is not like the captured one needs no room of its own.
    /// The next replay overwrites what `f` allocates.
    pub fn beside<T>(&self, f: impl FnOnce() -> T) -> T {
        self.cuda.memory().enter(&self.arena);
        let _leave = Leave(&self.cuda);
        f()
    }
    /// How many kernels and copies it holds.
    pub fn nodes(&self) -> usize {
        self.recorded.len()
    }
    /// Where it runs.
    pub fn cuda(&self) -> &Cuda {
        &self.cuda
    }
}

/// Back to the memory of all, also after a panic.
struct Leave<'a>(&'a Cuda);
impl Drop for Leave<'_> {
    fn drop(&mut self) {
        self.0.memory().leave();
    }
}

/// A graph whose step panicked: its memory goes back.
struct Abandoned<'a>(&'a Cuda);
impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        drop(self.0.memory().end_arena());
    }
}

/// A recording under way: a step that panics must not leave the device recording.
struct Open<'a>(&'a Cuda);
impl Drop for Open<'_> {
    fn drop(&mut self) {
        drop(self.0.driver().end_recording());
    }
}
