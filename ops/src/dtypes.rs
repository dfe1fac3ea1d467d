//! Which dtypes may stand side by side.

use engine::{DType, Error, Result};

/// The dtype that sums are kept in: f32 for halves.
pub(crate) fn sums(x: DType) -> DType {
    if x == DType::F64 { DType::F64 } else { DType::F32 }
}

/// A parameter, or another small input, has x's dtype, or the one that sums are kept in: f32 beside halves.
pub(crate) fn beside(op: &'static str, arg: &str, x: DType, found: DType) -> Result<()> {
    let wide = sums(x);
    if found == x || found == wide { Ok(()) } else { Err(Error::dtype(op, arg, format!("{x} as the input, or {wide}"), found)) }
}
