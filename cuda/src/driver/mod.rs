//! What the runtime needs of a device: two bodies, the CUDA driver and the emulator.

pub(crate) mod blas;
mod copies;
pub(crate) mod emulated;
pub(crate) mod real;

use crate::compile::{Binary, Target};
use crate::{Gemm, Kernel};
use engine::{Error, Result};
use std::path::Path;
use std::time::Duration;

/// A kernel that can be launched.
#[derive(Clone, Copy)]
pub(crate) struct Function(pub usize);

/// A launch's grid, block and shared memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub grid: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

/// What a recording refuses.
fn waits(what: &str) -> Error {
    Error::invalid("cuda graph", format!("{what} waits for the device"))
}
fn uploads(bytes: usize) -> Error {
    let how = "a replay would copy the same bytes again; make the tensor before the capture, and assign() new values to it between replays";
    Error::invalid("cuda graph", format!("an upload of {bytes} bytes from the host: {how}"))
}

/// Commands that were recorded instead of run.
pub(crate) trait Recorded: Send + Sync {
    fn replay(&self) -> Result<()>;
    /// How many kernels and copies it holds.
    fn len(&self) -> usize;
}

/// Work is carried out in the order in which it is submitted: there is one compute stream.
pub(crate) trait Driver: Send + Sync {
    fn name(&self) -> String;
    fn target(&self) -> Target;
    /// Compute capability times ten.
    fn arch(&self) -> u32;
    /// Multiprocessors.
    fn processors(&self) -> u32;
    /// Dynamic shared memory that a block can have, in bytes.
    fn shared_limit(&self) -> u32;
    /// Free and total memory in bytes.
    fn memory(&self) -> Result<(usize, usize)>;
    /// None when there is not as much.
    fn alloc(&self, bytes: usize) -> Result<Option<u64>>;
    fn free(&self, at: u64, bytes: usize);
    /// Gives freed memory back to the system.
    fn trim(&self);
    /// Copies from the host into a fresh block beside the compute stream, which waits for it; returns as soon as `src` was read.
    fn upload(&self, src: &[u8], dst: u64) -> Result<()>;
    /// A block that is kept for uploads was dropped: the next upload into it waits for what was submitted up to now, and for nothing else.
    fn retire(&self, at: u64);
    fn download(&self, src: u64, dst: &mut [u8]) -> Result<()>;
    /// Writes an element (1, 2, 4 or 8 bytes) so many times.
    fn fill(&self, dst: u64, element: &[u8], count: usize) -> Result<()>;
    fn copy(&self, src: u64, dst: u64, bytes: usize) -> Result<()>;
    /// Loads code, which also lies in a file if there is a cache; checks that the kernel takes `params` bytes.
    fn load(&self, k: &Kernel, code: &Binary, file: Option<&Path>, params: usize) -> Result<Function>;
    fn launch(&self, k: &Kernel, f: Function, shape: Shape, params: &[u8]) -> Result<()>;
    fn gemm(&self, g: &Gemm) -> Result<()>;
    fn synchronize(&self) -> Result<()>;
    /// The device's time between the calls of `start` and the returned function.
    fn timer(&self) -> Result<Box<dyn FnOnce() -> Result<Duration> + '_>>;
    fn begin_recording(&self) -> Result<()>;
    fn end_recording(&self) -> Result<Box<dyn Recorded>>;
}
