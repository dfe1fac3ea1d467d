//! Text from files, folders and JSON lines.

use super::{Corpus, Store};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Files of a folder that count as text.
const TEXT: [&str; 9] = ["txt", "md", "rst", "text", "jsonl", "tex", "org", "adoc", "pod"];

pub(super) fn open(path: &Path) -> Result<Corpus> {
    let meta = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::data(path, "not found; `data.path` names a text file, a folder of them, or a .bin token shard"),
        _ => Error::io("reading", path)(e),
    })?;
    let (mut bytes, mut starts) = (Vec::new(), Vec::new());
    if meta.is_dir() {
        let mut files = Vec::new();
        walk(path, &mut files)?;
        files.sort();
        if files.is_empty() {
            return Err(Error::data(path, format!("the folder holds no text; files that end in {} are read", TEXT.join(", "))));
        }
        for f in &files {
            append(f, &mut bytes, &mut starts)?;
        }
    } else {
        append(path, &mut bytes, &mut starts)?;
    }
    if bytes.is_empty() {
        return Err(Error::data(path, "is empty; there is nothing to train on"));
    }
    Ok(Corpus { len: bytes.len(), store: Store::Bytes(bytes), starts, eot: None, path: path.into() })
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

fn append(path: &Path, bytes: &mut Vec<u8>, starts: &mut Vec<usize>) -> Result<()> {
    let raw = std::fs::read(path).map_err(Error::io("reading", path))?;
    let text = std::str::from_utf8(&raw).map_err(|e| {
        let at = e.valid_up_to();
        let byte = raw[at];
        Error::data(path, format!("not UTF-8 at byte offset {at} (0x{byte:02x}); convert it first, as with `iconv -f latin1 -t utf-8`"))
    })?;
    let mut push = |text: &str| {
        if !text.is_empty() {
            if !bytes.is_empty() {
                starts.push(bytes.len());
            }
            bytes.extend_from_slice(text.as_bytes());
        }
    };
    if path.extension().and_then(|e| e.to_str()) == Some("jsonl") {
        #[derive(serde::Deserialize)]
        struct Line {
            text: String,
        }
        for (i, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
            let line: Line = serde_json::from_str(line)
                .map_err(|e| Error::data(path, format!("line {}: expected a JSON object with a string field \"text\": {e}", i + 1)))?;
            push(&line.text);
        }
    } else {
        push(text);
    }
    Ok(())
}
