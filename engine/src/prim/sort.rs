//! Sorting and the k largest, stable: among equals the first comes first.

use crate::{DType, Error, Meta, Op, Result, Saved, Tensor, cpu_kernel, dispatch, run};
use rayon::prelude::*;
use std::cmp::Ordering;

/// The k largest along the last axis of a matrix, largest first: values `[r, k]` and indices `[r, k]` (i64).
#[derive(Debug)]
pub struct TopK {
    /// How many.
    pub k: usize,
}

impl Op for TopK {
    fn name(&self) -> &'static str {
        "topk"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        match x[0].shape[..] {
            [r, c] if self.k <= c => Ok(vec![Meta::new(&[r, self.k], x[0].dtype), Meta::new(&[r, self.k], DType::I64)]),
            _ => Err(Error::shape("topk", "x", format!("[rows, at least {}]", self.k), &x[0].shape)),
        }
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![], vec![1])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| d.scatter_add(1, s.output(1)?, s.meta(0).shape[1])).transpose()?])
    }
}
cpu_kernel!(TopK => |op, x, y| {
    let c = x.shape(0)[1];
    dispatch!(x.dtype(0), |T| {
        let (v, mut out, mut idx) = (x.slice::<T>(0)?, y.slice::<T>(0)?, y.slice::<i64>(1)?);
        let (k, rows) = (op.k.max(1), ROWS);
        out.par_chunks_mut(rows * k).zip(idx.par_chunks_mut(rows * k)).zip(v.par_chunks(rows * c.max(1))).for_each(|((out, idx), v)| {
            for ((out, idx), row) in out.chunks_mut(k).zip(idx.chunks_mut(k)).zip(v.chunks(c.max(1))) {
                let order = order(row, true, op.k);
                for j in 0..op.k { (out[j], idx[j]) = (row[order[j]], order[j] as i64) }
            }
        });
    });
    Ok(())
});

/// All of the last axis of a matrix in order: values and indices (i64).
#[derive(Debug)]
pub struct Sort {
    /// Largest first.
    pub descending: bool,
}

impl Op for Sort {
    fn name(&self) -> &'static str {
        "sort"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        match x[0].shape[..] {
            [r, c] => Ok(vec![x[0].clone(), Meta::new(&[r, c], DType::I64)]),
            _ => Err(Error::shape("sort", "x", "[rows, columns]", &x[0].shape)),
        }
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![], vec![1])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| d.scatter_add(1, s.output(1)?, s.meta(0).shape[1])).transpose()?])
    }
}
cpu_kernel!(Sort => |op, x, y| {
    let c = x.shape(0)[1];
    dispatch!(x.dtype(0), |T| {
        let (v, mut out, mut idx) = (x.slice::<T>(0)?, y.slice::<T>(0)?, y.slice::<i64>(1)?);
        for (r, row) in v.chunks(c.max(1)).enumerate() {
            for (j, i) in order(row, op.descending, row.len()).into_iter().enumerate() { out[r * c + j] = row[i]; idx[r * c + j] = i as i64; }
        }
    });
    Ok(())
});

/// Rows of a task of [`TopK`].
const ROWS: usize = 64;

/// NaN counts as the largest.
pub(super) fn rank<T: PartialOrd>(x: &T, y: &T) -> Ordering {
    let nan = |x: &T| x.partial_cmp(x).is_none();
    x.partial_cmp(y).unwrap_or_else(|| nan(x).cmp(&nan(y)))
}

/// The first k places of a row in order; equals in the order in which they stand.
fn order<T: PartialOrd>(row: &[T], descending: bool, k: usize) -> Vec<usize> {
    let cmp = |a: &usize, b: &usize| {
        let c = rank(&row[*a], &row[*b]);
        (if descending { c.reverse() } else { c }).then(a.cmp(b))
    };
    let mut v: Vec<usize> = (0..row.len()).collect();
    if 0 < k && k < v.len() {
        v.select_nth_unstable_by(k - 1, cmp);
    }
    v.truncate(k);
    v.sort_unstable_by(cmp);
    v
}

fn two(mut v: Vec<Tensor>) -> (Tensor, Tensor) {
    let i = v.remove(1);
    (v.remove(0), i)
}

impl Tensor {
    /// The k largest along the last axis, largest first, and their indices (i64).
    pub fn topk(&self, k: usize) -> Result<(Tensor, Tensor)> {
        let c = self.shape().last().copied().ok_or_else(|| Error::shape("topk", "x", "with at least one axis", &[]))?;
        let lead = &self.shape()[..self.rank() - 1];
        let (v, i) = two(run(TopK { k }, &[&self.reshape(&[lead.iter().product(), c])?])?);
        let shape = [lead, &[k]].concat();
        Ok((v.reshape(&shape)?, i.reshape(&shape)?))
    }
    /// The last axis in order, and the indices (i64) that order it.
    pub fn sort(&self, descending: bool) -> Result<(Tensor, Tensor)> {
        let c = self.shape().last().copied().ok_or_else(|| Error::shape("sort", "x", "with at least one axis", &[]))?;
        let rows = self.shape()[..self.rank() - 1].iter().product();
        let (v, i) = two(run(Sort { descending }, &[&self.reshape(&[rows, c])?])?);
        Ok((v.reshape(self.shape())?, i.reshape(self.shape())?))
    }
}
