//! `tidegate doctor`: what machine this is, and whether every operation gives the right numbers on it.

use super::bench::Clock;
use super::device::{Choice, DeviceArg, describe};
use super::out;
use crate::{Error, Result};
use cuda::Cuda;
use engine::{DType, Device, Tensor, no_grad};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    at: DeviceArg,
}

/// The largest relative error of a kernel to its f64 reference that passes.
fn bound(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 0.02 }
}

/// What was found wrong: a name for the summary.
type Failures = Vec<String>;

fn fail(failures: &mut Failures, what: &str, why: &str) -> Result<()> {
    failures.push(what.to_string());
    out(&format!("FAILED   {what:<30} {why}"))
}

pub(super) fn run(args: &Args) -> Result<()> {
    let mut failures = vec![];
    machine()?;
    let devices = match args.at.device {
        Choice::Auto => {
            cuda_machine()?;
            let mut devices = vec![Device::cpu()];
            devices.extend(gpus(&mut failures)?);
            devices
        }
        Choice::Cpu => vec![Device::cpu()],
        _ => {
            cuda_machine()?;
            vec![args.at.open()?]
        }
    };
    for device in &devices {
        card(device, &mut failures)?;
        let dtypes: &[DType] = if *device == Device::cpu() { &[DType::F32] } else { &[DType::F32, DType::BF16] };
        for dtype in dtypes {
            test(device, *dtype, &mut failures)?;
        }
    }
    if failures.is_empty() { Ok(()) } else { Err(Error::Model(format!("not as it should be: {}; please report this machine", failures.join(", ")))) }
}

fn gib(bytes: f64) -> f64 {
    bytes / (1u64 << 30) as f64
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(':')).map(|(_, n)| n.trim().to_string());
    name.unwrap_or_else(|| "CPU of unknown name".into())
}

fn machine() -> Result<()> {
    out(&format!("tidegate {} on {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH))?;
    let memory = engine::cpu::system_memory().map_or(String::new(), |b| format!(", {:.1} GiB memory", gib(b as f64)));
    out(&format!("machine  {}{memory}", cpu()))?;
    out(&format!("vectors  {:?}", engine::cpu::simd::level()))?;
    out(&format!("threads  {} (RAYON_NUM_THREADS sets them; results don't depend on it)", rayon::current_num_threads()))
}

/// The driver and the libraries of CUDA, and where they lie.
fn cuda_machine() -> Result<()> {
    let driver = match cuda::driver_version() {
        Ok((major, minor)) => {
            let module = std::fs::read_to_string("/sys/module/nvidia/version").unwrap_or_default();
            let version = if module.trim().is_empty() { String::new() } else { format!("{}, ", module.trim()) };
            format!("{version}CUDA {major}.{minor}")
        }
        Err(e) => format!("none: {}", plain(&e.to_string())),
    };
    out(&format!("driver   {driver}"))?;
    for l in cuda::libraries() {
        let at = l.path.map_or("found".into(), |p| p.display().to_string());
        // the driver's absence was told above
        if l.name != "libcuda" || l.missing.is_none() {
            out(&format!("library  {:<12} {}", l.name, l.missing.as_deref().map_or(at.as_str(), plain)))?;
        }
    }
    Ok(())
}

/// A message without the op that it came from.
fn plain(message: &str) -> &str {
    message.strip_prefix("cuda: ").unwrap_or(message)
}

/// All GPUs that can be used. None is no failure where there is no driver.
fn gpus(failures: &mut Failures) -> Result<Vec<Device>> {
    let found = match cuda::available() {
        Ok(n) => n,
        Err(_) if !cuda::present() => return Ok(vec![]),
        Err(e) => return fail(failures, "CUDA driver", &e.to_string()).map(|()| vec![]),
    };
    if found == 0 {
        out("device   the CUDA driver finds no GPU")?;
    }
    let mut usable = vec![];
    for n in 0..found {
        match cuda::usable(n) {
            Ok(d) => usable.push(d),
            Err(e) => fail(failures, &format!("cuda:{n}"), &format!("can't be used: {e}"))?,
        }
    }
    Ok(usable)
}

/// The device, and how fast it multiplies.
fn card(device: &Device, failures: &mut Failures) -> Result<()> {
    let mut line = format!("device   {}", describe(device));
    let (mut dtype, mut n) = (DType::F32, 512);
    if let Ok(c) = Cuda::of(device)
        && !c.is_emulator()
    {
        let memory = c
            .device_memory()
            .map_or_else(|e| e.to_string(), |(free, all)| format!("{:.1} GiB memory, {:.1} free", gib(all as f64), gib(free as f64)));
        line += &format!(", compute capability {}.{}, {} multiprocessors, {memory}", c.arch() / 10, c.arch() % 10, c.processors());
        (dtype, n) = (DType::BF16, 8192);
    }
    out(&line)?;
    if Cuda::of(device).is_ok_and(Cuda::is_emulator) {
        return Ok(());
    }
    match speed(device, dtype, n) {
        Ok(giga) if giga < 1e4 => out(&format!("matmul   {giga:.0} GFLOP/s in {dtype} at {n}³")),
        Ok(giga) => out(&format!("matmul   {:.0} TFLOP/s in {dtype} at {n}³", giga / 1e3)),
        Err(e) => fail(failures, &format!("matmul on {}", device.name()), &e.to_string()),
    }
}

/// The fastest of five products, in 10⁹ operations per second.
fn speed(device: &Device, dtype: DType, n: usize) -> engine::Result<f64> {
    // drawing millions of numbers would take longer than the test: rows repeat
    let matrix = |i| Tensor::randn(&[1, 512, n], dtype, device, 1, i)?.expand(&[n / 512, 512, n])?.contiguous()?.reshape(&[n, n]);
    let (a, b) = (matrix(0)?, matrix(1)?);
    let times = Clock::new(device, Some(5), false).time(|| no_grad(|| a.matmul(&b).map(drop)))?;
    Ok(2.0 * (n as f64).powi(3) / times.min / 1e6)
}

/// Every op's self-test. One that fails does not keep the next from running.
fn test(device: &Device, dtype: DType, failures: &mut Failures) -> Result<()> {
    let at = format!("{} {dtype}", device.name());
    for t in engine::self_tests() {
        match t.run(device, dtype) {
            Ok(e) if e <= bound(dtype) => out(&format!("ok       {:<30} {at}: values and gradients within {e:.0e} of the reference", t.name))?,
            Ok(e) => fail(failures, t.name, &format!("{at}: relative error {e:.0e} to the reference, at most {:.0e} is right", bound(dtype)))?,
            Err(e) => fail(failures, t.name, &format!("{at}: {e}"))?,
        }
    }
    Ok(())
}
