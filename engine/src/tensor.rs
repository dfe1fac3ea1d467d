//! `Tensor`: one concrete type; dtype and device are run-time values.

use crate::cpu::convert::convert_all;
use crate::layout::{broadcast_shape, checked_numel};
use crate::op::Meta;
use crate::tape::{self, Edge, Grads, Node, no_grad};
use crate::{Buffer, DType, Device, Element, Error, Layout, Result, dtype, prim, rng};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Elements that the host makes at a time for a tensor that it fills.
const PART: usize = 1 << 18;

/// Memory and how often it was written in place.
struct Storage {
    buf: Arc<dyn Buffer>,
    version: AtomicU64,
    copy: Mutex<Option<Copy>>,
}

/// The same elements in another dtype, as long as neither was written since.
struct Copy {
    tensor: Tensor,
    versions: [u64; 2],
}

/// A tensor: a reference-counted buffer, a layout, a dtype, a device, and an edge into the tape. Cloning is cheap and shares the buffer.
#[derive(Clone)]
pub struct Tensor(Arc<Inner>);

struct Inner {
    storage: Arc<Storage>,
    layout: Layout,
    dtype: DType,
    device: Device,
    edge: Option<Edge>,
}

impl Tensor {
    /// Uninitialised: for kernels to fill.
    pub(crate) fn empty(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let n = checked_numel(shape, dtype.size())?;
        Ok(Self::over(device.0.alloc(n * dtype.size())?, shape, dtype, device))
    }
    fn over(buf: Arc<dyn Buffer>, shape: &[usize], dtype: DType, device: &Device) -> Tensor {
        let storage = Arc::new(Storage { buf, version: AtomicU64::new(0), copy: Mutex::new(None) });
        Tensor(Arc::new(Inner { storage, layout: Layout::contiguous(shape), dtype, device: device.clone(), edge: None }))
    }
    fn derive(&self, layout: Layout, edge: Option<Edge>) -> Tensor {
        let i = &self.0;
        Tensor(Arc::new(Inner { storage: i.storage.clone(), layout, dtype: i.dtype, device: i.device.clone(), edge }))
    }
    pub(crate) fn with_edge(&self, edge: Edge) -> Tensor {
        self.derive(self.0.layout.clone(), Some(edge))
    }
    /// The same elements seen through another layout, recorded as `op`.
    pub(crate) fn view_as(&self, layout: Layout, op: impl crate::Op) -> Tensor {
        let edge = self.edge_to(Meta::new(&layout.shape, self.dtype()), op);
        self.derive(layout, edge)
    }
    /// The edge of an output that needed no kernel.
    fn edge_to(&self, meta: Meta, op: impl crate::Op) -> Option<Edge> {
        self.edge().filter(|_| tape::grad_enabled()).map(|e| {
            let saved = tape::Saved::new(op.name(), vec![self.detach()], vec![], vec![], vec![]);
            Edge { node: Node::new(Some(Arc::new(op)), vec![Some(e.clone())], Some(saved), vec![meta], 1), slot: 0 }
        })
    }
    /// Says that `copy` holds this tensor's elements in its own dtype, as an optimizer that writes both keeps it: [`cast`](Self::cast) gives it instead of
    /// computing it, until one of the two is written by anything else.
    pub fn keep_copy(&self, copy: &Tensor) -> Result<()> {
        if copy.shape() != self.shape() || copy.device() != self.device() || [self, copy].iter().any(|t| !t.is_whole()) {
            return Err(Error::invalid(
                "keep_copy",
                format!("needs whole contiguous tensors of one shape on one device, found {self:?} and {copy:?}"),
            ));
        }
        let kept = Copy { tensor: copy.detach(), versions: [self.version(), copy.version()] };
        *self.0.storage.copy.lock().unwrap_or_else(|e| e.into_inner()) = Some(kept);
        Ok(())
    }
    /// The copy in this dtype that was [kept](Self::keep_copy), if it holds what this tensor does.
    pub fn kept_copy(&self, dtype: DType) -> Option<Tensor> {
        let kept = self.0.storage.copy.lock().unwrap_or_else(|e| e.into_inner());
        let c = kept.as_ref().filter(|c| c.tensor.dtype() == dtype && c.versions == [self.version(), c.tensor.version()])?;
        (self.is_whole() && self.numel() == c.tensor.numel()).then(|| c.tensor.derive(Layout::contiguous(self.shape()), None))
    }
    fn is_whole(&self) -> bool {
        self.layout().is_contiguous() && self.layout().offset == 0
    }
    /// `copy`, recorded as what `op` makes of this tensor.
    pub(crate) fn made_before(&self, copy: Tensor, op: impl crate::Op) -> Tensor {
        let edge = self.edge_to(copy.meta(), op);
        copy.derive(copy.0.layout.clone(), edge)
    }
    pub(crate) fn edge(&self) -> Option<&Edge> {
        self.0.edge.as_ref()
    }
    pub(crate) fn buffer(&self) -> &Arc<dyn Buffer> {
        &self.0.storage.buf
    }
    pub(crate) fn version(&self) -> u64 {
        self.0.storage.version.load(Ordering::Acquire)
    }
    pub(crate) fn bump_version(&self) {
        self.0.storage.version.fetch_add(1, Ordering::AcqRel);
    }
    pub(crate) fn is_unique(&self) -> bool {
        Arc::strong_count(&self.0) == 1 && Arc::strong_count(&self.0.storage) == 1
    }

