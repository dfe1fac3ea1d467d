//! tidegate's tensor engine: tensors, reverse-mode autodiff, the op contract, the kernel registry, and the CPU backend.
//!
//! ```
//! use engine::Tensor;
//! # fn main() -> engine::Result<()> {
//! let w = Tensor::from_vec([1.0f32, 2.0, 3.0, 4.0], &[2, 2])?.requires_grad();
//! let loss = w.matmul(&w)?.sum(&[0, 1], false)?;
//! let grads = loss.backward()?;
//! assert_eq!(grads.get(&w).unwrap().shape(), [2, 2]);
//! # Ok(()) }
//! ```

extern crate self as engine;

pub mod cpu;
mod device;
mod dtype;
mod error;
mod gradcheck;
mod layout;
pub mod op;
pub mod prim;
pub mod profile;
pub mod registry;
pub mod rng;
mod self_test;
mod tape;
mod tensor;
pub mod watch;

pub use device::{Backend, Buffer, Device};
pub use dtype::{DType, Element};
pub use error::{Error, Result};
pub use gradcheck::{GradCheck, gradcheck};
#[doc(hidden)]
pub use half;
#[doc(hidden)]
pub use inventory;
pub use layout::{Layout, broadcast_shape};
pub use op::{Meta, Op, Want, run, run_in_place, run_on, run1};
pub use registry::View;
pub use self_test::{SelfTest, self_tests};
pub use tape::{Grads, Saved, checkpoint, enable_grad, grad_enabled, no_grad, refuse_tracked};
pub use tensor::Tensor;
