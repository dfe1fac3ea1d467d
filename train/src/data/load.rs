//! Text from files, folders and JSON lines.

use super::text::{Bytes, Text};
use super::{Corpus, Store, map};
use crate::text::Codec;
use crate::{Error, Result};
use std::io::Read;
use std::path::{Path, PathBuf};

/// Files of a folder that count as text.
const TEXT: [&str; 9] = ["txt", "md", "rst", "text", "jsonl", "tex", "org", "adoc", "pod"];
/// Files from here on are mapped; smaller ones are read, since a process may hold only some 65,000 maps.
pub(super) const MAPPED: u64 = 1 << 20;

pub(super) fn open(path: &Path) -> Result<Corpus> {
    if !path.exists() {
        let known = "`data.path` names a text file, a folder of them, a .bin token shard, or a folder that `tidegate tokenize encode` wrote";
        return Err(Error::data(path, format!("not found; {known}")));
    }
    let mut text = Text::default();
    files(path)?.iter().try_for_each(|f| append(f, &mut text))?;
    if text.len() == 0 {
        return Err(Error::data(path, "is empty: there is no text in it"));
    }
    Ok(Corpus { len: text.len(), store: Store::Text(text), eot: None, path: path.into(), codec: Some(Codec::Bytes) })
}

/// The file that is `path`, or all texts in the folder that is, sorted.
pub(crate) fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let meta = std::fs::metadata(path).map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Error::data(path, "not found"),
        _ => Error::io("reading", path)(e),
    })?;
    if !meta.is_dir() {
        return Ok(vec![path.into()]);
    }
    let mut files = Vec::new();
    walk(path, &mut files)?;
    files.sort();
    if files.is_empty() {
        return Err(Error::data(path, format!("the folder holds no text; files that end in {} are read", TEXT.join(", "))));
    }
    Ok(files)
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
pub(crate) fn bytes(path: &Path) -> Result<Bytes> {
    let mut file = std::fs::File::open(path).map_err(Error::io("reading", path))?;
    let meta = file.metadata().map_err(Error::io("reading", path))?;
    if meta.is_file() && meta.len() >= MAPPED {
        return Ok(Bytes::Mapped(map(path, &file)?));
    }
    let mut out = Vec::with_capacity(meta.len() as usize);
    file.read_to_end(&mut out).map_err(Error::io("reading", path))?;
    Ok(Bytes::Owned(out))
}

/// A file's bytes as text; an error says where they are no UTF-8.
pub(crate) fn utf8<'a>(path: &Path, raw: &'a [u8]) -> Result<&'a str> {
    std::str::from_utf8(raw).map_err(|e| {
        let at = e.valid_up_to();
        let byte = raw[at];
        Error::data(path, format!("not UTF-8 at byte offset {at} (0x{byte:02x}); convert it first, as with `iconv -f latin1 -t utf-8`"))
    })
}

/// Whether a file's lines are objects with a text each.
pub(crate) fn is_jsonl(path: &Path) -> bool {
    path.extension().and_then(|e| e.to_str()) == Some("jsonl")
}

/// The text of a `.jsonl` file's line; `number`, from 1, is for messages.
pub(crate) fn line(path: &Path, line: &str, number: impl FnOnce() -> usize) -> Result<String> {
    #[derive(serde::Deserialize)]
    struct Line {
        text: String,
    }
    let line: Line = serde_json::from_str(line)
        .map_err(|e| Error::data(path, format!("line {}: expected a JSON object with a string field \"text\": {e}", number())))?;
    Ok(line.text)
}

fn append(path: &Path, to: &mut Text) -> Result<()> {
    let raw = bytes(path)?;
    let text = utf8(path, &raw)?;
    if !is_jsonl(path) {
        to.push(raw);
        return Ok(());
    }
    for (i, l) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        to.push(Bytes::Owned(line(path, l, || i + 1)?.into_bytes()));
    }
    Ok(())
}
