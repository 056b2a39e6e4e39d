// Copies by the tensor memory accelerator, see async.hpp.
//
// A copy to shared memory lands at a random moment, which may be as late as somebody waits for it.
// A copy from shared memory is done at once: nobody can tell, since until a wait covers it any
// write to its source and any access to its target are reported as races with its unit.
#include <cstring>

#include "async.hpp"
#include "memory.hpp"

constexpr size_t UNIT_BYTES = 16;  // of which copies are made
constexpr int RANK = host::MAP_RANK;

// A tensor of 16-bit elements and boxes of rows of 128 bytes: what machine.py puts into the 128
// bytes of a tensor map. Axis 0 is contiguous.
struct TensorMap {
    uint64_t magic;
    unsigned char* data;
    uint64_t strides[RANK - 1];  // bytes, of axes 1, 2, ...
    uint32_t extents[RANK];      // elements
    uint32_t box_rows;

    static constexpr uint64_t MAGIC = 0x70616d2d78656c66;
    static constexpr size_t ROW_BYTES = 128, ELEMENT_BYTES = 2;

    size_t box_bytes() const { return box_rows * ROW_BYTES; }
};
static_assert(sizeof(TensorMap) <= 128);

static const TensorMap& tensor_map(const char* operation, const void* map) {
    host::check_aligned(map, 64);
    const auto& tensor = *static_cast<const TensorMap*>(map);
    if (tensor.magic != TensorMap::MAGIC) host::fail("%s: this is no tensor map", operation);
    return tensor;
}

// Calls visit(unit in shared memory, its number of bytes inside the tensor, their address there)
// for the units of a box, those outside of the tensor left out, and check(address, bytes) for its
// rows. Chunk c of row r stands at place c ^ (r % 8) of the row.
template <class Check, class Visit>
static void for_each_unit(const TensorMap& map, const int (&place)[RANK], Check check,
                          Visit visit) {
    const int64_t columns = std::min<int64_t>(TensorMap::ROW_BYTES / TensorMap::ELEMENT_BYTES,
                                              int64_t{map.extents[0]} - place[0]);
    // A row would not start with its first unit.
    if (place[0] < 0) host::fail("a box that starts in front of column 0 is not simulated");
    for (uint32_t r = 0; r < map.box_rows; ++r) {
        const int64_t at[RANK] = {place[0], int64_t{place[1]} + r, place[2], place[3], place[4]};
        unsigned char* data = map.data + at[0] * TensorMap::ELEMENT_BYTES;
        bool inside = columns > 0;
        for (int axis = 1; axis < RANK; ++axis) {
            inside &= at[axis] >= 0 && at[axis] < int64_t{map.extents[axis]};
            data += at[axis] * static_cast<int64_t>(map.strides[axis - 1]);
        }
        if (!inside) continue;
        const size_t bytes = columns * TensorMap::ELEMENT_BYTES;
        check(data, bytes);
        for (size_t i = 0; i < bytes; i += UNIT_BYTES) {
            const size_t unit = r * TensorMap::ROW_BYTES + (i ^ r % 8 * UNIT_BYTES);
            visit(unit, std::min(UNIT_BYTES, bytes - i), data + i);
        }
    }
}

static void check_box(const char* operation, unsigned shared) {
    constexpr unsigned ALIGNMENT = 1024;  // the swizzle is made of address bits
    if (shared % ALIGNMENT != 0) {
        host::fail("%s: shared address %u is not a multiple of %u", operation, shared, ALIGNMENT);
    }
}

static void check_bulk(const char* operation, unsigned shared, const void* global, size_t bytes) {
    if (bytes == 0 || bytes % UNIT_BYTES != 0) {
        host::fail("%s: %zu bytes, takes multiples of 16", operation, bytes);
    }
    host::check_aligned(host::shared_pointer(shared), UNIT_BYTES);
    host::check_aligned(global, UNIT_BYTES);
    if (!device_memory.contains(global)) {
        host::fail("%s: %p is not device memory", operation, global);
    }
}

// ---- to shared memory ---------------------------------------------------------------------------

