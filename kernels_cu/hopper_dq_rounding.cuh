// From dq_sum to dq, on Hopper: blocks of the main kernel's grid that scale and round sums which
// are complete, while others compute.
//
// A block that computes stands for a share of its key head's dQ: as many parts of tiles as there
// are for each of the head's tiles of keys. A warp rounds a share: after every WARPS blocks that
// compute comes one that rounds as many shares, of blocks dq_lag before. The last shares, in
// dq_pieces each, are rounded by blocks at the end of the grid.
//
// dq_sum has places for params.dq_heads key heads (with the query heads of their groups), which of
// short rows are some tens of MB and stay in L2: head h adds up where head h - dq_heads did, whose
// sums were rounded and set to zero.
//
// Nobody waits for a block of a higher index (see turns.cuh). A share is rounded when its head is
// complete: all of the head is in its section (see head_tiles.cuh), and a section has at most
// dq_lag + 1 blocks. A place is used when all its shares have been rounded: the places are whole
// sections, with as many blocks at least as dq_lag, a section and WARPS have together. So shares
// that are rounded in pieces are the last ones of their places, which nobody waits for.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "mma.cuh"
#include "tile.cuh"
#include "mbarrier.cuh"
#include "tma.cuh"
#include "warpgroup.cuh"
#include "head_tiles.cuh"
#include "hopper_dq_sum.cuh"
#include "score.cuh"
#include "turns.cuh"

// What a block of the grid does.
struct BackwardRole {
    bool computes;
    uint32 share;   // that it stands for, or the first that it rounds, or rounds a piece of
    uint32 piece;   // of that share, the first one
    uint32 pieces;  // of each share
};

template <class Config>
struct DqRounding {
    using T = typename Config::Element;
    using Dq = DqTile<Config::TILE_M, Config::DQ_PARTS, Config::HEAD_DIM>;
    using Four = typename Dq::Four;
    using Tile = SharedTile<T, 8, 64>;
    static constexpr int EIGHTS = Dq::QUERIES / 8;  // of a part: 8 queries of 64 dims
    static constexpr int WARPS = Config::THREADS / WARP;

    const AttentionParams& params;

    DEVICE uint32 key_tiles() const {
        return ceil_div(params.seqlen_k, Config::TILE_N);
    }
    DEVICE uint32 key_heads() const {  // of all batch entries
        return params.dq_counts.row;
    }
    DEVICE uint32 head_parts() const {  // of a query head
        return ceil_div(params.seqlen_q, Config::TILE_M) * Config::DQ_PARTS;
    }

    DEVICE BackwardRole role(uint32 block) const {
        const uint32 shares = key_heads() * key_tiles();
        const uint32 lag = params.dq_lag;
        if (block < lag) return {true, block};
        block -= lag;
        const uint32 periods = (shares - lag) / WARPS;
        if (block < periods * (WARPS + 1)) {
            const uint32 period = block / (WARPS + 1), place = block % (WARPS + 1);
            if (place < WARPS) return {true, lag + period * WARPS + place};
            return {false, period * WARPS, 0, 1};
        }
        block -= periods * (WARPS + 1);
        const uint32 rest = shares - lag - periods * WARPS;
        if (block < rest) return {true, shares - rest + block};
        const uint32 piece = (block - rest) * WARPS, pieces = params.dq_pieces;
        return {false, periods * WARPS + piece / pieces, piece % pieces, pieces};
    }
    DEVICE HeadTile share(uint32 number) const {
        return nth_head_tile(number, key_tiles(), key_heads(), params.section);
    }

    // The sums of a key head's first query head.
    DEVICE float* sums(uint32 key_head) const {
        return static_cast<float*>(params.dq_sum.data) +
               key_head % params.dq_heads * params.group * params.dq_sum.head;
    }

    // ---- who waits for whom ---------------------------------------------------------------------

