// Partial results of a stretch of a row and their merge: the one associative operation that combines threads, warps
// and blocks (and, for sliced vocabularies, slices).
#pragma once
#include "params.cuh"
#include "vector.cuh"

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;

// Sums of d are kept in this unit: a power of 2, so that it rounds nothing, and so small that no sum overflows.
constexpr float kUnit = 0x1p-40f;

// Exponents: differences d = z - z' of a logit's z and that of the one which sums are relative to, the largest or one
// near it, in units of log 2, so that exponentials are powers of 2 and one instruction computes them.
//
// Without a softcap, d = x*scale - reference with that one's x'*scale for a reference, one operation and one rounding.
// Where x'*scale is so large that its own rounding is no longer small beside 1, the row is *far*: its
// reference is +inf, which `near` makes -inf of and `exact` knows how to part.
template <bool SOFTCAP> struct Transform {
  float scale;        // log2 e times the logit scale, or the softcap
  float logit_scale;
  float inner[2];     // factors of 2 * logit scale / softcap

  DEVICE explicit Transform(const Params& p) {
    scale = fminf((SOFTCAP ? p.softcap : p.logit_scale) * kLog2E, 3.4e38f);
    logit_scale = p.logit_scale;
    inner[0] = p.inner[0], inner[1] = p.inner[1];
  }

  // tanh y of a logit by what it is made of: sigma(-2y), sigma the logistic function, and the slope 1 - tanh^2 y.
  DEVICE float down(float x, float& slope) const {
    const float y = x * inner[0] * inner[1];
    const float e = dev::exp2_approx(-kLog2E * fabsf(y));
    const float inverse = dev::reciprocal_approx(1.f + e), small = e * inverse;
    slope = 4.f * small * inverse;
    return y > 0.f ? small : inverse;
  }

  // e^y - 1 for y <= 0 without the cancellation near 0, where it is a polynomial through Chebyshev's points.
  DEVICE static float exp_minus_1(float y) {
    float series = 0.00112340425f;
    series = dev::fma(series, y, 0.00818961393f);
    series = dev::fma(series, y, 0.0416300744f);
    series = dev::fma(series, y, 0.166662425f);
    series = dev::fma(series, y, 0.499999821f);
    series = dev::fma(series, y, 1.f);
    return y > -0.5f ? series * y : dev::exp2_approx(kLog2E * y) - 1.f;
  }

  // What exponents need of the largest logit, of which there is one, beside itself.
  DEVICE float reference(float largest) const {
    if (largest == -INFINITY) return 0.f;  // all are masked
    if constexpr (SOFTCAP) {
      float slope;
      return scale * down(-largest, slope);
    } else {
      const float shift = largest * scale;
      return fabsf(shift) <= 16777216.f && scale < 3.4e38f ? shift : INFINITY;
    }
  }

  // d; -inf for a masked class, and in a far row.
  DEVICE float near(float x, float largest, float reference, float& slope) const {
    if constexpr (SOFTCAP) {
      // tanh a - tanh b = 2 (e^(2a-2b) - 1) sigma(-2a) sigma(2b): no difference of numbers that are nearly equal.
      const float below = down(x, slope);
      const float twice = dev::fma(x, 0.5f, -0.5f * largest) * (2.f * inner[0]) * inner[1];
      const float d = reference * (exp_minus_1(twice) * (below + below));
      return x == -INFINITY ? -INFINITY : d;
    } else {
      slope = 1.f;
      return dev::fma(x, scale, -reference);
    }
  }
  DEVICE float near(float x, float largest, float reference) const {
    float slope;
    return near(x, largest, reference, slope);
  }
  // The same of two, without a softcap.
  DEVICE dev::Pair near_pair(dev::Pair x, float reference) const {
    return dev::fma(x, {scale, scale}, {-reference, -reference});
  }

  // d; -inf for a masked class.
  DEVICE float exact(float x, float largest, float reference, float& slope) const {
    const float d = near(x, largest, reference, slope);
    if (SOFTCAP || reference < INFINITY) return d;
    return half_nats(x, largest) * (2.f * kLog2E);
  }
  DEVICE float exact(float x, float largest, float reference) const {
    float slope;
    return exact(x, largest, reference, slope);
  }

  // (x - largest) * logit_scale / 2, which overflows only where d does.
  DEVICE float half_nats(float x, float largest) const { return dev::fma(x, 0.5f, -0.5f * largest) * logit_scale; }

  // How far a logit may exceed the one that sums are relative to: with a softcap not at all, else until d is about 16.
  DEVICE float reach() const { return SOFTCAP ? 0.f : 11.f * dev::reciprocal_approx(logit_scale); }

  // A finite d in `kUnit`s, of a class that is not masked, even where `d` overflowed.
  DEVICE float in_units(float x, float largest, float d) const {
    if (SOFTCAP || d > -INFINITY) return d * kUnit;
    return dev::fma(x, 0.5f, -0.5f * largest) * (2.f * kLog2E * kUnit) * logit_scale;
  }

  // z' + d for d = `log2_sum`, in nats.
  DEVICE float lse(float largest, float reference, float log2_sum) const {
    if constexpr (SOFTCAP) {
      const float y = largest * inner[0] * (0.5f * inner[1]);
      return kLn2 * dev::fma(scale, dev::tanh(y), log2_sum);
    } else {
      return reference < INFINITY ? kLn2 * (reference + log2_sum) : dev::fma(largest, logit_scale, kLn2 * log2_sum);
    }
  }
};

