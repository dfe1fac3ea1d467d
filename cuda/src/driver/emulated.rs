//! Kernels compiled by a host C++ compiler, memory of the host.

use super::{Driver, Function, Recorded, Shape, uploads, waits};
use crate::compile::{Binary, Target};
use crate::{Gemm, Kernel};
use engine::{Error, Result};
use std::alloc::{self, Layout};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// As of cudaMalloc.
const ALIGN: usize = 256;
/// Bytes after each block that a kernel must leave alone.
const GUARD: usize = 256;
/// Fresh memory and guards: NaN as any float.
const FILL: u8 = 0xff;

type Entry = unsafe extern "C" fn(*const u8, *const u32, u32, u32, *mut c_char, usize) -> i32;

#[derive(Clone, Copy)]
struct Loaded {
    entry: Entry,
}

#[derive(Clone)]
enum Command {
    Launch(Kernel, Loaded, Shape, Vec<u8>),
    Gemm(Gemm),
    Fill(u64, Vec<u8>, usize),
    Copy(u64, u64, usize),
}

#[derive(Default)]
struct State {
    functions: Vec<Loaded>,
    libraries: Vec<libloading::Library>,
    blocks: BTreeMap<u64, usize>,
    used: usize,
    recording: Option<Vec<Command>>,
}

pub(crate) struct Emulated {
    limit: usize,
    arch: u32,
    state: Arc<Mutex<State>>,
}

fn lock(s: &Mutex<State>) -> MutexGuard<'_, State> {
    s.lock().unwrap_or_else(|e| e.into_inner())
}

impl Emulated {
    /// With so many bytes of memory, standing for a GPU of this compute capability.
    pub fn new(limit: usize, arch: u32) -> Self {
        Emulated { limit, arch, state: Default::default() }
    }
    /// Runs a command, or records it while recording.
    fn submit(&self, c: Command) -> Result<()> {
        if let Some(r) = &mut lock(&self.state).recording {
            r.push(c);
            return Ok(());
        }
        run(&self.state, &c)
    }
    fn not_recording(&self, what: &str) -> Result<()> {
        if lock(&self.state).recording.is_some() { Err(waits(what)) } else { Ok(()) }
    }
}

fn run(state: &Mutex<State>, c: &Command) -> Result<()> {
    match c {
        Command::Launch(k, f, shape, params) => {
            let mut message = [0 as c_char; 512];
            // parameters are aligned as any struct
            let mut words = vec![0u128; params.len().div_ceil(16)];
            // SAFETY: the words hold at least as many bytes; the entry point was compiled for parameters of this size and writes at most 512 bytes of text.
            let r = unsafe {
                std::ptr::copy_nonoverlapping(params.as_ptr(), words.as_mut_ptr().cast(), params.len());
                (f.entry)(words.as_ptr().cast(), shape.grid.as_ptr(), shape.threads, shape.shared, message.as_mut_ptr(), message.len())
            };
            if r != 0 {
                // SAFETY: the entry point ends its text with a zero.
                let m = unsafe { CStr::from_ptr(message.as_ptr()) }.to_string_lossy().into_owned();
                return Err(Error::invalid("cuda emulator", format!("{k} with {shape:?}: {m}")));
            }
            guards(state, k, params)
        }
        Command::Gemm(g) => {
            g.on_host();
            Ok(())
        }
        // SAFETY (both): the runtime hands out addresses of its own blocks, which hold as many bytes.
        Command::Fill(dst, element, n) => {
            let all = unsafe { std::slice::from_raw_parts_mut(*dst as *mut u8, element.len() * n) };
            all.chunks_exact_mut(element.len()).for_each(|e| e.copy_from_slice(element));
            Ok(())
        }
        Command::Copy(src, dst, n) => {
            unsafe { std::ptr::copy(*src as *const u8, *dst as *mut u8, *n) };
            Ok(())
        }
    }
}

/// Whether a kernel wrote past one of the blocks that its parameters point into.
fn guards(state: &Mutex<State>, k: &Kernel, params: &[u8]) -> Result<()> {
    let s = lock(state);
    for word in params.chunks_exact(8) {
        let at = u64::from_ne_bytes(word.try_into().unwrap_or_default());
        let Some((start, n)) = s.blocks.range(..=at).next_back().filter(|(start, n)| at < **start + **n as u64) else { continue };
        // SAFETY: each block was allocated with a guard after it, and lives while it is listed.
        let guard = unsafe { std::slice::from_raw_parts_mut((*start as *mut u8).add(*n), GUARD) };
        if guard.iter().any(|b| *b != FILL) {
            guard.fill(FILL);
            return Err(Error::invalid("cuda emulator", format!("{k} wrote past the end of a block of {n} bytes")));
        }
    }
    Ok(())
}

