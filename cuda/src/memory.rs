//! Blocks of device memory, kept by size for reuse. Work is ordered by one stream, so a freed block can be handed out at once: whoever gets it comes later.

use crate::driver::Driver;
use engine::{Buffer, Error, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

/// As of cudaMalloc.
const ALIGN: usize = 256;
/// Uploads up to this size get blocks of their own, so that a batch is copied while the step before it still runs; larger ones are parameters.
const OWN: usize = 16 << 20;

/// Eight size classes per power of two waste at most an eighth.
fn size_class(bytes: usize) -> Option<usize> {
    let step = (bytes.max(1).checked_next_power_of_two()? / 16).max(ALIGN);
    bytes.max(1).checked_next_multiple_of(step)
}

/// Free blocks by size.
#[derive(Default)]
pub(crate) struct Pool {
    free: HashMap<usize, Vec<u64>>,
    cached: usize,
    /// Its graph is gone: what comes back goes to the main pool.
    closed: bool,
}
pub(crate) type SharedPool = Arc<Mutex<Pool>>;

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

/// Bytes of device memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// In use by tensors.
    pub live: usize,
    /// The most that ever was in use.
    pub peak: usize,
    /// Kept for reuse.
    pub cached: usize,
    /// The largest block that is kept.
    pub largest: usize,
    /// Held by captured graphs for what their replays compute in between.
    pub graphs: usize,
}

#[derive(Default)]
struct State {
    live: usize,
    peak: usize,
    /// What a graph that is being captured allocates from, and blocks of others that were dropped meanwhile.
    arena: Option<(SharedPool, Option<Vec<Block>>)>,
    /// Pools of all graphs.
    graphs: Vec<Weak<Mutex<Pool>>>,
}

pub(crate) struct Memory {
    driver: Arc<dyn Driver>,
    main: SharedPool,
    uploads: SharedPool,
    state: Mutex<State>,
}

pub(crate) struct Block {
    pub at: u64,
    size: usize,
    pool: SharedPool,
}

