// The backward of gated_sdpa on Hopper: sdpa_backward of gated_sdpa_backward.cu, for keys and for queries, on warpgroups' products, bf16. The formulas, and
// what X, Y, x, y, out and out2 are, stand there.
//
// A block has 128 rows that stay, and three warpgroups: two that compute, with 64 rows each, and one that brings STEP streaming rows at a time.
//
// shared: X, Y [128 × HD], STAGES times x, y [STEP × HD] (and the rows' (lse, delta) where queries stream); panels of 128-byte rows, swizzled as
//     hopper.cuh says. S = X xᵀ and dP = Y yᵀ take all of them as they are (K-major); out += dS x and out2 += P y take x and y as MN-major.
// registers: out and out2 [64 × HD], S and dP [64 × STEP] of a warpgroup as accumulators, 128 of a thread and STEP at HD 128; P and dS go from there, as
//     bf16, into the products for out2 and out. Where queries stay there is no out2, and room for fragments of X and Y, so that shared memory gives x and
//     y alone. Groups that compute take 232 registers.
// order of a step: S and dP are started; P from S while dP is computed; dS; out2 and out. The second group begins after the first, so that products
//     of one run beside the other's exponentials.
// copies: asynchronous, 16 bytes a thread; FULL announces a stage to a group, EMPTY gives it back.
//
// Estimate, HD 128, keys: a step of 64 is 8.4 MFLOP: 2,048 cycles of tensor cores, 1,900 of shared memory (S and dP read A and B from it, 4 KB for 32
// cycles' work each), 8,192 exponentials 512. Queries: 6.3 MFLOP, 1,536 and 1,300. 5/7 of the products count. Measured on an H200 at T 16384: 390 TFLOP/s.
#include "gated_sdpa.cuh"
#include "hopper.cuh"

enum { FULL = 1, EMPTY = 7, TURN = 10, END = 11 }; // barriers: FULL + 2 stage + group, EMPTY + stage

