// The second body of tidegate.cuh, for a host C++ compiler: kernels run on a machine without a GPU, at small shapes, in tests.
//
// A block's threads are fibres on one OS thread that switch at barriers and at warp collectives; the last lane of a warp to arrive carries a collective
// out for all. Blocks run one after the other. What a race could hide is made visible: shared memory starts as NaN, asynchronous copies land when they
// are waited for and not before, and a barrier or collective that not all reach is an error that says who waits where.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define TG_DEVICE inline __attribute__((always_inline))
#define __restrict__ __restrict

namespace tg {
// ---- fibres ----
constexpr size_t STACK = 128 * 1024;
#if defined(__x86_64__)
typedef void* Context; // the stack pointer; callee-saved registers lie on the stack
extern "C" void tg_switch(void** from, void* to);
__asm__(".text\n.local tg_switch\n.type tg_switch,@function\ntg_switch:\n"
        "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n"
        "mov %rsp, (%rdi); mov %rsi, %rsp\n"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp\nret\n.size tg_switch,.-tg_switch\n");
inline void make_context(Context& c, char* stack, void (*f)()) {
    void** top = (void**)(stack + STACK - 64);
    *--top = nullptr;   // f never returns
    *--top = (void*)f;  // tg_switch returns into it; the stack is then aligned as after a call
    for (int i = 0; i < 6; i++) *--top = nullptr;
    c = top;
}
inline void switch_context(Context& from, Context& to) { tg_switch(&from, to); }
#else
typedef ucontext_t Context;
inline void make_context(Context& c, char* stack, void (*f)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack;
    c.uc_stack.ss_size = STACK;
    c.uc_link = nullptr;
    makecontext(&c, f, 0);
}
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Copy { void* to; const void* from; bool valid; };
struct Product; // of hopper_emulator.h
struct Pending { std::shared_ptr<Product> of; float* d; int add; };
struct Fibre {
    Context context;
    u32 id;
    const u32* waits; // null, or a counter that must move away from `seen`
    u32 seen;
    const char* where;
    bool done;
    std::vector<Copy> open;                 // not committed
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
    std::vector<u32> landed;                // pieces that came by copies since the last fence_async
    bool fenced;                            // wgmma_fence was called for the batch that begins
    std::vector<Pending> products;          // not committed
    std::vector<std::vector<Pending>> batches;
};
struct Barrier { u32 arrived, turn; };
struct Warp { u32 arrived, turn; const char* what; void* slot[32]; };
struct Block {
    u32 bx, by, bz, gx, gy, gz, n, alive;
    u8* shared;
    u32 shared_bytes;
    Fibre* now;
    Barrier barriers[16];
    Warp warps[32];
    std::vector<u8> unfenced;                          // of each 16 bytes: copied and not seen by wgmma yet
    std::vector<std::array<u64, 4>> products[8];       // what each warpgroup started
    u32 started[32];                                   // how many each warp did
    Fibre* fibres;
    Context scheduler;
    void (*body)(const void*);
    const void* params;
    char error[512];
};
inline thread_local Block* block = nullptr;
// Of the threads of one block; this OS thread's blocks come one after another.
struct Stacks {
    char* at = nullptr;
    ~Stacks() { if (at) munmap(at, 1024 * STACK); }
};
inline thread_local Stacks stacks;

// A fault of the kernel: the launch ends with this message, and nothing of it runs on.
template <class... A> [[noreturn]] void fail(const char* format, A... a) {
    Block* b = block;
    int n = snprintf(b->error, sizeof b->error, "block (%u, %u, %u) thread %u: ", b->bx, b->by, b->bz, b->now->id);
    snprintf(b->error + n, sizeof b->error - n, format, a...);
    switch_context(b->now->context, b->scheduler);
    abort();
}
inline void yield() { switch_context(block->now->context, block->scheduler); }
inline void wait(const u32& counter, const char* where) {
    Fibre* f = block->now;
    f->waits = &counter;
    f->seen = counter;
    f->where = where;
    yield();
    f->waits = nullptr;
}
inline void arrive(Barrier& b, u32 count, const char* where) {
    if (++b.arrived == count) { b.arrived = 0; b.turn++; } else wait(b.turn, where);
}
inline void land(std::vector<Copy>& group) {
    for (Copy& c : group) {
        if (c.valid) memcpy(c.to, c.from, 16);
        else memset(c.to, 0, 16);
        u64 at = (u64)((u8*)c.to - block->shared) / 16;
        if (at < block->unfenced.size()) block->unfenced[at] = 1, block->now->landed.push_back((u32)at);
    }
    group.clear();
}
// Runs `all(slots)` once the warp's 32 lanes are here, each with its own slot.
template <class F> inline void collective(const char* what, void* mine, F all) {
    Block* b = block;
    Warp& w = b->warps[b->now->id >> 5];
    if (w.arrived && strcmp(w.what, what)) fail("calls %s while other lanes of its warp wait in %s", what, w.what);
    w.what = what;
    w.slot[b->now->id & 31] = mine;
    if (++w.arrived == 32) { all(w.slot); w.arrived = 0; w.turn++; } else wait(w.turn, what);
}
inline void enter() {
    Block* b = block;
    b->body(b->params);
    Fibre* f = b->now;
    if (!f->open.empty()) fail("ends with asynchronous copies that were not committed");
    for (auto& g : f->groups) land(g);
    f->groups.clear();
    if (!f->products.empty() || !f->batches.empty()) fail("ends with matrix products that were not waited for (wgmma_wait)");
    f->done = true;
    b->alive--;
    // who has ended no longer holds up a barrier of the whole block
    if (b->barriers[0].arrived && b->barriers[0].arrived == b->alive) { b->barriers[0].arrived = 0; b->barriers[0].turn++; }
    yield();
    abort();
}

struct StaticShared { void* p; size_t n; };
inline thread_local std::vector<StaticShared> statics;
template <class T> struct Static {
    alignas(128) unsigned char bytes[sizeof(T)];
    Static() { memset(bytes, 0xff, sizeof bytes); statics.push_back({bytes, sizeof bytes}); }
    T& get() { return *(T*)bytes; }
};

inline bool run_block(Block& b) {
    memset(b.shared, 0xff, b.shared_bytes); // every float and bf16 of it is NaN
    for (auto& s : statics) memset(s.p, 0xff, s.n);
    memset(b.barriers, 0, sizeof b.barriers);
    memset(b.warps, 0, sizeof b.warps);
    memset(b.started, 0, sizeof b.started);
    for (auto& p : b.products) p.clear();
    b.unfenced.assign(b.shared_bytes / 16, 0);
    b.alive = b.n;
    for (u32 i = 0; i < b.n; i++) {
        Fibre& f = b.fibres[i];
        f.id = i;
        f.waits = nullptr;
        f.done = f.fenced = false;
        f.landed.clear();
        make_context(f.context, stacks.at + i * STACK, enter);
    }
    while (b.alive) {
        bool ran = false;
        for (u32 i = 0; i < b.n; i++) {
            Fibre& f = b.fibres[i];
            if (f.done || (f.waits && *f.waits == f.seen)) continue;
            ran = true;
            b.now = &f;
            switch_context(b.scheduler, f.context);
            if (b.error[0]) return false;
        }
        if (!ran && b.alive) {
            int n = snprintf(b.error, sizeof b.error, "block (%u, %u, %u) is stuck:", b.bx, b.by, b.bz);
            const char* last = nullptr;
            for (u32 i = 0; i < b.n && n < (int)sizeof b.error - 80; i++) {
                Fibre& f = b.fibres[i];
                if (f.done || (last && !strcmp(last, f.where))) continue;
                n += snprintf(b.error + n, sizeof b.error - n, " thread %u and on waits in %s;", i, last = f.where);
            }
            if (b.alive < b.n) snprintf(b.error + n, sizeof b.error - n, " %u of %u threads have ended", b.n - b.alive, b.n);
            return false;
        }
    }
    return true;
}

inline int launch(void (*body)(const void*), const void* params, const u32* grid, u32 n, u32 shared_bytes, char* error, size_t error_bytes) {
    if (!stacks.at) {
        void* p = mmap(nullptr, 1024 * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (p == MAP_FAILED) { snprintf(error, error_bytes, "no memory for the threads' stacks"); return 1; }
        stacks.at = (char*)p;
    }
    Block b{};
    std::vector<Fibre> fibres(n);
    b.fibres = fibres.data();
    b.n = n;
    b.shared_bytes = shared_bytes;
    b.shared = (u8*)aligned_alloc(1024, (shared_bytes + 1024) / 1024 * 1024);
    b.body = body;
    b.params = params;
    b.gx = grid[0]; b.gy = grid[1]; b.gz = grid[2];
    Block* outer = block;
    block = &b;
    bool ok = true;
    for (b.bz = 0; ok && b.bz < b.gz; b.bz++)
        for (b.by = 0; ok && b.by < b.gy; b.by++)
            for (b.bx = 0; ok && b.bx < b.gx; b.bx++)
                if (!(ok = run_block(b))) snprintf(error, error_bytes, "%s", b.error);
    block = outer;
    free(b.shared);
    return ok ? 0 : 1;
}
} // namespace tg

#define TG_SHARED(type, name, ...) \
    struct TgStatic_##name { type value __VA_ARGS__; }; \
    static thread_local tg::Static<TgStatic_##name> tg_static_##name; \
    auto& name = tg_static_##name.get().value
#define TG_ENTRY(name_, threads_, min_blocks_, ...) \
    template <class P> struct TgParams; \
    template <class P> struct TgParams<void (*)(const P&)> { typedef P type; }; \
    typedef typename TgParams<decltype(&__VA_ARGS__)>::type TgP; \
    extern "C" __attribute__((visibility("default"))) u32 tg_params_size() { return sizeof(TgP); } \
    extern "C" __attribute__((visibility("default"))) int tg_entry(const void* p, const u32* grid, u32 n, u32 shared_bytes, char* error, size_t error_bytes) { \
        return tg::launch([](const void* p) { __VA_ARGS__(*(const TgP*)p); }, p, grid, n, shared_bytes, error, error_bytes); \
    }

TG_DEVICE u32 thread() { return tg::block->now->id; }
TG_DEVICE u32 threads() { return tg::block->n; }
TG_DEVICE u32 thread_anew() { return thread(); }
TG_DEVICE u32 lane() { return thread() & 31; }
TG_DEVICE u32 warp() { return thread() >> 5; }
TG_DEVICE u32 block_x() { return tg::block->bx; }
TG_DEVICE u32 block_y() { return tg::block->by; }
TG_DEVICE u32 block_z() { return tg::block->bz; }
TG_DEVICE u32 grid_x() { return tg::block->gx; }
TG_DEVICE u32 grid_y() { return tg::block->gy; }
TG_DEVICE u32 grid_z() { return tg::block->gz; }
template <class T> TG_DEVICE T* shared(u32 at = 0) { return (T*)(tg::block->shared + at); }

TG_DEVICE void sync() { tg::arrive(tg::block->barriers[0], tg::block->alive, "sync"); }
TG_DEVICE void sync_warp() { tg::collective("sync_warp", nullptr, [](void**) {}); }
TG_DEVICE void sync_some(u32 id, u32 count) {
    if (id == 0 || id > 15 || count % 32) tg::fail("sync_some(%u, %u): barriers are 1 to 15, counts multiples of 32", id, count);
    tg::arrive(tg::block->barriers[id], count, "sync_some");
}
TG_DEVICE void arrive_some(u32 id, u32 count) {
    if (id == 0 || id > 15 || count % 32) tg::fail("arrive_some(%u, %u): barriers are 1 to 15, counts multiples of 32", id, count);
    auto& b = tg::block->barriers[id];
    if (++b.arrived == count) { b.arrived = 0; b.turn++; }
}
TG_DEVICE void fence() {}

namespace tg {
template <class T> struct Moved { T x; u32 from; T got; };
template <class T> inline T move(const char* what, T x, u32 from) {
    Moved<T> m{x, from & 31, x};
    collective(what, &m, [](void** s) {
        for (int i = 0; i < 32; i++) { auto* a = (Moved<T>*)s[i]; a->got = ((Moved<T>*)s[a->from])->x; }
    });
    return m.got;
}
} // namespace tg
template <class T> TG_DEVICE T shuffle(T x, u32 from) { return tg::move("shuffle", x, from); }
template <class T> TG_DEVICE T shuffle_xor(T x, u32 mask) { return tg::move("shuffle_xor", x, lane() ^ mask); }
template <class T> TG_DEVICE T shuffle_up(T x, u32 by) { return tg::move("shuffle_up", x, lane() < by ? lane() : lane() - by); }
template <class T> TG_DEVICE T shuffle_down(T x, u32 by) { return tg::move("shuffle_down", x, lane() + by > 31 ? lane() : lane() + by); }
inline u32 ballot(bool x) {
    struct V { bool x; u32 all; } v{x, 0};
    tg::collective("ballot", &v, [](void** s) {
        u32 all = 0;
        for (int i = 0; i < 32; i++) all |= (u32)((V*)s[i])->x << i;
        for (int i = 0; i < 32; i++) ((V*)s[i])->all = all;
    });
    return v.all;
}
TG_DEVICE bool warp_any(bool x) { return ballot(x) != 0; }
TG_DEVICE bool warp_all(bool x) { return ballot(x) == ~0u; }
inline u32 warp_largest(u32 x) {
    for (u32 m = 16; m > 0; m >>= 1) { u32 y = shuffle_xor(x, m); x = x > y ? x : y; }
    return x;
}
inline u32 warp_smallest(u32 x) { return ~warp_largest(~x); }

// threads take turns, so plain memory accesses are atomic
namespace tg { template <class T, class F> inline T swap(T* p, F f) { T old = *p; *p = f(old); return old; } }
inline float atomic_add(float* p, float x) { return tg::swap(p, [&](float a) { return a + x; }); }
inline double atomic_add(double* p, double x) { return tg::swap(p, [&](double a) { return a + x; }); }
inline i32 atomic_add(i32* p, i32 x) { return tg::swap(p, [&](i32 a) { return a + x; }); }
inline u32 atomic_add(u32* p, u32 x) { return tg::swap(p, [&](u32 a) { return a + x; }); }
inline u64 atomic_add(u64* p, u64 x) { return tg::swap(p, [&](u64 a) { return a + x; }); }
inline i32 atomic_max(i32* p, i32 x) { return tg::swap(p, [&](i32 a) { return a > x ? a : x; }); }
inline u32 atomic_max(u32* p, u32 x) { return tg::swap(p, [&](u32 a) { return a > x ? a : x; }); }
inline u32 atomic_min(u32* p, u32 x) { return tg::swap(p, [&](u32 a) { return a < x ? a : x; }); }
inline u32 atomic_or(u32* p, u32 x) { return tg::swap(p, [&](u32 a) { return a | x; }); }
inline u32 atomic_cas(u32* p, u32 expect, u32 x) { return tg::swap(p, [&](u32 a) { return a == expect ? x : a; }); }
inline u32 atomic_exchange(u32* p, u32 x) { return tg::swap(p, [&](u32) { return x; }); }

inline void copy16_async(void* to, const void* from, bool valid = true) {
    if ((u64)to & 15) tg::fail("copy16_async: the shared address is not aligned to 16 bytes");
    if (valid && ((u64)from & 15)) tg::fail("copy16_async: the global address is not aligned to 16 bytes");
    u8* s = tg::block->shared;
    bool dynamic = (u8*)to >= s && (u8*)to + 16 <= s + tg::block->shared_bytes;
    bool fixed = false;
    for (auto& x : tg::statics) fixed |= (u8*)to >= (u8*)x.p && (u8*)to + 16 <= (u8*)x.p + x.n;
    if (!dynamic && !fixed) tg::fail("copy16_async: the target is not in the block's %u bytes of shared memory", tg::block->shared_bytes);
    memset(to, 0xff, 16); // not there yet
    tg::block->now->open.push_back({to, from, valid});
}
inline void copy_commit() {
    tg::Fibre* f = tg::block->now;
    f->groups.push_back(std::move(f->open));
    f->open.clear();
}
template <int N> inline void copy_wait() {
    auto& g = tg::block->now->groups;
    while ((int)g.size() > N) { tg::land(g.front()); g.erase(g.begin()); }
}

// ---- tensor cores ----
namespace tg {
struct Rows { const void* row; u32* r; };
template <bool TRANS> inline void ldmatrix(const char* what, u32* r, const void* row, int matrices) {
    u8* s = block->shared;
    u32 l = block->now->id & 31;
    if ((int)l < 8 * matrices) {
        if ((u64)row & 15) fail("%s: a row's address is not aligned to 16 bytes", what);
        bool dynamic = (u8*)row >= s && (u8*)row + 16 <= s + block->shared_bytes, fixed = false;
        for (auto& x : statics) fixed |= (u8*)row >= (u8*)x.p && (u8*)row + 16 <= (u8*)x.p + x.n;
        if (!dynamic && !fixed) fail("%s: a row is not in the block's %u bytes of shared memory", what, block->shared_bytes);
    }
    Rows mine{row, r};
    collective(what, &mine, [matrices](void** s) {
        for (int m = 0; m < matrices; m++)
            for (int l = 0; l < 32; l++) {
                int g = l >> 2, t = l & 3;
                auto at = [&](int row, int col) -> u32 { return ((const u16*)((Rows*)s[8 * m + row])->row)[col]; };
                ((Rows*)s[l])->r[m] = TRANS ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
            }
    });
}
} // namespace tg
TG_DEVICE void ldmatrix4(u32 (&r)[4], const void* row) { tg::ldmatrix<false>("ldmatrix4", r, row, 4); }
TG_DEVICE void ldmatrix4_trans(u32 (&r)[4], const void* row) { tg::ldmatrix<true>("ldmatrix4_trans", r, row, 4); }
TG_DEVICE u32 shared_address(const void* p) { return (u32)((u8*)p - tg::block->shared); }
TG_DEVICE void ldmatrix4(u32 (&r)[4], u32 row) { tg::ldmatrix<false>("ldmatrix4", r, tg::block->shared + row, 4); }
TG_DEVICE void ldmatrix4_trans(u32 (&r)[4], u32 row) { tg::ldmatrix<true>("ldmatrix4_trans", r, tg::block->shared + row, 4); }
TG_DEVICE void ldmatrix2(u32 (&r)[2], const void* row) { tg::ldmatrix<false>("ldmatrix2", r, row, 2); }
TG_DEVICE void ldmatrix2_trans(u32 (&r)[2], const void* row) { tg::ldmatrix<true>("ldmatrix2_trans", r, row, 2); }

TG_DEVICE u32 float_bits(float x) { u32 r; memcpy(&r, &x, 4); return r; }
TG_DEVICE float bits_float(u32 x) { float r; memcpy(&r, &x, 4); return r; }
TG_DEVICE u64 double_bits(double x) { u64 r; memcpy(&r, &x, 8); return r; }
TG_DEVICE double bits_double(u64 x) { double r; memcpy(&r, &x, 8); return r; }

inline void mma_16x8x16(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    struct M { float* c; const u32 *a, *b; } mine{c, a, b};
    tg::collective("mma_16x8x16", &mine, [](void** s) {
        float A[16][16], B[16][8];
        auto put = [](u32 pair, float& x, float& y) { x = bits_float(pair << 16); y = bits_float(pair & 0xffff0000u); };
        for (int l = 0; l < 32; l++) {
            int g = l >> 2, t = l & 3;
            const M* m = (const M*)s[l];
            for (int i = 0; i < 4; i++) { float* p = &A[g + (i & 1) * 8][2 * t + (i >> 1) * 8]; put(m->a[i], p[0], p[1]); }
            for (int i = 0; i < 2; i++) put(m->b[i], B[2 * t + 8 * i][g], B[2 * t + 1 + 8 * i][g]);
        }
        float C[16][8] = {};
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++)
                for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
        for (int l = 0; l < 32; l++) {
            int g = l >> 2, t = l & 3;
            for (int i = 0; i < 4; i++) ((const M*)s[l])->c[i] += C[g + (i >> 1) * 8][2 * t + (i & 1)];
        }
    });
}

TG_DEVICE u32 multiply_high(u32 a, u32 b) { return (u32)((u64)a * b >> 32); }
TG_DEVICE u32 population(u32 x) { return __builtin_popcount(x); }
TG_DEVICE u32 first_bit(u32 x) { return __builtin_ctz(x); }
TG_DEVICE bf16 round_bf16(float x) {
    u32 b = float_bits(x);
    if ((b & 0x7fffffffu) > 0x7f800000u) return {(u16)0x7fff};
    return {(u16)((b + 0x7fffu + ((b >> 16) & 1)) >> 16)};
}
TG_DEVICE u32 pack_bf16(float low, float high) { return (u32)round_bf16(low).bits | (u32)round_bf16(high).bits << 16; }
inline f16 round_f16(float x) {
    u32 b = float_bits(x), sign = b >> 16 & 0x8000u, a = b & 0x7fffffffu;
    if (a > 0x7f800000u) return {(u16)0x7fff};
    if (a >= 0x477ff000u) return {(u16)(sign | 0x7c00u)}; // 65520 and above round to infinity
    if (a < 0x38800000u) return {(u16)(sign | (u32)lrintf(fabsf(x) * 16777216.f))}; // a multiple of 2^-24, rounded to even
    return {(u16)(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1)) >> 13))};
}
inline float widen_f16(f16 h) {
    u32 sign = (u32)(h.bits & 0x8000u) << 16, e = h.bits >> 10 & 31, m = h.bits & 0x3ffu;
    if (e == 31) return bits_float(sign | 0x7f800000u | m << 13);
    if (e == 0) { float x = (float)m * (1.f / 16777216.f); return sign ? -x : x; }
    return bits_float(sign | (e + 112) << 23 | m << 13);
}
// the special function unit flushes subnormal results
TG_DEVICE float fast_exp2(float x) { float y = exp2f(x); return y < 1.17549435e-38f ? 0.f : y; }
TG_DEVICE float fast_log2(float x) { return log2f(x); }
TG_DEVICE float fast_reciprocal(float x) { return 1.f / x; }
TG_DEVICE float fast_rsqrt(float x) { return 1.f / sqrtf(x); }
TG_DEVICE float rsqrtf(float x) { return 1.f / sqrtf(x); }
TG_DEVICE double rsqrt(double x) { return 1. / sqrt(x); }
TG_DEVICE float infinity() { return INFINITY; }
