//! The `Op` contract, and `run`, through which every operation goes, built in or a user's own.

use crate::tape::{self, Edge, Node, Saved};
use crate::{DType, Device, Error, Result, Tensor, View, profile, registry, watch};
use std::{any::Any, fmt::Debug, ops::RangeInclusive, sync::Arc};

/// Shape and dtype of a tensor that need not exist yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Length of each axis.
    pub shape: Vec<usize>,
    /// Element type.
    pub dtype: DType,
}

impl Meta {
    /// Shape and dtype.
    pub fn new(shape: &[usize], dtype: DType) -> Self {
        Meta { shape: shape.to_vec(), dtype }
    }
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }
}

impl std::fmt::Display for Meta {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{:?}", self.dtype, self.shape)
    }
}

/// The layout that a kernel accepts for an input. Where it does not hold, the engine makes a contiguous copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// Any strides.
    Any,
    /// Any strides, but the last axis dense.
    LastDimDense,
    /// Row-major without gaps.
    Contiguous,
}

/// An operation: a plain struct of attributes, free of devices. Kernels for it are rows in the [registry].
///
/// A hand-written backward is itself an `Op` with kernels of its own; `backward` just runs it.
pub trait Op: Any + Send + Sync + Debug {
    /// Name in errors and profiles.
    fn name(&self) -> &'static str;
    /// Checks every input and gives all outputs, hidden ones last. Allocates nothing.
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>>;
    /// How many inputs it takes; checked before `infer`, which may index them.
    fn arity(&self) -> RangeInclusive<usize> {
        1..=1
    }
    /// How many of the outputs are for `backward` alone (log-sum-exp, chunk factors).
    fn hidden(&self) -> usize {
        0
    }
    /// The layout that the kernels accept for input `i`.
    fn want(&self, _i: usize) -> Want {
        Want::Contiguous
    }
    /// Which inputs and which outputs `backward` reads; nothing else is kept alive.
    fn saves(&self) -> (Vec<usize>, Vec<usize>) {
        (vec![], vec![])
    }
    /// `false` makes the forward fail when an input needs a gradient, instead of the backward.
    fn differentiable(&self) -> bool {
        true
    }
    /// One gradient per input (`None` where `need` is false or it is zero), from one `dy` per visible output (`None`: zero).
    fn backward(&self, _saved: &Saved, _dy: &[Option<Tensor>], _need: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Err(Error::NoGrad { op: self.name() })
    }
}

/// Runs `op` on `x` and records it if an input needs a gradient. Returns the visible outputs.
pub fn run<O: Op>(op: O, x: &[&Tensor]) -> Result<Vec<Tensor>> {
    let Some(first) = x.first() else { return Err(Error::invalid(op.name(), "has no inputs; use run_on to name a device")) };
    let device = first.device().clone();
    run_on(op, &device, x)
}

/// Like [`run`], for an op with a single visible output.
pub fn run1<O: Op>(op: O, x: &[&Tensor]) -> Result<Tensor> {
    let name = op.name();
    let mut y = run(op, x)?;
    match (y.pop(), y.is_empty()) {
        (Some(t), true) => Ok(t),
        _ => Err(Error::invalid(name, "run1 is for ops with one visible output; use run")),
    }
}

/// Like [`run`], on a named device; for ops that may have no inputs.
pub fn run_on<O: Op>(op: O, device: &Device, x: &[&Tensor]) -> Result<Vec<Tensor>> {
    let name = op.name();
    for t in x {
        if t.device() != device {
            return Err(Error::Device { op: name, first: device.name(), other: t.device().name() });
        }
    }
    let outs = outputs(&op, x)?;
    let visible = outs.len().checked_sub(op.hidden());
    let visible = visible.ok_or_else(|| Error::invalid(name, format!("hides {} of {} outputs", op.hidden(), outs.len())))?;
    // integers carry no gradient, so an op with only such outputs ends the graph by its nature
    let track = tape::grad_enabled() && x.iter().any(|t| t.edge().is_some()) && outs.iter().any(|m| m.dtype.is_float());
    if track && !op.differentiable() {
        return Err(Error::NoGrad { op: name });
    }
    if let Some(t) = x.iter().find(|t| track && t.is_tracked() && !t.dtype().is_float()) {
        return Err(Error::dtype(name, "an input that requires a gradient", "a float dtype", t.dtype()));
    }
    let fitted = x.iter().enumerate().map(|(i, t)| fit(&op, i, t)).collect::<Result<Vec<_>>>()?;
    let ys = outs.iter().map(|m| Tensor::empty(&m.shape, m.dtype, device)).collect::<Result<Vec<_>>>()?;
    launch(&op, device, &fitted, &ys)?;
    if !track {
        return Ok(ys.into_iter().take(visible).collect());
    }
    let edges = x.iter().map(|t| t.edge().cloned()).collect();
    let (si, so) = op.saves();
    let saved = Saved::new(name, fitted, si, ys.clone(), so);
    let node = Node::new(Some(Arc::new(op)), edges, Some(saved), outs, visible);
    Ok(ys
        .into_iter()
        .take(visible)
        .enumerate()
        .map(|(slot, y)| if y.dtype().is_float() { y.with_edge(Edge { node: node.clone(), slot }) } else { y })
        .collect())
}

