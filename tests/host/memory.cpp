#include "memory.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "block.hpp"
#include "runtime.hpp"

DeviceMemory device_memory;

const char* name_of(Access access) {
    switch (access) {
        case Access::READ: return "read";
        case Access::WRITE: return "write";
        default: return "atomic operation";
    }
}

// ---- allocation ---------------------------------------------------------------------------------

static unsigned char* reserve(size_t bytes) {
    void* space = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (space == MAP_FAILED) {
        perror("no address space for the device's memory");
        abort();
    }
    return static_cast<unsigned char*>(space);
}

DeviceMemory::DeviceMemory()
    : base_(reserve(SPACE)),
      chunks_(reinterpret_cast<Chunk*>(reserve(SPACE / CHUNK_BYTES * sizeof(Chunk)))),
      free_(first_free()) {}

template <class Visit>
void DeviceMemory::for_each_chunk(const unsigned char* address, size_t bytes, Visit visit) const {
    const unsigned char* end = address + bytes;
    while (address < end) {
        const size_t first = (address - base_) % CHUNK_BYTES;
        const size_t count = std::min<size_t>(end - address, CHUNK_BYTES - first);
        visit(chunk_at(address), static_cast<uint16_t>(((1u << count) - 1) << first), address);
        address += count;
    }
}

void DeviceMemory::set_allocated(unsigned char* address, size_t bytes, bool allocated) {
    memset(address, POISON, bytes);
    for_each_chunk(address, bytes, [&](Chunk& chunk, uint16_t mask, const unsigned char*) {
        if (!allocated) chunk.~Chunk();
        new (&chunk) Chunk;
        if (allocated) chunk.allocated = mask;
    });
}

unsigned char* DeviceMemory::allocate(size_t bytes) {
    if (live_ == 0) {
        free_ = first_free();
        allocations_.clear();
    }
    const size_t rounded = (bytes + 255) / 256 * 256 + GUARD_BYTES;  // aligned as cudaMalloc aligns
    if (rounded > static_cast<size_t>(base_ + SPACE - free_)) return nullptr;
    unsigned char* address = free_;
    free_ += rounded;
    allocations_[address] = {bytes, true};
    live_ += 1;
    set_allocated(address, bytes, true);
    return address;
}

bool DeviceMemory::release(unsigned char* address) {
    auto found = allocations_.find(address);
    if (found == allocations_.end() || !found->second.live) return false;
    found->second.live = false;
    live_ -= 1;
    set_allocated(address, found->second.bytes, false);
    return true;
}

bool DeviceMemory::is_allocated(const unsigned char* address, size_t bytes) const {
    if (!contains(address) || !contains(address + bytes)) return false;
    bool allocated = true;
    for_each_chunk(address, bytes, [&](Chunk& chunk, uint16_t mask, const unsigned char*) {
        allocated &= (mask & ~chunk.allocated) == 0;
    });
    return allocated;
}

void DeviceMemory::mark_written(unsigned char* byte) {
    chunk_at(byte).written |= 1 << (byte - base_) % CHUNK_BYTES;
}

void DeviceMemory::set_in_flight(unsigned char* address, size_t bytes, bool in_flight) {
    for_each_chunk(address, bytes, [=](Chunk& chunk, uint16_t mask, const unsigned char*) {
        chunk.in_flight = in_flight ? chunk.in_flight | mask : chunk.in_flight & ~mask;
    });
}

void DeviceMemory::set_barrier(unsigned char* address, size_t bytes) {
    for_each_chunk(address, bytes, [](Chunk& chunk, uint16_t mask, const unsigned char*) {
        chunk.barrier |= mask;
    });
}

void DeviceMemory::reset_shared(size_t bytes) {
    set_allocated(shared(), shared_bytes_, false);
    set_allocated(shared(), bytes, true);
    shared_bytes_ = bytes;
}

// ---- checks -------------------------------------------------------------------------------------

