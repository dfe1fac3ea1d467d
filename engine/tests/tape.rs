//! What the tape promises: right gradients through sharing, nothing cut silently, no growth, no recursion.

use engine::{DType, Device, Error, Grads, Meta, Op, Result, Tensor, checkpoint, gradcheck, no_grad, run1};

fn leaf(v: &[f64]) -> Tensor {
    Tensor::from_vec(v, &[v.len()]).unwrap().requires_grad()
}

#[test]
fn shared_values_accumulate() {
    let x = leaf(&[2.0, 3.0]);
    let y = x.mul(&x).unwrap();
    let z = y.add(&y).unwrap().add(&x).unwrap().sum_all().unwrap();
    let mut g = Grads::new();
    z.backward_into(&mut g).unwrap();
    assert_eq!(g.get(&x).unwrap().to_vec::<f64>().unwrap(), [9.0, 13.0]);
    x.sum_all().unwrap().backward_into(&mut g).unwrap();
    assert_eq!(g.get(&x).unwrap().to_vec::<f64>().unwrap(), [10.0, 14.0], "a second backward adds");
    assert_eq!(g.len(), 1);
}

#[test]
fn a_second_backward_is_an_error() {
    let x = leaf(&[2.0]);
    let y = x.square().unwrap();
    y.backward().unwrap();
    let e = y.backward().err().unwrap();
    assert!(matches!(e, Error::Freed { op: "square" }), "{e}");
}

#[test]
fn changing_a_saved_tensor_in_place_is_an_error() {
    let x = leaf(&[2.0]);
    let y = x.square().unwrap();
    x.assign(&Tensor::from_vec([5.0f64], &[1]).unwrap()).unwrap();
    assert!(matches!(y.backward().err().unwrap(), Error::Modified { op: "square" }));
    assert_eq!(x.to_vec::<f64>().unwrap(), [5.0]);
}

#[test]
fn changing_what_was_recorded_is_an_error() {
    let x = leaf(&[2.0]);
    let y = x.square().unwrap();
    let c = Tensor::from_vec([5.0f64], &[1]).unwrap();
    assert!(y.assign(&c).unwrap_err().to_string().contains("detach()"), "its gradient would be that of x²");
    assert!(matches!(c.assign(&y).unwrap_err(), Error::NoGrad { op: "assign" }), "the gradient of y would be cut off");
    no_grad(|| c.assign(&y)).unwrap();
    assert_eq!(c.item().unwrap(), 4.0);
    x.assign(&c).unwrap();
}

#[test]
fn integers_need_no_gradient() {
    let i = Tensor::from_vec([1i64], &[1]).unwrap().requires_grad();
    let e = i.cast(DType::F64).unwrap_err().to_string();
    assert!(e.contains("cast") && e.contains("found i64"), "{e}");
}

#[test]
fn a_wrong_number_of_inputs_is_an_error() {
    use engine::prim;
    let a = Tensor::ones(&[2, 2], DType::F64, &Device::cpu()).unwrap();
    let errors = [
        run1(prim::MatMul::default(), &[&a]).err(),
        run1(prim::Select, &[&a, &a]).err(),
        run1(prim::Gather { axis: 0 }, &[&a]).err(),
        run1(prim::Contiguous, &[&a, &a]).err(),
        run1(prim::Softmax { log: false }, &[&a; 3]).err(),
        engine::run_on(prim::Cat { axis: 0 }, &Device::cpu(), &[]).err(),
        engine::run_in_place(prim::Assign { meta: a.meta() }, &[&a], &[]).err(),
        Tensor::cat(&[], 0).err(),
    ];
    for (i, e) in errors.into_iter().enumerate() {
        assert!(e.is_some_and(|e| e.to_string().contains("inputs")), "case {i}");
    }
    assert!(run1(HidesTooMuch, &[&a]).unwrap_err().to_string().contains("hides 2 of 1"));
}
#[derive(Debug)]
struct HidesTooMuch;
impl Op for HidesTooMuch {
    fn name(&self) -> &'static str {
        "hides_too_much"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x.to_vec())
    }
    fn hidden(&self) -> usize {
        2
    }
}

#[derive(Debug)]
struct NoKernel;
impl Op for NoKernel {
    fn name(&self) -> &'static str {
        "no_kernel"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x.to_vec())
    }
}
#[derive(Debug)]
struct NoBackward;
impl Op for NoBackward {
    fn name(&self) -> &'static str {
        "no_backward"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x.to_vec())
    }
    fn differentiable(&self) -> bool {
        false
    }
}
engine::cpu_kernel!(NoBackward => |_, x, y| {
    y.slice::<f64>(0)?.copy_from_slice(x.slice::<f64>(0)?);
    Ok(())
});
#[derive(Debug)]
struct WrongGradient;
impl Op for WrongGradient {
    fn name(&self) -> &'static str {
        "wrong_gradient"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x.to_vec())
    }
    fn backward(&self, _: &engine::Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![Some(dy[0].as_ref().unwrap().sum_all()?)])
    }
}
engine::cpu_kernel!(WrongGradient => |_, x, y| {
    y.slice::<f64>(0)?.copy_from_slice(x.slice::<f64>(0)?);
    Ok(())
});

#[test]
fn missing_kernels_and_backwards_are_named() {
    let x = leaf(&[1.0]);
    let e = run1(NoKernel, &[&x]).err().unwrap().to_string();
    assert!(e.contains("no_kernel") && e.contains("cpu"), "{e}");
    let e = run1(NoBackward, &[&x]).err().unwrap();
    assert!(matches!(e, Error::NoGrad { op: "no_backward" }), "never cut silently: {e}");
    assert_eq!(run1(NoBackward, &[&x.detach()]).unwrap().to_vec::<f64>().unwrap(), [1.0]);
    assert!(no_grad(|| run1(NoBackward, &[&x])).is_ok());
    let x = leaf(&[1.0, 2.0]);
    let e = run1(WrongGradient, &[&x]).unwrap().sum_all().unwrap().backward().err().unwrap();
    assert!(matches!(e, Error::BadGradient { op: "wrong_gradient", input: 0, .. }), "{e}");
}

