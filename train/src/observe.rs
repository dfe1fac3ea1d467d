//! Tensors that an observer saw, boiled down on their device to scalars for `metrics.jsonl`.

use crate::metrics::Scalars;
use engine::{DType, Result, Tensor};
use nn::{Observer, on_request};

/// Scalars that nobody has waited for yet, f64, by name.
#[derive(Default)]
pub struct Seen {
    names: Vec<String>,
    scalars: Vec<Tensor>,
}

impl Seen {
    /// Adds a scalar.
    pub fn push(&mut self, name: impl Into<String>, scalar: &Tensor) -> Result<()> {
        self.scalars.push(scalar.detach().cast(DType::F64)?.reshape(&[1])?);
        self.names.push(name.into());
        Ok(())
    }
    /// How they are called, and what they are, in one tensor (none where nothing was seen).
    pub fn finish(self) -> Result<(Vec<String>, Option<Tensor>)> {
        let all: Vec<&Tensor> = self.scalars.iter().collect();
        let one = if all.is_empty() { None } else { Some(Tensor::cat(&all, 0)?) };
        Ok((self.names, one))
    }
    /// Waits for them.
    pub fn read(self, out: &mut Scalars) -> Result<()> {
        let (names, values) = self.finish()?;
        out.extend(names.into_iter().zip(values.map_or(Ok(vec![]), |v| v.to_vec::<f64>())?));
        Ok(())
    }

    /// Mean, and the parts of magnitude below 0.01, below 0.1 and above 0.9. A gate of SiLU's has either sign, and is as good as shut where it is near zero.
    fn gate(&mut self, name: &str, x: &Tensor) -> Result<()> {
        let size = x.abs()?;
        let at = |bound: f64| Tensor::full(bound, &[], DType::F32, x.device());
        let part = |where_: Tensor| where_.cast(DType::F32)?.mean(&[0], false);
        self.push(format!("{name}_mean"), &x.mean(&[0], false)?)?;
        self.push(format!("{name}_shut"), &part(size.lt(&at(0.01)?)?)?)?;
        self.push(format!("{name}_low"), &part(size.lt(&at(0.1)?)?)?)?;
        self.push(format!("{name}_high"), &part(size.gt(&at(0.9)?)?)?)
    }

    /// Adds the scalars of a tensor that was seen as `name`, by the last part of its name:
    ///
    /// | ends in | scalars |
    /// |---|---|
    /// | `hook_gate`, `hook_value_gate` and the like, `hook_switch`, `hook_shared_gate`, `hook_beta` | `…_mean`, and `…_shut`, `…_low`, `…_high`: the parts of magnitude below 0.01, below 0.1 and above 0.9 (saturation) |
    /// | `hook_log_decay` | the same of `alpha = exp(g)` |
    /// | `hook_router_probs`, `[…, experts]` | `router_entropy` (nats, mean over tokens), `router_max` (mean largest probability) |
    /// | `hook_router_index`, expert ids | `router_load_max` (largest load over the mean load), `router_load_min`, `router_load_entropy` (nats), `router_dead` (experts without a token), given `experts` |
    /// | `hook_resid_*` | `…_rms`, `…_max` (largest magnitude) |
    /// | anything else | `…_rms`: queries, keys, values, outputs and logits have either sign, and means near zero |
    pub fn summarise(&mut self, name: &str, t: &Tensor, experts: usize) -> Result<()> {
        let (path, hook) = name.rsplit_once('.').unwrap_or(("", name));
        let hook = hook.strip_prefix("hook_").unwrap_or(hook);
        let key = |k: &str| if path.is_empty() { k.to_string() } else { format!("{path}.{k}") };
        let n = t.numel();
        if n == 0 {
            return Ok(());
        }
        let flat = t.detach().reshape(&[n])?;
        let x = if flat.dtype().is_float() { flat.cast(DType::F32)? } else { flat.clone() };
        match hook {
            "gate" | "value_gate" | "key_gate" | "query_gate" | "dense_gate" | "shared_gate" | "switch" | "beta" => self.gate(&key(hook), &x),
            "log_decay" => self.gate(&key("alpha"), &x.exp()?),
            "router_probs" => {
                let width = t.shape().last().copied().unwrap_or(1).max(1);
                let p = x.reshape(&[n / width, width])?;
                // where p is 0, so is p ln p
                let nats = p.mul(&p.maximum(&Tensor::full(1e-30, &[], DType::F32, p.device())?)?.ln()?)?.sum_all()?;
                self.push(key("router_entropy"), &nats.affine(-(width as f64) / n as f64, 0.0)?)?;
                self.push(key("router_max"), &p.max(&[1], false)?.mean(&[0], false)?)
            }
            "router_index" if experts > 0 => {
                let ones = Tensor::ones(&[n], DType::F32, t.device())?;
                let load = ones.scatter_add(0, &flat.cast(DType::I64)?, experts)?.affine(1.0 / n as f64, 0.0)?;
                let nats = load.mul(&load.maximum(&Tensor::full(1e-30, &[], DType::F32, load.device())?)?.ln()?)?.sum_all()?;
                let e = experts as f64;
                self.push(key("router_load_max"), &load.max(&[0], false)?.affine(e, 0.0)?)?;
                self.push(key("router_load_min"), &load.neg()?.max(&[0], false)?.affine(-e, 0.0)?)?;
                self.push(key("router_load_entropy"), &nats.neg()?)?;
                let dead = load.eq(&Tensor::zeros(&[], DType::F32, load.device())?)?;
                self.push(key("router_dead"), &dead.cast(DType::F32)?.sum_all()?)
            }
            _ if !x.dtype().is_float() => Ok(()),
            h => {
                self.push(key(&format!("{h}_rms")), &x.square()?.mean(&[0], false)?.sqrt()?)?;
                if h.starts_with("resid") {
                    self.push(key(&format!("{h}_max")), &x.abs()?.max(&[0], false)?)?;
                }
                Ok(())
            }
        }
    }
}

