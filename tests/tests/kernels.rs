//! Every CUDA kernel in every instantiation that an op can ask for compiles, for sm_80 and for sm_90a, within what its launch bounds assume. No GPU is
//! needed, only NVRTC; without it the test says that it was skipped.

use cuda::compile::{Target, compile_all, nvrtc_version, resources};
use cuda::kernel::{Kernel, sources};
// the crates whose kernels are meant
use {cuda as _, nn as _, ops as _, train as _};

#[test]
fn every_kernel_compiles_without_spills() {
    if let Err(e) = nvrtc_version() {
        eprintln!("SKIPPED: kernels are not compiled: {e}");
        return;
    }
    let kernels: Vec<Kernel> = sources().iter().flat_map(|s| (s.kernels)()).collect();
    assert!(!kernels.is_empty(), "no source is linked in");
    let mut faults = vec![];
    for arch in [80, 90] {
        let fit: Vec<Kernel> = kernels.iter().filter(|k| k.fits(Target::Gpu(arch))).cloned().collect();
        for (k, r) in fit.iter().zip(compile_all(&fit, Target::Gpu(arch))) {
            // what ptxas says when it waits for Hopper's products itself, or ignores an allotment of registers
            let serial = r.as_ref().ok().and_then(|b| b.log.lines().find(|l| l.contains("(C75")));
            faults.extend(serial.map(|l| format!("sm_{arch} {k}: {l}")));
            match r.as_ref().map(|b| resources(&b.log)) {
                Err(e) => faults.push(format!("sm_{arch}: {e}")),
                Ok(None) => faults.push(format!("sm_{arch} {k}: ptxas reported nothing")),
                Ok(Some(r)) => {
                    println!("sm_{arch} {k}: {} registers of {}, {} B shared", r.registers, k.register_bound(), r.shared);
                    if r.spill_stores + r.spill_loads + r.stack > 0 || r.registers > k.register_bound() {
                        faults.push(format!("sm_{arch} {k}: {r:?}, {} registers fit the launch bounds", k.register_bound()));
                    }
                }
            }
        }
    }
    assert!(faults.is_empty(), "{} kernels:\n{}", faults.len(), faults.join("\n"));
}

/// Two instantiations of one name would be counted once.
#[test]
fn no_kernel_is_listed_twice() {
    for s in sources() {
        let all = (s.kernels)();
        let distinct: std::collections::HashSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len(), "{}", s.name);
    }
}
