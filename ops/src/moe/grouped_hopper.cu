// The products of grouped.cu in bf16 on Hopper: wgmma, tiles of 128 rows × 256 columns × 64 of the depth. Used where all rows are whole 16-byte pieces.
//
// A block of two warpgroups, of which each has 64 rows and all columns in 128 accumulators a thread, stays on its multiprocessor and takes every
// grid-th tile; a tile's neighbours in columns come first, so blocks that run together share rows and an expert's matrix in the second-level cache.
// Operands come by asynchronous copies of 16 bytes (rows lie anywhere, through the permutation) into 4 stages of 48 KB. The stream of steps goes on
// across tiles: while a tile's results are written, the first two steps of the next one are under way. One barrier a step: products of the step before
// run on while it is passed, and copies go to the stage whose products were done two steps ago. A step is 1024 cycles of the tensor cores for 48 KB:
// 85 FLOP a byte from the second-level cache.
//
// grouped_rows (KIND 0, 1, 2 as MODE there): A K-major; B K-major, or MN-major for KIND 2; KIND 1 has 128 gate and 128 up columns in a tile.
// grouped_weights (KIND 3: A, 4: B is read through the permutation): both MN-major, as their rows are the depth; an expert's rows are its depth, what is
// beyond is zero, and an expert without rows takes one step of zeros.
//
// Lanes that have a row's neighbouring columns exchange words, so that each writes 16 bytes. C is in bf16, but KIND 1's projections and the gradients (O) of
// weights that are kept in f32.
#include "hopper.cuh"

constexpr u32 BM = 128, BN = 256, BK = 64, STAGES = 4;
constexpr u32 A_BYTES = BM * BK * 2, STAGE = (BM + BN) * BK * 2;
constexpr u32 GROUP = 64 * BK * 2; // 64 rows, or 64 columns, of an operand

struct GroupedParams {
    const bf16 *a, *b;
    void *c;
    bf16* act;          // KIND 1: c in f32, and silu(gate) · up
    const u32* order;   // slots in sorted order; a token is slot / k
    const u32 *starts, *tiles; // first row and first tile of each expert, and the ends
    FastDiv k, across;  // across: tiles of columns
    u32 experts, rows_of, cols, depth; // of C: rows (of an expert's matrix) and columns; depth of the product
    u32 gather;         // whether A's rows (grouped_rows) are read through the permutation
    FastDiv each;       // grouped_weights: tiles of an expert's matrix
};

// Where a tile is: of expert e, whose rows begin at `first` and are `rows`; m0, n0 in C (grouped_rows: in its columns); steps of the depth.
struct Place { u32 e, first, rows, m0, n0, steps; };

template <int KIND> struct Grouped {
    const GroupedParams& p;
    // columns that a tile advances by, and their end (KIND 1: of one projection)
    static constexpr u32 WIDE = KIND == 1 ? BN / 2 : BN;
    TG_DEVICE u32 width() const { return KIND == 1 ? p.cols / 2 : p.cols; }
    TG_DEVICE u32 count() const { return KIND < 3 ? p.tiles[p.experts] * p.across.divisor : p.experts * p.each.divisor; }
    TG_DEVICE Place place(u32 tile) const {
        Place x;
        u32 down, across;
        if (KIND < 3) {
            p.across.divmod(tile, down, across);
            x.e = 0;
            u32 high = p.experts; // the last expert whose tiles begin at this one or before
            while (high - x.e > 1) {
                u32 middle = (x.e + high) / 2;
                if (p.tiles[middle] <= down) x.e = middle;
                else high = middle;
            }
            x.first = p.starts[x.e] + (down - p.tiles[x.e]) * BM;
            x.rows = min_of<u32>(BM, p.starts[x.e + 1] - x.first);
            x.m0 = 0;
            x.steps = div_up(p.depth, BK);
        } else {
            u32 rest;
            p.each.divmod(tile, x.e, rest);
            p.across.divmod(rest, down, across);
            x.first = p.starts[x.e];
            x.rows = p.starts[x.e + 1] - x.first;
            x.m0 = down * BM;
            x.steps = max_of<u32>(div_up(x.rows, BK), 1);
        }
        x.n0 = across * WIDE;
        return x;
    }
};

