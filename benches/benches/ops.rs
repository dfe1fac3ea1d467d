//! The two big ops at the peers' shapes, f32, forward, and forward with backward. `python3 benches/compare.py` sets them against PyTorch.

use criterion::{Criterion, criterion_group, criterion_main};
use engine::{Result, Tensor, no_grad};
use ops::delta_rule::{DeltaRule, DeltaRuleInputs, delta_rule};
use ops::gated_sdpa::{Attention, Gate, gated_sdpa};
use std::hint::black_box;
use tidegate_benches::{DELTA, SDPA, leaf};

fn both(c: &mut Criterion, name: &str, forward: impl Fn() -> Result<Tensor>) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    group.bench_function("fwd", |b| b.iter(|| no_grad(|| black_box(forward().unwrap()))));
    group.bench_function("fwd+bwd", |b| {
        b.iter(|| {
            let o = forward().unwrap();
            let axes: Vec<usize> = (0..o.rank()).collect();
            black_box(o.sum(&axes, false).unwrap().backward().unwrap())
        })
    });
}

fn sdpa(c: &mut Criterion) {
    for (b, h, hk, t, d) in SDPA {
        let (q, gate) = (leaf(&[b, t, h, d], 0).unwrap(), leaf(&[b, t, h, d], 1).unwrap());
        let (k, v) = (leaf(&[b, t, hk, d], 2).unwrap(), leaf(&[b, t, hk, d], 3).unwrap());
        let how = Attention { causal: true, window: None, scale: None };
        both(c, &format!("gated_sdpa B{b} H{h}-{hk} T{t} D{d}"), || gated_sdpa(&q, &k, &v, Some((&gate, Gate::default())), None, how));
    }
}

fn delta(c: &mut Criterion) {
    for (b, t, h, d) in DELTA {
        let [q, k, v] = [0, 1, 2].map(|i| leaf(&[b, t, h, d], i).unwrap());
        let (g, beta) = (leaf(&[b, t, h], 3).unwrap(), leaf(&[b, t, h], 4).unwrap());
        let g = g.sigmoid().unwrap().affine(-0.1, 0.0).unwrap().detach().requires_grad();
        let beta = beta.sigmoid().unwrap().detach().requires_grad();
        let x = || DeltaRuleInputs { log_decay: Some(&g), beta: Some(&beta), initial_state: None, cu_seqlens: None };
        both(c, &format!("delta_rule B{b} T{t} H{h} D{d}"), || Ok(delta_rule(DeltaRule::gated_delta_net(), &q, &k, &v, x())?.0));
    }
}

criterion_group!(benches, sdpa, delta);
criterion_main!(benches);
