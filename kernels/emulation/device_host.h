// `namespace dev` of ../device.cuh on the host. A function that may block or fail knows its caller's line.
#pragma once
#include "emulator.h"

namespace dev {

DEVICE float float_from_bits(unsigned bits) { return __builtin_bit_cast(float, bits); }
DEVICE unsigned bits_from_float(float x) { return __builtin_bit_cast(unsigned, x); }

DEVICE float flush_subnormal(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }
DEVICE float exp2_approx(float x) { return flush_subnormal(exp2f(flush_subnormal(x))); }
DEVICE float reciprocal_approx(float x) { return flush_subnormal(1.0f / flush_subnormal(x)); }
DEVICE float log(float x) { return logf(x); }
DEVICE float log1p(float x) { return log1pf(x); }
DEVICE float expm1(float x) { return expm1f(x); }
DEVICE float tanh(float x) { return tanhf(x); }
DEVICE float fma(float a, float b, float c) { return fmaf(a, b, c); }
struct Pair {
  float low, high;
};
DEVICE Pair fma(Pair a, Pair b, Pair c) { return {fmaf(a.low, b.low, c.low), fmaf(a.high, b.high, c.high)}; }
DEVICE Pair add(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
DEVICE float max(float a, float b) { return fmaxf(a, b); }

DEVICE float widen_f16(unsigned half) {
  unsigned sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31u, mantissa = half & 0x3ffu;
  if (exponent == 0) return copysignf(static_cast<float>(mantissa) * 0x1p-24f, float_from_bits(sign));
  unsigned wide_exponent = exponent == 31 ? 255 : exponent + (127 - 15);
  return float_from_bits(sign | wide_exponent << 23 | mantissa << 13);
}

DEVICE unsigned narrow_f16(float x) {
  unsigned bits = bits_from_float(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (x != x) return 0x7fffu;
  if (magnitude >= bits_from_float(65520.0f)) return sign | 0x7c00u;
  // Below the smallest normal, 0.5 has just the unit in the last place that f16 has there: the addition rounds.
  if (magnitude < bits_from_float(0x1p-14f)) {
    return sign | (bits_from_float(float_from_bits(magnitude) + 0.5f) - bits_from_float(0.5f));
  }
  magnitude += 0xfffu + (magnitude >> 13 & 1u);
  return sign | (magnitude - ((127u - 15u) << 23)) >> 13;
}

DEVICE unsigned narrow_bf16(float x) {
  unsigned bits = bits_from_float(x);
  return x != x ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

template <class T> DEVICE void unpack(unsigned word, float& low, float& high);
template <> DEVICE void unpack<bf16>(unsigned word, float& low, float& high) {
  low = float_from_bits(word << 16);
  high = float_from_bits(word & 0xffff0000u);
}
template <> DEVICE void unpack<f16>(unsigned word, float& low, float& high) {
  low = widen_f16(word & 0xffffu);
  high = widen_f16(word >> 16);
}
template <class T> DEVICE unsigned pack(float low, float high);
template <> DEVICE unsigned pack<bf16>(float low, float high) { return narrow_bf16(low) | narrow_bf16(high) << 16; }
template <> DEVICE unsigned pack<f16>(float low, float high) { return narrow_f16(low) | narrow_f16(high) << 16; }

template <class T> DEVICE unsigned max_packed(unsigned a, unsigned b) {
  float a_low, a_high, b_low, b_high;
  unpack<T>(a, a_low, a_high), unpack<T>(b, b_low, b_high);
  return pack<T>(max(a_low, b_low), max(a_high, b_high));
}

template <> DEVICE unsigned max_packed<float>(unsigned a, unsigned b) {
  return bits_from_float(max(float_from_bits(a), float_from_bits(b)));
}

DEVICE uint4 opaque(uint4 v) { return v; }

DEVICE unsigned funnel_right(unsigned low, unsigned high, unsigned bits, emu::Site site = emu::Site::current()) {
  if (bits > 31) emu::fail(site, "a funnel shift by %u bits", bits);
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> bits);
}

DEVICE void check_vector(const void* p, emu::Site site) {
  if (reinterpret_cast<size_t>(p) % sizeof(uint4) != 0) emu::fail(site, "a 16-byte access at a misaligned address");
}
DEVICE uint4 load16(const void* p, emu::Site site = emu::Site::current()) {
  check_vector(p, site);
  return *static_cast<const uint4*>(p);
}
DEVICE uint4 load16_streaming(const void* p, emu::Site site = emu::Site::current()) { return load16(p, site); }
DEVICE void store16_streaming(void* p, uint4 v, emu::Site site = emu::Site::current()) {
  check_vector(p, site);
  *static_cast<uint4*>(p) = v;
}

template <class T> DEVICE T exchange(T value, unsigned lane, emu::Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof(T));
  word = emu::exchange(word, lane, site);
  __builtin_memcpy(&value, &word, sizeof(T));
  return value;
}
template <class T> DEVICE T shuffle_xor(T value, int lane_mask, emu::Site site = emu::Site::current()) {
  return exchange(value, threadIdx.x % 32 ^ static_cast<unsigned>(lane_mask), site);
}
template <class T> DEVICE T shuffle(T value, int lane, emu::Site site = emu::Site::current()) {
  return exchange(value, static_cast<unsigned>(lane), site);
}
// By exchanges: what a reduction instruction gives, and as strict about who takes part.
template <class T, class Use> DEVICE T reduce(T x, emu::Site site, Use use) {
  for (unsigned lane = 16; lane > 0; lane >>= 1) x = use(x, exchange(x, threadIdx.x % 32 ^ lane, site));
  return x;
}
DEVICE int reduce_max(int x, emu::Site site = emu::Site::current()) {
  return reduce(x, site, [](int a, int b) { return a > b ? a : b; });
}
DEVICE unsigned reduce_min(unsigned x, emu::Site site = emu::Site::current()) {
  return reduce(x, site, [](unsigned a, unsigned b) { return a < b ? a : b; });
}
DEVICE unsigned reduce_add(unsigned x, emu::Site site = emu::Site::current()) {
  return reduce(x, site, [](unsigned a, unsigned b) { return a + b; });
}
// Fewer are faster here, and make more chunks of a row.
DEVICE int on_chip_threads() { return static_cast<int>(blockDim.x); }
DEVICE void sync_block(emu::Site site = emu::Site::current()) { emu::sync_block(site); }
DEVICE void atomic_min(unsigned long long* p, unsigned long long v, emu::Site site = emu::Site::current()) {
  emu::atomic_min(p, v, site);
}

}  // namespace dev
