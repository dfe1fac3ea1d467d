// One token of the delta rule: T = 1, from a state to the next. Bound by the state's 8 Dk Dv bytes (f32, read and written).
//
// A block of 4 warps per (sequence, value head, 32 columns of the state): a lane has a column, a warp a quarter of its rows, which stay in registers
// (DK / 4 independent loads a thread) between the two sums over rows: what the state holds for k, and the output. q, k and their norms are shared.
// Dk = 128: 32 loads of 4 bytes in flight for each thread, about 64 registers, 8 blocks a multiprocessor: 32 KB in flight each.
#include "delta_rule.cuh"

template <class T, int DK> TG_DEVICE void delta_step(const DeltaParams& p) {
    constexpr int N = DK / 4;
    TG_SHARED(float, q, [DK]);
    TG_SHARED(float, k, [DK]);
    TG_SHARED(float, part, [4][32]);
    TG_SHARED(float, scratch, [4]);
    const u32 parts = div_up(p.dv, 32), head = block_x() / parts % p.hv, seq = block_x() / parts / p.hv, key_head = head / (p.hv / p.hk);
    const u32 col = block_x() % parts * 32 + lane();
    const Place at{seq, 1, seq, 0};
    const T* qs = head_rows<T>(p.q, p.q_stride, at, key_head);
    const T* ks = head_rows<T>(p.k, p.k_stride, at, key_head);
    const u64 vec = (u64)seq * p.hv + head;
    const float* from = p.h0 + vec * p.dk * p.dv + col;
    float* to = p.last + vec * p.dk * p.dv + col;

    float h[N];
    TG_UNROLL for (int i = 0; i < N; i++) {
        u32 r = warp() * N + i;
        h[i] = r < p.dk && col < p.dv ? from[(u64)r * p.dv] : 0.f;
    }
    float qq = 0.f, kk = 0.f;
    for (u32 i = thread(); i < DK; i += threads()) {
        float x = i < p.dk ? load(qs[i]) : 0.f, y = i < p.dk ? load(ks[i]) : 0.f;
        q[i] = x;
        k[i] = y;
        qq += x * x;
        kk += y * y;
    }
    qq = block_sum(qq, scratch);
    kk = block_sum(kk, scratch);
    const float rq = p.scale * (p.l2 ? 1.f / sqrtf(qq + 1e-6f) : 1.f), rk = p.l2 ? 1.f / sqrtf(kk + 1e-6f) : 1.f;
    const float alpha = p.log_decay ? expf(p.log_decay[vec]) : 1.f, beta = beta_at<T>(p, vec);
    sync();
    auto over_rows = [&](const float* x) {
        float sum = 0.f;
        TG_UNROLL for (int i = 0; i < N; i++) sum += x[warp() * N + i] * h[i];
        sync();
        part[warp()][lane()] = sum;
        sync();
        return (part[0][lane()] + part[1][lane()]) + (part[2][lane()] + part[3][lane()]);
    };
    TG_UNROLL for (int i = 0; i < N; i++) h[i] *= alpha;
    float v = col < p.dv ? load(head_rows<T>(p.v, p.v_stride, at, head)[col]) : 0.f;
    if (p.erase) v -= rk * over_rows(k);
    v *= beta;
    TG_UNROLL for (int i = 0; i < N; i++) h[i] += rk * k[warp() * N + i] * v;
    float o = rq * over_rows(q);
    if (col >= p.dv) return;
    if (warp() == 0) {
        ((T*)p.o)[vec * p.dv + col] = store<T>(o);
        if (p.erase) p.v_new[vec * p.dv + col] = v;
    }
    TG_UNROLL for (int i = 0; i < N; i++) {
        u32 r = warp() * N + i;
        if (r < p.dk) to[(u64)r * p.dv] = h[i];
    }
}
