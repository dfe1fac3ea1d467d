// The backward of gated_sdpa, deterministic without atomics: three kernels.
//
//   P = exp(S - lse), dV = Pᵀ du, dS = P ⊙ (du Vᵀ - delta), dK = scale dSᵀ Q, dQ = scale dS K, delta = rowsum(du ⊙ u)
//
// 1. sdpa_prepare, bound by memory: the gate's gradient, du = dy ⊙ act(gate) (a copy only for gates that multiply), and per row (lse in base 2, delta).
// 2. sdpa_backward<.., true>: a block has ROWS keys and goes over the query rows that see any of them: dK and dV. The rows of all heads of the group are
//    among them, so gradients of shared keys are summed where they arise.
// 3. sdpa_backward<.., false>: a block has ROWS query rows and goes over the keys that they see: dQ.
// S and dP are computed twice: 7 products instead of 5, for sums whose order depends on shapes alone and no f32 dQ in global memory.
//
// 2 and 3 are one function, by symmetry. Two tiles stay (K, V or Q, du), two stream (Q, du or K, V). With X, Y what stays and x, y what streams:
//   S = X xᵀ, dP = Y yᵀ, both [ROWS × STEP];  out += dS x;  and, for keys, out2 += P y
// so P and dS are already the transposes that dK and dV need, and masks are intervals of streaming rows for each row that stays.
//
// A team of W warps has 16 M rows that stay. For S and dP each of its warps takes STEP / W of the streaming rows; for the outputs each takes HD / W columns.
// W = 1: P and dS go from accumulators to the next product in registers. W > 1: through shared memory, so that no S is computed twice and the
// accumulators (M HD / W registers each of two outputs) fit.
//
// shared: X, Y [ROWS × HD]; x [STEP × HD] twice (BUFFERS), the next comes during a whole step; y once, the next comes after its last use: after out2, or for
//     queries after dP; rows' (lse, delta) beside x where queries stream; P and dS [ROWS × STEP] if W > 1.
// order: blocks with most work first under a causal mask: first keys, last queries; see turn_of.
//
// Estimate, bf16, HD 128, keys (M 2, W 2, 8 warps, ROWS 128, STEP 64): 4 products of 2·128·64·128 = 8.4 MFLOP a step; shared memory moves 490 KB, at 128 B
// a cycle 3,800 cycles, mma.sync takes 3,400: both about full. 180 KB shared, 1 block. Queries (M 2, W 1, 4 warps, STEP 32): 96 KB, 2 blocks.
// At 370 TFLOP/s of products done, 5/7 of it counts: 264.
#include "gated_sdpa.cuh"

