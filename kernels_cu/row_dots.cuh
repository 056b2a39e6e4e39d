// D_i and lse_i of a row of o: what the kernels row_dots and hopper_row_dots have in common.
#pragma once
#include "types.cuh"
#include "params.cuh"
#include "tile.cuh"
#include "mma.cuh"
#include "row_terms.cuh"

DEVICE float to_real(float16 x) {
    return to_float(x);
}
DEVICE float to_real(bfloat16 x) {
    return to_float(x);
}
DEVICE float to_real(tensorfloat32 x) {
    return x.value;
}
DEVICE float to_real(float x) {
    return x;
}
DEVICE double to_real(double x) {
    return x;
}

// Config has the Element type, HEAD_DIM_V, WARPS and ACCESS_BYTES. A few lanes of a warp share a
// row; every element is read once.
template <class Config>
struct RowDots {
    using T = typename Config::Element;
    using Real = typename Mma<T>::Real;
    static constexpr int ELEMENTS = Config::ACCESS_BYTES / sizeof(T);  // of one access
    static constexpr int UNITS = Config::HEAD_DIM_V / ELEMENTS;        // of one row
    static constexpr int LANES = largest_divisor(UNITS, WARP);         // of one row
    static constexpr int ROWS = Config::THREADS / LANES;               // of a step

    // Consecutive elements, loaded by one instruction.
    struct alignas(Config::ACCESS_BYTES) Unit {
        T element[ELEMENTS];
    };

    static DEVICE Real dot(const T* o, const T* do_, int cols) {
        const int lane = threadIdx.x % LANES;
        Real sum = 0;
#pragma unroll
        for (int unit = lane; unit < UNITS; unit += LANES) {
            const int col = unit * ELEMENTS;
            if (col >= cols) break;
            const Unit a = *reinterpret_cast<const Unit*>(o + col);
            const Unit b = *reinterpret_cast<const Unit*>(do_ + col);
#pragma unroll
            for (int i = 0; i < ELEMENTS; ++i) {
                sum += to_real(a.element[i]) * to_real(b.element[i]);
            }
        }
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(0xffffffff, sum, step);
        }
        return sum;
    }

    // A row's terms, alike in all its lanes; those of a row that does not exist make P zero.
    static DEVICE RowTerms<Real> terms(const AttentionParams& params, const HeadIndex& index,
                                       int32 row) {
        const bool exists = row < params.seqlen_q;
        const Real sum = dot(row_data<const T>(params.o, index, row),
                             row_data<const T>(params.do_, index, row),
                             exists ? params.head_dim_v : 0);
        if (!exists) return {infinity<Real>(), 0};
        const Real lse = *row_data<const Real>(params.lse, index, row);
        const Real dlse =
            params.dlse.data == nullptr ? 0 : *row_data<const Real>(params.dlse, index, row);
        return {lse == -infinity<Real>() ? -lse : lse * static_cast<Real>(LOG2_E), sum - dlse};
    }
    static DEVICE bool is_first_lane() {  // of a row
        return threadIdx.x % LANES == 0;
    }

    template <class Element>
    static DEVICE Element* row_data(const Tensor& tensor, const HeadIndex& index, int32 row) {
        return head_data<Element>(tensor, index, index.head) + row * tensor.row;
    }
};
