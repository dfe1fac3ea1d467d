//! What the library `tokenizers` takes for granted in a `tokenizer.json`, and a file of a few bytes can have otherwise to take any amount of memory.

use serde_json::Value;

/// A text may become so many times longer.
const GROWTH: f64 = 1e4;

/// An error, in words, for a file that would take more memory than it or a text justifies.
pub(super) fn check(json: &Value) -> Result<(), String> {
    charsmaps(json)?;
    for (parts, n) in
        [("normalizer and pre_tokenizer", growth(&json["normalizer"]) * growth(&json["pre_tokenizer"])), ("decoder", growth(&json["decoder"]))]
    {
        if n > GROWTH {
            return Err(format!("its {parts} can make a text {n:.0} times longer, expected at most {GROWTH:.0}"));
        }
    }
    Ok(())
}

/// A map of characters begins with the length of a table, for which memory is taken before it is read.
fn charsmaps(json: &Value) -> Result<(), String> {
    match json {
        Value::Array(all) => all.iter().try_for_each(charsmaps),
        Value::Object(all) => {
            if let Some(map) = all.get("precompiled_charsmap").and_then(Value::as_str) {
                let (has, told) = (map.len() as u64 / 4 * 3, first(map.as_bytes()));
                if u64::from(told) > has {
                    return Err(format!("its `precompiled_charsmap` is of {has} bytes, and begins with a table of {told}"));
                }
            }
            all.values().try_for_each(charsmaps)
        }
        _ => Ok(()),
    }
}

/// The little-endian number that base64 begins with.
fn first(text: &[u8]) -> u32 {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => 0,
    };
    let bits = (0..6).fold(0u64, |bits, i| bits << 6 | u64::from(text.get(i).copied().map_or(0, digit)));
    ((bits >> 4) as u32).swap_bytes()
}

/// At most so many times longer is a text that went through a normalizer or decoder with all its parts.
fn growth(part: &Value) -> f64 {
    let of = |key: &str| part[key].as_array().map_or(1.0, |all| all.iter().map(growth).product());
    let own = match (part["content"].as_str(), part["pattern"]["String"].as_str()) {
        // what a regular expression finds may be as short as nothing
        (Some(content), pattern) => match pattern.map_or(0, str::len) {
            0 => 1.0 + content.len() as f64,
            n => (content.len() as f64 / n as f64).max(1.0),
        },
        // bytes become characters of up to two
        _ if part["type"] == "ByteLevel" => 2.0,
        _ => 1.0,
    };
    own * of("normalizers") * of("pretokenizers") * of("decoders")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_beginning_of_base64() {
        for (text, n) in [("AAAAAA==", 0), ("BAAAAAABAAA=", 4), ("/////w==", u32::MAX), ("CAAAAnACAAABAAAA", 0x0200_0008), ("", 0), ("B", 4)] {
            assert_eq!(first(text.as_bytes()), n, "{text}");
        }
    }

    #[test]
    fn what_grows_is_refused() {
        let replace = |pattern: Value, n: usize| json!({"type": "Replace", "pattern": pattern, "content": "x".repeat(n)});
        let with = |part: &str, all: Vec<Value>| json!({part: {"type": "Sequence", format!("{part}s"): all}});
        let (word, any) = (json!({"String": "▁"}), json!({"Regex": "a*"}));
        check(&with("normalizer", vec![replace(word.clone(), 3); 100])).unwrap();
        check(&with("decoder", vec![replace(any.clone(), 9); 4])).unwrap();
        let e = check(&with("normalizer", vec![replace(word, 30); 5])).unwrap_err();
        assert!(e.contains("normalizer") && e.contains("100000 times"), "{e}");
        let bytes = json!({"type": "ByteLevel"});
        check(&json!({"normalizer": bytes, "pre_tokenizer": {"type": "Sequence", "pretokenizers": vec![&bytes; 12]}})).unwrap();
        let e = check(&json!({"normalizer": bytes, "pre_tokenizer": {"type": "Sequence", "pretokenizers": vec![&bytes; 13]}})).unwrap_err();
        assert!(e.contains("pre_tokenizer") && e.contains("16384 times"), "{e}");
        let e = check(&with("decoder", vec![replace(any, 9); 5])).unwrap_err();
        assert!(e.contains("decoder") && e.contains("100000 times"), "{e}");
        let map = |s: &str| with("normalizer", vec![json!({"type": "Precompiled", "precompiled_charsmap": s})]);
        check(&map("BAAAAAABAABhAGIA")).unwrap();
        let e = check(&map("CAAAAnACAAABAAAAYQBiAA==")).unwrap_err();
        assert!(e.contains("of 18 bytes") && e.contains("table of 33554440"), "{e}");
    }
}
