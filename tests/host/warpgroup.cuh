// The functions of kernels_cu/warpgroup.cuh on the host device, see ptx.cuh, barriers.cpp and
// wgmma.cpp.
#pragma once
#include "types.cuh"

constexpr int WARPGROUP = 128;

template <int REGISTERS>
DEVICE void grow_registers(host::Place place = host::Place::here()) {
    host::set_registers(REGISTERS, true, place);
}

template <int REGISTERS>
DEVICE void shrink_registers(host::Place place = host::Place::here()) {
    host::set_registers(REGISTERS, false, place);
}

DEVICE void sync_named(int id, int threads, host::Place place = host::Place::here()) {
    host::named_barrier("sync_named", id, threads, true, place);
}

DEVICE void sync_named_anywhere(int id, int threads, host::Place place = host::Place::here()) {
    host::named_barrier("sync_named_anywhere", id, threads, true, place);
}

DEVICE void arrive_named(int id, int threads, host::Place place = host::Place::here()) {
    host::named_barrier("arrive_named", id, threads, false, place);
}

namespace host {

struct StoreMatrixOperands {
    uint32 row_address;
    uint32 r[4];
};

// stmatrix: the counterpart of ldmatrix in ptx.cuh.
template <bool TRANSPOSED>
HOST_UNCHECKED void store_matrices(void* const lanes[WARP]) {
    for (int i = 0; i < 4; ++i) {
        unsigned char* rows[8];
        for (int row = 0; row < 8; ++row) {
            const auto* lane = static_cast<const StoreMatrixOperands*>(lanes[8 * i + row]);
            rows[row] = shared_pointer(lane->row_address);
            check_aligned(rows[row], 16);
        }
        for (int lane = 0; lane < WARP; ++lane) {
            const uint32 pair = static_cast<const StoreMatrixOperands*>(lanes[lane])->r[i];
            for (int half = 0; half < 2; ++half) {
                const int g = lane / 4, column = 2 * (lane % 4) + half;
                unsigned char* target = TRANSPOSED ? rows[column] + 2 * g : rows[g] + 2 * column;
                check_lane_write(target, 2, lane);
                *reinterpret_cast<uint16*>(target) = static_cast<uint16>(pair >> 16 * half);
            }
        }
    }
}

}  // namespace host

DEVICE void store_matrix_x4(uint32 row_address, uint32 r0, uint32 r1, uint32 r2, uint32 r3,
                            host::Place place = host::Place::here()) {
    host::StoreMatrixOperands operands{row_address, {r0, r1, r2, r3}};
    host::warp_collective("stmatrix", ~0u, place, &operands, host::store_matrices<false>);
}

DEVICE void store_matrix_transposed_x4(uint32 row_address, uint32 r0, uint32 r1, uint32 r2,
                                       uint32 r3, host::Place place = host::Place::here()) {
    host::StoreMatrixOperands operands{row_address, {r0, r1, r2, r3}};
    host::warp_collective("stmatrix.trans", ~0u, place, &operands, host::store_matrices<true>);
}
