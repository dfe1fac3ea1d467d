//! What the tests of several crates together share.

pub mod plain;
