//! Training on a GPU's kernels: on the emulator always, and on the GPU where there is one.

use engine::{DType, Device, Tensor};
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use train::checkpoint::RunDir;
use train::config::RunConfig;
use train::data::{Corpus, Packing};
use train::learner::{Hybrid, Network};
use train::presets;
use train::trainer::{self, Learner, Sampling};

/// One test at a time: while a step is captured, the device is one thread's.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}
/// The devices, and how many steps they have the time for.
fn devices() -> Vec<(Device, u64)> {
    let emulator = cuda::emulator().inspect_err(|e| eprintln!("SKIPPED: nothing is emulated: {e}")).ok().map(|d| (d, 8));
    let gpu = cuda::device(0).inspect_err(|e| eprintln!("SKIPPED: nothing runs on a GPU: {e}")).ok().map(|d| (d, 100));
    emulator.into_iter().chain(gpu).collect()
}
fn on(device: &Device, compute: DType) -> nn::Placement {
    nn::Placement { device: device.clone(), params: DType::F32, compute }
}
/// A hybrid of both mixers and experts, packed documents, two micro-batches a step.
fn setup(steps: u64, observe_every: u64) -> (Corpus, RunConfig) {
    let mut c = presets::smoke();
    let m = &mut c.model;
    (m.hidden_size, m.num_hidden_layers, m.num_experts, m.moe_intermediate_size, m.shared_expert_intermediate_size) = (32, 2, 4, 16, 16);
    m.layer_types = vec![nn::LayerType::LinearAttention, nn::LayerType::FullAttention];
    (c.train.steps, c.train.accumulate, c.train.observe_every) = (Some(steps), 2, observe_every);
    (c.data.seq_len, c.data.batch, c.data.packing) = (24, 2, Packing::Documents);
    (c.eval.every, c.sample.count, c.sample.tokens, c.checkpoint.every, c.checkpoint.keep) = (0, 0, 4, 0, 9);
    let lines = ["It was the whiteness of the whale ", "that above all things ", "appalled me. ", "But how can I hope to explain myself here; "];
    (Corpus::from_documents(&lines.repeat(12)), c)
}
/// The losses of a run, the parameters after it, and the held-out bits.
fn run(place: &nn::Placement, steps: u64, replays: bool, observe_every: u64) -> (Vec<f64>, Vec<u32>, f64) {
    run_of(3, place, steps, replays, observe_every)
}
fn run_of(seed: u64, place: &nn::Placement, steps: u64, replays: bool, observe_every: u64) -> (Vec<f64>, Vec<u32>, f64) {
    let (corpus, config) = setup(steps, observe_every);
    run_with(&config, &corpus, seed, place, replays)
}
fn run_with(config: &RunConfig, corpus: &Corpus, seed: u64, place: &nn::Placement, replays: bool) -> (Vec<f64>, Vec<u32>, f64) {
    let tmp = tempfile::tempdir().unwrap();
    let mut model = Hybrid::create(&config.model, seed, place).unwrap().replays(replays);
    let dir = RunDir::open(tmp.path(), false).unwrap();
    let done = trainer::train(&mut model, corpus, config, &dir, None).unwrap();
    assert_eq!(model.is_replaying(), replays && place.device != Device::cpu());
    let bits = model.net().params().iter().flat_map(|p| p.1.to_vec::<f32>().unwrap()).map(f32::to_bits).collect();
    (losses(tmp.path()), bits, done.held_out.unwrap())
}
fn losses(dir: &Path) -> Vec<f64> {
    let lines = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    lines.lines().filter_map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap()["loss"].as_f64()).collect()
}

#[test]
fn a_run_follows_that_of_the_cpu_and_replayed_steps_have_the_bits_of_others() {
    let _alone = alone();
    for (device, steps) in devices() {
        let f32 = on(&device, DType::F32);
        let cpu = run(&on(&Device::cpu(), DType::F32), steps, true, 4);
        let replayed = run(&f32, steps, true, 4);
        assert_eq!(replayed.0.len() as u64, steps);
        for (step, (a, b)) in replayed.0.iter().zip(&cpu.0).enumerate() {
            assert!((a - b).abs() < 2e-4 * b, "{}: step {}: loss {a}, on the CPU {b}", device.name(), step + 1);
        }
        assert!((replayed.2 - cpu.2).abs() < 1e-3 * cpu.2, "held out {} and {}", replayed.2, cpu.2);
        let eager = run(&f32, steps, false, 4);
        assert!(replayed == eager, "{}: a replayed run differs from one whose kernels are launched one by one", device.name());
        assert!(run(&f32, steps, true, 4) == replayed, "{}: two runs differ", device.name());
        assert!(run(&f32, steps, true, 1) == replayed, "{}: looking at each step changes it", device.name());
    }
}

