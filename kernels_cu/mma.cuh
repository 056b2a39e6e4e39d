// Matrix products of a warp, in blocks of 16 x 16 x 16 for every element type.
//
// Mma<T> multiplies fragments: acc (16 x 16) += scale * a (16 x 16) b (16 x 16), with
//   load_a(tile, m, k)             a[i][j] = tile[m + i][k + j]
//   load_a_transposed(tile, m, k)  a[i][j] = tile[k + j][m + i]
//   load_b(tile, k, n)             b[i][j] = tile[k + i][n + j]
//   load_b_transposed(tile, k, n)  b[i][j] = tile[n + j][k + i]
//   to_a(acc, factor)              a[i][j] = factor * acc[i][j], within a thread's own registers
//   at_most_1(p)                   a weight, which rounding may have taken above 1
//   reload_a(tile, m, k)           a[i][j] = tile[m + i][k + j], as to_a of what was stored there
//   multiply(acc, a, b, scale)     the sum of N such products, of fragments a[N] and b[N]
// Tiles have elements of Mma<T>::Operand: T itself, or for 32-bit types the parts of split.cuh;
// then factors of type Factor scale them and the products (One for other types). STEPS is the N that
// is best. scale_of(largest) is the scale of weights whose absolute values are up to `largest`.
//
// A product sums over k in any order, as long as both operands agree. For 64-bit elements two
// orders are used, each where it costs nothing: load_a goes with load_b_transposed; to_a, reload_a
// and load_a_transposed go with load_b. For all others it is the natural order.
//
// Lane 4g + t of a warp holds of a block what is written at Accumulator (g = lane / 4).
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "tile.cuh"
#include "split.cuh"

DEVICE int lane_index() {
    return threadIdx.x % WARP;
}

// A 16 x 16 block of sums. Element [h][e] of lane 4g + t is at row g + 8 (e / 2) and
// column 8h + 2t + e % 2.
template <class Real>
struct Accumulator {
    Real value[2][4];

    static DEVICE int row(int e) {
        return lane_index() / 4 + 8 * (e / 2);
    }
    static DEVICE int col(int h, int e) {
        return 8 * h + 2 * (lane_index() % 4) + e % 2;
    }
};

template <class T>
struct Mma;

// ---------------------------------------------------------------------------------------------
// Fragments of 16-bit elements, in COUNT parts that lie a chunk apart (one part but for SplitFloat)

template <int COUNT>
struct Fragments16 {
    struct A {
        uint32 part[COUNT][4];
    };
    struct B {
        uint32 part[COUNT][4];  // columns 0..7: [0], [1]; columns 8..15: [2], [3]
    };

    template <class Tile>
    static DEVICE A load_a(Tile tile, int m, int k) {
        return load<A, false>(rows_first(tile, m, k));
    }
    template <class Tile>
    static DEVICE A reload_a(Tile tile, int m, int k) {
        return load_a(tile, m, k);
    }
    template <class Tile>
    static DEVICE A load_a_transposed(Tile tile, int m, int k) {
        return load<A, true>(cols_first(tile, k, m));
    }
    template <class Tile>
    static DEVICE B load_b(Tile tile, int k, int n) {
        return load<B, true>(rows_first(tile, k, n));
    }
    template <class Tile>
    static DEVICE B load_b_transposed(Tile tile, int k, int n) {
        return load<B, false>(cols_first(tile, n, k));
    }

private:
    // ldmatrix takes a row address from every lane: lanes 0..7 the rows of the first 8 x 8 matrix,
    // and so on. The four matrices are the quarters of the block at (row, col), in the order
    // upper left, lower left, upper right, lower right,
    template <class Tile>
    static DEVICE uint32 rows_first(Tile tile, int row, int col) {
        const int lane = lane_index();
        return tile.at(row + lane % 16, col + lane / 16 * 8);
    }
    // or upper left, upper right, lower left, lower right.
    template <class Tile>
    static DEVICE uint32 cols_first(Tile tile, int row, int col) {
        const int lane = lane_index();
        return tile.at(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8);
    }
    template <class Fragment, bool TRANSPOSED>
    static DEVICE Fragment load(uint32 address) {
        Fragment fragment;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if constexpr (TRANSPOSED) {
                load_matrix_transposed_x4(fragment.part[i], address + i * CHUNK_BYTES);
            } else {
                load_matrix_x4(fragment.part[i], address + i * CHUNK_BYTES);
            }
        }
        return fragment;
    }
};

