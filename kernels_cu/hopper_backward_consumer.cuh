// What the consumers of the Hopper backward kernels have in common: above all, what they do about
// non-finite values; and how blocks and consumers make a kernel. Its files explain the pipeline.
#pragma once
#include "hopper_backward_block.cuh"
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
    uint32 found_in_keys;  // IN_KEYS or NOTHING, known from the first step on

    DEVICE BackwardConsumer(const Block& block, int index, Progress before)
        : block(block),
          index(index),
          before(before),
          score(block.params, block.query_head(block.key_head(), 0)),
          found_in_keys(NOTHING) {}

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

    // What non-finite values are taken out in a step: those of Q and dO (in_queries) if it is
    // partial, those of K in every step, as its tile serves all of them, or, where it stands in
    // registers, once from those for dQ.
    enum Found : uint32 { NOTHING = 0, IN_QUERIES = 1, IN_KEYS = 2 };

    // After S and dP.
    DEVICE uint32 remove_nonfinite(const Step& step, bool in_queries) {
        if (!Config::BAND) return NOTHING;
        if (step.first) found_in_keys = keys_nonfinite() ? IN_KEYS : NOTHING;
        uint32 found = found_in_keys;
        if (in_queries) found |= IN_QUERIES;
        if (found == NOTHING) return found;
        meet_consumers();  // all have S and dP
        if (found & IN_QUERIES) {
            remove_nonfinite_values(block.q_tile(step.stage()));
            remove_nonfinite_values(block.do_tile(step.stage()));
        }
        if (!Config::KEYS_IN_REGISTERS && found & IN_KEYS) remove_nonfinite_values(block.k_tile());
        fence_async_shared();
        meet_consumers();
        return found;
    }
    // After the last step.
    DEVICE void remove_nonfinite_keys() const {
        if (Config::KEYS_IN_REGISTERS || found_in_keys == NOTHING) return;
        meet_consumers();  // all have restored them
        remove_nonfinite_values(block.k_tile());
        fence_async_shared();
        meet_consumers();
    }

    DEVICE uint32 keys_nonfinite() const {
        wait_for(block.barrier(Block::INSPECTED), before.tiles % 2);
        uint32 found = 0;
#pragma unroll
        for (int i = 0; i < Block::INSPECTORS; ++i) {
            found |= block.load_word(Block::FOUND + i);
        }
        return found;
    }
    // A non-finite value in a row of Q makes its lse non-finite, unless a softcap hides it, and one
    // in a row of dO its D. Every warp looks at all rows of the tile, so that all come to the same
    // answer. They matter where the step is partial.
    DEVICE bool queries_nonfinite(const Step& step, bool partial) const {
        if (!Config::BAND || !partial) return false;
        bool found = false;
        if constexpr (Config::SOFTCAP) {
            const auto q = block.q_tile(step.stage());
#pragma unroll 1
            for (int i = lane_index() * CHUNK_BYTES; i < q.BYTES; i += WARP * CHUNK_BYTES) {
                found |= has_nonfinite<T>(load_shared<Chunk>(q.address + i));
            }
        }
#pragma unroll
        for (int i = lane_index(); i < TILE_M / 2; i += WARP) {
            const auto terms = load_shared<typename Block::Terms>(
                block.terms(step.stage()) + i * static_cast<int>(sizeof(typename Block::Terms)));
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const bool exists = step.tile * TILE_M + 2 * i + e < block.params.seqlen_q;
                found |= exists && (is_nonfinite<float>(bit_cast<uint32>(terms.lse[e])) ||
                                    is_nonfinite<float>(bit_cast<uint32>(terms.dot[e])));
            }
        }
        return __any_sync(0xffffffff, found);
    }

    template <class Tile>
    DEVICE void remove_nonfinite_values(Tile tile) const {
#pragma unroll 1
        for (int i = 2 * all_thread(); i < Tile::BYTES; i += 2 * ALL_THREADS) {
            if (nonfinite_at<T>(tile.address + i)) store_shared(tile.address + i, uint16(0));
        }
    }

    // At the end of a step: NaN for what sees a value that was taken out; spread_queries() does it
    // in dk and dv.
    template <class SpreadQueries>
    DEVICE void spread_nonfinite(const Step& step, uint32 found,
                                 SpreadQueries spread_queries) const {
        if (found & IN_QUERIES) spread_queries();
        if (found & IN_KEYS) {
            spread_nonfinite_keys(step);
            if constexpr (!Config::KEYS_IN_REGISTERS) restore_keys();
        }
    }

    // Calls visit(query, its row of q, its row of do) for the queries of a step that exist; the
    // rows are bits in global memory.
    template <class Visit>
    DEVICE void for_each_query(const Step& step, Visit visit) const {
        const AttentionParams& params = block.params;
        const HeadIndex head = block.query_head(block.key_head(), step.head);
        const uint16* const q = head_data<const uint16>(params.q, head, head.head);
        const uint16* const do_ = head_data<const uint16>(params.do_, head, head.head);
        const int32 first = step.tile * TILE_M;
#pragma unroll 1
        for (int32 query = first; query < min(first + TILE_M, params.seqlen_q); ++query) {
            visit(query, q + query * params.q.row, do_ + query * params.do_.row);
        }
    }

    // Adds NaN to this consumer's parts of dQ where a query sees a non-finite value of K.
    DEVICE void spread_nonfinite_keys(const Step& step) const {
        const AttentionParams& params = block.params;
        if constexpr (!Config::WHOLE_HEAD) {
            block.rounding().wait_for_place(block.load_word(Block::NUMBER));
        }
        const HeadIndex keys = block.key_head();
        const uint16* row = head_data<const uint16>(params.k, keys, keys.head) +
                            block.first_key * params.k.row;
        const int32 query = step.tile * TILE_M;
#pragma unroll 1
        for (int32 key = block.first_key; key < last_key(); ++key, row += params.k.row) {
#pragma unroll 1
            for (int part = index; part < Config::DQ_PARTS; part += Config::CONSUMERS) {
                add_nonfinite(step, part, row, key, Dq::first_dim(part),
                              query + Dq::first_query(part));
            }
        }
    }
    DEVICE void add_nonfinite(const Step& step, int part, const uint16* row, int32 key,
                              int first_dim, int32 first_query) const {
        const float nan = infinity<float>() * 0;
#pragma unroll 1
        for (int i = 0; i < Dq::QUERIES / 2; ++i) {
            const int dim = first_dim + warp_row() + lane_index() / 4 + i / 2 % 2 * 8;
            const int32 query = first_query + i / 4 * 8 + 2 * (lane_index() % 4) + i % 2;
            if (dim < block.params.head_dim && is_nonfinite<T>(row[dim]) &&
                score.sees(query, key)) {
                const int at = Dq::at(thread(), i / 4) + i % 4;
                if constexpr (Config::WHOLE_HEAD) {
                    store_shared(block.dq_part(part, step.tile) + 4 * at, nan);
                } else {
                    add_global<1>(block.dq_sums(step) + part * Dq::PART + at, &nan);
                }
            }
        }
    }

    // Brings non-finite values back to K's tile.
    DEVICE void restore_keys() const {
        const AttentionParams& params = block.params;
        const HeadIndex keys = block.key_head();
        const uint16* row = head_data<const uint16>(params.k, keys, keys.head) +
                            block.first_key * params.k.row;
        meet_consumers();  // all have dQ
#pragma unroll 1
        for (int32 key = block.first_key; key < last_key(); ++key, row += params.k.row) {
#pragma unroll 1
            for (int col = all_thread(); col < params.head_dim; col += ALL_THREADS) {
                store_shared(block.k_tile().at(key - block.first_key, col), row[col]);
            }
        }
        fence_async_shared();
        meet_consumers();
    }
    DEVICE int32 last_key() const {  // exclusive
        return min(block.first_key + Config::TILE_N, block.params.seqlen_k);
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
    if (threadIdx.x == 0) block.store_head();
    if (threadIdx.x == WARP) block.init_barriers();
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
    }
}
