// Forward attention on wgmma and TMA (sm_90a): blocks that stay on their multiprocessor compute one
// item after another, TILE_M rows of o of one head:
//
//   for each tile of keys, from the right end of what the rows see to the left (a step):
//       S = Q K^T                   (TILE_M x TILE_N, in registers)
//       S = modify(S), -inf where masked
//       P = 2^(S - top)             online softmax: `top` is a row's maximum so far, or some less
//       O = rescale * O + P V       (TILE_M x HEAD_DIM_V, in registers)
//   O = O / sum, lse = log(sum of exponentials)
//
// Warpgroup 0 feeds the others, the consumers, each of which owns 64 rows. In step j a consumer
// issues S(j) and, behind it, the product of P(j+1) and V(j+1), tile j + 1 being the one before:
// the tensor cores compute the latter while the consumer turns S(j) into P(j). It takes its steps
// with the tiles that its own 64 rows see, and lets pass the others that the item has.
//
//   warp 0     producer    Q ========= q_full =======> | consumers, a step:
//              (TMA)         <======== q_empty ======= |   wait K(j); issue S(j)
//                          K, V ==== k_full, v_full => |   wait V(j+1); issue O += P(j+1) V(j+1)
//                          STAGES of each              |   wait S(j), release K(j)
//                            <=== k_empty, v_empty === |   mask, P(j), top (OPTIMISTIC: K(j) here)
//   warps 1-3  inspectors    <======== v_empty ======= |   wait O, release V(j+1)
//              (BAND only)                             |   P(j) to 16 bits; O *= rescale
//                          the item == inspected ====> | after the last step
//                          o, by TMA <================ | after the last step
//   warp 0     producer    items ==== item_full =====> | all other roles, before their first step
//                                <=== item_empty ===== | and after their last (hopper_items.cuh)
//
// What a consumer does between S and its next product is what the tensor cores wait for. So it
// does not wait for the largest score: P of the first blocks of keys (AHEAD) is computed as if none
// were larger than before, while the largest is found, and `top` raised only if that is larger by
// more than SLACK powers of 2. OPTIMISTIC steps, of full tiles, do not even look for it: where sums
// of P turn out to be large, S is computed once more, by mma.sync, and `top` raised. That is rare,
// as scores of tiles are alike (with ALiBi they are not, and a softcap would have to be applied
// again). As each warp may do that by itself, each releases K and Q for itself.
//
// All of these are mbarriers, one for each stage. Named barriers let the consumers take turns: only
// one of them issues products at a time, so that its softmax runs while the others multiply. The
// producer fetches the next item's Q, K and V as soon as their places are free: K and V during the
// present item; Q, too, if it has two places (Q_STAGES), else after the present item's last S, or,
// where O goes out by way of Q's place (O_OVER_Q), after that.
//
// The inspectors look for non-finite values of V, see nonfinite.cuh, in tiles of which some row
// does not see some key. Where they find any, the item's O is spoilt: the consumers compute it anew
// (hopper_forward_pairs.cuh). Missing keys need no inspection: TMA fills up with zeros.
#include "hopper_forward.cuh"
#include "hopper_forward_pairs.cuh"
#include "wgmma.cuh"
#include "mma.cuh"
#include "score.cuh"
#include "softmax.cuh"

