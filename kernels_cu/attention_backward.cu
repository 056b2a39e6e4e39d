// Backward attention on mma.sync: a block of threads computes TILE_N rows of dk and dv for one key
// head, and what these keys add to dq.
//
//   for each query head of the group, for each tile of queries that sees the keys:
//       S^T = K Q^T, dP^T = V dO^T     (TILE_N x TILE_M, in registers)
//       P^T = 2^(modify(S^T) - lse)    0 where masked
//       dS^T = P^T * (dP^T - D)        times the softcap's derivative
//       dV += P^T dO                   (TILE_N x HEAD_DIM_V, in registers)
//       dK += dS^T Q                   (TILE_N x HEAD_DIM, in registers)
//       dq_sum += dS K                 (TILE_M x HEAD_DIM, in device memory)
//
// The warps are a grid. A warp's row in it, of KEY_WARPS, says which keys it owns; its column, of
// COL_WARPS, which columns of dV and dK, and which queries of S^T and dP^T. With one column P^T and
// dS^T go from their registers straight into the products with dO and Q; with more, by way of
// shared memory, and every fragment that is loaded serves more products. dS always goes through
// shared memory to become dQ.
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
#include "dq_sum.cuh"

// One row of the plan table in flash_cupy/cuda/tiles.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;          // queries of a step
    static constexpr int TILE_N = PLAN_TILE_N;          // keys of a block
    static constexpr int HEAD_DIM = PLAN_HEAD_DIM;      // of q and k, filled up with zeros
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;  // of v and o
    static constexpr int WARPS = PLAN_WARPS;
    static constexpr int KEY_WARPS = PLAN_KEY_WARPS;        // rows of the grid of warps
    static constexpr int DQ_ROW_WARPS = PLAN_DQ_ROW_WARPS;  // the same for dQ
    static constexpr int UNROLL = PLAN_UNROLL;  // steps of 16 that products are unrolled by
    static constexpr int STAGES = PLAN_STAGES;  // of Q and dO: 2 loads a step ahead
    static constexpr int BLOCKS_PER_SM = PLAN_BLOCKS_PER_SM;
    static constexpr uint32 AT_A_TIME = SECTION_BLOCKS * BLOCKS_PER_SM;
    static constexpr int ACCESS_BYTES = PLAN_ACCESS_BYTES;  // what divides all rows' addresses
    static constexpr bool SUM_DQ = PLAN_SUM_DQ;  // else attention_backward_dq computes dQ
    static constexpr bool BAND = PLAN_BAND;
    static constexpr bool SOFTCAP = PLAN_SOFTCAP;
    static constexpr bool ALIBI = PLAN_ALIBI;

    static constexpr int THREADS = WARPS * WARP;
    static constexpr int COL_WARPS = WARPS / KEY_WARPS;
    // Where there are fewer queries than columns of warps, some warps compute the same S and dP.
    static constexpr int QUERY_WARPS = COL_WARPS < TILE_M / 16 ? COL_WARPS : TILE_M / 16;
};

template <class Config>
struct Backward {
    using T = typename Config::Element;
    using M = Mma<T>;
    using Element = typename M::Operand;
    using Real = typename M::Real;
    using Factor = typename M::Factor;
    // What a warp owns of each matrix, in blocks of 16.
    static constexpr int KEY_BLOCKS = Config::TILE_N / (16 * Config::KEY_WARPS);
    static constexpr int QUERY_BLOCKS = Config::TILE_M / (16 * Config::QUERY_WARPS);
    static constexpr int DIM_BLOCKS = Config::HEAD_DIM / (16 * Config::COL_WARPS);
    static constexpr int DIM_BLOCKS_V = Config::HEAD_DIM_V / (16 * Config::COL_WARPS);
    static constexpr int DQ_COL_WARPS = Config::WARPS / Config::DQ_ROW_WARPS;
    static constexpr int DQ_ROW_BLOCKS = Config::TILE_M / (16 * Config::DQ_ROW_WARPS);
    static constexpr int DQ_COL_BLOCKS = Config::HEAD_DIM / (16 * DQ_COL_WARPS);
    static_assert(KEY_BLOCKS * 16 * Config::KEY_WARPS == Config::TILE_N &&
                      QUERY_BLOCKS * 16 * Config::QUERY_WARPS == Config::TILE_M &&
                      DIM_BLOCKS * 16 * Config::COL_WARPS == Config::HEAD_DIM &&
                      DIM_BLOCKS_V * 16 * Config::COL_WARPS == Config::HEAD_DIM_V &&
                      DQ_ROW_BLOCKS * 16 * Config::DQ_ROW_WARPS == Config::TILE_M &&
                      DQ_COL_BLOCKS * 16 * DQ_COL_WARPS == Config::HEAD_DIM,
                  "the warps share out every matrix in whole blocks");
    static constexpr bool P_IN_REGISTERS = Config::COL_WARPS == 1;

