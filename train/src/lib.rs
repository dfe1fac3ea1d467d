//! Training for tidegate: data, run configuration, schedules, run folders with atomic checkpoints, the trainer loop, and the command line.
//!
//! Everything that decides what a run computes is a pure function of the resolved [`config::RunConfig`] and the step: the sampler of
//! [`data::Sampler`] needs no state, so a resumed run repeats the uninterrupted one bit for bit.

pub mod checkpoint;
pub mod cli;
pub mod composed;
pub mod config;
pub mod data;
pub mod error;
pub mod feed;
pub mod groups;
pub mod histogram;
pub mod learner;
pub mod measure;
pub mod metrics;
pub mod observe;
pub mod optim;
pub mod presets;
pub mod progress;
pub mod report;
pub mod rng;
pub mod schedule;
pub mod study;
pub mod tasks;
pub mod tensorboard;
pub mod text;
pub mod trained;
pub mod trainer;

pub use error::{Error, Result};
