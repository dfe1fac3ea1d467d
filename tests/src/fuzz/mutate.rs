//! What can be wrong with files: from single bits to JSON that is well-formed and lies.

use super::{Files, NAMES, Random};
use serde_json::{Map, Value, json};

/// Changes a folder in one to four places.
pub fn files(r: &mut Random, files: &mut Files) {
    for _ in 0..1 + r.below(4) {
        if r.once_in(12) {
            folder(r, files);
            continue;
        }
        let i = r.below(files.len());
        let Some((name, Some(bytes))) = files.get_mut(i) else { continue };
        let (name, before) = (*name, std::mem::take(bytes));
        let after = match r.below(4) {
            0 => raw(r, before),
            _ if name.ends_with(".safetensors") => tensors(r, before),
            _ => text(r, before),
        };
        files[i].1 = Some(after);
    }
}

/// Changes a `tokenizer.json` in one to four places.
pub fn tokenizer(r: &mut Random, bytes: Vec<u8>) -> Vec<u8> {
    (0..1 + r.below(3)).fold(bytes, |bytes, _| if r.once_in(12) { raw(r, bytes) } else { text(r, bytes) })
}

/// A file is lost, doubled, exchanged, emptied, or a folder.
fn folder(r: &mut Random, files: &mut Files) {
    let (i, j) = (r.below(files.len()), r.below(files.len()));
    if files.is_empty() {
        return;
    }
    match r.below(6) {
        0 => drop(files.remove(i)),
        1 => files[i].1 = None,
        2 => files[i].1 = Some(vec![]),
        3 => {
            let own = std::mem::take(&mut files[i].1);
            files[i].1 = std::mem::replace(&mut files[j].1, own);
        }
        4 => files[i].1 = files[j].1.clone(),
        _ => {
            let name = *r.pick(&NAMES);
            if files.iter().all(|(n, _)| *n != name) {
                let bytes = files[i].1.clone();
                files.push((name, bytes));
            }
        }
    }
}

/// Bytes that mean nothing.
fn raw(r: &mut Random, mut bytes: Vec<u8>) -> Vec<u8> {
    let (i, j) = (r.below(bytes.len()), r.below(bytes.len()));
    let (from, to) = (i.min(j), i.max(j));
    if bytes.is_empty() {
        return (0..r.below(64)).map(|_| r.bits() as u8).collect();
    }
    match r.below(9) {
        0 => bytes[i] ^= 1 << r.below(8),
        1 => bytes[i] = *r.pick(&[0, 1, 127, 128, 255, b'"', b'{', b'[', b'9', b'-', b'\\']),
        2 => bytes.truncate(i),
        3 => bytes.extend((0..1 + r.below(100)).map(|_| r.bits() as u8)),
        4 => drop(bytes.drain(from..to.min(from + 64))),
        5 => {
            let piece = bytes[from..to.min(from + 256)].to_vec();
            let at = r.below(bytes.len());
            bytes.splice(at..at, piece);
        }
        6 => bytes[from..to].fill(0),
        7 => {
            let word = [u64::MAX, 1 << 63, 1 << 40, 100_000_000, bytes.len() as u64, 0][r.below(6)].to_le_bytes();
            let at = if r.once_in(2) { 0 } else { i };
            bytes.iter_mut().skip(at).zip(word).for_each(|(b, w)| *b = w);
        }
        _ => bytes.swap(i, j),
    }
    bytes
}

