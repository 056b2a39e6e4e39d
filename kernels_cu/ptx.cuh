// Every machine instruction that C++ has no word for, one named function each.
//
// tests/host/ptx.cuh implements the same functions in plain C++, by their documented semantics, so
// that the kernels run on a CPU. Shared memory is addressed by 32-bit addresses throughout: they
// cost one register, and the instructions take them as they are.
//
// Fragments of the matrix products, as the PTX ISA defines them for lane 4g + t of a warp
// (g = lane / 4 in 0..7, t = lane % 4):
//   accumulator d (16 x 8):  d[0], d[1] at row g,     columns 2t, 2t + 1
//                            d[2], d[3] at row g + 8, the same columns
#pragma once
#include "types.cuh"

// ---------------------------------------------------------------------------------------------
// Shared memory

// The block's dynamic shared memory, at least 16-byte aligned.
DEVICE unsigned char* dynamic_shared_memory() {
    extern __shared__ __align__(128) unsigned char shared_memory[];
    return shared_memory;
}

DEVICE uint32 shared_address(const void* shared) {
    return static_cast<uint32>(__cvta_generic_to_shared(shared));
}

// T of 2, 4, 8 or 16 bytes, the address a multiple of its size. Loads stay in the order in which
// they are written: left free, the compiler moves many to the front and runs out of registers.
template <class T>
DEVICE T load_shared(uint32 address) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    if constexpr (sizeof(T) == 2) {
        uint16 x;
        asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address) : "memory");
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 4) {
        uint32 x;
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
        return bit_cast<T>(x);
    } else if constexpr (sizeof(T) == 8) {
        uint64 x;
        asm volatile("ld.shared.u64 %0, [%1];" : "=l"(x) : "r"(address) : "memory");
        return bit_cast<T>(x);
    } else {
        Chunk x;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(x.words[0]), "=r"(x.words[1]), "=r"(x.words[2]), "=r"(x.words[3])
                     : "r"(address)
                     : "memory");
        return bit_cast<T>(x);
    }
}

template <class T>
DEVICE void store_shared(uint32 address, T value) {
    *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// Adds to a word in one indivisible step.
DEVICE void add_shared(uint32 address, uint32 value) {
    asm volatile("red.shared.add.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

// ---------------------------------------------------------------------------------------------
// Asynchronous copies, global to shared memory

// Copies BYTES (4, 8 or 16) where valid_bytes = BYTES; where it is 0 nothing is read and zeros are
// written. (The instruction can also cut a copy short, for four more instructions to compute how.)
// Both addresses are multiples of BYTES. The copy has happened, for this thread, after the wait
// for its group.
template <int BYTES>
DEVICE void copy_async(uint32 shared, const void* global, int valid_bytes) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if constexpr (BYTES == 16) {
        asm volatile("{ .reg .pred ignore; setp.eq.s32 ignore, %2, 0;\n"
                     "cp.async.cg.shared.global [%0], [%1], 16, ignore; }"
                     ::"r"(shared), "l"(__cvta_generic_to_global(global)), "r"(valid_bytes)
                     : "memory");
    } else {
        asm volatile("{ .reg .pred ignore; setp.eq.s32 ignore, %2, 0;\n"
                     "cp.async.ca.shared.global [%0], [%1], %3, ignore; }"
                     ::"r"(shared), "l"(__cvta_generic_to_global(global)), "r"(valid_bytes),
                     "n"(BYTES)
                     : "memory");
    }
}

// Closes the group of this thread's copies since the last commit.
DEVICE void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until all but the PENDING latest groups of this thread have landed.
template <int PENDING>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// ---------------------------------------------------------------------------------------------
// Fragments from shared memory

// Four 8 x 8 matrices of 16-bit elements. Lane 8i + r gives the address of row r of matrix i (16
// bytes, 16-byte aligned); d[i] of lane 4g + t holds elements 2t and 2t + 1 of row g of matrix i.
// Seen as 32-bit elements the matrices are 8 x 4 and d[i] is element t of row g.
DEVICE void load_matrix_x4(uint32 (&d)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row_address)
                 : "memory");
}

// The same with each matrix transposed: d[i] holds rows 2t and 2t + 1 of column g.
DEVICE void load_matrix_transposed_x4(uint32 (&d)[4], uint32 row_address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(row_address)
                 : "memory");
}

// ---------------------------------------------------------------------------------------------
// Matrix products: d (16 x 8) += a (16 x k) b (k x 8)

