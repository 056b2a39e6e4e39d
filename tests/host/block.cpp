#include "block.hpp"

#include <dlfcn.h>
#include <execinfo.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

#include "async.hpp"
#include "memory.hpp"

uint3 threadIdx, blockIdx, blockDim, gridDim;

Block* running_block = nullptr;
CurrentLaunch current_launch;

// ---- reports ------------------------------------------------------------------------------------

std::string code_place(const void* return_address) {
    // The call itself lies before the address it returns to.
    const auto* call = static_cast<const char*>(return_address) - 1;
    Dl_info info;
    if (!dladdr(call, &info)) return "[unknown code]";
    char offset[32];
    snprintf(offset, sizeof offset, "+0x%zx]", call - static_cast<const char*>(info.dli_fbase));
    return "[" + std::string(info.dli_fname) + offset;
}

void print_running() {
    if (!running_block) return;
    fprintf(stderr, "in block (%u, %u, %u), thread (%u, %u, %u)\n", blockIdx.x, blockIdx.y,
            blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    void* calls[64];
    const int depth = backtrace(calls, 64);
    for (int i = 0; i < depth; ++i) {
        const std::string place = code_place(calls[i]);
        const bool in_system_library = place.find("/lib", place.rfind('/')) != std::string::npos;
        if (place.find(".so+") != std::string::npos && !in_system_library) {
            fprintf(stderr, "    %s\n", place.c_str());
        }
    }
}

void host::fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vfprintf(stderr, format, values);
    va_end(values);
    fprintf(stderr, "\n");
    print_running();
    fflush(stderr);
    _exit(1);
}

// "threads 0-31, 64", from indices in ascending order.
static std::string ranges(const std::vector<int>& threads) {
    std::string text = threads.size() == 1 ? "thread" : "threads";
    for (size_t i = 0; i < threads.size();) {
        size_t end = i + 1;
        while (end < threads.size() && threads[end] == threads[end - 1] + 1) ++end;
        text += (i ? ", " : " ") + std::to_string(threads[i]);
        if (end - i > 1) text += "-" + std::to_string(threads[end - 1]);
        i = end;
    }
    return text;
}

static std::string doing(const Thread& thread) {
    if (thread.state == Thread::EXITED) return "exited";
    if (thread.state == Thread::READY) return "running";
    char text[512];
    if (thread.mask == 0) {
        const std::string what = thread.what ? thread.what() : "";
        snprintf(text, sizeof text, "at %s%s, %s:%d", thread.operation, what.c_str(),
                 thread.place.file, thread.place.line);
    } else {
        snprintf(text, sizeof text, "at %s with mask 0x%08x, %s:%d", thread.operation, thread.mask,
                 thread.place.file, thread.place.line);
    }
    return text;
}

std::string Block::who_does_what() const {
    std::map<std::string, std::vector<int>> groups;
    for (int i = 0; i < count_; ++i) groups[doing(*threads_[i])].push_back(i);
    std::string text;
    for (const auto& [what, threads] : groups) text += "\n    " + ranges(threads) + ": " + what;
    return text;
}

// ---- scheduling ---------------------------------------------------------------------------------

void Block::run(void (*entry)(void**), void** arguments, std::mt19937& random) {
    entry_ = entry;
    arguments_ = arguments;
    random_ = &random;
    serial_ += 1;
    prepare(static_cast<int>(blockDim.x * blockDim.y * blockDim.z));
    running_block = this;
    Thread* first = take_ready();
    switch_to(first, main_);
    running_block = nullptr;
}