// N elements as they lie in memory.
template <class T, int N> union Some { T t[N]; };
template <class T> union alignas(16) Some<T, Vec<T>::N> { U4 whole; T t[Vec<T>::N]; };
template <class T, int N> TG_DEVICE void read(Some<T, N>& v, const T* x) {
    if constexpr (N > 1) v.whole = *(const U4*)x;
    else v.t[0] = *x;
}
template <class T, int N> TG_DEVICE void write(T* x, const Some<T, N>& v) {
    if constexpr (N > 1) *(U4*)x = v.whole;
    else *x = v.t[0];
}
struct RowSums { float delta, dlogit; };
// A lane's part of a row, N columns at a time: the gradients of what is gated and of element-wise logits, and its share of the sums.
template <class T, int N, u32 ACTIVATION> TG_DEVICE RowSums prepare_row(const SdpaParams& p, u32 b, u32 time, u32 h, u32 me, float headwise) {
    auto row = [&](const Strided& x) { return (T*)x.p + ((i64)b * x.b + (i64)time * x.t + (i64)h * x.h); };
    const T *dy = row(p.dy), *us = row(p.u), *logits = row(p.gate);
    bool elementwise = p.gating == 2, multiplies = p.gating && !p.additive;
    RowSums sums{0.f, 0.f};
    TG_ROLLED for (int c = me * N; c < p.dv_cols; c += p.team * N) {
        Some<T, N> y, x, l;
        read<T, N>(y, dy + c);
        read<T, N>(x, us + c);
        if (elementwise) read<T, N>(l, logits + c);
        TG_UNROLL for (int i = 0; i < N; i++) {
            float grad = load(y.t[i]), u = load(x.t[i]);
            Activated a = activate_both(ACTIVATION, elementwise ? load(l.t[i]) : headwise);
            float dx = p.additive ? grad : grad * u;
            l.t[i] = store<T>(dx * a.slope);
            sums.dlogit += dx;
            if (multiplies) {
                y.t[i] = store<T>(grad * a.value);
                grad = load(y.t[i]); // as the products see it
            }
            sums.delta += grad * u;
        }
        if (elementwise) write<T, N>(row(p.dgate) + c, l);
        if (multiplies) write<T, N>(row(p.du) + c, y);
    }
    return sums;
}
template <class T, int N> TG_DEVICE RowSums prepare_row(const SdpaParams& p, u32 b, u32 time, u32 h, u32 me, float headwise) {
    if (p.activation == SIGMOID) return prepare_row<T, N, SIGMOID>(p, b, time, h, me, headwise);
    if (p.activation == SILU) return prepare_row<T, N, SILU>(p, b, time, h, me, headwise);
    if (p.activation == NS_SIGMOID) return prepare_row<T, N, NS_SIGMOID>(p, b, time, h, me, headwise);
    return prepare_row<T, N, IDENTITY>(p, b, time, h, me, headwise);
}
// `team` lanes have a row; registers are few, so that enough threads fit for memory to be the bound.
template <class T> TG_DEVICE void sdpa_prepare(const SdpaParams& p) {
    u32 id = (block_x() * threads() + thread()) / p.team, me = thread() & (p.team - 1);
    bool in = id < p.total;
    u32 bh, r, b, hk, time, g;
    p.rows.divmod(in ? id : 0, bh, r);
    p.heads.divmod(bh, b, hk);
    p.group.divmod(r, time, g);
    u32 h = hk * p.group.divisor + g;
    float headwise = p.gating == 1 ? load(((const T*)p.gate.p)[(i64)b * p.gate.b + (i64)time * p.gate.t + (i64)h * p.gate.h]) : 0.f;
    float lse = me == 0 ? p.lse[((u64)b * p.queries + time) * p.H + h] : 0.f;
    RowSums sums{0.f, 0.f};
    if (in) sums = p.vec & VEC_PREPARE ? prepare_row<T, Vec<T>::N>(p, b, time, h, me, headwise) : prepare_row<T, 1>(p, b, time, h, me, headwise);
    for (u32 m = p.team / 2; m > 0; m >>= 1) {
        sums.delta += shuffle_xor(sums.delta, m);
        sums.dlogit += shuffle_xor(sums.dlogit, m);
    }
    if (!in || me != 0) return;
    if (p.gating == 1)
        ((T*)p.dgate.p)[(i64)b * p.dgate.b + (i64)time * p.dgate.t + (i64)h * p.dgate.h] = store<T>(sums.dlogit * activate_both(p.activation, headwise).slope);
    *(U2*)(p.stats + 2 * ((u64)bh * (p.R + p.R % 2) + r)) = U2{float_bits(lse * LOG2E), float_bits(sums.delta)};
}

