// Matrix tiles on tensor cores, one source for bf16 and f32: fragments of m16n8k16, loads from shared memory, products.
//
// f32 inputs are split into three bf16 each and six products are summed, smallest first (error about 1e-7 of |a|·|b|); bf16 inputs take one product.
// A warp computes; every function here is called by all 32 lanes with the same tile arguments.
#pragma once
#include "tidegate.cuh"

// Elements that a row of a shared tile is padded by, so that the 8 rows that a fragment reads lie in different banks. COLS is a multiple of 16 (bf16) or 8 (f32).
template <class T> struct TilePad;
template <> struct TilePad<bf16> { static constexpr int of(int cols) { return (cols / 8) % 2 == 0 ? 8 : 0; } };
template <> struct TilePad<float> { static constexpr int of(int cols) { return (8 - cols % 32 + 32) % 32; } };

// A tile in shared memory: ROWS × COLS, rows STRIDE elements apart and aligned to 16 bytes.
template <class T, int ROWS, int COLS> struct Tile {
    static constexpr int STRIDE = COLS + TilePad<T>::of(COLS);
    static constexpr int BYTES = ROWS * STRIDE * sizeof(T);
    T* data;
    TG_DEVICE T* at(int row, int col) const { return data + row * STRIDE + col; }
};

// Number of bf16 parts that an element is computed from.
template <class T> struct Parts { static constexpr int N = 1; };
template <> struct Parts<float> { static constexpr int N = 3; };

template <class T> struct FragA { u32 r[Parts<T>::N][4]; };
template <class T> struct FragB { u32 r[Parts<T>::N][2]; };
struct FragC {
    float v[4];
    TG_DEVICE void zero() { v[0] = v[1] = v[2] = v[3] = 0.f; }
};
// Place of element i of an accumulator fragment in its 16 × 8 tile.
TG_DEVICE int frag_row(int i) { return (int)(lane() >> 2) + (i >> 1) * 8; }
TG_DEVICE int frag_col(int i) { return (int)(lane() & 3) * 2 + (i & 1); }

// Two floats as three pairs of bf16 that add up to them (8 + 8 + 8 bits of 24), by integer operations alone: conversions have a quarter of their rate.
// A NaN stays one in the last part.
TG_DEVICE float round_high(float x) { return bits_float((float_bits(x) + 0x8000u) & 0xffff0000u); }
TG_DEVICE u32 high_halves(float low, float high) { return float_bits(low) >> 16 | (float_bits(high) & 0xffff0000u); }
TG_DEVICE void split_pair(float x, float y, u32& a, u32& b, u32& c) {
    float x0 = round_high(x), y0 = round_high(y);
    a = high_halves(x0, y0);
    x -= x0;
    y -= y0;
    float x1 = round_high(x), y1 = round_high(y);
    b = high_halves(x1, y1);
    c = high_halves(x - x1, y - y1);
}

// c += a · b
TG_DEVICE void mma(FragC& c, const FragA<bf16>& a, const FragB<bf16>& b) { mma_16x8x16(c.v, a.r[0], b.r[0]); }
TG_DEVICE void mma(FragC& c, const FragA<float>& a, const FragB<float>& b) {
    mma_16x8x16(c.v, a.r[2], b.r[0]);
    mma_16x8x16(c.v, a.r[0], b.r[2]);
    mma_16x8x16(c.v, a.r[1], b.r[1]);
    mma_16x8x16(c.v, a.r[1], b.r[0]);
    mma_16x8x16(c.v, a.r[0], b.r[1]);
    mma_16x8x16(c.v, a.r[0], b.r[0]);
}

