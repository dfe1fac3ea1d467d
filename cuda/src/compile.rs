//! Kernels compiled at run time: by NVRTC to a cubin, or by a host C++ compiler for the emulator.

use crate::cache;
use crate::kernel::Kernel;
use cudarc::nvrtc::sys as nvrtc;
use engine::{Error, Result};
use std::ffi::{CStr, CString};
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex};
use std::{env, fs, process};

/// The headers that every kernel may include.
const HEADERS: [(&str, &str); 3] = [
    ("tidegate.cuh", include_str!("device/tidegate.cuh")),
    ("tile.cuh", include_str!("device/tile.cuh")),
    ("hopper.cuh", include_str!("device/hopper.cuh")),
];
const EMULATOR: [(&str, &str); 2] =
    [("emulator.h", include_str!("device/emulator.h")), ("hopper_emulator.h", include_str!("device/hopper_emulator.h"))];

/// What code is made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// A GPU of this compute capability, times ten (90 compiles for sm_90a).
    Gpu(u32),
    /// The emulator on this machine.
    Host,
}

/// Compiled code and what the compiler said.
pub struct Binary {
    /// A cubin, or a shared library.
    pub code: Vec<u8>,
    /// With ptxas's report of registers and spills.
    pub log: String,
}

fn error(msg: String) -> Error {
    Error::invalid("cuda", msg)
}

/// Loads libraries from the folders in `TIDEGATE_CUDA_LIBS`, so that the dynamic linker finds them by name afterwards.
fn preload() {
    static ONCE: LazyLock<()> = LazyLock::new(|| {
        let Some(folders) = env::var_os("TIDEGATE_CUDA_LIBS") else { return };
        // builtins before what opens them by name, libraries before those that need them
        let order = ["libnvrtc-builtins.so.", "libnvrtc.so.", "libcublasLt.so.", "libcublas.so."];
        for folder in env::split_paths(&folders) {
            let mut files: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().map(|f| f.path()).collect();
            files.sort();
            for start in order {
                for f in files.iter().filter(|f| f.file_name().is_some_and(|n| n.to_string_lossy().starts_with(start))) {
                    let f = fs::canonicalize(f).unwrap_or(f.clone());
                    #[cfg(unix)]
                    // SAFETY: these libraries' initialisers have no preconditions.
                    if let Ok(l) =
                        unsafe { libloading::os::unix::Library::open(Some(&f), libloading::os::unix::RTLD_NOW | libloading::os::unix::RTLD_GLOBAL) }
                    {
                        std::mem::forget(l);
                    }
                }
            }
        }
    });
    *ONCE
}

/// Whether a library of CUDA can be loaded, asked before any of its functions is called: cudarc panics otherwise.
pub(crate) fn present(check: unsafe fn() -> bool) -> bool {
    preload();
    // SAFETY: only tries to open the library.
    unsafe { check() }
}

/// NVRTC's version, or why there is none.
pub fn nvrtc_version() -> Result<(i32, i32)> {
    if !present(nvrtc::is_culib_present) {
        let how = "libnvrtc is not found: install the CUDA toolkit or `pip install nvidia-cuda-nvrtc==13.0.88`, and name its lib folder in TIDEGATE_CUDA_LIBS";
        return Err(error(how.into()));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library is there; the pointers are valid.
    check(unsafe { nvrtc::nvrtcVersion(&mut major, &mut minor) }, "nvrtcVersion")?;
    Ok((major, minor))
}

fn check(r: nvrtc::nvrtcResult, what: &str) -> Result<()> {
    if r == nvrtc::nvrtcResult::NVRTC_SUCCESS { Ok(()) } else { Err(error(format!("{what} failed: {r:?}"))) }
}

/// The host C++ compiler, or why there is none.
pub fn host_compiler() -> Result<String> {
    static FOUND: LazyLock<Option<String>> = LazyLock::new(|| {
        let works = |c: &String| process::Command::new(c).arg("--version").output().is_ok_and(|o| o.status.success());
        env::var("CXX").ok().into_iter().chain(["g++", "clang++", "c++"].map(String::from)).find(works)
    });
    FOUND
        .clone()
        .ok_or_else(|| error("the emulator compiles kernels with a host C++ compiler, and none of $CXX, g++, clang++ and c++ runs here".into()))
}

/// Options; part of the cache key.
fn options(target: Target) -> Vec<String> {
    let fixed: &[&str] = match target {
        Target::Gpu(_) => &["--std=c++17", "-default-device", "-lineinfo", "--ptxas-options=-v"],
        Target::Host => &[
            "-std=c++17",
            "-O2",
            "-shared",
            "-fPIC",
            "-fno-strict-aliasing",
            "-ffp-contract=off",
            "-fno-gnu-unique",
            "-w",
            "-DTG_EMULATE",
            "-x",
            "c++",
        ],
    };
    let mut v: Vec<String> = fixed.iter().map(|s| s.to_string()).collect();
    match target {
        Target::Gpu(arch) => v.push(format!("--gpu-architecture=sm_{arch}{}", if arch == 90 { "a" } else { "" })),
        Target::Host =>
        {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                v.extend(["-mavx2".into(), "-mfma".into()]);
            }
        }
    }
    v
}

