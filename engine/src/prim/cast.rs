//! Conversion between dtypes.

use crate::cpu::convert::convert_all;
use crate::cpu::{Inputs, Outputs};
use crate::{DType, Element, Meta, Op, Result, Saved, Tensor, cpu_kernel, dispatch, run1};

/// Conversion: floats round to nearest, floats to integers truncate and saturate.
#[derive(Debug)]
pub struct Cast {
    /// Target dtype.
    pub to: DType,
}

impl Op for Cast {
    fn name(&self) -> &'static str {
        "cast"
    }
    fn infer(&self, x: &[Meta]) -> Result<Vec<Meta>> {
        Ok(vec![Meta::new(&x[0].shape, self.to)])
    }
    fn backward(&self, s: &Saved, dy: &[Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![dy[0].as_ref().map(|d| d.cast(s.meta(0).dtype)).transpose()?])
    }
}
cpu_kernel!(Cast => cast_kernel);

fn cast_kernel(op: &Cast, x: &Inputs, y: &mut Outputs) -> Result<()> {
    fn convert<S: Element, D: Element>(x: &Inputs, y: &mut Outputs) -> Result<()> {
        let (src, mut out) = (x.slice::<S>(0)?, y.slice::<D>(0)?);
        convert_all(src, &mut out);
        Ok(())
    }
    dispatch!(x.dtype(0), |S| dispatch!(op.to, |D| convert::<S, D>(x, y)))
}

impl Tensor {
    /// The same values in another dtype; its gradient is cast back.
    pub fn cast(&self, to: DType) -> Result<Tensor> {
        if to == self.dtype() {
            return Ok(self.clone());
        }
        match self.kept_copy(to) {
            Some(copy) => Ok(self.made_before(copy, Cast { to })),
            None => run1(Cast { to }, &[self]),
        }
    }
}