// Where an address lies, in words.
static std::string place_in(size_t offset, size_t bytes, const char* what) {
    char text[160];
    if (offset < bytes) {
        snprintf(text, sizeof text, "byte %zu of the %zu of %s", offset, bytes, what);
    } else {
        snprintf(text, sizeof text, "%zu bytes past the end of the %zu of %s", offset - bytes,
                 bytes, what);
    }
    return text;
}

std::string DeviceMemory::describe(const void* address) const {
    auto* byte = static_cast<unsigned char*>(const_cast<void*>(address));
    if (byte < shared()) return "in front of shared memory";
    if (byte < shared() + SHARED_BYTES) {
        return place_in(byte - shared(), shared_bytes_, "shared memory");
    }
    auto next = allocations_.upper_bound(byte);
    if (next != allocations_.end()) {
        const size_t before = next->first - byte;
        if (before < GUARD_BYTES / 2) {
            return std::to_string(before) + " bytes in front of an array of " +
                   std::to_string(next->second.bytes) + " bytes in global memory";
        }
    }
    if (next == allocations_.begin()) return "outside of every array in global memory";
    const auto& [start, allocation] = *std::prev(next);
    return place_in(byte - start, allocation.bytes,
                    allocation.live ? "an array in global memory"
                                    : "an array in global memory that has been freed");
}

static int first_byte(uint16_t mask) { return __builtin_ctz(mask); }

static const Knowledge& knowledge_of(const Actor& actor, int lane) {
    return actor.known ? *actor.known : *running_block->thread(actor.first + lane).known;
}

// Whether what `trace` tells of another block comes before what `actor` does now. Nothing but
// their turns orders blocks within a launch.
static bool was_passed_on(const Trace& trace, const Actor& actor) {
    for (uint32_t ours = actor.lanes; ours; ours &= ours - 1) {
        const SharedBlocks& others = knowledge_of(actor, __builtin_ctz(ours)).others;
        if (!others) return false;
        const auto block = others->find(trace.block);
        if (block == others->end()) return false;
        for (uint32_t rest = trace.lanes; rest; rest &= rest - 1) {
            const int other = trace.warp * host::WARP + __builtin_ctz(rest);
            if (Knowledge::at(*block->second, other) <= trace.clock) return false;
        }
    }
    return true;
}

// Whether all that `trace` tells of comes before what `actor` does now.
static bool happened_before(const Trace& trace, const Actor& actor) {
    Block& block = *running_block;
    if (trace.block != block.serial()) return was_passed_on(trace, actor);
    const int theirs = trace.warp * host::WARP;
    if (theirs < block.count() && trace.clock < block.all_know()) return true;
    for (uint32_t rest = trace.lanes; rest; rest &= rest - 1) {
        const int other = theirs + __builtin_ctz(rest);
        for (uint32_t ours = actor.lanes; ours; ours &= ours - 1) {
            const int lane = __builtin_ctz(ours);
            if (actor.first + lane == other || other == actor.issuer) continue;
            if (Knowledge::at(knowledge_of(actor, lane).done, other) <= trace.clock) return false;
        }
    }
    return true;
}

// Whether ordinary stores are there for a unit of the asynchronous proxy.
static bool is_fenced(const Trace& trace, const Actor& actor) {
    for (uint32_t rest = trace.lanes; rest; rest &= rest - 1) {
        const int other = trace.warp * host::WARP + __builtin_ctz(rest);
        if (Knowledge::at(actor.known->fenced, other) <= trace.clock) return false;
    }
    return true;
}

static bool conflict(Access first, Access second) {
    if (first == Access::READ && second == Access::READ) return false;
    return !(first == Access::ATOMIC && second == Access::ATOMIC);
}

