//! Elementwise arithmetic, comparison and selection with broadcasting.

use super::{float, for_rows, same_dtype};
use crate::cpu::convert::{PIECE, convert, nearest_bf16, widen};
use crate::cpu::{Inputs, Outputs};
use crate::{DType, Element, Error, Layout, Meta, Op, Result, Saved, Tensor, Want, broadcast_shape, cpu_kernel, dispatch, run1, vectorized};
use half::{bf16, f16};
use std::ops::RangeInclusive;

/// Arithmetic of one element: integers wrap, halves go through f32. All but f16's vectorises.
pub(crate) trait Lane: Element {
    fn op(kind: BinaryKind, a: Self, b: Self) -> Self;
}
macro_rules! lane {
    (float $($t:ty),*) => {$(impl Lane for $t {
        #[inline(always)] fn op(kind: BinaryKind, a: $t, b: $t) -> $t {
            match kind { BinaryKind::Add => a + b, BinaryKind::Sub => a - b, BinaryKind::Mul => a * b, BinaryKind::Div => a / b,
                BinaryKind::Max => if a > b { a } else { b }, BinaryKind::Min => if a < b { a } else { b } }
        }
    })*};
    (half $($t:ty, $down:path);*) => {$(impl Lane for $t {
        #[inline(always)] fn op(kind: BinaryKind, a: $t, b: $t) -> $t { $down(f32::op(kind, a.to_f32(), b.to_f32())) }
    })*};
    (int $($t:ty),*) => {$(impl Lane for $t {
        #[inline(always)] fn op(kind: BinaryKind, a: $t, b: $t) -> $t {
            match kind { BinaryKind::Add => a.wrapping_add(b), BinaryKind::Sub => a.wrapping_sub(b), BinaryKind::Mul => a.wrapping_mul(b),
                BinaryKind::Div => a.checked_div(b).unwrap_or(0), BinaryKind::Max => a.max(b), BinaryKind::Min => a.min(b) }
        }
    })*};
}
lane!(float f64, f32);
lane!(half bf16, nearest_bf16; f16, f16::from_f32);
lane!(int i64, i32, u32, u8);

/// `y[i] = f(a[i·sa], b[i·sb])`, with loops of their own for what is dense or one number, which vectorise.
macro_rules! pairs {
    ($a:ident, $sa:ident, $b:ident, $sb:ident, $y:ident, |$p:ident, $q:ident| $f:expr) => {
        match ($sa, $sb) {
            (1, 1) => {
                for ((y, a), b) in $y.iter_mut().zip($a).zip($b) {
                    let ($p, $q) = (*a, *b);
                    *y = $f;
                }
            }
            (1, 0) => {
                let $q = $b[0];
                for (y, a) in $y.iter_mut().zip($a) {
                    let $p = *a;
                    *y = $f;
                }
            }
            (0, 1) => {
                let $p = $a[0];
                for (y, b) in $y.iter_mut().zip($b) {
                    let $q = *b;
                    *y = $f;
                }
            }
            _ => {
                for (i, y) in $y.iter_mut().enumerate() {
                    let ($p, $q) = ($a[i * $sa], $b[i * $sb]);
                    *y = $f;
                }
            }
        }
    };
}

vectorized! {
    fn add[T: Lane](y: &mut [T], x: &[T]) {
        for (y, x) in y.iter_mut().zip(x) { *y = T::op(BinaryKind::Add, *y, *x) }
    }

    fn arithmetic_row[T: Lane](kind: BinaryKind, a: &[T], sa: usize, b: &[T], sb: usize, y: &mut [T]) {
        macro_rules! each { ($k:ident) => { pairs!(a, sa, b, sb, y, |a, b| T::op(BinaryKind::$k, a, b)) } }
        match kind {
            BinaryKind::Add => each!(Add), BinaryKind::Sub => each!(Sub), BinaryKind::Mul => each!(Mul),
            BinaryKind::Div => each!(Div), BinaryKind::Max => each!(Max), BinaryKind::Min => each!(Min),
        }
    }

    fn compare_row[T: Element](kind: CompareKind, a: &[T], sa: usize, b: &[T], sb: usize, y: &mut [u8]) {
        match kind {
            CompareKind::Eq => pairs!(a, sa, b, sb, y, |a, b| u8::from(a == b)),
            CompareKind::Lt => pairs!(a, sa, b, sb, y, |a, b| u8::from(a < b)),
            CompareKind::Le => pairs!(a, sa, b, sb, y, |a, b| u8::from(a <= b)),
        }
    }

    fn select_row[T: Element](c: &[u8], sc: usize, a: &[T], sa: usize, b: &[T], sb: usize, y: &mut [T]) {
        // both are read, so that no branch stands between the loads
        let pick = |c: u8, a: T, b: T| if c != 0 { a } else { b };
        match (sc, sa, sb) {
            (1, 1, 1) => for (((y, c), a), b) in y.iter_mut().zip(c).zip(a).zip(b) { *y = pick(*c, *a, *b) },
            (1, 1, 0) => { let b = b[0]; for ((y, c), a) in y.iter_mut().zip(c).zip(a) { *y = pick(*c, *a, b) } }
            (1, 0, 1) => { let a = a[0]; for ((y, c), b) in y.iter_mut().zip(c).zip(b) { *y = pick(*c, a, *b) } }
            _ => for (i, y) in y.iter_mut().enumerate() { *y = pick(c[i * sc], a[i * sa], b[i * sb]) },
        }
    }
}

