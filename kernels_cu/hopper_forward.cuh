// What feeds hopper_forward's consumers: a block's shared memory and barriers, and warpgroup 0, the
// producer and the inspectors. hopper_forward.cu explains the pipeline.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "mbarrier.cuh"
#include "tma.cuh"
#include "warpgroup.cuh"
#include "hopper_tile.cuh"
#include "hopper_maps.cuh"
#include "hopper_items.cuh"
#include "nonfinite.cuh"

// A block's shared memory: Q_STAGES of q, STAGES of k, STAGES of v, o unless it takes q's place;
// mbarriers; items.
template <class Config>
struct SharedMemory {
    using T = typename Config::Element;
    static constexpr int Q_STAGES = Config::Q_STAGES;
    static constexpr int STAGES = Config::STAGES;
    static_assert(!Config::O_OVER_Q || Q_STAGES == 1, "o leaves by way of the only place of q");
    using QTile = SwizzledTile<T, Config::TILE_M, Config::HEAD_DIM>;
    using KTile = SwizzledTile<T, Config::TILE_N, Config::HEAD_DIM>;
    using VTile = SwizzledTile<T, Config::TILE_N, Config::HEAD_DIM_V>;
    using OTile = SwizzledTile<T, Config::TILE_M, Config::HEAD_DIM_V>;

    static constexpr int Q_BYTES =
        Config::O_OVER_Q && OTile::BYTES > QTile::BYTES ? OTile::BYTES : QTile::BYTES;
    static constexpr int K_OFFSET = Q_STAGES * Q_BYTES;
    static constexpr int V_OFFSET = K_OFFSET + STAGES * KTile::BYTES;
    static constexpr int O_OFFSET = Config::O_OVER_Q ? 0 : V_OFFSET + STAGES * VTile::BYTES;
    static constexpr int BARRIERS_OFFSET =
        V_OFFSET + STAGES * VTile::BYTES + (Config::O_OVER_Q ? 0 : OTile::BYTES);
    static constexpr int BARRIERS = 2 * Q_STAGES + 3 * ITEM_STAGES + 4 * STAGES;
    static constexpr int ITEMS_OFFSET = BARRIERS_OFFSET + ceil_div(BARRIERS, 2) * CHUNK_BYTES;
    static constexpr int BYTES = ITEMS_OFFSET + ITEM_STAGES * ITEM_BYTES;
    static_assert(SWIZZLE_ALIGNMENT - CHUNK_BYTES + BYTES <= Config::SHARED_BYTES);

    const uint32 base;

    DEVICE SharedMemory() : base(swizzle_aligned(shared_address(dynamic_shared_memory()))) {}

    DEVICE QTile q(int stage) const {
        return {base + stage * Q_BYTES};
    }
    DEVICE KTile k(int stage) const {
        return {base + K_OFFSET + stage * KTile::BYTES};
    }
    DEVICE VTile v(int stage) const {
        return {base + V_OFFSET + stage * VTile::BYTES};
    }
    DEVICE OTile o() const {
        return {base + O_OFFSET};
    }

    DEVICE uint32 q_full(int stage) const {
        return barrier(stage);
    }
    DEVICE uint32 q_empty(int stage) const {
        return barrier(Q_STAGES + stage);
    }
    DEVICE uint32 item_full(int stage) const {
        return barrier(2 * Q_STAGES + stage);
    }
    DEVICE uint32 item_empty(int stage) const {
        return barrier(2 * Q_STAGES + ITEM_STAGES + stage);
    }
    DEVICE uint32 inspected(int stage) const {  // of an item
        return barrier(2 * Q_STAGES + 2 * ITEM_STAGES + stage);
    }
    DEVICE uint32 k_full(int stage) const {
        return tile_barrier(0, stage);
    }
    DEVICE uint32 k_empty(int stage) const {
        return tile_barrier(1, stage);
    }
    DEVICE uint32 v_full(int stage) const {
        return tile_barrier(2, stage);
    }
    DEVICE uint32 v_empty(int stage) const {
        return tile_barrier(3, stage);
    }
    DEVICE uint32 item(int stage) const {
        return base + ITEMS_OFFSET + stage * ITEM_BYTES;
    }
    DEVICE void init_barriers() const {
#pragma unroll
        for (int stage = 0; stage < Q_STAGES; ++stage) {
            init_barrier(q_full(stage), 1);
            init_barrier(q_empty(stage), (Config::O_OVER_Q ? 1 : 4) * Config::CONSUMERS);
        }
#pragma unroll
        for (int stage = 0; stage < ITEM_STAGES; ++stage) {
            init_barrier(item_full(stage), 1);
            init_barrier(item_empty(stage), 4 * Config::CONSUMERS + Config::INSPECTORS);
            if constexpr (Config::BAND) init_barrier(inspected(stage), Config::INSPECTORS);
        }
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(k_full(stage), 1);
            init_barrier(k_empty(stage), 4 * Config::CONSUMERS);  // warps
            init_barrier(v_full(stage), 1);
            init_barrier(v_empty(stage), Config::CONSUMERS + Config::INSPECTORS);
        }
        fence_barrier_init();
    }