    using KTile = SharedTile<Element, Config::TILE_N, Config::HEAD_DIM>;
    using VTile = SharedTile<Element, Config::TILE_N, Config::HEAD_DIM_V>;
    using QTile = SharedTile<Element, Config::TILE_M, Config::HEAD_DIM>;
    using DoTile = SharedTile<Element, Config::TILE_M, Config::HEAD_DIM_V>;
    using WeightTile = SharedTile<Element, Config::TILE_N, Config::TILE_M>;  // dS^T, P^T
    using Terms = RowTerms<Real>;

    // The tensors of query heads. Where they begin for the first head of the group stands in shared
    // memory: registers are what this kernel is short of.
    enum Origin { Q, DO, TERMS, DQ_SUM, ORIGINS };

    using BlockOperands = Operands<Element, Config::THREADS, Config::ACCESS_BYTES>;

    // Shared memory, in this order; of the last two only what the warps exchange.
    static constexpr int OPERANDS_OFFSET = ORIGINS * static_cast<int>(sizeof(void*));
    static constexpr int K_OFFSET = OPERANDS_OFFSET + BlockOperands::SHARED_BYTES;
    static constexpr int V_OFFSET = K_OFFSET + KTile::BYTES;
    static constexpr int Q_OFFSET = V_OFFSET + VTile::BYTES;
    static constexpr int DO_OFFSET = Q_OFFSET + Config::STAGES * QTile::BYTES;
    static constexpr int TERMS_OFFSET = DO_OFFSET + Config::STAGES * DoTile::BYTES;
    static constexpr int TERMS_BYTES = Config::TILE_M * static_cast<int>(sizeof(Terms));
    static constexpr int DS_OFFSET = TERMS_OFFSET + Config::STAGES * TERMS_BYTES;
    static constexpr int P_OFFSET = DS_OFFSET + WeightTile::BYTES;

    // A tile of queries of a head of the group.
    struct Place {
        int32 head, tile;
    };

    const AttentionParams& params;
    const int32 first_key;  // of the block
    const uint32 shared;
    Score<Config, Real> score;
    bool k_nonfinite = false;  // a non-finite value of K must be kept from queries' dQ

    Accumulator<Real> dk[KEY_BLOCKS][DIM_BLOCKS];
    Accumulator<Real> dv[KEY_BLOCKS][DIM_BLOCKS_V];

    DEVICE explicit Backward(const AttentionParams& params)
        : params(params),
          first_key(head_tile().tile * Config::TILE_N),
          shared(shared_address(dynamic_shared_memory())),
          score(params, query_head(0)),
          dk{},
          dv{} {}

    // What follows is cheap to compute again, and so keeps no registers from the sums.
    DEVICE uint32 key_tiles() const {
        return ceil_div(params.seqlen_k, Config::TILE_N);
    }
    DEVICE HeadTile head_tile() const {  // a key head and a tile of its keys
        return head_tile_of<Config::BAND, Config::AT_A_TIME>(recompute_from(blockIdx.x),
                                                                    key_tiles());
    }
    DEVICE TileRange query_tiles() const {
        const int32 first = recompute_from(first_key);
        const int32 last = min(first + Config::TILE_N, params.seqlen_k) - 1;
        return visible_tiles(score.band.transposed(), first, last, Config::TILE_M,
                             params.seqlen_q);
    }
    DEVICE bool keys_exist() const {  // all of the block's
        return first_key + Config::TILE_N <= params.seqlen_k;
    }
    DEVICE int warp_index() const {
        return recompute_from(threadIdx.x) / WARP;
    }
    DEVICE int warp_col() const {  // in the grid of warps
        return warp_index() / Config::KEY_WARPS;
    }
    DEVICE int warp_key() const {  // first key of the warp, within the block
        return warp_index() % Config::KEY_WARPS * (16 * KEY_BLOCKS);
    }
    DEVICE int warp_query() const {  // first query of the warp in S^T, within the tile
        return warp_col() % Config::QUERY_WARPS * (16 * QUERY_BLOCKS);
    }

