// Backward attention on wgmma and TMA (sm_90a) for head dims above 128, of which the accumulators
// of dK and dV are too wide for one warpgroup: hopper_backward.cu's pipeline, its products shared
// out otherwise. A consumer computes S and dP for all queries of a step and some of the keys, and,
// of dV^T, dK^T and dQ^T, blocks of 64 dims for all keys and queries. So P and dS both go through
// shared memory, to all consumers.
//
//   warp 0  producer     Q, dO >===== q_full, do_full ====> | consumers, a step:
//           (TMA)        two stages <== q_empty, do_empty = |   issue S = Q K^T; issue dP = dO V^T
//                        K ============= keys_full =======> |   wait S; P, to shared memory
//   warp 1  to L2 what the next block begins with           |   wait dP; dS, to shared memory
//                                                           |   meet the others: they are complete
//                                                           |   issue dV^T += dO^T P
//                                                           |   issue dQ^T = K^T dS^T
//                                                           |   wait dV, release dO
//   warps   inspectors   ================ inspected ======> |   issue dK^T += Q^T dS
//   1 to 3  (BAND only)  dq_sum, in global memory <======== |   wait dQ, add it
//                                                           |   wait dK, release Q
//
// Lower case: mbarriers, one for each stage. Where P and dS have two stages, they need no barriers
// of their own: who writes those of step i has met the others in step i - 1, after they waited for
// their products of step i - 2, which read the same stage. Where they have one, all meet once more
// before they are stored. What is done about non-finite values: see hopper_backward.cu.
#include "hopper_backward_consumer.cuh"

// One row of the table in flash_cupy/cuda/hopper_backward.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;          // queries of a step
    static constexpr int TILE_N = PLAN_TILE_N;          // keys of a block
    static constexpr int HEAD_DIM = PLAN_HEAD_DIM;      // of q and k, filled up with zeros
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;  // of v and o
    static constexpr bool BAND = PLAN_BAND;
    static constexpr bool SOFTCAP = PLAN_SOFTCAP;
    static constexpr bool ALIBI = PLAN_ALIBI;
    static constexpr bool DETERMINISTIC = PLAN_DETERMINISTIC;  // adds to dq_sum in a fixed order
    static constexpr int CONSUMERS = PLAN_WARPS / 4 - 1;       // warpgroups
    static constexpr int STAGES = PLAN_STAGES;                 // of Q and dO
    static constexpr int WEIGHT_STAGES = PLAN_WEIGHT_STAGES;   // of P and dS
    static constexpr int DQ_PARTS = HEAD_DIM / 64;
    static constexpr int DV_PARTS = HEAD_DIM_V / 64;
    static constexpr bool CONSUMERS_DIFFER = DV_PARTS % CONSUMERS != 0;  // have code of their own
    static constexpr bool WIDE = true;
    static constexpr int HEAD_ROWS = 0;  // a block computes one tile of keys
    static constexpr bool WHOLE_HEAD = false;
    static constexpr bool KEYS_IN_REGISTERS = false;
    // Of a thread of warpgroup 0 and of the others: together what the block was launched with.
    static constexpr int PRODUCER_REGISTERS = CONSUMERS == 2 ? 24 : 32;
    static constexpr int CONSUMER_REGISTERS = CONSUMERS == 2 ? 240 : 160;
    static constexpr int SHARED_BYTES = PLAN_SHARED_BYTES;

    static constexpr int THREADS = PLAN_WARPS * WARP;
    static_assert(TILE_M == 64 && TILE_N % (16 * CONSUMERS) == 0 && DQ_PARTS % CONSUMERS == 0 &&
                      HEAD_DIM_V % 64 == 0 && STAGES == 2,
                  "what the pipeline is made for");
};

// A consumer warpgroup, from the first step to its columns of dK and dV, which are MY_DV_PARTS
// blocks of 64.
template <class Config, int MY_DV_PARTS>
struct Consumer : BackwardConsumer<Config> {
    using Base = BackwardConsumer<Config>;
    using typename Base::Block;
    using typename Base::Dq;
    using typename Base::Progress;
    using typename Base::Step;
    using typename Base::T;
    using Base::before, Base::block, Base::index, Base::score, Base::TILE_M, Base::TILE_N;
    using Base::leads, Base::release, Base::thread, Base::warp_row;
    static constexpr int KEYS = TILE_N / Config::CONSUMERS;             // of S and dP
    static constexpr int PARTS = Config::DQ_PARTS / Config::CONSUMERS;  // blocks of 64 dims

