// The work of hopper_forward: items, the order in which blocks that stay take them, and how the
// producer tells the other roles of its block.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "head_tiles.cuh"
#include "mbarrier.cuh"
#include "mma.cuh"
#include "score.cuh"

// Where a role is in a ring of stages, and the parity of the phase of the stage's barriers.
template <int STAGES>
struct Ring {
    int stage = 0;
    uint32 parity = 0;

    DEVICE void advance() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// What an item is, as it stands in shared memory.
struct alignas(CHUNK_BYTES) ItemWords {
    int32 first_row;  // of q; NO_ITEM at the end
    int32 head;       // of its batch entry
    int32 batch[BATCH_AXES];
    uint32 phase;   // of the barriers of its place in the ring: 2 stage + parity
    uint32 spoilt;  // not 0: products with V are, by values of V that are not finite
};
static_assert(sizeof(ItemWords) == 2 * CHUNK_BYTES);
constexpr int PHASE_OFFSET = 24, SPOILT_OFFSET = 28;  // of the last words, bytes
constexpr int LSE_OFFSET = sizeof(ItemWords);  // behind them: the address of the head's lse
constexpr int ITEM_BYTES = LSE_OFFSET + CHUNK_BYTES;
constexpr int32 NO_ITEM = -1;
constexpr int ITEM_STAGES = 2;

// The head of the item whose words begin there.
DEVICE HeadIndex index_of(uint32 words) {
    const Chunk first = load_shared<Chunk>(words), second = load_shared<Chunk>(words + CHUNK_BYTES);
    HeadIndex index;
    index.head = first.words[1];
    index.batch[0] = first.words[2];
    index.batch[1] = first.words[3];
    index.batch[2] = second.words[0];
    index.batch[3] = second.words[1];
    return index;
}

// TILE_M rows of one head, and the tiles of keys that they see.
template <class Config>
struct Item {
    const AttentionParams& params;
    const uint32 words;  // address of its ItemWords
    const int32 first_row;
    Score<Config, float> score;
    TileRange tiles;

    DEVICE Item(const AttentionParams& params, uint32 words)
        : params(params),
          words(words),
          first_row(load_shared<int32>(words)),
          score(params, index()) {
        // Read from the parameters in every step, it makes the widest kernel 1.5 % slower.
        if constexpr (Config::HEAD_DIM_V > 128) score.factor = in_register(score.factor);
        tiles = tiles_of(first_row, Config::TILE_M);
    }

    DEVICE bool exists() const {
        return first_row != NO_ITEM;
    }
    // Read where it is needed: registers are short.
    DEVICE HeadIndex index() const {
        return index_of(words);
    }

    // Where the inspectors say so.
    DEVICE uint32 spoilt() const {
        return words + SPOILT_OFFSET;
    }
    DEVICE uint32 lse() const {
        return words + LSE_OFFSET;
    }
    DEVICE int stage() const {
        return load_shared<uint32>(words + PHASE_OFFSET) / 2;
    }
    DEVICE uint32 parity() const {
        return load_shared<uint32>(words + PHASE_OFFSET) % 2;
    }

    // The tiles that the rows from `first` on see, some or all of the item's: one at least, so that
    // rows which see nothing, too, have a tile, all of it masked, and rows beyond the last one have
    // one that this last row sees.
    DEVICE TileRange tiles_of(int32 first, int32 rows) const {
        const int32 last = min(first + rows, params.seqlen_q) - 1;
        TileRange range = visible_tiles(score.band, min(first, last), last, Config::TILE_N,
                                        params.seqlen_k);
        if (range.end <= range.begin || last < first) range.end = range.begin + 1;
        return range;
    }

    // Whether `rows` rows from `first` on see all keys of a tile, and all of these exist.
    DEVICE bool all_see(int32 first, int32 rows, int32 tile) const {
        const int32 key = tile * Config::TILE_N, last_key = key + Config::TILE_N - 1;
        return last_key < params.seqlen_k &&
               (!Config::BAND || (key >= first + rows - 1 + score.band.low &&
                                  last_key <= first + score.band.high));
    }

    // tiles.begin, for what needs it at the item's end and has no register to keep it until then.
    DEVICE int32 recomputed_begin() const {
        return tiles_of(recompute_from(first_row), Config::TILE_M).begin;
    }
};

// Which items a block computes. All items are in an order in which the blocks that run at the same
// time share keys: the row tiles of a head one after another, or, where they differ in length,
// sections of heads whose K and V fit in L2_BYTES, the longest row tiles of all of them first.
template <class Config>
struct Schedule {
    const AttentionParams& params;
    uint32 round = 0;

