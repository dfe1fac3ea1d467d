// What the kernels of gated_sdpa share: parameters, masks as bands, rows of grouped heads, the gate, products of tiles.
//
// Query heads that share a key/value head stand side by side as rows of one matrix: row r is query time r / group, head r % group of the group. So a block
// reads keys and values once for the whole group, a diagonal tile wastes less, and one decoded token with a group of 8 fills 8 rows of a 16-row fragment.
#pragma once
#include "tile.cuh"

#ifdef TG_EMULATE
#define TG_UNROLL_4
#define TG_ROLLED
#define TG_UNROLL_SOME
#else
#define TG_UNROLL_SOME _Pragma("unroll UNROLLED")
#define TG_ROLLED _Pragma("unroll 1")
#define TG_UNROLL_4 _Pragma("unroll 4")
#endif

// An array [B, T, H, ..] with a dense last axis; strides in elements.
struct Strided { void* p; i64 b, t, h; };

struct SdpaParams {
    Strided q, k, v, gate, o, u;                // forward; o and u are what it writes
    Strided dy, du, dq, dk, dv, dgate;          // backward; du is the gradient of the ungated output: dy, or scratch
    float* lse;                                 // [B, T, H]
    float* stats;                               // [B, Hkv, R to even] pairs: lse in base 2, delta
    float* partial;                             // of a split over keys: [splits, B Hkv R, dv] normalised outputs, then [splits, B Hkv R] lse in base 2
    const void* cu;                             // document boundaries, or null
    float* pattern;                             // [B, H, T, S]
    Fault fault;                                // cu does not rise from 0 to T
    FastDiv group, heads, tiles, rows, section; // H / Hkv, Hkv, tiles of a head, R, heads whose tiles are in turn
    i32 queries, keys, R, H, Hkv, d, dv_cols;   // T, S, T group
    i32 window, causal;                         // window: at most S, which is none
    i32 n_tiles, cu_count, cu_wide;
    i32 splits, split_from, split_span;         // split i has keys split_from + i split_span .. + split_span
    u32 vec;                                    // whose rows are whole aligned vectors, see below
    u32 activation, additive, gating, team;     // gating: 0 none, 1 head-wise, 2 element-wise; team: lanes of a row where rows are read one by one
    float c, flip, scale;                       // scores in base 2 are c (flip s), with c > 0; scale is the attribute
    u32 total;                                  // B Hkv R
};
enum { VEC_Q = 1, VEC_K = 2, VEC_V = 4, VEC_O = 16, VEC_DU = 32, VEC_DQ = 64, VEC_DK = 128, VEC_DV = 256, VEC_PREPARE = 512 };
enum { SIGMOID, SILU, NS_SIGMOID, IDENTITY };

constexpr float LOG2E = 1.44269504088896f, LN2 = 0.693147180559945f;

// ---- order ----
// Which tile a block has. The tiles with most work of all heads of a section come first, so that no long one is left for the end; a section has as many
// heads as leave what they stream in L2.
struct Turn { u32 bh, rank; };
TG_DEVICE Turn turn_of(const SdpaParams& p) {
    u32 x, head, section, rank;
    p.section.divmod(block_x(), x, head);
    p.tiles.divmod(x, section, rank);
    return {section * p.section.divisor + head, rank};
}

