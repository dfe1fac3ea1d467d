use super::validate::LARGEST;
use super::*;
use crate::config::json::nearest;
use serde_json::{Value, json};

#[test]
fn reads_what_transformers_writes() {
    let c = ModelConfig::from_json(json!({
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.5}, "hidden_act": "silu", "attention_bias": false
    }))
    .unwrap();
    assert_eq!((c.rope_theta, c.rotary_dim(), c.layer_type(1)), (1e7, 128, LayerType::FullAttention));
    let back = ModelConfig::from_json(serde_json::to_value(&c).unwrap()).unwrap();
    assert_eq!(back, c);
}

#[test]
fn knows_every_key_that_transformers_writes() {
    // Qwen3NextConfig(num_hidden_layers=4).to_json_string(use_diff=False), transformers 5.23.0, and two keys of the published checkpoint's file
    let written = r#"{
"transformers_version": "5.23.0", "architectures": null, "output_hidden_states": false, "return_dict": true, "dtype": null,
"chunk_size_feed_forward": 0, "is_encoder_decoder": false, "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
"label2id": {"LABEL_0": 0, "LABEL_1": 1}, "problem_type": null, "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
"num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 32768,
"initializer_range": 0.02, "rms_norm_eps": 1e-06, "use_cache": true, "tie_word_embeddings": false,
"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.25, "rope_type": "default"}, "attention_bias": false,
"attention_dropout": 0.0, "head_dim": 256, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
"linear_num_key_heads": 16, "linear_num_value_heads": 32, "decoder_sparse_step": 1, "moe_intermediate_size": 512,
"shared_expert_intermediate_size": 512, "num_experts_per_tok": 10, "num_experts": 512, "norm_topk_prob": true, "output_router_logits": false,
"router_aux_loss_coef": 0.001, "mlp_only_layers": [], "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
"pad_token_id": null, "bos_token_id": null, "eos_token_id": null, "_name_or_path": "", "model_type": "qwen3_next", "output_attentions": false,
"full_attention_interval": 4, "use_sliding_window": false
    }"#;
    let c = ModelConfig::from_json(serde_json::from_str(written).unwrap()).unwrap();
    let ours = ModelConfig { num_hidden_layers: 4, ..Default::default() };
    assert_eq!(c, ModelConfig { layer_types: c.layer_types.clone(), model_type: ModelType::Qwen3Next, ..ours.clone() });
    assert_eq!((0..4).map(|i| ours.layer_type(i)).collect::<Vec<_>>(), c.layer_types);
    let derived = ModelConfig::from_json(json!({"num_hidden_layers": 4, "layer_types": null, "mlp_only_layers": null})).unwrap();
    assert_eq!(derived, ours);
}

#[test]
fn written_layer_types_are_spelled_out() {
    let c = ModelConfig { num_hidden_layers: 3, full_attention_interval: 2, ..Default::default() };
    let json = c.to_json().unwrap();
    assert_eq!(json["layer_types"], json!(["linear_attention", "full_attention", "linear_attention"]));
    let back = ModelConfig::from_json(json).unwrap();
    assert!((0..3).all(|i| back.layer_type(i) == c.layer_type(i)));
    let sliding = ModelConfig { num_hidden_layers: 1, layer_types: vec![LayerType::SlidingAttention], ..Default::default() };
    assert_eq!(ModelConfig::from_json(sliding.to_json().unwrap()).unwrap(), ModelConfig { model_type: ModelType::Tidegate, ..sliding });
}

#[test]
fn far_names_are_not_offered() {
    let names = ["hidden_size", "train.steps", "num_experts"];
    for (key, want) in
        [("hiden_size", Some("hidden_size")), ("steps", Some("train.steps")), ("tarin.steps", Some("train.steps")), ("learning_rate", None)]
    {
        assert_eq!(nearest(key, names.iter().copied()), want, "{key}");
    }
    let e = ModelConfig::from_json(json!({"quantization_config": {}})).unwrap_err().to_string();
    assert!(e.contains("unknown key `quantization_config`") && !e.contains("did you mean"), "{e}");
}

