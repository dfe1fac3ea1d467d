//! Every op's self-test on the CUDA backend: in f32 and bf16, emulated (with the kernels of sm_80 and with those of Hopper), and on the GPU where there is one.

use engine::{DType, Device, Result, SelfTest, self_tests};
use libtest_mimic::{Arguments, Failed, Trial};
use ops as _;

/// RMS ratio that is allowed.
fn bound(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { 0.02 }
}

fn check(t: &'static SelfTest, device: fn() -> Result<Device>, dtype: DType) -> Result<(), Failed> {
    let e = t.run(&device()?, dtype)?;
    println!("{}: {e:.1e}", t.name);
    if e <= bound(dtype) { Ok(()) } else { Err(format!("{}: RMS ratio {e:e} > {}", t.name, bound(dtype)).into()) }
}

fn main() {
    let args = Arguments::from_args();
    let mut devices: Vec<(&str, fn() -> Result<Device>)> = vec![];
    match cuda::emulator() {
        Ok(_) => devices.extend([("emulated", cuda::emulator as fn() -> _), ("hopper", cuda::hopper_emulator)]),
        Err(e) => eprintln!("SKIPPED: nothing is emulated: {e}"),
    }
    match cuda::device(0) {
        Ok(_) => devices.push(("gpu", || cuda::device(0))),
        Err(e) => eprintln!("SKIPPED: nothing runs on a GPU: {e}"),
    }
    let mut trials = vec![];
    for (device, open) in devices {
        for t in self_tests() {
            // variants for Hopper are in bf16 alone
            for dtype in [DType::F32, DType::BF16].into_iter().filter(|d| device != "hopper" || *d == DType::BF16) {
                trials.push(Trial::test(format!("{device}::{dtype}::{}", t.name), move || check(t, open, dtype)));
            }
        }
    }
    libtest_mimic::run(&args, trials).exit();
}
