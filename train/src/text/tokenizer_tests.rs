use super::*;
use crate::text::Codec;
use serde_json::json;
use std::sync::Arc;

const GPT2: &[u8] = include_bytes!("../../tests/tokens/gpt2.bin");
const ROWS: &str = include_str!("../../tests/tokens/gpt2.jsonl");
const TEXTS: &str = include_str!("../../tests/tokens/texts.json");

fn texts() -> Vec<String> {
    serde_json::from_str(TEXTS).unwrap()
}

/// GPT-2's vocabulary as a tokenizer.json.
fn gpt2_json() -> Value {
    let char_of = |b: u8| (0..512).filter_map(char::from_u32).find(|&c| byte_of(c) == Some(b)).unwrap();
    let mut names: Vec<String> = GPT2[..256].iter().map(|&b| char_of(b).into()).collect();
    let mut merges = vec![];
    for pair in GPT2[256..].as_chunks::<4>().0 {
        let part = |i: usize| names[usize::from(u16::from_le_bytes([pair[i], pair[i + 1]]))].clone();
        let (a, b) = (part(0), part(2));
        names.push(format!("{a}{b}"));
        merges.push(json!([a, b]));
    }
    let vocab: serde_json::Map<String, Value> = names.into_iter().zip((0..).map(|i: u32| i.into())).collect();
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0",
        // what a file may ask for, and a corpus must not have
        "truncation": {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"},
        "padding": {"strategy": {"Fixed": 7}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [{"id": 50256, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": level, "post_processor": level, "decoder": level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": false, "vocab": vocab, "merges": merges},
    })
}

fn open(json: &Value) -> Result<Tokenizer> {
    Tokenizer::from_json(json.to_string().into_bytes(), Path::new("some/tokenizer.json"))
}

/// The text of tokens as it comes, checked to be that of the whole, piece by piece.
fn streamed(codec: &Codec, tokens: &[u32]) -> String {
    let mut decoder = codec.decoder();
    let mut pieces: Vec<String> = tokens.iter().map(|&t| decoder.push(t)).collect();
    pieces.push(decoder.finish());
    assert_eq!(pieces.concat(), codec.decode(tokens));
    pieces.concat()
}

#[test]
fn gpt2_gives_the_tokens_of_others() {
    let tokenizer = open(&gpt2_json()).unwrap();
    assert!(tokenizer.vocab_size() == 50257 && tokenizer.end() == Some(50256) && tokenizer.is_byte_level());
    let literal = Codec::Tokenizer(Arc::new(open(&gpt2_json()).unwrap().literal()));
    let mut rows = 0;
    for row in ROWS.lines().map(|l| serde_json::from_str::<Value>(l).unwrap()) {
        let (text, ids): (&str, Vec<u64>) = (row["text"].as_str().unwrap(), serde_json::from_value(row["ids"].clone()).unwrap());
        if text == "MOBY-DICK" {
            let ids_of_moby = literal.encode(std::str::from_utf8(crate::data::MOBY_DICK).unwrap()).unwrap();
            let hash = ids_of_moby.iter().chain(&[50256]).fold(0xcbf2_9ce4_8422_2325u64, |h, &t| (h ^ u64::from(t)).wrapping_mul(0x100_0000_01b3));
            assert_eq!([ids_of_moby.len() as u64, hash], ids[..]);
            continue;
        }
        let found = literal.encode(text).unwrap();
        assert_eq!(found.iter().map(|&t| u64::from(t)).collect::<Vec<_>>(), ids, "{text:?}");
        assert_eq!(streamed(&literal, &found), text);
        rows += 1;
    }
    assert!(rows > 90);
    // a special token that a text spells out is itself, unless it is to be text like any other
    assert_eq!(tokenizer.encode("a<|endoftext|>").unwrap(), [64, 50256]);
    assert!(literal.encode("a<|endoftext|>").unwrap().iter().all(|&t| t < 50256));
    assert_eq!(Codec::Tokenizer(Arc::new(tokenizer)).decode(&[64, 50256, 64]), "a<|endoftext|>a");
}

#[test]
fn no_half_character_is_told() {
    let codec = Codec::Tokenizer(Arc::new(open(&gpt2_json()).unwrap()));
    for text in texts() {
        let mut decoder = codec.decoder();
        let tokens = codec.encode(&text).unwrap();
        let pieces: Vec<String> = tokens.iter().map(|&t| decoder.push(t)).collect();
        assert_eq!(pieces.concat(), text);
        assert_eq!(pieces.iter().map(|p| p.matches('\u{fffd}').count()).sum::<usize>(), text.matches('\u{fffd}').count(), "{text:?}");
    }
    // a character that is never ended, and a token that there isn't, are each told by one U+FFFD, as by the bytes' decoder
    let emoji = codec.encode("👩").unwrap();
    assert!(emoji.len() > 1);
    assert_eq!(streamed(&codec, &[64, emoji[0], 64]), "a\u{fffd}a");
    assert_eq!(streamed(&codec, &[64, emoji[0]]), "a\u{fffd}");
    assert_eq!(streamed(&codec, &[64, 60_000, 64]), "a\u{fffd}a");
}

/// A vocabulary of another kind: words begin with ▁, and what has no token is spelled in bytes named <0x..>.
fn sentences() -> Value {
    let mut vocab = serde_json::Map::new();
    for name in ["<unk>", "<s>", "</s>"].iter().map(ToString::to_string).chain((0..256).map(|b| format!("<0x{b:02X}>"))) {
        vocab.insert(name, vocab.len().into());
    }
    for name in ["▁", "a", "b", "c", "▁a", "ab", "▁ab"] {
        vocab.insert(name.into(), vocab.len().into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true,
            "byte_fallback": true, "vocab": vocab, "merges": [["▁", "a"], ["a", "b"], ["▁a", "b"]]},
    })
}

