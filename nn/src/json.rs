//! JSON in which no object has a key twice: which of the two holds would be anyone's guess.

use crate::{Error, Result};
use serde::Deserialize;
use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, SeqAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

/// A value of bytes that are JSON; an error for a key that is there twice, and for values in each other more than 128 deep.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice::<Unique>(bytes)?;
    serde_json::from_slice(bytes)
}

/// No file beside the weights is larger; those of vocabularies have some ten million bytes.
const LARGEST: u64 = 1 << 28;

/// A whole file of JSON or text; an error for one that is too large to be that, before memory is taken.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    let found = std::fs::metadata(path).map_err(Error::io(path))?;
    if !found.is_file() {
        return Err(Error::checkpoint(path, "is no file"));
    }
    if found.len() > LARGEST {
        let m = format!("has {} bytes; a file that goes with a model has at most {LARGEST}: it is something else, or damaged", found.len());
        return Err(Error::checkpoint(path, m));
    }
    std::fs::read(path).map_err(Error::io(path))
}

/// JSON as Python writes it: an `Infinity` that stands for a number becomes `{"__float__": "Infinity"}`, which transformers writes today.
pub(crate) fn from_python(bytes: &[u8]) -> Vec<u8> {
    const WORD: &[u8] = b"Infinity";
    let (mut out, mut i, mut quoted) = (vec![], 0, false);
    while let Some(b) = bytes.get(i) {
        match b {
            b'"' => quoted = !quoted,
            // what is escaped goes along
            b'\\' if quoted => {
                out.push(*b);
                i += 1;
            }
            b'I' if !quoted && bytes[i..].starts_with(WORD) && out.last() != Some(&b'-') => {
                out.extend_from_slice(br#"{"__float__": "Infinity"}"#);
                i += WORD.len();
                continue;
            }
            _ => {}
        }
        out.extend(bytes.get(i));
        i += 1;
    }
    out
}

/// Anything, kept nowhere.
struct Unique;

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        d.deserialize_any(Unique)
    }
}

impl<'de> Visitor<'de> for Unique {
    type Value = Unique;
    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("JSON")
    }
    fn visit_bool<E: de::Error>(self, _: bool) -> Result<Unique, E> {
        Ok(Unique)
    }
    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Unique, E> {
        Ok(Unique)
    }
    fn visit_u64<E: de::Error>(self, _: u64) -> Result<Unique, E> {
        Ok(Unique)
    }
    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Unique, E> {
        Ok(Unique)
    }
    fn visit_str<E: de::Error>(self, _: &str) -> Result<Unique, E> {
        Ok(Unique)
    }
    fn visit_unit<E: de::Error>(self) -> Result<Unique, E> {
        Ok(Unique)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Unique, A::Error> {
        while seq.next_element::<Unique>()?.is_some() {}
        Ok(Unique)
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique, A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = map.next_key::<String>()? {
            if keys.contains(&key) {
                return Err(de::Error::custom(format!("the key `{key}` is there twice")));
            }
            keys.insert(key);
            map.next_value::<Unique>()?;
        }
        Ok(Unique)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn infinity_is_read_as_python_writes_it() {
        let read = |text: &str| String::from_utf8(from_python(text.as_bytes())).unwrap();
        assert_eq!(read("{\"x\": [0.0, Infinity]}"), "{\"x\": [0.0, {\"__float__\": \"Infinity\"}]}");
        for same in ["{\"Infinity\": \"a \\\" Infinity\"}", "[-Infinity, NaN]", "\"\\", "", "I"] {
            assert_eq!(read(same), same);
        }
    }

    #[test]
    fn keys_stand_once() {
        for fine in ["null", "{}", "[1, -1, 2.5, true, \"x\", {\"a\": {\"a\": 1}, \"b\": [{\"a\": 2}, {\"a\": 3}]}]"] {
            assert_eq!(parse::<Value>(fine.as_bytes()).unwrap(), serde_json::from_str::<Value>(fine).unwrap());
        }
        for (bad, says) in [
            ("{\"a\": 1, \"a\": 1}", "`a` is there twice"),
            ("[{\"b\": {\"x\": 1, \"\\u0078\": 2}}]", "`x` is there twice"),
            ("{\"a\": NaN}", "expected value"),
            ("{\"a\": 1e999}", "out of range"),
            ("{\"a\": 1} {", "trailing characters"),
            ("\"\u{0}\"", "control character"),
        ] {
            let e = parse::<Value>(bad.as_bytes()).unwrap_err().to_string();
            assert!(e.contains(says) && e.contains("line 1"), "{bad}: {e}");
        }
        let deep = "[".repeat(1_000_000);
        assert!(parse::<Value>(deep.as_bytes()).unwrap_err().to_string().contains("recursion limit"));
        assert!(parse::<Value>(&[b'"', 0xff, b'"']).is_err());
    }
}
