//! Ranks of what a softmax head moves from one token to another.

use super::Ranks;
use super::svd::{effective_rank, singular_values, stable_rank, triangle};
use super::watch::is_softmax;
use crate::{Error, Result};
use engine::DType;
use nn::Decoder;
use rayon::prelude::*;

/// By query head h of each softmax layer, with the values' head g that it reads: the effective rank (Roy & Vetterli 2007) and the stable rank of `W_V W_O`, the map
/// `[M, M]` through `W_V,g [M, D]` and `W_O,h [D, M]` (2505.06708 §4.1 calls them two consecutive linear layers, of rank D at most). Singular values are those
/// of the `[D, D]` product of both factors' triangles.
pub(super) fn value_output(model: &Decoder) -> Result<Vec<Ranks>> {
    let c = model.config();
    let (h, groups, d) = (c.num_attention_heads, c.num_key_value_heads, c.head_dim);
    let weight = |name: String| -> Result<Vec<f64>> {
        let p = model.params().iter().find(|p| p.name == name);
        let p = p.ok_or_else(|| Error::Model(format!("value_output_rank: the model has no parameter `{name}`")))?;
        Ok(p.tensor.detach().cast(DType::F64)?.contiguous()?.to_vec::<f64>()?)
    };
    let mut out = vec![];
    for layer in (0..c.num_hidden_layers).filter(|i| is_softmax(c, *i)) {
        // [groups · D, M] and [M, H · D]
        let v = weight(format!("model.layers.{layer}.self_attn.v_proj.weight"))?;
        let o = weight(format!("model.layers.{layer}.self_attn.o_proj.weight"))?;
        out.push(of_layer(&v, &o, [h, groups, d], layer));
    }
    Ok(out)
}

fn of_layer(v: &[f64], o: &[f64], [h, groups, d]: [usize; 3], layer: usize) -> Ranks {
    let m = v.len() / (groups * d);
    let values: Vec<Vec<f64>> = (0..groups)
        .into_par_iter()
        .map(|g| {
            let columns: Vec<f64> = (0..m * d).map(|i| v[(g * d + i % d) * m + i / d]).collect();
            triangle(&columns, m, d)
        })
        .collect();
    let k = m.min(d);
    let head = |i: usize| {
        let columns: Vec<f64> = o.chunks(h * d).flat_map(|row| row[i * d..][..d].iter().copied()).collect();
        let (a, b) = (triangle(&columns, m, d), &values[i / (h / groups)]);
        let product: Vec<f64> = a.chunks(d).flat_map(|x| b.chunks(d).map(move |y| x.iter().zip(y).map(|(x, y)| x * y).sum())).collect();
        let sigma = singular_values(&product, k, k);
        (effective_rank(&sigma), stable_rank(&sigma))
    };
    let (heads, stable) = (0..h).into_par_iter().map(head).unzip();
    Ranks { layer, heads, stable }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_that_share_values() {
        // M = 4, two query heads of two dimensions, one group; W_V reads channels 0 and 1
        let v = [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0];
        // head 0 writes both, equally large, to channels 2 and 3; head 1 writes dimension 1 three times as large as dimension 0
        #[rustfmt::skip]
        let o = [0.0, 0.0, 1.0, 0.0,
                 0.0, 0.0, 0.0, 3.0,
                 2.0, 0.0, 0.0, 0.0,
                 0.0, 2.0, 0.0, 0.0];
        let r = of_layer(&v, &o, [2, 1, 2], 5);
        let near = |a: &[f64], b: [f64; 2]| a.iter().zip(b).for_each(|(x, y)| assert!((x - y).abs() < 1e-12, "{r:?}"));
        near(&r.heads, [2.0, 4.0 / 3f64.powf(0.75)]);
        near(&r.stable, [2.0, 10.0 / 9.0]);
        assert_eq!(r.layer, 5);
    }
}
