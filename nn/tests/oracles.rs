//! Against the golden folders that `tests/oracles/oracles.py` made with transformers (and, for DeltaNet, with fla-core's naive recurrence): checkpoints in all spellings, values, gradients, training, decoding.

use engine::{DType, Tensor, no_grad};
use nn::tensor_file::TensorFile;
use nn::{Decoder, Generator, Losses, Sampler, SaveOptions};
use ops::adamw::{AdamW, adamw};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Bounds on RMS(ours − theirs) / RMS(theirs), our f32 against transformers' f64.
const VALUES: f64 = 1e-5;
const GRADIENTS: f64 = 1e-4;
const TRAINING: f64 = 1e-4;

const MODELS: [&str; 23] = [
    "next_d32",
    "next_d64_old",
    "next_d128_shards",
    "next_d256",
    "qwen3_tied",
    "qwen3_moe",
    "qwen3_5_d32",
    "qwen3_5_moe_d256",
    "qwen3_5_images_d64",
    "qwen3_5_moe_images_d128",
    "olmo_hybrid_d32",
    "olmo_hybrid_d64",
    "next_yarn_d32",
    "qwen3_yarn",
    "qwen3_yarn_factor",
    "qwen3_llama3",
    "qwen3_linear",
    "gated_head_d128",
    "gated_elements_d64",
    "mamba2_groups",
    "mamba2_limits",
    "delta_net_d16",
    "delta_net_beta2",
];
/// Those of them that are a Qwen3-Next, and saved as one.
const NEXT: [&str; 2] = ["next", "qwen3_5"];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/golden").join(name)
}

/// A golden file, read.
struct Gold(BTreeMap<String, Vec<f64>>);

impl Gold {
    fn of(name: &str) -> Gold {
        let path = folder(name).join("golden.safetensors");
        let file = TensorFile::open(&path).unwrap();
        let read = |(name, v): (String, safetensors::tensor::TensorView)| {
            let wide = match v.dtype() {
                safetensors::Dtype::F32 => v.data().as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x).into()).collect(),
                safetensors::Dtype::I64 => v.data().as_chunks::<8>().0.iter().map(|x| i64::from_le_bytes(*x) as f64).collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, wide)
        };
        Gold(file.tensors(&path).unwrap().into_iter().map(read).collect())
    }
    fn get(&self, name: &str) -> &[f64] {
        self.0.get(name).unwrap_or_else(|| panic!("no {name}"))
    }
    fn ids(&self, name: &str) -> Vec<u32> {
        self.get(name).iter().map(|x| *x as u32).collect()
    }
    /// Where each document begins and ends.
    fn documents(&self) -> Vec<(usize, usize)> {
        self.get("cu_seqlens").windows(2).map(|w| (w[0] as usize, w[1] as usize)).collect()
    }
}

/// What transformers has in memory for a file's tensor: experts fused, one convolution, no wrapper.
fn in_memory(name: &str) -> String {
    let mut name = name.replace("model.language_model.", "model.");
    for (file, memory) in [
        ("attention_layer_norm", "input_layernorm"),
        ("feedforward_layer_norm", "post_attention_layernorm"),
        ("q_conv1d", "conv1d"),
        ("k_conv1d", "conv1d"),
        ("v_conv1d", "conv1d"),
    ] {
        name = name.replace(&format!(".{file}."), &format!(".{memory}."));
    }
    match name.split_once(".experts.").map(|(base, rest)| (base, rest.split('.').collect::<Vec<_>>())) {
        Some((base, rest)) if rest.len() == 3 => format!("{base}.experts.{}", if rest[1] == "down_proj" { "down_proj" } else { "gate_up_proj" }),
        _ => name,
    }
}

/// All documents in a row, as a model takes them.
struct Packed {
    tokens: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
}

