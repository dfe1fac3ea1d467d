// The delta rule's backward, in the same chunks of C steps as the forward (delta_rule.cu), from the inputs and V' (f32).
//
// delta_prepare<BACK>     (in delta_rule.cu) again gives the factors, P, A, M / beta and W.
// delta_states            sequential: h^T += V'^T K as in the forward's scan, with V' at hand; keeps the state before each chunk, in T.
// delta_scan_back         sequential, from the last chunk to the first, the gradient of the state (transposed, f32) in registers, 16 values a warp:
//                         dV'^T = (dh^T K^T) diag(e^{g_last - g}) + dO^T P;  dh^T = e^{g_last} dh^T + (dO^T diag(scale e^g)) Q - dV'^T W.
//                         Keeps dV'^T and the gradient of the state after each chunk, in T. Warps have values and keys as in the forward's scan, and two
//                         with the same values trade their halves of dV'^T; W is kept negated. K, P and dO are brought a whole chunk ahead (up to 128 keys).
// delta_grad_squares      a block per (chunk, value head): over slabs of the value dimension, dR = A^T dV', dV = beta dR, the squares dO V'^T and
//                         dM = -dR V'^T (warps own 16 rows), then what they give to g and beta, and the squares that dq and dk need. The next slab's
//                         dO, V and dV' are on their way meanwhile; in delta_grad_rows, its h and dh.
// delta_grad_rows         a block per (chunk, value head): over slabs of the key dimension, with the norms folded into factors,
//                         r_q dq = X k + scale e^g r_q (dO h^T),  r_k dk = X^T q + (Z + Z^T) k + e^{g_last - g} r_k (V' dh^T) - beta e^g r_k (dR h^T),
//                         where X_ij = r_i r_j scale D_ij (dO V'^T)_ij and Z_ij = r_i r_j beta_i D_ij dM_ij; the rest of the gradients of g and beta.
// delta_grad_finish       a group of lanes per (step, key head): sums over the value heads of a key head, and through the norm: dx = y - r^2 x (x . y).
//
// g's gradient through D is row sums minus column sums below the diagonal; what cancels is never added. Orders of all sums follow from shapes.
//
// d = 128, bf16, per chunk and value head: prepare 2.6 MFLOP less U; states 2.1; scan_back 2.1 + 0.66 + 2.1 + 2.1; squares 3 × 0.66; rows 3 × 2.1 + 4 × 1.05
// (two triangular): about 21 MFLOP. Reads and writes: h and dh 32 KB each, twice; V' 32 KB twice; W, dR, dV', y 16 KB each, twice; squares 40 KB twice;
// q, k, v, dO and gradients 130 KB: 0.5 MB. Shared memory: states 71 KB (two stages), scan_back 112 KB, squares 85 KB, rows 103 KB: two blocks of 8 warps a
// multiprocessor each, by registers as well.
#include "delta_rule.cuh"

// SUM: only the state that a piece makes of nothing (the first: of the initial state), for all that end at a joint; V' is given, so that the state before it
// only decays through it.
template <class T, int DK, int WARPS, bool SUM> TG_DEVICE void delta_states(const DeltaParams& p) {
    constexpr int C = Chunk<T>::N, KEYS = DK / key_parts(DK), NK = KEYS / 8, VALUES = 16 * WARPS, THREADS = 32 * WARPS * key_parts(DK);
    typedef Tile<T, C, DK> Wide;
    typedef Tile<float, C, VALUES> Values;
    constexpr int STAGE = Wide::BYTES + Values::BYTES + 2 * C * 4;
    const u32 parts = whole_slabs(p.dv) / VALUES, part = block_x() % parts, head = block_x() / parts % p.hv;
    const u32 key_head = head / (p.hv / p.hk), wide_v = whole_slabs(p.dv), value = part * VALUES + 16 * (warp() % WARPS);
    const int me = thread(), half = warp() / WARPS, key = half * KEYS, row = 16 * (warp() % WARPS);
    Piece piece;
    if (!piece_of<SUM, false>(p, block_x() / parts / p.hv, piece)) return;
    const u32 first = piece.first, count = piece.count, steps = SUM || !count ? count : count - 1; // nobody asks for the state after the last chunk
    FragC h[NK];
    float kept = 1.f;
    const float* from = piece.index ? (SUM ? nullptr : state_at(p, p.joints, piece.joint - 1, head)) : p.h0 ? state_at(p, p.h0, piece.seq, head) : nullptr;
    load_state(h, from, p.dk, p.dv, key, value);
    const OfBTrans<T, Wide::STRIDE> rows(shared<T>() + key, lane());
    auto fetch = [&](u32 i) {
        if (i < steps) {
            const Place at = place_in<C>(p, piece, i);
            u32 stage = i % 2 * STAGE;
            Wide k{shared<T>(stage)};
            Values v{shared<float>(stage + Wide::BYTES)};
            float* f = shared<float>(stage + Wide::BYTES + Values::BYTES);
            u64 slot = (u64)(first + i) * p.hv + head;
            bring<THREADS>(k, head_rows<T>(p.k, p.k_stride, at, key_head), p.k_stride[1], at.len, p.dk);
            bring<THREADS>(v, p.v_new + ((u64)at.row * p.hv + head) * p.dv + part * VALUES, (i64)p.hv * p.dv, at.len, p.dv - part * VALUES);
            if (me < C / 2) copy16_async(f + 4 * me, p.factors + (slot * FACTORS + (me < C / 4 ? TO_LAST : E_G)) * C + 4 * (me % (C / 4)));
        }
        copy_commit();
    };
    fetch(0);
    for (u32 i = 0; i < count; i++) {
        fetch(i + 1);
        copy_wait<1>();
        sync();
        T* to = (T*)p.states + (((u64)(first + i) * p.hv + head) * wide_v + value) * DK;
        if (!SUM) put_frags(to + key, DK, h);
        if (i < steps && part * VALUES < p.dv) {
            u32 stage = i % 2 * STAGE;
            Values v{shared<float>(stage + Wide::BYTES)};
            float* f = shared<float>(stage + Wide::BYTES + Values::BYTES);
            float keep = f[2 * C - 1];
            kept *= keep;
            TG_UNROLL for (int j = 0; j < NK; j++)
                TG_UNROLL for (int e = 0; e < 4; e++) h[j].v[e] *= keep;
            _Pragma("unroll 1") for (int j = 0; j < C; j += 16) {
                FragA<T> fa;
                load_a_trans_scaled(fa, v.data, v.STRIDE, row, j, f);
                step(h, fa, rows, stage, 0, j);
            }
        }
        sync();
    }
    copy_wait<0>();
    if (SUM) {
        store_state(h, state_at(p, p.joints, piece.joint, head), p.dk, p.dv, key, value);
        if (part == 0 && me == 0) p.decays[(u64)piece.joint * p.hv + head] = kept;
    }
}

