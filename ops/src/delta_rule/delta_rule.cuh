// What the kernels of the delta rule share: parameters, the chunks' places, and products on tensor cores with the fragments loaded in pairs.
#pragma once
#include "tile.cuh"

// Steps of a chunk. In f32 tiles take twice the room and products six times the time, of which the part inside a chunk grows with its length.
template <class T> struct Chunk;
template <> struct Chunk<bf16> { static constexpr int N = 64; };
template <> struct Chunk<float> { static constexpr int N = 32; };
constexpr int EARLY = 2; // of the factors, as many are only made and handed on by delta_prepare
constexpr int SLAB = 64; // columns of a head dimension that are brought in at once

// Numbers of each step of a chunk, [chunk, value head][FACTORS][C], where g is the running sum of log-decay and r the factor of an L2 norm:
// scale e^g r_q; e^{g_last - g} r_k; beta e^g r_k; r_q; r_k; beta; e^g; and g log2(e) as two floats, so that differences of sums keep their digits.
enum { TO_Q, TO_LAST, TO_W, R_Q, R_K, BETA, E_G, G_HIGH, G_LOW, FACTORS };

// The same number, of which the compiler knows nothing: what follows from it in a loop isn't kept in registers from one turn to the next.
TG_DEVICE u32 anew(u32 x) {
#ifndef TG_EMULATE
    asm volatile("" : "+r"(x));
#endif
    return x;
}

struct DeltaParams {
    const void *q, *k, *v; // [B, T, H, D], last axis dense
    const float* log_decay;
    const void* beta;
    const float* h0;
    const void* cu; // i32 or i64 [seqs + 1], or null
    void* o;
    float *last, *v_new;
    const void* d_o;
    const float* d_last;
    void *d_q, *d_k, *d_value;
    float* d_decay;
    void* d_beta;
    float* d_h0;
    // scratch; DK, DV are head dims rounded up to SLAB, C is a chunk's length
    u32 *places, *bases;      // packed only: (first row, steps) of each chunk; number of the first chunk of each sequence, and of all
    float* factors;
    void *w, *u;              // [chunk, Hv][C, DK]; transposed, [DV, C]
    void *p, *a, *m;          // [chunk, Hv][C, C]: scale tril(Q K^T D); (I + M)^-1; M without beta
    void *states, *d_states;  // [chunk, Hv][DV, DK]: the state before the chunk, the gradient of the one after it
    void *d_new;              // [chunk, Hv][DV, C]: gradient of V'
    void *d_r;                // [chunk, Hv][C, DV]: gradient of R
    void *x, *s;              // [chunk, Hv][C, C]: gradients of Q K^T and of K K^T (symmetric)
    float* sums;              // [chunk, Hv][2, C]: what is summed up of the gradients of g and of beta
    void *yq, *yk;            // [B T, Hv, Dk]: gradients of q and k by value head, before the norms
    // where sequences are cut (delta_rule_pieces.cu). Packed only: joints before each sequence and of all; the sequence of each piece, of each joint
    u32 *joint_bases, *piece_seqs, *joint_seqs;
    float *joints;            // [joint, Hv][Dk, Dv]: the state there
    float *maps, *decays;     // [joint, Hv][DK, DK] (transposed) or one number: what the piece that ends there does to a state
    i64 q_stride[3], k_stride[3], v_stride[3];
    Fault fault;
    u32 t, rows, seqs, hk, hv, dk, dv; // rows: B T
    u32 chunks;               // of each sequence; if packed, the most that there can be of all
    u32 erase, l2, beta_wide, cu_wide;
    u32 pieces;               // of each sequence; if packed and cut, 0
    u32 piece_len, max_joints; // packed and cut: the most chunks of a piece, joints that there is room for
    u32 back;                 // joints are walked from the last to the first
    float scale;
};