// ---- rows ----
// Query rows of one key/value head.
template <class T> struct Rows {
    T* base;
    i64 t, h;
    FastDiv group;
    TG_DEVICE Rows(const SdpaParams& p, const Strided& x, u32 b, u32 hk) : base((T*)x.p + (i64)b * x.b + (i64)(hk * group_of(p)) * x.h), t(x.t), h(x.h), group(p.group) {}
    static TG_DEVICE u32 group_of(const SdpaParams& p) { return p.group.divisor; }
    TG_DEVICE T* at(int r) const {
        u32 time, g;
        group.divmod((u32)r, time, g);
        return base + time * t + g * h;
    }
    // From a place in column c of row r to the same column `by` rows below.
    TG_DEVICE T* next(T*, int r, int by, int c) const { return at(r + by) + c; }
};
// Rows of keys or values.
template <class T> struct Keys {
    T* base;
    i64 t;
    TG_DEVICE Keys(const Strided& x, u32 b, u32 hk) : base((T*)x.p + (i64)b * x.b + (i64)hk * x.h), t(x.t) {}
    TG_DEVICE T* at(int j) const { return base + j * t; }
    TG_DEVICE T* next(T* x, int, int by, int) const { return x + by * t; }
};
// How THREADS threads share ROWS rows of COLS elements by vectors: the largest power of two of a row's vectors, up to 16, side by side.
template <class T, int ROWS, int COLS, int THREADS> struct Shares {
    static constexpr int N = Vec<T>::N, PER_ROW = COLS / N;
    static constexpr int WIDE = PER_ROW % 16 == 0 ? 16 : PER_ROW % 8 == 0 ? 8 : 4, TALL = THREADS / WIDE; // threads side by side, and below each other
    static_assert(PER_ROW % WIDE == 0 && THREADS % WIDE == 0, "threads share a row evenly");
};
// Brings rows first.. of `from` into a tile, asynchronously where they are aligned (`vec`); what lies beyond `rows` and `cols` becomes zero.
template <int THREADS, class T, int ROWS, int COLS, class F>
TG_DEVICE void load_rows(const Tile<T, ROWS, COLS>& tile, const F& from, int first, int rows, int cols, bool vec) {
    typedef Shares<T, ROWS, COLS, THREADS> S;
    if (vec) {
        int me = thread_anew(), r = me / S::WIDE, c = me % S::WIDE * S::N;
        auto x = from.at(first + r) + c;
        T* to = tile.at(r, c);
        TG_UNROLL_4 for (int i = 0; i < ROWS; i += S::TALL) {
            if (ROWS % S::TALL == 0 || i + r < ROWS) {
                TG_UNROLL for (int j = 0; j < COLS; j += S::WIDE * S::N) copy16_async(to + j, x + j, i + r < rows && c + j < cols); // where not, x is not read
            }
            x = from.next(x, first + r + i, S::TALL, c);
            to += S::TALL * tile.STRIDE;
        }
    } else {
        TG_ROLLED for (int i = thread_anew(); i < ROWS * COLS; i += THREADS) {
            int r = i / COLS, c = i % COLS;
            *tile.at(r, c) = r < rows && c < cols ? from.at(first + r)[c] : T{};
        }
    }
}
// The way back.
template <int THREADS, class T, int ROWS, int COLS, class F>
TG_DEVICE void store_rows(const Tile<T, ROWS, COLS>& tile, const F& to, int first, int rows, int cols, bool vec) {
    typedef Shares<T, ROWS, COLS, THREADS> S;
    if (vec) {
        int me = thread_anew(), c = me % S::WIDE * S::N;
        TG_ROLLED for (int r = me / S::WIDE; r < rows; r += S::TALL) {
            T* x = to.at(first + r) + c;
            TG_UNROLL for (int j = 0; j < COLS; j += S::WIDE * S::N)
                if (c + j < cols) *(U4*)(x + j) = *(const U4*)tile.at(r, c + j);
        }
    } else {
        TG_ROLLED for (int i = thread_anew(); i < ROWS * COLS; i += THREADS) {
            int r = i / COLS, c = i % COLS;
            if (r < rows && c < cols) to.at(first + r)[c] = *tile.at(r, c);
        }
    }
}
TG_DEVICE void store_pair(bf16* p, float x, float y) { *(u32*)p = pack_bf16(x, y); }
TG_DEVICE void store_pair(float* p, float x, float y) { *(U2*)p = U2{float_bits(x), float_bits(y)}; }

