//! Taps: the table of names against models and `docs/taps.md`, replacement and its gradients, what is formed on request.

use engine::{DType, Result, Tensor, no_grad};
use nn::{Access, AttentionGate, Decoder, GateGranularity, GatePosition, Generator, LayerType, ModelConfig, Observer, Part, TAPS, Tap};
use std::collections::BTreeMap;

fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        hidden_size: 6,
        num_hidden_layers: 3,
        layer_types: vec![LayerType::LinearAttention, LayerType::FullAttention, LayerType::SlidingAttention],
        sliding_window: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        linear_num_key_heads: 1,
        linear_num_value_heads: 2,
        linear_key_head_dim: 5,
        linear_value_head_dim: 3,
        num_experts: 3,
        num_experts_per_tok: 2,
        moe_intermediate_size: 4,
        shared_expert_intermediate_size: 5,
        mlp_only_layers: vec![2],
        intermediate_size: 4,
        router_aux_loss_coef: 0.01,
        router_z_loss_coef: 0.01,
        initializer_range: 0.5,
        ..Default::default()
    }
}
/// Gates at all positions, head-wise only where a norm does not undo it.
fn all_gates(gate: AttentionGate, c: ModelConfig) -> ModelConfig {
    let fine = if gate.is_some() { AttentionGate { granularity: GateGranularity::Elementwise, ..gate } } else { gate };
    ModelConfig { value_gate: gate, key_gate: fine, query_gate: fine, dense_gate: fine, ..c }
}
const B: usize = 2;
const T: usize = 7;

fn tokens(seed: u32) -> Tensor {
    Tensor::from_vec((0..(B * T) as u32).map(|i| (i * i * 3 + seed) % 11).collect::<Vec<u32>>(), &[B, T]).unwrap()
}
fn targets() -> Tensor {
    Tensor::from_vec((0..(B * T) as i64).map(|i| (i * 5 + 2) % 11).collect::<Vec<i64>>(), &[B * T]).unwrap()
}

/// Wants all names that `wants` says, and does `see` to them.
struct Of<W, S>(W, S);
impl<W: Fn(&str) -> bool, S: FnMut(&str, &Tensor) -> Result<Option<Tensor>>> Observer for Of<W, S> {
    fn wants(&self, name: &str) -> bool {
        (self.0)(name)
    }
    fn see(&mut self, name: &str, value: &Tensor) -> Result<Option<Tensor>> {
        (self.1)(name, value)
    }
}

/// The objective, with `see` done to what `wants` says.
fn objective(m: &Decoder, wants: impl Fn(&str) -> bool, see: impl FnMut(&str, &Tensor) -> Result<Option<Tensor>>) -> nn::Result<Tensor> {
    Ok(m.loss(&tokens(0), &targets(), None, Some(&mut Of(wants, see)))?.objective)
}
fn all(m: &Decoder, x: &Tensor, cu: Option<&Tensor>) -> BTreeMap<String, Tensor> {
    let mut seen = BTreeMap::new();
    let mut see = Of(
        |_: &str| true,
        |name: &str, t: &Tensor| {
            assert!(seen.insert(name.to_string(), t.detach()).is_none(), "{name} twice");
            Ok(None)
        },
    );
    no_grad(|| m.loss(x, &targets(), cu, Some(&mut see))).unwrap();
    seen
}
fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_vec().unwrap()
}
fn close(a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.shape(), b.shape());
    let (a, b) = (f64s(a), f64s(b));
    let (d, n) = a.iter().zip(&b).fold((0.0, 0.0), |(d, n), (x, y)| (d + (x - y).powi(2), n + y * y));
    assert!((d / n).sqrt() <= tolerance, "off by {:.1e}", (d / n).sqrt());
}

