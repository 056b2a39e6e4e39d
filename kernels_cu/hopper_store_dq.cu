// dq = scale * dq_sum, rounded to dq's type: the end of hopper_backward.
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "tile.cuh"
#include "mma.cuh"
#include "warpgroup.cuh"
#include "hopper_tile.cuh"
#include "hopper_dq_sum.cuh"

// One row of the table in flash_cupy/cuda/hopper_backward.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;       // rows of a block
    static constexpr int HEAD_DIM = PLAN_HEAD_DIM;   // of dq_sum
    static constexpr int DQ_PARTS = PLAN_WARPS / 4;  // of a tile, a warpgroup each
    static constexpr int ACCESS_BYTES = PLAN_ACCESS_BYTES;  // what divides all rows' addresses
    static constexpr bool SOFTCAP = PLAN_SOFTCAP;

    static constexpr int THREADS = DQ_PARTS * WARPGROUP;
};

// One block for every tile of every head.
extern "C" __global__ void __launch_bounds__(Config::THREADS)
    hopper_store_dq(const __grid_constant__ AttentionParams params) {
    using T = Config::Element;
    using Dq = DqTile<Config::TILE_M, Config::DQ_PARTS, Config::HEAD_DIM>;
    const uint32 tiles = ceil_div(params.seqlen_q, Config::TILE_M);
    const HeadIndex index(params, blockIdx.x / tiles, params.heads);
    const int32 first_row = blockIdx.x % tiles * Config::TILE_M;
    const float scale = Config::SOFTCAP ? 1 : scalars<float>(params).scale;

    const SharedTile<T, Config::TILE_M, Dq::ROW> tile{shared_address(dynamic_shared_memory())};
    const int part = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP;
    const int lane = lane_index();
    const float* const sums = head_data<const float>(params.dq_sum, index, index.head) +
                              first_row * params.dq_sum.row + part * Dq::PART;
    const uint32 row = tile.at(Dq::first_query(part) + lane / 16 * 8 + lane % 8,
                               Dq::first_dim(part) + thread / WARP * 16 + lane / 8 % 2 * 8);
    Dq::template store_rounded<T, tile.ROW_BYTES>(row, scale, [&](int i) {
        return *reinterpret_cast<const Dq::Four*>(sums + Dq::at(thread, i));
    });
    __syncthreads();
    copy_to_global<Config::THREADS, Config::ACCESS_BYTES>(
        tile, head_data<T>(params.dq, index, index.head) + first_row * params.dq.row,
        params.dq.row, params.seqlen_q - first_row, params.head_dim);
}
