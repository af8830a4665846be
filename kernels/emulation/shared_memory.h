// Shared memory: exact-size heap blocks full of ones (NaN), so that a read before any write shows in the results and
// AddressSanitizer sees an access beyond the end.
#pragma once
#include "race.h"
#include "scheduler.h"

namespace emu {

inline SharedArray allocate_shared(size_t bytes, size_t alignment, unsigned block) {
  void* memory = nullptr;
  if (alignment < sizeof(void*)) alignment = sizeof(void*);
  if (bytes == 0) return {nullptr, 0};
  if (posix_memalign(&memory, alignment, bytes) != 0) abort();
  memset(memory, 0xff, bytes);
  watch(memory, bytes, "shared memory of block " + std::to_string(block), false);
  return {static_cast<unsigned char*>(memory), bytes};
}

void* shared_array(const void* key, size_t bytes, size_t alignment) {
  auto [entry, is_new] = machine.blocks[machine.current->block].arrays.try_emplace(key);
  if (is_new) entry->second = allocate_shared(bytes, alignment, machine.current->block);
  return entry->second.begin;
}

unsigned char* dynamic_shared() { return machine.blocks[machine.current->block].dynamic.begin; }

// Other blocks of the cluster must not touch the memory of a block that has ended.
inline void close_shared(Block& block) {
  if (block.dynamic.bytes == 0) return;
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(block.dynamic.begin, block.dynamic.bytes);
#else
  memset(block.dynamic.begin, 0xff, block.dynamic.bytes);
#endif
}

inline void free_shared(Block& block) {
#ifdef __SANITIZE_ADDRESS__
  if (block.dynamic.bytes != 0) __asan_unpoison_memory_region(block.dynamic.begin, block.dynamic.bytes);
#endif
  free(block.dynamic.begin);
  for (auto& [key, array] : block.arrays) free(array.begin);
}

}  // namespace emu