    using Scores = float[KEYS / 2];           // accumulators, 64 queries x KEYS
    template <int COUNT>
    using Sums = float[COUNT][TILE_N / 2];    // 64 dims x TILE_N keys each
    using DqSums = float[PARTS][TILE_M / 2];  // 64 dims x TILE_M queries each

    Sums<PARTS> dk;
    Sums<MY_DV_PARTS == 0 ? 1 : MY_DV_PARTS> dv;
    bool adds;  // dQ, as it is not spoilt: known from the first step on

    DEVICE Consumer(const Block& block, int index, Progress before)
        : Base(block, index, before), dk{}, dv{}, adds(true) {}

    DEVICE int first_row() const {  // of this consumer in the tiles of keys
        return KEYS * index;
    }
    DEVICE int first_dim(int part) const {
        return 64 * (index + Config::CONSUMERS * part);
    }
    // The first query and key of this lane's scores: value 4i + 2r + e of them belongs to query +
    // 8r and key + 8i + e.
    DEVICE int32 lane_query(int32 tile) const {
        return tile * TILE_M + warp_row() + lane_index() / 4;
    }
    DEVICE int32 lane_key() const {
        return block.first_key + first_row() + 2 * (lane_index() % 4);
    }

    // acc = a b^T: the rows of a tile multiplied with this consumer's of another.
    template <int COLS, class ATile, class BTile>
    DEVICE void multiply_rows(Scores& acc, ATile a, BTile b) const {
#pragma unroll
        for (int k = 0; k < COLS; k += 16) {
            wgmma_ss<T, KEYS, false, false>(acc, a.k_major(0, k), b.k_major(first_row(), k), k > 0);
        }
        wgmma_commit();
    }

    // acc += rows^T weights: dims of the rows of a tile (queries), for every key.
    template <int COUNT, class Acc, class Tile>
    DEVICE void add_weighted(Acc& acc, Tile rows, typename Block::DsTile weights) const {
#pragma unroll
        for (int part = 0; part < COUNT; ++part) {
#pragma unroll
            for (int k = 0; k < TILE_M; k += 16) {
                wgmma_ss<T, TILE_N, true, true>(acc[part], rows.mn_major(k, first_dim(part)),
                                                weights.mn_major(k, 0), true);
            }
        }
        wgmma_commit();
    }

    // dQ^T = K^T dS^T, this consumer's dims.
    DEVICE void multiply_dq(DqSums& dq, int stage) const {
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int key = 0; key < TILE_N; key += 16) {
                wgmma_ss<T, TILE_M, true, false>(dq[part],
                                                 block.k_tile().mn_major(key, first_dim(part)),
                                                 block.ds_tile(stage).k_major(0, key), key > 0);
            }
        }
        wgmma_commit();
    }

    // lse and D of a row of this lane's.
    DEVICE RowTerms<float> load_terms(const Step& step, int r) const {
        const int row = warp_row() + lane_index() / 4 + 8 * r;
        const uint32 pair = block.terms(step.stage()) +
                            row / 2 * static_cast<int>(sizeof(typename Block::Terms)) +
                            row % 2 * static_cast<int>(sizeof(float));
        return {load_shared<float>(pair), load_shared<float>(pair + 2 * sizeof(float))};
    }

    // P from S, in place. With a softcap, which needs S, also dP becomes (dP - D) * derivative.
    DEVICE void exponentiate(Scores& s, Scores& dp, const Step& step) const {
        const int32 key = lane_key(), query = lane_query(step.tile);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const RowTerms<float> terms = load_terms(step, r);
#pragma unroll
            for (int j = 0; j < KEYS / 4; ++j) {
                const int x = j / 2 * 4 + 2 * r + j % 2;
                float derivative;
                const float exponent = score.modify_with_slope(
                    s[x], query + 8 * r, key + j / 2 * 8 + j % 2, derivative);
                s[x] = exp2_real(exponent * score.factor - terms.lse);
                if constexpr (Config::SOFTCAP) dp[x] = (dp[x] - terms.dot) * derivative;
            }
        }
    }

    // dS from P and dP, in place of dP.
    DEVICE void differentiate(const Scores& p, Scores& dp, const Step& step) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float dot = Config::SOFTCAP ? 0 : load_terms(step, r).dot;
