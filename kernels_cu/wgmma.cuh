// Asynchronous matrix products of a warpgroup (wgmma), one instruction a function.
//
//   d (64 x N, float) = a (64 x 16) b (16 x N) + (accumulate ? d : 0)
//
// a comes from shared memory (wgmma_ss) or from registers (wgmma_rs), b from shared memory. An
// operand in shared memory is given by a descriptor (hopper_tile.cuh); TRANSPOSED says that its
// rows there are the product's k. Warp w of the warpgroup has rows 16w..16w + 15 of d and a; lane
// 4g + t holds, as with mma.sync:
//   d[4i], d[4i + 1] at row g, columns 8i + 2t, 8i + 2t + 1; d[4i + 2], d[4i + 3] at row g + 8
//   a[0] at row g, k = 2t, 2t + 1; a[1] at row g + 8; a[2], a[3] the same with k + 8
//
// Between wgmma_fence (which comes after every write to registers that products read or add to)
// and the wait for their group nothing else may touch d and a, nor shared memory be overwritten.
// tests/host/wgmma.cuh implements the same functions in plain C++.
#pragma once
#include "types.cuh"

DEVICE void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of the products since the last commit.
DEVICE void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all but the PENDING latest groups are done.
template <int PENDING>
DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

template <class T, int N>
struct Wgmma;

// clang-format off

// The N / 2 registers of d in the text of an instruction, and as its operands. (NVRTC's asm knows
// operands by their numbers only, so every N needs its own text.)
#define WGMMA_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_TEXT_32 WGMMA_TEXT_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_TEXT_48 WGMMA_TEXT_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_TEXT_64 WGMMA_TEXT_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_80 WGMMA_TEXT_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_TEXT_96 WGMMA_TEXT_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_TEXT_112 WGMMA_TEXT_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_TEXT_128 WGMMA_TEXT_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TEXT_144 WGMMA_TEXT_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_TEXT_160 WGMMA_TEXT_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_TEXT_176 WGMMA_TEXT_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_TEXT_192 WGMMA_TEXT_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_TEXT_208 WGMMA_TEXT_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_TEXT_224 WGMMA_TEXT_208 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_TEXT_240 WGMMA_TEXT_224 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_TEXT_256 WGMMA_TEXT_240 ", %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_EIGHT(i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), \
    "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_OPERANDS_16 WGMMA_EIGHT(0)
#define WGMMA_OPERANDS_32 WGMMA_OPERANDS_16, WGMMA_EIGHT(8)
#define WGMMA_OPERANDS_48 WGMMA_OPERANDS_32, WGMMA_EIGHT(16)
#define WGMMA_OPERANDS_64 WGMMA_OPERANDS_48, WGMMA_EIGHT(24)
#define WGMMA_OPERANDS_80 WGMMA_OPERANDS_64, WGMMA_EIGHT(32)
#define WGMMA_OPERANDS_96 WGMMA_OPERANDS_80, WGMMA_EIGHT(40)
#define WGMMA_OPERANDS_112 WGMMA_OPERANDS_96, WGMMA_EIGHT(48)
#define WGMMA_OPERANDS_128 WGMMA_OPERANDS_112, WGMMA_EIGHT(56)
#define WGMMA_OPERANDS_144 WGMMA_OPERANDS_128, WGMMA_EIGHT(64)
#define WGMMA_OPERANDS_160 WGMMA_OPERANDS_144, WGMMA_EIGHT(72)
#define WGMMA_OPERANDS_176 WGMMA_OPERANDS_160, WGMMA_EIGHT(80)
#define WGMMA_OPERANDS_192 WGMMA_OPERANDS_176, WGMMA_EIGHT(88)
#define WGMMA_OPERANDS_208 WGMMA_OPERANDS_192, WGMMA_EIGHT(96)
#define WGMMA_OPERANDS_224 WGMMA_OPERANDS_208, WGMMA_EIGHT(104)
#define WGMMA_OPERANDS_240 WGMMA_OPERANDS_224, WGMMA_EIGHT(112)
#define WGMMA_OPERANDS_256 WGMMA_OPERANDS_240, WGMMA_EIGHT(120)

