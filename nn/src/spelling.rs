//! How files spell a parameter: whole, or in tensors of which each holds some of its numbers. In memory every family has one form, Qwen3-Next's with gate
//! and up projections fused; a file's rows may stand in another order.

use crate::{ModelConfig, Param, Result};
use engine::Tensor;
use std::iter::once;
use std::ops::Range;

/// A tensor of a file that is a parameter, or a part of it.
pub(crate) struct Piece {
    pub name: String,
    pub shape: Vec<usize>,
    /// Which of the parameter's numbers it holds, in its own order.
    pub ranges: Vec<Range<usize>>,
}

impl Piece {
    /// Rows of a parameter whose rows have shape `tail`.
    fn rows(name: String, rows: impl IntoIterator<Item = Range<usize>>, tail: &[usize]) -> Piece {
        let width: usize = tail.iter().product();
        let (mut n, mut ranges) = (0, Vec::<Range<usize>>::new());
        for r in rows {
            n += r.len();
            match ranges.last_mut() {
                Some(last) if last.end == r.start * width => last.end = r.end * width,
                _ => ranges.push(r.start * width..r.end * width),
            }
        }
        Piece { name, shape: [&[n], tail].concat(), ranges }
    }

    /// This part of a tensor that has the parameter's shape.
    pub fn of(&self, t: &Tensor) -> Result<Tensor> {
        let flat = t.reshape(&[t.numel()])?;
        let parts = self.ranges.iter().map(|r| flat.narrow(0, r.start, r.len())).collect::<engine::Result<Vec<_>>>()?;
        let one = if let [part] = &parts[..] { part.clone() } else { Tensor::cat(&parts.iter().collect::<Vec<_>>(), 0)? };
        Ok(one.reshape(&self.shape)?)
    }
}

/// What else OLMo-Hybrid calls parameters.
const RENAMED: [(&str, &str); 4] = [
    (".linear_attn.out_proj.weight", ".linear_attn.o_proj.weight"),
    (".linear_attn.norm.weight", ".linear_attn.o_norm.weight"),
    (".input_layernorm.weight", ".attention_layer_norm.weight"),
    (".post_attention_layernorm.weight", ".feedforward_layer_norm.weight"),
];

/// Whole names, and ends of a layer's, in transformers' Mamba2, and ours.
const MAMBA2: [(&str, &str); 2] = [("backbone.embeddings.weight", "model.embed_tokens.weight"), ("backbone.norm_f.weight", "model.norm.weight")];
const MAMBA2_LAYER: [(&str, &str); 2] = [("norm.weight", "input_layernorm.weight"), ("mixer.", "mamba.")];
/// Its authors' name for the embedding.
const MAMBA2_EMBED: &str = "backbone.embedding.weight";

/// What we call a tensor that a Mamba2's file calls `name`; none where the name is of no such file.
pub(crate) fn from_mamba2(name: &str) -> Option<String> {
    let name = if name == MAMBA2_EMBED { MAMBA2[0].0 } else { name };
    if let Some((_, ours)) = MAMBA2.iter().find(|(theirs, _)| *theirs == name) {
        return Some((*ours).into());
    }
    let (layer, rest) = name.strip_prefix("backbone.layers.")?.split_once('.')?;
    MAMBA2_LAYER.iter().find_map(|(theirs, ours)| Some(format!("model.layers.{layer}.{ours}{}", rest.strip_prefix(theirs)?)))
}

/// What a Mamba2's file calls a parameter of ours.
pub(crate) fn in_mamba2(name: &str) -> String {
    if let Some((theirs, _)) = MAMBA2.iter().find(|(_, ours)| *ours == name) {
        return (*theirs).into();
    }
    let layer = name.strip_prefix("model.layers.").and_then(|n| n.split_once('.'));
    let of_layer = |(layer, rest): (&str, &str)| {
        MAMBA2_LAYER.iter().find_map(|(theirs, ours)| Some(format!("backbone.layers.{layer}.{theirs}{}", rest.strip_prefix(ours)?)))
    };
    layer.and_then(of_layer).unwrap_or_else(|| name.into())
}

/// How we write a parameter: as transformers writes a Qwen3-Next, gate and up projections apart and each expert for itself.
fn written(name: &str, shape: &[usize]) -> Vec<Piece> {
    let (rows, tail) = (shape[0], &shape[1..]);
    let part = |name: String, rows: Range<usize>| Piece::rows(name, once(rows), tail);
    if let Some(base) = name.strip_suffix("gate_up_proj.weight") {
        return vec![part(format!("{base}gate_proj.weight"), 0..rows / 2), part(format!("{base}up_proj.weight"), rows / 2..rows)];
    }
    let Some((base, kind)) = name.split_once("experts.").filter(|(_, kind)| !kind.contains('.')) else {
        return vec![part(name.into(), 0..rows)];
    };
    let (n, tail) = (shape[1], &shape[2..]);
    let part =
        |e: usize, kind: &str, r: Range<usize>| Piece::rows(format!("{base}experts.{e}.{kind}.weight"), once(e * n + r.start..e * n + r.end), tail);
    let of_expert = |e: usize| match kind {
        "gate_up_proj" => vec![part(e, "gate_proj", 0..n / 2), part(e, "up_proj", n / 2..n)],
        _ => vec![part(e, kind, 0..n)],
    };
    (0..rows).flat_map(of_expert).collect()
}

