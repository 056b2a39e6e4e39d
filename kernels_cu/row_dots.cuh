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

// A few lanes of a warp share a row; every element is read once. ACCESS_BYTES divides all rows.
template <class T, int HEAD_DIM_V, int ACCESS_BYTES>
struct RowDots {
    using Real = typename Mma<T>::Real;
    static constexpr int ELEMENTS = ACCESS_BYTES / sizeof(T);   // of one access
    static constexpr int UNITS = HEAD_DIM_V / ELEMENTS;         // of one row
    static constexpr int LANES = largest_divisor(UNITS, WARP);  // of one row
    static constexpr int WARP_ROWS = WARP / LANES;              // side by side

    // Consecutive elements, loaded by one instruction.
    struct alignas(ACCESS_BYTES) Unit {
        T element[ELEMENTS];
    };

    static DEVICE int lane() {  // of a row
        return threadIdx.x % LANES;
    }
    static DEVICE void add_products(Real& sum, const Unit& a, const Unit& b) {
#pragma unroll
        for (int i = 0; i < ELEMENTS; ++i) sum += to_real(a.element[i]) * to_real(b.element[i]);
    }
    // Of the row's lanes.
    static DEVICE Real add_lanes(Real sum) {
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) {
            sum += __shfl_xor_sync(0xffffffff, sum, step);
        }
        return sum;
    }

    static DEVICE Real dot(const T* o, const T* do_, int cols) {
        Real sum = 0;
#pragma unroll
        for (int unit = lane(); unit < UNITS; unit += LANES) {
            const int col = unit * ELEMENTS;
            if (col >= cols) break;
            add_products(sum, *reinterpret_cast<const Unit*>(o + col),
                         *reinterpret_cast<const Unit*>(do_ + col));
        }
        return add_lanes(sum);
    }

    // A row's terms, alike in all its lanes; those of a row that does not exist make P zero.
    static DEVICE RowTerms<Real> terms(const AttentionParams& params, const HeadIndex& index,
                                       int32 row) {
        const bool exists = row < params.seqlen_q;
        const Real sum = dot(row_data<const T>(params.o, index, row),
                             row_data<const T>(params.do_, index, row),
                             exists ? params.head_dim_v : 0);
        if (!exists) return {infinity<Real>(), 0};
        const Real dlse =
            params.dlse.data == nullptr ? 0 : *row_data<const Real>(params.dlse, index, row);
        return {to_log2(*row_data<const Real>(params.lse, index, row)), sum - dlse};
    }
    static DEVICE Real to_log2(Real lse) {
        return lse == -infinity<Real>() ? -lse : lse * static_cast<Real>(LOG2_E);
    }

    template <class Element>
    static DEVICE Element* row_data(const Tensor& tensor, const HeadIndex& index, int32 row) {
        return head_data<Element>(tensor, index, index.head) + row * tensor.row;
    }
};