// The operands after d are numbered i0, i1, ...
#define DEFINE_WGMMA(T, TYPE, N, i0, i1, i2, i3, i4, i5, i6)                                     \
    template <>                                                                                  \
    struct Wgmma<T, N> {                                                                         \
        template <bool TRANSPOSED_A, bool TRANSPOSED_B>                                          \
        static DEVICE void ss(float (&d)[N / 2], uint64 a, uint64 b, int32 accumulate) {         \
            asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #i2 ", 0;\n"                     \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE         \
                         " {" WGMMA_TEXT_##N "}, %" #i0 ", %" #i1 ", add, 1, 1, %" #i3 ", %" #i4 \
                         "; }"                                                                   \
                         : WGMMA_OPERANDS_##N                                                    \
                         : "l"(a), "l"(b), "r"(accumulate), "n"(TRANSPOSED_A),                   \
                           "n"(TRANSPOSED_B));                                                   \
        }                                                                                        \
        template <bool TRANSPOSED_B>                                                             \
        static DEVICE void rs(float (&d)[N / 2], const uint32 (&a)[4], uint64 b,                 \
                              int32 accumulate) {                                                \
            asm volatile("{ .reg .pred add; setp.ne.b32 add, %" #i5 ", 0;\n"                     \
                         "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE         \
                         " {" WGMMA_TEXT_##N "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3           \
                         "}, %" #i4 ", add, 1, 1, %" #i6 "; }"                                   \
                         : WGMMA_OPERANDS_##N                                                    \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate),  \
                           "n"(TRANSPOSED_B));                                                   \
        }                                                                                        \
    };
#define DEFINE_WGMMAS(...)                     \
    DEFINE_WGMMA(float16, "f16", __VA_ARGS__)  \
    DEFINE_WGMMA(bfloat16, "bf16", __VA_ARGS__)

DEFINE_WGMMAS(16, 8, 9, 10, 11, 12, 13, 14)
DEFINE_WGMMAS(32, 16, 17, 18, 19, 20, 21, 22)
DEFINE_WGMMAS(48, 24, 25, 26, 27, 28, 29, 30)
DEFINE_WGMMAS(64, 32, 33, 34, 35, 36, 37, 38)
DEFINE_WGMMAS(80, 40, 41, 42, 43, 44, 45, 46)
DEFINE_WGMMAS(96, 48, 49, 50, 51, 52, 53, 54)
DEFINE_WGMMAS(112, 56, 57, 58, 59, 60, 61, 62)
DEFINE_WGMMAS(128, 64, 65, 66, 67, 68, 69, 70)
DEFINE_WGMMAS(144, 72, 73, 74, 75, 76, 77, 78)
DEFINE_WGMMAS(160, 80, 81, 82, 83, 84, 85, 86)
DEFINE_WGMMAS(176, 88, 89, 90, 91, 92, 93, 94)
DEFINE_WGMMAS(192, 96, 97, 98, 99, 100, 101, 102)
DEFINE_WGMMAS(208, 104, 105, 106, 107, 108, 109, 110)
DEFINE_WGMMAS(224, 112, 113, 114, 115, 116, 117, 118)
DEFINE_WGMMAS(240, 120, 121, 122, 123, 124, 125, 126)
DEFINE_WGMMAS(256, 128, 129, 130, 131, 132, 133, 134)

// clang-format on

template <class T, int N, bool TRANSPOSED_A, bool TRANSPOSED_B>
DEVICE void wgmma_ss(float (&d)[N / 2], uint64 a, uint64 b, bool accumulate) {
    Wgmma<T, N>::template ss<TRANSPOSED_A, TRANSPOSED_B>(d, a, b, accumulate);
}

template <class T, int N, bool TRANSPOSED_B>
DEVICE void wgmma_rs(float (&d)[N / 2], const uint32 (&a)[4], uint64 b, bool accumulate) {
    Wgmma<T, N>::template rs<TRANSPOSED_B>(d, a, b, accumulate);
}
