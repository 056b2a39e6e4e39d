// float32 operands as pairs of float16, for tensor cores that multiply float16 twice as fast as
// TF32, and as exactly:
//
//   x = 2^-e (big + small / 2^11)
//
// with float16 parts and one e for a whole tile. Together they keep 2^-24 of x, as a float does,
// for every x above 2^-27 of the tile's largest, and 2^-51 of the largest for those below: entries
// that are 10^8 times larger than others cost these their accuracy where they share a tile, also
// behind a mask. The big part alone keeps what TF32 keeps, 11 bits.
//
// A tile is split in its place: eight neighbours of a row fill two chunks as floats, and afterwards
// one with their big parts and one with their small parts.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "tile.cuh"

// What an element of a split tile stands for; as many bytes as the float before.
struct SplitFloat {
    uint32 bits;
};
struct RoundedFloat {  // no small parts, for precision='tf32'
    uint32 bits;
};

template <class Element>
constexpr int PARTS = 0;  // tiles that are multiplied as they are loaded
template <>
constexpr int PARTS<SplitFloat> = 2;
template <>
constexpr int PARTS<RoundedFloat> = 1;

constexpr float SMALL_FACTOR = 2048;
constexpr int CELL_BYTES = 2 * CHUNK_BYTES;  // eight elements
constexpr int SPLIT_EXPONENT = 15;  // big parts are scaled to 2^15 at most: float16 ends at 65504
constexpr uint32 FLOAT_INFINITY = 0x7f800000;  // its bits
constexpr float LARGEST_FLOAT = 3.4028234663852886e38f;
constexpr int MOST_WARPS = 8;

// The parts of two neighbours, the first in the lower half.
template <int COUNT>
DEVICE void split_pair(float x, float y, uint32 (&part)[COUNT]) {
    part[0] = pack_f16(x, y);
    if constexpr (COUNT == 2) {
        const float rest_x = x - to_float(float16{static_cast<uint16>(part[0])});
        const float rest_y = y - to_float(float16{static_cast<uint16>(part[0] >> 16)});
        part[1] = pack_f16(rest_x * SMALL_FACTOR, rest_y * SMALL_FACTOR);
    }
}

// 2^(exponent - 127), for exponents from 1 to 254.
DEVICE float power_of_2(int exponent) {
    return bit_cast<float>(static_cast<uint32>(exponent) << 23);
}

// A factor of 1 that costs nothing: the scale of all that is not split.
struct One {};
template <class Real>
DEVICE Real operator*(Real x, One) {
    return x;
}

// What a product of two operands is to be multiplied by: finite, for 0 times it must stay 0.
DEVICE One joint(One, One) {
    return {};
}
DEVICE float joint(float inverse, float other_inverse) {
    return min(inverse * other_inverse, LARGEST_FLOAT);
}

// A power of 2 that numbers are multiplied by before they are split, and its inverse, which their
// products are to be multiplied by.
template <class Factor>
struct Scale {
    Factor factor, inverse;
};

// The scale of numbers up to `largest`, which is finite.
DEVICE Scale<float> split_scale(float largest) {
    // With the exponent of 1 at 127, both powers are within the range of float.
    const int exponent = static_cast<int>(bit_cast<uint32>(largest) >> 23);
    const int e = SPLIT_EXPONENT - 1 - max(exponent, SPLIT_EXPONENT);
    return {power_of_2(254 + e), power_of_2(-e)};
}

// What a kernel knows of a tile that has become an operand.
template <class Element, bool SPLIT = (PARTS<Element> > 0)>
struct TileScale {
    One inverse;
};
template <class Element>
struct alignas(CHUNK_BYTES) TileScale<Element, true> {
    float largest;  // of the finite absolute values
    float inverse;
    uint32 nonfinite;  // whether there are others
};

// The tensors that become operands.
enum Tensors { OF_Q, OF_K, OF_V, OF_DO, TENSORS };

// A tile of one of them.
template <class Tile>
struct Operand {
    Tile tile;
    Tensors tensor;
};
template <class Tile>
DEVICE Operand<Tile> operand(Tile tile, Tensors tensor) {
    return {tile, tensor};
}

// A tile with the elements it was loaded with.
template <class T, class Tile>
DEVICE SharedTile<T, Tile::ROWS, Tile::COLS> as_loaded(Tile tile) {
    return {tile.address};
}

// Makes operands of tiles that threads of the block have copied, each with its own wait behind it.
// THREADS and BYTES are those of the copies. The scales are kept in shared memory: registers are
// what all kernels are short of.
template <class Element, int THREADS, int BYTES>
struct Operands {
    static constexpr bool SPLIT = PARTS<Element> > 0;
    static constexpr int WARPS = THREADS / WARP;
    static_assert(WARPS <= MOST_WARPS, "there is a slot for every warp");

    // Shared memory: a slot for every warp and each of two tiles, then the scales.
    static constexpr int SLOT_BYTES = 2 * MOST_WARPS * static_cast<int>(sizeof(uint32));
    static constexpr int SHARED_BYTES = SPLIT ? SLOT_BYTES + TENSORS * CHUNK_BYTES : 0;
    const uint32 shared;

    // What one thread has copied at once.
    struct alignas(BYTES) Unit {
        uint32 words[BYTES / 4];
    };

    DEVICE TileScale<Element> scale(Tensors tensor) const {
        if constexpr (SPLIT) {
            return load_shared<TileScale<Element>>(scale_address(tensor));
        } else {
            return {};
        }
    }

