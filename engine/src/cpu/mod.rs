//! The CPU backend: memory with a size-keyed cache, and how kernels see their arguments.

pub(crate) mod convert;
pub mod gemm;
pub mod simd;
mod thin;
pub mod tile;

pub use convert::convert;

use crate::cpu::convert::convert_all;
use crate::cpu::simd::Real;
use crate::{Backend, Buffer, DType, Device, Element, Error, Layout, Op, Result, View};
use rayon::prelude::*;
use std::alloc::{self, Layout as Memory};
use std::any::Any;
use std::borrow::Cow;
use std::collections::HashMap;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The CPU as a backend.
pub struct Cpu;

pub(crate) fn device() -> Device {
    static CPU: LazyLock<Device> = LazyLock::new(|| Device::new(Cpu));
    CPU.clone()
}

/// 64 bytes: a cache line, and the widest vector.
const ALIGN: usize = 64;
/// A large page. Reading 64 to 256 MB, two threads of a Zen 4 in a virtual machine got 27 GB/s with large pages, 20 to 22 with small ones.
const PAGE: usize = 2 << 20;

/// What a block of so many bytes is aligned to: two large pages or more, to these.
fn memory_of(bytes: usize) -> Memory {
    // SAFETY: both alignments are powers of two; sizes were checked against isize::MAX less a page when the block was asked for.
    unsafe { Memory::from_size_align_unchecked(bytes, if bytes >= 2 * PAGE { PAGE } else { ALIGN }) }
}

/// Asks for large pages in a new block, where the system gives them on request.
fn advise(ptr: NonNull<u8>, bytes: usize) {
    #[cfg(target_os = "linux")]
    if bytes >= 2 * PAGE {
        // SAFETY: the range lies inside the block; the advice changes how it is mapped, not what it holds. Refused, it is as before.
        unsafe { libc::madvise(ptr.as_ptr().cast(), bytes / PAGE * PAGE, libc::MADV_HUGEPAGE) };
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (ptr, bytes);
}

struct Block {
    ptr: NonNull<u8>,
    capacity: usize,
}
// SAFETY: a block is plain memory that it owns alone.
unsafe impl Send for Block {}
// SAFETY: shared access only reads; writing goes through the buffer's lock.
unsafe impl Sync for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated below with this very size and alignment.
        unsafe { alloc::dealloc(self.ptr.as_ptr(), memory_of(self.capacity)) }
    }
}

/// Freed blocks by size. A training step asks for the same sizes again and again; without the cache each large block is a trip to the kernel
/// and a page fault per 4 KiB.
#[derive(Default)]
struct Cache {
    free: HashMap<usize, Vec<Block>>,
    cached: usize,
    live: usize,
    peak: usize,
}

static CACHE: LazyLock<Mutex<Cache>> = LazyLock::new(Default::default);

fn cache() -> std::sync::MutexGuard<'static, Cache> {
    CACHE.lock().unwrap_or_else(|e| e.into_inner())
}

/// Bytes (live, cached for reuse, peak live) of CPU tensors in this process.
pub fn memory() -> (usize, usize, usize) {
    let c = cache();
    (c.live, c.cached, c.peak)
}

/// Counts the peak from what is live now.
pub fn reset_peak() {
    let mut c = cache();
    c.peak = c.live;
}

/// Bytes of memory that this process can have at most: the machine's, or less in a container. None where the system does not tell.
pub fn system_memory() -> Option<u64> {
    static FOUND: LazyLock<Option<u64>> = LazyLock::new(|| {
        let info = std::fs::read_to_string("/proc/meminfo").ok()?;
        let kib: u64 = info.lines().find_map(|l| l.strip_prefix("MemTotal:"))?.trim().strip_suffix("kB")?.trim().parse().ok()?;
        let limit = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|s| s.trim().parse().ok());
        Some((kib << 10).min(limit.unwrap_or(u64::MAX)))
    });
    *FOUND
}

/// Returns all cached blocks to the system.
pub fn trim() {
    let freed = {
        let mut c = cache();
        c.cached = 0;
        std::mem::take(&mut c.free)
    };
    drop(freed);
}

/// Runs `f` on a thread of the pool that kernels share their work out to. From any other thread, each kernel would wake the pool and wait for it, which takes
/// longer than the small kernels of a decoded token.
pub fn in_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    rayon::scope(|_| f())
}

