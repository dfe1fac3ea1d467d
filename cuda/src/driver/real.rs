//! The CUDA driver, found at run time. Work goes to one stream of our own: the legacy stream can't be captured.

use super::blas::Blas;
use super::copies::{Copies, Event};
use super::{Driver, Function, Recorded, Shape, uploads, waits};
use crate::compile::{Binary, Target, present};
use crate::{Gemm, Kernel};
use cudarc::driver::sys::{self, CUresult};
use engine::{Error, Result};
use std::ffi::{CStr, CString, c_void};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

pub(crate) fn check(r: CUresult, what: impl FnOnce() -> String) -> Result<()> {
    use CUresult::*;
    let earlier = match r {
        CUDA_SUCCESS => return Ok(()),
        // a kernel's own, told by whatever call comes next
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_LAUNCH_TIMEOUT
        | CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_INVALID_ADDRESS_SPACE
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_LAUNCH_FAILED => ": a kernel failed before; run again with TIDEGATE_CUDA_SYNC=1 to learn which",
        _ => "",
    };
    Err(Error::invalid("cuda", format!("{} failed: {r:?}{earlier}", what())))
}

macro_rules! call {
    ($f:ident($($a:expr),* $(,)?)) => {
        // SAFETY: the driver library is there (checked when the device was opened), and each pointer is to a live local or to memory of this context.
        $crate::driver::real::check(unsafe { cudarc::driver::sys::$f($($a),*) }, || stringify!($f).into())
    };
}
pub(super) use call;

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
    copies: Mutex<Copies>,
    recording: AtomicBool,
}
// SAFETY: the driver's handles may be used from any thread once the context is current there, which `bind` sees to.
unsafe impl Send for Inner {}
// SAFETY: as above; what is mutable is behind locks.
unsafe impl Sync for Inner {}

/// Makes a context current on this thread, if another one is.
fn make_current(context: sys::CUcontext) -> Result<()> {
    thread_local! { static CURRENT: std::cell::Cell<sys::CUcontext> = const { std::cell::Cell::new(null_mut()) } }
    if CURRENT.get() != context {
        call!(cuCtxSetCurrent(context))?;
        CURRENT.set(context);
    }
    Ok(())
}

impl Inner {
    fn bind(&self) -> Result<()> {
        make_current(self.context)
    }
    fn copies(&self) -> MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(|e| e.into_inner())
    }
    fn recording(&self) -> bool {
        self.recording.load(Ordering::Acquire)
    }
    fn not_recording(&self, what: &str) -> Result<()> {
        if self.recording() { Err(waits(what)) } else { Ok(()) }
    }
    fn wait(&self) -> Result<()> {
        call!(cuStreamSynchronize(self.stream))
    }
    /// Where allocations are ordered. Nothing runs on the device while a step is recorded, so another stream does then.
    fn memory_stream(&self) -> sys::CUstream {
        if self.recording() { self.side } else { self.stream }
    }
}