impl Packed {
    fn of(gold: &Gold) -> Packed {
        let ids = gold.ids("input_ids");
        let next = gold.documents().iter().flat_map(|(a, b)| ids[a + 1..*b].iter().map(|i| i64::from(*i)).chain([-100])).collect::<Vec<i64>>();
        let cu: Vec<i64> = gold.get("cu_seqlens").iter().map(|x| *x as i64).collect();
        Packed {
            tokens: Tensor::from_slice(&ids, &[1, ids.len()], &engine::Device::cpu()).unwrap(),
            targets: Tensor::from_vec(next, &[ids.len()]).unwrap(),
            cu_seqlens: Tensor::from_slice(&cu, &[cu.len()], &engine::Device::cpu()).unwrap(),
        }
    }
    fn loss(&self, model: &Decoder) -> Losses {
        model.loss(&self.tokens, &self.targets, Some(&self.cu_seqlens), None).unwrap()
    }
}

/// The worst error of each kind; those above their bound are collected.
#[derive(Default)]
struct Worst {
    of: BTreeMap<&'static str, (f64, String)>,
    wrong: Vec<String>,
}

impl Worst {
    fn see(&mut self, kind: &'static str, name: &str, bound: f64, ours: &[f64], theirs: &[f64]) {
        assert_eq!(ours.len(), theirs.len(), "{name}");
        let square = |x: &mut dyn Iterator<Item = f64>| x.map(|d| d * d).sum::<f64>();
        let d = square(&mut ours.iter().zip(theirs).map(|(x, y)| x - y));
        let error = if d == 0.0 { 0.0 } else { (d / square(&mut theirs.iter().copied())).sqrt() };
        if error.is_nan() || error > bound {
            self.wrong.push(format!("{kind} {name}: {error:.1e}, at most {bound:.0e}"));
        }
        let worst = self.of.entry(kind).or_insert((-1.0, String::new()));
        if error.is_nan() || error > worst.0 {
            *worst = (error, name.to_string());
        }
    }
    fn say(self, model: &str) {
        let said: Vec<String> = self.of.iter().map(|(kind, (e, name))| format!("{kind} {e:.1e} ({name})")).collect();
        println!("{model}: worst {}", said.join(", "));
        assert!(self.wrong.is_empty(), "{model} is too far from transformers:\n{}", self.wrong.join("\n"));
    }
}

/// Names of the tensors in a folder that are the text model's, in order; of a tied projection that stands there twice, the embedding.
fn of_file(name: &str) -> Vec<String> {
    let mut names = vec![];
    for entry in std::fs::read_dir(folder(name)).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") && path.file_stem().is_some_and(|s| s != "golden") {
            names.extend(TensorFile::open(&path).unwrap().tensors(&path).unwrap().into_keys());
        }
    }
    let other = |n: &str| n.starts_with("mtp.") || n.starts_with("model.visual.") || (name == "qwen3_tied" && n == "lm_head.weight");
    names.retain(|n| !other(n));
    names.sort();
    names
}

fn f64s(t: &Tensor) -> Vec<f64> {
    t.to_vec().unwrap()
}

/// Logits of tokens [B, T]; what the taps and the routers show is compared, too, if it is asked for.
fn forward(model: &Decoder, tokens: &Tensor, cu_seqlens: Option<&Tensor>, mut compare: Option<(&mut Worst, &Gold)>) -> Vec<f64> {
    let c = model.config();
    let mut streams = vec![];
    let mut tap = |name: &str, t: &Tensor| {
        if name.ends_with("hook_resid_post") {
            streams.push(f64s(t));
        }
        Ok(None)
    };
    let (x, routers) = no_grad(|| model.forward(tokens, cu_seqlens, None, Some(&mut tap))).unwrap();
    if let Some((worst, gold)) = &mut compare {
        assert_eq!(streams.len(), c.num_hidden_layers);
        for (i, stream) in streams.iter().enumerate() {
            worst.see("hidden", &format!("{i}"), VALUES, stream, gold.get(&format!("hidden.{i}")));
        }
        worst.see("hidden", "norm", VALUES, &f64s(&x), gold.get("hidden.norm"));
        let sparse: Vec<usize> = (0..c.num_hidden_layers).filter(|i| c.is_sparse(*i)).collect();
        assert_eq!((sparse.len(), routers.len()), (routers.len(), gold.0.keys().filter(|k| k.starts_with("router.")).count()));
        for (i, router) in sparse.iter().zip(&routers) {
            worst.see("router", &format!("{i}"), VALUES, &f64s(router), gold.get(&format!("router.{i}")));
        }
    }
    no_grad(|| model.logits(&x.reshape(&[tokens.numel(), c.hidden_size])?)).unwrap().to_vec().unwrap()
}

