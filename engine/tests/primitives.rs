//! Every primitive's gradient against central differences in f64, on ragged shapes and strided views.

use engine::{DType, Device, Result, Tensor, gradcheck};

fn randn(shape: &[usize], stream: u64) -> Tensor {
    Tensor::randn(shape, DType::F64, &Device::cpu(), 3, stream).unwrap()
}
fn check(f: impl Fn(&[Tensor]) -> Result<Tensor>, leaves: &[Tensor]) {
    gradcheck(|x| Ok(vec![f(x)?]), leaves, 1e-5).unwrap().within(1e-8).unwrap();
}

#[test]
fn unary_functions() {
    let x = randn(&[3, 5], 0);
    let pos = x.abs().unwrap().affine(1.0, 0.1).unwrap();
    for f in [
        Tensor::neg,
        Tensor::exp,
        Tensor::square,
        Tensor::abs,
        Tensor::relu,
        Tensor::sigmoid,
        Tensor::silu,
        Tensor::softplus,
        Tensor::tanh,
        Tensor::sin,
        Tensor::cos,
    ] {
        check(|x| f(&x[0]), std::slice::from_ref(&x));
    }
    for f in [Tensor::ln, Tensor::sqrt, Tensor::rsqrt, Tensor::recip] {
        check(|x| f(&x[0]), std::slice::from_ref(&pos));
    }
    check(|x| x[0].affine(2.5, -1.0), std::slice::from_ref(&x));
    check(|x| x[0].pow(1.7), &[pos]);
}

#[test]
fn binary_functions_with_broadcasting() {
    for (a, b) in [(vec![3, 5], vec![3, 5]), (vec![2, 3, 5], vec![5]), (vec![2, 1, 5], vec![3, 1]), (vec![1], vec![4, 2]), (vec![], vec![3])] {
        let (x, y) = (randn(&a, 1), randn(&b, 2));
        for f in [Tensor::add, Tensor::sub, Tensor::mul, Tensor::maximum, Tensor::minimum] {
            check(|x| f(&x[0], &x[1]), &[x.clone(), y.clone()]);
        }
        check(|x| x[0].div(&x[1]), &[x.clone(), y.abs().unwrap().affine(1.0, 0.5).unwrap()]);
        let cond = x.gt(&y).unwrap();
        check(|x| cond.select(&x[0], &x[1]), &[x, y]);
    }
}

#[test]
fn matrix_products_in_every_transpose_and_batch() {
    let (a, b) = (randn(&[3, 4], 1), randn(&[4, 5], 2));
    check(|x| x[0].matmul(&x[1]), &[a.clone(), b.clone()]);
    check(|x| x[1].transpose(0, 1)?.matmul(&x[0].transpose(0, 1)?), &[a.clone(), b.clone()]);
    check(|x| x[0].linear(&x[1]), &[randn(&[2, 3, 4], 3), randn(&[5, 4], 4)]);
    check(|x| x[0].matmul(&x[1]), &[randn(&[2, 1, 3, 4], 5), randn(&[3, 4, 2], 6)]);
    check(|x| x[0].matmul(&x[1].transpose(1, 2)?), &[randn(&[2, 3, 4], 7), randn(&[2, 5, 4], 8)]);
    check(|x| x[0].matmul(&x[1]), &[randn(&[4], 9), b.clone()]);
    check(|x| x[0].matmul(&x[1]), &[a, randn(&[4], 10)]);
    check(|x| x[0].matmul(&x[1]), &[randn(&[4], 9), randn(&[4], 10)]);
}

/// A master weight's gradient has the digits of f32, whatever x's dtype is.
#[test]
fn a_master_weight_s_gradient_is_not_rounded() {
    for d in [DType::BF16, DType::F16] {
        let x = randn(&[2, 90, 7], 1).cast(d).unwrap();
        let w = randn(&[5, 7], 2).cast(DType::F32).unwrap().requires_grad();
        let y = x.linear(&w).unwrap();
        assert_eq!((y.shape(), y.dtype()), (&[2, 90, 5][..], d));
        let g = y.cast(DType::F32).unwrap().sum_all().unwrap().backward().unwrap();
        let found = g.get(&w).unwrap();
        assert_eq!(found.dtype(), DType::F32);
        let want = x.cast(DType::F64).unwrap().sum(&[0, 1], false).unwrap().to_vec::<f64>().unwrap();
        for (i, f) in found.to_vec::<f64>().unwrap().iter().enumerate() {
            assert!((f - want[i % 7]).abs() < 1e-5 * want[i % 7].abs().max(1.0), "{d}: {f} {}", want[i % 7]);
        }
        let e = x.linear(&Tensor::ones(&[5, 6], DType::F32, &Device::cpu()).unwrap()).unwrap_err().to_string();
        assert!(e.contains("[180, 7]") && e.contains("[5, 6]"), "{e}");
    }
}

