// The functions of kernels_cu/ptx.cuh in plain C++, by the documented meaning of the instructions
// behind them. Compiled in its place when kernels run on the host device.
//
// An instruction that a whole warp executes together is a collective: each lane brings its
// operands, and when all 32 are there, the result is computed for all. A matrix of such an
// instruction is spread over the lanes in fragments; here it is gathered into a plain array, by the
// coordinates of each lane's elements.
#pragma once
#include "types.cuh"

// ---------------------------------------------------------------------------------------------
// Shared memory

DEVICE unsigned char* dynamic_shared_memory() { return host::shared_memory(); }

DEVICE uint32 shared_address(const void* shared) { return host::shared_address(shared); }

template <class T>
DEVICE T load_shared(uint32 address) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
    return *reinterpret_cast<const T*>(host::shared_pointer(address));
}

template <class T>
DEVICE void store_shared(uint32 address, T value) {
    *reinterpret_cast<T*>(host::shared_pointer(address)) = value;
}

DEVICE void add_shared(uint32 address, uint32 value) {
    atomicAdd(reinterpret_cast<uint32*>(host::shared_pointer(address)), value);
}

// ---------------------------------------------------------------------------------------------
// Asynchronous copies, global to shared memory

template <int BYTES>
DEVICE void copy_async(uint32 shared, const void* global, int valid_bytes) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16, "cp.async copies 4, 8 or 16 bytes");
    if (valid_bytes != 0 && valid_bytes != BYTES) {
        host::fail("copy_async of %d valid bytes out of %d, takes none or all", valid_bytes, BYTES);
    }
    host::issue_copy(shared, global, BYTES, valid_bytes);
}

DEVICE void commit_copies() { host::commit_copies(); }

template <int PENDING>
DEVICE void wait_copies() {
    host::wait_copies(PENDING);
}

// ---------------------------------------------------------------------------------------------
// Fragments from shared memory

namespace host {

struct LoadMatrixOperands {
    uint32* d;
    uint32 row_address;
};

// ldmatrix: matrices of 8 x 8 16-bit elements. Row r of matrix i lies at the address of lane 8i +
// r. Lane 4g + t gets elements (g, 2t) and (g, 2t + 1) of each, of its transpose if TRANSPOSED.
template <int COUNT, bool TRANSPOSED>
HOST_UNCHECKED void load_matrices(void* const lanes[WARP]) {
    for (int i = 0; i < COUNT; ++i) {
        uint16 matrix[8][8];
        for (int row = 0; row < 8; ++row) {
            const auto* lane = static_cast<LoadMatrixOperands*>(lanes[8 * i + row]);
            const unsigned char* source = shared_pointer(lane->row_address);
            check_warp_read(source, sizeof matrix[row]);
            memcpy(matrix[row], source, sizeof matrix[row]);
        }
        for (int lane = 0; lane < WARP; ++lane) {
            const int g = lane / 4, t = lane % 4;
            const uint16 low = TRANSPOSED ? matrix[2 * t][g] : matrix[g][2 * t];
            const uint16 high = TRANSPOSED ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
            static_cast<LoadMatrixOperands*>(lanes[lane])->d[i] = low | uint32{high} << 16;
        }
    }
}

}  // namespace host

DEVICE void load_matrix_x4(uint32 (&d)[4], uint32 row_address,
                           host::Place place = host::Place::here()) {
    host::LoadMatrixOperands operands{d, row_address};
    host::warp_collective("ldmatrix", ~0u, place, &operands, host::load_matrices<4, false>);
}

DEVICE void load_matrix_transposed_x4(uint32 (&d)[4], uint32 row_address,
                                      host::Place place = host::Place::here()) {
    host::LoadMatrixOperands operands{d, row_address};
    host::warp_collective("ldmatrix.trans", ~0u, place, &operands, host::load_matrices<4, true>);
}

// ---------------------------------------------------------------------------------------------
// Conversions and functions

// The upper bits of a binary number of which `dropped` bits go, rounded to nearest, ties to even.
DEVICE uint32 round_off_bits(uint32 bits, int dropped) {
    const uint32 half = 1u << (dropped - 1), odd = bits >> dropped & 1;
    return (bits + half - 1 + odd) >> dropped;
}

DEVICE uint16 to_bf16_bits(float x) {
    if (isnan(x)) return 0x7fff;
    return static_cast<uint16>(round_off_bits(bit_cast<uint32>(x), 16));
}

// float16 has 10 bits of mantissa where float has 23, and an exponent that is smaller by 112.
DEVICE uint16 to_f16_bits(float x) {
    if (isnan(x)) return 0x7fff;
    const uint32 sign = bit_cast<uint32>(x) >> 16 & 0x8000;
    const uint32 magnitude = bit_cast<uint32>(x) & 0x7fffffff;
    uint32 bits;
    if (magnitude >= 0x477ff000) {
        bits = 0x7c00;  // 65520 and above: infinity
    } else if (magnitude >= 0x38800000) {
        bits = round_off_bits(magnitude - (112u << 23), 13);
    } else {
        // Subnormal, in units of 2^-24: the last bit of 0.5f, so that adding it rounds to them.
        bits = bit_cast<uint32>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32>(0.5f);
    }
    return static_cast<uint16>(sign | bits);
}

DEVICE uint32 pack_f16(float low, float high) {
    return to_f16_bits(low) | uint32{to_f16_bits(high)} << 16;
}

DEVICE uint32 pack_bf16(float low, float high) {
    return to_bf16_bits(low) | uint32{to_bf16_bits(high)} << 16;
}