#[test]
fn logits_states_losses_and_gradients_are_those_of_transformers() {
    for name in MODELS {
        let (gold, mut worst) = (Gold::of(name), Worst::default());
        let model = Decoder::open(&folder(name)).unwrap();
        let batch = Packed::of(&gold);
        let logits = forward(&model, &batch.tokens, Some(&batch.cu_seqlens), Some((&mut worst, &gold)));
        worst.see("logits", "packed", VALUES, &logits, gold.get("logits"));
        let documents = gold.documents();
        let v = model.config().vocab_size;
        for (a, b) in &documents {
            let alone = forward(&model, &batch.tokens.narrow(1, *a, b - a).unwrap(), None, None);
            worst.see("logits", &format!("{} alone", b - a), VALUES, &alone, &gold.get("logits")[a * v..b * v]);
        }
        let long = documents[0].1;
        if documents.iter().all(|(a, b)| b - a == long) {
            let rows = batch.tokens.reshape(&[documents.len(), long]).unwrap();
            worst.see("logits", "batch", VALUES, &forward(&model, &rows, None, None), gold.get("logits"));
        }
        let losses = batch.loss(&model);
        worst.see("loss", "objective", VALUES, &f64s(&losses.objective), gold.get("loss"));
        if let Some(l) = &losses.load_balancing {
            worst.see("loss", "load balancing", VALUES, &f64s(l), gold.get("aux_loss"));
        }
        let grads = losses.objective.backward().unwrap();
        let of = |p: &nn::Param| Ok(grads.get(&p.tensor).unwrap_or_else(|| panic!("{} got no gradient", p.name)).clone());
        let ours = model.named_as_in(&folder(name), of).unwrap();
        let mut names: Vec<String> = ours.iter().map(|(name, _)| name.clone()).collect();
        names.sort();
        assert_eq!(names, of_file(name), "{name}");
        // parts of what is one tensor in memory follow each other
        let mut seen = BTreeMap::<String, usize>::new();
        for (name, t) in &ours {
            let key = format!("grad.{}", in_memory(name));
            let from = seen.entry(key.clone()).or_default();
            worst.see("gradient", name, GRADIENTS, &f64s(t), &gold.get(&key)[*from..*from + t.numel()]);
            *from += t.numel();
        }
        let theirs = gold.0.iter().filter(|(key, _)| key.starts_with("grad.")).map(|(key, v)| (key.clone(), v.len()));
        assert_eq!(seen.into_iter().collect::<Vec<_>>(), theirs.collect::<Vec<_>>(), "{name}");
        worst.say(name);
    }
}

#[test]
fn twenty_updates_lose_as_in_transformers() {
    for name in MODELS {
        let (gold, mut worst) = (Gold::of(name), Worst::default());
        let model = Decoder::open(&folder(name)).unwrap();
        let batch = Packed::of(&gold);
        let zeros = |t: &Tensor| Tensor::zeros(t.shape(), DType::F32, t.device()).unwrap();
        let moments: Vec<[Tensor; 2]> = model.params().iter().map(|p| [zeros(&p.tensor), zeros(&p.tensor)]).collect();
        let theirs = gold.get("adamw");
        assert_eq!(theirs.len(), 20);
        for step in 1..=20 {
            let loss = batch.loss(&model).objective;
            worst.see("loss", &format!("{step}"), TRAINING, &f64s(&loss), &theirs[step - 1..step]);
            let grads = loss.backward().unwrap();
            let op = AdamW { lr: 3e-4, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 1.0, step: step as u64, grad_scale: 1.0 };
            for (p, [m, v]) in model.params().iter().zip(&moments) {
                adamw(op, &p.tensor, m, v, grads.get(&p.tensor).unwrap()).unwrap();
            }
        }
        worst.say(name);
    }
}

