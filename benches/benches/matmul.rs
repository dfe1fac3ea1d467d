//! The matrix product against matrixmultiply split over the same threads by rows, f32, at products of a training step and at two square ones.

use criterion::{Criterion, criterion_group, criterion_main};
use engine::{Tensor, no_grad};
use rayon::prelude::*;
use std::hint::black_box;
use tidegate_benches::leaf;

/// `C [m, n] = A [m, k] · B [k, n]`, each thread a block of rows.
fn by_rows(m: usize, k: usize, n: usize, a: &[f32], b: &[f32], c: &mut [f32]) {
    let rows = m.div_ceil(rayon::current_num_threads());
    c.par_chunks_mut(rows * n).zip(a.par_chunks(rows * k)).for_each(|(c, a)| {
        let (m, k, n) = (c.len() / n, k as isize, n as isize);
        // SAFETY: `c` holds m rows of n, `a` as many of k, `b` k rows of n.
        unsafe { matrixmultiply::sgemm(m, k as usize, n as usize, 1.0, a.as_ptr(), k, 1, b.as_ptr(), n, 1, 0.0, c.as_mut_ptr(), n, 1) }
    });
}

fn matmul(c: &mut Criterion) {
    for (m, k, n) in [(1536, 128, 768), (2048, 256, 4096), (1024, 1024, 1024), (2048, 2048, 2048)] {
        let [a, b] = [leaf(&[m, k], 0).unwrap(), leaf(&[k, n], 1).unwrap()];
        let [at, bt] = [leaf(&[k, m], 0).unwrap().transpose(0, 1).unwrap(), leaf(&[n, k], 1).unwrap().transpose(0, 1).unwrap()];
        let (x, y, mut z) = (a.to_vec::<f32>().unwrap(), b.to_vec::<f32>().unwrap(), vec![0.0; m * n]);
        let mut group = c.benchmark_group(format!("matmul {m}x{k}x{n}"));
        group.sample_size(20);
        group.bench_function("nn", |t| t.iter(|| no_grad(|| black_box(Tensor::matmul(&a, &b).unwrap()))));
        group.bench_function("nt", |t| t.iter(|| no_grad(|| black_box(Tensor::matmul(&a, &bt).unwrap()))));
        group.bench_function("tn", |t| t.iter(|| no_grad(|| black_box(Tensor::matmul(&at, &b).unwrap()))));
        group.bench_function("matrixmultiply by rows, nn", |t| t.iter(|| by_rows(m, k, n, &x, &y, black_box(&mut z))));
    }
}

criterion_group!(benches, matmul);
criterion_main!(benches);
