//! The chunk's arithmetic for one value head, on dense tiles.
//!
//! Every product with a triangle runs over blocks of [`ROWS`] rows and skips what is zero; a third of the work of a square product falls away.

use engine::cpu::simd::{self, Real};
use engine::cpu::tile::{self, gemm};
use engine::cpu::{Scratch, scratch};
use engine::vectorized;

/// Steps per chunk.
pub const CHUNK: usize = 32;
/// Rows of a block of a triangular product: two of the register kernel's tiles on AVX2, one on AVX-512.
const ROWS: usize = 12;
/// Side of a diagonal block of the triangular inverse.
const SIDE: usize = 16;

/// A dense tile in scratch memory. Rows are a cache line further apart than they are long, so that a column of a power-of-two tile does not fall into
/// one set of the first cache.
pub struct Mat<F: Real> {
    x: Scratch<F>,
    ld: usize,
}

impl<F: Real> Mat<F> {
    pub fn new(rows: usize, cols: usize) -> Self {
        let ld = cols.next_multiple_of(16) + 16;
        Mat { x: scratch(rows.max(1) * ld), ld }
    }
    pub fn row(&self, i: usize, n: usize) -> &[F] {
        &self.x[i * self.ld..][..n]
    }
    pub fn row_mut(&mut self, i: usize, n: usize) -> &mut [F] {
        &mut self.x[i * self.ld..][..n]
    }
    pub fn copy(&mut self, from: &Mat<F>) {
        self.x.copy_from_slice(&from.x);
    }
}

/// C = beta·C + alpha·A·B, for `[m, k] × [k, n]`.
fn nn<F: Real>([m, n, k]: [usize; 3], alpha: F, a: &Mat<F>, b: &Mat<F>, beta: F, c: &mut Mat<F>) {
    gemm(m, n, k, alpha, &a.x, a.ld, 1, &b.x, b.ld, beta, &mut c.x, c.ld);
}
/// The same with A stored as `[k, m]`.
fn tn<F: Real>([m, n, k]: [usize; 3], alpha: F, a: &Mat<F>, b: &Mat<F>, beta: F, c: &mut Mat<F>) {
    gemm(m, n, k, alpha, &a.x, 1, a.ld, &b.x, b.ld, beta, &mut c.x, c.ld);
}
/// C = beta·C + alpha·L·B for a lower triangle L `[n, n]` that is zero above.
fn lower<F: Real>(n: usize, cols: usize, alpha: F, l: &Mat<F>, b: &Mat<F>, beta: F, c: &mut Mat<F>) {
    for i in (0..n).step_by(ROWS) {
        let rows = ROWS.min(n - i);
        gemm(rows, cols, i + rows, alpha, &l.x[i * l.ld..], l.ld, 1, &b.x, b.ld, beta, &mut c.x[i * c.ld..], c.ld);
    }
}
/// C = beta·C + alpha·Lᵀ·B.
fn lower_t<F: Real>(n: usize, cols: usize, alpha: F, l: &Mat<F>, b: &Mat<F>, beta: F, c: &mut Mat<F>) {
    for i in (0..n).step_by(ROWS) {
        gemm(ROWS.min(n - i), cols, n - i, alpha, &l.x[i * l.ld + i..], 1, l.ld, &b.x[i * b.ld..], b.ld, beta, &mut c.x[i * c.ld..], c.ld);
    }
}
/// The lower triangle of A·B for A `[n, k]`, B `[k, n]`; what lies above is left as it was, or is arbitrary.
fn to_lower<F: Real>(n: usize, k: usize, alpha: F, a: &Mat<F>, b: &Mat<F>, c: &mut Mat<F>) {
    for i in (0..n).step_by(ROWS) {
        let rows = ROWS.min(n - i);
        let cols = (i + rows).next_multiple_of(16).min(n);
        gemm(rows, cols, k, alpha, &a.x[i * a.ld..], a.ld, 1, &b.x, b.ld, F::ZERO, &mut c.x[i * c.ld..], c.ld);
    }
}

/// y = xᵀ for x `[rows, cols]`.
fn transpose<F: Real>(x: &Mat<F>, rows: usize, cols: usize, y: &mut Mat<F>) {
    tile::transpose(rows, cols, &x.x, x.ld, &mut y.x, y.ld);
}

