// Forward attention on mma.sync: a block of threads computes TILE_M rows of o for one head, or, of
// a v wider than HEAD_DIM_V, a slice of their columns.
//
//   for each tile of keys, from the right end of what the rows see to the left:
//       S = Q K^T                   (TILE_M x TILE_N, in registers)
//       S = modify(S), -inf where masked
//       P = 2^(S - top)             online softmax: `top` is a row's maximum so far
//       O = rescale * O + P V       (TILE_M x HEAD_DIM_V, in registers)
//   O = O / sum, lse = log(sum of exponentials)
//
// Every warp owns TILE_M / WARPS rows, so a softmax never leaves its warp, and P goes from S's
// registers into the product with V without touching shared memory.
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "head_tiles.cuh"
#include "tile.cuh"
#include "mma.cuh"
#include "product.cuh"
#include "score.cuh"
#include "softmax.cuh"
#include "nonfinite.cuh"

// One row of the plan table in flash_cupy/cuda/tiles.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;          // rows of q of a block
    static constexpr int TILE_N = PLAN_TILE_N;          // keys of a step
    static constexpr int HEAD_DIM = PLAN_HEAD_DIM;      // of q and k, filled up with zeros
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;  // of v and o, or of a slice of them
    static constexpr int WARPS = PLAN_WARPS;
    static constexpr int STAGES = PLAN_STAGES;  // 1: K and V take turns; 2: a step ahead
    static constexpr int BLOCKS_PER_SM = PLAN_BLOCKS_PER_SM;
    static constexpr uint32 AT_A_TIME = SECTION_BLOCKS * BLOCKS_PER_SM;
    static constexpr int ACCESS_BYTES = PLAN_ACCESS_BYTES;  // what divides all rows' addresses
    static constexpr int DIM_UNROLL = PLAN_DIM_UNROLL;  // steps of 16 of HEAD_DIM in Q K^T
    static constexpr int DIM_V_GROUP = PLAN_DIM_V_GROUP;  // of HEAD_DIM_V in P V: a branch
    static constexpr bool BAND = PLAN_BAND;
    static constexpr bool SOFTCAP = PLAN_SOFTCAP;
    static constexpr bool ALIBI = PLAN_ALIBI;

    static constexpr int THREADS = WARPS * WARP;
};

template <class Config>
struct Forward {
    using T = typename Config::Element;
    using M = Mma<T>;
    using Element = typename M::Operand;
    using Real = typename M::Real;
    static constexpr int ROW_BLOCKS = Config::TILE_M / (16 * Config::WARPS);
    static constexpr int KEY_BLOCKS = Config::TILE_N / 16;
    static constexpr int DIM_BLOCKS = Config::HEAD_DIM / 16;
    static constexpr int DIM_BLOCKS_V = Config::HEAD_DIM_V / 16;
    static_assert(Config::TILE_M % (16 * Config::WARPS) == 0, "a warp owns blocks of 16 rows");

    using QTile = SharedTile<Element, Config::TILE_M, Config::HEAD_DIM>;
    using KTile = SharedTile<Element, Config::TILE_N, Config::HEAD_DIM>;
    using VTile = SharedTile<Element, Config::TILE_N, Config::HEAD_DIM_V>;
    using OTile = SharedTile<T, Config::TILE_M, Config::HEAD_DIM_V>;

    const AttentionParams& params;
    const uint32 head_index;  // of the batch's heads
    const int32 first_row;  // of the block
    const int32 warp_row;   // first row of the warp, within the block
    const int32 first_col;  // of the slice of v and o
    const Score<Config, Real> score;

    // Shared memory: q, then STAGES of k, then STAGES of v; in the end o, over all of it. In front of
    // it what making operands takes.
    const Operands<Element, Config::THREADS, Config::ACCESS_BYTES> operands;
    const uint32 shared;
    const TileReader<KTile, Config::THREADS, Config::ACCESS_BYTES> k;
    const TileReader<VTile, Config::THREADS, Config::ACCESS_BYTES> v;

    Accumulator<Real> o[ROW_BLOCKS][DIM_BLOCKS_V];
    OnlineSoftmax<Real, ROW_BLOCKS> softmax;

    DEVICE Forward(const AttentionParams& params, int32 row_tile, int32 slice, uint32 head_index,
                   const HeadIndex& index)
        : params(params),
          head_index(head_index),
          first_row(row_tile * Config::TILE_M),
          warp_row(threadIdx.x / WARP * (16 * ROW_BLOCKS)),
          first_col(slice * Config::HEAD_DIM_V),
          score(params, index),
          operands{shared_address(dynamic_shared_memory())},
          shared(operands.shared + operands.SHARED_BYTES),
          k(head_data<const T>(params.k, index, index.head / params.group), params.k.row,
            params.seqlen_k, params.head_dim),
          v(head_data<const T>(params.v, index, index.head / params.group) + first_col,
            params.v.row, params.seqlen_k, params.head_dim_v - first_col),
          o{} {}

