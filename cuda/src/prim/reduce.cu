// Sums and maxima along either axis of a matrix, and the running sum. The order of a sum depends on the shape alone.
#include "prim.cuh"

struct ReduceParams {
    const void* x;
    void* out;
    u64 rows, cols;
    u64 part; // elements of the reduced axis that one block takes
};
template <class F> TG_DEVICE F lowest() { return (F)-infinity(); }

// out[row][part]: block (part, row) reduces its part of a row; the grid's rows are in z and y.
template <class In, class Out, bool MAXIMUM> TG_DEVICE void reduce_rows(const ReduceParams& p) {
    typedef Acc<In> F;
    TG_SHARED(F, scratch, [32]);
    u64 row = (u64)block_z() * grid_y() + block_y();
    if (row >= p.rows) return;
    u64 from = (u64)block_x() * p.part, to = min_of(from + p.part, p.cols);
    const In* x = (const In*)p.x + row * p.cols;
    F acc = MAXIMUM ? lowest<F>() : F(0);
    for (u64 i = from + thread(); i < to; i += threads()) {
        F v = load(x[i]);
        acc = MAXIMUM ? max_of(acc, v) : acc + v;
    }
    acc = MAXIMUM ? block_reduce(acc, scratch, lowest<F>(), [](F a, F b) { return max_of(a, b); }) : block_sum(acc, scratch);
    if (thread() == 0) ((Out*)p.out)[row * grid_x() + block_x()] = store<Out>(acc);
}
// The same for short rows: a warp for each.
template <class In, class Out, bool MAXIMUM> TG_DEVICE void reduce_short_rows(const ReduceParams& p) {
    typedef Acc<In> F;
    u64 row = (u64)block_x() * (threads() / 32) + warp();
    if (row >= p.rows) return;
    const In* x = (const In*)p.x + row * p.cols;
    F acc = MAXIMUM ? lowest<F>() : F(0);
    for (u64 i = lane(); i < p.cols; i += 32) {
        F v = load(x[i]);
        acc = MAXIMUM ? max_of(acc, v) : acc + v;
    }
    acc = warp_reduce(acc, [](F a, F b) { return MAXIMUM ? max_of(a, b) : a + b; });
    if (lane() == 0) ((Out*)p.out)[row] = store<Out>(acc);
}
// out[part][col] = sum over the part's rows: 32 columns a block, every warp takes each eighth row.
template <class In, class Out> TG_DEVICE void sum_columns(const ReduceParams& p) {
    typedef Acc<In> F;
    TG_SHARED(F, parts, [8][33]);
    u64 col = (u64)block_x() * 32 + lane(), from = (u64)block_y() * p.part, to = min_of(from + p.part, p.rows);
    F acc = 0;
    if (col < p.cols)
        for (u64 r = from + warp(); r < to; r += 8) acc += load(((const In*)p.x)[r * p.cols + col]);
    parts[warp()][lane()] = acc;
    sync();
    if (warp() == 0 && col < p.cols) {
        for (int w = 1; w < 8; w++) acc += parts[w][lane()];
        ((Out*)p.out)[(u64)block_y() * p.cols + col] = store<Out>(acc);
    }
}

// Running sum along rows, a block for each: 4 elements a thread, then a scan over the warp and over the warps, and what came before is carried on.
struct ScanParams {
    const void* x;
    void* out;
    u64 rows, cols;
    u32 reverse, unused;
};
template <class T> TG_DEVICE void cumsum(const ScanParams& p) {
    typedef Acc<T> F;
    constexpr int PER = 4;
    TG_SHARED(F, sums, [32]);
    u32 warps = threads() / 32;
    for (u64 row = block_x(); row < p.rows; row += grid_x()) {
        const T* x = (const T*)p.x + row * p.cols;
        T* out = (T*)p.out + row * p.cols;
        F carry = 0;
        for (u64 start = 0; start < p.cols; start += threads() * PER) {
            u64 at = start + thread() * PER;
            F v[PER], total = 0;
            TG_UNROLL for (int i = 0; i < PER; i++) {
                u64 j = p.reverse ? p.cols - 1 - (at + i) : at + i;
                total += at + i < p.cols ? load(x[j]) : F(0);
                v[i] = total;
            }
            F scan = total;
            for (u32 by = 1; by < 32; by *= 2) {
                F below = shuffle_up(scan, by);
                if (lane() >= by) scan += below;
            }
            sync();
            if (lane() == 31) sums[warp()] = scan;
            sync();
            F before = carry;
            for (u32 w = 0; w < warps; w++) {
                if (w < warp()) before += sums[w];
                carry += sums[w];
            }
            before += scan - total;
            TG_UNROLL for (int i = 0; i < PER; i++) {
                u64 j = p.reverse ? p.cols - 1 - (at + i) : at + i;
                if (at + i < p.cols) out[j] = store<T>(before + v[i]);
            }
        }
    }
}
