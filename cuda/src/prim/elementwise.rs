//! Functions of one, two and three tensors, element by element.

use super::{ALL, FLOATS, Nest, THREADS, blocks};
use crate::kernel::cpp;
use crate::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::prim::{AddAssign, Binary, BinaryKind, Compare, CompareKind, Select, Unary, UnaryBackward, UnaryKind};
use engine::{DType, Op, Result, View};

cuda_source!(static SOURCE = "elementwise.cu", kernels: kernels, headers: ["prim.cuh"]);

params! {
    struct UnaryParams { x: Ptr, dy: Ptr, out: Ptr, n: u64, a: f64, b: f64, kind: u32, unused: u32 }
    struct NestParams { x: [Ptr; 3], out: Ptr, kind: u32, vectors: u32, nest: Nest }
}

fn kernel(name: &str, d: DType) -> Kernel {
    Kernel::new(&SOURCE, format!("{name}<{}>", cpp(d)), THREADS)
}
fn select_kernel(bytes: usize) -> Kernel {
    Kernel::new(&SOURCE, format!("select<{bytes}>"), THREADS)
}
fn kernels() -> Vec<Kernel> {
    let floats = ["unary", "unary_backward"].into_iter().flat_map(|n| FLOATS.map(|d| kernel(n, d)));
    let all = ["binary", "compare"].into_iter().flat_map(|n| ALL.map(|d| kernel(n, d)));
    floats.chain(all).chain([1, 2, 4, 8].map(select_kernel)).collect()
}

/// Number and attributes, as elementwise.cu lists them.
fn number(kind: UnaryKind) -> (u32, f64, f64) {
    use UnaryKind::*;
    match kind {
        Neg => (0, 0., 0.),
        Exp => (1, 0., 0.),
        Ln => (2, 0., 0.),
        Sqrt => (3, 0., 0.),
        Rsqrt => (4, 0., 0.),
        Recip => (5, 0., 0.),
        Square => (6, 0., 0.),
        Abs => (7, 0., 0.),
        Relu => (8, 0., 0.),
        Sigmoid => (9, 0., 0.),
        Silu => (10, 0., 0.),
        Softplus => (11, 0., 0.),
        Tanh => (12, 0., 0.),
        Sin => (13, 0., 0.),
        Cos => (14, 0., 0.),
        Affine(a, b) => (15, a, b),
        Pow(p) => (16, p, 0.),
    }
}

fn unary(cuda: &Cuda, name: &str, kind: UnaryKind, x: &[View], y: &[View]) -> Result<()> {
    let (d, n) = (x[0].dtype, y[0].layout.numel());
    let ((kind, a, b), k) = (number(kind), kernel(name, d));
    let p = UnaryParams { x: Ptr::of(&x[0])?, dy: Ptr::of_option(x.get(1))?, out: Ptr::of(&y[0])?, n: n as u64, a, b, kind, unused: 0 };
    cuda.launch(&k, blocks(&k, n, 16 / d.size()), 0, &p)
}
cuda_kernel!(Unary => |op, cuda, x, y| unary(cuda, "unary", op.kind, x, y));
cuda_kernel!(UnaryBackward => |op, cuda, x, y| unary(cuda, "unary_backward", op.kind, x, y));

/// Launches a kernel over views of one shape.
fn nest(op: &dyn Op, cuda: &Cuda, k: &Kernel, kind: u32, per: usize, x: &[&View], y: &View) -> Result<()> {
    let nest = Nest::new(op.name(), &x.iter().map(|v| v.layout).collect::<Vec<_>>())?;
    let mut p = NestParams { x: [Ptr::NULL; 3], out: Ptr::of(y)?, kind, vectors: 0, nest };
    let aligned = |p: Ptr| p.0.is_multiple_of(16);
    // elements of 16 bytes: rows must be whole vectors, but for a single row's end
    let (last, n) = (nest.dims as usize - 1, 16 / y.dtype.size() as u64);
    let mut vectors = aligned(p.out) && (last == 0 || nest.length[last].is_multiple_of(n));
    for (i, v) in x.iter().enumerate() {
        p.x[i] = Ptr::of(v)?;
        let whole = |s: &i64| (*s as u64).is_multiple_of(n);
        vectors &= match nest.stride[i][last] {
            1 => aligned(p.x[i]) && nest.stride[i][..last].iter().all(whole),
            s => s == 0,
        };
    }
    p.vectors = vectors as u32;
    cuda.launch(k, blocks(k, nest.n as usize, per), 0, &p)
}
fn arithmetic(kind: BinaryKind) -> u32 {
    match kind {
        BinaryKind::Add => 0,
        BinaryKind::Sub => 1,
        BinaryKind::Mul => 2,
        BinaryKind::Div => 3,
        BinaryKind::Max => 4,
        BinaryKind::Min => 5,
    }
}
fn comparison(kind: CompareKind) -> u32 {
    match kind {
        CompareKind::Eq => 0,
        CompareKind::Lt => 1,
        CompareKind::Le => 2,
    }
}
fn binary(op: &dyn Op, cuda: &Cuda, kind: BinaryKind, x: &[&View], y: &View) -> Result<()> {
    nest(op, cuda, &kernel("binary", x[0].dtype), arithmetic(kind), 16 / x[0].dtype.size(), x, y)
}
cuda_kernel!(Binary => |op, cuda, x, y| binary(op, cuda, op.kind, &[&x[0], &x[1]], &y[0]));
// each thread reads its own element of the target before it writes it
cuda_kernel!(AddAssign => |op, cuda, x, y| binary(op, cuda, BinaryKind::Add, &[&y[0], &x[0]], &y[0]));
cuda_kernel!(Compare => |op, cuda, x, y| nest(op, cuda, &kernel("compare", x[0].dtype), comparison(op.kind), 8, &[&x[0], &x[1]], &y[0]));
cuda_kernel!(Select => |op, cuda, x, y| nest(op, cuda, &select_kernel(x[1].dtype.size()), 0, 8, &[&x[0], &x[1], &x[2]], &y[0]));
