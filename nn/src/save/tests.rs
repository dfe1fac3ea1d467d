use super::*;
use crate::ModelConfig;

fn model(seed: u64, experts: usize) -> Decoder {
    let config = ModelConfig {
        vocab_size: 11,
        hidden_size: 6,
        intermediate_size: 8,
        num_hidden_layers: 2,
        full_attention_interval: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        num_experts: experts,
        num_experts_per_tok: 2,
        moe_intermediate_size: 4,
        shared_expert_intermediate_size: 5,
        ..Default::default()
    };
    Decoder::new(&config, seed, DType::F32).unwrap()
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let dir = std::env::temp_dir().join(format!("tidegate-save-{name}-{}", std::process::id()));
        fs::remove_dir_all(&dir).ok();
        fs::create_dir_all(&dir).unwrap();
        Folder(dir)
    }
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&self.0).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).ok();
    }
}

fn numbers(m: &Decoder) -> Vec<(String, Vec<f32>)> {
    m.params().iter().map(|p| (p.name.clone(), p.tensor.to_vec().unwrap())).collect()
}

const SMALL: Option<u64> = Some(2500);

/// Every moment of saving a model over another: between two steps, and while files are written.
#[test]
fn what_is_killed_leaves_the_old_model_the_new_one_or_none() {
    // of other shapes, with other shards, or the same form
    for (old_size, new_size, old_experts) in [(None, SMALL, 3), (SMALL, None, 3), (SMALL, Some(4000), 0), (None, None, 0)] {
        let (old, new) = (model(1, old_experts), model(2, 3));
        let how = |max_shard_bytes| SaveOptions { max_shard_bytes, ..Default::default() };
        let clean = Folder::new("clean");
        new.save_with(&clean.0, &how(new_size)).unwrap();
        fs::write(clean.0.join("notes.txt"), "mine").unwrap();
        let (mut killed, mut seen) = (0, [0; 3]);
        loop {
            let dir = Folder::new("killed");
            old.save_with(&dir.0, &how(old_size)).unwrap();
            fs::write(dir.0.join("notes.txt"), "mine").unwrap();
            let steps = new.stage(&dir.0, &how(new_size)).unwrap();
            assert!(steps.len() > 5);
            if killed == 0 {
                // also in the middle of a file
                let half = fs::read_dir(&dir.0).unwrap().map(|e| e.unwrap()).find(|e| e.file_name().to_str().unwrap().ends_with(".safetensors"));
                let half = half.filter(|e| e.file_name().to_str().unwrap().starts_with(SAVING));
                half.iter().for_each(|e| fs::write(e.path(), b"half").unwrap());
            }
            steps[..killed.min(steps.len())].iter().for_each(|s| s.take(&dir.0).unwrap());
            match Decoder::open(&dir.0) {
                Ok(m) if numbers(&m) == numbers(&old) => seen[0] += 1,
                Ok(m) if numbers(&m) == numbers(&new) => seen[1] += 1,
                Ok(_) => panic!("a model that nobody saved after {killed} of {steps:?}"),
                Err(e) => {
                    assert!(e.to_string().contains("save into this folder was cut off"), "{e}");
                    assert!(!dir.0.join(CONFIG).exists(), "others would open it");
                    seen[2] += 1;
                }
            }
            // and the next save makes it whole
            new.save_with(&dir.0, &how(new_size)).unwrap();
            assert_eq!(numbers(&Decoder::open(&dir.0).unwrap()), numbers(&new));
            assert_eq!(dir.names(), clean.names());
            killed += 1;
            if killed > steps.len() {
                break;
            }
        }
        assert!(seen.iter().all(|n| *n >= 1), "{seen:?}");
    }
}

#[test]
fn what_fails_leaves_what_was_there() {
    let dir = Folder::new("fails");
    let old = model(1, 3);
    old.save(&dir.0).unwrap();
    let before = dir.names();
    let new = model(2, 3);
    new.params()[0].tensor.assign(&engine::Tensor::full(1e5, new.params()[0].tensor.shape(), DType::F32, &engine::Device::cpu()).unwrap()).unwrap();
    let save = |dtype| new.save_with(&dir.0, &SaveOptions { dtype: Some(dtype), ..Default::default() });
    let e = save(DType::F16).unwrap_err().to_string();
    assert!(e.contains("`model.embed_tokens.weight` holds 1e5") && e.contains("too large for f16"), "{e}");
    let e = save(DType::F64).unwrap_err().to_string();
    assert!(e.contains("f32, bf16 or f16"), "{e}");
    let other = Folder::new("other");
    old.save_with(&other.0, &SaveOptions { max_shard_bytes: SMALL, ..Default::default() }).unwrap();
    let first = &other.names().into_iter().find(|n| n.starts_with("model-00001-of-")).unwrap();
    fs::create_dir(dir.0.join(first)).unwrap();
    let e = new.save_with(&dir.0, &SaveOptions { max_shard_bytes: SMALL, ..Default::default() }).unwrap_err().to_string();
    assert!(e.contains(first) && e.contains("is no file"), "{e}");
    fs::remove_dir(dir.0.join(first)).unwrap();
    assert_eq!((dir.names(), numbers(&Decoder::open(&dir.0).unwrap())), (before, numbers(&old)));
    save(DType::BF16).unwrap();
}

#[test]
fn shards_as_large_as_allowed() {
    let m = model(1, 3);
    let entries = || {
        let made = m.params().iter().flat_map(|p| parts(&p.name, &p.tensor.detach()).unwrap());
        made.map(|(name, t)| (name, Entry::made(t, None))).collect::<Vec<_>>()
    };
    let size = |s: &[(String, Entry)]| s.iter().map(|(_, e)| e.bytes()).sum::<u64>();
    let total = size(&entries());
    assert_eq!((split(entries(), total).len(), split(entries(), total - 1).len(), split(entries(), 0).len()), (1, 2, entries().len()));
    for most in [100, 150, 264, 700, 1500] {
        let shards = split(entries(), most);
        assert!(shards.iter().all(|s| size(s) <= most || s.len() == 1), "{most}");
        // none could take the first of the next
        assert!(shards.windows(2).all(|w| size(&w[0]) + w[1][0].1.bytes() > most), "{most}");
        assert!(shards.iter().flatten().map(|(name, _)| name.clone()).eq(entries().into_iter().map(|(name, _)| name)));
    }
    assert_eq!(names(12)[10], "model-00011-of-00012.safetensors");
    assert!(names(12).iter().chain(&names(123_456)).all(|n| is_shard(n)) && !is_shard(MODEL) && !is_shard("model-1-of-2.safetensors"));
}