    // Counts consumers that have added all that they had to.
    DEVICE int32* added(uint32 key_head) const {
        return static_cast<int32*>(params.dq_counts.data) + key_head;
    }
    // Counts shares that have been rounded.
    DEVICE int32* rounded(uint32 key_head) const {
        return added(key_head) + params.dq_counts.row;
    }
    // Until a head's place is free and has zeros. Wide kernels' consumers have not waited for the
    // kernel that clears it before.
    DEVICE void wait_for_place(uint32 key_head) const {
        wait_for_prerequisites();
        if (key_head < params.dq_heads) return;
        wait_for_turn(rounded(key_head - params.dq_heads), key_tiles());
    }

    // ---- rounding -------------------------------------------------------------------------------

    // A warp loads RUN eights of its share at a time, into one of two stages. In shared memory
    // stand zeros for all, each warp's stages, and their barriers.
    static constexpr int RUN = 2;
    static constexpr int EIGHT_BYTES = WARPGROUP * static_cast<int>(sizeof(Four));
    static constexpr int RUN_BYTES = RUN * EIGHT_BYTES;
    static constexpr int BARRIERS_OFFSET = (1 + 2 * WARPS) * RUN_BYTES;
    static_assert(Tile::BYTES <= EIGHT_BYTES);
    static_assert(BARRIERS_OFFSET + 2 * WARPS * BARRIER_BYTES <= Config::SHARED_BYTES);

    static DEVICE uint32 zeros() {
        return shared_address(dynamic_shared_memory());
    }
    static DEVICE uint32 run(int stage) {
        return zeros() + (1 + threadIdx.x / WARP * 2 + stage) * RUN_BYTES;
    }
    static DEVICE uint32 full(int stage) {
        return zeros() + BARRIERS_OFFSET + (threadIdx.x / WARP * 2 + stage) * BARRIER_BYTES;
    }

    // All threads of a block that rounds.
    DEVICE void run_block(const BackwardRole& role) const {
        if (lane_index() == 0) {
            init_barrier(full(0), 1);
            init_barrier(full(1), 1);
            fence_barrier_init();
        }
        for (int i = threadIdx.x * CHUNK_BYTES; i < RUN_BYTES; i += Config::THREADS * CHUNK_BYTES) {
            store_shared(zeros() + i, Chunk{});
        }
        fence_async_shared();
        __syncthreads();
        wait_for_prerequisites();  // zero counts
        const uint32 piece = role.piece + threadIdx.x / WARP;
        const uint32 number = role.share + piece / role.pieces;
        if (number < key_heads() * key_tiles()) {
            round_piece(share(number), piece % role.pieces, role.pieces);
        }
    }

    // Which of `count` things belong to one of some owners: neighbours, as many for each or one
    // more.
    struct Range {
        uint32 begin, end;
    };
    static DEVICE Range range_of(uint32 owner, uint32 owners, uint32 count) {
        const uint32 some = count / owners, more = count % owners;
        const uint32 begin = owner * some + min(owner, more);
        return {begin, begin + some + (owner < more ? 1 : 0)};
    }

    // By a warp.
    DEVICE void round_piece(const HeadTile& share, uint32 piece, uint32 pieces) const {
        const Range parts = range_of(share.tile, key_tiles(), params.group * head_parts());
        const uint32 first = parts.begin * EIGHTS, count = parts.end * EIGHTS - first;
        const Range own = range_of(piece, pieces, count);
        const uint32 begin = first + own.begin, end = first + own.end;
        Four* const sums = reinterpret_cast<Four*>(this->sums(share.head));
        const HeadIndex head(params, share.head * params.group, params.heads);
        T* const dq = head_data<T>(params.dq, head, head.head);
        const bool clears = share.head + params.dq_heads < key_heads();  // the place is used again
        const bool leads = lane_index() == 0;
        if (leads) {
            wait_for_turn(added(share.head), key_tiles() * Config::CONSUMERS);
            load(sums, begin, end, 0);
            load(sums, begin + RUN, end, 1);
        }
        uint32 index = 0;
#pragma unroll 1
        for (uint32 eight = begin; eight < end; eight += RUN, ++index) {
            const int stage = index % 2;
            wait_for(full(stage), index / 2 % 2);
            round_run(run(stage), dq, eight, end);
            fence_async_shared();
            __syncwarp();
            if (leads) {
                if (clears) clear(sums, eight, end);
                load(sums, eight + 2 * RUN, end, stage);
            }
        }
        if (leads && clears) {
            wait_bulk<0>();
            pass_turn_of_bulk(rounded(share.head));
        }
    }

