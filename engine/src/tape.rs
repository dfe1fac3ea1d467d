//! The tape: an Arc DAG owned by the tensors that were computed. Dropping the outputs drops it; nothing is registered anywhere.

use crate::op::Meta;
use crate::{Error, Op, Result, Tensor, op, watch};
use std::cell::{Cell, RefCell};
use std::collections::{BinaryHeap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

thread_local! { static GRAD: Cell<bool> = const { Cell::new(true) } }

/// Whether operations are being recorded on this thread.
pub fn grad_enabled() -> bool {
    GRAD.get()
}

/// Runs `f` with recording switched on or off, and restores it after, also on a panic.
fn with_grad<R>(on: bool, f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            GRAD.set(self.0);
        }
    }
    let _restore = Restore(GRAD.replace(on));
    f()
}

/// Runs `f` without recording.
pub fn no_grad<R>(f: impl FnOnce() -> R) -> R {
    with_grad(false, f)
}

/// Runs `f` with recording on, whatever the caller's state: for work that another thread, or a stolen task, runs for us.
pub fn enable_grad<R>(f: impl FnOnce() -> R) -> R {
    with_grad(true, f)
}

/// An error if recording would have to cut a gradient off: for functions that have none.
pub fn refuse_tracked(op: &'static str, x: &[&Tensor]) -> Result<()> {
    if grad_enabled() && x.iter().any(|t| t.is_tracked()) { Err(Error::NoGrad { op }) } else { Ok(()) }
}

/// Where a tensor comes from: output `slot` of a node.
#[derive(Clone)]
pub(crate) struct Edge {
    pub node: Arc<Node>,
    pub slot: usize,
}

type Recompute = dyn Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync;

enum Kind {
    Leaf,
    Op(Arc<dyn Op>),
    Checkpoint(Arc<Recompute>),
}

pub(crate) struct Node {
    /// Consumers are younger than what they consume, so descending ids are a topological order.
    id: u64,
    kind: Kind,
    inputs: Vec<Option<Edge>>,
    saved: Mutex<Option<Saved>>,
    outs: Vec<Meta>,
    visible: usize,
    /// For [`watch`]: the part of the model that recorded it.
    place: Option<Arc<str>>,
}

static NEXT: AtomicU64 = AtomicU64::new(0);

impl Node {
    pub fn new(op: Option<Arc<dyn Op>>, inputs: Vec<Option<Edge>>, saved: Option<Saved>, outs: Vec<Meta>, visible: usize) -> Arc<Node> {
        Self::make(op.map_or(Kind::Leaf, Kind::Op), inputs, saved, outs, visible)
    }
    fn make(kind: Kind, inputs: Vec<Option<Edge>>, saved: Option<Saved>, outs: Vec<Meta>, visible: usize) -> Arc<Node> {
        Arc::new(Node { id: NEXT.fetch_add(1, Ordering::Relaxed), kind, inputs, saved: Mutex::new(saved), outs, visible, place: watch::current() })
    }
    pub fn is_leaf(&self) -> bool {
        matches!(self.kind, Kind::Leaf)
    }
    pub fn id(&self) -> u64 {
        self.id
    }
    fn name(&self) -> &'static str {
        match &self.kind {
            Kind::Leaf => "leaf",
            Kind::Op(op) => op.name(),
            Kind::Checkpoint(_) => "checkpoint",
        }
    }
}

/// What a node holds other nodes by: its inputs, and the tensors that a checkpointed function captures.
type Parts = (Vec<Option<Edge>>, Kind);

thread_local! {
    /// Whether this thread is taking nodes apart, and what is left of those that died meanwhile.
    static DYING: RefCell<(bool, Vec<Parts>)> = const { RefCell::new((false, vec![])) };
}

impl Drop for Node {
    /// Iterative: a chain of a million nodes must not recurse.
    fn drop(&mut self) {
        let parts = (std::mem::take(&mut self.inputs), std::mem::replace(&mut self.kind, Kind::Leaf));
        // a thread that ends has no list any more; what it still held then goes recursively
        let _ = DYING.try_with(|dying| {
            {
                let mut dying = dying.borrow_mut();
                dying.1.push(parts);
                if std::mem::replace(&mut dying.0, true) {
                    return;
                }
            }
            loop {
                let Some(next) = dying.borrow_mut().1.pop() else { break };
                drop(next);
            }
            dying.borrow_mut().0 = false;
        });
    }
}

