//! The cache on disk: filled, used, and mended. One test, because it sets the process's environment.

use cuda::{Cuda, Kernel, Ptr, cuda_source, params};
use std::{env, fs, process};

cuda_source!(static SOURCE = "emulator.cu", kernels: || vec![kernel()]);
params! { struct Params { a: Ptr, b: Ptr, c: Ptr, n: u32 } }

fn kernel() -> Kernel {
    Kernel::new(&SOURCE, "axpy<float>", 64)
}

#[test]
fn entries_are_used_and_damaged_ones_replaced() {
    let folder = env::temp_dir().join(format!("tidegate-cuda-cache-{}", process::id()));
    // SAFETY: no other thread of this process runs tests or reads the environment yet.
    unsafe { env::set_var("TIDEGATE_CACHE", &folder) };
    let launch = || {
        let d = cuda::emulator_with_memory(1 << 20).unwrap();
        let c = Cuda::of(&d).unwrap();
        let (_hold, p) = c.scratch(1024).unwrap();
        c.fill(p, 0, 1024).unwrap();
        c.launch(&kernel(), [1, 1, 1], 0, &Params { a: p, b: p, c: p, n: 64 })
    };
    let entry = || -> Vec<_> { fs::read_dir(folder.join("kernels")).unwrap().map(|f| f.unwrap().path()).collect() };
    launch().unwrap();
    let [path] = &entry()[..] else { panic!("one entry was expected: {:?}", entry()) };
    let whole = fs::read(path).unwrap();
    // an entry that is there is not written again
    let written = fs::metadata(path).unwrap().modified().unwrap();
    launch().unwrap();
    assert_eq!(fs::metadata(path).unwrap().modified().unwrap(), written);
    // one with a wrong byte is
    let mut bad = whole.clone();
    bad[100] ^= 1;
    fs::write(path, &bad).unwrap();
    launch().unwrap();
    assert_eq!(fs::read(path).unwrap().len(), whole.len());
    assert_ne!(fs::read(path).unwrap(), bad);
    // and one whose hash is right but that can't be loaded
    let code = b"this is no library";
    let mut entry = code.to_vec();
    let hash = fnv(code);
    entry.extend((code.len() as u64).to_le_bytes());
    entry.extend(0u64.to_le_bytes());
    entry.extend(hash.to_le_bytes());
    entry.extend(b"tgkern01");
    fs::write(path, &entry).unwrap();
    launch().unwrap();
    assert_eq!(fs::read(path).unwrap().len(), whole.len());
    fs::remove_dir_all(&folder).unwrap();
}

/// As cache.rs hashes one part.
fn fnv(code: &[u8]) -> u128 {
    let mut h = 0x6c62272e07bb014262b821756295c58du128;
    for b in (code.len() as u64).to_le_bytes().iter().chain(code) {
        h = (h ^ *b as u128).wrapping_mul(0x0000000001000000000000000000013b);
    }
    h
}
