// Rows of tensors in the registers of a warp: what Hopper's kernels compute with, pair by pair of
// rows, where products of tiles would be spoilt (see nonfinite.cuh). Slow, and rare.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "mma.cuh"

// A row of up to DIMS elements of T in a warp's registers: of every 32 dims a lane has one, zeros
// beyond the row's end.
template <class T, int DIMS>
struct LaneRow {
    static constexpr int VALUES = DIMS / WARP;
    static_assert(DIMS % WARP == 0);

    float value[VALUES] = {};

    static DEVICE int dim(int i) {
        return lane_index() + WARP * i;
    }
    DEVICE void load(const T* row, int32 dims) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) value[i] = dim(i) < dims ? to_float(row[dim(i)]) : 0;
    }
    DEVICE void store(T* row, int32 dims, float scale) const {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) {
            if (dim(i) < dims) row[dim(i)].bits = Mma<T>::pack(value[i] * scale, 0);
        }
    }
    DEVICE void add(float weight, const LaneRow& row) {
#pragma unroll
        for (int i = 0; i < VALUES; ++i) value[i] += weight * row.value[i];
    }
    // Whether nothing that is added changes it any more.
    DEVICE bool all_nan() const {
        bool all = true;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) all = all && value[i] != value[i];
        return __all_sync(0xffffffff, all);
    }
    // The sum of products with another row, in all lanes.
    DEVICE float dot(const LaneRow& row) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < VALUES; ++i) sum += value[i] * row.value[i];
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(0xffffffff, sum, step);
        }
        return sum;
    }
};
