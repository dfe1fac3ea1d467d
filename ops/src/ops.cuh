// What the fused ops' kernels share: rows of strided tensors, vectors that may be ragged, the sigmoid, sums of columns.
#pragma once
#include "tidegate.cuh"

constexpr int MAX_AXES = 7;

// Rows of a view whose last axis is dense: its leading axes, merged where they lie evenly. Strides are in elements; outermost axis first.
struct Rows {
    u32 axes, wide; // wide: there are too many rows for 32 bits
    FastDiv size[MAX_AXES];
    i64 stride[MAX_AXES];
    // Where row i starts.
    TG_DEVICE i64 at(u64 i) const {
        i64 to = 0;
#ifndef TG_EMULATE
#pragma unroll 1 // few axes, and a long body
#endif
        for (int d = (int)axes - 1; d > 0; d--) {
            u64 q;
            u32 r;
            if (wide) {
                q = i / size[d].divisor;
                r = (u32)(i - q * size[d].divisor);
            } else {
                u32 small;
                size[d].divmod((u32)i, small, r);
                q = small;
            }
            to += (i64)r * stride[d];
            i = q;
        }
        return to + (i64)i * stride[0];
    }
};

// Raw elements that are moved at once: N · sizeof(T) bytes in pieces of up to 16.
template <class T, int N> struct Pack {
    static constexpr int BYTES = N * sizeof(T);
    union {
        T t[N];
        U4 u4[BYTES / 16 + (BYTES < 16)];
        U2 u2;
    };
    TG_DEVICE void get(const T* p) {
        if constexpr (BYTES % 16 == 0) { TG_UNROLL for (int i = 0; i < BYTES / 16; i++) u4[i] = ((const U4*)p)[i]; }
        else if constexpr (BYTES == 8) u2 = *(const U2*)p;
        else { TG_UNROLL for (int i = 0; i < N; i++) t[i] = p[i]; }
    }
    TG_DEVICE void put(T* p) const {
        if constexpr (BYTES % 16 == 0) { TG_UNROLL for (int i = 0; i < BYTES / 16; i++) ((U4*)p)[i] = u4[i]; }
        else if constexpr (BYTES == 8) *(U2*)p = u2;
        else { TG_UNROLL for (int i = 0; i < N; i++) p[i] = t[i]; }
    }
};
// N raw elements, which cost half the registers of their floats where T is a half; as `read`.
template <int N, class T> TG_DEVICE void read_raw(Pack<T, N>& x, const T* p, bool wide, int n) {
    if (wide && n >= N) x.get(p);
    else { TG_UNROLL for (int i = 0; i < N; i++) x.t[i] = i < n ? p[i] : T{}; }
}
// N elements as floats: in wide accesses if `wide` (aligned, and N are there), else the first `n` one by one; what is beyond is zero.
template <int N, class T> TG_DEVICE void read(float (&v)[N], const T* p, bool wide, int n) {
    if (wide && n >= N) {
        Pack<T, N> x;
        x.get(p);
        TG_UNROLL for (int i = 0; i < N; i++) v[i] = load(x.t[i]);
    } else {
        TG_UNROLL for (int i = 0; i < N; i++) v[i] = i < n ? load(p[i]) : 0.f;
    }
}
template <int N, class T> TG_DEVICE void write(T* p, const float (&v)[N], bool wide, int n) {
    if (wide && n >= N) {
        Pack<T, N> x;
        TG_UNROLL for (int i = 0; i < N; i++) x.t[i] = store<T>(v[i]);
        x.put(p);
    } else {
        TG_UNROLL for (int i = 0; i < N; i++) if (i < n) p[i] = store<T>(v[i]);
    }
}

// The sigmoid as exactly as T can hold it: on the special function unit where T is a half (e^-x may be infinite, its reciprocal is then 0).
template <class T> struct Sigmoid { static TG_DEVICE float of(float x) { return fast_reciprocal(1.f + fast_exp(-x)); } };
template <> struct Sigmoid<float> { static TG_DEVICE float of(float x) { return sigmoid(x); } };

// out[c] = Σ_r parts[r][c], the second stage of a sum over rows. A block of 1024 threads takes 32 columns; its warps take rows in turn, four reads at a
// time, and their sums are added in order.
struct ColumnsParams {
    const float* parts;
    void* out;
    u32 rows, cols;
};
template <class W> TG_DEVICE void sum_columns(const ColumnsParams& p) {
    constexpr int WARPS = 32, AHEAD = 4;
    TG_SHARED(float, sums, [WARPS][32]);
    u32 c = block_x() * 32 + lane();
    float sum = 0.f;
    if (c < p.cols) {
        for (u32 r = warp(); r < p.rows; r += WARPS * AHEAD) {
            float x[AHEAD];
            TG_UNROLL for (int i = 0; i < AHEAD; i++) x[i] = r + WARPS * i < p.rows ? p.parts[(u64)(r + WARPS * i) * p.cols + c] : 0.f;
            TG_UNROLL for (int i = 0; i < AHEAD; i++) sum += x[i];
        }
    }
    sums[warp()][lane()] = sum;
    sync();
    if (warp() == 0 && c < p.cols) {
        sum = 0.f;
        TG_UNROLL for (int i = 0; i < WARPS; i++) sum += sums[i][lane()];
        ((W*)p.out)[c] = store<W>(sum);
    }
}
