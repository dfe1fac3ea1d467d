//! One AdamW step of the peers' 10.06 M-parameter Qwen3-Next: f32, batch 4 × 512. Its own process, so that its peak memory is a step's.

use criterion::{Criterion, criterion_group, criterion_main};
use tidegate_benches::{peak_memory, qwen3_next_10m};
use train::data::Batch;
use train::learner::Hybrid;
use train::presets;
use train::trainer::{Learner, Step};

fn step(c: &mut Criterion) {
    let mut model = Hybrid::create(&qwen3_next_10m(), 0, &nn::Placement::cpu(engine::DType::F32)).unwrap();
    let tokens: Vec<u32> = engine::rng::uniform(0, 0, 4 * 513).iter().map(|x| (x * 4096.0) as u32).collect();
    let rows = || tokens.chunks_exact(513);
    let batch = Batch {
        tokens: rows().flat_map(|r| &r[..512]).copied().collect(),
        targets: rows().flat_map(|r| &r[1..]).map(|t| i64::from(*t)).collect(),
        rows: 4,
        time: 512,
        cu_seqlens: None,
    };
    let optim = presets::quickstart().optim;
    let mut n = 0;
    let mut step = || {
        n += 1;
        model.step(&Step { step: n, micro: 1, lr: 1e-3, optim: &optim }, &|_| Ok(batch.clone()), None).unwrap()
    };
    let mut group = c.benchmark_group("train_step");
    group.sample_size(10).bench_function("qwen3_next 10.06 M, 4 x 512", |b| b.iter(&mut step));
    group.finish();
    engine::profile::start();
    for _ in 0..5 {
        step();
    }
    println!("five steps:\n{}", engine::profile::stop());
    println!("parameters {}  peak memory {:.3} GB", model.parameters(), peak_memory() as f64 / 1e9);
}

criterion_group!(benches, step);
criterion_main!(benches);