template <class Gather>
void Asynchronous::load(unsigned shared, size_t bytes, unsigned address, const void* code,
                        Gather gather) {
    Block& block = *running_block;
    Mbarrier& barrier = barrier_at(address, "asynchronous copy");
    const Thread& self = block.running();
    const Knowledge known = block.view(self);
    const Actor unit = Actor::unit(barrier.unit, block.tick(), known, self.index);
    unsigned char* target = host::shared_pointer(shared);
    device_memory.check(target, bytes, Access::WRITE, unit, code);
    Landing copy{address, unit.clock, target, std::vector<unsigned char>(bytes, 0)};
    gather(copy.data.data(), unit);
    memset(target, POISON, bytes);
    device_memory.set_in_flight(target, bytes, true);
    barrier.latest_copy = unit.clock;
    landing_.push_back(std::move(copy));
}

void Asynchronous::land(size_t index) {
    const Landing copy = std::move(landing_[index]);
    landing_.erase(landing_.begin() + static_cast<long>(index));
    device_memory.set_in_flight(copy.target, copy.data.size(), false);
    memcpy(copy.target, copy.data.data(), copy.data.size());
    Mbarrier& barrier = barriers_.at(copy.barrier);
    barrier.phase_copies = std::max(barrier.phase_copies, copy.clock);
    announce(barrier, -static_cast<int64_t>(copy.data.size()));
    complete_if_done(barrier);
}

// ---- from shared memory -------------------------------------------------------------------------

template <class Scatter>
void Asynchronous::store(Scatter scatter) {
    Block& block = *running_block;
    Thread& self = block.running();
    if (self.bulk_reader < 0) {
        const std::string name = "the bulk copies of thread " + std::to_string(self.index);
        self.bulk_reader = block.new_unit(name + " (from shared memory)");
        self.bulk_writer = block.new_unit(name + " (to global memory)");
    }
    const Knowledge known = block.view(self);
    self.bulk_latest = block.tick();
    scatter(Actor::unit(self.bulk_reader, self.bulk_latest, known, self.index),
            Actor::unit(self.bulk_writer, self.bulk_latest, known, self.index));
}

// ---- turns --------------------------------------------------------------------------------------

void Asynchronous::pass(const int* counter, const SharedBlocks& told) {
    if (passed_launch_ != current_launch.serial) passed_.clear();
    passed_launch_ = current_launch.serial;
    std::map<int, SharedBlocks>& turns = passed_[counter];
    turns[*counter] = turns.empty() ? told : joint(turns.rbegin()->second, told);
}

void Asynchronous::find_passed(const int* counter, int turn) {
    if (passed_launch_ != current_launch.serial) return;
    const std::map<int, SharedBlocks>& turns = passed_[counter];
    const auto told = turns.find(turn);
    if (told != turns.end()) running_block->learn(running_block->running(), told->second);
}

// ---- what kernels call --------------------------------------------------------------------------

