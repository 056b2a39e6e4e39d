// Words every kernel uses: integers of known width, element types as raw bits, 16-byte chunks.
//
// No CUDA header is included anywhere: NVRTC compiles faster without, and the same sources compile
// for the CPU, where tests/host/ gives CUDA's words their meaning.
#pragma once

#define DEVICE __device__ __forceinline__

using uint16 = unsigned short;
using int32 = int;
using uint32 = unsigned int;
using int64 = long long;
using uint64 = unsigned long long;

// 16-bit elements are only carried, converted (ptx.cuh) and multiplied by the tensor cores, so
// their bits are all there is to them.
struct float16 {
    uint16 bits;
};
struct bfloat16 {
    uint16 bits;
};

// float32 elements whose products may round to 11 bits, as TF32 has (precision='tf32').
struct tensorfloat32 {
    float value;
};

// The widest access to memory, and the unit of every layout in shared memory.
struct alignas(16) Chunk {
    uint32 words[4];
};
constexpr int CHUNK_BYTES = 16;

constexpr int WARP = 32;
constexpr double LOG2_E = 1.4426950408889634;
constexpr double LN_2 = 0.6931471805599453;

template <class To, class From>
DEVICE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// The same number, of which the compiler no longer knows where it came from. So what was computed
// from it before is computed again, instead of being kept in registers all the time between.
DEVICE uint32 recompute_from(uint32 x) {
    asm volatile("" : "+r"(x));
    return x;
}

// The same number, which the compiler can neither compute nor read again: it stays in a register.
DEVICE float in_register(float x) {
    return bit_cast<float>(recompute_from(bit_cast<uint32>(x)));
}

// The same object, which the compiler reads where it is needed, not before.
template <class T>
DEVICE const T& reread_from(const T& x) {
    const uint64 address = reinterpret_cast<uint64>(&x);
    const uint32 low = recompute_from(static_cast<uint32>(address));
    return *reinterpret_cast<const T*>(address >> 32 << 32 | low);
}

// Infinity of the type that scores and sums are kept in (float, or double for float64).
template <class Real>
DEVICE Real infinity();
template <>
DEVICE float infinity<float>() {
    return bit_cast<float>(0x7f800000u);
}
template <>
DEVICE double infinity<double>() {
    return bit_cast<double>(0x7ff0000000000000ull);
}

DEVICE constexpr int ceil_div(int a, int b) {
    return (a + b - 1) / b;
}
