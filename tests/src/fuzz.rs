//! Files that nobody should trust: what is opened here must be opened or refused, whatever it holds. The stable test (`tests/tests/fuzz.rs`) and the
//! libFuzzer targets (`tests/fuzz`) share these entries, and the mutations.

pub mod memory;
mod mutate;
mod random;
mod seeds;

pub use mutate::{files as mutate_files, tokenizer as mutate_tokenizer};
pub use random::Random;
pub use seeds::{folders, tokenizer as seed_tokenizer};

use engine::{DType, no_grad};
use nn::{Decoder, Generator, Sampler, SaveOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use train::text::Codec;
use train::text::tokenizer::Tokenizer;

/// The names that a packed folder's files can have.
const NAMES: [&str; 8] = [
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00003.safetensors",
    "model-00002-of-00003.safetensors",
    "model-00003-of-00003.safetensors",
    "tokenizer.json",
    "generation_config.json",
];

/// A folder's files; one without bytes is a folder.
pub type Files = Vec<(&'static str, Option<Vec<u8>>)>;

/// A folder as a string of bytes: for each file the number of its name (plus 128 for a folder), the length in 4 bytes, and the bytes.
pub fn pack(files: &Files) -> Vec<u8> {
    let mut out = vec![];
    for (name, bytes) in files {
        let number = NAMES.iter().position(|n| n == name).unwrap_or(0) as u8;
        out.push(number | if bytes.is_none() { 128 } else { 0 });
        let bytes = bytes.as_deref().unwrap_or_default();
        out.extend((bytes.len() as u32).to_le_bytes());
        out.extend(bytes);
    }
    out
}

/// The same back, of any bytes: what is cut off is as long as it is.
pub fn unpack(mut bytes: &[u8]) -> Files {
    let mut files: Files = vec![];
    while let Some((head, rest)) = bytes.split_first_chunk::<5>() {
        let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let (own, rest) = rest.split_at(length.min(rest.len()));
        let name = NAMES[head[0] as usize % NAMES.len()];
        if files.iter().all(|(n, _)| *n != name) {
            files.push((name, (head[0] < 128).then(|| own.to_vec())));
        }
        bytes = rest;
    }
    files
}

/// What became of an input.
#[derive(Debug, PartialEq)]
pub enum Outcome {
    /// It was opened, and used.
    Taken,
    /// It was refused, and why.
    Refused(String),
}

/// A place for folders that goes when this does.
pub struct Place(PathBuf);

impl Place {
    /// In memory, where the system has such a place.
    pub fn new() -> Place {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
        let dir = base.join(format!("tidegate-fuzz-{}-{:?}", std::process::id(), std::thread::current().id()));
        std::fs::remove_dir_all(&dir).ok();
        Place(dir)
    }
    /// An empty folder of this name.
    fn folder(&self, name: &str) -> PathBuf {
        let dir = self.0.join(name);
        std::fs::remove_dir_all(&dir).ok();
        std::fs::create_dir_all(&dir).expect("a folder in memory");
        dir
    }
}

impl Default for Place {
    fn default() -> Place {
        Place::new()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// Opens a folder as a model. What can be opened must decode, and come back the same from where it is saved.
pub fn folder(place: &Place, files: &Files) -> Outcome {
    let dir = place.folder("in");
    for (name, bytes) in files {
        match bytes {
            Some(bytes) => std::fs::write(dir.join(name), bytes).expect("a file in memory"),
            None => std::fs::create_dir_all(dir.join(name)).expect("a folder in memory"),
        }
    }
    let model = match Decoder::open(&dir) {
        Ok(model) => model,
        Err(e) => return Outcome::Refused(e.to_string()),
    };
    let numbers = |m: &Decoder| -> Vec<u32> {
        m.params().iter().flat_map(|p| p.tensor.to_vec::<f32>().expect("f32")).map(|x| if x.is_nan() { u32::MAX } else { x.to_bits() }).collect()
    };
    let before = numbers(&model);
    assert_eq!(before.len(), model.config().parameters().0, "parameters of {:?}", model.config());
    // wrong numbers make wrong text, but text
    let greedy = Sampler { temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
    if let Err(e) = no_grad(|| Generator::new(&model).generate(&[0, 0], 2, &greedy, |_| {})) {
        panic!("a model that was opened does not decode: {e}: {:?}", model.config());
    }
    let out = place.folder("out");
    for (dtype, max_shard_bytes) in [(None, None), (Some(DType::F32), Some(4 * before.len() as u64 / 2))] {
        model.save_with(&out, &SaveOptions { dtype, max_shard_bytes, ..Default::default() }).expect("a save");
        let back = Decoder::open(&out).unwrap_or_else(|e| panic!("what was saved is refused: {e}"));
        assert!(numbers(&back) == before, "what was saved is something else");
    }
    Outcome::Taken
}

/// Texts of many kinds of characters.
const TEXTS: [&str; 6] = [
    "",
    "The whale, 1851!\r\n\tdon't  go",
    "日本 é👩\u{200d}👧 \u{301}\u{fb01}",
    "<s>[CLS] a ##b <|endoftext|>",
    "▁a\u{0}\u{ad}ﷺ",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
];

/// Reads a `tokenizer.json`, and has it encode and decode.
pub fn tokenizer(json: &[u8]) -> Outcome {
    let tokenizer = match Tokenizer::from_json(json.to_vec(), Path::new("some/tokenizer.json")) {
        Ok(t) => t,
        Err(e) => return Outcome::Refused(e.to_string()),
    };
    let size = tokenizer.vocab_size();
    tokenizer.end();
    let codec = Codec::Tokenizer(Arc::new(tokenizer));
    let Codec::Tokenizer(t) = &codec else { unreachable!("made above") };
    let some: Vec<u32> = (0..size as u32).rev().take(40).chain(0..40).chain([size as u32, u32::MAX]).collect();
    codec.decode(&some);
    for text in TEXTS {
        // an error is an answer
        if let Ok(tokens) = codec.encode(text) {
            assert!(tokens.iter().all(|t| (*t as usize) < size), "{text:?} gives {tokens:?} of {size}");
            t.loses(text, &tokens);
            codec.decode(&tokens);
        }
    }
    Outcome::Taken
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_packed_and_unpacked() {
        let files: Files = vec![("config.json", Some(b"{}".into())), ("model-00002-of-00003.safetensors", Some(vec![])), ("model.safetensors", None)];
        assert_eq!(unpack(&pack(&files)), files);
        assert_eq!(unpack(&[0, 255, 255, 255, 255, 7]), [("config.json", Some(vec![7]))]);
    }
}
