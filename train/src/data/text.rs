//! A stream of bytes in pieces, each where it lies: inside the program, in memory, or in a mapped file.

use std::ops::{Deref, Range};

#[derive(Debug)]
pub(crate) enum Bytes {
    Static(&'static [u8]),
    Owned(Vec<u8>),
    Mapped(memmap2::Mmap),
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Static(b) => b,
            Bytes::Owned(b) => b,
            Bytes::Mapped(b) => b,
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Text {
    /// Pieces, each with its place in the stream.
    pieces: Vec<(usize, Bytes)>,
    len: usize,
    /// Start of every document after the first.
    starts: Vec<usize>,
}

impl Text {
    /// Adds a document. Neighbours in memory become one piece.
    pub fn push(&mut self, document: Bytes) {
        if document.is_empty() {
            return;
        }
        if self.len > 0 {
            self.starts.push(self.len);
        }
        let at = self.len;
        self.len += document.len();
        match (self.pieces.last_mut(), document) {
            (Some((_, Bytes::Owned(last))), Bytes::Owned(more)) => last.extend_from_slice(&more),
            (_, document) => self.pieces.push((at, document)),
        }
    }
    pub fn len(&self) -> usize {
        self.len
    }
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }
    #[cfg(test)]
    pub fn pieces(&self) -> impl Iterator<Item = &Bytes> {
        self.pieces.iter().map(|(_, p)| p)
    }
    /// The parts of the pieces that lie in `range`, in order.
    pub fn read(&self, range: Range<usize>) -> impl Iterator<Item = &[u8]> {
        let first = self.pieces.partition_point(|(at, piece)| at + piece.len() <= range.start);
        self.pieces[first..].iter().take_while(move |(at, _)| *at < range.end).map(move |(at, piece)| {
            let (from, to) = (range.start.max(*at), range.end.min(at + piece.len()));
            &piece[from - at..to.max(from) - at]
        })
    }
    pub fn is(&self, other: &[u8]) -> bool {
        self.len == other.len() && self.pieces.iter().all(|(at, piece)| piece[..] == other[*at..at + piece.len()])
    }
}
