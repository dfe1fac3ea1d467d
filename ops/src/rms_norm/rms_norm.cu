// RMS norm of rows: y = x · r · (c + w) with r = 1/√(mean x² + eps), with a residual added in front or a gate behind; and its gradient.
//
// Bound by memory: forward reads x (and the third tensor) and writes y (and the sum) once, backward reads x and dy and writes dx once; each thread moves
// 16 bytes at a time. A team has a row: a warp for rows of up to 128 vectors, a block of 256 threads for longer ones. The row stays in registers between
// the sum of squares and its use (VECS vectors a thread); rows beyond 1024 vectors are read twice instead (VECS = 0). Parameters and what the row is
// multiplied by come from the first-level cache.
//
// Backward: with g = dy · act · (c + w), dx = r (g − x r² mean(g x)): one pass sums x² and g x together. The weight's gradient Σ dy · act · x · r is
// summed in registers over the rows that a team takes, over a block's warps in order in shared memory, then over blocks by `sum_columns`. How many
// blocks there are depends on the shape alone.
//
// Largest variant (bf16, VECS 4): backward holds x and dy as they lie in memory and dw as floats, 64 registers a thread: 2 blocks of 256 threads on a
// multiprocessor.
#include "ops.cuh"

struct RmsNormParams {
    const void *x, *w, *third; // third: the residual, or the gate
    void *y, *sum;             // sum: x + residual
    Rows rows, third_rows;
    u64 n;
    u32 d, wide;
    u32 residual, gate; // gate: 0 none, 1 SiLU, 2 sigmoid
    float eps, centre;
};

// Calls f(slot, column) for the vectors of a row that are this thread's.
template <int VECS, int TEAM, int N, class F> TG_DEVICE void sweep(u32 me, u32 d, F f) {
    if constexpr (VECS > 0) {
        TG_UNROLL for (int j = 0; j < VECS; j++) {
            u32 c = (me + j * TEAM) * N;
            if (c < d) f(j, c);
        }
    } else {
        for (u32 c = me * N; c < d; c += TEAM * N) f(0, c);
    }
}
template <int TEAM> TG_DEVICE float team_sum(float x, float* scratch) { return TEAM == 32 ? warp_sum(x) : block_sum(x, scratch); }
template <class T> TG_DEVICE float activation(u32 gate, float x) {
    float s = Sigmoid<T>::of(x);
    return gate == 1 ? x * s : s;
}

template <class T, class W, int TEAM, int VECS> TG_DEVICE void rms_norm_forward(const RmsNormParams& p) {
    constexpr int N = Vec<T>::N, SLOTS = VECS > 0 ? VECS : 1;
    TG_SHARED(float, scratch, [32]);
    u32 me = TEAM == 32 ? lane() : thread();
    u64 row = TEAM == 32 ? (u64)block_x() * (threads() / 32) + warp() : block_x();
    if (row >= p.n) return;
    const T* x = (const T*)p.x + p.rows.at(row);
    const T* third = p.third ? (const T*)p.third + p.third_rows.at(row) : nullptr;
    const W* w = (const W*)p.w;
    u64 out = row * p.d;
    float v[SLOTS][N], other[N];
    auto fetch = [&](int j, u32 c) {
        read(v[j], x + c, p.wide, (int)(p.d - c));
        if (p.residual) {
            read(other, third + c, p.wide, (int)(p.d - c));
            TG_UNROLL for (int i = 0; i < N; i++) v[j][i] += other[i];
        }
    };
    float square = 0.f;
    sweep<VECS, TEAM, N>(me, p.d, [&](int j, u32 c) {
        fetch(j, c);
        TG_UNROLL for (int i = 0; i < N; i++) square += v[j][i] * v[j][i];
    });
    float r = 1.f / sqrtf(team_sum<TEAM>(square, scratch) / (float)p.d + p.eps);
    sweep<VECS, TEAM, N>(me, p.d, [&](int j, u32 c) {
        int n = (int)(p.d - c);
        if (VECS == 0) fetch(j, c);
        if (p.residual) write((T*)p.sum + out + c, v[j], p.wide, n);
        float y[N];
        read(y, w + c, p.wide, n);
        TG_UNROLL for (int i = 0; i < N; i++) y[i] = v[j][i] * r * (p.centre + y[i]);
        if (p.gate) {
            read(other, third + c, p.wide, n);
            TG_UNROLL for (int i = 0; i < N; i++) y[i] *= activation<T>(p.gate, other[i]);
        }
        write((T*)p.y + out + c, y, p.wide, n);
    });
}

