// A block of the Hopper backward kernels: its place, its shared memory and barriers, and warpgroup
// 0, which feeds the others. The files of the kernels explain the pipeline.
#pragma once
#include "types.cuh"
#include "ptx.cuh"
#include "params.cuh"
#include "head_tiles.cuh"
#include "mbarrier.cuh"
#include "tma.cuh"
#include "warpgroup.cuh"
#include "hopper_tile.cuh"
#include "hopper_maps.cuh"
#include "hopper_dq_sum.cuh"
#include "hopper_dq_rounding.cuh"
#include "score.cuh"
#include "nonfinite.cuh"
#include "row_terms.cuh"
#include "turns.cuh"

// Config: the plan; WEIGHT_STAGES (of dS and P), DQ_PARTS; WIDE: whether P, too, goes through
// shared memory and the consumers add dQ themselves, in the same step, or writers do, a step late;
// WHOLE_HEAD: whether a block computes all keys of a head, one tile after another, so that dQ, of
// up to HEAD_ROWS queries, adds up in its shared memory, or one tile; and KEYS_IN_REGISTERS:
// whether K and V go on to the consumers' registers.
template <class Config>
struct BackwardBlock {
    using T = typename Config::Element;
    static constexpr int CONSUMERS = Config::CONSUMERS;
    static_assert(Config::WIDE ? CONSUMERS <= 3 : CONSUMERS == 2,
                  "warps from 1 on pass turns, or 2 and 3 are the writers");
    static constexpr int STAGES = Config::STAGES;

    using KTile = SwizzledTile<T, Config::TILE_N, Config::HEAD_DIM>;
    using VTile = SwizzledTile<T, Config::TILE_N, Config::HEAD_DIM_V>;
    using QTile = SwizzledTile<T, Config::TILE_M, Config::HEAD_DIM>;
    using DoTile = SwizzledTile<T, Config::TILE_M, Config::HEAD_DIM_V>;
    using DsTile = SwizzledTile<T, Config::TILE_M, Config::TILE_N>;  // a row for each query
    using Dq = DqTile<Config::TILE_M, Config::DQ_PARTS, Config::HEAD_DIM>;
    using Terms = RowTermsPair<float>;

    // Shared memory, in this order, from an address that the swizzle asks for.
    static constexpr int V_OFFSET = KTile::BYTES;
    static constexpr int Q_OFFSET = V_OFFSET + VTile::BYTES;
    static constexpr int DO_OFFSET = Q_OFFSET + STAGES * QTile::BYTES;
    static constexpr int DS_OFFSET = DO_OFFSET + STAGES * DoTile::BYTES;
    static constexpr int P_OFFSET = DS_OFFSET + Config::WEIGHT_STAGES * DsTile::BYTES;
    static constexpr int DQ_OFFSET =
        P_OFFSET + (Config::WIDE ? Config::WEIGHT_STAGES * DsTile::BYTES : 0);
    // Of a consumer: what writers take from there, or all of a head's.
    static constexpr int DQ_BYTES = Config::WIDE ? 0 : Dq::PART * static_cast<int>(sizeof(float));
    static constexpr int DQ_TILES = Config::WHOLE_HEAD ? Config::HEAD_ROWS / Config::TILE_M : 1;
    static constexpr int TERMS_OFFSET = DQ_OFFSET + DQ_TILES * CONSUMERS * DQ_BYTES;
    static constexpr int TERMS_BYTES = Config::TILE_M / 2 * static_cast<int>(sizeof(Terms));
    static constexpr int BARRIERS_OFFSET = TERMS_OFFSET + STAGES * TERMS_BYTES;
    // Of dS, with barriers of their own: where dQ is computed a step late.
    static constexpr int DS_STAGES = Config::WIDE ? 0 : Config::WEIGHT_STAGES;

