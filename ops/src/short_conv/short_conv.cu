// Causal depthwise convolution over time, with SiLU, a state before the first step, and packed documents; and its gradient.
//
// Bound by memory: 4 bytes an element forward in bf16, 6 backward. A thread has N neighbouring channels and walks over a run of steps (64, or fewer where
// that would leave a large card idle: 16 to 64 by the shape alone). A block's four warps have neighbouring runs of the same channels, so that the inputs
// that two runs share come from the caches. N is 8 bytes' worth where such vectors can be moved at once, else 1.
//
// Taps are numbered by how far they look back; a weight with fewer than TAPS is padded with zeros. The last TAPS inputs lie in registers in a ring whose
// places are known at compile time, since TAPS steps are unrolled; another ring holds the next TAPS steps as they lie in memory: a step's place is read
// anew as soon as it is used, so TAPS reads are always under way. At a document's first step the window is emptied.
//
// Backward walks TAPS − 1 steps further than its run: at each step it computes z again, g = dy · silu'(z), and adds w[back] · g to the gradient of the
// input `back` steps before, of which TAPS are pending in registers; the oldest is complete. Steps near an edge (of the run, of a document, of the sequence)
// go through a variant with checks, the others through one without. The weight's gradient of a run is summed in registers, that of a block's runs in shared
// memory in order, then `sum_columns` adds the blocks.
//
// Registers, bf16 with 4 taps: forward window 16, weights 16, ahead 8; backward window 16, weights 16, pending 16, dw 16, ahead 16.
#include "ops.cuh"

constexpr int WARPS = 4; // of a block, along time

struct ShortConvParams {
    const void *x, *w, *dy;
    const float *state, *dlast; // before the first step [B, K − 1, C]; the gradient of the one after the last
    const void* bounds;         // of documents, or null
    void *y, *dx;
    float *last, *dstate, *parts; // parts [block of runs, C, K]
    i64 batch_stride, time_stride, head_stride; // of x
    FastDiv blocks, groups, head_dim; // blocks of WARPS runs of a batch entry; groups of 32·N channels
    u32 t, c, k, run;
    u32 documents, narrow, silu; // narrow: bounds are i32
    u32 unused;
    Fault fault;
};

// The document of a step, followed forwards.
struct Document {
    u32 d;
    i32 start, end;
    static TG_DEVICE i64 at(const ShortConvParams& p, u32 i) { return p.narrow ? (i64)((const i32*)p.bounds)[i] : ((const i64*)p.bounds)[i]; }
    static TG_DEVICE i32 edge(const ShortConvParams& p, u32 i) { return (i32)max_of<i64>(min_of<i64>(at(p, i), p.t), 0); }
    TG_DEVICE void find(const ShortConvParams& p, i32 t) {
        d = 0, start = 0, end = (i32)p.t;
        if (!p.bounds) return;
        u32 high = p.documents; // the last document that starts at t or before
        while (high - d > 1) {
            u32 middle = (d + high) / 2;
            if (edge(p, middle) <= t) d = middle;
            else high = middle;
        }
        start = edge(p, d), end = edge(p, d + 1);
    }
    // Whether a document starts at t, which is one further than before.
    TG_DEVICE bool enter(const ShortConvParams& p, i32 t) {
        if (!p.bounds || t < end) return false;
        while (d + 1 < p.documents && t >= end) d++, start = end, end = edge(p, d + 1);
        return true;
    }
};

