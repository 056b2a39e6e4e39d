// dq = scale * dq_sum, rounded to dq's type: the end of attention_backward.
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "tile.cuh"
#include "mma.cuh"
#include "product.cuh"
#include "dq_sum.cuh"

// One row of the plan table in flash_cupy/cuda/plan.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;      // rows of a block
    static constexpr int HEAD_DIM = PLAN_HEAD_DIM;  // of dq_sum
    static constexpr int WARPS = PLAN_WARPS;
    static constexpr int ACCESS_BYTES = PLAN_ACCESS_BYTES;  // what divides all rows' addresses
    static constexpr bool SOFTCAP = PLAN_SOFTCAP;

    static constexpr int THREADS = WARPS * WARP;
};

// One block for every TILE_M rows of every head.
extern "C" __global__ void __launch_bounds__(Config::THREADS)
    store_dq(const __grid_constant__ AttentionParams params) {
    using T = Config::Element;
    using Real = Mma<T>::Real;
    constexpr int ROW_BLOCKS = Config::TILE_M / 16, COL_BLOCKS = Config::HEAD_DIM / 16;
    const uint32 row_tiles = ceil_div(params.seqlen_q, Config::TILE_M);
    const HeadIndex index(params, blockIdx.x / row_tiles, params.heads);
    const int32 first_row = blockIdx.x % row_tiles * Config::TILE_M;
    const Real scale = Config::SOFTCAP ? 1 : scalars<Real>(params).scale;

    const SharedTile<T, Config::TILE_M, Config::HEAD_DIM> tile{
        shared_address(dynamic_shared_memory())};
    const Real* const sum = head_data<const Real>(params.dq_sum, index, index.head);
#pragma unroll
    for (int block = threadIdx.x / WARP; block < ROW_BLOCKS * COL_BLOCKS; block += Config::WARPS) {
        const int row = block / COL_BLOCKS * 16, col = block % COL_BLOCKS * 16;
        if (first_row + row < params.seqlen_q) {
            const Accumulator<Real> acc[1][1] = {
                {load_block(sum + (first_row + row) * params.dq_sum.row + col * 16)}};
            store_accumulators(tile, row, col, acc, scale);
        }
    }
    __syncthreads();
    copy_to_global<Config::THREADS, Config::ACCESS_BYTES>(
        tile, head_data<T>(params.dq, index, index.head) + first_row * params.dq.row,
        params.dq.row, params.seqlen_q - first_row, params.head_dim);
}