// One row of the table in flash_cupy/cuda/hopper.py.
struct Config {
    using Element = PLAN_ELEMENT;
    static constexpr int CONSUMERS = PLAN_WARPS / 4 - 1;  // warpgroups
    static constexpr int TILE_M = PLAN_TILE_M;            // rows of q of an item
    static constexpr int TILE_N = PLAN_TILE_N;            // keys of a step
    static constexpr int HEAD_DIM = PLAN_HEAD_DIM;        // of q and k, filled up with zeros
    static constexpr int HEAD_DIM_V = PLAN_HEAD_DIM_V;    // of v and o
    static constexpr int Q_STAGES = PLAN_Q_STAGES;
    static constexpr int STAGES = PLAN_STAGES;            // of K and of V
    static constexpr bool O_OVER_Q = PLAN_O_OVER_Q;
    static constexpr int AHEAD = PLAN_AHEAD;             // blocks of 16 keys, see above
    static constexpr bool OPTIMISTIC = PLAN_OPTIMISTIC;  // full tiles, see above
    static constexpr int PRODUCER_REGISTERS = PLAN_PRODUCER_REGISTERS;
    static constexpr int CONSUMER_REGISTERS = PLAN_CONSUMER_REGISTERS;
    static constexpr int L2_BYTES = PLAN_L2_BYTES;  // of K and V that blocks read at a time
    static constexpr bool DYNAMIC = PLAN_DYNAMIC;   // items go to whichever block is free
    static constexpr int SHARED_BYTES = PLAN_SHARED_BYTES;
    static constexpr bool BAND = PLAN_BAND;
    static constexpr bool SOFTCAP = PLAN_SOFTCAP;
    static constexpr bool ALIBI = PLAN_ALIBI;

    static_assert(!(OPTIMISTIC && (SOFTCAP || ALIBI)), "S is not modified again");

    static constexpr int THREADS = (1 + CONSUMERS) * WARPGROUP;
    static constexpr int INSPECTORS = BAND ? 3 : 0;  // warps
};

// Accumulators in the order in which wgmma takes them.
template <int N>
DEVICE float (&registers(Accumulator<float> (&blocks)[N]))[8 * N] {
    return reinterpret_cast<float(&)[8 * N]>(blocks);
}

// One of the warpgroups from 1 on.
template <class Config>
struct Consumer {
    using T = typename Config::Element;
    using Shared = SharedMemory<Config>;
    static constexpr int KEY_BLOCKS = Config::TILE_N / 16;
    static constexpr int DIM_BLOCKS_V = Config::HEAD_DIM_V / 16;
    static constexpr int ROWS = 64;
    using Scores = Accumulator<float>[1][KEY_BLOCKS];
    using Rescale = float[1][2];
    // P of the first blocks of keys, whose scores stay as they are.
    using Ahead = Accumulator<float>[Config::AHEAD > 0 ? Config::AHEAD : 1];
    static constexpr int SLACK = 8;  // powers of 2 by which P may be larger than 1

    // Named barriers.
    static constexpr int TURN = 1;                          // and following, one for each consumer
    static constexpr int ALONE = TURN + Config::CONSUMERS;  // also

    const AttentionParams& params;
    const ForwardMaps& maps;
    const Shared shared;
    const int group;    // of the consumers; shuffled, so that the compiler knows it for uniform
    const int32 row;    // first of the warp, within the item
    const bool leader;  // the one thread of the warpgroup that signals and starts copies

    Ring<Config::STAGES> k_ring, v_ring;
    Ring<Config::Q_STAGES> q_ring;

    // Of an item.
    Accumulator<float> o[1][DIM_BLOCKS_V];
    uint32 p[KEY_BLOCKS][4];  // of the latest step
    OnlineSoftmax<float, 1> softmax;