// SUM: as in the forward's scan, from the end.
template <class T, int DK, int WARPS, bool SUM> TG_DEVICE void delta_scan_back(const DeltaParams& p) {
    constexpr int C = Chunk<T>::N, NC = C / 8, KEYS = DK / key_parts(DK), NK = KEYS / 8, VALUES = 16 * WARPS, THREADS = 32 * WARPS * key_parts(DK);
    typedef Tile<T, C, DK> Wide;
    typedef Tile<T, C, C> Square;
    typedef Tile<T, C, VALUES> Values;
    const u32 own = whole_slabs(p.dv) / VALUES, parts = own + (SUM && p.erase ? DK / VALUES : 0), part = block_x() % parts, head = block_x() / parts % p.hv;
    const bool unit = SUM && part >= own;
    const u32 key_head = head / (p.hv / p.hk), wide_v = whole_slabs(p.dv), value = (unit ? part - own : part) * VALUES + 16 * (warp() % WARPS);
    const int me = thread(), half = warp() / WARPS, key = half * KEYS, row = 16 * (warp() % WARPS);
    const bool live = unit || part * VALUES < p.dv, wants_new = !SUM || p.erase;
    Piece piece;
    if (!piece_of<SUM, true>(p, block_x() / parts / p.hv, piece)) return;
    const u32 first = piece.first, count = piece.count;
    const bool outermost = piece.index + 1 == piece.of;
    if (unit && outermost) return;
    constexpr bool HALVES = key_parts(DK) == 2;
    // K and P (up to 128 keys of two chunks; what is traded takes the place of those that have been read, and a gap), Q, W; dO and the factors are read by
    // both products, so there are two of each
    constexpr int STAGES = DK <= 128 ? 2 : 1;
    constexpr int READ = Wide::BYTES + Square::BYTES, TRADED = HALVES ? 2 * WARPS * NC * FRAG_FLOATS * 4 : 0, ROOM = TRADED > READ ? TRADED : READ;
    constexpr int AT_Q = (STAGES - 1) * READ + ROOM, AT_O = AT_Q + 2 * Wide::BYTES, STAGE = Values::BYTES + 3 * C * 4;
    Wide q{shared<T>(AT_Q)}, w{shared<T>(AT_Q + Wide::BYTES)};
    const OfBTrans<T, Wide::STRIDE> rows(shared<T>() + key, lane());
    auto k_of = [&](u32 i) { return Wide{shared<T>(i % STAGES * ROOM)}; };
    auto p_of = [&](u32 i) { return Square{shared<T>(i % STAGES * ROOM + Wide::BYTES)}; };
    auto traded_of = [&](u32 i) { return shared<float>(i % STAGES * READ); };
    auto d_o_of = [&](u32 i) { return Values{shared<T>(AT_O + i % 2 * STAGE)}; };
    auto factors_of = [&](u32 i) { return shared<float>(AT_O + i % 2 * STAGE + Values::BYTES); };
    FragC h[NK];
    if (unit) {
        load_unit(h, key, value);
    } else {
        const float* from = outermost ? (p.d_last ? state_at(p, p.d_last, piece.seq, head) : nullptr) : SUM ? nullptr : state_at(p, p.joints, piece.joint, head);
        load_state(h, from, p.dk, p.dv, key, value);
    }
    auto slot = [&](u32 i) { return (u64)(first + anew(i)) * p.hv + head; };
    auto copy_floats = [&](float* to, u64 slot, int which) {
        const u32 me = thread_anew();
        if (me < C / 4) copy16_async(to + 4 * me, p.factors + (slot * FACTORS + which) * C + 4 * me);
    };
    auto load_0 = [&](u32 i) {
        const Place at = place_in<C>(p, piece, i);
        if (wants_new) bring<THREADS>(k_of(i), head_rows<T>(p.k, p.k_stride, at, key_head), p.k_stride[1], at.len, p.dk);
        if (wants_new && !unit) bring_whole<THREADS>(p_of(i), (const T*)p.p + slot(i) * C * C, C);
        if (!unit) bring<THREADS>(d_o_of(i), (const T*)p.d_o + ((u64)at.row * p.hv + head) * p.dv + part * VALUES, (i64)p.hv * p.dv, at.len, p.dv - part * VALUES);
        copy_floats(factors_of(i), slot(i), TO_Q);
        copy_floats(factors_of(i) + C, slot(i), TO_LAST);
        copy_floats(factors_of(i) + 2 * C, slot(i), E_G);
    };
    auto load_1 = [&](u32 i) {
        const Place at = place_in<C>(p, piece, i);
        if (!unit) bring<THREADS>(q, head_rows<T>(p.q, p.q_stride, at, key_head), p.q_stride[1], at.len, p.dk);
        if (p.erase) bring_whole<THREADS>(w, (const T*)p.w + slot(i) * C * DK, DK);
    };
    if (count) load_0(count - 1);
    copy_commit();
    for (u32 i = count; i-- > 0;) {
        copy_wait<0>();
        sync();
        load_1(i);
        copy_commit();
        if (STAGES == 2 && i) load_0(i - 1);
        copy_commit();
        const Values d_o = d_o_of(i);
        const float *to_q = factors_of(i), *to_last = to_q + C, *e_g = to_last + C;
        FragC v[NC];
        T* after = (T*)p.d_states + (slot(i) * wide_v + value) * DK;
        if (!SUM) put_frags(after + key, DK, h);
        zero(v);
        if (live && wants_new) {
            const OfB<T, Wide::STRIDE> columns(k_of(i).data + key, lane());
            TG_UNROLL for (int j = 0; j < NK; j += 2) {
                FragA<T> fa;
                to_a(fa, h[j], h[j + 1]);
                step(v, fa, columns, 0, 0, 8 * j);
            }
            TG_UNROLL for (int j = 0; j < NC; j++) {
                float f[2];
                load_pair(to_last + 8 * j + frag_col(0), f[0], f[1]);
                TG_UNROLL for (int e = 0; e < 4; e++) v[j].v[e] *= f[e & 1];
            }
            const Square pt = p_of(i);
            // P's row j reaches columns up to j; halves of the keys take turns
            _Pragma("unroll 1") for (int j = unit ? C : 16 * half; j < C; j += HALVES ? 32 : 16) {
                FragA<T> fa;
                load_a_trans(fa, d_o.data, d_o.STRIDE, row, j);
                step_rows(v, fa, pt.data, pt.STRIDE, 0, j, 0, j + 16);
            }
        }
        if (HALVES && wants_new) {
            sync(); // K and P have been read: what is traded goes there
            const u32 mine = anew(warp()), other = (mine + WARPS) % (2 * WARPS);
            float* traded = traded_of(anew(i));
            TG_UNROLL for (int j = 0; j < NC; j++) give(traded + (mine * NC + j) * FRAG_FLOATS, v[j]);
            sync();
            TG_UNROLL for (int j = 0; j < NC; j++) take(traded + (other * NC + j) * FRAG_FLOATS, v[j]);
        }
        T* d_new = (T*)p.d_new + (slot(i) * wide_v + value) * C;
        if (!SUM && (!HALVES || half == 0)) put_frags(d_new, C, v);
        copy_wait<1>();
        sync();
        if (STAGES == 1 && i) load_0(i - 1);
        copy_commit();
        if (live) {
            TG_UNROLL for (int j = 0; j < NK; j++)
                TG_UNROLL for (int e = 0; e < 4; e++) h[j].v[e] *= e_g[C - 1];
            _Pragma("unroll 1") for (int j = unit ? C : 0; j < C; j += 16) {
                FragA<T> fa;
                load_a_trans_scaled(fa, d_o.data, d_o.STRIDE, row, j, to_q);
                step(h, fa, rows, AT_Q, 0, j);
            }
            if (p.erase) {
                TG_UNROLL for (int j = 0; j < NC; j += 2) {
                    FragA<T> fa;
                    to_a(fa, v[j], v[j + 1]);
                    step(h, fa, rows, AT_Q + Wide::BYTES, 0, 8 * j);
                }
            }
        }
    }
    copy_wait<0>();
    piece_of<SUM, true>(p, anew(block_x()) / parts / p.hv, piece); // again, as its registers were of use meanwhile
    if (unit) store_state(h, map_at(p, piece.joint - 1, head), DK, DK, key, value);
    else if (SUM) store_state(h, state_at(p, p.joints, piece.joint - 1, head), p.dk, p.dv, key, value);
    else if (p.d_h0 && piece.index == 0) store_state(h, state_at(p, p.d_h0, piece.seq, head), p.dk, p.dv, key, value);
}