/// Taps that add nothing to what others say.
const PASSED_OVER: [&str; 16] = [
    "hook_embed",
    "hook_out",
    "hook_rot_q",
    "hook_rot_k",
    "hook_gate_logits",
    "hook_switch_logits",
    "hook_value_gate_logits",
    "hook_key_gate_logits",
    "hook_query_gate_logits",
    "hook_dense_gate_logits",
    "hook_shared_gate_logits",
    "hook_q_pre_conv",
    "hook_k_pre_conv",
    "hook_v_pre_conv",
    "hook_attn_out",
    "hook_mlp_out",
];

/// An observer that [summarises](Seen::summarise) what it sees.
pub struct Summary<'a> {
    /// Where scalars go.
    pub seen: &'a mut Seen,
    /// Routed experts in a layer.
    pub experts: usize,
}

impl Observer for Summary<'_> {
    fn wants(&self, name: &str) -> bool {
        !on_request(name) && !PASSED_OVER.contains(&name.rsplit('.').next().unwrap_or(name))
    }
    fn see(&mut self, name: &str, value: &Tensor) -> Result<Option<Tensor>> {
        self.seen.summarise(name, value, self.experts)?;
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars() {
        let mut seen = Seen::default();
        let mut see = |name: &str, shape: &[usize], values: &[f32], experts: usize| {
            let t = Tensor::from_vec(values, shape).unwrap();
            // experts come as integers
            let t = if name.ends_with("index") { t.cast(DType::I64).unwrap() } else { t };
            seen.summarise(name, &t, experts).unwrap();
        };
        see("blocks.0.attn.hook_gate", &[4], &[0.0, 0.5, 0.95, 1.0], 0);
        see("blocks.1.attn.hook_log_decay", &[2], &[0.0, f32::NEG_INFINITY], 0);
        see("blocks.1.mlp.hook_router_probs", &[2, 2], &[0.5, 0.5, 1.0, 0.0], 2);
        see("blocks.1.mlp.hook_router_index", &[4], &[0.0, 0.0, 0.0, 1.0], 2);
        see("blocks.2.mlp.hook_router_index", &[4], &[0.0, 0.0, 2.0, 2.0], 4);
        see("blocks.2.attn.hook_gate", &[8], &[-0.001, 0.005, -0.05, 0.09, -0.2, 0.5, 0.91, 3.0], 0);
        see("blocks.1.hook_resid_post", &[2], &[3.0, -4.0], 0);
        see("blocks.1.attn.hook_z", &[2], &[3.0, -4.0], 0);
        see("hook_x", &[0], &[], 0);
        let mut s = Scalars::new();
        seen.read(&mut s).unwrap();
        let near = |k: &str, v: f64| assert!((s[k] - v).abs() < 1e-6, "{k}: {}", s[k]);
        near("blocks.0.attn.gate_mean", 0.6125);
        near("blocks.0.attn.gate_low", 0.25);
        near("blocks.0.attn.gate_high", 0.5);
        near("blocks.1.attn.alpha_mean", 0.5);
        near("blocks.1.mlp.router_entropy", 0.5 * std::f64::consts::LN_2);
        near("blocks.1.mlp.router_load_max", 1.5);
        near("blocks.1.mlp.router_load_min", 0.5);
        near("blocks.1.mlp.router_dead", 0.0);
        near("blocks.2.mlp.router_dead", 2.0);
        near("blocks.2.mlp.router_load_entropy", std::f64::consts::LN_2);
        for (part, of_eight) in [("shut", 2.0), ("low", 4.0), ("high", 2.0)] {
            near(&format!("blocks.2.attn.gate_{part}"), of_eight / 8.0);
        }
        near("blocks.1.resid_post_rms", 12.5f64.sqrt());
        near("blocks.1.resid_post_max", 4.0);
        near("blocks.1.attn.z_rms", 12.5f64.sqrt());
        assert!(!s.contains_key("x_rms") && !s.contains_key("blocks.1.attn.z_mean"));
    }
}
