//! What the mutations begin with: small folders as they should be, and tokenizers of all parts that the library knows.

use super::{Files, NAMES, Place, Random};
use engine::DType;
use nn::{AttentionGate, Decoder, LayerType, ModelConfig, SaveOptions, SwitchHeads};
use serde_json::{Map, Value, json};
use std::path::Path;

fn read(dir: &Path) -> Files {
    NAMES.iter().filter_map(|name| Some((*name, Some(std::fs::read(dir.join(name)).ok()?)))).collect()
}

/// Models of all layers and layouts: our own, saved in all ways, and transformers'.
pub fn folders() -> Vec<Files> {
    let place = Place::new();
    let config = ModelConfig {
        vocab_size: 11,
        hidden_size: 6,
        intermediate_size: 8,
        num_hidden_layers: 3,
        layer_types: vec![LayerType::LinearAttention, LayerType::FullAttention, LayerType::LinearAttention],
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        linear_num_key_heads: 1,
        linear_num_value_heads: 2,
        linear_key_head_dim: 4,
        linear_value_head_dim: 3,
        num_experts: 3,
        num_experts_per_tok: 2,
        moe_intermediate_size: 4,
        shared_expert_intermediate_size: 5,
        mlp_only_layers: vec![1],
        ..Default::default()
    };
    let sliding = vec![LayerType::SlidingAttention, LayerType::LinearAttention, LayerType::FullAttention];
    let other = ModelConfig { layer_types: sliding, tie_word_embeddings: true, num_experts: 0, mlp_only_layers: vec![], ..config.clone() };
    let ours = ModelConfig {
        layer_types: vec![LayerType::Mamba2, LayerType::DeltaNet, LayerType::FullAttention],
        value_gate: AttentionGate::default(),
        switch_heads: SwitchHeads { experts: 2, top_k: 1, keys: true },
        sdpa_norm: true,
        sandwich_norm: true,
        mamba_num_heads: 2,
        mamba_head_dim: 6,
        mamba_state_size: 4,
        mamba_n_groups: 1,
        ..config.clone()
    };
    let mut all = vec![];
    for (config, dtype, shards) in
        [(&config, None, 1), (&other, None, 1), (&ours, None, 1), (&config, Some(DType::BF16), 3), (&other, Some(DType::F16), 3)]
    {
        let model = Decoder::new(config, 1, DType::F32).expect("a model");
        let bytes = config.parameters().0 as u64 * if dtype.is_some() { 2 } else { 4 };
        let dir = place.folder("seed");
        // so that there are three, which the names are of
        let most = (shards > 1).then_some(bytes * 2 / 5);
        model.save_with(&dir, &SaveOptions { dtype, max_shard_bytes: most, ..Default::default() }).expect("a save");
        let files = read(&dir);
        assert_eq!(files.len(), if shards > 1 { 5 } else { 2 }, "{files:?}");
        all.push(files);
    }
    for name in [
        "next_d128_shards",
        "next_d256",
        "qwen3_moe",
        "olmo_hybrid_d64",
        "qwen3_5_moe_d256",
        "qwen3_5_images_d64",
        "gated_head_d128",
        "mamba2_groups",
        "qwen3_yarn",
    ] {
        let files = read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("oracles/golden").join(name));
        assert!(files.len() > 1, "{name}");
        all.push(files);
    }
    all
}

fn byte_level_vocab() -> Map<String, Value> {
    let own = |b: u32| matches!(b, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let spare = (256..).take(68).map(|c| c as u32);
    let chars = (0..256).filter(|b| own(*b)).chain(spare).filter_map(char::from_u32);
    let mut names: Vec<String> = chars.map(String::from).collect();
    names.extend(["Th", "he", "Ġt", "Ġthe", "<|endoftext|>"].map(String::from));
    names.into_iter().zip(0..).map(|(name, i): (String, u32)| (name, i.into())).collect()
}

fn vocab(names: &[&str]) -> Map<String, Value> {
    names.iter().zip(0..).map(|(name, i): (_, u32)| (name.to_string(), i.into())).collect()
}

fn model(r: &mut Random) -> Value {
    let bytes: Vec<String> = (0..256).map(|b| format!("<0x{b:02X}>")).collect();
    let pieces = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "##b", "The", "whale", "é", "日"];
    let with_bytes: Vec<&str> = pieces.iter().copied().chain(bytes.iter().map(String::as_str)).collect();
    match r.below(6) {
        0 | 1 => {
            json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false,
            "byte_fallback": false, "ignore_merges": r.once_in(2), "vocab": byte_level_vocab(), "merges": [["T", "h"], ["h", "e"], ["Ġ", "t"], ["Ġt", "he"]]})
        }
        2 => {
            json!({"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": true,
            "byte_fallback": true, "vocab": vocab(&with_bytes), "merges": ["▁ a", "a b"]})
        }
        3 => {
            json!({"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": vocab(&pieces)})
        }
        4 => json!({"type": "WordLevel", "unk_token": "<unk>", "vocab": vocab(&pieces)}),
        _ => json!({"type": "Unigram", "unk_id": 0, "byte_fallback": r.once_in(2),
            "vocab": with_bytes.iter().zip(1..).map(|(p, i)| json!([p, -f64::from(i)])).collect::<Vec<_>>()}),
    }
}

