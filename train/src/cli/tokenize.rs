//! `tidegate tokenize`: trains tokenizers, and turns text into token shards.

mod encode;
mod input;
mod learn;

use crate::Result;
use clap::Subcommand;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  tidegate tokenize train novels/ --vocab-size 8192 --out novels.json
  tidegate tokenize encode novels/ --tokenizer novels.json --out novels.tokens
  tidegate train quickstart --set data.path=novels.tokens --set model.vocab_size=8192";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train a byte-level BPE tokenizer, and write it as a tokenizer.json
    Train(Train),
    /// Turn text into token shards to train on
    Encode(Encode),
}

#[derive(Debug, clap::Args)]
struct Train {
    /// Text files, .jsonl files (objects with a "text" a line), or folders of them
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Tokens in the vocabulary, the 256 bytes and the special tokens among them
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// Where to write it
    #[arg(long, value_name = "FILE", default_value = "tokenizer.json")]
    out: PathBuf,
    /// A special token; may be repeated
    #[arg(long, value_name = "TOKEN", default_value = "<|endoftext|>")]
    special: Vec<String>,
}

#[derive(Debug, clap::Args)]
struct Encode {
    /// Text files, .jsonl files (objects with a "text" a line, each a document), or folders of them
    #[arg(required = true)]
    inputs: Vec<PathBuf>,
    /// A tokenizer.json
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// The folder to write to. One that an encoding was cut short in is gone on with
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The token that ends each document [default: the tokenizer's <|endoftext|>, </s> or the like]
    #[arg(long, value_name = "TOKEN")]
    eot: Option<String>,
    /// Tokens in a shard
    #[arg(long, value_name = "N", default_value_t = 100_000_000, value_parser = clap::value_parser!(u32).range(1..))]
    shard_tokens: u32,
    /// Take special tokens that the text spells out for themselves; otherwise they are text like any other
    #[arg(long)]
    parse_special: bool,
}

pub(super) fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Train(args) => learn::run(args),
        Command::Encode(args) => encode::run(args),
    }
}
