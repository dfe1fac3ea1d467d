//! Peak memory of gated attention, forward with backward, as T doubles to 16,384: linear, where the scores alone would be H·T² numbers.

use engine::{Device, Tensor, cpu};
use ops::gated_sdpa::{Attention, Gate, gated_sdpa};
use tidegate_benches::leaf;

fn main() {
    let (h, d) = (4, 64);
    println!("gated_sdpa B1 H{h} D{d} f32, forward and backward\n{:>8} {:>12} {:>14} {:>22}", "T", "peak MB", "bytes per T", "scores alone, MB");
    for t in [2048, 4096, 8192, 16_384] {
        let [q, k, v, gate] = [0, 1, 2, 3].map(|i| leaf(&[1, t, h, d], i).unwrap());
        let how = Attention { causal: true, window: None, scale: None };
        let o = gated_sdpa(&q, &k, &v, Some((&gate, Gate::default())), None, how).unwrap();
        let grads = o.backward_with(&Tensor::ones(o.shape(), o.dtype(), &Device::cpu()).unwrap()).unwrap();
        assert_eq!(grads.len(), 4);
        let peak = cpu::memory().2;
        println!("{t:>8} {:>12.1} {:>14} {:>22.0}", peak as f64 / 1e6, peak / t, (h * t * t * 4) as f64 / 1e6);
    }
}