struct RmsNormBackwardParams {
    const void *x, *w, *dy, *third; // third: the gate, or the gradient of the sum
    void *dx, *dgate;
    float* parts; // a row of the weight's gradient for each block
    Rows rows, third_rows;
    u64 n;
    u32 d, wide;
    u32 gate, unused;
    float eps, centre;
};

template <class T, class W, int TEAM, int VECS> TG_DEVICE void rms_norm_backward(const RmsNormBackwardParams& p) {
    constexpr int N = Vec<T>::N, SLOTS = VECS > 0 ? VECS : 1;
    TG_SHARED(float, scratch, [32]);
    TG_SHARED(float, joint, [TEAM == 32 ? VECS * 32 * N : 1]);
    u32 me = TEAM == 32 ? lane() : thread(), teams = threads() / TEAM;
    const W* w = (const W*)p.w;
    float* part = p.parts + (u64)block_x() * p.d;
    float dw[SLOTS][N] = {};
    if (VECS == 0) sweep<VECS, TEAM, N>(me, p.d, [&](int, u32 c) { for (int i = 0; i < N && c + i < p.d; i++) part[c + i] = 0.f; });
    for (u64 row = (u64)block_x() * teams + thread() / TEAM; row < p.n; row += (u64)grid_x() * teams) {
        const T *x = (const T*)p.x + p.rows.at(row), *dy = (const T*)p.dy + row * p.d;
        const T* third = p.third ? (const T*)p.third + p.third_rows.at(row) : nullptr;
        u64 out = row * p.d;
        Pack<T, N> v[SLOTS], g[SLOTS];
        float a[N], b[N];
        float square = 0.f, inner = 0.f;
        sweep<VECS, TEAM, N>(me, p.d, [&](int j, u32 c) {
            int n = (int)(p.d - c);
            read_raw(v[j], x + c, p.wide, n);
            read_raw(g[j], dy + c, p.wide, n);
            read(a, w + c, p.wide, n);
            TG_UNROLL for (int i = 0; i < N; i++) a[i] += p.centre;
            if (p.gate) {
                read(b, third + c, p.wide, n);
                TG_UNROLL for (int i = 0; i < N; i++) a[i] *= activation<T>(p.gate, b[i]);
            }
            TG_UNROLL for (int i = 0; i < N; i++) {
                float xi = load(v[j].t[i]);
                square += xi * xi;
                inner += xi * load(g[j].t[i]) * a[i];
            }
        });
        square = team_sum<TEAM>(square, scratch);
        inner = team_sum<TEAM>(inner, scratch);
        float r = 1.f / sqrtf(square / (float)p.d + p.eps), m = inner * r * r / (float)p.d;
        sweep<VECS, TEAM, N>(me, p.d, [&](int j, u32 c) {
            int n = (int)(p.d - c);
            if (VECS == 0) {
                read_raw(v[j], x + c, p.wide, n);
                read_raw(g[j], dy + c, p.wide, n);
            }
            read(a, w + c, p.wide, n);
            TG_UNROLL for (int i = 0; i < N; i++) a[i] += p.centre;
            if (third) read(b, third + c, p.wide, n);
            float* to = VECS == 0 ? part + c : nullptr;
            float dgate[N];
            TG_UNROLL for (int i = 0; i < N; i++) {
                float xi = load(v[j].t[i]), gi = load(g[j].t[i]);
                if (p.gate) {
                    float s = Sigmoid<T>::of(b[i]);
                    float slope = p.gate == 1 ? s * (1.f + b[i] * (1.f - s)) : s * (1.f - s);
                    dgate[i] = gi * xi * r * a[i] * slope;
                    gi *= p.gate == 1 ? b[i] * s : s;
                }
                float share = gi * xi * r;
                if (VECS > 0) dw[j][i] += share;
                else if (i < n) to[i] += share;
                a[i] = r * (gi * a[i] - xi * m);
                if (third && !p.gate) a[i] += b[i];
            }
            if (p.gate) write((T*)p.dgate + out + c, dgate, p.wide, n);
            write((T*)p.dx + out + c, a, p.wide, n);
        });
    }
    if constexpr (VECS > 0) {
        for (u32 t = 0; t < teams; t++) {
            if (thread() / TEAM == t) sweep<VECS, TEAM, N>(me, p.d, [&](int j, u32 c) {
                TG_UNROLL for (int i = 0; i < N; i++) {
                    if (c + i >= p.d) continue;
                    if (TEAM == 32) joint[c + i] = (t == 0 ? 0.f : joint[c + i]) + dw[j][i];
                    else part[c + i] = dw[j][i];
                }
            });
            if (TEAM == 32) sync();
        }
        if (TEAM == 32) for (u32 c = thread(); c < p.d; c += threads()) part[c] = joint[c];
    }
}
