//! What stands in a checkpoint's folder beside the model.

use engine::DType;
use nn::{Decoder, ModelConfig};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::PathBuf;

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
