//! `tidegate trace`: what a model computes, in a file.

mod input;
mod names;

use super::device::PlaceArgs;
use super::{codec_of, open, out};
use crate::progress::say;
use crate::{Error, Result};
use engine::{DType, Device, Tensor, no_grad};
use input::Input;
use nn::{Decoder, Losses, Observer, Tap, tensor_file};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// What says what each tensor of the file is.
const INDEX: &str = "index.json";

const NOTES: &str = "\
The file FILE holds `logits` [B, T, V]; `loss`, the mean over all predicted tokens; `objective`, that plus the router's losses with their coefficients, and
these as `aux_loss` and `z_loss`, where a model has them; each tap that --names asks for (docs/taps.md lists them); with --grad the gradients of `objective`
(or of `loss`, by --grad-of) as `grad.NAME`, by the checkpoint's names. index.json beside it says what each tensor is. Floats are written in f32.

Examples:
  tidegate trace --model runs/quickstart --text \"Call me Ishmael.\" --out trace.safetensors
  tidegate trace --model checkpoint/ --input tokens.safetensors --names '*hook_resid_post,blocks.3.*hook_pattern' --grad --out trace.safetensors";

#[derive(Debug, clap::Args)]
#[command(after_help = NOTES, group = clap::ArgGroup::new("what").required(true).args(["input", "text"]))]
pub(super) struct Args {
    /// A run folder, or one checkpoint, transformers' too
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Tokens: a safetensors file with `input_ids` [B, T], i64, and perhaps `labels` (shifted inside; -100: not asked for) and `cu_seqlens` (B = 1)
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// A text instead
    #[arg(long)]
    text: Option<String>,
    /// Where to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Taps to write, with * and ?; more than one with commas. T x T tensors must be spelled out at the end, as in *hook_pattern [default: all others]
    #[arg(long, value_name = "GLOB", value_delimiter = ',')]
    names: Vec<String>,
    /// Write the gradient of each parameter, too
    #[arg(long)]
    grad: bool,
    /// What those are of: objective, or loss, which transformers differentiates where a config.json says `output_router_logits` = false
    #[arg(long, value_name = "WHICH", default_value = "objective", requires = "grad", value_parser = ["objective", "loss"])]
    grad_of: String,
    #[command(flatten)]
    place: PlaceArgs,
}

/// Keeps what it is asked to.
struct Recorder {
    wanted: HashMap<String, &'static Tap>,
    kept: Vec<(String, Tensor)>,
}

impl Observer for Recorder {
    fn wants(&self, name: &str) -> bool {
        self.wanted.contains_key(name)
    }
    fn see(&mut self, name: &str, value: &Tensor) -> engine::Result<Option<Tensor>> {
        self.kept.push((name.to_string(), value.detach().to_device(&Device::cpu())?));
        Ok(None)
    }
}

/// Tensors, and what the index says of them.
#[derive(Default)]
struct Trace {
    tensors: Vec<(String, Tensor)>,
    index: serde_json::Map<String, Value>,
}

impl Trace {
    fn add(&mut self, name: String, t: Tensor, op: &str, meaning: &str) {
        let dtype = match t.dtype() {
            DType::F64 => "F64",
            d if d.is_float() => "F32",
            _ => "I64",
        };
        let says = json!({ "shape": t.shape(), "dtype": dtype, "computed_in": t.dtype().to_string(), "op": op, "meaning": meaning });
        self.index.insert(name.clone(), says);
        self.tensors.push((name, t));
    }
}

