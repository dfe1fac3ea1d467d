//! `tidegate doctor`: what machine this is, and whether every operation gives the right numbers on it.

use super::out;
use crate::{Error, Result};
use engine::{DType, Device, Tensor};

/// The largest relative error of an f32 kernel to its f64 reference that passes.
const BOUND: f64 = 1e-5;

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(':')).map(|(_, n)| n.trim().to_string());
    name.unwrap_or_else(|| "CPU of unknown name".into())
}

pub(super) fn run() -> Result<()> {
    out(&format!("tidegate {} on {} {}", env!("CARGO_PKG_VERSION"), std::env::consts::OS, std::env::consts::ARCH))?;
    let memory = engine::cpu::system_memory().map_or(String::new(), |b| format!(", {:.1} GiB memory", b as f64 / (1u64 << 30) as f64));
    out(&format!("machine  {}{memory}", cpu()))?;
    out(&format!("vectors  {:?}", engine::cpu::simd::level()))?;
    out(&format!("threads  {} (RAYON_NUM_THREADS sets them; results don't depend on it)", rayon::current_num_threads()))?;
    out(&format!("device   {}", Device::cpu().name()))?;
    out(&format!("matmul   {:.0} GFLOP/s in f32 at 512³", matmul_speed()?))?;
    let mut failed = Vec::new();
    for t in engine::self_tests() {
        match t.run(&Device::cpu(), DType::F32) {
            Ok(e) if e <= BOUND => out(&format!("ok       {:<24} values and gradients within {e:.0e} of the reference", t.name))?,
            Ok(e) => failed.push((t.name, format!("relative error {e:.0e} to the reference, at most {BOUND:.0e} is right"))),
            Err(e) => failed.push((t.name, e.to_string())),
        }
    }
    for (name, why) in &failed {
        out(&format!("FAILED   {name:<24} {why}"))?;
    }
    let names: Vec<&str> = failed.iter().map(|f| f.0).collect();
    if failed.is_empty() { Ok(()) } else { Err(Error::Model(format!("self-tests failed: {}; please report this machine", names.join(", ")))) }
}

/// The fastest of five products, in 10⁹ operations per second.
fn matmul_speed() -> engine::Result<f64> {
    let n = 512;
    let [a, b] = [0, 1].map(|i| Tensor::randn(&[n, n], DType::F32, &Device::cpu(), 1, i));
    let (a, b) = (a?, b?);
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let start = std::time::Instant::now();
        a.matmul(&b)?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(2.0 * (n as f64).powi(3) / best / 1e9)
}
