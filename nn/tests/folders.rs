//! What stands in a checkpoint's folder beside the model.

use engine::DType;
use nn::{Decoder, ModelConfig, SaveOptions};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::PathBuf;

const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
const INDEX: &str = "model.safetensors.index.json";

fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        hidden_size: 6,
        num_hidden_layers: 1,
        full_attention_interval: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        num_experts: 3,
        num_experts_per_tok: 2,
        moe_intermediate_size: 4,
        shared_expert_intermediate_size: 5,
        tie_word_embeddings: true,
        ..Default::default()
    }
}

/// A folder of its own that goes when the test does.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let dir = std::env::temp_dir().join(format!("tidegate-nn-{name}-{}", std::process::id()));
        std::fs::remove_dir_all(&dir).ok();
        std::fs::create_dir_all(&dir).unwrap();
        Folder(dir)
    }
    fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.0.join(name)).unwrap()
    }
    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.0.join(name), bytes).unwrap();
    }
    fn json(&self) -> Value {
        serde_json::from_slice(&self.read("config.json")).unwrap()
    }
    fn error(&self) -> String {
        Decoder::open(&self.0).err().unwrap().to_string()
    }
    /// A model in two shards.
    fn sharded(name: &str) -> Folder {
        let dir = Folder::new(name);
        let model = Decoder::new(&tiny(), 3, DType::F32).unwrap();
        let size = Some(model.config().parameters().0 as u64 * 4 * 2 / 3);
        model.save_with(&dir.0, &SaveOptions { max_shard_bytes: size, ..Default::default() }).unwrap();
        assert!(dir.0.join(SHARDS[1]).exists());
        dir
    }
    /// What it says when JSON is changed.
    fn with_json(&self, name: &str, change: &dyn Fn(&mut Value)) -> String {
        let before = self.read(name);
        let mut json = serde_json::from_slice(&before).unwrap();
        change(&mut json);
        self.with(name, json.to_string().as_bytes())
    }
    /// What it says when a file has other bytes.
    fn with(&self, name: &str, bytes: &[u8]) -> String {
        let before = self.read(name);
        self.write(name, bytes);
        let e = self.error();
        self.write(name, &before);
        Decoder::open(&self.0).unwrap();
        e
    }
    /// Puts tensors of the given bytes beside the model's.
    fn add(&self, more: &[(&str, safetensors::Dtype, &[usize], &[u8])]) {
        let file = self.read("model.safetensors");
        let st = SafeTensors::deserialize(&file).unwrap();
        let more = more.iter().map(|(n, d, s, b)| (n.to_string(), safetensors::tensor::TensorView::new(*d, s.to_vec(), b).unwrap()));
        let bytes = safetensors::serialize(st.tensors().into_iter().chain(more), None).unwrap();
        self.write("model.safetensors", &bytes);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

#[test]
fn what_is_no_parameter_goes_with_the_model() {
    let (from, to) = (Folder::new("from"), Folder::new("to"));
    Decoder::new(&tiny(), 3, DType::F32).unwrap().save(&from.0).unwrap();
    let plain = Decoder::open(&from.0).unwrap();
    assert_eq!((plain.aside().unused(), plain.aside().files().count()), (None, 0));
    let carried = ["generation_config.json", "tokenizer.json", "chat_template.jinja"];
    carried.iter().for_each(|name| from.write(name, name.as_bytes()));
    from.write("notes.txt", b"not the model's");
    let mut json = from.json();
    (json["eos_token_id"], json["bos_token_id"]) = (json!([7, 9]), Value::Null);
    from.write("config.json", json.to_string().as_bytes());
    from.add(&[("mtp.fc.weight", safetensors::Dtype::BF16, &[2, 1], &[1, 2, 3, 4]), ("mtp.norm.weight", safetensors::Dtype::U8, &[3], b"abc")]);
    let model = Decoder::open(&from.0).unwrap();
    assert_eq!(model.aside().tensors().collect::<Vec<_>>(), ["mtp.fc.weight", "mtp.norm.weight"]);
    let said = model.aside().unused().unwrap();
    assert!(said.contains("2 tensors") && said.contains("mtp.fc.weight") && said.contains("kept aside"), "{said}");
    // also by a model that loads the folder, and onto the files that it was read from
    let mut other = Decoder::new(&tiny(), 4, DType::F32).unwrap();
    other.load(&from.0).unwrap();
    for (saved, dir) in [(&model, &to), (&other, &to), (&model, &from)] {
        carried.iter().for_each(|name| drop(std::fs::remove_file(to.0.join(name))));
        saved.save(&dir.0).unwrap();
        carried.iter().for_each(|name| assert_eq!(dir.read(name), name.as_bytes()));
        assert!(!to.0.join("notes.txt").exists());
        assert_eq!((&dir.json()["eos_token_id"], dir.json().get("bos_token_id")), (&json!([7, 9]), None));
        let bytes = dir.read("model.safetensors");
        let st = SafeTensors::deserialize(&bytes).unwrap();
        let (fc, norm) = (st.tensor("mtp.fc.weight").unwrap(), st.tensor("mtp.norm.weight").unwrap());
        assert_eq!((fc.dtype(), fc.shape(), fc.data()), (safetensors::Dtype::BF16, &[2, 1][..], &[1, 2, 3, 4][..]));
        assert_eq!((norm.dtype(), norm.data()), (safetensors::Dtype::U8, &b"abc"[..]));
        Decoder::open(&dir.0).unwrap();
    }
    // a load that fails takes nothing over
    from.add(&[("model.layers.9.x", safetensors::Dtype::U8, &[1], b"x")]);
    let mut fresh = Decoder::new(&tiny(), 4, DType::F32).unwrap();
    assert!(fresh.load(&from.0).is_err() && fresh.aside().unused().is_none());
}

#[test]
fn a_tied_projection_may_stand_twice_but_not_differ() {
    let dir = Folder::new("tied");
    Decoder::new(&tiny(), 3, DType::F32).unwrap().save(&dir.0).unwrap();
    let once = dir.read("model.safetensors");
    let embed = SafeTensors::deserialize(&once).unwrap().tensor("model.embed_tokens.weight").unwrap().data().to_vec();
    dir.add(&[("lm_head.weight", safetensors::Dtype::F32, &[11, 6], &embed)]);
    let back = Decoder::open(&dir.0).unwrap();
    assert!(back.config().tie_word_embeddings && back.params().iter().all(|p| p.name != "lm_head.weight"));
    let mut other = embed.clone();
    other[0] ^= 1;
    for (shape, bytes) in [(&[11, 6], &other), (&[6, 11], &embed)] {
        dir.write("model.safetensors", &once);
        dir.add(&[("lm_head.weight", safetensors::Dtype::F32, shape, bytes)]);
        assert!(dir.error().contains("`lm_head.weight` is not `model.embed_tokens.weight`"), "{}", dir.error());
    }
}

#[test]
fn another_architecture_is_named() {
    let dir = Folder::new("type");
    Decoder::new(&tiny(), 3, DType::F32).unwrap().save(&dir.0).unwrap();
    let mut json = dir.json();
    json["model_type"] = json!("mixtral");
    dir.write("config.json", json.to_string().as_bytes());
    assert!(dir.error().contains("\"mixtral\" is not supported") && dir.error().contains("qwen3_next"), "{}", dir.error());
}

/// Both layouts of experts, in one file and beside each other.
#[test]
fn experts_are_read_one_by_one_and_fused() {
    let dir = Folder::new("experts");
    let model = Decoder::new(&tiny(), 3, DType::F32).unwrap();
    model.save(&dir.0).unwrap();
    let file = dir.read("model.safetensors");
    let st = SafeTensors::deserialize(&file).unwrap();
    assert!(st.names().iter().any(|n| n.ends_with("mlp.experts.0.gate_proj.weight")));
    let p = model.params().iter().find(|p| p.name.ends_with("experts.gate_up_proj")).unwrap();
    let fused: Vec<u8> = p.tensor.to_vec::<f32>().unwrap().iter().flat_map(|x| x.to_le_bytes()).collect();
    let rest = st.tensors().into_iter().filter(|(n, _)| !n.contains("experts.") || n.ends_with("down_proj.weight"));
    let whole = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, p.tensor.shape().to_vec(), &fused).unwrap();
    let bytes = safetensors::serialize(rest.chain([(p.name.clone(), whole)]), None).unwrap();
    dir.write("model.safetensors", &bytes);
    for (a, b) in model.params().iter().zip(Decoder::open(&dir.0).unwrap().params()) {
        assert_eq!((&a.name, a.tensor.to_vec::<f32>().unwrap()), (&b.name, b.tensor.to_vec::<f32>().unwrap()));
    }
    // the same weights in both layouts would leave open which ones hold
    dir.write("model.safetensors", &file);
    dir.add(&[(p.name.as_str(), safetensors::Dtype::F32, p.tensor.shape(), &fused)]);
    assert!(dir.error().contains("experts.0.gate_proj.weight` is not of this model"), "{}", dir.error());
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/oracles/golden").join(name)
}

