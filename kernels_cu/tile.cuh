// Tiles: rows of a tensor in shared memory, and their copies from and to global memory.
#pragma once
#include "types.cuh"
#include "ptx.cuh"

// ROWS x COLS elements in shared memory, row after row. A row takes an odd number of 16-byte
// chunks (the last is padding), so that the same column of 8 consecutive rows, and what the
// fragment loads of mma.cuh touch beside it, lies in different banks. Compared with an XOR
// swizzle this works for every width and leaves all addresses sums of a lane's own offset and a
// constant, which the instructions take as an immediate.
template <class T, int ROWS_, int COLS_>
struct SharedTile {
    using Element = T;
    static constexpr int ROWS = ROWS_;
    static constexpr int COLS = COLS_;
    static constexpr int CHUNKS = COLS * sizeof(T) / CHUNK_BYTES;  // of data in a row
    static constexpr int ROW_BYTES = (CHUNKS | 1) * CHUNK_BYTES;
    static constexpr int BYTES = ROWS * ROW_BYTES;
    static_assert(COLS % 16 == 0, "fragments are 16 columns wide");

    uint32 address;

    DEVICE uint32 at(int row, int col) const {
        return address + row * ROW_BYTES + col * static_cast<int>(sizeof(T));
    }
};

// The largest of `most`, most / 2, most / 4, ... that divides n.
DEVICE constexpr int largest_divisor(int n, int most) {
    return n % most == 0 ? most : largest_divisor(n, most / 2);
}

// The largest power of two up to n.
DEVICE constexpr int floor_power_of_two(int n) {
    return n < 2 ? 1 : 2 * floor_power_of_two(n / 2);
}

// Which part of a tile a thread copies when rows move in units of BYTES: neighbouring threads take
// neighbouring units of a line, up to 128 bytes of a row, and stride over lines and rows.
template <class Tile, int THREADS, int BYTES>
struct CopyShape {
    static constexpr int UNITS = Tile::COLS * sizeof(typename Tile::Element) / BYTES;  // in a row
    static constexpr int LANES = largest_divisor(UNITS, 128 / BYTES);
    static constexpr int LINE = LANES * BYTES;
    static constexpr int UNIT_STEPS = UNITS / LANES;
    static constexpr int ROW_STEP = THREADS / LANES;
    static constexpr int ROW_STEPS = (Tile::ROWS + ROW_STEP - 1) / ROW_STEP;
    static_assert(THREADS % LANES == 0, "lines of threads are whole");

    // A thread's first row and byte in a tile.
    const int row, byte;

    // Every copy computes its place anew, from the thread's index alone: kept in registers from
    // one copy to the next, places would cost more than they save.
    DEVICE CopyShape() : CopyShape(recompute_from(threadIdx.x)) {}

    // Calls visit(row, first byte of the unit) for every unit of this thread.
    template <class Visit>
    DEVICE void for_each(Visit visit) const {
#pragma unroll
        for (int i = 0; i < ROW_STEPS; ++i) {
            if (has_row(i)) {
#pragma unroll
                for (int j = 0; j < UNIT_STEPS; ++j) visit(row + i * ROW_STEP, byte + j * LINE);
            }
        }
    }

    // Whether the tile has a row for this thread in step i.
    DEVICE bool has_row(int i) const {
        return Tile::ROWS % ROW_STEP == 0 || row + i * ROW_STEP < Tile::ROWS;
    }

private:
    DEVICE explicit CopyShape(int thread) : row(thread / LANES), byte(thread % LANES * BYTES) {}
};

// The rows of a tensor, as a thread copies its part of tiles of them to shared memory, in units of
// BYTES: a divisor of every row's address and of the bytes in a row. (2, for 16-bit
// elements at odd places, copies at once instead of asynchronously.)
template <class Tile, int THREADS, int BYTES>
struct TileReader {
    using Shape = CopyShape<Tile, THREADS, BYTES>;
    static constexpr int ELEMENT_BYTES = sizeof(typename Tile::Element);

