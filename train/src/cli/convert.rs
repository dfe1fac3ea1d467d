//! `tidegate convert`: a model as a folder that transformers opens, in the precision and the number of files asked for.

use super::meter::Meter;
use super::{codec_of, out, run_of, skip};
use crate::progress::say;
use crate::text::{Codec, tokenizer};
use crate::{Error, Result, checkpoint};
use engine::DType;
use nn::{Decoder, ModelType, SaveOptions};
use std::cell::Cell;
use std::path::{Path, PathBuf};

const EXAMPLES: &str = "\
Examples:
  tidegate convert runs/quickstart quickstart-bf16 --dtype bf16
  tidegate convert Qwen3-Next-80B-A3B/ smaller-files/ --dtype bf16 --max-shard-size 2GB";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    /// A run folder, one checkpoint, or a folder of transformers (config.json and safetensors)
    #[arg(value_name = "IN")]
    from: PathBuf,
    /// The folder to write
    #[arg(value_name = "OUT")]
    to: PathBuf,
    /// Precision of all weights in it: f32, bf16 or f16, rounded to the nearest
    #[arg(long, value_name = "DTYPE", default_value = "f32", value_parser = dtype)]
    dtype: DType,
    /// The largest file of weights: 5GB, 500MB, 2GiB, or a number of bytes; a model that is larger goes to several, with an index
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size)]
    max_shard_size: u64,
    /// Write over what is in OUT: its model is replaced, other files stay
    #[arg(long)]
    force: bool,
}

fn dtype(s: &str) -> std::result::Result<DType, String> {
    let known = [DType::F32, DType::BF16, DType::F16];
    known.into_iter().find(|d| d.to_string() == s).ok_or_else(|| "expected f32, bf16 or f16".into())
}

/// Bytes, as transformers spells them.
fn size(s: &str) -> std::result::Result<u64, String> {
    let letters = s.find(|c: char| !c.is_ascii_digit()).unwrap_or(s.len());
    let (number, unit) = s.split_at(letters);
    let unit: Option<u64> = match unit {
        "" => Some(1),
        "KB" => Some(1000),
        "MB" => Some(1000 * 1000),
        "GB" => Some(1000 * 1000 * 1000),
        "TB" => Some(1000 * 1000 * 1000 * 1000),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        "TiB" => Some(1 << 40),
        _ => None,
    };
    let bytes = unit.zip(number.parse().ok()).and_then(|(unit, n): (u64, u64)| n.checked_mul(unit)).filter(|n| *n > 0);
    bytes.ok_or_else(|| "expected a size such as 5GB, 500MB, 2GiB (KB, MB, GB, TB of 1000, KiB, MiB, GiB, TiB of 1024), or a number of bytes".into())
}

pub(super) fn run(args: &Args) -> Result<()> {
    free(&args.to, args.force)?;
    say(&format!("reading {}", args.from.display()));
    let (path, mut model) = checkpoint::first_whole(&checkpoint::candidates(&args.from)?, skip, |dir| {
        checkpoint::verify(dir, &[checkpoint::MODEL])?;
        Ok(Decoder::open(dir)?)
    })?;
    with_tokenizer(&path, &mut model)?;
    std::fs::create_dir_all(&args.to).map_err(Error::io("creating", &args.to))?;
    let (meter, total) = (Cell::new(None::<Meter>), Cell::new((0, 0)));
    let progress = |done: u64, of: u64| {
        let shown = meter.take().unwrap_or_else(|| Meter::new("writing", of, 0));
        shown.add(done - total.replace((done, of)).0);
        meter.set(Some(shown));
    };
    let how = SaveOptions { dtype: Some(args.dtype), max_shard_bytes: Some(args.max_shard_size), replaces: true, progress: Some(&progress) };
    let done = model.save_with(&args.to, &how);
    drop(meter.take());
    done?;
    let config = model.config();
    let beyond = config.beyond_qwen3_next();
    if config.saved_type()? == ModelType::Tidegate && !beyond.is_empty() {
        say(&format!("its model_type is tidegate, which transformers does not know: qwen3_next has no {}", beyond.join(", ")));
    }
    let (to, n, mb) = (args.to.display(), config.parameters().0, total.get().1 as f64 / 1e6);
    out(&format!("{to}: {n} parameters in {}, {mb:.1} MB of weights, from {}", args.dtype, path.display()))
}

/// An error if there is something in the folder that is not to be written over.
fn free(to: &Path, force: bool) -> Result<()> {
    let (p, wrong) = (to.display(), |m: String| Err(Error::Usage(m)));
    if !to.exists() {
        return Ok(());
    }
    if !to.is_dir() {
        return wrong(format!("{p} is a file; name a folder to write"));
    }
    // a checkpoint without its optimizer, or with another model's, is no checkpoint any more
    if [checkpoint::STATE, checkpoint::OPTIMIZER, "run.json", "checkpoints"].iter().any(|name| to.join(name).exists()) {
        return wrong(format!("{p} belongs to a run, which goes on from what is in it; name another folder"));
    }
    let taken = std::fs::read_dir(to).map_err(Error::io("reading", to))?.next().is_some();
    if taken && !force {
        return wrong(format!("{p} isn't empty; name another folder, or write over the model that is in it by --force"));
    }
    Ok(())
}

/// Puts the tokenizer, which a run keeps beside its checkpoints, beside the model; and what transformers must know to use it, where no file says it.
fn with_tokenizer(path: &Path, model: &mut Decoder) -> Result<()> {
    let own = [path.to_path_buf(), run_of(path)].into_iter().find(|dir| dir.join(tokenizer::FILE).is_file());
    let Some(own) = own.filter(|dir| dir != path) else { return Ok(()) };
    let Codec::Tokenizer(t) = codec_of(path, model.config().vocab_size)? else { return Ok(()) };
    let end = checkpoint::read_info(&own).ok().and_then(|info| info.config.data.eot).or(t.end());
    // without it, transformers takes the class that goes with the model's type, and cuts text as that one does
    let mut how = serde_json::json!({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": false});
    if let Some(name) = end.and_then(|id| t.name(id)) {
        how["eos_token"] = name.into();
    }
    let how = serde_json::to_vec_pretty(&how).map_err(|e| Error::Model(e.to_string()))?;
    let aside = model.aside_mut();
    aside.put(tokenizer::FILE, t.json().to_vec())?;
    aside.put("tokenizer_config.json", how)?;
    if let Some(id) = end {
        aside.put("generation_config.json", format!("{{\n  \"eos_token_id\": {id}\n}}\n").into_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_as_transformers_spells_them() {
        for (s, n) in [("5GB", 5_000_000_000), ("200MB", 200_000_000), ("1KB", 1000), ("2GiB", 2 << 30), ("1MiB", 1 << 20), ("700", 700)] {
            assert_eq!(size(s), Ok(n), "{s}");
        }
        for s in ["", "0", "0GB", "GB", "5gb", "5 GB", "-1", "1.5GB", "18446744073709551615KB", "99999999999999999999", "5G"] {
            assert!(size(s).unwrap_err().contains("5GB"), "{s}");
        }
        assert_eq!((dtype("bf16"), dtype("f64").is_err()), (Ok(DType::BF16), true));
    }
}
