use super::*;
use crate::testing::{check, close, fails, narrow, randn, strided};

#[test]
fn rotates_as_complex_numbers_do() {
    let x = randn(&[2, 5, 3, 8], 1);
    let y = rope(&strided(&x), 4, 100.0, Positions::From(7)).unwrap().to_vec::<f64>().unwrap();
    let v = x.to_vec::<f64>().unwrap();
    for i in 0..v.len() {
        let (t, j) = (i / 24 % 5, i % 8);
        let a = (t + 7) as f64 * 100f64.powf(-((j % 2) as f64) * 2.0 / 4.0);
        let want = match j {
            0 | 1 => v[i] * a.cos() - v[i + 2] * a.sin(),
            2 | 3 => v[i] * a.cos() + v[i - 2] * a.sin(),
            _ => v[i],
        };
        assert!((y[i] - want).abs() < 1e-12);
    }
    close(&rope(&x, 4, 100.0, Positions::From(7)).unwrap(), &reference::rope(&x, 4, 100.0, &[7, 8, 9, 10, 11]).unwrap(), 1e-13);
    let p = Tensor::from_vec((0..10).map(|i| 7 + i % 5).collect::<Vec<i32>>(), &[2, 5]).unwrap();
    assert_eq!(rope(&x, 4, 100.0, Positions::Given(&p)).unwrap().to_vec::<f64>().unwrap(), y);
    close(&rope(&x, 0, 1e4, Positions::From(3)).unwrap(), &x, 0.0);
}

#[test]
fn gradients() {
    let (x, w) = (randn(&[2, 3, 2, 6], 1), randn(&[6], 2));
    let p = Tensor::from_vec([0i64, 1, 0, 5, 6, 7], &[2, 3]).unwrap();
    for rotary_dim in [0, 2, 4, 6] {
        for positions in [Positions::From(3), Positions::Given(&p)] {
            check(|v| Ok(vec![rope(&v[0], rotary_dim, 1e4, positions)?]), std::slice::from_ref(&x));
            check(|v| Ok(vec![rope(&strided(&v[0]), rotary_dim, 1e4, positions)?]), std::slice::from_ref(&x));
            for centred in [false, true] {
                check(|v| Ok(vec![norm_rope(&v[0], &v[1], 1e-6, centred, rotary_dim, 1e4, positions)?]), &[x.clone(), w.clone()]);
            }
        }
    }
}

#[test]
fn frequencies_and_a_factor_of_ones_own() {
    let (x, f) = (randn(&[2, 3, 2, 6], 1), [0.7, 0.01]);
    let given = Tensor::from_vec(f, &[2]).unwrap();
    let p = Tensor::from_vec([5i64, 6, 7, 5, 6, 7], &[2, 3]).unwrap();
    for positions in [Positions::From(5), Positions::Given(&p)] {
        let y = rope_scaled(&strided(&x), &given, 1.3, positions).unwrap();
        close(&y, &reference::rope_scaled(&x, &f, 1.3, &[5, 6, 7]).unwrap(), 1e-13);
        check(|v| Ok(vec![rope_scaled(&v[0], &given, 1.3, positions)?]), std::slice::from_ref(&x));
    }
    // those that theta stands for are the same numbers
    let own = Tensor::from_vec([1.0, 1e4f64.powf(-0.5)], &[2]).unwrap();
    let same = rope_scaled(&x, &own, 1.0, Positions::From(3)).unwrap();
    assert_eq!(same.to_vec::<f64>().unwrap(), rope(&x, 4, 1e4, Positions::From(3)).unwrap().to_vec::<f64>().unwrap());
    narrow(
        "rope of given frequencies",
        |v| Ok(vec![rope_scaled(&v[0], &given, 1.3, Positions::From(5))?]),
        |v| Ok(vec![reference::rope_scaled(&v[0], &f, 1.3, &[5, 6, 7])?]),
        &[x],
        &[],
        &[0.005, 0.008],
    );
}

#[test]
fn narrow_types_stay_within_bounds() {
    let x = [randn(&[2, 37, 3, 40], 1)];
    let positions: Vec<usize> = (5..42).collect();
    for rotary_dim in [40, 20] {
        let f = |v: &[Tensor]| Ok(vec![rope(&v[0], rotary_dim, 1e4, Positions::From(5))?]);
        narrow("rope", f, |v| Ok(vec![reference::rope(&v[0], rotary_dim, 1e4, &positions)?]), &x, &[], &[0.005, 0.008]);
    }
}

#[test]
fn bad_arguments_are_named() {
    let x = randn(&[2, 3, 2, 6], 1);
    let at = |x: &Tensor, rotary_dim, p: Positions| rope(x, rotary_dim, 1e4, p);
    let first = Positions::From(0);
    fails(at(&randn(&[3, 2, 6], 1), 4, first), "rope: x must have shape [B, T, H, D], found [3, 2, 6]");
    fails(at(&x.cast(DType::I64).unwrap(), 4, first), "rope: x must be a float dtype, found i64");
    fails(at(&x, 8, first), "rope: rotary_dim must be even and at most head_dim 6, found 8");
    fails(at(&x, 3, first), "rope: rotary_dim must be even and at most head_dim 6, found 3");
    for theta in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        fails(rope(&x, 4, theta, first), &format!("rope: theta must be a positive number, found {theta}"));
    }
    let frequencies = |n: usize, dtype| Tensor::ones(&[n], dtype, x.device()).unwrap();
    fails(rope_scaled(&x, &frequencies(4, DType::F64), 1.0, first), "rope: rotary_dim must be even and at most head_dim 6, found 8");
    fails(rope_scaled(&x, &frequencies(2, DType::F32), 1.0, first), "rope: frequencies must be f64[2], found f32[2]");
    fails(rope_scaled(&x, &frequencies(2, DType::F64), f64::NAN, first), "rope: factor must be finite, found NaN");
    let p = Tensor::from_vec([0i64, 1, 2], &[1, 3]).unwrap();
    fails(at(&x, 4, Positions::Given(&p)), "rope: positions must be i32 or i64[2, 3], found i64[1, 3]");
    fails(at(&x, 4, Positions::Given(&randn(&[2, 3], 1))), "rope: positions must be i32 or i64[2, 3], found f64[2, 3]");
    for shape in [[0, 3, 2, 6], [2, 0, 2, 6], [2, 3, 0, 6]] {
        assert_eq!(at(&randn(&shape, 1), 4, first).unwrap().shape(), shape);
    }
}