// float16 and bfloat16: m16n8k16, sums in float

struct Float16Instructions {
    using Operand = float16;
    static DEVICE uint32 pack(float low, float high) {
        return pack_f16(low, high);
    }
    static DEVICE void mma(float* d, const uint32* a, const uint32* b) {
        mma_f16(d, a, b);
    }
};
struct Bfloat16Instructions {
    using Operand = bfloat16;
    static DEVICE uint32 pack(float low, float high) {
        return pack_bf16(low, high);
    }
    static DEVICE void mma(float* d, const uint32* a, const uint32* b) {
        mma_bf16(d, a, b);
    }
};

template <class Instructions>
struct Mma16 : Fragments16<1>, Instructions {
    using Real = float;
    using Factor = One;
    static constexpr int STEPS = 1;

    static DEVICE Scale<One> scale_of(float) {
        return {};
    }
    static DEVICE float at_most_1(float p) {
        return p;
    }
    static DEVICE A to_a(const Accumulator<float>& acc, One) {
        A a;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* const pair = &acc.value[i / 2][i % 2 * 2];
            a.part[0][i] = Instructions::pack(pair[0], pair[1]);
        }
        return a;
    }
    template <int N>
    static DEVICE void multiply(Accumulator<float>& acc, const A (&a)[N], const B (&b)[N], One) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            Instructions::mma(acc.value[0], a[i].part[0], b[i].part[0]);
            Instructions::mma(acc.value[1], a[i].part[0], b[i].part[0] + 2);
        }
    }
};

template <>
struct Mma<float16> : Mma16<Float16Instructions> {};

template <>
struct Mma<bfloat16> : Mma16<Bfloat16Instructions> {};

// float32 and TF32: products of parts
//
// The tensor cores cut off what they add instead of rounding it, which over a long sum would be a
// bias far above float32's errors. So they add up the terms of a few blocks, and ordinary additions
// do the rest. Of two parts, big big, small big and big small are multiplied; small small is below
// the rounding.

template <class OperandType>
struct MmaSplit : Fragments16<PARTS<OperandType>> {
    using Operand = OperandType;
    using Real = float;
    using Factor = float;
    using typename Fragments16<PARTS<OperandType>>::A;
    using typename Fragments16<PARTS<OperandType>>::B;
    static constexpr int COUNT = PARTS<OperandType>;
    static constexpr int STEPS = 2;

    static DEVICE Scale<float> scale_of(float largest) {
        return split_scale(largest);
    }
    // Above 4 the scaled weight would be beyond float16.
    static DEVICE float at_most_1(float p) {
        return min_or_nan(p, 1);
    }

    static DEVICE A to_a(const Accumulator<float>& acc, float factor) {
        A a;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* const pair = &acc.value[i / 2][i % 2 * 2];
            uint32 part[COUNT];
            split_pair(pair[0] * factor, pair[1] * factor, part);
#pragma unroll
            for (int j = 0; j < COUNT; ++j) a.part[j][i] = part[j];
        }
        return a;
    }
    template <int N>
    static DEVICE void multiply(Accumulator<float>& acc, const A (&a)[N], const B (&b)[N],
                                float scale) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float big[4] = {0, 0, 0, 0}, small[4] = {0, 0, 0, 0};
#pragma unroll
            for (int i = 0; i < N; ++i) {
                mma_f16(big, a[i].part[0], b[i].part[0] + 2 * h);
                if constexpr (COUNT == 2) {
                    mma_f16(small, a[i].part[1], b[i].part[0] + 2 * h);
                    mma_f16(small, a[i].part[0], b[i].part[1] + 2 * h);
                }
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                acc.value[h][e] += scale * (big[e] + small[e] * (1 / SMALL_FACTOR));
            }
        }
    }
};

