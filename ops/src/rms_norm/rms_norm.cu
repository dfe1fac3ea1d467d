// RMS norm of rows: y = x · r · (c + w) with r = 1/√(mean x² + eps), with a residual added in front or a gate behind; and its gradient.
//
// Bound by memory: forward reads x (and the third tensor) and writes y (and the sum) once, backward reads x and dy (and the third) and writes dx (and
// dgate) once. A team of 16, 32, 128 or 256 threads has a row: the smallest with which a thread holds one vector of 16 bytes. Teams take rows in turn and
// read the next row before they reduce the present one, so reads are always under way; weights stay in registers. The row stays as it lies in memory
// between the sum of squares and its use. Longer rows are a block's: 4 vectors a thread, not read ahead (VECS = 4), or read twice (VECS = 0). Rows that are
// not whole, aligned vectors go element by element in kernels of their own (N = 1). Teams of several warps are their block's only one: they exchange sums in shared memory, with one
// barrier a row since two places take turns.
//
// Backward: with g = dy · act · (c + w), dx = r (g − x r² mean(g x)): one pass sums x² and g x together. The weight's gradient Σ dy · act · x · r is
// summed in registers over the rows that a team takes, over a block's teams by halves in shared memory, then over blocks by `sum_columns`. How many
// blocks there are depends on the shape alone.
#include "ops.cuh"

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
// The sums over a team, in all of its threads. `turn` says whether an even or an odd row of the team's it is; scratch: [2][2][warps].
template <int TEAM> TG_DEVICE void team_sums(float& a, float& b, float (&scratch)[2][2][8], u32 turn) {
    TG_UNROLL for (u32 m = TEAM < 32 ? TEAM / 2 : 16; m > 0; m >>= 1) a += shuffle_xor(a, m), b += shuffle_xor(b, m);
    if constexpr (TEAM > 32) {
        constexpr u32 WARPS = TEAM / 32;
        if (lane() == 0) scratch[turn][0][warp()] = a, scratch[turn][1][warp()] = b;
        sync();
        a = b = 0.f;
        TG_UNROLL for (u32 i = 0; i < WARPS; i++) a += scratch[turn][0][i], b += scratch[turn][1][i];
    }
}
// A thread's vectors of a row, as they lie in memory.
template <class T, int N, int SLOTS> struct Held { Pack<T, N> x[SLOTS], other[SLOTS]; };
// Teams: number in the block; this thread's place in its own, which that is, and which the warp's first is.
template <int TEAM> struct Team {
    static constexpr u32 THREADS = TEAM == 256 ? 256 : 128, COUNT = THREADS / TEAM;
    u32 me = thread() % TEAM, index = thread() / TEAM, warps = TEAM < 32 ? warp() * (32 / TEAM) : thread() / TEAM;
};

struct RmsNormParams {
    const void *x, *w, *third; // third: the residual, or the gate
    void *y, *sum;             // sum: x + residual
    Rows rows, third_rows;
    u64 n;
    u32 d, residual;
    u32 gate, unused; // gate: 0 none, 1 SiLU, 2 sigmoid
    float eps, centre;
};

