//! Shape, strides and offset of a view into a buffer, in elements.

use crate::{Error, Result};

/// How a tensor's indices map to its buffer. Strides are never negative; a broadcast axis has stride 0.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Length of each axis.
    pub shape: Vec<usize>,
    /// Distance between neighbours along each axis, in elements.
    pub strides: Vec<isize>,
    /// First element.
    pub offset: usize,
}

/// Number of elements, or an error where a stride or the size in bytes does not fit the address space: empty axes count as one there.
pub(crate) fn checked_numel(shape: &[usize], bytes_each: usize) -> Result<usize> {
    let n = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d.max(&1)));
    let fits = n.and_then(|n| n.checked_mul(bytes_each)).is_some_and(|b| b <= isize::MAX as usize);
    if fits { Ok(shape.iter().product()) } else { Err(Error::TooLarge { shape: shape.to_vec() }) }
}

impl Layout {
    /// Row-major, dense.
    pub fn contiguous(shape: &[usize]) -> Self {
        let mut strides = vec![1isize; shape.len()];
        for i in (1..shape.len()).rev() {
            strides[i - 1] = strides[i] * shape[i] as isize;
        }
        Layout { shape: shape.to_vec(), strides, offset: 0 }
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the elements lie row-major without gaps (axes of length 1 may have any stride).
    pub fn is_contiguous(&self) -> bool {
        let mut expect = 1isize;
        for (d, s) in self.shape.iter().zip(&self.strides).rev() {
            if *d == 0 {
                return true;
            }
            if *d != 1 {
                if *s != expect {
                    return false;
                }
                expect *= *d as isize;
            }
        }
        true
    }

    /// Whether the last axis is dense (stride 1, or length at most 1).
    pub fn last_dim_dense(&self) -> bool {
        match (self.shape.last(), self.strides.last()) {
            (Some(d), Some(s)) => *s == 1 || *d <= 1,
            _ => true,
        }
    }

    /// Elements from the first to the last one reached, inclusive.
    pub fn span(&self) -> usize {
        if self.shape.contains(&0) {
            return 0;
        }
        1 + self.shape.iter().zip(&self.strides).map(|(d, s)| (d - 1) * *s as usize).sum::<usize>()
    }

    /// The same elements in another shape without moving them, if the strides allow it.
    pub fn reshaped(&self, shape: &[usize]) -> Option<Layout> {
        if self.is_contiguous() {
            return Some(Layout { offset: self.offset, ..Layout::contiguous(shape) });
        }
        // Group old axes and new axes into blocks of equal size; a block can be split or merged if it is dense in itself.
        let old: Vec<(usize, isize)> = self.shape.iter().copied().zip(self.strides.iter().copied()).filter(|(d, _)| *d != 1).collect();
        let mut strides = vec![0isize; shape.len()];
        let (mut i, mut j) = (0, 0);
        while i < old.len() {
            let (start, mut size) = (i, old[i].0);
            let first = j;
            let mut want = 1usize;
            while want < size || (j < shape.len() && shape[j] == 1) {
                if j == shape.len() {
                    return None;
                }
                want *= shape[j];
                j += 1;
                while want > size {
                    i += 1;
                    if i == old.len() {
                        return None;
                    }
                    size *= old[i].0;
                }
            }
            if want != size {
                return None;
            }
            if (start..i).any(|a| old[a].1 != old[a + 1].1 * old[a + 1].0 as isize) {
                return None;
            }
            let mut s = old[i].1;
            for a in (first..j).rev() {
                strides[a] = s;
                s *= shape[a] as isize;
            }
            i += 1;
        }
        Some(Layout { shape: shape.to_vec(), strides, offset: self.offset })
    }

    /// Merges neighbouring axes that `others` can merge as well, so that loops get long: returns the merged shape and one stride list per layout.
    pub fn merged(layouts: &[&Layout]) -> (Vec<usize>, Vec<Vec<isize>>) {
        let mut shape: Vec<usize> = vec![];
        let mut strides: Vec<Vec<isize>> = vec![vec![]; layouts.len()];
        for a in 0..layouts[0].shape.len() {
            let d = layouts[0].shape[a];
            if d == 1 {
                continue;
            }
            let fits = !shape.is_empty() && layouts.iter().zip(&strides).all(|(l, s)| s[s.len() - 1] == l.strides[a] * d as isize);
            if fits {
                *shape.last_mut().expect("not empty") *= d;
                layouts.iter().zip(&mut strides).for_each(|(l, s)| *s.last_mut().expect("not empty") = l.strides[a]);
            } else {
                shape.push(d);
                layouts.iter().zip(&mut strides).for_each(|(l, s)| s.push(l.strides[a]));
            }
        }
        if shape.is_empty() {
            shape.push(1);
            strides.iter_mut().for_each(|s| s.push(1));
        }
        (shape, strides)
    }
}

/// The shape that two shapes broadcast to (numpy's rule), if any.
pub fn broadcast_shape(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let n = a.len().max(b.len());
    let at = |s: &[usize], i: usize| if i + s.len() < n { 1 } else { s[i + s.len() - n] };
    (0..n)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Some(x),
            (1, y) => Some(y),
            (x, 1) => Some(x),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshapes_views_without_copying_when_strides_allow() {
        let l = Layout { shape: vec![2, 3, 4], strides: vec![24, 8, 1], offset: 5 };
        assert_eq!(l.reshaped(&[6, 4]).unwrap().strides, [8, 1]);
        assert_eq!(l.reshaped(&[2, 3, 2, 2]).unwrap().strides, [24, 8, 2, 1]);
        assert_eq!(l.reshaped(&[6, 1, 4]).unwrap().strides[2], 1);
        assert!(l.reshaped(&[24]).is_none());
        assert!(l.reshaped(&[2, 12]).is_none());
        assert!(Layout { shape: vec![3, 2], strides: vec![1, 3], offset: 0 }.reshaped(&[6]).is_none());
        let e = Layout { shape: vec![4, 5], strides: vec![0, 1], offset: 0 };
        assert!(e.reshaped(&[20]).is_none());
        assert_eq!(e.reshaped(&[2, 2, 5]).unwrap().strides, [0, 0, 1]);
    }

    #[test]
    fn broadcasting_follows_numpy() {
        assert_eq!(broadcast_shape(&[3, 1], &[4]), Some(vec![3, 4]));
        assert_eq!(broadcast_shape(&[], &[2]), Some(vec![2]));
        assert_eq!(broadcast_shape(&[3], &[4]), None);
    }
}
