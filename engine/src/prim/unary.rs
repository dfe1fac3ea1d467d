//! Elementwise functions of one tensor.

use super::{float, for_real};
use crate::cpu::simd::Real;
use crate::cpu::{Inputs, Outputs};
use crate::{Error, Meta, Op, Result, Saved, Tensor, cpu_kernel, dispatch_real, run1, vectorized};
use std::ops::RangeInclusive;

/// Which function.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum UnaryKind {
    /// −x
    Neg,
    /// eˣ
    Exp,
    /// ln x
    Ln,
    /// √x
    Sqrt,
    /// 1/√x
    Rsqrt,
    /// 1/x
    Recip,
    /// x²
    Square,
    /// |x|, with gradient 0 at 0
    Abs,
    /// max(x, 0), with gradient 0 at 0
    Relu,
    /// 1/(1+e⁻ˣ)
    Sigmoid,
    /// x·sigmoid(x)
    Silu,
    /// ln(1+eˣ)
    Softplus,
    /// tanh x
    Tanh,
    /// sin x
    Sin,
    /// cos x
    Cos,
    /// a·x + b
    Affine(f64, f64),
    /// xᵖ
    Pow(f64),
}
use UnaryKind::*;

vectorized! {
    /// y = f(x), function by function so that each loop vectorises on its own.
    fn apply[F: Real](kind: UnaryKind, x: &[F], y: &mut [F]) {
        macro_rules! each { ($f:expr) => { for (y, x) in y.iter_mut().zip(x) { *y = $f(*x) } } }
        match kind {
            Neg => each!(|x: F| -x),
            Exp => each!(|x: F| x.exp()),
            Ln => each!(|x: F| x.ln()),
            Sqrt => each!(|x: F| x.sqrt()),
            Rsqrt => each!(|x: F| F::ONE / x.sqrt()),
            Recip => each!(|x: F| F::ONE / x),
            Square => each!(|x: F| x * x),
            Abs => each!(|x: F| x.abs()),
            Relu => each!(|x: F| x.max(F::ZERO)),
            Sigmoid => each!(|x: F| x.sigmoid()),
            Silu => each!(|x: F| x.silu()),
            Softplus => each!(|x: F| x.softplus()),
            Tanh => each!(|x: F| x.tanh()),
            Sin => each!(|x: F| F::from_f64(x.to_f64().sin())),
            Cos => each!(|x: F| F::from_f64(x.to_f64().cos())),
            Affine(a, b) => { let (a, b) = (F::from_f64(a), F::from_f64(b)); each!(|x: F| x.mul_add(a, b)) }
            Pow(p) => each!(|x: F| F::from_f64(x.to_f64().powf(p))),
        }
    }

    /// dx = f'(x)·dy
    fn apply_grad[F: Real](kind: UnaryKind, x: &[F], dy: &[F], dx: &mut [F]) {
        macro_rules! each { ($f:expr) => { for ((d, x), g) in dx.iter_mut().zip(x).zip(dy) { *d = *g * $f(*x) } } }
        let two = F::ONE + F::ONE;
        match kind {
            Neg => each!(|_| -F::ONE),
            Exp => each!(|x: F| x.exp()),
            Ln => each!(|x: F| F::ONE / x),
            Sqrt => each!(|x: F| F::ONE / (two * x.sqrt())),
            Rsqrt => each!(|x: F| -F::ONE / (two * x * x.sqrt())),
            Recip => each!(|x: F| -F::ONE / (x * x)),
            Square => each!(|x: F| two * x),
            Abs => each!(|x: F| if x > F::ZERO { F::ONE } else if x < F::ZERO { -F::ONE } else { F::ZERO }),
            Relu => each!(|x: F| if x > F::ZERO { F::ONE } else { F::ZERO }),
            Sigmoid => each!(|x: F| { let s = x.sigmoid(); s * (F::ONE - s) }),
            Silu => each!(|x: F| { let s = x.sigmoid(); s * (F::ONE + x * (F::ONE - s)) }),
            Softplus => each!(|x: F| x.sigmoid()),
            Tanh => each!(|x: F| { let t = x.tanh(); F::ONE - t * t }),
            Sin => each!(|x: F| F::from_f64(x.to_f64().cos())),
            Cos => each!(|x: F| F::from_f64(-x.to_f64().sin())),
            Affine(a, _) => { let a = F::from_f64(a); each!(|_| a) }
            Pow(p) => each!(|x: F| F::from_f64(p * x.to_f64().powf(p - 1.0))),
        }
    }
}

