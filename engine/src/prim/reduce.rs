//! Reductions over axes, arg-max and the running sum. A sum's order depends on shapes alone.

use super::{GRAIN, float, for_chunks};
use crate::cpu::simd::Real;
use crate::cpu::{Inputs, Outputs};
use crate::{DType, Error, Meta, Op, Result, Saved, Tensor, cpu_kernel, dispatch, dispatch_real, run1, vectorized};
use rayon::prelude::*;

vectorized! {
    /// Σ x with 32 running sums, which the vector units hold side by side.
    fn sum_row[F: Real](x: &[F]) -> F {
        let mut acc = [F::ZERO; 32];
        let (body, tail) = x.as_chunks::<32>();
        for c in body { for (a, x) in acc.iter_mut().zip(c) { *a += *x } }
        for (a, x) in acc.iter_mut().zip(tail) { *a += *x }
        let mut n = 16;
        while n > 0 { for i in 0..n { acc[i] += acc[i + n] } n /= 2 }
        acc[0]
    }
    fn max_row[F: Real](x: &[F]) -> F {
        let mut acc = [F::NEG_INFINITY; 32];
        let (body, tail) = x.as_chunks::<32>();
        for c in body { for (a, x) in acc.iter_mut().zip(c) { *a = a.max(*x) } }
        for (a, x) in acc.iter_mut().zip(tail) { *a = a.max(*x) }
        acc.iter().fold(F::NEG_INFINITY, |m, x| m.max(*x))
    }
    fn add_rows[F: Real](x: &[F], n: usize, y: &mut [F]) {
        for r in x.chunks_exact(n) { for (y, x) in y.iter_mut().zip(r) { *y += *x } }
    }
}

/// Sum over the last (`leading: false`) or the first axis of a matrix `[r, c]`.
#[derive(Debug)]
pub struct Sum {
    /// Sum over the rows instead of along them.
    pub leading: bool,
}

fn matrix(op: &'static str, m: &Meta) -> Result<(usize, usize)> {
    match m.shape[..] {
        [r, c] => Ok((r, c)),
        _ => Err(Error::shape(op, "x", "[rows, columns]", &m.shape)),
    }
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        float("sum", "x", &x[0])?;
        let (r, c) = matrix("sum", &x[0])?;
        Ok(vec![Meta::new(&[if self.leading { c } else { r }], x[0].dtype)])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None]) };
        Ok(vec![Some(dy.unsqueeze(if self.leading { 0 } else { 1 })?.expand(&s.meta(0).shape)?)])
    }
}
cpu_kernel!(Sum => |op, x, y| dispatch_real!(x.dtype(0), |F| sum_kernel::<F>(op, x, y)));

fn sum_kernel<F: Real>(op: &Sum, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, mut out) = (x.real::<F>(0)?, y.real::<F>(0)?);
    let (r, c) = (x.shape(0)[0], x.shape(0)[1]);
    if !op.leading {
        if r == 1 {
            let parts: Vec<F> = v.par_chunks(GRAIN).map(|p| sum_row(p)).collect();
            out[0] = sum_row(&parts);
        } else {
            for_chunks(&mut out, (GRAIN / c.max(1)).max(1), |at, o| {
                o.iter_mut().enumerate().for_each(|(i, o)| *o = sum_row(&v[(at + i) * c..(at + i + 1) * c]))
            });
        }
        return Ok(());
    }
    out.fill(F::ZERO);
    if c == 0 || r == 0 {
        return Ok(());
    }
    let rows = (GRAIN / c).max(8);
    let parts: Vec<Vec<F>> = v
        .par_chunks(rows * c)
        .map(|p| {
            let mut y = vec![F::ZERO; c];
            add_rows(p, c, &mut y);
            y
        })
        .collect();
    parts.iter().for_each(|p| add_rows(p, c, &mut out));
    Ok(())
}

/// Maximum along the last axis of a matrix `[r, c]`; equal maxima share the gradient.
#[derive(Debug)]
pub struct MaxReduce;

impl Op for MaxReduce {
    fn name(&self) -> &'static str {
        "max"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        float("max", "x", &x[0])?;
        let (r, c) = matrix("max", &x[0])?;
        if c == 0 {
            return Err(Error::shape("max", "x", "with at least one element to reduce", &x[0].shape));
        }
        Ok(vec![Meta::new(&[r], x[0].dtype)])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![0], vec![0])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None]) };
        let (x, y) = (s.input(0)?, s.output(0)?);
        let hit = x.eq(&y.unsqueeze(1)?)?.cast(x.dtype())?;
        let share = dy.div(&hit.sum(&[1], false)?)?;
        Ok(vec![Some(hit.mul(&share.unsqueeze(1)?)?)])
    }
}
cpu_kernel!(MaxReduce => |_, x, y| dispatch_real!(x.dtype(0), |F| max_kernel::<F>(x, y)));

fn max_kernel<F: Real>(x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, mut out, c) = (x.real::<F>(0)?, y.real::<F>(0)?, x.shape(0)[1]);
    for_chunks(&mut out, (GRAIN / c).max(1), |at, o| o.iter_mut().enumerate().for_each(|(i, o)| *o = max_row(&v[(at + i) * c..(at + i + 1) * c])));
    Ok(())
}

/// Index (i64) of the first maximum along the last axis of a matrix; NaN counts as the largest, as in sorting.
#[derive(Debug)]
pub struct ArgMax;

