// What a kernel may use: one header with two bodies. NVRTC compiles it for the device, with no other header at hand; a host C++ compiler (TG_EMULATE is
// defined) takes emulator.h for the part that is special to the device. A kernel that uses nothing but this header and tile.cuh runs on both.
//
// A kernel is a function template  `template <class T, ..> TG_DEVICE void name(const Params& p)`; blocks are one-dimensional.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

// Storage types. Arithmetic is done in float; see to_float and from_float.
struct alignas(2) bf16 { u16 bits; };
struct alignas(2) f16 { u16 bits; };
struct alignas(16) U4 { u32 x, y, z, w; }; // 16 bytes, to be moved at once
struct alignas(8) U2 { u32 x, y; };

#ifdef TG_EMULATE
#include "emulator.h"
#else

#define TG_DEVICE __device__ __forceinline__
// The largest number of dynamic shared memory's alignment that any use needs (TMA with a 128-byte swizzle).
extern __shared__ __align__(1024) u8 tg_dynamic_shared[];
// A statically sized shared variable: TG_SHARED(float, sums, [32]);
#define TG_SHARED(type, name, ...) __shared__ type name __VA_ARGS__
// The entry point that the host side appends, for the instantiation in the last argument(s); profilers show its name.
#define TG_ENTRY(name, threads, min_blocks, ...) \
    template <class P> struct TgParams; \
    template <class P> struct TgParams<void (*)(const P&)> { typedef P type; }; \
    extern "C" __global__ void __launch_bounds__(threads, min_blocks) name(const __grid_constant__ typename TgParams<decltype(&__VA_ARGS__)>::type p) { __VA_ARGS__(p); }

// ---- indices ----
TG_DEVICE u32 thread() { return threadIdx.x; }
TG_DEVICE u32 threads() { return blockDim.x; }
// thread(), read anew where it is called: what is computed from it isn't kept in registers from outside a loop.
TG_DEVICE u32 thread_anew() {
    u32 r;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
    return r;
}
TG_DEVICE u32 lane() { return threadIdx.x & 31; }
TG_DEVICE u32 warp() { return threadIdx.x >> 5; }
TG_DEVICE u32 block_x() { return blockIdx.x; }
TG_DEVICE u32 block_y() { return blockIdx.y; }
TG_DEVICE u32 block_z() { return blockIdx.z; }
TG_DEVICE u32 grid_x() { return gridDim.x; }
TG_DEVICE u32 grid_y() { return gridDim.y; }
TG_DEVICE u32 grid_z() { return gridDim.z; }

// Dynamic shared memory from byte `at` on.
template <class T> TG_DEVICE T* shared(u32 at = 0) { return (T*)(tg_dynamic_shared + at); }

// ---- barriers ----
TG_DEVICE void sync() { __syncthreads(); }
TG_DEVICE void sync_warp() { __syncwarp(); }
// Barrier 1..15 for `count` threads (a multiple of 32).
TG_DEVICE void sync_some(u32 id, u32 count) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory"); }
// The same without waiting, for those that others wait for.
TG_DEVICE void arrive_some(u32 id, u32 count) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory"); }
TG_DEVICE void fence() { __threadfence(); }

// ---- warp collectives: all 32 lanes take part ----
template <class T> TG_DEVICE T shuffle(T x, u32 from) { return __shfl_sync(~0u, x, from); }
template <class T> TG_DEVICE T shuffle_xor(T x, u32 mask) { return __shfl_xor_sync(~0u, x, mask); }
template <class T> TG_DEVICE T shuffle_up(T x, u32 by) { return __shfl_up_sync(~0u, x, by); }     // lanes below `by` keep theirs
template <class T> TG_DEVICE T shuffle_down(T x, u32 by) { return __shfl_down_sync(~0u, x, by); } // the last `by` lanes keep theirs
TG_DEVICE u32 ballot(bool x) { return __ballot_sync(~0u, x); }
TG_DEVICE bool warp_any(bool x) { return __any_sync(~0u, x); }
TG_DEVICE bool warp_all(bool x) { return __all_sync(~0u, x); }
TG_DEVICE u32 warp_largest(u32 x) { return __reduce_max_sync(~0u, x); } // one instruction, for 32-bit integers alone
TG_DEVICE u32 warp_smallest(u32 x) { return __reduce_min_sync(~0u, x); }

