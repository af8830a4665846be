// A CUDA driver on the CPU, as much of it as candle and this crate use: what its parts know of each other.
//
// Memory is the host's, between pages that nobody may touch; it begins as NaN, and is gone once it is freed. Streams do
// what they are told at once. A kernel of this crate runs by the emulation, one of candle's by its twin in candle.cpp. Threads
// of the host take turns: a lock is held in all that touches memory or runs a kernel.
#pragma once
#include "../emulator.h"
#include <functional>
#include <mutex>
#include <stdint.h>
#include <string>

namespace gpu {

// What a kernel is started with: arguments as the driver gets them, a pointer to each.
struct Launch {
  std::string symbol;
  emu::LaunchShape shape;
  void** arguments;

  template <class T> T argument(int i) const { return *static_cast<T*>(arguments[i]); }
};

// Does the work now, or notes it in the graph that is being captured.
void submit(std::function<void()> work);
// The same of work that waits for other threads, which it does without the lock.
void submit_unlocked(std::function<void()> work);
std::unique_lock<std::recursive_mutex> hold();

// What a kernel does, its arguments copied, or nothing where no kernel has the symbol.
std::function<void()> kernel_of_candle(const Launch& launch);

// Ends the program with a message: what a GPU would refuse, or do wrong without a word.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Fails unless all of these bytes are in one allocation.
void check_memory(const void* begin, size_t bytes, const char* what);

}  // namespace gpu
