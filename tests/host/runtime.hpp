// What the host device offers to the code that runs on it: the interface between a compiled kernel
// (cuda.hpp, ptx.cuh and the like) and the worker that loads it.
//
// A block's threads are fibers of one operating-system thread, so nothing here needs a lock. A
// thread gives way to another only inside the functions of this file that say "waits".
#pragma once
#include <cstddef>
#include <cstdint>

#define HOST_UNCHECKED __attribute__((no_sanitize("thread", "undefined")))

struct uint3 {
    unsigned x, y, z;
};
extern uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace host {

constexpr int WARP = 32;
constexpr int WARPGROUP = 128;

// A place in the source: where a thread called an operation that other threads have to join.
struct Place {
    const char* file;
    int line;

    static constexpr Place here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
        return {file, line};
    }
};

// Ends the worker with a report that names the running thread and its block.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

// ---- threads ------------------------------------------------------------------------------------

// The number of the running thread in its warp, 0 to 31.
int lane();

// Waits until every thread of the block stands at the same operation and place. Orders memory
// between all of them, and returns how many came with a true `predicate`.
int block_barrier(const char* operation, bool predicate, Place place);

// Waits until every lane of `mask` stands at the same operation and place. The last to come calls
// `compute` with what each lane brought: lanes[i] is lane i's `operands`, or null outside the mask.
// Orders no memory, as PTX promises none.
void warp_collective(const char* operation, unsigned mask, Place place, void* operands,
                     void (*compute)(void* const lanes[WARP]));

// Waits as a warp_collective does, and orders memory between the lanes of `mask`.
void warp_barrier(unsigned mask, Place place);

// ---- memory -------------------------------------------------------------------------------------

// The start of the block's shared memory. Shared memory has 32-bit addresses beside pointers.
unsigned char* shared_memory();
unsigned char* shared_pointer(unsigned address);
unsigned shared_address(const void* pointer);

// Ordinary loads and stores of a kernel are checked without being asked. What else is to be
// checked:
void check_aligned(const void* address, size_t bytes);
// A read by all lanes together, and a write by one of them, to be called within a collective.
void check_warp_read(const void* address, size_t bytes);
void check_lane_write(const void* address, size_t bytes, int lane);

// Starts a copy of `valid_bytes` bytes from global to shared memory, followed by zeros up to
// `bytes`. Until a wait of the same thread covers it, any access to its destination is an error.
void issue_copy(unsigned shared, const void* global, int bytes, int valid_bytes);
// Ends the running thread's current group of copies, which may be empty.
void commit_copies();
// Lands all groups of the running thread but the `pending` latest.
void wait_copies(int pending);

// Adds `value` to `*address` in one indivisible step; returns what was there.
template <class T>
T atomic_add(T* address, T value);

// ---- barriers of sm_90 --------------------------------------------------------------------------

void init_barrier(unsigned barrier, unsigned arrivals);
void fence_barrier_init();
// Arrives, and announces bytes that asynchronous copies will bring.
void arrive_at(unsigned barrier, unsigned bytes);
// Waits for the end of the phase.
void wait_for(unsigned barrier, unsigned parity, Place place);

// Arrives with the whole warp at a named barrier, and waits there if asked to.
void named_barrier(const char* operation, int id, int threads, bool waits, Place place);

// ---- copies of sm_90 ----------------------------------------------------------------------------
// They land later, or read and write later. A barrier that counts their bytes, or a wait for the
// thread's groups, is what orders other accesses after them.

constexpr int MAP_RANK = 5;
void prefetch_map(const void* map);
void prefetch_box(const void* map, const int (&place)[MAP_RANK]);
void load_box(unsigned shared, const void* map, const int (&place)[MAP_RANK], unsigned barrier);
void store_box(const void* map, const int (&place)[MAP_RANK], unsigned shared);
void load_bulk(unsigned shared, const void* global, unsigned bytes, unsigned barrier);
void store_bulk(void* global, unsigned shared, unsigned bytes);
void add_bulk(float* global, unsigned shared, unsigned bytes);
void commit_bulk();
void wait_bulk(int pending, bool only_read);
// What the running thread has stored in shared memory is there for copies and products.
void fence_async_shared();

// ---- blocks and kernels side by side ------------------------------------------------------------

// Turns of blocks. Blocks run one after the other, so what one waits for has come or never comes.
void wait_for_turn(const int* counter, int turn);
// Who finds the turn passed on comes after all that the running thread knows,
void pass_turn(int* counter);
// or after nothing but its own bulk copies and additions.
void pass_turn_of_bulk(int* counter);

// From now on the running thread knows that the kernels have ended with which its own overlaps.
void wait_for_prerequisites();

// ---- warpgroups ---------------------------------------------------------------------------------

// d (64 x n) += a (64 x 16) b (16 x n), a in shared memory or in registers.
struct Product {
    float* d;
    const unsigned* a_registers;  // null: shared memory
    uint64_t a, b;                // descriptors
    int n;
    bool is_bf16, transposed_a, transposed_b, accumulate;
    const void* code = nullptr;
};
// Waits for all threads of the warpgroup.
void wgmma(Product& product, Place place);
// These wait for the warp.
void wgmma_fence(Place place);
void wgmma_commit(Place place);
void wgmma_wait(int pending, Place place);

// Waits for all threads of the warpgroup.
void set_registers(int count, bool grow, Place place);

}  // namespace host
