//! Text from files, folders and JSON lines.

use super::text::{Bytes, Text};
use super::{Corpus, Store, map};
use crate::{Error, Result};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Files of a folder that count as text.
const TEXT: [&str; 9] = ["txt", "md", "rst", "text", "jsonl", "tex", "org", "adoc", "pod"];
/// Files from here on are mapped; smaller ones are read, since a process may hold only some 65,000 maps.
pub(super) const MAPPED: u64 = 1 << 20;

pub(super) fn open(path: &Path) -> Result<Corpus> {
    let meta = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::data(path, "not found; `data.path` names a text file, a folder of them, or a .bin token shard"),
        _ => Error::io("reading", path)(e),
    })?;
    let mut text = Text::default();
    if meta.is_dir() {
        let mut files = Vec::new();
        walk(path, &mut files)?;
        files.sort();
        if files.is_empty() {
            return Err(Error::data(path, format!("the folder holds no text; files that end in {} are read", TEXT.join(", "))));
        }
        for f in &files {
            append(f, &mut text)?;
        }
    } else {
        append(path, &mut text)?;
    }
    if text.len() == 0 {
        return Err(Error::data(path, "is empty: there is no text in it"));
    }
    Ok(Corpus { len: text.len(), store: Store::Text(text), eot: None, path: path.into() })
}

fn walk(dir: &Path, out: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(Error::io("reading", dir))? {
        let entry = entry.map_err(Error::io("reading", dir))?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(Error::io("reading", dir))?);
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        // A link to a folder could close a circle; a link to a file is a file.
        if kind.is_dir() {
            walk(&path, out)?;
        } else if path.extension().and_then(|e| e.to_str()).is_some_and(|e| TEXT.contains(&e)) && path.is_file() {
            out.push(path);
        }
    }
    Ok(())
}

/// A file's bytes: mapped, so that a text larger than memory can be trained on, or read if it is small or no plain file.
fn bytes(path: &Path) -> Result<Bytes> {
    let mut file = std::fs::File::open(path).map_err(Error::io("reading", path))?;
    let meta = file.metadata().map_err(Error::io("reading", path))?;
    if meta.is_file() && meta.len() >= MAPPED {
        return Ok(Bytes::Mapped(map(path, &file)?));
    }
    let mut out = Vec::with_capacity(meta.len() as usize);
    file.read_to_end(&mut out).map_err(Error::io("reading", path))?;
    Ok(Bytes::Owned(out))
}

fn append(path: &Path, to: &mut Text) -> Result<()> {
    let raw = bytes(path)?;
    let text = std::str::from_utf8(&raw).map_err(|e| {
        let at = e.valid_up_to();
        let byte = raw[at];
        Error::data(path, format!("not UTF-8 at byte offset {at} (0x{byte:02x}); convert it first, as with `iconv -f latin1 -t utf-8`"))
    })?;
    if path.extension().and_then(|e| e.to_str()) != Some("jsonl") {
        to.push(raw);
        return Ok(());
    }
    #[derive(serde::Deserialize)]
    struct Line {
        text: String,
    }
    for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let line: Line = serde_json::from_str(line)
            .map_err(|e| Error::data(path, format!("line {}: expected a JSON object with a string field \"text\": {e}", i + 1)))?;
        to.push(Bytes::Owned(line.text.into_bytes()));
    }
    Ok(())
}
