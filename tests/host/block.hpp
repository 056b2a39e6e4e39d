// A block of threads in execution: fibers in a random order, their barriers and collectives, and
// what each thread knows of the others' progress.
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "fiber.hpp"
#include "runtime.hpp"

struct AsyncCopy {
    unsigned char* shared;
    const unsigned char* global;
    int bytes, valid_bytes;
    bool late;               // the source is read when the copy lands, not when it is issued
    unsigned char data[16];  // what will land
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
    int votes;         // what a barrier of the block answers

    // Vector clocks. `clock` grows at each barrier the thread passes. All that thread u did while
    // its clock was below known[u] happened before what this thread does now.
    uint32_t clock;
    std::vector<uint32_t> known;

    std::vector<AsyncCopy> open_copies;
    std::deque<std::vector<AsyncCopy>> copy_groups;  // oldest first
};

class Block {
public:
    // Runs `entry(arguments)` on every thread of the block, in an order drawn from `random`.
    void run(void (*entry)(void**), void** arguments, std::mt19937& random);

    int wait_for_block(const char* operation, bool predicate, host::Place place);
    void wait_for_warp(const char* operation, unsigned mask, host::Place place, void* operands,
                       void (*compute)(void* const lanes[host::WARP]), bool orders_memory,
                       const void* code);

    Thread& running() { return *running_; }
    uint32_t serial() const { return serial_; }
    uint32_t all_know() const { return all_know_; }  // the least known[u] of any thread
    Thread& thread(int index) { return *threads_[index]; }
    bool flip_coin() { return (*random_)() & 1; }

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
    // From now on each of them knows all that any of them knew, and has done.
    void order_memory(const std::vector<Thread*>& participants);
    std::string who_does_what() const;

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
    Thread* running_ = nullptr;
    Fiber main_;  // where run() continues when the last thread has exited
    int exited_ = 0;
    uint32_t time_ = 0;  // barriers passed so far, in this block
    uint32_t all_know_ = 0;
    uint32_t serial_ = 0;
};

extern Block* running_block;  // null outside a launch
extern uint32_t launch_serial;

// Prints the running thread, its block and its calls to stderr.
void print_running();
// A place in the kernel's machine code, "[file.so+0x123]", for device.py to turn into a line of
// source.
std::string code_place(const void* return_address);