private:
    DEVICE uint32 barrier(int index) const {
        return base + BARRIERS_OFFSET + index * BARRIER_BYTES;
    }
    DEVICE uint32 tile_barrier(int kind, int stage) const {
        return barrier(2 * Q_STAGES + 3 * ITEM_STAGES + kind * STAGES + stage);
    }
};

// The boxes of a tile, all of which count at one barrier.
template <class Tile>
DEVICE void load_tile(Tile tile, const TensorMap* map, const HeadIndex& index, int32 head,
                      int32 row, uint32 barrier) {
    arrive_expecting(barrier, Tile::BYTES);
#pragma unroll
    for (int i = 0; i < Tile::BOXES; ++i) {
        load_box(tile.box(i), map, box_place(index, head, row, i * Tile::BOX_COLS), barrier);
    }
}

// Warp 0 of warpgroup 0, one thread.
template <class Config>
DEVICE void produce(const AttentionParams& params, const ForwardMaps& maps) {
    const SharedMemory<Config> shared;
    Ring<Config::STAGES> ring;
    Ring<Config::Q_STAGES> q_ring;
    hand_out_items<Config>(params, shared, [&](const Item<Config>& item) {
        const HeadIndex index = item.index();
        const int32 kv_head = index.head / params.group;
        const auto load_q = [&] {
            wait_for(shared.q_empty(q_ring.stage), q_ring.parity ^ 1);
            load_tile(shared.q(q_ring.stage), &maps.q, index, index.head, item.first_row,
                      shared.q_full(q_ring.stage));
            q_ring.advance();
        };
        // Before the first keys, or, as a single place may be free later than theirs, behind them.
        if constexpr (Config::Q_STAGES > 1) load_q();
        for_each_tile(item, [&](int32 tile) {
            const int stage = ring.stage;
            wait_for(shared.k_empty(stage), ring.parity ^ 1);
            load_tile(shared.k(stage), &maps.k, index, kv_head, tile * Config::TILE_N,
                      shared.k_full(stage));
            wait_for(shared.v_empty(stage), ring.parity ^ 1);
            load_tile(shared.v(stage), &maps.v, index, kv_head, tile * Config::TILE_N,
                      shared.v_full(stage));
            ring.advance();
            if (Config::Q_STAGES == 1 && tile == item.tiles.end - 1) load_q();
        });
    });
}

// Warps 1 to 3 of warpgroup 0. They follow the ring of V through all tiles: their share in v_empty
// keeps it from getting ahead of them.
template <class Config>
DEVICE void inspect(const AttentionParams& params) {
    const SharedMemory<Config> shared;
    const int thread = threadIdx.x - WARP;  // of the inspectors'
    Ring<Config::STAGES> ring;
    follow_items<Config>(params, shared, [&](const Item<Config>& item) {
        bool found = false;
        for_each_tile(item, [&](int32 tile) {
            wait_for(shared.v_full(ring.stage), ring.parity);
            if (!item.tiles.is_full(tile)) {
                const auto v = shared.v(ring.stage);
                found |= finds_nonfinite_16<typename Config::Element, 8>(
                    v.address, v.BYTES, thread, Config::INSPECTORS * WARP);
            }
            __syncwarp();
            if (lane_index() == 0) arrive_at(shared.v_empty(ring.stage));
            ring.advance();
        });
        found = __any_sync(0xffffffff, found);
        if (lane_index() == 0) {
            if (found) add_shared(item.spoilt(), 1);
            arrive_at(shared.inspected(item.stage()));
        }
    });
}