struct Place {
    u32 b, c, part; // part: number of the block of runs
    i32 t0, t1;
    bool any; // whether there is anything to do
};
template <int N> TG_DEVICE Place place(const ShortConvParams& p) {
    Place at;
    u32 group, block;
    p.groups.divmod(block_x(), at.part, group);
    p.blocks.divmod(at.part, at.b, block);
    u32 start = (block * WARPS + warp()) * p.run;
    at.c = (group * 32 + lane()) * N;
    at.t0 = (i32)min_of(start, p.t);
    at.t1 = (i32)min_of(start + p.run, p.t);
    at.any = at.c < p.c && (start < p.t || start == 0);
    return at;
}
// The first block checks the documents' bounds.
TG_DEVICE void check(const ShortConvParams& p) {
    if (!p.bounds || block_x() > 0) return;
    for (u32 i = thread(); i <= p.documents; i += threads()) {
        i64 x = Document::at(p, i);
        bool ok = (i > 0 ? Document::at(p, i - 1) <= x : x == 0) && (i < p.documents || x == (i64)p.t);
        if (!ok) p.fault.tell(x);
    }
}
// Weights by how far back they look: the last of a channel's K is for the step itself.
template <int N, int TAPS, class W> TG_DEVICE void read_taps(float (&w)[TAPS][N], const ShortConvParams& p, const Place& at) {
    const W* from = (const W*)p.w + (u64)at.c * p.k;
    if (p.k == TAPS && aligned16(p.w)) {
        TG_UNROLL for (int i = 0; i < N; i++) {
            Pack<W, TAPS> x;
            x.get(from + i * TAPS);
            TG_UNROLL for (int back = 0; back < TAPS; back++) w[back][i] = load(x.t[TAPS - 1 - back]);
        }
    } else {
        TG_UNROLL for (int back = 0; back < TAPS; back++)
            TG_UNROLL for (int i = 0; i < N; i++) w[back][i] = back < (int)p.k ? load(from[i * p.k + p.k - 1 - back]) : 0.f;
    }
}
template <class T> TG_DEVICE const T* channels(const ShortConvParams& p, const Place& at) {
    u32 head, within;
    p.head_dim.divmod(at.c, head, within);
    return (const T*)p.x + (i64)at.b * p.batch_stride + (i64)head * p.head_stride + within;
}
template <int N, class T> TG_DEVICE void widen(float (&v)[N], const Pack<T, N>& x) {
    TG_UNROLL for (int i = 0; i < N; i++) v[i] = load(x.t[i]);
}
template <int N> TG_DEVICE void clear(float (&v)[N]) {
    TG_UNROLL for (int i = 0; i < N; i++) v[i] = 0.f;
}
template <int N, class T> TG_DEVICE void put(T* to, const float (&v)[N]) {
    Pack<T, N> x;
    TG_UNROLL for (int i = 0; i < N; i++) x.t[i] = store<T>(v[i]);
    x.put(to);
}
// Of the states, which are f32 and need not be aligned.
TG_DEVICE float* state_at(const float* states, const ShortConvParams& p, const Place& at, i32 j) {
    return (float*)states + ((i64)at.b * (p.k - 1) + j) * p.c + at.c;
}
// The inputs of step t, which may lie before a document that starts at `start`: then they are the state's, or zero.
template <int N, class T> TG_DEVICE void read_past(float (&x)[N], const ShortConvParams& p, const Place& at, const T* from, i32 start, i32 t) {
    if (t >= start) {
        Pack<T, N> raw;
        raw.get(from + t * p.time_stride);
        return widen(x, raw);
    }
    i32 j = t + (i32)p.k - 1; // its place in the state
    if (p.state && j >= 0) read(x, state_at(p.state, p, at, j), false, N);
    else clear(x);
}

template <class T, class W, int N, int TAPS> TG_DEVICE void short_conv_forward(const ShortConvParams& p) {
    check(p);
    Place at = place<N>(p);
    if (!at.any) return;
    const T* from = channels<T>(p, at);
    T* y = (T*)p.y + ((i64)at.b * p.t + at.t0) * p.c + at.c;
    const T* ahead = from + at.t0 * p.time_stride; // the next that is read
    Pack<T, N> raw[TAPS];
    auto fetch = [&](Pack<T, N>& to, i32 t) {
        if (t < at.t1) to.get(ahead);
        ahead += p.time_stride;
    };
    TG_UNROLL for (int u = 0; u < TAPS; u++) fetch(raw[u], at.t0 + u);
    Document d;
    d.find(p, at.t0);
    float w[TAPS][N], x[TAPS][N]; // step t0 + i lies in x[i % TAPS]
    read_taps<N, TAPS, W>(w, p, at);
    TG_UNROLL for (int back = 1; back < TAPS; back++) read_past(x[TAPS - back], p, at, from, d.start, at.t0 - back);
    for (i32 t = at.t0; t < at.t1; t += TAPS) {
        bool calm = t + TAPS <= min_of(at.t1, d.end); // neither the run nor a document ends within
        TG_UNROLL for (int u = 0; u < TAPS; u++) {
            if (!calm) {
                if (t + u >= at.t1) continue;
                if (d.enter(p, t + u)) TG_UNROLL for (int j = 0; j < TAPS; j++) clear(x[j]);
            }
            widen(x[u], raw[u]);
            fetch(raw[u], t + u + TAPS);
            float z[N];
            TG_UNROLL for (int i = 0; i < N; i++) {
                z[i] = 0.f;
                TG_UNROLL for (int back = TAPS - 1; back >= 0; back--) z[i] += x[(u - back) & (TAPS - 1)][i] * w[back][i];
            }
            if (p.silu) TG_UNROLL for (int i = 0; i < N; i++) z[i] *= Sigmoid<T>::of(z[i]);
            put(y, z);
            y += p.c;
        }
    }
    if (at.t1 == (i32)p.t) {
        for (i32 j = 0; j + 1 < (i32)p.k; j++) {
            read_past(w[0], p, at, channels<T>(p, at), d.start, at.t1 - (i32)p.k + 1 + j);
            write(state_at(p.last, p, at, j), w[0], false, N);
        }
    }
}

struct Calm { static constexpr bool YES = true; };
struct Careful { static constexpr bool YES = false; };

