// Conversion between dtypes: floats round to nearest even, floats to integers truncate, saturate and make 0 of NaN, integers go by way of double.
#include "prim.cuh"

struct CastParams {
    const void* x;
    void* out;
    u64 n;
    u32 to; // F64, F32, BF16, F16, I64, I32, U32, U8
    u32 unused;
};

TG_DEVICE double widen(double x) { return x; }
TG_DEVICE double widen(float x) { return x; }
TG_DEVICE double widen(bf16 x) { return load(x); }
TG_DEVICE double widen(f16 x) { return load(x); }
TG_DEVICE double widen(i64 x) { return (double)x; }
TG_DEVICE double widen(i32 x) { return x; }
TG_DEVICE double widen(u32 x) { return x; }
TG_DEVICE double widen(u8 x) { return x; }

// Rounded once: the f32 between keeps what was cut off in its last bit ("round to odd"), so that the second rounding decides right.
TG_DEVICE bf16 bf16_of(double x) {
    float f = (float)x;
    if ((double)f == x || f != f || fabsf(f) == infinity()) return store<bf16>(f);
    u32 b = float_bits(f);
    if (fabs((double)f) > fabs(x)) b -= 1; // towards zero
    return store<bf16>(bits_float(b | 1));
}
template <class I> TG_DEVICE I saturate(double x, double least, double most, I low, I high) {
    return x != x ? I(0) : x <= least ? low : x >= most ? high : (I)x;
}

template <class S> TG_DEVICE void cast(const CastParams& p) {
    each(p.n, 8, [&](u64 i) {
        S s = ((const S*)p.x)[i];
        switch (p.to) {
        case 0: ((double*)p.out)[i] = widen(s); break;
        case 1: ((float*)p.out)[i] = (float)widen(s); break;
        case 2: ((bf16*)p.out)[i] = bf16_of(widen(s)); break;
        case 3: ((f16*)p.out)[i] = store<f16>((float)widen(s)); break;
        case 4: ((i64*)p.out)[i] = saturate<i64>(widen(s), -9223372036854775808., 9223372036854775808., (i64)(1ull << 63), (i64)(~0ull >> 1)); break;
        case 5: ((i32*)p.out)[i] = saturate<i32>(widen(s), -2147483648., 2147483647., (i32)0x80000000u, 0x7fffffff); break;
        case 6: ((u32*)p.out)[i] = saturate<u32>(widen(s), 0., 4294967295., 0u, 0xffffffffu); break;
        default: ((u8*)p.out)[i] = saturate<u8>(widen(s), 0., 255., 0, 255); break;
        }
    });
}

// The conversions of a training step, float to float, without going by way of double; S is float, bf16 or f16. A thread moves 4 elements at a time, of
// which 4 reads are under way together.
template <class S, class D> TG_DEVICE void cast_float(const CastParams& p) {
    constexpr int N = 4, TIMES = 4;
    typedef typename Raw<N * sizeof(S)>::type From;
    typedef typename Raw<N * sizeof(D)>::type To;
    const S* x = (const S*)p.x;
    D* out = (D*)p.out;
    union { From raw; S s[N]; } from[TIMES];
    u64 first = ((u64)block_x() * threads() * TIMES + thread()) * N, step = threads() * N;
    bool whole = (u64)x % sizeof(From) == 0 && (u64)out % sizeof(To) == 0;
    TG_UNROLL for (int j = 0; j < TIMES; j++)
        if (whole && first + j * step + N <= p.n) from[j].raw = *(const From*)(x + first + j * step);
    TG_UNROLL for (int j = 0; j < TIMES; j++) {
        u64 at = first + j * step;
        if (whole && at + N <= p.n) {
            union { To raw; D d[N]; } to;
            TG_UNROLL for (int i = 0; i < N; i++) to.d[i] = store<D>(load(from[j].s[i]));
            *(To*)(out + at) = to.raw;
        } else {
            TG_UNROLL for (int i = 0; i < N; i++)
                if (at + i < p.n) out[at + i] = store<D>(load(x[at + i]));
        }
    }
}
