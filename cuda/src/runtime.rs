//! The backend: memory, compiled kernels, launches.

use crate::compile::{self, Binary, Target};
use crate::driver::{Driver, Function, Shape, emulated::Emulated, real};
use crate::memory::{CudaBuffer, Memory, Stats};
use crate::plan::Plan;
use crate::{Check, Fault, Gemm, Kernel, Params, Ptr, cache};
use engine::{Backend, Buffer, Device, Error, Result};
use std::any::Any;
use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, RwLock};
use std::time::Duration;

/// A GPU, or the emulator of one. Cloning shares it.
#[derive(Clone)]
pub struct Cuda(Arc<Inner>);

struct Inner {
    driver: Arc<dyn Driver>,
    memory: Arc<Memory>,
    functions: RwLock<HashMap<Kernel, Arc<Slot>>>,
    hopper: bool,
    /// Wait after each launch, so that an error names its kernel: `TIDEGATE_CUDA_SYNC=1`.
    synchronous: bool,
    check: Mutex<Check>,
    plan: Plan,
    /// Where kernels report wrong data, once one is launched that can; and the messages by code.
    faults: Mutex<Option<CudaBuffer>>,
    messages: Mutex<Vec<(&'static str, &'static str)>>,
    model: String,
}

/// A kernel that was asked for: compiled and loaded by one thread, while other threads load others.
#[derive(Default)]
struct Slot {
    function: OnceLock<Function>,
    /// What was compiled ahead.
    code: Mutex<Option<Binary>>,
}

/// Bytes of the place where kernels report.
const FLAG: usize = 16;