// ---- masks ----
// With causal, window and document masks alike, the keys that a query sees are an interval, both of whose ends never move backwards as its time grows; and
// so are the queries that see a key. A tile is empty, full or cut: comparing ends tells.
struct Band { int lo, hi; };
TG_DEVICE i64 boundary(const SdpaParams& p, int i) { return p.cu_wide ? ((const i64*)p.cu)[i] : (i64)((const i32*)p.cu)[i]; }
// The document of time t. Whatever the boundaries hold, the result lies within 0..T.
TG_DEVICE Band document(const SdpaParams& p, int t) {
    if (!p.cu) return {0, 0x7fffffff};
    int a = 0, b = p.cu_count - 1; // the last i < count - 1 with cu[i] <= t
    while (b - a > 1) {
        int m = (a + b) / 2;
        if (boundary(p, m) <= t) a = m; else b = m;
    }
    i64 lo = boundary(p, a), hi = boundary(p, a + 1), top = p.queries;
    return {(int)min_of(max_of(lo, (i64)0), top), (int)min_of(max_of(hi, (i64)0), top)};
}
// Keys that the query of time t sees. Queries stand at the end of the keys.
TG_DEVICE Band keys_of(const SdpaParams& p, int t) {
    int at = t + p.keys - p.queries;
    Band d = document(p, t);
    int lo = max_of(0, at + 1 - p.window), hi = min_of(p.keys, p.causal ? at + 1 : at + p.window);
    return {max_of(lo, d.lo), min_of(hi, d.hi)};
}
// Query times that see key j.
TG_DEVICE Band queries_of(const SdpaParams& p, int j) {
    int t = j - (p.keys - p.queries);
    Band d = document(p, j);
    int lo = max_of(0, p.causal ? t : t + 1 - p.window), hi = max_of(0, min_of(p.queries, t + p.window));
    return {max_of(lo, d.lo), min_of(hi, d.hi)};
}
// By one block: tells when the boundaries don't rise from 0 to T.
TG_DEVICE void check_documents(const SdpaParams& p) {
    for (int i = thread(); p.cu && i < p.cu_count; i += threads()) {
        i64 x = boundary(p, i), next = i + 1 < p.cu_count ? boundary(p, i + 1) : (i64)p.queries;
        if ((i == 0 && x != 0) || (i + 1 == p.cu_count && x != next) || x > next) p.fault.tell(x);
    }
}

// ---- the gate ----
TG_DEVICE float fast_sigmoid(float x) { return fast_reciprocal(1.f + fast_exp(-x)); }
TG_DEVICE float activate(u32 kind, float x) {
    if (kind == IDENTITY) return x;
    float s = fast_sigmoid(x);
    return kind == SIGMOID ? s : kind == SILU ? x * s : 0.5f + 0.5f * s;
}
// The activation and its derivative, from one exponential.
struct Activated { float value, slope; };
TG_DEVICE Activated activate_both(u32 kind, float x) {
    float e = fast_exp(-fabsf(x)), r = fast_reciprocal(1.f + e), s = x < 0.f ? e * r : r, d = e * r * r;
    if (kind == SILU) return {x * s, s + x * d};
    float m = kind == SIGMOID ? 1.f : kind == NS_SIGMOID ? 0.5f : 0.f;
    return {m * s + (kind == IDENTITY ? x : kind == NS_SIGMOID ? 0.5f : 0.f), kind == IDENTITY ? 1.f : m * d};
}
TG_DEVICE float gated(const SdpaParams& p, float u, float logit) {
    float a = activate(p.activation, logit);
    return p.additive ? u + a : u * a;
}

