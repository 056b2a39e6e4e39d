// What works beside the threads of a block on sm_90: mbarriers and named barriers (barriers.cpp),
// copies by the tensor memory accelerator (copies.cpp), matrix products of warpgroups (wgmma.cpp).
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "block.hpp"
#include "runtime.hpp"

struct Mbarrier {
    unsigned address;
    unsigned arrivals;  // that complete a phase
    unsigned pending;   // of them, in the current phase
    int64_t bytes;      // announced and not landed yet; negative if landed and not announced yet
    uint32_t phase;     // the current one
    std::shared_ptr<Phase> current, previous;
    int unit;               // the copies that it counts
    uint32_t latest_copy;   // clock
    uint32_t phase_copies;  // the latest copy of this phase, 0 if there was none
    int initializer;        // thread
    uint32_t fence;         // its clock after fence_barrier_init; 0: there was none
};

struct NamedBarrier {
    int threads = 0;  // what the warps of the current phase have said
    int arrived = 0;
    uint32_t warps = 0;
    std::shared_ptr<Phase> phase;
};

// A copy to shared memory on its way.
struct Landing {
    unsigned barrier;
    uint32_t clock;
    unsigned char* target;
    std::vector<unsigned char> data;
};

class Asynchronous {
public:
    void reset();  // for a new block

    // ---- barriers.cpp ----
    void init_barrier(unsigned address, unsigned arrivals, const void* code);
    void fence_barriers();
    void arrive(unsigned address, unsigned bytes);
    void wait(unsigned address, unsigned parity, host::Place place);
    void wait_named(const char* operation, int id, int threads, bool waits, host::Place place);
    // One thread's last words, and a block's.
    void check_exit(const Thread& thread) const;
    void check_end() const;

    // ---- copies.cpp ----
    size_t landing() const { return landing_.size(); }
    void land(size_t index);
    // Who finds that a counter has reached a turn comes after what was told with this turn and
    // those before it.
    void pass(const int* counter, const SharedBlocks& told);
    void find_passed(const int* counter, int turn);
    // Starts a copy to shared memory. `gather` reads its data for the unit that it is given.
    template <class Gather>
    void load(unsigned shared, size_t bytes, unsigned barrier, const void* code, Gather gather);
    // Copies from shared memory. `scatter` does it, for the units that it is given: one that reads,
    // one that writes.
    template <class Scatter>
    void store(Scatter scatter);

    // ---- wgmma.cpp ----
    int product_unit(int warpgroup);
    void set_registers(int count, bool grow);

private:
    Mbarrier& barrier_at(unsigned address, const char* operation);
    void announce(Mbarrier& barrier, int64_t bytes);
    void complete_if_done(Mbarrier& barrier);
    std::string state(const Mbarrier& barrier) const;
    static int initial_registers();
    void arrive_named(NamedBarrier& barrier, int id, int threads);

    std::map<unsigned, Mbarrier> barriers_;
    NamedBarrier named_[16];
    std::vector<Landing> landing_;
    // What was told up to a turn of a counter, in one launch.
    std::map<const int*, std::map<int, SharedBlocks>> passed_;
    uint32_t passed_launch_ = 0;
    std::vector<int> product_units_;  // of each warpgroup, -1: none yet
    std::vector<int> registers_;      // a thread's, by warpgroup; empty: nobody has changed them
};

extern Asynchronous asynchronous;
