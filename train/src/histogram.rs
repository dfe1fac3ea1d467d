//! Distributions of gates, for TensorBoard: an observer that counts on the device how often a gate has which value.

use crate::measure::Histogram;
use engine::{DType, Tensor};
use nn::{Observer, on_request};

/// Bins of a histogram.
const BINS: usize = 50;
/// Numbers that are counted at once: as many ones are added up exactly in f32.
const EXACT: usize = 1 << 24;

/// How the numbers of a tensor are distributed.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    /// Of what, as `blocks.0.attn.gate`.
    pub name: String,
    /// The smallest number.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// Their sum.
    pub sum: f64,
    /// The sum of their squares.
    pub sum_squares: f64,
    /// How often which; from 0 to 1 where all numbers lie there, else from the smallest to the largest.
    pub bins: Histogram,
}

/// What a gate that is tapped as `name` is called in the metrics; none for what is no gate.
fn gate(name: &str) -> Option<String> {
    let (path, hook) = name.rsplit_once("hook_")?;
    let what = match hook {
        "log_decay" => "alpha",
        "beta" => "beta",
        h if h.ends_with("gate") => h,
        _ => return None,
    };
    Some(format!("{path}{what}"))
}

/// The distribution of a tensor's numbers; none if it has none, or some are not finite.
pub fn distribution(name: &str, t: &Tensor) -> engine::Result<Option<Distribution>> {
    let n = t.numel();
    if n == 0 {
        return Ok(None);
    }
    let x = t.detach().reshape(&[n])?.cast(DType::F32)?;
    let of = [x.neg()?.max(&[0], false)?, x.max(&[0], false)?, x.mean(&[0], false)?, x.square()?.mean(&[0], false)?];
    let flat = of.iter().map(|t| t.reshape(&[1])).collect::<engine::Result<Vec<_>>>()?;
    let numbers: Vec<f64> = Tensor::cat(&flat.iter().collect::<Vec<_>>(), 0)?.cast(DType::F64)?.to_vec()?;
    if numbers.iter().any(|x| !x.is_finite()) {
        return Ok(None);
    }
    let (min, max) = (-numbers[0], numbers[1]);
    let (from, to) = match (min, max) {
        _ if min >= 0.0 && max <= 1.0 => (0.0, 1.0),
        _ if max - min > 1e-30 => (min, max),
        // all the same
        _ => (min - 0.5, max + 0.5),
    };
    let scale = BINS as f64 / (to - from);
    let at = |bound: f64| Tensor::full(bound, &[], DType::F32, x.device());
    let mut counts = vec![0u64; BINS];
    for start in (0..n).step_by(EXACT) {
        let part = x.narrow(0, start, EXACT.min(n - start))?;
        let bin = part.affine(scale, -from * scale)?.maximum(&at(0.0)?)?.minimum(&at(BINS as f64 - 1.0)?)?.cast(DType::I64)?;
        let ones = Tensor::ones(bin.shape(), DType::F32, x.device())?;
        let found: Vec<f32> = ones.scatter_add(0, &bin, BINS)?.to_vec()?;
        counts.iter_mut().zip(found).for_each(|(c, f)| *c += f as u64);
    }
    let (sum, sum_squares) = (numbers[2] * n as f64, numbers[3] * n as f64);
    Ok(Some(Distribution { name: name.into(), min, max, sum, sum_squares, bins: Histogram { from, to, counts } }))
}

/// An observer that keeps the distribution of every gate: those of attention and of the delta rule, α, β, those of shared experts.
#[derive(Default)]
pub struct Gates(pub Vec<Distribution>);

impl Observer for Gates {
    fn wants(&self, name: &str) -> bool {
        !on_request(name) && gate(name).is_some()
    }
    fn see(&mut self, name: &str, value: &Tensor) -> engine::Result<Option<Tensor>> {
        if let Some(gate) = gate(name) {
            let shown = if name.ends_with("log_decay") { value.detach().exp()? } else { value.clone() };
            self.0.extend(distribution(&gate, &shown)?);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts() {
        let t = Tensor::from_vec([0.0f32, 0.019, 0.021, 0.5, 1.0, 1.0], &[2, 3]).unwrap();
        let d = distribution("g", &t).unwrap().unwrap();
        assert_eq!((d.min, d.max, d.bins.from, d.bins.to, d.bins.counts.len()), (0.0, 1.0, 0.0, 1.0, BINS));
        let filled: Vec<(usize, u64)> = d.bins.counts.iter().copied().enumerate().filter(|c| c.1 > 0).collect();
        assert_eq!(filled, [(0, 2), (1, 1), (25, 1), (49, 2)]);
        assert!((d.sum - 2.54).abs() < 1e-6 && (d.sum_squares - (0.019f64.powi(2) + 0.021f64.powi(2) + 2.25)).abs() < 1e-6);
        let d = distribution("g", &Tensor::from_vec([-2.0f32, 3.0, 0.5], &[3]).unwrap()).unwrap().unwrap();
        assert_eq!((d.bins.from, d.bins.to, d.bins.counts[0], d.bins.counts[25], d.bins.counts[49]), (-2.0, 3.0, 1, 1, 1));
        let same = distribution("g", &Tensor::from_vec([7.0f32; 4], &[4]).unwrap()).unwrap().unwrap();
        assert_eq!((same.bins.counts.iter().sum::<u64>(), same.bins.counts[25]), (4, 4));
        for none in [&[f32::NAN, 1.0][..], &[f32::INFINITY], &[]] {
            assert_eq!(distribution("g", &Tensor::from_vec(none, &[none.len()]).unwrap()).unwrap(), None);
        }
    }

    #[test]
    fn which_are_gates() {
        for (tap, name) in [
            ("blocks.0.attn.hook_gate", Some("blocks.0.attn.gate")),
            ("blocks.0.attn.hook_value_gate", Some("blocks.0.attn.value_gate")),
            ("blocks.0.attn.hook_log_decay", Some("blocks.0.attn.alpha")),
            ("blocks.0.mlp.hook_shared_gate", Some("blocks.0.mlp.shared_gate")),
            ("blocks.0.attn.hook_gate_logits", None),
            ("blocks.0.hook_resid_pre", None),
        ] {
            assert_eq!(gate(tap).as_deref(), name);
        }
    }
}
