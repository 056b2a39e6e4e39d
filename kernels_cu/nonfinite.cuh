// NaN and infinity in rows that are out of sight.
//
// A weight of 0 does not keep a value out of a matrix product: 0 * NaN is NaN. So where a tile is
// only partly visible its non-finite values are looked for. What is done about them is rare.
//
// The portable kernels take them out of the tile (remove_nonfinite); after the product they load
// it once more and set to NaN what sees one of them (spread_nonfinite). Hopper's kernels, whose
// steps have no time for either, let their products be spoilt and compute the results anew, pair by
// pair of rows (hopper_forward_pairs.cuh, hopper_backward_pairs.cuh).
#pragma once
#include "types.cuh"
#include "mma.cuh"
#include "tile.cuh"
#include "split.cuh"

// Bits that are all 1 in non-finite values alone: the exponent, in the upper 4 bytes of double.
template <class T>
constexpr uint32 EXPONENT_BITS = 0x7f800000;
template <>
constexpr uint32 EXPONENT_BITS<float16> = 0x7c00;
template <>
constexpr uint32 EXPONENT_BITS<bfloat16> = 0x7f80;
template <>
constexpr uint32 EXPONENT_BITS<double> = 0x7ff00000;

// What a tile's bytes are when it is searched: split tiles are float16 throughout.
template <class Element, bool SPLIT = (PARTS<Element> > 0)>
struct Searched {
    using type = Element;
};
template <class Element>
struct Searched<Element, true> {
    using type = float16;
};

template <class T>
DEVICE bool is_nonfinite(uint32 bits) {
    return (bits & EXPONENT_BITS<T>) == EXPONENT_BITS<T>;
}

// Whether the element of type T at an address in shared memory is NaN or infinite.
template <class T>
DEVICE bool nonfinite_at(uint32 address) {
    if constexpr (sizeof(T) == 2) {
        return is_nonfinite<T>(load_shared<uint16>(address));
    } else {
        return is_nonfinite<T>(load_shared<uint32>(address + sizeof(T) - 4));
    }
}

template <class T>
DEVICE bool has_nonfinite(const Chunk& chunk) {
    bool found = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (sizeof(T) == 2) {
            found |= is_nonfinite<T>(chunk.words[i]) || is_nonfinite<T>(chunk.words[i] >> 16);
        } else if (sizeof(T) == 4 || i % 2 == 1) {
            found |= is_nonfinite<T>(chunk.words[i]);
        }
    }
    return found;
}

// The same for Hopper's kernels, of 16-bit elements, by fewer instructions, which take registers
// that the portable ones do not have: an exponent that is all 1 carries into the sign's bit.
template <class T>
DEVICE bool has_nonfinite_16(const Chunk& chunk) {
    static_assert(sizeof(T) == 2);
    constexpr uint32 BOTH = 0x10001, LOWEST = EXPONENT_BITS<T> & (~EXPONENT_BITS<T> + 1);
    uint32 sums = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sums |= (chunk.words[i] & BOTH * EXPONENT_BITS<T>) + BOTH * LOWEST;
    }
    return sums & BOTH * 0x8000;
}

// Whether one of a thread's chunks of `bytes` bytes of shared memory has a non-finite value.
template <class T, int UNROLL>
DEVICE bool finds_nonfinite_16(uint32 address, int bytes, int thread, int threads) {
    bool found = false;
#pragma unroll UNROLL
    for (int i = thread * CHUNK_BYTES; i < bytes; i += threads * CHUNK_BYTES) {
        found |= has_nonfinite_16<T>(load_shared<Chunk>(address + i));
    }
    return found;
}

// Whether this thread's part of a tile holds a non-finite value.
template <int THREADS, class Tile>
DEVICE bool finds_nonfinite(Tile tile) {
    bool found = false;
    CopyShape<Tile, THREADS, CHUNK_BYTES>().for_each([&](int row, int byte) {
        found |= has_nonfinite<typename Tile::Element>(
            load_shared<Chunk>(tile.at(row, 0) + byte));
    });
    return found;
}

// Whether one of the tiles holds a non-finite value: of split ones it is known, for others a vote,
// and barrier, of the whole block.
template <class Element, int THREADS, int BYTES, class... Tiles>
DEVICE bool any_nonfinite(Operands<Element, THREADS, BYTES> operands, Operand<Tiles>... tiles) {
    if constexpr (PARTS<Element> > 0) {
        return (operands.scale(tiles.tensor).nonfinite | ...);
    } else {
        return __syncthreads_or((finds_nonfinite<THREADS>(tiles.tile) || ...));
    }
}

// Sets the non-finite values of a tile to 0. All threads of the block take part, barriers lie
// before and after it.
template <int THREADS, class Tile>
DEVICE void remove_nonfinite(Tile tile) {
    __syncthreads();
    using T = typename Searched<typename Tile::Element>::type;
    CopyShape<Tile, THREADS, CHUNK_BYTES>().for_each([&](int row, int byte) {
        const uint32 chunk = tile.at(row, 0) + byte;
        if (!has_nonfinite<T>(load_shared<Chunk>(chunk))) return;
#pragma unroll 1
        for (uint32 address = chunk; address < chunk + CHUNK_BYTES; address += sizeof(T)) {
            if (nonfinite_at<T>(address)) {
                store_shared(address, typename Word<sizeof(T)>::type(0));
            }
        }
    });
    __syncthreads();
}

// Sets to NaN what sees a non-finite value in the product acc += weights (M x K) tile (K x N):
// acc[m][n] of a warp where sees(row of weights, row of the tile) holds for such a value. The tile
// is as it was loaded, not split.
template <class Tile, class Real, int ROW_BLOCKS, int COL_BLOCKS, class Sees>
DEVICE void spread_nonfinite(Accumulator<Real> (&acc)[ROW_BLOCKS][COL_BLOCKS], Tile tile,
                             Sees sees) {
#pragma unroll 1
    for (int k = 0; k < Tile::ROWS; ++k) {
        bool seen[ROW_BLOCKS][2];
#pragma unroll
        for (int i = 0; i < 2 * ROW_BLOCKS; ++i) {
            seen[i / 2][i % 2] = sees(16 * (i / 2) + Accumulator<Real>::row(i % 2 * 2), k);
        }
#pragma unroll
        for (int i = 0; i < 4 * COL_BLOCKS; ++i) {
            const int n = i / 4, h = i / 2 % 2, e = i % 2;
            const int col = 16 * n + Accumulator<Real>::col(h, e);
            if (!nonfinite_at<typename Tile::Element>(tile.at(k, col))) continue;
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    if (seen[m][r]) acc[m][n].value[h][2 * r + e] = infinity<Real>() * 0;
                }
            }
        }
    }
}
