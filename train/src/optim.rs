//! AdamW over named parameters: groups, clipping, and its state in a file.

use crate::config::Optim;
use crate::metrics::Scalars;
use crate::{Error, Result, groups};
use engine::{DType, Grads, Tensor};
use nn::tensor_file::{self, TensorFile, fill};
use ops::adamw::{adamw, sum_of_squares};
use safetensors::Dtype as Stored;
use std::collections::BTreeMap;
use std::path::Path;

/// Moments of every parameter, in f32.
#[derive(Debug)]
pub struct AdamW {
    names: Vec<String>,
    m: Vec<Tensor>,
    v: Vec<Tensor>,
}

impl AdamW {
    /// Zero moments for these parameters.
    pub fn new(params: &[(&str, &Tensor)]) -> Result<AdamW> {
        let zeros =
            || params.iter().map(|(_, t)| Tensor::zeros(t.shape(), DType::F32, t.device())).collect::<engine::Result<Vec<_>>>().map_err(Error::from);
        Ok(AdamW { names: params.iter().map(|(n, _)| n.to_string()).collect(), m: zeros()?, v: zeros()? })
    }

    /// The sum of squares of each parameter's gradient (0 where there is none), in f64. Gradients that aren't finite are an error.
    fn squares(params: &[(&str, &Tensor)], grads: &Grads) -> Result<Vec<f64>> {
        let square = |(_, t): &(&str, &Tensor)| grads.get(t).map_or(Ok(0.0), |g| sum_of_squares(g)?.item());
        let sums = params.iter().map(square).collect::<engine::Result<Vec<f64>>>()?;
        let bad: Vec<&str> = params.iter().zip(&sums).filter(|(_, s)| !s.is_finite()).map(|((name, _), _)| *name).collect();
        match bad[..] {
            [] => Ok(sums),
            [name] => Err(Error::NonFinite(format!("the gradient of `{name}` is not finite"))),
            [name, ..] => Err(Error::NonFinite(format!("the gradients of {} of {} parameters, as `{name}`, are not finite", bad.len(), sums.len()))),
        }
    }

    /// Clips, and takes step number `step` (from 1). Returns the gradients' global norm before clipping. Parameters without a gradient stay as they are.
    ///
    /// `observed` gets, for each [part](groups::part) of the model, `…grad_norm` (before clipping) and `…update_norm` (of what was added to the parameters).
    pub fn step(&mut self, params: &[(&str, &Tensor)], grads: &Grads, step: u64, lr: f64, o: &Optim, observed: Option<&mut Scalars>) -> Result<f64> {
        let squares = Self::squares(params, grads)?;
        let norm = squares.iter().sum::<f64>().sqrt();
        let scale = if o.clip > 0.0 && norm > o.clip { o.clip / (norm + 1e-6) } else { 1.0 };
        let mut parts: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for (i, (name, p)) in params.iter().enumerate() {
            let Some(g) = grads.get(p) else { continue };
            let decay = if groups::decays(name, p.shape(), &o.no_decay) { o.weight_decay } else { 0.0 };
            let op = ops::adamw::AdamW { lr, beta1: o.beta1, beta2: o.beta2, eps: o.eps, weight_decay: decay, step, grad_scale: scale };
            let before = if observed.is_some() { Some(p.detach().neg()?) } else { None };
            adamw(op, p, &self.m[i], &self.v[i], g)?;
            if let Some(before) = before {
                let part = parts.entry(groups::part(name)).or_default();
                part.0 += squares[i];
                part.1 += sum_of_squares(&p.detach().add(&before)?)?.item()?;
            }
        }
        if let Some(out) = observed {
            for (part, (gradient, update)) in parts {
                out.insert(format!("{part}.grad_norm"), gradient.sqrt());
                out.insert(format!("{part}.update_norm"), update.sqrt());
            }
        }
        Ok(norm)
    }

