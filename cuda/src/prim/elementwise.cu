// Elementwise functions of one, two and three tensors. Bound by memory: where rows are whole vectors (or one element for all) 16 bytes are moved at a time, other views go element by element with
// neighbours in neighbouring threads. Which function it is, is a number that all threads share, so a switch costs next to nothing.
#include "prim.cuh"

struct UnaryParams {
    const void* x;
    const void* dy; // backward only
    void* out;
    u64 n;
    double a, b; // affine: a x + b; pow: x^a
    u32 kind;
    u32 unused;
};
enum Kind { NEG, EXP, LN, SQRT, RSQRT, RECIP, SQUARE, ABS, RELU, SIGMOID, SILU, SOFTPLUS, TANH, SIN, COS, AFFINE, POW };

// sin and cos in double: x - n π/2 with π/2 in three parts (exact to |x| of about 10^15), then fdlibm's polynomials. The library's functions put a table
// for huge arguments on the stack.
TG_DEVICE double sine(double x, u32 quarter) {
    double n = rint(x * 0.63661977236758134308);
    double r = fma(-n, 1.57079632679489655800e+00, x);
    r = fma(-n, 6.12323399573676603587e-17, r);
    r = fma(-n, -1.49738490485916983e-33, r);
    double z = r * r;
    double s = r + r * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
    double c = 1. - .5 * z + z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)))));
    u32 q = (u32)(i64)(n - 4. * floor(n * .25)) + quarter;
    double y = q & 1 ? c : s;
    return q & 2 ? -y : y;
}
template <class F> TG_DEVICE F log1p_of(F x);
template <> TG_DEVICE float log1p_of(float x) { return log1pf(x); }
template <> TG_DEVICE double log1p_of(double x) { return log1p(x); }
#define TG_FLOATS(name, f32, f64) TG_DEVICE float name(float x) { return f32(x); } TG_DEVICE double name(double x) { return f64(x); }
TG_FLOATS(exp_of, expf, exp)
TG_FLOATS(log_of, logf, log)
TG_FLOATS(sqrt_of, sqrtf, sqrt)
TG_FLOATS(tanh_of, tanhf, tanh)
TG_FLOATS(abs_of, fabsf, fabs)
TG_DEVICE float fma_of(float a, float b, float c) { return fmaf(a, b, c); }
TG_DEVICE double fma_of(double a, double b, double c) { return fma(a, b, c); }

template <class F> TG_DEVICE F value(u32 kind, F x, double a, double b) {
    switch (kind) {
    case NEG: return -x;
    case EXP: return exp_of(x);
    case LN: return log_of(x);
    case SQRT: return sqrt_of(x);
    case RSQRT: return F(1) / sqrt_of(x);
    case RECIP: return F(1) / x;
    case SQUARE: return x * x;
    case ABS: return abs_of(x);
    case RELU: return x > F(0) ? x : F(0);
    case SIGMOID: return sigmoid(x);
    case SILU: return x * sigmoid(x);
    case SOFTPLUS: return (x > F(0) ? x : F(0)) + log1p_of(exp_of(-abs_of(x)));
    case TANH: return tanh_of(x);
    case SIN: return (F)sine((double)x, 0);
    case COS: return (F)sine((double)x, 1);
    case AFFINE: return fma_of(x, (F)a, (F)b);
    default: return (F)pow((double)x, a);
    }
}
template <class F> TG_DEVICE F slope(u32 kind, F x, double a) {
    F s;
    switch (kind) {
    case NEG: return F(-1);
    case EXP: return exp_of(x);
    case LN: return F(1) / x;
    case SQRT: return F(1) / (F(2) * sqrt_of(x));
    case RSQRT: return F(-1) / (F(2) * x * sqrt_of(x));
    case RECIP: return F(-1) / (x * x);
    case SQUARE: return F(2) * x;
    case ABS: return x > F(0) ? F(1) : x < F(0) ? F(-1) : F(0);
    case RELU: return x > F(0) ? F(1) : F(0);
    case SIGMOID: s = sigmoid(x); return s * (F(1) - s);
    case SILU: s = sigmoid(x); return s * (F(1) + x * (F(1) - s));
    case SOFTPLUS: return sigmoid(x);
    case TANH: s = tanh_of(x); return F(1) - s * s;
    case SIN: return (F)sine((double)x, 1);
    case COS: return (F)-sine((double)x, 0);
    case AFFINE: return (F)a;
    default: return (F)(a * pow((double)x, a - 1.));
    }
}