/// A folder with the configuration of a golden one, and those tensors of it for which `name` gives a name.
fn like(test: &str, from: &str, name: impl Fn(&str) -> Option<String>) -> Folder {
    let dir = Folder::new(test);
    dir.write("config.json", &std::fs::read(golden(from).join("config.json")).unwrap());
    let file = std::fs::read(golden(from).join("model.safetensors")).unwrap();
    let st = SafeTensors::deserialize(&file).unwrap();
    let kept = st.tensors().into_iter().filter_map(|(n, v)| Some((name(&n)?, v)));
    dir.write("model.safetensors", &safetensors::serialize(kept, None).unwrap());
    dir
}

#[test]
fn a_model_for_images_is_read_for_its_text() {
    let from = golden("qwen3_5_images_d64");
    let model = Decoder::open(&from).unwrap();
    let said = model.aside().unused().unwrap();
    assert!(said.contains("2 tensors of multi-token prediction (`mtp.fc.weight`, …)") && said.contains("kept aside"), "{said}");
    assert!(said.contains("21 tensors for images (`model.visual.blocks.0.attn.proj.bias`, …) are passed over"), "{said}");
    // a text model's own names are the same, and what is saved has no images; token ids of the text model go along
    let dir = like("images", "qwen3_5_images_d64", |n| Some(n.replace("model.language_model.", "model.")));
    let mut json = dir.json();
    (json["eos_token_id"], json["text_config"]["eos_token_id"], json["text_config"]["pad_token_id"]) = (Value::Null, json!(7), json!(5));
    dir.write("config.json", json.to_string().as_bytes());
    let plain = Decoder::open(&dir.0).unwrap();
    for (a, b) in model.params().iter().zip(plain.params()) {
        assert_eq!((&a.name, a.tensor.to_vec::<f32>().unwrap()), (&b.name, b.tensor.to_vec::<f32>().unwrap()));
    }
    let to = Folder::new("text");
    plain.save(&to.0).unwrap();
    assert_eq!((to.json()["eos_token_id"].clone(), to.json()["pad_token_id"].clone()), (json!(7), json!(5)));
    let back = Decoder::open(&to.0).unwrap();
    assert!(!back.aside().unused().unwrap().contains("images"));
    // both spellings of one tensor
    dir.add(&[("model.language_model.norm.weight", safetensors::Dtype::F32, &[16], &[0; 64])]);
    assert!(dir.error().contains("is in two files, or twice in one"), "{}", dir.error());
}

