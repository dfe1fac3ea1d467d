use super::*;
use crate::testing::{check, close, fails, narrow, randn, strided};
use engine::DType;

#[test]
fn gradient_and_reference() {
    for shape in [vec![3, 5, 14], vec![2], vec![1, 66]] {
        let x = randn(&shape, 1);
        check(|v| Ok(vec![swiglu(&v[0])?]), std::slice::from_ref(&x));
        close(&swiglu(&x).unwrap(), &reference::swiglu(&x).unwrap(), 1e-14);
    }
    check(|v| Ok(vec![swiglu(&strided(&v[0]))?]), &[randn(&[3, 6], 1)]);
}

#[test]
fn narrow_types_stay_within_bounds() {
    let f = |v: &[Tensor]| Ok(vec![swiglu(&v[0])?]);
    narrow("swiglu", f, |v| Ok(vec![reference::swiglu(&v[0])?]), &[randn(&[37, 134], 1)], &[], &[0.005, 0.008]);
}

#[test]
fn bad_arguments_are_named() {
    fails(swiglu(&randn(&[2, 3], 1)), "swiglu: x must have shape [.., 2I], gate first, found [2, 3]");
    fails(swiglu(&randn(&[1], 1).reshape(&[]).unwrap()), "swiglu: x must have shape [.., 2I], gate first, found []");
    fails(swiglu(&randn(&[2, 4], 1).cast(DType::I64).unwrap()), "swiglu: x must be a float dtype, found i64");
    for shape in [[0, 4], [3, 0]] {
        assert_eq!(swiglu(&randn(&shape, 1)).unwrap().shape(), [shape[0], shape[1] / 2]);
    }
}