// Sums over classes that are neither masked nor the target, relative to the largest logit (a thread's: see ThreadSums).
//
// The target is left out so that a probability near 1 keeps its digits: 1 - p_y is then a sum, not a difference.
struct alignas(16) Partial {
  float largest;     // largest logit, before scale and softcap
  float reference;   // what its transform says of it
  float exp;         // sum of 2^d
  float linear;      // sum of d, in `kUnit`s
  float weighted;    // sum of d * 2^d
  float squares;     // sum of 2^2d
  unsigned classes;  // how many
  unsigned at;       // first group that has `largest`; once `find_column` looked, its column
};

DEVICE Partial empty_partial() { return {-INFINITY, 0.f, 0.f, 0.f, 0.f, 0.f, 0u, 0u}; }

// A row between the tiles of a product, of which a launch sees one at a time, or of the slices that ranks have.
struct alignas(16) Running {
  Partial others;
  float target_logit;  // NaN where the target is none of these classes
  unsigned digest;     // of what the row is given beside its logits, where there are ranks
  float unused[2];
};
static_assert(sizeof(Running) == 48, "src/kernels/abi.rs has as many bytes");

// Makes the sums relative to a larger logit.
template <bool STATS, bool SOFTCAP>
DEVICE void relate(Partial& a, float largest, float reference, const Transform<SOFTCAP>& transform) {
  if (a.classes != 0) {  // of no classes, every sum is 0
    float by;
    if constexpr (SOFTCAP) by = transform.near(a.largest, largest, reference);
    else if (a.reference < INFINITY && reference < INFINITY) by = a.reference - reference;
    else {
      PATH("far");
      by = transform.exact(a.largest, largest, INFINITY);
    }
    const float factor = dev::exp2_approx(by);
    a.linear = dev::fma(static_cast<float>(a.classes), transform.in_units(a.largest, largest, by), a.linear);
    if constexpr (STATS) {
      a.weighted = factor == 0.f ? 0.f : dev::fma(by, a.exp, a.weighted) * factor;
      a.squares *= factor * factor;
    }
    a.exp *= factor;
  }
  a.reference = reference;
}

template <bool STATS, bool SOFTCAP> DEVICE Partial merge(Partial a, Partial b, const Transform<SOFTCAP>& transform) {
  const bool first = a.largest > b.largest || (a.largest == b.largest && a.at <= b.at);
  const float largest = first ? a.largest : b.largest, reference = first ? a.reference : b.reference;
  relate<STATS>(a, largest, reference, transform);
  relate<STATS>(b, largest, reference, transform);
  Partial c;
  c.largest = largest;
  c.reference = reference;
  c.exp = a.exp + b.exp;
  c.linear = a.linear + b.linear;
  c.weighted = a.weighted + b.weighted;
  c.squares = a.squares + b.squares;
  c.classes = a.classes + b.classes;
  c.at = first ? a.at : b.at;
  return c;
}

