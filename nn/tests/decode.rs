//! Decoding: prompts in pieces, sequences of different lengths side by side, what is refused.

use engine::{DType, Tensor};
use nn::{AttentionGate, CHUNK, Caches, Decoder, GateGranularity, Generator, LayerType, ModelConfig, Sampler};

/// All mixers; the window is shorter than the texts.
fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: 11,
        hidden_size: 6,
        num_hidden_layers: 3,
        layer_types: vec![LayerType::LinearAttention, LayerType::FullAttention, LayerType::SlidingAttention],
        sliding_window: 5,
        attention_gate: AttentionGate { granularity: GateGranularity::Headwise, ..Default::default() },
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        partial_rotary_factor: 0.5,
        linear_num_key_heads: 1,
        linear_num_value_heads: 2,
        linear_key_head_dim: 4,
        linear_value_head_dim: 3,
        num_experts: 3,
        num_experts_per_tok: 2,
        moe_intermediate_size: 5,
        shared_expert_intermediate_size: 4,
        initializer_range: 0.3,
        ..Default::default()
    }
}

fn ids(n: usize, stream: u64) -> Vec<u32> {
    engine::rng::uniform(5, stream, n).iter().map(|x| (x * 11.0) as u32).collect()
}

fn close(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    for (x, y) in a.iter().zip(b) {
        assert!((x - y).abs() <= 1e-9, "{x} {y}");
    }
}

/// Sequences read side by side, and left one after the other, go on as each does alone, in rooms that grow on the way.
#[test]
fn sequences_of_different_lengths_do_not_see_each_other() {
    let m = Decoder::new(&tiny(), 3, DType::F64).unwrap();
    let prompts = [ids(1, 0), ids(300, 1), ids(70, 2), ids(255, 3)];
    let mut alone: Vec<Generator> = prompts.iter().map(|_| Generator::new(&m)).collect();
    let first: Vec<Vec<f64>> = prompts.iter().zip(&mut alone).map(|(p, g)| g.feed(p).unwrap()).collect();
    let parts = prompts.iter().zip(&first).map(|(p, want)| {
        let mut g = Generator::new(&m);
        close(&g.feed(p).unwrap(), want);
        g.into_caches()
    });
    let mut batch = Generator::on(&m, Caches::join(parts.collect()).unwrap());
    let mut rows = vec![0, 1, 2, 3];
    for i in 0..9u32 {
        if i == 3 {
            batch.caches().keep(&[3, 1, 0]).unwrap();
            rows = vec![3, 1, 0];
        }
        if i == 6 {
            batch.caches().keep(&[1]).unwrap();
            rows = vec![1];
        }
        let next: Vec<u32> = rows.iter().map(|r| (i + 3 * *r as u32) % 11).collect();
        let logits = batch.step(&next).unwrap();
        for ((r, t), l) in rows.iter().zip(next).zip(logits) {
            close(&l, &alone[*r].feed(&[t]).unwrap());
        }
    }
    assert_eq!(batch.caches().lens(), [309]);
}

#[test]
fn a_prompt_in_pieces_is_the_prompt() {
    let m = Decoder::new(&tiny(), 3, DType::F64).unwrap();
    let prompt = ids(CHUNK + 70, 4);
    let x = Tensor::from_vec(prompt.clone(), &[1, prompt.len()]).unwrap();
    let whole = engine::no_grad(|| m.forward(&x, None, None, None)).unwrap().0;
    let last = whole.narrow(1, prompt.len() - 1, 1).unwrap().reshape(&[1, 6]).unwrap();
    let want = m.logits(&last.detach()).unwrap().to_vec::<f64>().unwrap();
    close(&Generator::new(&m).feed(&prompt).unwrap(), &want);
    let mut g = Generator::new(&m);
    g.feed(&prompt[..CHUNK - 5]).unwrap();
    close(&g.feed(&prompt[CHUNK - 5..]).unwrap(), &want);
}