template <class T, class W, int N, int TAPS> TG_DEVICE void short_conv_backward(const ShortConvParams& p) {
    constexpr int PITCH = 33; // lanes' sums lie side by side, a column a bank further
    TG_SHARED(float, joint, [WARPS][TAPS * N][PITCH]);
    check(p);
    Place at = place<N>(p);
    float dw[TAPS][N] = {};
    if (at.any) {
        const T* from = channels<T>(p, at);
        const T *x_ahead = from + at.t0 * p.time_stride, *dy_ahead = (const T*)p.dy + ((i64)at.b * p.t + at.t0) * p.c + at.c; // the next that are read
        T* dx = (T*)p.dx + ((i64)at.b * p.t + at.t0) * p.c + at.c;
        i32 stop = at.t1 + TAPS - 1, limit = min_of(stop, (i32)p.t);
        Pack<T, N> x_raw[TAPS], dy_raw[TAPS];
        auto fetch = [&](int u, i32 t) {
            if (t < limit) x_raw[u].get(x_ahead), dy_raw[u].get(dy_ahead);
            x_ahead += p.time_stride, dy_ahead += p.c;
        };
        TG_UNROLL for (int u = 0; u < TAPS; u++) fetch(u, at.t0 + u);
        Document d;
        i32 last_start = 0; // of the last document
        if (p.bounds && p.dlast && p.t > 0) {
            d.find(p, (i32)p.t - 1);
            last_start = d.start;
        }
        d.find(p, at.t0);
        float w[TAPS][N], x[TAPS][N], pending[TAPS][N] = {}; // what belongs to step t0 + i lies at [i % TAPS]
        read_taps<N, TAPS, W>(w, p, at);
        TG_UNROLL for (int back = 1; back < TAPS; back++) read_past(x[TAPS - back], p, at, from, d.start, at.t0 - back);
        i32 t = at.t0;
        // Without checks, for steps within the run whose window and whose oldest pending input lie within it and within their document.
        auto step = [&](auto calm, int u) {
            constexpr bool CALM = decltype(calm)::YES;
            i32 s = t + u, done = s - (TAPS - 1);
            float g[N];
            if (!CALM && s >= stop) return;
            if (!CALM && s >= limit) clear(x[u]), clear(g);
            else {
                if (!CALM && d.enter(p, s)) TG_UNROLL for (int j = 0; j < TAPS; j++) clear(x[j]);
                widen(x[u], x_raw[u]);
                widen(g, dy_raw[u]);
            }
            fetch(u, s + TAPS);
            if (p.silu) {
                TG_UNROLL for (int i = 0; i < N; i++) {
                    float z = 0.f;
                    TG_UNROLL for (int back = TAPS - 1; back >= 0; back--) z += x[(u - back) & (TAPS - 1)][i] * w[back][i];
                    float sg = Sigmoid<T>::of(z);
                    g[i] *= sg * (1.f + z * (1.f - sg));
                }
            }
            TG_UNROLL for (int back = 0; back < TAPS; back++) {
                float(&to)[N] = pending[(u - back) & (TAPS - 1)];
                bool same = CALM || d.start == 0 || s - back >= d.start; // before step 0 is the state
                TG_UNROLL for (int i = 0; i < N; i++) {
                    if (back == 0) to[i] = w[0][i] * g[i];
                    else if (same) to[i] += w[back][i] * g[i];
                    if (CALM || s < at.t1) dw[back][i] += x[(u - back) & (TAPS - 1)][i] * g[i];
                }
            }
            float(&out)[N] = pending[(u + 1) & (TAPS - 1)];
            if (!CALM && p.dlast) {
                i32 j = done - (i32)p.t + (i32)p.k - 1; // its place in the state after the last step
                if (j >= 0 && j < (i32)p.k - 1 && (last_start == 0 || done >= last_start)) {
                    float more[N];
                    read(more, state_at(p.dlast, p, at, j), false, N);
                    TG_UNROLL for (int i = 0; i < N; i++) out[i] += more[i];
                }
            }
            if (CALM || done >= at.t0) {
                put(dx, out);
                dx += p.c;
            } else if (done < 0 && p.dstate && done + (i32)p.k - 1 >= 0) {
                write(state_at(p.dstate, p, at, done + (i32)p.k - 1), out, false, N);
            }
        };
        for (; t < stop; t += TAPS) {
            if (t > at.t0 && t + TAPS <= min_of(at.t1, d.end) && (d.start == 0 || t >= d.start + TAPS - 1)) {
                TG_UNROLL for (int u = 0; u < TAPS; u++) step(Calm(), u);
            } else {
                TG_UNROLL for (int u = 0; u < TAPS; u++) step(Careful(), u);
            }
        }
    }
    TG_UNROLL for (int back = 0; back < TAPS; back++)
        TG_UNROLL for (int i = 0; i < N; i++) joint[warp()][back * N + i][lane()] = dw[back][i];
    sync();
    u32 first = at.c - lane() * N; // the block's first channel
    float* part = p.parts + ((u64)at.part * p.c + first) * p.k;
    for (u32 o = thread(); o < 32 * N * p.k; o += threads()) {
        u32 c = o / p.k, back = p.k - 1 - (o - c * p.k);
        float sum = 0.f;
        TG_UNROLL for (int i = 0; i < WARPS; i++) sum += joint[i][back * N + c % N][c / N];
        if (first + c < p.c) part[o] = sum;
    }
}
