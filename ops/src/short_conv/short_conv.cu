// Causal depthwise convolution over time, with SiLU, a state before the first step, and packed documents; and its gradient.
//
// Bound by memory: 4 bytes an element forward in bf16, 6 backward. A thread has N neighbouring channels and walks over a run of steps, with the last
// TAPS − 1 inputs in registers, so that each input is read once (and TAPS − 1 again where a run begins; they are in the second-level cache). Taps are
// numbered by how far they look back; a weight with fewer than TAPS is padded with zeros. At a document's first step the window is emptied.
//
// Four steps are read at a time, so that their reads are under way together. Backward walks TAPS − 1 steps further than its run: at each step it computes z again, g = dy · silu'(z), and adds w[back] · g to the gradient of the
// input `back` steps before, of which TAPS are pending in registers; the oldest is complete. The weight's gradient of a run is summed in registers and
// written; `sum_columns` adds the runs. A run's length depends on the shape alone.
//
// Registers: forward (bf16, 8 channels) window 24, weights 32; backward (4 channels) window 12, weights 16, pending 16, dw 16.
#include "ops.cuh"

struct ShortConvParams {
    const void *x, *w, *dy;
    const float *state, *dlast; // before the first step [B, K − 1, C]; the gradient of the one after the last
    const void* bounds;         // of documents, or null
    void *y, *dx;
    float *last, *dstate, *parts; // parts [run, C, K]
    i64 batch_stride, time_stride, head_stride; // of x
    FastDiv runs, groups, head_dim; // runs of a batch entry; groups of 32·N channels
    u32 warps, t, c, k, run;
    u32 documents, narrow, silu; // narrow: bounds are i32
    u32 wide, unused;
    Fault fault;
};

// The document of a step, followed forwards.
struct Document {
    const void* bounds;
    u32 count, narrow, d;
    i64 start, end;
    TG_DEVICE i64 at(u32 i) const { return narrow ? (i64)((const i32*)bounds)[i] : ((const i64*)bounds)[i]; }
    TG_DEVICE void find(const ShortConvParams& p, i64 t) {
        bounds = p.bounds, count = p.documents, narrow = p.narrow, d = 0, start = 0, end = p.t;
        if (!bounds) return;
        u32 high = count; // the last document that starts at t or before
        while (high - d > 1) {
            u32 middle = (d + high) / 2;
            if (at(middle) <= t) d = middle;
            else high = middle;
        }
        start = at(d), end = at(d + 1);
    }
    // Whether a document starts at t, which is one further than before.
    TG_DEVICE bool enter(i64 t) {
        if (!bounds || t < end) return false;
        while (d + 1 < count && t >= end) d++, start = end, end = at(d + 1);
        return true;
    }
};

constexpr int AHEAD = 4; // steps that are read at a time