impl Driver for Emulated {
    fn name(&self) -> String {
        "cuda emulator".into()
    }
    fn target(&self) -> Target {
        Target::Host
    }
    fn arch(&self) -> u32 {
        self.arch
    }
    fn processors(&self) -> u32 {
        // few, so that kernels that loop over work do loop at small shapes
        4
    }
    fn shared_limit(&self) -> u32 {
        227 * 1024
    }
    fn memory(&self) -> Result<(usize, usize)> {
        Ok((self.limit.saturating_sub(lock(&self.state).used), self.limit))
    }
    fn alloc(&self, bytes: usize) -> Result<Option<u64>> {
        let mut s = lock(&self.state);
        let layout = bytes.checked_add(GUARD).and_then(|n| Layout::from_size_align(n, ALIGN).ok());
        let Some(layout) = layout.filter(|_| s.used + bytes <= self.limit) else { return Ok(None) };
        // SAFETY: the size is not zero.
        let p = unsafe { alloc::alloc(layout) };
        if p.is_null() {
            return Ok(None);
        }
        // SAFETY: freshly allocated with this size.
        unsafe { std::ptr::write_bytes(p, FILL, bytes + GUARD) };
        s.used += bytes;
        s.blocks.insert(p as u64, bytes);
        Ok(Some(p as u64))
    }
    fn free(&self, at: u64, bytes: usize) {
        let mut s = lock(&self.state);
        if s.blocks.remove(&at).is_some() {
            s.used -= bytes;
            // SAFETY: allocated above with this size and alignment.
            unsafe { alloc::dealloc(at as *mut u8, Layout::from_size_align_unchecked(bytes + GUARD, ALIGN)) };
        }
    }
    fn trim(&self) {}
    fn upload(&self, src: &[u8], dst: u64) -> Result<()> {
        if lock(&self.state).recording.is_some() {
            return Err(uploads(src.len()));
        }
        // SAFETY: as in `run`.
        unsafe { std::ptr::copy_nonoverlapping(src.as_ptr(), dst as *mut u8, src.len()) };
        Ok(())
    }
    /// Nothing to wait for: commands run at once.
    fn retire(&self, _: u64) {}
    fn download(&self, src: u64, dst: &mut [u8]) -> Result<()> {
        self.not_recording("a download")?;
        // SAFETY: as in `run`.
        unsafe { std::ptr::copy_nonoverlapping(src as *const u8, dst.as_mut_ptr(), dst.len()) };
        Ok(())
    }
    fn fill(&self, dst: u64, element: &[u8], count: usize) -> Result<()> {
        self.submit(Command::Fill(dst, element.to_vec(), count))
    }
    fn copy(&self, src: u64, dst: u64, bytes: usize) -> Result<()> {
        self.submit(Command::Copy(src, dst, bytes))
    }
    fn load(&self, k: &Kernel, code: &Binary, file: Option<&Path>, params: usize) -> Result<Function> {
        let fail = |e: &dyn std::fmt::Display| Error::invalid("cuda emulator", format!("{k} can't be loaded: {e}"));
        let temporary = std::env::temp_dir().join(format!("tidegate-{}-{:p}.so", std::process::id(), code.code.as_ptr()));
        let path = match file {
            Some(f) if f.exists() => f,
            _ => {
                std::fs::write(&temporary, &code.code).map_err(|e| fail(&e))?;
                &temporary
            }
        };
        // SAFETY: the library was compiled from our own source, whose initialisers have no preconditions.
        let lib = unsafe { libloading::Library::new(path) };
        if path == temporary {
            let _ = std::fs::remove_file(&temporary);
        }
        let lib = lib.map_err(|e| fail(&e))?;
        // SAFETY: TG_ENTRY defines both with these types.
        let (entry, size) = unsafe {
            let size = lib.get::<unsafe extern "C" fn() -> u32>(b"tg_params_size\0").map_err(|e| fail(&e))?();
            (*lib.get::<Entry>(b"tg_entry\0").map_err(|e| fail(&e))?, size as usize)
        };
        if size != params {
            return Err(fail(&format!("its parameters take {size} bytes in the source and {params} in Rust")));
        }
        let mut s = lock(&self.state);
        s.libraries.push(lib);
        s.functions.push(Loaded { entry });
        Ok(Function(s.functions.len() - 1))
    }
    fn launch(&self, k: &Kernel, f: Function, shape: Shape, params: &[u8]) -> Result<()> {
        let f = lock(&self.state).functions[f.0];
        self.submit(Command::Launch(k.clone(), f, shape, params.to_vec()))
    }
    fn gemm(&self, g: &Gemm) -> Result<()> {
        self.submit(Command::Gemm(*g))
    }
    fn synchronize(&self) -> Result<()> {
        self.not_recording("a synchronisation")
    }
    fn timer(&self) -> Result<Box<dyn FnOnce() -> Result<Duration> + '_>> {
        self.not_recording("timing")?;
        let t = Instant::now();
        Ok(Box::new(move || Ok(t.elapsed())))
    }
    fn begin_recording(&self) -> Result<()> {
        self.not_recording("a recording inside a recording")?;
        lock(&self.state).recording = Some(vec![]);
        Ok(())
    }
    fn end_recording(&self) -> Result<Box<dyn Recorded>> {
        let commands = lock(&self.state).recording.take().unwrap_or_default();
        Ok(Box::new(Recording { state: self.state.clone(), commands }))
    }
}

struct Recording {
    state: Arc<Mutex<State>>,
    commands: Vec<Command>,
}

impl Recorded for Recording {
    fn replay(&self) -> Result<()> {
        self.commands.iter().try_for_each(|c| run(&self.state, c))
    }
    fn len(&self) -> usize {
        self.commands.len()
    }
}
