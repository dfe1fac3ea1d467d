// The delta rule over a sequence that is cut into pieces, where (sequences x heads) are too few to fill the card.
//
// What chunks do to the state before them is affine: h' = M h + S. With erasure M is the product of the chunks' e^{g_last} I - (e^{g_last - g} K)^T W, a
// [Dk, Dk] matrix; without it, or where V' is given, M is the product of the e^{g_last}, a number. Ratios of decays stay at most 1. A pass is three launches:
//
// delta_scan<SUM>, delta_states<SUM>, delta_scan_back<SUM>   each piece by itself, side by side: S, the state that it makes of zeros, and by blocks of
//                         their own the columns of M, the states that it makes of the unit matrix's when nothing is written. The first piece begins
//                         with the caller's state, so that it needs no M, and the last needs neither: two pieces have no M at all.
// delta_join              along the joints of a sequence, h = M h + S, in f32 (products of split bf16): a block per (sequence, head, 16 columns of the
//                         state), a warp per 16 rows; the state's columns lie in shared memory, and each warp's rows of the next maps are on their way there.
// delta_join_decayed      the same for an M that is a number: a thread per element of the state.
// the same kernels        without SUM: every piece as a sequence of its own, from the state at its joint.
//
// The backward cuts delta_states (M is a number, as V' is given) and delta_scan_back, whose gradient goes from the end through M^T.
//
// d = 128, bf16, per chunk and value head: S costs W h and K V', 4.2 of the scan's 7 MFLOP, M as much again. With P pieces the work is 1 + 0.6 (2 P - 3) / P
// of the uncut scan's: 1.3 (P = 2) to 2.2. But the chain of n chunks becomes twice n / P, P - 2 joins (a block: M's 64 KB from L2, 0.5 MFLOP of products times
// 6), and two more launches. The backward's two chains cost nearly as much again where they only sum up, so that two pieces gain nothing there.
// P (cuda.rs) is what fills the card once; pieces have at least 8 chunks, each of which costs several times what a join does in a chain; sequences under
// 32 chunks stay whole.
#include "delta_rule.cuh"

// The joints of the sequence whose second one is joint `x`; false for every other joint, as a first joint's state is already whole.
TG_DEVICE bool joints_of(const DeltaParams& p, u32 x, u32& first, u32& count) {
    if (p.joint_bases) {
        if (x >= p.joint_bases[p.seqs]) return false;
        u32 seq = p.joint_seqs[x];
        first = p.joint_bases[seq];
        count = p.joint_bases[seq + 1] - first;
    } else {
        count = p.pieces - 1;
        first = x / count * count;
    }
    return x == first + 1;
}

template <int DK> TG_DEVICE void delta_join(const DeltaParams& p) {
    constexpr int COLS = 16, NC = COLS / 8, SLICE = 32, SLICES = DK / SLICE, RING = DK <= 128 ? 4 : 2, THREADS = 2 * DK;
    typedef Tile<float, DK, COLS> Columns;
    typedef Tile<float, 16, SLICE> Slice;
    Columns h{shared<float>()};
    const u32 parts = div_up(p.dv, COLS), col = block_x() % parts * COLS, head = block_x() / parts % p.hv;
    u32 first, count;
    if (!joints_of(p, block_x() / parts / p.hv, first, count)) return;
    const int row = 16 * warp();
    auto number = [&](u32 i) { return p.back ? first + count - 1 - i : first + i; };
    // a warp's rows of the maps, one after the other, in slices of columns: a ring that no other warp reads
    auto slice = [&](u32 n) { return Slice{shared<float>(Columns::BYTES + (warp() * RING + n % RING) * Slice::BYTES)}; };
    auto fetch = [&](u32 n) {
        if (n < (count - 1) * SLICES) {
            const Slice to = slice(n);
            const float* from = map_at(p, number(1 + n / SLICES), head) + row * DK + n % SLICES * SLICE;
            TG_UNROLL for (int i = 0; i < 4; i++) {
                int r = lane() / 8 + 4 * i, c = lane() % 8 * 4;
                copy16_async(to.at(r, c), from + r * DK + c);
            }
        }
        copy_commit();
    };
    for (u32 n = 0; n + 1 < RING; n++) fetch(n);
    const float* start = state_at(p, p.joints, number(0), head) + col;
    for (int i = thread(); i < DK * COLS; i += THREADS) {
        u32 r = i / COLS, c = i % COLS;
        *h.at(r, c) = r < p.dk && col + c < p.dv ? start[(u64)r * p.dv + c] : 0.f;
    }
    for (u32 i = 1; i < count; i++) {
        float* to = state_at(p, p.joints, number(i), head) + col;
        auto each = [&](auto f) {
            TG_UNROLL for (int j = 0; j < NC; j++)
                TG_UNROLL for (int e = 0; e < 4; e++) {
                    u32 r = row + frag_row(e), c = 8 * j + frag_col(e);
                    f(j, e, r, c, r < p.dk && col + c < p.dv);
                }
        };
        FragC c[NC], even[NC], odd[NC]; // two sums, whose products don't wait for one another
        each([&](int j, int e, u32 r, u32 n, bool in) { c[j].v[e] = in ? to[(u64)r * p.dv + n] : 0.f; });
        zero(even);
        zero(odd);
        sync();
        TG_UNROLL for (int x = 0; x < SLICES; x++) {
            const u32 n = (i - 1) * SLICES + x;
            copy_wait<RING - 2>();
            sync_warp();
            fetch(n + RING - 1);
            const Slice map = slice(n);
            FragA<float> fa;
            load_a(fa, map.data, map.STRIDE, 0, 0);
            step_rows(even, fa, h.data, h.STRIDE, 0, x * SLICE);
            load_a(fa, map.data, map.STRIDE, 0, 16);
            step_rows(odd, fa, h.data, h.STRIDE, 0, x * SLICE + 16);
        }
        sync();
        each([&](int j, int e, u32 r, u32 n, bool in) {
            float x = c[j].v[e] + (even[j].v[e] + odd[j].v[e]);
            *h.at(r, n) = x;
            if (in) to[(u64)r * p.dv + n] = x;
        });
    }
    copy_wait<0>();
}

// T is the type that the states are of: float.
template <class T> TG_DEVICE void delta_join_decayed(const DeltaParams& p) {
    const u32 size = p.dk * p.dv, parts = div_up(size, threads()), head = block_x() / parts % p.hv, i = block_x() % parts * threads() + thread();
    u32 first, count;
    if (!joints_of(p, block_x() / parts / p.hv, first, count) || i >= size) return;
    T h = 0;
    for (u32 j = 0; j < count; j++) {
        u32 at = p.back ? first + count - 1 - j : first + j;
        // a piece's decay is kept at the joint after it
        T* to = state_at(p, p.joints, at, head) + i;
        if (j > 0) *to += p.decays[(u64)(at + p.back) * p.hv + head] * h;
        h = *to;
    }
}
