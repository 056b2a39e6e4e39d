// mbarriers and named barriers, see async.hpp.
#include <cstdlib>

#include "async.hpp"
#include "memory.hpp"

Asynchronous asynchronous;

void Asynchronous::reset() {
    barriers_.clear();
    for (NamedBarrier& barrier : named_) barrier = {};
    landing_.clear();
    product_units_.clear();
    registers_.clear();
}

// ---- mbarriers ----------------------------------------------------------------------------------

constexpr unsigned BARRIER_BYTES = 8;
constexpr unsigned MAX_ARRIVALS = (1 << 20) - 1;
constexpr int64_t MAX_BYTES = (1 << 20) - 1;

static std::string name_of(unsigned address) {
    return "the mbarrier at byte " + std::to_string(address - DeviceMemory::SHARED_START);
}

std::string Asynchronous::state(const Mbarrier& barrier) const {
    return "in phase " + std::to_string(barrier.phase) + " with " +
           std::to_string(barrier.arrivals - barrier.pending) + " of " +
           std::to_string(barrier.arrivals) + " arrivals and " + std::to_string(barrier.bytes) +
           " bytes to come";
}

void Asynchronous::init_barrier(unsigned address, unsigned arrivals, const void* code) {
    Block& block = *running_block;
    unsigned char* bytes = host::shared_pointer(address);
    host::check_aligned(bytes, BARRIER_BYTES);
    if (arrivals == 0 || arrivals > MAX_ARRIVALS) {
        host::fail("init_barrier: %u arrivals, takes 1 to %u", arrivals, MAX_ARRIVALS);
    }
    device_memory.check(bytes, BARRIER_BYTES, Access::WRITE, 1u << host::lane(), code);
    device_memory.set_barrier(bytes, BARRIER_BYTES);
    const int unit = block.new_unit("the copies that " + name_of(address) + " counts");
    barriers_[address] = {address,
                          arrivals,
                          arrivals,
                          0,
                          0,
                          std::make_shared<Phase>(),
                          std::make_shared<Phase>(),
                          unit,
                          0,
                          0,
                          block.running().index,
                          0};
}

void Asynchronous::fence_barriers() {
    Thread& self = running_block->running();
    running_block->fence(self);
    for (auto& [address, barrier] : barriers_) {
        if (barrier.initializer == self.index && !barrier.fence) barrier.fence = self.clock;
    }
}

Mbarrier& Asynchronous::barrier_at(unsigned address, const char* operation) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end()) {
        host::fail("%s: no mbarrier at byte %u of shared memory", operation,
                   address - DeviceMemory::SHARED_START);
    }
    Mbarrier& barrier = found->second;
    const Thread& self = running_block->running();
    if (!barrier.fence) {
        host::fail("%s: %s is not ready: fence_barrier_init is missing", operation,
                   name_of(address).c_str());
    }
    const bool ready = self.index == barrier.initializer ||
                       Knowledge::at(self.known->done, barrier.initializer) > barrier.fence;
    if (!ready) {
        host::fail("%s: %s was initialized by thread %d, which no barrier orders before",
                   operation, name_of(address).c_str(), barrier.initializer);
    }
    return barrier;
}

void Asynchronous::announce(Mbarrier& barrier, int64_t bytes) {
    barrier.bytes += bytes;
    if (std::abs(barrier.bytes) > MAX_BYTES) {
        host::fail("%s: more than %ld bytes at once", name_of(barrier.address).c_str(),
                   long{MAX_BYTES});
    }
}

void Asynchronous::complete_if_done(Mbarrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    Phase& phase = *barrier.current;
    if (barrier.phase_copies) {
        Knowledge::raise(phase.released.done, barrier.unit, barrier.phase_copies + 1);
    }
    barrier.phase_copies = 0;
    barrier.previous = barrier.current;
    // Whoever sees a later phase has also seen this one.
    barrier.current = std::make_shared<Phase>();
    barrier.current->released = phase.released;
    barrier.phase += 1;
    barrier.pending = barrier.arrivals;
    running_block->complete(phase);
}

void Asynchronous::arrive(unsigned address, unsigned bytes) {
    Mbarrier& barrier = barrier_at(address, "arrive");
    if (barrier.pending == 0) {
        host::fail("%s: more than its %u arrivals in a phase, %ld bytes are still to come",
                   name_of(address).c_str(), barrier.arrivals, static_cast<long>(barrier.bytes));
    }
    announce(barrier, bytes);
    running_block->publish(running_block->running(), *barrier.current);
    barrier.pending -= 1;
    complete_if_done(barrier);
}

void Asynchronous::wait(unsigned address, unsigned parity, host::Place place) {
    if (parity > 1) host::fail("wait_for: parity %u, takes 0 or 1", parity);
    Mbarrier& barrier = barrier_at(address, "wait_for");
    if (barrier.phase % 2 != parity) {  // also for the phase before the first
        running_block->learn(running_block->running(), barrier.previous->released);
        return;
    }
    const uint32_t waited = barrier.phase;
    running_block->wait_for_phase(barrier.current, "wait_for", place, [&] {
        return "(" + name_of(address) + ", parity " + std::to_string(parity) + "), " +
               state(barrier);
    });
    if (barrier.phase > waited + 1) {
        host::fail("wait_for: %s, parity %u: a thread waits for phase %u, but nothing keeps "
                   "phase %u from completing before it looks",
                   name_of(address).c_str(), parity, waited, waited + 1);
    }
}