#[test]
fn mistakes_are_named() {
    let err = |v: Value| ModelConfig::from_json(v).unwrap_err().to_string();
    assert!(err(json!({"hiden_size": 4})).contains("did you mean `hidden_size`"));
    assert!(err(json!({"num_attention_heads": 5, "num_key_value_heads": 2})).contains("num_key_value_heads"));
    assert!(err(json!({"num_experts": 2, "num_experts_per_tok": 3})).contains("num_experts_per_tok"));
    assert!(err(json!({"hidden_size": "big"})).contains("big"));
    assert!(err(json!({"hidden_act": "gelu"})).contains("`hidden_act` = \"gelu\" is not supported; it can be \"silu\""));
    assert!(err(json!({"linear_norm_eps": -1.0})).contains("`linear_norm_eps` must be positive, or 0"));
    assert!(err(json!({"qk_norm": "tail"})).contains("tail"));
    assert!(err(json!({"post_norm": ["tail"]})).contains("tail"));
    assert!(err(json!([1])).contains("object"));
    for key in [
        "hidden_size",
        "decoder_sparse_step",
        "moe_intermediate_size",
        "linear_key_head_dim",
        "mamba_num_heads",
        "mamba_state_size",
        "mamba_n_groups",
    ] {
        assert!(err(json!({ key: 0 })).contains(key));
    }
    for key in ["vocab_size", "num_experts", "intermediate_size", "shared_expert_intermediate_size", "num_hidden_layers"] {
        assert!(err(json!({ key: 1u64 << 40 })).contains(key));
    }
    assert!(err(json!({"mlp_only_layers": [1], "intermediate_size": 0})).contains("layer 1 is dense"));
    assert!(err(json!({"num_hidden_layers": 4, "mlp_only_layers": [4]})).contains("names layer 4"));
    let window =
        json!({"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 65, "max_position_embeddings": 64});
    let e = err(window.clone());
    assert!(e.contains("`sliding_window` = 65 of layer 1 is longer than the context, `max_position_embeddings` = 64"), "{e}");
    for (key, x) in [("sliding_window", json!(64)), ("layer_types", json!(["full_attention", "linear_attention"]))] {
        let mut fits = window.clone();
        fits[key] = x;
        ModelConfig::from_json(fits).unwrap();
    }
    assert!(err(json!({"attention_dropout": 0.1})).contains("attention_dropout"));
    let e = err(json!({"model_type": "llama", "mlp_bias": false}));
    assert!(e.contains("\"llama\" is not supported") && e.contains("qwen3_next, qwen3, qwen3_moe, qwen3_5") && e.contains("tidegate"), "{e}");
    assert!(err(json!({"model_type": 3})).contains("must be a string"));
}

#[test]
fn impossible_recurrences_are_named() {
    let says = |v: Value, words: &[&str]| {
        let e = ModelConfig::from_json(v).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{e}");
    };
    says(
        json!({"linear_num_value_heads": 6, "linear_num_key_heads": 4}),
        &["`linear_num_value_heads` = 6", "a multiple of `linear_num_key_heads` = 4"],
    );
    says(json!({"mamba_num_heads": 6, "mamba_n_groups": 4}), &["`mamba_num_heads` = 6", "a multiple of `mamba_n_groups` = 4"]);
    says(
        json!({"layer_pattern": ["mamba2"], "layer_types": ["mamba2"], "num_hidden_layers": 1}),
        &["`layer_types` and `layer_pattern`", "leave one"],
    );
    says(json!({"layer_pattern": ["mamba2", "delta_net"], "num_hidden_layers": 1}), &["2 entries", "`num_hidden_layers` = 1"]);
    says(json!({"layer_pattern": ["mamba3"]}), &["mamba3"]);
    says(json!({"linear_qk_norm": "l3"}), &["l3"]);
    says(json!({"linear_qk_activation": "gelu"}), &["gelu"]);
    says(json!({"mamba_time_step_limit": [0.5, 0.1]}), &["`mamba_time_step_limit` = [0.5, 0.1]", "rise"]);
    says(json!({"mamba_time_step_limit": [-0.5, 0.1]}), &["`mamba_time_step_limit`"]);
    says(json!({"mamba_time_step_min": 0.2}), &["`mamba_time_step_min` = 0.2", "at most the second"]);
    says(json!({"mamba_time_step_floor": 0.0}), &["`mamba_time_step_floor` = 0", "positive"]);
    says(json!({"linear_allow_neg_eigval": true, "linear_erase": false}), &["erases"]);
    says(json!({"linear_allow_neg_eigval": true, "linear_erase": false, "layer_pattern": ["delta_net", "linear_attention"]}), &["erases"]);
    ModelConfig::from_json(json!({"linear_allow_neg_eigval": true, "linear_erase": false, "layer_pattern": ["delta_net"]})).unwrap();
    // a pattern is repeated, and spelled out in files
    let c = ModelConfig::from_json(json!({"layer_pattern": ["mamba2", "gated_delta_net", "sliding_attention"], "num_hidden_layers": 5})).unwrap();
    use LayerType::{LinearAttention, Mamba2, SlidingAttention};
    let all = [Mamba2, LinearAttention, SlidingAttention, Mamba2, LinearAttention];
    assert_eq!((0..5).map(|i| c.layer_type(i)).collect::<Vec<_>>(), all);
    let back = ModelConfig::from_json(c.to_json().unwrap()).unwrap();
    assert_eq!((back.layer_types, back.layer_pattern), (all.to_vec(), vec![]));
}

#[test]
fn mamba2_reads_as_ours() {
    // Mamba2Config(num_hidden_layers=2).to_json_string(use_diff=False) of transformers 5.23.0, and keys of a published file
    let file = json!({
        "architectures": ["Mamba2ForCausalLM"], "bos_token_id": 0, "chunk_size": 256, "conv_kernel": 4, "dtype": "float32", "eos_token_id": 2, "expand": 2,
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1, "layer_norm_epsilon": 1e-05, "model_type": "mamba2",
        "n_groups": 8, "num_heads": 128, "num_hidden_layers": 2, "pad_token_id": 1, "rescale_prenorm_residual": false, "residual_in_fp32": true,
        "state_size": 128, "tie_word_embeddings": false, "time_step_floor": 0.0001, "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "transformers_version": "5.23.0", "use_bias": false, "use_cache": true,
        "use_conv_bias": true, "vocab_size": 32768, "rms_norm": true, "norm_before_gate": true
    });
    let c = ModelConfig::from_json(file.clone()).unwrap();
    assert_eq!((c.model_type, c.mamba_num_heads, c.mamba_n_groups, c.rms_norm_eps), (ModelType::Mamba2, 128, 8, 1e-5));
    assert_eq!((c.layer_type(1), c.has_feed_forward(0), c.mamba_time_step_limit[1]), (LayerType::Mamba2, false, f64::MAX));
    // what the file doesn't say is what transformers fills in
    assert_eq!(ModelConfig::from_json(json!({"model_type": "mamba2", "num_hidden_layers": 2})).unwrap(), c);
    assert_eq!(ModelConfig::from_json(c.to_json().unwrap()).unwrap(), c);
    // in our own keys
    assert_eq!(ModelConfig::from_json(serde_json::to_value(&c).unwrap()).unwrap(), c);
    let with = |key: &str, x: Value| {
        let mut v = file.clone();
        v[key] = x;
        ModelConfig::from_json(v).unwrap_err().to_string()
    };
    assert!(with("use_bias", json!(true)).contains("`use_bias` = true is not supported"));
    assert!(with("expand", json!(3)).contains("`hidden_size` x `expand` = 12288 must be `num_heads` x `head_dim` = 8192"));
    assert!(with("n_groups", json!(3)).contains("`mamba_n_groups` = 3"));
    assert!(with("hidden_act", json!("relu")).contains("hidden_act"));
    assert!(with("num_experts", json!(4)).contains("nothing that a model of type mamba2 can have"));
    assert!(with("time_step_limit", json!([0.0, "x"])).contains("x"));
}

#[test]
fn only_a_qwen3_next_is_called_one() {
    let c = ModelConfig { num_hidden_layers: 4, ..Default::default() };
    let gate = AttentionGate { granularity: GateGranularity::Headwise, ..Default::default() };
    let mut sliding = vec![LayerType::LinearAttention; 4];
    sliding[2] = LayerType::SlidingAttention;
    for (beyond, says) in [
        (ModelConfig { layer_types: sliding, ..c.clone() }, "sliding attention (layer 2)"),
        (ModelConfig { attention_gate: gate, ..c.clone() }, "attention_gate"),
        (ModelConfig { attention_gate: AttentionGate { shared: true, ..Default::default() }, ..c.clone() }, "attention_gate"),
        (ModelConfig { attention_gate: AttentionGate { input: false, ..Default::default() }, ..c.clone() }, "attention_gate"),
        (ModelConfig { value_gate: gate, ..c.clone() }, "`value_gate`"),
        (ModelConfig { key_gate: AttentionGate::default(), ..c.clone() }, "`key_gate`"),
        (ModelConfig { query_gate: AttentionGate::default(), ..c.clone() }, "`query_gate`"),
        (ModelConfig { dense_gate: AttentionGate::default(), ..c.clone() }, "`dense_gate`"),
        (ModelConfig { switch_heads: SwitchHeads { experts: 2, top_k: 1, keys: false }, ..c.clone() }, "`switch_heads`"),
        (ModelConfig { sdpa_norm: true, ..c.clone() }, "`sdpa_norm`"),
        (ModelConfig { sdpa_silu: true, ..c.clone() }, "`sdpa_silu`"),
        (ModelConfig { sandwich_norm: true, ..c.clone() }, "`sandwich_norm`"),
        (ModelConfig { output_gate_type: OutputGate::Sigmoid, ..c.clone() }, "output_gate_type"),
        (ModelConfig { linear_allow_neg_eigval: true, ..c.clone() }, "linear_allow_neg_eigval"),
        (ModelConfig { linear_decay: false, ..c.clone() }, "without decay or erasure"),
        (ModelConfig { linear_erase: false, ..c.clone() }, "without decay or erasure"),
        (ModelConfig { shared_expert_intermediate_size: 0, ..c.clone() }, "without a shared one"),
        (ModelConfig { zero_centered_norms: false, ..c.clone() }, "zero-centred"),
        (ModelConfig { post_norm: vec![LayerType::FullAttention], ..c.clone() }, "(`post_norm`, layer 3)"),
        (ModelConfig { qk_norm: QkNorm::Projection, ..c.clone() }, "`qk_norm` other than head"),
        (ModelConfig { linear_norm_eps: 1e-5, ..c.clone() }, "a `linear_norm_eps` that"),
        (ModelConfig { layer_types: vec![LayerType::DeltaNet; 4], ..c.clone() }, "delta_net (layer 0)"),
        (ModelConfig { layer_types: vec![LayerType::Mamba2; 4], ..c.clone() }, "mamba2 (layer 0)"),
        (ModelConfig { num_experts: 0, intermediate_size: 0, ..c.clone() }, "without a feed-forward (layer 0)"),
        (ModelConfig { linear_short_conv: false, ..c.clone() }, "`linear_short_conv` = false"),
        (ModelConfig { linear_output_gate: false, ..c.clone() }, "`linear_output_gate` = false"),
        (ModelConfig { linear_output_norm: false, ..c.clone() }, "`linear_output_norm` = false"),
        (ModelConfig { linear_qk_norm: LinearQkNorm::L1, ..c.clone() }, "`linear_qk_norm`"),
        (ModelConfig { linear_qk_activation: LinearActivation::Relu, ..c.clone() }, "`linear_qk_activation`"),
    ] {
        let json = beyond.to_json().unwrap();
        assert_eq!((&json["model_type"], &json["architectures"]), (&json!("tidegate"), &json!(["TidegateForCausalLM"])), "{says}");
        let back = ModelConfig::from_json(json.clone()).unwrap();
        assert_eq!(back, ModelConfig { model_type: ModelType::Tidegate, layer_types: back.layer_types.clone(), ..beyond.clone() });
        let posing = ModelConfig { model_type: ModelType::Qwen3Next, ..beyond };
        let mut file = json;
        file["model_type"] = json!("qwen3_next");
        for e in [posing.to_json().unwrap_err(), posing.validate().unwrap_err(), ModelConfig::from_json(file).unwrap_err()] {
            assert!(e.to_string().contains(says) && e.to_string().contains("tidegate"), "{e}");
        }
    }
    // what no layer has does not matter
    let linear =
        ModelConfig { full_attention_interval: 9, attention_gate: gate, value_gate: gate, sdpa_norm: true, qk_norm: QkNorm::None, ..c.clone() };
    let softmax = ModelConfig { full_attention_interval: 1, output_gate_type: OutputGate::Sigmoid, linear_allow_neg_eigval: true, ..c.clone() };
    let dense = ModelConfig { shared_expert_intermediate_size: 0, num_experts: 0, ..c.clone() };
    let biased = ModelConfig { attention_bias: true, linear_norm_eps: c.rms_norm_eps, post_norm: vec![LayerType::SlidingAttention], ..c.clone() };
    for same in [&c, &linear, &softmax, &dense, &biased] {
        assert_eq!(same.saved_type().unwrap(), ModelType::Qwen3Next);
        assert_eq!(same.to_json().unwrap()["model_type"], json!("qwen3_next"));
    }
    let ours = ModelConfig { model_type: ModelType::Tidegate, ..c };
    assert_eq!(ours.to_json().unwrap()["model_type"], json!("tidegate"));
}

#[test]
fn switch_heads_that_contradict_or_do_nothing_are_refused() {
    let says = |json: Value, words: &[&str]| {
        let e = ModelConfig::from_json(json!({ "switch_heads": json })).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{e}");
    };
    says(json!({"experts": 4}), &["`switch_heads.top_k`", "found 4 and 0"]);
    says(json!({"experts": 4, "top_k": 5}), &["`switch_heads.top_k`", "found 4 and 5"]);
    says(json!({"top_k": 2}), &["found 0 and 2", "both 0 for none"]);
    says(json!({"experts": LARGEST + 1, "top_k": 1}), &["`switch_heads.experts`", "at most"]);
    says(json!({"keys": true}), &["`switch_heads.keys`", "does nothing"]);
    says(json!({"experts": 1, "top_k": 1, "keys": true}), &["qk_norm", "switch_heads.keys"]);
    ModelConfig::from_json(json!({"switch_heads": {"experts": 1, "top_k": 1, "keys": true}, "qk_norm": "none"})).unwrap();
}

#[test]
fn gates_that_contradict_or_do_nothing_are_refused() {
    let err = |v: Value| ModelConfig::from_json(v).unwrap_err().to_string();
    let says = |v: Value, words: &[&str]| {
        let e = err(v);
        assert!(words.iter().all(|w| e.contains(w)), "{e}");
    };
    for key in GatePosition::ALL.map(GatePosition::key) {
        for other in [json!({"op": "add"}), json!({"activation": "silu"}), json!({"shared": true}), json!({"input": false})] {
            let mut gate = other.clone();
            gate["granularity"] = json!("none");
            says(json!({ key: gate }), &[key, "granularity", "do nothing", "\"elementwise\""]);
        }
        says(json!({ key: {"shared": 1} }), &["boolean"]);
        says(json!({ key: {"share": true} }), &["share"]);
        says(json!({ key: {"granularity": "none", "op": "divide"} }), &["divide"]);
    }
    says(json!({"dense_gate": {"granularity": "headwise"}}), &["dense_gate.granularity", "no heads"]);
    says(json!({"dense_gate": {"shared": true}}), &["dense_gate.shared", "no heads"]);
    for key in ["key_gate", "query_gate"] {
        let gate = json!({"granularity": "headwise"});
        says(json!({ key: gate }), &[key, "qk_norm", "elementwise"]);
        ModelConfig::from_json(json!({ key: gate, "qk_norm": "projection" })).unwrap();
        ModelConfig::from_json(json!({ key: {"granularity": "headwise", "op": "add"} })).unwrap();
    }
    says(json!({"sandwich_norm": true, "post_norm": ["full_attention"]}), &["sandwich_norm", "post_norm", "layer 3"]);
    says(json!({"valeu_gate": {}}), &["did you mean `value_gate`"]);
    // what no layer is does not contradict
    ModelConfig::from_json(json!({"sandwich_norm": true, "post_norm": ["sliding_attention"]})).unwrap();
}

#[test]
fn qwen3_reads_as_ours() {
    // the keys of a published dense file, and of one with experts as transformers 5.23.0 writes it
    let dense = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_window_layers": 28, "rope_scaling": null, "rope_theta": 1_000_000,
        "sliding_window": null, "use_sliding_window": false, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "eos_token_id": 151_645
    });
    let moe = json!({
        "model_type": "qwen3_moe", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": null, "num_local_experts": 8,
        "mlp_only_layers": [1], "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_window": null
    });
    let (d, m) = (ModelConfig::from_json(dense.clone()).unwrap(), ModelConfig::from_json(moe).unwrap());
    for c in [&d, &m] {
        assert_eq!((c.model_type, c.attention_gate.granularity, c.zero_centered_norms), (ModelType::Tidegate, GateGranularity::None, false));
        assert!((0..c.num_hidden_layers).all(|i| c.layer_type(i) == LayerType::FullAttention));
        assert_eq!((c.rotary_dim(), c.rope_theta, c.shared_expert_intermediate_size), (c.head_dim, 1e6, 0));
        assert_eq!(c.to_json().unwrap()["model_type"], json!("tidegate"));
    }
    assert_eq!((d.num_experts, d.head_dim, d.tie_word_embeddings), (0, 128, true));
    assert_eq!((m.num_experts, m.num_experts_per_tok, m.moe_intermediate_size, m.norm_topk_prob), (8, 8, 768, false));
    assert_eq!((m.num_key_value_heads, m.head_dim, m.is_sparse(1), m.is_sparse(2)), (4, 16, false, true));
    // the published 0.6B has 596,049,920 parameters
    assert_eq!(d.parameters().0, 596_049_920);
    let with = |key: &str, x: Value| {
        let mut v = dense.clone();
        v[key] = x;
        ModelConfig::from_json(v).unwrap_err().to_string()
    };
    for (key, x) in [("num_experts", json!(4)), ("partial_rotary_factor", json!(0.5)), ("shared_expert_intermediate_size", json!(8))] {
        let e = with(key, x);
        assert!(e.contains(key) && e.contains("qwen3"), "{e}");
    }
    assert!(with("use_sliding_window", json!(true)).contains("use_sliding_window"));
    let e = ModelConfig::from_json(json!({"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 5})).unwrap_err().to_string();
    assert!(e.contains("contradict"), "{e}");
}

#[test]
fn a_model_larger_than_the_machine_is_refused_before_it_is_made() {
    let largest = ModelConfig { num_experts: LARGEST, num_hidden_layers: 2, ..Default::default() };
    let huge = ModelConfig { hidden_size: LARGEST, moe_intermediate_size: LARGEST, ..largest.clone() };
    assert_eq!(huge.parameters().0, usize::MAX);
    assert!(huge.flops_per_token(1 << 20).is_finite());
    for c in [largest, huge] {
        c.validate().unwrap();
        let e = crate::Decoder::new(&c, 0, engine::DType::F32).err().unwrap().to_string();
        assert!(e.contains("GiB") && e.contains("num_experts"), "{e}");
    }
}

#[test]
fn counts_the_published_model() {
    let (total, active) = ModelConfig { tie_word_embeddings: false, ..Default::default() }.parameters();
    assert!((79.0..81.5).contains(&(total as f64 / 1e9)), "{total}");
    assert!((3.0..4.2).contains(&(active as f64 / 1e9)), "{active}");
}

#[test]
fn operations_are_those_counted_by_hand() {
    let c = ModelConfig {
        vocab_size: 10,
        hidden_size: 8,
        num_hidden_layers: 3,
        layer_types: vec![LayerType::LinearAttention, LayerType::FullAttention, LayerType::SlidingAttention],
        sliding_window: 2,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        linear_num_key_heads: 1,
        linear_num_value_heads: 2,
        linear_key_head_dim: 4,
        linear_value_head_dim: 3,
        linear_conv_kernel_dim: 4,
        num_experts: 0,
        intermediate_size: 16,
        ..Default::default()
    };
    // delta rule: qkvz 8·(4+4+6+6), ba 8·4, convolution 14·4, A_log and dt_bias 2+2, norm 3, out 6·8; softmax: q and gate 8·16, k and v 8·8, norms 8, o 8·8
    let (delta, softmax, dense) = (160 + 32 + 56 + 4 + 3 + 48, 128 + 64 + 8 + 64, 3 * 8 * 16);
    let n = 2 * 80 + 8 + delta + 2 * softmax + 3 * (dense + 16);
    assert_eq!(c.parameters(), (n, n));
    // with biases of 16 + 2·4 + 8, and norms of all queries and keys at once
    let more = ModelConfig { attention_bias: true, qk_norm: QkNorm::Projection, ..c.clone() };
    assert_eq!(more.parameters().0, n + 2 * (16 + 8 + 8) + 2 * (8 + 4 - 8));
    assert_eq!(ModelConfig { qk_norm: QkNorm::None, ..c.clone() }.parameters().0, n - 2 * 8);
    // keys seen by the queries of 5 tokens: 1+2+3+4+5, and 1+2+2+2+2 in a window of 2
    let recurrence = 18.0 * (2 * 4 * 3) as f64;
    let want = 6.0 * (n - 80) as f64 + recurrence + 12.0 * 8.0 * (15.0 / 5.0 + 9.0 / 5.0);
    assert!((c.flops_per_token(5) - want).abs() < 1e-9, "{} against {want}", c.flops_per_token(5));
    // Mamba2: in_proj 8·(2·6 + 2·5 + 2), convolution 16·4 and its bias, dt_bias, A_log and D 3·2, norm 6, out 6·8; no feed-forward, one norm a layer
    let mamba = ModelConfig {
        layer_types: vec![],
        layer_pattern: vec![LayerType::Mamba2],
        mamba_num_heads: 2,
        mamba_head_dim: 3,
        mamba_state_size: 5,
        intermediate_size: 0,
        ..c
    };
    let n = 2 * 80 + 8 + 3 * (8 * 24 + 64 + 16 + 6 + 6 + 48 + 8);
    assert_eq!(mamba.parameters(), (n, n));
    let want = 6.0 * (n - 80) as f64 + 3.0 * 12.0 * (2 * 5 * 3) as f64;
    assert!((mamba.flops_per_token(5) - want).abs() < 1e-9, "{} against {want}", mamba.flops_per_token(5));
}