// A's fragment of rows row.. + 16, columns k.. + 16 of a tile whose rows are A's rows.
TG_DEVICE void load_a(FragA<bf16>& f, const bf16* tile, int stride, int row, int k) {
    int l = lane();
    ldmatrix4(f.r[0], tile + (row + (l & 15)) * stride + k + (l >> 4) * 8);
}
TG_DEVICE void load_a(FragA<float>& f, const float* tile, int stride, int row, int k) {
    int g = lane() >> 2, t = lane() & 3;
    TG_UNROLL for (int i = 0; i < 4; i++) {
        const float* p = tile + (row + g + (i & 1) * 8) * stride + k + 2 * t + (i >> 1) * 8;
        split_pair(p[0], p[1], f.r[0][i], f.r[1][i], f.r[2][i]);
    }
}
// The same of a tile whose rows are A's columns: tile[k][row].
TG_DEVICE void load_a_trans(FragA<bf16>& f, const bf16* tile, int stride, int row, int k) {
    int l = lane(); // matrices in order (row, k), (row + 8, k), (row, k + 8), (row + 8, k + 8)
    ldmatrix4_trans(f.r[0], tile + (k + (l & 7) + (l >> 4) * 8) * stride + row + ((l >> 3) & 1) * 8);
}
TG_DEVICE void load_a_trans(FragA<float>& f, const float* tile, int stride, int row, int k) {
    int g = lane() >> 2, t = lane() & 3;
    TG_UNROLL for (int i = 0; i < 4; i++) {
        const float* p = tile + (k + 2 * t + (i >> 1) * 8) * stride + row + g + (i & 1) * 8;
        split_pair(p[0], p[stride], f.r[0][i], f.r[1][i], f.r[2][i]);
    }
}
// B's fragment of depth k.. + 16, columns col.. + 8 of a tile whose rows are B's columns: tile[col][k] (as K in Q Kᵀ).
TG_DEVICE void load_b(FragB<bf16>& f, const bf16* tile, int stride, int col, int k) {
    int l = lane() & 15;
    ldmatrix2(f.r[0], tile + (col + (l & 7)) * stride + k + (l >> 3) * 8);
}
TG_DEVICE void load_b(FragB<float>& f, const float* tile, int stride, int col, int k) {
    int g = lane() >> 2, t = lane() & 3;
    TG_UNROLL for (int i = 0; i < 2; i++) {
        const float* p = tile + (col + g) * stride + k + 2 * t + i * 8;
        split_pair(p[0], p[1], f.r[0][i], f.r[1][i], f.r[2][i]);
    }
}
// The same of a tile whose rows are B's rows: tile[k][col] (as V in P V).
TG_DEVICE void load_b_trans(FragB<bf16>& f, const bf16* tile, int stride, int col, int k) {
    int l = lane() & 15;
    ldmatrix2_trans(f.r[0], tile + (k + l) * stride + col);
}
TG_DEVICE void load_b_trans(FragB<float>& f, const float* tile, int stride, int col, int k) {
    int g = lane() >> 2, t = lane() & 3;
    TG_UNROLL for (int i = 0; i < 2; i++) {
        const float* p = tile + (k + 2 * t + i * 8) * stride + col + g;
        split_pair(p[0], p[stride], f.r[0][i], f.r[1][i], f.r[2][i]);
    }
}
// Two neighbouring accumulators (columns 0..8 and 8..16 of a 16 × 16 tile) as A's fragment: a product's result goes into the next product in registers.
TG_DEVICE void to_a(FragA<bf16>& f, const FragC& lo, const FragC& hi) {
    f.r[0][0] = pack_bf16(lo.v[0], lo.v[1]);
    f.r[0][1] = pack_bf16(lo.v[2], lo.v[3]);
    f.r[0][2] = pack_bf16(hi.v[0], hi.v[1]);
    f.r[0][3] = pack_bf16(hi.v[2], hi.v[3]);
}
TG_DEVICE void to_a(FragA<float>& f, const FragC& lo, const FragC& hi) {
    split_pair(lo.v[0], lo.v[1], f.r[0][0], f.r[1][0], f.r[2][0]);
    split_pair(lo.v[2], lo.v[3], f.r[0][1], f.r[1][1], f.r[2][1]);
    split_pair(hi.v[0], hi.v[1], f.r[0][2], f.r[1][2], f.r[2][2]);
    split_pair(hi.v[2], hi.v[3], f.r[0][3], f.r[1][3], f.r[2][3]);
}

// c[i] += A[row.. + 16, 0..K] · B[0..K, 8i.. + 8 from col] with A row-major and B as columns: `c = A Bᵀ` of two row-major tiles.
template <class T, int K, int N> TG_DEVICE void mma_abt(FragC (&c)[N], const T* a, int sa, int row, const T* b, int sb, int col) {
    TG_UNROLL for (int k = 0; k < K; k += 16) {
        FragA<T> fa;
        load_a(fa, a, sa, row, k);
        TG_UNROLL for (int i = 0; i < N; i++) {
            FragB<T> fb;
            load_b(fb, b, sb, col + 8 * i, k);
            mma(c[i], fa, fb);
        }
    }
}
// The same with B row-major: `c = A B`.
template <class T, int K, int N> TG_DEVICE void mma_ab(FragC (&c)[N], const T* a, int sa, int row, const T* b, int sb, int col) {
    TG_UNROLL for (int k = 0; k < K; k += 16) {
        FragA<T> fa;
        load_a(fa, a, sa, row, k);
        TG_UNROLL for (int i = 0; i < N; i++) {
            FragB<T> fb;
            load_b_trans(fb, b, sb, col + 8 * i, k);
            mma(c[i], fa, fb);
        }
    }
}
// `c = Aᵀ B` of two row-major tiles with K rows.
template <class T, int K, int N> TG_DEVICE void mma_atb(FragC (&c)[N], const T* a, int sa, int row, const T* b, int sb, int col) {
    TG_UNROLL for (int k = 0; k < K; k += 16) {
        FragA<T> fa;
        load_a_trans(fa, a, sa, row, k);
        TG_UNROLL for (int i = 0; i < N; i++) {
            FragB<T> fb;
            load_b_trans(fb, b, sb, col + 8 * i, k);
            mma(c[i], fa, fb);
        }
    }
}

// Writes a fragment, rounded to T, into a tile or into global memory at (row, col).
template <class T> TG_DEVICE void store_frag(T* to, i64 stride, int row, int col, const FragC& c) {
    TG_UNROLL for (int i = 0; i < 4; i++) to[(i64)(row + frag_row(i)) * stride + col + frag_col(i)] = store<T>(c.v[i]);
}

// Brings `rows` × COLS elements, rows `stride` apart, into a tile by asynchronous copies; rows beyond become zero. Every thread of the first `count`
// takes part; the caller commits. Where source rows are not aligned to 16 bytes, elements are copied one by one (visible after the barrier).
template <class T, int ROWS, int COLS> TG_DEVICE void load_tile(const Tile<T, ROWS, COLS>& tile, const T* from, i64 stride, int rows, int cols, u32 me, u32 count) {
    constexpr int N = Vec<T>::N, PER_ROW = COLS / N;
    static_assert(COLS % N == 0, "a row is whole vectors");
    bool whole = aligned16(from) && (stride * sizeof(T)) % 16 == 0;
    for (int i = me; i < ROWS * PER_ROW; i += count) {
        int r = i / PER_ROW, c = i % PER_ROW * N;
        T* to = tile.at(r, c);
        bool in = r < rows && c + N <= cols;
        if (whole && (in || r >= rows || c >= cols)) {
            copy16_async(to, in ? from + r * stride + c : from, in);
        } else {
            for (int j = 0; j < N; j++) to[j] = r < rows && c + j < cols ? from[r * stride + c + j] : T{};
        }
    }
}
