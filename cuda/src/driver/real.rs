//! The CUDA driver, found at run time. Work goes to one stream of our own: the legacy stream can't be captured.

use super::blas::Blas;
use super::{Driver, Function, Recorded, Shape};
use crate::compile::{Binary, Target, present};
use crate::{Gemm, Kernel};
use cudarc::driver::sys::{self, CUresult};
use engine::{Error, Result};
use std::ffi::{CStr, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

/// Pinned memory that host data goes through: parts of it are in flight while the next is filled.
const STAGE: usize = 4 << 20;
const STAGES: usize = 4;

pub(crate) fn check(r: CUresult, what: impl FnOnce() -> String) -> Result<()> {
    if r == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(Error::invalid("cuda", format!("{} failed: {r:?}", what()))) }
}

macro_rules! call {
    ($f:ident($($a:expr),* $(,)?)) => {
        // SAFETY: the driver library is there (checked when the device was opened), and each pointer is to a live local or to memory of this context.
        check(unsafe { sys::$f($($a),*) }, || stringify!($f).into())
    };
}

/// How many GPUs the driver shows; an error that says why when there is no driver.
pub(crate) fn count() -> Result<usize> {
    if !present(sys::is_culib_present) {
        return Err(Error::invalid("cuda", "there is no CUDA driver here (libcuda is not found); use the device `cpu`"));
    }
    let mut n = 0;
    // SAFETY: the driver library is there.
    match unsafe { sys::cuInit(0) } {
        CUresult::CUDA_ERROR_NO_DEVICE => return Ok(0),
        r => check(r, || "cuInit".into())?,
    }
    call!(cuDeviceGetCount(&mut n))?;
    Ok(n.max(0) as usize)
}

/// The newest version of CUDA that the driver knows.
pub(crate) fn version() -> Result<(i32, i32)> {
    count()?;
    let mut v = 0;
    call!(cuDriverGetVersion(&mut v))?;
    Ok((v / 1000, v % 1000 / 10))
}

struct Stage {
    at: *mut c_void,
    free: sys::CUevent,
}

#[derive(Default)]
struct State {
    stages: Vec<Stage>,
    next: usize,
    /// Pinned copies of what a recording uploads, while one is under way.
    recording: Option<Vec<*mut c_void>>,
}
// SAFETY: addresses and handles of the driver may be used from any thread.
unsafe impl Send for State {}

pub(crate) struct Real(Arc<Inner>);

struct Inner {
    ordinal: usize,
    name: String,
    context: sys::CUcontext,
    /// The compute stream.
    stream: sys::CUstream,
    /// For allocations while the compute stream records.
    side: sys::CUstream,
    pool: sys::CUmemoryPool,
    arch: u32,
    processors: u32,
    shared_limit: u32,
    blas: Mutex<Option<Blas>>,
    state: Mutex<State>,
}
// SAFETY: the driver's handles may be used from any thread once the context is current there, which `bind` sees to.
unsafe impl Send for Inner {}
// SAFETY: as above; what is mutable is behind locks.
unsafe impl Sync for Inner {}

impl Inner {
    fn bind(&self) -> Result<()> {
        thread_local! { static CURRENT: std::cell::Cell<sys::CUcontext> = const { std::cell::Cell::new(null_mut()) } }
        if CURRENT.get() == self.context {
            return Ok(());
        }
        call!(cuCtxSetCurrent(self.context))?;
        CURRENT.set(self.context);
        Ok(())
    }
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }
    fn not_recording(&self, what: &str) -> Result<()> {
        if self.state().recording.is_some() { Err(Error::invalid("cuda graph", format!("{what} waits for the device"))) } else { Ok(()) }
    }
    fn wait(&self) -> Result<()> {
        call!(cuStreamSynchronize(self.stream))
    }
}

fn pinned(bytes: usize) -> Result<*mut c_void> {
    let mut at = null_mut();
    call!(cuMemHostAlloc(&mut at, bytes, 0))?;
    Ok(at)
}

impl Real {
    pub fn open(ordinal: usize) -> Result<Real> {
        let n = count()?;
        if ordinal >= n {
            return Err(Error::invalid("cuda", format!("there are {n} GPUs here, asked for number {ordinal} (from 0)")));
        }
        let (mut device, mut context, mut stream, mut side, mut pool) = (0, null_mut(), null_mut(), null_mut(), null_mut());
        call!(cuDeviceGet(&mut device, ordinal as i32))?;
        call!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        call!(cuCtxSetCurrent(context))?;
        let attribute = |a| -> Result<u32> {
            let mut v = 0;
            call!(cuDeviceGetAttribute(&mut v, a, device))?;
            Ok(v as u32)
        };
        use sys::CUdevice_attribute_enum as A;
        let arch = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10 + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if arch < 80 {
            return Err(Error::invalid("cuda", format!("GPU {ordinal} has compute capability {}.{}; 8.0 is needed", arch / 10, arch % 10)));
        }
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        call!(cuStreamCreate(&mut stream, flags))?;
        call!(cuStreamCreate(&mut side, flags))?;
        call!(cuDeviceGetDefaultMemPool(&mut pool, device))?;
        // the default gives all freed memory back at each synchronisation
        let mut keep = u64::MAX;
        let attr = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        call!(cuMemPoolSetAttribute(pool, attr, (&raw mut keep).cast()))?;
        let mut name = [0 as std::ffi::c_char; 128];
        call!(cuDeviceGetName(name.as_mut_ptr(), name.len() as i32, device))?;
        // SAFETY: the driver ends the name with a zero.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        Ok(Real(Arc::new(Inner {
            ordinal,
            name,
            context,
            stream,
            side,
            pool,
            arch,
            processors: attribute(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_limit: attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            blas: Mutex::new(None),
            state: Default::default(),
        })))
    }
    /// The card's name.
    pub fn model(&self) -> String {
        self.0.name.clone()
    }
}

