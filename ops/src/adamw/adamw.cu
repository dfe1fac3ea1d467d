// AdamW in place on f32 masters: one tensor, or many with one launch for every 48 of them; sums of squares, and the norm of many gradients.
//
// Bound by memory: 28 bytes a parameter with f32 gradients (p, m, v read and written, g read), 28 with bf16 gradients and a bf16 copy. Blocks of 256
// threads take chunks of 4096 elements, vectors of 4; which tensor a chunk belongs to is found by bisection in the launch's parameters, so nothing is
// uploaded. Learning rate, bias corrections and the clipping coefficient of the update of many are read from device memory: a captured step stays right.
//
// Sums are in f64: a chunk's by a block, all chunks' by one block in an order that depends on the sizes alone.
#include "ops.cuh"

constexpr u32 CHUNK = 4096;
constexpr int MANY = 48;

struct Rates { float beta1, beta2, one_beta1, one_beta2, rate, unbias, eps, keep, scale; };
template <class G> TG_DEVICE void update(float* p, float* m, float* v, const G* g, bf16* shadow, u64 at, u64 n, bool wide, const Rates& r) {
    int left = n - at < 4 ? (int)(n - at) : 4;
    float pv[4], mv[4], vv[4], gv[4];
    read(pv, p + at, wide, left);
    read(mv, m + at, wide, left);
    read(vv, v + at, wide, left);
    read(gv, g + at, wide, left);
    TG_UNROLL for (int i = 0; i < 4; i++) {
        float gi = gv[i] * r.scale;
        mv[i] = r.beta1 * mv[i] + r.one_beta1 * gi;
        vv[i] = r.beta2 * vv[i] + r.one_beta2 * gi * gi;
        pv[i] = pv[i] * r.keep - r.rate * mv[i] / (sqrtf(vv[i] * r.unbias) + r.eps);
    }
    write(p + at, pv, wide, left);
    write(m + at, mv, wide, left);
    write(v + at, vv, wide, left);
    if (shadow) write(shadow + at, pv, wide, left);
}

struct AdamWParams {
    float *p, *m, *v;
    const void* g;
    u64 n;
    u32 wide, unused;
    float rates[10]; // as Rates, and one unused
};
template <class G> TG_DEVICE void adamw(const AdamWParams& p) {
    Rates r = {p.rates[0], p.rates[1], p.rates[2], p.rates[3], p.rates[4], p.rates[5], p.rates[6], p.rates[7], p.rates[8]};
    u64 at = ((u64)block_x() * threads() + thread()) * 4;
    if (at < p.n) update(p.p, p.m, p.v, (const G*)p.g, nullptr, at, p.n, p.wide, r);
}

struct AdamWManyParams {
    const double *schedule, *coefficient; // schedule: learning rate, and the reciprocals of both bias corrections
    float beta1, beta2, one_beta1, one_beta2, eps;
    u32 count;
    float *p[MANY], *m[MANY], *v[MANY];
    const void* g[MANY];
    bf16* shadow[MANY];
    u64 n[MANY];
    float decay[MANY];
    u32 first[MANY]; // chunk with which the tensor begins
    u32 kind[MANY];  // bit 0: the gradient is bf16; bit 1: all are aligned to vectors
};
TG_DEVICE u32 find(const u32* first, u32 count, u32 chunk) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (first[middle] <= chunk) low = middle;
        else high = middle;
    }
    return low;
}
template <int> TG_DEVICE void adamw_many(const AdamWManyParams& p) {
    double c = *p.coefficient;
    if (!(c - c == 0.)) return; // the gradients are not finite: leave everything as it is
    u32 i = find(p.first, p.count, block_x());
    double lr = p.schedule[0];
    Rates r = {p.beta1, p.beta2, p.one_beta1, p.one_beta2, (float)(lr * p.schedule[1]), (float)p.schedule[2], p.eps, (float)(1. - lr * p.decay[i]), (float)c};
    u64 start = (u64)(block_x() - p.first[i]) * CHUNK, end = min_of<u64>(start + CHUNK, p.n[i]);
    for (u64 at = start + thread() * 4; at < end; at += threads() * 4) {
        if (p.kind[i] & 1) update(p.p[i], p.m[i], p.v[i], (const bf16*)p.g[i], p.shadow[i], at, end, p.kind[i] & 2, r);
        else update(p.p[i], p.m[i], p.v[i], (const float*)p.g[i], p.shadow[i], at, end, p.kind[i] & 2, r);
    }
}

struct SquaresParams {
    double* parts;
    u32 count, before; // before: chunks of earlier launches
    const void* g[MANY];
    u64 n[MANY];
    u32 first[MANY];
    u32 kind[MANY];
};
template <class G> TG_DEVICE double chunk_squares(const G* g, u64 start, u64 end, bool wide) {
    double sum = 0.;
    for (u64 at = start + thread() * 4; at < end; at += threads() * 4) {
        float x[4];
        read(x, g + at, wide, end - at < 4 ? (int)(end - at) : 4);
        TG_UNROLL for (int i = 0; i < 4; i++) sum += (double)x[i] * (double)x[i];
    }
    return sum;
}
template <int> TG_DEVICE void squares(const SquaresParams& p) {
    TG_SHARED(double, scratch, [32]);
    u32 i = find(p.first, p.count, block_x());
    u64 start = (u64)(block_x() - p.first[i]) * CHUNK, end = min_of<u64>(start + CHUNK, p.n[i]);
    double sum = p.kind[i] & 1 ? chunk_squares((const bf16*)p.g[i], start, end, p.kind[i] & 2) : chunk_squares((const float*)p.g[i], start, end, p.kind[i] & 2);
    sum = block_sum(sum, scratch);
    if (thread() == 0) p.parts[p.before + block_x()] = sum;
}

struct NormParams {
    const double* parts;
    double *norm, *coefficient; // coefficient: null for the plain sum of squares, which goes to norm
    u64 n;
    double scale, max_norm;
};
template <int> TG_DEVICE void norm(const NormParams& p) {
    TG_SHARED(double, scratch, [32]);
    double sum = 0.;
    for (u64 i = thread(); i < p.n; i += threads()) sum += p.parts[i];
    sum = block_sum(sum, scratch);
    if (thread() > 0) return;
    if (!p.coefficient) {
        *p.norm = sum;
        return;
    }
    double norm = p.scale * sqrt(sum);
    *p.norm = norm;
    double c = p.max_norm > 0. && norm > p.max_norm ? p.max_norm / (norm + 1e-6) : 1.;
    *p.coefficient = c * p.scale + (norm - norm); // not a number where the norm isn't finite
}