// ---- named barriers -----------------------------------------------------------------------------

void Asynchronous::arrive_named(NamedBarrier& barrier, int id, int threads) {
    Block& block = *running_block;
    const int warp = block.running().index / host::WARP;
    if (barrier.arrived > 0 && barrier.threads != threads) {
        host::fail("named barrier %d: %d threads, but others came with %d%s", id, threads,
                   barrier.threads, block.who_does_what().c_str());
    }
    if (barrier.warps >> warp & 1) {
        host::fail("named barrier %d: warp %d comes a second time before it completes, with %d of "
                   "%d threads%s",
                   id, warp, barrier.arrived, threads, block.who_does_what().c_str());
    }
    barrier.threads = threads;
    barrier.arrived += host::WARP;
    barrier.warps |= 1u << warp;
    for (int lane = 0; lane < host::WARP; ++lane) {
        block.publish(block.thread(warp * host::WARP + lane), *barrier.phase);
    }
    if (barrier.arrived == threads) {
        const auto phase = barrier.phase;
        barrier = {};
        block.complete(*phase);
    }
}

void Asynchronous::wait_named(const char* operation, int id, int threads, bool waits,
                              host::Place place) {
    struct Operands {
        int id, threads;
        std::shared_ptr<Phase> phase;
    } operands{id, threads, nullptr};
    Block& block = *running_block;
    if (id < 1 || id > 15 || threads <= 0 || threads > block.count() || threads % host::WARP) {
        host::fail("%s: barrier %d, %d threads; takes 1 to 15, and whole warps of the block",
                   operation, id, threads);
    }
    // Barriers count warps: all lanes come together.
    block.wait_for_warp(operation, ~0u, place, &operands, [](void* const* lanes) {
        const auto& first = *static_cast<Operands*>(lanes[0]);
        NamedBarrier& barrier = asynchronous.named_[first.id];
        if (!barrier.phase) barrier.phase = std::make_shared<Phase>();
        for (int lane = 0; lane < host::WARP; ++lane) {
            auto& operands = *static_cast<Operands*>(lanes[lane]);
            if (operands.id != first.id || operands.threads != first.threads) {
                host::fail("the lanes of a warp come to different named barriers");
            }
            operands.phase = barrier.phase;
        }
        asynchronous.arrive_named(barrier, first.id, first.threads);
    }, false, nullptr);
    if (!waits) return;
    block.wait_for_phase(operands.phase, operation, place, [=] {
        return "(" + std::to_string(id) + "), " + std::to_string(named_[id].arrived) + " of " +
               std::to_string(threads) + " threads";
    });
}

// ---- the end ------------------------------------------------------------------------------------

void Asynchronous::check_exit(const Thread& thread) const {
    if (thread.bulk_reader >= 0) {
        const uint32_t read = Knowledge::at(thread.known->done, thread.bulk_reader);
        if (read <= thread.bulk_latest) {
            host::fail("a thread exits before its bulk copies have read shared memory: "
                       "commit_bulk or wait_bulk_read is missing");
        }
    }
    if (!thread.accumulators.empty()) {
        host::fail("a thread exits before its matrix products are done: wgmma_commit or "
                   "wgmma_wait is missing");
    }
}

void Asynchronous::check_end() const {
    const Block& block = *running_block;
    for (const auto& [address, barrier] : barriers_) {
        if (barrier.bytes != 0) {
            host::fail("the block ends while %s is %s", name_of(address).c_str(),
                       state(barrier).c_str());
        }
        bool known = barrier.latest_copy == 0;
        for (int i = 0; i < block.count() && !known; ++i) {
            const Knowledge& knowledge = *running_block->thread(i).known;
            known = Knowledge::at(knowledge.done, barrier.unit) > barrier.latest_copy;
        }
        if (!known) {
            host::fail("the block ends and nobody has waited for %s",
                       block.unit_name(barrier.unit).c_str());
        }
    }
    for (int id = 1; id < 16; ++id) {
        if (named_[id].arrived > 0) {
            host::fail("the block ends while %d of %d threads have come to named barrier %d",
                       named_[id].arrived, named_[id].threads, id);
        }
    }
    const int initial = initial_registers();
    int sum = 0;
    for (const int count : registers_) sum += count * host::WARPGROUP;
    if (sum > initial * block.count()) {
        host::fail("grow_registers: the warpgroups together have %d registers, the block %d",
                   sum, initial * block.count());
    }
}

// ---- what kernels call --------------------------------------------------------------------------

namespace host {

void init_barrier(unsigned barrier, unsigned arrivals) {
    asynchronous.init_barrier(barrier, arrivals, __builtin_return_address(0));
}

void fence_barrier_init() { asynchronous.fence_barriers(); }

void arrive_at(unsigned barrier, unsigned bytes) { asynchronous.arrive(barrier, bytes); }

void wait_for(unsigned barrier, unsigned parity, Place place) {
    asynchronous.wait(barrier, parity, place);
}

void named_barrier(const char* operation, int id, int threads, bool waits, Place place) {
    asynchronous.wait_named(operation, id, threads, waits, place);
}

}  // namespace host
