// Barriers in shared memory that count arrivals and bytes (mbarrier), one instruction a function.
//
// A barrier goes through phases, of parity 0, 1, 0, ... A phase completes when all its arrivals
// have come and all bytes that were announced have landed; then the next one begins with the same
// number of arrivals. tests/host/mbarrier.cuh implements the same functions in plain C++.
#pragma once
#include "types.cuh"

constexpr int BARRIER_BYTES = 8;

// By one thread, once. `arrivals` is what completes a phase.
DEVICE void init_barrier(uint32 barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)
                 : "memory");
}

// By the same thread after its last init_barrier; __syncthreads shows the barriers to all others.
DEVICE void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What this thread has read and written before comes before what waiting threads do after.
DEVICE void arrive_at(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// An arrival that also announces bytes which asynchronous copies will bring.
DEVICE void arrive_expecting(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(bytes)
                 : "memory");
}

// Until the phase of that parity has completed. So the wait for parity 1 of a new barrier, the
// phase before its first, returns at once.
DEVICE void wait_for(uint32 barrier, uint32 parity) {
    // The loop is C++: labels in PTX would exist twice where the function is inlined twice.
    uint32 complete;
    do {
        asm volatile("{ .reg .pred complete;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, complete; }"
                     : "=r"(complete)
                     : "r"(barrier), "r"(parity)
                     : "memory");
    } while (!complete);
}
