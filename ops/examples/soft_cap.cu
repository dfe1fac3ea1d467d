// y = cap · tanh(x / cap) and its gradient, elementwise. Each thread takes 16 bytes; the last vector may be ragged.
#include "tidegate.cuh"

struct SoftCapParams {
    const void* a; // forward: x; backward: y
    const void* dy; // backward only
    void* out;
    u64 n;
    float cap;
};

template <class T, class F> TG_DEVICE void each(const SoftCapParams& p, F f) {
    constexpr int N = Vec<T>::N;
    const T *a = (const T*)p.a, *dy = (const T*)p.dy;
    T* out = (T*)p.out;
    u64 at = ((u64)block_x() * threads() + thread()) * N;
    if (at + N <= p.n && aligned16(a) && aligned16(dy) && aligned16(out)) { // a null dy is aligned
        float x[N], g[N] = {};
        load16(x, a + at);
        if (dy) load16(g, dy + at);
        TG_UNROLL for (int i = 0; i < N; i++) x[i] = f(x[i], g[i]);
        store16(out + at, x);
    } else {
        for (u64 i = at; i < at + N && i < p.n; i++) out[i] = store<T>(f(load(a[i]), dy ? load(dy[i]) : 0.f));
    }
}

template <class T> TG_DEVICE void soft_cap_forward(const SoftCapParams& p) {
    each<T>(p, [&](float x, float) { return p.cap * tanhf(x / p.cap); });
}
template <class T> TG_DEVICE void soft_cap_backward(const SoftCapParams& p) {
    each<T>(p, [&](float y, float dy) { return dy * (1.f - y / p.cap * (y / p.cap)); });
}
