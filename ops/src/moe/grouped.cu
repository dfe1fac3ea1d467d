// Matrix products of a mixture of experts on tensor cores (mma.sync, from sm_80 on; on Hopper those in bf16 are grouped_hopper.cu's): for each expert the rows that were sorted to it, with its matrix.
//
// grouped_rows: C[row] = A[row] · B[expert of row]. Blocks take tiles of 128 rows of one expert × 128 columns; which expert a tile belongs to is found by
// bisection in the scan of tiles that routing left in memory, so the launch has as many tiles as there could be at most, and those beyond end at once.
// Rows of A may be read through the permutation (no gathered copy is made). MODE 0: B is [columns, depth]; 1: the same with gate and up projection side
// by side in a tile, so that the epilogue has both and writes the projections (f32, for the backward) and silu(gate) · up; 2: B is [depth, columns].
//
// grouped_weights: C[expert] = Aᵀ B over the expert's rows, one of A and B read through the permutation; a block has 128 × 128 of one expert's matrix
// and goes over its rows in order; an expert without rows gets zeros. C's dtype is the weight's, f32 where it is kept so.
//
// Depth goes in steps of 32 through 3 stages of asynchronous copies (2 in f32), one barrier a step. 8 warps have 32 × 64 each: 64 accumulators a thread,
// 16 mma for 6 ldmatrix a step of 16. bf16: 60 KB of shared memory, 2 blocks on a multiprocessor. A tile of 128 × 128 reads (128 + 128) · 2 bytes for
// 32768 FLOP a unit of depth, 64 FLOP a byte from the second-level cache; blocks that run together share rows and, within an expert, its matrix.
#include "tile.cuh"

constexpr int BM = 128, BN = 128, BK = 32, WARPS = 8;
template <class T> struct Stages { static constexpr int N = 3; };
template <> struct Stages<float> { static constexpr int N = 2; };

struct GroupedParams {
    const void *a, *b;
    void *c, *act;      // MODE 1: c in f32, and silu(gate) · up
    const u32* order;   // slots in sorted order; a token is slot / k
    const u32 *starts, *tiles; // first row and first tile of each expert, and the ends
    FastDiv k, across;  // across: tiles of columns
    u32 experts, rows_of, cols, depth; // of C: rows (of an expert's matrix) and columns; depth of the product
    u32 gather;         // whether A's rows (grouped_rows) are read through the permutation
    FastDiv each;       // grouped_hopper.cu alone
};

// Two neighbouring fragments of B.
TG_DEVICE void load_b2(FragB<bf16>& f, FragB<bf16>& g, const bf16* tile, int stride, int col, int k) {
    int l = lane();
    u32 r[4];
    ldmatrix4(r, tile + (col + (l & 7) + (l >> 4) * 8) * stride + k + ((l >> 3) & 1) * 8);
    f.r[0][0] = r[0], f.r[0][1] = r[1], g.r[0][0] = r[2], g.r[0][1] = r[3];
}
TG_DEVICE void load_b2_trans(FragB<bf16>& f, FragB<bf16>& g, const bf16* tile, int stride, int col, int k) {
    int l = lane();
    u32 r[4];
    ldmatrix4_trans(r, tile + (k + (l & 15)) * stride + col + (l >> 4) * 8);
    f.r[0][0] = r[0], f.r[0][1] = r[1], g.r[0][0] = r[2], g.r[0][1] = r[3];
}
TG_DEVICE void load_b2(FragB<float>& f, FragB<float>& g, const float* tile, int stride, int col, int k) {
    load_b(f, tile, stride, col, k), load_b(g, tile, stride, col + 8, k);
}
TG_DEVICE void load_b2_trans(FragB<float>& f, FragB<float>& g, const float* tile, int stride, int col, int k) {
    load_b_trans(f, tile, stride, col, k), load_b_trans(g, tile, stride, col + 8, k);
}

// As load_tile, for rows anywhere: `row(r)` tells which.
template <class T, int ROWS, int COLS, class F> TG_DEVICE void load_rows(const Tile<T, ROWS, COLS>& tile, const T* from, i64 stride, int rows, int cols, F row) {
    constexpr int N = Vec<T>::N, PER_ROW = COLS / N;
    bool whole = aligned16(from) && (stride * sizeof(T)) % 16 == 0;
    TG_UNROLL for (int j = 0; j < ROWS * PER_ROW / (WARPS * 32); j++) {
        int i = (int)thread() + j * WARPS * 32, r = i / PER_ROW, c = i % PER_ROW * N;
        T* to = tile.at(r, c);
        bool in = r < rows && c + N <= cols;
        const T* at = r < rows ? from + (i64)row(r) * stride + c : from;
        if (whole && (in || r >= rows || c >= cols)) copy16_async(to, in ? at : from, in);
        else { TG_UNROLL for (int u = 0; u < N; u++) to[u] = r < rows && c + u < cols ? at[u] : T{}; }
    }
}

