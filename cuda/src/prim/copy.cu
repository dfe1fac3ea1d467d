// Elements that are only moved: copies of any layout, blocks of rows, selection by index. 16 bytes at a time where strides and addresses allow it.
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
