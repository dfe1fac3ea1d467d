// What the primitive ops' kernels share: loops over views with any strides, and how elements are computed with.
#pragma once
#include "tidegate.cuh"

constexpr int MAX_DIMS = 8;

// Up to three views of one shape, as a loop nest whose neighbouring axes were merged. Strides are in elements; outermost axis first.
struct Nest {
    u64 n;     // elements
    u32 dims;
    u32 wide;  // whether indices need 64 bits
    FastDiv size[MAX_DIMS];
    u64 length[MAX_DIMS];
    i64 stride[3][MAX_DIMS];
};

// Where element i of the first K views lies.
template <int K> TG_DEVICE void offsets(const Nest& nest, u64 i, i64 (&at)[K]) {
    TG_UNROLL for (int k = 0; k < K; k++) at[k] = 0;
    if (nest.wide) {
        for (int d = (int)nest.dims - 1; d > 0; d--) {
            u64 q = i / nest.length[d], r = i - q * nest.length[d];
            TG_UNROLL for (int k = 0; k < K; k++) at[k] += (i64)r * nest.stride[k][d];
            i = q;
        }
    } else {
        u32 j = (u32)i;
        for (int d = (int)nest.dims - 1; d > 0; d--) {
            u32 q, r;
            nest.size[d].divmod(j, q, r);
            TG_UNROLL for (int k = 0; k < K; k++) at[k] += (i64)r * nest.stride[k][d];
            j = q;
        }
        i = j;
    }
    TG_UNROLL for (int k = 0; k < K; k++) at[k] += (i64)i * nest.stride[k][0];
}

// Runs f(i) for the elements of this block, `per` to a thread, neighbours in neighbouring threads.
template <class F> TG_DEVICE void each(u64 n, int per, F f) {
    u64 at = (u64)block_x() * threads() * per + thread();
    for (int j = 0; j < per; j++, at += threads())
        if (at < n) f(at);
}

// How an element is computed with: halves in f32, integers in 64 bits (results wrap).
template <class T> struct Wide { typedef i64 type; static TG_DEVICE i64 up(T x) { return (i64)x; } static TG_DEVICE T down(i64 x) { return (T)x; } };
template <class T> struct WideFloat { typedef Acc<T> type; static TG_DEVICE Acc<T> up(T x) { return load(x); } static TG_DEVICE T down(Acc<T> x) { return store<T>(x); } };
template <> struct Wide<float> : WideFloat<float> {};
template <> struct Wide<double> : WideFloat<double> {};
template <> struct Wide<bf16> : WideFloat<bf16> {};
template <> struct Wide<f16> : WideFloat<f16> {};

// Elements that are only moved, by their size in bytes.
template <int BYTES> struct Raw;
template <> struct Raw<1> { typedef u8 type; };
template <> struct Raw<2> { typedef u16 type; };
template <> struct Raw<4> { typedef u32 type; };
template <> struct Raw<8> { typedef u64 type; };
template <> struct Raw<16> { typedef U4 type; };

// An index tensor: 0 i64, 1 i32, 2 u32.
TG_DEVICE i64 read_index(const void* p, u32 kind, u64 i) {
    return kind == 0 ? ((const i64*)p)[i] : kind == 1 ? (i64)((const i32*)p)[i] : (i64)((const u32*)p)[i];
}

// A key of 64 bits in the order of T's values: all NaN the largest, zeros of either sign equal.
template <class T> struct Ordered { static TG_DEVICE u64 key(T x) { return (u64)(i64)x ^ (1ull << 63); } };
template <class T> struct OrderedFloat {
    static TG_DEVICE u64 key(T v) {
        float x = load(v);
        if (x != x) return ~0ull;
        u32 b = float_bits(x == 0.f ? 0.f : x);
        b = b >> 31 ? ~b : b | 0x80000000u;
        return (u64)b << 31; // below NaN's key, and below its complement's
    }
};
// The same order in 32 bits, for types of at most as many.
template <class T> struct Narrow { static TG_DEVICE u32 key(T x) { return (u32)x; } };
template <> struct Narrow<i32> { static TG_DEVICE u32 key(i32 x) { return (u32)x ^ 0x80000000u; } };
template <class T> struct NarrowFloat {
    static TG_DEVICE u32 key(T v) { float x = load(v); return x != x ? ~0u : (u32)(OrderedFloat<T>::key(v) >> 31); }
};
template <> struct Narrow<float> : NarrowFloat<float> {};
template <> struct Narrow<bf16> : NarrowFloat<bf16> {};
template <> struct Narrow<f16> : NarrowFloat<f16> {};
template <> struct Ordered<float> : OrderedFloat<float> {};
template <> struct Ordered<bf16> : OrderedFloat<bf16> {};
template <> struct Ordered<f16> : OrderedFloat<f16> {};
template <> struct Ordered<double> {
    static TG_DEVICE u64 key(double x) {
        if (x != x) return ~0ull;
        u64 b = double_bits(x == 0. ? 0. : x);
        return b >> 63 ? ~b : b | 1ull << 63;
    }
};
