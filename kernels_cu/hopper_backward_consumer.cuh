// What the consumers of the Hopper backward kernels have in common, and how blocks and consumers
// make a kernel. Its files explain the pipeline.
#pragma once
#include "hopper_backward_block.cuh"
#include "hopper_backward_pairs.cuh"
#include "wgmma.cuh"

// What the consumer warpgroups of all kernels have in common.
template <class Config>
struct BackwardConsumer {
    using Block = BackwardBlock<Config>;
    using T = typename Block::T;
    using Step = typename Block::Step;
    using Progress = typename Block::Progress;
    using Dq = typename Block::Dq;
    static constexpr int TILE_M = Config::TILE_M;
    static constexpr int TILE_N = Config::TILE_N;
    static constexpr int ALL_THREADS = Config::CONSUMERS * WARPGROUP;

    const Block& block;
    const int index;  // of the consumers
    const Progress before;  // what was done before this tile of keys
    Score<Config, float> score;

    DEVICE BackwardConsumer(const Block& block, int index, Progress before)
        : block(block),
          index(index),
          before(before),
          score(block.params, block.query_head(block.key_head(), 0)) {}

    static DEVICE int thread() {
        return threadIdx.x % WARPGROUP;
    }
    DEVICE bool leads() const {
        return thread() == 0;
    }
    DEVICE int all_thread() const {  // among all consumers'
        return WARPGROUP * index + thread();
    }
    DEVICE int warp_row() const {  // of the warp's accumulators
        return thread() / WARP * 16;
    }

    DEVICE void meet_consumers() const {
        if constexpr (Config::CONSUMERS_DIFFER) {
            sync_named_anywhere(Block::ALL_CONSUMERS, ALL_THREADS);
        } else {
            sync_named(Block::ALL_CONSUMERS, ALL_THREADS);
        }
    }
    // Before the first step, if there is one. Where K goes on to registers, it is that step's wait.
    DEVICE void wait_for_keys() const {
        const TileRange tiles = block.query_tiles();
        if (!Config::KEYS_IN_REGISTERS && tiles.begin < tiles.end) {
            wait_for(block.barrier(Block::KEYS_FULL), 0);
        }
    }
    DEVICE void release(int empty) const {
        if (leads()) arrive_at(block.barrier(empty));
    }
    // Every thread for itself: with Q come the row terms, which it has read by ordinary loads.
    DEVICE void release_q(int stage) const {
        arrive_at(block.barrier(Block::Q_EMPTY + stage));
    }
    // At the first step of a head: ALiBi has a slope for each.
    DEVICE void enter_head(const Step& step) {
        if constexpr (Config::ALIBI) {
            score = {block.params, block.query_head(block.key_head(), step.head)};
        }
    }

    // With a softcap: looks for the queries of a partial step that spoil others, of which lse says
    // nothing. Before Q is released.
    DEVICE void inspect_queries(const Step& step) const {
        if (!Config::BAND || !Config::SOFTCAP || !block.is_partial(step.tile)) return;
        const auto q = block.q_tile(step.stage());
        block.note(Block::DKV_SPOILT, finds_nonfinite_16<T, 1>(q.address, q.BYTES, all_thread(),
                                                               ALL_THREADS));
    }
};

// What a block does: it rounds dQ of heads that are complete, or warpgroup 0 feeds the others, the
// consumers.
template <class Config, class Consumer>
DEVICE void run_block(const AttentionParams& params, const BackwardMaps& maps) {
    const uint32 shared = swizzle_aligned(shared_address(dynamic_shared_memory()));
    uint32 share = blockIdx.x;
    if constexpr (!Config::WHOLE_HEAD) {
        const DqRounding<Config> rounding{params};
        const BackwardRole role = rounding.role(blockIdx.x);
        if (!role.computes) return rounding.run_block(role);
        share = role.share;
    }
    const BackwardBlock<Config> block(params, maps, shared, share);
    if (threadIdx.x == 0) {
        block.init_barriers();
        block.load_first_keys();
    }
    if (threadIdx.x == WARP) block.store_head();
    __syncthreads();
    // Shuffled, so that the compiler knows it for uniform.
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / WARPGROUP, 0);
    if (warpgroup == 0) {
        shrink_registers<Config::PRODUCER_REGISTERS>();
        block.serve();
    } else {
        grow_registers<Config::CONSUMER_REGISTERS>();
        using Progress = typename BackwardBlock<Config>::Progress;
        block.for_each_key_tile([&](const BackwardBlock<Config>& block, Progress before) {
            return Consumer(block, warpgroup - 1, before).run();
        });
        if constexpr (Config::WHOLE_HEAD) Consumer::store_head_dq(block, warpgroup - 1);
        if constexpr (Config::BAND) PairGradients<Config>{block, warpgroup - 1}.repair();
    }
}
