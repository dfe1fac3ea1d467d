//! The few messages of TensorFlow's `event.proto` and `summary.proto` that event files need, by hand.

use crate::histogram::Distribution;

const VARINT: u64 = 0;
const I64: u64 = 1;
const BYTES: u64 = 2;
const I32: u64 = 5;

/// A message under construction.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut n: u64) {
        while n >= 0x80 {
            self.0.push(n as u8 | 0x80);
            n >>= 7;
        }
        self.0.push(n as u8);
    }
    fn key(&mut self, field: u64, wire: u64) {
        self.varint(field << 3 | wire);
    }
    fn double(mut self, field: u64, x: f64) -> Self {
        self.key(field, I64);
        self.0.extend(x.to_le_bytes());
        self
    }
    fn float(mut self, field: u64, x: f32) -> Self {
        self.key(field, I32);
        self.0.extend(x.to_le_bytes());
        self
    }
    fn int(mut self, field: u64, n: u64) -> Self {
        self.key(field, VARINT);
        self.varint(n);
        self
    }
    fn bytes(mut self, field: u64, b: &[u8]) -> Self {
        self.key(field, BYTES);
        self.varint(b.len() as u64);
        self.0.extend_from_slice(b);
        self
    }
    fn doubles(self, field: u64, all: impl Iterator<Item = f64>) -> Self {
        self.bytes(field, &all.flat_map(f64::to_le_bytes).collect::<Vec<u8>>())
    }
}

fn event(wall_time: f64, step: u64) -> Message {
    Message::default().double(1, wall_time).int(2, step)
}

/// The event that each file begins with.
pub(super) fn version(wall_time: f64) -> Vec<u8> {
    event(wall_time, 0).bytes(3, b"brain.Event:2").0
}

/// `SessionLog { status: START }` at step 0: what was read of this run before is void.
pub(super) fn restart(wall_time: f64) -> Vec<u8> {
    event(wall_time, 0).bytes(7, &Message::default().int(1, 1).0).0
}

/// A summary of scalars.
pub(super) fn scalars(wall_time: f64, step: u64, all: &[(String, f64)]) -> Vec<u8> {
    let value = |(tag, x): &(String, f64)| Message::default().bytes(1, tag.as_bytes()).float(2, *x as f32).0;
    event(wall_time, step).bytes(5, &all.iter().fold(Message::default(), |m, v| m.bytes(1, &value(v))).0).0
}

/// A summary of histograms. Empty bins at both ends are left out, so that the outermost ends are the smallest and the largest number.
pub(super) fn histograms(wall_time: f64, step: u64, all: &[(String, &Distribution)]) -> Vec<u8> {
    let value = |(tag, d): &(String, &Distribution)| {
        let counts = &d.bins.counts;
        let first = counts.iter().position(|c| *c > 0).unwrap_or(0);
        let end = counts.iter().rposition(|c| *c > 0).map_or(0, |i| i + 1);
        let width = (d.bins.to - d.bins.from) / counts.len() as f64;
        let limits = (first..end).map(|i| if i + 1 == end { d.max } else { d.bins.from + width * (i + 1) as f64 });
        let n: u64 = counts.iter().sum();
        let histo = Message::default().double(1, d.min).double(2, d.max).double(3, n as f64).double(4, d.sum).double(5, d.sum_squares);
        let histo = histo.doubles(6, limits).doubles(7, counts[first..end].iter().map(|c| *c as f64));
        Message::default().bytes(1, tag.as_bytes()).bytes(5, &histo.0).0
    };
    event(wall_time, step).bytes(5, &all.iter().fold(Message::default(), |m, v| m.bytes(1, &value(v))).0).0
}

/// What a run that goes on asks of an event.
pub(super) struct Event {
    pub step: u64,
    /// The tag of its first value, if it is a summary.
    pub tag: Option<String>,
}

pub(super) fn read(event: &[u8]) -> Event {
    let mut out = Event { step: 0, tag: None };
    for (field, value) in Fields(event) {
        match (field, value) {
            (2, Field::Number(n)) => out.step = n,
            (5, Field::Bytes(summary)) => out.tag = first(summary).and_then(first).map(|tag| String::from_utf8_lossy(tag).into_owned()),
            _ => {}
        }
    }
    out
}

/// The first of a message's fields 1 that are bytes.
fn first(message: &[u8]) -> Option<&[u8]> {
    Fields(message).find_map(|f| match f {
        (1, Field::Bytes(b)) => Some(b),
        _ => None,
    })
}

/// A field's value: whole numbers and the bits of floats, or bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Field<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// The fields of a message, up to the first that is none.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(taken)
    }
    fn varint(&mut self) -> Option<u64> {
        let mut n = 0u64;
        for shift in (0..64).step_by(7) {
            let b = self.take(1)?[0];
            n |= u64::from(b & 0x7f) << shift;
            if b < 0x80 {
                return Some(n);
            }
        }
        None
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = (u64, Field<'a>);
    fn next(&mut self) -> Option<Self::Item> {
        let key = self.varint()?;
        let little = |b: &[u8]| b.iter().rev().fold(0u64, |n, b| n << 8 | u64::from(*b));
        let value = match key & 7 {
            VARINT => Field::Number(self.varint()?),
            I64 => Field::Number(little(self.take(8)?)),
            I32 => Field::Number(little(self.take(4)?)),
            BYTES => {
                let n = self.varint()?;
                Field::Bytes(self.take(usize::try_from(n).ok()?)?)
            }
            _ => return None,
        };
        Some((key >> 3, value))
    }
}
