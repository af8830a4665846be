// What emulated kernels and the driver ask of the emulation's runtime (runtime.cpp).
//
// The runtime is a translation unit of its own because it must not be instrumented in the race build, where every
// memory access of the kernels is.
#pragma once
#include <source_location>
#include <stddef.h>
#include <stdint.h>

namespace emu {

using Site = std::source_location;

struct Dim3 {
  unsigned x, y, z;
};

struct LaunchShape {
  unsigned grid;
  unsigned block;
  unsigned cluster = 1;
  size_t dynamic_shared_bytes = 0;
};

// Runs body(argument) once a CUDA thread. The seed picks the schedule: 0 runs threads in turn, odd seeds the last
// woken first, so that one warp runs far ahead of the others, even seeds a random one. Throws std::runtime_error.
void launch(const LaunchShape& shape, uint64_t seed, void (*body)(void*), void* argument);

// Ends the launch that the calling thread belongs to with an error that names the thread.
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));

Dim3 thread_index();
Dim3 block_index();
Dim3 block_dim();
Dim3 grid_dim();

// Earlier kernels have ended: from here on the calling thread may touch global memory. It must not end before.
void begin_kernel();

// Blocks until all threads of the block have come to the same place in the source.
void sync_block(Site site);
// Says that the calling thread has started; waits until all threads of the cluster have. Orders no memory.
void cluster_arrive_relaxed(Site site);
void cluster_wait(Site site);

// Every lane of the warp gives its value and gets that of the lane it names.
uint64_t exchange(uint64_t value, unsigned source_lane, Site site);

// Shared memory of the calling thread's block. Static arrays are told apart by the address of a key.
void* shared_array(const void* key, size_t bytes, size_t alignment);
unsigned char* dynamic_shared();

void mbarrier_init(uint64_t* mbarrier, unsigned arrivals, Site site);
void mbarrier_fence_init();
void mbarrier_arrive_expect(uint64_t* mbarrier, unsigned bytes, Site site);
void mbarrier_wait(uint64_t* mbarrier, unsigned parity, Site site);
void mbarrier_wait_cluster(uint64_t* mbarrier, unsigned parity, Site site);
// They complete at a moment of the schedule's choice.
void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* mbarrier, Site site);
void send(void* place, const void* value, unsigned bytes, unsigned rank, uint64_t* mbarrier, Site site);

void atomic_min(unsigned long long* address, unsigned long long value, Site site);

// A path through the kernels, one for each instantiation of the function that has it.
struct Path {
  Path(const char* label_, const char* where_) : label(label_), where(where_), next(first) { first = this; }
  const char *label, *where;
  bool taken = false;
  Path* next;
  static inline Path* first = nullptr;
};

// Global memory that the race detector watches, under a name for its reports. Does nothing in the other builds.
void watch_global(void* begin, size_t bytes, const char* name);
void unwatch_all();

}  // namespace emu