    DEVICE QTile q_tile() const {
        return {shared};
    }
    DEVICE KTile k_tile(int stage) const {
        return {shared + QTile::BYTES + stage * KTile::BYTES};
    }
    DEVICE VTile v_tile(int stage) const {
        return {shared + QTile::BYTES + Config::STAGES * KTile::BYTES + stage * VTile::BYTES};
    }

    DEVICE void load_q() const {
        const HeadIndex index(params, head_index, params.heads);
        const TileReader<QTile, Config::THREADS, Config::ACCESS_BYTES> q(
            head_data<const T>(params.q, index, index.head), params.q.row, params.seqlen_q,
            params.head_dim);
        q.load(q_tile(), first_row);
    }
    DEVICE void load_k(int32 tile, int stage) const {
        k.load(k_tile(stage), tile * Config::TILE_N);
    }
    DEVICE void load_v(int32 tile, int stage) const {
        v.load(v_tile(stage), tile * Config::TILE_N);
    }

    // S = Q K^T
    DEVICE void multiply_q_k(Accumulator<Real> (&s)[ROW_BLOCKS][KEY_BLOCKS], KTile tile) const {
        multiply_rows<M, Config::DIM_UNROLL>(s, q_tile(), warp_row, tile, 0,
                                             joint(operands.scale(OF_Q).inverse,
                                                   operands.scale(OF_K).inverse));
    }

