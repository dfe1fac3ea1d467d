//! `tidegate eval`: held-out text in bits per byte, or generated tasks in accuracy.

use super::device::PlaceArgs;
use super::generate::prompts::ends;
use super::{codec_of, open, out, place_for, put, result_line, run_of, same_tokens, whole};
use crate::config::{RunConfig, plain};
use crate::data::{Corpus, MOBY_DICK_PATH};
use crate::measure::PASSAGE;
use crate::progress::say;
use crate::tasks::{EvalReport, FILE, Haystack, Options, Prose, Settings, Task, check, check_passage, evaluate, follow};
use crate::text::Codec;
use crate::{Error, Result, checkpoint, presets, trainer};
use indicatif::{ProgressBar, ProgressStyle};
use nn::nearest;
use serde_json::Value;
use std::path::{Path, PathBuf};

const NOTES: &str = "\
Tasks: mqar, needle, selective-copy and induction are made of tokens; niah-1, niah-2 and niah-3 are RULER's single needles in English, and need a tokenizer.
docs/tasks.md says what each is, and which settings --set changes.

Examples:
  tidegate eval runs/quickstart
  tidegate eval runs/recall --task mqar --set pairs=4,8,16 --length 64,128
  tidegate eval Qwen3-0.6B --task niah-1,niah-2,niah-3 --length 1k,2k,4k,8k --depths 10";

#[derive(Debug, clap::Args)]
#[command(after_help = NOTES)]
pub(super) struct Args {
    /// A run folder, or one checkpoint, transformers' too
    run: PathBuf,
    /// Score all of this file or folder, instead of the held-out part of the run's own data
    #[arg(long, value_name = "TEXT", conflicts_with = "task")]
    data: Option<PathBuf>,
    /// Answer generated tasks instead of scoring text; more than one with commas
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    task: Vec<String>,
    /// Tokens of a sample, as 1k,2k,4k (1k is 1024) [default: as the run was trained, else as docs/tasks.md says]
    #[arg(long, value_name = "N", value_delimiter = ',', requires = "task", value_parser = length)]
    length: Vec<usize>,
    /// How many depths, evenly from the beginning to the end of the haystack [default: 10; 40 in English]
    #[arg(long, value_name = "N", requires = "task", value_parser = |t: &str| whole(t, 1 << 20))]
    depths: Option<u64>,
    /// Samples of each length, depth and setting [default: 200; of needles 50, in English 1]
    #[arg(long, value_name = "N", requires = "task", value_parser = |t: &str| whole(t, 1 << 30))]
    samples: Option<u64>,
    /// Seed of the samples
    #[arg(long, default_value_t = 1, requires = "task", value_parser = |t: &str| whole(t, u64::MAX))]
    seed: u64,
    /// A task's setting, as pairs=4,8 or mqar.pairs=4,8; may be repeated
    #[arg(long, value_name = "KEY=VALUE", requires = "task")]
    set: Vec<String>,
    /// Hide needles in this text [default: the run's own, else Moby-Dick]
    #[arg(long, value_name = "TEXT", requires = "task")]
    text: Option<PathBuf>,
    /// Follow one needle through the states of a text of so many tokens, and write passage.json beside the answers
    #[arg(long, value_name = "N", requires = "task", value_parser = length)]
    passage: Option<usize>,
    /// Read samples that are longer than the model is meant to read
    #[arg(long, requires = "task")]
    beyond: bool,
    /// Where to write what the tasks gave [default: eval.json in a run folder that was named, else here]
    #[arg(long, value_name = "FILE", requires = "task")]
    out: Option<PathBuf>,
    #[command(flatten)]
    place: PlaceArgs,
}

/// A length of tokens: a number, `8k` or `1m`.
fn length(text: &str) -> std::result::Result<usize, String> {
    let lower = text.to_ascii_lowercase();
    let (digits, unit) = match lower.char_indices().last() {
        Some((at, 'k')) => (&lower[..at], 1 << 10),
        Some((at, 'm')) => (&lower[..at], 1 << 20),
        _ => (&lower[..], 1),
    };
    let n = digits.parse::<usize>().ok().and_then(|n| n.checked_mul(unit)).filter(|n| (1..=1 << 30).contains(n));
    n.ok_or_else(|| "expected a number of tokens, as 4096 or 4k, at most 1024m".into())
}

