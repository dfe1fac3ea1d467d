//! Self-tests: does an op give the right numbers on this machine? `tidegate doctor` runs them, and so do the tests of a backend.

use crate::gradcheck::weigh;
use crate::{DType, Device, Error, Grads, Result, Tensor};

/// A function of tensors.
pub type Function = fn(&[Tensor]) -> Result<Vec<Tensor>>;

/// An op and what it is measured against; a row that any crate adds with [`self_test!`](crate::self_test).
pub struct SelfTest {
    /// The op's name.
    pub name: &'static str,
    /// Shapes of the inputs, which are normally distributed.
    pub shapes: &'static [&'static [usize]],
    /// The op on these inputs; float outputs are compared, and their gradients with respect to all inputs.
    pub op: Function,
    /// The same from other operations. Where there is none, the op itself on the CPU in f64.
    pub reference: Option<Function>,
}
inventory::collect!(SelfTest);

/// All that are linked into this program, by name.
pub fn self_tests() -> Vec<&'static SelfTest> {
    let mut all: Vec<_> = inventory::iter::<SelfTest>.into_iter().collect();
    all.sort_by_key(|t| t.name);
    all
}

impl SelfTest {
    /// Runs the op on `device` in `dtype` and the reference on the CPU in f64 from the same rounded inputs. Returns the largest RMS(difference) /
    /// RMS(reference) of an output or a gradient; an error if an output or a gradient is there in one and not in the other.
    pub fn run(&self, device: &Device, dtype: DType) -> Result<f64> {
        let fail = |m: String| Err(Error::invalid("self-test", format!("{}: {m}", self.name)));
        let values = |(i, s): (usize, &&[usize])| Tensor::randn(s, DType::F64, &Device::cpu(), 11, i as u64)?.cast(dtype);
        let inputs = self.shapes.iter().enumerate().map(values).collect::<Result<Vec<_>>>()?;
        let found = outcome(self.op, inputs.iter().map(|x| x.to_device(device)).collect::<Result<_>>()?)?;
        let want = outcome(self.reference.unwrap_or(self.op), inputs.iter().map(|x| x.cast(DType::F64)).collect::<Result<_>>()?)?;
        if found.len() != want.len() {
            return fail(format!("{} outputs and gradients, the reference has {}", found.len(), want.len()));
        }
        let mut worst = 0f64;
        for (i, pair) in found.iter().zip(&want).enumerate() {
            match pair {
                (Some(x), Some(y)) if x.shape() == y.shape() => {
                    let e = relative_error(&x.to_vec()?, &y.to_vec()?);
                    worst = if e >= worst {
                        e
                    } else if e.is_nan() {
                        f64::INFINITY
                    } else {
                        worst
                    };
                }
                (None, None) => {}
                (x, y) => return fail(format!("output or gradient {i} is {x:?}, the reference's is {y:?}")),
            }
        }
        Ok(worst)
    }
}

/// Float outputs, then the gradient of each input, if it has one.
fn outcome(f: Function, x: Vec<Tensor>) -> Result<Vec<Option<Tensor>>> {
    let x: Vec<Tensor> = x.iter().map(Tensor::requires_grad).collect();
    let y: Vec<Tensor> = f(&x)?.into_iter().filter(|y| y.dtype().is_float()).collect();
    let mut grads = Grads::new();
    if y.iter().any(Tensor::is_tracked) {
        weigh(&y)?.backward_into(&mut grads)?;
    }
    Ok(y.iter().map(|y| Some(y.detach())).chain(x.iter().map(|x| grads.get(x).cloned())).collect())
}

fn relative_error(x: &[f64], y: &[f64]) -> f64 {
    let d: f64 = x.iter().zip(y).map(|(x, y)| (x - y) * (x - y)).sum();
    let r: f64 = y.iter().map(|y| y * y).sum();
    if d == 0.0 { 0.0 } else { (d / r.max(f64::MIN_POSITIVE)).sqrt() }
}

/// Adds a [`SelfTest`]: `self_test!("my_op", [[3, 5], [5]], |x| .. => |x| ..);` with the op's function first and its reference, if there is one, second.
/// Both give a `Result<Vec<Tensor>>`.
#[macro_export]
macro_rules! self_test {
    ($name:literal, [$($shape:expr),* $(,)?], $op:expr) => { $crate::self_test!(@ $name, [$($shape),*], $op, None); };
    ($name:literal, [$($shape:expr),* $(,)?], $op:expr => $reference:expr) => { $crate::self_test!(@ $name, [$($shape),*], $op, Some($reference)); };
    (@ $name:literal, [$($shape:expr),*], $op:expr, $reference:expr) => {
        $crate::inventory::submit! { $crate::SelfTest { name: $name, shapes: &[$(&$shape),*], op: $op, reference: $reference } }
    };
}