/// The source with its entry point.
fn text(k: &Kernel) -> String {
    format!("{}\nTG_ENTRY({}, {}, {}, {})\n", k.source.text, k.entry(), k.threads, k.min_blocks, k.call)
}

fn headers(k: &Kernel, target: Target) -> Vec<(&'static str, &'static str)> {
    // a header may lie in another folder: sources include it by its file name
    let own = k.source.headers.iter().map(|(path, text)| (path.rsplit('/').next().unwrap_or(path), *text));
    HEADERS.into_iter().chain(EMULATOR.into_iter().filter(|_| target == Target::Host)).chain(own).collect()
}

/// What the code depends on.
pub(crate) fn key(k: &Kernel, target: Target) -> Result<u128> {
    let version = match target {
        Target::Gpu(_) => format!("nvrtc {:?}", nvrtc_version()?),
        Target::Host => format!("{} {}", host_compiler()?, env::consts::ARCH),
    };
    let (text, options) = (text(k), options(target).join(" "));
    let headers = headers(k, target);
    let mut parts: Vec<&[u8]> = vec![text.as_bytes(), options.as_bytes(), version.as_bytes()];
    parts.extend(headers.iter().flat_map(|(n, t)| [n.as_bytes(), t.as_bytes()]));
    Ok(cache::hash(&parts))
}

/// The file name of an entry in the cache.
pub(crate) fn extension(target: Target) -> &'static str {
    if target == Target::Host { "so" } else { "cubin" }
}

/// Compiled code from the cache, or freshly compiled and put there.
pub fn compile(k: &Kernel, target: Target) -> Result<Binary> {
    let path = cache::path(key(k, target)?, extension(target));
    if let Some(b) = path.as_deref().and_then(cache::read) {
        return Ok(b);
    }
    let b = compile_afresh(k, target)?;
    // a folder that can't be written costs time, not correctness
    path.map(|p| cache::write(&p, &b));
    Ok(b)
}

/// Compiled code, whatever the cache holds.
pub fn compile_afresh(k: &Kernel, target: Target) -> Result<Binary> {
    match target {
        _ if !k.fits(target) => Err(error(format!("{k} is for compute capability {} alone, asked for {target:?}", k.arch))),
        Target::Gpu(_) => by_nvrtc(k, target),
        Target::Host => by_host(k),
    }
}

/// Compiles all, several at a time; results in order.
pub fn compile_all(kernels: &[Kernel], target: Target) -> Vec<Result<Binary>> {
    let results: Vec<Mutex<Option<Result<Binary>>>> = kernels.iter().map(|_| Mutex::new(None)).collect();
    let next = std::sync::atomic::AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get()).min(kernels.len());
    std::thread::scope(|s| {
        for _ in 0..workers {
            s.spawn(|| {
                while let Some(i) = Some(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)).filter(|i| *i < kernels.len()) {
                    *results[i].lock().unwrap_or_else(|e| e.into_inner()) = Some(compile(&kernels[i], target));
                }
            });
        }
    });
    let taken =
        |m: Mutex<Option<Result<Binary>>>| m.into_inner().unwrap_or_else(|e| e.into_inner()).unwrap_or_else(|| Err(error("not compiled".into())));
    results.into_iter().map(taken).collect()
}

fn by_nvrtc(k: &Kernel, target: Target) -> Result<Binary> {
    nvrtc_version()?;
    let c = |s: &str| CString::new(s).map_err(|_| error(format!("{k}: a source holds a zero byte")));
    let (src, name, headers) = (text(k), c(k.source.name)?, headers(k, target));
    let csrc = c(&src)?;
    let names = headers.iter().map(|h| c(h.0)).collect::<Result<Vec<_>>>()?;
    let texts = headers.iter().map(|h| c(h.1)).collect::<Result<Vec<_>>>()?;
    let options = options(target).iter().map(|o| c(o)).collect::<Result<Vec<_>>>()?;
    let pointers = |v: &[CString]| v.iter().map(|s| s.as_ptr()).collect::<Vec<_>>();
    struct Program(nvrtc::nvrtcProgram);
    impl Drop for Program {
        fn drop(&mut self) {
            // SAFETY: created below and not destroyed before.
            unsafe { nvrtc::nvrtcDestroyProgram(&mut self.0) };
        }
    }
    let mut p = Program(std::ptr::null_mut());
    let (names, texts, options) = (pointers(&names), pointers(&texts), pointers(&options));
    // SAFETY: strings and arrays outlive the calls; sizes are those that NVRTC gave.
    unsafe {
        let n = headers.len() as i32;
        check(nvrtc::nvrtcCreateProgram(&mut p.0, csrc.as_ptr(), name.as_ptr(), n, texts.as_ptr(), names.as_ptr()), "nvrtcCreateProgram")?;
        let r = nvrtc::nvrtcCompileProgram(p.0, options.len() as i32, options.as_ptr());
        let mut size = 0;
        check(nvrtc::nvrtcGetProgramLogSize(p.0, &mut size), "nvrtcGetProgramLogSize")?;
        let mut log = vec![0u8; size.max(1)];
        check(nvrtc::nvrtcGetProgramLog(p.0, log.as_mut_ptr().cast()), "nvrtcGetProgramLog")?;
        let log = CStr::from_bytes_until_nul(&log).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        if r != nvrtc::nvrtcResult::NVRTC_SUCCESS {
            return Err(error(explain(k, target, &src, &log)));
        }
        check(nvrtc::nvrtcGetCUBINSize(p.0, &mut size), "nvrtcGetCUBINSize")?;
        let mut code = vec![0u8; size];
        check(nvrtc::nvrtcGetCUBIN(p.0, code.as_mut_ptr().cast()), "nvrtcGetCUBIN")?;
        Ok(Binary { code, log })
    }
}