/// Eight size classes per power of two waste at most an eighth.
fn size_class(bytes: usize) -> Option<usize> {
    if bytes <= 1024 {
        return Some(bytes.max(1).next_multiple_of(ALIGN));
    }
    let step = (bytes.checked_next_power_of_two()? / 16).max(ALIGN);
    bytes.checked_next_multiple_of(step)
}

fn take_block(bytes: usize) -> Result<Block> {
    let refuse = |c: &Cache| Error::OutOfMemory { device: "cpu".into(), requested: bytes, live: c.live, cached: c.cached };
    let size = size_class(bytes).filter(|s| *s <= isize::MAX as usize - PAGE);
    let mut c = cache();
    // the system would hand out more than there is, and end the process when it is written
    let fits = |s: &usize| system_memory().is_none_or(|all| (c.live + s) as u64 <= all);
    let Some(size) = size.filter(fits) else { return Err(refuse(&c)) };
    let reused = c.free.get_mut(&size).and_then(Vec::pop);
    if reused.is_some() {
        c.cached -= size;
    }
    drop(c);
    let block = match reused {
        Some(b) => b,
        None => {
            let want = || {
                // SAFETY: size is not zero and was checked against isize::MAX.
                NonNull::new(unsafe { alloc::alloc(memory_of(size)) })
            };
            let ptr = want().or_else(|| {
                trim();
                want()
            });
            let Some(ptr) = ptr else { return Err(refuse(&cache())) };
            advise(ptr, size);
            Block { ptr, capacity: size }
        }
    };
    let mut c = cache();
    c.live += size;
    c.peak = c.peak.max(c.live);
    Ok(block)
}

/// A block of CPU memory behind a lock: kernels that read share it, a kernel that writes has it alone.
pub struct CpuBuffer {
    block: RwLock<Option<Block>>,
    bytes: usize,
}

impl Buffer for CpuBuffer {
    fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for CpuBuffer {
    fn drop(&mut self) {
        if let Some(b) = self.block.get_mut().unwrap_or_else(|e| e.into_inner()).take() {
            return_block(b);
        }
    }
}

fn return_block(b: Block) {
    let mut c = cache();
    c.live -= b.capacity;
    // keep no more than was ever in use at once: what a step freed, the next step takes
    if c.cached + b.capacity <= c.peak {
        c.cached += b.capacity;
        c.free.entry(b.capacity).or_default().push(b);
    }
}

/// Scratch memory of a kernel, from the same cache as tensors; holds old values.
pub struct Scratch<F: Real> {
    block: Option<Block>,
    len: usize,
    _t: PhantomData<F>,
}

/// `n` elements of scratch memory with arbitrary contents.
///
/// # Panics
/// When memory is exhausted: kernels ask for little beside their outputs.
pub fn scratch<F: Real>(n: usize) -> Scratch<F> {
    let block = take_block(n * F::DTYPE.size()).expect("scratch memory of a kernel");
    Scratch { block: Some(block), len: n, _t: PhantomData }
}

/// Like [`scratch`], filled with zeros.
///
/// # Panics
/// As [`scratch`].
pub fn scratch_zeros<F: Real>(n: usize) -> Scratch<F> {
    let mut s = scratch(n);
    s.fill(F::ZERO);
    s
}

impl<F: Real> Deref for Scratch<F> {
    type Target = [F];
    #[inline]
    fn deref(&self) -> &[F] {
        // SAFETY: the block was taken for `len` elements; every bit pattern of a float is valid.
        unsafe { std::slice::from_raw_parts(pointer(&self.block).cast(), self.len) }
    }
}
impl<F: Real> DerefMut for Scratch<F> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [F] {
        // SAFETY: as above, and the block is ours alone.
        unsafe { std::slice::from_raw_parts_mut(pointer(&self.block).cast(), self.len) }
    }
}
impl<F: Real> Drop for Scratch<F> {
    fn drop(&mut self) {
        if let Some(b) = self.block.take() {
            return_block(b);
        }
    }
}

fn cpu_buffer(b: &dyn Buffer) -> Result<&CpuBuffer> {
    (b as &dyn Any).downcast_ref().ok_or_else(|| Error::invalid("cpu", "was handed a buffer of another device; move the tensor with to_device()"))
}