// Columns col and col + 1 of a row, as far as they are there.
template <class T> TG_DEVICE void store_pair(T* row, u32 col, u32 cols, float x, float y) {
    if (col < cols) row[col] = store<T>(x);
    if (col + 1 < cols) row[col + 1] = store<T>(y);
}
template <> TG_DEVICE void store_pair<bf16>(bf16* row, u32 col, u32 cols, float x, float y) {
    if (cols % 2 == 0) {
        if (col < cols) *(u32*)(row + col) = pack_bf16(x, y);
    } else {
        if (col < cols) row[col] = round_bf16(x);
        if (col + 1 < cols) row[col + 1] = round_bf16(y);
    }
}

template <class T, int MODE> TG_DEVICE void grouped_rows(const GroupedParams& p) {
    constexpr int S = Stages<T>::N;
    typedef Tile<T, BM, BK> A;
    typedef Tile<T, BN, BK> B;  // MODE 0 and 1
    typedef Tile<T, BK, BN> Bt; // MODE 2
    constexpr int B_BYTES = MODE == 2 ? Bt::BYTES : B::BYTES, STAGE = A::BYTES + B_BYTES;
    TG_SHARED(u32, source, [BM]);
    u32 tile, across;
    p.across.divmod(block_x(), tile, across);
    if (tile >= p.tiles[p.experts]) return;
    u32 e = 0, high = p.experts; // the last expert whose tiles begin at this one or before
    while (high - e > 1) {
        u32 middle = (e + high) / 2;
        if (p.tiles[middle] <= tile) e = middle;
        else high = middle;
    }
    u32 first = p.starts[e] + (tile - p.tiles[e]) * BM;
    int rows = (int)min_of<u32>(BM, p.starts[e + 1] - first);
    // MODE 1: a tile has 64 columns of either projection
    u32 width = MODE == 1 ? p.cols / 2 : p.cols, n0 = across * (MODE == 1 ? BN / 2 : BN);
    for (u32 r = thread(); r < BM; r += WARPS * 32) source[r] = (int)r < rows ? (p.gather ? p.k.div(p.order[first + r]) : first + r) : 0;
    sync();
    const T *a = (const T*)p.a, *b = (const T*)p.b + (u64)e * p.cols * p.depth;
    auto stage = [&](int s) { return shared<u8>(s * STAGE); };
    int steps = (int)div_up(p.depth, BK);
    auto bring = [&](int step) {
        if (step < steps) {
            int k0 = step * BK, left = (int)p.depth - k0;
            u8* at = stage(step % S);
            T* bt = (T*)(at + A::BYTES);
            load_rows(A{(T*)at}, a + k0, p.depth, rows, left, [&](int r) { return source[r]; });
            if (MODE == 0) load_tile(B{bt}, b + (u64)n0 * p.depth + k0, p.depth, (int)(width - n0), left, thread(), WARPS * 32);
            if (MODE == 1) {
                typedef Tile<T, BN / 2, BK> Half;
                load_tile(Half{bt}, b + (u64)n0 * p.depth + k0, p.depth, (int)(width - n0), left, thread(), WARPS * 32);
                load_tile(Half{bt + BN / 2 * Half::STRIDE}, b + (u64)(width + n0) * p.depth + k0, p.depth, (int)(width - n0), left, thread(), WARPS * 32);
            }
            if (MODE == 2) load_tile(Bt{bt}, b + (u64)k0 * p.cols + n0, p.cols, left, (int)(width - n0), thread(), WARPS * 32);
        }
        copy_commit();
    };
    int row = (int)(warp() % 4) * 32, col = (int)(warp() / 4);
    // where fragment i's columns are in the tile
    auto column = [&](int i) { return MODE == 1 ? (i < 4 ? col * 32 + 8 * i : BN / 2 + col * 32 + 8 * (i - 4)) : col * 64 + 8 * i; };
    FragC c[2][8];
    TG_UNROLL for (int i = 0; i < 8; i++) c[0][i].zero(), c[1][i].zero();
    for (int s = 0; s < S - 1; s++) bring(s);
    for (int step = 0; step < steps; step++) {
        copy_wait<S - 2>();
        sync();
        bring(step + S - 1);
        const T *at = (const T*)stage(step % S), *bt = (const T*)(stage(step % S) + A::BYTES);
        TG_UNROLL for (int k = 0; k < BK; k += 16) {
            FragA<T> fa[2];
            load_a(fa[0], at, A::STRIDE, row, k);
            load_a(fa[1], at, A::STRIDE, row + 16, k);
            TG_UNROLL for (int i = 0; i < 8; i += 2) {
                FragB<T> f, g;
                if (MODE == 2) load_b2_trans(f, g, bt, Bt::STRIDE, column(i), k);
                else load_b2(f, g, bt, B::STRIDE, column(i), k);
                TG_UNROLL for (int m = 0; m < 2; m++) mma(c[m][i], fa[m], f), mma(c[m][i + 1], fa[m], g);
            }
        }
    }
    copy_wait<0>();
    TG_UNROLL for (int m = 0; m < 2; m++)
        TG_UNROLL for (int h = 0; h < 4; h += 2) {
            int r = row + 16 * m + frag_row(h);
            if (r >= rows) continue;
            u64 at = first + r;
            if (MODE == 1) {
                float* gu = (float*)p.c + at * p.cols;
                T* act = (T*)p.act + at * width;
                TG_UNROLL for (int i = 0; i < 4; i++) {
                    u32 n = n0 + column(i) + frag_col(h);
                    float g0 = c[m][i].v[h], g1 = c[m][i].v[h + 1], u0 = c[m][i + 4].v[h], u1 = c[m][i + 4].v[h + 1];
                    store_pair(gu, n, width, g0, g1);
                    store_pair(gu + width, n, width, u0, u1);
                    store_pair(act, n, width, g0 * sigmoid(g0) * u0, g1 * sigmoid(g1) * u1);
                }
            } else {
                T* out = (T*)p.c + at * p.cols;
                TG_UNROLL for (int i = 0; i < 8; i++) store_pair(out, n0 + column(i) + frag_col(h), width, c[m][i].v[h], c[m][i].v[h + 1]);
            }
        }
}

