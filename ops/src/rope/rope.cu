// Rotary embedding of the first 2·half entries of each head, rotate-half form: y[i] = x[i] cos − x[i + half] sin, y[i + half] = x[i + half] cos + x[i] sin;
// the gradient is the rotation back. Bound by memory (4 bytes an element in bf16).
//
// A block has a few steps of time with all their heads. Angles first, once for each step and frequency: position · θ_i in f64, where θ_i is theta^(−i / half)
// or what is given, reduced there
// to an eighth of a turn around a multiple of a quarter, then polynomials in f32 (an f32 angle would be off by a twentieth of a radian at position 10⁶).
// The table is in shared memory. Then each thread takes N entries of the first half with their partners, or N of what is only copied.
#include "ops.cuh"

struct RopeParams {
    const void *x, *positions;
    const double* frequencies; // θ_i, or null: powers of theta
    void* y;
    Rows rows; // of x, a head each
    u64 steps; // B·T
    FastDiv time, heads, items, half_items; // items: of a head, of which half_items rotate
    u32 d, half, per_block, kind; // kind: 0 positions count from offset, 1 i32, 2 i64
    u32 inverse, unused;
    i64 offset;
    double exponent; // −log2(theta) / half
    double factor; // what is rotated is multiplied by it
};

// Sine and cosine of an angle in f64, to f32's precision.
TG_DEVICE void sine_cosine(double a, float& sine, float& cosine) {
    double q = rint(a * 0.63661977236758134308);
    float r = (float)((a - q * 1.5707963267948966) - q * 6.123233995736766e-17), r2 = r * r;
    i64 quarter = (i64)q & 3;
    // minimax on an eighth of a turn (Cephes, sinf and cosf)
    float s = r + r * r2 * (-1.6666654611e-1f + r2 * (8.3321608736e-3f + r2 * -1.9515295891e-4f));
    float c = 1.f - 0.5f * r2 + r2 * r2 * (4.166664568298827e-2f + r2 * (-1.388731625493765e-3f + r2 * 2.443315711809948e-5f));
    bool odd = quarter & 1;
    sine = odd ? c : s;
    cosine = odd ? s : c;
    if (quarter & 2) sine = -sine;
    if (quarter == 1 || quarter == 2) cosine = -cosine;
}

template <class T, int N> TG_DEVICE void rope(const RopeParams& p) {
    float* table = shared<float>(); // [step][cos, sin][half]
    u64 first = (u64)block_x() * p.per_block;
    u32 steps = (u32)min_of<u64>(p.per_block, p.steps - first);
    for (u32 j = thread(); j < steps * p.half; j += threads()) {
        u32 s = j / p.half, i = j - s * p.half;
        u64 step = first + s;
        i64 at = p.kind == 0 ? (i64)(step % p.time.divisor) + p.offset : p.kind == 1 ? (i64)((const i32*)p.positions)[step] : ((const i64*)p.positions)[step];
        float sine, cosine;
        sine_cosine((double)at * (p.frequencies ? p.frequencies[i] : exp2(p.exponent * (double)i)), sine, cosine);
        float factor = (float)p.factor;
        table[2 * s * p.half + i] = factor * cosine;
        table[(2 * s + 1) * p.half + i] = factor * (p.inverse ? -sine : sine);
    }
    sync();
    for (u32 j = thread(); j < steps * p.heads.divisor * p.items.divisor; j += threads()) {
        u32 head, item, s, h;
        p.items.divmod(j, head, item);
        p.heads.divmod(head, s, h);
        u64 row = (first + s) * p.heads.divisor + h;
        const T* x = (const T*)p.x + p.rows.at(row);
        T* y = (T*)p.y + row * p.d;
        if (item < p.half_items.divisor && p.half > 0) {
            u32 c = item * N;
            const float *cosine = table + 2 * s * p.half + c, *sine = cosine + p.half;
            float a[N], b[N];
            read(a, x + c, true, N);
            read(b, x + p.half + c, true, N);
            TG_UNROLL for (int i = 0; i < N; i++) {
                float u = a[i], v = b[i];
                a[i] = u * cosine[i] - v * sine[i];
                b[i] = v * cosine[i] + u * sine[i];
            }
            write(y + c, a, true, N);
            write(y + p.half + c, b, true, N);
        } else {
            u32 c = 2 * p.half + (item - (p.half > 0 ? p.half_items.divisor : 0)) * N;
            Pack<T, N> v;
            v.get(x + c);
            v.put(y + c);
        }
    }
}