// Whether `actor` comes after additions to these bytes that came after `trace`. Then it also comes
// after the latter, as far as these bytes go, even if who has added tells of nothing else.
static bool precedes_additions(const std::vector<Trace>& traces, const Trace& trace, uint16_t bytes,
                               const Actor& actor) {
    if (trace.access == Access::ATOMIC) return false;
    bytes &= trace.bytes;
    const Trace* const end = traces.data() + traces.size();
    for (const Trace* later = &trace + 1; bytes && later != end; ++later) {
        const bool adds = later->access == Access::ATOMIC && (later->bytes & bytes);
        if (adds && happened_before(*later, actor)) bytes &= ~later->bytes;
    }
    return bytes == 0;
}

static std::string actors_in_words(int first, uint32_t lanes) {
    const int actor = first + __builtin_ctz(lanes);
    if (actor >= running_block->count()) return running_block->unit_name(actor);
    const int count = __builtin_popcount(lanes);
    std::string text = "thread " + std::to_string(actor);
    if (count > 1) text += " and " + std::to_string(count - 1) + " more of its warp";
    return text;
}

static std::string actors_in_words(const Trace& trace) {
    if (trace.block != running_block->serial()) return "a thread of another block";
    return actors_in_words(trace.warp * host::WARP, trace.lanes);
}

// Reads by blocks that came before stay only while fewer than two others are known for their bytes:
// two different blocks are enough for any later writer to meet one that is not itself.
static void forget_surplus_reads(std::vector<Trace>& traces) {
    uint16_t once = 0, twice = 0;
    uint32_t last_block = 0;
    auto surplus = [&](const Trace& trace) {
        if (trace.access != Access::READ || trace.block == running_block->serial()) return false;
        const bool covered = (trace.bytes & ~twice) == 0 ||
                             (trace.block == last_block && (trace.bytes & ~once) == 0);
        if (covered) return true;
        if (trace.block != last_block) twice |= once & trace.bytes;
        once |= trace.bytes;
        last_block = trace.block;
        return false;
    };
    traces.erase(std::remove_if(traces.begin(), traces.end(), surplus), traces.end());
}

// " by the copies of ...", if it is a unit that accesses memory for the running thread.
static std::string by(const Actor& actor) {
    return actor.known ? " by " + actors_in_words(actor.first, actor.lanes) : "";
}

// Traces of earlier launches are void, but while these may still run, what they tell counts.
void Chunk::enter_launch() {
    if (launch < current_launch.oldest_running) {
        read_before = written_before = 0;
    } else {
        for (const Trace& trace : traces) {
            (trace.access == Access::READ ? read_before : written_before) |= trace.bytes;
        }
    }
    launch = current_launch.serial;
    traces.clear();
}

// Reports an access that does not go with those of a kernel that may still run.
void DeviceMemory::check_prerequisites(const Chunk& chunk, uint16_t bytes, Access access,
                                       const Actor& actor, const void* address) const {
    const bool written = chunk.written_before & bytes;
    const bool conflicting = written || (access != Access::READ && (chunk.read_before & bytes));
    if (!conflicting) return;
    for (uint32_t ours = actor.lanes; ours; ours &= ours - 1) {
        const Knowledge& known = knowledge_of(actor, __builtin_ctz(ours));
        if (running_block->comes_after_prerequisites(known)) continue;
        host::fail("race: %s of %s%s,\n"
                   "which a kernel has %s that may still run: wait_for_prerequisites is missing, "
                   "or a barrier behind it",
                   name_of(access), describe(address).c_str(), by(actor).c_str(),
                   written ? "written" : "read");
    }
}