DEVICE float to_float(float16 x) {
    const uint32 sign = uint32{x.bits & 0x8000u} << 16;
    const uint32 exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ff;
    uint32 magnitude;
    if (exponent == 31) {
        magnitude = 0x7f800000 | mantissa << 13;
    } else if (exponent > 0) {
        magnitude = (exponent + 112) << 23 | mantissa << 13;
    } else {
        magnitude = bit_cast<uint32>(static_cast<float>(mantissa) * 0x1p-24f);
    }
    return bit_cast<float>(sign | magnitude);
}

DEVICE float to_float(bfloat16 x) { return bit_cast<float>(uint32{x.bits} << 16); }

// .ftz: a subnormal operand or result becomes zero of the same sign.
DEVICE float flush_to_zero(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

DEVICE float exp2_approx(float x) { return flush_to_zero(exp2f(flush_to_zero(x))); }

DEVICE float reciprocal_approx(float x) { return flush_to_zero(1 / flush_to_zero(x)); }

DEVICE float min_or_nan(float x, float y) { return isnan(x) || isnan(y) ? NAN : fminf(x, y); }

namespace host {

struct WarpMaxOperands {
    uint32 value;
    uint32 result;
};

}  // namespace host

DEVICE uint32 warp_max(uint32 x, host::Place place = host::Place::here()) {
    host::WarpMaxOperands operands{x, 0};
    host::warp_collective("redux.max", ~0u, place, &operands, [](void* const lanes[WARP]) {
        uint32 largest = 0;
        for (int i = 0; i < WARP; ++i) {
            largest = max(largest, static_cast<host::WarpMaxOperands*>(lanes[i])->value);
        }
        for (int i = 0; i < WARP; ++i) {
            static_cast<host::WarpMaxOperands*>(lanes[i])->result = largest;
        }
    });
    return operands.result;
}

// ---------------------------------------------------------------------------------------------
// Matrix products: d (16 x 8) += a (16 x k) b (k x 8)

namespace host {

// A register of each fragment holds one element of Real, or two neighbours in k. Lane 4g + t has
//   d[2i + j]        at row g + 8i, column 2t + j
//   a[2i + j]        at row g + 8j, k = STEP i + PER_REGISTER t and following
//   b[i]             at column g,   k = STEP i + PER_REGISTER t and following
// with STEP = 4 PER_REGISTER, the k that four lanes cover.
template <class Real, class Register>
struct MmaOperands {
    Real* d;
    const Register* a;
    const Register* b;
};

// `element(register, j)` is the value of the j-th element in a register. Products are exact and
// added up in double precision; the tensor cores' own order and rounding of sums are not
// documented.
template <int K, int PER_REGISTER, class Real, class Register, Real (*element)(Register, int)>
HOST_UNCHECKED void multiply(void* const lanes[WARP]) {
    constexpr int STEP = 4 * PER_REGISTER;
    double a[16][K], b[8][K];  // b by columns
    for (int lane = 0; lane < WARP; ++lane) {
        const auto& operands = *static_cast<MmaOperands<Real, Register>*>(lanes[lane]);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < K / STEP; ++i) {
            for (int e = 0; e < PER_REGISTER; ++e) {
                const int k = STEP * i + PER_REGISTER * t + e;
                a[g][k] = element(operands.a[2 * i], e);
                a[g + 8][k] = element(operands.a[2 * i + 1], e);
                b[g][k] = element(operands.b[i], e);
            }
        }
    }
    for (int lane = 0; lane < WARP; ++lane) {
        Real* d = static_cast<MmaOperands<Real, Register>*>(lanes[lane])->d;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            double sum = d[i];
            for (int k = 0; k < K; ++k) sum += a[row][k] * b[column][k];
            d[i] = static_cast<Real>(sum);
        }
    }
}

DEVICE float f16_element(uint32 pair, int i) {
    return to_float(float16{static_cast<uint16>(pair >> 16 * i)});
}

DEVICE float bf16_element(uint32 pair, int i) {
    return to_float(bfloat16{static_cast<uint16>(pair >> 16 * i)});
}

DEVICE double f64_element(double x, int) { return x; }

}  // namespace host

DEVICE void mma_f16(float* d, const uint32* a, const uint32* b,
                    host::Place place = host::Place::here()) {
    host::MmaOperands<float, uint32> operands{d, a, b};
    host::warp_collective("mma_f16", ~0u, place, &operands,
                          host::multiply<16, 2, float, uint32, host::f16_element>);
}

DEVICE void mma_bf16(float* d, const uint32* a, const uint32* b,
                     host::Place place = host::Place::here()) {
    host::MmaOperands<float, uint32> operands{d, a, b};
    host::warp_collective("mma_bf16", ~0u, place, &operands,
                          host::multiply<16, 2, float, uint32, host::bf16_element>);
}

DEVICE void mma_f64(double* d, const double* a, const double* b,
                    host::Place place = host::Place::here()) {
    host::MmaOperands<double, double> operands{d, a, b};
    host::warp_collective("mma_f64", ~0u, place, &operands,
                          host::multiply<16, 1, double, double, host::f64_element>);
}

DEVICE uint32 shift_left(uint32 x, uint32 count) { return count < 32 ? x << count : 0; }

// ---------------------------------------------------------------------------------------------
// Kernels that overlap

// Nothing depends on it: the kernel behind this one might start at any time.
DEVICE void launch_dependents() {}

DEVICE void wait_for_prerequisites() { host::wait_for_prerequisites(); }

// ---------------------------------------------------------------------------------------------
// Sums in global memory

constexpr int ADD_WIDTH = 4;  // as on sm_90

template <int COUNT>
DEVICE void add_global(float* address, const float* values) {
    host::check_aligned(address, COUNT * sizeof(float));
    for (int i = 0; i < COUNT; ++i) atomicAdd(address + i, values[i]);
}

DEVICE void add_global(double* address, double value) { atomicAdd(address, value); }
