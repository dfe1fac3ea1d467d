use super::*;

fn read(v: Value) -> Result<ModelConfig> {
    ModelConfig::from_json(v)
}

fn says(v: Value, words: &[&str]) {
    let e = read(v).unwrap_err().to_string();
    assert!(words.iter().all(|w| e.contains(w)), "{e}");
}

#[test]
fn both_words_and_both_spellings_say_the_same() {
    let yarn = RopeScaling { rope_type: RopeType::Yarn, factor: Some(4.0), original_max_position_embeddings: Some(8192), ..Default::default() };
    for rope in [
        json!({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}, "rope_theta": 1e6}),
        json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "beta_fast": null}, "rope_theta": 1e6}),
        json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 1e6}}),
        json!({
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
            "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "rope_theta": 1e6},
        }),
    ] {
        let c = read(rope).unwrap();
        assert_eq!((c.rope_scaling, c.rope_theta), (yarn, 1e6));
        let file = c.to_json().unwrap();
        assert_eq!(file["rope_scaling"], json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}));
        assert_eq!(read(file).unwrap().rope_scaling, yarn);
    }
    for plain in [json!({}), json!({"rope_scaling": null}), json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})] {
        let c = read(plain).unwrap();
        assert_eq!((c.rope_scaling, c.scaled_frequencies()), (RopeScaling::default(), None));
        assert!(c.to_json().unwrap().get("rope_scaling").is_none());
    }
}

/// By hand, on four pairs with frequencies 1, 0.1, 0.01 and 0.001.
#[test]
fn frequencies_of_each_type() {
    let of = |rope: Value| {
        let c = read(json!({"head_dim": 8, "partial_rotary_factor": 1.0, "rope_theta": 1e4, "max_position_embeddings": 1000, "rope_scaling": rope}));
        c.unwrap().scaled_frequencies().unwrap()
    };
    let close = |(found, factor): (Vec<f64>, f64), want: [f64; 4], f: f64| {
        assert!(found.iter().zip(want).all(|(x, y)| (x / y - 1.0).abs() < 1e-12) && (factor - f).abs() < 1e-12, "{found:?} {factor}");
    };
    close(of(json!({"rope_type": "linear", "factor": 4})), [0.25, 0.025, 0.0025, 0.00025], 1.0);
    // wavelengths 6.28, 62.8, 628, 6283: 250 and 1000 are the bounds, and 628 is (1000/628.3 - 1) / 3 between them
    let fast = (1000.0 / (200.0 * PI) - 1.0) / 3.0;
    let llama = json!({"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 4});
    close(of(llama), [1.0, 0.1, 0.01 * fast + 0.005 * (1.0 - fast), 0.0005], 1.0);
    // 32 turns in 1000 tokens are at pair 0.697, one is at 2.2: the ramp is from 0 to 3
    let m = 0.1 * 4f64.ln() + 1.0;
    let yarn = [1.0, 0.1 * (2.0 / 3.0) + 0.025 / 3.0, 0.01 / 3.0 + 0.0025 * (2.0 / 3.0), 0.00025];
    close(of(json!({"rope_type": "yarn", "factor": 4})), yarn, m);
    close(of(json!({"rope_type": "yarn", "factor": 4, "beta_fast": 0, "beta_slow": 0, "mscale": 0.7, "attention_factor": 0.9})), yarn, 0.9);
    close(of(json!({"rope_type": "yarn", "factor": 4, "mscale": 2, "mscale_all_dim": 1})), yarn, (0.2 * 4f64.ln() + 1.0) / m);
    // without a factor, what the two contexts say
    close(of(json!({"rope_type": "yarn", "original_max_position_embeddings": 1000})), [1.0, 0.1, 0.01, 0.001], 1.0);
}

#[test]
fn mistakes_are_named() {
    says(json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}), &["\"dynamic\" is not supported", "length of the whole text", "yarn"]);
    for kind in ["longrope", "proportional", "yaarn"] {
        says(json!({"rope_parameters": {"rope_type": kind}}), &[kind, "is not supported", "\"llama3\""]);
    }
    says(json!({"rope_parameters": {"rope_type": 3}}), &["`rope_type` = 3"]);
    says(json!({"rope_parameters": {"mrope_section": [1]}}), &["rope_parameters.mrope_section"]);
    says(json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), &["rope_parameters.full_attention"]);
    says(json!({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}), &["contradict"]);
    says(json!({"rope_scaling": {"type": "yarn", "rope_type": "linear"}}), &["contradict"]);
    says(json!({"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 4}}), &["contradict"]);
    says(json!({"rope_parameters": 3}), &["object"]);
    says(json!({"rope_scaling": "yarn"}), &["object"]);
    says(json!({"rope_scaling": {"factor": 2}}), &["rope_scaling.factor", "do nothing", "\"default\""]);
    says(json!({"rope_scaling": {"rope_type": "linear", "factor": 2, "beta_fast": 3}}), &["rope_scaling.beta_fast", "do nothing"]);
    for (kind, key) in [("linear", "factor"), ("yarn", "factor"), ("llama3", "factor")] {
        says(json!({"rope_scaling": {"rope_type": kind}}), &[kind, "needs", key]);
    }
    says(json!({"rope_scaling": {"rope_type": "llama3", "factor": 2}}), &["needs", "low_freq_factor"]);
    let yarn = |key: &str, x: Value| {
        let mut rope = json!({"rope_type": "yarn", "factor": 2});
        rope[key] = x;
        json!({ "rope_scaling": rope })
    };
    says(yarn("factor", json!(0.5)), &["`rope_scaling.factor` must be at least 1, found 0.5"]);
    says(yarn("factor", json!("two")), &["two"]);
    says(yarn("attention_factor", json!(0)), &["attention_factor", "positive"]);
    says(yarn("mscale", json!(-1)), &["mscale", "negative"]);
    says(yarn("beta_slow", json!(40)), &["beta_fast", "beta_slow"]);
    says(yarn("original_max_position_embeddings", json!(0)), &["original_max_position_embeddings", "from 1"]);
    says(json!({"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 2}}), &["rope_theta", "above 1"]);
    let llama = json!({"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4});
    says(json!({ "rope_scaling": llama }), &["high_freq_factor", "above"]);
}
