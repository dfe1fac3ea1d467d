//! Views' gradients, copies, concatenation and padding.

use super::{GRAIN, for_chunks, for_rows};
use crate::cpu::{Inputs, Outputs};
use crate::{Error, Meta, Op, Result, Saved, Tensor, Want, cpu_kernel, dispatch, run1};
use std::ops::RangeInclusive;

/// A view: moves no data, so it has no kernel; recorded for its gradient.
#[derive(Debug, Clone)]
pub enum ViewOp {
    /// Another shape.
    Reshape,
    /// Axes in another order.
    Permute {
        /// Old axis at each new place.
        axes: Vec<usize>,
    },
    /// A range of one axis.
    Narrow {
        /// Which axis.
        axis: usize,
        /// First entry.
        start: usize,
    },
    /// Repeated axes.
    Expand,
    /// Consecutive ranges of one axis, all of them outputs: their gradients come back in one piece.
    Split {
        /// Which axis.
        axis: usize,
        /// Length of each part.
        lens: Vec<usize>,
    },
}

impl Op for ViewOp {
    fn name(&self) -> &'static str {
        match self {
            ViewOp::Reshape => "reshape",
            ViewOp::Permute { .. } => "permute",
            ViewOp::Narrow { .. } => "narrow",
            ViewOp::Expand => "expand",
            ViewOp::Split { .. } => "split",
        }
    }
    fn infer(&self, _: &[Meta]) -> Result<Vec<Meta>> {
        Err(Error::invalid(self.name(), "is a view and is not run; call the method of Tensor"))
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let x = s.meta(0);
        if let ViewOp::Split { axis, lens } = self {
            let Some(any) = dy.iter().flatten().next() else { return Ok(vec![None]) };
            let part = |(d, n): (&Option<Tensor>, &usize)| {
                let mut shape = x.shape.clone();
                shape[*axis] = *n;
                d.clone().map_or_else(|| Tensor::zeros(&shape, x.dtype, any.device()), Ok)
            };
            let parts = dy.iter().zip(lens).map(part).collect::<Result<Vec<_>>>()?;
            return Ok(vec![Some(Tensor::cat(&parts.iter().collect::<Vec<_>>(), *axis)?)]);
        }
        let Some(dy) = &dy[0] else { return Ok(vec![None]) };
        Ok(vec![Some(match self {
            ViewOp::Reshape => dy.reshape(&x.shape)?,
            ViewOp::Permute { axes } => {
                let mut back = vec![0; axes.len()];
                axes.iter().enumerate().for_each(|(new, old)| back[*old] = new);
                dy.permute(&back)?
            }
            ViewOp::Narrow { axis, start } => {
                let end = x.shape[*axis] - start - dy.shape()[*axis];
                dy.pad(*axis, *start, end)?
            }
            ViewOp::Expand => dy.sum_to(&x.shape)?,
            ViewOp::Split { .. } => unreachable!("returned above"),
        })])
    }
}

/// A row-major copy of any layout.
#[derive(Debug)]
pub struct Contiguous;

impl Op for Contiguous {
    fn name(&self) -> &'static str {
        "contiguous"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![x[0].clone()])
    }
    fn want(&self, _: usize) -> Want {
        Want::Any
    }
    fn backward(&self, _: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].clone()])
    }
}
cpu_kernel!(Contiguous => copy_kernel);

fn copy_kernel(_: &Contiguous, x: &Inputs, y: &mut Outputs) -> Result<()> {
    dispatch!(x.dtype(0), |T| {
        let (src, mut out) = (x.slice::<T>(0)?, y.slice::<T>(0)?);
        let (shape, strides) = crate::Layout::merged(&[x.layout(0)]);
        let step = strides[0][shape.len() - 1] as usize;
        for_rows(&mut out, &shape, &strides, |row, offs| {
            if step == 1 {
                row.copy_from_slice(&src[offs[0]..offs[0] + row.len()]);
            } else {
                row.iter_mut().enumerate().for_each(|(i, y)| *y = src[offs[0] + i * step]);
            }
        });
    });
    Ok(())
}

fn assigned(op: &'static str, target: &Meta, x: &Meta) -> Result<Vec<Meta>> {
    if x == target { Ok(vec![x.clone()]) } else { Err(Error::invalid(op, format!("needs {target}, found {x}"))) }
}

/// `target += x` in place.
#[derive(Debug)]
pub struct AddAssign {
    /// Shape and dtype of the target.
    pub meta: Meta,
}

impl Op for AddAssign {
    fn name(&self) -> &'static str {
        "add_assign"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        assigned("add_assign", &self.meta, &x[0])
    }
}
cpu_kernel!(AddAssign => |_, x, y| {
    dispatch!(x.dtype(0), |T| {
        let (src, mut out) = (x.slice::<T>(0)?, y.slice::<T>(0)?);
        for_chunks(&mut out, GRAIN, |at, c| super::binary::add_into(c, &src[at..at + c.len()]));
    });
    Ok(())
});

/// `target = x` in place.
#[derive(Debug)]
pub struct Assign {
    /// Shape and dtype of the target.
    pub meta: Meta,
}

impl Op for Assign {
    fn name(&self) -> &'static str {
        "assign"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        assigned("assign", &self.meta, &x[0])
    }
}
cpu_kernel!(Assign => |_, x, y| {
    dispatch!(x.dtype(0), |T| y.slice::<T>(0)?.copy_from_slice(x.slice::<T>(0)?));
    Ok(())
});

