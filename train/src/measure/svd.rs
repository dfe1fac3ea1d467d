//! Singular values of small matrices, in f64, row by row.

/// Singular values of `a [rows, cols]`, the largest first, by one-sided Jacobi rotations (Hestenes 1958; Demmel & Veselić 1992 show their relative accuracy).
/// `min(rows, cols)` of them; NaN where a value is not finite.
pub(super) fn singular_values(a: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    // columns, of which there are the fewer
    let n = rows.min(cols);
    let mut columns: Vec<Vec<f64>> = match cols <= rows {
        true => (0..cols).map(|j| (0..rows).map(|i| a[i * cols + j]).collect()).collect(),
        false => a.chunks(cols.max(1)).map(<[f64]>::to_vec).collect(),
    };
    let largest = a.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    if n == 0 || a.iter().any(|x| !x.is_finite()) {
        return vec![f64::NAN; n];
    }
    if largest == 0.0 {
        return vec![0.0; n];
    }
    // so that no square is too large or too small
    columns.iter_mut().flatten().for_each(|x| *x /= largest);
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    // it ends quadratically, after some ten sweeps
    for _ in 0..60 {
        let mut turned = false;
        for p in 0..n {
            for q in p + 1..n {
                let (front, back) = columns.split_at_mut(q);
                let (x, y) = (&mut front[p], &mut back[0]);
                let (xx, yy, xy) = (dot(x, x), dot(y, y), dot(x, y));
                if xy.abs() <= 1e-15 * (xx * yy).sqrt() || xx * yy == 0.0 {
                    continue;
                }
                turned = true;
                let z = (yy - xx) / (2.0 * xy);
                let t = z.signum() / (z.abs() + z.hypot(1.0));
                let c = 1.0 / t.hypot(1.0);
                for (x, y) in x.iter_mut().zip(y.iter_mut()) {
                    (*x, *y) = (c * (*x - t * *y), c * (t * *x + *y));
                }
            }
        }
        if !turned {
            break;
        }
    }
    let mut values: Vec<f64> = columns.iter().map(|c| largest * dot(c, c).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values
}

/// The factor R `[min(rows, cols), cols]` of `a [rows, cols] = Q R`, by Householder reflections.
pub(super) fn triangle(a: &[f64], rows: usize, cols: usize) -> Vec<f64> {
    let mut columns: Vec<Vec<f64>> = (0..cols).map(|j| (0..rows).map(|i| a[i * cols + j]).collect()).collect();
    let k = rows.min(cols);
    for j in 0..k {
        let mut v = columns[j][j..].to_vec();
        let norm = v.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm == 0.0 {
            continue;
        }
        v[0] += norm.copysign(v[0]);
        let square = v.iter().map(|x| x * x).sum::<f64>();
        for c in &mut columns[j..] {
            let along = 2.0 * v.iter().zip(&c[j..]).map(|(v, c)| v * c).sum::<f64>() / square;
            c[j..].iter_mut().zip(&v).for_each(|(c, v)| *c -= along * v);
        }
    }
    let mut r = vec![0.0; k * cols];
    columns.iter().enumerate().for_each(|(j, c)| (0..k.min(j + 1)).for_each(|i| r[i * cols + j] = c[i]));
    r
}

/// Effective rank (Roy & Vetterli 2007): `exp(H(p))`, `p_i = σ_i / Σ σ`, of the matrix as it is, uncentred. 0 of a matrix of zeros.
pub(super) fn effective_rank(sigma: &[f64]) -> f64 {
    let sum: f64 = sigma.iter().sum();
    if sum == 0.0 {
        return 0.0;
    }
    let nats: f64 = sigma.iter().map(|s| s / sum).filter(|p| *p != 0.0).map(|p| -p * p.ln()).sum();
    nats.exp()
}

/// Stable rank `‖A‖_F² / ‖A‖₂²`. 0 of a matrix of zeros.
pub(super) fn stable_rank(sigma: &[f64]) -> f64 {
    let most = sigma.first().copied().unwrap_or(0.0);
    if most == 0.0 { 0.0 } else { sigma.iter().map(|s| (s / most).powi(2)).sum() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(a: &[f64], b: &[f64], within: f64) {
        assert_eq!(a.len(), b.len());
        a.iter().zip(b).for_each(|(x, y)| assert!((x - y).abs() <= within * y.abs().max(1e-3), "{a:?}\n{b:?}"));
    }
    /// `a [m, k] b [k, n]`
    fn times(a: &[f64], b: &[f64], k: usize) -> Vec<f64> {
        let n = b.len() / k;
        a.chunks(k).flat_map(|row| (0..n).map(move |j| (0..k).map(|i| row[i] * b[i * n + j]).sum())).collect()
    }
    fn noise(n: usize, seed: u64) -> Vec<f64> {
        engine::Tensor::randn(&[n], engine::DType::F64, &engine::Device::cpu(), seed, 0).unwrap().to_vec::<f64>().unwrap()
    }

    #[test]
    fn known_matrices() {
        near(&singular_values(&[0.0, -3.0, 2.0, 0.0], 2, 2), &[3.0, 2.0], 1e-14);
        // [[3, 0], [4, 5]]: √45 and √5
        near(&singular_values(&[3.0, 0.0, 4.0, 5.0], 2, 2), &[45f64.sqrt(), 5f64.sqrt()], 1e-14);
        near(&singular_values(&[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2, 3), &[6f64.sqrt(), 0.0], 1e-14);
        // Hilbert's, of order four, by their published condition number 15513.7387389294
        let hilbert: Vec<f64> = (0..16).map(|i| 1.0 / (i / 4 + i % 4 + 1) as f64).collect();
        let s = singular_values(&hilbert, 4, 4);
        near(&[s[0], s[0] / s[3]], &[1.500_214_280_059_243, 15_513.738_738_929_4], 1e-9);
        assert_eq!(singular_values(&[0.0; 6], 3, 2), [0.0, 0.0]);
        assert!(singular_values(&[f64::NAN, 1.0], 2, 1)[0].is_nan() && singular_values(&[], 0, 4).is_empty());
        near(&singular_values(&[1e-200, 0.0, 0.0, 1e200], 2, 2), &[1e200, 0.0], 1e-12);
    }

    #[test]
    fn the_shorter_factor_has_the_same_singular_values() {
        // columns that are nearly alike, and a wide matrix
        for (rows, cols) in [(20, 5), (5, 20), (7, 7), (1, 3), (3, 1)] {
            let mut a = noise(rows * cols, (rows * 100 + cols) as u64);
            (0..rows).for_each(|i| a[i * cols] = a[i * cols + cols - 1] * (1.0 + 1e-9 * i as f64));
            let k = rows.min(cols);
            near(&singular_values(&triangle(&a, rows, cols), k, cols), &singular_values(&a, rows, cols), 1e-9);
        }
        // of a product of factors, with one formed in full
        let (a, b) = (noise(40 * 6, 1), noise(30 * 6, 2));
        let turned: Vec<f64> = (0..6 * 30).map(|i| b[i % 30 * 6 + i / 30]).collect();
        let whole = singular_values(&times(&a, &turned, 6), 40, 30);
        let (ra, rb) = (triangle(&a, 40, 6), triangle(&b, 30, 6));
        let rb_t: Vec<f64> = (0..36).map(|i| rb[i % 6 * 6 + i / 6]).collect();
        near(&singular_values(&times(&ra, &rb_t, 6), 6, 6), &whole[..6], 1e-10);
        assert!(whole[6] < 1e-12 * whole[0]);
    }

    #[test]
    fn ranks() {
        // r equal singular values are r, in either sense
        for r in 1..4 {
            let mut s = vec![2.5; r];
            s.resize(6, 0.0);
            near(&[effective_rank(&s), stable_rank(&s)], &[r as f64; 2], 1e-14);
        }
        // p = 3/4, 1/4: exp(−¾ ln ¾ − ¼ ln ¼) = 4 / 3^¾; 1 + 1/9
        near(&[effective_rank(&[3.0, 1.0]), stable_rank(&[3.0, 1.0])], &[4.0 / 3f64.powf(0.75), 10.0 / 9.0], 1e-14);
        assert_eq!((effective_rank(&[0.0; 3]), stable_rank(&[0.0; 3])), (0.0, 0.0));
    }
}
