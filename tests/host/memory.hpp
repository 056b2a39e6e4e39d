// The device's memory, global and shared, with a shadow that knows of every byte whether it is
// allocated, whether it was written, whether an asynchronous copy is on its way to it, and who has
// accessed it since. So it reports accesses out of bounds, reads of what nothing wrote, missing
// waits and fences and races, whatever the order in which the threads happened to run.
//
// Kernels are compiled with -fsanitize=thread, which makes the compiler call __tsan_read4(address)
// and the like before each load and store. The functions behind those names are in access.cpp.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "clocks.hpp"

enum class Access : uint8_t { READ, WRITE, ATOMIC };

const char* name_of(Access access);

// One access, or several alike by lanes of one warp, to some bytes of a chunk.
struct Trace {
    const void* code;  // return address: where in the kernel
    uint32_t block;    // serial number of the block since the worker started
    uint32_t clock;    // the actors' own clock
    uint32_t lanes;    // bit mask
    uint16_t warp;     // 32 actors
    uint16_t bytes;    // bit mask, one bit a byte of the chunk
    Access access;
};

// The shadow of 16 bytes. Bit i of a mask stands for byte i.
struct Chunk {
    uint16_t allocated = 0;
    uint16_t written = 0;
    uint16_t in_flight = 0;  // an asynchronous copy will land here
    uint16_t barrier = 0;    // an mbarrier lives here
    uint32_t launch = 0;     // that has left the traces
    // What kernels have done with it that may still run beside this launch.
    uint16_t read_before = 0;
    uint16_t written_before = 0;
    std::vector<Trace> traces;

    void enter_launch();
};

class DeviceMemory {
public:
    static constexpr size_t SHARED_BYTES = 227 << 10;  // the most a block can have on any GPU
    // The 32-bit address where a block's own shared memory starts: as on a GPU not 0, and aligned
    // to no more than 128 bytes.
    static constexpr unsigned SHARED_START = 1024 + 128;

    DeviceMemory();

    unsigned char* allocate(size_t bytes);  // null if there is no room
    bool release(unsigned char* address);   // false if nothing is allocated there
    bool is_allocated(const unsigned char* address, size_t bytes) const;
    void mark_written(unsigned char* byte);

    // A new block's shared memory: `bytes` bytes that nothing has written.
    void reset_shared(size_t bytes);
    unsigned char* shared() const { return base_ + GUARD_BYTES + SHARED_START; }

    bool contains(const void* address) const {
        return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(base_) < SPACE;
    }

    // Reports a forbidden access of the running thread's `lanes`, or notes an allowed one.
    void check(const void* address, size_t bytes, Access access, uint32_t lanes, const void* code);
    void check(const void* address, size_t bytes, Access access, const Actor& actor,
               const void* code);

    void set_barrier(unsigned char* address, size_t bytes);
    void set_in_flight(unsigned char* address, size_t bytes, bool in_flight);

private:
    static constexpr size_t SPACE = size_t{4} << 30;  // only touched pages cost memory
    static constexpr size_t GUARD_BYTES = 64 << 10;   // unallocated, on both sides of everything
    static constexpr size_t CHUNK_BYTES = 16;

    struct Allocation {
        size_t bytes;
        bool live;
    };

    unsigned char* first_free() const { return base_ + GUARD_BYTES + (256 << 10) + GUARD_BYTES; }
    Chunk& chunk_at(const unsigned char* address) const {
        return chunks_[(address - base_) / CHUNK_BYTES];
    }
    template <class Visit>
    void for_each_chunk(const unsigned char* address, size_t bytes, Visit visit) const;
    void set_allocated(unsigned char* address, size_t bytes, bool allocated);
    bool is_shared(const void* address) const {
        return static_cast<const unsigned char*>(address) - shared() < long{SHARED_BYTES};
    }
    void check_prerequisites(const Chunk& chunk, uint16_t bytes, Access access, const Actor& actor,
                             const void* address) const;
    void trace(Chunk& chunk, uint16_t bytes, Access access, const Actor& actor, const void* code,
               const void* address);
    std::string describe(const void* address) const;

    unsigned char* base_;
    Chunk* chunks_;
    unsigned char* free_;  // addresses are not used again, so that use after free shows
    size_t shared_bytes_ = 0;
    size_t live_ = 0;
    std::map<unsigned char*, Allocation> allocations_;
};

extern DeviceMemory device_memory;

constexpr int POISON = 0xFF;  // fills what nothing has written: a NaN in every float type