#[test]
fn what_lacks_or_does_not_fit_is_named_as_the_file_would_have_it() {
    let renamed = |from: &'static str, to: &'static str| move |n: &str| Some(n.replace(from, to));
    for (model, from, to, says) in [
        ("qwen3_5_d32", "layers.0.linear_attn.in_proj_z", "x", "`model.layers.0.linear_attn.in_proj_z.weight` is missing"),
        ("qwen3_5_d32", "layers.0.linear_attn.in_proj_a", "x", "`model.layers.0.linear_attn.in_proj_a.weight` is missing"),
        ("olmo_hybrid_d64", "layers.0.linear_attn.k_conv1d", "x", "`model.layers.0.linear_attn.k_conv1d.weight` is missing"),
        ("olmo_hybrid_d64", "layers.0.linear_attn.g_proj", "x", "`model.layers.0.linear_attn.g_proj.weight` is missing"),
        ("olmo_hybrid_d64", "layers.1.post_feedforward_layernorm", "x", "`model.layers.1.post_feedforward_layernorm.weight` is missing"),
        ("gated_elements_d64", "layers.2.self_attn.q_proj.bias", "x", "`model.layers.2.self_attn.q_proj.bias` is missing"),
    ] {
        let dir = like("lacks", model, renamed(from, to));
        assert!(dir.error().contains(says) && dir.error().contains("`model.x"), "{}", dir.error());
    }
    for (model, key, x, says) in [
        ("qwen3_5_d32", "linear_num_value_heads", json!(3), "in_proj_qkv.weight` has shape [120, 20], the model needs [84, 20]"),
        ("gated_head_d128", "headwise_attn_output_gate", json!(false), "q_proj.weight` has shape [516, 12], the model needs [512, 12]"),
        ("gated_elements_d64", "use_qk_norm", json!(true), "`model.layers.0.self_attn.q_norm.weight` is missing"),
        ("gated_elements_d64", "qkv_bias", json!(false), "q_proj.bias` is not of this model"),
    ] {
        let dir = like("shapes", model, |n| Some(n.to_string()));
        let mut json = dir.json();
        json[key] = x;
        dir.write("config.json", json.to_string().as_bytes());
        assert!(dir.error().contains(says), "{}", dir.error());
    }
}

