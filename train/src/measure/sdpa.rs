//! Softmax attention's output on both sides of its gate (2505.06708 §4.2 and App. A.3: mean magnitude, and the parts below 1e-2 and 1e-3).

use super::watch::{At, Reader, host};
use super::{Magnitudes, SdpaOutput};
use engine::{Result, Tensor};
use std::collections::BTreeMap;

const BEFORE: &str = "attn.hook_z_pre_gate";
const AFTER: &str = "attn.hook_z";

#[derive(Clone, Copy, Default)]
struct Sum {
    n: u64,
    sum: f64,
    below_1e2: u64,
    below_1e3: u64,
}

impl Sum {
    fn add(&mut self, values: &[f32]) {
        for x in values {
            let size = x.abs();
            self.sum += f64::from(size);
            self.below_1e2 += u64::from(size < 1e-2);
            self.below_1e3 += u64::from(size < 1e-3);
        }
        self.n += values.len() as u64;
    }
    /// Nothing of nothing.
    fn finish(&self) -> Option<Magnitudes> {
        let part = |x: f64| x / self.n as f64;
        (self.n > 0).then(|| Magnitudes { mean_abs: part(self.sum), below_1e2: part(self.below_1e2 as f64), below_1e3: part(self.below_1e3 as f64) })
    }
}

/// Outputs over a text.
#[derive(Default)]
pub(super) struct Outputs {
    layers: BTreeMap<usize, [Sum; 2]>,
}

impl Outputs {
    pub fn finish(self) -> Vec<SdpaOutput> {
        let each = self
            .layers
            .iter()
            .filter_map(|(layer, [before, after])| Some(SdpaOutput { layer: *layer, before: before.finish(), after: after.finish()? }));
        each.collect()
    }
}

impl Reader for Outputs {
    fn reads(&self, at: &At) -> bool {
        at.softmax && [BEFORE, AFTER].contains(&at.hook)
    }
    fn see(&mut self, at: &At, value: &Tensor) -> Result<()> {
        self.layers.entry(at.layer).or_default()[usize::from(at.hook == AFTER)].add(&host(value)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides() {
        let mut o = Outputs::default();
        let see = |o: &mut Outputs, hook: &str, x: &[f32]| {
            let at = At { name: "", layer: 3, hook, softmax: true };
            assert!(o.reads(&at));
            o.see(&at, &Tensor::from_vec(x, &[1, 1, 1, x.len()]).unwrap()).unwrap();
        };
        see(&mut o, AFTER, &[0.0005, -0.005, 0.5, -1.0]);
        assert!(o.layers.len() == 1 && !o.reads(&At { name: "", layer: 0, hook: AFTER, softmax: false }));
        see(&mut o, BEFORE, &[2.0, -4.0]);
        let m = o.finish().remove(0);
        let (before, after) = (m.before.unwrap(), m.after);
        assert_eq!((m.layer, before.mean_abs, before.below_1e2), (3, 3.0, 0.0));
        assert!((after.mean_abs - 1.5055 / 4.0).abs() < 1e-8 && after.below_1e2 == 0.5 && after.below_1e3 == 0.25, "{after:?}");
        // without the tap in front of the gate, nothing is said of it
        let mut o = Outputs::default();
        see(&mut o, AFTER, &[1.0]);
        assert!(o.finish()[0].before.is_none());
    }
}
