// The second body of hopper.cuh. A warp's 32 lanes start a product together; operands are read through the descriptor and the swizzle as the hardware
// does it. What a race could hide is made visible: a result reaches the accumulators when its batch is waited for and not before; operands that change
// until then, that were copied but not fenced (fence_async), or a batch without wgmma_fence are errors, and so are warps of a group that start different
// products, and batches that nobody waits for. Plain stores without fence_async are not noticed.
#pragma once

namespace tg {
struct Piece { u32 at; u16 x[8]; }; // 16 bytes of shared memory
struct Product { std::vector<float> p; std::vector<Piece> read; int n; };

// Where 16-byte piece `piece` of row `row` is for a descriptor: rows of 128 bytes in groups of 8, addresses swizzled after all is added.
inline u32 place(u64 descriptor, u32 group, u32 row, u32 piece, u32 next) {
    u32 start = (u32)(descriptor & 0x3fff) << 4, stride = (u32)(descriptor >> 32 & 0x3fff) << 4;
    u32 at = start + group * next + (row >> 3) * stride + (row & 7) * 128 + piece * 16;
    return at ^ ((at >> 3) & 0x70);
}
inline void check_descriptor(u64 d) {
    if (d >> 62 != 1) fail("wgmma: a descriptor names swizzle %u; 1 (of 128 bytes) is emulated", (u32)(d >> 62));
    if (d >> 49 & 7) fail("wgmma: a descriptor has a base offset; tiles must be aligned to 1024 bytes");
}
inline Piece read_piece(u32 at) {
    Piece p{at, {}};
    Block* b = block;
    if (at + 16 > b->shared_bytes) fail("wgmma: an operand reaches byte %u of the block's %u bytes of shared memory", at + 16, b->shared_bytes);
    if (b->unfenced.size() > at / 16 && b->unfenced[at / 16]) fail("wgmma: reads byte %u, which was copied and not fenced (fence_async)", at);
    memcpy(p.x, b->shared + at, 16);
    return p;
}
inline float as_float(u16 bits) {
    u32 x = (u32)bits << 16;
    float f;
    memcpy(&f, &x, 4);
    return f;
}
// Reads `count` of A's rows or B's columns, from `first` on, times 16 of the depth: out[k][i].
inline void read_operand(u64 d, int trans, u32 first, u32 count, std::vector<Piece>& read, float* out) {
    check_descriptor(d);
    auto put = [&](u32 group, u32 row, u32 piece, u32 next, float* to, u32 step) {
        read.push_back(read_piece(place(d, group, row, piece, next)));
        for (int i = 0; i < 8; i++) to[i * step] = as_float(read.back().x[i]);
    };
    u32 leading = (u32)(d >> 16 & 0x3fff) << 4;
    if (trans) {
        for (u32 k = 0; k < 16; k++)
            for (u32 i = 0; i < count; i += 8) put((first + i) / 64, k, (first + i) % 64 / 8, leading, out + k * count + i, 1);
    } else {
        for (u32 i = 0; i < count; i++)
            for (u32 piece = 0; piece < 2; piece++) put(0, first + i, piece, 0, out + piece * 8 * count + i, count);
    }
}
struct Start { float* d; const u32* a; u64 desc_a, desc_b; int add; };
template <int N> inline void start(float* d, const u32* a, u64 desc_a, int trans_a, u64 desc_b, int trans_b, int add) {
    Fibre* f = block->now;
    if (block->n % 128) fail("wgmma: a block of %u threads is not whole warpgroups", block->n);
    if (!f->fenced) fail("wgmma: no wgmma_fence before the first product of a batch");
    Start mine{d, a, desc_a, desc_b, add};
    collective("wgmma", &mine, [&](void** s) {
        u32 w = block->now->id >> 5;
        const Start* first = (const Start*)s[0];
        for (int l = 1; l < 32; l++) {
            const Start* x = (const Start*)s[l];
            if (x->desc_a != first->desc_a || x->desc_b != first->desc_b || !x->add != !first->add) fail("wgmma: lanes of a warp disagree about an operand");
        }
        // the four warps of a group must start the same products, in the same order
        auto& log = block->products[w / 4];
        u64 same[4] = {a ? 0 : desc_a, desc_b, (u64)N << 8 | (u64)(a != nullptr) << 2 | trans_a << 1 | trans_b, (u64)(add != 0)};
        u32 number = block->started[w]++;
        if (number == log.size()) log.push_back({same[0], same[1], same[2], same[3]});
        else if (memcmp(log[number].data(), same, sizeof same)) fail("wgmma: the warps of a group start different products");
        auto made = std::make_shared<Product>();
        std::vector<float> A(16 * 16), B(16 * N);
        if (a) {
            for (int l = 0; l < 32; l++)
                for (int i = 0; i < 4; i++)
                    for (int h = 0; h < 2; h++) {
                        u32 row = (l >> 2) + (i & 1) * 8, k = (l & 3) * 2 + (i >> 1) * 8 + h;
                        A[k * 16 + row] = as_float((u16)(((const Start*)s[l])->a[i] >> 16 * h));
                    }
        } else {
            read_operand(desc_a, trans_a, w % 4 * 16, 16, made->read, A.data());
        }
        read_operand(desc_b, trans_b, 0, N, made->read, B.data());
        made->n = N;
        made->p.assign(16 * N, 0.f);
        for (int i = 0; i < 16; i++)
            for (int k = 0; k < 16; k++) {
                float x = A[k * 16 + i];
                float* to = &made->p[i * N];
                const float* y = &B[k * N];
                for (int j = 0; j < N; j++) to[j] += x * y[j];
            }
        for (int l = 0; l < 32; l++) block->fibres[w * 32 + l].products.push_back({made, ((Start*)s[l])->d, add});
    });
}
inline void finish(std::vector<Pending>& batch) {
    u32 l = block->now->id & 31, g = l >> 2, t = l & 3;
    for (Pending& x : batch) {
        if (l == 0)
            for (Piece& p : x.of->read)
                if (memcmp(p.x, block->shared + p.at, 16)) fail("wgmma: byte %u of shared memory was overwritten before the product was waited for", p.at);
        for (int j = 0; j < x.of->n / 8; j++)
            for (int i = 0; i < 4; i++) {
                float y = x.of->p[(g + (i >> 1) * 8) * x.of->n + 8 * j + 2 * t + (i & 1)];
                float& d = x.d[4 * j + i];
                d = x.add ? d + y : y;
            }
    }
    batch.clear();
}
} // namespace tg

inline void wgmma_fence() { tg::block->now->fenced = true; }
inline void wgmma_commit() {
    tg::Fibre* f = tg::block->now;
    f->batches.push_back(std::move(f->products));
    f->products.clear();
    f->fenced = false;
}
template <int N> inline void wgmma_wait() {
    auto& b = tg::block->now->batches;
    while ((int)b.size() > N) { tg::finish(b.front()); b.erase(b.begin()); }
}
template <int N> inline void wgmma_settle(float (&)[N]) {}
template <int N> inline void registers_give() {}
template <int N> inline void registers_take() {}
inline void fence_async() {
    tg::Fibre* f = tg::block->now;
    for (u32 at : f->landed) tg::block->unfenced[at] = 0;
    f->landed.clear();
}
template <int N> struct Wgmma {
    template <int TRANS_A, int TRANS_B> static inline void shared(float (&d)[N / 2], u64 a, u64 b, int add) { tg::start<N>(d, nullptr, a, TRANS_A, b, TRANS_B, add); }
    template <int TRANS_B> static inline void registers(float (&d)[N / 2], const u32 (&a)[4], u64 b, int add) { tg::start<N>(d, a, 0, 0, b, TRANS_B, add); }
};
