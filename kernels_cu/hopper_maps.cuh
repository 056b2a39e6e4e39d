// The second argument of the Hopper kernels: how TMA sees the tensors of AttentionParams.
//
// flash_cupy/cuda/hopper.py fills these structs, one map after another in this order. A box is 64
// columns by the rows that a plan gives for its tensor.
#pragma once
#include "params.cuh"
#include "tma.cuh"

struct ForwardMaps {
    TensorMap q;  // boxes of TILE_M rows
    TensorMap k;  // TILE_N
    TensorMap v;  // TILE_N
    TensorMap o;  // 64, the rows of one warpgroup
};

struct BackwardMaps {
    TensorMap q;    // boxes of TILE_M rows
    TensorMap k;    // TILE_N
    TensorMap v;    // TILE_N
    TensorMap do_;  // TILE_M
    TensorMap dk;   // 64, the rows of one warpgroup
    TensorMap dv;   // 64
    TensorMap dq;   // those of a consumer's part of dQ
};

// The box at (row, col) of a head; its head is passed apart because k and v have fewer than q.
// The family's calls have at most two batch axes, which stand last.
DEVICE BoxPlace box_place(const HeadIndex& index, int32 head, int32 row, int32 col) {
    return {col, row, head, {index.batch[BATCH_AXES - 2], index.batch[BATCH_AXES - 1]}};
}
