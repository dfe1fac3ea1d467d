// The delta rule's forward, in chunks of C steps (64 in bf16, 32 in f32); formulas in mod.rs.
//
// delta_places   (packed only, one block) reads cu_seqlens and lists the chunks of all documents, and where they are cut, the pieces.
// delta_prepare  a block of 4 warps per (chunk, value head), all at once: norms, decay sums, G = K K^T and S = Q K^T over slabs of 64 columns (the next
//                slab is on its way meanwhile), P = scale tril(S D), A = (I + M)^-1, -W = -A (beta e^g K) and U^T = (A beta V)^T. q and k are never
//                normalised as matrices: their norms are factors of rows and columns of the squares. The inverse is f32: diagonal blocks of 16 by
//                substitution, one warp each; then each warp goes down one column of blocks, A_bc = -A_bb sum_k M_bk A_kc, on tensor cores with split f32.
//                Blocks of inv above the diagonal are the warps' scratch, and the slab of K that still lies in its place is the first that W takes.
// delta_scan     the sequential part: a block per (sequence, value head, 16 WARPS columns of the value dimension), which walks the chunks:
//                V'^T = U^T - h^T W^T, O^T = (h^T Q^T) diag(scale e^g) + V'^T P^T, h^T = e^{g_last} h^T + V'^T (e^{g_last - g} K).
//                Everything is transposed, so that the accumulators of one product are the A operand of the next: the state (f32) and V' never leave
//                a warp's registers. A warp owns 16 values of the state, and of more than 64 keys half: two warps then add up their halves of V'^T
//                and O^T, which they trade through shared memory (V'^T in the place of W and Q, which all have read by then). Of O and V' each stores
//                half of the steps. Tiles: W, U, Q for the first half of a chunk (both products with h^T), P, K for the second. While one half is
//                computed, the other's tiles are on their way; W and U, up to 128 keys, a whole chunk ahead, in two buffers. Registers bound the warps of
//                a multiprocessor (128 in bf16 up to 128 keys, two blocks of 8 warps): what a block knows lies in shared memory, and what follows from
//                the lane is computed anew.
//                Where heads are too few to fill the card, a sequence is cut into pieces that are walked side by side (delta_rule_pieces.cu).
//
// d = 128, bf16, per chunk and value head. prepare: G 1.05, S 1.05 (lower blocks only: 0.66 each), W, U 1.05 each (0.66): 2.6 MFLOP; reads q, k, v 48 KB (two
// value heads share q and k in L2), writes W, U 32 KB, P 8 KB, factors 2.3 KB. 56 KB shared: 4 blocks a multiprocessor.
// scan: W h 2.1, Q h 2.1, P V' 0.66, K V' 2.1: 7 MFLOP; reads W, Q, K 48 KB (for each of 2 value blocks), U 16 KB, P 8 KB; writes V' 32 KB, O 16 KB.
// 112 KB shared, of which 16 are what is traded of O: 2 blocks a multiprocessor.
#include "delta_rule.cuh"

