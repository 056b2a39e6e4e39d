// Instructions of warpgroups (128 threads, their first a multiple of 128) beside their products:
// registers, named barriers, and matrices to shared memory. tests/host/warpgroup.cuh implements
// the same functions in plain C++.
#pragma once
#include "types.cuh"

constexpr int WARPGROUP = 128;

// Registers of a thread from now on, a multiple of 8, by all threads of a warpgroup. Taking more
// waits until others have given so many back.
template <int REGISTERS>
DEVICE void grow_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void shrink_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// Barrier `id` of 1..15 completes when `threads` threads, whole warps, have come: those that
// arrive go on, those that sync wait for it. Then it starts anew.
DEVICE void sync_named(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same where those that wait come by different instructions, in copies of the code.
DEVICE void sync_named_anywhere(int id, int threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void arrive_named(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements, the counterpart of load_matrix_x4: lane 8i + r gives the
// address of row r of matrix i (16 bytes, 16-byte aligned); r_i of lane 4g + t holds elements 2t
// and 2t + 1 of row g of matrix i.
DEVICE void store_matrix_x4(uint32 row_address, uint32 r0, uint32 r1, uint32 r2, uint32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     row_address),
                 "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

// The same with each matrix transposed: r_i holds rows 2t and 2t + 1 of column g.
DEVICE void store_matrix_transposed_x4(uint32 row_address, uint32 r0, uint32 r1, uint32 r2,
                                       uint32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     row_address),
                 "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}
