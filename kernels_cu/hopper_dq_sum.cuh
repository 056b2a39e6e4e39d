// dq_sum as the Hopper kernels lay it out: where the blocks of hopper_backward add up dQ, in device
// memory, or, of a whole head, in their shared memory.
//
// Of a head, tiles of TILE_M rows of ROW floats follow each other (rows filled up to whole tiles).
// A tile consists of PARTS: 64 dims of all or some of the queries, as the threads of a warpgroup
// hold dQ^T: of every 8 queries, 4 floats of each thread after another.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "warpgroup.cuh"

// Two neighbours of a row, rounded to T, `low` in the lower half.
template <class T>
DEVICE uint32 pack(float low, float high);
template <>
DEVICE uint32 pack<float16>(float low, float high) {
    return pack_f16(low, high);
}
template <>
DEVICE uint32 pack<bfloat16>(float low, float high) {
    return pack_bf16(low, high);
}

template <int TILE_M, int PARTS, int HEAD_DIM>
struct DqTile {
    static constexpr int DIM_PARTS = (HEAD_DIM + 63) / 64;
    static constexpr int ROW = 64 * DIM_PARTS;
    static constexpr int QUERIES = TILE_M * DIM_PARTS / PARTS;  // of a part
    static constexpr int PART = 64 * QUERIES;                   // floats
    static_assert(PARTS % DIM_PARTS == 0 && QUERIES % 16 == 0, "the parts are a grid");

    static DEVICE int first_dim(int part) {
        return part % DIM_PARTS * 64;
    }
    static DEVICE int first_query(int part) {
        return part / DIM_PARTS * QUERIES;
    }
    // Where a thread of the warpgroup has its four floats of queries 8i..8i + 7 in the part.
    struct alignas(16) Four {
        float value[4];
    };
    static DEVICE int at(int thread, int i) {
        return (i * WARPGROUP + thread) * 4;
    }
    // And where in the part one of its dims of one of its queries stands: a thread's four are two
    // queries of a dim, and of the dim 8 after it.
    static DEVICE int place(int dim, int query) {
        const int thread = dim / 16 * WARP + dim % 8 * 4 + query % 8 / 2;
        return at(thread, query / 8) + dim / 8 % 2 * 2 + query % 2;
    }

    // A part scaled and rounded to T, to rows of shared memory, one for each query: `row` is the
    // address in them that the lane gives to store_matrix_transposed_x4; load(i) returns the
    // thread's Four.
    template <class T, int ROW_BYTES, class Load>
    static DEVICE void store_rounded(uint32 row, float scale, Load load) {
#pragma unroll
        for (int i = 0; i < QUERIES / 8; i += 2) {
            uint32 dq[2][2];  // of 8 queries each, dims g and g + 8 of the warp
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const Four four = load(i + j);
                dq[j][0] = pack<T>(four.value[0] * scale, four.value[1] * scale);
                dq[j][1] = pack<T>(four.value[2] * scale, four.value[3] * scale);
            }
            store_matrix_transposed_x4(row + i * 8 * ROW_BYTES, dq[0][0], dq[0][1], dq[1][0],
                                       dq[1][1]);
        }
    }
};
