//! The CUDA backend: memory, streams, run-time compilation, matrix products, graphs, and the kernels of the primitive ops.
//!
//! Nothing of CUDA is needed to build it, and every kernel can be tested without a GPU: the same sources run on [`emulator`], which is another device of
//! this very backend. `docs/cuda.md` tells how to write a kernel.

extern crate self as cuda;

pub mod cache;
mod cards;
mod check;
pub mod compile;
mod driver;
mod gemm;
mod graph;
pub mod kernel;
mod libraries;
pub mod memory;
mod plan;
mod prim;
mod runtime;

pub use cards::peak_bf16;
pub use check::Check;
pub use gemm::Gemm;
pub use graph::Graph;
pub use kernel::{FastDiv, Fault, Kernel, Params, Ptr, Source};
pub use libraries::{Library, driver_version, libraries, present, usable};
pub use runtime::{Cuda, available, device, emulator, emulator_with_memory, hopper_emulator};
