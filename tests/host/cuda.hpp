// CUDA's words for a C++ compiler. Included in front of every kernel that is compiled for the host.
#pragma once
#include <math.h>
#include <string.h>

#include <utility>

#include "runtime.hpp"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

// ---- barriers and collectives -------------------------------------------------------------------

inline void __syncthreads(host::Place place = host::Place::here()) {
    host::block_barrier("__syncthreads", false, place);
}

inline int __syncthreads_or(int predicate, host::Place place = host::Place::here()) {
    return host::block_barrier("__syncthreads_or", predicate, place) > 0;
}

inline void __syncwarp(unsigned mask = ~0u, host::Place place = host::Place::here()) {
    host::warp_barrier(mask, place);
}

namespace host {

template <class T>
struct ShuffleOperands {
    T value;
    int source;  // lane
    T result;
};

// Every lane of `mask` gets the value that lane `source` brought.
template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source, Place place) {
    using Operands = ShuffleOperands<T>;
    Operands operands{value, source, {}};
    warp_collective(operation, mask, place, &operands, [](void* const lanes[WARP]) {
        for (int i = 0; i < WARP; ++i) {
            if (!lanes[i]) continue;
            auto& lane = *static_cast<Operands*>(lanes[i]);
            if (!lanes[lane.source]) {
                fail("lane %d shuffles from lane %d, not in the mask", i, lane.source);
            }
            lane.result = static_cast<Operands*>(lanes[lane.source])->value;
        }
    });
    return operands.result;
}

// The lane `source` of a segment of `width` lanes; the own lane where that leaves the segment.
inline int in_segment(int source, int width) {
    const int first = lane() / width * width;
    return source >= first && source < first + width ? source : lane();
}

}  // namespace host

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = host::WARP,
              host::Place place = host::Place::here()) {
    const int segment = host::lane() / width * width;
    return host::shuffle("__shfl_sync", mask, value, segment + (source & (width - 1)), place);
}

// A partner in a later segment gives the own value, one in an earlier segment its own.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = host::WARP,
                  host::Place place = host::Place::here()) {
    const int source = host::lane() ^ lane_mask;
    const bool later = source >= (host::lane() / width + 1) * width;
    return host::shuffle("__shfl_xor_sync", mask, value, later ? host::lane() : source, place);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = host::WARP,
                 host::Place place = host::Place::here()) {
    const int source = host::in_segment(host::lane() - delta, width);
    return host::shuffle("__shfl_up_sync", mask, value, source, place);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = host::WARP,
                   host::Place place = host::Place::here()) {
    const int source = host::in_segment(host::lane() + delta, width);
    return host::shuffle("__shfl_down_sync", mask, value, source, place);
}

// A bit for each lane of `mask`: whether its predicate holds.
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              host::Place place = host::Place::here()) {
    struct Operands {
        int predicate;
        unsigned result;
    } operands{predicate, 0};
    host::warp_collective("vote", mask, place, &operands, [](void* const lanes[host::WARP]) {
        unsigned votes = 0;
        for (int i = 0; i < host::WARP; ++i) {
            if (lanes[i] && static_cast<Operands*>(lanes[i])->predicate) votes |= 1u << i;
        }
        for (int i = 0; i < host::WARP; ++i) {
            if (lanes[i]) static_cast<Operands*>(lanes[i])->result = votes;
        }
    });
    return operands.result;
}

inline int __any_sync(unsigned mask, int predicate, host::Place place = host::Place::here()) {
    return __ballot_sync(mask, predicate, place) != 0;
}

inline int __all_sync(unsigned mask, int predicate, host::Place place = host::Place::here()) {
    return __ballot_sync(mask, predicate, place) == mask;
}

template <class T>
T atomicAdd(T* address, T value) {
    return host::atomic_add(address, value);
}

// ---- arithmetic ---------------------------------------------------------------------------------

template <class T>
constexpr T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
    return a < b ? b : a;
}
// Of a number and NaN, the number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

// ---- launching ----------------------------------------------------------------------------------

namespace host {

template <class... Parameters, size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<Parameters*>(arguments[I])...);
}

template <class... Parameters>
void call(void (*kernel)(Parameters...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

template <class... Parameters>
size_t parameter_bytes(void (*)(Parameters...), size_t i) {
    constexpr size_t bytes[] = {sizeof(Parameters)..., 0};
    return i < sizeof...(Parameters) ? bytes[i] : 0;
}

}  // namespace host

// What the worker looks up in a kernel's library: a call of it with arguments[i] pointing to its
// i-th argument, and the bytes of the i-th parameter, 0 past the last.
#define HOST_ENTRY(KERNEL)                                                            \
    extern "C" void host_call(void** arguments) { host::call(KERNEL, arguments); }    \
    extern "C" size_t host_parameter_bytes(size_t i) { return host::parameter_bytes(KERNEL, i); }
