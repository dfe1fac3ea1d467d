use super::*;
use crate::testing::{bits, check, close, fails, narrow, randn, strided, upstream, whole};
use engine::DType;

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
    for (b, t, c, k) in [(2, 6, 3, 4), (1, 2, 3, 4), (1, 70, 2, 3), (2, 3, 2, 1)] {
        let (x, w, s) = (randn(&[b, t, c], 1), randn(&[c, k], 2), randn(&[b, k - 1, c], 3));
        for silu in [false, true] {
            let f = |v: &[Tensor]| short_conv(&v[0], &v[1], silu, Some(&v[2]), None).map(|(y, s)| vec![y, s]);
            check(f, &[x.clone(), w.clone(), s.clone()]);
            check(|v| Ok(vec![short_conv(&v[0], &v[1], silu, None, None)?.0]), &[x.clone(), w.clone()]);
        }
        if k > 1 {
            check(|v| Ok(vec![short_conv(&v[0], &w, true, Some(&v[1]), None)?.1]), &[x, s]);
        }
    }
    check(|v| Ok(vec![short_conv(&strided(&v[0]), &v[1], true, None, None)?.0]), &[randn(&[2, 5, 3, 2], 1), randn(&[6, 1, 4], 2)]);
    // the last document shorter than the state, and longer
    for last in [2, 6] {
        let cu = Tensor::from_vec([0i32, 2, 2, last, 7], &[5]).unwrap();
        for silu in [false, true] {
            let f = |v: &[Tensor]| short_conv(&v[0], &v[1], silu, None, Some(&cu)).map(|(y, s)| vec![y, s]);
            check(f, &[randn(&[1, 7, 3], 1), randn(&[3, 4], 2)]);
        }
    }
}

#[test]
fn narrow_types_stay_within_bounds() {
    let leaves = [randn(&[2, 131, 24], 1), randn(&[24, 4], 2)];
    for wide in [&[][..], &[1]] {
        for silu in [false, true] {
            let f = |v: &[Tensor]| Ok(vec![short_conv(&v[0], &v[1], silu, None, None)?.0]);
            narrow("short_conv", f, |v| Ok(vec![reference(&v[0], &v[1], silu)]), &leaves, wide, &[0.005, 0.008, 0.008]);
        }
    }
    let leaves = [&leaves[..], &[randn(&[2, 3, 24], 3)]].concat();
    let f = |v: &[Tensor]| short_conv(&v[0], &v[1], true, Some(&v[2]), None).map(|(y, s)| vec![y, s]);
    let composed = |v: &[Tensor]| super::reference::short_conv_from(&v[0], &v[1], true, &v[2]).map(|(y, s)| vec![y, s]);
    narrow("short_conv with a state", f, composed, &leaves, &[2], &[0.005, 0.005, 0.008, 0.008, 0.008]);
}

#[test]
fn packed_documents_equal_separate_ones_to_the_bit() {
    let cu = [0i64, 1, 3, 3, 66, 130, 195, 400];
    let packed = Tensor::from_vec(cu, &[cu.len()]).unwrap();
    for d in [DType::F32, DType::BF16, DType::F64] {
        let (x, w) = (randn(&[1, 400, 6], 1).cast(d).unwrap(), randn(&[6, 4], 2).cast(crate::dtypes::sums(d)).unwrap());
        for silu in [false, true] {
            let run = |x: &Tensor, cu: Option<&Tensor>, dy: &Tensor| {
                whole(|v| Ok(vec![short_conv(&v[0], &v[1], silu, None, cu)?.0]), &[x.clone(), w.clone()], |_, _| dy.clone())
            };
            let dy = upstream(0, &x);
            let together = run(&x, Some(&packed), &dy);
            let mut dw: Option<Tensor> = None;
            for c in cu.windows(2) {
                let cut = |x: &Tensor| x.narrow(1, c[0] as usize, (c[1] - c[0]) as usize).unwrap();
                let alone = run(&cut(&x), None, &cut(&dy));
                for i in [0, 1] {
                    assert_eq!(bits(&alone[i]), bits(&cut(&together[i])), "{d} document {c:?} result {i}");
                }
                dw = Some(dw.map_or(alone[2].clone(), |dw| dw.add(&alone[2]).unwrap()));
            }
            assert_eq!(bits(&dw.unwrap()), bits(&together[2]), "{d}: the weight's gradient is the sum over the documents, in their order");
        }
    }
}

#[test]
fn stepwise_is_whole() {
    let (x, w) = (randn(&[1, 150, 6], 1), randn(&[6, 4], 2));
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
fn bad_arguments_are_named() {
    let (x, w) = (randn(&[2, 7, 3], 1), randn(&[3, 4], 2));
    let one = x.narrow(0, 0, 1).unwrap();
    let cu = |v: &[i32]| Tensor::from_vec(v, &[v.len()]).unwrap();
    let packed = |x: &Tensor, cu: &Tensor| short_conv(x, &w, true, None, Some(cu));
    fails(short_conv(&w, &w, true, None, None), "short_conv: x must have shape [B, T, C] or [B, T, H, D], found [3, 4]");
    fails(short_conv(&x.cast(DType::I64).unwrap(), &w, true, None, None), "short_conv: x must be a float dtype, found i64");
    fails(short_conv(&x, &randn(&[4, 4], 2), true, None, None), "short_conv: weight must have shape [3, 1, K] or [3, K], found [4, 4]");
    fails(short_conv(&x, &randn(&[3, 0], 2), true, None, None), "short_conv: weight must have shape");
    fails(short_conv(&x, &w.cast(DType::F32).unwrap(), true, None, None), "short_conv: weight must be f64 as the input, or f64, found f32");
    fails(short_conv(&x, &w, true, Some(&randn(&[2, 4, 3], 1)), None), "short_conv: state must be f64[2, 3, 3], found f64[2, 4, 3]");
    fails(short_conv(&one, &w, true, Some(&randn(&[1, 3, 3], 1)), Some(&cu(&[0, 7]))), "a state cannot be given with cu_seqlens");
    fails(packed(&x, &cu(&[0, 7])), "short_conv: cu_seqlens needs batch 1 (all documents packed into one row), found batch 2");
    fails(packed(&one, &randn(&[2], 1)), "short_conv: cu_seqlens must be i32 or i64, found f64");
    fails(packed(&one, &cu(&[7])), "short_conv: cu_seqlens must have shape [documents + 1], found [1]");
    for bad in [[0, 9, 7], [1, 3, 7], [0, 3, 6]] {
        fails(packed(&one, &cu(&bad)), "short_conv: cu_seqlens must rise from 0 to the packed length 7, found [");
    }
    let none = one.narrow(1, 0, 0).unwrap();
    assert_eq!(short_conv(&none, &w, true, None, None).unwrap().0.shape(), [1, 0, 3]);
}