impl Memory {
    pub fn new(driver: Arc<dyn Driver>) -> Arc<Memory> {
        Arc::new(Memory { driver, main: Default::default(), uploads: Default::default(), state: Default::default() })
    }
    pub fn stats(&self) -> Stats {
        let (mut cached, mut largest) = (0, 0);
        for pool in [&self.main, &self.uploads] {
            let p = lock(pool);
            cached += p.cached;
            largest = p.free.iter().filter(|(_, v)| !v.is_empty()).map(|(n, _)| *n).fold(largest, usize::max);
        }
        let (live, peak, graphs) = {
            let s = lock(&self.state);
            (s.live, s.peak, s.graphs.clone())
        };
        let graphs = graphs.iter().filter_map(Weak::upgrade).map(|p| lock(&p).cached).sum();
        Stats { live, peak, cached, largest, graphs }
    }
    pub fn reset_peak(&self) {
        let mut s = lock(&self.state);
        s.peak = s.live;
    }
    /// Gives what is kept back to the system.
    pub fn trim(&self) {
        self.empty(&self.main);
        self.empty(&self.uploads);
        self.driver.trim();
    }
    fn empty(&self, pool: &SharedPool) {
        let free = {
            let mut p = lock(pool);
            p.cached = 0;
            std::mem::take(&mut p.free)
        };
        for (size, blocks) in free {
            blocks.into_iter().for_each(|at| self.driver.free(at, size));
        }
    }
    pub fn alloc(self: &Arc<Self>, bytes: usize) -> Result<CudaBuffer> {
        let pool = lock(&self.state).arena.as_ref().map_or_else(|| self.main.clone(), |a| a.0.clone());
        self.take(bytes, pool)
    }
    /// A block that [`Driver::upload`] may write; see `driver/copies.rs`.
    pub fn alloc_for_upload(self: &Arc<Self>, bytes: usize) -> Result<CudaBuffer> {
        if bytes <= OWN { self.take(bytes, self.uploads.clone()) } else { self.alloc(bytes) }
    }
    fn take(self: &Arc<Self>, bytes: usize, pool: SharedPool) -> Result<CudaBuffer> {
        let refuse = || {
            let s = self.stats();
            let free = self.driver.memory().map_or(0, |m| m.0);
            let device = format!("{} (largest cached block {}, free on the device {free})", self.driver.name(), s.largest);
            Error::OutOfMemory { device, requested: bytes, live: s.live, cached: s.cached }
        };
        let size = size_class(bytes).filter(|s| *s <= isize::MAX as usize).ok_or_else(refuse)?;
        let reused = {
            let mut p = lock(&pool);
            let at = p.free.get_mut(&size).and_then(Vec::pop);
            p.cached -= if at.is_some() { size } else { 0 };
            at
        };
        let at = match reused {
            Some(at) => at,
            None => match self.driver.alloc(size)? {
                Some(at) => at,
                None => {
                    self.trim();
                    self.driver.alloc(size)?.ok_or_else(refuse)?
                }
            },
        };
        let mut s = lock(&self.state);
        s.live += size;
        s.peak = s.peak.max(s.live);
        Ok(CudaBuffer { block: Some(Block { at, size, pool }), bytes, memory: self.clone() })
    }
    fn give_back(&self, b: Block) {
        {
            let mut s = lock(&self.state);
            s.live -= b.size;
            // what the graph under capture may read must not be handed to anybody else while it lives
            if let Some((arena, Some(kept))) = &mut s.arena
                && !Arc::ptr_eq(arena, &b.pool)
            {
                kept.push(b);
                return;
            }
        }
        self.put(b);
    }
    fn put(&self, b: Block) {
        if Arc::ptr_eq(&b.pool, &self.uploads) {
            self.driver.retire(b.at);
        }
        let mut p = lock(&b.pool);
        if p.closed {
            drop(p);
            p = lock(&self.main);
        }
        p.cached += b.size;
        p.free.entry(b.size).or_default().push(b.at);
    }
    /// Until [`Memory::end_arena`], blocks come from a pool of their own.
    pub fn begin_arena(&self) {
        let pool = SharedPool::default();
        let mut s = lock(&self.state);
        s.graphs.retain(|g| g.strong_count() > 0);
        s.graphs.push(Arc::downgrade(&pool));
        s.arena = Some((pool, None));
    }
    /// Until [`Memory::leave`], blocks come from this arena, as when it was made.
    pub fn enter(&self, arena: &Arena) {
        lock(&self.state).arena = Some((arena.pool.clone(), None));
    }
    pub fn leave(&self) {
        lock(&self.state).arena = None;
    }
    /// From now on, blocks of other pools that are dropped are kept.
    pub fn keep_dropped(&self) {
        if let Some(a) = &mut lock(&self.state).arena {
            a.1 = Some(vec![]);
        }
    }
    pub fn end_arena(self: &Arc<Self>) -> Arena {
        let (pool, kept) = lock(&self.state).arena.take().unwrap_or_default();
        Arena { memory: self.clone(), pool, kept: kept.unwrap_or_default() }
    }
}

/// The memory of a graph.
pub(crate) struct Arena {
    memory: Arc<Memory>,
    pool: SharedPool,
    kept: Vec<Block>,
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.kept.drain(..).for_each(|b| self.memory.put(b));
        // blocks that tensors still hold go to the main pool when they are dropped
        lock(&self.pool).closed = true;
        self.memory.empty(&self.pool);
    }
}

/// A block of device memory; goes back to the cache when dropped.
pub struct CudaBuffer {
    block: Option<Block>,
    bytes: usize,
    memory: Arc<Memory>,
}

impl CudaBuffer {
    /// Where it begins.
    pub(crate) fn address(&self) -> u64 {
        self.block.as_ref().map_or(0, |b| b.at)
    }
}

impl Buffer for CudaBuffer {
    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for CudaBuffer {
    fn drop(&mut self) {
        if let Some(b) = self.block.take() {
            self.memory.give_back(b);
        }
    }
}