fn normalizer(r: &mut Random, depth: usize) -> Value {
    match r.below(14) {
        0 => json!({"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true}),
        1 => json!({"type": "Strip", "strip_left": true, "strip_right": true}),
        2 => json!({"type": *r.pick(&["NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Lowercase", "Nmt", "ByteLevel"])}),
        3 => json!({"type": "Precompiled", "precompiled_charsmap": *r.pick(&["BAAAAAABAABhAGIA", "CAAAAAACAAABAAAAYQBiAA=="])}),
        4 => json!({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}),
        5 => json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
        6 => json!({"type": "Prepend", "prepend": "▁"}),
        7 | 8 if depth < 3 => json!({"type": "Sequence", "normalizers": (0..r.below(4)).map(|_| normalizer(r, depth + 1)).collect::<Vec<_>>()}),
        _ => Value::Null,
    }
}

fn pre_tokenizer(r: &mut Random, depth: usize) -> Value {
    match r.below(14) {
        0 | 1 => json!({"type": "ByteLevel", "add_prefix_space": r.once_in(2), "trim_offsets": true, "use_regex": r.once_in(2)}),
        2 => json!({"type": *r.pick(&["BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts"])}),
        3 => json!({"type": "CharDelimiterSplit", "delimiter": "a"}),
        4 => json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": *r.pick(&["always", "never", "first"]), "split": r.once_in(2)}),
        5 => json!({"type": "Split", "pattern": {"Regex": "(?i:'s|'t)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|\\s+(?!\\S)|\\s+"},
            "behavior": *r.pick(&["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]), "invert": r.once_in(2)}),
        6 => json!({"type": "Punctuation", "behavior": "Isolated"}),
        7 => json!({"type": "Digits", "individual_digits": r.once_in(2)}),
        8 => json!({"type": "FixedLength", "length": 3}),
        9 | 10 if depth < 3 => json!({"type": "Sequence", "pretokenizers": (0..r.below(4)).map(|_| pre_tokenizer(r, depth + 1)).collect::<Vec<_>>()}),
        _ => Value::Null,
    }
}

fn post_processor(r: &mut Random, depth: usize) -> Value {
    let special = |name: &str, id: u32| (name.to_string(), json!({"id": name, "ids": [id], "tokens": [name]}));
    match r.below(8) {
        0 => json!({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": Map::from_iter([special("<s>", 1)])}),
        1 => json!({"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}),
        2 => json!({"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": true, "add_prefix_space": true}),
        3 => json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        4 if depth < 3 => json!({"type": "Sequence", "processors": (0..r.below(3)).map(|_| post_processor(r, depth + 1)).collect::<Vec<_>>()}),
        _ => Value::Null,
    }
}

fn decoder(r: &mut Random, depth: usize) -> Value {
    match r.below(14) {
        0..=2 => json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
        3 => json!({"type": "WordPiece", "prefix": "##", "cleanup": true}),
        4 => json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}),
        5 => json!({"type": "BPEDecoder", "suffix": "</w>"}),
        6 => json!({"type": "CTC", "pad_token": "<s>", "word_delimiter_token": "|", "cleanup": true}),
        7 => json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        8 => json!({"type": *r.pick(&["Fuse", "ByteFallback"])}),
        9 => json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
        10 | 11 if depth < 3 => json!({"type": "Sequence", "decoders": (0..r.below(5)).map(|_| decoder(r, depth + 1)).collect::<Vec<_>>()}),
        _ => Value::Null,
    }
}

/// A `tokenizer.json` of parts drawn at random.
pub fn tokenizer(r: &mut Random) -> Vec<u8> {
    let token = |r: &mut Random, id: usize, name: &str| json!({"id": id, "content": name, "single_word": r.once_in(4), "lstrip": r.once_in(4), "rstrip": r.once_in(4), "normalized": r.once_in(4), "special": r.once_in(2)});
    let mut added = vec![];
    if r.once_in(2) {
        added.push(token(r, 328, "<|endoftext|>"));
    }
    if r.once_in(4) {
        added.push(token(r, 1, "<s>"));
    }
    if r.once_in(4) {
        added.push(token(r, 400, "whale"));
    }
    let truncation = if r.once_in(8) { json!({"max_length": 5, "strategy": "LongestFirst", "stride": 2, "direction": "Right"}) } else { Value::Null };
    let padding = json!({"strategy": {"Fixed": 7}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
    let json = json!({"version": "1.0", "truncation": truncation, "padding": if r.once_in(8) { padding } else { Value::Null }, "added_tokens": added,
        "normalizer": normalizer(r, 0), "pre_tokenizer": pre_tokenizer(r, 0), "post_processor": post_processor(r, 0), "decoder": decoder(r, 0), "model": model(r)});
    json.to_string().into_bytes()
}