    const char* data;
    int64 row_bytes;    // from one row to the next
    int32 rows, width;  // of the tensor; bytes of data in a row

    DEVICE TileReader(const void* data, int64 row_stride, int32 rows, int32 cols)
        : data(static_cast<const char*>(data)),
          row_bytes(row_stride * ELEMENT_BYTES),
          rows(rows),
          width(cols * ELEMENT_BYTES) {}

    // Starts the copy of the rows from `row` on; what lies beyond the tensor's rows and columns
    // becomes zero. All threads of the block take part.
    DEVICE void load(Tile tile, int32 row) const {
        const Shape shape;
        const char* unit = data + (row + shape.row) * row_bytes + shape.byte;
        uint32 target = tile.at(shape.row, 0) + shape.byte;
        // Copies through registers would take many of them at a time.
        constexpr int UNROLL = BYTES >= 4 ? Shape::ROW_STEPS : 1;
#pragma unroll UNROLL
        for (int i = 0; i < Shape::ROW_STEPS; ++i) {
            const bool row_valid = shape.row + i * Shape::ROW_STEP < rows - row;
            if (shape.has_row(i)) {
#pragma unroll
                for (int j = 0; j < Shape::UNIT_STEPS; ++j) {
                    const bool valid = row_valid && shape.byte < width - j * Shape::LINE;
                    copy(target + j * Shape::LINE, unit + j * Shape::LINE, valid);
                }
            }
            unit += Shape::ROW_STEP * row_bytes;
            target += Shape::ROW_STEP * Tile::ROW_BYTES;
        }
    }

private:
    static DEVICE void copy(uint32 target, const char* unit, bool valid) {
        if constexpr (BYTES >= 4) {
            copy_async<BYTES>(target, unit, valid ? BYTES : 0);
        } else {
            store_shared<uint16>(target, valid ? *reinterpret_cast<const uint16*>(unit) : 0);
        }
    }
};

template <int BYTES>
struct Word;
template <>
struct Word<2> {
    using type = uint16;
};
template <>
struct Word<4> {
    using type = uint32;
};
template <>
struct Word<8> {
    using type = uint64;
};
template <>
struct Word<16> {
    using type = Chunk;
};

// Writes the first `rows` rows and `cols` columns of a tile, in units as TileReader reads them.
// All threads of the block take part; a barrier lies between the tile's stores and this.
template <int THREADS, int BYTES, class Tile, class T>
DEVICE void copy_to_global(Tile tile, T* first_row, int64 row_stride, int rows, int cols) {
    using Unit = typename Word<BYTES>::type;
    CopyShape<Tile, THREADS, BYTES>().for_each([&](int row, int byte) {
        if (row < rows && byte < cols * static_cast<int>(sizeof(T))) {
            char* target = reinterpret_cast<char*>(first_row + row * row_stride) + byte;
            *reinterpret_cast<Unit*>(target) = load_shared<Unit>(tile.at(row, 0) + byte);
        }
    });
}

// Two neighbouring elements of a row, converted to the tile's type; `col` is even.
template <int ROWS, int COLS>
DEVICE void store_pair(SharedTile<float16, ROWS, COLS> tile, int row, int col, float x, float y) {
    store_shared(tile.at(row, col), pack_f16(x, y));
}

template <int ROWS, int COLS>
DEVICE void store_pair(SharedTile<bfloat16, ROWS, COLS> tile, int row, int col, float x, float y) {
    store_shared(tile.at(row, col), pack_bf16(x, y));
}

template <class T, int ROWS, int COLS, class Real>
DEVICE void store_pair(SharedTile<T, ROWS, COLS> tile, int row, int col, Real x, Real y) {
    static_assert(sizeof(T) == sizeof(Real), "stored as it is");
    struct alignas(2 * sizeof(Real)) Pair {
        Real x, y;
    };
    store_shared(tile.at(row, col), Pair{x, y});
}
