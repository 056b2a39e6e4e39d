// What hopper_backward wants to know of every row of o: D_i and lse_i, as row_dots computes them,
// of two rows side by side; and zeros in dq_sum, dq_turns and dq_counts, if there are any.
#include "types.cuh"
#include "params.cuh"
#include "row_dots.cuh"

// One row of the table in flash_cupy/cuda/hopper_backward.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;  // rows of a block
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;
    static constexpr int WARPS = PLAN_WARPS;
    static constexpr int CONSUMERS = PLAN_CONSUMERS;  // of hopper_backward
    static constexpr int ACCESS_BYTES = PLAN_ACCESS_BYTES;

    static constexpr int THREADS = WARPS * WARP;
};

using Dots = RowDots<Config>;

// Those of the `head`-th of all heads: some are more than dq_sum has a place for, or key heads.
DEVICE void clear_sums(const AttentionParams& params, uint32 head, int32 tile) {
    if (head < params.dq_heads * params.group) {
        Chunk* const chunks = reinterpret_cast<Chunk*>(
            static_cast<float*>(params.dq_sum.data) + head * params.dq_sum.head +
            tile * Config::TILE_M * params.dq_sum.row);
        const int32 count = Config::TILE_M * static_cast<int32>(params.dq_sum.row) / 4;
#pragma unroll 4
        for (int32 i = threadIdx.x; i < count; i += Config::THREADS) chunks[i] = Chunk{};
    }
    if (tile == 0 && threadIdx.x < 2 && head < params.dq_counts.row) {
        int32* const counts = static_cast<int32*>(params.dq_counts.data);
        counts[head + threadIdx.x * params.dq_counts.row] = 0;
    }
}
DEVICE void clear_turns(const AttentionParams& params, const HeadIndex& index, int32 tile) {
    if (threadIdx.x < Config::CONSUMERS) {
        Dots::row_data<int32>(params.dq_turns, index, tile)[threadIdx.x] = 0;
    }
}

// One block for every TILE_M rows of every head.
extern "C" __global__ void __launch_bounds__(Config::THREADS)
    hopper_row_dots(const __grid_constant__ AttentionParams params) {
    const uint32 tiles = ceil_div(params.seqlen_q, Config::TILE_M);
    const HeadIndex index(params, blockIdx.x / tiles, params.heads);
    const int32 tile = blockIdx.x % tiles;
    RowTermsPair<float>* const pairs = reinterpret_cast<RowTermsPair<float>*>(
        Dots::row_data<float>(params.row_dots, index, tile * Config::TILE_M));
    // All lanes go on to the end, as rows are summed up by shuffles.
#pragma unroll 1
    for (int first = 0; first < Config::TILE_M; first += Dots::ROWS) {
        const int i = first + threadIdx.x / Dots::LANES;
        const auto terms = Dots::terms(params, index, tile * Config::TILE_M + i);
        if (Dots::is_first_lane() && i < Config::TILE_M) {
            pairs[i / 2].lse[i % 2] = terms.lse;
            pairs[i / 2].dot[i % 2] = terms.dot;
        }
    }
    if (params.dq_sum.data != nullptr) clear_sums(params, blockIdx.x / tiles, tile);
    if (params.dq_turns.data != nullptr) clear_turns(params, index, tile);
}