/// y += x
pub(crate) fn add_into<T: Lane>(y: &mut [T], x: &[T]) {
    if T::DTYPE != DType::F16 {
        return add(y, x);
    }
    let (mut wy, mut wx) = ([0f32; PIECE], [0f32; PIECE]);
    for (y, x) in y.chunks_mut(PIECE).zip(x.chunks(PIECE)) {
        let (wy, wx) = (&mut wy[..y.len()], &mut wx[..y.len()]);
        convert(y, wy);
        convert(x, wx);
        add(wy, wx);
        convert(wy, y);
    }
}

/// `f(a, step of a, b, step of b, y)` on pieces of f16 that were widened to f32: the processor converts vectors of it, but not inside of LLVM's loops.
fn pairs_of_f16<T: Element, Y>(a: &[T], sa: usize, b: &[T], sb: usize, y: &mut [Y], f: impl Fn(&[f32], usize, &[f32], usize, &mut [Y])) {
    let (mut wa, mut wb) = ([0f32; PIECE], [0f32; PIECE]);
    for (y, at) in y.chunks_mut(PIECE).zip((0..).step_by(PIECE)) {
        let n = y.len();
        let (sa, sb) = (widen(&a[at * sa..], sa, &mut wa[..n]), widen(&b[at * sb..], sb, &mut wb[..n]));
        f(&wa[..n], sa, &wb[..n], sb, y);
    }
}

fn arithmetic<T: Lane>(kind: BinaryKind, a: &[T], sa: usize, b: &[T], sb: usize, y: &mut [T]) {
    if T::DTYPE != DType::F16 {
        return arithmetic_row(kind, a, sa, b, sb, y);
    }
    pairs_of_f16(a, sa, b, sb, y, |a, sa, b, sb, y| {
        let mut wide = [0f32; PIECE];
        arithmetic_row(kind, a, sa, b, sb, &mut wide[..y.len()]);
        convert(&wide[..y.len()], y);
    });
}

fn compare<T: Element>(kind: CompareKind, a: &[T], sa: usize, b: &[T], sb: usize, y: &mut [u8]) {
    if T::DTYPE != DType::F16 {
        return compare_row(kind, a, sa, b, sb, y);
    }
    pairs_of_f16(a, sa, b, sb, y, |a, sa, b, sb, y| compare_row(kind, a, sa, b, sb, y));
}

/// Which arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BinaryKind {
    /// a + b
    Add,
    /// a − b
    Sub,
    /// a · b
    Mul,
    /// a / b (floats only)
    Div,
    /// The larger; where equal, each gets half of the gradient.
    Max,
    /// The smaller; where equal, each gets half of the gradient.
    Min,
}

/// Elementwise arithmetic of two tensors of one shape (views with stride 0 make it broadcast).
#[derive(Debug)]
pub struct Binary {
    /// Which arithmetic.
    pub kind: BinaryKind,
}

fn same_shape(op: &'static str, x: &[Meta]) -> Result<()> {
    match x.iter().enumerate().find(|(_, m)| m.shape != x[0].shape) {
        None => Ok(()),
        Some((i, m)) => Err(Error::shape(op, format!("input {i}"), format!("{:?}", x[0].shape), &m.shape)),
    }
}

