// A fiber: a stack of its own, and a switch to it that saves only what a function call would.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__)

// void switch_stack(void** saved_pointer, void* next_pointer): pushes the registers that a callee
// must preserve, stores the stack pointer, takes the next one and pops the same registers from
// there.
extern "C" void switch_stack(void** saved_pointer, void* next_pointer);
asm(R"(
    .text
    .p2align 4
    .type switch_stack, @function
switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size switch_stack, . - switch_stack
)");

#else
#include <ucontext.h>
#endif

class Fiber {
public:
    Fiber() = default;
    Fiber(const Fiber&) = delete;
    Fiber& operator=(const Fiber&) = delete;

    ~Fiber() {
        if (stack_) munmap(stack_, STACK_BYTES);
    }

    // The next switch to this fiber calls `entry`, which never returns.
    void start(void (*entry)()) {
        if (!stack_) stack_ = allocate_stack();
#if defined(__x86_64__)
        void** top = reinterpret_cast<void**>(stack_ + STACK_BYTES);
        *--top = nullptr;  // the return address of `entry`: none. Aligns the stack as a call does
        *--top = reinterpret_cast<void*>(entry);
        for (int callee_saved = 0; callee_saved < 6; ++callee_saved) *--top = nullptr;
        pointer_ = top;
#else
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack_;
        context_.uc_stack.ss_size = STACK_BYTES;
        context_.uc_link = nullptr;
        makecontext(&context_, entry, 0);
#endif
    }

    static void switch_between(Fiber& from, Fiber& to) {
#if defined(__x86_64__)
        switch_stack(&from.pointer_, to.pointer_);
#else
        swapcontext(&from.context_, &to.context_);
#endif
    }

private:
    static constexpr size_t STACK_BYTES = 512 << 10;  // only touched pages cost memory

    static unsigned char* allocate_stack() {
        void* stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) {
            perror("no memory for a thread's stack");
            abort();
        }
        mprotect(stack, sysconf(_SC_PAGESIZE), PROT_NONE);  // stops an overflow
        return static_cast<unsigned char*>(stack);
    }

    unsigned char* stack_ = nullptr;
#if defined(__x86_64__)
    void* pointer_ = nullptr;
#else
    ucontext_t context_;
#endif
};