impl Op for ArgMax {
    fn name(&self) -> &'static str {
        "argmax"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let (r, c) = matrix("argmax", &x[0])?;
        if c == 0 {
            return Err(Error::shape("argmax", "x", "with at least one element to reduce", &x[0].shape));
        }
        Ok(vec![Meta::new(&[r], DType::I64)])
    }
}
cpu_kernel!(ArgMax => |_, x, y| {
    dispatch!(x.dtype(0), |T| {
        let (v, mut out, c) = (x.slice::<T>(0)?, y.slice::<i64>(0)?, x.shape(0)[1]);
        for (o, row) in out.iter_mut().zip(v.chunks(c)) {
            *o = row.iter().enumerate().fold(0, |best, (i, x)| if super::sort::rank(x, &row[best]).is_gt() { i } else { best }) as i64;
        }
    });
    Ok(())
});

/// Running sum along the last axis of a matrix, forwards or backwards.
#[derive(Debug)]
pub struct CumSum {
    /// Sum from the end.
    pub reverse: bool,
}

impl Op for CumSum {
    fn name(&self) -> &'static str {
        "cumsum"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        float("cumsum", "x", &x[0])?;
        matrix("cumsum", &x[0])?;
        Ok(vec![x[0].clone()])
    }
    fn backward(&self, _: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| run1(CumSum { reverse: !self.reverse }, &[d])).transpose()?])
    }
}
cpu_kernel!(CumSum => |op, x, y| dispatch_real!(x.dtype(0), |F| cumsum_kernel::<F>(op, x, y)));

fn cumsum_kernel<F: Real>(op: &CumSum, x: &Inputs, y: &mut Outputs) -> Result<()> {
    let (v, mut out, c) = (x.real::<F>(0)?, y.real::<F>(0)?, x.shape(0)[1].max(1));
    for (o, r) in out.chunks_mut(c).zip(v.chunks(c)) {
        let mut acc = F::ZERO;
        for j in 0..c {
            let i = if op.reverse { c - 1 - j } else { j };
            acc += r[i];
            o[i] = acc;
        }
    }
    Ok(())
}

impl Tensor {
    /// Runs a matrix reduction along `axes`: they go last (or stay first where that needs no copy).
    fn reduce(
        &self,
        name: &'static str,
        axes: &[usize],
        keepdim: bool,
        f: impl Fn(&Tensor, bool) -> Result<Tensor>,
        leading_ok: bool,
    ) -> Result<Tensor> {
        let mut gone = vec![false; self.rank()];
        for a in axes {
            self.axis(name, *a)?;
            if std::mem::replace(&mut gone[*a], true) {
                return Err(Error::invalid(name, format!("axes {axes:?} name axis {a} twice")));
            }
        }
        let (red, kept): (Vec<usize>, Vec<usize>) = (0..self.rank()).partition(|a| gone[*a]);
        let size = |v: &[usize]| v.iter().map(|a| self.shape()[*a]).product::<usize>();
        let leads = leading_ok && !red.is_empty() && !kept.is_empty() && red.iter().enumerate().all(|(i, a)| i == *a);
        let y = if leads {
            f(&self.reshape(&[size(&red), size(&kept)])?, true)?
        } else {
            f(&self.permute(&[&kept[..], &red[..]].concat())?.reshape(&[size(&kept), size(&red)])?, false)?
        };
        let shape: Vec<usize> = (0..self.rank()).filter(|a| keepdim || !gone[*a]).map(|a| if gone[a] { 1 } else { self.shape()[a] }).collect();
        y.reshape(&shape)
    }
    /// Sum over `axes`.
    pub fn sum(&self, axes: &[usize], keepdim: bool) -> Result<Tensor> {
        self.reduce("sum", axes, keepdim, |t, leading| run1(Sum { leading }, &[t]), true)
    }
    /// Sum of all elements.
    pub fn sum_all(&self) -> Result<Tensor> {
        self.sum(&(0..self.rank()).collect::<Vec<_>>(), false)
    }
    /// Mean over `axes`.
    pub fn mean(&self, axes: &[usize], keepdim: bool) -> Result<Tensor> {
        let n: usize = axes.iter().map(|a| self.dim(*a)).product();
        self.sum(axes, keepdim)?.affine(1.0 / n as f64, 0.0)
    }
    /// Maximum over `axes`.
    pub fn max(&self, axes: &[usize], keepdim: bool) -> Result<Tensor> {
        self.reduce("max", axes, keepdim, |t, _| run1(MaxReduce, &[t]), false)
    }
    /// Index (i64) of the first maximum along `axis`, which goes away.
    pub fn argmax(&self, axis: usize) -> Result<Tensor> {
        self.reduce("argmax", &[axis], false, |t, _| run1(ArgMax, &[t]), false)
    }
    /// Moves `axis` last, runs `f` on the matrix, and moves it back.
    pub(crate) fn along(&self, name: &'static str, axis: usize, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        self.axis(name, axis)?;
        let last = self.rank() - 1;
        let t = self.transpose(axis, last)?;
        let c = t.shape()[last];
        let y = f(&t.reshape(&[t.shape()[..last].iter().product(), c])?)?;
        let mut shape = t.shape().to_vec();
        shape[last] = y.shape()[1];
        y.reshape(&shape)?.transpose(axis, last)
    }
    /// Running sum along `axis`.
    pub fn cumsum(&self, axis: usize) -> Result<Tensor> {
        self.along("cumsum", axis, |t| run1(CumSum { reverse: false }, &[t]))
    }
}