impl Op for Binary {
    fn name(&self) -> &'static str {
        match self.kind {
            BinaryKind::Add => "add",
            BinaryKind::Sub => "sub",
            BinaryKind::Mul => "mul",
            BinaryKind::Div => "div",
            BinaryKind::Max => "maximum",
            BinaryKind::Min => "minimum",
        }
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        same_dtype(self.name(), x)?;
        same_shape(self.name(), x)?;
        if self.kind == BinaryKind::Div {
            float("div", "a", &x[0])?;
        }
        Ok(vec![x[0].clone()])
    }
    fn want(&self, _: usize) -> Want {
        Want::Any
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        match self.kind {
            BinaryKind::Add | BinaryKind::Sub => (vec![], vec![]),
            _ => (vec![0, 1], vec![]),
        }
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None, None]) };
        let want = |i: usize, f: &dyn Fn() -> Result<Tensor>| if need[i] { f().map(Some) } else { Ok(None) };
        let half = |x: &Tensor, y: &Tensor| -> Result<Tensor> {
            let share = x.gt(y)?.cast(dy.dtype())?.add(&x.eq(y)?.cast(dy.dtype())?.affine(0.5, 0.0)?)?;
            dy.mul(&share)
        };
        Ok(match self.kind {
            BinaryKind::Add => vec![Some(dy.clone()), Some(dy.clone())],
            BinaryKind::Sub => vec![Some(dy.clone()), want(1, &|| dy.neg())?],
            BinaryKind::Mul => vec![want(0, &|| dy.mul(s.input(1)?))?, want(1, &|| dy.mul(s.input(0)?))?],
            BinaryKind::Div => {
                let b = s.input(1)?;
                vec![want(0, &|| dy.div(b))?, want(1, &|| dy.mul(s.input(0)?)?.div(&b.mul(b)?)?.neg())?]
            }
            BinaryKind::Max => {
                let (a, b) = (s.input(0)?, s.input(1)?);
                vec![want(0, &|| half(a, b))?, want(1, &|| half(b, a))?]
            }
            BinaryKind::Min => {
                let (a, b) = (s.input(0)?, s.input(1)?);
                vec![want(0, &|| half(b, a))?, want(1, &|| half(a, b))?]
            }
        })
    }
}
cpu_kernel!(Binary => binary_kernel);

fn binary_kernel(op: &Binary, x: &Inputs, y: &mut Outputs) -> Result<()> {
    dispatch!(x.dtype(0), |T| {
        let (a, b, mut out) = (x.slice::<T>(0)?, x.slice::<T>(1)?, y.slice::<T>(0)?);
        let dense = Layout::contiguous(x.shape(0));
        let (shape, st) = Layout::merged(&[x.layout(0), x.layout(1), &dense]);
        let last = shape.len() - 1;
        let (sa, sb) = (st[0][last] as usize, st[1][last] as usize);
        for_rows(&mut out, &shape, &st[..2], |r, o| arithmetic(op.kind, &a[o[0]..], sa, &b[o[1]..], sb, r));
    });
    Ok(())
}

/// Which comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompareKind {
    /// a = b
    Eq,
    /// a < b
    Lt,
    /// a ≤ b
    Le,
}

/// Elementwise comparison: u8, 0 or 1.
#[derive(Debug)]
pub struct Compare {
    /// Which comparison.
    pub kind: CompareKind,
}

impl Op for Compare {
    fn name(&self) -> &'static str {
        match self.kind {
            CompareKind::Eq => "eq",
            CompareKind::Lt => "lt",
            CompareKind::Le => "le",
        }
    }
    fn arity(&self) -> RangeInclusive<usize> {
        2..=2
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        same_dtype(self.name(), x)?;
        same_shape(self.name(), x)?;
        Ok(vec![Meta::new(&x[0].shape, DType::U8)])
    }
    fn want(&self, _: usize) -> Want {
        Want::Any
    }
}
cpu_kernel!(Compare => compare_kernel);

fn compare_kernel(op: &Compare, x: &Inputs, y: &mut Outputs) -> Result<()> {
    dispatch!(x.dtype(0), |T| {
        let (a, b, mut out) = (x.slice::<T>(0)?, x.slice::<T>(1)?, y.slice::<u8>(0)?);
        let dense = Layout::contiguous(x.shape(0));
        let (shape, st) = Layout::merged(&[x.layout(0), x.layout(1), &dense]);
        let last = shape.len() - 1;
        let (sa, sb) = (st[0][last] as usize, st[1][last] as usize);
        for_rows(&mut out, &shape, &st[..2], |r, o| compare(op.kind, &a[o[0]..], sa, &b[o[1]..], sb, r));
    });
    Ok(())
}