    // At most two tiles at a time. Ends with a barrier.
    template <class... Tiles>
    DEVICE void make(Operand<Tiles>... operands) const {
        if constexpr (SPLIT) {
            uint32 slot = shared;
            (measure<ALL_BITS>(operands.tile, slot), ...);
            __syncthreads();
            slot = shared;
            bool nonfinite = false;
            ((nonfinite |= largest_of(operands.tile, slot) >= FLOAT_INFINITY), ...);
            if (nonfinite) {
                __syncthreads();
                slot = shared;
                (measure<FLOAT_INFINITY - 1>(operands.tile, slot), ...);
                __syncthreads();
            }
            slot = shared;
            (split(operands, bit_cast<float>(largest_of(operands.tile, slot)),
                   nonfinite), ...);
        }
        __syncthreads();
    }

private:
    static constexpr uint32 ALL_BITS = 0x7fffffff;

    DEVICE uint32 scale_address(Tensors tensor) const {
        return shared + SLOT_BYTES + tensor * CHUNK_BYTES;
    }

    // Notes the warp's largest absolute value whose bits are not above MOST in the tile's slots.
    template <uint32 MOST, class Tile>
    static DEVICE void measure(Tile tile, uint32& slot) {
        const uint32 largest = warp_max(largest_bits<MOST>(tile));
        if (threadIdx.x % WARP == 0) store_shared(slot + threadIdx.x / WARP * 4, largest);
        slot += MOST_WARPS * 4;
    }
    // The largest of all warps.
    template <class Tile>
    static DEVICE uint32 largest_of(Tile, uint32& slot) {
        uint32 largest = 0;
#pragma unroll
        for (int i = 0; i < WARPS; ++i) largest = max(largest, load_shared<uint32>(slot + 4 * i));
        slot += MOST_WARPS * 4;
        return largest;
    }

    template <uint32 MOST, class Tile>
    static DEVICE uint32 largest_bits(Tile tile) {
        uint32 largest = 0;
        CopyShape<Tile, THREADS, BYTES>().for_each([&](int row, int byte) {
            const Unit unit = load_shared<Unit>(tile.at(row, 0) + byte);
#pragma unroll
            for (int i = 0; i < BYTES / 4; ++i) {
                const uint32 bits = unit.words[i] & 0x7fffffff;
                if (MOST == ALL_BITS || bits <= MOST) largest = max(largest, bits);
            }
        });
        return largest;
    }

    // Neighbouring lanes share a cell: all read before the first of them writes.
    template <class Tile>
    DEVICE void split(Operand<Tile> operand, float largest, bool nonfinite) const {
        using Shape = CopyShape<Tile, THREADS, BYTES>;
        const Shape shape;
        const Scale<float> scale = split_scale(largest);
        if (threadIdx.x == 0) {
            store_shared(scale_address(operand.tensor), bit_cast<Chunk>(TileScale<Element>{
                                                           largest, scale.inverse, nonfinite}));
        }
        const int cell_byte = shape.byte / CELL_BYTES * CELL_BYTES;
        const int part_byte = shape.byte % CELL_BYTES / 2;
#pragma unroll
        for (int i = 0; i < Shape::ROW_STEPS; ++i) {
            const uint32 row = operand.tile.at(shape.row + i * Shape::ROW_STEP, 0);
            Unit units[Shape::UNIT_STEPS];
            if (shape.has_row(i)) {
#pragma unroll
                for (int j = 0; j < Shape::UNIT_STEPS; ++j) {
                    units[j] = load_shared<Unit>(row + shape.byte + j * Shape::LINE);
                }
            }
            __syncwarp();
            if (!shape.has_row(i)) continue;
#pragma unroll
            for (int j = 0; j < Shape::UNIT_STEPS; ++j) {
                const uint32 target = row + cell_byte + part_byte + j * Shape::LINE;
                store_parts(target, units[j], scale.factor);
            }
        }
    }

    // The parts of a unit's floats: big ones at `address`, small ones a chunk further.
    static DEVICE void store_parts(uint32 address, const Unit& unit, float factor) {
        constexpr int WORDS = BYTES / 4, COUNT = PARTS<Element>;
        uint32 parts[(WORDS + 1) / 2][COUNT];
#pragma unroll
        for (int i = 0; i < WORDS; i += 2) {
            const float x = bit_cast<float>(unit.words[i]);
            const float y = WORDS > 1 ? bit_cast<float>(unit.words[(i + 1) % WORDS]) : 0;
            split_pair(x * factor, y * factor, parts[i / 2]);
        }
#pragma unroll
        for (int p = 0; p < COUNT; ++p) {
            const uint32 target = address + p * CHUNK_BYTES;
            if constexpr (WORDS == 1) {
                store_shared(target, static_cast<uint16>(parts[0][p]));
            } else if constexpr (WORDS == 2) {
                store_shared(target, parts[0][p]);
            } else {
                store_shared(target, parts[0][p] | static_cast<uint64>(parts[1][p]) << 32);
            }
        }
    }
};

// Two neighbouring elements of a split tile, which are within its range; `col` is even.
template <class T, int ROWS, int COLS>
DEVICE void store_parts(SharedTile<T, ROWS, COLS> tile, int row, int col, float x, float y) {
    uint32 part[PARTS<T>];
    split_pair(x, y, part);
    const uint32 address = tile.at(row, col / 8 * 8) + col % 8 * 2;
#pragma unroll
    for (int i = 0; i < PARTS<T>; ++i) store_shared(address + i * CHUNK_BYTES, part[i]);
}

template <int ROWS, int COLS>
DEVICE void store_pair(SharedTile<SplitFloat, ROWS, COLS> tile, int row, int col, float x,
                       float y) {
    store_parts(tile, row, col, x, y);
}

template <int ROWS, int COLS>
DEVICE void store_pair(SharedTile<RoundedFloat, ROWS, COLS> tile, int row, int col, float x,
                       float y) {
    store_parts(tile, row, col, x, y);
}