// Where a chunk lies: its first of B T rows, its steps, and the same row as batch and step.
struct Place { u32 row, len, batch, step; };
template <int C> TG_DEVICE bool place(const DeltaParams& p, u32 chunk, Place& at) {
    if (p.cu) {
        if (chunk >= p.bases[p.seqs]) return false;
        at.row = p.places[2 * chunk];
        at.len = p.places[2 * chunk + 1];
        at.batch = 0;
        at.step = at.row;
    } else {
        at.batch = chunk / p.chunks;
        at.step = chunk % p.chunks * C;
        at.row = at.batch * p.t + at.step;
        at.len = min_of(p.t - at.step, (u32)C);
    }
    return true;
}
// The chunks of a sequence.
TG_DEVICE void chunks_of(const DeltaParams& p, u32 seq, u32& first, u32& count) {
    first = p.cu ? p.bases[seq] : seq * p.chunks;
    count = p.cu ? p.bases[seq + 1] - first : p.chunks;
}
// A run of chunks of a sequence that is walked by itself. `joint` is the number of the joint after it, the one before it has the number before.
struct Piece { u32 seq, index, of, first, count, joint; };
// The piece number `x`; with SUM the one that ends at joint `x`: it lies before it, or behind it when walking back.
template <bool SUM, bool BACK> TG_DEVICE bool piece_of(const DeltaParams& p, u32 x, Piece& at) {
    u32 base; // the sequence's first joint
    if (p.joint_bases) {
        u32 joints = p.joint_bases[p.seqs];
        if (x >= joints + (SUM ? 0 : p.seqs)) return false;
        at.seq = SUM ? p.joint_seqs[x] : p.piece_seqs[x];
        base = p.joint_bases[at.seq];
        at.of = p.joint_bases[at.seq + 1] - base + 1;
    } else {
        at.of = p.pieces;
        at.seq = x / (at.of - SUM);
        base = at.seq * (at.of - 1);
    }
    at.index = SUM ? x - base + BACK : x - base - at.seq;
    at.joint = base + at.index;
    u32 first, count;
    chunks_of(p, at.seq, first, count);
    u32 from = (u64)count * at.index / at.of, to = (u64)count * (at.index + 1) / at.of;
    at.first = first + from;
    at.count = to - from;
    return true;
}
// The piece's chunk `i` of its count.
template <int C> TG_DEVICE Place place_in(const DeltaParams& p, const Piece& piece, u32 i) {
    Place at;
    i = piece.first + anew(i);
    at.batch = anew(p.cu ? 0 : piece.seq);
    at.step = p.cu ? p.places[2 * i] : (i - piece.seq * p.chunks) * C;
    at.len = p.cu ? p.places[2 * i + 1] : min_of(p.t - at.step, (u32)C);
    at.row = at.batch * p.t + at.step;
    return at;
}
TG_DEVICE float* state_at(const DeltaParams& p, float* states, u32 i, u32 head) { return states + ((u64)i * p.hv + head) * p.dk * p.dv; }
TG_DEVICE const float* state_at(const DeltaParams& p, const float* states, u32 i, u32 head) { return states + ((u64)i * p.hv + head) * p.dk * p.dv; }
// Where the map of the piece that ends at a joint lies.
TG_DEVICE float* map_at(const DeltaParams& p, u32 joint, u32 head) {
    u64 wide = div_up(p.dk, SLAB) * SLAB;
    return p.maps + ((u64)joint * p.hv + head) * wide * wide;
}
// Row `at` of a head of q, k or v.
template <class T> TG_DEVICE const T* head_rows(const void* x, const i64 (&stride)[3], const Place& at, u32 head) {
    return (const T*)x + at.batch * stride[0] + at.step * stride[1] + head * stride[2];
}
TG_DEVICE u32 whole_slabs(u32 d) { return div_up(d, SLAB) * SLAB; }
template <class T> TG_DEVICE float beta_at(const DeltaParams& p, u64 i) {
    return !p.beta ? 1.f : p.beta_wide ? ((const float*)p.beta)[i] : load(((const T*)p.beta)[i]);
}
// e^{g_i - g_j} for i >= j; nothing else may be asked for.
TG_DEVICE float ratio(const float* high, const float* low, int i, int j) { return fast_exp2((high[i] - high[j]) + (low[i] - low[j])); }

