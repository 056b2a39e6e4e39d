// Backward attention on wgmma and TMA (sm_90a), up to head dim 128: a block of threads computes
// TILE_N rows of dk and dv for one key head, and what these keys add to dq; or, of a short head
// that shares its keys with no other (WHOLE_HEAD), a tile after the other, all of dk, dv and dq.
//
//   for each query head of the group, for each tile of queries that sees the keys (a step):
//       S^T = K Q^T, dP^T = V dO^T     (TILE_N x TILE_M, in registers)
//       P^T = 2^(modify(S^T) - lse)    0 where masked
//       dS^T = P^T * (dP^T - D)        times the softcap's derivative
//       dV += P^T dO                   (TILE_N x HEAD_DIM_V, in registers)
//       dK += dS^T Q                   (TILE_N x HEAD_DIM, in registers)
//       dq_sum += dS K                 (TILE_M x HEAD_DIM, in device or shared memory)
//
// Warpgroup 0 feeds the others and takes dQ from them; each of the CONSUMERS owns 64 keys. With
// keys as rows the accumulators of S^T and dP^T become operands of the products for dV and dK as
// they are; only dS goes through shared memory, to become dQ^T = K^T dS^T, of which a consumer
// computes 64 dims, or the dims of a part of the queries where there are no more.
//
//   warp 0  producer     Q, dO >===== q_full, do_full ====> | consumers 1, 2, a step:
//           (TMA)        two stages <== q_empty, do_empty = |   issue S(i); issue dP(i)
//                        K ============= keys_full =======> |   wait S(i); P(i)
//   warps   inspectors                                      |   wait dP(i); dS(i)
//   1 to 3  (BAND only)                                     |   dS(i) to shared memory
//                                                           |      == ds_full =======> both
//   warps   writers,     dQ <============= DQ_FULL ======== |   issue dV(i)
//   2, 3    one for each adds it to dq_sum                  |   wait ds_full; issue dQ(i - 1)
//           consumer     ================= DQ_EMPTY ======> |   wait dV(i), release dO
//                                                           |   issue dK(i)
//                                                           |   wait dQ(i - 1), hand it over
//                                                           |      == ds_empty ======> both
//   warp 1  to L2 what the next block begins with           |   wait dK(i), release Q
//                                                           | at the end:
//                                                           |   issue the last dQ; dV goes out
//                                                           |   wait dQ, hand it over
//           inspectors   ================ inspected ======> |   meet the other; dK goes out
//
// Lower case: mbarriers, one for each stage; upper case: named barriers. dQ takes the dS of both
// consumers. As it is computed a step late, they need not be in step: while one computes
// exponentials, the other multiplies. Where EARLY_EXPONENTIALS is not set, P is computed behind
// both products, with dS, and the product for dV may be issued before dS is stored (DV_FIRST). That
// for dK may be issued before dV is waited for (DK_EARLY). A consumer of whose keys no query of the
// step sees any stores zeros for dS and computes dQ alone.
//
// WHOLE_HEAD: there are no writers, as a consumer adds its part of dQ to words of its own, and no
// order in which blocks would have to add. dK and dV leave by way of dS, and the producer loads the
// next K and V (keys_full) once the consumers have the present ones in registers (keys_empty).
//
// KEYS_IN_REGISTERS: with head dims of 64 and 64 queries a step there is room for K and V as
// operands of S^T, dP^T and dQ^T. The products then read half as much shared memory, which is what
// bounds them.
//
// Non-finite values, see nonfinite.cuh: the inspectors look for those of K, and, in tiles of which
// some query does not see some key, by their row terms, for those of Q and dO (with a softcap,
// which hides them, the consumers look through Q). Those of K spoil dQ, those of Q and dO dK and
// dV: the block computes them anew at its end (hopper_backward_pairs.cuh), of dQ, which adds up
// with that of other blocks, nothing having been added before. Missing queries and keys need no
// inspection: TMA fills up with zeros.
#include "hopper_backward_gradients.cuh"