// ---- the way out ----
// A thread has vectors of rows; logits of AHEAD of them are on their way at once. `held`: byte in shared memory where element-wise logits are, rows of HD
// one after another; or -1, and they come from global memory.
template <class T, int ROWS, int HD, int THREADS, u32 ACTIVATION>
TG_DEVICE void write_vectors(const SdpaParams& p, const Tile<float, ROWS, HD>& out, u32 b, u32 hk, int r0, int n, int held) {
    typedef Shares<T, ROWS, HD, THREADS> S;
    constexpr int AHEAD = 4;
    Rows<T> os(p, p.o, b, hk), us(p, p.u, b, hk);
    Rows<const T> gates(p, p.gate, b, hk);
    int me = thread_anew();
    TG_ROLLED for (int c = me % S::WIDE * S::N; c < p.dv_cols; c += S::WIDE * S::N) {
        TG_ROLLED for (int first = me / S::WIDE; first < n; first += AHEAD * S::TALL) {
            union { U4 whole; T t[S::N]; } logits[AHEAD];
            TG_UNROLL for (int k = 0; k < AHEAD; k++) {
                int i = first + k * S::TALL;
                if (i < n && held >= 0) logits[k].whole = *(const U4*)shared<T>(held + (i * HD + c) * (int)sizeof(T));
                else if (i < n && p.gating == 2) logits[k].whole = *(const U4*)(gates.at(r0 + i) + c);
                if (i < n && p.gating == 1) {
                    T one = *gates.at(r0 + i);
                    TG_UNROLL for (int j = 0; j < S::N; j++) logits[k].t[j] = one;
                }
            }
            TG_UNROLL for (int k = 0; k < AHEAD; k++) {
                int i = first + k * S::TALL;
                if (i >= n) continue;
                float x[S::N];
                TG_UNROLL for (int j = 0; j < S::N; j += 4) {
                    float four[4];
                    load16(four, out.at(i, c + j));
                    TG_UNROLL for (int e = 0; e < 4; e++) x[j + e] = four[e];
                }
                if (p.gating) {
                    store16(us.at(r0 + i) + c, x);
                    TG_UNROLL for (int j = 0; j < S::N; j++) {
                        float y = activate(ACTIVATION, load(logits[k].t[j]));
                        x[j] = p.additive ? x[j] + y : x[j] * y;
                    }
                }
                store16(os.at(r0 + i) + c, x);
            }
        }
    }
}
// The first n rows of a tile, which are rows r0.. of a head: gated and written, and ungated beside it if there is a gate. By threads 0 to THREADS.
template <class T, int ROWS, int HD, int THREADS>
TG_DEVICE void write_gated(const SdpaParams& p, const Tile<float, ROWS, HD>& out, u32 b, u32 hk, int r0, int n, int held = -1) {
    if (p.vec & VEC_O) {
        if (p.activation == SIGMOID) write_vectors<T, ROWS, HD, THREADS, SIGMOID>(p, out, b, hk, r0, n, held);
        else if (p.activation == SILU) write_vectors<T, ROWS, HD, THREADS, SILU>(p, out, b, hk, r0, n, held);
        else if (p.activation == NS_SIGMOID) write_vectors<T, ROWS, HD, THREADS, NS_SIGMOID>(p, out, b, hk, r0, n, held);
        else write_vectors<T, ROWS, HD, THREADS, IDENTITY>(p, out, b, hk, r0, n, held);
    } else { // single elements, where rows are not whole aligned vectors
        Rows<T> os(p, p.o, b, hk), us(p, p.u, b, hk);
        Rows<const T> gates(p, p.gate, b, hk);
        TG_ROLLED for (int k = thread_anew(); k < n * HD; k += THREADS) {
            int i = k / HD, c = k % HD;
            if (c >= p.dv_cols) continue;
            float x = *out.at(i, c);
            if (p.gating) {
                us.at(r0 + i)[c] = store<T>(x);
                x = gated(p, x, load(gates.at(r0 + i)[p.gating == 2 ? c : 0]));
            }
            os.at(r0 + i)[c] = store<T>(x);
        }
    }
}