TG_DEVICE void store_pair(float* to, float x, float y) { *(U2*)to = {float_bits(x), float_bits(y)}; }
TG_DEVICE void store_pair(bf16* to, float x, float y) { *(u32*)to = pack_bf16(x, y); }
TG_DEVICE void load_pair(const float* from, float& x, float& y) {
    U2 u = *(const U2*)from;
    x = bits_float(u.x);
    y = bits_float(u.y);
}
TG_DEVICE void load_pair(const bf16* from, float& x, float& y) {
    u32 u = *(const u32*)from;
    x = low_bf16(u);
    y = high_bf16(u);
}
// A fragment into a tile, or into scratch, whose rows are its rows.
template <class T> TG_DEVICE void put_frag(T* to, i64 stride, int row, int col, const FragC& c) {
    T* at = to + (i64)(row + frag_row(0)) * stride + col + frag_col(0);
    store_pair(at, c.v[0], c.v[1]);
    store_pair(at + 8 * stride, c.v[2], c.v[3]);
}
template <int N> TG_DEVICE void zero(FragC (&c)[N]) {
    TG_UNROLL for (int i = 0; i < N; i++) c[i].zero();
}
// A tile to global memory, `rows` and `cols` of it, by THREADS threads. What is whole has one address for each thread, and steps from there.
template <int THREADS, class T, int ROWS, int COLS> TG_DEVICE void put_tile(T* to, i64 stride, const Tile<T, ROWS, COLS>& tile, int rows, int cols) {
    constexpr int N = Vec<T>::N, PER_ROW = COLS / N, STEP = THREADS / PER_ROW;
    const int me = thread_anew();
    bool whole = aligned16(to) && (stride * sizeof(T)) % 16 == 0;
    if (THREADS % PER_ROW == 0 && ROWS % STEP == 0 && whole && rows >= ROWS && cols >= COLS) {
        int r = me / PER_ROW, c = me % PER_ROW * N;
        const T* from = tile.at(r, c);
        T* at = to + r * stride + c;
        TG_UNROLL for (int i = 0; i < ROWS / STEP; i++) *(U4*)(at + i * (STEP * stride)) = *(const U4*)(from + i * STEP * tile.STRIDE);
        return;
    }
    _Pragma("unroll 1") for (int i = me; i < ROWS * PER_ROW; i += THREADS) {
        int r = i / PER_ROW, c = i % PER_ROW * N;
        if (r >= rows) break;
        if (whole && c + N <= cols) *(U4*)(to + r * stride + c) = *(const U4*)tile.at(r, c);
        else for (int j = 0; j < N && c + j < cols; j++) to[r * stride + c + j] = *tile.at(r, c + j);
    }
}
// A whole tile of rows that are aligned to 16 bytes, by asynchronous copies.
template <int THREADS, class T, int ROWS, int COLS> TG_DEVICE void bring_whole(const Tile<T, ROWS, COLS>& tile, const T* from, i64 stride) {
    constexpr int N = Vec<T>::N, PER_ROW = COLS / N, STEP = THREADS / PER_ROW;
    const int me = thread_anew();
    if (THREADS % PER_ROW == 0 && ROWS % STEP == 0) {
        int r = me / PER_ROW, c = me % PER_ROW * N;
        const T* at = from + r * stride + c;
        T* to = tile.at(r, c);
        TG_UNROLL for (int i = 0; i < ROWS / STEP; i++) copy16_async(to + i * STEP * tile.STRIDE, at + i * (STEP * stride));
    } else {
        _Pragma("unroll 1") for (int i = me; i < ROWS * PER_ROW; i += THREADS) {
            int r = i / PER_ROW, c = i % PER_ROW * N;
            copy16_async(tile.at(r, c), from + r * stride + c);
        }
    }
}
// `rows` and `cols` of a tile, zeros for the rest. Like load_tile, for kernels whose registers are full: only the whole tile's copies are unrolled, and what
// is not aligned is a loop of its own.
template <int THREADS, class T, int ROWS, int COLS> TG_DEVICE void bring(const Tile<T, ROWS, COLS>& tile, const T* from, i64 stride, int rows, int cols) {
    constexpr int N = Vec<T>::N, PER_ROW = COLS / N;
    if (aligned16(from) && (stride * sizeof(T)) % 16 == 0 && (cols >= COLS || cols % N == 0)) {
        if (rows >= ROWS && cols >= COLS) return bring_whole<THREADS>(tile, from, stride);
        _Pragma("unroll 1") for (int i = thread_anew(); i < ROWS * PER_ROW; i += THREADS) {
            int r = i / PER_ROW, c = i % PER_ROW * N;
            bool in = r < rows && c < cols;
            copy16_async(tile.at(r, c), in ? from + r * stride + c : from, in);
        }
    } else {
        _Pragma("unroll 1") for (int i = thread_anew(); i < ROWS * COLS; i += THREADS) {
            int r = i / COLS, c = i % COLS;
            *tile.at(r, c) = r < rows && c < cols ? from[r * stride + c] : T{};
        }
    }
}
// f32 rows into a tile of T.
template <int THREADS, int ROWS, int COLS> TG_DEVICE void load_wide(const Tile<float, ROWS, COLS>& tile, const float* from, i64 stride, int rows, int cols) {
    bring<THREADS>(tile, from, stride, rows, cols);
}
template <int THREADS, int ROWS, int COLS> TG_DEVICE void load_wide(const Tile<bf16, ROWS, COLS>& tile, const float* from, i64 stride, int rows, int cols) {
    constexpr int PER_ROW = COLS / 4, STEP = THREADS / PER_ROW, N = ROWS / STEP;
    const int me = thread_anew();
    bool whole = aligned16(from) && stride % 4 == 0;
    if (THREADS % PER_ROW == 0 && ROWS % STEP == 0 && whole && rows >= ROWS && cols >= COLS) {
        int r = me / PER_ROW, c = me % PER_ROW * 4;
        const float* at = from + r * stride + c;
        bf16* to = tile.at(r, c);
        float x[N][4];
        TG_UNROLL for (int i = 0; i < N; i++) load16(x[i], at + i * (STEP * stride));
        TG_UNROLL for (int i = 0; i < N; i++) *(U2*)(to + i * STEP * tile.STRIDE) = {pack_bf16(x[i][0], x[i][1]), pack_bf16(x[i][2], x[i][3])};
        return;
    }
    _Pragma("unroll 1") for (int i = me; i < ROWS * PER_ROW; i += THREADS) {
        int r = i / PER_ROW, c = i % PER_ROW * 4;
        float x[4] = {};
        if (r < rows && whole && c + 4 <= cols) load16(x, from + r * stride + c);
        else if (r < rows) for (int j = 0; j < 4 && c + j < cols; j++) x[j] = from[r * stride + c + j];
        *(U2*)tile.at(r, c) = {pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])};
    }
}

