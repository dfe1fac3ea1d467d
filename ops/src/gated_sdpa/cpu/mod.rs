//! CPU kernels: the rows of the registry, and what the passes share.

mod backward;
mod few;
mod forward;
mod gate;
mod mask;
mod pattern;
mod view;

use super::{Attention, AttentionPattern, BACKWARD, Gate, GatedSdpa, GatedSdpaBackward, NAME};
use engine::{
    DType, Result,
    cpu::{Inputs, Outputs, simd::Real},
};
use mask::Bands;
use view::{Data, View};

engine::cpu_kernel!(GatedSdpa => run_forward);
engine::cpu_kernel!(GatedSdpaBackward => run_backward);
engine::cpu_kernel!(AttentionPattern => run_pattern);

/// Elements between the rows of a tile beyond their length: rows a power of two apart would share cache sets.
const PAD: usize = 16;

/// Sizes and mask of one call.
#[derive(Clone, Copy, Debug)]
struct Problem {
    b: usize,
    t: usize,
    s: usize,
    h: usize,
    hkv: usize,
    d: usize,
    dv: usize,
    causal: bool,
    window: Option<usize>,
    scale: f64,
}

/// The gate's logits and how they act.
#[derive(Clone, Copy)]
struct Gating<'a> {
    logits: View<'a>,
    gate: Gate,
    elementwise: bool,
}

impl Problem {
    fn new(a: &Attention, q: &[usize], k: &[usize], dv: usize) -> Self {
        let scale = a.scale(q[3]);
        Problem { b: q[0], t: q[1], s: k[1], h: q[2], hkv: k[2], d: q[3], dv, causal: a.causal, window: a.window, scale }
    }
}

fn run_forward(op: &GatedSdpa, x: &Inputs, y: &mut Outputs) -> Result<()> {
    fn typed<F: Real>(op: &GatedSdpa, x: &Inputs, y: &mut Outputs) -> Result<()> {
        let p = Problem::new(&op.attention, x.shape(0), x.shape(1), x.shape(2)[3]);
        let bands = bands(NAME, &p, x, op.packed.then(|| x.len() - 1))?;
        let gating = gating(op, x)?;
        let mut u = if op.gate.is_some() { Some(y.real::<F>(2)?) } else { None };
        let (q, k, v) = (view(x, 0)?, view(x, 1)?, view(x, 2)?);
        forward::forward(&p, &bands, q, k, v, gating, &mut y.real::<F>(0)?, u.as_deref_mut(), &mut y.slice::<F>(1)?);
        Ok(())
    }
    engine::dispatch_real!(x.dtype(0), |F| typed::<F>(op, x, y))
}

fn run_backward(op: &GatedSdpaBackward, x: &Inputs, y: &mut Outputs) -> Result<()> {
    fn typed<F: Real>(op: &GatedSdpa, x: &Inputs, y: &mut Outputs) -> Result<()> {
        let p = Problem::new(&op.attention, x.shape(0), x.shape(1), x.shape(2)[3]);
        let n = x.len() - 3;
        let bands = bands(BACKWARD, &p, x, op.packed.then(|| n - 1))?;
        let saved = backward::Saved { u: view(x, n)?, lse: x.slice::<F>(n + 1)?, dy: view(x, n + 2)? };
        let mut dgate = if op.gate.is_some() { Some(y.real::<F>(3)?) } else { None };
        let (mut dq, mut dk, mut dv) = (y.real::<F>(0)?, y.real::<F>(1)?, y.real::<F>(2)?);
        let grads = backward::Grads { dq: &mut dq, dk: &mut dk, dv: &mut dv, dgate: dgate.as_deref_mut() };
        backward::backward(&p, &bands, view(x, 0)?, view(x, 1)?, view(x, 2)?, gating(op, x)?, saved, grads);
        Ok(())
    }
    engine::dispatch_real!(x.dtype(0), |F| typed::<F>(&op.0, x, y))
}

fn run_pattern(op: &AttentionPattern, x: &Inputs, y: &mut Outputs) -> Result<()> {
    fn typed<F: Real>(op: &AttentionPattern, x: &Inputs, y: &mut Outputs) -> Result<()> {
        let p = Problem::new(&op.attention, x.shape(0), x.shape(1), 0);
        let bands = bands("attention_pattern", &p, x, op.packed.then_some(2))?;
        pattern::pattern(&p, &bands, view(x, 0)?, view(x, 1)?, &mut y.slice::<F>(0)?);
        Ok(())
    }
    engine::dispatch_real!(x.dtype(0), |F| typed::<F>(op, x, y))
}

/// Input `i` as a strided view over its first three axes.
fn view<'a>(x: &'a Inputs, i: usize) -> Result<View<'a>> {
    let data = match x.dtype(i) {
        DType::F64 => Data::F64(x.slice(i)?),
        DType::BF16 => Data::Bf16(x.slice(i)?),
        DType::F16 => Data::F16(x.slice(i)?),
        _ => Data::F32(x.slice(i)?),
    };
    let s = &x.layout(i).strides;
    Ok(View { data, strides: [s[0] as usize, s[1] as usize, s[2] as usize] })
}

fn gating<'a>(op: &GatedSdpa, x: &'a Inputs) -> Result<Option<Gating<'a>>> {
    op.gate.map(|gate| Ok(Gating { logits: view(x, 3)?, gate, elementwise: x.shape(3).len() == 4 })).transpose()
}

/// The bands of the masks, with the document boundaries of input `cu` checked.
fn bands(op: &'static str, p: &Problem, x: &Inputs, cu: Option<usize>) -> Result<Bands> {
    let cu = cu.map(|i| crate::documents::read(op, x, i, p.t)).transpose()?;
    Ok(Bands::new(p, cu.as_deref()))
}