    // mbarriers in shared memory.
    enum Barrier {
        Q_FULL,
        Q_EMPTY = Q_FULL + STAGES,
        DO_FULL = Q_EMPTY + STAGES,
        DO_EMPTY = DO_FULL + STAGES,
        DS_FULL = DO_EMPTY + STAGES,
        DS_EMPTY = DS_FULL + DS_STAGES,
        INSPECTED = DS_EMPTY + DS_STAGES,
        KEYS_FULL,   // K, with V if they go on to registers
        KEYS_EMPTY,  // of a head's tiles one after another
        BARRIERS,
    };
    // Named barriers; from the second on one for each consumer.
    enum NamedBarrier {
        ALL_CONSUMERS = 1,
        DQ_FULL,
        DQ_EMPTY = DQ_FULL + CONSUMERS,
        ONE_CONSUMER = DQ_EMPTY + CONSUMERS,
    };
    static constexpr int DQ_THREADS = WARPGROUP + WARP;  // at DQ_FULL and DQ_EMPTY

    static constexpr int INSPECTORS = 3;  // warps

    // Words of 4 bytes, behind the barriers: whether non-finite values spoil results (not 0), and
    // what one thread finds out for all, by several divisions, as registers are short: where
    // the group's first query head begins in some tensors, the key head's index and number, and
    // the tile. The compiler loads neighbours together, so what changes stands apart.
    enum Address { FIRST_Q, ROW_DOTS, DQ_SUM, DQ_TURNS, ADDRESSES };
    enum Word {
        DQ_SPOILT,
        DKV_SPOILT,
        FIRST_ADDRESS = 4,
        KEY_HEAD = FIRST_ADDRESS + 2 * ADDRESSES,
        NUMBER = KEY_HEAD + 1 + BATCH_AXES,  // of the key head, through all batch entries
        TILE,                                // of its keys
        WORDS,
    };
    static constexpr int BYTES = BARRIERS_OFFSET + BARRIERS * BARRIER_BYTES + WORDS * 4;
    static_assert(SWIZZLE_ALIGNMENT - CHUNK_BYTES + BYTES <= Config::SHARED_BYTES);

    // A tile of queries of a head of the group.
    struct Step {
        int32 head, tile;
        uint32 index;  // counts the steps of the block
        bool first;    // of the tile of keys

        DEVICE int stage() const {
            return index % STAGES;
        }
        DEVICE uint32 parity() const {  // of the phase of the stage's barriers
            return index / STAGES % 2;
        }
    };

    // What a role has done before a tile of keys: steps, and tiles that had any.
    struct Progress {
        uint32 steps, tiles;
    };

    const AttentionParams& params;
    const BackwardMaps& maps;
    const uint32 shared;
    const HeadTile place;  // a key head and a tile of its keys
    const int32 first_key;

    DEVICE BackwardBlock(const AttentionParams& params, const BackwardMaps& maps, uint32 shared,
                         uint32 block)
        : params(params),
          maps(maps),
          shared(shared),
          place(place_of(block)),
          first_key(place.tile * Config::TILE_N) {}
    DEVICE BackwardBlock(const BackwardBlock& block, uint32 tile)
        : params(block.params),
          maps(block.maps),
          shared(block.shared),
          place{block.place.head, tile},
          first_key(tile * Config::TILE_N) {}

