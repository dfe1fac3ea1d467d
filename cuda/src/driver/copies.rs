//! Copies from the host: through pinned memory, on a stream of their own, without the host waiting for the compute stream.
//!
//! A copy must not write a block that queued kernels still read. Small uploads get blocks that nothing else uses, and when such a block is dropped an event marks what the
//! compute stream had been given until then (`retire`): the next copy into it waits for that event alone, so a batch lands while the step before it still runs. Any other block
//! may come fresh from the compute stream, where it was allocated or freed in order: a copy into it waits for all that the compute stream was given so far.
//! After each copy the compute stream waits for it, and whatever comes later there, reuse of the block included, is in order.

use super::real::call;
use cudarc::driver::sys::{self, CUresult};
use engine::Result;
use std::collections::HashMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::time::Duration;

/// Bytes of a staging buffer, and how many there may be: the host waits for the oldest copy when all are under way.
const STAGE: usize = 4 << 20;
const STAGES: usize = 16;

/// An event, destroyed when dropped.
pub(super) struct Event(pub sys::CUevent);
// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// One that tells order alone.
    pub fn new() -> Result<Event> {
        Self::with(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING)
    }
    pub fn with(flags: sys::CUevent_flags_enum) -> Result<Event> {
        let mut e = null_mut();
        call!(cuEventCreate(&mut e, flags as u32))?;
        Ok(Event(e))
    }
    /// From now on it stands for what the stream has been given so far.
    pub fn record(&self, stream: sys::CUstream) -> Result<()> {
        call!(cuEventRecord(self.0, stream))
    }
    /// Later work of the stream waits for it.
    pub fn before(&self, stream: sys::CUstream) -> Result<()> {
        call!(cuStreamWaitEvent(stream, self.0, 0))
    }
    fn ready(&self) -> Result<bool> {
        // SAFETY: the handle lives.
        match unsafe { sys::cuEventQuery(self.0) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            r => super::real::check(r, || "cuEventQuery".into()).map(|()| true),
        }
    }
    /// Time between two events that have come.
    pub fn since(&self, from: &Event) -> Result<Duration> {
        let mut ms = 0f32;
        call!(cuEventElapsedTime_v2(&mut ms, from.0, self.0))?;
        Ok(Duration::from_secs_f64(ms as f64 / 1e3))
    }
    /// The host waits.
    pub fn wait(&self) -> Result<()> {
        call!(cuEventSynchronize(self.0))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = call!(cuEventDestroy_v2(self.0));
    }
}

/// Pinned memory, and when its last copy has ended.
struct Stage {
    at: *mut c_void,
    done: Event,
}

pub(super) struct Copies {
    stream: sys::CUstream,
    stages: Vec<Stage>,
    /// The stage whose copy is the oldest.
    oldest: usize,
    /// By address: when blocks that were dropped may be written.
    retired: HashMap<u64, Event>,
    spare: Vec<Event>,
}
// SAFETY: addresses and handles of the driver may be used from any thread.
unsafe impl Send for Copies {}

impl Copies {
    pub fn new() -> Result<Copies> {
        let mut stream = null_mut();
        call!(cuStreamCreate(&mut stream, sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32))?;
        Ok(Copies { stream, stages: vec![], oldest: 0, retired: HashMap::new(), spare: vec![] })
    }
    fn spare(&mut self) -> Result<Event> {
        self.spare.pop().map_or_else(Event::new, Ok)
    }
    /// A block that was uploaded to is dropped.
    pub fn retire(&mut self, at: u64, compute: sys::CUstream) -> Result<()> {
        let e = self.spare()?;
        e.record(compute)?;
        self.retired.insert(at, e);
        Ok(())
    }
    /// A block goes back to the system.
    pub fn forget(&mut self, at: u64) {
        self.spare.extend(self.retired.remove(&at));
    }
    pub fn upload(&mut self, src: &[u8], dst: u64, compute: sys::CUstream) -> Result<()> {
        let may_write = match self.retired.remove(&dst) {
            Some(e) => e,
            None => {
                let e = self.spare()?;
                e.record(compute)?;
                e
            }
        };
        may_write.before(self.stream)?;
        // a stream waits for what the event stands for now, so it can be used again
        self.spare.push(may_write);
        let copied = src.chunks(STAGE).enumerate().try_for_each(|(i, part)| self.part(part, dst + (i * STAGE) as u64));
        // also where a part failed: the block goes back to be used by the compute stream
        let landed = self.spare()?;
        landed.record(self.stream)?;
        landed.before(compute)?;
        self.spare.push(landed);
        copied
    }
    fn part(&mut self, part: &[u8], dst: u64) -> Result<()> {
        let stage = self.stage()?;
        // SAFETY: a stage has STAGE bytes, and its last copy has ended.
        unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), stage.at.cast(), part.len()) };
        let (at, stream) = (stage.at, self.stream);
        call!(cuMemcpyHtoDAsync_v2(dst, at, part.len(), stream))?;
        self.stages[self.oldest].done.record(stream)?;
        self.oldest = (self.oldest + 1) % self.stages.len();
        Ok(())
    }
    /// The stage at `oldest`, which is free.
    fn stage(&mut self) -> Result<&Stage> {
        // copies end in the order in which they began
        let free = match self.stages.get(self.oldest) {
            Some(s) => s.done.ready()?,
            None => false,
        };
        if !free && self.stages.len() < STAGES {
            let mut at = null_mut();
            call!(cuMemHostAlloc(&mut at, STAGE, 0))?;
            self.stages.insert(self.oldest, Stage { at, done: Event::new()? });
        }
        let stage = &self.stages[self.oldest];
        stage.done.wait()?;
        Ok(stage)
    }
}