impl Backend for Cpu {
    fn name(&self) -> String {
        "cpu".into()
    }
    fn alloc(&self, bytes: usize) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(CpuBuffer { block: RwLock::new(Some(take_block(bytes)?)), bytes }))
    }
    fn upload(&self, src: &[u8]) -> Result<Arc<dyn Buffer>> {
        let dst = self.alloc(src.len())?;
        bytes_mut(&mut write(&*dst, "upload")?, src.len()).copy_from_slice(src);
        Ok(dst)
    }
    fn fill(&self, dst: &dyn Buffer, element: &[u8]) -> Result<()> {
        let mut g = write(dst, "fill")?;
        // a multiple of every element's size
        const PIECE: usize = 1 << 20;
        bytes_mut(&mut g, dst.bytes()).par_chunks_mut(PIECE).for_each(|piece| match element {
            [first, rest @ ..] if rest.iter().all(|b| b == first) => piece.fill(*first),
            _ => piece.chunks_exact_mut(element.len()).for_each(|e| e.copy_from_slice(element)),
        });
        Ok(())
    }
    fn download(&self, src: &dyn Buffer, dst: &mut [u8]) -> Result<()> {
        let g = read(src, "download")?;
        // SAFETY: reading as bytes; `upload` or a kernel has written them before a tensor is handed out.
        let all = unsafe { std::slice::from_raw_parts(pointer(&g), src.bytes()) };
        dst.copy_from_slice(&all[..dst.len()]);
        Ok(())
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

fn read<'a>(b: &'a dyn Buffer, op: &'static str) -> Result<RwLockReadGuard<'a, Option<Block>>> {
    cpu_buffer(b)?
        .block
        .try_read()
        .map_err(|_| Error::invalid(op, "reads a buffer that is being written; an in-place target must not be an input too"))
}
fn write<'a>(b: &'a dyn Buffer, op: &'static str) -> Result<RwLockWriteGuard<'a, Option<Block>>> {
    cpu_buffer(b)?
        .block
        .try_write()
        .map_err(|_| Error::invalid(op, "writes a buffer that is in use; in-place targets must be distinct from each other and from the inputs"))
}
#[inline]
fn pointer(block: &Option<Block>) -> *mut u8 {
    block.as_ref().map_or(NonNull::dangling().as_ptr(), |b| b.ptr.as_ptr())
}
fn bytes_mut<'a>(g: &'a mut RwLockWriteGuard<'_, Option<Block>>, len: usize) -> &'a mut [u8] {
    // SAFETY: the block has at least `len` bytes and the guard makes us its only user; any byte may be written.
    unsafe { std::slice::from_raw_parts_mut(pointer(g), len) }
}

/// A kernel's inputs.
pub struct Inputs<'a> {
    op: &'static str,
    views: Vec<(RwLockReadGuard<'a, Option<Block>>, &'a Layout, DType)>,
}

#[allow(clippy::len_without_is_empty)]
impl<'a> Inputs<'a> {
    /// Number of inputs.
    pub fn len(&self) -> usize {
        self.views.len()
    }
    /// Shape of input `i`.
    pub fn shape(&self, i: usize) -> &'a [usize] {
        &self.views[i].1.shape
    }
    /// Dtype of input `i`.
    pub fn dtype(&self, i: usize) -> DType {
        self.views[i].2
    }
    /// Layout of input `i`; contiguous unless the op wants otherwise.
    pub fn layout(&self, i: usize) -> &'a Layout {
        self.views[i].1
    }
    /// The elements of input `i` from its first on: exactly `numel` of them when it is contiguous, otherwise the layout's span, to be read by its strides.
    pub fn slice<T: Element>(&self, i: usize) -> Result<&[T]> {
        let (g, l, d) = &self.views[i];
        if *d != T::DTYPE {
            return Err(Error::dtype(self.op, format!("input {i}"), T::DTYPE, *d));
        }
        // SAFETY: the buffer holds the view (checked when the tensor was made), is aligned to 64 bytes, and the guard keeps writers out.
        Ok(unsafe { std::slice::from_raw_parts(pointer(g).cast::<T>().add(l.offset), l.span()) })
    }
    /// Like [`Inputs::slice`] for a float input, as `F`: converted when it holds another type.
    pub fn real<F: Real>(&self, i: usize) -> Result<Cow<'_, [F]>> {
        if self.dtype(i) == F::DTYPE {
            return Ok(Cow::Borrowed(self.slice::<F>(i)?));
        }
        fn widened<S: Element, F: Real>(s: &[S]) -> Vec<F> {
            let mut v = vec![F::ZERO; s.len()];
            convert_all(s, &mut v);
            v
        }
        Ok(Cow::Owned(crate::dispatch!(self.dtype(i), |S| widened::<S, F>(self.slice::<S>(i)?))))
    }
}

