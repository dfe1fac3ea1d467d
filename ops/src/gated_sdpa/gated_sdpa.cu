// The forward of gated_sdpa: o = gate(softmax(scale q kᵀ + mask) v), FlashAttention-2's order (Dao 2023, algorithm 1) on mma.sync.
//
// A block has ROWS query rows (times × heads of a group, see gated_sdpa.cuh) of one key/value head and goes over the tiles of KEYS keys that any of them sees.
// A warp has 16 M rows: with M = 2 each fragment of K and V is read from shared memory once for two products, without which shared memory
// (128 B a cycle; a 16 × 8 × 16 product needs 2 cycles of it at M = 1, and takes 1.6 on tensor cores) would be the bound.
//
// registers: O [16 M × HD] and S [16 M × KEYS] of a warp as accumulators; a row's maximum and its share of the sum. P = exp2(c s - c max) goes from S's
//     registers straight into the product with V. Up to head dim 64 Q's fragments too.
// shared: Q [ROWS × HD], one tile of K and one of V [KEYS × HD], rows padded by 16 bytes so that ldmatrix meets no bank twice. V comes while S is
//     computed, the next K while the softmax and P V are: one buffer each is enough, and two blocks fit on a multiprocessor.
// masks: a tile that all rows see in full skips the comparisons; one that none sees is never visited.
// order: those with most keys first under a causal mask, see turn_of.
// epilogue: u = O / sum goes in f32 to the place of Q, K and V; then rows are read, gated and written by 16-byte vectors. The gate costs reading the logits
//     and writing u. log-sum-exp in f32.
// few rows, many keys (decoding): blocks share a head's keys; each writes its normalised part in f32, and sdpa_combine joins them and applies the gate.
//     Up to 16 rows take blocks of one warp with 16 rows.
//
// Estimate, bf16, HD 128 (M 2, 4 warps, ROWS 128, KEYS 64): 4·128·64·128 = 4.2 MFLOP a tile against 32 KB of K and V from L2; 70 KB of shared memory and
// 255 registers: 2 blocks a multiprocessor. mma.sync runs at about 60 % of an H100's peak, so 500 TFLOP/s are the roof; 370 is what others reach this way.
#include "gated_sdpa.cuh"