    /// From host data, on the CPU. `data.len()` must be the product of `shape`.
    pub fn from_vec<T: Element>(data: impl AsRef<[T]>, shape: &[usize]) -> Result<Tensor> {
        Self::from_slice(data.as_ref(), shape, &Device::cpu())
    }
    /// From host data, on a device.
    pub fn from_slice<T: Element>(data: &[T], shape: &[usize], device: &Device) -> Result<Tensor> {
        if checked_numel(shape, T::DTYPE.size())? != data.len() {
            return Err(Error::invalid(
                "from_slice",
                format!("shape {shape:?} needs {} elements, found {}", shape.iter().product::<usize>(), data.len()),
            ));
        }
        Ok(Self::over(device.0.upload(dtype::bytes(data))?, shape, T::DTYPE, device))
    }
    /// All elements `value`.
    pub fn full(value: f64, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let t = Self::empty(shape, dtype, device)?;
        crate::dispatch!(dtype, |T| device.0.fill(&**t.buffer(), dtype::bytes(&[<T as Element>::from_f64(value)])))?;
        Ok(t)
    }
    /// From parts of the flat tensor. The memory comes first: a size that cannot be had is an error before anything is made.
    fn from_parts(shape: &[usize], dtype: DType, device: &Device, part: impl Fn(Range<usize>) -> Result<Tensor>) -> Result<Tensor> {
        let n = checked_numel(shape, dtype.size())?;
        if n <= PART {
            return part(0..n)?.reshape(shape);
        }
        let all = Self::empty(&[n], dtype, device)?;
        for at in (0..n).step_by(PART) {
            let r = at..n.min(at + PART);
            all.narrow(0, at, r.len())?.assign(&part(r)?)?;
        }
        all.reshape(shape)
    }
    fn random(shape: &[usize], dtype: DType, device: &Device, draw: impl Fn(Range<usize>) -> Vec<f64>) -> Result<Tensor> {
        let part = |r: Range<usize>| {
            let v = draw(r);
            crate::dispatch!(dtype, |T| Self::from_slice(&v.iter().map(|x| <T as Element>::from_f64(*x)).collect::<Vec<T>>(), &[v.len()], device))
        };
        Self::from_parts(shape, dtype, device, part)
    }
    /// Zeros.
    pub fn zeros(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        Self::full(0.0, shape, dtype, device)
    }
    /// Ones.
    pub fn ones(shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        Self::full(1.0, shape, dtype, device)
    }
    /// Independent standard normal numbers, a function of (seed, stream) alone: the same on every device.
    pub fn randn(shape: &[usize], dtype: DType, device: &Device, seed: u64, stream: u64) -> Result<Tensor> {
        Self::random(shape, dtype, device, |r| rng::normal_of(seed, stream, r))
    }
    /// Independent numbers uniform in [0, 1), a function of (seed, stream) alone.
    pub fn rand(shape: &[usize], dtype: DType, device: &Device, seed: u64, stream: u64) -> Result<Tensor> {
        Self::random(shape, dtype, device, |r| rng::uniform_of(seed, stream, r))
    }

