//! The observer that hands a model's tensors to the measures that read them.

use engine::{DType, Result, Tensor};
use nn::{ModelConfig, Observer};

/// Where a tensor was seen.
pub(super) struct At<'a> {
    /// The tap's full name.
    pub name: &'a str,
    pub layer: usize,
    /// The name within the layer, as `attn.hook_z`.
    pub hook: &'a str,
    /// Whether the layer's mixer is softmax attention, of whichever reach.
    pub softmax: bool,
}

/// What reads some of a model's tensors.
pub(super) trait Reader {
    fn reads(&self, at: &At) -> bool;
    fn see(&mut self, at: &At, value: &Tensor) -> Result<()>;
}

/// Shows each tensor to those that read it.
pub(super) struct Watch<'a> {
    pub config: &'a ModelConfig,
    pub readers: Vec<&'a mut dyn Reader>,
}

impl Watch<'_> {
    fn at<'n>(&self, name: &'n str) -> Option<At<'n>> {
        let (layer, hook) = name.strip_prefix("blocks.")?.split_once('.')?;
        let layer = layer.parse().ok()?;
        Some(At { name, layer, hook, softmax: is_softmax(self.config, layer) })
    }
}

pub(super) fn is_softmax(config: &ModelConfig, layer: usize) -> bool {
    config.layer_type(layer).is_softmax()
}

impl Observer for Watch<'_> {
    fn wants(&self, name: &str) -> bool {
        self.at(name).is_some_and(|at| self.readers.iter().any(|r| r.reads(&at)))
    }
    fn see(&mut self, name: &str, value: &Tensor) -> Result<Option<Tensor>> {
        if let Some(at) = self.at(name) {
            let value = value.detach();
            self.readers.iter_mut().filter(|r| r.reads(&at)).try_for_each(|r| r.see(&at, &value))?;
        }
        Ok(None)
    }
}

/// A tensor's numbers in its order, in f32.
pub(super) fn host(t: &Tensor) -> Result<Vec<f32>> {
    t.cast(DType::F32)?.contiguous()?.to_vec::<f32>()
}
