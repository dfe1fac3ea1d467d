//! The mode that reads what each op wrote, and the engine's watch, on CUDA tensors.

use cuda::{Check, Cuda, Graph, Ptr, cuda_kernel};
use engine::watch::{place, watch};
use engine::{DType, Device, Meta, Op, Result, Tensor, run, run_in_place};

fn device(check: Check) -> Device {
    let d = cuda::emulator_with_memory(1 << 24).unwrap();
    Cuda::of(&d).unwrap().set_check(check);
    d
}

/// Two outputs and a hidden one: the second gets bytes that are NaN from element `at` on, the hidden one has them all over.
#[derive(Debug)]
struct Spoil(usize);
impl Op for Spoil {
    fn name(&self) -> &'static str {
        "spoil"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![x[0].clone(); 3])
    }
    fn hidden(&self) -> usize {
        1
    }
}
cuda_kernel!(Spoil => |op, cuda, x, y| {
    let size = x[0].dtype.size();
    let bytes = x[0].layout.numel() * size;
    cuda.copy(Ptr::of(&x[0])?, Ptr::of(&y[0])?, bytes)?;
    cuda.fill(Ptr::of(&y[1])?, 0, bytes)?;
    cuda.fill(Ptr::of(&y[1])?.byte_add(op.0 * size), 0xff, bytes - op.0 * size)?;
    cuda.fill(Ptr::of(&y[2])?, 0xff, bytes)
});

#[test]
fn the_first_nan_is_an_error_with_op_output_and_place() {
    for dtype in [DType::F64, DType::F32, DType::BF16, DType::F16] {
        let d = device(Check::Nan);
        let x = Tensor::full(1.5, &[3, 4], dtype, &d).unwrap();
        let m = run(Spoil(9), &[&x]).unwrap_err().to_string();
        for part in ["spoil", "output 1", &format!("{dtype}[3, 4]"), "NaN at [2, 1]", "3 of its 12", "its inputs are finite"] {
            assert!(m.contains(part), "{part}: {m}");
        }
        // no NaN, however much the hidden output holds
        assert_eq!(run(Spoil(12), &[&x]).unwrap()[1].to_vec::<f64>().unwrap(), [0.0; 12]);
        Cuda::of(&d).unwrap().set_check(Check::Off);
        assert!(run(Spoil(9), &[&x]).is_ok());
    }
}

#[test]
fn inputs_that_held_it_are_named_and_infinity_is_asked_for() {
    let d = device(Check::Nan);
    let bad = Tensor::from_slice(&[1f32, 2.0, f32::NAN, 4.0, 5.0, 6.0], &[2, 3], &d).unwrap();
    // through a view: at its own place
    let m = bad.transpose(0, 1).unwrap().add(&Tensor::ones(&[3, 2], DType::F32, &d).unwrap()).unwrap_err().to_string();
    assert!(m.contains("output 0") && m.contains("input 0 (f32[3, 2]) holds NaN at [2, 0]") && !m.contains("input 1"), "{m}");
    let zero = Tensor::zeros(&[3], DType::F32, &d).unwrap();
    assert_eq!(zero.ln().unwrap().to_vec::<f32>().unwrap(), [f32::NEG_INFINITY; 3]);
    Cuda::of(&d).unwrap().set_check(Check::Finite);
    let m = zero.ln().unwrap_err().to_string();
    assert!(m.contains("ln") && m.contains("-inf at [0]") && m.contains("3 of its 3"), "{m}");
    // in place too
    let target = Tensor::full(3e38, &[3], DType::F32, &d).unwrap();
    let m = run_in_place(engine::prim::AddAssign { meta: target.meta() }, &[&target], &[&target.affine(0.9, 0.0).unwrap()]).unwrap_err().to_string();
    assert!(m.contains("inf at [0]"), "{m}");
}

#[test]
fn a_fault_names_its_op_and_a_recording_is_refused() {
    let d = device(Check::Nan);
    let x = Tensor::ones(&[3], DType::F32, &d).unwrap();
    let at = Tensor::from_slice(&[0i64, 7], &[2], &d).unwrap();
    let m = x.index_select(0, &at).unwrap_err().to_string();
    assert!(m.contains("index_select") && m.contains('7'), "{m}");
    let m = Graph::capture(&d, 1, || x.add(&x)).err().unwrap().to_string();
    assert!(m.contains("TIDEGATE_CUDA_CHECK"), "{m}");
    Cuda::of(&d).unwrap().set_check(Check::Off);
    assert!(Graph::capture(&d, 1, || x.add(&x)).is_ok());
}

#[test]
fn a_watch_sees_what_runs_on_the_device() {
    let d = device(Check::Off);
    let run = |v: &[f32]| {
        let x = Tensor::from_slice(v, &[v.len()], &d).unwrap().requires_grad();
        let (g, seen) = watch(|| {
            place(|| "layer 1".into());
            let h = x.affine(1.0, 0.0)?;
            place(|| "layer 2".into());
            let h = h.sqrt()?;
            place(|| "loss".into());
            h.sum_all()?.backward()
        });
        g.unwrap();
        [seen.infinity, seen.nan].map(|o| o.map_or("-".into(), |o| o.to_string()))
    };
    assert_eq!(run(&[1.0, 4.0]), ["-", "-"]);
    assert_eq!(run(&[1.0, -4.0]), ["-", "`sqrt` in `layer 2` (forward)"]);
    assert_eq!(run(&[1.0, 0.0]), ["`unary_backward` in `layer 2` (backward)", "-"]);
    // a wrong index is not lost because the watch waited for the device
    let x = Tensor::ones(&[3], DType::F32, &d).unwrap();
    let at = Tensor::from_slice(&[5i64], &[1], &d).unwrap();
    let m = watch(|| x.index_select(0, &at)).0.unwrap_err().to_string();
    assert!(m.contains("index_select") && m.contains('5'), "{m}");
}