    DEVICE KTile k_tile() const {
        return {shared + K_OFFSET};
    }
    DEVICE VTile v_tile() const {
        return {shared + V_OFFSET};
    }
    DEVICE QTile q_tile(int stage) const {
        return {shared + Q_OFFSET + stage * QTile::BYTES};
    }
    DEVICE DoTile do_tile(int stage) const {
        return {shared + DO_OFFSET + stage * DoTile::BYTES};
    }
    DEVICE uint32 terms(int stage) const {
        return shared + TERMS_OFFSET + stage * TERMS_BYTES;
    }
    DEVICE WeightTile ds_tile() const {
        return {shared + DS_OFFSET};
    }
    DEVICE WeightTile p_tile() const {
        return {shared + P_OFFSET};
    }

    DEVICE BlockOperands operands() const {
        return {shared + OPERANDS_OFFSET};
    }
    DEVICE Factor inverse(Tensors tensor) const {  // of the scale of its present tile
        return operands().scale(tensor).inverse;
    }

    // A query head of the group; the group's key head.
    DEVICE HeadIndex query_head(int32 head) const {
        const uint32 first = head_tile().head * params.group;
        return HeadIndex(params, first + head, params.heads);
    }
    DEVICE HeadIndex key_head() const {
        return HeadIndex(params, head_tile().head, params.heads / params.group);
    }

    DEVICE uint32 origin(Origin tensor) const {
        return shared + tensor * static_cast<int>(sizeof(void*));
    }
    DEVICE void store_origins() const {
        if (threadIdx.x == 0) {
            const HeadIndex index = query_head(0);
            store_shared(origin(Q), head_data<const T>(params.q, index, index.head));
            store_shared(origin(DO), head_data<const T>(params.do_, index, index.head));
            store_shared(origin(TERMS), head_data<const Real>(params.row_dots, index, index.head));
            store_shared(origin(DQ_SUM), head_data<Real>(params.dq_sum, index, index.head));
        }
        __syncthreads();
    }

    template <class Tile>
    DEVICE void load(Tile tile, const T* data, int64 row_stride, int32 row, int32 rows,
                     int32 cols) const {
        TileReader<Tile, Config::THREADS, Config::ACCESS_BYTES>(data, row_stride, rows, cols)
            .load(tile, row);
    }
    DEVICE void load_k() const {
        const HeadIndex index = key_head();
        load(k_tile(), head_data<const T>(params.k, index, index.head), params.k.row, first_key,
             params.seqlen_k, params.head_dim);
    }
    DEVICE void load_v() const {
        const HeadIndex index = key_head();
        load(v_tile(), head_data<const T>(params.v, index, index.head), params.v.row, first_key,
             params.seqlen_k, params.head_dim_v);
    }
    // A tile of Q, of dO and of their rows' terms; closes the group of copies.
    DEVICE void load_queries(Place place, int stage) const {
        const int32 first = place.tile * Config::TILE_M;
        const T* const q = load_shared<const T*>(origin(Q)) + place.head * params.q.head;
        const T* const do_ = load_shared<const T*>(origin(DO)) + place.head * params.do_.head;
        load(q_tile(stage), q, params.q.row, first, params.seqlen_q, params.head_dim);
        load(do_tile(stage), do_, params.do_.row, first, params.seqlen_q, params.head_dim_v);

        const Real* const data =
            load_shared<const Real*>(origin(TERMS)) + place.head * params.row_dots.head;
#pragma unroll
        for (int i = threadIdx.x; i < Config::TILE_M; i += Config::THREADS) {
            copy_async<sizeof(Terms)>(terms(stage) + i * static_cast<int>(sizeof(Terms)),
                                      data + (first + i) * params.row_dots.row,
                                      first + i < params.seqlen_q ? sizeof(Terms) : 0);
        }
        commit_copies();
    }

