// Sums into places that indices name, in the order of the indices, so the same bits every time.
#include "prim.cuh"

struct AddParams {
    const void* x;
    const void* index;
    void* out; // zeros
    u64 outer, n, inner, length;
    Fault fault;
    u32 kind, unused;
};

// out[o][index[i]][j] += x[o][i][j]. A block has ROWS entries of the axis to itself and reads all indices, LIST of them at a time: it writes down those
// that are its own, in order, then each thread adds up its columns, AHEAD at a time, in f32 (f64 for f64) and rounds once per list.
constexpr int ROWS = 32, LIST = 2048;
template <class T> TG_DEVICE void index_add(const AddParams& p) {
    typedef Wide<T> W;
    TG_SHARED(u32, place, [LIST]);  // i within the list's range
    TG_SHARED(u8, row, [LIST]);
    TG_SHARED(u32, counts, [32]);
    u64 first = (u64)block_x() * ROWS, o = block_y();
    const T* x = (const T*)p.x + o * p.n * p.inner;
    T* out = (T*)p.out + o * p.length * p.inner;
    u32 warps = threads() / 32;
    constexpr int AHEAD = 4;
    for (u64 start = 0; start < p.n; start += LIST) {
        u32 found = 0; // the same in all threads
        i64 next = start + thread() < p.n ? read_index(p.index, p.kind, start + thread()) : -1;
        for (u32 part = 0; part < LIST && start + part < p.n; part += threads()) {
            u64 i = start + part + thread();
            i64 k = next;
            next = i + threads() < p.n ? read_index(p.index, p.kind, i + threads()) : -1; // is under way past the barriers
            if (i < p.n && (k < 0 || (u64)k >= p.length) && block_x() == 0 && o == 0) p.fault.tell(k);
            bool mine = k >= 0 && (u64)k < p.length && (u64)k >= first && (u64)k < first + ROWS;
            u32 votes = ballot(mine);
            if (lane() == 0) counts[warp()] = population(votes);
            sync();
            u32 before = found;
            for (u32 w = 0; w < warps; w++) {
                if (w < warp()) before += counts[w];
                found += counts[w];
            }
            if (mine) {
                u32 at = before + population(votes & ((1u << lane()) - 1));
                place[at] = part + thread();
                row[at] = (u8)((u64)k - first);
            }
            sync();
        }
        if (!found) continue;
        for (u32 r = 0; r < ROWS && first + r < p.length; r++) {
            bool any = false;
            for (u32 e = 0; e < found; e++) any |= row[e] == r;
            if (!any) continue;
            for (u64 first_j = thread(); first_j < p.inner; first_j += threads() * AHEAD) {
                typename W::type sum[AHEAD] = {}, old[AHEAD];
                T* to = out + (first + r) * p.inner + first_j;
                auto in = [&](int c) { return first_j + c * threads() < p.inner; };
                TG_UNROLL for (int c = 0; c < AHEAD; c++) old[c] = in(c) ? W::up(to[c * threads()]) : 0;
                for (u32 e = 0; e < found; e++) {
                    if (row[e] != r) continue;
                    const T* from = x + (start + place[e]) * p.inner + first_j;
                    TG_UNROLL for (int c = 0; c < AHEAD; c++) sum[c] += in(c) ? W::up(from[c * threads()]) : 0;
                }
                TG_UNROLL for (int c = 0; c < AHEAD; c++) if (in(c)) to[c * threads()] = W::down(old[c] + sum[c]);
            }
        }
        sync(); // the lists are written anew
    }
}

// out[o][index[o][i][j]][j] += x[o][i][j]: each thread goes along one line (o, j).
template <class T> TG_DEVICE void scatter_add(const AddParams& p) {
    typedef Wide<T> W;
    each(p.outer * p.inner, 1, [&](u64 line) {
        u64 o = line / p.inner, j = line - o * p.inner;
        for (u64 i = 0; i < p.n; i++) {
            u64 at = (o * p.n + i) * p.inner + j;
            i64 k = read_index(p.index, p.kind, at);
            if (k < 0 || (u64)k >= p.length) { p.fault.tell(k); continue; }
            T* to = (T*)p.out + (o * p.length + (u64)k) * p.inner + j;
            *to = W::down(W::up(*to) + W::up(((const T*)p.x)[at]));
        }
    });
}
// The same for few long lines: each thread has one place of the result and reads the whole line's indices.
template <class T> TG_DEVICE void scatter_add_places(const AddParams& p) {
    typedef Wide<T> W;
    each(p.outer * p.length * p.inner, 1, [&](u64 place) {
        u64 row = place / p.inner, j = place - row * p.inner, o = row / p.length, k = row - o * p.length;
        T sum = W::down(0);
        for (u64 i = 0; i < p.n; i++) {
            u64 at = (o * p.n + i) * p.inner + j;
            i64 index = read_index(p.index, p.kind, at);
            if (k == 0 && (index < 0 || (u64)index >= p.length)) p.fault.tell(index);
            if (index == (i64)k) sum = W::down(W::up(sum) + W::up(((const T*)p.x)[at]));
        }
        ((T*)p.out)[place] = sum;
    });
}
