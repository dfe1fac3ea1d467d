use crate::config::*;
use serde_json::{Value, json};

fn read(v: &Value) -> ModelConfig {
    ModelConfig::from_json(v.clone()).unwrap()
}
/// The error of a configuration with one key more, or another value.
fn error(v: &Value, key: &str, x: Value) -> String {
    let mut v = v.clone();
    v[key] = x;
    ModelConfig::from_json(v).unwrap_err().to_string()
}

/// Of the published 4B that reads images, too, and of a 35B with experts; vision towers shortened.
fn qwen3_5() -> [Value; 2] {
    let rope = json!({"mrope_interleaved": true, "mrope_section": [11, 11, 10], "rope_type": "default", "rope_theta": 10_000_000, "partial_rotary_factor": 0.25});
    let dense = json!({
        "architectures": ["Qwen3_5ForConditionalGeneration"], "image_token_id": 248_056, "model_type": "qwen3_5", "text_config": {
            "attention_bias": false, "attention_dropout": 0.0, "attn_output_gate": true, "dtype": "bfloat16", "eos_token_id": 248_044,
            "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2560, "initializer_range": 0.02, "intermediate_size": 9216,
            "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_value_head_dim": 128,
            "max_position_embeddings": 262_144, "mlp_only_layers": [], "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
            "mtp_use_dedicated_embeddings": false, "num_attention_heads": 16, "num_hidden_layers": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
            "tie_word_embeddings": true, "use_cache": true, "vocab_size": 248_320, "mamba_ssm_dtype": "float32", "rope_parameters": rope
        },
        "tie_word_embeddings": true, "transformers_version": "4.57.0.dev0", "video_token_id": 248_057, "vision_config": {"depth": 24},
        "vision_end_token_id": 248_054, "vision_start_token_id": 248_053
    });
    let moe = json!({"model_type": "qwen3_5_moe", "vision_config": {}, "text_config": {"rope_parameters": rope, "pad_token_id": null, "layer_types": null}});
    [dense, moe]
}

#[test]
fn qwen3_5_is_a_qwen3_next() {
    let [dense, moe] = qwen3_5();
    let (d, m) = (read(&dense), read(&moe));
    for c in [&d, &m] {
        assert_eq!((c.saved_type().unwrap(), c.rope_theta, c.rotary_dim(), c.vocab_size), (ModelType::Qwen3Next, 1e7, 64, 248_320));
        assert_eq!((c.layer_type(2), c.layer_type(3)), (LayerType::LinearAttention, LayerType::FullAttention));
    }
    assert_eq!((d.num_experts, d.intermediate_size, d.tie_word_embeddings), (0, 9216, true));
    assert_eq!((m.num_experts, m.num_experts_per_tok, m.num_hidden_layers, m.shared_expert_intermediate_size), (256, 8, 40, 512));
    assert!((4.0..4.5).contains(&(d.parameters().0 as f64 / 1e9)) && (34.0..35.5).contains(&(m.parameters().0 as f64 / 1e9)));
    // the text model alone says the same
    for (whole, c) in [(&dense, &d), (&moe, &m)] {
        let mut text = whole["text_config"].clone();
        text["model_type"] = json!(format!("{}_text", whole["model_type"].as_str().unwrap()));
        assert_eq!(&read(&text), c);
    }
    let inner = |key: &str, x: Value| {
        let mut v = dense.clone();
        v["text_config"][key] = x;
        ModelConfig::from_json(v).unwrap_err().to_string()
    };
    for (e, says) in [
        (inner("attn_output_gate", json!(false)), "`attn_output_gate` = false"),
        (inner("num_experts", json!(4)), "`num_experts` = 4 is nothing that a model of type qwen3_5_text can have: there it is 0"),
        (inner("rope_parameters", json!({"rope_type": "longrope"})), "`rope_type` = \"longrope\" is not supported; it can be \"default\""),
        (inner("hidden_act", json!("gelu")), "`hidden_act` = \"gelu\" is not supported; it can be \"silu\""),
        (inner("model_type", json!("qwen3")), "`text_config.model_type` of a model of type qwen3_5 is \"qwen3_5_text\", found \"qwen3\""),
        (inner("heads", json!(3)), "unknown key `heads`"),
        (error(&dense, "tie_word_embeddings", json!(false)), "`tie_word_embeddings` = false and `text_config.tie_word_embeddings` = true contradict"),
        (error(&dense, "quantization_config", json!({})), "unknown key `quantization_config`"),
        (error(&dense, "text_config", json!(3)), "in `text_config`, an object; found 3"),
        (error(&json!({}), "model_type", json!("qwen3_5_moe")), "in `text_config`, an object; found none"),
        (error(&moe, "norm_topk_prob", json!(false)), "`norm_topk_prob` = false"),
        (error(&moe, "mlp_only_layers", json!([1])), "`mlp_only_layers` = [1]"),
    ] {
        assert!(e.contains(says), "{e}");
    }
}

