// The functions of kernels_cu/tma.cuh on the host device, see ptx.cuh and copies.cpp.
#pragma once
#include "types.cuh"

// Filled by machine.py.
struct alignas(64) TensorMap {
    uint64 words[16];
};

struct BoxPlace {
    int32 col, row, head, batch[2];
};

DEVICE void prefetch_map(const TensorMap* map) { host::prefetch_map(map); }

DEVICE uint32 multiprocessors() { return 2; }

DEVICE void prefetch_box(const TensorMap* map, BoxPlace place) {
    host::prefetch_box(map,
                       {place.col, place.row, place.head, place.batch[1], place.batch[0]});
}

DEVICE void load_box(uint32 shared, const TensorMap* map, BoxPlace place, uint32 barrier) {
    host::load_box(shared, map,
                   {place.col, place.row, place.head, place.batch[1], place.batch[0]}, barrier);
}

DEVICE void store_box(const TensorMap* map, BoxPlace place, uint32 shared) {
    host::store_box(map, {place.col, place.row, place.head, place.batch[1], place.batch[0]},
                    shared);
}

DEVICE void load_bulk(uint32 shared, const void* global, uint32 bytes, uint32 barrier) {
    host::load_bulk(shared, global, bytes, barrier);
}

DEVICE void store_bulk(void* global, uint32 shared, uint32 bytes) {
    host::store_bulk(global, shared, bytes);
}

DEVICE void add_bulk(float* global, uint32 shared, uint32 bytes) {
    host::add_bulk(global, shared, bytes);
}

DEVICE void commit_bulk() { host::commit_bulk(); }

template <int PENDING>
DEVICE void wait_bulk_read() {
    host::wait_bulk(PENDING, true);
}

template <int PENDING>
DEVICE void wait_bulk() {
    host::wait_bulk(PENDING, false);
}

DEVICE void fence_async_shared() { host::fence_async_shared(); }
