// What the backward kernels need of a row of queries, besides q and dO.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "split.cuh"

// P_ij = 2^(exponent_ij - lse), dS_ij = P_ij (dP_ij - dot) times the score's derivative. The kernel
// row_dots writes them, adjacent, to params.row_dots.
template <class Real>
struct alignas(2 * sizeof(Real)) RowTerms {
    Real lse;  // in base 2; +inf instead of -inf, so that P = 0 where all that a row sees is -inf
    Real dot;  // D_i
};

// The same of rows 2i and 2i + 1, as hopper_backward takes them: a lane wants both rows at once,
// but lse some time before D.
template <class Real>
struct alignas(4 * sizeof(Real)) RowTermsPair {
    Real lse[2];  // +inf in rows that fill up a tile: their pairs have P = 0
    Real dot[2];
};

// |D| of a row as an operand of max: its bits, or 0 if it is not finite.
DEVICE uint32 finite_bits(float dot) {
    const uint32 bits = bit_cast<uint32>(dot) & 0x7fffffff;
    return bits < FLOAT_INFINITY ? bits : 0;
}

// What no |dS| exceeds where dO, V and D have these largest values: P is 1 at most, and a softcap's
// derivative the scale.
template <class Config>
DEVICE float largest_ds(const AttentionParams& params, float do_, float v, float dot) {
    const float largest = do_ * v * static_cast<float>(params.head_dim_v) + dot;
    const float derivative = Config::SOFTCAP ? scalars<float>(params).scale : 1;
    return min(largest * derivative, LARGEST_FLOAT);
}
