// What the backward pass wants to know of every row of o:
//
//   D_i = sum_d dO_id O_id - dlse_i, and lse_i in base 2
//
// and, on the way, zeros in dq_sum. A few lanes of a warp share a row; every element is read once.
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "tile.cuh"
#include "mma.cuh"
#include "row_terms.cuh"

// One row of the plan table in flash_cupy/cuda/plan.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;  // rows of a block
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;
    static constexpr int WARPS = PLAN_WARPS;
    static constexpr int ACCESS_BYTES = PLAN_ACCESS_BYTES;

    static constexpr int THREADS = WARPS * WARP;
};

DEVICE float to_real(float16 x) {
    return to_float(x);
}
DEVICE float to_real(bfloat16 x) {
    return to_float(x);
}
DEVICE float to_real(tensorfloat32 x) {
    return x.value;
}
DEVICE float to_real(float x) {
    return x;
}
DEVICE double to_real(double x) {
    return x;
}

template <class Config>
struct RowDots {
    using T = typename Config::Element;
    using Real = typename Mma<T>::Real;
    static constexpr int ELEMENTS = Config::ACCESS_BYTES / sizeof(T);  // of one access
    static constexpr int UNITS = Config::HEAD_DIM_V / ELEMENTS;        // of one row
    static constexpr int LANES = largest_divisor(UNITS, WARP);         // of one row
    static constexpr int ROWS = Config::THREADS / LANES;               // of a step

    // Consecutive elements, loaded by one instruction.
    struct alignas(Config::ACCESS_BYTES) Unit {
        T element[ELEMENTS];
    };

    static DEVICE Real dot(const T* o, const T* do_, int cols) {
        const int lane = threadIdx.x % LANES;
        Real sum = 0;
#pragma unroll
        for (int unit = lane; unit < UNITS; unit += LANES) {
            const int col = unit * ELEMENTS;
            if (col >= cols) break;
            const Unit a = *reinterpret_cast<const Unit*>(o + col);
            const Unit b = *reinterpret_cast<const Unit*>(do_ + col);
#pragma unroll
            for (int i = 0; i < ELEMENTS; ++i) {
                sum += to_real(a.element[i]) * to_real(b.element[i]);
            }
        }
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(0xffffffff, sum, step);
        }
        return sum;
    }

    static DEVICE void store_terms(const AttentionParams& params, const HeadIndex& index,
                                   int32 row) {
        const bool exists = row < params.seqlen_q;
        const Real sum = dot(row_data<const T>(params.o, index, row),
                             row_data<const T>(params.do_, index, row),
                             exists ? params.head_dim_v : 0);
        if (!exists || threadIdx.x % LANES != 0) return;
        const Real lse = *row_data<const Real>(params.lse, index, row);
        const Real dlse =
            params.dlse.data == nullptr ? 0 : *row_data<const Real>(params.dlse, index, row);
        *reinterpret_cast<RowTerms<Real>*>(row_data<Real>(params.row_dots, index, row)) = {
            lse == -infinity<Real>() ? 0 : lse * static_cast<Real>(LOG2_E), sum - dlse};
    }

    // A row's share of dq_sum, whose last rows fill up a block of 16.
    static DEVICE void clear_dq_sum(const AttentionParams& params, const HeadIndex& index,
                                    int32 row) {
        if (params.dq_sum.data == nullptr || row >= ceil_div(params.seqlen_q, 16) * 16) return;
        Chunk* const chunks = reinterpret_cast<Chunk*>(row_data<Real>(params.dq_sum, index, row));
        const int32 count = static_cast<int32>(params.dq_sum.row * sizeof(Real)) / CHUNK_BYTES;
        for (int32 i = threadIdx.x % LANES; i < count; i += LANES) chunks[i] = Chunk{};
    }

private:
    template <class Element>
    static DEVICE Element* row_data(const Tensor& tensor, const HeadIndex& index, int32 row) {
        return head_data<Element>(tensor, index, index.head) + row * tensor.row;
    }
};

// One block for every TILE_M rows of every head.
extern "C" __global__ void __launch_bounds__(Config::THREADS)
    row_dots(const __grid_constant__ AttentionParams params) {
    using Dots = RowDots<Config>;
    const uint32 row_tiles = ceil_div(params.seqlen_q, Config::TILE_M);
    const HeadIndex index(params, blockIdx.x / row_tiles, params.heads);
    const int32 first_row = blockIdx.x % row_tiles * Config::TILE_M;
#pragma unroll 1
    for (int i = threadIdx.x / Dots::LANES; i < Config::TILE_M; i += Dots::ROWS) {
        Dots::clear_dq_sum(params, index, first_row + i);
        Dots::store_terms(params, index, first_row + i);
    }
}