#pragma unroll
            for (int j = 0; j < KEYS / 4; ++j) {
                const int x = j / 2 * 4 + 2 * r + j % 2;
                dp[x] = p[x] * (dp[x] - dot);
            }
        }
    }

    // Zeros where a query does not see a key, or one of them does not exist.
    DEVICE void mask(Scores& values, const Step& step) const {
        const int32 start = lane_key();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32 query = lane_query(step.tile) + 8 * r;
            const auto keys = score.keys(query);
            const int32 last = query < block.params.seqlen_q ? keys.last - start : -1;
            const uint32 seen = column_bits(keys.first - start, last);
#pragma unroll
            for (int j = 0; j < KEYS / 4; ++j) {
                if (!(seen & 1u << j)) values[j / 2 * 4 + 2 * r + j % 2] = 0;
            }
        }
    }

    // Scores to this consumer's columns of a tile of all.
    DEVICE void store_scores(const Scores& x, typename Block::DsTile tile) const {
        const int lane = lane_index();
#pragma unroll
        for (int i = 0; i < KEYS / 2; i += 8) {
            store_matrix_x4(
                tile.at(warp_row() + lane % 16, first_row() + 2 * i + lane / 16 * 8),
                pack<T>(x[i], x[i + 1]), pack<T>(x[i + 2], x[i + 3]), pack<T>(x[i + 4], x[i + 5]),
                pack<T>(x[i + 6], x[i + 7]));
        }
    }

    // Adds dQ to dq_sum, in turns if need be; nothing if it is spoilt.
    DEVICE void add_dq(const DqSums& dq, const Step& step) {
        if (Config::BAND && step.first) {
            block.wait_for_inspectors();
            adds = !block.is_set(Block::DQ_SPOILT);
        }
        if (!adds) return;
        float* const sums = block.dq_sums(step) + Dq::at(thread(), 0);
        if constexpr (Config::DETERMINISTIC) {
            wait_for_turn(block.dq_turns(step) + index, block.turn(step.tile));
        }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
#pragma unroll
            for (int i = 0; i < TILE_M / 8; ++i) {
                add_global<ADD_WIDTH>(
                    sums + (index + Config::CONSUMERS * part) * Dq::PART + Dq::at(0, i),
                    &dq[part][4 * i]);
            }
        }
        if constexpr (Config::DETERMINISTIC) {
            sync_named(Block::ONE_CONSUMER + index, WARPGROUP);
            if (leads()) pass_turn(block.dq_turns(step) + index);
        }
    }

    // P and dS of a step to shared memory.
    DEVICE void compute_weights(const Step& step) const {
        const int stage = step.stage();
        Scores s, dp;
        wait_for(block.barrier(Block::Q_FULL + stage), step.parity());
        wgmma_fence();
        multiply_rows<Config::HEAD_DIM>(s, block.q_tile(stage), block.k_tile());
        wait_for(block.barrier(Block::DO_FULL + stage), step.parity());
        multiply_rows<Config::HEAD_DIM_V>(dp, block.do_tile(stage), block.v_tile());
        const bool partial = block.is_partial(step.tile);
        wgmma_wait<Config::SOFTCAP ? 0 : 1>();
        exponentiate(s, dp, step);
        // This branch also keeps the compiler from moving the exponentials behind the wait for dP.
        if (partial) mask(s, step);
        if constexpr (Config::WEIGHT_STAGES == 1) this->meet_consumers();
        store_scores(s, block.p_tile(stage));
        wgmma_wait<0>();
        differentiate(s, dp, step);
        if (partial) mask(dp, step);  // P = 0 does not suffice where V or D is not finite
        store_scores(dp, block.ds_tile(stage));
    }

    DEVICE void compute(const Step& step) {
        const int stage = step.stage();
        const auto q = block.q_tile(stage);
        const auto do_ = block.do_tile(stage);
        compute_weights(step);
        fence_async_shared();
        this->meet_consumers();

        DqSums dq;
        wgmma_fence();
        add_weighted<MY_DV_PARTS>(dv, do_, block.p_tile(stage));
        multiply_dq(dq, stage);
        wgmma_wait<1>();
        release(Block::DO_EMPTY + stage);
        add_weighted<PARTS>(dk, q, block.ds_tile(stage));
        wgmma_wait<1>();
        add_dq(dq, step);
        wgmma_wait<0>();
        this->inspect_queries(step);
        this->release_q(stage);
    }

    // This consumer's columns of dk or dv to `tile`, which no one reads any more.
    template <int COUNT, class Acc, class Tile>
    DEVICE void store(const Acc& acc, float scale, Tile tile) const {
        const int lane = lane_index();
#pragma unroll
        for (int part = 0; part < COUNT; ++part) {
            const uint32 row = tile.at(lane / 16 * 8 + lane % 8,
                                       first_dim(part) + warp_row() + lane / 8 % 2 * 8);
#pragma unroll
            for (int i = 0; i < TILE_N / 2; i += 8) {
                const float(&x)[TILE_N / 2] = acc[part];
                store_matrix_transposed_x4(row + 2 * i * tile.ROW_BYTES,
                                           pack<T>(x[i] * scale, x[i + 1] * scale),
                                           pack<T>(x[i + 2] * scale, x[i + 3] * scale),
                                           pack<T>(x[i + 4] * scale, x[i + 5] * scale),
                                           pack<T>(x[i + 6] * scale, x[i + 7] * scale));
            }
        }
    }
    // And from there to the tensor.
    template <int COUNT, class Tile>
    DEVICE void send(Tile tile, const HeadIndex& head, const TensorMap& map) const {
#pragma unroll
        for (int part = 0; part < COUNT; ++part) {
            store_box(&map, box_place(head, head.head, block.first_key, first_dim(part)),
                      tile.at(0, first_dim(part)));
        }
    }

    DEVICE Progress run() {
        const TileRange tiles = block.query_tiles();
        block.rounding().wait_for_place(block.load_word(Block::NUMBER));
        this->wait_for_keys();
        const Progress done = block.for_each_step(before, [&](const Step& step) {
            if (step.tile == tiles.begin) this->enter_head(step);
            compute(step);
        });
        this->meet_consumers();  // nobody reads K and V any more, or adds to dq_sum
        if (leads() && adds) pass_turn(block.rounding().added(block.load_word(Block::NUMBER)));
        const float scale = gradient_scale<Config>(block.params);
        store<MY_DV_PARTS>(dv, 1, block.v_tile());
        store<PARTS>(dk, scale, block.k_tile());
        fence_async_shared();
        sync_named(Block::ONE_CONSUMER + index, WARPGROUP);
        if (!leads()) return done;
        const HeadIndex head = block.key_head();
        send<MY_DV_PARTS>(block.v_tile(), head, block.maps.dv);
        send<PARTS>(block.k_tile(), head, block.maps.dk);
        commit_bulk();
        wait_bulk_read<0>();
        return done;
    }
};