#[test]
fn greedy_continuations_are_those_of_transformers() {
    let greedy = Sampler { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
    for name in MODELS {
        let gold = Gold::of(name);
        let model = Decoder::open(&folder(name)).unwrap();
        let theirs = gold.ids("continuation");
        assert_eq!(theirs.len(), 24);
        let ours = Generator::new(&model).generate(&gold.ids("prompt"), theirs.len(), &greedy, |_| {}).unwrap();
        assert_eq!(ours, theirs, "{name}");
        println!("{name}: all {} tokens", ours.len());
    }
}

/// The folders stay, so that `oracles.py --check target/tmp/oracles/FORM/NAME` can open them in transformers.
#[test]
fn what_was_read_is_saved_whole() {
    for name in MODELS {
        let model = Decoder::open(&folder(name)).unwrap();
        for (form, dtype, max_shard_bytes) in [
            ("f32", None, None),
            ("shards", Some(DType::F32), Some(20_000)),
            ("bf16", Some(DType::BF16), Some(10_000)),
            ("f16", Some(DType::F16), None),
        ] {
            let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("oracles").join(form).join(name);
            std::fs::remove_dir_all(&dir).ok();
            std::fs::create_dir_all(&dir).unwrap();
            model.save_with(&dir, &SaveOptions { dtype, max_shard_bytes, ..Default::default() }).unwrap();
            let files: Vec<String> = std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            assert_eq!(files.iter().any(|f| f == "model.safetensors"), max_shard_bytes.is_none(), "{files:?}");
            assert!(max_shard_bytes.is_none() || files.contains(&"model.safetensors.index.json".into()) && files.len() > 3, "{files:?}");
            let back = Decoder::open(&dir).unwrap();
            for (a, b) in model.params().iter().zip(back.params()) {
                let (a, b) = ((&a.name, a.tensor.to_vec::<f32>().unwrap()), (&b.name, b.tensor.to_vec::<f32>().unwrap()));
                let kept: Vec<f32> = a.1.iter().map(|x| rounded(*x, dtype)).collect();
                assert!(a.0 == b.0 && kept.iter().map(|x| x.to_bits()).eq(b.1.iter().map(|x| x.to_bits())), "{} in {form}", a.0);
            }
            assert_eq!(model.aside().tensors().collect::<Vec<_>>(), back.aside().tensors().collect::<Vec<_>>());
            assert_eq!(model.aside().files().collect::<Vec<_>>(), back.aside().files().collect::<Vec<_>>());
            let json = std::fs::read_to_string(dir.join("config.json")).unwrap();
            let kind = if name.starts_with("mamba2") {
                "\"model_type\": \"mamba2\""
            } else if NEXT.iter().any(|n| name.starts_with(n)) {
                "\"model_type\": \"qwen3_next\""
            } else {
                "\"model_type\": \"tidegate\""
            };
            let spelled = dtype.map_or("float32", |d| {
                if d == DType::BF16 {
                    "bfloat16"
                } else if d == DType::F16 {
                    "float16"
                } else {
                    "float32"
                }
            });
            assert!(json.contains(kind) && json.contains(&format!("\"dtype\": \"{spelled}\"")), "{json}");
        }
    }
}

/// To the nearest number with so few bits, of two the one whose last bit is 0: by arithmetic, not by a cast.
fn rounded(x: f32, dtype: Option<DType>) -> f32 {
    let (bits, least) = match dtype {
        Some(DType::BF16) => (8, -133),
        Some(DType::F16) => (11, -24),
        _ => return x,
    };
    if x == 0.0 {
        return x;
    }
    // the value of the last bit: of so many from the first, but never below the smallest number
    let exponent = f64::from(x.abs()).log2().floor() as i32;
    let last = 2f64.powi((exponent + 1 - bits).max(least));
    ((f64::from(x) / last).round_ties_even() * last) as f32
}