pub(super) fn run(args: &Args) -> Result<()> {
    if args.task.is_empty() { text(args) } else { tasks(args) }
}

fn text(args: &Args) -> Result<()> {
    let (path, mut model) = open(&args.run, &args.place)?;
    let config: RunConfig = match checkpoint::read_info(&run_of(&path)) {
        Ok(info) => info.config,
        // A checkpoint from elsewhere: only the windows' size is missing.
        Err(_) if args.data.is_some() => presets::quickstart(),
        Err(Error::Usage(m)) => return Err(Error::Usage(format!("{m}; name a text by --data, or tasks by --task"))),
        Err(e) => return Err(e),
    };
    if args.data.is_none() && config.tasks.share >= 1.0 {
        let names: Vec<&str> = config.tasks.weights().iter().map(|w| w.0.name()).collect();
        let names = names.join(",");
        return Err(Error::Usage(format!("this run was trained on tasks alone: evaluate it by --task {names}, or name a text with --data")));
    }
    let corpus = Corpus::open(args.data.as_deref().unwrap_or(&config.data.path), config.data.eot)?;
    let trained_on = checkpoint::read_state(&path).ok().and_then(|s| s.corpus);
    if args.data.is_none() && trained_on.is_some_and(|then| then != corpus.fingerprint()) {
        say(&format!("{} has changed since this run was trained on it: its last part may not be the one that was held out", corpus.path().display()));
    }
    let range = if args.data.is_some() { 0..corpus.len() } else { corpus.split(config.data.held_out).1 };
    same_tokens(&run_of(&path), &corpus)?;
    let Some((bits, count)) = trainer::evaluate(&mut model, &corpus, range.clone(), &config, 0)? else {
        return Err(Error::Usage("nothing was held out in this run; name a text with --data".into()));
    };
    let what = args.data.as_ref().map_or("held out".into(), |d| d.display().to_string());
    out(&result_line(&what, &corpus, range, bits, count))
}