    using Rounding = DqRounding<Config>;
    DEVICE Rounding rounding() const {
        return {params};
    }
    DEVICE BackwardRole role_of(uint32 block) const {
        if constexpr (Config::WHOLE_HEAD) return {true, block};
        return rounding().role(block);
    }
    DEVICE uint32 key_tiles() const {
        return ceil_div(params.seqlen_k, Config::TILE_N);
    }
    // The place of a block of the grid. Of a head's tiles the first is that which most queries of a
    // causal mask see, or, in turns, that which adds first to its first tile of queries.
    DEVICE HeadTile place_of(uint32 block) const {
        if constexpr (Config::WHOLE_HEAD) return {block, 0};
        const uint32 tiles = key_tiles();
        HeadTile place = rounding().share(block);
        if constexpr (Config::DETERMINISTIC) place.tile = tiles - 1 - place.tile;
        return place;
    }
    DEVICE HeadIndex find_key_head() const {
        return HeadIndex(params, place.head, params.heads / params.group);
    }
    DEVICE HeadIndex key_head() const {
        HeadIndex index;
        index.head = load_word(KEY_HEAD);
#pragma unroll
        for (int axis = 0; axis < BATCH_AXES; ++axis) {
            index.batch[axis] = load_word(KEY_HEAD + 1 + axis);
        }
        return index;
    }
    // A query head of the group of a key head.
    DEVICE HeadIndex query_head(HeadIndex key_head, int32 head) const {
        key_head.head = key_head.head * params.group + head;
        return key_head;
    }
    DEVICE Band band() const {
        return Config::BAND ? Band{params.band_low, params.band_high} : Band{-(1 << 30), 1 << 30};
    }
    DEVICE TileRange query_tiles() const {
        const int32 last = min(first_key + Config::TILE_N, params.seqlen_k) - 1;
        return visible_tiles(band().transposed(), first_key, last, Config::TILE_M,
                             params.seqlen_q);
    }

    DEVICE KTile k_tile() const {
        return {shared};
    }
    DEVICE VTile v_tile() const {
        return {shared + V_OFFSET};
    }
    DEVICE QTile q_tile(int stage) const {
        return {shared + Q_OFFSET + stage * QTile::BYTES};
    }
    DEVICE DoTile do_tile(int stage) const {
        return {shared + DO_OFFSET + stage * DoTile::BYTES};
    }
    DEVICE DsTile ds_tile(int stage) const {
        return {shared + DS_OFFSET + stage % Config::WEIGHT_STAGES * DsTile::BYTES};
    }
    DEVICE DsTile p_tile(int stage) const {
        return {shared + P_OFFSET + stage % Config::WEIGHT_STAGES * DsTile::BYTES};
    }
    DEVICE uint32 dq_part(int consumer, int32 tile = 0) const {  // of a whole head's queries
        return shared + DQ_OFFSET + (tile * CONSUMERS + consumer) * DQ_BYTES;
    }
    DEVICE uint32 terms(int stage) const {
        return shared + TERMS_OFFSET + stage * TERMS_BYTES;
    }
    DEVICE uint32 barrier(int index) const {
        return shared + BARRIERS_OFFSET + index * BARRIER_BYTES;
    }
    DEVICE uint32 word(int index) const {
        return barrier(BARRIERS) + index * static_cast<int>(sizeof(int32));
    }
    DEVICE int32 load_word(int index) const {
        return load_shared<int32>(word(index));
    }
    template <class Element>
    DEVICE Element* load_address(Address tensor) const {
        return load_shared<Element*>(address(tensor));
    }
    DEVICE uint32 address(Address tensor) const {
        return word(FIRST_ADDRESS + 2 * tensor);
    }
    // Of a tensor that has all heads on one axis.
    template <class Element>
    DEVICE Element* first_head(const Tensor& tensor) const {
        return static_cast<Element*>(tensor.data) + place.head * params.group * tensor.head;
    }
    // By one thread, before all others start.
    DEVICE void store_head() const {
        const HeadIndex keys = find_key_head();
        store_shared(word(DQ_SPOILT), 0);
        store_shared(word(DKV_SPOILT), 0);
        store_shared(word(NUMBER), place.head);
        store_shared(word(TILE), place.tile);
        store_shared(word(KEY_HEAD), keys.head);
#pragma unroll
        for (int axis = 0; axis < BATCH_AXES; ++axis) {
            store_shared(word(KEY_HEAD + 1 + axis), keys.batch[axis]);
        }
        if constexpr (Config::BAND) {
            const HeadIndex queries = query_head(keys, 0);
            store_shared(address(FIRST_Q), head_data<uint16>(params.q, queries, queries.head));
        }
        store_shared(address(ROW_DOTS), first_head<float>(params.row_dots));
        if constexpr (!Config::WHOLE_HEAD) {
            store_shared(address(DQ_SUM), rounding().sums(place.head));
        }
        if constexpr (Config::DETERMINISTIC) {
            store_shared(address(DQ_TURNS), first_head<int32>(params.dq_turns));
        }
    }
    // By another one.
    DEVICE void init_barriers() const {
#pragma unroll
        for (int stage = 0; stage < STAGES; ++stage) {
            init_barrier(barrier(Q_FULL + stage), 1);
            init_barrier(barrier(Q_EMPTY + stage), CONSUMERS * WARPGROUP);
            init_barrier(barrier(DO_FULL + stage), 1);
            init_barrier(barrier(DO_EMPTY + stage), CONSUMERS);
        }
#pragma unroll
        for (int stage = 0; stage < DS_STAGES; ++stage) {
            init_barrier(barrier(DS_FULL + stage), 4 * CONSUMERS);  // warps
            init_barrier(barrier(DS_EMPTY + stage), CONSUMERS);
        }
        init_barrier(barrier(INSPECTED), INSPECTORS);
        init_barrier(barrier(KEYS_FULL), 1);
        init_barrier(barrier(KEYS_EMPTY), CONSUMERS * WARPGROUP + (Config::BAND ? INSPECTORS : 0));
        fence_barrier_init();
    }