void Block::prepare(int count) {
    count_ = count;
    exited_ = 0;
    time_ = all_know_ = 1;
    unit_names_.clear();
    prerequisites_ = new_unit("the kernel before");
    asynchronous.reset();
    const auto nothing = std::make_shared<Knowledge>();
    nothing->done.assign(count, 1);
    ready_.clear();
    at_barrier_.clear();
    votes_ = 0;
    waiting_lanes_.assign(count / host::WARP, 0);
    warpgroups_.assign((count + host::WARPGROUP - 1) / host::WARPGROUP, {});
    while (static_cast<int>(threads_.size()) < count) {
        threads_.push_back(std::make_unique<Thread>());
    }
    for (int i = 0; i < count; ++i) {
        Thread& thread = *threads_[i];
        thread.index = i;
        const unsigned rest = static_cast<unsigned>(i) / blockDim.x;
        thread.position = {i % blockDim.x, rest % blockDim.y, rest / blockDim.y};
        thread.state = Thread::READY;
        thread.clock = 1;
        thread.fenced = 0;
        thread.known = nothing;
        thread.open_copies.clear();
        thread.copy_groups.clear();
        thread.bulk_reader = thread.bulk_writer = -1;
        thread.bulk_latest = 0;
        thread.bulk_groups.clear();
        thread.accumulators.clear();
        thread.registers.clear();
        thread.product_group = thread.product_latest = 0;
        thread.product_fence = false;
        thread.product_clocks.clear();
        thread.fiber.start(thread_main);
        ready_.push_back(&thread);
    }
}

void Block::thread_main() {
    running_block->entry_(running_block->arguments_);
    running_block->exit_running();
}

Thread* Block::take_ready() {
    const size_t chosen = (*random_)() % ready_.size();
    Thread* thread = ready_[chosen];
    ready_[chosen] = ready_.back();
    ready_.pop_back();
    return thread;
}

void Block::switch_to(Thread* next, Fiber& from) {
    running_ = next;
    threadIdx = next->position;
    Fiber::switch_between(from, next->fiber);
}

// Another thread runs on. The calling one continues when somebody has put it among the ready. In
// between, copies land: any that is on its way may be the next thing to happen.
void Block::give_way() {
    while (size_t landing = asynchronous.landing()) {
        const size_t chosen = (*random_)() % (ready_.size() + landing);
        if (chosen >= landing) break;
        asynchronous.land(chosen);
    }
    if (ready_.empty()) {
        host::fail("deadlock: no thread of the block can go on%s", who_does_what().c_str());
    }
    Thread* self = running_;
    Thread* next = take_ready();
    if (next != self) switch_to(next, self->fiber);
}

void Block::exit_running() {
    asynchronous.check_exit(*running_);
    running_->state = Thread::EXITED;
    exited_ += 1;
    if (!at_barrier_.empty()) {
        host::fail("divergence: a thread exits while others wait for it%s",
                   who_does_what().c_str());
    }
    if (exited_ == count_) {
        asynchronous.check_end();
        Fiber::switch_between(running_->fiber, main_);
    }
    give_way();
}

void Block::release(const std::vector<Thread*>& waiting) {
    for (Thread* thread : waiting) {
        thread->state = Thread::READY;
        ready_.push_back(thread);
    }
}

// ---- barriers and collectives -------------------------------------------------------------------

void Block::begin_waiting(const char* operation, unsigned mask, host::Place place, void* operands,
                          const void* code) {
    Thread& self = *running_;
    self.state = Thread::WAITING;
    self.operation = operation;
    self.mask = mask;
    self.place = place;
    self.operands = operands;
    self.code = code;
    self.what = nullptr;
}

static bool same_call(const Thread& a, const Thread& b) {
    // One kernel's equal names are one string each.
    return a.mask == b.mask && a.place.line == b.place.line && a.operation == b.operation &&
           a.place.file == b.place.file;
}

int Block::wait_for_block(const char* operation, bool predicate, host::Place place) {
    begin_waiting(operation, 0, place, nullptr, nullptr);
    votes_ += predicate;
    at_barrier_.push_back(running_);
    if (exited_ > 0 || !same_call(*running_, *at_barrier_.front())) {
        host::fail("divergence: %s is not reached by all threads of the block%s", operation,
                   who_does_what().c_str());
    }
    if (static_cast<int>(at_barrier_.size()) == count_) {
        std::vector<Thread*> all = std::move(at_barrier_);
        at_barrier_.clear();
        for (Thread* thread : all) thread->votes = votes_;
        votes_ = 0;
        order_memory(all);
        release(all);
    }
    Thread& self = *running_;
    give_way();
    return self.votes;
}

