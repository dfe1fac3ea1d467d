//! AdamW over named parameters: groups, clipping, and its state in a file.

use crate::config::Optim;
use crate::observe::Seen;
use crate::{Error, Result, groups};
use engine::{DType, Device, Grads, Tensor};
use nn::tensor_file::{self, TensorFile, fill};
use ops::adamw::{AdamWMany, GlobalNorm, adamw_many, global_norm, sum_of_squares};
use safetensors::Dtype as Stored;
use std::collections::BTreeMap;
use std::path::Path;

/// Moments of every parameter, in f32.
#[derive(Debug)]
pub struct AdamW {
    names: Vec<String>,
    m: Vec<Tensor>,
    v: Vec<Tensor>,
    /// In bf16, if that is what is computed with; they are written with the parameters.
    copies: Vec<Tensor>,
}

impl AdamW {
    /// Zero moments for these parameters, of which copies are kept in the dtype that is computed with if that is bf16.
    pub fn new(params: &[(&str, &Tensor)], compute: DType) -> Result<AdamW> {
        let zeros =
            || params.iter().map(|(_, t)| Tensor::zeros(t.shape(), DType::F32, t.device())).collect::<engine::Result<Vec<_>>>().map_err(Error::from);
        let copy = |(_, t): &(&str, &Tensor)| {
            let copy = t.detach().cast(compute)?;
            t.keep_copy(&copy).map(|()| copy)
        };
        let copies = if compute == DType::BF16 { params.iter().map(copy).collect::<engine::Result<Vec<_>>>()? } else { vec![] };
        Ok(AdamW { names: params.iter().map(|(n, _)| n.to_string()).collect(), m: zeros()?, v: zeros()?, copies })
    }
    /// Whether the copies hold what the parameters do: not if something else wrote these since the last step.
    pub fn copies_hold(&self, params: &[(&str, &Tensor)]) -> bool {
        self.copies.is_empty() || params.iter().all(|(_, p)| p.kept_copy(DType::BF16).is_some())
    }

    /// What step number `step` (from 1) reads of the schedule, on the parameters' device; see [`AdamWMany::schedule`].
    pub fn schedule(o: &Optim, step: u64, lr: f64, device: &Device) -> Result<Tensor> {
        many(o, vec![]).schedule(lr, step, device).map_err(Error::from)
    }

