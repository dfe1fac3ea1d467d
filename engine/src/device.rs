//! Devices: memory and ordering only. A backend has no op methods, so it never grows with the ops.

use crate::Result;
use std::{any::Any, sync::Arc};

/// A block of device memory. Dropping it returns the block to its backend's cache.
pub trait Buffer: Any + Send + Sync {
    /// Size in bytes.
    fn bytes(&self) -> usize;
}

/// What a device has to provide: one impl, and rows in the kernel registry.
pub trait Backend: Any + Send + Sync {
    /// Name for people: `cpu`, `cuda:0`.
    fn name(&self) -> String;
    /// Uninitialised memory.
    fn alloc(&self, bytes: usize) -> Result<Arc<dyn Buffer>>;
    /// A new block with these bytes of the host's, which the caller may change as soon as this returns.
    fn upload(&self, src: &[u8]) -> Result<Arc<dyn Buffer>>;
    /// Writes one element's bytes (1, 2, 4 or 8 of them) over the whole of a block, whose size is a multiple of theirs.
    fn fill(&self, dst: &dyn Buffer, element: &[u8]) -> Result<()>;
    /// Device to host, from the block's start.
    fn download(&self, src: &dyn Buffer, dst: &mut [u8]) -> Result<()>;
    /// Waits for all work submitted so far.
    fn synchronize(&self) -> Result<()>;
}

/// A handle to a backend. Two handles are equal when they are the same backend instance.
#[derive(Clone)]
pub struct Device(pub(crate) Arc<dyn Backend>);

impl Device {
    /// Wraps a backend.
    pub fn new(backend: impl Backend) -> Self {
        Device(Arc::new(backend))
    }
    /// The CPU: one instance per process.
    pub fn cpu() -> Self {
        crate::cpu::device()
    }
    /// The backend behind the handle.
    pub fn backend(&self) -> &dyn Backend {
        &*self.0
    }
    /// Name for people.
    pub fn name(&self) -> String {
        self.0.name()
    }
}

impl PartialEq for Device {
    fn eq(&self, o: &Self) -> bool {
        Arc::ptr_eq(&self.0, &o.0)
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name())
    }
}