// One block of 8 warps. What is wrong with cu_seqlens is told and kept within bounds.
TG_DEVICE i64 bound_at(const DeltaParams& p, u32 i) { return p.cu_wide ? ((const i64*)p.cu)[i] : ((const i32*)p.cu)[i]; }
template <int C> TG_DEVICE void delta_places(const DeltaParams& p) {
    TG_SHARED(u32, carry, [8]);
    u32 base = 0, joint_base = 0;
    // sum of n over the threads before this one, and over all
    auto sum_before = [&](u32 n, u32& total) {
        u32 before = n;
        for (u32 m = 1; m < 32; m <<= 1) {
            u32 x = shuffle_up(before, m);
            if (lane() >= m) before += x;
        }
        sync();
        if (lane() == 31) carry[warp()] = before;
        sync();
        before -= n;
        total = 0;
        for (u32 w = 0; w < threads() / 32; w++) {
            if (w < warp()) before += carry[w];
            total += carry[w];
        }
        return before;
    };
    auto clamped = [&](u32 i) { return (u32)min_of(max_of(bound_at(p, i), 0ll), (i64)p.t); };
    for (u32 d0 = 0; d0 < p.seqs; d0 += threads()) {
        u32 d = d0 + thread(), n = 0;
        if (d < p.seqs) {
            i64 from = bound_at(p, d), to = bound_at(p, d + 1);
            if (from > to || from < 0 || to > (i64)p.t || (d == 0 && from != 0)) p.fault.tell(from);
            if (d + 1 == p.seqs && to != (i64)p.t) p.fault.tell(to);
            u32 a = clamped(d), b = clamped(d + 1);
            n = b > a ? div_up(b - a, C) : 0;
        }
        // falling bounds could ask for more chunks and joints than there is room for
        u32 total, before = sum_before(n, total);
        if (d < p.seqs) p.bases[d] = min_of(base + before, p.chunks);
        base += total;
        if (p.piece_len) {
            before = sum_before(n ? (n - 1) / p.piece_len : 0, total);
            if (d < p.seqs) p.joint_bases[d] = min_of(joint_base + before, p.max_joints);
            joint_base += total;
        }
    }
    if (thread() == 0) {
        p.bases[p.seqs] = min_of(base, p.chunks);
        if (p.piece_len) p.joint_bases[p.seqs] = min_of(joint_base, p.max_joints);
    }
    fence();
    sync();
    for (u32 d = warp(); d < p.seqs; d += threads() / 32) {
        u32 first = p.bases[d], count = p.bases[d + 1] - first, from = clamped(d), to = clamped(d + 1);
        for (u32 i = lane(); i < count; i += 32) {
            p.places[2 * (first + i)] = from + i * C;
            p.places[2 * (first + i) + 1] = min_of(to - from - i * C, (u32)C);
        }
        if (!p.piece_len) continue;
        first = p.joint_bases[d];
        count = p.joint_bases[d + 1] - first;
        for (u32 i = lane(); i <= count; i += 32) {
            p.piece_seqs[first + d + i] = d;
            if (i < count) p.joint_seqs[first + i] = d;
        }
    }
}

// Running sums of log-decay times log2(e), by one warp.
template <int C> TG_DEVICE void decay_sums(const DeltaParams& p, const Place& at, u32 head, float* high, float* low) {
    constexpr int E = C / 32;
    double x[E], sum = 0;
    TG_UNROLL for (int e = 0; e < E; e++) {
        u32 r = lane() * E + e;
        float g = p.log_decay && r < at.len ? p.log_decay[(u64)(at.row + r) * p.hv + head] : 0.f;
        // -inf forgets everything; from -10^4 on a ratio is 0, and a difference of sums stays a number
        sum += (g < -1e4f ? -1e4f : g) * 1.4426950408889634;
        x[e] = sum;
    }
    double before = sum;
    for (u32 m = 1; m < 32; m <<= 1) {
        double y = shuffle_up(before, m);
        if (lane() >= m) before += y;
    }
    before = shuffle_up(before, 1);
    TG_UNROLL for (int e = 0; e < E; e++) {
        double g = lane() ? before + x[e] : x[e];
        high[lane() * E + e] = (float)g;
        low[lane() * E + e] = (float)(g - (float)g);
    }
}

// inv = (I + m)^-1 for a strictly lower m. Blocks above the diagonal are scratch: the last one of each block row belongs to the row's warp.
template <int C> TG_DEVICE void invert(const Tile<float, C, C>& m, const Tile<float, C, C>& inv) {
    constexpr int NB = C / 16;
    int w = warp();
    if (w < NB) {
        int col = lane() & 15, at = 16 * w;
        float a[16];
        TG_UNROLL for (int i = 0; i < 16; i++) {
            float x = i == col ? 1.f : 0.f;
            TG_UNROLL for (int j = 0; j < i; j++) x -= *m.at(at + i, at + j) * a[j];
            a[i] = x;
            *inv.at(at + i, at + col) = x;
        }
    }
    sync();
    if (w >= NB - 1) return;
    float* mine = inv.at(16 * w, C - 16);
    for (int b = w + 1; b < NB; b++) {
        FragC c[2];
        zero(c);
        for (int k = w; k < b; k++) {
            FragA<float> fa;
            load_a(fa, m.data, m.STRIDE, 16 * b, 16 * k);
            step_rows(c, fa, inv.data, inv.STRIDE, 16 * w, 16 * k);
        }
        put_frag(mine, inv.STRIDE, 0, 0, c[0]);
        put_frag(mine, inv.STRIDE, 0, 8, c[1]);
        sync_warp();
        zero(c);
        FragA<float> fa;
        load_a(fa, inv.data, inv.STRIDE, 16 * b, 16 * b);
        step_rows(c, fa, mine, inv.STRIDE, 0, 0);
        TG_UNROLL for (int i = 0; i < 2; i++) {
            TG_UNROLL for (int j = 0; j < 4; j++) c[i].v[j] = -c[i].v[j];
            put_frag(inv.data, inv.STRIDE, 16 * b, 16 * w + 8 * i, c[i]);
        }
        sync_warp();
    }
}