/// In a run this long two roundings part as two seeds do, but less: bf16's distance from f32, averaged over the steps, is at most half of that between
/// f32 runs of different seeds. While both still see nearly the same parameters, the losses are compared themselves.
#[test]
fn bf16_follows_f32() {
    let _alone = alone();
    for (device, steps) in devices() {
        let losses = |seed: u64, compute: DType| run_of(seed, &on(&device, compute), steps, true, 4).0;
        let (wide, narrow) = (losses(3, DType::F32), losses(3, DType::BF16));
        for (step, (a, b)) in narrow.iter().zip(&wide).enumerate().take(20) {
            assert!((a - b).abs() < 0.02 * b, "{}: step {}: loss {a} in bf16, {b} in f32", device.name(), step + 1);
        }
        let apart = |a: &[f64]| a.iter().zip(&wide).map(|(a, b)| (a - b).abs()).sum::<f64>() / wide.len() as f64;
        let seeds = apart(&losses(4, DType::F32)).min(apart(&losses(5, DType::F32)));
        println!("{}: bf16 is {:.1e} nats from f32, seeds are {seeds:.1e} apart", device.name(), apart(&narrow));
        assert!(apart(&narrow) < 0.5 * seeds, "{}: bf16 is {} nats from f32, seeds are {seeds} apart", device.name(), apart(&narrow));
    }
}

#[test]
fn a_run_resumed_on_a_device_is_the_uninterrupted_one() {
    let _alone = alone();
    for (device, steps) in devices() {
        let tmp = tempfile::tempdir().unwrap();
        let (corpus, mut config) = setup(steps, 4);
        config.checkpoint.every = steps / 2;
        let place = on(&device, DType::BF16);
        let dir = |name: &str| RunDir::open(&tmp.path().join(name), false).unwrap();
        let mut whole = Hybrid::create(&config.model, 3, &place).unwrap();
        let a = trainer::train(&mut whole, &corpus, &config, &dir("whole"), None).unwrap();
        let from = tmp.path().join(format!("whole/checkpoints/step-{:08}", steps / 2));
        // another seed: everything comes from the checkpoint
        let mut again = Hybrid::create(&config.model, 4, &place).unwrap();
        let state = trainer::load(&mut again, &from).unwrap();
        let b = trainer::train(&mut again, &corpus, &config, &dir("again"), Some(state)).unwrap();
        assert_eq!(a.held_out.unwrap().to_bits(), b.held_out.unwrap().to_bits());
        // what a GPU wrote, the CPU reads
        let mut here = Hybrid::open(&from, &on(&Device::cpu(), DType::F32)).unwrap();
        let how = Sampling { tokens: 4, temperature: 0.0, top_k: 0, top_p: 1.0, seed: 0 };
        assert_eq!(here.sample(&[65, 66], &how).unwrap().len(), 4);
        assert_eq!(again.sample(&[65, 66], &how).unwrap().len(), 4);
    }
}

#[test]
fn what_is_not_finite_on_a_device_is_named_and_nothing_is_changed() {
    let _alone = alone();
    for (device, _) in devices() {
        let (corpus, config) = setup(3, 1);
        let model = Hybrid::create(&config.model, 3, &on(&device, DType::F32)).unwrap();
        let name = "model.layers.1.self_attn.o_proj.weight";
        let params = model.net().model().params();
        let p = &params.iter().find(|p| p.name == name).unwrap().tensor;
        p.assign(&Tensor::full(3e38, p.shape(), DType::F32, &device).unwrap()).unwrap();
        let before = params[0].tensor.to_vec::<f32>().unwrap();
        let tmp = tempfile::tempdir().unwrap();
        let mut model = model;
        let e = trainer::train(&mut model, &corpus, &config, &RunDir::open(tmp.path(), false).unwrap(), None).unwrap_err().to_string();
        assert!(e.contains("`matmul` in `blocks.1.attn`"), "{e}");
        assert_eq!(model.net().model().params()[0].tensor.to_vec::<f32>().unwrap(), before);
    }
}

#[test]
fn composed_gates_are_replayed_and_follow_the_cpu() {
    let _alone = alone();
    for (device, _) in devices() {
        let (corpus, mut config) = setup(4, 2);
        let (m, gate) = (&mut config.model, nn::AttentionGate::default());
        m.attention_gate.shared = true;
        (m.value_gate, m.key_gate, m.query_gate) = (gate, gate, nn::AttentionGate { input: false, ..gate });
        (m.dense_gate, m.sdpa_norm, m.sandwich_norm) = (nn::AttentionGate { op: nn::GateOp::Add, ..gate }, true, true);
        let run = |place: &nn::Placement, replays: bool| run_with(&config, &corpus, 3, place, replays);
        for compute in [DType::F32, DType::BF16] {
            let (cpu, replayed) = (run(&on(&Device::cpu(), compute), true), run(&on(&device, compute), true));
            for (a, b) in replayed.0.iter().zip(&cpu.0) {
                let bound = if compute == DType::F32 { 2e-4 } else { 0.02 };
                assert!((a - b).abs() < bound * b, "{} {compute}: loss {a}, on the CPU {b}", device.name());
            }
            assert!(run(&on(&device, compute), false) == replayed, "{} {compute}: replayed steps differ from others", device.name());
        }
    }
}