template <class T, int HD, bool OF_KEYS, int M, int W, int WARPS, int STEP, int BUFFERS> TG_DEVICE void sdpa_backward(const SdpaParams& p) {
    constexpr int ROWS = 16 * M * WARPS / W, THREADS = 32 * WARPS, NS = STEP / W / 8, NO = HD / W / 8;
    typedef Tile<T, ROWS, HD> Stay;
    typedef Tile<T, STEP, HD> Stream;
    typedef Tile<T, ROWS, STEP> Scores;
    constexpr int STRIDE = Stay::STRIDE, STAT_BYTES = OF_KEYS ? STEP * 8 : 0, X_BYTES = Stream::BYTES + STAT_BYTES;
    constexpr int AT_X = 2 * Stay::BYTES, AT_Y = AT_X + BUFFERS * X_BYTES, AT_DS = AT_Y + Stream::BYTES, AT_P = AT_DS + (W > 1 ? Scores::BYTES : 0);
    Stay stay1{shared<T>()}, stay2{shared<T>(Stay::BYTES)};
    Stream y{shared<T>(AT_Y)};
    Scores ds{shared<T>(AT_DS)}, probs{shared<T>(AT_P)};
    int *lo = shared<int>(AT_P + (W > 1 && OF_KEYS ? Scores::BYTES : 0)), *hi = lo + ROWS;

    auto [bh, rank] = turn_of(p);
    u32 b, hk;
    p.heads.divmod(bh, b, hk);
    int i0 = (OF_KEYS ? (int)rank : p.n_tiles - 1 - (int)rank) * ROWS, n = min_of(ROWS, (OF_KEYS ? p.keys : p.R) - i0), limit = OF_KEYS ? p.R : p.keys;
    for (int i = thread(); i < ROWS; i += THREADS) {
        Band x{0, 0};
        if (i < n) {
            x = OF_KEYS ? queries_of(p, i0 + i) : keys_of(p, p.group.div(i0 + i));
            if (OF_KEYS) { x.lo *= p.group.divisor; x.hi *= p.group.divisor; }
        }
        lo[i] = x.lo;
        hi[i] = x.hi;
    }
    sync();
    int begin = lo[0] / STEP * STEP, end = hi[n - 1], lo_last = lo[n - 1], hi_first = hi[0];

    Keys<const T> ks(p.k, b, hk), vs(p.v, b, hk);
    Rows<const T> qs(p, p.q, b, hk), dus(p, p.du, b, hk);
    const float* stats = p.stats + 2 * (u64)bh * (p.R + p.R % 2);
    auto load_x = [&](int j0, int buffer) {
        Stream x{shared<T>(AT_X + buffer * X_BYTES)};
        if constexpr (OF_KEYS) {
            load_rows<THREADS>(x, qs, j0, limit - j0, p.d, p.vec & VEC_Q);
            for (int i = thread(); i < STEP / 2; i += THREADS) { // pairs of rows
                bool in = j0 + 2 * i < limit;
                copy16_async(shared<float>(AT_X + buffer * X_BYTES + Stream::BYTES) + 4 * i, stats + (in ? 2 * (u64)(j0 + 2 * i) : 0), in);
            }
        } else {
            load_rows<THREADS>(x, ks, j0, limit - j0, p.d, p.vec & VEC_K);
        }
    };
    auto load_y = [&](int j0) {
        if constexpr (OF_KEYS) load_rows<THREADS>(y, dus, j0, limit - j0, p.dv_cols, p.vec & VEC_DU);
        else load_rows<THREADS>(y, vs, j0, limit - j0, p.dv_cols, p.vec & VEC_V);
    };
    if constexpr (OF_KEYS) {
        load_rows<THREADS>(stay1, ks, i0, n, p.d, p.vec & VEC_K);
        load_rows<THREADS>(stay2, vs, i0, n, p.dv_cols, p.vec & VEC_V);
    } else {
        load_rows<THREADS>(stay1, qs, i0, n, p.d, p.vec & VEC_Q);
        load_rows<THREADS>(stay2, dus, i0, n, p.dv_cols, p.vec & VEC_DU);
    }
    if (begin < end) { load_x(begin, 0); load_y(begin); }
    copy_commit();

    int team = warp() / W, part = warp() % W, row0 = team * 16 * M, s0 = part * (STEP / W), c0 = part * (HD / W);
    FragC out[M][NO], out2[OF_KEYS ? M : 1][OF_KEYS ? NO : 1];
    TG_UNROLL for (int m = 0; m < M; m++)
        TG_UNROLL for (int i = 0; i < NO; i++) {
            out[m][i].zero();
            if constexpr (OF_KEYS) out2[m][i].zero();
        }
    // of the rows that stay, where queries do: lse in base 2 and delta
    float lse[OF_KEYS ? 1 : M][2], delta[OF_KEYS ? 1 : M][2];
    if constexpr (!OF_KEYS) {
        TG_UNROLL for (int m = 0; m < M; m++)
            TG_UNROLL for (int h = 0; h < 2; h++) {
                int r = row0 + 16 * m + frag_row(2 * h);
                lse[m][h] = r < n ? stats[2 * (u64)(i0 + r)] : 0.f;
                delta[m][h] = r < n ? stats[2 * (u64)(i0 + r) + 1] : 0.f;
            }
    }

    int buffer = 0;
    for (int j0 = begin; j0 < end; j0 += STEP) {
        copy_wait<0>();
        sync(); // this step's tiles are here, all of the last step is done
        if (BUFFERS == 2) {
            if (j0 + STEP < end) load_x(j0 + STEP, buffer ^ 1);
            copy_commit();
        }
        const T* x = shared<T>(AT_X + buffer * X_BYTES);
        const float* column = shared<float>(AT_X + buffer * X_BYTES + Stream::BYTES);
        FragC s[M][NS], dp[M][NS];
        product_abt<T, HD, STRIDE>(s, stay1.data, row0, x, s0);
        product_abt<T, HD, STRIDE>(dp, stay2.data, row0, y.data, s0);

        bool cut = lo_last > j0 || hi_first < j0 + STEP;
        TG_UNROLL for (int i = 0; i < NS; i++) {
            float l[2], d[2];
            if constexpr (OF_KEYS) {
                const float* at = column + 2 * (s0 + 8 * i + frag_col(0));
                TG_UNROLL for (int e = 0; e < 2; e++) { l[e] = at[2 * e]; d[e] = at[2 * e + 1]; }
            }
            TG_UNROLL for (int m = 0; m < M; m++)
                TG_UNROLL for (int e = 0; e < 4; e++) {
                    float base = OF_KEYS ? l[e & 1] : lse[OF_KEYS ? 0 : m][e >> 1], less = OF_KEYS ? d[e & 1] : delta[OF_KEYS ? 0 : m][e >> 1];
                    float probability = fast_exp2(s[m][i].v[e] * (p.c * p.flip) - base);
                    s[m][i].v[e] = probability;
                    dp[m][i].v[e] = probability * (dp[m][i].v[e] - less);
                }
        }
        if (cut) {
            TG_UNROLL for (int m = 0; m < M; m++)
                TG_UNROLL for (int h = 0; h < 2; h++) {
                    int r = row0 + 16 * m + frag_row(2 * h), from = lo[r], to = hi[r];
                    TG_UNROLL for (int i = 0; i < NS; i++)
                        TG_UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) {
                            int j = j0 + s0 + 8 * i + frag_col(e);
                            if (j < from || j >= to) s[m][i].v[e] = dp[m][i].v[e] = 0.f;
                        }
                }
        }
        if constexpr (W > 1) {
            TG_UNROLL for (int m = 0; m < M; m++)
                TG_UNROLL for (int i = 0; i < NS; i++)
                    TG_UNROLL for (int h = 0; h < 2; h++) {
                        int r = row0 + 16 * m + frag_row(2 * h), c = s0 + 8 * i + frag_col(0);
                        store_pair(ds.at(r, c), dp[m][i].v[2 * h], dp[m][i].v[2 * h + 1]);
                        if constexpr (OF_KEYS) store_pair(probs.at(r, c), s[m][i].v[2 * h], s[m][i].v[2 * h + 1]);
                    }
            if constexpr (OF_KEYS) sync_some(1 + team, 32 * W);
        }
        if constexpr (OF_KEYS) {
            TG_UNROLL for (int k = 0; k < STEP; k += 16) {
                FragA<T> fa[M];
                TG_UNROLL for (int m = 0; m < M; m++) {
                    if constexpr (W > 1) OfA<T, Scores::STRIDE>(probs.data, row0).get(fa[m], 16 * m, k);
                    else to_a(fa[m], s[m][k / 8], s[m][k / 8 + 1]);
                }
                step(out2, fa, OfBTrans<T, STRIDE>(y.data, c0), k);
            }
        }
        sync(); // y is done with; where queries stay, dS is there
        if (j0 + STEP < end) load_y(j0 + STEP);
        copy_commit();
        TG_UNROLL for (int k = 0; k < STEP; k += 16) {
            FragA<T> fa[M];
            TG_UNROLL for (int m = 0; m < M; m++) {
                if constexpr (W > 1) OfA<T, Scores::STRIDE>(ds.data, row0).get(fa[m], 16 * m, k);
                else to_a(fa[m], dp[m][k / 8], dp[m][k / 8 + 1]);
            }
            step(out, fa, OfBTrans<T, STRIDE>(x, c0), k);
        }
        if (BUFFERS == 2) {
            buffer ^= 1;
        } else {
            sync();
            if (j0 + STEP < end) load_x(j0 + STEP, 0);
            copy_commit();
        }
    }
    copy_wait<0>();
    sync(); // all tiles are free
    TG_UNROLL for (int m = 0; m < M; m++)
        TG_UNROLL for (int i = 0; i < NO; i++)
            TG_UNROLL for (int h = 0; h < 2; h++) {
                int r = row0 + 16 * m + frag_row(2 * h), c = c0 + 8 * i + frag_col(0);
                store_pair(stay1.at(r, c), p.scale * out[m][i].v[2 * h], p.scale * out[m][i].v[2 * h + 1]);
                if constexpr (OF_KEYS) store_pair(stay2.at(r, c), out2[m][i].v[2 * h], out2[m][i].v[2 * h + 1]);
            }
    sync();
    if constexpr (OF_KEYS) {
        store_rows<THREADS>(stay1, Keys<T>(p.dk, b, hk), i0, n, p.d, p.vec & VEC_DK);
        store_rows<THREADS>(stay2, Keys<T>(p.dv, b, hk), i0, n, p.dv_cols, p.vec & VEC_DV);
    } else {
        store_rows<THREADS>(stay1, Rows<T>(p, p.dq, b, hk), i0, n, p.d, p.vec & VEC_DQ);
    }
}