namespace host {

void prefetch_map(const void* map) { tensor_map("prefetch_map", map); }

void prefetch_box(const void* map, const int (&place)[RANK]) {
    const TensorMap& tensor = tensor_map("prefetch_box", map);
    for (int axis = 1; axis < RANK; ++axis) {
        // A GPU would not mind, but it would be of no use.
        if (place[axis] < 0 || int64_t{place[axis]} >= int64_t{tensor.extents[axis]}) {
            fail("prefetch_box at %d of axis %d, which has %u", place[axis], axis,
                 tensor.extents[axis]);
        }
    }
}

void load_box(unsigned shared, const void* map, const int (&place)[RANK], unsigned barrier) {
    const void* code = __builtin_return_address(0);
    const TensorMap& tensor = tensor_map("load_box", map);
    check_box("load_box", shared);
    asynchronous.load(shared, tensor.box_bytes(), barrier, code,
                      [&](unsigned char* data, const Actor& unit) {
        for_each_unit(
            tensor, place,
            [&](const void* row, size_t bytes) {
                device_memory.check(row, bytes, Access::READ, unit, code);
            },
            [=](size_t i, size_t bytes, const void* source) { memcpy(data + i, source, bytes); });
    });
}

void store_box(const void* map, const int (&place)[RANK], unsigned shared) {
    const void* code = __builtin_return_address(0);
    const TensorMap& tensor = tensor_map("store_box", map);
    check_box("store_box", shared);
    for (const int coordinate : place) {
        // On a GPU an illegal instruction.
        if (coordinate < 0) host::fail("store_box at %d, takes places from 0 on", coordinate);
    }
    asynchronous.store([&](const Actor& reader, const Actor& writer) {
        for_each_unit(
            tensor, place,
            [&](const void* row, size_t bytes) {
                device_memory.check(row, bytes, Access::WRITE, writer, code);
            },
            [&](size_t i, size_t bytes, void* target) {
                // Of a box that reaches beyond the tensor, the rest does not matter.
                const unsigned char* source = shared_pointer(shared) + i;
                device_memory.check(source, bytes, Access::READ, reader, code);
                memcpy(target, source, bytes);
            });
    });
}

void load_bulk(unsigned shared, const void* global, unsigned bytes, unsigned barrier) {
    const void* code = __builtin_return_address(0);
    check_bulk("load_bulk", shared, global, bytes);
    asynchronous.load(shared, bytes, barrier, code, [&](unsigned char* data, const Actor& unit) {
        device_memory.check(global, bytes, Access::READ, unit, code);
        memcpy(data, global, bytes);
    });
}

// Calls copy(source), once both sides have been checked.
template <class Copy>
static void bulk_from_shared(const char* operation, const void* global, unsigned shared,
                             unsigned bytes, Access access, const void* code, Copy copy) {
    check_bulk(operation, shared, global, bytes);
    asynchronous.store([&](const Actor& reader, const Actor& writer) {
        const unsigned char* source = shared_pointer(shared);
        device_memory.check(source, bytes, Access::READ, reader, code);
        device_memory.check(global, bytes, access, writer, code);
        copy(source);
    });
}

void store_bulk(void* global, unsigned shared, unsigned bytes) {
    bulk_from_shared("store_bulk", global, shared, bytes, Access::WRITE,
                     __builtin_return_address(0),
                     [=](const unsigned char* source) { memcpy(global, source, bytes); });
}

void add_bulk(float* global, unsigned shared, unsigned bytes) {
    bulk_from_shared("add_bulk", global, shared, bytes, Access::ATOMIC,
                     __builtin_return_address(0), [=](const unsigned char* source) {
                         const auto* values = reinterpret_cast<const float*>(source);
                         for (size_t i = 0; i < bytes / sizeof(float); ++i) global[i] += values[i];
                     });
}

void commit_bulk() {
    Thread& self = running_block->running();
    self.bulk_groups.push_back(self.bulk_latest);
}

void wait_bulk(int pending, bool only_read) {
    Thread& self = running_block->running();
    const size_t groups = self.bulk_groups.size();
    if (self.bulk_reader < 0 || groups <= static_cast<size_t>(pending)) return;
    const uint32_t latest = self.bulk_groups[groups - 1 - pending];
    running_block->learn(self, self.bulk_reader, latest + 1);
    if (!only_read) running_block->learn(self, self.bulk_writer, latest + 1);
}

void wait_for_turn(const int* counter, int turn) {
    // Not a read: it goes with the additions of others.
    device_memory.check(counter, sizeof *counter, Access::ATOMIC, 1u << lane(),
                        __builtin_return_address(0));
    if (*counter < turn) {
        fail("deadlock: a block waits for turn %d, and after all blocks before it it is turn %d",
             turn, *counter);
    }
    asynchronous.find_passed(counter, turn);
}

static void pass_counter(int* counter, const SharedBlocks& told, const void* code) {
    device_memory.check(counter, sizeof *counter, Access::ATOMIC, 1u << lane(), code);
    *counter += 1;
    asynchronous.pass(counter, told);
}

void pass_turn(int* counter) {
    Block& block = *running_block;
    pass_counter(counter, block.view_from_outside(block.running()), __builtin_return_address(0));
}

void pass_turn_of_bulk(int* counter) {
    const Thread& self = running_block->running();
    const auto told = std::make_shared<OtherBlocks>();
    if (self.bulk_writer >= 0) {
        Clocks done;
        Knowledge::raise(done, self.bulk_writer, Knowledge::at(self.known->done, self.bulk_writer));
        if (done.back() <= self.bulk_latest) {
            fail("pass_turn_of_bulk before bulk additions are in global memory: wait_bulk is "
                 "missing");
        }
        (*told)[running_block->serial()] = std::make_shared<const Clocks>(std::move(done));
    }
    pass_counter(counter, told, __builtin_return_address(0));
}

void fence_async_shared() { running_block->fence(running_block->running()); }

}  // namespace host