template <class T, class O, bool GATHER_A> TG_DEVICE void grouped_weights(const GroupedParams& p) {
    constexpr int S = Stages<T>::N;
    typedef Tile<T, BK, BM> A;
    typedef Tile<T, BK, BN> B;
    constexpr int STAGE = A::BYTES + B::BYTES;
    u32 e = block_y(), down, across;
    p.across.divmod(block_x(), down, across);
    u32 m0 = down * BM, n0 = across * BN, first = p.starts[e];
    int depth = (int)(p.starts[e + 1] - first), steps = (depth + BK - 1) / BK;
    auto stage = [&](int s) { return shared<u8>(s * STAGE); };
    auto bring = [&](int step) {
        if (step < steps) {
            u32 k0 = first + step * BK;
            int left = depth - step * BK;
            u8* at = stage(step % S);
            auto here = [&](int r) { return k0 + r; };
            auto token = [&](int r) { return p.k.div(p.order[k0 + r]); };
            if (GATHER_A) {
                load_rows(A{(T*)at}, (const T*)p.a + m0, p.rows_of, left, (int)(p.rows_of - m0), token);
                load_rows(B{(T*)(at + A::BYTES)}, (const T*)p.b + n0, p.cols, left, (int)(p.cols - n0), here);
            } else {
                load_rows(A{(T*)at}, (const T*)p.a + m0, p.rows_of, left, (int)(p.rows_of - m0), here);
                load_rows(B{(T*)(at + A::BYTES)}, (const T*)p.b + n0, p.cols, left, (int)(p.cols - n0), token);
            }
        }
        copy_commit();
    };
    int row = (int)(warp() % 4) * 32, col = (int)(warp() / 4) * 64;
    FragC c[2][8];
    TG_UNROLL for (int i = 0; i < 8; i++) c[0][i].zero(), c[1][i].zero();
    for (int s = 0; s < S - 1; s++) bring(s);
    for (int step = 0; step < steps; step++) {
        copy_wait<S - 2>();
        sync();
        bring(step + S - 1);
        const T *at = (const T*)stage(step % S), *bt = (const T*)(stage(step % S) + A::BYTES);
        TG_UNROLL for (int k = 0; k < BK; k += 16) {
            FragA<T> fa[2];
            load_a_trans(fa[0], at, A::STRIDE, row, k);
            load_a_trans(fa[1], at, A::STRIDE, row + 16, k);
            TG_UNROLL for (int i = 0; i < 8; i += 2) {
                FragB<T> f, g;
                load_b2_trans(f, g, bt, B::STRIDE, col + 8 * i, k);
                TG_UNROLL for (int m = 0; m < 2; m++) mma(c[m][i], fa[m], f), mma(c[m][i + 1], fa[m], g);
            }
        }
    }
    copy_wait<0>();
    O* out = (O*)p.c + (u64)e * p.rows_of * p.cols;
    TG_UNROLL for (int m = 0; m < 2; m++)
        TG_UNROLL for (int h = 0; h < 4; h += 2) {
            u32 r = m0 + row + 16 * m + frag_row(h);
            if (r >= p.rows_of) continue;
            TG_UNROLL for (int i = 0; i < 8; i++) store_pair(out + (u64)r * p.cols, n0 + col + 8 * i + frag_col(h), p.cols, c[m][i].v[h], c[m][i].v[h + 1]);
        }
}