// Copies the next step of the stream into the next stage. A thread takes the same 16-byte piece of a row of 128 bytes in every 32nd row.
template <int KIND> struct Copies {
    const Grouped<KIND>& g;
    u32 tile, tiles, step, stage, row, piece;
    Place x;
    u32 source[KIND < 3 ? 4 : 2]; // rows of A; slots of the rows of the operand that is gathered, so that nothing waits for them a step ahead

    TG_DEVICE void begin() {
        if (tile >= tiles) return;
        step = 0;
        x = g.place(tile);
        look();
    }
    // KIND < 3: the tile's rows of A; else the step's rows
    TG_DEVICE void look() {
        const GroupedParams& p = g.p;
        if (KIND < 3) {
            TG_UNROLL for (u32 j = 0; j < 4; j++) {
                u32 r = row + 32 * j;
                source[j] = r < x.rows ? (p.gather ? p.k.div(p.order[x.first + r]) : x.first + r) : 0;
            }
        } else {
            TG_UNROLL for (u32 j = 0; j < 2; j++) {
                u32 r = step * BK + row + 32 * j;
                source[j] = r < x.rows ? p.order[x.first + r] : 0;
            }
        }
    }
    TG_DEVICE void next() {
        if (tile < tiles) {
            const GroupedParams& p = g.p;
            u8* a = shared<u8>(stage * STAGE + swizzled(row, piece));
            u8* b = a + A_BYTES;
            if (KIND < 3) {
                u32 k = step * BK + piece * 8;
                bool deep = k < p.depth;
                TG_UNROLL for (u32 j = 0; j < 4; j++) copy16_async(a + j * 4096, p.a + (u64)source[j] * p.depth + k, deep && row + 32 * j < x.rows);
                const bf16* from = p.b + (u64)x.e * p.cols * p.depth;
                if (KIND < 2) {
                    u32 left = g.width() - x.n0;
                    from += (u64)(x.n0 + row) * p.depth + k;
                    TG_UNROLL for (u32 j = 0; j < 8; j++) {
                        u32 n = KIND == 1 ? row + 32 * (j % 4) : row + 32 * j, skip = KIND == 1 && j > 3 ? g.width() : 0;
                        copy16_async(b + j * 4096, from + (u64)(n - row + skip) * p.depth, deep && n < left);
                    }
                } else {
                    columns<4>(b, from, p.cols, x.n0, step * BK, p.depth);
                }
            } else {
                TG_UNROLL for (u32 j = 0; j < 2; j++) {
                    u32 r = step * BK + row + 32 * j, at = x.first + r, token = p.k.div(source[j]);
                    bool in = r < x.rows;
                    pieces<2>(a + j * 4096, p.a + (u64)(KIND == 3 ? token : at) * p.rows_of, x.m0, p.rows_of, in);
                    pieces<4>(b + j * 4096, p.b + (u64)(KIND == 4 ? token : at) * p.cols, x.n0, p.cols, in);
                }
            }
            step++;
            if (step == x.steps) tile += grid_x(), begin();
            else if (KIND >= 3) look();
        }
        stage = (stage + 1) % STAGES;
        copy_commit();
    }
    // N groups of 64 columns of a row from column c on.
    template <int N> TG_DEVICE void pieces(u8* to, const bf16* from, u32 c, u32 end, bool in) {
        c += piece * 8;
        TG_UNROLL for (u32 q = 0; q < N; q++) copy16_async(to + q * GROUP, from + c + q * 64, in && c + q * 64 < end);
    }
    // The same of all rows of a step.
    template <int N> TG_DEVICE void columns(u8* to, const bf16* from, u32 cols, u32 c, u32 k0, u32 depth) {
        TG_UNROLL for (u32 j = 0; j < 2; j++) {
            u32 k = k0 + row + 32 * j;
            pieces<N>(to + j * 4096, from + (u64)k * cols, c, cols, k < depth);
        }
    }
};

// Of four words, of which lane t of four has word t of each of its blocks: lane t gets the four words of block t.
TG_DEVICE U4 exchange(const u32 (&w)[4]) {
    u32 t = lane();
    bool odd = t & 1, high = t & 2;
    u32 a = shuffle_xor(odd ? w[0] : w[1], 1), b = shuffle_xor(odd ? w[2] : w[3], 1);
    u32 v0 = odd ? a : w[0], v1 = odd ? w[1] : a, v2 = odd ? b : w[2], v3 = odd ? w[3] : b;
    u32 c = shuffle_xor(high ? v0 : v2, 2), d = shuffle_xor(high ? v1 : v3, 2);
    return high ? U4{c, d, v2, v3} : U4{v0, v1, c, d};
}
// Writes blocks of 8 columns of a row: words word(j) of this lane, j < N; `ok`: whether the row is there.
template <int N, class F> TG_DEVICE void write_row(bf16* row, u32 n0, u32 width, bool ok, F word) {
    TG_UNROLL for (int j = 0; j < N; j += 4) {
        u32 w[4];
        TG_UNROLL for (int i = 0; i < 4; i++) w[i] = word(j + i);
        U4 out = exchange(w);
        u32 n = n0 + 8 * (j + (lane() & 3));
        if (ok && n < width) *(U4*)(row + n) = out;
    }
}
// The same in f32: this lane has two columns, first(j) and second(j), of every block, and gets four of every second one.
template <int N, class F, class G> TG_DEVICE void write_wide(float* row, u32 n0, u32 width, bool ok, F first, G second) {
    bool odd = lane() & 1;
    TG_UNROLL for (int j = 0; j < N; j += 2) {
        u32 a0 = float_bits(first(j)), a1 = float_bits(second(j)), b0 = float_bits(first(j + 1)), b1 = float_bits(second(j + 1));
        u32 c0 = shuffle_xor(odd ? a0 : b0, 1), c1 = shuffle_xor(odd ? a1 : b1, 1);
        u32 n = n0 + 8 * (j + odd) + 4 * ((lane() & 3) / 2);
        if (ok && n < width) *(U4*)(row + n) = odd ? U4{c0, c1, b0, b1} : U4{a0, a1, c0, c1};
    }
}

