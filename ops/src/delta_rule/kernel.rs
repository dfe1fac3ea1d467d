//! The chunk's arithmetic for one value head, on dense tiles.

use super::CHUNK;
use engine::cpu::simd::Real;
use engine::cpu::tile::gemm;
use engine::vectorized;

vectorized! {
    /// m_ij *= exp(g_i − g_j) below (and on, if `diagonal`) the diagonal; zero elsewhere. The mask comes before the exponential.
    fn decay_lower[F: Real](m: &mut [F], g: &[F], n: usize, diagonal: bool) {
        for i in 0..n {
            let row = &mut m[i * n..(i + 1) * n];
            let end = if diagonal { i + 1 } else { i };
            let gi = g[i];
            for (x, gj) in row[..end].iter_mut().zip(g) { *x *= (gi - *gj).exp() }
            row[end..].fill(F::ZERO);
        }
    }
    /// A = (I + M)⁻¹ for strictly lower M, row by row: A_i = e_i − Σ_{j<i} M_ij A_j.
    fn invert[F: Real](m: &[F], a: &mut [F], n: usize) {
        for i in 0..n {
            let (done, row) = a.split_at_mut(i * n);
            let row = &mut row[..n];
            row.fill(F::ZERO);
            for j in 0..i {
                let f = -m[i * n + j];
                for (x, y) in row[..=j].iter_mut().zip(&done[j * n..=j * n + j]) { *x = f.mul_add(*y, *x) }
            }
            row[i] = F::ONE;
        }
    }
    fn transpose_into[F: Real](x: &[F], r: usize, c: usize, y: &mut [F]) {
        for j0 in (0..c).step_by(8) {
            for i in 0..r {
                for j in j0..(j0 + 8).min(c) { y[j * r + i] = x[i * c + j] }
            }
        }
    }
    fn dot[F: Real](a: &[F], b: &[F]) -> F { dot_inline(a, b) }
    fn scale_rows[F: Real](x: &[F], s: &[F], y: &mut [F], d: usize) {
        for ((x, s), y) in x.chunks(d).zip(s).zip(y.chunks_mut(d)) { for (y, x) in y.iter_mut().zip(x) { *y = *x * *s } }
    }
    /// r = β (v − e^g kh)
    fn residual[F: Real](v: &[F], kh: &[F], eg: &[F], beta: &[F], r: &mut [F], d: usize) {
        for i in 0..beta.len() {
            let (e, b) = (eg[i], beta[i]);
            for ((r, v), k) in r[i * d..(i + 1) * d].iter_mut().zip(&v[i * d..]).zip(&kh[i * d..]) { *r = b * (*v - e * *k) }
        }
    }
    /// s·x added to y
    fn axpy[F: Real](s: F, x: &[F], y: &mut [F]) { for (y, x) in y.iter_mut().zip(x) { *y = s.mul_add(*x, *y) } }
    fn scale[F: Real](s: F, x: &mut [F]) { for x in x.iter_mut() { *x *= s } }
    /// Row sums added to `row`, column sums taken from `row`, of a ⊙ b: the gradient of g through a decay matrix.
    fn decay_grad[F: Real](a: &[F], b: &[F], n: usize, dg: &mut [F]) {
        let mut cols = [F::ZERO; CHUNK];
        for i in 0..n {
            let (a, b) = (&a[i * n..(i + 1) * n], &b[i * n..(i + 1) * n]);
            dg[i] += dot_inline(a, b);
            for ((c, a), b) in cols.iter_mut().zip(a).zip(b) { *c = a.mul_add(*b, *c) }
        }
        for (d, c) in dg.iter_mut().zip(&cols) { *d -= *c }
    }
    /// exp(x)
    fn exp_all[F: Real](x: &mut [F]) { for x in x.iter_mut() { *x = x.exp() } }
    fn mul_all[F: Real](x: &[F], y: &mut [F]) { for (y, x) in y.iter_mut().zip(x) { *y *= *x } }
    fn strict_lower[F: Real](x: &mut [F], n: usize, diagonal: bool) {
        for i in 0..n { x[i * n + i + diagonal as usize..(i + 1) * n].fill(F::ZERO) }
    }
}

