// Kernels of the emulator's own tests.
#include "tile.cuh"

struct Params {
    const void* a;
    const void* b;
    void* c;
    u32 n;
};

// y = 2 a + b
template <class T> TG_DEVICE void axpy(const Params& p) {
    u32 i = block_x() * threads() + thread();
    if (i < p.n) ((T*)p.c)[i] = store<T>(2.f * load(((const T*)p.a)[i]) + load(((const T*)p.b)[i]));
}

// One block: C [32, 16] = op(A) op(B) with depth 32, by two warps; KIND 0: A Bᵀ, 1: A B, 2: Aᵀ B, 3: (A Bᵀ as a fragment) B[0..16].
template <class T, int KIND> TG_DEVICE void product(const Params& p) {
    typedef Tile<T, 32, 32> Square;
    Square a{shared<T>()}, b{shared<T>(Square::BYTES)};
    load_tile(a, (const T*)p.a, 32, 32, 32, thread(), threads());
    load_tile(b, (const T*)p.b, 32, p.n, 32, thread(), threads());
    copy_commit();
    copy_wait<0>();
    sync();
    FragC c[2] = {};
    int row = 16 * warp();
    if (KIND == 0 || KIND == 3) mma_abt<T, 32>(c, a.data, a.STRIDE, row, b.data, b.STRIDE, 0);
    if (KIND == 1) mma_ab<T, 32>(c, a.data, a.STRIDE, row, b.data, b.STRIDE, 0);
    if (KIND == 2) mma_atb<T, 32>(c, a.data, a.STRIDE, row, b.data, b.STRIDE, 0);
    if (KIND == 3) {
        FragA<T> f;
        to_a(f, c[0], c[1]);
        for (int i = 0; i < 2; i++) {
            FragB<T> g;
            load_b_trans(g, b.data, b.STRIDE, 8 * i, 0);
            c[i].zero();
            mma(c[i], f, g);
        }
    }
    for (int i = 0; i < 2; i++) store_frag((float*)p.c, 16, row, 8 * i, c[i]);
}

// Sums and maxima over a block, a ballot, a broadcast: four numbers.
template <int> TG_DEVICE void collectives(const Params& p) {
    TG_SHARED(float, scratch, [32]);
    float x = ((const float*)p.a)[thread()];
    float s = block_sum(x, scratch), m = block_max(x, scratch);
    u32 bits = ballot(lane() % 3 == 0);
    float up = shuffle_up(x, 1), fifth = shuffle(x, 5);
    if (thread() == 33) {
        float* c = (float*)p.c;
        c[0] = s, c[1] = m, c[2] = (float)population(bits), c[3] = up, c[4] = fifth;
    }
}

// What the emulator has to notice; KIND says which fault.
template <int KIND> TG_DEVICE void fault(const Params& p) {
    float* c = (float*)p.c;
    if (KIND == 0 && thread() != 7) sync();
    if (KIND == 0 && thread() == 7) { u32 all = ballot(true); c[0] = all; } // others wait elsewhere
    if (KIND == 1) c[thread()] = shared<float>()[thread()];                 // never written: NaN
    if (KIND == 2) c[thread() + 64] = 1.f;                                  // past the end
    if (KIND == 3) {                                                        // read before the copy is waited for
        copy16_async(shared<float>() + 4 * thread(), (const float*)p.a + 4 * thread());
        copy_commit();
        c[thread()] = shared<float>()[4 * thread()];
    }
    if (KIND == 4) {
        if (lane() < 16) shuffle(1.f, 0);
        else shuffle_xor(1.f, 1);
    }
}
