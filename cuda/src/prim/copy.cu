// Elements that are only moved: copies of any layout, transposing ones through tiles, blocks of rows, selection by index. 16 bytes at a time where strides
// and addresses allow it.
#include "prim.cuh"

struct CopyParams {
    const void* x;
    void* out;
    Nest nest;
};
// out[i] = x at the nest's place
template <int BYTES> TG_DEVICE void copy_nest(const CopyParams& p) {
    typedef typename Raw<BYTES>::type T;
    each(p.nest.n, 4, [&](u64 i) {
        i64 o[1];
        offsets(p.nest, i, o);
        ((T*)p.out)[i] = ((const T*)p.x)[o[0]];
    });
}

// A copy whose source runs fastest along another axis than its result. A tile of 32 by 32 elements is read along the one and written along the other, so that
// both sides move whole sectors. Its rows in shared memory are an odd number of words apart (of pairs of words for 8 bytes): neither way do lanes share a bank.
struct TurnParams {
    const void* x;
    void* out;
    u64 rows, cols;    // of the source's fast axis (stride 1 there), of the result's (stride 1 here)
    i64 x_col, out_row; // strides of the other axis: the source's along cols, the result's along rows
    u64 down, across;  // tiles
    Nest nest;         // all other axes: source, result
};
template <int BYTES> TG_DEVICE void copy_turned(const TurnParams& p) {
    typedef typename Raw<BYTES>::type T;
    constexpr int SIDE = 32, PITCH = SIDE + (BYTES < 4 ? 4 / BYTES : 1), STEP = 8;
    TG_SHARED(T, tile, [SIDE][PITCH]);
    u32 x = thread() % SIDE, y = thread() / SIDE;
    u64 plane = p.down * p.across, tiles = plane * p.nest.n;
    for (u64 t = block_x(); t < tiles; t += grid_x()) {
        u64 batch = t / plane, rest = t - batch * plane, across = rest / p.down;
        u64 row = (rest - across * p.down) * SIDE, col = across * SIDE;
        i64 at[2];
        offsets(p.nest, batch, at);
        const T* from = (const T*)p.x + at[0];
        T* to = (T*)p.out + at[1];
        TG_UNROLL for (u32 i = 0; i < SIDE; i += STEP)
            if (row + x < p.rows && col + y + i < p.cols) tile[y + i][x] = from[(i64)(row + x) + (i64)(col + y + i) * p.x_col];
        sync();
        TG_UNROLL for (u32 i = 0; i < SIDE; i += STEP)
            if (row + y + i < p.rows && col + x < p.cols) to[(i64)(row + y + i) * p.out_row + (i64)(col + x)] = tile[x][y + i];
        sync();
    }
}

// The same for elements of 2 bytes where both sides can be moved in pairs: tiles of 64 by 64. A word of shared memory holds a pair along the source's fast
// axis; a thread takes the words of two neighbouring columns and writes their low halves to one row, their high halves to the next.
template <int> TG_DEVICE void copy_turned_pairs(const TurnParams& p) {
    constexpr int SIDE = 64, STEP = 8;
    TG_SHARED(u32, tile, [SIDE][SIDE / 2 + 1]);
    u32 x = lane(), y = warp();
    u64 plane = p.down * p.across, tiles = plane * p.nest.n;
    for (u64 t = block_x(); t < tiles; t += grid_x()) {
        u64 batch = t / plane, rest = t - batch * plane, across = rest / p.down;
        u64 row = (rest - across * p.down) * SIDE, col = across * SIDE;
        i64 at[2];
        offsets(p.nest, batch, at);
        const u16* from = (const u16*)p.x + at[0] + row + 2 * x;
        u16* to = (u16*)p.out + at[1] + col + 2 * x;
        u32 words[SIDE / STEP];
        TG_UNROLL for (u32 i = 0; i < SIDE / STEP; i++)
            if (row + 2 * x < p.rows && col + y + i * STEP < p.cols) words[i] = *(const u32*)(from + (i64)(col + y + i * STEP) * p.x_col);
        TG_UNROLL for (u32 i = 0; i < SIDE / STEP; i++) tile[y + i * STEP][x] = words[i];
        sync();
        TG_UNROLL for (u32 i = 0; i < SIDE / 2; i += STEP) {
            u64 r = row + 2 * (y + i);
            u32 a = tile[2 * x][y + i], b = tile[2 * x + 1][y + i];
            if (r < p.rows && col + 2 * x < p.cols) {
                *(u32*)(to + (i64)r * p.out_row) = (a & 0xffffu) | b << 16;
                *(u32*)(to + (i64)(r + 1) * p.out_row) = a >> 16 | (b & 0xffff0000u);
            }
        }
        sync();
    }
}

// out[r][at + c] = x[r][c] for c < width: concatenation and padding.
struct BlockParams {
    const void* x;
    void* out;
    u64 rows, width, pitch, at;
};
template <int BYTES> TG_DEVICE void copy_block(const BlockParams& p) {
    typedef typename Raw<BYTES>::type T;
    each(p.rows * p.width, 4, [&](u64 i) {
        u64 r = i / p.width, c = i - r * p.width;
        ((T*)p.out)[r * p.pitch + p.at + c] = ((const T*)p.x)[i];
    });
}

// out[o][i][j] = x[o][index[i]][j], and with `each` of its own index: x[o][index[o][i][j]][j]. A wrong index is told and its element left zero.
struct IndexParams {
    const void* x;
    const void* index;
    void* out;
    u64 outer, n, inner, length;
    Fault fault;
    u32 kind, unused;
};
template <int BYTES, bool EACH> TG_DEVICE void pick(const IndexParams& p) {
    typedef typename Raw<BYTES>::type T;
    each(p.outer * p.n * p.inner, 4, [&](u64 at) {
        u64 row = at / p.inner, j = at - row * p.inner, o = row / p.n, i = row - o * p.n;
        i64 k = read_index(p.index, p.kind, EACH ? at : i);
        bool good = k >= 0 && (u64)k < p.length;
        if (!good) p.fault.tell(k);
        T zero = {};
        ((T*)p.out)[at] = good ? ((const T*)p.x)[(o * p.length + (u64)k) * p.inner + j] : zero;
    });
}