void Block::wait_for_warp(const char* operation, unsigned mask, host::Place place, void* operands,
                          void (*compute)(void* const lanes[host::WARP]), bool orders_memory,
                          const void* code) {
    begin_waiting(operation, mask, place, operands, code);
    Thread& self = *running_;
    const int own_lane = self.index % host::WARP;
    const int first = self.index - own_lane;
    if (!(mask >> own_lane & 1)) {
        host::fail("%s: mask 0x%08x does not name lane %d, which calls it", operation, mask,
                   own_lane);
    }
    unsigned& waiting = waiting_lanes_[first / host::WARP];
    waiting |= 1u << own_lane;
    // A lane compares itself with one that waits for it, and the last to come with all.
    bool complete = (waiting & mask) == mask;
    void* lanes[host::WARP] = {};
    std::vector<Thread*>& present = present_;
    present.clear();
    for (unsigned rest = mask; rest; rest &= rest - 1) {
        const int i = __builtin_ctz(rest);
        Thread& other = *threads_[first + i];
        const bool waits_for_self = other.state == Thread::WAITING && (other.mask >> own_lane & 1);
        if (other.state == Thread::EXITED || (waits_for_self && !same_call(self, other))) {
            host::fail("divergence: the lanes of a warp do not reach the same %s%s", operation,
                       who_does_what().c_str());
        }
        complete &= waits_for_self;
        if (!complete && waits_for_self && i != own_lane) break;
        lanes[i] = other.operands;
        present.push_back(&other);
    }
    if (complete) {
        compute(lanes);
        if (orders_memory) order_memory(present);
        release(present);
        waiting &= ~mask;
    }
    give_way();
}

void Block::wait_for_warpgroup(const char* operation, host::Place place, void* operands,
                               void (*compute)(Thread* const threads[host::WARPGROUP])) {
    begin_waiting(operation, 0, place, operands, nullptr);
    std::vector<Thread*>& waiting = warpgroups_[running_->index / host::WARPGROUP];
    waiting.push_back(running_);
    if (!same_call(*running_, *waiting.front())) {
        host::fail("divergence: the threads of a warpgroup do not reach the same %s%s", operation,
                   who_does_what().c_str());
    }
    if (waiting.size() == host::WARPGROUP) {
        std::sort(waiting.begin(), waiting.end(),
                  [](const Thread* a, const Thread* b) { return a->index < b->index; });
        compute(waiting.data());
        release(waiting);
        waiting.clear();
    }
    give_way();
}

void Block::wait_for_phase(const std::shared_ptr<Phase>& phase, const char* operation,
                           host::Place place, std::function<std::string()> what) {
    if (!phase->complete) {
        begin_waiting(operation, 0, place, nullptr, nullptr);
        running_->what = std::move(what);
        phase->waiting.push_back(running_);
        give_way();
    }
    learn(*running_, phase->released);
}

void Block::complete(Phase& phase) {
    phase.complete = true;
    release(phase.waiting);
    phase.waiting.clear();
}

// ---- what kernels call --------------------------------------------------------------------------

namespace host {

int lane() { return running_block->running().index % WARP; }

int block_barrier(const char* operation, bool predicate, Place place) {
    return running_block->wait_for_block(operation, predicate, place);
}

void warp_collective(const char* operation, unsigned mask, Place place, void* operands,
                     void (*compute)(void* const lanes[WARP])) {
    running_block->wait_for_warp(operation, mask, place, operands, compute, false,
                                 __builtin_return_address(0));
}

void warp_barrier(unsigned mask, Place place) {
    running_block->wait_for_warp("__syncwarp", mask, place, nullptr, [](void* const*) {}, true,
                                 __builtin_return_address(0));
}

void wait_for_prerequisites() { running_block->wait_for_prerequisites(); }

}  // namespace host
