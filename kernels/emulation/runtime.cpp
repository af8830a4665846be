// The emulation's runtime: one launch from beginning to end. emulator.h is what others see of it.
#include "cluster.h"
#include "race.h"
#include "scheduler.h"
#include "shared_memory.h"

namespace emu {

Dim3 thread_index() { return machine.current->thread_index; }
Dim3 block_index() { return machine.current->block_index; }
Dim3 block_dim() { return {machine.shape.block, 1, 1}; }
Dim3 grid_dim() { return {machine.shape.grid, 1, 1}; }

void begin_kernel() { machine.current->begun = true; }

// Compiled here, without instrumentation: atomic accesses do not race.
void atomic_min(unsigned long long* address, unsigned long long value, Site site) {
  if (!machine.current->begun) fail(site, "an atomic operation before earlier kernels have ended");
  if (value < *address) *address = value;
}

static void run_thread() {
  landed(nullptr);
  machine.body(machine.argument);
  Thread& self = *machine.current;
  if (!self.begun) fail(Site::current(), "a thread that did not wait for earlier kernels has ended");
  self.wait = Wait::kExited;
  machine.running--;
  Block& block = machine.blocks[self.block];
  if (--block.running == 0) {
    if (expects(block)) fail(Site::current(), "a block ended before a copy or a message to it arrived");
    close_shared(block);
  }
  yield(true);
  abort();
}

static void check(const LaunchShape& shape) {
  bool good = shape.grid > 0 && shape.block > 0 && shape.block <= 1024 && shape.block % kWarp == 0;
  good = good && shape.cluster >= 1 && shape.cluster <= kMaxCluster && shape.grid % shape.cluster == 0;
  if (!good || shape.dynamic_shared_bytes > 227 * 1024) {
    throw std::runtime_error("launch of " + std::to_string(shape.grid) + " blocks of " + std::to_string(shape.block) +
                             " threads in clusters of " + std::to_string(shape.cluster));
  }
}

static void shuffle(std::vector<unsigned>& list) {
  for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[random_below(i)]);
}

static void set_up_cluster(unsigned cluster) {
  const LaunchShape& shape = machine.shape;
  unsigned threads = shape.block * shape.cluster;
  machine.cluster_number++;
  machine.cluster_arrivals = 0;
  machine.transfers.clear();
  machine.delivered.clear();
  machine.runnable.clear();
  machine.running = threads;
  machine.warps.assign(threads / kWarp, {});
  machine.blocks.assign(shape.cluster, {});
  for (unsigned b = 0; b < shape.cluster; b++) {
    machine.blocks[b].running = shape.block;
    machine.blocks[b].dynamic = allocate_shared(shape.dynamic_shared_bytes, 128, b);
  }
  std::vector<unsigned> warps(threads / kWarp);
  for (unsigned w = 0; w < warps.size(); w++) warps[w] = w;
  if (machine.seed != 0) shuffle(warps);
  for (unsigned w : warps) {
    for (unsigned i = w * kWarp; i < (w + 1) * kWarp; i++) {
      Thread& thread = machine.threads[i];
      thread.index = i;
      thread.block = i / shape.block;
      thread.begun = thread.arrived = thread.met_cluster = false;
      thread.known = {};
      thread.thread_index = {i % shape.block, 0, 0};
      thread.block_index = {cluster * shape.cluster + thread.block, 0, 0};
      clear_marks(machine.stacks[i]);  // of the fiber before, which ended inside a function
      prepare(thread.fiber, machine.stacks[i], run_thread);
      wake(i);
    }
  }
}

static void run_cluster(unsigned cluster) {
  set_up_cluster(cluster);
  machine.current = next_thread();
  switch_fiber(machine.launcher, machine.current->fiber);
  machine.current = nullptr;
  for (Block& block : machine.blocks) free_shared(block);
  forget_shared_memory();
  if (!machine.error.empty()) throw std::runtime_error(machine.error);
}

void launch(const LaunchShape& shape, uint64_t seed, void (*body)(void*), void* argument) {
  check(shape);
  machine.shape = shape;
  machine.body = body;
  machine.argument = argument;
  machine.seed = seed;
  machine.random_state = (seed + 1) * 0x9e3779b97f4a7c15u;
  machine.error.clear();
  machine.threads.resize(shape.block * shape.cluster);
  while (machine.stacks.size() < machine.threads.size()) machine.stacks.push_back(new_stack());
  std::vector<unsigned> clusters(shape.grid / shape.cluster);
  for (unsigned c = 0; c < clusters.size(); c++) clusters[c] = c;
  if (seed != 0) shuffle(clusters);
  for (unsigned c : clusters) run_cluster(c);
}

}  // namespace emu
