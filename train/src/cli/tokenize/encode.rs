//! `tidegate tokenize encode`: text to token shards, in parallel and in order, and from where it stopped.

use super::Encode;
use super::input::{Part, Parts, collect};
use crate::checkpoint::{Written, write, written};
use crate::cli::meter::Meter;
use crate::cli::out;
use crate::data::manifest::{self, FORMAT, dtype};
use crate::data::{Finished, Input, MANIFEST, Manifest, Position, ShardWriter};
use crate::progress::say;
use crate::text::tokenizer::{ENDS, FILE, Tokenizer};
use crate::{Error, Result};
use rayon::prelude::*;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Parts that are encoded together, for each thread.
const TOGETHER: usize = 8;

pub(super) fn run(args: &Encode) -> Result<()> {
    encode(args).map_err(|e| match e {
        Error::Io { action, path, source } if matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded) => {
            Error::data(
                &path,
                format!("{action}: the disk is full ({source}): free some space and give the same command again, which keeps the finished shards"),
            )
        }
        e => e,
    })
}

fn encode(args: &Encode) -> Result<()> {
    let tokenizer = Tokenizer::open(&args.tokenizer)?;
    let tokenizer = if args.parse_special { tokenizer } else { tokenizer.literal() };
    let eot = end(args, &tokenizer)?;
    let files = collect(&args.inputs)?;
    let _lock = claim(&args.out)?;
    let new = plan(args, &tokenizer, eot, &files)?;
    let mut m = match args.out.join(MANIFEST).is_file() {
        true => go_on(&args.out, new)?,
        false => new,
    };
    if !m.complete {
        save(&args.out, &m)?;
    }
    write(&args.out.join(FILE), tokenizer.json())?;
    if !m.complete {
        fill(args, &tokenizer, &files, &mut m)?;
    }
    let (dir, n) = (args.out.display(), m.shards.len());
    out(&format!(
        "{} tokens of {} documents in {n} {} of {}: {:.4} bytes per token: {dir}",
        m.tokens,
        m.documents,
        if n == 1 { "shard" } else { "shards" },
        m.dtype,
        m.bytes_per_token
    ))
}

/// The token that ends documents.
fn end(args: &Encode, tokenizer: &Tokenizer) -> Result<u32> {
    let found = match &args.eot {
        Some(name) => tokenizer.token(name).ok_or_else(|| format!("--eot: `{name}` is no token of {}", args.tokenizer.display())),
        None => tokenizer.end().ok_or_else(|| {
            format!("{} has none of the tokens {}; name the one that ends documents by --eot", args.tokenizer.display(), ENDS.join(", "))
        }),
    };
    found.map_err(Error::Usage)
}

/// Makes the folder, which belongs to this process until the file is dropped.
fn claim(dir: &Path) -> Result<File> {
    fs::create_dir_all(dir).map_err(Error::io("creating", dir))?;
    let path = dir.join(".lock");
    let mut entries = fs::read_dir(dir).map_err(Error::io("reading", dir))?.flatten();
    // what a process leaves that was killed at its very beginning
    let ours = |e: &fs::DirEntry| e.file_name() == ".lock" || e.file_name() == "manifest.tmp";
    if !dir.join(MANIFEST).is_file() && entries.any(|e| !ours(&e)) {
        return Err(Error::Usage(format!("--out: {} isn't empty, and holds no tokens; choose a folder of its own", dir.display())));
    }
    crate::checkpoint::lock(&path)?.ok_or_else(|| Error::Usage(format!("--out: another process is writing to {}", dir.display())))
}

/// What there is to do, with nothing of it done.
fn plan(args: &Encode, tokenizer: &Tokenizer, eot: u32, files: &[PathBuf]) -> Result<Manifest> {
    let total = files.iter().map(|f| fs::metadata(f).map_or(0, |m| m.len())).sum();
    let meter = Meter::new("reading", total, 0);
    let inputs = files.par_iter().map(|path| {
        let read = written(path)?;
        meter.add(read.bytes);
        Ok(Input { path: path.clone(), read })
    });
    let vocab_size = tokenizer.vocab_size() as u32;
    Ok(Manifest {
        format: FORMAT.into(),
        complete: false,
        dtype: dtype(vocab_size),
        vocab_size,
        eot,
        parse_special: args.parse_special,
        shard_tokens: args.shard_tokens.into(),
        tokens: 0,
        bytes: 0,
        documents: 0,
        bytes_per_token: 0.0,
        tokenizer: written(&args.tokenizer)?,
        shards: vec![],
        inputs: inputs.collect::<Result<_>>()?,
    })
}