/// The length of an axis made of parts.
fn length(op: &'static str, parts: &[usize]) -> Result<usize> {
    let sum = parts.iter().try_fold(0usize, |n, p| n.checked_add(*p));
    sum.ok_or_else(|| Error::invalid(op, format!("an axis of {parts:?} entries together is larger than the address space")))
}

/// Concatenation along an axis.
#[derive(Debug)]
pub struct Cat {
    /// Which axis.
    pub axis: usize,
}

impl Op for Cat {
    fn name(&self) -> &'static str {
        "cat"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        1..=usize::MAX
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        super::same_dtype("cat", x)?;
        let mut out = x[0].clone();
        if self.axis >= out.shape.len() {
            return Err(Error::invalid("cat", format!("axis {} is out of range for shape {:?}", self.axis, out.shape)));
        }
        for (i, m) in x.iter().enumerate().skip(1) {
            let fits = m.shape.len() == out.shape.len() && (0..out.shape.len()).all(|a| a == self.axis || m.shape[a] == out.shape[a]);
            if !fits {
                return Err(Error::shape("cat", format!("input {i}"), format!("{:?} except along axis {}", x[0].shape, self.axis), &m.shape));
            }
            out.shape[self.axis] = length("cat", &[out.shape[self.axis], m.shape[self.axis]])?;
        }
        Ok(vec![out])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None; need.len()]) };
        let mut at = 0;
        (0..need.len())
            .map(|i| {
                let n = s.meta(i).shape[self.axis];
                at += n;
                Ok(if need[i] { Some(dy.narrow(self.axis, at - n, n)?) } else { None })
            })
            .collect()
    }
}
cpu_kernel!(Cat => cat_kernel);

fn cat_kernel(op: &Cat, x: &Inputs, y: &mut Outputs) -> Result<()> {
    dispatch!(x.dtype(0), |T| {
        let mut out = y.slice::<T>(0)?;
        let inner: usize = x.shape(0)[op.axis + 1..].iter().product();
        let row: usize = (0..x.len()).map(|i| x.shape(i)[op.axis] * inner).sum();
        let parts = (0..x.len()).map(|i| Ok((x.slice::<T>(i)?, x.shape(i)[op.axis] * inner))).collect::<Result<Vec<_>>>()?;
        let rows = GRAIN.div_ceil(row.max(1));
        for_chunks(&mut out, rows * row.max(1), |at, c| {
            for (r, mut o) in c.chunks_mut(row.max(1)).enumerate() {
                for (src, n) in &parts {
                    let head;
                    (head, o) = o.split_at_mut(*n);
                    head.copy_from_slice(&src[(at / row + r) * n..][..*n]);
                }
            }
        });
    });
    Ok(())
}

/// Zeros before and after along an axis.
#[derive(Debug)]
pub struct Pad {
    /// Which axis.
    pub axis: usize,
    /// How many zeros before.
    pub before: usize,
    /// How many after.
    pub after: usize,
}

impl Op for Pad {
    fn name(&self) -> &'static str {
        "pad"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let mut m = x[0].clone();
        let Some(d) = m.shape.get_mut(self.axis) else {
            return Err(Error::invalid("pad", format!("axis {} is out of range for shape {:?}", self.axis, x[0].shape)));
        };
        *d = length("pad", &[*d, self.before, self.after])?;
        Ok(vec![m])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| d.narrow(self.axis, self.before, s.meta(0).shape[self.axis])).transpose()?])
    }
}
cpu_kernel!(Pad => |op, x, y| {
    dispatch!(x.dtype(0), |T| {
        let (src, mut out) = (x.slice::<T>(0)?, y.slice::<T>(0)?);
        let inner: usize = x.shape(0)[op.axis + 1..].iter().product();
        let (n, row) = (x.shape(0)[op.axis] * inner, (x.shape(0)[op.axis] + op.before + op.after) * inner);
        let at = op.before * inner;
        if row > 0 {
            for_chunks(&mut out, GRAIN.div_ceil(row) * row, |start, c| {
                for (o, i) in c.chunks_mut(row).zip(start / row..) {
                    o[..at].fill(T::default());
                    o[at..at + n].copy_from_slice(&src[i * n..(i + 1) * n]);
                    o[at + n..].fill(T::default());
                }
            });
        }
    });
    Ok(())
});

impl Tensor {
    /// Concatenates along `axis`.
    pub fn cat(x: &[&Tensor], axis: usize) -> Result<Tensor> {
        run1(Cat { axis }, x)
    }
    /// Zeros before and after along `axis`.
    pub fn pad(&self, axis: usize, before: usize, after: usize) -> Result<Tensor> {
        if before == 0 && after == 0 { Ok(self.clone()) } else { run1(Pad { axis, before, after }, &[self]) }
    }
    /// Sums broadcast axes away, so that the result has `shape`: the gradient of [`Tensor::expand`].
    pub fn sum_to(&self, shape: &[usize]) -> Result<Tensor> {
        let lead = self.rank().checked_sub(shape.len()).ok_or_else(|| Error::invalid("sum_to", format!("{:?} to {shape:?}", self.shape())))?;
        let axes: Vec<usize> = (0..self.rank()).filter(|a| *a < lead || (shape[a - lead] == 1 && self.shape()[*a] != 1)).collect();
        if axes.is_empty() { self.reshape(shape) } else { self.sum(&axes, true)?.reshape(shape) }
    }
}
