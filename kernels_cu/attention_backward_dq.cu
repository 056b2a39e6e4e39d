// The gradient of q by itself, for the deterministic backward: a block of threads computes TILE_M
// rows of dq for one head, of all columns or of a slice of DQ_COLS.
//
//   for each tile of keys that the rows see:
//       S = Q K^T, dP = dO V^T         (TILE_M x TILE_N, in registers)
//       P = 2^(modify(S) - lse)
//       dS = P * (dP - D)              0 where masked, times the softcap's derivative
//       dQ += dS K                     (TILE_M x DQ_COLS, in registers)
//
// Every warp owns TILE_M / WARPS rows, as in the forward pass. attention_backward, without its own
// part of dQ, computes dk and dv.
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "head_tiles.cuh"
#include "tile.cuh"
#include "mma.cuh"
#include "product.cuh"
#include "score.cuh"
#include "nonfinite.cuh"
#include "row_terms.cuh"

// One row of the plan table in flash_cupy/cuda/tiles.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;          // rows of q of a block
    static constexpr int TILE_N = PLAN_TILE_N;          // keys of a step
    static constexpr int HEAD_DIM = PLAN_HEAD_DIM;      // of q and k, filled up with zeros
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;  // of v and o
    static constexpr int DQ_COLS = PLAN_DQ_COLS;        // columns of dq of a block
    static constexpr int WARPS = PLAN_WARPS;
    static constexpr int STAGES = PLAN_STAGES;  // of K and V: 2 loads a step ahead
    static constexpr int UNROLL = PLAN_UNROLL;  // steps of 16 that S and dP are unrolled by
    static constexpr int BLOCKS_PER_SM = PLAN_BLOCKS_PER_SM;
    static constexpr uint32 AT_A_TIME = SECTION_BLOCKS * BLOCKS_PER_SM;
    static constexpr int ACCESS_BYTES = PLAN_ACCESS_BYTES;  // what divides all rows' addresses
    static constexpr bool BAND = PLAN_BAND;
    static constexpr bool SOFTCAP = PLAN_SOFTCAP;
    static constexpr bool ALIBI = PLAN_ALIBI;

    static constexpr int THREADS = WARPS * WARP;
};

template <class Config>
struct BackwardDq {
    using T = typename Config::Element;
    using M = Mma<T>;
    using Element = typename M::Operand;
    using Real = typename M::Real;
    using Factor = typename M::Factor;
    static constexpr int ROW_BLOCKS = Config::TILE_M / (16 * Config::WARPS);
    static constexpr int KEY_BLOCKS = Config::TILE_N / 16;
    static constexpr int COL_BLOCKS = Config::DQ_COLS / 16;
    static_assert(Config::TILE_M % (16 * Config::WARPS) == 0, "a warp owns blocks of 16 rows");

    using QTile = SharedTile<Element, Config::TILE_M, Config::HEAD_DIM>;
    using DoTile = SharedTile<Element, Config::TILE_M, Config::HEAD_DIM_V>;
    using KTile = SharedTile<Element, Config::TILE_N, Config::HEAD_DIM>;
    using VTile = SharedTile<Element, Config::TILE_N, Config::HEAD_DIM_V>;
    using DqTile = SharedTile<T, Config::TILE_M, Config::DQ_COLS>;  // in the end, in place of q
    using Terms = RowTerms<Real>;

    // Shared memory, in this order.
    using BlockOperands = Operands<Element, Config::THREADS, Config::ACCESS_BYTES>;
    static constexpr int Q_OFFSET = BlockOperands::SHARED_BYTES;
    static constexpr int DO_OFFSET = Q_OFFSET + QTile::BYTES;
    static constexpr int K_OFFSET = DO_OFFSET + DoTile::BYTES;
    static constexpr int V_OFFSET = K_OFFSET + Config::STAGES * KTile::BYTES;

    const AttentionParams& params;
    const uint32 head_index;  // of all batches' heads
    const int32 first_row;    // of the block
    const int32 first_col;    // of the slice
    const int32 warp_row;     // first row of the warp, within the block
    const uint32 shared;
    const Score<Config, Real> score;

    Terms terms[ROW_BLOCKS][2];  // as accumulators hold rows: g and g + 8
    Accumulator<Real> dq[ROW_BLOCKS][COL_BLOCKS];

    DEVICE BackwardDq(const AttentionParams& params, int32 row_tile, int32 slice,
                      uint32 head_index)
        : params(params),
          head_index(head_index),
          first_row(row_tile * Config::TILE_M),
          first_col(slice * Config::DQ_COLS),
          warp_row(threadIdx.x / WARP * (16 * ROW_BLOCKS)),
          shared(shared_address(dynamic_shared_memory())),
          score(params, head()),
          dq{} {}