    using Scores = Accumulator<Real>[KEY_BLOCKS][QUERY_BLOCKS];

    // P and dS from S and dP, all transposed, in place.
    DEVICE void differentiate(Scores& p, Scores& ds, int32 tile, int stage) const {
#pragma unroll
        for (int j = 0; j < 4 * QUERY_BLOCKS; ++j) {
            const int h = j / 2 % 2;
            const int query = warp_query() + j / 4 * 16 + Accumulator<Real>::col(h, j % 2);
            const Terms row = load_shared<Terms>(terms(stage) +
                                                 query * static_cast<int>(sizeof(Terms)));
#pragma unroll
            for (int i = 0; i < 2 * KEY_BLOCKS; ++i) {
                const int e = i % 2 * 2 + j % 2;
                Real& x = p[i / 2][j / 4].value[h][e];
                Real& y = ds[i / 2][j / 4].value[h][e];
                Real derivative;
                const Real exponent = score.modify_with_slope(
                    x, tile * Config::TILE_M + query,
                    first_key + warp_key() + i / 2 * 16 + Accumulator<Real>::row(e), derivative);
                x = M::at_most_1(exp2_real(exponent * score.factor - row.lse));
                y = x * (y - row.dot);
                if constexpr (Config::SOFTCAP) y *= derivative;
            }
        }
    }

    // The scale of dS in a step.
    DEVICE Scale<Factor> scale_of_ds(int stage) const {
        if constexpr (!BlockOperands::SPLIT) {
            return {};
        } else {
            uint32 largest_dot = 0;
#pragma unroll
            for (int i = threadIdx.x % WARP; i < Config::TILE_M; i += WARP) {
                const Terms row =
                    load_shared<Terms>(terms(stage) + i * static_cast<int>(sizeof(Terms)));
                largest_dot = max(largest_dot, finite_bits(row.dot));
            }
            return M::scale_of(largest_ds<Config>(params, operands().scale(OF_DO).largest,
                                                  operands().scale(OF_V).largest,
                                                  bit_cast<float>(warp_max(largest_dot))));
        }
    }

    // Zeros where a query does not see a key, or one of them does not exist.
    DEVICE void mask(Scores& p, Scores& ds, int32 tile) const {
        // Queries are counted from the lane's first, so that they are constants.
        const int32 start = tile * Config::TILE_M + warp_query() + Accumulator<Real>::col(0, 0);
#pragma unroll
        for (int i = 0; i < 2 * KEY_BLOCKS; ++i) {
            const auto rows = score.rows(first_key + warp_key() + i / 2 * 16 +
                                         Accumulator<Real>::row(i % 2 * 2));
            const int32 first = rows.first - start, last = rows.last - start;
#pragma unroll
            for (int j = 0; j < 4 * QUERY_BLOCKS; ++j) {
                const int query = j / 2 * 8 + j % 2;
                if (query < first || query > last) {
                    p[i / 2][j / 4].value[j / 2 % 2][i % 2 * 2 + j % 2] = 0;
                    ds[i / 2][j / 4].value[j / 2 % 2][i % 2 * 2 + j % 2] = 0;
                }
            }
        }
    }

    // acc += weights^T b, weights being this warp's in registers or all warps' in a tile.
    template <class BTile, int COL_BLOCKS>
    DEVICE void add_weighted(Accumulator<Real> (&acc)[KEY_BLOCKS][COL_BLOCKS],
                             const Scores& weights, Scale<Factor> scale, WeightTile tile, BTile b,
                             Factor b_inverse) const {
        add_weighted_rows<M, P_IN_REGISTERS ? QUERY_BLOCKS : Config::UNROLL>(
            acc,
            [&](int i, int k) {
                return P_IN_REGISTERS
                           ? M::to_a(weights[i][P_IN_REGISTERS ? k / 16 : 0], scale.factor)
                           : M::reload_a(tile, warp_key() + 16 * i, k);
            },
            b, 16 * COL_BLOCKS * warp_col(), joint(scale.inverse, b_inverse));
    }