/// What an op keeps for its backward: detached tensors, freed as the sweep passes.
pub struct Saved {
    op: &'static str,
    inputs: Vec<Option<(Tensor, u64)>>,
    outputs: Vec<Option<(Tensor, u64)>>,
    metas: Vec<Meta>,
}

impl Saved {
    pub(crate) fn new(op: &'static str, inputs: Vec<Tensor>, keep_in: Vec<usize>, outputs: Vec<Tensor>, keep_out: Vec<usize>) -> Self {
        let metas = inputs.iter().map(|t| t.meta()).collect();
        let keep = |v: Vec<Tensor>, k: &[usize]| -> Vec<Option<(Tensor, u64)>> {
            v.into_iter().enumerate().map(|(i, t)| k.contains(&i).then(|| (t.version(), t)).map(|(v, t)| (t, v))).collect()
        };
        Saved { op, inputs: keep(inputs, &keep_in), outputs: keep(outputs, &keep_out), metas }
    }
    fn get<'a>(&self, v: &'a [Option<(Tensor, u64)>], i: usize, what: &str) -> Result<&'a Tensor> {
        match v.get(i) {
            Some(Some((t, version))) if t.version() == *version => Ok(t),
            Some(Some(_)) => Err(Error::Modified { op: self.op }),
            _ => Err(Error::invalid(self.op, format!("backward reads {what} {i}, which saves() does not name"))),
        }
    }
    /// Input `i` of the forward, as its kernel saw it.
    pub fn input(&self, i: usize) -> Result<&Tensor> {
        self.get(&self.inputs, i, "input")
    }
    /// Output `j` of the forward, hidden ones included.
    pub fn output(&self, j: usize) -> Result<&Tensor> {
        self.get(&self.outputs, j, "output")
    }
    /// Shape and dtype of input `i`, whether saved or not.
    pub fn meta(&self, i: usize) -> &Meta {
        &self.metas[i]
    }
}

/// Gradients of leaves, by leaf.
#[derive(Default)]
pub struct Grads {
    map: HashMap<u64, Tensor>,
}

impl Grads {
    /// Empty; [`Tensor::backward_into`] accumulates into it.
    pub fn new() -> Self {
        Self::default()
    }
    /// The gradient of a leaf made by [`Tensor::requires_grad`], if it was reached.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.map.get(&leaf.edge()?.node.id())
    }
    /// Takes the gradient of a leaf out.
    pub fn take(&mut self, leaf: &Tensor) -> Option<Tensor> {
        self.map.remove(&leaf.edge()?.node.id())
    }
    /// Adds the gradients of another backward, leaf by leaf.
    pub fn merge(&mut self, other: Grads) -> Result<()> {
        for (id, g) in other.map {
            let mut slot = self.map.remove(&id);
            no_grad(|| accumulate(&mut slot, g))?;
            self.map.extend(slot.map(|g| (id, g)));
        }
        Ok(())
    }
    /// Number of leaves with a gradient.
    pub fn len(&self) -> usize {
        self.map.len()
    }
    /// Whether no leaf has one.
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }
}

/// Moves the first gradient in, adds later ones in place where nobody else holds the buffer.
fn accumulate(slot: &mut Option<Tensor>, g: Tensor) -> Result<()> {
    *slot = Some(match slot.take() {
        None => g,
        Some(old) if old.is_unique() && old.layout().is_contiguous() => {
            op::run_in_place(crate::prim::AddAssign { meta: old.meta() }, &[&old], &[&g])?;
            old
        }
        Some(old) => old.add(&g)?,
    });
    Ok(())
}