    DEVICE QTile q_tile() const {
        return {shared + Q_OFFSET};
    }
    DEVICE DoTile do_tile() const {
        return {shared + DO_OFFSET};
    }
    DEVICE KTile k_tile(int stage) const {
        return {shared + K_OFFSET + stage * KTile::BYTES};
    }
    DEVICE VTile v_tile(int stage) const {
        return {shared + V_OFFSET + stage * VTile::BYTES};
    }

    DEVICE HeadIndex head() const {
        return HeadIndex(params, recompute_from(head_index), params.heads);
    }

    template <class Tile>
    DEVICE void load(Tile tile, const Tensor& tensor, int32 head, int32 row, int32 rows,
                     int32 cols) const {
        TileReader<Tile, Config::THREADS, Config::ACCESS_BYTES>(
            head_data<const T>(tensor, this->head(), head), tensor.row, rows, cols)
            .load(tile, row);
    }
    DEVICE void load_rows() {
        const HeadIndex index = head();
        load(q_tile(), params.q, index.head, first_row, params.seqlen_q, params.head_dim);
        load(do_tile(), params.do_, index.head, first_row, params.seqlen_q, params.head_dim_v);
        const Real* const data = head_data<const Real>(params.row_dots, index, index.head);
#pragma unroll
        for (int i = 0; i < 2 * ROW_BLOCKS; ++i) {
            const int32 row =
                first_row + warp_row + i / 2 * 16 + Accumulator<Real>::row(i % 2 * 2);
            terms[i / 2][i % 2] = Terms{0, 0};
            if (row < params.seqlen_q) {
                terms[i / 2][i % 2] =
                    *reinterpret_cast<const Terms*>(data + row * params.row_dots.row);
            }
        }
    }
    // A tile of K and of V; closes the group of copies.
    DEVICE void load_keys(int32 tile, int stage) const {
        const int32 first = tile * Config::TILE_N, head = this->head().head / params.group;
        load(k_tile(stage), params.k, head, first, params.seqlen_k, params.head_dim);
        load(v_tile(stage), params.v, head, first, params.seqlen_k, params.head_dim_v);
        commit_copies();
    }

    using Scores = Accumulator<Real>[ROW_BLOCKS][KEY_BLOCKS];

    // dS from dP and S, in place of dP.
    DEVICE void differentiate(const Scores& s, Scores& ds, int32 tile) const {
#pragma unroll
        for (int i = 0; i < 2 * ROW_BLOCKS; ++i) {
            const int32 row =
                first_row + warp_row + i / 2 * 16 + Accumulator<Real>::row(i % 2 * 2);
            const Terms& own = terms[i / 2][i % 2];
#pragma unroll
            for (int j = 0; j < 4 * KEY_BLOCKS; ++j) {
                const int h = j / 2 % 2, e = i % 2 * 2 + j % 2;
                Real derivative;
                const Real exponent = score.modify_with_slope(
                    s[i / 2][j / 4].value[h][e], row,
                    tile * Config::TILE_N + j / 4 * 16 + Accumulator<Real>::col(h, e), derivative);
                Real& x = ds[i / 2][j / 4].value[h][e];
                x = M::at_most_1(exp2_real(exponent * score.factor - own.lse)) * (x - own.dot);
                if constexpr (Config::SOFTCAP) x *= derivative;
            }
        }
    }

    // The scale of the warp's dS.
    DEVICE Scale<Factor> scale_of_ds() const {
        if constexpr (!BlockOperands::SPLIT) {
            return {};
        } else {
            uint32 largest_dot = 0;
#pragma unroll
            for (int i = 0; i < 2 * ROW_BLOCKS; ++i) {
                largest_dot = max(largest_dot, finite_bits(terms[i / 2][i % 2].dot));
            }
            return M::scale_of(largest_ds<Config>(params, operands().scale(OF_DO).largest,
                                                  operands().scale(OF_V).largest,
                                                  bit_cast<float>(warp_max(largest_dot))));
        }
    }
    DEVICE BlockOperands operands() const {
        return {shared};
    }
    DEVICE Factor inverse(Tensors tensor) const {  // of the scale of its present tile
        return operands().scale(tensor).inverse;
    }

    // Zeros for the keys that a row does not see.
    DEVICE void mask(Scores& ds, int32 tile) const {
        // Columns are counted from the lane's first, so that they are constants.
        const int32 origin = tile * Config::TILE_N + Accumulator<Real>::col(0, 0);
#pragma unroll
        for (int i = 0; i < 2 * ROW_BLOCKS; ++i) {
            const auto keys = score.keys(first_row + warp_row + i / 2 * 16 +
                                         Accumulator<Real>::row(i % 2 * 2));
            const int32 first = keys.first - origin, last = keys.last - origin;
#pragma unroll
            for (int j = 0; j < 4 * KEY_BLOCKS; ++j) {
                const int col = j / 2 * 8 + j % 2;
                if (col < first || col > last) {
                    ds[i / 2][j / 4].value[j / 2 % 2][i % 2 * 2 + j % 2] = 0;
                }
            }
        }
    }

