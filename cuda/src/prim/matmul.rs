//! The matrix product: operands as they lie where cublasLt can read them, otherwise copied.

use crate::memory::CudaBuffer;
use crate::{Cuda, Gemm, Ptr, cuda_kernel};
use engine::prim::{Contiguous, MasterLinear, MatMul};
use engine::{Buffer, Layout, Result, View};

/// A matrix `[r, c]` that is row-major, or column-major (`true`), with its leading dimension.
fn leading(l: &Layout) -> Option<(bool, usize)> {
    let r = l.shape.len();
    let ((rows, cols), (sr, sc)) = ((l.shape[r - 2], l.shape[r - 1]), (l.strides[r - 2] as usize, l.strides[r - 1] as usize));
    let plain = (sc == 1 || cols <= 1) && (rows <= 1 || sr >= cols);
    let turned = (sr == 1 || rows <= 1) && (cols <= 1 || sc >= rows);
    match (plain, turned) {
        (true, _) => Some((false, if rows <= 1 { cols.max(1) } else { sr })),
        (_, true) => Some((true, if cols <= 1 { rows.max(1) } else { sc })),
        _ => None,
    }
}

struct Operand {
    at: Ptr,
    trans: bool,
    ld: usize,
    layout: Layout,
    _copy: Option<CudaBuffer>,
}

fn operand(cuda: &Cuda, v: &View) -> Result<Operand> {
    if let Some((trans, ld)) = leading(v.layout) {
        return Ok(Operand { at: Ptr::of(v)?, trans, ld, layout: v.layout.clone(), _copy: None });
    }
    let layout = Layout::contiguous(&v.layout.shape);
    let (buf, at) = cuda.scratch(layout.numel() * v.dtype.size())?;
    {
        let to = View { buf: &buf as &dyn Buffer, layout: &layout, dtype: v.dtype };
        super::copy::contiguous(&Contiguous, cuda, std::slice::from_ref(&View { buf: v.buf, layout: v.layout, dtype: v.dtype }), &[to])?;
    }
    let ld = layout.shape[layout.shape.len() - 1].max(1);
    Ok(Operand { at, trans: false, ld, layout, _copy: Some(buf) })
}

fn matmul(_: &MatMul, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let (a, b) = (operand(cuda, &x[0])?, operand(cuda, &x[1])?);
    let r = a.layout.shape.len();
    let (m, k, n) = (a.layout.shape[r - 2], a.layout.shape[r - 1], b.layout.shape[r - 1]);
    // leading axes of both as one loop nest, the innermost of which is a batch
    let lead = |l: &Layout| Layout { shape: l.shape[..r - 2].to_vec(), strides: l.strides[..r - 2].to_vec(), offset: 0 };
    let (shape, strides) = Layout::merged(&[&lead(&a.layout), &lead(&b.layout)]);
    let (batch, outer): (usize, usize) = (shape[shape.len() - 1], shape[..shape.len() - 1].iter().product());
    let last = shape.len() - 1;
    let (size, size_c) = (x[0].dtype.size(), y[0].dtype.size());
    let c = Ptr::of(&y[0])?;
    for i in 0..outer {
        let (mut rest, mut at) = (i, [0usize; 2]);
        for d in (0..last).rev() {
            let j = rest % shape[d];
            rest /= shape[d];
            at.iter_mut().zip(&strides).for_each(|(at, s)| *at += j * s[d] as usize);
        }
        let g = Gemm {
            batch,
            a: a.at.byte_add(at[0] * size).0,
            a_trans: a.trans,
            a_ld: a.ld,
            a_stride: if batch == 1 { 0 } else { strides[0][last] as usize },
            b: b.at.byte_add(at[1] * size).0,
            b_trans: b.trans,
            b_ld: b.ld,
            b_stride: if batch == 1 { 0 } else { strides[1][last] as usize },
            c_dtype: y[0].dtype,
            ..Gemm::new(x[0].dtype, (m, n, k), 0, 0, c.byte_add(i * batch * m * n * size_c).0)
        };
        cuda.gemm(&g)?;
    }
    Ok(())
}
cuda_kernel!(MatMul => matmul);

fn linear(_: &MasterLinear, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()> {
    let l = x[2].layout;
    let turned = Layout { shape: vec![l.shape[1], l.shape[0]], strides: vec![l.strides[1], l.strides[0]], offset: l.offset };
    let (a, w) = (View { buf: x[0].buf, layout: x[0].layout, dtype: x[0].dtype }, View { buf: x[2].buf, layout: &turned, dtype: x[2].dtype });
    matmul(&MatMul::default(), cuda, &[a, w], y)
}
cuda_kernel!(MasterLinear => linear);
