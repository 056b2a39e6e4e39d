// The host device: a process that holds the device's memory and runs kernels on it, one launch
// after the other. device.py talks to it through stdin and stdout: a line of text each way, with
// raw bytes behind it where the command moves data. A kernel that does something forbidden ends the
// process, with a report on stderr.
//
//   malloc BYTES                       -> ok ADDRESS
//   free ADDRESS                       -> ok
//   write ADDRESS BYTES, data, marks   -> ok        (a mark of 0: the byte counts as not written)
//   read ADDRESS BYTES                 -> ok, data
//   load FILE                          -> ok KERNEL
//   launch KERNEL SEED OVERLAPS SHARED_BYTES GRID_X GRID_Y GRID_Z BLOCK_X BLOCK_Y BLOCK_Z
//       ARGUMENTS BYTES..., data       -> ok        (OVERLAPS of 1: with the launch before it)
// A command that cannot be done is answered "error MESSAGE".
#include <dlfcn.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "block.hpp"
#include "memory.hpp"

struct Kernel {
    void (*call)(void** arguments);
    size_t (*parameter_bytes)(size_t index);
    bool takes_turns;  // a block waits for those before it
};

// A command that cannot be done. The worker goes on.
struct Refusal {
    std::string message;
};

static std::vector<Kernel> kernels;

// ---- launching ----------------------------------------------------------------------------------

static Kernel load(const std::string& file) {
    void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw Refusal{dlerror()};
    return {reinterpret_cast<void (*)(void**)>(dlsym(library, "host_call")),
            reinterpret_cast<size_t (*)(size_t)>(dlsym(library, "host_parameter_bytes")),
            dlsym(library, "host_takes_turns") != nullptr};
}

static void check_arguments(const Kernel& kernel, const std::vector<size_t>& bytes) {
    for (size_t i = 0; i <= bytes.size(); ++i) {
        const size_t given = i < bytes.size() ? bytes[i] : 0;
        const size_t taken = kernel.parameter_bytes(i);
        if (given != taken) {
            throw Refusal{"argument " + std::to_string(i) + " has " + std::to_string(given) +
                          " bytes, the kernel's parameter " + std::to_string(taken)};
        }
    }
}

static void launch(const Kernel& kernel, void** arguments, size_t shared_bytes, bool overlaps,
                   unsigned seed) {
    static Block block;
    if (shared_bytes > DeviceMemory::SHARED_BYTES) {
        throw Refusal{std::to_string(shared_bytes) +
                      " bytes of shared memory are more than a GPU has"};
    }
    const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
    if (threads == 0 || threads > 1024 || threads % host::WARP != 0) {
        throw Refusal{"a block of " + std::to_string(threads) +
                      " threads; it takes whole warps, 1024 threads at most"};
    }
    const bool empty = gridDim.x == 0 || gridDim.y == 0 || gridDim.z == 0;
    if (empty || gridDim.y > 65535 || gridDim.z > 65535) {
        throw Refusal{"a grid with an axis of 0 blocks, or more than 65,535 along y or z"};
    }
    current_launch.begin(overlaps);
    std::mt19937 random(seed);
    std::vector<unsigned> order(gridDim.x * gridDim.y * gridDim.z);
    std::iota(order.begin(), order.end(), 0u);
    if (!kernel.takes_turns) std::shuffle(order.begin(), order.end(), random);
    for (const unsigned index : order) {
        const unsigned rest = index / gridDim.x;
        blockIdx = {index % gridDim.x, rest % gridDim.y, rest / gridDim.y};
        device_memory.reset_shared(shared_bytes);
        block.run(kernel.call, arguments, random);
    }
    if (overlaps && !current_launch.has_waited) {
        host::fail("the kernel may end while the one before it still runs: no thread has called "
                   "wait_for_prerequisites");
    }
}

// ---- reports of what ends the process -----------------------------------------------------------

// UndefinedBehaviorSanitizer calls this when it has something to report.
extern "C" void __ubsan_on_report() { print_running(); }

static void on_signal(int signal, siginfo_t* info, void*) {
    if (signal == SIGALRM) {
        fprintf(stderr, "the kernel does not end: a thread waits in a loop, or runs forever\n");
    } else {
        fprintf(stderr, "%s, address %p\n", strsignal(signal), info->si_addr);
    }
    print_running();
    _exit(1);
}