/// `cond ? a : b` elementwise; inputs cond (u8), a, b of one shape.
#[derive(Debug)]
pub struct Select;

impl Op for Select {
    fn name(&self) -> &'static str {
        "where"
    }
    fn arity(&self) -> RangeInclusive<usize> {
        3..=3
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        if x[0].dtype != DType::U8 {
            return Err(Error::dtype("where", "cond", DType::U8, x[0].dtype));
        }
        same_dtype("where", &x[1..])?;
        same_shape("where", x)?;
        Ok(vec![x[1].clone()])
    }
    fn want(&self, _: usize) -> Want {
        Want::Any
    }
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![0], vec![])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let Some(dy) = &dy[0] else { return Ok(vec![None; 3]) };
        let zero = Tensor::zeros(&[], dy.dtype(), dy.device())?;
        let c = s.input(0)?;
        Ok(vec![None, need[1].then(|| c.select(dy, &zero)).transpose()?, need[2].then(|| c.select(&zero, dy)).transpose()?])
    }
}
cpu_kernel!(Select => select_kernel);

fn select_kernel(_: &Select, x: &Inputs, y: &mut Outputs) -> Result<()> {
    dispatch!(x.dtype(1), |T| {
        let (c, a, b, mut out) = (x.slice::<u8>(0)?, x.slice::<T>(1)?, x.slice::<T>(2)?, y.slice::<T>(0)?);
        let dense = Layout::contiguous(x.shape(0));
        let (shape, st) = Layout::merged(&[x.layout(0), x.layout(1), x.layout(2), &dense]);
        let last = shape.len() - 1;
        let s: Vec<usize> = st.iter().map(|s| s[last] as usize).collect();
        for_rows(&mut out, &shape, &st[..3], |r, o| select_row(&c[o[0]..], s[0], &a[o[1]..], s[1], &b[o[2]..], s[2], r));
    });
    Ok(())
}

/// Expands all to their common shape.
fn broadcast(op: &'static str, x: &[&Tensor]) -> Result<Vec<Tensor>> {
    let mut shape = x[0].shape().to_vec();
    for t in &x[1..] {
        shape =
            broadcast_shape(&shape, t.shape()).ok_or_else(|| Error::invalid(op, format!("shapes {shape:?} and {:?} do not broadcast", t.shape())))?;
    }
    x.iter().map(|t| t.expand(&shape)).collect()
}

macro_rules! methods {
    ($($(#[$m:meta])* $f:ident $op:ident $k:expr, $name:literal;)*) => { impl Tensor { $($(#[$m])* pub fn $f(&self, b: &Tensor) -> Result<Tensor> {
        let x = broadcast($name, &[self, b])?;
        run1($op { kind: $k }, &[&x[0], &x[1]])
    })* } };
}
methods! {
    /// a + b, broadcast.
    add Binary BinaryKind::Add, "add";
    /// a − b, broadcast.
    sub Binary BinaryKind::Sub, "sub";
    /// a · b, broadcast.
    mul Binary BinaryKind::Mul, "mul";
    /// a / b, broadcast.
    div Binary BinaryKind::Div, "div";
    /// The larger of two, broadcast.
    maximum Binary BinaryKind::Max, "maximum";
    /// The smaller of two, broadcast.
    minimum Binary BinaryKind::Min, "minimum";
    /// a = b as u8, broadcast.
    eq Compare CompareKind::Eq, "eq";
    /// a < b as u8, broadcast.
    lt Compare CompareKind::Lt, "lt";
    /// a ≤ b as u8, broadcast.
    le Compare CompareKind::Le, "le";
}
impl Tensor {
    /// a > b as u8, broadcast.
    pub fn gt(&self, b: &Tensor) -> Result<Tensor> {
        b.lt(self)
    }
    /// a ≥ b as u8, broadcast.
    pub fn ge(&self, b: &Tensor) -> Result<Tensor> {
        b.le(self)
    }
    /// `self ? a : b` for a u8 condition, broadcast.
    pub fn select(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let x = broadcast("where", &[self, a, b])?;
        run1(Select, &[&x[0], &x[1], &x[2]])
    }
}