// Checks the access against the traces that others left, and leaves its own.
void DeviceMemory::trace(Chunk& chunk, uint16_t bytes, Access access, const Actor& actor,
                         const void* code, const void* address) {
    if (chunk.launch != current_launch.serial) chunk.enter_launch();
    if (chunk.read_before | chunk.written_before) {
        check_prerequisites(chunk, bytes, access, actor, address);
    }
    Block& block = *running_block;
    const auto warp = static_cast<uint16_t>(actor.first / host::WARP);
    Trace mine{code, block.serial(), actor.clock, actor.lanes, warp, bytes, access};
    if (!actor.known) {
        for (uint32_t rest = actor.lanes; rest; rest &= rest - 1) {
            const Thread& thread = block.thread(actor.first + __builtin_ctz(rest));
            mine.clock = std::max(mine.clock, thread.clock);
        }
    }

    size_t kept = 0;
    bool merged = false;
    for (Trace& other : chunk.traces) {
        const bool conflicting = conflict(other.access, access);
        const bool replaces = access == Access::WRITE || other.access == access;
        if ((other.bytes & bytes) && (conflicting || replaces)) {
            const bool ordered =
                happened_before(other, actor) ||
                (conflicting && precedes_additions(chunk.traces, other, bytes, actor));
            if (conflicting && !ordered) {
                host::fail("race: %s of %s%s,\n"
                           "after a %s by %s that no barrier orders before it\n    %s",
                           name_of(access), describe(address).c_str(), by(actor).c_str(),
                           name_of(other.access), actors_in_words(other).c_str(),
                           code_place(other.code).c_str());
            }
            if (actor.known && other.access != Access::READ && is_shared(address) &&
                other.warp * host::WARP < block.count() && !is_fenced(other, actor)) {
                host::fail("missing fence: %s of %s%s,\n"
                           "after a %s by %s without fence_async_shared between\n    %s",
                           name_of(access), describe(address).c_str(), by(actor).c_str(),
                           name_of(other.access), actors_in_words(other).c_str(),
                           code_place(other.code).c_str());
            }
            // Who is ordered after this access is then also ordered after the other.
            if (ordered && replaces) other.bytes &= ~bytes;
            if (other.bytes == 0) continue;
        }
        if (other.access == access && other.bytes == bytes && other.block == mine.block &&
            other.warp == mine.warp && other.clock == mine.clock) {
            other.lanes |= actor.lanes;
            merged = true;
        }
        chunk.traces[kept++] = other;
    }
    chunk.traces.resize(kept);
    if (merged) return;
    if (kept >= 16) forget_surplus_reads(chunk.traces);
    chunk.traces.push_back(mine);
}

void DeviceMemory::check(const void* address, size_t bytes, Access access, uint32_t lanes,
                         const void* code) {
    const int first = running_block->running().index / host::WARP * host::WARP;
    check(address, bytes, access, Actor{first, lanes}, code);
}

void DeviceMemory::check(const void* address, size_t bytes, Access access, const Actor& actor,
                         const void* code) {
    for_each_chunk(static_cast<const unsigned char*>(address), bytes,
                   [&](Chunk& chunk, uint16_t mask, const unsigned char* at) {
        const unsigned char* chunk_start = at - first_byte(mask);
        if (const uint16_t bad = mask & ~chunk.allocated) {
            host::fail("%s out of bounds: %zu bytes, the first forbidden one is %s",
                       name_of(access), bytes, describe(chunk_start + first_byte(bad)).c_str());
        }
        if (const uint16_t bad = mask & chunk.in_flight) {
            host::fail("%s of %s, where an asynchronous copy has not landed: a wait is missing",
                       name_of(access), describe(chunk_start + first_byte(bad)).c_str());
        }
        if (const uint16_t bad = mask & chunk.barrier) {
            host::fail("%s of %s, where an mbarrier lives", name_of(access),
                       describe(chunk_start + first_byte(bad)).c_str());
        }
        trace(chunk, mask, access, actor, code, at);
        if (access == Access::WRITE) {
            chunk.written |= mask;
        } else if (const uint16_t bad = mask & ~chunk.written) {
            host::fail("%s of %s, which nothing has written", name_of(access),
                       describe(chunk_start + first_byte(bad)).c_str());
        }
    });
}