// k = 16, pairs of 16-bit elements with the lower k in the lower half:
//   a[0] at row g, k = 2t, 2t + 1; a[1] at row g + 8; a[2], a[3] the same with k + 8
//   b[0] at column g, k = 2t, 2t + 1; b[1] the same with k + 8
DEVICE void mma_f16(float* d, const uint32* a, const uint32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

DEVICE void mma_bf16(float* d, const uint32* a, const uint32* b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// k = 16:
//   a[2i] at row g, k = t + 4i; a[2i + 1] at row g + 8
//   b[i] at column g, k = t + 4i
// From sm_90 on one instruction; the m8n8k4 that sm_80 has runs at a part of the rate there.
DEVICE void mma_f64(double* d, const double* a, const double* b) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7, %8, %9, %10, %11}, {%12, %13, %14, %15}, {%0, %1, %2, %3};"
                 : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
                 : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(a[4]), "d"(a[5]), "d"(a[6]),
                   "d"(a[7]), "d"(b[0]), "d"(b[1]), "d"(b[2]), "d"(b[3]));
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 "
                         "{%0, %1}, {%2}, {%3}, {%0, %1};"
                         : "+d"(d[2 * half]), "+d"(d[2 * half + 1])
                         : "d"(a[2 * i + half]), "d"(b[i]));
        }
    }
#endif
}

// ---------------------------------------------------------------------------------------------
// Conversions and functions

// Two floats to 16 bit, rounded to nearest even, `low` in the lower half.
DEVICE uint32 pack_f16(float low, float high) {
    uint32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE uint32 pack_bf16(float low, float high) {
    uint32 packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

DEVICE float to_float(float16 x) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
    return result;
}

DEVICE float to_float(bfloat16 x) {
    return bit_cast<float>(static_cast<uint32>(x.bits) << 16);
}

// 2^x to about 2 ulp; 2^-inf = 0, 2^inf = inf, NaN stays. Subnormal results are zero.
DEVICE float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// 1 / x to about 1 ulp; 1/0 = inf, 1/inf = 0.
DEVICE float reciprocal_approx(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// The smaller one; NaN if one of them is.
DEVICE float min_or_nan(float x, float y) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(y));
    return result;
}

// The largest of all lanes of a warp.
DEVICE uint32 warp_max(uint32 x) {
    uint32 result;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(result) : "r"(x));
    return result;
}

// Shifted by `count` bits: 0 from 32 on.
DEVICE uint32 shift_left(uint32 x, uint32 count) {
    uint32 shifted;
    asm("shl.b32 %0, %1, %2;" : "=r"(shifted) : "r"(x), "r"(count));
    return shifted;
}

// ---------------------------------------------------------------------------------------------
// Kernels that overlap (sm_90; "programmatic dependent launch")

// Lets the kernel behind this one start, if it was launched so, once all blocks of this one have
// called this or ended.
DEVICE void launch_dependents() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Until the kernel ahead of this one has ended, if this one was launched to overlap with it: all
// that it has written is visible to this grid then.
DEVICE void wait_for_prerequisites() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// ---------------------------------------------------------------------------------------------
// Sums in global memory

// As many floats as add_global adds with one instruction.
#if __CUDA_ARCH__ >= 900
constexpr int ADD_WIDTH = 4;
#else
constexpr int ADD_WIDTH = 1;
#endif

// Adds COUNT (1, 2 or 4) floats to consecutive addresses, aligned to COUNT floats, each addition
// atomic by itself, nothing returned.
template <int COUNT>
DEVICE void add_global(float* address, const float* values) {
#if __CUDA_ARCH__ >= 900
    if constexpr (COUNT == 4) {
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
                     ::"l"(__cvta_generic_to_global(address)), "f"(values[0]), "f"(values[1]),
                     "f"(values[2]), "f"(values[3])
                     : "memory");
    } else if constexpr (COUNT == 2) {
        asm volatile("red.global.add.v2.f32 [%0], {%1, %2};"
                     ::"l"(__cvta_generic_to_global(address)), "f"(values[0]), "f"(values[1])
                     : "memory");
    } else
#endif
    {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            asm volatile("red.global.add.f32 [%0], %1;"
                         ::"l"(__cvta_generic_to_global(address + i)), "f"(values[i])
                         : "memory");
        }
    }
}

DEVICE void add_global(double* address, double value) {
    asm volatile("red.global.add.f64 [%0], %1;"
                 ::"l"(__cvta_generic_to_global(address)), "d"(value)
                 : "memory");
}