static void install_signal_handlers() {
    static unsigned char stack[64 << 10];  // a thread may have run out of its own
    stack_t alternative = {};
    alternative.ss_sp = stack;
    alternative.ss_size = sizeof stack;
    sigaltstack(&alternative, nullptr);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGALRM}) {
        sigaction(signal, &action, nullptr);
    }
}

// ---- commands -----------------------------------------------------------------------------------

static void receive(void* data, size_t bytes) {
    if (!std::cin.read(static_cast<char*>(data), static_cast<std::streamsize>(bytes))) _exit(0);
}

static std::vector<char> receive(size_t bytes) {
    std::vector<char> data(bytes);
    receive(data.data(), bytes);
    return data;
}

template <class T>
static T take(std::istream& words) {
    T value;
    if (!(words >> value)) throw Refusal{"a word of the command is missing or not understood"};
    return value;
}

static unsigned char* take_address(std::istream& words) {
    return reinterpret_cast<unsigned char*>(take<uintptr_t>(words));
}

static void check_range(const unsigned char* address, size_t bytes) {
    if (!device_memory.is_allocated(address, bytes)) {
        throw Refusal{"the host accesses device memory that is not allocated"};
    }
}

static void command_launch(std::istream& words) {
    const Kernel& kernel = kernels.at(take<size_t>(words));
    const unsigned seed = take<unsigned>(words);
    const bool overlaps = take<bool>(words);
    const size_t shared_bytes = take<size_t>(words);
    for (uint3* size : {&gridDim, &blockDim}) {
        size->x = take<unsigned>(words);
        size->y = take<unsigned>(words);
        size->z = take<unsigned>(words);
    }
    std::vector<size_t> bytes(take<size_t>(words));
    for (size_t& size : bytes) size = take<size_t>(words);
    struct alignas(64) Line {  // as aligned as any parameter asks for
        char bytes[64];
    };
    std::vector<std::vector<Line>> data;
    std::vector<void*> arguments;
    for (const size_t size : bytes) {
        arguments.push_back(data.emplace_back(size / sizeof(Line) + 1).data());
        receive(arguments.back(), size);
    }
    check_arguments(kernel, bytes);
    alarm(120);
    launch(kernel, arguments.data(), shared_bytes, overlaps, seed);
    alarm(0);
}

// Does one command; returns the words and the data of the answer.
static std::string obey(const std::string& name, std::istream& words, std::string& data) {
    if (name == "malloc") {
        unsigned char* address = device_memory.allocate(take<size_t>(words));
        if (!address) throw Refusal{"out of device memory"};
        return " " + std::to_string(reinterpret_cast<uintptr_t>(address));
    }
    if (name == "free") {
        if (!device_memory.release(take_address(words))) throw Refusal{"no array starts there"};
    } else if (name == "write") {
        unsigned char* address = take_address(words);
        const size_t bytes = take<size_t>(words);
        const std::vector<char> source = receive(bytes), marks = receive(bytes);
        check_range(address, bytes);
        memcpy(address, source.data(), bytes);
        for (size_t i = 0; i < bytes; ++i) {
            if (marks[i]) device_memory.mark_written(address + i);
        }
    } else if (name == "read") {
        const unsigned char* address = take_address(words);
        const size_t bytes = take<size_t>(words);
        check_range(address, bytes);
        data.assign(reinterpret_cast<const char*>(address), bytes);
    } else if (name == "load") {
        kernels.push_back(load(take<std::string>(words)));
        return " " + std::to_string(kernels.size() - 1);
    } else if (name == "launch") {
        command_launch(words);
    } else {
        throw Refusal{"no command " + name};
    }
    return "";
}

int main() {
    std::ios::sync_with_stdio(false);
    install_signal_handlers();
    std::string line, name;
    while (std::getline(std::cin, line)) {
        std::istringstream words(line);
        words >> name;
        std::string data;
        try {
            const std::string answer = obey(name, words, data);
            std::cout << "ok" << answer << '\n' << data << std::flush;
        } catch (const Refusal& refusal) {
            std::cout << "error " << refusal.message << '\n' << std::flush;
        }
    }
}