    /// Length of each axis.
    pub fn shape(&self) -> &[usize] {
        &self.0.layout.shape
    }
    /// Length of axis `i`, or 1 where there is none.
    pub fn dim(&self, i: usize) -> usize {
        self.shape().get(i).copied().unwrap_or(1)
    }
    /// Number of axes.
    pub fn rank(&self) -> usize {
        self.shape().len()
    }
    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.0.layout.numel()
    }
    /// Element type.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }
    /// Where it lives.
    pub fn device(&self) -> &Device {
        &self.0.device
    }
    /// Shape, strides and offset.
    pub fn layout(&self) -> &Layout {
        &self.0.layout
    }
    /// Shape and dtype.
    pub fn meta(&self) -> Meta {
        Meta::new(self.shape(), self.dtype())
    }
    /// Whether gradients flow to something through this tensor.
    pub fn is_tracked(&self) -> bool {
        self.edge().is_some()
    }
    /// Whether this is a leaf made by [`Tensor::requires_grad`].
    pub fn is_leaf(&self) -> bool {
        self.edge().is_some_and(|e| e.node.is_leaf())
    }

    /// The same values as a new leaf, whose gradient a backward delivers. Integers have none: the first op on such a leaf is an error.
    pub fn requires_grad(&self) -> Tensor {
        self.with_edge(Edge { node: Node::new(None, vec![], None, vec![self.meta()], 1), slot: 0 })
    }
    /// The same values, cut off from the tape.
    pub fn detach(&self) -> Tensor {
        if self.edge().is_none() { self.clone() } else { self.derive(self.0.layout.clone(), None) }
    }
    /// Gradients of all leaves of a scalar (one element; the seed is 1).
    pub fn backward(&self) -> Result<Grads> {
        let mut g = Grads::new();
        self.backward_into(&mut g)?;
        Ok(g)
    }
    /// Like [`Tensor::backward`], adding to gradients that are already there.
    pub fn backward_into(&self, grads: &mut Grads) -> Result<()> {
        if self.numel() != 1 {
            return Err(Error::shape("backward", "the tensor", "of one element (or use backward_with)", self.shape()));
        }
        tape::backward(self, Tensor::ones(self.shape(), self.dtype(), self.device())?, grads)
    }
    /// Gradients of all leaves of the scalar product of this tensor with `seed`.
    pub fn backward_with(&self, seed: &Tensor) -> Result<Grads> {
        let mut g = Grads::new();
        tape::backward(self, seed.detach(), &mut g)?;
        Ok(g)
    }

    /// All elements, row-major, converted to `T` if they are of another dtype.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        let t = self.detach().contiguous()?;
        fn read<S: Element>(t: &Tensor) -> Result<Vec<S>> {
            let off = t.layout().offset;
            let mut all = vec![S::default(); off + t.numel()];
            t.device().0.download(&**t.buffer(), dtype::bytes_mut(&mut all))?;
            all.drain(..off);
            Ok(all)
        }
        if t.dtype() == T::DTYPE {
            return read::<T>(&t);
        }
        let mut all = vec![T::default(); t.numel()];
        crate::dispatch!(t.dtype(), |S| convert_all(&read::<S>(&t)?, &mut all));
        Ok(all)
    }
    /// The only element, as f64.
    pub fn item(&self) -> Result<f64> {
        if self.numel() != 1 {
            return Err(Error::shape("item", "the tensor", "of one element", self.shape()));
        }
        Ok(self.to_vec::<f64>()?[0])
    }
    /// The same values on another device (through the host); not recorded, so a tracked tensor is refused.
    pub fn to_device(&self, device: &Device) -> Result<Tensor> {
        if self.device() == device {
            return Ok(self.clone());
        }
        tape::refuse_tracked("to_device", &[self])?;
        crate::dispatch!(self.dtype(), |T| Self::from_slice(&self.to_vec::<T>()?, self.shape(), device))
    }
    /// Overwrites the values in place with those of `src` (same shape and dtype): loading parameters.
    pub fn assign(&self, src: &Tensor) -> Result<()> {
        crate::op::run_in_place(prim::Assign { meta: src.meta() }, &[self], &[src])
    }

    /// Itself if row-major without gaps, else a copy that is.
    pub fn contiguous(&self) -> Result<Tensor> {
        if self.layout().is_contiguous() { Ok(self.clone()) } else { crate::op::run1(prim::Contiguous, &[self]) }
    }
    /// The same elements in another shape; copies only if the strides ask for it.
    pub fn reshape(&self, shape: &[usize]) -> Result<Tensor> {
        if checked_numel(shape, 1)? != self.numel() {
            return Err(Error::invalid(
                "reshape",
                format!("{:?} has {} elements, {shape:?} has {}", self.shape(), self.numel(), shape.iter().product::<usize>()),
            ));
        }
        if shape == self.shape() {
            return Ok(self.clone());
        }
        match self.layout().reshaped(shape) {
            Some(l) => Ok(self.view_as(l, prim::ViewOp::Reshape)),
            None => self.contiguous()?.reshape(shape),
        }
    }
    /// Axes in another order: `permute(&[0, 2, 1, 3])`.
    pub fn permute(&self, axes: &[usize]) -> Result<Tensor> {
        let mut seen = vec![false; self.rank()];
        let valid = axes.len() == self.rank() && axes.iter().all(|a| *a < seen.len() && !std::mem::replace(&mut seen[*a], true));
        if !valid {
            return Err(Error::invalid("permute", format!("{axes:?} is no order of the {} axes of {:?}", self.rank(), self.shape())));
        }
        let l = self.layout();
        let layout =
            Layout { shape: axes.iter().map(|a| l.shape[*a]).collect(), strides: axes.iter().map(|a| l.strides[*a]).collect(), offset: l.offset };
        Ok(self.view_as(layout, prim::ViewOp::Permute { axes: axes.to_vec() }))
    }
    /// Swaps two axes.
    pub fn transpose(&self, a: usize, b: usize) -> Result<Tensor> {
        self.axis("transpose", a)?;
        self.axis("transpose", b)?;
        let mut axes: Vec<usize> = (0..self.rank()).collect();
        axes.swap(a, b);
        self.permute(&axes)
    }
    /// `len` entries of `axis` from `start` on, without copying.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Tensor> {
        self.axis("narrow", axis)?;
        let d = self.shape()[axis];
        if start.checked_add(len).is_none_or(|e| e > d) {
            return Err(Error::invalid("narrow", format!("{len} entries from {start} on do not fit axis {axis} of {:?}", self.shape())));
        }
        let mut layout = self.layout().clone();
        layout.shape[axis] = len;
        if len > 0 {
            layout.offset += start * layout.strides[axis] as usize;
        }
        Ok(self.view_as(layout, prim::ViewOp::Narrow { axis, start }))
    }
    /// Parts of the given lengths along `axis`, without copying.
    pub fn split(&self, axis: usize, lens: &[usize]) -> Result<Vec<Tensor>> {
        self.axis("split", axis)?;
        if lens.iter().try_fold(0usize, |a, n| a.checked_add(*n)) != Some(self.shape()[axis]) {
            return Err(Error::invalid("split", format!("lengths {lens:?} must add up to axis {axis} of {:?}", self.shape())));
        }
        let op = prim::ViewOp::Split { axis, lens: lens.to_vec() };
        let node = self.edge().filter(|_| tape::grad_enabled()).map(|e| {
            let saved = tape::Saved::new("split", vec![self.detach()], vec![], vec![], vec![]);
            let mut meta = self.meta();
            let outs = lens.iter().map(|n| {
                meta.shape[axis] = *n;
                meta.clone()
            });
            Node::new(Some(Arc::new(op)), vec![Some(e.clone())], Some(saved), outs.collect(), lens.len())
        });
        let parts = no_grad(|| {
            let mut at = 0;
            let part = |n: &usize| {
                at += n;
                self.detach().narrow(axis, at - n, *n)
            };
            lens.iter().map(part).collect::<Result<Vec<_>>>()
        })?;
        Ok(match node {
            None => parts,
            Some(node) => parts.into_iter().enumerate().map(|(slot, p)| p.with_edge(Edge { node: node.clone(), slot })).collect(),
        })
    }
    /// Repeats axes of length 1 (and adds leading axes) to `shape`, without copying.
    pub fn expand(&self, shape: &[usize]) -> Result<Tensor> {
        if shape == self.shape() {
            return Ok(self.clone());
        }
        if shape.len() < self.rank() || broadcast_shape(self.shape(), shape).as_deref() != Some(shape) {
            return Err(Error::invalid("expand", format!("{:?} does not broadcast to {shape:?}", self.shape())));
        }
        checked_numel(shape, self.dtype().size())?;
        let lead = shape.len() - self.rank();
        let l = self.layout();
        let strides = (0..shape.len()).map(|i| if i < lead || (l.shape[i - lead] == 1 && shape[i] != 1) { 0 } else { l.strides[i - lead] }).collect();
        Ok(self.view_as(Layout { shape: shape.to_vec(), strides, offset: l.offset }, prim::ViewOp::Expand))
    }
    /// Adds an axis of length 1 before `axis`.
    pub fn unsqueeze(&self, axis: usize) -> Result<Tensor> {
        if axis > self.rank() {
            return Err(Error::invalid("unsqueeze", format!("axis {axis} is out of range for {:?}", self.shape())));
        }
        let mut s = self.shape().to_vec();
        s.insert(axis, 1);
        self.reshape(&s)
    }
    pub(crate) fn axis(&self, op: &'static str, a: usize) -> Result<()> {
        if a < self.rank() { Ok(()) } else { Err(Error::invalid(op, format!("axis {a} is out of range for shape {:?}", self.shape()))) }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor {} on {}", self.meta(), self.device().name())?;
        match self.to_vec::<f64>() {
            Ok(v) if v.len() <= 16 => write!(f, " {v:?}"),
            Ok(v) => write!(f, " [{:?}, …]", &v[..8]),
            Err(e) => write!(f, " ({e})"),
        }
    }
}