/// What the table says of a tap's shape in a layer, in numbers.
fn shape(name: &str, tap: &Tap, c: &ModelConfig) -> Vec<usize> {
    let layer = name.strip_prefix("blocks.").and_then(|n| n.split_once('.')).map_or(0, |n| n.0.parse().unwrap());
    let sizes = || c.recurrence(layer).unwrap();
    let r = || sizes().value_heads / sizes().key_heads;
    let gate = GatePosition::ALL.into_iter().find(|at| {
        let name = at.key().strip_prefix("attention_").unwrap_or(at.key());
        tap.part == Part::Softmax && [format!("attn.hook_{name}"), format!("attn.hook_{name}_logits")].contains(&tap.name.to_string())
    });
    let says = match gate {
        Some(at) => {
            let fine = c.gate(at).granularity == GateGranularity::Elementwise;
            match at {
                GatePosition::Dense => "[B, T, M]",
                GatePosition::Attention | GatePosition::Query => {
                    if fine {
                        "[B, T, H, D]"
                    } else {
                        "[B, T, H]"
                    }
                }
                GatePosition::Value | GatePosition::Key => {
                    if fine {
                        "[B, T, Hkv, D]"
                    } else {
                        "[B, T, Hkv]"
                    }
                }
            }
        }
        None => tap.shape,
    };
    let number = |s: &str| match s {
        "B" | "S" => B,
        "T" | "P" => T,
        "N" => B * T,
        "M" => c.hidden_size,
        "H" => c.num_attention_heads,
        "Hkv" => c.num_key_value_heads,
        "D" => c.head_dim,
        "Hk" => sizes().key_heads,
        "Hv" => sizes().value_heads,
        "Dk" => sizes().key_dim,
        "Dv" => sizes().value_dim,
        "R" => r(),
        "R·Dv" => r() * sizes().value_dim,
        "E" => c.num_experts,
        "K" => c.num_experts_per_tok,
        "V" => c.vocab_size,
        "I" => c.intermediate_size,
        "Is" => c.shared_expert_intermediate_size,
        "C" => T.div_ceil(64),
        one => one.parse().unwrap_or_else(|_| panic!("{}: {one}", tap.name)),
    };
    says.trim_matches(['[', ']']).split(", ").map(number).collect()
}

#[test]
fn the_table_is_what_models_show() {
    for granularity in [GateGranularity::Elementwise, GateGranularity::Headwise, GateGranularity::None] {
        for (shared, compute) in [(5, DType::F32), (0, DType::BF16)] {
            let attention_gate = AttentionGate { granularity, ..Default::default() };
            // norms behind attention and feed-forward in one layer
            let c = ModelConfig { attention_gate, shared_expert_intermediate_size: shared, post_norm: vec![LayerType::SlidingAttention], ..tiny() };
            // no gates but one, or all
            let c = if shared == 0 { all_gates(attention_gate, c) } else { c };
            let m = Decoder::on(&c, 3, &nn::Placement { compute, ..nn::Placement::cpu(DType::F32) }).unwrap();
            let seen = all(&m, &tokens(0), None);
            let table: BTreeMap<String, &Tap> = c.taps().into_iter().collect();
            assert_eq!(seen.keys().collect::<Vec<_>>(), table.keys().collect::<Vec<_>>());
            assert!(["blocks.1.ln1.hook_out", "blocks.2.attn.hook_out", "blocks.2.mlp.hook_out"].iter().all(|n| table.contains_key(*n)));
            assert!(!["blocks.1.attn.hook_out", "blocks.2.ln1.hook_out", "blocks.2.ln2.hook_out"].iter().any(|n| table.contains_key(*n)));
            for (name, tap) in &table {
                let dtype = match tap.dtype {
                    "compute" => compute,
                    "f32" => DType::F32,
                    "i64" => DType::I64,
                    other => panic!("{name}: {other}"),
                };
                assert_eq!((seen[name].shape(), seen[name].dtype()), (&shape(name, tap, &c)[..], dtype), "{name}");
            }
        }
    }
}

/// Mixers that carry a state, with and without a part, and blocks without a feed-forward.
fn recurrent() -> [ModelConfig; 2] {
    let layer_types = vec![LayerType::Mamba2, LayerType::DeltaNet, LayerType::LinearAttention];
    let sizes = ModelConfig { mamba_num_heads: 4, mamba_head_dim: 3, mamba_state_size: 5, mamba_n_groups: 2, layer_types, ..tiny() };
    let less = ModelConfig { linear_output_gate: false, linear_short_conv: false, ..sizes.clone() };
    [sizes, ModelConfig { num_experts: 0, mlp_only_layers: vec![], intermediate_size: 0, ..less }]
}