thread_local! { static OP: Cell<Option<&'static str>> = const { Cell::new(None) } }

/// How many GPUs there are; an error that says why when the driver can't be used.
pub fn available() -> Result<usize> {
    real::count()
}

/// The GPU with this number: one instance per process. An error that says what is missing, never a panic, where there is none.
pub fn device(n: usize) -> Result<Device> {
    static OPEN: LazyLock<Mutex<HashMap<usize, Device>>> = LazyLock::new(Default::default);
    let mut open = OPEN.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(d) = open.get(&n) {
        return Ok(d.clone());
    }
    let driver = real::Real::open(n)?;
    let model = driver.model();
    let d = Device::new(Cuda::new(Arc::new(driver), model)?);
    open.insert(n, d.clone());
    Ok(d)
}

/// The emulator: one instance per process. Needs a host C++ compiler.
pub fn emulator() -> Result<Device> {
    static ONE: Mutex<Option<Device>> = Mutex::new(None);
    shared_emulator(&ONE, 80)
}

/// The emulator as a Hopper GPU: ops take their variants for it, since it is one of compute capability 9.0. One instance per process, another device than [`emulator`].
pub fn hopper_emulator() -> Result<Device> {
    static ONE: Mutex<Option<Device>> = Mutex::new(None);
    shared_emulator(&ONE, 90)
}

fn shared_emulator(one: &Mutex<Option<Device>>, arch: u32) -> Result<Device> {
    let mut one = one.lock().unwrap_or_else(|e| e.into_inner());
    if let Some(d) = &*one {
        return Ok(d.clone());
    }
    let d = new_emulator(4 << 30, arch)?;
    *one = Some(d.clone());
    Ok(d)
}

/// Another emulator, with so many bytes of memory.
pub fn emulator_with_memory(bytes: usize) -> Result<Device> {
    new_emulator(bytes, 80)
}

fn new_emulator(bytes: usize, arch: u32) -> Result<Device> {
    compile::host_compiler()?;
    Ok(Device::new(Cuda::new(Arc::new(Emulated::new(bytes, arch)), "emulator".into())?))
}

impl Cuda {
    fn new(driver: Arc<dyn Driver>, model: String) -> Result<Cuda> {
        let synchronous = std::env::var_os("TIDEGATE_CUDA_SYNC").is_some_and(|v| v == "1");
        let hopper = match std::env::var_os("TIDEGATE_CUDA_HOPPER").unwrap_or_default() {
            v if v.is_empty() => driver.arch() == 90,
            v if v == "off" => false,
            v => return Err(Error::invalid("cuda", format!("TIDEGATE_CUDA_HOPPER is {v:?}; `off` is possible"))),
        };
        let memory = Memory::new(driver.clone());
        Ok(Cuda(Arc::new(Inner {
            driver,
            hopper,
            memory,
            functions: Default::default(),
            synchronous,
            check: Mutex::new(Check::from_env()?),
            plan: Plan::default(),
            faults: Default::default(),
            messages: Default::default(),
            model,
        })))
    }
    /// The backend behind a device, if it is a GPU or the emulator.
    pub fn of(device: &Device) -> Result<&Cuda> {
        let b: &dyn Any = device.backend();
        b.downcast_ref().ok_or_else(|| Error::invalid("cuda", format!("asked for a CUDA device, found {}", device.name())))
    }
    pub(crate) fn driver(&self) -> &dyn Driver {
        &*self.0.driver
    }
    pub(crate) fn memory(&self) -> &Arc<Memory> {
        &self.0.memory
    }
    /// Remembers which op runs on this thread, for messages; called by [`cuda_kernel!`](crate::cuda_kernel).
    pub fn enter(&self, op: &'static str) {
        OP.set(Some(op));
    }
    /// The op that ran last on this thread.
    pub(crate) fn last_op() -> Option<&'static str> {
        OP.get()
    }
    /// What each op's outputs are checked for.
    pub fn check(&self) -> Check {
        *self.0.check.lock().unwrap_or_else(|e| e.into_inner())
    }
    /// Checks each op's outputs from now on, or no more.
    pub fn set_check(&self, check: Check) {
        *self.0.check.lock().unwrap_or_else(|e| e.into_inner()) = check;
    }
    pub(crate) fn planned(&self) -> &Plan {
        &self.0.plan
    }
    /// Whether work can be recorded: not in the modes that wait for it, which the error names.
    pub fn can_record(&self) -> Result<()> {
        self.0.plan.refuse("a recording")?;
        let what = match (self.0.synchronous, self.check()) {
            (true, _) => "TIDEGATE_CUDA_SYNC=1 waits after each kernel",
            (_, Check::Nan | Check::Finite) => "TIDEGATE_CUDA_CHECK reads what each op wrote",
            _ => return Ok(()),
        };
        Err(Error::invalid("cuda graph", format!("{what}, which can't be done while a step is recorded; unset it, or run the step without a graph")))
    }
    /// The card's name.
    pub fn model(&self) -> &str {
        &self.0.model
    }
    /// Whether kernels are emulated.
    pub fn is_emulator(&self) -> bool {
        self.0.driver.target() == Target::Host
    }
    /// Compute capability times ten, 90 on Hopper; what the emulator stands for, 80 or 90.
    pub fn arch(&self) -> u32 {
        self.0.driver.arch()
    }
    /// Whether ops take their variants for Hopper; `TIDEGATE_CUDA_HOPPER=off` has them take those for sm_80 there too, to compare.
    pub fn is_hopper(&self) -> bool {
        self.0.hopper
    }
    /// Multiprocessors.
    pub fn processors(&self) -> u32 {
        self.0.driver.processors()
    }
    /// Shared memory that a block can have, in bytes.
    pub fn shared_limit(&self) -> u32 {
        self.0.driver.shared_limit()
    }
    /// Free and total device memory, in bytes.
    pub fn device_memory(&self) -> Result<(usize, usize)> {
        self.0.driver.memory()
    }
    /// What tensors use and what is kept for reuse.
    pub fn stats(&self) -> Stats {
        self.0.memory.stats()
    }
    /// Counts the peak from what is in use now.
    pub fn reset_peak(&self) {
        self.0.memory.reset_peak()
    }
    /// Gives the memory that is kept for reuse back.
    pub fn trim(&self) {
        self.0.memory.trim()
    }
    /// The address of a buffer of this backend.
    pub fn address(b: &dyn Buffer) -> Result<Ptr> {
        let any: &dyn Any = b;
        let b: Option<&CudaBuffer> = any.downcast_ref();
        b.map(|b| Ptr(b.address())).ok_or_else(|| Error::invalid("cuda", "was handed a buffer of another device; move the tensor with to_device()"))
    }
    /// Memory for a kernel's intermediate results; dropping it after the launch is right, because whoever gets it next comes later in the stream.
    pub fn scratch(&self, bytes: usize) -> Result<(CudaBuffer, Ptr)> {
        let b = self.0.memory.alloc(bytes)?;
        let p = Ptr(b.address());
        Ok((b, p))
    }
    /// For a kernel that checks its data: `what` is wrong with them, when it tells so. The error comes at the next point that waits for the device
    /// (a download, a synchronisation), with the value that the kernel gave.
    pub fn fault(&self, op: &'static str, what: &'static str) -> Result<Fault> {
        let mut faults = self.0.faults.lock().unwrap_or_else(|e| e.into_inner());
        if faults.is_none() {
            let b = self.0.memory.alloc(FLAG)?;
            self.0.driver.fill(b.address(), &[0], FLAG)?;
            *faults = Some(b);
        }
        let mut messages = self.0.messages.lock().unwrap_or_else(|e| e.into_inner());
        let at = messages.iter().position(|m| *m == (op, what)).unwrap_or_else(|| {
            messages.push((op, what));
            messages.len() - 1
        });
        Ok(Fault { flag: Ptr(faults.as_ref().map_or(0, |b| b.address())), code: at as u32 + 1, unused: 0 })
    }
    /// The first fault that a kernel has told, which is then forgotten.
    fn told(&self) -> Result<()> {
        let faults = self.0.faults.lock().unwrap_or_else(|e| e.into_inner());
        let Some(b) = faults.as_ref() else { return Ok(()) };
        let mut flag = [0; FLAG];
        self.0.driver.download(b.address(), &mut flag)?;
        let word = |i: usize| i64::from_le_bytes(flag[8 * i..8 * i + 8].try_into().unwrap_or_default());
        let (code, value) = (word(0) as u32 as usize, word(1));
        if code == 0 {
            return Ok(());
        }
        self.0.driver.fill(b.address(), &[0], FLAG)?;
        let (op, what) = self.0.messages.lock().unwrap_or_else(|e| e.into_inner()).get(code - 1).copied().unwrap_or(("cuda", "unknown fault"));
        Err(Error::invalid(op, format!("{what}: {value}")))
    }
    /// Waits for the device, and gives what went wrong there.
    pub(crate) fn finished(&self) -> Result<()> {
        self.0.plan.refuse("waiting for the device")?;
        self.0.driver.synchronize()?;
        self.told()
    }
    /// Sets bytes.
    pub fn fill(&self, at: Ptr, byte: u8, bytes: usize) -> Result<()> {
        if bytes == 0 || self.0.plan.on() { Ok(()) } else { self.0.driver.fill(at.0, &[byte], bytes) }
    }
    /// Copies bytes within the device.
    pub fn copy(&self, from: Ptr, to: Ptr, bytes: usize) -> Result<()> {
        if bytes == 0 || self.0.plan.on() { Ok(()) } else { self.0.driver.copy(from.0, to.0, bytes) }
    }
    /// A matrix product; with k = 0 it gives zeros.
    pub fn gemm(&self, g: &Gemm) -> Result<()> {
        if g.m == 0 || g.n == 0 || g.batch == 0 || self.0.plan.on() {
            return Ok(());
        }
        if g.k == 0 {
            if g.accumulate {
                return Ok(());
            }
            let size = g.c_dtype.size();
            return (0..g.batch * g.m).try_for_each(|i| {
                let at = (i / g.m * g.c_stride + i % g.m * g.c_ld) * size;
                self.fill(Ptr(g.c).byte_add(at), 0, g.n * size)
            });
        }
        self.0.driver.gemm(g)?;
        self.settle()
    }
    fn settle(&self) -> Result<()> {
        if self.0.synchronous { self.0.driver.synchronize() } else { Ok(()) }
    }
    /// Launches a kernel over `grid` blocks with `shared` bytes of dynamic shared memory; nothing happens when the grid is empty. The first launch of a
    /// kernel compiles it, unless the cache has it.
    pub fn launch<P: Params>(&self, k: &Kernel, grid: [u32; 3], shared: u32, params: &P) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let shape = Shape { grid, threads: k.threads, shared };
        let limit = self.shared_limit();
        if k.threads == 0
            || k.threads > 1024
            || !k.threads.is_multiple_of(32)
            || grid[0] > i32::MAX as u32
            || grid[1] > 65535
            || grid[2] > 65535
            || shared > limit
        {
            let msg = format!(
                "{k} can't be launched with {shape:?}: blocks have 32 to 1024 threads (a multiple of 32), grids at most 2³¹ − 1, 65535 and 65535 blocks, \
                 blocks at most {limit} bytes of shared memory"
            );
            return Err(Error::invalid("cuda", msg));
        }
        if self.0.plan.on() {
            self.0.plan.note(k);
            return Ok(());
        }
        let known = self.0.functions.read().unwrap_or_else(|e| e.into_inner()).get(k).and_then(|s| s.function.get().copied());
        let f = match known {
            Some(f) => f,
            None => self.load(k, size_of::<P>())?,
        };
        // SAFETY: `Params` are plain data; padding, if any, is copied and not looked at.
        let bytes = unsafe { std::slice::from_raw_parts((params as *const P).cast::<u8>(), size_of::<P>()) };
        self.0.driver.launch(k, f, shape, bytes)?;
        self.settle().map_err(|e| Error::invalid("cuda", format!("{k} with {shape:?}: {e}")))
    }
    fn slot(&self, k: &Kernel) -> Arc<Slot> {
        self.0.functions.write().unwrap_or_else(|e| e.into_inner()).entry(k.clone()).or_default().clone()
    }
    fn load(&self, k: &Kernel, params: usize) -> Result<Function> {
        let slot = self.slot(k);
        let mut code = slot.code.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(f) = slot.function.get() {
            return Ok(*f);
        }
        if !k.is_listed() {
            return Err(Error::invalid("cuda", format!("{k} is not in its source's list of kernels, so the compile test does not see it")));
        }
        let driver = &self.0.driver;
        let target = driver.target();
        let file = cache::path(compile::key(k, target)?, compile::extension(target));
        let ready = code.take().map_or_else(|| compile::compile(k, target), Ok)?;
        let f = match driver.load(k, &ready, file.as_deref(), params) {
            Ok(f) => f,
            Err(first) => {
                // an entry that is whole but can't be loaded here
                let Some(file) = file.filter(|f| f.exists()) else { return Err(first) };
                let code = compile::compile_afresh(k, target)?;
                let _ = std::fs::remove_file(&file);
                let _ = cache::write(&file, &code);
                driver.load(k, &code, Some(&file), params)?
            }
        };
        Ok(*slot.function.get_or_init(|| f))
    }
    /// Compiles kernels, several at a time, ahead of their first launch; those in the cache are read from there.
    pub fn prepare(&self, kernels: &[Kernel]) -> Result<()> {
        let target = self.0.driver.target();
        let fit: Vec<Kernel> = kernels.iter().filter(|k| k.fits(target)).cloned().collect();
        for (k, code) in fit.iter().zip(compile::compile_all(&fit, target)) {
            let slot = self.slot(k);
            if slot.function.get().is_none() {
                *slot.code.lock().unwrap_or_else(|e| e.into_inner()) = Some(code?);
            }
        }
        Ok(())
    }
    /// The device's time for what `f` submits.
    pub fn time<R>(&self, f: impl FnOnce() -> Result<R>) -> Result<(R, Duration)> {
        let stop = self.0.driver.timer()?;
        let r = f()?;
        Ok((r, stop()?))
    }
}

