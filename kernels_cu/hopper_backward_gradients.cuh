// What a consumer of hopper_backward makes of its sums: dk and dv of its rows of keys, and dQ,
// which it hands on, or, of a whole head, keeps.
#pragma once
#include "hopper_backward_consumer.cuh"

template <class Config>
struct GradientConsumer : BackwardConsumer<Config> {
    using Base = BackwardConsumer<Config>;
    using typename Base::Block;
    using typename Base::Dq;
    using typename Base::Progress;
    using typename Base::T;
    using Base::block, Base::index, Base::TILE_M;
    using Base::leads, Base::thread, Base::warp_row;

    float dk[Config::HEAD_DIM / 2];
    float dv[Config::HEAD_DIM_V / 2];

    DEVICE GradientConsumer(const Block& block, int index, Progress before)
        : Base(block, index, before), dk{}, dv{} {}

    DEVICE int first_row() const {  // of this consumer in the tiles of keys
        return 64 * index;
    }

    // ---- dQ -------------------------------------------------------------------------------------

    using DqSums = float[Dq::QUERIES / 2];

    using Four = typename Dq::Four;
    static DEVICE int dq_offset(int i) {  // bytes
        return Dq::at(Base::thread(), i) * static_cast<int>(sizeof(float));
    }
    // What a tile of queries of a whole head has got so far: words that no other thread touches.
    DEVICE void load_dq(DqSums& dq, int32 tile) const {
        if constexpr (Config::WHOLE_HEAD) {
#pragma unroll
            for (int i = 0; i < Dq::QUERIES / 8; ++i) {
                const Four four = load_shared<Four>(block.dq_part(index, tile) + dq_offset(i));
#pragma unroll
                for (int x = 0; x < 4; ++x) dq[4 * i + x] = four.value[x];
            }
        }
    }
    DEVICE void store_dq(const DqSums& dq, int32 tile) const {
#pragma unroll
        for (int i = 0; i < Dq::QUERIES / 8; ++i) {
            store_shared(block.dq_part(index, tile) + dq_offset(i),
                         Four{dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]});
        }
    }
    // Back to its place, or to the writer.
    DEVICE void pass_dq(const DqSums& dq, int32 tile) const {
        if constexpr (Config::WHOLE_HEAD) {
            store_dq(dq, tile);
        } else {
            sync_named(Block::DQ_EMPTY + index, Block::DQ_THREADS);
            store_dq(dq, 0);
            if constexpr (!Config::WRITERS_FENCE) fence_async_shared();
            arrive_named(Block::DQ_FULL + index, Block::DQ_THREADS);
        }
    }

    // Of a whole head, to begin with.
    DEVICE void clear_dq() const {
        for (int tile = 0; tile < Block::DQ_TILES; ++tile) {
#pragma unroll
            for (int i = 0; i < Dq::QUERIES / 8; ++i) {
                store_shared(block.dq_part(index, tile) + dq_offset(i), Four{});
            }
        }
    }

    // ---- dK and dV ------------------------------------------------------------------------------

    // This consumer's rows of dk or dv, by way of the rows of a tile from `first` on, which no one
    // reads any more.
    template <class Tile, int COUNT>
    DEVICE void store(const float (&acc)[COUNT], float scale, Tile tile, int first,
                      const TensorMap& map) const {
        const int lane = lane_index(), row = first + warp_row() + lane % 16;
#pragma unroll
        for (int i = 0; i < COUNT; i += 8) {
            store_matrix_x4(tile.at(row, 2 * i + lane / 16 * 8),
                            pack<T>(acc[i] * scale, acc[i + 1] * scale),
                            pack<T>(acc[i + 2] * scale, acc[i + 3] * scale),
                            pack<T>(acc[i + 4] * scale, acc[i + 5] * scale),
                            pack<T>(acc[i + 6] * scale, acc[i + 7] * scale));
        }
        fence_async_shared();
        sync_named(Block::ONE_CONSUMER + index, WARPGROUP);
        if (leads()) {
            const HeadIndex head = block.key_head();
#pragma unroll
            for (int col = 0; col < 2 * COUNT; col += Tile::BOX_COLS) {
                store_box(&map, box_place(head, head.head, block.first_key + first_row(), col),
                          tile.at(first, col));
            }
            commit_bulk();
        }
    }

    // Of a whole head dk and dv leave by way of this consumer's columns of dS, so that the next K
    // and V can come meanwhile; `index` is that of the step whose dS has its place there.
    using Columns = SwizzledTile<T, TILE_M, 64>;
    DEVICE Columns ds_columns(uint32 index) const {
        return {block.ds_tile(index % Block::STAGES).box(this->index)};
    }
    DEVICE void store_dv(uint32 index) const {
        if constexpr (Config::WHOLE_HEAD) {
            store(dv, 1, ds_columns(index), 0, block.maps.dv);
        } else {
            store(dv, 1, block.v_tile(), first_row(), block.maps.dv);
        }
    }
    DEVICE void store_dk(uint32 index) const {
        const float scale = gradient_scale<Config>(block.params);
        if constexpr (Config::WHOLE_HEAD) {
            store(dk, scale, ds_columns(index), 0, block.maps.dk);
        } else {
            store(dk, scale, block.k_tile(), first_row(), block.maps.dk);
        }
    }

    // All of a head's dq of one consumer, by way of what it has of Q, dO and dS: all steps are
    // over.
    static DEVICE void store_head_dq(const Block& block, int index) {
        using Tile = SwizzledTile<T, Dq::QUERIES, 64>;
        constexpr int STAGED = Block::P_OFFSET - Block::Q_OFFSET;
        static_assert(Block::DQ_TILES * Config::CONSUMERS * Tile::BYTES <= STAGED);
        const float scale = gradient_scale<Config>(block.params);
        const uint32 staged = block.q_tile(0).address + index * (Block::DQ_TILES * Tile::BYTES);
        const int32 tiles = ceil_div(block.params.seqlen_q, TILE_M);
        const int lane = lane_index(), warp_dim = Base::thread() / WARP * 16;
#pragma unroll 1
        for (int32 tile = 0; tile < tiles; ++tile) {
            const Tile queries{staged + tile * Tile::BYTES};
            const uint32 sums = block.dq_part(index, tile);
            const uint32 row = queries.at(lane / 16 * 8 + lane % 8, warp_dim + lane / 8 % 2 * 8);
            Dq::template store_rounded<T, Tile::ROW_BYTES>(
                row, scale, [&](int i) { return load_shared<Four>(sums + dq_offset(i)); });
        }
        fence_async_shared();
        sync_named(Block::ONE_CONSUMER + index, WARPGROUP);
        if (Base::thread() != 0) return;
        const HeadIndex head = block.key_head();
#pragma unroll 1
        for (int32 tile = 0; tile < tiles; ++tile) {
            store_box(&block.maps.dq,
                      box_place(head, head.head, tile * TILE_M + Dq::first_query(index), 0),
                      staged + tile * Tile::BYTES);
        }
        commit_bulk();
        wait_bulk_read<0>();
    }
};