impl Real {
    pub fn open(ordinal: usize) -> Result<Real> {
        let n = count()?;
        if ordinal >= n {
            return Err(Error::invalid("cuda", format!("there are {n} GPUs here, asked for number {ordinal} (from 0)")));
        }
        // what NVRTC and cublasLt of CUDA 13 need; an older driver lacks functions, too
        let mut version = 0;
        call!(cuDriverGetVersion(&mut version))?;
        if version < 13000 {
            let found = format!("{}.{}", version / 1000, version % 1000 / 10);
            return Err(Error::invalid("cuda", format!("the driver is for CUDA {found}; CUDA 13.0 is needed, which driver 580 and newer have")));
        }
        let (mut device, mut context, mut stream, mut side, mut pool) = (0, null_mut(), null_mut(), null_mut(), null_mut());
        call!(cuDeviceGet(&mut device, ordinal as i32))?;
        call!(cuDevicePrimaryCtxRetain(&mut context, device))?;
        make_current(context)?;
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
            copies: Mutex::new(Copies::new()?),
            recording: AtomicBool::new(false),
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
    fn arch(&self) -> u32 {
        self.0.arch
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
        let (mut at, stream) = (0, s.memory_stream());
        // SAFETY: the pool and the stream belong to the current context.
        match unsafe { sys::cuMemAllocFromPoolAsync(&mut at, bytes, s.pool, stream) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => return Ok(None),
            r => check(r, || format!("cuMemAllocFromPoolAsync of {bytes} bytes"))?,
        }
        if stream == s.side {
            call!(cuStreamSynchronize(s.side))?;
        }
        Ok(Some(at))
    }
    fn free(&self, at: u64, _: usize) {
        if self.0.bind().is_ok() {
            self.0.copies().forget(at);
            let _ = call!(cuMemFreeAsync(at, self.0.memory_stream()));
        }
    }
    fn trim(&self) {
        let s = &self.0;
        if s.bind().is_ok() && call!(cuStreamSynchronize(s.memory_stream())).is_ok() {
            let _ = call!(cuMemPoolTrimTo(s.pool, 0));
        }
    }
    fn upload(&self, src: &[u8], dst: u64) -> Result<()> {
        let s = &self.0;
        if s.recording() {
            return Err(uploads(src.len()));
        }
        s.bind()?;
        s.copies().upload(src, dst, s.stream)
    }
    fn retire(&self, at: u64) {
        let s = &self.0;
        // without an event, a copy waits for all that the compute stream was given
        if !s.recording() && s.bind().is_ok() {
            let _ = s.copies().retire(at, s.stream);
        }
    }
    fn download(&self, src: u64, dst: &mut [u8]) -> Result<()> {
        let s = &self.0;
        s.not_recording("a download")?;
        s.bind()?;
        call!(cuMemcpyDtoHAsync_v2(dst.as_mut_ptr().cast(), src, dst.len(), s.stream))?;
        s.wait()
    }
    fn fill(&self, dst: u64, element: &[u8], count: usize) -> Result<()> {
        self.0.bind()?;
        let stream = self.0.stream;
        match *element {
            [a] => call!(cuMemsetD8Async(dst, a, count, stream)),
            [a, b] => call!(cuMemsetD16Async(dst, u16::from_ne_bytes([a, b]), count, stream)),
            [a, b, c, d] => call!(cuMemsetD32Async(dst, u32::from_ne_bytes([a, b, c, d]), count, stream)),
            [a, b, c, d, e, f, g, h] => {
                let (low, high) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
                if low == high {
                    return call!(cuMemsetD32Async(dst, low, 2 * count, stream));
                }
                // every other word
                call!(cuMemsetD2D32Async(dst, 8, low, 1, count, stream))?;
                call!(cuMemsetD2D32Async(dst + 4, 8, high, 1, count, stream))
            }
            _ => Err(Error::invalid("cuda", format!("fill with an element of {} bytes; 1, 2, 4 and 8 are possible", element.len()))),
        }
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
        let entry = CString::new(k.entry()).map_err(|_| Error::invalid("cuda", format!("{k}: a zero byte in its name")))?;
        call!(cuModuleGetFunction(&mut f, module, entry.as_ptr()))?;
        let (mut offset, mut size) = (0, 0);
        call!(cuFuncGetParamInfo(f, 0, &mut offset, &mut size))?;
        if size != params {
            return Err(Error::invalid("cuda", format!("{k}: its parameters take {size} bytes in the source and {params} in Rust")));
        }
        // all that a block may have beside the static kind; set once, not per launch, because several threads may launch one kernel with different sizes
        let mut fixed = 0;
        call!(cuFuncGetAttribute(&mut fixed, sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, f))?;
        let dynamic = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        call!(cuFuncSetAttribute(f, dynamic, s.shared_limit as i32 - fixed))?;
        Ok(Function(f as usize))
    }
    fn launch(&self, k: &Kernel, f: Function, shape: Shape, params: &[u8]) -> Result<()> {
        let s = &self.0;
        s.bind()?;
        let f = f.0 as sys::CUfunction;
        let [x, y, z] = shape.grid;
        let context = || format!("launch of {k} with {shape:?}");
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
        let timed = || Event::with(sys::CUevent_flags_enum::CU_EVENT_DEFAULT);
        let (from, to) = (timed()?, timed()?);
        from.record(s.stream)?;
        Ok(Box::new(move || {
            to.record(s.stream)?;
            to.wait()?;
            to.since(&from)
        }))
    }
    fn begin_recording(&self) -> Result<()> {
        let s = &self.0;
        s.not_recording("a recording inside a recording")?;
        s.bind()?;
        // relaxed: loading a module or growing the pool on another stream is harmless here
        call!(cuStreamBeginCapture_v2(s.stream, sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_RELAXED))?;
        s.recording.store(true, Ordering::Release);
        Ok(())
    }
    fn end_recording(&self) -> Result<Box<dyn Recorded>> {
        let s = &self.0;
        s.bind()?;
        s.recording.store(false, Ordering::Release);
        let mut g = RealGraph { inner: s.clone(), graph: null_mut(), exec: null_mut(), launching: Mutex::new(()) };
        call!(cuStreamEndCapture(s.stream, &mut g.graph))?;
        call!(cuGraphInstantiateWithFlags(&mut g.exec, g.graph, 0))?;
        Ok(Box::new(g))
    }
}

struct RealGraph {
    inner: Arc<Inner>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    /// The driver wants a graph's calls one after another.
    launching: Mutex<()>,
}
// SAFETY: handles of the driver may be used from any thread.
unsafe impl Send for RealGraph {}
// SAFETY: as above.
unsafe impl Sync for RealGraph {}

impl Recorded for RealGraph {
    fn replay(&self) -> Result<()> {
        self.inner.bind()?;
        let _one = self.launching.lock().unwrap_or_else(|e| e.into_inner());
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
        // one that still runs is destroyed by the driver when it ends; its memory is freed on the stream that it runs on
        if self.inner.bind().is_err() {
            return;
        }
        if !self.exec.is_null() {
            let _ = call!(cuGraphExecDestroy(self.exec));
        }
        if !self.graph.is_null() {
            let _ = call!(cuGraphDestroy(self.graph));
        }
    }
}