// One row of the table in flash_cupy/cuda/hopper_backward.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int TILE_M = PLAN_TILE_M;          // queries of a step
    static constexpr int TILE_N = PLAN_TILE_N;          // keys of a tile
    static constexpr int HEAD_DIM = PLAN_HEAD_DIM;      // of q and k, filled up with zeros
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;  // of v and o
    static constexpr bool BAND = PLAN_BAND;
    static constexpr bool SOFTCAP = PLAN_SOFTCAP;
    static constexpr bool ALIBI = PLAN_ALIBI;
    static constexpr bool DETERMINISTIC = PLAN_DETERMINISTIC;  // adds to dq_sum in a fixed order
    static constexpr int CONSUMERS = PLAN_WARPS / 4 - 1;       // warpgroups
    static constexpr int STAGES = PLAN_STAGES;                 // of Q and dO
    static constexpr int WEIGHT_STAGES = STAGES;               // of dS
    static constexpr int DQ_PARTS = CONSUMERS;
    // Whether consumers leave out products of which they see nothing. With more queries a step that
    // is too rare to pay for the branch.
    static constexpr bool SKIPS_PRODUCTS = BAND && TILE_M == 64;
    static constexpr bool CONSUMERS_DIFFER = false;  // have code of their own
    // Whether the writers let bulk additions see dQ in shared memory, or the consumers. It takes
    // some 250 clocks.
    static constexpr bool WRITERS_FENCE = PLAN_WRITERS_FENCE;
    // Whether a consumer takes a step for partial by its own keys, or by all of the block.
    static constexpr bool OWN_MASKS = PLAN_OWN_MASKS;
    static constexpr bool WIDE = false;
    static constexpr bool EARLY_EXPONENTIALS = PLAN_EARLY_EXPONENTIALS;  // before the wait for dP
    static constexpr int HEAD_ROWS = PLAN_HEAD_ROWS;  // most queries of a block with a whole head
    static constexpr bool WHOLE_HEAD = HEAD_ROWS > 0;
    static constexpr bool KEYS_IN_REGISTERS =
        HEAD_DIM == 64 && HEAD_DIM_V == 64 && TILE_M == 64;
    // Of a thread of warpgroup 0 and of the others: together what the block was launched with.
    static constexpr int PRODUCER_REGISTERS = WHOLE_HEAD ? 40 : 24;
    static constexpr int CONSUMER_REGISTERS = WHOLE_HEAD ? 232 : 240;
    static constexpr int SHARED_BYTES = PLAN_SHARED_BYTES;

    static constexpr int THREADS = PLAN_WARPS * WARP;
    static_assert(TILE_N == 64 * CONSUMERS && TILE_M <= 128 && STAGES == 2,
                  "what the pipeline and its masks are made for");
    static_assert(!WHOLE_HEAD || (KEYS_IN_REGISTERS && HEAD_ROWS % TILE_M == 0),
                  "dk and dv find room in dS, all of dq in Q, dO and dS");
};

// A consumer warpgroup: 64 keys, from the first step to their dK and dV.
template <class Config>
struct Consumer : GradientConsumer<Config> {
    using Base = GradientConsumer<Config>;
    using typename Base::Block;
    using typename Base::Dq;
    using typename Base::DqSums;
    using typename Base::Progress;
    using typename Base::Step;
    using typename Base::T;
    using Base::before, Base::block, Base::index, Base::score, Base::TILE_M;
    using Base::dk, Base::dv, Base::first_row, Base::warp_row;
    using Base::leads, Base::load_dq, Base::pass_dq, Base::release;

    using Scores = float[TILE_M / 2];           // accumulators, 64 x TILE_M of the warpgroup
    using Weights = uint32[TILE_M / 16][4];     // the same as operands of products