/// What was done in a folder before, if it was done with the same input; shards that are not as they were written are done again.
fn go_on(dir: &Path, new: Manifest) -> Result<Manifest> {
    let mut old = manifest::read(dir)?;
    if old.shards.is_empty() {
        return Ok(new);
    }
    let d = dir.display();
    let other = |what: String| Err(Error::Usage(format!("{what}; put it back, or write to another folder than {d}")));
    let settings = |m: &Manifest| (m.tokenizer, m.vocab_size, m.eot, m.parse_special, m.shard_tokens);
    if old.tokenizer != new.tokenizer {
        return other("the tokenizer has changed since this encoding began".into());
    }
    if settings(&old) != settings(&new) {
        let (a, b) = (&old, &new);
        return other(format!(
            "the encoding began with shards of {} tokens, end-of-text {}, special tokens parsed: {}; now it is {}, {}, {}",
            a.shard_tokens, a.eot, a.parse_special, b.shard_tokens, b.eot, b.parse_special
        ));
    }
    for (then, now) in old.inputs.iter().zip(&new.inputs) {
        let (p, q) = (then.path.display(), now.path.display());
        if then.path != now.path {
            return other(format!("the inputs are others than when this encoding began ({p} then, {q} now)"));
        }
        let Written { bytes: a, .. } = then.read;
        if then.read != now.read {
            return other(format!("{p} has changed since this encoding began ({a} bytes then, {} now)", now.read.bytes));
        }
    }
    if old.inputs.len() != new.inputs.len() {
        return other(format!("the inputs are others than when this encoding began ({} files then, {} now)", old.inputs.len(), new.inputs.len()));
    }
    let whole = old.shards.par_iter().map(|s| written(&dir.join(&s.file)).is_ok_and(|now| now == s.written)).collect::<Vec<_>>();
    if let Some(bad) = whole.iter().position(|&ok| !ok) {
        say(&format!("{} is damaged or gone: going on from there", dir.join(&old.shards[bad].file).display()));
        old.shards.truncate(bad);
        old.complete = false;
    }
    if !old.complete {
        (old.bytes, old.documents) = old.shards.last().map_or((0, 0), |s| (s.bytes_through, s.documents_through));
        old.tokens = old.shards.iter().map(|s| s.tokens).sum();
        say(&format!("going on after {} finished shards ({} tokens)", old.shards.len(), old.tokens));
    }
    Ok(old)
}

fn save(dir: &Path, m: &Manifest) -> Result<()> {
    let json = serde_json::to_string_pretty(m).map_err(|e| Error::data(dir, e.to_string()))?;
    write(&dir.join(MANIFEST), json.as_bytes())
}

/// Encodes what is not in a shard yet.
fn fill(args: &Encode, tokenizer: &Tokenizer, files: &[PathBuf], m: &mut Manifest) -> Result<()> {
    let from = m.shards.last().map_or(Position::default(), |s| s.next);
    let before: u64 = m.inputs.iter().take(from.file).map(|i| i.read.bytes).sum::<u64>() + from.document + from.within;
    let meter = Meter::new("encoding", m.inputs.iter().map(|i| i.read.bytes).sum(), before);
    let may_cut = |a: &str, b: &str| {
        let tokens = |t: &str| tokenizer.encode(t).ok();
        tokens(&format!("{a}{b}")).is_some_and(|whole| tokens(a).zip(tokens(b)).is_some_and(|(a, b)| whole == [a, b].concat()))
    };
    let mut parts = Parts::new(files, from, &may_cut);
    let (mut shard, mut skip) = (None, from.tokens as usize);
    loop {
        let batch: Vec<Part> = parts.by_ref().take(TOGETHER * rayon::current_num_threads()).collect::<Result<_>>()?;
        if batch.is_empty() {
            break;
        }
        let encoded = batch.par_iter().map(|part| {
            let tokens = tokenizer.encode(&part.text)?;
            meter.add(part.read);
            if tokenizer.loses(&part.text, &tokens) {
                return Err(Error::data(
                    &args.tokenizer,
                    format!("loses some of the text of {}: it is no byte-level vocabulary", files[part.at.file].display()),
                ));
            }
            Ok(tokens)
        });
        for (part, tokens) in batch.iter().zip(encoded.collect::<Vec<_>>()) {
            let mut tokens = tokens?;
            tokens.extend(part.last.then_some(m.eot));
            // a part that an earlier shard ends in was counted there
            if skip == 0 {
                m.bytes += part.text.len() as u64;
                m.documents += u64::from(part.first);
            }
            let mut done = std::mem::take(&mut skip);
            while done < tokens.len() {
                let writer = match &mut shard {
                    Some(w) => w,
                    none => none.insert(ShardWriter::create(&args.out.join(name(m)), m.vocab_size, m.dtype == "uint32", Some(m.eot))?),
                };
                let now = (m.shard_tokens as usize - writer.len()).min(tokens.len() - done);
                writer.write(&tokens[done..done + now])?;
                done += now;
                if writer.len() as u64 == m.shard_tokens {
                    finish(args, m, shard.take(), Position { tokens: done as u64, ..part.at })?;
                }
            }
        }
    }
    if shard.is_some() {
        finish(args, m, shard, Position { file: files.len(), ..Position::default() })?;
    }
    if m.tokens == 0 {
        return Err(Error::data(&args.inputs[0], "is empty: there is no text in it"));
    }
    m.complete = true;
    m.bytes_per_token = m.bytes as f64 / m.tokens as f64;
    save(&args.out, m)
}

fn name(m: &Manifest) -> String {
    format!("shard-{:05}.bin", m.shards.len())
}

/// Puts a shard in its place, and into the manifest.
fn finish(args: &Encode, m: &mut Manifest, shard: Option<ShardWriter>, next: Position) -> Result<()> {
    let Some(shard) = shard else { return Ok(()) };
    let (file, tokens) = (name(m), shard.len() as u64);
    shard.finish()?;
    let written = written(&args.out.join(&file))?;
    m.tokens += tokens;
    m.shards.push(Finished { file, tokens, bytes_through: m.bytes, documents_through: m.documents, next, written });
    save(&args.out, m)
}
