// dq_sum: where the blocks of attention_backward add up dQ, in device memory.
//
// Its 16 x 16 blocks lie as the lanes of a warp hold an accumulator, so that one instruction of a
// warp adds to consecutive memory. Of a head, row blocks of 16 * dq_sum.row elements follow each
// other (rows filled up to a multiple of 16), and in one the blocks of 16 columns.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "mma.cuh"

constexpr int SUM_BLOCK = 16 * 16;

DEVICE void add_block(float* block, const Accumulator<float>& acc) {
#pragma unroll
    for (int x = 0; x < 8; x += ADD_WIDTH) {
        add_global<ADD_WIDTH>(block + x * WARP + lane_index() * ADD_WIDTH,
                              &acc.value[x / 4][x % 4]);
    }
}

DEVICE void add_block(double* block, const Accumulator<double>& acc) {
#pragma unroll
    for (int x = 0; x < 8; ++x) {
        add_global(block + x * WARP + lane_index(), acc.value[x / 4][x % 4]);
    }
}

template <class Real>
DEVICE Accumulator<Real> load_block(const Real* block) {
    constexpr int WIDTH = sizeof(Real) == sizeof(float) ? ADD_WIDTH : 1;
    Accumulator<Real> acc;
#pragma unroll
    for (int x = 0; x < 8; ++x) {
        acc.value[x / 4][x % 4] =
            block[x / WIDTH * WIDTH * WARP + lane_index() * WIDTH + x % WIDTH];
    }
    return acc;
}