#[test]
fn olmo_hybrid_reads_as_ours() {
    // the keys of the published 7B
    let published = json!({
        "architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid", "vocab_size": 100_352, "hidden_size": 3840, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 30, "num_key_value_heads": 30, "rms_norm_eps": 1e-6, "attention_bias": false,
        "tie_word_embeddings": false, "linear_num_key_heads": 30, "linear_num_value_heads": 30, "linear_key_head_dim": 96, "linear_value_head_dim": 192,
        "linear_conv_kernel_dim": 4, "linear_allow_neg_eigval": true, "max_position_embeddings": 65536, "rope_parameters": {"rope_theta": null}
    });
    let c = read(&published);
    assert_eq!((c.model_type, c.head_dim, c.rotary_dim(), c.qk_norm, c.linear_norm_eps), (ModelType::Tidegate, 128, 0, QkNorm::Projection, 1e-5));
    assert_eq!((c.post_norm.as_slice(), c.linear_allow_neg_eigval, c.zero_centered_norms), (&[LayerType::FullAttention][..], true, false));
    assert_eq!(
        (c.layer_type(2), c.is_post_norm(2), c.layer_type(3), c.is_post_norm(3)),
        (LayerType::LinearAttention, false, LayerType::FullAttention, true)
    );
    assert!((7.3..7.5).contains(&(c.parameters().0 as f64 / 1e9)), "{}", c.parameters().0);
    assert_eq!(read(&c.to_json().unwrap()), ModelConfig { layer_types: (0..32).map(|i| c.layer_type(i)).collect(), ..c.clone() });
    // what it leaves out is the same, and so are the other ways to say that nothing is rotated
    for rope in [json!({"rope_parameters": null}), json!({"rope_theta": null}), json!({"rope_theta": null, "rope_parameters": null})] {
        let mut short = rope;
        short["model_type"] = json!("olmo_hybrid");
        short["num_key_value_heads"] = Value::Null;
        assert_eq!(read(&short), c);
    }
    let rotated = |rope: Value| {
        let mut v = published.clone();
        v["rope_parameters"] = rope;
        ModelConfig::from_json(v)
    };
    let turns = rotated(json!({"rope_type": "default", "rope_theta": 5e5, })).unwrap();
    assert_eq!((turns.rotary_dim(), turns.rope_theta), (128, 5e5));
    let short = read(&json!({"model_type": "olmo_hybrid", "rope_theta": null, "num_hidden_layers": 2}));
    assert_eq!(short.layer_types, [LayerType::LinearAttention, LayerType::FullAttention]);
    let e = ModelConfig::from_json(json!({"model_type": "olmo_hybrid"})).unwrap_err().to_string();
    assert!(e.contains("must say whether it rotates") && e.contains("rope_theta") && e.contains("found none"), "{e}");
    for (e, says) in [
        (rotated(json!({"rope_type": "yarn", "rope_theta": 5e5})).unwrap_err().to_string(), "`rope_type` = \"yarn\" needs"),
        (rotated(json!({"rope_theta": 5e5, "partial_rotary_factor": 0.5})).unwrap_err().to_string(), "`partial_rotary_factor`"),
        (rotated(json!(3)).unwrap_err().to_string(), "`rope_parameters` must be an object, found 3"),
        (error(&published, "num_experts", json!(4)), "`num_experts` = 4"),
        (error(&published, "linear_a_log", json!(4)), "unknown key `linear_a_log`"),
    ] {
        assert!(e.contains(says), "{e}");
    }
}

#[test]
fn the_gates_of_the_papers_authors_read_as_ours() {
    let file = json!({
        "architectures": ["Qwen3ForCausalLM"], "auto_map": {"AutoConfig": "configuration_qwen3.Qwen3Config"}, "model_type": "qwen3", "attention_bias": false,
        "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
        "tie_word_embeddings": true, "use_qk_norm": true, "qkv_bias": false, "headwise_attn_output_gate": false, "elementwise_attn_output_gate": false
    });
    let with = |changes: Value| {
        let mut v = file.clone();
        changes.as_object().unwrap().iter().for_each(|(k, x)| v[k] = x.clone());
        v
    };
    let baseline = read(&file);
    let (head, elements) = (with(json!({"headwise_attn_output_gate": true})), with(json!({"elementwise_attn_output_gate": true})));
    for (v, granularity, more) in [
        (&file, GateGranularity::None, 0),
        // 2505.06708 table 1 counts likewise: a row of the query projection for each gate
        (&head, GateGranularity::Headwise, 28 * 16 * 2048),
        (&elements, GateGranularity::Elementwise, 28 * 16 * 128 * 2048),
    ] {
        let c = read(v);
        assert_eq!((c.attention_gate.granularity, c.qk_norm, c.attention_bias), (granularity, QkNorm::Head, false));
        assert_eq!(c.parameters().0, baseline.parameters().0 + more);
        assert_eq!(grouped_queries(v), granularity != GateGranularity::None);
        assert!(!grouped_queries(&c.to_json().unwrap()));
    }
    let c = read(&with(json!({"use_qk_norm": false, "qkv_bias": true})));
    assert_eq!((c.qk_norm, c.attention_bias), (QkNorm::None, true));
    for (changes, says) in [
        (json!({"headwise_attn_output_gate": true, "elementwise_attn_output_gate": true}), "are both true"),
        (json!({"headwise_attn_output_gate": 1}), "`headwise_attn_output_gate` must be true or false, found 1"),
        (json!({"attention_bias": true}), "`attention_bias` = true and `qkv_bias` = false contradict"),
        (json!({"model_type": "qwen3_moe", "headwise_attn_output_gate": true}), "unknown key"),
    ] {
        let e = ModelConfig::from_json(with(changes)).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
}