struct Place {
    u32 b, run, c;
    int n; // channels from c on that are there
    i64 t0, t1;
};
// The place of this thread's warp; n is 0 for those that have none.
template <int N> TG_DEVICE Place place(const ShortConvParams& p) {
    Place at;
    u32 group, rest, index = block_x() * (threads() / 32) + warp();
    p.groups.divmod(index, rest, group);
    p.runs.divmod(rest, at.b, at.run);
    at.c = (group * 32 + lane()) * N;
    at.n = index < p.warps && at.c < p.c ? (int)(p.c - at.c) : 0;
    at.t0 = (i64)at.run * p.run;
    at.t1 = min_of<i64>(at.t0 + p.run, p.t);
    return at;
}
// The first block checks the documents' bounds.
TG_DEVICE void check(const ShortConvParams& p) {
    if (!p.bounds || block_x() > 0) return;
    Document d;
    d.bounds = p.bounds, d.narrow = p.narrow;
    for (u32 i = thread(); i <= p.documents; i += threads()) {
        i64 x = d.at(i);
        bool ok = (i > 0 ? d.at(i - 1) <= x : x == 0) && (i < p.documents || x == (i64)p.t);
        if (!ok) p.fault.tell(x);
    }
}
// Weights by how far back they look: the last of a channel's K is for the step itself.
template <int N, int TAPS, class W> TG_DEVICE void read_taps(float (&w)[TAPS][N], const ShortConvParams& p, const Place& at) {
    TG_UNROLL for (int back = 0; back < TAPS; back++)
        TG_UNROLL for (int i = 0; i < N; i++)
            w[back][i] = i < at.n && back < (int)p.k ? load(((const W*)p.w)[(u64)(at.c + i) * p.k + p.k - 1 - back]) : 0.f;
}
template <class T> TG_DEVICE const T* channels(const ShortConvParams& p, const Place& at) {
    u32 head, within;
    p.head_dim.divmod(at.c, head, within);
    return (const T*)p.x + (i64)at.b * p.batch_stride + (i64)head * p.head_stride + within;
}
// The inputs of step t, which may lie before a document that starts at `start`: then they are the state's, or zero.
template <int N, class T> TG_DEVICE void read_past(float (&x)[N], const ShortConvParams& p, const Place& at, const T* from, i64 start, i64 t) {
    if (t >= start) return read(x, from + t * p.time_stride, p.wide, at.n);
    i64 j = t + (i64)p.k - 1; // its place in the state
    if (p.state && j >= 0) return read(x, p.state + ((i64)at.b * (p.k - 1) + j) * p.c + at.c, false, at.n);
    TG_UNROLL for (int i = 0; i < N; i++) x[i] = 0.f;
}

template <class T, class W, int N, int TAPS> TG_DEVICE void short_conv_forward(const ShortConvParams& p) {
    check(p);
    Place at = place<N>(p);
    if (at.n == 0) return;
    const T* from = channels<T>(p, at);
    T* y = (T*)p.y + (i64)at.b * p.t * p.c + at.c;
    Document d;
    d.find(p, at.t0);
    float w[TAPS][N], x[TAPS - 1 + AHEAD][N]; // x: those before, then those ahead
    read_taps<N, TAPS, W>(w, p, at);
    TG_UNROLL for (int back = 1; back < TAPS; back++) read_past(x[TAPS - 1 - back], p, at, from, d.start, at.t0 - back);
    for (i64 t = at.t0; t < at.t1; t += AHEAD) {
        TG_UNROLL for (int u = 0; u < AHEAD; u++)
            if (t + u < at.t1) read(x[TAPS - 1 + u], from + (t + u) * p.time_stride, p.wide, at.n);
        TG_UNROLL for (int u = 0; u < AHEAD; u++) {
            if (t + u >= at.t1) continue;
            if (d.enter(t + u)) {
                TG_UNROLL for (int j = 0; j < TAPS - 1 + u; j++)
                    TG_UNROLL for (int i = 0; i < N; i++) x[j][i] = 0.f;
            }
            float z[N];
            TG_UNROLL for (int i = 0; i < N; i++) {
                z[i] = 0.f;
                TG_UNROLL for (int back = TAPS - 1; back >= 0; back--) z[i] += x[TAPS - 1 + u - back][i] * w[back][i];
                if (p.silu) z[i] *= Sigmoid<T>::of(z[i]);
            }
            write(y + (t + u) * p.c, z, p.wide, at.n);
        }
        TG_UNROLL for (int j = 0; j < TAPS - 1; j++)
            TG_UNROLL for (int i = 0; i < N; i++) x[j][i] = x[j + AHEAD][i];
    }
    if (at.t1 == (i64)p.t) {
        for (u32 j = 0; j + 1 < p.k; j++) {
            read_past(w[0], p, at, from, d.start, (i64)p.t - (i64)p.k + 1 + j);
            write(p.last + ((i64)at.b * (p.k - 1) + j) * p.c + at.c, w[0], false, at.n);
        }
    }
}

