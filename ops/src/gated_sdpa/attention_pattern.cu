// Attention patterns [B, H, T, S] in f32, for looking at: a warp has a row (b, h, t), its lanes take keys in turn.
//
// Exact products in f32 without tensor cores; q lies in shared memory, K comes from L1 and L2. Scores are written first, then the row is read back and
// normalised, so memory is what the result takes. Bound by L1 (16 bytes of K for each 4 or 8 products): some TFLOP/s, not meant for training.
#include "gated_sdpa.cuh"

template <class T> TG_DEVICE void attention_pattern(const SdpaParams& p) {
    constexpr int N = Vec<T>::N;
    if (block_x() == 0) check_documents(p);
    u32 id = block_x() * (threads() / 32) + warp();
    if (id >= p.total) return;
    u32 bh, r, b, hk, time, g;
    p.rows.divmod(id, bh, r);
    p.heads.divmod(bh, b, hk);
    p.group.divmod(r, time, g);
    float* q = shared<float>() + warp() * p.team; // here: d, up to whole vectors
    const T* from = Rows<const T>(p, p.q, b, hk).at(r);
    for (int c = lane(); c < (int)p.team; c += 32) q[c] = c < p.d ? load(from[c]) : 0.f;
    sync_warp();
    Keys<const T> ks(p.k, b, hk);
    Band band = keys_of(p, time);
    float* out = p.pattern + (((u64)b * p.H + hk * p.group.divisor + g) * p.queries + time) * p.keys;
    float top = -infinity(), sum = 0.f;
    for (int j = band.lo + (int)lane(); j < band.hi; j += 32) {
        const T* k = ks.at(j);
        float s = 0.f;
        if (p.vec & VEC_K) {
            for (int c = 0; c < p.d; c += N) {
                float x[N];
                load16(x, k + c);
                TG_UNROLL for (int i = 0; i < N; i++) s += q[c + i] * x[i];
            }
        } else {
            for (int c = 0; c < p.d; c++) s += q[c] * load(k[c]);
        }
        s *= p.c * p.flip;
        out[j] = s;
        float m = fmaxf(top, s);
        sum = sum * fast_exp2(top - m) + fast_exp2(s - m);
        top = m;
    }
    float m = warp_max(top), base = m == -infinity() ? 0.f : m;
    sum = warp_sum(sum * fast_exp2(top - base)); // a lane without keys has 0
    float inverse = 1.f / sum;
    sync_warp(); // scores that other lanes wrote
    for (int j = (int)lane(); j < p.keys; j += 32) out[j] = j >= band.lo && j < band.hi ? fast_exp2(out[j] - base) * inverse : 0.f;
}
