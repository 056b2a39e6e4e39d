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
//   warps   one for each consumer: tells  <=== DQ_FULL ==== |   wait dK, release Q
//   from 1  other blocks what is added    ==== DQ_EMPTY ==> | (in turns in every step, and at the
//           (pass_turns)                                    | end)
//
// To add dQ takes as long as all products of a step, or longer. Where there are registers for it
// (AHEAD), it goes on behind everything else. A consumer then has two parts of dQ, of 64 dims each:
//
//   the consumers have met                        | adds the end of part 2 of dQ(i - 1)
//   issue dQ(i), part 1 and 2; issue dV; issue dK |
//   wait part 1                                   | adds most of it
//   wait all, release dO and Q; issue S(i + 1)    | adds the rest of part 1, a piece of part 2
//   wait S(i + 1); issue dP(i + 1); P, dS         | adds part 2, piece by piece, in between
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
    // Whether a step computes S of the next one, for which others have no registers.
    static constexpr bool AHEAD = DQ_PARTS / CONSUMERS == 2 && !SOFTCAP && !CONSUMERS_DIFFER;
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
    using DqPart = float[TILE_M / 2];          // 64 dims x TILE_M queries
    static constexpr int PIECES = TILE_M / 8;  // of such a part: what one instruction adds

    // Whether a step computes S of the next one, and leaves its second part of dQ to it.
    static constexpr bool AHEAD = Config::AHEAD;
    // How many pieces of the first part are added before S of the next step is issued, and how many
    // of the second part by the time that S is there, P, dS. By measurement.
    static constexpr int FIRST_PIECES = PIECES - 2;
    static constexpr int LATE_WITH_S = 1, LATE_WITH_P = 3, LATE_WITH_DS = 6;
    static_assert(LATE_WITH_DS <= PIECES);

    Sums<PARTS> dk;
    Sums<MY_DV_PARTS == 0 ? 1 : MY_DV_PARTS> dv;
    bool adds;         // dQ, as it is not spoilt: known from the first step on
    DqPart late_dq;    // what a step has left to the next one
    float* late_sums;  // what it is added to, or null

    DEVICE Consumer(const Block& block, int index, Progress before)
        : Base(block, index, before),
          dk{},
          dv{},
          adds(true),
          late_sums(nullptr) {}

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

    // dQ^T = K^T dS^T, one block of this consumer's dims.
    DEVICE void multiply_dq(DqPart& dq, int part, int stage) const {
#pragma unroll
        for (int key = 0; key < TILE_N; key += 16) {
            wgmma_ss<T, TILE_M, true, false>(dq, block.k_tile().mn_major(key, first_dim(part)),
                                             block.ds_tile(stage).k_major(0, key), key > 0);
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
            add_late_half(r, LATE_WITH_S, LATE_WITH_P);
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
            add_late_half(r, LATE_WITH_P, LATE_WITH_DS);
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

    // ---- dQ to dq_sum ---------------------------------------------------------------------------
    //
    // An addition that finds the way to L2 occupied waits, and its warp with it: so (AHEAD) they
    // stand between everything else that a step does.

    DEVICE float* part_sums(const Step& step, int part) const {
        return block.dq_sums(step) + (index + Config::CONSUMERS * part) * Dq::PART +
               Dq::at(thread(), 0);
    }
    static DEVICE void add_pieces(float* sums, const DqPart& dq, int begin, int end) {
#pragma unroll
        for (int i = begin; i < end; ++i) {
            add_global<ADD_WIDTH>(sums + Dq::at(0, i), &dq[4 * i]);
        }
    }
    // Of what the step before has left.
    DEVICE void add_late(int begin, int end) const {
        if constexpr (AHEAD) {
            if (late_sums) add_pieces(late_sums, late_dq, begin, end);
        }
    }
    // The first or the second half of these pieces.
    DEVICE void add_late_half(int half, int begin, int end) const {
        const int middle = (begin + end) / 2;
        add_late(half == 0 ? begin : middle, half == 0 ? middle : end);
    }
    // Before the first addition of a step.
    DEVICE void begin_adding(const Step& step) {
        if (Config::BAND && step.first) {
            block.wait_for_inspectors();
            adds = !block.is_set(Block::DQ_SPOILT);
        }
        if (Config::DETERMINISTIC && adds) {
            wait_for_turn(block.dq_turns(step) + index, block.turn(step.tile));
        }
    }
    // After the last one of a step, in turns, and of a block: to the warp that says so to others.
    DEVICE void end_adding() const {
        if (!adds) return;
        sync_named(Block::DQ_EMPTY + index, Block::DQ_THREADS);
        arrive_named(Block::DQ_FULL + index, Block::DQ_THREADS);
    }
    DEVICE void end_turn() const {
        if constexpr (Config::DETERMINISTIC) end_adding();
    }

    // ---- a step ---------------------------------------------------------------------------------

    // S of the step that has a number.
    DEVICE void multiply_q_k(Scores& s, uint32 number) const {
        const Step step = {0, 0, number, false};
        wait_for(block.barrier(Block::Q_FULL + step.stage()), step.parity());
        wgmma_fence();
        multiply_rows<Config::HEAD_DIM>(s, block.q_tile(step.stage()), block.k_tile());
    }

    // P and dS of a step to shared memory. S is there or on its way.
    DEVICE void compute_weights(Scores& s, const Step& step) const {
        const int stage = step.stage();
        Scores dp;
        wait_for(block.barrier(Block::DO_FULL + stage), step.parity());
        if constexpr (AHEAD) wgmma_fence();  // else S, just issued, has had it
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
        fence_async_shared();
        this->meet_consumers();
    }

    DEVICE void compute(const Step& step) {
        const int stage = step.stage();
        Scores s;
        multiply_q_k(s, step.index);
        compute_weights(s, step);

        DqPart dq[PARTS];
        wgmma_fence();
        add_weighted<MY_DV_PARTS>(dv, block.do_tile(stage), block.p_tile(stage));
#pragma unroll
        for (int part = 0; part < PARTS; ++part) multiply_dq(dq[part], part, stage);
        wgmma_wait<PARTS>();
        release(Block::DO_EMPTY + stage);
        add_weighted<PARTS>(dk, block.q_tile(stage), block.ds_tile(stage));
        wgmma_wait<1>();
        begin_adding(step);
        if (adds) {
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                add_pieces(part_sums(step, part), dq[part], 0, PIECES);
            }
        }
        end_turn();
        wgmma_wait<0>();
        this->inspect_queries(step);
        this->release_q(stage);
    }

    // The same, of which S is there, and S of the step that has the number `next`.
    DEVICE void compute_ahead(Scores& s, const Step& step, uint32 next) {
        const int stage = step.stage();
        compute_weights(s, step);
        add_late(LATE_WITH_DS, PIECES);
        if (!step.first) end_turn();

        DqPart dq;
        wgmma_fence();
        multiply_dq(dq, 0, stage);
        multiply_dq(late_dq, 1, stage);
        add_weighted<MY_DV_PARTS>(dv, block.do_tile(stage), block.p_tile(stage));
        add_weighted<PARTS>(dk, block.q_tile(stage), block.ds_tile(stage));
        wgmma_wait<3>();
        begin_adding(step);
        float* const sums = part_sums(step, 0);
        if (adds) add_pieces(sums, dq, 0, FIRST_PIECES);
        wgmma_wait<0>();
        release(Block::DO_EMPTY + stage);
        this->release_q(stage);
        multiply_q_k(s, next);
        if (adds) add_pieces(sums, dq, FIRST_PIECES, PIECES);
        late_sums = adds ? part_sums(step, 1) : nullptr;
        add_late(0, LATE_WITH_S);
        wgmma_wait<0>();
    }

    DEVICE Progress walk_queries(const TileRange& tiles) {
        if constexpr (!AHEAD) {
            return block.for_each_step(before, [&](const Step& step) {
                if (step.tile == tiles.begin) this->enter_head(step);
                compute(step);
            });
        } else {
            if (tiles.begin == tiles.end) return before;
            // Behind the last step its own S is computed once more, which nobody takes: a product
            // that only some steps compute would make the compiler wait for every one of them. Its
            // Q is released by then, but nothing more is loaded.
            const uint32 last = before.steps + block.params.group * (tiles.end - tiles.begin) - 1;
            Scores s;
            multiply_q_k(s, before.steps);
            wgmma_wait<0>();
            const Progress done = block.for_each_step(before, [&](const Step& step) {
                if (step.tile == tiles.begin) this->enter_head(step);
                compute_ahead(s, step, min(step.index + 1, last));
            });
            add_late(LATE_WITH_S, PIECES);
            end_turn();
            return done;
        }
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
        const Progress done = walk_queries(tiles);
        end_adding();
        this->meet_consumers();  // nobody reads K and V any more
        const float scale = gradient_scale<Config>(block.params);
        store<MY_DV_PARTS>(dv, 1, block.v_tile());
        store<PARTS>(dk, scale, block.k_tile());
        fence_async_shared();
        sync_named(Block::ONE_CONSUMER + index, WARPGROUP);
        if (leads()) {
            const HeadIndex head = block.key_head();
            send<MY_DV_PARTS>(block.v_tile(), head, block.maps.dv);
            send<PARTS>(block.k_tile(), head, block.maps.dk);
            commit_bulk();
            wait_bulk_read<0>();
        }
        sync_named(Block::DQ_EMPTY + index, Block::DQ_THREADS);  // the last arrival of pass_turns
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
