//! Part of tidegate.