    // Computed anew for every item: the producer is short of registers.
    DEVICE uint32 row_tiles() const {
        return ceil_div(recompute_from(params.seqlen_q), Config::TILE_M);
    }
    DEVICE uint32 heads() const {  // of all batch entries
        uint32 heads = recompute_from(params.heads);
#pragma unroll
        for (int axis = 0; axis < BATCH_AXES; ++axis) heads *= params.batch[axis];
        return heads;
    }
    DEVICE uint32 section_heads() const {
        constexpr int32 L2_KEYS = Config::L2_BYTES / (2 * (Config::HEAD_DIM + Config::HEAD_DIM_V));
        const uint32 fitting = max(L2_KEYS / params.seqlen_k, 1) * params.group;
        return min(fitting, heads());
    }

    // The block's next item in that order; beyond the last one at the end.
    DEVICE uint32 next() {
        const uint32 item = round == 0 ? blockIdx.x : later_item();
        round += 1;
        return item;
    }

    DEVICE bool exists(uint32 item) const {
        return item < row_tiles() * heads();
    }

    DEVICE ItemWords words(uint32 item) const {
        const uint32 row_tiles = this->row_tiles();
        const HeadTile place = nth_head_tile(item, row_tiles, heads(),
                                             Config::BAND ? section_heads() : 1);
        const HeadIndex index(params, place.head, params.heads);
        return {static_cast<int32>((row_tiles - 1 - place.tile) * Config::TILE_M),
                index.head,
                {index.batch[0], index.batch[1], index.batch[2], index.batch[3]}};
    }

private:
    // Items of unequal length go to whichever block is free. Of equal ones, every other round goes
    // backwards: the blocks that have the last items of a round have the first of the next.
    DEVICE uint32 later_item() const {
        if constexpr (Config::DYNAMIC) {
            wait_for_prerequisites();  // zero tickets
            return gridDim.x + atomicAdd(static_cast<uint32*>(params.tickets.data), 1u);
        } else {
            const uint32 place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
            return round * gridDim.x + place;
        }
    }
};

// Calls task(item) for the items of this block, and tells followers about them. By one thread.
template <class Config, class Shared, class Task>
DEVICE void hand_out_items(const AttentionParams& params, const Shared& shared, Task task) {
    Schedule<Config> schedule{params};
    Ring<ITEM_STAGES> ring;
#pragma unroll 1
    for (bool more = true; more; ring.advance()) {
        const uint32 next = schedule.next();
        more = schedule.exists(next);
        wait_for(shared.item_empty(ring.stage), ring.parity ^ 1);
        const uint32 address = shared.item(ring.stage);
        ItemWords words = more ? schedule.words(next) : ItemWords{NO_ITEM};
        words.phase = 2 * ring.stage + ring.parity;
        struct Chunks {
            Chunk chunk[2];
        };
        const auto chunks = bit_cast<Chunks>(words);
        store_shared(address, chunks.chunk[0]);
        store_shared(address + CHUNK_BYTES, chunks.chunk[1]);
        if (more) {  // for the consumers, in whose way it would be
            const HeadIndex index = index_of(address);
            store_shared(address + LSE_OFFSET, head_data<float>(params.lse, index, index.head));
        }
        arrive_at(shared.item_full(ring.stage));
        if (more) task(Item<Config>(params, address));
    }
}

// Calls task(item) for the same items. By whole warps; each of them lets go of an item at its end.
template <class Config, class Shared, class Task>
DEVICE void follow_items(const AttentionParams& params, const Shared& shared, Task task) {
    Ring<ITEM_STAGES> ring;
#pragma unroll 1
    for (;; ring.advance()) {
        wait_for(shared.item_full(ring.stage), ring.parity);
        const Item<Config> item(params, shared.item(ring.stage));
        if (!item.exists()) break;
        task(item);
        __syncwarp();
        if (lane_index() == 0) arrive_at(shared.item_empty(ring.stage));
    }
}

// Calls task(tile) for the item's tiles of keys, from the right to the left.
template <class Config, class Task>
DEVICE void for_each_tile(const Item<Config>& item, Task task) {
#pragma unroll 1
    for (int32 tile = item.tiles.end - 1; tile >= item.tiles.begin; --tile) task(tile);
}