template <class T, int HD, int M, int WARPS, int KEYS> TG_DEVICE void sdpa_forward(const SdpaParams& p) {
    constexpr int ROWS = 16 * M * WARPS, THREADS = 32 * WARPS, NS = KEYS / 8, NO = HD / 8;
    constexpr bool HOLD = sizeof(T) == 2 && HD <= 64; // Q's fragments stay in registers
    typedef Tile<T, ROWS, HD> QTile;
    typedef Tile<T, KEYS, HD> KTile;
    constexpr int STRIDE = QTile::STRIDE;
    QTile q{shared<T>()};
    KTile k{shared<T>(QTile::BYTES)}, v{shared<T>(QTile::BYTES + KTile::BYTES)};
    int *lo = shared<int>(QTile::BYTES + 2 * KTile::BYTES), *hi = lo + ROWS;

    if (block_x() == 0 && block_y() == 0) check_documents(p);
    auto [bh, rank] = turn_of(p);
    u32 b, hk;
    p.heads.divmod(bh, b, hk);
    int r0 = (p.n_tiles - 1 - (int)rank) * ROWS, n = min_of(ROWS, p.R - r0);
    int from = 0, to = p.keys; // of a split
    if (p.splits > 1) {
        from = p.split_from + (int)block_y() * p.split_span;
        to = from + p.split_span;
    }
    for (int i = thread(); i < ROWS; i += THREADS) {
        Band x = i < n ? keys_of(p, p.group.div(r0 + i)) : Band{0, 0};
        lo[i] = max_of(x.lo, from);
        hi[i] = min_of(x.hi, to);
    }
    // what is needed at the end alone, or when a tile is looked at, does not take registers
    int* note = hi + ROWS;
    if (thread() == 0) { note[0] = (int)bh; note[1] = (int)b; note[2] = (int)hk; note[3] = r0; note[4] = n; }
    sync();
    if (thread() == 0) { note[5] = lo[n - 1]; note[6] = hi[0]; }
    int begin = lo[0] / KEYS * KEYS, end = hi[n - 1];

    int row0 = (int)warp() * 16 * M;
    FragC o[M][NO];
    float top[M][2], sum[M][2]; // of scores in base 2; from a finite number, so that a row that has seen no key yet needs no care
    TG_UNROLL for (int m = 0; m < M; m++) {
        TG_UNROLL for (int i = 0; i < NO; i++) o[m][i].zero();
        TG_UNROLL for (int h = 0; h < 2; h++) { top[m][h] = -1e38f; sum[m][h] = 0.f; }
    }
    FragA<T> held[HOLD ? M : 1][HOLD ? HD / 16 : 1];

    // addresses are formed anew for each tile: they too would take registers
    auto load_k = [&](int k0) { load_rows<THREADS>(k, Keys<const T>(p.k, note[1], note[2]), k0, p.keys - k0, p.d, p.vec & VEC_K); };
    auto load_v = [&](int k0) { load_rows<THREADS>(v, Keys<const T>(p.v, note[1], note[2]), k0, p.keys - k0, p.dv_cols, p.vec & VEC_V); };
    load_rows<THREADS>(q, Rows<const T>(p, p.q, b, hk), r0, n, p.d, p.vec & VEC_Q);
    if (begin < end) load_k(begin);
    copy_commit();
    for (int k0 = begin; k0 < end; k0 += KEYS) {
        copy_wait<0>();
        sync(); // K is here, and V of the tile before is done with
        load_v(k0);
        copy_commit();
        FragC s[M][NS];
        if constexpr (HOLD) {
            if (k0 == begin) {
                OfA<T, STRIDE> from(q.data, row0);
                TG_UNROLL for (int m = 0; m < M; m++)
                    TG_UNROLL for (int i = 0; i < HD / 16; i++) from.get(held[m][i], 16 * m, 16 * i);
            }
            TG_UNROLL for (int m = 0; m < M; m++)
                TG_UNROLL for (int i = 0; i < NS; i++) s[m][i].zero();
            TG_UNROLL for (int i = 0; i < HD / 16; i++) {
                FragA<T> fa[M];
                TG_UNROLL for (int m = 0; m < M; m++) fa[m] = held[m][i];
                step(s, fa, OfB<T, STRIDE>(k.data, 0), 16 * i);
            }
        } else {
            product_abt<T, HD, STRIDE>(s, q.data, row0, k.data, 0);
        }
        copy_wait<0>();
        sync(); // V is here, and K is done with
        if (k0 + KEYS < end) load_k(k0 + KEYS);
        copy_commit();

        if (p.flip != 1.f) {
            TG_UNROLL for (int m = 0; m < M; m++)
                TG_UNROLL for (int i = 0; i < NS; i++)
                    TG_UNROLL for (int e = 0; e < 4; e++) s[m][i].v[e] *= p.flip;
        }
        if (note[5] > k0 || note[6] < k0 + KEYS) { // the tile is cut
            TG_UNROLL for (int m = 0; m < M; m++)
                TG_UNROLL for (int h = 0; h < 2; h++) {
                    int r = row0 + 16 * m + frag_row(2 * h), from = lo[r], to = hi[r];
                    TG_UNROLL for (int i = 0; i < NS; i++)
                        TG_UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) {
                            int j = k0 + 8 * i + frag_col(e);
                            if (j < from || j >= to) s[m][i].v[e] = -infinity();
                        }
                }
        }
        float alpha[M][2];
        bool grows = false;
        TG_UNROLL for (int m = 0; m < M; m++)
            TG_UNROLL for (int h = 0; h < 2; h++) {
                float x = -infinity();
                TG_UNROLL for (int i = 0; i < NS; i++) x = fmaxf(x, fmaxf(s[m][i].v[2 * h], s[m][i].v[2 * h + 1]));
                x = fmaxf(x, shuffle_xor(x, 1));
                x = fmaxf(x, shuffle_xor(x, 2));
                x = fmaxf(top[m][h], x * p.c);
                alpha[m][h] = fast_exp2(top[m][h] - x);
                grows |= x > top[m][h];
                top[m][h] = x;
            }
        if (warp_any(grows)) { // after the first tiles maxima seldom do
            TG_UNROLL for (int m = 0; m < M; m++)
                TG_UNROLL for (int h = 0; h < 2; h++) {
                    sum[m][h] *= alpha[m][h];
                    TG_UNROLL for (int i = 0; i < NO; i++) { o[m][i].v[2 * h] *= alpha[m][h]; o[m][i].v[2 * h + 1] *= alpha[m][h]; }
                }
        }
        TG_UNROLL for (int i = 0; i < KEYS / 16; i++) { // exponentials of 16 keys while the last 16 are multiplied
            FragA<T> fa[M];
            TG_UNROLL for (int m = 0; m < M; m++) {
                TG_UNROLL for (int j = 2 * i; j < 2 * i + 2; j++)
                    TG_UNROLL for (int e = 0; e < 4; e++) {
                        float y = fast_exp2(s[m][j].v[e] * p.c - top[m][e >> 1]);
                        s[m][j].v[e] = y;
                        sum[m][e >> 1] += y;
                    }
                to_a(fa[m], s[m][2 * i], s[m][2 * i + 1]);
            }
            step(o, fa, OfBTrans<T, STRIDE>(v.data, 0), 16 * i);
        }
    }
    copy_wait<0>();
    sync(); // all tiles are free

    bh = (u32)note[0]; b = (u32)note[1]; hk = (u32)note[2]; r0 = note[3]; n = note[4];
    Tile<float, ROWS, HD> out{shared<float>()};
    static_assert(Tile<float, ROWS, HD>::BYTES <= QTile::BYTES + 2 * KTile::BYTES, "the output in f32 takes the place of Q, K and V");
    TG_UNROLL for (int m = 0; m < M; m++)
        TG_UNROLL for (int h = 0; h < 2; h++) {
            int i = row0 + 16 * m + frag_row(2 * h);
            float l = sum[m][h];
            l += shuffle_xor(l, 1);
            l += shuffle_xor(l, 2);
            float inverse = l == 0.f ? 0.f : 1.f / l, base2 = l == 0.f ? -infinity() : top[m][h] + log2f(l);
            if (i < n && (lane() & 3) == 0) {
                u32 time, g;
                p.group.divmod(r0 + i, time, g);
                if (p.splits > 1) p.partial[(u64)p.splits * p.total * p.dv_cols + (u64)block_y() * p.total + (u64)bh * p.R + r0 + i] = base2;
                else p.lse[((u64)b * p.queries + time) * p.H + hk * p.group.divisor + g] = base2 * LN2;
            }
            TG_UNROLL for (int j = 0; j < NO; j++) store_pair(out.at(i, 8 * j + frag_col(0)), o[m][j].v[2 * h] * inverse, o[m][j].v[2 * h + 1] * inverse);
        }
    sync();
    if (p.splits > 1) {
        float* to = p.partial + ((u64)block_y() * p.total + (u64)bh * p.R + r0) * p.dv_cols;
        TG_ROLLED for (int i = thread_anew(); i < n * HD; i += THREADS)
            if (i % HD < p.dv_cols) to[(u64)(i / HD) * p.dv_cols + i % HD] = *out.at(i / HD, i % HD);
        return;
    }
    write_gated<T, ROWS, HD, THREADS>(p, out, b, hk, r0, n);
}