impl Backend for Cuda {
    fn name(&self) -> String {
        self.0.driver.name()
    }
    fn alloc(&self, bytes: usize) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(self.0.memory.alloc(bytes)?))
    }
    fn upload(&self, src: &[u8]) -> Result<Arc<dyn Buffer>> {
        let dst = self.0.memory.alloc_for_upload(src.len())?;
        if !src.is_empty() {
            self.0.driver.upload(src, dst.address())?;
        }
        Ok(Arc::new(dst))
    }
    fn fill(&self, dst: &dyn Buffer, element: &[u8]) -> Result<()> {
        let count = dst.bytes() / element.len().max(1);
        if count == 0 { Ok(()) } else { self.0.driver.fill(Cuda::address(dst)?.0, element, count) }
    }
    fn download(&self, src: &dyn Buffer, dst: &mut [u8]) -> Result<()> {
        self.0.plan.refuse("a download")?;
        if dst.len() > src.bytes() {
            return Err(Error::invalid("cuda", format!("download of {} bytes from a block of {}", dst.len(), src.bytes())));
        }
        if !dst.is_empty() {
            self.0.driver.download(Cuda::address(src)?.0, dst)?;
        }
        self.told()
    }
    fn synchronize(&self) -> Result<()> {
        self.finished()
    }
}
