// The router's products in f32 on tensor cores. A number in f32 is the sum of three in bf16 (24 bits: the nearest, the nearest to what is left, and what is
// left then), and a product of two numbers in bf16 is exact in f32: x Wᵀ of x in bf16 is one product in bf16 with W's parts side by side, whose sums are
// added. These kernels take numbers apart and add the sums.
#include "tidegate.cuh"

struct SplitParams {
    const float* x; // [rows, cols]
    bf16* parts;    // [rows, slots, cols]
    FastDiv cols;
    u32 n, slots, which; // which: two bits for each slot, the part that it gets
};
template <int> TG_DEVICE void split(const SplitParams& p) {
    u32 i = block_x() * threads() + thread();
    if (i >= p.n) return;
    u32 row, col;
    p.cols.divmod(i, row, col);
    float x = p.x[i];
    bf16 first = round_bf16(x);
    x -= load(first);
    bf16 second = round_bf16(x), third = round_bf16(x - load(second));
    bf16* to = p.parts + (u64)row * p.slots * p.cols.divisor + col;
    for (u32 s = 0; s < p.slots; s++) {
        u32 part = p.which >> 2 * s & 3;
        to[s * p.cols.divisor] = part == 0 ? first : part == 1 ? second : third;
    }
}

struct AddParams {
    const float* parts; // [rows, 3, cols]
    float* y;           // [rows, cols]
    FastDiv cols;
    u32 n;
};
template <int> TG_DEVICE void add_parts(const AddParams& p) {
    u32 i = block_x() * threads() + thread();
    if (i >= p.n) return;
    u32 row, col, cols = p.cols.divisor;
    p.cols.divmod(i, row, col);
    const float* from = p.parts + (u64)row * 3 * cols + col;
    p.y[i] = from[2 * cols] + from[cols] + from[0];
}
