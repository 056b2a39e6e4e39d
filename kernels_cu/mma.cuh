// Matrix products of a warp, in blocks of 16 x 16 x 16 for every element type.
//
// Mma<T> multiplies fragments: acc (16 x 16) += a (16 x 16) b (16 x 16), with
//   load_a(tile, m, k)             a[i][j] = tile[m + i][k + j]
//   load_a_transposed(tile, m, k)  a[i][j] = tile[k + j][m + i]
//   load_b(tile, k, n)             b[i][j] = tile[k + i][n + j]
//   load_b_transposed(tile, k, n)  b[i][j] = tile[n + j][k + i]
//   to_a(acc)                      a[i][j] = acc[i][j], within a thread's own registers
//   reload_a(tile, m, k)           a[i][j] = tile[m + i][k + j], as to_a of what was stored there
// A product sums over k in any order, as long as both operands agree. For 32- and 64-bit elements
// two orders are used, each where it costs nothing: load_a goes with load_b_transposed; to_a,
// reload_a and load_a_transposed go with load_b. For 16-bit elements all are the natural order.
//
// Lane 4g + t of a warp holds of a block what is written at Accumulator (g = lane / 4).
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "tile.cuh"

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
// float16 and bfloat16: m16n8k16, sums in float

template <class T>
struct Mma16 {
    using Real = float;
    struct A {
        uint32 bits[4];
    };
    struct B {
        uint32 bits[4];  // columns 0..7: [0], [1]; columns 8..15: [2], [3]
    };

    // ldmatrix takes a row address from every lane: lanes 0..7 the rows of the first 8 x 8 matrix,
    // and so on. The four matrices are the quarters of the block in the order of the registers.
    template <class Tile>
    static DEVICE A load_a(Tile tile, int m, int k) {
        const int lane = lane_index();
        A a;
        load_matrix_x4(a.bits, tile.at(m + lane % 16, k + lane / 16 * 8));
        return a;
    }
    template <class Tile>
    static DEVICE A reload_a(Tile tile, int m, int k) {
        return load_a(tile, m, k);
    }
    template <class Tile>
    static DEVICE A load_a_transposed(Tile tile, int m, int k) {
        const int lane = lane_index();
        A a;
        load_matrix_transposed_x4(a.bits,
                                  tile.at(k + lane % 8 + lane / 16 * 8, m + lane / 8 % 2 * 8));
        return a;
    }
    template <class Tile>
    static DEVICE B load_b(Tile tile, int k, int n) {
        const int lane = lane_index();
        B b;
        load_matrix_transposed_x4(b.bits, tile.at(k + lane % 16, n + lane / 16 * 8));
        return b;
    }
    template <class Tile>
    static DEVICE B load_b_transposed(Tile tile, int k, int n) {
        const int lane = lane_index();
        B b;
        load_matrix_x4(b.bits, tile.at(n + lane % 8 + lane / 16 * 8, k + lane / 8 % 2 * 8));
        return b;
    }
};

template <>
struct Mma<float16> : Mma16<float16> {
    static DEVICE A to_a(const Accumulator<float>& acc) {
        return {{pack_f16(acc.value[0][0], acc.value[0][1]),
                 pack_f16(acc.value[0][2], acc.value[0][3]),
                 pack_f16(acc.value[1][0], acc.value[1][1]),
                 pack_f16(acc.value[1][2], acc.value[1][3])}};
    }
    static DEVICE void multiply(Accumulator<float>& acc, const A& a, const B& b) {
        mma_f16(acc.value[0], a.bits, b.bits);
        mma_f16(acc.value[1], a.bits, b.bits + 2);
    }
};

template <>
struct Mma<bfloat16> : Mma16<bfloat16> {
    static DEVICE A to_a(const Accumulator<float>& acc) {
        return {{pack_bf16(acc.value[0][0], acc.value[0][1]),
                 pack_bf16(acc.value[0][2], acc.value[0][3]),
                 pack_bf16(acc.value[1][0], acc.value[1][1]),
                 pack_bf16(acc.value[1][2], acc.value[1][3])}};
    }
    static DEVICE void multiply(Accumulator<float>& acc, const A& a, const B& b) {
        mma_bf16(acc.value[0], a.bits, b.bits);
        mma_bf16(acc.value[1], a.bits, b.bits + 2);
    }
};

