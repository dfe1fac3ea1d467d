//! Gather, scatter-add, index-select and index-add. Indices are i64, i32 or u32, are checked, and carry no gradient.

use super::binary::{BinaryKind, Lane};
use crate::cpu::Inputs;
use crate::{DType, Element, Error, Meta, Op, Result, Saved, Tensor, cpu_kernel, dispatch, run1};
use std::ops::RangeInclusive;

fn check(op: &'static str, x: &[Meta], axis: usize) -> Result<()> {
    if !matches!(x[1].dtype, DType::I64 | DType::I32 | DType::U32) {
        return Err(Error::dtype(op, "index", "i64, i32 or u32", x[1].dtype));
    }
    if axis >= x[0].shape.len() {
        return Err(Error::invalid(op, format!("axis {axis} is out of range for shape {:?}", x[0].shape)));
    }
    Ok(())
}

/// The indices as usize, each below `len`.
fn indices(op: &'static str, x: &Inputs, i: usize, len: usize) -> Result<Vec<usize>> {
    fn read<T: Element>(op: &'static str, v: &[T], len: usize) -> Result<Vec<usize>> {
        v.iter()
            .enumerate()
            .map(|(at, x)| {
                let f = x.to_f64();
                if f >= 0.0 && f < len as f64 {
                    Ok(f as usize)
                } else {
                    Err(Error::invalid(op, format!("index {f} at position {at} is out of range 0..{len}")))
                }
            })
            .collect()
    }
    match x.dtype(i) {
        DType::I64 => read(op, x.slice::<i64>(i)?, len),
        DType::I32 => read(op, x.slice::<i32>(i)?, len),
        _ => read(op, x.slice::<u32>(i)?, len),
    }
}

/// (product before the axis, its length, product after it)
fn around(shape: &[usize], axis: usize) -> (usize, usize, usize) {
    (shape[..axis].iter().product(), shape[axis], shape[axis + 1..].iter().product())
}

/// `y[.., i, ..] = x[.., index[i], ..]`: inputs x and index `[n]`.
#[derive(Debug)]
pub struct IndexSelect {
    /// Which axis.
    pub axis: usize,
}

impl Op for IndexSelect {
    fn name(&self) -> &'static str {
        "index_select"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        check(self.name(), x, self.axis)?;
        let [n] = x[1].shape[..] else { return Err(Error::shape(self.name(), "index", "[n]", &x[1].shape)) };
        let mut y = x[0].clone();
        y.shape[self.axis] = n;
        Ok(vec![y])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![1], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None, None]) };
        let len = s.meta(0).shape[self.axis];
        Ok(vec![Some(run1(IndexAdd { axis: self.axis, len }, &[dy, s.input(1)?])?), None])
    }
}
cpu_kernel!(IndexSelect => |op, x, y| {
    let (outer, len, inner) = around(x.shape(0), op.axis);
    let idx = indices("index_select", x, 1, len)?;
    dispatch!(x.dtype(0), |T| {
        let (src, mut out) = (x.slice::<T>(0)?, y.slice::<T>(0)?);
        for o in 0..outer {
            for (i, at) in idx.iter().enumerate() {
                out[(o * idx.len() + i) * inner..][..inner].copy_from_slice(&src[(o * len + at) * inner..][..inner]);
            }
        }
    });
    Ok(())
});

/// `y[.., index[i], ..] += x[.., i, ..]` on zeros, in the order of i: inputs x and index `[n]`.
#[derive(Debug)]
pub struct IndexAdd {
    /// Which axis.
    pub axis: usize,
    /// Length of the axis in the result.
    pub len: usize,
}

impl Op for IndexAdd {
    fn name(&self) -> &'static str {
        "index_add"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        check(self.name(), x, self.axis)?;
        if x[1].shape != [x[0].shape[self.axis]] {
            return Err(Error::shape(self.name(), "index", format!("[{}]", x[0].shape[self.axis]), &x[1].shape));
        }
        let mut y = x[0].clone();
        y.shape[self.axis] = self.len;
        Ok(vec![y])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![1], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| run1(IndexSelect { axis: self.axis }, &[d, s.input(1)?])).transpose()?, None])
    }
}
cpu_kernel!(IndexAdd => |op, x, y| {
    let (outer, n, inner) = around(x.shape(0), op.axis);
    let idx = indices("index_add", x, 1, op.len)?;
    dispatch!(x.dtype(0), |T| {
        let (src, mut out) = (x.slice::<T>(0)?, y.slice::<T>(0)?);
        out.fill(T::default());
        for o in 0..outer {
            for (i, at) in idx.iter().enumerate() {
                super::binary::add_into(&mut out[(o * op.len + at) * inner..][..inner], &src[(o * n + i) * inner..][..inner]);
            }
        }
    });
    Ok(())
});