// A thread's sums over its groups so far. They are relative to `partial.largest`, which was the largest: to follow every
// new one would take longer than the sums. None exceeds it by more than the transform's reach, so no sum overflows.
struct ThreadSums {
  Partial partial;  // `at` is that of `largest`
  float largest;
  float limit;  // a logit beyond it becomes `partial.largest`
};

DEVICE ThreadSums empty_sums() { return {empty_partial(), -INFINITY, -INFINITY}; }

// The largest of a group as a word: of 16-bit elements, in one half of it, beside another of the group.
template <class T> DEVICE unsigned largest_word(uint4 v) {
  return dev::max_packed<T>(dev::max_packed<T>(v.x, v.y), dev::max_packed<T>(v.z, v.w));
}

template <class T> DEVICE float largest_in(unsigned word) {
  if constexpr (sizeof(T) == 4) {
    return dev::float_from_bits(word);
  } else {
    float low, high;
    dev::unpack<T>(word, low, high);
    return dev::max(low, high);
  }
}

template <class T, int U> DEVICE float largest_of(const uint4 (&v)[U]) {
  unsigned word = largest_word<T>(v[0]);
  UNROLL for (int u = 1; u < U; u++) word = dev::max_packed<T>(word, largest_word<T>(v[u]));
  return largest_in<T>(word);
}

// Masks element `target` of a group; sums leave it out.
template <class T> DEVICE uint4 without_target(uint4 v, int target) {
  float x[kGroup<T>];
  widen<T>(v, x);
  UNROLL for (int k = 0; k < kGroup<T>; k++) x[k] = k == target ? -INFINITY : x[k];
  return narrow<T>(x);
}

// Adds U groups of logits, `group` and those `stride` groups after one another. They are -inf for masked classes and
// elements beyond the row. The target, negative if it is in no group of this thread, is left out.
template <class T, bool STATS, bool SOFTCAP, int U>
DEVICE void add_groups(ThreadSums& sums, uint4 (&v)[U], int group, int stride, int target,
                       const Transform<SOFTCAP>& transform) {
  constexpr int N = kGroup<T>;
  Partial& a = sums.partial;
  float largest = largest_of<T>(v);
  const bool has_target = static_cast<unsigned>((target >> kLogGroup<T>) - group) < static_cast<unsigned>(U * stride);
  if (has_target || largest > sums.limit) {  // rare after a thread's first groups: one branch for both
    if (has_target) {
      UNROLL for (int u = 0; u < U; u++) {
        if (group + u * stride == target / N) v[u] = without_target<T>(v[u], target % N);
      }
      largest = largest_of<T>(v);
    }
    if (largest > sums.limit) {
      relate<STATS>(a, largest, transform.reference(largest), transform);
      a.largest = largest;
      sums.limit = largest + transform.reach();
    }
  }
  if constexpr (STATS) {
    if (largest > sums.largest) {
      UNROLL for (int u = U - 1; u >= 0; u--) {
        if (U == 1 || largest_in<T>(largest_word<T>(v[u])) == largest) a.at = static_cast<unsigned>(group + u * stride);
      }
    }
  }
  sums.largest = dev::max(sums.largest, largest);
  float exp = 0.f, linear = 0.f, weighted = 0.f, squares = 0.f;
  if constexpr (SOFTCAP || N == 4) {  // no pairs: f32 has no registers left for them
    UNROLL for (int u = 0; u < U; u++) {
      float x[N];
      widen<T>(v[u], x);
      UNROLL for (int k = 0; k < N; k++) {
        const float d = transform.near(x[k], a.largest, a.reference), e = dev::exp2_approx(d);
        exp = u + k == 0 ? e : exp + e;
        linear = dev::fma(d, kUnit, linear);
        if constexpr (STATS) {
          weighted = dev::fma(d, e, weighted);
          squares = dev::fma(e, e, squares);
        }
      }
    }
  } else {
    dev::Pair exps = {0.f, 0.f}, linears = exps, weighteds = exps, squareds = exps;
    UNROLL for (int u = 0; u < U; u++) {
      float x[N];
      widen<T>(v[u], x);
      UNROLL for (int k = 0; k < N; k += 2) {
        const dev::Pair d = transform.near_pair({x[k], x[k + 1]}, a.reference);
        const dev::Pair e = {dev::exp2_approx(d.low), dev::exp2_approx(d.high)};
        exps = u + k == 0 ? e : dev::add(exps, e);
        linears = dev::fma(d, {kUnit, kUnit}, linears);
        if constexpr (STATS) {
          weighteds = dev::fma(d, e, weighteds);
          squareds = dev::fma(e, e, squareds);
        }
      }
    }
    exp = exps.low + exps.high, linear = linears.low + linears.high;
    weighted = weighteds.low + weighteds.high, squares = squareds.low + squareds.high;
  }
  if (linear == -INFINITY) {  // something is masked, or all is far: one comparison where nothing is
    PATH("masked or far");
    exp = linear = weighted = squares = 0.f;
    UNROLL for (int u = 0; u < U; u++) {
      float x[N];
      widen<T>(dev::opaque(v[u]), x);
      UNROLL for (int k = 0; k < N; k++) {
        if (x[k] != -INFINITY) {
          const float d = transform.exact(x[k], a.largest, a.reference), e = dev::exp2_approx(d);
          exp += e;
          linear += transform.in_units(x[k], a.largest, d);
          if constexpr (STATS) {
            if (e > 0.f) weighted = dev::fma(d, e, weighted);
            squares = dev::fma(e, e, squares);
          }
          a.classes++;
        }
      }
    }
  } else {
    a.classes += U * N;
  }
  a.exp += exp;
  a.linear += linear;
  a.weighted += weighted;
  a.squares += squares;
}