// ---------------------------------------------------------------------------------------------
// 32- and 64-bit elements: eight scalars a lane. Scalars [4i + 0..3] of a and [h][2i], [h][2i + 1]
// of b belong to the i-th half of k (for mma_tf32 one instruction each).

// Fragments of T gathered by plain loads, in the order of k that to_a gives: an accumulator's lane
// holds columns 2t and 2t + 1 of each half, so the k that an instruction calls t and t + 4 are
// 2t and 2t + 1 here.
template <class T>
struct AccumulatorOrder {
    static DEVICE void to_a(T (&a)[8], const Accumulator<T>& acc) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            a[4 * i + 0] = acc.value[i][0];
            a[4 * i + 1] = acc.value[i][2];
            a[4 * i + 2] = acc.value[i][1];
            a[4 * i + 3] = acc.value[i][3];
        }
    }
    template <class Tile>
    static DEVICE void reload_a(T (&a)[8], Tile tile, int m, int k) {
        struct alignas(2 * sizeof(T)) Pair {
            T x, y;
        };
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int half = i % 2;
            const Pair pair =
                load_shared<Pair>(tile.at(m + g + 8 * half, k + 8 * (i / 2) + 2 * t));
            a[4 * (i / 2) + half] = pair.x;
            a[4 * (i / 2) + half + 2] = pair.y;
        }
    }
    template <class Tile>
    static DEVICE void load_a_transposed(T (&a)[8], Tile tile, int m, int k) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = 8 * (i / 4) + 2 * t + i / 2 % 2;
            a[i] = load_shared<T>(tile.at(k + row, m + g + 8 * (i % 2)));
        }
    }
    template <class Tile>
    static DEVICE void load_b(T (&b)[2][4], Tile tile, int k, int n) {
        const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = 8 * (i / 2) + 2 * t + i % 2;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                b[h][i] = load_shared<T>(tile.at(k + row, n + g + 8 * h));
            }
        }
    }
};

// The other order for float: ldmatrix hands out 4-byte elements too, element t of row g.
struct MatrixOrder32 {
    template <class Tile>
    static DEVICE void load_a(float (&a)[8], Tile tile, int m, int k) {
        const int lane = lane_index();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32 bits[4];
            load_matrix_x4(bits, tile.at(m + lane % 16, k + 8 * i + lane / 16 * 4));
#pragma unroll
            for (int j = 0; j < 4; ++j) a[4 * i + j] = bit_cast<float>(bits[j]);
        }
    }
    template <class Tile>
    static DEVICE void load_b_transposed(float (&b)[2][4], Tile tile, int k, int n) {
        const int lane = lane_index();
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32 bits[4];
            load_matrix_x4(bits, tile.at(n + 8 * h + lane % 8, k + lane / 8 * 4));
#pragma unroll
            for (int j = 0; j < 4; ++j) b[h][j] = bit_cast<float>(bits[j]);
        }
    }
};

// The fragments of Fragments (A and B, each made from eight floats) from tiles of floats.
template <class Fragments>
struct Mma32 : Fragments {
    using Real = float;
    using typename Fragments::A;
    using typename Fragments::B;

    template <class Tile>
    static DEVICE A load_a(Tile tile, int m, int k) {
        float x[8];
        MatrixOrder32::load_a(x, tile, m, k);
        return A(x);
    }
    template <class Tile>
    static DEVICE A reload_a(Tile tile, int m, int k) {
        float x[8];
        AccumulatorOrder<float>::reload_a(x, tile, m, k);
        return A(x);
    }
    template <class Tile>
    static DEVICE A load_a_transposed(Tile tile, int m, int k) {
        float x[8];
        AccumulatorOrder<float>::load_a_transposed(x, tile, m, k);
        return A(x);
    }
    template <class Tile>
    static DEVICE B load_b(Tile tile, int k, int n) {
        float x[2][4];
        AccumulatorOrder<float>::load_b(x, tile, k, n);
        return B(x);
    }
    template <class Tile>
    static DEVICE B load_b_transposed(Tile tile, int k, int n) {
        float x[2][4];
        MatrixOrder32::load_b_transposed(x, tile, k, n);
        return B(x);
    }
    static DEVICE A to_a(const Accumulator<float>& acc) {
        float x[8];
        AccumulatorOrder<float>::to_a(x, acc);
        return A(x);
    }
};

