//! Initial values: functions of (seed, the parameter's name) alone, so that two models begin alike wherever they have the same parts.

use crate::{Param, Placement};
use engine::{DType, Device, Result, Tensor, rng};

/// Where parameters come from.
pub(crate) enum Source<'a> {
    /// Initial values of this seed.
    Seed(u64),
    /// None: shapes alone, in no memory, to hold a file's header against.
    Shapes,
    /// What a checkpoint has for a name.
    File(&'a dyn Fn(&str, &Tensor) -> crate::Result<()>),
}

/// Makes parameters and remembers them in order.
pub(crate) struct Builder<'a> {
    pub params: Vec<Param>,
    pub source: Source<'a>,
    pub std: f64,
    pub place: Placement,
    pub prefix: String,
}

/// A name's stream of numbers: its 64-bit FNV-1a hash.
fn stream(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl Builder<'_> {
    /// A parameter; `initial` makes f64 values from the seed and the stream of numbers that belongs to the parameter's name.
    fn add(&mut self, name: &str, shape: &[usize], dtype: DType, initial: impl FnOnce(u64, u64) -> Result<Tensor>) -> crate::Result<Tensor> {
        let name = format!("{}{name}", self.prefix);
        let device = &self.place.device;
        let t = match &self.source {
            Source::Seed(seed) => initial(*seed, stream(&name))?.cast(dtype)?.to_device(device)?,
            Source::Shapes => Tensor::full(0.0, &vec![1; shape.len()], dtype, &Device::cpu())?.expand(shape)?,
            Source::File(fill) => {
                let t = Tensor::full(0.0, shape, dtype, device)?;
                fill(&name, &t)?;
                t
            }
        };
        let tensor = t.requires_grad();
        self.params.push(Param { name, tensor: tensor.clone() });
        Ok(tensor)
    }
    /// Normal with the configured deviation.
    pub fn normal(&mut self, name: &str, shape: &[usize]) -> crate::Result<Tensor> {
        self.normal_in(self.place.params, name, shape)
    }
    /// The same of a router: in f32 where other weights are in bf16.
    pub fn normal_wide(&mut self, name: &str, shape: &[usize]) -> crate::Result<Tensor> {
        self.normal_in(self.wide(), name, shape)
    }
    fn normal_in(&mut self, dtype: DType, name: &str, shape: &[usize]) -> crate::Result<Tensor> {
        let std = self.std;
        self.add(name, shape, dtype, |seed, at| Tensor::randn(shape, DType::F64, &Device::cpu(), seed, at)?.affine(std, 0.0))
    }
    /// The dtype of what is never kept in bf16.
    fn wide(&self) -> DType {
        if self.place.params == DType::F64 { DType::F64 } else { DType::F32 }
    }
    /// The same for a projection to `heads` heads, each of several parts of so many rows. Every part has numbers of its own: the others keep theirs where one is left out.
    pub fn normal_of_parts(&mut self, name: &str, heads: usize, parts: &[(&str, usize)], h: usize) -> crate::Result<Tensor> {
        let (std, rows) = (self.std, parts.iter().map(|(_, n)| n).sum::<usize>());
        self.add(name, &[heads * rows, h], self.place.params, |seed, at| {
            let draw = |(part, n): &(&str, usize)| Tensor::randn(&[heads, *n, h], DType::F64, &Device::cpu(), seed, at ^ stream(part));
            let parts = parts.iter().filter(|(_, n)| *n > 0).map(draw).collect::<Result<Vec<_>>>()?;
            Tensor::cat(&parts.iter().collect::<Vec<_>>(), 1)?.reshape(&[heads * rows, h])?.affine(std, 0.0)
        })
    }
    /// All one value.
    pub fn constant(&mut self, name: &str, shape: &[usize], value: f64) -> crate::Result<Tensor> {
        self.add(name, shape, self.wide(), |_, _| Tensor::full(value, shape, DType::F64, &Device::cpu()))
    }
    fn map_uniform(&mut self, name: &str, shape: &[usize], f: impl Fn(f64) -> f64) -> crate::Result<Tensor> {
        let n = shape.iter().product();
        self.add(name, shape, self.wide(), |seed, at| Tensor::from_vec(rng::uniform(seed, at, n).into_iter().map(f).collect::<Vec<f64>>(), shape))
    }
    /// ln A for A uniform between two ends.
    pub fn a_log(&mut self, name: &str, n: usize, [least, most]: [f64; 2]) -> crate::Result<Tensor> {
        self.map_uniform(name, &[n], |u| (least + u * (most - least)).ln())
    }
    /// The inverse softplus of a step that is log-uniform between two ends, and at least the third number, as Mamba2 and Gated DeltaNet start (in
    /// [1e-3, 1e-1]): ones would forget almost all at once.
    pub fn dt_bias(&mut self, name: &str, n: usize, [least, most, floor]: [f64; 3]) -> crate::Result<Tensor> {
        self.map_uniform(name, &[n], |u| {
            let dt = (least.ln() + u * (most.ln() - least.ln())).exp().max(floor);
            dt + (-(-dt).exp_m1()).ln()
        })
    }
    /// The convolution's weight: uniform in ±1/√K, as PyTorch starts it.
    pub fn conv(&mut self, name: &str, c: usize, k: usize) -> crate::Result<Tensor> {
        let bound = 1.0 / (k as f64).sqrt();
        self.map_uniform(name, &[c, 1, k], |u| (2.0 * u - 1.0) * bound)
    }
    /// Its bias, likewise.
    pub fn conv_bias(&mut self, name: &str, c: usize, k: usize) -> crate::Result<Tensor> {
        let bound = 1.0 / (k as f64).sqrt();
        self.map_uniform(name, &[c], |u| (2.0 * u - 1.0) * bound)
    }
}