// Shared memory of delta_prepare, in bytes.
template <class T> struct Prepare {
    static constexpr int C = Chunk<T>::N;
    static constexpr int SLABS = Tile<T, C, SLAB>::BYTES, TURNED = Tile<T, SLAB, C>::BYTES, SQUARE = Tile<T, C, C>::BYTES;
    static constexpr int STAGE = SLABS > TURNED ? (SLABS > SQUARE ? SLABS : SQUARE) : (TURNED > SQUARE ? TURNED : SQUARE);
    static constexpr int WIDE = Tile<float, C, C>::BYTES, TWO = SLABS > SQUARE ? SLABS : SQUARE, M = WIDE > 2 * TWO ? WIDE : 2 * TWO;
    // slab; slab or what goes out; the next two slabs, later M and then A's two products; A, and before it the factors that nobody asks for after it
    static constexpr int AT_B = SLABS, AT_M = AT_B + STAGE, AT_INV = AT_M + M, AT_F = AT_INV + WIDE, BYTES = AT_F + (FACTORS - EARLY) * C * 4;
    static_assert(EARLY * C * 4 <= WIDE, "factors fit A");
};

// `BACK`: for the backward, which wants A and M instead of U.
template <class T, bool BACK> TG_DEVICE void delta_prepare(const DeltaParams& p) {
    typedef Prepare<T> S;
    constexpr int C = S::C, NB = C / 16, WC = 4 / NB, NC = C / 8 / WC, NS = SLAB / 8 / WC, THREADS = 128;
    u32 chunk = block_x() / p.hv, head = block_x() % p.hv, key_head = head / (p.hv / p.hk);
    Place at;
    if (!place<C>(p, chunk, at)) return;
    const int me = thread(), row = 16 * (warp() % NB), c_col = warp() / NB * NC * 8, s_col = warp() / NB * NS * 8;
    const T* q = head_rows<T>(p.q, p.q_stride, at, key_head);
    const T* k = head_rows<T>(p.k, p.k_stride, at, key_head);
    const T* v = head_rows<T>(p.v, p.v_stride, at, head);
    const u64 slot = block_x();
    typedef Tile<T, C, SLAB> Slab;
    Slab ta{shared<T>()}, tb{shared<T>(S::AT_B)};
    Tile<T, C, C> square{shared<T>(S::AT_B)}, aw{shared<T>(S::AT_M)}, au{shared<T>(S::AT_M + S::SQUARE)};
    Tile<T, SLAB, C> turned{shared<T>(S::AT_B)};
    Tile<float, C, C> m{shared<float>(S::AT_M)}, inv{shared<float>(S::AT_INV)};
    auto factor = [&](int which) { return which < EARLY ? shared<float>(S::AT_INV) + which * C : shared<float>(S::AT_F) + (which - EARLY) * C; };
    if (warp() == 0) decay_sums<C>(p, at, head, factor(G_HIGH), factor(G_LOW));

    // G, S, |q|^2; |k|^2 is G's diagonal
    FragC g[NC], s[NC];
    zero(g);
    zero(s);
    constexpr int PER_ROW = THREADS / C, PART = SLAB / PER_ROW;
    float qq = 0.f;
    // slabs lie in two places by turns, so that the next one is on its way
    auto fetch = [&](u32 d) {
        if (d < p.dk) {
            const bool odd = d / SLAB % 2;
            bring<THREADS>(odd ? Slab{shared<T>(S::AT_M)} : ta, k + d, p.k_stride[1], at.len, p.dk - d);
            bring<THREADS>(odd ? Slab{shared<T>(S::AT_M + S::TWO)} : tb, q + d, p.q_stride[1], at.len, p.dk - d);
        }
        copy_commit();
    };
    fetch(0);
    for (u32 d = 0; d < p.dk; d += SLAB) {
        if (d) sync(); // the slab before the last one has been read
        fetch(d + SLAB);
        copy_wait<1>();
        sync();
        const bool odd = d / SLAB % 2;
        const Slab ks = odd ? Slab{shared<T>(S::AT_M)} : ta, qs = odd ? Slab{shared<T>(S::AT_M + S::TWO)} : tb;
        TG_UNROLL for (int i = 0; i < PART; i += Vec<T>::N) {
            float x[Vec<T>::N];
            load16(x, (const T*)qs.at(me / PER_ROW, me % PER_ROW * PART + i));
            TG_UNROLL for (int j = 0; j < Vec<T>::N; j++) qq += x[j] * x[j];
        }
        TG_UNROLL for (int i = 0; i < SLAB; i += 16) {
            FragA<T> fk, fq;
            load_a(fk, ks.data, ks.STRIDE, row, i);
            load_a(fq, qs.data, qs.STRIDE, row, i);
            TG_UNROLL for (int j = 0; j < NC; j += 2) {
                if (c_col + 8 * j > row) continue;
                FragB<T> fb[2];
                load_b2(fb, ks.data, ks.STRIDE, c_col + 8 * j, i);
                mma(g[j], fk, fb[0]);
                mma(g[j + 1], fk, fb[1]);
                mma(s[j], fq, fb[0]);
                mma(s[j + 1], fq, fb[1]);
            }
        }
    }
    TG_UNROLL for (int i = 1; i < PER_ROW; i <<= 1) qq += shuffle_xor(qq, i);
    if (me % PER_ROW == 0) factor(R_Q)[me / PER_ROW] = qq;
    TG_UNROLL for (int j = 0; j < NC; j++)
        TG_UNROLL for (int e = 0; e < 4; e++)
            if (row + frag_row(e) == c_col + 8 * j + frag_col(e)) factor(R_K)[row + frag_row(e)] = g[j].v[e];
    sync();
    if (me < C) {
        float rq = p.l2 ? 1.f / sqrtf(factor(R_Q)[me] + 1e-6f) : 1.f, rk = p.l2 ? 1.f / sqrtf(factor(R_K)[me] + 1e-6f) : 1.f;
        float beta = (u32)me < at.len ? beta_at<T>(p, (u64)(at.row + me) * p.hv + head) : 0.f;
        float eg = fast_exp2(factor(G_HIGH)[me] + factor(G_LOW)[me]);
        factor(TO_Q)[me] = p.scale * eg * rq;
        factor(TO_LAST)[me] = ratio(factor(G_HIGH), factor(G_LOW), C - 1, me) * rk;
        factor(TO_W)[me] = beta * eg * rk;
        factor(R_Q)[me] = rq;
        factor(R_K)[me] = rk;
        factor(BETA)[me] = beta;
        factor(E_G)[me] = eg;
    }
    sync();
    TG_UNROLL for (int i = 0; i < FACTORS; i++)
        if (me < C) p.factors[(slot * FACTORS + i) * C + me] = factor(i)[me];
    float high[2], low[2], to_s[2], to_g[2];
    TG_UNROLL for (int i = 0; i < 2; i++) {
        int r = row + frag_row(2 * i);
        high[i] = factor(G_HIGH)[r];
        low[i] = factor(G_LOW)[r];
        to_s[i] = p.scale * factor(R_Q)[r];
        to_g[i] = factor(R_K)[r];
    }
    TG_UNROLL for (int j = 0; j < NC; j++) {
        if (c_col + 8 * j > row + 8) { // above the diagonal
            s[j].zero();
            g[j].zero();
            continue;
        }
        int c0 = c_col + 8 * j + frag_col(0);
        float h[2], l[2], rk[2];
        load_pair((const float*)factor(G_HIGH) + c0, h[0], h[1]);
        load_pair((const float*)factor(G_LOW) + c0, l[0], l[1]);
        load_pair((const float*)factor(R_K) + c0, rk[0], rk[1]);
        TG_UNROLL for (int e = 0; e < 4; e++) {
            int r = row + frag_row(e), c = c0 + (e & 1);
            float d = fast_exp2((high[e / 2] - h[e & 1]) + (low[e / 2] - l[e & 1])) * rk[e & 1];
            s[j].v[e] = c <= r ? to_s[e / 2] * d * s[j].v[e] : 0.f;
            g[j].v[e] = c < r ? to_g[e / 2] * d * g[j].v[e] : 0.f;
        }
    }
    // square lies where q's slab was, which all have read
    auto put_square = [&](void* to) {
        sync();
        put_tile<THREADS>((T*)to + slot * C * C, C, square, C, C);
        sync();
    };
    TG_UNROLL for (int j = 0; j < NC; j++) put_frag(square.data, square.STRIDE, row, c_col + 8 * j, s[j]);
    put_square(p.p);
    if (p.erase) {
        if (BACK) {
            TG_UNROLL for (int j = 0; j < NC; j++) put_frag(square.data, square.STRIDE, row, c_col + 8 * j, g[j]);
            put_square(p.m);
        }
        TG_UNROLL for (int j = 0; j < NC; j++) {
            TG_UNROLL for (int e = 0; e < 4; e++) g[j].v[e] *= factor(BETA)[row + frag_row(e)];
            put_frag(m.data, m.STRIDE, row, c_col + 8 * j, g[j]);
        }
        sync();
        invert<C>(m, inv);
        sync();
    }
    // A with its columns scaled, in M's place: a thread has a vector of columns
    constexpr int N = Vec<T>::N, PER = C / N, STEP = THREADS / PER;
    static_assert(THREADS % PER == 0 && C % STEP == 0, "threads share the square out evenly");
    {
        const int c = me % PER * N;
        float to_w[N], to_u[N];
        TG_UNROLL for (int e = 0; e < N; e++) {
            to_w[e] = -factor(TO_W)[c + e];
            to_u[e] = factor(BETA)[c + e];
        }
        _Pragma("unroll 1") for (int r = me / PER; r < C; r += STEP) {
            float x[N], y[N];
            TG_UNROLL for (int e = 0; e < N; e++) x[e] = c + e == r;
            if (p.erase && c <= r) {
                TG_UNROLL for (int e = 0; e < N; e += 4) {
                    float part[4];
                    load16(part, (const float*)inv.at(r, c + e));
                    TG_UNROLL for (int i = 0; i < 4; i++) x[e + i] = c + e + i <= r ? part[i] : 0.f;
                }
            }
            TG_UNROLL for (int e = 0; e < N; e++) y[e] = x[e] * to_w[e];
            store16(aw.at(r, c), y);
            TG_UNROLL for (int e = 0; e < N; e++) y[e] = x[e] * to_u[e];
            store16(au.at(r, c), y);
            if (BACK && p.erase) store16(square.at(r, c), x);
        }
    }
    if (BACK && p.erase) put_square(p.a);
    auto fetch_v = [&](u32 d) {
        bring<THREADS>(ta, v + d, p.v_stride[1], at.len, p.dv - d);
        copy_commit();
    };
    sync();
    if (p.erase) {
        const u32 wide = whole_slabs(p.dk), slabs = wide / SLAB, kept = (slabs - 1) / 2 * 2; // the slab of K that still lies in its place comes first
        auto slab = [&](u32 x) { return (kept + x) % slabs * SLAB; };
        for (u32 x = 0; x < slabs; x++) {
            const u32 d = slab(x);
            copy_wait<0>();
            sync();
            FragC c[NS];
            zero(c);
            TG_UNROLL for (int i = 0; i < C; i += 16) {
                if (i > row) continue;
                FragA<T> fa;
                load_a(fa, aw.data, aw.STRIDE, row, i);
                step_rows(c, fa, ta.data, ta.STRIDE, s_col, i);
            }
            TG_UNROLL for (int j = 0; j < NS; j++) put_frag(tb.data, tb.STRIDE, row, s_col + 8 * j, c[j]);
            sync();
            if (x + 1 < slabs) {
                bring<THREADS>(ta, k + slab(x + 1), p.k_stride[1], at.len, p.dk - slab(x + 1));
                copy_commit();
            } else if (!BACK) {
                fetch_v(0);
            }
            put_tile<THREADS>((T*)p.w + slot * C * wide + d, wide, tb, C, SLAB);
        }
    } else if (!BACK) {
        fetch_v(0);
    }
    if (BACK && p.erase) return;
    const u32 wide = whole_slabs(p.dv);
    for (u32 d = 0; d < p.dv; d += SLAB) {
        if (BACK) { // V' = beta V, as the forward keeps it where there is erasure
            for (u32 i = me; i < at.len * SLAB; i += THREADS) {
                u32 r = i / SLAB, c = d + i % SLAB;
                if (c < p.dv) p.v_new[((u64)(at.row + r) * p.hv + head) * p.dv + c] = factor(BETA)[r] * load(v[r * p.v_stride[1] + c]);
            }
            continue;
        }
        copy_wait<0>();
        sync();
        FragC c[C / 8];
        zero(c);
        TG_UNROLL for (int i = 0; i < C; i += 16) {
            FragA<T> fa;
            load_a_trans(fa, ta.data, ta.STRIDE, 16 * warp(), i);
            step_columns(c, fa, au.data, au.STRIDE, 0, i, i);
        }
        TG_UNROLL for (int j = 0; j < C / 8; j++) put_frag(turned.data, turned.STRIDE, 16 * warp(), 8 * j, c[j]);
        sync();
        if (d + SLAB < p.dv) fetch_v(d + SLAB);
        put_tile<THREADS>((T*)p.u + (slot * wide + d) * C, C, turned, SLAB, C);
    }
}

