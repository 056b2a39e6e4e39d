// The online softmax of the rows that a warp owns.
#pragma once
#include "types.cuh"
#include "mma.cuh"
#include "score.cuh"

// Over the four lanes that share the rows of an accumulator.
template <class Real>
DEVICE Real quad_max(Real x) {
    x = max(x, __shfl_xor_sync(0xffffffff, x, 1));
    return max(x, __shfl_xor_sync(0xffffffff, x, 2));
}

template <class Real>
DEVICE Real quad_sum(Real x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Rows are kept as accumulators hold them: of row block m, [m][0] is row g and [m][1] row g + 8.
// All exponents are in base 2.
template <class Real, int ROW_BLOCKS>
struct OnlineSoftmax {
    Real top[ROW_BLOCKS][2];  // the largest exponent so far, or less: see outgrown
    Real sum[ROW_BLOCKS][2];  // of 2^(exponent - top), over this lane's columns only

    DEVICE OnlineSoftmax() {
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                top[m][r] = -infinity<Real>();
                sum[m][r] = 0;
            }
        }
    }

    // Takes the scores of a tile of keys into `top`, and sets `rescale`: what sums that were made
    // with the earlier `top` are to be multiplied by. A row without any visible key so far has
    // top = -inf. NaN never gets into top (max drops it) but into P and sum, where it stays.
    template <int KEY_BLOCKS>
    DEVICE void raise_top(const Accumulator<Real> (&s)[ROW_BLOCKS][KEY_BLOCKS], Real factor,
                          Real (&rescale)[ROW_BLOCKS][2]) {
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const Real before = top[m][r];
                top[m][r] = max(before, quad_max(largest(s[m], r)) * factor);
                rescale[m][r] = exp2_real(before - finite_top(m, r));
                sum[m][r] *= rescale[m][r];
            }
        }
    }

    // Whether an exponent of some row of the warp is larger than its `top` by more than `slack`.
    // Where none is, `top` may stay: P is up to 2^slack then. In 16 bits that costs some percent of
    // accuracy, as the largest P of a row is not 1 and so is rounded, too. (Not for types whose
    // at_most_1 takes P to be at most 1.)
    template <int KEY_BLOCKS>
    DEVICE bool outgrown(const Accumulator<Real> (&s)[ROW_BLOCKS][KEY_BLOCKS], Real factor,
                         Real slack) const {
        bool found = false;
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                found |= largest(s[m], r) * factor - top[m][r] > slack;
            }
        }
        return __any_sync(0xffffffff, found);
    }

    // The same by sums of P over this lane's columns: whether one is larger than 2^slack, or a row
    // has seen nothing before, so that its P says nothing. (NaN is what it is with any `top`.)
    DEVICE bool sums_outgrown(const Real (&added)[ROW_BLOCKS][2], int slack) const {
        const Real limit = 1 << slack;
        bool found = false;
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                found |= top[m][r] == -infinity<Real>() ? added[m][r] == added[m][r]
                                                        : added[m][r] > limit;
            }
        }
        return __any_sync(0xffffffff, found);
    }

    // Turns 16 x 16 scores of row block m into P = 2^(factor s - top), 0 in rows that see nothing.
    template <class M>
    DEVICE void exponentiate(Accumulator<Real>& s, int m, Real factor) const {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            Real& x = s.value[i / 4][i % 4];
            x = M::at_most_1(exp2_real(x * factor - finite_top(m, i % 4 / 2)));
        }
    }

    // Adds P to `sum`, or to sums of the same form.
    DEVICE void add(const Accumulator<Real>& p, int m) {
        add(p, m, sum);
    }
    static DEVICE void add(const Accumulator<Real>& p, int m, Real (&sums)[ROW_BLOCKS][2]) {
        // Not one after another: the sum of a row is on the way of every step.
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            sums[m][r] += (p.value[0][2 * r] + p.value[0][2 * r + 1]) +
                          (p.value[1][2 * r] + p.value[1][2 * r + 1]);
        }
    }

    // Ends the softmax: `scale` is what the sums are to be multiplied by, 0 for a row that saw no
    // key, and `lse` the natural logarithm of the sum of exponentials, -inf for such a row.
    DEVICE void finish(Real (&scale)[ROW_BLOCKS][2], Real (&lse)[ROW_BLOCKS][2]) {
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const Real total = quad_sum(sum[m][r]);
                scale[m][r] = total == 0 ? 0 : reciprocal(total);
                lse[m][r] = total == 0 ? -infinity<Real>()
                                       : (top[m][r] + log2(total)) * static_cast<Real>(LN_2);
            }
        }
    }

private:
    // Of row r, in this lane's columns.
    template <int KEY_BLOCKS>
    static DEVICE Real largest(const Accumulator<Real> (&s)[KEY_BLOCKS], int r) {
        Real largest = -infinity<Real>();
#pragma unroll
        for (int i = 0; i < 2 * KEY_BLOCKS; ++i) {
            const Real* const pair = &s[i / 2].value[i % 2][2 * r];
            largest = max(largest, max(pair[0], pair[1]));
        }
        return largest;
    }
    DEVICE Real finite_top(int m, int r) const {
        return top[m][r] == -infinity<Real>() ? 0 : top[m][r];
    }
};
