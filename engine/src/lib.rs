//! tidegate's tensor engine.
extern crate self as engine;
pub mod cpu;
/// Element placeholder
pub trait Element {}
impl Element for f32 {}
impl Element for f64 {}
