//! A debug mode: wait after each op, read what it wrote, and stop at the first number that isn't one.

use crate::{Cuda, Ptr};
use engine::half::{bf16, f16};
use engine::{DType, Error, Op, Result, View};
use std::fmt;

/// What an op's outputs are checked for; `TIDEGATE_CUDA_CHECK` sets it for all devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Check {
    /// Nothing: the device runs on its own.
    #[default]
    Off,
    /// NaN (`nan`).
    Nan,
    /// NaN and infinities (`finite`), which masks may hold on purpose.
    Finite,
}

impl Check {
    pub(crate) fn from_env() -> Result<Check> {
        let v = std::env::var_os("TIDEGATE_CUDA_CHECK").unwrap_or_default();
        match v.to_str() {
            Some("") | Some("off") => Ok(Check::Off),
            Some("nan") => Ok(Check::Nan),
            Some("finite") => Ok(Check::Finite),
            _ => Err(Error::invalid("cuda", format!("TIDEGATE_CUDA_CHECK is {v:?}; `nan`, `finite` and `off` are possible"))),
        }
    }
    fn finds(self, x: f64) -> bool {
        match self {
            Check::Off => false,
            Check::Nan => x.is_nan(),
            Check::Finite => !x.is_finite(),
        }
    }
}

/// Elements of a view that a check finds.
struct Found {
    what: f64,
    at: Vec<usize>,
    count: usize,
    of: usize,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:?}, and {} of its {} elements are wrong", self.what, self.at, self.count, self.of)
    }
}

fn kind(v: &View) -> String {
    format!("{}{:?}", v.dtype, v.layout.shape)
}

impl Cuda {
    /// Reads what ran; called by [`cuda_kernel!`](crate::cuda_kernel) after each op. Hidden outputs are between an op and its backward and may hold anything where nobody looks.
    pub fn leave(&self, op: &dyn Op, x: &[View], y: &[View]) -> Result<()> {
        let check = self.check();
        if check == Check::Off || self.planned().on() {
            return Ok(());
        }
        self.finished().map_err(|e| Error::invalid("cuda", format!("after `{}`: {e}", op.name())))?;
        for (i, v) in y[..y.len() - op.hidden().min(y.len())].iter().enumerate() {
            let Some(found) = self.find(check, v)? else { continue };
            let mut before = String::new();
            for (j, v) in x.iter().enumerate() {
                if let Some(f) = self.find(Check::Finite, v)? {
                    before += &format!("; its input {j} ({}) holds {f}", kind(v));
                }
            }
            if before.is_empty() {
                before = "; its inputs are finite".into();
            }
            return Err(Error::invalid(op.name(), format!("output {i} ({}) holds {found}{before}", kind(v))));
        }
        Ok(())
    }
    /// What a check finds in a view.
    fn find(&self, check: Check, v: &View) -> Result<Option<Found>> {
        let n = v.layout.numel();
        if !v.dtype.is_float() || n == 0 {
            return Ok(None);
        }
        let mut bytes = vec![0; v.layout.span() * v.dtype.size()];
        self.driver().download(Ptr::of(v)?.0, &mut bytes)?;
        let element = |i: usize| match (v.dtype, &bytes[i * v.dtype.size()..]) {
            (DType::F64, [a, b, c, d, e, f, g, h, ..]) => f64::from_ne_bytes([*a, *b, *c, *d, *e, *f, *g, *h]),
            (DType::F32, [a, b, c, d, ..]) => f32::from_ne_bytes([*a, *b, *c, *d]).into(),
            (DType::BF16, [a, b, ..]) => bf16::from_ne_bytes([*a, *b]).into(),
            (_, rest) => f16::from_ne_bytes([rest[0], rest[1]]).into(),
        };
        let (mut at, mut first, mut count) = (vec![0; v.layout.shape.len()], None, 0);
        for _ in 0..n {
            let x = element(at.iter().zip(&v.layout.strides).map(|(i, s)| i * *s as usize).sum());
            if check.finds(x) {
                first.get_or_insert_with(|| (x, at.clone()));
                count += 1;
            }
            for d in (0..at.len()).rev() {
                at[d] += 1;
                if at[d] < v.layout.shape[d] {
                    break;
                }
                at[d] = 0;
            }
        }
        Ok(first.map(|(what, at)| Found { what, at, count, of: n }))
    }
}