// f(x, dy) for every element, 16 bytes at a time where the addresses allow it.
template <class T, class F> TG_DEVICE void dense(const UnaryParams& p, F f) {
    constexpr int N = Vec<T>::N;
    const T *x = (const T*)p.x, *dy = (const T*)p.dy;
    T* out = (T*)p.out;
    u64 at = ((u64)block_x() * threads() + thread()) * N;
    if (at + N <= p.n && aligned16(x) && aligned16(dy) && aligned16(out)) {
        Acc<T> v[N], g[N] = {};
        load16(v, x + at);
        if (dy) load16(g, dy + at);
        TG_UNROLL for (int i = 0; i < N; i++) v[i] = f(v[i], g[i]);
        store16(out + at, v);
    } else {
        for (u64 i = at; i < at + N && i < p.n; i++) out[i] = store<T>(f(load(x[i]), dy ? load(dy[i]) : Acc<T>(0)));
    }
}
template <class T> TG_DEVICE void unary(const UnaryParams& p) {
    dense<T>(p, [&](Acc<T> x, Acc<T>) { return value(p.kind, x, p.a, p.b); });
}
template <class T> TG_DEVICE void unary_backward(const UnaryParams& p) {
    dense<T>(p, [&](Acc<T> x, Acc<T> dy) { return dy * slope(p.kind, x, p.a); });
}

struct NestParams {
    const void* x[3];
    void* out;
    u32 kind, vectors; // vectors: along the last axis every view has stride 1 and whole vectors aligned to 16 bytes, or stride 0
    Nest nest;
};
enum BinaryKind { ADD, SUB, MUL, DIV, MAX, MIN };

TG_DEVICE i64 divide(i64 a, i64 b) { return b == 0 || (b == -1 && a == (i64)(1ull << 63)) ? 0 : a / b; }
TG_DEVICE float divide(float a, float b) { return a / b; }
TG_DEVICE double divide(double a, double b) { return a / b; }
template <class W> TG_DEVICE W arithmetic(u32 kind, W a, W b) {
    switch (kind) {
    case ADD: return a + b;
    case SUB: return a - b;
    case MUL: return a * b;
    case DIV: return divide(a, b);
    case MAX: return a > b ? a : b;
    default: return a < b ? a : b;
    }
}
// integers wrap
template <> TG_DEVICE i64 arithmetic(u32 kind, i64 a, i64 b) {
    switch (kind) {
    case ADD: return (i64)((u64)a + (u64)b);
    case SUB: return (i64)((u64)a - (u64)b);
    case MUL: return (i64)((u64)a * (u64)b);
    case DIV: return divide(a, b);
    case MAX: return a > b ? a : b;
    default: return a < b ? a : b;
    }
}

template <class T> union Pack { U4 u; T t[16 / sizeof(T)]; };

template <class T> TG_DEVICE void binary(const NestParams& p) {
    typedef Wide<T> W;
    constexpr int N = 16 / sizeof(T);
    const T *a = (const T*)p.x[0], *b = (const T*)p.x[1];
    T* out = (T*)p.out;
    auto one = [&](u64 i) {
        i64 o[2];
        offsets(p.nest, i, o);
        out[i] = W::down(arithmetic(p.kind, W::up(a[o[0]]), W::up(b[o[1]])));
    };
    if (!p.vectors) return each(p.nest.n, N, one);
    u64 at = ((u64)block_x() * threads() + thread()) * N;
    if (at + N <= p.nest.n) {
        Pack<T> x, y, z;
        i64 o[2];
        offsets(p.nest, at, o);
        u32 last = p.nest.dims - 1;
        if (p.nest.stride[0][last]) x.u = *(const U4*)(a + o[0]);
        else TG_UNROLL for (int i = 0; i < N; i++) x.t[i] = a[o[0]];
        if (p.nest.stride[1][last]) y.u = *(const U4*)(b + o[1]);
        else TG_UNROLL for (int i = 0; i < N; i++) y.t[i] = b[o[1]];
        TG_UNROLL for (int i = 0; i < N; i++) z.t[i] = W::down(arithmetic(p.kind, W::up(x.t[i]), W::up(y.t[i])));
        *(U4*)(out + at) = z.u;
    } else {
        for (u64 i = at; i < p.nest.n; i++) one(i);
    }
}

enum CompareKind { EQ, LT, LE };
template <class T> TG_DEVICE void compare(const NestParams& p) {
    typedef Wide<T> W;
    each(p.nest.n, 8, [&](u64 i) {
        i64 o[2];
        offsets(p.nest, i, o);
        auto a = W::up(((const T*)p.x[0])[o[0]]), b = W::up(((const T*)p.x[1])[o[1]]);
        ((u8*)p.out)[i] = p.kind == EQ ? a == b : p.kind == LT ? a < b : a <= b;
    });
}
// cond ? a : b of elements with so many bytes
template <int BYTES> TG_DEVICE void select(const NestParams& p) {
    typedef typename Raw<BYTES>::type T;
    each(p.nest.n, 8, [&](u64 i) {
        i64 o[3];
        offsets(p.nest, i, o);
        ((T*)p.out)[i] = ((const u8*)p.x[0])[o[0]] ? ((const T*)p.x[1])[o[1]] : ((const T*)p.x[2])[o[2]];
    });
}