// A bool that is known when compiling: branches on it are out of the loops.
template <bool B> struct Flag { constexpr operator bool() const { return B; } };
// Two neighbouring B fragments, columns col.. + 16, by one ldmatrix: of a tile[col][k], and of a tile[k][col].
TG_DEVICE void load_b2(FragB<bf16> (&f)[2], const bf16* tile, int stride, int col, int k) {
    int l = lane();
    u32 r[4];
    ldmatrix4(r, tile + (col + (l & 7) + (l >> 4) * 8) * stride + k + ((l >> 3) & 1) * 8);
    f[0].r[0][0] = r[0]; f[0].r[0][1] = r[1]; f[1].r[0][0] = r[2]; f[1].r[0][1] = r[3];
}
TG_DEVICE void load_b2(FragB<float> (&f)[2], const float* tile, int stride, int col, int k) {
    load_b(f[0], tile, stride, col, k);
    load_b(f[1], tile, stride, col + 8, k);
}
TG_DEVICE void load_b2_trans(FragB<bf16> (&f)[2], const bf16* tile, int stride, int col, int k) {
    int l = lane();
    u32 r[4];
    ldmatrix4_trans(r, tile + (k + (l & 15)) * stride + col + (l >> 4) * 8);
    f[0].r[0][0] = r[0]; f[0].r[0][1] = r[1]; f[1].r[0][0] = r[2]; f[1].r[0][1] = r[3];
}
TG_DEVICE void load_b2_trans(FragB<float> (&f)[2], const float* tile, int stride, int col, int k) {
    load_b_trans(f[0], tile, stride, col, k);
    load_b_trans(f[1], tile, stride, col + 8, k);
}
// c[i] += a · B for the 8 N columns from col of a tile[col][k], one step of 16 along k. Only column pairs that begin in [from, to) are computed.
template <class T, int N> TG_DEVICE void step_columns(FragC (&c)[N], const FragA<T>& a, const T* b, int stride, int col, int k, int from = 0, int to = 1 << 20) {
    TG_UNROLL for (int i = 0; i < N; i += 2) {
        if (col + 8 * i < from || col + 8 * i >= to) continue;
        FragB<T> f[2];
        load_b2(f, b, stride, col + 8 * i, k);
        mma(c[i], a, f[0]);
        mma(c[i + 1], a, f[1]);
    }
}
// The same of a tile[k][col].
template <class T, int N> TG_DEVICE void step_rows(FragC (&c)[N], const FragA<T>& a, const T* b, int stride, int col, int k, int from = 0, int to = 1 << 20) {
    TG_UNROLL for (int i = 0; i < N; i += 2) {
        if (col + 8 * i < from || col + 8 * i >= to) continue;
        FragB<T> f[2];
        load_b2_trans(f, b, stride, col + 8 * i, k);
        mma(c[i], a, f[0]);
        mma(c[i + 1], a, f[1]);
    }
}
// A lane's place in a tile, for kernels whose registers are full: fragments lie at distances from it that are known when compiling. OfB is for a
// tile[col][k], OfBTrans for a tile[k][col].
template <class T, int STRIDE> struct OfB;
template <int STRIDE> struct OfB<bf16, STRIDE> {
    u32 at;
    TG_DEVICE OfB(const bf16* tile, u32 l) : at(anew(shared_address(tile) + 2 * (((l & 7) + (l >> 4) * 8) * STRIDE + (l >> 3 & 1) * 8))) {}
    TG_DEVICE void load(FragB<bf16> (&f)[2], int byte, int col, int k) const {
        u32 r[4];
        ldmatrix4(r, at + (byte + 2 * (col * STRIDE + k)));
        f[0].r[0][0] = r[0]; f[0].r[0][1] = r[1]; f[1].r[0][0] = r[2]; f[1].r[0][1] = r[3];
    }
};
template <int STRIDE> struct OfB<float, STRIDE> {
    const float* at;
    TG_DEVICE OfB(const float* tile, u32 l) : at(tile + (l >> 2) * STRIDE + 2 * (l & 3)) {}
    TG_DEVICE void load(FragB<float> (&f)[2], int byte, int col, int k) const {
        TG_UNROLL for (int n = 0; n < 2; n++)
            TG_UNROLL for (int i = 0; i < 2; i++) {
                const float* p = at + (byte / 4 + (col + 8 * n) * STRIDE + k + 8 * i);
                split_pair(p[0], p[1], f[n].r[0][i], f[n].r[1][i], f[n].r[2][i]);
            }
    }
};
template <class T, int STRIDE> struct OfBTrans;
template <int STRIDE> struct OfBTrans<bf16, STRIDE> {
    u32 at;
    TG_DEVICE OfBTrans(const bf16* tile, u32 l) : at(anew(shared_address(tile) + 2 * ((l & 15) * STRIDE + (l >> 4) * 8))) {}
    TG_DEVICE void load(FragB<bf16> (&f)[2], int byte, int col, int k) const {
        u32 r[4];
        ldmatrix4_trans(r, at + (byte + 2 * (k * STRIDE + col)));
        f[0].r[0][0] = r[0]; f[0].r[0][1] = r[1]; f[1].r[0][0] = r[2]; f[1].r[0][1] = r[3];
    }
};
template <int STRIDE> struct OfBTrans<float, STRIDE> {
    const float* at;
    TG_DEVICE OfBTrans(const float* tile, u32 l) : at(tile + 2 * (l & 3) * STRIDE + (l >> 2)) {}
    TG_DEVICE void load(FragB<float> (&f)[2], int byte, int col, int k) const {
        TG_UNROLL for (int n = 0; n < 2; n++)
            TG_UNROLL for (int i = 0; i < 2; i++) {
                const float* p = at + (byte / 4 + (k + 8 * i) * STRIDE + col + 8 * n);
                split_pair(p[0], p[STRIDE], f[n].r[0][i], f[n].r[1][i], f[n].r[2][i]);
            }
    }
};
// c[i] += a · B as in step_columns and step_rows, for all 8 N columns from column `col` of the tile that lies `byte` after the one of `b`.
template <class T, int N, class B> TG_DEVICE void step(FragC (&c)[N], const FragA<T>& a, const B& b, int byte, int col, int k) {
    TG_UNROLL for (int i = 0; i < N; i += 2) {
        FragB<T> f[2];
        b.load(f, byte, col + 8 * i, k);
        mma(c[i], a, f[0]);
        mma(c[i + 1], a, f[1]);
    }
}
// A's fragment of a transposed tile[k][row], element times s[k].
TG_DEVICE void load_a_trans_scaled(FragA<bf16>& f, const bf16* tile, int stride, int row, int k, const float* s) {
    load_a_trans(f, tile, stride, row, k);
    TG_UNROLL for (int i = 0; i < 4; i++) {
        float x, y;
        load_pair(s + k + 2 * (lane() & 3) + (i >> 1) * 8, x, y);
        f.r[0][i] = pack_bf16(low_bf16(f.r[0][i]) * x, high_bf16(f.r[0][i]) * y);
    }
}
// The same of an f32 tile, for a product in T.
TG_DEVICE void load_a_trans_scaled(FragA<float>& f, const float* tile, int stride, int row, int k, const float* s) {
    int g = lane() >> 2, t = lane() & 3;
    TG_UNROLL for (int i = 0; i < 4; i++) {
        int at = k + 2 * t + (i >> 1) * 8;
        const float* x = tile + at * stride + row + g + (i & 1) * 8;
        split_pair(x[0] * s[at], x[stride] * s[at + 1], f.r[0][i], f.r[1][i], f.r[2][i]);
    }
}
TG_DEVICE void load_a_trans_scaled(FragA<bf16>& f, const float* tile, int stride, int row, int k, const float* s) {
    int g = lane() >> 2, t = lane() & 3;
    TG_UNROLL for (int i = 0; i < 4; i++) {
        int at = k + 2 * t + (i >> 1) * 8;
        const float* x = tile + at * stride + row + g + (i & 1) * 8;
        f.r[0][i] = pack_bf16(x[0] * s[at], x[stride] * s[at + 1]);
    }
}

