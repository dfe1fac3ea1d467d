//! `tidegate tokenize train`: a byte-level BPE vocabulary from text.

use super::Train;
use super::input::{Parts, collect};
use crate::checkpoint::write;
use crate::cli::meter::Meter;
use crate::cli::out;
use crate::data::Position;
use crate::progress::say;
use crate::text::tokenizer::Tokenizer;
use crate::{Error, Result};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, PreTokenizerWrapper, SplitDelimiterBehavior};

/// How text is split into words, between which nothing is merged: the pattern of Qwen3.5, which is GPT-4's with digits one by one and
/// with combining marks in the words of their letters.
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// The trainer counts pairs in 32 bits with a sign; no pair is more frequent than there are bytes.
const MOST_BYTES: u64 = i32::MAX as u64;
/// The largest vocabulary, as wide as any published one.
const MOST_TOKENS: usize = 1 << 20;

pub(super) fn run(args: &Train) -> Result<()> {
    let least = 256 + args.special.len();
    if !(least..=MOST_TOKENS).contains(&args.vocab_size) {
        return Err(Error::Usage(format!(
            "--vocab-size: expected at least {least} (256 bytes and {} special tokens), at most {MOST_TOKENS}, found {}",
            args.special.len(),
            args.vocab_size
        )));
    }
    for (i, s) in args.special.iter().enumerate() {
        if s.is_empty() || args.special[..i].contains(s) || s.chars().count() < 2 {
            return Err(Error::Usage(format!("--special: expected distinct tokens of two characters or more, found `{s}`")));
        }
    }
    if args.out.exists() {
        return Err(Error::Usage(format!("--out: {} exists; delete it, or choose another name", args.out.display())));
    }
    let json = learn(args)?;
    write(&args.out, json.as_bytes())?;
    let tokenizer = Tokenizer::from_json(json.into_bytes(), &args.out)?;
    let found = tokenizer.vocab_size();
    if found < args.vocab_size {
        say(&format!("the text has no more pairs that occur twice: {found} tokens instead of {}", args.vocab_size));
    }
    out(&format!("tokenizer of {found} tokens: {}", args.out.display()))
}

fn learn(args: &Train) -> Result<String> {
    let wrong = |e: tokenizers::Error| Error::Model(format!("training a tokenizer: {e}"));
    let files = collect(&args.files)?;
    let total = files.iter().map(|f| std::fs::metadata(f).map_or(0, |m| m.len())).sum::<u64>();
    if total > MOST_BYTES {
        let gb = total as f64 / 1e9;
        return Err(Error::Usage(format!("{gb:.1} GB of text; a tokenizer is trained on at most {MOST_BYTES} bytes: give it a part of them")));
    }
    let split = Split::new(SplitPattern::Regex(PATTERN.into()), SplitDelimiterBehavior::Isolated, false).map_err(wrong)?;
    let bytes = ByteLevel::new(false, false, false);
    let words = Sequence::new(vec![PreTokenizerWrapper::Split(split), PreTokenizerWrapper::ByteLevel(bytes)]);
    let mut tokenizer = tokenizers::Tokenizer::new(ModelWrapper::BPE(BPE::default()));
    tokenizer.with_pre_tokenizer(Some(PreTokenizerWrapper::Sequence(words)));
    tokenizer.with_decoder(Some(bytes)).with_post_processor(Some(bytes));
    let special: Vec<AddedToken> = args.special.iter().map(|s| AddedToken::from(s.clone(), true)).collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(args.vocab_size)
        .min_frequency(2)
        .special_tokens(special)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();

    let (failed, meter, text) = (Mutex::new(None), Meter::new("counting words", total, 0), AtomicUsize::new(0));
    // the pattern cuts where the parts are cut
    let texts = Parts::new(&files, Position::default(), &|_, _| true).map_while(|part| match part {
        Ok(part) => {
            meter.add(part.read);
            text.fetch_add(part.text.len(), Relaxed);
            Some(part.text)
        }
        Err(e) => {
            *failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(e);
            None
        }
    });
    let merges = args.vocab_size - 256 - args.special.len();
    let learning = std::iter::from_fn(|| {
        say(&format!("learning {merges} merges from {:.1} MB of text", text.load(Relaxed) as f64 / 1e6));
        None
    });
    tokenizer.train(&mut TrainerWrapper::BpeTrainer(trainer), texts.chain(learning)).map_err(wrong)?;
    drop(meter);
    if let Some(e) = failed.into_inner().unwrap_or_else(|e| e.into_inner()) {
        return Err(e);
    }
    if text.load(Relaxed) == 0 {
        return Err(Error::data(&args.files[0], "is empty: there is no text to learn from"));
    }
    tokenizer.to_string(true).map_err(wrong)
}
