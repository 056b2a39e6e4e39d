// How kernels reach the device's memory: what they call, and what the compiler calls for them.
#include <cstring>
#include <utility>

#include "block.hpp"
#include "memory.hpp"
#include "runtime.hpp"

namespace host {

void check_aligned(const void* address, size_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
        fail("address %p is not aligned to the %zu bytes of the access", address, bytes);
    }
}

static void check_device(const void* address) {
    if (!device_memory.contains(address)) fail("address %p is not device memory", address);
}

void check_warp_read(const void* address, size_t bytes) {
    check_aligned(address, bytes);
    device_memory.check(address, bytes, Access::READ, ~0u, running_block->running().code);
}

void check_lane_write(const void* address, size_t bytes, int lane) {
    device_memory.check(address, bytes, Access::WRITE, 1u << lane, running_block->running().code);
}

unsigned char* shared_memory() { return device_memory.shared(); }

unsigned char* shared_pointer(unsigned address) {
    const unsigned offset = address - DeviceMemory::SHARED_START;
    if (offset >= DeviceMemory::SHARED_BYTES) {
        fail("%u is not an address in shared memory", address);
    }
    return device_memory.shared() + offset;
}

unsigned shared_address(const void* pointer) {
    const auto* byte = static_cast<const unsigned char*>(pointer);
    const auto* start = device_memory.shared();
    if (byte < start || byte > start + DeviceMemory::SHARED_BYTES) {
        fail("pointer %p does not point to shared memory", pointer);
    }
    return static_cast<unsigned>(byte - start) + DeviceMemory::SHARED_START;
}

template <class T>
T atomic_add(T* address, T value) {
    check_device(address);
    check_aligned(address, sizeof(T));
    const void* code = __builtin_return_address(0);
    device_memory.check(address, sizeof(T), Access::ATOMIC, 1u << lane(), code);
    const T before = *address;
    *address = before + value;
    return before;
}

template int atomic_add(int*, int);
template unsigned atomic_add(unsigned*, unsigned);
template unsigned long long atomic_add(unsigned long long*, unsigned long long);
template float atomic_add(float*, float);
template double atomic_add(double*, double);

// ---- asynchronous copies ------------------------------------------------------------------------

void issue_copy(unsigned shared, const void* global, int bytes, int valid_bytes) {
    const void* code = __builtin_return_address(0);
    const uint32_t self = 1u << lane();
    unsigned char* target = shared_pointer(shared);
    check_aligned(target, bytes);
    check_aligned(global, bytes);
    if (valid_bytes < 0 || valid_bytes > bytes) {
        fail("asynchronous copy of %d bytes, of which %d are valid", bytes, valid_bytes);
    }
    device_memory.check(target, bytes, Access::WRITE, self, code);
    if (valid_bytes > 0) {
        check_device(global);
        device_memory.check(global, valid_bytes, Access::READ, self, code);
    }
    // The source is read at any time before the wait. Both ends of that time are tried.
    Thread& thread = running_block->running();
    AsyncCopy copy{target, static_cast<const unsigned char*>(global), bytes, valid_bytes,
                   running_block->flip_coin(), {}};
    if (!copy.late) memcpy(copy.data, copy.global, valid_bytes);
    memset(target, POISON, bytes);
    device_memory.set_in_flight(target, bytes, true);
    thread.open_copies.push_back(copy);
}

void commit_copies() {
    Thread& thread = running_block->running();
    thread.copy_groups.push_back(std::move(thread.open_copies));
    thread.open_copies.clear();
}

void wait_copies(int pending) {
    const void* code = __builtin_return_address(0);
    const uint32_t self = 1u << lane();
    Thread& thread = running_block->running();
    while (static_cast<int>(thread.copy_groups.size()) > pending) {
        for (AsyncCopy& copy : thread.copy_groups.front()) {
            device_memory.check(copy.global, copy.valid_bytes, Access::READ, self, code);
            if (copy.late) memcpy(copy.data, copy.global, copy.valid_bytes);
            memcpy(copy.shared, copy.data, copy.bytes);
            device_memory.set_in_flight(copy.shared, copy.bytes, false);
            device_memory.check(copy.shared, copy.bytes, Access::WRITE, self, code);
        }
        thread.copy_groups.pop_front();
    }
}

}  // namespace host

// ---- what the compiler puts in front of loads and stores ----------------------------------------

static inline void check_plain(const void* address, size_t bytes, Access access, const void* code) {
    if (!device_memory.contains(address)) return;  // registers and constants
    device_memory.check(address, bytes, access, 1u << host::lane(), code);
}

#define CHECKED(NAME, BYTES, ACCESS)                                                   \
    extern "C" void __tsan_##NAME(void* address) {                                     \
        check_plain(address, BYTES, Access::ACCESS, __builtin_return_address(0));      \
    }

#define CHECKED_SIZE(BYTES)                         \
    CHECKED(read##BYTES, BYTES, READ)               \
    CHECKED(write##BYTES, BYTES, WRITE)             \
    CHECKED(unaligned_read##BYTES, BYTES, READ)     \
    CHECKED(unaligned_write##BYTES, BYTES, WRITE)

CHECKED_SIZE(1)
CHECKED_SIZE(2)
CHECKED_SIZE(4)
CHECKED_SIZE(8)
CHECKED_SIZE(16)

extern "C" void __tsan_read_range(void* address, size_t bytes) {
    check_plain(address, bytes, Access::READ, __builtin_return_address(0));
}

extern "C" void __tsan_write_range(void* address, size_t bytes) {
    check_plain(address, bytes, Access::WRITE, __builtin_return_address(0));
}

// Calls that stand for the assignment of large structs.
extern "C" void* __wrap_memcpy(void* target, const void* source, size_t bytes) {
    check_plain(source, bytes, Access::READ, __builtin_return_address(0));
    check_plain(target, bytes, Access::WRITE, __builtin_return_address(0));
    return memcpy(target, source, bytes);
}

extern "C" void* __wrap_memset(void* target, int value, size_t bytes) {
    check_plain(target, bytes, Access::WRITE, __builtin_return_address(0));
    return memset(target, value, bytes);
}

extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit(void*) {}