template <int HD, bool OF_KEYS, int STEP, int STAGES> TG_DEVICE void sdpa_backward_hopper(const SdpaParams& p) {
    constexpr int ROWS = 128, THREADS = 384, STAY = ROWS * HD * 2, STAY_PANEL = ROWS * 128, TILE = STEP * HD * 2, PANEL = STEP * 128;
    constexpr int AT_STATS = 2 * STAY + STAGES * 2 * TILE, STATS = OF_KEYS ? STEP * 8 : 0;
    int *lo = shared<int>(AT_STATS + STAGES * STATS), *hi = lo + ROWS;
    auto [bh, rank] = turn_of(p);
    u32 b, hk;
    p.heads.divmod(bh, b, hk);
    int i0 = (OF_KEYS ? (int)rank : p.n_tiles - 1 - (int)rank) * ROWS, n = min_of(ROWS, (OF_KEYS ? p.keys : p.R) - i0), limit = OF_KEYS ? p.R : p.keys;
    if (thread() < ROWS) {
        int i = thread(), row = i0 + min_of(i, n - 1);
        Band x = OF_KEYS ? queries_of(p, row) : keys_of(p, p.group.div(row));
        if (OF_KEYS) { x.lo *= p.group.divisor; x.hi *= p.group.divisor; }
        lo[i] = x.lo;
        hi[i] = x.hi;
    }
    sync();
    int begin = lo[0] / STEP * STEP, end = hi[ROWS - 1];
    int steps = end > begin ? (int)div_up(end - begin, STEP) : 0;
    const float* stats = p.stats + 2 * (u64)bh * (p.R + p.R % 2);
    u32 group = shuffle(thread() / 128, 0);

    if (group == 2) {
        registers_give<40>();
        int me = thread() & 127, row = me >> 3, piece = me & 7;
        u32 place = swizzled(row, piece); // 16 rows further is 2048 bytes further
        // `count` rows from `first` on, of which those before `last` are there
        auto load = [&](u32 at, int count, const auto& from, int first, int last, int cols) {
            u8* to = shared<u8>(at + place);
            TG_ROLLED for (int i = 0; i < count; i += 16) {
                int r = first + row + i;
                const bf16* x = from.at(r) + piece * 8; // where there is no such row it is not read
                TG_UNROLL for (int c = 0; c < HD; c += 64) copy16_async(to + c / 64 * count * 128 + i * 128, x + c, r < last && piece * 8 + c < cols);
            }
        };
        Keys<const bf16> ks(p.k, b, hk), vs(p.v, b, hk);
        Rows<const bf16> qs(p, p.q, b, hk), dus(p, p.du, b, hk);
        auto load_x = [&](u32 at, int count, bool keys, int first, int last) {
            if (keys) load(at, count, ks, first, last, p.d);
            else load(at, count, qs, first, last, p.d);
        };
        auto load_y = [&](u32 at, int count, bool keys, int first, int last) {
            if (keys) load(at, count, vs, first, last, p.dv_cols);
            else load(at, count, dus, first, last, p.dv_cols);
        };
        auto announce = [&](int stage) {
            fence_async();
            arrive_some(FULL + 2 * stage, 256);
            arrive_some(FULL + 2 * stage + 1, 256);
        };
        if (steps > 0) {
            load_x(0, ROWS, OF_KEYS, i0, i0 + n);
            load_y(STAY, ROWS, OF_KEYS, i0, i0 + n);
        }
        int stage = 0, before = 0;
        TG_ROLLED for (int i = 0; i < steps; i++) {
            int j0 = begin + i * STEP;
            if (i >= STAGES) sync_some(EMPTY + stage, THREADS);
            u32 at = 2 * STAY + stage * 2 * TILE;
            load_x(at, STEP, !OF_KEYS, j0, limit);
            load_y(at + TILE, STEP, !OF_KEYS, j0, limit);
            if (OF_KEYS && me < STEP / 2) { // pairs of rows
                bool in = j0 + 2 * me < limit;
                copy16_async(shared<float>(AT_STATS + stage * STATS) + 4 * me, stats + (in ? 2 * (u64)(j0 + 2 * me) : 0), in);
            }
            copy_commit();
            if (i > 0) {
                copy_wait<1>();
                announce(before);
            }
            before = stage;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
        }
        if (steps > 0) {
            copy_wait<0>();
            announce(before);
        }
        return;
    }

    registers_take<232>();
    int row0 = (int)(warp() * 16);
    float out[HD / 2], out2[OF_KEYS ? HD / 2 : 1];
    TG_UNROLL for (int i = 0; i < HD / 2; i++) {
        out[i] = 0.f;
        if constexpr (OF_KEYS) out2[i] = 0.f;
    }
    // of the rows that stay, where queries do: lse in base 2 and delta
    float lse[2] = {0.f, 0.f}, delta[2] = {0.f, 0.f};
    if constexpr (!OF_KEYS) {
        TG_UNROLL for (int h = 0; h < 2; h++) {
            int r = row0 + frag_row(2 * h);
            if (r < n) { lse[h] = stats[2 * (u64)(i0 + r)]; delta[h] = stats[2 * (u64)(i0 + r) + 1]; }
        }
    }
    float c = p.c * p.flip;
    u32 base = shared_address(shared<u8>());
    u64 stay1 = k_major(base + group * 64 * 128), stay2 = deeper(stay1, STAY / 16);
    // Where queries stay, there is room for their fragments, which shared memory then need not give again at each step. But ptxas 13.0 forgets that an
    // operand of an asynchronous product is needed again at the next step, and puts others in its registers (it did at HD 64). So `keep` has each step
    // read and write them, by an exclusive or with a zero that only the host knows: what a plain instruction reads later stays. It runs beside products.
    constexpr bool HOLD = !OF_KEYS;
    u32 held1[HOLD ? HD / 16 : 1][4], held2[HOLD ? HD / 16 : 1][4];
    if constexpr (HOLD) {
        if (steps > 0) sync_some(FULL + group, 256);
        TG_UNROLL for (int k = 0; k < HD / 16; k++) {
            u32 at = base + k / 4 * STAY_PANEL + swizzled(row0 + (lane() & 15), k % 4 * 2 + (lane() >> 4));
            ldmatrix4(held1[k], at);
            ldmatrix4(held2[k], at + STAY);
        }
    }
    auto keep = [&](auto& held) {
        if constexpr (HOLD) {
            TG_UNROLL for (int k = 0; k < HD / 16; k++)
                TG_UNROLL for (int j = 0; j < 4; j++) held[k][j] ^= (u32)p.split_from; // nothing is split here
        }
    };
    int stage = 0;
    TG_ROLLED for (int j0 = begin; j0 < end; j0 += STEP) { // one counter: registers are all used
        u32 by = (2 * STAY + stage * 2 * TILE) / 16;
        u64 x = deeper(k_major(base), by), xt = deeper(mn_major(base, PANEL), by);
        const float* column = shared<float>(AT_STATS + stage * STATS);
        float s[STEP / 2], dp[STEP / 2], less[OF_KEYS ? STEP / 8 : 1][2]; // less: delta of the streaming rows
        if (!HOLD || j0 > begin) sync_some(FULL + 2 * stage + group, 256);
        auto start = [&](float (&d)[STEP / 2], const auto& held, u64 stay, u64 stream) {
            wgmma_fence();
            TG_UNROLL for (int k = 0; k < HD / 16; k++) {
                u64 with = deeper(stream, k / 4 * (PANEL / 16) + k % 4 * 2);
                if constexpr (HOLD) wgmma<STEP, 0>(d, held[k], with, k > 0);
                else wgmma<STEP, 0, 0>(d, deeper(stay, k / 4 * (STAY_PANEL / 16) + k % 4 * 2), with, k > 0);
            }
            wgmma_commit();
        };
        if (group == 1 && j0 == begin) sync_some(TURN, 256);
        start(s, held1, stay1, x);
        start(dp, held2, stay2, deeper(x, TILE / 16));
        if (group == 0 && j0 == begin) arrive_some(TURN, 256);

        wgmma_wait<1>();
        wgmma_settle(s);
        keep(held1);
        TG_UNROLL for (int k = 0; k < STEP / 8; k++) {
            float l[2];
            if constexpr (OF_KEYS) {
                U4 two = *(const U4*)(column + 2 * (8 * k + frag_col(0)));
                l[0] = bits_float(two.x);
                l[1] = bits_float(two.z);
                less[k][0] = bits_float(two.y);
                less[k][1] = bits_float(two.w);
            }
            TG_UNROLL for (int e = 0; e < 4; e++) s[4 * k + e] = fast_exp2(s[4 * k + e] * c - (OF_KEYS ? l[e & 1] : lse[e >> 1]));
        }
        bool cut = lo[ROWS - 1] > j0 || hi[0] < j0 + STEP;
        if (cut) {
            TG_UNROLL for (int h = 0; h < 2; h++) {
                int r = row0 + frag_row(2 * h), from = lo[r] - j0, to = hi[r] - j0;
                TG_UNROLL for (int k = 0; k < STEP / 8; k++)
                    TG_UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) {
                        int j = 8 * k + frag_col(e);
                        if (j < from || j >= to) s[4 * k + e] = 0.f;
                    }
            }
        }
        wgmma_wait<0>();
        wgmma_settle(dp);
        TG_UNROLL for (int k = 0; k < STEP / 8; k++) {
            TG_UNROLL for (int e = 0; e < 4; e++) dp[4 * k + e] = s[4 * k + e] * (dp[4 * k + e] - (OF_KEYS ? less[OF_KEYS ? k : 0][e & 1] : delta[e >> 1]));
        }
        if (cut) { // what is not seen may be infinite
            TG_UNROLL for (int k = 0; k < STEP / 2; k++)
                if (s[k] == 0.f) dp[k] = 0.f;
        }
        u32 probs[OF_KEYS ? STEP / 16 : 1][4], ds[STEP / 16][4];
        TG_UNROLL for (int k = 0; k < STEP / 16; k++)
            TG_UNROLL for (int j = 0; j < 4; j++) {
                if constexpr (OF_KEYS) probs[k][j] = pack_bf16(s[8 * k + 2 * j], s[8 * k + 2 * j + 1]);
                ds[k][j] = pack_bf16(dp[8 * k + 2 * j], dp[8 * k + 2 * j + 1]);
            }
        wgmma_fence();
        if constexpr (OF_KEYS) {
            TG_UNROLL for (int k = 0; k < STEP / 16; k++) wgmma<HD, 1>(out2, probs[k], deeper(xt, TILE / 16 + k * 128), 1);
        }
        TG_UNROLL for (int k = 0; k < STEP / 16; k++) wgmma<HD, 1>(out, ds[k], deeper(xt, k * 128), 1);
        wgmma_commit();
        keep(held2);
        wgmma_wait<0>();
        wgmma_settle(out);
        if constexpr (OF_KEYS) wgmma_settle(out2);
        if (j0 + STAGES * STEP < end) arrive_some(EMPTY + stage, THREADS);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    sync_some(END, 256); // all tiles are free

    typedef Tile<bf16, ROWS, HD> Result;
    static_assert(2 * Result::BYTES <= AT_STATS, "results take the place of all tiles");
    Result result{shared<bf16>()}, result2{shared<bf16>(Result::BYTES)};
    TG_UNROLL for (int k = 0; k < HD / 8; k++)
        TG_UNROLL for (int h = 0; h < 2; h++) {
            int r = row0 + frag_row(2 * h), col = 8 * k + frag_col(0), at = 4 * k + 2 * h;
            store_pair(result.at(r, col), p.scale * out[at], p.scale * out[at + 1]);
            if constexpr (OF_KEYS) store_pair(result2.at(r, col), out2[at], out2[at + 1]);
        }
    sync_some(END, 256);
    if constexpr (OF_KEYS) {
        store_rows<256>(result, Keys<bf16>(p.dk, b, hk), i0, n, p.d, p.vec & VEC_DK);
        store_rows<256>(result2, Keys<bf16>(p.dv, b, hk), i0, n, p.dv_cols, p.vec & VEC_DV);
    } else {
        store_rows<256>(result, Rows<bf16>(p, p.dq, b, hk), i0, n, p.d, p.vec & VEC_DQ);
    }
}
