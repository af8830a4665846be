// Race detector: two accesses of one place, one of them a write, by threads that no barrier orders.
//
// The kernels are compiled with -fsanitize=thread, whose calls at every access end here instead of in libtsan, which
// knows nothing of fibers and barriers. Every watched place remembers its last writer and two readers, each with the
// barriers its thread had passed.
#pragma once
#include "scheduler.h"
#include <stdlib.h>

namespace emu {
#ifdef EMULATE_RACES

struct Access {
  uint32_t cluster_number = 0;  // 0: none
  uint32_t thread = 0;
  uint32_t epoch = 0;  // of its block
};

struct Place {
  Access writer;
  Access last_reader;
  Access other_reader;
};

// The smallest type the kernels access.
constexpr size_t kPlaceBytes = 2;

struct Watched {
  unsigned char* begin;
  size_t bytes;
  std::string name;
  bool global;
  std::vector<Place> places;
};
inline std::vector<Watched> watched;
inline Watched* last_found = nullptr;

inline void watch(void* begin, size_t bytes, std::string name, bool global) {
  std::vector<Place> places((bytes + kPlaceBytes - 1) / kPlaceBytes + 1);
  watched.push_back({static_cast<unsigned char*>(begin), bytes, std::move(name), global, std::move(places)});
  last_found = nullptr;
}

inline void forget_shared_memory() {
  std::erase_if(watched, [](const Watched& memory) { return !memory.global; });
  last_found = nullptr;
}

void unwatch_all() {
  watched.clear();
  last_found = nullptr;
}

void watch_global(void* begin, size_t bytes, const char* name) { watch(begin, bytes, name, true); }

inline bool within(const Watched& memory, const void* address) {
  return static_cast<size_t>(static_cast<const unsigned char*>(address) - memory.begin) < memory.bytes;
}

inline Watched* find_watched(const void* address) {
  if (last_found && within(*last_found, address)) return last_found;
  for (Watched& memory : watched) {
    if (within(memory, address)) return last_found = &memory;
  }
  return nullptr;
}

inline bool same_block(const Access& a, const Access& b) {
  return a.cluster_number == b.cluster_number && a.thread / machine.shape.block == b.thread / machine.shape.block;
}

// Blocks of different clusters are never ordered within a launch.
inline bool ordered(const Access& earlier, bool wrote, const Access& now) {
  if (earlier.cluster_number == 0) return true;
  if (earlier.cluster_number != now.cluster_number) return false;
  if (earlier.thread == now.thread) return true;
  if (same_block(earlier, now)) return earlier.epoch < now.epoch;
  if (wrote) return false;  // stores are not over when a later message arrives
  const Thread& self = machine.threads[now.thread];
  const unsigned other = earlier.thread / machine.shape.block;
  return earlier.epoch < std::max(self.known[other], machine.blocks[self.block].known_to_all[other]);
}

[[noreturn]] inline void report_race(const Watched& memory, const void* address, const char* what, const char* before,
                                     const Access& access) {
  std::string text = "race in " + memory.name + ", byte ";
  text += std::to_string(static_cast<const unsigned char*>(address) - memory.begin) + ": " + what + " by ";
  text += name(*machine.current) + " against a " + before + " by ";
  if (access.cluster_number == machine.cluster_number) {
    text += name(machine.threads[access.thread]);
  } else {
    text += "another block";
  }
  end_launch(text + " that nothing orders before it");
}

inline void record(Place& place, const Access& now, bool write, const Watched& memory, const void* address) {
  const char* what = write ? "write" : "read";
  if (!ordered(place.writer, true, now)) report_race(memory, address, what, "write", place.writer);
  if (write) {
    for (const Access& reader : {place.last_reader, place.other_reader}) {
      if (!ordered(reader, false, now)) report_race(memory, address, what, "read", reader);
    }
    place = Place{now, {}, {}};
    return;
  }
  const Access& last = place.last_reader;
  // A reader of another block is the one a later barrier of this block does not order: keep it.
  bool keep_other = same_block(last, now) && place.other_reader.cluster_number != 0 && !same_block(place.other_reader, now);
  if (last.cluster_number != 0 && !keep_other && !(same_block(last, now) && last.thread == now.thread)) {
    place.other_reader = last;
  }
  place.last_reader = now;
}

inline void check_access(const void* address, size_t bytes, bool write) {
  if (!machine.current) return;
  Watched* memory = find_watched(address);
  if (!memory) return;
  const Thread& thread = *machine.current;
  if (memory->global && !thread.begun) end_launch(memory->name + " before earlier kernels have ended (" + name(thread) + ")");
  const Access now{machine.cluster_number, thread.index, machine.blocks[thread.block].epoch};
  // Counted from an even address, so that no access shares a place with its neighbour.
  size_t odd_begin = reinterpret_cast<size_t>(memory->begin) % kPlaceBytes;
  size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - memory->begin) + odd_begin;
  size_t end = (offset + bytes + kPlaceBytes - 1) / kPlaceBytes;
  for (size_t i = offset / kPlaceBytes; i < end && i < memory->places.size(); i++) {
    record(memory->places[i], now, write, *memory, address);
  }
}

// A copy or a message has arrived: the mbarrier that threads wait for orders it.
inline void forget_accesses(const void* begin, size_t bytes) {
  Watched* memory = find_watched(begin);
  if (!memory) return;
  size_t first = static_cast<size_t>(static_cast<const unsigned char*>(begin) - memory->begin) / kPlaceBytes;
  for (size_t i = first; i < first + bytes / kPlaceBytes && i < memory->places.size(); i++) memory->places[i] = Place{};
}

#else
inline void watch(void*, size_t, std::string, bool) {}
inline void forget_shared_memory() {}
void unwatch_all() {}
void watch_global(void*, size_t, const char*) {}
inline void check_access(const void*, size_t, bool) {}
inline void forget_accesses(const void*, size_t) {}
#endif
}  // namespace emu

#ifdef EMULATE_RACES
#define EMULATION_ACCESS_HOOKS(bytes)                                                                                  \
  extern "C" void __tsan_read##bytes(void* p) { emu::check_access(p, bytes, false); }                                  \
  extern "C" void __tsan_write##bytes(void* p) { emu::check_access(p, bytes, true); }                                  \
  extern "C" void __tsan_unaligned_read##bytes(void* p) { emu::check_access(p, bytes, false); }                        \
  extern "C" void __tsan_unaligned_write##bytes(void* p) { emu::check_access(p, bytes, true); }
EMULATION_ACCESS_HOOKS(1)
EMULATION_ACCESS_HOOKS(2)
EMULATION_ACCESS_HOOKS(4)
EMULATION_ACCESS_HOOKS(8)
EMULATION_ACCESS_HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) { emu::check_access(p, bytes, false); }
extern "C" void __tsan_write_range(void* p, size_t bytes) { emu::check_access(p, bytes, true); }
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
#endif
