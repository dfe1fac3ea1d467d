//! Compiled kernels on disk, by content: the key is a hash of all that the code depends on, so an entry is never stale.
//!
//! An entry is the code itself with a footer (log, lengths, hash, magic), written to a temporary file and renamed. What is damaged counts as absent.

use crate::compile::Binary;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::{env, fs, io, process};

const MAGIC: &[u8; 8] = b"tgkern01";

/// FNV-1a with 128 bits: for contents that nobody forges.
pub(crate) fn hash(parts: &[&[u8]]) -> u128 {
    let mut h = 0x6c62272e07bb014262b821756295c58du128;
    let mut eat = |b: &[u8]| b.iter().for_each(|b| h = (h ^ *b as u128).wrapping_mul(0x0000000001000000000000000000013b));
    for p in parts {
        eat(&(p.len() as u64).to_le_bytes());
        eat(p);
    }
    h
}

/// The folder: `TIDEGATE_CACHE`, else `tidegate` in the user's cache folder; `TIDEGATE_CACHE=off` is none.
pub fn folder() -> Option<PathBuf> {
    match env::var_os("TIDEGATE_CACHE") {
        Some(v) if v == "off" => None,
        Some(v) if !v.is_empty() => Some(PathBuf::from(v).join("kernels")),
        _ => {
            let base = env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
            Some(base.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?.join("tidegate").join("kernels"))
        }
    }
}

/// Where an entry lies, if there is a folder.
pub(crate) fn path(key: u128, extension: &str) -> Option<PathBuf> {
    Some(folder()?.join(format!("{key:032x}.{extension}")))
}

/// The entry, if it is there and whole.
pub(crate) fn read(path: &Path) -> Option<Binary> {
    let all = fs::read(path).ok()?;
    let foot = all.len().checked_sub(40)?;
    let number = |at: usize| Some(u64::from_le_bytes(all[at..at + 8].try_into().ok()?) as usize);
    let (code, log) = (number(foot)?, number(foot + 8)?);
    if &all[foot + 32..] != MAGIC || code.checked_add(log)? != foot || all[foot + 16..foot + 32] != hash(&[&all[..foot]]).to_le_bytes() {
        return None;
    }
    let log = String::from_utf8(all[code..foot].to_vec()).ok()?;
    Some(Binary { code: all[..code].to_vec(), log })
}

/// Writes an entry; two processes may do so at once.
pub(crate) fn write(path: &Path, b: &Binary) -> io::Result<()> {
    static N: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
    let mut all = b.code.clone();
    all.extend(b.log.as_bytes());
    let h = hash(&[&all]);
    all.extend((b.code.len() as u64).to_le_bytes());
    all.extend((b.log.len() as u64).to_le_bytes());
    all.extend(h.to_le_bytes());
    all.extend(MAGIC);
    let temp = path.with_extension(format!("{}-{}.tmp", process::id(), N.fetch_add(1, Ordering::Relaxed)));
    fs::write(&temp, all)?;
    fs::rename(&temp, path).inspect_err(|_| drop(fs::remove_file(&temp)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_entries_count_as_absent() {
        let folder = env::temp_dir().join(format!("tidegate-cache-test-{}", process::id()));
        let path = folder.join("entry.cubin");
        let b = Binary { code: vec![1, 2, 3, 4, 5], log: "ptxas".into() };
        write(&path, &b).unwrap();
        let back = read(&path).unwrap();
        assert_eq!((back.code, back.log), (b.code, b.log));
        let whole = fs::read(&path).unwrap();
        for at in [0, 6, whole.len() - 1] {
            let mut bad = whole.clone();
            bad[at] ^= 1;
            fs::write(&path, bad).unwrap();
            assert!(read(&path).is_none(), "byte {at}");
        }
        fs::write(&path, &whole[..whole.len() - 3]).unwrap();
        assert!(read(&path).is_none());
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        fs::remove_dir_all(folder).unwrap();
    }
}
