//! The matrix product, batched, every transpose by strides.

use super::{float, same_dtype};
use crate::cpu::gemm::{NARROW_ROWS, gemm_narrow};
use crate::cpu::simd::Real;
use crate::cpu::{Inputs, Outputs};
use crate::{DType, Error, Layout, Meta, Op, Result, Saved, Tensor, Want, broadcast_shape, cpu_kernel, dispatch_real, run1};
use std::ops::RangeInclusive;

/// `y[.., m, n] = Σ_k a[.., m, k] · b[.., k, n]`; f32 accumulation for bf16 and f16.
#[derive(Debug, Default)]
pub struct MatMul {
    /// Give the f32 sums of bf16 and f16 as they are.
    pub wide: bool,
}

impl Op for MatMul {
    fn name(&self) -> &'static str {
        "matmul"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        float("matmul", "a", &x[0])?;
        same_dtype("matmul", x)?;
        let (a, b) = (&x[0].shape, &x[1].shape);
        let r = a.len();
        if r < 2 || b.len() != r || a[..r - 2] != b[..r - 2] || a[r - 1] != b[r - 2] {
            return Err(Error::invalid(
                "matmul",
                format!("a [.., m, k] and b [.., k, n] must agree in k and in the leading axes, found {a:?} and {b:?}"),
            ));
        }
        let mut y = a.clone();
        y[r - 1] = b[r - 1];
        let dtype = if self.wide && x[0].dtype.size() < 4 { DType::F32 } else { x[0].dtype };
        Ok(vec![Meta { shape: y, dtype }])
    }
    fn want(&self, _: usize) -> Want {
        Want::Any
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![0, 1], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None, None]) };
        let (a, b) = (s.input(0)?, s.input(1)?);
        let (r, dy) = (dy.rank(), &dy.cast(a.dtype())?);
        let t = |x: &Tensor| x.transpose(r - 2, r - 1);
        let product = |a: &Tensor, b: &Tensor| run1(MatMul::default(), &[a, b]);
        // the gradient of what lies column by column, a transposed weight, is made in that order
        let turned = b.layout().strides[r - 2] == 1 && b.layout().strides[r - 1] != 1;
        let db = || if turned { t(&product(&t(dy)?, a)?) } else { product(&t(a)?, dy) };
        Ok(vec![need[0].then(|| product(dy, &t(b)?)).transpose()?, need[1].then(db).transpose()?])
    }
}
cpu_kernel!(MatMul => |_, x, y| dispatch_real!(x.dtype(0), |F| kernel::<F>(x, y)));

/// `x Wᵀ` for a weight that is kept in f32 and computed with in x's bf16 or f16. The weight's gradient is the f32 sum, never rounded to x's dtype, so
/// that micro-batches and clipping see all its digits. Inputs: x `[rows, in]`, W `[out, in]` in f32, W in x's dtype.
#[derive(Debug)]
pub struct MasterLinear;

impl Op for MasterLinear {
    fn name(&self) -> &'static str {
        "linear"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        let (a, w, narrow) = (&x[0], &x[1], &x[2]);
        if a.dtype.size() != 2 || w.dtype != DType::F32 || narrow.dtype != a.dtype {
            return Err(Error::dtype("linear", "the weight", "f32 beside x in bf16 or f16, and a copy in x's dtype", w.dtype));
        }
        if a.shape.len() != 2 || w.shape.len() != 2 || a.shape[1] != w.shape[1] || narrow.shape != w.shape {
            return Err(Error::invalid(
                "linear",
                format!("x [rows, in] and weight [out, in] must agree in `in`, found {:?} and {:?}", a.shape, w.shape),
            ));
        }
        Ok(vec![Meta { shape: vec![a.shape[0], w.shape[0]], dtype: a.dtype }])
    }
    fn want(&self, _: usize) -> Want {
        Want::Any
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![0, 2], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None, None, None]) };
        let (x, w) = (s.input(0)?, s.input(2)?);
        let dx = need[0].then(|| run1(MatMul::default(), &[dy, w])).transpose()?;
        let dw = need[1].then(|| run1(MatMul { wide: true }, &[&dy.transpose(0, 1)?, x])).transpose()?;
        Ok(vec![dx, dw, None])
    }
}
cpu_kernel!(MasterLinear => |_, x, y| {
    let turned = |l: &Layout| Layout { shape: vec![l.shape[1], l.shape[0]], strides: vec![l.strides[1], l.strides[0]], offset: l.offset };
    product::<f32>(x, [0, 2], [x.layout(0).clone(), turned(x.layout(2))], y)
});

fn kernel<F: Real>(x: &Inputs, y: &mut Outputs) -> Result<()> {
    product::<F>(x, [0, 1], [x.layout(0).clone(), x.layout(1).clone()], y)
}