    // One tile of keys, and the loads of the next; `partial`: some row does not see some key.
    DEVICE void step(int32 tile, bool has_next, int stage, bool partial) {
        // All that this step reads has landed, and no warp reads any more what is loaded next.
        wait_copies<0>();
        operands().make(operand(k_tile(stage), OF_K), operand(v_tile(stage), OF_V));
        if (Config::STAGES > 1 && has_next) load_keys(tile + 1, 1 - stage);

        Scores s = {}, ds = {};
        multiply_rows<M, Config::UNROLL>(s, q_tile(), warp_row, k_tile(stage), 0,
                                         joint(inverse(OF_Q), inverse(OF_K)));
        multiply_rows<M, Config::UNROLL>(ds, do_tile(), warp_row, v_tile(stage), 0,
                                         joint(inverse(OF_DO), inverse(OF_V)));
        differentiate(s, ds, tile);
        if (partial) mask(ds, tile);

        const bool nonfinite =
            partial && any_nonfinite(operands(), operand(k_tile(stage), OF_K));
        if (nonfinite) remove_nonfinite<Config::THREADS>(k_tile(stage));
        const Scale<Factor> ds_scale = scale_of_ds();
        add_weighted_rows<M, KEY_BLOCKS>(
            dq, [&](int i, int k) { return M::to_a(ds[i][k / 16], ds_scale.factor); },
            k_tile(stage), first_col, joint(ds_scale.inverse, inverse(OF_K)));
        if (nonfinite) spread_nonfinite_k(tile, stage);

        if constexpr (Config::STAGES == 1) {
            __syncthreads();
            if (has_next) load_keys(tile + 1, stage);
        }
    }

    // Sets to NaN the rows that see a non-finite value of a K tile, which is loaded once more.
    DEVICE void spread_nonfinite_k(int32 tile, int stage) {
        __syncthreads();
        load_keys(tile, stage);
        wait_copies<0>();
        __syncthreads();
        const KTile k_cols{k_tile(stage).at(0, first_col)};
        spread_nonfinite(dq, as_loaded<T>(k_cols), [&](int row, int key) {
            return score.sees(first_row + warp_row + row, tile * Config::TILE_N + key);
        });
    }

    DEVICE void walk_keys() {
        const int32 last_row = min(first_row + Config::TILE_M, params.seqlen_q) - 1;
        const TileRange tiles =
            visible_tiles(score.band, first_row, last_row, Config::TILE_N, params.seqlen_k);
        if (tiles.begin == tiles.end) return;

        load_rows();
        load_keys(tiles.begin, tiles.begin % Config::STAGES);
        if constexpr (BlockOperands::SPLIT) {
            wait_copies<0>();
            operands().make(operand(q_tile(), OF_Q), operand(do_tile(), OF_DO));
        }
        for (int32 tile = tiles.begin; tile < tiles.end; ++tile) {
            step(tile, tile + 1 < tiles.end, tile % Config::STAGES, !tiles.is_full(tile));
        }
    }

    // dq, to global memory; by way of shared memory, so that whole rows are written.
    DEVICE void store() {
        __syncthreads();  // all warps have read q
        const Real scale = Config::SOFTCAP ? 1 : scalars<Real>(params).scale;
        const DqTile tile{q_tile().address};
        store_accumulators(tile, warp_row, 0, dq, scale);
        __syncthreads();
        const HeadIndex index = head();
        T* const data = head_data<T>(params.dq, index, index.head);
        copy_to_global<Config::THREADS, Config::ACCESS_BYTES>(
            tile, data + first_row * params.dq.row + first_col, params.dq.row,
            params.seqlen_q - first_row, params.head_dim - first_col);
    }
};

// One block for every tile of rows of every slice and head, the rows with most keys first.
extern "C" __global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    attention_backward_dq(const __grid_constant__ AttentionParams params) {
    const uint32 row_tiles = ceil_div(params.seqlen_q, Config::TILE_M);
    const uint32 slices = ceil_div(params.head_dim, Config::DQ_COLS);
    const HeadTile place =
        head_tile_of<Config::BAND, Config::AT_A_TIME>(blockIdx.x, row_tiles);

    BackwardDq<Config> backward(params, row_tiles - 1 - place.tile, place.head % slices,
                                place.head / slices);
    backward.walk_keys();
    backward.store();
}
