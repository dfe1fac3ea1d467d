// Cross-entropy of projected rows: what happens between the matrix products. Rows go in blocks whose logits (f32, from cublasLt) fit a buffer of bounded
// size; for each block: logits = x Wᵀ; `loss` turns them into losses and, in place, into their gradient; dx = dz W and dW += dzᵀ x follow.
//
// A block has a row. Where a row's logits fit its registers (HELD vectors of 4 a thread), they are read once: maximum, sum of exponentials, and
// (softmax − onehot) / counted in the element type over the logits, which all threads have read by then: a barrier makes that safe. Longer rows are read
// twice: maximum and sum of exponentials in one pass, rescaled when the maximum grows, then the gradient, step by step: element c of T lies at or before
// element c of f32, and a barrier stands between the reads and the writes of each step. Bound by memory: 4 bytes a logit forward; with the gradient in
// bf16 6, or 10 where rows are read twice; beside 6·H FLOP.
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
template <class T> TG_DEVICE void put4(T* to, const float (&v)[4]);
template <> TG_DEVICE void put4(float* to, const float (&v)[4]) { store16(to, v); }
template <> TG_DEVICE void put4(bf16* to, const float (&v)[4]) {
    U2 x = {pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3])};
    *(U2*)to = x;
}

// Rows are padded to whole vectors: what is read beyond a row's end is not used, and what is written there is not read.
template <class T, int HELD> TG_DEVICE void loss(const LossParams& p) {
    constexpr int THREADS = 512, AHEAD = HELD > 0 ? HELD : 4, SIDE = THREADS * 4, STEP = SIDE * AHEAD; // AHEAD: vectors that a thread reads at a time
    TG_SHARED(float, scratch, [32]);
    u64 row = block_x();
    float* z = p.z + row * p.stride;
    T* dz = (T*)z;
    i32 end = HELD > 0 ? 1 : (i32)p.vocab, mine = (i32)thread() * 4;
    float v[AHEAD][4]; // where a row is held: exponentials relative to `top`, once the sum is known
    auto fetch = [&](i32 start) {
        const float* from = z + start + mine;
        i32 left = (i32)p.vocab - start;
        if (left >= STEP) {
            TG_UNROLL for (int j = 0; j < AHEAD; j++) load16(v[j], from + j * SIDE);
            return;
        }
        left -= mine;
        TG_UNROLL for (int j = 0; j < AHEAD; j++) {
            if (left > j * SIDE) load16(v[j], from + j * SIDE);
            TG_UNROLL for (int i = 0; i < 4; i++) if (left <= j * SIDE + i) v[j][i] = -infinity();
        }
    };
    if (HELD > 0) fetch(0); // before anything is waited for
    i64 target = p.targets[row];
    if (target < 0 || (u64)target >= p.vocab) {
        if (thread() == 0) p.losses[row] = 0.f;
        float none[4] = {};
        if (p.grad) for (i32 c = mine; c < (i32)p.vocab; c += SIDE) put4(dz + c, none);
        return;
    }
    float logit = z[target], share = 1.f / *p.counted, top = -infinity(), sum = 0.f;
    for (i32 start = 0; start < end; start += STEP) {
        if (HELD == 0) fetch(start);
        float most = top;
        TG_UNROLL for (int j = 0; j < AHEAD; j++)
            TG_UNROLL for (int i = 0; i < 4; i++) most = max_of(most, v[j][i]);
        float base = most == -infinity() ? 0.f : most; // none yet: e^-∞ is 0
        sum *= exp_of<T>(top - base);
        top = most;
        TG_UNROLL for (int j = 0; j < AHEAD; j++) {
            TG_UNROLL for (int i = 0; i < 4; i++) {
                float e = exp_of<T>(v[j][i] - base);
                sum += e;
                if (HELD > 0) v[j][i] = e;
            }
        }
    }
    float most = block_max(top, scratch);
    float lse = most + logf(block_sum(top == -infinity() ? sum : sum * exp_of<T>(top - most), scratch));
    if (thread() == 0) p.losses[row] = lse - logit;
    if (!p.grad) return;
    sync();
    float scale = top == -infinity() ? 0.f : exp_of<T>(top - lse) * share;
    for (i32 start = 0; start < end; start += STEP) {
        if (HELD == 0) fetch(start), sync();
        i32 left = (i32)p.vocab - start - mine;
        T* to = dz + start + mine;
        TG_UNROLL for (int j = 0; j < AHEAD; j++) {
            TG_UNROLL for (int i = 0; i < 4; i++) v[j][i] = HELD > 0 ? v[j][i] * scale : exp_of<T>(v[j][i] - lse) * share;
            if (left > j * SIDE) put4(to + j * SIDE, v[j]);
        }
    }
    // by the thread that wrote its vector
    if (thread() == (u32)target / 4 % THREADS) dz[target] = store<T>((exp_of<T>(logit - lse) - 1.f) * share);
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
    constexpr int N = 8;
    u64 at = ((u64)block_x() * threads() + thread()) * N;
    const float* from = p.from + at;
    T* to = (T*)p.to + at;
    if (at + N <= p.n && aligned16(to)) {
        float a[4], b[4], v[N];
        load16(a, from);
        load16(b, from + 4);
        TG_UNROLL for (int i = 0; i < 4; i++) v[i] = a[i], v[i + 4] = b[i];
        store16(to, v);
    } else {
        for (int i = 0; i < N && at + i < p.n; i++) to[i] = store<T>(from[i]);
    }
}