template <int KIND, class O> TG_DEVICE void finish(const Grouped<KIND>& g, const Place& x, const float (&d)[BN / 2]) {
    const GroupedParams& p = g.p;
    u32 width = g.width();
    TG_UNROLL for (int h = 0; h < 4; h += 2) {
        u32 r = warp() * 16 + (lane() >> 2) + h / 2 * 8;
        bool ok = KIND < 3 ? r < x.rows : x.m0 + r < p.rows_of;
        u64 at = KIND < 3 ? x.first + r : (u64)x.e * p.rows_of + x.m0 + r;
        if (KIND == 1) {
            float* gate = (float*)p.c + at * p.cols;
            write_wide<16>(gate, x.n0, width, ok, [&](int j) { return d[4 * j + h]; }, [&](int j) { return d[4 * j + h + 1]; });
            write_wide<16>(gate + width, x.n0, width, ok, [&](int j) { return d[4 * j + h + 64]; }, [&](int j) { return d[4 * j + h + 65]; });
            auto silu = [](float x) { return x * fast_reciprocal(1.f + fast_exp(-x)); };
            write_row<16>(p.act + at * width, x.n0, width, ok, [&](int j) {
                return pack_bf16(silu(d[4 * j + h]) * d[4 * j + h + 64], silu(d[4 * j + h + 1]) * d[4 * j + h + 65]);
            });
        } else if (sizeof(O) == 4) {
            write_wide<32>((float*)p.c + at * p.cols, x.n0, width, ok, [&](int j) { return d[4 * j + h]; }, [&](int j) { return d[4 * j + h + 1]; });
        } else {
            write_row<32>((bf16*)p.c + at * p.cols, x.n0, width, ok, [&](int j) { return pack_bf16(d[4 * j + h], d[4 * j + h + 1]); });
        }
    }
}

template <int KIND, class O> TG_DEVICE void grouped(const GroupedParams& p) {
    constexpr int TRANS_A = KIND >= 3, TRANS_B = KIND >= 2;
    Grouped<KIND> g{p};
    u32 tiles = g.count(), stage = 0;
    Copies<KIND> copies{g, block_x(), tiles, 0, 0, thread() / 8, thread() % 8, {}, {}};
    copies.begin();
    copies.next();
    copies.next();
    for (u32 tile = block_x(); tile < tiles; tile += grid_x()) {
        Place x = g.place(tile);
        bool work = warp() / 4 * 64 < (KIND < 3 ? x.rows : p.rows_of - x.m0); // else none of the warpgroup's rows is there
        float d[BN / 2];
        for (u32 step = 0; step < x.steps; step++) {
            copy_wait<1>();
            fence_async();
            sync();
            u32 a = shared_address(shared<u8>()) + stage * STAGE, b = a + A_BYTES;
            a += warp() / 4 * GROUP;
            u64 da = TRANS_A ? mn_major(a, GROUP) : k_major(a), db = TRANS_B ? mn_major(b, GROUP) : k_major(b);
            if (work) {
                wgmma_fence();
                TG_UNROLL for (u32 k = 0; k < 4; k++)
                    wgmma<BN, TRANS_A, TRANS_B>(d, deeper(da, k * (TRANS_A ? 128 : 2)), deeper(db, k * (TRANS_B ? 128 : 2)), step + k > 0);
                wgmma_commit();
            }
            copies.next();
            wgmma_wait<1>();
            stage = (stage + 1) % STAGES;
        }
        wgmma_wait<0>();
        wgmma_settle(d);
        finish<KIND, O>(g, x, d);
    }
    copy_wait<0>();
}