vectorized! {
    /// D_ij = exp(g_i − g_j) on and below the diagonal. The mask comes before the exponential: above it nothing is computed.
    fn decay_ratios[F: Real](g: &[f64], d: &mut [F], ld: usize) {
        for (i, gi) in g.iter().enumerate() {
            let row = &mut d[i * ld..=i * ld + i];
            for (d, gj) in row.iter_mut().zip(g) { *d = F::from_f64(*gi - *gj) }
            for d in row { *d = d.exp() }
        }
    }
    /// m ⊙ D below the diagonal (and on it, if `diagonal`), zero elsewhere.
    fn decayed[F: Real](m: &mut [F], d: Option<&[F]>, ld: usize, n: usize, diagonal: bool) {
        for i in 0..n {
            let row = &mut m[i * ld..i * ld + n];
            let end = if diagonal { i + 1 } else { i };
            if let Some(d) = d { for (x, d) in row[..end].iter_mut().zip(&d[i * ld..]) { *x *= *d } }
            row[end..].fill(F::ZERO);
        }
    }
    /// The inverse of I + m for one diagonal block, row by row: A_i = e_i − Σ_{j<i} m_ij A_j.
    fn invert_block[F: Real](m: &[F], a: &mut [F], ld: usize) {
        let mut block = [[F::ZERO; SIDE]; SIDE];
        for i in 0..SIDE {
            let mut row = [F::ZERO; SIDE];
            row[i] = F::ONE;
            for j in 0..i {
                let f = -m[i * ld + j];
                for c in 0..SIDE { row[c] = f.mul_add(block[j][c], row[c]) }
            }
            block[i] = row;
        }
        for (i, row) in block.iter().enumerate() { a[i * ld..i * ld + SIDE].copy_from_slice(row) }
    }
    fn dot[F: Real](a: &[F], b: &[F]) -> F { simd::dot(a, b) }
    fn scale[F: Real](s: F, x: &mut [F]) { for x in x.iter_mut() { *x *= s } }
    /// y_i = s_i x_i, for the rows i of two tiles.
    fn scaled[F: Real](s: &[F], x: &[F], y: &mut [F], ld: usize, cols: usize) {
        for ((s, x), y) in s.iter().zip(x.chunks(ld)).zip(y.chunks_mut(ld)) {
            for (y, x) in y[..cols].iter_mut().zip(&x[..cols]) { *y = *x * *s }
        }
    }
    /// r_i = β_i (v_i − e^{g_i} r_i)
    fn residual[F: Real](v: &[F], eg: &[F], beta: &[F], r: &mut [F], ld: usize, cols: usize) {
        for (((v, e), b), r) in v.chunks(ld).zip(eg).zip(beta).zip(r.chunks_mut(ld)) {
            for (r, v) in r[..cols].iter_mut().zip(&v[..cols]) { *r = *b * (*v - *e * *r) }
        }
    }
    /// y_i += s_i x_i; dots_i = x_i · z_i.
    fn axpy_dot[F: Real](s: &[F], x: &[F], y: &mut [F], z: &[F], dots: &mut [F], ld: usize, cols: usize) {
        for ((((s, x), y), z), d) in s.iter().zip(x.chunks(ld)).zip(y.chunks_mut(ld)).zip(z.chunks(ld)).zip(dots) {
            let (x, z) = (&x[..cols], &z[..cols]);
            for (y, x) in y[..cols].iter_mut().zip(x) { *y = s.mul_add(*x, *y) }
            *d = simd::dot(x, z);
        }
    }
    /// dots_i = x_i · y_i
    fn row_dots[F: Real](x: &[F], y: &[F], dots: &mut [F], ld: usize, cols: usize) {
        for ((x, y), d) in x.chunks(ld).zip(y.chunks(ld)).zip(dots) { *d = simd::dot(&x[..cols], &y[..cols]) }
    }
    /// Row sums added to dg, column sums taken from it, of a ⊙ b below the diagonal: the gradient of g through a decay matrix. `rows` is scratch.
    /// On the diagonal the two cancel; they are left out, as their rounding would drown what a strong decay leaves.
    fn decay_grad[F: Real](a: &[F], b: &[F], ld: usize, dg: &mut [F], rows: &mut [F]) {
        let n = dg.len();
        let mut cols = [F::ZERO; CHUNK];
        for i in 0..n {
            let (a, b) = (&a[i * ld..i * ld + i], &b[i * ld..i * ld + i]);
            rows[i] = simd::dot(a, b);
            for ((c, a), b) in cols.iter_mut().zip(a).zip(b) { *c = a.mul_add(*b, *c) }
        }
        for ((d, c), r) in dg.iter_mut().zip(&cols).zip(rows) { *d += *r - *c }
    }
    fn exp_all[F: Real](x: &mut [F]) { for x in x.iter_mut() { *x = x.exp() } }
}