fn gather_shapes(op: &'static str, x: &[usize], index: &[usize], axis: usize) -> Result<()> {
    if x.len() == index.len() && (0..x.len()).all(|a| a == axis || x[a] == index[a]) {
        return Ok(());
    }
    Err(Error::shape(op, "index", format!("{x:?} except along axis {axis}"), index))
}

/// `y[.., i, ..] = x[.., index[.., i, ..], ..]`: inputs x and an index of the result's shape.
#[derive(Debug)]
pub struct Gather {
    /// Which axis.
    pub axis: usize,
}

impl Op for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        check("gather", x, self.axis)?;
        gather_shapes("gather", &x[0].shape, &x[1].shape, self.axis)?;
        Ok(vec![Meta::new(&x[1].shape, x[0].dtype)])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![1], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None, None]) };
        Ok(vec![Some(run1(ScatterAdd { axis: self.axis, len: s.meta(0).shape[self.axis] }, &[dy, s.input(1)?])?), None])
    }
}
cpu_kernel!(Gather => |op, x, y| {
    let (outer, len, inner) = around(x.shape(0), op.axis);
    let n = x.shape(1)[op.axis];
    let idx = indices("gather", x, 1, len)?;
    dispatch!(x.dtype(0), |T| {
        let (src, mut out) = (x.slice::<T>(0)?, y.slice::<T>(0)?);
        for o in 0..outer { for i in 0..n { for j in 0..inner {
            let p = (o * n + i) * inner + j;
            out[p] = src[(o * len + idx[p]) * inner + j];
        } } }
    });
    Ok(())
});

/// `y[.., index[.., i, ..], ..] += x[.., i, ..]` on zeros: inputs x and an index of its shape.
#[derive(Debug)]
pub struct ScatterAdd {
    /// Which axis.
    pub axis: usize,
    /// Length of the axis in the result.
    pub len: usize,
}

impl Op for ScatterAdd {
    fn name(&self) -> &'static str {
        "scatter_add"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        check("scatter_add", x, self.axis)?;
        if x[0].shape != x[1].shape {
            return Err(Error::shape("scatter_add", "index", format!("{:?}", x[0].shape), &x[1].shape));
        }
        let mut y = x[0].clone();
        y.shape[self.axis] = self.len;
        Ok(vec![y])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![1], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| run1(Gather { axis: self.axis }, &[d, s.input(1)?])).transpose()?, None])
    }
}
cpu_kernel!(ScatterAdd => |op, x, y| {
    let (outer, n, inner) = around(x.shape(0), op.axis);
    let idx = indices("scatter_add", x, 1, op.len)?;
    dispatch!(x.dtype(0), |T| {
        let (src, mut out) = (x.slice::<T>(0)?, y.slice::<T>(0)?);
        out.fill(T::default());
        for o in 0..outer { for i in 0..n { for j in 0..inner {
            let p = (o * n + i) * inner + j;
            let at = (o * op.len + idx[p]) * inner + j;
            out[at] = Lane::op(BinaryKind::Add, out[at], src[p]);
        } } }
    });
    Ok(())
});

impl Tensor {
    /// Entries `index [n]` of `axis`.
    pub fn index_select(&self, axis: usize, index: &Tensor) -> Result<Tensor> {
        run1(IndexSelect { axis }, &[self, index])
    }
    /// Adds entry i of `axis` to entry `index[i]` of a zero tensor whose axis has length `len`.
    pub fn index_add(&self, axis: usize, index: &Tensor, len: usize) -> Result<Tensor> {
        run1(IndexAdd { axis, len }, &[self, index])
    }
    /// `x[.., index[.., i, ..], ..]` with an index of the result's shape.
    pub fn gather(&self, axis: usize, index: &Tensor) -> Result<Tensor> {
        run1(Gather { axis }, &[self, index])
    }
    /// Adds each element to the place that `index` names along `axis` of a zero tensor whose axis has length `len`.
    pub fn scatter_add(&self, axis: usize, index: &Tensor, len: usize) -> Result<Tensor> {
        run1(ScatterAdd { axis, len }, &[self, index])
    }
    /// Rows of a table `[v, d]` for tokens of any shape: `[.., d]`.
    pub fn embedding(&self, tokens: &Tensor) -> Result<Tensor> {
        let flat = self.index_select(0, &tokens.reshape(&[tokens.numel()])?)?;
        flat.reshape(&[tokens.shape(), &self.shape()[1..]].concat())
    }
}