impl Driver for Real {
    fn name(&self) -> String {
        format!("cuda:{}", self.0.ordinal)
    }
    fn target(&self) -> Target {
        Target::Gpu(self.0.arch)
    }
    fn processors(&self) -> u32 {
        self.0.processors
    }
    fn shared_limit(&self) -> u32 {
        self.0.shared_limit
    }
    fn memory(&self) -> Result<(usize, usize)> {
        self.0.bind()?;
        let (mut free, mut total) = (0, 0);
        call!(cuMemGetInfo_v2(&mut free, &mut total))?;
        Ok((free, total))
    }
    fn alloc(&self, bytes: usize) -> Result<Option<u64>> {
        let s = &self.0;
        s.bind()?;
        let recording = s.state().recording.is_some();
        let stream = if recording { s.side } else { s.stream };
        let mut at = 0;
        // SAFETY: the pool and the stream belong to the current context.
        match unsafe { sys::cuMemAllocFromPoolAsync(&mut at, bytes, s.pool, stream) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Ok(None),
            r => check(r, || format!("cuMemAllocFromPoolAsync of {bytes} bytes"))?,
        }
        if recording {
            call!(cuStreamSynchronize(s.side))?;
        }
        Ok(Some(at))
    }
    fn free(&self, at: u64, _: usize) {
        if self.0.bind().is_ok() {
            let _ = call!(cuMemFreeAsync(at, self.0.stream));
        }
    }
    fn trim(&self) {
        let s = &self.0;
        if s.bind().is_ok() && s.wait().is_ok() {
            let _ = call!(cuMemPoolTrimTo(s.pool, 0));
        }
    }
    fn upload(&self, src: &[u8], dst: u64) -> Result<()> {
        let s = &self.0;
        s.bind()?;
        let mut state = s.state();
        if let Some(kept) = &mut state.recording {
            // a replay copies the same bytes again, so they stay where they are for as long as the graph lives
            let at = pinned(src.len().max(1))?;
            kept.push(at);
            // SAFETY: allocated with this size.
            unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), at.cast(), src.len()) };
            return call!(cuMemcpyHtoDAsync_v2(dst, at, src.len(), s.stream));
        }
        for (i, part) in src.chunks(STAGE).enumerate() {
            if state.stages.len() < STAGES {
                let mut free = null_mut();
                call!(cuEventCreate(&mut free, sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING as u32))?;
                let stage = Stage { at: pinned(STAGE)?, free };
                state.stages.push(stage);
            }
            // while there are fewer, the next is the one just made
            let slot = state.next;
            state.next = (slot + 1) % STAGES;
            let stage = &state.stages[slot];
            call!(cuEventSynchronize(stage.free))?;
            // SAFETY: a stage has STAGE bytes, and its last copy has ended.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), stage.at.cast(), part.len()) };
            call!(cuMemcpyHtoDAsync_v2(dst + (i * STAGE) as u64, stage.at, part.len(), s.stream))?;
            call!(cuEventRecord(stage.free, s.stream))?;
        }
        Ok(())
    }
    fn download(&self, src: u64, dst: &mut [u8]) -> Result<()> {
        let s = &self.0;
        s.not_recording("a download")?;
        s.bind()?;
        call!(cuMemcpyDtoHAsync_v2(dst.as_mut_ptr().cast(), src, dst.len(), s.stream))?;
        s.wait()
    }
    fn fill(&self, dst: u64, byte: u8, bytes: usize) -> Result<()> {
        self.0.bind()?;
        call!(cuMemsetD8Async(dst, byte, bytes, self.0.stream))
    }
    fn copy(&self, src: u64, dst: u64, bytes: usize) -> Result<()> {
        self.0.bind()?;
        call!(cuMemcpyDtoDAsync_v2(dst, src, bytes, self.0.stream))
    }
    fn load(&self, k: &Kernel, code: &Binary, _: Option<&Path>, params: usize) -> Result<Function> {
        let s = &self.0;
        s.bind()?;
        let (mut module, mut f) = (null_mut(), null_mut());
        check(
            // SAFETY: the image is a whole cubin (its hash was checked), and the driver copies it.
            unsafe { sys::cuModuleLoadData(&mut module, code.code.as_ptr().cast()) },
            || format!("cuModuleLoadData of {k}"),
        )?;
        call!(cuModuleGetFunction(&mut f, module, c"tg_entry".as_ptr()))?;
        let (mut offset, mut size) = (0, 0);
        call!(cuFuncGetParamInfo(f, 0, &mut offset, &mut size))?;
        if size != params {
            return Err(Error::invalid("cuda", format!("{k}: its parameters take {size} bytes in the source and {params} in Rust")));
        }
        Ok(Function(f as usize))
    }
    fn launch(&self, k: &Kernel, f: Function, shape: Shape, params: &[u8]) -> Result<()> {
        let s = &self.0;
        s.bind()?;
        let f = f.0 as sys::CUfunction;
        let [x, y, z] = shape.grid;
        let context = || format!("launch of {k} with {shape:?}");
        if shape.shared > 48 * 1024 {
            let attr = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function was loaded by this context.
            check(unsafe { sys::cuFuncSetAttribute(f, attr, shape.shared as i32) }, context)?;
        }
        let mut args = [params.as_ptr() as *mut c_void];
        // SAFETY: the kernel takes one struct of this very size (checked at loading), which the driver copies before it returns.
        check(unsafe { sys::cuLaunchKernel(f, x, y, z, shape.threads, 1, 1, shape.shared, s.stream, args.as_mut_ptr(), null_mut()) }, context)
    }
    fn gemm(&self, g: &Gemm) -> Result<()> {
        let s = &self.0;
        s.bind()?;
        let mut blas = s.blas.lock().unwrap_or_else(|e| e.into_inner());
        if blas.is_none() {
            let workspace = self.alloc(Blas::WORKSPACE)?;
            *blas = Some(Blas::new(workspace.ok_or_else(|| Error::invalid("cuda", "no memory for cublasLt's workspace"))?)?);
        }
        blas.as_mut().map_or(Ok(()), |b| b.run(g, s.stream.cast()))
    }
    fn synchronize(&self) -> Result<()> {
        self.0.not_recording("a synchronisation")?;
        self.0.bind()?;
        self.0.wait()
    }
    fn timer(&self) -> Result<Box<dyn FnOnce() -> Result<Duration> + '_>> {
        let s = &self.0;
        s.not_recording("timing")?;
        s.bind()?;
        let (mut from, mut to) = (null_mut(), null_mut());
        call!(cuEventCreate(&mut from, 0))?;
        call!(cuEventCreate(&mut to, 0))?;
        call!(cuEventRecord(from, s.stream))?;
        Ok(Box::new(move || {
            let mut ms = 0f32;
            call!(cuEventRecord(to, s.stream))?;
            call!(cuEventSynchronize(to))?;
            call!(cuEventElapsedTime_v2(&mut ms, from, to))?;
            call!(cuEventDestroy_v2(from))?;
            call!(cuEventDestroy_v2(to))?;
            Ok(Duration::from_secs_f64(ms as f64 / 1e3))
        }))
    }
    fn begin_recording(&self) -> Result<()> {
        let s = &self.0;
        s.not_recording("a recording inside a recording")?;
        s.bind()?;
        // relaxed: loading a module or growing the pool on another stream is harmless here
        call!(cuStreamBeginCapture_v2(s.stream, sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED))?;
        s.state().recording = Some(vec![]);
        Ok(())
    }
    fn end_recording(&self) -> Result<Box<dyn Recorded>> {
        let s = &self.0;
        s.bind()?;
        let pinned = s.state().recording.take().unwrap_or_default();
        let mut g = RealGraph { inner: s.clone(), graph: null_mut(), exec: null_mut(), pinned };
        call!(cuStreamEndCapture(s.stream, &mut g.graph))?;
        call!(cuGraphInstantiateWithFlags(&mut g.exec, g.graph, 0))?;
        Ok(Box::new(g))
    }
}

struct RealGraph {
    inner: Arc<Inner>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    pinned: Vec<*mut c_void>,
}
// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for RealGraph {}
// SAFETY: as above.
unsafe impl Sync for RealGraph {}

impl Recorded for RealGraph {
    fn replay(&self) -> Result<()> {
        self.inner.bind()?;
        call!(cuGraphLaunch(self.exec, self.inner.stream))
    }
    fn len(&self) -> usize {
        let mut n = 0;
        let _ = call!(cuGraphGetNodes(self.graph, null_mut(), &mut n));
        n
    }
}

impl Drop for RealGraph {
    fn drop(&mut self) {
        if self.inner.bind().is_err() || self.inner.wait().is_err() {
            return;
        }
        if !self.exec.is_null() {
            let _ = call!(cuGraphExecDestroy(self.exec));
        }
        if !self.graph.is_null() {
            let _ = call!(cuGraphDestroy(self.graph));
        }
        for p in &self.pinned {
            let _ = call!(cuMemFreeHost(*p));
        }
    }
}