#[test]
fn bad_arguments_are_errors_that_name_the_op() {
    let f = |s: &[usize]| Tensor::zeros(s, DType::F32, &Device::cpu()).unwrap();
    let errors = [
        f(&[2, 3]).add(&f(&[4])).err(),
        f(&[2, 3]).matmul(&f(&[2, 3])).err(),
        f(&[2]).add(&f(&[2]).cast(DType::F64).unwrap()).err(),
        f(&[2]).reshape(&[3]).err(),
        f(&[2]).narrow(0, 1, 2).err(),
        f(&[2]).narrow(0, usize::MAX, 2).err(),
        f(&[2]).permute(&[1]).err(),
        f(&[2]).sum(&[1], false).err(),
        f(&[2, 0]).max(&[1], false).err(),
        f(&[2]).index_select(0, &Tensor::from_vec([2i64], &[1]).unwrap()).err(),
        f(&[2]).index_select(0, &Tensor::from_vec([-1i32], &[1]).unwrap()).err(),
        f(&[2]).topk(3).err(),
        f(&[2]).cast(DType::I64).unwrap().exp().err(),
        f(&[2, 2]).backward().err(),
        f(&[1]).backward().err(),
        Tensor::zeros(&[usize::MAX, 2], DType::F32, &Device::cpu()).err(),
        Tensor::zeros(&[0, 1 << 62, 1 << 62], DType::F32, &Device::cpu()).err(),
        f(&[2, 3]).mean(&[0, 0], false).err(),
        f(&[2, 3]).sum(&[1, 0, 1], true).err(),
        f(&[2]).pad(0, usize::MAX, 1).err(),
        Tensor::cat(&[&f(&[2, 0]).expand(&[2, 0]).unwrap(), &f(&[1, 1]).expand(&[2, usize::MAX >> 8]).unwrap()], 1).err(),
        f(&[1]).expand(&[usize::MAX / 2, 4]).err(),
        Tensor::from_vec([1.0f32], &[2]).err(),
    ];
    for (i, e) in errors.iter().enumerate() {
        assert!(e.as_ref().is_some_and(|e| e.to_string().len() > 20), "case {i}: {e:?}");
    }
}

#[test]
fn tensors_larger_than_the_machine_are_errors() {
    let (cpu, shape) = (Device::cpu(), [1usize << 40]);
    for t in [
        Tensor::zeros(&shape, DType::F32, &cpu),
        Tensor::ones(&shape, DType::U8, &cpu),
        Tensor::full(2.0, &shape, DType::BF16, &cpu),
        Tensor::rand(&shape, DType::F64, &cpu, 1, 0),
        Tensor::randn(&shape, DType::F32, &cpu, 1, 0),
    ] {
        assert!(matches!(t.unwrap_err(), Error::OutOfMemory { .. }));
    }
    // made in parts, and the same numbers
    let x = Tensor::randn(&[3, 200_001], DType::F64, &cpu, 1, 2).unwrap();
    assert_eq!(x.to_vec::<f64>().unwrap(), engine::rng::normal(1, 2, 600_003));
    assert!(Tensor::full(3.0, &[700_001], DType::I32, &cpu).unwrap().to_vec::<i32>().unwrap().iter().all(|v| *v == 3));
}

#[test]
fn dropping_a_long_chain_of_checkpoints_does_not_recurse() {
    // through the tensors that checkpointed functions capture; a chain of plain nodes: memory.rs
    let mut x = leaf(&[1.0]);
    for _ in 0..100_000 {
        let captured = x.clone();
        x = checkpoint(move |_| Ok(vec![captured.neg()?]), &[]).unwrap().remove(0);
    }
    drop(x);
}

#[test]
fn checkpointing_gives_the_same_gradients_captures_included() {
    let w = Tensor::randn(&[4, 4], DType::F64, &Device::cpu(), 1, 1).unwrap();
    let x = Tensor::randn(&[3, 4], DType::F64, &Device::cpu(), 1, 2).unwrap();
    let block = |x: &Tensor, w: &Tensor| x.matmul(w)?.tanh();
    gradcheck(
        |v| {
            let (w, w2) = (v[1].clone(), v[1].square()?);
            let y = checkpoint(move |x| Ok(vec![block(&block(&x[0], &w)?, &w2)?]), &[&v[0]])?;
            Ok(vec![y[0].square()?])
        },
        &[x, w],
        1e-5,
    )
    .unwrap()
    .within(1e-8)
    .unwrap();
}

#[test]
fn checkpointing_cuts_nothing_silently() {
    let x = Tensor::ones(&[2], DType::F64, &Device::cpu()).unwrap();
    let y = checkpoint(|x| Ok(vec![x[0].square()?]), &[&x]).unwrap();
    assert!(!y[0].is_tracked(), "nothing needs a gradient");
    let runs = std::sync::atomic::AtomicUsize::new(0);
    let fickle = move |x: &[Tensor]| {
        let n = 2 - runs.fetch_add(1, std::sync::atomic::Ordering::Relaxed).min(1);
        (0..n).map(|_| x[0].square()).collect()
    };
    let y = checkpoint(fickle, &[&leaf(&[1.0])]).unwrap();
    let e = y[1].backward().err().unwrap().to_string();
    assert!(e.contains("[f64[1], f64[1]] at first and [f64[1]]"), "{e}");
}