/// A kernel's outputs, contiguous and not zero-filled. Each is taken once.
pub struct Outputs<'a> {
    op: &'static str,
    views: Vec<Option<(RwLockWriteGuard<'a, Option<Block>>, &'a Layout, DType)>>,
}

impl<'a> Outputs<'a> {
    fn take(&mut self, j: usize) -> Result<(RwLockWriteGuard<'a, Option<Block>>, &'a Layout, DType)> {
        self.views
            .get_mut(j)
            .and_then(Option::take)
            .ok_or_else(|| Error::invalid(self.op, format!("kernel asked for output {j} twice, or there is none")))
    }
    /// Output `j` as a slice of exactly its dtype.
    pub fn slice<T: Element>(&mut self, j: usize) -> Result<OutSlice<'a, T>> {
        let (g, l, d) = self.take(j)?;
        if d != T::DTYPE {
            return Err(Error::dtype(self.op, format!("output {j}"), T::DTYPE, d));
        }
        // SAFETY: the buffer holds the view and is aligned to 64 bytes.
        let ptr = unsafe { pointer(&g).cast::<T>().add(l.offset) };
        Ok(OutSlice { ptr, len: l.numel(), _guard: g, _t: PhantomData })
    }
    /// Output `j` as `F`; when its dtype is narrower, a scratch buffer that is rounded into it when dropped.
    pub fn real<F: Real>(&mut self, j: usize) -> Result<OutReal<'a, F>> {
        Ok(match self.views.get(j).and_then(Option::as_ref) {
            Some((_, l, DType::BF16)) => OutReal::Bf16(scratch(l.numel()), self.slice(j)?),
            Some((_, l, DType::F16)) => OutReal::F16(scratch(l.numel()), self.slice(j)?),
            _ => OutReal::Same(self.slice(j)?),
        })
    }
}

/// A typed output slice. What a kernel does not write holds old bytes.
pub struct OutSlice<'a, T> {
    ptr: *mut T,
    len: usize,
    _guard: RwLockWriteGuard<'a, Option<Block>>,
    _t: PhantomData<&'a mut [T]>,
}

impl<T> Deref for OutSlice<'_, T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: see `Outputs::slice`; every bit pattern of an `Element` is valid.
        unsafe { std::slice::from_raw_parts(self.ptr, self.len) }
    }
}
impl<T> DerefMut for OutSlice<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the guard is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.len) }
    }
}

/// An output to compute in `F`; see [`Outputs::real`].
pub enum OutReal<'a, F: Real> {
    /// The output's own memory.
    Same(OutSlice<'a, F>),
    /// Rounded to bf16 when dropped.
    Bf16(Scratch<F>, OutSlice<'a, half::bf16>),
    /// Rounded to f16 when dropped.
    F16(Scratch<F>, OutSlice<'a, half::f16>),
}

impl<F: Real> Deref for OutReal<'_, F> {
    type Target = [F];
    fn deref(&self) -> &[F] {
        match self {
            OutReal::Same(s) => s,
            OutReal::Bf16(v, _) | OutReal::F16(v, _) => v,
        }
    }
}
impl<F: Real> DerefMut for OutReal<'_, F> {
    fn deref_mut(&mut self) -> &mut [F] {
        match self {
            OutReal::Same(s) => s,
            OutReal::Bf16(v, _) | OutReal::F16(v, _) => v,
        }
    }
}
impl<F: Real> Drop for OutReal<'_, F> {
    fn drop(&mut self) {
        match self {
            OutReal::Same(_) => {}
            OutReal::Bf16(v, o) => convert_all(v, o),
            OutReal::F16(v, o) => convert_all(v, o),
        }
    }
}

/// Locks the buffers and calls a typed CPU kernel; used by [`cpu_kernel!`](crate::cpu_kernel).
pub fn call<O: Op>(op: &O, x: &[View], y: &[View], kernel: fn(&O, &Inputs, &mut Outputs) -> Result<()>) -> Result<()> {
    let name = op.name();
    let outs = y.iter().map(|v| Ok(Some((write(v.buf, name)?, v.layout, v.dtype)))).collect::<Result<_>>()?;
    let ins = x.iter().map(|v| Ok((read(v.buf, name)?, v.layout, v.dtype))).collect::<Result<_>>()?;
    kernel(op, &Inputs { op: name, views: ins }, &mut Outputs { op: name, views: outs })
}
