//! The shared expert's part of the sum: `y + sigmoid(gate) · s`, in one pass.

use crate::cuda::{FLOATS, aligned, blocks, float};
use cuda::kernel::cpp;
use cuda::{Cuda, Kernel, Ptr, cuda_kernel, cuda_source, params};
use engine::cpu::simd::{Real, dot};
use engine::cpu::{Inputs, Outputs};
use engine::{DType, Error, Meta, Op, Result, Saved, Tensor, View, cpu_kernel, dispatch_real, run, run1};
use rayon::prelude::*;
use std::ops::RangeInclusive;

/// y and s `[N, H]`, gate `[N, 1]`.
#[derive(Debug)]
pub struct AddShared;

impl Op for AddShared {
    fn name(&self) -> &'static str {
        "add_shared"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let op = "add_shared";
        let [n, _] = x[0].shape[..] else { return Err(Error::shape(op, "y", "[tokens, hidden]", &x[0].shape)) };
        for (m, name, shape) in [(&x[1], "s", &x[0].shape), (&x[2], "gate", &vec![n, 1])] {
            if m.shape != *shape {
                return Err(Error::shape(op, name, format!("{shape:?}"), &m.shape));
            }
            if m.dtype != x[0].dtype || !m.dtype.is_float() {
                return Err(Error::dtype(op, name, "a float dtype, as y", m.dtype));
            }
        }
        Ok(vec![x[0].clone()])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![1, 2], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None; 3]) };
        let g = run(AddSharedBackward, &[dy, s.input(1)?, s.input(2)?])?;
        Ok([dy.clone()].into_iter().chain(g).map(Some).collect())
    }
}

/// Gradients of s and gate; inputs: dy, s, gate.
#[derive(Debug)]
pub struct AddSharedBackward;

impl Op for AddSharedBackward {
    fn name(&self) -> &'static str {
        "add_shared_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(x[1..].to_vec())
    }
}

/// `y + sigmoid(gate) · s` of y and s `[N, H]` and gate `[N, 1]`, all of one float dtype.
pub fn add_shared(y: &Tensor, s: &Tensor, gate: &Tensor) -> Result<Tensor> {
    run1(AddShared, &[y, s, gate])
}

cpu_kernel!(AddShared => |_, x, y| dispatch_real!(x.dtype(0), |F| forward::<F>(x, y)));
cpu_kernel!(AddSharedBackward => |_, x, y| dispatch_real!(x.dtype(0), |F| backward::<F>(x, y)));

fn forward<F: Real>(x: &Inputs, y: &mut Outputs) -> Result<()> {
    let h = x.shape(0)[1].max(1);
    let (v, s, gate, mut out) = (x.real::<F>(0)?, x.real::<F>(1)?, x.real::<F>(2)?, y.real::<F>(0)?);
    out.par_chunks_mut(h).zip(v.par_chunks(h)).zip(s.par_chunks(h)).zip(&gate[..]).for_each(|(((o, v), s), gate)| {
        let g = gate.sigmoid();
        o.iter_mut().zip(v).zip(s).for_each(|((o, v), s)| *o = g.mul_add(*s, *v));
    });
    Ok(())
}

fn backward<F: Real>(x: &Inputs, y: &mut Outputs) -> Result<()> {
    let h = x.shape(0)[1];
    let (dy, s, gate) = (x.real::<F>(0)?, x.real::<F>(1)?, x.real::<F>(2)?);
    let (mut ds, mut dgate) = (y.real::<F>(0)?, y.real::<F>(1)?);
    if h == 0 {
        dgate.fill(F::ZERO);
        return Ok(());
    }
    let rows = ds.par_chunks_mut(h).zip(dgate.par_iter_mut()).zip(dy.par_chunks(h)).zip(s.par_chunks(h)).zip(&gate[..]);
    rows.for_each(|((((ds, dgate), dy), s), gate)| {
        let g = gate.sigmoid();
        *dgate = dot(dy, s) * g * (F::ONE - g);
        ds.iter_mut().zip(dy).for_each(|(ds, dy)| *ds = *dy * g);
    });
    Ok(())
}

cuda_source!(static SHARED = "shared.cu", kernels: || FLOATS.into_iter().flat_map(|d| [kernel("add_shared", d), kernel("add_shared_backward", d)]).collect(),
    headers: ["../ops.cuh"]);

params! {
    struct SharedParams { y: Ptr, s: Ptr, gate: Ptr, out: Ptr, dgate: Ptr, rows: u32, width: u32, wide: u32, unused: u32 }
}

const THREADS: u32 = 256;

fn kernel(name: &str, d: DType) -> Kernel {
    Kernel::new(&SHARED, format!("{name}<{}>", cpp(d)), THREADS)
}

fn launch(cuda: &Cuda, name: &'static str, x: &[View], y: &[View]) -> Result<()> {
    let dtype = float(name, "y", &x[0])?;
    let (n, h) = (x[0].layout.shape[0], x[0].layout.shape[1]);
    let wide = aligned(16, &[&x[0], &x[1], &y[0]])? && (h * dtype.size()).is_multiple_of(16);
    let p = SharedParams {
        y: Ptr::of(&x[0])?,
        s: Ptr::of(&x[1])?,
        gate: Ptr::of(&x[2])?,
        out: Ptr::of(&y[0])?,
        dgate: Ptr::of_option(y.get(1))?,
        rows: n as u32,
        width: h as u32,
        wide: wide as u32,
        unused: 0,
    };
    cuda.launch(&kernel(name, dtype), [blocks(name, n, THREADS as usize / 32)?, 1, 1], 0, &p)
}
cuda_kernel!(AddShared => |_, cuda, x, y| launch(cuda, "add_shared", x, y));
cuda_kernel!(AddSharedBackward => |_, cuda, x, y| launch(cuda, "add_shared_backward", x, y));