#[test]
fn the_table_is_what_recurrent_mixers_show() {
    for c in recurrent() {
        let m = Decoder::new(&c, 3, DType::F32).unwrap();
        let seen = all(&m, &tokens(0), None);
        let table: BTreeMap<String, &Tap> = c.taps().into_iter().collect();
        assert_eq!(seen.keys().collect::<Vec<_>>(), table.keys().collect::<Vec<_>>());
        for (name, tap) in &table {
            assert_eq!(seen[name].shape(), &shape(name, tap, &c)[..], "{name}");
        }
        let has = |name: &str| table.contains_key(name);
        assert!(has("blocks.0.attn.hook_log_decay") && !has("blocks.1.attn.hook_log_decay") && has("blocks.2.attn.hook_log_decay"));
        assert!(has("blocks.0.attn.hook_gate") && has("blocks.1.attn.hook_gate") == c.linear_output_gate);
        assert_eq!(has("blocks.1.hook_resid_mid"), c.has_feed_forward(1));
        // o = A v, and a generation's state is that of the whole
        for layer in 0..3 {
            let of = |hook: &str| &seen[&format!("blocks.{layer}.attn.{hook}")];
            let o = of("hook_effective_attention").matmul(&of("hook_v").permute(&[0, 2, 1, 3]).unwrap()).unwrap();
            close(&o.permute(&[0, 2, 1, 3]).unwrap(), of("hook_recurrence_out"), 1e-5);
            close(&of("hook_states").reshape(of("hook_state").shape()).unwrap(), of("hook_state"), 1e-5);
        }
    }
}

#[test]
fn the_table_is_that_of_the_documentation() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/taps.md");
    let text = std::fs::read_to_string(path).unwrap();
    let place = |t: &Tap| match t.part {
        Part::Model => ("", ""),
        Part::Block => ("…", ""),
        Part::Softmax => ("…", "attention"),
        Part::Linear => ("…", "delta rule"),
        Part::Dense => ("…", "dense"),
        Part::Experts => ("…", "experts"),
    };
    let row = |t: &Tap| {
        let can = match t.access {
            Access::Replaceable => "yes".to_string(),
            Access::Shown(instead) => format!("no: {instead}"),
            Access::OnRequest(instead) => format!("no, on request: {instead}"),
        };
        format!("| `{}{}` | {} | {} | {} | {} | {} | {can} |", place(t).0, t.name, place(t).1, t.shape, t.dtype, t.op, t.meaning)
    };
    let rows: Vec<String> = TAPS.iter().map(row).collect();
    let found: Vec<&str> = text.lines().filter(|l| l.starts_with("| `")).collect();
    assert!(found == rows, "the rows should be:\n{}", rows.join("\n"));
}

#[test]
fn what_is_replaced_is_what_is_computed_with() {
    // with a small epsilon a norm would hide that what comes before it was scaled
    let tiny = || ModelConfig { rms_norm_eps: 0.01, ..tiny() };
    let post = ModelConfig { post_norm: vec![LayerType::SlidingAttention], ..tiny() };
    let shared = AttentionGate { shared: true, ..Default::default() };
    let sandwich = ModelConfig { attention_gate: shared, sdpa_norm: true, sandwich_norm: true, ..all_gates(Default::default(), tiny()) };
    let [with, without] = recurrent().map(|c| ModelConfig { rms_norm_eps: 0.01, ..c });
    [post, sandwich, with, without].iter().for_each(is_computed_with);
}

fn is_computed_with(c: &ModelConfig) {
    let m = Decoder::new(c, 3, DType::F64).unwrap();
    let plain = m.loss(&tokens(0), &targets(), None, None).unwrap().objective;
    let (plain_loss, plain_grads) = (plain.item().unwrap(), plain.backward().unwrap());
    for (name, tap) in m.config().taps() {
        let this = |n: &str| n == name;
        if tap.access != Access::Replaceable {
            let e = objective(&m, this, |_, t| Ok(Some(t.clone()))).err().unwrap().to_string();
            let (Access::Shown(instead) | Access::OnRequest(instead)) = tap.access else { unreachable!() };
            assert!(e.contains(&format!("`{name}`")) && e.contains("can't be replaced") && e.contains(instead), "{e}");
            continue;
        }
        // by itself: nothing changes, in gradients either
        let same = objective(&m, this, |_, t| Ok(Some(t.affine(1.0, 0.0)?))).unwrap();
        assert!((same.item().unwrap() - plain_loss).abs() < 1e-12, "{name}");
        let grads = same.backward().unwrap();
        for p in m.params() {
            close(grads.get(&p.tensor).unwrap(), plain_grads.get(&p.tensor).unwrap(), 1e-9);
        }
        // by its multiple: the loss moves, and its gradient is that of central differences
        let scaled = |s: &Tensor| objective(&m, this, |_, t| Ok(Some(t.mul(s)?)));
        let s = Tensor::full(1.1, &[], DType::F64, &engine::Device::cpu()).unwrap().requires_grad();
        let loss = scaled(&s).unwrap();
        if tap.name == "attn.hook_state" {
            assert_eq!(loss.item().unwrap(), plain_loss, "nothing comes after the last state here");
            continue;
        }
        assert!((loss.item().unwrap() - plain_loss).abs() > 1e-9, "{name} changes nothing");
        let at = |v: f64| scaled(&Tensor::full(v, &[], DType::F64, &engine::Device::cpu()).unwrap()).unwrap().item().unwrap();
        let numeric = (at(1.1 + 1e-5) - at(1.1 - 1e-5)) / 2e-5;
        let ours = loss.backward().unwrap().get(&s).unwrap_or_else(|| panic!("{name}: no gradient")).item().unwrap();
        assert!((ours - numeric).abs() <= 1e-6 * numeric.abs().max(1e-2), "{name}: {ours} against {numeric}");
    }
}

