//! Writes what the targets begin with: `corpus/folder` and `corpus/tokenizer` beside this crate.

use std::path::Path;
use tidegate_tests::fuzz::{Random, folders, pack, seed_tokenizer};

fn main() -> std::io::Result<()> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    let all = folders().iter().map(pack).map(|bytes| ("folder", bytes)).collect::<Vec<_>>();
    let tokenizers = (0..200).map(|i| ("tokenizer", seed_tokenizer(&mut Random(i))));
    for (i, (kind, bytes)) in all.into_iter().chain(tokenizers).enumerate() {
        let dir = corpus.join(kind);
        std::fs::create_dir_all(&dir)?;
        std::fs::write(dir.join(format!("seed-{i:03}")), bytes)?;
    }
    Ok(())
}