/// A tensor of a parameter's shape as we write it: names, and views.
pub(crate) fn parts(name: &str, t: &Tensor) -> Result<Vec<(String, Tensor)>> {
    written(name, t.shape()).into_iter().map(|piece| Ok((piece.name.clone(), piece.of(t)?))).collect()
}

/// How else a parameter of a model is read. `grouped`: the file's query projections hold the rows of one key/value group after the other, queries before
/// gates.
fn others(name: &str, shape: &[usize], c: &ModelConfig, grouped: bool) -> Vec<Vec<Piece>> {
    let (rows, tail) = (shape[0], &shape[1..]);
    let part = |name: String, rows: Range<usize>| Piece::rows(name, once(rows), tail);
    let (nk, dk, dv) = (c.linear_num_key_heads, c.linear_key_head_dim, c.linear_value_head_dim);
    let r = c.linear_num_value_heads / nk;
    // rows of every key head, of which each has as many
    let of_heads = |name: String, parts: &[(usize, usize)]| {
        let of_part = |(from, to): &(usize, usize)| (0..nk).map(move |j| j * (rows / nk) + from..j * (rows / nk) + to).collect::<Vec<_>>();
        Piece::rows(name, parts.iter().flat_map(of_part), tail)
    };
    if name.ends_with("gate_up_proj.weight") || name.ends_with("experts.gate_up_proj") || name.ends_with("experts.down_proj") {
        return vec![vec![part(name.into(), 0..rows)]];
    }
    if let Some(base) = name.strip_suffix("in_proj_qkvz.weight") {
        if !c.linear_output_gate {
            return vec![];
        }
        let [q, k, v, z] = [(0, dk), (dk, 2 * dk), (2 * dk, 2 * dk + r * dv), (2 * dk + r * dv, 2 * dk + 2 * r * dv)];
        let qwen3_5 = vec![of_heads(format!("{base}in_proj_qkv.weight"), &[q, k, v]), of_heads(format!("{base}in_proj_z.weight"), &[z])];
        let olmo = [("q", q), ("k", k), ("v", v), ("g", z)].map(|(kind, part)| of_heads(format!("{base}{kind}_proj.weight"), &[part]));
        return vec![qwen3_5, olmo.into()];
    }
    if let Some(base) = name.strip_suffix("in_proj_ba.weight")
        && rows == 2 * c.linear_num_value_heads
    {
        let two = |b: &str, a: &str| vec![of_heads(format!("{base}{b}.weight"), &[(0, r)]), of_heads(format!("{base}{a}.weight"), &[(r, 2 * r)])];
        return vec![two("in_proj_b", "in_proj_a"), two("b_proj", "a_proj")];
    }
    if let Some(base) = name.strip_suffix("in_proj_ba.weight") {
        return vec![vec![of_heads(format!("{base}b_proj.weight"), &[(0, r)])]];
    }
    if let Some(base) = name.strip_suffix("linear_attn.conv1d.weight").map(|base| format!("{base}linear_attn.")) {
        // OLMo-Hybrid's is split as its projections are; transformers 5.23 writes three of (almost) the same size instead, whatever is in them
        let split = |at: [usize; 2]| {
            let rows = [("q", 0..at[0]), ("k", at[0]..at[1]), ("v", at[1]..rows)];
            rows.map(|(kind, rows)| part(format!("{base}{kind}_conv1d.weight"), rows)).into()
        };
        let third = rows.div_ceil(3);
        return vec![split([nk * dk, 2 * nk * dk]), split([third, (2 * third).min(rows)])];
    }
    if grouped && name.contains("self_attn.q_proj.") {
        let (d, g, n) = (c.head_dim, c.gate_dim(), c.num_attention_heads / c.num_key_value_heads);
        let of_group = |group: usize| {
            let heads = move || group * n..(group + 1) * n;
            heads().map(move |h| h * (d + g)..h * (d + g) + d).chain(heads().map(move |h| h * (d + g) + d..(h + 1) * (d + g)))
        };
        return vec![vec![Piece::rows(name.into(), (0..c.num_key_value_heads).flat_map(of_group), tail)]];
    }
    let renamed = |suffix: &str, other: &str| name.strip_suffix(suffix).map(|base| vec![part(format!("{base}{other}"), 0..rows)]);
    RENAMED.iter().filter_map(|(ours, theirs)| renamed(ours, theirs)).collect()
}

/// The parameter in the spelling of a file that has, or has not, tensors of given names and shapes: of the others the first that
/// is there whole, else the first that is there in part, else ours.
pub(crate) fn found(p: &Param, c: &ModelConfig, grouped: bool, has: impl Fn(&str) -> Option<Vec<usize>>) -> Vec<Piece> {
    let shape = p.tensor.shape();
    let mut others = others(&p.name, shape, c, grouped);
    let fits = |p: &Piece| has(&p.name).is_some_and(|shape| shape == p.shape);
    let at = others.iter().position(|s| s.iter().all(fits)).or_else(|| others.iter().position(|s| s.iter().any(|p| has(&p.name).is_some())));
    at.map_or_else(|| written(&p.name, shape), |at| others.swap_remove(at))
}
