//! A device from outside of the engine is one impl and rows in the kernel table; what it lacks is an error that says so.

use engine::prim::{Binary, BinaryKind};
use engine::registry::{Row, View};
use engine::{Backend, Buffer, DType, Device, Error, Meta, Op, Result, Tensor, inventory, registry, run1};
use std::any::{Any, TypeId};
use std::sync::{Arc, Mutex};

/// A device whose memory nobody but it can read.
struct Toy(&'static str);
struct ToyBuffer(Mutex<Vec<u8>>);
impl Buffer for ToyBuffer {
    fn bytes(&self) -> usize {
        self.0.lock().unwrap().len()
    }
}
fn memory(b: &dyn Buffer) -> &Mutex<Vec<u8>> {
    &(b as &dyn Any).downcast_ref::<ToyBuffer>().expect("a toy's buffer").0
}
impl Backend for Toy {
    fn name(&self) -> String {
        self.0.into()
    }
    fn alloc(&self, bytes: usize) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(ToyBuffer(Mutex::new(vec![0xff; bytes]))))
    }
    fn upload(&self, src: &[u8]) -> Result<Arc<dyn Buffer>> {
        Ok(Arc::new(ToyBuffer(Mutex::new(src.to_vec()))))
    }
    fn fill(&self, dst: &dyn Buffer, element: &[u8]) -> Result<()> {
        let n = dst.bytes() / element.len();
        *memory(dst).lock().unwrap() = element.repeat(n);
        Ok(())
    }
    fn download(&self, src: &dyn Buffer, dst: &mut [u8]) -> Result<()> {
        dst.copy_from_slice(&memory(src).lock().unwrap()[..dst.len()]);
        Ok(())
    }
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

/// The engine's own products and sums, on the new device: any strides, f32.
fn toy_binary(op: &dyn Op, _: &dyn Backend, x: &[View], y: &[View]) -> Result<()> {
    let op = (op as &dyn Any).downcast_ref::<Binary>().unwrap();
    let read = |v: &View| -> Vec<f32> {
        let bytes = memory(v.buf).lock().unwrap();
        let at = |mut i: usize| {
            let steps = v.layout.shape.iter().zip(&v.layout.strides).rev();
            let offset = steps.fold(v.layout.offset, |o, (d, s)| {
                let here = i % d;
                i /= d;
                o + here * *s as usize
            });
            f32::from_le_bytes(bytes[4 * offset..4 * offset + 4].try_into().unwrap())
        };
        (0..v.layout.numel()).map(at).collect()
    };
    let (a, b) = (read(&x[0]), read(&x[1]));
    let f = |(a, b): (&f32, &f32)| match op.kind {
        BinaryKind::Add => a + b,
        BinaryKind::Mul => a * b,
        _ => f32::NAN,
    };
    *memory(y[0].buf).lock().unwrap() = a.iter().zip(&b).map(f).flat_map(f32::to_le_bytes).collect();
    Ok(())
}
inventory::submit! { Row { op: TypeId::of::<Binary>, backend: TypeId::of::<Toy>, name: "Binary", place: concat!(file!(), ":", line!()), kernel: toy_binary } }

#[test]
fn a_new_device_is_one_impl_and_a_row() {
    let toy = Device::new(Toy("toy:0"));
    assert_eq!(registry::kernels_of::<Toy>(), ["Binary"]);
    let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0], &[3], &toy).unwrap().requires_grad();
    let w = Tensor::from_vec([10.0f32, 20.0], &[2, 1]).unwrap().to_device(&toy).unwrap();
    let y = x.mul(&w).unwrap().add(&x).unwrap();
    assert_eq!((y.device(), y.shape()), (&toy, &[2, 3][..]));
    assert_eq!(y.to_vec::<f32>().unwrap(), [11.0, 22.0, 33.0, 21.0, 42.0, 63.0]);
    // the gradient runs there too, as far as the rows go
    let (z, seed) = (x.mul(&x.detach()).unwrap(), Tensor::ones(&[3], DType::F32, &toy).unwrap().add(&x.detach()).unwrap());
    let g = z.backward_with(&seed).unwrap();
    assert_eq!(g.get(&x).unwrap().device(), &toy);
    assert_eq!(g.get(&x).unwrap().to_vec::<f32>().unwrap(), [2.0, 6.0, 12.0]);
    let e = x.mul(&x).unwrap().backward_with(&seed).map(|_| ()).unwrap_err();
    assert!(matches!(e, Error::NoKernel { op: "add_assign", .. }), "two gradients of x are added in place: {e}");
    assert!(matches!(y.to_device(&Device::cpu()).unwrap_err(), Error::NoGrad { op: "to_device" }), "never cut silently");
    assert_eq!(y.detach().to_device(&Device::cpu()).unwrap().sum_all().unwrap().item().unwrap(), 192.0);
}

#[test]
fn a_kernel_that_a_device_lacks_is_named() {
    let toy = Device::new(Toy("toy:0"));
    let x = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0], &[2, 2], &toy).unwrap();
    let e = x.exp().unwrap_err();
    assert!(matches!(&e, Error::NoKernel { op: "exp", device } if device == "toy:0"), "{e}");
    assert!(e.to_string().contains("exp") && e.to_string().contains("toy:0"), "{e}");
    // so is the copy that a layout would need: no kernel of another device stands in
    let e = x.transpose(0, 1).unwrap().contiguous().unwrap_err();
    assert!(matches!(&e, Error::NoKernel { op: "contiguous", .. }), "{e}");
}

#[test]
fn two_devices_in_one_op_are_both_named() {
    let (a, b) = (Device::new(Toy("toy:0")), Device::new(Toy("toy:1")));
    assert!(a != b && a != Device::cpu());
    let on = |d: &Device| Tensor::from_slice(&[1.0f32], &[1], d).unwrap();
    for (x, y, first, other) in
        [(on(&a), on(&b), "toy:0", "toy:1"), (on(&b), on(&Device::cpu()), "toy:1", "cpu"), (on(&Device::cpu()), on(&a), "cpu", "toy:0")]
    {
        let e = x.add(&y).unwrap_err();
        assert!(matches!(e, Error::Device { op: "add", .. }));
        let text = e.to_string();
        assert!(text.contains("add") && text.contains(first) && text.contains(other) && text.contains("to_device()"), "{text}");
        let e = x.assign(&y).unwrap_err().to_string();
        assert!(e.contains("assign") && e.contains(first) && e.contains(other), "{e}");
    }
    let e = run1(engine::prim::Select, &[&on(&a), &on(&a), &on(&b)]).unwrap_err().to_string();
    assert!(e.contains("where") && e.contains("toy:1"), "{e}");
}

#[derive(Debug)]
struct Twice;
impl Op for Twice {
    fn name(&self) -> &'static str {
        "registered_twice"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x.to_vec())
    }
}
engine::cpu_kernel!(Twice => |_, x, y| {
    y.slice::<f32>(0)?.copy_from_slice(x.slice::<f32>(0)?);
    Ok(())
});
engine::cpu_kernel!(Twice => |_, _, y| {
    y.slice::<f32>(0)?.fill(2.0);
    Ok(())
});

#[test]
fn two_kernels_for_one_pair_are_an_error_that_names_both() {
    let e = run1(Twice, &[&Tensor::from_vec([1.0f32], &[1]).unwrap()]).unwrap_err();
    assert!(matches!(e, Error::TwoKernels { op: "registered_twice", .. }), "{e}");
    let text = e.to_string();
    assert!(text.contains("cpu") && text.matches("backend.rs:").count() == 2, "{text}");
}
