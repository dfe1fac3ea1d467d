//! The gradient check itself: right gradients pass at 1e-9 whatever their size, wrong ones do not.

use engine::{DType, Device, Meta, Op, Result, Saved, Tensor, gradcheck, run1};

/// y = scale · x², with a gradient that is off by a factor in one element.
#[derive(Debug)]
struct Square {
    scale: f64,
    factor: f64,
}
impl Op for Square {
    fn name(&self) -> &'static str {
        "a_test's_square"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x.to_vec())
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![0], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let x = s.input(0)?;
        let mut factors = vec![2.0 * self.scale; x.numel()];
        factors[1] *= self.factor;
        Ok(vec![Some(dy[0].as_ref().unwrap().mul(x)?.mul(&Tensor::from_vec(factors, x.shape())?)?)])
    }
}
engine::cpu_kernel!(Square => |op, x, y| {
    y.slice::<f64>(0)?.iter_mut().zip(x.slice::<f64>(0)?).for_each(|(y, x)| *y = op.scale * x * x);
    Ok(())
});

fn square(scale: f64, factor: f64) -> f64 {
    let x = Tensor::from_vec([0.7, -1.2, 0.4], &[3]).unwrap();
    gradcheck(|x| Ok(vec![run1(Square { scale, factor }, &[&x[0]])?]), &[x], 1e-5).unwrap().worst
}

#[test]
fn errors_are_relative_to_the_gradient() {
    for scale in [1e4, 1.0, 1e-2, 1e-4] {
        assert!(square(scale, 1.0) < 1e-9, "{scale:e}: {:e}", square(scale, 1.0));
        for wrong in [1.01, 0.0, -1.0, 1.0 + 3e-6] {
            let e = square(scale, wrong);
            assert!((e / (wrong - 1.0).abs() - 1.0).abs() < 1e-3, "{scale:e} {wrong}: {e:e}");
        }
    }
}

#[test]
fn a_small_element_beside_a_large_one_is_seen() {
    // gradients of about 1 and 1e-4: an error of 1 % in the second
    let x = Tensor::from_vec([1.0, 1e-4, 1.0], &[3]).unwrap();
    let wrong = |factor| gradcheck(|x| Ok(vec![run1(Square { scale: 1.0, factor }, &[&x[0]])?]), std::slice::from_ref(&x), 1e-5).unwrap();
    wrong(1.0).within(1e-8).unwrap();
    let e = wrong(1.01).within(1e-6).unwrap_err().to_string();
    assert!(e.contains("leaf 0 element 1"), "{e}");
}

#[test]
fn zero_gradients_are_zero() {
    // a softmax sums to one: its gradient is zero but for rounding
    let x = Tensor::randn(&[3, 5], DType::F64, &Device::cpu(), 3, 0).unwrap();
    gradcheck(|x| Ok(vec![x[0].softmax(1)?.sum(&[1], false)?]), std::slice::from_ref(&x), 1e-5).unwrap().within(1e-6).unwrap();
    gradcheck(|x| Ok(vec![x[0].affine(0.0, 1.0)?]), std::slice::from_ref(&x), 1e-5).unwrap().within(0.0).unwrap();
    // and where it is not, a backward that says so is found out
    assert!(square(1e-4, 0.0) > 0.9);
    let cut = gradcheck(|x| Ok(vec![x[0].detach().exp()?.add(&x[0].affine(0.0, 0.0)?)?]), &[x], 1e-5).unwrap();
    assert!(cut.worst > 0.9);
}

#[test]
fn kinks_beside_the_point_do_no_harm() {
    let x = Tensor::from_vec([1e-4, -3e-5, 1.5e-4, 5e-6, 1.0], &[5]).unwrap();
    gradcheck(|x| Ok(vec![x[0].relu()?.add(&x[0].abs()?)?]), &[x], 1e-5).unwrap().within(1e-8).unwrap();
}

#[test]
fn nan_never_passes() {
    let x = Tensor::from_vec([-1.0, 1.0], &[2]).unwrap();
    assert!(gradcheck(|x| Ok(vec![x[0].sqrt()?]), &[x], 1e-5).unwrap().within(1e300).is_err());
}

#[test]
fn leaves_must_be_f64_and_outputs_floats() {
    let x = Tensor::ones(&[2], DType::F32, &Device::cpu()).unwrap();
    let e = gradcheck(|x| Ok(x.to_vec()), std::slice::from_ref(&x), 1e-5).unwrap_err().to_string();
    assert!(e.contains("f64") && e.contains("f32"), "{e}");
    let e = gradcheck(|x| Ok(vec![x[0].argmax(0)?]), &[x.cast(DType::F64).unwrap()], 1e-5).unwrap_err().to_string();
    assert!(e.contains("no float output"), "{e}");
}