    static DEVICE Four* at(Four* sums, uint32 eight) {
        return sums + static_cast<uint64>(eight) * WARPGROUP;
    }
    // One thread: what there is of a run.
    static DEVICE uint32 run_bytes(uint32 eight, uint32 end) {
        return min(end - eight, static_cast<uint32>(RUN)) * EIGHT_BYTES;
    }
    DEVICE void load(Four* sums, uint32 eight, uint32 end, int stage) const {
        if (eight >= end) return;
        arrive_expecting(full(stage), run_bytes(eight, end));
        load_bulk(run(stage), at(sums, eight), run_bytes(eight, end), full(stage));
    }
    DEVICE void clear(Four* sums, uint32 eight, uint32 end) const {
        store_bulk(at(sums, eight), zeros(), run_bytes(eight, end));
        commit_bulk();
    }

    // By a warp: a run, counted through a group, from shared memory to the group's rows of dq. As
    // rows it stands where the sums stood. Each of three phases for all eights of the run, so that
    // they hide each other's latencies.
    DEVICE void round_run(uint32 sums, T* dq, uint32 eight, uint32 end) const {
        const float scale = gradient_scale<Config>(params);
        const int lane = lane_index();
        uint32 pairs[RUN][4][2];  // of 16 dims each, dims g and g + 8
#pragma unroll
        for (int i = 0; i < 4 * RUN; ++i) {
            if (eight + i / 4 >= end) break;
            const Four four =
                load_shared<Four>(sums + (i * WARP + lane) * static_cast<int>(sizeof(Four)));
            pairs[i / 4][i % 4][0] = pack<T>(four.value[0] * scale, four.value[1] * scale);
            pairs[i / 4][i % 4][1] = pack<T>(four.value[2] * scale, four.value[3] * scale);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2 * RUN; ++i) {
            if (eight + i / 2 >= end) break;
            const Tile tile{sums + i / 2 * EIGHT_BYTES};
            const auto& x = pairs[i / 2][i % 2 * 2];
            const auto& y = pairs[i / 2][i % 2 * 2 + 1];
            store_matrix_transposed_x4(tile.at(lane % 8, i % 2 * 32 + lane / 8 * 8), x[0], x[1],
                                       y[0], y[1]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < RUN; ++i) {
            if (eight + i < end) store_eight(Tile{sums + i * EIGHT_BYTES}, dq, eight + i);
        }
    }
    DEVICE void store_eight(Tile tile, T* dq, uint32 eight) const {
        const int lane = lane_index();
        const uint32 part = eight / EIGHTS;
        const uint32 head = params.group == 1 ? 0 : part / head_parts();
        const uint32 in_head = part - head * head_parts();
        const int in_tile = in_head % Config::DQ_PARTS;
        const int32 first_row = static_cast<int32>(in_head / Config::DQ_PARTS) * Config::TILE_M +
                                Dq::first_query(in_tile) + eight % EIGHTS * 8;
        const int32 dim = Dq::first_dim(in_tile) + lane % 8 * 8;
        dq += head * params.dq.head + first_row * params.dq.row + dim;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = lane / 8 + 4 * i;
            if (first_row + row < params.seqlen_q) {
                store_row(dq + row * params.dq.row, load_shared<Chunk>(tile.at(row, lane % 8 * 8)),
                          params.head_dim - dim);
            }
        }
    }
    // Of 8 neighbours those that exist.
    static DEVICE void store_row(T* dq, const Chunk& chunk, int32 dims) {
        if (dims >= 8) {
            *reinterpret_cast<Chunk*>(dq) = chunk;
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i < dims) reinterpret_cast<uint16*>(dq)[i] = chunk.words[i / 2] >> i % 2 * 16;
            }
        }
    }
};
