//! `--device` and `--dtype`: where a command computes, and in what precision.

use crate::config::Precision;
use crate::progress::say;
use crate::{Error, Result};
use engine::{DType, Device};
use nn::Placement;
use std::str::FromStr;

/// What `--device` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// The first GPU that can be used, else the CPU.
    Auto,
    Cpu,
    /// The GPU with this number.
    Cuda(usize),
    /// The emulator of a GPU, for tests: it is far slower than the CPU, so the help does not offer it.
    Emulated,
}

impl FromStr for Choice {
    type Err = String;
    fn from_str(s: &str) -> std::result::Result<Self, String> {
        match s {
            "auto" => Ok(Choice::Auto),
            "cpu" => Ok(Choice::Cpu),
            "cuda" => Ok(Choice::Cuda(0)),
            "emulated" => Ok(Choice::Emulated),
            _ => {
                let n = s.strip_prefix("cuda:").and_then(|n| n.parse().ok());
                n.map(Choice::Cuda).ok_or_else(|| "expected auto, cpu, cuda (the first GPU), or cuda:N with the number of a GPU, from 0".into())
            }
        }
    }
}

fn dtype(s: &str) -> std::result::Result<Precision, String> {
    match s {
        "f32" => Ok(Precision::F32),
        "bf16" => Ok(Precision::BF16),
        _ => Err("expected f32 or bf16".into()),
    }
}

/// The option `--device`, for commands that choose the precision themselves.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct DeviceArg {
    /// Where to compute: auto (the first GPU that can be used, else the CPU), cpu, cuda, or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: Choice,
}

/// The options `--device` and `--dtype`; flattened into a command's own.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct PlaceArgs {
    #[command(flatten)]
    at: DeviceArg,
    /// Precision of activations and products, f32 or bf16; what is trained is kept in f32 always [default: f32 on the CPU, bf16 on a GPU]
    #[arg(long, value_name = "DTYPE", value_parser = dtype)]
    pub dtype: Option<Precision>,
}

impl DeviceArg {
    /// The device, opened. What was chosen, and why not a GPU that is there, goes to stderr; a device that was asked for by name and can't be used is an error.
    pub fn open(&self) -> Result<Device> {
        match self.device {
            Choice::Auto => Ok(auto()),
            Choice::Cpu => Ok(Device::cpu()),
            Choice::Cuda(n) => gpu(n),
            Choice::Emulated => cuda::emulator().map_err(|e| Error::Model(format!("--device emulated: {e}"))),
        }
    }
}

impl PlaceArgs {
    /// Where a model is to live: parameters in f32, computation in `--dtype`, else in `otherwise`, else in what suits the device.
    pub fn open(&self, otherwise: Option<Precision>) -> Result<Placement> {
        let device = self.at.open()?;
        let suits = if device == Device::cpu() { Precision::F32 } else { Precision::BF16 };
        let compute = self.dtype.or(otherwise).unwrap_or(suits).into();
        if device != Device::cpu() || compute != DType::F32 {
            say(&format!("device {}, computing in {compute}", describe(&device)));
        }
        Ok(Placement { device, params: DType::F32, compute })
    }
}

/// A device's name with its card's: `cuda:0 (NVIDIA H100 80GB HBM3)`.
pub(super) fn describe(device: &Device) -> String {
    match cuda::Cuda::of(device) {
        Ok(c) if c.is_emulator() => device.name(),
        Ok(c) => format!("{} ({})", device.name(), c.model()),
        Err(_) => device.name(),
    }
}

/// The GPU with this number, with all it needs to compute.
fn gpu(n: usize) -> Result<Device> {
    let wrong = |e: String| Error::Model(format!("--device cuda:{n}: {e}"));
    match cuda::available() {
        Ok(0) => return Err(wrong("the CUDA driver finds no GPU (is CUDA_VISIBLE_DEVICES empty?); use --device cpu".into())),
        Ok(found) if n >= found => {
            let are =
                if found == 1 { "there is 1 GPU here, cuda:0".into() } else { format!("there are {found} GPUs here, cuda:0 to cuda:{}", found - 1) };
            return Err(wrong(format!("{are}; choose one that is there, or --device cpu")));
        }
        Ok(_) => cuda::usable(n),
        Err(e) => Err(e),
    }
    .map_err(|e| wrong(e.to_string()))
}

/// The first GPU if it can be used. A machine without one is silent; one whose GPU can't be used is told why.
fn auto() -> Device {
    let why = match cuda::available() {
        Ok(0) => return Device::cpu(),
        Ok(_) => match cuda::usable(0) {
            Ok(d) => return d,
            Err(e) => e.to_string(),
        },
        Err(_) if !cuda::present() => return Device::cpu(),
        Err(e) => e.to_string(),
    };
    say(&format!(
        "this machine has an NVIDIA GPU or its driver, but no GPU can be used: {why}. Going on with the CPU (--device cuda makes this an error, --device cpu silences it)"
    ));
    Device::cpu()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        place: PlaceArgs,
    }
    fn parse(args: &[&str]) -> std::result::Result<PlaceArgs, String> {
        Line::try_parse_from([&["x"], args].concat()).map(|l| l.place).map_err(|e| e.to_string())
    }

    #[test]
    fn devices_by_name() {
        for (s, c) in
            [("auto", Choice::Auto), ("cpu", Choice::Cpu), ("cuda", Choice::Cuda(0)), ("cuda:3", Choice::Cuda(3)), ("emulated", Choice::Emulated)]
        {
            assert_eq!(parse(&["--device", s]).unwrap().at.device, c);
        }
        assert_eq!(parse(&[]).unwrap().at.device, Choice::Auto);
        for s in ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", ""] {
            let e = parse(&["--device", s]).unwrap_err();
            assert!(e.contains("--device") && e.contains("cuda:N"), "{s}: {e}");
        }
        for s in ["f16", "float32", ""] {
            let e = parse(&["--dtype", s]).unwrap_err();
            assert!(e.contains("--dtype") && e.contains("f32 or bf16"), "{s}: {e}");
        }
    }

    #[test]
    fn precision_follows_the_device() {
        let p = parse(&["--device", "cpu"]).unwrap().open(None).unwrap();
        assert_eq!((p.device, p.params, p.compute), (Device::cpu(), DType::F32, DType::F32));
        assert_eq!(parse(&["--device", "cpu", "--dtype", "bf16"]).unwrap().open(None).unwrap().compute, DType::BF16);
        if let Ok(emulator) = cuda::emulator() {
            let p = parse(&["--device", "emulated"]).unwrap().open(None).unwrap();
            assert_eq!((p.device, p.params, p.compute), (emulator, DType::F32, DType::BF16));
            assert_eq!(parse(&["--device", "emulated", "--dtype", "f32"]).unwrap().open(None).unwrap().compute, DType::F32);
        }
    }

    #[test]
    fn gpus_that_are_not_there() {
        let e = parse(&["--device", "cuda:99"]).unwrap().open(None).unwrap_err().to_string();
        assert!(e.contains("cuda:99") && e.contains("cpu"), "{e}");
        if !cuda::present() {
            let e = parse(&["--device", "cuda"]).unwrap().open(None).unwrap_err().to_string();
            assert!(e.contains("no CUDA driver") && e.contains("cpu"), "{e}");
            assert_eq!(parse(&[]).unwrap().open(None).unwrap().device, Device::cpu());
        }
    }
}
