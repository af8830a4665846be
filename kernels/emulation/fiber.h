// A fiber: a stack of its own, and the switch from one stack to another. Nothing here knows of CUDA.
#pragma once
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if !(defined(__x86_64__) && defined(__linux__)) && !defined(EMULATE_UCONTEXT)
#define EMULATE_UCONTEXT
#endif
#ifdef EMULATE_UCONTEXT
#include <ucontext.h>
#else
// Saves what the System V ABI lets a callee keep, and returns on the other stack. swapcontext does the same with two
// system calls, at four times the cost.
extern "C" void emulation_switch_stack(void** save, void* load);
asm(R"(
    .text
    .type emulation_switch_stack, @function
emulation_switch_stack:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret
    .size emulation_switch_stack, . - emulation_switch_stack
)");
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
// Copies every frame to the heap when on, at twenty times the cost.
extern "C" const char* __asan_default_options() { return "detect_stack_use_after_return=0:detect_leaks=0"; }
#endif

namespace emu {

constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
#ifdef EMULATE_UCONTEXT
  ucontext_t context;
#else
  void* stack_pointer = nullptr;
#endif
  // Null for the stack the program started on, until AddressSanitizer has told what it is.
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

inline Fiber* switched_from = nullptr;

// Must be called first thing on the stack that was switched to.
inline void landed([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, &switched_from->stack, &switched_from->stack_bytes);
#endif
}

inline void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool from_ends = false) {
  void* fake_stack = nullptr;
  switched_from = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef EMULATE_UCONTEXT
  swapcontext(&from.context, &to.context);
#else
  emulation_switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
  landed(fake_stack);
}

// A stack with an inaccessible page below it.
inline char* new_stack() {
  size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) abort();
  return static_cast<char*>(memory) + page;
}

// The next switch to the fiber calls entry, which must call landed(nullptr) first and never return.
inline void prepare(Fiber& fiber, char* stack, void (*entry)()) {
  fiber.stack = stack;
  fiber.stack_bytes = kStackBytes;
#ifdef EMULATE_UCONTEXT
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#else
  constexpr int kSavedRegisters = 6;
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // A return address for entry: with it the stack is aligned as after a call.
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < kSavedRegisters; i++) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

// A stack given up in the middle of a function leaves AddressSanitizer's marks behind.
inline void clear_marks([[maybe_unused]] char* stack) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
}

}  // namespace emu
