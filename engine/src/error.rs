//! What can go wrong, said so that it can be mended: what was asked, what was found, what to do.

use crate::DType;

/// `Result` with the engine's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The engine's errors.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument's shape does not fit.
    #[error("{op}: {arg} must have shape {expected}, found {found:?}")]
    Shape {
        /// Operation.
        op: &'static str,
        /// Argument.
        arg: String,
        /// What would fit, in words.
        expected: String,
        /// What came.
        found: Vec<usize>,
    },
    /// An argument's dtype does not fit.
    #[error("{op}: {arg} must be {expected}, found {found}; convert it with cast()")]
    DType {
        /// Operation.
        op: &'static str,
        /// Argument.
        arg: String,
        /// What would fit, in words.
        expected: String,
        /// What came.
        found: DType,
    },
    /// Arguments live on different devices.
    #[error("{op}: all inputs must be on one device, found {first} and {other}; move one with to_device()")]
    Device {
        /// Operation.
        op: &'static str,
        /// Device of the first input.
        first: String,
        /// Device of the one that differs.
        other: String,
    },
    /// No kernel is registered for this pair; there is no fallback.
    #[error("{op}: no kernel for device {device}; add a row to the kernel registry or run it on another device")]
    NoKernel {
        /// Operation.
        op: &'static str,
        /// Device.
        device: String,
    },
    /// More than one kernel is registered for this pair, and which one the linker puts last is nobody's choice.
    #[error("{op}: more than one kernel for device {device}, registered at {places}; remove all but one")]
    TwoKernels {
        /// Operation.
        op: &'static str,
        /// Device.
        device: String,
        /// Where, `file:line`.
        places: String,
    },
    /// An operation without backward met an input that needs a gradient.
    #[error("{op}: has no backward, but an input needs a gradient; detach() that input if no gradient is wanted")]
    NoGrad {
        /// Operation.
        op: &'static str,
    },
    /// Saved tensors are gone: the graph was swept before.
    #[error("{op}: its saved tensors were freed by an earlier backward; run the forward again")]
    Freed {
        /// Operation.
        op: &'static str,
    },
    /// A saved tensor was changed in place before backward read it.
    #[error("{op}: a tensor saved for backward was modified in place afterwards; run backward before updating it")]
    Modified {
        /// Operation.
        op: &'static str,
    },
    /// A backward returned something that is no gradient of its input.
    #[error("{op}: backward returned {found} for input {input}, which needs {expected}")]
    BadGradient {
        /// Operation.
        op: &'static str,
        /// Which input.
        input: usize,
        /// Shape and dtype of the input.
        expected: String,
        /// Shape and dtype of the gradient, or how many came.
        found: String,
    },
    /// A shape whose size does not fit the address space.
    #[error("a tensor of shape {shape:?} is larger than the address space")]
    TooLarge {
        /// The shape.
        shape: Vec<usize>,
    },
    /// Memory could not be had.
    #[error("out of memory on {device}: {requested} bytes requested, {live} live, {cached} cached")]
    OutOfMemory {
        /// Device.
        device: String,
        /// Bytes asked for.
        requested: usize,
        /// Bytes in use.
        live: usize,
        /// Bytes kept for reuse.
        cached: usize,
    },
    /// Anything else, in words.
    #[error("{op}: {msg}")]
    Invalid {
        /// Operation.
        op: &'static str,
        /// What was asked, found, and what to do.
        msg: String,
    },
}

impl Error {
    /// An argument's shape does not fit.
    pub fn shape(op: &'static str, arg: impl Into<String>, expected: impl std::fmt::Display, found: &[usize]) -> Self {
        Error::Shape { op, arg: arg.into(), expected: expected.to_string(), found: found.to_vec() }
    }
    /// An argument's dtype does not fit.
    pub fn dtype(op: &'static str, arg: impl Into<String>, expected: impl std::fmt::Display, found: DType) -> Self {
        Error::DType { op, arg: arg.into(), expected: expected.to_string(), found }
    }
    /// Anything else, in words.
    pub fn invalid(op: &'static str, msg: impl Into<String>) -> Self {
        Error::Invalid { op, msg: msg.into() }
    }
}
