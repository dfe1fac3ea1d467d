//! The hybrid decoder as a [`Learner`].

use crate::config::{ModelConfig, Optim};
use crate::data::Batch;
use crate::metrics::Scalars;
use crate::trainer::{Learner, Sampling};
use crate::{Error, Result};
use std::path::Path;

/// A decoder with its optimizer.
pub struct Hybrid {}

impl Hybrid {
    /// A new model.
    pub fn new(_config: &ModelConfig, _seed: u64) -> Result<Hybrid> {
        Err(Error::Model("no model yet".into()))
    }
    /// The model of a checkpoint.
    pub fn open(_dir: &Path) -> Result<Hybrid> {
        Err(Error::Model("no model yet".into()))
    }
    /// The model's `config.json`.
    pub fn config_json(&self) -> Result<String> {
        Ok(String::new())
    }
    /// Its size, in words.
    pub fn describe(&self) -> String {
        String::new()
    }
}

impl Learner for Hybrid {
    fn micro_step(&mut self, _: &Batch, _: f64, _: Option<&mut Scalars>) -> Result<f64> {
        Ok(0.0)
    }
    fn update(&mut self, _: u64, _: f64, _: &Optim) -> Result<f64> {
        Ok(0.0)
    }
    fn nll(&mut self, _: &Batch) -> Result<f64> {
        Ok(0.0)
    }
    fn sample(&mut self, _: &[u32], _: &Sampling) -> Result<Vec<u32>> {
        Ok(vec![])
    }
    fn diagnose(&mut self, _: &Batch) -> String {
        String::new()
    }
    fn save(&self, _: &Path) -> Result<()> {
        Ok(())
    }
    fn load(&mut self, _: &Path) -> Result<()> {
        Ok(())
    }
    fn vocab_size(&self) -> usize {
        256
    }
}
