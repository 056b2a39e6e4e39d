// Asynchronous copies by the tensor memory accelerator (TMA), one instruction a function.
//
// One thread starts a copy. It reads and writes shared memory by the asynchronous proxy: between
// it and ordinary loads and stores of the same bytes stand a barrier's completed phase (after a
// load), wait_bulk_read (before the source of a store is overwritten) and fence_async_shared
// (after ordinary stores). tests/host/tma.cuh implements the same functions in plain C++.
#pragma once
#include "types.cuh"

// Where a tensor lies in global memory and how boxes of it lie in shared memory, in the bytes that
// cuTensorMapEncodeTiled makes: a part of a kernel's __grid_constant__ parameters.
struct alignas(64) TensorMap {
    uint64 words[16];
};

// The first element of a box. All maps have these five axes, the last one varying fastest in
// memory being `col`; `batch` are the two last batch axes of AttentionParams.
struct BoxPlace {
    int32 col, row, head, batch[2];
};

DEVICE void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// How many multiprocessors there are, at most.
DEVICE uint32 multiprocessors() {
    uint32 count;
    asm("mov.u32 %0, %%nsmid;" : "=r"(count));
    return count;
}

// A box of the tensor to L2, where a load will find it.
DEVICE void prefetch_box(const TensorMap* map, BoxPlace place) {
    asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global.tile [%0, {%1, %2, %3, %4, %5}];" ::
                     "l"(map),
                 "r"(place.col), "r"(place.row), "r"(place.head), "r"(place.batch[1]),
                 "r"(place.batch[0])
                 : "memory");
}

// A box of the tensor to shared memory (a multiple of 1024 where the map swizzles by 128 bytes);
// what lies outside the tensor becomes zero. All of its bytes count at the barrier.
DEVICE void load_box(uint32 shared, const TensorMap* map, BoxPlace place, uint32 barrier) {
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared),
                 "l"(map), "r"(barrier), "r"(place.col), "r"(place.row), "r"(place.head),
                 "r"(place.batch[1]), "r"(place.batch[0])
                 : "memory");
}

// A box from shared memory to the tensor, in this thread's current bulk group; what lies outside
// the tensor is not written.
DEVICE void store_box(const TensorMap* map, BoxPlace place, uint32 shared) {
    asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group "
                 "[%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                 "r"(shared), "r"(place.col), "r"(place.row), "r"(place.head),
                 "r"(place.batch[1]), "r"(place.batch[0])
                 : "memory");
}

// Consecutive bytes; addresses and count are multiples of 16.
DEVICE void load_bulk(uint32 shared, const void* global, uint32 bytes, uint32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(shared),
                 "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(barrier)
                 : "memory");
}

// What L2 gives up last: sums that others will soon add to. The policy that createpolicy makes of
// evict_last for all accesses.
constexpr uint64 KEEP_IN_L2 = 0x14f0000000000000;

// Consecutive bytes from shared memory, in this thread's current bulk group; addresses and count
// are multiples of 16.
DEVICE void store_bulk(void* global, uint32 shared, uint32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::
                     "l"(__cvta_generic_to_global(global)),
                 "r"(shared), "r"(bytes), "l"(KEEP_IN_L2)
                 : "memory");
}

// Adds consecutive floats to those in global memory, each addition atomic by itself.
DEVICE void add_bulk(float* global, uint32 shared, uint32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.L2::cache_hint.add.f32 "
                 "[%0], [%1], %2, %3;" ::"l"(__cvta_generic_to_global(global)),
                 "r"(shared), "r"(bytes), "l"(KEEP_IN_L2)
                 : "memory");
}

// Closes the group of this thread's stores and additions since the last commit.
DEVICE void commit_bulk() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but the PENDING latest groups of this thread have read shared memory.
template <int PENDING>
DEVICE void wait_bulk_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}

// Until all but the PENDING latest groups of this thread have written global memory.
template <int PENDING>
DEVICE void wait_bulk() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Ordinary stores to shared memory, this thread's and what it knows of by barriers, come before
// asynchronous accesses that this thread starts next, or others behind a barrier: copies and matrix
// products.
DEVICE void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
