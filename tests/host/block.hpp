// A block of threads in execution: fibers in a random order, their barriers and collectives, and
// what each thread knows of the others' progress.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "clocks.hpp"
#include "fiber.hpp"
#include "runtime.hpp"

struct AsyncCopy {
    unsigned char* shared;
    const unsigned char* global;
    int bytes, valid_bytes;
    bool late;               // the source is read when the copy lands, not when it is issued
    unsigned char data[16];  // what will land
};

// One phase of a barrier that some wait for and others only arrive at.
struct Phase {
    bool complete = false;
    Knowledge released;  // by those that arrived
    std::vector<struct Thread*> waiting;
};

// The accumulator of a matrix product on its way.
struct Accumulator {
    float* d;
    int count;
    std::vector<float> result;
    uint32_t group;
};

// Registers that products have used and may use again.
struct Registers {
    const uint32_t* first;
    std::vector<uint32_t> values;  // as the latest wgmma_fence found them
    bool fenced;                   // since a wait has filled them

    bool overlaps(const uint32_t* other, size_t count) const {
        return first < other + count && other < first + values.size();
    }
};

struct Thread {
    enum State { READY, WAITING, EXITED };

    Fiber fiber;
    int index;  // in the block
    uint3 position;
    State state;

    // What a waiting thread waits in.
    const char* operation;
    host::Place place;
    unsigned mask;  // 0 in a barrier of the whole block
    void* operands;
    const void* code;  // the return address of its call
    std::function<std::string()> what;  // more of what it waits for, if anything
    int votes;         // what a barrier of the block answers

    // `clock` grows at each barrier the thread passes. What it knows of the others may be shared
    // with them; of itself it knows all.
    uint32_t clock;
    uint32_t fenced;  // its clock after the latest fence between ordinary stores and units
    std::shared_ptr<Knowledge> known;

    std::vector<AsyncCopy> open_copies;
    std::deque<std::vector<AsyncCopy>> copy_groups;  // oldest first

    // Bulk copies from shared memory (copies.cpp): their units, -1 before the first, and clocks.
    int bulk_reader, bulk_writer;
    uint32_t bulk_latest;               // the latest copy
    std::vector<uint32_t> bulk_groups;  // the latest copy of each committed group

    // Matrix products (wgmma.cpp).
    std::vector<Accumulator> accumulators;
    std::vector<Registers> registers;
    uint32_t product_group;                // the open one
    std::vector<uint32_t> product_clocks;  // the latest product of each committed group
    uint32_t product_latest;               // the latest product
    bool product_fence;                    // whether there was one
};

class Block {
public:
    // Runs `entry(arguments)` on every thread of the block, in an order drawn from `random`.
    void run(void (*entry)(void**), void** arguments, std::mt19937& random);

    int wait_for_block(const char* operation, bool predicate, host::Place place);
    void wait_for_warp(const char* operation, unsigned mask, host::Place place, void* operands,
                       void (*compute)(void* const lanes[host::WARP]), bool orders_memory,
                       const void* code);

    // Waits until all threads of the warpgroup stand there; the last to come calls `compute`.
    void wait_for_warpgroup(const char* operation, host::Place place, void* operands,
                            void (*compute)(Thread* const threads[host::WARPGROUP]));
    // Waits until the phase is complete, and learns what has been released there. `what` tells
    // reports more of it.
    void wait_for_phase(const std::shared_ptr<Phase>& phase, const char* operation,
                        host::Place place, std::function<std::string()> what);
    void complete(Phase& phase);

    Thread& running() { return *running_; }
    uint32_t serial() const { return serial_; }
    uint32_t all_know() const { return all_know_; }  // the least that any thread knows of another
    int count() const { return count_; }
    Thread& thread(int index) { return *threads_[index]; }
    // Whether somebody with this knowledge comes after the kernels that this one overlaps with.
    bool comes_after_prerequisites(const Knowledge& known) const {
        return Knowledge::at(known.done, prerequisites_) > 0;
    }
    bool flip_coin() { return (*random_)() & 1; }
    std::string who_does_what() const;

    // ---- clocks ----
    int new_unit(const std::string& name);
    const std::string& unit_name(int index) const { return unit_names_[index - count_]; }
    uint32_t tick() { return ++time_; }
    // What the thread has done and what it knows goes to `phase`.
    void publish(Thread& thread, Phase& phase);
    void learn(Thread& thread, const Knowledge& knowledge);
    void learn(Thread& thread, int unit, uint32_t clock);
    void learn(Thread& thread, const SharedBlocks& others);
    void wait_for_prerequisites();
    // All that the thread knows, itself included.
    Knowledge view(const Thread& thread) const;
    // The same as other blocks learn it; what the thread does from now on comes later.
    SharedBlocks view_from_outside(Thread& thread);
    // All that the thread has written, or knows to be written, is there for units from now on.
    void fence(Thread& thread);

private:
    void prepare(int count);
    static void thread_main();
    void exit_running();
    Thread* take_ready();
    void switch_to(Thread* next, Fiber& from);
    void give_way();
    void release(const std::vector<Thread*>& waiting);
    void begin_waiting(const char* operation, unsigned mask, host::Place place, void* operands,
                       const void* code);
    void order_memory(const std::vector<Thread*>& participants);

    void (*entry_)(void**) = nullptr;
    void** arguments_ = nullptr;
    std::mt19937* random_ = nullptr;
    std::vector<std::unique_ptr<Thread>> threads_;  // kept from block to block, with their stacks
    int count_ = 0;
    std::vector<Thread*> ready_;
    std::vector<Thread*> at_barrier_;
    int votes_ = 0;  // of the threads at the barrier
    std::vector<unsigned> waiting_lanes_;  // of each warp, at collectives
    std::vector<Thread*> present_;         // the lanes of a collective that is complete
    std::vector<std::vector<Thread*>> warpgroups_;  // at collectives of warpgroups
    std::vector<std::string> unit_names_;
    int prerequisites_ = 0;  // a unit: its only deed is the end of the kernels before
    Thread* running_ = nullptr;
    Fiber main_;  // where run() continues when the last thread has exited
    int exited_ = 0;
    uint32_t time_ = 0;  // of all clocks of this block
    uint32_t all_know_ = 0;
    uint32_t serial_ = 0;
};

extern Block* running_block;  // null outside a launch

struct CurrentLaunch {
    uint32_t serial = 0;          // number since the worker started
    uint32_t oldest_running = 0;  // the first launch that may still run; this one if none overlaps
    bool has_waited = false;      // a thread has, for those before

    void begin(bool overlaps) {
        serial += 1;
        if (!overlaps) oldest_running = serial;
        has_waited = false;
    }
    bool overlaps() const { return oldest_running < serial; }
};
extern CurrentLaunch current_launch;

// Prints the running thread, its block and its calls to stderr.
void print_running();
// A place in the kernel's machine code, "[file.so+0x123]", for device.py to turn into a line of
// source.
std::string code_place(const void* return_address);
