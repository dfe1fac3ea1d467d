//! The norms of the residual stream.

use crate::Result;
use crate::config::ModelConfig;
use crate::init::Builder;
use crate::taps::Taps;
use engine::Tensor;
use ops::rms_norm::{rms_norm, rms_norm_residual};

/// Weights of the norms around a mixer or a feed-forward.
pub(crate) struct Norms {
    /// Before it, on the stream.
    pub before: Option<Tensor>,
    /// Behind it, on what it adds to the stream.
    behind: Option<Tensor>,
}

impl Norms {
    /// Those of these [names](ModelConfig::norm_names).
    pub fn new(b: &mut Builder, c: &ModelConfig, names: [Option<&str>; 2]) -> Result<Norms> {
        let mut norm = |name: Option<&str>| name.map(|n| b.constant(&format!("{n}_layernorm.weight"), &[c.hidden_size], c.norm_start())).transpose();
        Ok(Norms { before: norm(names[0])?, behind: norm(names[1])? })
    }

    /// The norm behind, if there is one, of `y`, which is then a tap.
    pub fn behind(&self, y: Tensor, name: &str, c: &ModelConfig, taps: &mut Taps) -> Result<Tensor> {
        Ok(match &self.behind {
            Some(w) => rms_norm(&taps.tap(name, y)?, w, c.rms_norm_eps, c.zero_centered_norms)?,
            None => y,
        })
    }
}

/// `h = stream + delta`, and its norm.
pub(crate) fn add_norm(delta: Option<Tensor>, stream: Tensor, weight: &Tensor, c: &ModelConfig) -> Result<(Tensor, Tensor)> {
    Ok(match delta {
        Some(d) => rms_norm_residual(&d, &stream, weight, c.rms_norm_eps, c.zero_centered_norms)?,
        None => (rms_norm(&stream, weight, c.rms_norm_eps, c.zero_centered_norms)?, stream),
    })
}

/// [`add_norm`], with taps on the stream and its norm: a stream that is replaced is normalised anew. Without a norm, the stream twice.
pub(crate) fn tapped_norm(
    delta: Option<Tensor>,
    stream: Tensor,
    weight: Option<&Tensor>,
    c: &ModelConfig,
    taps: &mut Taps,
    [stream_name, norm_name]: [&str; 2],
) -> Result<(Tensor, Tensor)> {
    let Some(weight) = weight else {
        let h = taps.tap(stream_name, if let Some(d) = delta { stream.add(&d)? } else { stream })?;
        return Ok((h.clone(), h));
    };
    let (mut x, mut h) = add_norm(delta, stream, weight, c)?;
    if let Some(replaced) = taps.offer(stream_name, || Ok(h.clone()))? {
        (x, h) = add_norm(None, replaced, weight, c)?;
    }
    Ok((taps.tap(norm_name, x)?, h))
}