#[test]
fn tokens_that_are_no_bytes() {
    let tokenizer = open(&sentences()).unwrap();
    assert!(!tokenizer.is_byte_level() && tokenizer.end() == Some(2));
    let codec = Codec::Tokenizer(Arc::new(tokenizer));
    for text in ["ab ab c", "a", "  a  b", "日本 ab 👩‍👧 é", "ab\nc"] {
        let tokens = codec.encode(text).unwrap();
        assert_eq!(streamed(&codec, &tokens), text, "{tokens:?}");
        let mut decoder = codec.decoder();
        assert!(tokens.iter().all(|&t| !decoder.push(t).contains('\u{fffd}')), "{text}");
    }
    assert_eq!(streamed(&codec, &[4 + 0xe2, 4 + 0x82]).chars().filter(|&c| c != '\u{fffd}').count(), 0);
    // bytes that never become a character don't hold back what follows for ever
    let mut decoder = codec.decoder();
    assert!((0..100).map(|_| decoder.push(3 + 0x80)).any(|t| !t.is_empty()));
}

#[test]
fn a_text_that_stands_alone_gets_what_the_file_puts_around_it() {
    let mut json = sentences();
    let bos = |id: u32| open(&json).unwrap().name(id).unwrap();
    let name = bos(1);
    json["post_processor"] = json!({
        "type": "TemplateProcessing", "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
        "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {name.clone(): {"id": name, "ids": [1], "tokens": [name]}},
    });
    let codec = Codec::Tokenizer(Arc::new(open(&json).unwrap()));
    let plain = codec.encode("ab a").unwrap();
    assert_eq!(codec.encode_alone("ab a").unwrap(), [&[1], &plain[..]].concat());
    assert_eq!(Codec::Bytes.encode_alone("ab").unwrap(), Codec::Bytes.encode("ab").unwrap());
}

#[test]
fn files_that_are_no_tokenizer() {
    let message = |bytes: &[u8]| Tokenizer::from_json(bytes.into(), Path::new("some/tokenizer.json")).unwrap_err().to_string();
    let whole = sentences().to_string();
    for n in (0..whole.len()).step_by(61) {
        if whole.is_char_boundary(n) {
            let m = message(&whole.as_bytes()[..n]);
            assert!(m.contains("some/tokenizer.json") && m.contains("cut off") && m.contains("line 1"), "{n}: {m}");
        }
    }
    for (bytes, words) in [
        (&b"\x0a\x0e\x01<unk>"[..], "no tokenizer.json"),
        (b"{\"a\": 1}", "no object `model`"),
        (b"[]", "no object `model`"),
        (b"{\"version\": \"1.0\", \"model\": {\"type\": \"BPE\"}}", "no tokenizer.json that can be read"),
    ] {
        assert!(message(bytes).contains(words), "{}", message(bytes));
    }
    let wrong = |change: &dyn Fn(&mut Value)| {
        let mut json = gpt2_json();
        change(&mut json);
        open(&json).unwrap_err().to_string()
    };
    let m = wrong(&|j| j["model"]["merges"][7] = json!(["nowhere", "x"]));
    assert!(m.contains("nowhere"), "{m}");
    // where the library panics, here or when it is used
    let mut json = sentences();
    json["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "BAAAAAABAABhAGIA"});
    let m = open(&json).and_then(|t| t.encode("The whale")).unwrap_err().to_string();
    assert!(m.contains("index out of bounds"), "{m}");
    json["normalizer"]["precompiled_charsmap"] = "/////w==".into();
    let m = open(&json).unwrap_err().to_string();
    assert!(m.contains("some/tokenizer.json") && m.contains("a table of 4294967295"), "{m}");
    let m = wrong(&|j| j["pre_tokenizer"]["type"] = "Whatever".into());
    assert!(m.contains("can be read"), "{m}");
    let m = wrong(&|j| j["model"]["vocab"]["zzzz"] = u32::MAX.into());
    assert!(m.contains("4294967294") || m.contains("4294967295"), "{m}");
    let small = |id: u32| {
        let mut json = sentences();
        json["model"]["vocab"]["zzzz"] = id.into();
        open(&json).map_err(|e| e.to_string())
    };
    assert!(small(300_000).unwrap().vocab_size() == 300_001 && small(1 << 22).unwrap_err().contains("the largest 4194304"));
    let m = wrong(&|j| {
        let vocab: serde_json::Map<String, Value> = j["model"]["vocab"]
            .as_object()
            .unwrap()
            .iter()
            .filter(|(n, _)| n.chars().count() == 1 && *n != "Z")
            .map(|(n, i)| (n.clone(), i.clone()))
            .collect();
        (j["model"]["vocab"], j["model"]["merges"]) = (vocab.into(), json!([]));
    });
    assert!(m.contains("0x5a"), "{m}");
}

#[test]
fn the_byte_alphabet_is_the_library_s() {
    let own: std::collections::HashSet<char> = (0..1000).filter_map(char::from_u32).filter(|&c| byte_of(c).is_some()).collect();
    let theirs: std::collections::HashSet<char> = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().collect();
    assert_eq!(own, theirs);
    let bytes: std::collections::HashSet<u8> = own.iter().filter_map(|&c| byte_of(c)).collect();
    assert_eq!(bytes.len(), 256);
}
