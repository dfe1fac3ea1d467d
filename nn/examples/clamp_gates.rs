//! What do attention's gates do? Fixes them, each layer's at its own mean or wide open, and prints the loss and the attention that the first token gets.
//!
//!     cargo run --release -p tidegate-nn --example clamp_gates -- [FOLDER [TEXT]]
//!
//! FOLDER is a checkpoint with sigmoid gates. The tokens are those of `golden.safetensors` in it; without one, the end of the file TEXT, byte by byte.

use engine::{DType, Device, Result, Tensor, no_grad};
use nn::tensor_file::TensorFile;
use nn::{AttentionGate, Decoder, GateActivation, GateOp, Observer};
use std::collections::BTreeMap;
use std::path::Path;

/// Rows and columns of tokens of a text.
const WINDOWS: [usize; 2] = [16, 256];

/// Replaces gates, and takes down their means and the patterns' first columns.
#[derive(Default)]
struct Clamp {
    /// By layer, the logit that all its gates get.
    logits: BTreeMap<String, f64>,
    gates: BTreeMap<String, f64>,
    first: Vec<f64>,
}

impl Observer for Clamp {
    fn wants(&self, name: &str) -> bool {
        // a delta-rule layer has gates, too, and no pattern: `see` tells them apart by their shape
        ["attn.hook_gate_logits", "attn.hook_gate", "attn.hook_pattern"].iter().any(|hook| name.ends_with(hook))
    }
    fn see(&mut self, name: &str, t: &Tensor) -> Result<Option<Tensor>> {
        let mean = |t: &Tensor| t.cast(DType::F64)?.contiguous()?.reshape(&[t.numel()])?.mean(&[0], false)?.item();
        let (layer, hook) = name.rsplit_once('.').unwrap_or(("", name));
        match hook {
            "hook_pattern" => {
                // the first query sees nothing but the first token
                self.first.push(mean(&t.narrow(3, 0, 1)?.narrow(2, 1, t.dim(2) - 1)?)?);
                Ok(None)
            }
            "hook_gate" if t.rank() < 5 => {
                self.gates.insert(layer.into(), mean(t)?);
                Ok(None)
            }
            "hook_gate_logits" => self.logits.get(layer).map(|x| Tensor::full(*x, t.shape(), t.dtype(), t.device())).transpose(),
            _ => Ok(None),
        }
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracles/golden/next_d64_old");
    let folder = Path::new(args.first().map_or(default, |a| a));
    let model = Decoder::open(folder)?;
    if !matches!(model.config().attention_gate, AttentionGate { activation: GateActivation::Sigmoid, op: GateOp::Multiply, .. }) {
        return Err("this example fixes sigmoid gates that multiply, and the model's are others".into());
    }
    let rows = match args.get(1) {
        Some(text) => windows(&std::fs::read(text)?, model.config().vocab_size)?,
        None => golden(&folder.join("golden.safetensors"))?,
    };
    let time = rows[0].len();
    let tokens = Tensor::from_slice(&rows.concat(), &[rows.len(), time], &Device::cpu())?;
    let next = |row: &Vec<u32>| row[1..].iter().map(|t| i64::from(*t)).chain([-100]).collect::<Vec<_>>();
    let targets = Tensor::from_vec(rows.iter().flat_map(next).collect::<Vec<i64>>(), &[tokens.numel()])?;

    let measure = |what: &str, logits: BTreeMap<String, f64>| -> nn::Result<Clamp> {
        let mut clamp = Clamp { logits, ..Default::default() };
        let loss = no_grad(|| model.loss(&tokens, &targets, None, Some(&mut clamp)))?.nll.item()?;
        let share = clamp.first.iter().sum::<f64>() / clamp.first.len().max(1) as f64;
        println!("{what:32} {loss:10.4} {:21.2}%", 100.0 * share);
        Ok(clamp)
    };
    println!("{} rows of {time} tokens\n{:32} {:>10} {:>22}", rows.len(), "gates of attention", "loss", "first-token attention");
    let plain = measure("as they are", BTreeMap::new())?;
    let fixed: Vec<(String, f64)> = plain.gates.iter().map(|(layer, mean)| (layer.clone(), (mean / (1.0 - mean)).ln())).collect();
    for (layer, logit) in &fixed {
        measure(&format!("{layer} at its mean {:.3}", plain.gates[layer]), BTreeMap::from([(layer.clone(), *logit)]))?;
    }
    let open = fixed.iter().map(|(layer, _)| (layer.clone(), 30.0)).collect();
    measure("all at their means", fixed.into_iter().collect())?;
    measure("all wide open", open)?;
    Ok(())
}

/// The last windows of a text, as bytes.
fn windows(text: &[u8], vocab: usize) -> std::result::Result<Vec<Vec<u32>>, String> {
    let [rows, time] = WINDOWS;
    if vocab != 256 || text.len() < rows * time {
        return Err(format!(
            "TEXT is read byte by byte: it needs a model of 256 tokens, found {vocab}, and {} bytes, found {}",
            rows * time,
            text.len()
        ));
    }
    let last = &text[text.len() - rows * time..];
    Ok(last.chunks(time).map(|row| row.iter().map(|b| u32::from(*b)).collect()).collect())
}

/// The longest document of a golden file.
fn golden(path: &Path) -> std::result::Result<Vec<Vec<u32>>, Box<dyn std::error::Error>> {
    let file = TensorFile::open(path).map_err(|e| format!("{e}; without it, name a text after the folder"))?;
    let tensors = file.tensors(path)?;
    let read = |name: &str| -> std::result::Result<Vec<i64>, String> {
        let t = tensors.get(name).ok_or_else(|| format!("{} has no `{name}`", path.display()))?;
        Ok(t.data().as_chunks::<8>().0.iter().map(|x| i64::from_le_bytes(*x)).collect())
    };
    let (ids, cu) = (read("input_ids")?, read("cu_seqlens")?);
    let longest = cu.windows(2).max_by_key(|w| w[1] - w[0]).ok_or("no document")?;
    Ok(vec![ids[longest[0] as usize..longest[1] as usize].iter().map(|i| *i as u32).collect()])
}
