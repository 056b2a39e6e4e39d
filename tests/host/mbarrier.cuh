// The functions of kernels_cu/mbarrier.cuh on the host device, see ptx.cuh and barriers.cpp.
#pragma once
#include "types.cuh"

constexpr int BARRIER_BYTES = 8;

DEVICE void init_barrier(uint32 barrier, uint32 arrivals) { host::init_barrier(barrier, arrivals); }

DEVICE void fence_barrier_init() { host::fence_barrier_init(); }

DEVICE void arrive_at(uint32 barrier) { host::arrive_at(barrier, 0); }

DEVICE void arrive_expecting(uint32 barrier, uint32 bytes) { host::arrive_at(barrier, bytes); }

DEVICE void wait_for(uint32 barrier, uint32 parity, host::Place place = host::Place::here()) {
    host::wait_for(barrier, parity, place);
}