fn by_host(k: &Kernel) -> Result<Binary> {
    static N: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    struct Folder(PathBuf);
    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
    let compiler = host_compiler()?;
    let n = N.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let folder = Folder(env::temp_dir().join(format!("tidegate-emulator-{}-{n}", process::id())));
    let src = text(k);
    let io = |e: std::io::Error| error(format!("compiling {k} for the emulator in {}: {e}", folder.0.display()));
    fs::create_dir_all(&folder.0).map_err(io)?;
    let file = k.source.name.rsplit('/').next().unwrap_or(k.source.name);
    for (name, text) in headers(k, Target::Host).into_iter().chain([(file, src.as_str())]) {
        fs::write(folder.0.join(name), text).map_err(io)?;
    }
    let out =
        process::Command::new(&compiler).args(options(Target::Host)).arg(file).args(["-o", "out.so"]).current_dir(&folder.0).output().map_err(io)?;
    let log = String::from_utf8_lossy(&out.stderr).into_owned();
    if !out.status.success() {
        return Err(error(explain(k, Target::Host, &src, &log)));
    }
    Ok(Binary { code: fs::read(folder.0.join("out.so")).map_err(io)?, log })
}

/// A compiler's log with the source lines that it names.
fn explain(k: &Kernel, target: Target, src: &str, log: &str) -> String {
    let file = k.source.name.rsplit('/').next().unwrap_or(k.source.name);
    let headers = headers(k, target);
    let mut shown = std::collections::BTreeSet::new();
    for line in log.lines().filter(|l| l.contains("error")) {
        // NVRTC says `name(12): error`, GCC and clang `name:12:5: error`
        let Some((name, rest)) = line.split_once(['(', ':']) else { continue };
        let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
        let Ok(n) = number.parse::<usize>() else { continue };
        let name = name.rsplit('/').next().unwrap_or(name);
        for i in n.saturating_sub(2)..=n + 2 {
            shown.insert((name.to_string(), i));
        }
    }
    let mut msg = format!("{k} does not compile for {target:?} with {}\n{}\n", options(target).join(" "), log.trim_end());
    for (name, i) in shown {
        let text = if name == file { Some(src) } else { headers.iter().find(|h| h.0 == name).map(|h| h.1) };
        if let Some(line) = text.and_then(|t| t.lines().nth(i.wrapping_sub(1))) {
            msg += &format!("{name} {i:4} | {line}\n");
        }
    }
    msg
}

/// What ptxas says of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of stack frame.
    pub stack: u32,
    /// Bytes spilled.
    pub spill_stores: u32,
    /// Bytes read back.
    pub spill_loads: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
}

/// Reads ptxas's report (`--ptxas-options=-v`) of the entry point.
pub fn resources(log: &str) -> Option<Resources> {
    let before = |line: &str, what: &str| -> Option<u32> { line.split(what).next()?.rsplit([' ', ',']).find(|s| !s.is_empty())?.parse().ok() };
    let mut r = Resources::default();
    let mut at_entry = false;
    let mut found = false;
    for line in log.lines() {
        if line.contains("Function properties for") || line.contains("Compiling entry function") {
            at_entry = line.contains("tg_");
        }
        if at_entry && line.contains("bytes stack frame") {
            r.stack = before(line, " bytes stack frame")?;
            r.spill_stores = before(line, " bytes spill stores")?;
            r.spill_loads = before(line, " bytes spill loads")?;
        }
        if at_entry && line.contains("Used ") && line.contains(" registers") {
            r.registers = before(line, " registers")?;
            r.shared = if line.contains(" bytes smem") { before(line, " bytes smem")? } else { 0 };
            found = true;
        }
    }
    found.then_some(r)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let log = "ptxas info    : 0 bytes gmem\nptxas info    : Compiling entry function 'tg_fill_f32' for 'sm_90a'\nptxas info    : Function properties for tg_fill_f32\n    \
                   16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\nptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem\n";
        let want = Resources { registers: 40, stack: 16, spill_stores: 8, spill_loads: 4, shared: 128 };
        assert_eq!(resources(log), Some(want));
        assert_eq!(resources("nothing"), None);
    }
}
