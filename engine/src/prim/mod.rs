//! Primitive operations: each a plain [`Op`](crate::Op) with its gradient and its CPU kernel, offered as methods of [`Tensor`](crate::Tensor).

mod binary;
mod cast;
mod index;
mod matmul;
mod reduce;
mod self_tests;
mod shape;
mod softmax;
mod sort;
mod unary;

pub use binary::{Binary, BinaryKind, Compare, CompareKind, Select};
pub use cast::Cast;
pub use index::{Gather, IndexAdd, IndexSelect, ScatterAdd};
pub use matmul::{MasterLinear, MatMul};
pub use reduce::{ArgMax, CumSum, MaxReduce, Sum};
pub use shape::{AddAssign, Assign, Cat, Contiguous, Pad, ViewOp};
pub use softmax::{Softmax, SoftmaxBackward};
pub use sort::{Sort, TopK};
pub use unary::{Unary, UnaryBackward, UnaryKind};

use crate::cpu::convert::{PIECE, convert};
use crate::cpu::simd::Real;
use crate::cpu::{Inputs, Outputs};
use crate::{DType, Element, Error, Meta, Result};
use half::{bf16, f16};
use rayon::prelude::*;

/// Elements per task below which threads cost more than they bring; fixed, so that the split depends on shapes alone.
pub(crate) const GRAIN: usize = 16 * 1024;

/// Calls `f(row of out, offsets into each input)` for every row (last axis) of a broadcast loop nest, rows in parallel.
pub(crate) fn for_rows<T: Send>(out: &mut [T], shape: &[usize], strides: &[Vec<isize>], f: impl Fn(&mut [T], &[usize]) + Sync) {
    let inner = shape.last().copied().unwrap_or(1);
    if out.is_empty() {
        return;
    }
    let run = |task: usize, rows: &mut [T], per: usize| {
        let mut offs = vec![0; strides.len()];
        if out_is_one_row(shape) {
            for (o, s) in offs.iter_mut().zip(strides) {
                *o = task * per * s[s.len() - 1] as usize;
            }
            return f(rows, &offs);
        }
        for (r, row) in rows.chunks_mut(inner).enumerate() {
            let mut i = task * (per / inner) + r;
            offs.fill(0);
            for a in (0..shape.len() - 1).rev() {
                let at = i % shape[a];
                i /= shape[a];
                offs.iter_mut().zip(strides).for_each(|(o, s)| *o += at * s[a] as usize);
            }
            f(row, &offs);
        }
    };
    let per = if out_is_one_row(shape) { GRAIN } else { GRAIN.div_ceil(inner) * inner };
    if out.len() <= per {
        run(0, out, per);
    } else {
        out.par_chunks_mut(per).enumerate().for_each(|(t, rows)| run(t, rows, per));
    }
}

fn out_is_one_row(shape: &[usize]) -> bool {
    shape.len() <= 1
}

/// Runs `f(start, chunk)` over fixed chunks of `out` in parallel.
pub(crate) fn for_chunks<T: Send>(out: &mut [T], chunk: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if out.len() <= chunk {
        return f(0, out);
    }
    out.par_chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i * chunk, c));
}

/// Output 0 = f(inputs 0 to N, output 0) over chunks of contiguous float tensors of one shape, in parallel; halves piece by piece in `F`.
pub(crate) fn for_real<F: Real, const N: usize>(x: &Inputs, y: &mut Outputs, f: impl Fn([&[F]; N], &mut [F]) + Sync) -> Result<()> {
    match x.dtype(0) {
        DType::BF16 => for_halves::<bf16, F, N>(x, y, f),
        DType::F16 => for_halves::<f16, F, N>(x, y, f),
        _ => {
            let (v, mut out) = ((0..N).map(|i| x.slice::<F>(i)).collect::<Result<Vec<_>>>()?, y.slice::<F>(0)?);
            for_chunks(&mut out, GRAIN, |at, c| f(std::array::from_fn(|i| &v[i][at..at + c.len()]), c));
            Ok(())
        }
    }
}

fn for_halves<T: Element, F: Real, const N: usize>(x: &Inputs, y: &mut Outputs, f: impl Fn([&[F]; N], &mut [F]) + Sync) -> Result<()> {
    let (v, mut out) = ((0..N).map(|i| x.slice::<T>(i)).collect::<Result<Vec<_>>>()?, y.slice::<T>(0)?);
    for_chunks(&mut out, GRAIN, |start, c| {
        let (mut wide, mut result) = ([[F::ZERO; PIECE]; N], [F::ZERO; PIECE]);
        for (c, at) in c.chunks_mut(PIECE).zip((start..).step_by(PIECE)) {
            let n = c.len();
            wide.iter_mut().zip(&v).for_each(|(w, v)| convert(&v[at..at + n], &mut w[..n]));
            f(std::array::from_fn(|i| &wide[i][..n]), &mut result[..n]);
            convert(&result[..n], c);
        }
    });
    Ok(())
}

pub(crate) fn float(op: &'static str, arg: &str, m: &Meta) -> Result<()> {
    if m.dtype.is_float() { Ok(()) } else { Err(Error::dtype(op, arg, "a float dtype", m.dtype)) }
}

pub(crate) fn same_dtype(op: &'static str, x: &[Meta]) -> Result<()> {
    match x.iter().find(|m| m.dtype != x[0].dtype) {
        None => Ok(()),
        Some(m) => Err(Error::dtype(op, "every input", x[0].dtype, m.dtype)),
    }
}
