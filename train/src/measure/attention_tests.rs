use super::*;
use engine::Device;
use ops::gated_sdpa::{Attention as Sdpa, attention_pattern};

fn near(what: &str, a: f64, b: f64, within: f64) {
    assert!((a - b).abs() <= within * b.abs().max(1e-3), "{what}: {a} is not {b}");
}
fn layer<'a>(hook: &'a str) -> At<'a> {
    At { name: "", layer: 0, hook, softmax: true }
}

#[test]
fn uniform_attention() {
    // queries of zero look everywhere alike: query i gives 1/(i + 1) to each of the keys that it sees, or 1/window
    let t = 6;
    let zeros = |h: usize| Tensor::zeros(&[2, t, h, 4], DType::F32, &Device::cpu()).unwrap();
    let p = pattern(&zeros(2), &zeros(1), None, true).unwrap();
    let seen = |i: usize| (i + 1) as f64;
    for row in 0..2 {
        for head in 0..2 {
            near("first", p.first[row * 2 + head], (1..t).map(|i| 1.0 / seen(i)).sum(), 1e-6);
        }
        for j in 0..t - 1 {
            near("received", p.received[row * t + j], (j + 1..t).map(|i| 1.0 / seen(i)).sum::<f64>() / (t - 1 - j) as f64, 1e-6);
        }
    }
    near("entropy", p.entropy[1], 2.0 * (0..t).map(|i| seen(i).ln()).sum::<f64>(), 1e-6);
    assert_eq!(p.max, [0.0, 0.0]);
    let p = pattern(&zeros(1), &zeros(1), Some(2), true).unwrap();
    near("first in a window of two", p.first[0], 0.5, 1e-6);
    near("entropy in a window of two", p.entropy[0], 2.0 * 5.0 * 2f64.ln(), 1e-6);
    near("received in a window of two", p.received[1], 0.5 / 4.0, 1e-6);
}

#[test]
fn blocks_of_queries_are_the_whole_pattern() {
    // so long that the queries come in blocks
    for (b, t, h, groups, window) in
        [(1, 2900, 2, 1, None), (1, 2900, 2, 2, Some(700)), (3, 40, 4, 2, None), (3, 40, 4, 2, Some(7)), (2, 1, 2, 1, None)]
    {
        let x =
            |heads: usize, stream: u64| Tensor::randn(&[b, t, heads, 8], DType::F64, &Device::cpu(), 5, stream).unwrap().affine(2.0, 0.0).unwrap();
        let (q, k) = (x(h, 0), x(groups, 1));
        let p = pattern(&q, &k, window, true).unwrap();
        let whole = attention_pattern(&q, &k, None, Sdpa { causal: true, window, scale: None }).unwrap().to_vec::<f64>().unwrap();
        let at = |row: usize, head: usize, i: usize, j: usize| whole[((row * h + head) * t + i) * t + j];
        for row in 0..b {
            for head in 0..h {
                near("first", p.first[row * h + head], (1..t).map(|i| at(row, head, i, 0)).sum(), 1e-9);
            }
            for j in (0..t).step_by(t / 20 + 1) {
                let later = (0..h).flat_map(|head| (j + 1..t).map(move |i| at(row, head, i, j))).sum::<f64>();
                near("received", p.received[row * t + j], later / (h * (t - 1 - j).max(1)) as f64, 1e-9);
            }
        }
        for head in 0..h {
            let one = |row: usize| whole[(row * h + head) * t * t..][..t * t].iter().filter(|p| **p > 0.0).map(|p| -p * p.ln()).sum::<f64>();
            near("entropy", p.entropy[head], (0..b).map(one).sum(), 1e-9);
        }
        let (q, k) = (q.to_vec::<f64>().unwrap(), k.to_vec::<f64>().unwrap());
        let score = |row: usize, head: usize, i: usize, j: usize| {
            let (q, k) = (&q[((row * t + i) * h + head) * 8..][..8], &k[((row * t + j) * groups + head * groups / h) * 8..][..8]);
            q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / 8f64.sqrt()
        };
        let reach = window.unwrap_or(t);
        let seen = (0..b).flat_map(|row| (0..t).flat_map(move |i| ((i + 1).saturating_sub(reach)..=i).map(move |j| (row, i, j))));
        near("largest", p.max[h - 1], seen.map(|(row, i, j)| score(row, h - 1, i, j)).fold(f64::NEG_INFINITY, f64::max), 1e-9);
    }
}

#[test]
fn sinks_are_counted_by_sample_and_head() {
    // the first key's score is s, all others' are 0: A[i, 0] = eˢ / (eˢ + i), and α their mean
    let alpha = |s: f64| (0..64).map(|i| s.exp() / (s.exp() + i as f64)).sum::<f64>() / 64.0;
    let mut s = 0.0;
    while alpha(s) < 0.3 {
        s += 1e-3;
    }
    let (below, above) = (s - 2e-3, s + 1e-3);
    assert!(alpha(below) < 0.3 && alpha(above) > 0.3);
    let c = ModelConfig { layer_types: vec![LayerType::FullAttention], num_hidden_layers: 1, ..ModelConfig::default() };
    let mut heads = Heads::new(&c, true);
    // two samples; head 0 is a sink in the first alone, head 1 in none
    let q = Tensor::ones(&[2, 64, 2, 1], DType::F64, &Device::cpu()).unwrap();
    let mut k = vec![0.0f64; 2 * 64 * 2];
    (k[0], k[1], k[128], k[129]) = (above, below, below, -1.0);
    let k = Tensor::from_vec(k, &[2, 64, 2, 1]).unwrap();
    heads.see(&layer("attn.hook_rot_q"), &q).unwrap();
    heads.see(&layer("attn.hook_rot_k"), &k).unwrap();
    assert_eq!(heads.tokens[&0], [0, 0]);
    let mut main = Heads::new(&c, false);
    main.see(&layer("attn.hook_rot_q"), &q).unwrap();
    main.see(&layer("attn.hook_rot_k"), &k).unwrap();
    let a = main.finish(heads);
    assert_eq!((a.layers[0].sink_rate.as_slice(), a.sink_rate, a.sink_epsilon, a.sink_tokens), (&[0.5, 0.0][..], 0.25, 0.3, 64));
    // without the first query, whose share is 1
    let share = |s: f64| (alpha(s) * 64.0 - 1.0) / 63.0;
    near("head 0", a.layers[0].first_token[0], 0.5 * (share(above) + share(below)), 1e-9);
    near("both", a.first_token, 0.25 * (share(above) + 2.0 * share(below) + share(-1.0)), 1e-9);
}