/// Sweeps from `root` with gradient `seed` and accumulates into `grads`.
pub(crate) fn backward(root: &Tensor, seed: Tensor, grads: &mut Grads) -> Result<()> {
    let Some(edge) = root.edge() else {
        return Err(Error::invalid("backward", "the tensor depends on no leaf; mark one with requires_grad() and compute under recording"));
    };
    if seed.meta() != root.meta() {
        return Err(Error::invalid("backward", format!("the seed must be {}, found {}", root.meta(), seed.meta())));
    }
    let mut sweep = Sweep { heap: BinaryHeap::new(), nodes: HashMap::new() };
    sweep.give(edge, seed)?;
    let watched = watch::sweep();
    while let Some(id) = sweep.heap.pop() {
        let Some((node, dy)) = sweep.nodes.remove(&id) else { continue };
        watched.at(&node.place);
        match &node.kind {
            Kind::Leaf => {
                if let Some(g) = dy.into_iter().next().flatten() {
                    let mut slot = grads.map.remove(&id);
                    no_grad(|| accumulate(&mut slot, g))?;
                    grads.map.extend(slot.map(|g| (id, g)));
                }
            }
            Kind::Op(op) => {
                let saved = node.saved.lock().unwrap_or_else(|e| e.into_inner()).take().ok_or(Error::Freed { op: op.name() })?;
                let need: Vec<bool> = node.inputs.iter().map(Option::is_some).collect();
                let dx = no_grad(|| op.backward(&saved, &dy[..node.visible], &need))?;
                drop((saved, dy));
                if dx.len() != node.inputs.len() {
                    let (expected, found) = (format!("{} gradients in all", node.inputs.len()), format!("{} gradients", dx.len()));
                    return Err(Error::BadGradient { op: op.name(), input: 0, expected, found });
                }
                for (i, (e, g)) in node.inputs.iter().zip(dx).enumerate() {
                    if let (Some(e), Some(g)) = (e, g) {
                        let want = &e.node.outs[e.slot];
                        if g.meta() != *want {
                            return Err(Error::BadGradient { op: op.name(), input: i, expected: want.to_string(), found: g.meta().to_string() });
                        }
                        sweep.give(e, g.detach())?;
                    }
                }
            }
            Kind::Checkpoint(f) => {
                let saved = node.saved.lock().unwrap_or_else(|e| e.into_inner()).take().ok_or(Error::Freed { op: node.name() })?;
                let xs = (0..node.inputs.len())
                    .map(|i| {
                        let t = saved.input(i)?.clone();
                        Ok(match &node.inputs[i] {
                            Some(e) => t.with_edge(e.clone()),
                            None => t,
                        })
                    })
                    .collect::<Result<Vec<_>>>()?;
                // the re-run's nodes are younger than all that is left of the sweep, so they join it in the right order
                let ys = with_grad(true, || f(&xs))?;
                if !ys.iter().map(|y| y.meta()).eq(node.outs.iter().cloned()) {
                    let list = |m: &mut dyn Iterator<Item = Meta>| m.map(|m| m.to_string()).collect::<Vec<_>>().join(", ");
                    let (first, now) = (list(&mut node.outs.iter().cloned()), list(&mut ys.iter().map(|y| y.meta())));
                    return Err(Error::invalid("checkpoint", format!("its function gave [{first}] at first and [{now}] when run again")));
                }
                for (y, g) in ys.iter().zip(dy) {
                    if let (Some(e), Some(g)) = (y.edge(), g) {
                        sweep.give(e, g)?;
                    }
                }
            }
        }
    }
    Ok(())
}

struct Sweep {
    heap: BinaryHeap<u64>,
    nodes: HashMap<u64, (Arc<Node>, Vec<Option<Tensor>>)>,
}

impl Sweep {
    fn give(&mut self, e: &Edge, g: Tensor) -> Result<()> {
        let (_, dy) = self.nodes.entry(e.node.id).or_insert_with(|| {
            self.heap.push(e.node.id);
            (e.node.clone(), vec![None; e.node.outs.len()])
        });
        no_grad(|| accumulate(&mut dy[e.slot], g))
    }
}

/// Activation checkpointing: runs `f`, keeps only `x`, and lets the backward run `f` again and sweep through it.
///
/// `f` may also use tensors that it captures (parameters): their gradients arrive as usual. It must be a function of its inputs and captures alone;
/// counter-based random numbers repeat by themselves. What `f` computes is held until it returns, no longer than a backward holds it.
pub fn checkpoint(f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>> + Send + Sync + 'static, x: &[&Tensor]) -> Result<Vec<Tensor>> {
    let xs: Vec<Tensor> = x.iter().map(|t| (*t).clone()).collect();
    let ys = f(&xs)?;
    if !ys.iter().any(Tensor::is_tracked) {
        return Ok(ys);
    }
    let n = xs.len();
    let edges = xs.iter().map(|t| t.edge().cloned()).collect();
    let outs: Vec<Meta> = ys.iter().map(|t| t.meta()).collect();
    let saved = Saved::new("checkpoint", xs.iter().map(Tensor::detach).collect(), (0..n).collect(), vec![], vec![]);
    let node = Node::make(Kind::Checkpoint(Arc::new(f)), edges, Some(saved), outs, ys.len());
    // detached first: what f recorded goes here, and the backward makes it again
    let edge = |(slot, y): (usize, Tensor)| if y.is_tracked() { y.detach().with_edge(Edge { node: node.clone(), slot }) } else { y };
    Ok(ys.into_iter().enumerate().map(edge).collect())
}