/// One chunk's inputs: q, k `[n, dk]` (normalised), v `[n, dv]`, g (running log-decay) and beta `[n]`.
/// The sums are f64: in f32 a strong decay would leave the weak ones after it few digits in the differences.
pub struct Chunk<F: Real> {
    pub n: usize,
    pub q: Mat<F>,
    pub k: Mat<F>,
    pub v: Mat<F>,
    pub g: Vec<f64>,
    pub beta: Vec<F>,
}

impl<F: Real> Chunk<F> {
    /// V' where nothing is erased: β V.
    pub fn written(&self, d: Dims<F>, v_new: &mut Mat<F>) {
        scaled(&self.beta, &self.v.x, &mut v_new.x, self.v.ld, d.dv);
    }
}

/// Constant through a call.
#[derive(Clone, Copy)]
pub struct Dims<F> {
    pub dk: usize,
    pub dv: usize,
    pub scale: F,
    pub erase: bool,
    pub decay: bool,
}

/// Scratch for one task.
pub struct Work<F: Real> {
    kt: Mat<F>,
    ratios: Mat<F>,
    m: Mat<F>,
    p: Mat<F>,
    scaled: Mat<F>,
    eg: Vec<F>,
    tail: Vec<F>,
}

impl<F: Real> Work<F> {
    pub fn new(d: Dims<F>) -> Self {
        let square = || Mat::new(CHUNK, CHUNK);
        Work { kt: Mat::new(d.dk, CHUNK), ratios: square(), m: square(), p: square(), scaled: Mat::new(CHUNK, d.dk), eg: vec![], tail: vec![] }
    }
    /// e^g and e^{g_last − g}: all that [`Work::advance`] needs of a chunk.
    pub fn decays(&mut self, c: &Chunk<F>) {
        let last = c.g[c.n - 1];
        self.eg.clear();
        self.eg.extend(c.g.iter().map(|g| F::from_f64(*g)));
        self.tail.clear();
        self.tail.extend(c.g.iter().map(|g| F::from_f64(last - *g)));
        exp_all(&mut self.eg);
        exp_all(&mut self.tail);
    }
    /// [`Work::decays`], and what the products inside the chunk need: Kᵀ and D.
    pub fn open(&mut self, d: Dims<F>, c: &Chunk<F>) {
        self.decays(c);
        transpose(&c.k, c.n, d.dk, &mut self.kt);
        if d.decay {
            decay_ratios(&c.g, &mut self.ratios.x, self.ratios.ld);
        }
    }
    fn mask(d: Dims<F>, ratios: &Mat<F>, m: &mut Mat<F>, n: usize, diagonal: bool) {
        decayed(&mut m.x, d.decay.then_some(&ratios.x[..]), m.ld, n, diagonal);
    }
    /// P = tril(Q Kᵀ ⊙ D), into `p`.
    fn qk(&mut self, d: Dims<F>, c: &Chunk<F>) {
        to_lower(c.n, d.dk, F::ONE, &c.q, &self.kt, &mut self.p);
        Self::mask(d, &self.ratios, &mut self.p, c.n, true);
    }
    /// M without β, strictLower(K Kᵀ ⊙ D), stays in `m`; A `[n, n]`; after [`Work::open`]. Overwrites `p`.
    ///
    /// Blockwise: with the inverse of the leading blocks at hand, a block row is A_bb (E_b − M_b A), where M_b lies left of the diagonal.
    pub fn factor(&mut self, d: Dims<F>, c: &Chunk<F>, a: &mut Mat<F>) {
        let (n, whole, ld) = (c.n, c.n.next_multiple_of(SIDE), a.ld);
        to_lower(n, d.dk, F::ONE, &c.k, &self.kt, &mut self.m);
        Self::mask(d, &self.ratios, &mut self.m, n, false);
        let m = &mut self.p;
        scaled(&c.beta, &self.m.x, &mut m.x, ld, n);
        for i in 0..whole {
            m.row_mut(i, whole)[if i < n { n } else { 0 }..].fill(F::ZERO);
            a.row_mut(i, whole).fill(F::ZERO);
        }
        let mut t = [F::ZERO; SIDE * CHUNK];
        for b in (0..whole).step_by(SIDE) {
            let (done, rest) = a.x.split_at_mut(b * ld);
            invert_block(&m.x[b * ld + b..], &mut rest[b..], ld);
            if b > 0 {
                gemm(SIDE, b, b, F::ONE, &m.x[b * ld..], ld, 1, done, ld, F::ZERO, &mut t, CHUNK);
                let diagonal: [[F; SIDE]; SIDE] = std::array::from_fn(|i| std::array::from_fn(|j| rest[i * ld + b + j]));
                gemm(SIDE, b, SIDE, -F::ONE, diagonal.as_flattened(), SIDE, 1, &t, CHUNK, F::ZERO, rest, ld);
            }
        }
    }
    /// V' from the state before the chunk; after [`Work::open`]. `r` is scratch.
    ///
    /// A state of `None` is zero here and in what follows: a sequence's first chunk is spared half of its products.
    pub fn values(&mut self, d: Dims<F>, c: &Chunk<F>, h: Option<&Mat<F>>, a: &mut Mat<F>, r: &mut Mat<F>, v_new: &mut Mat<F>) {
        let (n, dv) = (c.n, d.dv);
        if !d.erase {
            return c.written(d, v_new);
        }
        self.factor(d, c, a);
        match h {
            Some(h) => {
                nn([n, dv, d.dk], F::ONE, &c.k, h, F::ZERO, r);
                residual(&c.v.x, &self.eg, &c.beta, &mut r.x, c.v.ld, dv);
            }
            None => scaled(&c.beta, &c.v.x, &mut r.x, c.v.ld, dv),
        }
        lower(n, dv, F::ONE, a, r, F::ZERO, v_new);
    }
    /// The output of a chunk; after [`Work::open`].
    pub fn output(&mut self, d: Dims<F>, c: &Chunk<F>, h: Option<&Mat<F>>, v_new: &Mat<F>, o: &mut Mat<F>) {
        let n = c.n;
        self.qk(d, c);
        if let Some(h) = h {
            scaled(&self.eg, &c.q.x, &mut self.scaled.x, c.q.ld, d.dk);
            nn([n, d.dv, d.dk], d.scale, &self.scaled, h, F::ZERO, o);
        }
        lower(n, d.dv, d.scale, &self.p, v_new, if h.is_some() { F::ONE } else { F::ZERO }, o);
    }
    /// The state after a chunk, in place; after [`Work::decays`].
    pub fn advance(&mut self, d: Dims<F>, c: &Chunk<F>, v_new: &Mat<F>, h: &mut Mat<F>) {
        let n = c.n;
        scaled(&self.tail, &c.k.x, &mut self.scaled.x, c.k.ld, d.dk);
        tn([d.dk, d.dv, n], F::ONE, &self.scaled, v_new, self.eg[n - 1], h);
    }
}

