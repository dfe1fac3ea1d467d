// The shared expert's part of a mixture: y + sigmoid(gate) · s, the gate a number a row, and its gradient. Bound by memory: three tensors a pass forward
// (y, s, sum), three backward (dy, s, ds). A warp has a row.
#include "ops.cuh"

struct SharedParams {
    const void *y, *s, *gate; // y: dy in the backward
    void *out, *dgate;        // out: ds in the backward; dgate: backward only
    u32 rows, width, wide, unused;
};

template <class T> TG_DEVICE void add_shared(const SharedParams& p) {
    constexpr int N = Vec<T>::N;
    u32 row = block_x() * (threads() / 32) + warp();
    if (row >= p.rows) return;
    float g = Sigmoid<T>::of(load(((const T*)p.gate)[row]));
    u64 at = (u64)row * p.width;
    for (u32 c = lane() * N; c < p.width; c += 32 * N) {
        int n = (int)(p.width - c);
        float y[N], s[N];
        read(y, (const T*)p.y + at + c, p.wide, n);
        read(s, (const T*)p.s + at + c, p.wide, n);
        TG_UNROLL for (int i = 0; i < N; i++) y[i] += g * s[i];
        write((T*)p.out + at + c, y, p.wide, n);
    }
}

// ds = g dy and d gate = <dy, s> g (1 − g).
template <class T> TG_DEVICE void add_shared_backward(const SharedParams& p) {
    constexpr int N = Vec<T>::N;
    u32 row = block_x() * (threads() / 32) + warp();
    if (row >= p.rows) return;
    float g = Sigmoid<T>::of(load(((const T*)p.gate)[row])), inner = 0.f;
    u64 at = (u64)row * p.width;
    for (u32 c = lane() * N; c < p.width; c += 32 * N) {
        int n = (int)(p.width - c);
        float d[N], s[N];
        read(d, (const T*)p.y + at + c, p.wide, n);
        read(s, (const T*)p.s + at + c, p.wide, n);
        TG_UNROLL for (int i = 0; i < N; i++) inner += d[i] * s[i], d[i] *= g;
        write((T*)p.out + at + c, d, p.wide, n);
    }
    inner = warp_sum(inner);
    if (lane() == 0) ((T*)p.dgate)[row] = store<T>(inner * g * (1.f - g));
}