/// A few rows with a weight in bf16 that lies as `[out, in]`, as when tokens are decoded: the weight is widened as it is read. Whether that was done.
fn narrow(x: &Inputs, of: [usize; 2], [la, lb]: &[Layout; 2], y: &mut Outputs) -> Result<bool> {
    if la.shape.len() != 2 || x.dtype(of[1]) != DType::BF16 {
        return Ok(false);
    }
    let (m, k, n) = (la.shape[0], la.shape[1], lb.shape[1]);
    if !(1..=NARROW_ROWS).contains(&m) || n * k == 0 || la.strides[1] != 1 || lb.strides[0] != 1 || lb.strides[1] < 0 {
        return Ok(false);
    }
    let (a, b, mut c) = (x.real::<f32>(of[0])?, x.slice::<half::bf16>(of[1])?, y.real::<f32>(0)?);
    gemm_narrow(m, n, k, &a, la.strides[0] as usize, b, lb.strides[1] as usize, &mut c, n);
    Ok(true)
}

/// Of two inputs as these layouts show them.
fn product<F: Real>(x: &Inputs, of: [usize; 2], layouts: [Layout; 2], y: &mut Outputs) -> Result<()> {
    if narrow(x, of, &layouts, y)? {
        return Ok(());
    }
    let (a, la, b, lb, mut c) = (x.real::<F>(of[0])?, &layouts[0], x.real::<F>(of[1])?, &layouts[1], y.real::<F>(0)?);
    let r = la.shape.len();
    let (m, k, n) = (la.shape[r - 2], la.shape[r - 1], lb.shape[r - 1]);
    let batch: usize = la.shape[..r - 2].iter().product();
    let at = |l: &Layout, mut i: usize| {
        let mut o = 0;
        for d in (0..r - 2).rev() {
            o += (i % l.shape[d]) * l.strides[d] as usize;
            i /= l.shape[d];
        }
        o
    };
    for i in 0..batch {
        let c = &mut c[i * m * n..(i + 1) * m * n];
        crate::cpu::gemm::gemm_few(
            m,
            n,
            k,
            F::ONE,
            &a[at(la, i).min(a.len())..],
            (la.strides[r - 2] as usize, la.strides[r - 1] as usize),
            &b[at(lb, i).min(b.len())..],
            (lb.strides[r - 2] as usize, lb.strides[r - 1] as usize),
            F::ZERO,
            c,
            n,
        );
    }
    Ok(())
}

impl Tensor {
    /// Matrix product `[.., m, k] × [.., k, n]`; leading axes broadcast. A vector on either side counts as a matrix with one row or column.
    pub fn matmul(&self, b: &Tensor) -> Result<Tensor> {
        if self.rank() == 0 || b.rank() == 0 {
            return Err(Error::invalid("matmul", format!("needs at least one axis on both sides, found {:?} and {:?}", self.shape(), b.shape())));
        }
        if self.rank() == 1 {
            let y = self.unsqueeze(0)?.matmul(b)?;
            let mut s = y.shape().to_vec();
            s.remove(s.len() - if b.rank() == 1 { 1 } else { 2 });
            return y.reshape(&s);
        }
        if b.rank() == 1 {
            let y = self.matmul(&b.unsqueeze(1)?)?;
            return y.reshape(&y.shape()[..y.rank() - 1]);
        }
        let (rows, k) = (self.shape()[..self.rank() - 1].iter().product(), self.shape()[self.rank() - 1]);
        if b.rank() == 2 && self.rank() > 2 && self.layout().reshaped(&[rows, k]).is_some() {
            // one product with all rows, where they lie evenly: the weight's gradient is then one product too, instead of a sum over the batch
            let mut s = self.shape().to_vec();
            s[self.rank() - 1] = b.shape()[1];
            return run1(MatMul::default(), &[&self.reshape(&[rows, k])?, b])?.reshape(&s);
        }
        let (ra, rb) = (self.rank(), b.rank());
        let lead = broadcast_shape(&self.shape()[..ra - 2], &b.shape()[..rb - 2])
            .ok_or_else(|| Error::invalid("matmul", format!("leading axes of {:?} and {:?} do not broadcast", self.shape(), b.shape())))?;
        let full = |t: &Tensor| t.expand(&[&lead[..], &t.shape()[t.rank() - 2..]].concat());
        run1(MatMul::default(), &[&full(self)?, &full(b)?])
    }
    /// `x Wᵀ` for a weight stored as `[out, in]`, as checkpoints have it. A weight in f32 beside x in bf16 or f16 is brought to x's dtype, and its gradient
    /// is the product's f32 sums.
    pub fn linear(&self, w: &Tensor) -> Result<Tensor> {
        if self.dtype().size() != 2 || w.dtype() != DType::F32 || self.rank() == 0 || w.rank() != 2 {
            return self.matmul(&w.transpose(0, 1)?);
        }
        let (lead, k) = (&self.shape()[..self.rank() - 1], self.dim(self.rank() - 1));
        let narrow = w.detach().cast(self.dtype())?;
        run1(MasterLinear, &[&self.reshape(&[lead.iter().product(), k])?, w, &narrow])?.reshape(&[lead, &w.shape()[..1]].concat())
    }
}