    // Terms of the rows of a step, in pairs of neighbours. Where there are registers for them, they
    // are loaded before the wait for a product, else where they are needed.
    struct alignas(8) Two {
        float value[2];
    };
    using Terms = Two[TILE_M / 8];
    static constexpr bool EARLY_TERMS = Config::KEYS_IN_REGISTERS;
    // Whether a step's product for dV is issued before dS is stored, or behind that.
    static constexpr bool DV_FIRST =
        !Config::EARLY_EXPONENTIALS && Config::HEAD_DIM > 64 && TILE_M == 64;
    // Whether its product for dK is issued before that for dV is waited for, or behind that.
    static constexpr bool DK_EARLY = Config::BAND && TILE_M == 64;

    // Operands that stay in registers where there is room for them: products then read less shared
    // memory, which is what bounds them. This consumer's rows of K and V, and its dims of K^T.
    template <int COLS>
    using Operand = uint32[Config::KEYS_IN_REGISTERS ? COLS / 16 : 1][4];
    Operand<Config::HEAD_DIM> k_rows;
    Operand<Config::HEAD_DIM_V> v_rows;
    Operand<Config::TILE_N> k_columns;

    // Where this lane stores dS, in the first stage, if there is a register to keep it.
    static constexpr bool KEEPS_DS_ROW =
        !Config::KEYS_IN_REGISTERS && !(Config::BAND && TILE_M == 128);
    const uint32 ds_row;

    DEVICE Consumer(const Block& block, int index, Progress before)
        : Base(block, index, before), ds_row(recompute_from(find_ds_row(lane_index()))) {}

    DEVICE uint32 find_ds_row(int lane) const {
        return block.ds_tile(0).at(lane / 16 * 8 + lane % 8,
                                   first_row() + warp_row() + lane / 8 % 2 * 8);
    }

    // The first key and query of this lane's accumulators: value 4i + 2r + e of them belongs to
    // key + 8r and query + 8i + e.
    DEVICE int32 lane_key() const {
        return block.first_key + first_row() + warp_row() + lane_index() / 4;
    }
    DEVICE int32 lane_query(int32 tile) const {
        return tile * TILE_M + 2 * (lane_index() % 4);
    }

    // acc = a b^T: rows of two tiles multiplied with each other, of a those from `row` on.
    template <class ATile, class BTile>
    static DEVICE void multiply_rows(Scores& acc, ATile a, int row, BTile b, int cols) {
#pragma unroll
        for (int k = 0; k < cols; k += 16) {
            wgmma_ss<T, TILE_M, false, false>(acc, a.k_major(row, k), b.k_major(0, k), k > 0);
        }
        wgmma_commit();
    }

