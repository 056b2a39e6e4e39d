// What the backward pass wants to know of every row of o:
//
//   D_i = sum_d dO_id O_id - dlse_i, and lse_i in base 2
//
// and, on the way, zeros in dq_sum.
#include "types.cuh"
#include "params.cuh"
#include "row_dots.cuh"

// One row of the plan table in flash_cupy/cuda/plan.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;  // rows of a block
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;
    static constexpr int WARPS = PLAN_WARPS;
    static constexpr int ACCESS_BYTES = PLAN_ACCESS_BYTES;

    static constexpr int THREADS = WARPS * WARP;
};

// A row's share of dq_sum, whose last rows fill up a block of 16.
template <class Dots>
DEVICE void clear_dq_sum(const AttentionParams& params, const HeadIndex& index, int32 row) {
    using Real = typename Dots::Real;
    if (params.dq_sum.data == nullptr || row >= ceil_div(params.seqlen_q, 16) * 16) return;
    Chunk* const chunks =
        reinterpret_cast<Chunk*>(Dots::template row_data<Real>(params.dq_sum, index, row));
    const int32 count = static_cast<int32>(params.dq_sum.row * sizeof(Real)) / CHUNK_BYTES;
    for (int32 i = Dots::lane(); i < count; i += Dots::LANES) chunks[i] = Chunk{};
}

// One block for every TILE_M rows of every head.
extern "C" __global__ void __launch_bounds__(Config::THREADS)
    row_dots(const __grid_constant__ AttentionParams params) {
    using Dots = RowDots<Config::Element, Config::HEAD_DIM_V, Config::ACCESS_BYTES>;
    const uint32 row_tiles = ceil_div(params.seqlen_q, Config::TILE_M);
    const HeadIndex index(params, blockIdx.x / row_tiles, params.heads);
    const int32 first_row = blockIdx.x % row_tiles * Config::TILE_M;
#pragma unroll 1
    for (int i = threadIdx.x / Dots::LANES; i < Config::TILE_M;
         i += Config::THREADS / Dots::LANES) {
        const int32 row = first_row + i;
        clear_dq_sum<Dots>(params, index, row);
        const auto terms = Dots::terms(params, index, row);
        if (row < params.seqlen_q && Dots::lane() == 0) {
            using Terms = RowTerms<Dots::Real>;
            *reinterpret_cast<Terms*>(
                Dots::row_data<Dots::Real>(params.row_dots, index, row)) = terms;
        }
    }
}