    // Calls visit(step) for all steps of the tile of keys, in order; `done` before and after them.
    template <class Visit>
    DEVICE Progress for_each_step(Progress done, Visit visit) const {
        const TileRange tiles = query_tiles();
        if (tiles.begin == tiles.end) return done;
        Step step = {0, tiles.begin, done.steps, true};
#pragma unroll 1
        while (step.head < params.group) {
            step.first = step.index == done.steps;
            visit(step);
            if (++step.tile == tiles.end) {
                step.tile = tiles.begin;
                step.head += 1;
            }
            step.index += 1;
        }
        return {step.index, done.tiles + 1};
    }

    // Calls visit(block, done) for the block's tile of keys, or for each tile of a whole head: it
    // returns what is done then.
    template <class Visit>
    DEVICE void for_each_key_tile(Visit visit) const {
        if constexpr (!Config::WHOLE_HEAD) {
            visit(*this, Progress{0, 0});
        } else {
            Progress done = {0, 0};
#pragma unroll 1
            for (uint32 tile = 0; tile < key_tiles(); ++tile) {
                done = visit(BackwardBlock(*this, tile), done);
            }
        }
    }

    // Whether some query of a tile does not see some key of the block, or one does not exist.
    DEVICE bool is_partial(int32 tile) const {
        return is_partial(tile, first_key, Config::TILE_N);
    }
    // The same of some of the block's keys.
    DEVICE bool is_partial(int32 tile, int32 first, int32 keys) const {
        const int32 first_query = tile * Config::TILE_M;
        const int32 last_query = first_query + Config::TILE_M - 1;
        const int32 last = first + keys - 1;
        return last_query >= params.seqlen_q || last >= params.seqlen_k ||
               (Config::BAND && (first < last_query + params.band_low ||
                                 last > first_query + params.band_high));
    }

    // ---- warpgroup 0 ----------------------------------------------------------------------------

    template <class Tile>
    DEVICE void load(Tile tile, const TensorMap& map, const HeadIndex& index, int32 row,
                     int full) const {
#pragma unroll
        for (int box = 0; box < Tile::BOXES; ++box) {
            load_box(tile.box(box), &map, box_place(index, index.head, row, Tile::BOX_COLS * box),
                     barrier(full));
        }
    }

