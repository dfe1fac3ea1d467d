//! Part of tidegate.
pub mod gated_sdpa;