// In the sequential kernels a warp has 16 values and, of the key dimension, at most 64 columns, or of more than 128 half: few registers, and so many warps.
constexpr int key_parts(int dk) { return dk > 64 ? 2 : 1; }

// A warp's part of a state, transposed; from [Dk, Dv] of f32, or zeros, and back.
template <int NK> TG_DEVICE void load_state(FragC (&h)[NK], const float* from, u32 dk, u32 dv, u32 key, u32 value) {
    TG_UNROLL for (int j = 0; j < NK; j++)
        TG_UNROLL for (int e = 0; e < 4; e++) {
            u32 r = value + frag_row(e), c = key + 8 * j + frag_col(e);
            h[j].v[e] = from && r < dv && c < dk ? from[(u64)c * dv + r] : 0.f;
        }
}
template <int NK> TG_DEVICE void load_unit(FragC (&h)[NK], u32 key, u32 value) {
    TG_UNROLL for (int j = 0; j < NK; j++)
        TG_UNROLL for (int e = 0; e < 4; e++) h[j].v[e] = value + frag_row(e) == key + 8 * j + frag_col(e) ? 1.f : 0.f;
}
template <int NK> TG_DEVICE void store_state(const FragC (&h)[NK], float* to, u32 dk, u32 dv, u32 key, u32 value) {
    const u32 l = anew(lane());
    TG_UNROLL for (int j = 0; j < NK; j++)
        TG_UNROLL for (int e = 0; e < 4; e++) {
            u32 r = value + (l >> 2) + (e >> 1) * 8, c = key + 8 * j + (l & 3) * 2 + (e & 1);
            if (r < dv && c < dk) to[(u64)c * dv + r] = h[j].v[e];
        }
}
// Fragments through shared memory to the warp with the other half of the keys, which adds them to its own: 512 bytes each.
constexpr int FRAG_FLOATS = 128;
TG_DEVICE void give(float* to, const FragC& c) {
    *(U4*)(to + 4 * lane()) = {float_bits(c.v[0]), float_bits(c.v[1]), float_bits(c.v[2]), float_bits(c.v[3])};
}
TG_DEVICE void take(const float* from, FragC& c) {
    float x[4];
    load16(x, from + 4 * lane());
    TG_UNROLL for (int e = 0; e < 4; e++) c.v[e] += x[e];
}

