//! The definition, composed of primitive ops.

use engine::{Result, Tensor};

/// As [`super::swiglu`].
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let axis = gate_up.rank() - 1;
    let i = gate_up.dim(axis) / 2;
    gate_up.narrow(axis, 0, i)?.silu()?.mul(&gate_up.narrow(axis, i, i)?)
}

engine::self_test!("swiglu", [[37, 134]], |x| Ok(vec![super::swiglu(&x[0])?]) => |x| Ok(vec![swiglu(&x[0])?]));
