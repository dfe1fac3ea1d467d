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

/// An output that tasks fill together, each its own ranges.
pub(crate) struct Shared<'a, F> {
    ptr: *mut F,
    len: usize,
    _out: std::marker::PhantomData<&'a mut [F]>,
}

// SAFETY: it only hands out ranges, which `slice`'s callers promise to keep apart.
unsafe impl<F: Send> Sync for Shared<'_, F> {}
// SAFETY: as above.
unsafe impl<F: Send> Send for Shared<'_, F> {}

impl<'a, F> Shared<'a, F> {
    pub fn new(out: &'a mut [F]) -> Self {
        Shared { ptr: out.as_mut_ptr(), len: out.len(), _out: std::marker::PhantomData }
    }
    /// `n` elements from `at` on; panics outside the output.
    ///
    /// # Safety
    /// No other task may hold a range that overlaps this one.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, at: usize, n: usize) -> &mut [F] {
        assert!(at <= self.len && n <= self.len - at, "a task writes outside its output");
        // SAFETY: in bounds, and the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), n) }
    }
}
