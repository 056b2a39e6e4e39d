// Gradients of a block's keys and queries from one pair of them after another, by ordinary
// arithmetic: what a Hopper backward kernel does where a value that is not finite would spoil, in
// a matrix product, what does not see it (see nonfinite.cuh). Slow, and rare.
#pragma once
#include "hopper_backward_block.cuh"
#include "lane_row.cuh"

// By the consumers of a block, which own nothing at that time: its tile of keys or, of a
// WHOLE_HEAD, all.
template <class Config>
struct PairGradients {
    using Block = BackwardBlock<Config>;
    using T = typename Block::T;
    using Dq = typename Block::Dq;
    using Step = typename Block::Step;
    using Row = LaneRow<T, Config::HEAD_DIM>;     // of q and k
    using RowV = LaneRow<T, Config::HEAD_DIM_V>;  // of v and o

    const Block& block;
    const int index;  // of the consumers

    DEVICE int warp() const {  // of the consumer's
        return threadIdx.x % WARPGROUP / WARP;
    }
    DEVICE bool leads() const {
        return threadIdx.x % WARPGROUP == 0;
    }
    DEVICE const AttentionParams& params() const {
        return block.params;
    }
    DEVICE int32 last_key() const {
        const int32 keys = params().seqlen_k;
        return (Config::WHOLE_HEAD ? keys : min(block.first_key + Config::TILE_N, keys)) - 1;
    }
    DEVICE float scale() const {
        return gradient_scale<Config>(params());
    }

    // A query head of the group.
    struct Head {
        Score<Config, float> score;
        const T *q, *do_;
        const float* terms;  // of two rows side by side, see row_terms.cuh

        DEVICE Head(const Block& block, int32 head)
            : Head(block, head, block.query_head(block.key_head(), head)) {}

    private:
        DEVICE Head(const Block& block, int32 head, const HeadIndex& at)
            : score(block.params, at),
              q(head_data<const T>(block.params.q, at, at.head)),
              do_(head_data<const T>(block.params.do_, at, at.head)),
              terms(block.row_terms(head)) {}
    };
    struct Query {
        Row q;
        RowV do_;
        float lse, dot;
    };
    struct Key {
        Row k;
        RowV v;
    };
    struct Weights {
        float p, ds;  // ds up to `scale`
    };

    DEVICE Query load_query(const Head& head, int32 query) const {
        Query row;
        row.q.load(head.q + query * params().q.row, params().head_dim);
        row.do_.load(head.do_ + query * params().do_.row, params().head_dim_v);
        row.lse = head.terms[query / 2 * 4 + query % 2];
        row.dot = head.terms[query / 2 * 4 + query % 2 + 2];
        return row;
    }
    DEVICE Key load_key(int32 key) const {
        const HeadIndex at = block.key_head();
        Key row;
        row.k.load(head_data<const T>(params().k, at, at.head) + key * params().k.row,
                   params().head_dim);
        row.v.load(head_data<const T>(params().v, at, at.head) + key * params().v.row,
                   params().head_dim_v);
        return row;
    }
    static DEVICE Weights weights(const Head& head, const Query& row_q, int32 query,
                                  const Key& row_k, int32 key) {
        const auto& score = head.score;
        float derivative;
        const float exponent =
            score.modify_with_slope(row_q.q.dot(row_k.k), query, key, derivative);
        const float p = exp2_real(exponent * score.factor - row_q.lse);
        float ds = p * (row_q.do_.dot(row_k.v) - row_q.dot);
        if constexpr (Config::SOFTCAP) ds *= derivative;
        return {p, ds};
    }