#[inline(always)]
fn dot_inline<F: Real>(a: &[F], b: &[F]) -> F {
    let mut acc = [F::ZERO; 16];
    let (ca, ta) = a.as_chunks::<16>();
    let (cb, tb) = b.as_chunks::<16>();
    for (x, y) in ca.iter().zip(cb) {
        for i in 0..16 {
            acc[i] = x[i].mul_add(y[i], acc[i]);
        }
    }
    for (i, (x, y)) in ta.iter().zip(tb).enumerate() {
        acc[i] = x.mul_add(*y, acc[i]);
    }
    acc.iter().copied().sum()
}

/// One chunk's inputs, dense: q, k `[n, dk]` (normalised), v `[n, dv]`, g (running log-decay) and beta `[n]`.
#[derive(Clone)]
pub struct Chunk<F> {
    pub n: usize,
    pub q: Vec<F>,
    pub k: Vec<F>,
    pub v: Vec<F>,
    pub g: Vec<F>,
    pub beta: Vec<F>,
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
pub struct Work<F> {
    kt: Vec<F>,
    m: Vec<F>,
    p: Vec<F>,
    kh: Vec<F>,
    r: Vec<F>,
    scaled: Vec<F>,
    pub v_new: Vec<F>,
    eg: Vec<F>,
    tail: Vec<F>,
}

impl<F: Real> Work<F> {
    pub fn new(d: Dims<F>) -> Self {
        let z = |n: usize| vec![F::ZERO; n];
        let wide = d.dk.max(d.dv);
        Work {
            kt: z(CHUNK * d.dk),
            m: z(CHUNK * CHUNK),
            p: z(CHUNK * CHUNK),
            kh: z(CHUNK * d.dv),
            r: z(CHUNK * d.dv),
            scaled: z(CHUNK * wide),
            v_new: z(CHUNK * d.dv),
            eg: z(CHUNK),
            tail: z(CHUNK),
        }
    }
    /// e^g and e^{g_last − g}.
    fn decays(&mut self, c: &Chunk<F>) {
        let last = c.g[c.n - 1];
        self.eg[..c.n].copy_from_slice(&c.g);
        for (t, g) in self.tail.iter_mut().zip(&c.g) {
            *t = last - *g;
        }
        exp_all(&mut self.eg[..c.n]);
        exp_all(&mut self.tail[..c.n]);
    }
    /// M (without β) = strictLower(K Kᵀ ⊙ D), into `m`; needs `kt`.
    fn kk(&mut self, d: Dims<F>, c: &Chunk<F>) {
        let n = c.n;
        gemm(n, n, d.dk, F::ONE, &c.k, d.dk, 1, &self.kt, n, F::ZERO, &mut self.m, n);
        if d.decay { decay_lower(&mut self.m, &c.g, n, false) } else { strict_lower(&mut self.m, n, false) }
    }
    /// P = tril(Q Kᵀ ⊙ D), into `p`; needs `kt`.
    fn qk(&mut self, d: Dims<F>, c: &Chunk<F>) {
        let n = c.n;
        gemm(n, n, d.dk, F::ONE, &c.q, d.dk, 1, &self.kt, n, F::ZERO, &mut self.p, n);
        if d.decay { decay_lower(&mut self.p, &c.g, n, true) } else { strict_lower(&mut self.p, n, true) }
    }
    /// A `[n, n]` for a chunk.
    pub fn factor(&mut self, d: Dims<F>, c: &Chunk<F>, a: &mut [F]) {
        let n = c.n;
        transpose_into(&c.k, n, d.dk, &mut self.kt);
        self.kk(d, c);
        for i in 0..n {
            scale(c.beta[i], &mut self.m[i * n..(i + 1) * n]);
        }
        invert(&self.m[..n * n], a, n);
    }
    /// V' from the state before the chunk, into `v_new` (and R into `r`).
    pub fn values(&mut self, d: Dims<F>, c: &Chunk<F>, a: &[F], h: &[F]) {
        let n = c.n;
        self.decays(c);
        if !d.erase {
            scale_rows(&c.v, &c.beta, &mut self.v_new[..n * d.dv], d.dv);
            return;
        }
        gemm(n, d.dv, d.dk, F::ONE, &c.k, d.dk, 1, h, d.dv, F::ZERO, &mut self.kh, d.dv);
        residual(&c.v, &self.kh, &self.eg, &c.beta, &mut self.r, d.dv);
        gemm(n, d.dv, n, F::ONE, a, n, 1, &self.r, d.dv, F::ZERO, &mut self.v_new, d.dv);
    }
    /// The output of a chunk; after [`Work::values`].
    pub fn output(&mut self, d: Dims<F>, c: &Chunk<F>, h: &[F], o: &mut [F]) {
        let n = c.n;
        transpose_into(&c.k, n, d.dk, &mut self.kt);
        self.qk(d, c);
        scale_rows(&c.q, &self.eg, &mut self.scaled[..n * d.dk], d.dk);
        gemm(n, d.dv, d.dk, d.scale, &self.scaled, d.dk, 1, h, d.dv, F::ZERO, o, d.dv);
        gemm(n, d.dv, n, d.scale, &self.p, n, 1, &self.v_new, d.dv, F::ONE, o, d.dv);
    }
    /// The state after a chunk, in place; after [`Work::values`].
    pub fn advance(&mut self, d: Dims<F>, c: &Chunk<F>, h: &mut [F]) {
        let n = c.n;
        scale_rows(&c.k, &self.tail, &mut self.scaled[..n * d.dk], d.dk);
        gemm(d.dk, d.dv, n, F::ONE, &self.scaled, 1, d.dk, &self.v_new, d.dv, self.eg[n - 1], h, d.dv);
    }
}

/// Gradients of one chunk.
pub struct ChunkGrad<F> {
    pub q: Vec<F>,
    pub k: Vec<F>,
    pub v: Vec<F>,
    pub g: Vec<F>,
    pub beta: Vec<F>,
}

/// Scratch of the backward.
pub struct BackWork<F> {
    ht: Vec<F>,
    vt: Vec<F>,
    dv_new: Vec<F>,
    dr: Vec<F>,
    dm: Vec<F>,
    dp: Vec<F>,
    dd: Vec<F>,
    tmp: Vec<F>,
}

impl<F: Real> BackWork<F> {
    pub fn new(d: Dims<F>) -> Self {
        let z = |n: usize| vec![F::ZERO; n];
        let wide = d.dk.max(d.dv);
        BackWork {
            ht: z(d.dk * d.dv),
            vt: z(CHUNK * d.dv),
            dv_new: z(CHUNK * d.dv),
            dr: z(CHUNK * d.dv),
            dm: z(CHUNK * CHUNK),
            dp: z(CHUNK * CHUNK),
            dd: z(CHUNK * CHUNK),
            tmp: z(CHUNK * wide),
        }
    }