/// y = f(x) for a float tensor.
#[derive(Debug)]
pub struct Unary {
    /// Which function.
    pub kind: UnaryKind,
}

impl Op for Unary {
    fn name(&self) -> &'static str {
        match self.kind {
            Neg => "neg",
            Exp => "exp",
            Ln => "ln",
            Sqrt => "sqrt",
            Rsqrt => "rsqrt",
            Recip => "recip",
            Square => "square",
            Abs => "abs",
            Relu => "relu",
            Sigmoid => "sigmoid",
            Silu => "silu",
            Softplus => "softplus",
            Tanh => "tanh",
            Sin => "sin",
            Cos => "cos",
            Affine(..) => "affine",
            Pow(_) => "pow",
        }
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        float(self.name(), "x", &x[0])?;
        Ok(vec![x[0].clone()])
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        match self.kind {
            Neg | Affine(..) => (vec![], vec![]),
            _ => (vec![0], vec![]),
        }
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None]) };
        Ok(vec![Some(match self.kind {
            Neg => dy.neg()?,
            Affine(a, _) => dy.affine(a, 0.0)?,
            kind => run1(UnaryBackward { kind }, &[s.input(0)?, dy])?,
        })])
    }
}
cpu_kernel!(Unary => |op, x, y| dispatch_real!(x.dtype(0), |F| kernel::<F>(op.kind, x, y)));

fn kernel<F: Real>(kind: UnaryKind, x: &Inputs, y: &mut Outputs) -> Result<()> {
    for_real(x, y, |[x], y| apply::<F>(kind, x, y))
}

/// dx = f'(x)·dy: inputs x and dy.
#[derive(Debug)]
pub struct UnaryBackward {
    /// Which function.
    pub kind: UnaryKind,
}

impl Op for UnaryBackward {
    fn name(&self) -> &'static str {
        "unary_backward"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        if x[0] == x[1] { Ok(vec![x[0].clone()]) } else { Err(Error::invalid(self.name(), format!("x is {}, dy is {}", x[0], x[1]))) }
    }
}
cpu_kernel!(UnaryBackward => |op, x, y| dispatch_real!(x.dtype(0), |F| kernel_backward::<F>(op.kind, x, y)));

fn kernel_backward<F: Real>(kind: UnaryKind, x: &Inputs, y: &mut Outputs) -> Result<()> {
    for_real(x, y, |[x, dy], dx| apply_grad::<F>(kind, x, dy, dx))
}

macro_rules! methods {
    ($($(#[$m:meta])* $f:ident $k:ident;)*) => { impl Tensor { $($(#[$m])* pub fn $f(&self) -> Result<Tensor> { run1(Unary { kind: $k }, &[self]) })* } };
}
methods! {
    /// −x
    neg Neg;
    /// eˣ
    exp Exp;
    /// ln x
    ln Ln;
    /// √x
    sqrt Sqrt;
    /// 1/√x
    rsqrt Rsqrt;
    /// 1/x
    recip Recip;
    /// x²
    square Square;
    /// |x|
    abs Abs;
    /// max(x, 0)
    relu Relu;
    /// 1/(1+e⁻ˣ)
    sigmoid Sigmoid;
    /// x·sigmoid(x)
    silu Silu;
    /// ln(1+eˣ)
    softplus Softplus;
    /// tanh x
    tanh Tanh;
    /// sin x
    sin Sin;
    /// cos x
    cos Cos;
}
impl Tensor {
    /// a·x + b
    pub fn affine(&self, a: f64, b: f64) -> Result<Tensor> {
        run1(Unary { kind: Affine(a, b) }, &[self])
    }
    /// xᵖ
    pub fn pow(&self, p: f64) -> Result<Tensor> {
        run1(Unary { kind: Pow(p) }, &[self])
    }
}