/// A safetensors file whose header lies, with or without the length that goes with it.
fn tensors(r: &mut Random, bytes: Vec<u8>) -> Vec<u8> {
    let n = bytes.first_chunk::<8>().map_or(usize::MAX, |b| u64::from_le_bytes(*b) as usize);
    let Some(header) = bytes.get(8..8usize.saturating_add(n)) else { return raw(r, bytes) };
    let Ok(Value::Object(mut header)) = serde_json::from_slice::<Value>(header) else { return raw(r, bytes) };
    let (names, mut data) = (header.keys().cloned().collect::<Vec<_>>(), bytes[8 + n..].to_vec());
    if names.is_empty() {
        return raw(r, bytes);
    }
    let (a, b) = (r.pick(&names).clone(), r.pick(&names).clone());
    match r.below(8) {
        0 => drop(header.remove(&a)),
        1 => {
            let (x, y) = (header[&a].clone(), header[&b].clone());
            (header[&a], header[&b]) = (y, x);
        }
        2 => header[&a] = header[&b].clone(),
        3 => {
            if let Some(x) = header.remove(&a) {
                header.insert(if r.once_in(2) { format!("mtp.{a}") } else { a.replace('0', "1") }, x);
            }
        }
        4 => {
            if let Some(one) = header[&a].as_object_mut() {
                one.insert("dtype".into(), (*r.pick(&["F64", "F16", "BF16", "I64", "U8", "BOOL", "F4", "F8_E4M3", "C64", "I16", ""])).into());
            }
        }
        5 => {
            // one more tensor, with bytes of its own
            let (size, at) = (r.below(40), data.len());
            data.resize(at + size, 1);
            header.insert(format!("mtp.{size}"), json!({"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}));
        }
        6 => {
            // the same bytes in another shape or dtype
            if let Some(shape) = header[&a].get_mut("shape").and_then(Value::as_array_mut) {
                match r.below(3) {
                    0 => shape.reverse(),
                    1 => shape.push(1.into()),
                    _ => shape.insert(0, 1.into()),
                }
            }
        }
        _ => {
            let mut all = Value::Object(std::mem::take(&mut header));
            change(r, &mut all);
            header = all.as_object().cloned().unwrap_or_default();
        }
    }
    let header = if r.once_in(8) { text(r, Value::Object(header).to_string().into_bytes()) } else { Value::Object(header).to_string().into_bytes() };
    let length = if r.once_in(10) { (header.len() as u64).wrapping_add(r.below(5) as u64).wrapping_sub(2) } else { header.len() as u64 };
    [&length.to_le_bytes()[..], &header, &data].concat()
}

/// JSON that is another; now and then no longer JSON.
fn text(r: &mut Random, bytes: Vec<u8>) -> Vec<u8> {
    let Ok(mut json) = serde_json::from_slice::<Value>(&bytes) else { return raw(r, bytes) };
    change(r, &mut json);
    let mut text = json.to_string();
    if r.once_in(15) {
        let twice = json.as_object().and_then(|m| m.iter().nth(r.below(m.len()))).map(|(k, v)| format!("{}:{v},", Value::from(k.as_str())));
        let odd =
            ["NaN", "1e999", "-1e-999", "Infinity", "\"\\ud800\"", "1234567890123456789012345678901234567890", "/*", "{\"a\":", "[[[[", "\u{feff}"];
        let at = (0..4).map(|_| r.below(text.len())).find(|i| text.is_char_boundary(*i)).unwrap_or(0);
        match (r.below(4), twice) {
            (0, Some(twice)) => text.insert_str(1, &twice),
            (1, _) => text.insert_str(at, &"[".repeat(r.below(3000))),
            _ => text.insert_str(at, odd[r.below(odd.len())]),
        }
    }
    text.into_bytes()
}

/// Changes one of all values in each other.
fn change(r: &mut Random, json: &mut Value) {
    let all = count(json);
    let other = nth(json, &mut r.below(all)).map(|v| v.clone());
    // small values are as many as large ones are: the deep ones are most
    let mut at = if r.once_in(3) { r.below(all.min(40)) } else { r.below(all) };
    if let Some(v) = nth(json, &mut at) {
        one(r, v, other);
    }
}

fn count(v: &Value) -> usize {
    1 + match v {
        Value::Array(a) => a.iter().map(count).sum(),
        Value::Object(m) => m.values().map(count).sum(),
        _ => 0,
    }
}

fn nth<'a>(v: &'a mut Value, n: &mut usize) -> Option<&'a mut Value> {
    if *n == 0 {
        return Some(v);
    }
    *n -= 1;
    match v {
        Value::Array(a) => a.iter_mut().find_map(|v| nth(v, n)),
        Value::Object(m) => m.values_mut().find_map(|v| nth(v, n)),
        _ => None,
    }
}

fn one(r: &mut Random, v: &mut Value, other: Option<Value>) {
    match v {
        _ if r.once_in(6) => *v = interesting(r),
        _ if r.once_in(10) => *v = other.unwrap_or_default(),
        _ if r.once_in(40) => {
            for _ in 0..r.below(150) {
                *v = if r.once_in(2) { json!([v.take()]) } else { json!({"type": "Sequence", "a": v.take()}) };
            }
        }
        Value::Number(n) => {
            *v = match (n.as_u64(), r.below(6)) {
                (Some(n), 0) => n.wrapping_add(1).into(),
                (Some(n), 1) => n.wrapping_sub(1).into(),
                (Some(n), 2) => n.wrapping_mul(2).into(),
                (Some(n), 3) => (n / 2).into(),
                (_, 4) => json!(-n.as_f64().unwrap_or(0.0)),
                _ => interesting(r),
            }
        }
        Value::String(s) => match r.below(5) {
            0 => *s = s.repeat(2),
            1 => drop(s.pop()),
            2 => s.push(*r.pick(&['a', '\u{0}', 'é', '▁', '\\', '"', '(', '*', '日'])),
            3 => *v = other.filter(Value::is_string).unwrap_or_default(),
            _ => *s = (*r.pick(WORDS)).into(),
        },
        Value::Array(a) => match (r.below(6), a.len()) {
            (0, n) if n > 0 => drop(a.remove(r.below(n))),
            (1, n) if n > 0 => a.push(a[r.below(n)].clone()),
            (2, n) if n > 1 => a.swap(r.below(n), 0),
            (3, _) => a.clear(),
            (4, n) if n > 0 => {
                let x = a[0].clone();
                a.extend(std::iter::repeat_n(x, r.below(200)));
            }
            _ => a.push(other.unwrap_or_else(|| interesting(r))),
        },
        Value::Object(m) => object(r, m, other),
        _ => *v = interesting(r),
    }
}

fn object(r: &mut Random, m: &mut Map<String, Value>, other: Option<Value>) {
    let keys: Vec<String> = m.keys().cloned().collect();
    if keys.is_empty() || r.once_in(8) {
        m.insert((*r.pick(WORDS)).into(), other.unwrap_or_else(|| interesting(r)));
        return;
    }
    let (a, b) = (r.pick(&keys).clone(), r.pick(&keys).clone());
    match r.below(4) {
        0 => drop(m.remove(&a)),
        1 => {
            if let Some(x) = m.remove(&a) {
                m.insert(if r.once_in(2) { b } else { format!("{a}x") }, x);
            }
        }
        2 => {
            let (x, y) = (m[&a].clone(), m[&b].clone());
            (m[&a], m[&b]) = (y, x);
        }
        _ => m[&a] = interesting(r),
    }
}

/// Words that mean something somewhere.
const WORDS: &[&str] = &[
    "",
    "a",
    "\u{0}",
    "../x",
    "/etc/passwd",
    "model.safetensors",
    "model-00001-of-00003.safetensors",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "tidegate",
    "auto",
    "mixtral",
    "full_attention",
    "linear_attention",
    "sliding_attention",
    "headwise",
    "none",
    "add",
    "identity",
    "sigmoid",
    "num_experts",
    "head_dim",
    "sliding_window",
    "partial_rotary_factor",
    "mlp_only_layers",
    "num_local_experts",
    "rope_parameters",
    "attention_gate",
    "linear_allow_neg_eigval",
    "output_gate_type",
    "zero_centered_norms",
    "mamba2",
    "delta_net",
    "layer_pattern",
    "mamba_n_groups",
    "mamba_state_size",
    "linear_qk_norm",
    "linear_short_conv",
    "switch_heads",
    "experts",
    "top_k",
    "keys",
    "value_gate",
    "granularity",
    "rope_scaling",
    "yarn",
    "llama3",
    "factor",
    "tie_word_embeddings",
    "decoder_sparse_step",
    "(a*)*b",
    "(?=a)",
    "\\p{L}+",
    "[",
    "$",
    "^",
    "<unk>",
    "▁",
    "#",
    "##",
    "type",
    "ByteLevel",
    "BPE",
    "Unigram",
    "WordPiece",
    "WordLevel",
    "Sequence",
    "Metaspace",
    "Replace",
    "ByteFallback",
    "unk_token",
    "unk_id",
    "AAAAAA==",
    "/////w==",
    "BAAAAP////8=",
    "BAAAAAABAABhAGIA",
    "continuing_subword_prefix",
    "end_of_word_suffix",
    "max_input_chars_per_word",
    "日本",
];

fn interesting(r: &mut Random) -> Value {
    match r.below(10) {
        0 => {
            json!(*r.pick(&[0u64, 1, 2, 3, 7, 8, 16, 255, 256, 65_535, 65_536, 1 << 24, (1 << 24) + 1, 1 << 31, 1 << 32, 1 << 53, 1 << 63, u64::MAX]))
        }
        1 => json!(*r.pick(&[-1i64, -2, -255, i64::from(i32::MIN), i64::MIN])),
        2 => json!(*r.pick(&[0.0, -0.0, 0.5, 1.0, 2.0, 1e-300, 1e-7, 1e30, 1e308, -1.5])),
        3 => Value::Null,
        4 => r.once_in(2).into(),
        5 => json!([]),
        6 => json!({}),
        7 => "x".repeat(r.below(5000)).into(),
        8 => vec![1; r.below(5000)].into(),
        _ => (*r.pick(WORDS)).into(),
    }
}
