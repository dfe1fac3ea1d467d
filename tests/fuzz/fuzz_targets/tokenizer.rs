//! A `tokenizer.json`.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use tidegate_tests::fuzz::{Random, mutate_tokenizer, tokenizer};

fuzz_target!(|bytes: &[u8]| {
    tokenizer(bytes);
});

// half of the mutations know the format
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut r = Random(seed.into());
    if r.once_in(2) {
        return fuzzer_mutate(data, size, max_size);
    }
    let bytes = mutate_tokenizer(&mut r, data[..size].to_vec());
    let n = bytes.len().min(max_size);
    data[..n].copy_from_slice(&bytes[..n]);
    n
});
