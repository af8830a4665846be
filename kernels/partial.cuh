// Partial results of a stretch of a row and their merge: the one associative operation that combines threads, warps
// and blocks (and, for sliced vocabularies, slices).
#pragma once
#include "device.cuh"
#include "params.cuh"

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// Logits to z, in units of log 2: exponentials are powers of 2, so that one instruction computes them.
template <bool SOFTCAP> struct Transform {
  float scale;  // log2 e times the logit scale, or the softcap times log2 e
  float inner;  // scale / softcap

  DEVICE explicit Transform(const Params& p) {
    scale = (SOFTCAP ? p.softcap : p.logit_scale) * kLog2E;
    inner = SOFTCAP ? p.logit_scale / p.softcap : 0.f;
  }

  // tanh y, and its slope 1 − tanh² y without the cancellation that computing it from tanh would have.
  DEVICE static float tanh(float y, float& slope) {
    const float a = fabsf(y);
    const float e = dev::exp2_approx(-2.f * kLog2E * a);
    const float inverse = dev::reciprocal_approx(1.f + e);
    slope = 4.f * e * inverse * inverse;
    // Near 0, 1 − e would cancel: Taylor's series.
    const float s = a * a;
    float series = -1382.f / 155925.f;
    series = dev::fma(series, s, 62.f / 2835.f);
    series = dev::fma(series, s, -17.f / 315.f);
    series = dev::fma(series, s, 2.f / 15.f);
    series = dev::fma(series, s, -1.f / 3.f);
    series = dev::fma(series, s, 1.f);
    return copysignf(a < 0.25f ? a * series : (1.f - e) * inverse, y);
  }

  // z·log2 e − shift; −inf for a masked class. One rounding without a softcap: large offsets cancel exactly.
  DEVICE float operator()(float x, float shift, float& slope) const {
    if constexpr (SOFTCAP) {
      // x − x makes NaN of +inf, which tanh would hide.
      const float z = dev::fma(scale, tanh(x * inner, slope), (x - x) - shift);
      return x == -INFINITY ? -INFINITY : z;
    } else {
      slope = 1.f;
      return dev::fma(x, scale, -shift);
    }
  }
  DEVICE float operator()(float x, float shift) const {
    float slope;
    return (*this)(x, shift, slope);
  }

  // What exponentials are taken relative to: z·log2 e of the largest logit, 0 where all are masked.
  DEVICE float shift(float largest) const { return largest == -INFINITY ? 0.f : dev::max((*this)(largest, 0.f), -3.4e38f); }
};

// Sums over classes that are neither masked nor the target, relative to `shift`, with d = z·log2 e − shift.
//
// The target is left out so that a probability near 1 keeps its digits: 1 − p_y is then a sum, not a difference.
struct alignas(16) Partial {
  float largest;     // largest logit, before scale and softcap
  float shift;       // its z·log2 e
  float exp;         // Σ 2^d
  float linear;      // Σ d
  float weighted;    // Σ d·2^d
  float squares;     // Σ 2^2d
  unsigned classes;  // how many
  unsigned at;       // first group that has `largest`; once `find_column` looked, its column
};

DEVICE Partial empty_partial() { return {-INFINITY, 0.f, 0.f, 0.f, 0.f, 0.f, 0u, 0u}; }

// A row between the tiles of a product, of which a launch sees one at a time.
struct alignas(16) Running {
  Partial others;
  float target_logit;
  float unused[3];
};
static_assert(sizeof(Running) == 48, "src/kernels/abi.rs has as many bytes");

// The same sums relative to another shift.
template <bool STATS> DEVICE void reshift(Partial& a, float shift) {
  const float by = a.shift - shift, factor = dev::exp2_approx(by);
  a.shift = shift;
  if (a.classes == 0) return;
  a.linear = dev::fma(static_cast<float>(a.classes), by, a.linear);
  if constexpr (STATS) {
    a.weighted = dev::fma(by, a.exp, a.weighted) * factor;
    a.squares *= factor * factor;
  }
  a.exp *= factor;
}

template <bool STATS> DEVICE Partial merge(Partial a, Partial b) {
  const bool first = a.largest > b.largest || (a.largest == b.largest && a.at <= b.at);
  const float shift = first ? a.shift : b.shift;
  reshift<STATS>(a, shift);
  reshift<STATS>(b, shift);
  Partial c;
  c.largest = first ? a.largest : b.largest;
  c.shift = shift;
  c.exp = a.exp + b.exp;
  c.linear = a.linear + b.linear;
  c.weighted = a.weighted + b.weighted;
  c.squares = a.squares + b.squares;
  c.classes = a.classes + b.classes;
  c.at = first ? a.at : b.at;
  return c;
}

// Adds a group of logits. `x` is −inf for masked classes, the target and elements beyond the row.
template <bool STATS, bool SOFTCAP, int N>
DEVICE void add_group(Partial& a, const float (&x)[N], int group, const Transform<SOFTCAP>& transform) {
  float largest = x[0];
  UNROLL for (int k = 1; k < N; k++) largest = dev::max(largest, x[k]);
  if (largest > a.largest) {  // rare after a thread's first groups
    reshift<STATS>(a, transform.shift(largest));
    a.largest = largest;
    a.at = static_cast<unsigned>(group);
  }
  float exp = 0.f, linear = 0.f, weighted = 0.f, squares = 0.f;
  UNROLL for (int k = 0; k < N; k++) {
    const float d = transform(x[k], a.shift), e = dev::exp2_approx(d);
    exp += e;
    linear += d;
    if constexpr (STATS) {
      weighted = dev::fma(d, e, weighted);
      squares = dev::fma(e, e, squares);
    }
  }
  if (linear == -INFINITY) {  // something is masked: leave it out, one comparison a group where nothing is
    linear = 0.f, weighted = 0.f;
    UNROLL for (int k = 0; k < N; k++) {
      if (x[k] != -INFINITY) {
        const float d = transform(x[k], a.shift), e = dev::exp2_approx(d);
        linear += d;
        if (STATS && e > 0.f) weighted = dev::fma(d, e, weighted);
        a.classes++;
      }
    }
  } else {
    a.classes += N;
  }
  a.exp += exp;
  a.linear += linear;
  a.weighted += weighted;
  a.squares += squares;
}

// Merges the 32 lanes' results; every lane gets the result.
template <bool STATS> DEVICE Partial merge_warp(Partial a) {
  UNROLL for (int lane = 16; lane > 0; lane >>= 1) {
    Partial b = empty_partial();
    b.largest = dev::shuffle_xor(a.largest, lane);
    b.shift = dev::shuffle_xor(a.shift, lane);
    b.exp = dev::shuffle_xor(a.exp, lane);
    b.linear = dev::shuffle_xor(a.linear, lane);
    b.classes = dev::shuffle_xor(a.classes, lane);
    b.at = dev::shuffle_xor(a.at, lane);
    if constexpr (STATS) {
      b.weighted = dev::shuffle_xor(a.weighted, lane);
      b.squares = dev::shuffle_xor(a.squares, lane);
    }
    a = merge<STATS>(a, b);
  }
  return a;
}

// Merges all threads' results through `scratch`, one element a warp; every thread gets the result.
template <bool STATS> DEVICE Partial merge_block(Partial a, Partial* scratch) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  a = merge_warp<STATS>(a);
  if (warps == 1) return a;
  if (lane == 0) scratch[warp] = a;
  dev::sync_block();
  return merge_warp<STATS>(lane < warps ? scratch[lane] : empty_partial());
}
