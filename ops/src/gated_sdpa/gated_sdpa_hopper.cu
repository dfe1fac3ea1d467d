// The forward of gated_sdpa on Hopper: the algorithm of gated_sdpa.cu on warpgroups' products, in FlashAttention-3's order (Shah et al. 2024), bf16.
//
// A block has 128 query rows of one key/value head, and three warpgroups: two that compute, with 64 rows each, and one that brings tiles of 128 keys.
//
// shared: Q [128 × HD], two tiles of K and two of V [128 × HD]; each as HD / 64 panels of 128-byte rows, swizzled as hopper.cuh says. S = Q Kᵀ takes both
//     as they are (K-major), P V takes V as MN-major. Logits of an element-wise gate [128 × HD], plain rows.
// registers: O [64 × HD] and S [64 × 128] of a warpgroup as accumulators (HD / 2 and 64 of a thread), P in bf16 (32): 128-thread groups that compute take
//     232 registers, the one that copies gives what it has over 40 back.
// order: tile i's S is started together with the product P V of tile i - 1; the softmax of tile i runs while that one does. The two groups start their
//     products in turns (barriers TURN), so that one's softmax meets the other's products.
// copies: asynchronous, 16 bytes a thread, in the order of their use (K0, K1, V0, K2, V1, ..); what was started two tiles before is announced
//     (FULL, for each group that computes), and a buffer that both groups have read is given back (EMPTY). The gate's logits come with the second item.
// epilogue: u = O / sum goes in f32 to the place of Q and K, see write_gated.
//
// Estimate, HD 128: a tile is 8.4 MFLOP for the block: 2,048 cycles of tensor cores; 16,384 exponentials take 1,024, the rest of the softmax (about 5
// instructions each) 640 of each scheduler, both beside the products. 64 KB of K and V in that time from L2. Measured on an H200, no gate, HD 128: 607 TFLOP/s at T 16384.
#include "gated_sdpa.cuh"
#include "hopper.cuh"

enum { FULL = 1, EMPTY = 9, TURN = 13, END = 15 }; // barriers: FULL + 4 (is V) + 2 buffer + group, EMPTY + 2 (is V) + buffer

