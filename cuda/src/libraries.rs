//! What of CUDA this machine has: the driver and the libraries that are looked for at run time.

use crate::compile::{nvrtc_version, present as loads};
use crate::driver::real;
use cudarc::{cublaslt::sys as lt, driver::sys as driver};
use engine::{Device, Error, Result};
use std::path::{Path, PathBuf};

/// A library that was looked for.
#[derive(Clone, Debug)]
pub struct Library {
    /// Its name without the suffix, `libnvrtc`.
    pub name: &'static str,
    /// Where it was found; none if it was not, or if the system does not tell.
    pub path: Option<PathBuf>,
    /// Why it can't be used, if so.
    pub missing: Option<String>,
}

/// Whether this machine has an NVIDIA GPU or its driver, usable or not.
pub fn present() -> bool {
    loads(driver::is_culib_present) || Path::new("/dev/nvidiactl").exists() || Path::new("/proc/driver/nvidia/gpus").exists()
}

/// The GPU with this number, if all that is needed to compute on it can be loaded; else an error that says what is missing.
pub fn usable(n: usize) -> Result<Device> {
    let device = crate::device(n)?;
    match libraries().into_iter().find_map(|l| l.missing) {
        Some(missing) => Err(Error::invalid("cuda", missing)),
        None => Ok(device),
    }
}

/// The newest version of CUDA that the driver knows, as (major, minor).
pub fn driver_version() -> Result<(i32, i32)> {
    real::version()
}

/// The driver's library, NVRTC and cublasLt.
pub fn libraries() -> Vec<Library> {
    let found = |name, missing: Option<String>| Library { name, path: if missing.is_none() { loaded(name) } else { None }, missing };
    let driver = real::count().err().map(|e| e.to_string());
    let nvrtc = nvrtc_version().err().map(|e| e.to_string());
    let blas = (!loads(lt::is_culib_present)).then(|| crate::driver::blas::MISSING.to_string());
    vec![found("libcuda", driver), found("libnvrtc", nvrtc), found("libcublasLt", blas)]
}

/// The file that a library of this name was loaded from.
fn loaded(name: &str) -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let start = format!("{name}.so");
    let file = |l: &str| l.find('/').map(|at| PathBuf::from(&l[at..]));
    maps.lines().filter_map(file).find(|p| p.file_name().is_some_and(|f| f.to_string_lossy().starts_with(&start)))
}
