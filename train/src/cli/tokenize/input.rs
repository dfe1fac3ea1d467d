//! Documents in files, cut into parts that can be encoded one by one.

use crate::data::{Bytes, Position, bytes, files, is_jsonl, line, utf8};
use crate::{Error, Result};
use std::path::{Path, PathBuf};

/// Bytes of text that are encoded at once, where a document can be cut: enough to keep a thread busy, and little enough to balance.
pub(super) const PART: usize = 1 << 18;
/// Text on either side of a cut, by which it is tried.
const AROUND: usize = 256;

/// Blanks in a row from which on the regular expressions that split words run out of stack, and would give the rest of the text as one word.
const MOST_BLANKS: usize = 900_000;

/// All files that the arguments mean, in their order.
pub(super) fn collect(inputs: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut all = vec![];
    for input in inputs {
        for file in files(input)? {
            if !file.is_file() {
                return Err(Error::data(&file, "is no plain file: it is read twice, so write it to one first"));
            }
            all.push(file);
        }
    }
    Ok(all)
}

/// A part of a document.
pub(super) struct Part {
    pub text: String,
    pub at: Position,
    /// Whether the document begins or ends with it.
    pub first: bool,
    pub last: bool,
    /// Bytes of the file that are read with it.
    pub read: u64,
}

/// Whether a text may be cut between two others. No pattern that splits text into words looks further than a word, so that what is right for a
/// few of them on either side is right for all.
pub(super) type MayCut<'a> = &'a (dyn Fn(&str, &str) -> bool + Sync);

/// The parts of all documents, in order.
pub(super) struct Parts<'a> {
    files: &'a [PathBuf],
    may_cut: MayCut<'a>,
    /// Where the next part begins.
    at: Position,
    file: Option<Bytes>,
    /// A `.jsonl` file's document that is being cut, with the bytes of its line.
    document: Option<(String, u64)>,
    failed: bool,
}

impl<'a> Parts<'a> {
    /// From the part at `from` on.
    pub fn new(files: &'a [PathBuf], from: Position, may_cut: MayCut<'a>) -> Parts<'a> {
        Parts { files, may_cut, at: Position { tokens: 0, ..from }, file: None, document: None, failed: false }
    }

    fn advance(&mut self) -> Result<Option<Part>> {
        while let Some(path) = self.files.get(self.at.file) {
            let file = match self.file.take() {
                Some(file) => file,
                None => {
                    let file = bytes(path)?;
                    utf8(path, &file)?;
                    file
                }
            };
            let part = self.of_file(path, &file)?;
            match part {
                Some(_) => {
                    self.file = Some(file);
                    return Ok(part);
                }
                None => self.at = Position { file: self.at.file + 1, ..Position::default() },
            }
        }
        Ok(None)
    }

    fn of_file(&mut self, path: &Path, file: &[u8]) -> Result<Option<Part>> {
        if !is_jsonl(path) {
            let part = self.cut(path, file, 0)?;
            return Ok(part.map(|(part, _)| part));
        }
        while (self.at.document as usize) < file.len() {
            let start = self.at.document as usize;
            let (text, of_line) = match self.document.take() {
                Some(document) => document,
                None => {
                    let end = file[start..].iter().position(|&b| b == b'\n').map_or(file.len(), |n| start + n + 1);
                    let l = utf8(path, &file[start..end])?.trim();
                    let number = || file[..start].iter().filter(|&&b| b == b'\n').count() + 1;
                    (if l.is_empty() { String::new() } else { line(path, l, number)? }, (end - start) as u64)
                }
            };
            match self.cut(path, text.as_bytes(), of_line)? {
                Some((part, false)) => {
                    self.document = Some((text, of_line));
                    return Ok(Some(part));
                }
                done => {
                    self.at = Position { document: self.at.document + of_line, within: 0, ..self.at };
                    if let Some((part, _)) = done {
                        return Ok(Some(part));
                    }
                }
            }
        }
        Ok(None)
    }

    /// The next part of a document, and whether it is the last. `of_line` are the bytes to count with the last one, 0 where parts count themselves.
    fn cut(&mut self, path: &Path, document: &[u8], of_line: u64) -> Result<Option<(Part, bool)>> {
        let from = (self.at.within as usize).min(document.len());
        let rest = &document[from..];
        if rest.is_empty() {
            return Ok(None);
        }
        let (mut window, mut cut) = (PART, rest.len());
        while window < rest.len() {
            let end = (0..4).map(|n| window - n).find(|&n| rest[n] & 0xc0 != 0x80).unwrap_or(window);
            if let Some(at) = self.place(utf8(path, &rest[..end])?) {
                cut = at;
                break;
            }
            window *= 2;
        }
        let (at, last) = (self.at, cut == rest.len());
        self.at.within += cut as u64;
        let read = if of_line == 0 {
            cut as u64
        } else if last {
            of_line
        } else {
            0
        };
        let text = utf8(path, &rest[..cut])?;
        if text.len() > MOST_BLANKS && text.split(|c: char| !c.is_whitespace()).any(|run| run.chars().count() > MOST_BLANKS) {
            return Err(Error::data(path, format!("has more than {MOST_BLANKS} blanks in a row, which no tokenizer splits; shorten them")));
        }
        Ok(Some((Part { text: text.into(), at, first: from == 0, last, read }, last)))
    }

    /// The last place to cut a text at, after a line or else before a word, where the tokens of both sides together are those of each.
    fn place(&self, text: &str) -> Option<usize> {
        let letter = |c: Option<char>| c.is_some_and(char::is_alphabetic);
        let line = |at: &usize| {
            let above = text[..at - 1].strip_suffix('\r').unwrap_or(&text[..at - 1]);
            letter(text[*at..].chars().next()) && above.chars().next_back().is_some_and(|c| !c.is_whitespace())
        };
        let word = |at: &usize| letter(text[at + 1..].chars().next()) && letter(text[..*at].chars().next_back());
        let can = |at: &usize| (self.may_cut)(around(text, at.saturating_sub(AROUND), *at), around(text, *at, at + AROUND));
        let lines = text.rmatch_indices('\n').map(|(i, _)| i + 1).filter(line).take(16);
        let words = text.rmatch_indices(' ').map(|(i, _)| i).filter(word).take(16);
        lines.chain(words).find(can)
    }
}

/// A piece of text, at most a character more than asked for at either end.
fn around(text: &str, from: usize, to: usize) -> &str {
    let whole = |at: usize| (at..text.len()).find(|&n| text.is_char_boundary(n)).unwrap_or(text.len());
    &text[whole(from)..whole(to)]
}

impl Iterator for Parts<'_> {
    type Item = Result<Part>;
    fn next(&mut self) -> Option<Result<Part>> {
        if self.failed {
            return None;
        }
        let next = self.advance().transpose();
        self.failed = matches!(next, Some(Err(_)));
        next
    }
}