// Fragments whose rows are values and whose columns are steps, into rows of steps: `to` is the first step's first value. Neighbouring lanes trade, so
// that each writes two values of one step.
// There are N of them, `fragment(j)` is one.
template <int N, class T, class F> TG_DEVICE void store_transposed(T* to, i64 stride, int steps, int values, F fragment) {
    const u32 l = anew(lane());
    const bool odd = (l >> 2) & 1, whole = steps >= 8 * N && values >= 16 && ((u64)to / sizeof(T) | stride) % 2 == 0;
    const int step = (l & 3) * 2 + odd, value = (int)(l >> 2) & ~1;
    T* at = to + step * stride + value;
    TG_UNROLL for (int j = 0; j < N; j++) {
        const FragC c = fragment(j);
        float x[2], y[2];
        TG_UNROLL for (int i = 0; i < 2; i++) {
            float a = c.v[2 * i], b = c.v[2 * i + 1], theirs = shuffle_xor(odd ? a : b, 4);
            x[i] = odd ? theirs : a;
            y[i] = odd ? b : theirs;
        }
        if (whole) {
            store_pair(at, x[0], y[0]);
            store_pair(at + 8, x[1], y[1]);
        } else if (step + 8 * j < steps) {
            TG_UNROLL for (int i = 0; i < 2; i++) {
                if (value + 8 * i < values) at[8 * i] = store<T>(x[i]);
                if (value + 8 * i + 1 < values) at[8 * i + 1] = store<T>(y[i]);
            }
        }
        at += 8 * stride;
    }
}
// Fragments side by side, of 16 rows, into rows of T that are aligned to 8 bytes: neighbouring lanes trade, so that each writes four columns.
template <int N> TG_DEVICE void put_frags(bf16* to, i64 stride, const FragC (&c)[N]) {
    const u32 l = anew(lane());
    const bool odd = l & 1;
    bf16* at = to + (i64)(l >> 2) * stride + (l & 2) * 2 + odd * 8;
    TG_UNROLL for (int j = 0; j < N; j += 2)
        TG_UNROLL for (int i = 0; i < 2; i++) {
            u32 a = pack_bf16(c[j].v[2 * i], c[j].v[2 * i + 1]), b = pack_bf16(c[j + 1].v[2 * i], c[j + 1].v[2 * i + 1]);
            u32 theirs = shuffle_xor(odd ? a : b, 1);
            *(U2*)(at + 8 * i * stride + 8 * j) = {odd ? theirs : a, odd ? b : theirs};
        }
}
template <int N> TG_DEVICE void put_frags(float* to, i64 stride, const FragC (&c)[N]) {
    TG_UNROLL for (int j = 0; j < N; j++) put_frag(to, stride, 0, 8 * j, c[j]);
}