#[test]
fn caches_are_of_one_model_and_so_many_sequences() {
    let m = Decoder::new(&tiny(), 3, DType::F64).unwrap();
    let says = |e: nn::Error, words: &str| assert!(e.to_string().contains(words), "{e}");
    let read = |p: &[u32]| {
        let mut g = Generator::new(&m);
        g.feed(p).unwrap();
        g.into_caches()
    };
    says(Caches::join(vec![]).err().unwrap(), "no caches");
    says(Caches::join(vec![read(&[1]), Caches::new(3)]).err().unwrap(), "once they hold tokens");
    says(Caches::join(vec![read(&[1]), Caches::new(4)]).err().unwrap(), "of one model");
    let mut two = Caches::join(vec![read(&[1, 2]), read(&[3])]).unwrap();
    says(two.keep(&[2]).unwrap_err(), "of 2 sequences");
    says(two.keep(&[1, 1]).unwrap_err(), "of 2 sequences");
    let mut g = Generator::on(&m, two);
    says(g.step(&[1, 2, 3]).unwrap_err(), "are of 2 sequences, found tokens of 3");
    g.step(&[1, 2]).unwrap();
    let x = Tensor::from_vec([1u32, 2], &[1, 2]).unwrap();
    says(m.forward(&x, None, Some(&mut Caches::new(5)), None).err().unwrap(), "has 3 layers");
    let cu = Tensor::from_vec([0i64, 1, 2], &[3]).unwrap();
    says(m.forward(&x, Some(&cu), Some(&mut Caches::new(3)), None).err().unwrap(), "exclude each other");
    // what stopped on the way is not gone on from
    let mut caches = read(&[1, 2]);
    let mut refuse = |name: &str, _: &Tensor| match name {
        "blocks.2.attn.hook_z" => Err(engine::Error::invalid("a test", "enough")),
        _ => Ok(None),
    };
    let failed = engine::no_grad(|| m.forward(&x, None, Some(&mut caches), Some(&mut refuse)));
    says(failed.err().unwrap(), "enough");
    says(engine::no_grad(|| m.forward(&x, None, Some(&mut caches), None)).err().unwrap(), "failed before");
}

/// Against all probabilities put in order.
#[test]
fn draws_are_those_of_the_whole_order() {
    let naive = |how: &Sampler, logits: &[f64], at: u64| -> usize {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        if how.top_k > 0 {
            order.truncate(how.top_k);
        }
        let p: Vec<f64> = order.iter().map(|i| ((logits[*i] - logits[order[0]]) / how.temperature).exp()).collect();
        let total: f64 = p.iter().sum();
        let mut seen = 0.0;
        let kept = p.iter().position(|x| {
            seen += x;
            seen >= how.top_p * total
        });
        let kept = kept.map_or(p.len(), |k| k + 1);
        let u = engine::rng::uniform(how.seed, at, 1)[0] * p[..kept].iter().sum::<f64>();
        let mut below = 0.0;
        let drawn = p[..kept].iter().position(|x| {
            below += x;
            u < below
        });
        order[drawn.unwrap_or(kept - 1)]
    };
    for n in [1, 2, 50, 700, 5000] {
        // rounded, so that there are equals
        let logits: Vec<f64> = engine::rng::normal(1, n as u64, n).iter().map(|x| (x * 8.0).round() / 4.0).collect();
        for temperature in [0.3, 1.0, 30.0] {
            for top_k in [0, 1, 40, 600] {
                for top_p in [0.2, 0.9, 0.9999, 1.0] {
                    let how = Sampler { temperature, top_k, top_p, seed: 9 };
                    for at in 0..20 {
                        assert_eq!(how.draw(&logits, at), naive(&how, &logits, at), "{n} {how:?} {at}");
                    }
                }
            }
        }
        let greedy = Sampler { temperature: 0.0, top_k: 3, top_p: 0.5, seed: 9 };
        let best = (0..n).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        assert_eq!(greedy.draw(&logits, 1), best);
    }
}
