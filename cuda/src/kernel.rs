//! How a kernel is named, and what it is handed.

use crate::Cuda;
use crate::compile::Target;
use engine::{DType, Error, Result, View};
use std::borrow::Cow;
use std::hash::{Hash, Hasher};

/// A `.cu` file and the instantiations that ops can ask for; made by [`cuda_source!`](crate::cuda_source).
pub struct Source {
    /// File name, for messages.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    /// Headers of its own, by name, beside `tidegate.cuh`, `tile.cuh` and `hopper.cuh`.
    pub headers: &'static [(&'static str, &'static str)],
    /// Every instantiation that may be launched: the compile test builds them all, and a launch of another is an error.
    pub kernels: fn() -> Vec<Kernel>,
}

/// A row of the list of sources.
pub struct SourceRow(pub &'static Source);
engine::inventory::collect!(SourceRow);

/// All sources that are linked into this program, by name.
pub fn sources() -> Vec<&'static Source> {
    let mut all: Vec<_> = engine::inventory::iter::<SourceRow>.into_iter().map(|r| r.0).collect();
    all.sort_by_key(|s| s.name);
    all
}

/// Declares a source: `cuda_source!(static SOURCE = "swiglu.cu", kernels: list);` with `fn list() -> Vec<Kernel>`; headers of its own may follow:
/// `headers: ["common.cuh"]`. Paths are relative to the Rust file.
#[macro_export]
macro_rules! cuda_source {
    ($(#[$m:meta])* $vis:vis static $name:ident = $file:literal, kernels: $kernels:expr $(, headers: [$($h:literal),* $(,)?])?) => {
        $(#[$m])*
        $vis static $name: $crate::Source =
            $crate::Source { name: $file, text: include_str!($file), headers: &[$($(($h, include_str!($h))),*)?], kernels: $kernels };
        $crate::kernel::reexport::inventory::submit! { $crate::kernel::SourceRow(&$name) }
    };
}

#[doc(hidden)]
pub mod reexport {
    pub use engine::inventory;
}

/// One instantiation of a kernel of a source, with its launch bounds.
#[derive(Clone)]
pub struct Kernel {
    /// Where it is written.
    pub source: &'static Source,
    /// The function with its template arguments: `swiglu_forward<bf16>`.
    pub call: Cow<'static, str>,
    /// Threads of a block, a multiple of 32.
    pub threads: u32,
    /// Blocks that must fit on a multiprocessor at once: with `threads` this bounds the registers.
    pub min_blocks: u32,
    /// 80 for what runs from compute capability 8.0 on, 90 for what needs Hopper.
    pub arch: u32,
}

impl Kernel {
    /// A kernel that runs from sm_80 on, with blocks of `threads` of which one has to fit.
    pub fn new(source: &'static Source, call: impl Into<Cow<'static, str>>, threads: u32) -> Self {
        Kernel { source, call: call.into(), threads, min_blocks: 1, arch: 80 }
    }
    /// The same with another number of blocks that must fit.
    pub fn min_blocks(self, min_blocks: u32) -> Self {
        Kernel { min_blocks, ..self }
    }
    /// The same for Hopper alone.
    pub fn hopper(self) -> Self {
        Kernel { arch: 90, ..self }
    }
    /// Its name in the compiled code, which profilers show: `swiglu_forward<bf16>` is `tg_swiglu_forward_bf16`.
    pub fn entry(&self) -> String {
        let words: Vec<&str> = self.call.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|w| !w.is_empty()).collect();
        format!("tg_{}", words.join("_"))
    }
    /// Registers that the launch bounds leave to a thread.
    pub fn register_bound(&self) -> u32 {
        (65536 / (self.threads * self.min_blocks) / 8 * 8).min(255)
    }
    /// Whether it can be compiled for a target: what runs from sm_80 on for all, what is for Hopper for Hopper (its instructions exist nowhere else) and the emulator.
    pub fn fits(&self, target: Target) -> bool {
        self.arch == 80 || target == Target::Gpu(self.arch) || target == Target::Host
    }
    /// Whether the source lists it.
    pub(crate) fn is_listed(&self) -> bool {
        (self.source.kernels)().contains(self)
    }
}

impl PartialEq for Kernel {
    fn eq(&self, o: &Self) -> bool {
        std::ptr::eq(self.source, o.source) && self.call == o.call && (self.threads, self.min_blocks, self.arch) == (o.threads, o.min_blocks, o.arch)
    }
}
impl Eq for Kernel {}
impl Hash for Kernel {
    fn hash<H: Hasher>(&self, h: &mut H) {
        (self.source as *const Source as usize, &self.call, self.threads).hash(h)
    }
}
impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.source.name, self.call)
    }
}
impl std::fmt::Display for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

/// What a kernel gets: one struct by value, the same in Rust (`repr(C)`) and in the source. Made by [`params!`](crate::params).
///
/// # Safety
/// The type is `repr(C)`, holds no reference, and has no padding that matters.
pub unsafe trait Params: Copy + 'static {}