// Sums of each row over the four lanes that share it, into sums[row] of this group of columns; and of each column over the eight lanes.
TG_DEVICE void row_sums(float low, float high, float* to, int row) {
    TG_UNROLL for (int m = 1; m < 4; m <<= 1) {
        low += shuffle_xor(low, m);
        high += shuffle_xor(high, m);
    }
    if ((lane() & 3) == 0) {
        to[row + (lane() >> 2)] = low;
        to[row + (lane() >> 2) + 8] = high;
    }
}

template <class T> struct GradSquares {
    static constexpr int C = Chunk<T>::N, NB = C / 16, WC = 2, THREADS = 32 * NB * WC; // warps own 16 rows and half of the columns
    typedef Tile<T, C, SLAB> Slab;
    typedef Tile<T, SLAB, C> Turned;
    typedef Tile<T, C, C> Square;
    static constexpr int AT_V = Slab::BYTES, AT_R = 2 * Slab::BYTES, AT_X = 3 * Slab::BYTES, AT_DV = 4 * Slab::BYTES, AT_A = AT_DV + Turned::BYTES,
                         AT_F = AT_A + Square::BYTES, AT_SUMS = AT_F + FACTORS * C * 4,
                         // dO, V and dV' of every other slab
                         AT_O2 = AT_SUMS + (2 * WC + NB) * C * 4, AT_X2 = AT_O2 + Slab::BYTES, AT_DV2 = AT_X2 + Slab::BYTES,
                         BYTES = AT_DV2 + Turned::BYTES;
};

