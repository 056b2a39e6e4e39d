// Products of tiles: what a warp's accumulators gain from a pass over tiles in shared memory.
//
// Every fragment of b that is loaded serves all row blocks of the warp: with mma.sync it is the
// bandwidth of shared memory that ends first.
#pragma once
#include "types.cuh"
#include "tile.cuh"
#include "mma.cuh"

// acc[i][j] += scale * (a[m + i][.] . b[n + j][.]): rows of two tiles multiplied with each other, by
// the products Mma of their type, UNROLL steps of 16 columns at a time.
template <class M, int UNROLL, class ATile, class BTile, class Real, int ROW_BLOCKS, int COL_BLOCKS,
          class Factor>
DEVICE void multiply_rows(Accumulator<Real> (&acc)[ROW_BLOCKS][COL_BLOCKS], ATile a, int m,
                          BTile b, int n, Factor scale) {
    static_assert(ATile::COLS == BTile::COLS, "rows of one length");
    constexpr int STEPS = steps_of<M>(ATile::COLS / 16);
#pragma unroll UNROLL
    for (int k = 0; k < ATile::COLS; k += 16 * STEPS) {
        typename M::A fragment[ROW_BLOCKS][STEPS];
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS * STEPS; ++i) {
            const int block = i / STEPS, step = i % STEPS;
            fragment[block][step] = M::load_a(a, m + 16 * block, k + 16 * step);
        }
#pragma unroll
        for (int j = 0; j < COL_BLOCKS; ++j) {
            typename M::B other[STEPS];
#pragma unroll
            for (int step = 0; step < STEPS; ++step) {
                other[step] = M::load_b_transposed(b, k + 16 * step, n + 16 * j);
            }
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS; ++i) M::multiply(acc[i][j], fragment[i], other, scale);
        }
    }
}

// acc[i][j] += scale * sum_k weights[i][k] b[k][n + j]: rows of a tile, weighted and added up,
// UNROLL steps of 16 rows at a time.
// weights(i, k) is the fragment of row block i and rows k..k + 15, in the order of k of Mma::to_a.
template <class M, int UNROLL, class BTile, class Real, int ROW_BLOCKS, int COL_BLOCKS,
          class Weights, class Factor>
DEVICE void add_weighted_rows(Accumulator<Real> (&acc)[ROW_BLOCKS][COL_BLOCKS], Weights weights,
                              BTile b, int n, Factor scale) {
#pragma unroll UNROLL
    for (int k = 0; k < BTile::ROWS; k += 16) {
        typename M::A fragment[ROW_BLOCKS][1];
#pragma unroll
        for (int i = 0; i < ROW_BLOCKS; ++i) fragment[i][0] = weights(i, k);
#pragma unroll
        for (int j = 0; j < COL_BLOCKS; ++j) {
            const typename M::B other[1] = {M::load_b(b, k, n + 16 * j)};
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS; ++i) M::multiply(acc[i][j], fragment[i], other, scale);
        }
    }
}

// Writes a warp's accumulators to a tile, times `scale` and rounded to the tile's type.
template <class Tile, class Real, int ROW_BLOCKS, int COL_BLOCKS, class Factor>
DEVICE void store_accumulators(Tile tile, int first_row, int first_col,
                               const Accumulator<Real> (&acc)[ROW_BLOCKS][COL_BLOCKS],
                               Factor scale) {
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS; ++i) {
#pragma unroll
        for (int j = 0; j < COL_BLOCKS; ++j) {
#pragma unroll
            for (int x = 0; x < 4; ++x) {
                const int h = x / 2, e = x % 2 * 2;
                store_pair(tile, first_row + 16 * i + Accumulator<Real>::row(e),
                           first_col + 16 * j + Accumulator<Real>::col(h, e),
                           acc[i][j].value[h][e] * scale, acc[i][j].value[h][e + 1] * scale);
            }
        }
    }
}