    // One thread: all loads but that of the first K. K comes before the first Q and V with the
    // first dO, or, if they go on to registers, with K: those of a whole head while the tile before
    // is computed.
    DEVICE void produce() const {
        const HeadIndex keys = key_head();
        for_each_key_tile([&](const BackwardBlock& block, Progress done) {
            return block.for_each_step(done, [&](const Step& step) {
                block.load_step(keys, step, done.tiles % 2 ^ 1);
            });
        });
    }
    DEVICE void load_step(const HeadIndex& keys, const Step& step, uint32 keys_parity) const {
        const HeadIndex index = query_head(keys, step.head);
        const int32 row = step.tile * Config::TILE_M;
        const int q_full = Q_FULL + step.stage(), do_full = DO_FULL + step.stage();
        const bool v_with_do = !Config::KEYS_IN_REGISTERS && step.first;
        if (Config::WHOLE_HEAD && step.first && place.tile > 0) load_keys(keys, keys_parity);
        wait_for(barrier(Q_EMPTY + step.stage()), step.parity() ^ 1);
        arrive_expecting(barrier(q_full), QTile::BYTES + TERMS_BYTES);
        load(q_tile(step.stage()), maps.q, index, row, q_full);
        wait_for_prerequisites();  // row terms
        load_bulk(terms(step.stage()), row_terms(step.head) + 2 * row, TERMS_BYTES,
                  barrier(q_full));
        wait_for(barrier(DO_EMPTY + step.stage()), step.parity() ^ 1);
        arrive_expecting(barrier(do_full), DoTile::BYTES + (v_with_do ? VTile::BYTES : 0));
        if (v_with_do) load(v_tile(), maps.v, keys, first_key, do_full);
        load(do_tile(step.stage()), maps.do_, index, row, do_full);
    }
    // Of a block's first tile, as soon as there are barriers.
    DEVICE void load_first_keys() const {
        const TileRange tiles = query_tiles();
        if (tiles.begin < tiles.end) load_keys(find_key_head(), 1);
    }
    DEVICE void load_keys(const HeadIndex& keys, uint32 parity) const {
        if constexpr (Config::WHOLE_HEAD) wait_for(barrier(KEYS_EMPTY), parity);
        arrive_expecting(barrier(KEYS_FULL),
                         KTile::BYTES + (Config::KEYS_IN_REGISTERS ? VTile::BYTES : 0));
        load(k_tile(), maps.k, keys, first_key, KEYS_FULL);
        if (Config::KEYS_IN_REGISTERS) load(v_tile(), maps.v, keys, first_key, KEYS_FULL);
    }

    // One thread: what the block that probably comes next on this multiprocessor begins with is
    // brought to L2.
    DEVICE void prefetch_next() const {
        const uint32 next = blockIdx.x + multiprocessors();
        if (next >= gridDim.x) return;
        const BackwardRole role = role_of(next);
        if (!role.computes) return;
        const BackwardBlock other(params, maps, shared, role.share);
        const TileRange tiles = other.query_tiles();
        if (tiles.begin == tiles.end) return;
        const HeadIndex keys = other.find_key_head(), first = other.query_head(keys, 0);
        prefetch<KTile>(maps.k, keys, other.first_key);
        prefetch<QTile>(maps.q, first, tiles.begin * Config::TILE_M);
        prefetch<VTile>(maps.v, keys, other.first_key);
        prefetch<DoTile>(maps.do_, first, tiles.begin * Config::TILE_M);
    }
    template <class Tile>
    DEVICE void prefetch(const TensorMap& map, const HeadIndex& index, int32 row) const {
#pragma unroll
        for (int box = 0; box < Tile::BOXES; ++box) {
            prefetch_box(&map, box_place(index, index.head, row, Tile::BOX_COLS * box));
        }
    }

    // ---- non-finite values ----------------------------------------------------------------------

