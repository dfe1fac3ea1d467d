//! Initial values: functions of (seed, the parameter's place) alone.

use crate::Param;
use engine::{DType, Device, Result, Tensor, rng};

/// Makes parameters and remembers them in order.
pub(crate) struct Builder {
    pub params: Vec<Param>,
    pub seed: u64,
    pub std: f64,
    pub dtype: DType,
    pub prefix: String,
}

impl Builder {
    fn add(&mut self, name: &str, t: Tensor) -> Tensor {
        let tensor = t.requires_grad();
        self.params.push(Param { name: format!("{}{name}", self.prefix), tensor: tensor.clone() });
        tensor
    }
    fn stream(&self) -> u64 {
        self.params.len() as u64
    }
    /// Normal with the configured deviation.
    pub fn normal(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let t = Tensor::randn(shape, DType::F64, &Device::cpu(), self.seed, self.stream())?.affine(self.std, 0.0)?.cast(self.dtype)?;
        Ok(self.add(name, t))
    }
    /// All one value.
    pub fn constant(&mut self, name: &str, shape: &[usize], value: f64) -> Result<Tensor> {
        let t = Tensor::full(value, shape, self.dtype, &Device::cpu())?;
        Ok(self.add(name, t))
    }
    fn map_uniform(&mut self, name: &str, n: usize, f: impl Fn(f64) -> f64) -> Result<Tensor> {
        let v: Vec<f64> = rng::uniform(self.seed, self.stream(), n).into_iter().map(f).collect();
        let t = Tensor::from_vec(v, &[n])?.cast(self.dtype)?;
        Ok(self.add(name, t))
    }
    /// ln A for A uniform in [0.01, 16].
    pub fn a_log(&mut self, name: &str, n: usize) -> Result<Tensor> {
        self.map_uniform(name, n, |u| (0.01 + u * (16.0 - 0.01)).ln())
    }
    /// The inverse softplus of a step that is log-uniform in [1e-3, 1e-1], as Mamba2 and Gated DeltaNet start: ones would forget almost all at once.
    pub fn dt_bias(&mut self, name: &str, n: usize) -> Result<Tensor> {
        self.map_uniform(name, n, |u| {
            let dt = (1e-3f64.ln() + u * (1e-1f64.ln() - 1e-3f64.ln())).exp().max(1e-4);
            dt + (-(-dt).exp_m1()).ln()
        })
    }
    /// The convolution's weight: uniform in ±1/√K, as PyTorch starts it.
    pub fn conv(&mut self, name: &str, c: usize, k: usize) -> Result<Tensor> {
        let bound = 1.0 / (k as f64).sqrt();
        let v: Vec<f64> = rng::uniform(self.seed, self.stream(), c * k).into_iter().map(|u| (2.0 * u - 1.0) * bound).collect();
        let t = Tensor::from_vec(v, &[c, 1, k])?.cast(self.dtype)?;
        Ok(self.add(name, t))
    }
}
