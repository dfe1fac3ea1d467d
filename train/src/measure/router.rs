//! Where a mixture of experts sends its tokens.

use super::Router;
use super::watch::{At, Reader, host};
use engine::{DType, Result, Tensor};
use std::collections::BTreeMap;

#[derive(Default)]
struct Sums {
    load: Vec<u64>,
    nats: f64,
    tokens: u64,
}

/// Routers over a text.
pub(super) struct Routes {
    experts: usize,
    layers: BTreeMap<usize, Sums>,
}

impl Routes {
    pub fn new(experts: usize) -> Routes {
        Routes { experts, layers: BTreeMap::new() }
    }
    /// By layer: each expert's share of all routes (a token takes K of them); the mean over tokens of the entropy of the router's softmax over all experts; experts
    /// without a route; the largest load by the mean load; and the loads' standard deviation (over experts, not corrected) by their mean.
    pub fn finish(self) -> Vec<Router> {
        let layer = |(layer, s): (usize, Sums)| {
            let (e, routes) = (s.load.len() as f64, s.load.iter().sum::<u64>().max(1) as f64);
            let load: Vec<f64> = s.load.iter().map(|n| *n as f64 / routes).collect();
            Router {
                layer,
                entropy: s.nats / s.tokens.max(1) as f64,
                dead: s.load.iter().filter(|n| **n == 0).count(),
                max_over_mean: load.iter().fold(0.0, |m: f64, x| m.max(*x)) * e,
                cv: (load.iter().map(|x| (x * e - 1.0).powi(2)).sum::<f64>() / e).sqrt(),
                load,
            }
        };
        self.layers.into_iter().map(layer).collect()
    }
}

impl Reader for Routes {
    fn reads(&self, at: &At) -> bool {
        matches!(at.hook, "mlp.hook_router_probs" | "mlp.hook_router_index")
    }
    fn see(&mut self, at: &At, value: &Tensor) -> Result<()> {
        let s = self.layers.entry(at.layer).or_default();
        s.load.resize(self.experts, 0);
        if at.hook == "mlp.hook_router_probs" {
            s.nats -= host(value)?.iter().filter(|p| **p > 0.0).map(|p| f64::from(*p) * f64::from(*p).ln()).sum::<f64>();
            s.tokens += value.dim(0) as u64;
            return Ok(());
        }
        for e in value.cast(DType::I64)?.contiguous()?.to_vec::<i64>()? {
            let load = usize::try_from(e).ok().and_then(|e| s.load.get_mut(e));
            *load.ok_or_else(|| engine::Error::invalid("router", format!("expert {e} of {}", self.experts)))? += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_by_hand() {
        let mut r = Routes::new(4);
        let at = |hook| At { name: "", layer: 1, hook, softmax: false };
        r.see(&at("mlp.hook_router_probs"), &Tensor::from_vec([0.25f32, 0.25, 0.25, 0.25, 0.5, 0.5, 0.0, 0.0], &[2, 4]).unwrap()).unwrap();
        r.see(&at("mlp.hook_router_index"), &Tensor::from_vec([0i64, 1, 1, 2], &[2, 2]).unwrap()).unwrap();
        assert!(r.see(&at("mlp.hook_router_index"), &Tensor::from_vec([4i64], &[1, 1]).unwrap()).is_err());
        let r = r.finish().remove(0);
        assert_eq!((r.layer, r.load.as_slice(), r.dead, r.max_over_mean), (1, &[0.25, 0.5, 0.25, 0.0][..], 1, 2.0));
        assert!((r.entropy - 1.5 * std::f64::consts::LN_2).abs() < 1e-7 && (r.cv - 0.5f64.sqrt()).abs() < 1e-12, "{r:?}");
    }
}
