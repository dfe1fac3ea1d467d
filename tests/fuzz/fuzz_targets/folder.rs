//! A checkpoint's folder, packed.
#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use tidegate_tests::fuzz::{Place, Random, folder, mutate_files, pack, unpack};

thread_local! {
    static PLACE: Place = Place::new();
}

fuzz_target!(|bytes: &[u8]| {
    PLACE.with(|place| folder(place, &unpack(bytes)));
});

// half of the mutations know the formats
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut r = Random(seed.into());
    let mut files = unpack(&data[..size]);
    if files.is_empty() || r.once_in(2) {
        return fuzzer_mutate(data, size, max_size);
    }
    mutate_files(&mut r, &mut files);
    let bytes = pack(&files);
    let n = bytes.len().min(max_size);
    data[..n].copy_from_slice(&bytes[..n]);
    n
});
