// Hopper's matrix products (sm_90a): a warpgroup's 128 threads start a product of which at least B lies in shared memory, and go on; the tensor cores work
// alone until it is waited for. Source: PTX ISA, "asynchronous warpgroup-level matrix instructions". Kernels that use this are `Kernel::hopper()`; the
// emulator's body is hopper_emulator.h.
//
// Order of calls, by all threads of four consecutive warps of which the first is a multiple of four:
//   copies have landed (copy_wait), fence_async(), a barrier       what a thread wrote to shared memory, by plain stores or copies, can be read
//   wgmma_fence(); wgmma<..>(..) any number; wgmma_commit();        a batch; accumulators of one product may follow on another in it
//   wgmma_wait<N>();                                               all batches but the last N are done: their accumulators may be read, their operands
//                                                                  overwritten (by other threads after a barrier). Until then accumulators and A's
//                                                                  registers must not be touched.
//
// Operands in shared memory, in tiles of rows of 128 bytes (64 bf16), a tile aligned to 1024 bytes, the 16-byte pieces of a row swizzled by the row's
// number: `swizzled(row, piece)` is where a piece goes. There are two kinds, for A as for B:
//   K-major   a row of the tile is a row of A or a column of B, and 64 of the depth lie in it. `k_major(tile)`; 16 deeper is + 32 bytes (`deeper(d, 2)`).
//             A takes 64 rows, B takes N rows one after another, 128 bytes each.
//   MN-major  a row of the tile is one of the depth, with 64 of A's rows or B's columns in it (the transposed operand: TRANS 1).
//             `mn_major(tile, next)`: `next` bytes further is the tile with the next 64 (for N > 64). 16 deeper is + 2048 bytes (`deeper(d, 128)`).
#pragma once
#include "tidegate.cuh"

#ifdef TG_EMULATE
#include "hopper_emulator.h"
#else
// Waits until registers that a batch will use are written; before the first product of each batch.
TG_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
TG_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> TG_DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// After a wait, on what it waited for: the compiler doesn't know that these registers change while it waits, and could read them before.
template <int N> TG_DEVICE void wgmma_settle(float (&d)[N]) {
    TG_UNROLL for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
// By all threads of a warpgroup: registers that a thread has from here on, a multiple of 8 up to 240, fewer or more than before. Those that are given
// back are there for who takes more.
template <int N> TG_DEVICE void registers_give() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> TG_DEVICE void registers_take() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
// What this thread wrote to shared memory comes before what the tensor cores read after the next barrier.
TG_DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// d[64 × N] = A[64 × 16] · B[16 × N], plus d if `add`; bf16 with f32 sums. Thread 32w + 4g + t of the warpgroup has rows 16w + g and 16w + g + 8:
// d[4j + i] is the row g (i < 2) or g + 8, and column 8j + 2t + i % 2; as FragC of mma_16x8x16. A and B are descriptors.
template <int N> struct Wgmma;
#define TG_WGMMA_NAMES_64 \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
        "%25, %26, %27, %28, %29, %30, %31}, "
#define TG_WGMMA_REGISTERS_64 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
template <> struct Wgmma<64> {
    template <int TRANS_A, int TRANS_B> static TG_DEVICE void shared(float (&d)[32], u64 a, u64 b, int add) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " TG_WGMMA_NAMES_64
                     "%32, %33, p, 1, 1, %35, %36; }"
                     : TG_WGMMA_REGISTERS_64
                     : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));
    }
    template <int TRANS_B> static TG_DEVICE void registers(float (&d)[32], const u32 (&a)[4], u64 b, int add) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " TG_WGMMA_NAMES_64
                     "{%32, %33, %34, %35}, %36, p, 1, 1, %38; }"
                     : TG_WGMMA_REGISTERS_64
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANS_B));
    }
};
#define TG_WGMMA_NAMES_128 \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
        "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
        "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define TG_WGMMA_REGISTERS_128 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
