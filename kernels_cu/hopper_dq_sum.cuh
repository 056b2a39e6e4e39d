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
    static DEVICE int at(int thread, int i) {
        return (i * WARPGROUP + thread) * 4;
    }
};