#[test]
fn what_does_not_fit_and_what_fails_is_named() {
    let m = Decoder::new(&tiny(), 3, DType::F32).unwrap();
    let error = |name: &str, see: fn(&Tensor) -> Result<Option<Tensor>>| objective(&m, |n| n == name, |_, t| see(t)).err().unwrap().to_string();
    let e = error("blocks.1.attn.hook_z", |t| Ok(Some(t.narrow(1, 0, 2)?)));
    assert!(e.contains("`blocks.1.attn.hook_z`") && e.contains("[2, 7, 4, 4]") && e.contains("[2, 2, 4, 4]"), "{e}");
    let e = error("blocks.0.attn.hook_beta", |t| Ok(Some(t.cast(DType::F64)?)));
    assert!(e.contains("`blocks.0.attn.hook_beta`") && e.contains("f32") && e.contains("f64"), "{e}");
    let e = error("hook_embed", |_| Err(engine::Error::invalid("mine", "enough")));
    assert!(e.contains("mine: enough"), "{e}");
}

#[test]
fn a_closure_sees_what_is_not_on_request() {
    let m = Decoder::new(&tiny(), 3, DType::F32).unwrap();
    let mut names = vec![];
    let mut see = |name: &str, _: &Tensor| {
        names.push(name.to_string());
        Ok(None)
    };
    m.loss(&tokens(0), &targets(), None, Some(&mut see)).unwrap();
    let on_request = |t: &Tap| matches!(t.access, Access::OnRequest(_));
    let mut expected: Vec<String> = m.config().taps().into_iter().filter(|(_, t)| !on_request(t)).map(|(n, _)| n).collect();
    expected.sort();
    names.sort();
    assert_eq!(names, expected);
}

#[test]
fn a_patch_from_another_run_is_that_run() {
    let m = Decoder::new(&tiny(), 3, DType::F64).unwrap();
    let other = all(&m, &tokens(4), None);
    let mut patch = |name: &str, _: &Tensor| Ok((name == "blocks.1.hook_resid_post").then(|| other[name].clone()));
    let (x, _) = no_grad(|| m.forward(&tokens(0), None, None, Some(&mut patch))).unwrap();
    close(&x, &other["ln_final.hook_out"], 1e-12);
}

#[test]
fn patterns_on_request_are_what_the_kernels_compute() {
    let c = ModelConfig { attention_gate: AttentionGate { granularity: GateGranularity::Headwise, ..Default::default() }, ..tiny() };
    let m = Decoder::new(&c, 3, DType::F64).unwrap();
    let packed = (tokens(0).reshape(&[1, B * T]).unwrap(), Tensor::from_vec([0i64, 5, 14], &[3]).unwrap());
    for (x, cu) in [(tokens(0), None), (packed.0, Some(&packed.1))] {
        let seen = all(&m, &x, cu);
        let of = |name: &str| &seen[name];
        // o = A v, head by head
        let a = of("blocks.0.attn.hook_effective_attention");
        let o = a.matmul(&of("blocks.0.attn.hook_v").permute(&[0, 2, 1, 3]).unwrap()).unwrap();
        close(&o.permute(&[0, 2, 1, 3]).unwrap(), of("blocks.0.attn.hook_recurrence_out"), 1e-9);
        for layer in [1, 2] {
            let at = |hook: &str| &seen[&format!("blocks.{layer}.attn.{hook}")];
            let (b, t) = (x.dim(0), x.dim(1));
            // two query heads read one value head
            let v = at("hook_v")
                .reshape(&[b, t, 2, 1, 4])
                .unwrap()
                .expand(&[b, t, 2, 2, 4])
                .unwrap()
                .contiguous()
                .unwrap()
                .reshape(&[b, t, 4, 4])
                .unwrap();
            let o = at("hook_pattern").matmul(&v.permute(&[0, 2, 1, 3]).unwrap()).unwrap().permute(&[0, 2, 1, 3]).unwrap();
            let z = o.mul(&at("hook_gate").reshape(&[b, t, 4, 1]).unwrap()).unwrap();
            close(&z, at("hook_z"), 1e-9);
            close(&at("hook_attn_scores").softmax(3).unwrap(), at("hook_pattern"), 1e-12);
        }
    }
}

