// The one argument of every kernel: tensors, shape, scalars.
//
// flash_cupy/cuda/params.py mirrors these structs as NumPy dtypes, field by field; a test holds
// both against each other.
#pragma once
#include "types.cuh"

constexpr int BATCH_AXES = 4;

// A tensor (batch axes..., head, row, column). Strides count elements and may be zero or negative;
// the last axis is contiguous. Tensors with one value a row (lse) have no columns, alibi_slopes
// has no rows either. Unused batch axes have extent 1.
struct Tensor {
    void* data;
    int64 batch[BATCH_AXES];
    int64 head;
    int64 row;
};

// What scores are multiplied by. In both precisions, so that kernels which compute in float leave
// the double pipe alone, which takes hundreds of cycles to answer.
template <class Real>
struct Scalars {
    Real scale;    // of q . k
    Real to_log2;  // makes q . k a score in base 2, or, where there is a softcap, in units of that
    Real softcap;  // in base 2
};

struct AttentionParams {
    Tensor q;             // (*batch, heads, seqlen_q, head_dim)
    Tensor k;             // (*batch, heads / group, seqlen_k, head_dim)
    Tensor v;             // (*batch, heads / group, seqlen_k, head_dim_v)
    Tensor o;             // (*batch, heads, seqlen_q, head_dim_v)
    Tensor lse;           // (*batch, heads, seqlen_q), natural logarithm, float or double
    Tensor alibi_slopes;  // (*batch, heads), float or double
    Tensor tickets;       // one int32, zero: work that blocks have taken, see hopper_items.cuh
    // Backward only
    Tensor do_;       // like o
    Tensor dlse;      // like lse; data is null where no gradient of lse is asked for
    Tensor row_dots;  // (*batch, heads, seqlen_q, 2): lse_i in base 2 and D_i, see row_terms.cuh;
                      // Hopper's: (all heads, rows of whole tiles, 2), of two rows side by side
    Tensor dq;        // like q
    Tensor dk;        // like k
    Tensor dv;        // like v
    Tensor dq_sum;    // where dQ adds up before it is rounded to q's type, see dq_sum.cuh;
                      // Hopper's: (places of heads, rows, columns), see hopper_dq_sum.cuh
    // Hopper's backward only
    Tensor dq_turns;   // (all heads, tiles, consumers), int32, zeros: who adds next, see turns.cuh
    Tensor dq_counts;  // (2, all key heads), int32, zeros, see hopper_dq_rounding.cuh

    int32 batch[BATCH_AXES];  // extents
    int32 heads;
    int32 group;  // query heads that share one key head
    int32 seqlen_q;
    int32 seqlen_k;
    int32 head_dim;
    int32 head_dim_v;
    // Query i sees the keys j with i + band_low <= j <= i + band_high: causal and window in one,
    // a side without a limit is +-2^30 (beyond every sequence), so that sums fit in an int32.
    int32 band_low;
    int32 band_high;
    // Hopper's backward only
    int32 dq_heads;   // key heads that dq_sum has a place for
    int32 section;    // key heads whose tiles blocks take side by side, see head_tiles.cuh
    int32 dq_lag;     // blocks from a share's computation to its rounding, and the pieces of the
    int32 dq_pieces;  // last shares, see hopper_dq_rounding.cuh
    Scalars<double> doubles;
    Scalars<float> floats;
};

template <class Real>
DEVICE const Scalars<Real>& scalars(const AttentionParams& params);
template <>
DEVICE const Scalars<float>& scalars(const AttentionParams& params) {
    return params.floats;
}
template <>
DEVICE const Scalars<double>& scalars(const AttentionParams& params) {
    return params.doubles;
}

// The place of one (batch, head) in the grid's order, heads varying fastest.
struct HeadIndex {
    int32 batch[BATCH_AXES];
    int32 head;

    HeadIndex() = default;

    DEVICE HeadIndex(const AttentionParams& params, uint32 index, uint32 heads) {
        head = index % heads;
        index /= heads;
#pragma unroll
        for (int axis = BATCH_AXES - 1; axis >= 0; --axis) {
            const uint32 extent = params.batch[axis];
            batch[axis] = 0;
            if (extent == 1) continue;  // most are, and divisions take long
            batch[axis] = index % extent;
            index /= extent;
        }
    }
};

// The first row of `tensor` at a batch index and head; its head is passed apart because k and v
// have fewer than q.
template <class T>
DEVICE T* head_data(const Tensor& tensor, const HeadIndex& index, int32 head) {
    int64 offset = head * tensor.head;
#pragma unroll
    for (int axis = 0; axis < BATCH_AXES; ++axis) {
        offset += index.batch[axis] * tensor.batch[axis];
    }
    return static_cast<T*>(tensor.data) + offset;
}