    /// Gradients of a chunk from `d_o [n, dv]` and `dh` (gradient of the state after it, turned into that of the state before it, `h`).
    /// `w` is scratch; the formulas follow from the module's head, the chunk's forward being computed again from `h` and `a`.
    #[allow(clippy::too_many_arguments)]
    pub fn chunk(&mut self, w: &mut Work<F>, d: Dims<F>, c: &Chunk<F>, a: &[F], h: &[F], d_o: &[F], dh: &mut [F], out: &mut ChunkGrad<F>) {
        let (n, dk, dv) = (c.n, d.dk, d.dv);
        w.values(d, c, a, h);
        transpose_into(&c.k, n, dk, &mut w.kt);
        w.qk(d, c);
        let (q, k) = (&c.q, &c.k);
        let ChunkGrad { q: gq, k: gk, v: gv, g: gg, beta: gb } = out;
        [&mut *gq, gk, gv, gg, gb].into_iter().for_each(|x| x.fill(F::ZERO));
        let last = n - 1;

        // dV' = scale Pᵀ dO + (e^{g_last − g} K) dh
        gemm(n, dv, n, d.scale, &w.p, 1, n, d_o, dv, F::ZERO, &mut self.dv_new, dv);
        scale_rows(k, &w.tail, &mut w.scaled[..n * dk], dk);
        gemm(n, dv, dk, F::ONE, &w.scaled, dk, 1, dh, dv, F::ONE, &mut self.dv_new, dv);

        // through P: dP = scale dO V'ᵀ ⊙ D
        transpose_into(&w.v_new, n, dv, &mut self.vt);
        gemm(n, n, dv, d.scale, d_o, dv, 1, &self.vt, n, F::ZERO, &mut self.dp, n);
        if d.decay {
            // dg through D, where P already holds D
            strict_lower(&mut self.dp, n, true);
            decay_grad(&self.dp, &w.p, n, gg);
            decay_lower(&mut self.dp, &c.g, n, true);
        } else {
            strict_lower(&mut self.dp, n, true);
        }
        gemm(n, dk, n, F::ONE, &self.dp, n, 1, k, dk, F::ZERO, gq, dk);
        gemm(n, dk, n, F::ONE, &self.dp, 1, n, q, dk, F::ZERO, gk, dk);

        // through the state's update: dK_a = e^{g_last − g} V' dhᵀ
        transpose_into(dh, dk, dv, &mut self.ht);
        gemm(n, dk, dv, F::ONE, &w.v_new, dv, 1, &self.ht, dk, F::ZERO, &mut self.tmp, dk);
        let mut into_last = w.eg[last] * dot(h, dh);
        for i in 0..n {
            let row = &mut self.tmp[i * dk..(i + 1) * dk];
            scale(w.tail[i], row);
            let x = dot(row, &k[i * dk..(i + 1) * dk]);
            gg[i] -= x;
            into_last += x;
            axpy(F::ONE, row, &mut gk[i * dk..(i + 1) * dk]);
        }
        gg[last] += into_last;

        // through O's first term: dQ = scale e^g dO hᵀ
        transpose_into(h, dk, dv, &mut self.ht);
        gemm(n, dk, dv, d.scale, d_o, dv, 1, &self.ht, dk, F::ZERO, &mut self.tmp, dk);
        for i in 0..n {
            let row = &mut self.tmp[i * dk..(i + 1) * dk];
            scale(w.eg[i], row);
            gg[i] += dot(row, &q[i * dk..(i + 1) * dk]);
            axpy(F::ONE, row, &mut gq[i * dk..(i + 1) * dk]);
        }
        scale(w.eg[last], dh);
        scale_rows(q, &w.eg, &mut w.scaled[..n * dk], dk);
        gemm(dk, dv, n, d.scale, &w.scaled, 1, dk, d_o, dv, F::ONE, dh, dv);

        if !d.erase {
            for i in 0..n {
                let (dv_new, v) = (&self.dv_new[i * dv..(i + 1) * dv], &c.v[i * dv..(i + 1) * dv]);
                gb[i] = dot(dv_new, v);
                axpy(c.beta[i], dv_new, &mut gv[i * dv..(i + 1) * dv]);
            }
            return;
        }

        // through V' = A R: dR = Aᵀ dV', dM = −strictLower(dR V'ᵀ)
        gemm(n, dv, n, F::ONE, a, 1, n, &self.dv_new, dv, F::ZERO, &mut self.dr, dv);
        gemm(n, n, dv, -F::ONE, &self.dr, dv, 1, &self.vt, n, F::ZERO, &mut self.dm, n);
        strict_lower(&mut self.dm, n, false);

        // through R = β (V − e^g K h)
        for i in 0..n {
            let (r, v, kh) = (&mut self.dr[i * dv..(i + 1) * dv], &c.v[i * dv..(i + 1) * dv], &w.kh[i * dv..(i + 1) * dv]);
            let through = dot(r, kh);
            gb[i] += dot(r, v) - w.eg[i] * through;
            gg[i] -= c.beta[i] * w.eg[i] * through;
            scale(c.beta[i], r);
            gv[i * dv..(i + 1) * dv].copy_from_slice(r);
            scale(-w.eg[i], r); // now the gradient of K h
        }
        gemm(n, dk, dv, F::ONE, &self.dr, dv, 1, &self.ht, dk, F::ONE, gk, dk);
        gemm(dk, dv, n, F::ONE, k, 1, dk, &self.dr, dv, F::ONE, dh, dv);

        // through M = β_i (K Kᵀ)_ij D_ij
        w.kk(d, c);
        self.dd[..n * n].copy_from_slice(&self.dm[..n * n]);
        mul_all(&w.m[..n * n], &mut self.dd[..n * n]);
        for i in 0..n {
            gb[i] += self.dd[i * n..(i + 1) * n].iter().copied().sum();
            scale(c.beta[i], &mut self.dm[i * n..(i + 1) * n]);
        }
        if d.decay {
            decay_grad(&self.dm, &w.m, n, gg);
            decay_lower(&mut self.dm, &c.g, n, false);
        }
        gemm(n, dk, n, F::ONE, &self.dm, n, 1, k, dk, F::ONE, gk, dk);
        gemm(n, dk, n, F::ONE, &self.dm, 1, n, k, dk, F::ONE, gk, dk);
    }
}