    /// Clips, and takes a step. Returns the gradients' global norm before clipping, an f64 scalar that the host need not wait for. Parameters without a
    /// gradient, and frozen ones, stay as they are; all do, if a gradient or one of the scalars `guard` isn't finite, and then the norm isn't.
    pub fn step(&self, params: &[(&str, &Tensor)], grads: &Grads, schedule: &Tensor, guard: &[&Tensor], o: &Optim) -> Result<Tensor> {
        let moves = |name: &str| !o.freeze.iter().any(|p| groups::matches(p, name));
        let with: Vec<(usize, &Tensor)> =
            params.iter().enumerate().filter(|(_, (name, _))| moves(name)).filter_map(|(i, (_, p))| Some((i, grads.get(p)?))).collect();
        let decay = |&(i, _): &(usize, &Tensor)| if groups::decays(params[i].0, params[i].1.shape(), &o.no_decay) { o.weight_decay } else { 0.0 };
        let [m, v] = [&self.m, &self.v].map(|all| with.iter().map(|(i, _)| &all[*i]).collect::<Vec<_>>());
        let g: Vec<&Tensor> = with.iter().map(|(_, g)| *g).collect();
        let p: Vec<&Tensor> = with.iter().map(|(i, _)| params[*i].1).collect();
        let guard = guard.iter().map(|t| t.affine(0.0, 0.0)).collect::<engine::Result<Vec<_>>>()?;
        let summed: Vec<&Tensor> = g.iter().copied().chain(&guard).collect();
        if summed.is_empty() {
            return Ok(Tensor::zeros(&[], DType::F64, schedule.device())?);
        }
        let (norm, coefficient) = global_norm(GlobalNorm { max_norm: o.clip, scale: 1.0 }, &summed)?;
        let copies: Vec<&Tensor> = if self.copies.is_empty() { vec![] } else { with.iter().map(|(i, _)| &self.copies[*i]).collect() };
        let op = AdamWMany { shadows: !copies.is_empty(), ..many(o, with.iter().map(decay).collect()) };
        // the copy of a parameter that something else wrote: it would stay old if the step is none
        let old = copies.iter().zip(&p).filter(|(_, p)| p.kept_copy(DType::BF16).is_none());
        old.into_iter().try_for_each(|(c, p)| c.assign(&p.detach().cast(DType::BF16)?))?;
        adamw_many(op, &p, &m, &v, &copies, schedule, &coefficient, &g)?;
        p.iter().zip(&copies).try_for_each(|(p, c)| p.keep_copy(c))?;
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

fn many(o: &Optim, weight_decay: Vec<f64>) -> AdamWMany {
    AdamWMany { beta1: o.beta1, beta2: o.beta2, eps: o.eps, weight_decay, shadows: false }
}

/// Which gradients aren't finite, in words; none if all are.
pub fn not_finite(params: &[(&str, &Tensor)], grads: &Grads) -> Result<Option<String>> {
    let mut bad = vec![];
    for (name, p) in params {
        if let Some(g) = grads.get(p)
            && !sum_of_squares(g)?.item()?.is_finite()
        {
            bad.push(*name);
        }
    }
    Ok(match bad[..] {
        [] => None,
        [name] => Some(format!("the gradient of `{name}` is not finite")),
        [name, ..] => Some(format!("the gradients of {} of {} parameters, as `{name}`, are not finite", bad.len(), params.len())),
    })
}

/// What there is to see of a step: for each [part](groups::part) of the model `…grad_norm` (before clipping) and `…update_norm` (of what is added to the
/// parameters).
pub struct Watch {
    /// The parameters before the step, negated.
    before: Vec<Tensor>,
}

impl Watch {
    /// Looks at gradients and parameters before the step.
    pub fn before(params: &[(&str, &Tensor)], grads: &Grads, seen: &mut Seen) -> Result<Watch> {
        by_part(params, "grad_norm", params.iter().map(|(_, p)| grads.get(p).cloned()), seen)?;
        let before = params.iter().map(|(_, p)| p.detach().neg()).collect::<engine::Result<Vec<_>>>()?;
        Ok(Watch { before })
    }
    /// Looks at the parameters after it.
    pub fn after(self, params: &[(&str, &Tensor)], seen: &mut Seen) -> Result<()> {
        let moved = params.iter().zip(self.before).map(|((_, p), b)| p.detach().add(&b)).collect::<engine::Result<Vec<_>>>()?;
        by_part(params, "update_norm", moved.into_iter().map(Some), seen)
    }
}

/// The norm of each part's tensors together.
fn by_part(params: &[(&str, &Tensor)], what: &str, tensors: impl Iterator<Item = Option<Tensor>>, seen: &mut Seen) -> Result<()> {
    let mut parts: BTreeMap<String, Vec<Tensor>> = BTreeMap::new();
    for ((name, _), t) in params.iter().zip(tensors) {
        parts.entry(groups::part(name)).or_default().extend(t);
    }
    for (part, tensors) in parts.iter().filter(|p| !p.1.is_empty()) {
        let all: Vec<&Tensor> = tensors.iter().collect();
        seen.push(format!("{part}.{what}"), &global_norm(GlobalNorm { max_norm: 0.0, scale: 1.0 }, &all)?.0)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Scalars;
    use crate::presets;

    fn setup() -> (Tensor, Tensor) {
        let w = Tensor::from_vec([1.0f32, -2.0, 3.0, 0.5], &[2, 2]).unwrap().requires_grad();
        let b = Tensor::from_vec([0.25f32, -0.25], &[2]).unwrap().requires_grad();
        (w, b)
    }
    fn grads(w: &Tensor, b: &Tensor) -> Grads {
        w.mul(w).unwrap().add(b).unwrap().sum(&[0, 1], false).unwrap().backward().unwrap()
    }

    /// Step number `n`, with a learning rate of 0.1.
    fn step(a: &AdamW, params: &[(&str, &Tensor)], grads: &Grads, n: u64, o: &Optim) -> f64 {
        let schedule = AdamW::schedule(o, n, 0.1, &Device::cpu()).unwrap();
        a.step(params, grads, &schedule, &[], o).unwrap().item().unwrap()
    }

    #[test]
    fn copies_follow_the_parameters() {
        let w = Tensor::randn(&[5, 7], DType::F32, &Device::cpu(), 1, 1).unwrap().requires_grad();
        let params = [("w", &w)];
        let a = AdamW::new(&params, DType::BF16).unwrap();
        let o = presets::smoke().optim;
        let same = || {
            let (kept, want) = (w.cast(DType::BF16).unwrap(), w.detach().affine(1.0, 0.0).unwrap().cast(DType::BF16).unwrap());
            assert_eq!(kept.to_vec::<f32>().unwrap(), want.to_vec::<f32>().unwrap());
        };
        for step in 1..4 {
            assert_eq!(a.copies_hold(&params), step < 3);
            let x = w.cast(DType::BF16).unwrap();
            let grads = x.mul(&x).unwrap().cast(DType::F32).unwrap().sum_all().unwrap().backward().unwrap();
            let before = w.to_vec::<f32>().unwrap();
            a.step(&params, &grads, &AdamW::schedule(&o, step, 0.1, &Device::cpu()).unwrap(), &[], &o).unwrap();
            assert_ne!(w.to_vec::<f32>().unwrap(), before);
            same();
            assert!(a.copies_hold(&params));
            if step == 2 {
                // written by something else: the copy is not taken, and the next step mends it
                w.assign(&Tensor::ones(&[5, 7], DType::F32, &Device::cpu()).unwrap()).unwrap();
                assert!(!a.copies_hold(&params));
                same();
            }
        }
    }

    #[test]
    fn a_guard_that_is_not_finite_keeps_everything_as_it_is() {
        let (w, b) = setup();
        let (params, o) = ([("w", &w), ("b", &b)], presets::quickstart().optim);
        let a = AdamW::new(&params, DType::F32).unwrap();
        let schedule = AdamW::schedule(&o, 1, 0.1, &Device::cpu()).unwrap();
        for (guard, taken) in [(f64::NAN, false), (f64::INFINITY, false), (3.0, true)] {
            let guard = Tensor::full(guard, &[], DType::F32, &Device::cpu()).unwrap();
            let norm = a.step(&params, &grads(&w, &b), &schedule, &[&guard], &o).unwrap().item().unwrap();
            assert_eq!(norm.is_finite(), taken);
            assert_eq!(b.to_vec::<f32>().unwrap() != [0.25, -0.25], taken);
        }
    }

    #[test]
    fn groups_clipping_and_the_formula() {
        let (w, b) = setup();
        let params = [("w", &w), ("b", &b)];
        let a = AdamW::new(&params, DType::F32).unwrap();
        let o = presets::quickstart().optim;
        let (mut looked, mut seen) = (Seen::default(), Scalars::new());
        let watch = Watch::before(&params, &grads(&w, &b), &mut looked).unwrap();
        let norm = step(&a, &params, &grads(&w, &b), 1, &o);
        watch.after(&params, &mut looked).unwrap();
        looked.read(&mut seen).unwrap();
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
        let take = |o: &Optim| {
            let before = [w.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap()].concat();
            let norm = step(&AdamW::new(&params, DType::F32).unwrap(), &params, &grads(&w, &b), 1, o);
            let after = [w.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap()].concat();
            w.assign(&Tensor::from_slice(&before[..4], &[2, 2], w.device()).unwrap()).unwrap();
            b.assign(&Tensor::from_slice(&before[4..], &[2], b.device()).unwrap()).unwrap();
            (norm, before.iter().zip(after).map(|(x, y)| f64::from(y - x)).collect::<Vec<f64>>())
        };
        let g = [2.0f64, -4.0, 6.0, 1.0, 2.0, 2.0];
        let norm = g.iter().map(|g| g * g).sum::<f64>().sqrt();
        for (clip, scale) in [(0.5, 0.5 / norm), (0.0, 1.0), (norm * 1.01, 1.0)] {
            o.clip = clip;
            let (found, moved) = take(&o);
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
        let a = AdamW::new(&[("w", &w), ("b", &b)], DType::F32).unwrap();
        step(&a, &[("w", &w), ("b", &b)], &grads(&w, &b), 1, &o);
        a.save(&path).unwrap();
        let (w2, b2) = (w.detach().add(&w.detach()).unwrap(), b.detach());
        let w2 = Tensor::from_vec(w2.to_vec::<f32>().unwrap().iter().map(|x| x / 2.0).collect::<Vec<_>>(), &[2, 2]).unwrap().requires_grad();
        let b2 = Tensor::from_vec(b2.to_vec::<f32>().unwrap(), &[2]).unwrap().requires_grad();
        let mut c = AdamW::new(&[("w", &w2), ("b", &b2)], DType::F32).unwrap();
        c.load(&path).unwrap();
        step(&a, &[("w", &w), ("b", &b)], &grads(&w, &b), 2, &o);
        step(&c, &[("w", &w2), ("b", &b2)], &grads(&w2, &b2), 2, &o);
        assert_eq!(w.to_vec::<f32>().unwrap(), w2.to_vec::<f32>().unwrap());
        assert_eq!(b.to_vec::<f32>().unwrap(), b2.to_vec::<f32>().unwrap());
        // Damage is an error.
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
        assert!(c.load(&path).unwrap_err().to_string().contains("older checkpoint"));
        let mut other = AdamW::new(&[("x", &w2)], DType::F32).unwrap();
        std::fs::write(&path, &bytes).unwrap();
        assert!(other.load(&path).unwrap_err().to_string().contains("`m.x`"));
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_named() {
        let (w, b) = setup();
        let params = [("layers.0.w", &w), ("layers.0.b", &b)];
        let a = AdamW::new(&params, DType::F32).unwrap();
        let bad = Tensor::from_vec([f32::INFINITY, 1.0], &[2]).unwrap();
        let g = b.mul(&bad).unwrap().sum(&[0], false).unwrap().backward().unwrap();
        assert!(!step(&a, &params, &g, 1, &presets::quickstart().optim).is_finite());
        let named = not_finite(&params, &g).unwrap().unwrap();
        assert!(named.contains("`layers.0.b`"), "{named}");
        assert_eq!(b.to_vec::<f32>().unwrap(), [0.25, -0.25]);
    }
}
