//! Against transformers: the checkpoint, logits, losses and every gradient that `tests/golden/make_qwen3_next.py` wrote.

use engine::{DType, Tensor, no_grad};
use nn::{Decoder, ModelConfig};
use safetensors::SafeTensors;
use std::path::Path;

/// RMS(diff)/RMS(ref), transformers made to compute in f64 against our f64.
const BOUND: f64 = 1e-8;

fn f64s(st: &SafeTensors, name: &str) -> Vec<f64> {
    let v = st.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}"));
    v.data().as_chunks::<8>().0.iter().map(|x| f64::from_le_bytes(*x)).collect()
}

fn error(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len());
    let d: f64 = ours.iter().zip(theirs).map(|(x, y)| (x - y).powi(2)).sum();
    (d / theirs.iter().map(|y| y * y).sum::<f64>()).sqrt()
}

/// The gradient of one of our parameters, gathered from transformers' parameters (it holds gate and up apart where we fuse them).
fn their_gradient(st: &SafeTensors, name: &str) -> Vec<f64> {
    match name.strip_suffix("gate_up_proj.weight") {
        Some(base) => [f64s(st, &format!("grad.{base}gate_proj.weight")), f64s(st, &format!("grad.{base}up_proj.weight"))].concat(),
        None => f64s(st, &format!("grad.{name}")),
    }
}

#[test]
fn logits_losses_and_gradients_are_those_of_transformers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/qwen3_next");
    let bytes = std::fs::read(dir.join("golden.safetensors")).unwrap();
    let gold = SafeTensors::deserialize(&bytes).unwrap();
    let json = std::fs::read_to_string(dir.join("config.json")).unwrap();
    let config = ModelConfig::from_json(serde_json::from_str(&json).unwrap()).unwrap();
    let ids = gold.tensor("input_ids").unwrap();
    let (b, t) = (ids.shape()[0], ids.shape()[1]);
    let ids: Vec<i64> = ids.data().as_chunks::<8>().0.iter().map(|x| i64::from_le_bytes(*x)).collect();
    let tokens = Tensor::from_vec(ids.iter().map(|i| *i as u32).collect::<Vec<u32>>(), &[b, t]).unwrap();
    // transformers shifts inside: the last position of each row predicts nothing
    let next: Vec<i64> = ids.chunks(t).flat_map(|row| row[1..].iter().copied().chain([-100])).collect();
    let targets = Tensor::from_vec(next, &[b * t]).unwrap();

    let mut model = Decoder::new(&config, 0, DType::F64).unwrap();
    model.load(&dir).unwrap();
    let (x, _) = no_grad(|| model.forward(&tokens, None, None, None)).unwrap();
    let logits = no_grad(|| model.logits(&x.reshape(&[b * t, config.hidden_size])?)).unwrap().to_vec::<f64>().unwrap();
    let mut wrong = vec![];
    let mut check = |name: &str, ours: &[f64], theirs: &[f64]| {
        let e = error(ours, theirs);
        println!("{name}: {e:.2e}");
        if e.is_nan() || e > BOUND {
            wrong.push(format!("{name}: {e:.2e}"));
        }
    };
    check("logits", &logits, &f64s(&gold, "logits"));
    let losses = model.loss(&tokens, &targets, None, None).unwrap();
    check("loss", &[losses.objective.item().unwrap()], &f64s(&gold, "loss"));
    check("aux_loss", &[losses.load_balancing.as_ref().unwrap().item().unwrap()], &f64s(&gold, "aux_loss"));
    let grads = losses.objective.backward().unwrap();
    for p in model.params() {
        let ours = grads.get(&p.tensor).unwrap_or_else(|| panic!("{} got no gradient", p.name)).to_vec::<f64>().unwrap();
        check(&p.name, &ours, &their_gradient(&gold, &p.name));
    }
    assert!(wrong.is_empty(), "further than {BOUND:.0e} from transformers:\n{}", wrong.join("\n"));
}
