// Threads, blocks, and who runs next. Blocks of one cluster run together; clusters run one after the other.
//
// This header and those that include it are parts of runtime.cpp.
#pragma once
#include "emulator.h"
#include "fiber.h"
#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <stdarg.h>
#include <stdexcept>
#include <stdio.h>
#include <string.h>
#include <string>
#include <vector>

namespace emu {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxCluster = 16;

// For each block of the cluster: what its threads did before they had passed so many of its barriers is known to be over.
using Known = std::array<uint32_t, kMaxCluster>;

inline void learn(Known& known, const Known& more) {
  for (unsigned b = 0; b < kMaxCluster; b++) known[b] = std::max(known[b], more[b]);
}

enum class Wait { kNothing, kBlockBarrier, kClusterBarrier, kWarp, kMbarrier, kExited };

struct Thread {
  Fiber fiber;
  unsigned index;  // in the cluster
  unsigned block;  // in the cluster
  Dim3 thread_index;
  Dim3 block_index;
  Wait wait;
  Site site;  // of the wait
  const uint64_t* mbarrier;
  bool begun;        // has waited for earlier kernels
  bool arrived;      // at the cluster's barrier, and has not waited yet
  bool met_cluster;  // all threads of the cluster are known to have started
  Known known;
};

// A point that a group of threads leaves only together.
struct Rendezvous {
  Site site;
  std::vector<unsigned> arrived;
};

struct Warp {
  Rendezvous rendezvous;
  // Two turns, because a lane may be at the next exchange before another has read the last.
  uint64_t values[2][kWarp];
  unsigned turn[kWarp];
};

struct SharedArray {
  unsigned char* begin;
  size_t bytes;
};

struct Block {
  Rendezvous rendezvous;
  unsigned running;
  uint32_t epoch;  // barriers passed
  Known coming, known_to_all;  // of the threads that arrived at the next barrier, of all by the last
  SharedArray dynamic;
  std::map<const void*, SharedArray> arrays;
  bool mbarrier_unfenced;
};

// To the shared memory of a block, under way: a bulk copy from `from`, or a message.
struct Transfer {
  unsigned char* to;
  const void* from;
  unsigned bytes;
  uint64_t* mbarrier;
  std::vector<unsigned char> message;
  Known known;  // to its sender
};

// One of it: threads of the operating system would gain nothing that processes do not.
struct Machine {
  LaunchShape shape;
  void (*body)(void*);
  void* argument;
  Fiber launcher;
  std::vector<char*> stacks;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<Block> blocks;
  unsigned cluster_arrivals;
  uint32_t cluster_number;  // over all launches, for the race detector
  std::deque<unsigned> runnable;
  std::vector<Transfer> transfers;
  std::map<const uint64_t*, Known> delivered;  // with the messages that completed on an mbarrier
  Thread* current;
  unsigned running;
  uint64_t seed;
  uint64_t random_state;
  std::string error;
};
inline Machine machine;

inline uint64_t random_below(uint64_t bound) {
  uint64_t& x = machine.random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return (x >> 16) % bound;
}

inline std::string place(const Site& site) {
  const char* slash = strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

inline std::string name(const Thread& thread) {
  return "block " + std::to_string(thread.block_index.x) + " thread " + std::to_string(thread.thread_index.x);
}

[[noreturn]] inline void end_launch(const std::string& error) {
  Thread* thread = machine.current;
  machine.error = error;
  machine.current = nullptr;
  switch_fiber(thread->fiber, machine.launcher, true);
  abort();
}

void fail(Site site, const char* format, ...) {
  char message[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  end_launch(std::string(message) + " (" + name(*machine.current) + ", " + place(site) + ")");
}

inline void wake(unsigned thread) {
  machine.threads[thread].wait = Wait::kNothing;
  machine.runnable.push_back(thread);
}

inline void complete_transfer(size_t which);

inline Thread* next_thread() {
  auto& runnable = machine.runnable;
  while (!machine.transfers.empty() && (runnable.empty() || (machine.seed != 0 && random_below(64) == 0))) {
    complete_transfer(machine.seed ? random_below(machine.transfers.size()) : 0);
  }
  if (runnable.empty()) return nullptr;
  unsigned chosen;
  if (machine.seed == 0) {
    chosen = runnable.front();
    runnable.pop_front();
  } else {
    // Random choices keep warps in step, so that a missing barrier may never show. Half of the seeds run the last
    // woken thread first: then one warp is as far ahead as the barriers let it be.
    if (machine.seed % 2 == 0) std::swap(runnable[random_below(runnable.size())], runnable.back());
    chosen = runnable.back();
    runnable.pop_back();
  }
  return &machine.threads[chosen];
}

inline std::string describe_deadlock() {
  static const char* const kWaits[] = {"running", "at sync_block", "at cluster_wait", "at a shuffle",
                                       "waiting for an mbarrier", "exited"};
  std::map<std::string, unsigned> groups;
  for (const Thread& thread : machine.threads) {
    std::string group = "block " + std::to_string(thread.block_index.x) + " ";
    group += kWaits[static_cast<int>(thread.wait)];
    if (thread.wait != Wait::kExited) group += ", " + place(thread.site);
    groups[group]++;
  }
  std::string text = "deadlock:";
  for (const auto& [group, count] : groups) text += "\n  " + std::to_string(count) + " threads of " + group;
  return text;
}

// Leaves the calling thread for the next one, or for the launcher when none is left.
inline void yield(bool ends = false) {
  Thread* self = machine.current;
  Thread* next = next_thread();
  if (next == self) return;
  if (!next && machine.running != 0) end_launch(describe_deadlock());
  machine.current = next;
  switch_fiber(self->fiber, next ? next->fiber : machine.launcher, ends);
}

// True when the caller was the last of `group` threads and has woken the others.
inline bool arrive(Rendezvous& rendezvous, unsigned group, Wait wait, const Site& site) {
  Thread& self = *machine.current;
  if (rendezvous.arrived.empty()) {
    rendezvous.site = site;
  } else if (rendezvous.site.line() != site.line() || strcmp(rendezvous.site.file_name(), site.file_name()) != 0) {
    fail(site, "threads meet at different places of the source: here and at %s", place(rendezvous.site).c_str());
  }
  self.wait = wait;
  self.site = site;
  rendezvous.arrived.push_back(self.index);
  if (rendezvous.arrived.size() < group) return false;
  for (unsigned thread : rendezvous.arrived) wake(thread);
  rendezvous.arrived.clear();
  return true;
}

// Threads that have returned do not count as arrived: on a GPU that is undefined.
void sync_block(Site site) {
  Block& block = machine.blocks[machine.current->block];
  learn(block.coming, machine.current->known);
  if (arrive(block.rendezvous, machine.shape.block, Wait::kBlockBarrier, site)) {
    block.epoch++;
    block.known_to_all = block.coming;
  }
  yield();
}

uint64_t exchange(uint64_t value, unsigned source_lane, Site site) {
  Warp& warp = machine.warps[machine.current->index / kWarp];
  unsigned lane = machine.current->index % kWarp;
  if (source_lane >= kWarp) fail(site, "a shuffle from lane %u", source_lane);
  unsigned turn = warp.turn[lane]++ % 2;
  warp.values[turn][lane] = value;
  arrive(warp.rendezvous, kWarp, Wait::kWarp, site);
  yield();
  return warp.values[turn][source_lane];
}

}  // namespace emu
