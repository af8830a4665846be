// Clusters of blocks (sm_90): their barrier, bulk copies, and messages to each other's shared memory, which complete on an
// mbarrier.
#pragma once
#include "race.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace emu {

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

// The same place in another block of the cluster.
inline unsigned char* twin(const void* shared, unsigned bytes, unsigned rank, Site site) {
  const SharedArray& own = machine.blocks[machine.current->block].dynamic;
  size_t offset = static_cast<size_t>(static_cast<const unsigned char*>(shared) - own.begin);
  if (offset >= own.bytes || bytes > own.bytes - offset) {
    fail(site, "only dynamic shared memory has a twin in another block");
  }
  return machine.blocks[rank].dynamic.begin + offset;
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

void mbarrier_wait_cluster(uint64_t* mbarrier, unsigned parity, Site site) {
  mbarrier_wait(mbarrier, parity, site);
  learn(machine.current->known, machine.delivered[mbarrier]);
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
  machine.transfers.push_back({static_cast<unsigned char*>(shared), global, bytes, mbarrier, {}, {}});
}

void send(void* place, const void* value, unsigned bytes, unsigned rank, uint64_t* mbarrier, Site site) {
  const Thread& self = *machine.current;
  if (rank >= machine.blocks.size()) fail(site, "rank %u of %zu blocks", rank, machine.blocks.size());
  if (!self.met_cluster) fail(site, "a message to a block before it is known to have started");
  const Block& receiver = machine.blocks[rank];
  if (receiver.running == 0) fail(site, "a message to a block that has ended");
  if (receiver.mbarrier_unfenced) fail(site, "a message, and no fence since the mbarrier was initialised");
  unsigned char* to = twin(place, bytes, rank, site);
  auto* completes = reinterpret_cast<uint64_t*>(twin(mbarrier, sizeof *mbarrier, rank, site));
  load(completes, site);
  check_access(to, bytes, true);
  const auto* from = static_cast<const unsigned char*>(value);
  Transfer message{to, nullptr, bytes, completes, {from, from + bytes}, self.known};
  const Block& sender = machine.blocks[self.block];
  learn(message.known, sender.known_to_all);
  message.known[self.block] = sender.epoch;
  machine.transfers.push_back(std::move(message));
}

inline void complete_transfer(size_t which) {
  Transfer transfer = std::move(machine.transfers[which]);
  machine.transfers.erase(machine.transfers.begin() + static_cast<ptrdiff_t>(which));
  memcpy(transfer.to, transfer.from ? transfer.from : transfer.message.data(), transfer.bytes);
  forget_accesses(transfer.to, transfer.bytes);
  if (!transfer.from) learn(machine.delivered[transfer.mbarrier], transfer.known);
  Mbarrier value;
  memcpy(&value, transfer.mbarrier, sizeof value);
  value.bytes_expected -= static_cast<int32_t>(transfer.bytes);
  store(transfer.mbarrier, value);
}

// Whether something is still to come to a block.
inline bool expects(const Block& block) {
  for (const Transfer& transfer : machine.transfers) {
    if (static_cast<size_t>(transfer.to - block.dynamic.begin) < block.dynamic.bytes) return true;
  }
  return false;
}

}  // namespace emu