template <class T, class W, int N, int TAPS> TG_DEVICE void short_conv_backward(const ShortConvParams& p) {
    check(p);
    Place at = place<N>(p);
    if (at.n == 0) return;
    const T *from = channels<T>(p, at), *dy = (const T*)p.dy + (i64)at.b * p.t * p.c + at.c;
    T* dx = (T*)p.dx + (i64)at.b * p.t * p.c + at.c;
    Document d;
    i64 last_start = 0; // of the last document
    if (p.bounds && p.dlast && p.t > 0) {
        d.find(p, (i64)p.t - 1);
        last_start = d.start;
    }
    d.find(p, at.t0);
    float w[TAPS][N], x[TAPS - 1 + AHEAD][N], pending[TAPS][N] = {}, dw[TAPS][N] = {}; // pending[back]: of the input `back` steps before
    read_taps<N, TAPS, W>(w, p, at);
    TG_UNROLL for (int back = 1; back < TAPS; back++) read_past(x[TAPS - 1 - back], p, at, from, d.start, at.t0 - back);
    i64 stop = at.t1 + TAPS - 1;
    for (i64 t = at.t0; t < stop; t += AHEAD) {
        float g[AHEAD][N];
        TG_UNROLL for (int u = 0; u < AHEAD; u++) {
            bool in = t + u < (i64)p.t && t + u < stop;
            read(x[TAPS - 1 + u], from + (t + u) * p.time_stride, p.wide && in, in ? at.n : 0);
            read(g[u], dy + (t + u) * p.c, p.wide && in, in ? at.n : 0);
        }
        TG_UNROLL for (int u = 0; u < AHEAD; u++) {
            i64 s = t + u, done = s - (TAPS - 1);
            if (s >= stop) continue;
            if (d.enter(s)) {
                TG_UNROLL for (int j = 0; j < TAPS - 1 + u; j++)
                    TG_UNROLL for (int i = 0; i < N; i++) x[j][i] = 0.f;
            }
            if (p.silu) {
                TG_UNROLL for (int i = 0; i < N; i++) {
                    float z = 0.f;
                    TG_UNROLL for (int back = TAPS - 1; back >= 0; back--) z += x[TAPS - 1 + u - back][i] * w[back][i];
                    float sg = Sigmoid<T>::of(z);
                    g[u][i] *= sg * (1.f + z * (1.f - sg));
                }
            }
            TG_UNROLL for (int back = 0; back < TAPS; back++) {
                bool same = d.start == 0 || s - back >= d.start; // before step 0 is the state
                TG_UNROLL for (int i = 0; i < N; i++) {
                    pending[back][i] += same ? w[back][i] * g[u][i] : 0.f;
                    if (s < at.t1) dw[back][i] += x[TAPS - 1 + u - back][i] * g[u][i];
                }
            }
            if (p.dlast) {
                i64 j = done - (i64)p.t + (i64)p.k - 1; // its place in the state after the last step
                if (j >= 0 && j < (i64)p.k - 1 && (last_start == 0 || done >= last_start)) {
                    float more[N];
                    read(more, p.dlast + ((i64)at.b * (p.k - 1) + j) * p.c + at.c, false, at.n);
                    TG_UNROLL for (int i = 0; i < N; i++) pending[TAPS - 1][i] += more[i];
                }
            }
            if (done >= at.t0) write(dx + done * p.c, pending[TAPS - 1], p.wide, at.n);
            else if (done < 0 && p.dstate && done + (i64)p.k - 1 >= 0) {
                write(p.dstate + ((i64)at.b * (p.k - 1) + done + p.k - 1) * p.c + at.c, pending[TAPS - 1], false, at.n);
            }
            TG_UNROLL for (int i = 0; i < N; i++) {
                TG_UNROLL for (int back = TAPS - 1; back > 0; back--) pending[back][i] = pending[back - 1][i];
                pending[0][i] = 0.f;
            }
        }
        TG_UNROLL for (int j = 0; j < TAPS - 1; j++)
            TG_UNROLL for (int i = 0; i < N; i++) x[j][i] = x[j + AHEAD][i];
    }
    float* part = p.parts + ((u64)(at.b * p.runs.divisor + at.run) * p.c + at.c) * p.k;
    TG_UNROLL for (int i = 0; i < N; i++)
        TG_UNROLL for (int back = 0; back < TAPS; back++)
            if (i < at.n && back < (int)p.k) part[i * p.k + p.k - 1 - back] = dw[back][i];
}
