// Products by wgmma, for the emulator's tests: one warpgroup, one block.
#include "hopper.cuh"

struct Params {
    const void *a, *b;
    float* c;
    u32 depth;
};
// C [64, N] = A B with bf16 A [64, depth], or [depth, 64] if TRANS_A; B [N, depth], or [depth, N] if TRANS_B; depth is a multiple of 64. With REGISTERS
// A's fragments are loaded from memory. WRONG: what to do wrong.
template <int N, int TRANS_A, int TRANS_B, bool REGISTERS, int WRONG> TG_DEVICE void product(const Params& p) {
    constexpr u32 A_BYTES = 64 * 128, STAGE = A_BYTES + N * 128;
    float d[N / 2];
    TG_UNROLL for (int i = 0; i < N / 2; i++) d[i] = 1e9f; // the first product must not add
    const bf16 *a = (const bf16*)p.a, *b = (const bf16*)p.b;
    u32 steps = p.depth / 64;
    for (u32 step = 0; step < steps; step++) {
        u8* at = shared<u8>(step % 2 * STAGE);
        for (u32 i = thread(); i < 512; i += 128) {
            u32 row = i / 8, piece = i % 8;
            copy16_async(at + swizzled(row, piece), TRANS_A ? a + (step * 64 + row) * 64 + piece * 8 : a + row * p.depth + step * 64 + piece * 8);
        }
        for (u32 i = thread(); i < N * 8; i += 128) {
            u32 row = i / 8 % 64, group = i / 512, piece = i % 8, k = TRANS_B ? step * 64 + row : group * 64 + row;
            copy16_async(at + A_BYTES + group * 8192 + swizzled(row, piece), TRANS_B ? b + k * N + group * 64 + piece * 8 : b + k * p.depth + step * 64 + piece * 8);
        }
        copy_commit();
        copy_wait<0>();
        if (WRONG != 1) fence_async();
        sync();
        if (WRONG != 2) wgmma_fence();
        u32 base = shared_address(at);
        u64 da = TRANS_A ? mn_major(base, 8192) : k_major(base), db = TRANS_B ? mn_major(base + A_BYTES, 8192) : k_major(base + A_BYTES);
        TG_UNROLL for (u32 k = 0; k < 4; k++) {
            int add = step + k > 0;
            u64 kb = deeper(db, k * (TRANS_B ? 128 : 2));
            if (REGISTERS) {
                u32 f[4];
                TG_UNROLL for (u32 i = 0; i < 4; i++) {
                    u32 row = warp() * 16 + lane() / 4 + i % 2 * 8, col = step * 64 + k * 16 + lane() % 4 * 2 + i / 2 * 8;
                    f[i] = *(const u32*)(a + row * p.depth + col);
                }
                wgmma_fence();
                wgmma<N, TRANS_B>(d, f, kb, add);
                wgmma_commit();
                wgmma_wait<0>();
                wgmma_fence();
            } else {
                wgmma<N, TRANS_A, TRANS_B>(d, deeper(da, k * (TRANS_A ? 128 : 2)), kb, add);
            }
        }
        wgmma_commit();
        if (WRONG == 3 && thread() == 5) *(u16*)(at + A_BYTES) ^= 0x40;
        if (WRONG == 3) sync();
        if (WRONG == 4) { TG_UNROLL for (int i = 0; i < N / 2; i++) p.c[thread()] = d[i]; return; }
        wgmma_wait<0>();
        sync();
    }
    TG_UNROLL for (int j = 0; j < N / 8; j++)
        TG_UNROLL for (int i = 0; i < 4; i++) {
            u32 row = warp() * 16 + lane() / 4 + i / 2 * 8, col = 8 * j + lane() % 4 * 2 + i % 2;
            p.c[row * N + col] = d[4 * j + i];
        }
}
