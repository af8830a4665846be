// CUDA C++ for a host compiler, as much of it as the kernels use: the host twin of ../device.cuh.
#pragma once
#include "emulator.h"
#include <math.h>
#include <stdint.h>

// GCC's thread pass misses an aggregate that is read only to be passed to a real call. Elsewhere what kernels share is
// compiled once, in a tenth of the time.
#ifdef EMULATE_RACES
#define DEVICE inline __attribute__((always_inline))
#else
#define DEVICE inline
#endif
#define KERNEL extern "C"
#define UNROLL
#define ROLLED
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define SHARED_ARRAY(T, name, n)                                                                                       \
  static const char name##_key = 0;                                                                                    \
  T(&name)[n] = *static_cast<T(*)[n]>(emu::shared_array(&name##_key, sizeof(T) * (n), alignof(T)))
#define DYNAMIC_SHARED(name) unsigned char* const name = emu::dynamic_shared()

// Notes that this place was reached, in this instantiation. The entry exists even if none is.
template <class Place> struct Noted { static emu::Path path; };
template <class Place> emu::Path Noted<Place>::path{Place::label(), Place::where()};
#define PATH(name)                                                                                                     \
  do {                                                                                                                 \
    struct Place {                                                                                                     \
      static const char* label() { return name; }                                                                      \
      static const char* where() { return __PRETTY_FUNCTION__; }                                                       \
    };                                                                                                                 \
    Noted<Place>::path.taken = true;                                                                                   \
  } while (false)

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_dim())
#define gridDim (emu::grid_dim())

struct alignas(16) uint4 { unsigned x, y, z, w; };
DEVICE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

#include "device_host.h"
#include "device_cluster_host.h"