    // One tile of queries, and the loads of the next; `partial`: some query does not see some key.
    DEVICE void step(Place place, Place next, int stage, bool partial) {
        const bool has_next = next.head < params.group;
        // All that this step reads has landed, and no warp reads any more what is loaded next.
        wait_copies<0>();
        operands().make(operand(q_tile(stage), OF_Q), operand(do_tile(stage), OF_DO));
        if (Config::STAGES > 1 && has_next) load_queries(next, 1 - stage);

        Scores p = {}, ds = {};
        multiply_rows<M, Config::UNROLL>(p, k_tile(), warp_key(), q_tile(stage), warp_query(),
                                         joint(inverse(OF_K), inverse(OF_Q)));
        multiply_rows<M, Config::UNROLL>(ds, v_tile(), warp_key(), do_tile(stage), warp_query(),
                                         joint(inverse(OF_V), inverse(OF_DO)));
        differentiate(p, ds, place.tile, stage);
        if (partial) mask(p, ds, place.tile);
        const Scale<Factor> p_scale = M::scale_of(1), ds_scale = scale_of_ds(stage);
        if (warp_col() < Config::QUERY_WARPS) {
            if constexpr (!P_IN_REGISTERS) {
                store_accumulators(p_tile(), warp_key(), warp_query(), p, p_scale.factor);
            }
            if constexpr (!P_IN_REGISTERS || Config::SUM_DQ) {
                store_accumulators(ds_tile(), warp_key(), warp_query(), ds, ds_scale.factor);
            }
        }

        const bool nonfinite = partial && remove_nonfinites(stage);
        if constexpr (!P_IN_REGISTERS) __syncthreads();
        add_weighted(dv, p, p_scale, p_tile(), do_tile(stage), inverse(OF_DO));
        add_weighted(dk, ds, ds_scale, ds_tile(), q_tile(stage), inverse(OF_Q));
        if (nonfinite) spread_nonfinite_queries(place, stage);

        if constexpr (P_IN_REGISTERS || Config::STAGES == 1) __syncthreads();
        if (Config::STAGES == 1 && has_next) load_queries(next, stage);
        if constexpr (Config::SUM_DQ) sum_dq(place, ds_scale.inverse, partial && k_nonfinite);
    }

    // Takes non-finite values out of the tiles of weighted rows; whether there are any.
    DEVICE bool remove_nonfinites(int stage) {
        const bool found = any_nonfinite(operands(), operand(q_tile(stage), OF_Q),
                                                          operand(do_tile(stage), OF_DO));
        if (!found && !k_nonfinite) return false;
        remove_nonfinite<Config::THREADS>(q_tile(stage));
        remove_nonfinite<Config::THREADS>(do_tile(stage));
        if (k_nonfinite) remove_nonfinite<Config::THREADS>(k_tile());
        return true;
    }

    DEVICE void finish_loads() const {
        wait_copies<0>();
        __syncthreads();
    }

    // Sets to NaN what sees a non-finite value of Q and dO, which are loaded once more.
    DEVICE void spread_nonfinite_queries(Place place, int stage) {
        __syncthreads();
        load_queries(place, stage);
        finish_loads();
        const auto sees = [&](int key, int query) {
            return score.sees(place.tile * Config::TILE_M + query, first_key + warp_key() + key);
        };
        const DoTile do_cols{do_tile(stage).at(0, 16 * DIM_BLOCKS_V * warp_col())};
        const QTile q_cols{q_tile(stage).at(0, 16 * DIM_BLOCKS * warp_col())};
        spread_nonfinite(dv, as_loaded<T>(do_cols), sees);
        spread_nonfinite(dk, as_loaded<T>(q_cols), sees);
    }

