// NaN and infinity in rows that are out of sight.
//
// A weight of 0 does not keep a value out of a matrix product: 0 * NaN is NaN. So where a tile is
// only partly visible its non-finite values are taken out of it (remove_nonfinite), and the results
// that see one of them are found by a second product, of 0/1 visibility with 0/1 marks, and set to
// NaN (spread_nonfinite). This is rare; what every partial tile pays is the search (any_nonfinite).
#pragma once
#include "types.cuh"
#include "mma.cuh"
#include "tile.cuh"

template <class T>
struct Bits;  // of infinity, which has all bits of the exponent set, and of 1
template <>
struct Bits<float16> {
    static constexpr uint32 INFINITE = 0x7c00, ONE = 0x3c00;
};
template <>
struct Bits<bfloat16> {
    static constexpr uint32 INFINITE = 0x7f80, ONE = 0x3f80;
};
template <>
struct Bits<float> {
    static constexpr uint32 INFINITE = 0x7f800000, ONE = 0x3f800000;
};
template <>
struct Bits<tensorfloat32> : Bits<float> {};
template <>
struct Bits<double> {  // of the upper word
    static constexpr uint32 INFINITE = 0x7ff00000, ONE = 0x3ff00000;
};

template <class T>
DEVICE bool is_nonfinite(uint32 bits) {
    return (bits & Bits<T>::INFINITE) == Bits<T>::INFINITE;
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

// Whether a tile holds a non-finite value: a vote, and barrier, of the whole block.
template <int THREADS, class Tile>
DEVICE bool any_nonfinite(Tile tile) {
    bool found = false;
    CopyShape<Tile, THREADS, CHUNK_BYTES>().for_each([&](int row, int byte) {
        found |= has_nonfinite<typename Tile::Element>(
            load_shared<Chunk>(tile.at(row, 0) + byte));
    });
    return __syncthreads_or(found);
}

// Sets the non-finite values of a tile to 0. All threads of the block take part, a barrier follows.
template <int THREADS, class Tile>
DEVICE void remove_nonfinite(Tile tile) {
    using T = typename Tile::Element;
    CopyShape<Tile, THREADS, CHUNK_BYTES>().for_each([&](int row, int byte) {
        const uint32 address = tile.at(row, 0) + byte;
        if (!has_nonfinite<T>(load_shared<Chunk>(address))) return;
#pragma unroll 1
        for (int i = 0; i < CHUNK_BYTES; i += sizeof(T)) {
            if constexpr (sizeof(T) == 2) {
                const uint32 bits = load_shared<uint16>(address + i);
                if (is_nonfinite<T>(bits)) store_shared<uint16>(address + i, 0);
            } else {
                const uint32 upper = load_shared<uint32>(address + i + sizeof(T) - 4);
                if (is_nonfinite<T>(upper)) {
                    store_shared(address + i, typename Mma<T>::Real(0));
                }
            }
        }
    });
    __syncthreads();
}

// The fragment b of Mma<T> with 1 in place of non-finite values and 0 of finite ones.
template <class T>
DEVICE void mark_nonfinite(typename Mma16<T>::B& b) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        b.bits[i] = (is_nonfinite<T>(b.bits[i]) ? Bits<T>::ONE : 0) |
                    (is_nonfinite<T>(b.bits[i] >> 16) ? Bits<T>::ONE << 16 : 0);
    }
}

template <class T>
DEVICE void mark_nonfinite(FragmentsTf32::B& b) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        uint32& bits = b.bits[i / 4][i % 4];
        bits = is_nonfinite<T>(bits) ? Bits<T>::ONE : 0;
    }
}

template <class T>
DEVICE void mark_nonfinite(FragmentsSplit::B& b) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        uint32 &big = b.big[i / 4][i % 4], &small = b.small[i / 4][i % 4];
        big = is_nonfinite<T>(small) ? Bits<T>::ONE : 0;
        small = 0;
    }
}

template <class T>
DEVICE void mark_nonfinite(Mma<double>::B& b) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        double& x = b.x[i / 4][i % 4];
        x = is_nonfinite<T>(static_cast<uint32>(bit_cast<uint64>(x) >> 32)) ? 1 : 0;
    }
}

// Sets to NaN what sees a non-finite value in the product acc += weights (M x K) tile (K x N):
// acc[m][n] of a warp where sees(row of weights, row of the tile) holds for such a value.
template <class Tile, class Real, int ROW_BLOCKS, int COL_BLOCKS, class Sees>
DEVICE void spread_nonfinite(Accumulator<Real> (&acc)[ROW_BLOCKS][COL_BLOCKS], Tile tile,
                             Sees sees) {
    using T = typename Tile::Element;
    using M = Mma<T>;
#pragma unroll
    for (int n = 0; n < COL_BLOCKS; ++n) {
        Accumulator<Real> count[ROW_BLOCKS] = {};
#pragma unroll 1
        for (int k = 0; k < Tile::ROWS; k += 16) {
            typename M::B marks = M::load_b(tile, k, 16 * n);
            mark_nonfinite<T>(marks);
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; ++m) {
                Accumulator<Real> seen;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int row = 16 * m + Accumulator<Real>::row(e % 4);
                    const int col = k + Accumulator<Real>::col(e / 4, e % 4);
                    seen.value[e / 4][e % 4] = sees(row, col) ? 1 : 0;
                }
                M::multiply(count[m], M::to_a(seen), marks);
            }
        }
#pragma unroll
        for (int m = 0; m < ROW_BLOCKS; ++m) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (count[m].value[e / 4][e % 4] > 0) {
                    acc[m][n].value[e / 4][e % 4] = infinity<Real>() - infinity<Real>();
                }
            }
        }
    }
}
