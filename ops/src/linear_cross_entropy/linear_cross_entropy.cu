// Cross-entropy of projected rows: what happens between the matrix products. Rows go in blocks whose logits (f32, from cublasLt) fit a buffer of bounded
// size; for each block: logits = x Wᵀ; `loss` turns them into losses and, in place, into their gradient; dx = dz W and dW += dzᵀ x follow.
//
// A block of 512 threads has a row: maximum and sum of exponentials in one pass, rescaled when the maximum grows; the second pass writes
// (softmax − onehot) / counted in the element type over the logits that it has read (element c of T lies at or before element c of f32: a barrier
// between the reads and writes of each step makes that safe). Bound by memory: 4 bytes a logit forward, 10 with the gradient in bf16, beside 6·H FLOP.
//
// How many targets count is found on the device; wrong targets are told as faults and count as ignored until then.
#include "tidegate.cuh"

struct TargetsParams {
    const i64* targets;
    float* counted;
    u64 n, vocab;
    i64 ignore;
    Fault wrong, none;
};
template <int> TG_DEVICE void count_targets(const TargetsParams& p) {
    TG_SHARED(u64, scratch, [32]);
    u64 count = 0;
    for (u64 i = thread(); i < p.n; i += threads()) {
        i64 t = p.targets[i];
        if (t == p.ignore) continue;
        if (t >= 0 && (u64)t < p.vocab) count++;
        else p.wrong.tell(t);
    }
    count = block_sum(count, scratch);
    if (thread() > 0) return;
    *p.counted = (float)count;
    if (count == 0) p.none.tell((i64)p.n);
}

struct LossParams {
    float* z; // [rows, stride]; on return dz in T
    const i64* targets;
    float* losses;
    const float* counted;
    u32 vocab, stride, grad, unused;
};
template <class T> TG_DEVICE float exp_of(float x) { return fast_exp(x); }
template <> TG_DEVICE float exp_of<float>(float x) { return expf(x); }
// Adds v to a sum of exponentials relative to `top`.
template <class T> TG_DEVICE void gather(float& top, float& sum, float v) {
    if (v > top) {
        sum = sum * exp_of<T>(top - v) + 1.f;
        top = v;
    } else sum += exp_of<T>(v - top);
}
template <class T> TG_DEVICE void loss(const LossParams& p) {
    TG_SHARED(float, scratch, [32]);
    u64 row = block_x();
    float* z = p.z + row * p.stride;
    T* dz = (T*)z;
    i64 target = p.targets[row];
    bool counts = target >= 0 && (u64)target < p.vocab;
    float lse = 0.f, share = 0.f;
    if (counts) {
        float top = -infinity(), sum = 0.f;
        for (u32 c = thread() * 4; c < p.vocab; c += threads() * 4) {
            float v[4];
            load16(v, z + c); // rows are padded to whole vectors
            TG_UNROLL for (int i = 0; i < 4; i++) if (c + i < p.vocab) gather<T>(top, sum, v[i]);
        }
        float most = block_max(top, scratch);
        lse = most + logf(block_sum(top == -infinity() ? sum : sum * exp_of<T>(top - most), scratch));
        share = 1.f / *p.counted;
    }
    if (thread() == 0) p.losses[row] = counts ? lse - z[target] : 0.f;
    if (!p.grad) return;
    sync();
    for (u32 start = 0; start < p.vocab; start += threads() * 4) {
        u32 c = start + thread() * 4;
        float v[4] = {};
        if (c < p.vocab && counts) {
            load16(v, z + c);
            TG_UNROLL for (int i = 0; i < 4; i++) v[i] = (exp_of<T>(v[i] - lse) - (c + i == (u64)target ? 1.f : 0.f)) * share;
        }
        sync();
        TG_UNROLL for (int i = 0; i < 4; i++) if (c + i < p.vocab) dz[c + i] = store<T>(v[i]);
    }
}

struct MeanParams {
    const float *losses, *counted;
    float* out;
    u64 n;
};
template <int> TG_DEVICE void mean_loss(const MeanParams& p) {
    TG_SHARED(double, scratch, [32]);
    double sum = 0.;
    for (u64 i = thread(); i < p.n; i += threads()) sum += p.losses[i];
    sum = block_sum(sum, scratch);
    if (thread() == 0) *p.out = (float)(sum / *p.counted);
}

struct RoundParams {
    const float* from;
    void* to;
    u64 n;
};
// The weight's gradient is summed over blocks of rows in f32.
template <class T> TG_DEVICE void round_to(const RoundParams& p) {
    u64 at = ((u64)block_x() * threads() + thread()) * 4;
    TG_UNROLL for (int i = 0; i < 4; i++) if (at + i < p.n) ((T*)p.to)[at + i] = store<T>(p.from[at + i]);
}