    // Three warps, once a tile: look for what would spoil, in a product, what does not see it: in
    // the queries of partial tiles, while K is on its way, and in K. The former spoil dK and dV,
    // the latter dQ.
    DEVICE Progress inspect(int inspector, Progress done) const {
        const TileRange tiles = query_tiles();
        if (tiles.begin == tiles.end) return done;
        const int thread = inspector * WARP + lane_index(), threads = INSPECTORS * WARP;
        const uint32 in_queries = look_through_queries(tiles, thread);
        note(DKV_SPOILT, in_queries != NOTHING);
        note(DQ_SPOILT, in_queries == QUERIES_AND_DQ);
        wait_for(barrier(KEYS_FULL), done.tiles % 2);
        note(DQ_SPOILT, finds_nonfinite_16<T, 2>(k_tile().address, KTile::BYTES, thread, threads));
        if (Config::WHOLE_HEAD && lane_index() == 0) arrive_at(barrier(KEYS_EMPTY));
        return {done.steps + params.group * (tiles.end - tiles.begin), done.tiles + 1};
    }
    // By a warp: whether one of its lanes has found anything.
    DEVICE void note(Word spoilt, bool found) const {
        found = __any_sync(0xffffffff, found);
        if (found && lane_index() == 0) add_shared(word(spoilt), 1);
        __syncwarp();
    }
    // Until they have seen all tiles.
    DEVICE void wait_for_inspectors() const {
        if constexpr (Config::BAND) wait_for(barrier(INSPECTED), 0);
    }
    // After that.
    DEVICE bool is_set(Word spoilt) const {
        return load_word(spoilt);
    }

    // What a query spoils: others' dK and dV, or its own dQ, too.
    enum Spoilt : uint32 { NOTHING = 0, QUERIES = 1, QUERIES_AND_DQ = 3 };

    // A thread's share of the queries in partial tiles.
    DEVICE uint32 look_through_queries(const TileRange& tiles, int thread) const {
        constexpr int STEP = INSPECTORS * WARP;
        const int32 end = min(tiles.end * Config::TILE_M, params.seqlen_q);
        uint32 spoilt = NOTHING;
#pragma unroll 1
        for (int32 head = 0; head < params.group; ++head) {
#pragma unroll 1
            for (int32 query = tiles.begin * Config::TILE_M + thread; query < end;
                 query += STEP) {
                const int32 full = tiles.full_end * Config::TILE_M - query;  // rows, if any are
                if (tiles.is_full(query / Config::TILE_M)) {
                    query += (full - 1) / STEP * STEP;
                } else {
                    spoilt |= look_at_query(head, query);
                }
            }
        }
        return spoilt;
    }
    // A query's numbers that times 0 are NaN. Those of dO show in D; those of q make lse NaN,
    // unless all that the query sees is -inf, or a softcap hides them: then consumers look. One that
    // sees nothing, so that lse is infinite, too, must not have NaN in dQ.
    DEVICE uint32 look_at_query(int32 head, int32 query) const {
        const float* const terms = row_terms(head) + query / 2 * 4 + query % 2;
        const uint32 lse = bit_cast<uint32>(terms[0]), dot = bit_cast<uint32>(terms[2]);
        const bool infinite = lse << 1 == FLOAT_INFINITY << 1;
        if (is_nonfinite<float>(dot)) return infinite ? QUERIES_AND_DQ : QUERIES;
        if (!is_nonfinite<float>(lse)) return NOTHING;
        return !infinite || row_is_nonfinite(load_address<const uint16>(FIRST_Q) +
                                             head * params.q.head + query * params.q.row)
                   ? QUERIES
                   : NOTHING;
    }
    DEVICE bool row_is_nonfinite(const uint16* row) const {
        bool found = false;
#pragma unroll 1
        for (int32 dim = 0; dim < params.head_dim; ++dim) found |= is_nonfinite<T>(row[dim]);
        return found;
    }

    // ---- dQ -------------------------------------------------------------------------------------

    // lse and D of the queries of a head of the group, see row_terms.cuh.
    DEVICE const float* row_terms(int32 head) const {
        return load_address<const float>(ROW_DOTS) + head * params.row_dots.head;
    }
    // The tile of dq_sum that a step adds to.
    DEVICE float* dq_sums(const Step& step) const {
        return load_address<float>(DQ_SUM) + step.head * params.dq_sum.head +
               step.tile * Config::TILE_M * params.dq_sum.row;
    }
    // The turns at it, one of each consumer.
    DEVICE int32* dq_turns(const Step& step) const {
        return load_address<int32>(DQ_TURNS) + step.head * params.dq_turns.head +
               step.tile * params.dq_turns.row;
    }

