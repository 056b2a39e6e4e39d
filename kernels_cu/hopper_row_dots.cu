// What hopper_backward wants to know of every row of o: D_i and lse_i, of two rows side by side;
// and zeros in dq_sum, dq_turns and dq_counts, if there are any.
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

// Some rows that a warp takes together: it loads all of them before it adds up the first.
template <class Config>
struct RowDotsRun {
    using T = typename Config::Element;
    using Dots = RowDots<T, Config::HEAD_DIM_V, Config::ACCESS_BYTES>;
    using Unit = typename Dots::Unit;
    using Pair = RowTermsPair<float>;
    static constexpr int LANE_UNITS = Dots::UNITS / Dots::LANES;  // of a row
    // Of rows side by side: 16 accesses of a lane, or fewer, so that every warp has rows.
    static constexpr int TILE_STEPS = Config::TILE_M / Dots::WARP_ROWS;
    static constexpr int MOST = 8 / LANE_UNITS, SHARE = TILE_STEPS / Config::WARPS;
    static constexpr int STEPS =
        largest_divisor(TILE_STEPS, floor_power_of_two(MOST < SHARE ? MOST : SHARE));
    static constexpr int ROWS = STEPS * Dots::WARP_ROWS;
    static constexpr int SHARERS = Dots::LANES / STEPS;  // lanes that get the sum of one row
    static_assert(Dots::LANES % STEPS == 0 && Config::TILE_M % ROWS == 0);

    // Where the rows of a query head begin.
    struct Head {
        const T *o, *do_;
        const float *lse, *dlse;
        Pair* pairs;

        DEVICE Head(const AttentionParams& params, const HeadIndex& index, float* pairs)
            : o(head_data<const T>(params.o, index, index.head)),
              do_(head_data<const T>(params.do_, index, index.head)),
              lse(head_data<const float>(params.lse, index, index.head)),
              dlse(head_data<const float>(params.dlse, index, index.head)),
              pairs(reinterpret_cast<Pair*>(pairs)) {}
    };

    Unit o[STEPS][LANE_UNITS], do_[STEPS][LANE_UNITS];
    float lse, dlse;

    // By a warp, the rows from `first` on. Without branches, which would keep loads from standing
    // side by side: in place of what does not exist something that does.
    DEVICE void load(const AttentionParams& params, const Head& head, int32 first) {
        const int32 last = params.seqlen_q - 1;
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int32 step_row = first + step * Dots::WARP_ROWS + lane_index() / Dots::LANES;
            const T* const o_row = head.o + min(step_row, last) * params.o.row;
            const T* const do_row = head.do_ + min(step_row, last) * params.do_.row;
#pragma unroll
            for (int i = 0; i < LANE_UNITS; ++i) {
                const int col = column(i) < params.head_dim_v ? column(i) : 0;
                o[step][i] = *reinterpret_cast<const Unit*>(o_row + col);
                do_[step][i] = *reinterpret_cast<const Unit*>(do_row + col);
            }
        }
        const int32 row = min(first + sum_row(), last);
        lse = head.lse[row * params.lse.row];
        dlse = params.dlse.data == nullptr ? 0 : head.dlse[row * params.dlse.row];
    }

    // Their terms, once they are there; those of a row that does not exist make P zero.
    DEVICE void store(const AttentionParams& params, const Head& head, int32 first) const {
        float sums[STEPS];
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            sums[step] = 0;
#pragma unroll
            for (int i = 0; i < LANE_UNITS; ++i) {
                float sum = 0;
                Dots::add_products(sum, o[step][i], do_[step][i]);
                sums[step] += column(i) < params.head_dim_v ? sum : 0;
            }
        }
        const float dot = add_lanes(sums) - dlse;
        const int32 row = first + sum_row();
        const bool exists = row < params.seqlen_q;
        if (lane_index() % SHARERS == 0) {
            Pair& pair = head.pairs[row / 2];
            pair.lse[row % 2] = exists ? Dots::to_log2(lse) : infinity<float>();
            pair.dot[row % 2] = exists ? dot : 0;
        }
    }

    static DEVICE int column(int i) {
        return (Dots::lane() + i * Dots::LANES) * Dots::ELEMENTS;
    }
    // The row of the run of which this lane gets the sum.
    static DEVICE int sum_row() {
        return Dots::lane() / SHARERS * Dots::WARP_ROWS + lane_index() / Dots::LANES;
    }
    // Adds up over the lanes of a row. While there are several sums, a lane gives half of them
    // away.
    static DEVICE float add_lanes(float (&sums)[STEPS]) {
        int count = STEPS;
#pragma unroll
        for (int step = Dots::LANES / 2; step > 0; step /= 2) {
            if (count == 1) {
                sums[0] += __shfl_xor_sync(0xffffffff, sums[0], step);
                continue;
            }
            count /= 2;
            const bool upper = Dots::lane() & step;
#pragma unroll
            for (int i = 0; i < STEPS / 2; ++i) {
                if (i >= count) break;
                const float given = upper ? sums[i] : sums[i + count];
                const float kept = upper ? sums[i + count] : sums[i];
                sums[i] = kept + __shfl_xor_sync(0xffffffff, given, step);
            }
        }
        return sums[0];
    }
};

using Run = RowDotsRun<Config>;

// A thread's part of `count` elements.
template <class Element>
DEVICE void clear(Element* data, int32 count) {
#pragma unroll 4
    for (int32 i = threadIdx.x; i < count; i += Config::THREADS) data[i] = Element{};
}

// Those of the `head`-th of all heads: some are more than dq_sum has a place for, or key heads.
DEVICE void clear_sums(const AttentionParams& params, uint32 head, int32 tile) {
    if (head < params.dq_heads * params.group) {
        float* const sums = static_cast<float*>(params.dq_sum.data) + head * params.dq_sum.head +
                            tile * Config::TILE_M * params.dq_sum.row;
        clear(reinterpret_cast<Chunk*>(sums),
              Config::TILE_M * static_cast<int32>(params.dq_sum.row) / 4);
    }
    if (tile == 0 && threadIdx.x < 2 && head < params.dq_counts.row) {
        int32* const counts = static_cast<int32*>(params.dq_counts.data);
        counts[head + threadIdx.x * params.dq_counts.row] = 0;
    }
}
DEVICE void clear_turns(const AttentionParams& params, uint32 head, int32 tile) {
    clear(static_cast<int32*>(params.dq_turns.data) + head * params.dq_turns.head +
              tile * params.dq_turns.row,
          Config::CONSUMERS);
}

// One block for every TILE_M rows of every head.
extern "C" __global__ void __launch_bounds__(Config::THREADS)
    hopper_row_dots(const __grid_constant__ AttentionParams params) {
    launch_dependents();
    const uint32 tiles = ceil_div(params.seqlen_q, Config::TILE_M);
    const uint32 number = blockIdx.x / tiles;  // of the head
    const int32 tile = blockIdx.x % tiles;
    const Run::Head head(
        params, HeadIndex(params, number, params.heads),
        static_cast<float*>(params.row_dots.data) + number * params.row_dots.head);
#pragma unroll 1
    for (int row = threadIdx.x / WARP * Run::ROWS; row < Config::TILE_M;
         row += Config::WARPS * Run::ROWS) {
        Run run;
        run.load(params, head, tile * Config::TILE_M + row);
        run.store(params, head, tile * Config::TILE_M + row);
    }
    if (params.dq_sum.data != nullptr) clear_sums(params, number, tile);
    if (params.dq_turns.data != nullptr) clear_turns(params, number, tile);
}
