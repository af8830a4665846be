// Every PTX instruction and CUDA builtin the kernels use, one function each; those of sm_90 are in device_cluster.cuh.
// The host twin, which runs the kernels on the CPU, is emulation/cuda_host.h; the rules that make this possible are in
// emulation/README.md.
#pragma once
#ifdef EMULATE_CUDA
#include "emulation/cuda_host.h"
#else
#include <stdint.h>

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__
#define SHARED_ARRAY(T, name, n) __shared__ T name[n]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")  // of a few rounds, once a row
#define PATH(name)  // the emulation notes that it was taken

struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

namespace dev {
// 2^x, at most 2 units in the last place; subnormal results are 0.
DEVICE float exp2_approx(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// 1/x, at most 1 unit in the last place.
DEVICE float reciprocal_approx(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
// Correct to a few units in the last place; for once-a-row use.
DEVICE float log(float x) { return logf(x); }
DEVICE float log1p(float x) { return log1pf(x); }
DEVICE float expm1(float x) { return expm1f(x); }
DEVICE float tanh(float x) { return tanhf(x); }
DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
// Two numbers: on sm_100 and sm_103 one instruction computes with both, and sm_120 takes fewer registers so.
struct Pair {
  float low, high;
};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
DEVICE uint64_t join(Pair a) { uint64_t x; asm("mov.b64 %0, {%1, %2};" : "=l"(x) : "f"(a.low), "f"(a.high)); return x; }
DEVICE Pair part(uint64_t x) { Pair a; asm("mov.b64 {%0, %1}, %2;" : "=f"(a.low), "=f"(a.high) : "l"(x)); return a; }
DEVICE Pair fma(Pair a, Pair b, Pair c) {
  uint64_t x;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(x) : "l"(join(a)), "l"(join(b)), "l"(join(c)));
  return part(x);
}
DEVICE Pair add(Pair a, Pair b) {
  uint64_t x;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(x) : "l"(join(a)), "l"(join(b)));
  return part(x);
}
#else
DEVICE Pair fma(Pair a, Pair b, Pair c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
DEVICE Pair add(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
#endif
// The larger; NaN only where both are.
DEVICE float max(float a, float b) { return fmaxf(a, b); }

// Two elements in one 32-bit word, the first in the low half, to f32 and back (round to nearest even).
template <class T> DEVICE void unpack(unsigned word, float& low, float& high);
template <> DEVICE void unpack<bf16>(unsigned word, float& low, float& high) {
  low = __uint_as_float(word << 16);
  high = __uint_as_float(word & 0xffff0000u);
}
template <> DEVICE void unpack<f16>(unsigned word, float& low, float& high) {
  asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(low), "=f"(high) : "r"(word));
}
template <class T> DEVICE unsigned pack(float low, float high);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
DEVICE unsigned bf16_bits(float x) {
  unsigned u = __float_as_uint(x);
  return x != x ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}
template <> DEVICE unsigned pack<bf16>(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
template <> DEVICE unsigned pack<f16>(float low, float high) {
  unsigned word;
  asm("{.reg .f16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(word) : "f"(low), "f"(high));
  return word;
}
#else
template <> DEVICE unsigned pack<bf16>(float low, float high) {
  unsigned word; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); return word;
}
template <> DEVICE unsigned pack<f16>(float low, float high) {
  unsigned word; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); return word;
}
#endif
// The larger of each of the elements that two words hold, one of f32, two of the others; NaN only where both are.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
template <class T> DEVICE unsigned max_packed(unsigned a, unsigned b) {
  float a_low, a_high, b_low, b_high;
  unpack<T>(a, a_low, a_high), unpack<T>(b, b_low, b_high);
  return pack<T>(max(a_low, b_low), max(a_high, b_high));
}
#else
template <class T> DEVICE unsigned max_packed(unsigned a, unsigned b);
template <> DEVICE unsigned max_packed<bf16>(unsigned a, unsigned b) {
  unsigned c; asm("max.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b)); return c;
}
template <> DEVICE unsigned max_packed<f16>(unsigned a, unsigned b) {
  unsigned c; asm("max.f16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b)); return c;
}
#endif
template <> DEVICE unsigned max_packed<float>(unsigned a, unsigned b) {
  return __float_as_uint(max(__uint_as_float(a), __uint_as_float(b)));
}
// The same, but the compiler no longer knows what it computed of it before, and so keeps none of that in registers.
DEVICE uint4 opaque(uint4 v) {
  asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w));
  return v;
}
DEVICE float float_from_bits(unsigned bits) { return __uint_as_float(bits); }
DEVICE unsigned bits_from_float(float x) { return __float_as_uint(x); }
// The high word's and low word's 64 bits shifted right by `bits` (0 to 31), low half.
DEVICE unsigned funnel_right(unsigned low, unsigned high, unsigned bits) { return __funnelshift_r(low, high, bits); }

// 16 bytes at a 16-byte boundary. The streaming forms ask the caches to evict first what will not be used again.
DEVICE uint4 load16(const void* p) { return *static_cast<const uint4*>(p); }
DEVICE uint4 load16_streaming(const void* p) { return __ldcs(static_cast<const uint4*>(p)); }
DEVICE void store16_streaming(void* p, uint4 v) { __stcs(static_cast<uint4*>(p), v); }

template <class T> DEVICE T shuffle_xor(T value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }
template <class T> DEVICE T shuffle(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// Over a warp; every lane gets the result.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
DEVICE int reduce_max(int x) {
  UNROLL for (int lane = 16; lane > 0; lane >>= 1) { const int y = shuffle_xor(x, lane); x = x > y ? x : y; }
  return x;
}
DEVICE unsigned reduce_min(unsigned x) {
  UNROLL for (int lane = 16; lane > 0; lane >>= 1) { const unsigned y = shuffle_xor(x, lane); x = x < y ? x : y; }
  return x;
}
DEVICE unsigned reduce_add(unsigned x) {
  UNROLL for (int lane = 16; lane > 0; lane >>= 1) x += shuffle_xor(x, lane);
  return x;
}
#else
DEVICE int reduce_max(int x) { return __reduce_max_sync(0xffffffffu, x); }
DEVICE unsigned reduce_min(unsigned x) { return __reduce_min_sync(0xffffffffu, x); }
DEVICE unsigned reduce_add(unsigned x) { return __reduce_add_sync(0xffffffffu, x); }
#endif
// Threads a block of the kernels on chip, for the compiler to know (src/kernels/select.rs launches as many).
DEVICE constexpr int on_chip_threads() { return 256; }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void atomic_min(unsigned long long* p, unsigned long long v) { atomicMin(p, v); }
}  // namespace dev
#include "device_cluster.cuh"
#endif