#[test]
fn products_agree_across_dtypes_and_layouts() {
    for (m, k, n) in [(1, 7, 5), (64, 64, 64), (65, 130, 33), (300, 17, 200), (5, 0, 3)] {
        let (a, b) = (randn(&[m, k], 1), randn(&[k, n], 2));
        let want = a.matmul(&b).unwrap().to_vec::<f64>().unwrap();
        let naive: Vec<f64> = {
            let (a, b) = (a.to_vec::<f64>().unwrap(), b.to_vec::<f64>().unwrap());
            (0..m * n).map(|i| (0..k).map(|p| a[i / n * k + p] * b[p * n + i % n]).sum()).collect()
        };
        let err = |y: &[f64]| y.iter().zip(&naive).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max);
        assert!(err(&want) < 1e-11);
        for (d, tol) in [(DType::F32, 1e-4), (DType::BF16, 0.6), (DType::F16, 0.08)] {
            let y = a.cast(d).unwrap().matmul(&b.cast(d).unwrap()).unwrap();
            assert_eq!(y.dtype(), d);
            assert!(err(&y.to_vec::<f64>().unwrap()) < tol, "{d} {m} {k} {n}");
        }
        let t = b.transpose(0, 1).unwrap().matmul(&a.transpose(0, 1).unwrap()).unwrap().transpose(0, 1).unwrap();
        assert!(err(&t.to_vec::<f64>().unwrap()) < 1e-11);
    }
}

#[test]
fn reductions() {
    let x = randn(&[3, 4, 5], 1);
    for axes in [vec![0], vec![1], vec![2], vec![0, 1], vec![0, 2], vec![1, 2], vec![0, 1, 2], vec![]] {
        for keep in [false, true] {
            check(|x| x[0].sum(&axes, keep), std::slice::from_ref(&x));
            check(|x| x[0].mean(&axes, keep), std::slice::from_ref(&x));
            check(|x| x[0].max(&axes, keep), std::slice::from_ref(&x));
        }
    }
    for a in 0..3 {
        check(|x| x[0].cumsum(a), std::slice::from_ref(&x));
        check(|x| x[0].softmax(a), std::slice::from_ref(&x));
        check(|x| x[0].log_softmax(a), std::slice::from_ref(&x));
    }
    let x = Tensor::from_vec([1.0f32, 3.0, 3.0, 0.0, 1.0, f32::NAN, f32::NAN, 1.0], &[4, 2]).unwrap();
    assert_eq!(x.argmax(1).unwrap().to_vec::<i64>().unwrap(), [1, 0, 1, 0]);
    assert_eq!(x.sort(true).unwrap().1.narrow(1, 0, 1).unwrap().to_vec::<i64>().unwrap(), [1, 0, 1, 0]);
    assert_eq!(Tensor::ones(&[100_000], DType::F32, &Device::cpu()).unwrap().sum_all().unwrap().item().unwrap(), 1e5);
}

#[test]
fn shapes_and_indices() {
    let x = randn(&[3, 4, 5], 1);
    let one = std::slice::from_ref(&x);
    check(|x| x[0].reshape(&[12, 5])?.mul(&x[0].reshape(&[12, 5])?), one);
    check(|x| x[0].permute(&[2, 0, 1])?.reshape(&[15, 4]), one);
    check(|x| x[0].narrow(1, 1, 2)?.square(), one);
    check(|x| Tensor::cat(&[&x[0].narrow(2, 0, 3)?, &x[0].narrow(2, 1, 4)?], 2), one);
    check(|x| x[0].pad(1, 2, 1)?.square(), one);
    check(|x| x[0].narrow(0, 1, 1)?.expand(&[6, 4, 5])?.square(), one);
    check(|x| x[0].split(2, &[2, 3])?[1].square(), one);
    let idx = Tensor::from_vec([3i64, 0, 3, 1], &[4]).unwrap();
    check(|x| x[0].index_select(1, &idx)?.square(), one);
    check(|x| x[0].index_add(1, &idx, 6)?.square(), one);
    let g = Tensor::from_vec((0..30).map(|i| i * 7 % 4).collect::<Vec<_>>(), &[3, 2, 5]).unwrap();
    check(|x| x[0].gather(1, &g)?.square(), one);
    check(|x| x[0].narrow(1, 0, 2)?.scatter_add(1, &g, 4)?.square(), one);
    check(|x| x[0].topk(3)?.0.square(), one);
    check(|x| x[0].sort(true)?.0.cumsum(2), one);
    let tok = Tensor::from_vec([1u32, 2, 0, 2], &[2, 2]).unwrap();
    check(|x| x[0].reshape(&[3, 20])?.embedding(&tok)?.square(), one);
    check(|x| x[0].cast(DType::F64)?.contiguous(), one);
}

#[test]
fn integers_halves_and_empty_tensors() {
    let a = Tensor::from_vec([1i64, -2, 1 << 60], &[3]).unwrap();
    assert_eq!(a.add(&a).unwrap().to_vec::<i64>().unwrap(), [2, -4, 1 << 61]);
    assert_eq!(Tensor::from_vec([300.7f32, -5.0], &[2]).unwrap().cast(DType::U8).unwrap().to_vec::<u8>().unwrap(), [255, 0]);
    let e = Tensor::zeros(&[0, 3], DType::F32, &Device::cpu()).unwrap();
    assert_eq!(e.matmul(&Tensor::zeros(&[3, 2], DType::F32, &Device::cpu()).unwrap()).unwrap().shape(), [0, 2]);
    assert_eq!(e.sum(&[0], false).unwrap().to_vec::<f32>().unwrap(), [0.0; 3]);
    assert_eq!(e.add(&e).unwrap().softmax(1).unwrap().shape(), [0, 3]);
    let h = Tensor::from_vec([1.0f32, 1.0 / 256.0], &[2]).unwrap().cast(DType::BF16).unwrap();
    assert_eq!(h.sum_all().unwrap().to_vec::<f32>().unwrap(), [1.0], "rounded once, to even");
}
