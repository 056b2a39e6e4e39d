// Blocks that wait for each other, through counters in global memory: to add in a fixed order, to
// round what others have added, and to use memory again. Nobody waits for a block of a higher
// index, so all come to their turn as long as blocks start in the order of their indices, which
// GPUs do, though CUDA does not promise it.
//
// tests/host/turns.cuh implements the same functions in plain C++.
#pragma once
#include "types.cuh"

// Until the counter has reached `turn`. What was done before pass_turn, or by the copies and
// additions of pass_turn_of_bulk, is visible then, also to bulk copies and additions that this
// thread starts afterwards.
DEVICE void wait_for_turn(const int32* counter, int32 turn) {
    int32 reached;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                     : "=r"(reached)
                     : "l"(__cvta_generic_to_global(counter))
                     : "memory");
    } while (reached < turn);
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// The counter's next turn, after ordinary additions, by this thread or by threads that it has met.
// It waits for all that the multiprocessor has on its way to memory, some 1,000 to 10,000 clocks.
DEVICE void pass_turn(int32* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter))
                 : "memory");
}

// The same after nothing but this thread's bulk copies and additions, which have been waited for
// (wait_bulk). It takes them to be in L2 by then, where all multiprocessors meet them, so that there
// is nothing to wait for any more. CUDA's memory model does not promise that a relaxed addition
// makes them visible to others, and no test has shown it for all cases (NOTES.md: "Open").
DEVICE void pass_turn_of_bulk(int32* counter) {
    asm volatile("red.relaxed.gpu.global.add.s32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter))
                 : "memory");
}
