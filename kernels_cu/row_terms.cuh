// What the backward kernels need of a row of queries, besides q and dO.
#pragma once
#include "types.cuh"

// P_ij = 2^(exponent_ij - lse), dS_ij = P_ij (dP_ij - dot) times the score's derivative. The kernel
// row_dots writes them, adjacent, to params.row_dots.
template <class Real>
struct alignas(2 * sizeof(Real)) RowTerms {
    Real lse;  // in base 2; 0 in a row that sees no key (its pairs are all masked)
    Real dot;  // D_i
};