template <>
struct Mma<float> : MmaSplit<SplitFloat> {};

template <>
struct Mma<tensorfloat32> : MmaSplit<RoundedFloat> {};

// ---------------------------------------------------------------------------------------------
// float64: sums in double

template <>
struct Mma<double> {
    using Operand = double;
    using Real = double;
    using Factor = One;
    static constexpr int STEPS = 1;
    struct A {
        double x[8];
    };
    struct B {
        double x[2][4];
    };
    struct alignas(16) Pair {
        double x, y;
    };

    // load_a and load_b_transposed read two 16-byte chunks a lane, chunks t * 2 and t * 2 + 1 of
    // the eight in the block's row: with an odd number of chunks from row to row, eight lanes at
    // a time meet no bank twice.
    template <class Tile>
    static DEVICE A load_a(Tile tile, int m, int k) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        A a;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Pair pair = load_shared<Pair>(tile.at(m + g + 8 * half, k + 4 * t + 2 * i));
                a.x[4 * i + half] = pair.x;
                a.x[4 * i + 2 + half] = pair.y;
            }
        }
        return a;
    }
    template <class Tile>
    static DEVICE B load_b_transposed(Tile tile, int k, int n) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        B b;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const Pair pair = load_shared<Pair>(tile.at(n + g + 8 * h, k + 4 * t + 2 * i));
                b.x[h][2 * i] = pair.x;
                b.x[h][2 * i + 1] = pair.y;
            }
        }
        return b;
    }
    // An accumulator's lane holds columns 2t and 2t + 1 of each half, so the k that the instruction
    // calls t and t + 4 are 2t and 2t + 1 here.
    template <class Tile>
    static DEVICE A reload_a(Tile tile, int m, int k) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        A a;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i % 2;
            const Pair pair =
                load_shared<Pair>(tile.at(m + g + 8 * half, k + 8 * (i / 2) + 2 * t));
            a.x[4 * (i / 2) + half] = pair.x;
            a.x[4 * (i / 2) + half + 2] = pair.y;
        }
        return a;
    }
    template <class Tile>
    static DEVICE A load_a_transposed(Tile tile, int m, int k) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        A a;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = 8 * (i / 4) + 2 * t + i / 2 % 2;
            a.x[i] = load_shared<double>(tile.at(k + row, m + g + 8 * (i % 2)));
        }
        return a;
    }
    template <class Tile>
    static DEVICE B load_b(Tile tile, int k, int n) {
        const int g = lane_index() / 4, t = lane_index() % 4;
        B b;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 8 * (i / 2) + 2 * t + i % 2;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                b.x[h][i] = load_shared<double>(tile.at(k + row, n + g + 8 * h));
            }
        }
        return b;
    }
    static DEVICE Scale<One> scale_of(double) {
        return {};
    }
    static DEVICE double at_most_1(double p) {
        return p;
    }
    static DEVICE A to_a(const Accumulator<double>& acc, One) {
        A a;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            a.x[4 * i + 0] = acc.value[i][0];
            a.x[4 * i + 1] = acc.value[i][2];
            a.x[4 * i + 2] = acc.value[i][1];
            a.x[4 * i + 3] = acc.value[i][3];
        }
        return a;
    }
    template <int N>
    static DEVICE void multiply(Accumulator<double>& acc, const A (&a)[N], const B (&b)[N], One) {
#pragma unroll
        for (int i = 0; i < N; ++i) {
            mma_f64(acc.value[0], a[i].x, b[i].x[0]);
            mma_f64(acc.value[1], a[i].x, b[i].x[1]);
        }
    }
};

// As many products of 16 as M takes at a time of `blocks` in all.
template <class M>
DEVICE constexpr int steps_of(int blocks) {
    return blocks % M::STEPS == 0 ? M::STEPS : 1;
}