template <class T, class W, int N, int TEAM, int VECS> TG_DEVICE void rms_norm_forward(const RmsNormParams& p) {
    constexpr int SLOTS = VECS > 0 ? VECS : 1;
    TG_SHARED(float, scratch, [2][2][8]);
    Team<TEAM> team;
    const W* w = (const W*)p.w;
    float weight[N], share = 1.f / (float)p.d;
    auto weights = [&](u32 c) {
        Pack<W, N> raw;
        raw.get(w + c);
        TG_UNROLL for (int i = 0; i < N; i++) weight[i] = p.centre + load(raw.t[i]);
    };
    if (VECS == 1) sweep<VECS, TEAM, N>(team.me, p.d, [&](int, u32 c) { weights(c); });
    const T *x = nullptr, *third = nullptr;
    Held<T, N, SLOTS> now = {}, next = {};
    auto place = [&](u64 row) {
        x = (const T*)p.x + p.rows.at(row);
        if (p.third) third = (const T*)p.third + p.third_rows.at(row);
    };
    auto fetch = [&](Held<T, N, SLOTS>& to, int j, u32 c) {
        to.x[j].get(x + c);
        if (p.third) to.other[j].get(third + c);
    };
    auto value = [&](int j, int i) { return load(now.x[j].t[i]) + (p.residual ? load(now.other[j].t[i]) : 0.f); };
    u64 step = (u64)grid_x() * team.COUNT, base = (u64)block_x() * team.COUNT + team.warps; // a warp's rows end together
    auto row_of = [&](u64 base) { return min_of<u64>(base + (team.index - team.warps), p.n - 1); };
    if (VECS == 1 && base < p.n) {
        place(row_of(base));
        sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32 c) { fetch(next, j, c); });
    }
    for (u32 turn = 0; base < p.n; base += step, turn ^= 1) {
        if (VECS == 1) {
            now = next;
            if (base + step < p.n) {
                place(row_of(base + step));
                sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32 c) { fetch(next, j, c); });
            }
        } else place(row_of(base));
        float square = 0.f, none = 0.f;
        sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32 c) {
            if (VECS != 1) fetch(now, j, c);
            if (VECS == 0) TG_UNROLL for (int i = 0; i < N; i++) square += value(j, i) * value(j, i);
        });
        if (VECS > 0) sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32) { TG_UNROLL for (int i = 0; i < N; i++) square += value(j, i) * value(j, i); });
        team_sums<TEAM>(square, none, scratch, turn);
        float r = fast_rsqrt(square * share + p.eps);
        u64 out = row_of(base) * p.d;
        if (base + (team.index - team.warps) >= p.n) continue;
        sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32 c) {
            if (VECS == 0) fetch(now, j, c);
            if (VECS != 1) weights(c);
            Pack<T, N> to;
            if (p.residual) {
                TG_UNROLL for (int i = 0; i < N; i++) to.t[i] = store<T>(value(j, i));
                to.put((T*)p.sum + out + c);
            }
            float y[N];
            TG_UNROLL for (int i = 0; i < N; i++) y[i] = value(j, i) * r * weight[i];
            if (p.gate) {
                TG_UNROLL for (int i = 0; i < N; i++) {
                    float b = load(now.other[j].t[i]), s = Sigmoid<T>::of(b);
                    y[i] *= p.gate == 1 ? b * s : s;
                }
            }
            TG_UNROLL for (int i = 0; i < N; i++) to.t[i] = store<T>(y[i]);
            to.put((T*)p.y + out + c);
        });
    }
}

struct RmsNormBackwardParams {
    const void *x, *w, *dy, *third; // third: the gate, or the gradient of the sum
    void *dx, *dgate;
    float* parts; // a row of the weight's gradient for each block
    Rows rows, third_rows;
    u64 n;
    u32 d, gate;
    float eps, centre;
};