// float32 with one product of operands rounded to TF32.
struct FragmentsTf32 {
    struct A {
        uint32 bits[8];
        A() = default;
        DEVICE explicit A(const float (&x)[8]) {
#pragma unroll
            for (int i = 0; i < 8; ++i) bits[i] = round_to_tf32(x[i]);
        }
    };
    struct B {
        uint32 bits[2][4];
        B() = default;
        DEVICE explicit B(const float (&x)[2][4]) {
#pragma unroll
            for (int i = 0; i < 8; ++i) bits[i / 4][i % 4] = round_to_tf32(x[i / 4][i % 4]);
        }
    };
};

template <>
struct Mma<tensorfloat32> : Mma32<FragmentsTf32> {
    static DEVICE void multiply(Accumulator<float>& acc, const A& a, const B& b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            mma_tf32(acc.value[h], a.bits, b.bits[h]);
            mma_tf32(acc.value[h], a.bits + 4, b.bits[h] + 2);
        }
    }
};

// float32 to float32 accuracy: x = big + small, two TF32 numbers, and of the four products all but
// small * small, which is below float32's rounding. A NaN or infinite x has small = NaN.
struct FragmentsSplit {
    static DEVICE void split(float x, uint32& big, uint32& small) {
        big = (bit_cast<uint32>(x) + 0x1000) & 0xffffe000;  // the nearest TF32 number
        small = bit_cast<uint32>(x - bit_cast<float>(big));
    }

    struct A {
        uint32 big[8], small[8];
        A() = default;
        DEVICE explicit A(const float (&x)[8]) {
#pragma unroll
            for (int i = 0; i < 8; ++i) split(x[i], big[i], small[i]);
        }
    };
    struct B {
        uint32 big[2][4], small[2][4];
        B() = default;
        DEVICE explicit B(const float (&x)[2][4]) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
#pragma unroll
                for (int i = 0; i < 4; ++i) split(x[h][i], big[h][i], small[h][i]);
            }
        }
    };
};

template <>
struct Mma<float> : Mma32<FragmentsSplit> {
    // The tensor cores cut off what they add instead of rounding it, which over a long sum would
    // be a bias far above float32's errors. So they add up 16 terms only, small ones first, and
    // ordinary additions do the rest.
    static DEVICE void multiply(Accumulator<float>& acc, const A& a, const B& b) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float sum[4] = {0, 0, 0, 0};
            mma_tf32(sum, a.small, b.big[h]);
            mma_tf32(sum, a.small + 4, b.big[h] + 2);
            mma_tf32(sum, a.big, b.small[h]);
            mma_tf32(sum, a.big + 4, b.small[h] + 2);
            mma_tf32(sum, a.big, b.big[h]);
            mma_tf32(sum, a.big + 4, b.big[h] + 2);
#pragma unroll
            for (int e = 0; e < 4; ++e) acc.value[h][e] += sum[e];
        }
    }
};

// ---------------------------------------------------------------------------------------------
// float64: sums in double

template <>
struct Mma<double> {
    using Real = double;
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
    template <class Tile>
    static DEVICE A reload_a(Tile tile, int m, int k) {
        A a;
        AccumulatorOrder<double>::reload_a(a.x, tile, m, k);
        return a;
    }
    template <class Tile>
    static DEVICE A load_a_transposed(Tile tile, int m, int k) {
        A a;
        AccumulatorOrder<double>::load_a_transposed(a.x, tile, m, k);
        return a;
    }
    template <class Tile>
    static DEVICE B load_b(Tile tile, int k, int n) {
        B b;
        AccumulatorOrder<double>::load_b(b.x, tile, k, n);
        return b;
    }
    static DEVICE A to_a(const Accumulator<double>& acc) {
        A a;
        AccumulatorOrder<double>::to_a(a.x, acc);
        return a;
    }
    static DEVICE void multiply(Accumulator<double>& acc, const A& a, const B& b) {
        mma_f64(acc.value[0], a.x, b.x[0]);
        mma_f64(acc.value[1], a.x, b.x[1]);
    }
};
