use super::*;
use crate::testing::{close, randn, strided};
use engine::gradcheck;

fn reference(x: &Tensor, w: &Tensor, silu: bool) -> Tensor {
    super::reference::short_conv(x, w, silu, None).unwrap()
}

#[test]
fn matches_its_reference_on_dense_and_strided_input() {
    for (b, t, c, k) in [(2, 9, 5, 4), (1, 1, 3, 4), (2, 130, 8, 2), (1, 3, 4, 1)] {
        let (x, w) = (randn(&[b, t, c], 1), randn(&[c, k], 2));
        for silu in [false, true] {
            close(&short_conv(&x, &w, silu, None, None).unwrap().0, &reference(&x, &w, silu), 1e-13);
            close(&short_conv(&strided(&x), &w, silu, None, None).unwrap().0, &reference(&x, &w, silu), 1e-13);
        }
    }
    let (x, w) = (randn(&[2, 7, 3, 4], 1), randn(&[12, 1, 4], 2));
    let y = short_conv(&strided(&x), &w, true, None, None).unwrap().0;
    let flat = reference(&x.reshape(&[2, 7, 12]).unwrap(), &w.reshape(&[12, 4]).unwrap(), true);
    close(&y, &flat, 1e-13);
}

#[test]
fn gradients_of_every_form() {
    for (b, t, c, k) in [(2, 6, 3, 4), (1, 2, 3, 4), (1, 70, 2, 3)] {
        let (x, w, s) = (randn(&[b, t, c], 1), randn(&[c, k], 2), randn(&[b, k - 1, c], 3));
        for silu in [false, true] {
            let f = |v: &[Tensor]| short_conv(&v[0], &v[1], silu, Some(&v[2]), None).map(|(y, s)| vec![y, s]);
            gradcheck(f, &[x.clone(), w.clone(), s.clone()], 1e-5).unwrap().within(1e-6).unwrap();
        }
    }
    // the last document shorter than the state, and longer
    for last in [2, 6] {
        let cu = Tensor::from_vec([0i32, 2, 2, last, 7], &[5]).unwrap();
        let (x, w) = (randn(&[1, 7, 3], 1), randn(&[3, 4], 2));
        let f = |v: &[Tensor]| short_conv(&v[0], &v[1], true, None, Some(&cu)).map(|(y, s)| vec![y, s]);
        gradcheck(f, &[x, w], 1e-5).unwrap().within(1e-6).unwrap();
    }
}

#[test]
fn packed_is_separate_and_stepwise_is_whole() {
    let (x, w) = (randn(&[1, 150, 6], 1), randn(&[6, 4], 2));
    let cu = Tensor::from_vec([0i64, 70, 72, 150], &[4]).unwrap();
    let packed = short_conv(&x, &w, true, None, Some(&cu)).unwrap().0;
    for (a, n) in [(0, 70), (70, 2), (72, 78)] {
        let alone = short_conv(&x.narrow(1, a, n).unwrap(), &w, true, None, None).unwrap().0;
        assert_eq!(packed.narrow(1, a, n).unwrap().to_vec::<f64>().unwrap(), alone.to_vec::<f64>().unwrap());
    }
    let (whole, last) = short_conv(&x, &w, true, None, None).unwrap();
    let mut state: Option<Tensor> = None;
    for t in 0..150 {
        let (y, s) = short_conv(&x.narrow(1, t, 1).unwrap(), &w, true, state.as_ref(), None).unwrap();
        close(&y, &whole.narrow(1, t, 1).unwrap(), 1e-13);
        state = Some(s);
    }
    close(&state.unwrap(), &last, 1e-13);
}

#[test]
fn bad_arguments() {
    let (x, w) = (randn(&[2, 7, 3], 1), randn(&[3, 4], 2));
    assert!(short_conv(&x, &randn(&[4, 4], 2), true, None, None).is_err());
    assert!(short_conv(&x, &w, true, Some(&randn(&[2, 4, 3], 1)), None).is_err());
    let bad = Tensor::from_vec([0i32, 9, 7], &[3]).unwrap();
    assert!(short_conv(&x, &w, true, None, Some(&bad)).is_err(), "batch 2");
    assert!(short_conv(&x.narrow(0, 0, 1).unwrap(), &w, true, None, Some(&bad)).is_err());
}