// SUM: only what a piece does to the state, for all that end at a joint. Beside the state that it makes of nothing (the first piece: of the initial state),
// blocks of their own take the rows of the unit matrix through it, with which nothing is written: the map of the state before it.
template <class T, int DK, int WARPS, bool SUM> TG_DEVICE void delta_scan(const DeltaParams& p) {
    constexpr int C = Chunk<T>::N, NC = C / 8, KEYS = DK / key_parts(DK), NK = KEYS / 8, VALUES = 16 * WARPS, THREADS = 32 * WARPS * key_parts(DK);
    constexpr bool HALVES = key_parts(DK) == 2;
    constexpr int NO = SUM ? 0 : HALVES ? NC / 2 : NC; // of O, each half of the keys ends up with half of the steps
    typedef Tile<T, C, DK> Wide;
    typedef Tile<T, C, C> Square;
    typedef Tile<T, VALUES, C> Turned;
    const u32 own = div_up(p.dv, VALUES), parts = own + (SUM && p.erase ? DK / VALUES : 0);
    const bool unit = SUM && block_x() % parts >= own;
    // what the whole block knows is in shared memory, as registers are few
    struct Block { Piece piece; u32 head, key_head, part; };
    TG_SHARED(Block, said, [1]);
    const Piece& piece = said[0].piece;
    const u32 &head = said[0].head, &key_head = said[0].key_head, &part = said[0].part;
    {
        Block mine;
        if (!piece_of<SUM, false>(p, block_x() / parts / p.hv, mine.piece) || (unit && mine.piece.index == 0)) return;
        mine.head = block_x() / parts % p.hv;
        mine.key_head = mine.head / (p.hv / p.hk);
        mine.part = block_x() % parts;
        if (thread() == 0) said[0] = mine;
        sync();
    }
    const u32 wide_v = whole_slabs(p.dv);
    // a warp's values and keys, said anew where they are asked for
    auto value_of = [&](u32 warp) { return (unit ? part - own : part) * VALUES + 16 * (warp % WARPS); };
    auto key_of = [&](u32 warp) { return warp / WARPS * KEYS; };
    // W, Q and, with two stages, the other W (what is traded of V' takes the place of the W that has been read and of Q); K, P, U, factors, what is traded of
    // O. Where it only sums up, all that it reads has two stages.
    constexpr int STAGES = DK <= 128 ? 2 : 1, K_STAGES = SUM ? STAGES : 1;
    constexpr int READ = STAGES == 2 ? 3 * Wide::BYTES : (SUM ? 1 : 2) * Wide::BYTES, TRADED = HALVES ? 2 * WARPS * NC * FRAG_FLOATS * 4 : 0;
    static_assert(STAGES == 1 || TRADED <= 2 * Wide::BYTES, "what is traded fits a W and Q");
    constexpr int AT_K = TRADED > READ ? TRADED : READ, AT_P = AT_K + K_STAGES * Wide::BYTES;
    constexpr int AT_U = AT_P + (SUM ? 0 : Square::BYTES), AT_F = AT_U + STAGES * Turned::BYTES, AT_O = AT_F + K_STAGES * 3 * C * 4;
    auto w_of = [&](u32 i) { return Wide{shared<T>(i % STAGES * 2 * Wide::BYTES)}; };
    auto u_of = [&](u32 i) { return Turned{shared<T>(AT_U + i % STAGES * Turned::BYTES)}; };
    auto k_of = [&](u32 i) { return Wide{shared<T>(AT_K + i % K_STAGES * Wide::BYTES)}; };
    auto factors_of = [&](u32 i) { return shared<float>(AT_F + i % K_STAGES * 3 * C * 4); };
    auto traded_of = [&](u32 i) { return shared<float>(i % STAGES * Wide::BYTES); };
    const Wide q{shared<T>(Wide::BYTES)};
    const Square pt{shared<T>(AT_P)};
    float* to_q = shared<float>(AT_F);

    FragC h[NK];
    float kept = 1.f;
    if (unit) {
        load_unit(h, key_of(warp()), value_of(warp()));
    } else {
        const float* from = piece.index ? (SUM ? nullptr : state_at(p, p.joints, piece.joint - 1, head)) : p.h0 ? state_at(p, p.h0, piece.seq, head) : nullptr;
        load_state(h, from, p.dk, p.dv, key_of(warp()), value_of(warp()));
    }
    auto slot = [&](u32 i) { return (u64)(piece.first + anew(i)) * p.hv + head; };
    auto copy_floats = [&](float* to, u64 slot, int which) {
        const u32 me = thread_anew();
        if (me < C / 4) copy16_async(to + 4 * me, p.factors + (slot * FACTORS + which) * C + 4 * me);
    };
    // what the first half of a chunk reads, and what the second does
    auto load_w = [&](u32 i) {
        if (i >= piece.count) return;
        if (p.erase) bring_whole<THREADS>(w_of(i), (const T*)p.w + slot(i) * C * DK, DK);
        if (!unit) bring_whole<THREADS>(u_of(i), (const T*)p.u + (slot(i) * wide_v + part * VALUES) * C, C);
    };
    auto load_q = [&](u32 i) {
        if (SUM || i >= piece.count) return;
        const Place at = place_in<C>(p, piece, i);
        bring<THREADS>(q, head_rows<T>(p.q, p.q_stride, at, key_head), p.q_stride[1], at.len, p.dk);
        copy_floats(to_q, slot(i), TO_Q);
    };
    auto load_k = [&](u32 i) {
        if (K_STAGES == 2 && i >= piece.count) return;
        const Place at = place_in<C>(p, piece, i);
        bring<THREADS>(k_of(i), head_rows<T>(p.k, p.k_stride, at, key_head), p.k_stride[1], at.len, p.dk);
        if (!SUM) bring_whole<THREADS>(pt, (const T*)p.p + slot(i) * C * C, C);
        copy_floats(factors_of(i) + C, slot(i), TO_LAST);
        copy_floats(factors_of(i) + 2 * C, slot(i), E_G);
    };
    load_w(0);
    load_q(0);
    if (K_STAGES == 2) load_k(0);
    copy_commit();
    for (u32 i = 0; i < piece.count; i++) {
        copy_wait<0>();
        sync();
        load_k(i + K_STAGES - 1);
        copy_commit();
        if (STAGES == 2) load_w(i + 1);
        copy_commit();
        FragC v[NC], o[NO ? NO : 1];
        const u32 l = anew(lane()), me = anew(warp()), other = (me + WARPS) % (2 * WARPS), value = value_of(me), row = 16 * (me % WARPS);
        const Turned u = u_of(anew(i));
        auto read_state = [&](FragC (&c)[NC], u32 byte) {
            const OfB<T, Wide::STRIDE> columns(shared<T>(byte) + key_of(me), l);
            TG_UNROLL for (int j = 0; j < NK; j += 2) {
                FragA<T> fa;
                to_a(fa, h[j], h[j + 1]);
                step(c, fa, columns, 0, 0, 8 * j);
            }
        };
        const bool half = me / WARPS;
        const int o_col = HALVES ? half * (C / 2) : 0; // of O's steps, a warp ends up with all or its half
        const i64 across = (i64)p.hv * p.dv;
        auto out = [&](const Place& at) { return ((u64)at.row * p.hv + head) * p.dv + value; };
        if (!SUM) {
            zero(v);
            read_state(v, Wide::BYTES);
            TG_UNROLL for (int j = 0; j < NO; j++) { // by element: a choice between fragments would put them into memory
                FragC c;
                TG_UNROLL for (int e = 0; e < 4; e++) {
                    o[j].v[e] = HALVES && half ? v[NC - NO + j].v[e] : v[j].v[e];
                    c.v[e] = half ? v[j].v[e] : v[NC - NO + j].v[e];
                }
                if (HALVES) give(shared<float>(AT_O) + (me * NO + j) * FRAG_FLOATS, c);
            }
        }
        TG_UNROLL for (int j = 0; j < NC; j++) {
            const T* from = u.at(row + (l >> 2), 8 * j + 2 * (l & 3));
            v[j].zero();
            if (unit || half) continue;
            load_pair(from, v[j].v[0], v[j].v[1]);
            load_pair(from + 8 * u.STRIDE, v[j].v[2], v[j].v[3]);
        }
        if (p.erase) read_state(v, anew(i) % STAGES * 2 * Wide::BYTES);
        if (HALVES) {
            sync(); // W and Q have been read: what is traded goes there
            float* traded = traded_of(anew(i));
            TG_UNROLL for (int j = 0; j < NC; j++) give(traded + (me * NC + j) * FRAG_FLOATS, v[j]);
            sync();
            TG_UNROLL for (int j = 0; j < NC; j++) take(traded + (other * NC + j) * FRAG_FLOATS, v[j]);
            TG_UNROLL for (int j = 0; j < NO; j++) take(shared<float>(AT_O) + (other * NO + j) * FRAG_FLOATS, o[j]);
        }
        if (!SUM && p.erase) {
            const Place at = place_in<C>(p, piece, i);
            store_transposed<NO>(p.v_new + out(at) + o_col * across, across, (int)at.len - o_col, (int)(p.dv - value), [&](int j) {
                FragC c;
                TG_UNROLL for (int e = 0; e < 4; e++) c.v[e] = HALVES && half ? v[NC - NO + j].v[e] : v[j].v[e];
                return c;
            });
        }
        TG_UNROLL for (int j = 0; j < NO; j++) {
            float f[2];
            load_pair((const float*)to_q + o_col + 8 * j + 2 * (l & 3), f[0], f[1]);
            TG_UNROLL for (int e = 0; e < 4; e++) o[j].v[e] *= f[e & 1];
        }
        if (K_STAGES == 1) {
            copy_wait<1>();
            sync();
            if (STAGES == 1) load_w(i + 1);
            load_q(i + 1);
            copy_commit();
        }
        const OfB<T, Square::STRIDE> square(shared<T>(AT_P) + o_col * Square::STRIDE, l);
        TG_UNROLL for (int j = 0; j < (SUM ? 0 : NC); j += 2) { // P's column reaches rows from its own
            FragA<T> fa;
            to_a(fa, v[j], v[j + 1]);
            TG_UNROLL for (int i = 0; i < NO; i += 2) {
                if (o_col + 8 * i < 8 * j) continue;
                FragB<T> f[2];
                square.load(f, 0, 8 * i, 8 * j);
                mma(o[i], fa, f[0]);
                mma(o[i + 1], fa, f[1]);
            }
        }
        if (!SUM) {
            const Place at = place_in<C>(p, piece, i);
            store_transposed<NO>((T*)p.o + out(at) + o_col * across, across, (int)at.len - o_col, (int)(p.dv - value), [&](int j) { return o[j]; });
        }
        const OfBTrans<T, Wide::STRIDE> rows(k_of(anew(i)).data + key_of(me), l);
        const float *to_last = factors_of(anew(i)) + C, *e_g = to_last + C;
        float keep = e_g[C - 1];
        kept *= keep;
        TG_UNROLL for (int j = 0; j < NK; j++)
            TG_UNROLL for (int e = 0; e < 4; e++) h[j].v[e] *= keep;
        TG_UNROLL for (int j = 0; j < NC; j += 2) {
            TG_UNROLL for (int i = j; i < j + 2; i++) {
                float f[2];
                load_pair((const float*)to_last + 8 * i + 2 * (l & 3), f[0], f[1]);
                TG_UNROLL for (int e = 0; e < 4; e++) v[i].v[e] *= f[e & 1];
            }
            FragA<T> fa;
            to_a(fa, v[j], v[j + 1]);
            step(h, fa, rows, 0, 0, 8 * j);
        }
    }
    copy_wait<0>();
    const u32 me = anew(warp()), key = key_of(me), value = value_of(me);
    if (unit) {
        store_state(h, map_at(p, piece.joint, head), DK, DK, key, value);
    } else if (SUM) {
        store_state(h, state_at(p, p.joints, piece.joint, head), p.dk, p.dv, key, value);
        if (part == 0 && thread() == 0) p.decays[(u64)piece.joint * p.hv + head] = kept;
    } else if (piece.index + 1 == piece.of) {
        store_state(h, state_at(p, p.last, piece.seq, head), p.dk, p.dv, key, value);
    }
}
