//! Memory over long texts, counted by the engine: in a process of its own, one test at a time.

use engine::cpu::{memory, reset_peak};
use engine::{DType, Tensor, no_grad};
use nn::{Decoder, Generator, LayerType, ModelConfig};
use std::sync::{Mutex, MutexGuard};

static ALONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(|e| e.into_inner())
}

fn small(layers: &[LayerType]) -> ModelConfig {
    ModelConfig {
        vocab_size: 256,
        hidden_size: 32,
        num_hidden_layers: layers.len(),
        layer_types: layers.to_vec(),
        sliding_window: 64,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 16,
        linear_num_key_heads: 2,
        linear_num_value_heads: 2,
        linear_key_head_dim: 16,
        linear_value_head_dim: 16,
        num_experts: 0,
        intermediate_size: 64,
        ..Default::default()
    }
}

const HYBRID: [LayerType; 3] = [LayerType::LinearAttention, LayerType::SlidingAttention, LayerType::FullAttention];

fn tokens(t: usize) -> Tensor {
    Tensor::from_vec((0..t).map(|i| (i * i % 251) as u32).collect::<Vec<_>>(), &[1, t]).unwrap()
}

/// The most bytes that a pass takes beyond what was there.
fn peak(f: impl FnOnce()) -> f64 {
    let before = memory().0;
    reset_peak();
    f();
    (memory().2 - before) as f64
}

/// Four times as long takes four times as much, not sixteen times: no T × T is left in any mixer, nor a T × V beyond the rows that a block of logits has.
#[test]
fn training_and_scoring_take_memory_in_proportion_to_the_text() {
    let _alone = alone();
    let m = Decoder::new(&small(&HYBRID), 3, DType::F32).unwrap();
    let train = |t: usize| {
        let targets = Tensor::from_vec((0..t).map(|i| (i % 251) as i64).collect::<Vec<_>>(), &[t]).unwrap();
        peak(|| drop(m.loss(&tokens(t), &targets, None, None).unwrap().objective.backward().unwrap()))
    };
    let score = |t: usize| {
        let targets = Tensor::from_vec((0..t).map(|i| (i % 251) as i64).collect::<Vec<_>>(), &[t]).unwrap();
        peak(|| drop(m.token_losses(&tokens(t), &targets, None, None).unwrap()))
    };
    for (what, of) in [("training", &train as &dyn Fn(usize) -> f64), ("scoring", &score)] {
        let (short, long) = (of(2048), of(8192));
        println!("{what}: {:.1} MiB at 2048 tokens, {:.1} at 8192", short / (1 << 20) as f64, long / (1 << 20) as f64);
        assert!(long < 4.1 * short, "{what}: {short} bytes at 2048 tokens, {long} at 8192");
    }
}

/// What a generation holds, beyond the model.
fn held(layers: &[LayerType], read: &[usize]) -> Vec<usize> {
    let m = Decoder::new(&small(layers), 3, DType::F32).unwrap();
    let before = memory().0;
    let mut g = Generator::new(&m);
    let piece: Vec<u32> = (0..256).map(|i| i % 251).collect();
    let mut so_far = 0;
    let mut live = vec![];
    for n in read {
        while so_far < *n {
            g.feed(&piece).unwrap();
            so_far += piece.len();
        }
        // token by token, past where room ends
        (0..300).for_each(|i| drop(g.feed(&[i % 251]).unwrap()));
        live.push(memory().0 - before);
    }
    live
}

#[test]
fn delta_rules_and_windows_hold_as_much_after_any_text() {
    let _alone = alone();
    no_grad(|| {
        let delta = held(&[LayerType::LinearAttention; 2], &[256, 16384]);
        assert_eq!(delta[0], delta[1]);
        // 64 tokens of 2 · 16 numbers in each layer, and room for as many as come at once
        let window = held(&[LayerType::SlidingAttention; 2], &[512, 16384]);
        assert!(window[1] <= window[0] && window[1] <= 2 * 2 * 16 * 4 * 1024, "{window:?}");
        let full = held(&[LayerType::FullAttention; 2], &[512, 16384]);
        assert!(full[1] >= 2 * 2 * 16 * 4 * 16384, "{full:?}");
    });
}