    // O += P V, with P made from S a few keys at a time, in between the products.
    DEVICE void multiply_p_v(Accumulator<Real> (&s)[ROW_BLOCKS][KEY_BLOCKS], VTile tile) {
        constexpr int STEPS = steps_of<M>(KEY_BLOCKS);
        const auto p_scale = M::scale_of(1);
        const auto scale = joint(operands.scale(OF_V).inverse, p_scale.inverse);
#pragma unroll
        for (int n = 0; n < KEY_BLOCKS; n += STEPS) {
            typename M::A p[ROW_BLOCKS][STEPS];
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS * STEPS; ++i) {
                const int m = i / STEPS, step = i % STEPS;
                softmax.template exponentiate<M>(s[m][n + step], m, score.factor);
                softmax.add(s[m][n + step], m);
                p[m][step] = M::to_a(s[m][n + step], p_scale.factor);
            }
#pragma unroll
            for (int d = 0; d < DIM_BLOCKS_V; ++d) {
                // Columns beyond v's are left out. It also keeps the compiler from mixing all
                // products of a step, which would take more registers than there are.
                if (d > 0 && d % Config::DIM_V_GROUP == 0 &&
                    16 * d >= params.head_dim_v - first_col) {
                    break;
                }
                typename M::B b[STEPS];
#pragma unroll
                for (int step = 0; step < STEPS; ++step) {
                    b[step] = M::load_b(tile, 16 * (n + step), 16 * d);
                }
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; ++m) {
                    M::multiply(o[m][d], p[m], b, scale);
                }
            }
        }
    }

    // Softcap and ALiBi.
    DEVICE void modify(Accumulator<Real> (&s)[ROW_BLOCKS][KEY_BLOCKS], int32 tile) const {
#pragma unroll
        for (int n = 0; n < KEY_BLOCKS; ++n) {
            // Missing keys are left out; as in multiply_p_v, the branch saves registers too.
            const int32 first_key = tile * Config::TILE_N + 16 * n;
            if (first_key >= params.seqlen_k) break;
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; ++m) {
                const int32 row = first_row + warp_row + 16 * m;
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int h = i / 4, e = i % 4;
                    Real& x = s[m][n].value[h][e];
                    x = score.modify(x, row + Accumulator<Real>::row(e),
                                     first_key + Accumulator<Real>::col(h, e));
                }
            }
        }
    }

    // -inf for the keys that a row does not see.
    DEVICE void mask(Accumulator<Real> (&s)[ROW_BLOCKS][KEY_BLOCKS], int32 tile) const {
        // Columns are counted from the lane's first, so that they are constants.
        const int32 origin = tile * Config::TILE_N + Accumulator<Real>::col(0, 0);
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const auto keys = score.keys(first_row + warp_row + 16 * m +
                                             Accumulator<Real>::row(2 * r));
                const int32 first = keys.first - origin, last = keys.last - origin;
#pragma unroll
                for (int i = 0; i < 4 * KEY_BLOCKS; ++i) {
                    const int col = i / 2 * 8 + i % 2;
                    Real& x = s[m][i / 4].value[i / 2 % 2][2 * r + i % 2];
                    if (col < first || col > last) x = -infinity<Real>();
                }
            }
        }
    }

    // One tile of keys; `partial`: some row does not see some key of it.
    DEVICE void step(int32 tile, int32 last_tile, bool partial) {
        const int stage = tile % Config::STAGES;
        // All that this step reads has landed, and no warp reads any more what is loaded next.
        wait_copies<0>();
        if constexpr (Config::STAGES == 1) {
            operands.make(operand(k_tile(stage), OF_K));
            load_v(tile, stage);
        } else {
            operands.make(operand(k_tile(stage), OF_K), operand(v_tile(stage), OF_V));
            if (tile > last_tile) {
                load_k(tile - 1, (tile - 1) % Config::STAGES);
                load_v(tile - 1, (tile - 1) % Config::STAGES);
            }
        }
        commit_copies();

        Accumulator<Real> s[ROW_BLOCKS][KEY_BLOCKS] = {};
        multiply_q_k(s, k_tile(stage));

        if constexpr (Config::STAGES == 1) {
            wait_copies<0>();
            operands.make(operand(v_tile(stage), OF_V));
            if (tile > last_tile) load_k(tile - 1, stage);
            commit_copies();
        }

        if constexpr (Score<Config, Real>::MODIFIES) modify(s, tile);
        if (partial) mask(s, tile);
        Real rescale[ROW_BLOCKS][2];
        softmax.raise_top(s, score.factor, rescale);
        scale_o(rescale);

        const bool nonfinite =
            partial && any_nonfinite(operands, operand(v_tile(stage), OF_V));
        if (nonfinite) remove_nonfinite<Config::THREADS>(v_tile(stage));
        multiply_p_v(s, v_tile(stage));
        if (nonfinite) spread_nonfinite_v(tile, stage);
    }

    // Sets to NaN the rows that see a non-finite value of a V tile, which is loaded once more.
    DEVICE void spread_nonfinite_v(int32 tile, int stage) {
        __syncthreads();
        load_v(tile, stage);
        commit_copies();
        wait_copies<0>();
        __syncthreads();
        spread_nonfinite(o, as_loaded<T>(v_tile(stage)), [&](int row, int key) {
            return score.sees(first_row + warp_row + row, tile * Config::TILE_N + key);
        });
    }

    DEVICE void scale_o(const Real (&factor)[ROW_BLOCKS][2]) {
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int d = 0; d < DIM_BLOCKS_V; ++d) {
#pragma unroll
                for (int i = 0; i < 8; ++i) o[m][d].value[i / 4][i % 4] *= factor[m][i % 4 / 2];
            }
        }
    }

    DEVICE void walk_keys() {
        const int32 last_row = min(first_row + Config::TILE_M, params.seqlen_q) - 1;
        const TileRange tiles =
            visible_tiles(score.band, first_row, last_row, Config::TILE_N, params.seqlen_k);
        if (tiles.begin == tiles.end) return;

        load_q();
        load_k(tiles.end - 1, (tiles.end - 1) % Config::STAGES);
        if constexpr (Config::STAGES > 1) load_v(tiles.end - 1, (tiles.end - 1) % Config::STAGES);
        commit_copies();
        if constexpr (PARTS<Element> > 0) {
            wait_copies<0>();
            operands.make(operand(q_tile(), OF_Q));
        }
        for (int32 tile = tiles.end - 1; tile >= tiles.begin; --tile) {
            step(tile, tiles.begin, !tiles.is_full(tile));
        }
    }

    // o and lse, to global memory; o by way of shared memory, so that whole rows are written.
    DEVICE void store() {
        Real scale[ROW_BLOCKS][2], lse[ROW_BLOCKS][2];
        softmax.finish(scale, lse);
        scale_o(scale);

        const HeadIndex index(params, recompute_from(head_index), params.heads);
        Real* const lse_data = head_data<Real>(params.lse, index, index.head);
        const OTile o_tile{shared};
        __syncthreads();  // all warps have read their last keys
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int32 row = warp_row + 16 * m + Accumulator<Real>::row(2 * r);
                if (first_col == 0 && lane_index() % 4 == 0 &&
                    first_row + row < params.seqlen_q) {
                    lse_data[(first_row + row) * params.lse.row] = lse[m][r];
                }
#pragma unroll
                for (int i = 0; i < 2 * DIM_BLOCKS_V; ++i) {
                    const Real* pair = &o[m][i / 2].value[i % 2][2 * r];
                    store_pair(o_tile, row, 16 * (i / 2) + Accumulator<Real>::col(i % 2, 0),
                               pair[0], pair[1]);
                }
            }
        }
        __syncthreads();
        T* const o_data = head_data<T>(params.o, index, index.head) + first_col;
        copy_to_global<Config::THREADS, Config::ACCESS_BYTES>(
            o_tile, o_data + first_row * params.o.row, params.o.row, params.seqlen_q - first_row,
            params.head_dim_v - first_col);
    }
};

// One block for every tile of rows of every slice and head, the rows with most keys first.
extern "C" __global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    attention_forward(const __grid_constant__ AttentionParams params) {
    const uint32 row_tiles = ceil_div(params.seqlen_q, Config::TILE_M);
    const uint32 slices = ceil_div(params.head_dim_v, Config::HEAD_DIM_V);
    const HeadTile place =
        head_tile_of<Config::BAND, Config::AT_A_TIME>(blockIdx.x, row_tiles);
    const uint32 head_index = place.head / slices;

    Forward<Config> forward(params, row_tiles - 1 - place.tile, place.head % slices, head_index,
                            HeadIndex(params, head_index, params.heads));
    forward.walk_keys();
    forward.store();
}
