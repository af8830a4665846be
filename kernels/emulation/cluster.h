// Clusters of blocks (sm_90): their barrier, each other's shared memory, and bulk copies that complete on an mbarrier.
#pragma once
#include "race.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace emu {

void sync_cluster(Site site) {
  unsigned all = static_cast<unsigned>(machine.threads.size());
  if (arrive(machine.cluster_rendezvous, all, Wait::kClusterBarrier, site)) {
    machine.cluster_epoch++;
    for (Block& block : machine.blocks) block.epoch++;
  }
  yield();
  machine.current->met_cluster = true;
}

void cluster_arrive_relaxed(Site site) {
  if (machine.current->arrived) fail(site, "a second arrival at the cluster's barrier without a wait");
  machine.current->arrived = true;
  if (++machine.cluster_arrivals < machine.threads.size()) return;
  for (const Thread& thread : machine.threads) {
    if (thread.wait == Wait::kClusterBarrier) wake(thread.index);
  }
}

// Once a launch: arrivals are not counted anew.
void cluster_wait(Site site) {
  Thread& self = *machine.current;
  if (!self.arrived) fail(site, "a wait at the cluster's barrier without an arrival");
  while (machine.cluster_arrivals < machine.threads.size()) {
    self.wait = Wait::kClusterBarrier;
    self.site = site;
    yield();
  }
  self.arrived = false;
  self.met_cluster = true;
}

void* map_to_rank(const void* shared, unsigned rank, Site site) {
  const SharedArray& own = machine.blocks[machine.current->block].dynamic;
  size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(shared) - own.begin);
  if (offset >= own.bytes) fail(site, "only dynamic shared memory has a twin in another block");
  if (rank != machine.current->block && !machine.current->met_cluster) {
    fail(site, "another block's memory, before that block is known to have started");
  }
  if (rank >= machine.blocks.size()) fail(site, "rank %u of %zu blocks", rank, machine.blocks.size());
  return machine.blocks[rank].dynamic.begin + offset;
}

// What the opaque 64-bit word of an mbarrier holds here. Not valid unless initialised: memory starts as all ones.
struct Mbarrier {
  uint32_t phase : 1;
  uint32_t count : 15;
  uint32_t pending : 15;
  uint32_t zero : 1;
  int32_t bytes_expected;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));

inline Mbarrier load(const uint64_t* mbarrier, Site site) {
  Mbarrier value;
  memcpy(&value, mbarrier, sizeof value);
  if (value.zero != 0 || value.count == 0) fail(site, "the mbarrier is not initialised");
  return value;
}

inline void store(uint64_t* mbarrier, Mbarrier value) {
  if (value.pending == 0 && value.bytes_expected == 0) {
    value.phase ^= 1;
    value.pending = value.count;
    for (const Thread& thread : machine.threads) {
      if (thread.wait == Wait::kMbarrier && thread.mbarrier == mbarrier) wake(thread.index);
    }
  }
  memcpy(mbarrier, &value, sizeof value);
}

void mbarrier_init(uint64_t* mbarrier, unsigned arrivals, Site site) {
  if (arrivals == 0 || arrivals > machine.threads.size()) fail(site, "an mbarrier for %u arrivals", arrivals);
  store(mbarrier, {0, arrivals, arrivals, 0, 0});
  machine.blocks[machine.current->block].mbarrier_unfenced = true;
}

void mbarrier_fence_init() { machine.blocks[machine.current->block].mbarrier_unfenced = false; }

void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes, Site site) {
  Mbarrier value = load(mbarrier, site);
  if (value.pending == 0) fail(site, "more arrivals than the mbarrier was initialised for");
  value.bytes_expected += static_cast<int32_t>(bytes);
  value.pending--;
  store(mbarrier, value);
}

void mbarrier_wait(uint64_t* mbarrier, unsigned parity, Site site) {
  while (load(mbarrier, site).phase == parity) {
    Thread& self = *machine.current;
    self.wait = Wait::kMbarrier;
    self.site = site;
    self.mbarrier = mbarrier;
    yield();
  }
}

void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier, Site site) {
  const Block& block = machine.blocks[machine.current->block];
  size_t alignment = reinterpret_cast<size_t>(shared) | reinterpret_cast<size_t>(global) | bytes;
  if (alignment % 16 != 0 || bytes == 0) fail(site, "a bulk copy wants multiples of 16: %u bytes", bytes);
  size_t offset = static_cast<size_t>(static_cast<unsigned char*>(shared) - block.dynamic.begin);
  if (offset >= block.dynamic.bytes || bytes > block.dynamic.bytes - offset) {
    fail(site, "a bulk copy of %u bytes ends outside the block's dynamic shared memory", bytes);
  }
  if (!machine.current->begun) fail(site, "a bulk copy before earlier kernels have ended");
  if (block.mbarrier_unfenced) fail(site, "a bulk copy, and no fence since the mbarrier was initialised");
  load(mbarrier, site);
  check_access(global, bytes, false);
  check_access(shared, bytes, true);
  machine.copies.push_back({shared, global, bytes, mbarrier});
}

inline void complete_bulk_copy(size_t which) {
  BulkCopy copy = machine.copies[which];
  machine.copies.erase(machine.copies.begin() + static_cast<ptrdiff_t>(which));
  memcpy(copy.to, copy.from, copy.bytes);
  forget_accesses(copy.to, copy.bytes);
  Mbarrier value;
  memcpy(&value, copy.mbarrier, sizeof value);
  value.bytes_expected -= static_cast<int32_t>(copy.bytes);
  store(copy.mbarrier, value);
}

}  // namespace emu