/// Gradients of one chunk.
pub struct ChunkGrad<F: Real> {
    pub q: Mat<F>,
    pub k: Mat<F>,
    pub v: Mat<F>,
    pub g: Vec<F>,
    pub beta: Vec<F>,
}

/// Scratch of the backward.
pub struct BackWork<F: Real> {
    a: Mat<F>,
    ht: Mat<F>,
    vt: Mat<F>,
    dv_new: Mat<F>,
    dr: Mat<F>,
    dm: Mat<F>,
    dp: Mat<F>,
    tmp: Mat<F>,
    sums: [F; CHUNK],
}

impl<F: Real> BackWork<F> {
    pub fn new(d: Dims<F>) -> Self {
        let square = || Mat::new(CHUNK, CHUNK);
        BackWork {
            a: square(),
            ht: Mat::new(d.dv, d.dk),
            vt: Mat::new(d.dv, CHUNK),
            dv_new: Mat::new(CHUNK, d.dv),
            dr: Mat::new(CHUNK, d.dv),
            dm: square(),
            dp: square(),
            tmp: Mat::new(CHUNK, d.dk),
            sums: [F::ZERO; CHUNK],
        }
    }

    /// Gradients of a chunk from `d_o [n, dv]` and `dh` (gradient of the state after it, turned into that of the state before it, `h`).
    /// `after`: whether dh is more than zeros; `before`: whether its new value is asked for.
    /// `w` is scratch; the formulas follow from the module's head.
    pub fn chunk(
        &mut self,
        w: &mut Work<F>,
        d: Dims<F>,
        c: &Chunk<F>,
        h: Option<&Mat<F>>,
        v_new: &Mat<F>,
        d_o: &Mat<F>,
        dh: &mut Mat<F>,
        [after, before]: [bool; 2],
        out: &mut ChunkGrad<F>,
    ) {
        let (n, dk, dv, last) = (c.n, d.dk, d.dv, c.n - 1);
        let (q, k, one, zero) = (&c.q, &c.k, F::ONE, F::ZERO);
        w.open(d, c);
        if d.erase {
            w.factor(d, c, &mut self.a);
        }
        w.qk(d, c);
        let ChunkGrad { q: gq, k: gk, v: gv, g: gg, beta: gb } = out;
        for g in [&mut *gg, gb] {
            g.clear();
            g.resize(n, zero);
        }
        let dots = &mut self.sums[..n];

        // dV' = scale Pᵀ dO + (e^{g_last − g} K) dh
        lower_t(n, dv, d.scale, &w.p, d_o, zero, &mut self.dv_new);
        if after {
            scaled(&w.tail, &k.x, &mut w.scaled.x, k.ld, dk);
            nn([n, dv, dk], one, &w.scaled, dh, one, &mut self.dv_new);
        }

        // through P: dP = scale dO V'ᵀ ⊙ D; P already holds D, so that dP ⊙ P before the mask is D's gradient times D
        transpose(v_new, n, dv, &mut self.vt);
        to_lower(n, dv, d.scale, d_o, &self.vt, &mut self.dp);
        if d.decay {
            decay_grad(&self.dp.x, &w.p.x, w.p.ld, gg, dots);
        }
        Work::mask(d, &w.ratios, &mut self.dp, n, true);
        lower(n, dk, one, &self.dp, k, zero, gq);
        lower_t(n, dk, one, &self.dp, q, zero, gk);

        // through the state's update: dK = e^{g_last − g} V' dhᵀ
        if after {
            transpose(dh, dk, dv, &mut self.ht);
            nn([n, dk, dv], one, v_new, &self.ht, zero, &mut self.tmp);
            axpy_dot(&w.tail, &self.tmp.x, &mut gk.x, &k.x, dots, k.ld, dk);
            let mut into_last = zero;
            if let Some(h) = h {
                into_last = w.eg[last] * (0..dk).map(|i| dot(h.row(i, dv), dh.row(i, dv))).sum();
            }
            // the last row's own share cancels
            for i in 0..last {
                gg[i] -= w.tail[i] * dots[i];
                into_last += w.tail[i] * dots[i];
            }
            gg[last] += into_last;
        }

        // through O's first term: dQ = scale e^g dO hᵀ
        if let Some(h) = h {
            transpose(h, dk, dv, &mut self.ht);
            nn([n, dk, dv], d.scale, d_o, &self.ht, zero, &mut self.tmp);
            axpy_dot(&w.eg, &self.tmp.x, &mut gq.x, &q.x, dots, q.ld, dk);
            for i in 0..n {
                gg[i] += w.eg[i] * dots[i];
            }
        }
        if before {
            scaled(&w.eg, &q.x, &mut w.scaled.x, q.ld, dk);
            tn([dk, dv, n], d.scale, &w.scaled, d_o, if after { w.eg[last] } else { zero }, dh);
        }

        if !d.erase {
            row_dots(&self.dv_new.x, &c.v.x, gb, c.v.ld, dv);
            return scaled(&c.beta, &self.dv_new.x, &mut gv.x, c.v.ld, dv);
        }

        // through V' = A R: dR = Aᵀ dV', dM = −strictLower(dR V'ᵀ)
        lower_t(n, dv, one, &self.a, &self.dv_new, zero, &mut self.dr);
        to_lower(n, dv, -one, &self.dr, &self.vt, &mut self.dm);

        // through R = β (V − e^g K h); dR · K h is had from dR hᵀ, which dK needs
        row_dots(&self.dr.x, &c.v.x, gb, c.v.ld, dv);
        scaled(&c.beta, &self.dr.x, &mut gv.x, c.v.ld, dv);
        let into: [F; CHUNK] = std::array::from_fn(|i| if i < n { -w.eg[i] * c.beta[i] } else { zero });
        if h.is_some() {
            nn([n, dk, dv], one, &self.dr, &self.ht, zero, &mut self.tmp);
            axpy_dot(&into[..n], &self.tmp.x, &mut gk.x, &k.x, dots, k.ld, dk);
            for i in 0..n {
                gb[i] -= w.eg[i] * dots[i];
                gg[i] += into[i] * dots[i];
            }
        }
        if before {
            scaled(&into[..n], &k.x, &mut w.scaled.x, k.ld, dk);
            tn([dk, dv, n], one, &w.scaled, &self.dr, one, dh);
        }

        // through M = β_i (K Kᵀ)_ij D_ij
        for i in 0..n {
            gb[i] += dot(self.dm.row(i, i), w.m.row(i, i));
            scale(c.beta[i], self.dm.row_mut(i, i + 1));
        }
        if d.decay {
            decay_grad(&self.dm.x, &w.m.x, w.m.ld, gg, dots);
        }
        Work::mask(d, &w.ratios, &mut self.dm, n, false);
        lower(n, dk, one, &self.dm, k, one, gk);
        lower_t(n, dk, one, &self.dm, k, one, gk);
    }
}
