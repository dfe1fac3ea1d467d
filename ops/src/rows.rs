//! Rows of strided tensors whose last axis is dense.

use engine::Layout;

/// Start of each row (all axes but the last) of a view, in row-major order, relative to the view's first element.
pub(crate) struct Rows {
    shape: Vec<usize>,
    strides: Vec<usize>,
    dense: Option<usize>,
}

impl Rows {
    pub fn new(l: &Layout) -> Self {
        let n = l.shape.len().saturating_sub(1);
        let last = l.shape.last().copied().unwrap_or(1);
        Rows { shape: l.shape[..n].to_vec(), strides: l.strides[..n].iter().map(|s| *s as usize).collect(), dense: l.is_contiguous().then_some(last) }
    }
    /// Offset of row `i`.
    #[inline]
    pub fn at(&self, mut i: usize) -> usize {
        if let Some(d) = self.dense {
            return i * d;
        }
        let mut o = 0;
        for (d, s) in self.shape.iter().zip(&self.strides).rev() {
            o += (i % d) * s;
            i /= d;
        }
        o
    }
}