template <class T> TG_DEVICE void delta_grad_squares(const DeltaParams& p) {
    typedef GradSquares<T> S;
    constexpr int C = S::C, NB = S::NB, WC = S::WC, NC = C / 8 / WC, NS = SLAB / 8 / WC, THREADS = S::THREADS;
    u32 chunk = block_x() / p.hv, head = block_x() % p.hv;
    Place at;
    if (!place<C>(p, chunk, at)) return;
    const int me = thread(), wr = warp() % NB, wc = warp() / NB, row = 16 * wr, c_col = wc * NC * 8, s_col = wc * NS * 8;
    const u64 slot = block_x(), first = ((u64)at.row * p.hv + head) * p.dv;
    const i64 across = (i64)p.hv * p.dv;
    const u32 wide = whole_slabs(p.dv);
    typename S::Slab vn{shared<T>(S::AT_V)}, dr{shared<T>(S::AT_R)};
    typename S::Square a{shared<T>(S::AT_A)};
    float* f = shared<float>(S::AT_F);
    float* g_rows = shared<float>(S::AT_SUMS); // [WC][C]
    float* b_rows = g_rows + WC * C;           // [WC][C]
    float* g_cols = b_rows + WC * C;           // [NB][C]
    auto factor = [&](int which) { return f + which * C; };
    _Pragma("unroll 1") for (int i = thread_anew(); i < FACTORS * C / 4; i += THREADS) copy16_async(f + 4 * i, p.factors + slot * FACTORS * C + 4 * i);
    if (p.erase) bring_whole<THREADS>(a, (const T*)p.a + slot * C * C, C);

    FragC dp[NC], dm[NC];
    zero(dp);
    zero(dm);
    float b_low = 0.f, b_high = 0.f;
    auto d_o_of = [&](bool odd) { return typename S::Slab{shared<T>(odd ? S::AT_O2 : 0)}; };
    auto x_of = [&](bool odd) { return typename S::Slab{shared<T>(odd ? S::AT_X2 : S::AT_X)}; };
    auto dv_of = [&](bool odd) { return typename S::Turned{shared<T>(odd ? S::AT_DV2 : S::AT_DV)}; };
    auto fetch = [&](u32 d) {
        if (d < p.dv) {
            const bool odd = d / SLAB % 2;
            bring<THREADS>(d_o_of(odd), (const T*)p.d_o + first + d, across, at.len, p.dv - d);
            bring<THREADS>(x_of(odd), head_rows<T>(p.v, p.v_stride, at, head) + d, p.v_stride[1], at.len, p.dv - d);
            bring_whole<THREADS>(dv_of(odd), (const T*)p.d_new + (slot * wide + d) * C, C);
        }
        copy_commit();
    };
    fetch(0);
    for (u32 d = 0; d < p.dv; d += SLAB) {
        load_wide<THREADS>(vn, p.v_new + first + d, across, at.len, p.dv - d);
        copy_commit();
        fetch(d + SLAB);
        copy_wait<1>();
        sync();
        const bool odd = d / SLAB % 2;
        const typename S::Slab d_o = d_o_of(odd), x = x_of(odd);
        const typename S::Turned dv = dv_of(odd);
        // dR = A^T dV', from steps at and after each row's
        FragC r[NS];
        zero(r);
        if (p.erase) {
            _Pragma("unroll 1") for (int i = row; i < C; i += 16) {
                FragA<T> fa;
                load_a_trans(fa, a.data, a.STRIDE, row, i);
                step_columns(r, fa, dv.data, dv.STRIDE, s_col, i);
            }
        } else {
            TG_UNROLL for (int j = 0; j < NS; j++)
                TG_UNROLL for (int e = 0; e < 4; e++) r[j].v[e] = load(*dv.at(s_col + 8 * j + frag_col(e), row + frag_row(e)));
        }
        TG_UNROLL for (int j = 0; j < NS; j++) {
            put_frag(dr.data, dr.STRIDE, row, s_col + 8 * j, r[j]);
            T* v = x.at(row + frag_row(0), s_col + 8 * j + frag_col(0));
            float y[4];
            load_pair(v, y[0], y[1]);
            load_pair(v + 8 * x.STRIDE, y[2], y[3]);
            b_low += r[j].v[0] * y[0] + r[j].v[1] * y[1];
            b_high += r[j].v[2] * y[2] + r[j].v[3] * y[3];
            // dV takes v's place
            float b0 = factor(BETA)[row + frag_row(0)], b1 = factor(BETA)[row + frag_row(2)];
            store_pair(v, b0 * r[j].v[0], b0 * r[j].v[1]);
            store_pair(v + 8 * x.STRIDE, b1 * r[j].v[2], b1 * r[j].v[3]);
        }
        _Pragma("unroll 2") for (int i = 0; i < SLAB; i += 16) {
            FragA<T> fa;
            load_a(fa, d_o.data, d_o.STRIDE, row, i);
            step_columns(dp, fa, vn.data, vn.STRIDE, c_col, i, 0, row + 16);
        }
        sync();
        put_tile<THREADS>((T*)p.d_value + first + d, across, x, at.len, p.dv - d);
        put_tile<THREADS>((T*)p.d_r + slot * C * wide + d, wide, dr, C, SLAB);
        if (p.erase) {
            _Pragma("unroll 2") for (int i = 0; i < SLAB; i += 16) {
                FragA<T> fa;
                load_a(fa, dr.data, dr.STRIDE, row, i);
                step_columns(dm, fa, vn.data, vn.STRIDE, c_col, i, 0, row + 16);
            }
        }
        sync();
    }
    // the squares: what goes to g and beta, then X in A's place and Z + Z^T in dO's
    typename S::Square sym{shared<T>()};
    const T* pg = (const T*)p.p + slot * C * C;
    const T* mg = (const T*)p.m + slot * C * C;
    float g_low = 0.f, g_high = 0.f, high[2], low[2], beta[2], to_x[2], to_z[2];
    TG_UNROLL for (int i = 0; i < 2; i++) {
        int r = row + frag_row(2 * i);
        high[i] = factor(G_HIGH)[r];
        low[i] = factor(G_LOW)[r];
        beta[i] = factor(BETA)[r];
        to_x[i] = p.scale * factor(R_Q)[r];
        to_z[i] = beta[i] * factor(R_K)[r];
    }
    TG_UNROLL for (int j = 0; j < NC; j++) {
        int c0 = c_col + 8 * j + frag_col(0);
        float col[2] = {}, h[2], l[2], rk[2];
        load_pair((const float*)factor(G_HIGH) + c0, h[0], h[1]);
        load_pair((const float*)factor(G_LOW) + c0, l[0], l[1]);
        load_pair((const float*)factor(R_K) + c0, rk[0], rk[1]);
        TG_UNROLL for (int half = 0; half < 2; half++) {
            int r = row + frag_row(2 * half);
            float pv[2] = {}, mv[2] = {};
            if (c_col + 8 * j <= row + 15) {
                load_pair(pg + r * C + c0, pv[0], pv[1]);
                if (p.erase) load_pair(mg + r * C + c0, mv[0], mv[1]);
            }
            TG_UNROLL for (int e = 0; e < 2; e++) {
                int c = c0 + e;
                float d = fast_exp2((high[half] - h[e]) + (low[half] - l[e])) * rk[e];
                float xp = dp[j].v[2 * half + e], xm = -dm[j].v[2 * half + e];
                float to_g = c < r ? xp * pv[e] + xm * beta[half] * mv[e] : 0.f;
                (half ? g_high : g_low) += to_g;
                (half ? b_high : b_low) += c < r ? xm * mv[e] : 0.f;
                col[e] += to_g;
                dp[j].v[2 * half + e] = c <= r ? to_x[half] * d * xp : 0.f;
                dm[j].v[2 * half + e] = c < r ? to_z[half] * d * xm : 0.f;
            }
        }
        TG_UNROLL for (int e = 0; e < 2; e++) {
            TG_UNROLL for (int m = 4; m < 32; m <<= 1) col[e] += shuffle_xor(col[e], m);
            if (lane() < 4) g_cols[wr * C + c0 + e] = col[e];
        }
    }
    row_sums(g_low, g_high, g_rows + wc * C, row);
    row_sums(b_low, b_high, b_rows + wc * C, row);
    TG_UNROLL for (int j = 0; j < NC; j++) {
        put_frag(a.data, a.STRIDE, row, c_col + 8 * j, dp[j]);
        if (!p.erase) continue;
        TG_UNROLL for (int e = 0; e < 4; e++) {
            int r = row + frag_row(e), c = c_col + 8 * j + frag_col(e);
            if (c < r) *sym.at(c, r) = store<T>(dm[j].v[e]);
            if (c <= r) *sym.at(r, c) = store<T>(dm[j].v[e]);
        }
    }
    sync();
    put_tile<THREADS>((T*)p.x + slot * C * C, C, a, C, C);
    if (p.erase) put_tile<THREADS>((T*)p.s + slot * C * C, C, sym, C, C);
    if (me < C) {
        float g = 0.f, b = 0.f;
        for (int i = 0; i < WC; i++) {
            g += g_rows[i * C + me];
            b += b_rows[i * C + me];
        }
        float cols = 0.f;
        for (int i = 0; i < NB; i++) cols += g_cols[i * C + me];
        p.sums[slot * 2 * C + me] = g - cols;
        p.sums[slot * 2 * C + C + me] = b;
    }
}

