// Routing of a mixture of experts: which slots (token · k + choice) go to which expert, how much each counts, and the slots sorted by expert; then what
// is done row by row: the weighted sum back, the gradient of the activation, the gradient of the router.
//
// A warp has a token: softmax over all experts in f32 in shared memory, then k times the largest (the first among equals). A block has 32 tokens and
// counts how many slots of its own go to each expert. The counts of all blocks are scanned for each expert, then over experts; a slot's place is its
// expert's start, plus what earlier blocks have there, plus how many earlier slots of its block have the same expert: a stable counting sort, without
// atomics whose order matters and without a number that the host would have to know.
#include "ops.cuh"

constexpr u32 TOKENS = 32; // of a block
constexpr u32 TILE_ROWS = 128; // rows of a tile of the grouped products

struct RouteParams {
    const void* logits;
    u32* expert;  // of each slot
    float* weight; // of each slot
    float* total; // what a token's weights were divided by
    u32* counts;  // [block][expert]
    u32 n, e, k, norm;
};

// The softmax of a token's logits, by a warp.
template <class L> TG_DEVICE void softmax(const L* logits, float* probs, u32 e) {
    float top = -infinity(), sum = 0.f;
    for (u32 i = lane(); i < e; i += 32) top = max_of(top, load(logits[i]));
    top = warp_max(top);
    for (u32 i = lane(); i < e; i += 32) {
        float x = expf(load(logits[i]) - top);
        probs[i] = x;
        sum += x;
    }
    sum = 1.f / warp_sum(sum);
    for (u32 i = lane(); i < e; i += 32) probs[i] *= sum;
    sync_warp();
}

template <class L> TG_DEVICE void route(const RouteParams& p) {
    u32* counts = shared<u32>();
    float* probs = (float*)(counts + p.e) + warp() * (p.e + 2 * p.k);
    float* chosen = probs + p.e;
    u32* experts = (u32*)(chosen + p.k);
    for (u32 i = thread(); i < p.e; i += threads()) counts[i] = 0;
    sync();
    for (u32 t = warp(); t < TOKENS; t += threads() / 32) {
        u32 token = block_x() * TOKENS + t;
        if (token >= p.n) break;
        softmax((const L*)p.logits + (u64)token * p.e, probs, p.e);
        float total = 0.f;
        for (u32 j = 0; j < p.k; j++) {
            float best = 0.f;
            u32 at = ~0u;
            for (u32 i = lane(); i < p.e; i += 32) {
                float x = probs[i];
                if (x != -1.f && (at == ~0u || x > best)) best = x, at = i; // -1: taken
            }
            // probabilities are not negative, so their bits have their order (and NaN, above all numbers, still names an expert)
            u32 largest = warp_largest(at == ~0u ? 0 : float_bits(best));
            at = warp_smallest(at != ~0u && float_bits(best) == largest ? at : ~0u);
            best = bits_float(largest);
            total += best;
            if (lane() == 0) probs[at] = -1.f, chosen[j] = best, experts[j] = at, atomic_add(&counts[at], 1u);
            sync_warp();
        }
        for (u32 j = lane(); j < p.k; j += 32) {
            u64 slot = (u64)token * p.k + j;
            p.expert[slot] = experts[j];
            p.weight[slot] = p.norm ? chosen[j] / total : chosen[j];
        }
        if (lane() == 0) p.total[token] = p.norm ? total : 1.f;
        sync_warp();
    }
    sync();
    for (u32 i = thread(); i < p.e; i += threads()) p.counts[(u64)block_x() * p.e + i] = counts[i];
}