// ---- products, each B fragment used for M fragments of A ----
// A tile as a lane reads fragments of it: one address, to which places known at compile time are added. STRIDE is the tile's.
template <class T, int STRIDE> struct OfA; // rows are A's rows
template <class T, int STRIDE> struct OfB; // rows are B's columns, as K's in Q Kᵀ; two neighbouring column blocks at once
template <class T, int STRIDE> struct OfBTrans; // rows are B's rows, as V's in P V; likewise
template <int STRIDE> struct OfA<bf16, STRIDE> {
    u32 at;
    TG_DEVICE OfA(const bf16* tile, int row) : at(shared_address(tile) + 2 * ((row + (lane() & 15)) * STRIDE + (lane() >> 4) * 8)) {}
    TG_DEVICE void get(FragA<bf16>& f, int row, int k) const { ldmatrix4(f.r[0], at + (u32)(2 * (row * STRIDE + k))); }
};
template <int STRIDE> struct OfA<float, STRIDE> {
    const float* at;
    TG_DEVICE OfA(const float* tile, int row) : at(tile + (row + (lane() >> 2)) * STRIDE + 2 * (lane() & 3)) {}
    TG_DEVICE void get(FragA<float>& f, int row, int k) const {
        TG_UNROLL for (int i = 0; i < 4; i++) {
            const float* x = at + (row + (i & 1) * 8) * STRIDE + k + (i >> 1) * 8;
            split_pair(x[0], x[1], f.r[0][i], f.r[1][i], f.r[2][i]);
        }
    }
};
TG_DEVICE void two_b(FragB<bf16> (&f)[2], const u32 (&r)[4]) {
    f[0].r[0][0] = r[0]; f[0].r[0][1] = r[1]; f[1].r[0][0] = r[2]; f[1].r[0][1] = r[3];
}
template <int STRIDE> struct OfB<bf16, STRIDE> {
    u32 at;
    TG_DEVICE OfB(const bf16* tile, int col) : at(shared_address(tile) + 2 * ((col + (lane() & 7) + (lane() >> 4) * 8) * STRIDE + (lane() >> 3 & 1) * 8)) {}
    TG_DEVICE void get(FragB<bf16> (&f)[2], int col, int k) const {
        u32 r[4];
        ldmatrix4(r, at + (u32)(2 * (col * STRIDE + k)));
        two_b(f, r);
    }
};
template <int STRIDE> struct OfB<float, STRIDE> {
    const float* at;
    TG_DEVICE OfB(const float* tile, int col) : at(tile + (col + (lane() >> 2)) * STRIDE + 2 * (lane() & 3)) {}
    TG_DEVICE void one(FragB<float>& f, int col, int k) const {
        TG_UNROLL for (int i = 0; i < 2; i++) {
            const float* x = at + col * STRIDE + k + i * 8;
            split_pair(x[0], x[1], f.r[0][i], f.r[1][i], f.r[2][i]);
        }
    }
    TG_DEVICE void get(FragB<float> (&f)[2], int col, int k) const { one(f[0], col, k); one(f[1], col + 8, k); }
};
template <int STRIDE> struct OfBTrans<bf16, STRIDE> {
    u32 at;
    TG_DEVICE OfBTrans(const bf16* tile, int col) : at(shared_address(tile) + 2 * ((lane() & 15) * STRIDE + col + (lane() >> 4) * 8)) {}
    TG_DEVICE void get(FragB<bf16> (&f)[2], int col, int k) const {
        u32 r[4];
        ldmatrix4_trans(r, at + (u32)(2 * (k * STRIDE + col)));
        two_b(f, r);
    }
};
template <int STRIDE> struct OfBTrans<float, STRIDE> {
    const float* at;
    TG_DEVICE OfBTrans(const float* tile, int col) : at(tile + 2 * (lane() & 3) * STRIDE + col + (lane() >> 2)) {}
    TG_DEVICE void get(FragB<float> (&f)[2], int col, int k) const {
        TG_UNROLL for (int n = 0; n < 2; n++)
            TG_UNROLL for (int i = 0; i < 2; i++) {
                const float* x = at + (k + i * 8) * STRIDE + col + 8 * n;
                split_pair(x[0], x[STRIDE], f[n].r[0][i], f[n].r[1][i], f[n].r[2][i]);
            }
    }
};
// c[m][n] += A fragment m · column block n, at depth k of B
template <class T, int M, int N, class B> TG_DEVICE void step(FragC (&c)[M][N], const FragA<T> (&a)[M], const B& b, int k) {
    TG_UNROLL for (int n = 0; n + 1 < N; n += 2) {
        FragB<T> fb[2];
        b.get(fb, 8 * n, k);
        TG_UNROLL for (int m = 0; m < M; m++) { mma(c[m][n], a[m], fb[0]); mma(c[m][n + 1], a[m], fb[1]); }
    }
}
template <int STRIDE> TG_DEVICE void step(FragC (&c)[1][1], const FragA<float> (&a)[1], const OfB<float, STRIDE>& b, int k) {
    FragB<float> fb;
    b.one(fb, 0, k);
    mma(c[0][0], a[0], fb);
}
// c = A Bᵀ of row-major tiles with COLS columns: rows row.. + 16 M of A, rows col.. + 8 N of B.
template <class T, int COLS, int STRIDE, int M, int N> TG_DEVICE void product_abt(FragC (&c)[M][N], const T* a, int row, const T* b, int col) {
    static_assert(N % 2 == 0 || (N == 1 && M == 1 && sizeof(T) == 4), "column blocks come in pairs");
    OfA<T, STRIDE> from(a, row);
    OfB<T, STRIDE> with(b, col);
    TG_UNROLL for (int m = 0; m < M; m++)
        TG_UNROLL for (int n = 0; n < N; n++) c[m][n].zero();
    constexpr int UNROLLED = sizeof(T) == 4 ? 2 : COLS / 16; // f32 has enough to do in a step, and takes many registers for it
    TG_UNROLL_SOME for (int k = 0; k < COLS; k += 16) {
        FragA<T> fa[M];
        TG_UNROLL for (int m = 0; m < M; m++) from.get(fa[m], 16 * m, k);
        step(c, fa, with, k);
    }
}