    // dk and dv: a warp a key.
    DEVICE void store_key_gradients() const {
#pragma unroll 1
        for (int32 key = block.first_key + 4 * index + warp(); key <= last_key();
             key += 4 * Config::CONSUMERS) {
            const Key row = load_key(key);
            Row dk;
            RowV dv;
#pragma unroll 1
            for (int32 i = 0; i < params().group; ++i) {
                const Head head(block, i);
                const auto seen_by = head.score.rows(key);
#pragma unroll 1
                for (int32 query = seen_by.first; query <= seen_by.last; ++query) {
                    if (dk.all_nan() && dv.all_nan()) break;
                    const Query row_q = load_query(head, query);
                    const Weights pair = weights(head, row_q, query, row, key);
                    dk.add(pair.ds, row_q.q);
                    dv.add(pair.p, row_q.do_);
                }
            }
            const HeadIndex at = block.key_head();
            dk.store(head_data<T>(params().dk, at, at.head) + key * params().dk.row,
                     params().head_dim, scale());
            dv.store(head_data<T>(params().dv, at, at.head) + key * params().dv.row,
                     params().head_dim_v, 1);
        }
    }

    // What the block's keys add to a query's dq, up to `scale`. By a warp.
    DEVICE Row query_gradient(const Head& head, int32 query) const {
        const Query row = load_query(head, query);
        const auto seen = head.score.keys(query);
        Row dq;
#pragma unroll 1
        for (int32 key = max(seen.first, block.first_key); key <= min(seen.last, last_key());
             ++key) {
            if (dq.all_nan()) break;
            const Key row_k = load_key(key);
            dq.add(weights(head, row, query, row_k, key).ds, row_k.k);
        }
        return dq;
    }

    // The same for all queries, of a whole head: a warp a query.
    DEVICE void store_query_gradients() const {
        const Head head(block, 0);
        const HeadIndex at = block.key_head();
        T* const dq = head_data<T>(params().dq, at, at.head);
#pragma unroll 1
        for (int32 query = 4 * index + warp(); query < params().seqlen_q;
             query += 4 * Config::CONSUMERS) {
            query_gradient(head, query)
                .store(dq + query * params().dq.row, params().head_dim, scale());
        }
    }

    // This consumer's parts of dQ to dq_sum, in turns if need be.
    DEVICE void add_query_gradients() const {
        block.rounding().wait_for_place(block.load_word(Block::NUMBER));
        block.for_each_step({0, 0}, [&](const Step& step) {
            if constexpr (Config::DETERMINISTIC) {
                wait_for_turn(block.dq_turns(step) + index, block.turn(step.tile));
            }
            const Head head(block, step.head);
#pragma unroll 1
            for (int part = index; part < Config::DQ_PARTS; part += Config::CONSUMERS) {
                add_part(head, step, part);
            }
            sync_named(Block::ONE_CONSUMER + index, WARPGROUP);
            if (Config::DETERMINISTIC && leads()) pass_turn(block.dq_turns(step) + index);
        });
        if (leads()) pass_turn(block.rounding().added(block.load_word(Block::NUMBER)));
    }
    // 64 dims of some queries.
    DEVICE void add_part(const Head& head, const Step& step, int part) const {
        float* const sums = block.dq_sums(step) + part * Dq::PART;
        const int32 first = step.tile * Config::TILE_M + Dq::first_query(part);
#pragma unroll 1
        for (int32 row = warp(); row < Dq::QUERIES; row += 4) {
            if (first + row >= params().seqlen_q) break;
            const Row dq = query_gradient(head, first + row);
#pragma unroll
            for (int i = 0; i < Row::VALUES; ++i) {
                const int dim = Row::dim(i) - Dq::first_dim(part);
                if (dim >= 0 && dim < 64) add_global<1>(sums + Dq::place(dim, row), &dq.value[i]);
            }
        }
    }

    // What is spoilt, when all of the block's keys and queries are done.
    DEVICE void repair() const {
        block.wait_for_inspectors();
        const bool dq_spoilt = block.is_set(Block::DQ_SPOILT);
        const bool dkv_spoilt = block.is_set(Block::DKV_SPOILT);
        if (!dq_spoilt && !dkv_spoilt) return;
        if (leads()) wait_bulk<0>();
        sync_named(Block::ALL_CONSUMERS, Config::CONSUMERS * WARPGROUP);
        if (dkv_spoilt) store_key_gradients();
        if (!dq_spoilt) return;
        if constexpr (Config::WHOLE_HEAD) {
            store_query_gradients();
        } else {
            add_query_gradients();
        }
    }
};
