// The functions of kernels_cu/wgmma.cuh on the host device, see ptx.cuh and wgmma.cpp.
#pragma once
#include "types.cuh"

DEVICE void wgmma_fence(host::Place place = host::Place::here()) { host::wgmma_fence(place); }

DEVICE void wgmma_commit(host::Place place = host::Place::here()) { host::wgmma_commit(place); }

template <int PENDING>
DEVICE void wgmma_wait(host::Place place = host::Place::here()) {
    host::wgmma_wait(PENDING, place);
}

namespace host {

template <class T>
constexpr bool IS_BF16 = false;
template <>
constexpr bool IS_BF16<bfloat16> = true;

}  // namespace host

template <class T, int N, bool TRANSPOSED_A, bool TRANSPOSED_B>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64 a, uint64 b, bool accumulate,
                     host::Place place = host::Place::here()) {
    host::Product product{d, nullptr,      a,            b,         N, host::IS_BF16<T>,
                          TRANSPOSED_A, TRANSPOSED_B, accumulate};
    host::wgmma(product, place);
}

template <class T, int N, bool TRANSPOSED_B>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32 (&a)[4], uint64 b, bool accumulate,
                     host::Place place = host::Place::here()) {
    host::Product product{d, a, 0, b, N, host::IS_BF16<T>, false, TRANSPOSED_B, accumulate};
    host::wgmma(product, place);
}
