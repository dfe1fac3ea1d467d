//! The header of a safetensors file, held against the file before anything is made of it.

use safetensors::tensor::Dtype;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::ops::Range;

/// The most that the format allows, bytes.
const LONGEST: u64 = 100_000_000;

/// What a header says of a tensor; and where its bytes are in the file.
#[derive(Debug, PartialEq)]
pub(super) struct Info {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub at: Range<usize>,
}

#[derive(serde::Deserialize)]
struct Told {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

struct Header(Vec<(String, Told)>, Meta);

/// What a file says of itself.
pub(super) type Meta = HashMap<String, String>;

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with a tensor's dtype, shape and data_offsets for each name")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let (mut all, mut meta) = (vec![], Meta::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        meta = map.next_value::<Option<Meta>>()?.unwrap_or_default();
                    } else {
                        all.push((name, map.next_value()?));
                    }
                }
                Ok(Header(all, meta))
            }
        }
        d.deserialize_map(Entries)
    }
}

/// The tensors of a file, and its metadata: each in its own bytes, and all bytes some tensor's. The error says what is wrong, for a message that names the file.
pub(super) fn read(file: &[u8]) -> Result<(BTreeMap<String, Info>, Meta), String> {
    let len = file.len() as u64;
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        return Err(format!("it has {len} bytes, and a safetensors file begins with 8 that hold the length of its header"));
    };
    let n = u64::from_le_bytes(*length);
    if n > LONGEST {
        return Err(format!("its first 8 bytes say that a header of {n} bytes follows; at most {LONGEST} are allowed"));
    }
    if n > rest.len() as u64 {
        return Err(format!("its header is to have {n} bytes, and there are {} left", rest.len()));
    }
    let (header, data) = rest.split_at(n as usize);
    let Header(mut all, meta) = crate::json::parse(header).map_err(|e| format!("its header: {e}"))?;
    all.sort_by_key(|(_, told)| told.data_offsets);
    let (mut end, mut out) = (0, BTreeMap::new());
    for (name, told) in all {
        let (from, to) = told.data_offsets;
        let bits = told.shape.iter().try_fold(told.dtype.bitsize() as u64, |bits, n| bits.checked_mul(*n));
        let bytes = bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
        let shape = &told.shape;
        let what = || format!("`{name}`, {:?} of shape {shape:?}", told.dtype);
        match bytes {
            _ if to < from || to > data.len() as u64 => {
                return Err(format!("{} is to be in the bytes {from} to {to} of {} after the header", what(), data.len()));
            }
            Some(n) if n != to - from => return Err(format!("{} needs {n} bytes, and has the {} from {from} to {to}", what(), to - from)),
            None => return Err(format!("{} is no whole number of bytes that a file can have", what())),
            Some(_) if from != end => return Err(format!("{} begins at byte {from}, and the tensor before it ends at {end}", what())),
            Some(_) => end = to,
        }
        let start = 8 + n as usize;
        // what lies in the file has sizes that fit
        let shape = told.shape.iter().map(|n| *n as usize).collect();
        out.insert(name, Info { dtype: told.dtype, shape, at: start + from as usize..start + to as usize });
    }
    if end != data.len() as u64 {
        return Err(format!("its tensors end at byte {end} of {} after the header", data.len()));
    }
    Ok((out, meta))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![7; data]].concat()
    }

    #[test]
    fn headers_that_hold() {
        let two = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,1],"data_offsets":[3,11]},"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},
            "none":{"dtype":"I64","shape":[0,5],"data_offsets":[3,3]},"one":{"dtype":"BF16","shape":[],"data_offsets":[11,13]}}   "#;
        let (found, meta) = read(&file(two, 13)).unwrap();
        assert_eq!(meta, Meta::from([("format".into(), "pt".into())]));
        let start = 8 + two.len();
        assert_eq!(found["b"], Info { dtype: Dtype::F32, shape: vec![2, 1], at: start + 3..start + 11 });
        assert_eq!((found["none"].at.len(), found["one"].at.len(), found.len()), (0, 2, 4));
        assert_eq!(read(&file("{}", 0)).unwrap().0.len(), 0);
        // as the library that writes such files reads them
        assert_eq!(safetensors::SafeTensors::deserialize(&file(two, 13)).unwrap().len(), 4);
    }

    #[test]
    fn headers_that_do_not() {
        let one = |dtype: &str, shape: &str, at: &str| format!(r#"{{"x":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{at}}}}}"#);
        let twice = r#"{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#;
        let overlap = r#"{"x":{"dtype":"U8","shape":[6],"data_offsets":[0,6]},"y":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
        for (header, says) in [
            (one("U8", "[9]", "[0,9]"), "bytes 0 to 9 of 8"),
            (one("U8", "[8]", "[8,0]"), "bytes 8 to 0"),
            (one("U8", "[7]", "[0,8]"), "needs 7 bytes, and has the 8"),
            (one("F32", "[1]", "[0,8]"), "`x`, F32 of shape [1] needs 4 bytes"),
            (one("U8", "[7]", "[1,8]"), "begins at byte 1"),
            (one("U8", "[7]", "[0,7]"), "end at byte 7 of 8"),
            (one("U8", "[18446744073709551615]", "[0,8]"), "no whole number"),
            (one("U8", "[4294967296,4294967296]", "[0,8]"), "no whole number"),
            (one("F4", "[3]", "[0,8]"), "no whole number"),
            (one("U8", "[-1]", "[0,8]"), "invalid value"),
            (one("U8", "[1.5]", "[0,8]"), "floating point"),
            (one("U9", "[8]", "[0,8]"), "U9"),
            (one("U8", "[8]", "[0,8,9]"), "trailing"),
            (twice.into(), "`x` is there twice"),
            (overlap.into(), "begins at byte 4, and the tensor before it ends at 6"),
            ("[]".into(), "expected an object"),
            ("{\"x\":{\"dtype\":\"U8\"}}".into(), "missing field"),
            ("{".into(), "EOF"),
            (String::new(), "EOF"),
        ] {
            let e = read(&file(&header, 8)).unwrap_err();
            assert!(e.contains(says), "{header}: {e}");
        }
        for (bytes, says) in [
            (&b""[..], "0 bytes"),
            (&[1; 7], "7 bytes"),
            (&u64::MAX.to_le_bytes(), "18446744073709551615 bytes follows"),
            (&100u64.to_le_bytes(), "100 bytes, and there are 0 left"),
        ] {
            let e = read(bytes).unwrap_err();
            assert!(e.contains(says), "{e}");
        }
    }
}