    // The same with a in registers.
    template <int STEPS, class BTile>
    static DEVICE void multiply_operand(Scores& acc, const uint32 (&a)[STEPS][4], BTile b) {
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            wgmma_rs<T, TILE_M, false>(acc, a[k], b.k_major(0, 16 * k), k > 0);
        }
        wgmma_commit();
    }

    // At the first step: the operands that stay in registers.
    DEVICE void load_keys() {
        wait_for(block.barrier(Block::KEYS_FULL), before.tiles % 2);
        const auto k = block.k_tile();
        load_rows(k_rows, k);
        load_rows(v_rows, block.v_tile());
        const int lane = lane_index();
#pragma unroll
        for (int key = 0; key < Config::TILE_N; key += 16) {
            load_matrix_transposed_x4(
                k_columns[key / 16], k.at(key + lane / 16 * 8 + lane % 8,
                                          Dq::first_dim(index) + warp_row() + lane / 8 % 2 * 8));
        }
    }
    template <int STEPS, class Tile>
    DEVICE void load_rows(uint32 (&operand)[STEPS][4], Tile tile) const {
        const int lane = lane_index();
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            load_matrix_x4(operand[k],
                           tile.at(first_row() + warp_row() + lane % 16, 16 * k + lane / 16 * 8));
        }
    }

    // acc += weights b: rows of a tile weighted and added up.
    template <class BTile, int COLS>
    static DEVICE void add_weighted_rows(float (&acc)[COLS], const Weights& weights, BTile b) {
#pragma unroll
        for (int k = 0; k < TILE_M / 16; ++k) {
            wgmma_rs<T, 2 * COLS, true>(acc, weights[k], b.mn_major(16 * k, 0), true);
        }
        wgmma_commit();
    }

    // P from S, in place. With a softcap, which needs S, also dP becomes (dP - D) * derivative.
    DEVICE void exponentiate(Scores& s, Scores& dp, const Terms& early_lse,
                             const Step& step) const {
        const int32 key = lane_key(), query = lane_query(step.tile);
#pragma unroll
        for (int i = 0; i < TILE_M / 8; ++i) {
            const Two lse = EARLY_TERMS ? early_lse[i] : load_terms(step.stage(), i, 0);
            const Two dot = Config::SOFTCAP ? load_terms(step.stage(), i, sizeof(Two)) : Two{};
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                const int e = x % 2, r = x / 2;
                float& value = s[4 * i + x];
                float derivative;
                const float exponent = score.modify_with_slope(value, query + 8 * i + e,
                                                               key + 8 * r, derivative);
                value = exp2_real(exponent * score.factor - lse.value[e]);
                if constexpr (Config::SOFTCAP) {
                    dp[4 * i + x] = (dp[4 * i + x] - dot.value[e]) * derivative;
                }
            }
        }
    }

    // dS from P and dP, in place of dP.
    DEVICE void differentiate(const Scores& p, Scores& dp, const Terms& early_dot,
                              const Step& step) const {
#pragma unroll
        for (int i = 0; i < TILE_M / 8; ++i) {
            const Two dot = Config::SOFTCAP ? Two{}
                            : EARLY_TERMS   ? early_dot[i]
                                            : load_terms(step.stage(), i, sizeof(Two));
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                dp[4 * i + x] = p[4 * i + x] * (dp[4 * i + x] - dot.value[x % 2]);
            }
        }
    }

    // Whether some query of a tile does not see some key, this consumer's or any, or one of them
    // does not exist.
    DEVICE bool is_partial(int32 tile) const {
        if constexpr (!Config::OWN_MASKS) return block.is_partial(tile);
        return block.is_partial(tile, block.first_key + first_row(), 64);
    }

    // Of two neighbouring queries, 8i after the lane's first: lse, or D at `offset`.
    DEVICE Two load_terms(int stage, int i, int offset) const {
        constexpr int SIZE = sizeof(typename Block::Terms);
        return load_shared<Two>(block.terms(stage) + lane_index() % 4 * SIZE + 4 * i * SIZE +
                                offset);
    }
    DEVICE void load_early(Terms& terms, int stage, int offset) const {
        if constexpr (EARLY_TERMS) {
#pragma unroll
            for (int i = 0; i < TILE_M / 8; ++i) terms[i] = load_terms(stage, i, offset);
        }
    }

    // Which of a lane's queries, in the order of its accumulators, see its key + 8r: a bit each.
    DEVICE uint32 seen(const Step& step, int r) const {
        const auto rows = score.rows(lane_key() + 8 * r);
        const int32 start = lane_query(step.tile);
        return column_bits(rows.first - start, rows.last - start);
    }
    // `masked` where a query does not see a key, or one of them does not exist.
    DEVICE void mask(Scores& values, const Step& step, float masked) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32 seen = this->seen(step, r);