struct SortParams {
    const u32* expert;
    u32* counts;       // [block][expert]; after the scan: how many slots of earlier blocks the expert has
    u32* all;          // slots of each expert
    u32* starts;       // where each expert's slots begin in the sorted order; and where all end
    u32* tiles;        // the same in tiles of rows of the grouped products
    i64* out;          // the op's counts, or null
    u32 *order, *place; // slots in sorted order; the place of each slot
    u32 blocks, e, k, slots;
};
// A warp has an expert: an exclusive scan over blocks.
template <int> TG_DEVICE void scan_blocks(const SortParams& p) {
    u32 x = block_x() * (threads() / 32) + warp(), sum = 0;
    if (x >= p.e) return;
    for (u32 start = 0; start < p.blocks; start += 32) {
        u32 b = start + lane();
        u32 own = b < p.blocks ? p.counts[(u64)b * p.e + x] : 0, upto = own;
        TG_UNROLL for (u32 by = 1; by < 32; by *= 2) {
            u32 other = shuffle_up(upto, by);
            if (lane() >= by) upto += other;
        }
        if (b < p.blocks) p.counts[(u64)b * p.e + x] = sum + upto - own;
        sum += shuffle(upto, 31);
    }
    if (lane() == 0) p.all[x] = sum;
}
// One warp: an exclusive scan over experts.
template <int> TG_DEVICE void scan_experts(const SortParams& p) {
    u32 rows = 0, tiles = 0;
    for (u32 start = 0; start < p.e; start += 32) {
        u32 x = start + lane();
        u32 own = x < p.e ? p.all[x] : 0, own_tiles = div_up(own, TILE_ROWS), r = own, t = own_tiles;
        TG_UNROLL for (u32 by = 1; by < 32; by *= 2) {
            u32 other = shuffle_up(r, by), other_tiles = shuffle_up(t, by);
            if (lane() >= by) r += other, t += other_tiles;
        }
        if (x < p.e) {
            p.starts[x] = rows + r - own;
            p.tiles[x] = tiles + t - own_tiles;
            if (p.out) p.out[x] = own;
        }
        rows += shuffle(r, 31);
        tiles += shuffle(t, 31);
    }
    if (lane() == 0) p.starts[p.e] = rows, p.tiles[p.e] = tiles;
}
template <int> TG_DEVICE void sort_slots(const SortParams& p) {
    u32* experts = shared<u32>();
    u32 first = block_x() * TOKENS * p.k, n = min_of(TOKENS * p.k, p.slots - first);
    for (u32 i = thread(); i < n; i += threads()) experts[i] = p.expert[first + i];
    sync();
    for (u32 i = thread(); i < n; i += threads()) {
        u32 x = experts[i], before = 0;
        for (u32 j = 0; j < i; j++) before += experts[j] == x;
        u32 at = p.starts[x] + p.counts[(u64)block_x() * p.e + x] + before;
        p.order[at] = first + i;
        p.place[first + i] = at;
    }
}

// y[token] = Σ over its slots, in order, of weight · rows[place]. A thread has a vector of 16 bytes of a token.
struct CombineParams {
    const void* rows;
    void* y;
    const float* weight; // null: 1
    const u32* place;
    u64 n; // vectors
    FastDiv per_row;
    u32 k, width, wide, many, unused; // many: n needs 64 bits
};
// The vector at column c of a token; WIDE: all vectors are whole and aligned.
template <class T, bool WIDE> TG_DEVICE void combine_vector(const CombineParams& p, u64 token, u32 c) {
    constexpr int N = Vec<T>::N, AHEAD = 6;
    int n = WIDE ? N : (int)(p.width - c);
    const T* rows = (const T*)p.rows + c;
    float y[N] = {};
    // six slots at a time: their places are read before their rows, their rows before they are added
    for (u32 j = 0; j < p.k; j += AHEAD) {
        u64 slot = token * p.k + j;
        int some = (int)min_of<u32>(p.k - j, AHEAD);
        u32 place[AHEAD];
        float w[AHEAD];
        Pack<T, N> row[AHEAD];
        TG_UNROLL for (int s = 0; s < AHEAD; s++) place[s] = s < some ? p.place[slot + s] : 0, w[s] = s < some && p.weight ? p.weight[slot + s] : 1.f;
        TG_UNROLL for (int s = 0; s < AHEAD; s++)
            if (s < some) read_raw(row[s], rows + (u64)place[s] * p.width, WIDE, n);
        TG_UNROLL for (int s = 0; s < AHEAD; s++)
            if (s < some) { TG_UNROLL for (int u = 0; u < N; u++) y[u] += w[s] * load(row[s].t[u]); }
    }
    write((T*)p.y + token * p.width + c, y, WIDE, n);
}
template <class T> TG_DEVICE void combine(const CombineParams& p) {
    u64 i = (u64)block_x() * threads() + thread();
    if (i >= p.n) return;
    u64 token = p.many ? i / p.per_row.divisor : p.per_row.div((u32)i);
    u32 c = (u32)(i - token * p.per_row.divisor) * Vec<T>::N;
    if (p.wide) combine_vector<T, true>(p, token, c);
    else combine_vector<T, false>(p, token, c);
}