    // One warp for each consumer: adds its dQ to dq_sum; nothing if dQ is spoilt, as the consumer
    // will compute it anew (hopper_backward_pairs.cuh).
    DEVICE void write_dq(int consumer) const {
        __syncwarp();
        arrive_named(DQ_EMPTY + consumer, DQ_THREADS);
        if (lane_index() == 0) rounding().wait_for_place(load_word(NUMBER));
        wait_for_inspectors();
        __syncwarp();
        const bool adds = lane_index() == 0 && !is_set(DQ_SPOILT);
        for_each_step({0, 0}, [&](const Step& step) {
            sync_named(DQ_FULL + consumer, DQ_THREADS);
            if (adds) {
                if constexpr (Config::WRITERS_FENCE) fence_async_shared();
                if constexpr (Config::DETERMINISTIC) {
                    wait_for_turn(dq_turns(step) + consumer, turn(step.tile));
                }
                add_bulk(dq_sums(step) + consumer * Dq::PART, dq_part(consumer), DQ_BYTES);
                commit_bulk();
                wait_bulk_read<0>();
            }
            __syncwarp();
            arrive_named(DQ_EMPTY + consumer, DQ_THREADS);
            if constexpr (Config::DETERMINISTIC) {
                if (adds) {
                    wait_bulk<0>();
                    pass_turn_of_bulk(dq_turns(step) + consumer);
                }
            }
        });
        if (adds) {
            wait_bulk<0>();
            pass_turn_of_bulk(rounding().added(load_word(NUMBER)));
        }
    }

    // One warp for each consumer of a WIDE kernel. The consumer adds dQ by itself, and tells the
    // warp (DQ_FULL), which passes the turn in its place, as that takes long: of every step in a
    // fixed order, and in the end that of the head.
    DEVICE void pass_turns(int consumer) const {
        __syncwarp();
        arrive_named(DQ_EMPTY + consumer, DQ_THREADS);
        wait_for_inspectors();
        __syncwarp();
        if (is_set(DQ_SPOILT)) return;
        const auto pass = [&](int32* counter) {
            sync_named(DQ_FULL + consumer, DQ_THREADS);
            if (lane_index() == 0) pass_turn(counter);
            __syncwarp();
            arrive_named(DQ_EMPTY + consumer, DQ_THREADS);
        };
        if constexpr (Config::DETERMINISTIC) {
            for_each_step({0, 0}, [&](const Step& step) { pass(dq_turns(step) + consumer); });
        }
        pass(rounding().added(load_word(NUMBER)));
    }

    // How many key tiles add to a tile of dQ before this one: those behind it that it sees.
    DEVICE int32 turn(int32 tile) const {
        const int32 first = tile * Config::TILE_M;
        const int32 last = min(first + Config::TILE_M, params.seqlen_q) - 1;
        return visible_tiles(band(), first, last, Config::TILE_N, params.seqlen_k).end - 1 -
               load_word(TILE);
    }

    DEVICE void serve() const {
        const int warp = threadIdx.x / WARP;
        if (warp == 0) {
            if (threadIdx.x == 0) produce();
            return;
        }
        wait_for_prerequisites();  // row terms, and zeros to add to
        if constexpr (Config::BAND) {
            for_each_key_tile([&](const BackwardBlock& block, Progress done) {
                return block.inspect(warp - 1, done);
            });
            if (lane_index() == 0) arrive_at(barrier(INSPECTED));
        }
        if (threadIdx.x == WARP) prefetch_next();
        if constexpr (Config::WIDE) {
            if (warp <= CONSUMERS) pass_turns(warp - 1);
        } else if constexpr (!Config::WHOLE_HEAD) {
            if (warp >= 2) write_dq(warp - 2);
        }
    }
};