// The largest of a warp's numbers, as integers in the same order. No NaN is among them, and -0 counts as 0.
DEVICE float largest_of_warp(float x) {
  const int bits = static_cast<int>(dev::bits_from_float(x + 0.f));
  const int most = dev::reduce_max(bits ^ (bits >> 31 & 0x7fffffff));
  return dev::float_from_bits(static_cast<unsigned>(most ^ (most >> 31 & 0x7fffffff)));
}

// Merges the results of LANES lanes, a power of 2, which all such lanes of the warp hold alike; every lane gets the
// result. First the largest logit, to which each lane's sums are made relative once, then plain sums.
template <bool STATS, int LANES, bool SOFTCAP>
DEVICE Partial merge_lanes(Partial a, float own_largest, const Transform<SOFTCAP>& transform) {
  const float largest = largest_of_warp(own_largest);
  const unsigned at = dev::reduce_min(own_largest == largest ? a.at : ~0u);
  relate<STATS>(a, largest, transform.reference(largest), transform);
  a.largest = largest;
  a.at = at;
  UNROLL for (int lane = LANES / 2; lane > 0; lane >>= 1) {
    a.exp += dev::shuffle_xor(a.exp, lane);
    a.linear += dev::shuffle_xor(a.linear, lane);
    if constexpr (STATS) {
      a.weighted += dev::shuffle_xor(a.weighted, lane);
      a.squares += dev::shuffle_xor(a.squares, lane);
    }
  }
  a.classes = dev::reduce_add(a.classes) / (32 / LANES);
  return a;
}

template <bool STATS, bool SOFTCAP> DEVICE Partial merge_warp(const ThreadSums& sums, const Transform<SOFTCAP>& transform) {
  return merge_lanes<STATS, 32>(sums.partial, sums.largest, transform);
}

constexpr int kMaxWarps = 8;  // a block's; src/kernels/select.rs launches no more

// Merges the warps' results, one element of `scratch` each; every lane of a warp that calls it gets the result.
template <bool STATS, bool SOFTCAP>
DEVICE Partial merge_warps(const Partial* scratch, const Transform<SOFTCAP>& transform) {
  const unsigned lane = threadIdx.x % kMaxWarps, warps = blockDim.x / 32;
  const Partial a = lane < warps ? scratch[lane] : empty_partial();
  return merge_lanes<STATS, kMaxWarps>(a, a.largest, transform);
}

// Merges all threads' results through `scratch`; the first warp gets the result.
template <bool STATS, bool SOFTCAP>
DEVICE Partial merge_block(const ThreadSums& sums, Partial* scratch, const Transform<SOFTCAP>& transform) {
  const Partial a = merge_warp<STATS>(sums, transform);
  if (blockDim.x == 32) return a;
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = a;
  dev::sync_block();
  return threadIdx.x < 32 ? merge_warps<STATS>(scratch, transform) : a;
}