#[test]
fn an_index_that_lies_is_refused() {
    let dir = Folder::sharded("index");
    let [one, two] = SHARDS;
    let embed = "model.embed_tokens.weight";
    let map = |change: &dyn Fn(&mut serde_json::Map<String, Value>)| dir.with_json(INDEX, &|j| change(j["weight_map"].as_object_mut().unwrap()));
    let says = |e: String, words: &[&str]| assert!(words.iter().all(|w| e.contains(w)), "{words:?} in {e}");
    says(map(&|m| m[embed] = two.into()), &[INDEX, embed, &format!("is in `{two}`"), &format!("it is in `{one}`")]);
    says(map(&|m| m["model.norm.weight"] = one.into()), &[INDEX, "model.norm.weight", "is in `model-00002"]);
    says(map(&|m| drop(m.remove(embed))), &[INDEX, "does not name", embed, one]);
    says(map(&|m| drop(m.insert("x".into(), one.into()))), &[INDEX, "`x` is in", "it is in no shard"]);
    for outside in ["../x", "/etc/passwd", "a/../b", "..", ".", "", "sub/x.safetensors", "x/"] {
        says(map(&|m| m[embed] = outside.into()), &[INDEX, &format!("names the shard `{outside}`"), "beside its index"]);
    }
    says(map(&|m| m[embed] = "model-00003-of-00002.safetensors".into()), &["model-00003-of-00002", "is missing", embed]);
    says(map(&|m| m[embed] = 7.into()), &[INDEX, "no index of shards"]);
    says(map(&|m| m[embed] = "config.json".into()), &["config.json", "no whole safetensors file"]);
    says(dir.with_json(INDEX, &|j| *j = json!([])), &[INDEX, "no index of shards"]);
    let text = String::from_utf8(dir.read(INDEX)).unwrap();
    let twice = text.replacen(&format!("\"{embed}\""), &format!("\"{embed}\": \"{two}\", \"{embed}\""), 1);
    says(dir.with(INDEX, twice.as_bytes()), &[INDEX, embed, "is there twice"]);
    // shards that were exchanged, doubled, emptied, or are something else
    let (a, b) = (dir.read(one), dir.read(two));
    dir.write(two, &a);
    dir.write(one, &b);
    says(dir.error(), &[INDEX, "says that", "it is in"]);
    dir.write(two, &b);
    dir.write(one, &a);
    says(dir.with(two, &a), &[two, "is in two files", one]);
    says(dir.with(two, b""), &[two, "it has 0 bytes"]);
    says(dir.with(two, &b[..b.len() - 1]), &[two, "copy it again"]);
    for name in [two, INDEX, "config.json"] {
        let before = dir.read(name);
        std::fs::remove_file(dir.0.join(name)).unwrap();
        says(dir.error(), &[if name == INDEX { "model.safetensors" } else { name }]);
        std::fs::create_dir(dir.0.join(name)).unwrap();
        says(dir.error(), &[name]);
        std::fs::remove_dir(dir.0.join(name)).unwrap();
        dir.write(name, &before);
    }
    // a folder in the place of the one file does not make the shards hold
    std::fs::create_dir(dir.0.join("model.safetensors")).unwrap();
    says(dir.error(), &["model.safetensors", "is no file"]);
}