template <> struct Wgmma<128> {
    template <int TRANS_A, int TRANS_B> static TG_DEVICE void shared(float (&d)[64], u64 a, u64 b, int add) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " TG_WGMMA_NAMES_128
                     "%64, %65, p, 1, 1, %67, %68; }"
                     : TG_WGMMA_REGISTERS_128
                     : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));
    }
    template <int TRANS_B> static TG_DEVICE void registers(float (&d)[64], const u32 (&a)[4], u64 b, int add) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %69, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " TG_WGMMA_NAMES_128
                     "{%64, %65, %66, %67}, %68, p, 1, 1, %70; }"
                     : TG_WGMMA_REGISTERS_128
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANS_B));
    }
};
#define TG_WGMMA_NAMES_256 \
        "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, " \
        "%25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, " \
        "%49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, " \
        "%73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, " \
        "%97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, " \
        "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
#define TG_WGMMA_REGISTERS_256 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]), \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]), \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63]), \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
    "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79]), \
    "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
    "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95]), \
    "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
    "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
    "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
    "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
template <> struct Wgmma<256> {
    template <int TRANS_A, int TRANS_B> static TG_DEVICE void shared(float (&d)[128], u64 a, u64 b, int add) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %130, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " TG_WGMMA_NAMES_256
                     "%128, %129, p, 1, 1, %131, %132; }"
                     : TG_WGMMA_REGISTERS_256
                     : "l"(a), "l"(b), "r"(add), "n"(TRANS_A), "n"(TRANS_B));
    }
    template <int TRANS_B> static TG_DEVICE void registers(float (&d)[128], const u32 (&a)[4], u64 b, int add) {
        asm volatile("{ .reg .pred p; setp.ne.b32 p, %133, 0; wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 " TG_WGMMA_NAMES_256
                     "{%128, %129, %130, %131}, %132, p, 1, 1, %134; }"
                     : TG_WGMMA_REGISTERS_256
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(TRANS_B));
    }
};
#endif // TG_EMULATE

// Has x computed before the wait that follows: ptxas moves a wait up past all that doesn't need it, and then nothing runs beside the products. x is never -1.
TG_DEVICE void before_the_wait(float x) {
    if (warp_any(x == -1.f)) sync_warp();
}

// d = A B (+ d if `add`), N = 64, 128 or 256 columns; both from shared memory.
template <int N, int TRANS_A, int TRANS_B> TG_DEVICE void wgmma(float (&d)[N / 2], u64 a, u64 b, int add) { Wgmma<N>::template shared<TRANS_A, TRANS_B>(d, a, b, add); }
// The same with A in registers, laid out as the A of mma_16x8x16 (each of the four warps has 16 rows): `to_a`'s results.
// ptxas 13.0 may overwrite fragments that are made once and used at each step of a loop: see `keep` in gated_sdpa_backward_hopper.cu.
template <int N, int TRANS_B> TG_DEVICE void wgmma(float (&d)[N / 2], const u32 (&a)[4], u64 b, int add) { Wgmma<N>::template registers<TRANS_B>(d, a, b, add); }

// Byte in a tile of 16-byte piece `piece` (0 to 7) of row `row`.
TG_DEVICE u32 swizzled(u32 row, u32 piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

// A descriptor: address, leading and stride byte offsets over 16 in bits 0 to 13, 16 to 29, 32 to 45; in 62 and 63 a 1 for the swizzle of 128 bytes.
TG_DEVICE u64 wgmma_descriptor(u32 address, u32 leading, u32 stride) {
    return (u64)((address & 0x3ffff) >> 4) | (u64)(leading >> 4) << 16 | (u64)(stride >> 4) << 32 | (u64)1 << 62;
}
// `tile` is a shared_address. Stride: from 8 rows to the next 8; the leading offset is not used.
TG_DEVICE u64 k_major(u32 tile) { return wgmma_descriptor(tile, 16, 1024); }
// Stride: from 8 of the depth to the next 8; leading: from 64 of A's rows or B's columns to the next 64.
TG_DEVICE u64 mn_major(u32 tile, u32 next) { return wgmma_descriptor(tile, next, 1024); }
// The same operand 16 · `by` bytes further.
TG_DEVICE u64 deeper(u64 descriptor, u32 by) { return descriptor + by; }
