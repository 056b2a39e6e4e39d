// Tiles of 16-bit elements in shared memory as TMA writes and wgmma reads them.
#pragma once
#include "types.cuh"

// A tile's address is a multiple of this: the swizzle is made of address bits.
constexpr int SWIZZLE_ALIGNMENT = 1024;

DEVICE uint32 swizzle_aligned(uint32 address) {
    return (address + SWIZZLE_ALIGNMENT - 1) / SWIZZLE_ALIGNMENT * SWIZZLE_ALIGNMENT;
}

// How wgmma finds a 16-bit operand with 128-byte swizzle, in units of 16 bytes:
//   bits 0..13 its address, 16..29 from one box of 64 columns to the next (where the operand's
//   rows are the product's k, else unused), 32..45 from one group of 8 rows to the next,
//   62..63 the swizzle. Adding to the descriptor moves the address.
DEVICE uint64 swizzled_descriptor(uint32 address, uint32 box_bytes) {
    constexpr uint64 SWIZZLE_128_BYTES = 1ull << 62;
    constexpr uint64 ROW_GROUP_BYTES = 1024;
    return (address & 0x3ffff) >> 4 | static_cast<uint64>(box_bytes >> 4) << 16 |
           ROW_GROUP_BYTES >> 4 << 32 | SWIZZLE_128_BYTES;
}

// ROWS x COLS elements (ROWS a multiple of 8) as boxes of 64 columns, one after another. A row of
// a box is 128 bytes; chunk c (16 bytes) of row r stands at place c ^ (r % 8) of the row, so that
// eight rows of a column of chunks meet different banks. The last box is whole even where COLS is
// not a multiple of 64.
template <class T, int ROWS, int COLS>
struct SwizzledTile {
    static_assert(sizeof(T) == 2 && ROWS % 8 == 0, "the layout of 16-bit wgmma operands");
    using Element = T;
    static constexpr int BOX_COLS = 64;
    static constexpr int ROW_BYTES = 128;
    static constexpr int BOXES = (COLS + BOX_COLS - 1) / BOX_COLS;
    static constexpr int BOX_BYTES = ROWS * ROW_BYTES;
    static constexpr int BYTES = BOXES * BOX_BYTES;

    uint32 address;

    DEVICE uint32 box(int index) const {
        return address + index * BOX_BYTES;
    }

    DEVICE uint32 at(int row, int col) const {
        const int chunk = col % BOX_COLS / 8 ^ row % 8;
        return box(col / BOX_COLS) + row * ROW_BYTES + chunk * CHUNK_BYTES + col % 8 * 2;
    }

    // The descriptor of an operand whose first element is (row, k), k along the columns
    // ("K-major"): rows are the product's m or n. row is a multiple of 8, k of 16.
    DEVICE uint64 k_major(int row, int k) const {
        const uint32 offset = k / BOX_COLS * BOX_BYTES + row * ROW_BYTES + k % BOX_COLS * 2;
        return swizzled_descriptor(address, 0) + (offset >> 4);
    }

    // The descriptor of an operand whose first element is (k, col), k along the rows
    // ("MN-major", transposed): columns are the product's m or n. k is a multiple of 8, col of 64.
    DEVICE uint64 mn_major(int k, int col) const {
        const uint32 offset = col / BOX_COLS * BOX_BYTES + k * ROW_BYTES;
        return swizzled_descriptor(address, BOX_BYTES) + (offset >> 4);
    }
};
