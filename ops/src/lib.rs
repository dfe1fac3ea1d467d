//! Fused operations, one folder each: contract, CPU kernels, tests against a reference.

pub mod adamw;
mod cuda;
pub mod delta_rule;
mod documents;
mod dtypes;
pub mod gated_sdpa;
pub mod linear_cross_entropy;
pub mod moe;
pub mod rms_norm;
pub mod rope;
mod rows;
pub mod short_conv;
pub mod swiglu;
#[cfg(test)]
mod testing;