// Where the blocks of dV are no multiple of the consumers, the last one has one less: code of its
// own, as a product under an `if` would make the compiler wait for every one of them.
template <class Config>
struct AnyConsumer {
    using Block = BackwardBlock<Config>;
    using Progress = typename Block::Progress;

    const Block& block;
    const int index;
    const Progress before;

    DEVICE AnyConsumer(const Block& block, int index, Progress before)
        : block(block), index(index), before(before) {}

    DEVICE Progress run() const {
        constexpr int FEW = Config::DV_PARTS / Config::CONSUMERS;
        constexpr int LAST = Config::CONSUMERS - 1, MORE = Config::DV_PARTS % Config::CONSUMERS;
        static_assert(MORE == 0 || MORE == LAST);
        if constexpr (MORE == 0) {
            return Consumer<Config, FEW>(block, index, before).run();
        } else if (index < LAST) {
            return Consumer<Config, FEW + 1>(block, index, before).run();
        } else {
            // A constant, so that addresses are uniform.
            return Consumer<Config, FEW>(block, LAST, before).run();
        }
    }
};

// One block for every tile of keys of every key head.
extern "C" __global__ void __launch_bounds__(Config::THREADS, 1)
    hopper_backward_wide(const __grid_constant__ AttentionParams params,
                         const __grid_constant__ BackwardMaps maps) {
    run_block<Config, AnyConsumer<Config>>(params, maps);
}