/// Runs a kernel whose outputs are the buffers of `targets`, which it may read as well as write: optimizers, gradient accumulation.
///
/// The targets must be contiguous, distinct, and have the metas that `op.infer(x)` gives. Nothing is recorded: under recording, an input that needs a
/// gradient is refused, and so is a target that was computed from one (a leaf may be changed). A tensor that was saved for backward and is changed here
/// makes that backward fail with [`Error::Modified`].
pub fn run_in_place<O: Op>(op: O, targets: &[&Tensor], x: &[&Tensor]) -> Result<()> {
    let name = op.name();
    let Some(device) = targets.first().map(|t| t.device().clone()) else { return Ok(()) };
    if let Some(t) = targets.iter().chain(x).find(|t| *t.device() != device) {
        return Err(Error::Device { op: name, first: device.name(), other: t.device().name() });
    }
    tape::refuse_tracked(name, x)?;
    if let Some(j) = targets.iter().position(|t| tape::grad_enabled() && t.is_tracked() && !t.is_leaf()) {
        let msg = format!("in-place target {j} was computed under recording, and its gradient would be that of the old value; detach() it");
        return Err(Error::invalid(name, msg));
    }
    let outs = outputs(&op, x)?;
    if outs.len() != targets.len() {
        return Err(Error::invalid(name, format!("writes {} tensors in place, {} targets were given", outs.len(), targets.len())));
    }
    for (j, (t, m)) in targets.iter().zip(&outs).enumerate() {
        if t.meta() != *m || !t.layout().is_contiguous() {
            return Err(Error::invalid(
                name,
                format!("in-place target {j} must be a contiguous {m}, found {} with strides {:?}", t.meta(), t.layout().strides),
            ));
        }
    }
    let fitted = x.iter().enumerate().map(|(i, t)| fit(&op, i, t)).collect::<Result<Vec<_>>>()?;
    let ys: Vec<Tensor> = targets.iter().map(|t| t.detach()).collect();
    ys.iter().for_each(|t| t.bump_version());
    launch(&op, &device, &fitted, &ys)
}

/// What `op` makes of `x`, once their number is right.
fn outputs(op: &dyn Op, x: &[&Tensor]) -> Result<Vec<Meta>> {
    let arity = op.arity();
    if !arity.contains(&x.len()) {
        let (least, most) = (arity.start(), arity.end());
        let want = if least == most { least.to_string() } else { format!("{least} to {most}") };
        return Err(Error::invalid(op.name(), format!("takes {want} inputs, found {}", x.len())));
    }
    op.infer(&x.iter().map(|t| t.meta()).collect::<Vec<_>>())
}

fn launch(op: &dyn Op, device: &Device, x: &[Tensor], y: &[Tensor]) -> Result<()> {
    fn view(t: &Tensor) -> View<'_> {
        View { buf: &**t.buffer(), layout: t.layout(), dtype: t.dtype() }
    }
    let kernel = registry::kernel(op, device.backend())?;
    let xs: Vec<View> = x.iter().map(view).collect();
    let ys: Vec<View> = y.iter().map(view).collect();
    profile::timed(op.name(), || kernel(op, device.backend(), &xs, &ys))?;
    // what is hidden is between the op and its backward: padding in it may hold anything
    watch::check(op.name(), &y[..y.len() - op.hidden()])
}

/// The input as the kernel wants it, without its edge.
fn fit<O: Op>(op: &O, i: usize, t: &Tensor) -> Result<Tensor> {
    let fits = match op.want(i) {
        Want::Any => true,
        Want::LastDimDense => t.layout().last_dim_dense(),
        Want::Contiguous => t.layout().is_contiguous(),
    };
    let t = t.detach();
    if fits { Ok(t) } else { t.contiguous() }
}