// A warp has a row in sorted order. From the gradient of the activation (not weighted yet) to those of the projections and of the slot's weight
// (<dy, act downᵀ> = <dy down, act>: the expert's output is not needed); and the weighted activation, for the gradient of the down projection.
struct ActivationParams {
    const float *projections, *weight; // projections [slots, 2I]
    const void* dact;
    void *dprojections, *act;
    float* dweight; // of each slot
    const u32* order;
    u32 slots, width, wide, unused;
};
template <class T> TG_DEVICE void activation_backward(const ActivationParams& p) {
    constexpr int N = Vec<T>::N;
    u32 row = block_x() * (threads() / 32) + warp();
    if (row >= p.slots) return;
    u32 slot = p.order[row];
    float w = p.weight[slot], inner = 0.f;
    const float* gu = p.projections + (u64)row * 2 * p.width;
    const T* dact = (const T*)p.dact + (u64)row * p.width;
    T *act = (T*)p.act + (u64)row * p.width, *dgu = (T*)p.dprojections + (u64)row * 2 * p.width;
    for (u32 c = lane() * N; c < p.width; c += 32 * N) {
        int n = (int)(p.width - c);
        float g[N], u[N], d[N], a[N];
        read(g, gu + c, p.wide, n);
        read(u, gu + p.width + c, p.wide, n);
        read(d, dact + c, p.wide, n);
        TG_UNROLL for (int i = 0; i < N; i++) {
            float s = Sigmoid<T>::of(g[i]), silu = g[i] * s, up = u[i];
            a[i] = silu * up;
            inner += a[i] * d[i];
            a[i] *= w;
            u[i] = w * d[i] * silu;
            g[i] = w * d[i] * up * s * (1.f + g[i] * (1.f - s));
        }
        write(act + c, a, p.wide, n);
        write(dgu + c, g, p.wide, n);
        write(dgu + p.width + c, u, p.wide, n);
    }
    inner = warp_sum(inner);
    if (lane() == 0) p.dweight[slot] = inner;
}

// A warp has a token: through the renormalisation, then the softmax.
struct RouterParams {
    const void* logits;
    void* dlogits;
    const u32* expert;
    const float *weight, *total, *dweight;
    u32 n, e, k, norm;
};
template <class L> TG_DEVICE void router_backward(const RouterParams& p) {
    float *probs = shared<float>() + warp() * 2 * p.e, *d = probs + p.e;
    u32 token = block_x() * (threads() / 32) + warp();
    if (token >= p.n) return;
    softmax((const L*)p.logits + (u64)token * p.e, probs, p.e);
    for (u32 i = lane(); i < p.e; i += 32) d[i] = 0.f;
    sync_warp();
    u64 slot = (u64)token * p.k;
    float mean = 0.f, inner = 0.f;
    if (p.norm) for (u32 j = 0; j < p.k; j++) mean += p.dweight[slot + j] * p.weight[slot + j];
    float share = 1.f / p.total[token];
    for (u32 j = 0; j < p.k; j++) {
        u32 x = p.expert[slot + j];
        float dp = (p.dweight[slot + j] - mean) * share;
        inner += dp * probs[x];
        if (lane() == 0) d[x] = dp;
    }
    sync_warp();
    L* out = (L*)p.dlogits + (u64)token * p.e;
    for (u32 i = lane(); i < p.e; i += 32) out[i] = store<L>(probs[i] * (d[i] - inner));
}