// ---- atomics on global or shared memory; each returns the old value ----
TG_DEVICE float atomic_add(float* p, float x) { return atomicAdd(p, x); }
TG_DEVICE double atomic_add(double* p, double x) { return atomicAdd(p, x); }
TG_DEVICE i32 atomic_add(i32* p, i32 x) { return atomicAdd(p, x); }
TG_DEVICE u32 atomic_add(u32* p, u32 x) { return atomicAdd(p, x); }
TG_DEVICE u64 atomic_add(u64* p, u64 x) { return atomicAdd(p, x); }
TG_DEVICE i32 atomic_max(i32* p, i32 x) { return atomicMax(p, x); }
TG_DEVICE u32 atomic_max(u32* p, u32 x) { return atomicMax(p, x); }
TG_DEVICE u32 atomic_min(u32* p, u32 x) { return atomicMin(p, x); }
TG_DEVICE u32 atomic_or(u32* p, u32 x) { return atomicOr(p, x); }
TG_DEVICE u32 atomic_cas(u32* p, u32 expect, u32 x) { return atomicCAS(p, expect, x); }
TG_DEVICE u32 atomic_exchange(u32* p, u32 x) { return atomicExch(p, x); }

// ---- asynchronous copies, global to shared: 16 bytes, both sides aligned to 16 ----
TG_DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// Copies, or writes zeros where `valid` is false (then `from` is not read).
TG_DEVICE void copy16_async(void* to, const void* from, bool valid = true) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(valid ? 16 : 0) : "memory");
}
TG_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's committed groups are in flight. Others' copies are visible after the barrier that follows.
template <int N> TG_DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- tensor cores ----
// Four 8 × 8 matrices of 16-bit elements from shared memory: lane 8i + r names row r (16 bytes, aligned) of matrix i. In r[i], lane 4g + t gets
// elements (g, 2t) and (g, 2t+1) of matrix i; with _trans (2t, g) and (2t+1, g).
TG_DEVICE void ldmatrix4(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
TG_DEVICE void ldmatrix4_trans(u32 (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
// The same by address in shared memory: with one address and constants added to it, the constants become part of the instruction.
TG_DEVICE void ldmatrix4(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
TG_DEVICE void ldmatrix4_trans(u32 (&r)[4], u32 row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(row) : "memory");
}
// The same for two matrices, whose rows lanes 0..15 name.
TG_DEVICE void ldmatrix2(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
TG_DEVICE void ldmatrix2_trans(u32 (&r)[2], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
// c[16 × 8] += a[16 × 16] · b[16 × 8] in bf16 with f32 sums. With lane 4g + t: c[0..2] are row g, columns 2t and 2t+1, c[2..4] row g + 8;
// a[0] is row g, columns 2t and 2t+1, a[1] row g + 8, a[2] and a[3] the same with columns + 8; b[0] is rows 2t and 2t+1 of column g, b[1] rows + 8.
TG_DEVICE void mma_16x8x16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- bits, conversions, fast functions ----
TG_DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
TG_DEVICE float bits_float(u32 x) { return __uint_as_float(x); }
TG_DEVICE u64 double_bits(double x) { return (u64)__double_as_longlong(x); }
TG_DEVICE double bits_double(u64 x) { return __longlong_as_double((i64)x); }
TG_DEVICE u32 multiply_high(u32 a, u32 b) { return __umulhi(a, b); }
TG_DEVICE u32 population(u32 x) { return __popc(x); }
TG_DEVICE u32 first_bit(u32 x) { return __ffs(x) - 1; } // of the lowest 1; x is not 0
// Two floats, rounded to nearest even, as bf16: the first in the low half.
TG_DEVICE u32 pack_bf16(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
TG_DEVICE bf16 round_bf16(float x) {
    bf16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}
TG_DEVICE f16 round_f16(float x) {
    f16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r.bits) : "f"(x));
    return r;
}
TG_DEVICE float widen_f16(f16 x) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
    return r;
}
// Approximations by the special function unit: 2 units in the last place (relative), subnormal results are zero.
TG_DEVICE float fast_exp2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
TG_DEVICE float fast_log2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
TG_DEVICE float fast_reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
TG_DEVICE float fast_rsqrt(float x) {
    float r;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
TG_DEVICE float infinity() { return __int_as_float(0x7f800000); }
#endif // TG_EMULATE

// ================ the rest is the same on both ================

#define TG_UNROLL _Pragma("unroll")
#ifdef TG_EMULATE
#undef TG_UNROLL
#define TG_UNROLL
#endif

TG_DEVICE float widen_bf16(bf16 x) { return bits_float((u32)x.bits << 16); }
TG_DEVICE float low_bf16(u32 pair) { return bits_float(pair << 16); }
TG_DEVICE float high_bf16(u32 pair) { return bits_float(pair & 0xffff0000u); }

// Any element as the type that it is computed in, and back: double for double, float for the other floats.
template <class T> struct AccOf { typedef float type; };
template <> struct AccOf<double> { typedef double type; };
template <class T> using Acc = typename AccOf<T>::type;

TG_DEVICE float load(float x) { return x; }
TG_DEVICE double load(double x) { return x; }
TG_DEVICE float load(bf16 x) { return widen_bf16(x); }
TG_DEVICE float load(f16 x) { return widen_f16(x); }
TG_DEVICE float to_float(float x) { return x; }
TG_DEVICE float to_float(bf16 x) { return widen_bf16(x); }
TG_DEVICE float to_float(f16 x) { return widen_f16(x); }

template <class T> struct Round;
template <> struct Round<float> { static TG_DEVICE float of(float x) { return x; } };
template <> struct Round<double> { static TG_DEVICE double of(double x) { return x; } };
template <> struct Round<bf16> { static TG_DEVICE bf16 of(float x) { return round_bf16(x); } };
template <> struct Round<f16> { static TG_DEVICE f16 of(float x) { return round_f16(x); } };
// Rounds what was computed to T.
template <class T> TG_DEVICE T store(Acc<T> x) { return Round<T>::of(x); }
template <class T> TG_DEVICE T from_float(float x) { return Round<T>::of(x); }

// 16 bytes of elements: the widest access. `load16(v, p)` reads N = 16 / sizeof(T) elements as floats from an address aligned to 16.
template <class T> struct Vec { static constexpr int N = 16 / sizeof(T); };
template <class T> TG_DEVICE void load16(Acc<T> (&v)[Vec<T>::N], const T* p) {
    union { U4 u; T t[Vec<T>::N]; } x;
    x.u = *(const U4*)p;
    TG_UNROLL for (int i = 0; i < Vec<T>::N; i++) v[i] = load(x.t[i]);
}
template <class T> TG_DEVICE void store16(T* p, const Acc<T> (&v)[Vec<T>::N]) {
    union { U4 u; T t[Vec<T>::N]; } x;
    TG_UNROLL for (int i = 0; i < Vec<T>::N; i++) x.t[i] = store<T>(v[i]);
    *(U4*)p = x.u;
}
TG_DEVICE bool aligned16(const void* p) { return ((u64)p & 15) == 0; }

template <class T> TG_DEVICE T min_of(T a, T b) { return a < b ? a : b; }
template <class T> TG_DEVICE T max_of(T a, T b) { return a > b ? a : b; }
TG_DEVICE u32 div_up(u32 a, u32 b) { return (a + b - 1) / b; }
TG_DEVICE float fast_exp(float x) { return fast_exp2(x * 1.44269504088896f); }
// 1 / (1 + e^-x), from the exponential of -|x|, which can't overflow.
TG_DEVICE float sigmoid(float x) { float e = expf(-fabsf(x)); return (x < 0 ? e : 1.f) / (1.f + e); }
TG_DEVICE double sigmoid(double x) { double e = exp(-fabs(x)); return (x < 0 ? e : 1.) / (1. + e); }

// Reductions over a warp: every lane gets the result. Order: a butterfly, so always the same.
template <class T, class F> TG_DEVICE T warp_reduce(T x, F f) {
    TG_UNROLL for (u32 m = 16; m > 0; m >>= 1) x = f(x, shuffle_xor(x, m));
    return x;
}
template <class T> TG_DEVICE T warp_sum(T x) { return warp_reduce(x, [](T a, T b) { return a + b; }); }
template <class T> TG_DEVICE T warp_max(T x) { return warp_reduce(x, [](T a, T b) { return max_of(a, b); }); }
// Over a block: every thread gets the result. `scratch` is shared memory for one T per warp; a barrier before and after makes it free for reuse.
template <class T, class F> TG_DEVICE T block_reduce(T x, T* scratch, T none, F f) {
    x = warp_reduce(x, f);
    u32 warps = threads() >> 5;
    if (warps == 1) return x;
    sync();
    if (lane() == 0) scratch[warp()] = x;
    sync();
    T y = lane() < warps ? scratch[lane()] : none;
    return warp_reduce(y, f);
}
template <class T> TG_DEVICE T block_sum(T x, T* scratch) { return block_reduce(x, scratch, T(0), [](T a, T b) { return a + b; }); }
template <class T> TG_DEVICE T block_max(T x, T* scratch) { return block_reduce(x, scratch, T(-infinity()), [](T a, T b) { return max_of(a, b); }); }

// Division by a number known at launch (kernel.rs makes it): numerators below 2^31.
struct FastDiv {
    u32 divisor, magic, shift;
    TG_DEVICE u32 div(u32 n) const { return (multiply_high(n, magic) + n) >> shift; }
    TG_DEVICE void divmod(u32 n, u32& q, u32& r) const { q = div(n); r = n - q * divisor; }
};

// How a kernel tells that its data are wrong (an index out of range): the first report is kept, and becomes an error at the next synchronisation.
struct Fault {
    u64* flag;
    u32 code, unused;
    TG_DEVICE void tell(i64 value) const {
        if (atomic_cas((u32*)flag, 0, code) == 0) flag[1] = (u64)value;
    }
};

// A float as three bf16 that add up to it (to 24 bits), for products of f32 on tensor cores.
TG_DEVICE void split3(float x, float& a, float& b, float& c) {
    a = widen_bf16(round_bf16(x));
    b = widen_bf16(round_bf16(x - a));
    c = x - a - b;
}