#pragma unroll
            for (int j = 0; j < TILE_M / 4; ++j) {
                if (!(seen & 1u << j)) values[j / 2 * 4 + 2 * r + j % 2] = masked;
            }
        }
    }

    static DEVICE void round(Weights& weights, const Scores& scores) {
#pragma unroll
        for (int j = 0; j < TILE_M / 4; ++j) {
            weights[j / 4][j % 4] = pack<T>(scores[2 * j], scores[2 * j + 1]);
        }
    }

    // dS^T of this consumer to its columns of dS.
    DEVICE void store_ds(const Weights& ds, int stage) const {
        const uint32 row = (KEEPS_DS_ROW ? ds_row : find_ds_row(recompute_from(lane_index()))) +
                           stage * Block::DsTile::BYTES;
#pragma unroll
        for (int k = 0; k < TILE_M / 16; ++k) {
            store_matrix_transposed_x4(row + 16 * k * Block::DsTile::ROW_BYTES, ds[k][0], ds[k][1],
                                       ds[k][2], ds[k][3]);
        }
    }

    // dQ^T = K^T dS^T, this consumer's part; of a whole head added to what dq is.
    DEVICE void multiply_dq(DqSums& dq, int stage) const {
        const auto k = block.k_tile();
        const auto ds = block.ds_tile(stage);
#pragma unroll
        for (int key = 0; key < Config::TILE_N; key += 16) {
            const uint64 queries = ds.k_major(Dq::first_query(index), key);
            if constexpr (Config::KEYS_IN_REGISTERS) {
                wgmma_rs<T, Dq::QUERIES, false>(dq, k_columns[key / 16], queries,
                                                Config::WHOLE_HEAD || key > 0);
            } else {
                wgmma_ss<T, Dq::QUERIES, true, false>(dq, k.mn_major(key, Dq::first_dim(index)),
                                                      queries, key > 0);
            }
        }
        wgmma_commit();
    }

    // P and dS of a step, rounded.
    DEVICE void compute_weights(Weights& p, Weights& ds, const Step& step) {
        Scores s, dp;
        wait_for(block.barrier(Block::Q_FULL + step.stage()), step.parity());
        if constexpr (Config::KEYS_IN_REGISTERS) {
            if (step.first) load_keys();
            wgmma_fence();
            multiply_operand(s, k_rows, block.q_tile(step.stage()));
            wait_for(block.barrier(Block::DO_FULL + step.stage()), step.parity());
            multiply_operand(dp, v_rows, block.do_tile(step.stage()));
        } else {
            wgmma_fence();
            multiply_rows(s, block.k_tile(), first_row(), block.q_tile(step.stage()),
                          Config::HEAD_DIM);
            wait_for(block.barrier(Block::DO_FULL + step.stage()), step.parity());
            multiply_rows(dp, block.v_tile(), first_row(), block.do_tile(step.stage()),
                          Config::HEAD_DIM_V);
        }
        if constexpr (Config::EARLY_EXPONENTIALS) {
            exponentiate_early(s, dp, p, ds, step);
        } else {
            exponentiate_late(s, dp, p, ds, step);
        }
    }

    // From S and dP to P and dS, rounded. The exponentials while the product for dP runs:
    DEVICE void exponentiate_early(Scores& s, Scores& dp, Weights& p, Weights& ds,
                                   const Step& step) const {
        const bool partial = is_partial(step.tile);
        Terms lse, dot;
        load_early(lse, step.stage(), 0);
        wgmma_wait<Config::SOFTCAP ? 0 : 1>();
        exponentiate(s, dp, lse, step);
        // This branch also keeps the compiler from moving the exponentials behind the wait for dP.
        if (partial) mask(s, step, 0);
        round(p, s);
        load_early(dot, step.stage(), sizeof(Two));
        wgmma_wait<0>();
        differentiate(s, dp, dot, step);
        // P = 0 does not suffice where V or D is not finite. (Whether a step is partial takes a
        // register between the two masks.)
        if (is_partial(recompute_from(step.tile))) mask(dp, step, 0);
        round(ds, dp);
    }

    // The same behind both products. What is out of sight is masked before that, so that no branch
    // keeps the compiler from computing dS beside the product for dV.
    DEVICE void exponentiate_late(Scores& s, Scores& dp, Weights& p, Weights& ds,
                                  const Step& step) const {
        constexpr bool MODIFIES = Score<Config, float>::MODIFIES;
        const bool partial = is_partial(step.tile);
        Terms lse, dot;
        load_early(lse, step.stage(), 0);
        // Behind the modification where it makes -inf finite, or brings NaN of S to dP. Where few
        // steps are partial, S while dP is on its way.
        constexpr bool S_FIRST = !Config::BAND && !MODIFIES;
        if constexpr (S_FIRST) {
            wgmma_wait<1>();
            if (partial) mask(s, step, -infinity<float>());
        }
        wgmma_wait<0>();
        if (partial) {
            if (!S_FIRST && !MODIFIES) mask(s, step, -infinity<float>());
            if (!Config::SOFTCAP) mask(dp, step, 0);
        }
        exponentiate(s, dp, lse, step);
        if (MODIFIES && partial) mask(s, step, 0);
        if (Config::SOFTCAP && partial) mask(dp, step, 0);
        round(p, s);
        load_early(dot, step.stage(), sizeof(Two));
        differentiate(s, dp, dot, step);
        round(ds, dp);
    }

    // The phase of ds_empty that a step waits for. Step i sets the stage of i - 1 free: so the
    // first step sets stage 1 free, though nothing is in it yet, and stage 1 is a phase ahead.
    static DEVICE uint32 empty_parity(const Step& step) {
        return step.parity() ^ (step.stage() == 0 ? 1 : 0);
    }

    // Of the step before: nobody has to wait for the other's dS of the present one.
    DEVICE void multiply_late_dq(DqSums& dq, uint32 index) const {
        const Step step = {0, 0, index, false};
        wait_for(block.barrier(Block::DS_FULL + step.stage()), step.parity());
        wgmma_fence();
        multiply_dq(dq, step.stage());
    }

    // dS of a step to all consumers, once they have read what was in its place.
    DEVICE void pass_ds(const Weights& ds, const Step& step) const {
        wait_for(block.barrier(Block::DS_EMPTY + step.stage()), empty_parity(step));
        store_ds(ds, step.stage());
        fence_async_shared();
        __syncwarp();
        if (lane_index() == 0) arrive_at(block.barrier(Block::DS_FULL + step.stage()));
    }
    // The tile of the step before, if there is one.
    static DEVICE int32 tile_before(const Step& step) {
        return step.tile - (step.first ? 0 : 1);
    }

    DEVICE void compute(const Step& step) {
        const int stage = step.stage();
        Weights p, ds;
        compute_weights(p, ds, step);
        DqSums dq;
        load_dq(dq, tile_before(step));
        if constexpr (!DV_FIRST) pass_ds(ds, step);
        wgmma_fence();
        add_weighted_rows(dv, p, block.do_tile(stage));
        if constexpr (DV_FIRST) pass_ds(ds, step);
        multiply_late_dq(dq, step.index - 1);
        if constexpr (DK_EARLY) add_weighted_rows(dk, ds, block.q_tile(stage));
        wgmma_wait<DK_EARLY ? 2 : 1>();
        release(Block::DO_EMPTY + stage);
        if constexpr (!DK_EARLY) add_weighted_rows(dk, ds, block.q_tile(stage));
        wgmma_wait<1>();
        release(Block::DS_EMPTY + (stage ^ 1));
        if (!step.first) pass_dq(dq, tile_before(step));
        wgmma_wait<0>();
        this->inspect_queries(step);
        this->release_q(stage);
        end_step(step);
    }
    DEVICE void end_step(const Step& step) const {
        if (Config::WHOLE_HEAD && step.first) arrive_at(block.barrier(Block::KEYS_EMPTY));
    }

    // Whether no query of a step sees a key of this consumer, as in half of the first steps under a
    // causal mask.
    DEVICE bool sees_nothing(const Step& step) const {
        if (!Config::SKIPS_PRODUCTS) return false;
        const int32 key = block.first_key + first_row(), query = step.tile * TILE_M;
        return key >= block.params.seqlen_k || key > query + TILE_M - 1 + score.band.high ||
               key + 63 < query + score.band.low;
    }
    // Such a step: P and dS are zero, what there is to compute is dQ of the step before.
    DEVICE void skip_products(const Step& step) {
        const int stage = step.stage();
        wait_for(block.barrier(Block::Q_FULL + stage), step.parity());
        if (Config::KEYS_IN_REGISTERS && step.first) load_keys();
        wait_for(block.barrier(Block::DO_FULL + stage), step.parity());
        DqSums dq;
        load_dq(dq, tile_before(step));
        pass_ds({}, step);
        multiply_late_dq(dq, step.index - 1);
        wgmma_wait<0>();
        release(Block::DO_EMPTY + stage);
        release(Block::DS_EMPTY + (stage ^ 1));
        if (!step.first) pass_dq(dq, tile_before(step));
        this->inspect_queries(step);
        this->release_q(stage);
        end_step(step);
    }

    // What the first step takes for the dS before it. Its dQ is thrown away, so that any numbers
    // would do, but not memory that nothing has written. (A product that only some steps compute
    // would make the compiler wait for every one of them.)
    DEVICE void clear_ds() const {
        const uint32 tile = block.ds_tile(Block::STAGES - 1).address;
#pragma unroll 1
        for (int i = this->all_thread() * CHUNK_BYTES; i < Block::DsTile::BYTES;
             i += this->ALL_THREADS * CHUNK_BYTES) {
            store_shared(tile + i, Chunk{});
        }
        fence_async_shared();
        this->meet_consumers();
    }

    // dQ of the last step, of which `index` is the number. Meanwhile dV goes out: nobody else reads
    // these rows of V, or, for the next step, this part of dS.
    DEVICE void finish_dq(uint32 index, int32 tile) {
        DqSums dq;
        load_dq(dq, tile);
        multiply_late_dq(dq, index);
        if constexpr (Config::WHOLE_HEAD) {
            const Step next = {0, 0, index + 1, false};
            wait_for(block.barrier(Block::DS_EMPTY + next.stage()), empty_parity(next));
        }
        this->store_dv(index + 1);
        wgmma_wait<0>();
        pass_dq(dq, tile);
    }

    // Returns what is done then.
    DEVICE Progress run() {
        const TileRange tiles = block.query_tiles();
        if (before.steps == 0) clear_ds();
        if (Config::WHOLE_HEAD && block.place.tile == 0) this->clear_dq();
        this->wait_for_keys();
        const Progress done = block.for_each_step(before, [&](const Step& step) {
            if (step.tile == tiles.begin) this->enter_head(step);
            if (sees_nothing(step)) {
                skip_products(step);
            } else {
                compute(step);
            }
        });
        if (done.tiles > before.tiles) {
            finish_dq(done.steps - 1, tiles.end - 1);
        } else {
            this->store_dv(done.steps);
        }
        if constexpr (!Config::WHOLE_HEAD) block.wait_for_inspectors();
        this->meet_consumers();  // nobody reads K, or dS, any more
        this->store_dk(done.steps - 1);
        if (leads()) wait_bulk_read<0>();
        if constexpr (Config::WHOLE_HEAD) {
            this->meet_consumers();  // the next steps may write dS
        } else {
            sync_named(Block::DQ_EMPTY + index, Block::DQ_THREADS);  // the writer's last arrival
        }
        return done;
    }
};

// One block for every tile of keys of every key head, or for every head.
extern "C" __global__ void __launch_bounds__(Config::THREADS, 1)
    hopper_backward(const __grid_constant__ AttentionParams params,
                    const __grid_constant__ BackwardMaps maps) {
    run_block<Config, Consumer<Config>>(params, maps);
}
