//! The definition, composed of primitive ops.

use engine::{Result, Tensor};

/// As [`super::swiglu`].
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    let axis = gate_up.rank() - 1;
    let i = gate_up.dim(axis) / 2;
    gate_up.narrow(axis, 0, i)?.silu()?.mul(&gate_up.narrow(axis, i, i)?)
}
