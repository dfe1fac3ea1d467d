//! What the tests of several crates together share.

pub mod fuzz;
pub mod plain;