#[test]
fn weights_that_are_not_there_are_asked_for() {
    let dir = Folder::new("weightless");
    Decoder::new(&tiny(), 3, DType::F32).unwrap().save(&dir.0).unwrap();
    // for all to read who may read what is beside them
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = |name: &str| std::fs::metadata(dir.0.join(name)).unwrap().permissions().mode();
        assert_eq!(mode("model.safetensors"), mode("config.json"));
    }
    std::fs::remove_file(dir.0.join("model.safetensors")).unwrap();
    let says = |words: &[&str]| assert!(words.iter().all(|w| dir.error().contains(w)), "{words:?} in {}", dir.error());
    says(&["model.safetensors: is missing, and so is model.safetensors.index.json"]);
    dir.write("pytorch_model.bin", b"");
    says(&["model.safetensors: is missing", "pytorch_model.bin is another format", "safe_serialization=True"]);
    std::fs::remove_file(dir.0.join("pytorch_model.bin")).unwrap();
    dir.write("model-00001-of-00002.safetensors", b"");
    says(&["model.safetensors: is missing", "model-00001-of-00002.safetensors is a part of it", "index"]);
}

#[test]
fn a_configuration_that_lies_is_refused() {
    let dir = Folder::new("config");
    let untied = ModelConfig { tie_word_embeddings: false, num_hidden_layers: 2, ..tiny() };
    Decoder::new(&untied, 3, DType::F32).unwrap().save(&dir.0).unwrap();
    let set = |key: &str, x: Value| dir.with_json("config.json", &|j| j[key] = x.clone());
    let says = |e: String, words: &[&str]| assert!(words.iter().all(|w| e.contains(w)), "{words:?} in {e}");
    says(set("hidden_size", 7.into()), &["model.safetensors", "has shape [11, 6], the model needs [11, 7]"]);
    says(set("num_attention_heads", 4.into()), &["self_attn.q_proj.weight", "has shape [16, 6], the model needs [32, 6]"]);
    says(set("num_experts", 4.into()), &["mlp.gate.weight", "[3, 6]", "[4, 6]", "experts.3.gate_proj.weight` is missing"]);
    says(set("num_experts", 2.into()), &["experts.2.down_proj.weight` is not of this model"]);
    let they = "they are not of one model";
    says(set("num_experts", 16_000_000.into()), &["config.json", "describes a model of", "hold", they]);
    says(set("tie_word_embeddings", true.into()), &["`lm_head.weight` is not `model.embed_tokens.weight`"]);
    // what would take memory is refused before it does
    let deep = |n: usize| dir.with_json("config.json", &|j| (j["num_hidden_layers"], j["layer_types"]) = (n.into(), Value::Null));
    says(deep(60_000), &["config.json", "`num_hidden_layers` = 60000", "tensors in all"]);
    says(deep(16_000_000), &["`num_hidden_layers`", "at most 65536"]);
    let huge = |j: &mut Value| (j["hidden_size"], j["vocab_size"]) = (1_000_000.into(), 1_000_000.into());
    says(dir.with_json("config.json", &huge), &["config.json", "describes a model of", they]);
    says(dir.with_json("config.json", &|j| j["mlp_only_layers"] = vec![0; 100_000].into()), &["mlp_only_layers", "100000"]);
    for (key, x) in [
        ("hidden_size", json!(-1)),
        ("hidden_size", json!(6.0)),
        ("hidden_size", json!("6")),
        ("hidden_size", json!(null)),
        ("hidden_size", json!(u64::MAX)),
        ("rms_norm_eps", json!(0)),
        ("layer_types", json!(["full_attention", "no_attention"])),
        ("attention_gate", json!("none")),
    ] {
        let e = set(key, x.clone());
        assert!(e.contains("config.json: ") && e.contains(key), "{key} {x}: {e}");
    }
    let text = String::from_utf8(dir.read("config.json")).unwrap();
    let with = |from: &str, to: &str| dir.with("config.json", text.replacen(from, to, 1).as_bytes());
    says(with("\"rope_theta\": 10000.0", "\"rope_theta\": NaN"), &["config.json", "is no JSON", "line"]);
    says(with("\"rope_theta\": 10000.0", "\"rope_theta\": 1e999"), &["config.json", "is no JSON", "out of range"]);
    says(with("\"hidden_size\": 6", "\"hidden_size\": 6, \"hidden_size\": 6"), &["config.json", "`hidden_size` is there twice"]);
    says(dir.with("config.json", "{\"a\":".repeat(100_000).as_bytes()), &["config.json", "recursion limit"]);
    says(dir.with("config.json", b""), &["config.json", "is no JSON"]);
    says(dir.with("config.json", b"\xff\xfe{}"), &["config.json", "is no JSON"]);
    says(dir.with("config.json", b"[1]"), &["config.json", "must be a JSON object"]);
    says(set("quantization_config", json!({"quant_method": "fp8"})), &["config.json", "`quantization_config`", "are quantized", "bf16"]);
    says(set("no_such_thing", 1.into()), &["unknown key `no_such_thing`", "take it out"]);
    // what other programs leave there
    let json: Value = serde_json::from_slice(&dir.read("config.json")).unwrap();
    for key in ["unsloth_version", "_attn_implementation_autoset", "auto_map", "pretraining_tp", "max_length", "sep_token_id"] {
        let mut json = json.clone();
        json[key] = "x".into();
        dir.write("config.json", json.to_string().as_bytes());
        Decoder::open(&dir.0).unwrap();
    }
    dir.write("config.json", json.to_string().as_bytes());
    // a file of nothing, larger than any of its kind
    std::fs::File::options().write(true).open(dir.0.join("config.json")).unwrap().set_len(3 << 30).unwrap();
    says(dir.error(), &["config.json", "has 3221225472 bytes", "at most"]);
    dir.write("config.json", json.to_string().as_bytes());
    // all tensors in whole numbers
    let bytes = dir.read("model.safetensors");
    let whole = String::from_utf8_lossy(&bytes[8..]).find("F32").unwrap() + 8;
    let mut wrong = bytes.clone();
    wrong[whole..whole + 3].copy_from_slice(b"I32");
    says(dir.with("model.safetensors", &wrong), &["model.safetensors", "is I32; f32, f64, bf16 and f16 can be read"]);
}
