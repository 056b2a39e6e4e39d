// o of rows that a matrix product would spoil, as a value of V that is not finite stands where they
// do not see it (see nonfinite.cuh): from one pair of a row and a key after another, by ordinary
// arithmetic. Slow, and rare.
#pragma once
#include "score.cuh"
#include "lane_row.cuh"
#include "warpgroup.cuh"

template <class Config>
struct PairOutput {
    using T = typename Config::Element;
    using Row = LaneRow<T, Config::HEAD_DIM>;
    using RowV = LaneRow<T, Config::HEAD_DIM_V>;

    const AttentionParams& params;
    const HeadIndex head;
    const Score<Config, float> score;

    DEVICE PairOutput(const AttentionParams& params, const HeadIndex& head)
        : params(params), head(head), score(params, head) {}

    // Of the rows first..last - 1 those that exist, by a warpgroup, a warp a row; their lse is there.
    DEVICE void store(int32 first, int32 last) const {
        const float* const lse = head_data<const float>(params.lse, head, head.head);
        T* const o = head_data<T>(params.o, head, head.head);
#pragma unroll 1
        for (int32 row = first + threadIdx.x % WARPGROUP / WARP; row < min(last, params.seqlen_q);
             row += WARPGROUP / WARP) {
            output(row, lse[row * params.lse.row])
                .store(o + row * params.o.row, params.head_dim_v, 1);
        }
    }
    DEVICE RowV output(int32 row, float lse) const {
        // Where all that the row sees is -inf, all weights are 0.
        const float in_base_2 = lse == -infinity<float>() ? -lse : lse * static_cast<float>(LOG2_E);
        const int32 kv_head = head.head / params.group;
        const T* const k = head_data<const T>(params.k, head, kv_head);
        const T* const v = head_data<const T>(params.v, head, kv_head);
        Row q;
        q.load(head_data<const T>(params.q, head, head.head) + row * params.q.row,
               params.head_dim);
        RowV o;
        const auto keys = score.keys(row);
#pragma unroll 1
        for (int32 key = keys.first; key <= keys.last && !o.all_nan(); ++key) {
            Row row_k;
            RowV row_v;
            row_k.load(k + key * params.k.row, params.head_dim);
            row_v.load(v + key * params.v.row, params.head_dim_v);
            const float exponent = score.modify(q.dot(row_k), row, key) * score.factor;
            o.add(exp2_real(exponent - in_base_2), row_v);
        }
        return o;
    }
};