    DEVICE Consumer(const AttentionParams& params, const ForwardMaps& maps)
        : params(params),
          maps(maps),
          group(__shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0) - 1),
          row((threadIdx.x - WARPGROUP) / WARP * 16),
          leader(threadIdx.x % WARPGROUP == 0) {}

    DEVICE void release(uint32 barrier) const {
        if (leader) arrive_at(barrier);
    }

    // Every warp for itself, where it may have read by itself (multiply_q_k_again).
    DEVICE void release_by_warp(uint32 barrier) const {
        __syncwarp();
        if (lane_index() == 0) arrive_at(barrier);
    }
    DEVICE void release_k() {
        release_by_warp(shared.k_empty(k_ring.stage));
        k_ring.advance();
    }

    // The consumers' turns at issuing products.
    DEVICE void take_turn() const {
        sync_named(TURN + group, 2 * WARPGROUP);
    }
    DEVICE void pass_turn() const {
        arrive_named(TURN + (group + 1) % Config::CONSUMERS, 2 * WARPGROUP);
    }

    // S = Q K^T
    DEVICE void multiply_q_k(Scores& s) const {
        const auto q = shared.q(q_ring.stage);
        const auto k = shared.k(k_ring.stage);
#pragma unroll
        for (int d = 0; d < Config::HEAD_DIM; d += 16) {
            wgmma_ss<T, Config::TILE_N, false, false>(
                registers(s[0]), q.k_major(group * ROWS, d), k.k_major(0, d), d > 0);
        }
        wgmma_commit();
    }

    // O += P V
    DEVICE void multiply_p_v() {
        const auto v = shared.v(v_ring.stage);
#pragma unroll
        for (int n = 0; n < KEY_BLOCKS; ++n) {
            wgmma_rs<T, Config::HEAD_DIM_V, true>(registers(o[0]), p[n], v.mn_major(16 * n, 0),
                                                  true);
        }
        wgmma_commit();
    }

    // Softcap and ALiBi.
    DEVICE void modify(Scores& s, const Item<Config>& item, int32 tile) const {
#pragma unroll
        for (int i = 0; i < 8 * KEY_BLOCKS; ++i) {
            const int n = i / 8, h = i / 4 % 2, e = i % 4;
            float& x = s[0][n].value[h][e];
            x = item.score.modify(x, item.first_row + row + Accumulator<float>::row(e),
                                  tile * Config::TILE_N + 16 * n + Accumulator<float>::col(h, e));
        }
    }

    // -inf for the keys that a row does not see.
    DEVICE void mask(Scores& s, const Item<Config>& item, int32 tile) const {
        // Columns are counted from the lane's first, so that they are constants.
        const int32 origin = tile * Config::TILE_N + Accumulator<float>::col(0, 0);
        const int32 first_row = recompute_from(item.first_row);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const auto keys =
                item.score.keys(first_row + row + Accumulator<float>::row(2 * r));
#pragma unroll
            for (int col = 0; col < Config::TILE_N; col += 128) {
                const uint32 seen =
                    column_bits(keys.first - origin - col, keys.last - origin - col);
#pragma unroll
                for (int i = col / 4; i < min(col + 128, Config::TILE_N) / 4; ++i) {
                    float& x = s[0][i / 4].value[i / 2 % 2][2 * r + i % 2];
                    if (!(seen & 1u << i % 32)) x = -infinity<float>();
                }
            }
        }
    }

    template <bool PARTIAL>
    DEVICE void modify_and_mask(Scores& s, const Item<Config>& item, int32 tile) const {
        // Which leaves no register to ask all_see.
        constexpr bool MODIFIES = Score<Config, float>::MODIFIES;
        if constexpr (MODIFIES) modify(s, item, tile);
        if (PARTIAL &&
            (MODIFIES || !item.all_see(item.first_row + group * ROWS, ROWS, tile))) {
            mask(s, item, tile);
        }
    }

    // S of an item's first tile to P, still as floats: there is no `top` yet.
    DEVICE void exponentiate_first(Scores& s, const Item<Config>& item, int32 tile) {
        const float factor = item.score.factor;
        modify_and_mask<true>(s, item, tile);
        Rescale rescale;  // of an O that is zero yet
        softmax.raise_top(s, factor, rescale);
        sum_exponentials(s, softmax.sum, factor);
    }

    // S of another tile to P. Returns whether `top` has been raised for some row of the warp: then
    // O, which is without this P yet, is to be multiplied by `rescale`.
    //
    // Warps raise it alone: nothing in that branch may belong to the whole group, nor change what
    // products in flight read or add to.
    template <bool PARTIAL>
    DEVICE bool exponentiate(Scores& s, Ahead& ahead, Rescale& rescale, const Item<Config>& item,
                             int32 tile) {
        const float factor = item.score.factor;
        modify_and_mask<PARTIAL>(s, item, tile);
        look_ahead(s, ahead, factor);
        const bool raised = softmax.outgrown(s, factor, SLACK);
        if (raised) {
            softmax.raise_top(s, factor, rescale);
            look_ahead(s, ahead, in_register(factor));  // not from products made before
        }
#pragma unroll
        for (int n = 0; n < KEY_BLOCKS; ++n) {
            if (n < Config::AHEAD) {
                softmax.add(ahead[n], 0);
            } else {
                softmax.template exponentiate<Mma<T>>(s[0][n], 0, factor);
                softmax.add(s[0][n], 0);
            }
        }
        return raised;
    }
    DEVICE void look_ahead(const Scores& s, Ahead& ahead, float factor) const {
#pragma unroll
        for (int n = 0; n < Config::AHEAD; ++n) {
            ahead[n] = s[0][n];
            softmax.template exponentiate<Mma<T>>(ahead[n], 0, factor);
        }
    }

    // The same of a full tile, by sums of P instead of the largest score.
    DEVICE bool exponentiate_optimistically(Scores& s, Rescale& rescale, float factor) {
        float added[1][2];
        sum_exponentials(s, added, factor);
        const bool raised = softmax.sums_outgrown(added, SLACK);
        if (raised) {
            multiply_q_k_again(s);
            softmax.raise_top(s, factor, rescale);
            sum_exponentials(s, added, factor);
        }
        softmax.sum[0][0] += added[0][0];
        softmax.sum[0][1] += added[0][1];
        return raised;
    }
    DEVICE void sum_exponentials(Scores& s, float (&sums)[1][2], float factor) const {
        sums[0][0] = sums[0][1] = 0;
#pragma unroll
        for (int n = 0; n < KEY_BLOCKS; ++n) {
            softmax.template exponentiate<Mma<T>>(s[0][n], 0, factor);
            OnlineSoftmax<float, 1>::add(s[0][n], 0, sums);
        }
    }
    // S anew, by each warp for itself, while products of the group run.
    DEVICE void multiply_q_k_again(Scores& s) const {
        const auto q = shared.q(q_ring.stage);
        const auto k = shared.k(k_ring.stage);
        // Not the member, from which ptxas would prepare addresses in every step.
        const int32 row = (recompute_from(threadIdx.x) - WARPGROUP) / WARP * 16;
#pragma unroll
        for (int n = 0; n < KEY_BLOCKS; ++n) s[0][n] = {};
#pragma unroll 1
        for (int d = 0; d < Config::HEAD_DIM; d += 16) {
            const typename Mma<T>::A a[1] = {Mma<T>::load_a(q, row, d)};
#pragma unroll
            for (int n = 0; n < KEY_BLOCKS; ++n) {
                const typename Mma<T>::B b[1] = {Mma<T>::load_b_transposed(k, d, 16 * n)};
                Mma<T>::multiply(s[0][n], a, b, One{});
            }
        }
    }

    // The rounded P as operands of the next product; of the first COUNT blocks it is in `ahead`.
    template <int COUNT>
    DEVICE void keep_p(const Scores& s, const Ahead& ahead) {
#pragma unroll
        for (int n = 0; n < KEY_BLOCKS; ++n) pack(p[n], n < COUNT ? ahead[n] : s[0][n]);
    }

    static DEVICE void pack(uint32 (&operand)[4], const Accumulator<float>& block) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            operand[i] =
                Mma<T>::pack(block.value[i / 2][i % 2 * 2], block.value[i / 2][i % 2 * 2 + 1]);
        }
    }

    DEVICE void scale_o(const float (&factor)[1][2]) {
#pragma unroll
        for (int i = 0; i < 8 * DIM_BLOCKS_V; ++i) {
            o[0][i / 8].value[i / 4 % 2][i % 4] *= factor[0][i % 4 / 2];
        }
    }

    // The rightmost tile of keys. There is nothing to multiply with V yet.
    DEVICE void first_step(const Item<Config>& item, int32 tile) {
        Scores s;
        wait_for(shared.k_full(k_ring.stage), k_ring.parity);
        take_turn();
        wgmma_fence();
        multiply_q_k(s);
        pass_turn();
        wgmma_wait<0>();
        release_k();
        exponentiate_first(s, item, tile);
        keep_p<0>(s, {});
    }

    // One tile of keys, while the one to its right meets V. Where no row of the item has a mask in
    // it (not PARTIAL), nothing but the products and P remains.
    template <bool PARTIAL>
    DEVICE void step(const Item<Config>& item, int32 tile) {
        Scores s;
        Ahead ahead;
        wait_for(shared.k_full(k_ring.stage), k_ring.parity);
        take_turn();
        wgmma_fence();
        multiply_q_k(s);
        wait_for(shared.v_full(v_ring.stage), v_ring.parity);
        multiply_p_v();
        pass_turn();
        wgmma_wait<1>();
        constexpr bool OPTIMISTIC = Config::OPTIMISTIC && !PARTIAL;
        Rescale rescale;
        bool raised;
        if constexpr (OPTIMISTIC) {
            raised = exponentiate_optimistically(s, rescale, item.score.factor);
            release_k();
        } else {
            release_k();
            raised = exponentiate<PARTIAL>(s, ahead, rescale, item, tile);
        }
        wgmma_wait<0>();
        release(shared.v_empty(v_ring.stage));
        v_ring.advance();
        keep_p<OPTIMISTIC ? 0 : Config::AHEAD>(s, ahead);
        if (raised) scale_o(rescale);
    }

    // Tiles that only other consumers' rows see. The turns and the stages need this one, too: it
    // takes a turn for each tile of the item, and releases a stage not before it is full, as its
    // arrival would count for the phase before, nor before all threads that it stands for have seen
    // that.
    DEVICE void skip_tiles(int32 begin, int32 end) {
#pragma unroll 1
        for (int32 tile = end - 1; tile >= begin; --tile) {
            take_turn();
            pass_turn();
            wait_for(shared.k_full(k_ring.stage), k_ring.parity);
            wait_for(shared.v_full(v_ring.stage), v_ring.parity);
            sync_named(ALONE + group, WARPGROUP);
            release_k();
            release(shared.v_empty(v_ring.stage));
            v_ring.advance();
        }
    }

    // All steps of `tiles`, but for the end of the last product.
    DEVICE void walk_keys(const Item<Config>& item, const TileRange& tiles) {
        wait_for(shared.q_full(q_ring.stage), q_ring.parity);
        // Not in a uniform register, of which the products' addresses need many.
        int32 tile = recompute_from(tiles.end - 1);
        first_step(item, tile--);
        // Tiles masked at their right end, full ones, tiles masked at their left end. (A product
        // under an `if` would make the compiler wait for every one of them.) With masks the first
        // full tile goes with those before it: in all steps after it head dim 128 is 2 % faster.
        const TileRange& bounds = Config::BAND ? item.tiles : tiles;
        if constexpr (Config::BAND) {
#pragma unroll 1
            for (; tile >= max(bounds.full_end - 1, tiles.begin); --tile) {
                step<true>(item, tile);
            }
        }
#pragma unroll 1
        for (; tile >= max(bounds.full_begin, tiles.begin); --tile) step<false>(item, tile);
        if constexpr (Config::BAND) {
#pragma unroll 1
            for (; tile >= tiles.begin; --tile) step<true>(item, tile);
        }
        if constexpr (!Config::O_OVER_Q) release_by_warp(shared.q_empty(q_ring.stage));
        q_ring.advance();
        wait_for(shared.v_full(v_ring.stage), v_ring.parity);
        wgmma_fence();
        multiply_p_v();
    }

    DEVICE void store_lse(const Item<Config>& item, const float (&lse)[1][2]) const {
        float* const data = load_shared<float*>(item.lse());
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int32 i = item.first_row + row + Accumulator<float>::row(2 * r);
            if (lane_index() % 4 == 0 && i < params.seqlen_q) {
                data[i * params.lse.row] = lse[0][r];
            }
        }
    }

    // O by way of shared memory, where no warp of the group needs any more what was there (Q, or
    // the item before); TMA leaves out the rows and columns that o does not have.
    DEVICE void store_o(const Item<Config>& item) {
        const auto tile = shared.o();
#pragma unroll
        for (int n = 0; n < DIM_BLOCKS_V; ++n) {
            uint32 block[4];
            pack(block, o[0][n]);
            const int lane = lane_index();
            store_matrix_x4(tile.at(row + lane % 16, 16 * n + lane / 16 * 8), block[0], block[1],
                            block[2], block[3]);
        }
        fence_async_shared();
        sync_named(ALONE + group, WARPGROUP);
        if (!leader) return;
        const HeadIndex index = item.index();
        const int32 first_row = item.first_row + group * ROWS;
#pragma unroll
        for (int i = 0; i < Shared::OTile::BOXES; ++i) {
            store_box(&maps.o, box_place(index, index.head, first_row, i * tile.BOX_COLS),
                      tile.box(i) + group * ROWS * tile.ROW_BYTES);
        }
        commit_bulk();
        if constexpr (Config::O_OVER_Q) {
            wait_bulk_read<0>();
            arrive_at(shared.q_empty(0));
        }
    }

    // O of these rows anew, if it is spoilt; what store_o has sent is there before.
    DEVICE void repair_o(const Item<Config>& item) const {
        wait_for(shared.inspected(item.stage()), item.parity());
        if (load_shared<uint32>(item.spoilt()) == 0) return;
        if (leader) wait_bulk<0>();
        sync_named(ALONE + group, WARPGROUP);
        // Parameters that are read before the steps would take the steps' registers.
        const PairOutput<Config> pairs(reread_from(params), item.index());
        const int32 first_row = item.first_row + group * ROWS;
        pairs.store(first_row, first_row + ROWS);
    }

    DEVICE void run() {
        if (group == Config::CONSUMERS - 1) pass_turn();  // to consumer 0
        follow_items<Config>(params, shared, [&](const Item<Config>& item) {
            softmax = {};
#pragma unroll
            for (int n = 0; n < DIM_BLOCKS_V; ++n) o[0][n] = {};
            const TileRange tiles = item.tiles_of(item.first_row + group * ROWS, ROWS);
            skip_tiles(tiles.end, item.tiles.end);
            walk_keys(item, tiles);
            float scale[1][2], lse[1][2];
            softmax.finish(scale, lse);
            store_lse(item, lse);
            wgmma_wait<0>();
            release(shared.v_empty(v_ring.stage));
            v_ring.advance();
            if constexpr (Config::BAND) skip_tiles(item.recomputed_begin(), tiles.begin);
            scale_o(scale);
            if (leader) wait_bulk_read<0>();
            sync_named(ALONE + group, WARPGROUP);
            store_o(item);
            if constexpr (Config::BAND) repair_o(item);
        });
        if (group == 0) take_turn();  // that the last consumer has passed
        if (leader) wait_bulk<0>();
    }
};

extern "C" __global__ void __launch_bounds__(Config::THREADS, 1)
    hopper_forward(const __grid_constant__ AttentionParams params,
                   const __grid_constant__ ForwardMaps maps) {
    if (threadIdx.x == 0) {
        SharedMemory<Config>().init_barriers();
        prefetch_map(&maps.q);
        prefetch_map(&maps.k);
        prefetch_map(&maps.v);
        prefetch_map(&maps.o);
    }
    __syncthreads();

    if (threadIdx.x < WARPGROUP) {
        shrink_registers<Config::PRODUCER_REGISTERS>();
        if (threadIdx.x == 0) produce<Config>(params, maps);
        if constexpr (Config::BAND) {
            if (threadIdx.x >= WARP) inspect<Config>(params);
        }
    } else {
        grow_registers<Config::CONSUMER_REGISTERS>();
        Consumer<Config>(params, maps).run();
    }
}