template <class T, class W, int N, int TEAM, int VECS> TG_DEVICE void rms_norm_backward(const RmsNormBackwardParams& p) {
    constexpr int SLOTS = VECS > 0 ? VECS : 1, WIDE = TEAM < 32 ? 32 : TEAM, GROUPS = Team<TEAM>::THREADS / WIDE; // groups: whose sums of dw are added in shared memory
    TG_SHARED(float, scratch, [2][2][8]);
    TG_SHARED(float, joint, [GROUPS > 1 ? GROUPS / 2 : 1][SLOTS * N][WIDE]);
    Team<TEAM> team;
    const W* w = (const W*)p.w;
    float* part = p.parts + (u64)block_x() * p.d;
    float dw[SLOTS][N] = {}, weight[N], kept[N], share = 1.f / (float)p.d; // kept: the gate's sigmoid
    auto weights = [&](u32 c) {
        Pack<W, N> raw;
        raw.get(w + c);
        TG_UNROLL for (int i = 0; i < N; i++) weight[i] = p.centre + load(raw.t[i]);
    };
    if (VECS == 1) sweep<VECS, TEAM, N>(team.me, p.d, [&](int, u32 c) { weights(c); });
    if (VECS == 0) sweep<VECS, TEAM, N>(team.me, p.d, [&](int, u32 c) { TG_UNROLL for (int i = 0; i < N; i++) part[c + i] = 0.f; });
    const T *x = nullptr, *dy = nullptr, *third = nullptr;
    Held<T, N, SLOTS> now = {}, next = {};
    Pack<T, N> g[SLOTS], g_next[SLOTS];
    auto place = [&](u64 row) {
        x = (const T*)p.x + p.rows.at(row), dy = (const T*)p.dy + row * p.d;
        if (p.third) third = (const T*)p.third + p.third_rows.at(row);
    };
    auto fetch = [&](Held<T, N, SLOTS>& to, Pack<T, N>(&dy_to)[SLOTS], int j, u32 c) {
        to.x[j].get(x + c);
        dy_to[j].get(dy + c);
        if (p.third) to.other[0].get(third + c);
    };
    auto sigmoid_of = [&](int i) { return Sigmoid<T>::of(load(now.other[0].t[i])); };
    u64 step = (u64)grid_x() * team.COUNT, base = (u64)block_x() * team.COUNT + team.warps; // a warp's rows end together
    auto row_of = [&](u64 base) { return min_of<u64>(base + (team.index - team.warps), p.n - 1); };
    if (VECS == 1 && base < p.n) {
        place(row_of(base));
        sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32 c) { fetch(next, g_next, j, c); });
    }
    for (u32 turn = 0; base < p.n; base += step, turn ^= 1) {
        if (VECS == 1) {
            now = next, g[0] = g_next[0];
            if (base + step < p.n) {
                place(row_of(base + step));
                sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32 c) { fetch(next, g_next, j, c); });
            }
        } else place(row_of(base));
        float square = 0.f, inner = 0.f;
        sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32 c) {
            if (VECS != 1) fetch(now, g, j, c), weights(c);
            float ga[N]; // dy · act
            TG_UNROLL for (int i = 0; i < N; i++) ga[i] = load(g[j].t[i]);
            if (p.gate) {
                TG_UNROLL for (int i = 0; i < N; i++) {
                    kept[i] = sigmoid_of(i);
                    ga[i] *= p.gate == 1 ? load(now.other[0].t[i]) * kept[i] : kept[i];
                }
            }
            TG_UNROLL for (int i = 0; i < N; i++) {
                float xi = load(now.x[j].t[i]);
                square += xi * xi;
                inner += xi * ga[i] * weight[i];
            }
        });
        team_sums<TEAM>(square, inner, scratch, turn);
        if (base + (team.index - team.warps) >= p.n) continue;
        float r = fast_rsqrt(square * share + p.eps), m = inner * r * r * share;
        u64 out = row_of(base) * p.d;
        sweep<VECS, TEAM, N>(team.me, p.d, [&](int j, u32 c) {
            if (VECS == 0) fetch(now, g, j, c);
            if (VECS > 1 && p.third) now.other[0].get(third + c); // it would take too many registers
            if (VECS != 1) weights(c);
            Pack<T, N> to;
            float ga[N];
            TG_UNROLL for (int i = 0; i < N; i++) ga[i] = load(g[j].t[i]);
            if (p.gate) {
                TG_UNROLL for (int i = 0; i < N; i++) {
                    float b = load(now.other[0].t[i]), s = VECS == 1 ? kept[i] : sigmoid_of(i), act = p.gate == 1 ? b * s : s;
                    to.t[i] = store<T>(ga[i] * load(now.x[j].t[i]) * r * weight[i] * (p.gate == 1 ? s + act * (1.f - s) : s * (1.f - s)));
                    ga[i] *= act;
                }
                to.put((T*)p.dgate + out + c);
            }
            float dx[N];
            TG_UNROLL for (int i = 0; i < N; i++) {
                float xi = load(now.x[j].t[i]);
                if (VECS > 0) dw[j][i] += ga[i] * xi * r;
                else part[c + i] += ga[i] * xi * r;
                dx[i] = r * (ga[i] * weight[i] - xi * m);
            }
            if (p.third && !p.gate) TG_UNROLL for (int i = 0; i < N; i++) dx[i] += load(now.other[0].t[i]);
            TG_UNROLL for (int i = 0; i < N; i++) to.t[i] = store<T>(dx[i]);
            to.put((T*)p.dx + out + c);
        });
    }
    if constexpr (VECS > 0) {
        if (TEAM < 32) TG_UNROLL for (int i = 0; i < N; i++) dw[0][i] += shuffle_xor(dw[0][i], 16);
        u32 group = thread() / WIDE, me = thread() % WIDE;
        for (u32 half = GROUPS / 2; half > 0; half /= 2) {
            if (group >= half && group < 2 * half)
                TG_UNROLL for (int k = 0; k < SLOTS * N; k++) joint[group - half][k][me] = dw[k / N][k % N];
            sync();
            if (group < half) TG_UNROLL for (int k = 0; k < SLOTS * N; k++) dw[k / N][k % N] += joint[group][k][me];
            sync();
        }
        if (group == 0 && me < TEAM) {
            sweep<VECS, TEAM, N>(me, p.d, [&](int j, u32 c) {
                Pack<float, N> to;
                TG_UNROLL for (int i = 0; i < N; i++) to.t[i] = dw[j][i];
                to.put(part + c);
            });
        }
    }
}
