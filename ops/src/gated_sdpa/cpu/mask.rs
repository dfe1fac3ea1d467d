//! Masks as bands: with causal, sliding-window and document masks alike, the keys that a query may see are one interval, and both of its ends
//! never move backwards as the query's time grows. So a tile's masked cells are told by two numbers per row, and whole tiles by comparing ends.

use super::Problem;

/// For each query time t, the keys `lo[t] .. hi[t]` that it sees.
#[derive(Clone, Debug)]
pub struct Bands {
    /// First visible key.
    pub lo: Vec<usize>,
    /// One past the last visible key.
    pub hi: Vec<usize>,
    /// Bounds of the documents; one document when nothing is packed.
    docs: Vec<usize>,
}

impl Bands {
    /// The bands of a problem; `cu` are the document boundaries `0 = cu[0] <= .. <= cu[n] = T` of packed documents.
    pub fn new(p: &Problem, cu: Option<&[usize]>) -> Bands {
        let (mut lo, mut hi) = (vec![0; p.t], vec![p.s; p.t]);
        for t in 0..p.t {
            let at = t + p.s - p.t; // queries stand at the end of the keys
            if let Some(w) = p.window {
                lo[t] = (at + 1).saturating_sub(w);
                hi[t] = at.saturating_add(w).min(p.s);
            }
            if p.causal {
                hi[t] = at + 1;
            }
        }
        let docs = cu.map_or_else(|| vec![0, p.t], <[usize]>::to_vec);
        for doc in docs.windows(2).filter(|_| cu.is_some()) {
            for t in doc[0]..doc[1] {
                lo[t] = lo[t].max(doc[0]);
                hi[t] = hi[t].min(doc[1]);
            }
        }
        Bands { lo, hi, docs }
    }

    /// For each document, its tiles of at most `times` queries. They begin anew with each document: it is computed as if it were alone, to the bit.
    pub fn tiles(&self, times: usize) -> Vec<Vec<(usize, usize)>> {
        let tiles = |doc: &[usize]| (doc[0]..doc[1]).step_by(times).map(|t0| (t0, (t0 + times).min(doc[1]))).collect();
        self.docs.windows(2).map(tiles).collect()
    }

    /// The keys that any of the queries `t0..t1` sees, as an interval.
    pub fn keys(&self, t0: usize, t1: usize) -> (usize, usize) {
        (self.lo[t0], self.hi[t1 - 1])
    }
}

/// One tile of keys `k0..k1` against queries `t0..t1`, each with `group` columns (its heads).
#[derive(Default, Debug)]
pub struct Tile {
    /// Whether no cell is masked.
    pub full: bool,
    /// For each key, the columns that see it; empty when `full`.
    pub cols: Vec<(usize, usize)>,
}

impl Tile {
    /// Looks the tile up in the bands; false when every cell is masked.
    pub fn set(&mut self, bands: &Bands, (k0, k1): (usize, usize), (t0, t1): (usize, usize), group: usize) -> bool {
        let (lo, hi) = (&bands.lo[t0..t1], &bands.hi[t0..t1]);
        if hi[hi.len() - 1] <= k0 || lo[0] >= k1 {
            return false;
        }
        self.full = hi[0] >= k1 && lo[lo.len() - 1] <= k0;
        self.cols.clear();
        if !self.full {
            let (mut a, mut b) = (0, 0);
            for j in k0..k1 {
                while a < hi.len() && hi[a] <= j {
                    a += 1;
                }
                while b < lo.len() && lo[b] <= j {
                    b += 1;
                }
                self.cols.push((a * group, b.max(a) * group));
            }
        }
        true
    }

    /// Blocks of keys with the columns (widened to multiples of 16, at most `width`) that see any key of the block.
    pub fn by_key(&self, keys: usize, width: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
        if self.full {
            return f(0, keys, 0, width);
        }
        for j0 in (0..keys).step_by(BLOCK) {
            let j1 = (j0 + BLOCK).min(keys);
            let (a, b) = (self.cols[j0].0 / 16 * 16, super::view::pad16(self.cols[j1 - 1].1).min(width));
            if a < b {
                f(j0, j1, a, b);
            }
        }
    }

    /// Blocks of columns, at most `width`, with the keys that any column of the block sees.
    pub fn by_col(&self, keys: usize, width: usize, mut f: impl FnMut(usize, usize, usize, usize)) {
        if self.full {
            return f(0, width, 0, keys);
        }
        for c0 in (0..width).step_by(BLOCK) {
            let c1 = (c0 + BLOCK).min(width);
            let a = self.cols.partition_point(|c| c.1 <= c0);
            let b = self.cols.partition_point(|c| c.0 < c1);
            if a < b {
                f(c0, c1, a, b);
            }
        }
    }
}

/// How finely a partly masked tile is cut, so that its masked half costs little. A multiple of 16.
const BLOCK: usize = 16;