/// Declares parameter structs: `params! { struct SwiGluParams { x: Ptr, y: Ptr, rows: u64, width: u32 } }`. The C++ struct lists the same fields in the
/// same order (`Ptr` is a pointer); its size is compared at the first launch.
#[macro_export]
macro_rules! params {
    ($($(#[$m:meta])* $vis:vis struct $name:ident { $($(#[$fm:meta])* $f:ident: $t:ty),* $(,)? })*) => {$(
        $(#[$m])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        $vis struct $name { $($(#[$fm])* $f: $t),* }
        // SAFETY: repr(C) and Copy; the fields are plain numbers.
        unsafe impl $crate::Params for $name where $($t: $crate::kernel::Plain),* {}
    )*};
}

/// A field of a parameter struct.
///
/// # Safety
/// Plain data: no reference, no lifetime.
pub unsafe trait Plain: Copy + 'static {}
macro_rules! plain { ($($t:ty)*) => { $( // SAFETY: plain data.
    unsafe impl Plain for $t {} )* } }
plain! { u8 u16 u32 u64 i32 i64 f32 f64 Ptr FastDiv Fault }
// SAFETY: an array of plain data is plain data.
unsafe impl<T: Plain, const N: usize> Plain for [T; N] {}

/// An address in the device's memory.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ptr(pub u64);

impl Ptr {
    /// For an absent optional argument.
    pub const NULL: Ptr = Ptr(0);
    /// `n` bytes further.
    pub fn byte_add(self, n: usize) -> Ptr {
        Ptr(self.0 + n as u64)
    }
    /// The first element of a view.
    pub fn of(v: &View) -> Result<Ptr> {
        Ok(Cuda::address(v.buf)?.byte_add(v.layout.offset * v.dtype.size()))
    }
    /// The first element of a view that may be absent.
    pub fn of_option(v: Option<&View>) -> Result<Ptr> {
        v.map_or(Ok(Ptr::NULL), Ptr::of)
    }
}

/// A divisor prepared so that the device multiplies instead (Granlund and Montgomery, "Division by invariant integers", 1994). Numerators below 2³¹.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct FastDiv {
    divisor: u32,
    magic: u32,
    shift: u32,
}

impl FastDiv {
    /// For a divisor from 1 to 2³¹ − 1; 0 counts as 1 (an empty axis is never divided by).
    pub fn new(divisor: usize) -> FastDiv {
        let d = divisor.clamp(1, i32::MAX as usize) as u64;
        let shift = 64 - (d - 1).leading_zeros();
        let shift = if d == 1 { 0 } else { shift };
        FastDiv { divisor: d as u32, magic: (((1u64 << 32) * ((1u64 << shift) - d)) / d + 1) as u32, shift }
    }
}

/// How a kernel tells that its data are wrong, such as an index out of range: `p.fault.tell(value)`. Made by [`Cuda::fault`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    pub(crate) flag: Ptr,
    pub(crate) code: u32,
    pub(crate) unused: u32,
}

/// The name of a dtype in a source.
pub fn cpp(dtype: DType) -> &'static str {
    match dtype {
        DType::F64 => "double",
        DType::F32 => "float",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::I64 => "i64",
        DType::I32 => "i32",
        DType::U32 => "u32",
        DType::U8 => "u8",
    }
}

/// The dtype, if it is one of those that a kernel is written for.
pub fn one_of(op: &'static str, arg: &str, found: DType, of: &[DType]) -> Result<DType> {
    let list = || of.iter().map(|d| d.to_string()).collect::<Vec<_>>().join(" or ");
    if of.contains(&found) { Ok(found) } else { Err(Error::dtype(op, format!("{arg} on CUDA"), list(), found)) }
}

/// Registers a kernel row for an op on CUDA: `cuda_kernel!(MyOp => forward);` with `fn forward(op: &MyOp, cuda: &Cuda, x: &[View], y: &[View]) -> Result<()>`.
#[macro_export]
macro_rules! cuda_kernel {
    ($op:ty => $f:expr) => {
        const _: () = {
            fn erased(op: &dyn ::engine::Op, backend: &dyn ::engine::Backend, x: &[::engine::View], y: &[::engine::View]) -> ::engine::Result<()> {
                let (any, backend): (&dyn ::std::any::Any, &dyn ::std::any::Any) = (op, backend);
                let wrong = || ::engine::Error::invalid(op.name(), "was handed to another op's kernel");
                let kernel: fn(&$op, &$crate::Cuda, &[::engine::View], &[::engine::View]) -> ::engine::Result<()> = $f;
                let cuda = backend.downcast_ref::<$crate::Cuda>().ok_or_else(wrong)?;
                cuda.enter(op.name());
                kernel(any.downcast_ref::<$op>().ok_or_else(wrong)?, cuda, x, y)?;
                cuda.leave(op, x, y)
            }
            $crate::kernel::reexport::inventory::submit! { ::engine::registry::Row {
                op: || ::std::any::TypeId::of::<$op>(),
                backend: || ::std::any::TypeId::of::<$crate::Cuda>(),
                name: stringify!($op),
                place: concat!(file!(), ":", line!()),
                kernel: erased,
            } }
        };
    };
}

#[cfg(test)]
mod tests {
    use super::FastDiv;

    #[test]
    fn fast_division_divides() {
        let div = |d: FastDiv, n: u32| ((((n as u64 * d.magic as u64) >> 32) + n as u64) >> d.shift) as u32;
        for d in (1..70).chain([127, 128, 129, 1000, 65535, 65536, 1 << 30, (1 << 31) - 1]) {
            let f = FastDiv::new(d);
            for n in (0..300).chain([12345, 1 << 20, (1 << 30) + 1, (1 << 31) - 1]) {
                assert_eq!(div(f, n), n / d as u32, "{n} / {d}");
            }
        }
    }
}
