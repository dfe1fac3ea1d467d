//! The primitive ops' kernels.
