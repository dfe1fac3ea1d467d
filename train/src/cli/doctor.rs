//! `tidegate doctor`: what machine this is, and whether every operation gives the right numbers on it.

use super::out;
use crate::{Error, Result};
use engine::{DType, Device, Tensor};

/// A self-test: its name, and what it measured or why it failed.
type Test = (&'static str, fn() -> Result<String, String>);

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(':')).map(|(_, n)| n.trim().to_string());
    name.unwrap_or_else(|| "CPU of unknown name".into())
}

fn memory_gib() -> Option<f64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let kib: f64 = info.lines().find_map(|l| l.strip_prefix("MemTotal:"))?.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / (1 << 20) as f64)
}

pub(super) fn run() -> Result<()> {
    out(&format!("tidegate {} on {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH));
    let memory = memory_gib().map_or(String::new(), |g| format!(", {g:.1} GiB memory"));
    out(&format!("machine  {}{memory}", cpu()));
    out(&format!("vectors  {:?}", engine::cpu::simd::level()));
    out(&format!("threads  {} (RAYON_NUM_THREADS sets them; results don't depend on it)", rayon::current_num_threads()));
    out(&format!("device   {}", Device::cpu().name()));
    let mut failed = Vec::new();
    for (name, test) in tests() {
        match test() {
            Ok(measured) => out(&format!("ok       {name:<22} {measured}")),
            Err(why) => {
                out(&format!("FAILED   {name:<22} {why}"));
                failed.push(name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(Error::Model(format!("self-tests failed: {}; please report this machine", failed.join(", ")))) }
}

fn tests() -> Vec<Test> {
    vec![
        ("matmul", matmul),
        ("matmul gradient", || gradient(|x| x[0].matmul(&x[1]), &[&[3, 5], &[5, 2]])),
        ("sigmoid gradient", || gradient(|x| x[0].sigmoid(), &[&[3, 5]])),
    ]
}

/// Compares a gradient with central differences, in f64.
fn gradient(f: impl Fn(&[Tensor]) -> engine::Result<Tensor>, shapes: &[&[usize]]) -> Result<String, String> {
    let check = || -> engine::Result<f64> {
        let random = |(i, s): (usize, &&[usize])| Tensor::randn(s, DType::F64, &Device::cpu(), 11, i as u64);
        let leaves = shapes.iter().enumerate().map(random).collect::<engine::Result<Vec<_>>>()?;
        let found = engine::gradcheck(|x| Ok(vec![f(x)?]), &leaves, 1e-5)?;
        found.within(1e-6)?;
        Ok(found.worst)
    };
    check().map(|e| format!("gradient within {e:.0e} of central differences")).map_err(|e| e.to_string())
}

fn matmul() -> Result<String, String> {
    let run = || -> engine::Result<(f64, f64)> {
        let n = 512;
        let a = Tensor::randn(&[n, n], DType::F32, &Device::cpu(), 1, 0)?;
        let b = Tensor::randn(&[n, n], DType::F32, &Device::cpu(), 1, 1)?;
        let mut best = f64::INFINITY;
        let mut y = a.matmul(&b)?;
        for _ in 0..5 {
            let start = std::time::Instant::now();
            y = a.matmul(&b)?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        let exact = a.cast(DType::F64)?.matmul(&b.cast(DType::F64)?)?.to_vec::<f64>()?;
        let y = y.to_vec::<f32>()?;
        let (mut d, mut r) = (0.0, 0.0);
        for (y, e) in y.iter().zip(&exact) {
            d += (f64::from(*y) - e).powi(2);
            r += e * e;
        }
        Ok(((d / r).sqrt(), 2.0 * (n as f64).powi(3) / best / 1e9))
    };
    match run() {
        Ok((error, speed)) if error <= 1e-5 => Ok(format!("relative error {error:.1e}, {speed:.0} GFLOP/s f32 at 512³")),
        Ok((error, _)) => Err(format!("relative error {error:.1e} to f64, at most 1e-5 is right")),
        Err(e) => Err(e.to_string()),
    }
}
