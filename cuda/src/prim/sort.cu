// Arg-max, the k largest, and sorting along rows; stable, NaN the largest. All compare 64-bit keys in the order of the values, equals by their place.
#include "prim.cuh"

struct PickParams {
    const void* x;
    void* values; // null: indices alone
    i64* index;
    u64 rows, cols;
    u32 k, unused;
};
struct Best { u64 key; u32 at; };
// Whether a comes before b in falling order.
TG_DEVICE bool before(u64 ka, u32 a, u64 kb, u32 b) { return ka > kb || (ka == kb && a < b); }
TG_DEVICE Best better(Best a, Best b) { return before(a.key, a.at, b.key, b.at) ? a : b; }

// A block for each row, k times over it: the best of those that come after the last one found.
template <class T> TG_DEVICE void top(const PickParams& p) {
    TG_SHARED(u64, keys, [32]);
    TG_SHARED(u32, places, [32]);
    u64 row = block_x();
    const T* x = (const T*)p.x + row * p.cols;
    Best last = {0, 0};
    for (u32 j = 0; j < p.k; j++) {
        Best b = {0, 0xffffffffu};
        for (u32 i = thread(); i < p.cols; i += threads()) {
            u64 key = Ordered<T>::key(x[i]);
            if ((j == 0 || before(last.key, last.at, key, i)) && before(key, i, b.key, b.at)) b = {key, i};
        }
        for (u32 m = 16; m > 0; m >>= 1) b = better(b, Best{shuffle_xor(b.key, m), shuffle_xor(b.at, m)});
        sync();
        if (lane() == 0) keys[warp()] = b.key, places[warp()] = b.at;
        sync();
        b = {0, 0xffffffffu};
        for (u32 w = 0; w < threads() / 32; w++) b = better(b, Best{keys[w], places[w]});
        last = b;
        if (thread() == 0) {
            p.index[row * p.k + j] = b.at;
            if (p.values) ((T*)p.values)[row * p.k + j] = x[b.at];
        }
    }
}

// The same for short rows: a warp for each, with elements lane + 32v, v < V, as 32-bit keys in registers; k is at most 32, and lane j keeps the j-th.
template <class T, int V> TG_DEVICE void top_short(const PickParams& p) {
    u64 row = (u64)block_x() * (threads() / 32) + warp();
    if (row >= p.rows) return;
    const T* x = (const T*)p.x + row * p.cols;
    u32 key[V], left = 0, mine = 0; // left: bit v is set while the element is not taken
    TG_UNROLL for (u32 v = 0; v < V; v++) {
        u32 i = lane() + 32 * v;
        key[v] = i < p.cols ? Narrow<T>::key(x[i]) : 0;
        left |= (u32)(i < p.cols) << v;
    }
    for (u32 j = 0; j < p.k; j++) {
        u32 best = 0, at = ~0u;
        TG_UNROLL for (u32 v = 0; v < V; v++)
            if (left >> v & 1 && (at == ~0u || key[v] > best)) best = key[v], at = v;
        u32 largest = warp_largest(best), place = at != ~0u && best == largest ? lane() + 32 * at : ~0u;
        u32 first = warp_smallest(place);
        if (place == first) left &= ~(1u << at);
        if (lane() == j) mine = first;
    }
    if (lane() < p.k) {
        p.index[row * p.k + lane()] = mine;
        if (p.values) ((T*)p.values)[row * p.k + lane()] = x[mine];
    }
}

// Bitonic sorting (Batcher, 1968) of rows padded to a power of two, keys and places in memory of their own; strides below a tile's go in shared memory.
struct SortParams {
    const void* x;
    u64* keys;
    u32* places;
    void* values;
    i64* index;
    u64 rows, cols, padded;
    u32 descending, k, j, out_cols;
};
constexpr u32 TILE = 1024;

template <class T> TG_DEVICE void sort_keys(const SortParams& p) {
    each(p.rows * p.padded, 4, [&](u64 i) {
        u64 row = i / p.padded, c = i - row * p.padded;
        u64 key = ~0ull;
        if (c < p.cols) {
            key = Ordered<T>::key(((const T*)p.x)[row * p.cols + c]);
            if (p.descending) key = ~key;
        }
        p.keys[i] = key;
        p.places[i] = (u32)c; // what pads a row comes after all equal keys
    });
}
TG_DEVICE void exchange(u64& ka, u32& a, u64& kb, u32& b, bool up) {
    bool wrong = ka > kb || (ka == kb && a > b);
    if (wrong == up) {
        u64 k = ka;
        u32 t = a;
        ka = kb, a = b, kb = k, b = t;
    }
}
// One pass at a stride of at least a tile. Pairs of all rows are numbered through: a padded row is a power of two.
template <int> TG_DEVICE void sort_pass(const SortParams& p) {
    each(p.rows * p.padded / 2, 1, [&](u64 t) {
        u64 i = (t / p.j) * 2 * p.j + t % p.j;
        bool up = ((i % p.padded) & p.k) == 0;
        exchange(p.keys[i], p.places[i], p.keys[i + p.j], p.places[i + p.j], up);
    });
}
// All passes of a tile: with ALL from pairs up to runs of a tile, else those left of one size k.
template <bool ALL> TG_DEVICE void sort_tile(const SortParams& p) {
    TG_SHARED(u64, keys, [TILE]);
    TG_SHARED(u32, places, [TILE]);
    u32 tile = (u32)min_of<u64>(TILE, p.padded);
    u64 start = (u64)block_x() * tile;
    for (u32 i = thread(); i < tile; i += threads()) keys[i] = p.keys[start + i], places[i] = p.places[start + i];
    sync();
    for (u64 k = ALL ? 2 : p.k; k <= (ALL ? tile : (u64)p.k); k *= 2)
        for (u32 j = (u32)min_of<u64>(k / 2, tile / 2); j > 0; j /= 2) {
            for (u32 t = thread(); t < tile / 2; t += threads()) {
                u32 i = t / j * 2 * j + t % j;
                bool up = (((start + i) % p.padded) & k) == 0;
                exchange(keys[i], places[i], keys[i + j], places[i + j], up);
            }
            sync();
        }
    for (u32 i = thread(); i < tile; i += threads()) p.keys[start + i] = keys[i], p.places[start + i] = places[i];
}
template <int BYTES> TG_DEVICE void sort_values(const SortParams& p) {
    typedef typename Raw<BYTES>::type T;
    each(p.rows * p.out_cols, 4, [&](u64 i) {
        u64 row = i / p.out_cols, c = i - row * p.out_cols;
        u32 at = p.places[row * p.padded + c];
        ((T*)p.values)[i] = ((const T*)p.x)[row * p.cols + at];
        p.index[i] = at;
    });
}