    // dq_sum += dS K
    DEVICE void sum_dq(Place place, Factor ds_inverse, bool nonfinite) {
        const int warp = warp_index();
        const int warp_row = warp % Config::DQ_ROW_WARPS * (16 * DQ_ROW_BLOCKS);
        const int col_block = warp / Config::DQ_ROW_WARPS * DQ_COL_BLOCKS;
        Accumulator<Real> dq[DQ_ROW_BLOCKS][DQ_COL_BLOCKS] = {};
        add_weighted_rows<M, Config::UNROLL>(
            dq,
            [&](int i, int k) { return M::load_a_transposed(ds_tile(), warp_row + 16 * i, k); },
            k_tile(), 16 * col_block, joint(ds_inverse, inverse(OF_K)));
        const int32 first_row = place.tile * Config::TILE_M + warp_row;
        if (nonfinite) {
            __syncthreads();
            load_k();
            commit_copies();
            finish_loads();
            const KTile k_cols{k_tile().at(0, 16 * col_block)};
            spread_nonfinite(dq, as_loaded<T>(k_cols), [&](int row, int key) {
                return score.sees(first_row + row, first_key + key);
            });
            if constexpr (BlockOperands::SPLIT) {
                __syncthreads();
                operands().make(operand(k_tile(), OF_K));
            }
        }
        Real* const sum =
            load_shared<Real*>(origin(DQ_SUM)) + place.head * params.dq_sum.head +
            first_row * params.dq_sum.row + col_block * SUM_BLOCK;
#pragma unroll
        for (int i = 0; i < DQ_ROW_BLOCKS; ++i) {
            if (first_row + 16 * i < params.seqlen_q) {
#pragma unroll
                for (int j = 0; j < DQ_COL_BLOCKS; ++j) {
                    if (16 * (col_block + j) < params.dq_sum.row) {
                        add_block(sum + 16 * i * params.dq_sum.row + j * SUM_BLOCK, dq[i][j]);
                    }
                }
            }
        }
    }

    DEVICE void walk_queries() {
        const TileRange first = query_tiles();
        if (first.begin == first.end) return;
        const bool all_full =
            keys_exist() && first.full_begin <= first.begin && first.full_end >= first.end;

        store_origins();
        Place place = {0, first.begin};
        load_k();
        load_v();
        load_queries(place, 0);
        if (BlockOperands::SPLIT || (Config::SUM_DQ && !all_full)) {
            wait_copies<0>();
            operands().make(operand(k_tile(), OF_K), operand(v_tile(), OF_V));
        }
        if (Config::SUM_DQ && !all_full) {
            k_nonfinite = any_nonfinite(operands(), operand(k_tile(), OF_K));
        }
        for (int stage = 0; place.head < params.group; stage = (stage + 1) % Config::STAGES) {
            const TileRange tiles = query_tiles();
            Place next = {place.head, place.tile + 1};
            if (next.tile == tiles.end) next = {place.head + 1, tiles.begin};
            if constexpr (Config::ALIBI) {
                if (place.tile == tiles.begin) score = {params, query_head(place.head)};
            }
            step(place, next, stage, !keys_exist() || !tiles.is_full(place.tile));
            place = next;
        }
    }

    // dk and dv, to global memory; by way of shared memory, so that whole rows are written.
    DEVICE void store() {
        __syncthreads();  // all warps have read k and v
        const Real scale = Config::SOFTCAP ? 1 : scalars<Real>(params).scale;
        const auto dk_tile = as_loaded<T>(k_tile());
        const auto dv_tile = as_loaded<T>(v_tile());
        store_accumulators(dk_tile, warp_key(), 16 * DIM_BLOCKS * warp_col(), dk, scale);
        store_accumulators(dv_tile, warp_key(), 16 * DIM_BLOCKS_V * warp_col(), dv, One{});
        __syncthreads();
        const HeadIndex index = key_head();
        copy_to_global<Config::THREADS, Config::ACCESS_BYTES>(
            dk_tile, head_data<T>(params.dk, index, index.head) + first_key * params.dk.row,
            params.dk.row, params.seqlen_k - first_key, params.head_dim);
        copy_to_global<Config::THREADS, Config::ACCESS_BYTES>(
            dv_tile, head_data<T>(params.dv, index, index.head) + first_key * params.dv.row,
            params.dv.row, params.seqlen_k - first_key, params.head_dim_v);
    }
};

// One block for every tile of keys of every key head, first those that most rows of a mask see.
extern "C" __global__ void __launch_bounds__(Config::THREADS, Config::BLOCKS_PER_SM)
    attention_backward(const __grid_constant__ AttentionParams params) {
    Backward<Config> backward(params);
    backward.walk_queries();
    backward.store();
}