fn tasks(args: &Args) -> Result<()> {
    let tasks = args.task.iter().map(|name| Task::by_name(name)).collect::<Result<Vec<Task>>>()?;
    if let Some((i, t)) = tasks.iter().enumerate().find(|(i, t)| tasks[..*i].contains(t)) {
        return Err(Error::Usage(format!("--task names {t} twice (the second is number {})", i + 1)));
    }
    if args.passage.is_some() && !tasks.contains(&Task::Needle) {
        return Err(Error::Usage("--passage follows a needle of tokens; name the task, --task needle".into()));
    }
    let run = run_of(&args.run);
    let info = checkpoint::read_info(&run).ok();
    let to = match &args.out {
        Some(to) => place_for(to)?,
        // a run folder's are of its newest checkpoint
        None if info.is_some() && run == args.run => run.join(FILE),
        None => FILE.into(),
    };
    if to.is_file() {
        // what can't be read can't be written to either
        EvalReport::read(&to)?;
    }
    let config = info.map(|i| i.config);
    let settings = set(config.as_ref().map(|c| c.tasks.clone()).unwrap_or_default(), &tasks, &args.set)?;
    let (path, opened) = open(&args.run, &args.place)?;
    let model = opened.net().model();
    let codec = codec_of(&path, model.config().vocab_size);
    let english = tasks.iter().find(|t| matches!(t, Task::Niah(_)));
    let codec = match (codec, english) {
        (Err(Error::Usage(m)), Some(task)) => return Err(Error::Usage(format!("--task {task} is in English: {m}"))),
        (Err(e), Some(_)) => return Err(e),
        (codec, _) => codec.ok(),
    };
    let own = config.as_ref().map(|c| (c.data.path.as_path(), c.data.held_out, c.data.eot)).filter(|own| !own.0.as_os_str().is_empty());
    let (hay, held_out, eot) = match (&args.text, own) {
        (Some(text), _) => (text.as_path(), 0.0, None),
        (None, Some((path, held_out, eot))) => (path, held_out, eot),
        (None, None) => (Path::new(MOBY_DICK_PATH), 0.0, None),
    };
    let prosaic = tasks.contains(&Task::Niah(2)) || tasks.contains(&Task::Niah(3));
    let corpus = if prosaic || tasks.iter().any(|t| settings.reads_text(*t)) { Some(Corpus::open(hay, eot)?) } else { None };
    let longest = args.length.iter().max().copied().unwrap_or(1024);
    let prose = match &corpus {
        Some(corpus) if prosaic => Some(Prose::of(&beginning(corpus, held_out, longest, codec.as_ref())?)?),
        _ => None,
    };
    let corpus = corpus.map(|c| in_tokens(c, codec.as_ref())).transpose()?;
    let text = corpus.as_ref().map(|c| {
        let last = c.split(held_out).1;
        Haystack { corpus: c, range: if held_out == 0.0 || last.is_empty() { 0..c.len() } else { last } }
    });
    let options = Options {
        lengths: args.length.clone(),
        depths: args.depths.map(|n| n as usize),
        samples: args.samples.map(|n| n as usize),
        seed: args.seed,
        text,
        prose: prose.as_ref(),
        codec: codec.as_ref(),
        ends: codec.as_ref().map_or(Ok(vec![]), |c| ends(&path, c))?,
        beyond: args.beyond,
        ..Options::new(settings)
    };
    let (c, has_text) = (model.config(), options.text.is_some());
    check(c, &tasks, &options, has_text)?;
    args.passage.map(|n| check_passage(c, &options.settings, has_text, n, args.beyond)).transpose()?;
    let way = args.passage.map(|n| follow(model, &options.settings, options.text.as_ref(), n, args.seed)).transpose()?;
    let bar = ProgressBar::new(0);
    if let Ok(style) = ProgressStyle::with_template("{percent:>3}% [{bar:16}] {pos} of {len} tokens  {eta} left") {
        bar.set_style(style.progress_chars("=> "));
    }
    let mut progress = |done: u64, total: u64| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let report = evaluate(model, &tasks, &options, &mut progress);
    bar.finish_and_clear();
    let mut report = report?;
    report.checkpoint = path.display().to_string();
    report.step = checkpoint::read_state(&path).ok().map(|s| s.step);
    if let Some(aside) = report.write(&to)? {
        say(&format!("{} was of another checkpoint or seed, and is now {}", to.display(), aside.display()));
    }
    way.map(|w| w.write(&to.with_file_name(PASSAGE))).transpose()?;
    let step = report.step.map(|s| format!(", step {s}")).unwrap_or_default();
    put(&format!("{}{step}\n{}", report.checkpoint, report.table()))?;
    out(&to.display().to_string())
}

/// Settings with `--set`s on top. A key without its task is of the one task that is made of tokens; a list may be given without brackets.
fn set(settings: Settings, tasks: &[Task], sets: &[String]) -> Result<Settings> {
    let wrong = |m: String| Error::Usage(m);
    let mut tree = serde_json::to_value(settings).map_err(|e| wrong(e.to_string()))?;
    let made: Vec<&str> = tasks.iter().filter(|t| Task::GENERATED.contains(t)).map(|t| t.name()).collect();
    for text in sets {
        let Some((key, value)) = text.split_once('=') else {
            return Err(wrong(format!("--set {text}: expected key=value, as in --set pairs=4,8")));
        };
        let (task, key) = match (key.trim().split_once('.'), &made[..]) {
            (Some((task, key)), _) => (task, key),
            (None, [one]) => (*one, key.trim()),
            (None, []) => return Err(wrong(format!("--set {text}: no task that is made of tokens is asked for, and English ones have no settings"))),
            (None, _) => return Err(wrong(format!("--set {text}: of which task? Put its name before the key, as {}.{}", made[0], key.trim()))),
        };
        if !made.contains(&task) {
            let hint = nearest(task, made.iter().copied()).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
            return Err(wrong(format!("--set {text}: `{task}` is none of the tasks that are asked for{hint}")));
        }
        let keys: Vec<String> = tree[task].as_object().map(|o| o.keys().cloned().collect()).unwrap_or_default();
        let Some(old) = tree[task].get(key).cloned() else {
            let hint = nearest(key, keys.iter().map(String::as_str)).map(|n| format!("; did you mean `{n}`?")).unwrap_or_default();
            return Err(wrong(format!("--set {text}: {task} has no setting `{key}`{hint} (it has {})", keys.join(", "))));
        };
        let parse =
            |v: &str| toml::from_str::<toml::Table>(&format!("v = {v}")).ok().and_then(|mut t| if t.len() == 1 { t.remove("v") } else { None });
        let new = parse(value).or_else(|| parse(&format!("[{value}]"))).unwrap_or_else(|| toml::Value::String(value.into()));
        let mut new = serde_json::to_value(new).map_err(|e| wrong(e.to_string()))?;
        if old.is_array() && !new.is_array() {
            new = Value::Array(vec![new]);
        }
        tree[task][key] = new;
        serde_json::from_value::<Settings>(tree.clone()).map_err(|e| wrong(format!("--set {text}: {}; it is now {old}", plain(&e.to_string()))))?;
    }
    serde_json::from_value(tree).map_err(|e| wrong(e.to_string()))
}

