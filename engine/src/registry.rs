//! The kernel table: (op type, backend type) → function. Any crate adds rows, for its own op or for another's on a new device;
//! rows are collected when the program is linked, so nobody has to remember an initialisation call.

use crate::{Backend, Buffer, DType, Error, Layout, Op, Result};
use std::{any::TypeId, collections::HashMap, sync::LazyLock};

/// A tensor as a kernel sees it.
pub struct View<'a> {
    /// Memory.
    pub buf: &'a dyn Buffer,
    /// Where in it.
    pub layout: &'a Layout,
    /// Of what.
    pub dtype: DType,
}

/// A kernel with its types erased: op, backend, inputs, outputs.
pub type Kernel = fn(&dyn Op, &dyn Backend, &[View], &[View]) -> Result<()>;

/// One row; made by [`cpu_kernel!`](crate::cpu_kernel) and its like on other devices.
pub struct Row {
    /// `TypeId::of` of the op.
    pub op: fn() -> TypeId,
    /// `TypeId::of` of the backend.
    pub backend: fn() -> TypeId,
    /// The op's type name, for listings.
    pub name: &'static str,
    /// Where it was registered, `file:line`, for the error when there are two.
    pub place: &'static str,
    /// The kernel.
    pub kernel: Kernel,
}
inventory::collect!(Row);

/// All rows of a pair: one, unless somebody made a mistake that linking does not see.
static TABLE: LazyLock<HashMap<(TypeId, TypeId), Vec<&Row>>> = LazyLock::new(|| {
    let mut table = HashMap::<_, Vec<&Row>>::new();
    inventory::iter::<Row>.into_iter().for_each(|r| table.entry(((r.op)(), (r.backend)())).or_default().push(r));
    table
});

pub(crate) fn kernel(op: &dyn Op, backend: &dyn Backend) -> Result<Kernel> {
    let (a, b): (&dyn std::any::Any, &dyn std::any::Any) = (op, backend);
    match TABLE.get(&(a.type_id(), b.type_id())).map_or(&[][..], Vec::as_slice) {
        [row] => Ok(row.kernel),
        [] => Err(Error::NoKernel { op: op.name(), device: backend.name() }),
        rows => {
            let mut places: Vec<_> = rows.iter().map(|r| r.place).collect();
            places.sort_unstable();
            Err(Error::TwoKernels { op: op.name(), device: backend.name(), places: places.join(" and ") })
        }
    }
}

/// Type names of all ops with a kernel for backend `B`, sorted.
pub fn kernels_of<B: Backend>() -> Vec<&'static str> {
    let mut v: Vec<_> = inventory::iter::<Row>.into_iter().filter(|r| (r.backend)() == TypeId::of::<B>()).map(|r| r.name).collect();
    v.sort_unstable();
    v
}

/// Registers a CPU kernel: `cpu_kernel!(MyOp => forward);` with `fn forward(op: &MyOp, x: &Inputs, y: &mut Outputs) -> Result<()>`.
#[macro_export]
macro_rules! cpu_kernel {
    ($op:ty => $f:expr) => {
        const _: () = {
            fn erased(op: &dyn $crate::Op, _: &dyn $crate::Backend, x: &[$crate::View], y: &[$crate::View]) -> $crate::Result<()> {
                let any: &dyn ::std::any::Any = op;
                let op = any.downcast_ref::<$op>().ok_or_else(|| $crate::Error::invalid(op.name(), "was handed to another op's kernel"))?;
                let kernel: fn(&$op, &$crate::cpu::Inputs, &mut $crate::cpu::Outputs) -> $crate::Result<()> = $f;
                $crate::cpu::call(op, x, y, kernel)
            }
            $crate::inventory::submit! { $crate::registry::Row {
                op: || ::std::any::TypeId::of::<$op>(),
                backend: || ::std::any::TypeId::of::<$crate::cpu::Cpu>(),
                name: stringify!($op),
                place: concat!(file!(), ":", line!()),
                kernel: erased,
            } }
        };
    };
}