template <int HD> TG_DEVICE void sdpa_forward_hopper(const SdpaParams& p) {
    constexpr int ROWS = 128, KEYS = 128, THREADS = 384, TILE = KEYS * HD * 2, PANEL = 128 * 128, AT_K = ROWS * HD * 2, AT_V = AT_K + 2 * TILE;
    constexpr int AT_GATE = AT_V + 2 * TILE;
    int *lo = shared<int>(AT_GATE + ROWS * HD * 2), *hi = lo + ROWS;
    if (block_x() == 0) check_documents(p);
    auto [bh, rank] = turn_of(p);
    u32 b, hk;
    p.heads.divmod(bh, b, hk);
    int r0 = (p.n_tiles - 1 - (int)rank) * ROWS, n = min_of(ROWS, p.R - r0);
    if (thread() < ROWS) {
        int i = thread();
        Band x = i < n ? keys_of(p, p.group.div(r0 + i)) : Band{0, 0};
        lo[i] = x.lo;
        hi[i] = x.hi;
    }
    sync();
    int begin = lo[0] / KEYS * KEYS, end = hi[n - 1], lo_last = lo[n - 1], hi_first = hi[0];
    int tiles = end > begin ? (int)div_up(end - begin, KEYS) : 0;
    bool gate_held = tiles > 0 && p.gating == 2 && (p.vec & VEC_O);
    u32 group = shuffle(thread() / 128, 0);

    if (group == 2) {
        registers_give<40>();
        int me = thread() & 127, row = me >> 3, piece = me & 7;
        u32 place = swizzled(row, piece); // 16 rows further is 2048 bytes further
        Keys<const bf16> ks(p.k, b, hk), vs(p.v, b, hk);
        // item i in the order of use
        auto is_v = [&](int i) { return i == 2 * tiles - 1 || (i > 0 && i % 2 == 0); };
        auto tile_of = [&](int i) { return i == 2 * tiles - 1 ? tiles - 1 : is_v(i) ? i / 2 - 1 : (i + 1) / 2; };
        auto announce = [&](int i) {
            fence_async();
            u32 id = FULL + 4 * is_v(i) + 2 * (tile_of(i) & 1);
            arrive_some(id, 256);
            arrive_some(id + 1, 256);
        };
        Rows<const bf16> qs(p, p.q, b, hk);
        TG_ROLLED for (int i = row; i < ROWS && tiles > 0; i += 16) {
            const bf16* x = qs.at(r0 + i) + piece * 8; // where there is no such row it is not read
            TG_UNROLL for (int c = 0; c < HD; c += 64) copy16_async(shared<u8>(c / 64 * PANEL + place + (i - row) * 128), x + c, i < n && piece * 8 + c < p.d);
        }
        TG_ROLLED for (int i = 0; i < 2 * tiles; i++) {
            bool v = is_v(i);
            int tile = tile_of(i), buffer = tile & 1, first = begin + tile * KEYS + row, cols = v ? p.dv_cols : p.d;
            if (tile >= 2) sync_some(EMPTY + 2 * v + buffer, THREADS);
            const bf16* x = (v ? vs.at(first) : ks.at(first)) + piece * 8;
            i64 next = 16 * (v ? vs.t : ks.t);
            u8* to = shared<u8>((v ? AT_V : AT_K) + buffer * TILE + place);
            TG_UNROLL for (int j = 0; j < KEYS; j += 16) {
                TG_UNROLL for (int c = 0; c < HD; c += 64) copy16_async(to + c / 64 * PANEL + j * 128, x + c, first + j < p.keys && piece * 8 + c < cols);
                x += next;
            }
            if (i == 1 && gate_held) {
                Rows<const bf16> gates(p, p.gate, b, hk);
                TG_ROLLED for (int r = row; r < n; r += 16)
                    TG_UNROLL for (int c = 8 * piece; c < HD; c += 64) copy16_async(shared<u8>(AT_GATE + 2 * (r * HD + c)), gates.at(r0 + r) + c, c < p.dv_cols);
            }
            copy_commit();
            if (i >= 2) {
                copy_wait<2>();
                announce(i - 2);
            }
        }
        if (tiles > 0) {
            copy_wait<1>();
            announce(2 * tiles - 2);
            copy_wait<0>();
            announce(2 * tiles - 1);
        }
        return;
    }

    registers_take<232>();
    u64 q = k_major(shared_address(shared<u8>(group * 64 * 128)));
    u64 k = k_major(shared_address(shared<u8>(AT_K))), v = mn_major(shared_address(shared<u8>(AT_V)), PANEL);
    float o[HD / 2], s[KEYS / 2], top[2] = {-1e38f, -1e38f}, sum[2] = {0.f, 0.f}, alpha[2]; // top: of scores in base 2, from a finite number
    u32 probs[KEYS / 16][4];
    int row0 = (int)(warp() * 16);
    TG_UNROLL for (int i = 0; i < HD / 2; i++) o[i] = 0.f;

    auto start_s = [&](int tile) {
        wgmma_fence();
        u64 with = deeper(k, (tile & 1) * (TILE / 16));
        TG_UNROLL for (int i = 0; i < HD / 16; i++) {
            u32 by = i / 4 * (PANEL / 16) + i % 4 * 2;
            wgmma<KEYS, 0, 0>(s, deeper(q, by), deeper(with, by), i > 0);
        }
        wgmma_commit();
    };
    auto start_o = [&](int tile) {
        sync_some(FULL + 4 + 2 * (tile & 1) + group, 256);
        wgmma_fence();
        u64 with = deeper(v, (tile & 1) * (TILE / 16));
        TG_UNROLL for (int i = 0; i < KEYS / 16; i++) wgmma<HD, 1>(o, probs[i], deeper(with, i * 128), 1);
        wgmma_commit();
    };
    auto give_back = [&](bool is_v, int tile) {
        if (tile + 2 < tiles) arrive_some(EMPTY + 2 * is_v + (tile & 1), THREADS);
    };
    // s becomes exp2(c s - top), where it is seen
    auto softmax = [&](int tile) {
        int k0 = begin + tile * KEYS;
        if (lo_last > k0 || hi_first < k0 + KEYS) { // the tile is cut
            TG_UNROLL for (int h = 0; h < 2; h++) {
                int r = row0 + frag_row(2 * h), from = lo[r] - k0, to = hi[r] - k0;
                TG_UNROLL for (int i = 0; i < KEYS / 8; i++)
                    TG_UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) {
                        int j = 8 * i + frag_col(e);
                        if (j < from || j >= to) s[4 * i + e] = -infinity();
                    }
            }
        }
        TG_UNROLL for (int h = 0; h < 2; h++) {
            float x = -infinity();
            TG_UNROLL for (int i = 0; i < KEYS / 8; i++) x = fmaxf(x, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
            x = fmaxf(x, shuffle_xor(x, 1));
            x = fmaxf(x, shuffle_xor(x, 2));
            x = fmaxf(top[h], x * p.c);
            alpha[h] = fast_exp2(top[h] - x);
            top[h] = x;
            float part = 0.f;
            TG_UNROLL for (int i = 0; i < KEYS / 8; i++)
                TG_UNROLL for (int e = 2 * h; e < 2 * h + 2; e++) {
                    float y = fast_exp2(s[4 * i + e] * p.c - x);
                    s[4 * i + e] = y;
                    part += y;
                }
            sum[h] = sum[h] * alpha[h] + part;
        }
    };
    auto to_probs = [&] {
        TG_UNROLL for (int i = 0; i < KEYS / 16; i++)
            TG_UNROLL for (int j = 0; j < 4; j++) probs[i][j] = pack_bf16(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
    };

    if (tiles > 0) {
        if (group == 1 && tiles > 1) arrive_some(TURN, 256);
        sync_some(FULL + group, 256);
        start_s(0);
        wgmma_wait<0>();
        wgmma_settle(s);
        give_back(false, 0);
        softmax(0);
        to_probs();
        TG_ROLLED for (int i = 1; i < tiles; i++) {
            sync_some(FULL + 2 * (i & 1) + group, 256);
            sync_some(TURN + group, 256);
            start_s(i);
            start_o(i - 1);
            if (group == 0 || i + 1 < tiles) arrive_some(TURN + (group ^ 1), 256);
            wgmma_wait<1>();
            wgmma_settle(s);
            give_back(false, i);
            softmax(i);
            before_the_wait(sum[0] + sum[1]);
            wgmma_wait<0>();
            wgmma_settle(o);
            give_back(true, i - 1);
            TG_UNROLL for (int j = 0; j < HD / 2; j++) o[j] *= alpha[j >> 1 & 1];
            to_probs();
        }
        start_o(tiles - 1);
        wgmma_wait<0>();
        wgmma_settle(o);
    }
    sync_some(END, 256); // all tiles are free

    Tile<float, ROWS, HD> out{shared<float>()};
    static_assert(Tile<float, ROWS, HD>::BYTES <= AT_V, "the output in f32 takes the place of Q and K");
    TG_UNROLL for (int h = 0; h < 2; h++) {
        int i = row0 + frag_row(2 * h);
        float l = sum[h];
        l += shuffle_xor(l, 1);
        l += shuffle_xor(l, 2);
        float inverse = l == 0.f ? 0.f : 1.f / l, base2 = l == 0.f ? -infinity() : top[h] + log2f(l);
        if (i < n && (lane() & 3) == 0) {
            u32 time, g;
            p.group.divmod(r0 + i, time, g);
            p.lse[((u64)b * p.queries + time) * p.H + hk * p.group.divisor + g] = base2 * LN2;
        }
        TG_UNROLL for (int j = 0; j < HD / 8; j++) store_pair(out.at(i, 8 * j + frag_col(0)), o[4 * j + 2 * h] * inverse, o[4 * j + 2 * h + 1] * inverse);
    }
    sync_some(END, 256);
    write_gated<bf16, ROWS, HD, 256>(p, out, b, hk, r0, n, gate_held ? AT_GATE : -1);
}