/// Bytes that a word's token takes at most, for a haystack of prose.
const BYTES_A_TOKEN: usize = 16;

/// As much text of a corpus, of its held-out part where there is one, as a haystack of `tokens` can take.
fn beginning(corpus: &Corpus, held_out: f64, tokens: usize, codec: Option<&Codec>) -> Result<String> {
    let last = corpus.split(held_out).1;
    let range = if held_out == 0.0 || last.is_empty() { 0..corpus.len() } else { last };
    let end = range.end.min(range.start.saturating_add(tokens.saturating_mul(BYTES_A_TOKEN)));
    let mut read = vec![];
    corpus.read(range.start..end, &mut read);
    match corpus.codec().or(codec.filter(|_| !corpus.is_bytes())) {
        Some(codec) => Ok(codec.decode(&read)),
        None => Err(Error::data(corpus.path(), "is tokens, and nothing says how they are text; name a text by --text")),
    }
}

/// A corpus in the model's tokens: text is encoded where the model doesn't read bytes.
fn in_tokens(corpus: Corpus, codec: Option<&Codec>) -> Result<Corpus> {
    match codec {
        Some(codec @ Codec::Tokenizer(t)) if corpus.is_bytes() => {
            let mut bytes = vec![];
            corpus.read(0..corpus.len(), &mut bytes);
            Ok(Corpus::of_tokens(codec.encode(&Codec::Bytes.decode(&bytes))?, t.vocab_size()))
        }
        _ => Ok(corpus),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths() {
        for (text, n) in [("64", 64), ("1k", 1024), ("128K", 131_072), ("1m", 1 << 20)] {
            assert_eq!(length(text), Ok(n));
        }
        for text in ["", "k", "0", "-1", "1.5k", "1g", "9999999999m", "é"] {
            assert!(length(text).unwrap_err().contains("4k"), "{text}");
        }
    }

    #[test]
    fn settings_by_name() {
        let of = |tasks: &[Task], sets: &[&str]| set(Settings::default(), tasks, &sets.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let s = of(&[Task::Mqar, Task::Niah(1)], &["pairs=4,8", "vocab=512", "mqar.length=64"]).unwrap();
        assert_eq!((s.mqar.pairs, s.mqar.vocab, s.mqar.length), (vec![4, 8], Some(512), vec![64]));
        let s = of(&[Task::Needle, Task::SelectiveCopy], &["needle.filler=text", "selective-copy.tokens=3"]).unwrap();
        assert_eq!((s.needle.filler, s.selective_copy.tokens), (crate::tasks::Filler::Text, 3));
        for (tasks, text, words) in [
            (&[Task::Mqar][..], "pair=4", &["did you mean `pairs`", "mqar has no setting `pair`"][..]),
            (&[Task::Mqar], "pairs", &["key=value"]),
            (&[Task::Mqar], "pairs=x", &["pairs=x", "a whole number", "[4]"]),
            (&[Task::Mqar, Task::Needle], "length=64", &["of which task", "mqar.length"]),
            (&[Task::Niah(1)], "length=64", &["English"]),
            (&[Task::Needle], "neddle.length=64", &["did you mean `needle`"]),
            (&[Task::Needle], "filler=sand", &["filler=sand", "random"]),
        ] {
            let e = of(tasks, &[text]).unwrap_err().to_string();
            assert!(words.iter().all(|w| e.contains(w)), "{text}: {e}");
        }
    }
}