template <class T> struct GradRows {
    static constexpr int C = Chunk<T>::N, NB = C / 16, WC = 2, THREADS = 32 * NB * WC;
    typedef Tile<T, C, SLAB> Slab;
    typedef Tile<T, SLAB, SLAB> State;
    typedef Tile<T, C, C> Square;
    // dO; V'; dR; q; k; h and dh, two of each; X; Z + Z^T; factors; three sums a row for each group of columns; scratch of a sum over the block
    static constexpr int AT_V = Slab::BYTES, AT_R = 2 * Slab::BYTES, AT_Q = 3 * Slab::BYTES, AT_K = 4 * Slab::BYTES, AT_H = 5 * Slab::BYTES,
                         AT_X = AT_H + 4 * State::BYTES, AT_S = AT_X + Square::BYTES, AT_F = AT_S + Square::BYTES, AT_SUMS = AT_F + FACTORS * C * 4,
                         AT_SCRATCH = AT_SUMS + 3 * WC * C * 4, BYTES = AT_SCRATCH + 4 * NB * WC;
};

template <class T> TG_DEVICE void delta_grad_rows(const DeltaParams& p) {
    typedef GradRows<T> S;
    constexpr int C = S::C, NB = S::NB, WC = S::WC, NS = SLAB / 8 / WC, THREADS = S::THREADS;
    u32 chunk = block_x() / p.hv, head = block_x() % p.hv, key_head = head / (p.hv / p.hk);
    Place at;
    if (!place<C>(p, chunk, at)) return;
    const int me = thread(), row = 16 * (warp() % NB), wc = warp() / NB, col = wc * NS * 8;
    const u64 slot = block_x(), first = ((u64)at.row * p.hv + head) * p.dv;
    const i64 across = (i64)p.hv * p.dv;
    const u32 wide_v = whole_slabs(p.dv), wide_k = whole_slabs(p.dk);
    typename S::Slab d_o{shared<T>()}, vn{shared<T>(S::AT_V)}, dr{shared<T>(S::AT_R)}, q{shared<T>(S::AT_Q)}, k{shared<T>(S::AT_K)};
    typename S::Square x{shared<T>(S::AT_X)}, s{shared<T>(S::AT_S)};
    float* f = shared<float>(S::AT_F);
    float* sums = shared<float>(S::AT_SUMS);
    float* scratch = shared<float>(S::AT_SCRATCH);
    auto factor = [&](int which) { return f + which * C; };
    _Pragma("unroll 1") for (int i = thread_anew(); i < FACTORS * C / 4; i += THREADS) copy16_async(f + 4 * i, p.factors + slot * FACTORS * C + 4 * i);
    bring_whole<THREADS>(x, (const T*)p.x + slot * C * C, C);
    if (p.erase) bring_whole<THREADS>(s, (const T*)p.s + slot * C * C, C);

    // h and dh of the next turn are brought while one computes
    const u32 slabs_v = wide_v / SLAB, turns = wide_k / SLAB * slabs_v;
    auto state = [&](u32 turn, int which) { return typename S::State{shared<T>(S::AT_H + (turn % 2 * 2 + which) * S::State::BYTES)}; };
    auto fetch = [&](u32 turn) {
        if (turn < turns) {
            const u64 from = (slot * wide_v + turn % slabs_v * SLAB) * wide_k + turn / slabs_v * SLAB;
            bring_whole<THREADS>(state(turn, 0), (const T*)p.states + from, wide_k);
            bring_whole<THREADS>(state(turn, 1), (const T*)p.d_states + from, wide_k);
        }
        copy_commit();
    };
    fetch(0);
    u32 turn = 0;
    float dots[3][2] = {}, states = 0.f; // rows of dO h^T . q, V' dh^T . k, dR h^T . k; h . dh
    for (u32 dk = 0; dk < p.dk; dk += SLAB) {
        FragC yq[NS], yk[NS], yr[NS];
        zero(yq);
        zero(yk);
        zero(yr);
        for (u32 dv = 0; dv < p.dv; dv += SLAB, turn++) {
            bring<THREADS>(d_o, (const T*)p.d_o + first + dv, across, at.len, p.dv - dv);
            if (p.erase) bring_whole<THREADS>(dr, (const T*)p.d_r + slot * C * wide_v + dv, wide_v);
            if (dv == 0) {
                bring<THREADS>(q, head_rows<T>(p.q, p.q_stride, at, key_head) + dk, p.q_stride[1], at.len, p.dk - dk);
                bring<THREADS>(k, head_rows<T>(p.k, p.k_stride, at, key_head) + dk, p.k_stride[1], at.len, p.dk - dk);
            }
            load_wide<THREADS>(vn, p.v_new + first + dv, across, at.len, p.dv - dv);
            copy_commit();
            fetch(turn + 1);
            copy_wait<1>();
            sync();
            const typename S::State h = state(turn, 0), dh = state(turn, 1);
            TG_UNROLL for (int i = 0; i < SLAB; i += 16) {
                FragA<T> fo, fv, fr;
                load_a(fo, d_o.data, d_o.STRIDE, row, i);
                load_a(fv, vn.data, vn.STRIDE, row, i);
                if (p.erase) load_a(fr, dr.data, dr.STRIDE, row, i);
                TG_UNROLL for (int j = 0; j < NS; j += 2) {
                    FragB<T> fb[2];
                    load_b2_trans(fb, h.data, h.STRIDE, col + 8 * j, i);
                    mma(yq[j], fo, fb[0]);
                    mma(yq[j + 1], fo, fb[1]);
                    if (p.erase) {
                        mma(yr[j], fr, fb[0]);
                        mma(yr[j + 1], fr, fb[1]);
                    }
                    load_b2_trans(fb, dh.data, dh.STRIDE, col + 8 * j, i);
                    mma(yk[j], fv, fb[0]);
                    mma(yk[j + 1], fv, fb[1]);
                }
            }
            if (p.d_decay) {
                constexpr int N = Vec<T>::N, PER_ROW = SLAB / N;
                _Pragma("unroll 1") for (int i = thread_anew(); i < SLAB * PER_ROW; i += THREADS) {
                    float a[N], b[N];
                    load16(a, (const T*)h.at(i / PER_ROW, i % PER_ROW * N));
                    load16(b, (const T*)dh.at(i / PER_ROW, i % PER_ROW * N));
                    TG_UNROLL for (int j = 0; j < N; j++) states += a[j] * b[j];
                }
            }
            sync();
        }
        TG_UNROLL for (int j = 0; j < NS; j++)
            TG_UNROLL for (int e = 0; e < 4; e++) {
                int r = row + frag_row(e), c = col + 8 * j + frag_col(e);
                float kv = load(*k.at(r, c)), y0 = yq[j].v[e] * factor(TO_Q)[r], y1 = yk[j].v[e] * factor(TO_LAST)[r];
                dots[0][e / 2] += y0 * load(*q.at(r, c));
                dots[1][e / 2] += y1 * kv;
                dots[2][e / 2] += yr[j].v[e] * kv;
                yq[j].v[e] = y0;
                yk[j].v[e] = y1 - yr[j].v[e] * factor(TO_W)[r];
            }
        TG_UNROLL for (int i = 0; i < C; i += 16) {
            FragA<T> fx, ft, fs;
            bool before = i <= row, after = i >= row;
            if (before) load_a(fx, x.data, x.STRIDE, row, i);
            if (after) load_a_trans(ft, x.data, x.STRIDE, row, i);
            if (p.erase) load_a(fs, s.data, s.STRIDE, row, i);
            TG_UNROLL for (int j = 0; j < NS; j += 2) {
                FragB<T> fb[2];
                if (before || p.erase) load_b2_trans(fb, k.data, k.STRIDE, col + 8 * j, i);
                if (before) {
                    mma(yq[j], fx, fb[0]);
                    mma(yq[j + 1], fx, fb[1]);
                }
                if (p.erase) {
                    mma(yk[j], fs, fb[0]);
                    mma(yk[j + 1], fs, fb[1]);
                }
                if (after) {
                    load_b2_trans(fb, q.data, q.STRIDE, col + 8 * j, i);
                    mma(yk[j], ft, fb[0]);
                    mma(yk[j + 1], ft, fb[1]);
                }
            }
        }
        sync();
        TG_UNROLL for (int j = 0; j < NS; j++) {
            put_frag(q.data, q.STRIDE, row, col + 8 * j, yq[j]);
            put_frag(k.data, k.STRIDE, row, col + 8 * j, yk[j]);
        }
        sync();
        const u64 to = ((u64)at.row * p.hv + head) * p.dk + dk;
        put_tile<THREADS>((T*)p.yq + to, (i64)p.hv * p.dk, q, at.len, p.dk - dk);
        put_tile<THREADS>((T*)p.yk + to, (i64)p.hv * p.dk, k, at.len, p.dk - dk);
        sync();
    }
    TG_UNROLL for (int i = 0; i < 3; i++) row_sums(dots[i][0], dots[i][1], sums + (i * WC + wc) * C, row);
    if (p.d_decay) states = block_sum(states, scratch);
    sync();
    // one warp finishes: C / 32 steps a lane
    if (warp() != 0) return;
    constexpr int E = C / 32;
    float g[E], tail[E], into_last = 0.f;
    TG_UNROLL for (int e = 0; e < E; e++) {
        int r = lane() * E + e;
        float d[3];
        TG_UNROLL for (int i = 0; i < 3; i++) {
            d[i] = 0.f;
            for (int j = 0; j < WC; j++) d[i] += sums[(i * WC + j) * C + r];
        }
        tail[e] = r + 1 < (int)at.len ? d[1] : 0.f; // the last step's own share cancels
        into_last += tail[e];
        g[e] = p.sums[slot * 2 * C + r] + d[0] - tail[e] - (p.erase ? factor(TO_W)[r] * d[2] : 0.f);
        u64 to = (u64)(at.row + r) * p.hv + head;
        if (p.d_beta && r < (int)at.len) {
            float b = p.sums[slot * 2 * C + C + r] - (p.erase ? factor(E_G)[r] * factor(R_K)[r] * d[2] : 0.f);
            if (p.beta_wide) ((float*)p.d_beta)[to] = b;
            else ((T*)p.d_beta)[to] = store<T>(b);
        }
    }
    if (!p.d_decay) return;
    into_last = warp_sum(into_last) + factor(E_G)[C - 1] * states;
    // g_i is the sum of log-decays up to i, so theirs are sums backwards
    float sum = 0.f;
    TG_UNROLL for (int e = E - 1; e >= 0; e--) {
        int r = lane() * E + e;
        sum += r < (int)at.len ? g[e] + (r + 1 == (int)at.len ? into_last : 0.f) : 0.f;
        g[e] = sum;
    }
    float after = sum;
    for (u32 m = 1; m < 32; m <<= 1) {
        float y = shuffle_down(after, m);
        if (lane() + m < 32) after += y;
    }
    after = shuffle_down(after, 1);
    TG_UNROLL for (int e = 0; e < E; e++) {
        int r = lane() * E + e;
        if (r < (int)at.len) p.d_decay[(u64)(at.row + r) * p.hv + head] = g[e] + (lane() < 31 ? after : 0.f);
    }
}