// Joins the parts of a split over keys: a warp per row.
template <class T> TG_DEVICE void sdpa_combine(const SdpaParams& p) {
    u32 id = block_x() * (threads() / 32) + warp();
    if (id >= p.total) return;
    u32 bh, r, b, hk, time, g;
    p.rows.divmod(id, bh, r);
    p.heads.divmod(bh, b, hk);
    p.group.divmod(r, time, g);
    const float* part = p.partial + (u64)p.splits * p.total * p.dv_cols + id; // log-sum-exps
    float top = -infinity(), sum = 0.f;
    for (int i = 0; i < p.splits; i++) top = fmaxf(top, part[(u64)i * p.total]);
    float base = top == -infinity() ? 0.f : top;
    for (int i = 0; i < p.splits; i++) sum += fast_exp2(part[(u64)i * p.total] - base);
    if (lane() == 0) p.lse[((u64)b * p.queries + time) * p.H + hk * p.group.divisor + g] = (base + log2f(sum)) * LN2;
    float inverse = sum > 0.f ? 1.f / sum : sum;
    const T* logits = p.gating ? Rows<const T>(p, p.gate, b, hk).at(r) : nullptr;
    T *o = Rows<T>(p, p.o, b, hk).at(r), *u = p.gating ? Rows<T>(p, p.u, b, hk).at(r) : nullptr;
    for (int c = lane(); c < p.dv_cols; c += 32) {
        float x = 0.f;
        for (int i = 0; i < p.splits; i++) x += p.partial[((u64)i * p.total + id) * p.dv_cols + c] * fast_exp2(part[(u64)i * p.total] - base);
        x *= inverse;
        if (p.gating) {
            u[c] = store<T>(x);
            x = gated(p, x, load(logits[p.gating == 2 ? c : 0]));
        }
        o[c] = store<T>(x);
    }
}