    fn moments(&self) -> impl Iterator<Item = (String, &Tensor)> {
        let named = |(i, name): (usize, &String)| [(format!("m.{name}"), &self.m[i]), (format!("v.{name}"), &self.v[i])];
        self.names.iter().enumerate().flat_map(named)
    }

    /// Writes the moments, as `m.NAME` and `v.NAME`.
    pub fn save(&self, path: &Path) -> Result<()> {
        tensor_file::write(path, self.moments().map(|(n, t)| (n, t.clone())).collect()).map_err(Error::from)
    }

    /// Reads what [`save`](Self::save) wrote: every moment, in its shape; none, if one does not fit.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let file = TensorFile::open(path)?;
        let found = file.tensors(path)?;
        let mut ready = vec![];
        for (key, t) in self.moments() {
            match found.get(&key) {
                Some(v) if v.dtype() == Stored::F32 && v.shape() == t.shape() => ready.push((t, v)),
                other => {
                    let f = other.map_or("none".into(), |v| format!("{:?} {:?}", v.dtype(), v.shape()));
                    return Err(Error::Checkpoint(format!("{}: `{key}`: expected F32 {:?}, found {f}", path.display(), t.shape())));
                }
            }
        }
        ready.into_iter().try_for_each(|(t, v)| fill(t, std::slice::from_ref(v))).map_err(Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::presets;

    fn setup() -> (Tensor, Tensor) {
        let w = Tensor::from_vec([1.0f32, -2.0, 3.0, 0.5], &[2, 2]).unwrap().requires_grad();
        let b = Tensor::from_vec([0.25f32, -0.25], &[2]).unwrap().requires_grad();
        (w, b)
    }
    fn grads(w: &Tensor, b: &Tensor) -> Grads {
        w.mul(w).unwrap().add(b).unwrap().sum(&[0, 1], false).unwrap().backward().unwrap()
    }

    #[test]
    fn groups_clipping_and_the_formula() {
        let (w, b) = setup();
        let params = [("w", &w), ("b", &b)];
        let mut a = AdamW::new(&params).unwrap();
        let o = presets::quickstart().optim;
        let mut seen = Scalars::new();
        let norm = a.step(&params, &grads(&w, &b), 1, 0.1, &o, Some(&mut seen)).unwrap();
        // g = 2w, and 2 for each of b.
        let expected = (4.0 * (1.0f64 + 4.0 + 9.0 + 0.25) + 8.0).sqrt();
        assert!((norm - expected).abs() < 1e-9, "{norm}");
        // The first step is lr times the gradient's sign, plus decay on the matrix alone.
        let (wv, bv) = (w.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap());
        for (new, old) in wv.iter().zip([1.0f32, -2.0, 3.0, 0.5]) {
            assert!((new - (old - 0.1 * (old.signum() + 0.1 * old))).abs() < 1e-5, "{new} {old}");
        }
        assert!((bv[0] - 0.15).abs() < 1e-5 && (bv[1] + 0.35).abs() < 1e-5);
        // both were observed as parts of their own: gradients before clipping, and how far the parameters went
        let moved = |new: &[f32], old: &[f32]| new.iter().zip(old).map(|(n, o)| f64::from(n - o).powi(2)).sum::<f64>().sqrt();
        for (key, expected) in [
            ("w.grad_norm", 57.0f64.sqrt()),
            ("b.grad_norm", 8.0f64.sqrt()),
            ("w.update_norm", moved(&wv, &[1.0, -2.0, 3.0, 0.5])),
            ("b.update_norm", moved(&bv, &[0.25, -0.25])),
        ] {
            assert!((seen[key] - expected).abs() < 1e-6, "{key}: {} {expected}", seen[key]);
        }
    }

    #[test]
    fn clipping_scales_all_gradients_by_one_factor() {
        let (w, b) = setup();
        let params = [("w", &w), ("b", &b)];
        // with so large an eps the step is not the gradient's sign but grows with it
        let mut o = Optim { eps: 100.0, clip: 0.5, weight_decay: 0.0, ..presets::quickstart().optim };
        let step = |o: &Optim| {
            let before = [w.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap()].concat();
            let norm = AdamW::new(&params).unwrap().step(&params, &grads(&w, &b), 1, 0.1, o, None).unwrap();
            let after = [w.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap()].concat();
            w.assign(&Tensor::from_slice(&before[..4], &[2, 2], w.device()).unwrap()).unwrap();
            b.assign(&Tensor::from_slice(&before[4..], &[2], b.device()).unwrap()).unwrap();
            (norm, before.iter().zip(after).map(|(x, y)| f64::from(y - x)).collect::<Vec<f64>>())
        };
        let g = [2.0f64, -4.0, 6.0, 1.0, 2.0, 2.0];
        let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
        for (clip, scale) in [(0.5, 0.5 / norm), (0.0, 1.0), (norm * 1.01, 1.0)] {
            o.clip = clip;
            let (found, moved) = step(&o);
            assert!((found - norm).abs() < 1e-9, "the norm is that before clipping");
            for (m, g) in moved.iter().zip(g) {
                let expected = -0.1 * g * scale / (g.abs() * scale + 100.0);
                assert!((m - expected).abs() < 3e-7, "clip {clip}: {m}, expected {expected}");
            }
        }
    }

    #[test]
    fn saved_and_loaded_goes_on_bit_for_bit() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("o.safetensors");
        let o = presets::quickstart().optim;
        let (w, b) = setup();
        let mut a = AdamW::new(&[("w", &w), ("b", &b)]).unwrap();
        a.step(&[("w", &w), ("b", &b)], &grads(&w, &b), 1, 0.1, &o, None).unwrap();
        a.save(&path).unwrap();
        let (w2, b2) = (w.detach().add(&w.detach()).unwrap(), b.detach());
        let w2 = Tensor::from_vec(w2.to_vec::<f32>().unwrap().iter().map(|x| x / 2.0).collect::<Vec<_>>(), &[2, 2]).unwrap().requires_grad();
        let b2 = Tensor::from_vec(b2.to_vec::<f32>().unwrap(), &[2]).unwrap().requires_grad();
        let mut c = AdamW::new(&[("w", &w2), ("b", &b2)]).unwrap();
        c.load(&path).unwrap();
        a.step(&[("w", &w), ("b", &b)], &grads(&w, &b), 2, 0.1, &o, None).unwrap();
        c.step(&[("w", &w2), ("b", &b2)], &grads(&w2, &b2), 2, 0.1, &o, None).unwrap();
        assert_eq!(w.to_vec::<f32>().unwrap(), w2.to_vec::<f32>().unwrap());
        assert_eq!(b.to_vec::<f32>().unwrap(), b2.to_vec::<f32>().unwrap());
        // Damage is an error.
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        assert!(c.load(&path).unwrap_err().to_string().contains("older checkpoint"));
        let mut other = AdamW::new(&[("x", &w2)]).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        assert!(other.load(&path).unwrap_err().to_string().contains("`m.x`"));
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_named() {
        let (w, b) = setup();
        let params = [("layers.0.w", &w), ("layers.0.b", &b)];
        let mut a = AdamW::new(&params).unwrap();
        let bad = Tensor::from_vec([f32::INFINITY, 1.0], &[2]).unwrap();
        let g = b.mul(&bad).unwrap().sum(&[0], false).unwrap().backward().unwrap();
        let e = a.step(&params, &g, 1, 0.1, &presets::quickstart().optim, None).unwrap_err();
        assert!(matches!(&e, Error::NonFinite(m) if m.contains("`layers.0.b`")), "{e}");
        assert_eq!(b.to_vec::<f32>().unwrap(), [0.25, -0.25]);
    }
}
