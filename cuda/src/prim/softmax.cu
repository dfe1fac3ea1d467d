// Softmax and its logarithm along rows, and the gradient. A block takes a row (a warp, where rows are short): the maximum and the sum in one pass,
// rescaled when the maximum grows, then the values.
#include "prim.cuh"

struct SoftmaxParams {
    const void* x; // backward: y
    const void* dy;
    void* out;
    u64 rows, cols;
    u32 log, unused;
};
TG_DEVICE float exp_of(float x) { return expf(x); }
TG_DEVICE double exp_of(double x) { return exp(x); }
TG_DEVICE float log_of(float x) { return logf(x); }
TG_DEVICE double log_of(double x) { return log(x); }

// The team that has a row: a block or a warp.
template <bool WARP, class F, class G> TG_DEVICE F together(F x, F* scratch, F none, G f) {
    return WARP ? warp_reduce(x, f) : block_reduce(x, scratch, none, f);
}
template <class T, bool WARP> TG_DEVICE void softmax(const SoftmaxParams& p) {
    typedef Acc<T> F;
    TG_SHARED(F, scratch, [32]);
    u64 row = WARP ? (u64)block_x() * (threads() / 32) + warp() : block_x();
    if (row >= p.rows) return;
    u32 me = WARP ? lane() : thread(), team = WARP ? 32 : threads();
    const T* x = (const T*)p.x + row * p.cols;
    T* out = (T*)p.out + row * p.cols;
    F top = (F)-infinity(), sum = 0;
    for (u64 i = me; i < p.cols; i += team) {
        F v = load(x[i]);
        if (v > top) { sum = sum * exp_of(top - v) + F(1); top = v; }
        else if (v == v && v != (F)-infinity()) sum += exp_of(v - top);
        else if (v != v) sum = v;
    }
    F m = together<WARP>(top, scratch, (F)-infinity(), [](F a, F b) { return max_of(a, b); });
    sum = together<WARP>(sum == F(0) ? F(0) : sum * exp_of(top - m), scratch, F(0), [](F a, F b) { return a + b; });
    F lse = m + log_of(sum), scale = F(1) / sum;
    for (u64 i = me; i < p.cols; i += team) {
        F v = load(x[i]);
        out[i] = store<T>(p.log ? v - lse : exp_of(v - m) * scale);
    }
}
// softmax: y (dy - Σ y dy); logarithm: dy - e^y Σ dy
template <class T, bool WARP> TG_DEVICE void softmax_backward(const SoftmaxParams& p) {
    typedef Acc<T> F;
    TG_SHARED(F, scratch, [32]);
    u64 row = WARP ? (u64)block_x() * (threads() / 32) + warp() : block_x();
    if (row >= p.rows) return;
    u32 me = WARP ? lane() : thread(), team = WARP ? 32 : threads();
    const T *y = (const T*)p.x + row * p.cols, *dy = (const T*)p.dy + row * p.cols;
    T* out = (T*)p.out + row * p.cols;
    F sum = 0;
    for (u64 i = me; i < p.cols; i += team) sum += p.log ? load(dy[i]) : load(y[i]) * load(dy[i]);
    sum = together<WARP>(sum, scratch, F(0), [](F a, F b) { return a + b; });
    for (u64 i = me; i < p.cols; i += team) {
        F v = load(y[i]), g = load(dy[i]);
        out[i] = store<T>(p.log ? g - exp_of(v) * sum : v * (g - sum));
    }
}
