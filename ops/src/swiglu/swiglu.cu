// SwiGLU: y = silu(gate) · up of rows [gate | up], and its gradient.
//
// Elementwise and bound by memory: forward moves 6 bytes an output in bf16, backward 10. A thread has one vector of 16 bytes of the output's width and its
// two places in the input's row. The activation takes two operations of the special function unit an element in bf16.
#include "ops.cuh"

struct SwiGluParams {
    const void *x, *dy; // dy: backward only
    void* out;
    u64 n; // vectors of all rows
    FastDiv per_row;
    u32 width, wide, many; // width: I; many: n needs 64 bits
};

template <class T, class F> TG_DEVICE void each(const SwiGluParams& p, F f) {
    u64 i = (u64)block_x() * threads() + thread();
    if (i >= p.n) return;
    u64 row = p.many ? i / p.per_row.divisor : p.per_row.div((u32)i);
    u32 c = (u32)(i - row * p.per_row.divisor) * Vec<T>::N;
    f(row, c, (int)(p.width - c));
}

template <class T> TG_DEVICE void swiglu_forward(const SwiGluParams& p) {
    constexpr int N = Vec<T>::N;
    each<T>(p, [&](u64 row, u32 c, int n) {
        const T* x = (const T*)p.x + row * 2 * p.width + c;
        float g[N], u[N];
        read(g, x, p.wide, n);
        read(u, x + p.width, p.wide, n);
        TG_UNROLL for (int i = 0; i < N; i++) u[i] *= g[i] * Sigmoid<T>::of(g[i]);
        write((T*)p.out + row * p.width + c, u, p.wide, n);
    });
}

// d up = dy · g s and d gate = dy · up · s (1 + g (1 − s)), s the sigmoid of the gate.
template <class T> TG_DEVICE void swiglu_backward(const SwiGluParams& p) {
    constexpr int N = Vec<T>::N;
    each<T>(p, [&](u64 row, u32 c, int n) {
        u64 at = row * 2 * p.width + c;
        const T* x = (const T*)p.x + at;
        float g[N], u[N], d[N];
        read(g, x, p.wide, n);
        read(u, x + p.width, p.wide, n);
        read(d, (const T*)p.dy + row * p.width + c, p.wide, n);
        TG_UNROLL for (int i = 0; i < N; i++) {
            float s = Sigmoid<T>::of(g[i]), up = u[i];
            u[i] = d[i] * g[i] * s;
            g[i] = d[i] * up * s * (1.f + g[i] * (1.f - s));
        }
        write((T*)p.out + at, g, p.wide, n);
        write((T*)p.out + at + p.width, u, p.wide, n);
    });
}