#[test]
fn states_on_request_are_those_of_the_prefixes() {
    let m = Decoder::new(&tiny(), 3, DType::F64).unwrap();
    let state = |x: &Tensor, cu: Option<&Tensor>, name: &str| {
        let mut seen = None;
        let name = format!("blocks.0.attn.{name}");
        let mut see = Of(
            |n: &str| n == name,
            |_: &str, t: &Tensor| {
                seen = Some(t.detach());
                Ok(None)
            },
        );
        no_grad(|| m.forward(x, cu, None, Some(&mut see))).unwrap();
        seen.unwrap()
    };
    let chunk = |x: &Tensor, i: usize| x.narrow(1, i, 1).unwrap().reshape(&[x.dim(0), 2, 5, 3]).unwrap();
    let long = |b: usize, t: usize| Tensor::from_vec((0..(b * t) as u32).map(|i| (i * i * 3 + i / 7) % 11).collect::<Vec<u32>>(), &[b, t]).unwrap();
    let x = long(2, 150);
    let states = state(&x, None, "hook_states");
    assert_eq!(states.shape(), [2, 3, 2, 5, 3]);
    for (i, n) in [64, 128, 150].into_iter().enumerate() {
        let alone = state(&x.narrow(1, 0, n).unwrap(), None, "hook_state");
        close(&chunk(&states, i), &alone, 1e-9);
    }
    // packed: documents that end inside a chunk, at its end, and one over several chunks
    let (x, cu) = (long(1, 300), [0i64, 10, 64, 70, 260, 300]);
    let packed = state(&x, Some(&Tensor::from_vec(cu, &[6]).unwrap()), "hook_states");
    assert_eq!(packed.shape(), [1, 5, 2, 5, 3]);
    for (i, (begin, end)) in [(10, 64), (70, 128), (70, 192), (70, 256), (260, 300)].into_iter().enumerate() {
        let alone = state(&x.narrow(1, begin, end - begin).unwrap(), None, "hook_state");
        close(&chunk(&packed, i), &alone, 1e-9);
    }
}

#[test]
fn generation_goes_on_from_what_is_replaced() {
    let m = Decoder::new(&tiny(), 3, DType::F64).unwrap();
    let write = |see: &mut dyn Observer| -> Vec<f64> {
        let mut g = Generator::new(&m).observed(see);
        g.feed(&[1, 2, 3]).unwrap();
        g.feed(&[4]).unwrap()
    };
    let plain = {
        let mut g = Generator::new(&m);
        g.feed(&[1, 2, 3]).unwrap();
        g.feed(&[4]).unwrap()
    };
    let mut shapes = vec![];
    let mut look = |name: &str, t: &Tensor| {
        if name == "blocks.1.attn.hook_rot_k" {
            shapes.push(t.shape().to_vec());
        }
        Ok(None)
    };
    assert_eq!(write(&mut look), plain);
    assert_eq!(shapes, [[1, 3, 2, 4], [1, 1, 2, 4]]);
    for name in ["blocks.0.attn.hook_state", "blocks.2.attn.hook_z", "blocks.1.attn.hook_rot_k"] {
        let mut zero = |n: &str, t: &Tensor| Ok(if n == name { Some(t.affine(0.0, 0.0)?) } else { None });
        assert_ne!(write(&mut zero), plain, "{name}");
    }
    // evaluation, too
    let mut zero = |n: &str, t: &Tensor| Ok(if n == "blocks.2.attn.hook_z" { Some(t.affine(0.0, 0.0)?) } else { None });
    let losses = |o: Option<&mut dyn Observer>| f64s(&m.token_losses(&tokens(0), &targets(), None, o).unwrap());
    assert_ne!(losses(Some(&mut zero)), losses(None));
}