pub(super) fn run(args: &Args) -> Result<()> {
    place_for(&args.out)?;
    let (path, opened) = open(&args.model, &args.place)?;
    let model = opened.net().model();
    let config = model.config();
    let input = match (&args.input, &args.text) {
        (Some(file), _) => Input::read(file, config.vocab_size)?,
        (None, text) => {
            let ids = codec_of(&path, config.vocab_size)?.encode_alone(text.as_deref().unwrap_or_default())?;
            if ids.is_empty() {
                return Err(Error::Usage("--text: expected at least one token".into()));
            }
            Input::of_tokens(ids)
        }
    };
    if args.grad && input.predictions() == 0 {
        return Err(Error::Usage(
            "--grad: nothing is to be predicted here, so that there is no loss and no gradient; give two tokens at least".into(),
        ));
    }
    let mut recorder = Recorder { wanted: names::chosen(config, &args.names)?.into_iter().collect(), kept: vec![] };
    let (tokens, targets, cu) = input.on(&model.place().device)?;
    let losses = if input.predictions() == 0 {
        say("nothing is to be predicted here: no loss is written");
        no_grad(|| {
            let x = model.forward(&tokens, cu.as_ref(), None, Some(&mut recorder))?.0;
            let logits = model.logits(&x.reshape(&[tokens.numel(), config.hidden_size])?)?;
            let shape = [tokens.shape(), &[config.vocab_size]].concat();
            recorder.kept.push((names::LOGITS.into(), logits.reshape(&shape)?.to_device(&Device::cpu())?));
            Ok::<_, Error>(None)
        })?
    } else {
        let mut compute = || model.loss(&tokens, &targets, cu.as_ref(), Some(&mut recorder));
        Some(if args.grad { compute()? } else { no_grad(compute)? })
    };

    let mut trace = Trace::default();
    for (name, t) in std::mem::take(&mut recorder.kept) {
        let tap = recorder.wanted[&name];
        trace.add(name, t, tap.op, tap.meaning);
    }
    if let Some(losses) = losses {
        add_losses(&mut trace, &losses)?;
        if args.grad {
            add_gradients(&mut trace, model, &path, &losses, &args.grad_of)?;
        }
    }
    let count = trace.tensors.len();
    let about = json!({
        "tidegate": env!("CARGO_PKG_VERSION"),
        "model": path.display().to_string(),
        "device": model.place().device.name(),
        "compute": model.place().compute.to_string(),
        "file": args.out.file_name().map(|n| n.to_string_lossy()),
        "tensors": trace.index,
    });
    write(&args.out, trace.tensors, &about)?;
    out(&format!("{count} tensors of {} x {} tokens: {}", input.shape[0], input.shape[1], args.out.display()))
}

fn add_losses(trace: &mut Trace, l: &Losses) -> Result<()> {
    let here = |t: &Tensor| t.detach().to_device(&Device::cpu())?.reshape(&[]);
    let nll = "mean negative log-likelihood of the predicted tokens, nats";
    trace.add("loss".into(), here(&l.nll)?, "linear_cross_entropy", nll);
    trace.add("objective".into(), here(&l.objective)?, "add", "loss, and the router's losses with their coefficients: what gradients are of");
    if let Some(t) = &l.load_balancing {
        trace.add("aux_loss".into(), here(t)?, "load_balancing_loss", "the router's load-balancing loss, before its coefficient");
    }
    if let Some(t) = &l.router_z {
        trace.add("z_loss".into(), here(t)?, "router_z_loss", "the router's z-loss, before its coefficient");
    }
    Ok(())
}

fn add_gradients(trace: &mut Trace, model: &Decoder, checkpoint: &Path, losses: &Losses, of: &str) -> Result<()> {
    let grads = if of == "loss" { losses.nll.backward()? } else { losses.objective.backward()? };
    // a parameter that nothing depends on has none, which is zero
    let gradient = |p: &nn::Param| match grads.get(&p.tensor) {
        Some(g) => Ok(g.detach().to_device(&Device::cpu())?),
        None => Ok(Tensor::zeros(p.tensor.shape(), p.tensor.dtype(), &Device::cpu())?),
    };
    for (name, t) in model.named_as_in(checkpoint, gradient)? {
        trace.add(format!("grad.{name}"), t, "backward", &format!("gradient of {of} with respect to {name}"));
    }
    Ok(())
}

/// Refuses a place that can't be written to before anything is computed.
fn place_for(out: &Path) -> Result<()> {
    let wrong = |why: &str| Err(Error::Usage(format!("--out {}: {why}", out.display())));
    let folder = out.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match out.file_name() {
        _ if out.is_dir() => wrong("is a folder; name a file in it"),
        None => wrong("names no file"),
        Some(name) if name == INDEX => wrong("the index that is written beside the file has this name; choose another"),
        _ if !folder.is_dir() => wrong("its folder does not exist"),
        _ => Ok(()),
    }
}

/// Writes both files as wholes: readers find those before, or these.
fn write(path: &Path, tensors: Vec<(String, Tensor)>, index: &Value) -> Result<()> {
    let mut tmp = path.as_os_str().to_owned();
    tmp.push(".tmp");
    let tmp = PathBuf::from(tmp);
    let done = tensor_file::write(&tmp, tensors).map_err(Error::from);
    if let Err(e) = done.and_then(|()| std::fs::rename(&tmp, path).map_err(Error::io("writing", path))) {
        let _ = std::fs::remove_file(&tmp);
        return Err(e);
    }
    let text = serde_json::to_string_pretty(index).map_err(|e| Error::Model(e.to_string()))?;
    crate::checkpoint::write(&path.with_file_name(INDEX), text.as_bytes())
}