// Rows of [B T, Hk], 4 warps a block; y = 0 for q, 1 for k. A row has as many lanes as it has vectors of 16 bytes, rounded up to a power of two.
template <class T> TG_DEVICE void delta_grad_finish(const DeltaParams& p) {
    constexpr u32 N = Vec<T>::N, V = 256 / (32 * N); // vectors of a lane
    u32 bits = 0; // shifts, as divisions would take longer than the rest
    while (bits < 5 && (N << bits) < p.dk) bits++;
    const u32 lanes = 1 << bits, mine = lane() & (lanes - 1);
    const u64 i = ((((u64)block_x() * (threads() / 32) + warp()) << 5) + lane()) >> bits;
    const bool live = i < (u64)p.rows * p.hk;
    const u32 group = p.hv / p.hk;
    u32 r = 0;
    if (live) r = i >> 32 ? (u32)(i / p.hk) : (u32)i / p.hk;
    const u32 head = live ? (u32)(i - (u64)r * p.hk) : 0;
    const Place at{r, 1, r / p.t, r % p.t};
    const T* x = block_y() ? head_rows<T>(p.k, p.k_stride, at, head) : head_rows<T>(p.q, p.q_stride, at, head);
    const T* y = (const T*)(block_y() ? p.yk : p.yq) + ((u64)r * p.hv + head * group) * p.dk;
    T* to = (T*)(block_y() ? p.d_k : p.d_q) + i * p.dk;
    const bool whole = p.dk % N == 0 && aligned16(x) && aligned16(y) && aligned16(to);
    float xs[V][N], ys[V][N], xx = 0.f, xy = 0.f;
    auto get = [&](float (&v)[N], const T* from, u32 d) {
        if (whole) {
            load16(v, from + d);
        } else {
            TG_UNROLL for (u32 e = 0; e < N; e++) v[e] = d + e < p.dk ? load(from[d + e]) : 0.f;
        }
    };
    TG_UNROLL for (u32 v = 0; v < V; v++) {
        const u32 d = (mine + v * lanes) * N;
        TG_UNROLL for (u32 e = 0; e < N; e++) xs[v][e] = ys[v][e] = 0.f;
        if (!live || d >= p.dk) continue;
        get(xs[v], x, d);
        _Pragma("unroll 2") for (u32 j = 0; j < group; j++) {
            float more[N];
            get(more, y + (u64)j * p.dk, d);
            TG_UNROLL for (u32 e = 0; e < N; e++) ys[v][e] += more[e];
        }
        TG_UNROLL for (u32 e = 0; e < N; e++) {
            xx += xs[v][e] * xs[v][e];
            xy += xs[v][e] * ys[v][e];
        }
    }
    for (u32 m = 1; m < lanes; m <<= 1) {
        xx += shuffle_xor(xx, m);
        xy += shuffle_xor(xy, m);
    }
    const float f = p.l2 ? xy / (xx + 1e-6f) : 0.f;
    TG_UNROLL for (u32 v = 0; v < V; v++) {
        const u32 d = (mine + v * lanes) * N;
        if (!live || d >= p.dk) continue;
        TG_UNROLL for (u32 e = 0; e < N; e++) ys[v][e] -= f * xs[v][e];
        if (whole) {
            store16(to + d, ys[v]);
        } else {
            TG_UNROLL for (u32 e = 0; e < N; e++)
                if (d + e < p.dk) to[d + e] = store<T>(ys[v][e]);
        }
    }
}
